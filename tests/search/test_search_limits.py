"""Limits, memory, resumption, and eight devices against one."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import search_toy as toy
from processes import cpus

from egjax.errors import EgjaxError
from egjax.search import mcts

CONFIG = mcts.SearchConfig(
    simulations=60, rollouts=2, rollout_steps=12, max_depth=20, chunk=20, until_solved=False
)
PARAMS = toy.Maze(jnp.array([3, 12, 15, 5]), jnp.array([15, 10, 1, 14]), jnp.zeros(4, bool))
STARTS = jnp.array([[0, 0, 0], [3, 3, 0], [0, 3, 0], [2, 1, 0]])
KEYS = jax.random.split(jax.random.key(0), 4)


def test_time_limit_ends_the_search_at_the_next_chunk():
    config = dataclasses.replace(CONFIG, seconds=1e-9)
    out = mcts.search(toy.maze, config, PARAMS, STARTS, KEYS)
    assert int(out.search.simulation) == 20
    assert len(out.record.length) == 20


def test_two_halves_are_a_whole():
    whole = mcts.search(toy.maze, CONFIG, PARAMS, STARTS, KEYS)
    state = mcts.plant(toy.maze, CONFIG, PARAMS, STARTS, KEYS)
    first = mcts.resume(toy.maze, CONFIG, PARAMS, state, 40)
    second = mcts.resume(toy.maze, CONFIG, PARAMS, first.search, 20)
    np.testing.assert_array_equal(second.root_visits, whole.root_visits)
    np.testing.assert_array_equal(second.actions, whole.actions)
    both = np.concatenate([first.record.actions, second.record.actions])
    np.testing.assert_array_equal(both, whole.record.actions)
    with pytest.raises(EgjaxError, match="room for 0"):
        mcts.resume(toy.maze, CONFIG, PARAMS, second.search, 1)


@pytest.mark.parametrize(
    "config", [CONFIG, dataclasses.replace(CONFIG, simulations=7, max_depth=9, value_weight=1.0)]
)
def test_memory_is_known_before(config):
    """The prediction against the arrays that a search holds."""
    world = toy.maze._replace(value=lambda params, state: jnp.float32(0.0))
    predicted = mcts.tree_bytes(config, 5, STARTS[0])
    state = mcts.plant(world, config, PARAMS, STARTS, KEYS)
    leaves = jax.tree.leaves(dataclasses.replace(state, keys=jax.random.key_data(state.keys)))
    shared = state.simulation.nbytes + state.turn.nbytes
    assert sum(x.nbytes for x in leaves) - shared == 4 * predicted


_EIGHT = """
import sys
import jax, jax.numpy as jnp, numpy as np
import search_toy as toy
from egjax.errors import EgjaxError
from egjax.mesh import make_mesh
from egjax.search import mcts
from egjax.search.moves import plan

assert jax.device_count() == 8
rng = np.random.default_rng(0)
params = toy.Maze(jnp.array(rng.permutation(16)[:8]), jnp.array([15, 10, 1, 14, 9, 7, 2, 6]),
                  jnp.arange(8) == 5)
starts = jnp.array([[0, 0, 0], [3, 3, 0], [0, 3, 0], [2, 1, 0]] * 2)
keys = jax.random.split(jax.random.key(0), 8)
config = mcts.SearchConfig(simulations=60, rollouts=2, rollout_steps=12, max_depth=20, chunk=20,
                           until_solved=False)
mesh = make_mesh()
one = mcts.search(toy.maze, config, params, starts, keys)
eight = mcts.search(toy.maze, config, params, starts, keys, mesh=mesh)
assert len(eight.search.tree.node_values.sharding.device_set) == 8
def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
same(one[:7], eight[:7])
# Sums of floats may be taken in another order; nothing that the search decides by differs.
for x, y in zip(jax.tree.leaves(one.search.tree), jax.tree.leaves(eight.search.tree), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
same(one.search.open, eight.search.open)
games = [plan(toy.maze, config, params, starts, keys, moves=2, simulations=20, mesh=m).actions
         for m in (None, mesh)]
same(*games)
try:
    mcts.plant(toy.maze, config, jax.tree.map(lambda x: x[:6], params), starts[:6], keys[:6], mesh)
except EgjaxError as error:
    assert "does not split over 8 devices" in str(error)
else:
    raise AssertionError("six tasks on eight devices")
print("same", one.solved.sum(), len(games[0]))
"""


def test_eight_devices_give_the_answer_of_one():
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", _EIGHT],
        capture_output=True,
        text=True,
        env={**os.environ, **cpus(8), "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["same", "7", "2"]
