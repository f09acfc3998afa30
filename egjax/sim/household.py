"""An embedded household of the project's own making: two small homes, a dozen activities.

It serves where no RobotHow data can be had, and as a test bed. Graphs have VirtualHome's format;
final graphs come from running the scripts in the simulator.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import jax
import numpy as np

from egjax.errors import EgjaxError
from egjax.sim.graph import decode, encode, sizes_of
from egjax.sim.robothow import Program
from egjax.sim.text import bind, parse_script
from egjax.sim.world import step

__all__ = ["Thing", "assemble", "home_graph", "home_programs", "known_kinds"]

_DATA = "household.toml"


def _data() -> dict[str, Any]:
    return tomllib.loads(resources.files("egjax.sim").joinpath(_DATA).read_text("utf-8"))


def known_kinds() -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Properties and initial states of the classes of the embedded homes."""
    kinds = _data()["kinds"]
    return {
        k: (tuple(props.split()), tuple(states.split())) for k, (props, states) in kinds.items()
    }


class Thing(NamedTuple):
    """An object of a room: its class, and ON or INSIDE which class before it, if any."""

    name: str
    relation: str | None = None
    place: str | None = None


def home_graph(home: str) -> dict[str, Any]:
    """The graph of an embedded home, `cottage` or `flat`; the character stands in the kitchen."""
    homes = _data()["homes"]
    if home not in homes:
        raise EgjaxError(f"no home {home!r}", remedy="homes are " + ", ".join(homes))
    rooms = {
        room: [_thing(text) for text in things.split()]
        for room, things in homes[home]["rooms"].items()
    }
    return assemble(rooms, homes[home]["doors"], known_kinds(), "kitchen")


def _thing(text: str) -> Thing:
    for sign, relation in ((">", "ON"), ("@", "INSIDE")):
        name, mark, place = text.partition(sign)
        if mark:
            return Thing(name, relation, place)
    return Thing(text)


def assemble(
    rooms: Mapping[str, Sequence[Thing]],
    doors: Sequence[Sequence[str]],
    kinds: Mapping[str, tuple[Sequence[str], Sequence[str]]],
    start: str,
) -> dict[str, Any]:
    """A graph of rooms and what is in them.

    Args:
        rooms: things of each room; a place names the first of its class before, in the same room.
        doors: pairs of rooms.
        kinds: properties and initial states of classes; others have none.
        start: the room in which the character stands.
    """
    nodes: list[dict[str, Any]] = []
    edges: list[dict[str, Any]] = []

    def node(kind: str, category: str) -> int:
        properties, states = kinds.get(kind, ((), ()))
        nodes.append(
            {
                "id": len(nodes) + 1,
                "class_name": kind,
                "category": category,
                "properties": list(properties),
                "states": list(states),
            }
        )
        return len(nodes)

    def edge(a: int, relation: str, b: int) -> None:
        edges.append({"from_id": a, "relation_type": relation, "to_id": b})

    numbers = {room: node(room, "Rooms") for room in rooms}
    for room, things in rooms.items():
        here: dict[str, int] = {}
        for thing in things:
            new = node(thing.name, "Objects")
            edge(new, "INSIDE", numbers[room])
            if thing.relation and thing.place:
                edge(new, thing.relation, here[thing.place])
                edge(new, "CLOSE", here[thing.place])
                edge(here[thing.place], "CLOSE", new)
            here.setdefault(thing.name, new)
    for first, second in doors:
        door = node("door", "Doors")
        edge(door, "INSIDE", numbers[first])
        edge(door, "BETWEEN", numbers[first])
        edge(door, "BETWEEN", numbers[second])
    edge(node("character", "Characters"), "INSIDE", numbers[start])
    return {"nodes": nodes, "edges": edges}


def _script(graph: Mapping[str, Any], steps: Sequence[str]) -> str:
    """RobotHow lines of an activity's steps, ids filled in."""
    by_id = {node["id"]: node["class_name"] for node in graph["nodes"]}
    inside = {
        (edge["from_id"], by_id[edge["to_id"]])
        for edge in graph["edges"]
        if edge["relation_type"] == "INSIDE"
    }
    lines = []
    for action in steps:
        verb, *names = action.split()
        line = f"[{verb}]"
        for name in names:
            kind, _, room = name.partition("/")
            found = next(
                i for i, c in by_id.items() if c == kind and (not room or (i, room) in inside)
            )
            line += f" <{kind}> ({found})"
        lines.append(line)
    return "\n".join(lines)


def home_programs() -> list[Program]:
    """The embedded activities as RobotHow programs, with initial and final graphs."""
    activities = _data()["activities"]
    graphs = {activity["home"]: home_graph(activity["home"]) for activity in activities}
    sizes = sizes_of(graphs.values())
    jitted = jax.jit(step)
    programs = []
    for number, activity in enumerate(activities, start=1):
        home, title = activity["home"], activity["title"]
        script = parse_script(_script(graphs[home], activity["steps"]))
        scene, state, names = encode(graphs[home], sizes, where=home)
        for line in script:
            state, code = jitted(scene, state, *map(np.int32, bind(scene, state, names, line)))
            if int(code):
                raise AssertionError(f"{title} in the {home}: {line} is refused ({int(code)})")
        final = decode(scene, jax.device_get(state), names)
        programs.append(
            Program(f"{home}{number}", title, f"{title}.", tuple(script), graphs[home], final, home)
        )
    return programs
