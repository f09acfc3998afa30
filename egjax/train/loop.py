"""The training loop: runs steps, writes metrics and checkpoints, resumes, stops when asked."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from egjax import hosts
from egjax.errors import EgjaxError, NotFiniteError, require
from egjax.files import absolute, append
from egjax.train.checkpoint import check_shapes, unreadable, writing
from egjax.train.progress import progress
from egjax.train.step import TrainState

__all__ = ["Batches", "FitResult", "Work", "fit"]

_STATE, _DATA = "state", "data"


class Batches(Protocol):
    """An endless, resumable source of batches, e.g. `egjax.train.data.Shuffled`."""

    def __next__(self) -> Any: ...

    def get_state(self) -> dict[str, Any]:
        """Where it is, as JSON can hold it."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes there."""
        ...


class Work(NamedTuple):
    """What there is to do in a step; sums over steps are sums of these.

    Attributes:
        tokens: read by the model, padding left out.
        flops: floating-point operations by formula, see `egjax.train.flops`.
    """

    tokens: float
    flops: float


class FitResult(NamedTuple):
    """How a run ended.

    Attributes:
        state: the last state.
        metrics: those of the last logged step; empty if no step was run.
        finished: False if it was stopped before `num_steps`.
    """

    state: TrainState
    metrics: dict[str, float]
    finished: bool


