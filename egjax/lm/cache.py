"""Keys and values of tokens already read, so that decoding reads each token once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from egjax.lm.config import LlamaConfig
from egjax.mesh import constrain

__all__ = ["Cache", "empty", "put_segments", "write"]

Array = jax.Array

# Rows that are written one slab each, faster than a scatter; for more the program would grow long.
_SLABS = 32


@struct.dataclass
class Cache:
    """A store of S slots for B rows. All rows have used the same number of slots, or each its own.

    Who fills it sees to it that no more than S tokens go in: inside `jit` that cannot raise, and a
    slab beyond the end would overwrite the last slots.

    Attributes:
        keys, values: [L, B, kv_heads, S, head_dim]; of a model whose layers are apart
            (`egjax.lm.params.unstacked`) a tuple of L arrays.
        segment_ids: int32[B, S]. Segment of the token in each slot, 0 for padding and unused.
        used: int32[], slots in use, the same in all rows; or int32[B], those of each row. What lies
            behind them is not seen and is overwritten, so to forget tokens is to lower it.
    """

    keys: Array | tuple[Array, ...]
    values: Array | tuple[Array, ...]
    segment_ids: Array
    used: Array


def empty(
    config: LlamaConfig, batch: int, slots: int, *, by_row: bool = False, apart: bool = False
) -> Cache:
    """A cache with nothing in it.

    Args:
        config: the model.
        batch: rows B.
        slots: tokens S that it can hold.
        by_row: each row counts its own slots.
        apart: an array for each layer.
    """
    shape = (batch, config.num_kv_heads, slots, config.head_dim)
    axes = ("batch", "kv_heads", None, None)

    def store() -> Array | tuple[Array, ...]:
        depth = config.num_layers
        if apart:
            return tuple(constrain(jnp.zeros(shape, config.dtype), *axes) for _ in range(depth))
        return constrain(jnp.zeros((depth, *shape), config.dtype), None, *axes)

    # Two arrays: one array cannot be donated twice.
    return Cache(
        keys=store(),
        values=store(),
        segment_ids=jnp.zeros((batch, slots), jnp.int32),
        used=jnp.zeros((batch,) if by_row else (), jnp.int32),
    )


def write(
    cache: Cache, layer: Array | int, keys: Array, values: Array
) -> tuple[Cache, Array, Array]:
    """Puts the keys and values of T new tokens behind those in use, in one layer.

    The whole store goes through and one slab of it is overwritten: in a loop XLA does that in
    place, where a store cut into layers would be copied at every token.

    Args:
        cache: the store; `used` and `segment_ids` are left as they are, for the other layers.
        layer: int32[], or a number where layers are apart.
        keys, values: [B, kv_heads, T, head_dim].

    Returns:
        The store, and this layer's keys and values [B, kv_heads, S, head_dim].
    """
    keys, key = _put(cache.keys, keys, layer, cache.used)
    values, value = _put(cache.values, values, layer, cache.used)
    return replace(cache, keys=keys, values=values), key, value


def put_segments(cache: Cache, segment_ids: Array) -> Array:
    """`cache.segment_ids` with those of T new tokens [B, T] behind the slots in use."""
    if not cache.used.ndim:
        start = jnp.zeros_like(cache.used), cache.used
        return jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, start)
    return jax.vmap(jax.lax.dynamic_update_slice)(
        cache.segment_ids, segment_ids, cache.used[:, None]
    )


def _put(
    store: Array | tuple[Array, ...], new: Array, layer: Array | int, used: Array
) -> tuple[Any, Array]:
    """The store with `new` [B, kv_heads, T, head_dim] in one layer, from slot `used` on; and all of
    that layer."""
    if isinstance(store, tuple):
        mine = _overwritten(store[int(layer)], (), new, used)
        return (*store[: int(layer)], mine, *store[int(layer) + 1 :]), mine
    store = _overwritten(store, (layer,), new, used)
    return store, store[layer]


def _overwritten(store: Array, at: tuple[Array | int, ...], new: Array, used: Array) -> Array:
    """An array [..., B, kv_heads, S, head_dim] with new tokens at an index of its first axes."""
    lead = (None,) * len(at)
    # Of one type: with 64-bit numbers plain ones and those of a loop would be of two.
    at = tuple(jnp.asarray(i, used.dtype) for i in at)
    zero = jnp.zeros((), used.dtype)
    if not used.ndim:
        return jax.lax.dynamic_update_slice(store, new[lead], (*at, zero, zero, used, zero))
    rows, _, length, _ = new.shape
    if rows > _SLABS:
        slots = used[:, None] + jnp.arange(length, dtype=jnp.int32)
        index = *at, jnp.arange(rows, dtype=jnp.int32)[:, None], slice(None), slots
        return store.at[index].set(new.swapaxes(1, 2))
    for row in range(rows):
        slab = new[(*lead, slice(row, row + 1))]
        store = jax.lax.dynamic_update_slice(store, slab, (*at, zero + row, zero, used[row], zero))
    return store
