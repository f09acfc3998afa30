"""Keys and values of tokens already read, so that decoding reads each token once."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import struct

from egjax.lm.config import LlamaConfig
from egjax.mesh import constrain

__all__ = ["Cache", "empty", "write"]

Array = jax.Array


@struct.dataclass
class Cache:
    """A store of S slots for B rows. Every row has used the same number of slots.

    Who fills it sees to it that no more than S tokens go in: inside `jit` that cannot raise, and a
    slab beyond the end would overwrite the last slots.

    Attributes:
        keys, values: [L, B, kv_heads, S, head_dim].
        segment_ids: int32[B, S]. Segment of the token in each slot, 0 for padding and unused.
        used: int32[]. Slots in use.
    """

    keys: Array
    values: Array
    segment_ids: Array
    used: Array


def empty(config: LlamaConfig, batch: int, slots: int) -> Cache:
    """A cache with nothing in it.

    Args:
        config: the model.
        batch: rows B.
        slots: tokens S that it can hold.
    """
    shape = (config.num_layers, batch, config.num_kv_heads, slots, config.head_dim)
    store = constrain(jnp.zeros(shape, config.dtype), None, "batch", "kv_heads", None, None)
    return Cache(
        keys=store,
        values=store,
        segment_ids=jnp.zeros((batch, slots), jnp.int32),
        used=jnp.int32(0),
    )


def write(cache: Cache, layer: Array, keys: Array, values: Array) -> tuple[Cache, Array, Array]:
    """Puts the keys and values of T new tokens behind those in use, in one layer.

    The whole store goes through and one slab of it is overwritten: in a loop XLA does that in
    place, where a store cut into layers would be copied at every token.

    Args:
        cache: the store; `used` and `segment_ids` are left as they are, for the other layers.
        layer: int32[].
        keys, values: [B, kv_heads, T, head_dim].

    Returns:
        The store, and this layer's keys and values [B, kv_heads, S, head_dim].
    """
    at = (layer, 0, 0, cache.used, 0)
    cache = replace(
        cache,
        keys=jax.lax.dynamic_update_slice(cache.keys, keys[None], at),
        values=jax.lax.dynamic_update_slice(cache.values, values[None], at),
    )
    return cache, cache.keys[layer], cache.values[layer]
