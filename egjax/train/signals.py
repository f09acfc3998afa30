"""Stopping on request: SIGTERM and Ctrl-C become a flag that loops look at."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["StopFlag", "stop_on_signals"]


class StopFlag:
    """Falsy until a stop is asked for."""

    def __init__(self):
        self._asked = False

    def __bool__(self) -> bool:
        return self._asked

    def ask(self) -> None:
        """Asks for a stop at the next safe point."""
        self._asked = True


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Within it, the first SIGTERM or SIGINT sets the flag; a second one acts as it always did.

    Must be entered in the main thread, where Python delivers signals.
    """
    flag = StopFlag()
    before = {}

    def handle(number: int, _: FrameType | None) -> None:
        flag.ask()
        signal.signal(number, before[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, handle)
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
