"""Preference losses by hand, by the sign of their gradients, and at their fixed points."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egjax import losses

# chosen, rejected, their references; lengths 4 and 5.
VALUES = (-10.0, -12.0, -11.0, -12.5)
LENGTHS = (4.0, 5.0)


def softplus(x):
    return np.log1p(np.exp(x))


def four(fn, **hyper):
    return lambda c, r, rc, rr, n, m: fn(c, r, rc, rr, **hyper)


# The log-ratio of the values above is h = (-10 + 11) - (-12 + 12.5) = 0.5.
LOSSES = {
    "dpo_paper": (
        lambda c, r, rc, rr, n, m: losses.dpo_paper(c, r, beta=0.1),
        softplus(-0.1 * 2.0),
    ),
    "dpo": (four(losses.dpo, beta=0.2), softplus(-0.1)),
    "cdpo": (four(losses.cdpo, beta=0.2, noise=0.1), 0.9 * softplus(-0.1) + 0.1 * softplus(0.1)),
    "robust": (
        four(losses.robust_dpo, beta=0.2, noise=0.1),
        (0.9 * softplus(-0.1) - 0.1 * softplus(0.1)) / 0.8,
    ),
    "ipo": (four(losses.ipo, tau=0.25), (0.5 - 2.0) ** 2),
    "ipo_averaged": (
        lambda c, r, rc, rr, n, m: losses.ipo(c, r, rc, rr, tau=0.25, lengths=(n, m)),
        (1.0 / 4 - 0.5 / 5 - 2.0) ** 2,
    ),
    "hinge": (four(losses.hinge, beta=0.2), 0.9),
    "simpo": (
        lambda c, r, rc, rr, n, m: losses.simpo(c, r, n, m, beta=2.0, gamma=0.5),
        softplus(0.5 - 2.0 * (-2.5 + 2.4)),
    ),
    "length_normalised": (
        lambda c, r, rc, rr, n, m: losses.length_normalised_dpo(c, r, rc, rr, n, m, beta=2.0),
        softplus(-2.0 * (0.25 - 0.1)),
    ),
    "dpo_positive": (four(losses.dpo_positive, beta=0.3, penalty=5.0), softplus(-0.15)),
    "rpo": (
        lambda c, r, rc, rr, n, m: losses.rpo(c, r, rc, rr, n, beta=0.2, nll_weight=0.5),
        softplus(-0.1) + 0.5 * 10.0 / 4,
    ),
}
each = pytest.mark.parametrize(("fn", "want"), LOSSES.values(), ids=LOSSES.keys())


@each
def test_by_hand(fn, want):
    loss, metrics = fn(*VALUES, *LENGTHS)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert (metrics.chosen_logps, metrics.rejected_logps) == (-10.0, -12.0)
    assert metrics.accuracy == (metrics.margin > 0)


@each
def test_gradient_raises_chosen_and_lowers_rejected(fn, want):
    grads = jax.grad(lambda *a: fn(*a)[0], argnums=(0, 1, 2, 3))(*VALUES, *LENGTHS)
    assert grads[0] < 0 < grads[1]
    assert grads[2] == grads[3] == 0.0  # the reference is stopped


@each
def test_batch_equals_loop_under_jit_and_vmap(fn, want):
    rng = np.random.default_rng(0)
    args = [jnp.asarray(-rng.uniform(1, 20, 6), jnp.float32) for _ in range(4)]
    args += [jnp.arange(1.0, 7.0), jnp.arange(7.0, 1.0, -1.0)]
    whole = fn(*args)[0]
    np.testing.assert_allclose(jax.jit(jax.vmap(fn))(*args)[0], whole, rtol=1e-5)
    loop = [fn(*[a[i] for a in args])[0] for i in range(6)]
    np.testing.assert_allclose(whole, np.array(loop), rtol=1e-5)


@each
def test_extreme_values_stay_finite(fn, want):
    args = (-4000.0, -3.0, -3.0, -4000.0, 0.0, 0.0)
    value, grads = jax.value_and_grad(lambda *a: fn(*a)[0], argnums=(0, 1))(*args)
    assert np.isfinite([value, *grads]).all()


@pytest.mark.parametrize("fn", [losses.dpo, losses.cdpo, losses.robust_dpo, losses.dpo_positive])
def test_equal_models_give_log_two(fn):
    loss, metrics = fn(-7.0, -9.0, -7.0, -9.0)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    assert metrics.margin == metrics.accuracy == 0.0


def test_length_normalised_dpo_of_equal_models_is_log_two():
    loss, _ = losses.length_normalised_dpo(-7.0, -9.0, -7.0, -9.0, 3.0, 5.0)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)


def test_conservative_dpo_turns_round_past_its_margin():
    grad = jax.grad(lambda c: losses.cdpo(c, 0.0, 0.0, 0.0, beta=1.0, noise=0.1)[0])
    turn = np.log(0.9 / 0.1)
    assert grad(turn - 0.1) < 0 < grad(turn + 0.1)


@pytest.mark.parametrize("noise", [0.5, 1, -0.1])
def test_robust_dpo_refuses_a_noise_that_hides_all(noise):
    with pytest.raises(ValueError, match=r"is not at least 0 and less than 0\.5"):
        losses.robust_dpo(-1.0, -2.0, -1.0, -2.0, noise=noise)


def test_robust_dpo_is_unbiased_under_swapped_labels():
    noise, args = 0.2, VALUES
    kept = losses.robust_dpo(*args, beta=0.3, noise=noise)[0]
    swapped = losses.robust_dpo(args[1], args[0], args[3], args[2], beta=0.3, noise=noise)[0]
    clean = losses.dpo(*args, beta=0.3)[0]
    np.testing.assert_allclose((1 - noise) * kept + noise * swapped, clean, rtol=1e-5)


def test_hinge_is_flat_beyond_the_margin_and_ipo_comes_back():
    assert jax.grad(lambda c: losses.hinge(c, 0.0, 0.0, 0.0, beta=1.0)[0])(1.5) == 0
    assert jax.grad(lambda c: losses.ipo(c, 0.0, 0.0, 0.0, tau=0.5)[0])(1.5) > 0


def test_dpo_positive_punishes_displacement():
    # The same h, once with both log-probabilities fallen.
    held = losses.dpo_positive(-10.0, -13.0, -10.0, -12.0, penalty=5.0)[0]
    fallen = losses.dpo_positive(-12.0, -15.0, -10.0, -12.0, penalty=5.0)[0]
    assert fallen > held
    np.testing.assert_allclose(fallen, softplus(-0.3 * (1 - 5 * 2.0)), rtol=1e-5)
    grads = jax.grad(
        lambda c, r: losses.dpo_positive(c, r, -10.0, -12.0, penalty=5.0)[0], argnums=(0, 1)
    )(-12.0, -15.0)
    assert grads[0] < 0 < grads[1]
    np.testing.assert_allclose(held, losses.dpo(-10.0, -13.0, -10.0, -12.0, beta=0.3)[0])


def test_kl_to_initial_is_the_expectation_over_all_tokens():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 4))
    initial = jax.random.normal(jax.random.key(1), (2, 3, 4))
    mask = jnp.array([[True, True, False], [False, False, False]])
    got = losses.kl_to_initial(logits, initial, mask)
    p, q = jax.nn.log_softmax(logits), jax.nn.log_softmax(initial)
    want = sum(
        float(jnp.exp(p[0, t, v]) * (p[0, t, v] - q[0, t, v])) for t in range(2) for v in range(4)
    )
    np.testing.assert_allclose(got, [want, 0.0], rtol=1e-5)
    np.testing.assert_allclose(losses.kl_to_initial(logits, logits, mask), 0.0, atol=1e-6)
    grad = jax.grad(lambda x: losses.kl_to_initial(x, initial, mask).sum())(logits)
    assert bool(jnp.isfinite(grad).all())
    np.testing.assert_array_equal(grad[1], 0.0)
