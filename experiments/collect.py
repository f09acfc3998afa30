"""Search on household tasks: plans, failures and redundant plans, and how fast they are found.

    python -m experiments.collect --tasks FILE        (tasks named in a file, goals with CLOSE)
    python -m experiments.collect --run runs/quick    (training tasks of a run; needs stage `tasks`)

UCT over the actions that can matter for a goal (never told which objects the human program uses),
random rollouts, reward +2 / −0.1 ("Growing Through Experience", arXiv 2506.01312, section 3.1).
What it leaves unsolved, mostly goals that undo each other, a best-first search over relaxed plans
takes up (`--second 0` leaves it). Row `tasks_solved`: tasks whose goals all hold at the end of the
plan found, checked by a replay; `tasks_solved_first`: before that second pass.
Expected: 20 of E2WM's 20 sample tasks in half a minute on two CPU cores (compilation apart).
`--picture FOLDER` draws each tree and writes it as JSON. On several devices the tasks of a batch
are split over them.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh

from egjax import hosts
from egjax.errors import EgjaxError
from egjax.evals.intervals import Figure
from egjax.evals.manifest import write_atomic
from egjax.evals.plans import Assignment, judge, plan_length
from egjax.evals.results import SearchedTask
from egjax.evals.trees import draw_tree
from egjax.experience.records import PreferencePair, Trajectory
from egjax.experience.tfds import write
from egjax.mesh import make_mesh
from egjax.search.actions import Grounded, action_table, encode_actions
from egjax.search.best_first import best_first
from egjax.search.household import Rewards, begin, household, same_state, steps_to_go
from egjax.search.label import Experience, LabelConfig, label
from egjax.search.mcts import Outcome, SearchConfig, World, search, tree_bytes, tree_to_dict
from egjax.sim.robothow import read_names
from egjax.sim.text import Line, parse_line, to_english
from egjax.train.progress import progress
from egjax.types import Task
from experiments.common import (
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
from experiments.data import HouseTask, assignments, load_tasks, make_task, programs

__all__ = ["Config", "Found", "Problem", "find_plans", "shared_world", "stage"]

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
    json: Annotated[bool, tyro.conf.arg(help="print figures as JSON lines")] = False


@dataclass(frozen=True)
class Found:
    """What a search found for one task.

    Attributes:
        report: for the tables.
        plan: the plan as lines with ids; empty where nothing was found.
        labelled: its labelled experience as lines, None where labels were not asked for.
        transitions: steps simulated by the tree search.
        tree_seconds: its share of the time; the report's has the other passes as well.
        second: solved by the best-first search only.
        optimal: the plan is proved to be a shortest one over its action table.
    """

    report: SearchedTask
    plan: list[Line]
    labelled: dict[str, list[list[Line]]] | None
    transitions: int
    tree_seconds: float
    second: bool = False
    optimal: bool = False


def _lines(plan: Sequence[int], table: Sequence[Grounded], names: Any) -> list[Line]:
    """Steps of a plan over an action table, with class names and graph ids."""
    out = []
    for index in plan:
        action = table[int(index)]
        ids = [i for i in (action.obj, action.target) if i is not None]
        pairs = tuple((names.nodes[names.index[i]]["class_name"], i) for i in ids)
        out.append(Line(action.verb, pairs))
    return out


class Problem:
    """Tasks with their arrays and action tables, of equal sizes."""

    def __init__(self, tasks: Sequence[HouseTask], instances: int, *, told: bool = False):
        self.tasks = list(tasks)
        self.assignments: list[Assignment] = assignments(tasks)
        self.tables = [
            action_table(
                t.program.init,
                t.predicates,
                instances=instances,
                among=[i for line in t.program.script for _, i in line.arguments if i]
                if told
                else (),
            )
            for t in tasks
        ]
        size = max(map(len, self.tables))
        objects = max(len({i for a in table for i in a[1:] if i}) for table in self.tables)
        self.size, self.sizes = size, [len(table) for table in self.tables]
        self.arrays = [
            Task(
                a.scene,
                a.state,
                a.goal,
                encode_actions(table, a.names.index, size=size, objects=max(objects, 1)),
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

    With a folder the processes of a job divide the batches, and what was searched before a stop is
    kept there, see `experiments.common.divided`.
    """
    world = shared_world(config.rewards)
    starts = range(0, len(problem.tasks), config.batch)

    def share(name: str, units: dict[str, Callable[[], list[Found]]]) -> list[Found]:
        """One part of the work; a batch keeps one core busy, so several run side by side."""
        tally = []
        with progress(name, len(problem.tasks)) as update:

            def done(part: list[Found]) -> None:
                tally.extend(one.report.solved for one in part)
                update(len(tally), f"{sum(tally)} solved")

            parts = divided(
                folder and folder.with_name(f"{folder.name}_{name}"),
                units,
                at=name,
                workers=_cores(),
                dump=lambda part: [_plain_found(one) for one in part],
                load=lambda rows: [_found_again(row) for row in rows],
                done=done,
            )
        return [one for part in parts for one in part]

    batch = functools.partial(_search_batch, problem, world, config, labels=labels)
    found = share("search", {str(start): functools.partial(batch, start) for start in starts})
    rest = [row for row, one in enumerate(found) if not one.report.solved]
    if config.second and rest:
        again = functools.partial(_second_pass, problem, world, config)
        units = {str(row): functools.partial(_alone, again, row, found[row]) for row in rest}
        for row, one in zip(rest, share("second", units), strict=True):
            found[row] = one
    if config.shorten:
        shorter = functools.partial(_shorten, problem, world, config)
        units = {str(r): functools.partial(_alone, shorter, r, f) for r, f in enumerate(found)}
        found = share("shortening", units)
    return found


def _alone(work: Callable[[int, Found], Found], row: int, found: Found) -> list[Found]:
    return [work(row, found)]


def _plain_found(found: Found) -> dict[str, Any]:
    """What JSON can hold of it."""
    return asdict(replace(found, report=found.report, plan=[], labelled=None)) | {
        "plan": [str(line) for line in found.plan],
        "labelled": found.labelled
        and {kind: [list(map(str, p)) for p in plans] for kind, plans in found.labelled.items()},
    }


def _found_again(row: dict[str, Any]) -> Found:
    """The inverse of `_plain_found`."""

    def lines(plan: list[str]) -> list[Line]:
        return [parse_line(text) for text in plan]

    labelled = row["labelled"]
    return Found(
        **{
            **row,
            "report": SearchedTask(**row["report"]),
            "plan": lines(row["plan"]),
            "labelled": labelled
            and {kind: [lines(plan) for plan in plans] for kind, plans in labelled.items()},
        }
    )


# One world for equal rewards, and one `begin`: a new function would be compiled again.
shared_world = functools.cache(household)
_begin = jax.jit(jax.vmap(begin))


def _cores() -> int:
    return len(os.sched_getaffinity(0))


@functools.cache
def _mesh() -> Mesh | None:
    """This process' devices, to split the tasks of a batch over; None where there is one."""
    return make_mesh(devices=jax.local_devices()) if jax.local_device_count() > 1 else None


def _batch(config: Config) -> int:
    """Tasks searched at once, a multiple of the devices."""
    mesh = _mesh()
    rows = mesh.shape["data"] if mesh is not None else 1
    return -(-config.batch // rows) * rows


def _search_batch(
    problem: Problem, world: World, config: Config, start: int, *, labels: bool
) -> list[Found]:
    """Searches one batch of tasks, and labels what was tried if `labels`."""
    rows = list(range(start, min(start + config.batch, len(problem.tasks))))
    # The last batch is filled up, so that one compilation serves.
    filled = rows + [rows[0]] * (_batch(config) - len(rows))
    tasks = problem.stack(filled)
    embedding = _begin(tasks)
    key = jax.random.fold_in(jax.random.key(config.seed), start)
    search_key, label_key = jax.random.split(key)
    keys = jax.random.split(search_key, len(filled))
    outcome = search(world, config.search, tasks, embedding, keys, mesh=_mesh())
    experience: Sequence[Experience | None] = [None] * len(rows)
    if labels:
        experience = label(world, config.labels, tasks, embedding, outcome, label_key)
    if config.picture is not None:
        for place, row in enumerate(rows):
            _picture(problem, row, outcome, place, config.picture)
    return [
        _found(problem, row, outcome, place, experience[place], config)
        for place, row in enumerate(rows)
    ]


def _found(
    problem: Problem,
    row: int,
    outcome: Outcome,
    place: int,
    experience: Experience | None,
    config: Config,
) -> Found:
    task, names = problem.tasks[row], problem.assignments[row].names
    plan: Sequence[int] = outcome.actions[place][: int(outcome.length[place])].tolist()
    labelled = None
    if experience is not None:
        labelled = {
            kind: [_lines(p, problem.tables[row], names) for p in plans]
            for kind, plans in experience._asdict().items()
        }
        if experience.positives:
            plan = experience.positives[0]
    lines = _lines(plan, problem.tables[row], names)
    verdict = judge([problem.assignments[row]], [lines], batch=1)[0]
    report = SearchedTask(
        name=task.name,
        activity=task.title,
        goals=verdict.goals,
        satisfied=verdict.satisfied,
        solved=verdict.solved,
        plan_length=plan_length(lines) if verdict.solved else None,
        human_length=plan_length(task.program.script),
        simulations=int(outcome.simulations[place]),
        seconds=outcome.seconds / config.batch,
    )
    steps = int(np.asarray(outcome.record.length)[:, place].sum())
    return Found(report, lines, labelled, steps, report.seconds)


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
    labelled = new.labelled
    if labelled is not None and new.report.solved:
        labelled = {**labelled, "positives": [new.plan]}
    return replace(new, labelled=labelled, second=new.report.solved)


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
    """Another plan, judged."""
    lines = _lines(plan, problem.tables[row], problem.assignments[row].names)
    verdict = judge([problem.assignments[row]], [lines], batch=1)[0]
    report = replace(
        found.report,
        satisfied=verdict.satisfied,
        solved=verdict.solved,
        plan_length=plan_length(lines) if verdict.solved else None,
    )
    return replace(found, report=report, plan=lines)


def _picture(problem: Problem, row: int, outcome: Outcome, place: int, folder: Path) -> None:
    """One tree as `NAME.png` and `NAME.json`."""
    task, names = problem.tasks[row], problem.assignments[row].names
    labels = [str(_lines([i], problem.tables[row], names)[0]) for i in range(problem.sizes[row])]
    tree = tree_to_dict(outcome.search, place, labels)
    count = len(tree["nodes"]) - 1
    title = f"{task.title} ({task.name}): {count} simulations, {problem.sizes[row]} actions"
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / f"{task.name}.png") as path:
        path.write_bytes(draw_tree(tree, title=title))
    write_atomic(folder / f"{task.name}.json", json.dumps(tree) + "\n")


