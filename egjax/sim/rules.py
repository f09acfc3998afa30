"""The rules of the household as tables: a verb is a row of checks and a row of effects.

Under `jax.vmap` every branch of a switch is computed, so verbs are rows that the step gathers
instead. Three rule sets, by name in `RULES`:

- `reference`: VirtualHome's evolving graph at tag v1.0.0.
- `repaired`: the same with three faults mended. What is carried is in the room one is in, standing
  up leaves the seat, and what is held cannot be grabbed again.
- `eai`: the executor of the Embodied Agent Interface (arXiv 2410.07166; the wheel
  `virtualhome-eval` 0.1.1), to foretell its verdict on a plan.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from egjax.sim.vocab import VERB_INDEX, VERBS, Flag, Trait

__all__ = [
    "CHECKS",
    "REFERENCE",
    "RULES",
    "Check",
    "Rules",
    "eai_rules",
    "reason",
    "reference_rules",
    "repaired_rules",
]

TRAITS = 32


class Check(enum.IntEnum):
    """Conditions on the moving part of the world; numbered after the 32 possible traits.

    Word 1 (32-63) and word 2 (64-) of the packed facts. `NEAR`, ... speak of the first argument,
    `TARGET_*` of the second, the rest of the character. `FINDABLE` (near, or free to walk to) and
    `RETURNABLE` (the place a held thing came from takes it) sum up checks for whole tables.
    """

    NEAR = 32
    ACCESSIBLE = 33
    HELD = 34
    SEAT_FREE = 35
    BED_FREE = 36
    IS_OPEN = 37
    IS_CLOSED = 38
    IS_ON = 39
    IS_OFF = 40
    NOT_ON = 41
    PLUGGED_IN = 42
    PLUGGED_OUT = 43
    NOT_PLUGGED_OUT = 44
    GRABBED = 45
    FACED = 46
    SAME_ROOM = 47
    WATCHABLE = 48
    WORN = 49
    FOOD_OR_LADEN = 50
    FOOD = 51
    HAS_ROOM = 52
    CONNECTED = 53
    DOORS_OPEN = 54
    PRESENT = 55
    PUT_OPEN = 56
    FINDABLE = 57
    RETURNABLE = 58
    NOT_HELD = 59
    NOT_GRABBED = 60
    TARGET_NEAR = 64
    TARGET_OPEN = 65
    TARGET_RECIPIENT = 66
    TARGET_PRESENT = 67
    FREE_HAND = 68
    HOLDS_SOMETHING = 69
    KNIFE_HELD = 70
    UPRIGHT = 71
    NOT_SITTING = 72
    NOT_LYING = 73
    RESTING = 74
    IN_ROOM = 75


CHECKS = 96
"""Bits of the three packed words of facts."""

_C, _T = Check, Trait
_OPENING = {
    "OPEN": (_T.OPENABLE, _C.NEAR, _C.FREE_HAND, _C.IS_CLOSED, _C.NOT_ON),
    "CLOSE": (_T.OPENABLE, _C.NEAR, _C.IS_OPEN),
    "SWITCHON": (_T.HAS_SWITCH, _C.NEAR, _C.IS_OFF, _C.NOT_PLUGGED_OUT),
    "SWITCHOFF": (_T.HAS_SWITCH, _C.NEAR, _C.IS_ON),
    "PLUGIN": (_T.HAS_PLUG, _C.NEAR, _C.FREE_HAND, _C.PLUGGED_OUT),
    "PLUGOUT": (_T.HAS_PLUG, _C.NEAR, _C.FREE_HAND, _C.PLUGGED_IN),
}
_WALK = (_C.UPRIGHT, _C.IN_ROOM, _C.HAS_ROOM, _C.CONNECTED, _C.DOORS_OPEN)
_MOVE = (_C.NEAR, _C.ACCESSIBLE, _C.FREE_HAND)
REFERENCE_CHECKS: Mapping[str, Sequence[int]] = {
    "WALK": _WALK,
    "RUN": _WALK,
    "FIND": (_C.NEAR,),
    "SIT": (_C.NEAR, _C.NOT_SITTING, _T.SITTABLE, _C.SEAT_FREE),
    "LIE": (_C.NEAR, _C.NOT_LYING, _T.LIEABLE, _C.BED_FREE),
    "STANDUP": (_C.RESTING,),
    "GRAB": (_T.GRABBABLE, _C.NEAR, _C.ACCESSIBLE, _C.FREE_HAND, _C.IN_ROOM),
    "PUTBACK": (_C.HELD, _C.TARGET_NEAR),
    "PUTIN": (_C.HELD, _C.TARGET_NEAR, _C.TARGET_OPEN),
    "PUTOBJBACK": (_C.GRABBED, _C.HELD, _C.TARGET_NEAR, _C.PUT_OPEN),
    "DROP": (_C.HELD, _C.IN_ROOM),
    "RELEASE": (_C.HELD, _C.IN_ROOM),
    **_OPENING,
    "WASH": (_C.NEAR,),
    "RINSE": (_C.NEAR,),
    "SCRUB": (_C.NEAR,),
    "WIPE": (_C.NEAR, _C.HOLDS_SOMETHING),
    "TURNTO": (),
    "LOOKAT": (_C.FACED,),
    "POINTAT": (_C.FACED,),
    "WATCH": (_T.LOOKABLE, _C.IN_ROOM, _C.HAS_ROOM, _C.SAME_ROOM, _C.FACED, _C.WATCHABLE),
    "POUR": (_T.POURABLE, _C.TARGET_RECIPIENT, _C.HELD, _C.TARGET_NEAR),
    "PUTON": (_C.HELD, _T.CLOTHES),
    "PUTOFF": (_C.WORN, _T.CLOTHES),
    "DRINK": (_T.DRINKABLE, _C.HELD),
    "READ": (_T.READABLE, _C.HELD),
    "EAT": (_C.NEAR, _C.FOOD_OR_LADEN, _C.FOOD),
    "CUT": (_C.FREE_HAND, _C.NEAR, _T.EATABLE, _T.CUTTABLE, _C.KNIFE_HELD),
    "TOUCH": (_C.NEAR, _C.ACCESSIBLE),
    "TYPE": (_C.NEAR, _T.TYPEABLE),
    "PUSH": _MOVE,
    "PULL": (_T.MOVABLE, *_MOVE),
    "MOVE": (_T.MOVABLE, *_MOVE),
    "SQUEEZE": (_C.FREE_HAND, _C.NEAR, _T.SQUEEZABLE),
    "SLEEP": (_C.RESTING,),
    "WAKEUP": (_C.RESTING,),
    "GREET": (_T.PERSON,),
}

_NEAR_CHARACTER = Flag.INSIDE_OUT | Flag.CLOSE_OUT | Flag.FACING_OUT
_NEAR_CHARACTER |= Flag.INSIDE_IN | Flag.CLOSE_IN | Flag.FACING_IN
_CLOSE = Flag.CLOSE_OUT | Flag.CLOSE_IN
_HANDS = Flag.HOLDS_RH | Flag.HOLDS_LH
_ON, _INSIDE, _DYNAMIC, _NONE = 0, 1, 4, -1


class Effect(NamedTuple):
    """What an accepted verb does. Flags are bits of `State.nodes`.

    A field is an int or bool in a verb's row and an array once the rows are a table.

    Attributes:
        clear_all: flags cleared at every node (edges of the character).
        clear_obj, set_obj: flags cleared, then set, at the first argument.
        clear_character, set_character: states of the character.
        set_target: flags set at the second argument.
        link: relation of a new edge first → second argument; 4 takes the one stored by GRAB.
        link_close: also CLOSE between both arguments, both ways.
        into_room: INSIDE(first argument, room of the character).
        take: the first argument goes into a free hand, and where it was taken from is stored.
        forget: where the first argument was taken from is forgotten.
        face: the character faces what the first argument faces.
        walk: the character and what it carries move to the first argument.
    """

    clear_all: Any = 0
    clear_obj: Any = 0
    set_obj: Any = 0
    clear_character: Any = 0
    set_character: Any = 0
    set_target: Any = 0
    link: Any = _NONE
    link_close: Any = False
    into_room: Any = False
    take: Any = False
    forget: Any = False
    face: Any = False
    walk: Any = False


def _swap(off: Flag, on: Flag) -> Effect:
    return Effect(clear_obj=off, set_obj=on)


_PUT = Effect(clear_obj=_HANDS, set_target=_CLOSE, link_close=True, forget=True)
_DROP = Effect(clear_obj=_HANDS, into_room=True, forget=True)
_STEP = Effect(clear_all=_NEAR_CHARACTER, set_obj=_CLOSE, walk=True)
_WASH = _swap(Flag.DIRTY, Flag.CLEAN)
REFERENCE_EFFECTS: Mapping[str, Effect] = {
    "WALK": _STEP,
    "RUN": _STEP,
    "FIND": Effect(clear_all=Flag.FACING_OUT, set_obj=_CLOSE),
    "SIT": Effect(
        set_obj=Flag.ON_OUT, clear_character=Flag.LYING, set_character=Flag.SITTING, face=True
    ),
    "LIE": Effect(set_obj=Flag.ON_OUT, clear_character=Flag.SITTING, set_character=Flag.LYING),
    "STANDUP": Effect(clear_character=Flag.SITTING | Flag.LYING),
    "GRAB": Effect(
        clear_obj=Flag.ON_OUT | Flag.INSIDE_OUT | Flag.ON_IN | Flag.INSIDE_IN,
        set_obj=_CLOSE | Flag.CUT_ON | Flag.CUT_INSIDE | Flag.CUT_CLOSE,
        into_room=True,
        take=True,
    ),
    "PUTBACK": _PUT._replace(link=_ON),
    "PUTIN": _PUT._replace(link=_INSIDE),
    "PUTOBJBACK": _PUT._replace(link=_DYNAMIC),
    "DROP": _DROP,
    "RELEASE": _DROP,
    "OPEN": _swap(Flag.CLOSED, Flag.OPEN),
    "CLOSE": _swap(Flag.OPEN, Flag.CLOSED),
    "SWITCHON": _swap(Flag.SWITCHED_OFF, Flag.SWITCHED_ON),
    "SWITCHOFF": _swap(Flag.SWITCHED_ON, Flag.SWITCHED_OFF),
    "PLUGIN": _swap(Flag.PLUGGED_OUT, Flag.PLUGGED_IN),
    "PLUGOUT": _swap(Flag.PLUGGED_IN, Flag.PLUGGED_OUT),
    "WASH": _WASH,
    "RINSE": _WASH,
    "SCRUB": _WASH,
    "WIPE": _WASH,
    "TURNTO": Effect(clear_all=Flag.FACING_OUT, set_obj=Flag.FACING_OUT),
    "POUR": Effect(link=_INSIDE),
    "PUTON": Effect(clear_obj=_HANDS, set_obj=Flag.ON_IN),
    "PUTOFF": Effect(clear_obj=Flag.ON_IN),
}
# Poured water leaves the hand; what else is poured stays in it. A row of its own after the verbs.
POUR_WATER = Effect(link=_INSIDE, clear_obj=_HANDS)


@dataclass(frozen=True, eq=False)
class Rules:
    """A rule set: tables, and switches where the interpreter itself must differ.

    Compared and hashed by identity, so that a jitted function can take it as a static argument;
    the switches are Python bools and cost nothing where they are off. Row v of a table is verb v;
    then come POUR of water and, with `vain_return`, PUTOBJBACK that changes nothing.

    Attributes:
        need: uint32[V, 3]. Facts that must all be true, as bits, for a table of actions.
        order: int32[V+1 or V+2, L]. The same facts in the order in which they are asked, -1 after.
        effects: `Effect` of int32/uint32/bool[V+1 or V+2] arrays.
        carry_along: what is carried comes INSIDE the room that one walks to; otherwise it stays
            INSIDE the room that one leaves.
        find_resting: FIND of something far away looks around while one sits or lies; otherwise it
            is WALK, and refused.
        new_first: the tie rule for where GRAB takes a thing from counts initial edges that are cut,
            and among equal remainders lets edges made in the episode come before initial ones.
        nested_rooms: a thing INSIDE nothing but another thing is in the room of that one;
            otherwise it is in no room.
        open_walk: WALK brings CLOSE what is INSIDE a thing that can be opened and what the thing is
            ON, and nothing of a room; otherwise what is ON a surface, and the room itself.
        vain_return: PUTOBJBACK of something once grabbed that cannot be put back is accepted and
            changes nothing.
    """

    need: np.ndarray
    order: np.ndarray
    effects: Effect
    carry_along: bool = False
    find_resting: bool = True
    new_first: bool = False
    nested_rooms: bool = False
    open_walk: bool = False
    vain_return: bool = False

    def asks(self, check: Check) -> bool:
        """Whether any verb asks for a fact."""
        return bool((self.order == check).any())


def _build(
    checks: Mapping[str, Sequence[int]],
    effects: Mapping[str, Effect],
    *,
    vain_return: bool = False,
) -> Rules:
    rows: list[list[int]] = []
    for verb in VERBS:
        present = [Check.PRESENT, Check.TARGET_PRESENT][: verb.arity]
        rows.append([int(check) for check in (*present, *checks[verb.name])])
    table = [effects.get(verb.name, Effect()) for verb in VERBS] + [POUR_WATER]
    asked = [list(row) for row in rows]
    asked[VERB_INDEX["FIND"]] = [Check.FINDABLE]
    rows.append(rows[VERB_INDEX["POUR"]])
    if vain_return:
        rows.append([Check.PRESENT, Check.GRABBED])
        table.append(Effect())
        asked[VERB_INDEX["PUTOBJBACK"]] = rows[-1]
    else:
        asked[VERB_INDEX["PUTOBJBACK"]] = [Check.GRABBED, Check.HELD, Check.RETURNABLE]
    order = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for index, row in enumerate(rows):
        order[index, : len(row)] = row
    need = np.zeros((len(VERBS), CHECKS // 32), np.uint32)
    for index, row in enumerate(asked):
        for check in row:
            need[index, check // 32] |= np.uint32(1 << (check % 32))
    columns = []
    for name, column in zip(Effect._fields, zip(*table, strict=True), strict=True):
        kind = np.bool_ if isinstance(getattr(Effect(), name), bool) else np.uint32
        kind = np.int32 if name == "link" else kind
        columns.append(np.array([int(value) for value in column]).astype(kind))
    return Rules(need, order, Effect(*columns), vain_return=vain_return)


def reference_rules() -> Rules:
    """The rules of VirtualHome's evolving graph at tag v1.0.0."""
    return _build(REFERENCE_CHECKS, REFERENCE_EFFECTS)


