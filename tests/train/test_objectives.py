"""Objectives agree with sums taken by hand over each sample on its own."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from train_toy import VOCAB, apply, init, samples

from egjax import losses
from egjax.train.data import Pair, in_order, num_rows, pack, pad_pairs
from egjax.train.objectives import (
    Frozen,
    Taught,
    distill_to_ratio,
    distill_to_stored,
    next_token,
    preference,
    preference_with_initial,
    ratio_top_k,
    reference_logps,
)
from egjax.train.step import init_state, make_train_step

KEY = jax.random.key(0)
PAIRS = [
    Pair([1, 2, 3], [4, 5], [9, 9, 1]),
    Pair([7], [8, 9], [3]),
    Pair([0, 1], [2, 3, 4], [5, 0]),
]


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def logps_of(params, tokens):
    """Log-probabilities of every next token of one unpadded text; the toy model in numpy."""
    w = {name: np.asarray(value, np.float64) for name, value in params.items()}
    tokens = np.asarray(tokens)[:-1]
    x = w["embed"][tokens] + 0.1 * np.cos(np.arange(len(tokens)))[:, None]
    return log_softmax(np.tanh(x @ w["hidden"]) @ w["out"] + w["out_bias"])


def completion_logp(params, prompt, completion):
    rows = logps_of(params, [*prompt, *completion])
    return sum(rows[len(prompt) - 1 + i, token] for i, token in enumerate(completion))


def ratio(large, expert, anti_expert, alpha, clip, plausible):
    scores = large + alpha * np.clip(expert - anti_expert, -clip, clip)
    keep = np.exp(large) >= plausible * np.exp(large).max(-1, keepdims=True)
    return log_softmax(np.where(keep, scores, -np.inf)), keep


def test_next_token_is_the_weighted_sum_over_unpacked_samples():
    params, data = init(), samples(7)
    total, count, metrics = next_token(apply)(params, pack(data, 16), KEY, None)
    want = nll = tokens = 0
    for s in data:
        rows = logps_of(params, s.tokens)
        for i in range(1, len(s.tokens)):
            if s.mask[i]:
                want -= s.weight * rows[i - 1, s.tokens[i]]
                nll -= rows[i - 1, s.tokens[i]]
                tokens += 1
    np.testing.assert_allclose(total, want, rtol=1e-5)
    np.testing.assert_allclose(metrics["nll"][0], nll, rtol=1e-5)
    assert count == tokens


def test_distillation_is_the_divergence_to_the_ratio():
    student, data = init(3), samples(5)
    frozen = Frozen(init(0), init(1), init(2))
    options = {"alpha": 0.7, "clip": 0.5, "plausible": 0.3}
    loss_fn = distill_to_ratio(
        apply, apply, apply, divergence=partial(losses.reverse_kl, floor=-9.0), **options
    )
    total, count, metrics = loss_fn(student, pack(data, 16), KEY, frozen)
    want = right = 0.0
    for s in data:
        q = logps_of(student, s.tokens)
        p, keep = ratio(*[logps_of(params, s.tokens) for params in frozen], **options)
        values = (np.exp(q) * (q - np.where(keep, p, -9.0))).sum(-1)
        want += s.weight * values[np.array(s.mask[1:])].sum()
        right += (p.argmax(-1) == s.tokens[1:])[np.array(s.mask[1:])].sum()
    np.testing.assert_allclose(total, want, rtol=1e-4)
    assert metrics["teacher_accuracy"][0] == right
    assert count == sum(sum(s.mask[1:]) for s in data)


def test_distillation_does_not_move_the_teachers_and_reaches_them():
    frozen = Frozen(init(0), init(1), init(2))
    loss_fn = distill_to_ratio(apply, apply, apply)
    batch = pack(samples(5), 16)
    grads = jax.grad(lambda f: loss_fn(init(3), batch, KEY, f)[0])(frozen)
    assert all(not np.any(g) for g in jax.tree.leaves(grads))
    # With equal experts the target is the large model, where the student starts.
    same = Frozen(init(0), init(1), init(1))
    np.testing.assert_allclose(loss_fn(init(0), batch, KEY, same)[0], 0.0, atol=1e-5)
    tx = optax.adam(0.03)
    step = make_train_step(loss_fn, tx)
    state, first = init_state(frozen.large, tx), None
    for _ in range(60):
        state, metrics = step(state, batch, KEY, frozen)
        first = first or float(metrics["loss"])
    assert float(metrics["loss"]) < 0.2 * first


def test_paper_preference_by_hand():
    params, initial = init(1), init(0)
    loss_fn = preference_with_initial(
        apply, lambda p: losses.dpo_paper(p.chosen, p.rejected, beta=0.3), kl_weight=0.5
    )
    total, count, metrics = loss_fn(params, pad_pairs(PAIRS, 6), KEY, initial)
    want = kls = 0.0
    for pair in PAIRS:
        chosen = completion_logp(params, pair.prompt, pair.chosen)
        rejected = completion_logp(params, pair.prompt, pair.rejected)
        want += np.log1p(np.exp(-0.3 * (chosen - rejected)))
        for completion in (pair.chosen, pair.rejected):
            p = logps_of(params, [*pair.prompt, *completion])[len(pair.prompt) - 1 :]
            q = logps_of(initial, [*pair.prompt, *completion])[len(pair.prompt) - 1 :]
            kls += (np.exp(p) * (p - q)).sum() / 2
    np.testing.assert_allclose(total, want + 0.5 * kls, rtol=1e-5)
    np.testing.assert_allclose(metrics["kl"][0], kls, rtol=1e-5)
    assert count == 3


def standard(p):
    return losses.dpo(p.chosen, p.rejected, p.ref_chosen, p.ref_rejected, beta=0.3)


def test_reference_inside_and_precomputed_agree():
    params, initial, batch = init(1), init(0), pad_pairs(PAIRS, 6)
    filled = reference_logps(apply)(initial, batch)
    want = [completion_logp(initial, p.prompt, p.chosen) for p in PAIRS]
    np.testing.assert_allclose(filled.ref_chosen, np.array(want), rtol=1e-5)
    inside = preference_with_initial(apply, standard, kl_weight=0.0)(params, batch, KEY, initial)
    outside = preference(apply, standard)(params, filled, KEY, None)
    np.testing.assert_allclose(inside[0], outside[0], rtol=1e-5)
    assert inside[2]["accuracy"] == outside[2]["accuracy"]


def test_equal_models_give_log_two_and_padding_never_matters():
    params = init(0)
    loss_fn = preference_with_initial(apply, standard, kl_weight=1.0)
    table = pad_pairs(PAIRS, 6)
    total, count, _ = loss_fn(params, table, KEY, params)
    np.testing.assert_allclose(total / count, np.log(2), rtol=1e-5)
    (padded,) = in_order(pad_pairs(PAIRS, 9), num_rows(table) + 2)
    got, n, _ = loss_fn(init(1), padded, KEY, params)
    want, _, _ = loss_fn(init(1), table, KEY, params)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert n == 3
    got, n, _ = preference(apply, standard)(init(1), padded, KEY, None)
    want, _, _ = preference(apply, standard)(init(1), table, KEY, None)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert n == 3


@pytest.mark.parametrize("name", ["next_token", "distill", "preference"])
def test_gradients_are_finite_when_nothing_counts(name):
    frozen = Frozen(init(0), init(1), init(2))
    pairs = jax.tree.map(np.zeros_like, pad_pairs(PAIRS, 6))
    tokens = jax.tree.map(np.zeros_like, pack(samples(3), 16))
    loss_fn, batch, given = {
        "next_token": (next_token(apply), tokens, None),
        "distill": (distill_to_ratio(apply, apply, apply, plausible=0.9), tokens, frozen),
        "preference": (preference_with_initial(apply, standard, kl_weight=1.0), pairs, init(0)),
    }[name]
    run = jax.jit(jax.value_and_grad(lambda p: loss_fn(p, batch, KEY, given)[0]))
    value, grads = run(init(1))
    assert value == 0.0
    for g in jax.tree.leaves(grads):
        np.testing.assert_array_equal(g, 0.0)


def test_vocabulary_padding_changes_nothing():
    def wide(params, tokens, positions, segment_ids):
        logits = apply(params, tokens, positions, segment_ids)
        return jnp.concatenate([logits, jnp.full((*logits.shape[:2], 3), 9.0)], -1)

    mask = jnp.arange(VOCAB + 3) < VOCAB
    frozen = Frozen(init(0), init(1), init(2))
    tokens, pairs = pack(samples(3), 16), pad_pairs(PAIRS, 6)
    for plain, padded, batch, given in (
        (next_token(apply), next_token(wide, vocab_mask=mask), tokens, None),
        (
            distill_to_ratio(apply, apply, apply, plausible=0.2),
            distill_to_ratio(wide, wide, wide, plausible=0.2, vocab_mask=mask),
            tokens,
            frozen,
        ),
        (
            preference_with_initial(apply, standard, kl_weight=0.3),
            preference_with_initial(wide, standard, kl_weight=0.3, vocab_mask=mask),
            pairs,
            init(0),
        ),
    ):
        want = plain(init(3), batch, KEY, given)
        got = padded(init(3), batch, KEY, given)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)


def headed(params, tokens, positions, segment_ids):
    """The toy model without its last product (whose bias is zero)."""
    x = params["embed"][tokens] + 0.1 * jnp.cos(positions)[..., None]
    x = jnp.tanh(x @ params["hidden"]) * (segment_ids > 0)[..., None]
    return losses.Head(x, params["out"])


@pytest.mark.parametrize("masked", [False, True])
def test_z_loss_is_the_squared_normaliser_and_the_same_in_chunks(masked):
    params, batch = jax.tree.map(lambda x: 3 * x, init(3)), pack(samples(4), 16)
    mask = jnp.arange(VOCAB) < VOCAB - 2 if masked else None
    found = []
    for model in (apply, headed):
        plain = next_token(model, vocab_mask=mask)
        with_z = next_token(model, vocab_mask=mask, z_loss=0.3)
        value, grads = jax.value_and_grad(lambda p, f=with_z: f(p, batch, KEY, None)[0])(params)
        found.append((value, {k: g for k, g in grads.items() if k != "out_bias"}))
        metrics = with_z(params, batch, KEY, None)[2]
        np.testing.assert_allclose(metrics["nll"], plain(params, batch, KEY, None)[2]["nll"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found)
    logits = np.asarray(apply(params, batch.tokens, batch.positions, batch.segment_ids))
    logits = logits[..., : VOCAB - 2] if masked else logits
    extra = batch.weights * batch.mask * np.log(np.exp(logits).sum(-1)) ** 2
    want = (
        float(next_token(apply, vocab_mask=mask)(params, batch, KEY, None)[0]) + 0.3 * extra.sum()
    )
    np.testing.assert_allclose(found[0][0], want, rtol=1e-5)


@pytest.mark.parametrize("name", ["next_token", "distill", "preference", "with_initial"])
def test_models_that_give_heads_train_alike(name):
    def build(model):
        options = {"alpha": 0.7, "clip": 0.5, "plausible": 0.3, "vocab_mask": mask}
        return {
            "next_token": lambda: next_token(model, vocab_mask=mask),
            "distill": lambda: distill_to_ratio(model, model, model, **options),
            "preference": lambda: preference(model, standard, vocab_mask=mask),
            "with_initial": lambda: preference_with_initial(
                model, standard, kl_weight=0.4, vocab_mask=mask
            ),
        }[name]()

    mask = jnp.arange(VOCAB) < VOCAB - 1
    (pairs,) = in_order(pad_pairs(PAIRS, 6), len(PAIRS) + 1)
    batch = pack(samples(4), 16) if name in ("next_token", "distill") else pairs
    given = Frozen(init(0), init(1), init(2)) if name == "distill" else init(0)
    results = []
    for model in (apply, headed):
        loss_fn = build(model)
        grads = jax.grad(lambda p, fn=loss_fn: fn(p, batch, KEY, given)[0])(init(3))
        results.append((loss_fn(init(3), batch, KEY, given), grads))
    (want, want_grads), (found, grads) = results
    np.testing.assert_allclose(found[0], want[0], rtol=1e-5)
    assert found[1] == want[1]
    for metric, (total, count) in found[2].items():
        np.testing.assert_allclose(total, want[2][metric][0], rtol=1e-5, err_msg=metric)
        assert count == want[2][metric][1]
    for weight in ("embed", "hidden", "out"):
        np.testing.assert_allclose(grads[weight], want_grads[weight], atol=2e-6, err_msg=weight)


def test_reference_logps_from_heads():
    batch = pad_pairs(PAIRS, 6)
    want = reference_logps(apply)(init(0), batch)
    got = reference_logps(headed)(init(0), batch)
    np.testing.assert_allclose(got.ref_chosen, want.ref_chosen, rtol=1e-5)
    np.testing.assert_allclose(got.ref_rejected, want.ref_rejected, rtol=1e-5)


@pytest.mark.parametrize("model", [apply, headed], ids=["logits", "heads"])
def test_a_stored_teacher_and_the_temperature(model):
    frozen, student, batch = Frozen(init(0), init(1), init(2)), init(3), pack(samples(4), 16)
    ratio = {"alpha": 0.7, "clip": 0.5, "temperature": 1.3}
    options = {"divergence": losses.forward_kl, "terms": losses.forward_kl_terms}
    exact = distill_to_ratio(model, model, model, **options, **ratio)
    total, count, _ = exact(student, batch, KEY, frozen)
    want = 0.0
    for s in samples(4):
        q = log_softmax(logps_of(student, s.tokens) / 1.3)
        large, expert, anti = [logps_of(params, s.tokens) for params in frozen]
        p = log_softmax((large + 0.7 * np.clip(expert - anti, -0.5, 0.5)) / 1.3)
        want += s.weight * (np.exp(p) * (p - q)).sum(-1)[np.array(s.mask[1:])].sum()
    np.testing.assert_allclose(total, want, rtol=1e-4)
    loss_fn = distill_to_stored(model, temperature=1.3, **options)
    want_grads = jax.grad(lambda p: exact(p, batch, KEY, frozen)[0])(student)
    for k in (2, VOCAB - 1):
        top = ratio_top_k(headed, headed, k, **ratio)(frozen, batch)
        assert top.ids.shape == (*batch.tokens.shape, k)
        found, number, _ = loss_fn(student, Taught(batch, top), KEY, None)
        assert number == count
        assert found < total if k == 2 else np.allclose(found, total, rtol=1e-4)
    grads = jax.grad(lambda p: loss_fn(p, Taught(batch, top), KEY, None)[0])(student)
    for name in ("embed", "hidden", "out"):
        np.testing.assert_allclose(grads[name], want_grads[name], atol=1e-5, err_msg=name)
