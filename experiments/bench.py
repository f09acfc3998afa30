"""What does everything cost, by size, and what got slower since the last committed figures?

    python -m experiments.bench                       (`make bench`)
    python -m experiments.bench --only bench_losses --sizes small

Runs every `experiments/bench_*.py` in sizes small to large, each in a process of its own without
the compilation cache, so that compile time and peak memory are that run's. Each script times by
medians of repeats after a warm-up and names its peer, where one is installed. After each run
`bench.json` holds all so far; those of an earlier call by the same commit on the same machine stay
in it, so a benchmark may be made in pieces (`--only`, `--sizes`). `bench.html` shows cost against
size, one panel a figure, and what differs from the newest file in `experiments/results/bench`: what
is worse by more than `--tolerance` (bytes: by 10 %) is named. Times of another machine say nothing:
there only bytes and ratios to a peer of the same run are compared. A benchmark that fails is named
at the end (exit code 1) and does not stop the others. To commit figures: `--keep NAME`, on a
machine that does nothing else. Expected: 10 minutes on two CPU cores.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import html
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from egjax.errors import EgjaxError, require
from egjax.evals.intervals import Figure
from egjax.evals.manifest import describe, write_atomic
from egjax.train.progress import progress
from experiments.common import emit, note, run_main
from experiments.data import make_task, programs

__all__ = ["Change", "Config", "compare", "main", "page"]

_HERE = Path(__file__).parent
_COMMITTED = _HERE / "results" / "bench"
_MEMORY = 0.10  # tolerance of bytes
_UNITS = {"1/s": True, "tokens/s": True, "steps/s": True, "s": False, "ms": False}  # more is better
_BYTES = ("bytes", "B", "MiB", "GiB")
_LOSSES = ("--losses", "sft", "reverse_kl", "reverse_kl_ratio", "--tokens", "512", "--width", "512")
_STEPS = ("--rows", "2", "--pairs", "2", "--repeats", "3")

_SIZES = ("small", "middle", "large")

_GROWS = {
    "bench_sim": "states at once",
    "bench_search": "simulations of a tree",
    "bench_losses": "vocabulary",
    "bench_train": "width of the model",
    "bench_decode": "parameters of the large model, millions",
}
# Size (what grows) and arguments of each run; a script that is not listed runs as it is by default.
SIZES: dict[str, dict[str, tuple[int, tuple[str, ...]]]] = {
    "bench_sim": {
        size: (batch, ("--batches", str(batch), "--repeats", "5"))
        for size, batch in (("small", 64), ("middle", 256), ("large", 1024))
    },
    "bench_search": {
        size: (count, ("--tasks", "{tasks}", "--search.simulations", str(count), "--growth"))
        for size, count in (("small", 16), ("middle", 64), ("large", 256))
    },
    "bench_losses": {
        size: (vocabulary, (*_LOSSES, "--repeats", "3", "--vocabulary", str(vocabulary)))
        for size, vocabulary in (("small", 4096), ("middle", 16384), ("large", 65536))
    },
    "bench_train": {  # width of the model
        "small": (128, (*_STEPS, "--width", "128", "--mlp", "352", "--layers", "4")),
        "middle": (256, (*_STEPS, "--width", "256", "--mlp", "704", "--layers", "6")),
        "large": (512, (*_STEPS, "--width", "512", "--mlp", "1408", "--layers", "9")),
    },
    "bench_decode": {  # millions of parameters of the large model
        "small": (4, ("--large", "4m", "--small", "4m", "--repeats", "3")),
        "middle": (30, ("--large", "30m", "--small", "4m", "--repeats", "3")),
    },
}


@dataclass(frozen=True)
class Config:
    """What to run, and with what to compare."""

    only: tuple[str, ...] = ()
    """Scripts, e.g. bench_sim; all by default."""
    sizes: tuple[Literal["small", "middle", "large"], ...] = ("small", "middle", "large")
    """Which sizes."""
    out: Path = Path("runs/bench")
    """Folder of the results."""
    against: Path | None = None
    """Results to compare with; the newest committed ones where absent."""
    tolerance: float = 0.15
    """Share by which a time or rate may be worse."""
    keep: str = ""
    """Also write the results to `experiments/results/bench/NAME.json`, to be committed."""
    json: Annotated[bool, tyro.conf.arg(help="print figures as JSON lines")] = False


def scripts() -> list[str]:
    """Every benchmark, by name; a peer's side is no benchmark by itself."""
    found = (path.stem for path in _HERE.glob("bench_*.py"))
    return sorted(name for name in found if not name.endswith("_peer"))


