"""Goals by graph ids and actions that must have been performed, by hand."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from egjax.errors import EgjaxError
from egjax.sim.goals import (
    Deed,
    Fact,
    GoalSizes,
    all_performed,
    encode_goal,
    perform,
    satisfied,
)
from egjax.sim.graph import encode
from egjax.sim.household import home_graph
from egjax.sim.text import bind, parse_english
from egjax.sim.vocab import VERB_INDEX
from egjax.sim.world import step


@pytest.fixture(scope="module")
def flat():
    """The flat, which has two chairs and two cups, and its ids by class, lowest first."""
    graph = home_graph("flat")
    ids: dict[str, list[int]] = {}
    for node in graph["nodes"]:
        ids.setdefault(node["class_name"], []).append(node["id"])
    return *encode(graph), ids


def after(deeds, actions, names, size=None):
    """How many deeds are performed after actions (verb, graph id or None, accepted)."""
    sizes = GoalSizes(1, 1, size or len(deeds))
    goal = encode_goal([], names, deeds=deeds, nodes=64, sizes=sizes)
    count = np.int32(0)
    for verb, number, accepted in actions:
        node = -1 if number is None else names.index[number]
        count = perform(goal, count, VERB_INDEX[verb], np.int32(node), np.bool_(accepted))
    return int(count), bool(all_performed(goal, count))


def test_actions_count_in_order_and_only_when_accepted(flat):
    *_, names, ids = flat
    deeds = [Deed(("GRAB",)), Deed(("RINSE", "WASH"))]
    cup = ids["cup"][0]
    grab, wash = ("GRAB", cup, True), ("WASH", cup, True)
    assert after(deeds, [], names) == (0, False)
    assert after(deeds, [wash, grab], names) == (1, False)
    assert after(deeds, [grab, wash], names) == (2, True)
    assert after(deeds, [grab, ("RINSE", cup, True), wash], names) == (2, True)
    assert after(deeds, [("GRAB", cup, False), wash], names) == (0, False)
    twice = [Deed(("GRAB",)), Deed(("GRAB",))]
    assert after(twice, [grab], names) == (1, False)  # one action serves once
    assert after(twice, [grab, grab, grab], names) == (2, True)


def test_only_the_named_objects_count(flat):
    *_, names, ids = flat
    one, two = ids["chair"][:2]
    deeds = [Deed(("SIT",), (two,)), Deed(("SLEEP",))]
    assert after(deeds, [("SIT", one, True), ("SLEEP", None, True)], names) == (0, False)
    assert after(deeds, [("SIT", two, True), ("SLEEP", None, True)], names) == (2, True)
    # A verb without an object is none of the named ones.
    assert after([Deed(("SLEEP",), (one,))], [("SLEEP", None, True)], names)[0] == 0


def test_padding_of_deeds_never_matters(flat):
    *_, names, ids = flat
    deeds = [Deed(("GRAB",))]
    actions = [("GRAB", ids["cup"][0], True), ("GRAB", ids["cup"][1], True)]
    assert after(deeds, actions, names, size=4) == after(deeds, actions, names) == (1, True)


def test_facts_by_id_mean_the_object_and_not_its_class(flat):
    scene, state, names, ids = flat
    one, two = ids["chair"][:2]
    me = ids["character"][0]
    jitted = jax.jit(step)
    for line in parse_english("Walk to chair. Sit on chair."):
        state, code = jitted(scene, state, *bind(scene, state, names, line))
        assert int(code) == 0
    held = {}
    for name, chairs in {"one": (one,), "two": (two,), "either": (one, two)}.items():
        facts = [Fact("SITTING", (me,)), Fact("ON", (me,), chairs)]
        goal = encode_goal(facts, names, nodes=64)
        held[name] = satisfied(scene, state, goal).tolist()
    assert held["either"] == [True, True]
    assert sorted([held["one"], held["two"]]) == [[True, False], [True, True]]


@pytest.mark.parametrize(
    ("facts", "deeds", "message"),
    [
        ([Fact("ON", (99999,))], [], "no node 99999"),
        ([Fact("HOT", (1,))], [], "unknown state 'HOT'"),
        ([], [Deed(("FLY",))], "unknown verb in FLY"),
        ([], [Deed(())], "unknown verb"),
        ([], [Deed(("GRAB",), (99999,))], "no node 99999"),
    ],
)
def test_goals_by_id_that_cannot_be_meant(flat, facts, deeds, message):
    *_, names, _ = flat
    with pytest.raises(EgjaxError, match=message):
        encode_goal(facts, names, deeds=deeds, nodes=64)
    grab, none = [Deed(("GRAB",))], GoalSizes(4, 4, 0)
    with pytest.raises(EgjaxError, match="more predicates"):
        encode_goal([], names, deeds=grab, nodes=64, sizes=none)
