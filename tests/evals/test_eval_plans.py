"""Plans in the simulator: a small home by hand, and human programs of RobotHow."""

import numpy as np
import pytest

from egjax.evals.plans import Assignment, by_steps, judge, plan_length
from egjax.sim.goals import GoalSizes, Predicate, encode_goal, goal_predicates
from egjax.sim.graph import encode, sizes_of
from egjax.sim.robothow import find_dataset, load_programs
from egjax.sim.text import parse_english, to_english


def node(id, name, *states, category="Objects", properties=()):
    return {
        "id": id, "class_name": name, "category": category, "properties": list(properties),
        "states": list(states),
    }  # fmt: skip


HOME = {
    "nodes": [
        node(1, "character", category="Characters"),
        node(2, "kitchen", category="Rooms"),
        node(3, "bedroom", category="Rooms"),
        node(4, "door", "OPEN", properties=["CAN_OPEN"]),
        node(5, "fridge", "CLOSED", properties=["CAN_OPEN", "CONTAINERS"]),
        node(6, "milk", properties=["GRABBABLE"]),
        node(7, "light", "OFF", properties=["HAS_SWITCH"]),
    ],
    "edges": [
        {"from_id": a, "relation_type": r, "to_id": b}
        for a, r, b in [
            (1, "INSIDE", 3), (4, "INSIDE", 2), (5, "INSIDE", 2), (6, "INSIDE", 2),
            (7, "INSIDE", 3), (4, "BETWEEN", 2), (4, "BETWEEN", 3),
        ]
    ],
}  # fmt: skip
# The last goal would be undone by any further walk: a plan that has ended must stay put.
GOALS = [
    Predicate("INSIDE", "milk", "fridge"),
    Predicate("ON", "light"),
    Predicate("CLOSE", "character", "fridge"),
]
GOOD = (
    "Walk to light. Switch on light. Walk to kitchen. Walk to milk. Grab milk. "
    "Walk to fridge. Open fridge. Put milk in fridge."
)


@pytest.fixture(scope="module")
def home() -> Assignment:
    scene, state, names = encode(HOME)
    goal = encode_goal(GOALS, names, nodes=len(scene.ids), sizes=GoalSizes(4, 8))
    return Assignment(scene, state, goal, names)


@pytest.fixture(scope="module")
def judged(home):
    """All plans of this file in one batch: the program is compiled once."""
    sentence = "Sing a song."
    plans = {
        "good": GOOD,
        "half": "Walk to light. Switch on light.",
        "closed": GOOD.replace("Open fridge. ", ""),
        "unknown": GOOD.replace("Walk to kitchen.", sentence),
        "absent": GOOD.replace("Grab milk.", "Grab beer."),
        "afterwards": GOOD + " Grab light.",
        "empty": "  . ",
        "steps": parse_english(GOOD),
        "find": "Find light. " + GOOD,
    }
    return dict(zip(plans, judge([home] * len(plans), list(plans.values()), batch=16)))


def test_a_good_plan_is_solved(judged):
    verdict = judged["good"]
    assert verdict.solved
    assert verdict.executable
    assert verdict.parsed
    assert (verdict.satisfied, verdict.goals, verdict.length) == (3, 3, 8)
    assert verdict.refusal is None
    assert [step.text for step in verdict.steps][:2] == ["Walk to light.", "Switch on light."]


def test_half_a_plan_runs_and_does_not_solve(judged):
    verdict = judged["half"]
    assert verdict.executable
    assert not verdict.solved
    assert (verdict.satisfied, verdict.goals) == (1, 3)


def test_a_refusal_ends_the_plan_and_says_why(judged):
    verdict = judged["closed"]
    assert not verdict.executable
    assert not verdict.solved
    assert verdict.parsed
    assert verdict.refusal == (6, "the fridge is not open or is not openable")
    assert verdict.satisfied == 2


def test_a_sentence_that_is_no_step(judged):
    verdict = judged["unknown"]
    assert not verdict.parsed
    assert verdict.refusal == (2, "not a step that the simulator knows")
    assert [step.accepted for step in verdict.steps] == [True, True] + [False] * 6
    assert verdict.steps[3].reason == ""


def test_a_thing_that_the_home_lacks(judged):
    verdict = judged["absent"]
    assert verdict.parsed
    assert verdict.refusal == (4, "there is no beer in this home")


def test_goals_reached_before_a_refused_step_are_no_success(judged):
    verdict = judged["afterwards"]
    assert verdict.satisfied == verdict.goals
    assert not verdict.solved


def test_an_empty_plan_solves_nothing(judged):
    assert not judged["empty"].executable
    assert judged["empty"].steps == ()
    assert judged["empty"].satisfied == 0


def test_steps_and_sentences_are_judged_alike(judged):
    assert judged["steps"].satisfied == 3
    assert judged["steps"].solved


def test_find_is_not_counted(judged):
    assert judged["find"].length == judged["good"].length
    assert len(judged["find"].steps) == len(judged["good"].steps) + 1
    assert plan_length(parse_english("Find light. " + GOOD)) == 8


def test_the_batch_is_the_loop(home, judged):
    plans = [GOOD, "Walk to light. Switch on light.", GOOD.replace("Open fridge. ", "")]
    alone = [judge([home], [plan], batch=2)[0] for plan in plans]
    assert alone == [judged["good"], judged["half"], judged["closed"]]
    seen = []
    assert judge([home] * 3, plans, batch=2, progress=seen.append) == alone
    assert seen == [2, 3]


def test_refuses_unequal_numbers(home):
    with pytest.raises(ValueError, match="1 tasks for 2 plans"):
        judge([home], [GOOD, GOOD])


def test_column_of_the_report(judged):
    column = judged["closed"].column("copy")
    assert (column.model, column.solved, column.satisfied) == ("copy", False, 2)
    assert column.steps == judged["closed"].steps


def test_success_by_steps_counts_each_task_once():
    lengths, solved = [1, 4, 5, 9, 20, 20], [True, False, True, True, False, True]
    bins = by_steps(lengths, solved, seed=0)
    assert [(b.low, b.high, b.success.n) for b in bins] == [
        (1, 4, 2), (5, 8, 1), (9, 12, 1), (13, 20, 2),
    ]  # fmt: skip
    assert [b.success.value for b in bins] == [0.5, 1.0, 1.0, 0.5]
    one_task = by_steps(lengths, solved, seed=0, clusters=list("aabcdd"))
    assert one_task[0].success.low is None
    assert one_task[1] == bins[1]


def test_human_programs_solve_their_own_tasks(robothow_dir):
    """The witness is the recorded final graph: the goals were taken from it."""
    folder = find_dataset()
    assert folder is not None
    available = sorted(path.stem for path in folder.glob("executable_programs/*/*/*.txt"))[::60]
    programs = load_programs(folder, available)
    sizes = sizes_of([program.init for program in programs])
    assignments, human = [], []
    for program in programs:
        predicates = goal_predicates(program.init, program.final, close=False)
        if predicates:
            scene, state, names = encode(program.init, sizes)
            goal = encode_goal(predicates, names, nodes=sizes.nodes, sizes=GoalSizes(40, 256))
            assignments.append(Assignment(scene, state, goal, names))
            human.append(program.script)
    assert len(human) >= 5
    verdicts = judge(assignments, human, batch=16)
    assert all(verdict.solved for verdict in verdicts)
    english = judge(assignments, [to_english(script) for script in human], batch=16)
    assert np.mean([verdict.solved for verdict in english]) >= 0.8
