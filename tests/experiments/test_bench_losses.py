"""The benchmark of losses, small: every row, and what holds at any size."""

import dataclasses
import json

import pytest

from egjax.errors import EgjaxError
from egjax.losses.blocks import moves_bits
from experiments.bench_losses import Config, main

SMALL = Config(
    losses=("sft", "dpo", "reverse_kl_ratio_clipped"),
    tokens=256,
    width=16,
    vocabulary=600,
    chunk=8,
    repeats=1,
    json=True,
)


def test_rows_of_both_forms(capsys):
    main(SMALL)
    rows = {row["name"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    for name in SMALL.losses:
        assert rows[f"loss_gradient_error/{name}"]["value"] < 1e-5
        for kind in ("loss_time", "loss_temp_memory"):
            row = rows[f"{kind}/{name}"]
            assert row["peer"] == "naive"
            assert row["ratio"] == pytest.approx(row["value"] / row["peer_value"])
        assert rows[f"loss_temp_memory/{name}"]["ratio"] < 1


def test_full_size_memory_is_a_twentieth_at_most_without_running(capsys):
    names = ("sft", "dpo", "jsd", "reverse_kl_ratio_clipped")
    main(Config(losses=names, memory_only=True, json=True))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows] == [f"loss_temp_memory/{name}" for name in names]
    assert max(row["ratio"] for row in rows) <= 1 / 20


def test_bfloat16_takes_the_bits_of_the_gradient_and_nothing_in_float32(capsys):
    main(
        Config(losses=("reverse_kl_ratio_clipped",), dtype="bfloat16", memory_only=True, json=True)
    )
    raw, *beside = map(json.loads, capsys.readouterr().out.splitlines())
    if not moves_bits():
        gradient = 2048 * 128_256 * 2 / 2**20
        assert raw["value"] - beside[0]["value"] == pytest.approx(gradient)
        raw = beside.pop()
    assert raw["ratio"] <= 1 / 20
    assert not beside


def test_bad_options_are_told():
    with pytest.raises(EgjaxError, match="no loss named cross_entropy"):
        main(dataclasses.replace(SMALL, losses=("cross_entropy",)))
    with pytest.raises(EgjaxError, match="100 tokens"):
        main(dataclasses.replace(SMALL, tokens=100))
