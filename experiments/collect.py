"""Search on household tasks: plans, failures and redundant plans, and how fast they are found.

    python -m experiments.collect --tasks FILE        (tasks named in a file, goals with CLOSE)
    python -m experiments.collect --run runs/quick    (training tasks of a run; needs stage `tasks`)

UCT over the actions that can matter for a goal (never told which objects the human program uses),
random rollouts, reward +2 / −0.1 ("Growing Through Experience", arXiv 2506.01312, section 3.1).
What it leaves unsolved, mostly goals that undo each other, a best-first search over relaxed plans
takes up (`--second 0` leaves it).

A run's tasks are collected in shards of `--shard-tasks`: a killed run goes on with those that are
missing. The processes of one job (`EGJAX_MULTI_HOST=1`) divide them; hosts that do not know each
other get `--shard i/n` each, and the last one to finish puts them together. Hosts that share no
disk: copy what they left in `collect_shards/` into one run and give the command without `--shard`.
`experience/` holds trajectories and preference pairs as TFDS data sets in array_record files,
nothing twice; `CARD.md` and `card.json` say what is in them.

Row `tasks_solved`: tasks whose goals all hold at the end of the plan found, checked by a replay;
`tasks_solved_first`: before that second pass.
Expected: 20 of E2WM's 20 sample tasks in half a minute on two CPU cores (compilation apart).
`--picture FOLDER` draws each tree and writes it as JSON. On several devices the tasks of a batch
are split over them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh

from egjax import hosts
from egjax.errors import EgjaxError, check_range
from egjax.evals import card
from egjax.evals.intervals import Figure
from egjax.evals.manifest import describe, write_atomic
from egjax.evals.plans import Assignment, Verdict, judge, plan_length
from egjax.evals.results import SearchedTask
from egjax.evals.trees import draw_tree
from egjax.experience.records import PreferencePair, Trajectory, distinct, from_flat, to_flat
from egjax.experience.tfds import write
from egjax.mesh import make_mesh
from egjax.search.actions import Grounded, action_table, encode_actions, table_sizes
from egjax.search.best_first import best_first
from egjax.search.household import Rewards, begin, household, same_state, steps_to_go
from egjax.search.label import Experience, LabelConfig, label, trace
from egjax.search.mcts import (
    Outcome,
    Search,
    SearchConfig,
    World,
    search,
    tree_bytes,
    tree_to_dict,
)
from egjax.search.variants import FAILED, redundancy, variants
from egjax.sim.robothow import read_names
from egjax.sim.text import Line, to_english
from egjax.train.progress import progress
from egjax.types import Task
from experiments.common import (
    BusyError,
    Done,
    Stage,
    atomic_path,
    divided,
    emit,
    finished,
    note,
    open_run,
    run_main,
)
from experiments.data import (
    HouseTask,
    assignments,
    load_tasks,
    make_task,
    origin,
    programs,
    round_up,
)
from experiments.experience import Labelled, in_hindsight, judged
from experiments.shards import Shards, parse_part

__all__ = [
    "Config",
    "Found",
    "Live",
    "Problem",
    "draw",
    "find_plans",
    "shared_world",
    "stage",
    "to_lines",
]

_E2WM_TASKS = {
    "file124_1", "file16_2", "file195_1", "file198_2", "file264_1", "file265_2", "file274_2",
    "file392_2", "file437_2", "file446_2", "file479_2", "file520_2", "file530_1", "file656_1",
    "file710_2", "file755_1", "file793_2", "file928_1", "file957_2", "file996_2",
}  # fmt: skip
_E2WM_TRANSITIONS = 957.0  # a second, one core, 20 tasks (its own code, measured)
_GREED = 3.0  # weight of the relaxed plan's length in the second pass
_E2WM_SOLVED = 16  # of 20 in 30 CPU-seconds each, told which objects the human program uses


@dataclass(frozen=True)
class Config:
    """What to search, and how."""

    run: Path = Path("runs/quick")
    """Run directory; its training tasks are searched and the experience is kept there."""
    tasks: Path | None = None
    """File with program names: search these and print figures, keep nothing."""
    robothow: Path | None = None
    """Folder in RobotHow's layout; the installed data where absent."""
    goals: str = "e2wm"
    """Goal set of `--tasks`: `e2wm` (with CLOSE) or `core`. A run has its own."""
    seed: int = 0
    """Of the search."""
    search: SearchConfig = field(default_factory=SearchConfig)
    """Tree search."""
    rewards: Rewards = field(default_factory=Rewards)
    """Rewards of a step."""
    labels: LabelConfig = field(default_factory=LabelConfig)
    """Labels of what was tried."""
    batch: int = 20
    """Tasks searched at once."""
    instances: int = 6
    """Objects of a class in an action table, at most."""
    second: int = 40_000
    """States of the best-first search for a task that the tree search leaves unsolved; 0: none."""
    shorten: int = 0
    """States of a breadth-first search for a shortest plan; 0: none."""
    told: bool = False
    """Tell which objects the human program uses, as E2WM was told. For that comparison only."""
    picture: Path | None = None
    """Folder for a picture and a JSON file of every tree; with `--tasks`."""
    pairs: Literal["tried", "all"] = "tried"
    """Preference pairs of what was tried, or also of plans made with a step left out, with a
    detour and so on (`--labels.each`)."""
    hindsight: int = 4
    """Failed explorations of a task that are given a goal they did reach, at most."""
    shard_tasks: int = 240
    """Tasks of a shard."""
    shard: str = ""
    """`i/n`: do the shards of part i of n only (from 0); JAX's process index where absent."""
    json: Annotated[bool, tyro.conf.arg(help="print figures as JSON lines")] = False


