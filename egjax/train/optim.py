"""The optimiser: AdamW with warm-up, decay and clipping, described by a config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import optax

from egjax.errors import EgjaxError

__all__ = [
    "SCHEDULES",
    "OptimConfig",
    "Schedule",
    "decays",
    "make_optimizer",
    "warmup_constant",
    "warmup_cosine",
    "warmup_linear",
    "warmup_stable_decay",
]


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (arXiv 1711.05101) with warm-up and decay.

    Attributes:
        learning_rate: its peak, after the warm-up.
        warmup: share of all steps in which the rate rises linearly from 0.
        final: what the rate decays to, as a share of the peak, for schedules that decay; it would
            be that of the step after the last one.
        decay: share of all steps in which `warmup_stable_decay` decays.
        clip: bound on the global norm of the gradient.
        weight_decay: decoupled weight decay of matrices.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
    """

    learning_rate: float = 3e-4
    warmup: float = 0.05
    final: float = 0.1
    decay: float = 0.2
    clip: float = 1.0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self):
        for name, low, high in (
            ("learning_rate", 0, float("inf")),
            ("warmup", 0, 1),
            ("final", 0, 1),
            ("decay", 0, 1),
            ("clip", 0, float("inf")),
            ("weight_decay", 0, float("inf")),
            ("beta1", 0, 1),
            ("beta2", 0, 1),
            ("eps", 0, 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high or (name != "clip" and value == float("inf")):
                raise EgjaxError(f"{name} = {value} is not between {low} and {high}")
        for name, end in (("clip", 0), ("beta1", 1), ("beta2", 1)):
            if getattr(self, name) == end:
                raise EgjaxError(f"{name} = {end} would let nothing be learnt")


Schedule = Callable[[OptimConfig, int], optax.Schedule]
"""(config, steps of the whole run) -> rate per step."""


def _warmed(config: OptimConfig, num_steps: int, then: Callable[[int], optax.Schedule]):
    """Linear warm-up to the peak, then a schedule of the steps that are left."""
    warmup = max(1, round(config.warmup * num_steps))
    # Starts at 1/warmup, not at 0: the first step would be lost.
    rise = optax.linear_schedule(
        config.learning_rate / warmup, config.learning_rate, max(1, warmup - 1)
    )
    return optax.join_schedules([rise, then(max(1, num_steps - warmup))], [warmup])


def _fall(config: OptimConfig, steps: int) -> optax.Schedule:
    return optax.linear_schedule(
        config.learning_rate, config.final * config.learning_rate, max(1, steps)
    )


def warmup_cosine(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then half a cosine down to `final` times the peak."""
    return _warmed(
        config,
        num_steps,
        lambda left: optax.cosine_decay_schedule(config.learning_rate, left, alpha=config.final),
    )


def warmup_linear(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then a straight line down to `final` times the peak."""
    return _warmed(config, num_steps, lambda left: _fall(config, left))


def warmup_constant(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, which is kept."""
    return _warmed(config, num_steps, lambda _: optax.constant_schedule(config.learning_rate))


def warmup_stable_decay(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Warm-up, the peak kept, and a straight line down to `final` times it in the last `decay` of
    the steps ("WSD", Hu et al. 2024, arXiv 2404.06395)."""

    def then(left: int) -> optax.Schedule:
        stable = max(0, left - round(config.decay * num_steps))
        keep = optax.constant_schedule(config.learning_rate)
        return optax.join_schedules([keep, _fall(config, left - stable)], [stable])

    return _warmed(config, num_steps, then)


SCHEDULES: Mapping[str, Schedule] = MappingProxyType(
    {
        "cosine": warmup_cosine,
        "linear": warmup_linear,
        "constant": warmup_constant,
        "wsd": warmup_stable_decay,
    }
)
"""Schedules by the names that experiments give them."""


def decays(params: Any) -> Any:
    """Which parameters decay: all but norms and biases, which are told by their names.

    Their rank does not tell them, because stacked layers add an axis.
    """

    def leaf(path: tuple, _: Any) -> bool:
        name = jax.tree_util.keystr(path).lower()
        return "norm" not in name and "bias" not in name

    return jax.tree_util.tree_map_with_path(leaf, params)


def make_optimizer(
    config: OptimConfig,
    num_steps: int,
    *,
    schedule: Schedule = warmup_cosine,
    decay_mask: Callable[[Any], Any] = decays,
) -> optax.GradientTransformation:
    """Builds the transformation: clip, Adam, decay, rate.

    Args:
        config: see there.
        num_steps: length of the whole run, which the schedule needs.
        schedule: maps (config, num_steps) to a rate per step.
        decay_mask: maps parameters to a pytree of bools, True where weights decay.

    Returns:
        The transformation; its state's Adam moments are shaped like the parameters.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            schedule(config, num_steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )
