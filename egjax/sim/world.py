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


def settle(values: Array, state: State) -> Array:
    """The same values, computed once.

    XLA's CPU compiler fuses a gather or broadcast with what it reads, which is then computed for
    every reader, and drops optimisation barriers; it does not so with an integer division. The
    divisor is 1, which the compiler cannot know.
    """
    one = (1 + (state.nodes[0] >> 31)).astype(values.dtype)  # no flag uses bit 31
    return jax.lax.div(values, jnp.broadcast_to(one, values.shape))


def _settle_all(state: State, values: Sequence[Array]) -> list[Array]:
    """Numbers and bools computed once, of which a loop over nodes asks at every node."""
    words = settle(jnp.stack([jnp.asarray(x).astype(jnp.uint32) for x in values]), state)
    return [word.astype(jnp.asarray(x).dtype) for word, x in zip(words, values, strict=True)]


def _bits(where: Array, flags: Array | int) -> Array:
    return jnp.where(where, jnp.asarray(flags, jnp.uint32), jnp.uint32(0))


def _any(bits: Array | tuple[Array, ...], of: Callable[..., Array] = lambda x: x) -> Array:
    return fold(bits, jnp.bitwise_or, of)


def _sum(values: Array | tuple[Array, ...], of: Callable[..., Array] = lambda x: x) -> Array:
    return fold(values, jnp.add, of)


def _least(values: Array | tuple[Array, ...], of: Callable[..., Array] = lambda x: x) -> Array:
    return fold(values, jnp.minimum, of)


def to_lanes(row: Array) -> Array:
    """uint32[N] of bytes as uint32[N/4] of four bytes each, as in `Scene.edges`."""
    quarter = row.shape[0] // 4
    parts = [row[k * quarter : (k + 1) * quarter] << (8 * k) for k in range(4)]
    return parts[0] | parts[1] | parts[2] | parts[3]


def from_lanes(lanes: Array) -> Array:
    """The inverse of `to_lanes`."""
    return jnp.concatenate([lanes >> (8 * k) & 255 for k in range(4)])


def any_byte(lanes: Array | tuple[Array, ...], of: Callable[..., Array] = lambda x: x) -> Array:
    """The bits set in any of the bytes of uint32[L, ...]; `of` as in `fold`."""
    word = _any(lanes, of)
    word = word | word >> 16
    return (word | word >> 8) & 255


class _Ends(NamedTuple):
    """The overlay of added edges, unpacked, with what is asked of both ends; -1 for a free slot."""

    source: Array
    sink: Array
    bits: Array
    source_ask: Array
    sink_ask: Array
    source_room: Array
    sink_room: Array
    source_id: Array
    sink_id: Array


class _View(NamedTuple):
    """What every question to a state needs, computed once a state.

    `cut` are the cut relations of each node, both directions; `ask` the bits of a node's row that
    answer near, faced, enclosed and laden with food; lanes leave out cut edges. `room` is the
    number of the character's room, `reach` and `connected` masks of the rooms that (open) doors
    lead to, `nearest` the nearest closed door on the way to each room.
    """

    cut: Array
    ask: Array
    ask_lanes: Array
    on_lanes: Array
    ends: _Ends
    hands: Array
    room: Array
    reach: Array
    connected: Array
    nearest: Array


def _modulus(count: Array) -> Array:
    """m - 1 for a set with `count` members."""
    low, middle, high = TIE_LIMITS
    return jnp.where(
        count > low, jnp.where(count > middle, jnp.where(count > high, 511, 127), 31), 7
    )


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


def _ends(scene: Scene, state: State, ask: Array) -> _Ends:
    bits = state.added & 255
    source = (state.added >> 20).astype(jnp.int32)
    sink = (state.added >> 8 & 4095).astype(jnp.int32)
    return _Ends(
        source=jnp.where(bits != 0, source, -1),
        sink=jnp.where(bits != 0, sink, -1),
        bits=bits,
        source_ask=ask[source],
        sink_ask=ask[sink],
        source_room=scene.room[source],
        sink_room=scene.room[sink],
        source_id=scene.ids[source],
        sink_id=scene.ids[sink],
    )


