import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egjax.errors import EgjaxError
from egjax.lm.ensemble import check_vocabularies, first
from egjax.lm.generate import (
    _generate,
    completions,
    generate,
    pad_prompts,
    sampling_logits,
)
from egjax.lm.model import forward
from egjax.lm.ratio import ratio_combine
from egjax.lm.speculate import speculate
from egjax.losses import behaviour_ratio

KEY = jax.random.key(0)
LONGEST = 16
read = jax.jit(forward, static_argnames="config")
PROMPTS = [[3, 9, 4], [8], [5, 6, 7, 8, 9, 10, 11]]


@pytest.fixture(scope="module")
def model(config, make_params):
    # With small weights the model is unsure of itself, so that drawing has something to draw.
    config = dataclasses.replace(config, eos_ids=())
    return make_params(config, scale=0.15), config


def by_hand(models, combine, prompt, steps, eos_ids=()):
    """Greedy decoding by a full forward pass at every token, without a cache."""
    row, logps = list(prompt), []
    for _ in range(steps):
        # What comes later is not seen, so one compiled length serves.
        tokens = jnp.array([row + [0] * (LONGEST - len(row))])
        logits = combine(tuple(read(p, c, tokens)[:, len(row) - 1] for p, c in models))[0]
        row.append(int(logits.argmax()))
        logps.append(float(jax.nn.log_softmax(logits).max()))
        if row[-1] in eos_ids:
            break
    return row[len(prompt) :], logps


def test_greedy_decoding_equals_full_passes(config, params):
    models = [(params, config)]
    out = generate(
        models, pad_prompts(PROMPTS, pad_id=0, bucket=8), KEY, max_new_tokens=9, temperature=0
    )
    for row, prompt in enumerate(PROMPTS):
        tokens, logps = by_hand(models, first, prompt, 9, config.eos_ids)
        count = int(out.mask[row].sum())
        assert out.tokens[row, :count].tolist() == tokens
        np.testing.assert_allclose(out.logps[row, :count], logps, atol=1e-4)


def test_decoding_from_the_behaviour_ratio_equals_full_passes(config, params, make_params):
    shallow = dataclasses.replace(config, num_layers=1, eos_ids=())
    config = dataclasses.replace(config, eos_ids=())
    expert, anti = make_params(shallow, 1), make_params(shallow, 2)
    models = [(params, config), (expert, shallow), (anti, shallow)]

    def combine(logits):
        return behaviour_ratio(*logits, alpha=0.5)

    out = generate(
        models,
        pad_prompts(PROMPTS, pad_id=0, bucket=8),
        KEY,
        max_new_tokens=6,
        temperature=0,
        combine=ratio_combine(alpha=0.5),
    )
    for row, prompt in enumerate(PROMPTS):
        tokens, logps = by_hand(models, combine, prompt, 6)
        assert out.tokens[row].tolist() == tokens
        np.testing.assert_allclose(out.logps[row], logps, atol=1e-4)


def test_equal_small_models_leave_the_large_one(model, make_params):
    _, config = model
    small = make_params(config, 9)
    prompts = pad_prompts(PROMPTS, pad_id=0, bucket=8)
    plain = generate([model], prompts, KEY, max_new_tokens=8)
    steered = generate(
        [model, (small, config), (small, config)],
        prompts,
        KEY,
        max_new_tokens=8,
        combine=ratio_combine(),
    )
    assert np.array_equal(plain.tokens, steered.tokens)
    np.testing.assert_allclose(plain.logps, steered.logps, atol=1e-5)
    assert ratio_combine() is ratio_combine()


def test_rows_do_not_depend_on_padding_or_on_other_rows(model):
    few = generate([model], pad_prompts(PROMPTS[:2], pad_id=0, bucket=8), KEY, max_new_tokens=8)
    padded = pad_prompts(PROMPTS, pad_id=5, bucket=16, rows=5)
    many = generate([model], padded, KEY, max_new_tokens=8)
    assert np.array_equal(few.tokens, many.tokens[:2])
    np.testing.assert_allclose(few.logps, many.logps[:2], atol=1e-5)
    assert not many.mask[3:].any()
    assert not np.array_equal(many.tokens[0], many.tokens[1])