def _plan(config: Config) -> Iterator[tuple[str, str, int, tuple[str, ...]]]:
    """Script, size, its number and arguments."""
    for script in config.only or scripts():
        for size, (number, arguments) in SIZES.get(script, {"small": (1, ())}).items():
            if size in config.sizes:
                yield script, size, number, arguments


def _run(script: str, size: str, number: int, arguments: Sequence[str]) -> dict[str, Any]:
    """One run in a process of its own: its figures and what they cost."""
    with tempfile.TemporaryDirectory() as folder:
        tasks, costs = Path(folder) / "tasks.txt", Path(folder) / "costs.json"
        if any("{tasks}" in word for word in arguments):
            tasks.write_text("\n".join(_names()) + "\n")
        command = [sys.executable, "-m", f"experiments.{script}", "--json"]
        command += [word.format(tasks=tasks) for word in arguments]
        settings = {"EGJAX_COSTS": str(costs), "JAX_ENABLE_COMPILATION_CACHE": "false"}
        begun = time.monotonic()
        done = subprocess.run(
            command,
            cwd=_HERE.parent,
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
        )
        seconds = time.monotonic() - begun
        if done.returncode:
            told = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise EgjaxError(f"left with {done.returncode}: {told}", where=f"{script}, {size}")
        return {
            "script": script,
            "size": size,
            "number": number,
            "arguments": list(arguments),
            "seconds": seconds,
            **json.loads(costs.read_text()),
            "figures": [json.loads(x) for x in done.stdout.splitlines() if x.startswith("{")],
        }


