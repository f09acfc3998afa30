"""Do these plans work? Anybody's plans, executed in the simulator.

    python -m experiments.score --plans FILE.jsonl [--robothow FOLDER] [--out VERDICTS.jsonl]

A row of FILE has `plan`: English ("Walk to kitchen. Grab cup.") or RobotHow script lines ("[WALK]
<kitchen> (11)"), with or without ids, as text or a list, numbered or not; and either `task`, the
name of a RobotHow task, or `scene` with `goals` as `experiments.solve` takes them. `--out` writes
the rows with the field `verdict` added; rows of one `model` are summed up together. A plan ends at
its first refusal and succeeds if every step is accepted and every goal holds at the end. Intervals:
95 % bootstrap over tasks.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from egjax.errors import EgjaxError
from egjax.evals.intervals import Figure, measure
from egjax.evals.manifest import write_atomic
from egjax.evals.plans import Plan, Verdict, judge
from egjax.evals.results import PlanStep
from egjax.sim.text import Line, parse_line
from egjax.train.progress import progress
from experiments.common import emit, run_main
from experiments.data import HouseTask, assignments, make_task, programs, round_up
from experiments.solve import own_task

Row = Mapping[str, Any]

_NUMBER = re.compile(
    r"(^[ \t]*|\.\s+)(?:(?:step\s*)?\d+\s*[.):]|[-*•])[ \t]+", re.IGNORECASE | re.MULTILINE
)
"""What stands before a step in a list, on a line of its own or after a step: 1. 2) Step 3: - *"""

_MARKS = re.compile(r"^[ \t]*```.*$|\*\*|`", re.MULTILINE)
"""Markdown that language models put around a plan: fences, bold, code."""


@dataclass(frozen=True)
class Config:
    """Which plans, and on what."""

    plans: Path
    """JSON lines: task, or scene and goals; plan."""
    robothow: Path | None = None
    """Folder in RobotHow's layout or of `experiments.place`; the installed data where absent."""
    goals: str = "core"
    """Goal set of named tasks: `core` (without CLOSE) or `e2wm` (with it)."""
    out: Path | None = None
    """Where the verdicts go, as JSON lines."""
    seed: int = 0
    """Of the intervals."""
    json: Annotated[bool, tyro.conf.arg(help="print figures as JSON lines")] = False


def main(config: Config) -> None:
    rows = _read(config.plans)
    names = list(dict.fromkeys(row["task"] for row in rows.values() if row.get("task")))
    known = {}
    if names:
        known = {p.name: make_task(p, config.goals, "") for p in programs(config.robothow, names)}
    tasks = [_task(row, known, where=f"{config.plans}:{at}") for at, row in rows.items()]
    verdicts = _judged(tasks, list(rows.values()), config.plans)
    if config.out is not None:
        judged = zip(rows.values(), verdicts, strict=True)
        records = [json.dumps({**row, "verdict": _record(verdict)}) for row, verdict in judged]
        write_atomic(config.out, "\n".join(records) + "\n")
    if not config.json:
        for verdict, task in zip(verdicts, tasks, strict=True):
            print(f"{task.name:<40} {_told(verdict)}")
    models = [row.get("model") for row in rows.values()]
    emit(*_figures(verdicts, models, tasks, config.seed), json=config.json)


