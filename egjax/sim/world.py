"""The household's dynamics as pure functions of one scene and one state; batch them with vmap.

Semantics are those of a rule set (`egjax.sim.rules`; by default VirtualHome's evolving graph at tag
v1.0.0), with every object counted as found and the tie rule for "the first of several nodes": the
members of a set of n nodes are taken by (id mod m, id), m = 8, 32, 128, 512 for n up to 4, 18, 76,
more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from egjax.sim.graph import TIE_LIMITS
from egjax.sim.rules import REFERENCE, Check, Effect, Rules
from egjax.sim.vocab import VERB_INDEX, VERBS, Flag, Trait
from egjax.types import ActionTable, Scene, State

__all__ = ["legal", "step"]

_ON, _INSIDE, _CLOSE, _FACING = 0, 1, 2, 3
_FIND, _WALK, _POUR = VERB_INDEX["FIND"], VERB_INDEX["WALK"], VERB_INDEX["POUR"]
_PUTOBJBACK = VERB_INDEX["PUTOBJBACK"]
_POUR_WATER = len(VERBS)
_VAIN_RETURN = len(VERBS) + 1
_NESTING = 4  # containers in containers that the search for a room looks through
_NO_KEY = jnp.iinfo(jnp.int32).max


def _has(word: Array, bit: int) -> Array:
    """Whether a flag (a power of two) or trait word has the bit, as bool."""
    return (word & jnp.asarray(bit, word.dtype)) != 0


def _trait(props: Array, trait: Trait) -> Array:
    return _has(props, 1 << trait)


def _get(values: Array, index: Array, absent: int = 0) -> Array:
    """`values[index]`, or `absent` where the index is negative."""
    value = values[jnp.maximum(index, 0)]
    return jnp.where(index >= 0, value, jnp.asarray(absent, values.dtype))


def _swap(row: Array) -> Array:
    """The four outgoing bits for the four incoming ones and back."""
    return ((row & 15) << 4) | (row >> 4 & 15)


class _View(NamedTuple):
    """What every question to a state needs, computed once a state.

    `source`, `sink`, `relation` unpack the overlay of added edges (source -1 for a free slot);
    `sink_keys` are the keys of those ends that are rooms. `reach` is the bit mask of rooms that
    open doors lead to, `ask` the bits of a node's row that answer near, faced, enclosed and laden
    with food, `on` those that say what is ON it, `own` the character's row; lanes leave out cut
    edges.
    """

    cut: Array
    ask: Array
    ask_lanes: Array
    on_lanes: Array
    own_lanes: Array
    source: Array
    sink: Array
    relation: Array
    source_ask: Array
    sink_ask: Array
    sink_room: Array
    sink_keys: Array
    hands: Array
    room: Array
    room_number: Array
    reach: Array
    door_closed: Array


def _modulus(count: Array) -> Array:
    """Row of `Scene.order` for a set with `count` members."""
    return sum((count > limit).astype(jnp.int32) for limit in TIE_LIMITS)  # type: ignore[return-value]


def _pick(keys: Array) -> Array:
    """The node with the least key of `Scene.order`, -1 where all are absent."""
    best = keys.min()
    return jnp.where(best == _NO_KEY, -1, best & 4095)


def _first_hand(flags: Array, hand: int) -> Array:
    held = _has(flags, hand)
    first = jnp.argmax(held)
    return jnp.where(held[first], first, -1).astype(jnp.int32)


def _room_of_character(scene: Scene, flags: Array) -> Array:
    inside = _has(flags, Flag.INSIDE_OUT)
    keys = scene.order[_modulus(_count(to_lanes(inside.astype(jnp.uint8))))]
    return _pick(jnp.where(inside & (scene.room >= 0), keys, _NO_KEY))


def _reachable(scene: Scene, start: Array, closed: Array) -> Array:
    """Bit mask of the rooms that open doors lead to from room number `start`."""
    a, b = scene.door_rooms[:, 0], scene.door_rooms[:, 1]
    one = jnp.uint32(1)
    bit_a = one << jnp.maximum(a, 0).astype(jnp.uint32)
    bit_b = one << jnp.maximum(b, 0).astype(jnp.uint32)
    usable = (a >= 0) & ~closed
    reach = jnp.where(start >= 0, one << jnp.maximum(start, 0).astype(jnp.uint32), 0)
    # A room is reached after at most R-1 doors; R and D are small, so the loop unrolls.
    for _ in range(scene.connected.shape[-1] - 1):
        for d in range(a.shape[0]):
            both = bit_a[d] | bit_b[d]
            reach = jnp.where(usable[d] & ((reach & both) != 0), reach | both, reach)
    return reach


def _view(scene: Scene, state: State) -> _View:
    flags = state.nodes
    cut = ((flags >> 10) & 15).astype(jnp.uint8)
    cut = cut | cut << 4
    closed = _has(flags, Flag.CLOSED) & (scene.room < 0)
    near = _has(flags, Flag.CLOSE_OUT)
    ask = (
        jnp.where(near, (1 << _ON) | (1 << (_CLOSE + 4)), 0)
        | jnp.where(_has(flags, Flag.FACING_OUT), 1 << (_FACING + 4), 0)
        | jnp.where(closed, 1 << _INSIDE, 0)
        | jnp.where(_trait(scene.props, Trait.EATABLE), 1 << (_ON + 4), 0)
    ).astype(jnp.uint8)
    used = state.added >= 0
    source = jnp.where(used, state.added >> 16, -1)
    sink = jnp.where(used, (state.added >> 4) & 4095, -1)
    hands = jnp.stack([_first_hand(flags, Flag.HOLDS_RH), _first_hand(flags, Flag.HOLDS_LH)])
    room = _room_of_character(scene, flags)
    number = _get(scene.room, room, -1)
    door_closed = _has(_get(flags, scene.door_node), Flag.CLOSED)
    return _View(
        cut=cut,
        ask=ask,
        ask_lanes=to_lanes(ask & ~cut),
        on_lanes=to_lanes(~cut & (16 << _ON)),
        own_lanes=to_lanes(flags.astype(jnp.uint8)),
        source=source,
        sink=sink,
        relation=state.added & 15,
        source_ask=_get(ask, source),
        sink_ask=_get(ask, sink),
        sink_room=_get(scene.room, sink, -1),
        sink_keys=jnp.where(
            _get(scene.room, sink, -1) >= 0, scene.order[:, jnp.maximum(sink, 0)], _NO_KEY
        ),
        hands=hands,
        room=room,
        room_number=number,
        reach=_reachable(scene, number, door_closed),
        door_closed=door_closed,
    )


def _room_of(scene: Scene, state: State, view: _View, node: Array, rules: Rules) -> Array:
    """The room a node is in (itself for a room), -1 for none."""
    parents = scene.inside[node]
    base = (parents >= 0) & ~_has(_get(view.cut, parents) | view.cut[node], 1 << _INSIDE)
    extra = (view.source == node) & (view.relation == _INSIDE)
    count = base.sum() + extra.sum() + _has(state.nodes[node], Flag.INSIDE_IN)
    modulus = _modulus(count)
    keys = scene.order[modulus, jnp.maximum(parents, 0)]
    keys = jnp.where(base & (_get(scene.room, parents, -1) >= 0), keys, _NO_KEY).min()
    extra_keys = jnp.where(extra, view.sink_keys[modulus], _NO_KEY).min()
    room = _pick(jnp.minimum(keys, extra_keys))
    if rules.nested_rooms:
        outer = _outer(scene, state, view, node)
        for _ in range(_NESTING):
            arrived = (outer < 0) | (_get(scene.room, outer, -1) >= 0)
            outer = jnp.where(arrived, outer, _outer(scene, state, view, outer))
        found = (count == 1) & (_get(scene.room, outer, -1) >= 0)
        room = jnp.where(found, outer, room)
    room = jnp.where(node == scene.character, view.room, room)
    return jnp.where(scene.room[node] >= 0, node, room)


def _outer(scene: Scene, state: State, view: _View, node: Array) -> Array:
    """The first node, room or not, that a node is INSIDE; -1 for none (or for no node)."""
    at = jnp.maximum(node, 0)
    parents = scene.inside[at]
    base = (parents >= 0) & ~_has(_get(view.cut, parents) | view.cut[at], 1 << _INSIDE)
    extra = (view.source == at) & (view.relation == _INSIDE)
    order = scene.order[_modulus(base.sum() + extra.sum())]
    keys = jnp.where(base, order[jnp.maximum(parents, 0)], _NO_KEY).min()
    extra_keys = jnp.where(extra, order[jnp.maximum(view.sink, 0)], _NO_KEY).min()
    return jnp.where(node >= 0, _pick(jnp.minimum(keys, extra_keys)), -1)


def _row(scene: Scene, state: State, view: _View, node: Array) -> Array:
    """uint8[N]: live edges of a node with every other, the overlay left out (see `Scene.edges`)."""
    row = scene.edges[node] & ~(view.cut | view.cut[node])
    row = row.at[scene.character].set(_swap(state.nodes[node]).astype(jnp.uint8))
    return jnp.where(node == scene.character, state.nodes.astype(jnp.uint8), row)


def to_lanes(row: Array) -> Array:
    """uint8[..., N] as uint32[..., N/4]: on a CPU one word does the work of four bytes."""
    return jax.lax.bitcast_convert_type(
        row.reshape(*row.shape[:-1], row.shape[-1] // 4, 4), jnp.uint32
    )


def _fold(lanes: Array, combine: Callable[[Array, Array], Array]) -> Array:
    """Reduces the last axis by halving; XLA's own reduction of small integers is not vectorised on
    a CPU (measured: 20 times slower)."""
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        rest = lanes[..., 2 * half :]
        lanes = combine(lanes[..., :half], lanes[..., half : 2 * half])
        if rest.shape[-1]:
            lanes = jnp.concatenate([combine(lanes[..., :1], rest), lanes[..., 1:]], -1)
    return lanes[..., 0]


def any_bits(lanes: Array) -> Array:
    """uint8[...]: the bits set in any of the bytes of uint32[..., L]."""
    word = _fold(lanes, jnp.bitwise_or)
    word = word | word >> 16
    return (word | word >> 8).astype(jnp.uint8)


def _count(lanes: Array) -> Array:
    """int32[...]: how many bits are set in uint32[..., L]."""
    return _fold(jax.lax.population_count(lanes), jnp.add).astype(jnp.int32)


def _or(bits: Array) -> Array:
    """The bits set in any entry of uint8[X], X a small number."""
    return _fold(bits, jnp.bitwise_or)


def _pack(facts: Mapping[Check, Array], word: int) -> Array:
    """Bools as bits of one word; the keys are checks."""
    low = 32 * word
    total = jnp.uint32(0)
    for check, true in facts.items():
        if low <= check < low + 32:
            total = total | jnp.where(true, jnp.uint32(1 << (check - low)), jnp.uint32(0))
    return total


def _object_facts(
    scene: Scene, state: State, view: _View, node: Array, rules: Rules
) -> tuple[Array, Array]:
    """Facts about a node as first argument (word 1) and as second (part of word 2)."""
    present = (node >= 0) & (_get(scene.ids, node, -1) >= 0)
    node = jnp.maximum(node, 0)
    flags, props = state.nodes[node], scene.props[node]
    mine = node == scene.character
    lanes = jnp.where(mine, view.own_lanes, to_lanes(scene.edges[node]))
    alive = jnp.where(mine, jnp.uint8(255), ~view.cut[node])
    to_me = jnp.where(mine, jnp.uint8(0), _swap(flags).astype(jnp.uint8))
    from_node = (view.source == node) & (view.relation < 4)
    to_node = (view.sink == node) & (view.relation < 4)
    shift = view.relation.astype(jnp.uint8)
    ask = jnp.where(mine, to_lanes(view.ask), view.ask_lanes)
    hit = (any_bits(lanes & ask) & alive) | (to_me & view.ask[scene.character])
    hit |= _or(jnp.where(from_node, (jnp.uint8(1) << shift) & view.sink_ask, 0))
    hit |= _or(jnp.where(to_node, (jnp.uint8(16) << shift) & view.source_ask, 0))
    on = jnp.where(mine, jnp.uint32(0x10101010), view.on_lanes)
    laden = jnp.where(_has(alive, 16 << _ON), _count(lanes & on), 0)
    laden += _has(to_me, 16 << _ON).astype(jnp.int32)
    laden += (to_node & (view.relation == _ON)).sum()
    near = _has(flags, Flag.CLOSE_OUT) | _has(hit, (1 << _ON) | (1 << (_CLOSE + 4)))
    room = _room_of(scene, state, view, node, rules)
    number = _get(scene.room, room, -1)
    resting = _has(state.nodes[scene.character], Flag.SITTING | Flag.LYING)
    facing = _has(flags, Flag.FACING_OUT)
    own_door = _own_door(scene, view, node, props)
    path = scene.door_path[jnp.maximum(view.room_number, 0), jnp.maximum(number, 0)]
    blocked = (path >= 0) & view.door_closed[path]
    nearest = _get(scene.door_node, path[jnp.argmax(blocked)])
    reached = _has(view.reach >> jnp.maximum(number, 0).astype(jnp.uint32), 1)
    edible = _trait(props, Trait.EATABLE)
    open_enough = _has(flags, Flag.OPEN) | ~_trait(props, Trait.CAN_OPEN)
    held = _has(flags, Flag.HOLDS_RH | Flag.HOLDS_LH)
    facts = {
        Check.NEAR: near,
        Check.ACCESSIBLE: ~_has(hit, 1 << _INSIDE),
        Check.HELD: held,
        Check.SEAT_FREE: laden < scene.sit_capacity[node],
        Check.BED_FREE: laden < scene.lie_capacity[node],
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
        Check.CONNECTED: own_door | scene.connected[view.room_number, number],
        Check.DOORS_OPEN: own_door | reached | (blocked.any() & (nearest == node)),
        Check.PRESENT: present,
    }
    for check, true in ((Check.NOT_HELD, ~held), (Check.NOT_GRABBED, state.grabbed[node] < 0)):
        if rules.asks(check):
            facts[check] = true
    target = {
        Check.TARGET_NEAR: near,
        Check.TARGET_OPEN: open_enough,
        Check.TARGET_RECIPIENT: _trait(props, Trait.RECIPIENT),
        Check.TARGET_PRESENT: present,
    }
    return _pack(facts, 1), _pack(target, 2)


def _own_door(scene: Scene, view: _View, node: Array, props: Array) -> Array:
    """Whether a node is a door or doorjamb of the character's room."""
    mine = (scene.door_node == node) & (scene.door_node >= 0)
    rooms = jnp.where(mine, scene.door_between, 0).max()
    here = _has(rooms >> jnp.maximum(view.room_number, 0).astype(jnp.uint32), 1)
    return _trait(props, Trait.DOOR) & (view.room_number >= 0) & here


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
    rules: Rules, verb: Array, props: Array, about: Array, as_target: Array, character: Array
) -> Array:
    """The row of the rules that a verb means here: FIND of something far away is WALK."""
    verb = jnp.where((verb == _FIND) & ~_stays(rules, props, about, character), _WALK, verb)
    if rules.vain_return:
        puts = _has(about, 1 << (Check.HELD - 32)) & _has(about, 1 << (Check.PUT_OPEN - 32))
        puts &= _has(as_target, 1 << (Check.TARGET_NEAR - 64))
        verb = jnp.where((verb == _PUTOBJBACK) & ~puts, _VAIN_RETURN, verb)
    return jnp.where((verb == _POUR) & _trait(props, Trait.WATER), _POUR_WATER, verb)


