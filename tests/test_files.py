"""Local paths and places in a bucket alike; a stand-in for the bucket holds objects in memory."""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from processes import codes, launch

from egjax import files
from egjax.errors import EgjaxError
from experiments import common, lease


@pytest.fixture(params=["here", "in a bucket"])
def folder(request, tmp_path):
    return tmp_path if request.param == "here" else request.getfixturevalue("bucket")


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    for name, seconds in (("BEAT", 0.1), ("PATIENCE", 0.6), ("SETTLE", 0.01)):
        monkeypatch.setattr(lease, name, seconds)


def test_a_bucket_is_known_by_its_scheme_even_where_pathlib_took_a_slash(bucket):
    for place in ("gs://pail/folder", Path("gs://pail/folder"), bucket):
        assert files.is_remote(place)
        assert str(files.as_path(place)) == "gs://pail/folder"
        assert str(files.absolute(place) / "x") == "gs://pail/folder/x"
    for place in ("runs/gs", "/gs/pail", Path("gs:")):
        assert not files.is_remote(place)
        assert type(files.as_path(place)) is type(Path())
    with pytest.raises(EgjaxError, match="gsx://a: only gs:// is known"):
        files.as_path("gsx://a")
    with pytest.raises(EgjaxError, match="--tasks gs://pail/x: has to be a local path"):
        files.here(Path("gs://pail/x"), "--tasks")


def test_folders_are_listed_moved_and_deleted(folder):
    with files.written_here(folder / "a") as out:
        (out / "b").mkdir(parents=True)
        (out / "b" / "c").write_text("xyz")
        (out / "d").write_text("z")
    files.append(folder / "a" / "d", "zz")
    assert files.sizes(folder / "a") == {"b/c": 3, "d": 3}
    assert (folder / "a" / "d").read_text() == "zzz"
    files.move(folder / "a", folder / "e", last="d")
    assert files.sizes(folder / "a") == {}
    assert (files.local_copy(folder / "e") / "b" / "c").read_text() == "xyz"
    files.delete(folder / "e" / "d")
    assert files.sizes(folder / "e") == {"b/c": 3}
    files.delete(folder / "e")
    files.delete(folder / "e")
    assert not (folder / "e").exists()


def test_what_fails_in_between_leaves_nothing_in_a_bucket(bucket):
    def half(place: Path) -> None:
        place.write_bytes(b"half")
        raise KeyError

    with pytest.raises(KeyError), files.written_here(bucket / "a") as out:
        half(out / "x")
    with pytest.raises(KeyError), common.atomic_path(bucket / "x.png") as part:
        half(part)
    assert files.sizes(bucket) == {}
    with common.atomic_path(bucket / "x.png") as part:
        assert part.suffix == ".png"
        part.write_bytes(b"whole")
    assert (bucket / "x.png").read_bytes() == b"whole"


def test_records_and_tokenizers_come_back(folder):
    from egjax.experience.records import PreferencePair
    from egjax.experience.tfds import read, write
    from egjax.lm.tokenizer import Tokenizer

    pairs = [PreferencePair(f"t{i}", "Q", "Sleep.", "Sit.", "failed") for i in range(3)]
    write(pairs[:1], folder / "data")
    write(pairs, folder / "data")  # replaces
    assert list(read(PreferencePair, folder / "data")) == pairs
    tokenizer = Tokenizer.train(["walk to the fridge", "open it"], vocab_size=270)
    tokenizer.save(folder / "tokenizer")
    assert Tokenizer.load(folder / "tokenizer").fingerprint == tokenizer.fingerprint


def test_a_stage_goes_on_where_it_was(folder):
    done: list[int] = []

    def work(out: Path) -> None:
        def unit(number: int) -> int:
            if number == 2 and not done[2:]:
                done.append(-1)
                raise KeyboardInterrupt
            done.append(number)
            return number**2

        units = {str(i): (lambda i=i: unit(i)) for i in range(4)}
        found = common.divided(out / common.PARTS, units, at="units")
        common.write_atomic(out / "sub" / "found.json", json.dumps(found))

    with common.open_run(folder / "run") as run:
        stage = common.Stage(run, "squares", {"a": 1}, "all")
        with pytest.raises(KeyboardInterrupt):
            stage.run(work)
        assert not stage.is_finished()
        assert not stage.run(work).kept
        assert done == [0, 1, -1, 2, 3]
        assert set(files.sizes(stage.path)) == {"sub/found.json", ".stage.json"}
        assert not stage.unfinished.exists()
        assert stage.run(work).kept
        assert common.finished(run, "squares", made_by="x").fingerprint == stage.fingerprint
        common.write_atomic(stage.path / "sub" / "found.json", "")
        assert not stage.is_finished()


def test_a_stage_that_was_killed_while_its_files_moved_is_whole_the_next_time(bucket, monkeypatch):
    def work(out: Path) -> None:
        for name in "abc":
            common.write_atomic(out / name, name)

    stage = common.Stage(bucket, "letters", {})
    system = files._system(bucket)[0]
    copy = type(system).cp_file
    left = [2]

    def failing(self, *names, **options):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        copy(self, *names, **options)

    monkeypatch.setattr(type(system), "cp_file", failing)
    with pytest.raises(KeyboardInterrupt):
        stage.run(work)
    assert set(files.sizes(stage.path)) == {"a", "b"}
    assert not stage.is_finished()
    left[0] = 9
    assert stage.run(lambda out: pytest.fail("done again")).kept
    assert set(files.sizes(stage.path)) == {"a", "b", "c", ".stage.json"}


def test_one_run_at_a_time_in_a_bucket(bucket, capsys):
    def refused(**more: str) -> None:
        with pytest.raises(lease.BusyError, match="another run is at work here"):
            common.open_run(bucket / "run", **more).__enter__()

    with common.open_run(bucket / "run"):
        refused()
        refused(part="1-of-2")
    with common.open_run(bucket / "run", part="0-of-2"):
        with common.open_run(bucket / "run", part="1-of-2"):  # at once: another part
            pass
        refused()
        refused(part="0-of-2")
    capsys.readouterr()
    with common.open_run(bucket / "run", fresh=True):  # at once: the others have left
        assert capsys.readouterr().err == ""


def test_a_dead_run_is_followed_and_a_second_one_is_noticed(bucket, monkeypatch):
    marker = bucket / "run" / ".egjax-run"
    marker.write_text('{"holder": "process 1 on ada", "beat": 7}')
    asked: list[int] = []
    monkeypatch.setattr(lease.os, "kill", lambda process, number: asked.append(number))
    with common.open_run(bucket / "run"):
        marker.write_text('{"holder": "process 2 on bob", "beat": 0}')
        lease.time.sleep(0.4)
    assert asked == [lease.signal.SIGTERM]
    assert "bob" in marker.read_text()  # not this run's any more


class Left(BaseException):
    """What `hosts.abandon` does in these tests, where a thread is to end and not the process."""


@pytest.fixture
def left(monkeypatch):
    """Exit code and line of each leave."""
    told: list[tuple[int, str]] = []

    def abandon(code: int, line: str) -> None:
        told.append((code, line))
        raise Left

    monkeypatch.setattr(lease.hosts, "abandon", abandon)
    monkeypatch.setattr(lease.threading, "excepthook", lambda failed: None)
    monkeypatch.setattr(lease, "silence", lambda: 1.0)
    return told


@pytest.mark.parametrize("held", [lease.leased, lease.watched])
@pytest.mark.parametrize("how", ["silent", "gone"])
def test_a_bucket_that_is_gone_ends_the_run_and_one_that_falters_does_not(
    bucket, monkeypatch, left, capsys, how, held
):
    asked, back = threading.Event(), threading.Event()

    def answer_not(*arguments: object, **options: object) -> None:
        asked.set()
        if how == "silent":
            back.wait()
        raise OSError("connection refused")

    system = type(files._system(bucket)[0])
    answer = system._open
    with held(bucket / "run", "marker"):
        monkeypatch.setattr(system, "_open", answer_not)
        asked.wait()
        monkeypatch.setattr(system, "_open", answer)
        back.set()
        lease.time.sleep(1.5)
        assert not left
        back.clear()
        monkeypatch.setattr(system, "_open", answer_not)
        for _ in range(300):
            if left:
                break
            lease.time.sleep(0.1)
        monkeypatch.setattr(system, "_open", answer)
        back.set()
    line = "gs://pail/folder/run: the bucket has not answered for 1 s"
    line += ": connection refused (once" if how == "gone" else " (once it answers the same command"
    assert [code for code, _ in left] == [2]
    assert left[0][1].startswith(line)
    assert capsys.readouterr().err.count(f"error: {line}") == 1


@pytest.mark.parametrize("count", [1, 2])
def test_whatever_the_processes_wait_for_they_end_when_the_storage_is_gone(tmp_path, count):
    command = ["tests/job_silent.py", str(tmp_path / "run")]
    processes = launch(command, count, logs=tmp_path, EGJAX_BUCKET_SILENCE="2")
    assert codes(processes, 60) == [2] * count
    said = [(tmp_path / f"{i}.err").read_text() for i in range(count)]
    assert all("run: the bucket has not answered for 2 s" in one for one in said), said
    assert count == 1 or "error: process 0 (" in said[1]


def test_a_folder_of_somebody_else_is_left_alone(folder):
    common.write_atomic(folder / "mine" / "thesis.tex", "x")
    with pytest.raises(EgjaxError, match="holds files that no run"):
        common.open_run(folder / "mine", fresh=True).__enter__()


@dataclasses.dataclass(frozen=True)
class Inner:
    tasks: Path | None = None


@dataclasses.dataclass(frozen=True)
class Outer:
    run: Path = Path("runs/x")
    inner: Inner = dataclasses.field(default_factory=Inner)


def places(monkeypatch, *argv: str) -> tuple[int, list[Outer]]:
    seen: list[Outer] = []
    monkeypatch.setattr(common.signal, "signal", lambda number, handler: None)
    with pytest.raises(SystemExit) as left:
        common.run_main(lambda config: seen.append(config), Outer, list(argv))
    return left.value.code, seen


def test_a_run_may_be_in_a_bucket_and_other_places_may_not(bucket, monkeypatch, capsys):
    code, (config,) = places(monkeypatch, "--run", "gs://pail/run", "--inner.tasks", "x")
    assert (code, str(config.run / "a")) == (0, "gs://pail/run/a")
    assert config.inner.tasks == Path("x")
    assert places(monkeypatch, "--inner.tasks", "gs://pail/tasks") == (2, [])
    assert "error: --inner.tasks gs://pail/tasks: has to be a local path" in capsys.readouterr().err
    assert places(monkeypatch, "--profile", "gs://pail/trace") == (2, [])
    assert "--profile gs://pail/trace: has to be a local path" in capsys.readouterr().err


def test_a_missing_library_is_told_in_a_line(monkeypatch, capsys):
    files._libraries.cache_clear()
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert places(monkeypatch, "--run", "gs://pail/run") == (2, [])
    assert "gs:// is out of reach" in capsys.readouterr().err


def test_a_bucket_out_of_reach_is_told_in_a_line(bucket, monkeypatch):
    def refuse(*path: object, mode: str = "", **options: object) -> None:
        if mode == "rb":
            raise FileNotFoundError
        raise OSError("Forbidden\nAnonymous caller does not have storage.objects.get access")

    system = type(files._system(bucket)[0])
    with monkeypatch.context() as patch:
        patch.setattr(system, "_open", refuse)
        with pytest.raises(EgjaxError, match=r"folder/\.egjax-run: cannot write the object: Forb"):
            common.open_run(bucket).__enter__()
    monkeypatch.setattr(system, "exists", refuse)
    with pytest.raises(EgjaxError, match=r"gs://pail/folder: cannot be reached: Forbidden \(gcl"):
        common.open_run(bucket).__enter__()


def test_what_a_buckets_client_raises_is_told_and_nothing_is_to_be_deleted_for_it(bucket):
    from egjax.train.checkpoint import unreadable, writing

    class HttpError(Exception):
        __module__ = "gcsfs.retry"

    told = "gs://pail/folder: cannot write: Service Unavailable, 503 (once the bucket takes it the"
    with pytest.raises(EgjaxError) as found, writing(bucket):
        raise HttpError("Service Unavailable, 503\nbody")
    assert str(found.value).startswith(told)
    assert "(if the bucket answers, delete it" in str(unreadable(bucket, HttpError("503")))
    with pytest.raises(KeyError), writing(bucket):
        raise KeyError


def test_weights_are_told_apart_from_a_local_folder(bucket):
    """Orbax needs a real bucket; what is not there is told all the same."""
    from egjax.train.checkpoint import load_params

    with pytest.raises(EgjaxError, match="gs://pail/folder/model: there is no checkpoint"):
        load_params(bucket / "model", {"w": np.zeros(2)})
