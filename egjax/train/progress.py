"""Progress of a long loop: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from egjax import hosts
from egjax.errors import require

__all__ = ["progress"]

# Seconds between two lines where there is no terminal (a log file, a CI job).
_LINE_EVERY = 10.0


@contextmanager
def progress(
    title: str, total: int, done: int = 0, file: TextIO | None = None
) -> Iterator[Callable[[int, str], None]]:
    """Shows how far a loop is, how fast it goes and how long it will take; process 0 does.

    Args:
        title: name of the loop.
        total: its steps.
        done: those that were done before it started.
        file: where to; None is the standard error stream at the time of the call.

    Yields:
        `update(done, note)`, cheap enough for every step.
    """
    if hosts.index() > 0:
        yield lambda done, note: None
        return
    out = sys.stderr if file is None else file
    show = _bar if out.isatty() else _lines
    with show(title, total, done, out) as update:
        yield update


class _Speed:
    """Steps a second since the first call, which comes after compilation."""

    def __init__(self):
        self._first: tuple[float, int] | None = None

    def __call__(self, done: int) -> float:
        now = time.monotonic()
        if self._first is None:
            self._first = (now, done)
        start, before = self._first
        return (done - before) / max(now - start, 1e-9)


@contextmanager
def _bar(title: str, total: int, done: int, file: TextIO) -> Iterator[Callable[[int, str], None]]:
    rich, console = require("rich.progress", "train"), require("rich.console", "train")
    speed = _Speed()
    with rich.Progress(
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn("{task.fields[note]}"),
        rich.TimeRemainingColumn(),
        console=console.Console(file=file),
    ) as bar:
        task = bar.add_task(title, total=total, completed=done, note="")

        def update(done: int, note: str) -> None:
            bar.update(task, completed=done, note=f"{speed(done):.1f}/s {note}")

        yield update


@contextmanager
def _lines(title: str, total: int, done: int, file: TextIO) -> Iterator[Callable[[int, str], None]]:
    speed, last = _Speed(), time.monotonic()

    def update(done: int, note: str) -> None:
        nonlocal last
        now, rate = time.monotonic(), speed(done)
        if now - last < _LINE_EVERY and done < total:
            return
        last = now
        left = f"{(total - done) / rate:.0f} s left" if rate > 0 else "remaining time unknown"
        print(f"{title} {done}/{total} {rate:.1f}/s {left} {note}".rstrip(), file=file, flush=True)

    yield update
