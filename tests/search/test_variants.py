"""Worse plans by kind, on the embedded home, checked by stepping."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egjax.search.actions import Grounded, encode_actions
from egjax.search.household import begin, household
from egjax.search.variants import FAILED, REDUNDANT, redundancy, variants
from egjax.sim.goals import Predicate, encode_goal
from egjax.sim.graph import encode
from egjax.sim.household import home_graph
from egjax.types import Task

GRAPH = home_graph("cottage")


def node(name: str) -> int:
    return next(n["id"] for n in GRAPH["nodes"] if n["class_name"] == name)


FRIDGE, MILK, TABLE, LAMP = map(node, ("fridge", "milk", "table", "lamp"))
TABLE_OF_ACTIONS = [
    Grounded("WALK", FRIDGE),
    Grounded("OPEN", FRIDGE),
    Grounded("CLOSE", FRIDGE),
    Grounded("GRAB", MILK),
    Grounded("WALK", TABLE),
    Grounded("PUTBACK", MILK, TABLE),
    Grounded("WALK", LAMP),
    Grounded("SWITCHON", LAMP),
    Grounded("SWITCHOFF", LAMP),
    Grounded("TURNTO", FRIDGE),
]
SUCCESS = (0, 1, 3, 4, 5)
WORLD = household()


@pytest.fixture(scope="module")
def task():
    scene, state, names = encode(GRAPH)
    goal = encode_goal([Predicate("ON", "milk", "table")], names, nodes=len(scene.ids))
    actions = encode_actions(TABLE_OF_ACTIONS, names.index)
    return jax.tree.map(jnp.asarray, Task(scene, state, goal, actions))


def play(task, plan):
    """Whether every step is legal, and after how many the goal holds (-1: never)."""
    progress, step, legal = begin(task), jax.jit(WORLD.step), jax.jit(WORLD.legal)
    for count, action in enumerate(plan, 1):
        if not legal(task, progress)[action]:
            return False, -1
        progress, _, solved, _ = step(task, progress, jnp.int32(action))
        if solved:
            return True, count
    return True, -1


@pytest.mark.parametrize(
    ("plan", "kind"),
    [
        ((0, 1, 3, 6, 4, 5), "detour"),
        ((0, 0, 1, 3, 4, 5), "repeat"),
        ((0, 0, 1, 3, 6, 4, 5), "detour"),
        ((6, 7, 0, 1, 3, 4, 5), "object"),
        ((0, 1, 3, 2, 4, 5), "extra"),
        ((0, 9, 1, 3, 4, 5), "extra"),
    ],
)
def test_redundancy_is_named_after_what_is_needless(task, plan, kind):
    table = jax.tree.map(np.asarray, task.actions)
    # Of several successes the one that explains most of the plan counts.
    assert redundancy(plan, [(6, 7, 8, 6, 7), SUCCESS], table) == kind


def test_variants_are_what_they_are_called(task):
    assert play(task, SUCCESS) == (True, len(SUCCESS))
    table = jax.tree.map(np.asarray, task.actions)
    two = jax.tree.map(lambda x: jnp.stack([x, x]), task)
    start = jax.vmap(begin)(two)
    made, nothing = variants(WORLD, two, start, [[SUCCESS], []], each=2, seed=(3, 0))
    assert set(made) == {*REDUNDANT, *FAILED}
    assert not any(nothing.values())
    for kind in REDUNDANT:
        assert made[kind], kind
        assert len(set(made[kind])) == len(made[kind]) <= 2
        for plan in made[kind]:
            assert play(task, plan) == (True, len(plan))
            assert len(plan) > len(SUCCESS)
            assert redundancy(plan, [SUCCESS], table) == kind
            rest = iter(plan)
            assert all(action in rest for action in SUCCESS)  # in this order
    assert len(made["omission"]) == 2
    for plan in made["omission"]:
        assert len(plan) == len(SUCCESS) - 1
        assert play(task, plan)[1] == -1
    for plan in made["order"]:
        assert sorted(plan) == sorted(SUCCESS)
        assert plan != SUCCESS
    again = variants(WORLD, two, start, [[SUCCESS], []], each=2, seed=(3, 0))[0]
    assert again == made


def test_none_are_made_where_none_are_asked_for(task):
    one = jax.tree.map(lambda x: x[None], task)
    made = variants(WORLD, one, jax.vmap(begin)(one), [[SUCCESS]], each=0, seed=0)
    assert not any(made[0].values())
