"""Runs that are killed, stopped or moved to other devices go on as if nothing had happened.

Most of it takes minutes: `make test-slow`. EGJAX_KILLS is how often a run is killed, 20 by default.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from processes import cpus
from train_toy import apply, batches, init

from egjax.errors import EgjaxError
from egjax.train.loop import fit
from egjax.train.objectives import next_token
from egjax.train.optim import OptimConfig, make_optimizer
from egjax.train.step import init_state, make_train_step

KILLS = int(os.environ.get("EGJAX_KILLS", "20"))
EVERY, LAST, LONGEST = 4, 1000, 15

VICTIM = """
import hashlib, sys, time
sys.path.insert(0, ".")
import jax, numpy as np
from train_toy import apply, batches, init
from egjax.train.loop import fit
from egjax.train.objectives import next_token
from egjax.train.optim import OptimConfig, make_optimizer
from egjax.train.signals import stop_on_signals
from egjax.train.step import init_state, make_train_step

def log(step, metrics):
    print(step, flush=True)
    time.sleep(0.01)

tx = make_optimizer(OptimConfig(learning_rate=0.01), {last})
with stop_on_signals() as stop:
    result = fit(init_state(init(), tx), make_train_step(next_token(apply), tx), batches(),
                 num_steps=int(sys.argv[2]), key=jax.random.key(0), directory=sys.argv[1],
                 save_every={every}, log_every=1, on_log=log, stop=stop)
digest = hashlib.sha256()
for leaf in jax.tree.leaves(result.state):
    digest.update(np.asarray(leaf).tobytes())
print("left", int(result.state.step), digest.hexdigest(), flush=True)
""".replace("{every}", str(EVERY)).replace("{last}", str(LAST))


@pytest.mark.parametrize("every", [1, 2, 5])
def test_however_slow_the_disk_no_more_steps_are_lost_than_promised(tmp_path, monkeypatch, every):
    """At each step, what a kill would lose: the steps after the last whole checkpoint."""
    write = ocp.StandardCheckpointHandler.async_save

    class Late:
        def __init__(self, future):
            self._future = future

        def result(self, timeout=None):
            time.sleep(0.1)  # as long as many steps
            return self._future.result(timeout)

    async def late(self, *args, **options):
        return [Late(future) for future in await write(self, *args, **options) or []]

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "async_save", late)
    tx = make_optimizer(OptimConfig(learning_rate=0.01), 12)
    lost = []

    def count(done, _):
        lost.append(done - max(whole_checkpoints(tmp_path), default=0))

    fit(
        init_state(init(), tx),
        make_train_step(next_token(apply), tx),
        batches(),
        num_steps=12,
        key=jax.random.key(0),
        directory=tmp_path,
        save_every=every,
        log_every=1,
        on_log=count,
    )
    assert len(lost) == 12
    assert max(lost) == every  # the disk is slow enough for the bound to be reached


def start(request, directory, steps):
    return subprocess.Popen(
        [sys.executable, "-c", VICTIM, str(directory), str(steps)],
        cwd=request.path.parent,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(request.config.rootpath)},
    )


def whole_checkpoints(directory):
    found = (path.name for path in (directory / "checkpoints").iterdir())
    return sorted(int(name) for name in found if name.isdigit())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_struck_again_and_again_ends_like_one_that_is_not(tmp_path, request, number):
    rng, run, lost = random.Random(0), tmp_path / "run", []
    resumes_at = halves = 0
    for _ in range(KILLS):
        process = start(request, run, LAST)
        seen = [int(process.stdout.readline())]
        assert seen[0] == resumes_at + 1
        steps = rng.randint(1, LONGEST)
        while len(seen) < steps:
            seen.append(int(process.stdout.readline()))
        # Somewhere in a step, or while a checkpoint is written.
        time.sleep(rng.random() * 0.05)
        process.send_signal(number)
        rest = process.communicate(timeout=120)[0].splitlines()
        seen += [int(line) for line in rest if line.isdigit()]
        if number == signal.SIGTERM:
            left, step, _ = rest[-1].split()
            assert (process.returncode, left) == (0, "left")
            resumes_at = int(step)
        else:
            assert process.returncode == -number
            resumes_at = max(whole_checkpoints(run), default=resumes_at)
            halves += any(not p.name.isdigit() for p in (run / "checkpoints").iterdir())
        lost.append(seen[-1] - resumes_at)
    print(f"{number.name}: {KILLS} times, {halves} of them left a checkpoint half-written")
    print(f"steps lost each time, at most {EVERY} allowed: {lost}")
    assert max(lost) <= (0 if number == signal.SIGTERM else EVERY)
    # The next process would have stumbled over one that was taken.
    assert halves > 0 or number == signal.SIGTERM
    last = resumes_at + 5
    ends = [
        start(request, folder, last).communicate()[0].split() for folder in (run, tmp_path / "x")
    ]
    assert ends[0][-3:] == ends[1][-3:]
    assert ends[0][-2] == str(last)


MOVED = """
import hashlib, sys
import jax, numpy as np
from egjax.lm.config import LlamaConfig
from egjax.lm.model import forward
from egjax.lm.params import init, shardings
from egjax.mesh import batch_sharding, make_mesh
from egjax.train.data import Sample, Shuffled, pack
from egjax.train.loop import fit
from egjax.train.objectives import next_token
from egjax.train.optim import OptimConfig, make_optimizer
from egjax.train.step import init_state, make_train_step, state_shardings

