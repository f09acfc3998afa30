"""Plans that are worse than a shortest one in a way that has a name.

A redundant plan reaches the goal; what is needless in it, against the success that it shares most
steps with, makes its kind:

    repeat    steps that the plan takes a second time
    detour    walks to where nothing is done
    object    steps with a thing that the success leaves alone
    extra     further steps with the success's own things

A failed one is the success with a needed step left out (`omission`), or with two neighbouring steps
on one thing in the wrong order (`order`): mostly refused at some step, so that it carries a reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import jax
import numpy as np

from egjax.search.label import Plan, pad, replays
from egjax.search.mcts import Embedding, World
from egjax.sim.vocab import VERB_INDEX
from egjax.types import ActionTable, Task

__all__ = ["FAILED", "REDUNDANT", "redundancy", "variants"]

REDUNDANT = ("detour", "repeat", "object")
FAILED = ("omission", "order")
_WALKS = tuple(VERB_INDEX[verb] for verb in ("WALK", "RUN", "FIND"))
_ATTEMPTS = 6  # at a plan of one kind, before its place is left empty

Offer = list[tuple[int, bool]]
"""Actions of a longer plan, and whether each is one of the success's own."""


def _walks(actions: ActionTable, action: int) -> bool:
    return int(actions.verb[action]) in _WALKS


def _things(actions: ActionTable, plan: Sequence[int]) -> set[int]:
    """Nodes that a plan's steps name, -1 among them where a step names none."""
    return {int(column[a]) for a in plan for column in (actions.obj, actions.target)}


def redundancy(plan: Plan, successes: Sequence[Plan], actions: ActionTable) -> str:
    """What is needless in a plan: `repeat`, `detour`, `object` or `extra`.

    Args:
        plan: it reaches the goal.
        successes: at least one without a needless step.
        actions: the task's table, NumPy arrays.
    """
    taken = Counter(plan)
    base = max(successes, key=lambda success: (taken & Counter(success)).total())
    needless = taken - Counter(base)
    if all(taken[action] > 1 for action in needless):
        return "repeat"
    if all(_walks(actions, action) for action in needless):
        return "detour"
    known = _things(actions, base) | {-1}
    strange = [a for a in needless if not _walks(actions, a)]
    return "object" if _things(actions, strange) - known else "extra"


def _places(actions: ActionTable, plan: Plan) -> list[int]:
    """Where a walk does no harm: before another walk; anywhere if there is none."""
    return [t for t, a in enumerate(plan) if _walks(actions, a)] or list(range(len(plan)))


def _insert(plan: Plan, place: int, steps: Sequence[int]) -> Offer:
    return [
        *((a, True) for a in plan[:place]),
        *((a, False) for a in steps),
        *((a, True) for a in plan[place:]),
    ]


def _detour(actions: ActionTable, plan: Plan, rng: np.random.Generator) -> Offer:
    known = _things(actions, plan)
    away = [
        a
        for a in np.flatnonzero(np.isin(actions.verb, _WALKS) & actions.mask)
        if int(actions.obj[a]) not in known
    ]
    chosen = rng.permutation(away)[: rng.integers(1, 3)] if away else ()
    return _insert(plan, int(rng.choice(_places(actions, plan))), [int(a) for a in chosen])


def _repeat(actions: ActionTable, plan: Plan, rng: np.random.Generator) -> Offer:
    # The step before once more; a walk made earlier where another walk follows.
    if rng.random() < 0.5 and len(plan) > 1:
        place = int(rng.integers(1, len(plan)))
        return _insert(plan, place, [plan[place - 1]])
    place = int(rng.choice(_places(actions, plan)))
    before = [a for a in plan[: place + 1] if _walks(actions, a)]
    return _insert(plan, place, [int(rng.choice(before))] if before else [])


