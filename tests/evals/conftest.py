"""An invented run, whole enough to fill every section of the report."""

from __future__ import annotations

import numpy as np
import pytest

from egjax.evals.intervals import Figure, measure, paired_measure
from egjax.evals.manifest import Hardware, Manifest, StageTime
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
    StepBin,
    StepCurve,
    TrainingCurve,
)

ROWS = {
    "πᴺ small": (Role.BASE, 0.02, "before training"),
    "πᴱ small": (Role.EXPERT, 0.55, "after multi-task training"),
    "πᴸ large": (Role.LARGE, 0.05, "before distillation"),
    "π̄ by decoding": (Role.RATIO, 0.58, "πᴸ·πᴱ/πᴺ"),
    "distilled": (Role.DISTILLED, 0.72, "reverse KL"),
    "distilled + DPO": (Role.PREFERRED, 0.40, ""),
    "search": (Role.SEARCH, 0.92, "256 simulations"),
    "nearest plan": (Role.COPY, 0.38, "copied from training"),
    "human program": (Role.HUMAN, 1.0, ""),
}


def _plans(rng) -> tuple[tuple[ModelScores, ...], dict[str, np.ndarray]]:
    success = {}
    models = []
    for name, (role, rate, note) in ROWS.items():
        scores = []
        for split, n in (("seen", 120), ("unseen", 54)):
            won = rng.random(n) < (rate if split == "seen" or rate == 1 else 0.75 * rate)
            run = won | (rng.random(n) < 0.5)
            success[name, split] = won
            lengths = rng.normal(0.9, 0.2, max(1, won.sum()))
            human = role is Role.HUMAN
            scores.append(
                PlanScores(
                    split,
                    measure(f"success/{name}/{split}", won, "fraction", seed=0),
                    measure(f"executable/{name}/{split}", run, "fraction", seed=0),
                    measure("length", lengths, "ratio", seed=0) if won.any() else None,
                    None if human else measure("rouge", rng.random(n), "fraction", seed=0),
                )
            )
        models.append(ModelScores(name, role, tuple(scores), note))
    both = {name: np.concatenate([success[name, s] for s in ("seen", "unseen")]) for name in ROWS}
    return tuple(models), both


def _comparisons(won: dict[str, np.ndarray]) -> tuple[Comparison, ...]:
    pairs = [
        (ours, theirs)
        for ours in ("π̄ by decoding", "distilled", "distilled + DPO")
        for theirs in ("πᴱ small", "πᴸ large")
    ]
    return tuple(
        Comparison(a, b, "success", "all", paired_measure("d", won[a], won[b], "fraction", seed=0))
        for a, b in [*pairs, ("πᴱ small", "nearest plan")]
    )


def _probes(rng) -> tuple[ProbeCurve, ...]:
    curves = []
    for label in ("activity", "goal relation"):
        for name, layers, best in (("πᴺ small", 5, 0.45), ("πᴱ small", 5, 0.9)):
            accuracy = tuple(
                measure(f"layer {i}", rng.random(90) < 0.2 + (best - 0.2) * i / layers, "fraction",
                        seed=0)
                for i in range(layers)
            )  # fmt: skip
            majority = measure("majority", rng.random(90) < 0.12, "fraction", seed=0)
            curves.append(ProbeCurve(name, label, accuracy, majority))
    return tuple(curves)


def _search(rng) -> SearchReport:
    tasks = []
    for i in range(40):
        human, solved = int(rng.integers(3, 18)), bool(rng.random() < 0.8)
        goals = int(rng.integers(1, 9))
        plan = int(max(1, human + rng.integers(-4, 2))) if solved else None
        tasks.append(
            SearchedTask(f"file{i}_1", "Relax on sofa", goals, goals if solved else goals - 1,
                         solved, plan, human, 2048, float(rng.random()))
        )  # fmt: skip
    return SearchReport(
        figures=(
            Figure("tasks_solved", 17, "count", 20, None, None, 0, "E2WM", 16),
            Figure(
                "simulations_per_second", 20431.0, "simulations/s", 20, None, None, 0, "E2WM", 27
            ),
            Figure("positives", 153, "count", 40),
        ),
        tasks=tuple(tasks),
    )


def _example() -> PlanExample:
    good = tuple(PlanStep(t, True) for t in ("Walk to kitchen.", "Grab milk.", "Open fridge."))
    refused = PlanStep("Put milk in fridge.", False, "fridge is closed")
    rest = PlanStep("Close fridge.", False)
    return PlanExample(
        "file710_2",
        "Put groceries in fridge",
        "unseen",
        ("milk inside fridge", "fridge closed"),
        (
            PlanColumn("human program", (*good, PlanStep("Put milk in fridge.", True)), 2, 2, True),
            PlanColumn("πᴱ small", (*good[:2], refused, rest), 0, 2, False),
            PlanColumn("distilled", (*good, PlanStep("Put milk in fridge.", True)), 2, 2, True),
            PlanColumn("πᴺ small", (), 0, 2, False),
        ),
    )


@pytest.fixture(scope="session")
def results() -> Results:
    """The invented run."""
    return invent()


def invent() -> Results:
    rng = np.random.default_rng(0)
    models, won = _plans(rng)
    steps = tuple(range(0, 2000, 10))
    bins = ((1, 4), (5, 8), (9, 12), (13, 30))
    return Results(
        title="Episodic grounding on RobotHow",
        manifest=Manifest(
            command="python -m experiments.pipeline --seed 0",
            commit="0123456789abcdef0123456789abcdef01234567",
            dirty=True,
            started="2026-01-02T03:04:05Z",
            seeds=(0,),
            python="3.11.2",
            versions={"jax": "0.10.2", "flax": "0.12.8"},
            hardware=Hardware("Imaginary CPU @ 2.5GHz", 2, 7.8, ("cpu (cpu 0)",)),
            stages=(
                StageTime("tasks", 12.3, True, ("fedcba9876543210fedcba9876543210fedcba98+",)),
                StageTime("search", 185.0),
                StageTime("train", 605.0),
            ),
        ),
        setting={"tasks": "RobotHow, 518 programs, 12 left out (no goal)", "goals": "core"},
        models=models,
        comparisons=_comparisons(won),
        questions=tuple(
            QuestionScore(name, task, measure("qa", rng.random(n) < rate, "fraction", seed=0))
            for name, rate in (("most frequent", 0.3), ("πᴺ small", 0.3), ("πᴱ small", 0.8))
            for task, n in (("activity recognition", 140), ("counting", 90))
            if (name, task) != ("πᴺ small", "counting")
        ),
        by_steps=tuple(
            StepCurve(
                name,
                tuple(
                    StepBin(a, b, measure("s", rng.random(40) < rate - 0.1 * i, "fraction", seed=0))
                    for i, (a, b) in enumerate(bins)
                ),
            )
            for name, (_, rate, _) in ROWS.items()
            if name not in ("human program", "πᴺ small")
        ),
        probes=_probes(rng),
        training=tuple(
            TrainingCurve(
                stage,
                quantity,
                steps,
                tuple(float(scale * np.exp(-s / 400) + rng.normal(0, 0.05)) for s in steps),
            )
            for stage, quantity, scale in (
                ("pretrain small", "loss, nats/token", 6.0),
                ("pretrain large", "loss, nats/token", 6.2),
                ("πᴱ small", "loss, nats/token", 3.0),
                ("distil π̄", "KL, nats/token", 1.5),
                ("DPO", "margin, nats", -2.0),
            )
        ),
        search=_search(rng),
        examples=(_example(),),
        not_worked=("α above 1 made plans repeat themselves.",),
    )
