"""The benchmark of decoding, small: every row, and what holds at any size."""

import dataclasses
import json

import pytest

from egjax.errors import EgjaxError
from experiments.bench_decode import Config, main

SMALL = Config(
    large="tiny", small="tiny", prompt=8, tokens=40, drafts=3, repeats=1, rows=2, json=True
)


def test_models_agree_and_contradict_as_said(capsys):
    main(SMALL)  # refuses speculation that decodes other tokens
    rows = {row["name"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    kept = [rows[f"decode_accepted/{name}"]["value"] for name in ("agree", "half", "never")]
    assert kept[0] > 0.9
    assert 0.1 < kept[1] < 0.9
    assert kept[2] == 0
    assert rows["decode_round_cost/agree"]["value"] > 0
    for name in ("agree", "half", "never"):
        assert rows[f"decode_speed/{name}"]["peer"] == "plain loop"
        ratio = rows[f"decode_ratio/{name}"]
        assert ratio["low"] <= ratio["value"] <= ratio["high"]
        assert rows[f"decode_cpu_ratio/{name}"]["value"] > 0
        # 2 layers: 4 · 32² attention (half of the keys and values) + 3 · 32 · 64 and two norms.
        layer = 3 * 32 * 32 + 3 * 32 * 64 + 2 * 32
        # The embedding is looked up in, the unembedding multiplied with.
        weights = 3 * (2 * layer + 256 * 32 + 32) * 4
        assert rows[f"decode_weight_bytes/{name}"]["value"] == weights
        assert rows[f"decode_cache_bytes/{name}"]["value"] == 3 * 2 * (8 + 20) * 2 * 2 * 16 * 4


def test_layers_apart_decode_alike(capsys):
    main(dataclasses.replace(SMALL, cases=("half",), layers="apart"))
    apart = {row["name"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    main(dataclasses.replace(SMALL, cases=("half",)))
    stacked = {row["name"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    name = "decode_accepted/half"
    assert apart[name]["value"] == stacked[name]["value"]


def test_bad_options_are_told():
    with pytest.raises(EgjaxError, match="no case always"):
        main(dataclasses.replace(SMALL, cases=("always",)))
    with pytest.raises(EgjaxError, match="vocabularies of 4m and tiny differ"):
        main(dataclasses.replace(SMALL, large="4m"))
