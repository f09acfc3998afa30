"""Losses from hidden states and unembedding matrices: [batch, time, vocabulary] never exists.

N tokens, M models (student and teachers), width D, vocabulary V; a product takes 2·N·D·V
operations, and all logits at once need M + 2 of them: M for logits, one for the hidden states' and
one for the unembedding's gradient. Two ways; the sizes decide:

- **In the gradient's place** (`egjax.losses.place`), where N < D and the vocabulary is not split
  over devices: the student's logits are formed some columns at a time and kept where the
  unembedding's gradient will be, which has as many rows or more. They are turned there into losses
  and the gradients of the logits, unweighted; once the weights of the tokens are known (preferences
  know them after all sums), each block of columns gives way to that block's gradient. M + 2
  products for every loss. A teacher's scores exist for a few tokens at a time on a CPU; on an
  accelerator, where few tokens cost as much time as many, they lie in the same place, for as many
  tokens as have room.
- **A few tokens at a time** otherwise (`tokens`, n of N): what they give is added to a float32 sum
  of the unembedding's gradient. `chunked_loss`, whose weights are known before, takes M + 2
  products; `chunked_token_losses` forms the logits anew going backward: 2·M + 2.

What a teacher's arrays of n tokens take are 4·n·V bytes for a `Head`, twice as many for a `Ratio`.
Blocks that are multiplied take a few times 4·D bytes a column. How many tokens and columns, `SIZES`
says for each platform. Gradients are rounded to the type of the matrix once; logits are never
rounded. On an accelerator the gradients of the logits are, to the type of hidden states and matrix,
before the two products with them: as those of every other layer are.

A loss is named by its terms (`egjax.losses.distill`) and a teacher: the negative log-likelihood
is the forward KL to `Targets`, whose probability is all on one token.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from egjax.losses.blocks import Start, alike_mapped, beside, cut, loop, rounded, sizes, split
from egjax.losses.distill import Terms, forward_kl_terms, reverse_kl_terms
from egjax.losses.heads import Head, Ratio, Targets, Teacher, TopK, allowed, device_letter, log_sum
from egjax.losses.place import find_place, grads_of_kept, keep
from egjax.losses.rows import Rows, Settings, columns_of, measure

__all__ = [
    "chunked_kl_to_initial",
    "chunked_loss",
    "chunked_sequence_logps",
    "chunked_token_logps",
    "chunked_token_losses",
    "chunked_top_k",
]

Array = jax.Array


def _logits(settings: Settings, student: Head, teacher: Teacher, rest: Any) -> tuple[Array, Any]:
    """Logits of picked tokens, and what `measure` returns for them."""
    scores = teacher.scores(*rest)
    # Scores that exist before the logits do: fewer arrays live at once.
    logits = (student if callable(scores) else student.after(scores)).logits()
    logits = split(logits, 1, settings.shards)
    read = partial(cut, logits)
    known = columns_of(settings, scores, read)
    return logits, measure(settings, read, known, rest, summed=sizes().alone)


def _values(settings: Settings, student: Head, teacher: Teacher, rest: Any) -> tuple[Array, Array]:
    """Losses and z-losses float32[N], nothing else kept."""

    def chunk(carry: None, index: Array) -> tuple[None, tuple[Array, ...]]:
        pick = settings.pick(index)
        _, (_, *values) = _logits(settings, student.pick(pick), teacher.pick(pick), rest)
        return carry, tuple(values)

    losses, z_losses = jax.lax.scan(chunk, None, jnp.arange(settings.chunks, dtype=jnp.int32))[1]
    return settings.merge(losses.T), settings.merge(z_losses.T)


def _values_and_grads(
    settings: Settings, student: Head, teacher: Teacher, rest: Any, weights: Array
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
    total = split(jnp.zeros(weight.shape, jnp.float32), 1 - axis, settings.shards)
    total, hidden, _ = alike_mapped(total, hidden, student)
    indices = jnp.arange(settings.chunks, dtype=jnp.int32)
    (total, hidden), (losses, z_losses) = jax.lax.scan(chunk, (total, hidden), indices)
    total = total.reshape(weight.shape).astype(weight.dtype)
    values = settings.merge(losses.T), settings.merge(z_losses.T)
    return values, Head(settings.merge(hidden), total, tied=tied)


def _hidden_grads(settings: Settings, head: Head, grads: Array) -> Array:
    """`grads @ unembedding^T`, float32[n, D]."""
    weight = head.unembedding
    flat = rounded(grads.reshape(grads.shape[0], -1), head.hidden)
    if weight.dtype == flat.dtype:
        # [D, n] rather than [n, D]: with few rows 1.3 times as fast on a CPU.
        formula = "vd,nv->dn" if head.tied else "dv,nv->dn"
        part = jnp.einsum(formula, weight, flat, preferred_element_type=jnp.float32)
        return jax.lax.optimization_barrier(part).T  # else it is moved into the product
    # In blocks, since the product of bfloat16 and float32 would take a float32 copy of the matrix.
    device = device_letter(settings.shards)

    def add(start: Start, width: int, total: Array) -> Array:
        columns, letters = head.cut(start, width, settings.shards)
        return total + jnp.einsum(
            f"{letters},n{device}v->dn",
            columns.astype(jnp.float32),
            cut(grads, start, width),
            preferred_element_type=jnp.float32,
        )

    zeros = jnp.zeros((head.hidden.shape[-1], grads.shape[0]), jnp.float32)
    zeros, _ = alike_mapped(zeros, grads)
    return loop(grads.shape[-1], sizes().block // settings.shards, add, zeros).T


def _logit_grads(
    settings: Settings, rows: Rows, logits: Array, head: Head, weights: Array, total: Array
) -> tuple[Array, Array]:
    """Puts gradients in the place of the logits, and adds their product with the hidden states.

    Args:
        settings: see there.
        rows: n tokens.
        logits: float32[n, V], as `split` gives them.
        head: their hidden states.
        weights: float32[n].
        total: float32, the unembedding's gradient as `split` gives it.

    Returns:
        `total` with what these tokens add, and the gradients of the logits.
    """
    device = device_letter(settings.shards)
    formula = f"dn,n{device}v->" + (f"{device}vd" if head.tied else f"d{device}v")
    # Transposed once, which makes the product 1.2 times as fast on a CPU.
    hidden = jax.lax.optimization_barrier(head.hidden.T)
    size, axis = logits.shape[-1], total.ndim - (2 if head.tied else 1)
    at_once = sizes().block // settings.shards
    scale = beside(weights / rows.temperature, logits)
    multiply = partial(jnp.einsum, formula, hidden, preferred_element_type=jnp.float32)
    if at_once >= size:
        grads = rounded(scale * rows.grads(settings.terms, logits, 0), hidden)
        return total + multiply(grads), grads

    def put(start: Start, width: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        total, logits = carry
        new = scale * rows.grads(settings.terms, cut(logits, start, width), start)
        logits = jax.lax.dynamic_update_slice_in_dim(logits, new, start, axis=logits.ndim - 1)
        # Read back, so that the old columns have no other reader: else they are copied, all of
        # them in every round.
        logits = jax.lax.optimization_barrier(logits)
        grads = rounded(cut(logits, start, width), hidden)
        before = jax.lax.dynamic_slice_in_dim(total, start, width, axis=axis)
        added = before + multiply(grads)
        return jax.lax.dynamic_update_slice_in_dim(total, added, start, axis=axis), logits

    return loop(size, at_once, put, (total, logits))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(
    settings: Settings, student: Head, teacher: Teacher, rest: Any, weights: Array
) -> tuple[Array, Array]:
    values, z_losses = _values(settings, student, teacher, rest)
    return (weights * (values + z_losses)).sum(), values


def _total_forward(
    settings: Settings, student: Head, teacher: Teacher, rest: Any, weights: Array
) -> tuple[tuple[Array, Array], Any]:
    (values, z_losses), grads = _values_and_grads(settings, student, teacher, rest, weights)
    return ((weights * (values + z_losses)).sum(), values), (grads, values + z_losses)


def _total_backward(_: Settings, kept: Any, cotangents: tuple[Array, Array]) -> Any:
    (grads, values), scale = kept, cotangents[0]
    grads = jax.tree.map(lambda g: (scale * g.astype(jnp.float32)).astype(g.dtype), grads)
    return grads, None, None, scale * values


_total.defvjp(_total_forward, _total_backward)


@jax.custom_jvp
def _once(x: Array) -> Array:
    """The same, of what may be differentiated once: bits that lie in the place of another array
    have no derivative that JAX could find, and it would take them for constants."""
    return x


@_once.defjvp
def _twice(primals: Any, tangents: Any) -> Any:
    raise ValueError(
        "a chunked loss of no more tokens than the width has no second derivatives: take the plain "
        "loss for them"
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _each(settings: Settings, student: Head, teacher: Teacher, rest: Any) -> tuple[Array, Array]:
    """Losses float32[N], of which no gradient is asked, and the same with z-losses."""
    losses, z_losses = _values(settings, student, teacher, rest)
    return losses, losses + z_losses


def _each_forward(
    settings: Settings, student: Head, teacher: Teacher, rest: Any
) -> tuple[tuple[Array, Array], Any]:
    place = find_place(settings, student, teacher)
    if place is not None:
        student = jax.tree.map(_once, student)
    if place is None:
        losses, z_losses = _values(settings, student, teacher, rest)
        return (losses, losses + z_losses), (student, None, (teacher, rest))
    (losses, z_losses), kept = keep(settings, place, student, teacher, rest)
    return (losses, losses + z_losses), (student, kept, None)


def _each_backward(settings: Settings, kept: Any, cotangents: tuple[Array, Array]) -> Any:
    student, logit_grads, others = kept
    if others is None:
        grads = grads_of_kept(settings, student, logit_grads, cotangents[1])
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
) -> tuple[Settings, Head, Teacher, tuple[int, ...]]:
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

    def settings(tokens: int) -> Settings:
        return Settings(terms, count, student.vocabulary, tokens, shards, z_loss)

    chosen = settings(tokens or sizes().tokens)
    if tokens is None and find_place(chosen, student, teacher) is not None:
        chosen = settings(sizes().scored)
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
    initial policy. Differentiable by the student's head and `weights`; once, where there are no
    more tokens than the width.

    Args:
        student: hidden states [..., D] and their unembedding.
        teacher: `Head`, `Ratio`, `Targets`, `TopK` or another `Teacher`; stopped.
        weights: [...], 0 where a token does not count.
        terms: the divergence; hyper-parameters by `functools.partial`. Static, by identity: keep
            the object, or a call outside of `jit` compiles anew.
        temperature: divides the logits of both; the result is not multiplied by its square.
        vocab_mask: bool[V], False for padded columns, which neither side may use.
        tokens: at most so many have logits at once; the student's only where there are more than D.
            None goes by the platform, see `SIZES`. On an accelerator there is no such bound on a
            teacher whose scores lie in the gradient's place.
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
    if not settings.count:
        return jnp.zeros(()), jnp.zeros(shape)
    student, teacher, rest, weights = alike_mapped(student, teacher, rest, weights)
    results: Any
    if find_place(settings, student, teacher) is not None:
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
    settings = Settings(reverse_kl_terms, count, head.vocabulary, tokens or sizes().tokens)
    flat = teacher.pick(lambda x: x.reshape(settings.count, *x.shape[len(shape) :]))
    scale = jnp.asarray(temperature, jnp.float32)

    def chunk(_: None, index: Array) -> tuple[None, TopK]:
        scores = flat.pick(settings.pick(index)).scores(scale, vocab_mask)
        scores = allowed(scores / scale, vocab_mask, -jnp.inf)
        norm = log_sum(scores, None)
        top, ids = jax.lax.top_k(scores, k)
        others = scores.at[jnp.arange(scores.shape[0], dtype=jnp.int32)[:, None], ids].set(-jnp.inf)
        return None, TopK(ids, top - norm[:, None], log_sum(others, None) - norm)

    kept = jax.lax.scan(chunk, None, jnp.arange(settings.chunks, dtype=jnp.int32))[1]

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
    if not settings.count:
        return jnp.zeros(shape)
    student, teacher, rest = alike_mapped(student, teacher, rest)
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
