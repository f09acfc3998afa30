"""Does it fit, how long does a step take, and what should be changed? One record for an answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from egjax.capacity.chips import Chip, Topology
from egjax.capacity.compiled import Compiled, compile_for
from egjax.capacity.formula import cache_bytes, cost, memory, state_bytes
from egjax.capacity.kernels import Kernel
from egjax.capacity.stages import Case
from egjax.errors import EgjaxError
from egjax.lm.model import REMAT
from egjax.train.layout import Layout

__all__ = ["EFFICIENCY", "LINK_EFFICIENCY", "Plan", "compiled_plan", "formula_plan", "meshes"]

EFFICIENCY = 0.6
"""Share of the peak that matrix products reach, for the expected time; an assumption. Public
training runs give 0.45 to 0.65 of useful FLOPs, recomputation not counted."""
LINK_EFFICIENCY = 0.5
"""Share of a chip's links that a collective uses; an assumption: a mesh axis is seldom laid over
all of them."""
_GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What a stage takes on a topology. Bytes and seconds a chip and a step; a step of decoding is
    a whole batch: the prompts are read and all new tokens decoded.

    Attributes:
        stage, topology: names.
        chips, data, model: how many, and the sizes of the mesh.
        method: `"compiled"` by the chips' compiler or `"formula"`.
        memory: bytes by kind; `activations` are all temporaries but the caches where compiled.
        total, limit: bytes that are needed and that there are.
        flops, useful_flops, memory_bytes, collective_bytes: see `egjax.capacity.formula.Cost`; the
            last one from the compiled program where there is one.
        collectives: operation, shape, devices, times and bytes of the largest ones.
        best_s: nothing waits for anything else, products at their peak.
        expected_s: nothing overlaps, products at `EFFICIENCY`, links at `LINK_EFFICIENCY`.
        bound: what takes longest: `flops`, `memory` or `links`.
        compile_s, compile_cpu_s: seconds to trace and compile, and of CPU time; None by formula.
        host_memory: peak bytes of the host to do so, None by formula.
        advice: what to change, best first; empty where nothing seems wrong.
        note: what the compiler said where it refused.
        kernels: where the compiled program of a GPU says so, what its kernels are: how many run,
            bytes that they move, seconds that they take at least, and the twelve that take the
            most; of a step, or of one decoded token. See `egjax.capacity.kernels`.
    """

    stage: str
    topology: str
    chips: int
    data: int
    model: int
    method: str
    memory: dict[str, float]
    total: float
    limit: float
    flops: float
    useful_flops: float
    memory_bytes: float
    collective_bytes: float
    collectives: list[dict[str, Any]]
    best_s: float
    expected_s: float
    bound: str
    compile_s: float | None
    compile_cpu_s: float | None
    host_memory: float | None
    advice: tuple[str, ...]
    note: str | None
    kernels: dict[str, Any] | None = None

    @property
    def fits(self) -> bool:
        """Whether the memory suffices."""
        return self.total <= self.limit

    def mfu(self, peak: float, *, best: bool = False) -> float:
        """Useful FLOPs over what a chip with this peak could do in the time."""
        return self.useful_flops / peak / (self.best_s if best else self.expected_s)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dataclasses.asdict(self) | {"fits": self.fits}


