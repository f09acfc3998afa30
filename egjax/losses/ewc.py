"""Elastic weight consolidation: stay near the old parameters where the old task needs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["ewc_penalty", "fisher_diagonal"]

Array = jax.Array


@jax.jit
def ewc_penalty(params: Any, anchor: Any, fisher: Any) -> Array:
    """Quadratic penalty `½ Σ_i F_i (θ_i - θ*_i)²` (arXiv 1612.00796, equation 3, λ = 1).

    Args:
        params: pytree of arrays θ.
        anchor: pytree alike, the parameters θ* to stay near (stopped).
        fisher: pytree alike, the diagonal F of the Fisher information (stopped).

    Returns:
        float32[]; multiply by λ.
    """

    def leaf(theta: Array, old: Array, weight: Array) -> Array:
        distance = theta.astype(jnp.float32) - jax.lax.stop_gradient(old).astype(jnp.float32)
        return (jax.lax.stop_gradient(weight).astype(jnp.float32) * distance**2).sum()

    terms = jax.tree.map(leaf, params, anchor, fisher)
    return 0.5 * jnp.stack(jax.tree.leaves(terms)).sum()


def fisher_diagonal(logp_fn: Callable[[Any, Any], Array], params: Any, examples: Any) -> Any:
    """Diagonal of the empirical Fisher information, `F_i = E_x[(∂ log π(x) / ∂θ_i)²]`.

    The gradient is squared per example, never per batch: the square of a batch's mean gradient
    shrinks with the batch (arXiv 1612.00796, section 2).

    Args:
        logp_fn: maps (params, example) to the float32[] log-probability of one example.
        params: pytree of arrays.
        examples: pytree of arrays with one leading axis of n examples.

    Returns:
        Pytree of float32 arrays shaped like `params`.

    Raises:
        ValueError: no example, of which there is no mean.
    """
    count = jax.tree.leaves(examples)[0].shape[0]
    if not count:
        raise ValueError("no example to take the Fisher information from")
    gradient = jax.grad(logp_fn)

    def add(total: Any, example: Any) -> tuple[Any, None]:
        grads = gradient(params, example)
        return jax.tree.map(lambda s, g: s + g.astype(jnp.float32) ** 2, total, grads), None

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    total, _ = jax.lax.scan(add, zeros, examples)
    return jax.tree.map(lambda s: s / count, total)
