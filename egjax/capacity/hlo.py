"""What a compiled program sends between chips, read from its HLO text.

XLA's own `cost_analysis` counts the body of a loop once; here a loop counts as often as its
condition says. A collective that the compiler cut into steps and laid over other work appears in
several computations under one channel; it counts once.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

__all__ = [
    "Collective",
    "Instruction",
    "arrays",
    "called",
    "collectives",
    "loops",
    "multiplicities",
    "parse",
]

_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1,
    "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4,
    "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
_OPERATIONS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(?:ENTRY )?(%\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?(%\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=(%[\w.-]+)|branch_computations=\{(.*?)\}")
_ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\]")


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind and shape.

    Attributes:
        operation: `all-gather`, `all-reduce`, `reduce-scatter`, `all-to-all`, `collective-permute`.
        shape: of the result on one device, as HLO writes it (`bf16[8,128]`).
        devices: how many take part; 2 for a permutation.
        times: a run of the program.
        bytes_sent: by one device in all of them, over the shortest ring.
    """

    operation: str
    shape: str
    devices: int
    times: int
    bytes_sent: float


@dataclass(frozen=True)
class Instruction:
    """A line of a computation: name, shape of the result, operation, and what stands behind it."""

    name: str
    shape: str
    opcode: str
    rest: str


