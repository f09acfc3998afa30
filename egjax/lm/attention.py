"""Causal attention in four forms that give the same values: dense, chunked, cuDNN's and splash.

Which one serves depends on the platform and on the size of [T, S]; `choose` knows. A form is
prepared once per pass with who sees whom, then called in every layer. Letters as in
`egjax.lm.model`: B rows, T tokens, S keys, H query heads, N key and value heads, K their width.

Sources: Rabe & Staats 2021 (chunks, arXiv 2112.05682), Dao et al. 2022 (FlashAttention, arXiv
2205.14135); cuDNN's kernel as `jax.nn.dot_product_attention` calls it; splash attention of JAX's
Pallas operations for TPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from egjax.errors import EgjaxError
from egjax.lm.config import LlamaConfig
from egjax.mesh import mesh_in_use

__all__ = [
    "FORMS",
    "Attend",
    "Form",
    "Sight",
    "choose",
    "chunked",
    "cudnn",
    "dense",
    "einsum",
    "prepare",
    "splash",
    "visible",
]

Array = jax.Array
Attend = Callable[[Array, Array, Array], Array]
"""(query [B, H, T, K], key and value [B, N, S, K]) -> [B, H, T, K]."""

DENSE_SCORES = 1 << 20
"""Scores T·S of a head up to which no form is faster than the dense one."""
CHUNK = 256
"""Queries whose scores exist at once in the chunked form."""
BLOCK = 128
"""Splash attention's sequences are multiples of this."""
RESULT = "attention"
"""What policies of rematerialisation call the result."""


class Sight(NamedTuple):
    """Who sees whom: earlier tokens of the own segment, and oneself.

    Attributes:
        segments: int32[B or 1, T], of the queries; 0 is padding, which sees nothing.
        keys: int32[B or 1, S], of the keys; the queries' own where there is no cache.
        before: keys before the first query: 0, int32[], or int32[B, 1] where rows differ.
        cached: the keys come from a cache.
        whole: one segment a row and no padding.
        prefixes: int32[B, T] or None. A segment that each query sees beside its own; 0 for none.
    """

    segments: Array
    keys: Array
    before: Array | int
    cached: bool
    whole: bool
    prefixes: Array | None = None


def choose(config: LlamaConfig, sight: Sight) -> str:
    """The form that serves best where the computation is traced, as a name of `FORMS`.

    Flash kernels for long sequences on a GPU (16-bit types only) or a TPU; otherwise the dense
    form while its scores are few, and chunks beyond.
    """
    queries, keys = sight.segments.shape[1], sight.keys.shape[1]
    platform = jax.default_backend()
    if not sight.cached and queries >= BLOCK:
        one = sight.prefixes is None and (jax.device_count() == 1 or mesh_in_use() is not None)
        if platform == "tpu" and one:
            return "splash"
        wide = config.head_dim % 8 == 0 and config.head_dim <= 128
        if platform == "gpu" and config.dtype != "float32" and wide:
            return "cudnn"
    return "dense" if queries * keys <= DENSE_SCORES else "chunked"


def visible(sight: Sight) -> Array:
    """bool[B, T, S]: which keys a query sees."""
    last = sight.before + jnp.arange(sight.segments.shape[1], dtype=jnp.int32)[None]  # [1 or B, T]
    causal = jnp.arange(sight.keys.shape[1], dtype=jnp.int32)[None, None] <= last[:, :, None]
    return causal & _same(sight) & (sight.segments != 0)[:, :, None]


def _same(sight: Sight) -> Array:
    """bool[B, T, S]: which keys are of a query's segment or prefix, before or behind it."""
    same = sight.segments[:, :, None] == sight.keys[:, None, :]
    if sight.prefixes is not None:
        prefix = sight.prefixes[:, :, None]
        same = same | ((prefix == sight.keys[:, None, :]) & (prefix != 0))
    return same


def dense(sight: Sight) -> Attend:
    """All scores [B, H, T, S] at once."""
    allowed = visible(sight)
    return lambda query, key, value: _softmax(query, key, value, allowed)


