"""Words of the household: states, relations, properties, verbs, and the bit layouts made of them.

The vocabulary is VirtualHome's evolving graph (tag v1.0.0). Everything here is plain Python and
numpy, so host code can use it without touching a device.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

__all__ = [
    "PROPERTIES",
    "RELATIONS",
    "STATES",
    "STATE_SHIFT",
    "VERBS",
    "VERB_INDEX",
    "Flag",
    "Trait",
    "Verb",
    "state_bit",
]

RELATIONS = ("ON", "INSIDE", "CLOSE", "FACING", "HOLDS_RH", "HOLDS_LH", "BETWEEN")
STATES = (
    "CLOSED", "OPEN", "ON", "OFF", "SITTING", "DIRTY", "CLEAN", "LYING", "PLUGGED_IN",
    "PLUGGED_OUT",
)  # fmt: skip
PROPERTIES = (
    "SURFACES", "GRABBABLE", "SITTABLE", "LIEABLE", "HANGABLE", "DRINKABLE", "EATABLE", "RECIPIENT",
    "CUTTABLE", "POURABLE", "CAN_OPEN", "HAS_SWITCH", "READABLE", "LOOKABLE", "CONTAINERS",
    "CLOTHES", "PERSON", "BODY_PART", "COVER_OBJECT", "HAS_PLUG", "HAS_PAPER", "MOVABLE", "CREAM",
)  # fmt: skip

STATE_SHIFT = 14
"""Bit of the first object state in `State.nodes`."""


class Flag(enum.IntFlag):
    """Bits of `State.nodes`: edges between the character and a node, cuts, states."""

    ON_OUT = 1 << 0
    INSIDE_OUT = 1 << 1
    CLOSE_OUT = 1 << 2
    FACING_OUT = 1 << 3
    ON_IN = 1 << 4
    INSIDE_IN = 1 << 5
    CLOSE_IN = 1 << 6
    FACING_IN = 1 << 7
    HOLDS_RH = 1 << 8
    HOLDS_LH = 1 << 9
    CUT_ON = 1 << 10
    CUT_INSIDE = 1 << 11
    CUT_CLOSE = 1 << 12
    CUT_FACING = 1 << 13
    CLOSED = 1 << 14
    OPEN = 1 << 15
    SWITCHED_ON = 1 << 16
    SWITCHED_OFF = 1 << 17
    SITTING = 1 << 18
    DIRTY = 1 << 19
    CLEAN = 1 << 20
    LYING = 1 << 21
    PLUGGED_IN = 1 << 22
    PLUGGED_OUT = 1 << 23


def state_bit(state: str) -> int:
    """Bit position of an object state (a name from `STATES`) in `State.nodes`."""
    return STATE_SHIFT + STATES.index(state)


class Trait(enum.IntEnum):
    """What the rules ask of a node that never changes; bit positions in `Scene.props`."""

    SURFACE = 0
    GRABBABLE = 1  # property, or water or a child
    SITTABLE = 2
    LIEABLE = 3
    DRINKABLE = 4  # DRINKABLE or RECIPIENT
    EATABLE = 5
    CUTTABLE = 6
    POURABLE = 7  # POURABLE or DRINKABLE
    RECIPIENT = 8  # RECIPIENT, or hands, sponge, face
    OPENABLE = 9  # CAN_OPEN, or desk, window
    CAN_OPEN = 10
    HAS_SWITCH = 11
    HAS_PLUG = 12
    READABLE = 13
    LOOKABLE = 14
    CLOTHES = 15
    PERSON = 16
    BODY_PART = 17
    MOVABLE = 18  # MOVABLE, or button, chair, curtain
    SQUEEZABLE = 19  # CLOTHES, or one of twelve names
    TYPEABLE = 20  # keyboard, or HAS_SWITCH
    KNIFE = 21
    WATER = 22
    COMPUTER = 23
    ROOM = 24
    DOOR = 25  # door or doorjamb


class Verb(NamedTuple):
    """A verb: its name in scripts, number of arguments, and English with {0}, {1} for them."""

    name: str
    arity: int
    english: str


VERBS = (
    Verb("WALK", 1, "Walk to {0}"),
    Verb("RUN", 1, "Run to {0}"),
    Verb("FIND", 1, "Find {0}"),
    Verb("SIT", 1, "Sit on {0}"),
    Verb("LIE", 1, "Lie on {0}"),
    Verb("STANDUP", 0, "Stand up"),
    Verb("GRAB", 1, "Grab {0}"),
    Verb("PUTBACK", 2, "Put {0} on {1}"),
    Verb("PUTIN", 2, "Put {0} in {1}"),
    Verb("PUTOBJBACK", 1, "Put back {0}"),
    Verb("DROP", 1, "Drop {0}"),
    Verb("RELEASE", 1, "Release {0}"),
    Verb("OPEN", 1, "Open {0}"),
    Verb("CLOSE", 1, "Close {0}"),
    Verb("SWITCHON", 1, "Switch on {0}"),
    Verb("SWITCHOFF", 1, "Switch off {0}"),
    Verb("PLUGIN", 1, "Plug in {0}"),
    Verb("PLUGOUT", 1, "Plug out {0}"),
    Verb("WASH", 1, "Wash {0}"),
    Verb("RINSE", 1, "Rinse {0}"),
    Verb("SCRUB", 1, "Scrub {0}"),
    Verb("WIPE", 1, "Wipe {0}"),
    Verb("TURNTO", 1, "Turn to {0}"),
    Verb("LOOKAT", 1, "Look at {0}"),
    Verb("POINTAT", 1, "Point at {0}"),
    Verb("WATCH", 1, "Watch {0}"),
    Verb("POUR", 2, "Pour {0} into {1}"),
    Verb("PUTON", 1, "Put on {0}"),
    Verb("PUTOFF", 1, "Take off {0}"),
    Verb("DRINK", 1, "Drink {0}"),
    Verb("READ", 1, "Read {0}"),
    Verb("EAT", 1, "Eat {0}"),
    Verb("CUT", 1, "Cut {0}"),
    Verb("TOUCH", 1, "Touch {0}"),
    Verb("TYPE", 1, "Type on {0}"),
    Verb("PUSH", 1, "Push {0}"),
    Verb("PULL", 1, "Pull {0}"),
    Verb("MOVE", 1, "Move {0}"),
    Verb("SQUEEZE", 1, "Squeeze {0}"),
    Verb("SLEEP", 0, "Sleep"),
    Verb("WAKEUP", 0, "Wake up"),
    Verb("GREET", 1, "Greet {0}"),
)
VERB_INDEX = {verb.name: index for index, verb in enumerate(VERBS)}
