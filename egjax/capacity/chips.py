"""Accelerators by their makers' figures, and the topologies that are made of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

from egjax.errors import EgjaxError

__all__ = ["CHIPS", "Chip", "Topology", "parse"]


@dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
        name: as topologies name it.
        flops: peak of bfloat16 products, FLOP/s, without sparsity.
        memory: bytes that a program can have. Of a TPU what its compiler allows (read from its
            refusals), somewhat less than is sold.
        bandwidth: of that memory, bytes/s.
        link: bytes/s that it can send to its neighbours over all links together.
        dimensions: of a topology: 2 or 3 for a torus, 1 for GPUs, which are only counted.
        most: chips in the largest topology.
        host: chips of one host.
        dollars: list price of a chip-hour on demand, USD; an assumption, see `source`.
        source: where the figures stand.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    dimensions: int
    most: int
    host: int
    dollars: float
    source: str

    @property
    def is_tpu(self) -> bool:
        """Whether libtpu can compile for it; else XLA's compiler for NVIDIA GPUs can."""
        return self.dimensions > 1


_GIB = 2**30
_CLOUD = "https://docs.cloud.google.com/tpu/docs/"
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, 15.75 * _GIB, 819e9, 200e9, 2, 256, 8, 1.20, _CLOUD + "v5e"),
        Chip("v5p", 459e12, 95.74 * _GIB, 2765e9, 600e9, 3, 6144, 4, 4.20, _CLOUD + "v5p"),
        Chip("v6e", 918e12, 31.25 * _GIB, 1638e9, 400e9, 2, 256, 8, 2.70, _CLOUD + "v6e"),
        Chip(
            "a100", 312e12, 80e9, 2039e9, 300e9, 1, 8, 8, 3.70,
            "NVIDIA A100 80 GB SXM datasheet; NVLink, one host",
        ),
        Chip(
            "h100", 989e12, 80e9, 3350e9, 450e9, 1, 8, 8, 11.0,
            "NVIDIA H100 SXM datasheet; NVLink, one host",
        ),
        Chip(
            "h200", 989e12, 141e9, 4800e9, 450e9, 1, 8, 8, 10.6,
            "NVIDIA H200 SXM datasheet; NVLink, one host",
        ),
        Chip(
            "rtx4090", 165e12, 24e9, 1008e9, 32e9, 1, 8, 8, 0.0,
            "NVIDIA Ada whitepaper, sums in float32; PCIe 4, no price: a card of one's own",
        ),
    )
}  # fmt: skip
"""TPUs: peak, memory, bandwidth and the ICI's bytes/s one way from the page in `source` (it gives
both ways together). Prices: Google Cloud's list for the United States in 2025 as remembered, not
looked up; they change and differ by region, so state your own."""


@dataclass(frozen=True)
class Topology:
    """Chips and how they are joined.

    Attributes:
        chip: of which there are many.
        shape: chips along each axis.
    """

    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many."""
        return prod(self.shape)

    @property
    def name(self) -> str:
        """As `parse` reads it and libtpu too, e.g. `v5e:16x16`."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def parse(text: str) -> Topology:
    """Reads `v5e:16x16`, `v5p:4x4x4`, `h100:8`; sizes count chips, not cores.

    Raises:
        EgjaxError: an unknown chip, or a shape that its kind does not have.
    """
    found = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", text.strip().lower())
    example = "e.g. v5e:16x16, v5p:4x4x4, v6e:8x8, h100:8"
    if found is None:
        raise EgjaxError(f"topology {text!r}", remedy=example)
    chip = CHIPS.get(found.group(1))
    if chip is None:
        raise EgjaxError(
            f"no chip {found.group(1)!r} in topology {text!r}", remedy=f"one of {', '.join(CHIPS)}"
        )
    topology = Topology(chip, tuple(int(n) for n in found.group(2).split("x")))
    if len(topology.shape) != chip.dimensions:
        raise EgjaxError(
            f"topology {text!r}: {chip.name} has {chip.dimensions} dimensions", remedy=example
        )
    if not 1 <= topology.chips <= chip.most:
        raise EgjaxError(
            f"topology {text!r} has {topology.chips} chips",
            remedy=f"{chip.name} has 1 to {chip.most} joined by fast links",
        )
    return topology