def _object(actions: ActionTable, plan: Plan, rng: np.random.Generator) -> Offer:
    known = _things(actions, plan) | {-1}
    other = np.flatnonzero(
        actions.mask
        & ~np.isin(actions.verb, _WALKS)
        & ~np.isin(actions.obj, list(known))
        # What is put needs to be held, so a second thing comes in by itself only.
        & (np.asarray(actions.target) < 0)
    )
    if not len(other):
        return _insert(plan, 0, [])
    deed = int(rng.choice(other))
    walks = np.flatnonzero((actions.verb == _WALKS[0]) & (actions.obj == actions.obj[deed]))
    steps = [*map(int, walks[:1]), deed]
    return _insert(plan, int(rng.choice(_places(actions, plan))), steps)


_OFFERS: dict[str, Callable[[ActionTable, Plan, np.random.Generator], Offer]] = {
    "detour": _detour,
    "repeat": _repeat,
    "object": _object,
}


def _omissions(plan: Plan, rng: np.random.Generator, each: int) -> list[Plan]:
    places = rng.permutation(len(plan))[:each] if len(plan) > 1 else ()
    return [plan[:t] + plan[t + 1 :] for t in places]


def _orders(actions: ActionTable, plan: Plan, rng: np.random.Generator, each: int) -> list[Plan]:
    def shared(t: int) -> set[int]:
        return (_things(actions, plan[t : t + 1]) & _things(actions, plan[t + 1 : t + 2])) - {-1}

    places = [t for t in range(len(plan) - 1) if plan[t] != plan[t + 1] and shared(t)]
    chosen = rng.permutation(places)[:each] if places else ()
    return [plan[:t] + (plan[t + 1], plan[t]) + plan[t + 2 :] for t in map(int, chosen)]


def variants(
    world: World,
    tasks: Task,
    embedding: Embedding,
    successes: Sequence[Sequence[Plan]],
    *,
    each: int,
    seed: int | Sequence[int],
) -> list[dict[str, list[Plan]]]:
    """Worse plans made of each task's shortest success, by kind (`REDUNDANT` and `FAILED`).

    Redundant ones are played: all their steps are legal, the goal is reached by the last and no
    sooner, and without the inserted steps they are the success. Failed ones may have illegal
    steps; which, and whether two steps in another order do no harm after all, is for a judge.

    Args:
        world: the rules.
        tasks: a batch of B.
        embedding: where they start, a pytree of [B, ...].
        successes: plans of each task without a needless step, shortest first; none gives none.
        each: plans of each kind at most.
        seed: of what is inserted and left out.
    """
    if not any(each and found and found[0] for found in successes):
        return [{kind: [] for kind in (*REDUNDANT, *FAILED)} for _ in successes]
    rng = np.random.default_rng(seed)
    tables = [
        jax.tree.map(lambda leaf, b=b: np.asarray(leaf[b]), tasks.actions)
        for b in range(len(successes))
    ]
    offers: list[list[tuple[str, Offer]]] = [
        [
            (kind, offer(tables[b], found[0], rng))
            for kind, offer in _OFFERS.items()
            for _ in range(_ATTEMPTS * each if found and found[0] else 0)
        ]
        for b, found in enumerate(successes)
    ]
    plans = pad([[tuple(a for a, _ in offer) for _, offer in row] for row in offers])
    accepted, solved, _ = replays(world, tasks, embedding, plans)
    made: list[dict[str, list[Plan]]] = []
    for b, row in enumerate(offers):
        found: dict[str, list[Plan]] = {kind: [] for kind in (*REDUNDANT, *FAILED)}
        for p, (kind, offer) in enumerate(row):
            steps = list(zip(offer, accepted[b, p], strict=False))
            # Inserted steps that are refused go; the plan's own must all stay.
            plan = tuple(a for (a, _), kept in steps if kept)
            whole = solved[b, p] and all(kept for (_, own), kept in steps if own)
            if not whole or len(plan) == len(successes[b][0]) or len(found[kind]) == each:
                continue
            if plan not in found[kind] and redundancy(plan, successes[b][:1], tables[b]) == kind:
                found[kind].append(plan)
        if row:
            found["omission"] = _omissions(successes[b][0], rng, each)
            found["order"] = _orders(tables[b], successes[b][0], rng, each)
        made.append(found)
    return made
