"""What all experiment scripts share: the command line, figures, stages that are kept.

Standard output carries results only (text, or JSON lines with `--json`); notes, progress and
errors go to standard error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import gc
import hashlib
import json
import logging
import os
import resource
import secrets
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any, Literal, NoReturn, TypeVar

import jax

import egjax
from egjax import hosts
from egjax.errors import EgjaxError, check_range, require
from egjax.evals.intervals import Figure
from egjax.evals.manifest import describe, revision, write_atomic
from egjax.files import (
    as_path,
    check_reach,
    delete,
    from_bucket,
    here,
    is_remote,
    make_folder,
    move,
    sizes,
)
from egjax.train.signals import StopFlag, stop_on_signals
from egjax.train.writers import WRITERS, check_writers
from experiments.lease import BusyError, leased, silence, watched

__all__ = [
    "PARTS",
    "BusyError",
    "Done",
    "Stage",
    "atomic_path",
    "divided",
    "emit",
    "file_fingerprint",
    "fingerprint",
    "finished",
    "inputs_of",
    "note",
    "open_run",
    "provenance",
    "run_main",
    "save_then_stop",
    "source_fingerprint",
]

C = TypeVar("C")
T = TypeVar("T")

_MARKER = ".egjax-run"  # at the top of every run directory: proof of ownership, and the lock
_RECORD = ".stage.json"  # in a stage's directory: its inputs, time, and outputs once finished
PARTS = "parts"
"""Folder in a stage's directory for what is needed until the stage is finished, see `divided`."""
_ANYWHERE = ("run", "out")  # options of places that may be in a bucket
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STALE = 10.0  # seconds that a shared file system may show another host what was there before
_AGAIN = 0.05  # seconds until a signal that hit a finaliser is sent again
_YOUNG = 10_000  # new objects until Python looks for garbage cycles among them, 700 by its default


# --- the command line ---------------------------------------------------------------------------


class _Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM came; a KeyboardInterrupt, so that `except Exception` lets it through."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


def _stop(signum: int, _frame: object) -> NoReturn:
    raise _Stopped(signum)


def _ignore_signals() -> None:
    for signum in _SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def _unraised(unraisable: Any) -> None:
    """`sys.unraisablehook`: Python drops what is raised in a finaliser or in a callback of its
    garbage collector (JAX has one), also a stop; the signal is sent again a moment later.

    Where a checkpoint fails (a full disk), Orbax raises what the first write said, and every other
    one finds its event loop closed: hundreds of tracebacks around the line that says why."""
    if isinstance(unraisable.exc_value, RuntimeError) and (
        str(unraisable.exc_value) == "Event loop is closed"
    ):
        return
    if isinstance(unraisable.exc_value, _Stopped):
        again = threading.Timer(_AGAIN, signal.raise_signal, (unraisable.exc_value.signum,))
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(unraisable)


def _untraced(record: logging.LogRecord) -> bool:
    """A library's log, without tracebacks: what Orbax logs with one, from each of its threads, it
    raises as well."""
    if not os.environ.get("EGJAX_TRACEBACK"):
        record.exc_info = record.exc_text = None
    return True


