"""Who is at work in a run directory of a bucket, which knows no locks."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from egjax.errors import EgjaxError
from egjax.evals.manifest import write_atomic

__all__ = ["BusyError", "leased"]

BEAT = 5.0
"""Seconds between two signs of life of a run in a bucket."""
PATIENCE = 30.0
"""Seconds without one after which the run counts as dead."""
SETTLE = 1.0
"""Seconds after which of two runs that began at once the one that wrote last is seen by both."""


class BusyError(EgjaxError):
    """Another process is at work in a run directory."""


@contextlib.contextmanager
def leased(run_dir: Path, marker: str, part: str = "") -> Iterator[None]:
    """Holds a run directory for this process, or for it and others that do other parts.

    The holder writes a file anew every few seconds; one that is not written any more belongs to a
    run that is dead. A run that finds another one in its file is asked to stop, as by SIGTERM.

    Args:
        run_dir: in a bucket.
        marker: name of the file; a part's is `marker-part`.
        part: what this process does, while others do theirs.

    Raises:
        BusyError: another process holds it.
    """
    mine = run_dir / (f"{marker}-{part}" if part else marker)
    every = [run_dir / marker]
    if not part and run_dir.is_dir():
        every += [p for p in run_dir.iterdir() if p.name.startswith(f"{marker}-")]
    _refuse_if_alive(run_dir, list(dict.fromkeys([mine, *every])))
    holder = f"process {os.getpid()} on {socket.gethostname()}, {secrets.token_hex(4)}"
    write_atomic(mine, _sign(holder, 0))
    time.sleep(SETTLE)
    if _holder(mine) != holder:
        raise _busy(run_dir, mine)
    if part and not every[0].exists():
        every[0].write_text("{}")  # proof of ownership
    ended = threading.Event()

    def beat() -> None:
        count = 0
        while not ended.wait(BEAT):
            count += 1
            with contextlib.suppress(Exception):  # the network; another beat will come through
                if _holder(mine) not in (holder, ""):
                    print(f"error: {_busy(run_dir, mine)}", file=sys.stderr, flush=True)
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                mine.write_text(_sign(holder, count))

    thread = threading.Thread(target=beat, daemon=True, name="egjax-lease")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(Exception):
            if _holder(mine) == holder:
                mine.write_text("{}")


def _sign(holder: str, count: int) -> str:
    return json.dumps({"holder": holder, "beat": count}) + "\n"


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""


def _holder(file: Path) -> str:
    try:
        return json.loads(_text(file) or "{}").get("holder", "")
    except ValueError:
        return ""


def _refuse_if_alive(run_dir: Path, files: Sequence[Path]) -> None:
    before = {file: _text(file) for file in files if _holder(file)}
    if not before:
        return
    print(
        f"{run_dir}: a run was at work here; looking for its signs of life, {PATIENCE:.0f} s",
        file=sys.stderr,
        flush=True,
    )
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        time.sleep(min(BEAT, PATIENCE) / 5)
        for file, text in before.items():
            if _text(file) != text and _holder(file):
                raise _busy(run_dir, file)


def _busy(run_dir: Path, file: Path) -> BusyError:
    return BusyError(
        f"another run is at work here ({_holder(file) or 'unknown'})",
        where=str(run_dir),
        remedy="wait for it or name another directory",
    )