def legal(scene: Scene, state: State, actions: ActionTable, rules: Rules = REFERENCE) -> Array:
    """Which actions of a table the world would accept.

    Args:
        scene, state: one scene and state.
        actions: table of A actions over M objects.
        rules: rule set.

    Returns:
        bool[A]; padding is False.
    """
    scene, state, actions = jax.tree.map(jnp.asarray, (scene, state, actions))
    view = _view(scene, state)
    # PUTOBJBACK's destination is not in the table: it is where the held object came from.
    stored = _get(state.grabbed, view.hands, -1).astype(jnp.int32)
    nodes = jnp.concatenate([actions.objects, jnp.where(stored >= 0, stored >> 2, -1)])
    about, as_target = jax.vmap(lambda node: _object_facts(scene, state, view, node, rules))(nodes)
    character = _character_facts(scene, state, view)
    named = actions.objects.shape[0]
    about, origin = about[:named], as_target[named:]
    about = _sum_up(scene, view, rules, actions.objects, about, character, stored, origin)
    need = jnp.asarray(rules.need)[actions.verb]
    first = jnp.where(actions.obj >= 0, about[actions.obj_slot], 0)
    second = jnp.where(actions.target >= 0, as_target[actions.target_slot], 0) | character
    traits_met = (_get(scene.props, actions.obj) & need[:, 0]) == need[:, 0]
    met = ((first & need[:, 1]) == need[:, 1]) & ((second & need[:, 2]) == need[:, 2])
    return traits_met & met & actions.mask


