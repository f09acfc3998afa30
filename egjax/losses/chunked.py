"""Losses from hidden states and unembedding matrices: [batch, time, vocabulary] never exists.

A loop takes a few tokens at a time (`tokens`, n of N), forms their logits against every model at
hand, and with these their losses and gradients. With M models, width D and a vocabulary of V:

- `chunked_loss` weights the tokens and sums them, so that the gradient is known as soon as the
  logits are: M + 2 products of 2·N·D·V operations (M logits, one for the hidden states, one for the
  unembedding), as many as without chunks.
- `chunked_token_losses` gives one value a token, for losses that need all of a sequence before
  they know how much a token counts (preferences). Its backward pass forms the logits anew: 2M + 2.

Both keep 4·n·V bytes per array of logits: one for `Targets`, two for a `Head` or a `Ratio`, three
if its ratio is clipped. Each chunk reads every unembedding once going forward, the student's once
more going backward, and its gradient is read and written, summed in float32 in place. That gradient
is rounded to the matrix' type once; logits are never rounded.

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
Scores = Array | Callable[[Array], Array]

TOKENS = 64
"""Tokens whose logits exist at once: more are faster, and take 4·V bytes each for every array."""
COLUMNS = 512
"""Columns of the vocabulary that are turned into losses and gradients at once."""


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


@partial(jax.tree_util.register_dataclass, data_fields=["ids"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Targets:
    """A teacher that gives one token all its mass.

    Attributes:
        ids: int[...], token ids in 0..V-1.
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

    def __init__(self, terms: Terms, count: int, tokens: int, shards: int, z_loss: float = 0.0):
        self.terms, self.count, self.shards, self.z_loss = terms, count, shards, z_loss
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


class _Rows(NamedTuple):
    """The logits of a few tokens, and what turns a block of their columns into log-probabilities.

    Arrays over the vocabulary are [..., V], or [..., S, V/S] for S devices.

    Attributes:
        student, teacher: logits and scores, or the int[n] of a teacher with one token.
        norms: logs of the sums of their exponentials, over the temperature.
        columns: int[V], numbers of the columns.
        vocab_mask: bool[V] or None.
        temperature: float32[].
    """

    student: Array
    teacher: Array
    norms: tuple[Array, Array]
    columns: Array
    vocab_mask: Array | None
    temperature: Array

    def block(self, logits: Array, start: Array) -> tuple[Array, Array]:
        """Log-probabilities of student and teacher at the columns of some of the logits."""
        width, tail = logits.shape[-1], (1,) * (logits.ndim - 1)
        mask = None if self.vocab_mask is None else _cut(self.vocab_mask, start, width)
        student = _allowed(logits / self.temperature, mask, NEVER)
        student = student - self.norms[0].reshape(-1, *tail)
        if self.teacher.ndim == 1:
            right = self.teacher.reshape(-1, *tail) == _cut(self.columns, start, width)
            return student, jnp.where(right, 0.0, -jnp.inf)
        teacher = _cut(self.teacher, start, width) / self.temperature
        teacher = _allowed(teacher, mask, -jnp.inf)
        return student, teacher - self.norms[1].reshape(-1, *tail)


def _cut(x: Array, start: Array, width: int) -> Array:
    """Columns `start` to `start + width`."""
    return jax.lax.dynamic_slice_in_dim(x, start, width, axis=x.ndim - 1)


def _rows(settings: _Settings, student: Head, teacher: Teacher, rest: Any) -> _Rows:
    """Logits of picked tokens."""
    temperature, vocab_mask = rest
    scores = teacher.scores(temperature, vocab_mask)
    logits = (student if callable(scores) else student.after(scores)).logits()
    scores = scores(logits) if callable(scores) else scores
    known = scores.ndim == 1
    of_scores = jnp.zeros(()) if known else _norm(scores / temperature, vocab_mask)
    norms = _norm(logits / temperature, vocab_mask), of_scores
    axis, shards = logits.ndim - 1, settings.shards
    return _Rows(
        student=_split(logits, axis, shards),
        teacher=scores if known else _split(scores, axis, shards),
        norms=norms,
        columns=_split(jnp.arange(logits.shape[-1]), 0, shards),
        vocab_mask=None if vocab_mask is None else _split(vocab_mask, 0, shards),
        temperature=temperature,
    )