def _view(scene: Scene, state: State) -> _View:
    flags = state.nodes
    cut = flags >> 10 & 15
    cut = cut | cut << 4
    near = _has(flags, Flag.CLOSE_OUT)
    closed = _has(flags, Flag.CLOSED) & (scene.room < 0)
    ask = (
        jnp.where(near, jnp.uint32((1 << _ON) | (1 << (_CLOSE + 4))), 0)
        | jnp.where(_has(flags, Flag.FACING_OUT), jnp.uint32(1 << (_FACING + 4)), 0)
        | jnp.where(closed, jnp.uint32(1 << _INSIDE), 0)
        | jnp.where(_trait(scene.props, Trait.EATABLE), jnp.uint32(1 << (_ON + 4)), 0)
    )
    places = jnp.arange(flags.shape[0])
    first = [
        _least(
            (flags, places), lambda x, place, hand=hand: jnp.where(_has(x, hand), place, _NO_KEY)
        )
        for hand in (Flag.HOLDS_RH, Flag.HOLDS_LH)
    ]
    hands = [jnp.where(place == _NO_KEY, -1, place) for place in first]
    inside = flags >> _INSIDE & 1
    here = _get(inside, scene.room_node) != 0
    mask = _modulus(_sum(flags, lambda x: x >> _INSIDE & 1))
    numbers = jnp.arange(here.shape[0])
    room_ids = _get(scene.ids, scene.room_node)
    key = _least(jnp.where(here, (room_ids & mask) << 5 | numbers, _NO_KEY))
    room = jnp.where(key == _NO_KEY, -1, key & 31)
    *hands, room = _settle_all(state, (*hands, room))
    door_closed = _has(_get(flags, scene.door_node), Flag.CLOSED)
    start = jnp.maximum(room, 0)
    path = scene.door_path[start]
    blocked = (path >= 0) & door_closed[path]
    barrier = jnp.argmax(blocked, -1)[:, None]
    nearest = _get(scene.door_node, jnp.take_along_axis(path, barrier, -1)[:, 0], -1)
    linked = scene.connected[start].astype(jnp.uint32) << numbers.astype(jnp.uint32)
    connected = jnp.where(room >= 0, _any(linked), 0)
    reach = _reachable(scene, room, door_closed)
    reach, connected = _settle_all(state, (reach, connected))
    return _View(
        cut=cut,
        ask=ask,
        ask_lanes=to_lanes(ask & ~cut),
        on_lanes=to_lanes(~cut & (16 << _ON)),
        ends=_ends(scene, state, ask),
        hands=jnp.stack(hands),
        room=room,
        reach=reach,
        connected=connected,
        nearest=jnp.where(blocked.any(-1), nearest, -1),
    )


class _Things(NamedTuple):
    """What never changes of M nodes.

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


def _things(scene: Scene, nodes: Array) -> _Things:
    present = (nodes >= 0) & (_get(scene.ids, nodes, -1) >= 0)
    node = jnp.maximum(nodes, 0)
    props = scene.props[node]
    parents = scene.inside[node].T
    mine = (scene.door_node[:, None] == node) & (scene.door_node >= 0)[:, None]
    between = _any(jnp.where(mine, scene.door_between[:, None], 0))
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


def _edge(ends: _Ends, node: Array) -> Array:
    """Bits of an added edge as seen from a node, 0 where it is not one of its."""
    back = jnp.where(ends.sink == node, swap(ends.bits), 0)
    return jnp.where(ends.source == node, ends.bits, 0) | back


def _columns(view: _View) -> _Ends:
    return _Ends(*(x[:, None] for x in view.ends))


def _later(view: _View, node: Array) -> tuple[Array, Array, Array]:
    """What edges added later say of nodes, all [M]: the bits of `_View.ask` that they answer, how
    many things they put ON a node, and how many nodes it is INSIDE."""

    def answers(*row: Array) -> Array:
        ends = _Ends(*row)
        far = jnp.where(ends.source == node, ends.sink_ask, ends.source_ask)
        return _edge(ends, node) & far

    def counted(*row: Array) -> Array:
        bits = _edge(_Ends(*row), node)
        return (bits >> (_ON + 4) & 1) | (bits >> _INSIDE & 1) << 16

    counts = _sum(_columns(view), counted).astype(jnp.int32)
    return _any(_columns(view), answers), counts & 0xFFFF, counts >> 16


def _room_key(inside: Array, room: Array, number: Array, mask: Array) -> Array:
    """Order of a room, by its graph id, among what a node is INSIDE; the room's number is in it."""
    return jnp.where(inside & (room >= 0), (number & mask) << 5 | room, _NO_KEY)


