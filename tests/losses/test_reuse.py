"""What other projects do with the losses: map them over devices, differentiate twice, mistake."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from egjax import losses
from egjax.losses import Head, Ratio, Targets, chunked_loss, chunked_token_logps, forward_kl_terms

KEYS = jax.random.split(jax.random.key(0), 2)


def case(tokens: int, width: int = 16, vocabulary: int = 24):
    hidden = jax.random.normal(KEYS[0], (tokens, width))
    matrix = 0.3 * jax.random.normal(KEYS[1], (width, vocabulary))
    return hidden, matrix, jnp.arange(tokens) % vocabulary


@pytest.mark.parametrize("tokens", [8, 64], ids=["in the gradient's place", "a few at a time"])
def test_devices_that_share_the_weights(tokens):
    hidden, matrix, targets = case(8 * tokens)
    mesh = Mesh(np.array(jax.devices()), ("data",))

    def chunked(matrix, hidden, targets):
        ones = jnp.ones(targets.shape)
        head = Head(hidden, matrix)
        return chunked_loss(head, Targets(targets), ones, terms=forward_kl_terms)[0]

    def plain(matrix, hidden, targets):
        return losses.sft(hidden @ matrix, targets, jnp.ones(targets.shape, bool)).sum()

    def gradient(loss):
        inside = jax.shard_map(
            jax.value_and_grad(lambda *x: jax.lax.psum(loss(*x), "data"), argnums=(0, 1)),
            mesh=mesh,
            in_specs=(P(), P("data"), P("data")),
            out_specs=(P(), (P(), P("data"))),
        )
        return jax.jit(inside)(matrix, hidden, targets)

    for ours, theirs in zip(
        jax.tree.leaves(gradient(chunked)), jax.tree.leaves(gradient(plain)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


def test_a_second_derivative_is_right_or_refused():
    def chunked(hidden, matrix, targets):
        return -chunked_token_logps(Head(hidden, matrix), targets).sum()

    def plain(hidden, matrix, targets):
        return -losses.token_logps(hidden @ matrix, targets).sum()

    hidden, matrix, targets = case(8)
    with pytest.raises(ValueError, match="no second derivatives"):
        jax.jacrev(jax.grad(lambda h: chunked(h, matrix, targets)))(hidden)
    hidden, matrix, targets = case(64)
    ours, theirs = (
        jax.jacrev(jax.grad(lambda h, f=f: f(h, matrix, targets)))(hidden) for f in (chunked, plain)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("bad", [-1, -24, 24, -100])
def test_a_label_that_is_no_token_counts_as_nan_or_not_at_all(bad):
    hidden, matrix, targets = case(4)
    targets, mask = targets.at[1].set(bad), jnp.array([True, False, True, True])
    logits = hidden @ matrix
    assert jnp.isnan(losses.token_logps(logits, targets)[1])
    assert jnp.isnan(chunked_token_logps(Head(hidden, matrix), targets)[1])
    value, gradient = jax.value_and_grad(lambda x: losses.sft(x, targets, mask).sum())(logits)
    good = losses.sft(logits, targets.at[1].set(0), mask).sum()
    assert value == good
    assert bool(jnp.isfinite(gradient).all())
    assert not gradient[1].any()


def test_shapes_that_would_be_broadcast_are_refused():
    pair = jnp.zeros(4), jnp.zeros(4)
    with pytest.raises(ValueError, match=r"ref_chosen \(4, 1\)"):
        losses.dpo(*pair, jnp.zeros((4, 1)), jnp.zeros((4, 1)))
    with pytest.raises(ValueError, match=r"chosen \(4,\), rejected \(4, 1\)"):
        losses.dpo_paper(pair[0], jnp.zeros((4, 1)))
    assert losses.dpo(*pair, 0.0, 0.0)[0].shape == (4,)
    with pytest.raises(ValueError, match=r"logits \(2, 3\), targets \(2, 1\)"):
        losses.sft(jnp.zeros((2, 3, 5)), jnp.zeros((2, 1), int), jnp.ones((2, 1), bool))


def test_no_token_costs_nothing():
    hidden, matrix, targets = case(0)
    head = Head(hidden, matrix)
    total, each = chunked_loss(head, Targets(targets), jnp.ones(0), terms=forward_kl_terms)
    assert total == 0
    assert each.shape == (0,)
    assert chunked_token_logps(head, targets).shape == (0,)


@pytest.mark.parametrize("wide", [False, True], ids=["32 bits", "64 bits"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_strict_promotion_and_64_bits_change_nothing(dtype, wide):
    cases = [case(64, width) for width in (16, 96)]  # a few at a time, in the gradient's place
    mask = jnp.array([True, True, True, False] * 16)

    def everything():
        found = []
        for hidden, matrix, targets in cases:
            student, expert, anti = (
                Head((seed * hidden).astype(dtype), matrix.astype(dtype)) for seed in (1, 2, 3)
            )
            teacher = Ratio(student, expert, anti, alpha=0.5, clip=np.log(2.0), plausible=0.1)

            def loss(head, teacher=teacher, targets=targets):
                logits = head.hidden @ head.unembedding
                some = losses.sft(logits, targets, mask, 0.5)
                logps = chunked_token_logps(head, targets).reshape(4, 16).sum(-1)
                length = mask.reshape(4, 16).sum(-1)
                pair = (logps[:2], logps[2:], length[:2], length[2:])
                kl, _ = chunked_loss(head, teacher, 1.0, terms=losses.reverse_kl_terms)
                return losses.masked_mean(some, mask) + losses.simpo(*pair)[0].sum() + kl

            found += [*jax.tree.leaves(jax.value_and_grad(loss)(student))]
        return found

    plain = everything()
    with jax.enable_x64(wide), jax.numpy_dtype_promotion("strict"):
        strict = everything()
    for ours, theirs in zip(plain, strict, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
