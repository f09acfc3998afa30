"""A model whose layers are apart is the same model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egjax.lm import int8, lora, model
from egjax.lm.beam import beam_search
from egjax.lm.generate import generate, pad_prompts
from egjax.lm.model import forward, trunk
from egjax.lm.params import unstacked
from egjax.lm.ratio import ratio_combine
from egjax.lm.speculate import speculate

KEY = jax.random.key(0)
TOKENS = jnp.array([[3, 9, 4, 8, 1], [5, 6, 7, 2, 2]])
PROMPTS = pad_prompts([[3, 9, 4], [8], [5, 6, 7, 8]], pad_id=0, bucket=4)


def close(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-5, atol=3e-5)


def test_every_layer_gives_what_it_gave(config, params):
    apart = unstacked(params)
    assert len(apart["layers"]) == config.num_layers
    assert apart["layers"][1]["gate"].shape == params["layers"]["gate"].shape[1:]
    for remat in (None, "full"):
        close(
            trunk(apart, config, TOKENS, return_hidden=True, remat=remat),
            trunk(params, config, TOKENS, return_hidden=True, remat=remat),
        )


@pytest.mark.parametrize("rows", [3, 40])  # slabs, a scatter
def test_decoding_and_speculation_are_the_same(three, rows):
    prompts = jax.tree.map(lambda x: jnp.tile(x, (rows // 3 + 1, 1))[:rows], PROMPTS)
    apart = [(unstacked(p), c) for p, c in three]
    options = {"combine": ratio_combine(alpha=0.5), "max_new_tokens": 9, "temperature": 0.0}
    plain = generate(three, prompts, KEY, **options)
    close(generate(apart, prompts, KEY, **options), plain)
    close(speculate(apart, prompts, KEY, draft=1, drafts=3, cost=0.0, **options).generation, plain)


def test_beams_are_the_same(three):
    apart = [(unstacked(p), c) for p, c in three]
    options = {"combine": ratio_combine(alpha=0.5), "max_new_tokens": 6, "beams": 3}
    close(beam_search(apart, PROMPTS, **options), beam_search(three, PROMPTS, **options))


def test_two_voices_of_one_set_of_weights_and_eight_bits(config, params):
    own = lora.LoraConfig(rank=2)
    adapter = jax.tree.map(lambda x: x + 0.1, lora.init(KEY, config, own))
    attached = lora.attach(int8.quantize(params), adapter, own)
    pairs = [lora.Pair(attached), lora.Pair(unstacked(attached))]

    def combine(logits):
        return logits[0] - 0.5 * logits[1]

    stacked, apart = (
        generate([(p, config)], PROMPTS, KEY, combine=combine, max_new_tokens=5, temperature=0.0)
        for p in pairs
    )
    close(apart, stacked)


def test_stacks_are_given_up_one_by_one(config, make_params):
    params = make_params(config)
    kept = unstacked(params)
    assert not params["layers"]["gate"].is_deleted()
    apart = unstacked(params, consume=True)
    assert all(x.is_deleted() for x in jax.tree.leaves(params["layers"]))
    close(apart, kept)


def test_like_rows_on_a_gpu_give_the_same(config, params, monkeypatch):
    """Two rows of one token, tiled to six, with an adapter in the first alone."""
    own = lora.LoraConfig(rank=2)
    adapter = jax.tree.map(lambda x: x + 0.1, lora.init(KEY, config, own))
    attached = lora.attach(params, adapter, own, rows=jnp.array([1.0, 0.0]))
    wanted = forward(attached, config, TOKENS[:, :1])
    entries = 2 * config.num_heads * config.head_dim * config.hidden_size
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(model, "_FEW", 3 * entries)
    tiled = []
    monkeypatch.setattr(jnp, "tile", lambda *x, of=jnp.tile: tiled.append(x[1]) or of(*x))
    close(forward(attached, config, TOKENS[:, :1]), wanted)
    assert tiled == [(3, 1, 1, 1), 3]
