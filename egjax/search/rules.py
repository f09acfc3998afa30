"""Which action a tree tries next: UCT, PUCT and Gumbel as scores over the actions of one node.

A rule is `(settings, node) -> float32[A]`; the search takes the open action of the highest score.
Q is divided by the span of the returns that the tree has seen, so that the constants mean the same
whatever the number of goals; Gumbel rescales Q at each node, as its paper does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["RULES", "Node", "RuleName", "Settings", "considered_visits", "gumbel", "puct", "uct"]

Array = jax.Array
RuleName = Literal["uct", "puct", "gumbel"]
_MAXVISIT_INIT, _VALUE_SCALE = 50.0, 0.1  # c_visit and c_scale of the paper, as in mctx
_TINY = float(np.finfo(np.float32).tiny)


class Settings(Protocol):
    """What rules read of a `egjax.search.mcts.SearchConfig`."""

    @property
    def exploration(self) -> float:
        """C of UCT and PUCT."""
        ...

    @property
    def considered(self) -> int:
        """Root actions that Gumbel draws."""
        ...

    @property
    def simulations(self) -> int:
        """The budget that Gumbel halves."""
        ...


class Node(NamedTuple):
    """What a rule sees of the node at which a tree stands; one item.

    Attributes:
        visits: int32[A]. N(s, a).
        q: float32[A]. Mean return of each action from here on; meaningless where never visited.
        open: bool[A]. Legal, and something is left to try below it.
        logits: float32[A]. Prior; -inf for illegal actions.
        parent: int32[]. N(s).
        value: float32[]. Mean return from here on.
        raw: float32[]. First estimate of it; meaningless at the root.
        span: float32[]. Highest minus lowest return that the tree has seen.
        order: float32[A]. Random, in [0, 2^24): the order in which UCT tries new actions.
        noise: float32[A]. Gumbel noise of the root, the same in all simulations.
        root: bool[].
    """

    visits: Array
    q: Array
    open: Array
    logits: Array
    parent: Array
    value: Array
    raw: Array
    span: Array
    order: Array
    noise: Array
    root: Array


def uct(settings: Settings, node: Node) -> Array:
    """`Q / span + C · sqrt(ln N(s) / N(s, a))`, untried actions first (Kocsis, Szepesvári 2006)."""
    parent = jnp.maximum(node.parent, 1).astype(jnp.float32)
    bonus = jnp.sqrt(jnp.log(parent) / jnp.maximum(node.visits, 1).astype(jnp.float32))
    score = node.q / node.span + settings.exploration * bonus
    return jnp.where(node.visits > 0, score, 1e9 + 1e3 * node.order)


def _policy(node: Node) -> Array:
    """Prior probabilities of the open actions, float32[A]; 0 elsewhere."""
    policy = jax.nn.softmax(jnp.where(node.open, node.logits, -1e30))
    return policy * node.open.astype(jnp.float32)


def puct(settings: Settings, node: Node) -> Array:
    """`Q / span + C · P(a) · sqrt(N(s)) / (1 + N(s, a))`, the node's own value where never visited
    (Silver et al. 2017; without the slow growth of C with N(s))."""
    parent = jnp.maximum(node.parent, 1).astype(jnp.float32)
    q = jnp.where(node.visits > 0, node.q, node.value) / node.span
    visits = node.visits.astype(jnp.float32)
    bonus = settings.exploration * _policy(node) * jnp.sqrt(parent) / (1 + visits)
    return q + bonus + 1e-7 * node.order / 2**24  # breaks ties


@functools.cache
def considered_visits(considered: int, simulations: int) -> np.ndarray:
    """Sequential halving (Karnin et al. 2013): which visit count is served when.

    Args:
        considered: actions drawn at most.
        simulations: the budget.

    Returns:
        int32[considered + 1, simulations]. Row m serves m actions: at simulation t the best action
        among those with exactly so many visits is tried. First each of the m gets its share, then
        the better half, and so on down to two.
    """
    rows = [list(range(simulations))] * 2
    for m in range(2, considered + 1):
        row: list[int] = []
        visits, left, rounds = 0, m, math.ceil(math.log2(m))
        while len(row) < simulations:
            share = max(1, simulations // (rounds * left))
            for _ in range(share):
                row += [visits] * left
                visits += 1
            left = max(2, left // 2)
        rows.append(row[:simulations])
    return np.array(rows[: considered + 1], np.int32).reshape(considered + 1, simulations)


def _completed(node: Node) -> Array:
    """σ(Q completed): unvisited actions get the mixed value, all are rescaled to [0, 1] and scaled
    by `(c_visit + max N) · c_scale` (Danihelka et al. 2022, section 3.4 and appendix D)."""
    tried = node.visits > 0
    prior = jnp.maximum(jax.nn.softmax(jnp.maximum(node.logits, -1e30)), _TINY)
    mass = jnp.where(tried, prior, 0.0).sum()
    weighted = jnp.where(tried, prior * node.q / jnp.where(tried, mass, 1.0), 0.0).sum()
    count = jnp.sum(node.visits, dtype=jnp.int32).astype(jnp.float32)
    # The root is never evaluated by itself.
    raw = jnp.where(node.root, weighted, node.raw)
    mixed = (raw + count * weighted) / (count + 1)
    q = jnp.where(tried, node.q, mixed)
    low, high = q.min(), q.max()
    q = (q - low) / jnp.maximum(high - low, 1e-8)
    return (_MAXVISIT_INIT + node.visits.max().astype(jnp.float32)) * _VALUE_SCALE * q


def gumbel(settings: Settings, node: Node) -> Array:
    """Gumbel search: at the root the top k of `g + logits + σ(q)` by sequential halving, below it
    the action whose share of visits lags most behind `softmax(logits + σ(q))`.

    Danihelka et al. 2022, algorithm 2 and equation 14; as `mctx.gumbel_muzero_policy` does it. An
    action that closes keeps its visits, so at times no open action has the count that is served:
    then the best open one is tried.
    """
    completed = _completed(node)
    logits = jnp.maximum(node.logits, -1e30)
    policy = jax.nn.softmax(jnp.where(node.open, logits + completed, -1e30))
    count = jnp.sum(node.visits, dtype=jnp.int32)
    inner = policy - node.visits.astype(jnp.float32) / (1.0 + count.astype(jnp.float32))
    table = jnp.asarray(considered_visits(settings.considered, settings.simulations))
    legal = jnp.sum(node.logits > -jnp.inf, dtype=jnp.int32)
    time = jnp.minimum(count, settings.simulations - 1)
    served = table[jnp.minimum(settings.considered, legal), time]
    outer = jnp.maximum(node.noise + logits - logits.max() + completed, -1e9)
    fits = node.open & (node.visits == served)
    outer = jnp.where(fits | ~fits.any(), outer, -2e9)
    return jnp.where(node.root, outer, inner)


RULES: Mapping[RuleName, Callable[[Settings, Node], Array]] = MappingProxyType(
    {"uct": uct, "puct": puct, "gumbel": gumbel}
)
"""The rules by name."""
