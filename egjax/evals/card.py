"""The data card of collected experience: what is in it, where it is from, how it looks.

`CARD.md` is for people, `card.json` for programs, `card/*.png` are its pictures.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from egjax.evals.manifest import Manifest, write_atomic
from egjax.evals.plots import LIGHT, Theme, new_axes, png
from egjax.experience.records import KINDS, LABELS, PreferencePair, Trajectory

__all__ = ["Facts", "count", "draw", "markdown", "write"]

_GRID = np.linspace(0.0, 1.0, 11)
_MEANING = {
    "positive": "every goal holds at the end; those of the tree have no needless step",
    "failed": "some goal does not hold, or a step is refused",
    "redundant": "every goal holds, with needless steps",
    "hindsight": "a failure, with goals that it did reach as its goals",
}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the records do not tell.

    Attributes:
        origin, terms: where the tasks come from and on what terms.
        goals: name of the goal set.
        tasks, solved: tasks searched, and those solved.
        held_out: activities that no record is about.
        shards: shards collected.
        twice: trajectories left out because another one of the task has the same actions.
        manifest: what was run.
    """

    origin: str
    terms: str
    goals: str
    tasks: int
    solved: int
    held_out: tuple[str, ...]
    shards: int
    twice: int
    manifest: Manifest


def _verb(line: str) -> str:
    return line[1 : line.index("]")]


def _ordered(items: Iterable[str]) -> dict[str, int]:
    """How often each occurs, the most frequent first."""
    found = Counter(items)
    return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))


def _lengths(lengths: Sequence[int]) -> dict[str, float]:
    points = np.quantile(lengths, [0, 0.25, 0.5, 0.75, 0.95, 1])
    names = ("min", "p25", "median", "p75", "p95", "max")
    return {**dict(zip(names, points.tolist())), "mean": float(np.mean(lengths))}


def count(
    facts: Facts, trajectories: Sequence[Trajectory], pairs: Sequence[PreferencePair]
) -> dict[str, Any]:
    """What `card.json` holds.

    Args:
        facts: what the records do not tell.
        trajectories, pairs: the records, at least one of each.
    """
    by_label = {
        label: [t for t in trajectories if t.label == label]
        for label in LABELS
        if any(t.label == label for t in trajectories)
    }
    tasks = {t.task: t for t in trajectories if t.label != "hindsight"}
    named = dataclasses.asdict(facts)
    manifest = named.pop("manifest")
    # A reason is the simulator's sentence, with the names of things in it.
    reasons = _ordered(why for t in trajectories for why in t.refusals if why)
    return {
        **named,
        **{key: manifest[key] for key in ("seeds", "command", "commit", "dirty", "started")},
        "versions": manifest["versions"],
        "trajectories": {label: len(found) for label, found in by_label.items()},
        "solved_share": {
            label: sum(t.solved for t in found) / len(found) for label, found in by_label.items()
        },
        "kinds": {label: _ordered(t.kind for t in found) for label, found in by_label.items()},
        "pairs": _ordered(pair.kind for pair in pairs),
        "lengths": {label: _lengths([t.length for t in f]) for label, f in by_label.items()},
        "activities": _ordered(t.title for t in tasks.values()),
        "verbs": {
            label: _ordered(_verb(line) for t in found for line in t.script)
            for label, found in by_label.items()
        },
        "wanted": _ordered(w.partition("(")[0] for t in tasks.values() for w in t.wanted),
        "wanted_in_hindsight": _ordered(
            w.partition("(")[0] for t in by_label.get("hindsight", ()) for w in t.wanted
        ),
        "steps": sum(t.length for t in trajectories),
        "steps_visited_by_the_tree": sum(v > 0 for t in trajectories for v in t.visits),
        "refused": sum(any(t.refusals) for t in trajectories),
        "reasons": dict(list(reasons.items())[:40]),
    }


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"| {' | '.join(['---'] * len(head))} |",
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
        "",
    ]


def _several(counts: Mapping[str, int], most: int = 12) -> str:
    shown = [f"{name or 'unnamed'} {n}" for name, n in list(counts.items())[:most]]
    return ", ".join(shown) + (f" and {len(counts) - most} more" if len(counts) > most else "")


