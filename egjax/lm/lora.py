"""Low-rank adaptation: a second, small tree of parameters beside weights that stay as they are.

An adapted matrix W gives `x·W + s·(x·A)·B` with A of r columns and B of r rows, s = α / r; B
starts at zero, so that training starts at the base model (Hu et al. 2021, arXiv 2106.09685).

The adapter has the structure `{"layers": {name: {"a": …, "b": …}}}`. `attach` puts it beside the
weights of the base; every function that takes parameters takes the result, no merged matrix is
ever made. With `rows` the adapter counts for some rows of a batch only: πᴱ and πᴺ come out of one
set of weights in one pass (`expert_and_anti_expert`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from egjax.errors import EgjaxError
from egjax.lm import params as base_table
from egjax.lm.config import LlamaConfig
from egjax.lm.int8 import is_quantized
from egjax.lm.model import forward
from egjax.lm.params import Params, Spec

__all__ = [
    "TARGETS",
    "LoraConfig",
    "Pair",
    "attach",
    "count",
    "expert_and_anti_expert",
    "init",
    "merge",
    "shardings",
    "table",
    "unmerge",
]

TARGETS = ("query", "key", "value", "output", "gate", "up", "down")
"""Matrices of a layer that can be adapted."""


@dataclass(frozen=True)
class LoraConfig:
    """What is adapted, and how strongly. Hashable.

    Attributes:
        rank: columns of A and rows of B, r.
        alpha: α; the product is multiplied by `scale`.
        targets: the adapted matrices, of `TARGETS`.
        rank_stabilised: divide α by √r instead of r (Kalajdzievski 2023, arXiv 2312.03732).
        dtype: of the adapter. It is rounded to the dtype of the weights where it is used; float32
            keeps small updates.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = TARGETS
    rank_stabilised: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        if self.rank < 1:
            raise EgjaxError(f"a LoRA rank of {self.rank}", remedy="give at least 1")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets:
            raise EgjaxError(
                f"LoRA targets {list(self.targets)} are not matrices of a layer",
                remedy=f"choose from {', '.join(TARGETS)}",
            )

    @property
    def scale(self) -> float:
        """What the product of A and B is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


def table(config: LlamaConfig, lora: LoraConfig) -> dict[str, Any]:
    """The specification of every tensor of an adapter, derived from that of the base.

    A has the input axes of its matrix, then the rank; B the rank, then the output axes.
    """
    base = base_table.table(config)["layers"]
    uniform = jax.nn.initializers.variance_scaling

    def pair(spec: Spec) -> dict[str, Spec]:
        inputs = base_table.num_inputs(spec)
        layers, into, out = spec.shape[:1], spec.shape[1 : 1 + inputs], spec.shape[1 + inputs :]
        axes_in, axes_out = spec.axes[1 : 1 + inputs], spec.axes[1 + inputs :]
        # Uniform in ±1/√fan_in, as PEFT draws it.
        draw = uniform(
            1 / 3,
            "fan_in",
            "uniform",
            in_axis=tuple(range(1, 1 + inputs)),
            out_axis=1 + inputs,
            batch_axis=0,
        )
        a = Spec((*layers, *into, lora.rank), lora.dtype, ("layers", *axes_in, "rank"), draw)
        zeros = jax.nn.initializers.zeros
        b = Spec((*layers, lora.rank, *out), lora.dtype, ("layers", "rank", *axes_out), zeros)
        return {"a": a, "b": b}

    return {"layers": {name: pair(base[name]) for name in TARGETS if name in lora.targets}}


def init(key: jax.Array, config: LlamaConfig, lora: LoraConfig, mesh: Mesh | None = None) -> Params:
    """A first adapter, which changes nothing: A is random, B zero.

    Args:
        key: random key.
        config: the base model.
        lora: what to adapt.
        mesh: where to put it; None for the default device.
    """
    placement = None if mesh is None else shardings(config, lora, mesh)
    return base_table.draw(key, table(config, lora), placement)


def shardings(config: LlamaConfig, lora: LoraConfig, mesh: Mesh) -> Params:
    """Placement of an adapter on a mesh: as its matrices, the rank is never split."""
    return base_table.placements(table(config, lora), mesh)


def count(config: LlamaConfig, lora: LoraConfig) -> int:
    """Number of parameters of an adapter."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(table(config, lora)))


