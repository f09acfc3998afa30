"""The report of a run: one page, plots, results.json, manifest.

    python -m experiments.report --run runs/quick

Puts the outcomes of all seeds together. Every figure has n, seed and a bootstrap interval in which
tasks that ask the same are one, under all seeds; differences are paired. On unseen activities a
second interval draws activities, as what is told of others needs. Needs the stage `evaluate`.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from egjax import hosts
from egjax.errors import EgjaxError
from egjax.evals import report as page
from egjax.evals.intervals import Figure, measure, paired_measure
from egjax.evals.manifest import Manifest, StageTime, began, describe
from egjax.evals.plans import by_steps
from egjax.evals.results import (
    Comparison,
    ModelScores,
    PlanColumn,
    PlanExample,
    PlanScores,
    PlanStep,
    ProbeCurve,
    QuestionScore,
    Results,
    Role,
    SearchedTask,
    SearchReport,
    StepCurve,
    TrainingCurve,
)
from egjax.evals.table import print_summary
from experiments.common import emit, finished, note, open_run, provenance, run_main
from experiments.evaluate import COPY, HUMAN, NAMES, SEARCH
from experiments.training import METRICS, curve

__all__ = ["Config", "build"]

_ROLES = {
    "base": Role.BASE,
    "expert": Role.EXPERT,
    "large": Role.LARGE,
    "ratio": Role.RATIO,
    "distilled": Role.DISTILLED,
    "preferred": Role.PREFERRED,
    SEARCH: Role.SEARCH,
    COPY: Role.COPY,
    HUMAN: Role.HUMAN,
}
_LABELS = {**NAMES, SEARCH: "search", COPY: "nearest training plan", HUMAN: "human program"}
_COMPARED = (
    ("expert", COPY),
    ("expert", "base"),
    ("ratio", "expert"),
    ("ratio", "large"),
    ("distilled", "expert"),
    ("distilled", "large"),
    ("distilled", "ratio"),
    ("preferred", "expert"),
    ("preferred", "large"),
    ("preferred", "distilled"),
)
_CURVES = {
    "pretrain_small": "pretrain small",
    "pretrain_large": "pretrain large",
    "sft": "SFT (πᴱ)",
    "distill": "distillation",
    "dpo": "DPO",
}
_EXAMPLES = 6
# Which tasks, and what is drawn together: on unseen activities the tasks of one, too, for what is
# said of activities that were not asked.
_SETS = (
    ("all", "alike"),
    ("seen", "alike"),
    ("unseen", "alike"),
    ("unseen, by activity", "activity"),
)


@dataclass(frozen=True)
class Config:
    """Which run to report."""

    run: Path = Path("runs/quick")
    """Run directory."""
    seeds: tuple[int, ...] = (0,)
    """Seeds whose outcomes are put together."""
    title: str = "Episodic grounding on RobotHow"
    """Heading."""
    json: Annotated[bool, tyro.conf.arg(help="print figures as JSON lines")] = False


Rows = dict[str, list[dict[str, Any]]]


def _read(path: Path) -> Any:
    return json.loads((path / "outcomes.json").read_text(encoding="utf-8"))


def _scores(name: str, rows: Sequence[dict[str, Any]], seed: int) -> ModelScores:
    """One row of the main table."""
    scores = []
    for split in ("seen", "unseen"):
        part = [row for row in rows if row["split"] == split]
        if not part:
            continue
        tasks = [row["alike"] for row in part]
        solved = [row for row in part if row["solved"]]

        def figure(metric: str, key: str, kind: type, part=part, tasks=tasks, split=split):
            values = np.array([row[key] for row in part], kind)
            label = f"{metric}/{_LABELS[name]}/{split}"
            return measure(label, values, "fraction", seed=seed, clusters=tasks)

        lengths = None
        if solved:
            ratios = np.array([r["length"] / max(r["human_length"], 1) for r in solved])
            lengths = measure(
                f"length/{_LABELS[name]}/{split}",
                ratios,
                "ratio",
                seed=seed,
                clusters=[r["alike"] for r in solved],
            )
        scores.append(
            PlanScores(
                split=split,
                success=figure("success", "solved", bool),
                executable=figure("executable", "executable", bool),
                length_ratio=lengths,
                rouge_l=None if name == HUMAN else figure("rouge_l", "rouge_l", float),
            )
        )
    return ModelScores(_LABELS[name], _ROLES[name], tuple(scores))


def _comparisons(rows: Rows, seed: int) -> list[Comparison]:
    found = []
    for ours, theirs in ((a, b) for a, b in _COMPARED if a in rows and b in rows):
        for split, cluster in _SETS:
            pairs = [
                (a, b)
                for a, b in zip(rows[ours], rows[theirs], strict=True)
                if split.startswith(("all", a["split"]))
            ]
            if len(pairs) < 2:
                continue
            assert all(a["task"] == b["task"] for a, b in pairs)
            for metric, key in (("success", "solved"), ("rouge_l", "rouge_l")):
                difference = paired_measure(
                    f"{metric}/{_LABELS[ours]} − {_LABELS[theirs]}/{split}",
                    np.array([a[key] for a, _ in pairs]),
                    np.array([b[key] for _, b in pairs]),
                    "fraction",
                    seed=seed,
                    clusters=[a[cluster] for a, _ in pairs],
                )
                found.append(Comparison(_LABELS[ours], _LABELS[theirs], metric, split, difference))
    return found


def _questions(records: Sequence[Any], seed: int) -> list[QuestionScore]:
    found = []
    for name in NAMES:
        for kind in records[0]["questions"].get(name, {}):
            right = [np.array(record["questions"][name][kind]) for record in records]
            items = np.tile(np.arange(len(right[0])), len(right)).tolist()
            figure = measure(
                f"{kind}/{NAMES[name]}",
                np.concatenate(right),
                "fraction",
                seed=seed,
                clusters=items,
            )
            found.append(QuestionScore(NAMES[name], kind, figure))
    return found


def _probes(records: Sequence[Any], seed: int) -> list[ProbeCurve]:
    found = []
    for name, one in records[0]["probes"].items():
        correct = np.concatenate([np.array(r["probes"][name]["correct"]) for r in records], axis=1)
        tasks = [task for r in records for task in r["probes"][name]["tasks"]]
        accuracy = tuple(
            measure(f"probe/{NAMES[name]}/layer {i}", row, "fraction", seed=seed, clusters=tasks)
            for i, row in enumerate(correct.astype(bool))
        )
        majority = {k: v for k, v in one["majority"].items() if k != "ratio"}
        found.append(ProbeCurve(NAMES[name], "activity", accuracy, Figure(**majority)))
    return found


def _examples(rows: Rows) -> list[PlanExample]:
    """Tasks of both splits, those on which models differ first; the order is the tasks' own."""
    models = [name for name in NAMES if name in rows]
    names = [*models, SEARCH, HUMAN]

    def column(name: str, i: int) -> PlanColumn:
        row = rows[name][i]
        steps = tuple(PlanStep(**step) for step in row["steps"])
        return PlanColumn(_LABELS[name], steps, row["satisfied"], row["goals"], row["solved"])

    count = len({row["task"] for row in rows[HUMAN]})  # of the first seed
    differ = [len({rows[name][i]["solved"] for name in models}) > 1 for i in range(count)]
    order = sorted(range(count), key=lambda i: not differ[i])
    chosen: list[int] = []
    for split in ("seen", "unseen"):
        chosen += [i for i in order if rows[HUMAN][i]["split"] == split][: _EXAMPLES // 2]
    return [
        PlanExample(
            task=rows[HUMAN][i]["task"],
            activity=rows[HUMAN][i]["activity"],
            split=rows[HUMAN][i]["split"],
            goals=tuple(rows[HUMAN][i]["wanted"]),
            plans=tuple(column(name, i) for name in names),
        )
        for i in chosen
    ]


def build(config: Config) -> Results:
    """Results of a run from the outcomes that its stages wrote."""
    if not config.seeds:
        raise EgjaxError("no seed to report", where="--seeds")
    seed = config.seeds[0]
    records = [_read(config.run / f"seed{s}/evaluate") for s in config.seeds]
    fixed = _read(config.run / "held_out_search")
    models = [name for name in NAMES if name in records[0]["plans"]]
    rows: Rows = {
        name: [row for record in records for row in record["plans"][name]]
        for name in (*models, COPY)
    }
    # Search and human programs do not depend on a seed; they stand beside each one's rows.
    rows |= {name: fixed["plans"][name] * len(records) for name in (SEARCH, HUMAN)}
    tasks = json.loads((config.run / "tasks" / "tasks.json").read_text())
    collected = json.loads((config.run / "collect" / "search.json").read_text())["tasks"]
    curves = tuple(
        StepCurve(
            _LABELS[name],
            by_steps(
                [row["human_length"] for row in rows[name]],
                [row["solved"] for row in rows[name]],
                seed=seed,
                clusters=[row["alike"] for row in rows[name]],
            ),
        )
        for name in (*models, COPY, SEARCH)
    )
    return Results(
        title=config.title,
        manifest=_manifest(config),
        setting=_setting(tasks, config),
        models=tuple(_scores(name, rows[name], seed) for name in (*models, SEARCH, COPY, HUMAN)),
        comparisons=tuple(_comparisons(rows, seed)),
        questions=tuple(_questions(records, seed)),
        by_steps=curves,
        probes=tuple(_probes(records, seed)),
        training=tuple(_training(config)),
        search=_search(fixed["search"], collected),
        examples=tuple(_examples(rows)),
    )


def _setting(tasks: dict[str, Any], config: Config) -> dict[str, str]:
    count = Counter(row["split"] for row in tasks["tasks"])
    goals = {"core": "core (without CLOSE)", "e2wm": "e2wm (with CLOSE)"}[tasks["goals"]]
    return {
        "data": f"{tasks['dataset']}, {tasks['programs']} programs, "
        f"{tasks['without_goal']} without a goal",
        "goals": goals,
        "training tasks": str(count["train"]),
        "held-out tasks of seen activities": str(count["seen"]),
        "tasks of unseen activities": f"{count['unseen']} ({', '.join(tasks['unseen'])})",
        "seeds": ", ".join(map(str, config.seeds)),
    }


def _training(config: Config) -> list[TrainingCurve]:
    found = []
    for stage, label in _CURVES.items():
        path = config.run / f"seed{config.seeds[0]}" / stage
        if not (path / METRICS).is_file():  # not run, or a model taken as it was
            continue
        steps, values = curve(path, "loss")
        found.append(TrainingCurve(label, "loss", tuple(steps), tuple(values)))
    return found


def _search(held: list[dict[str, Any]], collected: list[dict[str, Any]]) -> SearchReport:
    rows = [SearchedTask(**row) for row in held]
    figures = []
    for name, group in (("training tasks", collected), ("held-out tasks", held)):
        n = len(group)
        seconds = sum(row["seconds"] for row in group)
        solved = sum(row["solved"] for row in group)
        figures.append(Figure(f"solved, {name}", solved, "tasks", n=n))
        figures.append(Figure(f"seconds, {name}", seconds, "s", n=n))
    return SearchReport(tuple(figures), tuple(rows))


def _manifest(config: Config) -> Manifest:
    """What was run, with the time of every stage."""
    names = ["tasks", "collect", "text", "held_out_search"]
    for seed in config.seeds:
        every = [f"seed{seed}/{name}" for name in (*_CURVES, "evaluate")]
        names += [name for name in every if (config.run / name).is_dir()]
    stages = []
    for name in names:
        done = finished(config.run, name, made_by="pipeline")
        at, code = provenance(done)
        stages.append(StageTime(name, done.seconds, kept=at < began(), code=code))
    return dataclasses.replace(describe(seeds=config.seeds), stages=tuple(stages))


def write(config: Config) -> Path:
    """Writes the report into `run/report` and prints the short table."""
    results = build(config)
    found = page.write(results, config.run / "report")
    if config.json:
        figures = [f for m in results.models for s in m.scores for f in (s.success, s.executable)]
        emit(*figures, *(c.difference for c in results.comparisons), json=True)
    else:
        print_summary(results)
    note(f"report: {found}")
    return found


def main(config: Config) -> None:
    with open_run(config.run):
        if hosts.index() == 0:
            write(config)


if __name__ == "__main__":
    run_main(main, Config)