def repaired_rules() -> Rules:
    """The reference with three faults mended; see the module's docstring."""
    checks = {**REFERENCE_CHECKS, "GRAB": (*REFERENCE_CHECKS["GRAB"], _C.NOT_HELD)}
    standing = REFERENCE_EFFECTS["STANDUP"]._replace(clear_all=Flag.ON_OUT)
    rules = _build(checks, {**REFERENCE_EFFECTS, "STANDUP": standing})
    return replace(rules, carry_along=True)


def eai_rules() -> Rules:
    """The rules of the Embodied Agent Interface's executor (`virtualhome-eval` 0.1.1).

    Doors never block, a thing with a remembered origin cannot be grabbed, WATCH needs an open
    container, and the switches of `Rules` that VirtualHome 2.3.0 introduced are on. A character in
    no room makes that executor raise; here the action is refused.
    """
    walk = (_C.UPRIGHT, _C.IN_ROOM, _C.HAS_ROOM)
    grabbable, *rest = REFERENCE_CHECKS["GRAB"]
    grab = REFERENCE_EFFECTS["GRAB"]
    checks = {
        **REFERENCE_CHECKS,
        "WALK": walk,
        "RUN": walk,
        "GRAB": (grabbable, _C.NOT_GRABBED, *rest),
        "PUTOBJBACK": (_C.GRABBED,),
        "WATCH": (*REFERENCE_CHECKS["WATCH"], _C.ACCESSIBLE),
    }
    effects = {**REFERENCE_EFFECTS, "GRAB": grab._replace(clear_obj=grab.clear_obj | _HANDS)}
    rules = _build(checks, effects, vain_return=True)
    return replace(rules, find_resting=False, new_first=True, nested_rooms=True, open_walk=True)


