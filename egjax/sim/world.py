"""The household's dynamics as pure functions of one scene and one state; batch them with vmap.

Semantics are those of a rule set (`egjax.sim.rules`; by default VirtualHome's evolving graph at tag
v1.0.0), with every object counted as found and the tie rule for "the first of several nodes": the
members of a set of n nodes are taken by (id mod m, id), m = 8, 32, 128, 512 for n up to 4, 18, 76,
more.

`step` tries any one action. For a table of actions, `ground` gathers once what never changes of its
objects, `look` asks what is legal, and `take` plays a legal action on what `look` has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from egjax.sim.graph import TIE_LIMITS
from egjax.sim.rules import REFERENCE, Check, Effect, Rules
from egjax.sim.vocab import VERB_INDEX, VERBS, Flag, Trait
from egjax.types import ActionTable, Scene, State

__all__ = [
    "Look",
    "Table",
    "any_byte",
    "fold",
    "from_lanes",
    "ground",
    "legal",
    "look",
    "step",
    "swap",
    "take",
    "to_lanes",
]

_ON, _INSIDE, _CLOSE, _FACING = 0, 1, 2, 3
_FIND, _WALK, _POUR = VERB_INDEX["FIND"], VERB_INDEX["WALK"], VERB_INDEX["POUR"]
_PUTOBJBACK = VERB_INDEX["PUTOBJBACK"]
_POUR_WATER = len(VERBS)
_VAIN_RETURN = len(VERBS) + 1
_NESTING = 4  # containers in containers that the search for a room looks through
_NO_KEY = jnp.iinfo(jnp.int32).max
_BOTH_CLOSE = (1 << _CLOSE) | (16 << _CLOSE)
_BODY = 1 << 8  # beside the bits of a row of edges
_ID, _ROOM, _FOOD = 13, 22, 1 << 28  # shifts and bit of `_words`; rank in bits 0-11
_CLOSED_BIT = Flag.CLOSED.value.bit_length() - 1


def _has(word: Array, bit: int) -> Array:
    """Whether a flag (a power of two) or trait word has the bit, as bool."""
    return (word & jnp.asarray(bit, word.dtype)) != 0


def _trait(props: Array, trait: Trait) -> Array:
    return _has(props, 1 << trait)


def _get(values: Array, index: Array, absent: int = 0) -> Array:
    """`values[index]`, or `absent` where the index is negative."""
    value = values[jnp.maximum(index, 0)]
    return jnp.where(index >= 0, value, jnp.asarray(absent, values.dtype))


def swap(bits: Array) -> Array:
    """The four outgoing bits for the four incoming ones and back."""
    return ((bits & 15) << 4) | (bits >> 4 & 15)


def fold(
    values: Array | tuple[Array, ...],
    combine: Callable[[Array, Array], Array],
    of: Callable[..., Array] = lambda x: x,
) -> Array:
    """Reduces the first axis, elementwise over the others, which a CPU does eight at a time.

    XLA's own reductions of integers go one by one there (measured: 20 times slower), and so does a
    sum written out that ends up inside of another loop. `of` maps the values, all with the same
    first axis, to what is reduced.
    """
    rest = of(*values) if isinstance(values, tuple) else of(values)
    while rest.shape[0] > 1:
        half = rest.shape[0] // 2
        odd = rest[2 * half :]
        rest = combine(rest[:half], rest[half : 2 * half])
        if odd.shape[0]:
            rest = jnp.concatenate([combine(rest[:1], odd), rest[1:]])
    return rest[0]


def settle(values: Array, scene: Scene) -> Array:
    """The same values, computed once.

    XLA's CPU compiler fuses a gather or broadcast with what it reads, which is then computed for
    every reader, and drops optimisation barriers; it does not so with an integer division. The
    divisor is 1, which the compiler cannot know.
    """
    one = (1 + (scene.character >> 31)).astype(values.dtype)
    return jax.lax.div(values, jnp.broadcast_to(one, values.shape))


def _settle_all(scene: Scene, values: Sequence[Array]) -> list[Array]:
    """Numbers and bools computed once, of which a loop over nodes asks at every node."""
    words = settle(jnp.stack([jnp.asarray(x).astype(jnp.uint32) for x in values]), scene)
    return [word.astype(jnp.asarray(x).dtype) for word, x in zip(words, values, strict=True)]


def _bits(where: Array, flags: Array | int) -> Array:
    return jnp.where(where, jnp.asarray(flags, jnp.uint32), jnp.uint32(0))


def _any(bits: Array | tuple[Array, ...], of: Callable[..., Array] = lambda x: x) -> Array:
    return fold(bits, jnp.bitwise_or, of)


def _sum(values: Array | tuple[Array, ...], of: Callable[..., Array] = lambda x: x) -> Array:
    return fold(values, jnp.add, of)


def _least(values: Array | tuple[Array, ...], of: Callable[..., Array] = lambda x: x) -> Array:
    return fold(values, jnp.minimum, of)


def to_lanes(rows: Array | tuple[Array, ...], of: Callable[..., Array] = lambda x: x) -> Array:
    """uint32[N] of bytes as uint32[N/4] of four bytes each, as in `Scene.edges`.

    `of` maps the rows to those bytes; the lanes are stored once, see `_stored`.
    """
    rows = rows if isinstance(rows, tuple) else (rows,)
    eighths = [_parts(row, 8) for row in rows]
    parts = [of(*part) << (8 * (k // 2)) for k, part in enumerate(zip(*eighths, strict=True))]
    return jnp.concatenate([parts[k] | parts[k + 2] | parts[k + 4] | parts[k + 6] for k in (0, 1)])


def _stored(of: Callable[..., Array], *rows: Array) -> Array:
    """`of(*rows)`, in two parts of the first axis that are joined at last: XLA's CPU compiler
    stores what is joined, where it computes other values anew for every reader. The first part
    comes in eights, as vector registers hold them."""
    middle = -(-rows[0].shape[0] // 16) * 8
    halves = [row[:middle] for row in rows], [row[middle:] for row in rows]
    return jnp.concatenate([of(*half) for half in halves])


def _parts(row: Array, count: int) -> list[Array]:
    size = row.shape[0] // count
    return [row[k * size : (k + 1) * size] for k in range(count)]


def from_lanes(lanes: Array) -> Array:
    """The inverse of `to_lanes`."""
    return jnp.concatenate([lanes >> (8 * k) & 255 for k in range(4)])


def any_byte(lanes: Array | tuple[Array, ...], of: Callable[..., Array] = lambda x: x) -> Array:
    """The bits set in any of the bytes of uint32[L, ...]; `of` as in `fold`."""
    word = _any(lanes, of)
    word = word | word >> 16
    return (word | word >> 8) & 255


class _Ends(NamedTuple):
    """The overlay of added edges, unpacked; -1 for the ends of a free slot.

    `at_source` and `at_sink` are their `_words`. `from_source` is what the edge is to its source,
    `from_sink` what it is to its sink: the bits of a row of edges, from bit 8 what is asked of the
    far end (`_ask`), from bit 16 its room number + 1, from bit 22 its id.
    """

    source: Array
    sink: Array
    bits: Array
    at_source: Array
    at_sink: Array
    from_source: Array
    from_sink: Array


class _View(NamedTuple):
    """What every question to a state needs, computed once a state.

    `words` as in `_words`; `cut` and `ask` are lanes (see `to_lanes`): the cut relations of each
    node, both directions, and the bits of its row that answer near, faced, enclosed and laden with
    food. `own_hit` are those that the character's own edges answer, `own_laden` counts the things
    ON it. `room` is the number of the character's room, `reach` and `connected` masks of the rooms
    that (open) doors lead to, `nearest` the nearest closed door on the way to each room.
    """

    words: Array
    cut: Array
    ask: Array
    ends: _Ends
    hands: Array
    own_hit: Array
    own_laden: Array
    room: Array
    reach: Array
    connected: Array
    nearest: Array


def _modulus(count: Array) -> Array:
    """m - 1 for a set with `count` members."""
    low, middle, high = TIE_LIMITS
    return jnp.where(
        count > low, jnp.where(count > middle, jnp.where(count > high, 511, 127), 31), 7
    ).astype(jnp.int32)


def _reachable(scene: Scene, start: Array, closed: Array) -> Array:
    """Bit mask of the rooms that open doors lead to from room number `start`."""
    a, b = scene.door_rooms[:, 0], scene.door_rooms[:, 1]
    one = jnp.uint32(1)
    bit_a = one << jnp.maximum(a, 0).astype(jnp.uint32)
    bit_b = one << jnp.maximum(b, 0).astype(jnp.uint32)
    both = jnp.where((a >= 0) & ~closed, bit_a | bit_b, 0)
    reach = jnp.where(start >= 0, one << jnp.maximum(start, 0).astype(jnp.uint32), 0)
    # A room is reached after at most R-1 doors; R and D are small, so the loop unrolls.
    for _ in range(scene.connected.shape[-1] - 1):
        for d in range(a.shape[0]):
            reach = jnp.where((reach & both[d]) != 0, reach | both[d], reach)
    return reach


def _words(ids: Array, rank: Array, room: Array, props: Array, flags: Array) -> Array:
    """uint32[N]: all that is asked of the far end of an edge, so that it costs one gather: rank, id
    modulo the largest m, room number + 1, whether it is food; near, faced, closed."""
    number, place = ids.astype(jnp.uint32) & 511, (room + 1).astype(jnp.uint32)
    food = _bits(_trait(props, Trait.EATABLE), _FOOD)
    fixed = rank.astype(jnp.uint32) | number << _ID | place << _ROOM | food
    near_faced = flags >> _CLOSE & 3  # edges from the character, CLOSE and FACING
    return fixed | near_faced << 29 | flags << (31 - _CLOSED_BIT) & jnp.uint32(1 << 31)


def _no_room(word: Array) -> Array:
    """Whether a node is no room, of its word."""
    return word & (63 << _ROOM) == 0


def _ask(word: Array) -> Array:
    """The bits of a node's row that say near, faced, enclosed and laden with food of its ends."""
    near, faced, closed = (_has(word, 1 << bit) for bit in (29, 30, 31))
    return (
        _bits(near, (1 << _ON) | (1 << (_CLOSE + 4)))
        | _bits(faced, 1 << (_FACING + 4))
        | _bits(closed & _no_room(word), 1 << _INSIDE)
        | _bits(_has(word, _FOOD), 1 << (_ON + 4))
    )


