"""What a layer knows: a linear probe on the hidden states of every layer at once.

Alain and Bengio, "Understanding intermediate layers using linear classifier probes" (2016);
claim (d) of arXiv 2506.01312: task information appears in late layers after post-training.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from egjax.evals.intervals import Figure, measure

__all__ = ["ProbeConfig", "ProbeResult", "fit", "probe", "split"]

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """Chosen before anything is measured and the same for every model and layer.

    Attributes:
        l2: weight of half the squared norm of the weights in the mean loss (features have unit
            variance).
        iterations: of L-BFGS; the loss is convex.
        test_share: share of the items that is held out.
        seed: of the split and of the intervals.
    """

    l2: float = 1e-2
    iterations: int = 100
    test_share: float = 0.3
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """Attributes:
    accuracy: one figure a layer.
    majority: accuracy of the most frequent training label on the same test items.
    correct: bool[layers, tests]; two models' rows can be compared in pairs.
    tests: index of the test items.
    """

    accuracy: tuple[Figure, ...]
    majority: Figure
    correct: np.ndarray
    tests: np.ndarray


def split(items: Sequence[Hashable], *, test_share: float, seed: int) -> np.ndarray:
    """Which rows are for testing: bool[n]. Rows of one item fall on the same side.

    Args:
        items: item of each row, e.g. the program a prompt was made from.
        test_share: share of the items.
        seed: of the shuffle.
    """
    names = list(dict.fromkeys(items))
    order = np.random.default_rng(seed).permutation(len(names))
    held_out = {names[i] for i in order[: round(test_share * len(names))]}
    return np.array([item in held_out for item in items])


def fit(hidden: Array, labels: Array, train: Array, l2: Array, *, classes: int, iterations: int):
    """Fits multinomial logistic regression to one layer and predicts every row.

    Minimises `mean over training rows of −log softmax(Wx + b)[label] + (l2/2)·‖W‖²` from zero by
    L-BFGS; x is standardised by the training rows' mean and deviation.

    Args:
        hidden: float[n, D].
        labels: int32[n] in 0..classes-1.
        train: bool[n]. Rows to learn from.
        l2: float[].
        classes: number of labels.
        iterations: of L-BFGS.

    Returns:
        int32[n], the predicted label of every row.
    """
    rows = train.astype(jnp.float32)
    count = jnp.maximum(rows.sum(), 1.0)
    x = hidden.astype(jnp.float32)
    centre = jnp.einsum("n,nd->d", rows, x) / count
    spread = jnp.sqrt(jnp.einsum("n,nd->d", rows, (x - centre) ** 2) / count)
    # A feature that is constant in training says nothing; dividing by ~0 would let it shout.
    x = jnp.where(spread > 1e-6, (x - centre) / jnp.maximum(spread, 1e-6), 0.0)

    def loss(params):
        logps = jax.nn.log_softmax(x @ params["w"] + params["b"])
        nll = -jnp.take_along_axis(logps, labels[:, None], axis=1)[:, 0]
        return (nll * rows).sum() / count + 0.5 * l2 * (params["w"] ** 2).sum()

    solver = optax.lbfgs()
    start = {"w": jnp.zeros((x.shape[1], classes)), "b": jnp.zeros(classes)}

    def improve(carry, _):
        params, state = carry
        value, gradient = optax.value_and_grad_from_state(loss)(params, state=state)
        updates, state = solver.update(
            gradient, state, params, value=value, grad=gradient, value_fn=loss
        )
        return (optax.apply_updates(params, updates), state), None

    end, _ = jax.lax.scan(improve, (start, solver.init(start)), length=iterations)
    params: Any = end[0]
    return (x @ params["w"] + params["b"]).argmax(axis=1)


@functools.partial(jax.jit, static_argnames=("classes", "iterations"))
def _fit_layers(hidden, labels, train, l2, *, classes, iterations):
    one = functools.partial(fit, classes=classes, iterations=iterations)
    return jax.vmap(one, in_axes=(0, None, None, None))(hidden, labels, train, l2)


def probe(
    hidden: Any,
    labels: Sequence[Hashable],
    items: Sequence[Hashable],
    config: ProbeConfig,
    *,
    name: str = "probe",
) -> ProbeResult:
    """Accuracy of a linear probe on each layer, with intervals clustered by item.

    Args:
        hidden: float[L + 1, n, D]. One vector per row and layer, the embedding first.
        labels: what to read off each row, e.g. the activity.
        items: item of each row; training and test share none. Use the program, not the label.
        config: fixed beforehand.
        name: of the figures; layer l is `name/layer l`.

    Raises:
        ValueError: lengths differ, or one side of the split is empty.
    """
    hidden = jnp.asarray(hidden)
    if not hidden.shape[1] == len(labels) == len(items):
        raise ValueError(f"{hidden.shape[1]} rows, {len(labels)} labels, {len(items)} items")
    test = split(items, test_share=config.test_share, seed=config.seed)
    if test.all() or not test.any():
        raise ValueError("too few items to split into training and test")
    names = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    numbers = np.array([names[label] for label in labels], np.int32)
    predicted = np.asarray(
        _fit_layers(
            hidden, jnp.asarray(numbers), jnp.asarray(~test), jnp.float32(config.l2),
            classes=len(names), iterations=config.iterations,
        )
    )  # fmt: skip
    right = (predicted == numbers)[:, test]
    majority = np.bincount(numbers[~test]).argmax() == numbers[test]
    groups = [item for item, held_out in zip(items, test) if held_out]

    def figure(part: str, values: np.ndarray) -> Figure:
        return measure(f"{name}/{part}", values, "fraction", seed=config.seed, clusters=groups)

    return ProbeResult(
        accuracy=tuple(figure(f"layer {i}", row) for i, row in enumerate(right)),
        majority=figure("majority", majority),
        correct=right,
        tests=np.flatnonzero(test),
    )
