"""Grounded actions that can matter for a goal, by backward relevance. Host code.

A house has some 263,000 grounded actions; a search needs the few that serve its goal. Starting from
the goal's predicates, `action_table` takes for each the verbs whose effect it is, then the verbs
that bring about their preconditions, and so on until nothing new comes:

    near o          WALK, FIND; the container of an o without a room; every closed door opened
    reachable o     OPEN the closed things that o is INSIDE
    o held          GRAB (near, reachable); DROP gives the hand back; for the left hand alone also
                    GRAB something for the right one
    seat free       GRAB what lies on a seat that is full
    x open, on, ..  OPEN, CLOSE, SWITCHON, SWITCHOFF, PLUGIN, PLUGOUT, WASH and what they ask for
    upright         STANDUP, where the plan may have sat or lain down
    near a and b    where no a lies next to a b: GRAB what can be carried to the other, else WALK
                    and FIND the things on the shortest way from one to the next

What a goal wants performed counts with what the verb asks for: DRINK of what is held, TYPE near,
and so on. Of verbs with the same effect (WASH, RINSE, SCRUB, WIPE; WALK, RUN; DROP, RELEASE) the
first serves.
The goal names classes. All instances of a class are taken where they are few, else those that most
other classes of the goal lie next to, then those in the character's or the goal's rooms, then those
of lowest id; where the goal says which are meant, these. A human's program is never looked at, so
neither is which cup it used, unless its objects are given as `among`.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from egjax.errors import EgjaxError
from egjax.sim.graph import SQUEEZABLE
from egjax.sim.vocab import VERB_INDEX
from egjax.types import ActionTable

__all__ = ["GoalDeed", "GoalFact", "Grounded", "action_table", "encode_actions", "table_sizes"]


class GoalFact(Protocol):
    """A goal predicate by class names or `class (id)`, as `egjax.sim.goals.Predicate`."""

    @property
    def relation(self) -> str:
        """Relation or object state."""
        ...

    @property
    def subject(self) -> str:
        """Class of the subject."""
        ...

    @property
    def other(self) -> str | None:
        """Class of a relation's far end; None for a state."""
        ...


class GoalDeed(Protocol):
    """An action that must have been performed, as `egjax.sim.goals.Deed`."""

    @property
    def verbs(self) -> tuple[str, ...]:
        """Verbs of which one is wanted."""
        ...

    @property
    def objects(self) -> tuple[int, ...] | None:
        """Graph ids of which one is its first argument; None for any."""
        ...


class Grounded(NamedTuple):
    """A verb with graph ids; None where it takes no such argument."""

    verb: str
    obj: int | None = None
    target: int | None = None


_CHARACTER = "character"
_OPENABLE = {"desk", "window"}
_GRABBABLE = {"water", "child"}
_VESSELS = {"hands_both", "sponge", "face"}
_SEATS = {"couch": 4, "bed": 4, "sofa": 4, "loveseat": 2, "pianobench": 2, "bench": 2}
_BEDS = {"couch": 2, "bathtub": 2, "loveseat": 2, "sofa": 2, "bed": 3}


