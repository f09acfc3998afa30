"""Who is at work in a run directory of a bucket, which knows no locks, and whether it answers."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from egjax import hosts
from egjax.errors import EgjaxError, seconds_from
from egjax.evals.manifest import write_atomic

__all__ = ["BusyError", "leased", "silence", "watched"]

BEAT = 5.0
"""Seconds between two signs of life of a run in a bucket."""
PATIENCE = 30.0
"""Seconds without one after which the run counts as dead."""
SETTLE = 1.0
"""Seconds after which of two runs that began at once the one that wrote last is seen by both."""


class BusyError(EgjaxError):
    """Another process is at work in a run directory."""


def silence() -> float:
    """Seconds without an answer of the bucket after which a run in it ends; `EGJAX_BUCKET_SILENCE`.

    Not a limit on how long a checkpoint may take: it is small requests beside it that go
    unanswered. The libraries try each request again by themselves, gcsfs for half a minute and
    TensorStore for a quarter of an hour, and what waits for them waits in turn. Five minutes
    outlive a storage that falters, and are about what a pod should wait for one that is gone.
    """
    return seconds_from("EGJAX_BUCKET_SILENCE", 300)


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
    beats, lost = itertools.count(1), threading.Event()

    def beat() -> None:
        if _holder(mine) in (holder, ""):
            mine.write_text(_sign(holder, next(beats)))
        elif not lost.is_set():
            lost.set()
            print(f"error: {_busy(run_dir, mine)}", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)

    def let_go() -> None:
        if _holder(mine) == holder:
            mine.write_text("{}")

    with _answering(run_dir, beat, let_go):
        yield


@contextlib.contextmanager
def watched(run_dir: Path, marker: str) -> Iterator[None]:
    """For a process beside the one that holds the run directory: whether the bucket answers it."""

    def look() -> None:
        _text(run_dir / marker)

    with _answering(run_dir, look, look):
        yield


@contextlib.contextmanager
def _answering(run_dir: Path, beat: Callable[[], None], last: Callable[[], None]) -> Iterator[None]:
    """Asks the bucket for something every few seconds, and at the end for one thing more.

    Where it does not answer for `silence()` the process leaves, and those of its job leave with it,
    whatever they wait for: a checkpoint, a file, each other, or threads that keep Python alive.
    """
    over, answered = threading.Event(), threading.Event()
    looks = 0  # and not seconds: where the whole machine stood still it is not the bucket
    why = ""

    def beat_on() -> None:
        nonlocal looks, why
        while not over.wait(BEAT):
            try:
                beat()
                looks, why = 0, ""
            except Exception as error:  # the network; another beat will come through
                why = f": {(str(error).strip() or type(error).__name__).splitlines()[0][:200]}"

    def watch() -> None:
        nonlocal looks
        while not answered.wait(BEAT):
            looks += 1
            if looks * BEAT > silence():
                error = EgjaxError(
                    f"the bucket has not answered for {silence():.0f} s{why}",
                    where=str(run_dir),
                    remedy="once it answers the same command goes on from what was saved",
                )
                print(f"error: {error}", file=sys.stderr, flush=True)
                hosts.abandon(error.exit_code, str(error))

    beating = threading.Thread(target=beat_on, daemon=True, name="egjax-lease")
    beating.start()
    threading.Thread(target=watch, daemon=True, name="egjax-bucket").start()
    try:
        yield
    finally:
        over.set()
        beating.join()
        with contextlib.suppress(Exception):
            last()
            answered.set()  # else it is watched on, to the end of the process


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
