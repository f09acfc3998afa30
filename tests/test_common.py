"""What every experiment script relies on: exit codes, figures, kept stages, locks."""

import contextlib
import dataclasses
import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fsspec.exceptions import FSTimeoutError

from egjax.errors import EgjaxError
from egjax.evals.intervals import Figure
from egjax.evals.manifest import revision
from egjax.train.layout import Layout
from experiments import common
from experiments.training import LogTo, Training

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = '''
"""Measures nothing, for a test."""
import dataclasses, sys, time
from pathlib import Path
from egjax.errors import EgjaxError
from egjax.evals.intervals import Figure
from experiments import common

@dataclasses.dataclass(frozen=True)
class Config:
    """A test's config."""
    run: Path = Path("run")
    json: bool = False
    seed: int = 0
    fresh: bool = False

def main(config):
    {body}

if __name__ == "__main__":
    common.run_main(main, Config)
'''


@pytest.fixture(autouse=True)
def handlers_as_before():
    """`run_main` leaves its handlers behind, as a program that ends there may."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    hook = sys.unraisablehook
    yield
    sys.unraisablehook = hook
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def script(tmp_path):
    """Starts a script with the given body of `main`, in its own directory."""

    def start(body: str, *arguments: str, **options) -> subprocess.Popen:
        path = tmp_path / "script.py"
        path.write_text(SCRIPT.format(body=body.replace("\n", "\n    ")))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
        return subprocess.Popen(
            [sys.executable, str(path), *arguments],
            cwd=tmp_path,
            env=environment,
            text=True,
            stdout=options.pop("stdout", subprocess.PIPE),
            stderr=subprocess.PIPE,
        )

    return start


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


# --- the command line ---------------------------------------------------------------------------


def leave(main, tmp_path, *arguments) -> int:
    @dataclasses.dataclass(frozen=True)
    class Config:
        """A test's config."""

        run: Path = tmp_path / "run"
        seed: int = 0

    with pytest.raises(SystemExit) as left:
        common.run_main(main, Config, list(arguments))
    return left.value.code


def test_main_gets_its_config_and_gives_the_exit_code(tmp_path, capsys):
    seen = []
    assert leave(lambda config: seen.append(config.seed), tmp_path, "--seed", "7") == 0
    assert leave(lambda config: 1, tmp_path) == 1
    assert seen == [7]
    assert "jax" in capsys.readouterr().err  # the line about the machine


def test_help_is_the_docstring_and_starts_nothing(script):
    code, out, _ = finish(script("raise SystemExit(9)", "--help"))
    assert code == 0
    assert "Measures nothing, for a test." in out
    assert "--json" in out


@pytest.mark.parametrize("argument", ["--sed=1", "--seed=many", "--seed=-1", f"--seed={2**70}"])
def test_unknown_options_and_values_leave_with_2(tmp_path, argument, capsys):
    assert leave(lambda config: 0, tmp_path, argument) == 2


def fail(error):
    def main(config):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (EgjaxError("unknown verb 'FLY'", where="a.txt:3", remedy="see the list"), "a.txt:3"),
        (OSError(errno.ENOSPC, "No space left on device", "out.bin"), "out.bin: no space left"),
        (OSError(errno.ENOSPC, "No space left", "from.bin", None, "to.bin"), "to.bin: no space"),
        (RuntimeError("RESOURCE_EXHAUSTED: No space left on device"), "no space left"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x.json"), "x.json"),
        (ImportError("mctx is needed here; pip install 'egjax[search]'"), "egjax[search]"),
        (OSError(errno.EROFS, "Read-only file system", "run"), "run: the file system is read-only"),
        (FSTimeoutError(), "the bucket does not take or give it: FSTimeoutError (once it does"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_2(tmp_path, capsys, error, words):
    assert leave(fail(error), tmp_path) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert words in lines[0]


def test_a_library_that_is_wanted_and_missing_is_told_before_any_work(monkeypatch, capsys):
    @dataclasses.dataclass(frozen=True)
    class Config:
        """A test's config."""

        log_to: LogTo = ("wandb",)

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit) as left:
        common.run_main(lambda config: pytest.fail("worked"), Config, [])
    assert left.value.code == 2
    assert "error: wandb is needed here; install it with" in capsys.readouterr().err


def test_a_full_disk_is_seen_under_another_error(tmp_path, capsys):
    def main(config):
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "part.npz")
        except OSError as error:
            raise ValueError("could not save") from error

    assert leave(main, tmp_path) == 2
    assert "part.npz: no space left" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.EIO, "I/O error")])
def test_a_fault_of_the_program_keeps_its_traceback(tmp_path, error):
    @dataclasses.dataclass(frozen=True)
    class Config:
        """A test's config."""

    with pytest.raises(type(error)):
        common.run_main(fail(error), Config, [])


def test_a_full_standard_output_is_told(script):
    with open("/dev/full", "w") as full:
        code, _, err = finish(script('print("x")', stdout=full))
    assert code == 2
    assert "no space left" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_it_and_what_was_done_stays(script, tmp_path, number, code):
    body = """
with common.open_run(config.run) as run:
    first = common.Stage(run, "first", {"seed": config.seed})
    first.run(lambda path: (path / "out.txt").write_text("whole"))
    def work(path):
        with (path / "log.txt").open("a") as log:
            log.write("step\\n")
        if len((path / "log.txt").read_text().splitlines()) == 1:
            print("ready", flush=True)
            time.sleep(20)
    second = common.Stage(run, "second", {"after": first.fingerprint})
    second.run(work)
"""
    process = script(body)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    left, _, err = finish(process)
    assert left == code
    assert err.splitlines()[-1] == "stopped; continue with the same command"
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "second").exists()
    left, _, err = finish(script(body))
    assert left == 0
    assert "first: kept" in err
    assert "second: goes on" in err
    assert (tmp_path / "run" / "first" / "out.txt").read_text() == "whole"
    assert (tmp_path / "run" / "second" / "log.txt").read_text() == "step\nstep\n"


@pytest.mark.parametrize("where", ["callback of the collector", "finaliser"])
def test_a_signal_is_not_lost_where_python_drops_exceptions(script, where):
    body = """
import gc, signal
sent = []
def send(*_):
    if not sent:
        sent.append(True)
        signal.raise_signal(signal.SIGTERM)
        [0 for _ in range(9)]  # here the handler raises
class Finaliser:
    __del__ = send
if "{where}" == "finaliser":
    Finaliser()
else:
    gc.callbacks.append(send)
    gc.collect()
time.sleep(5)
"""
    left, _, err = finish(script(body.replace("{where}", where)))
    assert left == 143
    assert err.splitlines()[-1] == "stopped; continue with the same command"
    assert "Exception ignored" not in err


def test_a_failed_checkpoint_is_one_line_among_few(script):
    """As Orbax's threads tell of a full disk: tracebacks in logs, callbacks of a closed loop."""
    body = """
import asyncio, logging
loop = asyncio.new_event_loop()
loop.close()
class Write:
    def __del__(self):
        loop.call_soon_threadsafe(print)
for _ in range(9):
    Write()
    try:
        raise OSError(28, "No space left on device", "state")
    except OSError:
        logging.getLogger("absl").exception("a write failed")
raise OSError(28, "No space left on device", "state")
"""
    left, _, err = finish(script(body))
    assert left == 2
    assert err.count("a write failed") == 9
    assert "Traceback" not in err
    assert "closed" not in err
    assert err.splitlines()[-1].startswith("error: state: no space left")


def test_a_loop_may_save_before_it_stops(script, tmp_path):
    body = """
with common.save_then_stop() as stop:
    print("ready", flush=True)
    while not stop:
        time.sleep(0.01)
    Path("saved").touch()
print("not reached")
"""
    process = script(body)
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    code, out, err = finish(process)
    assert (code, out) == (143, "")
    assert err.splitlines()[-1] == "stopped; continue with the same command"
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize(("pause", "saves"), [(0.0, True), (1.0, False)])
def test_a_second_sigterm_is_the_first_one_where_it_follows_at_once(script, tmp_path, pause, saves):
    """Slurm sends one to each process, and the shell passes its own on."""
    body = """
from egjax.train import signals; signals._TWICE = 0.5
with common.save_then_stop() as stop:
    print("ready", flush=True)
    # Sleep gives the interpreter's lock back: in a loop that never did, CPython 3.11 was seen to
    # miss a signal until the next one.
    while not stop:
        time.sleep(0.001)
    print("asked", flush=True)
    begun = time.monotonic()
    while time.monotonic() < begun + 3:  # a step's end, then the save
        time.sleep(0.001)
    Path("saved").touch()
"""
    process = script(body)
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.stdout.readline() == "asked\n"
    time.sleep(pause)
    process.terminate()
    code, _, err = finish(process)
    assert code == 143
    assert err.splitlines()[-1] == "stopped; continue with the same command"
    assert (tmp_path / "saved").exists() is saves


@pytest.mark.parametrize("variable", ["EGJAX_PATIENCE", "EGJAX_SILENCE", "EGJAX_BUCKET_SILENCE"])
def test_a_time_that_is_no_number_is_told(tmp_path, monkeypatch, capsys, variable):
    monkeypatch.setenv(variable, "5m")
    assert leave(lambda config: 0, tmp_path) == 2
    assert f"error: {variable}: '5m' is no number of seconds" in capsys.readouterr().err


def test_a_directory_of_this_host_alone_is_not_taken_for_the_shared_one(tmp_path, monkeypatch):
    """Also where an earlier run has left one of that name."""
    said = []
    monkeypatch.setattr(common.hosts, "agree", lambda name, text="": said.append(text) or said[0])
    with common.open_run(tmp_path / "shared"):
        monkeypatch.setattr(common.hosts, "index", lambda: 1)
        monkeypatch.setattr(common, "_STALE", 0.1)
        with common.open_run(tmp_path / "shared"):
            pass
        for name in ("shared", "own"):
            (tmp_path / "mine" / name).mkdir(parents=True)
            (tmp_path / "mine" / name / ".egjax-run").write_text("7, aaaa\n")
            with (
                pytest.raises(EgjaxError, match="does not see it"),
                common.open_run(tmp_path / "mine" / name),
            ):
                pass
    assert said[0]


@pytest.mark.parametrize("place", ["s3://bucket/x", "hdfs:/x"])
def test_storage_that_is_not_known_is_told(tmp_path, capsys, place):
    assert leave(lambda config: 0, tmp_path, "--run", place) == 2
    assert "only gs:// is known beside folders" in capsys.readouterr().err
    assert not Path(place.split(":")[0] + ":").exists()


def test_hosts_are_connected_before_anything_is_asked_of_jax(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(common.hosts, "start_hosts", lambda: order.append("hosts") or 0)
    monkeypatch.setattr(common, "_machine_line", lambda: order.append("machine") or "")
    assert leave(lambda config: 0, tmp_path) == 0
    monkeypatch.setenv("EGJAX_MULTI_HOST", "1")
    assert leave(lambda config: 0, tmp_path) == 0
    assert order == ["machine", "hosts", "machine"]
    monkeypatch.setenv("EGJAX_MULTI_HOST", "auto")  # a plain machine: no job of several
    assert leave(lambda config: 0, tmp_path) == 0
    assert order == ["machine", "hosts", "machine", "machine"]


def test_a_profile_is_written_for_perfetto(script, tmp_path):
    process = script(
        "import jax; jax.block_until_ready(jax.numpy.ones(3) + 1)", "--profile", str(tmp_path / "p")
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    (trace,) = (tmp_path / "p").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert events
    # A file holds a million events; calls of Python functions ("$file:line name") would fill it.
    assert not any(event.get("name", "").startswith("$") for event in events)
    assert list((tmp_path / "p").rglob("*.xplane.pb"))
    assert str(trace) in err


def test_costs_are_those_of_the_process_alone(script, tmp_path, monkeypatch):
    monkeypatch.setenv("EGJAX_COSTS", str(tmp_path / "costs.json"))
    held = bytearray(10**9)
    held[::4096] = b"1" * len(held[::4096])  # else the pages are not there
    process = script("import jax; jax.block_until_ready(jax.numpy.ones(3) + 1)")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    costs = json.loads((tmp_path / "costs.json").read_text())
    assert costs["compilations"] >= 1
    assert 5e7 < costs["peak_bytes"] < len(held)


def test_a_reader_that_leaves_is_no_error(script):
    process = script("for i in range(10**6): print(i)")
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.wait(timeout=30) == 141
    assert "Error" not in process.stderr.read()
    process.stderr.close()


@pytest.mark.parametrize("given", [None, "elsewhere", ""])
def test_compiled_programs_are_kept_unless_the_user_says_otherwise(tmp_path, given):
    code = "import experiments, jax; print(jax.config.jax_compilation_cache_dir or '')"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": ""}
    if given is not None:
        environment["JAX_COMPILATION_CACHE_DIR"] = given
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    expected = str(tmp_path / ".cache" / "egjax" / "xla") if given is None else given
    assert done.stdout.strip() == expected


# --- figures ------------------------------------------------------------------------------------

FIGURES = (
    Figure("success/expert/seen", 0.8125, "fraction", 32, low=0.66, high=0.94, seed=0),
    Figure("speed", 30.0, "tasks/s", 5, peer="E2WM", peer_value=10.0),
)


def test_figures_as_json_lines(capsys):
    common.emit(*FIGURES, json=True)
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert {"name", "value", "unit", "n"} <= set(first)
    assert first["value"] == 0.8125
    assert (second["peer_value"], second["ratio"]) == (10.0, 3.0)
    assert "ratio" not in first


def test_figures_as_text(capsys):
    common.emit(*FIGURES)
    first, second = capsys.readouterr().out.splitlines()
    assert "0.8125 fraction  [0.66, 0.94]  n=32" in first
    assert "30 tasks/s  n=5  (E2WM: 10, ratio 3)" in second


# --- files and fingerprints ---------------------------------------------------------------------


def test_atomic_path_gives_the_whole_file_or_the_old_one(tmp_path):
    path = tmp_path / "deep" / "x.npz"
    with common.atomic_path(path) as part:
        assert part.suffix == ".npz"
        part.write_text("old")
    with pytest.raises(RuntimeError, match="half"), common.atomic_path(path) as part:  # noqa: PT012
        part.write_text("ne")
        raise RuntimeError("half")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


@dataclasses.dataclass(frozen=True)
class Inner:
    """A part of a config."""

    rate: float = 0.1
    names: tuple[str, ...] = ("a", "b")


@dataclasses.dataclass(frozen=True)
class Other:
    """The same fields under another name."""

    rate: float = 0.1
    names: tuple[str, ...] = ("a", "b")


def test_fingerprints_follow_the_content():
    one = {"config": Inner(), "seed": 0, "path": Path("a"), "kinds": {"x", "y"}, "f": len}
    same = {"f": len, "kinds": {"y", "x"}, "path": Path("a"), "seed": 0, "config": Inner()}
    assert common.fingerprint(one) == common.fingerprint(same)
    changes = ({"seed": 1}, {"config": Inner(rate=0.2)}, {"config": Other()}, {"f": max})
    names = {common.fingerprint({**one, **change}) for change in changes}
    assert len(names) == 4
    assert common.fingerprint(one) not in names


def test_how_something_is_computed_is_no_part_of_what_it_is():
    plain = Training(steps=3, batch=4, length=8, learning_rate=0.1)
    layout = Layout(model=2, remat="full", chunked=True, accumulate=2, attention="exact")
    other = dataclasses.replace(plain, save_every=7, layout=layout)
    assert common.fingerprint(other) == common.fingerprint(plain)
    for change in ({"steps": 4}, {"schedule": "wsd"}, {"layout": Layout(master="bfloat16")}):
        changed = dataclasses.replace(plain, **change)
        assert common.fingerprint(changed) != common.fingerprint(plain)


def test_what_has_no_content_has_no_fingerprint():
    with pytest.raises(TypeError, match="object"):
        common.fingerprint({"x": object()})


def test_fingerprints_of_files(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("1")
    before = common.file_fingerprint(tmp_path / "a")
    os.utime(tmp_path / "a" / "x.txt", (0, 0))
    assert common.file_fingerprint(tmp_path / "a") == before
    (tmp_path / "a" / "x.txt").rename(tmp_path / "a" / "y.txt")
    assert common.file_fingerprint(tmp_path / "a") != before
    assert common.source_fingerprint() == common.source_fingerprint()


# --- stages -------------------------------------------------------------------------------------


class Work:
    """Counts how often it is done; writes one file."""

    def __init__(self, text: str = "x"):
        self.text, self.count = text, 0

    def __call__(self, path: Path) -> None:
        self.count += 1
        (path / "out.txt").write_text(self.text)


def test_a_finished_stage_is_kept_until_its_inputs_change(tmp_path, capsys):
    work = Work()
    first = common.Stage(tmp_path, "sft", {"seed": 0}).run(work)
    again = common.Stage(tmp_path, "sft", {"seed": 0}).run(work)
    assert work.count == 1
    assert (first.kept, again.kept) == (False, True)
    assert again.seconds == pytest.approx(first.seconds)
    assert "sft: kept" in capsys.readouterr().err
    other = common.Stage(tmp_path, "sft", {"seed": 1}).run(work)
    assert work.count == 2
    assert other.fingerprint != first.fingerprint
    assert (first.path / "out.txt").exists()


def test_a_stage_knows_all_code_that_worked_on_it(tmp_path, monkeypatch):
    stage = common.Stage(tmp_path, "sft", {})
    for code, work in (
        ("a", fail(EgjaxError("stop"))),
        ("b", fail(EgjaxError("stop"))),
        ("b+", Work()),
    ):
        monkeypatch.setattr(common, "revision", lambda code=code: code)
        with contextlib.suppress(EgjaxError):
            done = stage.run(work)
    assert common.provenance(done)[1] == ("a", "b", "b+")
    monkeypatch.setattr(common, "revision", lambda: "c")
    assert common.provenance(stage.run(Work()))[1] == ("a", "b", "b+")


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("longer")])
def test_a_stage_whose_outputs_were_touched_is_done_again(tmp_path, damage):
    work = Work()
    done = common.Stage(tmp_path, "sft", {}).run(work)
    damage(done.path / "out.txt")
    common.Stage(tmp_path, "sft", {}).run(work)
    assert work.count == 2
    assert (done.path / "out.txt").read_text() == "x"


def test_what_is_no_output_may_come_and_go(tmp_path, capsys):
    def work(path):
        for name in ("model/weights", "checkpoints/9/state", "tensorboard/events"):
            (path / name).parent.mkdir(parents=True)
            (path / name).write_text("x")

    stage = common.Stage(tmp_path, "sft", {})
    done = stage.run(work)
    (done.path / "notes.txt").write_text("mine")
    (done.path / "checkpoints" / "9" / "state").unlink()
    (done.path / "tensorboard" / "events").write_text("longer")
    assert stage.run(lambda path: pytest.fail("done again")).kept
    assert (done.path / "notes.txt").exists()
    assert common.finished(tmp_path, "sft", made_by="sft").kept
    (done.path / "model" / "weights").unlink()
    assert not stage.run(work).kept
    assert "sft: is done again, then replaced: model/weights is gone" in capsys.readouterr().err


def test_finished_finds_what_an_earlier_command_left(tmp_path):
    with pytest.raises(EgjaxError, match=r"experiments\.text"):
        common.finished(tmp_path, "text", made_by="text")
    done = common.Stage(tmp_path, "text", {"seed": 0}).run(Work())
    found = common.finished(tmp_path, "text", made_by="text")
    assert (found.path, found.fingerprint, found.kept) == (done.path, done.fingerprint, True)
    at, code = common.provenance(found)
    assert at.endswith("Z")
    assert code == (revision(),)
    (done.path / "out.txt").unlink()
    with pytest.raises(EgjaxError, match="no finished stage"):
        common.finished(tmp_path, "text", made_by="text")


def test_stages_of_different_tasks_are_not_put_together(tmp_path):
    tasks = common.Stage(tmp_path, "tasks", {"seed": 0}).run(Work())
    common.Stage(tmp_path, "text", {"tasks": tasks.fingerprint}).run(Work())
    assert common.finished(tmp_path, "text", made_by="text")
    common.Stage(tmp_path, "tasks", {"seed": 1}).run(Work())
    with pytest.raises(EgjaxError, match="'text' was made from another stage 'tasks'"):
        common.finished(tmp_path, "text", made_by="text")


def test_failing_on_new_inputs_leaves_the_old_outputs(tmp_path):
    done = common.Stage(tmp_path, "sft", {"seed": 0}).run(Work("old"))
    with pytest.raises(EgjaxError):
        common.Stage(tmp_path, "sft", {"seed": 1}).run(fail(EgjaxError("bad graph")))
    assert (done.path / "out.txt").read_text() == "old"
    assert common.Stage(tmp_path, "sft", {"seed": 0}).run(Work("new")).kept


def test_an_attempt_is_continued_only_on_the_same_inputs(tmp_path):
    def half(path):
        (path / "step1").write_text("")
        raise KeyboardInterrupt

    found = []

    def rest(path):
        found.append(sorted(p.name for p in path.iterdir() if not p.name.startswith(".")))

    for seed in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            common.Stage(tmp_path, "sft", {"seed": 0}).run(half)
        common.Stage(tmp_path, "sft", {"seed": seed}).run(rest)
        common.Stage(tmp_path, "sft", {"seed": 2}).run(Work())
    assert found == [["step1"], []]


def test_checkpoints_of_other_inputs_are_not_deleted(tmp_path, capsys):
    def stage(**changes):
        training = Training(steps=3, batch=4, length=8, learning_rate=0.1)
        inputs = {"training": dataclasses.replace(training, **changes), "data": "f" * 64}
        return common.Stage(tmp_path, "sft", inputs)

    def half(path):
        (path / "checkpoints" / "2").mkdir(parents=True)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage().run(half)
    words = (
        r"sft\.unfinished: holds checkpoints of other inputs: training\.steps was 3, is 6 \(give"
    )
    with pytest.raises(EgjaxError, match=words):
        stage(steps=6).run(Work())
    other = common.Stage(tmp_path, "sft", stage().inputs | {"data": "e" * 64})
    with pytest.raises(EgjaxError, match=r"other inputs: data is another \("):
        other.run(Work())
    assert (tmp_path / "sft.unfinished" / "checkpoints" / "2").is_dir()
    stage(save_every=1).run(Work())
    assert "sft: goes on" in capsys.readouterr().err
    stage(steps=6).run(Work())
    assert "sft: is done again, then replaced: training.steps was 3" in capsys.readouterr().err


def test_time_of_an_interrupted_attempt_counts(tmp_path):
    def half(path):
        time.sleep(0.2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        common.Stage(tmp_path, "sft", {}).run(half)
    done = common.Stage(tmp_path, "sft", {}).run(Work())
    assert 0.2 <= done.seconds < 2


def test_a_stop_between_finishing_and_moving_loses_nothing(tmp_path, monkeypatch):
    work = Work()
    stage = common.Stage(tmp_path, "sft", {})
    with monkeypatch.context() as patched:
        patched.setattr(common.Stage, "_publish", fail(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            stage.run(work)
    assert stage.run(work).kept
    assert work.count == 1
    assert (stage.path / "out.txt").exists()


def test_a_run_directory_takes_one_run_at_a_time(tmp_path):
    with (
        common.open_run(tmp_path / "run"),
        pytest.raises(EgjaxError, match=f"another run is at work here .process {os.getpid()}"),
        common.open_run(tmp_path / "run"),
    ):
        pass
    with common.open_run(tmp_path / "run"):
        pass


def test_fresh_deletes_inside_the_run_directory_only(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept.txt").write_text("mine")
    with common.open_run(tmp_path / "run") as run:
        common.Stage(run, "sft", {}).run(Work())
        (run / "link").symlink_to(outside)
    with common.open_run(tmp_path / "run", fresh=True) as run:
        assert [entry.name for entry in run.iterdir()] == [".egjax-run"]
    assert (outside / "kept.txt").read_text() == "mine"


@pytest.mark.parametrize("fresh", [False, True])
def test_a_foreign_directory_is_refused(tmp_path, fresh):
    (tmp_path / "photo.png").write_text("mine")
    with pytest.raises(EgjaxError, match="no run of egjax"), common.open_run(tmp_path, fresh=fresh):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["photo.png"]
    with (
        pytest.raises(EgjaxError, match="not a directory"),
        common.open_run(tmp_path / "photo.png"),
    ):
        pass
