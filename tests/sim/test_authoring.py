from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from egjax.errors import EgjaxError
from egjax.search.actions import action_table
from egjax.sim.authoring import load_scenario, parse_goal, parse_goals
from egjax.sim.goals import Predicate, encode_goal, satisfied
from egjax.sim.graph import encode
from egjax.sim.household import home_graph
from egjax.sim.text import bind, parse_script
from egjax.sim.world import step

SCENE = """
rooms:
  kitchen: [table, fridge, cup on table, cup, milk in fridge, gadget]
  bedroom: [bed, book on bed]
  hall: []
doors: [[kitchen, hall], [hall, bedroom]]
character: hall
kinds: {gadget: {properties: [HAS_SWITCH, GRABBABLE], states: [OFF]}}
states: {fridge: [OPEN], gadget: ON}
goals:
  - ON(book, table)
"""


@pytest.fixture
def scene(tmp_path):
    path = tmp_path / "home.yaml"
    path.write_text(SCENE)
    return load_scenario(path)


def test_a_scene_file_becomes_a_graph(scene):
    graph = scene.graph
    assert scene.goals == ("ON(book, table)",)
    classes = {n["id"]: n["class_name"] for n in graph["nodes"]}
    nodes = {n["class_name"]: n for n in graph["nodes"]}
    facts = {
        (classes[e["from_id"]], e["relation_type"], classes[e["to_id"]]) for e in graph["edges"]
    }
    assert ("cup", "ON", "table") in facts
    assert ("milk", "INSIDE", "fridge") in facts
    assert ("milk", "INSIDE", "kitchen") in facts
    assert ("character", "INSIDE", "hall") in facts
    assert sorted(classes.values()).count("cup") == 2
    assert {"OPEN", "PLUGGED_IN", "CLEAN"} == set(nodes["fridge"]["states"])
    assert "ON" in nodes["gadget"]["states"]  # which YAML reads as true
    assert "OFF" not in nodes["gadget"]["states"]
    between = [classes[e["to_id"]] for e in graph["edges"] if e["relation_type"] == "BETWEEN"]
    assert between == ["kitchen", "hall", "hall", "bedroom"]
    world, state, names = encode(graph)
    for line in parse_script("[WALK] <book> (11)\n[GRAB] <book> (11)"):
        state, code = jax.jit(step)(world, state, *map(np.int32, bind(world, state, names, line)))
        assert int(code) == 0


def test_json_and_graph_files_are_scenes(tmp_path, scene):
    short, whole = tmp_path / "short.json", tmp_path / "whole.json"
    short.write_text(json.dumps({"rooms": {"kitchen": ["table", "cup on table"], "hall": []}}))
    assert [n["class_name"] for n in load_scenario(short).graph["nodes"]] == [
        "kitchen", "hall", "table", "cup", "door", "character",
    ]  # fmt: skip
    twice = tmp_path / "twice.json"
    twice.write_text('{"rooms": {"kitchen": ["table"], "hall": [], "kitchen": ["cup"]}}')
    with pytest.raises(EgjaxError, match=r"twice\.json: 'kitchen' occurs twice"):
        load_scenario(twice)
    whole.write_text(json.dumps({**scene.graph, "goals": ["OPEN(fridge)"]}))
    assert load_scenario(whole).graph["edges"] == scene.graph["edges"]
    assert load_scenario(whole).goals == ("OPEN(fridge)",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rooms: {kitchen: [tabel]}", "nothing is known about 'tabel' (did you mean table"),
        ("rooms: {kitchen: [cup on table]}", "no 'table' before 'cup'"),
        ("rooms: {kitchen: [cup under table]}", "not a thing: 'cup under table'"),
        ("room: {kitchen: [cup]}", "unknown key 'room' (did you mean rooms)"),
        ("rooms: {kitchen: [cup]}\ndoors: [[kitchen, hal]]", "no room 'hal'"),
        ("rooms: {a: [x]}\nkinds: {x: [GRABABLE]}", "unknown 'GRABABLE' (did you mean GRABBABLE"),
        ("rooms: {a: [cup]}\nstates: {cup: [OPENED]}", "unknown 'OPENED' (did you mean OPEN"),
        ("rooms: {a: [cup]}\nstates: {mug: [OPEN]}", "no 'mug' to set"),
        ("rooms: [", "home.yaml:1: not YAML"),
        ("- 1", "not a scene"),
        ("goals: [x]", "no rooms"),
        ("goals: 7", "goals are no list of texts"),
        ("rooms: {a: 5}", "home.yaml, a: no list of things"),
        ("rooms: {a: [cup], A: [cup]}", "two rooms of one name"),
        ("rooms: {a: [cup]}\ndoors: [5]", "a door joins two rooms"),
        ("rooms: {a: [cup]}\ndoors: a", "a door joins two rooms"),
        ("rooms: {a: [cup]}\nkinds: [lamp]", "'kinds' is no mapping"),
        ("rooms: {a: [cup]}\nstates: [OPEN]", "'states' is no mapping"),
        ("rooms: {a: [cup]}\nstates: {cup: 3}", "unknown '3'"),
        ("rooms:\n  a: [cup]\n  b: []\n  a: [bed]", "home.yaml:4: 'a' occurs twice"),
    ],
)
def test_a_bad_scene_says_what_is_nearest(tmp_path, text, message):
    path = tmp_path / "home.yaml"
    path.write_text(text)
    with pytest.raises(EgjaxError) as error:
        load_scenario(path)
    assert message in str(error.value)


def test_names_are_written_as_people_write_them(tmp_path):
    path = tmp_path / "home.yaml"
    path.write_text(
        "rooms: {Kitchen: [Table, Cup on Table], Living Room: bed}\n"
        "doors: [[kitchen, Living room]]\ncharacter: Living Room\nstates: {Cup: [DIRTY]}\n"
        "goals: ['INSIDE(Character, kitchen)', 'ON(cup, TABLE)']\n"
    )
    graph, goals = load_scenario(path)
    names = [node["class_name"] for node in graph["nodes"]]
    assert names == ["kitchen", "living_room", "table", "cup", "bed", "door", "character"]
    assert parse_goals(goals, graph)[0] == Predicate("INSIDE", "character", "kitchen")