def _later_room(view: _View, node: Array, mask: Array) -> Array:
    """The least key [M] of a room that nodes are INSIDE by an edge added later."""

    def key(*row: Array) -> Array:
        ends = _Ends(*row)
        first = ends.source == node
        room = jnp.where(first, ends.sink_room, ends.source_room)
        number = jnp.where(first, ends.sink_id, ends.source_id)
        return _room_key(_has(_edge(ends, node), 1 << _INSIDE), room, number, mask)

    return _least(_columns(view), key)


def _facts(
    scene: Scene, state: State, view: _View, things: _Things, rules: Rules
) -> tuple[Array, Array, Array]:
    """Facts about nodes as first argument (word 1) and as second (part of word 2), and the number
    of the room they are in, -1 for none. All [M]."""
    node, props = things.node, things.props
    flags, cut = state.nodes[node], view.cut[node]
    mine = node == scene.character
    me = scene.character
    to_me = jnp.where(mine, 0, swap(flags & 255))

    # Edges that the scene has from the start, as far as they are not cut.
    hit = any_byte((things.lanes, view.ask_lanes[:, None]), jnp.bitwise_and) & ~cut
    on_it = _sum(
        (things.lanes, view.on_lanes[:, None]),
        lambda row, on: jax.lax.population_count(row & on),
    )
    laden = jnp.where(_has(cut, 16 << _ON), 0, on_it).astype(jnp.int32)
    # The character's own edges stand in the flags of the others.
    own_hit = _any((state.nodes, view.ask), lambda x, ask: x & ask & 255)
    own_laden = _sum(state.nodes, lambda x: x >> 4 & 1).astype(jnp.int32)
    hit = jnp.where(mine, own_hit, hit) | (to_me & view.ask[me])
    laden = jnp.where(mine, own_laden, laden) + (to_me >> 4 & 1).astype(jnp.int32)
    answers, on_later, inside_later = _later(view, node)
    hit, laden = hit | answers, laden + on_later

    parents = things.parents
    live = (parents >= 0) & ~_has(_get(view.cut, parents) | cut, 1 << _INSIDE)
    members = inside_later + _sum(live.astype(jnp.int32)) + _has(flags, Flag.INSIDE_IN)
    mask = settle(_modulus(members), state)
    key = jnp.minimum(
        _least(
            (live, things.parent_room, things.parent_id),
            lambda inside, room, number: _room_key(inside, room, number, mask),
        ),
        _later_room(view, node, mask),
    )
    room = jnp.where(key == _NO_KEY, -1, key & 31)
    if rules.nested_rooms:
        outermost = jax.vmap(lambda node: _outermost(scene, view, node))(node)
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


def _outermost(scene: Scene, view: _View, node: Array) -> Array:
    """What a node is INSIDE of at last, a room or what is in nothing further; -1 for nothing."""
    outer = _outer(scene, view, node)
    for _ in range(_NESTING):
        arrived = (outer < 0) | (_get(scene.room, outer, -1) >= 0)
        outer = jnp.where(arrived, outer, _outer(scene, view, outer))
    return outer


def _outer(scene: Scene, view: _View, node: Array) -> Array:
    """The first node, room or not, that a node is INSIDE; -1 for none (or for no node)."""
    at = jnp.maximum(node, 0)
    parents = scene.inside[at]
    far, bits = _far(view, at)
    into = _has(bits, 1 << _INSIDE)
    live = (parents >= 0) & ~_has(_get(view.cut, parents) | view.cut[at], 1 << _INSIDE)
    mask = _modulus(live.sum() + into.sum())
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


def _effect(rules: Rules, row: Array) -> Effect:
    """One row of the effects, gathered at once: a gather a column costs as much for each."""
    columns = [np.asarray(column) for column in rules.effects]
    numbers = jnp.asarray(np.stack([x.astype(np.uint32) for x in columns], axis=1))[row]
    return Effect(*(numbers[i].astype(x.dtype) for i, x in enumerate(columns)))


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
    about, as_target = settle(about, state), settle(as_target, state)
    actions = table.actions
    first = _at(about, jnp.where(actions.obj >= 0, actions.obj_slot, -1))
    second = _at(as_target, jnp.where(actions.target >= 0, actions.target_slot, -1)) | character
    need = table.need
    met = ((first & need[:, 0]) == need[:, 0]) & ((second & need[:, 1]) == need[:, 1])
    return Look(met & table.possible, about, room, character, view)


