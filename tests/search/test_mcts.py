"""The search against bandits with a known answer and a puzzle solved by brute force."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import search_toy as toy

from egjax.errors import EgjaxError
from egjax.search import mcts

CONFIG = mcts.SearchConfig(
    simulations=400,
    rollouts=2,
    rollout_steps=12,
    max_depth=20,
    exploration=0.5,
    chunk=50,
    until_solved=False,
)


def mazes():
    params = toy.Maze(jnp.array([3, 12, 15, 5]), jnp.array([15, 10, 1, 14]), jnp.zeros(4, bool))
    starts = jnp.array([[0, 0, 0], [3, 3, 0], [0, 3, 0], [2, 1, 0]])
    return params, starts, jax.random.split(jax.random.key(0), 4)


@pytest.fixture(scope="module")
def found():
    params, starts, keys = mazes()
    return mcts.search(toy.maze, CONFIG, params, starts, keys)


def test_bandit_tries_each_legal_arm_once_and_stops():
    pay = jnp.array([[0.1, 0.9, 0.5, 0.7], [0.4, 0.2, 0.3, 0.1], [0.0, 0.0, 0.0, 1.0]])
    legal = jnp.array([[True] * 4, [True, False, True, False], [True] * 4])
    config = dataclasses.replace(CONFIG, simulations=16, chunk=8, max_depth=3)
    out = mcts.search(
        toy.bandit,
        config,
        toy.Arms(pay, legal),
        jnp.zeros(3, jnp.int32),
        jax.random.split(jax.random.key(1), 3),
    )
    np.testing.assert_array_equal(out.root_visits, legal.astype(np.int32))
    np.testing.assert_array_equal(out.actions[:, 0], [1, 0, 3])
    np.testing.assert_allclose(out.returns, [0.9, 0.4, 1.0])
    np.testing.assert_allclose(
        out.search.tree.node_values[:, 0], [np.mean(pay[0]), 0.35, 0.25], rtol=1e-6
    )
    np.testing.assert_array_equal(out.simulations, [4, 2, 4])
    assert int(out.search.simulation) == 8  # exhausted: it does not go on to 16


def test_solutions_are_shortest(found):
    params, starts, _ = mazes()
    assert found.solved.all()
    for b in range(4):
        best = toy.shortest(int(params.key[b]), int(params.door[b]), tuple(starts[b].tolist()))
        assert found.length[b] == best


def test_record_replays_legally_to_what_it_says(found):
    params, starts, _ = mazes()
    record = found.record
    for b in range(4):
        for s in range(0, len(record.length), 17):
            one = jax.tree.map(lambda x, b=b: x[b], params)
            state, total, solved = starts[b], 0.0, False
            plan = record.actions[s, b, 0]
            assert (plan >= 0).sum() == record.length[s, b, 0]
            for action in plan[plan >= 0]:
                assert not solved
                assert bool(toy.maze.legal(one, state)[action])
                state, reward, solved, _ = toy.maze.step(one, state, jnp.int32(action))
                total += float(reward)
            assert total == pytest.approx(float(record.returns[s, b, 0]), abs=1e-4)
            assert bool(solved) == (record.solved_at[s, b, 0] == record.length[s, b, 0])


def test_batch_is_loop(found):
    params, starts, keys = mazes()
    for b in (0, 2):
        alone = mcts.search(
            toy.maze,
            CONFIG,
            jax.tree.map(lambda x, b=b: x[b : b + 1], params),
            starts[b : b + 1],
            keys[b : b + 1],
        )
        np.testing.assert_array_equal(alone.actions[0], found.actions[b])
        np.testing.assert_array_equal(alone.root_visits[0], found.root_visits[b])
        np.testing.assert_array_equal(alone.record.actions[:, 0], found.record.actions[:, b])


def test_tree_is_sound(found):
    """Means, counts and closures agree with a walk over the tree in plain Python."""
    for b in range(4):
        nodes = {n["id"]: n for n in mcts.tree_to_dict(found.search, b)["nodes"]}
        tree = found.search.tree
        assert nodes[0]["visits"] == len(nodes) - 1
        for number, node in nodes.items():
            if number == 0:
                continue
            parent, action = node["parent"], node["action"]
            assert node["depth"] == nodes[parent]["depth"] + 1
            assert tree.children_index[b, parent, action] == number
            assert tree.children_visits[b, parent, action] == node["visits"]
            assert tree.children_values[b, parent, action] == pytest.approx(node["value"])
            children = [n for n in nodes.values() if n["parent"] == number]
            own = float(tree.raw_values[b, number])
            total = own + sum(
                n["visits"] * (n["value"] + float(tree.children_rewards[b, number, n["action"]]))
                for n in children
            )
            assert node["visits"] == 1 + sum(n["visits"] for n in children)
            assert node["value"] == pytest.approx(total / node["visits"], abs=1e-3)


def test_nothing_is_spent_below_ends_and_repetitions(found):
    for b in range(4):
        tree, depth = found.search.tree, np.asarray(found.search.depth[b])
        states = np.asarray(tree.embeddings[b])
        inner = {int(p) for p in np.asarray(tree.parents[b]) if p >= 0}
        door = int(mazes()[0].door[b])
        assert not any(states[n][0] * 4 + states[n][1] == door for n in inner)
        # No state is searched below twice, unless the second way to it is shorter.
        by_state: dict[tuple, list[int]] = {}
        for n in sorted(inner):
            by_state.setdefault(tuple(states[n].tolist()), []).append(depth[n])
        for depths in by_state.values():
            assert all(later < earlier for earlier, later in itertools.pairwise(depths))


def test_exhausted_tree_adds_nothing():
    params, starts, keys = mazes()
    params = params._replace(stuck=jnp.array([True, False, True, False]))
    out = mcts.search(toy.maze, CONFIG, params, starts, keys)
    np.testing.assert_array_equal(out.solved, [False, True, False, True])
    np.testing.assert_array_equal(out.simulations[[0, 2]], 0)
    np.testing.assert_array_equal(out.length[[0, 2]], 0)
    assert out.root_visits[0].sum() == 0
    assert (out.record.actions[:, 0] == -1).all()
    assert len(mcts.tree_to_dict(out.search, 0)["nodes"]) == 1


def test_discount_and_depth_limit():
    """Never deeper than allowed; values are discounted sums."""
    config = dataclasses.replace(
        CONFIG, simulations=50, max_depth=2, rollout_steps=1, rollouts=1, discount=0.5
    )
    params, starts, keys = mazes()
    out = mcts.search(toy.maze, config, params, starts, keys)
    depth = np.asarray(out.search.depth)
    assert depth[depth < 1000].max() == 2
    assert out.record.length.max() == 3
    full = out.record.returns[(out.record.length == 3) & (out.record.returns < 0)]
    np.testing.assert_allclose(full, -0.1 * (1 + 0.5 + 0.25), rtol=1e-5)


def test_early_stop_and_progress():
    seen = []
    config = dataclasses.replace(CONFIG, until_solved=True)
    out = mcts.search(
        toy.maze, config, *mazes(), progress=lambda n, solved: seen.append((n, solved.sum()))
    )
    assert out.solved.all()
    assert seen[-1] == (int(out.search.simulation), 4)
    assert all(solved < 4 for _, solved in seen[:-1])
    assert (out.simulations <= seen[-1][0]).all()


def test_json_round_trip(found):
    labels = ["right", "left", "down", "up", "take"]
    tree = mcts.tree_to_dict(found.search, 1, labels)
    assert json.loads(json.dumps(tree)) == tree
    assert {node["action"] for node in tree["nodes"]} <= {*labels, None}


def test_bad_config_is_refused():
    with pytest.raises(EgjaxError, match="rollouts"):
        mcts.search(toy.maze, dataclasses.replace(CONFIG, rollouts=0), *mazes())


@pytest.mark.parametrize("draw", [0.0, 0.3, 0.999999])
def test_pick_never_takes_weight_zero(draw):
    weights = jnp.array([0.0, 0.5, 0.0, 2.0, 0.0])
    assert int(mcts.pick(weights, jnp.float32(draw))) in (1, 3)


def test_cost_of_a_simulation_does_not_grow():
    """Least CPU time of 16 simulations, trees of 1,024 against 128. A backup that carries the whole
    tree grows eightfold; a busy machine must not count."""
    world = mcts.World(
        lambda p, e: jnp.ones(64, bool),
        lambda p, e, a: ((e * 31 + a + 1) % 10007, jnp.float32(-0.1), e < 0, e < 0),
    )
    rates = []
    for simulations in (128, 1024):
        config = mcts.SearchConfig(
            simulations=simulations, rollouts=1, rollout_steps=4, chunk=16, max_depth=16
        )
        params, keys = jnp.zeros(32), jax.random.split(jax.random.key(0), 32)
        state = jax.jit(mcts.begin, static_argnums=(0, 1))(
            world, config, params, jnp.arange(32), keys
        )
        times = []
        for _ in range(simulations // 16):
            started = time.process_time()
            state, record = mcts.advance(world, config, params, state, 16)
            jax.block_until_ready(record)
            times.append(time.process_time() - started)
        rates.append(np.min(times[1:]))
    assert rates[1] < 3.0 * rates[0]