def chunked(sight: Sight, chunk: int = CHUNK) -> Attend:
    """The scores of `chunk` queries at a time; the backward pass computes them again.

    Memory grows with S · `chunk`, not with S · T.
    """

    def attend(query: Array, key: Array, value: Array) -> Array:
        length = query.shape[2]
        size = min(chunk, length)
        parts = -(-length // size)
        beyond = parts * size - length

        def split(x: Array, axis: int) -> Array:
            widths = [(0, beyond if i == axis else 0) for i in range(x.ndim)]
            x = jnp.pad(x, widths).reshape(*x.shape[:axis], parts, size, *x.shape[axis + 1 :])
            return jnp.moveaxis(x, axis, 0)

        # Not to be merged with the forward pass's: a scan keeps them apart anyway.
        @partial(jax.checkpoint, prevent_cse=False)
        def part(item: tuple[Array, Array, Array, Array | None]) -> Array:
            query, start, segments, prefixes = item
            seen = sight._replace(segments=segments, before=sight.before + start, prefixes=prefixes)
            return _softmax(query, key, value, visible(seen))

        starts = size * jnp.arange(parts, dtype=jnp.int32)
        sights = jax.tree.map(partial(split, axis=1), (sight.segments, sight.prefixes))
        mixed = jax.lax.map(part, (split(query, 2), starts, *sights))
        mixed = jnp.moveaxis(mixed, 0, 2)
        return mixed.reshape(*query.shape[:2], parts * size, -1)[:, :, :length]

    return attend


def cudnn(sight: Sight) -> Attend:
    """cuDNN's flash attention: an NVIDIA GPU, 16-bit types, heads of at most 128 (256 on Hopper).

    Segments go in as a mask [B, 1, T, S], made once for all layers and heads.
    """
    _refuse_cache(sight, "cudnn")
    same = None if sight.whole else _same(sight)[:, None]

    def attend(query: Array, key: Array, value: Array) -> Array:
        mixed = jax.nn.dot_product_attention(
            query.swapaxes(1, 2),
            key.swapaxes(1, 2),
            value.swapaxes(1, 2),
            mask=same,
            is_causal=True,
            implementation="cudnn",
        )
        return mixed.swapaxes(1, 2)

    return attend


def splash(sight: Sight, *, interpret: bool = False) -> Attend:
    """Pallas' splash attention: a TPU; blocks above the diagonal are never computed.

    On several devices the mesh must be known while tracing (`jax.set_mesh`): the compiler cannot
    split a kernel, so each device runs it on its rows and heads.

    Args:
        sight: who sees whom.
        interpret: run the kernel step by step on any platform, for tests.
    """
    _refuse_cache(sight, "splash")
    if sight.prefixes is not None:
        raise EgjaxError(
            "attention 'splash' knows no shared prefixes", remedy="use 'auto', 'dense' or 'chunked'"
        )

    def attend(query: Array, key: Array, value: Array) -> Array:
        batch, length = query.shape[0], query.shape[2]
        beyond = -length % BLOCK

        def pad(x: Array) -> Array:
            return jnp.pad(x, ((0, 0), (0, 0), (0, beyond), (0, 0)))

        query = pad(query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype))
        segments = jnp.broadcast_to(sight.segments, (batch, length))
        segments = jnp.pad(segments, ((0, 0), (0, beyond)))
        run = partial(_splash_rows, interpret=interpret)
        return _by_device(run, query, pad(key), pad(value), segments)[:, :, :length]

    return attend


def _splash_rows(query: Array, key: Array, value: Array, segments: Array, interpret: bool) -> Array:
    """Splash attention of the rows and heads of one device."""
    # Imported here: it brings Pallas, which other platforms do without.
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    length = query.shape[2]
    size = next(size for size in (512, 256, BLOCK) if length % size == 0)
    kernel = kernels.make_splash_mha_single_device(
        kernels.MultiHeadMask([kernels.CausalMask((length, length))] * query.shape[1]),
        block_sizes=kernels.BlockSizes(
            block_q=size,
            block_kv=size,
            block_q_dkv=size,
            block_kv_dkv=size,
            use_fused_bwd_kernel=True,
        ),
        residual_checkpoint_name=RESULT,
        interpret=interpret,
    )

    def row(query: Array, key: Array, value: Array, segments: Array) -> Any:
        return kernel(query, key, value, kernels.SegmentIds(segments, segments))

    return jax.vmap(row)(query, key, value, segments)


