from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egjax.sim.graph import Sizes, decode, edge_bits, encode
from egjax.sim.household import home_graph
from egjax.sim.replay import explain, pad_actions, replay
from egjax.sim.rules import CHECKS, Check, reason, reference_rules
from egjax.sim.text import bind, parse_english
from egjax.sim.vocab import VERB_INDEX, VERBS, Trait
from egjax.sim.world import legal, step
from egjax.types import ActionTable

STEP = jax.jit(step)


def all_actions(nodes: int) -> ActionTable:
    """Every verb on every node (two-object verbs with some pairs)."""
    rows = []
    for verb in range(len(VERBS)):
        if VERBS[verb].arity == 0:
            rows.append((verb, -1, -1))
        elif VERBS[verb].arity == 1:
            rows += [(verb, i, -1) for i in range(nodes)]
        else:
            rows += [(verb, i, j) for i in range(0, nodes, 2) for j in range(0, nodes, 3)]
    verb, obj, target = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    return ActionTable(
        verb=verb,
        obj=obj,
        target=target,
        mask=np.ones(len(rows), bool),
        objects=np.arange(nodes, dtype=np.int32),
        obj_slot=np.maximum(obj, 0),
        target_slot=np.maximum(target, 0),
    )


def wander(scene, state, actions, key, length):
    """A random legal walk that prefers interaction; states after each step and their indices."""

    def body(state, key):
        allowed = legal(scene, state, actions)
        weight = jnp.where(actions.verb < 3, -3.0, 0.0)
        index = jax.random.categorical(key, jnp.where(allowed, weight, -jnp.inf))
        state, code = step(
            scene, state, *(x[index] for x in (actions.verb, actions.obj, actions.target))
        )
        return state, (state, index, code)

    return jax.lax.scan(body, state, jax.random.split(key, length))[1]


@pytest.fixture(scope="module")
def walk(home):
    """A wander of 60 steps through the cottage."""
    scene, state, names = home
    actions = jax.tree.map(jnp.asarray, all_actions(len(names.nodes)))
    states, indices, codes = jax.jit(wander, static_argnums=4)(
        scene, state, actions, jax.random.key(3), 60
    )
    return actions, states, indices, codes