@functools.cache
def _names() -> list[str]:
    """Five tasks that the search is measured on: evenly spread, the same on every machine."""
    found = [p for p in programs(None) if make_task(p, "e2wm", "train").predicates]
    return [p.name for p in found[:: max(1, len(found) // 5)][:5]]


# --- comparison ---------------------------------------------------------------------------------


class Change(NamedTuple):
    """How a figure differs from the committed one.

    Attributes:
        name: script, size and figure.
        before, now: its values, in `unit`; of a ratio to a peer, that ratio.
        worse: by what share it is worse; negative where it is better.
        slower: beyond the tolerance.
    """

    name: str
    before: float
    now: float
    unit: str
    worse: float
    slower: bool


def compare(old: dict[str, Any], new: dict[str, Any], tolerance: float) -> list[Change]:
    """Every figure that both results have and of which more or less is better; the worst first.

    Args:
        old, new: what `bench.json` holds.
        tolerance: of times and rates. Bytes have one of their own.
    """
    alike = _machine(old) == _machine(new)
    before, found = dict(_values(old)), []
    for key, (value, unit, ratio) in _values(new):
        if key not in before:
            continue
        was, _, was_ratio = before[key]
        bytes_ = unit in _BYTES
        if not (alike or bytes_):  # times of another machine say nothing; ratios on it do
            value, was = ratio, was_ratio
        if not value or not was:
            continue
        worse = was / value - 1 if _UNITS.get(unit, False) else value / was - 1
        slower = worse > (_MEMORY if bytes_ else tolerance)
        found.append(Change(key, was, value, unit if alike or bytes_ else "ratio", worse, slower))
    return sorted(found, key=lambda change: -change.worse)


def _values(results: dict[str, Any]) -> Iterator[tuple[str, tuple[float, str, float | None]]]:
    """Value, unit and ratio to the peer by name, of what can be better or worse."""
    for run in results["runs"]:
        where = f"{run['script']}, {run['size']}"
        yield f"{where}: peak memory", (run["peak_bytes"], "B", None)
        yield f"{where}: compilation", (run["compile_seconds"], "s", None)
        for row in run["figures"]:
            if row["unit"] in _UNITS or row["unit"] in _BYTES:
                yield f"{where}: {row['name']}", (row["value"], row["unit"], row.get("ratio"))


def _machine(results: dict[str, Any]) -> tuple[Any, ...]:
    hardware = results["manifest"]["hardware"]
    return hardware["cpu"], hardware["cores"], tuple(hardware["devices"])


def newest() -> Path | None:
    """The last committed results."""
    files = list(_COMMITTED.glob("*.json"))
    return max(files, key=lambda f: json.loads(f.read_text())["manifest"]["started"], default=None)


# --- the page -----------------------------------------------------------------------------------


class Point(NamedTuple):
    """A figure at one size, and what the peer has there (None without one)."""

    size: int
    value: float
    peer: float | None


class Panel(NamedTuple):
    """A figure at several sizes; `peer` names whom it is compared with."""

    name: str
    unit: str
    peer: str
    points: list[Point]


def _panels(results: dict[str, Any]) -> dict[str, list[Panel]]:
    """What grows with the size, or might, of each script; figures that have several sizes."""
    found: dict[str, dict[str, Panel]] = {}
    for run in results["runs"]:
        compiled = {"name": "compilation", "unit": "s", "value": run["compile_seconds"]}
        peak = {"name": "peak memory", "unit": "B", "value": run["peak_bytes"]}
        for row in (*run["figures"], compiled, peak):
            if row["value"] is None or row["unit"] not in (*_UNITS, *_BYTES, "ratio"):
                continue
            # A name that holds the size ("batch 64, 1 thread") is the same figure at every size.
            name = re.sub(rf"\b{run['number']}\b", "n", row["name"])
            panel = Panel(name, row["unit"], row.get("peer") or "", [])
            panel = found.setdefault(run["script"], {}).setdefault(name, panel)
            panel.points.append(Point(run["number"], row["value"], row.get("peer_value")))
    return {
        script: [panel for panel in panels.values() if len(panel.points) > 1]
        for script, panels in found.items()
    }


def _draw(panels: Sequence[Panel], grows: str) -> bytes:
    plt = require("matplotlib.pyplot", "eval")
    columns = 3
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 2.6 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        sizes, values, peers = zip(*panel.points, strict=True)
        shown = [*values]
        if all(peers):
            axis.loglog(sizes, peers, "s--", color="#8a929b", label=panel.peer or "peer")
            shown += peers
        axis.loglog(sizes, values, "o-", color="#0072b2", label="egjax")
        if all(peers):
            axis.legend(fontsize=7)
        _scale(axis, sizes, [value for value in shown if value > 0])
        axis.set_title(f"{panel.name} [{panel.unit}]", fontsize=8)
        axis.set_xlabel(grows, fontsize=7)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    plt.close(figure)
    return out.getvalue()


def _scale(axis: Any, sizes: Sequence[int], values: Sequence[float]) -> None:
    """Ticks in plain numbers; at least a decade upwards, so that a flat curve looks flat."""
    ticker = require("matplotlib.ticker", "eval")
    low, high = min(values, default=1.0), max(values, default=1.0)
    room = max(10.0 / (high / low), 1.0) ** 0.5 * 1.3
    axis.set_ylim(low / room, high * room)
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 3.0), numticks=12))
    axis.yaxis.set_major_formatter(ticker.EngFormatter(sep="\N{THIN SPACE}"))
    axis.yaxis.set_minor_locator(ticker.NullLocator())
    axis.tick_params(labelsize=7)