def _at(values: Array, index: Array) -> Array:
    """`values[index]`, 0 where the index is negative: M comparisons for each, which on a CPU take
    far less time than a gather (measured: a tenth)."""
    numbers = jnp.arange(values.shape[0])[:, None]
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
    things = _things(scene, jnp.stack([obj, target]))
    abouts, targets, rooms = _facts(scene, state, view, things, rules)
    about, as_target = abouts[0], targets[1]
    character = _character_facts(scene, state, view)
    props = _get(scene.props, obj)
    put_open = ((stored & 3) != _INSIDE) | _has(as_target, 1 << (Check.TARGET_OPEN - 64))
    about |= jnp.where(put_open, jnp.uint32(1 << (Check.PUT_OPEN - 32)), 0)
    puts = _has(about, 1 << (Check.HELD - 32)) & put_open
    puts &= _has(as_target, 1 << (Check.TARGET_NEAR - 64))
    row = _resolve(rules, verb, props, about, puts, character)
    order = jnp.asarray(rules.order)[row]
    word = jnp.where(order < 64, jnp.where(order < 32, props, about), as_target | character)
    failed = (order >= 0) & ~_has(word >> (order & 31).astype(jnp.uint32), 1)
    code = jnp.where(failed.any(), order[jnp.argmax(failed)] + 1, 0)
    effect = _effect(rules, row)
    after = _apply(scene, state, view, effect, obj, target, stored, rooms[0], rules)
    after = jax.tree.map(lambda new, old: jnp.where(code == 0, new, old), after, state)
    return after, code.astype(jnp.int32)


def _row(scene: Scene, state: State, view: _View, node: Array) -> Array:
    """uint32[N]: live edges of a node with every other, the overlay left out."""
    row = from_lanes(scene.edges[node]) & ~(view.cut | view.cut[node])
    row = jnp.where(jnp.arange(row.shape[0]) == scene.character, swap(state.nodes[node]), row)
    return jnp.where(node == scene.character, _own(state.nodes), row)


def _far(view: _View, node: Array) -> tuple[Array, Array]:
    """Far ends int32[X] and bits uint32[X] of added edges, as seen from a node; 0 for none."""
    ends = view.ends
    first, second = ends.source == node, ends.sink == node
    bits = jnp.where(first, ends.bits, 0) | jnp.where(second, swap(ends.bits), 0)
    return jnp.where(first, ends.sink, ends.source), bits


def _origin(
    scene: Scene, state: State, view: _View, row: Array, node: Array, rules: Rules
) -> Array:
    """Where GRAB takes a thing from, `y·4 + relation`, -1 for nowhere: the first that is no room
    among those it is ON, then INSIDE, then CLOSE to."""
    far, bits = _far(view, node)
    far_room = _get(scene.room, far)

    def of_thing(bits: Array, room: Array) -> Array:
        return jnp.where(room < 0, bits, 0)

    kinds = _any((row, scene.room), of_thing) | _any((bits, far_room), of_thing)
    relation = jnp.where(
        _has(kinds, 1 << _ON), _ON, jnp.where(_has(kinds, 1 << _INSIDE), _INSIDE, _CLOSE)
    )
    (relation,) = _settle_all(state, (relation,))
    shift = relation.astype(jnp.uint32)
    # Bit 8 marks edges that the scene has from the start, for `Rules.new_first`.
    if rules.new_first:
        initial = from_lanes(scene.edges[node]) >> shift & 1
        far_initial = _get(initial, far) << 8
        row, bits = row | initial << 8, bits | far_initial
        counted = _sum(row, lambda x: x >> shift & 1 | x >> 8)
        counted += _sum(bits, lambda x: (x >> shift & 1) & ~(x >> 8))
    else:
        counted = _sum(row, lambda x: x >> shift & 1) + _sum(bits, lambda x: x >> shift & 1)
    (mask,) = _settle_all(state, (_modulus(counted.astype(jnp.int32)),))

    def order(bits: Array, room: Array, number: Array, rank: Array) -> Array:
        key = ((number & mask) << 1 | (bits >> 8).astype(jnp.int32)) << 12 | rank
        return jnp.where(((bits >> shift & 1) != 0) & (room < 0), key, _NO_KEY)

    best = jnp.minimum(
        _least((row, scene.room, scene.ids, scene.rank), order),
        _least((bits, far_room, _get(scene.ids, far), _get(scene.rank, far)), order),
    )
    return jnp.where(best == _NO_KEY, -1, scene.by_rank[best & 4095] * 4 + relation)


