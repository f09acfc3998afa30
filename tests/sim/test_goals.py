from __future__ import annotations

import copy

import jax
import numpy as np
import pytest

from egjax.errors import EgjaxError
from egjax.sim.goals import GoalSizes, Predicate, encode_goal, goal_predicates, satisfied
from egjax.sim.graph import decode, encode
from egjax.sim.household import home_graph
from egjax.sim.replay import pad_actions, replay
from egjax.sim.text import bind


def by_hand(graph, predicate):
    """Whether a predicate holds in a graph, the slow way."""
    kinds = {n["id"]: n["class_name"] for n in graph["nodes"]}
    if predicate.other is None:
        return any(
            predicate.relation in n["states"] and n["class_name"] == predicate.subject
            for n in graph["nodes"]
        )
    return any(
        (kinds[e["from_id"]], e["relation_type"], kinds[e["to_id"]])
        == (predicate.subject, predicate.relation, predicate.other)
        for e in graph["edges"]
    )


def test_goals_are_what_the_final_graph_has_more_by_class():
    init = home_graph("cottage")
    final = copy.deepcopy(init)
    ids = {n["class_name"]: n["id"] for n in reversed(init["nodes"])}
    next(n for n in final["nodes"] if n["class_name"] == "television")["states"] = ["ON", "CLEAN"]
    edges = final["edges"]
    edges.append({"from_id": ids["cup"], "relation_type": "ON", "to_id": ids["table"]})
    edges.append({"from_id": ids["cup"], "relation_type": "CLOSE", "to_id": ids["character"]})
    edges.append({"from_id": ids["character"], "relation_type": "CLOSE", "to_id": ids["cup"]})
    core = [Predicate("ON", "cup", "table"), Predicate("ON", "television")]
    assert goal_predicates(init, final, close=False) == core
    assert goal_predicates(init, final, close=True) == [
        Predicate("CLOSE", "character", "cup"),
        *core,
    ]


def test_what_holds_by_class_at_the_start_is_no_goal():
    init = home_graph("flat")
    final = copy.deepcopy(init)
    chairs = [n["id"] for n in init["nodes"] if n["class_name"] == "chair"]
    me = next(n["id"] for n in init["nodes"] if n["class_name"] == "character")
    init["edges"].append({"from_id": me, "relation_type": "ON", "to_id": chairs[0]})
    final["edges"].append({"from_id": me, "relation_type": "ON", "to_id": chairs[1]})
    assert goal_predicates(init, final, close=True) == []


def test_satisfied_equals_a_count_by_hand_along_every_program(homes):
    programs, sizes = homes
    for program in programs:
        scene, state, names = encode(program.init, sizes)
        predicates = goal_predicates(program.init, program.final, close=True)
        goal = encode_goal(predicates, names, nodes=sizes.nodes, sizes=GoalSizes(24, 48))
        actions = [bind(scene, state, names, line) for line in program.script]
        states, codes = replay(scene, state, pad_actions(actions, 16))
        assert not np.asarray(codes).any()
        held = jax.jit(jax.vmap(satisfied, in_axes=(None, 0, None)))(scene, states, goal)
        for i in range(len(actions)):
            graph = decode(scene, jax.device_get(jax.tree.map(lambda x, i=i: x[i], states)), names)
            assert [by_hand(graph, p) for p in predicates] == held[i][: len(predicates)].tolist()
        assert bool(held[-1].all())
        assert not bool(satisfied(scene, state, goal).all())


@pytest.mark.parametrize(
    ("predicate", "message"),
    [
        (Predicate("ON", "dragon", "table"), "no dragon"),
        (Predicate("BESIDE", "cup", "table"), "unknown relation 'BESIDE'"),
        (Predicate("HOT", "cup"), "unknown state 'HOT'"),
    ],
)
def test_goals_that_cannot_be_meant(home, predicate, message):
    _, _, names = home
    with pytest.raises(EgjaxError, match=message):
        encode_goal([predicate], names, nodes=64)
    with pytest.raises(EgjaxError, match="no goal predicate"):
        encode_goal([], names, nodes=64)
