"""Plans as text: RobotHow scripts and English, both ways, and how a name finds its object.

A script line is `[GRAB] <cup> (12)`, English is "Walk to kitchen. Grab cup." English names classes,
not objects; `ground` binds each name in the state in which its step is tried.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from egjax.errors import EgjaxError
from egjax.sim.graph import Names, added_edges, unpack_bytes
from egjax.sim.vocab import VERB_INDEX, VERBS, Flag
from egjax.types import Scene, State

__all__ = [
    "Line",
    "bind",
    "parse_english",
    "parse_line",
    "parse_script",
    "resolve_name",
    "sentences",
    "to_english",
    "to_script",
]

_HEAD = re.compile(r"^\[(\w+)\]")
_ARGUMENT = re.compile(r"<([^<>]+)>(?:\s*\((?:\d+\.)?(\d+)\))?")
_NAMED = re.compile(r"^(.+?)\s*\((?:\d+\.)?(\d+)\)$")
_MODEL_ONLY = {"LOOKAT_MEDIUM": "LOOKAT"}


@dataclass(frozen=True)
class Line:
    """One step: verb name and its arguments as (class name, graph id or None)."""

    verb: str
    arguments: tuple[tuple[str, int | None], ...] = ()

    def __str__(self) -> str:
        parts = [f"[{self.verb}]"]
        parts += [f"<{name}>" + ("" if i is None else f" ({i})") for name, i in self.arguments]
        return " ".join(parts)


def _checked(verb: str, arguments: Sequence[tuple[str, int | None]], where: str) -> Line:
    verb = _MODEL_ONLY.get(verb, verb)
    if verb not in VERB_INDEX:
        raise EgjaxError(
            f"unknown verb {verb!r}", where=where, remedy="verbs are " + ", ".join(VERB_INDEX)
        )
    arity = VERBS[VERB_INDEX[verb]].arity
    if len(arguments) != arity:
        raise EgjaxError(f"{verb} takes {arity} objects, not {len(arguments)}", where=where)
    return Line(verb, tuple(arguments))


def parse_line(text: str, *, where: str = "script", bare: bool = False) -> Line:
    """Reads `[VERB] <class> (id) <class> (id)`; ids may be written `1.12` as RobotHow does.

    Args:
        text: the line.
        where: what to call it in an error.
        bare: take `<class>` without an id, too, which `bind` resolves as it does English names.

    Raises:
        EgjaxError: unknown verb, wrong number of objects, one without its id, or not a script line.
    """
    head = _HEAD.match(text.strip())
    if not head:
        raise EgjaxError(
            f"not a script line: {text.strip()!r}", where=where, remedy="[VERB] <object> (id)"
        )
    arguments = [
        ("_".join(name.lower().split()), int(i) if i else None)
        for name, i in _ARGUMENT.findall(text)
    ]
    line = _checked(head.group(1).upper(), arguments, where)
    nameless = next((name for name, i in arguments if i is None), None)
    if nameless is not None and not bare:
        raise EgjaxError(f"<{nameless}> has no id", where=where, remedy=f"<{nameless}> (12)")
    return line


def parse_script(text: str, *, where: str = "script") -> list[Line]:
    """Reads the `[` lines of a RobotHow program; title and description before them are skipped.

    Raises:
        EgjaxError: with the line number of the first bad line.
    """
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if line.startswith("[") or (lines and line):  # no step is lost without a word
            lines.append(parse_line(line, where=f"{where}:{number}"))
    return lines


def to_script(lines: Iterable[Line]) -> str:
    """Script text, one line a step."""
    return "\n".join(str(line) for line in lines)


def to_english(lines: Iterable[Line]) -> str:
    """English of a plan: "Walk to home office. Sit on chair."."""
    sentences = []
    for line in lines:
        words = [name.replace("_", " ") for name, _ in line.arguments]
        sentences.append(VERBS[VERB_INDEX[line.verb]].english.format(*words) + ".")
    return " ".join(sentences)


def _pattern(english: str) -> re.Pattern[str]:
    parts = re.split(r"\{\d\}", english)
    return re.compile("(.+?)".join(re.escape(part) for part in parts) + "$", re.IGNORECASE)


# Longer fixed parts first, so that "Put back cup" is not "Put ... on" and "Walk to" not "Walk".
_ENGLISH = sorted(
    ((_pattern(verb.english), verb.name) for verb in VERBS),
    key=lambda pair: -len(pair[0].pattern),
)
_SYNONYMS = (
    (re.compile(r"^turn on (.+)$", re.I), "SWITCHON"),
    (re.compile(r"^turn off (.+)$", re.I), "SWITCHOFF"),
    (re.compile(r"^(?:pick up|take) (?!off)(.+)$", re.I), "GRAB"),
    (re.compile(r"^(?:put|pour) (.+?) into (.+)$", re.I), "PUTIN"),
    (re.compile(r"^put down (.+)$", re.I), "DROP"),
)


def _sentence(text: str, where: str) -> Line:
    for pattern, verb in (*_ENGLISH, *_SYNONYMS):
        match = pattern.match(text)
        if match:
            return _checked(verb, [_noun(name) for name in match.groups()], where)
    raise EgjaxError(f"not a step: {text!r}", where=where, remedy="e.g. 'Walk to kitchen.'")


def _noun(text: str) -> tuple[str, int | None]:
    """An object as English names it: "the cup", or "cup (12)" for this very one."""
    named = _NAMED.match(text.strip())
    name, i = named.groups() if named else (text, None)
    return "_".join(name.lower().split()).removeprefix("the_"), int(i) if i else None


def parse_english(text: str, *, where: str = "plan") -> list[Line]:
    """Reads "Walk to kitchen. Grab coffee." into steps whose objects are named by class.

    "Grab coffee (12)." means this very one.

    Raises:
        EgjaxError: with the number of the first sentence that is no step.
    """
    return [_sentence(s, f"{where}, step {i}") for i, s in enumerate(sentences(text), start=1)]


def sentences(text: str) -> list[str]:
    """Sentences of an English plan, each in single spaces and without its point."""
    # The point of RobotHow's ids, (1.12), ends none.
    parts = (" ".join(part.split()) for part in re.split(r"\.(?!\d+\))|\n", text))
    return [part for part in parts if part]


def resolve_name(scene: Scene, state: State, names: Names, name: str) -> int:
    """The object that a class name means in a state.

    The held one, else one CLOSE to the character, else one in the character's room, else any; of
    several the lowest id.

    Returns:
        Node index, -1 where the scene has no object of that class.
    """
    flags = np.asarray(state.nodes)
    rooms = flags & Flag.INSIDE_OUT.value != 0
    edges = unpack_bytes(scene.edges)
    best, best_rank = -1, (4, 0)
    for node, entry in enumerate(names.nodes):
        if entry["class_name"] != name:
            continue
        if flags[node] & (Flag.HOLDS_RH | Flag.HOLDS_LH).value:
            place = 0
        elif flags[node] & Flag.CLOSE_OUT.value:
            place = 1
        elif _inside_any(edges[node], flags, state, node, rooms):
            place = 2
        else:
            place = 3
        rank = (place, entry["id"])
        if rank < best_rank:
            best, best_rank = node, rank
    return best


def _inside_any(
    row: np.ndarray, flags: np.ndarray, state: State, node: int, rooms: np.ndarray
) -> bool:
    """Whether a node is INSIDE one of the nodes that the character is in."""
    cut = Flag.CUT_INSIDE.value
    if not flags[node] & cut and bool(((row & 2 != 0) & rooms & (flags & cut == 0)).any()):
        return True
    added = added_edges(np.asarray(state.added))
    return any(rooms[b] for a, relation, b in added if (a, relation) == (node, 1))


def bind(
    scene: Scene, state: State, names: Names, line: Line, *, where: str = "plan"
) -> tuple[int, int, int]:
    """Numbers of a step in a state: verb, and node indices of its arguments (-1 for none).

    An id selects its node (its class name is checked); a bare name is resolved in the state, and
    one that the scene lacks gives -1, which the simulator refuses.

    Raises:
        EgjaxError: an id that the graph lacks, or one of another class.
    """
    nodes = []
    for name, i in line.arguments:
        if i is None:
            nodes.append(resolve_name(scene, state, names, name))
        elif i not in names.index:
            raise EgjaxError(f"the graph has no object {i} (<{name}>)", where=where)
        else:
            node = names.index[i]
            if names.class_name(node) != name:
                raise EgjaxError(
                    f"object {i} is a {names.class_name(node)}, not a {name}", where=where
                )
            nodes.append(node)
    nodes += [-1] * (2 - len(nodes))
    return VERB_INDEX[line.verb], nodes[0], nodes[1]
