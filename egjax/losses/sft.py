"""Supervised fine-tuning with a weight per task."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from egjax.losses.reductions import token_logps

__all__ = ["sft", "z_loss"]

Array = jax.Array


@jax.jit
def sft(
    logits: Array,
    targets: Array,
    mask: Array,
    weights: Array | float = 1.0,
    vocab_mask: Array | None = None,
) -> Array:
    """Negative log-likelihood per token, `-α_v · log π(y_m | y_<m, x)`.

    Summed over the tokens and tasks v it is the negative of L_V of multi-task post-training
    (arXiv 2506.01312, section on small models).

    Args:
        logits: [..., T, V], any float type; position t predicts `targets[..., t]`.
        targets: int[..., T].
        mask: bool[..., T], True for the tokens that are learnt.
        weights: task weight α_v of each token, broadcastable to [..., T].
        vocab_mask: bool[V], False for padded columns.

    Returns:
        float32[..., T], 0 where the mask is False.
    """
    weights = jnp.asarray(weights, jnp.float32)
    return jnp.where(mask, -weights * token_logps(logits, targets, vocab_mask), 0.0)


@jax.jit
def z_loss(logits: Array, mask: Array, vocab_mask: Array | None = None) -> Array:
    """Squared log-normaliser per token, `(log Σ_v exp ℓ_v)²`: added with a small weight (1e-4) it
    keeps logits from drifting (Chowdhery et al. 2022, arXiv 2204.02311, section 5).

    Args:
        logits: [..., T, V], any float type.
        mask: bool[..., T], True for the tokens that count.
        vocab_mask: bool[V], False for padded columns.

    Returns:
        float32[..., T], 0 where the mask is False.
    """
    wide = logits.astype(jnp.float32)
    allowed = wide if vocab_mask is None else jnp.where(vocab_mask, wide, -jnp.inf)
    return jnp.where(mask, jax.nn.logsumexp(allowed, axis=-1) ** 2, 0.0)
