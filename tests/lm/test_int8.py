from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from egjax.lm import int8
from egjax.lm.ensemble import read
from egjax.lm.generate import generate, pad_prompts
from egjax.lm.model import forward
from egjax.lm.ratio import ratio_combine


def test_each_entry_is_off_by_half_a_step_at_most(params, config):
    small = int8.quantize(params)
    for name, inputs in int8.INPUTS.items():
        scale = small["layers"][f"{name}_scale"]
        wide = jnp.expand_dims(scale, tuple(range(1, 1 + inputs)))
        error = jnp.abs(small["layers"][name] * wide - params["layers"][name])
        assert (error <= wide * 0.5001).all()
        assert jnp.abs(small["layers"][name]).max() == 127
    assert jax.tree.map(lambda x: (x.shape, str(x.dtype)), small) == jax.tree.map(
        lambda s: (s.shape, s.dtype), int8.table(config)
    )


def test_weights_that_eight_bits_hold_give_the_same_logits(params, config, tokens):
    held = int8.quantize(params)
    layers = dict(params["layers"])
    for name, inputs in int8.INPUTS.items():
        scale = jnp.expand_dims(held["layers"][f"{name}_scale"], tuple(range(1, 1 + inputs)))
        layers[name] = held["layers"][name] * scale
    want = forward({**params, "layers": layers}, config, tokens)
    np.testing.assert_allclose(forward(held, config, tokens), want, rtol=1e-4, atol=1e-4)
    # The rounded matrices are what is compared, not the exact ones.
    assert jnp.abs(want - forward(params, config, tokens)).max() > 1e-2


def test_a_channel_of_zeros_stays_zero(params, config, tokens):
    layers = {**params["layers"], "down": jnp.zeros_like(params["layers"]["down"])}
    held = int8.quantize({**params, "layers": layers})
    assert not held["layers"]["down"].any()
    assert jnp.isfinite(forward(held, config, tokens)).all()


def test_decoding_takes_them(params, config):
    prompts = pad_prompts([[3, 4, 5], [6]], pad_id=0, bucket=4)
    models = [(int8.quantize(params), config)]
    found = generate(models, prompts, jax.random.key(0), max_new_tokens=4, temperature=0.0)
    assert found.mask[:, 0].all()
    assert jnp.isfinite(found.logps).all()


def test_pi_bar_of_a_rounded_large_model_stays_close(config, make_params, tokens):
    small = replace(config, num_layers=1)
    large = make_params(config, scale=0.3)
    others = [(make_params(small, seed, scale=0.3), small) for seed in (1, 2)]

    def logps(large):
        models = [(large, config), *others]
        found = tuple(read(p, c, tokens)[0][0] for p, c in models)
        return jax.nn.log_softmax(ratio_combine()(found))

    exact, rounded = logps(large), logps(int8.quantize(large))
    off = jnp.abs(rounded - exact)
    # Nats, of 1,440 log-probabilities that spread by 2.8; bfloat16 weights are off by half as much.
    assert jnp.std(exact) > 2
    assert 1e-3 < off.mean() < 0.05
    assert off.max() < 0.6
    assert (jnp.exp(exact) * (exact - rounded)).sum(-1).mean() < 2e-3
    np.testing.assert_array_equal(exact.argmax(-1), rounded.argmax(-1))
