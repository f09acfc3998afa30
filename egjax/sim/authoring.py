"""One's own scene and goal: a short YAML or JSON file, goals as text. Host code.

A scene file lists rooms and what is in them:

    rooms:
      kitchen: [table, fridge, cup on table, milk in fridge, lamp]
      bedroom: [bed, book on bed]
    doors: [[kitchen, bedroom]]            # where absent, each room opens to the next
    character: bedroom                     # where it starts; the first room where absent
    kinds: {lamp: {properties: [HAS_SWITCH, HAS_PLUG], states: [OFF]}}
    states: {fridge: [OPEN]}               # of all objects of a class
    goals: ["ON(cup, table)"]

Properties of common classes are known; names are VirtualHome's, small letters and `_` ("Coffee
Maker" is read as `coffee_maker`). A graph as VirtualHome writes it (`nodes`, `edges`) is a scene,
too. A goal is `RELATION(subject, object)` or `STATE(object)`; an object is a class (any of it
serves) or a class with a graph id (this one): `HOLDS_RH(character, milk)`, `OPEN(fridge (7))`.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from egjax.errors import EgjaxError, require
from egjax.sim.goals import Predicate
from egjax.sim.graph import check_graph
from egjax.sim.household import Thing, assemble, known_kinds
from egjax.sim.placing import settled
from egjax.sim.vocab import PROPERTIES, RELATIONS, STATES

__all__ = ["Scenario", "load_scenario", "parse_goal", "parse_goals"]

_KEYS = ("rooms", "doors", "character", "kinds", "states", "goals")
_THING = re.compile(r"^(\w+)(?:\s+(on|in|inside)\s+(\w+))?$")
_GOAL = re.compile(r"^(\w+)\s*\((.*)\)$", re.DOTALL)
_OBJECT = re.compile(r"^([\w ]*?)(?:\s*\((\d+)\)|[ .:](\d+))?$")
_CHARACTER = "character"


class Scenario(NamedTuple):
    """A scene's graph as VirtualHome writes it, and the goals that its file names."""

    graph: dict[str, Any]
    goals: tuple[str, ...] = ()


def _nearest(name: str, known: Iterable[str]) -> str:
    """The known names that are most like one, for an error's remedy."""
    options = sorted(set(known))
    close = [k for k in options if len(name) > 2 and (name in k or k in name)]
    close += difflib.get_close_matches(name, options, 4, 0.5)
    shown = list(dict.fromkeys(close))[:4] or options[:12]
    return "did you mean " + " or ".join(shown) if close else "there are " + ", ".join(shown)


