"""From the trajectories of a search to labelled experience.

Positive: after the plan every goal predicate holds; pruned of steps that it can do without,
shortest first. Failed: an exploration after which they do not. Redundant: a plan that reaches the
goal with needless steps, found so by the search or made from the shortest one by inserting accepted
steps.
See "Growing Through Experience" (arXiv 2506.01312), section 3.1.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from egjax.errors import EgjaxError
from egjax.search.mcts import Embedding, Outcome, Params, Search, World

__all__ = [
    "Experience",
    "LabelConfig",
    "Pair",
    "Traced",
    "insert",
    "label",
    "pad",
    "pairs",
    "prune",
    "replays",
    "trace",
]

Array = jax.Array
Plan = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class LabelConfig:
    """How to label.

    Attributes:
        k: plans of each kind a task at most.
        margin: a success counts as redundant if it can do without some step, has at least so many
            steps more than the shortest, ...
        ratio: ... and at least so many times its steps.
        stretch: a failure is cut to so many times the steps of the shortest success; what is left
            is a failed exploration as well, and with 1 its length does not tell it from a success.
        variants: attempts at inserting needless steps into the shortest success.
        each: plans made of the shortest success of each kind, see `egjax.search.variants`; 0 for
            none.
    """

    k: int = 4
    margin: int = 2
    ratio: float = 1.25
    stretch: float = 1.0
    variants: int = 16
    each: int = 1


class Experience(NamedTuple):
    """Labelled plans of one task, as indices into its action table. Without success, no plan but
    failures.

    Attributes:
        positives: pruned successes, shortest first.
        failed: explorations that do not reach the goal, highest return first.
        redundant: successes with needless steps, shortest first.
        explored: the explorations of `failed` before they were cut.
    """

    positives: list[Plan]
    failed: list[Plan]
    redundant: list[Plan]
    explored: list[Plan]


class Pair(NamedTuple):
    """A preference: the shortest success against a plan that is worse, and why it is.

    `kind` is "failed" or "redundant".
    """

    chosen: Plan
    rejected: Plan
    kind: str


@functools.partial(jax.jit, static_argnums=0)
def _replay_batch(
    world: World, params: Params, embedding: Embedding, plans: Array, steps: Array
) -> tuple[Array, Array, Array]:
    def one(params: Params, plan: Array, place: Array, embedding: Embedding, done: Array):
        index = jnp.maximum(plan[place], 0)
        taken = world.legal(params, embedding)[index] & (plan[place] >= 0) & ~done
        after, reward, solved, _ = world.step(params, embedding, index)
        embedding = jax.tree.map(lambda new, old: jnp.where(taken, new, old), after, embedding)
        return embedding, done | (taken & solved), taken, jnp.where(taken, reward, 0.0)

    # The loop is around the batched step: of a batched loop JAX would trace the body several times,
    # until it knows what varies.
    every = jax.vmap(jax.vmap(one, (None, 0, None, 0, 0)), (0, 0, None, 0, 0))

    def step(carry):
        place, embedding, done, accepted, rewards = carry
        embedding, done, taken, reward = every(params, plans, place, embedding, done)
        accepted, rewards = accepted.at[..., place].set(taken), rewards.at[..., place].set(reward)
        return place + 1, embedding, done, accepted, rewards

    count = plans.shape[1]
    start = (
        jnp.int32(0),
        jax.tree.map(lambda x: jnp.repeat(x[:, None], count, 1), embedding),
        jnp.zeros(plans.shape[:2], bool),
        jnp.zeros(plans.shape, bool),
        jnp.zeros(plans.shape, jnp.float32),
    )
    end = jax.lax.while_loop(lambda carry: carry[0] < steps, step, start)
    return end[3], end[2], end[4]


def replays(
    world: World, params: Params, embedding: Embedding, plans: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Plays plans, skipping what is not legal and all that comes after the goal.

    They go through in rounds of four, padded to a multiple of 64 steps: with few shapes, labelling
    compiles the world once.

    Args:
        world: the rules.
        params, embedding: pytrees of [B, ...], the tasks and where they start.
        plans: int32[B, P, L]. P plans a task; -1 is skipped.

    Returns:
        accepted bool[B, P, L], solved bool[B, P], and the reward f32[B, P, L] of accepted steps.
    """
    batch, count, length = plans.shape
    padded = np.full((batch, -(-count // 4) * 4, -(-length // 64) * 64), -1, np.int32)
    padded[:, :count, :length] = plans
    used = (padded >= 0).any((0, 1))
    steps = jnp.int32(np.flatnonzero(used)[-1] + 1 if used.any() else 0)
    rounds = [
        _replay_batch(world, params, embedding, jnp.asarray(padded[:, start : start + 4]), steps)
        for start in range(0, padded.shape[1], 4)
    ]
    accepted, solved, rewards = (
        np.concatenate(parts, axis=1)[:, :count] for parts in zip(*rounds, strict=True)
    )
    return accepted[..., :length], solved, rewards[..., :length]


def prune(world: World, params: Params, embedding: Embedding, plans: np.ndarray) -> np.ndarray:
    """Removes steps that plans can do without, one after the other, from the last to the first.

    A step goes if the rest still reaches the goal; steps that are not legal any more go with it.
    Repeated until nothing changes: then every step left is needed.

    Args:
        world: the rules.
        params, embedding: pytrees of [B, ...].
        plans: int32[B, P, L]. P plans a task, -1 for no step.

    Returns:
        int32[B, P, L], gaps of -1 where a step was removed; a plan that does not reach the goal
        comes back as it was.
    """
    plans, before = np.array(plans), None
    while before is None or (plans != before).any():
        before = plans.copy()
        for place in reversed(range(plans.shape[-1])):
            if (plans[:, :, place] < 0).all():
                continue
            rest = plans.copy()
            rest[:, :, place] = -1
            accepted, solved, _ = replays(world, params, embedding, rest)
            plans = np.where(solved[..., None], np.where(accepted, rest, -1), plans)
    return plans


def insert(
    world: World,
    params: Params,
    embedding: Embedding,
    plans: np.ndarray,
    lots: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Puts needless steps into plans: of the actions offered before each step, the legal ones.

    Args:
        world: the rules.
        params, embedding: pytrees of [B, ...].
        plans: int32[B, L]. One plan a task, -1 for no step.
        lots: int32[B, V, L]. Action offered before each step in each of V variants, -1 for none.

    Returns:
        int32[B, V, 2L] the longer plans with gaps of -1, and bool[B, V], whether every step of the
        old plan was still legal, the goal was reached by the last of them and no sooner, and some
        step was inserted.
    """
    old = np.broadcast_to(plans[:, None], lots.shape)
    offered = np.where(old >= 0, lots, -1)
    both = np.stack([offered, old], axis=-1).reshape(*lots.shape[:2], -1)
    accepted, solved, _ = replays(world, params, embedding, both)
    kept = accepted.reshape(*lots.shape, 2)
    whole = (kept[..., 1] == (old >= 0)).all(-1)
    return np.where(accepted, both, -1), whole & solved & kept[..., 0].any(-1)


def _plan(row: np.ndarray) -> Plan:
    """Steps of a padded row, gaps left out."""
    return tuple(int(action) for action in row if action >= 0)


def _distinct(rows: np.ndarray, order: np.ndarray, limit: int) -> list[Plan]:
    """The first different plans in an order of rows."""
    found: dict[Plan, None] = {}
    for place in order:
        if len(found) == limit:
            break
        found[_plan(rows[place])] = None
    return list(found)


def pad(plans: Sequence[Sequence[Plan]]) -> np.ndarray:
    """int32[B, P, L] of P plans a task, at least one of one step; -1 where there is none."""
    width = max((len(row) for row in plans), default=0)
    length = max((len(plan) for row in plans for plan in row), default=0)
    padded = np.full((len(plans), max(width, 1), max(length, 1)), -1, np.int32)
    for b, row in enumerate(plans):
        for p, plan in enumerate(row):
            padded[b, p, : len(plan)] = plan
    return padded


def label(
    world: World,
    config: LabelConfig,
    params: Params,
    embedding: Embedding,
    outcome: Outcome,
    key: Array,
) -> list[Experience]:
    """Labels what a search has tried.

    Args:
        world: as searched.
        config: how.
        params, embedding: pytrees of [B, ...], as searched.
        outcome: what `egjax.search.mcts.search` returned.
        key: random key for inserted steps.

    Returns:
        One `Experience` a task.

    Raises:
        EgjaxError: if `config` asks for less than one plan or variant.
    """
    if config.k < 1 or config.variants < 1:
        raise EgjaxError("k and variants must be at least 1", where="LabelConfig")
    record, batch = outcome.record, len(outcome.solved)

    def per_task(array: Any) -> np.ndarray:
        array = np.asarray(array)
        return np.moveaxis(array, 1, 0).reshape(batch, -1, *array.shape[3:])

    actions, solved_at = per_task(record.actions), per_task(record.solved_at)
    length, returns = per_task(record.length), per_task(record.returns)
    by_length = np.argsort(np.where(solved_at >= 0, solved_at, 1 << 30), axis=1, kind="stable")
    wins = (solved_at >= 0).sum(1)
    raw = [_distinct(actions[b], by_length[b, : wins[b]], config.k) for b in range(batch)]
    pruned = prune(world, params, embedding, pad(raw))
    positives = [
        sorted({_plan(row) for row in pruned[b, : len(raw[b])]}, key=lambda plan: (len(plan), plan))
        for b in range(batch)
    ]

    shortest = [plans[0] if plans else () for plans in positives]
    steps = np.array([len(plan) for plan in shortest])
    whole = pad([[plan] for plan in shortest])[:, 0]
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    lots = (batch, config.variants, whole.shape[1])
    # Half of what is offered is legal, or so.
    chance = 2 * config.margin / np.maximum(steps, 1)
    offered = np.where(
        rng.random(lots) < chance[:, None, None],
        rng.integers(outcome.root_visits.shape[1], size=lots),
        -1,
    )
    longer, fits = insert(world, params, embedding, whole, offered)
    # A long way to the goal may need every step: another object, the other hand.
    least = np.maximum(steps + config.margin, np.ceil(steps * config.ratio))
    long = [by_length[b, : wins[b]] for b in range(batch)]
    long = [won[solved_at[b, won] >= least[b]] for b, won in enumerate(long)]
    candidates = [_distinct(actions[b], won, config.k) for b, won in enumerate(long)]
    shortened = prune(world, params, embedding, pad(candidates))

    labelled = []
    for b in range(batch):
        redundant = [
            plan for plan, row in zip(candidates[b], shortened[b]) if len(_plan(row)) < len(plan)
        ]
        if steps[b]:
            made = _distinct(longer[b], np.flatnonzero(fits[b]), config.k)
            redundant = list(dict.fromkeys(redundant + sorted(made, key=len)))[: config.k]
        lost = np.flatnonzero((solved_at[b] < 0) & (length[b] > 0))
        lost = lost[np.argsort(-returns[b, lost], kind="stable")]
        cut = int(np.ceil(steps[b] * config.stretch)) or actions.shape[-1]
        failed = _distinct(actions[b, :, :cut], lost, config.k)
        explored = _distinct(actions[b], lost, config.k)
        labelled.append(Experience(positives[b], failed, sorted(redundant, key=len), explored))
    return labelled


def pairs(experience: Experience) -> list[Pair]:
    """The shortest success of a task against each of its failed and redundant plans."""
    if not experience.positives:
        return []
    chosen = experience.positives[0]
    worse = [Pair(chosen, plan, "failed") for plan in experience.failed]
    return worse + [Pair(chosen, plan, "redundant") for plan in experience.redundant]


class Traced(NamedTuple):
    """What is known of each step of one plan, tuples of its length.

    Attributes:
        rewards: of the step; 0 of one that is not legal, and of all that come after it.
        values: mean return from the step on, of all that the search tried from there: that of the
            tree's edge, below the tree what this plan goes on to earn.
        visits: of the tree's edge, 0 below the tree.
        accepted: how many steps were legal before the first that was not.
    """

    rewards: tuple[float, ...]
    values: tuple[float, ...]
    visits: tuple[int, ...]
    accepted: int


def trace(
    world: World,
    params: Params,
    embedding: Embedding,
    plans: Sequence[Sequence[Plan]],
    *,
    discount: float = 1.0,
    search: Search | None = None,
) -> list[list[Traced]]:
    """Rewards, values and visits along plans.

    Args:
        world: the rules.
        params, embedding: pytrees of [B, ...].
        plans: of each of B tasks.
        discount: of rewards a step.
        search: trees of the B tasks; without, nothing was visited.
    """
    padded = pad(plans)
    accepted, _, rewards = replays(world, params, embedding, padded)
    tried = np.logical_and.accumulate(accepted, axis=-1)
    earned = np.where(tried, rewards, 0.0)
    edges = None
    if search is not None:
        tree = search.tree
        gain = tree.children_rewards + tree.children_discounts * tree.children_values
        edges = tuple(map(np.asarray, (tree.children_index, tree.children_visits, gain)))

    def one(b: int, p: int, plan: Plan) -> Traced:
        steps = [float(r) for r in earned[b, p, : len(plan)]]
        values, visits, later = [0.0] * len(plan), [0] * len(plan), 0.0
        for t in reversed(range(len(plan))):
            values[t] = later = steps[t] + discount * later
        node = 0
        for t, action in enumerate(plan if edges is not None else ()):
            children, count, gain = (column[b, node, action] for column in edges or ())
            if count == 0 or not tried[b, p, t]:
                break
            visits[t], values[t], node = int(count), float(gain), int(children)
        accepted = int(tried[b, p, : len(plan)].sum())
        return Traced(tuple(steps), tuple(values), tuple(visits), accepted)

    return [[one(b, p, plan) for p, plan in enumerate(row)] for b, row in enumerate(plans)]
