"""What all experiment scripts share: the command line, figures, stages that are kept.

Standard output carries results only (text, or JSON lines with `--json`); notes, progress and
errors go to standard error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import egjax
from egjax.errors import EgjaxError, require
from egjax.evals.intervals import Figure
from egjax.evals.manifest import describe, write_atomic
from egjax.mesh import start_hosts
from egjax.train.signals import StopFlag

__all__ = [
    "BusyError",
    "Done",
    "Stage",
    "atomic_path",
    "emit",
    "file_fingerprint",
    "fingerprint",
    "finished",
    "note",
    "open_run",
    "run_main",
    "save_then_stop",
    "source_fingerprint",
]

C = TypeVar("C")

_MARKER = ".egjax-run"  # at the top of every run directory: proof of ownership, and the lock
_RECORD = ".stage.json"  # in a stage's directory: its inputs, time, and outputs once finished
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


# --- the command line ---------------------------------------------------------------------------


class _Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM came; a KeyboardInterrupt, so that `except Exception` lets it through."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


def _stop(signum: int, _frame: object) -> NoReturn:
    raise _Stopped(signum)


def run_main(
    main: Callable[[C], int | None], config: type[C], argv: list[str] | None = None
) -> NoReturn:
    """Runs an experiment from the command line and leaves with its exit code.

    Exit codes: what `main` returns (None counts as 0) · 2 for what the user can mend, told in one
    line · 3 for a training step that gave NaN or Inf · 130 after Ctrl-C, 143 after SIGTERM · 141
    where the reader of our output went away.

    With `EGJAX_MULTI_HOST=1` the processes of a multi-host job are connected first; with
    `EGJAX_TRACEBACK=1` what the user can mend comes with its traceback, too.

    Args:
        main: the experiment; its module's docstring is the help.
        config: a frozen dataclass; each field becomes an option.
        argv: arguments, those of the process by default.
    """
    tyro = require("tyro", "cli")
    help_text = sys.modules[main.__module__].__doc__
    for signum in _SIGNALS:
        signal.signal(signum, _stop)
    try:
        options = tyro.cli(config, args=argv, description=help_text, prog=_command())
        if os.environ.get("EGJAX_MULTI_HOST"):  # has to come before JAX looks for devices
            start_hosts()
        note(_machine_line())
        code = main(options) or 0
        sys.stdout.flush()
    except KeyboardInterrupt as stopped:
        for signum in _SIGNALS:
            signal.signal(signum, signal.SIG_IGN)
        note("stopped; continue with the same command")
        code = 128 + getattr(stopped, "signum", signal.SIGINT)
    except BrokenPipeError:
        if not _reader_gone():
            raise
        code = 128 + signal.SIGPIPE
    except Exception as error:
        line = _one_line(error)
        if line is None or os.environ.get("EGJAX_TRACEBACK"):
            raise
        note(f"error: {line}")
        code = getattr(error, "exit_code", EgjaxError.exit_code)
    sys.exit(code)


def _command() -> str | None:
    """How the program was called, for its usage line; None for a script called by its path."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else None


@contextlib.contextmanager
def save_then_stop() -> Iterator[StopFlag]:
    """For loops that save at a step's end: within it the first signal only sets the flag.

    After it the program is stopped as `run_main` says; a second signal stops it at once.

    Yields:
        What `egjax.train.loop.fit` takes as `stop`.
    """
    flag, asked = StopFlag(), []

    def ask(signum: int, _frame: object) -> None:
        asked.append(signum)
        flag.ask()
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, ask) for number in _SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        raise _Stopped(asked[0])


def _reader_gone() -> bool:
    """Whether standard output is the broken pipe; if so, silences it for the interpreter's exit."""
    watch = select.poll()
    watch.register(sys.stdout, select.POLLERR)
    gone = any(event & select.POLLERR for _, event in watch.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _one_line(error: BaseException) -> str | None:
    """What the user is told of an error that he can mend; None for a fault of the program."""
    if isinstance(error, EgjaxError):
        return str(error)
    if isinstance(error, ImportError) and "egjax[" in str(error):
        return str(error)
    full = _disk_full(error)
    if full is not None:
        return (
            f"{full or 'the disk'}: no space left "
            "(make room and give the same command: finished stages are kept)"
        )
    if (
        isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError)
        and error.filename
    ):
        return f"{error.filename}: {(error.strerror or type(error).__name__).lower()}"
    return None