def _cut(flags: Array) -> Array:
    """The relations that a node's initial edges have lost, both directions."""
    cut = flags >> 10 & 15
    return cut | cut << 4


def _ends(state: State, words: Array) -> _Ends:
    bits = state.added & 255
    source = (state.added >> 20).astype(jnp.int32)
    sink = (state.added >> 8 & 4095).astype(jnp.int32)
    at_source, at_sink = words[source], words[sink]

    def seen(bits: Array, word: Array) -> Array:
        return bits | _ask(word) << 8 | (word >> _ROOM & 63) << 16 | (word >> _ID & 511) << 22

    return _Ends(
        source=jnp.where(bits != 0, source, -1),
        sink=jnp.where(bits != 0, sink, -1),
        bits=bits,
        at_source=at_source,
        at_sink=at_sink,
        from_source=_stored(seen, bits, at_sink),
        from_sink=_stored(seen, swap(bits), at_source),
    )


def _tally(flags: Array) -> tuple[list[Array], Array, Array]:
    """The first node held in each hand, -1 for none; how many nodes the character is INSIDE; how
    many are ON it.

    Of an eighth of the nodes each, a bit in one of the four bytes of a word: one pass over all.
    """
    eighth = flags.shape[0] // 8
    words = jnp.zeros(eighth, jnp.uint32)
    for k, part in enumerate(_parts(flags, 8)):
        right, left = part >> 8 & 1, part >> 1 & 1 << 8
        inside, on_it = part << 15 & 1 << 16, part << 20 & 1 << 24
        words |= (right | left | inside | on_it) << k
    places = jnp.arange(eighth, dtype=jnp.int32)

    def first(word: Array, place: Array, shift: int) -> Array:
        byte = word >> shift & 255
        low = byte & (~byte + 1)
        number = jax.lax.population_count(low - 1).astype(jnp.int32) * eighth + place
        return jnp.where(byte != 0, number, _NO_KEY)

    hands = [_least((words, places), partial(first, shift=shift)) for shift in (0, 8)]
    counts = _sum(
        words,
        lambda x: jax.lax.population_count(x >> 16 & 255) << 16 | jax.lax.population_count(x >> 24),
    ).astype(jnp.int32)
    hands = [jnp.where(place == _NO_KEY, -1, place) for place in hands]
    return hands, counts >> 16, counts & 0xFFFF


