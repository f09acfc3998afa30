from __future__ import annotations

import functools
import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egjax.sim.choices import contains, draw, legal_choices
from egjax.sim.graph import encode
from egjax.sim.text import bind, parse_script
from egjax.sim.vocab import VERB_INDEX, VERBS
from egjax.sim.world import step

GRAPH = {
    "nodes": [
        {"id": 11, "class_name": "kitchen", "category": "Rooms", "properties": [], "states": []},
        {"id": 12, "class_name": "hall", "category": "Rooms", "properties": [], "states": []},
        {"id": 13, "class_name": "door", "properties": ["CAN_OPEN"], "states": ["CLOSED"]},
        {"id": 14, "class_name": "milk", "properties": ["GRABBABLE", "DRINKABLE"], "states": []},
        {"id": 15, "class_name": "cup", "properties": ["GRABBABLE", "RECIPIENT"], "states": []},
        {"id": 16, "class_name": "fridge", "properties": ["CAN_OPEN"], "states": ["CLOSED"]},
        {"id": 17, "class_name": "bench", "properties": ["SITTABLE", "SURFACES"], "states": []},
        {"id": 18, "class_name": "character", "properties": [], "states": []},
    ],
    "edges": [
        {"from_id": a, "relation_type": relation, "to_id": b}
        for a, relation, b in [
            *((i, "INSIDE", 11) for i in (13, 14, 15, 16, 18)),
            (17, "INSIDE", 12), (14, "INSIDE", 16), (15, "CLOSE", 16), (16, "CLOSE", 15),
            (13, "BETWEEN", 11), (13, "BETWEEN", 12),
        ]
    ],
}  # fmt: skip
SCRIPTS = (
    "",
    "[WALK] <fridge> (16)",
    "[WALK] <fridge> (16)\n[GRAB] <cup> (15)",
    "[WALK] <fridge> (16)\n[OPEN] <fridge> (16)\n[WALK] <milk> (14)\n"
    "[GRAB] <milk> (14)\n[GRAB] <cup> (15)",
    "[WALK] <door> (13)\n[OPEN] <door> (13)\n[WALK] <bench> (17)\n[SIT] <bench> (17)",
)


def every_action(nodes: int) -> np.ndarray:
    rows = []
    for verb, (_, arity, _) in enumerate(VERBS):
        for args in itertools.product(range(nodes), repeat=arity):
            rows.append((verb, *args, *[-1] * (2 - arity)))
    return np.array(rows, np.int32)


_codes = jax.jit(jax.vmap(lambda s, t, a: step(s, t, a[0], a[1], a[2])[1], in_axes=(None, None, 0)))
_choices = jax.jit(legal_choices)
_even = jax.jit(jax.vmap(functools.partial(draw, verb_first=False), in_axes=(0, None)))
_verb_first = jax.jit(jax.vmap(draw, in_axes=(0, None)))


@pytest.fixture(scope="module")
def states():
    """One scene, its states after the scripts, and which of all actions `step` accepts there."""
    scene, start, names = encode(GRAPH)
    actions = every_action(len(scene.ids))
    found = []
    for script in SCRIPTS:
        state = start
        for line in parse_script(script):
            state, code = jax.jit(step)(scene, state, *bind(scene, state, names, line))
            assert int(code) == 0, line
        accepted = np.asarray(_codes(scene, state, actions)) == 0
        found.append((state, {tuple(map(int, a)) for a in actions[accepted]}))
    return scene, actions, found


def test_counts_and_membership_equal_trying_every_action(states):
    scene, actions, found = states
    member = jax.jit(jax.vmap(contains, in_axes=(None, 0)))
    pairs = 0
    for state, accepted in found:
        choices = _choices(scene, state)
        counts = Counter(verb for verb, _, _ in accepted)
        assert np.asarray(choices.count).tolist() == [counts[v] for v in range(len(VERBS))]
        inside = np.asarray(member(choices, jnp.asarray(actions)))
        assert {tuple(map(int, a)) for a in actions[inside]} == accepted
        pairs += counts[VERB_INDEX["POUR"]] + counts[VERB_INDEX["PUTIN"]]
    assert pairs > 3
    # What is not an action at all: a target where none is taken, and none where one is.
    choices = _choices(scene, found[3][0])
    for verb, obj, target in (("GRAB", 4, 4), ("PUTIN", 3, -1), ("STANDUP", 0, -1)):
        assert not contains(choices, jnp.array([VERB_INDEX[verb], obj, target]))


def test_draws_are_legal_and_even(states):
    scene, _, found = states
    state, accepted = found[3]  # both hands full: pairs, too
    choices = _choices(scene, state)
    keys = jax.random.split(jax.random.key(0), 20_000)
    alike = Counter(map(tuple, np.asarray(_even(keys, choices)).tolist()))
    assert set(alike) == accepted
    expected = len(keys) / len(accepted)
    chi = sum((count - expected) ** 2 / expected for count in alike.values())
    freedom = len(accepted) - 1
    assert abs(chi - freedom) < 5 * np.sqrt(2 * freedom)

    first = Counter(map(tuple, np.asarray(_verb_first(keys, choices)).tolist()))
    assert set(first) == accepted
    by_verb = Counter()
    for (verb, _, _), count in first.items():
        by_verb[verb] += count
    share = len(keys) / len(by_verb)
    assert max(abs(count - share) for count in by_verb.values()) < 5 * np.sqrt(share)


def test_padding_is_never_drawn(states):
    scene, _, found = states
    real = np.asarray(scene.ids) >= 0
    assert not real.all()
    choices = _choices(scene, found[1][0])
    objects = np.asarray(choices.objects).copy()
    objects[[VERB_INDEX[v] for v in ("STANDUP", "SLEEP", "WAKEUP")]] = False
    assert not objects[:, ~real].any()
    assert not np.asarray(choices.targets)[..., ~real].any()
