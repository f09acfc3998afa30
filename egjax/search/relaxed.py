"""How far is it to the goal? A relaxed plan from a state of the household, on the device.

In the manner of FF (Hoffmann and Nebel 2001): for every goal predicate that does not hold, the
cheapest action of the table that brings it about, and for what that asks for the actions that bring
it about in turn, each counted once; what actions undo is not looked at. With one exception, because
in this household nearly every goal undoes itself on the way: walking ends all CLOSE relations of
the character. So CLOSE(character, ·) counts at the place where the plan is to end: the one from
which most of what shall be close can be found.

The estimate is neither a lower bound nor an upper one (not admissible): steps that need the same
place are counted as one walk, and what a step undoes elsewhere is not counted.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from egjax.sim.vocab import STATE_SHIFT, VERB_INDEX, Flag, Trait, state_bit
from egjax.sim.world import from_lanes, swap
from egjax.types import ActionTable, Goal, Scene, State

__all__ = ["Relaxed", "relaxed_plan"]

Array = jax.Array
_ON, _INSIDE, _CLOSE, _FACING = range(4)
_FAR = 4.0  # steps to bring near what cannot be carried, or another place has to be found for
_NEVER = 20.0  # steps of what no action of the table seems to do
_V = VERB_INDEX
_PUT = ("PUTBACK", "PUTIN", "POUR")
_STATE_VERBS = {
    "OPEN": "OPEN", "CLOSE": "CLOSED", "SWITCHON": "ON", "SWITCHOFF": "OFF", "PLUGIN": "PLUGGED_IN",
    "PLUGOUT": "PLUGGED_OUT", "WASH": "CLEAN",
}  # fmt: skip


class Relaxed(NamedTuple):
    """A relaxed plan.

    Attributes:
        steps: float32[]. Its length; 0 where every predicate holds.
        helpful: bool[A]. Actions that it starts with or will need.
    """

    steps: Array
    helpful: Array


class _Things(NamedTuple):
    """The M objects of a table in a state; each field is bool[M] but the links.

    Attributes:
        flags: uint32[M].
        near, held, open, inside: near the character; in a hand; open or without a door; bool[M, M],
            o is inside x and x is closed.
        arrives: bool[M, M]. Walking to p makes x CLOSE.
        reach: bool[M, M]. At p, x is near.
        room: bool. Whether it is a room.
    """

    flags: Array
    near: Array
    held: Array
    open: Array
    inside: Array
    arrives: Array
    reach: Array
    room: Array


def _bit(word: Array, flag: int) -> Array:
    return (word & jnp.asarray(flag, word.dtype)) != 0


def _is(table_verb: Array, *names: str) -> Array:
    """bool[A]: the action's verb is one of these."""
    return jnp.any(
        table_verb[:, None] == jnp.array([_V[name] for name in names], jnp.int32), axis=1
    )


def _things(scene: Scene, table: ActionTable, state: State, puts: Array) -> _Things:
    """Facts about the table's objects; `puts` bool[A] are PUT actions taken as done."""
    node = jnp.maximum(table.objects, 0)
    here = jnp.arange(scene.ids.shape[0], dtype=jnp.int32)
    flags = state.nodes[node]
    cut = ((state.nodes >> 10) & 15).astype(jnp.uint8)
    cut = cut | cut << 4
    row = jax.vmap(from_lanes)(scene.edges[node]).astype(jnp.uint8) & ~(cut | cut[node][:, None])
    # Edges between objects that were added or are to be; a slot holds both directions.
    first, second = (
        (state.added >> 20).astype(jnp.int32),
        (state.added >> 8 & 4095).astype(jnp.int32),
    )
    byte = (state.added & 255).astype(jnp.uint8)
    far = jnp.concatenate([second, first])
    mine = jnp.concatenate([first, second]) == table.objects[:, None]
    byte = jnp.where(mine, jnp.concatenate([byte, swap(byte)]), 0)
    near = (1 << _ON) | (1 << _CLOSE) | (16 << _CLOSE)

    def with_added(base: Array, bits: int) -> Array:
        """bool[M, N]: edges of these kinds, the added ones with them."""
        at = jnp.where((byte & bits) != 0, far, here.size)
        return jax.vmap(lambda row, at: row.at[at].set(True, mode="drop"))(base, at)

    link = with_added((row & near) != 0, near)
    done = jnp.where(puts, table.target, here.size)
    link = link.at[table.obj_slot, done].set(True, mode="drop")
    within = with_added((row & (1 << _INSIDE)) != 0, 1 << _INSIDE)
    within &= scene.room < 0
    surface = _bit(scene.props[node], 1 << Trait.SURFACE)
    on_it = with_added((row & (16 << _ON)) != 0, 16 << _ON) & surface[:, None]
    goes = table.objects[:, None] == here
    arrives = goes | on_it | within | _bit(scene.props, 1 << Trait.BODY_PART)
    # near(o): CLOSE to it, or CLOSE to an x that it is ON or CLOSE to.
    touch = (link | goes).astype(jnp.float32)
    close = _bit(state.nodes, Flag.CLOSE_OUT)
    held = _bit(flags, Flag.HOLDS_RH | Flag.HOLDS_LH)
    reach = (arrives.astype(jnp.float32) @ touch.T > 0) | held
    closed = _bit(flags, Flag.CLOSED)
    return _Things(
        flags=flags,
        near=(touch @ close.astype(jnp.float32) > 0) | held,
        held=held,
        open=_bit(flags, Flag.OPEN) | ~closed,
        inside=within[:, node] & closed & ~held[:, None],
        arrives=arrives[:, node] | held,
        reach=reach,
        room=scene.room[node] >= 0,
    )


def _achieves(scene: Scene, table: ActionTable, goal: Goal) -> tuple[Array, Array]:
    """Which goals an action can bring about, by its verb and arguments.

    Returns:
        bool[A, G], and bool[G, M], the objects of which one shall be CLOSE to the character.
    """
    verb, count = table.verb, goal.bit.shape[0]
    belongs = goal.predicate[:, None] == jnp.arange(count, dtype=jnp.int32)

    def subject(node: Array) -> Array:
        """bool[..., G]: the node may be the subject."""
        match = (goal.subject == node[..., None]) & (node >= 0)[..., None]
        return (match.astype(jnp.float32) @ belongs.astype(jnp.float32)) > 0

    def other(node: Array) -> Array:
        return (goal.others.T[jnp.maximum(node, 0)] > 0) & (node >= 0)[..., None]

    mine = subject(scene.character)
    obj, target = table.obj, table.target
    bit = goal.bit
    close = (bit == _CLOSE) | (bit == _CLOSE + 4)
    relation = jnp.where(verb == _V["PUTBACK"], _ON, _INSIDE)[:, None]
    put = subject(obj) & other(target) & ((bit == relation) | close)
    put |= subject(target) & other(obj) & ((bit == relation + 4) | close)
    found = _is(verb, *_PUT)[:, None] & put
    seat = mine & (((bit == _ON) & other(obj)) | (bit >= STATE_SHIFT))
    pose = jnp.where(verb == _V["SIT"], state_bit("SITTING"), state_bit("LYING"))[:, None]
    found |= _is(verb, "SIT", "LIE")[:, None] & seat & ((bit == _ON) | (bit == pose))
    found |= _is(verb, "TURNTO")[:, None] & mine & (bit == _FACING) & other(obj)
    found |= _is(verb, "GRAB")[:, None] & subject(obj) & ((bit == 8) | (bit == 9))
    room = scene.inside[jnp.maximum(obj, 0)]
    enters = other(obj) | jnp.any(other(room), axis=1)
    found |= _is(verb, "WALK")[:, None] & mine & (bit == _INSIDE) & enters
    found |= _is(verb, "DROP")[:, None] & subject(obj) & (bit == _INSIDE)
    worn = subject(obj) & (bit == _ON) & (goal.others[:, scene.character] > 0)
    found |= _is(verb, "PUTON")[:, None] & worn
    for name, made in _STATE_VERBS.items():
        found |= (verb == _V[name])[:, None] & subject(obj) & (bit == state_bit(made))
    wanted = (mine & (bit == _CLOSE))[:, None] & (goal.others[:, jnp.maximum(table.objects, 0)] > 0)
    return found & table.mask[:, None] & goal.mask, wanted & (table.objects >= 0)


def _cost(table: ActionTable, things: _Things, hands: Array) -> Array:
    """float32[A]: steps of each action with all that it asks for, added up (h_add)."""
    verb = table.verb

    def step(done: Array, *needs: Array) -> Array:
        return jnp.where(done, 0.0, 1.0 + sum(needs, jnp.zeros((), jnp.float32)))

    flags = things.flags
    near = step(things.near)
    full = step(hands < 2)
    off = step(~_bit(flags, Flag.SWITCHED_ON), near)
    opened = step(things.open, near, off, full)
    freed = jnp.max(jnp.where(things.inside, opened, 0.0), axis=1)
    held = step(things.held, near, freed, full)
    plugged = step(~_bit(flags, Flag.PLUGGED_OUT), near, full)
    switched = step(_bit(flags, Flag.SWITCHED_ON), near, plugged)
    first, second = table.obj_slot, table.target_slot
    needs = {
        "GRAB": (near + freed + full)[first],
        "PUTBACK": held[first] + near[second],
        "PUTIN": held[first] + near[second] + opened[second],
        "POUR": held[first] + near[second],
        "DROP": held[first],
        "PUTON": held[first],
        "OPEN": (near + off + full)[first],
        "CLOSE": (near + opened)[first],
        "SWITCHON": (near + plugged)[first],
        "SWITCHOFF": (near + switched)[first],
        "PLUGIN": (near + full)[first],
        "PLUGOUT": (near + full)[first],
        **{name: near[first] for name in ("SIT", "LIE", "WASH")},
    }
    cost = jnp.ones(verb.shape, jnp.float32)
    for name, before in needs.items():
        cost = jnp.where(verb == _V[name], 1.0 + before, cost)
    return cost


class _Needs(NamedTuple):
    """What the chosen actions ask for that is not so yet; bool[M] each."""

    grab: Array
    open: Array
    off: Array
    plug: Array
    near: Array


def _needs(table: ActionTable, things: _Things, chosen: Array) -> _Needs:
    verb = table.verb
    size = things.near.shape[0]

    def objects(slots: Array, *names: str) -> Array:
        """bool[M]: the arguments of the chosen actions with these verbs."""
        at = jnp.where(chosen & _is(verb, *names), slots, size)
        return jnp.zeros(size, bool).at[at].set(True, mode="drop")

    first, second = table.obj_slot, table.target_slot
    grab = objects(first, "GRAB", "DROP", "PUTON", *_PUT) & ~things.held
    shut = jnp.any(things.inside & grab[:, None], axis=0)
    opens = objects(second, "PUTIN") | objects(first, "OPEN", "CLOSE") | shut
    opens &= ~things.open
    off = opens & _bit(things.flags, Flag.SWITCHED_ON)
    plug = objects(first, "SWITCHON") & _bit(things.flags, Flag.PLUGGED_OUT)
    near = objects(first, "SIT", "LIE", "WASH", "CLOSE", *_STATE_VERBS) | objects(second, *_PUT)
    near |= grab | opens | off | plug
    return _Needs(grab, opens, off, plug, near & ~things.near)


def _stand(things: _Things, wanted: Array, walks: Array, movable: Array) -> tuple[Array, Array]:
    """Where to end, so that all that shall be CLOSE to the character is.

    Args:
        things: after what is to be put somewhere has been put there.
        wanted: bool[G, M]. Objects of which one shall be CLOSE; all False for other goals.
        walks: bool[M]. Objects that the plan walks to anyway.
        movable: bool[M]. What can be brought along.

    Returns:
        float32[M]: steps of ending at each object, and of staying, float32[].
    """
    asked = jnp.any(wanted, axis=1)

    def finds(close: Array, near: Array) -> Array:
        far = jnp.where(movable, jnp.float32(2.0), _FAR)
        each = jnp.where(close, 0.0, jnp.where(near, 1.0, 1.0 + far))
        best = jnp.min(jnp.where(wanted, each, _NEVER), axis=1)
        return jnp.sum(jnp.where(asked, best, 0.0), dtype=jnp.float32)

    ends = jax.vmap(finds)(things.arrives, things.reach) + (~walks).astype(jnp.float32)
    close = _bit(things.flags, Flag.CLOSE_OUT)
    stays = finds(close, things.near) + jnp.where(jnp.any(walks), _FAR, jnp.float32(0.0))
    return ends, stays


