"""The whole pipeline, tiny: several processes find what one finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.models import load

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from processes import ROOT, codes, launch

# Most of the time is compilation, by every process anew. These kernels take half as long to make
# and half as much again to run; jaxlib knows the flag up to 0.10.
QUICK = "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""
COMMAND = ["-m", "experiments.pipeline", "--preset", "tiny", "--run"]
# A sum over processes has another order. Adam divides a gradient by its own size, so where one is
# next to nothing its rounding becomes a whole step: a weight may differ by as much as it was moved,
# at the rate of 1e-3 and over two steps of each stage.
WEIGHTS = {"typical": 1e-6, "most": 2e-3}  # of the median and of the largest difference
LOSSES = 5e-5  # relative


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("one") / "run"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    begun = time.monotonic()
    done = subprocess.run([sys.executable, *COMMAND, run], cwd=ROOT, env=environment)
    print(f"alone: {time.monotonic() - begun:.0f} s")
    assert done.returncode == 0
    return run


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_find_what_one_finds(alone, tmp_path, count):
    run = tmp_path / "run"
    flags = f"--xla_force_host_platform_device_count=1 {QUICK}"
    begun = time.monotonic()
    processes = launch([*COMMAND, str(run)], count, logs=tmp_path / "logs", XLA_FLAGS=flags)
    ended = codes(processes, 1800)
    print(f"{count} processes: {time.monotonic() - begun:.0f} s")  # shown by -rP; two minutes
    assert ended == [0] * count, [p.read_text()[-3000:] for p in tmp_path.glob("logs/*.err")]
    assert not any((tmp_path / "logs" / f"{i}.out").read_text() for i in range(1, count))
    agree(alone, run)


def agree(one: Path, many: Path) -> None:
    """Raises unless the runs have the same outputs: host work exactly, training within rounding."""
    for name in (
        "tasks/tasks.json",
        "text/general.jsonl",
        "text/samples.jsonl",
        "text/pairs.jsonl",
    ):
        assert (one / name).read_text() == (many / name).read_text(), name
    assert searched(one) == searched(many)
    for model in sorted(one.glob("seed0/*/model")):
        stage = model.parent.name
        ours, theirs = (load(run / "seed0" / stage / "model").params for run in (many, one))
        pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
        apart = np.concatenate([np.abs(np.asarray(a) - np.asarray(b)).ravel() for a, b in pairs])
        assert np.median(apart) <= WEIGHTS["typical"], stage
        assert apart.max() <= WEIGHTS["most"], stage
        lines = [read(run / "seed0" / stage / "metrics.jsonl") for run in (many, one)]
        for a, b in zip(*lines, strict=True):
            assert a["step"] == b["step"]
            np.testing.assert_allclose(a["loss"], b["loss"], rtol=LOSSES, err_msg=stage)
    ours, theirs = (
        json.loads((run / "seed0" / "evaluate" / "outcomes.json").read_text())
        for run in (many, one)
    )
    assert ours["questions"].keys() == theirs["questions"].keys()
    for name, rows in theirs["plans"].items():
        same = [a["solved"] == b["solved"] for a, b in zip(ours["plans"][name], rows, strict=True)]
        assert all(same), name
    assert (many / "report" / "report.html").exists()


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def searched(run: Path) -> list[dict]:
    """What the search found, without the time that it took."""
    rows = json.loads((run / "collect" / "search.json").read_text())["tasks"]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
