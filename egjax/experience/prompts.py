"""What a planner is asked: activity, rooms and items of the goal, and what is wanted.

A prompt is made from the activity's name, the goal and the scene; the human program plays no part
in it, so nothing about the way to the goal leaks into the question.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from egjax.experience.records import Sample
from egjax.sim.goals import Predicate

__all__ = ["mentions", "plan_prompt", "plan_sample", "spoken", "wanted"]


# Where both ends of a relation are told, and where the subject is the character.
_BETWEEN_OBJECTS = {
    "ON": "{s} on {o}",
    "INSIDE": "{s} in {o}",
    "CLOSE": "{s} close to {o}",
    "FACING": "{s} facing {o}",
    "HOLDS_RH": "{s} holding {o}",
    "HOLDS_LH": "{s} holding {o} in left hand",
}
# States that exclude each other: the start tells where the goal's axis stands.
_AXES = (("ON", "OFF"), ("OPEN", "CLOSED"), ("CLEAN", "DIRTY"), ("PLUGGED_IN", "PLUGGED_OUT"))
# Told whether or not the goal asks: they block OPEN, GRAB and SWITCHON.
_OBSTACLES = ("CLOSED", "PLUGGED_OUT")


def spoken(name: str) -> str:
    """A class, state or title as it is said: lower case, spaces for underscores."""
    return " ".join(name.replace("_", " ").lower().split())


def mentions(text: str, titles: Iterable[str]) -> str | None:
    """The first of the activities that a text names, None if it names none: a guard against leaks.

    A name of several words counts wherever it stands. One of a single word (`drink`, `work`) is
    also a step or a thing, and counts as an activity's name only after `to`, as in `How to work?`,
    or alone as an answer.
    """
    said = spoken(text)
    for title in titles:
        name = re.escape(spoken(title))
        several = " " in spoken(title)
        pattern = rf"\b{name}\b" if several else rf"\b(?:how )?to {name}\b|a: {name}$"
        if re.search(pattern, said):
            return title
    return None


def _listed(items: Iterable[str]) -> str:
    return ", ".join(items)


def _order(items: Iterable[str], rng: random.Random | None) -> list[str]:
    ordered = sorted(set(items))
    if rng is not None:
        rng.shuffle(ordered)
    return ordered


def _told(predicate: Predicate) -> str:
    relation, subject, other = predicate
    if relation == "CLOSE" and other == "character":
        subject, other = "character", subject
    if other is None:
        text = spoken(relation)
        return text if subject == "character" else f"{spoken(subject)} {text}"
    text = _BETWEEN_OBJECTS[relation].format(s=spoken(subject), o=spoken(other))
    return text.removeprefix("character ")


def wanted(predicates: Iterable[Predicate], *, seed: int | None = None) -> str:
    """The goal in words, e.g. `sitting, on couch, computer on, milk in fridge`.

    Args:
        predicates: the goal; the character's own part is told without a subject.
        seed: shuffles the order; sorted (the character first) where absent.
    """
    unique = sorted(set(predicates), key=lambda p: (p[1] != "character", p[0], p[1], p[2] or ""))
    if seed is not None:
        random.Random(seed).shuffle(unique)
    return _listed(dict.fromkeys(_told(Predicate(*p)) for p in unique))


class _Layout:
    """Where things are in a graph, by node id."""

    def __init__(self, graph: Mapping[str, Any]):
        self.nodes = {node["id"]: node for node in graph["nodes"]}
        self.holders: dict[int, list[int]] = {}
        self.held: list[int] = []
        for edge in graph["edges"]:
            if edge["relation_type"] in ("INSIDE", "ON"):
                self.holders.setdefault(edge["from_id"], []).append(edge["to_id"])
            elif edge["relation_type"].startswith("HOLDS"):
                self.held.append(edge["to_id"])
        self.inside = {
            (e["from_id"], e["to_id"]) for e in graph["edges"] if e["relation_type"] == "INSIDE"
        }

    def is_room(self, node: int) -> bool:
        return self.nodes[node].get("category") == "Rooms"

    def name(self, node: int) -> str:
        return self.nodes[node]["class_name"]

    def of_class(self, name: str) -> list[int]:
        return [i for i, node in self.nodes.items() if node["class_name"] == name]

    def containers(self, node: int) -> list[int]:
        """What the node is INSIDE, rooms apart."""
        found = self.holders.get(node, ())
        return [x for x in found if (node, x) in self.inside and not self.is_room(x)]

    def rooms(self, node: int) -> list[int]:
        """The rooms a node is INSIDE, else those of what holds it."""
        seen, front = {node}, [node]
        while front:
            found = [x for i in front for x in self.holders.get(i, ())]
            rooms = sorted({x for x in found if self.is_room(x)})
            if rooms:
                return rooms
            front = [x for x in dict.fromkeys(found) if x not in seen]
            seen.update(front)
        return []


def _scene_sentences(
    layout: _Layout, predicates: Sequence[Predicate], rng: random.Random | None
) -> list[str]:
    """Where the goal's things are, their obstacles, and what the character is doing."""
    named = [n for p in predicates for n in p[1:] if n is not None and n != "character"]
    items = {n for n in named if any(not layout.is_room(i) for i in layout.of_class(n))}
    stored = {
        (n, layout.name(box))
        for n in items
        for i in layout.of_class(n)
        for box in layout.containers(i)
        if box not in layout.held
    }
    items |= {box for _, box in stored}
    by_room: dict[str, set[str]] = {}
    for name in items:
        for node in layout.of_class(name):
            for room in layout.rooms(node):
                by_room.setdefault(layout.name(room), set()).add(name)
    sentences = [
        f"The {spoken(room)} has {_listed(map(spoken, _order(by_room[room], rng)))}."
        for room in _order(by_room, rng)
    ]
    inside = [f"The {spoken(a)} is in the {spoken(b)}." for a, b in stored]
    states = set(_OBSTACLES)
    told = []
    for name in items:
        axes = {s for p in predicates if p[1] == name and p[2] is None for s in _axis(p[0])}
        present = {s for i in layout.of_class(name) for s in layout.nodes[i]["states"]}
        told += [f"The {spoken(name)} is {spoken(s)}." for s in present & (states | axes)]
    return sentences + _order(inside, rng) + _order(told, rng) + _character(layout)


