"""A two-layer language model and a corpus small enough for tests."""

import jax
import jax.numpy as jnp
import numpy as np

from egjax.train.data import Sample, Shuffled, pack

VOCAB, WIDTH = 13, 8


def init(seed=0):
    a, b, c = jax.random.split(jax.random.key(seed), 3)
    return {
        "embed": 0.3 * jax.random.normal(a, (VOCAB, WIDTH)),
        "hidden": 0.3 * jax.random.normal(b, (WIDTH, WIDTH)),
        "out": 0.3 * jax.random.normal(c, (WIDTH, VOCAB)),
        "out_bias": jnp.zeros(VOCAB),
    }


def apply(params, tokens, positions, segment_ids):
    x = params["embed"][tokens] + 0.1 * jnp.cos(positions)[..., None]
    x = jnp.tanh(x @ params["hidden"]) * (segment_ids > 0)[..., None]
    return x @ params["out"] + params["out_bias"]


def samples(n=20, seed=0):
    """Counting modulo the vocabulary from a random start."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        length = int(rng.integers(4, 10))
        tokens = (rng.integers(VOCAB) + np.arange(length)) % VOCAB
        mask = np.arange(length) >= 2
        out.append(Sample(tokens.tolist(), mask.tolist(), float(rng.choice([0.5, 2.0]))))
    return out


def batches(seed=0, batch_size=4):
    return Shuffled(pack(samples(), 16), batch_size, seed)