def meshes(case: Case, topology: Topology) -> list[tuple[int, int]]:
    """Meshes (data, model) on which a case can run, the least model-parallel first.

    Raises:
        EgjaxError: there is none.
    """
    chips = topology.chips
    found = []
    for model in range(1, chips + 1):
        if chips % model or case.model.num_heads % model or case.model.intermediate_size % model:
            continue
        rows = case.batch // case.layout.accumulate
        if case.stage == "decode" or rows % (chips // model) == 0:
            found.append((chips // model, model))
    if not found:
        raise EgjaxError(
            f"a batch of {case.batch} in {case.layout.accumulate} micro-batches does not split "
            f"over {topology.name}",
            remedy=f"give a multiple of {chips}, or of {chips} over a power of two",
        )
    return found


def formula_plan(case: Case, topology: Topology, data: int, model: int) -> Plan:
    """A plan by arithmetic alone."""
    kinds = memory(case, data, model)
    return _plan(case, topology, data, model, kinds, None)


def compiled_plan(
    case: Case, topology: Topology, data: int, model: int, hlo: Path | None = None
) -> Plan:
    """A plan by the chips' compiler; arguments as of `egjax.capacity.compiled.compile_for`.

    Raises:
        EgjaxError: see `egjax.capacity.compiled.compile_for`.
    """
    done = compile_for(case, topology, data, model, hlo)
    chips = data * model
    kinds = {kind: size / chips for kind, size in state_bytes(case).items()}
    state = sum(kinds.values())
    caches = cache_bytes(case) / chips
    kinds["caches"] = caches
    if done.refused is None:
        # What arguments take beyond weights and optimiser is padding and the batch.
        kinds["activations"] = done.temporaries - caches
        kinds["batch and padding"] = done.arguments + done.outputs - done.aliased - state
    else:
        # All that the program would hold, its arguments among it.
        kinds["activations"] = max(0.0, done.refused - state - caches)
    return _plan(case, topology, data, model, kinds, done)


def _plan(
    case: Case,
    topology: Topology,
    data: int,
    model: int,
    kinds: dict[str, float],
    done: Compiled | None,
) -> Plan:
    chip, asked = topology.chip, cost(case, data, model)
    if done is not None and done.refused is None:
        sent = sum(c.bytes_sent for c in done.collectives)
        asked = dataclasses.replace(asked, collective_bytes=sent)
    times = {
        "flops": asked.flops / chip.flops,
        "memory": asked.memory_bytes / chip.bandwidth,
        "links": asked.collective_bytes / chip.link,
    }
    total = sum(kinds.values())
    bound = max(times, key=lambda kind: times[kind])
    expected = times | {
        "flops": times["flops"] / EFFICIENCY,
        "links": times["links"] / LINK_EFFICIENCY,
    }
    return Plan(
        stage=case.stage,
        topology=topology.name,
        chips=topology.chips,
        data=data,
        model=model,
        method="formula" if done is None else "compiled",
        memory=kinds,
        total=total,
        limit=chip.memory,
        **dataclasses.asdict(asked),
        collectives=[dataclasses.asdict(c) for c in (done.collectives if done else [])[:12]],
        best_s=max(times.values()),
        expected_s=sum(expected.values()),
        bound=bound,
        compile_s=None if done is None else done.seconds,
        compile_cpu_s=None if done is None else done.cpu_seconds,
        host_memory=None if done is None else done.host_memory,
        advice=tuple(_advice(case, topology, (data, model), kinds, bound)),
        note=None if done is None else done.message,
        kernels=None if done is None or not done.kernels else _kernels(done.kernels, chip),
    )


def _kernels(found: Sequence[Kernel], chip: Chip) -> dict[str, Any]:
    def seconds(kernel: Kernel) -> float:
        return kernel.seconds(chip.flops, chip.bandwidth)

    longest = sorted(found, key=seconds, reverse=True)[:12]
    return {
        "count": sum(one.times for one in found),
        "bytes": sum(one.times * (one.bytes_read + one.bytes_written) for one in found),
        "seconds": sum(map(seconds, found)),
        "longest": [dataclasses.asdict(one) | {"seconds": seconds(one)} for one in longest],
    }


def _changes(
    case: Case, topology: Topology, mesh: tuple[int, int]
) -> Iterator[tuple[str, Case, tuple[int, int]]]:
    """Changes of layout, mesh and batch that may save memory, one or several at once; those that
    cost least come first."""
    layout, found = case.layout, meshes(case, topology)
    parts = [n for n in (1, 2, 4, 8, 16, 32) if case.batch % (n * layout.accumulate) == 0]
    layouts = _leaner(layout)
    if case.stage == "decode":
        parts, layouts = [1], [layout]
    for batch in (case.batch, case.batch // 2, case.batch // 4):
        for part in parts:
            for other in layouts:
                for way in found:
                    rows = batch // (other.accumulate * part)
                    uneven = case.stage != "decode" and rows % way[0]
                    if not rows or uneven or batch % (other.accumulate * part):
                        continue
                    if batch < case.batch and (part > 1 or other != layout):
                        continue
                    new = dataclasses.replace(other, accumulate=other.accumulate * part)
                    words = [
                        "losses in chunks" if new.chunked > layout.chunked else "",
                        f"remat {new.remat}" if new.remat != layout.remat else "",
                        f"{new.accumulate} micro-batches" if part > 1 else "",
                        f"mesh data={way[0]}, model={way[1]}" if way != mesh else "",
                        f"batch {batch}" if batch != case.batch else "",
                    ]
                    changed = dataclasses.replace(case, batch=batch, layout=new)
                    yield " + ".join(filter(None, words)), changed, way


def _leaner(layout: Layout) -> list[Layout]:
    """A layout, then with less and less kept for the backward pass, each also with chunks."""
    policies = list(REMAT)
    return [
        dataclasses.replace(layout, remat=policy, chunked=chunked)
        for policy in policies[policies.index(layout.remat) :]
        for chunked in dict.fromkeys([layout.chunked, True])
    ]


def _temporaries(kinds: dict[str, float]) -> float:
    return sum(size for kind, size in kinds.items() if kind not in ("weights", "optimizer"))


def _advice(
    case: Case, topology: Topology, mesh: tuple[int, int], kinds: dict[str, float], bound: str
) -> Iterator[str]:
    limit, total = topology.chip.memory, sum(kinds.values())
    # What the formula is out by at hand, it is taken to be out by elsewhere.
    share = max(1.0, _temporaries(kinds) / _temporaries(memory(case, *mesh)))
    if total > limit:
        found = []
        for text, changed, way in _changes(case, topology, mesh):
            new = memory(changed, *way)
            after = sum(new.values()) + (share - 1) * _temporaries(new)
            if after <= limit:
                found.append(f"{text}: {after / _GIB:.1f} GiB by formula")
        yield from found[:3]
        if not found:
            state = sum(state_bytes(case).values()) / limit
            yield (
                "no change of mesh, remat or batch is known to suffice: weights and optimiser "
                f"alone fill {state:.1f} chips of {topology.chips}; take more chips"
            )
        return
    if bound == "links" and mesh[1] > 1 and case.stage != "decode":
        yield "the links are the bound: a smaller model axis or more rows a chip would help"
    elif bound == "links":
        yield "the links are the bound: more rows a chip would help"
    if total < limit / 2 and case.stage != "decode":
        free = (limit - total) / _GIB
        yield f"{free:.0f} GiB a chip are free: take a larger batch, or fewer chips"
    if bound == "memory" and case.stage == "decode":
        yield "memory bandwidth is the bound: more rows cost little time"
