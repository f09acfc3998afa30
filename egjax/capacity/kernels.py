"""What the kernels of a program compiled for a GPU move and multiply, read from its HLO text.

On a GPU a fusion is one kernel: it reads its operands from memory and writes its result, and what
lies between stays on the chip. So bytes and operations of a program can be counted before it ever
runs, a kernel that copies weights shows, and the time cannot be less than `Kernel.seconds` adds up
to. Of an operand that a kernel only cuts from (a layer of a stack, a row of a table), and of one
that it overwrites a part of, the part counts. Calls of cuDNN count with their bytes alone. What the
cache keeps from one kernel to the next is counted as memory all the same.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from egjax.capacity.hlo import Instruction, arrays, called, multiplicities, parse

__all__ = ["Kernel", "kernels"]

_NO_KERNEL = frozenset(
    [
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "while",
        "conditional",
        "call",
        "after-all",
        "opt-barrier",
        "copy-done",
        "fusion-done",
        "custom-call-done",
        "all-gather-done",
        "all-reduce-done",
    ]
)
_CUTS = ("dynamic-slice", "slice", "gather")
_CONTRACTED = (r"lhs_contracting_dims=\{([\d,]*)\}", r'"lhs_contracting_dimensions":\[([^\]]*)\]')


@dataclass(frozen=True)
class Kernel:
    """A kernel.

    Attributes:
        operation: HLO's, with the name of what is called, e.g. `custom-call __cudnn$fmha…`.
        source: JAX's name of where it comes from.
        times: that it runs; a loop of unknown length counts once.
        bytes_read, bytes_written: each time.
        flops: of its matrix products, each time.
        wide: whether these take entries of 32 bits, as TF32 at half the rate of 16 bits.
    """

    operation: str
    source: str
    times: int
    bytes_read: float
    bytes_written: float
    flops: float
    wide: bool = False

    def seconds(self, flops: float, bandwidth: float) -> float:
        """Least time of all its runs, at so many FLOP/s (of 16 bits) and bytes/s."""
        moved = (self.bytes_read + self.bytes_written) / bandwidth
        return self.times * max(moved, self.flops * (2 if self.wide else 1) / flops)


def kernels(text: str, *, step: bool = False) -> list[Kernel]:
    """The kernels of a program.

    Args:
        text: of a compiled module (`Compiled.as_text()`).
        step: only those of one round of its last loop of unknown length: of a decoder, what a token
            takes after the prompt was read. Without such a loop, all.
    """
    program = parse(text)
    inside = _step(program) if step else set(program)
    fused = {
        name
        for instructions in program.values()
        for one in instructions
        if one.opcode in ("fusion", "fusion-start")
        for name in called(one)
    }
    times = multiplicities(program)
    found = []
    for name in inside - fused - _never_asked(program):
        scalar = all(one.shape.split("{")[0].endswith("[]") for one in program[name])
        if not times.get(name) or (scalar and name != "ENTRY"):  # of a reduction or a sort
            continue
        around = {one.name: one for one in program[name]}
        found += [
            _kernel(program, around, one, times[name])
            for one in program[name]
            if one.opcode not in _NO_KERNEL
        ]
    return found


def _never_asked(program: dict[str, list[Instruction]]) -> set[str]:
    """Conditions of loops whose rounds are known: XLA counts these itself."""
    counted = [
        one.rest
        for instructions in program.values()
        for one in instructions
        if one.opcode == "while" and "known_trip_count" in one.rest
    ]
    return {name for rest in counted for name in re.findall(r"condition=(%[\w.-]+)", rest)}


def _step(program: dict[str, list[Instruction]]) -> set[str]:
    """Computations of the last loop of the program whose rounds are not known."""
    loops = [
        i for i in program["ENTRY"] if i.opcode == "while" and "known_trip_count" not in i.rest
    ]
    if not loops:
        return set(program)
    open_, found = list(called(loops[-1])), set()
    while open_:
        name = open_.pop()
        if name not in found:
            found.add(name)
            open_ += [other for one in program.get(name, []) for other in called(one)]
    return found


def _kernel(
    program: dict[str, list[Instruction]],
    around: dict[str, Instruction],
    one: Instruction,
    times: int,
) -> Kernel:
    target = re.search(r'custom_call_target="([^"]*)"', one.rest)
    source = re.search(r'op_name="([^"]*)"', one.rest)
    read = sum(_size(around[name]) for name in _operands(one) if name in around)
    written, flops, wide = _size(one), 0.0, False
    if one.opcode in ("fusion", "fusion-start"):
        (inner, *_) = called(one)
        read, written, flops, wide = _fusion(program, inner)
    elif one.opcode == "dynamic-slice":
        read = written
    elif one.opcode == "dynamic-update-slice":
        read = written = _size(around[_operands(one)[1]])
    elif one.opcode == "dot" or (target and re.search("cublas|matmul|gemm", target.group(1))):
        flops, wide = _product(one, around), _wide(one, around)
    operation = f"{one.opcode} {target.group(1)}" if target else one.opcode
    return Kernel(operation, source.group(1) if source else "", times, read, written, flops, wide)


def _fusion(program: dict[str, list[Instruction]], name: str) -> tuple[float, float, float, bool]:
    """Bytes read and written by a fusion, its FLOPs, and whether they are of 32 bits."""
    inside = program[name]
    by_name = {one.name: one for one in inside}
    users: dict[str, list[tuple[str, Instruction]]] = defaultdict(list)
    for one in inside:
        for operand in _operands(one):
            users[operand].append((operand, one))
    read = sum(_taken(one, users) for one in inside if one.opcode == "parameter")
    root = inside[-1]
    parts = [by_name[n] for n in _operands(root)] if root.opcode == "tuple" else [root]
    found = [
        (_product(one, by_name), _wide(one, by_name)) for one in inside if one.opcode == "dot"
    ] + [
        _fusion(program, other)[2:]
        for one in inside
        if one.opcode == "fusion"
        for other in called(one)
    ]
    flops, wide = sum(n for n, _ in found), any(w for _, w in found)
    return read, sum(_put(one, by_name) for one in parts), flops, wide


def _taken(parameter: Instruction, users: dict[str, list[tuple[str, Instruction]]]) -> float:
    """Bytes of an operand that a fusion reads: the parts it cuts, else all."""
    whole, total, open_ = _size(parameter), 0.0, list(users[parameter.name])
    entry = whole / max(1, prod(_sizes(parameter.shape)))
    while open_:
        source, one = open_.pop()
        if one.opcode in _CUTS and _operands(one)[0] == source:
            total += entry * prod(_sizes(one.shape))
        elif one.opcode in ("bitcast", "convert"):  # of what is cut after it, no more is converted
            open_ += users[one.name]
        elif one.opcode != "dynamic-update-slice" or _operands(one)[0] != source:
            return whole
    return min(whole, total)


def _put(result: Instruction, by_name: dict[str, Instruction]) -> float:
    """Bytes that a fusion writes: of an array that is overwritten in place, the part."""
    one = result
    while one.opcode == "bitcast":
        one = by_name[_operands(one)[0]]
    if one.opcode == "dynamic-update-slice":
        return _size(by_name[_operands(one)[1]])
    return _size(result)


def _product(one: Instruction, by_name: dict[str, Instruction]) -> float:
    """FLOPs of a matrix product."""
    left = by_name.get(_operands(one)[0])
    listed = next(filter(None, (re.search(way, one.rest) for way in _CONTRACTED)), None)
    if left is None or listed is None:
        return 0.0
    sizes = _sizes(left.shape)
    contracted = prod(sizes[int(n)] for n in re.findall(r"\d+", listed.group(1)))
    return 2.0 * prod(_sizes(one.shape)) * contracted


def _wide(one: Instruction, by_name: dict[str, Instruction]) -> bool:
    """Whether a matrix product takes entries of 32 bits."""
    left = by_name.get(_operands(one)[0])
    return left is not None and left.shape.startswith("f32[")


def _operands(one: Instruction) -> list[str]:
    if one.opcode in ("parameter", "constant"):
        return []
    return re.findall(r"%[\w.-]+", one.rest.split("), ")[0])


def _size(one: Instruction) -> float:
    return sum(size for size, _, _ in arrays(one.shape))


def _sizes(shape: str) -> list[int]:
    """Of the first array of a shape."""
    first: Iterator[str] = iter(re.findall(r"\w+\[([\d,]*)\]", shape))
    return [int(n) for n in next(first, "").split(",") if n]
