"""The search on the embedded homes, checked by stepping the simulator by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egjax.search import mcts
from egjax.search.actions import action_table, encode_actions
from egjax.search.household import Rewards, begin, draw_verb_first, household, verb_first
from egjax.sim import goals, world
from egjax.sim.goals import GoalSizes, encode_goal, goal_predicates
from egjax.sim.graph import Sizes, encode
from egjax.sim.household import home_programs
from egjax.sim.vocab import VERB_INDEX
from egjax.types import Task

NAMES = ("cottage1", "cottage4", "cottage7", "cottage9", "flat13", "flat14")
CONFIG = mcts.SearchConfig(
    simulations=48, rollouts=4, rollout_steps=16, max_depth=16, until_solved=False
)
WORLD = household()
STEP = jax.jit(world.step)


@pytest.fixture(scope="module")
def tables():
    programs = [p for p in home_programs() if p.name in NAMES]
    wanted = [goal_predicates(p.init, p.final, close=True) for p in programs]
    return programs, wanted, [action_table(p.init, g) for p, g in zip(programs, wanted)]


@pytest.fixture(scope="module")
def tasks(tables):
    rows = []
    for program, wanted, table in zip(*tables):
        scene, state, names = encode(program.init, Sizes(nodes=64))
        goal = encode_goal(wanted, names, nodes=64, sizes=GoalSizes(10, 32))
        actions = encode_actions(table, names.index, size=24, objects=12)
        rows.append(Task(scene, state, goal, actions))
    return jax.tree.map(lambda *x: jnp.stack([jnp.asarray(y) for y in x]), *rows)


@pytest.fixture(scope="module")
def found(tasks):
    keys = jax.random.split(jax.random.key(0), len(NAMES))
    return mcts.search(WORLD, CONFIG, tasks, jax.vmap(begin)(tasks), keys)


def one_of(tasks, b):
    return jax.tree.map(lambda x: x[b], tasks)


def play(task, plan):
    """The simulator's error numbers of a plan, and which goals hold at its end."""
    state, codes = task.state, []
    table = task.actions
    for action in plan[plan >= 0]:
        state, code = STEP(
            task.scene, state, table.verb[action], table.obj[action], table.target[action]
        )
        codes.append(int(code))
    return codes, np.asarray(goals.satisfied(task.scene, state, task.goal))


def test_all_are_solved_and_the_plans_hold_up(tasks, found):
    assert found.solved.all()
    for b in range(len(NAMES)):
        codes, held = play(one_of(tasks, b), found.actions[b])
        assert codes == [0] * int(found.length[b])
        assert held.all()


def test_whatever_is_tried_is_accepted(tasks, found):
    for b in range(len(NAMES)):
        for s in (0, 5, 20):
            record = found.record
            codes, held = play(one_of(tasks, b), record.actions[s, b, 0])
            assert codes == [0] * int(record.length[s, b, 0])
            assert held.all() == (record.solved_at[s, b, 0] >= 0)


def wander(task, rewards):
    """A random legal walk: what holds after each step, and the reward of each."""
    step, legal = jax.jit(household(rewards).step), jax.jit(WORLD.legal)
    progress, rng = begin(task), np.random.default_rng(0)
    held, paid = [np.asarray(progress.held)], []
    for _ in range(40):
        action = rng.choice(np.flatnonzero(legal(task, progress)))
        progress, reward, *_ = step(task, progress, action)
        held.append(np.asarray(progress.held))
        paid.append(float(reward))
    return np.array(held), np.array(paid)


def test_reward_counts_each_goal_once(tasks):
    held, paid = wander(one_of(tasks, NAMES.index("cottage4")), Rewards())
    ever = np.maximum.accumulate(held)
    gained = np.diff(ever.sum(1))
    assert (np.diff(held.astype(int), axis=0) < 0).any()  # some are lost on the way
    np.testing.assert_allclose(paid, np.where(gained > 0, 2.0 * gained, -0.1), rtol=1e-6)


def test_find_is_legal_near_its_object_only(tasks):
    """Far from it, it would be the walk that the table has as well."""
    task = one_of(tasks, NAMES.index("cottage1"))
    legal, start = jax.jit(WORLD.legal), begin(task)
    verb, obj = np.asarray(task.actions.verb), np.asarray(task.actions.obj)
    fridge = obj[verb == VERB_INDEX["OPEN"]][0]
    walk, find = (
        int(np.flatnonzero((verb == VERB_INDEX[name]) & (obj == fridge))[0])
        for name in ("WALK", "FIND")
    )
    assert legal(task, start)[walk]
    assert not legal(task, start)[find]
    assert legal(task, WORLD.step(task, start, walk)[0])[find]


def test_potential_reward_takes_back_what_is_lost(tasks):
    held, paid = wander(one_of(tasks, NAMES.index("cottage4")), Rewards(cost=0.0, change=2.0))
    np.testing.assert_allclose(np.cumsum(paid), 2.0 * (held[1:].sum(1) - held[0].sum()))


def test_verbs_are_drawn_alike(tasks):
    task = one_of(tasks, 1)
    legal = jnp.asarray(np.random.default_rng(0).random(task.actions.verb.size) < 0.7)
    weights = np.asarray(verb_first(task, begin(task), legal))
    verb = np.asarray(task.actions.verb)
    assert (weights[~np.asarray(legal)] == 0).all()
    for name in np.unique(verb[np.asarray(legal)]):
        assert weights[verb == name].sum() == pytest.approx(1.0)


def test_actions_are_drawn_with_the_weights_of_verb_first(tasks):
    task = one_of(tasks, 0)
    legal = WORLD.legal(task, begin(task))
    weights = np.asarray(verb_first(task, begin(task), legal))
    draws = jax.random.uniform(jax.random.key(3), (20_000,))
    drawn = jax.jit(jax.vmap(lambda draw: draw_verb_first(task.actions, legal, draw)))(draws)
    counts = np.bincount(np.asarray(drawn), minlength=len(weights))
    expected = weights / weights.sum() * len(draws)
    assert (counts[expected == 0] == 0).all()
    expected, counts = expected[expected > 0], counts[expected > 0]
    # Chi-square of k - 1 degrees of freedom: mean k - 1, deviation sqrt(2 (k - 1)).
    free = len(expected) - 1
    assert ((counts - expected) ** 2 / expected).sum() < free + 5 * np.sqrt(2 * free)
    assert draw_verb_first(task.actions, jnp.zeros_like(legal), draws[0]) == -1


def test_padding_of_the_table_never_matters(tables, tasks, found):
    """A wider table gives the same legal actions and the same rewards."""
    programs, wanted, grounded = tables
    scene, state, names = encode(programs[0].init, Sizes(nodes=64, added=40))
    wide = Task(
        scene,
        state,
        encode_goal(wanted[0], names, nodes=64, sizes=GoalSizes(12, 40)),
        encode_actions(grounded[0], names.index, size=30, objects=20),
    )
    task = one_of(tasks, 0)
    narrow_state, wide_state = begin(task), begin(wide)
    legal, step = jax.jit(WORLD.legal), jax.jit(WORLD.step)
    for action in found.actions[0][found.actions[0] >= 0]:
        np.testing.assert_array_equal(legal(task, narrow_state), legal(wide, wide_state)[:24])
        assert not legal(wide, wide_state)[24:].any()
        narrow_state, *one = step(task, narrow_state, action)
        wide_state, *two = step(wide, wide_state, action)
        assert [x.item() for x in one] == [x.item() for x in two]
