"""How a training step lies on a machine: mesh, recomputation, chunks, precision.

`experiments.training` runs what is built here, and `egjax.capacity` compiles the same for machines
that are not at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from egjax.errors import EgjaxError
from egjax.lm.config import LlamaConfig
from egjax.lm.model import REMAT, Remat, head, trunk, unembed
from egjax.lm.params import Params, abstract, shardings
from egjax.mesh import batch_sharding
from egjax.train.objectives import Apply
from egjax.train.step import LossFn, TrainState, init_state, make_train_step, state_shardings

__all__ = ["SAME_RESULT", "Layout", "PlacedStep", "applied", "cast", "masters", "placed_step"]

SAME_RESULT: Mapping[str, bool] = MappingProxyType({"same_result": True})
"""Metadata of dataclass fields that change how something is computed, and not what comes out but
for rounding: a run goes on when they change."""

_MASTERS = (None, "float32", "bfloat16")


@dataclass(frozen=True)
class Layout:
    """What a step trades between memory, arithmetic and communication. Hashable.

    The defaults suit models that are small beside their machine.

    Attributes:
        model: devices that share each matrix (tensor parallelism); the others split the batch and
            the rest of every array.
        remat: what of a layer is kept for the backward pass, the rest being computed again: a name
            of `egjax.lm.model.REMAT`.
        chunked: losses from hidden states in chunks; metrics that need all logits are left out.
        master: type of the trained weights and of the optimiser's moments, e.g. `"float32"` for a
            model that computes in bfloat16; None for the model's own here, for float32 in the
            training scripts.
        accumulate: micro-batches a step.
        attention: form of attention, see `egjax.lm.attention`; `"auto"` goes by the platform.
    """

    model: int = field(default=1, metadata=SAME_RESULT)
    remat: Remat = field(default="none", metadata=SAME_RESULT)
    chunked: bool = field(default=False, metadata=SAME_RESULT)
    master: str | None = None
    accumulate: int = field(default=1, metadata=SAME_RESULT)
    attention: str = field(default="auto", metadata=SAME_RESULT)

    def __post_init__(self):
        for name in ("model", "accumulate"):
            if getattr(self, name) < 1:
                raise EgjaxError(f"{name} = {getattr(self, name)} of a layout is less than 1")
        if self.remat not in REMAT:
            raise EgjaxError(
                f"no remat policy {self.remat!r}",
                where="--training.layout.remat",
                remedy=f"one of {', '.join(REMAT)}",
            )
        if self.master not in _MASTERS:
            raise EgjaxError(
                f"weights cannot be trained in {self.master!r}",
                where="--training.layout.master",
                remedy=f"one of {', '.join(_MASTERS[1:])}",
            )


class PlacedStep(NamedTuple):
    """A step and where its arguments lie.

    Attributes:
        step: see `egjax.train.step.make_train_step`.
        state: shapes, dtypes and shardings of the state (`jax.ShapeDtypeStruct`).
        shardings: the shardings alone.
        batch: sharding of every array of a batch.
    """

    step: Any
    state: TrainState
    shardings: TrainState
    batch: NamedSharding


@cache
def applied(config: LlamaConfig, layout: Layout = Layout()) -> Apply:
    """The model as objectives take it; the same function for the same arguments.

    Weights of another float type are rounded to the model's, gradients come back in their own.
    """

    def apply(
        params: Params,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        prefix_ids: jax.Array | None = None,
    ):
        params = cast(params, config.dtype)
        final = trunk(
            params,
            config,
            tokens,
            positions,
            segment_ids,
            remat=layout.remat,
            prefix_ids=prefix_ids,
            attention=layout.attention,
        ).final
        return (head if layout.chunked else unembed)(params, config, final)

    return apply


def masters(params: Params, layout: Layout) -> Params:
    """The weights as they are trained: in the type of `layout.master`."""
    return params if layout.master is None else cast(params, layout.master)


def placed_step(
    loss: LossFn,
    config: LlamaConfig,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    layout: Layout,
) -> PlacedStep:
    """Builds the training step of a model on a mesh; nothing is computed or allotted.

    Args:
        loss: objective, of a model that `applied` gave.
        config: the model that learns.
        tx: the optimiser.
        mesh: axes `data` and `model`.
        layout: see there.
    """
    params = jax.eval_shape(lambda p: masters(p, layout), abstract(config))
    places = state_shardings(tx, params, shardings(config, mesh), mesh)
    shapes = jax.eval_shape(lambda p: init_state(p, tx), params)
    state = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )
    rows = batch_sharding(mesh)
    step = make_train_step(
        loss, tx, accumulate=layout.accumulate, shardings=places, batch_sharding=rows
    )
    return PlacedStep(step, state, places, rows)


def cast(params: Params, dtype: str) -> Params:
    """Rounds floating-point weights to a type; those that have it are not copied, and scales of
    `egjax.lm.int8` stay: rounded, they would put a whole channel off."""

    def one(path: Any, x: jax.Array) -> jax.Array:
        if str(getattr(path[-1], "key", "")).endswith("_scale"):
            return x
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype != dtype else x

    return jax.tree_util.tree_map_with_path(one, params)