def run_main(
    main: Callable[[C], int | None],
    config: type[C],
    argv: list[str] | None = None,
    *,
    default: Callable[[Sequence[str]], C] | None = None,
) -> NoReturn:
    """Runs an experiment from the command line and leaves with its exit code.

    Exit codes: what `main` returns (None counts as 0) · 2 for what the user can mend, told in one
    line · 3 for a training step that gave NaN or Inf · 4 where another process of the job is
    missing or gone · 130 after Ctrl-C, 143 after SIGTERM · 141 where the reader of our output went
    away.

    With `EGJAX_MULTI_HOST=1` the processes of a multi-host job are connected first, with `auto`
    where there is such a job (a TPU pod, Slurm, Open MPI); process 0 alone prints results. With
    `EGJAX_TRACEBACK=1` what the user can mend comes with its traceback, too. `EGJAX_COSTS=FILE`
    asks for seconds of compilation and peak memory, as JSON.

    Every script knows `--profile FOLDER` beside its own options: a trace of the whole run by
    `jax.profiler`, for Perfetto (`perfetto_trace.json.gz`) and XProf.

    Args:
        main: the experiment; its module's docstring is the help.
        config: a frozen dataclass; each field becomes an option.
        argv: arguments, those of the process by default.
        default: the options' defaults where they depend on the arguments; else those of `config`.
    """
    tyro = require("tyro", "cli")
    folder, argv = _profile_option(sys.argv[1:] if argv is None else argv)
    help_text = (
        f"{sys.modules[main.__module__].__doc__}\n"
        "`--profile FOLDER` (every script): writes a trace for Perfetto and XProf there."
    )
    for signum in _SIGNALS:
        signal.signal(signum, _stop)
    sys.unraisablehook = _unraised
    logging.getLogger("absl").addFilter(_untraced)
    # Tracing and graphs read from JSON are millions of small objects that stay: looked at so often,
    # they cost a tenth of a short run.
    gc.set_threshold(_YOUNG)
    try:
        plain = {} if default is None else {"default": default(argv)}
        options = tyro.cli(config, args=argv, description=help_text, prog=_command(), **plain)
        options = _places(options)
        _check_seeds(options)
        for seconds in (hosts.patience, hosts.silence, silence):
            seconds()  # a setting that is no number is told before any work
        check_writers(getattr(options, "log_to", ()))
        _join()  # has to come before JAX looks for devices
        note(_machine_line())
        with _profile(folder), _costs(os.environ.get("EGJAX_COSTS")):
            code = main(options) or 0
        sys.stdout.flush()
        hosts.finish()
    except KeyboardInterrupt as stopped:
        _ignore_signals()
        note("stopped; continue with the same command")
        code = 128 + getattr(stopped, "signum", signal.SIGINT)
        _leave(code, "asked to stop")
    except BrokenPipeError:
        if not _reader_gone():
            raise
        code = 128 + signal.SIGPIPE
    except Exception as error:
        if hosts.count() > 1:  # stopped here, it would wait for the others at Python's end
            _ignore_signals()
        line = _one_line(error)
        if hosts.count() > 1 and _may_be_a_peer(error):
            note(f"error: {_first_words(error)}; looking for a process that is gone")
            hosts.wait_for_verdict()
        if line is None or os.environ.get("EGJAX_TRACEBACK"):
            if hosts.count() == 1:
                raise
            traceback.print_exc()
            line = _first_words(error)
        note(f"error: {line}")
        code = getattr(error, "exit_code", EgjaxError.exit_code)
        _leave(code, line)
    sys.exit(code)


def _check_seeds(config: Any) -> None:
    """Refuses seeds that NumPy's generators do not take, and the same one twice."""
    check_range(getattr(config, "seed", None), "[0, 4294967296)", where="--seed")
    seeds = getattr(config, "seeds", ())
    for seed in seeds:
        check_range(seed, "[0, 4294967296)", where="--seeds")
    if len(set(seeds)) < len(seeds):
        raise EgjaxError("a seed is given twice, and would count twice", where="--seeds")


def _profile_option(argv: list[str]) -> tuple[Path | None, list[str]]:
    """The folder that `--profile` names, and the other arguments."""
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name == "--profile" and equals:
            return Path(value), argv[:i] + argv[i + 1 :]
        if name == "--profile":
            if i + 1 == len(argv):
                note("error: --profile needs a folder")
                sys.exit(2)
            return Path(argv[i + 1]), argv[:i] + argv[i + 2 :]
    return None, argv


def _places(config: C, name: str = "") -> C:
    """A config with paths that can be worked with: `--run` and `--out` may be in a bucket.

    Raises:
        EgjaxError: another place is in one, or cannot be reached.
    """
    new: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value, option = getattr(config, field.name), f"{name}{field.name}"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            new[field.name] = _places(value, f"{option}.")
        elif isinstance(value, Path):
            if option not in _ANYWHERE:
                here(value, f"--{option.replace('_', '-')}")
            new[field.name] = as_path(value)
    changed = {key: value for key, value in new.items() if value != getattr(config, key)}
    return dataclasses.replace(config, **changed) if changed else config  # type: ignore[type-var]