def _sum_up(
    scene: Scene,
    view: _View,
    rules: Rules,
    nodes: Array,
    about: Array,
    character: Array,
    stored: Array,
    origin: Array,
) -> Array:
    """Facts about nodes with FINDABLE and RETURNABLE filled in.

    Args:
        nodes, about: int32[M] and uint32[M], nodes and their facts.
        character: facts of the character.
        stored, origin: int32[2] and uint32[2], where the held objects came from, its facts.
    """
    walk = jnp.asarray(rules.need[_WALK])
    can_walk = ((about & walk[1]) == walk[1]) & ((character & walk[2]) == walk[2])
    stays = _stays(rules, _get(scene.props, nodes), about, character)
    findable = jnp.where(stays, _has(about, 1 << (Check.NEAR - 32)), can_walk)
    near = _has(origin, 1 << (Check.TARGET_NEAR - 64))
    takes = near & (((stored & 3) != _INSIDE) | _has(origin, 1 << (Check.TARGET_OPEN - 64)))
    back = ((nodes[:, None] == view.hands) & takes & (stored >= 0)).any(-1)
    about |= jnp.where(findable, jnp.uint32(1 << (Check.FINDABLE - 32)), 0)
    return about | jnp.where(back, jnp.uint32(1 << (Check.RETURNABLE - 32)), 0)


def _origin(
    scene: Scene, state: State, view: _View, row: Array, node: Array, rules: Rules
) -> Array:
    """Where GRAB takes a thing from, `y·4 + relation`, -1 for nowhere: the first that is no room
    among those it is ON, then INSIDE, then CLOSE to."""
    found = jnp.int32(-1)
    for relation in (_CLOSE, _INSIDE, _ON):
        extra = (view.relation == relation) & (view.source == node)
        at = jnp.where(extra, view.sink, scene.ids.shape[0])
        members = _has(row, 1 << relation).at[at].set(True, mode="drop")
        counted = members
        if rules.new_first:
            counted = members | _has(scene.edges[node], 1 << relation)
        modulus = _modulus(_count(to_lanes(counted.astype(jnp.uint8))))
        keys = jnp.where(members & (scene.room < 0), scene.order[modulus], _NO_KEY)
        if rules.new_first:
            remainder = scene.ids & ((8 << 2 * modulus) - 1)
            place = 2 * remainder + _has(scene.edges[node], 1 << relation)
            place = jnp.where(keys == _NO_KEY, _NO_KEY, place)
            keys = jnp.where(place == place.min(), keys, _NO_KEY)
        y = _pick(keys)
        found = jnp.where(y >= 0, y * 4 + relation, found)
    return found


def _close_by(scene: Scene, view: _View, row: Array, node: Array, rules: Rules) -> Array:
    """bool[N]: what walking to a node brings CLOSE besides it and what is carried: the containers
    it is INSIDE, all body parts, and everything ON it if it is a surface (see `Rules.open_walk`
    for the other way)."""
    surface = _trait(scene.props[node], Trait.SURFACE)
    here = jnp.arange(row.shape[0])
    container = _has(row, 1 << _INSIDE) & (scene.room < 0) & (here != scene.character)
    container &= node != scene.character  # its own INSIDE edges are gone before this is asked
    on_it = _has(row, 1 << (_ON + 4)) & surface
    boxes = (view.source == node) & (view.relation == _INSIDE) & (view.sink_room < 0)
    things = (view.sink == node) & (view.relation == _ON) & surface
    body = _trait(scene.props, Trait.BODY_PART)
    if rules.open_walk:
        to_thing = scene.room[node] < 0
        # Walking empties what is carried before it asks what is INSIDE.
        opens = _trait(scene.props[node], Trait.CAN_OPEN) & ~(view.hands == node).any()
        within = _has(row, 1 << (_INSIDE + 4)) & opens & (here != scene.character)
        on_it = within | _has(row, 1 << _ON)
        container, body, boxes = container & to_thing, body & to_thing, boxes & to_thing
        boxes |= (view.source == node) & (view.relation == _ON)
        things = (view.sink == node) & (view.relation == _INSIDE) & opens
    at = jnp.where(boxes, view.sink, jnp.where(things, view.source, row.shape[0]))
    near = (container | on_it).at[at].set(True, mode="drop")
    return near | body


def _added(
    state: State, view: _View, cut: Array, gone: Array, links: list[tuple[Array, Array]]
) -> tuple[Array, Array]:
    """The overlay after a step.

    Args:
        cut: int32[2]. Nodes all of whose edges of the relations in `gone` are deleted, or -1.
        gone: bit mask of relations.
        links: (packed edge, whether it is to be added). None of them may exist already.

    Returns:
        The overlay and whether an edge found no free slot.
    """
    touched = ((view.source[:, None] == cut) | (view.sink[:, None] == cut)).any(-1)
    kept = jnp.where(touched & _has(gone >> view.relation, 1), -1, state.added)
    free = kept < 0
    rank = jnp.cumsum(free) - 1
    position = jnp.int32(0)
    for code, wanted in links:
        kept = jnp.where(free & wanted & (rank == position), code, kept)
        position = position + wanted
    return kept, position > free.sum()


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
    about, _ = _object_facts(scene, state, view, obj, rules)
    _, as_target = _object_facts(scene, state, view, target, rules)
    character = _character_facts(scene, state, view)
    props = _get(scene.props, obj)
    put_open = ((stored & 3) != _INSIDE) | _has(as_target, 1 << (Check.TARGET_OPEN - 64))
    about |= jnp.where(put_open, jnp.uint32(1 << (Check.PUT_OPEN - 32)), 0)
    row_index = _resolve(rules, verb, props, about, as_target, character)
    words = jnp.stack([props, about, as_target | character])
    order = jnp.asarray(rules.order)[row_index]
    failed = (order >= 0) & ~_has(words[order // 32] >> (order % 32).astype(jnp.uint32), 1)
    code = jnp.where(failed.any(), order[jnp.argmax(failed)] + 1, 0)
    effect = Effect(*(jnp.asarray(column)[row_index] for column in rules.effects))
    after = _apply(scene, state, view, effect, obj, target, stored, rules)
    after = jax.tree.map(lambda new, old: jnp.where(code == 0, new, old), after, state)
    return after, code.astype(jnp.int32)


def _apply(
    scene: Scene,
    state: State,
    view: _View,
    effect: Effect,
    obj: Array,
    target: Array,
    stored: Array,
    rules: Rules,
) -> State:
    """The state after an accepted action."""
    node, other = jnp.maximum(obj, 0), jnp.maximum(target, 0)
    row = _row(scene, state, view, node)
    here = jnp.arange(row.shape[0])
    is_node = (here == node) & (obj >= 0)
    is_other = (here == other) & (target >= 0)
    carried = (here == view.hands[0]) | (here == view.hands[1])
    origin = _origin(scene, state, view, row, node, rules)
    link = jnp.where(effect.link == 4, stored & 3, effect.link)
    linked = link >= 0
    to_character = linked & (other == scene.character)

    def bits(where: Array, flags: Array | int) -> Array:
        return jnp.where(where, jnp.asarray(flags, jnp.uint32), jnp.uint32(0))

    close = jnp.uint32(Flag.CLOSE_OUT | Flag.CLOSE_IN)
    room = jnp.where(effect.walk, _room_of(scene, state, view, node, rules), -1)
    near = effect.walk & (_close_by(scene, view, row, node, rules) | carried)
    near |= effect.take & (origin >= 0) & (here == origin >> 2)
    hand = jnp.where(view.hands[0] < 0, Flag.HOLDS_RH.value, Flag.HOLDS_LH.value)
    set_obj = effect.set_obj
    if rules.open_walk:
        set_obj = jnp.where(effect.walk & (scene.room[node] >= 0), 0, set_obj)
    flags = state.nodes & ~effect.clear_all.astype(jnp.uint32)
    flags &= ~bits(is_node, effect.clear_obj)
    flags &= ~bits(here == scene.character, effect.clear_character)
    flags |= bits(is_node, set_obj) | bits(near, close)
    flags |= bits(is_node & effect.take, hand)
    flags |= bits(here == scene.character, effect.set_character)
    flags |= bits(is_other, effect.set_target)
    flags |= bits(effect.face & _has(row, 1 << _FACING), Flag.FACING_OUT)
    flags |= bits(effect.walk & (here == room), Flag.INSIDE_OUT)
    flags |= bits(effect.walk & carried, Flag.CUT_INSIDE | Flag.CUT_CLOSE | Flag.CUT_FACING)
    flags |= bits(is_node & to_character, jnp.uint32(16) << jnp.maximum(link, 0).astype(jnp.uint32))
    flags |= bits(is_node & to_character & effect.link_close, close)
    # The character's own entry holds its edges to itself, seen from both ends.
    own = flags & 15
    flags = jnp.where(here == scene.character, (flags & ~jnp.uint32(0xF0)) | own << 4, flags)

    bring = room if rules.carry_along else view.room
    links = _links(view, effect, row, node, other, link, linked & ~to_character, bring)
    gone = jnp.where(effect.walk, 0b1110, jnp.where(effect.take, 0b0111, 0))
    cut = jnp.where(effect.walk, view.hands, jnp.stack([node, jnp.int32(-1)]))
    cut = jnp.where(cut >= 0, cut, -2)
    added, overflow = _added(state, view, cut, gone, links)
    grabbed = jnp.where(is_node & effect.forget, -1, state.grabbed)
    grabbed = jnp.where(is_node & effect.take & (origin >= 0), origin, grabbed)
    return State(flags, added, grabbed.astype(jnp.int16), state.overflow | overflow)


def _links(
    view: _View,
    effect: Effect,
    row: Array,
    node: Array,
    other: Array,
    link: Array,
    linked: Array,
    bring: Array,
) -> list[tuple[Array, Array]]:
    """Edges between objects that a step adds, packed, and whether each is new; `bring` is the room
    that walking leaves carried things INSIDE."""

    def exists(source: Array, relation: Array, sink: Array) -> Array:
        return ((view.source == source) & (view.relation == relation) & (view.sink == sink)).any()

    def pack(source: Array, relation: Array | int, sink: Array) -> Array:
        return source << 16 | sink << 4 | relation

    relation = jnp.maximum(link, 0)
    bond = linked & effect.link_close
    out = row[other]
    candidates = [
        (node, relation, other, linked & ~_has(out >> relation.astype(jnp.uint8), 1)),
        (node, jnp.int32(_CLOSE), other, bond & (link != _CLOSE) & ~_has(out, 1 << _CLOSE)),
        (other, jnp.int32(_CLOSE), node, bond & (node != other) & ~_has(out, 16 << _CLOSE)),
    ]
    into = effect.into_room & (view.room >= 0)
    there = ~effect.take & _has(_get(row, view.room), 1 << _INSIDE)
    candidates.append((node, jnp.int32(_INSIDE), view.room, into & ~there))
    links = [(pack(a, r, b), new & (effect.take | ~exists(a, r, b))) for a, r, b, new in candidates]
    first, second = view.hands
    for hand, held in ((first, first >= 0), (second, (second >= 0) & (second != first))):
        links.append((pack(hand, _INSIDE, bring), effect.walk & held & (bring >= 0)))
    return links
