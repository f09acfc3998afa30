"""One optimiser step as a jitted function of state, batch and key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from egjax.errors import EgjaxError

__all__ = ["LossFn", "TrainState", "init_state", "make_train_step", "state_shardings"]

Array = jax.Array
Params = Any

# (params, batch, key, frozen) -> (sum of the loss, how much it sums over, {name: (sum, count)}).
# Sums and counts, not means: only they add up over micro-batches of different lengths.
LossFn = Callable[[Params, Any, Array, Any], tuple[Array, Array, dict[str, tuple[Array, Array]]]]


@struct.dataclass
class TrainState:
    """What a run needs to go on, beside its data and its key.

    Attributes:
        step: int32[], optimiser steps done. After a step that was not finite it is −1 − n: the
            rest is what it was after step n, and stays so.
        params: pytree of arrays.
        opt_state: state of the optax transformation.
    """

    step: Array
    params: Params
    opt_state: Any


def state_shardings(
    tx: optax.GradientTransformation, params: Params, shardings: Any, mesh: Mesh
) -> TrainState:
    """Shardings of a whole state: moments lie where their parameters lie, the rest everywhere.

    Args:
        tx: the optimiser.
        params: parameters or their shapes (`jax.ShapeDtypeStruct`).
        shardings: pytree of `NamedSharding` alike.
        mesh: their mesh, with axes of `AxisType.Auto`.

    Returns:
        A `TrainState` of shardings, for `init_state` and `make_train_step`.
    """
    everywhere: Any = NamedSharding(mesh, PartitionSpec())
    opt_state = optax.tree_map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, params),
        shardings,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(step=everywhere, params=shardings, opt_state=opt_state)


def init_state(
    params: Params, tx: optax.GradientTransformation, shardings: TrainState | None = None
) -> TrainState:
    """A state at step 0. Parameters are copied, since steps consume the state that they get.

    Without the copy, a frozen model that shares the student's first arrays would be deleted by
    the first step.

    Args:
        params: pytree of arrays.
        tx: the optimiser.
        shardings: see `state_shardings`; without them the optimiser's state of sharded parameters
            would be replicated.

    Returns:
        The state, in arrays of its own.
    """

    def init(params: Params) -> TrainState:
        copied = jax.tree.map(jnp.copy, params)
        return TrainState(step=jnp.int32(0), params=copied, opt_state=tx.init(params))

    return jax.jit(init, out_shardings=shardings)(params)


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    shardings: TrainState | None = None,
    batch_sharding: NamedSharding | None = None,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Compiles `step(state, batch, key, frozen) -> (state, metrics)`; `state` is consumed.

    The gradient is that of the sum of the loss over the sum of its counts, over the whole batch,
    however many micro-batches it is computed in. Step n of a run uses `fold_in(key, n)`, so that
    a run needs one key and resumes with it.

    A step whose loss or gradient is NaN or Inf changes nothing but the sign of `state.step` (see
    `TrainState`), nor do those after it: the last good state is not lost before the host looks.

    Args:
        loss_fn: see `LossFn`. What it needs beside `params` comes in `frozen`: arrays in a closure
            would be compiled in as constants.
        tx: the optimiser.
        accumulate: number of micro-batches; divides the batch's leading axis.
        shardings: of the state, see `state_shardings`. They fix the output, which the compiler
            would otherwise choose anew.
        batch_sharding: of every array in the batch, e.g. its leading axis over `data`.

    Returns:
        The step. Its metrics are float32[]: loss, grad_norm (before clipping), param_norm,
        update_norm, and the means of `loss_fn`'s.

    Raises:
        EgjaxError: `accumulate` is less than 1; the step, where it does not divide the batch.
    """
    if accumulate < 1:
        raise EgjaxError(f"{accumulate} micro-batches a step", remedy="1 is the least")

    def sums(params: Params, batch: Any, key: Array, frozen: Any) -> tuple[Array, Any]:
        total, count, metrics = loss_fn(params, batch, key, frozen)
        return total, {"loss": (total, count), **metrics}

    gradient = jax.grad(sums, has_aux=True)

    def accumulated(params: Params, batch: Any, key: Array, frozen: Any) -> tuple[Params, Any]:
        rows = jax.tree.leaves(batch)[0].shape[0]
        if rows % accumulate:
            raise EgjaxError(f"{accumulate} micro-batches do not divide {rows} rows")
        parts = jax.tree.map(
            lambda x: x.reshape(accumulate, x.shape[0] // accumulate, *x.shape[1:]), batch
        )
        keys = jax.random.split(key, accumulate)

        def body(total: Any, part: Any) -> tuple[Any, None]:
            batch, key = part
            return jax.tree.map(jnp.add, total, gradient(params, batch, key, frozen)), None

        first = jax.tree.map(lambda x: x[0], (parts, keys))
        shapes = jax.eval_shape(gradient, params, *first, frozen)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(body, zeros, (parts, keys))[0]

    def step(
        state: TrainState, batch: Any, key: Array, frozen: Any = None
    ) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(key, state.step)
        run = gradient if accumulate == 1 else accumulated
        grads, totals = run(state.params, batch, key, frozen)
        count = jnp.maximum(totals["loss"][1], 1)
        grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {name: s / jnp.maximum(n, 1) for name, (s, n) in totals.items()}
        metrics |= {
            "grad_norm": optax.global_norm(grads),
            "param_norm": optax.global_norm(params),
            "update_norm": optax.global_norm(updates),
        }
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        good = finite & (state.step >= 0)
        done = TrainState(step=state.step + 1, params=params, opt_state=opt_state)
        marked = jnp.where(state.step < 0, state.step, -1 - state.step)
        kept = TrainState(step=marked, params=state.params, opt_state=state.opt_state)
        return jax.tree.map(lambda new, old: jnp.where(good, new, old), done, kept), metrics

    def placed(
        state: TrainState, batch: Any, key: Array, frozen: Any = None
    ) -> tuple[TrainState, dict[str, Array]]:
        if batch_sharding is None:
            return step(state, batch, key, frozen)
        # The model pins its activations on the mesh in use.
        with jax.sharding.use_abstract_mesh(batch_sharding.mesh.abstract_mesh):
            batch = jax.lax.with_sharding_constraint(batch, batch_sharding)
            return step(state, batch, key, frozen)

    out = None if shardings is None else (shardings, None)
    return jax.jit(placed, donate_argnums=0, out_shardings=out)
