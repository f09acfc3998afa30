"""Several models read as one: the logits of all of them at the same tokens, and their caches.

Whatever decodes or scores reads its models here, so an `egjax.lm.lora.Pair` counts as two of them
everywhere: πᴱ and πᴺ, out of one reading of the weights over doubled rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp

from egjax.errors import EgjaxError
from egjax.lm.cache import Cache, empty
from egjax.lm.config import LlamaConfig
from egjax.lm.lora import Pair
from egjax.lm.model import trunk, unembed
from egjax.lm.params import Params

__all__ = [
    "Combine",
    "Models",
    "check_vocabularies",
    "empty_caches",
    "first",
    "read",
    "read_all",
    "rewound",
    "taken",
    "voices",
]

Array = jax.Array
Models = Sequence[tuple[Params | Pair, LlamaConfig]]
Combine = Callable[[tuple[Array, ...]], Array]
"""From one array of logits [..., V] per model to logits [..., V] of what is decoded; a `Pair` gives
two, one behind the other."""


def first(logits: tuple[Array, ...]) -> Array:
    """The combination of plain decoding: the logits of the first (and only) model."""
    return logits[0]


def check_vocabularies(
    sizes: Mapping[str, int], fingerprints: Mapping[str, str] | None = None
) -> None:
    """Makes sure that models to be combined speak one vocabulary.

    Args:
        sizes: tokens in the vocabulary of each model, by the model's name.
        fingerprints: fingerprint of each model's tokenizer, by the same names; None where only
            the sizes are known.

    Raises:
        EgjaxError: sizes or tokenizers differ.
    """
    for what, values in (("vocabulary sizes", sizes), ("tokenizers", fingerprints or {})):
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{name} has {str(value)[:12]}" for name, value in values.items())
            raise EgjaxError(
                f"{what} differ: {listed}",
                remedy="combine models of one tokenizer; a padded vocabulary is cut on loading",
            )


def voices(params: Params | Pair) -> int:
    """How many logits a model gives: two for a `Pair`, else one. So many rows of its cache belong
    to one row of the batch."""
    return 2 if isinstance(params, Pair) else 1


def read(
    params: Params | Pair,
    config: LlamaConfig,
    tokens: Array,
    mask: Array | None = None,
    cache: Cache | None = None,
    *,
    last: bool = False,
    places: Array | None = None,
) -> tuple[tuple[Array, ...], Cache | None]:
    """Reads tokens with one model.

    Args:
        params, config: the model.
        tokens: int32[B, T].
        mask: bool[B, T], False for padding; None where padding only follows what counts.
        cache: tokens read before; these are put behind them.
        last: logits after the last token alone, [B, 1, V].
        places: int32[N], logits after these tokens alone, [B, N, V].

    Returns:
        Logits float32[B, T, V], of πᴱ and of πᴺ for a `Pair`; and the cache with these tokens.
    """
    number = voices(params)
    segments = None if mask is None else mask.astype(jnp.int32)
    if isinstance(params, Pair):
        params = params.doubled(tokens.shape[0])
        tokens = jnp.concatenate([tokens, tokens])
        segments = None if segments is None else jnp.concatenate([segments, segments])
    out = trunk(params, config, tokens, segment_ids=segments, cache=cache)
    final = out.final[:, -1:] if last else out.final
    logits = unembed(params, config, final if places is None else final[:, places])
    return tuple(jnp.split(logits, number)), out.cache


def read_all(
    params: tuple[Params | Pair, ...],
    configs: tuple[LlamaConfig, ...],
    tokens: Array,
    mask: Array,
    caches: tuple[Cache, ...],
) -> tuple[tuple[Array, ...], tuple[Cache, ...]]:
    """Logits [B, V] of every model after the last of these tokens, as a `Combine` takes them, and
    the caches with the tokens; arguments as for `read`."""
    logits: list[Array] = []
    filled: list[Cache] = []
    for p, config, cache in zip(params, configs, caches):
        found, more = read(p, config, tokens, mask, cache, last=True)
        assert more is not None
        logits += [x[:, 0] for x in found]
        filled.append(more)
    return tuple(logits), tuple(filled)


def empty_caches(
    params: tuple[Params | Pair, ...], configs: tuple[LlamaConfig, ...], rows: int, slots: int
) -> tuple[Cache, ...]:
    """A cache for each model, of S slots for B rows; of a `Pair` with πᴺ's rows behind πᴱ's."""

    def one(model: Params | Pair, config: LlamaConfig) -> Cache:
        weights = model.attached if isinstance(model, Pair) else model
        apart = isinstance(weights["layers"], tuple)
        return empty(config, voices(model) * rows, slots, apart=apart)

    return tuple(one(p, config) for p, config in zip(params, configs))


def taken(cache: Cache, index: Array, rows: int) -> Cache:
    """A cache whose rows are those at `index` int32[X] of a batch of B rows."""
    copies = cache.segment_ids.shape[0] // rows
    index = jnp.concatenate([index + copy * rows for copy in range(copies)])

    def of(store: Array | tuple[Array, ...]) -> Array | tuple[Array, ...]:
        return tuple(x[index] for x in store) if isinstance(store, tuple) else store[:, index]

    return replace(
        cache,
        keys=of(cache.keys),
        values=of(cache.values),
        segment_ids=cache.segment_ids[index],
    )


def rewound(cache: Cache, used: Array) -> Cache:
    """A cache in which the rows of the batch have used int32[B] slots; the others are forgotten."""
    return replace(cache, used=jnp.tile(used, cache.segment_ids.shape[0] // used.shape[0]))
