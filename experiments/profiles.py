"""Where did the time of a profiled run go? Its trace, lane by lane, as figures and as a picture.

    python -m experiments.bench_train --steps sft --profile runs/profile
    python -m experiments.profiles runs/profile --picture runs/profile.png --close 3.4 3.9

A lane is a thread of the host, or a queue of a device. Figures: seconds in which a lane did
anything, seconds in the operations of each compiled program and those of single operations, without
what lies inside of them (`self`). The same file opens in Perfetto (https://ui.perfetto.dev) and,
with more to ask it, in XProf. docs/profile.md reads one aloud.
"""

from __future__ import annotations

import gzip
import io
import json as jsonlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from egjax.errors import EgjaxError, require
from egjax.evals.intervals import Figure
from experiments.common import atomic_path, emit, note, run_main

__all__ = ["Config", "Event", "Lane", "busy", "main", "read"]

_FILE = "perfetto_trace.json.gz"
_LEAST = 0.001  # share of the time below which a lane is left out of the picture


@dataclass(frozen=True)
class Config:
    """What to read."""

    folder: Annotated[Path, tyro.conf.Positional]
    """What `--profile` was given; the newest trace below it counts."""
    picture: Path | None = None
    """PNG of the lanes."""
    close: tuple[float, float] | None = None
    """Seconds from and to which the picture shows once more, operations by name."""
    top: int = 10
    """Operations to list."""
    json: Annotated[bool, tyro.conf.arg(help="print figures as JSON lines")] = False


class Event(NamedTuple):
    """What a lane did.

    Attributes:
        name: as the tracer calls it.
        program: compiled program that it is an operation of, or "".
        start, seconds: since the trace began, and how long.
        own: of `seconds`, those in no event inside of it.
    """

    name: str
    program: str
    start: float
    seconds: float
    own: float

    @property
    def family(self) -> str:
        """The operation without its number: `fusion` of `fusion.12`."""
        return re.sub(r"(\.\d+)+$", "", self.name)


class Lane(NamedTuple):
    """Events of one thread or queue, by start."""

    name: str
    events: Sequence[Event]


def read(folder: Path) -> list[Lane]:
    """Lanes of the newest trace below a folder, in the order in which Perfetto shows them.

    Raises:
        EgjaxError: there is none, or it cannot be read.
    """
    found = sorted(folder.rglob(_FILE), key=lambda path: path.stat().st_mtime)
    if not found:
        raise EgjaxError(
            f"no {_FILE}", where=str(folder), remedy="any script writes one: --profile FOLDER"
        )
    try:
        rows = jsonlib.loads(gzip.decompress(found[-1].read_bytes()))["traceEvents"]
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise EgjaxError("not a whole trace", where=str(found[-1])) from error
    return _lanes(row for row in rows if row)


def _lanes(rows: Iterable[Mapping[str, Any]]) -> list[Lane]:
    names: dict[tuple[Any, Any], str] = {}
    order: dict[tuple[Any, Any], int] = {}
    events: dict[tuple[Any, Any], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = row.get("pid"), row.get("tid")
        if row.get("ph") == "X":
            events.setdefault(key, []).append(row)
        elif row.get("name") in ("process_name", "thread_name"):
            names[key] = row["args"]["name"]
        elif row.get("name") == "thread_sort_index":
            order[key] = row["args"]["sort_index"]
    several = len({pid for pid, _ in events}) > 1
    lanes = []
    for key in sorted(events, key=lambda key: (str(key[0]), order.get(key, 0))):
        # Numbers that only tell like threads apart are replaced by short ones.
        name = re.sub(r"/-?\d+$", "", names.get(key, str(key[1])))
        if several:
            name = f"{names.get((key[0], None), key[0])} {name}"
        count = sum(re.sub(r" \d+$", "", lane.name) == name for lane in lanes)
        lanes.append(Lane(f"{name} {count + 1}" if count else name, _nested(events[key])))
    return lanes


def _nested(rows: Sequence[Mapping[str, Any]]) -> list[Event]:
    """Events of a lane with their own seconds: one that begins within another lies inside of it."""
    ordered = sorted(rows, key=lambda row: (row["ts"], -row["dur"]))
    own = [float(row["dur"]) for row in ordered]
    around: list[int] = []
    for index, row in enumerate(ordered):
        while around and ordered[around[-1]]["ts"] + ordered[around[-1]]["dur"] <= row["ts"]:
            around.pop()
        if around:
            own[around[-1]] -= row["dur"]
        around.append(index)
    return [
        Event(
            row["name"],
            row.get("args", {}).get("hlo_module", ""),
            row["ts"] / 1e6,
            row["dur"] / 1e6,
            max(0.0, mine) / 1e6,
        )
        for row, mine in zip(ordered, own, strict=True)
    ]


def busy(events: Iterable[Event]) -> float:
    """Seconds in which at least one of these events, given by start, went on."""
    total = end = 0.0
    for event in events:
        until = event.start + event.seconds
        total += max(0.0, until - max(event.start, end))
        end = max(end, until)
    return total


def figures(lanes: Sequence[Lane], top: int) -> list[Figure]:
    """Time by lane, by program and by operation."""
    rows = [
        Figure(f"lane/{lane.name}", busy(lane.events), "s", n=len(lane.events)) for lane in lanes
    ]
    events = [event for lane in lanes for event in lane.events if event.program]
    programs = Counter(event.program for event in events)
    for program in programs:
        own = sum(event.own for event in events if event.program == program)
        rows.append(Figure(f"program/{program}", own, "s", n=programs[program]))
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        found[event.program, event.family].append(event.own)
    most = sorted(found.items(), key=lambda item: -sum(item[1]))[:top]
    return rows + [
        Figure(f"self/{program}/{family}", sum(own), "s", n=len(own))
        for (program, family), own in most
    ]


# --- the picture --------------------------------------------------------------------------------

_COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#b14a8b", "#c79200", "#56b4e9", "#7a5c3e", "#4d5760",
)  # fmt: skip
_OTHER = "#c3c8ce"