@contextlib.contextmanager
def _profile(folder: Path | None) -> Iterator[None]:
    """Writes a trace of its block, also where the block is stopped; nothing without a folder."""
    if folder is None:
        yield
        return
    here(folder, "--profile")
    options = jax.profiler.ProfileOptions()
    # Calls of Python functions would fill the million events that such a file holds in seconds.
    options.python_tracer_level = 0
    with jax.profiler.trace(
        str(folder), create_perfetto_trace=hosts.index() == 0, profiler_options=options
    ):
        yield
    found = sorted(folder.rglob("perfetto_trace.json.gz"))
    note(f"profile: {found[-1] if found else folder} (https://ui.perfetto.dev, or xprof {folder})")


@contextlib.contextmanager
def _costs(path: str | None) -> Iterator[None]:
    """Writes what its block cost beside time: compilation and memory."""
    seconds = []
    if path is not None:

        def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
            del kwargs
            if event == "/jax/core/compile/backend_compile_duration":
                seconds.append(duration_secs)

        jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        if path is not None:
            found = {"compile_seconds": sum(seconds), "compilations": len(seconds)}
            write_atomic(Path(path), json.dumps({**found, "peak_bytes": _peak_memory()}) + "\n")


def _peak_memory() -> int:
    """Most bytes that this process held."""
    with contextlib.suppress(OSError):
        # What getrusage says begins with what the parent held when it started this process.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def _join() -> None:
    """Connects to the other processes of the job, if there are any."""
    mode = os.environ.get("EGJAX_MULTI_HOST", "")
    if mode in ("", "0") or (mode == "auto" and None in hosts.find()):
        return
    # JAX's collectives on CPUs (Gloo) write to file 1, which is for results: they get our errors'.
    sys.stdout.flush()
    results = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    if hosts.start_hosts() > 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), results)
    sys.stdout = open(results, "w", encoding=sys.stdout.encoding)  # noqa: SIM115  (to the end)


def _leave(code: int, line: str) -> None:
    """Ends a process of several, which must not wait for the others."""
    if hosts.count() > 1:
        hosts.abandon(code, line)


def _may_be_a_peer(error: BaseException | None) -> bool:
    """Whether an error comes from JAX's runtime, as one does where another process is gone."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_words(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _command() -> str | None:
    """How the program was called, for its usage line; None for a script called by its path."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else None


