"""Does it fit, how long does a step take, and what should be changed? One record for an answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from egjax.capacity.chips import Topology
from egjax.capacity.compiled import Compiled, compile_for
from egjax.capacity.formula import cache_bytes, cost, memory, state_bytes
from egjax.capacity.stages import Case
from egjax.errors import EgjaxError

__all__ = ["EFFICIENCY", "LINK_EFFICIENCY", "Plan", "compiled_plan", "formula_plan", "meshes"]

EFFICIENCY = 0.6
"""Share of the peak that matrix products reach, for the expected time; an assumption. Public
training runs give 0.45 to 0.65 of useful FLOPs, recomputation not counted."""
LINK_EFFICIENCY = 0.5
"""Share of a chip's links that a collective uses; an assumption: a mesh axis is seldom laid over
all of them."""


@dataclass(frozen=True)
class Plan:
    """What a stage takes on a topology. Bytes and seconds a chip and a step; a step of decoding is
    a whole batch: the prompts are read and all new tokens decoded.

    Attributes:
        stage, topology: names.
        chips, data, model: how many, and the sizes of the mesh.
        method: `"compiled"` by the TPU compiler or `"formula"`.
        memory: bytes by kind; `activations` are all temporaries but the caches where compiled.
        total, limit: bytes that are needed and that there are.
        flops, useful_flops, memory_bytes, collective_bytes: see `egjax.capacity.formula.Cost`; the
            last one from the compiled program where there is one.
        collectives: operation, shape, devices, times and bytes of the largest ones.
        best_s: nothing waits for anything else, products at their peak.
        expected_s: nothing overlaps, products at `EFFICIENCY`, links at `LINK_EFFICIENCY`.
        bound: what takes longest: `flops`, `memory` or `links`.
        compile_s: seconds to trace and compile, None by formula.
        host_memory: peak bytes of the host to do so, None by formula.
        advice: what to change, best first; empty where nothing seems wrong.
        note: what the compiler said where it refused.
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
    host_memory: float | None
    advice: tuple[str, ...]
    note: str | None

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


def compiled_plan(case: Case, topology: Topology, data: int, model: int) -> Plan:
    """A plan by the TPU compiler.

    Raises:
        EgjaxError: see `egjax.capacity.compiled.compile_for`.
    """
    done = compile_for(case, topology, data, model)
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
        kinds["activations"] = max(0.0, done.refused - caches)
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
        host_memory=None if done is None else done.host_memory,
        advice=tuple(_advice(case, topology, (data, model), kinds, bound)),
        note=None if done is None else done.message,
    )


def _changes(
    case: Case, topology: Topology, mesh: tuple[int, int]
) -> Iterator[tuple[str, Case, tuple[int, int]]]:
    """Single changes that save memory, from the cheapest on."""
    layout, (data, model) = case.layout, mesh

    def other(**changes: Any) -> Case:
        return dataclasses.replace(case, layout=dataclasses.replace(layout, **changes))

    if case.stage != "decode":
        if not layout.chunked:
            yield "compute losses in chunks", other(chunked=True), mesh
        if not layout.remat:
            yield "recompute layers (remat)", other(remat=True), mesh
        parts = layout.accumulate * 2
        if case.batch % (parts * data) == 0:
            yield f"accumulate over {parts} micro-batches", other(accumulate=parts), mesh
    for way in meshes(case, topology):
        if way[1] > model:
            yield f"a mesh of data={way[0]}, model={way[1]}", case, way
    rows = case.batch // 2
    if rows >= (1 if case.stage == "decode" else data):
        yield f"a batch of {rows}", dataclasses.replace(case, batch=rows), mesh


def _advice(
    case: Case, topology: Topology, mesh: tuple[int, int], kinds: dict[str, float], bound: str
) -> Iterator[str]:
    limit, total = topology.chip.memory, sum(kinds.values())
    known = sum(memory(case, *mesh).values())
    if total > limit:
        found = False
        for text, changed, way in _changes(case, topology, mesh):
            # The formula says what a change saves, the plan at hand where it starts.
            after = total + sum(memory(changed, *way).values()) - known
            if after <= limit:
                found = True
                yield f"{text}: {after / 2**30:.1f} GiB by formula"
        state = sum(state_bytes(case).values())
        least = -(-int(state * 1.25) // int(limit))
        if not found:
            yield f"no single change suffices; weights and optimiser alone take {least} chips"
        return
    if bound == "links" and mesh[1] > 1 and case.stage != "decode":
        yield "links are the bound: a smaller model axis or more rows a chip would help"
    elif bound == "links":
        yield "links are the bound: more rows a chip would help"
    if total < limit / 2 and case.stage != "decode":
        yield f"{(limit - total) / 2**30:.0f} GiB a chip are free: a larger batch, or fewer chips"
    if bound == "memory" and case.stage == "decode":
        yield "memory bandwidth is the bound: more rows cost little time"
