"""What the TPU compiler says of a program, on a machine without a TPU.

libtpu (`pip install 'egjax[tpu]'`) describes topologies and compiles for them ahead of time; it
refuses what does not fit, and says by how much.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from egjax.capacity.chips import Topology
from egjax.capacity.hlo import Collective, collectives
from egjax.capacity.stages import Case, program
from egjax.errors import EgjaxError
from egjax.mesh import make_mesh

__all__ = ["Compiled", "compile_for", "devices_of", "has_libtpu"]


@dataclass(frozen=True)
class Compiled:
    """What compilation told.

    Attributes:
        arguments, outputs, aliased, temporaries: bytes a chip; outputs that reuse the memory of
            arguments are in `aliased`.
        refused: bytes a chip that the compiler wanted where it refused; None where it did not.
        collectives: of the program.
        seconds, cpu_seconds: to trace and compile; the second without waiting for a busy machine.
        host_memory: peak bytes of this process.
        message: the compiler's, where it refused.
    """

    arguments: float
    outputs: float
    aliased: float
    temporaries: float
    refused: float | None
    collectives: list[Collective]
    seconds: float
    cpu_seconds: float
    host_memory: float
    message: str | None = None


def has_libtpu() -> bool:
    """Whether the TPU compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


def devices_of(topology: Topology) -> list[Any]:
    """Descriptions of a topology's chips, to build a mesh of.

    Raises:
        EgjaxError: libtpu is missing, does not know the topology, or is used by another process.
    """
    if not topology.chip.is_tpu or not has_libtpu():
        raise EgjaxError(
            f"{topology.name} cannot be compiled for here",
            remedy="pip install 'egjax[tpu]'" if topology.chip.is_tpu else "only TPUs can",
        )
    # Without these libtpu looks for a TPU of this machine, and asks the cloud about it.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    try:
        with _silent():
            found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name)
    except Exception as error:
        text = str(error).splitlines()[0]
        if "lockfile" in text:
            raise EgjaxError("another process is compiling", remedy="wait for it") from error
        raise EgjaxError(f"libtpu refuses topology {topology.name}: {text}") from error
    devices = list(found.devices)
    if len(devices) != topology.chips:
        raise EgjaxError(f"{topology.name} has {len(devices)} devices for {topology.chips} chips")
    return devices


def compile_for(
    case: Case, topology: Topology, data: int, model: int, hlo: Path | None = None
) -> Compiled:
    """Compiles a stage for a topology.

    Args:
        case: see there.
        topology: of TPUs.
        data, model: chips along the axes of the mesh.
        hlo: file for the text of the compiled program.

    Raises:
        EgjaxError: see `devices_of` and `egjax.capacity.stages.program`.
    """
    mesh = make_mesh(data=data, model=model, devices=devices_of(topology))
    what = program(case, mesh)
    begin = time.perf_counter(), time.process_time()
    # Training sets the mesh itself, decoding is called under it.
    with jax.set_mesh(mesh) if case.stage == "decode" else contextlib.nullcontext():
        lowered = what.function.lower(*what.arguments)
    try:
        with _silent():
            done = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return _refused(str(error), *_since(begin))
    seconds, cpu_seconds = _since(begin)
    memory, text = done.memory_analysis(), done.as_text() or ""
    if hlo is not None:
        hlo.parent.mkdir(parents=True, exist_ok=True)
        hlo.write_text(text, encoding="utf-8")
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        refused=None,
        collectives=collectives(text, topology.chips),
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        host_memory=_host_memory(),
    )


def _since(begin: tuple[float, float]) -> tuple[float, float]:
    return time.perf_counter() - begin[0], time.process_time() - begin[1]


def _refused(message: str, seconds: float, cpu_seconds: float) -> Compiled:
    """Reads how much was wanted from a refusal, or passes another error on."""
    if "RESOURCE_EXHAUSTED" not in message:
        raise EgjaxError(f"the compiler failed: {message.splitlines()[0]}")
    units = {"G": 2**30, "M": 2**20, "K": 2**10}
    sizes = [float(n) * units[u] for n, u in re.findall(r"(\d+(?:\.\d+)?)([GMK])\b", message)]
    line = next((x for x in message.splitlines() if "RESOURCE" in x), message)
    wanted = max(sizes, default=0.0)
    return Compiled(0, 0, 0, 0, wanted, [], seconds, cpu_seconds, _host_memory(), line.strip())


def _host_memory() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keeps libtpu's remarks on the missing TPU off standard error; unless EGJAX_TRACEBACK."""
    if os.environ.get("EGJAX_TRACEBACK"):
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
