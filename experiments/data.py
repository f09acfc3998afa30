"""Where tasks come from, how they are split, and how they become arrays."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from egjax.errors import EgjaxError
from egjax.evals.plans import Assignment
from egjax.experience.prompts import plan_prompt
from egjax.sim.goals import GoalSizes, Predicate, encode_goal, goal_predicates
from egjax.sim.graph import encode, sizes_of
from egjax.sim.household import home_programs
from egjax.sim.placing import PLACED, load_placed
from egjax.sim.robothow import Program, each_program, find_dataset, load_programs
from experiments.common import file_fingerprint, note

__all__ = [
    "SPLITS",
    "HouseTask",
    "assignments",
    "content",
    "dataset_name",
    "each",
    "load_tasks",
    "make_task",
    "origin",
    "programs",
    "round_up",
    "split_tasks",
]

SPLITS = ("train", "seen", "unseen")


def dataset_name(robothow: Path | None) -> str:
    """Which data `programs` reads, in words for reports."""
    if robothow is not None:
        return "placed programs" if (robothow / PLACED).exists() else "RobotHow folder"
    return "RobotHow (virtualhome-eval)" if find_dataset() else "embedded household"


def content(robothow: Path | None) -> str:
    """Fingerprint of the data that `programs` reads; empty for the embedded household."""
    folder = robothow or find_dataset()
    return "" if folder is None else file_fingerprint(Path(folder))


def origin(robothow: Path | None) -> tuple[str, str]:
    """Where the tasks come from, and on what terms, for the data card."""
    name = dataset_name(robothow)
    made = "VirtualHome's RobotHow programs (Puig et al., CVPR 2018)"
    sources = {
        "placed programs": f"{made} without graphs, placed in its scenes by experiments.place",
        "RobotHow folder": f"a folder in the layout of {made}",
        "RobotHow (virtualhome-eval)": f"{made} with graphs, as PyPI's virtualhome-eval ships them",
    }
    if name not in sources:
        return "egjax's own two small homes and programs", "Apache-2.0"
    return sources[name], "VirtualHome and virtualhome-eval: MIT. Plans and labels: as egjax."


@functools.lru_cache(maxsize=2)
def _load(folder: Path, names: tuple[str, ...] | None) -> tuple[Program, ...]:
    if (folder / PLACED).exists():
        return tuple(load_placed(folder, names))
    return tuple(load_programs(folder, names))


def programs(robothow: Path | None, names: Sequence[str] | None = None) -> list[Program]:
    """Programs of the user's folder, else of the installed data, else embedded ones.

    Args:
        robothow: the user's folder, in RobotHow's layout or as `experiments.place` writes it; None
            for what is installed.
        names: programs to load, all where absent.

    Raises:
        EgjaxError: bad data, or a name that the data lack.
    """
    folder = robothow or find_dataset()
    if folder is not None:
        return list(_load(Path(folder), None if names is None else tuple(names)))
    return _embedded(names)


def each(robothow: Path | None) -> Iterator[Program]:
    """All programs, see `programs`, without holding more than one where that is possible."""
    folder = robothow or find_dataset()
    if folder is None:
        return iter(_embedded(None))
    return iter(load_placed(folder)) if (folder / PLACED).exists() else each_program(folder)


def _embedded(names: Sequence[str] | None) -> list[Program]:
    note("RobotHow's data are not installed (virtualhome-eval); the embedded household serves")
    every = {program.name: program for program in home_programs()}
    missing = [name for name in names or () if name not in every]
    if missing:
        raise EgjaxError(f"the embedded household has no program {missing[0]!r}")
    return [every[name] for name in names or every]


@dataclass(frozen=True)
class HouseTask:
    """A task as the pipeline sees it: where, what is wanted, and which part of the split it is in.

    Attributes:
        program: the human program with its graphs; its script is for comparison only.
        predicates: the goal.
        split: `train`, `seen` (held out, activity known) or `unseen` (activity never named).
    """

    program: Program
    predicates: tuple[Predicate, ...]
    split: str

    @property
    def name(self) -> str:
        """Name of the program."""
        return self.program.name

    @property
    def title(self) -> str:
        """The activity."""
        return self.program.title

    def prompt(self, *, titled: bool = True, seed: int | None = None) -> str:
        """What a planner is asked, see `egjax.experience.prompts.plan_prompt`."""
        title = self.title if titled else None
        return plan_prompt(title, self.predicates, self.program.init, seed=seed)


def make_task(program: Program, goals: str, split: str) -> HouseTask:
    """A task with goal set `core` (without CLOSE) or `e2wm` (with it)."""
    if goals not in ("core", "e2wm"):
        raise EgjaxError(f"no goal set {goals!r}", remedy="core or e2wm")
    close = goals == "e2wm"
    predicates = goal_predicates(program.init, program.final, close=close)
    return HouseTask(program, tuple(predicates), split)


def split_tasks(
    tasks: Sequence[HouseTask],
    prompts: Sequence[str],
    *,
    seed: int,
    unseen_share: float,
    seen_share: float,
) -> list[HouseTask]:
    """Splits by activity, then by families of like tasks.

    Activities are drawn until they hold `unseen_share` of the tasks: these are `unseen`. Of every
    other activity families are drawn until they hold `seen_share` of its tasks: these are held out
    as `seen`. A family is what has the same prompt or came from the same file of people's programs
    (`file12_1`, `file12_2`). Training tasks whose prompt, the activity's name apart, is that of a
    held-out one are left out. So no activity is both trained on and `unseen`, and no held-out
    prompt was trained on.

    Args:
        tasks: n tasks, all with a goal.
        prompts: of each what a planner is asked without the activity's name.
        seed: of the draw.
        unseen_share, seen_share: shares of tasks.
    """
    rng = np.random.default_rng(seed)
    by_title: dict[str, list[int]] = {}
    for i, task in enumerate(tasks):
        by_title.setdefault(task.title, []).append(i)
    splits = ["train"] * len(tasks)
    unseen = 0
    for title in (sorted(by_title)[i] for i in rng.permutation(len(by_title))):
        group = by_title[title]
        if unseen + len(group) / 2 < unseen_share * len(tasks):
            unseen += len(group)
            for i in group:
                splits[i] = "unseen"
            continue
        families = _families([(_source(tasks[i].name), prompts[i]) for i in group])
        seen = 0
        for family in (families[k] for k in rng.permutation(len(families))):
            if seen + len(family) / 2 < seen_share * len(group):
                seen += len(family)
                for k in family:
                    splits[group[k]] = "seen"
    held = {prompt for prompt, split in zip(prompts, splits, strict=True) if split != "train"}
    return [
        HouseTask(task.program, task.predicates, split)
        for task, prompt, split in zip(tasks, prompts, splits, strict=True)
        if split != "train" or prompt not in held
    ]


def _source(name: str) -> str:
    """The file of people's programs that a program came from: RobotHow numbers its variants."""
    return re.sub(r"_\d+$", "", name.rsplit("/", 1)[-1])


