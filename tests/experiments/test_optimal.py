"""Collection with its second pass, pictures and proofs, on two short tasks."""

from __future__ import annotations

import json

import numpy as np
import pytest

from egjax.errors import EgjaxError
from egjax.search.mcts import SearchConfig
from egjax.sim.robothow import find_dataset
from experiments import collect, optimal

# Too small a search to find anything but by luck: the second pass has something to do.
SEARCH = SearchConfig(simulations=4, rollouts=1, rollout_steps=1, max_depth=3, chunk=2)


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    if find_dataset() is None:
        pytest.skip("the RobotHow data is not installed")
    path = tmp_path_factory.mktemp("tasks") / "names.txt"
    path.write_text("file710_2\nfile656_1\n")
    return path


def figures(text):
    return {row["name"]: row for row in map(json.loads, text.splitlines())}


def test_second_pass_pictures_and_proofs(names, tmp_path, capsys):
    collect.main(
        collect.Config(
            tasks=names,
            search=SEARCH,
            batch=2,
            shorten=400,
            picture=tmp_path / "trees",
            json=True,
        )
    )
    out, err = capsys.readouterr()
    found = figures(out)
    assert found["tasks_solved"]["value"] == 2
    assert found["tasks_solved_first"]["value"] < 2
    assert found["plans_proved_optimal"]["value"] == 2
    assert "MiB" in err
    assert found["tree_bytes"]["value"] > 5 * 2000  # nodes, each with its state
    for name in ("file710_2", "file656_1"):
        assert (tmp_path / "trees" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        tree = json.loads((tmp_path / "trees" / f"{name}.json").read_text())
        assert tree["nodes"][0]["visits"] == len(tree["nodes"]) - 1

    optimal.main(optimal.Config(tasks=names, search=SEARCH, limit=400, json=True))
    proofs = figures(capsys.readouterr().out)
    assert proofs["optimum_proved"]["value"] == proofs["greedy_optimal"]["value"] == 2
    assert proofs["tree_optimal"]["value"] == found["tasks_solved_first"]["value"]


def test_rates_are_told_while_batches_run(monkeypatch):
    clock, told = [10.0], []
    monkeypatch.setattr(collect.time, "perf_counter", lambda: clock[0])
    live = collect.Live(lambda done, text: told.append((done, text)))
    first, second = live.batch(4), live.batch(2)
    none = np.zeros(4, bool)
    first(16, none)  # compiled by now: the clock starts
    clock[0] += 2
    first(32, none)
    second(16, none)
    report = collect.SearchedTask("a_1", "Work", 1, 1, True, 1, 1, 1, 0.1)
    solved = collect.Found(report, [], None, 0, 0.0)
    unsolved = collect.replace(solved, report=collect.replace(report, solved=False))
    live.tasks([solved] * 4)
    live.tasks([solved, unsolved])
    assert told[0] == (0, "0 solved")
    assert told[-1] == (6, "5 solved, 48 simulations/s")  # (4 · 16 + 2 · 16) / 2


def test_telling_is_for_comparison_only():
    with pytest.raises(EgjaxError, match="go with --tasks"):
        collect.main(collect.Config(told=True))


@pytest.mark.parametrize(("other", "peers"), [(None, {"E2WM", "E2WM, one core"}), ("a_1", set())])
def test_a_peer_stands_beside_its_own_tasks_only(other, peers):
    names = sorted(collect._E2WM_TASKS)
    names[-1] = other or names[-1]
    reports = [collect.SearchedTask(name, "Work", 1, 1, True, 1, 1, 1, 0.1) for name in names]
    rows = collect.figures([collect.Found(report, [], None, 9, 0.1) for report in reports])
    assert {row.peer for row in rows if row.peer} == peers
