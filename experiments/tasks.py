"""Which tasks are there, and which are held out? Goals by class, split by activity.

    python -m experiments.tasks --run runs/quick

Writes `tasks.json` into the run: name, activity and split of each task with a goal, how many had
none, and how many were left out of training because a held-out task asks the same.
Hardware: one CPU core, some twenty seconds for 518 programs.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from egjax.errors import EgjaxError, check_range
from egjax.evals.intervals import Figure
from egjax.evals.manifest import write_atomic
from experiments.common import Done, Stage, emit, open_run, run_main
from experiments.data import (
    SPLITS,
    HouseTask,
    content,
    dataset_name,
    each,
    make_task,
    split_tasks,
)

__all__ = ["Config", "stage"]


@dataclass(frozen=True)
class Config:
    """How tasks are chosen."""

    run: Path = Path("runs/quick")
    """Run directory."""
    robothow: Path | None = None
    """Folder in RobotHow's layout; the installed data where absent."""
    goals: str = "core"
    """`core` (without CLOSE) or `e2wm` (with it)."""
    seed: int = 0
    """Of the split."""
    unseen_share: float = 0.2
    """Share of tasks whose activities are never named in training."""
    seen_share: float = 0.2
    """Share of the other tasks that is held out."""
    train: int = 0
    """Training tasks kept, 0 for all."""
    held_out: int = 0
    """Held-out tasks kept of each kind, 0 for all."""
    json: Annotated[bool, tyro.conf.arg(help="print figures as JSON lines")] = False


def stage(config: Config) -> Done:
    """Writes `tasks.json`."""
    for name in ("unseen_share", "seen_share"):
        check_range(getattr(config, name), "[0, 1]", where=f"--{name.replace('_', '-')}")
    for name in ("train", "held_out"):
        check_range(getattr(config, name), "[0, inf)", where=f"--{name.replace('_', '-')}")
    inputs = {k: v for k, v in vars(config).items() if k not in ("run", "json", "robothow")}
    # By content, wherever it lies.
    inputs |= {"data": dataset_name(config.robothow), "content": content(config.robothow)}
    return Stage(config.run, "tasks", inputs).run(lambda out: _work(config, out))


def _work(config: Config, out: Path) -> None:
    tasks: list[HouseTask] = []
    prompts: list[str] = []
    programs = 0
    for program in each(config.robothow):
        programs += 1
        task = make_task(program, config.goals, "train")
        if task.predicates:
            prompts.append(task.prompt(titled=False))
            tasks.append(_light(task))
    if not tasks:
        raise EgjaxError("no task has a goal", remedy="try --goals e2wm")
    split = split_tasks(
        tasks,
        prompts,
        seed=config.seed,
        unseen_share=config.unseen_share,
        seen_share=config.seen_share,
    )
    kept = _limit(split, config)
    if not any(task.split == "train" for task in kept):
        raise EgjaxError("no task is left to train on", remedy="hold out a smaller share")
    record = {
        "dataset": dataset_name(config.robothow),
        "goals": config.goals,
        "programs": programs,
        "without_goal": programs - len(tasks),
        "alike": len(tasks) - len(split),
        "unseen": sorted({task.title for task in split if task.split == "unseen"}),
        "tasks": [{"name": t.name, "title": t.title, "split": t.split} for t in kept],
    }
    write_atomic(out / "tasks.json", json.dumps(record, indent=1) + "\n")


def _light(task: HouseTask) -> HouseTask:
    """Without its graphs, which are large."""
    return dataclasses.replace(task, program=dataclasses.replace(task.program, init={}, final={}))


def _limit(tasks: list[HouseTask], config: Config) -> list[HouseTask]:
    """At most so many tasks of each split, drawn by the seed; sorted by name. Of activities whose
    training tasks were not drawn none is `seen`."""
    rng = np.random.default_rng(config.seed)
    kept: list[HouseTask] = []
    for name in SPLITS:
        known = {t.title for t in kept if t.split == "train"}
        group = [t for t in tasks if t.split == name and (name != "seen" or t.title in known)]
        group.sort(key=lambda t: t.name)
        most = (config.train if name == "train" else config.held_out) or len(group)
        kept += [group[i] for i in sorted(rng.permutation(len(group))[:most])]
    return kept


def figures(done: Done) -> list[Figure]:
    """Counts of tasks."""
    record = json.loads((done.path / "tasks.json").read_text())
    counts = Counter(row["split"] for row in record["tasks"])
    n = record["programs"]
    return [
        Figure("programs", n, "programs", n=n),
        Figure("without_goal", record["without_goal"], "programs", n=n),
        Figure("left_out_alike", record["alike"], "programs", n=n),
        *[Figure(f"tasks_{name}", counts[name], "tasks", n=n) for name in SPLITS],
    ]


def main(config: Config) -> None:
    with open_run(config.run):
        emit(*figures(stage(config)), json=config.json)


if __name__ == "__main__":
    run_main(main, Config)
