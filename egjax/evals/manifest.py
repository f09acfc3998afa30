"""What was run: command, commit, versions, hardware, seeds, time per stage; files whole or not."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path

from egjax.errors import EgjaxError
from egjax.files import is_remote

__all__ = ["Hardware", "Manifest", "StageTime", "began", "describe", "revision", "write_atomic"]

_PACKAGES = (
    "egjax", "jax", "jaxlib", "flax", "optax", "numpy", "mctx", "transformers", "tokenizers",
    "orbax-checkpoint", "tensorflow-datasets", "grain", "rouge-score",
)  # fmt: skip
_BEGAN = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@dataclasses.dataclass(frozen=True)
class Hardware:
    """The machine.

    Attributes:
        cpu: model name of the processor.
        cores: cores that this process may use.
        memory: main memory, GiB.
        devices: name of each accelerator or host device that JAX computes on.
    """

    cpu: str
    cores: int
    memory: float
    devices: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class StageTime:
    """Wall time of one stage.

    Attributes:
        name: the stage.
        seconds: wall time when it was computed.
        kept: True if this run took it over from an earlier, interrupted one.
        code: revisions of the code that worked on it, in order, see `revision`.
    """

    name: str
    seconds: float
    kept: bool = False
    code: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What is needed to run the same again.

    Attributes:
        command: as typed.
        commit: git commit of the code that wrote this, None outside a clone.
        dirty: tracked files differed from that commit, None outside a clone.
        started: when it began, UTC, ISO 8601.
        seeds: every seed used.
        python: version of the interpreter.
        versions: version of each library that is installed.
        hardware: the machine.
        stages: wall times in order.
    """

    command: str
    commit: str | None
    dirty: bool | None
    started: str
    seeds: tuple[int, ...]
    python: str
    versions: dict[str, str]
    hardware: Hardware
    stages: tuple[StageTime, ...] = ()

    def to_json(self) -> str:
        """The manifest as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


def describe(*, seeds: Sequence[int], command: str | None = None) -> Manifest:
    """The manifest of this process, without stage times; add them with `dataclasses.replace`.

    Args:
        seeds: every seed that the run uses.
        command: what was typed; taken from this process if it is not given.
    """
    commit, dirty = _code(Path(__file__).parent)
    return Manifest(
        command=command or _command(),
        commit=commit,
        dirty=dirty,
        started=began(),
        seeds=tuple(seeds),
        python=platform.python_version(),
        versions=dict(_versions()),
        hardware=_hardware(),
    )


def began() -> str:
    """When this process began to import this module, UTC, ISO 8601."""
    return _BEGAN


def revision(*, length: int = 40) -> str:
    """Git commit of this process' code, with a + if tracked files differed; empty if unknown."""
    commit, dirty = _code(Path(__file__).parent)
    return (commit or "")[:length] + ("+" if dirty else "")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader sees the old or the new one, never a part.

    Args:
        path: where to; folders are made.
        content: text (written as UTF-8) or bytes.

    Raises:
        EgjaxError: the disk is full or the place cannot be written; what was there stays.
    """
    data = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        _put(path, data)
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise EgjaxError(
            f"cannot write the file: {error.strerror or error}",
            where=str(path),
            remedy="free some space or name another folder; what was there before is unchanged",
        ) from error
    finally:
        with suppress(OSError):  # the first error counts
            partial.unlink(missing_ok=True)


def _put(path: Path, data: bytes) -> None:
    """Writes an object in a bucket, which is there as a whole or not at all."""
    try:
        path.write_bytes(data)
    except Exception as error:  # its client raises all sorts
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EgjaxError(
            f"cannot write the object: {line}", where=str(path), remedy="see the bucket's rights"
        ) from error


def _command() -> str:
    """What was typed, with `python -m` put back where the interpreter took it apart."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    start = ["python", "-m", spec.name.removesuffix(".__main__")] if spec else sys.argv[:1]
    return shlex.join([*start, *sys.argv[1:]])


@cache  # what was loaded is the code as it was at first, whatever is committed meanwhile
def _code(folder: Path) -> tuple[str | None, bool | None]:
    """Commit of the clone around a folder, and whether tracked files differ from it."""
    commit = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit, bool(changed) if commit and changed is not None else None


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command there, None where it fails or git is not."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _versions() -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            continue


def _hardware() -> Hardware:
    import jax  # here, because asking for devices starts the accelerator

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError):
        memory = 0.0
    return Hardware(
        cpu=_cpu_model(),
        cores=cores or 1,
        memory=round(memory, 1),
        devices=tuple(f"{d.device_kind} ({d.platform} {d.id})" for d in jax.devices()),
    )


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