def test_end_token_ends_a_row(model):
    params, config = model
    prompts = pad_prompts(PROMPTS, pad_id=0, bucket=8)
    free = generate([model], prompts, KEY, max_new_tokens=8)
    stop = int(free.tokens[0, 3])
    out = generate(
        [(params, dataclasses.replace(config, eos_ids=(stop,)))], prompts, KEY, max_new_tokens=8
    )
    for row in range(3):
        found = [i for i, token in enumerate(free.tokens[row].tolist()) if token == stop]
        count = found[0] + 1 if found else 8
        assert out.mask[row].tolist() == [True] * count + [False] * (8 - count)
        assert out.tokens[row, :count].tolist() == free.tokens[row, :count].tolist()
        assert (out.tokens[row, count:] == config.pad_id).all()
        assert (out.logps[row, count:] == 0).all()
        assert bool(out.ended[row]) == bool(found)
        text = completions(out, (stop,))[row]
        assert text == free.tokens[row, : count - bool(found)].tolist()


def test_draws_follow_the_models_distribution(model):
    params, config = model
    rows, prompt = 3000, [3, 9, 4]
    prompts = pad_prompts([prompt] * rows, pad_id=0, bucket=4)
    expected = jax.nn.softmax(2 * read(params, config, jnp.array([prompt]))[0, -1])
    out = generate([model], prompts, KEY, max_new_tokens=1, temperature=0.5)
    shares = np.bincount(out.tokens[:, 0], minlength=config.vocab_size) / rows
    assert np.abs(shares - expected).max() < 4 * np.sqrt(expected.max() / rows)
    best = sorted(expected.tolist(), reverse=True)
    nucleus = generate(
        [model], prompts, KEY, max_new_tokens=1, temperature=0.5, top_p=best[0] + best[1] / 2
    )
    drawn = set(nucleus.tokens[:, 0].tolist())
    assert drawn == set(np.argsort(-np.asarray(expected))[:2].tolist())


def test_the_nucleus_is_the_smallest_set_also_where_tokens_are_alike():
    for shares, top_p, expected in (
        ([1 / 8] * 8, 0.5, [0, 1, 2, 3]),
        ([0.3, 0.4, 0.3, 0.0], 0.6, [0, 1]),
        ([0.3, 0.4, 0.3, 0.0], 0.8, [0, 1, 2]),
        ([0.1, 0.5, 0.4, 0.0], 0.3, [1]),
    ):
        logits = jnp.log(jnp.array([shares, shares[::-1]]))
        kept = jnp.isfinite(sampling_logits(logits, jnp.float32(1), jnp.float32(top_p)))
        assert np.flatnonzero(kept[0]).tolist() == expected
        assert kept[1].sum() == len(expected)


def test_draws_of_a_row_are_independent(model):
    params, config = model
    uniform = [(jax.tree.map(jnp.zeros_like, params), config)]
    prompts = pad_prompts([[3]] * 500, pad_id=0, bucket=4)
    tokens = generate(uniform, prompts, KEY, max_new_tokens=2).tokens
    assert (tokens[:, 0] == tokens[:, 1]).mean() < 0.1  # 1 / 40 is expected


def test_one_compilation_serves_prompts_of_a_bucket_and_any_temperature(model):
    _generate.clear_cache()
    for prompts, temperature in ((PROMPTS, 1.0), (PROMPTS[::-1], 0.0), ([[3], [4], [5, 6]], 0.7)):
        generate(
            [model],
            pad_prompts(prompts, pad_id=0, bucket=8),
            KEY,
            max_new_tokens=2,
            temperature=temperature,
        )
    assert _generate._cache_size() == 1


