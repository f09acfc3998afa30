"""What experience is made of, as plain host records: trajectories, preference pairs, samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from egjax.errors import EgjaxError

__all__ = [
    "LABELS",
    "PAIR_KINDS",
    "PreferencePair",
    "Sample",
    "Trajectory",
    "from_flat",
    "to_flat",
]

LABELS = ("positive", "failed", "redundant")
PAIR_KINDS = ("failed", "redundant")


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
        script: accepted actions in RobotHow's form, one `[GRAB] <cup> (12)` each.
        text: the same plan in English, `Walk to kitchen. Grab cup.`
        label: `positive` (every goal holds at the end), `failed`, or `redundant` (reaches the
            goal with needless steps).
        solved: whether every goal holds at the end.
        total_return: sum of rewards, +2 a newly met goal and −0.1 a step that meets none
            (episodic grounding, arXiv 2506.01312).
        goals: name of the goal set, `core` or `e2wm`.
        seed: the random seed it was found with.
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

    def __post_init__(self):
        object.__setattr__(self, "script", tuple(self.script))
        _one_of(self.label, LABELS, "Trajectory.label")
        # Scripts are stored as lines of one text, so a line must be one line.
        if any(not line or line.splitlines() != [line] for line in self.script):
            raise EgjaxError(
                "a script line is empty or has a line break", where="Trajectory.script"
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


def to_flat(record: Trajectory | PreferencePair) -> dict[str, Any]:
    """A flat dictionary of strings, numbers and booleans; inverse of `from_flat`."""
    flat = asdict(record)
    if isinstance(record, Trajectory):
        flat["script"] = "\n".join(record.script)
    return flat


def from_flat(kind: type[Record], flat: Mapping[str, Any]) -> Record:
    """The record of a flat dictionary, also of one that a file gave back.

    Args:
        kind: `Trajectory` or `PreferencePair`.
        flat: the fields by name; texts may be bytes and numbers NumPy scalars.

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
        return value.item() if hasattr(value, "item") else value

    values = {name: plain(flat[name]) for name in names}
    if "script" in values:
        values["script"] = tuple(values["script"].split("\n")) if values["script"] else ()
    return kind(**values)