def _picture(lanes: Sequence[Lane], close: tuple[float, float] | None) -> bytes:
    """The lanes over the whole time, by program; below, close up, by operation."""
    plt = require("matplotlib.pyplot", "eval")
    begin = min(event.start for lane in lanes for event in lane.events)
    end = max(event.start + event.seconds for lane in lanes for event in lane.events)
    spans = [(begin, end)] + ([close] if close else [])
    shown = [[lane for lane in map(_part, lanes, [span] * len(lanes)) if lane] for span in spans]
    heights = [1.2 + 0.4 * max(len(parts), 4) for parts in shown]
    figure, axes = plt.subplots(
        len(spans), 1, figsize=(11, sum(heights)), height_ratios=heights, squeeze=False
    )
    titles = ("the whole run, operations by program", "close up, operations by name")
    ways = zip(axes[:, 0], shown, spans, ("program", "family"), titles, strict=False)
    for axis, parts, span, by, title in ways:
        _strip(axis, parts, span, by)
        axis.set_title(title, fontsize=9, loc="left")
    figure.tight_layout()
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    plt.close(figure)
    return out.getvalue()


def _part(lane: Lane, span: tuple[float, float]) -> Lane | None:
    """What a lane did in a span; None where that is next to nothing."""
    first, last = span
    events = [e for e in lane.events if e.start < last and e.start + e.seconds > first]
    return Lane(lane.name, events) if busy(events) > _LEAST * (last - first) else None


def _strip(axis: Any, lanes: Sequence[Lane], span: tuple[float, float], by: str) -> None:
    """One axis: a row a lane, the innermost event on top."""
    first, last = span
    weight: dict[str, float] = defaultdict(float)
    for lane in lanes:
        for event in lane.events:
            if event.program:
                weight[getattr(event, by)] += event.own
    colours = dict(zip(sorted(weight, key=lambda name: -weight[name]), _COLOURS, strict=False))
    for row, lane in enumerate(lanes):
        for inside, height in ((False, 0.8), (True, 0.6)):
            bars: dict[str, list[tuple[float, float]]] = {}
            for event in lane.events:
                start, stop = max(event.start, first), min(event.start + event.seconds, last)
                if stop <= start or bool(event.program) != inside:
                    continue
                colour = colours.get(getattr(event, by), "#1d2329") if inside else _OTHER
                bars.setdefault(colour, []).append((start, stop - start))
            for colour, parts in bars.items():
                axis.broken_barh(parts, (row - height / 2, height), color=colour, linewidth=0)
    axis.set_yticks(range(len(lanes)), [lane.name for lane in lanes], fontsize=8)
    axis.set_ylim(len(lanes) - 0.4, -0.6)
    axis.set_xlim(first, last)
    axis.tick_params(axis="x", labelsize=8)
    axis.set_xlabel("seconds since the trace began", fontsize=8)
    handles = [
        axis.barh([0], [0], color=colour, label=f"{name}, {weight[name]:.2g} s")
        for name, colour in colours.items()
    ]
    handles.append(axis.barh([0], [0], color=_OTHER, label="no operation of a program"))
    axis.legend(
        handles=handles, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False
    )


def main(config: Config) -> None:
    lanes = read(config.folder)
    emit(*figures(lanes, config.top), json=config.json)
    if config.picture is not None:
        with atomic_path(config.picture) as part:
            part.write_bytes(_picture(lanes, config.close))
        note(f"picture: {config.picture}")


if __name__ == "__main__":
    run_main(main, Config)
