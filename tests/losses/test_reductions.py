"""Log-probabilities, masks and means; SFT; EWC."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egjax import losses


def test_importing_losses_needs_jax_alone():
    code = (
        "import sys, egjax.losses; "
        "heavy = {'flax', 'optax', 'orbax', 'mctx', 'transformers', 'grain'}; "
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_token_logps_by_hand():
    logits = jnp.log(jnp.array([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]])) + 7.0
    got = losses.token_logps(logits, jnp.array([2, 0]))
    np.testing.assert_allclose(got, np.log([0.5, 0.1]), rtol=1e-6)


def test_token_logps_in_f32_from_bf16_logits():
    logits = jnp.array([[0.0, 1.0, 2.0]], jnp.bfloat16)
    got = losses.token_logps(logits, jnp.array([1]))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, [1 - np.log(1 + np.e + np.e**2)], rtol=1e-6)


def test_padded_columns_change_nothing():
    key = jax.random.key(0)
    logits = jax.random.normal(key, (4, 5))
    targets = jnp.array([0, 4, 2, 1])
    padded = jnp.concatenate([logits, 9 + jnp.zeros((4, 3))], -1)
    np.testing.assert_allclose(
        losses.token_logps(padded, targets, jnp.arange(8) < 5),
        losses.token_logps(logits, targets),
        rtol=1e-6,
    )


def test_a_logit_of_minus_infinity_is_a_finite_log_0():
    logits = jnp.array([[0.5, -jnp.inf, 1.0]])
    got, grad = jax.value_and_grad(lambda x: losses.token_logps(x, jnp.array([1]))[0])(logits)
    assert got < -1e29
    assert bool(jnp.isfinite(got))
    assert bool(jnp.isfinite(grad).all())
    others = losses.token_logps(logits, jnp.array([2]))
    np.testing.assert_array_equal(others, losses.token_logps(logits[:, ::2], jnp.array([1])))


def test_sequence_logps_masked_equals_subset():
    logits = jax.random.normal(jax.random.key(0), (2, 6, 7))
    targets = jax.random.randint(jax.random.key(1), (2, 6), 0, 7)
    mask = jnp.array([[1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]], bool)
    total, length = losses.sequence_logps(logits, targets, mask)
    kept = np.array([0, 1, 4])
    want = losses.token_logps(logits[0, kept], targets[0, kept]).sum()
    np.testing.assert_allclose(total, [want, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(length, [3, 0])


def test_masked_mean_is_taken_once_from_sum_and_count():
    values = jnp.array([[1.0, 2.0, 3.0], [10.0, jnp.nan, jnp.inf]])
    mask = jnp.array([[True, True, True], [True, False, False]])
    assert losses.masked_mean(values, mask) == 4.0  # the mean of row means would be 6
    assert losses.masked_mean(values, jnp.zeros((2, 3), bool)) == 0.0


def test_sft_weights_tasks_and_masks_tokens():
    logits = jnp.log(jnp.array([[[0.25, 0.75], [0.5, 0.5]], [[0.1, 0.9], [0.9, 0.1]]]))
    targets = jnp.array([[0, 1], [0, 0]])
    mask = jnp.array([[True, False], [True, True]])
    got = losses.sft(logits, targets, mask, jnp.array([[2.0], [0.5]]))
    want = -np.array([[2 * np.log(0.25), 0.0], [0.5 * np.log(0.1), 0.5 * np.log(0.9)]])
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("full", [True, False])
def test_sft_gradient_is_finite_and_pushes_the_target_up(full):
    logits = jax.random.normal(jax.random.key(0), (3, 5)) * 50
    targets = jnp.array([0, 1, 2])
    mask = jnp.full(3, not full)
    grad = jax.grad(lambda x: losses.masked_mean(losses.sft(x, targets, mask), mask))(logits)
    assert bool(jnp.isfinite(grad).all())
    if full:
        np.testing.assert_array_equal(grad, 0)
    else:
        assert bool((jnp.take_along_axis(grad, targets[:, None], -1) <= 0).all())


def test_ewc_penalty_by_hand_and_its_gradient():
    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([[3.0]])}
    anchor = {"a": jnp.array([0.0, 2.0]), "b": jnp.array([[1.0]])}
    fisher = {"a": jnp.array([4.0, 9.0]), "b": jnp.array([[0.5]])}
    assert losses.ewc_penalty(params, anchor, fisher) == 0.5 * (4 + 0 + 0.5 * 4)
    grads = jax.grad(losses.ewc_penalty)(params, anchor, fisher)
    np.testing.assert_allclose(grads["a"], [4.0, 0.0])
    np.testing.assert_allclose(grads["b"], [[1.0]])
    assert losses.ewc_penalty(params, params, fisher) == 0


def test_fisher_of_a_bernoulli_is_p_times_one_minus_p():
    # For the logit θ of a coin, the Fisher information is σ(θ) σ(-θ); with tosses in exactly that
    # proportion the empirical one is the same.
    theta = jnp.log(jnp.array(0.25 / 0.75))
    tosses = jnp.array([1.0, 0.0, 0.0, 0.0])

    def logp(params, toss):
        z = params["theta"]
        return toss * jax.nn.log_sigmoid(z) + (1 - toss) * jax.nn.log_sigmoid(-z)

    fisher = jax.jit(lambda p, x: losses.fisher_diagonal(logp, p, x))({"theta": theta}, tosses)
    np.testing.assert_allclose(fisher["theta"], 0.25 * 0.75, rtol=1e-5)
    with pytest.raises(ValueError, match="no example"):
        losses.fisher_diagonal(logp, {"theta": theta}, tosses[:0])