def _by_device(run: Callable[..., Array], *arrays: Array) -> Array:
    """Runs a kernel on each device's rows and heads, if there is a mesh."""
    mesh = mesh_in_use()
    if mesh is None:
        return run(*arrays)
    query, key, value, segments = arrays
    rows = "data" if query.shape[0] % mesh.shape["data"] == 0 else None
    heads = "model" if query.shape[1] % mesh.shape["model"] == 0 else None
    if heads and key.shape[1] % mesh.shape["model"]:
        # Every device needs the keys of its queries: give each query head keys of its own.
        repeats = query.shape[1] // key.shape[1]
        key, value = (jnp.repeat(x, repeats, axis=1) for x in (key, value))
    split = PartitionSpec(rows, heads)
    return jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(split, split, split, PartitionSpec(rows)),
        out_specs=split,
        check_vma=False,
    )(query, key, value, segments)


def _refuse_cache(sight: Sight, name: str) -> None:
    if sight.cached:
        raise EgjaxError(
            f"attention {name!r} does not read a cache", remedy="use 'auto', 'dense' or 'chunked'"
        )


Form = Callable[[Sight], Attend]
FORMS: Mapping[str, Form] = MappingProxyType(
    {"dense": dense, "chunked": chunked, "cudnn": cudnn, "splash": splash}
)
"""What `attention=` of `egjax.lm.model.forward` may name, beside `"auto"`."""


def prepare(name: str | Form, config: LlamaConfig, sight: Sight) -> Attend:
    """The form of a name, ready for the layers; `"auto"` leaves it to `choose`.

    Raises:
        EgjaxError: there is no such form, or it cannot do what is asked.
    """
    if not isinstance(name, str):
        return _named(name, sight)
    name = choose(config, sight) if name == "auto" else name
    if name not in FORMS:
        raise EgjaxError(f"no attention {name!r}", remedy=f"one of auto, {', '.join(FORMS)}")
    return _named(FORMS[name], sight)


def _named(form: Form, sight: Sight) -> Attend:
    """A form whose result goes by the name of `RESULT`."""
    attend = form(sight)
    if form is splash:  # names what its derivative needs, too
        return attend
    return lambda query, key, value: checkpoint_name(attend(query, key, value), RESULT)


def einsum(formula: str, x: Array, weights: Array, dtype=None) -> Array:
    """Einsum whose sums are float32, rounded once at the end to `dtype` (else that of `x`).

    Derivatives of products of 16 bits are such products, too.
    """
    rounded = jnp.dtype(dtype or x.dtype)
    if rounded == x.dtype == weights.dtype and rounded.itemsize == 2 and "..." not in formula:
        return _small(formula, x, weights)
    return _summed(formula, x, weights).astype(rounded)


def _summed(formula: str, *factors: Array) -> Array:
    return jnp.einsum(formula, *factors, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _small(formula: str, x: Array, weights: Array) -> Array:
    """JAX's own derivative multiplies in the type of the sum, which is float32: the same numbers at
    half the rate on a GPU."""
    return _summed(formula, x, weights).astype(x.dtype)


def _small_forward(formula: str, x: Array, weights: Array) -> tuple[Array, tuple[Array, Array]]:
    return _small(formula, x, weights), (x, weights)


def _small_backward(
    formula: str, factors: tuple[Array, Array], given: Array
) -> tuple[Array, Array]:
    (x, weights), (into, out) = factors, formula.split("->")
    left, right = into.split(",")
    to_x = _summed(f"{out},{right}->{left}", given, weights)
    to_weights = _summed(f"{left},{out}->{right}", x, given)
    return to_x.astype(x.dtype), to_weights.astype(weights.dtype)


_small.defvjp(_small_forward, _small_backward)


def _softmax(query: Array, key: Array, value: Array, allowed: Array) -> Array:
    """Grouped-query attention with all its scores, [B, H, T, K].

    Args:
        query: [B, H, T, K].
        key, value: [B, N, S, K].
        allowed: bool[B, T, S].
    """
    batch, heads, length, width = query.shape
    shared = key.shape[1]
    groups = (batch, shared, heads // shared * length, width)
    # The queries of a group lie as rows of one matrix, since they share their keys: on a CPU 1.3
    # to 2 times the speed of a product with the group as an axis of its own.
    scores = einsum("bnqk,bnsk->bnqs", query.reshape(groups), key, jnp.float32)
    scores = scores.reshape(batch, heads, length, -1) * width**-0.5
    # Finite, so that a token which sees nothing (padding) gives no NaN.
    scores = jnp.where(allowed[:, None], scores, jnp.finfo(jnp.float32).min)
    shares = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = einsum("bnqs,bnsk->bnqk", shares.reshape(*groups[:3], -1), value)
    return mixed.reshape(query.shape)
