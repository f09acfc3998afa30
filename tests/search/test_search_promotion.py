"""Search under strict promotion of types and with 64-bit numbers: bit for bit as without."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egjax.search.actions import action_table, encode_actions
from egjax.search.household import (
    Rewards,
    begin,
    draw_verb_first,
    helpful_first,
    household,
    verb_first,
)
from egjax.search.label import LabelConfig, label
from egjax.search.mcts import SearchConfig, World, search
from egjax.search.moves import plan
from egjax.sim.goals import Predicate, encode_goal
from egjax.sim.graph import encode
from egjax.sim.household import home_graph
from egjax.types import Task

MODES = {"64 bits": (True, "standard"), "strict promotion": (False, "strict")}
GOAL = [Predicate("ON", "cup", "table"), Predicate("CLOSE", "character", "milk")]


def corridor() -> World:
    """Places 0 to 5; left or right; the goal is 5."""

    def step(params, place, action):
        del params
        place = place + jnp.where(action == 1, jnp.int32(1), jnp.int32(-1))
        solved = place == 5
        return place, jnp.where(solved, jnp.float32(2), jnp.float32(-0.1)), solved, jnp.bool_(False)

    return World(lambda params, place: jnp.stack([place > 0, place < 5]), step)


def searched() -> list[np.ndarray]:
    world, found = corridor(), []
    params, places = jnp.zeros(2, jnp.int32), jnp.full(2, 2, jnp.int32)
    keys = jax.random.split(jax.random.key(0), 2)
    for rule in ("uct", "puct", "gumbel"):
        config = SearchConfig(
            simulations=8,
            rollouts=2,
            rollout_steps=6,
            max_depth=8,
            chunk=8,
            discount=0.9,
            until_solved=False,
            rule=rule,
        )
        out = search(world, config, params, places, keys)
        found += jax.tree.leaves((out.record, out.actions, out.returns, out.solved))
        if rule == "uct":
            labels = label(world, LabelConfig(), params, places, out, jax.random.key(3))
            found.append(np.array([repr(labels)]))
            moved = plan(world, config, params, places, keys, moves=2, simulations=8)
            found += [np.asarray(moved.actions), np.asarray(moved.solved)]
    return found


@pytest.mark.parametrize("mode", MODES)
def test_wider_numbers_and_stricter_types_change_no_search(mode):
    plain = searched()
    wide, promotion = MODES[mode]
    with jax.enable_x64(wide), jax.numpy_dtype_promotion(promotion):
        other = searched()
    for ours, theirs in zip(plain, other, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def asked() -> tuple[jax.Array, ...]:
    """What a search asks the household for, and its heuristics."""
    graph = home_graph("cottage")
    scene, state, names = encode(graph)
    goal = encode_goal(GOAL, names, nodes=len(scene.ids))
    actions = encode_actions(action_table(graph, GOAL), names.index)
    task = jax.tree.map(jnp.asarray, Task(scene, state, goal, actions))
    world, start = household(Rewards(change=0.3)), begin(task)
    ready, draw = world.prepare(task), jax.random.uniform(jax.random.key(0))
    legal = world.legal(ready, start)
    return (
        legal,
        world.step(ready, start, jnp.int32(0)),
        world.value(ready, start),
        verb_first(ready, start, legal),
        draw_verb_first(ready.actions, legal, draw),
        helpful_first(ready, start, legal),
    )


@pytest.mark.parametrize("mode", MODES)
def test_the_household_gives_the_same_types_whatever_is_promoted(mode):
    plain = jax.tree.leaves(jax.eval_shape(asked))
    wide, promotion = MODES[mode]
    with jax.enable_x64(wide), jax.numpy_dtype_promotion(promotion):
        other = jax.tree.leaves(jax.eval_shape(asked))
    assert [x.dtype for x in plain] == [x.dtype for x in other]
