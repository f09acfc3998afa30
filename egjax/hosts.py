"""Several processes of one job: who is there, who decides, who is gone, when to stop together.

Process 0 coordinates. Everything here goes over plain messages (a socket before JAX has started,
the key-value store of JAX's coordination service afterwards), never over a collective: a collective
hangs where a process is missing, and that is what has to be told. With one process every function
does the obvious thing at once, so callers need no second path.

Environment: `EGJAX_COORDINATOR` ("host:port"), `EGJAX_PROCESSES`, `EGJAX_PROCESS` where JAX cannot
find them out by itself (it can on a TPU pod, under Slurm and under Open MPI); `EGJAX_HOSTS`, host
names by process separated by commas, so that a host that never answers can be named, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn

import jax
from jax._src import distributed  # the key-value store has no public name
from jax._src.clusters import ClusterEnv

from egjax.errors import EgjaxError, seconds_from

__all__ = [
    "LOST",
    "Agreed",
    "MissingError",
    "abandon",
    "agree",
    "barrier",
    "count",
    "facts",
    "find",
    "finish",
    "index",
    "patience",
    "rendezvous",
    "silence",
    "start_hosts",
    "unlike",
    "wait_for_verdict",
]

LOST = 4
"""Exit code where another process is missing or gone: the same command may well go on."""

PREFLIGHT = 60.0
"""Seconds in which all processes have to be there and alike."""
_BEAT = 2.0  # seconds between two signs of life
_PACKAGES = ("egjax", "jax", "jaxlib", "libtpu", "flax", "optax", "numpy", "orbax-checkpoint")


def patience() -> float:
    """Seconds that a barrier waits while another process works, `EGJAX_PATIENCE`; one that dies is
    noticed before."""
    return seconds_from("EGJAX_PATIENCE", 12 * 3600)


def silence() -> float:
    """Seconds without a sign of life after which a process counts as gone, `EGJAX_SILENCE`."""
    return seconds_from("EGJAX_SILENCE", 60)


class MissingError(EgjaxError):
    """A process is not there."""

    exit_code: ClassVar[int] = LOST


class Place(NamedTuple):
    """Where a process stands in its job: address of process 0, number of processes, own index."""

    coordinator: str | None
    count: int | None
    index: int | None


class _Job:
    """This process in a job of several."""

    def __init__(self, client: Any, index: int, hosts: Sequence[str]):
        self.client, self.index, self.hosts = client, index, list(hosts)
        self.turn = 0  # of barriers; equal on all processes, which meet at the same ones
        self.leaving = threading.Event()
        self.agreed: Agreed | None = None
        self.lock = threading.Lock()
        self.keep: Any = None

    def name(self, index: int) -> str:
        return f"process {index} ({self.hosts[index]})"

    def get(self, key: str) -> str | None:
        """Value of a key; None if nobody has set it."""
        try:
            return self.client.key_value_try_get(key)
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" in str(error):
                return None
            raise

    def put(self, key: str, value: str, *, overwrite: bool = False) -> None:
        self.client.key_value_set(key, value, overwrite)

    def folder(self, key: str) -> dict[str, str]:
        """Values below a key by the last part of their names."""
        return {k.rsplit("/", 1)[-1]: v for k, v in self.client.key_value_dir_get(key)}


_job: _Job | None = None


def index() -> int:
    """Number of this process, from 0."""
    return 0 if _job is None else _job.index


def count() -> int:
    """Number of processes."""
    return 1 if _job is None else len(_job.hosts)


# --- the start ----------------------------------------------------------------------------------


def find() -> Place:
    """Where this process stands, from the environment; None for what cannot be found out."""
    address = os.environ.get("EGJAX_COORDINATOR")
    if address:
        try:
            return Place(
                address, int(os.environ["EGJAX_PROCESSES"]), int(os.environ["EGJAX_PROCESS"])
            )
        except (KeyError, ValueError) as error:
            raise EgjaxError(
                f"EGJAX_COORDINATOR needs EGJAX_PROCESSES and EGJAX_PROCESS, too: {error}"
            ) from None
    found = ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, round(PREFLIGHT)
    )
    return Place(*found[:3])


def start_hosts(
    coordinator: str | None = None,
    hosts: int | None = None,
    index: int | None = None,
    *,
    timeout_s: float = PREFLIGHT,
    mine: Mapping[str, str] | None = None,
) -> int:
    """Joins this process to the others of a multi-host job; call it before any other JAX call.

    Before JAX connects, all processes report to process 0 over the same port, which compares them;
    so one that is missing or unlike is named, instead of a hang or an abort. What only JAX knows,
    the devices of each process, is compared afterwards, still before any collective.

    Args:
        coordinator: `"address:port"` of the process with index 0.
        hosts: number of processes.
        index: this process' index.
        timeout_s: seconds to wait for the others.
        mine: what has to be alike, `facts()` by default.

    Returns:
        The index of this process. What is None is found out, see `find`.

    Raises:
        MissingError: a process is missing.
        EgjaxError: the arguments are incomplete, or a process has other code, other library
            versions or fewer devices.
    """
    global _job
    if None in (coordinator, hosts, index):
        found = find()
        coordinator = found.coordinator if coordinator is None else coordinator
        hosts = found.count if hosts is None else hosts
        index = found.index if index is None else index
    if coordinator is None or hosts is None or index is None:
        raise EgjaxError(
            f"process {index} of {hosts} did not join: no coordinator is known",
            remedy="set EGJAX_COORDINATOR, EGJAX_PROCESSES and EGJAX_PROCESS on every host",
        )
    if not 0 <= index < hosts:
        raise EgjaxError(f"process index {index} of {hosts}", remedy="indices run from 0")
    if not coordinator.rpartition(":")[2].isdigit():
        raise EgjaxError(
            f"{coordinator!r} names no port", remedy="say host:port, e.g. 10.0.0.1:8476"
        )
    if hosts == 1:
        return 0
    names = rendezvous(coordinator, hosts, index, mine or facts(), timeout_s)
    # Python's handlers of SIGTERM stay: `Agreed` is what JAX's service would do with the signal.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            hosts,
            index,
            cluster_detection_method="deactivate",  # Slurm's would show each process one GPU only
            initialization_timeout=round(PREFLIGHT),
            heartbeat_timeout_seconds=600,  # the watch is sooner, and says who
        )
    except (RuntimeError, ValueError) as error:
        raise EgjaxError(
            f"process {index} of {hosts} did not join at {coordinator}: {error}",
            remedy="start the same command on every host, within the timeout, before other JAX use",
        ) from error
    _job = _Job(distributed.global_state.client, index, names)
    threading.Thread(target=_watch, args=(_job,), daemon=True, name="egjax-hosts").start()
    if index > 0:
        _explain_abort(_job, coordinator)
    seen = {"devices": f"{jax.local_device_count()} {jax.local_devices()[0].device_kind}"}
    everyone = agree("devices", json.dumps(seen), gather=True, timeout_s=timeout_s)
    wrong = unlike([json.loads(one) for one in everyone], names)
    if wrong:
        raise EgjaxError(wrong, remedy="all hosts have to see the same accelerators")
    return index


def facts() -> dict[str, str]:
    """What has to be alike on all hosts: code, Python, libraries, accelerators in the machine."""
    found = {"commit": _commit(), "code": _code()[:12], "Python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found | {"chips": str(_chips())}


def _commit() -> str:
    try:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"  # a copy without .git: `code` decides


def _code() -> str:
    """SHA-256 (hex) of the package and of the scripts beside it, changes without a commit told."""
    digest, here = hashlib.sha256(), Path(__file__).resolve().parent
    for folder in (here, here.parent / "experiments"):
        for file in sorted(folder.rglob("*.py")):
            digest.update(f"{file.relative_to(here.parent)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def _chips() -> int:
    """Accelerators in the machine, counted without starting JAX; of CPUs the asked-for devices."""
    tpus = [p for p in ("/dev/accel", "/dev/vfio/") for p in _devices(p)]
    if tpus and os.environ.get("JAX_PLATFORMS", "tpu") != "cpu":
        return len(tpus)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = len([p for p in _devices("/dev/nvidia") if p.removeprefix("/dev/nvidia").isdigit()])
    if gpus and os.environ.get("JAX_PLATFORMS", "cuda") != "cpu":
        return gpus if visible is None else len([x for x in visible.split(",") if x.strip()])
    asked = re.search(r"device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return int(asked[1]) if asked else 1


def _devices(prefix: str) -> list[str]:
    folder = Path(prefix).parent if not prefix.endswith("/") else Path(prefix)
    if not folder.is_dir():
        return []
    names = [str(p) for p in folder.iterdir()]
    return [n for n in names if n.startswith(prefix) and n.removeprefix(prefix).isdigit()]


def unlike(every: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> str:
    """Which process differs from most of the others, and in what; "" where all are alike.

    Args:
        every: facts by process.
        hosts: name of each process' host.
    """
    told = []
    for key in dict.fromkeys(k for one in every for k in one):
        values = [one.get(key, "none") for one in every]
        usual, _ = Counter(values).most_common(1)[0]  # of equally common ones process 0's
        told += [
            f"process {i} ({hosts[i]}) has {key} {value}, others {usual}"
            for i, value in enumerate(values)
            if value != usual
        ]
    return "; ".join(told)


def rendezvous(
    coordinator: str, hosts: int, index: int, mine: Mapping[str, str], timeout_s: float
) -> list[str]:
    """All processes report to process 0 and hear its verdict; nothing of JAX is needed.

    Args:
        coordinator: `"address:port"`; JAX listens there afterwards, so no other port is opened.
        hosts, index: number of processes, and of this one.
        mine: see `facts`.
        timeout_s: seconds until who is missing is told.

    Returns:
        Name of every process' host.

    Raises:
        MissingError: a process did not come in time.
        EgjaxError: they differ; the verdict is the same on every process that is there.
    """
    name = socket.gethostname()
    report = {"index": index, "hosts": hosts, "host": name, "facts": dict(mine)}
    deadline = time.monotonic() + timeout_s
    address, _, port = coordinator.rpartition(":")
    if index == 0:
        verdict = _receive(int(port), report, deadline)
    else:
        verdict = _send(address, int(port), report, deadline, coordinator)
    if verdict["wrong"]:
        error = MissingError if verdict["missing"] else EgjaxError
        raise error(verdict["wrong"], remedy=verdict["remedy"])
    return verdict["names"]


def _receive(port: int, report: dict[str, Any], deadline: float) -> dict[str, Any]:
    """Process 0: waits for all reports, answers every one."""
    reports, lines = {0: report}, []
    try:
        server = socket.create_server(("", port))
    except OSError as error:
        raise EgjaxError(
            f"cannot listen on port {port}: {error.strerror}", remedy="end the job that does"
        ) from None
    with server:
        while len(reports) < report["hosts"] and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                line, _ = server.accept()
                line.settimeout(5.0)
                one = json.loads(line.makefile("r").readline(65536))
                reports[int(one["index"])] = one
                lines.append(line)
        verdict = _verdict(reports, report["hosts"])
        for line in lines:
            with contextlib.suppress(OSError), line:
                line.sendall((json.dumps(verdict) + "\n").encode())
                line.recv(1)  # the other end closes first, and the port is free at once
    return verdict


def _verdict(reports: dict[int, dict[str, Any]], hosts: int) -> dict[str, Any]:
    known = os.environ.get("EGJAX_HOSTS") or os.environ.get("TPU_WORKER_HOSTNAMES") or ""
    listed = known.split(",") if len(known.split(",")) == hosts else ["host unknown"] * hosts
    names = [reports[i]["host"] if i in reports else listed[i] for i in range(hosts)]
    missing = [i for i in range(hosts) if i not in reports]
    beyond = [i for i in sorted(reports) if i >= hosts]
    if beyond:
        told = (f"process {i} ({reports[i]['host']}) counts {reports[i]['hosts']}" for i in beyond)
        wrong = f"{', '.join(told)} processes, process 0 ({names[0]}) counts {hosts}"
        remedy = "set EGJAX_PROCESSES alike on every host"
    elif missing:
        there = ", ".join(f"{i} ({names[i]})" for i in sorted(reports))
        told = ", ".join(f"process {i} ({names[i]})" for i in missing)
        wrong = f"missing: {told}; there: {there}"
        remedy = "start the same command on that host; see its log for why it did not"
    else:
        every = [
            {**reports[i]["facts"], "processes": str(reports[i]["hosts"])} for i in range(hosts)
        ]
        wrong = unlike(every, names)
        remedy = "install the same commit and versions everywhere: tpu_scripts/setup.sh"
    return {
        "wrong": wrong,
        "remedy": remedy,
        "names": names,
        "missing": bool(missing) and not beyond,
    }


def _send(
    address: str, port: int, report: dict[str, Any], deadline: float, coordinator: str
) -> dict[str, Any]:
    """Another process: reports as soon as process 0 listens, and waits for its verdict."""
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((address, port), timeout=5.0) as line:
                line.sendall((json.dumps(report) + "\n").encode())
                line.settimeout(max(deadline - time.monotonic(), 0) + 10.0)
                answer = line.makefile("r").readline()
                if answer:
                    return json.loads(answer)
        except (OSError, ValueError):
            pass
        time.sleep(0.5)
    raise MissingError(
        f"missing: process 0, which has to answer at {coordinator}",
        remedy="start the same command there, and let this host reach that port",
    )


# --- meeting ------------------------------------------------------------------------------------


def agree(
    name: str, value: str = "", *, gather: bool = False, timeout_s: float | None = None
) -> Any:
    """All processes meet, and learn what process 0 says; every process has to call it.

    Signals are handled while it waits, and a process that dies ends the wait, see `_watch`.

    Args:
        name: of the place, for the error.
        value: what process 0 says; of the others it is passed over.
        gather: return what each process says, in their order, instead.
        timeout_s: seconds to wait, `patience()` by default.

    Raises:
        EgjaxError: naming the processes that did not come in time.
    """
    job = _job
    if job is None:
        return [value] if gather else value
    if timeout_s is None:
        timeout_s = patience()
    job.turn += 1
    key, deadline = f"egjax/meet/{job.turn}", time.monotonic() + timeout_s
    job.put(f"{key}/at/{job.index}", json.dumps([name, value]))
    pause = 0.02
    while job.index == 0:
        here = job.folder(f"{key}/at")
        if len(here) == len(job.hosts):
            said = [json.loads(here[str(i)]) for i in range(len(job.hosts))]
            places = unlike([{"reached": place} for place, _ in said], job.hosts)
            job.put(f"{key}/go", json.dumps([places, [v for _, v in said] if gather else value]))
            break
        if time.monotonic() > deadline:
            job.put(f"{key}/go", json.dumps([_absent(job, here, name, timeout_s), None]))
            break
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
    pause = 0.02
    while (answer := job.get(f"{key}/go")) is None:
        if time.monotonic() > deadline + 10:
            raise EgjaxError(_absent(job, job.folder(f"{key}/at"), name, timeout_s))
        time.sleep(pause)  # polled, because a blocking call would hold signals back
        pause = min(2 * pause, 0.5)
    wrong, found = json.loads(answer)
    if wrong:
        raise EgjaxError(wrong, remedy="see the logs of those processes")
    return found


def _absent(job: _Job, here: Mapping[str, str], name: str, timeout_s: float) -> str:
    late = ", ".join(job.name(i) for i in range(len(job.hosts)) if str(i) not in here)
    return f"{late} did not reach {name!r} within {timeout_s:.0f} s"


def barrier(name: str, *, timeout_s: float | None = None) -> None:
    """Waits until all processes are here, see `agree`."""
    agree(name, timeout_s=timeout_s)


class Agreed:
    """A stop that all processes obey after the same step, whichever of them was asked.

    Its truth has to be looked at equally often by all processes, once a step; a collective would
    cost each step a wait. As soon as one is asked, each tells how often it has looked and looks no
    further until all have told; they stop at the first look that none has passed.

    Args:
        flag: true once this process was asked.
        name: equal on all processes, another for each loop.
    """

    def __init__(self, flag: Any, name: str):
        self._flag, self._key = flag, f"egjax/stop/{name}"
        self._looks, self._told = 0, False
        self._at: int | None = None
        if _job is not None:
            with _job.lock:
                _job.agreed = self

    def __bool__(self) -> bool:
        job = _job
        if job is None:
            return bool(self._flag)
        with job.lock:
            if not self._told:
                self._looks += 1
                return False
        while self._at is None:
            told = job.folder(f"{self._key}/looks")
            if len(told) == len(job.hosts):
                self._at = max(map(int, told.values())) + 1
            elif job.get("egjax/left") is not None:
                raise KeyboardInterrupt
            else:
                time.sleep(0.05)
        self._looks += 1
        return self._looks >= self._at

    def close(self) -> None:
        """After the loop: once all have left it, nobody waits for this process to tell."""
        barrier(f"the end of {self._key}")
        if _job is not None:
            with _job.lock:
                _job.agreed = None

    def tell(self, job: _Job) -> None:
        """Passes a request on; called by the watch, with the job's lock held."""
        if self._told:
            return
        if self._flag and job.get(f"{self._key}/asked") is None:
            job.put(f"{self._key}/asked", str(job.index), overwrite=True)
        if job.get(f"{self._key}/asked") is not None:
            job.put(f"{self._key}/looks/{job.index}", str(self._looks), overwrite=True)
            self._told = True