def _view(scene: Scene, state: State) -> _View:
    flags = state.nodes
    words = _stored(_words, scene.ids, scene.rank, scene.room, scene.props, flags)
    hands, members, own_laden = _tally(flags)
    ask, cut = to_lanes(words, _ask), to_lanes(flags, _cut)
    own_hit = any_byte((to_lanes(flags, _own), ask), jnp.bitwise_and)
    here = _get(flags >> _INSIDE & 1, scene.room_node) != 0
    numbers = jnp.arange(here.shape[0], dtype=jnp.int32)
    room_ids = _get(scene.ids, scene.room_node)
    key = _least(jnp.where(here, (room_ids & _modulus(members)) << 5 | numbers, _NO_KEY))
    room = jnp.where(key == _NO_KEY, -1, key & 31)
    *hands, room, own_hit, own_laden = _settle_all(scene, (*hands, room, own_hit, own_laden))
    door_closed = _has(_get(flags, scene.door_node), Flag.CLOSED)
    start = jnp.maximum(room, 0)
    path, doors = scene.door_path[start], _get(scene.door_node, scene.door_path, -1)[start]
    blocked = (path >= 0) & door_closed[path]
    nearest = jnp.full(path.shape[0], -1, jnp.int32)
    for d in reversed(range(path.shape[1])):
        nearest = jnp.where(blocked[:, d], doors[:, d], nearest)
    linked = scene.connected[start].astype(jnp.uint32) << numbers.astype(jnp.uint32)
    connected = jnp.where(room >= 0, _any(linked), 0)
    reach = _reachable(scene, room, door_closed)
    reach, connected = _settle_all(scene, (reach, connected))
    return _View(
        words=words,
        cut=cut,
        ask=ask,
        ends=_ends(state, words),
        hands=jnp.stack(hands),
        own_hit=own_hit,
        own_laden=own_laden,
        room=room,
        reach=reach,
        connected=connected,
        nearest=nearest,
    )


class _Things(NamedTuple):
    """What never changes of M nodes, or of one, then without the axis M.

    Attributes:
        node: int32[M], 0 for an absent one; `present` bool[M].
        lanes: uint32[L, M]. Their rows of `Scene.edges`.
        props: uint32[M]. sit, lie: int32[M], capacities. room: int32[M], of a room its number.
        parents, parent_room, parent_id: int32[P, M], what they are initially INSIDE.
        door_of: uint32[M]. Mask of the rooms that they are a door of.
    """

    node: Array
    present: Array
    lanes: Array
    props: Array
    sit: Array
    lie: Array
    room: Array
    parents: Array
    parent_room: Array
    parent_id: Array
    door_of: Array


def _along(values: Array, nodes: Array) -> Array:
    """Values [X, ...] beside [X, M]; as they are if the nodes are a single one. (An axis of one or
    two objects would be the innermost loop.)"""
    return values[:, None] if nodes.ndim else values


def _things(scene: Scene, nodes: Array) -> _Things:
    present = (nodes >= 0) & (_get(scene.ids, nodes, -1) >= 0)
    node = jnp.maximum(nodes, 0)
    props = scene.props[node]
    parents = scene.inside[node].T
    door, rooms = _along(scene.door_node, node), _along(scene.door_between, node)
    between = _any(jnp.where((door == node) & (door >= 0), rooms, 0))
    return _Things(
        node=node,
        present=present,
        lanes=scene.edges[node].T,
        props=props,
        sit=scene.sit_capacity[node],
        lie=scene.lie_capacity[node],
        room=scene.room[node],
        parents=parents,
        parent_room=_get(scene.room, parents, -1),
        parent_id=_get(scene.ids, parents),
        door_of=jnp.where(_trait(props, Trait.DOOR), between, 0),
    )


def _own(flags: Array) -> Array:
    """uint32[N]: the character's row of edges, from its own end."""
    return flags & 255


def _pack(facts: Mapping[Check, Array], word: int) -> Array:
    """Bools as bits of one word; the keys are checks."""
    low = 32 * word
    total = jnp.uint32(0)
    for check, true in facts.items():
        if low <= check < low + 32:
            total = total | jnp.where(true, jnp.uint32(1 << (check - low)), jnp.uint32(0))
    return total


def _seen(ends: _Ends, node: Array) -> Array:
    """What an added edge is to a node (see `_Ends`), 0 where it is not one of its."""
    back = jnp.where(ends.sink == node, ends.from_sink, 0)
    return jnp.where(ends.source == node, ends.from_source, 0) | back


def _later(view: _View, node: Array) -> tuple[Array, Array, Array]:
    """What edges added later say of nodes, all [M]: the bits of `_ask` that they answer, how many
    things they put ON a node, and how many nodes it is INSIDE."""

    def answers(*row: Array) -> Array:
        seen = _seen(_Ends(*row), node)
        return seen & seen >> 8 & 255

    def counted(*row: Array) -> Array:
        seen = _seen(_Ends(*row), node)
        return (seen >> (_ON + 4) & 1) | (seen >> _INSIDE & 1) << 16

    ends = _Ends(*(_along(x, node) for x in view.ends))
    counts = _sum(ends, counted).astype(jnp.int32)
    return _any(ends, answers), counts & 0xFFFF, counts >> 16


def _room_key(inside: Array, room: Array, number: Array, mask: Array) -> Array:
    """Order of a room, by its graph id, among what a node is INSIDE; the room's number is in it."""
    return jnp.where(inside & (room >= 0), (number & mask) << 6 | (room + 1), _NO_KEY)


def _later_room(view: _View, node: Array, mask: Array) -> Array:
    """The least key [M] of a room that nodes are INSIDE by an edge added later."""

    def key(*row: Array) -> Array:
        seen = _seen(_Ends(*row), node)
        inside = _has(seen, 1 << _INSIDE) & _has(seen, 63 << 16)
        return jnp.where(inside, (seen >> 16).astype(jnp.int32) & kept, _NO_KEY)

    kept = mask << 6 | 63

    return _least(_Ends(*(_along(x, node) for x in view.ends)), key)


