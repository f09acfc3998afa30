"""Labels of explorations of the puzzle, checked by replay and by brute force."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import search_toy as toy

from egjax.errors import EgjaxError
from egjax.search import mcts
from egjax.search.label import LabelConfig, insert, label, pairs, prune, replays, trace

STARTS = jnp.array([[0, 0, 0], [3, 3, 0], [1, 0, 0]])
PARAMS = toy.Maze(jnp.array([3, 12, 2]), jnp.array([15, 10, 9]), jnp.array([False, False, True]))
CONFIG = mcts.SearchConfig(
    simulations=100, rollouts=2, rollout_steps=12, max_depth=12, chunk=100, until_solved=False
)


@pytest.fixture(scope="module")
def labelled():
    keys = jax.random.split(jax.random.key(0), 3)
    out = mcts.search(toy.maze, CONFIG, PARAMS, STARTS, keys)
    return out, label(toy.maze, LabelConfig(), PARAMS, STARTS, out, jax.random.key(1))


def play(task, plan):
    """Stepping by hand: whether all steps were legal, and after how many it was solved."""
    params = jax.tree.map(lambda x: x[task], PARAMS)
    state = STARTS[task]
    for count, action in enumerate(plan, 1):
        if not toy.maze.legal(params, state)[action]:
            return False, -1
        state, _, solved, _ = toy.maze.step(params, state, jnp.int32(action))
        if solved:
            return True, count
    return True, -1


def test_labels_are_true(labelled):
    config = LabelConfig()
    for task, experience in enumerate(labelled[1][:2]):
        assert experience.positives
        shortest = len(experience.positives[0])
        for plan in experience.positives:
            assert play(task, plan) == (True, len(plan))
        assert 0 < len(experience.redundant) <= config.k
        for plan in experience.redundant:
            assert play(task, plan) == (True, len(plan))
            assert len(plan) > shortest
        assert len(experience.failed) == config.k
        for plan in experience.failed:
            assert play(task, plan) == (True, -1)
            assert len(plan) <= config.stretch * shortest
        for plan in experience.explored:
            assert play(task, plan) == (True, -1)
        assert any(len(plan) > shortest for plan in experience.explored)
        kinds = (experience.positives, experience.failed, experience.redundant)
        for plans in kinds:
            assert len(set(plans)) == len(plans)


def test_unsolved_task_has_failures_only(labelled):
    assert labelled[1][2].positives == labelled[1][2].redundant == []
    assert pairs(labelled[1][2]) == []


def test_pairs_set_the_shortest_against_what_is_worse(labelled):
    experience = labelled[1][0]
    made = pairs(experience)
    assert [p.kind for p in made] == ["failed"] * len(experience.failed) + ["redundant"] * len(
        experience.redundant
    )
    assert {p.chosen for p in made} == {experience.positives[0]}
    assert [p.rejected for p in made] == experience.failed + experience.redundant


def test_pruned_plans_have_no_needless_step(labelled):
    for task, experience in enumerate(labelled[1][:2]):
        for plan in experience.positives:
            for place in range(len(plan)):
                rest = plan[:place] + plan[place + 1 :]
                # Steps that are not legal any more are skipped, as the pruning does.
                params = jax.tree.map(lambda x, t=task: x[t : t + 1], PARAMS)
                here = np.array([[[*rest, -1]]])
                assert not replays(toy.maze, params, STARTS[task : task + 1], here)[1]


def test_prune_removes_a_detour_and_keeps_what_fails():
    detour = [0, 1, 0, 0, 0, 4, 2, 3, 2, 2, 2, -1]  # right, back, ...; down, up, ...
    hopeless = [2, 2, 3, 0, 0, 1, -1, -1, -1, -1, -1, -1]
    plans = np.array([[detour, hopeless]] * 2 + [[hopeless, hopeless]])
    short = prune(toy.maze, PARAMS, STARTS, plans)
    kept = [int(a) for a in short[0, 0] if a >= 0]
    assert kept == [0, 0, 0, 4, 2, 2, 2]
    np.testing.assert_array_equal(short[0, 1], hopeless)
    np.testing.assert_array_equal(short[2, 0], hopeless)


def test_insert_keeps_the_plan_inside_the_longer_one():
    plan = [0, 0, 0, 4, 2, 2, 2, -1]
    plans = np.array([plan] * 3)
    lots = np.random.default_rng(0).integers(-5, 5, (3, 256, 8))
    longer, fits = insert(toy.maze, PARAMS, STARTS, plans, lots)
    assert 2 <= fits[0].sum() < 256
    assert not fits[1:].any()  # not a plan of these tasks
    for row in longer[0][fits[0]]:
        whole = [int(a) for a in row if a >= 0]
        assert play(0, whole) == (True, len(whole))
        old = [int(a) for a in row[1::2]]
        assert old == plan
        assert len(whole) > 7
    assert not insert(toy.maze, PARAMS, STARTS, plans, np.full_like(lots, -1))[1].any()


def test_replays_skip_what_is_illegal():
    moves = np.array([1, 0, 3, 4, 0, -1, 0, 4, 2, 2, 2, 0])
    short = np.where(np.arange(12) < 10, moves, -1)
    plans = np.array([[moves, short]] * 3)
    accepted, solved, rewards = replays(toy.maze, PARAMS, STARTS, plans)
    assert solved[0].tolist() == [True, False]
    paid = rewards[0, 0][accepted[0, 0]].tolist()
    assert paid == pytest.approx([-0.1, -0.1, -0.1, 2, -0.1, -0.1, 2])
    assert not rewards[~accepted].any()
    kept = list(itertools.compress(moves.tolist(), accepted[0, 0].tolist()))
    assert kept == [0, 0, 0, 4, 2, 2, 2]


def test_trace_tells_what_the_tree_knows_of_each_step(labelled):
    out, experiences = labelled
    tree = mcts.tree_to_dict(out.search, 0)["nodes"]
    discount = 0.9
    found = experiences[0]
    plans = [[found.positives[0], found.failed[0]], [experiences[1].positives[0]], []]
    traced = trace(toy.maze, PARAMS, STARTS, plans, discount=discount, search=out.search)
    assert [len(row) for row in traced] == [2, 1, 0]
    below = {(node["parent"], node["action"]): node for node in tree}
    for plan, one in zip(plans[0], traced[0], strict=True):
        state, params = STARTS[0], jax.tree.map(lambda x: x[0], PARAMS)
        node, steps = 0, []
        for t, action in enumerate(plan):
            state, reward, *_ = toy.maze.step(params, state, jnp.int32(action))
            steps.append(float(reward))
            child = below.get((node, action)) if node is not None else None
            node = None if child is None else child["id"]
            assert one.visits[t] == (0 if child is None else child["visits"])
            if child is not None:  # the search's own discount was 1
                assert one.values[t] == pytest.approx(float(reward) + child["value"], abs=1e-5)
        assert one.rewards == pytest.approx(steps)
        assert one.visits[0] > 0
        for t in range(len(plan)):
            if one.visits[t] == 0:
                to_go = sum(r * discount**k for k, r in enumerate(steps[t:]))
                assert one.values[t] == pytest.approx(to_go, abs=1e-5)


def test_trace_ends_at_the_first_step_that_is_not_legal(labelled):
    plan = (0, 0, 4, 0, 2)  # the key is further on
    own = trace(toy.maze, PARAMS, STARTS, [[plan], [], []])[0][0]
    assert own.rewards == pytest.approx([-0.1, -0.1, 0, 0, 0])
    assert own.values == pytest.approx([-0.2, -0.1, 0, 0, 0])
    assert own.visits == (0,) * 5
    seen = trace(toy.maze, PARAMS, STARTS, [[plan], [], []], search=labelled[0].search)[0][0]
    assert seen.visits[0] > 0
    assert seen.visits[2:] == (0, 0, 0)


def test_bad_config_is_refused(labelled):
    with pytest.raises(EgjaxError, match="k and variants"):
        label(toy.maze, LabelConfig(k=0), PARAMS, STARTS, labelled[0], jax.random.key(0))