def _blocks(columns: int, shards: int) -> tuple[int, int, Callable[[Array], tuple[Array, Array]]]:
    """Blocks that cover an axis: how many, their width, and (start, bool[width]) of each.

    The last block begins early enough to be full; what it shares with the one before it is False.
    """
    width = min(columns, max(1, COLUMNS // shards))

    def place(block: Array) -> tuple[Array, Array]:
        start = jnp.minimum(block * width, columns - width)
        return start, start + jnp.arange(width) >= block * width

    return math.ceil(columns / width), width, place


def _sums(settings: _Settings, rows: _Rows) -> tuple[Array, Array]:
    """Losses float32[n], and the sums of their slopes in the student's log-probabilities."""
    count, width, place = _blocks(rows.student.shape[-1], settings.shards)
    axes = tuple(range(1, rows.student.ndim))

    def add(block: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        start, fresh = place(block)
        block_logps = rows.block(_cut(rows.student, start, width), start)
        parts = _terms_and_slopes(settings.terms, *block_logps)
        losses, slopes = (jnp.where(fresh, part, 0.0).sum(axes) for part in parts)
        return sums[0] + losses, sums[1] + slopes

    zeros = jnp.zeros(rows.student.shape[0], jnp.float32)
    return jax.lax.fori_loop(0, count, add, (zeros, zeros))


def _terms_and_slopes(terms: Terms, student: Array, teacher: Array) -> tuple[Array, Array]:
    return jax.jvp(lambda s: terms(s, teacher), (student,), (jnp.ones_like(student),))


def _values(settings: _Settings, student: Head, teacher: Teacher, rest: Any) -> tuple[Array, Array]:
    """Losses and z-losses float32[N], nothing else kept."""

    def chunk(_: None, index: Array) -> tuple[None, tuple[Array, Array]]:
        pick = settings.pick(index)
        rows = _rows(settings, student.pick(pick), teacher.pick(pick), rest)
        return None, (_sums(settings, rows)[0], settings.z_loss * rows.norms[0] ** 2)

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
        rows = _rows(settings, head, teacher.pick(pick), rest)
        losses, slopes = _sums(settings, rows)
        z_losses = settings.z_loss * rows.norms[0] ** 2
        if settings.z_loss:
            # The slope of the normaliser is the share p of a token, as is what it loses below.
            slopes = slopes - 2 * settings.z_loss * rows.norms[0]
        total, grads = _logit_grads(settings, rows, head, slopes, pick(weights), total)
        part = _hidden_grads(settings, student, grads).astype(hidden.dtype)
        return (total, settings.put(hidden, part, index)), (losses, z_losses)

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
    if weight.dtype == jnp.float32:
        # [D, n] rather than [n, D]: with few rows 1.3 times as fast on a CPU.
        formula = "vd,nv->dn" if head.tied else "dv,nv->dn"
        flat = grads.reshape(grads.shape[0], -1)
        part = jnp.einsum(formula, weight, flat, preferred_element_type=jnp.float32)
        return jax.lax.optimization_barrier(part).T  # else it is moved into the product
    # In blocks, since the product of bfloat16 and float32 would take a float32 copy of the matrix;
    # and as bits, since the CPU's compiler would cut the blocks from such a copy.
    bits = jnp.dtype(f"uint{8 * weight.dtype.itemsize}")
    device = "s" if settings.shards > 1 else ""
    formula = (f"{device}vd" if head.tied else f"d{device}v") + f",n{device}v->dn"
    cast = jax.lax.bitcast_convert_type
    whole = _split(cast(weight, bits), 0 if head.tied else 1, settings.shards)
    axis = whole.ndim - (2 if head.tied else 1)
    count, width, place = _blocks(grads.shape[-1], settings.shards)

    def add(block: Array, total: Array) -> Array:
        start, fresh = place(block)
        columns = cast(jax.lax.dynamic_slice_in_dim(whole, start, width, axis=axis), weight.dtype)
        part = jnp.where(fresh, _cut(grads, start, width), 0.0)
        return total + jnp.einsum(
            formula, columns.astype(jnp.float32), part, preferred_element_type=jnp.float32
        )

    zeros = jnp.zeros((head.hidden.shape[-1], grads.shape[0]), jnp.float32)
    return jax.lax.fori_loop(0, count, add, zeros).T


def _logit_grads(
    settings: _Settings, rows: _Rows, head: Head, slopes: Array, weights: Array, total: Array
) -> tuple[Array, Array]:
    """Puts gradients in the place of the logits, and adds their product with the hidden states.

    Args:
        settings: see there.
        rows: n tokens.
        head: their hidden states.
        slopes: float32[n], sums of the slopes of each token.
        weights: float32[n].
        total: float32, the unembedding's gradient as `_split` gives it.

    Returns:
        `total` with what these tokens add, and the gradients of `rows.student`.
    """
    count, width, place = _blocks(rows.student.shape[-1], settings.shards)
    device = "s" if settings.shards > 1 else ""
    formula = f"dn,n{device}v->" + (f"{device}vd" if head.tied else f"d{device}v")
    # Transposed once, which makes the product 1.2 times as fast on a CPU.
    hidden = jax.lax.optimization_barrier(head.hidden.T)
    axis, last = total.ndim - (2 if head.tied else 1), rows.student.ndim - 1
    each = (-1, *(1,) * last)
    scale, slopes = (weights / rows.temperature).reshape(each), slopes.reshape(each)

    def put(block: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        total, logits = carry
        start, fresh = place(block)
        old = _cut(logits, start, width)
        student, teacher = rows.block(old, start)
        _, grads = _terms_and_slopes(settings.terms, student, teacher)
        # Through log-softmax: the slope of a token, less its share of the sum of all slopes.
        grads = (grads - jnp.exp(student) * slopes) * scale
        if rows.vocab_mask is not None:
            grads = jnp.where(_cut(rows.vocab_mask, start, width), grads, 0.0)
        new = jnp.where(fresh, grads, old)
        logits = jax.lax.dynamic_update_slice_in_dim(logits, new, start, axis=last)
        # Read back, so that the old columns have no other reader: else they are copied, all of
        # them in every round.
        logits = jax.lax.optimization_barrier(logits)
        grads = jnp.where(fresh, _cut(logits, start, width), 0.0)
        outer = jnp.einsum(formula, hidden, grads, preferred_element_type=jnp.float32)
        before = jax.lax.dynamic_slice_in_dim(total, start, width, axis=axis)
        total = jax.lax.dynamic_update_slice_in_dim(total, before + outer, start, axis=axis)
        return total, logits

    return jax.lax.fori_loop(0, count, put, (total, rows.student))


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
def _each(settings: _Settings, student: Head, teacher: Teacher, rest: Any) -> Array:
    return _values(settings, student, teacher, rest)[0]


def _each_forward(
    settings: _Settings, student: Head, teacher: Teacher, rest: Any
) -> tuple[Array, Any]:
    return _values(settings, student, teacher, rest)[0], (student, teacher, rest)


def _each_backward(settings: _Settings, kept: Any, cotangents: Array) -> Any:
    student, teacher, rest = kept
    _, grads = _values_and_grads(settings, student, teacher, rest, cotangents)
    return grads, None, None


_each.defvjp(_each_forward, _each_backward)


def _flat(
    student: Head, teacher: Teacher, terms: Terms, tokens: int, shards: int, z_loss: float = 0.0
) -> tuple[_Settings, Head, Teacher, tuple[int, ...]]:
    """One axis of N tokens for all, and the shape to go back to."""
    shape = student.hidden.shape[:-1]
    count = math.prod(shape)
    if tokens < 1 or shards < 1 or student.vocabulary % shards:
        raise ValueError(
            f"tokens={tokens} and vocab_shards={shards}: the first is at least 1, the second "
            f"divides the vocabulary of {student.vocabulary}"
        )

    def flat(x: Array) -> Array:
        if x.shape[: len(shape)] != shape:
            raise ValueError(f"an array of shape {x.shape} for tokens of shape {shape}")
        return x.reshape(count, *x.shape[len(shape) :])

    settings = _Settings(terms, count, tokens, shards, z_loss)
    return settings, student.pick(flat), teacher.pick(flat), shape


@partial(jax.jit, static_argnames=("terms", "tokens", "vocab_shards", "z_loss"))
def chunked_loss(
    student: Head,
    teacher: Teacher,
    weights: Array,
    *,
    terms: Terms = reverse_kl_terms,
    temperature: float | Array = 1.0,
    vocab_mask: Array | None = None,
    tokens: int = TOKENS,
    vocab_shards: int = 1,
    z_loss: float = 0.0,
) -> tuple[Array, Array]:
    """`Σ_i weights_i · loss_i` over tokens; its gradient is computed along with it.

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
        tokens: at most so many have logits at once.
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
    results: Any = _total(settings, student, teacher, rest, weights)
    total, values = results
    return total, jax.lax.stop_gradient(values).reshape(shape)


@partial(jax.jit, static_argnames=("k", "tokens"))
def chunked_top_k(
    teacher: Head | Ratio,
    k: int,
    *,
    temperature: float | Array = 1.0,
    vocab_mask: Array | None = None,
    tokens: int = TOKENS,
) -> TopK:
    """The teacher as a `TopK`, for keeping on disk: 8 k + 4 bytes a token.

    Args:
        teacher: a model or a composition, hidden states [..., D].
        k: how many tokens are kept, below V.
        temperature: that of the loss it is for.
        vocab_mask: bool[V], False for padded columns.
        tokens: at most so many have logits at once.
    """
    shape = (teacher.large if isinstance(teacher, Ratio) else teacher).hidden.shape[:-1]
    settings = _Settings(reverse_kl_terms, math.prod(shape), tokens, 1)
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
    tokens: int = TOKENS,
    vocab_shards: int = 1,
) -> Array:
    """The loss of each token, for any function of them; logits are formed again going backward.

    Args: as `chunked_loss`, which is cheaper where the result is a weighted sum.

    Returns:
        float32[...], nats per token.
    """
    settings, student, teacher, shape = _flat(student, teacher, terms, tokens, vocab_shards)
    rest = (jnp.asarray(temperature, jnp.float32), vocab_mask)
    values: Any = _each(settings, student, teacher, rest)
    return values.reshape(shape)


def chunked_token_logps(
    model: Head,
    targets: Array,
    *,
    vocab_mask: Array | None = None,
    tokens: int = TOKENS,
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
    tokens: int = TOKENS,
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
    tokens: int = TOKENS,
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
