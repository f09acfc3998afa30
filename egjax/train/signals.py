"""Stopping on request: SIGTERM and Ctrl-C become a flag that loops look at."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["StopFlag", "stop_on_signals"]

_TWICE = 2.0  # seconds in which a second SIGTERM is the first one, sent by both Slurm and the shell


class StopFlag:
    """Falsy until a stop is asked for.

    Attributes:
        signum: the signal that asked first, None where none did.
    """

    def __init__(self):
        self._asked = False
        self.signum: int | None = None

    def __bool__(self) -> bool:
        return self._asked

    def ask(self) -> None:
        """Asks for a stop at the next safe point."""
        self._asked = True


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Within it, the first SIGTERM or SIGINT sets the flag; a second one acts as it always did.

    Slurm, or a machine that shuts down, sends SIGTERM to all processes, and a shell passes it on to
    its own: a second SIGTERM within two seconds is the same. Must be entered in the main thread,
    where Python delivers signals.

    Yields:
        What `egjax.train.loop.fit` takes as `stop`.
    """
    flag, first = StopFlag(), 0.0

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal first
        if flag.signum is None:
            flag.signum, first = number, time.monotonic()
            flag.ask()
        elif number != signal.SIGTERM or time.monotonic() - first > _TWICE:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    before = {int(n): signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, handle)
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