def _disk_full(error: BaseException | None) -> str | None:
    """The file ("" if unknown) at which the disk was full, None if that is not what happened.

    Native writers (tensorstore, array_record, safetensors) report it in words, without an errno.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return str(error.filename or "")
        if os.strerror(errno.ENOSPC).lower() in str(error).lower():
            return ""
        error = error.__cause__ or error.__context__
    return None


def note(text: str) -> None:
    """Prints a line for the person at the terminal, on standard error."""
    with contextlib.suppress(OSError):  # a closed terminal must not hide the exit code
        print(text, file=sys.stderr, flush=True)


# --- figures ------------------------------------------------------------------------------------


def emit(*figures: Figure, json: bool = False) -> None:
    """Prints figures on standard output.

    Args:
        figures: what was measured.
        json: one JSON object a line (name, value, unit, n and, where known, low, high, seed, peer,
            peer_value, ratio) instead of text.
    """
    for figure in figures:
        print(figure.line() if json else _figure_text(figure), flush=True)


def _figure_text(figure: Figure) -> str:
    whole = float(figure.value).is_integer() and abs(figure.value) < 1e15
    value = f"{figure.value:,.0f}" if whole else f"{figure.value:.4g}"
    text = f"{figure.name:<40} {value:>12} {figure.unit}"
    if figure.low is not None and figure.high is not None:
        text += f"  [{figure.low:.4g}, {figure.high:.4g}]"
    text += f"  n={figure.n}"
    if figure.peer_value is not None:
        ratio = "" if figure.ratio is None else f", ratio {figure.ratio:.3g}"
        text += f"  ({figure.peer}: {figure.peer_value:.4g}{ratio})"
    return text


# --- the machine --------------------------------------------------------------------------------


def _machine_line() -> str:
    """Versions and hardware in a line; starts JAX's backend."""
    here = describe(seeds=())
    code = (here.commit or "")[:12] + ("+" if here.dirty else "")
    first, *more = here.hardware.devices
    parts = (
        f"egjax {egjax.__version__} {code}".rstrip(),
        f"jax {here.versions['jax']} on {first}" + (f" and {len(more)} more" if more else ""),
        f"{here.hardware.cores} cores, {here.hardware.memory:.0f} GiB",
        f"Python {here.python}",
    )
    return " · ".join(parts)


