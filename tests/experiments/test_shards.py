"""Shards: what a killed run keeps, what hosts share out, what is put together. No search is run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from egjax.errors import EgjaxError
from egjax.evals.manifest import write_atomic
from egjax.evals.results import SearchedTask
from egjax.experience.records import PreferencePair, Trajectory, to_flat
from egjax.experience.tfds import read
from egjax.sim.text import Line
from experiments import collect, lease
from experiments.common import BusyError, Stage, finished, open_run
from experiments.shards import Shards, parse_part

TASKS = [f"file{i}_1" for i in range(7)]


@pytest.fixture(params=["here", "in a bucket"])
def run(tmp_path, request, monkeypatch):
    """A run with seven training tasks and one that is held out."""
    rows = [{"name": name, "title": "Work", "split": "train"} for name in TASKS]
    rows.insert(3, {"name": "file99_1", "title": "Relax", "split": "seen"})
    record = {"goals": "core", "tasks": rows, "unseen": ["Sleep"]}

    def write(out: Path) -> None:
        write_atomic(out / "tasks.json", json.dumps(record))

    folder = tmp_path / "run"
    if request.param != "here":
        folder = request.getfixturevalue("bucket") / "run"
        for name, seconds in (("BEAT", 0.1), ("PATIENCE", 0.5), ("SETTLE", 0.0)):
            monkeypatch.setattr(lease, name, seconds)
    with open_run(folder):
        Stage(folder, "tasks", {}).run(write)
    return folder


@pytest.fixture
def work(monkeypatch):
    """In place of loading and searching: two equal trajectories and a pair a task."""
    done: list[tuple[str, ...]] = []

    def load(path, robothow, names):
        del path, robothow
        assert names is not None
        return [type("Task", (), {"name": name, "split": "train"}) for name in names]

    class Problem:
        def __init__(self, tasks, instances, *, rounded, first):
            del instances
            self.names = [task.name for task in tasks]
            assert rounded
            assert TASKS[first] == self.names[0]

    def search(problem, config, goals, out):
        if fail and problem.names == fail[0]:
            raise KeyboardInterrupt
        done.append(tuple(problem.names))
        trajectories = [
            Trajectory(n, "Work", "train", ("[SLEEP]",), "Sleep.", "positive", True, 1.9, goals, s)
            for n in problem.names
            for s in (config.seed, config.seed + 1)
        ]
        pairs = [PreferencePair(n, "Q", "Sleep.", "Sit.", "failed") for n in problem.names]
        for name, records in (("trajectories", trajectories), ("pairs", pairs)):
            lines = (json.dumps(to_flat(record)) + "\n" for record in records)
            (out / f"{name}.jsonl").write_text("".join(lines))
        reports = [asdict(SearchedTask(n, "Work", 1, 1, True, 1, 1, 1, 0.1)) for n in problem.names]
        (out / "search.json").write_text(json.dumps({"tasks": reports}))

    fail: list[list[str]] = []
    monkeypatch.setattr(collect, "load_tasks", load)
    monkeypatch.setattr(collect, "Problem", Problem)
    monkeypatch.setattr(collect, "_collect", search)
    return done, fail


def config(run, **more) -> collect.Config:
    return collect.Config(run=run, shard_tasks=2, json=True, **more)


def test_a_killed_run_goes_on_with_the_missing_shards(run, work, capsys):
    done, fail = work
    fail.append(TASKS[4:6])
    with pytest.raises(KeyboardInterrupt):
        collect.main(config(run))
    assert done == [tuple(TASKS[:2]), tuple(TASKS[2:4])]
    assert not (run / "collect").exists()
    fail.clear()
    collect.main(config(run))
    assert done[2:] == [tuple(TASKS[4:6]), tuple(TASKS[6:])]
    found = list(read(Trajectory, run / "collect" / "experience"))
    assert [t.task for t in found] == TASKS  # in order, nothing twice
    assert len(read(PreferencePair, run / "collect" / "experience")) == 7
    card = json.loads((run / "collect" / "card.json").read_text())
    assert (card["twice"], card["shards"], card["solved"]) == (7, 4, 7)
    assert card["held_out"] == ["Sleep"]
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0]["value"] == rows[0]["n"] == 7
    collect.main(config(run, seed=1))  # another seed is other experience
    assert len(done) == 8


def test_hosts_share_out_the_shards_and_the_last_one_puts_them_together(run, work, capsys):
    done, _ = work
    collect.main(config(run, shard="1/2"))
    assert done == [tuple(TASKS[2:4]), tuple(TASKS[6:])]
    assert not (run / "collect").exists()
    assert "2 of 4 shards are left to the other parts" in capsys.readouterr().err
    with open_run(run, part="1-of-2"):  # the other one is still there
        with pytest.raises(BusyError):
            collect.main(config(run))
        with pytest.raises(BusyError):
            collect.main(config(run, shard="1/2"))
        collect.main(config(run, shard="0/2"))
        assert len(done) == 4
        assert "the last one puts the shards together" in capsys.readouterr().err
        assert not (run / "collect").exists()
    collect.main(config(run, shard="1/2"))
    assert len(done) == 4
    hosts = list(read(Trajectory, run / "collect" / "experience"))
    assert [t.task for t in hosts] == TASKS
    with open_run(run):
        assert finished(run, "collect", made_by="collect").kept


def test_a_damaged_shard_is_done_again(tmp_path):
    done = []

    def write(k: int, out: Path) -> None:
        done.append(k)
        (out / "x").write_text(str(k))

    shards = Shards(tmp_path, "stage", {"seed": 0}, 3)
    assert shards.missing() == [0, 1, 2]
    shards.run(write)
    assert shards.missing() == []
    (shards.paths()[1] / "x").write_text("")
    assert shards.missing() == [1]
    shards.run(write)
    assert done == [0, 1, 2, 1]


@pytest.mark.parametrize("text", ["2/2", "a/2", "-1/2", "1", "1/", "/2"])
def test_bad_parts_are_refused(text):
    with pytest.raises(EgjaxError, match="not a part of the shards"):
        parse_part(text)


def test_without_hosts_there_is_one_part(monkeypatch):
    monkeypatch.delenv("EGJAX_MULTI_HOST", raising=False)
    assert parse_part("") == (0, 1)
    assert parse_part("3/5") == (3, 5)


def test_a_search_that_was_stopped_goes_on_with_the_missing_batches(tmp_path, monkeypatch):
    """Of seven tasks in batches of two the last is stopped; then one of the second passes is."""
    done: list[object] = []
    plan = [Line("PUTBACK", (("cup", 3), ("table", None))), Line("SLEEP")]

    def found(row: int, solved: bool) -> collect.Found:
        report = SearchedTask(TASKS[row], "Work", 1, int(solved), solved, 2, 1, 1, 0.5)
        return collect.Found(report, plan, None, 7, 0.25, actions=(row, 1))

    def batch(problem, world, config, start, *, labels, live):
        if start == stop_at:
            raise KeyboardInterrupt
        done.append(start)
        return [found(row, row % 3 > 0) for row in range(start, min(start + 2, 7))]

    def second(problem, world, config, row, before):
        if row == 10 - stop_at:
            raise KeyboardInterrupt
        assert before == found(row, False)
        done.append((row,))
        return found(row, True)

    monkeypatch.setattr(collect, "_search_batch", batch)
    monkeypatch.setattr(collect, "_second_pass", second)
    monkeypatch.setattr(collect, "_cores", lambda: 1)
    problem = type("Problem", (), {"tasks": TASKS})

    def run() -> list[collect.Found]:
        settings = collect.Config(batch=2)
        return collect.find_plans(problem, settings, labels=False, folder=tmp_path)

    for stop_at in (6, 4):  # noqa: B007  (read by the two above)
        with pytest.raises(KeyboardInterrupt):
            run()
    stop_at = -1
    assert run() == [found(row, True) for row in range(7)]
    assert done == [0, 2, 4, 6, (0,), (3,), (6,)]