def _facts(
    scene: Scene, state: State, view: _View, things: _Things, rules: Rules
) -> tuple[Array, Array, Array]:
    """Facts about nodes as first argument (word 1) and as second (part of word 2), and the number
    of the room they are in, -1 for none. All [M]."""
    node, props = things.node, things.props
    flags = state.nodes[node]
    cut = _cut(flags)
    mine = node == scene.character
    me = scene.character
    to_me = jnp.where(mine, 0, swap(flags & 255))

    # Edges that the scene has from the start, as far as they are not cut.
    live = ~_along(view.cut, node)
    hit = any_byte((things.lanes, _along(view.ask, node) & live), jnp.bitwise_and) & ~cut
    on_it = _sum(
        (things.lanes, live),
        lambda row, live: jax.lax.population_count(row & live & (16 << _ON) * 0x01010101),
    )
    laden = jnp.where(_has(cut, 16 << _ON), 0, on_it).astype(jnp.int32)
    # The character's own edges stand in the flags of the others.
    hit = jnp.where(mine, view.own_hit, hit) | (to_me & _ask(view.words[me]))
    laden = jnp.where(mine, view.own_laden, laden) + (to_me >> 4 & 1).astype(jnp.int32)
    answers, on_later, inside_later = _later(view, node)
    hit, laden = hit | answers, laden + on_later

    parents = things.parents
    inside = (parents >= 0) & ~_has(_cut(_get(state.nodes, parents)) | cut, 1 << _INSIDE)
    members = (
        inside_later
        + _sum(inside.astype(jnp.int32))
        + _has(flags, Flag.INSIDE_IN).astype(jnp.int32)
    )
    mask = settle(_modulus(members), scene)
    key = jnp.minimum(
        _least(
            (inside, things.parent_room, things.parent_id),
            lambda inside, room, number: _room_key(inside, room, number, mask),
        ),
        _later_room(view, node, mask),
    )
    room = jnp.where(key == _NO_KEY, -1, (key & 63) - 1)
    if rules.nested_rooms:
        outermost = jnp.vectorize(lambda node: _outermost(scene, state, view, node))(node)
        number = _get(scene.room, outermost, -1)
        room = jnp.where((members == 1) & (number >= 0), number, room)
    room = jnp.where(mine, view.room, room)
    room = jnp.where(things.room >= 0, things.room, room)

    near = _has(flags, Flag.CLOSE_OUT) | _has(hit, (1 << _ON) | (1 << (_CLOSE + 4)))
    resting = _has(state.nodes[me], Flag.SITTING | Flag.LYING)
    facing = _has(flags, Flag.FACING_OUT)
    there = jnp.maximum(room, 0).astype(jnp.uint32)
    here = jnp.maximum(view.room, 0).astype(jnp.uint32)
    own_door = (view.room >= 0) & _has(things.door_of >> here, 1)
    edible = _trait(props, Trait.EATABLE)
    facts = {
        Check.NEAR: near,
        Check.ACCESSIBLE: ~_has(hit, 1 << _INSIDE),
        Check.HELD: _has(flags, Flag.HOLDS_RH | Flag.HOLDS_LH),
        Check.SEAT_FREE: laden < things.sit,
        Check.BED_FREE: laden < things.lie,
        Check.IS_OPEN: _has(flags, Flag.OPEN),
        Check.IS_CLOSED: _has(flags, Flag.CLOSED),
        Check.IS_ON: _has(flags, Flag.SWITCHED_ON),
        Check.IS_OFF: _has(flags, Flag.SWITCHED_OFF),
        Check.NOT_ON: ~_has(flags, Flag.SWITCHED_ON),
        Check.PLUGGED_IN: _has(flags, Flag.PLUGGED_IN),
        Check.PLUGGED_OUT: _has(flags, Flag.PLUGGED_OUT),
        Check.NOT_PLUGGED_OUT: ~_has(flags, Flag.PLUGGED_OUT),
        Check.GRABBED: state.grabbed[node] >= 0,
        Check.FACED: facing | _has(hit, 1 << (_FACING + 4)),
        Check.SAME_ROOM: room == view.room,
        Check.WATCHABLE: facing | ~resting | _trait(props, Trait.COMPUTER),
        Check.WORN: _has(flags, Flag.ON_IN),
        Check.FOOD_OR_LADEN: edible | (laden > 0),
        Check.FOOD: edible | _has(hit, 1 << (_ON + 4)),
        Check.HAS_ROOM: room >= 0,
        Check.CONNECTED: own_door | _has(view.connected >> there, 1),
        Check.DOORS_OPEN: own_door | _has(view.reach >> there, 1) | (view.nearest[there] == node),
        Check.PRESENT: things.present,
    }
    grabbed = facts[Check.GRABBED]
    for check, true in ((Check.NOT_HELD, ~facts[Check.HELD]), (Check.NOT_GRABBED, ~grabbed)):
        if rules.asks(check):
            facts[check] = true
    target = {
        Check.TARGET_NEAR: near,
        Check.TARGET_OPEN: _has(flags, Flag.OPEN) | ~_trait(props, Trait.CAN_OPEN),
        Check.TARGET_RECIPIENT: _trait(props, Trait.RECIPIENT),
        Check.TARGET_PRESENT: things.present,
    }
    return _pack(facts, 1), _pack(target, 2), room


def _outermost(scene: Scene, state: State, view: _View, node: Array) -> Array:
    """What a node is INSIDE of at last, a room or what is in nothing further; -1 for nothing."""
    outer = _outer(scene, state, view, node)
    for _ in range(_NESTING):
        arrived = (outer < 0) | (_get(scene.room, outer, -1) >= 0)
        outer = jnp.where(arrived, outer, _outer(scene, state, view, outer))
    return outer


