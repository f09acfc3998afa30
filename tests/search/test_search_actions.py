"""Backward relevance on small graphs whose needs are known, and on the embedded homes."""

from __future__ import annotations

import numpy as np
import pytest

from egjax.errors import EgjaxError
from egjax.search.actions import Grounded, action_table, encode_actions, table_sizes
from egjax.sim.goals import Predicate, goal_predicates
from egjax.sim.household import home_programs
from egjax.sim.robothow import find_dataset, load_programs
from egjax.sim.vocab import VERB_INDEX, VERBS


def graph(*nodes, edges=()):
    """Nodes as (id, class, properties, states); 1 is the room and 2 the character in it."""
    made = [
        {"id": 1, "class_name": "kitchen", "category": "Rooms", "properties": [], "states": []},
        {"id": 2, "class_name": "character", "properties": [], "states": []},
    ]
    made += [
        {"id": i, "class_name": name, "properties": list(props), "states": list(states)}
        for i, name, props, states in nodes
    ]
    inside = [(n["id"], "INSIDE", 1) for n in made[1:]]
    return {
        "nodes": made,
        "edges": [{"from_id": a, "relation_type": r, "to_id": b} for a, r, b in [*inside, *edges]],
    }


CUP = (3, "cup", ["GRABBABLE"], [])
CABINET = (4, "cabinet", ["CAN_OPEN", "CONTAINERS"], ["CLOSED"])
TABLE = (5, "table", ["SURFACES"], [])
LAMP = (6, "lamp", ["HAS_SWITCH", "HAS_PLUG"], ["OFF", "PLUGGED_OUT"])


def test_container_is_opened_and_nothing_else_is_touched():
    home = graph(CUP, CABINET, TABLE, LAMP, edges=[(3, "INSIDE", 4), (3, "CLOSE", 4)])
    assert set(action_table(home, [Predicate("ON", "cup", "table")])) == {
        Grounded("WALK", 3),
        Grounded("FIND", 3),
        Grounded("WALK", 4),
        Grounded("FIND", 4),
        Grounded("WALK", 5),
        Grounded("FIND", 5),
        Grounded("GRAB", 3),
        Grounded("DROP", 3),
        Grounded("OPEN", 4),
        Grounded("PUTBACK", 3, 5),
    }


def test_open_container_is_left_alone():
    shelf = (4, "cabinet", ["CAN_OPEN"], ["OPEN"])
    home = graph(CUP, shelf, TABLE, edges=[(3, "INSIDE", 4)])
    table = action_table(home, [Predicate("INSIDE", "cup", "cabinet")])
    assert Grounded("PUTIN", 3, 4) in table
    assert not any(action.verb == "OPEN" for action in table)


@pytest.mark.parametrize(
    ("goal", "wanted"),
    [
        (Predicate("ON", "lamp"), {Grounded("SWITCHON", 6), Grounded("PLUGIN", 6)}),
        (Predicate("FACING", "character", "lamp"), {Grounded("TURNTO", 6)}),
        (Predicate("OPEN", "cabinet"), {Grounded("OPEN", 4)}),
        (Predicate("CLEAN", "table"), {Grounded("WASH", 5)}),
        (Predicate("HOLDS_RH", "character", "cup"), {Grounded("GRAB", 3)}),
        (Predicate("INSIDE", "cup", "kitchen"), {Grounded("DROP", 3), Grounded("WALK", 1)}),
        (Predicate("CLOSE", "cup", "table"), {Grounded("PUTBACK", 3, 5)}),
    ],
)
def test_each_goal_has_its_verbs(goal, wanted):
    assert wanted <= set(action_table(graph(CUP, CABINET, TABLE, LAMP), [goal]))


def test_full_seat_is_cleared_and_left():
    chair = (4, "chair", ["SITTABLE"], [])
    goal = [Predicate("SITTING", "character"), Predicate("ON", "character", "chair")]
    free = action_table(graph(CUP, chair), goal)
    assert {Grounded("SIT", 4), Grounded("STANDUP")} <= set(free)
    assert Grounded("GRAB", 3) not in free
    assert Grounded("GRAB", 3) in action_table(graph(CUP, chair, edges=[(3, "ON", 4)]), goal)


def test_closed_door_is_opened():
    door = (4, "door", ["CAN_OPEN"], ["CLOSED"])
    assert Grounded("OPEN", 4) in action_table(
        graph(CUP, door), [Predicate("CLOSE", "character", "cup")]
    )


