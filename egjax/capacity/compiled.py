"""What the compiler of an accelerator says of a program, on a machine without one.

libtpu (`pip install 'egjax[tpu]'`) describes topologies and compiles for them ahead of time; it
refuses what does not fit, and says by how much. XLA's compiler for NVIDIA GPUs (`'egjax[cuda]'`)
takes a description of the GPU (`egjax.capacity.gpus`); it refuses nothing, and without the GPU it
cannot try which of several kernels is the fastest, so memory and the sequence of kernels may differ
a little from those on one.
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
from unittest import mock

import jax

from egjax.capacity.chips import Chip, Topology
from egjax.capacity.gpus import description
from egjax.capacity.hlo import Collective, collectives
from egjax.capacity.kernels import Kernel, kernels
from egjax.capacity.stages import Case, program
from egjax.errors import EgjaxError
from egjax.mesh import make_mesh

__all__ = ["Compiled", "compile_for", "devices_of", "has_compiler", "remedy", "traced_for"]


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
        kernels: of a GPU's program; of decoding, those of one token. Empty for TPUs.
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
    kernels: tuple[Kernel, ...] = ()


def has_compiler(chip: Chip) -> bool:
    """Whether what compiles for a chip is installed."""
    if chip.is_tpu:
        return importlib.util.find_spec("libtpu") is not None
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    names = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
    return any(importlib.util.find_spec(name) is not None for name in names)


def remedy(chip: Chip) -> str:
    """What to do where there is no compiler for a chip."""
    return f"pip install 'egjax[{'tpu' if chip.is_tpu else 'cuda'}]'"


def devices_of(topology: Topology) -> list[Any]:
    """Descriptions of a topology's chips, to build a mesh of.

    Raises:
        EgjaxError: the compiler is missing, does not know the topology, or is used by another
            process.
    """
    if not has_compiler(topology.chip):
        raise EgjaxError(
            f"{topology.name} cannot be compiled for here", remedy=remedy(topology.chip)
        )
    devices = _tpus(topology) if topology.chip.is_tpu else _gpus(topology)
    if len(devices) != topology.chips:
        raise EgjaxError(f"{topology.name} has {len(devices)} devices for {topology.chips} chips")
    return devices


def _gpus(topology: Topology) -> list[Any]:
    from jax.experimental import topologies

    try:
        with _silent():
            found = topologies.get_topology_desc(
                platform="cuda",
                target_config=description(topology.chip),
                topology=f"1x1x{topology.chips}",  # of one host
            )
    except Exception as error:
        # Of a plugin that looked for a GPU and found none JAX wants to know nothing more.
        unasked = isinstance(error, NotImplementedError)
        raise EgjaxError(
            f"XLA refuses topology {topology.name}: {str(error).splitlines()[0]}",
            remedy="run it with JAX_PLATFORMS=cpu, where there is no GPU" if unasked else None,
        ) from error
    return list(found.devices)


def _tpus(topology: Topology) -> list[Any]:
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
    return list(found.devices)


@contextlib.contextmanager
def traced_for(platform: str) -> Iterator[None]:
    """Has programs traced as on another platform: forms of attention and chunks of losses go by
    `jax.default_backend()`, which JAX has no way to set for compiling ahead of time. What was
    traced before and in between is forgotten, and nothing is kept in JAX's cache of compiled
    programs, which cannot read what was compiled without a device.

    Args:
        platform: `"gpu"` or `"tpu"`.
    """
    jax.clear_caches()
    cached = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        with mock.patch.object(jax, "default_backend", return_value=platform):
            yield
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
        jax.clear_caches()


def compile_for(
    case: Case, topology: Topology, data: int, model: int, hlo: Path | None = None
) -> Compiled:
    """Compiles a stage for a topology.

    Args:
        case: see there.
        topology: of the chips.
        data, model: chips along the axes of the mesh.
        hlo: file for the text of the compiled program.

    Raises:
        EgjaxError: see `devices_of` and `egjax.capacity.stages.program`; or cuDNN is missing.
    """
    mesh = make_mesh(data=data, model=model, devices=devices_of(topology))
    begin = time.perf_counter(), time.process_time()
    with traced_for(case.platform):
        what = program(case, mesh)
        # Training sets the mesh itself, decoding on several chips is called under it.
        several = case.stage == "decode" and (topology.chips > 1 or case.platform == "tpu")
        try:
            with jax.set_mesh(mesh) if several else contextlib.nullcontext():
                lowered = what.function.lower(*what.arguments)
        except RuntimeError as error:  # JAX asks for its version
            if "cuDNN not found" not in str(error):
                raise
            raise EgjaxError("cuDNN is not installed", remedy=remedy(topology.chip)) from error
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
        kernels=tuple(kernels(text, step=case.stage == "decode") if case.platform == "gpu" else ()),
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
    """Keeps a compiler's remarks on the missing chip off standard error; unless EGJAX_TRACEBACK."""
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
