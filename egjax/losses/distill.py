"""Divergences between a student and a teacher, exact over the whole vocabulary.

Each is a sum over all tokens, never an estimate from a sample: the gradient of a sampled estimate
of a KL is not an estimate of its gradient. Mixtures are taken in log space.

A teacher may leave tokens out (log-probability -inf), as `behaviour_ratio` does with a plausible
set. Forward KL, JSD and the skewed forms are finite there by themselves. Reverse KL is infinite as
soon as the student gives such a token any mass; it has the argument `floor` for them.

Each divergence is written once, as what a single token v adds to the sum (`*_terms`): the functions
here sum it over whole arrays of logits, `egjax.losses.chunked` over a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from egjax.losses.reductions import finite, masked_log_softmax

__all__ = [
    "Terms",
    "forward_kl",
    "forward_kl_terms",
    "generalised_jsd",
    "generalised_jsd_terms",
    "reverse_kl",
    "reverse_kl_terms",
    "skewed_forward_kl",
    "skewed_forward_kl_terms",
    "skewed_reverse_kl",
    "skewed_reverse_kl_terms",
    "student_logps",
    "teacher_logps",
]

Array = jax.Array

# (student, teacher), log-probabilities [..., V] -> what each token adds to the divergence,
# [..., V]. Elementwise; the teacher may hold -inf, the student not.
Terms = Callable[[Array, Array], Array]


def student_logps(logits: Array, temperature: float | Array, vocab_mask: Array | None) -> Array:
    """Log-probabilities float32[..., V] of logits over a temperature, finite everywhere."""
    return finite(masked_log_softmax(logits.astype(jnp.float32) / temperature, vocab_mask))


def teacher_logps(scores: Array, temperature: float | Array, vocab_mask: Array | None) -> Array:
    """The same of a teacher, which is stopped and may hold -inf (masked columns do)."""
    scores = jax.lax.stop_gradient(scores).astype(jnp.float32) / temperature
    if vocab_mask is not None:
        scores = jnp.where(vocab_mask, scores, -jnp.inf)
    return jax.nn.log_softmax(scores, axis=-1)


def _sum(
    terms: Terms,
    student: Array,
    teacher: Array,
    temperature: float | Array,
    vocab_mask: Array | None,
) -> Array:
    return terms(
        student_logps(student, temperature, vocab_mask),
        teacher_logps(teacher, temperature, vocab_mask),
    ).sum(-1)


def _kl(logp: Array, logq: Array) -> Array:
    """`p (log p - log q)`, where a token with p = 0 adds nothing.

    Nor to the gradient, as -inf comes from teachers alone, which are stopped. NaN is not left out:
    a broken teacher has to be seen.
    """
    return jnp.where(logp == -jnp.inf, 0.0, jnp.exp(logp) * (logp - logq))


def _mix(student: Array, teacher: Array, weight: float | Array) -> Array:
    """Log of `weight · teacher + (1 - weight) · student`; finite, because the student is."""
    return jnp.logaddexp(student + jnp.log1p(-weight), teacher + jnp.log(weight))


def reverse_kl_terms(student: Array, teacher: Array, *, floor: float | Array = -20.0) -> Array:
    """Terms of `reverse_kl`; see `Terms`."""
    return _kl(student, jnp.where(teacher == -jnp.inf, floor, teacher))


def forward_kl_terms(student: Array, teacher: Array) -> Array:
    """Terms of `forward_kl`; see `Terms`."""
    return _kl(teacher, student)


def generalised_jsd_terms(student: Array, teacher: Array, *, beta: float = 0.5) -> Array:
    """Terms of `generalised_jsd`; see `Terms`."""
    if not 0 <= beta <= 1:
        raise ValueError(f"beta = {beta} is not between 0 and 1")
    if beta == 0:
        return forward_kl_terms(student, teacher)
    if beta == 1:
        return reverse_kl_terms(student, teacher)
    mixture = _mix(student, teacher, beta)
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def skewed_forward_kl_terms(student: Array, teacher: Array, *, skew: float | Array = 0.1) -> Array:
    """Terms of `skewed_forward_kl`; see `Terms`."""
    return _kl(teacher, _mix(student, teacher, skew))


def skewed_reverse_kl_terms(student: Array, teacher: Array, *, skew: float | Array = 0.1) -> Array:
    """Terms of `skewed_reverse_kl`; see `Terms`."""
    return _kl(student, _mix(student, teacher, 1 - skew))


@jax.jit
def reverse_kl(
    student: Array,
    teacher: Array,
    *,
    temperature: float | Array = 1.0,
    vocab_mask: Array | None = None,
    floor: float | Array = -20.0,
) -> Array:
    """`KL(student ‖ teacher) = Σ_v π_θ(v) log(π_θ(v) / π̄(v))`, mode-seeking.

    arXiv 2506.01312 (distillation), arXiv 2306.08543. With the logits divided by a temperature
    the result is not multiplied by its square.

    Args:
        student: [..., V], logits.
        teacher: [..., V], log-probabilities (logits serve as well); stopped.
        temperature: divides both.
        vocab_mask: bool[V], False for padded columns, which neither side may use.
        floor: log-probability in nats at which a token that the teacher leaves out is counted;
            other tokens are exact. Each unit of mass there costs the student about `-floor`.

    Returns:
        float32[...], nats per token.
    """
    return _sum(partial(reverse_kl_terms, floor=floor), student, teacher, temperature, vocab_mask)


@jax.jit
def forward_kl(
    student: Array,
    teacher: Array,
    *,
    temperature: float | Array = 1.0,
    vocab_mask: Array | None = None,
) -> Array:
    """`KL(teacher ‖ student) = Σ_v π̄(v) log(π̄(v) / π_θ(v))`, mass-covering (arXiv 1503.02531).

    Args:
        student: [..., V], logits.
        teacher: [..., V], log-probabilities (logits serve as well), -inf allowed; stopped.
        temperature: divides both.
        vocab_mask: bool[V], False for padded columns, which neither side may use.

    Returns:
        float32[...], nats per token.
    """
    return _sum(forward_kl_terms, student, teacher, temperature, vocab_mask)


@partial(jax.jit, static_argnames="beta")
def generalised_jsd(
    student: Array,
    teacher: Array,
    *,
    beta: float = 0.5,
    temperature: float | Array = 1.0,
    vocab_mask: Array | None = None,
) -> Array:
    """`β KL(teacher ‖ M) + (1-β) KL(student ‖ M)` with `M = β teacher + (1-β) student`.

    arXiv 2306.13649, equation 1. The formula vanishes at both ends; there it is defined, as usual,
    by what its slope tends to: β = 0 is forward KL, β = 1 reverse KL (with that one's `floor`).

    Args:
        student: [..., V], logits.
        teacher: [..., V], log-probabilities (logits serve as well), -inf allowed; stopped.
        beta: weight β in [0, 1] of the teacher; static.
        temperature: divides both.
        vocab_mask: bool[V], False for padded columns, which neither side may use.

    Returns:
        float32[...], nats per token; at most log 2 for 0 < β < 1.

    Raises:
        ValueError: β is out of its range.
    """
    terms = partial(generalised_jsd_terms, beta=beta)
    return _sum(terms, student, teacher, temperature, vocab_mask)


@jax.jit
def skewed_forward_kl(
    student: Array,
    teacher: Array,
    *,
    skew: float | Array = 0.1,
    temperature: float | Array = 1.0,
    vocab_mask: Array | None = None,
) -> Array:
    """`KL(teacher ‖ α teacher + (1-α) student)` (arXiv 2402.03898, skew KL).

    Args:
        student: [..., V], logits.
        teacher: [..., V], log-probabilities (logits serve as well), -inf allowed; stopped.
        skew: α in (0, 1), the part that is mixed in of the first argument of the KL.
        temperature: divides both.
        vocab_mask: bool[V], False for padded columns, which neither side may use.

    Returns:
        float32[...], nats per token; at most `-log α`.
    """
    terms = partial(skewed_forward_kl_terms, skew=skew)
    return _sum(terms, student, teacher, temperature, vocab_mask)


@jax.jit
def skewed_reverse_kl(
    student: Array,
    teacher: Array,
    *,
    skew: float | Array = 0.1,
    temperature: float | Array = 1.0,
    vocab_mask: Array | None = None,
) -> Array:
    """`KL(student ‖ (1-α) teacher + α student)` (arXiv 2402.03898, skew reverse KL).

    Args:
        student: [..., V], logits.
        teacher: [..., V], log-probabilities (logits serve as well), -inf allowed; stopped.
        skew: α in (0, 1), the part that is mixed in of the first argument of the KL.
        temperature: divides both.
        vocab_mask: bool[V], False for padded columns, which neither side may use.

    Returns:
        float32[...], nats per token; at most `-log α`.
    """
    terms = partial(skewed_reverse_kl_terms, skew=skew)
    return _sum(terms, student, teacher, temperature, vocab_mask)
