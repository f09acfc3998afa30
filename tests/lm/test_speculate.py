"""Speculation changes how fast tokens come, never which: against plain decoding and chi-square."""

import dataclasses
import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egjax.errors import EgjaxError
from egjax.lm.config import LlamaConfig
from egjax.lm.generate import first, generate, pad_prompts
from egjax.lm.model import forward
from egjax.lm.ratio import ratio_combine
from egjax.lm.speculate import _speculate, round_cost, speculate

ROWS = 2048
KEY = jax.random.key(3)
read = jax.jit(forward, static_argnames="config")
PROMPTS = [[3, 9, 4], [8], [5, 6, 7, 8, 9, 10, 11]]
RATIO = ratio_combine(alpha=0.5)
TINY = LlamaConfig(
    vocab_size=4,
    hidden_size=8,
    intermediate_size=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    max_seq_len=16,
    eos_ids=(3,),
    pad_id=0,
)


@pytest.fixture(scope="module")
def three(config, make_params):
    """A large model, an expert that often agrees with it, and an anti-expert."""
    config = dataclasses.replace(config, eos_ids=(7,), num_layers=2)
    shallow = dataclasses.replace(config, num_layers=1)
    expert, other = (make_params(config, seed, scale=0.15) for seed in (0, 5))
    large = jax.tree.map(lambda a, b: a + 0.2 * (b - b.mean()), expert, other)
    return [(large, config), (expert, config), (make_params(shallow, 2, scale=0.05), shallow)]


def same(ours, plain):
    assert np.array_equal(ours.tokens, plain.tokens)
    assert np.array_equal(ours.mask, plain.mask)
    assert np.array_equal(ours.ended, plain.ended)
    np.testing.assert_allclose(ours.logps, plain.logps, atol=1e-4)


OPTIONS = {"combine": RATIO, "max_new_tokens": 20}  # one compilation for many tests


def test_tokens_are_those_of_plain_decoding(three):
    prompts = pad_prompts(PROMPTS, pad_id=0, bucket=8, rows=4)  # the last row is a filler
    for temperature in (0.0, 0.7):
        options = OPTIONS | {"temperature": temperature, "top_p": 0.9}
        plain = generate(three, prompts, KEY, **options)
        assert not plain.ended.all()
        for cost in (0.0, 2.0):
            out = speculate(three, prompts, KEY, draft=1, drafts=3, cost=cost, **options)
            same(out.generation, plain)
            assert int(out.accepted[:3].sum()) > 0
            if cost == 0:
                assert int(out.rounds) < 19
                assert int(out.steps) == 0
                # Rows keep different numbers of tokens.
                assert len(set(np.asarray(out.accepted[:3]).tolist())) > 1
            assert out.drafted[3] == out.accepted[3] == 0


def test_any_model_may_draft(three):
    prompts = pad_prompts(PROMPTS, pad_id=0, bucket=8, rows=4)
    plain = generate(three, prompts, KEY, **OPTIONS)
    same(speculate(three, prompts, KEY, draft=2, drafts=3, cost=0.0, **OPTIONS).generation, plain)


def test_greedy_tokens_are_those_of_plain_decoding_under_rejection(three):
    prompts = pad_prompts(PROMPTS, pad_id=0, bucket=8, rows=4)
    plain = generate(three, prompts, KEY, temperature=0.0, **OPTIONS)
    out = speculate(
        three, prompts, KEY, draft=1, drafts=3, rule="rejection", temperature=0.0, **OPTIONS
    )
    same(out.generation, plain)


@pytest.mark.parametrize("rule", ["coupled", "rejection"])
def test_rows_do_not_depend_on_other_rows(three, rule):
    options = OPTIONS | {"draft": 1, "drafts": 3, "rule": rule}
    # Under rejection a row's draws depend on where rounds begin, so all steps are rounds.
    options |= {"cost": 0.0 if rule == "rejection" else 1.5}
    few = speculate(three, pad_prompts(PROMPTS[:2], pad_id=5, bucket=8, rows=4), KEY, **options)
    many = speculate(three, pad_prompts(PROMPTS, pad_id=0, bucket=8, rows=4), KEY, **options)
    assert np.array_equal(few.generation.tokens[:2], many.generation.tokens[:2])
    np.testing.assert_allclose(few.generation.logps[:2], many.generation.logps[:2], atol=1e-4)
    assert not np.array_equal(many.generation.tokens[0], many.generation.tokens[1])


@pytest.fixture(scope="module")
def tiny(make_params):
    return [(make_params(TINY, seed, scale=0.25), TINY) for seed in (1, 2, 3)]


TEMPERATURE = 1.5


@pytest.fixture(scope="module")
def expected(tiny):
    """Probability of every completion of [1, 2] by up to three tokens, from full passes."""
    rows = list(itertools.product(range(4), repeat=3))
    tokens = jnp.array([[1, 2, *row] for row in rows])
    logits = RATIO(tuple(read(p, c, tokens) for p, c in tiny))[:, 1:-1]
    shares = np.asarray(jax.nn.softmax(logits / TEMPERATURE), float)
    found = {}
    for row, share in zip(rows, shares):
        row = row[: row.index(3) + 1] if 3 in row else row
        found[row] = float(np.prod(share[np.arange(len(row)), list(row)]))
    return found