def fit(
    state: TrainState,
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
    batches: Batches,
    *,
    num_steps: int,
    key: jax.Array,
    frozen: Any = None,
    directory: str | Path | None = None,
    save_every: int = 500,
    log_every: int = 20,
    on_log: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
    stop: Any = False,
    title: str = "train",
    work: Callable[[Any], Work] | None = None,
    peak: float | None = None,
) -> FitResult:
    """Trains to `num_steps`, from the latest checkpoint in `directory` if there is one.

    A resumed run equals an uninterrupted one: it has the state, data and key that were left.

    Whatever ends the process, and whenever (SIGKILL, a host taken away), at most `save_every` steps
    have to be run again. A checkpoint counts once it is whole, and is written while training goes
    on: one is begun every h = ⌈save_every / 2⌉ steps, and before a step that would be more than
    `save_every` after the last whole one the loop waits for the one that is being written.

    Args:
        state: where to start; consumed.
        step: see `egjax.train.step.make_train_step`.
        batches: read once a step.
        num_steps: steps of the whole run, those of earlier sittings included.
        key: of the whole run; the step folds its number in. It is kept with the checkpoints, and
            a resumed run goes on with the one that it began with.
        frozen: passed on to `step`.
        directory: for `checkpoints` and `metrics.jsonl`; None keeps nothing.
        save_every: at most this many steps are lost; with 1 none is run while a checkpoint is
            written. The two latest are kept.
        log_every: steps between two lines; the host reads each step's loss during the next step.
        on_log: called with the step and its metrics at those times.
        stop: once true after a step, the state is saved and the run left, see
            `egjax.train.signals.stop_on_signals`.
        title: for the progress display.
        work: of a batch; adds `tokens_per_second` to the log, and with `peak` `mfu`, the share of
            the peak that the formula's operations take (model FLOPs utilisation, Chowdhery et al.
            2022, arXiv 2204.02311, appendix B).
        peak: FLOP/s of all devices together; None where it is not known.

    Returns:
        See `FitResult`.

    Raises:
        NotFiniteError: loss or gradient is NaN or Inf; names the step, before which the state was
            saved as the latest checkpoint.
        EgjaxError: an interval below 1, a checkpoint that cannot be read or is of another model, or
            a full disk; what was saved before stays.
    """
    _check_intervals(save_every=save_every, log_every=log_every)
    store = None if directory is None else _Store(absolute(directory))
    half = -(-save_every // 2)
    trail: deque[tuple[int, dict[str, Any]]] = deque(maxlen=2)  # where the data were before a step
    try:
        if store is not None:
            state, key = store.restore(state, batches, key)
        done, metrics = int(state.step), {}
        with progress(title, num_steps, done) as update:
            meter, stopping = _Meter(done, work, peak), bool(stop)
            pending: dict[str, jax.Array] = {}
            while done < num_steps and not stopping:
                if store is not None:
                    store.reach(done + 1 - save_every)
                trail.append((done, batches.get_state()))
                batch = next(batches)
                meter.add(batch)
                state, device_metrics = step(state, batch, key, frozen)
                # The step before this one is checked while the device works on this one.
                _check_finite(pending, done, title)
                pending, done = device_metrics, done + 1
                # Read once a step: a signal between two reads could end the loop unsaved.
                stopping = bool(stop)
                at_end = done == num_steps or stopping
                saving = store is not None and (at_end or done % half == 0)
                if saving or at_end or done % log_every == 0:
                    _check_finite(pending, done, title)
                    metrics = {name: float(x) for name, x in jax.device_get(pending).items()}
                    rates = meter.read(done)
                    on_log(done, metrics | rates)
                    if store is not None:
                        store.log({"step": done, **metrics, **rates})
                if saving and store is not None:
                    store.save(done, state, batches.get_state(), key)
                update(done, f"loss {metrics['loss']:.4f}" if metrics else "")
        return FitResult(state, metrics, finished=done >= num_steps)
    except NotFiniteError:
        good = -1 - int(state.step)
        if store is not None and good >= 0:
            store.save_last(good, _at_step(state, good), dict(trail)[good], key)
        raise
    finally:
        if store is not None:
            store.close()


def _check_intervals(**steps: int) -> None:
    for name, value in steps.items():
        if value < 1:
            raise EgjaxError(f"{name} = {value} is less than 1")


class _Meter:
    """Rates between two lines of the log."""

    def __init__(self, done: int, work: Callable[[Any], Work] | None, peak: float | None):
        self._work, self._peak = work, peak
        self._since, self._sum = (time.monotonic(), done), Work(0.0, 0.0)

    def add(self, batch: Any) -> None:
        if self._work is not None:
            one = self._work(batch)
            self._sum = Work(self._sum.tokens + one.tokens, self._sum.flops + one.flops)

    def read(self, done: int) -> dict[str, float]:
        """Rates since the last reading."""
        now = time.monotonic()
        seconds = max(now - self._since[0], 1e-9)
        rates = {"steps_per_second": (done - self._since[1]) / seconds}
        if self._work is not None:
            rates["tokens_per_second"] = self._sum.tokens / seconds
            if self._peak is not None:
                rates["mfu"] = self._sum.flops / seconds / self._peak
        self._since, self._sum = (now, done), Work(0.0, 0.0)
        return rates


def _check_finite(metrics: dict[str, jax.Array], step: int, title: str) -> None:
    for name in ("loss", "grad_norm"):
        value = float(metrics.get(name, 0.0))
        if not math.isfinite(value):
            raise NotFiniteError(
                f"{name} is {value} at step {step}",
                where=title,
                remedy=f"the state of step {step - 1} is kept; lower the learning rate or look "
                "for broken weights and data",
            )


def _at_step(state: TrainState, step: int) -> TrainState:
    return dataclasses.replace(state, step=jax.device_put(np.int32(step), state.step.sharding))


class _Store:
    """Checkpoints and metrics of one run."""

    def __init__(self, directory: Path):
        self._ocp = require("orbax.checkpoint", "train")
        self._directory = directory
        self._metrics = directory / "metrics.jsonl"
        self._begun = self._whole = 0  # steps of the last checkpoint that is, and that is whole
        with writing(directory):
            self._manager = self._ocp.CheckpointManager(
                directory / "checkpoints",
                options=self._ocp.CheckpointManagerOptions(max_to_keep=2, create=True),
            )

    def restore(
        self, state: TrainState, batches: Batches, key: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        latest = self._manager.latest_step()
        self._begun = self._whole = latest or 0
        self._trim_metrics(latest or 0)
        if latest is None:
            return state, key
        args = self._ocp.args
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        try:
            restored = self._manager.restore(
                latest,
                args=args.Composite(
                    **{_STATE: args.StandardRestore(like), _DATA: args.JsonRestore()}
                ),
            )
        except Exception as error:  # Orbax and its storage raise all sorts for a damaged folder
            raise self._unreadable(latest, error) from error
        check_shapes(restored[_STATE], like, self._directory)
        try:
            note = restored[_DATA]
            batches.set_state(note["batches"])
            data = jnp.asarray(note["key"], jnp.uint32)
        except (KeyError, TypeError) as error:
            raise self._unreadable(latest, error) from error
        return restored[_STATE], jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))

    def _unreadable(self, step: int, error: Exception) -> EgjaxError:
        """Names the step that is damaged, and where the run goes on without it."""
        older = [other for other in self._manager.all_steps() if other < step]
        then = f"goes on from step {max(older)}" if older else "begins anew"
        folder = self._directory / "checkpoints" / str(step)
        return unreadable(folder, error, f"delete this folder alone: then the run {then}")

    def _trim_metrics(self, latest: int) -> None:
        """Drops the lines of steps that will be run again."""
        if self._metrics.exists() and hosts.index() == 0:
            lines = self._metrics.read_text().splitlines()
            kept = [line for line in lines if _step_of(line) <= latest]
            with writing(self._metrics):
                self._metrics.write_text("".join(f"{line}\n" for line in kept))

    def log(self, line: dict[str, Any]) -> None:
        if hosts.index() > 0:
            return
        with writing(self._metrics):
            append(self._metrics, json.dumps(line) + "\n")

    def save(self, step: int, state: TrainState, where: dict[str, Any], key: jax.Array) -> None:
        """Begins to write a checkpoint, after the one before is whole."""
        args = self._ocp.args
        note = {"batches": where, "key": jax.random.key_data(key).tolist()}
        with writing(self._directory):
            self._manager.save(
                step,
                args=args.Composite(
                    **{
                        _STATE: args.StandardSave(state),
                        _DATA: args.JsonSave(note),
                    }
                ),
            )
        # Orbax has waited for the one before.
        self._begun, self._whole = step, self._begun

    def reach(self, step: int) -> None:
        """Returns once a checkpoint of `step` or later is whole, if one was begun."""
        if self._whole < step:
            # By steps and not by a look at the disk: all processes have to wait, or none.
            with writing(self._directory):
                self._manager.wait_until_finished()
            self._whole = self._begun

    def save_last(self, step: int, *what: Any) -> None:
        """Saves a step that is no longer the latest one, unless it was saved."""
        if self._manager.latest_step() != step:
            self.save(step, *what)

    def close(self) -> None:
        with writing(self._directory):
            self._manager.close()


def _step_of(line: str) -> float:
    """Step of a line of metrics; a line cut short by a crash counts as beyond the end."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf
