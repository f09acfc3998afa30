"""Wandering: batches of random legal episodes, biased towards doing something with things.

Uniformly random legal actions are nearly all walks, because one can walk to every object but
touch only what is near. Here each episode has a few objects in focus, a table of the actions that
make sense with them, and a weight per verb.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from egjax.errors import EgjaxError
from egjax.experience.episodes import Episode, Recorder
from egjax.sim.graph import Names, Sizes, encode, sizes_of
from egjax.sim.text import Line
from egjax.sim.vocab import VERB_INDEX, VERBS, Flag, Trait
from egjax.sim.world import from_lanes, legal, step
from egjax.types import ActionTable, Scene, State

__all__ = [
    "Focus",
    "World",
    "errand_batches",
    "errands",
    "focus_table",
    "line_arrays",
    "load_worlds",
    "make_world",
    "replay",
    "replay_all",
    "resolves",
    "wander",
    "with_start",
]

Array = jax.Array
_GRAB = VERB_INDEX["GRAB"]


@dataclass(frozen=True)
class Focus:
    """How many objects of each kind an episode deals with, and how long it is.

    Attributes:
        grabbable, openable, switch, seat, surface, lookable: objects of each kind, at most.
        length: steps.
        objects, actions: array sizes; what does not fit is left out.
        weariness: how much each use of an action lowers its log-weight.
    """

    grabbable: int = 5
    openable: int = 3
    switch: int = 3
    seat: int = 2
    surface: int = 3
    lookable: int = 2
    length: int = 20
    objects: int = 32
    actions: int = 224
    weariness: float = 1.0


class World(NamedTuple):
    """A scene ready for wandering.

    Attributes:
        scene, state, names: of `egjax.sim.graph.encode`.
        classes: int32[N]. Number of each node's class name within the scene; padding has N-1.
        recorder: turns its states into episodes.
        traits: trait bits of each node as plain integers.
        kinds: for each trait, the nodes that have it by class name, scenery apart.
    """

    scene: Scene
    state: State
    names: Names
    classes: np.ndarray
    recorder: Recorder
    traits: list[int]
    kinds: Mapping[Trait, Mapping[str, list[int]]]


def load_worlds(graphs: Sequence[Mapping[str, Any]], sizes: Sizes | None = None) -> list[World]:
    """Encodes scene graphs with common array sizes, so that one compiled program serves all.

    Raises:
        EgjaxError: no graphs, or one that cannot be encoded.
    """
    if not graphs:
        raise EgjaxError("no scene graphs to wander in")
    sizes = sizes or sizes_of(graphs)
    return [
        make_world(*encode(graph, sizes, where=f"graph {number}"))
        for number, graph in enumerate(graphs)
    ]


def make_world(scene: Scene, state: State, names: Names) -> World:
    """A scene that is encoded already, made ready."""
    size = len(np.asarray(scene.ids))
    number_of: dict[str, int] = {}
    classes = np.full(size, size - 1, np.int32)
    for i, node in enumerate(names.nodes):
        classes[i] = number_of.setdefault(node["class_name"], len(number_of))
    traits = [int(p) for p in np.asarray(scene.props)[: len(names.nodes)]]
    kinds: dict[Trait, dict[str, list[int]]] = {trait: {} for trait in Trait}
    for i, node in enumerate(names.nodes):
        for trait in Trait if node["class_name"] not in _SCENERY else ():
            if traits[i] >> int(trait) & 1:
                kinds[trait].setdefault(node["class_name"], []).append(i)
    return World(scene, state, names, classes, Recorder(scene, state, names), traits, kinds)


def _held(state: State) -> Array:
    return (state.nodes & (Flag.HOLDS_RH | Flag.HOLDS_LH).value) != 0


def resolves(scene: Scene, state: State, classes: Array) -> Array:
    """Whether a node is the one that its class name means in this state.

    The rule of `egjax.sim.text.resolve_name`: the held one, else one CLOSE, else one in the
    character's room, else any; of several the lowest id.

    Args:
        scene, state: one scene and state.
        classes: int32[N], equal where class names are.

    Returns:
        bool[N]; padding is False.
    """
    flags = state.nodes
    count = flags.shape[0]
    cut = (flags & Flag.CUT_INSIDE.value) != 0
    here = (flags & Flag.INSIDE_OUT.value) != 0
    # The rooms (or things) that the character is INSIDE; four rows instead of all N.
    around = jnp.nonzero(here, size=4, fill_value=-1)[0]
    rows = jax.vmap(from_lanes)(scene.edges[around])
    with_me = ((rows >> 5 & 1) != 0) & ((around >= 0) & ~cut[around])[:, None]
    a, b = state.added >> 20, state.added >> 8 & 4095
    into, onto = (state.added >> 1 & 1 != 0) & here[b], (state.added >> 5 & 1 != 0) & here[a]
    mine = (with_me.any(0) & ~cut).at[jnp.where(into, a, count)].set(True, mode="drop")
    mine = mine.at[jnp.where(onto, b, count)].set(True, mode="drop")
    held = _held(state)
    close = (flags & Flag.CLOSE_OUT.value) != 0
    place = jnp.where(held, 0, jnp.where(close, 1, jnp.where(mine, 2, 3)))
    real = scene.ids >= 0
    rank = jnp.where(real, place << 22 | scene.ids, jnp.iinfo(jnp.int32).max)
    best = jax.ops.segment_min(rank, classes, num_segments=count)
    return real & (rank == best[classes])


def wander(
    scene: Scene,
    state: State,
    used: Array,
    classes: Array,
    actions: ActionTable,
    log_weights: Array,
    keys: Array,
    *,
    weariness: float,
) -> tuple[tuple[State, Array], tuple[Array, State]]:
    """Random legal actions whose English names mean the objects they act on.

    Args:
        scene, state, classes: the household and where it starts.
        used: float32[A], how often each action was taken before.
        actions: table of A actions.
        log_weights: float32[A], the log of each action's share among those that are legal.
        keys: random keys of T steps.
        weariness: what each earlier use of an action takes from its log-weight.

    Returns:
        State and use at the end, to go on from; the actions' numbers int32[T] (-1 where none was
        legal: nothing happens) and the states after each, stacked along a first axis of T.
    """

    def one(carry: tuple[State, Array], key: Array):
        state, used = carry
        named = resolves(scene, state, classes)

        def clear(node: Array) -> Array:
            return (node < 0) | named[jnp.maximum(node, 0)]

        # The reference lets one grab what one holds, into the other hand; nobody says that.
        again = (actions.verb == _GRAB) & _held(state)[jnp.maximum(actions.obj, 0)]
        allowed = legal(scene, state, actions) & clear(actions.obj) & clear(actions.target) & ~again
        logits = jnp.where(allowed, log_weights - weariness * used, -jnp.inf)
        choice = jax.random.categorical(key, logits)
        after, _ = step(
            scene, state, actions.verb[choice], actions.obj[choice], actions.target[choice]
        )
        some = allowed.any()
        after = jax.tree.map(lambda new, old: jnp.where(some, new, old), after, state)
        used = used.at[choice].add(1.0)
        return (after, used), (jnp.where(some, choice, -1), after)

    return jax.lax.scan(one, (state, used), keys)


def with_start(start: State, states: State) -> State:
    """States stacked along a first axis of T, with the one before them put in front: T+1."""
    return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), start, states)


# Share of a verb among what is legal. Verbs that always find an object (they need no nearness, or
# nearly none) divide theirs among the objects of the table; the others have it for each.
_SHARED = {"WALK": 1.0, "RUN": 0.02, "FIND": 0.1, "TURNTO": 0.5}
_SHARED |= {
    "TOUCH": 0.3,
    "WASH": 0.1,
    "RINSE": 0.1,
    "SCRUB": 0.1,
    "WIPE": 0.1,
    "POINTAT": 0.1,
    "TYPE": 0.3,
}
_WEIGHTS = {"GRAB": 3.0, "PUTBACK": 1.5, "PUTIN": 3.0, "PUTOBJBACK": 0.3, "DROP": 0.1}
_WEIGHTS |= {"RELEASE": 0.02, "OPEN": 3.0, "CLOSE": 1.0, "SWITCHON": 4.0, "SWITCHOFF": 1.0}
_WEIGHTS |= {"PLUGIN": 3.0, "PLUGOUT": 0.2, "SIT": 2.0, "LIE": 2.0, "STANDUP": 0.7}
_WEIGHTS |= {"LOOKAT": 0.5, "WATCH": 2.0, "POUR": 3.0, "PUTON": 2.0, "PUTOFF": 1.0}
_WEIGHTS |= {"DRINK": 2.0, "READ": 2.0, "EAT": 1.0, "CUT": 2.0, "PUSH": 0.02}
_WEIGHTS |= {"PULL": 0.05, "MOVE": 0.05, "SQUEEZE": 0.1, "SLEEP": 0.4, "WAKEUP": 0.1}
_SCENERY = ("wall", "floor", "ceiling", "character")
# What an object must be for a verb to make sense with it; verbs that are absent take anything.
_NEEDS = {
    "GRAB": Trait.GRABBABLE, "PUTOBJBACK": Trait.GRABBABLE, "DROP": Trait.GRABBABLE,
    "RELEASE": Trait.GRABBABLE, "OPEN": Trait.OPENABLE, "CLOSE": Trait.OPENABLE,
    "SWITCHON": Trait.HAS_SWITCH, "SWITCHOFF": Trait.HAS_SWITCH, "PLUGIN": Trait.HAS_PLUG,
    "PLUGOUT": Trait.HAS_PLUG, "SIT": Trait.SITTABLE, "LIE": Trait.LIEABLE,
    "WATCH": Trait.LOOKABLE, "PUTON": Trait.CLOTHES, "PUTOFF": Trait.CLOTHES,
    "DRINK": Trait.DRINKABLE, "READ": Trait.READABLE, "EAT": Trait.EATABLE, "CUT": Trait.CUTTABLE,
    "TYPE": Trait.TYPEABLE, "PULL": Trait.MOVABLE, "MOVE": Trait.MOVABLE,
    "SQUEEZE": Trait.SQUEEZABLE, "LOOKAT": Trait.LOOKABLE, "GREET": Trait.PERSON,
}  # fmt: skip


def _in_focus(world: World, focus: Focus, rng: np.random.Generator) -> list[int]:
    """Objects of an episode: some of each kind, chosen by class first, and every room."""

    def some(trait: Trait, count: int) -> list[int]:
        by_class = world.kinds[trait]
        names = list(by_class)
        chosen = rng.permutation(len(names))[:count]
        return [int(rng.choice(by_class[names[k]])) for k in chosen]

    kinds = {
        Trait.GRABBABLE: focus.grabbable,
        Trait.CAN_OPEN: focus.openable,
        Trait.HAS_SWITCH: focus.switch,
        Trait.SITTABLE: focus.seat,
        Trait.SURFACE: focus.surface,
        Trait.LOOKABLE: focus.lookable,
    }
    found = [i for trait, count in kinds.items() for i in some(trait, count)]
    parents = np.asarray(world.scene.inside)
    found += [int(p) for i in found for p in parents[i] if p >= 0]
    found += [room for rooms in world.kinds[Trait.ROOM].values() for room in rooms]
    return list(dict.fromkeys(found))[: focus.objects]


def focus_table(
    world: World, focus: Focus, rng: np.random.Generator
) -> tuple[ActionTable, np.ndarray]:
    """The actions that make sense with a few random objects, and their log-weights float32[A]."""
    objects = _in_focus(world, focus, rng)

    def having(trait: Trait) -> list[int]:
        return [i for i in objects if world.traits[i] >> int(trait) & 1]

    rows: list[tuple[int, int, int, float]] = []

    def add(verb: str, pairs: Sequence[tuple[int, int]]) -> None:
        weight = _WEIGHTS[verb] if verb in _WEIGHTS else _SHARED[verb] / max(len(pairs), 1)
        rows.extend((VERB_INDEX[verb], a, b, weight) for a, b in pairs)

    def total(row: tuple[int, int, int, float]) -> float:
        verb = VERBS[row[0]].name
        # Without a walk nothing can be reached.
        return np.inf if verb == "WALK" else _WEIGHTS.get(verb) or _SHARED[verb]

    carried, surfaces = having(Trait.GRABBABLE), having(Trait.SURFACE)
    boxes = having(Trait.CAN_OPEN)
    places = list(dict.fromkeys(surfaces + boxes))
    add("PUTBACK", [(a, b) for a in carried for b in places if a != b])
    add("PUTIN", [(a, b) for a in carried for b in boxes if a != b])
    cups = having(Trait.RECIPIENT)
    add("POUR", [(a, b) for a in having(Trait.POURABLE) for b in cups if a != b])
    for verb in VERBS:
        if verb.arity == 0:
            add(verb.name, [(-1, -1)])
        elif verb.arity == 1 and (verb.name in _SHARED or verb.name in _WEIGHTS):
            need = _NEEDS.get(verb.name)
            add(verb.name, [(i, -1) for i in (objects if need is None else having(need))])
    # The rarest verbs go first when the table is full.
    rows = sorted(rows, key=total, reverse=True)[: focus.actions]
    return _table(rows, objects, focus), _padded([np.log(r[3]) for r in rows], focus.actions)


def _padded(values: Sequence[float], size: int) -> np.ndarray:
    out = np.zeros(size, np.float32)
    out[: len(values)] = values
    return out


def _table(
    rows: Sequence[tuple[int, int, int, float]], objects: Sequence[int], focus: Focus
) -> ActionTable:
    size = focus.actions
    columns = np.full((3, size), -1, np.int32)
    columns[0] = 0
    columns[:, : len(rows)] = np.array([row[:3] for row in rows], np.int32).T
    named = np.full(focus.objects, -1, np.int32)
    named[: len(objects)] = objects
    slot = {node: k for k, node in enumerate(objects)}
    slots = np.array([[slot.get(int(i), 0) for i in column] for column in columns[1:]], np.int32)
    fields: dict[str, Any] = {
        "verb": columns[0],
        "obj": columns[1],
        "target": columns[2],
        "mask": np.arange(size) < len(rows),
        "objects": named,
        "obj_slot": slots[0],
        "target_slot": slots[1],
    }
    return ActionTable(**fields)


_STRIDE = 4  # steps of one call, so that episodes of any length share a program


@jax.jit
def _wander_all(scene, states, used, classes, actions, log_weights, keys, weariness):
    def one(state, used, actions, log_weights, keys):
        return wander(scene, state, used, classes, actions, log_weights, keys, weariness=weariness)

    return jax.vmap(one)(states, used, actions, log_weights, keys)


def _wandered(
    world: World, actions: ActionTable, log_weights: np.ndarray, keys: Array, focus: Focus
) -> tuple[np.ndarray, State]:
    """Episodes from the world's start, by `wander`: choices int32[B, T], states [B, T+1]."""
    steps = -(-focus.length // _STRIDE) * _STRIDE
    each = jax.vmap(lambda key: jax.random.split(key, steps))(keys)
    start: State = jax.tree.map(lambda x: np.repeat(np.asarray(x)[None], len(keys), 0), world.state)
    carry = (start, np.zeros_like(log_weights))
    choices, states = [], [jax.tree.map(lambda x: x[:, None], start)]
    for at in range(0, steps, _STRIDE):
        carry, (chosen, after) = _wander_all(
            world.scene,
            *carry,
            world.classes,
            actions,
            log_weights,
            each[:, at : at + _STRIDE],
            focus.weariness,
        )
        choices.append(np.asarray(chosen))
        states.append(after)
    along: State = jax.tree.map(lambda *x: np.concatenate(x, 1)[:, : focus.length + 1], *states)
    return np.concatenate(choices, 1)[:, : focus.length], along


def errand_batches(
    worlds: Sequence[World], count: int, *, seed: int, focus: Focus | None = None, batch: int = 64
) -> Iterator[tuple[World, list[Episode], State]]:
    """Random episodes, the worlds taking turns batch by batch.

    Args:
        worlds: of `load_worlds`, all of the same array sizes.
        count: episodes in all.
        seed: decides objects, actions and the order of the worlds.
        focus: how the episodes look.
        batch: episodes simulated at once, all in one world.

    Yields:
        A world, the episodes that were simulated in it, and their states stacked along axes
        [B, T+1] (B is `batch` also where fewer episodes are left).
    """
    focus = focus or Focus()
    rng = np.random.default_rng(seed)
    key = jax.random.key(seed)
    order = rng.permutation(len(worlds))
    for turn, first in enumerate(range(0, count, batch)):
        world = worlds[order[turn % len(worlds)]]
        tables = [focus_table(world, focus, rng) for _ in range(batch)]
        actions, weights = jax.tree.map(lambda *leaves: np.stack(leaves), *tables)
        keys = jax.random.split(jax.random.fold_in(key, turn), batch)
        choices, states = _wandered(world, actions, weights, keys, focus)
        episodes = []
        for i in range(min(batch, count - first)):
            taken = [int(c) for c in choices[i] if c >= 0]  # once nothing is legal, nothing will be
            lines = [_line(world.names, tables[i][0], c) for c in taken]
            episodes.append(world.recorder.episode(lines, states.nodes[i], states.added[i]))
        yield world, episodes, states


def errands(
    worlds: Sequence[World], count: int, *, seed: int, focus: Focus | None = None, batch: int = 64
) -> Iterator[Episode]:
    """The episodes of `errand_batches` one by one."""
    for _, episodes, _ in errand_batches(worlds, count, seed=seed, focus=focus, batch=batch):
        yield from episodes


def _line(names: Names, table: ActionTable, choice: int) -> Line:
    verb = VERBS[int(table.verb[choice])]
    nodes = (int(table.obj[choice]), int(table.target[choice]))[: verb.arity]
    return Line(verb.name, tuple((names.class_name(i), names.nodes[i]["id"]) for i in nodes))


def line_arrays(
    names: Names, lines: Sequence[Sequence[Line]], length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scripts as arrays: verb, object and target int32[B, length], -1 for what is absent."""
    out = np.full((3, len(lines), length), -1, np.int32)
    out[0] = 0
    for b, script in enumerate(lines):
        for t, line in enumerate(script):
            nodes = [names.index[i] for _, i in line.arguments if i is not None]
            out[0, b, t] = VERB_INDEX[line.verb]
            out[1 : 1 + len(nodes), b, t] = nodes
    return out[0], out[1], out[2]


def replay(world: World, lines: Sequence[Line]) -> tuple[Episode, State]:
    """The episode of a script from the world's start, e.g. of one that search found.

    Returns:
        The episode, and its states stacked along a first axis of T+1.

    Raises:
        EgjaxError: the simulator refuses a line.
    """
    state = jax.tree.map(jnp.asarray, world.state)
    states = [state]
    verb, obj, target = (column[0] for column in line_arrays(world.names, [lines], len(lines)))
    for t, line in enumerate(lines):
        state, code = _one_step(world.scene, state, verb[t], obj[t], target[t])
        if int(code):
            raise EgjaxError(f"step {t + 1} is refused: {line}", where="script")
        states.append(state)
    stacked: State = jax.tree.map(lambda *leaves: np.stack(leaves), *states)
    return world.recorder.episode(lines, stacked.nodes, stacked.added), stacked  # type: ignore[arg-type]


_one_step = jax.jit(step)


def replay_all(
    world: World, scripts: Sequence[Sequence[Line]], *, length: int, batch: int
) -> tuple[list[Episode], State]:
    """`replay` of several scripts in one go; of each its first steps, up to the first refusal.

    Args:
        world: where.
        scripts: at most `batch` of them.
        length: steps T looked at.
        batch: scripts played at once, so that one compilation serves.

    Returns:
        An episode each, and their states stacked along axes [batch, T+1].
    """
    cut = [list(script[:length]) for script in scripts]
    columns = line_arrays(world.names, cut + [[]] * (batch - len(cut)), length)
    real = np.arange(length) < np.array([len(s) for s in cut] + [0] * (batch - len(cut)))[:, None]
    accepted, states = jax.tree.map(
        np.asarray, _play_all(world.scene, world.state, *map(jnp.asarray, columns), real)
    )
    count = accepted.sum(1)
    episodes = [
        world.recorder.episode(lines[:n], states.nodes[i, : n + 1], states.added[i, : n + 1])
        for i, (lines, n) in enumerate(zip(cut, count, strict=False))
    ]
    return episodes, states


@jax.jit
def _play_all(scene, state, verb, obj, target, real):
    start = jax.tree.map(jnp.asarray, state)

    def one(verb, obj, target, real):
        def act(carry, row):
            state, fine = carry
            verb, obj, target, real = row
            after, code = step(scene, state, verb, obj, target)
            fine &= real & (code == 0)
            state = jax.tree.map(lambda new, old: jnp.where(fine, new, old), after, state)
            return (state, fine), (fine, state)

        _, (fine, states) = jax.lax.scan(act, (start, True), (verb, obj, target, real))
        return fine, with_start(start, states)

    return jax.vmap(one)(verb, obj, target, real)
