"""Best-first search against brute force on the puzzle, and relaxed plans on the embedded homes."""

from __future__ import annotations

import heapq

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import search_toy as toy
from test_search_actions import CABINET, CUP, TABLE, graph

from egjax.errors import EgjaxError
from egjax.search.actions import action_table, encode_actions
from egjax.search.best_first import best_first
from egjax.search.household import begin, household, same_state
from egjax.search.relaxed import relaxed_plan
from egjax.sim.goals import GoalSizes, Predicate, encode_goal, goal_predicates
from egjax.sim.graph import Sizes, encode
from egjax.sim.household import home_programs
from egjax.types import Task

TASKS = [(3, 15, (0, 0, 0)), (12, 10, (3, 3, 0)), (15, 1, (0, 3, 0)), (5, 14, (2, 1, 0))]


def puzzle(key, door, *, stuck=False):
    return toy.Maze(jnp.int32(key), jnp.int32(door), jnp.array(stuck))


def dijkstra(key, door, start, costs):
    """Cheapest cost by brute force over (x, y, key)."""
    params, queue, known = puzzle(key, door), [(0.0, start)], {}
    legal, step = jax.jit(toy.maze.legal), jax.jit(toy.maze.step)
    while queue:
        paid, state = heapq.heappop(queue)
        if known.setdefault(state, paid) < paid:
            continue
        if state[0] * 4 + state[1] == door:
            return paid
        for action in np.flatnonzero(legal(params, jnp.array(state))):
            after, _, _, _ = step(params, jnp.array(state), int(action))
            after = tuple(np.asarray(after).tolist())
            if known.get(after, np.inf) > paid + costs[action]:
                heapq.heappush(queue, (paid + costs[action], after))
    return np.inf


@pytest.mark.parametrize(("key", "door", "start"), TASKS)
def test_breadth_first_plans_are_shortest_and_proved(key, door, start):
    found = best_first(toy.maze, puzzle(key, door), jnp.array(start), batch=4)
    assert found.optimal
    assert found.cost == found.bound == len(found.plan) == toy.shortest(key, door, start)
    state, solved = jnp.array(start), False
    for action in found.plan:
        assert not solved
        assert toy.maze.legal(puzzle(key, door), state)[action]
        state, _, solved, _ = toy.maze.step(puzzle(key, door), state, jnp.int32(action))
    assert solved


@pytest.mark.parametrize("seed", range(4))
def test_costs_are_honoured(seed):
    costs = np.random.default_rng(seed).integers(0, 4, 5).astype(float)
    key, door, start = TASKS[seed]
    found = best_first(toy.maze, puzzle(key, door), jnp.array(start), costs=costs, batch=4)
    assert found.optimal
    assert found.cost == dijkstra(key, door, start, costs) == costs[list(found.plan)].sum()


def test_bound_holds_where_the_search_was_cut_short():
    key, door, start = TASKS[0]
    least = toy.shortest(key, door, start)
    bounds = []
    for limit in (2, 8, 16):
        found = best_first(toy.maze, puzzle(key, door), jnp.array(start), limit=limit, batch=2)
        assert found.plan is None
        assert not found.optimal
        bounds.append(found.bound)
    assert 1 < bounds[0] < bounds[1] < bounds[2] <= least


def test_no_way_out_is_proved():
    found = best_first(toy.maze, puzzle(3, 15, stuck=True), jnp.array([0, 0, 0]))
    assert found.plan is None
    assert found.bound == np.inf
    assert (found.expanded, found.seen) == (1, 1)


def test_estimate_saves_work():
    def ahead(params, state):
        goal = jnp.where(state[2] > 0, params.door, params.key)
        far = jnp.abs(goal // 4 - state[0]) + jnp.abs(goal % 4 - state[1])
        return far + jnp.where(state[2] > 0, 0.0, 7.0)

    key, door, start = TASKS[0]
    blind = best_first(toy.maze, puzzle(key, door), jnp.array(start), batch=1)
    led = best_first(toy.maze, puzzle(key, door), jnp.array(start), batch=1, estimate=ahead)
    assert len(led.plan) == len(blind.plan)
    assert led.expanded < blind.expanded / 2


def test_bad_arguments_are_refused():
    with pytest.raises(EgjaxError, match="limit and batch"):
        best_first(toy.maze, puzzle(3, 15), jnp.array([0, 0, 0]), batch=0)
    with pytest.raises(EgjaxError, match="cost of at least 0"):
        best_first(toy.maze, puzzle(3, 15), jnp.array([0, 0, 0]), costs=[-1.0] * 5)


# --- the household ------------------------------------------------------------------------------

NAMES = ("cottage1", "cottage4", "cottage7", "flat13", "flat14")
WORLD = household()


@pytest.fixture(scope="module")
def tasks():
    rows = []
    for program in home_programs():
        if program.name not in NAMES:
            continue
        wanted = goal_predicates(program.init, program.final, close=True)
        scene, state, names = encode(program.init, Sizes(nodes=64))
        goal = encode_goal(wanted, names, nodes=64, sizes=GoalSizes(10, 32))
        table = action_table(program.init, wanted)
        actions = encode_actions(table, names.index, size=24, objects=12)
        rows.append(jax.tree.map(jnp.asarray, Task(scene, state, goal, actions)))
    return rows


def test_relaxed_plans_shrink_to_nothing_on_the_way(tasks):
    """Against proved optima: the estimate is 0 at the goal and only there, near the truth at the
    start, and most steps of the optimal plan are among those that it calls helpful."""
    step = jax.jit(WORLD.step)
    estimate = jax.jit(
        lambda task, here: relaxed_plan(task.scene, task.actions, task.goal, here.state, here.held)
    )
    for task in tasks:
        here = begin(task)
        least = best_first(WORLD, task, here, identity=same_state, limit=4000)
        assert least.optimal
        first = estimate(task, here)
        assert 0.5 * least.cost <= float(first.steps) <= 2.0 * least.cost + 1
        assert not (np.asarray(first.helpful) & ~np.asarray(task.actions.mask)).any()
        helpful = []
        for action in least.plan:
            now = estimate(task, here)
            assert float(now.steps) > 0
            helpful.append(bool(now.helpful[action]))
            here, _, solved, _ = step(task, here, jnp.int32(action))
        assert solved
        assert float(estimate(task, here).steps) == 0
        assert np.mean(helpful) >= 0.5


def test_estimate_counts_what_has_to_be_done():
    """Steps by hand: closed container, cup inside, table elsewhere: walk, open, grab, walk, put."""
    home = graph(CUP, CABINET, TABLE, edges=[(3, "INSIDE", 4), (3, "CLOSE", 4), (4, "CLOSE", 3)])
    goal = [Predicate("ON", "cup", "table")]
    scene, state, names = encode(home, Sizes(nodes=32))
    table = action_table(home, goal)
    task = Task(
        scene, state, encode_goal(goal, names, nodes=32), encode_actions(table, names.index)
    )
    task = jax.tree.map(jnp.asarray, task)
    relaxed = jax.jit(relaxed_plan)(
        task.scene, task.actions, task.goal, task.state, jnp.zeros(1, bool)
    )
    assert float(relaxed.steps) == 5
    named = {(a.verb, a.obj) for a, ok in zip(table, relaxed.helpful, strict=True) if ok}
    assert {("OPEN", 4), ("GRAB", 3), ("PUTBACK", 3)} <= named
