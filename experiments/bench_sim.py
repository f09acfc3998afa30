"""How fast is the household? Executed steps and legality of whole action tables, by batch.

    python -m experiments.bench_sim

The first steps of human programs of RobotHow are executed, a batch at a time: a few homes, each
with many copies of a program; every step counted was accepted. Then the legality of a task's whole
action table in the states reached. The batch is split over all devices; of a CPU, each core is one
(where XLA splits each of a step's hundred small operations over two cores, a run takes 1.6 times as
long). The reference executes 2,800 steps a second on one core.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import NamedSharding, PartitionSpec

from egjax.errors import EgjaxError
from egjax.evals.intervals import Figure
from egjax.mesh import ONE_CORE
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
_TIMES = 8  # questions to a state in a row


@dataclass(frozen=True)
class Config:
    """What to measure."""

    robothow: Path | None = None
    """Folder in RobotHow's layout; the installed data where absent."""
    batches: tuple[int, ...] = (64, 256, 1024, 2048, 4096)
    """States at once, over all devices."""
    steps: int = 8
    """Steps of each program; shorter ones are left out."""
    homes: int = 16
    """Programs of a batch, each in a scene of its own."""
    repeats: int = 7
    """Runs after warm-up, of which the median counts."""
    json: Annotated[bool, tyro.conf.arg(help="print figures as JSON lines")] = False


@dataclass(frozen=True)
class Load:
    """Programs as arrays; leading axis: programs.

    Attributes:
        scene, state: where they start.
        actions: int32[B, T, 3]. Verb and node indices of each step.
        table: action tables of their tasks.
    """

    scene: Scene
    state: State
    actions: np.ndarray
    table: ActionTable

    def batch(self, homes: int, copies: int) -> tuple[Scene, State, Any, ActionTable]:
        """So many programs, with copies of all but scene and table."""
        rows = np.arange(homes) % len(self.actions)
        take = functools.partial(jax.tree.map, lambda x: jnp.asarray(x[rows]))
        copy = functools.partial(jax.tree.map, lambda x: jnp.repeat(x[:, None], copies, axis=1))
        return take(self.scene), copy(take(self.state)), copy(take(self.actions)), take(self.table)


def load(config: Config) -> Load:
    """Encodes all programs whose activity asks for something."""
    chosen = [
        program
        for program in programs(config.robothow)
        if len(program.script) >= config.steps
        and goal_predicates(program.init, program.final, close=True)
    ]
    if not chosen:
        raise EgjaxError(f"no program has {config.steps} steps", remedy="fewer --steps")
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
    actions = np.zeros((steps, 3), np.int32)
    for place, line in enumerate(program.script[:steps]):
        actions[place] = bind(scene, state, names, line, where=program.name)
    return scene, state, actions, encode_actions(table, names.index, size=size, objects=objects)


@functools.partial(jax.vmap, in_axes=(0, 0, 0))
@functools.partial(jax.vmap, in_axes=(None, 0, 0))
def _execute(scene: Scene, state: State, actions: jax.Array) -> tuple[State, jax.Array]:
    """Final state and number of accepted steps of one program."""

    def step(state: State, action: jax.Array) -> tuple[State, jax.Array]:
        verb, obj, target = action
        state, code = world.step(scene, state, verb, obj, target)
        return state, code == 0

    state, accepted = jax.lax.scan(step, state, actions)
    return state, accepted.sum()


@functools.partial(jax.vmap, in_axes=(0, 0, 0))
@functools.partial(jax.vmap, in_axes=(None, 0, None))
def _look(scene: Scene, state: State, table: ActionTable) -> jax.Array:
    """Legal actions of one state's table, asked for `_TIMES` times; a count of them."""
    ready = world.ground(scene, table)

    def ask(state: State, _: None) -> tuple[State, jax.Array]:
        count = world.look(scene, state, ready, returns=False).legal.sum()
        # Else all answers would be the same one: each state depends on the answer before it.
        flag = (count > 1_000_000).astype(state.nodes.dtype)
        return State(state.nodes ^ flag, state.added, state.grabbed, state.overflow), count

    return jax.lax.scan(ask, state, None, length=_TIMES)[1].sum()


def timed(work: Callable[[], jax.Array], repeats: int) -> tuple[float, float]:
    """Median wall and CPU seconds of one call; the first one, which compiles, does not count."""
    walls, cpus = [], []
    for repeat in range(repeats + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(work())
        if repeat:
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
    return statistics.median(walls), statistics.median(cpus)


def main(config: Config) -> None:
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    spread = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec("data")))
    specs = {"mesh": mesh, "in_specs": PartitionSpec("data"), "out_specs": PartitionSpec("data")}
    execute, look = (
        jax.jit(jax.shard_map(fn, **specs), compiler_options=dict(ONE_CORE))
        for fn in (_execute, _look)
    )
    homes = -(-config.homes // mesh.size) * mesh.size
    data = load(config)
    one = jax.tree.map(lambda x: x[0], data.state)
    size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(one))
    rows = [Figure("state_bytes", size, "bytes", n=1)]
    peer = {"peer": "VirtualHome v1.0.0, one core", "peer_value": _REFERENCE}
    for wanted in config.batches:
        copies = -(-wanted // homes)
        name = f"batch {homes * copies}"
        note(name)
        scene, state, actions, table = spread(data.batch(homes, copies))
        end, count = execute(scene, state, actions)
        steps = int(count.sum())
        if steps < actions.shape[0] * copies * config.steps:
            raise EgjaxError("a step of a human program was refused", where="bench_sim")
        wall, cpu = timed(lambda a=(scene, state, actions): execute(*a)[1], config.repeats)
        rows.append(Figure(f"steps_per_second, {name}", steps / wall, "1/s", n=steps, **peer))
        rows.append(Figure(f"steps_per_cpu_second, {name}", steps / cpu, "1/s", n=steps, **peer))
        wall, _ = timed(lambda a=(scene, end, table): look(*a), config.repeats)
        tables = homes * copies * _TIMES
        asked = int(table.mask.sum()) * copies * _TIMES
        rows.append(Figure(f"tables_per_second, {name}", tables / wall, "1/s", n=tables))
        rows.append(Figure(f"actions_judged_per_second, {name}", asked / wall, "1/s", n=asked))
    emit(*rows, json=config.json)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    run_main(main, Config)
