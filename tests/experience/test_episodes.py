import jax
import numpy as np
import pytest
from errand_helpers import FOCUS, state_at

from egjax.errors import EgjaxError
from egjax.experience.episodes import graph_facts
from egjax.experience.rollouts import errands, load_worlds, replay, resolves
from egjax.sim.graph import decode
from egjax.sim.text import bind, parse_english, parse_line, resolve_name


def test_facts_of_every_step_are_those_of_the_decoded_graph(batches):
    compared = 0
    for world, episodes, states in batches:
        for i, episode in enumerate(episodes[:10]):
            for t, facts in enumerate(episode.states()):
                graph = decode(world.scene, state_at(states, i, t), world.names)
                assert facts == graph_facts(graph, episode.character), (i, t)
                compared += 1
    assert compared > 200


def test_parts_begin_where_the_whole_stands(errand_list):
    episode = max(errand_list, key=lambda e: len(e.steps))
    part = episode.part(3, 7)
    assert part.start == episode.after(3)
    assert part.after(4) == episode.after(7) != part.start
    held = [len(f) for f in episode.states(lambda fact: fact.relation == "HOLDS_RH")]
    assert max(held) <= 1


def test_an_episode_graph_has_its_facts(errand_list):
    episode = errand_list[0]
    assert graph_facts(episode.graph(), episode.character) == episode.start


def test_english_names_mean_the_objects_that_were_acted_on(batches):
    for world, episodes, states in batches:
        for i, episode in enumerate(episodes[:12]):
            lines = parse_english(episode.english()) if episode.steps else []
            assert len(lines) == len(episode.steps)
            for t, (line, step) in enumerate(zip(lines, episode.steps, strict=True)):
                before = state_at(states, i, t)
                named = bind(world.scene, before, world.names, line)
                assert named == bind(world.scene, before, world.names, step.line), (i, t)


RESOLVES = jax.jit(resolves)


def meant(world, state):
    """Nodes that names mean, by the host's rule, after checking `resolves` against it."""
    names = {node["class_name"] for node in world.names.nodes}
    by_rule = {resolve_name(world.scene, state, world.names, name) for name in names}
    found = np.flatnonzero(np.asarray(RESOLVES(world.scene, state, world.classes)))
    assert set(found.tolist()) == by_rule
    return {world.names.nodes[i]["id"] for i in by_rule}


def test_resolves_is_the_rule_of_names(batches):
    for world, _, states in batches:
        for i, t in ((0, 0), (1, 5), (2, 12), (3, 9)):
            meant(world, state_at(states, i, t))


def test_of_several_the_held_the_close_and_the_near_one_is_meant(worlds):
    flat = worlds[1]
    ids = {}
    for node in flat.names.nodes:
        ids.setdefault(node["class_name"], []).append(node["id"])
    (first, second, third), (cup, other_cup) = ids["chair"], ids["cup"]
    steps = [("WALK", "chair", third), ("WALK", "chair", second), ("GRAB", "chair", second)]
    steps += [("DROP", "chair", second), ("WALK", "kitchen", ids["kitchen"][0])]
    steps += [("WALK", "cup", cup), ("GRAB", "cup", cup), ("WALK", "desk", ids["desk"][0])]
    # A carried thing stays INSIDE the room that was left last, hence one room further.
    steps += [("WALK", "bed", ids["bed"][0]), ("DROP", "cup", cup)]
    steps += [("WALK", "kitchen", ids["kitchen"][0])]
    lines = [parse_line(f"[{verb}] <{name}> ({i})") for verb, name, i in steps]
    _, along = replay(flat, lines)
    chairs = [
        next(i for i in (first, second, third) if i in meant(flat, state_at(along, t)))
        for t in range(6)
    ]
    assert chairs == [first, third, second, second, second, first]
    cups = [
        next(i for i in (cup, other_cup) if i in meant(flat, state_at(along, t)))
        for t in (6, 7, 8, 9, 11)
    ]
    assert cups == [cup, cup, cup, cup, other_cup]


def test_same_seed_same_errands(worlds, errand_list):
    again = list(errands(worlds, 40, seed=3, focus=FOCUS, batch=32))
    assert again == errand_list[:40]
    other = list(errands(worlds, 40, seed=4, focus=FOCUS, batch=32))
    assert other != again


def test_errands_do_something(errand_list):
    verbs = [step.line.verb for episode in errand_list for step in episode.steps]
    assert len(verbs) > 10 * len(errand_list)
    assert verbs.count("WALK") < 0.5 * len(verbs)
    assert {"GRAB", "PUTBACK", "OPEN", "SWITCHON", "SIT"} <= set(verbs)


def test_replay_repeats_an_errand_and_refuses_nonsense(worlds, batches):
    world, episodes, states = batches[0]
    episode, along = replay(world, [step.line for step in episodes[0].steps])
    assert episode == episodes[0]
    assert np.array_equal(along.nodes, states.nodes[0][: len(along.nodes)])
    milk = next(n["id"] for n in world.names.nodes if n["class_name"] == "milk")
    with pytest.raises(EgjaxError, match="step 1 is refused"):
        replay(world, [parse_line(f"[GRAB] <milk> ({milk})")])


def test_no_worlds():
    with pytest.raises(EgjaxError, match="no scene graphs"):
        load_worlds([])
