"""Goals: what must hold at the end and what must have been done, and their tests.

RobotHow's goals are what a task's final graph has and its initial one has not, by class
(`Predicate`). Others name the acceptable objects one by one (`Fact`) or want actions performed in
order (`Deed`), as the Embodied Agent Interface's do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from egjax.errors import EgjaxError
from egjax.sim.graph import Names
from egjax.sim.vocab import RELATIONS, STATES, VERB_INDEX, VERBS, state_bit
from egjax.sim.world import any_byte, fold, swap, to_lanes
from egjax.types import Goal, Scene, State

__all__ = [
    "Deed",
    "Fact",
    "GoalSizes",
    "Predicate",
    "Wanted",
    "all_performed",
    "encode_goal",
    "goal_predicates",
    "ground",
    "perform",
    "satisfied",
]


class Predicate(NamedTuple):
    """A goal fact: a relation (`other` given) or an object state (`other` None).

    An object is a class, any of which serves, or `class (id)`, this very one.
    """

    relation: str
    subject: str
    other: str | None = None

    def __str__(self) -> str:
        words = [self.subject, self.other] if self.other else [self.subject]
        return f"{self.relation}({', '.join(words)})"


class Fact(NamedTuple):
    """A goal fact by graph ids: any of `subjects`, and for a relation any of `others`, serves."""

    relation: str
    subjects: tuple[int, ...]
    others: tuple[int, ...] | None = None

    def __str__(self) -> str:
        ends = [self.subjects] if self.others is None else [self.subjects, self.others]
        return f"{self.relation}({', '.join('|'.join(map(str, end)) for end in ends)})"


class Deed(NamedTuple):
    """An action that must have been performed: one of the verbs, on one of the objects (graph ids;
    None for any) as its first argument."""

    verbs: tuple[str, ...]
    objects: tuple[int, ...] | None = None

    def __str__(self) -> str:
        things = "" if self.objects is None else "|".join(map(str, self.objects))
        return f"{'|'.join(self.verbs)}({things})"


class GoalSizes(NamedTuple):
    """Array sizes of a goal: predicates, instances over all of them, actions to be performed."""

    predicates: int = 24
    instances: int = 128
    deeds: int = 0


def _facts(graph: Mapping[str, Any], close: bool) -> set[Predicate]:
    classes = {node["id"]: node["class_name"] for node in graph["nodes"]}
    facts = {
        Predicate(state.upper(), node["class_name"])
        for node in graph["nodes"]
        for state in node["states"]
    }
    # Most edges are CLOSE, and most others say of a class what another edge has said already.
    pairs = {
        (edge["relation_type"], classes[edge["from_id"]], classes[edge["to_id"]])
        for edge in graph["edges"]
        if close or edge["relation_type"] != "CLOSE"
    }
    for relation, a, b in pairs:
        if relation.upper() == "CLOSE":
            if not close:
                continue
            a, b = sorted((a, b), key=lambda name: (name != "character", name))
        facts.add(Predicate(relation.upper(), a, b))
    return facts


def goal_predicates(
    init: Mapping[str, Any], final: Mapping[str, Any], *, close: bool
) -> list[Predicate]:
    """The class-level facts that the final graph has and the initial one has not.

    Two identical cups count alike; CLOSE is unordered (the character first).

    Args:
        init, final: graphs.
        close: whether CLOSE counts: True gives the goal set `e2wm`, False `core`.

    Returns:
        Sorted predicates.
    """
    known = _facts(init, close)
    return sorted(
        _facts(final, close) - known, key=lambda p: (p.relation, p.subject, p.other or "")
    )


def encode_goal(
    predicates: Sequence[Predicate | Fact],
    names: Names,
    *,
    deeds: Sequence[Deed] = (),
    nodes: int,
    sizes: GoalSizes | None = None,
    where: str = "goal",
) -> Goal:
    """Arrays of a goal in a scene. The end with fewer instances becomes the subject.

    Args:
        predicates: what must hold at the end.
        names: of the scene.
        deeds: what must have been performed, in this order.
        nodes: padded number of nodes.
        sizes: array sizes; the smallest that fit where absent.
        where: what to call the goal in an error.

    Raises:
        EgjaxError: nothing wanted, an unknown relation, state or verb, a class or id that the
            scene lacks, or more than the sizes hold.
    """
    if not predicates and not deeds:
        raise EgjaxError("no goal predicate", where=where)
    by_class: dict[str, list[int]] = {}
    for index, node in enumerate(names.nodes):
        by_class[f"{node['class_name']} ({node['id']})"] = [index]
        by_class.setdefault(node["class_name"], []).append(index)
    rows = [
        _encode_predicate(p.relation, *_ends(p, by_class, names, where), where) for p in predicates
    ]
    total = sum(len(subjects) for subjects, _, _ in rows)
    # A goal of deeds alone has one predicate of padding.
    sizes = sizes or GoalSizes(max(len(rows), 1), max(total, 1), len(deeds))
    many = len(rows) > sizes.predicates or total > sizes.instances or len(deeds) > sizes.deeds
    if many:
        raise EgjaxError("more predicates or instances than the arrays hold", where=where)
    goal: dict[str, Any] = {
        "subject": np.full(sizes.instances, -1, np.int32),
        "predicate": np.zeros(sizes.instances, np.int32),
        "bit": np.zeros(sizes.predicates, np.int32),
        "others": np.zeros((sizes.predicates, nodes), np.uint8),
        "mask": np.arange(sizes.predicates) < len(rows),
        "deed_verbs": np.zeros((sizes.deeds, len(VERBS)), bool),
        "deed_objects": np.zeros((sizes.deeds, nodes), bool),
    }
    filled = 0
    for i, (subjects, bit, others) in enumerate(rows):
        goal["subject"][filled : filled + len(subjects)] = subjects
        goal["predicate"][filled : filled + len(subjects)] = i
        filled += len(subjects)
        goal["bit"][i] = bit
        goal["others"][i, others] = 255
    for i, deed in enumerate(deeds):
        unknown = [verb for verb in deed.verbs if verb not in VERB_INDEX]
        if unknown or not deed.verbs:
            raise EgjaxError(f"unknown verb in {deed}", where=where)
        goal["deed_verbs"][i, [VERB_INDEX[verb] for verb in deed.verbs]] = True
        chosen = slice(None) if deed.objects is None else _indices(deed.objects, names, where)
        goal["deed_objects"][i, chosen] = True
    return Goal(**goal)


def _indices(ids: Sequence[int], names: Names, where: str) -> list[int]:
    missing = [i for i in ids if i not in names.index]
    if missing:
        raise EgjaxError(f"the scene has no node {missing[0]}", where=where)
    return [names.index[i] for i in ids]


def _ends(
    predicate: Predicate | Fact, by_class: Mapping[str, Sequence[int]], names: Names, where: str
) -> tuple[Sequence[int], Sequence[int] | None]:
    """Node indices of the acceptable subjects and, for a relation, of the other ends."""
    if isinstance(predicate, Fact):
        others = predicate.others
        there = None if others is None else _indices(others, names, where)
        return _indices(predicate.subjects, names, where), there
    for name in (predicate.subject, predicate.other):
        if name is not None and name not in by_class:
            raise EgjaxError(f"the scene has no {name}", where=f"{where} {predicate}")
    there = None if predicate.other is None else by_class[predicate.other]
    return by_class[predicate.subject], there


def _encode_predicate(
    relation: str, subjects: Sequence[int], others: Sequence[int] | None, where: str
) -> tuple[Sequence[int], int, Sequence[int]]:
    """Subjects, bit and other ends of one predicate."""
    if others is None:
        if relation not in STATES:
            raise EgjaxError(f"unknown state {relation!r}", where=where)
        return subjects, state_bit(relation), []
    if relation not in RELATIONS[:6]:
        raise EgjaxError(f"unknown relation {relation!r}", where=where)
    kind = RELATIONS.index(relation)
    if kind >= 4:  # hands are the character's, in bits 8 and 9 of the held node
        return others, kind + 4, []
    if len(others) < len(subjects):
        return others, kind + 4, subjects
    return subjects, kind, others


class Wanted(NamedTuple):
    """A goal with what never changes of it in a scene, see `ground`; W = G/32 words of predicates.

    Attributes:
        goal: the goal.
        lanes: uint32[L, K]. Of each instance, the bit asked for in the row of its subject (see
            `Scene.edges`) at every node acceptable at the other end, if the scene has that edge
            from the start; the character's row has all.
        with_character: uint32[K]. The bit asked for if the character is acceptable, else 0.
        one: uint32[K, W]. The one bit of each instance's predicate; 0 for padding.
        subjects, others: uint32[N, W]. Predicates whose subject, or other end, a node may be.
        relations: uint32[8, W]. Predicates that ask for a bit of a row.
    """

    goal: Goal
    lanes: Array
    with_character: Array
    one: Array
    subjects: Array
    others: Array
    relations: Array


def ground(scene: Scene, goal: Goal) -> Wanted:
    """What never changes of a goal; to be computed once, outside of loops over states."""
    scene, goal = jax.tree.map(jnp.asarray, (scene, goal))
    count, nodes = goal.bit.shape[0], scene.ids.shape[0]
    words = -(-count // 32)
    numbers = jnp.arange(count, dtype=jnp.int32)
    own = (numbers[:, None] // 32 == jnp.arange(words, dtype=jnp.int32)).astype(jnp.uint32)
    own = jnp.where(goal.mask[:, None], own << (numbers % 32).astype(jnp.uint32)[:, None], 0)
    one = jnp.where(goal.subject[:, None] >= 0, own[goal.predicate], 0)
    node, bit = jnp.maximum(goal.subject, 0), goal.bit[goal.predicate]
    edge = jnp.where(bit < 8, jnp.uint32(1) << jnp.minimum(bit, 7).astype(jnp.uint32), 0)
    asked = jnp.where(goal.others[goal.predicate] > 0, edge[:, None], 0)
    lanes = jax.vmap(to_lanes)(asked)
    lanes = jnp.where((node == scene.character)[:, None], lanes, lanes & scene.edges[node])
    member = node == jnp.arange(nodes, dtype=jnp.int32)[:, None]
    others = (goal.others > 0)[:, :, None]
    relation = jnp.arange(8, dtype=jnp.int32)[:, None] == goal.bit
    return Wanted(
        goal=goal,
        lanes=lanes.T,
        with_character=asked[:, scene.character],
        one=one,
        subjects=jnp.bitwise_or.reduce(jnp.where(member[..., None], one, 0), axis=1),
        others=jnp.bitwise_or.reduce(jnp.where(others, own[:, None], 0), axis=0),
        relations=jnp.bitwise_or.reduce(jnp.where(relation[..., None], own, 0), axis=1),
    )


def satisfied(scene: Scene, state: State, goal: Goal | Wanted) -> Array:
    """Which predicates of a goal hold.

    Args:
        scene, state: one scene and state.
        goal: a goal, or what `ground` gave for many states.

    Returns:
        bool[G]; padding counts as True, so `.all()` is "solved".
    """
    scene, state = jax.tree.map(jnp.asarray, (scene, state))  # numpy without jit, too
    wanted = ground(scene, goal) if isinstance(goal, Goal) else goal
    goal, me = wanted.goal, scene.character
    node, bit = jnp.maximum(goal.subject, 0), goal.bit[goal.predicate]
    mine, flags = node == me, state.nodes[node]
    cut = state.nodes >> 10 & 15
    cut = cut | cut << 4
    live, own = to_lanes(~cut & 255), to_lanes(state.nodes & 255)
    hit = any_byte(
        (wanted.lanes, own[:, None], live[:, None]),
        lambda wanted, own, live: wanted & jnp.where(mine, own, live),
    )
    hit &= jnp.where(mine, 255, ~cut[node])
    # The edge to the character stands in the node's own flags, seen from the other end.
    hit |= jnp.where(mine, 0, swap(flags & 255)) & wanted.with_character
    hit |= jnp.where(bit >= 8, flags >> bit.astype(jnp.uint32) & 1, 0)
    found = fold(
        ((hit != 0)[:, None], wanted.one),
        jnp.bitwise_or,
        lambda hit, one: jnp.where(hit, one, jnp.uint32(0)),
    )

    a, b = state.added >> 20, state.added >> 8 & 4095
    bits = state.added & 255

    def asking(bits: Array) -> Array:
        have = (bits >> jnp.arange(8, dtype=jnp.uint32)[:, None] & 1) != 0
        return fold(jnp.where(have[..., None], wanted.relations[:, None], 0), jnp.bitwise_or)

    subjects, others = wanted.subjects, wanted.others
    added = (subjects[a] & others[b] & asking(bits)) | (
        subjects[b] & others[a] & asking(swap(bits))
    )
    found |= fold(added, jnp.bitwise_or)
    numbers = jnp.arange(goal.bit.shape[0], dtype=jnp.int32)
    held = found[numbers // 32] >> (numbers % 32).astype(jnp.uint32) & 1
    return (held != 0) | ~goal.mask


def perform(goal: Goal, performed: Array, verb: Array, obj: Array, accepted: Array | bool) -> Array:
    """How many of the wanted actions have been performed after one more action.

    Args:
        goal: one goal.
        performed: int32[]. How many before it.
        verb, obj: int32[]. The action; `obj` is -1 where the verb takes none.
        accepted: bool[]. A refused action counts for nothing.

    Returns:
        int32[].
    """
    wanted = goal.deed_verbs.shape[0]
    if not wanted:
        return performed
    verbs, objects = jnp.asarray(goal.deed_verbs), jnp.asarray(goal.deed_objects)
    at = jnp.minimum(performed, wanted - 1)
    hit = verbs[at, verb] & objects[at, jnp.maximum(obj, 0)]
    hit &= (obj >= 0) | objects[at].all()
    return performed + (hit & accepted & (performed < wanted)).astype(jnp.int32)


def all_performed(goal: Goal, performed: Array) -> Array:
    """bool[]: every action that the goal wants has been performed."""
    return performed >= jnp.sum(jnp.asarray(goal.deed_verbs).any(-1), dtype=jnp.int32)