@dataclass(frozen=True)
class Found:
    """What a search found for one task.

    Attributes:
        report: for the tables.
        plan: the plan as lines with ids; empty where nothing was found.
        labelled: its labelled experience, None where labels were not asked for.
        transitions: steps simulated by the tree search.
        tree_seconds: its share of the time; the report's has the other passes as well.
        second: solved by the best-first search only.
        optimal: the plan is proved to be a shortest one over its action table.
        actions: the plan as indices into the action table.
        explored: what the tree search tried in vain, as lines; where labels were asked for.
    """

    report: SearchedTask
    plan: list[Line]
    labelled: list[Labelled] | None
    transitions: int
    tree_seconds: float
    second: bool = False
    optimal: bool = False
    actions: tuple[int, ...] = ()
    explored: tuple[list[Line], ...] = ()


def to_lines(plan: Sequence[int], table: Sequence[Grounded], names: Any) -> list[Line]:
    """Steps of a plan over an action table, with class names and graph ids."""
    out = []
    for index in plan:
        action = table[int(index)]
        ids = [i for i in (action.obj, action.target) if i is not None]
        pairs = tuple((names.nodes[names.index[i]]["class_name"], i) for i in ids)
        out.append(Line(action.verb, pairs))
    return out


class Problem:
    """Tasks with their arrays and action tables, of equal sizes; rounded up where others follow
    that shall not be compiled for again. `first` is the number of the first one among all."""

    def __init__(
        self,
        tasks: Sequence[HouseTask],
        instances: int,
        *,
        told: bool = False,
        rounded: bool = False,
        first: int = 0,
    ):
        self.tasks, self.first = list(tasks), first
        self.assignments: list[Assignment] = assignments(tasks, rounded=rounded)
        self.tables = [
            action_table(
                t.program.init,
                t.predicates,
                instances=instances,
                among=[i for line in t.program.script for _, i in line.arguments if i is not None]
                if told
                else (),
            )
            for t in tasks
        ]
        self.size, objects = table_sizes(self.tables)
        if rounded:
            self.size, objects = round_up(self.size, 64), round_up(objects, 16)
        self.sizes = [len(table) for table in self.tables]
        for task, size in zip(self.tasks, self.sizes, strict=True):
            if not size:
                raise EgjaxError(
                    "no action has to do with its goal, so nothing can be searched",
                    where=task.name,
                    remedy=f"leave it out; wanted: {', '.join(map(str, task.predicates))}",
                )
        self.arrays = [
            Task(
                a.scene,
                a.state,
                a.goal,
                encode_actions(table, a.names.index, size=self.size, objects=objects),
            )
            for a, table in zip(self.assignments, self.tables, strict=True)
        ]

    def stack(self, rows: Sequence[int]) -> Task:
        """Tasks as a batch."""
        return jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *(self.arrays[i] for i in rows))


def find_plans(
    problem: Problem, config: Config, *, labels: bool, folder: Path | None = None
) -> list[Found]:
    """Searches all tasks in batches; every plan is replayed by the judge before it counts.

    With a folder (not together with labels) the processes of a job divide the batches, then what
    they leave unsolved, and what was searched before a stop is kept there, see
    `experiments.common.divided`. What is found does not depend on the number of processes.
    """
    world = shared_world(config.rewards)
    starts = range(0, len(problem.tasks), config.batch)
    # A batch keeps one core busy, so several run side by side; each has a key of its own, and the
    # first one alone compiles.
    share: dict[str, Any] = {"workers": _cores(), "dump": _dumped, "load": _loaded}
    with progress("search", len(problem.tasks)) as update:
        live = Live(update)
        work = functools.partial(_search_batch, problem, world, config, labels=labels, live=live)
        found: list[Found] = []
        for part in divided(
            folder and folder / "trees",
            {f"{start:05d}": functools.partial(work, start) for start in starts},
            at="tree search",
            done=live.tasks,
            **share,
        ):
            found += part

        def task_by_task(
            name: str,
            rows: Sequence[int],
            one: Callable[[Problem, World, Config, int, Found], Found],
        ) -> None:
            def alone(row: int) -> list[Found]:
                return [one(problem, world, config, row, found[row])]

            units = {f"{row:05d}": functools.partial(alone, row) for row in rows}
            better = divided(folder and folder / name, units, at=name, **share)
            for row, (new,) in zip(rows, better, strict=True):
                found[row] = new

        if config.second:
            task_by_task(
                "second", [r for r, f in enumerate(found) if not f.report.solved], _second_pass
            )
            if labels:
                _label_second(problem, world, config, found)
        if config.shorten:
            task_by_task("shorten", range(len(found)), _shorten)
    return found


def _dumped(found: Sequence[Found]) -> list[dict[str, Any]]:
    """What `_loaded` reads; of what was searched without labels."""
    return [asdict(one) for one in found]


def _loaded(rows: Sequence[dict[str, Any]]) -> list[Found]:
    def line(fields: dict[str, Any]) -> Line:
        return Line(fields["verb"], tuple((name, i) for name, i in fields["arguments"]))

    return [
        Found(
            **{
                **row,
                "report": SearchedTask(**row["report"]),
                "plan": [line(step) for step in row["plan"]],
                "actions": tuple(row["actions"]),
                "explored": (),
            }
        )
        for row in rows
    ]


class Live:
    """Rates while batches run side by side: simulations of all trees a second."""

    def __init__(self, update: Callable[[int, str], None]):
        self._update, self._lock = update, threading.Lock()
        self._begun: float | None = None
        self._done = self._solved = self._count = 0

    def tasks(self, found: Sequence[Found]) -> None:
        """These tasks are through."""
        with self._lock:
            self._done += len(found)
            self._solved += sum(one.report.solved for one in found)
            self._show()

    def batch(self, trees: int) -> Callable[[int, np.ndarray], None]:
        """What a search of so many trees calls after each chunk."""
        before = 0

        def chunk(simulations: int, solved: np.ndarray) -> None:
            nonlocal before
            del solved
            with self._lock:
                if self._begun is None:  # the first chunk has compiled
                    self._begun = time.perf_counter()
                else:
                    self._count += trees * (simulations - before)
                before = simulations
                self._show()

        return chunk

    def _show(self) -> None:
        rate = ""
        if self._count and self._begun is not None:
            each = self._count / (time.perf_counter() - self._begun)
            rate = f", {each:,.0f} simulations/s"
        self._update(self._done, f"{self._solved} solved{rate}")


