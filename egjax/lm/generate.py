"""Decoding, of one model or of several whose logits are combined at every token.

Prompts of different lengths are padded on the left, so that every row writes its next token into
the same slot of the cache; padding is masked and rotary positions are relative, so it never
matters. Shapes depend on the bucketed length alone: one compilation serves many prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer

from egjax.errors import EgjaxError
from egjax.lm.cache import Cache
from egjax.lm.config import LlamaConfig
from egjax.lm.ensemble import Combine, Models, check_vocabularies, empty_caches, first, read_all
from egjax.lm.lora import Pair
from egjax.lm.params import Params
from egjax.lm.stops import Stops, follow

__all__ = [
    "Generation",
    "Prompts",
    "check_settings",
    "completions",
    "draw",
    "generate",
    "pad_prompts",
    "sampling_logits",
]

Array = jax.Array


@struct.dataclass
class Prompts:
    """Prompts of B rows, padded on the left.

    Attributes:
        tokens: int32[B, P].
        mask: bool[B, P]. True for a token, False for padding. A row without any token is a filler
            of the batch: nothing is generated for it.
    """

    tokens: Array
    mask: Array


@struct.dataclass
class Generation:
    """Completions of B rows, up to N tokens each.

    Attributes:
        tokens: int32[B, N]. The end token included; what follows it is padding.
        logps: float32[B, N]. Log-probability of each token under the combined logits, before
            temperature and top-p; 0 at padding.
        mask: bool[B, N]. True for a generated token.
        ended: bool[B]. True where the end token or a stop string came.
    """

    tokens: Array
    logps: Array
    mask: Array
    ended: Array


def check_ids(prompts: Sequence[Sequence[int]], bucket: int) -> None:
    """Refuses what cannot be padded to a multiple of `bucket`.

    Raises:
        EgjaxError: there is no prompt, one is empty, an id is negative, or the bucket is below 1.
    """
    if bucket < 1:
        raise EgjaxError(f"a bucket of {bucket} tokens", remedy="at least 1")
    if not len(prompts) or not all(len(prompt) for prompt in prompts):
        raise EgjaxError("a prompt is empty", remedy="give each prompt at least one token")
    for row, prompt in enumerate(prompts):
        if min(prompt) < 0:
            raise EgjaxError(f"token {min(prompt)} is no token", where=f"prompt {row}")


def pad_prompts(
    prompts: Sequence[Sequence[int]], *, pad_id: int, bucket: int = 64, rows: int | None = None
) -> Prompts:
    """Pads prompts on the left to a common, bucketed length.

    Args:
        prompts: token ids of each prompt.
        pad_id: what to pad with; any id serves.
        bucket: the length is rounded up to a multiple of this, to compile for few lengths.
        rows: rows B of the batch, the last ones filled with empty prompts; None for as many as
            there are prompts.

    Raises:
        EgjaxError: there is no prompt, one is empty or has a negative id, or there are more than
            `rows`.
    """
    check_ids(prompts, bucket)
    rows = len(prompts) if rows is None else rows
    if len(prompts) > rows:
        raise EgjaxError(f"{len(prompts)} prompts for a batch of {rows} rows")
    length = -(-max(map(len, prompts)) // bucket) * bucket
    tokens = np.full((rows, length), pad_id, np.int32)
    mask = np.zeros((rows, length), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = True
    return Prompts(tokens=jnp.asarray(tokens), mask=jnp.asarray(mask))


def check_settings(
    models: Models, prompts: Prompts, max_new_tokens: int, temperature: float, top_p: float
) -> None:
    """Refuses what no decoder here can do; arguments as in `generate`.

    Raises:
        EgjaxError: there is no model, the models' vocabularies differ in size, a prompt has a token
            beyond them, the context is too short, or a setting is out of range.
    """
    if not models:
        raise EgjaxError("there is no model to decode")
    if max_new_tokens < 1:
        raise EgjaxError(f"{max_new_tokens} new tokens", remedy="at least 1")
    check_vocabularies({f"model {i}": config.vocab_size for i, (_, config) in enumerate(models)})
    if not isinstance(prompts.tokens, Tracer) and not isinstance(prompts.mask, Tracer):
        # A caller may be tracing while its prompts are known.
        with jax.ensure_compile_time_eval():
            highest = int(jnp.where(prompts.mask, prompts.tokens, 0).max())
        if highest >= models[0][1].vocab_size:
            raise EgjaxError(
                f"token {highest} in a prompt, of {models[0][1].vocab_size} that the model has",
                remedy="encode with the model's own tokenizer",
            )
    slots = prompts.tokens.shape[1] + max_new_tokens
    for _, config in models:
        if slots > config.max_seq_len:
            raise EgjaxError(
                f"prompts padded to {prompts.tokens.shape[1]} tokens and {max_new_tokens} new ones "
                f"exceed the context of {config.max_seq_len}",
                remedy="shorten the prompts, max_new_tokens or the bucket",
            )
    # NaN is in no range.
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise EgjaxError(f"temperature {temperature}, top_p {top_p}", remedy="≥ 0 and in (0, 1]")


def generate(
    models: Models,
    prompts: Prompts,
    key: Array,
    *,
    max_new_tokens: int,
    combine: Combine = first,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stops: Stops | None = None,
) -> Generation:
    """Completes prompts token by token until every row has ended.

    Args:
        models: (parameters, config) of each model; all read the same tokens, each with a cache of
            its own. The ids of padding and of the end are those of the first. An
            `egjax.lm.lora.Pair` counts as two, πᴱ and πᴺ.
        prompts: see `pad_prompts`.
        key: random key, consumed. Each row has a stream of its own, so that what is drawn for it
            does not depend on how many rows there are.
        max_new_tokens: most tokens N of a completion.
        combine: what is decoded, from the models' logits; e.g. `egjax.lm.ratio.ratio_combine`.
            Pass the same function object again to reuse the compilation.
        temperature: divides the logits before drawing; 0 takes the most likely token.
        top_p: draw from the smallest set of tokens with at least this probability (nucleus,
            Holtzman et al. 2020, arXiv 1904.09751).
        stops: strings that end a completion like the end token, see `egjax.lm.stops.stop_table`;
            the token in which one ends is kept, `egjax.lm.stops.cut` shortens the text.

    Raises:
        EgjaxError: the models' vocabularies differ in size, the context is too short, or a
            setting is out of range.
    """
    check_settings(models, prompts, max_new_tokens, temperature, top_p)
    return _generate(
        tuple(params for params, _ in models),
        prompts,
        key,
        jnp.float32(temperature),
        jnp.float32(top_p),
        stops,
        configs=tuple(config for _, config in models),
        combine=combine,
        max_new_tokens=max_new_tokens,
    )


@struct.dataclass
class _Loop:
    """What the loop over tokens carries: caches, the step to do next, the result so far, and how
    much of a stop string each row has."""

    caches: tuple[Cache, ...]
    step: Array
    result: Generation
    matched: Array


@partial(jax.jit, static_argnames=("configs", "combine", "max_new_tokens"))
def _generate(
    params: tuple[Params | Pair, ...],
    prompts: Prompts,
    key: Array,
    temperature: Array,
    top_p: Array,
    stops: Stops | None,
    *,
    configs: tuple[LlamaConfig, ...],
    combine: Combine,
    max_new_tokens: int,
) -> Generation:
    rows, length = prompts.tokens.shape
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(rows, dtype=jnp.int32))
    eos = jnp.array(configs[0].eos_ids, jnp.int32)
    pad = configs[0].pad_id or 0
    filler = ~prompts.mask.any(axis=1)

    def read(caches, tokens, mask):
        """Combined logits [B, V] after the last of these tokens, and the caches with them."""
        logits, caches = read_all(params, configs, tokens, mask, caches)
        return combine(logits), caches

    def choose(logits, step, result, matched):
        """Draws token `step` of the rows that go on, and follows the stop strings."""
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        token = draw(logits, step_keys, temperature, top_p)
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
        going = ~(result.ended | filler)
        token = jnp.where(going, token, pad)
        hits, states = follow(stops, matched, token[:, None])
        ends = (token[:, None] == eos).any(axis=1) | hits[:, 0]
        result = Generation(
            tokens=result.tokens.at[:, step].set(token),
            logps=result.logps.at[:, step].set(jnp.where(going, logp, 0.0)),
            mask=result.mask.at[:, step].set(going),
            ended=result.ended | (going & ends),
        )
        return result, states[:, 0]

    def unfinished(loop):
        return (loop.step < max_new_tokens) & ~(loop.result.ended | filler).all()

    def advance(loop):
        last = loop.step - 1
        logits, caches = read(
            loop.caches, loop.result.tokens[:, last, None], loop.result.mask[:, last, None]
        )
        result, matched = choose(logits, loop.step, loop.result, loop.matched)
        return _Loop(caches, loop.step + 1, result, matched)

    shape = (rows, max_new_tokens)
    blank = Generation(
        tokens=jnp.full(shape, pad, jnp.int32),
        logps=jnp.zeros(shape, jnp.float32),
        mask=jnp.zeros(shape, bool),
        ended=jnp.zeros(rows, bool),
    )
    caches = empty_caches(params, configs, rows, length + max_new_tokens)
    logits, caches = read(caches, prompts.tokens, prompts.mask)
    start = _Loop(caches, jnp.int32(1), *choose(logits, 0, blank, jnp.zeros(rows, jnp.int32)))
    return jax.lax.while_loop(unfinished, advance, start).result


def draw(logits: Array, keys: Array, temperature: Array, top_p: Array) -> Array:
    """A token int32[B] per row of logits [B, V]; temperature 0 takes the most likely.

    The draw is the maximum of the logits with noise that the key alone determines, so rows of like
    logits and equal keys draw the same token.
    """

    def sample() -> Array:
        return jax.vmap(jax.random.categorical)(keys, sampling_logits(logits, temperature, top_p))

    likeliest = jnp.argmax(logits, axis=-1)
    token = jax.lax.cond(temperature > 0, sample, lambda: likeliest)
    return token.astype(jnp.int32)


def sampling_logits(logits: Array, temperature: Array, top_p: Array) -> Array:
    """Logits [..., V] of what is drawn from at a temperature above 0: -inf outside the smallest set
    of probability at least `top_p`."""
    # Below that the noise decides nothing, and quotients would overflow.
    scaled = logits / jnp.maximum(temperature, 1e-6)
    return jax.lax.cond(top_p < 1, lambda: _nucleus(scaled, top_p), lambda: scaled)


def _nucleus(logits: Array, top_p: Array) -> Array:
    """Logits [..., V] with -inf outside the smallest set of probability at least `top_p`; of equal
    ones those of the lower ids belong to it."""
    descending = -jnp.sort(-logits, axis=-1)
    shares = jax.nn.softmax(descending, axis=-1)
    kept = jnp.cumsum(shares, axis=-1) - shares < top_p
    lowest = jnp.where(kept, descending, jnp.inf).min(axis=-1, keepdims=True)
    above, equal = logits > lowest, logits == lowest
    room = (kept.sum(axis=-1) - above.sum(axis=-1))[..., None]
    return jnp.where(above | (equal & (jnp.cumsum(equal, axis=-1) <= room)), logits, -jnp.inf)


def completions(generation: Generation, eos_ids: Sequence[int]) -> list[list[int]]:
    """Token ids of each completion on the host, without the end token and padding."""
    host: Any = jax.device_get((generation.tokens, generation.mask))
    return [
        [int(token) for token, real in zip(tokens, mask) if real and int(token) not in eos_ids]
        for tokens, mask in zip(*host)
    ]