def test_every_verb_has_checks_effects_and_messages():
    rules = reference_rules()
    assert rules.need.shape == (len(VERBS), CHECKS // 32)
    for verb in range(len(VERBS)):
        for check in rules.order[verb][rules.order[verb] >= 0]:
            assert reason(verb, int(check) + 1)
            assert check in {*Check, *Trait}


def test_legal_actions_are_exactly_those_that_step_accepts(home, walk):
    """The table's fused answer against trying each action, at several states of a long walk."""
    scene, _, _ = home
    actions, states, _, _ = walk
    tried = jax.jit(
        jax.vmap(lambda s, v, o, t: step(scene, s, v, o, t)[1], in_axes=(None, 0, 0, 0))
    )
    asked = jax.jit(legal)
    for i in (0, 9, 23, 41, 59):
        state = jax.tree.map(lambda leaf, i=i: leaf[i], states)
        codes = np.asarray(tried(state, actions.verb, actions.obj, actions.target))
        np.testing.assert_array_equal(np.asarray(asked(scene, state, actions)), codes == 0)
        assert 0 < (codes == 0).sum() < len(codes)


def test_a_walk_of_legal_actions_is_accepted_and_varied(walk):
    actions, states, indices, codes = walk
    assert not np.asarray(codes).any()
    assert not np.asarray(states.overflow).any()
    assert len(set(np.asarray(actions.verb)[np.asarray(indices)])) >= 12


def test_a_refused_action_changes_nothing(home, walk):
    scene, _, _ = home
    actions, states, _, _ = walk
    state = jax.tree.map(lambda leaf: leaf[30], states)
    after, codes = jax.jit(
        jax.vmap(lambda v, o, t: step(scene, state, v, o, t)),
    )(actions.verb, actions.obj, actions.target)
    refused = np.asarray(codes) != 0
    assert refused.sum() > 100
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(
            np.asarray(new)[refused], np.broadcast_to(old, new.shape)[refused]
        )


def test_batch_equals_loop(home, walk):
    scene, state, _ = home
    actions, _, indices, _ = walk
    chosen = np.asarray(indices)[:8]
    columns = [np.asarray(c)[chosen] for c in (actions.verb, actions.obj, actions.target)]
    batch, codes = jax.jit(jax.vmap(step, in_axes=(None, None, 0, 0, 0)))(scene, state, *columns)
    for i in range(8):
        single, code = STEP(scene, state, *(c[i] for c in columns))
        assert int(code) == int(codes[i])
        for a, b in zip(jax.tree.leaves(single), jax.tree.leaves(batch), strict=True):
            np.testing.assert_array_equal(a, b[i])


def test_padding_never_matters(home, walk):
    scene, state, names = home
    actions, _, indices, _ = walk
    wide = encode(home_graph("cottage"), Sizes(nodes=192, doors=6, rooms=7, parents=4, added=128))
    chosen = np.asarray(indices)
    rows = np.stack([np.asarray(c)[chosen] for c in (actions.verb, actions.obj, actions.target)], 1)
    padded = pad_actions(rows.tolist(), 64)
    last = lambda states: jax.tree.map(lambda leaf: leaf[-1], jax.device_get(states))  # noqa: E731
    narrow_states, narrow_codes = replay(scene, state, padded)
    wide_states, wide_codes = replay(wide[0], wide[1], padded)
    np.testing.assert_array_equal(narrow_codes, wide_codes)
    n = len(names.nodes)
    np.testing.assert_array_equal(
        edge_bits(scene, last(narrow_states))[:n, :n], edge_bits(wide[0], last(wide_states))[:n, :n]
    )


def test_an_edge_without_room_is_reported(home):
    graph = home_graph("cottage")
    scene, state, names = encode(graph, Sizes(nodes=64, doors=2, rooms=3, parents=2, added=1))
    plan = "Walk to kitchen counter. Grab bread. Walk to table. Put bread on table."
    for line in parse_english(plan):
        state, code = STEP(scene, state, *bind(scene, state, names, line))
        assert int(code) == 0
    assert bool(state.overflow)


def test_tasks_of_equal_size_share_one_trace(homes):
    programs, sizes = homes
    traces = 0

    def counted(*args):
        nonlocal traces
        traces += 1
        return step(*args)

    jitted = jax.jit(counted)
    for program in (programs[0], programs[-1]):
        scene, state, _ = encode(program.init, sizes)
        jitted(scene, state, np.int32(0), np.int32(3), np.int32(-1))
    assert traces == 1


@pytest.mark.parametrize(
    ("plan", "verdict"),
    [
        ("Grab milk.", "<character> ({c}) is not close to <milk> ({milk})"),
        ("Walk to fridge. Grab milk.", "<milk> ({milk}) is inside other closed thing"),
        ("Walk to couch. Sit on couch. Walk to bed.", "<character> ({c}) is sitting"),
        ("Put milk in fridge.", "<character> ({c}) is not holding <milk> ({milk})"),
        ("Walk to radio. Switch on radio.", "<radio> ({radio}) is unplugged"),
        ("Stand up.", "<character> ({c}) is not sitting"),
        ("Sleep.", "<character> ({c}) is not lying or sitting"),
        ("Walk to door. Close door. Walk to bed.", "Door(s) <door> ({door}) between"),
    ],
)
def test_refusals_in_the_reference_words(home, plan, verdict):
    scene, state, names = home
    ids = {node["class_name"]: node["id"] for node in reversed(names.nodes)}
    lines = parse_english(plan)
    for line in lines[:-1]:
        state, code = STEP(scene, state, *bind(scene, state, names, line))
        assert int(code) == 0, line
    action = bind(scene, state, names, lines[-1])
    _, code = STEP(scene, state, *action)
    message = explain(scene, jax.device_get(state), names, action, int(code))
    assert message.startswith(verdict.format(c=ids["character"], **ids))


def test_carrying_and_putting_by_hand(home):
    """A hand-made story: where things end up, edge by edge."""
    scene, state, names = home
    ids = {node["class_name"]: node["id"] for node in reversed(names.nodes)}
    plan = "Walk to cat. Grab cat. Walk to bed. Put cat on bed."
    for line in parse_english(plan):
        state, code = STEP(scene, state, *bind(scene, state, names, line))
        assert int(code) == 0, line
    edges = {
        (e["from_id"], e["relation_type"], e["to_id"])
        for e in decode(scene, jax.device_get(state), names)["edges"]
    }
    cat, bed, me = ids["cat"], ids["bed"], ids["character"]
    # The reference leaves a carried thing INSIDE the room that the walk started from.
    assert {e for e in edges if cat in (e[0], e[2])} == {
        (cat, "ON", bed),
        (cat, "CLOSE", bed),
        (bed, "CLOSE", cat),
        (cat, "CLOSE", me),
        (me, "CLOSE", cat),
        (cat, "INSIDE", ids["living_room"]),
    }
    assert (me, "HOLDS_RH", cat) not in edges


def test_unknown_verb_rows_do_not_exist():
    assert len(VERB_INDEX) == 42