def markdown(numbers: Mapping[str, Any], pictures: Iterable[str] = ()) -> str:
    """`CARD.md` from what `count` gives and the names of the pictures."""
    labels = numbers["trajectories"]
    commit = f"commit {numbers['commit']}" if numbers["commit"] else "commit unknown"
    lines = [
        "# Experience of household tasks",
        "",
        f"{sum(labels.values()):,} trajectories and {sum(numbers['pairs'].values()):,} preference "
        f"pairs of {numbers['tasks']:,} tasks, {numbers['solved']:,} of them solved by search.",
        "",
        f"- Origin: {numbers['origin']}.",
        f"- Terms: {numbers['terms']}",
        f"- Goals: set `{numbers['goals']}`; {_several(numbers['wanted'])}.",
        f"- Made by `{numbers['command']}`, {commit}{'+' if numbers['dirty'] else ''}, "
        f"{numbers['started']}, seed {', '.join(map(str, numbers['seeds']))}, "
        f"{numbers['shards']} shard{'s' if numbers['shards'] > 1 else ''}.",
        f"- Left out as equal (same task, goals and actions): {numbers['twice']}.",
        f"- Activities: {_several(numbers['activities'])}.",
        f"- Held out, in no record: {', '.join(numbers['held_out']) or 'none'}.",
        "",
        "## Trajectories",
        "",
        *_table(
            ("label", "meaning", "n", "solved, %", "steps: median", "mean", "max", "kinds"),
            (
                (
                    label,
                    _MEANING[label],
                    n,
                    f"{100 * numbers['solved_share'][label]:.0f}",
                    f"{numbers['lengths'][label]['median']:g}",
                    f"{numbers['lengths'][label]['mean']:.1f}",
                    f"{numbers['lengths'][label]['max']:g}",
                    _several(numbers["kinds"][label]),
                )
                for label, n in labels.items()
            ),
        ),
        f"Preference pairs by what is wrong with the rejected plan: {_several(numbers['pairs'])}.",
        "",
        f"Of {numbers['steps']:,} steps the search tree itself visited "
        f"{numbers['steps_visited_by_the_tree']:,}; the others are of rollouts, shortened plans "
        "and plans made of these, whose values are the returns of that one trajectory.",
        "",
        f"## Refusals\n\n{numbers['refused']:,} trajectories have a refused step. Most frequent "
        "reasons:\n",
        *_table(("reason", "n"), list(numbers["reasons"].items())[:12]),
        "## Fields",
        "",
        "`trajectories`: " + ", ".join(f"`{f.name}`" for f in dataclasses.fields(Trajectory)) + ".",
        "`preference_pairs`: "
        + ", ".join(f"`{f.name}`" for f in dataclasses.fields(PreferencePair))
        + ".",
        "`egjax.experience.records` says what they mean, `egjax.experience.tfds.read` opens them.",
        "",
        *(f"![{name}](card/{name}.png)\n" for name in pictures),
    ]
    return "\n".join(lines)


def _colours(theme: Theme) -> dict[str, str]:
    return dict(zip(LABELS, (theme.cycle[2], theme.cycle[1], theme.cycle[4], theme.cycle[0])))


def _draw_lengths(by_label: Mapping[str, list[Trajectory]], theme: Theme) -> Any:
    figure, axes = new_axes(len(by_label), 1, (7.2, 1.55 * len(by_label) + 0.6), sharex=True)
    longest = max(t.length for found in by_label.values() for t in found)
    for axis, (label, found) in zip(axes[:, 0], by_label.items()):
        sizes = np.bincount([t.length for t in found], minlength=longest + 1)
        axis.bar(range(longest + 1), sizes, color=_colours(theme)[label], width=0.9)
        axis.set_title(f"{label} (n = {len(found):,})")
        axis.grid(axis="x", visible=False)
        axis.locator_params(axis="y", nbins=4, integer=True)
        axis.set_ylabel("plans")
    axes[-1, 0].set_xlabel("steps of the plan")
    axes[-1, 0].locator_params(axis="x", integer=True)
    axes[-1, 0].set_xlim(0, longest + 0.6)
    return figure


