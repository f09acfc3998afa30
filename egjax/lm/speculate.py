"""Speculative decoding: a cheap model drafts tokens, one reading of the others verifies them.

Decoding reads all weights for every token. Here the draft model proposes K tokens one after the
other, the other models read the K + 1 tokens at once, and as many tokens as agree are kept, with
one more that the verification gives for free. For the behaviour ratio π̄ the draft is the small
expert πᴱ: π̄ needs its logits at every token anyway, so drafts cost nothing but their verification.
For the same reason a plain step shows for free whether a draft would have been kept, and drafting
begins when plain steps have shown that it pays.

Rows keep different numbers of tokens, so each row of the caches counts its own slots; what was
rejected lies behind the count and is overwritten.

Sources: Leviathan et al. 2023 (arXiv 2211.17192) and Chen et al. 2023 (arXiv 2302.01318); the
coupled rule Daliri et al. 2024 (arXiv 2408.07978).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from egjax.errors import EgjaxError
from egjax.lm.cache import Cache
from egjax.lm.config import LlamaConfig
from egjax.lm.ensemble import Combine, Models, empty_caches, first, read, rewound, voices
from egjax.lm.generate import Generation, Prompts, check_settings, draw, sampling_logits
from egjax.lm.lora import Pair
from egjax.lm.params import Params, count
from egjax.lm.stops import Stops, follow

__all__ = ["Speculation", "round_cost", "speculate"]

Array = jax.Array
Rule = Literal["coupled", "rejection"]

_DRAFT, _ACCEPT, _RESAMPLE = range(1, 4)  # streams of a token's key; the key itself draws it

# Arithmetic of one more token in a reading of the weights, in units of that reading. On two CPU
# cores in float32 rounds were measured that mean 0.02 (idle) to 0.2 (other jobs running): too high
# a value misses a little gain, too low a one loses where half of the drafts agree. Accelerators
# have hundreds of operations for every byte they read.
_ARITHMETIC = {"cpu": 0.12}
_ACCELERATOR = 0.006

# The account of a row, in plain steps: the bounds it is kept in, and where rounds begin. One kept
# draft at the first token is enough; out of the depth six or seven in a row are needed.
_LEAST, _MOST, _ENOUGH = -6.0, 6.0, 1.0


class Speculation(NamedTuple):
    """What was decoded, and how.

    Attributes:
        generation: as `egjax.lm.generate.generate` gives it.
        rounds: int32[]. Rounds of drafting and verifying.
        steps: int32[]. Plain steps of one token.
        drafted: int32[B]. Drafts that were verified in a row.
        accepted: int32[B]. Those that were kept.
    """

    generation: Generation
    rounds: Array
    steps: Array
    drafted: Array
    accepted: Array


def round_cost(
    configs: Sequence[LlamaConfig],
    *,
    draft: int,
    drafts: int,
    rows: int = 1,
    voices: Sequence[int] | None = None,
    arithmetic: float | None = None,
) -> float:
    """Time of a round in units of a plain step, by formula.

    Reading a model for n tokens at once takes `1 + r · (n - 1)` of the time for one token, r the
    arithmetic of one token in units of reading the weights; a model's time goes with its size.

    Args:
        configs: the models.
        draft: which of them drafts.
        drafts: tokens K it proposes in a round.
        rows: rows B of the batch.
        voices: rows that each model reads for one of them, see `egjax.lm.ensemble.voices`; None
            for one.
        arithmetic: r; None takes 0.12 on a CPU and 0.006 elsewhere.
    """
    r = _ARITHMETIC.get(jax.default_backend(), _ACCELERATOR) if arithmetic is None else arithmetic
    steps, round_ = 0.0, 0.0
    for model, (config, number) in enumerate(zip(configs, voices or [1] * len(configs))):
        size, tokens = count(config), rows * number
        one, wide = 1 + r * (tokens - 1), 1 + r * (tokens * (drafts + 1) - 1)
        steps += size * one
        round_ += size * ((drafts + 1) * one if model == draft else wide)
    return round_ / steps


def speculate(
    models: Models,
    prompts: Prompts,
    key: Array,
    *,
    max_new_tokens: int,
    draft: int,
    drafts: int = 6,
    combine: Combine = first,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stops: Stops | None = None,
    rule: Rule = "coupled",
    cost: float | None = None,
) -> Speculation:
    """Completes prompts as `egjax.lm.generate.generate` does, in fewer readings of the models.

    Args:
        models, prompts, key, max_new_tokens, combine, temperature, top_p, stops: as for `generate`.
        draft: index of the model that drafts. One that `combine` does not look at serves as well;
            of a `Pair` πᴱ drafts, and what πᴺ says of its drafts comes along.
        drafts: tokens K that it proposes in a round.
        rule: how drafts are judged; temperature 0 takes the most likely tokens under either.
            `"coupled"`: draft and target are drawn with the same random numbers, and a draft is
            kept if it is what the target draws. The result is token for token that of `generate`
            with the same key, whatever the draft, so it does not depend on the other rows.
            `"rejection"`: a draft x is kept with probability min(1, p(x) / q(x)), else the token is
            drawn from max(p - q, 0), normalised: the most drafts that can be kept (Leviathan et
            al. 2023), exact in distribution; where rounds fall (see `cost`) a row's draws depend
            on the other rows, their distribution never does.
        cost: time of a round in plain steps; None for `round_cost`. Each row keeps an account,
            within ±6, of what rounds saved it and what they would have saved it in plain steps: a
            token that the draft model draws, too, brings in 1, another one 1 - cost. Rounds are
            taken while every row that goes on has 1, counting the tokens that it is ahead of the
            last one. So drafts that never agree cost nothing but a comparison. 0 drafts always,
            `drafts + 1` or more never.

    Raises:
        EgjaxError: as `generate`; also where `draft` or `drafts` is out of range.
    """
    if not 0 <= draft < len(models) or drafts < 1:
        raise EgjaxError(
            f"draft {draft} of {len(models)} models, {drafts} drafts",
            remedy="an index of a model, and at least one draft",
        )
    if rule not in ("coupled", "rejection"):
        raise EgjaxError(f"no rule {rule!r}", remedy="coupled or rejection")
    check_settings(models, prompts, max_new_tokens, temperature, top_p)
    configs = tuple(config for _, config in models)
    if cost is None:
        rows = prompts.tokens.shape[0]
        copies = [voices(params) for params, _ in models]
        cost = round_cost(configs, draft=draft, drafts=drafts, rows=rows, voices=copies)
    return _speculate(
        tuple(params for params, _ in models),
        prompts,
        key,
        jnp.float32(temperature),
        jnp.float32(top_p),
        jnp.float32(cost),
        stops,
        configs=configs,
        combine=combine,
        max_new_tokens=max_new_tokens,
        draft=draft,
        drafts=drafts,
        rule=rule,
    )


@struct.dataclass
class _Loop:
    """What the loops carry. Tokens of a row but its last are in the caches.

    Attributes:
        caches: of each model, rows counting by themselves.
        made: int32[B]. Tokens generated.
        tokens, logps: [B, N + K + 1], the result with room for a whole round behind it.
        ended: bool[B].
        matched: int32[B]. How much of a stop string a row has.
        balance: float32[B]. The account, see `speculate`.
        rounds, steps, drafted, accepted: see `Speculation`.
    """

    caches: tuple[Cache, ...]
    made: Array
    tokens: Array
    logps: Array
    ended: Array
    matched: Array
    balance: Array
    rounds: Array
    steps: Array
    drafted: Array
    accepted: Array


@dataclass(frozen=True)
class _Decoder:
    """What one call of `speculate` decodes from, and the parts of its loop."""

    params: tuple[Params | Pair, ...]
    configs: tuple[LlamaConfig, ...]
    combine: Combine
    rows: int
    length: int
    keys: Array
    eos: Array
    filler: Array
    temperature: Array
    top_p: Array
    cost: Array
    stops: Stops | None
    max_new_tokens: int
    draft: int
    drafts: int
    rule: Rule

    def read(self, model: int, cache: Cache, tokens: Array, mask: Array, *, last: bool = False):
        """One model's logits, see `egjax.lm.ensemble.read`, and its cache."""
        found, filled = read(
            self.params[model], self.configs[model], tokens, mask, cache, last=last
        )
        assert filled is not None
        return found, filled

    def combined(self, found: Sequence[tuple[tuple[Array, ...], Cache]]) -> Array:
        """The target's logits from those of the models."""
        return self.combine(tuple(logits for several, _ in found for logits in several))

    def choose(self, logits: Array, made: Array) -> Array:
        """What `generate` draws from logits [B, T, V] as tokens made, made + 1, ...: [B, T]."""
        steps = made[:, None] + jnp.arange(logits.shape[1], dtype=jnp.int32)
        flat_keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(self.keys, steps).reshape(-1)
        flat = logits.reshape(-1, logits.shape[-1])
        return draw(flat, flat_keys, self.temperature, self.top_p).reshape(steps.shape)

    def going(self, loop: _Loop) -> Array:
        return ~loop.ended & ~self.filler & (loop.made < self.max_new_tokens)

    def keep(self, loop: _Loop, tokens: Array, logits: Array, number: Array) -> tuple[_Loop, Array]:
        """Writes the first `number` [B] of tokens [B, T] behind those of the rows that go on.
        Returns also how many were new: fewer where a row ends."""
        logps = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
        hits, states = follow(self.stops, loop.matched, tokens)
        is_end = (tokens[..., None] == self.eos).any(-1) | hits
        ends = is_end.astype(jnp.int32)
        before = jnp.cumsum(ends, axis=1, dtype=jnp.int32) - ends
        places = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        kept = (places < number[:, None]) & (before == 0)
        kept &= self.going(loop)[:, None] & (loop.made[:, None] + places < self.max_new_tokens)
        new = kept.sum(axis=1, dtype=jnp.int32)
        # By place in the result, elementwise: a scatter costs the CPU a loop.
        offset = jnp.arange(loop.tokens.shape[1], dtype=jnp.int32) - loop.made[:, None]
        source = jnp.clip(offset, 0, tokens.shape[1] - 1)

        def at(values: Array) -> Array:
            return jnp.take_along_axis(values, source, axis=1)

        here = (offset == source) & at(kept)
        loop = replace(
            loop,
            made=loop.made + new,
            tokens=jnp.where(here, at(tokens), loop.tokens),
            logps=jnp.where(here, at(logps), loop.logps),
            ended=loop.ended | (kept & is_end).any(axis=1),
            matched=jnp.take_along_axis(states, jnp.maximum(new - 1, 0)[:, None], axis=1)[:, 0],
        )
        return loop, new

    def pending(self, loop: _Loop) -> Array:
        """The last token of each row [B, 1], which no model has read."""
        return jnp.take_along_axis(loop.tokens, jnp.maximum(loop.made - 1, 0)[:, None], axis=1)

    def rewind(self, caches: Sequence[Cache], loop: _Loop) -> tuple[Cache, ...]:
        """Caches that hold all tokens of a row but its last."""
        used = self.length + loop.made - 1
        return tuple(rewound(cache, used) for cache in caches)

    def step(self, loop: _Loop) -> _Loop:
        """One token for every row, as `generate` has it; what a draft of it would have been."""
        tokens, mask = self.pending(loop), self.going(loop)[:, None]
        found = [self.read(m, cache, tokens, mask) for m, cache in enumerate(loop.caches)]
        loop = self.advanced(loop, found)
        # One token was read and one is new, so no cache is ahead of its row.
        return replace(loop, caches=tuple(cache for _, cache in found), steps=loop.steps + 1)

    def advanced(self, loop: _Loop, found: Sequence[tuple[tuple[Array, ...], Cache]]) -> _Loop:
        """One token more, and the account with what a draft of it would have brought."""
        logits = self.combined(found)
        both = jnp.stack([logits[:, 0], found[self.draft][0][0][:, 0]])
        step_keys = jax.vmap(jax.random.fold_in)(self.keys, loop.made)
        token, guess = jax.vmap(lambda one: draw(one, step_keys, self.temperature, self.top_p))(
            both
        )
        gain = jnp.where(token == guess, 1.0, 1.0 - self.cost)
        loop, _ = self.keep(loop, token[:, None], logits, jnp.ones(self.rows, jnp.int32))
        return replace(loop, balance=_bounded(loop.balance + gain))

    def propose(self, loop: _Loop) -> tuple[Array, tuple[Array, ...], Cache]:
        """Drafts [B, K], the draft model's logits [B, K + 1, V] at them, and its cache."""
        mask = self.going(loop)[:, None]

        def one(carry, number):
            token, cache = carry
            found, cache = self.read(self.draft, cache, token[:, None], mask)
            logits = tuple(x[:, 0] for x in found)
            steps = loop.made + number
            step_keys = jax.vmap(jax.random.fold_in)(self.keys, steps)
            if self.rule == "rejection":
                step_keys = jax.vmap(jax.random.fold_in, (0, None))(step_keys, _DRAFT)
            token = draw(logits[0], step_keys, self.temperature, self.top_p)
            return (token, cache), (token, logits)

        start = self.pending(loop)[:, 0], loop.caches[self.draft]
        (_, cache), (tokens, logits) = jax.lax.scan(
            one, start, jnp.arange(self.drafts + 1, dtype=jnp.int32)
        )
        return tokens[:-1].T, tuple(x.swapaxes(0, 1) for x in logits), cache

    def judge(self, proposed: Array, q: Array, logits: Array, made: Array) -> tuple[Array, Array]:
        """Tokens [B, K + 1], of which the first accepted + 1 count, and how many drafts those are.

        `q`, `logits` [B, K + 1, V]: of the draft model and of the target.
        """
        tokens = self.choose(logits, made)

        def leading(agree: Array) -> Array:
            whole = jnp.cumprod(agree, axis=1, dtype=jnp.int32)
            return whole.sum(axis=1, dtype=jnp.int32)

        if self.rule == "coupled":
            return tokens, leading(tokens[:, :-1] == proposed)
        steps = made[:, None] + jnp.arange(self.drafts + 1, dtype=jnp.int32)
        step_keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(self.keys, steps)

        def stream(number: int) -> Array:
            return jax.vmap(jax.vmap(partial(jax.random.fold_in, data=number)))(step_keys)

        def sampled() -> tuple[Array, Array]:
            target = jax.nn.softmax(sampling_logits(logits, self.temperature, self.top_p))
            source = jax.nn.softmax(sampling_logits(q, self.temperature, self.top_p))[:, :-1]
            taken = proposed[..., None]
            p_taken = jnp.take_along_axis(target[:, :-1], taken, axis=-1)[..., 0]
            q_taken = jnp.take_along_axis(source, taken, axis=-1)[..., 0]
            uniform = jax.vmap(jax.vmap(jax.random.uniform))(stream(_ACCEPT))[:, :-1]
            agree = uniform * q_taken < p_taken
            rest = jnp.log(jnp.maximum(target[:, :-1] - source, 0))
            # Equal distributions leave nothing; rounding alone can then have rejected.
            empty_rest = (rest == -jnp.inf).all(-1, keepdims=True)
            rest = jnp.where(empty_rest, jnp.log(target[:, :-1]), rest)
            other = jax.vmap(jax.vmap(jax.random.categorical))(stream(_RESAMPLE)[:, :-1], rest)
            mixed = jnp.where(agree, proposed, other.astype(jnp.int32))
            return jnp.concatenate([mixed, tokens[:, -1:]], axis=1), leading(agree)

        def likeliest() -> tuple[Array, Array]:
            return tokens, leading(tokens[:, :-1] == proposed)

        return jax.lax.cond(self.temperature > 0, sampled, likeliest)

    def round_(self, loop: _Loop) -> _Loop:
        """Up to K + 1 tokens for every row."""
        proposed, drafted, cache = self.propose(loop)
        tokens = jnp.concatenate([self.pending(loop), proposed], axis=1)
        mask = jnp.broadcast_to(self.going(loop)[:, None], tokens.shape)
        found = [
            (drafted, cache) if m == self.draft else self.read(m, loop.caches[m], tokens, mask)
            for m in range(len(self.configs))
        ]
        logits = self.combined(found)
        tokens, accepted = self.judge(proposed, drafted[0], logits, loop.made)
        before = self.going(loop)
        loop, new = self.keep(loop, tokens, logits, accepted + 1)
        return replace(
            loop,
            caches=self.rewind([cache for _, cache in found], loop),
            balance=_bounded(loop.balance + new.astype(jnp.float32) - self.cost),
            rounds=loop.rounds + 1,
            drafted=loop.drafted + jnp.where(before, self.drafts, 0),
            accepted=loop.accepted + jnp.minimum(accepted, new),
        )

    def solvent(self, loop: _Loop) -> Array:
        """Whether a round is likely to pay. The batch is as late as its last row."""
        going = self.going(loop)
        ahead = loop.made - jnp.where(going, loop.made, self.max_new_tokens).min()
        enough = (~going | (loop.balance + ahead.astype(jnp.float32) >= _ENOUGH)).all()
        return enough & (self.cost < self.drafts + 1)

    def advance(self, loop: _Loop) -> _Loop:
        # Two loops, not a conditional: a branch would copy the caches.
        loop = jax.lax.while_loop(
            lambda x: self.going(x).any() & self.solvent(x), self.round_, loop
        )
        return self.plainly(loop)

    def plainly(self, loop: _Loop) -> _Loop:
        """Plain steps until a round pays."""
        return jax.lax.while_loop(lambda x: self.going(x).any() & ~self.solvent(x), self.step, loop)


