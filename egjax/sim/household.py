"""An embedded household of the project's own making: two small homes, a dozen activities.

It serves where no RobotHow data can be had, and as a test bed. Graphs have VirtualHome's format;
final graphs come from running the scripts in the simulator.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jax
import numpy as np

from egjax.errors import EgjaxError
from egjax.sim.graph import decode, encode, sizes_of
from egjax.sim.robothow import Program
from egjax.sim.text import bind, parse_script
from egjax.sim.world import step

__all__ = ["home_graph", "home_programs"]

_DATA = "household.toml"


def _data() -> dict[str, Any]:
    return tomllib.loads(resources.files("egjax.sim").joinpath(_DATA).read_text("utf-8"))


def home_graph(home: str) -> dict[str, Any]:
    """The graph of an embedded home, `cottage` or `flat`; the character stands in the kitchen."""
    data = _data()
    if home not in data["homes"]:
        raise EgjaxError(f"no home {home!r}", remedy="homes are " + ", ".join(data["homes"]))
    plan = data["homes"][home]
    nodes: list[dict[str, Any]] = []
    edges: list[dict[str, Any]] = []

    def node(kind: str, category: str) -> int:
        props, states = data["kinds"].get(kind, ("", ""))
        nodes.append(
            {
                "id": len(nodes) + 1,
                "class_name": kind,
                "category": category,
                "properties": props.split(),
                "states": states.split(),
            }
        )
        return len(nodes)

    def edge(a: int, relation: str, b: int) -> None:
        edges.append({"from_id": a, "relation_type": relation, "to_id": b})

    rooms = {room: node(room, "Rooms") for room in plan["rooms"]}
    for room, things in plan["rooms"].items():
        here: dict[str, int] = {}
        for thing in things.split():
            mark = next((sign for sign in ">@" if sign in thing), "")
            name, _, place = thing.partition(mark) if mark else (thing, "", "")
            new = node(name, "Objects")
            edge(new, "INSIDE", rooms[room])
            if mark:
                edge(new, "ON" if mark == ">" else "INSIDE", here[place])
                edge(new, "CLOSE", here[place])
                edge(here[place], "CLOSE", new)
            here.setdefault(name, new)
    for first, second in plan["doors"]:
        door = node("door", "Doors")
        edge(door, "INSIDE", rooms[first])
        edge(door, "BETWEEN", rooms[first])
        edge(door, "BETWEEN", rooms[second])
    edge(node("character", "Characters"), "INSIDE", rooms["kitchen"])
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
