"""Intervals against closed forms, and what pairing and clustering must do."""

import json
import math

import numpy as np
import pytest

from egjax.evals import intervals
from egjax.evals.intervals import Figure, bootstrap, measure, paired


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson 1927, formula by hand."""
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return centre - half, centre + half


@pytest.mark.parametrize(("successes", "n"), [(50, 100), (30, 200), (280, 400)])
def test_agrees_with_wilson_on_proportions(successes, n):
    found = bootstrap(np.arange(n) < successes, seed=0)
    low, high = wilson(successes, n)
    assert found.value == successes / n
    assert found.low == pytest.approx(low, abs=1.2 / n + 0.005)
    assert found.high == pytest.approx(high, abs=1.2 / n + 0.005)


def test_agrees_with_the_normal_interval_of_a_mean():
    values = np.random.default_rng(1).normal(3.0, 2.0, 900)
    found = bootstrap(values, seed=0)
    half = 1.96 * values.std() / 30
    assert found.high - found.value == pytest.approx(half, rel=0.05)
    assert found.value - found.low == pytest.approx(half, rel=0.05)


def test_covers_as_often_as_it_says():
    rng = np.random.default_rng(2)
    hits = 0
    for seed in range(300):
        found = bootstrap(rng.random(60) < 0.4, seed=seed, resamples=600)
        hits += found.low <= 0.4 <= found.high
    assert 0.90 <= hits / 300 <= 0.98


def test_same_seed_same_interval_however_the_memory_is_cut(monkeypatch):
    values = np.random.default_rng(3).random(50)
    whole = bootstrap(values, seed=7)
    monkeypatch.setattr(intervals, "_BLOCK", 700)
    assert bootstrap(values, seed=7) == whole
    assert bootstrap(values, seed=8) != whole


def test_repeating_an_item_within_its_cluster_adds_nothing():
    values = np.random.default_rng(4).random(40)
    once = bootstrap(values, seed=0)
    thrice = bootstrap(np.repeat(values, 3), seed=0, clusters=[i // 3 for i in range(120)])
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high))
    assert thrice.n == 120
    alone = bootstrap(np.repeat(values, 3), seed=0)
    assert alone.high - alone.low < 0.7 * (once.high - once.low)


def test_all_successes_do_not_look_certain():
    """Clopper and Pearson's bound for 12 of 12: 0.025^(1/12) = 0.7354."""
    found = bootstrap(np.ones(12, bool), seed=0)
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.7354, abs=1e-4)
    assert bootstrap(np.zeros(12, bool), seed=0).high == pytest.approx(0.2646, abs=1e-4)


def test_one_cluster_says_nothing_about_spread():
    figure = measure("x", [0.1, 0.9], "fraction", seed=0, clusters=["a", "a"])
    assert figure.low is None
    assert figure.high is None


def test_pairing_takes_out_how_hard_the_items_are():
    rng = np.random.default_rng(5)
    hard = rng.normal(0, 10, 80)
    ours, theirs = hard + rng.normal(1, 1, 80), hard + rng.normal(0, 1, 80)
    found = paired(ours, theirs, seed=0)
    assert found.low > 0
    assert found.value == pytest.approx(ours.mean() - theirs.mean())
    apart = bootstrap(ours, seed=0)
    assert apart.high - apart.low > 5 * (found.high - found.low)


def test_swapping_the_two_systems_mirrors_the_interval():
    rng = np.random.default_rng(6)
    a, b = rng.random(30), rng.random(30)
    forth, back = paired(a, b, seed=0), paired(b, a, seed=0)
    assert (forth.low, forth.high) == pytest.approx((-back.high, -back.low))


def test_equal_systems_are_not_told_apart():
    won = np.arange(20) % 3 == 0
    found = paired(won, won, seed=0)
    assert found.low < found.value == 0 < found.high


@pytest.mark.parametrize("values", [[], [[1.0]]])
def test_refuses_what_is_no_list_of_numbers(values):
    with pytest.raises(ValueError, match="at least one"):
        bootstrap(values, seed=0)


def test_refuses_unequal_lengths():
    with pytest.raises(ValueError, match="shape"):
        paired([1, 2], [1], seed=0)
    with pytest.raises(ValueError, match="cluster labels"):
        bootstrap([1, 2], seed=0, clusters=["a"])


def test_line_is_json_with_the_fixed_names():
    figure = Figure("speed", 50.0, "steps/s", 4, peer="other", peer_value=20.0)
    assert json.loads(figure.line()) == {
        "name": "speed", "value": 50.0, "unit": "steps/s", "n": 4,
        "peer": "other", "peer_value": 20.0, "ratio": 2.5,
    }  # fmt: skip
    assert json.loads(Figure("x", math.nan, "s", 0).line())["value"] is None
    assert Figure("x", 1.0, "s", 1, peer="p", peer_value=0.0).ratio is None