# One world for equal rewards, and one `begin`: a new function would be compiled again.
shared_world = functools.cache(household)
_begin = jax.jit(jax.vmap(begin))


def _cores() -> int:
    return len(os.sched_getaffinity(0))


@functools.cache
def _mesh() -> Mesh | None:
    """All devices here, to split the tasks of a batch over; None where there is one."""
    # Each host searches tasks of its own.
    return make_mesh(devices=jax.local_devices()) if jax.local_device_count() > 1 else None


def _batch(config: Config) -> int:
    """Tasks searched at once, a multiple of the devices."""
    mesh = _mesh()
    rows = mesh.shape["data"] if mesh is not None else 1
    return -(-config.batch // rows) * rows


def _filled(problem: Problem, rows: Sequence[int], config: Config) -> Task:
    """Tasks as a batch, filled up with the first, so that one compilation serves."""
    return problem.stack([*rows, *[rows[0]] * (_batch(config) - len(rows))])


def _search_batch(
    problem: Problem,
    world: World,
    config: Config,
    start: int,
    *,
    labels: bool,
    live: Live | None = None,
) -> list[Found]:
    """Searches one batch of tasks, and labels what was tried if `labels`."""
    rows = list(range(start, min(start + config.batch, len(problem.tasks))))
    tasks = _filled(problem, rows, config)
    embedding = _begin(tasks)
    key = jax.random.fold_in(jax.random.key(config.seed), problem.first + start)
    search_key, label_key = jax.random.split(key)
    keys = jax.random.split(search_key, _batch(config))
    watch = None if live is None else live.batch(len(rows))
    outcome = search(world, config.search, tasks, embedding, keys, watch, mesh=_mesh())
    plans = [outcome.actions[i][: int(outcome.length[i])].tolist() for i in range(len(rows))]
    labelled: Sequence[list[Labelled] | None] = [None] * len(rows)
    explored: Sequence[tuple[list[Line], ...]] = [()] * len(rows)
    if labels:
        experience = label(world, config.labels, tasks, embedding, outcome, label_key)
        labelled = _labelled(
            problem, world, config, rows, tasks, embedding, experience, outcome.search, "tree"
        )
        plans = [e.positives[0] if e.positives else p for e, p in zip(experience, plans)]
        explored = [
            tuple(
                to_lines(tried, problem.tables[row], problem.assignments[row].names)
                for tried in experience[place].explored
            )
            for place, row in enumerate(rows)
        ]
    if config.picture is not None:
        for place, row in enumerate(rows):
            draw(problem, row, outcome.search, place, config.picture)
    scripts = [_script(problem, row, plan) for row, plan in zip(rows, plans, strict=True)]
    # All at once: judged one by one, they would need a program of their own.
    verdicts = judge([problem.assignments[row] for row in rows], scripts)
    return [
        replace(
            _judged(_draft(problem, row, outcome, place, len(rows)), plan, script, verdict),
            labelled=labelled[place],
            explored=explored[place],
        )
        for place, (row, plan, script, verdict) in enumerate(
            zip(rows, plans, scripts, verdicts, strict=True)
        )
    ]


def _draft(problem: Problem, row: int, outcome: Outcome, place: int, searched: int) -> Found:
    """What the search of so many tasks at once says of one, before its plan is judged."""
    task = problem.tasks[row]
    report = SearchedTask(
        name=task.name,
        activity=task.title,
        goals=0,
        satisfied=0,
        solved=False,
        plan_length=None,
        human_length=plan_length(task.program.script),
        simulations=int(outcome.simulations[place]),
        seconds=outcome.seconds / searched,
    )
    steps = int(np.asarray(outcome.record.length)[:, place].sum())
    return Found(report, [], None, steps, report.seconds)


def _labelled(
    problem: Problem,
    world: World,
    config: Config,
    rows: Sequence[int],
    tasks: Task,
    embedding: Any,
    experience: Sequence[Experience],
    trees: Search | None,
    by: str,
) -> list[list[Labelled]]:
    """Labelled plans of a batch with what is known of each step, those made of the best one last.

    Args:
        problem, world, config: as searched.
        rows: of the tasks; the batch may be longer.
        tasks, embedding, trees: of the batch.
        experience: what was tried.
        by: what found the positives.
    """
    made: list[dict[str, list[tuple[int, ...]]]] = [{} for _ in experience]
    if config.labels.each:
        made = variants(
            world,
            tasks,
            embedding,
            [one.positives for one in experience],
            each=config.labels.each,
            seed=(config.seed, problem.first + rows[0]),
        )
    plans = [[*e.positives, *e.failed, *e.redundant] for e in experience]
    more = [[p for found in one.values() for p in found] for one in made]
    discount, every = config.search.discount, [a + b for a, b in zip(plans, more, strict=True)]
    traced = trace(world, tasks, embedding, every, discount=discount, search=trees)
    out = []
    for place, row in enumerate(rows):
        one, table = experience[place], jax.tree.map(np.asarray, problem.arrays[row].actions)
        kinds = [("positive", by)] * len(one.positives)
        kinds += [("failed", "exploration")] * len(one.failed)
        kinds += [("redundant", redundancy(p, one.positives, table)) for p in one.redundant]
        for kind, found in made[place].items():
            kinds += [("failed" if kind in FAILED else "redundant", kind)] * len(found)
        names, tried = problem.assignments[row].names, len(plans[place])
        steps = [to_lines(plan, problem.tables[row], names) for plan in every[place]]
        out.append(
            [
                Labelled(*kinds[n], steps[n], along, tried=n < tried)
                for n, along in enumerate(traced[place])
            ]
        )
    return out


def _second_pass(problem: Problem, world: World, config: Config, row: int, found: Found) -> Found:
    """Best-first search over relaxed plans for one task; what was found before if it fails, too."""
    task = jax.tree.map(jnp.asarray, problem.arrays[row])
    begun = time.perf_counter()
    better = best_first(
        world,
        task,
        begin(task),
        estimate=steps_to_go,
        weight=_GREED,
        identity=same_state,
        limit=config.second,
    )
    found = _timed(found, begun)
    if better.plan is None:
        return found
    new = _with_plan(problem, row, found, better.plan)
    return replace(new, second=new.report.solved)


def _label_second(problem: Problem, world: World, config: Config, found: list[Found]) -> None:
    """Labels of the plans that the second pass found, put before what the first one tried."""
    new = [row for row, one in enumerate(found) if one.second]
    for start in range(0, len(new), config.batch):
        rows = new[start : start + config.batch]
        tasks = _filled(problem, rows, config)
        nothing = [Experience([], [], [], [])] * (_batch(config) - len(rows))
        plans = [Experience([found[row].actions], [], [], []) for row in rows]
        labelled = _labelled(
            problem, world, config, rows, tasks, _begin(tasks), plans + nothing, None, "best_first"
        )
        for row, own in zip(rows, labelled, strict=True):
            positive, made = own[:1], own[1:]
            tried = found[row].labelled or []
            found[row] = replace(found[row], labelled=[*positive, *tried, *made])


def _shorten(problem: Problem, world: World, config: Config, row: int, found: Found) -> Found:
    """Breadth-first search for one task; its plan is taken where it is shorter."""
    if not found.report.solved:
        return found
    task = jax.tree.map(jnp.asarray, problem.arrays[row])
    begun = time.perf_counter()
    least = best_first(world, task, begin(task), identity=same_state, limit=config.shorten)
    found = _timed(found, begun)
    if least.plan is not None and least.cost < len(found.plan):
        found = _with_plan(problem, row, found, least.plan)
    return replace(found, optimal=len(found.plan) <= least.bound)


def _timed(found: Found, begun: float) -> Found:
    seconds = found.report.seconds + time.perf_counter() - begun
    return replace(found, report=replace(found.report, seconds=seconds))


def _with_plan(problem: Problem, row: int, found: Found, plan: Sequence[int]) -> Found:
    """A plan over the action table, judged."""
    script = _script(problem, row, plan)
    return _judged(found, plan, script, judge([problem.assignments[row]], [script], batch=1)[0])


def _script(problem: Problem, row: int, plan: Sequence[int]) -> list[Line]:
    return to_lines(plan, problem.tables[row], problem.assignments[row].names)


def _judged(found: Found, plan: Sequence[int], script: list[Line], verdict: Verdict) -> Found:
    report = replace(
        found.report,
        goals=verdict.goals,
        satisfied=verdict.satisfied,
        solved=verdict.solved,
        plan_length=plan_length(script) if verdict.solved else None,
    )
    return replace(found, report=report, plan=script, actions=tuple(map(int, plan)))


def draw(problem: Problem, row: int, trees: Search, place: int, folder: Path) -> None:
    """One tree of a batch as `NAME.png` and `NAME.json`."""
    task, names = problem.tasks[row], problem.assignments[row].names
    labels = [str(to_lines([i], problem.tables[row], names)[0]) for i in range(problem.sizes[row])]
    tree = tree_to_dict(trees, place, labels)
    count = len(tree["nodes"]) - 1
    title = f"{task.title} ({task.name}): {count} simulations, {problem.sizes[row]} actions"
    name = re.sub(r"[^\w.-]+", "_", task.name)
    with atomic_path(folder / f"{name}.png") as path:
        path.write_bytes(draw_tree(tree, title=title))
    write_atomic(folder / f"{name}.json", json.dumps(tree) + "\n")


_NO_INPUT = ("run", "json", "tasks", "goals", "picture", "shard")  # do not change the experience


def stage(config: Config, tasks: Done) -> Done:
    """Searches the training tasks of a run; writes the experience, its card and `search.json`."""
    shards, work = _shards(config, tasks)

    def everything(out: Path) -> None:
        shards.run(work, (hosts.index(), hosts.count()))
        hosts.barrier("the shards of collect")
        if hosts.index() == 0:
            _put_together(config, tasks.path, shards.paths(), out)

    return Stage(config.run, "collect", _inputs(config, tasks), by="all").run(everything)


def _inputs(config: Config, tasks: Done) -> dict[str, Any]:
    inputs = {k: v for k, v in vars(config).items() if k not in _NO_INPUT}
    return inputs | {"rewards": list(config.rewards), "tasks": tasks.fingerprint}


def _shards(config: Config, tasks: Done) -> tuple[Shards, Callable[[int, Path], None]]:
    """The shards of a run's training tasks, and what does one."""
    if config.shard_tasks < 1:
        raise EgjaxError("a shard needs at least one task", where="--shard-tasks")
    record = json.loads((tasks.path / "tasks.json").read_text())
    names = [row["name"] for row in record["tasks"] if row["split"] == "train"]
    count = max(-(-len(names) // config.shard_tasks), 1)

    def work(shard: int, out: Path) -> None:
        first = shard * config.shard_tasks
        mine = names[first : first + config.shard_tasks]
        # All of them, where there is one shard: the stages that follow ask for the same ones.
        asked = None if count == 1 else mine
        found = load_tasks(tasks.path / "tasks.json", config.robothow, asked)
        found = [task for task in found if task.split == "train"]
        problem = Problem(found, config.instances, rounded=count > 1, first=first)
        _collect(problem, config, record["goals"], out)

    return Shards(config.run, "collect", _inputs(config, tasks), count), work


def _collect(problem: Problem, config: Config, goals: str, out: Path) -> None:
    """Searches some tasks and writes what was found as JSON lines."""
    found = find_plans(problem, config, labels=True)
    how: dict[str, Any] = {"goals": goals, "seed": config.seed}
    trajectories, pairs = judged(
        problem.tasks,
        problem.assignments,
        [one.labelled or [] for one in found],
        **how,
        pair_all=config.pairs == "all",
    )
    if config.hindsight:
        trajectories += in_hindsight(
            problem.tasks,
            problem.assignments,
            [one.explored[: config.hindsight] for one in found],
            **how,
            pay=config.rewards,
            discount=config.search.discount,
            most=config.hindsight,
        )
    for name, records in (("trajectories", trajectories), ("pairs", pairs)):
        lines = (json.dumps(to_flat(r), ensure_ascii=False) + "\n" for r in records)
        write_atomic(out / f"{name}.jsonl", "".join(lines))
    rows = [asdict(f.report) for f in found]
    write_atomic(out / "search.json", json.dumps({"tasks": rows}, indent=1) + "\n")


def _read(kind: type, path: Path) -> list[Any]:
    lines = path.read_text(encoding="utf-8").split("\n")
    try:
        return [from_flat(kind, json.loads(line)) for line in lines if line]
    except ValueError as error:
        raise EgjaxError(
            f"a damaged shard: {error}",
            where=str(path),
            remedy=f"delete {path.parent} and give the same command, which makes it anew",
        ) from None


def _put_together(config: Config, tasks_path: Path, shards: Sequence[Path], out: Path) -> None:
    """The data sets of all shards, nothing twice, with their card."""
    found = [t for shard in shards for t in _read(Trajectory, shard / "trajectories.jsonl")]
    trajectories = distinct(found)
    pairs = [p for shard in shards for p in _read(PreferencePair, shard / "pairs.jsonl")]
    if not pairs:
        raise EgjaxError("the search solved no training task", remedy="give it more simulations")
    write(trajectories, out / "experience")
    write(pairs, out / "experience")
    rows = [
        row
        for shard in shards
        for row in json.loads((shard / "search.json").read_text(encoding="utf-8"))["tasks"]
    ]
    write_atomic(out / "search.json", json.dumps({"tasks": rows}, indent=1) + "\n")
    tasks = json.loads((tasks_path / "tasks.json").read_text(encoding="utf-8"))
    source, terms = origin(config.robothow)
    facts = card.Facts(
        origin=source,
        terms=terms,
        goals=tasks["goals"],
        tasks=len(rows),
        solved=sum(row["solved"] for row in rows),
        held_out=tuple(tasks["unseen"]),
        shards=len(shards),
        twice=len(found) - len(trajectories),
        manifest=describe(seeds=(config.seed,)),
    )
    card.write(facts, trajectories, pairs, out)


def figures(found: Sequence[Found]) -> list[Figure]:
    """Solved tasks, speed and lengths, beside E2WM's where they are its tasks."""
    n = len(found)
    seconds = sum(f.report.seconds for f in found)
    steps = sum(f.transitions for f in found)
    solved = [f.report for f in found if f.report.solved]
    compared = {f.report.name for f in found} == _E2WM_TASKS
    peer = {"peer": "E2WM", "peer_value": float(_E2WM_SOLVED)} if compared else {}
    speed = {"peer": "E2WM, one core", "peer_value": _E2WM_TRANSITIONS} if compared else {}
    rows = [
        Figure("tasks_solved", len(solved), "tasks", n=n, **peer),
        Figure(
            "tasks_solved_first", sum(not f.second for f in found if f.report.solved), "tasks", n=n
        ),
        Figure("search_seconds", seconds, "s", n=n),
        Figure(
            "transitions_per_second",
            steps / sum(f.tree_seconds for f in found),
            "1/s",
            n=n,
            **speed,
        ),
        Figure("simulations", sum(f.report.simulations for f in found) / n, "per task", n=n),
    ]
    if any(f.optimal for f in found):
        rows.append(Figure("plans_proved_optimal", sum(f.optimal for f in found), "tasks", n=n))
    if solved:
        ratio = np.mean([(r.plan_length or 0) / max(r.human_length, 1) for r in solved])
        rows.append(Figure("plan_length_ratio", float(ratio), "÷ human", n=len(solved)))
    return rows


def _warm_up(problem: Problem, config: Config) -> None:
    """Compiles what `find_plans` will run: one chunk of one batch, one state of a second pass."""
    world = shared_world(config.rewards)
    once = replace(config.search, seconds=1e-9)
    quick = replace(config, search=once, picture=None, second=min(config.second, 1))
    found = _search_batch(problem, world, quick, 0, labels=False)
    if config.second:
        _second_pass(problem, world, quick, 0, found[0])
    if config.shorten:
        one = replace(found[0], report=replace(found[0].report, solved=True))
        _shorten(problem, world, replace(quick, shorten=1), 0, one)


def _of_a_run(config: Config) -> None:
    """Collects the training tasks of a run, or this process's part of them."""
    part = parse_part(config.shard)
    if part[1] > 1:
        with open_run(config.run, part=f"{part[0]}-of-{part[1]}"):
            shards, work = _shards(config, finished(config.run, "tasks", made_by="tasks"))
            shards.run(work, part)
        missing = shards.missing()
        if missing:
            note(f"{len(missing)} of {len(shards.stages)} shards are left to the other parts")
            return
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(open_run(config.run))
        except BusyError:
            if part[1] == 1:
                raise
            note("the other parts are still at work; the last one puts the shards together")
            return
        done = stage(config, finished(config.run, "tasks", made_by="tasks"))
        rows = json.loads((done.path / "search.json").read_text())["tasks"]
        counts = json.loads((done.path / "card.json").read_text())["trajectories"]
    emit(
        Figure("tasks_solved", sum(r["solved"] for r in rows), "tasks", n=len(rows)),
        *(Figure(f"trajectories_{k}", v, "trajectories", n=len(rows)) for k, v in counts.items()),
        json=config.json,
    )


def main(config: Config) -> None:
    check_range(config.batch, "[1, inf)", where="--batch")
    check_range(config.hindsight, "[0, inf)", where="--hindsight")
    if config.tasks is None and (config.told or config.picture is not None):
        raise EgjaxError("--told and --picture go with --tasks")
    if config.tasks is None:
        _of_a_run(config)
        return
    named = programs(config.robothow, read_names(config.tasks))
    tasks = [make_task(program, config.goals, "train") for program in named]
    with_goal = [task for task in tasks if task.predicates]
    if not with_goal:
        raise EgjaxError("no task has a goal", where=str(config.tasks))
    problem = Problem(with_goal, config.instances, told=config.told)
    each = tree_bytes(config.search, problem.size, begin(problem.arrays[0]))
    trees = _batch(config) * min(_cores(), -(-len(with_goal) // config.batch))
    note(f"a tree takes {each / 2**20:.2f} MiB, {trees} at a time {each * trees / 2**20:,.0f} MiB")
    begun = time.perf_counter()
    _warm_up(problem, config)
    compiled = time.perf_counter() - begun
    found = find_plans(problem, config, labels=False)
    for one in found:
        if not config.json:
            mark = "solved" if one.report.solved else f"{one.report.satisfied}/{one.report.goals}"
            print(f"{one.report.name:<12} {mark:<8} {to_english(one.plan)}")
    emit(
        *figures(found),
        Figure("warm_up_seconds", compiled, "s", n=len(found)),
        Figure("tree_bytes", each, "B", n=1),
        json=config.json,
    )


if __name__ == "__main__":
    run_main(main, Config)
