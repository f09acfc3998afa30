"""The household as a world to search: binds `egjax.sim` to `egjax.search.mcts`."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from egjax.search.mcts import World, mix
from egjax.search.relaxed import Relaxed, relaxed_plan
from egjax.sim import goals, world
from egjax.sim.rules import REFERENCE, Rules
from egjax.sim.vocab import VERB_INDEX, VERBS
from egjax.sim.world import fold
from egjax.types import ActionTable, Scene, State, Task

__all__ = [
    "Prepared",
    "Progress",
    "Rewards",
    "begin",
    "helpful_first",
    "household",
    "prepare",
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


@struct.dataclass
class Prepared:
    """A task with what never changes of it gathered once, see `prepare`."""

    scene: Scene
    actions: ActionTable
    table: world.Table
    wanted: goals.Wanted


def prepare(task: Task | Prepared, rules: Rules = REFERENCE) -> Prepared:
    """Gathers what never changes of a task; one that is prepared comes back as it is.

    FIND counts as legal only near its object: far from it it is the same as WALK, which the table
    has as well.
    """
    if isinstance(task, Prepared):
        return task
    # RINSE asks for nearness and nothing else.
    asked = jnp.where(task.actions.verb == _FIND, _RINSE, task.actions.verb)
    table = world.ground(task.scene, dataclasses.replace(task.actions, verb=asked), rules)
    wanted = goals.ground(task.scene, task.goal)
    return Prepared(task.scene, task.actions, table._replace(actions=task.actions), wanted)


def verb_first(task: Task | Prepared, progress: Progress, legal: Array) -> Array:
    """Rollout weights f32[A]: a legal verb at random, then one of its legal actions.

    Walking is legal almost everywhere; drawn action by action, a rollout would do little else.
    """
    del progress
    verbs = jax.nn.one_hot(task.actions.verb, len(VERBS), dtype=jnp.float32)
    count = legal.astype(jnp.float32) @ verbs
    return jnp.where(legal, 1.0 / jnp.maximum(count[task.actions.verb], 1.0), 0.0)


def draw_verb_first(table: ActionTable, legal: Array, draw: Array) -> Array:
    """A rollout's action int32[] with the probabilities of `verb_first`, -1 where none is legal.

    Among legal actions the verb of the highest hash, then its action of the highest hash; sums over
    the table, which a draw from weights needs, take several times as long. `draw` is f32[] in
    [0, 1).
    """
    numbers = jnp.arange(legal.shape[0], dtype=jnp.uint32)
    bits = max(legal.shape[0] - 1, 1).bit_length()
    salt = mix(jax.lax.bitcast_convert_type(draw.astype(jnp.float32), jnp.uint32))

    def highest(hashes: Array, numbers: Array, bits: int, among: Array) -> Array:
        # 0 is for none: the number is one more than it was.
        key = (hashes << bits) | numbers
        return fold(jnp.where(among, key, 0), jnp.maximum)

    verb = table.verb.astype(jnp.uint32)
    first = highest(mix(salt ^ verb), verb + 1, 6, legal) & 63
    best = highest(mix(~salt ^ numbers), numbers, bits, legal & (verb + 1 == first))
    return jnp.where(first > 0, (best & ((1 << bits) - 1)).astype(jnp.int32), -1)


def _relaxed(task: Task | Prepared, progress: Progress) -> Relaxed:
    goal = task.wanted.goal if isinstance(task, Prepared) else task.goal
    return relaxed_plan(task.scene, task.actions, goal, progress.state, progress.held)


def helpful_first(task: Task | Prepared, progress: Progress, legal: Array) -> Array:
    """Prior logits f32[A]: actions of a relaxed plan from here are e³ times as likely as others."""
    del legal
    return _HELPFUL * _relaxed(task, progress).helpful.astype(jnp.float32)


def same_state(progress: Progress) -> tuple[Array, Array, Array]:
    """What makes two states the same for `egjax.search.best_first`: how they came about does not
    matter, nor the order of added edges, nor where held things were taken from, because no table
    of `egjax.search.actions` puts anything back there."""
    return progress.state.nodes, jnp.sort(progress.state.added), progress.performed


def steps_to_go(task: Task | Prepared, progress: Progress) -> Array:
    """Length f32[] of a relaxed plan, an estimate for `egjax.search.best_first`."""
    return _relaxed(task, progress).steps


def household(rewards: Rewards | None = None, rules: Rules = REFERENCE) -> World:
    """The world of household tasks: params are a `Task`, the embedding is a `Progress`.

    Tables must not have PUTOBJBACK, which is never legal here: PUTBACK and PUTIN do the same. The
    prior prefers what a relaxed plan does; the value is the return of that plan if it went through:
    what is still to be gained, less the cost of its other steps, undiscounted. See
    `egjax.search.relaxed` for what it is worth.
    """
    rewards = rewards or Rewards()

    ready_for = functools.partial(prepare, rules=rules)
    count = functools.partial(jnp.sum, dtype=jnp.float32)

    def look(ready: Prepared, progress: Progress) -> world.Look:
        return world.look(ready.scene, progress.state, ready.table, rules, returns=False)

    def legal(task: Task | Prepared, progress: Progress) -> Array:
        return look(ready_for(task), progress).legal

    def take(ready: Prepared, progress: Progress, seen: world.Look, action: Array):
        table, before = ready.actions, progress.performed
        state = world.take(ready.scene, progress.state, ready.table, seen, action, rules)
        held = goals.satisfied(ready.scene, state, ready.wanted)
        goal = ready.wanted.goal
        performed = goals.perform(goal, before, table.verb[action], table.obj[action], True)
        gained = count(held & ~progress.achieved) + (performed - before).astype(jnp.float32)
        lost = count(progress.held & ~held)
        regained = count(held & ~progress.held & progress.achieved)
        reward = jnp.where(gained > 0, rewards.gain * gained, rewards.cost)
        reward = (reward + rewards.change * (regained - lost)).astype(jnp.float32)
        after = Progress(state, progress.achieved | held, held, performed)
        solved = jnp.all(held) & goals.all_performed(goal, performed)
        return after, reward, solved, state.overflow

    def step(task: Task | Prepared, progress: Progress, action: Array):
        ready = ready_for(task)
        return take(ready, progress, look(ready, progress), action)

    def play(task: Task | Prepared, progress: Progress, draw: Array):
        ready = ready_for(task)
        seen = look(ready, progress)
        action = draw_verb_first(ready.actions, seen.legal, draw)
        return action, *take(ready, progress, seen, jnp.maximum(action, 0))

    def value(task: Task | Prepared, progress: Progress) -> Array:
        steps = steps_to_go(task, progress)
        new = count(~progress.achieved)
        lost = count(progress.achieved & ~progress.held)
        to_gain = rewards.gain * new + rewards.change * lost
        return to_gain + rewards.cost * jnp.maximum(steps - new, 0.0)

    return World(legal, step, verb_first, helpful_first, value, ready_for, play)
