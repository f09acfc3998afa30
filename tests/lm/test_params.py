import jax
import numpy as np
import pytest

from egjax.lm.params import abstract, count, init


@pytest.fixture(scope="module")
def made(config):
    return init(jax.random.key(0), config)


def test_initial_values_have_the_tables_shapes(config, made):
    promised = abstract(config)
    assert jax.tree.structure(made) == jax.tree.structure(promised)
    for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(promised)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert count(config) == sum(leaf.size for leaf in jax.tree.leaves(made))


def test_initial_scale_is_that_of_the_fan_in(made):
    layers = made["layers"]
    np.testing.assert_allclose(np.std(layers["query"]), 24**-0.5, rtol=0.1)
    np.testing.assert_allclose(np.std(layers["output"]), (32 * 2 * 3) ** -0.5, rtol=0.1)
    assert not np.array_equal(layers["query"][0], layers["query"][1])


def test_same_key_same_values(config, made):
    again, other = init(jax.random.key(0), config), init(jax.random.key(6), config)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, made, again)))
    assert not np.array_equal(made["embedding"], other["embedding"])