def test_things_far_apart_are_carried_or_linked():
    goal = [Predicate("CLOSE", "character", "cup"), Predicate("CLOSE", "character", "table")]
    assert Grounded("GRAB", 3) in action_table(graph(CUP, TABLE), goal)
    near = graph(CUP, TABLE, edges=[(3, "CLOSE", 5), (5, "CLOSE", 3)])
    assert Grounded("GRAB", 3) not in action_table(near, goal)
    fixed = (3, "cup", [], [])
    linked = graph(fixed, TABLE, LAMP, edges=[(3, "CLOSE", 6), (6, "CLOSE", 5)])
    assert Grounded("FIND", 6) in action_table(linked, goal)


def test_few_instances_those_beside_the_goal_first():
    mats = [(10 + i, "mat", [], []) for i in range(9)]
    home = graph(CUP, *mats, edges=[(17, "CLOSE", 3)])
    goal = [Predicate("CLOSE", "character", "mat"), Predicate("CLOSE", "character", "cup")]
    table = action_table(home, goal, instances=2)
    assert {a.obj for a in table if a.verb == "WALK"} == {3, 10, 17}
    assert len({a.obj for a in action_table(home, goal, instances=99)}) == 10


def test_told_objects_are_the_only_ones_of_their_class():
    cups = [(3 + i, "cup", ["GRABBABLE"], []) for i in range(3)]
    home = graph(*cups, (9, "table", ["SURFACES"], []), (10, "table", ["SURFACES"], []))
    goal = [Predicate("ON", "cup", "table")]
    free, told = action_table(home, goal), action_table(home, goal, among=[4])
    assert {a.obj for a in free if a.verb == "GRAB"} == {3, 4, 5}
    assert {a.obj for a in told if a.verb == "GRAB"} == {4}
    assert {a.target for a in told if a.verb == "PUTBACK"} == {9, 10}  # nothing told of tables


@pytest.mark.parametrize("program", home_programs(), ids=lambda p: p.name)
def test_embedded_programs_have_small_sound_tables(program):
    table = action_table(program.init, goal_predicates(program.init, program.final, close=True))
    ids = {node["id"] for node in program.init["nodes"]}
    assert 0 < len(table) <= 40
    assert len(set(table)) == len(table)
    for action in table:
        given = [i for i in action[1:] if i is not None]
        assert len(given) == VERBS[VERB_INDEX[action.verb]].arity
        assert ids >= set(given)


def test_sizes_on_robothow(shared_data):
    folder = find_dataset()
    if folder is None:
        pytest.skip("the RobotHow data is not installed")
    names = (shared_data / "tasks" / "e2wm_sample20.txt").read_text().split()[:6]
    for program in load_programs(folder, names):
        goal = goal_predicates(program.init, program.final, close=True)
        assert len(action_table(program.init, goal)) <= 64


def test_unknown_class_is_named():
    with pytest.raises(EgjaxError, match="unicorn"):
        action_table(graph(CUP), [Predicate("CLOSE", "character", "unicorn")])


def test_arrays_say_what_the_table_says():
    table = [Grounded("STANDUP"), Grounded("GRAB", 3), Grounded("PUTBACK", 3, 5)]
    index = {1: 0, 3: 1, 5: 2}
    arrays = encode_actions(table, index, size=5, objects=4)
    nodes = {place: number for number, place in index.items()}
    for row, action in enumerate(table):
        assert VERBS[arrays.verb[row]].name == action.verb
        assert nodes.get(int(arrays.obj[row])) == action.obj
        assert nodes.get(int(arrays.target[row])) == action.target
        if action.obj is not None:
            assert arrays.objects[arrays.obj_slot[row]] == arrays.obj[row]
        if action.target is not None:
            assert arrays.objects[arrays.target_slot[row]] == arrays.target[row]
    np.testing.assert_array_equal(arrays.mask, [True] * 3 + [False] * 2)
    with pytest.raises(EgjaxError, match="table of 2"):
        encode_actions(table, index, size=2)
    with pytest.raises(EgjaxError, match="no node 5"):
        encode_actions(table, {1: 0, 3: 1})


def test_a_node_may_have_the_number_0_and_no_properties():
    """As a graph may that another tool wrote."""
    assert table_sizes([[Grounded("GRAB", 0), *(Grounded("WALK", i) for i in range(9))]]) == (
        16,
        16,
    )
    home = graph(CUP, CABINET, TABLE)
    for node in home["nodes"]:
        if not node["properties"]:
            del node["properties"]
        else:
            node["properties"] = [name.lower() for name in node["properties"]]
    assert Grounded("PUTBACK", 3, 5) in action_table(home, [Predicate("ON", "cup", "table")])
