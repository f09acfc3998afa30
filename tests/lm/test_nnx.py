import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from egjax.lm.model import forward
from egjax.lm.nnx import Llama


def test_module_is_the_function(config, params, tokens):
    model = Llama(config, params)
    np.testing.assert_array_equal(model(tokens), forward(params, config, tokens))
    _, hidden = model(tokens, return_hidden=True)
    assert hidden.shape[0] == config.num_layers + 1


def test_gradients_and_updates_reach_the_parameters(config, params, tokens):
    model = Llama(config, params)

    def loss(model):
        return jax.nn.log_softmax(model(tokens))[..., 3].mean()

    def pure_loss(params):
        return jax.nn.log_softmax(forward(params, config, tokens))[..., 3].mean()

    ours = nnx.jit(nnx.grad(loss))(model)
    expected = jax.jit(jax.grad(pure_loss))(params)
    got = nnx.pure(ours)["params"]
    np.testing.assert_allclose(got["embedding"], expected["embedding"], atol=1e-6)
    np.testing.assert_allclose(got["layers"]["gate"], expected["layers"]["gate"], atol=1e-6)
    nnx.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model)))
    assert not np.asarray(model(tokens)).any()
