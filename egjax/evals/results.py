"""`results.json`: everything the report shows, as frozen dataclasses that check themselves.

The file is `to_json(results)`: one object whose keys are the fields of `Results`, all the way
down. Figures are written with their interval (`low`, `high`), `n`, `unit` and `seed`. Shares are
fractions between 0 and 1 everywhere; only the report turns them into percent.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from pathlib import Path
from typing import Any

from egjax.errors import EgjaxError
from egjax.evals.intervals import Figure
from egjax.evals.manifest import Manifest

__all__ = [
    "Comparison",
    "ModelScores",
    "PlanColumn",
    "PlanExample",
    "PlanScores",
    "PlanStep",
    "ProbeCurve",
    "QuestionScore",
    "Results",
    "Role",
    "SearchReport",
    "SearchedTask",
    "StepBin",
    "StepCurve",
    "TrainingCurve",
    "from_json",
    "load",
    "to_json",
]


class Role(enum.StrEnum):
    """What a row of the table is, in the method's terms; it chooses colour and claim."""

    BASE = "base"  # πᴺ, the small model before training
    EXPERT = "expert"  # πᴱ, the small model after
    LARGE = "large"  # πᴸ, the large model before
    RATIO = "ratio"  # π̄, decoding from πᴸ·πᴱ/πᴺ
    DISTILLED = "distilled"  # the large model distilled from π̄
    PREFERRED = "preferred"  # the same after DPO
    SEARCH = "search"  # the tree search itself
    COPY = "copy"  # the nearest training plan
    HUMAN = "human"  # the human program

    @property
    def grounded(self) -> bool:
        """Whether the paper claims that this row beats both πᴱ and πᴸ."""
        return self in (Role.RATIO, Role.DISTILLED, Role.PREFERRED)


@dataclasses.dataclass(frozen=True)
class PlanScores:
    """How plans on one set of tasks did.

    Attributes:
        split: `"seen"`, `"unseen"`, ...: the activities.
        success: share of plans after which every goal holds.
        executable: share of plans of which the simulator accepted every step.
        length_ratio: steps of a solving plan ÷ the human's steps; None if none was solved.
        rouge_l: ROUGE-L against the human plan; None where it has no meaning.
    """

    split: str
    success: Figure
    executable: Figure
    length_ratio: Figure | None = None
    rouge_l: Figure | None = None


@dataclasses.dataclass(frozen=True)
class ModelScores:
    """One row of the main table: `name` as shown, what it is, one entry per split."""

    name: str
    role: Role
    scores: tuple[PlanScores, ...]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two rows on the same items: `difference` is ours − theirs with its paired interval.

    Attributes:
        ours, theirs: names of two models.
        metric: `"success"`, `"rouge_l"`, ...
        split: set of tasks, `"all"` for all.
        difference: mean difference over the items.
    """

    ours: str
    theirs: str
    metric: str
    split: str
    difference: Figure


@dataclasses.dataclass(frozen=True)
class QuestionScore:
    """Accuracy of one model (or of a baseline such as the most frequent option) on one task."""

    model: str
    task: str
    accuracy: Figure


@dataclasses.dataclass(frozen=True)
class StepBin:
    """Tasks whose human program has `low` to `high` steps (both counted), and the success there."""

    low: int
    high: int
    success: Figure


@dataclasses.dataclass(frozen=True)
class StepCurve:
    """Success of one model against the number of steps."""

    model: str
    bins: tuple[StepBin, ...]


@dataclasses.dataclass(frozen=True)
class ProbeCurve:
    """Accuracy of a linear probe per layer.

    Attributes:
        model: whose hidden states.
        label: what is read off, e.g. `"activity"`.
        accuracy: one figure a layer, the embedding first.
        majority: always answering the most frequent training label.
    """

    model: str
    label: str
    accuracy: tuple[Figure, ...]
    majority: Figure


@dataclasses.dataclass(frozen=True)
class TrainingCurve:
    """One logged quantity of one training stage; `steps` and `values` go together."""

    stage: str
    quantity: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class SearchedTask:
    """One task of the search.

    Attributes:
        name: of the program.
        activity: its title.
        goals, satisfied: number of goal predicates, and of those that held at best.
        solved: all of them held.
        plan_length: steps of the shortest solving plan, None if none was found.
        human_length: steps of the human program (FIND not counted).
        simulations: spent on this task.
        seconds: wall time of this task, its share of the batch.
    """

    name: str
    activity: str
    goals: int
    satisfied: int
    solved: bool
    plan_length: int | None
    human_length: int
    simulations: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class SearchReport:
    """Figures of the search as a whole (solved, speed, labels collected) and its tasks."""

    figures: tuple[Figure, ...] = ()
    tasks: tuple[SearchedTask, ...] = ()


@dataclasses.dataclass(frozen=True)
class PlanStep:
    """One step as written and what the simulator said: accepted, or refused for `reason`."""

    text: str
    accepted: bool
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class PlanColumn:
    """One model's plan for one task; steps after the first refusal were not tried."""

    model: str
    steps: tuple[PlanStep, ...]
    satisfied: int
    goals: int
    solved: bool


@dataclasses.dataclass(frozen=True)
class PlanExample:
    """One task with the plans of several models side by side; goals in words."""

    task: str
    activity: str
    split: str
    goals: tuple[str, ...]
    plans: tuple[PlanColumn, ...]