@pytest.mark.parametrize(
    ("rule", "cost"), [("coupled", 0.0), ("rejection", 0.0), ("rejection", 1.8)]
)
def test_completions_follow_the_distribution_of_the_target(tiny, expected, rule, cost):
    """Chi-square over all completions; its quantile by Wilson and Hilferty."""
    assert sum(expected.values()) == pytest.approx(1, abs=1e-5)
    assert min(expected.values()) * ROWS >= 3
    out = speculate(
        tiny,
        pad_prompts([[1, 2]] * ROWS, pad_id=0, bucket=2),
        KEY,
        max_new_tokens=3,
        draft=1,
        drafts=2,
        combine=RATIO,
        temperature=TEMPERATURE,
        rule=rule,
        cost=cost,
    )
    tokens, mask = np.asarray(out.generation.tokens), np.asarray(out.generation.mask)
    seen = Counter(tuple(row[real].tolist()) for row, real in zip(tokens, mask))
    assert set(seen) <= set(expected)
    statistic = sum((seen[row] - p * ROWS) ** 2 / (p * ROWS) for row, p in expected.items())
    freedom = len(expected) - 1
    assert freedom == 39
    spread = 2 / (9 * freedom)
    assert statistic < freedom * (1 - spread + 3.09 * spread**0.5) ** 3  # 1 in 1,000
    assert 0.2 < float(out.accepted.sum() / out.drafted.sum()) < 0.95


def test_rejection_keeps_more_drafts_than_coupling(tiny):
    prompts = pad_prompts([[1, 2]] * ROWS, pad_id=0, bucket=2)
    options = {"max_new_tokens": 3, "draft": 1, "drafts": 2, "combine": RATIO, "cost": 0.0}
    options["temperature"] = TEMPERATURE
    kept = [
        speculate(tiny, prompts, KEY, rule=rule, **options).accepted.sum()
        for rule in ("rejection", "coupled")
    ]
    assert kept[0] > kept[1]


def test_equal_models_keep_every_draft(three):
    large = (three[0][0], dataclasses.replace(three[0][1], eos_ids=()))
    prompts = pad_prompts(PROMPTS, pad_id=0, bucket=8)
    options = {"max_new_tokens": 17, "draft": 1, "drafts": 3, "rule": "rejection"}
    out = speculate([large, large], prompts, KEY, **options)
    assert int(out.rounds) == 4  # 1 + 4 · 4 tokens
    assert int(out.steps) == 0
    assert np.array_equal(out.accepted, out.drafted)


def test_useless_drafts_cost_two_rounds_and_one_percent(three, make_params):
    large, config = three[0]
    config = dataclasses.replace(config, eos_ids=(), max_seq_len=400)
    # Its greedy token is always 39, which the large model takes for unlikely.
    stubborn = jax.tree.map(jnp.zeros_like, large)
    stubborn |= {"final_norm": jnp.ones(24), "embedding": jnp.ones((40, 24))}
    stubborn |= {"unembedding": jnp.zeros((24, 40)).at[:, 39].set(1.0)}
    options = {"max_new_tokens": 201, "temperature": 0.0, "combine": first}
    prompts = pad_prompts(PROMPTS[:1], pad_id=0, bucket=8)
    out = speculate(
        [(large, config), (stubborn, config)], prompts, KEY, draft=1, drafts=3, cost=2.0, **options
    )
    assert int(out.accepted[0]) == 0
    assert int(out.rounds + out.steps) == 200
    assert 2 <= int(out.rounds) <= 2 + 200 * 0.01


def test_one_compilation_serves_prompts_of_a_bucket_any_temperature_and_cost(three):
    _speculate.clear_cache()
    for prompts, temperature, cost in ((PROMPTS, 1.0, 0.0), (PROMPTS[::-1], 0.0, 2.0)):
        batch = pad_prompts(prompts, pad_id=0, bucket=8, rows=4)
        options = OPTIONS | {"temperature": temperature, "cost": cost}
        speculate(three, batch, KEY, draft=1, drafts=3, **options)
    assert _speculate._cache_size() == 1


def test_cost_of_a_round_by_hand():
    big = dataclasses.replace(TINY, vocab_size=400)
    sizes = [400 * 8 + 16 + 8 + 4 * 64 + 3 * 64, 4 * 8 + 16 + 8 + 4 * 64 + 3 * 64]
    expected = (1.4 * sizes[0] + 5 * sizes[1]) / sum(sizes)
    assert round_cost((big, TINY), draft=1, drafts=4, arithmetic=0.1) == pytest.approx(expected)


def test_bad_settings_are_refused(three):
    prompts = pad_prompts(PROMPTS, pad_id=0, bucket=8)
    for options in ({"draft": 3}, {"draft": 1, "drafts": 0}, {"draft": 1, "rule": "luck"}):
        with pytest.raises(EgjaxError):
            speculate(three, prompts, KEY, max_new_tokens=4, **options)
    with pytest.raises(EgjaxError, match="context of 64"):
        speculate(three, prompts, KEY, max_new_tokens=60, draft=1)
