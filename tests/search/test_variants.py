"""Worse plans by kind, in a little world of three places, checked by stepping."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egjax.search.mcts import World
from egjax.search.variants import FAILED, REDUNDANT, redundancy, variants
from egjax.sim.vocab import VERB_INDEX
from egjax.types import ActionTable

FRIDGE, TABLE, LAMP, MILK = range(4)
NO = -1
# Verb, object, target, the place where one must be (-1: any), flags that must be set, must not be
# set, and that are set then: 1 open, 2 held, 4 lamp on, 8 milk on the table.
ACTIONS = [
    ("WALK", FRIDGE, NO, NO, 0, 0, 0),
    ("OPEN", FRIDGE, NO, FRIDGE, 0, 1, 1),
    ("GRAB", MILK, NO, FRIDGE, 1, 2, 2),
    ("WALK", TABLE, NO, NO, 0, 0, 0),
    ("PUTBACK", MILK, TABLE, TABLE, 2, 0, 8),
    ("WALK", LAMP, NO, NO, 0, 0, 0),
    ("SWITCHON", LAMP, NO, LAMP, 0, 4, 4),
    ("TURNTO", FRIDGE, NO, NO, 0, 0, 0),
]
COLUMNS = np.array([[VERB_INDEX[a[0]], *a[1:]] for a in ACTIONS], np.int32).T
SUCCESS = (0, 1, 2, 3, 4)


class Kitchen(NamedTuple):
    """Params: the table, as of a household task."""

    actions: ActionTable


def _legal(params: Any, state: jax.Array) -> jax.Array:
    place, need, without = COLUMNS[3], COLUMNS[4], COLUMNS[5]
    there = (place < 0) | (place == state[0])
    return there & (state[1] & need == need) & (state[1] & without == 0) & params.actions.mask


def _step(params: Any, state: jax.Array, action: jax.Array):
    walks = params.actions.verb[action] == VERB_INDEX["WALK"]
    place = jnp.where(walks, params.actions.obj[action], state[0])
    flags = state[1] | jnp.asarray(COLUMNS[6])[action]
    solved = flags & 8 != 0
    after = jnp.stack([place, flags]).astype(jnp.int32)
    return after, jnp.where(solved, 2.0, -0.1), solved, jnp.zeros((), bool)


WORLD = World(_legal, _step)
START = jnp.array([NO, 0], jnp.int32)


@pytest.fixture(scope="module")
def task():
    slots = np.zeros(len(ACTIONS), np.int32)
    mask, things = np.ones(len(ACTIONS), bool), np.arange(4)
    return Kitchen(ActionTable(*COLUMNS[:3], mask, things, slots, slots))


def play(task, plan):
    """Whether every step is legal, and after how many the goal holds (-1: never)."""
    state = START
    for count, action in enumerate(plan, 1):
        if not WORLD.legal(task, state)[action]:
            return False, -1
        state, _, solved, _ = WORLD.step(jax.tree.map(jnp.asarray, task), state, jnp.int32(action))
        if solved:
            return True, count
    return True, -1


@pytest.mark.parametrize(
    ("plan", "kind"),
    [
        ((0, 1, 2, 5, 3, 4), "detour"),
        ((0, 0, 1, 2, 3, 4), "repeat"),
        ((0, 0, 1, 2, 5, 3, 4), "detour"),
        ((5, 6, 0, 1, 2, 3, 4), "object"),
        ((0, 7, 1, 2, 3, 4), "extra"),
    ],
)
def test_redundancy_is_named_after_what_is_needless(task, plan, kind):
    # Of several successes the one that explains most of the plan counts.
    assert redundancy(plan, [(5, 6, 7), SUCCESS], task.actions) == kind


def test_variants_are_what_they_are_called(task):
    assert play(task, SUCCESS) == (True, len(SUCCESS))
    two = jax.tree.map(lambda x: jnp.stack([x, x]), task)
    starts = jnp.stack([START, START])
    made, nothing = variants(WORLD, two, starts, [[SUCCESS], []], each=2, seed=(3, 0))
    assert set(made) == {*REDUNDANT, *FAILED}
    assert not any(nothing.values())
    for kind in REDUNDANT:
        assert made[kind], kind
        assert len(set(made[kind])) == len(made[kind]) <= 2
        for plan in made[kind]:
            assert play(task, plan) == (True, len(plan))
            assert len(plan) > len(SUCCESS)
            assert redundancy(plan, [SUCCESS], task.actions) == kind
            rest = iter(plan)
            assert all(action in rest for action in SUCCESS)  # in this order
    assert len(made["omission"]) == 2
    for plan in made["omission"]:
        assert len(plan) == len(SUCCESS) - 1
        assert play(task, plan)[1] == -1
    assert made["order"]
    for plan in made["order"]:
        assert sorted(plan) == sorted(SUCCESS)
        assert play(task, plan)[1] == -1
    again = variants(WORLD, two, starts, [[SUCCESS], []], each=2, seed=(3, 0))[0]
    assert again == made


def test_none_are_made_where_none_are_asked_for(task):
    one = jax.tree.map(lambda x: x[None], task)
    made = variants(WORLD, one, START[None], [[SUCCESS]], each=0, seed=0)
    assert not any(made[0].values())