def _outer(scene: Scene, state: State, view: _View, node: Array) -> Array:
    """The first node, room or not, that a node is INSIDE; -1 for none (or for no node)."""
    at = jnp.maximum(node, 0)
    parents = scene.inside[at]
    far, _, bits = _far(view, at)
    into = _has(bits, 1 << _INSIDE)
    cut = _cut(_get(state.nodes, parents)) | _cut(state.nodes[at])
    live = (parents >= 0) & ~_has(cut, 1 << _INSIDE)
    mask = _modulus(jnp.sum(live, dtype=jnp.int32) + jnp.sum(into, dtype=jnp.int32))
    ends, members = jnp.concatenate([parents, far]), jnp.concatenate([live, into])
    key = (_get(scene.ids, ends) & mask) << 12 | _get(scene.rank, ends)
    best = _least(jnp.where(members, key, _NO_KEY))
    return jnp.where((node >= 0) & (best != _NO_KEY), scene.by_rank[best & 4095], -1)


def _character_facts(scene: Scene, state: State, view: _View) -> Array:
    """Facts about the character (part of word 2)."""
    me = state.nodes[scene.character]
    sitting, lying = _has(me, Flag.SITTING), _has(me, Flag.LYING)
    right, left = view.hands
    carried = _get(scene.props, right) | _get(scene.props, left)
    facts = {
        Check.FREE_HAND: (right < 0) | (left < 0),
        Check.HOLDS_SOMETHING: (right >= 0) | (left >= 0),
        Check.KNIFE_HELD: _trait(carried, Trait.KNIFE),
        Check.UPRIGHT: ~(sitting | lying),
        Check.NOT_SITTING: ~sitting,
        Check.NOT_LYING: ~lying,
        Check.RESTING: sitting | lying,
        Check.IN_ROOM: view.room >= 0,
    }
    return _pack(facts, 2)


def _stays(rules: Rules, props: Array, about: Array, character: Array) -> Array:
    """Whether FIND looks around (and asks for nearness) instead of walking."""
    near = _has(about, (1 << (Check.NEAR - 32)) | (1 << (Check.WORN - 32)))
    if rules.find_resting:
        near |= _has(character, 1 << (Check.RESTING - 64))
    return near | _trait(props, Trait.BODY_PART)


def _resolve(
    rules: Rules, verb: Array, props: Array, about: Array, puts: Array, character: Array
) -> Array:
    """The row of the rules that a verb means here: FIND of something far away is WALK. `puts` says
    whether PUTOBJBACK would find a place that takes the thing."""
    verb = jnp.where((verb == _FIND) & ~_stays(rules, props, about, character), _WALK, verb)
    if rules.vain_return:
        verb = jnp.where((verb == _PUTOBJBACK) & ~puts, _VAIN_RETURN, verb)
    return jnp.where((verb == _POUR) & _trait(props, Trait.WATER), _POUR_WATER, verb)


def _packed(columns: Sequence[np.ndarray]) -> tuple[np.ndarray, list[tuple[int, int, int, int]]]:
    """Columns of integers as uint32[V, W] and where each is: word, shift, mask, least value. A row
    is one gather of W words, of which each costs as much as one of a column's own."""
    places: list[tuple[int, int, int, int]] = [(0, 0, 0, 0)] * len(columns)
    words: list[np.ndarray] = []
    used: list[int] = []
    lows = [int(column.min()) for column in columns]
    widths = [(int(c.max()) - low).bit_length() for c, low in zip(columns, lows, strict=True)]
    for i in sorted(range(len(columns)), key=lambda i: -widths[i]):
        word = next((k for k, bits in enumerate(used) if bits + widths[i] <= 32), len(used))
        if word == len(used):
            words.append(np.zeros(len(columns[i]), np.uint32))
            used.append(0)
        words[word] |= (columns[i].astype(np.int64) - lows[i]).astype(np.uint32) << used[word]
        places[i] = (word, used[word], (1 << widths[i]) - 1, lows[i])
        used[word] += widths[i]
    return np.stack(words, axis=1), places


def _row_of(columns: Sequence[np.ndarray], row: Array) -> list[Array]:
    """One row of integer columns, each in its own type."""
    table, places = _packed(columns)
    words = jnp.asarray(table)[row]
    return [
        ((words[word] >> shift & mask).astype(jnp.int32) + low).astype(column.dtype)
        for column, (word, shift, mask, low) in zip(columns, places, strict=True)
    ]


def _effect(rules: Rules, row: Array) -> Effect:
    """What a row of the rules does; a row after the last does nothing."""
    ends = (
        np.append(x, np.array(none, x.dtype))
        for x, none in zip(rules.effects, Effect(), strict=True)
    )
    return Effect(*_row_of(list(ends), row))


class Table(NamedTuple):
    """An action table with what never changes of its objects, see `ground`.

    Attributes:
        actions: the table.
        things: its M objects.
        need: uint32[A, 2]. Facts that must hold, without those that never change.
        possible: bool[A]. Whether the facts that never change allow it.
    """

    actions: ActionTable
    things: _Things
    need: Array
    possible: Array


class Look(NamedTuple):
    """What `look` has seen of a state: what is legal, and what `take` needs besides.

    Attributes:
        legal: bool[A].
        about, room: uint32[M], int32[M]. Facts about the table's objects and rooms they are in.
        character: uint32[]. Facts about the character.
    """

    legal: Array
    about: Array
    room: Array
    character: Array
    view: _View


def ground(scene: Scene, actions: ActionTable, rules: Rules = REFERENCE) -> Table:
    """What never changes of a table's objects; to be computed once, outside of loops over states.

    Args:
        scene: one scene.
        actions: table of A actions over M objects.
        rules: rule set.
    """
    scene, actions = jax.tree.map(jnp.asarray, (scene, actions))
    things = _things(scene, actions.objects)
    need = jnp.asarray(rules.need)[actions.verb]
    possible = (_get(scene.props, actions.obj) & need[:, 0]) == need[:, 0]
    return Table(actions, things, need[:, 1:], possible & actions.mask)


