"""Beam search, of one model or of several whose logits are combined, as transformers has it.

The W likeliest prefixes go on side by side. A completion's score is the sum of its tokens'
log-probabilities (the end token's too) divided by `length^length_penalty`, length counted in
generated tokens; 1 makes it a mean, 0 a sum, more favours long completions. At every step the best
`(1 + ends) · W` continuations are looked at; those among the first W that end are completions, the
best W that do not end go on. Rules and the heuristic for stopping are those of transformers 5.23.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from egjax.errors import EgjaxError
from egjax.lm.cache import Cache
from egjax.lm.config import LlamaConfig
from egjax.lm.ensemble import Combine, Models, empty_caches, first, read_all, taken
from egjax.lm.generate import Generation, Prompts, check_settings
from egjax.lm.lora import Pair
from egjax.lm.params import Params

__all__ = ["Beams", "beam_search"]

Array = jax.Array
Stopping = Literal["heuristic", "full", "never"]

_NONE = -1e9  # score of a place without a completion, finite as in transformers


@struct.dataclass
class Beams:
    """Completions of B rows, W of each, best first.

    Attributes:
        tokens: int32[B, W, N]. The end token included; what follows it is padding.
        logps: float32[B, W, N]. Log-probability of each token; 0 at padding.
        mask: bool[B, W, N]. True for a generated token.
        scores: float32[B, W]. Sum of `logps` over length^length_penalty; -1e9 where there is none:
            there may be fewer completions than beams that the models' combination allows.
    """

    tokens: Array
    logps: Array
    mask: Array
    scores: Array

    def best(self, eos_ids: tuple[int, ...]) -> Generation:
        """The best completion of each row, as `egjax.lm.generate.generate` gives one."""
        tokens, mask = self.tokens[:, 0], self.mask[:, 0]
        is_end = (tokens[..., None] == jnp.array(eos_ids, jnp.int32)).any(-1)
        return Generation(tokens, self.logps[:, 0], mask, (is_end & mask).any(axis=1))


def beam_search(
    models: Models,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    beams: int = 4,
    length_penalty: float = 1.0,
    stopping: Stopping = "heuristic",
    combine: Combine = first,
) -> Beams:
    """Completes prompts by beam search.

    Args:
        models, prompts, max_new_tokens, combine: as for `egjax.lm.generate.generate`. What is still
            open after `max_new_tokens` counts as a completion.
        beams: W.
        length_penalty: exponent of the length that a sum of log-probabilities is divided by.
        stopping: when a row is done. `"heuristic"` (transformers' `early_stopping=False`): when the
            best open prefix, scored at its present length, is below the worst of W completions;
            `"full"` (`True`): when there are W completions; `"never"`: as the first, but with a
            positive penalty scored at the greatest length, so that nothing better is missed.

    Raises:
        EgjaxError: as `generate`; also fewer than one beam, or more than the vocabulary has tokens.
    """
    check_settings(models, prompts, max_new_tokens, 0.0, 1.0)
    if beams < 1 or max(2, 1 + len(models[0][1].eos_ids)) > models[0][1].vocab_size:
        raise EgjaxError(f"{beams} beams", remedy="at least 1, and a vocabulary beyond its ends")
    if stopping not in ("heuristic", "full", "never"):
        raise EgjaxError(f"no rule {stopping!r}", remedy="heuristic, full or never")
    return _beam_search(
        tuple(params for params, _ in models),
        prompts,
        jnp.float32(length_penalty),
        configs=tuple(config for _, config in models),
        combine=combine,
        max_new_tokens=max_new_tokens,
        beams=beams,
        stopping=stopping,
    )


@struct.dataclass
class _Loop:
    """What the loop carries. Open prefixes and completions have places W of their own.

    Attributes:
        caches: of each model, rows B · W (2 · B · W of a `Pair`).
        step: int32[]. Tokens of each open prefix.
        open_: their tokens and log-probabilities; `scores` are sums.
        done: completions.
        improvable: bool[B]. An open prefix may still beat a completion.
        alive: bool[]. Some continuation did not end.
    """

    caches: tuple[Cache, ...]
    step: Array
    open_: Beams
    done: Beams
    improvable: Array
    alive: Array


@partial(jax.jit, static_argnames=("configs", "combine", "max_new_tokens", "beams", "stopping"))
def _beam_search(
    params: tuple[Params | Pair, ...],
    prompts: Prompts,
    length_penalty: Array,
    *,
    configs: tuple[LlamaConfig, ...],
    combine: Combine,
    max_new_tokens: int,
    beams: int,
    stopping: Stopping,
) -> Beams:
    rows, length = prompts.tokens.shape
    eos = jnp.array(configs[0].eos_ids, jnp.int32)
    pad = configs[0].pad_id or 0
    looked_at = beams * max(2, 1 + len(configs[0].eos_ids))

    def read(caches, tokens, mask):
        """Log-probabilities [rows, V] after the last of these tokens, and the caches with them."""
        logits, caches = read_all(params, configs, tokens, mask, caches)
        return jax.nn.log_softmax(combine(logits)), caches

    def advance(loop: _Loop, logps: Array, caches: tuple[Cache, ...]) -> _Loop:
        """One token more, from its log-probabilities [B, W, V]."""
        vocabulary = logps.shape[-1]
        sums = (loop.open_.scores[:, :, None] + logps).reshape(rows, -1)
        sums, index = jax.lax.top_k(sums, looked_at)
        parent, token = index // vocabulary, (index % vocabulary).astype(jnp.int32)
        logp = jnp.take_along_axis(logps.reshape(rows, -1), index, axis=1)
        grown = _taken(loop.open_, parent)
        grown = Beams(
            tokens=grown.tokens.at[:, :, loop.step].set(token),
            logps=grown.logps.at[:, :, loop.step].set(logp),
            mask=grown.mask.at[:, :, loop.step].set(True),
            scores=sums,
        )
        size = loop.step + 1
        ends = (token[..., None] == eos).any(-1) | (size == max_new_tokens)
        going, places = jax.lax.top_k(jnp.where(ends, sums + _NONE, sums), beams)
        open_ = replace(_taken(grown, places), scores=going)
        caches = _reordered(caches, jnp.take_along_axis(parent, places, axis=1))

        full = (loop.done.scores > _NONE / 2).all(axis=1)
        counts = ends & (jnp.arange(looked_at, dtype=jnp.int32) < beams) & loop.improvable[:, None]
        counts &= sums > _NONE / 2  # not what goes on from a place without a prefix
        if stopping == "full":
            counts &= ~full[:, None]
        scores = jnp.where(counts, sums / size.astype(jnp.float32) ** length_penalty, _NONE)
        both = jax.tree.map(
            lambda a, b: jnp.concatenate([a, b], axis=1), loop.done, replace(grown, scores=scores)
        )
        done = _taken(both, jax.lax.top_k(both.scores, beams)[1])

        reach = jnp.float32(size)
        if stopping == "never":
            reach = jnp.where(length_penalty > 0, jnp.float32(max_new_tokens), reach)
        best = open_.scores[:, :1] / reach**length_penalty
        worst = jnp.where(done.scores > _NONE / 2, done.scores.min(axis=1, keepdims=True), _NONE)
        improvable = loop.improvable & (best > worst).any(axis=1)
        return _Loop(caches, size, open_, done, improvable, ~ends.all())

    def unfinished(loop: _Loop) -> Array:
        open_ = loop.improvable
        if stopping == "full":
            open_ &= ~(loop.done.scores > _NONE / 2).all(axis=1)
        return open_.any() & loop.alive

    def go_on(loop: _Loop) -> _Loop:
        last = loop.open_.tokens[:, :, loop.step - 1].reshape(-1, 1)
        mask = jnp.broadcast_to(loop.improvable[:, None], (rows, beams)).reshape(-1, 1)
        logps, caches = read(loop.caches, last, mask)
        return advance(loop, logps.reshape(rows, beams, -1), caches)

    caches = empty_caches(params, configs, rows, length + max_new_tokens)
    logps, caches = read(caches, prompts.tokens, prompts.mask)
    shape = rows, beams, max_new_tokens
    blank = Beams(
        tokens=jnp.full(shape, pad, jnp.int32),
        logps=jnp.zeros(shape, jnp.float32),
        mask=jnp.zeros(shape, bool),
        scores=jnp.full(shape[:2], _NONE),
    )
    # All beams begin alike, so the first alone counts.
    start = replace(blank, scores=blank.scores.at[:, 0].set(0.0))
    every = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32)[:, None], (rows, beams)).reshape(-1)
    repeated = tuple(taken(cache, every, rows) for cache in caches)
    improvable = prompts.mask.any(axis=1)
    loop = _Loop(repeated, jnp.int32(0), start, blank, improvable, jnp.bool_(True))
    logps = jnp.broadcast_to(logps[:, None], (rows, beams, logps.shape[-1]))
    found = jax.lax.while_loop(unfinished, go_on, advance(loop, logps, repeated)).done
    real = found.mask & (found.scores > _NONE / 2)[..., None]
    return Beams(
        tokens=jnp.where(real, found.tokens, pad),
        logps=jnp.where(real, found.logps, 0.0),
        mask=real,
        scores=found.scores,
    )


def _taken(beams: Beams, places: Array) -> Beams:
    """The beams [B, ...] at places [B, X]."""
    return jax.tree.map(lambda leaf: jax.vmap(lambda x, i: x[i])(leaf, places), beams)


def _reordered(caches: tuple[Cache, ...], parent: Array) -> tuple[Cache, ...]:
    """Caches whose beam w of row b continues its beam `parent[b, w]`."""
    rows, beams = parent.shape
    flat = (jnp.arange(rows, dtype=jnp.int32)[:, None] * beams + parent).reshape(-1)
    return tuple(taken(cache, flat, rows * beams) for cache in caches)
