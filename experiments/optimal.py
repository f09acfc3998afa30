"""How far from the shortest are the plans? Breadth-first search over the same action table.

    python -m experiments.optimal --tasks FILE [--free-find]

Every state that a task's action table leads to is visited once, in order of the number of steps,
until a goal state is met (its plan is then proved to be a shortest one) or `--limit` states are
known (then all shorter plans than the bound are ruled out). Compared with it: the first plan of
`experiments.collect`, the same without needless steps, and the greedy best-first plan over relaxed
plans. With `--free-find` steps are counted as for the human programs, FIND left out.
Expected: proofs for 20 of E2WM's 20 sample tasks in a quarter of a minute on two CPU cores
(compilation apart).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from egjax.errors import EgjaxError
from egjax.evals.intervals import Figure
from egjax.search import best_first as exact
from egjax.search.household import Rewards, begin, same_state, steps_to_go
from egjax.search.label import prune
from egjax.search.mcts import SearchConfig, World
from egjax.sim.robothow import read_names
from egjax.sim.text import Line
from egjax.sim.vocab import VERB_INDEX
from egjax.types import Task
from experiments.collect import Config as Collect
from experiments.collect import Problem, find_plans, shared_world
from experiments.common import emit, note, run_main
from experiments.data import make_task, programs

__all__ = ["Config"]

_GREED = 3.0


@dataclass(frozen=True)
class Config:
    """What to prove, and how hard to try."""

    tasks: Path
    """File with program names."""
    robothow: Path | None = None
    """Folder in RobotHow's layout; the installed data where absent."""
    goals: str = "e2wm"
    """Goal set: `e2wm` (with CLOSE) or `core`."""
    seed: int = 0
    """Of the tree search."""
    search: SearchConfig = field(default_factory=SearchConfig)
    """Tree search whose plans are compared."""
    instances: int = 6
    """Objects of a class in an action table, at most."""
    limit: int = 40_000
    """States a task, at most (some 2.5 KiB each)."""
    free_find: bool = False
    """FIND costs nothing, every other step 1."""
    json: Annotated[bool, tyro.conf.arg(help="print figures as JSON lines")] = False


class _Row(NamedTuple):
    """One task: costs of the plans (infinite where there is none), and what is proved."""

    name: str
    tree: float
    pruned: float
    greedy: float
    best: exact.Found


def _cost(plan: Sequence[int], costs: np.ndarray) -> float:
    return float(costs[list(plan)].sum())


def _number(problem: Problem, row: int, line: Line) -> int:
    """Index of a step in the task's table."""
    ids = [i for _, i in line.arguments]
    for index, action in enumerate(problem.tables[row]):
        if action.verb == line.verb and [i for i in action[1:] if i is not None] == ids:
            return index
    raise EgjaxError(f"{line} is not in the action table", where=problem.tasks[row].name)


def _row(world: World, problem: Problem, row: int, plan: list[int] | None, config: Config) -> _Row:
    task: Task = jax.tree.map(jnp.asarray, problem.arrays[row])
    start = begin(task)
    costs = np.ones(problem.size)
    if config.free_find:
        costs[np.asarray(task.actions.verb) == VERB_INDEX["FIND"]] = 0.0
    tree = pruned = np.inf
    if plan is not None:
        tree = _cost(plan, costs)
        padded = np.full((1, 1, 64 * -(-len(plan) // 64)), -1, np.int32)
        padded[0, 0, : len(plan)] = plan
        one, here = jax.tree.map(lambda x: x[None], (task, start))
        kept = prune(world, one, here, padded)[0, 0]
        pruned = _cost(kept[kept >= 0], costs)
    shared = {"costs": costs, "identity": same_state, "limit": config.limit}
    best = exact.best_first(world, task, start, **shared)
    greedy = exact.best_first(world, task, start, estimate=steps_to_go, weight=_GREED, **shared)
    return _Row(problem.tasks[row].name, tree, pruned, greedy.cost, best)


def _figures(rows: Sequence[_Row], seconds: float) -> list[Figure]:
    n = len(rows)
    proved = [r for r in rows if r.best.optimal]
    out = [
        Figure("optimum_proved", len(proved), "tasks", n=n),
        Figure("states_seen", sum(r.best.seen for r in rows) / n, "per task", n=n),
        Figure("seconds", seconds, "s", n=n),
    ]
    for name in ("tree", "pruned", "greedy"):
        costs = np.array([getattr(r, name) for r in proved])
        least = np.array([r.best.cost for r in proved])
        found = np.isfinite(costs)
        out.append(Figure(f"{name}_optimal", int((costs == least).sum()), "tasks", n=n))
        if found.any():
            over = float((costs - least)[found].mean())
            out.append(Figure(f"{name}_excess", over, "steps", n=int(found.sum())))
    return out


def main(config: Config) -> None:
    named = programs(config.robothow, read_names(config.tasks))
    tasks = [make_task(program, config.goals, "train") for program in named]
    tasks = [task for task in tasks if task.predicates]
    if not tasks:
        raise EgjaxError("no task has a goal", where=str(config.tasks))
    problem = Problem(tasks, config.instances)
    searched = Collect(
        search=config.search,
        seed=config.seed,
        batch=min(len(tasks), 20),
        second=0,
    )
    found = find_plans(problem, searched, labels=False)
    world = shared_world(Rewards())
    _row(world, problem, 0, None, replace(config, limit=1))  # compiles
    begun = time.perf_counter()
    rows = []
    for row, one in enumerate(found):
        plan = [_number(problem, row, line) for line in one.plan] if one.report.solved else None
        rows.append(_row(world, problem, row, plan, config))
        last = rows[-1]
        proof = "=" if last.best.optimal else "≥"
        least = last.best.cost if last.best.optimal else last.best.bound
        note(
            f"{last.name:<12} shortest {proof} {least:g}, tree search {last.tree:g}, without "
            f"needless steps {last.pruned:g}, best-first {last.greedy:g}, human "
            f"{one.report.human_length} without FIND ({last.best.seen:,} states)"
        )
    emit(*_figures(rows, time.perf_counter() - begun), json=config.json)


if __name__ == "__main__":
    run_main(main, Config)
