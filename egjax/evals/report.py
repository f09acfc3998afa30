"""One HTML page, its plots as PNG, and `results.json`: written together from one `Results`."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from egjax.errors import require
from egjax.evals import claims
from egjax.evals.intervals import LEVEL
from egjax.evals.manifest import Manifest, write_atomic
from egjax.evals.plots import DARK, LIGHT, draw_all
from egjax.evals.results import ModelScores, QuestionScore, Results, SearchedTask, to_json
from egjax.evals.table import number

__all__ = ["render", "write"]

_ALT = {
    "success": "Plan success of every model with intervals, seen and unseen activities apart",
    "steps": "Plan success against the number of steps of the human program",
    "probes": "Accuracy of a linear probe against depth",
    "training": "Training curves",
    "search": "Length of the search's plans against the human's, and tasks solved by goals",
}


def render(results: Results, *, light: dict[str, bytes], dark: dict[str, bytes]) -> str:
    """The whole page as text; it needs no other file and no network.

    Args:
        results: one run.
        light, dark: PNG bytes by plot name, as `egjax.evals.plots.draw_all` gives them.

    Raises:
        ImportError: jinja2 is not installed; the message names the extra.
    """
    jinja2 = require("jinja2", "eval")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("egjax.evals", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(number=number, clock=_clock, short=_short)
    plots = {
        name: {"light": _embedded(light[name]), "dark": _embedded(dark[name]), "alt": _ALT[name]}
        for name in light
    }
    return environment.get_template("report.html.j2").render(
        results=results,
        manifest=results.manifest,
        level=round(100 * LEVEL),
        headline=claims.headline(results),
        compared=[(pair, claims.comparison_claim(pair)) for pair in results.comparisons],
        splits=_splits(results.models),
        questions=_question_table(results.questions),
        hardest=_hardest_first(results.search.tasks),
        plots=plots,
        total=sum(stage.seconds for stage in results.manifest.stages),
        code=_code(results.manifest),
        other_code=_other_code(results.manifest),
    )


def write(results: Results, folder: Path) -> Path:
    """Writes `results.json`, `manifest.json`, `plots/*.png` and `report.html`.

    Args:
        results: one run.
        folder: where to; made if need be.

    Returns:
        Path of the page.

    Raises:
        EgjaxError: a file cannot be written.
        ImportError: a library of the extra `eval` is missing; nothing is written then but
            `results.json` and `manifest.json`.
    """
    write_atomic(folder / "results.json", to_json(results))
    write_atomic(folder / "manifest.json", results.manifest.to_json())
    light, dark = draw_all(results, LIGHT), draw_all(results, DARK)
    for name, image in light.items():
        write_atomic(folder / "plots" / f"{name}.png", image)
    page = folder / "report.html"
    write_atomic(page, render(results, light=light, dark=dark))
    return page


def _embedded(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode("ascii")


def _splits(models: Sequence[ModelScores]) -> list[str]:
    return list(dict.fromkeys(scores.split for model in models for scores in model.scores))


def _question_table(scores: Sequence[QuestionScore]) -> dict[str, Any]:
    """Models down, tasks across; a cell is a figure or None."""
    tasks = list(dict.fromkeys(score.task for score in scores))
    cells = {(score.model, score.task): score.accuracy for score in scores}
    models = dict.fromkeys(score.model for score in scores)
    counts = {score.task: score.accuracy.n for score in scores}
    return {
        "tasks": [(task, counts[task]) for task in tasks],
        "rows": [(model, [cells.get((model, task)) for task in tasks]) for model in models],
    }


def _hardest_first(tasks: Sequence[SearchedTask]) -> list[SearchedTask]:
    """Unsolved ones, then by how long a plan had to be."""
    return sorted(tasks, key=lambda t: (t.solved, -t.goals + t.satisfied, -(t.plan_length or 0)))


def _code(manifest: Manifest) -> str:
    if manifest.commit is None:
        return "no git clone"
    changed = ", with uncommitted changes" if manifest.dirty else ""
    return f"{manifest.commit[:12]}{changed}"


def _other_code(manifest: Manifest) -> dict[str, str]:
    """By stage, the code that worked on it where it was not the report's own."""
    own = ((manifest.commit or "") + ("+" if manifest.dirty else ""),)
    return {
        stage.name: ", ".join(
            code[:12] + ("+" if code.endswith("+") else "") for code in stage.code
        )
        for stage in manifest.stages
        if stage.code not in ((), own)
    }


def _short(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _clock(seconds: float) -> str:
    """`3.2 s`, `4 min 05 s`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
