"""The household as a world to search: binds `egjax.sim` to `egjax.search.mcts`."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from egjax.search.mcts import World
from egjax.sim import goals, world
from egjax.sim.rules import REFERENCE, Rules
from egjax.sim.vocab import VERB_INDEX, VERBS
from egjax.types import State, Task

__all__ = ["Progress", "Rewards", "begin", "household", "verb_first"]

Array = jax.Array
_FIND, _RINSE = VERB_INDEX["FIND"], VERB_INDEX["RINSE"]


class Rewards(NamedTuple):
    """What a step is worth; "Growing Through Experience" (arXiv 2506.01312), section 3.1.

    Attributes:
        gain: for each goal predicate that holds for the first time on this trajectory, and each
            wanted action that is performed.
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
        performed: int32[]. How many of the wanted actions have been performed, in order.
    """

    state: State
    achieved: Array
    held: Array
    performed: Array


def begin(task: Task) -> Progress:
    """Where a task starts; one task. What holds from the start brings no reward."""
    held = goals.satisfied(task.scene, task.state, task.goal)
    return Progress(task.state, held, held, jnp.int32(0))


def verb_first(task: Task, progress: Progress, legal: Array) -> Array:
    """Rollout weights f32[A]: a legal verb at random, then one of its legal actions.

    Walking is legal almost everywhere; drawn action by action, a rollout would do little else.
    """
    del progress
    verbs = jax.nn.one_hot(task.actions.verb, len(VERBS))
    count = legal.astype(jnp.float32) @ verbs
    return jnp.where(legal, 1.0 / jnp.maximum(count[task.actions.verb], 1.0), 0.0)


def household(rewards: Rewards | None = None, rules: Rules = REFERENCE) -> World:
    """The world of household tasks: params are a `Task`, the embedding is a `Progress`.

    FIND counts as legal only near its object: far from it it is the same as WALK, which the table
    has as well.
    """
    rewards = rewards or Rewards()

    def legal(task: Task, progress: Progress) -> Array:
        # RINSE asks for nearness and nothing else.
        asked = jnp.where(task.actions.verb == _FIND, _RINSE, task.actions.verb)
        table = dataclasses.replace(task.actions, verb=asked)
        return world.legal(task.scene, progress.state, table, rules)

    def step(task: Task, progress: Progress, action: Array):
        table = task.actions
        verb, obj, target = table.verb[action], table.obj[action], table.target[action]
        state, code = world.step(task.scene, progress.state, verb, obj, target, rules)
        held = goals.satisfied(task.scene, state, task.goal)
        performed = goals.perform(task.goal, progress.performed, verb, obj, code == 0)
        gained = jnp.sum(held & ~progress.achieved) + (performed - progress.performed)
        lost = jnp.sum(progress.held & ~held)
        regained = jnp.sum(held & ~progress.held & progress.achieved)
        reward = jnp.where(gained > 0, rewards.gain * gained, rewards.cost)
        reward = (reward + rewards.change * (regained - lost)).astype(jnp.float32)
        after = Progress(state, progress.achieved | held, held, performed)
        solved = jnp.all(held) & goals.all_performed(task.goal, performed)
        return after, reward, solved, state.overflow

    return World(legal, step, verb_first)
