"""Speculation changes how fast tokens come, never which: against plain decoding and chi-square."""

import dataclasses
import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egjax.errors import EgjaxError
from egjax.lm.ensemble import first
from egjax.lm.generate import generate, pad_prompts
from egjax.lm.model import forward
from egjax.lm.ratio import ratio_combine
from egjax.lm.speculate import _speculate, round_cost, speculate

ROWS = 2048
KEY = jax.random.key(3)
read = jax.jit(forward, static_argnames="config")
PROMPTS = [[3, 9, 4], [8], [5, 6, 7, 8, 9, 10, 11]]
RATIO = ratio_combine(alpha=0.5)


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
        for cost in (0.0, 1.2):
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
def tiny(four_words, make_params):
    return [(make_params(four_words, seed, scale=0.25), four_words) for seed in (1, 2, 3)]


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
    ("rule", "cost"), [("coupled", 0.0), ("rejection", 0.0), ("rejection", 0.5)]
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


def account(hits, ends, *, cost, drafts, limit):
    """Rounds, plain steps, drafts verified and kept, from whether each token of each row would have
    been drafted and where its row ends: the rules of the account in plain numbers."""
    rows = range(len(hits))
    made, balance = [1 for _ in rows], [0.0 for _ in rows]
    rounds = steps = 0
    drafted, kept = [0 for _ in rows], [0 for _ in rows]

    def book(row, gain):
        balance[row] = min(max(balance[row] + gain, -6.0), 6.0)

    for row in rows:
        book(row, 1.0 if hits[row][0] else 1.0 - cost)
    while going := [row for row in rows if made[row] < min(ends[row], limit)]:
        slowest = min(made[row] for row in going)
        if all(balance[row] + made[row] - slowest >= 1 for row in going):
            rounds += 1
            for row in going:
                agree = 0
                while agree < drafts and hits[row][made[row] + agree]:
                    agree += 1
                new = min(agree + 1, min(ends[row], limit) - made[row])
                drafted[row] += drafts
                kept[row] += min(agree, new)
                made[row] += new
                book(row, new - cost)
        else:
            steps += 1
            for row in going:
                book(row, 1.0 if hits[row][made[row]] else 1.0 - cost)
                made[row] += 1
    return rounds, steps, drafted, kept


@pytest.mark.parametrize("cost", [0.0, 1.2, 1.7])
def test_rounds_are_taken_where_the_account_says(three, cost):
    limit, drafts = OPTIONS["max_new_tokens"], 3
    options = OPTIONS | {"temperature": 0.0}
    prompts = pad_prompts(PROMPTS, pad_id=0, bucket=8, rows=4)
    plain = generate(three, prompts, KEY, **options)
    hits, ends = [], []
    for row, prompt in enumerate(PROMPTS):
        tokens = np.asarray(plain.tokens[row])
        logits = read(*three[1], jnp.array([[*prompt, *tokens.tolist()]]))[0]
        guesses = np.asarray(logits.argmax(-1))[len(prompt) - 1 : -1]
        hits.append([*(guesses == tokens).tolist(), *[False] * drafts])
        ends.append(int(plain.mask[row].sum()))
    out = speculate(three, prompts, KEY, draft=1, drafts=drafts, cost=cost, **options)
    same(out.generation, plain)
    rounds, steps, drafted, kept = account(hits, ends, cost=cost, drafts=drafts, limit=limit)
    assert (int(out.rounds), int(out.steps)) == (rounds, steps)
    assert (out.drafted.tolist(), out.accepted.tolist()) == ([*drafted, 0], [*kept, 0])
    assert rounds > 0
    assert (steps > 0) == (cost > 0)


def stubborn(like):
    """A model whose greedy token is always 39."""
    return jax.tree.map(jnp.zeros_like, like) | {
        "final_norm": jnp.ones(24),
        "embedding": jnp.ones((40, 24)),
        "unembedding": jnp.zeros((24, 40)).at[:, 39].set(1.0),
    }


def test_drafts_that_never_agree_are_never_made(three):
    large, config = three[0]
    config = dataclasses.replace(config, eos_ids=(), max_seq_len=400)
    models = [(large, config), (stubborn(large), config)]
    options = {"max_new_tokens": 201, "temperature": 0.0, "combine": first}
    prompts = pad_prompts(PROMPTS[:1], pad_id=0, bucket=8)
    out = speculate(models, prompts, KEY, draft=1, drafts=3, cost=2.0, **options)
    assert (int(out.rounds), int(out.steps)) == (0, 200)
    # Nor where they always agree and a round cannot pay.
    equal = [(large, config)] * 2
    out = speculate(equal, prompts, KEY, draft=1, drafts=3, cost=4.0, **options)
    assert (int(out.rounds), int(out.steps)) == (0, 200)


def test_one_compilation_serves_prompts_of_a_bucket_any_temperature_and_cost(three):
    _speculate.clear_cache()
    for prompts, temperature, cost in ((PROMPTS, 1.0, 0.0), (PROMPTS[::-1], 0.0, 2.0)):
        batch = pad_prompts(prompts, pad_id=0, bucket=8, rows=4)
        options = OPTIONS | {"temperature": temperature, "cost": cost}
        speculate(three, batch, KEY, draft=1, drafts=3, **options)
    assert _speculate._cache_size() == 1


def test_cost_of_a_round_by_hand(four_words):
    big = dataclasses.replace(four_words, vocab_size=400)
    sizes = [400 * 8 + 16 + 8 + 4 * 64 + 3 * 64, 4 * 8 + 16 + 8 + 4 * 64 + 3 * 64]
    expected = (1.4 * sizes[0] + 5 * sizes[1]) / sum(sizes)
    options = {"draft": 1, "drafts": 4, "arithmetic": 0.1}
    assert round_cost((big, four_words), **options) == pytest.approx(expected)
    # A pair reads two rows for one: 1.1 for a token, and five of them one after the other.
    expected = (1.4 * sizes[0] + 5 * 1.1 * sizes[1]) / (sizes[0] + 1.1 * sizes[1])
    assert round_cost((big, four_words), voices=(1, 2), **options) == pytest.approx(expected)


def test_bad_settings_are_refused(three):
    prompts = pad_prompts(PROMPTS, pad_id=0, bucket=8)
    for options in ({"draft": 3}, {"draft": 1, "drafts": 0}, {"draft": 1, "rule": "luck"}):
        with pytest.raises(EgjaxError):
            speculate(three, prompts, KEY, max_new_tokens=4, **options)
    with pytest.raises(EgjaxError, match="context of 64"):
        speculate(three, prompts, KEY, max_new_tokens=60, draft=1)
