"""Best-first search of one task over its whole action table: A*, and proofs that a plan is optimal.

Where a tree search samples, this one keeps every state it has seen, once: of two ways to a state
the cheaper. Without an estimate it is uniform-cost search (breadth-first, where every action costs
one), and what it has not found it has proved not to exist; with an estimate that is not admissible
(`egjax.search.relaxed`) it finds plans where goals undo each other and proves nothing.

States are expanded many at a time: legality and steps are compiled functions of a fixed batch, the
queue is on the host.
"""

from __future__ import annotations

import functools
import heapq
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from egjax.errors import EgjaxError
from egjax.search.mcts import Embedding, Params, World, fingerprint

__all__ = ["Found", "best_first"]

Array = jax.Array
Estimate = Callable[[Params, Embedding], Array]
Identity = Callable[[Embedding], Any]


class Found(NamedTuple):
    """What came out.

    Attributes:
        plan: actions of the cheapest plan found, None where there is none.
        cost: of that plan.
        bound: no plan costs less; infinite where every reachable state was seen and none is solved.
        expanded, seen: states whose actions were tried, and different states.
    """

    plan: tuple[int, ...] | None
    cost: float
    bound: float
    expanded: int
    seen: int

    @property
    def optimal(self) -> bool:
        """The plan is proved to be a cheapest one."""
        return self.plan is not None and self.cost <= self.bound


@functools.partial(jax.jit, static_argnums=0)
def _legal(world: World, params: Params, embeddings: Embedding) -> Array:
    return jax.vmap(world.legal, (None, 0))(params, embeddings)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _successors(
    world: World,
    estimate: Estimate | None,
    identity: Identity,
    params: Params,
    embeddings: Embedding,
    actions: Array,
) -> tuple[Embedding, Array, Array, Array, Array]:
    """Embeddings, solved, dead, fingerprints and estimates after one action in each state."""

    def one(embedding: Embedding, action: Array) -> tuple[Embedding, Array, Array, Array, Array]:
        embedding, _, solved, dead = world.step(params, embedding, action)
        ahead = jnp.zeros((), jnp.float32)
        if estimate is not None:
            ahead = estimate(params, embedding)
        return embedding, solved, dead, fingerprint(identity(embedding)), ahead

    return jax.vmap(one)(embeddings, actions)


class _Store:
    """Embeddings of all states by number, as growing host arrays."""

    def __init__(self, first: Embedding):
        leaves, self.tree = jax.tree.flatten(jax.tree.map(np.asarray, first))
        self.arrays: list[np.ndarray] = [np.zeros((64, *leaf.shape), leaf.dtype) for leaf in leaves]
        self.size = 0

    def add(self, rows: Embedding, which: np.ndarray) -> range:
        """Numbers of the chosen rows."""
        end = self.size + len(which)
        for place, leaf in enumerate(jax.tree.leaves(rows)):
            array = self.arrays[place]
            if end > len(array):
                grown = np.zeros((max(end, 2 * len(array)), *array.shape[1:]), array.dtype)
                grown[: self.size] = array[: self.size]
                self.arrays[place] = array = grown
            array[self.size : end] = np.asarray(leaf)[which]
        numbers = range(self.size, end)
        self.size = end
        return numbers

    def get(self, numbers: Sequence[int] | np.ndarray, size: int) -> Embedding:
        """A batch of `size`, filled up with the first of the numbers."""
        rows = np.resize(np.asarray(numbers), size) if len(numbers) else np.zeros(size, int)
        rows[len(numbers) :] = rows[0]
        return jax.tree.unflatten(self.tree, [array[rows] for array in self.arrays])


