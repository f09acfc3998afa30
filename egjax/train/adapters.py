"""Training of a low-rank adapter: the same losses and steps, the base frozen."""

from __future__ import annotations

from typing import Any, NamedTuple

from egjax.lm import lora
from egjax.lm.lora import LoraConfig
from egjax.train.step import LossFn

__all__ = ["FrozenBase", "adapted"]


class FrozenBase(NamedTuple):
    """What the step of an adapter takes as `frozen`.

    Attributes:
        base: parameters of the base model.
        frozen: what the loss itself takes beside the parameters, or None.
    """

    base: Any
    frozen: Any = None


def adapted(loss_fn: LossFn, config: LoraConfig) -> LossFn:
    """A loss of a model as a loss of its adapter: only the adapter has gradients and moments.

    Args:
        loss_fn: of whole models, e.g. `egjax.train.objectives.next_token`.
        config: the adapter.

    Returns:
        Loss whose parameters are those of `egjax.lm.lora.init` and whose step takes a `FrozenBase`.
    """

    def adapted_loss(params: Any, batch: Any, key: Any, frozen: FrozenBase):
        attached = lora.attach(frozen.base, params, config)
        return loss_fn(attached, batch, key, frozen.frozen)

    return adapted_loss
