import re

import pytest
from errand_helpers import state_at

from egjax.experience.questions import counting, object_path, path_of, recognition, told
from egjax.sim.graph import decode


def decoded(world, states, i, t):
    return decode(world.scene, state_at(states, i, t), world.names)


def recount(graph, name):
    """Items per object of a class, by brute force over a decoded graph."""
    classes = {node["id"]: node["class_name"] for node in graph["nodes"]}
    counts = {i: set() for i, c in classes.items() if c == name}
    for edge in graph["edges"]:
        on = edge["relation_type"] in ("ON", "INSIDE") and edge["to_id"] in counts
        if on and classes[edge["from_id"]] != "character":
            counts[edge["to_id"]].add(edge["from_id"])
    return {len(items) for items in counts.values()}


def test_counts_are_those_of_the_simulated_end(batches):
    answers = []
    for world, episodes, states in batches:
        for i, episode in enumerate(episodes):
            sample = counting(episode, seed=i, longest=10)
            if sample is None:
                continue
            place = re.search(r"How many items does the (.+) hold\?", sample.prompt)[1]
            graph = decoded(world, states, i, min(len(episode.steps), 10))
            assert int(sample.completion) in recount(graph, place.replace(" ", "_"))
            assert sample.completion in sample.choices
            assert len(set(sample.choices)) == 4
            answers.append(sample.completion)
    assert len(answers) > 10
    assert len(set(answers)) > 2


def carried_through(world, episode, states, i, item):
    """Rooms of the character while it holds the item, by brute force over decoded graphs."""
    rooms = {n["id"] for n in world.names.nodes if n.get("category") == "Rooms"}
    path = []
    for t in range(len(episode.steps) + 1):
        edges = decoded(world, states, i, t)["edges"]
        held = [e for e in edges if e["relation_type"].startswith("HOLDS") and e["to_id"] == item]
        here = [
            e["to_id"]
            for e in edges
            if e["relation_type"] == "INSIDE" and e["from_id"] == episode.character
        ]
        here = [room for room in here if room in rooms]
        if held and path[-1:] != here:
            path += here
    return path


def test_paths_are_those_of_the_simulated_rooms(batches):
    longest = 0
    for world, episodes, states in batches:
        for i, episode in enumerate(episodes[:12]):
            for item in {
                i for s in episode.steps if s.line.verb == "GRAB" for _, i in s.line.arguments
            }:
                path = path_of(episode, item)
                assert path == carried_through(world, episode, states, i, item)
                longest = max(longest, len(path))
    assert longest >= 3


def test_a_path_question_names_an_object_and_its_rooms(batches):
    asked = 0
    for _, episodes, _ in batches:
        for i in range(0, len(episodes), 2):
            two = episodes[i : i + 2]
            sample = object_path(two, seed=i)
            if sample is None:
                continue
            asked += 1
            assert sample == object_path(two, seed=i)
            item = re.search(r"did the (.+) go\?", sample.prompt)[1]
            paths = {
                ", ".join(e.name(room) for room in path_of(e, node))
                for e in two
                for node, name in e.classes.items()
                if name == item.replace(" ", "_")
            }
            assert sample.completion in paths
            assert f"picked up the {item}" in sample.prompt
            assert len(set(sample.choices)) == len(sample.choices) > 1
    assert asked > 3


def test_two_people_with_things_of_one_name_are_not_asked_about(errand_list):
    busy = next(e for e in errand_list if any(s.line.verb == "GRAB" for s in e.steps))
    assert object_path([busy, busy], seed=0) is None


def test_recognition_offers_only_the_names_it_is_given():
    titles = ["Watch TV", "Drink milk", "Go to sleep", "Work", "Read book"]
    sample = recognition("Walk to bed. Lie on bed.", "Go to sleep", titles, seed=1)
    assert sample.completion == "go to sleep"
    assert len(sample.choices) == 4
    assert set(sample.choices) <= {title.lower() for title in titles}
    assert sample == recognition("Walk to bed. Lie on bed.", "Go to sleep", titles, seed=1)
    assert recognition("x", "Work", ["Work"], seed=0).choices == ("work",)


@pytest.mark.parametrize("verb", ["GRAB", "PUTBACK"])
def test_steps_are_told_in_the_past(errand_list, verb):
    step = next(s for e in errand_list for s in e.steps if s.line.verb == verb)
    name = step.line.arguments[0][0].replace("_", " ")
    assert told(step).startswith({"GRAB": "picked up", "PUTBACK": "put"}[verb] + f" the {name}")