class _Home:
    """A graph with the questions that relevance asks of it."""

    def __init__(
        self,
        graph: Mapping[str, Any],
        classes: set[str],
        meant: Mapping[str, Sequence[int]],
        told: Sequence[int] | None,
        among: Collection[int],
    ):
        self.meant = meant
        self.among = set(among)
        self.nodes = {node["id"]: node for node in graph["nodes"]}
        self.allowed = sorted(self.nodes if told is None else self.nodes.keys() & set(told))
        self.by_class: dict[str, list[int]] = defaultdict(list)
        for number in sorted(self.nodes):
            name = self.nodes[number]["class_name"]
            self.by_class[name].append(number)
            self.by_class[f"{name} ({number})"].append(number)  # a goal may mean this very one
        self.inside: dict[int, list[int]] = defaultdict(list)
        self.on_top: dict[int, list[int]] = defaultdict(list)
        self.beside: dict[int, set[int]] = defaultdict(set)
        for edge in graph["edges"]:
            a, relation, b = edge["from_id"], edge["relation_type"].upper(), edge["to_id"]
            if relation == "INSIDE":
                self.inside[a].append(b)
            if relation == "ON":
                self.on_top[b].append(a)
            if relation in ("ON", "CLOSE"):
                self.beside[a].add(b)
                self.beside[b].add(a)
        self.rooms = {i for i, node in self.nodes.items() if node.get("category") == "Rooms"}
        self.wanted = {name.partition(" (")[0] for name in classes} - {_CHARACTER}

    def is_(self, number: int, *states: str) -> bool:
        """Whether a node has one of the states."""
        return any(state.upper() in states for state in self.nodes[number]["states"])

    def has(self, number: int, trait: str, classes: Iterable[str] = ()) -> bool:
        """Whether a node has a property or is of a class that counts as having it."""
        node = self.nodes[number]
        traits = map(str.upper, node.get("properties", ()))
        return trait in traits or node["class_name"] in classes

    def instances(self, name: str, limit: int) -> list[int]:
        """Nodes of a class, the most promising first; those that are meant where the goal says."""
        if name in self.meant:
            return list(self.meant[name])
        homely = set(self.inside[self.by_class[_CHARACTER][0]])
        homely |= {i for i in self.rooms if self.nodes[i]["class_name"] in self.wanted}

        def order(number: int) -> tuple[int, int, int]:
            around = {self.nodes[i]["class_name"] for i in self.beside[number]}
            away = not homely & set(self.inside[number])
            return -len(around & self.wanted), int(away), number

        told = [i for i in self.by_class[name] if i in self.among]
        return sorted(told or self.by_class[name], key=order)[:limit]


def _near(home: _Home, o: int):
    yield Grounded("WALK", o)
    yield Grounded("FIND", o)
    if o not in home.rooms and not home.rooms & set(home.inside[o]):
        yield from (("near", holder) for holder in home.inside[o])
    for number, node in home.nodes.items():
        if node["class_name"] in ("door", "doorjamb") and home.is_(number, "CLOSED"):
            yield "open", number


def _held(home: _Home, o: int):
    if home.has(o, "GRABBABLE", _GRABBABLE):
        yield Grounded("GRAB", o)
        yield Grounded("DROP", o)
        yield "near", o
        for holder in home.inside[o]:
            if holder not in home.rooms and home.is_(holder, "CLOSED"):
                yield "open", holder


def _open(home: _Home, x: int):
    if home.has(x, "CAN_OPEN", _OPENABLE):
        yield Grounded("OPEN", x)
        yield "near", x
        if home.is_(x, "ON"):
            yield "off", x


def _closed(home: _Home, x: int):
    if home.has(x, "CAN_OPEN", _OPENABLE):
        yield Grounded("CLOSE", x)
        yield from _open(home, x)


def _on(home: _Home, x: int):
    if home.has(x, "HAS_SWITCH"):
        yield Grounded("SWITCHON", x)
        yield "near", x
        if home.is_(x, "PLUGGED_OUT"):
            yield "plugged in", x
        if home.is_(x, "ON"):
            yield Grounded("SWITCHOFF", x)


def _off(home: _Home, x: int):
    if home.has(x, "HAS_SWITCH"):
        yield Grounded("SWITCHOFF", x)
        yield "near", x
        if home.is_(x, "OFF"):
            yield "on", x


def _plugged(home: _Home, x: int):
    if home.has(x, "HAS_PLUG"):
        yield Grounded("PLUGIN", x)
        yield "near", x
        if home.is_(x, "PLUGGED_IN"):
            yield Grounded("PLUGOUT", x)


def _unplugged(home: _Home, x: int):
    if home.has(x, "HAS_PLUG"):
        yield Grounded("PLUGOUT", x)
        yield "near", x
        if home.is_(x, "PLUGGED_OUT"):
            yield Grounded("PLUGIN", x)


def _clean(home: _Home, x: int):
    del home
    yield Grounded("WASH", x)
    yield "near", x


def _seat(home: _Home, x: int, verb: str, trait: str, room_for: Mapping[str, int]):
    if home.has(x, trait):
        yield Grounded(verb, x)
        yield Grounded("STANDUP")
        yield "near", x
        if len(home.on_top[x]) >= room_for.get(home.nodes[x]["class_name"], 1):
            yield from (("held", thing) for thing in home.on_top[x])


def _sit(home: _Home, x: int):
    yield from _seat(home, x, "SIT", "SITTABLE", _SEATS)


def _lie(home: _Home, x: int):
    yield from _seat(home, x, "LIE", "LIEABLE", _BEDS)


def _faced(home: _Home, x: int):
    del home
    yield Grounded("TURNTO", x)


def _worn(home: _Home, o: int):
    if home.has(o, "CLOTHES"):
        yield Grounded("PUTON", o)
        yield "held", o


def _uncovered(home: _Home, o: int):
    for holder in home.inside[o]:
        if holder not in home.rooms and home.is_(holder, "CLOSED"):
            yield "open", holder


def _something_held(home: _Home, x: int):
    tools = [i for i in home.allowed if home.has(i, "GRABBABLE", _GRABBABLE)]
    yield from (("held", i) for i in tools if home.beside[i] & {x, *home.beside[x]})


def _knife_held(home: _Home, x: int):
    del x
    knives = [i for i in home.allowed if "knife" in home.nodes[i]["class_name"]]
    yield from (("held", i) for i in knives)


# How each condition on a node comes about: actions, and the conditions that they ask for.
_ACHIEVERS = {
    "near": _near, "held": _held, "open": _open, "closed": _closed, "on": _on, "off": _off,
    "plugged in": _plugged, "plugged out": _unplugged, "clean": _clean, "sat on": _sit,
    "lain on": _lie, "faced": _faced, "worn": _worn, "uncovered": _uncovered,
    "something held": _something_held, "knife held": _knife_held,
}  # fmt: skip
_STATES = {
    "OPEN": "open", "CLOSED": "closed", "ON": "on", "OFF": "off", "PLUGGED_IN": "plugged in",
    "PLUGGED_OUT": "plugged out", "CLEAN": "clean",
}  # fmt: skip
_POSES = {"SITTING": ("sat on", "SITTABLE"), "LYING": ("lain on", "LIEABLE")}


def _onto(home: _Home, a: int, b: int):
    if home.has(a, "GRABBABLE", _GRABBABLE):
        yield Grounded("PUTBACK", a, b)
        yield "held", a
        yield "near", b


def _into(home: _Home, a: int, b: int):
    if b in home.rooms:
        yield "held", a
        yield "near", b
        return
    if home.has(a, "GRABBABLE", _GRABBABLE):
        yield Grounded("PUTIN", a, b)
        yield "held", a
        yield "near", b
        if home.has(b, "CAN_OPEN") and not home.is_(b, "OPEN"):
            yield "open", b
        pourable = home.has(a, "POURABLE") or home.has(a, "DRINKABLE")
        if pourable and home.has(b, "RECIPIENT", _VESSELS):
            yield Grounded("POUR", a, b)


def _state_fact(home: _Home, fact: GoalFact, facts: Sequence[GoalFact], limit: int):
    """Conditions that make an object state true."""
    if fact.relation in _POSES:
        condition, trait = _POSES[fact.relation]
        # ON(character, seat) is a goal as a rule and says which class of seat is meant.
        if not any(f.relation == "ON" and f.subject == _CHARACTER for f in facts):
            seats = [i for i in home.allowed if home.has(i, trait)]
            yield from ((condition, seat) for seat in seats[:limit])
    elif fact.relation in _STATES:
        for number in home.instances(fact.subject, limit):
            yield _STATES[fact.relation], number