@contextlib.contextmanager
def save_then_stop() -> Iterator[StopFlag]:
    """For loops that save at a step's end: `stop_on_signals`, and after it the program is stopped
    as `run_main` says."""
    with stop_on_signals() as flag:
        yield flag
    if flag.signum is not None:
        raise _Stopped(flag.signum)


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
    if from_bucket(error):
        return (
            f"the bucket does not take or give it: {_first_words(error)} "
            "(once it does the same command goes on from what was saved)"
        )
    full = _disk_full(error)
    if full is not None:
        return (
            f"{full or 'the disk'}: no space left "
            "(make room and give the same command: finished stages are kept)"
        )
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return f"{error.filename or 'the folder'}: the file system is read-only"
    if (
        isinstance(
            error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError
        )
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
            return str(error.filename2 or error.filename or "")  # of a copy, its target
        if os.strerror(errno.ENOSPC).lower() in str(error).lower():
            return ""
        error = error.__cause__ or error.__context__
    return None


def note(text: str) -> None:
    """Prints a line for the person at the terminal, on standard error."""
    text = text if hosts.count() == 1 else f"[{hosts.index()}] {text}"
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
    first, *more = here.hardware.devices
    parts = (
        f"egjax {egjax.__version__} {revision(length=12)}".rstrip(),
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
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / path.name
            yield part
            write_atomic(path, part.read_bytes())
        return
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
    """A JSON form of a config, the same for equal values, and for those that differ in nothing but
    fields that leave the result as it is (`SAME_RESULT`): these count as they are by default."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: _plain(f.default if f.metadata.get("same_result") else getattr(value, f.name))
            for f in dataclasses.fields(value)
        }
        return {"type": type(value).__qualname__, **fields}
    if isinstance(value, Mapping):
        return {str(key): _plain(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=repr)
    if isinstance(value, PurePath):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    raise TypeError(f"cannot take the fingerprint of a {type(value).__name__}: {value!r}")


def _changes(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """What differs between two forms that `_plain` gave, each in a few words."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            yield from _changes(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        long = any(len(str(value)) > 40 for value in (old, new))  # fingerprints above all
        yield f"{name} is another" if long else f"{name} was {old}, is {new}"


def _told(changes: Sequence[str], most: int = 4) -> str:
    more = f" and {len(changes) - most} more" if len(changes) > most else ""
    return "; ".join(changes[:most]) + more


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
    held_by = run_dir / (f"{_MARKER}-{part}" if part else _MARKER)
    if hosts.index() > 0:  # process 0 opens it for all, on a file system that all of them see
        _check_shared(run_dir, held_by, hosts.agree(f"opening {run_dir}"))
        with watched(run_dir, _MARKER) if is_remote(run_dir) else contextlib.nullcontext():
            yield run_dir
        return
    check_reach(run_dir)
    marker = run_dir / _MARKER
    if run_dir.exists() and not run_dir.is_dir():
        raise EgjaxError("not a directory", where=str(run_dir), remedy="name another --run")
    if run_dir.is_dir() and not marker.exists() and any(run_dir.iterdir()):
        raise EgjaxError(
            "holds files that no run of egjax left there",
            where=str(run_dir),
            remedy="name a new or empty directory",
        )
    make_folder(run_dir)
    with contextlib.ExitStack() as held:
        if is_remote(run_dir):
            held.enter_context(leased(run_dir, _MARKER, part))
        else:
            held.enter_context(_locked(marker, run_dir, shared=bool(part)))
            if part:
                held.enter_context(_locked(run_dir / f"{_MARKER}-{part}", run_dir))
        if fresh:
            for entry in list(run_dir.iterdir()):
                if entry.name != _MARKER:
                    delete(entry)
        hosts.agree(f"opening {run_dir}", "" if is_remote(run_dir) else held_by.read_text())
        yield run_dir


def _check_shared(run_dir: Path, held_by: Path, holder: str) -> None:
    """Refuses a directory in which process 0 is not at work: one of this host's own, of its name.

    Args:
        run_dir: as this process sees it.
        held_by: the file that process 0 holds.
        holder: what it has written there; "" in a bucket, which is one for all.
    """
    deadline = time.monotonic() + _STALE
    while holder and not (held_by.exists() and held_by.read_text() == holder):
        if time.monotonic() > deadline:
            raise EgjaxError(
                "process 0 has opened it, this one does not see it",
                where=str(run_dir),
                remedy="let the run directory be on a file system that all hosts share",
            )
        time.sleep(0.2)


@contextlib.contextmanager
def _locked(path: Path, run_dir: Path, *, shared: bool = False) -> Iterator[None]:
    """Holds the lock of a file, which names its one holder."""
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise BusyError(
                f"another run is at work here (process {lock.read().split(',')[0] or 'unknown'})",
                where=str(run_dir),
                remedy="wait for it or name another directory",
            ) from None
        if not shared:
            lock.truncate(0)
            lock.write(f"{os.getpid()}, {secrets.token_hex(8)}\n")
            lock.flush()
            os.fsync(lock.fileno())  # other hosts of the job look at it
        yield


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
        by: who does it in a job of several processes. `first`: process 0, and the others wait.
            `all`: all of them together, in the same directory. `self`: whichever process runs it,
            which meets no other (a shard that is no other process' business).
    """

    run_dir: Path
    name: str
    inputs: Mapping[str, Any]
    by: Literal["first", "all", "self"] = "first"

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
        its files there for `work` to go on from; one on other inputs is deleted, unless it holds
        checkpoints. Outputs that vanished or changed their size since also mean that the stage is
        done again; checkpoints, logs for other programs and files that were added do not count.

        Args:
            work: writes the outputs into the directory it is given; what it leaves in the folder
                `PARTS` there is deleted at the end.

        Raises:
            EgjaxError: an interrupted attempt on other inputs left checkpoints; says what changed.
        """
        name = self.fingerprint
        alone = self.by == "self"
        plan = json.dumps(self._begin(name)) if alone or _writer() else ""
        kept, record = json.loads(plan if alone else hosts.agree(f"stage {self.name}", plan))
        before = record["seconds"]
        if kept:
            return Done(self.path, name, before, kept=True)
        begin = time.monotonic()
        try:
            if self.by != "first" or _writer():
                work(self.unfinished)
            if not alone:
                hosts.barrier(f"the end of stage {self.name}")
        finally:
            record["seconds"] = before + time.monotonic() - begin
            with contextlib.suppress(OSError, EgjaxError):  # a full disk: the first error counts
                self._mark(record)
        if alone or _writer():
            delete(self.unfinished / PARTS)
            finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            self._mark({**record, "finished": finished, "outputs": _sizes(self.unfinished)})
            self._publish()
            note(f"{self.name}: done in {record['seconds']:.1f} s")
        if not alone:
            hosts.barrier(f"the outputs of stage {self.name}")
        return Done(self.path, name, record["seconds"], kept=False)

    def _begin(self, name: str) -> tuple[bool, dict[str, Any]]:
        """Whether the stage is done already, and its record."""
        if self._complete(self.unfinished, name):  # stopped just before the last step
            self._publish()
        if self._complete(self.path, name):
            record = _read_json(self.path / _RECORD)
            note(f"{self.name}: kept from an earlier run ({record['seconds']:.1f} s)")
            return True, record
        self._tell_why(name)
        before, code = self._attempt(name)
        note(f"{self.name}: goes on after {before:.1f} s" if before else f"{self.name}: starts")
        record = {
            "fingerprint": name,
            "inputs": _plain(self.inputs),
            "seconds": before,
            "code": [*dict.fromkeys([*code, revision()])],
        }
        self._mark(record)
        return False, record

    def _tell_why(self, name: str) -> None:
        """Says why a stage that was finished is done again."""
        record = _read_json(self.path / _RECORD)
        if "finished" not in record:
            return
        if record.get("fingerprint") == name:
            changes = [f"{file} is gone or changed" for file in _missing(record, self.path)]
        else:
            changes = list(_changes(record.get("inputs", {}), _plain(self.inputs)))
        note(f"{self.name}: is done again, then replaced: {_told(changes)}")

    def _attempt(self, name: str) -> tuple[float, list[str]]:
        """Makes `unfinished` ready; seconds and revisions that went into what is found there."""
        record = _read_json(self.unfinished / _RECORD)
        same = record.get("fingerprint") == name
        if same and "finished" not in record:
            return float(record["seconds"]), record.get("code", [])
        if not same and self.unfinished.is_dir():
            changes = _told([*_changes(record.get("inputs", {}), _plain(self.inputs))])
            if _trained(self.unfinished):
                raise EgjaxError(
                    f"holds checkpoints of other inputs: {changes}",
                    where=str(self.unfinished),
                    remedy="give those again, name another --run, or delete this folder",
                )
            note(f"{self.name}: an unfinished attempt is deleted: {changes}")
        delete(self.unfinished)
        make_folder(self.unfinished)
        return 0.0, []

    def _complete(self, path: Path, name: str) -> bool:
        record = _read_json(path / _RECORD)
        return (
            record.get("fingerprint") == name
            and "finished" in record
            and not _missing(record, path)
        )

    def _publish(self) -> None:
        delete(self.path)
        move(self.unfinished, self.path, last=_RECORD)

    def _mark(self, record: Mapping[str, Any]) -> None:
        if self.by != "self" and not _writer():
            return
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        write_atomic(self.unfinished / _RECORD, text)


def _writer() -> bool:
    """Whether this process is the one that writes what is not divided."""
    return hosts.index() == 0


def divided(
    folder: Path | None,
    units: Mapping[str, Callable[[], T]],
    *,
    at: str,
    workers: int = 1,
    dump: Callable[[T], Any] = lambda result: result,
    load: Callable[[Any], T] = lambda found: found,
    done: Callable[[T], None] = lambda result: None,
) -> list[T]:
    """Does units of work, each once and by one process; a restart does those that are missing.

    Args:
        folder: keeps the result of each unit, seen by all processes; below `PARTS` of a stage's
            directory, so until that is finished. None: this process does all, and keeps nothing.
        units: what gives a unit's result, by a name that can be a file's. All processes have the
            same ones, in the same order.
        at: names the place where processes meet, for errors.
        workers: threads; the first unit is done alone, since it compiles what the others use.
        dump, load: a result to what JSON holds, and back.
        done: called with each result of this process.

    Returns:
        All results in order, on every process.
    """
    mine = list(units)
    if folder is not None:
        missing = [name for name in mine if not (folder / f"{name}.json").exists()]
        missing = json.loads(hosts.agree(f"the start of {at}", json.dumps(missing)))
        mine = missing[hosts.index() :: hosts.count()]

    def work(name: str) -> T:
        result = units[name]()
        if folder is not None:
            text = json.dumps(dump(result), ensure_ascii=False) + "\n"
            write_atomic(folder / f"{name}.json", text)
        return result

    results: dict[str, T] = {}

    def take(name: str, result: T) -> None:
        results[name] = result
        done(result)

    # Without threads a signal does not have to wait for the end of a unit.
    alone = mine if workers == 1 else mine[:1]
    for name in alone:
        take(name, work(name))
    with ThreadPoolExecutor(workers) as pool:
        rest = mine[len(alone) :]
        for name, result in zip(rest, pool.map(work, rest), strict=True):
            take(name, result)
    if folder is None:
        return list(results.values())
    hosts.barrier(f"the end of {at}")
    return [
        load(json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))) for name in units
    ]


def _sizes(path: Path) -> dict[str, int]:
    """Bytes of each output of a stage."""
    return {name: size for name, size in sizes(path).items() if _is_output(name)}


def _is_output(name: str) -> bool:
    """Neither the stage's record nor what `egjax.train` needs or writes on the way."""
    parts = PurePath(name).parts
    return parts[-1] != _RECORD and parts[0] not in ("checkpoints", *WRITERS)


def _missing(record: Mapping[str, Any], path: Path) -> list[str]:
    """Outputs of a finished stage that are gone or of another size."""
    found = sizes(path)
    outputs = record["outputs"].items()
    return [name for name, size in outputs if _is_output(name) and found.get(name) != size]


def _trained(path: Path) -> bool:
    """Whether there are checkpoints of a step after the first state."""
    folder = path / "checkpoints"
    steps = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return any(name.isdecimal() and int(name) for name in steps)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}


