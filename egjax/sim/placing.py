"""Programs without graphs become tasks: their objects are bound to a scene, or made and placed.

RobotHow's archive of executable programs names a scene each, but brings no graphs. An object of a
script is found in the scene by its id where the class agrees, else by class or a class that the
resources call equivalent; ids from 1000 on, and what no class of the scene matches, are made: with
the properties that the resources list, put where they say it belongs. `egjax.sim.repair` searches
for placements and initial states under which the program runs. Host code; everything is drawn from
a seed.

Resources are VirtualHome's (`class_name_equivalence.json`, `object_script_placing.json`,
`object_states.json`, `properties_data.json`). Default states follow its preparation of graphs (tag
v1.0.0): closed, off, plugged in, clean, doors open, the character near nothing.
"""

from __future__ import annotations

import json
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from egjax.errors import EgjaxError
from egjax.sim.graph import load_graph
from egjax.sim.robothow import Program
from egjax.sim.text import Line, parse_line, parse_script

__all__ = [
    "NEW_ID",
    "PLACED",
    "Home",
    "Layout",
    "Resources",
    "Source",
    "apply_edits",
    "ask_states",
    "draw",
    "load_homes",
    "load_placed",
    "make",
    "placed_row",
    "placings",
    "put",
    "read_sources",
    "settle",
    "settled",
    "write_placed",
]

PLACED = "placed.jsonl"
"""File of a folder of placed programs."""
NEW_ID = 1000
"""Ids from here on are objects of a program, not of its scene."""

OPPOSITE = {
    "OPEN": "CLOSED", "CLOSED": "OPEN", "ON": "OFF", "OFF": "ON", "CLEAN": "DIRTY",
    "DIRTY": "CLEAN", "PLUGGED_IN": "PLUGGED_OUT", "PLUGGED_OUT": "PLUGGED_IN",
}  # fmt: skip
ASKS = {
    "OPEN": "CLOSED", "CLOSE": "OPEN", "SWITCHON": "OFF", "SWITCHOFF": "ON",
    "PLUGIN": "PLUGGED_OUT", "PLUGOUT": "PLUGGED_IN", "WASH": "DIRTY", "RINSE": "DIRTY",
    "SCRUB": "DIRTY", "WIPE": "DIRTY",
}  # fmt: skip
_PROPERTY = {"OPEN": "CAN_OPEN", "ON": "HAS_SWITCH", "PLUGGED_IN": "HAS_PLUG"}
_WORDS = {"OPEN": "open", "ON": "on", "PLUGGED_IN": "plugged", "DIRTY": "dirty"}
_DEFAULTS = ("CLOSED", "OFF", "PLUGGED_IN", "CLEAN")
_RELATION = {"IN": "INSIDE", "ON": "ON", "NEARBY": "CLOSE"}
_NOWHERE = "null"  # how the resources write a room that they do not know


@dataclass(frozen=True)
class Source:
    """A program without graphs.

    Attributes:
        name: path in the archive without suffix, `<scene>/<source>/<name>`.
        title, description: the activity, and a person's words.
        script: the steps, with the ids of the archive.
        scene: name of its scene graph.
    """

    name: str
    title: str
    description: str
    script: tuple[Line, ...]
    scene: str


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """Relative path and text of every program of a folder or tar file."""
    if path.is_dir():
        for file in sorted(path.rglob("*.txt")):
            yield str(file.relative_to(path)), file.read_text(encoding="utf-8")
        return
    try:
        with tarfile.open(path) as archive:
            for member in sorted(archive.getmembers(), key=lambda m: m.name):
                file = archive.extractfile(member) if member.name.endswith(".txt") else None
                if file is not None:
                    yield member.name, file.read().decode("utf-8")
    except (OSError, tarfile.TarError) as error:
        raise EgjaxError("cannot read the programs", where=str(path), remedy=str(error)) from None


