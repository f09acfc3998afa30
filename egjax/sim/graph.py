"""Graphs as VirtualHome writes them (JSON) to arrays and back. Host code."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from egjax.errors import EgjaxError
from egjax.sim.vocab import PROPERTIES, RELATIONS, STATE_SHIFT, STATES, Trait
from egjax.types import Scene, State

__all__ = [
    "SQUEEZABLE",
    "TIE_LIMITS",
    "Names",
    "Sizes",
    "added_edges",
    "check_graph",
    "decode",
    "edge_bits",
    "encode",
    "load_graph",
    "pack_bytes",
    "sizes_of",
    "tie_order",
    "unpack_bytes",
]

Graph = Mapping[str, Any]

SQUEEZABLE = {
    "cleaning_solution", "tooth_paste", "shampoo", "food_peanut_butter", "dish_soap", "soap",
    "towel", "rag", "paper", "sponge", "food_lemon", "check",
}  # fmt: skip
_SIT = {"couch": 4, "bed": 4, "loveseat": 2, "sofa": 4, "pianobench": 2, "bench": 2}
_LIE = {"couch": 2, "bathtub": 2, "bed": 3, "loveseat": 2, "sofa": 2}
_MAX_NODES = 4096  # 12 bits of a packed edge
_MODULI = (8, 32, 128, 512)
TIE_LIMITS = (4, 18, 76)
"""Sizes of a set above which the tie rule takes the next modulus."""


@dataclass(frozen=True)
class Sizes:
    """Array sizes: nodes, doors, rooms, INSIDE parents, pairs of objects between which edges are
    added. Shared by a batch."""

    nodes: int = 320
    doors: int = 4
    rooms: int = 4
    parents: int = 2
    added: int = 24


@dataclass(frozen=True)
class Names:
    """What the arrays leave out: node dicts in array order and the index of each graph id."""

    nodes: tuple[Mapping[str, Any], ...]
    index: Mapping[int, int]
    fixed_edges: frozenset[tuple[int, str, int]]

    def class_name(self, node: int) -> str:
        """Class name of a node index."""
        return self.nodes[node]["class_name"]

    def label(self, node: int) -> str:
        """A node as the simulator prints it, `<cup> (12)`."""
        return f"<{self.nodes[node]['class_name']}> ({self.nodes[node]['id']})"


_NODE = {"id": int, "class_name": str, "states": list}
_EDGE = {"from_id": int, "relation_type": str, "to_id": int}
_KINDS = {int: "a whole number", str: "a text", list: "a list"}


def check_graph(graph: object, *, where: str) -> dict[str, Any]:
    """A graph read from a file, if it has a graph's fields and types.

    Raises:
        EgjaxError: it has not; names the first node or edge.
    """
    if not isinstance(graph, dict) or not {"nodes", "edges"} <= graph.keys():
        raise EgjaxError(
            "not a graph", where=where, remedy="expected an object with 'nodes' and 'edges'"
        )
    for name, fields in (("nodes", _NODE), ("edges", _EDGE)):
        if not isinstance(graph[name], list):
            raise EgjaxError(f"{name!r} is no list", where=where)
        for number, item in enumerate(graph[name]):
            for field, kind in fields.items():
                # JSON's true and false are int to Python.
                if not isinstance(item, dict) or type(item.get(field)) is not kind:
                    raise EgjaxError(
                        f"{name}[{number}] has no {field!r} that is {_KINDS[kind]}",
                        where=where,
                        remedy="see VirtualHome's graphs",
                    )
    for number, node in enumerate(graph["nodes"]):
        properties = node.get("properties", [])
        if not isinstance(properties, list) or {*map(type, node["states"] + properties)} - {str}:
            raise EgjaxError(
                f"states and properties of nodes[{number}] are no lists of texts", where=where
            )
    return graph


def load_graph(path: str | Path) -> dict[str, Any]:
    """Reads a graph JSON file, see `check_graph`.

    Raises:
        EgjaxError: no such file, not JSON, or not a graph.
    """
    try:
        graph = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EgjaxError("no such graph file", where=str(path)) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = getattr(error, "lineno", 1)
        raise EgjaxError("not a JSON graph", where=f"{path}:{line}", remedy=str(error)) from None
    return check_graph(graph, where=str(path))


def sizes_of(graphs: Iterable[Graph], *, added: int = 24) -> Sizes:
    """The smallest array sizes that hold all graphs (nodes rounded up to a multiple of 32)."""
    nodes = doors = rooms = parents = 1
    for graph in graphs:
        inside: dict[int, int] = {}
        for edge in graph["edges"]:
            if edge["relation_type"].upper() == "INSIDE":
                inside[edge["from_id"]] = inside.get(edge["from_id"], 0) + 1
        nodes = max(nodes, len(graph["nodes"]))
        doors = max(doors, sum(n["class_name"] in ("door", "doorjamb") for n in graph["nodes"]))
        rooms = max(rooms, sum(n.get("category") == "Rooms" for n in graph["nodes"]))
        parents = max(parents, max(inside.values(), default=1))
    return Sizes(-(-nodes // 32) * 32, doors, rooms, parents, added)


def _traits(node: Mapping[str, Any], where: str) -> int:
    """The trait bits of a node, from its properties, class and category."""
    name, props = node["class_name"], {p.upper() for p in node.get("properties", ())}
    unknown = props - set(PROPERTIES)
    if unknown:
        raise EgjaxError(f"unknown property {sorted(unknown)[0]!r} of {name}", where=where)
    holds = {
        Trait.SURFACE: "SURFACES" in props,
        Trait.GRABBABLE: "GRABBABLE" in props or name in ("water", "child"),
        Trait.SITTABLE: "SITTABLE" in props,
        Trait.LIEABLE: "LIEABLE" in props,
        Trait.DRINKABLE: bool(props & {"DRINKABLE", "RECIPIENT"}),
        Trait.EATABLE: "EATABLE" in props,
        Trait.CUTTABLE: "CUTTABLE" in props,
        Trait.POURABLE: bool(props & {"POURABLE", "DRINKABLE"}),
        Trait.RECIPIENT: "RECIPIENT" in props or name in ("hands_both", "sponge", "face"),
        Trait.OPENABLE: "CAN_OPEN" in props or name in ("desk", "window"),
        Trait.CAN_OPEN: "CAN_OPEN" in props,
        Trait.HAS_SWITCH: "HAS_SWITCH" in props,
        Trait.HAS_PLUG: "HAS_PLUG" in props,
        Trait.READABLE: "READABLE" in props,
        Trait.LOOKABLE: "LOOKABLE" in props,
        Trait.CLOTHES: "CLOTHES" in props,
        Trait.PERSON: "PERSON" in props,
        Trait.BODY_PART: "BODY_PART" in props,
        Trait.MOVABLE: "MOVABLE" in props or name in ("button", "chair", "curtain"),
        Trait.SQUEEZABLE: "CLOTHES" in props or name in SQUEEZABLE,
        Trait.TYPEABLE: name == "keyboard" or "HAS_SWITCH" in props,
        Trait.KNIFE: "knife" in name,
        Trait.WATER: name == "water",
        Trait.COMPUTER: name == "computer",
        Trait.ROOM: node.get("category") == "Rooms",
        Trait.DOOR: name in ("door", "doorjamb"),
    }
    return sum(1 << trait for trait, true in holds.items() if true)


def _door_paths(
    links: Sequence[tuple[int, int, int]], rooms: int, doors: int
) -> tuple[np.ndarray, np.ndarray]:
    """Breadth-first paths between rooms through doors in the reference's order.

    Args:
        links: (door number, room, room) in the order in which the reference lists doors.
        rooms, doors: array sizes.

    Returns:
        Door numbers along each path int32[rooms, rooms, doors], and whether there is one.
    """
    near: dict[int, list[tuple[int, int]]] = {}
    for door, a, b in links:
        near.setdefault(a, []).append((b, door))
        near.setdefault(b, []).append((a, door))
    path = np.full((rooms, rooms, doors), -1, np.int32)
    connected = np.zeros((rooms, rooms), bool)
    for start in near:
        connected[start, start] = True
        queue = deque([start])
        while queue:
            room = queue.popleft()
            for neighbour, door in near[room]:
                if not connected[start, neighbour]:
                    connected[start, neighbour] = True
                    steps = [d for d in path[start, room] if d >= 0] + [door]
                    path[start, neighbour, : len(steps)] = steps
                    queue.append(neighbour)
    return path, connected


def _check(graph: Graph, sizes: Sizes, where: str) -> int:
    """Index of the character; raises on graphs that the arrays cannot hold."""
    characters = [i for i, n in enumerate(graph["nodes"]) if n["class_name"] == "character"]
    if len(characters) != 1:
        raise EgjaxError(f"{len(characters)} characters; exactly one is needed", where=where)
    ids = [node["id"] for node in graph["nodes"]]
    if len(set(ids)) != len(ids):
        raise EgjaxError("a node id occurs twice", where=where)
    if min(ids) < 0 or max(ids) > np.iinfo(np.int32).max:
        raise EgjaxError("a node id out of range", where=where)
    if len(ids) > min(sizes.nodes, _MAX_NODES):
        most = min(sizes.nodes, _MAX_NODES)
        raise EgjaxError(f"{len(ids)} nodes, more than {most}", where=where)
    for edge in graph["edges"]:
        if edge["relation_type"].upper() not in RELATIONS:
            raise EgjaxError(f"unknown relation {edge['relation_type']!r}", where=where)
    return characters[0]


def encode(
    graph: Graph, sizes: Sizes | None = None, *, where: str = "graph"
) -> tuple[Scene, State, Names]:
    """Arrays of a graph.

    Args:
        graph: `nodes` (id, class_name, category, properties, states, ...) and `edges`
            (from_id, relation_type, to_id).
        sizes: array sizes; those that fit this graph where absent.
        where: what to call the graph in an error.

    Returns:
        Scene, initial state (numpy arrays) and the names that the arrays leave out.

    Raises:
        EgjaxError: unknown relation, state or property, an edge to an id that the graph lacks, no
            or several characters, or more than the sizes hold.
    """
    sizes = sizes or sizes_of([graph])
    character = _check(graph, sizes, where)
    nodes = tuple(graph["nodes"])
    index = {node["id"]: i for i, node in enumerate(nodes)}
    n = sizes.nodes
    flags = np.zeros(n, np.uint32)
    props = np.zeros(n, np.uint32)
    ids = np.full(n, -1, np.int32)
    sit, lie = np.ones(n, np.int32), np.ones(n, np.int32)
    room = np.full(n, -1, np.int32)
    for i, node in enumerate(nodes):
        props[i] = _traits(node, where)
        ids[i] = node["id"]
        sit[i], lie[i] = _SIT.get(node["class_name"], 1), _LIE.get(node["class_name"], 1)
        for state in node["states"]:
            if state.upper() not in STATES:
                raise EgjaxError(
                    f"unknown state {state!r} of node {node['id']}",
                    where=where,
                    remedy="states are " + ", ".join(STATES),
                )
            flags[i] |= np.uint32(1 << (STATE_SHIFT + STATES.index(state.upper())))
    rooms = [i for i, node in enumerate(nodes) if node.get("category") == "Rooms"]
    if len(rooms) > min(sizes.rooms, 32):
        raise EgjaxError(f"{len(rooms)} rooms, more than {min(sizes.rooms, 32)}", where=where)
    room_node = np.full(sizes.rooms, -1, np.int32)
    room_node[: len(rooms)] = sorted(rooms, key=lambda i: ids[i])
    room[room_node[: len(rooms)]] = np.arange(len(rooms))
    by_rank = np.arange(n, dtype=np.int32)
    by_rank[: len(nodes)] = np.argsort(ids[: len(nodes)])
    edges = np.zeros((n, n), np.uint8)
    fixed, between = set(), {}
    for edge in graph["edges"]:
        relation = edge["relation_type"].upper()
        for end in ("from_id", "to_id"):
            if edge[end] not in index:
                raise EgjaxError(f"an edge names the id {edge[end]}, no node has it", where=where)
        a, b = index[edge["from_id"]], index[edge["to_id"]]
        kind = RELATIONS.index(relation)
        if kind >= 4 and not (a == character and kind < 6):
            fixed.add((edge["from_id"], relation, edge["to_id"]))
            if relation == "BETWEEN":
                between.setdefault(a, []).append(b)
        elif kind >= 4:
            flags[b] |= np.uint32(1 << (kind + 4))
        elif character in (a, b):
            if a == character:
                flags[b] |= np.uint32(1 << kind)
            if b == character:
                flags[a] |= np.uint32(1 << (kind + 4))
        else:
            edges[a, b] |= np.uint8(1 << kind)
            edges[b, a] |= np.uint8(1 << (kind + 4))
    parents = np.full((n, sizes.parents), -1, np.int32)
    for i, row in enumerate(edges):
        inside = np.flatnonzero(row & 2)
        if len(inside) > sizes.parents:
            raise EgjaxError(f"node {ids[i]} is INSIDE {len(inside)} nodes", where=where)
        parents[i, : len(inside)] = inside
    # numpy arrays: they are stacked and sent to a device as a batch.
    fields: dict[str, Any] = {
        "edges": pack_bytes(edges),
        "inside": parents,
        "ids": ids,
        "rank": np.argsort(by_rank).astype(np.int32),
        "by_rank": by_rank,
        "props": props,
        "sit_capacity": sit,
        "lie_capacity": lie,
        "room": room,
        "room_node": room_node,
        "character": np.int32(character),
        **_doors(nodes, between, room, ids, sizes, where),
    }
    start: dict[str, Any] = {
        "nodes": flags,
        "added": np.zeros(sizes.added, np.uint32),
        "grabbed": np.full(n, -1, np.int16),
        "overflow": np.bool_(False),
    }
    return Scene(**fields), State(**start), Names(nodes, index, frozenset(fixed))


def pack_bytes(rows: np.ndarray) -> np.ndarray:
    """uint8[..., N] as the words uint32[..., N/4] of `Scene.edges`."""
    parts = np.split(rows.astype(np.uint32), 4, axis=-1)
    return parts[0] | parts[1] << 8 | parts[2] << 16 | parts[3] << 24


def unpack_bytes(words: np.ndarray | jax.Array) -> np.ndarray:
    """The inverse of `pack_bytes`."""
    words = np.asarray(words)
    return np.concatenate([words >> (8 * k) & 255 for k in range(4)], axis=-1).astype(np.uint8)


def added_edges(added: np.ndarray) -> list[tuple[int, int, int]]:
    """The edges of `State.added` as (source, relation, sink), by index."""
    edges = []
    for code in map(int, added[(added & 255) != 0]):
        a, b = code >> 20, code >> 8 & 4095
        edges += [(a, kind, b) for kind in range(4) if code >> kind & 1]
        edges += [(b, kind, a) for kind in range(4) if code >> (4 + kind) & 1]
    return edges


def tie_order(ids: Sequence[int]) -> list[int]:
    """Node ids in the order in which the reference's set yields them (the tie rule)."""
    modulus = _MODULI[sum(len(ids) > limit for limit in TIE_LIMITS)]
    return sorted(ids, key=lambda i: (i % modulus, i))


