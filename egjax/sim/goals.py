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
from egjax.sim.world import any_bits, to_lanes
from egjax.types import Goal, Scene, State

__all__ = ["GoalSizes", "Predicate", "encode_goal", "goal_predicates", "satisfied"]


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
        by_class[f"{node['class_name']} ({node['id']})"] = [index]
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


def satisfied(scene: Scene, state: State, goal: Goal) -> Array:
    """Which predicates of a goal hold.

    Returns:
        bool[G]; padding counts as True, so `.all()` is "solved".
    """

    scene, state, goal = jax.tree.map(jnp.asarray, (scene, state, goal))  # numpy without jit, too
    cut = ((state.nodes >> 10) & 15).astype(jnp.uint8)
    live = ~(cut | cut << 4)
    live_lanes, own_lanes = to_lanes(live), to_lanes(state.nodes.astype(jnp.uint8))
    used = state.added >= 0
    source = jnp.where(used, state.added >> 16, -1)
    sink = jnp.where(used, (state.added >> 4) & 4095, -1)
    relation = state.added & 15

    def instance(subject: Array, predicate: Array) -> Array:
        node, bit = jnp.maximum(subject, 0), goal.bit[predicate]
        others = goal.others[predicate]
        flag = (state.nodes[node] >> bit.astype(jnp.uint32) & 1).astype(bool)
        edge = jnp.uint8(1) << jnp.minimum(bit, 7).astype(jnp.uint8)
        row = to_lanes(scene.edges[node]) & live_lanes
        row = jnp.where(node == scene.character, own_lanes, row)
        alive = jnp.where(node == scene.character, jnp.uint8(255), live[node])
        base = (any_bits(row & to_lanes(others)) & alive & edge) != 0
        # The edge to the character stands in the node's own flags, seen from the other end.
        swapped = jnp.where(bit < 4, bit + 4, bit - 4).astype(jnp.uint32)
        mine = (state.nodes[node] >> swapped & 1).astype(bool) & (others[scene.character] > 0)
        out = (source == node) & (relation == bit) & (others[sink] > 0)
        back = (sink == node) & (relation == bit - 4) & (others[source] > 0)
        found = base | mine | (used & (out | back)).any()
        return jnp.where(bit >= 8, flag, found) & (subject >= 0)

    held = jax.vmap(instance)(goal.subject, goal.predicate)
    belongs = goal.predicate[:, None] == jnp.arange(goal.bit.shape[0])
    return (held[:, None] & belongs).any(0) | ~goal.mask
