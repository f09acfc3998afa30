"""Several processes of one job on this machine, each with devices of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

LOOK = 0.1  # seconds between two looks at what is waited for
ROOT = Path(__file__).resolve().parents[1]


def cpus(count: int) -> dict[str, str]:
    """Environment of a process with so many CPU devices that compiles as the tests do."""
    flags = os.environ.get("XLA_FLAGS", "")
    flags = f"{flags} --xla_force_host_platform_device_count={count}"
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def launch(
    command: Sequence[str], count: int, *, devices: int = 1, logs: Path, **environment: str
) -> list[subprocess.Popen]:
    """Starts the processes of a job; what they print goes to `logs/i.out` and `logs/i.err`."""
    port = free_port()
    logs.mkdir(parents=True, exist_ok=True)
    started = []
    for i in range(count):
        settings = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
            **cpus(devices),
            "EGJAX_MULTI_HOST": "1",
            "EGJAX_COORDINATOR": f"localhost:{port}",
            "EGJAX_PROCESSES": str(count),
            "EGJAX_PROCESS": str(i),
            **environment,
        }
        with (logs / f"{i}.out").open("w") as out, (logs / f"{i}.err").open("w") as err:
            started.append(
                subprocess.Popen(
                    [sys.executable, *command], cwd=ROOT, env=settings, stdout=out, stderr=err
                )
            )
    return started


def codes(processes: Sequence[subprocess.Popen], timeout: float) -> list[int]:
    """Exit codes of all; what has not ended in time is killed, and that is an error.

    Looks are counted, not seconds: the whole machine may stand still for a while.
    """
    try:
        for _ in range(round(timeout / LOOK)):
            if all(process.poll() is not None for process in processes):
                return [process.returncode for process in processes]
            time.sleep(LOOK)
        raise AssertionError(f"still there: {[p.poll() is None for p in processes]}")
    finally:
        kill(processes)


def kill(processes: Sequence[subprocess.Popen]) -> None:
    """Ends what has not ended."""
    for process in processes:
        process.kill()
        process.wait()
