"""A simulated episode as facts on the host: what was done, and what became true and false by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from egjax.sim.graph import Names, added_edges, unpack_bytes
from egjax.sim.text import Line, to_english
from egjax.sim.vocab import STATE_SHIFT, STATES, Flag
from egjax.types import Scene, State

__all__ = ["Episode", "Fact", "Recorder", "Step", "graph_facts"]

_HELD = ("HOLDS_RH", "HOLDS_LH")
_RELATIONS = ("ON", "INSIDE")


class Fact(NamedTuple):
    """A fact by graph ids: a relation, or a state where `other` is absent.

    CLOSE is left out (it changes with every step and nothing asks for it), and FACING is kept
    only for the character.
    """

    relation: str
    subject: int
    other: int | None = None


@dataclass(frozen=True)
class Step:
    """An accepted action and the facts that it brought and ended."""

    line: Line
    added: frozenset[Fact]
    removed: frozenset[Fact]


@dataclass(frozen=True)
class Episode:
    """What happened in a household from its start on.

    Attributes:
        classes: class name of each graph id.
        rooms: ids of the rooms.
        character: id of the character.
        start: the facts at the start.
        steps: accepted actions in order.
    """

    classes: Mapping[int, str]
    rooms: frozenset[int]
    character: int
    start: frozenset[Fact]
    steps: tuple[Step, ...]

    def states(self, about: Callable[[Fact], bool] | None = None) -> Iterator[set[Fact]]:
        """The facts at the start and after each step: always the same set, changed in place.

        Args:
            about: which facts are wanted; all where absent (a thousand: say what you look for).
        """
        facts = set(filter(about, self.start)) if about else set(self.start)
        yield facts
        for step in self.steps:
            facts -= step.removed
            facts.update(filter(about, step.added) if about else step.added)
            yield facts

    def after(self, count: int) -> frozenset[Fact]:
        """The facts after the first `count` steps."""
        facts = set(self.start)
        for step in self.steps[:count]:
            facts -= step.removed
            facts |= step.added
        return frozenset(facts)

    def part(self, first: int, last: int) -> Episode:
        """The episode of the steps `first` to `last` (exclusive)."""
        return Episode(
            self.classes,
            self.rooms,
            self.character,
            self.after(first),
            self.steps[first:last],
        )

    def english(self) -> str:
        """The steps as a plan: `Walk to kitchen. Grab cup.`"""
        return to_english(step.line for step in self.steps)

    def name(self, node: int) -> str:
        """A node's class name as it is spoken."""
        return self.classes[node].replace("_", " ")

    def graph(self) -> dict[str, Any]:
        """The start as a graph with the known facts only, for `egjax.experience.prompts`."""
        states: dict[int, list[str]] = {}
        edges = []
        for relation, subject, other in sorted(self.start, key=lambda f: (f[0], f[1], f[2] or -1)):
            if other is None:
                states.setdefault(subject, []).append(relation)
            else:
                edges.append({"from_id": subject, "relation_type": relation, "to_id": other})
        nodes = [
            {
                "id": node,
                "class_name": name,
                "category": "Rooms" if node in self.rooms else "",
                "states": states.get(node, []),
            }
            for node, name in self.classes.items()
        ]
        return {"nodes": nodes, "edges": edges}


def graph_facts(graph: Mapping[str, Any], character: int) -> frozenset[Fact]:
    """The facts of a graph, `nodes` and `edges` as VirtualHome writes them."""
    facts = {Fact(s.upper(), n["id"]) for n in graph["nodes"] for s in n["states"]}
    for edge in graph["edges"]:
        relation, subject = edge["relation_type"].upper(), edge["from_id"]
        if relation in _RELATIONS + _HELD or (relation == "FACING" and subject == character):
            facts.add(Fact(relation, subject, edge["to_id"]))
    return frozenset(facts)


_OUT = {
    Flag.ON_OUT: "ON",
    Flag.INSIDE_OUT: "INSIDE",
    Flag.FACING_OUT: "FACING",
    Flag.HOLDS_RH: "HOLDS_RH",
    Flag.HOLDS_LH: "HOLDS_LH",
}
_IN = {Flag.ON_IN: "ON", Flag.INSIDE_IN: "INSIDE"}
_STATES = {1 << (STATE_SHIFT + k): state for k, state in enumerate(STATES)}
_CUTS = ((int(Flag.CUT_ON), 0), (int(Flag.CUT_INSIDE), 1))
# Plain integers: enum arithmetic is slow, and this runs for every changed node of every step.
_TABLES = tuple({int(k): v for k, v in table.items()} for table in (_STATES, _OUT, _IN))
_WATCHED = np.uint32(sum(sum(t) for t in _TABLES) + sum(cut for cut, _ in _CUTS))


