"""Losses from hidden states and unembedding matrices: [batch, time, vocabulary] never exists.

N tokens, M models (student and teachers), width D, vocabulary V; a product takes 2·N·D·V
operations, and all logits at once need M + 2 of them: M for logits, one for the hidden states' and
one for the unembedding's gradient. Two ways; the sizes decide:

- **In the gradient's place**, where N <= D and the vocabulary is not split over devices: the
  student's logits are formed for all tokens, some columns at a time, and kept where the
  unembedding's gradient will be, which has as many rows or more. They are turned there into losses
  and the gradients of the logits, unweighted; once the weights of the tokens are known (preferences
  know them after all sums), each block of columns gives way to that block's gradient. M + 2
  products for every loss, each of N tokens at once.
- **A few tokens at a time** otherwise (`tokens`, n of N): what they give is added to a float32 sum
  of the unembedding's gradient. `chunked_loss`, whose weights are known before, takes M + 2
  products; `chunked_token_losses` forms the logits anew going backward: 2·M + 2.

Either way the logits of a teacher exist for n tokens at a time, 4·n·V bytes for a `Head`, twice as
many for a `Ratio`. On a GPU, where few tokens cost as much time as many, the first way forms them
for all tokens and some columns instead, three times over: for their sum, for the losses and for
the gradients. Blocks that are multiplied take a few times 4·D bytes a column. How many tokens
and columns, `SIZES` says for each platform. Gradients are rounded to the type of the matrix once;
logits are never rounded. On an accelerator the gradients of the logits are, to the type of hidden
states and matrix, before the two products with them: as those of every other layer are.

A loss is named by its terms (`egjax.losses.distill`) and a teacher: the negative log-likelihood
is the forward KL to `Targets`, whose probability is all on one token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp

from egjax.losses.distill import Terms, forward_kl_terms, reverse_kl_terms
from egjax.losses.reductions import NEVER

__all__ = [
    "Head",
    "Ratio",
    "Targets",
    "Teacher",
    "TopK",
    "chunked_kl_to_initial",
    "chunked_loss",
    "chunked_sequence_logps",
    "chunked_token_logps",
    "chunked_token_losses",
    "chunked_top_k",
]

Array = jax.Array
T = TypeVar("T")
Pick = Callable[[Array], Array]
Read = Callable[[Array, int], Array]
"""(start, width) -> float32[n, width], some columns of the vocabulary."""
Scores = Array | Callable[[Array], Array]


class Sizes(NamedTuple):
    """How much of [tokens, vocabulary] exists at once.

    Attributes:
        tokens: whose logits do, where the student's are formed a few tokens at a time. More are
            faster, at 4·V bytes each an array.
        scored: whose teacher's logits do, where the student's are in the gradient's place.
        columns: of the vocabulary that are multiplied at once there; half as many of a matrix of 32
            bits, but on a CPU.
        block: the same a few tokens at a time.
        summed: logits that are summed over at once. Few stay in a CPU's cache.
        turned: logits that are turned into gradients at once, in the gradient's place.
        by_columns: where the student's logits are in the gradient's place, a teacher's are formed
            for all tokens and `columns` at a time rather than for `scored` tokens.
    """

    tokens: int
    scored: int
    columns: int
    block: int
    summed: int
    turned: int
    by_columns: bool = False


_ALL = 2**62
SIZES = {
    "cpu": Sizes(64, 64, 1024, 1024, 2**18, 2**18),
    # A matrix is read from memory once for each chunk of tokens, and the float32 sum of its
    # gradient read and written: 2048 tokens make that an eighth of the time of the products.
    "gpu": Sizes(2048, 64, 1664, _ALL, _ALL, 2**20, by_columns=True),
    "tpu": Sizes(512, 64, 1024, 1024, 2**22, 2**22),
}
"""By platform."""


def _sizes() -> Sizes:
    return SIZES.get(jax.default_backend(), SIZES["gpu"])


def _width(matrix: Array) -> int:
    """Columns of a matrix that are multiplied at once in the gradient's place."""
    wide = matrix.dtype.itemsize > 2 and jax.default_backend() != "cpu"
    return _sizes().columns // (2 if wide else 1)


def _rounded(grads: Array, like: Array) -> Array:
    """Gradients of logits as they are multiplied: a CPU multiplies float32 fastest, accelerators
    the 16 bits of hidden states and matrix."""
    small = like.dtype.itemsize == 2 and jax.default_backend() != "cpu"
    return grads.astype(like.dtype) if small else grads


def _allowed(x: Array, mask: Array | None, never: float) -> Array:
    return x if mask is None else jnp.where(mask, x, never)


def _norm(x: Array, mask: Array | None) -> Array:
    """Log of the sum of exponentials over the columns that are allowed."""
    return jax.nn.logsumexp(_allowed(x, mask, -jnp.inf), axis=-1)


