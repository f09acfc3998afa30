"""The household as a world to search: binds `egjax.sim` to `egjax.search.mcts`."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from egjax.search.mcts import World
from egjax.search.relaxed import relaxed_plan
from egjax.sim import goals, world
from egjax.sim.vocab import VERB_INDEX, VERBS
from egjax.types import State, Task

__all__ = [
    "Progress",
    "Rewards",
    "begin",
    "helpful_first",
    "household",
    "same_state",
    "steps_to_go",
    "verb_first",
]

Array = jax.Array
_FIND, _RINSE = VERB_INDEX["FIND"], VERB_INDEX["RINSE"]
_HELPFUL = 3.0  # logits by which an action of the relaxed plan is ahead of the others


class Rewards(NamedTuple):
    """What a step is worth; "Growing Through Experience" (arXiv 2506.01312), section 3.1.

    Attributes:
        gain: for each goal predicate that holds for the first time on this trajectory.
        cost: of a step that brings none (negative).
        change: for each goal predicate that holds again after the step, and its negative for each
            that holds no more. 0 is the paper's reward; with `change = gain` the sum of rewards is
            the number of predicates that hold at the end (a potential), which helps where goals
            undo each other.
    """

    gain: float = 2.0
    cost: float = -0.1
    change: float = 0.0


@struct.dataclass
class Progress:
    """What a search tree stores of one node.

    Attributes:
        state: of the household.
        achieved: bool[G]. Predicates that have held at some time on this trajectory.
        held: bool[G]. Predicates that hold now.
    """

    state: State
    achieved: Array
    held: Array


def begin(task: Task) -> Progress:
    """Where a task starts; one task. What holds from the start brings no reward."""
    held = goals.satisfied(task.scene, task.state, task.goal)
    return Progress(task.state, held, held)


def verb_first(task: Task, progress: Progress, legal: Array) -> Array:
    """Rollout weights f32[A]: a legal verb at random, then one of its legal actions.

    Walking is legal almost everywhere; drawn action by action, a rollout would do little else.
    """
    del progress
    verbs = jax.nn.one_hot(task.actions.verb, len(VERBS))
    count = legal.astype(jnp.float32) @ verbs
    return jnp.where(legal, 1.0 / jnp.maximum(count[task.actions.verb], 1.0), 0.0)


def helpful_first(task: Task, progress: Progress, legal: Array) -> Array:
    """Prior logits f32[A]: actions of a relaxed plan from here are e³ times as likely as others."""
    del legal
    return _HELPFUL * relaxed_plan(task, progress.state, progress.held).helpful


def same_state(progress: Progress) -> tuple[Array, Array]:
    """What makes two states the same for `egjax.search.best_first`: how they came about does not
    matter, nor the order of added edges, nor where held things were taken from, because no table
    of `egjax.search.actions` puts anything back there."""
    return progress.state.nodes, jnp.sort(progress.state.added)


def steps_to_go(task: Task, progress: Progress) -> Array:
    """Length f32[] of a relaxed plan, an estimate for `egjax.search.best_first`."""
    return relaxed_plan(task, progress.state, progress.held).steps


def household(rewards: Rewards | None = None) -> World:
    """The world of household tasks: params are a `Task`, the embedding is a `Progress`.

    FIND counts as legal only near its object: far from it it is the same as WALK, which the table
    has as well. The prior prefers what a relaxed plan does; the value is the return of that plan if
    it went through: what is still to be gained, less the cost of its other steps, undiscounted. See
    `egjax.search.relaxed` for what it is worth.
    """
    rewards = rewards or Rewards()

    def legal(task: Task, progress: Progress) -> Array:
        # RINSE asks for nearness and nothing else.
        asked = jnp.where(task.actions.verb == _FIND, _RINSE, task.actions.verb)
        table = dataclasses.replace(task.actions, verb=asked)
        return world.legal(task.scene, progress.state, table)

    def step(task: Task, progress: Progress, action: Array):
        table = task.actions
        state, _ = world.step(
            task.scene, progress.state, table.verb[action], table.obj[action], table.target[action]
        )
        held = goals.satisfied(task.scene, state, task.goal)
        gained = jnp.sum(held & ~progress.achieved)
        lost = jnp.sum(progress.held & ~held)
        regained = jnp.sum(held & ~progress.held & progress.achieved)
        reward = jnp.where(gained > 0, rewards.gain * gained, rewards.cost)
        reward = (reward + rewards.change * (regained - lost)).astype(jnp.float32)
        after = Progress(state, progress.achieved | held, held)
        return after, reward, jnp.all(held), state.overflow

    def value(task: Task, progress: Progress) -> Array:
        steps = relaxed_plan(task, progress.state, progress.held).steps
        new = jnp.sum(~progress.achieved)
        lost = jnp.sum(progress.achieved & ~progress.held)
        to_gain = rewards.gain * new + rewards.change * lost
        return to_gain + rewards.cost * jnp.maximum(steps - new, 0.0)

    return World(legal, step, verb_first, helpful_first, value)
