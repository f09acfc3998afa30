"""Divergences between a student and a teacher, exact over the whole vocabulary.

Each is a sum over all tokens, never an estimate from a sample: the gradient of a sampled estimate
of a KL is not an estimate of its gradient. Mixtures are taken in log space.

A teacher may leave tokens out (log-probability -inf), as `behaviour_ratio` does with a plausible
set. Forward KL, JSD and the skewed forms are finite there by themselves. Reverse KL is infinite as
soon as the student gives such a token any mass; it has the argument `floor` for them.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from egjax.losses.reductions import masked_log_softmax

__all__ = [
    "forward_kl",
    "generalised_jsd",
    "reverse_kl",
    "skewed_forward_kl",
    "skewed_reverse_kl",
]

Array = jax.Array


def _prepare(
    student: Array, teacher: Array, temperature: float | Array, vocab_mask: Array | None
) -> tuple[Array, Array]:
    """Student (finite everywhere) and teacher (may hold -inf) as log-probabilities, float32."""
    student_logps = masked_log_softmax(student.astype(jnp.float32) / temperature, vocab_mask)
    teacher = jax.lax.stop_gradient(teacher).astype(jnp.float32) / temperature
    if vocab_mask is not None:
        teacher = jnp.where(vocab_mask, teacher, -jnp.inf)
    return student_logps, jax.nn.log_softmax(teacher, axis=-1)


def _kl(logp: Array, logq: Array) -> Array:
    """`Σ_v p (log p - log q)`, where a token with p = 0 adds nothing.

    Nor to the gradient, as -inf comes from teachers alone, which are stopped.
    """
    return jnp.where(logp > -jnp.inf, jnp.exp(logp) * (logp - logq), 0.0).sum(-1)


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
    student_logps, teacher_logps = _prepare(student, teacher, temperature, vocab_mask)
    return _kl(student_logps, jnp.where(teacher_logps > -jnp.inf, teacher_logps, floor))


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
    student_logps, teacher_logps = _prepare(student, teacher, temperature, vocab_mask)
    return _kl(teacher_logps, student_logps)


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
    """
    if beta == 0:
        return forward_kl(student, teacher, temperature=temperature, vocab_mask=vocab_mask)
    if beta == 1:
        return reverse_kl(student, teacher, temperature=temperature, vocab_mask=vocab_mask)
    student_logps, teacher_logps = _prepare(student, teacher, temperature, vocab_mask)
    mixture = _mix(student_logps, teacher_logps, beta)
    return beta * _kl(teacher_logps, mixture) + (1 - beta) * _kl(student_logps, mixture)


def _mix(student_logps: Array, teacher_logps: Array, weight: float | Array) -> Array:
    """Log of `weight · teacher + (1 - weight) · student`; finite, because the student is."""
    return jnp.logaddexp(student_logps + jnp.log1p(-weight), teacher_logps + jnp.log(weight))


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
    student_logps, teacher_logps = _prepare(student, teacher, temperature, vocab_mask)
    return _kl(teacher_logps, _mix(student_logps, teacher_logps, skew))


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
    student_logps, teacher_logps = _prepare(student, teacher, temperature, vocab_mask)
    return _kl(student_logps, _mix(student_logps, teacher_logps, 1 - skew))
