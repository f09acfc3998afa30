"""Move by move: search, take a step, and go on with the tree that was grown below it.

`reroot` makes a child the root of a tree of the same arrays: its subtree moves to the front with
its statistics, everything else is forgotten; a step never tried leads to a new root. What an edge
was closed for is asked anew, because a node that repeated a forgotten one, or lay at the depth
limit, is worth searching again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from egjax.errors import EgjaxError
from egjax.search.mcts import (
    Embedding,
    Params,
    Search,
    SearchConfig,
    World,
    fingerprint,
    make_leaf,
    plant,
    resume,
)

__all__ = ["Played", "choose", "plan", "reroot"]

Array = jax.Array
_NOWHERE = jnp.iinfo(jnp.int32).max


def _below(parents: Array, top: Array, depth: int) -> Array:
    """bool[S+1]: nodes of the subtree of `top`, a child of the root (or the root: all)."""
    here = jnp.arange(parents.size, dtype=jnp.int32)
    up = jnp.where(parents > 0, parents, here)
    for _ in range(depth.bit_length()):  # each round doubles the way up
        up = up[up]
    linked = (parents >= 0) | (here == 0)
    return jnp.where(top == 0, linked, (up == top) & linked)


def _reopen(config: SearchConfig, one: Search, legal: Array, count: Array) -> Array:
    """bool[S+1, A]: which edges are open in a tree of `count` nodes, the first ones."""
    tree, here = one.tree, jnp.arange(one.depth.size, dtype=jnp.int32)
    same = jnp.all(one.prints[:, None] == one.prints[None], axis=-1)
    earlier = (here[None] < here[:, None]) & (one.depth[None] <= one.depth[:, None])
    repeated = jnp.any(same & earlier & (here < count), axis=1)
    closed = (one.end > 0) | repeated | (one.depth >= config.max_depth) | (here >= count)

    def up(step: Array, open_: Array) -> Array:
        node = here.size - 1 - step.astype(jnp.int32)  # children before parents
        parent, action = tree.parents[node], tree.action_from_parent[node]
        shut = (node < count) & (parent >= 0) & ~jnp.any(open_[node])
        return open_.at[jnp.where(shut, parent, here.size), action].set(False, mode="drop")

    return jax.lax.fori_loop(0, here.size, up, legal & ~closed[:, None])


def _way_to(one: Search, node: Array, length: int) -> tuple[Array, Array]:
    """int16[length] actions from the root to a node, -1 behind them, and the sum of rewards."""
    tree = one.tree

    def up(step: Array, carry: Any) -> Any:
        node, way, total = carry
        parent, action = tree.parents[node], tree.action_from_parent[node]
        real = parent >= 0
        at = jnp.where(real, one.depth[node] - 1, length)
        way = way.at[at].set(action.astype(jnp.int16), mode="drop")
        parent, edge = jnp.maximum(parent, 0), jnp.maximum(action, 0)
        reward = tree.children_rewards[parent, edge]
        total = jnp.where(real, reward + tree.children_discounts[parent, edge] * total, total)
        return jnp.where(real, parent, node), way, total

    start = node, jnp.full((length,), -1, jnp.int16), jnp.zeros((), jnp.float32)
    return jax.lax.fori_loop(0, length, up, start)[1:]


def _best(config: SearchConfig, old: Search, new: Search, action: Array, reward: Array) -> Search:
    """The best trajectory after the move: the rest of the old one if it began with the action, else
    the way to the shallowest solved node, else none."""
    follows = (old.best[0] == action.astype(jnp.int16)) & (old.best_length > 0)
    rest = jnp.append(old.best[1:], jnp.int16(-1))
    solved = new.end == 2
    nearest = jnp.argmin(jnp.where(solved, new.depth, _NOWHERE)).astype(jnp.int32)
    way, total = _way_to(new, nearest, config.length)
    known = jnp.any(solved)
    gain = jnp.where(known, total, -jnp.inf)
    length = jnp.where(known, new.depth[nearest], 0)
    return dataclasses.replace(
        new,
        solved=jnp.where(follows, old.solved, known),
        best=jnp.where(follows, rest, way),
        best_length=jnp.where(follows, old.best_length - 1, length),
        best_return=jnp.where(follows, (old.best_return - reward) / config.discount, gain),
    )


def _reroot_one(
    world: World, config: SearchConfig, params: Params, old: Search, action: Array
) -> tuple[Search, Array]:
    """One tree (no batch axis) and the number of its nodes."""
    tree = old.tree
    size = old.depth.size
    edge = jnp.maximum(action, 0)
    child = tree.children_index[0, edge]
    stays, new = action < 0, (action >= 0) & (child < 0)
    start = jax.tree.map(lambda x: x[0], tree.embeddings)
    leaf, end, prior = make_leaf(world, config, params, start, edge)
    keep = _below(tree.parents, jnp.where(stays, 0, child), config.max_depth) & ~new
    count = jnp.maximum(jnp.sum(keep, dtype=jnp.int32), 1)
    order = jnp.argsort(~keep, stable=True)
    number = jnp.where(keep, jnp.cumsum(keep, dtype=jnp.int32) - 1, -1)  # of each old node
    here = jnp.arange(size, dtype=jnp.int32)

    def move(array: Array, fill: Any = 0, root: Any = None) -> Array:
        rows = here.reshape(-1, *[1] * (array.ndim - 1)) < jnp.where(new, 0, count)
        moved = jnp.where(rows, array[order], jnp.asarray(fill, array.dtype))
        return moved if root is None else moved.at[0].set(jnp.where(new, root, moved[0]))

    def renumber(array: Array) -> Array:
        return jnp.where(array >= 0, number[jnp.maximum(array, 0)], -1).astype(jnp.int32)

    logits = move(tree.children_prior_logits, -jnp.inf, prior)
    moved = tree.replace(
        node_visits=move(tree.node_visits),
        raw_values=move(tree.raw_values),
        node_values=move(tree.node_values),
        parents=renumber(move(tree.parents, -1)).at[0].set(-1),
        action_from_parent=move(tree.action_from_parent, -1).at[0].set(-1),
        children_index=renumber(move(tree.children_index, -1)),
        children_prior_logits=logits,
        children_visits=move(tree.children_visits),
        children_rewards=move(tree.children_rewards),
        children_discounts=move(tree.children_discounts, config.discount),
        children_values=move(tree.children_values),
        embeddings=jax.tree.map(lambda x, y: move(x, 0, y), tree.embeddings, leaf.embedding),
        root_invalid_actions=logits[0] == -jnp.inf,
    )
    reward = leaf.reward
    after = dataclasses.replace(
        old,
        tree=moved,
        end=move(old.end, 0, end),
        depth=jnp.where(here < count, move(old.depth, 0, 1) - 1, _NOWHERE),
        prints=move(old.prints, 0, fingerprint(leaf.embedding)),
        used=jnp.zeros((), jnp.int32),
        low=(old.low - reward) / config.discount,
        high=(old.high - reward) / config.discount,
        keys=jax.random.fold_in(old.keys, size),
    )
    after = dataclasses.replace(after, open=_reopen(config, after, logits > -jnp.inf, count))
    after = _best(config, old, after, action, reward)
    old = dataclasses.replace(old, used=after.used)
    return jax.tree.map(lambda a, b: jnp.where(stays, a, b), old, after), count


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _reroot(
    world: World, config: SearchConfig, params: Params, search: Search, actions: Array
) -> Search:
    each = jnp.zeros(actions.shape, jnp.int32)  # in place of the counters that all trees share
    trees = dataclasses.replace(search, simulation=each, turn=each)
    out, count = jax.vmap(functools.partial(_reroot_one, world, config))(params, trees, actions)
    zero = jnp.zeros((), jnp.int32)
    return dataclasses.replace(out, simulation=jnp.max(count) - 1, turn=zero)


def reroot(
    world: World, config: SearchConfig, params: Params, search: Search, actions: Array
) -> Search:
    """Takes a step in every tree: the chosen child becomes the root, its statistics are kept.

    The trees need room for the largest of the subtrees only, so the others leave gaps, which stay
    empty. The range of returns is shifted by the reward of the step; the counts of simulations
    begin anew.

    Args:
        world, config, params: as searched.
        search: trees; consumed.
        actions: int32[B]. A legal action, or -1: the tree stays as it is.

    Raises:
        EgjaxError: an action that is not legal.
    """
    actions = jnp.asarray(actions, jnp.int32)
    asked = np.asarray(actions)
    legal = np.asarray(search.tree.children_prior_logits[:, 0]) > -np.inf
    wrong = np.flatnonzero((asked >= 0) & ~legal[np.arange(asked.size), np.maximum(asked, 0)])
    if wrong.size:
        row = int(wrong[0])
        raise EgjaxError(f"action {asked[row]} is not legal in tree {row}", where="reroot")
    shape = dataclasses.replace(config, chunk=1, until_solved=False, seconds=0.0)
    return _reroot(world, shape, params, search, actions)


def choose(search: Search) -> np.ndarray:
    """The step that a search advises, int32[B]; -1 where it has tried none.

    The next one of the shortest solution where there is one, else the most visited of the actions
    below which something is left to try (Gumbel's sequential halving leaves its choice among the
    most visited; of equals the one of higher value), else the next one of the best trajectory.
    """
    tree = search.tree
    best, length = np.asarray(search.best[:, 0]), np.asarray(search.best_length)
    visits = np.where(search.open[:, 0], tree.children_visits[:, 0], 0)
    gain = tree.children_rewards[:, 0] + tree.children_discounts[:, 0] * tree.children_values[:, 0]
    ranked = np.where(visits == visits.max(1, keepdims=True), np.asarray(gain), -np.inf)
    advised = np.where(visits.max(1) > 0, ranked.argmax(1), np.where(length > 0, best, -1))
    known = np.asarray(search.solved) & (length > 0)
    advised = np.where(known, best, advised)
    done = np.asarray(search.end[:, 0]) > 0
    return np.where(done, -1, advised).astype(np.int32)


class Played(NamedTuple):
    """A game of moves; arrays of T moves and B tasks on the host.

    Attributes:
        solved: bool[B]. The last state has all goals.
        actions: int32[T, B]. Moves, -1 where none was made.
        visits: int32[T, B, A]. Visits of the root's actions before each move.
        values: float32[T, B]. Mean return from the root on, by then.
        simulations: int32[T]. New simulations before each move.
        search: the trees after the last move.
    """

    solved: np.ndarray
    actions: np.ndarray
    visits: np.ndarray
    values: np.ndarray
    simulations: np.ndarray
    search: Search


def plan(
    world: World,
    config: SearchConfig,
    params: Params,
    embedding: Embedding,
    keys: Array,
    *,
    moves: int,
    simulations: int,
    progress: Callable[[int, np.ndarray], None] | None = None,
    mesh: Mesh | None = None,
) -> Played:
    """Plays a batch of tasks move by move, and keeps what each move has learnt for the next.

    Args:
        world, params, embedding, keys, mesh: as in `egjax.search.mcts.search`.
        config: of each search; `config.simulations` is the size of the trees.
        moves: at most.
        simulations: new simulations before a move, at most; as many whole chunks of them as the
            fullest tree has room for.
        progress: called after each move with its number and solved bool[B].

    Raises:
        EgjaxError: as of `egjax.search.mcts.search`; or not even a chunk would be searched.
    """
    if min(simulations, config.simulations) < config.chunk:
        raise EgjaxError(
            f"{simulations} simulations a move in trees of {config.simulations} are less than a "
            f"chunk of {config.chunk}",
            where="SearchConfig",
            remedy="raise simulations or lower chunk",
        )
    state = plant(world, config, params, embedding, keys, mesh)
    rows = []
    for move in range(moves):
        ended = np.asarray(state.end[:, 0]) == 2
        quiet = ended | (np.asarray(state.solved) & config.until_solved)
        quiet |= ~np.asarray(state.open[:, 0]).any(1)
        room = config.simulations - int(state.simulation)
        budget = min(simulations, room) // config.chunk * config.chunk
        before = int(state.turn)
        if budget and not quiet.all():
            state = resume(world, config, params, state, budget, mesh=mesh).search
        actions = choose(state)
        if (actions < 0).all():
            break
        visits, values = np.asarray(state.tree.children_visits[:, 0]), state.tree.node_values[:, 0]
        rows.append((actions, visits, np.asarray(values), int(state.turn) - before))
        state = reroot(world, config, params, state, jnp.asarray(actions))
        if progress is not None:
            progress(move + 1, np.asarray(state.end[:, 0]) == 2)
    batch, size = state.open.shape[0], state.open.shape[2]
    solved = np.asarray(state.end[:, 0]) == 2
    empty = np.zeros((0, batch), np.int32), np.zeros((0, batch, size), np.int32)
    if not rows:
        none = np.zeros((0, batch), np.float32), np.zeros(0, np.int32)
        return Played(solved, *empty, *none, state)
    actions, visits, values, counts = zip(*rows, strict=True)
    return Played(
        solved, np.stack(actions), np.stack(visits), np.stack(values), np.array(counts), state
    )
