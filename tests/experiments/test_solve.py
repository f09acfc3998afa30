"""One's own scene, goals and plans through the scripts that take them."""

from __future__ import annotations

import dataclasses
import json

import pytest

from egjax.errors import EgjaxError
from egjax.search.mcts import SearchConfig
from egjax.sim.authoring import load_scenario
from experiments import score, solve

SCENE = """
rooms:
  kitchen: [table, cup on table, cup, fridge]
  bedroom: [bed, book on bed]
goals:
  - ON(book, bed)
  - OPEN(fridge)
"""
SMALL = SearchConfig(simulations=32, rollouts=2, rollout_steps=8, max_depth=8)


@pytest.fixture
def home(tmp_path):
    path = tmp_path / "home.yaml"
    path.write_text(SCENE)
    return str(path)


def rows(text: str) -> dict[str, dict]:
    return {row["name"]: row for row in map(json.loads, text.splitlines())}


def test_solve_prints_a_plan_that_the_simulator_accepts(home, capsys):
    config = solve.Config(scene=home, goal=("ON(cup (5), table)",), search=SMALL, json=True)
    assert solve.main(config) == 0
    plan = rows(capsys.readouterr().out)["plan"]
    assert plan["plan"].endswith("Put cup on table.")
    assert all(step["accepted"] for step in plan["steps"])
    assert plan["steps"][-1]["script"] == "[PUTBACK] <cup> (5) <table> (3)"
    assert plan["goals"] == [{"goal": "ON(cup (5), table)", "holds": True}]
    # For people; and what holds already needs no step.
    assert solve.main(dataclasses.replace(config, json=False)) == 0
    said = capsys.readouterr().out
    assert "[PUTBACK] <cup> (5) <table> (3)" in said
    assert "accepted" in said
    assert solve.main(solve.Config(scene=home, goal=("ON(book, bed)",))) == 0
    assert "plan_length" in capsys.readouterr().out


def test_solve_move_by_move_keeps_the_tree_and_draws_it(home, tmp_path, capsys):
    search = dataclasses.replace(SMALL, simulations=64, chunk=8, until_solved=False)
    config = solve.Config(
        scene=home, goal=("ON(cup (5), table)",), search=search, moves=8, per_move=16, json=True
    )
    assert solve.main(dataclasses.replace(config, picture=tmp_path / "trees")) == 0
    out, err = capsys.readouterr()
    assert rows(out)["plan"]["steps"][-1]["script"] == "[PUTBACK] <cup> (5) <table> (3)"
    moves = [line for line in err.splitlines() if line.startswith("move ")]
    assert len(moves) == rows(out)["plan_length"]["value"]
    # What a move has learnt serves the next: more visits than new simulations.
    visits = [int(line.split(" of ")[1].split()[0]) for line in moves]
    new = [int(line.split("visits, ")[1].split()[0]) for line in moves]
    assert visits[0] == new[0] == 16
    assert any(v > n for v, n in zip(visits[1:], new[1:], strict=True))
    assert rows(out)["simulations"]["value"] == sum(new)
    (png,), (text,) = (tmp_path / "trees").glob("*.png"), (tmp_path / "trees").glob("*.json")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert json.loads(text.read_text())["nodes"][0]["parent"] is None
    with pytest.raises(EgjaxError, match="less than a chunk of 8"):
        solve.main(dataclasses.replace(config, per_move=4))


def test_a_goal_that_holds_already_needs_no_action(capsys):
    assert solve.main(solve.Config(scene="cottage", goal=("DIRTY(plate)",), json=True)) == 0
    assert rows(capsys.readouterr().out)["plan_length"]["value"] == 0


def test_solve_says_what_cannot_be_done(home):
    with pytest.raises(EgjaxError, match="no action can bring that about"):
        solve.main(solve.Config(scene=home, goal=("DIRTY(cup)",)))
    with pytest.raises(EgjaxError, match="either a scene or a task"):
        solve.main(solve.Config())


def test_solve_says_that_a_home_has_no_doors(home, tmp_path, capsys):
    graph = load_scenario(home).graph
    edges = [edge for edge in graph["edges"] if edge["relation_type"] != "BETWEEN"]
    path = tmp_path / "closed.json"
    path.write_text(json.dumps({**graph, "edges": edges}))
    goal = ("ON(cup (5), table)",)
    assert solve.main(solve.Config(scene=str(path), goal=goal, search=SMALL)) == 1
    assert "no door joins rooms (BETWEEN) in this scene" in capsys.readouterr().err


