from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egjax.sim.graph import encode, sizes_of
from egjax.sim.household import home_graph
from egjax.sim.replay import (
    compare_episode,
    explain,
    final_graph,
    pad_actions,
    read_episodes,
    replay,
)
from egjax.sim.robothow import load_pair
from egjax.sim.rules import CHECKS, RULES, Check, reason
from egjax.sim.text import bind, parse_english
from egjax.sim.vocab import VERBS, Trait
from egjax.sim.world import legal, step
from egjax.types import ActionTable

GOLDEN = Path(__file__).parents[1] / "golden" / "eai_transitions.jsonl.gz"


def every_action(nodes: int) -> ActionTable:
    """Every verb on every node; two-object verbs with every second target."""
    rows = []
    for verb, (_, arity, _) in enumerate(VERBS):
        firsts = range(nodes) if arity else (-1,)
        seconds = range(0, nodes, 2) if arity == 2 else (-1,)
        rows += [(verb, i, j) for i in firsts for j in seconds]
    verb, obj, target = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    objects = np.arange(nodes, dtype=np.int32)
    slots = np.maximum(obj, 0), np.maximum(target, 0)
    return ActionTable(verb, obj, target, np.ones(len(rows), bool), objects, *slots)


@pytest.fixture(scope="module", params=["repaired", "eai"])  # test_world has the reference
def tried(request, home):
    """A random walk under a rule set: its last states, and every action tried in each of them."""
    scene, state, names = home
    rules = RULES[request.param]
    actions = jax.tree.map(jnp.asarray, every_action(len(names.nodes)))

    def body(state, key):
        allowed = legal(scene, state, actions, rules)
        # Rather verbs that change something than looking, walking and wiping.
        weight = jnp.where((actions.verb > 4) & (actions.verb < 18), 3.0, 0.0)
        index = jax.random.categorical(key, jnp.where(allowed, weight, -jnp.inf))
        columns = (actions.verb, actions.obj, actions.target)
        state, code = step(scene, state, *(c[index] for c in columns), rules)
        return state, (state, allowed, code)

    @jax.jit
    def run(state, keys):
        return jax.lax.scan(body, state, keys)[1]

    @jax.jit
    def attempt(state):
        act = lambda v, o, t: step(scene, state, v, o, t, rules)  # noqa: E731
        return jax.vmap(act)(actions.verb, actions.obj, actions.target)

    states, allowed, codes = run(state, jax.random.split(jax.random.key(5), 48))
    assert not np.asarray(codes).any()
    picked = [jax.tree.map(lambda leaf, i=i: leaf[i], states) for i in (12, 30, 46)]
    return [(s, np.asarray(allowed)[i + 1], *attempt(s)) for i, s in zip((12, 30, 46), picked)]


def test_legal_is_what_step_accepts_under_every_rule_set(tried):
    for _, allowed, _, codes in tried:
        np.testing.assert_array_equal(allowed, np.asarray(codes) == 0)
        assert 0 < allowed.sum() < len(allowed)


def test_an_illegal_action_changes_nothing_under_any_rule_set(tried):
    for state, allowed, after, _ in tried:
        changed = np.zeros(len(allowed), bool)
        for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
            new = np.asarray(new).reshape(len(allowed), -1)
            changed |= (new != np.asarray(old).reshape(1, -1)).any(-1)
        assert not changed[~allowed].any()
        assert changed[allowed].any()