def relaxed_plan(
    scene: Scene, table: ActionTable, goal: Goal, state: State, held: Array
) -> Relaxed:
    """A relaxed plan from a state; one item.

    Args:
        scene, table, goal: of the task.
        state: the state.
        held: bool[G]. Which goal predicates hold in it, see `egjax.sim.goals.satisfied`.
    """
    verb = table.verb
    missing = ~held & goal.mask
    now = _things(scene, table, state, jnp.zeros(verb.shape, bool))
    achieves, wanted = _achieves(scene, table, goal)
    stands = jnp.any(wanted, axis=1)
    count = partial(jnp.sum, dtype=jnp.float32)
    hands = count(_bit(state.nodes, Flag.HOLDS_RH)) + count(_bit(state.nodes, Flag.HOLDS_LH))
    cost = _cost(table, now, hands)

    # One action a goal, the cheapest; the same action for several goals counts once.
    price = jnp.where(achieves, cost[:, None], jnp.inf)
    best = jnp.argmin(price, axis=0)
    works = missing & ~stands & jnp.isfinite(jnp.min(price, axis=0))
    at = jnp.where(works, best, verb.shape[0])
    chosen = jnp.zeros(verb.shape, bool).at[at].set(True, mode="drop")
    needs = _needs(table, now, chosen)
    own = chosen & ~_is(verb, "GRAB", "OPEN", "WALK")  # those three are among the needs
    opens = jnp.zeros(now.near.shape, bool)
    at = jnp.where(chosen & (verb == _V["OPEN"]), table.obj_slot, opens.size)
    opens = (opens.at[at].set(True, mode="drop") & ~_bit(now.flags, Flag.OPEN)) | needs.open
    first = jnp.arange(opens.size, dtype=jnp.int32)
    covered = now.reach & needs.near[:, None] & (first[:, None] < first[None])
    walks = needs.near & ~jnp.any(covered, axis=0)
    at = jnp.where(chosen & (verb == _V["WALK"]), table.obj_slot, opens.size)
    walks = walks.at[at].set(True, mode="drop")

    after = _things(scene, table, state, chosen & _is(verb, *_PUT))
    at = jnp.where(verb == _V["GRAB"], table.obj_slot, opens.size)
    movable = jnp.zeros(opens.shape, bool).at[at].set(True, mode="drop")
    ends, stays = _stand(after, wanted & goal.mask[:, None], walks, movable | now.held)
    goable = jnp.zeros(opens.shape, bool)
    goable = goable.at[jnp.where(verb == _V["WALK"], table.obj_slot, opens.size)].set(
        True, mode="drop"
    )
    ends = jnp.where(goable, ends, jnp.inf)
    any_stand = jnp.any(stands & goal.mask)
    leave = any_stand & (jnp.min(ends) < stays)
    to = leave & (jnp.arange(opens.size, dtype=jnp.int32) == jnp.argmin(ends))
    close = jnp.where(any_stand, jnp.minimum(jnp.min(ends), stays), 0.0)
    steps = count(own) + count(needs.grab) + count(opens) + count(needs.off)
    steps += count(needs.plug) + count(walks) + close
    resting = _bit(state.nodes[scene.character], Flag.SITTING | Flag.LYING)
    moves = jnp.any(walks) | leave
    steps += (resting & moves).astype(jnp.float32)
    grabs = count(needs.grab) + count(opens)
    steps += ((hands >= 2) & (grabs > 0)).astype(jnp.float32)
    never = missing & ~stands & ~works
    steps += _NEVER * count(never)

    find = jnp.any(wanted & missing[:, None], axis=0) & now.near
    first = table.obj_slot
    helpful = own | (chosen & (verb == _V["OPEN"]))
    helpful |= (verb == _V["GRAB"]) & needs.grab[first]
    helpful |= (verb == _V["OPEN"]) & opens[first]
    helpful |= (verb == _V["SWITCHOFF"]) & needs.off[first]
    helpful |= (verb == _V["PLUGIN"]) & needs.plug[first]
    helpful |= (verb == _V["WALK"]) & (walks | to)[first]
    helpful |= (verb == _V["FIND"]) & find[first] & ~moves
    helpful |= (verb == _V["STANDUP"]) & resting & moves
    helpful |= (verb == _V["DROP"]) & (hands >= 2) & (grabs > 0)
    solved = ~jnp.any(missing)
    return Relaxed(jnp.where(solved, 0.0, steps), helpful & table.mask)