def _axis(state: str) -> tuple[str, ...]:
    return next((axis for axis in _AXES if state in axis), (state,))


def _character(layout: _Layout) -> list[str]:
    """Room, posture and hands of the character, as far as they are out of the ordinary."""
    nodes = layout.of_class("character")
    states = {s for i in nodes for s in layout.nodes[i]["states"]}
    parts = [spoken(s) for s in ("SITTING", "LYING") if s in states]
    parts += [f"holding {spoken(layout.name(i))}" for i in layout.held]
    rooms = [layout.name(r) for i in nodes for r in layout.rooms(i)]
    where = [f"in the {spoken(room)}" for room in rooms[:1]]
    return [f"You are {_listed(where + parts)}."] if where or parts else []


def _class(name: str) -> str:
    """The class of what a goal names: `cup` of `cup (12)`."""
    return name.partition(" (")[0]


def plan_prompt(
    title: str | None,
    predicates: Sequence[Predicate],
    graph: Mapping[str, Any],
    *,
    goals: bool = True,
    seed: int | None = None,
) -> str:
    """The question to a planner, in the manner of E2WM's (arXiv 2305.10626) in fewer words.

    `Q: How to put groceries in fridge? The dining room has food cheese, fridge. The fridge is
    closed. You are in the bedroom. Wanted: food cheese in fridge.` and `A:` on a line of its own.
    Items are those that the goal names and the containers that hold them.

    Args:
        title: the activity; None asks without naming one.
        predicates: the goal by class names, tuples (relation, subject, other or None). Of
            `cup (12)` the class is told: English plans know no ids.
        graph: the scene at the start, `nodes` and `edges` as VirtualHome writes them.
        goals: whether the goal's facts are told as `Wanted: …`. They are by default, because
            the search that the planner is compared with is given them too; without them only the
            activity's name says what is wanted.
        seed: shuffles rooms, items and facts (augmentation); a fixed order where absent.
    """
    rng = None if seed is None else random.Random(seed)
    predicates = [
        Predicate(relation, _class(subject), other and _class(other))
        for relation, subject, other in (Predicate(*p) for p in predicates)
    ]
    question = f"Q: How to {spoken(title)}?" if title else "Q: How to do this?"
    parts = [question, *_scene_sentences(_Layout(graph), predicates, rng)]
    if goals:
        parts.append(f"Wanted: {wanted(predicates, seed=seed)}.")
    return " ".join(parts) + "\nA:"


def plan_sample(
    plan: str,
    title: str | None,
    predicates: Sequence[Predicate],
    graph: Mapping[str, Any],
    *,
    goals: bool = True,
    seed: int | None = None,
) -> Sample:
    """A plan generation sample: the prompt of `plan_prompt` and an English plan that solves it."""
    return Sample("plan", plan_prompt(title, predicates, graph, goals=goals, seed=seed), plan)