def test_models_of_different_vocabularies_are_refused(model):
    params, config = model
    other = dataclasses.replace(config, vocab_size=41)
    prompts = pad_prompts(PROMPTS, pad_id=0)
    with pytest.raises(EgjaxError, match="vocabulary sizes differ: model 0 has 40, model 1 has 41"):
        generate([model, (params, other)], prompts, KEY, max_new_tokens=2)
    with pytest.raises(EgjaxError, match="tokenizers differ"):
        check_vocabularies({"large": 4, "expert": 4}, {"large": "aaa", "expert": "bbb"})
    check_vocabularies({"large": 4, "expert": 4}, {"large": "aaa", "expert": "aaa"})


def test_bad_settings_are_refused(model):
    prompts = pad_prompts(PROMPTS, pad_id=0, bucket=8)
    with pytest.raises(EgjaxError, match="context of 64"):
        generate([model], prompts, KEY, max_new_tokens=57)
    for temperature in (-1.0, float("nan"), float("inf")):
        with pytest.raises(EgjaxError, match="temperature"):
            generate([model], prompts, KEY, max_new_tokens=2, temperature=temperature)
    for top_p in (0.0, 1.5, float("nan")):
        with pytest.raises(EgjaxError, match="top_p"):
            generate([model], prompts, KEY, max_new_tokens=2, top_p=top_p)
    for count in (0, -3):
        with pytest.raises(EgjaxError, match=f"{count} new tokens .at least 1"):
            generate([model], prompts, KEY, max_new_tokens=count)
    with pytest.raises(EgjaxError, match="no model"):
        generate([], prompts, KEY, max_new_tokens=2)
    with pytest.raises(EgjaxError, match="empty"):
        pad_prompts([[1], []], pad_id=0)
    with pytest.raises(EgjaxError, match="2 prompts for a batch of 1"):
        pad_prompts([[1], [2]], pad_id=0, rows=1)


def test_what_cannot_be_padded_is_told():
    same = pad_prompts(np.array([[5, 6], [7, 8]]), pad_id=0, bucket=4)
    assert same.tokens.tolist() == pad_prompts([[5, 6], [7, 8]], pad_id=0, bucket=4).tokens.tolist()
    with pytest.raises(EgjaxError, match=r"prompt 1: token -1 is no token"):
        pad_prompts([[5], [6, -1]], pad_id=0)
    with pytest.raises(EgjaxError, match="a bucket of 0 tokens"):
        pad_prompts([[5]], pad_id=0, bucket=0)
    with pytest.raises(EgjaxError, match="a prompt is empty"):
        pad_prompts([[5], np.array([], int)], pad_id=0)


def test_a_token_that_the_model_lacks_is_told(model):
    prompts = pad_prompts([[3, model[1].vocab_size]], pad_id=0, bucket=8)
    with pytest.raises(EgjaxError, match=f"token {model[1].vocab_size} in a prompt"):
        generate([model], prompts, KEY, max_new_tokens=2)


@pytest.mark.parametrize("options", [{"clip": -1.0}, {"plausible": 2.0}, {"plausible": 0.0}])
def test_a_ratio_that_means_nothing_is_refused(options):
    with pytest.raises(EgjaxError, match=next(iter(options))):
        ratio_combine(**options)


def test_64_bit_numbers_and_strict_promotion_change_nothing(model):
    prompts = pad_prompts(PROMPTS, pad_id=0, bucket=8)
    options = {"max_new_tokens": 6, "temperature": 0.0}
    plain = generate([model], prompts, KEY, **options)
    drafted = speculate([model, model], prompts, KEY, draft=1, combine=first, **options)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        wide = generate([model], prompts, KEY, **options)
        both = speculate([model, model], prompts, KEY, draft=1, combine=first, **options)
    assert wide.tokens.tolist() == plain.tokens.tolist()
    assert both.generation.tokens.tolist() == drafted.generation.tokens.tolist()
