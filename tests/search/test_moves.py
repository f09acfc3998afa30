"""Subtree reuse against a rebuild in plain Python, and games played move by move."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import search_toy as toy

from egjax.errors import EgjaxError
from egjax.search import mcts
from egjax.search.moves import choose, plan, reroot

CONFIG = mcts.SearchConfig(
    simulations=160, rollouts=2, rollout_steps=8, max_depth=7, chunk=40, until_solved=False
)
PARAMS = toy.Maze(jnp.array([3, 12, 15, 5]), jnp.array([15, 10, 1, 14]), jnp.zeros(4, bool))
STARTS = jnp.array([[0, 0, 0], [3, 3, 0], [0, 3, 0], [2, 1, 0]])
KEYS = jax.random.split(jax.random.key(0), 4)


def grown(config=CONFIG, simulations=120):
    state = mcts.plant(toy.maze, config, PARAMS, STARTS, KEYS)
    return mcts.resume(toy.maze, config, PARAMS, state, simulations).search


def copy(state):
    """`reroot` and `resume` consume what they are given."""
    return jax.tree.map(jnp.copy, state)


def rebuild(state, b, action):
    """What is left of tree b after an action: nodes as dicts, by a walk in plain Python."""
    nodes = mcts.tree_to_dict(state, b)["nodes"]
    tree = state.tree
    top = next(n["id"] for n in nodes if n["parent"] == 0 and n["action"] == action)
    number, out = {top: 0}, []
    for node in nodes:
        old = node["id"]
        if old != top and node["parent"] not in number:
            continue
        number.setdefault(old, len(number))
        out.append(
            {
                "parent": None if old == top else number[node["parent"]],
                "action": None if old == top else node["action"],
                "depth": node["depth"] - 1,
                "state": tuple(np.asarray(tree.embeddings[b, old]).tolist()),
                "raw": float(tree.raw_values[b, old]),
                "reward": float(tree.children_rewards[b, node["parent"], node["action"]]),
            }
        )
    # Visits and values are those of a tree that never had more than these nodes.
    for i, node in enumerate(out):
        node["returns"] = [node["raw"]]
        gain, above = node["raw"], i
        while out[above]["parent"] is not None:
            gain += out[above]["reward"]
            above = out[above]["parent"]
            out[above]["returns"].append(gain)
    params = jax.tree.map(lambda x: x[b], PARAMS)
    for i in reversed(range(len(out))):
        node = out[i]
        x, y, _ = node["state"]
        twins = [m for m in out[:i] if m["state"] == node["state"] and m["depth"] <= node["depth"]]
        closed = x * 4 + y == int(params.door) or twins or node["depth"] >= CONFIG.max_depth
        legal = np.asarray(toy.maze.legal(params, jnp.array(node["state"])))
        node["open"] = legal & (not closed)
        for child in out[i + 1 :]:
            if child["parent"] == i and not child["open"].any():
                node["open"][child["action"]] = False
    return out


@pytest.fixture(scope="module")
def before():
    return grown()


@pytest.fixture(scope="module")
def moved(before):
    actions = choose(before)
    return actions, reroot(toy.maze, CONFIG, PARAMS, copy(before), jnp.asarray(actions))


def test_subtree_is_what_a_rebuild_gives(before, moved):
    actions, after = moved
    for b in range(4):
        expected = rebuild(before, b, int(actions[b]))
        nodes = mcts.tree_to_dict(after, b)["nodes"]
        assert len(nodes) == len(expected) > 3
        for i, (node, wanted) in enumerate(zip(nodes, expected, strict=True)):
            assert node["id"] == i
            for name in ("parent", "action", "depth"):
                assert node[name] == wanted[name]
            assert node["visits"] == len(wanted["returns"])
            assert node["value"] == pytest.approx(np.mean(wanted["returns"]), abs=1e-4)
            np.testing.assert_array_equal(after.open[b, i], wanted["open"])
            np.testing.assert_array_equal(after.tree.embeddings[b, i], wanted["state"])
            if wanted["parent"] is not None:
                edge = b, wanted["parent"], wanted["action"]
                assert after.tree.children_index[edge] == i
                assert after.tree.children_visits[edge] == node["visits"]
                assert float(after.tree.children_rewards[edge]) == pytest.approx(wanted["reward"])
        rest = slice(len(nodes), None)
        assert not after.open[b, rest].any()
        assert (np.asarray(after.tree.node_visits[b, rest]) == 0).all()
        assert (np.asarray(after.tree.parents[b, rest]) == -1).all()


def test_what_was_closed_by_forgotten_nodes_opens_again(before, moved):
    """Some node was at the depth limit or repeated a node outside; else the test above is easy."""
    actions, after = moved
    reopened = 0
    for b in range(4):
        old = mcts.tree_to_dict(before, b)["nodes"]
        kept, names = {}, {}
        top = next(n["id"] for n in old if n["parent"] == 0 and n["action"] == actions[b])
        for node in old:
            if node["id"] == top or node["parent"] in names:
                names[node["id"]] = len(names)
                kept[names[node["id"]]] = node
        new = mcts.tree_to_dict(after, b)["nodes"]
        reopened += sum(kept[n["id"]]["closed"] and not n["closed"] for n in new)
        assert not any(n["closed"] and not kept[n["id"]]["closed"] for n in new)
    assert reopened > 0


def test_search_goes_on_in_the_smaller_tree(moved):
    _, after = moved
    out = mcts.resume(toy.maze, CONFIG, PARAMS, copy(after), 40)
    for b in range(4):
        nodes = {n["id"]: n for n in mcts.tree_to_dict(out.search, b)["nodes"]}
        for number, node in nodes.items():
            children = [n for n in nodes.values() if n["parent"] == number]
            assert node["visits"] == 1 + sum(n["visits"] for n in children)
        assert nodes[0]["visits"] > int(after.tree.node_visits[b, 0])


def test_best_trajectory_loses_its_first_step(before, moved):
    actions, after = moved
    for b in range(4):
        old = np.asarray(before.best[b])
        assert old[0] == actions[b]  # all are solved, so the advice is to follow the solution
        np.testing.assert_array_equal(np.asarray(after.best[b])[:-1], old[1:])
        assert int(after.best_length[b]) == int(before.best_length[b]) - 1
    np.testing.assert_array_equal(after.solved, before.solved)


def test_solved_node_of_the_subtree_serves_where_the_best_trajectory_left_it():
    config = dataclasses.replace(CONFIG, simulations=200, chunk=200, max_depth=12)
    state = grown(config, 200)
    actions = jnp.asarray(state.best[:, 0], jnp.int32)
    lengths = np.asarray(state.best_length)
    other = state.best.at[:, 0].set((state.best[:, 0] + 1) % 5)
    after = reroot(toy.maze, config, PARAMS, dataclasses.replace(state, best=other), actions)
    found = 0
    for b in range(4):
        solved = [n["depth"] for n in mcts.tree_to_dict(after, b)["nodes"] if n["solved"]]
        assert bool(after.solved[b]) == bool(solved)
        if solved:
            found += 1
            assert int(after.best_length[b]) == min(solved) >= lengths[b] - 1
            way = np.asarray(after.best[b])
            assert (way >= 0).sum() == min(solved)
            assert play(b, np.asarray(after.tree.embeddings[b, 0]), way)
            assert float(after.best_return[b]) == pytest.approx(returns(b, after, way), abs=1e-4)
    assert found >= 2


def returns(b, state, actions):
    """Sum of rewards from the root on."""
    params, total = jax.tree.map(lambda x: x[b], PARAMS), 0.0
    embedding = state.tree.embeddings[b, 0]
    for action in actions[actions >= 0]:
        embedding, reward, _, _ = toy.maze.step(params, embedding, jnp.int32(action))
        total += float(reward)
    return total


def play(b, state, actions):
    """Whether legal steps end at the door."""
    params, solved = jax.tree.map(lambda x: x[b], PARAMS), False
    for action in actions[actions >= 0]:
        assert not solved
        assert toy.maze.legal(params, jnp.asarray(state))[action]
        state, _, solved, _ = toy.maze.step(params, jnp.asarray(state), jnp.int32(action))
    return bool(solved)


def test_staying_changes_nothing_but_the_count(before):
    after = reroot(toy.maze, CONFIG, PARAMS, copy(before), jnp.full(4, -1))
    for name in ("tree", "open", "end", "depth", "prints", "best", "keys"):
        for one, two in zip(
            jax.tree.leaves(getattr(after, name)),
            jax.tree.leaves(getattr(before, name)),
            strict=True,
        ):
            np.testing.assert_array_equal(
                jax.random.key_data(one) if name == "keys" else one,
                jax.random.key_data(two) if name == "keys" else two,
            )


def test_illegal_action_is_refused(before):
    illegal = (np.asarray(before.tree.children_prior_logits[:, 0]) == -np.inf).argmax(1)
    with pytest.raises(EgjaxError, match="is not legal in tree 0"):
        reroot(toy.maze, CONFIG, PARAMS, copy(before), jnp.asarray(illegal))


def test_a_step_that_was_never_tried_leads_to_a_new_root():
    state = mcts.plant(toy.maze, CONFIG, PARAMS, STARTS, KEYS)
    legal = np.asarray(state.open[:, 0])
    actions = legal.argmax(1)
    after = reroot(toy.maze, CONFIG, PARAMS, state, jnp.asarray(actions))
    for b in range(4):
        params = jax.tree.map(lambda x, b=b: x[b], PARAMS)
        here, _, _, _ = toy.maze.step(params, STARTS[b], jnp.int32(actions[b]))
        np.testing.assert_array_equal(after.tree.embeddings[b, 0], here)
        np.testing.assert_array_equal(after.open[b, 0], toy.maze.legal(params, here))
    assert int(after.simulation) == 0
    out = mcts.resume(toy.maze, CONFIG, PARAMS, after, 160)
    assert out.solved.any()


@pytest.mark.parametrize("rule", ["uct", "gumbel"])
def test_game_is_won_and_trees_do_not_depend_on_each_other(rule):
    """Small searches before each move, none of which sees the door from the start at once."""
    config = dataclasses.replace(CONFIG, rule=rule, simulations=400, chunk=20, until_solved=True)
    games = plan(toy.maze, config, PARAMS, STARTS, KEYS, moves=30, simulations=20)
    assert games.solved.all()
    for b in range(4):
        assert play(b, np.asarray(STARTS[b]), games.actions[:, b])
    assert (games.visits.sum(-1)[0] > 0).all()
    if rule == "gumbel":
        return
    alone = plan(
        toy.maze,
        config,
        jax.tree.map(lambda x: x[:1], PARAMS),
        STARTS[:1],
        KEYS[:1],
        moves=30,
        simulations=20,
    )
    length = int((alone.actions >= 0).sum())
    np.testing.assert_array_equal(alone.actions[:length, 0], games.actions[:length, 0])


@pytest.mark.parametrize(("most", "each"), [(400, 8), (8, 400)])
def test_less_than_a_chunk_of_simulations_is_refused(most, each):
    config = dataclasses.replace(CONFIG, simulations=most, chunk=20)
    with pytest.raises(EgjaxError, match="less than a chunk of 20"):
        plan(toy.maze, config, PARAMS, STARTS, KEYS, moves=3, simulations=each)
