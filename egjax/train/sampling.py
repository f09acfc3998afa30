"""Prefixes that a model writes: completions sampled at every step for the prompts of the data.

Distillation on what the student writes is on-policy (GKD, Agarwal et al. 2023, arXiv 2306.13649);
what π̄ writes is the distribution that the formula of arXiv 2506.01312, section 3.3, names. Samples
are constants of the loss: no gradient passes through drawing them.

All of it happens inside the training step, from the weights and the key of that step: nothing is to
be kept, a resumed run draws what the uninterrupted one does, and a mesh needs no code of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from egjax.errors import EgjaxError, check_range
from egjax.lm.config import LlamaConfig
from egjax.lm.ensemble import Combine, Models
from egjax.lm.generate import Prompts, generate
from egjax.losses import behaviour_ratio
from egjax.train.data import Sample, TokenBatch
from egjax.train.layout import cast
from egjax.train.objectives import Frozen
from egjax.train.step import LossFn

__all__ = [
    "PromptBatch",
    "Sampling",
    "Writer",
    "by_ratio",
    "by_student",
    "continued",
    "on_samples",
    "pad_samples",
    "parted",
]

Array = jax.Array


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. Hashable.

    Attributes:
        max_new_tokens: most tokens of a completion; those of the data are cut there, too.
        temperature: divides the logits before drawing; 0 takes the most likely token.
        top_p: draw from the smallest set of tokens with at least this probability.
        share: share λ of steps that sample; the others take the completions of the data (by a
            draw for each step, or each micro-batch).
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    share: float = 1.0

    def __post_init__(self):
        for name, interval in (
            ("max_new_tokens", "[1, inf)"),
            ("temperature", "[0, inf)"),
            ("top_p", "(0, 1]"),
            ("share", "(0, 1]"),
        ):
            option = f"--sampling.{name.replace('_', '-')}"
            check_range(getattr(self, name), interval, where=option)


@struct.dataclass
class PromptBatch:
    """Prompts, and the completions that the data have; leading axis B.

    Attributes:
        prompts: tokens and mask [B, P], padded on the left.
        completions: int32[B, N], padded on the right.
        completion_mask: bool[B, N], True for a token.
        weights: float32[B], α_v of each sample's task.
    """

    prompts: Prompts
    completions: Any
    completion_mask: Any
    weights: Any


class Writer(NamedTuple):
    """Who writes.

    Attributes:
        models: `(params, frozen)` of a step -> the models, as `egjax.lm.generate.generate` takes
            them.
        combine: what is drawn from, out of their logits.
    """

    models: Callable[[Any, Any], Models]
    combine: Combine


def by_student(config: LlamaConfig, *, vocab_mask: Array | None = None) -> Writer:
    """The model that learns, with its weights of the step.

    Args:
        config: the model; it computes in its own type whatever the type of the weights.
        vocab_mask: bool[V], False for padded columns, which are never drawn.
    """

    def combine(logits: tuple[Array, ...]) -> Array:
        return logits[0] if vocab_mask is None else jnp.where(vocab_mask, logits[0], -jnp.inf)

    return Writer(lambda params, _: ((cast(params, config.dtype), config),), combine)


def by_ratio(
    large: LlamaConfig,
    small: LlamaConfig,
    *,
    alpha: float = 1.0,
    clip: float | None = None,
    plausible: float | None = None,
    vocab_mask: Array | None = None,
) -> Writer:
    """π̄ of a step's `Frozen`, with three caches.

    Args:
        large: πᴸ.
        small: πᴱ and πᴺ.
        alpha, clip, plausible, vocab_mask: see `egjax.losses.behaviour_ratio`.
    """

    def models(_: Any, frozen: Frozen) -> Models:
        return (frozen.large, large), (frozen.expert, small), (frozen.anti_expert, small)

    def combine(logits: tuple[Array, ...]) -> Array:
        return behaviour_ratio(
            *logits, alpha=alpha, clip=clip, plausible=plausible, vocab_mask=vocab_mask
        )

    return Writer(models, combine)


def parted(sample: Sample) -> tuple[list[int], list[int]]:
    """Prompt and completion of a sample: its last stretch of learnt tokens, and all before it.

    Raises:
        EgjaxError: none is learnt.
    """
    learnt = np.flatnonzero(np.asarray(sample.mask, np.bool_)[1:]) + 1
    if not len(learnt):
        raise EgjaxError("no token of a sample is learnt, so there is none to be written")
    end = int(learnt[-1]) + 1
    # Numbers less their index are equal along a stretch.
    start = int(learnt[np.searchsorted(learnt - np.arange(len(learnt)), end - len(learnt))])
    return list(sample.tokens[:start]), list(sample.tokens[start:end])


def pad_samples(
    samples: Sequence[Sample], max_new_tokens: int, *, multiple: int = 16
) -> PromptBatch:
    """A row a sample, as long as the longest prompt needs.

    Args:
        samples: see `parted`.
        max_new_tokens: N; completions are cut there.
        multiple: P is rounded up to one of these.

    Returns:
        A table of numpy arrays.

    Raises:
        EgjaxError: no samples, or one without learnt tokens.
    """
    if not samples:
        raise EgjaxError("there is no prompt to go on from", remedy="give at least one sample")
    parts = [parted(sample) for sample in samples]
    length = -(-max(len(prompt) for prompt, _ in parts) // multiple) * multiple
    tokens = np.zeros((len(parts), length), np.int32)
    completions = np.zeros((len(parts), max_new_tokens), np.int32)
    mask, completion_mask = np.zeros(tokens.shape, bool), np.zeros(completions.shape, bool)
    for row, (prompt, completion) in enumerate(parts):
        first = completion[:max_new_tokens]
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = True
        completions[row, : len(first)] = first
        completion_mask[row, : len(first)] = True
    weights = np.asarray([sample.weight for sample in samples], np.float32)
    prompts: Any = Prompts(tokens=tokens, mask=mask)  # type: ignore[arg-type]
    return PromptBatch(prompts, completions, completion_mask, weights)


def continued(batch: PromptBatch, completions: Array, mask: Array) -> TokenBatch:
    """Rows of P + N - 1 positions: prompts with these completions, whose tokens count.

    Args:
        batch: the prompts.
        completions: int32[B, N].
        mask: bool[B, N], True for a token.
    """
    tokens = jnp.concatenate([batch.prompts.tokens, completions], axis=1)
    real = jnp.concatenate([batch.prompts.mask, mask], axis=1)
    counted = jnp.concatenate([jnp.zeros_like(batch.prompts.mask), mask], axis=1)
    return TokenBatch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        mask=counted[:, 1:],
        weights=jnp.broadcast_to(batch.weights[:, None], tokens[:, 1:].shape),
        positions=jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)[:, :-1],
        segment_ids=real[:, :-1].astype(jnp.int32),
    )


def on_samples(loss_fn: LossFn, writer: Writer, sampling: Sampling) -> LossFn:
    """A loss over rows of tokens as a loss over prompts, for which completions are drawn first.

    Args:
        loss_fn: over `TokenBatch`, e.g. `egjax.train.objectives.distill_to_ratio`.
        writer: who writes.
        sampling: how.

    Returns:
        Loss over `PromptBatch`; its metrics, and completion_tokens (mean number of a completion).
    """

    def sampled_loss(params: Any, batch: PromptBatch, key: Array, frozen: Any):
        draw_key, share_key, key = jax.random.split(key, 3)
        models = writer.models(jax.lax.stop_gradient(params), frozen)

        def written() -> tuple[Array, Array]:
            found = generate(
                models,
                batch.prompts,
                draw_key,
                max_new_tokens=sampling.max_new_tokens,
                combine=writer.combine,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
            )
            return found.tokens, found.mask

        def given() -> tuple[Array, Array]:
            return jnp.asarray(batch.completions), jnp.asarray(batch.completion_mask)

        if sampling.share == 1:
            completions = written()
        else:
            chosen = jax.random.uniform(share_key) < sampling.share
            completions = jax.lax.cond(chosen, written, given)
        total, count, metrics = loss_fn(params, continued(batch, *completions), key, frozen)
        lengths = completions[1].sum().astype(jnp.float32), batch.prompts.mask.any(1).sum()
        return total, count, metrics | {"completion_tokens": lengths}

    return sampled_loss
