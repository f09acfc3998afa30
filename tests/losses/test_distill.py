"""Divergences against brute force, hand-computed numbers and their limits; the behaviour ratio."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egjax import losses

DIVERGENCES = {
    "reverse_kl": losses.reverse_kl,
    "forward_kl": losses.forward_kl,
    "jsd_0.3": partial(losses.generalised_jsd, beta=0.3),
    "jsd_0": partial(losses.generalised_jsd, beta=0.0),
    "jsd_1": partial(losses.generalised_jsd, beta=1.0),
    "skewed_forward": losses.skewed_forward_kl,
    "skewed_reverse": losses.skewed_reverse_kl,
}
divergence = pytest.mark.parametrize("fn", DIVERGENCES.values(), ids=DIVERGENCES.keys())


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def brute_kl(p, q):
    """Term by term in float64, by the definition."""
    total = 0.0
    for a, b in zip(p, q):
        if a > 0:
            total += a * np.log(a / b)
    return total


def pair(seed=0, shape=(4, 11), scale=3.0):
    a, b = jax.random.split(jax.random.key(seed))
    return scale * jax.random.normal(a, shape), scale * jax.random.normal(b, shape)


def test_by_hand():
    student, teacher = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    np.testing.assert_allclose(
        losses.reverse_kl(student, teacher), 0.5 * np.log(2) + 0.5 * np.log(2 / 3), rtol=1e-6
    )
    np.testing.assert_allclose(
        losses.forward_kl(student, teacher), 0.25 * np.log(0.5) + 0.75 * np.log(1.5), rtol=1e-6
    )


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_against_brute_force(temperature):
    student, teacher = pair()
    teacher = jax.nn.log_softmax(teacher)
    q = softmax(np.asarray(student, np.float64) / temperature)
    p = softmax(np.asarray(teacher, np.float64) / temperature)
    beta, skew = 0.3, 0.1
    for row in range(4):
        m = beta * p[row] + (1 - beta) * q[row]
        want = {
            "reverse_kl": brute_kl(q[row], p[row]),
            "forward_kl": brute_kl(p[row], q[row]),
            "jsd_0.3": beta * brute_kl(p[row], m) + (1 - beta) * brute_kl(q[row], m),
            "jsd_0": brute_kl(p[row], q[row]),
            "jsd_1": brute_kl(q[row], p[row]),
            "skewed_forward": brute_kl(p[row], skew * p[row] + (1 - skew) * q[row]),
            "skewed_reverse": brute_kl(q[row], (1 - skew) * p[row] + skew * q[row]),
        }
        for name, fn in DIVERGENCES.items():
            got = fn(student[row], teacher[row], temperature=temperature)
            np.testing.assert_allclose(got, want[name], rtol=2e-5, err_msg=name)


@divergence
def test_of_equal_models_is_zero_with_zero_gradient(fn):
    student, _ = pair()
    teacher = jax.nn.log_softmax(student)
    np.testing.assert_allclose(fn(student, teacher), 0.0, atol=1e-6)
    grad = jax.grad(lambda x: fn(x, teacher).sum())(student)
    np.testing.assert_allclose(grad, 0.0, atol=1e-6)


@divergence
def test_is_positive_and_teacher_is_stopped(fn):
    student, teacher = pair(1)
    assert bool((fn(student, teacher) > 0).all())
    grads = jax.grad(lambda s, t: fn(s, t).sum(), argnums=(0, 1))(student, teacher)
    assert float(jnp.abs(grads[0]).max()) > 1e-3
    np.testing.assert_array_equal(grads[1], 0.0)


@divergence
def test_gradient_against_finite_differences(fn):
    student, teacher = pair(2, (5,), 1.0)
    grad = jax.grad(lambda x: fn(x, teacher))(student)
    direction = jax.random.normal(jax.random.key(9), (5,))
    h = 1e-2
    slope = (fn(student + h * direction, teacher) - fn(student - h * direction, teacher)) / (2 * h)
    np.testing.assert_allclose(jnp.vdot(grad, direction), slope, atol=2e-3)


@divergence
def test_left_out_tokens_give_no_nan(fn):
    student, teacher = pair(3)
    student = student * 20  # some probabilities underflow to exactly 0
    teacher = jax.nn.log_softmax(jnp.where(jnp.arange(11) % 3 == 0, -jnp.inf, teacher))
    value, grad = jax.value_and_grad(lambda x: fn(x, teacher).sum())(student)
    assert bool(jnp.isfinite(value))
    assert bool(jnp.isfinite(grad).all())


@divergence
def test_a_broken_teacher_or_student_is_not_left_out(fn):
    student, teacher = pair(3)
    broken = teacher.at[1, 4].set(jnp.nan)
    value, grad = jax.value_and_grad(lambda x: fn(x, broken)[1])(student)
    assert bool(jnp.isnan(value))
    assert bool(jnp.isnan(grad[1]).any())
    assert bool(jnp.isfinite(fn(student, broken)[0]))
    assert bool(jnp.isnan(fn(broken, teacher)[1]))


def test_reverse_kl_moves_mass_into_the_plausible_set():
    teacher = jax.nn.log_softmax(jnp.array([0.0, 0.0, -jnp.inf]))
    student = jnp.zeros(3)
    grad = jax.grad(lambda x: losses.reverse_kl(x, teacher))(student)
    assert grad[2] > 0 > grad[0]
    outside = losses.reverse_kl(student, teacher, floor=-20.0) - losses.reverse_kl(
        student, teacher, floor=-10.0
    )
    np.testing.assert_allclose(outside, 10 / 3, rtol=1e-5)


@divergence
def test_padded_columns_change_nothing(fn):
    student, teacher = pair(4)
    junk = jnp.concatenate([student, jnp.full((4, 5), 8.0)], -1)
    teacher_junk = jnp.concatenate([teacher, jnp.full((4, 5), 9.0)], -1)
    mask = jnp.arange(16) < 11

    def padded(x):
        return fn(x, teacher_junk, vocab_mask=mask)

    np.testing.assert_allclose(padded(junk), fn(student, teacher), rtol=1e-5)
    grad = jax.grad(lambda x: padded(x).sum())(junk)
    want = jax.grad(lambda x: fn(x, teacher).sum())(student)
    np.testing.assert_allclose(grad[:, :11], want, atol=1e-6)
    np.testing.assert_array_equal(grad[:, 11:], 0.0)


@divergence
def test_columns_of_minus_infinity_are_as_good_as_masked(fn):
    student, teacher = pair(4)
    mask = jnp.arange(11) < 8
    marked, marked_teacher = (jnp.where(mask, x, -jnp.inf) for x in (student, teacher))
    value, grad = jax.value_and_grad(lambda x: fn(x, marked_teacher).sum())(marked)
    want, want_grad = jax.value_and_grad(lambda x: fn(x, teacher, vocab_mask=mask).sum())(student)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(grad, want_grad, rtol=0, atol=2e-8)
    np.testing.assert_array_equal(grad[:, 8:], 0.0)


@divergence
def test_batch_equals_loop_under_jit_and_vmap(fn):
    student, teacher = pair(5, (2, 3, 7))
    batched = jax.jit(jax.vmap(jax.vmap(fn)))(student, teacher)
    loop = [[fn(student[i, j], teacher[i, j]) for j in range(3)] for i in range(2)]
    np.testing.assert_allclose(batched, np.array(loop), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(fn(student, teacher), np.array(loop), rtol=1e-5, atol=1e-6)


def test_jsd_slopes_at_its_ends_are_the_two_kls():
    student, teacher = pair(6, (3, 6), 1.0)
    small = 1e-3
    low = losses.generalised_jsd(student, teacher, beta=small) / small
    high = losses.generalised_jsd(student, teacher, beta=1 - small) / small
    np.testing.assert_allclose(low, losses.forward_kl(student, teacher), rtol=2e-2)
    np.testing.assert_allclose(high, losses.reverse_kl(student, teacher), rtol=2e-2)


@pytest.mark.parametrize("beta", [1.5, -0.5, float("nan")])
def test_jsd_refuses_weights_that_are_none(beta):
    with pytest.raises(ValueError, match="is not between 0 and 1"):
        losses.generalised_jsd(*pair(), beta=beta)


def test_jsd_is_symmetric_at_one_half_and_bounded():
    student, teacher = pair(7, (5, 8), 30.0)
    forth = losses.generalised_jsd(student, teacher)
    np.testing.assert_allclose(forth, losses.generalised_jsd(teacher, student), rtol=1e-5)
    assert bool((forth <= np.log(2) + 1e-6).all())


def test_ratio_by_hand():
    large = jnp.log(jnp.array([0.5, 0.3, 0.2])) + 3.0
    expert = jnp.log(jnp.array([0.2, 0.6, 0.2])) - 1.0
    anti = jnp.log(jnp.array([0.4, 0.2, 0.4])) + 5.0
    want = np.array([0.25, 0.9, 0.1])
    got = losses.behaviour_ratio(large, expert, anti)
    np.testing.assert_allclose(jnp.exp(got), want / want.sum(), rtol=1e-5)
    # ln 3 is cut to ln 2, -ln 2 stays
    want = np.array([0.25, 0.6, 0.1])
    got = losses.behaviour_ratio(large, expert, anti, clip=np.log(2.0))
    np.testing.assert_allclose(jnp.exp(got), want / want.sum(), rtol=1e-5)
    # 0.2 < 0.5 · 0.5 leaves
    want = np.array([0.25, 0.9, 0.0])
    got = losses.behaviour_ratio(large, expert, anti, plausible=0.5)
    np.testing.assert_allclose(jnp.exp(got), want / want.sum(), rtol=1e-5)
    assert got[2] == -jnp.inf


def test_ratio_identities():
    large, expert = pair(8)
    want = jax.nn.log_softmax(large)
    np.testing.assert_allclose(losses.behaviour_ratio(large, expert, expert), want, atol=1e-5)
    other, _ = pair(9)
    got = losses.behaviour_ratio(large, expert, other, alpha=0.0)
    np.testing.assert_allclose(got, want, atol=1e-5)
    # If the large model is the anti-expert, the expert comes out.
    got = losses.behaviour_ratio(other, expert, other)
    np.testing.assert_allclose(got, jax.nn.log_softmax(expert), atol=2e-5)


def test_ratio_does_not_depend_on_offsets_even_when_clipped():
    large, expert = pair(10)
    anti, _ = pair(11)
    plain = losses.behaviour_ratio(large, expert, anti, clip=1.0, plausible=0.1)
    moved = losses.behaviour_ratio(large + 4, expert - 30, anti + 2, clip=1.0, plausible=0.1)
    np.testing.assert_allclose(plain, moved, atol=1e-4)


def test_ratio_ignores_padded_columns():
    large, expert = pair(12)
    anti, _ = pair(13)

    def pad(x, value):
        return jnp.concatenate([x, jnp.full((4, 2), value)], -1)

    got = losses.behaviour_ratio(
        pad(large, 50.0), pad(expert, 3.0), pad(anti, -9.0), vocab_mask=jnp.arange(13) < 11
    )
    want = losses.behaviour_ratio(large, expert, anti)
    np.testing.assert_allclose(got[:, :11], want, atol=1e-5)
    assert bool((got[:, 11:] == -jnp.inf).all())


def test_ratio_of_columns_of_minus_infinity_is_as_good_as_masked():
    large, expert = pair(12)
    anti, _ = pair(13)
    mask = jnp.arange(11) < 8
    marked = [jnp.where(mask, x, -jnp.inf) for x in (large, expert, anti)]
    got = losses.behaviour_ratio(*marked, clip=1.0)
    want = losses.behaviour_ratio(large, expert, anti, clip=1.0, vocab_mask=mask)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    # What the large model leaves out stays out, also where the small one had left it out as well.
    got = losses.behaviour_ratio(marked[0], expert, marked[2])
    np.testing.assert_array_equal(got == -jnp.inf, jnp.broadcast_to(~mask, got.shape))
    np.testing.assert_allclose(jnp.exp(got).sum(-1), 1.0, rtol=1e-5)


def test_distilling_to_a_plausible_ratio_converges_to_it():
    large, expert = pair(14, (6,), 1.0)
    anti, _ = pair(15, (6,), 1.0)
    teacher = losses.behaviour_ratio(large, expert, anti, plausible=0.3)
    student = large
    grad = jax.jit(jax.grad(lambda x: losses.reverse_kl(x, teacher)))
    for _ in range(400):
        student = student - 0.5 * grad(student)
    np.testing.assert_allclose(jax.nn.softmax(student), jnp.exp(teacher), atol=0.02)
