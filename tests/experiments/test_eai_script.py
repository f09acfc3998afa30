from __future__ import annotations

import json
import re

import pytest

from egjax.errors import EgjaxError
from experiments.eai import Config, export, main


def test_a_plan_in_the_words_of_the_official_command():
    steps = [
        "[WALK] <couch> (352)",
        "[SLEEP]",
        "[PUTIN] <cup> (3) <fridge> (4)",
        "[WALK] <cup> (3)",
    ]
    text = export(steps)
    assert text == (
        '{"WALK": ["couch", "352"], "SLEEP": [ ], "PUTIN": ["cup", "3", "fridge", "4"], '
        '"WALK": ["cup", "3"]}'
    )
    # The command's reader keeps order and repetitions; it knows no empty list without a blank.
    entries = re.findall(r'"(\w+)"\s*:\s*(\[[^\]]+\])', text)
    assert [verb for verb, _ in entries] == ["WALK", "SLEEP", "PUTIN", "WALK"]
    assert [len(json.loads(words)) for _, words in entries] == [2, 0, 4, 2]


def test_without_the_evaluator_its_making_is_told(tmp_path):
    with pytest.raises(EgjaxError, match=r"eai-eval==1\.0\.5"):
        main(Config(out=tmp_path / "out"))
    with pytest.raises(EgjaxError, match="no such interpreter"):
        main(Config(judge=tmp_path / "python", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
