from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from egjax.errors import EgjaxError
from egjax.sim.text import (
    Line,
    bind,
    parse_english,
    parse_line,
    parse_script,
    resolve_name,
    to_english,
    to_script,
)
from egjax.sim.vocab import VERBS
from egjax.sim.world import step

NAMES = ("cup", "coffee_maker", "home_office", "food_bread", "bed", "light_switch")
steps = st.sampled_from(VERBS).flatmap(
    lambda verb: st.tuples(st.just(verb.name), *[st.sampled_from(NAMES) for _ in range(verb.arity)])
)


@given(st.lists(steps, max_size=8))
def test_english_round_trips(plan):
    lines = [Line(verb, tuple((name, None) for name in names)) for verb, *names in plan]
    assert parse_english(to_english(lines)) == lines


@given(st.lists(st.tuples(steps, st.integers(0, 5000)), max_size=8))
def test_scripts_round_trip(plan):
    lines = [Line(v, tuple((name, i) for name in names)) for (v, *names), i in plan]
    assert parse_script(to_script(lines)) == lines


def test_the_projects_examples():
    text = "Walk to kitchen. Grab coffee. Put coffee in coffee maker. Turn to computer."
    assert [str(line) for line in parse_english(text)] == [
        "[WALK] <kitchen>",
        "[GRAB] <coffee>",
        "[PUTIN] <coffee> <coffee_maker>",
        "[TURNTO] <computer>",
    ]
    assert str(parse_line("[GRAB] <cup> (1.12)")) == "[GRAB] <cup> (12)"
    assert str(parse_line("[LOOKAT_MEDIUM] <cup> (3)")) == "[LOOKAT] <cup> (3)"
    assert str(parse_line("[GRAB] <coffee maker>", bare=True)) == "[GRAB] <coffee_maker>"
    told = "Grab cup (1.12). Put the cup in coffee maker (7)."
    assert [str(line) for line in parse_english(told)] == [
        "[GRAB] <cup> (12)",
        "[PUTIN] <cup> <coffee_maker> (7)",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[FLY] <cup> (1)", "unknown verb 'FLY'"),
        ("[GRAB]", "GRAB takes 1 objects, not 0"),
        ("[PUTIN] <cup> (1)", "PUTIN takes 2 objects, not 1"),
        ("[PUTIN] <cup> (1) <sink>", "<sink> has no id"),
    ],
)
def test_a_bad_line_is_told_with_its_number(text, message):
    with pytest.raises(EgjaxError, match=message) as error:
        parse_script(f"Title\nDescription\n\n[WALK] <bed> (3)\n{text}\n", where="file7.txt")
    assert str(error.value).startswith("file7.txt:5: ")


def test_a_sentence_that_is_no_step():
    with pytest.raises(EgjaxError, match="plan, step 2: not a step: 'Ponder life'"):
        parse_english("Walk to bed. Ponder life. Sleep.")


def test_ids_are_checked(home):
    scene, state, names = home
    cup = next(n["id"] for n in names.nodes if n["class_name"] == "cup")
    assert names.nodes[bind(scene, state, names, Line("GRAB", (("cup", cup),)))[1]]["id"] == cup
    with pytest.raises(EgjaxError, match="no object 999"):
        bind(scene, state, names, Line("GRAB", (("cup", 999),)))
    with pytest.raises(EgjaxError, match=f"object {cup} is a cup, not a bed"):
        bind(scene, state, names, Line("LIE", (("bed", cup),)))


def test_a_name_means_held_then_close_then_here_then_lowest_id(home):
    scene, state, names = home
    jitted = jax.jit(step)
    lights = [i for i, n in enumerate(names.nodes) if n["class_name"] == "light"]
    room = {i: names.class_name(int(np.asarray(scene.inside)[i][0])) for i in lights}
    assert room[resolve_name(scene, state, names, "light")] == "kitchen"

    def go(state, action):
        state, code = jitted(scene, state, *bind(scene, state, names, parse_english(action)[0]))
        assert int(code) == 0, action
        return jax.device_get(state)

    state = go(state, "Walk to bedroom.")
    assert room[resolve_name(scene, state, names, "light")] == "bedroom"
    # The kitchen's light is looked for by id, then it is CLOSE and wins over the room's.
    kitchen = next(i for i in lights if room[i] == "kitchen")
    near = state.replace(
        nodes=np.where(np.arange(len(state.nodes)) == kitchen, state.nodes | 4, state.nodes)
    )
    assert resolve_name(scene, near, names, "light") == kitchen
    bedroom = next(i for i in lights if room[i] == "bedroom")
    held = near.replace(
        nodes=np.where(np.arange(len(near.nodes)) == bedroom, near.nodes | 512, near.nodes)
    )
    assert resolve_name(scene, held, names, "light") == bedroom
    assert resolve_name(scene, state, names, "dragon") == -1