def _doors(
    nodes: Sequence[Mapping[str, Any]],
    between: Mapping[int, Sequence[int]],
    room: np.ndarray,
    ids: np.ndarray,
    sizes: Sizes,
    where: str,
) -> dict[str, np.ndarray]:
    """The door fields of a scene."""
    classes = [node["class_name"] for node in nodes]
    # The reference lists all doors before all doorjambs.
    listed = [i for kind in ("door", "doorjamb") for i, c in enumerate(classes) if c == kind]
    if len(listed) > sizes.doors:
        raise EgjaxError("more doors than the arrays hold", where=where)
    node = np.full(sizes.doors, -1, np.int32)
    rooms = np.full((sizes.doors, 2), -1, np.int32)
    mask = np.zeros(sizes.doors, np.uint32)
    links = []
    for number, i in enumerate(listed):
        node[number] = i
        by_id = {int(ids[j]): j for j in between.get(i, ())}
        ends = [by_id[k] for k in tie_order(list(by_id))]
        for j in ends:
            if room[j] >= 0:
                mask[number] |= np.uint32(1 << int(room[j]))
        if len(ends) > 1 and room[ends[0]] >= 0 and room[ends[1]] >= 0:
            rooms[number] = room[ends[0]], room[ends[1]]
            links.append((number, int(rooms[number, 0]), int(rooms[number, 1])))
    path, connected = _door_paths(links, sizes.rooms, sizes.doors)
    return {
        "door_node": node,
        "door_rooms": rooms,
        "door_between": mask,
        "door_path": path,
        "connected": connected,
    }