def load_scenario(
    path: str | Path, *, properties: Mapping[str, Sequence[str]] | None = None
) -> Scenario:
    """Reads a scene file, see the top of this module.

    Args:
        path: `.yaml`, `.yml` or `.json`.
        properties: of further classes, e.g. VirtualHome's properties_data.json.

    Raises:
        EgjaxError: no such file, or what in it is not understood and what is nearest.
    """
    file, where = Path(path), str(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EgjaxError("cannot read the scene", where=where, remedy=str(error)) from None
    content = _parsed(text, file.suffix.lower(), where)
    if not isinstance(content, dict):
        raise EgjaxError("not a scene", where=where, remedy="a mapping with 'rooms'")
    goals = content.get("goals") or []
    goals = [goals] if isinstance(goals, str) else goals
    if not isinstance(goals, list) or not all(isinstance(goal, str) for goal in goals):
        raise EgjaxError("goals are no list of texts", where=where, remedy='["ON(cup, table)"]')
    if "nodes" in content:
        graph = check_graph(content, where=where)
        # As goals and plans name things.
        nodes = [{**node, "class_name": _name(node["class_name"])} for node in graph["nodes"]]
        return Scenario({**graph, "nodes": nodes}, tuple(goals))
    unknown = [key for key in content if key not in _KEYS]
    if unknown:
        raise EgjaxError(
            f"unknown key {unknown[0]!r}", where=where, remedy=_nearest(str(unknown[0]), _KEYS)
        )
    return Scenario(_graph(content, properties or {}, where), tuple(goals))


def _parsed(text: str, suffix: str, where: str) -> Any:
    if suffix == ".json":
        try:
            return json.loads(text, object_pairs_hook=lambda pairs: _once(pairs, where))
        except json.JSONDecodeError as error:
            raise EgjaxError(
                "not JSON", where=f"{where}:{error.lineno}", remedy=error.msg
            ) from None
    yaml = require("yaml", "cli")
    try:
        return yaml.load(text, Loader=_loader(yaml, where))
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
        problem = str(getattr(error, "problem", error))
        raise EgjaxError("not YAML", where=f"{where}:{line}", remedy=problem) from None


def _once(pairs: Sequence[tuple[str, Any]], where: str) -> dict[str, Any]:
    """A JSON object of the pairs, none of which is lost."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        _check_new(key, found, where)
        found[key] = value
    return found


def _check_new(key: Any, earlier: Container[Any], where: str) -> None:
    if key in earlier:
        raise EgjaxError(f"{key!r} occurs twice", where=where, remedy="name it once")


def _loader(yaml: Any, where: str) -> type:
    """YAML's safe loader, which keeps the last of two equal keys, made to refuse them."""

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys: list[Any] = []
            for key, _ in node.value:
                _check_new(key.value, keys, f"{where}:{key.start_mark.line + 1}")
                keys.append(key.value)
            return super().construct_mapping(node, deep)

    return Loader


def _graph(
    content: Mapping[str, Any], properties: Mapping[str, Sequence[str]], where: str
) -> dict[str, Any]:
    """The graph of a scene file's content."""
    rooms = content.get("rooms")
    if not isinstance(rooms, Mapping) or not rooms:
        raise EgjaxError("no rooms", where=where, remedy="rooms: {kitchen: [table, cup on table]}")
    plan = {
        _name(room): [_thing(t, where) for t in _things(things, f"{where}, {room}")]
        for room, things in rooms.items()
    }
    if len(plan) < len(rooms):
        raise EgjaxError("two rooms of one name", where=where, remedy="capitals do not tell apart")
    kinds = {**{k: (tuple(v), ()) for k, v in properties.items()}, **known_kinds()}
    for name, kind in _mapping(content, "kinds", where).items():
        kinds[_name(name)] = _kind(kind, f"{where}, kind {name}")
    for room, things in plan.items():
        for place, thing in enumerate(things):
            if thing.name not in kinds:
                raise EgjaxError(
                    f"nothing is known about {thing.name!r}",
                    where=f"{where}, {room}",
                    remedy=f"{_nearest(thing.name, kinds)}; or give its properties under 'kinds'",
                )
            earlier = {t.name for t in things[:place]}
            if thing.place and thing.place not in earlier:
                raise EgjaxError(
                    f"no {thing.place!r} before {thing.name!r} to put it there",
                    where=f"{where}, {room}",
                )
    names = list(plan)
    doors = content.get("doors")
    doors = list(itertools.pairwise(names)) if doors is None else doors
    if not isinstance(doors, list) or not all(
        isinstance(door, list | tuple) and len(door) == 2 for door in doors
    ):
        raise EgjaxError("a door joins two rooms", where=where, remedy="doors: [[kitchen, hall]]")
    doors = [(_name(first), _name(second)) for first, second in doors]
    start = _name(content.get("character") or names[0])
    for room in (*(end for door in doors for end in door), start):
        if room not in plan:
            raise EgjaxError(f"no room {room!r}", where=where, remedy=_nearest(room, plan))
    graph = assemble(plan, doors, kinds, start)
    graph["nodes"] = [settled(node) for node in graph["nodes"]]
    for name, states in _mapping(content, "states", where).items():
        _set_states(graph, _name(name), _list(states), where)
    if len(names) == 1:
        raise EgjaxError(
            f"{names[0]} is the only room, and in a room without a door nothing can be walked to",
            where=where,
            remedy="add another one, be it empty: hall: []",
        )
    return graph


def _name(value: Any) -> str:
    """A room or class as VirtualHome writes it, `living_room` for "Living room"."""
    return "_".join(str(value).lower().split())


def _mapping(content: Mapping[str, Any], key: str, where: str) -> Mapping[Any, Any]:
    found = content.get(key) or {}
    if not isinstance(found, Mapping):
        raise EgjaxError(f"{key!r} is no mapping", where=where, remedy=f"{key}: {{lamp: [...]}}")
    return found


def _things(value: Any, where: str) -> list[Any]:
    value = value.split(",") if isinstance(value, str) else value or []
    if not isinstance(value, list):
        raise EgjaxError("no list of things", where=where, remedy="[table, cup on table]")
    return value


def _list(value: Any) -> list[Any]:
    """A list, or the words of a text; YAML reads ON and OFF as true and false."""
    if isinstance(value, bool):
        value = [value]
    if isinstance(value, str):
        value = value.replace(",", " ").split()
    words = list(value or ()) if isinstance(value, list | None) else [value]
    return ["ON" if w is True else "OFF" if w is False else w for w in words]


def _thing(text: Any, where: str) -> Thing:
    match = _THING.match(str(text).strip().lower())
    if match is None:
        raise EgjaxError(f"not a thing: {text!r}", where=where, remedy="'cup', 'cup on table'")
    name, how, place = match.groups()
    return Thing(name, {"on": "ON", None: None}.get(how, "INSIDE"), place)


def _kind(value: Any, where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Properties and states of a class."""
    value = value if isinstance(value, Mapping) else {"properties": value}
    found = []
    for key, known in (("properties", PROPERTIES), ("states", STATES)):
        words = tuple(str(word).upper() for word in _list(value.get(key)))
        for word in words:
            if word not in known:
                raise EgjaxError(f"unknown {word!r}", where=where, remedy=_nearest(word, known))
        found.append(words)
    return found[0], found[1]


def _set_states(graph: dict[str, Any], name: str, states: Sequence[Any], where: str) -> None:
    """Gives all objects of a class initial states; what these exclude goes."""
    nodes = [node for node in graph["nodes"] if node["class_name"] == name]
    if not nodes:
        classes = {node["class_name"] for node in graph["nodes"]}
        raise EgjaxError(f"no {name!r} to set", where=where, remedy=_nearest(name, classes))
    words = _kind({"states": states}, f"{where}, states of {name}")[1]
    axes = (("OPEN", "CLOSED"), ("ON", "OFF"), ("CLEAN", "DIRTY"), ("PLUGGED_IN", "PLUGGED_OUT"))
    excluded = {other for axis in axes for other in axis if set(axis) & set(words)} - set(words)
    for node in nodes:
        node["states"] = sorted({*node["states"], *words} - excluded)


def parse_goal(text: str, graph: Mapping[str, Any], *, where: str = "goal") -> Predicate:
    """Reads a goal such as `ON(cup, table)`, `OPEN(fridge)`, `HOLDS_RH(character, milk (12))`.

    Args:
        text: relation or state, and one or two objects of the scene, by class or with an id.
        graph: the scene; its classes and ids are the ones that can be meant.
        where: what to call the goal in an error.

    Raises:
        EgjaxError: what is not known, and the names that are nearest.
    """
    match = _GOAL.match(text.strip())
    if match is None:
        raise EgjaxError(
            f"not a goal: {text.strip()!r}", where=where, remedy="ON(cup, table), OPEN(fridge)"
        )
    word = match[1].upper()
    objects = [_object(part, graph, f"{where} {text.strip()}") for part in match[2].split(",")]
    relations = RELATIONS[:6]
    if word not in (*relations, *STATES):
        raise EgjaxError(
            f"unknown relation or state {match[1]!r}",
            where=where,
            remedy=_nearest(word, (*relations, *STATES)),
        )
    if len(objects) == 1 and word in STATES:
        return Predicate(word, objects[0])
    if len(objects) != 2 or word not in relations:
        takes = "one object" if word in STATES else "two objects"
        if word in STATES and word in relations:
            takes = "one object (the state) or two (the relation)"
        raise EgjaxError(f"{word} takes {takes}, not {len(objects)}", where=f"{where} {text}")
    if word.startswith("HOLDS") and objects[0] != _CHARACTER:
        raise EgjaxError(
            "only the character holds things",
            where=f"{where} {text}",
            remedy=f"{word}(character, …)",
        )
    if word == "CLOSE" and objects[1] == _CHARACTER:  # either way round it is the same
        objects.reverse()
    return Predicate(word, objects[0], objects[1])


def parse_goals(
    texts: Sequence[str], graph: Mapping[str, Any], *, where: str = "goal"
) -> tuple[Predicate, ...]:
    """Reads several goals; one text may hold several, apart by `;`, `&` or new lines.

    Raises:
        EgjaxError: as `parse_goal`, or where there is none.
    """
    parts = [part.strip() for text in texts for part in re.split(r"[;&\n]", text)]
    found = tuple(dict.fromkeys(parse_goal(p, graph, where=where) for p in parts if p))
    if not found:
        raise EgjaxError("no goal", where=where, remedy="ON(cup, table), OPEN(fridge)")
    return found


def _object(text: str, graph: Mapping[str, Any], where: str) -> str:
    """An object as a predicate names it: its class, or `class (id)` for this very one."""
    match = _OBJECT.match(text.strip().lower())
    if match is None or not text.strip():
        raise EgjaxError(f"not an object: {text.strip()!r}", where=where, remedy="cup, cup (12)")
    name, number = _name(match[1]), match[2] or match[3]
    if name.isdigit() and number is None:
        name, number = "", name
    nodes = {node["id"]: node["class_name"] for node in graph["nodes"]}
    if number is not None:
        named = nodes.get(int(number))
        if named is None or name not in ("", named):
            ids = [i for i, kind in nodes.items() if kind == (name or kind)]
            told = f"{name} are " + ", ".join(map(str, ids[:12])) if name and ids else "no such id"
            raise EgjaxError(f"no {name or 'object'} ({number})", where=where, remedy=told)
        return named if named == _CHARACTER else f"{named} ({number})"
    if name not in nodes.values():
        raise EgjaxError(
            f"the scene has no {name!r}", where=where, remedy=_nearest(name, nodes.values())
        )
    return name
