"""Search for wanted actions, under another rule set; action tables for them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from egjax.search import mcts
from egjax.search.actions import Grounded, action_table, encode_actions
from egjax.search.household import begin, household
from egjax.sim.goals import Deed, Predicate, encode_goal
from egjax.sim.graph import encode
from egjax.sim.household import home_graph
from egjax.sim.rules import RULES
from egjax.sim.vocab import VERBS
from egjax.types import Task


def ids_of(graph):
    return {node["class_name"]: node["id"] for node in reversed(graph["nodes"])}


def test_a_table_has_what_a_wanted_action_asks_for():
    graph = home_graph("cottage")
    ids = ids_of(graph)
    milk, fridge = ids["milk"], ids["fridge"]
    drink = action_table(graph, [], deeds=[Deed(("DRINK",), (milk,))])
    assert {("GRAB", milk), ("OPEN", fridge), ("WALK", fridge), ("DRINK", milk)} <= {
        action[:2] for action in drink
    }
    assert not any(a.verb in ("SIT", "PUTIN") for a in drink)
    limited = action_table(graph, [], deeds=[Deed(("DRINK",))], told=[milk, ids["character"]])
    assert {i for a in limited for i in a[1:] if i is not None} == {milk}
    look = action_table(graph, [], deeds=[Deed(("LOOKAT", "WATCH"))], told=[ids["television"]])
    assert {a.verb for a in look} == {"TURNTO", "LOOKAT", "WATCH", "WALK", "FIND"}
    sleep = action_table(graph, [], deeds=[Deed(("SLEEP",))], told=[ids["bed"]])
    assert {"SLEEP", "LIE"} <= {a.verb for a in sleep}
    book, cat = ids["book"], ids["cat"]
    left = [Predicate("HOLDS_LH", "character", "book")]
    grabs = {a.obj for a in action_table(graph, left, told=[book, cat]) if a.verb == "GRAB"}
    assert grabs == {book, cat}


def test_a_table_takes_the_objects_that_are_meant():
    graph = home_graph("flat")
    chairs = [n["id"] for n in graph["nodes"] if n["class_name"] == "chair"]
    goal = [Predicate("ON", "character", "chair"), Predicate("SITTING", "character")]
    every = {a.obj for a in action_table(graph, goal) if a.verb == "SIT"}
    meant = {a.obj for a in action_table(graph, goal, meant={"chair": chairs[1:2]})}
    assert every == set(chairs)
    assert meant - {None} == set(chairs[1:2])


def test_search_performs_wanted_actions_in_order():
    """Nothing of it shows in the final state but the milk in hand; the order is not free."""
    graph = home_graph("cottage")
    scene, state, names = encode(graph)
    ids = ids_of(graph)
    deeds = [Deed(("OPEN",), (ids["fridge"],)), Deed(("GRAB",)), Deed(("CLOSE",))]
    table = action_table(graph, [], deeds=deeds, told=[ids["fridge"], ids["milk"]])
    goal = encode_goal([], names, deeds=deeds, nodes=len(scene.ids))
    task = Task(scene, state, goal, encode_actions(table, names.index))
    tasks = jax.tree.map(lambda x: jnp.asarray(x)[None], task)
    world = household(rules=RULES["eai"])
    config = mcts.SearchConfig(simulations=64, rollouts=4, rollout_steps=16, max_depth=16)
    keys = jax.random.split(jax.random.key(0), 1)
    found = mcts.search(world, config, tasks, jax.vmap(begin)(tasks), keys)
    assert found.solved[0]
    plan = [table[i] for i in found.actions[0][: found.length[0]]]
    verbs = [a.verb for a in plan]
    assert Grounded("OPEN", ids["fridge"]) in plan
    opened = verbs.index("OPEN")
    grabbed = verbs.index("GRAB", opened)
    assert verbs.index("CLOSE", grabbed) == len(plan) - 1  # solved by the last step, no sooner
    # Each wanted action is worth as much as a predicate: three at +2, the rest at -0.1.
    assert np.isclose(found.returns[0], 6 - 0.1 * (len(plan) - 3))
    assert {a.verb for a in table} <= {verb.name for verb in VERBS}


def test_every_verb_can_be_wanted():
    graph = home_graph("cottage")
    person = {"id": 999, "class_name": "child", "properties": ["PERSON"], "states": []}
    graph["nodes"].append({**person, "category": "Characters"})
    for verb in VERBS:
        table = action_table(graph, [], deeds=[Deed((verb.name,))], instances=20)
        assert verb.name in {a.verb for a in table}, verb.name
