"""Preference losses over the summed log-probabilities of a chosen and a rejected completion.

Each takes float arrays of one shape [...] (nats, see `sequence_logps`; other shapes are a
ValueError) and returns the loss per pair and its metrics. `β` is called beta, `h` below is the
log-ratio `(log π(y⁺) - log π₀(y⁺)) - (log π(y⁻) - log π₀(y⁻))`. References are stopped inside.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from egjax.losses.distill import reverse_kl
from egjax.losses.reductions import same_shapes

__all__ = [
    "Metrics",
    "cdpo",
    "dpo",
    "dpo_paper",
    "dpo_positive",
    "hinge",
    "ipo",
    "kl_to_initial",
    "length_normalised_dpo",
    "robust_dpo",
    "rpo",
    "simpo",
]

Array = jax.Array


class Metrics(NamedTuple):
    """What to watch beside a preference loss, per pair, float32[...], stopped.

    Attributes:
        chosen_logps: log-probability of the chosen completion. It often falls during training
            together with the rejected one's (displacement), which the loss does not show.
        rejected_logps: the same for the rejected completion.
        margin: difference of the implicit rewards, as the loss sees it.
        accuracy: 1 where the margin is positive, else 0.
    """

    chosen_logps: Array
    rejected_logps: Array
    margin: Array
    accuracy: Array


def _metrics(chosen: Array, rejected: Array, margin: Array) -> Metrics:
    same_shapes(chosen=jnp.shape(chosen), rejected=jnp.shape(rejected))
    chosen, rejected, margin = jax.lax.stop_gradient((_f32(chosen), _f32(rejected), margin))
    return Metrics(chosen, rejected, margin, (margin > 0).astype(jnp.float32))


def _f32(x: Array) -> Array:
    return jnp.asarray(x, jnp.float32)


def _per_token(total: Array, length: Array) -> Array:
    """A mean of a completion; 0 for an empty one."""
    return total / jnp.maximum(_f32(length), 1.0)


def _log_ratio(policy: Array, ref: Array) -> Array:
    return _f32(policy) - jax.lax.stop_gradient(_f32(ref))


def _difference(chosen: Array, rejected: Array, ref_chosen: Array, ref_rejected: Array) -> Array:
    same_shapes(
        chosen=jnp.shape(chosen),
        rejected=jnp.shape(rejected),
        ref_chosen=jnp.shape(ref_chosen),
        ref_rejected=jnp.shape(ref_rejected),
    )
    return _log_ratio(chosen, ref_chosen) - _log_ratio(rejected, ref_rejected)


@jax.jit
def dpo_paper(
    chosen: Array, rejected: Array, *, beta: float | Array = 0.1
) -> tuple[Array, Metrics]:
    """`-log σ(β (log π(y⁺) - log π(y⁻)))`: no reference inside σ (arXiv 2506.01312, DPO).

    The paper adds λ times the KL to the initial policy, for which there is `kl_to_initial`.

    Args:
        chosen: [...], log-probabilities of the chosen completions.
        rejected: [...], those of the rejected ones.
        beta: β > 0.

    Returns:
        float32[...] and `Metrics`.
    """
    margin = beta * (_f32(chosen) - _f32(rejected))
    return -jax.nn.log_sigmoid(margin), _metrics(chosen, rejected, margin)


@jax.jit
def kl_to_initial(
    logits: Array, initial_logits: Array, mask: Array, vocab_mask: Array | None = None
) -> Array:
    """`Σ_m KL(π(·|y_<m, x) ‖ π₀(·|y_<m, x))`, the λ-term of arXiv 2506.01312's DPO.

    The KL of every position is exact over the vocabulary; the prefixes are those of the completion
    at hand. Its gradient is that of the sum, without the part that a change of prefixes would add.

    Args:
        logits: [..., T, V] of the policy π.
        initial_logits: [..., T, V] of the initial policy π₀ (stopped).
        mask: bool[..., T], True for the tokens of the completion.
        vocab_mask: bool[V], False for padded columns.

    Returns:
        float32[...], nats per completion.
    """
    per_token = reverse_kl(logits, initial_logits, vocab_mask=vocab_mask)
    return jnp.where(mask, per_token, 0.0).sum(-1)


@jax.jit
def dpo(
    chosen: Array,
    rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    beta: float | Array = 0.1,
) -> tuple[Array, Metrics]:
    """`-log σ(β h)` (arXiv 2305.18290, equation 7).

    Args:
        chosen: [...], log-probabilities of the chosen completions under the policy.
        rejected: [...], those of the rejected ones.
        ref_chosen: [...], log-probabilities of the chosen ones under the reference.
        ref_rejected: [...], those of the rejected ones.
        beta: β > 0.

    Returns:
        float32[...] and `Metrics`.
    """
    margin = beta * _difference(chosen, rejected, ref_chosen, ref_rejected)
    return -jax.nn.log_sigmoid(margin), _metrics(chosen, rejected, margin)


@jax.jit
def cdpo(
    chosen: Array,
    rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    beta: float | Array = 0.1,
    noise: float | Array = 0.1,
) -> tuple[Array, Metrics]:
    """`-(1-ε) log σ(β h) - ε log σ(-β h)`, conservative DPO (E. Mitchell 2023, a note on DPO).

    Past `σ(β h) = 1-ε` the gradient turns round: the margin is kept finite.

    Args:
        chosen: [...], log-probabilities of the chosen completions under the policy.
        rejected: [...], those of the rejected ones.
        ref_chosen: [...], log-probabilities of the chosen ones under the reference.
        ref_rejected: [...], those of the rejected ones.
        beta: β > 0.
        noise: ε in [0, 0.5), the share of pairs that are taken to be labelled the wrong way round.

    Returns:
        float32[...] and `Metrics`.
    """
    margin = beta * _difference(chosen, rejected, ref_chosen, ref_rejected)
    loss = -(1 - noise) * jax.nn.log_sigmoid(margin) - noise * jax.nn.log_sigmoid(-margin)
    return loss, _metrics(chosen, rejected, margin)


def robust_dpo(
    chosen: Array,
    rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    beta: float | Array = 0.1,
    noise: float | Array = 0.1,
) -> tuple[Array, Metrics]:
    """`(-(1-ε) log σ(β h) + ε log σ(-β h)) / (1-2ε)` (arXiv 2403.00409, equation 12).

    Unbiased: its mean over labels that are swapped with probability ε is the DPO loss.

    Args:
        chosen: [...], log-probabilities of the chosen completions under the policy.
        rejected: [...], those of the rejected ones.
        ref_chosen: [...], log-probabilities of the chosen ones under the reference.
        ref_rejected: [...], those of the rejected ones.
        beta: β > 0.
        noise: ε in [0, 0.5), the share of pairs that are labelled the wrong way round.

    Returns:
        float32[...], which may be negative, and `Metrics`.

    Raises:
        ValueError: a number ε that is out of its range.
    """
    if isinstance(noise, int | float) and not 0 <= noise < 0.5:
        raise ValueError(f"noise = {noise} is not at least 0 and less than 0.5")
    return _robust_dpo(chosen, rejected, ref_chosen, ref_rejected, beta, noise)


@jax.jit
def _robust_dpo(
    chosen: Array,
    rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    beta: float | Array,
    noise: float | Array,
) -> tuple[Array, Metrics]:
    margin = beta * _difference(chosen, rejected, ref_chosen, ref_rejected)
    loss = -(1 - noise) * jax.nn.log_sigmoid(margin) + noise * jax.nn.log_sigmoid(-margin)
    return loss / (1 - 2 * noise), _metrics(chosen, rejected, margin)


@jax.jit
def ipo(
    chosen: Array,
    rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    tau: float | Array = 0.1,
    lengths: tuple[Array, Array] | None = None,
) -> tuple[Array, Metrics]:
    """`(h - 1/(2τ))²` (arXiv 2310.12036, equation 17).

    Args:
        chosen: [...], log-probabilities of the chosen completions under the policy.
        rejected: [...], those of the rejected ones.
        ref_chosen: [...], log-probabilities of the chosen ones under the reference.
        ref_rejected: [...], those of the rejected ones.
        tau: τ > 0; the margin aimed at is 1/(2τ).
        lengths: tokens of the chosen and the rejected completions, [...] each. When given, log-
            ratios are averaged per token, as TRL does; the paper sums.

    Returns:
        float32[...] and `Metrics`, whose margin is h.
    """
    chosen_ratio, rejected_ratio = (
        _log_ratio(chosen, ref_chosen),
        _log_ratio(rejected, ref_rejected),
    )
    if lengths is not None:
        chosen_ratio = _per_token(chosen_ratio, lengths[0])
        rejected_ratio = _per_token(rejected_ratio, lengths[1])
    margin = chosen_ratio - rejected_ratio
    return (margin - 1 / (2 * tau)) ** 2, _metrics(chosen, rejected, margin)


@jax.jit
def hinge(
    chosen: Array,
    rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    beta: float | Array = 0.1,
) -> tuple[Array, Metrics]:
    """`max(0, 1 - β h)` (arXiv 2309.06657, equation 10; SLiC with the reference inside).

    Args:
        chosen: [...], log-probabilities of the chosen completions under the policy.
        rejected: [...], those of the rejected ones.
        ref_chosen: [...], log-probabilities of the chosen ones under the reference.
        ref_rejected: [...], those of the rejected ones.
        beta: β > 0, the inverse of the margin.

    Returns:
        float32[...] and `Metrics`.
    """
    margin = beta * _difference(chosen, rejected, ref_chosen, ref_rejected)
    return jax.nn.relu(1 - margin), _metrics(chosen, rejected, margin)


@jax.jit
def simpo(
    chosen: Array,
    rejected: Array,
    chosen_length: Array,
    rejected_length: Array,
    *,
    beta: float | Array = 2.0,
    gamma: float | Array = 1.0,
) -> tuple[Array, Metrics]:
    """`-log σ(β/|y⁺| log π(y⁺) - β/|y⁻| log π(y⁻) - γ)` (arXiv 2405.14734, equation 6).

    Args:
        chosen: [...], log-probabilities of the chosen completions.
        rejected: [...], those of the rejected ones.
        chosen_length: [...], tokens of the chosen completions.
        rejected_length: [...], tokens of the rejected ones.
        beta: β > 0.
        gamma: γ ≥ 0, the margin of reward aimed at.

    Returns:
        float32[...] and `Metrics`, whose margin is without γ.
    """
    margin = beta * (
        _per_token(_f32(chosen), chosen_length) - _per_token(_f32(rejected), rejected_length)
    )
    return -jax.nn.log_sigmoid(margin - gamma), _metrics(chosen, rejected, margin)


@jax.jit
def length_normalised_dpo(
    chosen: Array,
    rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    chosen_length: Array,
    rejected_length: Array,
    *,
    beta: float | Array = 2.0,
) -> tuple[Array, Metrics]:
    """DPO on log-ratios per token (arXiv 2411.15124, equation 6).

    `-log σ(β/|y⁺| log(π(y⁺)/π₀(y⁺)) - β/|y⁻| log(π(y⁻)/π₀(y⁻)))`.

    Args:
        chosen: [...], log-probabilities of the chosen completions under the policy.
        rejected: [...], those of the rejected ones.
        ref_chosen: [...], log-probabilities of the chosen ones under the reference.
        ref_rejected: [...], those of the rejected ones.
        chosen_length: [...], tokens of the chosen completions.
        rejected_length: [...], tokens of the rejected ones.
        beta: β > 0, per token and thus larger than in `dpo`.

    Returns:
        float32[...] and `Metrics`.
    """
    margin = beta * (
        _per_token(_log_ratio(chosen, ref_chosen), chosen_length)
        - _per_token(_log_ratio(rejected, ref_rejected), rejected_length)
    )
    return -jax.nn.log_sigmoid(margin), _metrics(chosen, rejected, margin)


@jax.jit
def dpo_positive(
    chosen: Array,
    rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    beta: float | Array = 0.3,
    penalty: float | Array = 50.0,
) -> tuple[Array, Metrics]:
    """`-log σ(β (h - λ max(0, log π₀(y⁺) - log π(y⁺))))` (arXiv 2402.13228, equation 3).

    The chosen completion may not become less probable than under the reference.

    Args:
        chosen: [...], log-probabilities of the chosen completions under the policy.
        rejected: [...], those of the rejected ones.
        ref_chosen: [...], log-probabilities of the chosen ones under the reference.
        ref_rejected: [...], those of the rejected ones.
        beta: β > 0.
        penalty: λ ≥ 0.

    Returns:
        float32[...] and `Metrics`, whose margin is β h without the penalty.
    """
    chosen_ratio = _log_ratio(chosen, ref_chosen)
    margin = beta * (chosen_ratio - _log_ratio(rejected, ref_rejected))
    loss = -jax.nn.log_sigmoid(margin - beta * penalty * jax.nn.relu(-chosen_ratio))
    return loss, _metrics(chosen, rejected, margin)


@jax.jit
def rpo(
    chosen: Array,
    rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    chosen_length: Array,
    *,
    beta: float | Array = 0.1,
    nll_weight: float | Array = 1.0,
) -> tuple[Array, Metrics]:
    """`-log σ(β h) - α log π(y⁺) / |y⁺|`: DPO with a likelihood term (arXiv 2404.19733, eq. 1).

    Args:
        chosen: [...], log-probabilities of the chosen completions under the policy.
        rejected: [...], those of the rejected ones.
        ref_chosen: [...], log-probabilities of the chosen ones under the reference.
        ref_rejected: [...], those of the rejected ones.
        chosen_length: [...], tokens of the chosen completions.
        beta: β > 0.
        nll_weight: α ≥ 0.

    Returns:
        float32[...] and `Metrics`.
    """
    loss, metrics = dpo(chosen, rejected, ref_chosen, ref_rejected, beta=beta)
    return loss - nll_weight * _per_token(_f32(chosen), chosen_length), metrics