def look(
    scene: Scene, state: State, table: Table, rules: Rules = REFERENCE, *, returns: bool = True
) -> Look:
    """Which actions of a table the world would accept.

    Args:
        scene, state: one scene and state.
        table: what `ground` gave, with the same rules.
        rules: rule set.
        returns: False if the table has no PUTOBJBACK; its destinations are not in the table and
            cost two further objects.
    """
    view = _view(scene, state)
    about, as_target, room = _facts(scene, state, view, table.things, rules)
    character = _character_facts(scene, state, view)
    walk = jnp.asarray(rules.need[_WALK])
    can_walk = ((about & walk[1]) == walk[1]) & ((character & walk[2]) == walk[2])
    stays = _stays(rules, table.things.props, about, character)
    findable = jnp.where(stays, _has(about, 1 << (Check.NEAR - 32)), can_walk)
    about |= jnp.where(findable, jnp.uint32(1 << (Check.FINDABLE - 32)), 0)
    if returns:
        back = _returnable(scene, state, view, table.things.node, rules)
        about |= jnp.where(back, jnp.uint32(1 << (Check.RETURNABLE - 32)), 0)
    # Else XLA would compute the facts anew for every action that asks for them.
    about, as_target = settle(about, scene), settle(as_target, scene)
    actions = table.actions
    first = _at(about, jnp.where(actions.obj >= 0, actions.obj_slot, -1))
    second = _at(as_target, jnp.where(actions.target >= 0, actions.target_slot, -1)) | character
    need = table.need
    met = ((first & need[:, 0]) == need[:, 0]) & ((second & need[:, 1]) == need[:, 1])
    return Look(met & table.possible, about, room, character, view)


def _at(values: Array, index: Array) -> Array:
    """`values[index]`, 0 where the index is negative: M comparisons for each, which on a CPU take
    far less time than a gather (measured: a tenth)."""
    numbers = jnp.arange(values.shape[0], dtype=jnp.int32)[:, None]
    return _any((values[:, None], numbers), lambda x, number: jnp.where(number == index, x, 0))


def _returnable(scene: Scene, state: State, view: _View, nodes: Array, rules: Rules) -> Array:
    """bool[M]: whether the place that a held node came from takes it back."""
    stored = _get(state.grabbed, view.hands, -1).astype(jnp.int32)
    origins = _things(scene, jnp.where(stored >= 0, stored >> 2, -1))
    _, origin, _ = _facts(scene, state, view, origins, rules)
    near = _has(origin, 1 << (Check.TARGET_NEAR - 64))
    takes = near & (((stored & 3) != _INSIDE) | _has(origin, 1 << (Check.TARGET_OPEN - 64)))
    return ((nodes[:, None] == view.hands) & takes & (stored >= 0)).any(-1)


def legal(scene: Scene, state: State, actions: ActionTable, rules: Rules = REFERENCE) -> Array:
    """Which actions of a table the world would accept; for one state, see `look` for many.

    Args:
        scene, state: one scene and state.
        actions: table of A actions over M objects.
        rules: rule set.

    Returns:
        bool[A]; padding is False.
    """
    scene, state, actions = jax.tree.map(jnp.asarray, (scene, state, actions))
    return look(scene, state, ground(scene, actions, rules), rules).legal


def take(
    scene: Scene, state: State, table: Table, seen: Look, action: Array, rules: Rules = REFERENCE
) -> State:
    """The state after a legal action of a table; what follows an illegal one is undefined.

    Args:
        scene, state, table, rules: as given to `look`.
        seen: what it returned.
        action: int32[] row of the table.
    """
    actions = table.actions
    verb, obj, target = actions.verb[action], actions.obj[action], actions.target[action]
    slot = actions.obj_slot[action]
    stored = _get(state.grabbed, obj, -1).astype(jnp.int32)
    target = jnp.where(verb == _PUTOBJBACK, stored >> 2, target)
    about = seen.about[slot]
    puts = _has(about, 1 << (Check.RETURNABLE - 32))
    row = _resolve(rules, verb, _get(scene.props, obj), about, puts, seen.character)
    effect = _effect(rules, row)
    return _apply(scene, state, seen.view, effect, obj, target, stored, seen.room[slot], rules)


def step(
    scene: Scene, state: State, verb: Array, obj: Array, target: Array, rules: Rules = REFERENCE
) -> tuple[State, Array]:
    """Tries one action.

    Args:
        scene, state: one scene and state.
        verb: int32[], see `egjax.sim.vocab.VERBS`.
        obj, target: int32[] node indices of the arguments, -1 where the verb takes none.
        rules: rule set.

    Returns:
        The new state and an error number: 0 if the action was accepted, else 1 + the check of
        `egjax.sim.rules` that failed first, and the state is unchanged.
    """
    scene, state = jax.tree.map(jnp.asarray, (scene, state))  # numpy without jit, too
    verb, obj, target = jnp.asarray(verb), jnp.asarray(obj), jnp.asarray(target)
    view = _view(scene, state)
    stored = _get(state.grabbed, obj, -1).astype(jnp.int32)
    put_back = verb == _PUTOBJBACK
    target = jnp.where(put_back & (stored >= 0), stored >> 2, target)
    # One by one: rows of two objects would make loops of two.
    facts = jax.vmap(lambda node: _facts(scene, state, view, _things(scene, node), rules))
    (about, _), (_, as_target), rooms = facts(jnp.stack([obj, target]))
    character = _character_facts(scene, state, view)
    props = _get(scene.props, obj)
    put_open = ((stored & 3) != _INSIDE) | _has(as_target, 1 << (Check.TARGET_OPEN - 64))
    about |= jnp.where(put_open, jnp.uint32(1 << (Check.PUT_OPEN - 32)), 0)
    puts = _has(about, 1 << (Check.HELD - 32)) & put_open
    puts &= _has(as_target, 1 << (Check.TARGET_NEAR - 64))
    row = _resolve(rules, verb, props, about, puts, character)
    (row,) = _settle_all(scene, (row,))
    order = _row_of(list(rules.order.T), row)
    words = _settle_all(scene, (props, about, as_target | character))
    code = jnp.int32(0)
    for check in reversed(order):
        word = jnp.where(check < 64, jnp.where(check < 32, words[0], words[1]), words[2])
        failed = (check >= 0) & ~_has(word >> (check & 31).astype(jnp.uint32), 1)
        code = jnp.where(failed, check + 1, code)
    (row,) = _settle_all(scene, (jnp.where(code == 0, row, len(rules.order)),))
    effect = _effect(rules, row)
    after = _apply(scene, state, view, effect, obj, target, stored, rooms[0], rules)
    return after, code.astype(jnp.int32)


