import json
import subprocess
import sys

import pytest

from egjax.errors import EgjaxError
from egjax.experience.records import (
    PreferencePair,
    Sample,
    Trajectory,
    distinct,
    from_flat,
    to_flat,
)


def trajectory(**changes) -> Trajectory:
    values = {
        "task": "file1_1",
        "title": "Mettre la table · für Gäste",
        "split": "train",
        "script": ("[WALK] <kitchen> (11)", "[GRAB] <cup> (12)"),
        "text": "Walk to kitchen. Grab cup.",
        "label": "positive",
        "solved": True,
        "total_return": 1.9000000000000001,
        "goals": "core",
        "seed": 2**40,
        "kind": "tree",
        "wanted": ("HOLDS_RH(character, cup)",),
        "rewards": (-0.1, 2.0),
        "values": (1.9, 2.0),
        "visits": (3, 2**40),
        "refusals": ("", "the cup is not near"),
    }
    return Trajectory(**(values | changes))


def pair(**changes) -> PreferencePair:
    values = {
        "task": "file1_1",
        "prompt": "Q: How to set up table?\nA:",
        "chosen": "Walk to kitchen. Grab cup.",
        "rejected": "Walk to kitchen.",
        "kind": "failed",
    }
    return PreferencePair(**(values | changes))


BARE = {name: () for name in ("wanted", "rewards", "values", "visits", "refusals")}


@pytest.mark.parametrize(
    "record",
    [
        trajectory(),
        trajectory(kind="", **BARE),
        trajectory(script=(), solved=False, **BARE),
        trajectory(refusals=("", "")),
        pair(),
    ],
)
def test_flat_round_trip(record):
    flat = to_flat(record)
    assert all(isinstance(value, str | bool | int | float | list) for value in flat.values())
    assert from_flat(type(record), json.loads(json.dumps(flat))) == record
    assert from_flat(type(record), flat) == record
    as_read = {k: v.encode() if isinstance(v, str) else v for k, v in flat.items()}
    assert from_flat(type(record), as_read) == record


def test_values_are_checked():
    with pytest.raises(EgjaxError, match="positive, failed, redundant"):
        trajectory(label="good")
    with pytest.raises(EgjaxError, match="line break"):
        trajectory(script=("[WALK] <a> (1)\n[WALK] <b> (2)",))
    with pytest.raises(EgjaxError, match="omission"):
        trajectory(label="failed", kind="tree")
    with pytest.raises(EgjaxError, match="1 values for 2 steps"):
        trajectory(visits=(1,))
    with pytest.raises(EgjaxError, match="choices"):
        Sample("counting", "Q?\nA:", "3", ("1", "2"))
    with pytest.raises(EgjaxError, match="expected"):
        from_flat(PreferencePair, {"task": "x"})


def test_equal_trajectories_of_a_task_are_kept_once():
    same, other = trajectory(seed=1), trajectory(script=("[SLEEP]", "[WAKEUP]"))
    elsewhere, goal = trajectory(task="file2_1"), trajectory(wanted=("OPEN(cup)",))
    kept = distinct([trajectory(), same, other, elsewhere, goal, other])
    assert kept == [trajectory(), other, elsewhere, goal]


def test_disk_round_trip_order_and_random_access(tmp_path):
    from egjax.experience.tfds import read, splits, write

    records = [trajectory(task=f"file{i}_1", seed=i) for i in range(23)]
    records[5] = trajectory(task="file5_1", seed=5, kind="", **BARE)
    records += [
        trajectory(task=f"held{i}_1", split="unseen", label="failed", kind="order")
        for i in range(3)
    ]
    write(records, tmp_path)
    pairs = [pair(chosen=f"Grab cup. {i}") for i in range(7)]
    write(pairs, tmp_path)

    assert splits(Trajectory, tmp_path) == {"train": 23, "unseen": 3}
    source = read(Trajectory, tmp_path, "train")
    assert [source[i] for i in range(len(source))] == records[:23]
    assert source[17] == records[17]
    assert read(Trajectory, tmp_path, "unseen")[2] == records[25]
    assert list(read(PreferencePair, tmp_path)) == pairs
    assert len(read(PreferencePair, tmp_path, "train[:3]")) == 3

    write(records[:2], tmp_path)  # replaces, and leaves nothing else behind
    assert list(read(Trajectory, tmp_path)) == records[:2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["preference_pairs", "trajectories"]


def test_bad_requests_say_so(tmp_path):
    from egjax.experience.tfds import read, write

    with pytest.raises(EgjaxError, match="no stored Trajectory"):
        read(Trajectory, tmp_path)
    with pytest.raises(EgjaxError, match="no records"):
        write([], tmp_path)
    write([trajectory()], tmp_path)
    with pytest.raises(EgjaxError, match="there are train"):
        read(Trajectory, tmp_path, "test")
    with pytest.raises(EgjaxError, match="split name"):
        write([trajectory(split="not a name")], tmp_path)
    assert list(read(Trajectory, tmp_path)) == [trajectory()]


def test_grain_reads_it_and_tensorflow_is_never_imported(tmp_path):
    # A decoy package stands in for an installed TensorFlow and stops whoever imports it.
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise SystemExit('tensorflow!')")
    script = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from egjax.experience.records import Trajectory
from egjax.experience.tfds import read, write
import grain
records = [Trajectory(f"t{{i}}", "Work", "train", ("[SLEEP]",), "Sleep.", "failed", False,
                      -0.1, "core", i) for i in range(10)]
write(records, {str(tmp_path / "data")!r})
source = read(Trajectory, {str(tmp_path / "data")!r})
data = grain.MapDataset.source(source).shuffle(seed=1).map(lambda r: r.seed).batch(5)
seen = [int(x) for batch in data for x in batch]
assert sorted(seen) == list(range(10)) and seen != sorted(seen), seen
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
