"""The simulator under strict promotion of types and with 64-bit numbers: bit for bit as without."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egjax.search.actions import action_table, encode_actions
from egjax.sim.choices import draw, legal_choices
from egjax.sim.env import Household
from egjax.sim.goals import Deed, Predicate, encode_goal
from egjax.sim.graph import encode
from egjax.sim.household import home_graph
from egjax.sim.world import legal
from egjax.types import Task

GOAL = [Predicate("ON", "cup", "table"), Predicate("INSIDE", "milk", "cupboard")]


def household() -> tuple[Household, Task]:
    graph = home_graph("cottage")
    scene, state, names = encode(graph)
    goal = encode_goal(GOAL, names, deeds=[Deed(("GRAB",))], nodes=len(scene.ids))
    task = Task(scene, state, goal, encode_actions(action_table(graph, GOAL), names.index))
    return Household(max_steps=16, change=0.3), task


def played() -> list[jax.Array]:
    """What an agent of random legal actions of a table sees, does and gets, and its states."""
    env, task = household()

    def one(carry, key):
        seen, now = carry
        act, world = jax.random.split(key)
        scores = jax.random.uniform(act, seen.legal.shape, jnp.float32)
        action = jnp.argmax(jnp.where(seen.legal, scores, -1)).astype(jnp.int32)
        seen, now, *rest = env.step(world, now, action, task)
        return (seen, now), (rest, action, now)

    def episode(key):
        first, rest = jax.random.split(key)
        return jax.lax.scan(one, env.reset(first, task), jax.random.split(rest, 30))

    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    run = jax.jit(jax.vmap(episode), compiler_options=quick)
    return jax.tree.leaves(run(jax.random.split(jax.random.key(0), 4)))


def chosen() -> tuple[jax.Array, ...]:
    """What can be done without a table, two draws of it, and a step."""
    env, task = household()
    _, now = env.reset(jax.random.key(0), task)
    choices = legal_choices(task.scene, now.state)
    drawn = [draw(jax.random.key(1), choices, verb_first=first) for first in (True, False)]
    legal_ = legal(task.scene, now.state, task.actions)
    return choices, *drawn, legal_, env.step(jax.random.key(2), now, drawn[0], task)


def test_64_bits_change_nothing():
    plain = played()
    with jax.enable_x64(True):
        wide = played()
    assert len(plain) == len(wide) > 10
    for ours, theirs in zip(plain, wide, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("wide", [False, True], ids=["strict promotion", "64 bits"])
def test_types_stay_what_they_are_whatever_is_promoted(wide):
    plain = jax.tree.leaves(jax.eval_shape(chosen))
    with jax.enable_x64(wide), jax.numpy_dtype_promotion("standard" if wide else "strict"):
        other = jax.tree.leaves(jax.eval_shape(chosen))
    assert [x.dtype for x in plain] == [x.dtype for x in other]
