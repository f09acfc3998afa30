"""Random kills of a job of several processes lose nothing beyond the interval, double no data.

`EGJAX_KILLS=30 python -m pytest -m slow -s tests/test_kills.py` (4, if it is not set) prints a line
a kill and what was lost at most. With a folder in `EGJAX_KILLS_AT` and `EGJAX_KILLS_SECONDS` it
leaves off after so long, and the same command goes on.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from processes import LOOK, codes, launch

from egjax import hosts
from egjax.experience.records import PreferencePair, Trajectory
from egjax.experience.tfds import read
from experiments.models import load

KILLS = int(os.environ.get("EGJAX_KILLS", "4"))
COUNT, EVERY = 2, 5
STEPS = 9 + 9 * KILLS  # few are struck before the training, and then one in some eight steps
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


def strike(run: Path, kill: int) -> dict[str, Any]:
    """Lets the job go on for a random while, sends a random signal to a random process."""
    rng = random.Random(kill)
    processes = start(run, kill)
    goal = progress(run) + rng.randint(1, 6)
    for _ in range(round(900 / LOOK)):
        if progress(run) >= goal or any(p.poll() is not None for p in processes):
            break
        time.sleep(LOOK)
    time.sleep(rng.random())
    number, victim = rng.choice([signal.SIGKILL, signal.SIGTERM]), rng.randrange(COUNT)
    early = [p.poll() for p in processes]
    processes[victim].send_signal(number)
    begun, left = time.monotonic(), codes(processes, 120)
    return {
        "signal": number.name,
        "victim": victim,
        "early": early,
        "codes": left,
        "seconds": round(time.monotonic() - begun, 1),
        "shards": shards(run),
        "begun": len(list(run.glob("collect_shards/*.unfinished"))),
        "step": (logged(run)[-1:] or [0])[0],
        "kept": STEPS if finished(run) else saved(run),
    }


@pytest.mark.slow
def test_random_kills_lose_little_and_double_nothing(tmp_path):
    folder = Path(os.environ.get("EGJAX_KILLS_AT") or tmp_path)
    undisturbed, run, record = folder / "undisturbed", folder / "run", folder / "kills.jsonl"
    if not finished(undisturbed):
        grown(undisturbed, 0)
    kills = [json.loads(x) for x in record.read_text().splitlines()] if record.exists() else []
    ends = time.monotonic() + float(os.environ.get("EGJAX_KILLS_SECONDS") or "inf")
    while len(kills) < KILLS and not finished(run):
        if time.monotonic() > ends:
            pytest.skip(f"{len(kills)} kills so far; the same command goes on")
        kills.append(strike(run, len(kills)))
        with record.open("a") as file:
            file.write(json.dumps(kills[-1]) + "\n")
        print(kills[-1], flush=True)
    for one in kills:
        if one["early"] != [None] * COUNT:
            continue  # it had ended by itself
        assert one["step"] - one["kept"] <= EVERY
        assert one["begun"] <= COUNT
        if one["codes"][one["victim"]] == -signal.SIGTERM:  # struck before Python heard signals
            continue  # the others name who is missing
        if one["signal"] == "SIGTERM":
            assert one["codes"] == [143] * COUNT, said(run)[-3000:]
            assert one["kept"] == one["step"]
        else:
            expected = [hosts.LOST] * COUNT
            expected[one["victim"]] = -signal.SIGKILL
            assert one["codes"] == expected, said(run)[-3000:]
    grown(run, 99)
    doubled = same(run, undisturbed)
    print(
        f"{len(kills)} kills ({sum(k['signal'] == 'SIGKILL' for k in kills)} SIGKILL): "
        f"{max(k['step'] - k['kept'] for k in kills)} steps lost at most (saved every {EVERY}), "
        f"{max(k['begun'] for k in kills)} shards begun anew at most, {doubled} records doubled, "
        f"all processes gone after {max(k['seconds'] for k in kills):.0f} s at most"
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