def _draw_verbs(by_label: Mapping[str, list[Trajectory]], theme: Theme) -> Any:
    counts = {k: Counter(_verb(x) for t in f for x in t.script) for k, f in by_label.items()}
    total = sum(counts.values(), Counter())
    verbs = [verb for verb, _ in total.most_common(24)]
    figure, axes = new_axes(1, 1, (7.2, 0.27 * len(verbs) + 1.2))
    axis = axes[0][0]
    for i, (label, found) in enumerate(counts.items()):
        share = [100 * found[verb] / max(found.total(), 1) for verb in verbs]
        place = np.arange(len(verbs)) + 0.17 * (i - (len(counts) - 1) / 2)
        colour = _colours(theme)[label]
        axis.scatter(share, place, s=24, color=colour, label=f"{label} ({found.total():,} steps)")
    axis.set_yticks(range(len(verbs)), verbs)
    axis.set_ylim(len(verbs) - 0.4, -0.6)
    axis.set(xlabel="share of the steps, %", xlim=(-1, None), title="Verbs")
    axis.legend(loc="lower right")
    return figure


def _draw_values(by_label: Mapping[str, list[Trajectory]], theme: Theme) -> Any:
    figure, axes = new_axes(1, 1, (7.2, 4.2))
    axis = axes[0][0]
    for label, found in by_label.items():
        curves = [
            np.interp(_GRID, np.linspace(0, 1, t.length), t.values)
            for t in found
            if t.length > 1 and t.values
        ]
        if not curves:
            continue
        low, high = np.quantile(curves, [0.25, 0.75], axis=0)
        colour, at = _colours(theme)[label], 100 * _GRID
        axis.fill_between(at, low, high, color=colour, alpha=0.13, linewidth=0)
        axis.plot(at, np.mean(curves, axis=0), color=colour, label=f"{label} (n = {len(curves):,})")
    axis.set(xlabel="place in the plan, %", ylabel="return from the step on")
    axis.set_title("Values along plans: mean, and the middle half of them")
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def _draw_kinds(by_label: Mapping[str, list[Trajectory]], theme: Theme) -> Any:
    rows = [
        (label, kind, sum(t.kind == kind for t in found))
        for label, found in by_label.items()
        for kind in KINDS[label]
    ]
    figure, axes = new_axes(1, 1, (7.2, 0.32 * len(rows) + 1.1))
    axis = axes[0][0]
    axis.barh(
        range(len(rows)),
        [n for *_, n in rows],
        color=[_colours(theme)[label] for label, *_ in rows],
        height=0.7,
    )
    for i, (*_, n) in enumerate(rows):
        axis.annotate(f" {n:,}", (n, i), va="center", fontsize=9)
    axis.set_yticks(
        range(len(rows)), [f"{label}: {kind}".replace("_", " ") for label, kind, _ in rows]
    )
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.margins(x=0.1)
    axis.set(xlabel="trajectories", title="Kinds")
    axis.grid(axis="y", visible=False)
    return figure


def draw(trajectories: Sequence[Trajectory], theme: Theme = LIGHT) -> dict[str, bytes]:
    """PNG bytes of each picture by name: lengths, kinds, verbs, values.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra.
    """
    by_label = {
        label: [t for t in trajectories if t.label == label and t.length]
        for label in LABELS
        if any(t.label == label and t.length for t in trajectories)
    }
    pictures: dict[str, Callable[[Mapping[str, list[Trajectory]], Theme], Any]] = {
        "lengths": _draw_lengths,
        "kinds": _draw_kinds,
        "verbs": _draw_verbs,
        "values": _draw_values,
    }
    return {
        name: png(lambda style, one=one: one(by_label, style), theme)
        for name, one in pictures.items()
    }


def write(
    facts: Facts,
    trajectories: Sequence[Trajectory],
    pairs: Sequence[PreferencePair],
    folder: Path,
) -> Path:
    """Writes `CARD.md`, `card.json` and `card/*.png`; returns the path of the first."""
    numbers = count(facts, trajectories, pairs)
    pictures = draw(trajectories)
    for name, picture in pictures.items():
        write_atomic(folder / "card" / f"{name}.png", picture)
    write_atomic(folder / "card.json", json.dumps(numbers, indent=1, ensure_ascii=False) + "\n")
    write_atomic(folder / "CARD.md", markdown(numbers, pictures))
    return folder / "CARD.md"