config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=2,
                     num_heads=4, num_kv_heads=2, head_dim=8)
rng = np.random.default_rng(0)
table = pack([Sample(rng.integers(0, 64, 17).tolist(), [True] * 17) for _ in range(64)], 16)
mesh = make_mesh(model=min(2, jax.device_count()))
tx = make_optimizer(OptimConfig(learning_rate=1e-3), 30)
params = init(jax.random.key(0), config, mesh)
places = state_shardings(tx, params, shardings(config, mesh), mesh)
apply = lambda params, *rows: forward(params, config, *rows)
step = make_train_step(next_token(apply), tx, shardings=places, batch_sharding=batch_sharding(mesh))

def go(num_steps):
    return fit(init_state(params, tx, places), step, Shuffled(table, 8, 0), num_steps=num_steps,
               key=jax.random.key(0), directory=sys.argv[1], log_every=1).state

state = go(10)
split = [x for x in jax.tree.leaves(state) if not x.sharding.is_fully_replicated]
digest = hashlib.sha256()
for leaf in jax.tree.leaves(state):
    digest.update(np.asarray(leaf).tobytes())
print(len(split), digest.hexdigest())
if len(sys.argv) > 2:
    go(30)
"""


@pytest.mark.slow
def test_on_other_devices_the_state_is_the_same_and_the_loss_to_a_hundred_thousandth(
    tmp_path, request
):
    def run(devices, folder, *more):
        return subprocess.run(
            [sys.executable, "-c", MOVED, str(folder), *more],
            capture_output=True,
            text=True,
            check=True,
            env={
                **os.environ,
                **cpus(devices),
                "PYTHONPATH": str(request.config.rootpath),
            },
        ).stdout.split()

    split, want = run(8, tmp_path / "8")
    assert int(split) > 20
    curves = []
    for devices in (8, 2, 1):
        folder = tmp_path / f"on {devices}"
        shutil.copytree(tmp_path / "8", folder)
        split, found = run(devices, folder, "on")
        assert found == want
        assert (int(split) > 0) == (devices > 1)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        curves.append([json.loads(line)["loss"] for line in lines])
    assert len(curves[0]) == 30
    assert curves[0][-1] < curves[0][10]
    np.testing.assert_allclose(curves[1:], [curves[0]] * 2, rtol=1e-5)


def test_a_disk_that_fills_up_is_an_error_and_leaves_whole_checkpoints(tmp_path):
    """With a bound on the size of files as the disk: the array storage itself fails."""
    tx = make_optimizer(OptimConfig(learning_rate=0.01), 8)

    def loss(params, batch, key, frozen):
        return (params["w"] ** 2).sum(), 1.0, {}

    step = make_train_step(loss, tx)

    def run(num_steps, directory=tmp_path, on_log=lambda *_: None):
        state = init_state({"w": jax.random.normal(jax.random.key(0), (200, 200))}, tx)
        key = jax.random.key(0)
        return fit(
            state,
            step,
            batches(),
            num_steps=num_steps,
            key=key,
            directory=directory,
            save_every=4,  # one is begun every second step
            log_every=1,
            on_log=on_log,
        )

    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(done, _):
        if done == 5:
            deadline = time.monotonic() + 60
            while whole_checkpoints(tmp_path)[-1] < 4 and time.monotonic() < deadline:
                time.sleep(0.05)  # it is written beside the training
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

    try:
        with pytest.raises(EgjaxError, match="cannot write: ") as found:
            run(8, on_log=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(tmp_path) in str(found.value)
    assert whole_checkpoints(tmp_path) == [2, 4]
    resumed = run(8)
    jax.tree.map(np.testing.assert_array_equal, resumed.state, run(8, None).state)
    assert whole_checkpoints(tmp_path) == [6, 8]
    assert not [p for p in Path(tmp_path / "checkpoints").iterdir() if not p.name.isdigit()]