_SHARED_STAGES = ("tasks", "collect", "text")  # that all seeds of a run build on


def inputs_of(folder: Path) -> tuple[str, dict[str, Any]]:
    """What a stage at work in a folder is made from: its fingerprint, and its inputs as JSON;
    empty where no stage is."""
    record = _read_json(folder / _RECORD)
    return record.get("fingerprint", ""), record.get("inputs", {})


def finished(run_dir: Path, name: str, *, made_by: str) -> Done:
    """A stage that an earlier command finished, for a stage script run by itself.

    Args:
        run_dir: the run.
        name: of the stage.
        made_by: module that makes it, named in the error.

    Raises:
        EgjaxError: it is not there or not finished, or was made from other tasks, experience or
            text than those that the run has now.
    """
    record = _read_json(run_dir / name / _RECORD)
    scripts = (f"experiments.{made_by}", "experiments.pipeline")
    if "finished" not in record or _missing(record, run_dir / name):
        raise EgjaxError(
            f"no finished stage {name!r}",
            where=str(run_dir),
            remedy=f"run python -m {' or '.join(dict.fromkeys(scripts))} first",
        )
    for before in _SHARED_STAGES:
        known, now = record.get("inputs", {}).get(before), _read_json(run_dir / before / _RECORD)
        if known is not None and "finished" in now and now["fingerprint"] != known:
            raise EgjaxError(
                f"stage {name!r} was made from another stage {before!r} than the run has now",
                where=str(run_dir),
                remedy=f"run python -m {' or '.join(dict.fromkeys(scripts))} again",
            )
    return Done(run_dir / name, record["fingerprint"], record["seconds"], kept=True)


def provenance(done: Done) -> tuple[str, tuple[str, ...]]:
    """When a stage was finished (UTC, ISO 8601), and by which revisions of the code."""
    record = _read_json(done.path / _RECORD)
    return record["finished"], tuple(record.get("code", ()))
