"""Programs without graphs through the script that places them, and on as tasks."""

from __future__ import annotations

import json

import pytest

from egjax.errors import EgjaxError
from egjax.sim.household import home_graph
from experiments import place
from experiments.data import make_task, programs


@pytest.fixture
def data(tmp_path):
    """A scene, resources and three programs: one runs, one cannot, one is none."""
    folder = tmp_path / "programs" / "cottage" / "people"
    (tmp_path / "scenes").mkdir()
    (tmp_path / "resources").mkdir()
    folder.mkdir(parents=True)
    (tmp_path / "scenes" / "cottage.json").write_text(json.dumps(home_graph("cottage")))
    resources = {
        "class_name_equivalence": {},
        "object_script_placing": {
            "mug": [{"destination": "table", "relation": "ON", "room": "null"}]
        },
        "object_states": {"mug": ["dirty", "clean"]},
        "properties_data": {"mug": ["GRABBABLE"]},
    }
    for name, content in resources.items():
        (tmp_path / "resources" / f"{name}.json").write_text(json.dumps(content))
    head = "Tidy\nput it away\n\n\n"
    (folder / "a.txt").write_text(
        head + "[WALK] <mug> (1.1000)\n[GRAB] <mug> (1.1000)\n[WALK] <bed> (1.5)\n"
        "[PUTBACK] <mug> (1.1000) <bed> (1.5)\n"
    )
    (folder / "b.txt").write_text(head + "[WALK] <wall> (1.4)\n[GRAB] <wall> (1.4)\n")
    (folder / "c.txt").write_text(head + "[HUM]\n")
    return tmp_path


def config(data, **changes) -> place.Config:
    folders = {name: data / name for name in ("programs", "scenes", "resources")}
    return place.Config(**{**folders, "out": data / "out", "json": True, **changes})


def test_programs_are_placed_counted_and_listed(data, capsys):
    place.main(config(data))
    figures = {r["name"]: r for r in map(json.loads, capsys.readouterr().out.splitlines())}
    executed = figures["programs_executed"]
    assert (executed["value"], executed["n"]) == (1, 3)
    failed = [json.loads(line) for line in (data / "out" / "failed.jsonl").read_text().splitlines()]
    assert [(row["name"], row["step"]) for row in failed] == [
        ("cottage/people/b", 1),
        ("cottage/people/c", None),
    ]
    assert "is not grabbable" in failed[0]["reason"]
    assert "unknown verb 'HUM'" in failed[1]["reason"]

    (program,) = programs(data / "out", ["cottage/people/a"])
    task = make_task(program, "core", "train")
    assert "ON(mug, bed)" in map(str, task.predicates)
    assert program.title == "Tidy"


def test_missing_files_are_told(data):
    (data / "resources" / "properties_data.json").unlink()
    with pytest.raises(EgjaxError, match=r"properties_data\.json: no such resource file"):
        place.main(config(data))
    with pytest.raises(EgjaxError, match="cannot read the programs"):
        place.main(config(data, programs=data / "none.tar"))