REFERENCE = reference_rules()
RULES: Mapping[str, Rules] = {
    "reference": REFERENCE,
    "repaired": repaired_rules(),
    "eai": eai_rules(),
}
"""The rule sets by name."""

_C_TEXT = {
    _T.PERSON: "{o} is not person",
    _T.SITTABLE: "{o} is not sittable",
    _T.LIEABLE: "{o} is not lieable",
    _T.GRABBABLE: "{o} is not grabbable",
    _T.OPENABLE: "{o} can not be opened",
    _T.HAS_SWITCH: "{o} does not have a switch",
    _T.HAS_PLUG: "{o} does not have a plug",
    _T.DRINKABLE: "{o} is not drinkable or not recipient",
    _T.READABLE: "{o} is not readable",
    _T.CLOTHES: "{o} is not clothes",
    _T.SQUEEZABLE: "{o} is not clothes",
    _T.POURABLE: "{o} is not pourable or drinkable",
    _T.TYPEABLE: "{o} does not have switch",
    _T.LOOKABLE: "{o} not lookable",
    _T.MOVABLE: "{o} is not movable",
    _T.EATABLE: "{o} is not eatable",
    _T.CUTTABLE: "{o} is not cuttable",
    _C.NEAR: "{c} is not close to {o}",
    _C.ACCESSIBLE: "{o} is inside other closed thing",
    _C.HELD: "{c} is not holding {o}",
    _C.SEAT_FREE: "Too many things on {o}",
    _C.BED_FREE: "Too many things on {o}",
    _C.IS_OPEN: "{o} is not open",
    _C.IS_CLOSED: "{o} is not closed",
    _C.IS_ON: "{o} is not on",
    _C.IS_OFF: "{o} is not off",
    _C.NOT_ON: "{o} is still on",
    _C.PLUGGED_IN: "{o} is not plugged_in",
    _C.PLUGGED_OUT: "{o} is not plugged_out",
    _C.NOT_PLUGGED_OUT: "{o} is unplugged",
    _C.GRABBED: "{o} not grabbed",
    _C.FACED: "{c} does not face {o}",
    _C.SAME_ROOM: "char room {r} is not node room {s}",
    _C.WATCHABLE: "{c} is not facing {o} while sitting",
    _C.WORN: "{o} is not on {c}",
    _C.FOOD_OR_LADEN: "{o} is not eatable",
    _C.FOOD: "none of object on {o} is eatable",
    _C.HAS_ROOM: "{o} is in no room",
    _C.CONNECTED: "No path between between {r} and {s}",
    _C.DOORS_OPEN: "Door(s) {doors} between {r} and {s} is (are) closed",
    _C.PRESENT: "the first object does not exist",
    _C.PUT_OPEN: "{b} is not open or is not openable",
    _C.NOT_HELD: "{o} already grabbed",
    _C.NOT_GRABBED: "{o} already grabbed",
    _C.TARGET_NEAR: "{c} is not close to {b}",
    _C.TARGET_OPEN: "{b} is not open or is not openable",
    _C.TARGET_RECIPIENT: "{b} is not recipient",
    _C.TARGET_PRESENT: "the second object does not exist",
    _C.FREE_HAND: "{c} does not have a free hand",
    _C.HOLDS_SOMETHING: "{c} does not hold anything in hands",
    _C.KNIFE_HELD: "{c} is not holding a knife",
    _C.UPRIGHT: "{c} is sitting",
    _C.NOT_SITTING: "{c} is sitting",
    _C.NOT_LYING: "{c} is lying",
    _C.RESTING: "{c} is not lying or sitting",
    _C.IN_ROOM: "{c} is in no room",
}


def reason(verb: int, code: int) -> str:
    """Template of the reference's message for an error code of `egjax.sim.world.step`.

    Args:
        verb: verb number.
        code: error number, 1 + the check that failed.

    Returns:
        Text with the fields {c} character, {o}, {b} arguments, {r}, {s} rooms of character and
        first argument, {doors}.
    """
    if code - 1 == Check.RESTING and VERBS[verb].name == "STANDUP":
        return "{c} is not sitting"
    return _C_TEXT[code - 1]
