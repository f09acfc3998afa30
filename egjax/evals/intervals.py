"""How sure a figure is: bootstrap intervals over items, and paired ones for two systems.

Percentile bootstrap: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13;
cluster resampling: Davison and Hinkley, "Bootstrap Methods and their Application" (1997), 3.8.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

__all__ = ["LEVEL", "Figure", "Interval", "bootstrap", "measure", "paired", "paired_measure"]

LEVEL = 0.95
_RESAMPLES = 10_000
_BLOCK = 4_000_000  # indices drawn at once: bounds the memory, about 64 MB


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and where it lies.

    Attributes:
        value: mean over the items.
        low, high: ends of the interval; -inf and inf where there is but one item or cluster, which
            says nothing about how much they vary.
        n: number of items.
    """

    value: float
    low: float
    high: float
    n: int


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured number, with what is needed to judge it.

    Attributes:
        name: what was measured, e.g. `"success/expert/seen"`.
        value: the number.
        unit: `"fraction"` (0 to 1), `"s"`, `"count"`, `"steps/s"`, `"ratio"`, ...
        n: number of items behind it.
        low, high: ends of its interval, None where none was computed.
        seed: seed of the run or of the resampling, None where nothing was random.
        peer, peer_value: another system's name and its value of the same figure.
    """

    name: str
    value: float
    unit: str
    n: int
    low: float | None = None
    high: float | None = None
    seed: int | None = None
    peer: str | None = None
    peer_value: float | None = None

    @property
    def ratio(self) -> float | None:
        """Ours ÷ the peer's; None without a peer or where the peer's value is 0."""
        return self.value / self.peer_value if self.peer_value else None

    def to_dict(self) -> dict[str, Any]:
        """The fields that are known, and `ratio`; numbers that JSON cannot hold become None."""
        fields = {**dataclasses.asdict(self), "ratio": self.ratio}
        kept = {k: v for k, v in fields.items() if v is not None or k == "value"}
        return {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in kept.items()
        }

    def line(self) -> str:
        """One JSON line: `{"name": …, "value": …, "unit": …, "n": …, …}`."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)


def bootstrap(
    values: Any,
    *,
    seed: int,
    clusters: Sequence[Hashable] | None = None,
    level: float = LEVEL,
    resamples: int = _RESAMPLES,
) -> Interval:
    """Mean over items with its percentile bootstrap interval.

    Where every item is the same, no resample ever differs and the percentile interval has width
    zero. For booleans (a success, a right answer) the exact binomial bound is taken there instead
    (Clopper and Pearson 1934: `1 - (α/2)^(1/n)` from the end), so that 0 of 12 does not look
    certain.

    Args:
        values: number or bool[n], one per item.
        seed: of the resampling.
        clusters: n labels; items of one label (one task, one activity) are drawn together, because
            they are not independent.
        level: probability that the interval is to cover.
        resamples: bootstrap resamples.

    Raises:
        ValueError: no items, or not one label for each item.
    """
    raw = np.asarray(values)
    sums, sizes = _by_cluster(raw.astype(np.float64), clusters)
    limits = (0.0, 1.0) if raw.dtype == bool else None
    return _interval(sums, sizes, raw.size, seed, level, resamples, limits)


def paired(
    ours: Any,
    theirs: Any,
    *,
    seed: int,
    clusters: Sequence[Hashable] | None = None,
    level: float = LEVEL,
    resamples: int = _RESAMPLES,
) -> Interval:
    """Mean of `ours - theirs` over the same items, with its bootstrap interval.

    Pairing takes out how hard each item is; an interval that leaves out 0 tells two systems apart.

    Args:
        ours, theirs: number or bool[n], the same items in the same order.
        seed, clusters, level, resamples: as `bootstrap`.

    Raises:
        ValueError: the two differ in length, or there are no items.
    """
    a, b = np.asarray(ours), np.asarray(theirs)
    if a.shape != b.shape:
        raise ValueError(f"paired values differ in shape: {a.shape} and {b.shape}")
    difference = a.astype(np.float64) - b.astype(np.float64)
    sums, sizes = _by_cluster(difference, clusters)
    limits = (-1.0, 1.0) if a.dtype == bool and b.dtype == bool else None
    return _interval(sums, sizes, difference.size, seed, level, resamples, limits)


def measure(name: str, values: Any, unit: str, *, seed: int, **options: Any) -> Figure:
    """`bootstrap` as a Figure; `options` are its other arguments."""
    found = bootstrap(values, seed=seed, **options)
    return Figure(name, found.value, unit, found.n, *_finite(found), seed)


def paired_measure(
    name: str, ours: Any, theirs: Any, unit: str, *, seed: int, **options: Any
) -> Figure:
    """`paired` as a Figure: ours minus theirs; `options` are its other arguments."""
    found = paired(ours, theirs, seed=seed, **options)
    return Figure(name, found.value, unit, found.n, *_finite(found), seed)


def _finite(found: Interval) -> tuple[float | None, float | None]:
    """The ends as a Figure has them: None where the data say nothing."""
    return (
        found.low if math.isfinite(found.low) else None,
        found.high if math.isfinite(found.high) else None,
    )


def _by_cluster(values: np.ndarray, clusters) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of items of each cluster; each item is its own where there are no labels."""
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"needs a list of at least one number, got shape {values.shape}")
    if clusters is None:
        return values, np.ones_like(values)
    if len(clusters) != values.size:
        raise ValueError(f"{len(clusters)} cluster labels for {values.size} items")
    numbers = {label: i for i, label in enumerate(dict.fromkeys(clusters))}
    index = np.array([numbers[label] for label in clusters])
    count = len(numbers)
    return np.bincount(index, values, count), np.bincount(index, minlength=count).astype(float)


def _interval(sums, sizes, n, seed, level, resamples, limits) -> Interval:
    """Percentile interval of `Σ sums ÷ Σ sizes` over resampled clusters; see `bootstrap`."""
    value = float(sums.sum() / sizes.sum())
    clusters = sums.size
    tail = (1.0 - level) / 2
    if limits and value in (-1.0, 0.0, 1.0) and np.ptp(sums / sizes) == 0:
        open_end = 1.0 - tail ** (1.0 / clusters)
        low, high = max(limits[0], value - open_end), min(limits[1], value + open_end)
        return Interval(value, low, high, n)
    if clusters == 1:
        return Interval(value, -math.inf, math.inf, n)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    block = max(1, _BLOCK // clusters)
    for start in range(0, resamples, block):
        drawn = rng.integers(0, clusters, (min(block, resamples - start), clusters))
        means[start : start + block] = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Interval(value, float(low), float(high), n)