class _Queue:
    """The search's books: states, how they were reached, and which come next."""

    def __init__(self, start: Embedding, print_: int, costs: np.ndarray, weight: float):
        self.store = _Store(start)
        self.store.add(jax.tree.map(lambda x: np.asarray(x)[None], start), np.zeros(1, int))
        self.known = {print_: 0}
        self.paid: list[float] = [0.0]
        self.parent: list[tuple[int, int]] = [(-1, -1)]
        self.done: set[int] = set()
        self.heap: list[tuple[float, int, int, float]] = [(0.0, 0, 0, 0.0)]
        self.costs, self.weight = costs, weight
        self.ticket = itertools.count(1)
        self.best: tuple[float, int] = (np.inf, -1)

    def bound(self) -> float:
        """What a plan through any state that was not expanded costs at least."""
        waiting = [self.paid[n] for _, _, n, paid in self.heap if paid == self.paid[n]]
        waiting = [p for p in waiting if p + self.costs.min() < self.best[0]]
        return min([p + self.costs.min() for p in waiting], default=self.best[0])

    def take(self, count: int) -> list[int]:
        """The next states to expand, none that costs as much as the best plan."""
        out: list[int] = []
        while self.heap and len(out) < count:
            if out and not self.weight and self.heap[0][0] > self.paid[out[0]]:
                break  # the next layer waits until this one is through
            _, _, number, paid = heapq.heappop(self.heap)
            late = paid + self.costs.min() >= self.best[0]
            if paid == self.paid[number] and number not in self.done and not late:
                self.done.add(number)
                out.append(number)
        return out

    def put(self, rows: Embedding, news: np.ndarray, prints: np.ndarray, ahead: np.ndarray) -> None:
        """Enters successors.

        Args:
            rows: their embeddings.
            news: int/bool[n, 4], parent, action, solved, dead of each.
            prints: uint32[n, 2].
            ahead: float32[n], estimates.
        """
        keys = (prints[:, 0].astype(np.uint64) << np.uint64(32)) | prints[:, 1]
        fresh: dict[int, int] = {}
        for row, (parent, action, _, dead) in enumerate(news.tolist()):
            key, paid = int(keys[row]), self.paid[parent] + float(self.costs[action])
            if dead:
                continue
            number = self.known.get(key)
            if number is None:
                number = self.known[key] = len(self.paid)
                self.paid.append(np.inf)
                self.parent.append((-1, -1))
                fresh[number] = row
            if paid >= self.paid[number]:
                continue
            self.paid[number], self.parent[number] = paid, (parent, action)
            self.done.discard(number)
            if news[row, 2]:
                self.best = min(self.best, (paid, number))
                self.done.add(number)
                continue
            order = paid + self.weight * float(ahead[row])
            heapq.heappush(self.heap, (order, next(self.ticket), number, paid))
        self.store.add(rows, np.array(list(fresh.values()), int))

    def plan(self) -> tuple[int, ...] | None:
        """Actions to the best solved state."""
        number, out = self.best[1], []
        if number < 0:
            return None
        while number:
            number, action = self.parent[number]
            out.append(action)
        return tuple(reversed(out))


def _itself(embedding: Embedding) -> Any:
    return embedding


def best_first(
    world: World,
    params: Params,
    embedding: Embedding,
    *,
    estimate: Estimate | None = None,
    weight: float = 1.0,
    costs: Sequence[float] | None = None,
    identity: Identity = _itself,
    limit: int = 20_000,
    batch: int = 32,
) -> Found:
    """Searches one task.

    Args:
        world: what is searched; the same object for every call, so that nothing is traced twice.
        params, embedding: one task and where it starts, which is not solved. A dead state counts as
            none, so nothing is proved about plans through one.
        estimate: `(params, embedding) -> f32[]`, cost still to come; without one the search is
            uniform-cost and goes on until its plan is proved optimal.
        weight: of the estimate; above 1 the search is greedier.
        costs: of each action, at least 0; 1 where absent.
        identity: what makes two states the same: a function of the embedding that leaves out what
            no action, no solution depends on.
        limit: different states at most, about.
        batch: states expanded at once; their successors go through in rounds of four times as many.

    Raises:
        EgjaxError: a negative cost, or a limit or batch below 1.
    """
    if limit < 1 or batch < 1:
        raise EgjaxError("limit and batch must be at least 1", where="best_first")
    table = jax.eval_shape(world.legal, params, embedding).shape
    price = np.ones(table) if costs is None else np.asarray(costs, float)
    if price.shape != table or (price < 0).any():
        raise EgjaxError("a cost of at least 0 for every action", where="best_first")
    print_ = np.asarray(fingerprint(identity(embedding)), np.uint64)
    start = int(print_[0] << np.uint64(32) | print_[1])
    queue = _Queue(embedding, start, price, weight if estimate is not None else 0.0)
    expanded = 0
    while expanded == 0 or len(queue.paid) < limit:
        states = queue.take(batch)
        if not states or (estimate is not None and queue.best[1] >= 0):
            break
        expanded += len(states)
        legal = np.asarray(_legal(world, params, queue.store.get(states, batch)))[: len(states)]
        at, actions = np.nonzero(legal)
        parents = np.array(states)[at]
        for begin in range(0, len(parents), 4 * batch):
            some = slice(begin, begin + 4 * batch)
            count = len(parents[some])
            chosen = np.resize(actions[some], 4 * batch).astype(np.int32)
            rows, solved, dead, prints, ahead = jax.device_get(
                _successors(
                    world,
                    estimate,
                    identity,
                    params,
                    queue.store.get(parents[some], 4 * batch),
                    chosen,
                )
            )
            news = np.stack([parents[some], actions[some], solved[:count], dead[:count]], axis=1)
            queue.put(rows, news, prints[:count], ahead[:count])
    return Found(queue.plan(), queue.best[0], queue.bound(), expanded, len(queue.paid))
