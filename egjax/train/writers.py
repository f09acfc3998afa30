"""Where else a run's log goes, beside its JSON lines: TensorBoard, Weights & Biases."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax

from egjax.errors import EgjaxError, require
from egjax.files import here

__all__ = ["WRITERS", "writers"]

Log = Callable[[int, dict[str, float]], None]


@contextmanager
def writers(names: Sequence[str], directory: Path, title: str) -> Iterator[Log]:
    """Opens writers; yields what `egjax.train.loop.fit` takes as `on_log`.

    Args:
        names: of `WRITERS`; without any nothing is written.
        directory: of the run; files go below it.
        title: of the run.

    Raises:
        EgjaxError: there is no such writer.
        ImportError: its library is not installed; says what to install.
    """
    unknown = [name for name in names if name not in WRITERS]
    if unknown:
        raise EgjaxError(
            f"cannot log to {unknown[0]!r}", where="--log-to", remedy=f"one of {', '.join(WRITERS)}"
        )
    with ExitStack() as stack:
        logs = []
        if names:
            here(directory, "--log-to writes beside the run:")
        if jax.process_index() == 0:
            logs = [stack.enter_context(WRITERS[name](directory, title)) for name in names]

        def log(step: int, metrics: dict[str, float]) -> None:
            for one in logs:
                one(step, metrics)

        yield log


@contextmanager
def _tensorboard(directory: Path, title: str) -> Iterator[Log]:
    # Writes event files without TensorFlow or torch.
    library = require("tensorboardX", "log")
    writer = None

    def log(step: int, metrics: dict[str, float]) -> None:
        nonlocal writer
        if writer is None:
            # Opened at the first line, whose step says what a run that was killed will write again.
            writer = library.SummaryWriter(str(directory / "tensorboard"), purge_step=step)
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    try:
        yield log
    finally:
        if writer is not None:
            writer.close()


@contextmanager
def _wandb(directory: Path, title: str) -> Iterator[Log]:
    library = require("wandb", "wandb")
    directory.mkdir(parents=True, exist_ok=True)
    run = library.init(
        project="egjax",
        name=title,
        dir=str(directory),
        # The same directory goes on with the same run.
        id=hashlib.sha256(str(directory.absolute()).encode()).hexdigest()[:16],
        resume="allow",
    )
    try:
        yield lambda step, metrics: run.log(metrics, step=step)
    finally:
        run.finish()


WRITERS = {"tensorboard": _tensorboard, "wandb": _wandb}
"""By name: context managers (directory, title) -> (step, metrics) -> None."""
