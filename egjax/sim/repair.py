"""Finds placements and initial states under which programs run, guided by what was refused.

Each program is bound and placed by `egjax.sim.placing` and tried in the simulator, many at a time.
Where a step is refused, the check that failed says what to change, and the program is tried again:

    not near            put the thing on, in or beside what the character is near; bind another of
                        its class; as a last resort make a further one
    inside closed       put it elsewhere, or leave the container open
    wrong state         the other initial state, where no earlier step sets it
    other room, unseen  move it; let the seat face it
    seat taken          what is ON it goes to the floor
    not held, worn      held, worn from the start, where the program never takes it

What cannot be mended, or not within so many tries, starts anew from another seed.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from egjax.sim.graph import Names, Sizes, edge_bits, encode, sizes_of
from egjax.sim.placing import (
    NEW_ID,
    Home,
    Layout,
    Source,
    apply_edits,
    ask_states,
    draw,
    make,
    placings,
    put,
    settle,
)
from egjax.sim.replay import changes, explain, pad_actions
from egjax.sim.rules import Check
from egjax.sim.text import Line, bind
from egjax.sim.vocab import Flag
from egjax.sim.world import step
from egjax.types import Scene, State

__all__ = ["Failed", "Placed", "place"]

_C = Check
_HANDS = Flag.HOLDS_RH.value | Flag.HOLDS_LH.value
_STATES = {
    _C.IS_OPEN: "OPEN", _C.IS_CLOSED: "CLOSED", _C.IS_ON: "ON", _C.IS_OFF: "OFF", _C.NOT_ON: "OFF",
    _C.PLUGGED_IN: "PLUGGED_IN", _C.PLUGGED_OUT: "PLUGGED_OUT", _C.NOT_PLUGGED_OUT: "PLUGGED_IN",
}  # fmt: skip
_SETS = {
    "OPEN": ("OPEN", "CLOSE"), "CLOSED": ("OPEN", "CLOSE"), "ON": ("SWITCHON", "SWITCHOFF"),
    "OFF": ("SWITCHON", "SWITCHOFF"), "PLUGGED_IN": ("PLUGIN", "PLUGOUT"),
    "PLUGGED_OUT": ("PLUGIN", "PLUGOUT"),
}  # fmt: skip
_WALKS = ("WALK", "RUN", "FIND")
_LOOKS = ("TURNTO", "LOOKAT", "POINTAT", "WATCH")  # at a distance, too


class Placed(NamedTuple):
    """A program that runs: its layout, the seed that it was drawn from, the tries it took, and
    what it changes, as `egjax.sim.placing.apply_edits` takes it."""

    source: Source
    layout: Layout
    seed: int
    tries: int
    final: dict[str, Any]


class Failed(NamedTuple):
    """A program that no try made run: the furthest step reached and why it was refused."""

    source: Source
    step: int
    line: str
    reason: str
    tries: int


class Refusal(NamedTuple):
    """Where a try ended.

    Attributes:
        step: number of the refused step.
        check: that failed; a trait of the first argument below 32, -1 for too many new edges.
        flags: uint32[N]. `State.nodes` before it.
        grabbed: int16[N]. `State.grabbed` before it.
        names: of the scene.
    """

    step: int
    check: int
    flags: np.ndarray
    grabbed: np.ndarray
    names: Names

    def having(self, flag: int) -> list[int]:
        """Ids of the nodes that have one of the flags."""
        return [self.names.nodes[k]["id"] for k in np.flatnonzero(self.flags & flag)]

    def has(self, i: int, flag: int) -> bool:
        """Whether a node has one of the flags."""
        return bool(self.flags[self.names.index[i]] & flag)


@jax.jit
def _run(scenes: Scene, states: State, actions: jax.Array) -> tuple[State, jax.Array, jax.Array]:
    """Runs programs up to their first refused step.

    Args:
        scenes, states: leading axis B.
        actions: int32[B, T, 3]; verb -1 after the end.

    Returns:
        The states before the refused steps (or at the end), accepted steps and error numbers
        int32[B].
    """

    def one(scene: Scene, state: State, script: jax.Array):
        def body(carry, action):
            state, done, code = carry
            after, refused = step(scene, state, jnp.maximum(action[0], 0), action[1], action[2])
            live = (code == 0) & (action[0] >= 0)
            went = live & (refused == 0)
            state = jax.tree.map(lambda new, old: jnp.where(went, new, old), after, state)
            return (state, done + went, jnp.where(live, refused, code)), None

        return jax.lax.scan(body, (state, jnp.int32(0), jnp.int32(0)), script)[0]

    return jax.vmap(one)(scenes, states, actions)


@dataclasses.dataclass
class _Try:
    """A program under way: its present layout and how far any layout got."""

    source: Source
    layout: Layout
    rng: np.random.Generator
    seed: int
    repairs: int = 0
    tries: int = 0
    best: tuple[int, str, str] = (-1, "", "")


def place(
    sources: Sequence[Source],
    homes: Mapping[str, Home],
    *,
    seed: int = 0,
    seeds: int = 4,
    repairs: int = 40,
    batch: int = 32,
    progress: Callable[[int, int], None] = lambda done, placed: None,
) -> list[Placed | Failed]:
    """Looks for a layout of each program under which every step is accepted.

    Args:
        sources: programs.
        homes: their scenes by name.
        seed: the first seed; further ones follow it.
        seeds: how many times a program is drawn at most.
        repairs: changes to a draw at most.
        batch: programs tried together.
        progress: called with the numbers of programs finished and placed.

    Returns:
        One result a program, in order.
    """
    results: dict[int, Placed | Failed] = {}
    pending = {k: _begin(source, homes, seed) for k, source in enumerate(sources)}
    while pending:
        # Scripts of like length share a batch, and lengths are few, so that little is compiled.
        order = sorted(pending, key=lambda k: len(pending[k].source.script))
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            refusals = _try([pending[k] for k in chosen], batch)
            for k, refusal in zip(chosen, refusals, strict=True):
                attempt = pending[k]
                if isinstance(refusal, dict):
                    results[k] = Placed(
                        attempt.source, attempt.layout, attempt.seed, attempt.tries, refusal
                    )
                elif not _go_on(attempt, refusal, homes, seed + seeds, repairs):
                    results[k] = Failed(attempt.source, *attempt.best, attempt.tries)
                if k in results:
                    del pending[k]
            progress(len(results), sum(isinstance(r, Placed) for r in results.values()))
    return [results[k] for k in range(len(sources))]


def _begin(source: Source, homes: Mapping[str, Home], seed: int) -> _Try:
    rng = np.random.default_rng([seed, zlib.crc32(source.name.encode())])
    return _Try(source, draw(source, homes[source.scene], rng), rng, seed)


def _go_on(
    attempt: _Try, refusal: Refusal, homes: Mapping[str, Home], last: int, repairs: int
) -> bool:
    """Mends a layout or draws the next one; whether there is one to try."""
    attempt.repairs += 1
    if attempt.repairs <= repairs and mend(attempt.layout, refusal, attempt.rng):
        return True
    if attempt.seed + 1 >= last:
        return False
    new = _begin(attempt.source, homes, attempt.seed + 1)
    attempt.layout, attempt.rng, attempt.seed, attempt.repairs = new.layout, new.rng, new.seed, 0
    return True


def _try(attempts: Sequence[_Try], batch: int) -> list[Refusal | dict[str, Any]]:
    """Runs up to `batch` layouts; for each that runs to its end what it changed."""
    graphs = [apply_edits(a.layout.home.graph, a.layout.edits()) for a in attempts]
    sizes = _common_sizes(graphs)
    encoded = [encode(g, sizes, where=a.source.name) for g, a in zip(graphs, attempts)]
    longest = max(len(a.layout.script) for a in attempts)
    length = -(-longest // 8) * 8 if longest <= 32 else -(-longest // 32) * 32
    actions = []
    for attempt, (scene, state, names) in zip(attempts, encoded):
        steps = [bind(scene, state, names, line) for line in attempt.layout.script]
        actions.append(pad_actions(steps, length))
    fill = [0] * (batch - len(attempts))
    rows = [*range(len(attempts)), *fill]
    scenes, states = (
        jax.tree.map(lambda *x: np.stack(x), *(encoded[k][part] for k in rows)) for part in (0, 1)
    )
    ends, done, codes = jax.device_get(_run(scenes, states, np.stack([actions[k] for k in rows])))
    refusals: list[Refusal | dict[str, Any]] = []
    for k, attempt in enumerate(attempts):
        attempt.tries += 1
        scene, first, names = encoded[k]
        end = jax.tree.map(lambda leaf, k=k: leaf[k], ends)
        if not codes[k] and not end.overflow:
            refusals.append(_final(scene, first, end))
            continue
        at = min(int(done[k]), len(attempt.layout.script) - 1)
        why = "more new edges than the arrays hold"
        if codes[k]:
            why = explain(scene, end, names, actions[k][at], int(codes[k]))
        if at > attempt.best[0]:
            attempt.best = (at, str(attempt.layout.script[at]), why)
        refusals.append(Refusal(at, int(codes[k]) - 1, end.nodes, end.grabbed, names))
    return refusals


def _final(scene: Scene, first: State, last: State) -> dict[str, Any]:
    """What a program changed, as edits of its initial graph."""
    states, added, removed = changes(
        scene, first, last, edge_bits(scene, first), edge_bits(scene, last)
    )
    return {
        "states": {str(i): names for i, names in states.items()},
        "added": [list(edge) for edge in sorted(added)],
        "removed": [list(edge) for edge in sorted(removed)],
    }


def _common_sizes(graphs: Sequence[Mapping[str, Any]], *, added: int = 128) -> Sizes:
    """Array sizes for graphs of the four scenes: the same ones for nearly all of them."""
    least, usual = sizes_of(graphs, added=added), Sizes(320, 12, 5, 4, added)
    return Sizes(
        *(max(a, b) for a, b in zip(dataclasses.astuple(least), dataclasses.astuple(usual)))
    )


# --- what a refusal asks to change ---------------------------------------------------------------


def mend(layout: Layout, refusal: Refusal, rng: np.random.Generator) -> bool:
    """Changes a layout so that a refused step may pass; whether there was something to change."""
    line = layout.script[refusal.step]
    numbers = [i for _, i in line.arguments if i is not None]
    obj = numbers[0] if numbers else layout.home.character
    target = numbers[1] if len(numbers) > 1 else obj
    check = refusal.check
    if check in (_C.NEAR, _C.FINDABLE):
        return _bring_near(layout, obj, refusal, rng)
    if check == _C.TARGET_NEAR and line.verb == "PUTOBJBACK":
        return _return_near(layout, obj, refusal, rng)
    if check == _C.TARGET_NEAR:
        return _bring_near(layout, target, refusal, rng)
    if check == _C.ACCESSIBLE:
        return _uncover(layout, obj, refusal, rng)
    if check in (_C.SAME_ROOM, _C.HAS_ROOM, _C.CONNECTED):
        return _bring_into_room(layout, obj, refusal, rng)
    if check in _STATES:
        return _set(layout, obj, _STATES[check], refusal)  # type: ignore[index]
    if check in (_C.TARGET_OPEN, _C.PUT_OPEN):
        return _set(layout, target, "OPEN", refusal)
    if check in (_C.SEAT_FREE, _C.BED_FREE):
        return _clear_seat(layout, obj, rng)
    if check in (_C.FACED, _C.WATCHABLE):
        return _face(layout, obj, refusal)
    if check == _C.GRABBED:
        return _give_origin(layout, obj, refusal, rng)
    if check in (_C.HELD, _C.WORN):
        return _carry(layout, obj, worn=check == _C.WORN, refusal=refusal)
    if check == _C.RESTING:
        return _rest(layout, line, refusal, rng)
    if check == _C.TARGET_RECIPIENT or 0 <= check < 32:
        return _remake(layout, target if check >= 32 else obj, None)
    return False


def _anchors(layout: Layout, refusal: Refusal) -> list[int]:
    """Things that the character is near and that stay in place, the latest used first."""
    home = layout.home
    near = set(refusal.having(Flag.CLOSE_OUT.value)) - set(home.rooms) - {home.character}
    near -= set(refusal.having(_HANDS))
    before = layout.script[: refusal.step]
    near -= {
        i for line in before if line.verb == "GRAB" for _, i in line.arguments if i is not None
    }
    near = {i for i in near if "BODY_PART" not in layout.node(i)["properties"]}
    used = [i for line in reversed(before) for _, i in line.arguments if i in near]
    anchors = list(dict.fromkeys(i for i in used if i is not None))
    if refusal.has(home.character, Flag.SITTING.value | Flag.LYING.value):
        seats = [i for i in anchors if refusal.has(i, Flag.ON_OUT.value)]
        anchors = seats + [i for i in anchors if i not in seats]
    if not any(line.verb in _WALKS for line in before):
        anchors.append(home.character)
    return anchors + sorted(near.difference(anchors))


def _bring_near(layout: Layout, i: int, refusal: Refusal, rng: np.random.Generator) -> bool:
    """Lets a thing be near what the character is near; one already moved cannot be."""
    moved = any(verb == "GRAB" and t < refusal.step for t, verb in layout.uses(i))
    if not moved:
        anchors = [a for a in _anchors(layout, refusal) if a != i and not _beside(layout, a, i)]
        if i in layout.made:
            near = set(refusal.having(Flag.CLOSE_OUT.value)) - set(refusal.having(_HANDS))
            options = [p for p in _open_placings(layout, i, refusal) if p[1] in near]
            options = [p for p in options if p != layout.place.get(i)]
            if options:
                put(layout, i, options[int(rng.integers(len(options)))])
                return True
        else:
            close = {k for a in anchors for k in (a, *layout.home.close[a])}
            if _rebind(layout, i, lambda k: k in close, rng):
                return True
        for anchor in anchors:
            if _join(layout, i, anchor, refusal, rng):
                return True
    return _stay(layout, i, refusal, rng)


def _join(layout: Layout, i: int, anchor: int, refusal: Refusal, rng: np.random.Generator) -> bool:
    """Lets two things stand CLOSE, the first coming to the second where it can."""
    if i == anchor or _beside(layout, i, anchor):
        return False
    here, there = layout.room_of(i), layout.room_of(anchor)
    if anchor == layout.home.character:
        layout.start = there = here
    if here == there:
        layout.beside.add((min(i, anchor), max(i, anchor)))
        return True
    if i in layout.made:
        return _stand_beside(layout, i, anchor, refusal, rng)
    if anchor in layout.made:
        return _stand_beside(layout, anchor, i, refusal, rng)
    return (
        _rebind(layout, i, lambda k: layout.room_of(k) == there, rng)
        or _rebind(layout, anchor, lambda k: layout.room_of(k) == here, rng)
        or _remake(layout, i, there)
        or _remake(layout, anchor, here)
    )


def _stay(layout: Layout, i: int, refusal: Refusal, rng: np.random.Generator) -> bool:
    """What the character looked for since it was at a thing should have stood there, too."""
    point, before = i, layout.script[: refusal.step]
    for line in before:
        if line.verb in ("PUTBACK", "PUTIN") and line.arguments[0][1] == i:
            point = line.arguments[1][1] or i
    uses = layout.uses(i) + layout.uses(point)
    last = max((t for t, verb in uses if t < refusal.step and verb not in _LOOKS), default=-1)
    return _gather(layout, point, last, refusal, rng)


def _gather(
    layout: Layout, point: int, since: int, refusal: Refusal, rng: np.random.Generator
) -> bool:
    """Puts what the character went to after a step beside where it was then."""
    for line in layout.script[since + 1 : refusal.step]:
        k = line.arguments[0][1] if line.verb in _WALKS else None
        if k is not None and k not in layout.home.rooms and _join(layout, k, point, refusal, rng):
            return True
    return False


def _beside(layout: Layout, a: int, b: int) -> bool:
    return (min(a, b), max(a, b)) in layout.beside


def _open_placings(layout: Layout, i: int, refusal: Refusal) -> list[tuple[str, int]]:
    """Placings that are not inside something closed at the refused step."""
    return [
        (relation, k)
        for relation, k in placings(layout, i)
        if relation != "INSIDE" or not refusal.has(k, Flag.CLOSED.value)
    ]


def _stand_beside(
    layout: Layout, i: int, anchor: int, refusal: Refusal, rng: np.random.Generator
) -> bool:
    """Moves something made next to a thing, on a place of its own in that room if there is one."""
    room = layout.room_of(anchor)
    if layout.room_of(i) != room:
        options = [p for p in _open_placings(layout, i, refusal) if layout.room_of(p[1]) == room]
        _move(layout, i, room, options, rng)
    layout.beside.add((min(i, anchor), max(i, anchor)))
    return True


def _move(
    layout: Layout,
    i: int,
    room: int,
    options: Sequence[tuple[str, int]],
    rng: np.random.Generator,
) -> None:
    """Puts something made on one of the options, on nothing where there is none."""
    layout.place.pop(i, None)
    layout.room[i] = room
    if options:
        put(layout, i, options[int(rng.integers(len(options)))])
    settle(layout, i)


def _return_near(layout: Layout, i: int, refusal: Refusal, rng: np.random.Generator) -> bool:
    """What a held thing was taken from has to be near when it is put back."""
    origin = refusal.names.nodes[int(refusal.grabbed[refusal.names.index[i]]) >> 2]["id"]
    for anchor in _anchors(layout, refusal):
        if layout.room_of(anchor) == layout.room_of(origin) and not _beside(layout, anchor, origin):
            layout.beside.add((min(origin, anchor), max(origin, anchor)))
            return True
    grabs = [t for t, verb in layout.uses(i) if verb == "GRAB" and t < refusal.step]
    return _gather(layout, origin, max(grabs, default=-1), refusal, rng)


def _uncover(layout: Layout, i: int, refusal: Refusal, rng: np.random.Generator) -> bool:
    """Takes a thing out of what is closed, or opens that from the start."""
    if i not in layout.made:
        changed = False
        for holder in layout.home.inside[i]:
            if refusal.has(holder, Flag.CLOSED.value) and holder not in layout.home.rooms:
                changed |= _set(layout, holder, "OPEN", refusal)
        return changed or _rebind(layout, i, lambda k: True, rng)
    relation, holder = layout.place.get(i, ("", -1))
    if relation != "INSIDE":
        return False
    room = layout.room_of(i)
    options = [p for p in _open_placings(layout, i, refusal) if layout.room_of(p[1]) == room]
    if not options and _set(layout, holder, "OPEN", refusal):
        return True
    beside = [a for a in _anchors(layout, refusal) if layout.room_of(a) == room and a != i]
    _move(layout, i, room, options, rng)
    layout.beside |= {(min(i, a), max(i, a)) for a in beside[:1]}
    return True


def _bring_into_room(layout: Layout, i: int, refusal: Refusal, rng: np.random.Generator) -> bool:
    inside = refusal.having(Flag.INSIDE_OUT.value)
    rooms = [k for k in inside if k in layout.home.rooms]
    room = rooms[0] if rooms else layout.start
    if i in layout.made:
        options = [p for p in _open_placings(layout, i, refusal) if layout.room_of(p[1]) == room]
        _move(layout, i, room, options, rng)
        return True
    if _rebind(layout, i, lambda k: layout.room_of(k) == room, rng):
        return True
    for anchor in _anchors(layout, refusal):
        if anchor in layout.made:
            _move(layout, anchor, layout.room_of(i), (), rng)
            return True
        if _rebind(layout, anchor, lambda k: layout.room_of(k) == layout.room_of(i), rng):
            return True
    return i not in layout.fixed and _remake(layout, i, room)


def _set(layout: Layout, i: int, state: str, refusal: Refusal) -> bool:
    """Another initial state, where no step before sets it."""
    earlier = [verb for t, verb in layout.uses(i) if t < refusal.step]
    if set(earlier) & set(_SETS[state]) or state in layout.state_of(i):
        return False
    layout.set_state(i, state)
    return True


def _clear_seat(layout: Layout, i: int, rng: np.random.Generator) -> bool:
    """What is ON a seat at the start goes elsewhere."""
    changed = False
    for k, (_, there) in list(layout.place.items()):
        if there == i:
            _move(layout, k, layout.room_of(i), (), rng)
            changed = True
    for edge in layout.home.edges:
        on = edge["relation_type"] == "ON" and edge["to_id"] == i
        if on and edge["from_id"] not in layout.freed:
            layout.freed[edge["from_id"]] = i
            changed = True
    return changed or _rebind(layout, i, lambda k: True, rng)


def _face(layout: Layout, i: int, refusal: Refusal) -> bool:
    """The seat, or what the character faces, faces the thing."""
    home, before = layout.home, layout.script[: refusal.step]
    seats = [a for a in _anchors(layout, refusal) if a != home.character]
    resting = refusal.has(home.character, Flag.SITTING.value | Flag.LYING.value)
    faced = refusal.having(Flag.FACING_OUT.value)
    starts = [a for a in seats if refusal.has(a, Flag.ON_OUT.value)] if resting else []
    starts += [k for k in faced if k in layout.made or k in home.nodes]
    if not any(line.verb in (*_WALKS, "TURNTO") for line in before):
        starts.append(home.character)
    for start in starts:
        if start != i and (start, i) not in layout.facing:
            layout.facing.add((start, i))
            return True
    return False


def _give_origin(layout: Layout, i: int, refusal: Refusal, rng: np.random.Generator) -> bool:
    """A thing that is to be put back must have been taken from something."""
    grabs = [t for t, verb in layout.uses(i) if verb == "GRAB" and t < refusal.step]
    if not grabs or i not in layout.made:
        return False
    room = layout.room_of(i)
    options = [p for p in _open_placings(layout, i, refusal) if layout.room_of(p[1]) == room]
    if options and i not in layout.place:
        put(layout, i, options[int(rng.integers(len(options)))])
        return True
    for line in reversed(layout.script[: grabs[0]]):
        for _, k in line.arguments:
            if k not in (None, i, *layout.home.rooms) and not _beside(layout, i, k):
                layout.beside.add((min(i, k), max(i, k)))
                return True
    floors = [k for k in layout.home.by_class.get("floor", ()) if layout.room_of(k) == room]
    if floors and i not in layout.place:
        put(layout, i, ("ON", floors[0]))
        return True
    return False


def _carry(layout: Layout, i: int, *, worn: bool, refusal: Refusal) -> bool:
    """Held or worn from the start, where no step before takes it or puts it on."""
    home, taking = layout.home, "PUTON" if worn else "GRAB"
    earlier = {verb for t, verb in layout.uses(i) if t < refusal.step}
    hands = [edge for edge in layout.own if edge[1].startswith("HOLDS")]
    if taking in earlier or i not in layout.made or (not worn and len(hands) == 2):
        return False
    relation = "HOLDS_LH" if hands else "HOLDS_RH"
    edge = (i, "ON", home.character) if worn else (home.character, relation, i)
    if edge in layout.own or any(i in (e[0], e[2]) for e in hands):
        return False
    layout.place.pop(i, None)
    layout.room[i] = layout.start
    settle(layout, i)
    layout.own |= {edge, (i, "CLOSE", home.character), (home.character, "CLOSE", i)}
    return True


def _rest(layout: Layout, line: Line, refusal: Refusal, rng: np.random.Generator) -> bool:
    """Sitting or lying from the start, where no step before needs to be upright."""
    home = layout.home
    before = {b.verb for b in layout.script[: refusal.step]}
    if before & {*_WALKS, "STANDUP", "SIT", "LIE"} or layout.state_of(home.character):
        return False
    kind = "LYING" if line.verb in ("SLEEP", "WAKEUP") else "SITTING"
    trait = "LIEABLE" if kind == "LYING" else "SITTABLE"
    named = [i for b in layout.script for _, i in b.arguments if i is not None]
    seats = [i for i in (*named, *home.nodes) if trait in layout.node(i)["properties"]]
    if not seats:
        return False
    known = [i for i in seats if i in named]
    seat = known[0] if known else seats[int(rng.integers(len(seats)))]
    layout.start = layout.room_of(seat)
    layout.states[home.character] = {kind}
    layout.own |= {(home.character, "ON", seat)}
    layout.own |= {(home.character, "CLOSE", seat), (seat, "CLOSE", home.character)}
    return True


def _rebind(layout: Layout, i: int, fits: Callable[[int], bool], rng: np.random.Generator) -> bool:
    """Binds a thing of the scene, whose id is not its own, to another of its class."""
    home = layout.home
    if i in layout.fixed or i in layout.made or i in home.rooms or i == home.character:
        return False
    taken = {k for line in layout.script for _, k in line.arguments}
    same = [k for k in home.like(home.nodes[i]["class_name"]) if k not in taken and fits(k)]
    if not same:
        return False
    _replace(layout, i, same[int(rng.integers(len(same)))])
    return True


def _remake(layout: Layout, i: int, room: int | None) -> bool:
    """A further object in place of one of the scene, whose id is not its own."""
    home = layout.home
    if i in layout.fixed or i in layout.made or i in home.rooms or i == home.character:
        return False
    used = {k for line in layout.script for _, k in line.arguments} | home.nodes.keys()
    number = next(k for k in range(NEW_ID, 4 * NEW_ID) if k not in used and k not in layout.made)
    layout.made[number] = make(number, home.nodes[i]["class_name"], home)
    layout.room[number] = home.room_of[i] if room is None else room
    _replace(layout, i, number)
    return True


def _replace(layout: Layout, old: int, new: int) -> None:
    """Puts one node in another's part, in the script and in what depends on it."""

    def other(k: int) -> int:
        return new if k == old else k

    name = layout.node(new)["class_name"]
    layout.script = tuple(
        Line(line.verb, tuple((name, new) if k == old else (n, k) for n, k in line.arguments))
        for line in layout.script
    )
    layout.place = {k: (relation, other(there)) for k, (relation, there) in layout.place.items()}
    pairs = {(other(a), other(b)) for a, b in layout.beside}
    layout.beside = {
        (min(p), max(p)) for p in pairs if layout.room_of(p[0]) == layout.room_of(p[1])
    }
    layout.facing = {(other(a), other(b)) for a, b in layout.facing}
    layout.states.pop(old, None)
    layout.freed = {k: there for k, there in layout.freed.items() if there != old}
    ask_states(layout)