def _own_fact(home: _Home, fact: GoalFact, facts: Sequence[GoalFact], limit: int):
    """Conditions that make a relation from the character to something true."""
    poses = [f.relation for f in facts if f.relation in _POSES] or list(_POSES)
    for number in home.instances(fact.other or "", limit):
        if fact.relation in ("CLOSE", "INSIDE"):
            yield "near", number
        elif fact.relation == "FACING":
            yield "faced", number
        elif fact.relation == "ON":
            yield from ((_POSES[pose][0], number) for pose in poses)
        else:
            yield "held", number
            # A hand is free, the right one first: what is to come into the left one comes second.
            if fact.relation == "HOLDS_LH" and not any(f.relation == "HOLDS_RH" for f in facts):
                others = [i for i in home.allowed if home.has(i, "GRABBABLE", _GRABBABLE)]
                near = home.beside[number]
                others.sort(key=lambda i: i not in near)
                yield from (("held", i) for i in others[:limit] if i != number)


def _object_fact(home: _Home, fact: GoalFact, facts: Sequence[GoalFact], limit: int):
    """Conditions that make a relation between two objects true."""
    put = [{f.subject, f.other} for f in facts if f.relation in ("ON", "INSIDE")]
    pairs = itertools.product(
        home.instances(fact.subject, limit), home.instances(fact.other or "", limit)
    )
    for a, b in pairs:
        if fact.other == _CHARACTER:
            yield "worn", a
        elif fact.relation == "ON":
            yield from _onto(home, a, b)
        elif fact.relation == "INSIDE":
            yield from _into(home, a, b)
        elif {fact.subject, fact.other} not in put:  # putting one on the other brings CLOSE as well
            yield from _onto(home, a, b)
            yield from _onto(home, b, a)


