"""How fast is the search? Transitions a second, time to the first solution, growth, memory.

    python -m experiments.bench_search --tasks FILE

Trees of the tasks named in a file are searched for a fixed number of simulations, without stopping
at solutions. Counted are the steps that the household was made to take: one for each new node and
those of its rollouts up to their end, the way through the tree not. CPU seconds are those of the
whole process, after a first run that compiles. E2WM makes 957 transitions a second on one core,
rollouts to 25 steps, and has its first solution after 0.70 CPU-seconds (median of what it solves).
Growth compares the time of a simulation in trees of 1,024 simulations and of 128.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from egjax.errors import EgjaxError
from egjax.evals.intervals import Figure
from egjax.search.household import Rewards, begin
from egjax.search.mcts import Outcome, SearchConfig, search, tree_bytes
from egjax.sim.robothow import read_names
from egjax.types import Task
from experiments.collect import Problem, shared_world
from experiments.common import emit, note, run_main
from experiments.data import make_task, programs

__all__ = ["Config"]

_TRANSITIONS = 957.0  # E2WM, one core, its 20 tasks
_FIRST_SOLUTION = 0.70  # E2WM, CPU seconds, median


@dataclass(frozen=True)
class Config:
    """What to measure."""

    tasks: Path
    """File with program names."""
    robothow: Path | None = None
    """Folder in RobotHow's layout; the installed data where absent."""
    search: SearchConfig = field(
        default_factory=lambda: SearchConfig(64, rollouts=32, rollout_steps=25, until_solved=False)
    )
    """Budget of the measurement of transitions."""
    copies: int = 1
    """Trees of each task at once, each with a key of its own."""
    growth: tuple[int, ...] = (128, 1024)
    """Simulations of the trees whose time a simulation is compared; none for leaving it out."""
    repeats: int = 3
    """Runs after the one that compiles, of which the median counts."""
    seed: int = 0
    """Of the search."""
    json: Annotated[bool, tyro.conf.arg(help="print figures as JSON lines")] = False


def transitions(outcome: Outcome) -> int:
    """Steps that the household was made to take."""
    length = np.asarray(outcome.record.length, np.int64)
    simulations = length.shape[0]
    depth = np.asarray(outcome.search.depth)[:, 1 : simulations + 1].T.astype(np.int64)
    # A node that an exhausted tree was given is in no depth, and none of its rollouts has a length.
    live = depth < np.iinfo(np.int32).max
    rollouts = np.where(live[..., None], length - depth[..., None], 0).sum()
    return int(rollouts + live.sum())


@dataclass(frozen=True)
class Trees:
    """Tasks of equal sizes as a batch, and how to search them."""

    tasks: Task
    count: int

    def run(self, config: SearchConfig, seed: int) -> tuple[Outcome, float, float]:
        """The outcome, wall and CPU seconds."""
        embedding = jax.jit(jax.vmap(begin))(self.tasks)
        keys = jax.random.split(jax.random.key(seed), self.count)
        jax.block_until_ready((embedding, keys))
        wall, cpu = time.perf_counter(), time.process_time()
        outcome = search(shared_world(Rewards()), config, self.tasks, embedding, keys)
        return outcome, time.perf_counter() - wall, time.process_time() - cpu

    def timed(self, config: SearchConfig, seed: int, repeats: int) -> tuple[Outcome, float, float]:
        """As `run`, medians of repeats after one that compiles."""
        self.run(config, seed)
        runs = [self.run(config, seed) for _ in range(repeats)]
        return (
            runs[0][0],
            statistics.median(wall for _, wall, _ in runs),
            statistics.median(cpu for _, _, cpu in runs),
        )


def first_solutions(trees: Trees, config: SearchConfig, seed: int) -> tuple[float, int]:
    """CPU seconds until a tree has its first solution, median over solved trees, and their number.

    The batch is searched as one; a tree's share of the CPU time that had passed by then counts.
    """
    step = replace(config, chunk=1, until_solved=True, rollouts=8, simulations=256)
    trees.run(step, seed)
    seen = np.full(trees.count, np.nan)
    embedding = jax.jit(jax.vmap(begin))(trees.tasks)
    keys = jax.random.split(jax.random.key(seed), trees.count)
    start = time.process_time()

    def notice(_: int, solved: np.ndarray) -> None:
        seen[solved & np.isnan(seen)] = (time.process_time() - start) / trees.count

    search(shared_world(Rewards()), step, trees.tasks, embedding, keys, notice)
    solved = seen[~np.isnan(seen)]
    return float(np.median(solved)) if len(solved) else float("nan"), len(solved)


def main(config: Config) -> None:
    named = programs(config.robothow, read_names(config.tasks))
    tasks = [make_task(program, "e2wm", "train") for program in named]
    tasks = [task for task in tasks if task.predicates]
    if not tasks:
        raise EgjaxError("no task has a goal", where=str(config.tasks))
    problem = Problem(tasks, instances=6)
    rows = list(range(len(tasks))) * config.copies
    trees = Trees(jax.tree.map(jnp.asarray, problem.stack(rows)), len(rows))
    note(f"{len(rows)} trees, tables of {problem.size} actions at most")
    outcome, wall, cpu = trees.timed(config.search, config.seed, config.repeats)
    steps = transitions(outcome)
    peer = {"peer": "E2WM, one core", "peer_value": _TRANSITIONS}
    figures = [
        Figure("transitions_per_cpu_second", steps / cpu, "1/s", n=steps, **peer),
        Figure("transitions_per_second", steps / wall, "1/s", n=steps, **peer),
    ]
    seconds, solved = first_solutions(trees, config.search, config.seed)
    figures.append(
        Figure(
            "cpu_seconds_to_first_solution",
            seconds,
            "s",
            n=solved,
            peer="E2WM",
            peer_value=_FIRST_SOLUTION,
        )
    )
    one = jax.tree.map(lambda x: x[0], jax.jit(jax.vmap(begin))(trees.tasks))
    size = tree_bytes(config.search, problem.size, one)
    figures.append(Figure("bytes_per_tree", size, "bytes", n=1))
    if config.growth:
        costs = []
        for simulations in config.growth:
            long = replace(config.search, simulations=simulations, rollouts=1, rollout_steps=1)
            outcome, wall, _ = trees.timed(long, config.seed, config.repeats)
            costs.append(wall / len(outcome.record.length))
            name = f"seconds_per_simulation, {simulations}"
            figures.append(Figure(name, costs[-1], "s", n=simulations))
        figures.append(Figure("growth", costs[-1] / costs[0], "ratio", n=config.repeats))
    emit(*figures, json=config.json)


if __name__ == "__main__":
    run_main(main, Config)
