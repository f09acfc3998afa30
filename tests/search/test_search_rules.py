"""Selection rules against mctx's own, and value functions in place of rollouts."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import mctx
import numpy as np
import pytest
import search_toy as toy

from egjax.errors import EgjaxError
from egjax.search import mcts
from egjax.search.rules import Node, considered_visits, gumbel, puct

A = 6
CONFIG = mcts.SearchConfig(
    simulations=120, rollouts=2, rollout_steps=8, max_depth=16, chunk=40, until_solved=False
)
PARAMS = toy.Maze(jnp.array([3, 12]), jnp.array([15, 10]), jnp.zeros(2, bool))
STARTS = jnp.array([[0, 0, 0], [3, 3, 0]])
KEYS = jax.random.split(jax.random.key(0), 2)


def random_node(seed, *, root=False):
    rng = np.random.default_rng(seed)
    visits = rng.integers(0, 4, A) * rng.integers(0, 2, A)
    q = np.where(visits > 0, rng.normal(size=A), 0.0)
    logits = rng.normal(size=A)
    logits[rng.integers(A)] = -np.inf
    visits[logits == -np.inf] = 0
    return Node(
        visits=jnp.array(visits, jnp.int32),
        q=jnp.array(q, jnp.float32),
        open=jnp.array(logits > -np.inf),
        logits=jnp.array(logits, jnp.float32),
        parent=jnp.int32(visits.sum() + 1),
        value=jnp.float32(rng.normal()),
        raw=jnp.float32(rng.normal()),
        span=jnp.float32(2.0),
        order=jnp.zeros(A),
        noise=jnp.array(rng.gumbel(size=A), jnp.float32),
        root=jnp.array(root),
    )


def tree_of(node, raw):
    """A tree for mctx that has this node as its only one."""
    row = lambda x: jnp.asarray(x)[None]  # noqa: E731
    return mctx.Tree(
        node_visits=row(node.parent),
        raw_values=row(raw),
        node_values=row(node.value),
        parents=row(jnp.int32(-1)),
        action_from_parent=row(jnp.int32(-1)),
        children_index=jnp.full((1, A), -1),
        children_prior_logits=row(node.logits),
        children_visits=row(node.visits),
        children_rewards=jnp.zeros((1, A)),
        children_discounts=jnp.ones((1, A)),
        children_values=row(node.q),
        embeddings=None,
        root_invalid_actions=(node.logits == -jnp.inf).astype(jnp.float32),
        extra_data=mctx.GumbelMuZeroExtraData(root_gumbel=node.noise),
    )


def best(node, score):
    return int(jnp.argmax(jnp.where(node.open, score, -jnp.inf)))


def test_inner_nodes_of_gumbel_are_mctx_s():
    chosen = set()
    for seed in range(40):
        node = random_node(seed)
        theirs = mctx.gumbel_muzero_interior_action_selection(
            jax.random.key(0), tree_of(node, node.raw), jnp.int32(0), jnp.int32(1)
        )
        assert best(node, gumbel(CONFIG, node)) == int(theirs)
        chosen.add(int(theirs))
    assert len(chosen) > 2


@pytest.mark.parametrize(("considered", "simulations"), [(4, 30), (16, 30), (3, 12), (1, 5)])
def test_root_of_gumbel_is_mctx_s(considered, simulations):
    """A bandit played to the end by both: the same arm at every step."""
    config = dataclasses.replace(CONFIG, simulations=simulations, considered=considered)
    pay = np.random.default_rng(considered).normal(size=A).astype(np.float32)
    node = random_node(7, root=True)._replace(visits=jnp.zeros(A, jnp.int32), q=jnp.zeros(A))
    for _ in range(simulations):
        # mctx evaluates its root by a network; ours is the prior's mean of what was tried.
        prior = np.where(node.visits > 0, jax.nn.softmax(node.logits), 0.0)
        raw = (prior * node.q).sum() / max(prior.sum(), 1e-9)
        theirs = mctx.gumbel_muzero_root_action_selection(
            jax.random.key(0),
            tree_of(node, jnp.float32(raw)),
            jnp.int32(0),
            num_simulations=simulations,
            max_num_considered_actions=considered,
        )
        arm = best(node, gumbel(config, node))
        assert arm == int(theirs)
        visits = node.visits.at[arm].add(1)
        node = node._replace(visits=visits, q=jnp.where(visits > 0, pay, 0.0))
    assert int((node.visits > 0).sum()) == min(considered, 5)  # one arm is illegal


def test_sequential_halving_by_hand():
    """Eight simulations for four actions: one each, then the better half."""
    np.testing.assert_array_equal(considered_visits(4, 8)[4], [0, 0, 0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(considered_visits(4, 8)[2], [0, 0, 1, 1, 2, 2, 3, 3])
    np.testing.assert_array_equal(considered_visits(4, 8)[1], range(8))


def test_puct_is_mctx_s():
    config = dataclasses.replace(CONFIG, exploration=0.8)

    def relative(tree, node):
        q = jnp.where(tree.children_visits[node] > 0, tree.qvalues(node), tree.node_values[node])
        return q / 2.0

    for seed in range(40):
        node = random_node(seed)
        theirs = mctx.muzero_action_selection(
            jax.random.key(0),
            tree_of(node, node.raw),
            jnp.int32(0),
            jnp.int32(0),
            pb_c_init=0.8,
            pb_c_base=1e9,
            qtransform=relative,
        )
        assert best(node, puct(config, node)) == int(theirs)


def test_closed_arms_take_nothing_from_the_rest():
    """Every pull ends the game, so arms close one by one; all legal ones are tried once."""
    pay = jnp.array([[0.1, 0.9, 0.5, 0.7], [0.4, 0.2, 0.3, 0.1]])
    legal = jnp.array([[True] * 4, [True, False, True, False]])
    for rule in ("puct", "gumbel"):
        config = dataclasses.replace(CONFIG, rule=rule, simulations=8, chunk=8, considered=2)
        out = mcts.search(toy.bandit, config, toy.Arms(pay, legal), jnp.zeros(2, jnp.int32), KEYS)
        np.testing.assert_array_equal(out.root_visits, legal.astype(np.int32))
        np.testing.assert_array_equal(out.actions[:, 0], [1, 0])


def right_way(params, state, legal):
    """Logits that prefer what a person would do: to the key, take it, to the door."""
    goal = jnp.where(state[2] > 0, params.door, params.key)
    dx, dy = goal // 4 - state[0], goal % 4 - state[1]
    wish = jnp.array([dy > 0, dy < 0, dx > 0, dx < 0, (dx == 0) & (dy == 0)])
    return 4.0 * (wish & legal)


def distance(params, state):
    """The true return from here, if walls are not in the way."""

    def steps(a, b):
        return jnp.abs(a // 4 - b // 4) + jnp.abs(a % 4 - b % 4)

    here = state[0] * 4 + state[1]
    to_key = steps(here, params.key) + 1 + steps(params.key, params.door)
    with_key = 2.0 - 0.1 * (steps(here, params.door) - 1)
    return jnp.where(state[2] > 0, with_key, 4.0 - 0.1 * (to_key - 2))


GUIDED = toy.maze._replace(prior=right_way, value=distance)


@pytest.mark.parametrize("rule", ["puct", "gumbel"])
def test_prior_leads_the_way(rule):
    """A prior that knows the way draws the first visits, its opposite sends them elsewhere."""
    config = dataclasses.replace(
        CONFIG, rule=rule, exploration=4.0, value_weight=1.0, simulations=4, chunk=4, considered=1
    )
    flat = toy.maze._replace(value=lambda params, state: jnp.float32(0.0))
    wish = np.asarray(jax.vmap(right_way)(PARAMS, STARTS, jnp.ones((2, 5), bool))) > 0
    shares = []
    for sign in (1.0, -1.0):
        world = flat._replace(prior=lambda *given, sign=sign: sign * right_way(*given))
        out = mcts.search(world, config, PARAMS, STARTS, KEYS)
        shares.append((out.root_visits * wish).sum() / out.root_visits.sum())
    assert shares[0] > shares[1]


def test_value_function_takes_the_place_of_rollouts():
    config = dataclasses.replace(CONFIG, value_weight=1.0, until_solved=True, chunk=1)
    out = mcts.search(GUIDED, config, PARAMS, STARTS, KEYS)
    assert out.record.length.shape[2] == 1
    for b in range(2):
        best = toy.shortest(int(PARAMS.key[b]), int(PARAMS.door[b]), tuple(STARTS[b].tolist()))
        assert out.solved[b]
        assert out.length[b] == best
        tree, end = out.search.tree, np.asarray(out.search.end[b])
        for node in range(1, int(out.search.simulation)):
            one = jax.tree.map(lambda x, b=b: x[b], PARAMS)
            own = 0.0 if end[node] else float(distance(one, tree.embeddings[b, node]))
            assert float(tree.raw_values[b, node]) == pytest.approx(own, abs=1e-5)
    wrong = GUIDED._replace(value=lambda *given: -distance(*given))
    misled = mcts.search(wrong, config, PARAMS, STARTS, KEYS)
    assert out.simulations.sum() < misled.simulations.sum()


def test_leaf_value_is_a_mixture():
    config = dataclasses.replace(CONFIG, value_weight=0.25, simulations=30, chunk=30)
    out = mcts.search(GUIDED, config, PARAMS, STARTS, KEYS)
    tree = out.search.tree
    for node in range(1, 31):
        number, so_far = node, 0.0
        while number:
            parent, action = int(tree.parents[0, number]), int(tree.action_from_parent[0, number])
            so_far += float(tree.children_rewards[0, parent, action])
            number = parent
        rollouts = float(out.record.returns[node - 1, 0].mean()) - so_far
        one = jax.tree.map(lambda x: x[0], PARAMS)
        own = float(distance(one, tree.embeddings[0, node]))
        own = 0.0 if int(out.search.end[0, node]) else own
        wanted = 0.75 * rollouts + 0.25 * own
        assert float(tree.raw_values[0, node]) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "best"}, "no rule 'best'"),
        ({"value_weight": 1.5}, r"value_weight must be in \[0, 1\]"),
        ({"value_weight": 0.5}, "value_weight without a value function"),
        ({"considered": 0}, "considered must be at least 1"),
        ({"discount": 0.0}, r"SearchConfig.discount: 0.0 is not in \(0, 1\]"),
        ({"discount": float("nan")}, "nan is not in"),
    ],
)
def test_bad_config_is_refused(change, message):
    with pytest.raises(EgjaxError, match=message):
        mcts.search(toy.maze, dataclasses.replace(CONFIG, **change), PARAMS, STARTS, KEYS)
