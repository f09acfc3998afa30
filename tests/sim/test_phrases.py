"""The legal sentences of a state against trying every sentence."""

import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egjax.errors import EgjaxError
from egjax.sim.phrases import LegalSteps
from egjax.sim.text import Line, bind, parse_english, resolve_name, to_english
from egjax.sim.vocab import VERB_INDEX, VERBS
from egjax.sim.world import step

codes = jax.jit(jax.vmap(lambda s, t, a: step(s, t, a[0], a[1], a[2])[1], in_axes=(None, None, 0)))
try_step = jax.jit(step)


def by_trial(scene, state, names):
    """Every sentence that the simulator accepts, of all that can be said."""
    classes = sorted({entry["class_name"] for entry in names.nodes})
    nodes = {name: resolve_name(scene, state, names, name) for name in classes}
    lines, actions = [], []
    for number, verb in enumerate(VERBS):
        for said in itertools.product(classes, repeat=verb.arity):
            lines.append(Line(verb.name, tuple((name, None) for name in said)))
            found = [nodes[name] for name in said]
            actions.append([number, *found, *[-1] * (2 - verb.arity)])
    found = np.asarray(codes(scene, state, jnp.array(actions, jnp.int32)))
    return {to_english([line]) for line, code in zip(lines, found) if code == 0}


def test_legal_sentences_are_those_that_the_simulator_accepts(home):
    scene, state, names = home
    legal, said, rng = LegalSteps(scene, state, names), [], random.Random(1)
    verbs = set()
    for wish in ("Walk to bread", "Grab bread", "Walk to table", "Put bread on", "", "Sit"):
        allowed = legal(said)
        assert set(allowed) == by_trial(scene, state, names)
        assert allowed == sorted(allowed)
        chosen = rng.choice([s for s in allowed if s.startswith(wish)] or allowed)
        said.append(chosen)
        (line,) = parse_english(chosen)
        verbs.add(line.verb)
        state, code = try_step(scene, state, *bind(scene, state, names, line))
        assert int(code) == 0
        state = jax.device_get(state)
    assert {"GRAB", "PUTBACK"} <= verbs


def test_only_actions_of_a_table_if_wanted(home):
    scene, state, names = home
    every = LegalSteps(scene, state, names)()
    name = next(entry["class_name"] for entry in names.nodes if entry["class_name"] == "fridge")
    node = resolve_name(scene, state, names, name)
    walk = VERB_INDEX["WALK"]
    few = LegalSteps(scene, state, names, within={(walk, node, -1), (VERB_INDEX["OPEN"], node, -1)})
    assert few() == ["Walk to fridge."]
    assert set(few()) < set(every)
    assert few(["Walk to fridge."]) == ["Open fridge.", "Walk to fridge."]


def test_a_sentence_that_is_refused_is_told(home):
    legal = LegalSteps(*home)
    with pytest.raises(EgjaxError, match="refuses 'Open fridge"):
        legal(["Open fridge."])
