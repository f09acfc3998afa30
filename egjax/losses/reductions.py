"""From logits to log-probabilities, and from values to one mean."""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = [
    "chosen",
    "finite",
    "masked_log_softmax",
    "masked_mean",
    "same_shapes",
    "sequence_logps",
    "token_logps",
]

Array = jax.Array

# Stands in for log 0 where a gradient has to pass: -inf minus -inf would be NaN. exp() of it is 0.
NEVER = -1e30


def masked_log_softmax(logits: Array, vocab_mask: Array | None = None) -> Array:
    """Log-probabilities in float32; columns outside the vocabulary get a finite log 0.

    Args:
        logits: [..., V], any float type.
        vocab_mask: bool[V] (or broadcastable), False for padded columns.

    Returns:
        float32[..., V].
    """
    logits = logits.astype(jnp.float32)
    if vocab_mask is not None:
        logits = jnp.where(vocab_mask, logits, NEVER)
    return jax.nn.log_softmax(logits, axis=-1)


def finite(logps: Array) -> Array:
    """Log-probabilities with a finite log 0, as masked columns have it, also for logits of -inf.

    For what came out of a softmax: before it, all logits would be kept twice for the gradient. Not
    a maximum, which halves the gradient where both are equal.
    """
    return jnp.where(logps == -jnp.inf, NEVER, logps)


def chosen(logps: Array, targets: Array) -> Array:
    """Entries [...] of log-probabilities [..., V] at targets int[...]; NaN where a target is no
    token. Negative ones would count from the end else, and be learnt."""
    targets = jnp.where(targets < 0, logps.shape[-1], targets)
    return jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0]


def same_shapes(**shapes: tuple[int, ...]) -> None:
    """Refuses arrays that would be broadcast against each other; single numbers go with all.

    Raises:
        ValueError: two shapes differ.
    """
    shapes = {name: shape for name, shape in shapes.items() if shape}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"different shapes: {', '.join(f'{k} {s}' for k, s in shapes.items())}")


@jax.jit
def token_logps(logits: Array, targets: Array, vocab_mask: Array | None = None) -> Array:
    """Log-probability of each target token.

    Args:
        logits: [..., V], any float type.
        targets: int[...], token ids in 0..V-1.
        vocab_mask: bool[V], False for padded columns.

    Returns:
        float32[...], `log softmax(logits)[target]`; finite also where that logit is -inf, by which
        some models mark their padded columns; NaN where a target is no token.

    Raises:
        ValueError: logits and targets do not fit.
    """
    same_shapes(logits=logits.shape[:-1], targets=targets.shape)
    return finite(chosen(masked_log_softmax(logits, vocab_mask), targets))


@jax.jit
def sequence_logps(
    logits: Array, targets: Array, mask: Array, vocab_mask: Array | None = None
) -> tuple[Array, Array]:
    """Log-probability of each completion, summed over its tokens, and its length.

    Args:
        logits: [..., T, V], any float type; position t predicts `targets[..., t]`.
        targets: int[..., T].
        mask: bool[..., T], True for the tokens of the completion.
        vocab_mask: bool[V], False for padded columns.

    Returns:
        float32[...] sums (nats) and float32[...] lengths (tokens).
    """
    logps = token_logps(logits, targets, vocab_mask)
    return jnp.where(mask, logps, 0.0).sum(-1), mask.sum(-1).astype(jnp.float32)


@jax.jit
def masked_mean(values: Array, mask: Array) -> Array:
    """Mean of the values that count, taken once over all axes; 0 where none counts.

    Args:
        values: [...].
        mask: bool[...], of a shape that broadcasts to that of `values`.

    Returns:
        float32[].
    """
    mask = jnp.broadcast_to(mask, values.shape)
    total = jnp.where(mask, values, 0.0).sum(dtype=jnp.float32)
    return total / jnp.maximum(mask.sum(), 1).astype(jnp.float32)
