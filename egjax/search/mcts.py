"""UCT over a batch of trees: an own loop over `mctx.Tree`.

`mctx.search` has no hook for stopping below terminals, for several rollouts a leaf or for early
stopping, and its backup carries the whole tree through a vmapped loop. Here a batch of trees takes
one simulation after another: selection only reads the tree, the new node is written as one slice,
and the backup is one masked scatter along the path, so the cost of a simulation does not grow with
the tree.

A simulation: walk down by a rule of `egjax.search.rules`, add one node, play random rollouts from
it, back the mean of their returns up. The default rule is UCT (Kocsis and Szepesvári 2006; "Growing
Through Experience", arXiv 2506.01312, 3.1):

    argmax_a Q(s, a) / span + C · sqrt(ln N(s) / N(s, a)),   untried legal actions first,

where `span` is the difference between the highest and the lowest return that the tree has seen, so
that C means the same whatever the number of goals. A world's value function can take the place of
the rollouts, or a share of it. A leaf that is solved, dead, as deep as allowed or a repetition of a
node that the tree already has (same embedding, not deeper) is closed: it counts once and is never
selected again, nor is a node all of whose actions are closed.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, PartitionSpec

from egjax.errors import EgjaxError, check_range, require
from egjax.mesh import ONE_CORE, check_divides
from egjax.search.rules import RULES, Node, RuleName

mctx = require("mctx", "search")

__all__ = [
    "Leaf",
    "Outcome",
    "Record",
    "Search",
    "SearchConfig",
    "World",
    "advance",
    "begin",
    "fingerprint",
    "make_leaf",
    "mix",
    "pick",
    "plant",
    "resume",
    "search",
    "tree_bytes",
    "tree_to_dict",
    "uniform",
]

Array = jax.Array
Params = Any
Embedding = Any
Played = tuple[Array, Embedding, Array, Array, Array]
_CLOSED = -jnp.inf


def uniform(params: Params, embedding: Embedding, legal: Array) -> Array:
    """Rollout weights f32[A] of the plain random rollout: every legal action alike."""
    del params, embedding
    return legal.astype(jnp.float32)


def _as_given(params: Params) -> Params:
    return params


class World(NamedTuple):
    """What is searched, as functions for one item; the search batches them with `jax.vmap`.

    Attributes:
        legal: `(params, embedding) -> bool[A]`, the actions that may be taken.
        step: `(params, embedding, action int32[]) -> (embedding, reward f32[], solved bool[],
            dead bool[])`. Only called with legal actions as far as results are used.
        weights: `(params, embedding, legal bool[A]) -> f32[A]`, unnormalised probabilities of a
            rollout's next action; illegal actions must have 0.
        prior: `(params, embedding, legal bool[A]) -> f32[A]`, logits of PUCT's and Gumbel's prior;
            every legal action alike where absent.
        value: `(params, embedding) -> f32[]`, an estimate of the return from here on, for
            `SearchConfig.value_weight`. Not asked at solved and dead ends, where it is 0.
        prepare: `params -> params`. What the other functions are given instead, computed once for
            many steps; the identity where absent. They must take what was not prepared as well.
        play: `(params, embedding, draw f32[]) -> (action int32[], embedding, reward, solved,
            dead)`, a rollout's next action, chosen by the uniform number `draw`, and what comes
            of it; action -1 where none is legal. Made of `legal`, `weights` and `step` where
            absent, which a world may do faster in one.
    """

    legal: Callable[[Params, Embedding], Array]
    step: Callable[[Params, Embedding, Array], tuple[Embedding, Array, Array, Array]]
    weights: Callable[[Params, Embedding, Array], Array] = uniform
    prior: Callable[[Params, Embedding, Array], Array] | None = None
    value: Callable[[Params, Embedding], Array] | None = None
    prepare: Callable[[Params], Params] = _as_given
    play: Callable[[Params, Embedding, Array], Played] | None = None


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """How to search.

    Attributes:
        simulations: simulations a tree at most, each adding one node.
        rollouts: random rollouts from each new node; their mean return is backed up.
        rollout_steps: steps a rollout at most.
        max_depth: no node lies deeper than this many actions.
        rule: which action is tried next, see `egjax.search.rules`.
        exploration: C of UCT and PUCT.
        considered: root actions that Gumbel draws, at most.
        value_weight: share λ of the world's value function in a leaf's value, 1 - λ is the
            rollouts'; with 1 no rollout is played and `rollouts` and `rollout_steps` mean nothing.
        discount: of rewards a step.
        chunk: simulations between two looks at the clock and at what is solved.
        until_solved: leave as soon as every tree has a solution.
        seconds: leave after this wall time; 0 for no limit.
    """

    simulations: int = 256
    rollouts: int = 8
    rollout_steps: int = 24
    max_depth: int = 40
    rule: RuleName = "uct"
    exploration: float = 0.5
    considered: int = 16
    value_weight: float = 0.0
    discount: float = 1.0
    chunk: int = 16
    until_solved: bool = True
    seconds: float = 0.0

    @property
    def length(self) -> int:
        """Longest trajectory in actions."""
        return self.max_depth + self.rollout_steps * (self.value_weight < 1)

    @property
    def trajectories(self) -> int:
        """Trajectories that a simulation tries."""
        return self.rollouts if self.value_weight < 1 else 1


@struct.dataclass
class Record:
    """Every trajectory that was tried. Leading axes: [simulations, batch, rollouts].

    Attributes:
        actions: int16[..., L]. From the root through tree and rollout; -1 after the end.
        length: int32[...]. Number of actions; 0 where the tree was exhausted.
        solved_at: int32[...]. Number of actions after which all is solved, -1 for never.
        returns: float32[...]. Discounted sum of rewards from the root.
    """

    actions: Array
    length: Array
    solved_at: Array
    returns: Array


@struct.dataclass
class Search:
    """A batch of B trees in the making; `advance` consumes one and gives the next.

    Attributes:
        tree: `mctx.Tree` of S + 1 nodes; an illegal action has prior logit -inf.
        open: bool[B, S+1, A]. Legal actions below which something is left to try.
        end: int8[B, S+1]. 2 for a solved node, 1 for a dead one, else 0.
        depth: int32[B, S+1]. Actions from the root; huge for a node not in the tree.
        prints: uint32[B, S+1, 2]. Hash of each node's embedding.
        simulation: int32[]. Number of the last node: simulations done, if the root is the first.
        turn: int32[]. Simulations done since the root became the root.
        used: int32[B]. Of these, those before the tree was exhausted or first solved.
        low, high: float32[B]. Lowest and highest return seen.
        solved: bool[B]. A solution was found.
        best: int16[B, L]. Shortest solution, else the trajectory of the highest return.
        best_length: int32[B]. Its number of actions.
        best_return: float32[B]. Its return.
        keys: one random key a tree.
    """

    tree: Any
    open: Array
    end: Array
    depth: Array
    prints: Array
    simulation: Array
    turn: Array
    used: Array
    low: Array
    high: Array
    solved: Array
    best: Array
    best_length: Array
    best_return: Array
    keys: Array


class Outcome(NamedTuple):
    """What a search found, on the host.

    Attributes:
        solved: bool[B].
        actions: int16[B, L]. Shortest solution, else the trajectory of highest return; -1 padded.
        length: int32[B]. Its number of actions.
        returns: float32[B]. Its return.
        simulations: int32[B]. Simulations until the first solution, else all that were used.
        root_visits: int32[B, A].
        record: every trajectory tried, numpy arrays.
        search: the trees, on the device.
        seconds: wall time of the search, compilation included.
    """

    solved: np.ndarray
    actions: np.ndarray
    length: np.ndarray
    returns: np.ndarray
    simulations: np.ndarray
    root_visits: np.ndarray
    record: Record
    search: Search
    seconds: float


def fingerprint(embedding: Embedding) -> Array:
    """Two independent 32-bit hashes of all leaves; one item. Returns uint32[2]."""
    total = jnp.zeros((2,), jnp.uint32)
    for number, leaf in enumerate(jax.tree.leaves(embedding)):
        flat = jnp.ravel(leaf)
        if jnp.issubdtype(flat.dtype, jnp.floating):
            flat = jax.lax.bitcast_convert_type(flat.astype(jnp.float32), jnp.uint32)
        place = jnp.arange(flat.size, dtype=jnp.uint32) + jnp.uint32(number * 0x10000)
        for half, factor in enumerate((0x9E3779B1, 0x85EBCA77)):
            # A value must not be exchangeable between places: each has its own odd multiplier.
            word = (flat.astype(jnp.uint32) + 1) * (mix(place * jnp.uint32(factor)) | 1)
            total = total.at[half].add(jnp.sum(mix(word), dtype=jnp.uint32))
    return total


def mix(word: Array) -> Array:
    """Integer hash of uint32 words (Wellons' lowbias32)."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x7FEB352D)
    word = (word ^ (word >> 15)) * jnp.uint32(0x846CA68B)
    return word ^ (word >> 16)


def _logits(
    world: World, config: SearchConfig, params: Params, embedding: Embedding, legal: Array
) -> Array:
    """Prior logits f32[A] of one node, -inf for illegal actions. UCT has none: all are alike."""
    logits = jnp.zeros(legal.shape, jnp.float32)
    if world.prior is not None and config.rule != "uct":
        logits = world.prior(params, embedding, legal)
    return jnp.where(legal, logits, _CLOSED)


def begin(
    world: World, config: SearchConfig, params: Params, embedding: Embedding, keys: Array
) -> Search:
    """Plants the roots.

    Args:
        world: what is searched.
        config: sizes are taken from it.
        params: pytree of [B, ...]; the task of each tree.
        embedding: pytree of [B, ...]; the state that each tree starts from.
        keys: B random keys; a tree's search depends on its own alone.
    """
    legal = jax.vmap(world.legal)(params, embedding)
    logits = jax.vmap(functools.partial(_logits, world, config))(params, embedding, legal)
    batch, actions = legal.shape
    nodes = config.simulations + 1
    per_action = (batch, nodes, actions)

    def root_row(value: Array, fill: Any = 0) -> Array:
        empty = jnp.full((batch, nodes, *value.shape[1:]), fill, value.dtype)
        return empty.at[:, 0].set(value)

    tree = mctx.Tree(
        node_visits=jnp.zeros((batch, nodes), jnp.int32),
        raw_values=jnp.zeros((batch, nodes), jnp.float32),
        node_values=jnp.zeros((batch, nodes), jnp.float32),
        parents=jnp.full((batch, nodes), mctx.Tree.NO_PARENT, jnp.int32),
        action_from_parent=jnp.full((batch, nodes), mctx.Tree.NO_PARENT, jnp.int32),
        children_index=jnp.full(per_action, mctx.Tree.UNVISITED, jnp.int32),
        children_prior_logits=root_row(logits, _CLOSED),
        children_visits=jnp.zeros(per_action, jnp.int32),
        children_rewards=jnp.zeros(per_action, jnp.float32),
        children_discounts=jnp.full(per_action, config.discount, jnp.float32),
        children_values=jnp.zeros(per_action, jnp.float32),
        embeddings=jax.tree.map(root_row, embedding),
        root_invalid_actions=~legal,
        extra_data=None,
    )
    return Search(
        tree=tree,
        open=root_row(legal),
        end=jnp.zeros((batch, nodes), jnp.int8),
        depth=root_row(jnp.zeros((batch,), jnp.int32), jnp.iinfo(jnp.int32).max),
        prints=root_row(jax.vmap(fingerprint)(embedding)),
        simulation=jnp.zeros((), jnp.int32),
        turn=jnp.zeros((), jnp.int32),
        used=jnp.zeros((batch,), jnp.int32),
        low=jnp.full((batch,), jnp.inf, jnp.float32),
        high=jnp.full((batch,), -jnp.inf, jnp.float32),
        solved=jnp.zeros((batch,), bool),
        best=jnp.full((batch, config.length), -1, jnp.int16),
        best_length=jnp.zeros((batch,), jnp.int32),
        best_return=jnp.full((batch,), -jnp.inf, jnp.float32),
        keys=keys,
    )


class _Path(NamedTuple):
    """Way down of each tree, without the new node at its end. D = max_depth.

    Attributes:
        nodes, actions: int32[B, D+1]. -1 from the new node on.
        rewards: float32[B, D+1]. Of each action; 0 behind the end.
        edges: int32[B]. Number of actions, the new one included; 0 in an exhausted tree.
    """

    nodes: Array
    actions: Array
    rewards: Array
    edges: Array


def _select(config: SearchConfig, state: Search, keys: Array) -> _Path:
    """By the rule from the root to the first edge without child. `keys`: one a tree, for ties."""
    tree, rows = state.tree, jnp.arange(state.used.size, dtype=jnp.int32)
    salt = jax.vmap(lambda key: jax.random.bits(key, (), jnp.uint32))(keys)
    order = mix(jnp.arange(tree.num_actions, dtype=jnp.uint32)[None] ^ salt[:, None])
    order = (order >> 8).astype(jnp.float32)  # 24 bits, exact in float32
    noise = jnp.zeros(order.shape, jnp.float32)
    if config.rule == "gumbel":  # of the root, so from the key of the whole search
        noise = jax.vmap(lambda key: jax.random.gumbel(key, noise.shape[1:], noise.dtype))(
            state.keys
        )
    span = jnp.maximum(state.high - state.low, 1e-6)
    rule = jax.vmap(functools.partial(RULES[config.rule], config))

    def down(carry):
        level, node, walking, path = carry
        seen = Node(
            visits=tree.children_visits[rows, node],
            q=tree.qvalues(node),
            open=state.open[rows, node],
            logits=tree.children_prior_logits[rows, node],
            parent=tree.node_visits[rows, node],
            value=tree.node_values[rows, node],
            raw=tree.raw_values[rows, node],
            span=span,
            order=order,
            noise=noise,
            root=jnp.broadcast_to(level == 0, rows.shape),
        )
        score = jnp.where(seen.open, rule(seen), _CLOSED)
        action = jnp.argmax(score, axis=-1).astype(jnp.int32)
        walking &= jnp.any(seen.open, axis=-1)
        child = tree.children_index[rows, node, action]
        path = _Path(
            nodes=path.nodes.at[:, level].set(jnp.where(walking, node, -1)),
            actions=path.actions.at[:, level].set(jnp.where(walking, action, -1)),
            rewards=path.rewards.at[:, level].set(
                jnp.where(walking, tree.children_rewards[rows, node, action], 0.0)
            ),
            edges=path.edges + walking.astype(jnp.int32),
        )
        walking &= child != mctx.Tree.UNVISITED
        return level + 1, jnp.where(walking, child, node), walking, path

    shape = (rows.size, config.max_depth + 1)
    none = jnp.full(shape, -1, jnp.int32)
    path = _Path(none, none, jnp.zeros(shape, jnp.float32), jnp.zeros(rows.size, jnp.int32))
    start = (jnp.zeros((), jnp.int32), jnp.zeros_like(rows), jnp.ones(rows.size, bool), path)
    return jax.lax.while_loop(lambda carry: jnp.any(carry[2]), down, start)[3]


def _faded(config: SearchConfig, steps: Array) -> Array:
    """float32: the discount of a reward so many steps ahead."""
    return jax.lax.pow(jnp.full(steps.shape, config.discount, jnp.float32), steps)


def pick(weights: Array, draw: Array) -> Array:
    """Index int32[] drawn in proportion to weights f32[A] by a uniform number in [0, 1)."""
    upto = jnp.cumsum(weights)
    return jnp.argmax(upto > draw * upto[-1]).astype(jnp.int32)


class Leaf(NamedTuple):
    """What a new node is; of one item or [B, ...].

    Attributes:
        embedding: its state.
        legal: bool[A].
        reward: of the step to it.
        ended: it is solved or dead, or nothing is legal.
        solved: it is solved.
    """

    embedding: Embedding
    legal: Array
    reward: Array
    ended: Array
    solved: Array


def _grow(world: World, params: Params, embedding: Embedding, action: Array) -> Leaf:
    """The node that an action leads to; one item."""
    embedding, reward, solved, dead = world.step(params, embedding, action)
    legal = world.legal(params, embedding)
    return Leaf(embedding, legal, reward, solved | dead | ~jnp.any(legal), solved)


def _play(world: World, params: Params, embedding: Embedding, draw: Array) -> Played:
    if world.play is not None:
        return world.play(params, embedding, draw)
    legal = world.legal(params, embedding)
    action = pick(world.weights(params, embedding, legal), draw)
    return jnp.where(jnp.any(legal), action, -1), *world.step(params, embedding, action)


def _rollouts(
    world: World, config: SearchConfig, params: Params, leaves: Leaf, keys: Array
) -> tuple[Array, Array, Array, Array]:
    """Plays R random rollouts from each of B leaves.

    The loop is around the batched step: of a batched loop JAX would trace the body several times,
    until it knows what varies.

    Args:
        world, config: what is searched, and how.
        params: of B trees.
        leaves: of B trees.
        keys: [B, R].

    Returns:
        Their actions int16[B, R, T], their numbers, whether the leaf or the rollout solved the
        task, and the rollouts' returns from the leaf on.
    """
    play = jax.vmap(jax.vmap(functools.partial(_play, world), (None, 0, 0)))

    def step(carry, x):
        embedding, done, steps, total, ever = carry
        time, draw = x
        action, embedding, reward, solved, dead = play(params, embedding, draw)
        # What happens after the end is computed and ignored: cheaper than choosing between states.
        done |= action < 0
        total += jnp.where(done, 0.0, _faded(config, time) * reward)
        taken = jnp.where(done, -1, action).astype(jnp.int16)
        ever |= solved & ~done
        return (
            embedding,
            done | solved | dead,
            steps + (~done).astype(jnp.int32),
            total,
            ever,
        ), taken

    def each(x: Array) -> Array:
        return jnp.repeat(x[:, None], keys.shape[1], axis=1)

    embedding, ended, solved = jax.tree.map(each, (leaves.embedding, leaves.ended, leaves.solved))
    none = jnp.zeros(keys.shape[:2], jnp.int32)
    start = embedding, ended, none, none.astype(jnp.float32), solved
    times = jnp.arange(config.rollout_steps, dtype=jnp.float32)
    draw = functools.partial(jax.random.uniform, shape=times.shape, dtype=jnp.float32)
    draws = jnp.moveaxis(jax.vmap(jax.vmap(draw))(keys), 2, 0)
    (_, _, steps, total, ever), actions = jax.lax.scan(step, start, (times, draws))
    return jnp.moveaxis(actions, 0, 2), steps, ever, total


def make_leaf(
    world: World, config: SearchConfig, params: Params, embedding: Embedding, action: Array
) -> tuple[Leaf, Array, Array]:
    """What one action leads to: the node, its end as in `Search`, its prior logits; one item."""
    params = world.prepare(params)
    leaf = _grow(world, params, embedding, action)
    logits = _logits(world, config, params, leaf.embedding, leaf.legal)
    return leaf, jnp.where(leaf.solved, 2, leaf.ended.astype(jnp.int32)).astype(jnp.int8), logits


def _expand(
    config: SearchConfig, state: Search, path: _Path, leaf: Leaf, logits: Array
) -> tuple[Search, _Path, Array]:
    """Writes node `simulation + 1` of every tree; an exhausted tree gets an unlinked one.

    Args:
        config, state, path, leaf: of B trees.
        logits: float32[B, A]. Prior of the new nodes.

    Returns:
        The trees, the path with the reward of its last edge, and bool[B], whether that edge is
        never to be selected again.
    """
    tree, rows = state.tree, jnp.arange(path.edges.size, dtype=jnp.int32)
    new = state.simulation + 1
    live = path.edges > 0
    parent, action = _last_edge(path)
    prints = jax.vmap(fingerprint)(leaf.embedding)
    seen = jnp.all(state.prints == prints[:, None], axis=-1)
    repeated = jnp.any(seen & (state.depth <= path.edges[:, None]), axis=-1)
    closed = live & (leaf.ended | repeated | (path.edges >= config.max_depth))
    end = jnp.where(leaf.solved, 2, leaf.ended.astype(jnp.int32))

    def put(array: Array, value: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(array, value.astype(array.dtype), new, 1)

    edge = (jnp.where(live, rows, rows.size), parent, action)  # out of range: dropped
    tree = tree.replace(
        parents=put(tree.parents, jnp.where(live, parent, mctx.Tree.NO_PARENT)),
        action_from_parent=put(
            tree.action_from_parent, jnp.where(live, action, mctx.Tree.NO_PARENT)
        ),
        children_index=tree.children_index.at[edge].set(new, mode="drop"),
        children_rewards=tree.children_rewards.at[edge].set(leaf.reward, mode="drop"),
        children_prior_logits=put(tree.children_prior_logits, logits),
        embeddings=jax.tree.map(put, tree.embeddings, leaf.embedding),
    )
    state = dataclasses.replace(
        state,
        tree=tree,
        open=put(state.open, leaf.legal & (live & ~closed)[:, None]),
        end=put(state.end, jnp.where(live, end, 0)),
        depth=put(state.depth, jnp.where(live, path.edges, jnp.iinfo(jnp.int32).max)),
        prints=put(state.prints, prints),
    )
    last = jnp.maximum(path.edges - 1, 0)
    rewards = path.rewards.at[rows, last].set(jnp.where(live, leaf.reward, 0.0))
    return state, path._replace(rewards=rewards), closed


def _last_edge(path: _Path) -> tuple[Array, Array]:
    """Node and action, int32[B], of the edge to the new node; 0 in an exhausted tree."""
    rows, last = jnp.arange(path.edges.size, dtype=jnp.int32), jnp.maximum(path.edges - 1, 0)
    return jnp.maximum(path.nodes[rows, last], 0), jnp.maximum(path.actions[rows, last], 0)


def _close(open_: Array, path: _Path, closed: Array) -> Array:
    """Closes the last edge of the path and every edge above it that leads to closed edges only."""
    rows = jnp.arange(closed.size, dtype=jnp.int32)

    def up(carry):
        level, closing, open_ = carry
        at = jnp.maximum(level, 0)
        node = jnp.maximum(path.nodes[rows, at], 0)
        action = jnp.maximum(path.actions[rows, at], 0)
        open_ = open_.at[jnp.where(closing, rows, rows.size), node, action].set(False, mode="drop")
        closing &= ~jnp.any(open_[rows, node], axis=-1) & (level > 0)
        return level - 1, closing, open_

    start = (path.edges - 1, closed, open_)
    return jax.lax.while_loop(lambda carry: jnp.any(carry[1]), up, start)[2]


def _backup(config: SearchConfig, state: Search, path: _Path, live: Array, value: Array) -> Any:
    """Mean backup along the whole path, one scatter a field. Returns the tree."""
    tree, rows = state.tree, jnp.arange(value.size, dtype=jnp.int32)[:, None]
    level = jnp.arange(config.max_depth + 1, dtype=jnp.int32)
    new = state.simulation + 1
    at_leaf = level[None] == path.edges[:, None]
    nodes = jnp.where(at_leaf, new, path.nodes)
    # Out of range, hence dropped: behind the leaf, and all of an exhausted tree.
    nodes = jnp.where((nodes >= 0) & live[:, None], nodes, tree.node_visits.shape[1])
    lag = level[None, :] - level[:, None]
    powers = jnp.where(lag >= 0, _faded(config, jnp.maximum(lag, 0)), 0.0)
    left = jnp.maximum(path.edges[:, None] - level[None], 0)
    to_go = path.rewards @ powers.T + _faded(config, left) * value[:, None]
    old = tree.node_values.at[rows, nodes].get(mode="fill", fill_value=0.0)
    count = tree.node_visits.at[rows, nodes].get(mode="fill", fill_value=0)
    mean = old + (to_go - old) / (count + 1).astype(jnp.float32)
    edge = (rows, jnp.where(at_leaf, tree.node_visits.shape[1], nodes)[:, :-1])
    edge = (*edge, jnp.maximum(path.actions[:, :-1], 0))
    return tree.replace(
        raw_values=tree.raw_values.at[:, new].set(value),
        node_values=tree.node_values.at[rows, nodes].set(mean, mode="drop"),
        node_visits=tree.node_visits.at[rows, nodes].add(1, mode="drop"),
        children_visits=tree.children_visits.at[edge].add(1, mode="drop"),
        children_values=tree.children_values.at[edge].set(mean[:, 1:], mode="drop"),
    )


def _explore(
    world: World,
    config: SearchConfig,
    params: Params,
    before: Embedding,
    actions: Array,
    keys: Array,
) -> tuple[Leaf, tuple[Array, Array, Array, Array], Array, Array]:
    """Makes the leaves of B trees, and plays rollouts from them.

    Returns:
        The leaves; what `_rollouts` gives; the leaves' prior logits and their values by the world's
        own function (0 where that is not asked for).
    """
    leaves = jax.vmap(functools.partial(_grow, world))(params, before, actions)
    if config.value_weight < 1:
        split = functools.partial(_rollout_keys, count=config.rollouts)
        played = _rollouts(world, config, params, leaves, jax.vmap(split)(keys))
    else:
        none = jnp.zeros((actions.size, 1), jnp.int32)
        nothing = jnp.zeros((actions.size, 1, 0), jnp.int16)
        played = nothing, none, leaves.solved[:, None], none.astype(jnp.float32)
    value = jnp.zeros(actions.shape, jnp.float32)
    if config.value_weight > 0 and world.value is not None:
        own = jax.vmap(world.value)(params, leaves.embedding)
        value = jnp.where(leaves.ended, 0.0, own)
    logits = jax.vmap(functools.partial(_logits, world, config))
    return leaves, played, logits(params, leaves.embedding, leaves.legal), value


def _rollout_keys(key: Array, count: int) -> Array:
    return jax.random.split(jax.random.fold_in(key, 1), count)


def _trajectories(
    config: SearchConfig, path: _Path, played: Array, steps: Array, ever: Array, total: Array
) -> Record:
    """The trajectories of one simulation: the path, then each rollout."""
    live = path.edges > 0
    level = jnp.arange(config.max_depth + 1, dtype=jnp.int32)
    so_far = jnp.sum(path.rewards * _faded(config, level), axis=1)
    returns = so_far[:, None] + _faded(config, path.edges[:, None]) * total
    returns = jnp.where(live[:, None], returns, 0.0)
    length = jnp.where(live[:, None], path.edges[:, None] + steps, 0)
    solved = ever & live[:, None]
    # The rollout's actions follow the path's, wherever that ends.
    place = jnp.arange(config.length, dtype=jnp.int32)
    ahead = path.actions[:, jnp.minimum(place, config.max_depth)].astype(jnp.int16)
    if played.shape[2]:
        behind = jnp.clip(place[None] - path.edges[:, None], 0, played.shape[2] - 1)
        behind = jnp.broadcast_to(behind[:, None], (*played.shape[:2], config.length))
        behind = jnp.take_along_axis(played, behind, axis=2)
    else:
        behind = jnp.int16(-1)
    actions = jnp.where(place < path.edges[:, None, None], ahead[:, None], behind)
    actions = jnp.where(place < length[..., None], actions, -1)
    return Record(actions, length, jnp.where(solved, length, -1), returns)


def _simulate(
    world: World, config: SearchConfig, params: Params, state: Search
) -> tuple[Search, Record]:
    """One simulation of every tree."""
    rows = jnp.arange(state.used.size, dtype=jnp.int32)
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.turn)
    path = _select(config, state, keys)
    live = path.edges > 0
    parent, action = _last_edge(path)
    before = jax.tree.map(lambda x: x[rows, parent], state.tree.embeddings)
    leaf, played, logits, own = _explore(world, config, params, before, action, keys)
    state, path, closed = _expand(config, state, path, leaf, logits)
    record, total = _trajectories(config, path, *played), played[3]
    value, returns = jnp.mean(total, axis=1), record.returns
    if config.value_weight > 0:
        share = config.value_weight
        far = _faded(config, path.edges[:, None])
        returns += jnp.where(live[:, None], far * share * (own[:, None] - total), 0.0)
        value += share * (own - value)
    tree = _backup(config, state, path, live, value)
    state = dataclasses.replace(
        state,
        tree=tree,
        open=_close(state.open, path, closed),
        simulation=state.simulation + 1,
        turn=state.turn + 1,
        used=state.used + (live & ~state.solved).astype(jnp.int32),
        low=jnp.where(live, jnp.minimum(state.low, returns.min(1)), state.low),
        high=jnp.where(live, jnp.maximum(state.high, returns.max(1)), state.high),
    )
    return _keep_best(state, record), record


def _keep_best(state: Search, record: Record) -> Search:
    """A shorter solution beats a longer one, any solution beats none, else the higher return."""
    rows = jnp.arange(state.used.size, dtype=jnp.int32)
    solved = record.solved_at >= 0
    tried = record.length > 0
    # Lengths are below 1e6 and returns far below it, so one number orders all three cases.
    score = jnp.where(solved, 2e6 - record.length.astype(jnp.float32), record.returns)
    score = jnp.where(tried, score, -jnp.inf)
    which = jnp.argmax(score, axis=1)
    kept = jnp.where(state.solved, 2e6 - state.best_length.astype(jnp.float32), state.best_return)
    better = score[rows, which] > kept
    return dataclasses.replace(
        state,
        solved=state.solved | jnp.any(solved, axis=1),
        best=jnp.where(better[:, None], record.actions[rows, which], state.best),
        best_length=jnp.where(better, record.length[rows, which], state.best_length),
        best_return=jnp.where(better, record.returns[rows, which], state.best_return),
    )


def _sharded(mesh: Mesh | None, work: Callable[..., Any], *, batch: tuple[Any, ...], out: Any):
    """`work` on each device's share of the trees; as it is without a mesh. Trees never meet."""
    if mesh is None:
        return work
    return jax.shard_map(work, mesh=mesh, in_specs=batch, out_specs=out, check_vma=False)


_TREES, _WHOLE = PartitionSpec("data"), PartitionSpec()


def _places() -> Search:
    """How each field of a `Search` is split over a mesh."""
    names = {field.name: _TREES for field in dataclasses.fields(Search)}
    return Search(**{**names, "simulation": _WHOLE, "turn": _WHOLE})  # type: ignore[arg-type]


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
def _plant(
    world: World,
    config: SearchConfig,
    params: Params,
    embedding: Embedding,
    keys: Array,
    mesh: Mesh | None,
) -> Search:
    work = functools.partial(begin, world, config)
    batch = (_TREES, _TREES, _TREES)
    return _sharded(mesh, work, batch=batch, out=_places())(params, embedding, keys)


@functools.partial(
    jax.jit, static_argnums=(0, 1, 4, 5), donate_argnums=(3,), compiler_options=dict(ONE_CORE)
)
def advance(
    world: World,
    config: SearchConfig,
    params: Params,
    state: Search,
    simulations: int,
    mesh: Mesh | None = None,
) -> tuple[Search, Record]:
    """Takes all trees some simulations further. `state` is consumed.

    Args:
        world: what is searched.
        config: as given to `begin`.
        params: pytree of [B, ...].
        state: trees with room for `simulations` more nodes.
        simulations: how many.
        mesh: splits the trees over its axis `data`.

    Returns:
        The trees, and the record of the trajectories tried, [simulations, B, rollouts, ...].
    """

    def work(params: Params, state: Search) -> tuple[Search, Record]:
        params = jax.vmap(world.prepare)(params)

        def body(state: Search, _: None) -> tuple[Search, Record]:
            return _simulate(world, config, params, state)

        return jax.lax.scan(body, state, None, length=simulations)

    out = _places(), PartitionSpec(None, "data")
    return _sharded(mesh, work, batch=(_TREES, _places()), out=out)(params, state)


def _check(world: World, config: SearchConfig) -> None:
    for name in ("simulations", "rollouts", "rollout_steps", "max_depth", "chunk", "considered"):
        if getattr(config, name) < 1:
            raise EgjaxError(f"{name} must be at least 1", where="SearchConfig")
    if config.rule not in RULES:
        remedy = ", ".join(RULES)
        raise EgjaxError(f"no rule {config.rule!r}", where="SearchConfig", remedy=remedy)
    if not 0 <= config.value_weight <= 1:
        raise EgjaxError("value_weight must be in [0, 1]", where="SearchConfig")
    check_range(config.discount, "(0, 1]", where="SearchConfig.discount")
    if config.value_weight and world.value is None:
        raise EgjaxError("value_weight without a value function", where="World")


def _shape(config: SearchConfig) -> SearchConfig:
    """What only the host loop reads must not make the device code compile anew."""
    return dataclasses.replace(config, chunk=1, until_solved=False, seconds=0.0)


def plant(
    world: World,
    config: SearchConfig,
    params: Params,
    embedding: Embedding,
    keys: Array,
    mesh: Mesh | None = None,
) -> Search:
    """Roots of a batch of trees for `resume`; arguments and errors as in `search`."""
    _check(world, config)
    if mesh is not None:
        check_divides(mesh, len(keys))
    return _plant(world, _shape(config), params, embedding, keys, mesh)


def resume(
    world: World,
    config: SearchConfig,
    params: Params,
    state: Search,
    simulations: int,
    *,
    progress: Callable[[int, np.ndarray], None] | None = None,
    mesh: Mesh | None = None,
) -> Outcome:
    """Takes trees further until a limit of `config` or the number of simulations is reached.

    Args:
        world, config, params: as given to `plant`.
        state: consumed; needs room for `simulations` more nodes.
        simulations: at most so many, at least one.
        progress, mesh: as in `search`.

    Raises:
        EgjaxError: the trees have no room for so many nodes.
    """
    room = state.tree.node_visits.shape[1] - 1 - int(state.simulation)
    if not 1 <= simulations <= room:
        raise EgjaxError(f"{simulations} simulations for trees with room for {room}")
    started = time.perf_counter()
    shape = _shape(config)
    records, done = [], 0
    while done < simulations:
        count = min(config.chunk, simulations - done)
        state, record = advance(world, shape, params, state, count, mesh)
        records.append(jax.tree.map(np.asarray, record))
        done += count
        solved = np.asarray(state.solved)
        if progress is not None:
            progress(done, solved)
        exhausted = ~np.asarray(state.open[:, 0]).any(axis=1)
        late = config.seconds > 0 and time.perf_counter() - started > config.seconds
        if late or np.all(exhausted | (solved & config.until_solved)):
            break
    return Outcome(
        solved=np.asarray(state.solved),
        actions=np.asarray(state.best),
        length=np.asarray(state.best_length),
        returns=np.asarray(state.best_return),
        simulations=np.asarray(state.used),
        root_visits=np.asarray(state.tree.summary().visit_counts).astype(np.int32),
        record=jax.tree.map(lambda *parts: np.concatenate(parts), *records),
        search=state,
        seconds=time.perf_counter() - started,
    )


def search(
    world: World,
    config: SearchConfig,
    params: Params,
    embedding: Embedding,
    keys: Array,
    progress: Callable[[int, np.ndarray], None] | None = None,
    mesh: Mesh | None = None,
) -> Outcome:
    """Searches a batch of tasks, each with a tree of its own. Runs on the host, in chunks.

    Args:
        world: what is searched; the same object for every call, so that nothing is traced twice.
        config: how.
        params: pytree of [B, ...]; the tasks.
        embedding: pytree of [B, ...]; where they start.
        keys: B random keys.
        progress: called after each chunk with the simulations done and solved bool[B].
        mesh: splits the tasks over its axis `data`; the answer is the same as on one device.

    Raises:
        EgjaxError: if `config` asks for less than one simulation, rollout or step, for an unknown
            rule or for a value function that the world lacks, or if the mesh does not divide B.
    """
    started = time.perf_counter()
    state = plant(world, config, params, embedding, keys, mesh)
    out = resume(world, config, params, state, config.simulations, progress=progress, mesh=mesh)
    return out._replace(seconds=time.perf_counter() - started)


def tree_bytes(config: SearchConfig, actions: int, embedding: Embedding) -> int:
    """Memory of one tree, known before the search runs.

    A node holds its embedding, 25 bytes an action (child, prior, visits, reward, discount and value
    of the edge, whether it is open) and 33 more; on top come the best trajectory and 60 bytes or so
    of sums. While the trees advance, a chunk's record of `2 · length + 12` bytes a trajectory is
    held as well, and the working memory of the rollouts.

    Args:
        config: how it is to be searched.
        actions: A, size of the padded action table.
        embedding: of one state, or anything with its shapes and dtypes.

    Returns:
        Bytes of the arrays of a `Search` per tree, the key of 8 bytes included, the two counters
        that all trees share left out.
    """
    own = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(embedding))
    node = own + 25 * actions + 33
    rest = 2 * config.length + actions + 29
    return (config.simulations + 1) * node + rest


