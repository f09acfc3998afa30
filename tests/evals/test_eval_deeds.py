from __future__ import annotations

from egjax.evals.plans import Assignment, judge
from egjax.sim.goals import Deed, Predicate, encode_goal
from egjax.sim.graph import encode
from egjax.sim.household import home_graph


def test_wanted_actions_count_as_goals_in_their_order():
    scene, state, names = encode(home_graph("cottage"))
    deeds = [Deed(("OPEN",)), Deed(("CLOSE",))]
    wanted = [Predicate("OPEN", "cupboard")]
    goal = encode_goal(wanted, names, deeds=deeds, nodes=len(scene.ids))
    task = Assignment(scene, state, goal, names)
    plans = [
        "Walk to fridge. Open fridge. Close fridge. Walk to cupboard. Open cupboard.",
        "Walk to cupboard. Open cupboard.",
        "Walk to cupboard. Open cupboard. Open cupboard. Close cupboard.",  # refused at the third
    ]
    verdicts = judge([task] * 3, plans, batch=3)
    assert [v.goals for v in verdicts] == [3, 3, 3]
    assert [v.satisfied for v in verdicts] == [3, 2, 2]
    assert [v.solved for v in verdicts] == [True, False, False]
