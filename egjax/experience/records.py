"""What experience is made of, as plain host records: trajectories, preference pairs, samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, TypeVar

from egjax.errors import EgjaxError

__all__ = [
    "KINDS",
    "LABELS",
    "PAIR_KINDS",
    "PreferencePair",
    "Sample",
    "Trajectory",
    "distinct",
    "from_flat",
    "to_flat",
]

KINDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "positive": ("tree", "best_first"),
        "failed": ("exploration", "omission", "order"),
        "redundant": ("detour", "repeat", "object", "extra"),
        "hindsight": ("exploration",),
    }
)
"""Kinds of each label: positive by what found it; failed as tried by the search, or a plan with a
step left out or two in the wrong order; redundant by what is needless, see
`egjax.search.variants`; hindsight by what was relabelled."""
LABELS = tuple(KINDS)
PAIR_KINDS = ("failed", "redundant")


_LINES = ("script", "wanted", "refusals")
_NUMBERS = ("rewards", "values", "visits")


def _one_of(value: str, allowed: tuple[str, ...], where: str) -> None:
    if value not in allowed:
        raise EgjaxError(
            f"unknown value {value!r}", where=where, remedy=f"one of {', '.join(allowed)}"
        )


@dataclass(frozen=True)
class Trajectory:
    """One finished episode of search on a task, with its verdict.

    Attributes:
        task: name of the task, e.g. `file710_2`.
        title: the activity, e.g. `Watch TV`.
        split: `train`, `seen` (held out, activity in training) or `unseen`.
        script: actions in RobotHow's form, one `[GRAB] <cup> (12)` each.
        text: the same plan in English, `Walk to kitchen. Grab cup.`
        label: `positive` (every goal holds at the end), `failed`, `redundant` (reaches the goal
            with needless steps), or `hindsight` (a failure with a goal that it did reach).
        solved: whether every goal holds at the end.
        total_return: sum of rewards, +2 a newly met goal and −0.1 a step that meets none
            (episodic grounding, arXiv 2506.01312).
        goals: name of the goal set, `core` or `e2wm`.
        seed: the random seed it was found with.
        kind: one of `KINDS[label]`; empty if unknown.
        wanted: the goals in words, `ON(cup, table)` each; for hindsight its own.
        rewards: of each step of the script; 0 of one that is refused or comes after a refusal.
        values: mean return from each step on, of all that the search tried from there: of the
            tree's edge where it has one (`visits` > 0), else what this trajectory went on to earn.
        visits: of the tree's edge of each step; 0 below the tree.
        refusals: for each step of the text why the simulator refuses it, empty where it accepts.
            Nothing is tried after a refusal.

    `rewards`, `values`, `visits` and `refusals` are as long as the script, or empty where they were
    not kept.
    """

    task: str
    title: str
    split: str
    script: tuple[str, ...]
    text: str
    label: str
    solved: bool
    total_return: float
    goals: str
    seed: int
    kind: str = ""
    wanted: tuple[str, ...] = ()
    rewards: tuple[float, ...] = ()
    values: tuple[float, ...] = ()
    visits: tuple[int, ...] = ()
    refusals: tuple[str, ...] = ()

    def __post_init__(self):
        _one_of(self.label, LABELS, "Trajectory.label")
        _one_of(self.kind, ("", *KINDS[self.label]), "Trajectory.kind")
        for name in (*_LINES, *_NUMBERS):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        # Scripts are stored as lines of one text, so a line must be one line.
        for name in _LINES:
            lines = getattr(self, name)
            if any((not x and name != "refusals") or len(x.splitlines()) > 1 for x in lines):
                raise EgjaxError("a line is empty or has a line break", where=f"Trajectory.{name}")
        for name in (*_NUMBERS, "refusals"):
            if len(getattr(self, name)) not in (0, len(self.script)):
                raise EgjaxError(
                    f"{len(getattr(self, name))} values for {len(self.script)} steps",
                    where=f"Trajectory.{name}",
                )

    @property
    def length(self) -> int:
        """Number of actions."""
        return len(self.script)


@dataclass(frozen=True)
class PreferencePair:
    """Two plans for one prompt, of which the first is preferred.

    Attributes:
        task: name of the task.
        prompt: what the model is asked, see `egjax.experience.prompts`.
        chosen: the preferred plan in English.
        rejected: the other plan in English.
        kind: why it is rejected, `failed` or `redundant`.
    """

    task: str
    prompt: str
    chosen: str
    rejected: str
    kind: str

    def __post_init__(self):
        _one_of(self.kind, PAIR_KINDS, "PreferencePair.kind")


@dataclass(frozen=True)
class Sample:
    """A text to learn from or to be asked.

    Attributes:
        task_type: `plan`, `recognition`, `counting`, `path`, ….
        prompt: ends with `A:`; one space joins it to the completion.
        completion: the right answer, without a leading space.
        choices: the answers offered where it is multiple choice (the right one among them).
    """

    task_type: str
    prompt: str
    completion: str
    choices: tuple[str, ...] | None = None

    def __post_init__(self):
        if self.choices is not None and self.completion not in self.choices:
            raise EgjaxError("the right answer is not among the choices", where="Sample.choices")


Record = TypeVar("Record", Trajectory, PreferencePair)


def distinct(records: Sequence[Trajectory]) -> list[Trajectory]:
    """The first of those of one task with the same actions and the same goals."""
    found: dict[tuple[str, tuple[str, ...], tuple[str, ...]], Trajectory] = {}
    for record in records:
        found.setdefault((record.task, record.wanted, record.script), record)
    return list(found.values())


def to_flat(record: Trajectory | PreferencePair) -> dict[str, Any]:
    """A flat dictionary of strings, numbers, booleans and lists of numbers; inverse of `from_flat`.

    Lines of text are joined by line breaks.
    """
    flat = {field.name: getattr(record, field.name) for field in fields(record)}
    if isinstance(record, Trajectory):
        flat |= {name: list(flat[name]) for name in _NUMBERS}
        # The first of several empty lines must not get lost.
        flat |= {name: "".join(f"{line}\n" for line in flat[name]) for name in _LINES}
    return flat


def from_flat(kind: type[Record], flat: Mapping[str, Any]) -> Record:
    """The record of a flat dictionary, also of one that a file gave back.

    Args:
        kind: `Trajectory` or `PreferencePair`.
        flat: the fields by name; texts may be bytes, numbers NumPy scalars and lists arrays.

    Raises:
        EgjaxError: a field is missing or superfluous, or holds a value that is not allowed.
    """
    names = [field.name for field in fields(kind)]
    if sorted(names) != sorted(flat):
        raise EgjaxError(
            f"fields {sorted(flat)} do not make a {kind.__name__}", remedy=f"expected {names}"
        )

    def plain(value: Any) -> Any:
        if isinstance(value, bytes):
            return value.decode("utf-8")
        return value.tolist() if hasattr(value, "tolist") else value

    values = {name: plain(flat[name]) for name in names}
    if kind is Trajectory:
        values |= {name: tuple(values[name].split("\n")[:-1]) for name in _LINES}
    return kind(**values)
