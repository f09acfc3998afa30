"""The report's plots as PNG bytes, each in a light and a dark form."""

from __future__ import annotations

import collections
import dataclasses
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

from egjax.errors import require
from egjax.evals.intervals import Figure, measure
from egjax.evals.results import (
    ModelScores,
    PlanScores,
    ProbeCurve,
    Results,
    Role,
    SearchedTask,
    SearchReport,
    StepCurve,
    TrainingCurve,
)

__all__ = ["DARK", "LIGHT", "Theme", "draw_all", "new_axes", "png"]


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of one form: page, text, grid, and one colour a role."""

    page: str
    text: str
    grid: str
    roles: dict[Role, str]
    cycle: tuple[str, ...]


# After Okabe and Ito's palette, which colour-blind readers can tell apart.
LIGHT = Theme(
    page="#ffffff",
    text="#1d2329",
    grid="#dfe3e8",
    roles={
        Role.BASE: "#8a929b",
        Role.EXPERT: "#0072b2",
        Role.LARGE: "#7a5c3e",
        Role.RATIO: "#d55e00",
        Role.DISTILLED: "#009e73",
        Role.PREFERRED: "#b14a8b",
        Role.SEARCH: "#1d2329",
        Role.COPY: "#c79200",
        Role.HUMAN: "#4d5760",
    },
    cycle=("#0072b2", "#d55e00", "#009e73", "#b14a8b", "#c79200", "#56b4e9"),
)
DARK = Theme(
    page="#171a1e",
    text="#e6e9ec",
    grid="#343a41",
    roles={
        Role.BASE: "#8f98a1",
        Role.EXPERT: "#56b4e9",
        Role.LARGE: "#c9a27a",
        Role.RATIO: "#f0833a",
        Role.DISTILLED: "#2fc79a",
        Role.PREFERRED: "#dd86b8",
        Role.SEARCH: "#e6e9ec",
        Role.COPY: "#e8b83a",
        Role.HUMAN: "#b5bdc5",
    },
    cycle=("#56b4e9", "#f0833a", "#2fc79a", "#dd86b8", "#e8b83a", "#8fb8ff"),
)
_MARKERS = "osD^vPX*h"
_DPI = 144
_GOAL_BINS = ((1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 9), (10, 10**6))


def draw_all(results: Results, theme: Theme) -> dict[str, bytes]:
    """PNG bytes of every plot that the results have data for, by name.

    Args:
        results: one run.
        theme: `LIGHT` or `DARK`.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra.
    """
    roles = {model.name: model.role for model in results.models}
    plots: dict[str, Callable[[Any], Any]] = {}
    if results.models:
        plots["success"] = lambda style: _success(results.models, style)
    if results.by_steps:
        plots["steps"] = lambda style: _steps(results.by_steps, roles, style)
    if results.probes:
        plots["probes"] = lambda style: _probes(results.probes, roles, style)
    if results.training:
        plots["training"] = lambda style: _training(results.training, style)
    if results.search.tasks:
        plots["search"] = lambda style: _search(results.search, style)
    return {name: png(draw, theme) for name, draw in plots.items()}


def png(draw: Callable[[Theme], Any], theme: Theme) -> bytes:
    """PNG bytes of a figure in the project's style; no display, no global figures of pyplot."""
    matplotlib = require("matplotlib", "eval")
    style = {
        "font.family": "DejaVu Sans",  # ships with matplotlib and has the method's letters
        "font.size": 10.5,
        "axes.titlesize": 11.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.labelcolor": theme.text,
        "axes.edgecolor": theme.text,
        "axes.facecolor": theme.page,
        "figure.facecolor": theme.page,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "legend.frameon": False,
        "text.color": theme.text,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
        "lines.linewidth": 1.8,
        "lines.markersize": 5.5,
    }
    with matplotlib.rc_context(style):
        buffer = io.BytesIO()
        # Fixed metadata: the same results give the same bytes.
        draw(theme).savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def new_axes(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """A figure of a size in inches and its axes, an array of [rows, columns]."""
    figure = require("matplotlib.figure", "eval").Figure(figsize=size, layout="constrained")
    require("matplotlib.backends.backend_agg", "eval").FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _errors(figures: Sequence[Figure], scale: float = 100.0) -> list[list[float]]:
    """Distances to the ends of the intervals, as matplotlib's errorbar wants them."""
    low = [f.value - f.low if f.low is not None else 0.0 for f in figures]
    high = [f.high - f.value if f.high is not None else 0.0 for f in figures]
    return [[scale * max(v, 0.0) for v in side] for side in (low, high)]


def _letters(name: str) -> str:
    """π with a combining bar as math text: fonts place the bar beside the letter."""
    return name.replace("π̄", r"$\bar{\mathregular{π}}$")


def _success(models: Sequence[ModelScores], theme: Theme) -> Any:
    """Success of each row, one panel a split."""
    splits = list(dict.fromkeys(s.split for m in models for s in m.scores))
    figure, axes = new_axes(
        1, len(splits), (3.1 * len(splits) + 3.4, 0.36 * len(models) + 1.3), sharey=True
    )
    for axis, split in zip(axes[0], splits):
        rows: list[tuple[int, ModelScores, PlanScores]] = [
            (i, m, s) for i, m in enumerate(models) for s in m.scores if s.split == split
        ]
        for i, model, scores in rows:
            axis.errorbar(
                100 * scores.success.value, i, xerr=_errors([scores.success]), fmt="o",
                color=theme.roles[model.role], capsize=3, markersize=7,
            )  # fmt: skip
        counts = sorted({scores.success.n for _, _, scores in rows})
        shown = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"
        axis.set_title(f"{split} activities (n = {shown})")
        axis.set(xlim=(-4, 104), xlabel="plans that reach every goal, %")
        axis.grid(axis="y", visible=False)
    axes[0][0].set_yticks(range(len(models)), [_letters(m.name) for m in models])
    axes[0][0].set_ylim(len(models) - 0.4, -0.6)
    return figure


def _steps(curves: Sequence[StepCurve], roles: dict[str, Role], theme: Theme) -> Any:
    """Success against the number of steps; rows stand side by side so that bars do not hide."""
    figure, axes = new_axes(1, 1, (8.2, 4.4))
    axis = axes[0][0]
    labels = list(dict.fromkeys((b.low, b.high) for curve in curves for b in curve.bins))
    labels.sort()
    width = 0.62 / max(1, len(curves) - 1)
    for i, curve in enumerate(curves):
        bins = sorted(curve.bins, key=lambda b: b.low)
        place = [labels.index((b.low, b.high)) + (i - (len(curves) - 1) / 2) * width for b in bins]
        figures = [b.success for b in bins]
        axis.errorbar(
            place, [100 * f.value for f in figures], yerr=_errors(figures), capsize=2.5,
            fmt=f"-{_MARKERS[i % len(_MARKERS)]}", label=_letters(curve.model),
            color=_colour(curve.model, i, roles, theme), elinewidth=1.0, linewidth=1.3,
        )  # fmt: skip
    counts = {(b.low, b.high): b.success.n for curve in curves for b in curve.bins}
    axis.set_xticks(
        range(len(labels)), [f"{_range(*pair)} steps\nn = {counts[pair]}" for pair in labels]
    )
    axis.grid(axis="x", visible=False)
    axis.set(ylim=(-4, 104), ylabel="plans that reach every goal, %")
    axis.set_xlabel("length of the human program, FIND not counted")
    figure.legend(loc="outside right upper")
    return figure


def _probes(curves: Sequence[ProbeCurve], roles: dict[str, Role], theme: Theme) -> Any:
    """Accuracy against depth (models differ in their number of layers), one panel a label."""
    names = list(dict.fromkeys(curve.label for curve in curves))
    figure, axes = new_axes(1, len(names), (4.1 * len(names) + 2.2, 4.0), sharey=True)
    models = list(dict.fromkeys(curve.model for curve in curves))
    for axis, name in zip(axes[0], names):
        inside = [curve for curve in curves if curve.label == name]
        for curve in inside:
            i = models.index(curve.model)
            layers = len(curve.accuracy)
            shift = 1.2 * (i - (len(models) - 1) / 2)  # so that bars do not hide each other
            depth = [100 * k / max(1, layers - 1) + shift for k in range(layers)]
            axis.errorbar(
                depth, [100 * f.value for f in curve.accuracy], yerr=_errors(curve.accuracy),
                fmt=f"-{_MARKERS[i % len(_MARKERS)]}", capsize=2.5, elinewidth=1.0,
                color=_colour(curve.model, i, roles, theme),
                label=_letters(curve.model) if axis is axes[0][0] else None,
            )  # fmt: skip
        level = 100 * inside[0].majority.value
        axis.axhline(level, color=theme.text, linestyle=":", linewidth=1.3)
        axis.annotate(
            "most frequent label", (100, level), ha="right", va="bottom", fontsize=9,
            textcoords="offset points", xytext=(0, 2),
        )  # fmt: skip
        axis.set_title(f"{name} (n = {inside[0].accuracy[0].n})")
        axis.set(xlabel="depth of the layer, % of the model", ylim=(-4, 104))
    axes[0][0].set_ylabel("accuracy of a linear probe, %")
    figure.legend(loc="outside right upper")
    return figure


def _training(curves: Sequence[TrainingCurve], theme: Theme) -> Any:
    """One panel a stage; the quantities that share it are told by colour."""
    stages = list(dict.fromkeys((curve.stage, curve.quantity) for curve in curves))
    columns = min(3, len(stages))
    rows = math.ceil(len(stages) / columns)
    figure, axes = new_axes(rows, columns, (3.5 * columns, 2.5 * rows))
    flat = list(axes.flat)
    for axis, (stage, quantity) in zip(flat, stages):
        curve = next(c for c in curves if (c.stage, c.quantity) == (stage, quantity))
        axis.plot(curve.steps, curve.values, color=theme.cycle[0], alpha=0.3, linewidth=1.0)
        axis.plot(curve.steps, _smooth(curve.values), color=theme.cycle[0])
        axis.set_title(_letters(stage))
        axis.set(ylabel=quantity, xlabel="step")
        axis.ticklabel_format(style="plain", axis="x")
    for axis in flat[len(stages) :]:
        axis.set_axis_off()
    return figure


def _search(report: SearchReport, theme: Theme) -> Any:
    """Plan length of the search against the human's, and the share solved by number of goals."""
    figure, axes = new_axes(1, 2, (9.6, 4.0))
    _lengths(axes[0][0], report.tasks, theme)
    axis = axes[0][1]
    groups = [[t for t in report.tasks if low <= t.goals <= high] for low, high in _GOAL_BINS]
    shown = [(pair, group) for pair, group in zip(_GOAL_BINS, groups) if group]
    for i, (_, group) in enumerate(shown):
        solved = [task.solved for task in group]
        share = measure("solved", solved, "fraction", seed=0)
        axis.bar(i, 100 * share.value, color=theme.roles[Role.EXPERT], width=0.7, alpha=0.75)
        axis.errorbar(i, 100 * share.value, yerr=_errors([share]), color=theme.text, capsize=3)
        axis.annotate(
            f"{sum(solved)}/{len(solved)}", (i, 2), ha="center", va="bottom", fontsize=8.5,
            color=theme.page if share.value > 0.12 else theme.text,
        )  # fmt: skip
    ends = [f"{low}+" if high > 1000 else _range(low, high) for (low, high), _ in shown]
    axis.set_xticks(range(len(shown)), ends)
    axis.grid(axis="x", visible=False)
    axis.set_title("Tasks solved")
    axis.set(ylim=(0, 104), xlabel="goals of the task", ylabel="tasks solved, %")
    return figure


def _lengths(axis: Any, tasks: Sequence[SearchedTask], theme: Theme) -> None:
    """One dot for all tasks that share both lengths; its area is their number."""
    solved = collections.Counter(
        (t.human_length, t.plan_length) for t in tasks if t.plan_length is not None
    )
    missed = collections.Counter(t.human_length for t in tasks if t.plan_length is None)
    longest = max([n for pair in solved for n in pair] + list(missed), default=1) + 1
    axis.plot([0, longest], [0, longest], color=theme.text, linestyle=":", linewidth=1.2)
    axis.scatter(
        [human for human, _ in solved], [plan for _, plan in solved],
        s=[22 * count for count in solved.values()], color=theme.roles[Role.DISTILLED], alpha=0.7,
        linewidths=0, label=f"solved ({solved.total()})",
    )  # fmt: skip
    axis.scatter(
        list(missed), [0] * len(missed), s=[26 * count for count in missed.values()], marker="x",
        color=theme.roles[Role.RATIO], label=f"not solved ({missed.total()})", zorder=3,
    )  # fmt: skip
    legend = axis.legend(loc="upper left")
    for handle in legend.legend_handles:
        handle.set_sizes([34])
    axis.set_title("Steps of the shortest plan found")
    axis.set(xlabel="steps of the human program", ylabel="steps of the search’s plan")
    axis.set(xlim=(0, longest), ylim=(-longest * 0.06, longest))
    axis.locator_params(integer=True)


def _colour(name: str, index: int, roles: dict[str, Role], theme: Theme) -> str:
    return theme.roles[roles[name]] if name in roles else theme.cycle[index % len(theme.cycle)]


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}–{high}"


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over a window of a twentieth of the curve, shorter at its ends."""
    half = max(1, len(values) // 40)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [math.fsum(window) / len(window) for window in windows]