# --- watching and leaving -----------------------------------------------------------------------


def _watch(job: _Job) -> None:
    """In a thread: signs of life, a request to stop, and news of a process that is gone."""
    beats: dict[int, tuple[str, int]] = {}
    beat, failed, every = 0, 0.0, 4
    while not job.leaving.wait(_BEAT / every):  # a request to stop should not wait long
        try:
            beat += 1
            job.put(f"egjax/beat/{job.index}", str(beat), overwrite=True)
            with job.lock:
                if job.agreed is not None:
                    job.agreed.tell(job)
            if job.index == 0 and beat % every == 0:
                _listen(job, beats)
            news = job.get("egjax/left")
            failed = 0.0
        except jax.errors.JaxRuntimeError as error:
            failed = failed or time.monotonic()
            if time.monotonic() - failed < 3 * _BEAT:
                continue
            line = str(error).splitlines()[0]
            news = json.dumps([0, LOST, f"{job.name(0)} does not answer any more: {line}"])
        if news is not None and not job.leaving.is_set():
            _follow(job, *json.loads(news))


def _listen(job: _Job, beats: dict[int, tuple[str, int]]) -> None:
    """Process 0: tells everybody of a process whose signs of life have stopped.

    Looks are counted, not seconds: where the whole machine stood still nobody is gone.
    """
    signs = job.folder("egjax/beat")
    for who in range(len(job.hosts)):
        value = signs.get(str(who), "")  # one that died before its first sign counts as well
        last, looks = beats.get(who, ("", 0))
        beats[who] = (value, looks + 1 if value == last else 0)
        if beats[who][1] * _BEAT > silence():
            _tell(job, who, LOST, f"{job.name(who)} gave no sign of life for {silence():.0f} s")


