"""The linear probe against scipy, and what it may and may not find."""

import functools

import jax
import numpy as np
import pytest
from scipy.optimize import minimize

from egjax.evals.probing import ProbeConfig, fit, probe, split

CLASSES, WIDTH, ROWS = 3, 6, 90


@pytest.fixture(scope="module")
def data():
    """Layer 0 is noise, layer 1 holds the label with noise, layer 2 holds it plainly."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, ROWS)
    means = rng.normal(0, 1, (CLASSES, WIDTH))
    noise = rng.normal(0, 1, (3, ROWS, WIDTH))
    hidden = np.stack([noise[0], 0.7 * means[labels] + noise[1], 9 * means[labels] + noise[2]])
    return hidden.astype(np.float32), labels


def scipy_fit(x, labels, train, l2):
    """The same convex problem by another solver; returns the logits of every row."""
    mean, spread = x[train].mean(0), x[train].std(0)
    x = (x - mean) / spread
    hot = np.eye(CLASSES)[labels]

    def loss(flat):
        w, b = flat[:-CLASSES].reshape(WIDTH, CLASSES), flat[-CLASSES:]
        logits = x @ w + b
        logps = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        slope = (np.exp(logps) - hot)[train] / train.sum()
        gradient = np.concatenate([(x[train].T @ slope + l2 * w).ravel(), slope.sum(0)])
        return -(logps * hot)[train].sum() / train.sum() + 0.5 * l2 * (w**2).sum(), gradient

    start = np.zeros(CLASSES * (WIDTH + 1))
    flat = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 2000}).x
    return x @ flat[:-CLASSES].reshape(WIDTH, CLASSES) + flat[-CLASSES:]


CONFIG = ProbeConfig(iterations=60, seed=1)  # one shape throughout: compiled once


def run(hidden, labels):
    return probe(hidden, list(labels), list(range(ROWS)), CONFIG)


def test_finds_the_same_optimum_as_scipy(data):
    hidden, labels = data
    result = run(hidden, labels)
    train = ~np.isin(np.arange(ROWS), result.tests)
    # The probe numbers labels by first appearance; softmax does not care.
    for layer, right in zip(hidden, result.correct):
        logits = scipy_fit(layer.astype(np.float64), labels, train, CONFIG.l2)[result.tests]
        best = np.sort(logits, axis=1)
        clear = best[:, -1] - best[:, -2] > 1e-2
        assert clear.mean() > 0.9
        expected = logits.argmax(1) == labels[result.tests]
        np.testing.assert_array_equal(right[clear], expected[clear])


def test_reads_what_is_there_and_nothing_else(data):
    result = run(*data)
    accuracy = [figure.value for figure in result.accuracy]
    assert accuracy[0] < 0.65
    assert accuracy[0] < accuracy[1] < accuracy[2] == 1.0
    assert result.correct.shape == (3, 27)
    assert all(figure.n == 27 for figure in result.accuracy)


def test_majority_is_the_most_frequent_training_label(data):
    hidden, labels = data
    skewed = np.where(np.arange(ROWS) % 3 == 0, 2, labels)
    result = run(hidden, skewed)
    train = np.setdiff1d(np.arange(ROWS), result.tests)
    common = np.bincount(skewed[train]).argmax()
    assert result.majority.value == (skewed[result.tests] == common).mean()


def test_a_layer_does_not_hear_the_others(data):
    hidden, labels = data
    together = run(hidden, labels).correct
    for i, layer in enumerate(hidden):
        alone = run(np.stack([layer] * 3), labels).correct
        np.testing.assert_array_equal(alone, np.stack([together[i]] * 3))


def test_a_constant_feature_does_no_harm(data):
    hidden, labels = data
    changed = hidden.copy()
    changed[0, :, :] = 5.0
    changed[2, :, 0] = 5.0
    accuracy = run(changed, labels).accuracy
    assert accuracy[2].value > 0.9
    assert 0 < accuracy[0].value < 0.65


def test_test_labels_are_never_learned_from(data):
    """Changing the test rows' labels must not change any prediction."""
    hidden, labels = data
    train = np.arange(ROWS) < 60
    learn = jax.jit(functools.partial(fit, classes=CLASSES, iterations=20))
    changed = np.where(train, labels, (labels + 1) % CLASSES)
    np.testing.assert_array_equal(
        learn(hidden[1], labels, train, 0.01), learn(hidden[1], changed, train, 0.01)
    )


def test_split_keeps_items_together():
    items = [f"file{i % 20}" for i in range(100)]
    test = split(items, test_share=0.3, seed=0)
    sides = {item: {t for i, t in zip(items, test) if i == item} for item in items}
    assert all(len(side) == 1 for side in sides.values())
    assert sum(True in side for side in sides.values()) == 6
    assert (test == split(items, test_share=0.3, seed=0)).all()
    assert (test != split(items, test_share=0.3, seed=1)).any()


def test_refuses_what_cannot_be_split():
    with pytest.raises(ValueError, match="too few"):
        probe(np.zeros((1, 2, 3)), [0, 1], ["same", "same"], ProbeConfig())
    with pytest.raises(ValueError, match="labels"):
        probe(np.zeros((1, 2, 3)), [0], ["a", "b"], ProbeConfig())
