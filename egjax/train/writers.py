"""Where else a run's log goes, beside its JSON lines: TensorBoard, Weights & Biases."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from egjax.errors import EgjaxError, require
from egjax.files import here

__all__ = ["WRITERS", "check_writers", "writers"]

Log = Callable[[int, dict[str, float]], None]


class _Run(NamedTuple):
    """What a log is of, see `writers`."""

    directory: Path
    title: str
    inputs: str
    config: Mapping[str, Any]


def check_writers(names: Sequence[str]) -> None:
    """Says before any work what `writers` would say.

    Raises:
        EgjaxError: there is no such writer.
        ImportError: its library is not installed; says what to install.
    """
    for name in names:
        if name not in WRITERS:
            raise EgjaxError(
                f"cannot log to {name!r}", where="--log-to", remedy=f"one of {', '.join(WRITERS)}"
            )
        require(*_LIBRARIES[name])


@contextmanager
def writers(
    names: Sequence[str],
    directory: Path,
    title: str,
    *,
    inputs: str = "",
    config: Mapping[str, Any] = MappingProxyType({}),
) -> Iterator[Log]:
    """Opens writers; yields what `egjax.train.loop.fit` takes as `on_log`.

    Args:
        names: of `WRITERS`; without any nothing is written.
        directory: of the run; files go below it.
        title: of the run.
        inputs: names what the run is made from. In the same directory, from the same inputs, it
            goes on with the same run of W&B.
        config: what W&B is to show as the run's config, as JSON can hold it.

    Raises:
        EgjaxError, ImportError: see `check_writers`.
    """
    check_writers(names)
    with ExitStack() as stack:
        logs = []
        if names:
            here(directory, "--log-to writes beside the run:")
        if jax.process_index() == 0:
            run = _Run(directory, title, inputs, config)
            logs = [stack.enter_context(WRITERS[name](run)) for name in names]

        def log(step: int, metrics: dict[str, float]) -> None:
            for one in logs:
                one(step, metrics)

        yield log


@contextmanager
def _tensorboard(run: _Run) -> Iterator[Log]:
    library = require(*_LIBRARIES["tensorboard"])
    writer = None

    def log(step: int, metrics: dict[str, float]) -> None:
        nonlocal writer
        if writer is None:
            # Opened at the first line, whose step says what a run that was killed will write again.
            writer = library.SummaryWriter(str(run.directory / "tensorboard"), purge_step=step)
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    try:
        yield log
    finally:
        if writer is not None:
            writer.close()


@contextmanager
def _wandb(run: _Run) -> Iterator[Log]:
    library = require(*_LIBRARIES["wandb"])
    run.directory.mkdir(parents=True, exist_ok=True)
    name = f"{run.directory.absolute()}\n{run.inputs}"
    opened = library.init(
        project="egjax",
        name=run.title,
        dir=str(run.directory),
        id=hashlib.sha256(name.encode()).hexdigest()[:16],
        resume="allow",
        config=dict(run.config),
    )
    try:
        yield lambda step, metrics: opened.log(metrics, step=step)
    finally:
        opened.finish()


_LIBRARIES = {
    "tensorboard": ("tensorboardX", "log"),  # writes event files without TensorFlow or torch
    "wandb": ("wandb", "wandb"),
}
WRITERS = {"tensorboard": _tensorboard, "wandb": _wandb}
"""By name: context managers of a run that yield (step, metrics) -> None."""
