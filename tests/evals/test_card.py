"""The data card: every number by hand on a few records."""

from __future__ import annotations

import dataclasses
import json

from egjax.evals.card import Facts, count, draw, markdown, write
from egjax.evals.manifest import describe
from egjax.experience.records import PreferencePair, Trajectory

WALK, GRAB, OPEN = "[WALK] <cup> (1)", "[GRAB] <cup> (1)", "[OPEN] <box> (2)"


def one(label: str, kind: str, *script: str, **more) -> Trajectory:
    values = {
        "task": "file1_1",
        "title": "Tidy",
        "split": "train",
        "script": script,
        "text": "",
        "label": label,
        "solved": label != "failed",
        "total_return": 0.0,
        "goals": "core",
        "seed": 3,
        "kind": kind,
        "wanted": ("ON(cup, box)", "OPEN(box)"),
        "rewards": (0.0,) * len(script),
        "values": tuple(float(i) for i in range(len(script))),
        "visits": (5, *[0] * (len(script) - 1)),
        "refusals": ("",) * len(script),
    }
    return Trajectory(**{**values, **more})


RECORDS = [
    one("positive", "tree", WALK, GRAB),
    one("positive", "best_first", OPEN, task="file2_1", title="Open"),
    one("redundant", "repeat", WALK, WALK, GRAB, OPEN),
    one("failed", "omission", GRAB, OPEN, refusals=("the cup is not near", "")),
    one("hindsight", "exploration", WALK, title="", wanted=("CLOSE(a, b)",)),
]
PAIRS = [PreferencePair("file1_1", "Q", "a", "b", kind) for kind in ("failed", "failed")]
FACTS = Facts(
    origin="nowhere",
    terms="none.",
    goals="core",
    tasks=4,
    solved=3,
    held_out=("Sleep",),
    shards=2,
    twice=6,
    manifest=describe(seeds=(3,)),
)


def test_counts_are_those_of_a_hand():
    numbers = count(FACTS, RECORDS, PAIRS)
    assert numbers["trajectories"] == {"positive": 2, "failed": 1, "redundant": 1, "hindsight": 1}
    assert numbers["solved_share"]["failed"] == 0
    assert numbers["kinds"]["positive"] == {"best_first": 1, "tree": 1}
    assert numbers["pairs"] == {"failed": 2}
    assert numbers["lengths"]["positive"]["mean"] == 1.5
    assert numbers["lengths"]["redundant"]["max"] == 4
    assert numbers["activities"] == {"Open": 1, "Tidy": 1}  # by task
    assert numbers["verbs"]["redundant"] == {"WALK": 2, "GRAB": 1, "OPEN": 1}
    assert numbers["wanted"] == {"ON": 2, "OPEN": 2}
    assert numbers["wanted_in_hindsight"] == {"CLOSE": 1}
    assert (numbers["steps"], numbers["steps_visited_by_the_tree"]) == (10, 5)
    assert (numbers["refused"], numbers["reasons"]) == (1, {"the cup is not near": 1})
    assert numbers["seeds"] == (3,)


def test_card_is_written_beside_its_pictures(tmp_path):
    path = write(FACTS, RECORDS, PAIRS, tmp_path)
    text = path.read_text()
    assert "5 trajectories and 2 preference pairs of 4 tasks, 3 of them solved" in text
    assert "| the cup is not near | 1 |" in text
    assert "Held out, in no record: Sleep." in text
    numbers = json.loads((tmp_path / "card.json").read_text())
    assert markdown(numbers, draw(RECORDS)) == text
    assert (numbers["origin"], numbers["twice"]) == ("nowhere", 6)
    for name in ("lengths", "kinds", "verbs", "values"):
        assert f"card/{name}.png" in text
        assert (tmp_path / "card" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_do_without_values_and_labels():
    bare = [dataclasses.replace(RECORDS[0], values=(), rewards=(), visits=(), refusals=())]
    assert set(draw(bare)) == {"lengths", "kinds", "verbs", "values"}