class Recorder:
    """Turns simulated states of one scene into episodes.

    Args:
        scene, state, names: of `egjax.sim.graph.encode`; the state in which episodes start.
    """

    def __init__(self, scene: Scene, state: State, names: Names):
        self.names = names
        self._ids = [node["id"] for node in names.nodes]
        self._character = int(scene.character)
        self._classes = {node["id"]: node["class_name"] for node in names.nodes}
        self._rooms = frozenset(n["id"] for n in names.nodes if n.get("category") == "Rooms")
        edges = unpack_bytes(scene.edges)
        # Initial edges at each node from both ends, as (relation, from, to) by index.
        self._initial: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        for a, b in np.argwhere(edges & 3):
            for relation in (0, 1):
                if edges[a, b] >> relation & 1:
                    edge = (relation, int(a), int(b))
                    self._initial.setdefault((relation, int(a)), []).append(edge)
                    self._initial.setdefault((relation, int(b)), []).append(edge)
        self._start = frozenset(self._all(np.asarray(state.nodes), np.asarray(state.added)))

    def _edge(self, edge: tuple[int, int, int]) -> Fact:
        relation, a, b = edge
        return Fact(_RELATIONS[relation], self._ids[a], self._ids[b])

    def _own(self, node: int, word: int) -> Iterator[Fact]:
        """Facts that a node's flags hold: its states, and relations with the character."""
        me, it = self._ids[self._character], self._ids[node]
        states, outgoing, incoming = _TABLES
        yield from (Fact(state, it) for bit, state in states.items() if word & bit)
        yield from (Fact(relation, me, it) for bit, relation in outgoing.items() if word & bit)
        yield from (Fact(relation, it, me) for bit, relation in incoming.items() if word & bit)

    def _live(self, edge: tuple[int, int, int], flags: np.ndarray) -> bool:
        relation, a, b = edge
        return not (int(flags[a]) | int(flags[b])) & _CUTS[relation][0]

    def _overlay(self, added: np.ndarray) -> set[tuple[int, int, int]]:
        return {(relation, a, b) for a, relation, b in added_edges(added) if relation < 2}

    def _all(self, flags: np.ndarray, added: np.ndarray) -> Iterator[Fact]:
        for node in range(len(self._ids)):
            yield from self._own(node, int(flags[node]))
        edges = {e for found in self._initial.values() for e in found if self._live(e, flags)}
        yield from (self._edge(e) for e in edges | self._overlay(added))

    def episode(
        self,
        lines: Sequence[Line],
        flags: np.ndarray,
        added: np.ndarray,
        start: frozenset[Fact] | None = None,
    ) -> Episode:
        """An episode from the states before and after each of its T actions.

        Args:
            lines: the T accepted actions.
            flags: uint32[T+1, N], `State.nodes` at the start and after each action.
            added: uint32[T+1, X], `State.added` likewise.
            start: the facts at the start, where that is not the recorder's own.
        """
        changed = (flags[1:] ^ flags[:-1]) & _WATCHED
        overlay = self._overlay(added[0])
        steps = []
        for t, line in enumerate(lines):
            before, after = flags[t], flags[t + 1]
            new, gone = set[Fact](), set[Fact]()
            edges = set(overlay)
            for node in map(int, np.flatnonzero(changed[t])):
                new |= set(self._own(node, int(after[node])))
                gone |= set(self._own(node, int(before[node])))
                for cut, relation in _CUTS:
                    if int(changed[t, node]) & cut:
                        edges |= set(self._initial.get((relation, node), ()))
            following = overlay
            if not np.array_equal(added[t], added[t + 1]):
                following = self._overlay(added[t + 1])
                edges |= following
            initial = {e for e in edges if e in self._initial.get(e[:2], ())}
            had = overlay | {e for e in initial if self._live(e, before)}
            has = following | {e for e in initial if self._live(e, after)}
            new |= {self._edge(e) for e in has - had}
            gone |= {self._edge(e) for e in had - has}
            overlay = following
            steps.append(Step(line, frozenset(new - gone), frozenset(gone - new)))
        me = self._ids[self._character]
        start = self._start if start is None else start
        return Episode(self._classes, self._rooms, me, start, tuple(steps))
