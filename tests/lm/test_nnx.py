import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from egjax.errors import EgjaxError
from egjax.lm.model import forward
from egjax.lm.nnx import Llama, TunixLlama


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


def test_masks_of_tunix_say_the_same_as_segments(config, params, tokens):
    segments = np.ones((3, 12), np.int32)
    segments[0, :3] = segments[1, 9:] = 0  # padding before and behind
    segments[2, 5:] = 2
    same = segments[:, :, None] == segments[:, None, :]
    mask = np.tril(same) & (segments != 0)[:, None, :]
    model = TunixLlama(config, params)
    logits, cache = model(tokens, np.arange(12)[None], None, mask)
    assert cache is None
    expected = forward(params, config, tokens, np.arange(12)[None], segments)
    real = segments > 0
    np.testing.assert_allclose(logits[real], expected[real], atol=1e-6)
    with pytest.raises(EgjaxError, match="cache"):
        model(tokens, cache={})


def test_a_trainer_of_tunix_takes_the_module_live(config, make_params):
    dpo = pytest.importorskip("tunix.sft.dpo.dpo_trainer")
    params = make_params(config, scale=0.2)
    policy, reference = (TunixLlama(config, jax.tree.map(jnp.copy, params)) for _ in range(2))
    trainer = dpo.DPOTrainer(
        model=policy,
        ref_model=reference,
        optimizer=optax.sgd(0.1),
        training_config=dpo.DPOTrainingConfig(eval_every_n_steps=100, max_steps=10, beta=0.1),
    )
    train_step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)
    rng = np.random.default_rng(0)

    def part(width):
        tokens = rng.integers(3, config.vocab_size, (2, width)).astype(np.int32)
        return tokens, np.ones(tokens.shape, np.int32)

    batch = dpo.TrainingInput(*part(6), *part(4), *part(4))
    losses = [float(train_step(trainer._prepare_inputs(batch))[0]) for _ in range(3)]
    np.testing.assert_allclose(losses[0], np.log(2), rtol=1e-5)  # policy and reference are equal
    assert losses[2] < losses[1] < losses[0]
    trained = jax.tree.leaves(nnx.state(policy.params))
    moved = [np.abs(a - b).max() for a, b in zip(trained, jax.tree.leaves(params), strict=True)]
    assert min(moved) > 0
