"""From the logits of some tokens to their losses, and to the gradients of these in the logits."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from egjax.losses.blocks import Start, beside, cut, even, fold, sizes, split
from egjax.losses.distill import Terms
from egjax.losses.heads import Pick, Read, Scores, allowed
from egjax.losses.reductions import NEVER

__all__ = ["Rows", "Settings", "columns_of", "measure"]

Array = jax.Array


class Settings:
    """What is fixed when a loss is compiled.

    Chunk i holds the tokens i, i + chunks, i + 2 · chunks, ...: an axis of tokens that is split
    over devices stays split in [rows, chunks], which it would not in [chunks, rows].
    """

    def __init__(
        self,
        terms: Terms,
        count: int,
        vocabulary: int,
        tokens: int,
        shards: int = 1,
        z_loss: float = 0.0,
    ):
        self.terms, self.count, self.vocabulary = terms, count, vocabulary
        self.shards, self.z_loss = shards, z_loss
        # Chunks that divide the tokens spare a padded copy of the hidden states.
        self.rows = even(max(count, 1), tokens)
        self.chunks = math.ceil(count / self.rows)

    def pick(self, index: Array) -> Pick:
        """Takes the tokens of a chunk out of an array with an axis of N; zeros fill the last."""

        def pick(x: Array) -> Array:
            extra = self.rows * self.chunks - self.count
            if extra:
                x = jnp.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1))
            x = x.reshape(self.rows, self.chunks, *x.shape[1:])
            return jax.lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False)

        return pick

    def put(self, total: Array, part: Array, index: Array) -> Array:
        """Puts what belongs to a chunk into an array [rows, chunks, ...]."""
        return jax.lax.dynamic_update_index_in_dim(total, part, index, axis=1)

    def merge(self, total: Array) -> Array:
        """[rows, chunks, ...] -> [N, ...]."""
        return total.reshape(-1, *total.shape[2:])[: self.count]


class Rows(NamedTuple):
    """What turns the logits of a few tokens into log-probabilities, some columns at a time.

    Arrays over the vocabulary are [..., V], or [..., S, V/S] for S devices.

    Attributes:
        teacher: reads columns of the scores; or the int[n] of a teacher with one token.
        norms: logs of the sums of exponentials of logits and scores, over the temperature.
        slopes: float32[n], sums over the columns of each token's slopes in its log-probabilities.
        columns: int[V], numbers of the columns.
        vocab_mask: bool[V] or None.
        temperature: float32[].
    """

    teacher: Array | Read
    norms: tuple[Array, Array]
    slopes: Array
    columns: Array
    vocab_mask: Array | None
    temperature: Array

    def mask(self, start: Start, width: int) -> Array | None:
        """Of some columns."""
        return None if self.vocab_mask is None else cut(self.vocab_mask, start, width)

    def logps(self, logits: Array, start: Start) -> tuple[Array, Array]:
        """Log-probabilities of student and teacher at the columns of some of the logits."""
        width = logits.shape[-1]
        mask = self.mask(start, width)
        student = allowed(logits / self.temperature, mask, NEVER)
        student = student - beside(self.norms[0], logits)
        if not callable(self.teacher):
            targets = beside(self.teacher.astype(jnp.int32), logits)
            right = targets == cut(self.columns, start, width)
            return student, jnp.where(right, 0.0, -jnp.inf)
        teacher = allowed(self.teacher(start, width) / self.temperature, mask, -jnp.inf)
        return student, teacher - beside(self.norms[1], logits)

    def grads(self, terms: Terms, logits: Array, start: Start) -> Array:
        """Gradients of the losses in some of the logits, times the temperature."""
        student, teacher = self.logps(logits, start)
        # Through log-softmax: the slope of a token, less its share of the sum of all slopes.
        grads = _terms_and_slopes(terms, student, teacher)[1]
        grads = grads - jnp.exp(student) * beside(self.slopes, logits)
        mask = self.mask(start, logits.shape[-1])
        return grads if mask is None else jnp.where(mask, grads, 0.0)


def _terms_and_slopes(terms: Terms, student: Array, teacher: Array) -> tuple[Array, Array]:
    return jax.jvp(lambda s: terms(s, teacher), (student,), (jnp.ones_like(student),))


def columns_of(settings: Settings, scores: Scores, read: Read) -> Array | Read:
    """What `measure` takes of a teacher.

    Args:
        settings: see there.
        scores: as `Teacher.scores` gives them.
        read: reads columns of the student's logits, for scores that depend on these.
    """
    if callable(scores):
        whole = read(0, settings.vocabulary // settings.shards)
        scores = scores(whole.reshape(whole.shape[0], -1))
    return scores if scores.ndim == 1 else partial(cut, split(scores, 1, settings.shards))


def measure(
    settings: Settings, read: Read, teacher: Array | Read, rest: Any, *, summed: int
) -> tuple[Rows, Array, Array]:
    """Goes through the logits of n tokens.

    Args:
        settings: see there.
        read: (start, width) -> logits float32[n, width], or [n, S, width].
        teacher: the same for its scores; or int[n], the tokens of one that gives each all the mass.
        rest: temperature and mask.
        summed: logits that are read at once beside a teacher's scores.

    Returns:
        What gives their gradients, losses and z-losses float32[n].
    """
    temperature, vocab_mask = rest
    shards = settings.shards
    size = settings.vocabulary // shards
    tokens = jax.eval_shape(lambda: read(0, 1)).shape[0]
    alone = sizes().alone // (tokens * shards)
    both = summed // (tokens * shards) if callable(teacher) else alone
    mask = None if vocab_mask is None else split(vocab_mask, 0, shards)
    columns = split(jnp.arange(settings.vocabulary, dtype=jnp.int32), 0, shards)
    zero = jnp.zeros(())
    rows = Rows(teacher, (zero, zero), zero, columns, mask, temperature)

    def log_sum(read: Read) -> Array:
        def block(start: Start, width: int) -> Array:
            return allowed(read(start, width) / temperature, rows.mask(start, width), -jnp.inf)

        highest = fold(size, alone, block, jnp.maximum, -jnp.inf)

        def shares(start: Start, width: int) -> Array:
            scores = block(start, width)
            return jnp.exp(scores - beside(highest, scores))

        return jnp.log(fold(size, alone, shares, jnp.add, 0.0)) + highest

    norms = log_sum(read), log_sum(teacher) if callable(teacher) else zero
    rows = rows._replace(norms=norms)

    def sums(start: Start, width: int) -> tuple[Array, Array]:
        return _terms_and_slopes(settings.terms, *rows.logps(read(start, width), start))

    losses, slopes = fold(size, both, sums, jnp.add, 0.0)
    if settings.z_loss:
        # The slope of the normaliser is the share p of a token, as is what it loses in `grads`.
        slopes = slopes - 2 * settings.z_loss * norms[0]
    return rows._replace(slopes=slopes), losses, settings.z_loss * norms[0] ** 2