def _row(scene: Scene, state: State, view: _View, node: Array) -> tuple[Array, Array, Array]:
    """uint32[N]: live edges of a node with every other, the overlay left out; the same but for
    those with the character as lanes, and those with the character. (Of the character's own row
    there are no lanes.)"""
    own, flags = node == scene.character, state.nodes[node]
    live = ~_cut(flags) & 255
    own, live, to_me = _settle_all(scene, (own, live * 0x01010101, swap(flags)))
    lanes = scene.edges[node] & ~view.cut & live
    numbers = jnp.arange(lanes.shape[0], dtype=jnp.int32)
    parts = []
    # Joined at last, not first: what is joined is computed once, what follows for every reader.
    for k, mine in enumerate(_parts(state.nodes, 4)):
        at = numbers + k * lanes.shape[0] == scene.character
        part = jnp.where(at, to_me, lanes >> (8 * k) & 255)
        parts.append(jnp.where(own, _own(mine), part))
    return jnp.concatenate(parts), lanes, to_me


def _far(view: _View, node: Array) -> tuple[Array, Array, Array]:
    """Far ends int32[X], their `_words` and bits uint32[X] of added edges, as seen from a
    node; 0 for none."""
    ends = view.ends
    first = ends.source == node
    far = jnp.where(first, ends.sink, ends.source)
    word = jnp.where(first, ends.at_sink, ends.at_source)
    return far, word, _seen(ends, node) & 255


def _origin(
    scene: Scene,
    state: State,
    view: _View,
    edges: tuple[Array, Array, Array],
    node: Array,
    rules: Rules,
) -> Array:
    """Where GRAB takes a thing from, `y·4 + relation`, -1 for nowhere: the first that is no room
    among those it is ON, then INSIDE, then CLOSE to. `edges` as `_row` gives them; the character
    itself is never taken."""
    row, lanes, to_me = edges
    far, far_word, bits = _far(view, node)
    words = view.words

    def of_thing(bits: Array, word: Array) -> Array:
        return jnp.where(_no_room(word), bits, 0)

    kinds = _any((row, words), of_thing) | _any((bits, far_word), of_thing)
    relation = jnp.where(
        _has(kinds, 1 << _ON), _ON, jnp.where(_has(kinds, 1 << _INSIDE), _INSIDE, _CLOSE)
    )
    (relation,) = _settle_all(scene, (relation,))
    shift = relation.astype(jnp.uint32)
    # Bit 8 marks edges that the scene has from the start, for `Rules.new_first`.
    if rules.new_first:
        initial = from_lanes(scene.edges[node]) >> shift & 1
        far_initial = _get(initial, far) << 8
        row, bits = row | initial << 8, bits | far_initial
        counted = _sum(row, lambda x: x >> shift & 1 | x >> 8)
        counted += _sum(bits, lambda x: (x >> shift & 1) & ~(x >> 8))
    else:
        counted = _sum(
            lanes, lambda x: jax.lax.population_count(x >> shift & jnp.uint32(0x01010101))
        )
        counted += (to_me >> shift & 1) + _sum(bits, lambda x: x >> shift & 1)
    (mask,) = _settle_all(scene, (_modulus(counted.astype(jnp.int32)),))

    kept = mask.astype(jnp.uint32) << _ID | 4095

    def order(bits: Array, word: Array) -> Array:
        key = (word & kept | (bits >> 8 << 12)).astype(jnp.int32)
        return jnp.where(((bits >> shift & 1) != 0) & _no_room(word), key, _NO_KEY)

    best = jnp.minimum(_least((row, words), order), _least((bits, far_word), order))
    return jnp.where(best == _NO_KEY, -1, scene.by_rank[best & 4095] * 4 + relation)


