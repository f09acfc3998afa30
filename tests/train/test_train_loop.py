"""The loop: resume is exact, signals save, bad ends are told."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from train_toy import apply, batches, init

from egjax.errors import EgjaxError, NotFiniteError
from egjax.train import loop as loop_module
from egjax.train import progress as progress_module
from egjax.train.checkpoint import load_params, read_metadata, save_params
from egjax.train.loop import Work, fit
from egjax.train.objectives import next_token
from egjax.train.optim import OptimConfig, make_optimizer
from egjax.train.signals import StopFlag, stop_on_signals
from egjax.train.step import init_state, make_train_step

TX = make_optimizer(OptimConfig(learning_rate=0.03), 12)
STEP = make_train_step(next_token(apply), TX)


def run(directory=None, num_steps=12, **options):
    return fit(
        init_state(init(), TX),
        STEP,
        batches(),
        num_steps=num_steps,
        key=jax.random.key(5),
        directory=directory,
        log_every=1,
        **options,
    )


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def whole():
    return run()


def stop_after(step):
    flag = StopFlag()
    return {"stop": flag, "on_log": lambda done, _: flag.ask() if done == step else None}


@pytest.mark.parametrize("left_at", [1, 5, 11])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path, whole, left_at):
    first = run(tmp_path, **stop_after(left_at))
    # The flag is seen after the next step, which is saved.
    assert int(first.state.step) == left_at + 1
    assert first.finished == (left_at == 11)
    second = run(tmp_path)
    same(second.state, whole.state)
    assert second.finished
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["loss"] == whole.metrics["loss"]


def test_killed_run_goes_on_from_the_last_interval(tmp_path, whole):
    # Crash in step 8: of the checkpoints, one every third step, that of step 6 is the latest.
    def crash(done, _):
        if done == 8:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, save_every=6, on_log=crash)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3", "6"]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    seen = []
    resumed = run(tmp_path, save_every=6, on_log=lambda done, _: seen.append(done))
    assert seen == [7, 8, 9, 10, 11, 12]
    same(resumed.state, whole.state)
    steps = [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13))


def test_half_written_checkpoint_is_not_taken(tmp_path, whole):
    run(tmp_path, num_steps=6)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "6", folder / "9.orbax-checkpoint-tmp-1")
    shutil.rmtree(folder / "9.orbax-checkpoint-tmp-1" / "state")
    same(run(tmp_path).state, whole.state)


def test_intervals_of_no_step_are_told(tmp_path):
    for name in ("save_every", "log_every"):
        with pytest.raises(EgjaxError, match=f"{name} = 0 is less than 1"):
            fit(
                init_state(init(), TX),
                STEP,
                batches(),
                num_steps=2,
                key=jax.random.key(0),
                directory=tmp_path,
                **{name: 0},
            )
    assert not list(tmp_path.iterdir())


def test_finished_run_is_left_as_it_is(tmp_path, whole):
    run(tmp_path)
    again = run(tmp_path, on_log=lambda *_: pytest.fail("a step was run"))
    same(again.state, whole.state)
    assert again.finished


def test_damaged_or_foreign_checkpoints_are_told(tmp_path):
    run(tmp_path / "a", num_steps=2)
    for file in (tmp_path / "a" / "checkpoints" / "2" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"\0")
    with pytest.raises(EgjaxError, match="cannot be read"):
        run(tmp_path / "a")
    run(tmp_path / "b", num_steps=2)
    other = init_state({"embed": jnp.zeros((3, 3))}, TX)
    with pytest.raises(EgjaxError, match="checkpoint"):
        fit(other, STEP, batches(), num_steps=4, key=jax.random.key(0), directory=tmp_path / "b")


def test_without_a_damaged_checkpoint_the_run_goes_on_from_the_one_before(tmp_path, whole):
    run(tmp_path, num_steps=6, save_every=6)
    folder = tmp_path / "checkpoints"
    for file in (folder / "6" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"\0")
    said = rf"{folder}/6: .*delete this folder alone: then the run goes on from step 3\)"
    with pytest.raises(EgjaxError, match=said):
        run(tmp_path)
    shutil.rmtree(folder / "6")
    same(run(tmp_path).state, whole.state)


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_state(
    tmp_path, whole, log_every
):
    run(tmp_path, num_steps=4)
    data = batches()

    class Bad:
        """One batch that gives NaN, good ones before and after it."""

        def __next__(self):
            bad = data.get_state() == {"batches": 6}
            batch = next(data)
            return batch.replace(weights=batch.weights * np.nan) if bad else batch

        def get_state(self):
            return data.get_state()

        def set_state(self, state):
            data.set_state(state)

    with pytest.raises(NotFiniteError, match="loss is nan at step 7") as found:
        fit(
            init_state(init(), TX),
            STEP,
            Bad(),
            num_steps=12,
            key=jax.random.key(5),
            directory=tmp_path,
            log_every=log_every,
        )
    assert found.value.exit_code == 3
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "6"]
    # With the data mended the run goes on from the step before, as if nothing had happened.
    same(run(tmp_path).state, whole.state)


def test_a_resumed_run_keeps_its_key(tmp_path):
    def noisy(params, batch, key, frozen):
        return (params["w"] * jax.random.normal(key)).sum(), 1.0, {}

    step = make_train_step(noisy, TX)

    def go(directory, num_steps, seed):
        start = init_state({"w": jnp.ones(2)}, TX)
        key = jax.random.key(seed)
        return fit(start, step, batches(), num_steps=num_steps, key=key, directory=directory)

    want = go(None, 6, 1).state
    go(tmp_path, 3, 1)
    same(go(tmp_path, 6, 2).state, want)


def test_rates_are_logged(tmp_path, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(loop_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(loop_module, "progress", lambda *_: nullcontext(lambda *_: None))
    run(tmp_path, num_steps=2, work=lambda batch: Work(10.0, 500.0), peak=1000.0)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["tokens_per_second"] for line in lines] == [10.0, 10.0]
    assert [line["mfu"] for line in lines] == [0.5, 0.5]
    assert {"loss", "grad_norm", "param_norm", "update_norm"} <= lines[0].keys()


SIGNALLED = """
import sys, time
sys.path.insert(0, ".")
import test_train_loop as t
from egjax.train.signals import stop_on_signals