# --- files --------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a path to write to; it becomes `path` at the end, and vanishes if writing fails.

    So a reader, or the next run, sees the old file or the whole new one. The suffix is kept,
    because some writers choose the format by it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".tmp-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.chmod(0o666 & ~_umask())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# --- stages -------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """A JSON form of a config, the same for equal values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__qualname__, **fields}
    if isinstance(value, Mapping):
        return {str(key): _plain(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=repr)
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    raise TypeError(f"cannot take the fingerprint of a {type(value).__name__}: {value!r}")


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) of configs, numbers, strings and collections of them, in canonical form."""
    text = json.dumps(_plain(value), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_fingerprint(*paths: Path, pattern: str = "*") -> str:
    """SHA-256 (hex) of files by name and content; of a folder, of all in it that fit `pattern`."""
    digest = hashlib.sha256()
    for path in paths:
        files = sorted(p for p in path.rglob(pattern) if p.is_file()) if path.is_dir() else [path]
        for file in files:
            name = file.relative_to(path) if path.is_dir() else file.name
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            digest.update(f"{name}\0{content}\n".encode())
    return digest.hexdigest()


def source_fingerprint() -> str:
    """SHA-256 (hex) of the package's Python source: as a stage's input, new code redoes it."""
    return file_fingerprint(Path(egjax.__file__).parent, pattern="*.py")


class BusyError(EgjaxError):
    """Another process is at work in a run directory."""


@contextlib.contextmanager
def open_run(run_dir: Path, *, fresh: bool = False, part: str = "") -> Iterator[Path]:
    """Opens a run directory for one process at a time, or for one a part.

    Args:
        run_dir: made if absent; one with content that no run left there is refused, so that
            `fresh` never deletes somebody's files.
        fresh: delete what earlier runs left in it; not together with `part`.
        part: names the part of a stage's work that this process does, while others do theirs.

    Raises:
        EgjaxError: it is no run directory.
        BusyError: another run is at work in it.
    """
    marker = run_dir / _MARKER
    if run_dir.exists() and not run_dir.is_dir():
        raise EgjaxError("not a directory", where=str(run_dir), remedy="name another --run")
    if run_dir.is_dir() and not marker.exists() and any(run_dir.iterdir()):
        raise EgjaxError(
            "holds files that no run of egjax left there",
            where=str(run_dir),
            remedy="name a new or empty directory",
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        held.enter_context(_locked(marker, run_dir, shared=bool(part)))
        if part:
            held.enter_context(_locked(run_dir / f"{_MARKER}-{part}", run_dir))
        if fresh:
            for entry in run_dir.iterdir():
                if entry.name != _MARKER:
                    _delete(entry)
        yield run_dir


@contextlib.contextmanager
def _locked(path: Path, run_dir: Path, *, shared: bool = False) -> Iterator[None]:
    """Holds the lock of a file, which names its one holder."""
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise BusyError(
                f"another run is at work here (process {lock.read().strip() or 'unknown'})",
                where=str(run_dir),
                remedy="wait for it or name another directory",
            ) from None
        if not shared:
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n")
            lock.flush()
        yield


def _delete(path: Path) -> None:
    """Deletes a file or folder; of a link the link only."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class Done:
    """A finished stage.

    Attributes:
        path: the directory with its outputs.
        fingerprint: names its inputs; part of the inputs of the stages that follow.
        seconds: wall time of the work, earlier interrupted attempts included.
        kept: it was finished by an earlier run.
    """

    path: Path
    fingerprint: str
    seconds: float
    kept: bool


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step of a run whose outputs are kept until its inputs change.

    Attributes:
        run_dir: an opened run directory, see `open_run`.
        name: names the stage and its directory.
        inputs: all that its outputs depend on: config, seed, fingerprints of the stages before
            (and `source_fingerprint()` where a change of code shall redo it).
    """

    run_dir: Path
    name: str
    inputs: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """The directory of its outputs."""
        return self.run_dir / self.name

    @property
    def fingerprint(self) -> str:
        """Names its inputs (SHA-256, hex)."""
        return fingerprint({"stage": self.name, "inputs": self.inputs})

    @property
    def unfinished(self) -> Path:
        """Where its outputs are until they are complete."""
        return self.run_dir / f"{self.name}.unfinished"

    def is_finished(self) -> bool:
        """It was finished from these inputs, and its outputs are still there."""
        return self._complete(self.path, self.fingerprint)

    def run(self, work: Callable[[Path], object]) -> Done:
        """Does the work, unless it was finished from the same inputs: then its outputs are kept.

        Work is done in `unfinished`, which becomes `path` at the end; so outputs of other inputs
        stay whole until new ones replace them. An interrupted attempt on the same inputs leaves
        its files there for `work` to go on from; one on other inputs is deleted. Outputs that
        vanished or changed their size since also mean that the stage is done again.

        Args:
            work: writes the outputs into the directory it is given.
        """
        name = self.fingerprint
        if self._complete(self.unfinished, name):  # stopped just before the last step
            self._publish()
        if self._complete(self.path, name):
            seconds = _read_json(self.path / _RECORD)["seconds"]
            note(f"{self.name}: kept from an earlier run ({seconds:.1f} s)")
            return Done(self.path, name, seconds, kept=True)
        before = self._attempt(name)
        note(f"{self.name}: goes on after {before:.1f} s" if before else f"{self.name}: starts")
        begin = time.monotonic()
        record = {"fingerprint": name, "inputs": _plain(self.inputs), "seconds": before}
        try:
            self._mark(record)
            work(self.unfinished)
        finally:
            record["seconds"] = before + time.monotonic() - begin
            with contextlib.suppress(OSError, EgjaxError):  # a full disk: the first error counts
                self._mark(record)
        finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._mark({**record, "finished": finished, "outputs": _sizes(self.unfinished)})
        self._publish()
        note(f"{self.name}: done in {record['seconds']:.1f} s")
        return Done(self.path, name, record["seconds"], kept=False)

    def _attempt(self, name: str) -> float:
        """Makes `unfinished` ready; seconds that went into what is found there."""
        record = _read_json(self.unfinished / _RECORD)
        if record.get("fingerprint") == name and "finished" not in record:
            return float(record["seconds"])
        _delete(self.unfinished)
        self.unfinished.mkdir(parents=True)
        return 0.0

    def _complete(self, path: Path, name: str) -> bool:
        record = _read_json(path / _RECORD)
        return (
            record.get("fingerprint") == name
            and "finished" in record
            and record["outputs"] == _sizes(path)
        )

    def _publish(self) -> None:
        _delete(self.path)
        os.replace(self.unfinished, self.path)

    def _mark(self, record: Mapping[str, Any]) -> None:
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        write_atomic(self.unfinished / _RECORD, text)


def _sizes(path: Path) -> dict[str, int]:
    """Bytes of each file of a stage, its record apart."""
    files = (p for p in sorted(path.rglob("*")) if p.is_file() and p.name != _RECORD)
    return {str(p.relative_to(path)): p.stat().st_size for p in files}


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}


def finished(run_dir: Path, name: str, *, made_by: str) -> Done:
    """A stage that an earlier command finished, for a stage script run by itself.

    Args:
        run_dir: the run.
        name: of the stage.
        made_by: module that makes it, named in the error.

    Raises:
        EgjaxError: it is not there or not finished.
    """
    record = _read_json(run_dir / name / _RECORD)
    if "finished" not in record or record["outputs"] != _sizes(run_dir / name):
        raise EgjaxError(
            f"no finished stage {name!r}",
            where=str(run_dir),
            remedy=f"run python -m experiments.{made_by} or experiments.pipeline first",
        )
    return Done(run_dir / name, record["fingerprint"], record["seconds"], kept=True)