def _tell(job: _Job, who: int, code: int, line: str) -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the first news counts
        job.put("egjax/left", json.dumps([who, code, line]))


def _follow(job: _Job, who: int, code: int, line: str) -> None:
    """Leaves because another process does, with its code where a person has to look (2, 3)."""
    if code > 128:  # it was asked to stop: let this process unwind, too
        os.kill(os.getpid(), signal.SIGTERM)
        if job.leaving.wait(30.0):
            return
    _say(f"error: {line} (this process leaves; the same command goes on from what was saved)")
    if job.index == 0:  # the others read the news here
        time.sleep(3 * _BEAT)
    os._exit(code)


def _explain_abort(job: _Job, coordinator: str) -> None:
    """JAX's client aborts the process as soon as process 0, whom it talks to, is gone. This says so
    and leaves in the usual way; other aborts go on."""
    libc = ctypes.CDLL(None)

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def aborted(number: int) -> None:
        libc.alarm(30)  # ends the process should Python be too broken for the rest
        if _refuses(coordinator):
            _follow(job, 0, LOST, f"{job.name(0)} is gone, which all others talk to")

    libc.signal(signal.SIGABRT, aborted)
    job.keep = aborted  # C holds no reference


def _refuses(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5.0).close()
    except OSError:
        return True
    return False


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def wait_for_verdict() -> None:
    """After an error that may come of another process' death: returns if all of them live.

    If one is gone, the watch tells which and ends this process.
    """
    if _job is not None:
        time.sleep(silence() + 4 * _BEAT)