_NO_INPUT = ("run", "json", "tasks", "goals", "picture")  # do not change a run's experience


def stage(config: Config, tasks: Done) -> Done:
    """Searches the training tasks of a run; writes the experience and `search.json`."""
    inputs = {k: v for k, v in vars(config).items() if k not in _NO_INPUT}
    inputs["rewards"] = list(config.rewards)
    inputs["tasks"] = tasks.fingerprint
    found = Stage(config.run, "collect", inputs, by="all")
    return found.run(lambda out: _work(config, tasks.path, out))


def _work(config: Config, tasks_path: Path, out: Path) -> None:
    record = json.loads((tasks_path / "tasks.json").read_text())
    tasks = [
        task
        for task in load_tasks(tasks_path / "tasks.json", config.robothow)
        if task.split == "train"
    ]
    problem = Problem(tasks, config.instances)
    found = find_plans(problem, config, labels=True, folder=out / "parts")
    if hosts.index() > 0:
        return
    trajectories, pairs = _experience(problem, found, record["goals"], config)
    if not pairs:
        raise EgjaxError("the search solved no training task", remedy="give it more simulations")
    write(trajectories, out / "experience")
    write(pairs, out / "experience")
    rows = [asdict(f.report) for f in found]
    write_atomic(out / "search.json", json.dumps({"tasks": rows}, indent=1) + "\n")


def _experience(
    problem: Problem, found: Sequence[Found], goals: str, config: Config
) -> tuple[list[Trajectory], list[PreferencePair]]:
    """Labelled plans that mean in English what they did with ids, and preference pairs of them.

    A name can mean another object than the search used; such plans are judged again as English,
    and only those that keep their label become text to learn from.
    """
    wanted = {"positives": "positive", "failed": "failed", "redundant": "redundant"}
    rows, texts = [], []
    for row, one in enumerate(found):
        for kind, plans in (one.labelled or {}).items():
            for plan in plans:
                rows.append((row, wanted[kind], plan))
                texts.append(to_english(plan))
    with progress("labels", len(texts)) as update:
        verdicts = judge(
            [problem.assignments[row] for row, _, _ in rows],
            texts,
            progress=lambda done: update(done, ""),
        )
    trajectories: list[Trajectory] = []
    pairs: list[PreferencePair] = []
    chosen: dict[int, str] = {}
    for (row, kind, plan), text, verdict in zip(rows, texts, verdicts, strict=True):
        if verdict.solved == (kind == "failed"):
            continue
        task = problem.tasks[row]
        reward, cost = config.rewards.gain, config.rewards.cost
        total = reward * verdict.satisfied + cost * max(len(plan) - verdict.satisfied, 0)
        trajectories.append(
            Trajectory(
                task=task.name,
                title=task.title,
                split=task.split,
                script=tuple(map(str, plan)),
                text=text,
                label=kind,
                solved=verdict.solved,
                total_return=float(total),
                goals=goals,
                seed=config.seed,
            )
        )
        if kind == "positive":
            chosen.setdefault(row, text)
        elif row in chosen:
            pairs.append(PreferencePair(task.name, task.prompt(), chosen[row], text, kind))
    return trajectories, pairs


def figures(found: Sequence[Found]) -> list[Figure]:
    """Solved tasks, speed and lengths, beside E2WM's."""
    n = len(found)
    seconds = sum(f.report.seconds for f in found)
    steps = sum(f.transitions for f in found)
    solved = [f.report for f in found if f.report.solved]
    peer = {"peer": "E2WM", "peer_value": float(_E2WM_SOLVED)} if n == 20 else {}
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
            peer="E2WM, one core",
            peer_value=_E2WM_TRANSITIONS,
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


def main(config: Config) -> None:
    if config.tasks is None and (config.told or config.picture is not None):
        raise EgjaxError("--told and --picture go with --tasks")
    if config.tasks is None:
        with open_run(config.run):
            done = stage(config, finished(config.run, "tasks", made_by="tasks"))
            rows = json.loads((done.path / "search.json").read_text())["tasks"]
            emit(
                Figure("tasks_solved", sum(r["solved"] for r in rows), "tasks", n=len(rows)),
                json=config.json,
            )
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
