"""Random kills of a job of several processes lose nothing beyond the interval, double no data.

`EGJAX_KILLS=30 python -m pytest -m slow -s tests/test_kills.py` (4, if it is not set) prints a line
a kill and what was lost at most.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import LOOK, codes, launch

from egjax import hosts
from egjax.experience.records import PreferencePair, Trajectory
from egjax.experience.tfds import read
from experiments.models import load

KILLS = int(os.environ.get("EGJAX_KILLS", "4"))
COUNT, EVERY, STEPS = 2, 5, 99
TRAINING = "seed0/pretrain_small"


def start(run: Path, sitting: int) -> list:
    logs = run.with_suffix(".logs") / f"{sitting:02d}"
    command = ["tests/job_grow.py", "--run", str(run), "--save-every", str(EVERY)]
    return launch([*command, "--steps", str(STEPS)], COUNT, logs=logs, EGJAX_SILENCE="5")


def said(run: Path) -> str:
    return "".join(p.read_text() for p in sorted(run.with_suffix(".logs").glob("*/*.err")))


def shards(run: Path) -> int:
    """Finished ones."""
    found = run.glob("collect_shards/*/.stage.json")
    return sum(not p.parent.name.endswith(".unfinished") for p in found)


def logged(run: Path) -> list[int]:
    """Steps in the log, in the order of its lines."""
    found = [run / f"{TRAINING}{end}" / "metrics.jsonl" for end in ("", ".unfinished")]
    text = next((p.read_text() for p in found if p.exists()), "")
    return [json.loads(line)["step"] for line in text.splitlines() if line.endswith("}")]


def saved(run: Path) -> int:
    """Step of the latest whole checkpoint."""
    found = run.glob(f"{TRAINING}.unfinished/checkpoints/*")
    return max((int(p.name) for p in found if p.name.isdecimal()), default=0)


def progress(run: Path) -> int:
    return shards(run) + (logged(run)[-1:] or [0])[0]


def finished(run: Path) -> bool:
    return (run / TRAINING).exists()


def grown(run: Path, sitting: int) -> None:
    """Runs to the end, undisturbed."""
    assert codes(start(run, sitting), 1200) == [0] * COUNT, said(run)[-3000:]


@pytest.mark.slow
def test_random_kills_lose_little_and_double_nothing(tmp_path):
    rng = random.Random(0)
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    grown(undisturbed, 0)
    lost, redone, waits = [0], [0], [0.0]
    for kill in range(KILLS):
        processes = start(run, kill)
        goal = max(progress(run), saved(run) + shards(run)) + rng.randint(1, 6)
        if finished(run):
            goal = 0  # nothing is left to be done: no more to be lost either
        for _ in range(round(900 / LOOK)):
            if progress(run) >= goal or any(p.poll() is not None for p in processes):
                break
            time.sleep(LOOK)
        time.sleep(rng.random())
        number = rng.choice([signal.SIGKILL, signal.SIGTERM])
        victim = rng.randrange(COUNT)
        processes[victim].send_signal(number)
        begun, left = time.monotonic(), codes(processes, 120)
        waits.append(time.monotonic() - begun)
        seen, kept = (logged(run)[-1:] or [0])[0], STEPS if finished(run) else saved(run)
        lost.append(max(seen - kept, 0))
        begun_shards = len(list(run.glob("collect_shards/*.unfinished")))
        redone.append(begun_shards)
        print(
            f"kill {kill + 1}: {number.name} to process {victim}, exit codes {left}, "
            f"all gone after {waits[-1]:.1f} s; {shards(run)} shards whole, {begun_shards} begun; "
            f"step {seen}, saved {kept}",
            flush=True,
        )
        if number == signal.SIGTERM:
            assert left == [143] * COUNT, said(run)[-3000:]
            assert lost[-1] == 0
        else:
            expected = [hosts.LOST] * COUNT
            expected[victim] = -signal.SIGKILL
            assert left == expected, said(run)[-3000:]
        # The save of the last interval may have been on its way to the disk.
        assert lost[-1] < 2 * EVERY
        assert begun_shards <= COUNT
    grown(run, KILLS)
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
    doubled = same(run, undisturbed)
    print(
        f"{KILLS} kills: {max(lost)} steps lost at most (saved every {EVERY}), "
        f"{max(redone)} shards begun anew at most, {doubled} records doubled, "
        f"{max(waits):.0f} s until all were gone at most, {cpu.ru_utime + cpu.ru_stime:.0f} CPU-s"
    )


def same(run: Path, undisturbed: Path) -> int:
    """Raises unless both have the same records, texts, steps and weights; how many are doubled."""
    assert logged(run) == list(range(1, STEPS + 1))
    done = Counter(re.findall(r"collect_shards/(\d+): done", said(run)))
    assert set(done.values()) <= {1}, done  # a whole shard is never done again
    doubled = 0
    for kind in (Trajectory, PreferencePair):
        ours, theirs = (list(read(kind, r / "collect" / "experience")) for r in (run, undisturbed))
        assert ours == theirs
        doubled += len(ours) - len(set(ours))
    assert doubled == 0
    for name in ("general.jsonl", "samples.jsonl", "pairs.jsonl"):
        assert (run / "text" / name).read_bytes() == (undisturbed / "text" / name).read_bytes()
    ours, theirs = (
        jax.tree.leaves(load(r / TRAINING / "model").params) for r in (run, undisturbed)
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
    return doubled