def read_sources(path: str | Path) -> tuple[list[Source], dict[str, str]]:
    """Programs of a folder or tar file with `.../<scene>/<source>/<name>.txt`.

    Returns:
        The programs, sorted by name, and the names of those that cannot be read with the reason.

    Raises:
        EgjaxError: no such file, or no program in it.
    """
    found: list[Source] = []
    unread: dict[str, str] = {}
    for file, text in _texts(Path(path)):
        parts = Path(file).with_suffix("").parts[-3:]
        name, lines = "/".join(parts), text.splitlines()
        try:
            script = parse_script(text, where=file)
            if not script or len(parts) < 3:
                raise EgjaxError("a program without steps or scene", where=file)
        except EgjaxError as error:
            unread[name] = error.what
            continue
        description = lines[1].strip() if len(lines) > 1 else ""
        found.append(Source(name, lines[0].strip(), description, tuple(script), parts[0]))
    if not found and not unread:
        raise EgjaxError("no programs", where=str(path), remedy="<scene>/<source>/<name>.txt")
    return found, unread


@dataclass(frozen=True)
class Resources:
    """What is known about classes of objects.

    Attributes:
        other_names: further names of a class.
        placing: where a class belongs: (relation, class of the destination, class of the room or
            None).
        states: words of the states that a class may have.
        properties: of a class.
    """

    other_names: Mapping[str, frozenset[str]]
    placing: Mapping[str, tuple[tuple[str, str, str | None], ...]]
    states: Mapping[str, frozenset[str]]
    properties: Mapping[str, tuple[str, ...]]

    @staticmethod
    def load(folder: str | Path) -> Resources:
        """Reads VirtualHome's four resource files.

        Raises:
            EgjaxError: a file is missing or malformed.
        """

        def read(name: str) -> Mapping[str, Any]:
            path = Path(folder) / f"{name}.json"
            try:
                return json.loads(path.read_text(encoding="utf-8"))
            except OSError:
                raise EgjaxError("no such resource file", where=str(path)) from None
            except ValueError as error:
                raise EgjaxError("not JSON", where=str(path), remedy=str(error)) from None

        def room(name: str | None) -> str | None:
            return None if name in (None, "", _NOWHERE) else name

        places = {
            name: tuple(
                (_RELATION[row["relation"].upper()], row["destination"], room(row.get("room")))
                for row in rows
            )
            for name, rows in read("object_script_placing").items()
        }
        names = {k: frozenset(map(_plain, v)) for k, v in read("class_name_equivalence").items()}
        states = {k: frozenset(v) for k, v in read("object_states").items()}
        properties = {k: tuple(v) for k, v in read("properties_data").items()}
        return Resources(names, places, states, properties)

    def alike(self, one: str, two: str) -> bool:
        """Whether two class names mean one kind of thing: they share a name."""
        return bool(self._names(one) & self._names(two))

    def _names(self, name: str) -> frozenset[str]:
        return self.other_names.get(name, frozenset()) | {_plain(name)}


def _plain(name: str) -> str:
    return name.lower().replace("_", "")


class Home:
    """A scene with the questions that placing asks of it.

    Attributes:
        nodes: by id, default states filled in, in the scene's order.
        edges: all that do not touch the character.
        room_of: room of each node that is in one (itself for a room).
        rooms: ids of rooms.
        close: ids CLOSE to each node.
        character: id.
        known: `edges` as (from, relation, to).
    """

    def __init__(self, graph: Mapping[str, Any], resources: Resources, where: str = "scene"):
        self.resources = resources
        self.nodes: dict[int, dict[str, Any]] = {n["id"]: settled(n) for n in graph["nodes"]}
        people = [i for i, n in self.nodes.items() if n["class_name"] == "character"]
        if len(people) != 1:
            raise EgjaxError(f"{len(people)} characters; exactly one is needed", where=where)
        self.character = people[0]
        self.edges = [
            edge
            for edge in graph["edges"]
            if self.character not in (edge["from_id"], edge["to_id"])
        ]
        self.known = {(e["from_id"], e["relation_type"].upper(), e["to_id"]) for e in self.edges}
        self.rooms = [i for i, n in self.nodes.items() if n.get("category") == "Rooms"]
        self.room_of = {i: i for i in self.rooms}
        self.inside: dict[int, list[int]] = defaultdict(list)
        self.close: dict[int, set[int]] = defaultdict(set)
        for a, relation, b in self.known:
            if relation == "INSIDE":
                self.inside[a].append(b)
                if b in self.rooms:
                    self.room_of.setdefault(a, b)
            if relation == "CLOSE":
                self.close[a].add(b)
        self.by_class: dict[str, list[int]] = defaultdict(list)
        for i in sorted(self.nodes):
            self.by_class[self.nodes[i]["class_name"]].append(i)

    @property
    def graph(self) -> dict[str, Any]:
        """The scene without the character's edges, every state filled in."""
        return {"nodes": list(self.nodes.values()), "edges": self.edges}

    def like(self, name: str) -> list[int]:
        """Nodes of a class, else of those that mean the same."""
        if name in self.by_class:
            return self.by_class[name]
        return [
            i for kind in self.by_class if self.resources.alike(name, kind)
            for i in self.by_class[kind]
        ]  # fmt: skip


