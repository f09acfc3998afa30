"""The training loop: runs steps, writes metrics and checkpoints, resumes, stops when asked."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax

from egjax import hosts
from egjax.errors import EgjaxError, require
from egjax.train.checkpoint import check_shapes, unreadable, writing
from egjax.train.progress import progress
from egjax.train.step import TrainState

__all__ = ["Batches", "FitResult", "fit"]

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
) -> FitResult:
    """Trains to `num_steps`, from the latest checkpoint in `directory` if there is one.

    A resumed run equals an uninterrupted one: state, data and key are those of the step at which
    it was left.

    Args:
        state: where to start; consumed.
        step: see `egjax.train.step.make_train_step`.
        batches: read once a step.
        num_steps: steps of the whole run, those of earlier sittings included.
        key: of the whole run; the step folds its number in.
        frozen: passed on to `step`.
        directory: for checkpoints (`directory/checkpoints`) and `directory/metrics.jsonl`; None
            keeps nothing.
        save_every: steps between checkpoints; the two latest are kept.
        log_every: steps between two lines of metrics; the host waits for the device then only.
        on_log: called with the step and its metrics at those times.
        stop: its truth is looked at after every step; once true, the state is saved and the run
            left, see `egjax.train.signals.stop_on_signals`.
        title: for the progress display.

    Returns:
        See `FitResult`.

    Raises:
        EgjaxError: a checkpoint that cannot be read or is of another model, a full disk, or a loss
            that is not finite; what was saved before stays.
    """
    store = None if directory is None else _Store(Path(directory).absolute())
    try:
        if store is not None:
            state = store.restore(state, batches)
        done, metrics = int(state.step), {}
        with progress(title, num_steps, done) as update:
            logged, stopping = (time.monotonic(), done), bool(stop)
            pending: dict[str, jax.Array] = {}
            while done < num_steps and not stopping:
                state, device_metrics = step(state, next(batches), key, frozen)
                # The step before this one is checked while the device works on this one.
                _check_finite(pending, done, title)
                pending, done = device_metrics, done + 1
                # Read once a step: a signal between two reads could end the loop unsaved.
                stopping = bool(stop)
                at_end = done == num_steps or stopping
                saving = store is not None and (at_end or done % save_every == 0)
                if saving or at_end or done % log_every == 0:
                    _check_finite(pending, done, title)
                    metrics = {name: float(x) for name, x in jax.device_get(pending).items()}
                    now = time.monotonic()
                    rate = (done - logged[1]) / max(now - logged[0], 1e-9)
                    logged = (now, done)
                    on_log(done, metrics)
                    if store is not None:
                        store.log({"step": done, **metrics, "steps_per_second": rate})
                if saving and store is not None:
                    store.save(done, state, batches)
                update(done, f"loss {metrics['loss']:.4f}" if metrics else "")
        return FitResult(state, metrics, finished=done >= num_steps)
    finally:
        if store is not None:
            store.close()


def _check_finite(metrics: dict[str, jax.Array], step: int, title: str) -> None:
    for name in ("loss", "grad_norm"):
        value = float(metrics.get(name, 0.0))
        if not math.isfinite(value):
            raise EgjaxError(
                f"{name} is {value} at step {step}",
                where=title,
                remedy="the last checkpoint is good; lower the learning rate",
            )


class _Store:
    """Checkpoints and metrics of one run."""

    def __init__(self, directory: Path):
        self._ocp = require("orbax.checkpoint", "train")
        self._directory = directory
        self._metrics = directory / "metrics.jsonl"
        with writing(directory):
            self._manager = self._ocp.CheckpointManager(
                directory / "checkpoints",
                options=self._ocp.CheckpointManagerOptions(max_to_keep=2, create=True),
            )

    def restore(self, state: TrainState, batches: Batches) -> TrainState:
        latest = self._manager.latest_step()
        self._trim_metrics(latest or 0)
        if latest is None:
            return state
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
            raise unreadable(self._directory, error) from error
        check_shapes(restored[_STATE], like, self._directory)
        batches.set_state(restored[_DATA])
        return restored[_STATE]

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
        with writing(self._metrics), self._metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def save(self, step: int, state: TrainState, batches: Batches) -> None:
        args = self._ocp.args
        with writing(self._directory):
            self._manager.save(
                step,
                args=args.Composite(
                    **{
                        _STATE: args.StandardSave(state),
                        _DATA: args.JsonSave(batches.get_state()),
                    }
                ),
            )

    def close(self) -> None:
        with writing(self._directory):
            self._manager.close()


def _step_of(line: str) -> float:
    """Step of a line of metrics; a line cut short by a crash counts as beyond the end."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf
