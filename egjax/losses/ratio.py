"""The behaviour ratio: what a small model learnt, applied to a large one."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from egjax.losses.reductions import finite, masked_log_softmax

__all__ = ["behaviour_ratio"]

Array = jax.Array


@jax.jit
def behaviour_ratio(
    large: Array,
    expert: Array,
    anti_expert: Array,
    *,
    alpha: float | Array = 1.0,
    clip: float | Array | None = None,
    plausible: float | Array | None = None,
    vocab_mask: Array | None = None,
) -> Array:
    """Log-probabilities of `π̄ = πᴸ · (πᴱ / πᴺ)^α / Z̄` (arXiv 2506.01312, behaviour ratio).

    In log space `log πᴸ + α · clip(log πᴱ - log πᴺ)`, normalised over the plausible tokens
    `{v : πᴸ(v) ≥ t · max πᴸ}` (the set of contrastive decoding, arXiv 2210.15097, equation 3).
    The ratio is that of normalised probabilities: clipping differences of raw logits would
    depend on their arbitrary offset.

    Args:
        large: [..., V], logits of the large model πᴸ.
        expert: [..., V], logits of the small model after training, πᴱ.
        anti_expert: [..., V], logits of the small model before training, πᴺ.
        alpha: exponent α of the ratio; the paper has 1, and 0 gives πᴸ back.
        clip: bound c on the log-ratio, which is cut to [-c, c] nats; None for no bound.
        plausible: threshold t in (0, 1]; None keeps every token.
        vocab_mask: bool[V], False for padded columns.

    Returns:
        float32[..., V]; -inf for tokens that are not plausible, not in the vocabulary, or left out
        by the large model (logits of -inf).
    """
    base = masked_log_softmax(large, vocab_mask)
    # Finite: where both small models leave a token out by -inf, the ratio is 1.
    small = (finite(masked_log_softmax(x, vocab_mask)) for x in (expert, anti_expert))
    ratio = jnp.subtract(*small)
    if clip is not None:
        clip = jnp.asarray(clip, jnp.float32)
        ratio = jnp.clip(ratio, -clip, clip)
    scores = base + jnp.asarray(alpha, jnp.float32) * ratio
    # The masks go in before the normalisation: Z̄ is a sum over the tokens that stay.
    scores = jnp.where(large == -jnp.inf, -jnp.inf, scores)
    if plausible is not None:
        threshold = base.max(-1, keepdims=True) + jnp.log(jnp.asarray(plausible, jnp.float32))
        scores = jnp.where(base >= threshold, scores, -jnp.inf)
    if vocab_mask is not None:
        scores = jnp.where(vocab_mask, scores, -jnp.inf)
    return jax.nn.log_softmax(scores, axis=-1)
