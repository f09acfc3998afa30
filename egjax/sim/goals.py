"""Goals: what a task's final graph has and its initial one has not, by class; and their test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from egjax.errors import EgjaxError
from egjax.sim.graph import Names
from egjax.sim.vocab import RELATIONS, STATES, state_bit
from egjax.sim.world import any_byte, fold, swap, to_lanes
from egjax.types import Goal, Scene, State

__all__ = [
    "GoalSizes",
    "Predicate",
    "Wanted",
    "encode_goal",
    "goal_predicates",
    "ground",
    "satisfied",
]


class Predicate(NamedTuple):
    """A goal fact by class: a relation (`other` given) or an object state (`other` None)."""

    relation: str
    subject: str
    other: str | None = None

    def __str__(self) -> str:
        words = [self.subject, self.other] if self.other else [self.subject]
        return f"{self.relation}({', '.join(words)})"


class GoalSizes(NamedTuple):
    """Array sizes of a goal: predicates, and instances over all of them."""

    predicates: int = 24
    instances: int = 128


def _facts(graph: Mapping[str, Any], close: bool) -> set[Predicate]:
    classes = {node["id"]: node["class_name"] for node in graph["nodes"]}
    facts = {
        Predicate(state.upper(), node["class_name"])
        for node in graph["nodes"]
        for state in node["states"]
    }
    for edge in graph["edges"]:
        relation = edge["relation_type"].upper()
        if relation == "CLOSE" and not close:
            continue
        a, b = classes[edge["from_id"]], classes[edge["to_id"]]
        if relation == "CLOSE":
            a, b = sorted((a, b), key=lambda name: (name != "character", name))
        facts.add(Predicate(relation, a, b))
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
    predicates: Sequence[Predicate],
    names: Names,
    *,
    nodes: int,
    sizes: GoalSizes | None = None,
    where: str = "goal",
) -> Goal:
    """Arrays of a goal in a scene. The end with fewer instances becomes the subject.

    Args:
        predicates: at least one.
        names: of the scene.
        nodes: padded number of nodes.
        sizes: array sizes; the smallest that fit where absent.
        where: what to call the goal in an error.

    Raises:
        EgjaxError: no predicate, an unknown relation or state, a class that the scene lacks, or
            more than the sizes hold.
    """
    if not predicates:
        raise EgjaxError("no goal predicate", where=where)
    by_class: dict[str, list[int]] = {}
    for index, node in enumerate(names.nodes):
        by_class.setdefault(node["class_name"], []).append(index)
    rows = [_encode_predicate(p, by_class, where) for p in predicates]
    total = sum(len(subjects) for subjects, _, _ in rows)
    sizes = sizes or GoalSizes(len(rows), total)
    if len(rows) > sizes.predicates or total > sizes.instances:
        raise EgjaxError("more predicates or instances than the arrays hold", where=where)
    goal: dict[str, Any] = {
        "subject": np.full(sizes.instances, -1, np.int32),
        "predicate": np.zeros(sizes.instances, np.int32),
        "bit": np.zeros(sizes.predicates, np.int32),
        "others": np.zeros((sizes.predicates, nodes), np.uint8),
        "mask": np.arange(sizes.predicates) < len(rows),
    }
    filled = 0
    for i, (subjects, bit, others) in enumerate(rows):
        goal["subject"][filled : filled + len(subjects)] = subjects
        goal["predicate"][filled : filled + len(subjects)] = i
        filled += len(subjects)
        goal["bit"][i] = bit
        goal["others"][i, others] = 255
    return Goal(**goal)


def _encode_predicate(
    predicate: Predicate, by_class: Mapping[str, Sequence[int]], where: str
) -> tuple[Sequence[int], int, Sequence[int]]:
    """Subjects, bit and other ends of one predicate."""
    for name in (predicate.subject, predicate.other):
        if name is not None and name not in by_class:
            raise EgjaxError(f"the scene has no {name}", where=f"{where} {predicate}")
    subjects = by_class[predicate.subject]
    if predicate.other is None:
        if predicate.relation not in STATES:
            raise EgjaxError(f"unknown state {predicate.relation!r}", where=where)
        return subjects, state_bit(predicate.relation), []
    if predicate.relation not in RELATIONS[:6]:
        raise EgjaxError(f"unknown relation {predicate.relation!r}", where=where)
    kind, others = RELATIONS.index(predicate.relation), by_class[predicate.other]
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
    numbers = jnp.arange(count)
    own = (numbers[:, None] // 32 == jnp.arange(words)).astype(jnp.uint32)
    own = jnp.where(goal.mask[:, None], own << (numbers % 32).astype(jnp.uint32)[:, None], 0)
    one = jnp.where(goal.subject[:, None] >= 0, own[goal.predicate], 0)
    node, bit = jnp.maximum(goal.subject, 0), goal.bit[goal.predicate]
    edge = jnp.where(bit < 8, jnp.uint32(1) << jnp.minimum(bit, 7).astype(jnp.uint32), 0)
    asked = jnp.where(goal.others[goal.predicate] > 0, edge[:, None], 0)
    lanes = jax.vmap(to_lanes)(asked)
    lanes = jnp.where((node == scene.character)[:, None], lanes, lanes & scene.edges[node])
    member = node == jnp.arange(nodes)[:, None]
    others = (goal.others > 0)[:, :, None]
    relation = jnp.arange(8)[:, None] == goal.bit
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
    row = wanted.lanes & jnp.where(mine, own[:, None], live[:, None])
    hit = any_byte(row) & jnp.where(mine, 255, ~cut[node])
    # The edge to the character stands in the node's own flags, seen from the other end.
    hit |= jnp.where(mine, 0, swap(flags & 255)) & wanted.with_character
    hit |= jnp.where(bit >= 8, flags >> bit.astype(jnp.uint32) & 1, 0)
    found = fold(jnp.where((hit != 0)[:, None], wanted.one, 0), jnp.bitwise_or)

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
    numbers = jnp.arange(goal.bit.shape[0])
    held = found[numbers // 32] >> (numbers % 32).astype(jnp.uint32) & 1
    return (held != 0) | ~goal.mask
