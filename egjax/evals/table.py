"""The short table on the terminal at the end of a run."""

from __future__ import annotations

from typing import Any

from egjax.errors import require
from egjax.evals.claims import headline
from egjax.evals.intervals import Figure
from egjax.evals.results import Results

__all__ = ["number", "print_summary"]


def number(figure: Figure | None, *, interval: bool = True, unit: bool = True) -> str:
    """A figure as people read it: `61.3 % [52.0, 70.1]`, `0.92× [0.88, 0.97]`, `1,204 steps/s`.

    Args:
        figure: to show; None gives a dash.
        interval: whether to add its ends.
        unit: whether to add its unit.
    """
    if figure is None:
        return "–"
    percent = figure.unit == "fraction"
    shown = _digits(figure.value, percent)
    if unit:
        shown += {"fraction": " %", "ratio": "×", "count": ""}.get(figure.unit, f" {figure.unit}")
    if not interval or figure.low is None or figure.high is None:
        return shown
    return f"{shown} [{_digits(figure.low, percent)}, {_digits(figure.high, percent)}]"


def _digits(value: float, percent: bool) -> str:
    if percent:
        text = f"{100 * value:.1f}"
    elif value == int(value) or abs(value) >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.2f}"
    return text.replace("-", "−")


def print_summary(results: Results, *, console: Any = None) -> None:
    """Prints the main table and the sentences that the data allow.

    Args:
        results: one run.
        console: a `rich.console.Console`; the terminal without it.

    Raises:
        ImportError: rich is not installed; the message names the extra.
    """
    console = console or require("rich.console", "eval").Console()
    box = require("rich.box", "eval").SIMPLE_HEAD
    table = require("rich.table", "eval").Table(
        title=results.title, title_justify="left", box=box, padding=(0, 1)
    )
    splits = list(dict.fromkeys(s.split for model in results.models for s in model.scores))
    table.add_column("plans, %")
    for split in splits:
        counts = {s.success.n for m in results.models for s in m.scores if s.split == split}
        table.add_column(f"{split}, n = {max(counts)}\nsuccess", justify="right", no_wrap=True)
        table.add_column("\nexec.", justify="right", no_wrap=True)
    for model in results.models:
        cells = {scores.split: scores for scores in model.scores}
        row = [model.name]
        for split in splits:
            scores = cells.get(split)
            row.append(number(scores.success, unit=False) if scores else "–")
            row.append(number(scores.executable, interval=False, unit=False) if scores else "–")
        table.add_row(*row)
    console.print(table)
    for claim in headline(results):
        console.print(f"• {claim.text}", markup=False, highlight=False)