def settled(node: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a node in which every state that it can have has a value: closed (doors open), off,
    plugged in, clean, where nothing is said."""
    states = {state.upper() for state in node["states"]}
    if node["class_name"] != "character":
        for default in _DEFAULTS:
            kind = default if default in _PROPERTY or default == "CLEAN" else OPPOSITE[default]
            possible = kind == "CLEAN" or _PROPERTY[kind] in node["properties"]
            if possible and not {default, OPPOSITE[default]} & states:
                door = node.get("category") == "Doors" and default == "CLOSED"
                states.add("OPEN" if door else default)
    return {**node, "states": sorted(states)}


@dataclass
class Layout:
    """A program bound to its scene: what is made, where it stands, and how the day begins.

    Attributes:
        home: the scene.
        script: steps with ids of the scene and of what is made.
        made: nodes that the scene lacks, by id.
        place: where something made was put: (relation, destination).
        room: the room of something made that stands on nothing.
        beside: pairs that stand CLOSE to each other in addition.
        facing: pairs (from, to) of which the first faces the second in addition.
        states: initial states of nodes where they differ from the scene's.
        freed: nodes of the scene that were taken off what they were ON and put on the floor.
        start: room in which the character starts.
        own: edges of the character at the start: (from, relation, to).
        fixed: ids of the script that may not be bound to another node.
    """

    home: Home
    script: tuple[Line, ...] = ()
    made: dict[int, dict[str, Any]] = field(default_factory=dict)
    place: dict[int, tuple[str, int]] = field(default_factory=dict)
    room: dict[int, int] = field(default_factory=dict)
    beside: set[tuple[int, int]] = field(default_factory=set)
    facing: set[tuple[int, int]] = field(default_factory=set)
    states: dict[int, set[str]] = field(default_factory=dict)
    freed: dict[int, int] = field(default_factory=dict)
    start: int = -1
    own: set[tuple[int, str, int]] = field(default_factory=set)
    fixed: set[int] = field(default_factory=set)

    def node(self, i: int) -> Mapping[str, Any]:
        """A node of the scene or one made."""
        return self.made[i] if i in self.made else self.home.nodes[i]

    def room_of(self, i: int) -> int:
        """The room a node is in."""
        for _ in range(len(self.place) + 1):
            if i not in self.place:
                break
            i = self.place[i][1]
        if i == self.home.character:
            return self.start
        return self.room[i] if i in self.room else self.home.room_of.get(i, self.start)

    def state_of(self, i: int) -> set[str]:
        """Initial states of a node."""
        return self.states.get(i, set(self.node(i)["states"]))

    def set_state(self, i: int, state: str) -> None:
        """Gives a node an initial state in place of its opposite."""
        self.states[i] = (self.state_of(i) - {OPPOSITE.get(state, "")}) | {state}

    def uses(self, i: int) -> list[tuple[int, str]]:
        """Steps that name a node: (number, verb)."""
        return [
            (t, line.verb)
            for t, line in enumerate(self.script)
            if any(k == i for _, k in line.arguments)
        ]

    def added_edges(self) -> list[tuple[int, str, int]]:
        """Edges that the scene (without its character's) lacks."""
        edges = {(self.home.character, "INSIDE", self.start)} | self.own
        for i in self.made:
            if self.room_of(i) != i:
                edges.add((i, "INSIDE", self.room_of(i)))
            if "BODY_PART" in self.made[i]["properties"]:
                edges |= {(i, "CLOSE", self.home.character), (self.home.character, "CLOSE", i)}
        for i, (relation, there) in self.place.items():
            edges |= {(i, relation, there), (i, "CLOSE", there), (there, "CLOSE", i)}
        for a, b in self.beside:
            edges |= {(a, "CLOSE", b), (b, "CLOSE", a)}
        edges |= {(a, "FACING", b) for a, b in self.facing}
        for i in self.freed:
            floor = self._floor(i)
            if floor is not None:
                edges |= {(i, "ON", floor), (i, "CLOSE", floor), (floor, "CLOSE", i)}
        return sorted(edges)

    def removed_edges(self) -> set[tuple[int, str, int]]:
        """Edges of the scene that are gone: of things taken off a seat."""
        return {
            edge
            for i, there in self.freed.items()
            for edge in ((i, "ON", there), (i, "CLOSE", there), (there, "CLOSE", i))
        }

    def _floor(self, i: int) -> int | None:
        floors = self.home.by_class.get("floor", [])
        return next((f for f in floors if self.home.room_of.get(f) == self.room_of(i)), None)

    def edits(self) -> dict[str, Any]:
        """What has to change in the scene, as JSON: new nodes, edges, states."""
        gone = self.removed_edges() & self.home.known
        added = [e for e in self.added_edges() if e in gone or e not in self.home.known]
        return {
            "nodes": [{**n, "states": sorted(self.state_of(i))} for i, n in self.made.items()],
            "states": {
                str(i): sorted(states)
                for i, states in sorted(self.states.items())
                if i not in self.made
            },
            "added": [list(edge) for edge in added],
            "removed": [list(edge) for edge in sorted(gone.difference(added))],
        }


def apply_edits(graph: Mapping[str, Any], edits: Mapping[str, Any]) -> dict[str, Any]:
    """A graph with nodes, states and edges changed. What stays is shared, not copied.

    Args:
        graph: `nodes` and `edges`.
        edits: `nodes` (new ones), `states` (by id), `added` and `removed` edges (from, relation,
            to).
    """
    states = {int(i): value for i, value in edits["states"].items()}
    nodes = [{**n, "states": states[n["id"]]} if n["id"] in states else n for n in graph["nodes"]]
    gone = {tuple(edge) for edge in edits["removed"]}
    edges = graph["edges"]
    if gone:
        edges = [e for e in edges if (e["from_id"], e["relation_type"], e["to_id"]) not in gone]
    added = [{"from_id": a, "relation_type": r, "to_id": b} for a, r, b in edits["added"]]
    return {"nodes": nodes + list(edits.get("nodes", ())), "edges": [*edges, *added]}


def draw(source: Source, home: Home, rng: np.random.Generator) -> Layout:
    """Binds a program's objects to a scene and places what the scene lacks.

    Args:
        source: the program.
        home: its scene.
        rng: of every choice.
    """
    layout = Layout(home)
    bound = _bind_all(source.script, layout, rng)
    layout.script = tuple(
        Line(
            line.verb,
            tuple((layout.node(bound[arg])["class_name"], bound[arg]) for arg in line.arguments),
        )
        for line in source.script
    )
    mentioned = [i for line in layout.script for _, i in line.arguments if i in home.rooms]
    others = [room for room in home.rooms if room not in mentioned[:1]] or home.rooms
    layout.start = int(rng.choice(others))
    _place_all(layout, rng)
    _set_states(layout, rng)
    return layout


def _bind_all(
    script: Sequence[Line], layout: Layout, rng: np.random.Generator
) -> dict[tuple[str, int | None], int]:
    """The node of each (class, id) of a script; nodes that the scene lacks are made."""
    home = layout.home
    keys = list(dict.fromkeys(arg for line in script for arg in line.arguments))
    bound: dict[tuple[str, int | None], int] = {}
    for name, i in keys:
        if i in home.nodes and home.nodes[i]["class_name"] == name:
            bound[name, i] = i
            layout.fixed.add(i)
    taken, numbers = set(bound.values()), {i for _, i in keys}
    fresh = (i for i in range(NEW_ID, 4 * NEW_ID) if i not in numbers and i not in home.nodes)
    for name, i in keys:
        if (name, i) in bound:
            continue
        scenery = [k for k in home.like(name) if k in home.rooms or k not in taken]
        if scenery and (i is None or i < NEW_ID or scenery[0] in home.rooms):
            bound[name, i] = _choose(scenery, bound.values(), home, rng)
        else:
            number = i if i is not None and i >= NEW_ID and i not in home.nodes else next(fresh)
            bound[name, i] = number
            layout.made[number] = make(number, name, home)
        taken.add(bound[name, i])
    return bound


def _choose(
    candidates: Sequence[int], bound: Iterable[int], home: Home, rng: np.random.Generator
) -> int:
    """One of several nodes: where most of what is already bound is near, then by chance."""
    known = set(bound)
    rooms = {home.room_of.get(i) for i in known}

    def rank(i: int) -> tuple[int, bool, float]:
        return -len(home.close[i] & known), home.room_of.get(i) not in rooms, rng.random()

    return min(candidates, key=rank)


def make(number: int, name: str, home: Home) -> dict[str, Any]:
    """A new object of a class, states at their defaults."""
    twins = home.by_class.get(name, ())
    properties = home.resources.properties.get(name)
    if properties is None:
        properties = home.nodes[twins[0]]["properties"] if twins else ()
    node = {
        "id": number,
        "class_name": name,
        "category": "placable_objects",
        "properties": list(properties),
        "states": [],
    }
    return settled(node)


def placings(layout: Layout, i: int) -> list[tuple[str, int]]:
    """Where a made object may be put: (relation, node), as the resources say."""
    home, found = layout.home, []
    for relation, kind, room in home.resources.placing.get(layout.node(i)["class_name"], ()):
        there = list(home.like(kind))
        there += [
            k for k in layout.made if home.resources.alike(layout.made[k]["class_name"], kind)
        ]
        for k in there:
            right = room is None or home.resources.alike(
                layout.node(layout.room_of(k))["class_name"], room
            )
            if k != i and right and not _rests_on(layout, k, i):
                found.append((relation, k))
    return sorted(set(found))


def _rests_on(layout: Layout, upper: int, lower: int) -> bool:
    """Whether something made stands, through others, on something else that was made."""
    while upper in layout.place:
        upper = layout.place[upper][1]
        if upper == lower:
            return True
    return False


def _place_all(layout: Layout, rng: np.random.Generator) -> None:
    """Places what was made: with what the script uses before, else in the room it is used in."""
    home = layout.home
    here = layout.start if not layout.script else int(rng.choice(home.rooms))
    for line in layout.script:
        for _, i in line.arguments:
            if i in home.nodes:
                here = home.room_of[i]
                break
        else:
            continue
        break
    opened: set[int] = set()
    named: set[int] = set()
    for line in layout.script:
        for _, i in line.arguments:
            if i is None or i in named:
                continue
            if i in layout.made:
                layout.room[i] = here
                options = placings(layout, i)
                if options:
                    put(layout, i, _best(layout, options, here, named, opened, rng))
            named.add(i)
        if line.verb in ("WALK", "RUN", "FIND"):
            here = layout.room_of(line.arguments[0][1] or 0)
        if line.verb == "OPEN":
            opened.add(line.arguments[0][1] or 0)


def _best(
    layout: Layout,
    options: Sequence[tuple[str, int]],
    here: int,
    named: set[int],
    opened: set[int],
    rng: np.random.Generator,
) -> tuple[str, int]:
    """The placing that a script is most likely to mean."""

    def rank(option: tuple[str, int]) -> tuple[bool, bool, bool, float]:
        relation, k = option
        shut = relation == "INSIDE" and "CAN_OPEN" in layout.node(k)["properties"]
        hidden = shut and k not in opened
        return hidden, k not in named, layout.room_of(k) != here, rng.random()

    return min(options, key=rank)


def put(layout: Layout, i: int, option: tuple[str, int]) -> None:
    """Puts a made object somewhere; what it stood beside in another room, it stands no more."""
    layout.place[i] = option
    settle(layout, i)


def settle(layout: Layout, i: int) -> None:
    """Drops CLOSE pairs of a made object that its room no longer allows."""
    room = layout.room_of(i)
    layout.beside = {p for p in layout.beside if i not in p or layout.room_of(_other(p, i)) == room}


def _other(pair: tuple[int, int], i: int) -> int:
    return pair[1] if pair[0] == i else pair[0]


def _set_states(layout: Layout, rng: np.random.Generator) -> None:
    """Initial states: dirt by chance on what was made and may be dirty, then `ask_states`."""
    for i in layout.made:
        words = layout.home.resources.states.get(layout.made[i]["class_name"], frozenset())
        if {"dirty", "clean"} <= words and rng.random() < 0.5:
            layout.set_state(i, "DIRTY")
    ask_states(layout)


def ask_states(layout: Layout) -> None:
    """Gives each thing the initial state that the script's first use of it asks for."""
    settled: set[tuple[int, str]] = set()
    for line in layout.script:
        numbers = [i for _, i in line.arguments if i is not None]
        wanted = [(numbers[0], ASKS[line.verb])] if line.verb in ASKS and numbers else []
        if line.verb == "PUTIN":
            wanted = [(numbers[1], "OPEN")]
        if line.verb == "OPEN":
            wanted.append((numbers[0], "OFF"))
        if line.verb == "SWITCHON":
            wanted.append((numbers[0], "PLUGGED_IN"))
        for i, state in wanted:
            kind = min(state, OPPOSITE[state])
            if (i, kind) not in settled and _possible(layout, i, state):
                settled.add((i, kind))
                layout.set_state(i, state)


def _possible(layout: Layout, i: int, state: str) -> bool:
    """Whether a node can have a state, by its property or the resources' words."""
    node = layout.node(i)
    for kind in (state, OPPOSITE[state]):
        if kind in _PROPERTY and _PROPERTY[kind] in node["properties"]:
            return True
        words = layout.home.resources.states.get(node["class_name"], frozenset())
        if kind in _WORDS and _WORDS[kind] in words:
            return True
    return node["class_name"] in ("desk", "window") and state in ("OPEN", "CLOSED")


def load_homes(folder: str | Path, names: Iterable[str], resources: Resources) -> dict[str, Home]:
    """Scenes `<name>.json` of a folder.

    Raises:
        EgjaxError: a scene file is missing or is no graph.
    """
    found = {}
    for name in sorted(set(names)):
        path = Path(folder) / f"{name}.json"
        found[name] = Home(load_graph(path), resources, where=str(path))
    return found


def write_placed(folder: str | Path, rows: Iterable[Mapping[str, Any]], scenes: Path) -> None:
    """Keeps placed programs and the scenes that they change in one folder.

    Args:
        folder: where `placed.jsonl` and `scenes/` go.
        rows: of `placed_row`.
        scenes: folder of the scene graphs.
    """
    rows, root = list(rows), Path(folder)
    (root / "scenes").mkdir(parents=True, exist_ok=True)
    for name in sorted({row["scene"] for row in rows}):
        (root / "scenes" / f"{name}.json").write_bytes((scenes / f"{name}.json").read_bytes())
    (root / PLACED).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def placed_row(
    source: Source, layout: Layout, seed: int, final: Mapping[str, Any]
) -> dict[str, Any]:
    """A program that runs as a JSON object: its bound script, `init` (what is changed in its
    scene) and `final` (what the program then changes), both as `apply_edits` takes them."""
    return {
        "name": source.name,
        "title": source.title,
        "description": source.description,
        "scene": source.scene,
        "seed": seed,
        "script": [str(line) for line in layout.script],
        "init": layout.edits(),
        "final": final,
    }


def load_placed(folder: str | Path, names: Sequence[str] | None = None) -> list[Program]:
    """Programs that `write_placed` kept, with their initial and final graphs.

    Graphs share the nodes and edges that they have in common: do not change them in place.

    Args:
        folder: with `placed.jsonl` and `scenes/`.
        names: programs to read; all where absent.

    Raises:
        EgjaxError: no such folder, a malformed row, or a name that it lacks.
    """
    path = Path(folder) / PLACED
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        raise EgjaxError("no placed programs", where=str(path)) from None
    unknown = Resources({}, {}, {}, {})
    homes: dict[str, Home] = {}
    found: dict[str, Program] = {}
    wanted = None if names is None else set(names)
    for number, text in enumerate(lines, start=1):
        where = f"{path}:{number}"
        try:
            row = json.loads(text)
            if wanted is not None and row["name"] not in wanted:
                continue
            scene = row["scene"]
            if scene not in homes:
                homes |= load_homes(Path(folder) / "scenes", [scene], unknown)
            init = apply_edits(homes[scene].graph, row["init"])
            found[row["name"]] = Program(
                name=row["name"],
                title=row["title"],
                description=row["description"],
                script=tuple(parse_line(line, where=where) for line in row["script"]),
                init=init,
                final=apply_edits(init, row["final"]),
                scene=scene,
            )
        except (ValueError, KeyError, TypeError) as error:
            raise EgjaxError(f"not a placed program: {error!r}", where=where) from None
    missing = [name for name in names or () if name not in found]
    if missing:
        raise EgjaxError(f"no program {missing[0]!r}", where=str(path))
    return [found[name] for name in (names or found)]