def _stones(home: _Home, starts: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Nodes between two sets on the shortest chain of neighbours, lowest ids first."""
    before: dict[int, int | None] = {start: None for start in starts}
    row = list(starts)
    while row:
        following = []
        for here in row:
            for there in sorted(home.beside[here] - before.keys() - home.rooms):
                before[there] = here
                following.append(there)
                if there in ends:
                    chain, step = [], before[there]
                    while step is not None:
                        chain.append(step)
                        step = before[step]
                    return chain[:-1]
        row = following
    return []


def _together(home: _Home, facts: Sequence[GoalFact], limit: int):
    """Conditions that let the character be near everything at once that the goal wants near."""
    places = sorted(
        {
            (f.other, f.relation)
            for f in facts
            if f.subject == _CHARACTER and f.relation in ("CLOSE", "INSIDE")
            if f.other not in (None, _CHARACTER)
        }
    )
    places.sort(key=lambda place: place[1])  # a room to be INSIDE comes second
    for (one, _), (two, relation) in itertools.combinations(places, 2):
        pair = home.instances(one or "", limit), home.instances(two or "", limit)
        if any(
            a == b or b in home.beside[a] or (relation == "INSIDE" and b in home.inside[a])
            for a, b in itertools.product(*pair)
        ):
            continue
        movable = [i for i in pair[0] + pair[1] if home.has(i, "GRABBABLE", _GRABBABLE)]
        yield from (("held", number) for number in movable)
        if not movable and not home.rooms & {*pair[0], *pair[1]}:
            yield from (("near", number) for number in _stones(home, *pair))


# A wanted action: the properties of which its object needs one, the classes that count as having
# it, and the conditions that it asks for. Verbs without object or with two have rules of their own.
_PERFORMERS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "WALK": ((), (), ("near",)),
    "RUN": ((), (), ("near",)),
    "FIND": ((), (), ("near",)),
    "TURNTO": ((), (), ("faced",)),
    "LOOKAT": ((), (), ("faced",)),
    "POINTAT": ((), (), ("faced",)),
    "WATCH": (("LOOKABLE",), (), ("faced", "near")),
    "TOUCH": ((), (), ("near", "uncovered")),
    "PUSH": ((), (), ("near", "uncovered")),
    "PULL": (("MOVABLE",), ("button", "chair", "curtain"), ("near", "uncovered")),
    "MOVE": (("MOVABLE",), ("button", "chair", "curtain"), ("near", "uncovered")),
    "TYPE": (("HAS_SWITCH",), ("keyboard",), ("near",)),
    "WASH": ((), (), ("near",)),
    "RINSE": ((), (), ("near",)),
    "SCRUB": ((), (), ("near",)),
    "WIPE": ((), (), ("near", "something held")),
    "DRINK": (("DRINKABLE", "RECIPIENT"), (), ("held",)),
    "READ": (("READABLE",), (), ("held",)),
    "EAT": (("EATABLE",), (), ("near",)),
    "GRAB": (("GRABBABLE",), ("water", "child"), ("held",)),
    "SIT": (("SITTABLE",), (), ("sat on",)),
    "LIE": (("LIEABLE",), (), ("lain on",)),
    "OPEN": (("CAN_OPEN",), ("desk", "window"), ("open", "closed")),
    "CLOSE": (("CAN_OPEN",), ("desk", "window"), ("closed",)),
    "SWITCHON": (("HAS_SWITCH",), (), ("on", "off")),
    "SWITCHOFF": (("HAS_SWITCH",), (), ("off", "on")),
    "PLUGIN": (("HAS_PLUG",), (), ("plugged in", "plugged out")),
    "PLUGOUT": (("HAS_PLUG",), (), ("plugged out", "plugged in")),
    "PUTON": (("CLOTHES",), (), ("worn",)),
    "PUTOFF": (("CLOTHES",), (), ("worn",)),
    "PUTOBJBACK": (("GRABBABLE",), ("water", "child"), ("held",)),
    "DROP": (("GRABBABLE",), ("water", "child"), ("held",)),
    "RELEASE": (("GRABBABLE",), ("water", "child"), ("held",)),
    "SQUEEZE": (("CLOTHES",), tuple(sorted(SQUEEZABLE)), ("near",)),
    "CUT": (("CUTTABLE",), (), ("near", "knife held")),
    "GREET": (("PERSON",), (), ()),
}


def _deed(home: _Home, deed: GoalDeed, limit: int):
    """Actions that count as a wanted one, and the conditions that they ask for."""
    for verb in deed.verbs:
        if verb in ("SLEEP", "WAKEUP", "STANDUP"):
            yield Grounded(verb)
            yield from _rest(home, limit)
        elif verb in ("PUTBACK", "PUTIN", "POUR"):
            yield from _pairs(home, verb, deed.objects or home.allowed, limit)
        elif verb in _PERFORMERS:
            traits, classes, conditions = _PERFORMERS[verb]
            things = deed.objects or [i for i in home.allowed if i not in home.rooms]
            fit = [
                i
                for i in things
                if home.nodes[i]["class_name"] != _CHARACTER
                if not traits or any(home.has(i, trait, classes) for trait in traits)
            ]
            for number in fit[:limit]:
                yield Grounded(verb, number)
                yield from ((condition, number) for condition in conditions)


def _rest(home: _Home, limit: int):
    for condition, trait in _POSES.values():
        seats = [i for i in home.allowed if home.has(i, trait)]
        yield from ((condition, seat) for seat in seats[:limit])


def _pairs(home: _Home, verb: str, first: Sequence[int], limit: int):
    second = home.allowed
    carried = [i for i in first if home.has(i, "GRABBABLE", _GRABBABLE)]
    if verb == "POUR":
        carried = [i for i in carried if home.has(i, "POURABLE") or home.has(i, "DRINKABLE")]
        second = [i for i in second if home.has(i, "RECIPIENT", _VESSELS)]
    for a, b in itertools.product(carried[:limit], second[:limit]):
        if a != b:
            yield Grounded(verb, a, b)
            yield "held", a
            yield "near", b
            if verb == "PUTIN" and home.has(b, "CAN_OPEN") and not home.is_(b, "OPEN"):
                yield "open", b


def action_table(
    graph: Mapping[str, Any],
    predicates: Sequence[GoalFact],
    *,
    deeds: Sequence[GoalDeed] = (),
    meant: Mapping[str, Sequence[int]] | None = None,
    told: Sequence[int] | None = None,
    instances: int = 6,
    among: Collection[int] = (),
) -> list[Grounded]:
    """The actions that can matter for a goal, see the top of this module.

    Args:
        graph: initial graph, `nodes` and `edges` as the simulator's JSON has them.
        predicates: the goal, by class names.
        deeds: actions that must have been performed.
        meant: graph ids that a class name of the goal means; all of the class where it is absent.
        told: graph ids that actions may name, where the task limits them.
        instances: how many nodes of a class, or objects of a wanted action, are taken at most.
        among: graph ids; of a class that has some of them only these are taken. For comparison with
            planners that were told which objects to use.

    Returns:
        Distinct actions, sorted by verb and ids; for the 518 RobotHow tasks 2 to 91,
        half of them at most 15.

    Raises:
        EgjaxError: a class that the graph lacks, or a graph without a character.
    """
    named = {name for p in predicates for name in (p.subject, p.other) if name is not None}
    home = _Home(graph, named, meant or {}, told, among)
    for name in sorted(named | {_CHARACTER}):
        if name not in home.by_class:
            raise EgjaxError(f"the graph has no {name}", where="action_table")
    pending: list[Any] = list(_together(home, predicates, instances))
    for fact in predicates:
        if fact.other is None:
            rule = _state_fact
        elif fact.subject == _CHARACTER:
            rule = _own_fact
        else:
            rule = _object_fact
        pending += rule(home, fact, predicates, instances)
    for deed in deeds:
        pending += _deed(home, deed, instances)
    found: set[Any] = set()
    while pending:
        item = pending.pop()
        if item not in found:
            found.add(item)
            if not isinstance(item, Grounded):
                condition, number = item
                pending += _ACHIEVERS[condition](home, number)
    allowed = {None, *home.allowed}
    actions = {a for a in found if isinstance(a, Grounded) and {a.obj, a.target} <= allowed}
    if home.is_(home.by_class[_CHARACTER][0], "SITTING", "LYING"):
        actions.add(Grounded("STANDUP"))
    return sorted(actions, key=lambda a: (VERB_INDEX[a.verb], a.obj or -1, a.target or -1))


def table_sizes(tables: Iterable[Sequence[Grounded]]) -> tuple[int, int]:
    """Numbers of actions and objects that hold every table, as multiples of 8: a CPU takes eight at
    a time and what is left over one by one."""
    tables = list(tables)
    actions = max(map(len, tables))
    objects = max(
        len({i for action in table for i in action[1:] if i is not None}) for table in tables
    )
    return -(-actions // 8) * 8, -(-max(objects, 1) // 8) * 8


def encode_actions(
    actions: Sequence[Grounded],
    index: Mapping[int, int],
    *,
    size: int | None = None,
    objects: int | None = None,
) -> ActionTable:
    """Arrays of a table.

    Args:
        actions: at least one.
        index: node index of each graph id.
        size, objects: padded numbers of actions and of distinct nodes; the smallest that hold them
            where absent.

    Raises:
        EgjaxError: no action, an id that the scene lacks, or more than the sizes hold.
    """
    ids = sorted({i for action in actions for i in action[1:] if i is not None})
    size = len(actions) if size is None else size
    objects = max(len(ids), 1) if objects is None else objects
    if not actions or len(actions) > size or len(ids) > objects:
        raise EgjaxError(
            f"{len(actions)} actions on {len(ids)} objects for a table of {size} on {objects}",
            where="encode_actions",
        )
    missing = [i for i in ids if i not in index]
    if missing:
        raise EgjaxError(f"the scene has no node {missing[0]}", where="encode_actions")
    slot = {number: place for place, number in enumerate(ids)}

    def column(values: Iterable[int], fill: int, length: int) -> np.ndarray:
        values = list(values)
        return np.array(values + [fill] * (length - len(values)), np.int32)

    def node(number: int | None) -> int:
        return -1 if number is None else index[number]

    def place(number: int | None) -> int:
        return 0 if number is None else slot[number]

    columns: dict[str, Any] = {
        "verb": column((VERB_INDEX[a.verb] for a in actions), 0, size),
        "obj": column((node(a.obj) for a in actions), -1, size),
        "target": column((node(a.target) for a in actions), -1, size),
        "mask": np.arange(size) < len(actions),
        "objects": column((index[i] for i in ids), -1, objects),
        "obj_slot": column((place(a.obj) for a in actions), 0, size),
        "target_slot": column((place(a.target) for a in actions), 0, size),
    }
    return ActionTable(**columns)