def edge_bits(scene: Scene, state: State) -> np.ndarray:
    """All changeable edges of a state, dense, for comparing and decoding on the host.

    Returns:
        uint8[N, N], bits 0-5 of entry (x, y): x ON, INSIDE, CLOSE, FACING, HOLDS_RH, HOLDS_LH y.
    """
    flags = np.asarray(state.nodes)
    cut = ((flags >> 10) & 15).astype(np.uint8)
    bits = unpack_bytes(scene.edges) & ~cut[:, None] & ~cut[None, :] & 15
    for a, kind, b in added_edges(np.asarray(state.added)):
        bits[a, b] |= 1 << kind
    character = int(scene.character)
    bits[:, character] = (flags >> 4) & 15
    bits[character, :] = (flags & 15) | ((flags >> 8 & 3) << 4)
    return bits


def decode(scene: Scene, state: State, names: Names) -> dict[str, Any]:
    """The graph of a state, as VirtualHome writes it; the inverse of `encode`.

    Nodes keep the order and the further fields (category, bounding box, ...) of the graph that was
    encoded; edges come in the order of node indices.
    """
    flags = np.asarray(state.nodes)
    nodes = []
    for i, node in enumerate(names.nodes):
        states = [s for k, s in enumerate(STATES) if flags[i] >> (STATE_SHIFT + k) & 1]
        nodes.append({**node, "states": states})
    ids = np.asarray(scene.ids)
    bits = edge_bits(scene, state)
    edges = [
        {"from_id": int(ids[a]), "relation_type": RELATIONS[kind], "to_id": int(ids[b])}
        for a, b in np.argwhere(bits)
        for kind in range(6)
        if bits[a, b] >> kind & 1
    ]
    edges += [
        {"from_id": a, "relation_type": relation, "to_id": b}
        for a, relation, b in sorted(names.fixed_edges)
    ]
    return {"nodes": nodes, "edges": edges}