def _read(path: Path) -> dict[int, Row]:
    """Rows by line number."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EgjaxError("cannot read the plans", where=str(path), remedy=str(error)) from None
    rows: dict[int, Row] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise EgjaxError("not JSON", where=where, remedy=error.msg) from None
        if not isinstance(row, dict) or not isinstance(row.get("plan"), str | list):
            raise EgjaxError("no plan", where=where, remedy='{"task": NAME, "plan": TEXT}')
        for name in ("task", "scene", "model"):
            if not isinstance(row.get(name), str | None):
                raise EgjaxError(f"{name!r} is no text", where=where)
        goals = row.get("goals", [])
        if not isinstance(goals, str | list) or not all(isinstance(g, str) for g in goals):
            raise EgjaxError("'goals' is no text or list of texts", where=where)
        if bool(row.get("task")) == bool(row.get("scene")):
            raise EgjaxError("either 'task', or 'scene' and 'goals'", where=where)
        rows[number] = row
    if not rows:
        raise EgjaxError("no plans", where=str(path), remedy='{"task": NAME, "plan": TEXT} a line')
    return rows


def _task(row: Row, known: dict[str, HouseTask], *, where: str) -> HouseTask:
    """The task of a row; equal scenes and goals are one task."""
    if row.get("task"):
        task = known[row["task"]]
        if not task.predicates:
            raise EgjaxError(f"{task.name} has no goal", where=where, remedy="try --goals e2wm")
        return task
    goals = row.get("goals", ())
    goals = (goals,) if isinstance(goals, str) else tuple(goals)
    key = json.dumps([str(row["scene"]), *goals])
    if key not in known:
        try:
            known[key] = own_task(str(row["scene"]), goals)
        except EgjaxError as error:
            raise EgjaxError(str(error), where=where) from None
    return known[key]


def _judged(tasks: Sequence[HouseTask], rows: Sequence[Row], path: Path) -> list[Verdict]:
    """One verdict a row."""
    distinct = list({id(task): task for task in tasks}.values())
    plans = [_plan(row["plan"]) for row in rows]
    # What is put somewhere else takes two new edges.
    longest = max(
        p.count(".") + p.count("\n") + 1 if isinstance(p, str) else len(p) for p, _ in plans
    )
    sized = assignments(distinct, added=max(24, round_up(2 * longest, 8)))
    by_task = dict(zip(map(id, distinct), sized, strict=True))
    with progress(path.name, len(rows)) as update:
        found = judge(
            [by_task[id(task)] for task in tasks],
            [plan for plan, _ in plans],
            progress=lambda done: update(done, ""),
        )
    return [_ended(verdict, bad) for verdict, (_, bad) in zip(found, plans, strict=True)]


def _plan(plan: str | Sequence[str]) -> tuple[Plan, PlanStep | None]:
    """A plan as the judge takes it; of a script the lines before one that cannot be read, and
    that one."""
    text = plan if isinstance(plan, str) else "\n".join(map(str, plan))
    text = _NUMBER.sub(r"\1", _MARKS.sub("", text))
    if not text.lstrip().startswith("["):
        return text, None
    lines: list[Line] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        try:
            lines.append(parse_line(line, bare=True))
        except EgjaxError as error:
            return lines, PlanStep(line, False, error.what)
    return lines, None


def _ended(verdict: Verdict, bad: PlanStep | None) -> Verdict:
    """A verdict with the script line that cannot be read as its last step."""
    if bad is None:
        return verdict
    if verdict.refusal is not None:
        bad = PlanStep(bad.text, False)  # the plan ended before it
    return dataclasses.replace(
        verdict, steps=(*verdict.steps, bad), parsed=False, length=verdict.length + 1
    )


def _record(verdict: Verdict) -> dict[str, Any]:
    refusal = verdict.refusal
    return {
        "success": verdict.solved,
        "executable": verdict.executable,
        "parsed": verdict.parsed,
        "goals_held": verdict.satisfied,
        "goals_total": verdict.goals,
        "refused_step": None if refusal is None else refusal[0] + 1,
        "reason": None if refusal is None else refusal[1],
        "steps": [
            {"text": s.text, "accepted": s.accepted, "reason": s.reason} for s in verdict.steps
        ],
    }


def _told(verdict: Verdict) -> str:
    """A verdict in a line."""
    if verdict.solved:
        return "success"
    goals = f"{verdict.satisfied} of {verdict.goals} goals hold"
    if verdict.refusal is None:
        return f"{'executable, ' if verdict.executable else 'no step, '}{goals}"
    step, reason = verdict.refusal
    return f"step {step + 1} refused: {reason}; {goals}"


def _figures(
    verdicts: Sequence[Verdict], models: Sequence[str | None], tasks: Sequence[HouseTask], seed: int
) -> list[Figure]:
    """Shares over all plans, and of each model where rows name one."""
    figures = []
    named = list(dict.fromkeys(filter(None, models)))
    for model in (None, *(named if len(named) > 1 else ())):
        chosen = [k for k, by in enumerate(models) if model is None or by == model]
        clusters = [id(tasks[k]) for k in chosen]
        of = [verdicts[k] for k in chosen]
        for name, values in (
            ("success", np.array([v.solved for v in of])),
            ("executable", np.array([v.executable for v in of])),
            ("parsed", np.array([v.parsed for v in of])),
            ("goals_held", np.array([v.satisfied / v.goals for v in of])),
        ):
            label = name if model is None else f"{name}/{model}"
            figures.append(measure(label, values, "fraction", seed=seed, clusters=clusters))
    return figures


if __name__ == "__main__":
    run_main(main, Config)
