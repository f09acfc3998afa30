import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egjax.lm.config import LlamaConfig, RopeScaling
from egjax.lm.params import table


@pytest.fixture(scope="session")
def config():
    """Grouped queries, scaled rotary embedding, every bias: as much as fits a tiny model."""
    return LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=32,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_seq_len=64,
        rope_theta=100.0,
        rope_scaling=RopeScaling(4.0, 1.0, 4.0, 16),
        tie_embeddings=False,
        attention_bias=True,
        mlp_bias=True,
    )


@pytest.fixture(scope="session")
def four_words():
    """A model of four tokens, the last of which ends: all completions can be counted."""
    return LlamaConfig(
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


@pytest.fixture(scope="session")
def make_params():
    """Random parameters by numpy: nothing to compile, and biases and norms that show."""

    def make(config, seed=0, scale=0.4):
        def one(path, spec):
            rng = np.random.default_rng([seed, zlib.crc32(str(path).encode())])
            centre = 1.0 if "norm" in path[-1].key else 0.0
            return jnp.asarray(rng.normal(centre, scale, spec.shape), spec.dtype)

        return jax.tree_util.tree_map_with_path(one, table(config))

    return make


@pytest.fixture(scope="session")
def params(config, make_params):
    return make_params(config)


@pytest.fixture(scope="session")
def tokens(config):
    return jax.random.randint(jax.random.key(1), (3, 12), 3, config.vocab_size)


@pytest.fixture(scope="session")
def three(config, make_params):
    """A large model, an expert that often agrees with it, and an anti-expert."""
    config = dataclasses.replace(config, eos_ids=(7,), num_layers=2)
    shallow = dataclasses.replace(config, num_layers=1)
    expert, other = (make_params(config, seed, scale=0.15) for seed in (0, 5))
    large = jax.tree.map(lambda a, b: a + 0.2 * (b - b.mean()), expert, other)
    return [(large, config), (expert, config), (make_params(shallow, 2, scale=0.05), shallow)]