def _families(labels: Sequence[Sequence[Hashable]]) -> list[list[int]]:
    """Rows that share a label, or are linked by others that do, in the order of their first ones.

    Args:
        labels: of each row one for each kind of label.
    """
    family = list(range(len(labels)))
    first: dict[Hashable, int] = {}
    for row, found in enumerate(labels):
        for label in enumerate(found):
            old, new = family[row], family[first.setdefault(label, row)]
            family = [new if f == old else f for f in family]
    rows: dict[int, list[int]] = {}
    for row, f in enumerate(family):
        rows.setdefault(f, []).append(row)
    return list(rows.values())


def load_tasks(
    path: Path, robothow: Path | None, names: Sequence[str] | None = None
) -> list[HouseTask]:
    """Tasks of a `tasks.json` that the stage `tasks` wrote; those of some names, in its order."""
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    wanted = None if names is None else set(names)
    rows = [row for row in record["tasks"] if wanted is None or row["name"] in wanted]
    found = programs(robothow, [row["name"] for row in rows])
    return [
        make_task(program, record["goals"], row["split"])
        for program, row in zip(found, rows, strict=True)
    ]


def round_up(number: int, step: int) -> int:
    """The smallest multiple of `step` that is not below a number."""
    return -(-number // step) * step


def assignments(
    tasks: Sequence[HouseTask], *, added: int = 24, rounded: bool = False
) -> list[Assignment]:
    """Scenes, states and goals of equal array sizes, for search and judge.

    Args:
        tasks: n tasks.
        added: pairs of objects between which edges are added.
        rounded: sizes of goals are rounded up, so that other tasks mostly have the same.
    """
    sizes = sizes_of((task.program.init for task in tasks), added=added)
    encoded = [encode(task.program.init, sizes, where=task.name) for task in tasks]
    goals = [
        encode_goal(task.predicates, names, nodes=sizes.nodes, where=task.name)
        for task, (_, _, names) in zip(tasks, encoded, strict=True)
    ]
    # A CPU takes instances by eights at once.
    step = (4, 16) if rounded else (1, 8)
    common = GoalSizes(
        round_up(max(len(goal.bit) for goal in goals), step[0]),
        round_up(max(len(goal.subject) for goal in goals), step[1]),
    )
    return [
        Assignment(
            scene,
            state,
            encode_goal(task.predicates, names, nodes=sizes.nodes, sizes=common, where=task.name),
            names,
        )
        for task, (scene, state, names) in zip(tasks, encoded, strict=True)
    ]
