from __future__ import annotations

import itertools
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egjax.search.actions import Grounded, encode_actions
from egjax.search.household import Rewards, begin, household
from egjax.sim import env as env_module
from egjax.sim.authoring import parse_goals
from egjax.sim.choices import draw, legal_choices
from egjax.sim.env import Household, observe
from egjax.sim.goals import encode_goal
from egjax.sim.graph import encode
from egjax.sim.household import home_graph
from egjax.sim.vocab import VERB_INDEX
from egjax.types import Task

ACTIONS = [
    Grounded(verb, obj)
    for verb, obj in itertools.product(("WALK", "OPEN", "CLOSE", "GRAB"), (11, 18))
] + [Grounded("STANDUP")]


@pytest.fixture(scope="module")
def task():
    graph = home_graph("cottage")
    by_class = {n["class_name"]: n["id"] for n in graph["nodes"]}
    scene, state, names = encode(graph)
    fridge, milk = by_class["fridge"], by_class["milk"]
    pairs = {11: fridge, 18: milk}
    actions = [Grounded(a.verb, pairs[a.obj] if a.obj else None) for a in ACTIONS]
    goals = parse_goals(["OPEN(fridge)", "HOLDS_RH(character, milk)"], graph)
    goal = encode_goal(goals, names, nodes=len(scene.ids))
    return Task(scene, state, goal, encode_actions(actions, names.index, size=12))


TRACES = []


def counted(state, params, env):
    """The default observation; a trace of it is noted."""
    TRACES.append(1)
    return observe(state, params, env)


REWARDS = Rewards(change=0.25)
ENV = Household(*REWARDS, max_steps=6, observe=counted)
_reset, _step = jax.jit(ENV.reset), jax.jit(ENV.step)
WALK_FRIDGE, WALK_MILK, OPEN_FRIDGE, GRAB_MILK, STANDUP, PADDING = 0, 1, 2, 7, 8, 11
KEY = jax.random.key(0)


def test_an_episode_by_hand(task):
    obs, state = _reset(KEY, task)
    assert ENV.num_actions(task) == 12
    assert obs.nodes.shape == (len(task.scene.ids), 50)
    assert obs.goals.tolist() == [[0, 1], [0, 1]]
    assert obs.legal[WALK_FRIDGE]
    assert not obs.legal[OPEN_FRIDGE]
    seen = []
    for action in (OPEN_FRIDGE, WALK_MILK, OPEN_FRIDGE, GRAB_MILK):
        obs, state, reward, done, info = _step(KEY, state, action, task)
        seen.append((round(float(reward), 3), bool(done), bool(info["legal"])))
    assert seen == [(-0.1, False, False), (-0.1, False, True), (2, False, True), (2, True, True)]
    assert info["solved"]
    assert not info["truncated"]
    assert info["discount"] == 0
    # The next episode has begun.
    first, begun = _reset(KEY, task)
    for ours, theirs in zip(jax.tree.leaves((obs, state)), jax.tree.leaves((first, begun))):
        np.testing.assert_array_equal(ours, theirs)


def test_an_episode_ends_with_its_steps(task):
    _, state = _reset(KEY, task)
    for number in range(1, 7):
        obs, state, _, done, info = _step(KEY, state, WALK_FRIDGE, task)
        assert bool(done) == bool(info["truncated"]) == (number == 6)
        assert float(obs.time) == pytest.approx(number % 6 / 6)
        assert info["discount"] == 1


def test_an_illegal_action_changes_nothing_but_the_time(task):
    _, state = _reset(KEY, task)
    for action in (OPEN_FRIDGE, STANDUP, PADDING, 99, -1):
        _, after, reward, _, info = _step(KEY, state, action, task)
        assert not info["legal"]
        assert float(reward) == pytest.approx(-0.1)
        for old, new in zip(jax.tree.leaves(state.state), jax.tree.leaves(after.state)):
            np.testing.assert_array_equal(old, new)


def test_rewards_are_those_of_the_search(task):
    """The same random actions in both, with goals undone again."""
    world = household(REWARDS)
    other, start = jax.jit(world.step), jax.jit(begin)
    obs, state = _reset(KEY, task)
    progress = start(task)
    rng = np.random.default_rng(0)
    lost = 0
    for _ in range(60):
        action = np.int32(rng.choice(np.flatnonzero(obs.legal)))
        before = progress.held
        progress, theirs, solved, _ = other(task, progress, action)
        obs, state, ours, done, info = _step(KEY, state, action, task)
        assert float(ours) == pytest.approx(float(theirs))
        assert bool(info["solved"]) == bool(solved)
        lost += int((before & ~progress.held).sum())
        progress = start(task) if done else progress
    assert lost > 0


def test_any_grounded_action_is_taken(task):
    """And `step_env` is `step` without the new start."""

    def all_ways(key, state, action, params):
        drawn = draw(key, legal_choices(params.scene, state.state))
        ways = jnp.stack([action, drawn])
        return jax.vmap(lambda way: ENV.step_env(key, state, way, params))(ways)

    _, state = _reset(KEY, task)
    fridge = int(task.actions.obj[WALK_FRIDGE])
    grounded = jnp.array([VERB_INDEX["WALK"], fridge, -1])
    ways = jax.jit(all_ways)(KEY, state, grounded, task)
    two = _step(KEY, state, WALK_FRIDGE, task)
    for both, b in zip(jax.tree.leaves(ways), jax.tree.leaves(two)):
        np.testing.assert_array_equal(both[0], b)
    assert ways[-1]["legal"].all()


def test_the_example_of_the_docstring_runs(task):
    lines = (env_module.__doc__ or "").splitlines()
    example = textwrap.dedent("\n".join(x for x in lines if not x or x.startswith("    ")))
    space: dict = {"keys": jax.random.split(jax.random.key(1), 3), "task": task}
    exec(example, space)
    rewards, dones = np.asarray(space["rewards"]), np.asarray(space["dones"])
    assert rewards.shape == dones.shape == (3, 128)
    assert dones.any(1).all()
    assert (rewards[np.asarray(space["solved"])] > 0).all()
    assert np.asarray(space["solved"]).any()


def test_one_compilation_serves_many_steps(task):
    _, state = _reset(KEY, task)
    _, state, *_ = _step(KEY, state, 0, task)
    before = len(TRACES)
    for action in range(3):
        _, state, *_ = _step(KEY, state, action, task)
    assert len(TRACES) == before > 0


@pytest.mark.parametrize("wrap", [lambda reset: reset, jax.jit], ids=["plain", "jitted"])
def test_a_state_may_be_donated_and_the_task_stays(task, wrap):
    task = jax.device_put(task)
    _, state = wrap(Household(observe=lambda *_: ()).reset)(KEY, task)
    places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state, task))]
    assert len(set(places)) == len(places)
