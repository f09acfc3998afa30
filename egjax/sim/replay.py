"""Replays: scripts through the world, and recorded transitions of the reference compared with it.

An episode of recorded transitions is a line of JSON: `graph`, the name of a graph file, and `steps`
with `action`, `ok` and, if accepted, `states` (new states of each changed node), `added` and
`removed` edges, else the reference's `message`.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from egjax.errors import EgjaxError
from egjax.sim.graph import Names, decode, edge_bits, tie_order
from egjax.sim.rules import Check, reason
from egjax.sim.text import Line, bind, parse_line
from egjax.sim.vocab import RELATIONS, STATE_SHIFT, STATES, VERB_INDEX, Flag
from egjax.sim.world import step
from egjax.types import Scene, State

__all__ = [
    "Disagreement",
    "compare_episode",
    "explain",
    "final_graph",
    "pad_actions",
    "read_episodes",
    "replay",
    "same_graph",
]

Edge = tuple[int, str, int]


@jax.jit
def replay(scene: Scene, state: State, actions: Array) -> tuple[State, Array]:
    """Tries actions one after the other; a refused one changes nothing.

    Args:
        scene, state: one scene and its first state.
        actions: int32[T, 3], verb and node indices of the arguments; verb -1 is skipped.

    Returns:
        The states after each action, leading axis T, and error numbers int32[T] (0 accepted).
    """

    def body(state: State, action: Array) -> tuple[State, tuple[State, Array]]:
        verb = jax.numpy.maximum(action[0], 0)
        after, code = step(scene, state, verb, action[1], action[2])
        after = jax.tree.map(lambda a, b: jax.numpy.where(action[0] >= 0, a, b), after, state)
        return after, (after, jax.numpy.where(action[0] >= 0, code, 0))

    return jax.lax.scan(body, state, actions)[1]


def pad_actions(actions: Sequence[Sequence[int]], length: int) -> np.ndarray:
    """Actions as int32[length, 3]; after the last come rows of -1, which `replay` skips."""
    padded = np.full((length, 3), -1, np.int32)
    if actions:
        padded[: len(actions)] = actions
    return padded


def same_graph(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two graphs have the same nodes with the same states, and the same edges."""

    def key(graph: Mapping[str, Any]) -> tuple[object, object]:
        states = {n["id"]: frozenset(s.upper() for s in n["states"]) for n in graph["nodes"]}
        edges = {(e["from_id"], e["relation_type"].upper(), e["to_id"]) for e in graph["edges"]}
        return states, edges

    return key(first) == key(second)


def read_episodes(path: str | Path) -> Iterator[dict[str, Any]]:
    """Episodes of a `.jsonl` or `.jsonl.gz` file.

    Raises:
        EgjaxError: no such file or a malformed line.
    """
    opener = gzip.open if str(path).endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    episode = json.loads(line)
                    _ = episode["graph"], episode["steps"]
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    raise EgjaxError(f"not an episode: {error}", where=f"{path}:{number}") from None
                yield episode
    except OSError as error:
        raise EgjaxError("cannot read episodes", where=str(path), remedy=str(error)) from None


def explain(scene: Scene, state: State, names: Names, action: Sequence[int], code: int) -> str:
    """The reference's message for a refused action.

    Args:
        scene, state, names: where the action was refused.
        action: verb and node indices.
        code: error number of `egjax.sim.world.step`, not 0.
    """
    verb, obj, target = (int(x) for x in action)
    if VERB_INDEX["PUTOBJBACK"] == verb and int(np.asarray(state.grabbed)[obj]) >= 0:
        target = int(np.asarray(state.grabbed)[obj]) >> 2
    text = reason(verb, code)
    label = names.label
    values = {
        "c": label(int(scene.character)),
        "o": label(obj) if obj >= 0 else "",
        "b": label(target) if target >= 0 else "",
    }
    if "{r}" in text:
        here, there = _room(scene, state, int(scene.character)), _room(scene, state, obj)
        values |= {"r": label(here), "s": label(there)}
        if code - 1 == Check.DOORS_OPEN:
            values["doors"] = ", ".join(label(d) for d in _closed_doors(scene, state, here, there))
    return text.format(**values)