@dataclasses.dataclass(frozen=True)
class Results:
    """One run. Parts that were not run are left empty; the report leaves them out.

    Attributes:
        title: heading of the report.
        manifest: what was run.
        setting: facts in words, e.g. `{"tasks": "RobotHow, 518 programs, 12 without a goal"}`.
        models: the main table, in the order shown.
        comparisons: paired differences; the report's sentences are chosen by them.
        questions, by_steps, probes, training, search, examples: the other sections.
        not_worked: what was tried and did not work, one sentence each.
    """

    title: str
    manifest: Manifest
    setting: dict[str, str] = dataclasses.field(default_factory=dict)
    models: tuple[ModelScores, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    questions: tuple[QuestionScore, ...] = ()
    by_steps: tuple[StepCurve, ...] = ()
    probes: tuple[ProbeCurve, ...] = ()
    training: tuple[TrainingCurve, ...] = ()
    search: SearchReport = SearchReport()
    examples: tuple[PlanExample, ...] = ()
    not_worked: tuple[str, ...] = ()

    def __post_init__(self):
        _check(self)


def to_json(results: Results) -> str:
    """`results.json` as text; `from_json` gives the same object back."""
    return json.dumps(_plain(results), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(text: str, *, where: str = "results") -> Results:
    """Reads what `to_json` wrote.

    Raises:
        EgjaxError: not JSON, a field that is missing, unknown or of another type, or a value
            that cannot be (an interval beside its value, a comparison of an unknown model).
    """
    try:
        return _typed(Results, json.loads(text), "results")
    except json.JSONDecodeError as error:
        raise EgjaxError(f"not JSON: {error.msg}", where=f"{where}:{error.lineno}") from error
    except EgjaxError as error:
        raise EgjaxError(error.what, where=where, remedy=error.remedy) from error


def load(path: Path) -> Results:
    """`from_json` of a file; raises EgjaxError where it cannot be read, too."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EgjaxError(f"cannot read the results: {error}", where=str(path)) from error
    return from_json(text, where=str(path))


def _plain(value: Any) -> Any:
    """Dataclasses to dicts; a Figure keeps its own short form."""
    if isinstance(value, Figure):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _typed(kind: Any, value: Any, place: str) -> Any:
    """The value as the annotated type, or an EgjaxError that names the place."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        rest = next(a for a in arguments if a is not type(None))
        return None if value is None else _typed(rest, value, place)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_typed(arguments[0], v, f"{place}[{i}]") for i, v in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {k: _typed(arguments[1], v, f"{place}.{k}") for k, v in value.items()}
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        if value not in list(kind):
            raise EgjaxError(f"{place}: {value!r} is none of {', '.join(map(str, kind))}")
        return kind(value)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _record(kind, value, place)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return value  # an int stays one, so that a file read and written again is the same
    plain = origin is None and isinstance(kind, type) and not dataclasses.is_dataclass(kind)
    if plain and type(value) is kind:
        return value
    name = getattr(kind, "__name__", str(kind))
    raise EgjaxError(f"{place}: needs {name}, found {type(value).__name__} {str(value)[:40]!r}")


def _record(kind: Any, value: dict, place: str) -> Any:
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    known = {k: v for k, v in value.items() if not (kind is Figure and k == "ratio")}
    if unknown := sorted(known.keys() - fields.keys()):
        raise EgjaxError(f"{place}: unknown field {unknown[0]!r}")
    for name, field in fields.items():
        no_default = field.default is dataclasses.MISSING
        if no_default and field.default_factory is dataclasses.MISSING and name not in known:
            raise EgjaxError(f"{place}: field {name!r} is missing")
    return kind(**{k: _typed(hints[k], v, f"{place}.{k}") for k, v in known.items()})


def _check(results: Results) -> None:
    """What types cannot say."""
    for place, figure in _figures(results, "results"):
        _check_figure(place, figure)
    names = [model.name for model in results.models]
    if twice := [name for name in names if names.count(name) > 1]:
        raise EgjaxError(f"results.models: {twice[0]!r} stands there twice")
    for i, pair in enumerate(results.comparisons):
        for name in (pair.ours, pair.theirs):
            if name not in names:
                raise EgjaxError(f"results.comparisons[{i}]: no model is named {name!r}")
    for i, curve in enumerate(results.training):
        if len(curve.steps) != len(curve.values):
            raise EgjaxError(f"results.training[{i}]: steps and values differ in length")


def _check_figure(place: str, figure: Figure) -> None:
    if figure.n < 0:
        raise EgjaxError(f"{place}: n is {figure.n}")
    if figure.low is not None and figure.low > figure.value + 1e-9:
        raise EgjaxError(f"{place}: the interval starts above the value {figure.value}")
    if figure.high is not None and figure.high < figure.value - 1e-9:
        raise EgjaxError(f"{place}: the interval ends below the value {figure.value}")
    if figure.unit == "fraction" and not -1 <= figure.value <= 1:
        raise EgjaxError(f"{place}: {figure.value} is no fraction", remedy="use 0.5 for 50 %")


def _figures(value: Any, place: str):
    """Every Figure below `value` with its place."""
    if isinstance(value, Figure):
        yield place, value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _figures(getattr(value, field.name), f"{place}.{field.name}")
    elif isinstance(value, tuple):
        for i, part in enumerate(value):
            yield from _figures(part, f"{place}[{i}]")