def test_a_graph_with_names_as_people_write_them(tmp_path, scene):
    nodes = [
        {**node, "class_name": "Coffee Maker" if node["class_name"] == "fridge" else
         node["class_name"].title()} for node in scene.graph["nodes"]
    ]  # fmt: skip
    path = tmp_path / "home.json"
    path.write_text(json.dumps({**scene.graph, "nodes": nodes}))
    graph = load_scenario(path).graph
    encode(graph)  # there is a character
    assert parse_goal("OPEN(coffee maker)", graph) == Predicate("OPEN", "coffee_maker", None)
    number = next(n["id"] for n in graph["nodes"] if n["class_name"] == "coffee_maker")
    goal = parse_goal(f"OPEN(Coffee maker ({number}))", graph)
    assert goal == Predicate("OPEN", f"coffee_maker ({number})", None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.update(nodes={"a": 1}), "'nodes' is no list"),
        (lambda g: g.update(edges=None), "'edges' is no list"),
        (lambda g: g["nodes"].append(1), "has no 'id' that is a whole number"),
        (lambda g: g["nodes"][2].update(id="3"), "nodes[2] has no 'id' that is a whole number"),
        (lambda g: g["nodes"][2].update(id=True), "nodes[2] has no 'id'"),
        (lambda g: g["nodes"][1].pop("states"), "nodes[1] has no 'states' that is a list"),
        (lambda g: g["nodes"][1].update(properties=5), "states and properties of nodes[1]"),
        (lambda g: g["nodes"][1].update(states=[None]), "states and properties of nodes[1]"),
        (lambda g: g["edges"][0].pop("to_id"), "edges[0] has no 'to_id'"),
        (lambda g: g.update(goals=5), "goals are no list"),
    ],
)
def test_a_bad_graph_says_which_node(tmp_path, scene, change, message):
    path, graph = tmp_path / "graph.json", json.loads(json.dumps(scene.graph))
    change(graph)
    path.write_text(json.dumps(graph))
    with pytest.raises(EgjaxError) as error:
        load_scenario(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_goals_are_read(scene):
    graph = scene.graph
    assert parse_goal("ON(cup, table)", graph) == Predicate("ON", "cup", "table")
    assert parse_goal("on( Cup (6) ,table)", graph) == Predicate("ON", "cup (6)", "table")
    assert parse_goal("ON(cup.7, 4)", graph) == Predicate("ON", "cup (7)", "table (4)")
    assert parse_goal("ON(gadget)", graph) == Predicate("ON", "gadget")  # the state, not the place
    assert parse_goal("CLOSE(cup, character)", graph) == Predicate("CLOSE", "character", "cup")
    holds = parse_goal("HOLDS_RH(character, milk)", graph)
    assert holds == Predicate("HOLDS_RH", "character", "milk")
    both = parse_goals(["OPEN(fridge); CLEAN(cup)", "OPEN(fridge)"], graph)
    assert [str(p) for p in both] == ["OPEN(fridge)", "CLEAN(cup)"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ON(cups, table)", "the scene has no 'cups' (did you mean cup)"),
        ("ONTO(cup, table)", "unknown relation or state 'ONTO' (did you mean ON"),
        ("OPENED(fridge)", "unknown relation or state 'OPENED' (did you mean OPEN"),
        ("OPEN(fridge, table)", "OPEN takes one object, not 2"),
        ("INSIDE(cup)", "INSIDE takes two objects, not 1"),
        ("ON(cup (4), table)", "no cup (4) (cup are 6, 7)"),
        ("HOLDS_RH(table, milk)", "only the character holds things"),
        ("cup on table", "not a goal: 'cup on table'"),
        ("", "no goal"),
    ],
)
def test_a_bad_goal_says_what_is_nearest(scene, text, message):
    with pytest.raises(EgjaxError) as error:
        parse_goals([text], scene.graph)
    assert message in str(error.value)


def test_this_cup_is_not_any_cup(scene):
    """Cup 6 stands on the table, cup 7 does not."""
    world, state, names = encode(scene.graph)
    nodes = len(world.ids)

    def holds(text: str) -> bool:
        goal = encode_goal(parse_goals([text], scene.graph), names, nodes=nodes)
        return bool(np.all(satisfied(world, state, goal)))

    assert holds("ON(cup, table)")
    assert holds("ON(cup (6), table (4))")
    assert not holds("ON(cup (7), table)")
    assert holds("OPEN(fridge (5))")
    table = action_table(scene.graph, [parse_goal("ON(cup (7), table)", scene.graph)])
    assert {a.obj for a in table if a.verb == "GRAB"} == {7}
    either = action_table(scene.graph, [parse_goal("ON(cup, table)", scene.graph)])
    assert {a.obj for a in either if a.verb == "GRAB"} == {6, 7}


def test_embedded_homes_stay_as_they_were():
    graph = home_graph("cottage")
    assert len(graph["nodes"]) == 41
    assert [n["class_name"] for n in graph["nodes"][:4]] == [
        "kitchen", "living_room", "bedroom", "floor",
    ]  # fmt: skip
    last = graph["nodes"][-1]
    assert (last["id"], last["class_name"], last["category"]) == (41, "character", "Characters")


def test_a_room_alone_is_refused(tmp_path):
    """VirtualHome walks along doors, also within a room."""
    path = tmp_path / "home.yaml"
    path.write_text("rooms: {kitchen: [table, cup on table]}")
    with pytest.raises(EgjaxError, match=r"kitchen is the only room.*hall: \[\]"):
        load_scenario(path)