def _room(scene: Scene, state: State, node: int) -> int:
    """Room of a node; of several the first by the tie rule. Host twin of the device's rule."""
    room = np.asarray(scene.room)
    if room[node] >= 0:
        return node
    inside = np.flatnonzero(edge_bits(scene, state)[node] & 2)
    ids = np.asarray(scene.ids)
    by_id = {int(ids[i]): int(i) for i in inside}
    rooms = [by_id[i] for i in tie_order(list(by_id)) if room[by_id[i]] >= 0]
    return rooms[0] if rooms else node


def _closed_doors(scene: Scene, state: State, here: int, there: int) -> list[int]:
    """Closed doors between two rooms, the farthest first, as the reference lists them."""
    number = np.asarray(scene.room)
    path = np.asarray(scene.door_path)[number[here], number[there]]
    doors = np.asarray(scene.door_node)[path[path >= 0]]
    flags = np.asarray(state.nodes)
    return [int(d) for d in doors[::-1] if flags[d] & Flag.CLOSED.value]


@dataclass(frozen=True)
class Disagreement:
    """A step at which the world and the reference differ."""

    step: int
    action: str
    ours: str
    reference: str

    def __str__(self) -> str:
        return f"step {self.step} {self.action}: ours {self.ours}; reference {self.reference}"


def compare_episode(
    episode: Mapping[str, Any], scene: Scene, state: State, names: Names
) -> Iterator[tuple[str, bool, Disagreement | None]]:
    """Runs an episode freely from its graph and compares every step.

    Yields:
        Verb, whether the reference accepted the step, and how the world differs (None: it agrees).
    """
    lines = [parse_line(s["action"], where=episode["graph"]) for s in episode["steps"]]
    actions = [bind(scene, state, names, line, where=episode["graph"]) for line in lines]
    length = -(-max(len(actions), 1) // 64) * 64  # few lengths, few compilations
    states, codes = jax.device_get(replay(scene, state, pad_actions(actions, length)))
    before, bits = state, edge_bits(scene, state)
    for i, (record, line) in enumerate(zip(episode["steps"], lines, strict=True)):
        after = jax.tree.map(lambda leaf, i=i: leaf[i], states)
        if codes[i]:
            ours = explain(scene, before, names, actions[i], int(codes[i]))
        else:
            new_bits = edge_bits(scene, after)
            ours = _changes(scene, before, after, bits, new_bits)
            before, bits = after, new_bits
        theirs = _recorded(record) if record["ok"] else record["message"]
        differs = None
        if ours != theirs or bool(codes[i] == 0) != record["ok"] or bool(after.overflow):
            differs = Disagreement(i, str(line), str(ours), str(theirs))
        yield line.verb, record["ok"], differs


def _changes(
    scene: Scene, before: State, after: State, old: np.ndarray, new: np.ndarray
) -> tuple[object, object, object]:
    """States of changed nodes, added and removed edges, with graph ids."""
    ids = np.asarray(scene.ids)
    difference = old ^ new
    edges: tuple[set[Edge], set[Edge]] = (set(), set())
    for a, b in np.argwhere(difference):
        for kind in range(6):
            if difference[a, b] >> kind & 1:
                gone = not new[a, b] >> kind & 1
                edges[gone].add((int(ids[a]), RELATIONS[kind], int(ids[b])))
    states = {}
    for i in np.flatnonzero(before.nodes >> STATE_SHIFT != after.nodes >> STATE_SHIFT):
        flags = int(after.nodes[i]) >> STATE_SHIFT
        states[int(ids[i])] = sorted(s for k, s in enumerate(STATES) if flags >> k & 1)
    return states, edges[0], edges[1]


def _recorded(record: Mapping[str, Any]) -> tuple[object, object, object]:
    states = {int(i): sorted(names) for i, names in record["states"].items()}
    added, removed = ({tuple(edge) for edge in record[key]} for key in ("added", "removed"))
    return states, added, removed


def final_graph(
    scene: Scene, state: State, names: Names, script: Sequence[Line], *, where: str = "script"
) -> tuple[dict[str, Any], int | None]:
    """Runs a script with ids.

    Returns:
        The graph after it, and the number of the first refused step (None: all were accepted).
    """
    actions = [bind(scene, state, names, line, where=where) for line in script]
    length = -(-max(len(actions), 1) // 64) * 64
    states, codes = jax.device_get(replay(scene, state, pad_actions(actions, length)))
    refused = np.flatnonzero(codes)
    last = jax.tree.map(lambda leaf: leaf[-1], states)
    return decode(scene, last, names), int(refused[0]) if len(refused) else None