def slow(step, metrics):
    print(step, flush=True)
    time.sleep(0.1)

with stop_on_signals() as stop:
    result = t.run(sys.argv[1], num_steps=100000, save_every=100000, stop=stop, on_log=slow)
print("left", int(result.state.step), result.finished, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_leave_cleanly(tmp_path, request, number):
    process = subprocess.Popen(
        [sys.executable, "-c", SIGNALLED, str(tmp_path)],
        cwd=request.path.parent,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(request.config.rootpath)},
    )
    try:
        assert process.stdout.readline() == "1\n"
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    left, step, finished = out.splitlines()[-1].split()
    assert (process.returncode, left, finished) == (0, "left", "False")
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [step]


def test_a_second_signal_acts_as_before():
    # A job in a shell's background starts with SIGINT ignored.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stop_on_signals() as stop:
            assert not stop
            signal.raise_signal(signal.SIGINT)
            assert stop
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_without_a_terminal_a_line_now_and_then(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    with progress_module.progress("sft", 100, 20, out) as update:
        for done in range(21, 101):
            clock[0] += 0.5
            update(done, "loss 1.0")
    lines = out.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[0] == "sft 40/100 2.0/s 30 s left loss 1.0"


def test_on_a_terminal_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    with progress_module.progress("sft", 10, 0, out) as update:
        update(10, "loss 1.0")
    assert "10/10" in out.getvalue()
    assert "loss 1.0" in out.getvalue()


def test_parameters_and_metadata_come_back(tmp_path):
    params = {"a": {"w": jnp.arange(6.0).reshape(2, 3)}, "b": jnp.ones(3, jnp.bfloat16)}
    note = {"width": 3, "names": ["x", "y"]}
    save_params(tmp_path / "m", init(), {})
    save_params(tmp_path / "m", params, note)  # replaces
    for like in (None, params, jax.eval_shape(lambda: params)):
        got, metadata = load_params(tmp_path / "m", like)
        same(got, params)
        assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(lambda x: x.dtype, params)
        assert metadata == read_metadata(tmp_path / "m") == note


def test_unreadable_checkpoints_are_told(tmp_path):
    with pytest.raises(EgjaxError, match="no checkpoint"):
        load_params(tmp_path / "none")
    save_params(tmp_path / "m", init(), {"a": 1})
    wrong = {**init(), "embed": jnp.zeros((2, 2))}
    with pytest.raises(EgjaxError, match=r"m: .*\(13, 8\)"):
        load_params(tmp_path / "m", wrong)
    with pytest.raises(EgjaxError, match="cannot be read"):
        load_params(tmp_path / "m", {"embed": jnp.zeros((13, 8))})
    shutil.rmtree(tmp_path / "m" / "params")
    with pytest.raises(EgjaxError, match="cannot be read"):
        load_params(tmp_path / "m")
    (tmp_path / "m" / "metadata" / "metadata").write_text("{")
    with pytest.raises(EgjaxError, match="cannot be read"):
        load_params(tmp_path / "m")


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    save_params(tmp_path / "m", init(), {"a": 1})
    run(tmp_path / "run", num_steps=4)

    # What the array storage raises on a full disk, as observed.
    def full(*args, **options):
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [28]")

    monkeypatch.setattr(ocp.Checkpointer, "save", full)
    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(EgjaxError, match="cannot write: No space left on device"):
        save_params(tmp_path / "m", init(1), {"a": 2})
    with pytest.raises(EgjaxError, match="cannot write: No space left on device"):
        run(tmp_path / "run", num_steps=8)
    monkeypatch.undo()
    params, note = load_params(tmp_path / "m")
    same(params, init())
    assert note == {"a": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "run"]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["4"]


def test_a_stop_while_saving_leaves_the_older_parameters(tmp_path, monkeypatch):
    save_params(tmp_path / "m", init(), {"a": 1})

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(ocp.Checkpointer, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_params(tmp_path / "m", init(1), {"a": 2})
    monkeypatch.undo()
    assert load_params(tmp_path / "m")[1] == {"a": 1}