def _close_by(
    scene: Scene, state: State, view: _View, row: Array, node: Array, rules: Rules
) -> Array:
    """bool[N]: what walking to a node brings CLOSE besides it and what is carried: the containers
    it is INSIDE, all body parts, and everything ON it if it is a surface (see `Rules.open_walk`
    for the other way)."""
    surface = _trait(scene.props[node], Trait.SURFACE)
    here = jnp.arange(row.shape[0])
    container = _has(row, 1 << _INSIDE) & (scene.room < 0) & (here != scene.character)
    container &= node != scene.character  # its own INSIDE edges are gone before this is asked
    body = _trait(scene.props, Trait.BODY_PART)
    far, bits = _far(view, node)
    wanted = _has(bits, 1 << _INSIDE) & (_get(scene.room, far) < 0)
    if rules.open_walk:
        to_thing = scene.room[node] < 0
        container, body, wanted = container & to_thing, body & to_thing, wanted & to_thing
        # Walking empties what is carried before it asks what is INSIDE.
        opens = _trait(scene.props[node], Trait.CAN_OPEN) & ~(view.hands == node).any()
        within = _has(row, 1 << (_INSIDE + 4)) & opens & (here != scene.character)
        near = container | within | _has(row, 1 << _ON)
        wanted |= _has(bits, 1 << _ON) | (_has(bits, 1 << (_INSIDE + 4)) & opens)
    else:
        near = container | (_has(row, 1 << (_ON + 4)) & surface)
        wanted |= _has(bits, 1 << (_ON + 4)) & surface
    # As words of 32 nodes first: fewer comparisons than one for every node.
    words = jnp.arange(here.shape[0] // 32)
    bit = jnp.uint32(1) << (far & 31).astype(jnp.uint32)
    marked = _any(jnp.where(wanted[:, None] & (far[:, None] >> 5 == words), bit[:, None], 0))
    marked = settle(marked, state)
    near |= (jnp.repeat(marked, 32) >> (here & 31).astype(jnp.uint32) & 1) != 0
    return near | body


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
    slots = jnp.arange(bits.shape[0])
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
    row = _row(scene, state, view, node)
    me, here = scene.character, jnp.arange(row.shape[0])
    origin = _origin(scene, state, view, row, node, rules)
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
    # What is set, and cleared, at single nodes; -1 for none.
    points = (
        (jnp.where(obj >= 0, node, -1), set_obj, effect.clear_obj),
        (jnp.where(target >= 0, other, -1), effect.set_target, jnp.uint32(0)),
        (me, effect.set_character, effect.clear_character),
        (jnp.where(effect.walk, view.hands[0], -1), carried, jnp.uint32(0)),
        (jnp.where(effect.walk, view.hands[1], -1), carried, jnp.uint32(0)),
        (jnp.where(took, origin >> 2, -1), close, jnp.uint32(0)),
        (room, jnp.uint32(Flag.INSIDE_OUT), jnp.uint32(0)),
    )
    points = [_settle_all(state, point) for point in points]
    clear_all, walk, face = _settle_all(state, (effect.clear_all, effect.walk, effect.face))
    cleared, set_ = clear_all, _bits(walk & _close_by(scene, state, view, row, node, rules), close)
    set_ |= _bits(face & _has(row, 1 << _FACING), Flag.FACING_OUT)
    for place, on, off in points:
        at = here == place
        cleared, set_ = cleared | _bits(at, off), set_ | _bits(at, on)
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
    place, come = _settle_all(state, (place, jnp.where(took, origin, -1)))
    grabbed = jnp.where(here == place, come.astype(jnp.int16), state.grabbed)
    return State(flags, added, grabbed, state.overflow | overflow)