def finish() -> None:
    """The end of a job that went well: all meet, then JAX says good-bye."""
    job = _job
    if job is not None:
        barrier("the end")
        job.leaving.set()
        jax.distributed.shutdown()


def abandon(code: int, line: str) -> NoReturn:
    """Leaves a job early, from any thread, and tells the other processes so, if there are any.

    JAX's own end would wait for the others, which wait for this one; and Python's for threads that
    may never end.

    Args:
        code: exit code; over 128 (a signal) the others unwind and leave in the same way.
        line: what to tell them.
    """
    if _job is not None:
        _part_from(_job, code, line)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _part_from(job: _Job, code: int, line: str) -> None:
    """Tells the others that this process leaves."""
    job.leaving.set()
    with contextlib.suppress(Exception):
        _tell(job, job.index, code, f"{job.name(job.index)} has left: {line}")
        if code > 128:
            _part(job)
    if job.index == 0 and code <= 128:  # the others read the news here
        time.sleep(3 * _BEAT)


def _part(job: _Job) -> None:
    """Meets those who leave, too, for some seconds; process 0, whom they talk to, goes last."""
    job.put(f"egjax/gone/{job.index}", "", overwrite=True)
    deadline = time.monotonic() + 20.0
    while len(job.folder("egjax/gone")) < len(job.hosts) and time.monotonic() < deadline:
        time.sleep(0.1)
    if job.index == 0:
        time.sleep(1.0)