@pytest.mark.parametrize("name", list(RULES))
def test_every_row_has_known_checks_and_messages(name):
    rules = RULES[name]
    assert rules.need.shape == (len(VERBS), CHECKS // 32)
    assert len(rules.order) == len(rules.effects.walk) == len(VERBS) + 1 + rules.vain_return
    for verb in range(len(VERBS)):
        for check in rules.order[verb][rules.order[verb] >= 0]:
            assert reason(verb, int(check) + 1)
            assert check in {*Check, *Trait}
    walks = rules.effects.walk
    assert walks.any()
    # A step keeps what is set at single nodes in places that these share.
    assert not (rules.effects.take | (rules.effects.set_target != 0))[walks].any()
    assert not any(VERBS[v].arity > 1 for v in np.flatnonzero(walks[: len(VERBS)]))


def outcome(home, plan, name):
    """Edges at the end of an English plan under a rule set, and the first refused step."""
    scene, state, names = home
    graph, refused = final_graph(scene, state, names, parse_english(plan), rules=RULES[name])
    ids = {node["class_name"]: node["id"] for node in reversed(names.nodes)}
    kinds = {index: kind for kind, index in ids.items()}
    edges = {
        (kinds.get(e["from_id"]), e["relation_type"], kinds.get(e["to_id"])) for e in graph["edges"]
    }
    return edges, refused


def test_repaired_what_is_carried_is_in_the_room(home):
    plan = "Walk to cat. Grab cat. Walk to bed."
    left, here = ("cat", "INSIDE", "living_room"), ("cat", "INSIDE", "bedroom")
    edges, refused = outcome(home, plan, "repaired")
    assert refused is None
    assert here in edges
    assert left not in edges
    edges, _ = outcome(home, plan, "reference")
    assert left in edges
    assert here not in edges


def test_repaired_standing_up_leaves_the_seat(home):
    plan = "Walk to chair. Sit on chair. Stand up. Sit on chair. Stand up."
    edges, refused = outcome(home, plan, "repaired")
    assert refused is None
    assert ("character", "ON", "chair") not in edges
    edges, refused = outcome(home, plan, "reference")
    assert refused == 3  # too many things on the chair
    assert ("character", "ON", "chair") in edges


def test_repaired_what_is_held_cannot_be_grabbed_again(home):
    plan = "Walk to cat. Grab cat. Grab cat."
    assert outcome(home, plan, "repaired")[1] == 2
    assert outcome(home, plan, "reference")[1] is None
    again = "Walk to cat. Grab cat. Drop cat. Grab cat."
    assert outcome(home, again, "repaired")[1] is None


@pytest.mark.parametrize(
    ("plan", "eai", "reference"),
    [
        # Doors never block.
        ("Walk to door. Close door. Walk to bed.", None, 2),
        # Looking for something far away is walking, even while one sits.
        ("Walk to couch. Sit on couch. Find milk.", 2, 2),
        ("Walk to couch. Sit on couch. Find couch.", None, None),
        # A remembered origin forbids a grab; PUTOBJBACK that fails is accepted.
        ("Walk to cat. Grab cat. Grab cat.", 2, None),
        ("Walk to shirt. Grab shirt. Put on shirt. Grab shirt.", 3, None),
        ("Walk to cat. Grab cat. Walk to bed. Put back cat.", None, 3),
        ("Put back cat.", 0, 0),
    ],
)
def test_eai_verdicts_by_hand(home, plan, eai, reference):
    assert outcome(home, plan, "eai")[1] == eai
    assert outcome(home, plan, "reference")[1] == reference


def test_eai_walking_brings_other_things_close(home):
    near = ("character", "CLOSE", "milk")
    assert near in outcome(home, "Walk to fridge.", "eai")[0]  # what is INSIDE it
    assert near not in outcome(home, "Walk to fridge.", "reference")[0]
    on_it = ("character", "CLOSE", "cat")
    assert on_it not in outcome(home, "Walk to couch.", "eai")[0]
    assert on_it in outcome(home, "Walk to couch.", "reference")[0]
    under = ("character", "CLOSE", "couch")
    assert under in outcome(home, "Walk to cat.", "eai")[0]  # what it is ON
    assert under not in outcome(home, "Walk to cat.", "reference")[0]
    room = ("character", "CLOSE", "bedroom")
    assert room not in outcome(home, "Walk to bedroom.", "eai")[0]
    assert room in outcome(home, "Walk to bedroom.", "reference")[0]


def test_eai_looks_for_rooms_through_containers(home):
    """A thing INSIDE a thing INSIDE a thing: only that executor finds its room."""
    graph = json.loads(json.dumps(home_graph("cottage")))
    ids = {node["class_name"]: node["id"] for node in reversed(graph["nodes"])}
    milk, cup = ids["milk"], ids["cup"]
    graph["edges"] = [
        e for e in graph["edges"] if (e["from_id"], e["relation_type"]) != (milk, "INSIDE")
    ] + [{"from_id": milk, "relation_type": "INSIDE", "to_id": cup}]
    graph["edges"] = [
        e
        for e in graph["edges"]
        if (e["from_id"], e["relation_type"], e["to_id"]) != (cup, "INSIDE", ids["kitchen"])
    ]
    world = encode(graph)
    edges, refused = outcome(world, "Walk to bed. Walk to milk.", "eai")
    assert refused is None
    assert ("character", "INSIDE", "kitchen") in edges
    assert ("character", "CLOSE", "cup") in edges
    assert outcome(world, "Walk to bed. Walk to milk.", "reference")[1] == 1


def test_new_reasons_in_words(home):
    scene, state, names = home
    lines = parse_english("Walk to cat. Grab cat. Grab cat.")
    actions = [bind(scene, state, names, line) for line in lines]
    for name in ("repaired", "eai"):
        states, codes = jax.device_get(replay(scene, state, pad_actions(actions, 64), RULES[name]))
        last = jax.tree.map(lambda leaf: leaf[-1], states)
        text = explain(scene, last, names, actions[-1], int(codes[2]), RULES[name])
        assert text.endswith("already grabbed")


def test_recorded_transitions_of_the_embodied_agent_interface(robothow):
    """Every step of the committed excerpt: verdict, message, states and edges."""
    episodes = list(read_episodes(GOLDEN))
    folder = robothow / "init_and_final_graphs"
    graphs = {e["graph"]: next(folder.glob(f"*/*/{e['graph']}")) for e in episodes}
    loaded = {name: load_pair(path)[0] for name, path in graphs.items()}
    sizes = sizes_of(loaded.values(), added=256)
    verbs, steps = set(), 0
    for episode in episodes:
        world = encode(loaded[episode["graph"]], sizes)
        for verb, accepted, differs in compare_episode(episode, *world, RULES["eai"]):
            assert differs is None, f"{episode['graph']}: {differs}"
            verbs.add((verb, accepted))
            steps += 1
    assert steps > 1500
    assert len({verb for verb, accepted in verbs if accepted}) >= 35