def tree_to_dict(state: Search, index: int, labels: list[str] | None = None) -> dict[str, Any]:
    """One tree of the batch for JSON: a flat list of nodes, parents before children.

    Args:
        state: trees.
        index: which of the batch.
        labels: text of each action; their numbers are given without.

    Returns:
        `{"nodes": [{"id", "parent", "action", "depth", "visits", "value", "closed", "solved"}, …],
        "best": [action, …], "solved": bool}`. The root's parent and action are None, `closed`
        says that nothing below the node is left to try, a node is `solved` where all is done;
        `best` is the best trajectory, which may end in a rollout, and `solved` whether it is a
        solution.
    """
    tree = state.tree
    one = {
        "parent": tree.parents,
        "action": tree.action_from_parent,
        "depth": state.depth,
        "visits": tree.node_visits,
        "value": tree.node_values,
        "closed": ~jnp.any(state.open, axis=-1),
        "solved": state.end == 2,
    }
    columns = {name: np.asarray(array[index]).tolist() for name, array in one.items()}
    nodes = []
    for number in range(int(state.simulation) + 1):
        node = {"id": number, **{name: column[number] for name, column in columns.items()}}
        if number == 0:
            node["parent"] = node["action"] = None
        elif node["parent"] < 0:
            continue  # the tree was exhausted by then
        elif labels is not None:
            node["action"] = labels[node["action"]]
        nodes.append(node)
    best = np.asarray(state.best[index])[: int(state.best_length[index])].tolist()
    named = best if labels is None else [labels[action] for action in best]
    return {"nodes": nodes, "best": named, "solved": bool(state.solved[index])}