class Teacher(Protocol):
    """What a student is compared with; a pytree whose arrays have the student's leading axes."""

    def pick(self: T, pick: Pick) -> T:
        """The same teacher for some tokens: `pick` applied to each array that has them."""
        ...

    def scores(self, temperature: Array, vocab_mask: Array | None) -> Scores:
        """Log-probabilities times the temperature, up to a constant for each token.

        Args:
            temperature: float32[], by which the scores will be divided.
            vocab_mask: bool[V] or None, False for padded columns (whose scores do not matter).

        Returns:
            float32[n, V], -inf allowed; or int[n], the token that has all the mass; or a function
            that gives the first from the student's logits float32[n, V].
        """
        ...


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["hidden", "unembedding"],
    meta_fields=["tied"],
)
@dataclasses.dataclass(frozen=True)
class Head:
    """The end of a model: logits are `hidden @ unembedding`, summed in float32.

    Attributes:
        hidden: [..., D], what the unembedding takes (after the last norm), any float type.
        unembedding: [D, V], or [V, D] if `tied`.
        tied: the matrix is the embedding table.
    """

    hidden: Array
    unembedding: Array
    tied: bool = False

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.unembedding.shape[0 if self.tied else 1]

    def pick(self, pick: Pick) -> Head:
        """See `Teacher`."""
        return dataclasses.replace(self, hidden=pick(self.hidden))

    def after(self, first: Array) -> Head:
        """The same head, whose logits are formed after another array: so fewer live at once."""
        # A dependence that no compiler can see through; optimisation barriers are gone before
        # the CPU's schedule is made.
        zero = jnp.minimum(jnp.abs(first.reshape(-1)[0]), 0)
        return dataclasses.replace(self, hidden=self.hidden + zero.astype(self.hidden.dtype))

    def logits(self) -> Array:
        """float32[..., V]."""
        formula = "...d,vd->...v" if self.tied else "...d,dv->...v"
        return jnp.einsum(
            formula, self.hidden, self.unembedding, preferred_element_type=jnp.float32
        )

    def scores(self, temperature: Array, vocab_mask: Array | None) -> Array:
        """See `Teacher`."""
        return self.logits()

    def columns(self, vocab_mask: Array | None) -> Read:
        """The scores of N tokens, some columns at a time."""

        def read(start: Array, width: int) -> Array:
            columns, letters = _columns(self, 1, start, width)
            formula = f"nd,{letters}->n{letters.replace('d', '')}"
            return jnp.einsum(formula, self.hidden, columns, preferred_element_type=jnp.float32)

        return read


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["large", "expert", "anti_expert", "alpha", "clip", "plausible"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Ratio:
    """The composed teacher `π̄ ∝ πᴸ (πᴱ/πᴺ)^α`; see `egjax.losses.behaviour_ratio`.

    Attributes:
        large, expert, anti_expert: the three models, on the same tokens.
        alpha, clip, plausible: as there.
    """

    large: Head
    expert: Head
    anti_expert: Head
    alpha: float | Array = 1.0
    clip: float | Array | None = None
    plausible: float | Array | None = None

    def pick(self, pick: Pick) -> Ratio:
        """See `Teacher`."""
        return dataclasses.replace(
            self,
            large=self.large.pick(pick),
            expert=self.expert.pick(pick),
            anti_expert=self.anti_expert.pick(pick),
        )

    def scores(self, temperature: Array, vocab_mask: Array | None) -> Array:
        """See `Teacher`."""
        expert, anti_expert = self.expert.logits(), self.anti_expert.logits()
        ratio = expert - anti_expert
        if self.clip is not None:
            # Only what is clipped depends on the constants that normalise it.
            offset = _norm(expert, vocab_mask) - _norm(anti_expert, vocab_mask)
            ratio = jnp.clip(ratio - offset[..., None], -self.clip, self.clip)
        large = self.large.after(ratio).logits()
        scores = large + self.alpha * ratio
        if self.plausible is None:
            return scores
        best = _allowed(large, vocab_mask, -jnp.inf).max(-1, keepdims=True)
        return jnp.where(large >= best + jnp.log(self.plausible), scores, -jnp.inf)

    def columns(self, vocab_mask: Array | None) -> Read:
        """The scores of N tokens, some columns at a time."""
        heads = self.large, self.expert, self.anti_expert
        large, expert, anti_expert = (head.columns(vocab_mask) for head in heads)
        offset = best = None
        columns = self.large.vocabulary, _width(self.large.unembedding)
        norm = partial(_over_columns, columns=columns, mask=vocab_mask)
        if self.clip is not None:
            offset = norm(expert)[1] - norm(anti_expert)[1]
        if self.plausible is not None:
            best = norm(large)[0] + jnp.log(self.plausible)

        def read(start: Array, width: int) -> Array:
            ratio = expert(start, width) - anti_expert(start, width)
            if offset is not None and self.clip is not None:
                ratio = jnp.clip(ratio - offset[:, None], -self.clip, self.clip)
            logits = large(start, width)
            scores = logits + self.alpha * ratio
            return scores if best is None else jnp.where(logits >= best[:, None], scores, -jnp.inf)

        return read


@partial(jax.tree_util.register_dataclass, data_fields=["ids"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Targets:
    """A teacher that gives one token all its mass.

    Attributes:
        ids: int[...], token ids in 0..V-1; anything, e.g. -100, where a token does not count.
    """

    ids: Array

    def pick(self, pick: Pick) -> Targets:
        """See `Teacher`."""
        return Targets(pick(self.ids))

    def scores(self, temperature: Array, vocab_mask: Array | None) -> Array:
        """See `Teacher`."""
        return self.ids


@partial(jax.tree_util.register_dataclass, data_fields=["ids", "top", "tail"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TopK:
    """A stored teacher, approximate: its K most probable tokens, and the mass of all others as one.

    The divergence is that of distributions over K + 1 outcomes, "another token" being the last,
    with its exact gradient. Joining outcomes can only lower a divergence, so it is at most the
    exact one; the full teacher is among the students that reach 0. Within the tail the teacher
    is taken to follow the student: that makes the sum over V terms equal the sum over K + 1.

    Attributes:
        ids: int[..., K], distinct tokens.
        top: float[..., K], their log-probabilities, at the temperature of the loss.
        tail: float[...], log of the mass of the other tokens; -inf where there is none.
    """

    ids: Array
    top: Array
    tail: Array

    def pick(self, pick: Pick) -> TopK:
        """See `Teacher`."""
        return TopK(pick(self.ids), pick(self.top), pick(self.tail))

    def scores(self, temperature: Array, vocab_mask: Array | None) -> Scores:
        """See `Teacher`."""

        def scores(student: Array) -> Array:
            allowed = _allowed(student / temperature, vocab_mask, -jnp.inf)
            rows = jnp.arange(student.shape[0])[:, None]
            others = allowed.at[rows, self.ids].set(-jnp.inf)
            tail = self.tail.astype(jnp.float32)
            # Without a tail there may be no other token either, and -inf less -inf is NaN.
            share = jnp.where(tail > -jnp.inf, tail - jax.nn.logsumexp(others, axis=-1), tail)
            top = self.top.astype(jnp.float32)
            return (others + share[:, None]).at[rows, self.ids].set(top) * temperature

        return scores


class _Settings:
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
        least = max(1, math.ceil(count / tokens))
        even = (n for n in range(least, 2 * least) if count % n == 0)
        self.chunks = next(even, least)
        self.rows = math.ceil(count / self.chunks)

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


def _split(x: Array, axis: int, shards: int) -> Array:
    """Gives an axis of V columns an axis of devices in front, if there are several."""
    if shards == 1:
        return x
    return x.reshape(*x.shape[:axis], shards, x.shape[axis] // shards, *x.shape[axis + 1 :])


def _device_letter(shards: int) -> str:
    """Of the axis of devices in a formula."""
    return "s" if shards > 1 else ""


def _cut(x: Array, start: Array, width: int) -> Array:
    """Columns `start` to `start + width`."""
    return jax.lax.dynamic_slice_in_dim(x, start, width, axis=x.ndim - 1)


def _beside(x: Array, like: Array) -> Array:
    """One value a token, [n], shaped to go with [n, ...]."""
    return x.reshape(-1, *(1,) * (like.ndim - 1))


def _blocks(size: int, width: int) -> tuple[int, int, Callable[[Array], tuple[Array, Array]]]:
    """Blocks that cover an axis: how many, their width, and (start, bool[width]) of each.

    The last block begins early enough to be full; what it shares with the one before it is False.
    """
    width = min(size, max(1, width))

    def place(block: Array) -> tuple[Array, Array]:
        start = jnp.minimum(block * width, size - width)
        return start, start + jnp.arange(width) >= block * width

    return math.ceil(size / width), width, place


class _Rows(NamedTuple):
    """What turns the logits of a few tokens into log-probabilities, some columns at a time.

    Arrays over the vocabulary are [..., V], or [..., S, V/S] for S devices.

    Attributes:
        teacher: scores, or what reads their columns, or the int[n] of a teacher with one token.
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

    def logps(self, logits: Array, start: Array) -> tuple[Array, Array]:
        """Log-probabilities of student and teacher at the columns of some of the logits."""
        width = logits.shape[-1]
        mask = None if self.vocab_mask is None else _cut(self.vocab_mask, start, width)
        student = _allowed(logits / self.temperature, mask, NEVER)
        student = student - _beside(self.norms[0], logits)
        if callable(self.teacher):
            teacher = self.teacher(start, width) / self.temperature
        elif self.teacher.ndim == 1:
            right = _beside(self.teacher, logits) == _cut(self.columns, start, width)
            return student, jnp.where(right, 0.0, -jnp.inf)
        else:
            teacher = _cut(self.teacher, start, width) / self.temperature
        teacher = _allowed(teacher, mask, -jnp.inf)
        return student, teacher - _beside(self.norms[1], logits)

    def grads(self, terms: Terms, logits: Array, start: Array) -> Array:
        """Gradients of the losses in some of the logits, times the temperature."""
        student, teacher = self.logps(logits, start)
        # Through log-softmax: the slope of a token, less its share of the sum of all slopes.
        grads = _terms_and_slopes(terms, student, teacher)[1]
        grads = grads - jnp.exp(student) * _beside(self.slopes, logits)
        if self.vocab_mask is None:
            return grads
        return jnp.where(_cut(self.vocab_mask, start, logits.shape[-1]), grads, 0.0)


def _terms_and_slopes(terms: Terms, student: Array, teacher: Array) -> tuple[Array, Array]:
    return jax.jvp(lambda s: terms(s, teacher), (student,), (jnp.ones_like(student),))


def _measure(
    settings: _Settings, read: Callable[[Array, int], Array], scores: Scores, rest: Any
) -> tuple[_Rows, Array, Array]:
    """Goes through the logits of n tokens.

    Args:
        settings: see there.
        read: (start, width) -> logits float32[n, width], or [n, S, width].
        scores: a teacher's, for these tokens.
        rest: temperature and mask.

    Returns:
        What gives their gradients, losses and z-losses float32[n].
    """
    temperature, vocab_mask = rest
    shards = settings.shards
    size = settings.vocabulary // shards
    if callable(scores):
        whole = read(jnp.int32(0), size)
        scores = scores(whole.reshape(whole.shape[0], -1))
    known = scores.ndim == 1
    scores = scores if known else _split(scores, 1, shards)
    mask = None if vocab_mask is None else _split(vocab_mask, 0, shards)
    count, width, place = _blocks(size, _sizes().summed // (scores.shape[0] * shards))

    # Sums of their own for each lane, added up at the end: so every step is elementwise.
    zeros = jnp.zeros((scores.shape[0], *([shards] if shards > 1 else []), width), jnp.float32)
    lanes = tuple(range(1, zeros.ndim))

    def norm(read: Callable[[Array, int], Array]) -> Array:
        def block(index: Array) -> Array:
            start, fresh = place(index)
            fresh = fresh if mask is None else fresh & _cut(mask, start, width)
            return jnp.where(fresh, read(start, width) / temperature, -jnp.inf)

        def most(index: Array, highest: Array) -> Array:
            return jnp.maximum(highest, block(index))

        highest = jax.lax.fori_loop(0, count, most, zeros - jnp.inf).max(lanes)

        def add(index: Array, total: Array) -> Array:
            return total + jnp.exp(block(index) - _beside(highest, zeros))

        return jnp.log(jax.lax.fori_loop(0, count, add, zeros).sum(lanes)) + highest

    norms = norm(read), jnp.zeros(()) if known else norm(partial(_cut, scores))
    columns = _split(jnp.arange(settings.vocabulary), 0, shards)
    rows = _Rows(scores, norms, jnp.zeros(()), columns, mask, temperature)

    def add(index: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        start, fresh = place(index)
        logps = rows.logps(read(start, width), start)
        losses, slopes = _terms_and_slopes(settings.terms, *logps)
        return sums[0] + jnp.where(fresh, losses, 0.0), sums[1] + jnp.where(fresh, slopes, 0.0)

    losses, slopes = (x.sum(lanes) for x in jax.lax.fori_loop(0, count, add, (zeros, zeros)))
    return _with_z_loss(settings, rows, losses, slopes)


def _over_columns(
    read: Read, columns: tuple[int, int], mask: Array | None, temperature: Array | float = 1.0
) -> tuple[Array, Array]:
    """Of N tokens the highest of their scores over the temperature, and the log of the sum of
    exponentials, float32[N] each. Of all columns so many are read at once, and each once."""
    count, width, place = _blocks(*columns)

    def add(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        highest, total = carry
        start, fresh = place(index)
        fresh = fresh if mask is None else fresh & _cut(mask, start, width)
        scores = jnp.where(fresh, read(start, width) / temperature, -jnp.inf)
        new = jnp.maximum(highest, scores.max(-1))
        # Of a token none of whose columns so far is allowed: -inf less -inf is NaN.
        base = jnp.where(new > -jnp.inf, new, 0.0)
        total = total * jnp.exp(highest - base) + jnp.exp(scores - base[:, None]).sum(-1)
        return new, total

    tokens, _ = jax.eval_shape(lambda start: read(start, width), jnp.int32(0)).shape
    nothing = jnp.full(tokens, -jnp.inf), jnp.zeros(tokens)
    highest, total = jax.lax.fori_loop(0, count, add, nothing)
    return highest, jnp.log(total) + highest


def _measure_by_columns(
    settings: _Settings, read: Read, scores: Read, rest: Any, columns: int
) -> tuple[_Rows, Array, Array]:
    """`_measure` of N tokens whose teacher's scores are formed anew whenever they are read, so many
    columns at once."""
    temperature, mask = rest
    size = settings.vocabulary
    norm = partial(_over_columns, columns=(size, columns), mask=mask, temperature=temperature)
    norms = norm(read)[1], norm(scores)[1]
    rows = _Rows(scores, norms, jnp.zeros(()), jnp.arange(size), mask, temperature)
    count, width, place = _blocks(size, columns)

    def add(index: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        start, fresh = place(index)
        logps = rows.logps(read(start, width), start)
        losses, slopes = (
            jnp.where(fresh, x, 0.0).sum(-1) for x in _terms_and_slopes(settings.terms, *logps)
        )
        return sums[0] + losses, sums[1] + slopes

    zeros = jnp.zeros(settings.count, jnp.float32)
    losses, slopes = jax.lax.fori_loop(0, count, add, (zeros, zeros))
    return _with_z_loss(settings, rows, losses, slopes)


def _with_z_loss(
    settings: _Settings, rows: _Rows, losses: Array, slopes: Array
) -> tuple[_Rows, Array, Array]:
    norm = rows.norms[0]
    if settings.z_loss:
        # The slope of the normaliser is the share p of a token, as is what it loses in `grads`.
        slopes = slopes - 2 * settings.z_loss * norm
    return rows._replace(slopes=slopes), losses, settings.z_loss * norm**2


# --- in the gradient's place ----------------------------------------------------------------------


class _Place:
    """The unembedding's gradient before it is known: room for float32 rows of N tokens.

    Arrays are [D, V] or [V, D] as the unembedding. A token's row is one of D's where entries have
    32 bits; where they have 16, its upper halves are one and its lower halves another row, if
    D >= 2·N (otherwise the place is float32, rounded in the end).

    Attributes:
        fits: whether there is room. Not said of a vocabulary split over devices: where tokens are,
            too, and no `shard_map` keeps them apart, the compiler gathers the whole place.
    """

    def __init__(self, settings: _Settings, head: Head):
        weight, self.tied = head.unembedding, head.tied
        self.shape, self.dtype = weight.shape, weight.dtype
        self.width = weight.shape[1 if head.tied else 0]
        self.halves = self.width // 2 if weight.dtype.itemsize == 2 else 0
        if settings.count > self.halves:
            self.halves = 0
        fits = settings.count <= self.width and weight.dtype.itemsize in (2, 4)
        self.fits = fits and settings.shards == 1

    def empty(self) -> Array:
        """Zeros."""
        return jnp.zeros(self.shape, jnp.uint16 if self.halves else jnp.float32)

    def gradient(self, place: Array) -> Array:
        """The gradient, once all of it was put there."""
        if self.halves:
            return jax.lax.bitcast_convert_type(place, self.dtype)
        return place.astype(self.dtype)

    def _at(self, row: Array | int, column: Array) -> tuple[Array | int, ...]:
        return (column, row) if self.tied else (row, column)

    def _cut(self, place: Array, row: Array | int, rows: int, column: Array, width: int) -> Array:
        sizes = (width, rows) if self.tied else (rows, width)
        return jax.lax.dynamic_slice(place, self._at(row, column), sizes)

    def read(self, place: Array, row: Array | int, rows: int, column: Array, width: int) -> Array:
        """What is kept of some tokens: float32[rows, width]."""
        values = self._cut(place, row, rows, column, width)
        if self.halves:
            low = self._cut(place, row + self.halves, rows, column, width)
            bits = (values.astype(jnp.uint32) << 16) | low.astype(jnp.uint32)
            values = jax.lax.bitcast_convert_type(bits, jnp.float32)
        return values.T if self.tied else values

    def write(self, place: Array, values: Array, row: Array | int, column: Array) -> Array:
        """Keeps what `read` reads."""
        values = values.T if self.tied else values
        if self.halves:
            bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
            low = (bits & 0xFFFF).astype(jnp.uint16)
            place = jax.lax.dynamic_update_slice(place, low, self._at(row + self.halves, column))
            values = (bits >> 16).astype(jnp.uint16)
        return jax.lax.dynamic_update_slice(place, values, self._at(row, column))

    def put(self, place: Array, part: Array, column: Array, fresh: Array) -> Array:
        """Puts columns of the gradient where `fresh`: float32 [D, width] or [width, D] if tied."""
        if self.halves:
            part = jax.lax.bitcast_convert_type(part.astype(self.dtype), jnp.uint16)
        old = self._cut(place, 0, self.width, column, fresh.shape[0])
        part = jnp.where(fresh[:, None] if self.tied else fresh, part, old)
        return jax.lax.dynamic_update_slice(place, part, self._at(0, column))


def _columns(head: Head, shards: int, start: Array, width: int) -> tuple[Array, str]:
    """Columns of the unembedding, laid out as it is, and the letters of their axes."""
    # Seemingly another matrix in each round: else the CPU's compiler cuts the blocks of a bfloat16
    # matrix from a float32 copy of all of it.
    weight = head.unembedding
    if jax.default_backend() == "cpu":
        weight, start = jax.lax.optimization_barrier((weight, start))
    weight = _split(weight, 0 if head.tied else 1, shards)
    axis = weight.ndim - (2 if head.tied else 1)
    letters = _device_letter(shards) + "vd" if head.tied else f"d{_device_letter(shards)}v"
    return jax.lax.dynamic_slice_in_dim(weight, start, width, axis=axis), letters


def _keep(
    settings: _Settings, student: Head, teacher: Teacher, rest: Any
) -> tuple[tuple[Array, Array], Array]:
    """Losses and z-losses float32[N], and the gradients of their sums in the logits, in place."""
    place = _Place(settings, student)
    sizes, columns = _sizes(), _width(student.unembedding)
    count, width, at = _blocks(settings.vocabulary, columns)

    read_columns = student.columns(rest[1])

    def multiply(block: Array, kept: Array) -> Array:
        start, _ = at(block)
        return place.write(kept, read_columns(start, width), 0, start)

    kept = jax.lax.fori_loop(0, count, multiply, place.empty())
    rows, turned = settings.rows, sizes.turned
    whole = teacher if sizes.by_columns and isinstance(teacher, Head | Ratio) else None
    if isinstance(teacher, Targets):  # which have no logits that would take memory
        rows = max(rows, sizes.summed // columns)
    elif whole is not None:
        rows, turned = settings.count, settings.count * columns
    chunks, rows, chunk_at = _blocks(settings.count, rows)
    tiles, tile, tile_at = _blocks(settings.vocabulary, turned // rows)

    def chunk(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        kept, values = carry
        row, new = chunk_at(index)

        def pick(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, row, rows, axis=0)

        def read(start: Array, width: int) -> Array:
            return place.read(kept, row, rows, start, width)

        if whole is not None:
            scores = whole.columns(rest[1])
            measured, *found = _measure_by_columns(settings, read, scores, rest, columns)
        else:
            measured, *found = _measure(settings, read, teacher.pick(pick).scores(*rest), rest)

        def turn(block: Array, kept: Array) -> Array:
            start, fresh = tile_at(block)
            logits = place.read(kept, row, rows, start, tile)
            grads = measured.grads(settings.terms, logits, start)
            fresh = fresh & _beside(new, logits)
            # The quotient comes last because the CPU's compiler does not compute one twice: each
            # half of it is written where logits are read.
            grads = jnp.where(fresh, grads, logits) / jnp.where(fresh, measured.temperature, 1.0)
            return place.write(kept, grads, row, start)

        kept = jax.lax.fori_loop(0, tiles, turn, kept)
        found = jnp.where(new, jnp.stack(found), jax.lax.dynamic_slice_in_dim(values, row, rows, 1))
        return kept, jax.lax.dynamic_update_slice_in_dim(values, found, row, axis=1)

    zeros = jnp.zeros((2, settings.count), jnp.float32)
    kept, values = jax.lax.fori_loop(0, chunks, chunk, (kept, zeros))
    return (values[0], values[1]), kept


def _grads_of_kept(settings: _Settings, student: Head, kept: Array, weights: Array) -> Head:
    """The gradient of the weighted sum of losses; the unembedding's takes the place of `kept`."""
    place = _Place(settings, student)
    count, width, at = _blocks(settings.vocabulary, _width(student.unembedding))
    late = jax.default_backend() == "cpu"  # fewer products with the weights, none to be rounded
    left = student.hidden.astype(jnp.float32) * weights[:, None] if late else student.hidden
    # Transposed once, which makes the product 1.2 times as fast on a CPU.
    left = jax.lax.optimization_barrier(left.T)

    def block(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        kept, hidden = carry
        start, fresh = at(index)
        grads = jnp.where(fresh, place.read(kept, 0, settings.count, start, width), 0.0)
        grads = grads if late else _rounded(grads * weights[:, None], student.hidden)
        columns, letters = _columns(student, 1, start, width)
        of_logits = f"n{letters.replace('d', '')}"
        multiply = partial(jnp.einsum, preferred_element_type=jnp.float32)
        hidden += multiply(f"{of_logits},{letters}->nd", grads, columns.astype(grads.dtype))
        part = multiply(f"dn,{of_logits}->{letters}", left, grads)
        return place.put(kept, part, start, fresh), hidden

    zeros = jnp.zeros(student.hidden.shape, jnp.float32)
    kept, hidden = jax.lax.fori_loop(0, count, block, (kept, zeros))
    hidden = (hidden * weights[:, None] if late else hidden).astype(student.hidden.dtype)
    return Head(hidden, place.gradient(kept), tied=student.tied)


# --- a few tokens at a time -----------------------------------------------------------------------


def _logits(settings: _Settings, student: Head, teacher: Teacher, rest: Any) -> tuple[Array, Any]:
    """Logits of picked tokens, and what `_measure` returns for them."""
    scores = teacher.scores(*rest)
    # Scores that exist before the logits do: fewer arrays live at once.
    logits = (student if callable(scores) else student.after(scores)).logits()
    logits = _split(logits, 1, settings.shards)
    return logits, _measure(settings, partial(_cut, logits), scores, rest)


def _values(settings: _Settings, student: Head, teacher: Teacher, rest: Any) -> tuple[Array, Array]:
    """Losses and z-losses float32[N], nothing else kept."""

    def chunk(carry: None, index: Array) -> tuple[None, tuple[Array, ...]]:
        pick = settings.pick(index)
        _, (_, *values) = _logits(settings, student.pick(pick), teacher.pick(pick), rest)
        return carry, tuple(values)

    losses, z_losses = jax.lax.scan(chunk, None, jnp.arange(settings.chunks))[1]
    return settings.merge(losses.T), settings.merge(z_losses.T)


def _values_and_grads(
    settings: _Settings, student: Head, teacher: Teacher, rest: Any, weights: Array
) -> tuple[tuple[Array, Array], Head]:
    """Losses and z-losses float32[N], and the gradient of their weighted sum for the student."""
    weight, tied = student.unembedding, student.tied
    axis = 1 if tied else 0  # of the width

    def chunk(carry: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], Any]:
        total, hidden = carry
        pick = settings.pick(index)
        head = student.pick(pick)
        logits, (rows, *values) = _logits(settings, head, teacher.pick(pick), rest)
        total, grads = _logit_grads(settings, rows, logits, head, pick(weights), total)
        part = _hidden_grads(settings, student, grads).astype(hidden.dtype)
        return (total, settings.put(hidden, part, index)), tuple(values)

    hidden = jnp.zeros((settings.rows, settings.chunks, weight.shape[axis]), student.hidden.dtype)
    total = _split(jnp.zeros(weight.shape, jnp.float32), 1 - axis, settings.shards)
    indices = jnp.arange(settings.chunks)
    (total, hidden), (losses, z_losses) = jax.lax.scan(chunk, (total, hidden), indices)
    total = total.reshape(weight.shape).astype(weight.dtype)
    values = settings.merge(losses.T), settings.merge(z_losses.T)
    return values, Head(settings.merge(hidden), total, tied=tied)


def _hidden_grads(settings: _Settings, head: Head, grads: Array) -> Array:
    """`grads @ unembedding^T`, float32[n, D]."""
    weight = head.unembedding
    flat = _rounded(grads.reshape(grads.shape[0], -1), head.hidden)
    if weight.dtype == flat.dtype:
        # [D, n] rather than [n, D]: with few rows 1.3 times as fast on a CPU.
        formula = "vd,nv->dn" if head.tied else "dv,nv->dn"
        part = jnp.einsum(formula, weight, flat, preferred_element_type=jnp.float32)
        return jax.lax.optimization_barrier(part).T  # else it is moved into the product
    # In blocks, since the product of bfloat16 and float32 would take a float32 copy of the matrix.
    device = _device_letter(settings.shards)
    count, width, place = _blocks(grads.shape[-1], _sizes().block // settings.shards)

    def add(block: Array, total: Array) -> Array:
        start, fresh = place(block)
        columns, letters = _columns(head, settings.shards, start, width)
        part = jnp.where(fresh, _cut(grads, start, width), 0.0)
        return total + jnp.einsum(
            f"{letters},n{device}v->dn",
            columns.astype(jnp.float32),
            part,
            preferred_element_type=jnp.float32,
        )

    zeros = jnp.zeros((head.hidden.shape[-1], grads.shape[0]), jnp.float32)
    return jax.lax.fori_loop(0, count, add, zeros).T


def _logit_grads(
    settings: _Settings, rows: _Rows, logits: Array, head: Head, weights: Array, total: Array
) -> tuple[Array, Array]:
    """Puts gradients in the place of the logits, and adds their product with the hidden states.

    Args:
        settings: see there.
        rows: n tokens.
        logits: float32[n, V], as `_split` gives them.
        head: their hidden states.
        weights: float32[n].
        total: float32, the unembedding's gradient as `_split` gives it.

    Returns:
        `total` with what these tokens add, and the gradients of the logits.
    """
    count, width, place = _blocks(logits.shape[-1], _sizes().block // settings.shards)
    device = _device_letter(settings.shards)
    formula = f"dn,n{device}v->" + (f"{device}vd" if head.tied else f"d{device}v")
    # Transposed once, which makes the product 1.2 times as fast on a CPU.
    hidden = jax.lax.optimization_barrier(head.hidden.T)
    axis, last = total.ndim - (2 if head.tied else 1), logits.ndim - 1
    scale = _beside(weights / rows.temperature, logits)
    multiply = partial(jnp.einsum, formula, hidden, preferred_element_type=jnp.float32)
    if count == 1:
        grads = _rounded(scale * rows.grads(settings.terms, logits, jnp.int32(0)), hidden)
        return total + multiply(grads), grads

    def put(block: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        total, logits = carry
        start, fresh = place(block)
        old = _cut(logits, start, width)
        new = jnp.where(fresh, scale * rows.grads(settings.terms, old, start), old)
        logits = jax.lax.dynamic_update_slice_in_dim(logits, new, start, axis=last)
        # Read back, so that the old columns have no other reader: else they are copied, all of
        # them in every round.
        logits = jax.lax.optimization_barrier(logits)
        grads = _rounded(jnp.where(fresh, _cut(logits, start, width), 0.0), hidden)
        before = jax.lax.dynamic_slice_in_dim(total, start, width, axis=axis)
        added = before + multiply(grads)
        return jax.lax.dynamic_update_slice_in_dim(total, added, start, axis=axis), logits

    return jax.lax.fori_loop(0, count, put, (total, logits))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(
    settings: _Settings, student: Head, teacher: Teacher, rest: Any, weights: Array
) -> tuple[Array, Array]:
    values, z_losses = _values(settings, student, teacher, rest)
    return (weights * (values + z_losses)).sum(), values


def _total_forward(
    settings: _Settings, student: Head, teacher: Teacher, rest: Any, weights: Array
) -> tuple[tuple[Array, Array], Any]:
    (values, z_losses), grads = _values_and_grads(settings, student, teacher, rest, weights)
    return ((weights * (values + z_losses)).sum(), values), (grads, values + z_losses)


def _total_backward(_: _Settings, kept: Any, cotangents: tuple[Array, Array]) -> Any:
    (grads, values), scale = kept, cotangents[0]
    grads = jax.tree.map(lambda g: (scale * g).astype(g.dtype), grads)
    return grads, None, None, scale * values


_total.defvjp(_total_forward, _total_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _each(settings: _Settings, student: Head, teacher: Teacher, rest: Any) -> tuple[Array, Array]:
    """Losses float32[N], of which no gradient is asked, and the same with z-losses."""
    losses, z_losses = _values(settings, student, teacher, rest)
    return losses, losses + z_losses


def _each_forward(
    settings: _Settings, student: Head, teacher: Teacher, rest: Any
) -> tuple[tuple[Array, Array], Any]:
    if not _Place(settings, student).fits:
        losses, z_losses = _values(settings, student, teacher, rest)
        return (losses, losses + z_losses), (student, None, (teacher, rest))
    (losses, z_losses), kept = _keep(settings, student, teacher, rest)
    return (losses, losses + z_losses), (student, kept, None)


def _each_backward(settings: _Settings, kept: Any, cotangents: tuple[Array, Array]) -> Any:
    student, logit_grads, others = kept
    if others is None:
        grads = _grads_of_kept(settings, student, logit_grads, cotangents[1])
    else:
        teacher, rest = others
        grads = _values_and_grads(settings, student, teacher, rest, cotangents[1])[1]
    return grads, None, None


_each.defvjp(_each_forward, _each_backward)


def _flat(
    student: Head,
    teacher: Teacher,
    terms: Terms,
    tokens: int | None,
    shards: int,
    z_loss: float = 0.0,
) -> tuple[_Settings, Head, Teacher, tuple[int, ...]]:
    """One axis of N tokens for all, and the shape to go back to."""
    shape = student.hidden.shape[:-1]
    count = math.prod(shape)
    if (tokens is not None and tokens < 1) or shards < 1 or student.vocabulary % shards:
        raise ValueError(
            f"tokens={tokens} and vocab_shards={shards}: the first is at least 1, the second "
            f"divides the vocabulary of {student.vocabulary}"
        )

    for head in jax.tree.leaves(teacher, is_leaf=lambda x: isinstance(x, Head)):
        if isinstance(head, Head) and head.vocabulary != student.vocabulary:
            raise ValueError(
                f"a teacher of {head.vocabulary} tokens for a student of {student.vocabulary}: pad "
                "the smaller unembedding and mask the columns (vocab_mask)"
            )

    def flat(x: Array) -> Array:
        if x.shape[: len(shape)] != shape:
            raise ValueError(f"an array of shape {x.shape} for tokens of shape {shape}")
        return x.reshape(count, *x.shape[len(shape) :])

    def settings(tokens: int) -> _Settings:
        return _Settings(terms, count, student.vocabulary, tokens, shards, z_loss)

    chosen = settings(tokens or _sizes().tokens)
    if tokens is None and _Place(chosen, student).fits:
        chosen = settings(_sizes().scored)
    return chosen, student.pick(flat), teacher.pick(flat), shape


def _strange(teacher: Teacher, student: Head) -> Array | bool:
    """bool[N], where a target is no token: what counts there is NaN, as from plain losses."""
    if not isinstance(teacher, Targets):
        return False
    return (teacher.ids < 0) | (teacher.ids >= student.vocabulary)


@partial(jax.jit, static_argnames=("terms", "tokens", "vocab_shards", "z_loss"))
def chunked_loss(
    student: Head,
    teacher: Teacher,
    weights: Array,
    *,
    terms: Terms = reverse_kl_terms,
    temperature: float | Array = 1.0,
    vocab_mask: Array | None = None,
    tokens: int | None = None,
    vocab_shards: int = 1,
    z_loss: float = 0.0,
) -> tuple[Array, Array]:
    """`Σ_i weights_i · loss_i` over tokens.

    For what is a weighted sum over tokens: distillation with `egjax.losses.distill`'s terms, SFT
    with `terms=forward_kl_terms` and `Targets` (weights: task weight times mask), the KL to the
    initial policy. Differentiable by the student's head and `weights`.

    Args:
        student: hidden states [..., D] and their unembedding.
        teacher: `Head`, `Ratio`, `Targets`, `TopK` or another `Teacher`; stopped.
        weights: [...], 0 where a token does not count.
        terms: the divergence; hyper-parameters by `functools.partial`. Static, by identity: keep
            the object, or a call outside of `jit` compiles anew.
        temperature: divides the logits of both; the result is not multiplied by its square.
        vocab_mask: bool[V], False for padded columns, which neither side may use.
        tokens: at most so many have logits at once; the student's only where there are more than D.
            None goes by the platform, see `SIZES`. On a GPU a few columns are formed for all tokens
            instead where there are no more than D.
        vocab_shards: how many devices share the vocabulary's axis; divides V.
        z_loss: weight of the student's squared log-normaliser, added to each token's loss in the
            sum alone (Chowdhery et al. 2022, arXiv 2204.02311, section 5). Static.

    Returns:
        float32[] sum, and float32[...] the losses of the tokens, stopped and without weights (for
        metrics).

    Raises:
        ValueError: shapes or sizes that do not fit.
    """
    settings, student, teacher, shape = _flat(student, teacher, terms, tokens, vocab_shards, z_loss)
    rest = (jnp.asarray(temperature, jnp.float32), vocab_mask)
    weights = jnp.broadcast_to(weights, shape).reshape(-1).astype(jnp.float32)
    weights = jnp.where(_strange(teacher, student) & (weights != 0), jnp.nan, weights)
    results: Any
    if _Place(settings, student).fits:
        results = _each(settings, student, teacher, rest)
        values, total = results[0], (weights * results[1]).sum()
    else:
        results = _total(settings, student, teacher, rest, weights)
        total, values = results
    return total, jax.lax.stop_gradient(values).reshape(shape)


@partial(jax.jit, static_argnames=("k", "tokens"))
def chunked_top_k(
    teacher: Head | Ratio,
    k: int,
    *,
    temperature: float | Array = 1.0,
    vocab_mask: Array | None = None,
    tokens: int | None = None,
) -> TopK:
    """The teacher as a `TopK`, for keeping on disk: 8 k + 4 bytes a token.

    Args:
        teacher: a model or a composition, hidden states [..., D].
        k: how many tokens are kept, below V.
        temperature: that of the loss it is for.
        vocab_mask: bool[V], False for padded columns.
        tokens: at most so many have logits at once.
    """
    head = teacher.large if isinstance(teacher, Ratio) else teacher
    shape = head.hidden.shape[:-1]
    count = math.prod(shape)
    settings = _Settings(reverse_kl_terms, count, head.vocabulary, tokens or _sizes().tokens)
    flat = teacher.pick(lambda x: x.reshape(settings.count, *x.shape[len(shape) :]))
    scale = jnp.asarray(temperature, jnp.float32)

    def chunk(_: None, index: Array) -> tuple[None, TopK]:
        scores = flat.pick(settings.pick(index)).scores(scale, vocab_mask)
        scores = _allowed(scores / scale, vocab_mask, -jnp.inf)
        norm = _norm(scores, None)
        top, ids = jax.lax.top_k(scores, k)
        others = scores.at[jnp.arange(scores.shape[0])[:, None], ids].set(-jnp.inf)
        return None, TopK(ids, top - norm[:, None], _norm(others, None) - norm)

    kept = jax.lax.scan(chunk, None, jnp.arange(settings.chunks))[1]

    def joined(x: Array) -> Array:
        return settings.merge(jnp.moveaxis(x, 0, 1)).reshape(*shape, *x.shape[2:])

    return jax.tree.map(joined, kept)


@partial(jax.jit, static_argnames=("terms", "tokens", "vocab_shards"))
def chunked_token_losses(
    student: Head,
    teacher: Teacher,
    *,
    terms: Terms = reverse_kl_terms,
    temperature: float | Array = 1.0,
    vocab_mask: Array | None = None,
    tokens: int | None = None,
    vocab_shards: int = 1,
) -> Array:
    """The loss of each token, for any function of them.

    Args: as `chunked_loss`, which is cheaper where the result is a weighted sum of more than D
        tokens: then logits are formed again going backward here.

    Returns:
        float32[...], nats per token.
    """
    settings, student, teacher, shape = _flat(student, teacher, terms, tokens, vocab_shards)
    rest = (jnp.asarray(temperature, jnp.float32), vocab_mask)
    values: Any = _each(settings, student, teacher, rest)
    return jnp.where(_strange(teacher, student), jnp.nan, values[1]).reshape(shape)


def chunked_token_logps(
    model: Head,
    targets: Array,
    *,
    vocab_mask: Array | None = None,
    tokens: int | None = None,
    vocab_shards: int = 1,
) -> Array:
    """`token_logps` from a head: log-probability of each target.

    Args:
        model: hidden states [..., D]; the state at t predicts `targets[..., t]`.
        targets: int[...].
        vocab_mask, tokens, vocab_shards: see `chunked_loss`.

    Returns:
        float32[...].
    """
    return -chunked_token_losses(
        model,
        Targets(targets),
        terms=forward_kl_terms,
        vocab_mask=vocab_mask,
        tokens=tokens,
        vocab_shards=vocab_shards,
    )


def chunked_sequence_logps(
    model: Head,
    targets: Array,
    mask: Array,
    *,
    vocab_mask: Array | None = None,
    tokens: int | None = None,
    vocab_shards: int = 1,
) -> tuple[Array, Array]:
    """`sequence_logps` from a head: what preference losses are made of.

    Args:
        model: hidden states [..., T, D].
        targets: int[..., T].
        mask: bool[..., T], True for the tokens of the completion.
        vocab_mask, tokens, vocab_shards: see `chunked_loss`.

    Returns:
        float32[...] sums (nats) and float32[...] lengths (tokens).
    """
    logps = chunked_token_logps(
        model, targets, vocab_mask=vocab_mask, tokens=tokens, vocab_shards=vocab_shards
    )
    return jnp.where(mask, logps, 0.0).sum(-1), mask.sum(-1).astype(jnp.float32)


def chunked_kl_to_initial(
    model: Head,
    initial: Head,
    mask: Array,
    *,
    vocab_mask: Array | None = None,
    tokens: int | None = None,
    vocab_shards: int = 1,
) -> Array:
    """`kl_to_initial` from heads: `Σ_m KL(π ‖ π₀)` of each completion, exact per token.

    Args:
        model: hidden states [..., T, D] of π.
        initial: the same of π₀; stopped.
        mask: bool[..., T].
        vocab_mask, tokens, vocab_shards: see `chunked_loss`, which with λ · mask as weights gives
            the sum over completions and its gradient without forming the logits twice.

    Returns:
        float32[...], nats per completion.
    """
    per_token = chunked_token_losses(
        model, initial, vocab_mask=vocab_mask, tokens=tokens, vocab_shards=vocab_shards
    )
    return jnp.where(mask, per_token, 0.0).sum(-1)
