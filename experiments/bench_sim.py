"""How fast is the household? Executed steps and legality of whole action tables, by batch.

    python -m experiments.bench_sim

Human programs of RobotHow are executed, each in its own scene, a batch at a time; every
step counted was accepted. Then the legality of a task's whole action table in random states of
these executions. One thread a core, each with a batch of its own. The reference executes 2,800
steps a second on one core.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from egjax.evals.intervals import Figure
from egjax.search.actions import action_table, encode_actions, table_sizes
from egjax.sim import world
from egjax.sim.goals import goal_predicates
from egjax.sim.graph import Sizes, encode, sizes_of
from egjax.sim.text import bind
from egjax.types import ActionTable, Scene, State
from experiments.common import emit, note, run_main
from experiments.data import programs

__all__ = ["Config"]

_REFERENCE = 2_800.0


@dataclass(frozen=True)
class Config:
    """What to measure."""

    robothow: Path | None = None
    """Folder in RobotHow's layout; the installed data where absent."""
    batches: tuple[int, ...] = (64, 256, 1024)
    """States a thread at once."""
    threads: int = 0
    """Threads of the last measurement; 0 for one a core. The others use one."""
    steps: int = 12
    """Steps of each program, at most."""
    repeats: int = 7
    """Runs after warm-up, of which the median counts."""
    json: Annotated[bool, tyro.conf.arg(help="print figures as JSON lines")] = False


@dataclass(frozen=True)
class Load:
    """Programs as arrays; leading axis: programs.

    Attributes:
        scene, state: where they start.
        actions: int32[B, T, 3]. Verb and node indices of each step, verb -1 after the end.
        table: action tables of their tasks.
    """

    scene: Scene
    state: State
    actions: np.ndarray
    table: ActionTable

    def batch(self, size: int, offset: int) -> tuple[Scene, State, Any, ActionTable]:
        """`size` programs from one on, over and over again."""
        rows = (np.arange(size) + offset) % len(self.actions)
        take = functools.partial(jax.tree.map, lambda x: jnp.asarray(x[rows]))
        return take(self.scene), take(self.state), take(self.actions), take(self.table)


def load(config: Config) -> Load:
    """Encodes all programs whose activity asks for something."""
    chosen = [p for p in programs(config.robothow) if goal_predicates(p.init, p.final, close=True)]
    sizes = sizes_of(program.init for program in chosen)
    tables = [
        action_table(p.init, goal_predicates(p.init, p.final, close=True), instances=6)
        for p in chosen
    ]
    size, objects = table_sizes(tables)
    rows = [
        _encode(p, sizes, table, size, objects, config.steps)
        for p, table in zip(chosen, tables, strict=True)
    ]
    return Load(*(jax.tree.map(lambda *x: np.stack(x), *part) for part in zip(*rows, strict=True)))


def _encode(
    program: Any, sizes: Sizes, table: Any, size: int, objects: int, steps: int
) -> tuple[Scene, State, np.ndarray, ActionTable]:
    scene, state, names = encode(program.init, sizes, where=program.name)
    actions = np.full((steps, 3), -1, np.int32)
    for place, line in enumerate(program.script[:steps]):
        actions[place] = bind(scene, state, names, line, where=program.name)
    return scene, state, actions, encode_actions(table, names.index, size=size, objects=objects)


@jax.jit
@jax.vmap
def _execute(scene: Scene, state: State, actions: jax.Array) -> tuple[State, jax.Array]:
    """Final state and number of accepted steps of one program."""

    def step(state: State, action: jax.Array) -> tuple[State, jax.Array]:
        verb, obj, target = action
        state, code = world.step(scene, state, jnp.maximum(verb, 0), obj, target)
        return state, (code == 0) & (verb >= 0)

    state, accepted = jax.lax.scan(step, state, actions)
    return state, accepted.sum()


@functools.partial(jax.jit, static_argnums=3)
@functools.partial(jax.vmap, in_axes=(0, 0, 0, None))
def _look(scene: Scene, state: State, table: ActionTable, times: int) -> jax.Array:
    """Legal actions of one state's table, asked for so many times; a count of them."""
    ready = world.ground(scene, table)

    def ask(state: State, _: None) -> tuple[State, jax.Array]:
        count = world.look(scene, state, ready, returns=False).legal.sum()
        # Else all answers would be the same one: each state depends on the answer before it.
        flag = (count > 1_000_000).astype(state.nodes.dtype)
        return State(state.nodes ^ flag, state.added, state.grabbed, state.overflow), count

    return jax.lax.scan(ask, state, None, length=times)[1].sum()


def timed(work: Sequence[Callable[[], jax.Array]], repeats: int) -> tuple[float, float]:
    """Median wall and CPU seconds of one call of every function, each in a thread of its own."""
    walls, cpus = [], []
    with ThreadPoolExecutor(len(work)) as pool:
        for repeat in range(repeats + 1):
            wall, cpu = time.perf_counter(), time.process_time()
            for done in [pool.submit(lambda f=f: jax.block_until_ready(f())) for f in work]:
                done.result()
            if repeat:  # the first one compiles
                walls.append(time.perf_counter() - wall)
                cpus.append(time.process_time() - cpu)
    return statistics.median(walls), statistics.median(cpus)


def main(config: Config) -> None:
    data = load(config)
    one = jax.tree.map(lambda x: x[0], data.state)
    size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(one))
    rows = [Figure("state_bytes", size, "bytes", n=1)]
    cores = config.threads or len(os.sched_getaffinity(0))
    plans = [(batch, 1) for batch in config.batches]
    if cores > 1:
        plans.append((config.batches[-1], cores))
    for batch, threads in plans:
        parts = [data.batch(batch, i * batch) for i in range(threads)]
        names = f"batch {batch}, {threads} thread{'s' * (threads > 1)}"
        note(names)
        ends = [_execute(scene, state, actions) for scene, state, actions, _ in parts]
        executed = sum(int(count.sum()) for _, count in ends)
        work = [functools.partial(lambda *x: _execute(*x)[1], *part[:3]) for part in parts]
        wall, cpu = timed(work, config.repeats)
        peer = {"peer": "VirtualHome v1.0.0, one core", "peer_value": _REFERENCE}
        rows.append(
            Figure(f"steps_per_second, {names}", executed / wall, "1/s", n=executed, **peer)
        )
        rows.append(
            Figure(f"steps_per_cpu_second, {names}", executed / cpu, "1/s", n=executed, **peer)
        )
        times = 8
        looks = [
            functools.partial(_look, part[0], end[0], part[3], times)
            for part, end in zip(parts, ends, strict=True)
        ]
        asked = sum(int(part[3].mask.sum()) for part in parts) * times
        wall, cpu = timed(looks, config.repeats)
        tables = batch * threads * times
        rows.append(Figure(f"tables_per_second, {names}", tables / wall, "1/s", n=tables))
        rows.append(Figure(f"actions_judged_per_second, {names}", asked / wall, "1/s", n=asked))
        rows.append(Figure(f"actions_judged_per_cpu_second, {names}", asked / cpu, "1/s", n=asked))
    emit(*rows, json=config.json)


if __name__ == "__main__":
    run_main(main, Config)