def collectives(text: str, devices: int) -> list[Collective]:
    """All collectives of a program, those with the most bytes first.

    Args:
        text: of a compiled module (`Compiled.as_text()`).
        devices: that it runs on; for collectives without a list of groups.
    """
    computations = parse(text)
    times = multiplicities(computations)
    seen: dict[str, tuple[Instruction, str, int]] = {}
    for computation, instructions in computations.items():
        count = times.get(computation, 0)
        for instruction in instructions:
            operation = _operation(instruction.opcode)
            if operation is None or count == 0:
                continue
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            key = channel.group(1) if channel else f"{computation}{instruction.name}"
            if key not in seen or count < seen[key][2]:
                seen[key] = (instruction, operation, count)
    total: dict[tuple[str, str, int], list[float]] = defaultdict(lambda: [0, 0.0])
    for instruction, operation, count in seen.values():
        parts = arrays(instruction.shape)
        if instruction.opcode in ("all-gather-start", "collective-permute-start"):
            # (operands, results, counters): the results are the second of equal parts. The shape of
            # an all-reduce-start is that of its results alone.
            parts = [part for part in parts if part[1]] or parts
            parts = parts[len(parts) // 2 :]
        size = sum(bytes_ for bytes_, _, _ in parts)
        group = 2 if operation == "collective-permute" else _group(instruction.rest, devices)
        key = operation, "+".join(name for _, _, name in parts), group
        total[key][0] += count
        total[key][1] += count * _sent(operation, size, group)
    found = [Collective(*key, int(n), sent) for key, (n, sent) in total.items()]
    return sorted(found, key=lambda c: -c.bytes_sent)


def loops(text: str) -> dict[str, int]:
    """How often the body of each loop runs, by the loop's name."""
    computations = parse(text)
    return {
        i.name: _trips(computations, instructions, i)
        for instructions in computations.values()
        for i in instructions
        if i.opcode == "while"
    }


def parse(text: str) -> dict[str, list[Instruction]]:
    """Computations of a module by name, that of the program itself as `ENTRY`."""
    computations: dict[str, list[Instruction]] = {}
    inside: list[Instruction] = []
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            name = "ENTRY" if line.startswith("ENTRY") else start.group(1)
            inside = computations.setdefault(name, [])
            continue
        found = _INSTRUCTION.match(line)
        if found:
            inside.append(Instruction(*found.groups()))
    return computations


def multiplicities(computations: dict[str, list[Instruction]]) -> dict[str, int]:
    """How often each computation runs; callees stand before their callers in HLO text."""
    times: dict[str, int] = defaultdict(int)
    times["ENTRY"] = 1
    for name in reversed(list(computations)):
        for instruction in computations[name]:
            inner = 1
            if instruction.opcode == "while":
                inner = _trips(computations, computations[name], instruction)
            for other in called(instruction):
                times[other] += times[name] * inner
    return times


def called(instruction: Instruction) -> Iterator[str]:
    """Names of the computations that an instruction runs."""
    for one, many in _CALLED.findall(instruction.rest):
        yield from [one] if one else re.findall(r"%[\w.-]+", many)


def _trips(
    computations: dict[str, list[Instruction]], around: list[Instruction], loop: Instruction
) -> int:
    """Rounds of a loop that counts up to a constant; 1 where it cannot be told."""
    known = re.search(r'known_trip_count[":{\s]+n[":\s]+(\d+)', loop.rest)
    if known:
        return int(known.group(1))
    condition = re.search(r"condition=(%[\w.-]+)", loop.rest)
    body = computations.get(condition.group(1), []) if condition else []
    by_name = {i.name: i for i in body}
    root = next((i for i in body if i.opcode == "compare" and "direction=LT" in i.rest), None)
    if root is None:
        return 1
    counter, bound = (by_name.get(n) for n in re.findall(r"%[\w.-]+", root.rest)[:2])
    if counter is None or bound is None or bound.opcode != "constant":
        return 1
    way = _value(bound) - _first(around, loop, counter)
    return max(1, -(-way // _stride(computations, loop, counter)))


def _first(around: list[Instruction], loop: Instruction, counter: Instruction) -> int:
    """Where the counter starts, if a constant says so; else 0."""
    index = re.search(r"index=(\d+)", counter.rest)
    by_name = {i.name: i for i in around}
    operand = re.search(r"%[\w.-]+", loop.rest)
    start = by_name.get(operand.group(0)) if operand else None
    if index is None or start is None or start.opcode != "tuple":
        return 0
    operands = re.findall(r"%[\w.-]+", start.rest.split(")")[0])
    value = by_name.get(operands[int(index.group(1))]) if operands else None
    return _value(value) if value is not None and value.opcode == "constant" else 0


def _stride(
    computations: dict[str, list[Instruction]], loop: Instruction, counter: Instruction
) -> int:
    """What a round adds to the counter: 2 where the compiler does two rounds in one; 1 where it
    cannot be told."""
    index = re.search(r"index=(\d+)", counter.rest)
    named = re.search(r"body=(%[\w.-]+)", loop.rest)
    body = computations.get(named.group(1), []) if named else []
    if index is None or not body or body[-1].opcode != "tuple":
        return 1
    by_name = {i.name: i for i in body}
    operands = re.findall(r"%[\w.-]+", body[-1].rest.split(")")[0])
    name, added = operands[int(index.group(1))], 0
    while (one := by_name.get(name)) is not None and one.opcode in ("add", "copy", "bitcast"):
        parts = [by_name.get(n) for n in re.findall(r"%[\w.-]+", one.rest.split(")")[0])]
        constants = [x for x in parts if x is not None and x.opcode == "constant"]
        others = [x for x in parts if x is not None and x.opcode != "constant"]
        if len(others) != 1 or len(constants) != (one.opcode == "add"):
            return 1
        added += sum(_value(x) for x in constants)
        name = others[0].name
    return max(1, added)


def _value(constant: Instruction) -> int:
    found = re.match(r"(-?\d+)\)", constant.rest)
    return int(found.group(1)) if found else 0


def _operation(opcode: str) -> str | None:
    name = opcode.removesuffix("-start")
    return name if name in _OPERATIONS else None


def arrays(shape: str) -> list[tuple[float, int, str]]:
    """(bytes, rank, name) of the arrays in a shape or tuple of shapes."""
    out = []
    for dtype, sizes in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", shape)):
        if dtype in _BYTES:
            numbers = [int(n) for n in sizes.split(",") if n]
            out.append((_BYTES[dtype] * prod(numbers), len(numbers), f"{dtype}[{sizes}]"))
    return out


def _group(rest: str, devices: int) -> int:
    """Devices in a group, from any of the three ways in which HLO writes groups."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    if listed:
        return listed.group(1).count(",") + 1
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", rest)
    if iota:
        return int(iota.group(1))
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest)
    if mesh:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh.group(1)))
        named = re.findall(r"'([^']+)'", mesh.group(2))
        return prod(int(sizes.get(name, 1)) for name in named)
    return devices


def _sent(operation: str, size: float, group: int) -> float:
    """Bytes that a device sends, with `size` that of the result on it."""
    others = group - 1
    return {
        "all-gather": size * others / group,
        "all-to-all": size * others / group,
        "reduce-scatter": size * others,
        "all-reduce": 2 * size * others / group,
        "collective-permute": size,
    }[operation]