def _bounded(balance: Array) -> Array:
    return jnp.clip(balance, _LEAST, _MOST)


@partial(
    jax.jit,
    static_argnames=("configs", "combine", "max_new_tokens", "draft", "drafts", "rule"),
)
def _speculate(
    params: tuple[Params | Pair, ...],
    prompts: Prompts,
    key: Array,
    temperature: Array,
    top_p: Array,
    cost: Array,
    stops: Stops | None,
    *,
    configs: tuple[LlamaConfig, ...],
    combine: Combine,
    max_new_tokens: int,
    draft: int,
    drafts: int,
    rule: Rule,
) -> Speculation:
    rows, length = prompts.tokens.shape
    pad = configs[0].pad_id or 0
    shape = rows, max_new_tokens + drafts + 1

    decoder = _Decoder(
        params=params,
        configs=configs,
        combine=combine,
        rows=rows,
        length=length,
        keys=jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(rows, dtype=jnp.int32)),
        eos=jnp.array(configs[0].eos_ids, jnp.int32),
        filler=~prompts.mask.any(axis=1),
        temperature=temperature,
        top_p=top_p,
        cost=cost,
        stops=stops,
        max_new_tokens=max_new_tokens,
        draft=draft,
        drafts=drafts,
        rule=rule,
    )
    zero, zeros = jnp.int32(0), jnp.zeros(rows, jnp.int32)
    caches = empty_caches(params, configs, rows, length + max_new_tokens + drafts)
    found = [
        decoder.read(m, cache, prompts.tokens, prompts.mask, last=True)
        for m, cache in enumerate(caches)
    ]
    loop = _Loop(
        caches=tuple(cache for _, cache in found),
        made=zeros,
        tokens=jnp.full(shape, pad, jnp.int32),
        logps=jnp.zeros(shape, jnp.float32),
        ended=jnp.zeros(rows, bool),
        matched=zeros,
        balance=jnp.zeros(rows, jnp.float32),
        rounds=zero,
        steps=zero,
        drafted=zeros,
        accepted=zeros,
    )
    # Until the first round all rows have used as many slots, which are written at once.
    loop = decoder.plainly(decoder.advanced(loop, found))
    loop = replace(loop, caches=decoder.rewind(loop.caches, loop))
    loop = jax.lax.while_loop(lambda x: decoder.going(x).any(), decoder.advance, loop)
    result = Generation(
        tokens=loop.tokens[:, :max_new_tokens],
        logps=loop.logps[:, :max_new_tokens],
        mask=jnp.arange(max_new_tokens, dtype=jnp.int32) < loop.made[:, None],
        ended=loop.ended,
    )
    return Speculation(result, loop.rounds, loop.steps, loop.drafted, loop.accepted)