def page(results: dict[str, Any], changes: Sequence[Change], against: str) -> str:
    """The results as one page that needs no server."""
    parts = []
    for script, panels in _panels(results).items():
        doc = (_HERE / f"{script}.py").read_text().split('"""')[1].splitlines()[0]
        parts.append(f"<h2>{html.escape(script)}</h2><p>{html.escape(doc)}</p>")
        if panels:
            image = base64.b64encode(_draw(panels, _GROWS.get(script, "size"))).decode()
            parts.append(f'<img alt="cost against size" src="data:image/png;base64,{image}">')
    rows = "".join(
        f"<tr{' class=slower' if c.slower else ''}><td>{html.escape(c.name)}</td>"
        f"<td>{c.before:.4g}</td><td>{c.now:.4g} {html.escape(c.unit)}</td>"
        f"<td>{100 * c.worse:+.1f} %</td></tr>"
        for c in changes
    )
    machine = results["manifest"]
    hardware = machine["hardware"]
    told = (
        f"commit {(machine['commit'] or 'unknown')[:12]}{'+' if machine['dirty'] else ''}, "
        f"{hardware['cores']} × {hardware['cpu']}, {machine['started']}"
    )
    return (
        "<!doctype html><meta charset=utf-8><title>egjax: cost against size</title>"
        "<style>body{font:15px sans-serif;max-width:1200px;margin:2em auto}img{max-width:100%}"
        "td,th{padding:.2em .8em;text-align:left;font-variant-numeric:tabular-nums}"
        ".slower{background:#fdd}</style>"
        f"<h1>Cost against size</h1><p>{html.escape(told)}</p>{''.join(parts)}"
        f"<h2>Against {html.escape(against)}</h2><table><tr><th>figure</th><th>before</th>"
        f"<th>now</th><th>worse by</th></tr>{rows}</table>"
    )


def _earlier(out: Path, here: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs of an earlier call that go with those of this one: same commit, same machine."""
    try:
        found = json.loads(out.read_text())
    except (FileNotFoundError, ValueError):
        return []
    alike = all(found["manifest"][key] == here[key] for key in ("commit", "python", "versions"))
    clean = here["commit"] and not (here["dirty"] or found["manifest"]["dirty"])
    return (
        found["runs"] if clean and alike and _machine(found) == _machine({"manifest": here}) else []
    )


def main(config: Config) -> int:
    unknown = [name for name in config.only if name not in scripts()]
    if unknown:
        raise EgjaxError(f"no benchmark {unknown[0]!r}", remedy=f"there are {', '.join(scripts())}")
    before = config.against or newest()
    old = None if before is None else json.loads(before.read_text())
    # As JSON holds it.
    here = json.loads(json.dumps(dataclasses.asdict(describe(seeds=()))))
    plan, failed = list(_plan(config)), []
    runs = {(run["script"], run["size"]): run for run in _earlier(config.out / "bench.json", here)}
    made = set()
    text = ""
    with progress("benchmarks", len(plan)) as update:
        for done, (script, size, number, arguments) in enumerate(plan, start=1):
            try:
                runs[script, size] = _run(script, size, number, arguments)
                made.add((script, size))
            except EgjaxError as error:
                failed.append(f"{error}")
                note(f"failed: {error}")
            results = {"manifest": here, "runs": [runs[key] for key in sorted(runs, key=_place)]}
            text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
            write_atomic(config.out / "bench.json", text)
            update(done, f"{script} {size}")
    results = json.loads(text) if text else {"manifest": here, "runs": []}
    changes = [] if old is None else compare(old, results, config.tolerance)
    named = "nothing: no results are committed" if before is None else before.name
    write_atomic(config.out / "bench.html", page(results, changes, named))
    if config.keep and not failed:
        write_atomic(_COMMITTED / f"{config.keep}.json", text)
    slower = [change for change in changes if change.slower]
    for change in slower:
        note(
            f"slower: {change.name}: {change.before:.4g} → {change.now:.4g} {change.unit} "
            f"({100 * change.worse:+.1f} %)"
        )
    for line in failed:
        note(f"failed: {line}")
    note(f"compared with {named}; page: {config.out / 'bench.html'}")
    emit(
        Figure("benchmarks", len(made), "runs", n=len(plan)),
        Figure("benchmarks_failed", len(failed), "runs", n=len(plan)),
        Figure("figures_compared", len(changes), "figures", n=len(changes)),
        Figure("figures_slower", len(slower), "figures", n=len(changes)),
        Figure("seconds", sum(runs[key]["seconds"] for key in made), "s", n=len(made)),
        json=config.json,
    )
    return 1 if failed else 0


def _place(key: tuple[str, str]) -> tuple[str, int]:
    """Order of a run in the results: by script, then from small to large."""
    return key[0], _SIZES.index(key[1])


if __name__ == "__main__":
    run_main(main, Config)
