from __future__ import annotations

import json

import pytest

from egjax.errors import EgjaxError
from egjax.sim.eai import by_class, load_annotated
from egjax.sim.goals import Deed, Fact, Predicate, encode_goal
from egjax.sim.graph import encode
from egjax.sim.robothow import load_programs


def test_the_installed_annotations_load_and_fit_their_graphs(robothow_dir, robothow):
    tasks = load_annotated(robothow_dir)
    assert len(tasks) == 342
    relations = [sum(f.others is not None for f in t.facts) for t in tasks]
    # Its evaluator finds at most one relation; the interface scores 305 tasks.
    assert sum(n <= 1 for n in relations) == 305
    assert sum(len(t.deeds) == 2 for t in tasks) == 13
    first = tasks[0]
    assert (first.identifier, first.title, first.program) == ("27_2", "Wash clothes", "file27_2")
    assert Fact("CLOSED", (1001,)) in first.facts
    assert Fact("ON", (1003,), (1001,)) in first.facts
    assert Deed(("LOOKAT", "WATCH")) in {deed for task in tasks for deed in task.deeds}

    chosen = [t for t in tasks if t.facts][:3]
    for task, program in zip(chosen, load_programs(robothow, [t.program for t in chosen])):
        scene, _, names = encode(program.init)
        goal = encode_goal(task.facts, names, deeds=task.deeds, nodes=len(scene.ids))
        assert goal.mask.sum() == len(task.facts)
        predicates, meant = by_class(task.facts, names)
        kinds = {kind for p in predicates for kind in (p.subject, p.other) if kind}
        assert kinds == set(meant)


def test_facts_by_class_keep_which_objects_are_meant(home):
    _, _, names = home
    ids = {node["class_name"]: node["id"] for node in names.nodes}
    cat, cup, table = ids["cat"], ids["cup"], ids["table"]
    facts = [Fact("ON", (cat,), (table,)), Fact("ON", (cup,), (table,)), Fact("CLEAN", (cup,))]
    predicates, meant = by_class(facts, names)
    assert predicates == [
        Predicate("ON", "cat", "table"),
        Predicate("ON", "cup", "table"),
        Predicate("CLEAN", "cup"),
    ]
    assert meant == {"cat": (cat,), "cup": (cup,), "table": (table,)}
    with pytest.raises(EgjaxError, match="several classes"):
        by_class([Fact("CLEAN", (cat, cup))], names)


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ({"actions": ["FLY"], "goal": []}, "unknown verb 'FLY'"),
        ({"actions": [], "goal": [{"colour": "red"}]}, "neither a state nor a relation"),
        (None, "no goal"),
    ],
)
def test_malformed_annotations_are_told(tmp_path, goal, message):
    folder = tmp_path / "resources" / "virtualhome"
    with pytest.raises(EgjaxError, match="cannot read the goals"):
        load_annotated(tmp_path)
    folder.mkdir(parents=True)
    tasks = {"Rest": {"1_1": {"vh_goal": goal}} if goal else {}}
    (folder / "task_state_LTL_formula_accurate.json").write_text(json.dumps({"scene_1": tasks}))
    (folder / "id2task.json").write_text(json.dumps({"1_1": "Rest"}))
    with pytest.raises(EgjaxError, match=message):
        load_annotated(tmp_path)
