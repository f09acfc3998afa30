"""Beam search against transformers' recorded one, and against all completions there are."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egjax.errors import EgjaxError
from egjax.lm import hf
from egjax.lm.beam import beam_search
from egjax.lm.generate import generate, pad_prompts
from egjax.lm.model import forward
from egjax.lm.ratio import ratio_combine

GOLDEN = Path(__file__).parents[1] / "golden"
RECORD = json.loads((GOLDEN / "beam_search.json").read_text())


def completion(tokens):
    """Up to the end token; transformers fills up with the first end token where padding is 0."""
    ends = [i for i, token in enumerate(tokens) if token in RECORD["ends"]]
    return tokens[: ends[0] + 1] if ends else tokens


@pytest.mark.parametrize("case", range(len(RECORD["cases"])))
def test_beams_are_those_of_transformers(case):
    recorded = RECORD["cases"][case]
    config, params = hf.load(GOLDEN / "tiny_llama")
    config = dataclasses.replace(config, eos_ids=tuple(RECORD["ends"]))
    # A filler at the end and other padding change nothing.
    prompts = pad_prompts(RECORD["prompts"], pad_id=7, bucket=4, rows=5)
    found = beam_search(
        [(params, config)],
        prompts,
        max_new_tokens=RECORD["max_new_tokens"],
        beams=recorded["beams"],
        length_penalty=recorded["length_penalty"],
        stopping=recorded["stopping"],
    )
    np.testing.assert_allclose(found.scores[:4], recorded["scores"], atol=2e-4)
    for row, column in itertools.product(range(4), range(recorded["beams"])):
        real = np.asarray(found.mask[row, column])
        ours = np.asarray(found.tokens[row, column])
        assert ours[real].tolist() == completion(recorded["tokens"][row][column])
        total = float(found.logps[row, column].sum())
        score = total / real.sum() ** recorded["length_penalty"]
        assert score == pytest.approx(float(found.scores[row, column]), abs=1e-4)
    assert not found.mask[4].any()


def test_the_record_has_early_and_late_ends():
    lengths = {
        len(completion(beam)) for case in RECORD["cases"] for row in case["tokens"] for beam in row
    }
    assert min(lengths) < 4
    assert max(lengths) == RECORD["max_new_tokens"]


def test_as_many_beams_as_prefixes_find_the_best_completion_of_all(four_words, make_params):
    models = [(make_params(four_words, seed, scale=0.8), four_words) for seed in (1, 2, 3)]
    combine, prompt = ratio_combine(alpha=0.5), [1, 2]
    rows = list(itertools.product(range(4), repeat=3))
    read = jax.jit(forward, static_argnames="config")
    tokens = jnp.array([[*prompt, *row] for row in rows])
    logps = jax.nn.log_softmax(combine(tuple(read(p, c, tokens) for p, c in models))[:, 1:-1])
    whole = {}
    for row, logp in zip(rows, np.asarray(logps)):
        row = row[: row.index(3) + 1] if 3 in row else row
        whole[row] = float(logp[np.arange(len(row)), list(row)].sum()) / len(row) ** 0.7
    best = sorted(whole, key=whole.__getitem__, reverse=True)
    prompts = pad_prompts([prompt], pad_id=0, bucket=2)
    options = {"max_new_tokens": 3, "length_penalty": 0.7, "combine": combine}
    found = beam_search(models, prompts, beams=9, stopping="never", **options)
    for place, row in enumerate(best[:4]):
        assert found.tokens[0, place][found.mask[0, place]].tolist() == list(row)
        assert float(found.scores[0, place]) == pytest.approx(whole[row], abs=1e-4)
    generation = found.best((3,))
    assert bool(generation.ended[0]) == (best[0][-1] == 3)


@pytest.mark.parametrize("stopping", ["heuristic", "full", "never"])
def test_where_there_are_fewer_completions_than_beams_there_is_none(
    four_words, make_params, stopping
):
    models = [(make_params(four_words, seed, scale=0.8), four_words) for seed in (1, 2, 3)]
    prompts = pad_prompts([[1, 2]], pad_id=0, bucket=2)
    # The likeliest token alone is plausible: there is one completion.
    combine = ratio_combine(plausible=1.0)
    found = beam_search(
        models, prompts, max_new_tokens=6, beams=4, combine=combine, stopping=stopping
    )
    plain = generate(
        models, prompts, jax.random.key(0), max_new_tokens=6, combine=combine, temperature=0.0
    )
    assert np.array_equal(found.tokens[:, 0], plain.tokens)
    assert found.scores[0].tolist() == [0.0, -1e9, -1e9, -1e9]
    assert not found.mask[0, 1:].any()
    assert not found.tokens[0, 1:].any()


def test_one_beam_is_greedy_decoding(config, make_params):
    config = dataclasses.replace(config, eos_ids=(7,))
    models = [(make_params(config, scale=0.15), config)]
    prompts = pad_prompts([[3, 9, 4], [8]], pad_id=0, bucket=8)
    plain = generate(models, prompts, jax.random.key(0), max_new_tokens=9, temperature=0.0)
    found = beam_search(models, prompts, max_new_tokens=9, beams=1, stopping="full")
    assert np.array_equal(found.tokens[:, 0], plain.tokens)
    np.testing.assert_allclose(found.logps[:, 0], plain.logps, atol=1e-4)


def test_bad_settings_are_refused(config, make_params):
    models = [(make_params(config), config)]
    prompts = pad_prompts([[3, 9, 4]], pad_id=0, bucket=8)
    with pytest.raises(EgjaxError, match="0 beams"):
        beam_search(models, prompts, max_new_tokens=2, beams=0)
    with pytest.raises(EgjaxError, match="no rule 'soon'"):
        beam_search(models, prompts, max_new_tokens=2, stopping="soon")  # type: ignore[arg-type]