def attach(
    params: Params, adapter: Params, lora: LoraConfig, rows: jax.Array | None = None
) -> Params:
    """Base and adapter as one tree of parameters, for `forward`, `generate`, losses and all else.

    Args:
        params: of the base, which are shared, not copied. None of their gradients is taken if
            only `adapter` is differentiated.
        adapter: see `init`.
        lora: what it was made with.
        rows: float32[B], how much of the adapter counts in each row of a batch, e.g. 1 or 0; None
            for all of it everywhere.
    """
    layers = dict(params["layers"])
    dtype = params["final_norm"].dtype  # that of the matrices, but for those in eight bits
    for name, pair in adapter["layers"].items():
        layers[f"{name}_lora_a"] = pair["a"].astype(dtype)
        # The scale goes into B before it is rounded: one rounding, not two.
        layers[f"{name}_lora_b"] = (lora.scale * pair["b"]).astype(dtype)
    attached = {**params, "layers": layers}
    return attached if rows is None else _by_row(attached, rows)


def _by_row(attached: Params, rows: jax.Array) -> Params:
    """Attached parameters whose adapter counts in each row as `rows` says."""
    layers = attached["layers"]
    if isinstance(layers, tuple):
        return {**attached, "layers": tuple({**layer, "lora_rows": rows} for layer in layers)}
    depth = layers["attention_norm"].shape[0]
    rows = jnp.broadcast_to(rows, (depth, *rows.shape))
    return {**attached, "layers": {**layers, "lora_rows": rows}}


@struct.dataclass
class Pair:
    """πᴱ and πᴺ of one set of weights, as one of the models of anything that decodes or scores.

    It counts as two, πᴱ before πᴺ; a token costs one pass over the doubled rows, with one cache for
    both. See `egjax.lm.ensemble`.

    Attributes:
        attached: parameters of πᴺ with the adapter, see `attach`.
    """

    attached: Params

    def doubled(self, batch: int) -> Params:
        """Parameters for rows of which the first `batch` are read by πᴱ, as many more by πᴺ."""
        return _by_row(self.attached, jnp.repeat(jnp.array([1.0, 0.0]), batch))


def merge(params: Params, adapter: Params, lora: LoraConfig) -> Params:
    """Parameters of the adapted model without the adapter: W + s·A·B, rounded once.

    Raises:
        EgjaxError: the parameters are in eight bits.
    """
    return _add(params, adapter, lora.scale)


def unmerge(params: Params, adapter: Params, lora: LoraConfig) -> Params:
    """Takes out of merged parameters what `merge` put in, up to the rounding of their dtype."""
    return _add(params, adapter, -lora.scale)


def _add(params: Params, adapter: Params, scale: float) -> Params:
    if is_quantized(params):
        raise EgjaxError(
            "an adapter cannot be merged into matrices in eight bits",
            remedy="merge it before int8.quantize, or attach it",
        )
    return _sum(params, adapter, scale)


@jax.jit
def _sum(params: Params, adapter: Params, scale: float) -> Params:
    layers = dict(params["layers"])
    for name, pair in adapter["layers"].items():
        weight = layers[name]
        a, b = pair["a"].astype(jnp.float32), pair["b"].astype(jnp.float32)
        depth, rank = a.shape[0], a.shape[-1]
        product = jnp.einsum("lir,lro->lio", a.reshape(depth, -1, rank), b.reshape(depth, rank, -1))
        layers[name] = (weight + scale * product.reshape(weight.shape)).astype(weight.dtype)
    return {**params, "layers": layers}


def expert_and_anti_expert(
    params: Params,
    adapter: Params,
    config: LlamaConfig,
    lora: LoraConfig,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    apply: Callable[..., Any] = forward,
) -> tuple[Any, Any]:
    """πᴱ (with the adapter) and πᴺ (without it) from one pass over the doubled batch.

    Args:
        params: of πᴺ.
        adapter: what makes πᴱ of it.
        config: the model.
        lora: what the adapter was made with.
        tokens, positions, segment_ids: [B, T], see `egjax.lm.model.forward`.
        apply: `(params, config, tokens, positions, segment_ids)` to a pytree of arrays with
            leading axis 2B.

    Returns:
        The two halves of what `apply` gives: by default logits float32[B, T, V] of πᴱ and of πᴺ.
    """
    batch = tokens.shape[0]
    if positions is not None:
        positions = jnp.broadcast_to(positions, tokens.shape)
    doubled = jax.tree.map(lambda x: jnp.concatenate([x, x]), (tokens, positions, segment_ids))
    pair = Pair(attach(params, adapter, lora))
    out = apply(pair.doubled(batch), config, *doubled)
    return jax.tree.map(lambda x: x[:batch], out), jax.tree.map(lambda x: x[batch:], out)