def test_score_judges_plans_of_any_form(home, tmp_path, capsys):
    goals = {"scene": home, "goals": ["OPEN(fridge)"]}
    plans = [
        {**goals, "plan": "Walk to fridge. Open fridge.", "note": "kept"},
        {**goals, "plan": ["[WALK] <fridge> (6)", "[OPEN] <fridge> (6)"]},
        {**goals, "plan": "Open fridge."},
        {**goals, "plan": "[WALK] <fridge> (6)\n[WINK] <fridge> (6)"},
        {"scene": home, "plan": "Walk to fridge. Open fridge.", "model": "m"},
        {**goals, "plan": "Sing."},
        {**goals, "plan": "1. Walk to fridge. 2. Open fridge.", "steps": 2},
        {**goals, "plan": ["Step 1: Walk to fridge", "- Open fridge"]},
        {**goals, "plan": "1) [WALK] <fridge> (6)\n2) [OPEN] <fridge> (6)"},
        {**goals, "plan": "[WALK] <fridge> (1.6)\n[OPEN] <fridge> (1.6)"},
        {**goals, "plan": "```text\n1. **Walk** to the fridge.\n2. `Open fridge`\n```"},
        {**goals, "plan": "[WALK] <fridge>\n[OPEN] <fridge>"},
        {**goals, "plan": "Walk to fridge (1.6). Open fridge (6)."},
        {**goals, "plan": "Walk to fridge (99)."},
    ]
    path, out = tmp_path / "plans.jsonl", tmp_path / "verdicts.jsonl"
    path.write_text("\n".join(map(json.dumps, plans)))
    score.main(score.Config(path, out=out, json=True))
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    found = [row["verdict"] for row in kept]
    assert [{**row, "verdict": None} for row in kept] == [{**p, "verdict": None} for p in plans]
    solved = [True, True, False, False, True, False, *[True] * 7, False]
    assert [row["success"] for row in found] == solved
    assert [row["refused_step"] for row in found] == [None, None, 1, 2, None, 1, *[None] * 7, 1]
    assert [row["parsed"] for row in found] == [True, True, True, False, True, False, *[True] * 8]
    assert found[2]["reason"] == "the character is not close to the fridge"
    assert found[3]["reason"] == "unknown verb 'WINK'"
    assert found[13]["reason"] == "the graph has no object 99 (<fridge>)"
    assert (found[4]["goals_held"], found[4]["goals_total"]) == (2, 2)
    figure = rows(capsys.readouterr().out)["success"]
    assert (figure["value"], figure["n"]) == (10 / 14, 14)
    assert figure["low"] < 10 / 14 < figure["high"]
    score.main(score.Config(out, out=tmp_path / "again.jsonl"))
    assert (tmp_path / "again.jsonl").read_text() == out.read_text()


def test_a_plan_may_move_many_things(tmp_path):
    def node(id, name, *properties, category="Objects", states=()):
        return {"id": id, "class_name": name, "category": category,
                "properties": list(properties), "states": list(states)}  # fmt: skip

    cups = range(10, 24)
    nodes = [
        node(1, "character", category="Characters"),
        node(2, "kitchen", category="Rooms"),
        node(3, "fridge", "CAN_OPEN", "CONTAINERS", states=["OPEN"]),
        node(4, "bedroom", category="Rooms"),
        node(5, "door", "CAN_OPEN", states=["OPEN"]),
        *(node(i, "cup", "GRABBABLE", "MOVABLE") for i in cups),
    ]
    pairs = [(i, "INSIDE", 2) for i in (1, 3, 5, *cups)]
    pairs += [(5, "BETWEEN", 2), (5, "BETWEEN", 4)]
    edges = [{"from_id": a, "relation_type": r, "to_id": b} for a, r, b in pairs]
    home, path = tmp_path / "home.json", tmp_path / "plans.jsonl"
    home.write_text(json.dumps({"nodes": nodes, "edges": edges}))
    steps = [
        f"[{verb}] <cup> ({i})" + (" <fridge> (3)" if verb == "PUTIN" else "")
        if verb != "NEAR" else "[WALK] <fridge> (3)"
        for i in cups for verb in ("WALK", "GRAB", "NEAR", "PUTIN")
    ]  # fmt: skip
    row = {"scene": str(home), "goals": ["INSIDE(cup, fridge)"], "plan": steps}
    path.write_text(json.dumps(row))
    score.main(score.Config(path, out=tmp_path / "out.jsonl", json=True))
    found = json.loads((tmp_path / "out.jsonl").read_text())["verdict"]
    assert found["success"], found["reason"]
    assert sum(step["accepted"] for step in found["steps"]) == 4 * len(cups)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"task": "x"}', "plans.jsonl:1: no plan"),
        ('{"plan": "Sing."}', "either 'task', or 'scene' and 'goals'"),
        ("{", "plans.jsonl:1: not JSON"),
        ("", "no plans"),
        ('{"task": ["a"], "plan": "x"}', "'task' is no text"),
        ('{"scene": "cottage", "goals": [5], "plan": "x"}', "'goals' is no text"),
        ('{"scene": "cottage", "model": ["m"], "plan": "x"}', "'model' is no text"),
        ('{"scene": "cottage", "goals": ["OPEN(fride)"], "plan": "x"}', "did you mean fridge"),
    ],
)
def test_bad_plan_files_are_told(tmp_path, row, message):
    path = tmp_path / "plans.jsonl"
    path.write_text(row)
    with pytest.raises(EgjaxError) as error:
        score.main(score.Config(path))
    assert message in str(error.value)