def _close_by(
    scene: Scene, state: State, view: _View, row: Array, node: Array, walk: Array, rules: Rules
) -> Array:
    """bool[N]: what walking to a node, if one walks, brings CLOSE besides it and what is carried:
    the containers it is INSIDE, all body parts, and everything ON it if it is a surface (see
    `Rules.open_walk` for the other way)."""
    character, props = scene.character, scene.props[node]
    thing = scene.room < 0
    here = jnp.arange(row.shape[0], dtype=jnp.int32)
    # Which bits of the row count at a node, whatever the step; one bit more is the body's.
    counts = (
        _bits((here != character) & thing, 1 << _INSIDE)
        | _bits(here != character, 1 << (_INSIDE + 4))
        | _bits(_trait(scene.props, Trait.BODY_PART), _BODY)
        | jnp.uint32((1 << _ON) | (1 << (_ON + 4)))
    )
    within = node != character  # else its own INSIDE edges are gone before this is asked
    far, word, bits = _far(view, node)
    outside = _bits(_no_room(word), 1 << _INSIDE) | ~jnp.uint32(1 << _INSIDE)
    if rules.open_walk:
        to_thing = scene.room[node] < 0
        # Walking empties what is carried before it asks what is INSIDE.
        opens = _trait(props, Trait.CAN_OPEN) & ~(view.hands == node).any()
        later = _bits(to_thing, 1 << _INSIDE) | _bits(opens, 1 << (_INSIDE + 4)) | (1 << _ON)
        asked = later | _bits(to_thing, _BODY)
    else:
        later = _bits(_trait(props, Trait.SURFACE), 1 << (_ON + 4)) | (1 << _INSIDE)
        asked = later | _BODY
    asked &= ~_bits(~within, 1 << _INSIDE)
    asked, later = _settle_all(scene, (_bits(walk, asked), _bits(walk, later)))
    wanted = (bits & outside & later) != 0
    # As words of 32 nodes first: fewer comparisons than one for every node.
    words = jnp.arange(here.shape[0] // 32, dtype=jnp.int32)
    bit = jnp.uint32(1) << (far & 31).astype(jnp.uint32)
    marked = _any(jnp.where(wanted[:, None] & (far[:, None] >> 5 == words), bit[:, None], 0))
    marked = settle(marked, scene)
    marked = jnp.repeat(marked, 32) >> (here & 31).astype(jnp.uint32) & 1
    return ((row | _BODY) & counts & asked | marked) != 0


def _added(
    added: Array, view: _View, cut: Array, gone: Array, links: list[tuple[Array, Array, Array]]
) -> tuple[Array, Array]:
    """The overlay after a step.

    Args:
        added: `State.added`.
        cut: int32[2]. Nodes all of whose edges of the relations in `gone` are deleted, or -2.
        gone: uint32[] bits of relations, both directions.
        links: (source, sink, bits) of edges to be added; no bits for none.

    Returns:
        The overlay and whether an edge found no free slot.
    """
    ends = view.ends
    touched = ((ends.source[:, None] == cut) | (ends.sink[:, None] == cut)).any(-1)
    bits = jnp.where(touched, ends.bits & ~gone, ends.bits)
    slots = jnp.arange(bits.shape[0], dtype=jnp.int32)
    pair, overflow = added >> 8, jnp.zeros((), bool)
    for source, sink, new in links:
        # Both orientations of a pair share one slot.
        one, other = source.astype(jnp.uint32), sink.astype(jnp.uint32)
        along = (pair == (one << 12 | other)) & (bits != 0)
        against = (pair == (other << 12 | one)) & (bits != 0) & ~along
        known = _any(along | against)
        free = _least(jnp.where(bits == 0, slots, slots.size))
        fresh = ~known & (new != 0)
        overflow |= fresh & (free == slots.size)
        here = fresh & (slots == free)
        bits |= jnp.where(along | here, new, jnp.where(against, swap(new), 0))
        pair = jnp.where(here, one << 12 | other, pair)
    return jnp.where(bits != 0, pair << 8 | bits, 0), overflow


def _apply(
    scene: Scene,
    state: State,
    view: _View,
    effect: Effect,
    obj: Array,
    target: Array,
    stored: Array,
    obj_room: Array,
    rules: Rules,
) -> State:
    """The state after an accepted action; `obj_room` is the number of the first argument's room."""
    node, other = jnp.maximum(obj, 0), jnp.maximum(target, 0)
    row, *_ = edges = _row(scene, state, view, node)
    me, here = scene.character, jnp.arange(row.shape[0], dtype=jnp.int32)
    origin = _origin(scene, state, view, edges, node, rules)
    link = jnp.where(effect.link == 4, stored & 3, effect.link)
    bond = jnp.where(link >= 0, jnp.uint32(1) << jnp.maximum(link, 0).astype(jnp.uint32), 0)
    bond |= jnp.where((link >= 0) & effect.link_close, jnp.uint32(_BOTH_CLOSE), 0)
    to_character = other == me
    room = jnp.where(effect.walk, _get(scene.room_node, obj_room, -1), -1)
    set_obj = effect.set_obj
    if rules.open_walk:
        set_obj = jnp.where(effect.walk & (scene.room[node] >= 0), 0, set_obj)
    hand = jnp.where(view.hands[0] < 0, Flag.HOLDS_RH.value, Flag.HOLDS_LH.value)
    set_obj |= jnp.where(effect.take, jnp.uint32(hand), 0)
    set_obj |= jnp.where(to_character, swap(bond), 0)
    close = jnp.uint32(Flag.CLOSE_OUT | Flag.CLOSE_IN)
    carried = close | jnp.uint32(Flag.CUT_INSIDE | Flag.CUT_CLOSE | Flag.CUT_FACING)
    took = effect.take & (origin >= 0)
    # What is set, and cleared, at single nodes; -1 for none. Who walks neither takes a thing nor
    # has a second argument, so what is carried has their places.
    walk = effect.walk
    at_obj = _settle_all(scene, (jnp.where(obj >= 0, node, -1), set_obj, effect.clear_obj))
    at_me = _settle_all(scene, (me, effect.set_character, effect.clear_character))
    one, other_one, set_one, set_other, room = _settle_all(
        scene,
        (
            jnp.where(walk, view.hands[0], jnp.where(took, origin >> 2, -1)),
            jnp.where(walk, view.hands[1], jnp.where(target >= 0, other, -1)),
            jnp.where(walk, carried, close),
            jnp.where(walk, carried, effect.set_target),
            room,
        ),
    )
    facing = _bits(effect.face, Flag.FACING_OUT)
    clear_all, facing = _settle_all(scene, (effect.clear_all, facing))
    near = _close_by(scene, state, view, row, node, walk, rules)
    cleared, set_ = clear_all, _bits(near, close)
    set_ |= row & facing  # the same bit in a row and in the flags
    set_ |= _bits(here == one, set_one) | _bits(here == other_one, set_other)
    set_ |= _bits(here == room, Flag.INSIDE_OUT)
    for place, on, off in (at_obj, at_me):
        cleared, set_ = cleared | _bits(here == place, off), set_ | _bits(here == place, on)
    flags = state.nodes & ~cleared | set_
    # The character's own entry holds its edges to itself, seen from both ends.
    own = flags & 15
    flags = jnp.where(here == me, (flags & ~jnp.uint32(0xF0)) | own << 4, flags)

    come_from = _get(scene.room_node, view.room, -1)
    inside = jnp.uint32(1 << _INSIDE)
    # What a step links: its arguments, or its first argument and the room; or, walking, what is
    # carried and the room that the character comes from (see `Rules.carry_along`).
    put = bond != 0
    bond = jnp.where(to_character, 0, bond & ~row[other])
    bond = jnp.where(node == other, bond & 15, bond)
    into = effect.into_room & (come_from >= 0)
    into &= effect.take | ~_has(_get(row, come_from), 1 << _INSIDE)
    right, left = view.hands
    bring = room if rules.carry_along else come_from
    walks = effect.walk & (bring >= 0)
    first = (
        jnp.where(walks, right, node),
        jnp.where(put, other, jnp.where(walks, bring, come_from)),
        jnp.where(put, bond, jnp.where(into | (walks & (right >= 0)), inside, 0)),
    )
    second = (left, bring, jnp.where(walks & (left >= 0) & (left != right), inside, 0))
    gone = jnp.where(effect.walk, 0b1110, jnp.where(effect.take, 0b0111, 0)).astype(jnp.uint32)
    cut = jnp.where(effect.walk, view.hands, jnp.stack([node, jnp.int32(-1)]))
    added, overflow = _added(
        state.added, view, jnp.where(cut >= 0, cut, -2), gone | gone << 4, [first, second]
    )
    place = jnp.where((obj >= 0) & (took | effect.forget), node, -1)
    place, come = _settle_all(scene, (place, jnp.where(took, origin, -1)))
    grabbed = jnp.where(here == place, come.astype(jnp.int16), state.grabbed)
    return State(flags, added, grabbed, state.overflow | overflow)
