"""The parameters of a Llama: one table says of each tensor its shape, axes and initialiser.

From that table come the initial values, the abstract shapes and the placement on a mesh. The
parameters are a nested dict; the layers of the model are stacked on a leading axis, so that the
model scans over them and compiles one layer. For decoding on a GPU they can be taken apart, see
`unstacked`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from egjax.lm.config import LlamaConfig
from egjax.mesh import sharding

__all__ = [
    "Params",
    "Spec",
    "abstract",
    "count",
    "cut",
    "draw",
    "init",
    "num_inputs",
    "placements",
    "shardings",
    "table",
    "unstacked",
    "widened",
]

Params = dict[str, Any]
Initializer = Callable[..., jax.Array]

EMBEDDING_STD = 0.02


@dataclass(frozen=True)
class Spec:
    """One tensor.

    Attributes:
        shape: its sizes.
        dtype: its element type.
        axes: logical name of each dimension, see `egjax.mesh.RULES`.
        init: `init(key, shape, dtype)`.
    """

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...]
    init: Initializer


def table(config: LlamaConfig) -> dict[str, Any]:
    """The specification of every tensor, in the structure of the parameters.

    Axes: `embed` residual stream, `heads` and `kv_heads` heads, `head` within a head, `mlp`,
    `vocab`, `layers`. Matrices have their input axes first.
    """
    sizes = {
        "layers": config.num_layers,
        "embed": config.hidden_size,
        "mlp": config.intermediate_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head": config.head_dim,
        "vocab": config.vocab_size,
    }

    def spec(init: Initializer, *axes: str) -> Spec:
        return Spec(tuple(sizes[axis] for axis in axes), config.dtype, axes, init)

    def matrix(inputs: tuple[str, ...], outputs: tuple[str, ...], scale: float = 1.0) -> Spec:
        axes = ("layers", *inputs, *outputs)
        initializer = jax.nn.initializers.variance_scaling(
            scale,
            "fan_in",
            "truncated_normal",
            in_axis=tuple(range(1, 1 + len(inputs))),
            out_axis=tuple(range(1 + len(inputs), len(axes))),
            batch_axis=0,
        )
        return spec(initializer, *axes)

    ones, zeros = jax.nn.initializers.ones, jax.nn.initializers.zeros
    # Each layer adds twice to the residual stream; this keeps its variance at the depth of one.
    residual = 1 / (2 * config.num_layers)
    layers = {
        "attention_norm": spec(ones, "layers", "embed"),
        "query": matrix(("embed",), ("heads", "head")),
        "key": matrix(("embed",), ("kv_heads", "head")),
        "value": matrix(("embed",), ("kv_heads", "head")),
        "output": matrix(("heads", "head"), ("embed",), residual),
        "mlp_norm": spec(ones, "layers", "embed"),
        "gate": matrix(("embed",), ("mlp",)),
        "up": matrix(("embed",), ("mlp",)),
        "down": matrix(("mlp",), ("embed",), residual),
    }
    if config.attention_bias:
        layers["query_bias"] = spec(zeros, "layers", "heads", "head")
        layers["key_bias"] = spec(zeros, "layers", "kv_heads", "head")
        layers["value_bias"] = spec(zeros, "layers", "kv_heads", "head")
        layers["output_bias"] = spec(zeros, "layers", "embed")
    if config.mlp_bias:
        layers["gate_bias"] = spec(zeros, "layers", "mlp")
        layers["up_bias"] = spec(zeros, "layers", "mlp")
        layers["down_bias"] = spec(zeros, "layers", "embed")
    normal = jax.nn.initializers.normal(EMBEDDING_STD)
    specs = {
        "embedding": spec(normal, "vocab", "embed"),
        "layers": layers,
        "final_norm": spec(ones, "embed"),
    }
    if not config.tie_embeddings:
        specs["unembedding"] = spec(normal, "embed", "vocab")
    return specs


def init(key: jax.Array, config: LlamaConfig, mesh: Mesh | None = None) -> Params:
    """Random initial parameters; with a mesh, each device makes only its part.

    Args:
        key: random key.
        config: the model.
        mesh: where to put them; None for the default device.
    """
    return draw(key, table(config), None if mesh is None else shardings(config, mesh))


def draw(key: jax.Array, specs: dict[str, Any], placement: Params | None = None) -> Params:
    """Initial values of a table of tensors; with shardings, each device makes only its part."""
    leaves, structure = jax.tree.flatten(specs)

    def make(key):
        keys = jax.random.split(key, len(leaves))
        values = [s.init(k, s.shape, jnp.dtype(s.dtype)) for k, s in zip(keys, leaves)]
        return jax.tree.unflatten(structure, values)

    return jax.jit(make, out_shardings=placement)(key)


def abstract(config: LlamaConfig) -> Params:
    """Shapes and dtypes of the parameters, without any memory."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.dtype(s.dtype)), table(config))


def shardings(config: LlamaConfig, mesh: Mesh) -> Params:
    """Placement of the parameters on a mesh: `embed` over `data`, the rest over `model`."""
    return placements(table(config), mesh)


def placements(specs: dict[str, Any], mesh: Mesh) -> Params:
    """Placement of the tensors of a table on a mesh, by the names of their axes."""
    return jax.tree.map(lambda s: sharding(mesh, s.axes, s.shape), specs)


def cut(params: Params, vocab_size: int) -> Params:
    """Parameters without the tokens from `vocab_size` on; with `egjax.lm.config.LlamaConfig.cut`
    those of a model that never says what its tokenizer cannot read."""
    out = {**params, "embedding": params["embedding"][:vocab_size]}
    if "unembedding" in params:
        out["unembedding"] = params["unembedding"][:, :vocab_size]
    return out


def widened(params: Params, vocab_size: int) -> Params:
    """Parameters with so many tokens, those that were missing of zeros: for a model combined with
    one that is padded to as many, under a mask (`vocab_mask`) that leaves them out."""
    more = vocab_size - params["embedding"].shape[0]
    out = {**params, "embedding": jnp.pad(params["embedding"], ((0, more), (0, 0)))}
    if "unembedding" in params:
        out["unembedding"] = jnp.pad(params["unembedding"], ((0, 0), (0, more)))
    return out


def unstacked(params: Params, *, consume: bool = False) -> Params:
    """Parameters whose layers are a tuple of trees: the model goes through them one by one.

    A scan cuts each layer out of the stack before it multiplies with it. XLA for GPUs copies the
    layer to do so: a token that is decoded reads its weights, writes them and reads them again. The
    price of layers apart is a program as long as there are layers.

    Args:
        params: as `table` lists them, also with an adapter (`egjax.lm.lora.attach`) or in eight
            bits (`egjax.lm.int8`); nothing else takes what comes out than models that read it.
        consume: delete each stack once it is taken apart, so that no more than one exists twice.
    """
    layers = dict(params["layers"])
    parts: dict[str, tuple[jax.Array, ...]] = {}
    for name in list(layers):
        stack = layers.pop(name)
        parts[name] = _apart(stack)
        if consume:
            jax.block_until_ready(parts[name])
            stack.delete()
    depth = len(parts["attention_norm"])
    trees = tuple({name: part[i] for name, part in parts.items()} for i in range(depth))
    return {**params, "layers": trees}


@jax.jit
def _apart(stack: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(stack[i] for i in range(stack.shape[0]))


def num_inputs(spec: Spec) -> int:
    """How many axes of a layer's matrix are inputs: of those around `embed` either all or one."""
    return 1 if spec.axes[1] == "embed" else len(spec.axes) - 2


def count(config: LlamaConfig) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract(config)))
