"""Annotated tasks of the Embodied Agent Interface (arXiv 2410.07166), VirtualHome part. Host code.

The wheel `virtualhome-eval` ships 342 of RobotHow's programs with goals made by hand: object states
and relations by graph id, and verbs that must occur in a plan in order ("LOOKAT|WATCH": one of
them). Its files are read, its modules never imported.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from egjax.errors import EgjaxError
from egjax.sim.goals import Deed, Fact, Predicate
from egjax.sim.graph import Names
from egjax.sim.vocab import VERB_INDEX

__all__ = ["Annotated", "by_class", "load_annotated"]

_WHEEL = "virtualhome_eval"
_GOALS = "resources/virtualhome/task_state_LTL_formula_accurate.json"
_ORDER = "resources/virtualhome/id2task.json"


@dataclass(frozen=True)
class Annotated:
    """A task as the interface states it.

    Attributes:
        identifier: the interface's name of the task, e.g. `27_2`; the program is `file27_2`.
        title: the activity.
        facts: what must hold at the end, duplicates left out. The interface's evaluator finds at
            most one relation, so it scores no task that wants two.
        deeds: what must have been performed, in the order of the file.
    """

    identifier: str
    title: str
    facts: tuple[Fact, ...]
    deeds: tuple[Deed, ...]

    @property
    def program(self) -> str:
        """Name of the RobotHow program."""
        return f"file{self.identifier}"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EgjaxError("cannot read the goals", where=str(path), remedy=str(error)) from None


def _fact(goal: dict[str, Any], where: str) -> Fact:
    if goal.keys() >= {"id", "state"}:
        return Fact(goal["state"].upper(), (int(goal["id"]),))
    if goal.keys() >= {"from_id", "relation_type", "to_id"}:
        return Fact(goal["relation_type"].upper(), (int(goal["from_id"]),), (int(goal["to_id"]),))
    raise EgjaxError(f"neither a state nor a relation: {goal}", where=where)


def _deed(text: str, where: str) -> Deed:
    verbs = tuple(verb.strip().upper().replace(" ", "") for verb in text.split("|"))
    unknown = [verb for verb in verbs if verb not in VERB_INDEX]
    if unknown:
        raise EgjaxError(f"unknown verb {unknown[0]!r}", where=where)
    return Deed(verbs)


def load_annotated(folder: str | Path | None = None) -> list[Annotated]:
    """The annotated tasks, in the interface's order.

    Args:
        folder: of the wheel's package; the installed one where absent.

    Raises:
        EgjaxError: not installed, a missing or malformed file.
    """
    if folder is None:
        spec = importlib.util.find_spec(_WHEEL)
        if spec is None or not spec.submodule_search_locations:
            raise EgjaxError(
                "the annotated goals are not installed",
                remedy="pip install --no-deps virtualhome-eval==0.1.1",
            )
        folder = spec.submodule_search_locations[0]
    path = Path(folder) / _GOALS
    goals, order = _read(path)["scene_1"], _read(Path(folder) / _ORDER)
    tasks = []
    for identifier, title in order.items():
        where = f"{path} {identifier}"
        try:
            goal = goals[title][identifier]["vh_goal"]
        except KeyError:
            raise EgjaxError("no goal", where=where) from None
        facts = dict.fromkeys(_fact(entry, where) for entry in goal["goal"])
        deeds = dict.fromkeys(_deed(text, where) for text in goal["actions"])
        tasks.append(Annotated(identifier, title, tuple(facts), tuple(deeds)))
    return tasks


def by_class(
    facts: Sequence[Fact], names: Names
) -> tuple[list[Predicate], dict[str, tuple[int, ...]]]:
    """A goal by ids in the terms of `egjax.search.actions.action_table`.

    Returns:
        The facts by class, and for each class name which ids are meant.
    """
    meant: dict[str, dict[int, None]] = {}

    def kind(ids: Sequence[int]) -> str:
        found = {names.class_name(names.index[i]) for i in ids}
        if len(found) != 1:
            raise EgjaxError(f"objects of several classes: {sorted(found)}", where="by_class")
        name = found.pop()
        meant.setdefault(name, {}).update(dict.fromkeys(ids))
        return name

    predicates = [
        Predicate(f.relation, kind(f.subjects), None if f.others is None else kind(f.others))
        for f in facts
    ]
    return list(dict.fromkeys(predicates)), {name: tuple(ids) for name, ids in meant.items()}
