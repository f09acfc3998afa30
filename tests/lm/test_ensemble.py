"""An adapter as πᴱ and πᴺ at once is the same as two models, whatever decodes or scores."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egjax.lm import lora
from egjax.lm.beam import beam_search
from egjax.lm.constrain import constrained
from egjax.lm.ensemble import read
from egjax.lm.generate import generate, pad_prompts
from egjax.lm.lora import LoraConfig
from egjax.lm.ratio import ratio_combine
from egjax.lm.score import pad_answers, score_ensemble
from egjax.lm.speculate import speculate

KEY = jax.random.key(2)
RATIO = ratio_combine(alpha=0.7)
PROMPTS = pad_prompts([[3, 9, 4], [8], [5, 6, 7, 8, 9, 10, 11]], pad_id=0, bucket=8, rows=4)
OPTIONS = {"max_new_tokens": 14, "combine": RATIO}


@pytest.fixture(scope="module")
def both(config, make_params):
    """(πᴸ, pair) and (πᴸ, merged πᴱ, πᴺ), unsure enough that drafts are kept and refused."""
    config = dataclasses.replace(config, num_layers=2, eos_ids=(7,))
    shallow = dataclasses.replace(config, num_layers=1)
    settings = LoraConfig(rank=2)
    base = make_params(shallow, 2, scale=0.15)
    adapter = jax.tree.map(
        lambda x: jnp.asarray(np.random.default_rng(x.size).normal(0, 0.2, x.shape), x.dtype),
        lora.init(KEY, shallow, settings),
    )
    large = make_params(config, 1, scale=0.15)
    pair = lora.Pair(lora.attach(base, adapter, settings))
    merged = lora.merge(base, adapter, settings)
    head = (large, config)
    return [head, (pair, shallow)], [head, (merged, shallow), (base, shallow)]


class Even:
    """A grammar of even tokens."""

    def allowed(self):
        return np.arange(40) % 2 == 0

    def advance(self, token):
        assert token % 2 == 0


def sooner(models, temperature):
    return speculate(
        models, PROMPTS, KEY, draft=1, drafts=3, temperature=temperature, cost=0.0, **OPTIONS
    )


DECODERS = {
    "greedy": lambda models: generate(models, PROMPTS, KEY, temperature=0.0, **OPTIONS),
    "drawn": lambda models: generate(models, PROMPTS, KEY, temperature=0.8, **OPTIONS),
    "speculation": lambda models: sooner(models, 0.0),
    "drawn speculation": lambda models: sooner(models, 0.8),
    "beams": lambda models: beam_search(models, PROMPTS, beams=3, **OPTIONS),
    "grammar": lambda models: constrained(
        models, PROMPTS, KEY, [Even() for _ in range(3)], **OPTIONS
    ),
}


@pytest.mark.parametrize("name", DECODERS)
def test_a_pair_decodes_what_two_models_decode(both, name):
    ours, theirs = (DECODERS[name](models) for models in both)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_allclose(a, b, atol=1e-4)
        else:
            np.testing.assert_array_equal(a, b)
    out = ours.generation if hasattr(ours, "generation") else ours
    assert len(set(np.asarray(out.tokens).ravel().tolist())) > 3
    if name.endswith("speculation"):
        plain = DECODERS[name.replace("speculation", "").strip() or "greedy"](both[1])
        np.testing.assert_array_equal(out.tokens, plain.tokens)
        assert 0 < int(ours.accepted.sum()) < int(ours.drafted.sum())


def test_a_pair_scores_as_two_models(both):
    batch = pad_answers([([3, 9, 4], [5, 6]), ([8], [7, 7, 30, 2])], pad_id=0, bucket=8)
    (ours, counts), (theirs, _) = (
        score_ensemble(models, batch.tokens, batch.mask, combine=RATIO) for models in both
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert counts.tolist() == [2, 4]
    swapped, _ = score_ensemble(
        [both[1][0], both[1][2], both[1][1]], batch.tokens, batch.mask, combine=RATIO
    )
    assert np.abs(swapped - theirs).max() > 0.1


def test_a_pair_gives_the_expert_before_the_anti_expert(both, tokens):
    pair, merged, base = both[0][1], *both[1][1:]
    (expert, anti_expert), _ = read(*pair, tokens)
    np.testing.assert_allclose(expert, read(*merged, tokens)[0][0], atol=1e-4)
    np.testing.assert_allclose(anti_expert, read(*base, tokens)[0][0], atol=1e-4)
    assert np.abs(expert - anti_expert).max() > 0.1
