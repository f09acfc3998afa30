"""NVIDIA GPUs as XLA wants them described, to compile for one that is not at hand."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

from egjax.capacity.chips import Chip

__all__ = ["TARGETS", "Target", "description"]


@dataclass(frozen=True)
class Target:
    """What the compiler goes by, beside a chip's memory and bandwidth.

    Attributes:
        name: as the driver gives it.
        capability: compute capability.
        accelerated: whether it has instructions that no later GPU has (`sm_90a`).
        cores: streaming multiprocessors.
        lanes: float32 units of each.
        threads: that each holds at once.
        shared, shared_block: bytes of shared memory, of each and at most of a block.
        cache: bytes of L2.
        clock: GHz.
    """

    name: str
    capability: tuple[int, int]
    accelerated: bool
    cores: int
    lanes: int
    threads: int
    shared: int
    shared_block: int
    cache: int
    clock: float


TARGETS: dict[str, Target] = {
    "a100": Target(
        "NVIDIA A100-SXM4-80GB", (8, 0), False, 108, 64, 2048, 167936, 166912, 40 << 20, 1.41
    ),
    "h100": Target(
        "NVIDIA H100 80GB HBM3", (9, 0), True, 132, 128, 2048, 233472, 232448, 50 << 20, 1.98
    ),
    "h200": Target("NVIDIA H200", (9, 0), True, 132, 128, 2048, 233472, 232448, 50 << 20, 1.98),
    "rtx4090": Target(
        "NVIDIA GeForce RTX 4090", (8, 9), False, 128, 128, 1536, 102400, 101376, 72 << 20, 2.52
    ),
}
"""By the names of `egjax.capacity.chips.CHIPS`. Figures: NVIDIA's tuning guides and whitepapers of
Ampere, Ada and Hopper; caches and clocks of the server GPUs as OpenXLA's own descriptions state
them (xla/backends/gpu/target_config/specs)."""


def _version(package: str, otherwise: str) -> list[str]:
    """Major, minor and patch of a library of NVIDIA's, as installed for JAX."""
    for suffix in ("-cu13", "-cu12", ""):
        try:
            return (metadata.version(package + suffix).split(".") + ["0", "0"])[:3]
        except metadata.PackageNotFoundError:
            continue
    return otherwise.split(".")


def description(chip: Chip) -> str:
    """A `GpuTargetConfigProto` in text form."""
    target = TARGETS[chip.name]
    major, minor = target.capability
    extension = "ACCELERATED_FEATURES" if target.accelerated else "NONE"
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": target.shared,
        "shared_memory_per_block_optin": target.shared_block,
        "threads_per_core_limit": target.threads,
        "core_count": target.cores,
        "fpus_per_core": target.lanes,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": int(chip.bandwidth),
        "device_memory_size": int(chip.memory),
        "l2_cache_size": target.cache,
        "clock_rate_ghz": target.clock,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    lines = [f"  {name}: {value}" for name, value in device.items()]
    capability = f"major: {major} minor: {minor} feature_extension: {extension}"
    versions = {
        "dnn_version_info": _version("nvidia-cudnn", "9.10.0"),
        "runtime_version": _version("nvidia-cuda-runtime", "13.0.0"),
    }
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            f"  cuda_compute_capability {{ {capability} }}",
            "}",
            'platform_name: "CUDA"',
            *(
                f"{field} {{ major: {one} minor: {two} patch: {three} }}"
                for field, (one, two, three) in versions.items()
            ),
            f'device_description_str: "{target.name}"',
        ]
    )
