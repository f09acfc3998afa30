"""How many floating-point operations training takes by formula, and how many a device can do.

A matrix of N parameters costs 2N a token forward and twice that backward (6N in all: Kaplan et al.
2020, arXiv 2001.08361); attention costs 4·L·H·K for each query and key that meet forward, three
times that in all. What is recomputed to save memory does not count, nor does padding, nor a key
that a query may not see. XLA's own count serves less: it takes the body of a scan for one layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from egjax.lm.config import LlamaConfig
from egjax.train.data import PairBatch, SharedPairBatch, TokenBatch
from egjax.train.loop import Work
from egjax.train.objectives import Taught

__all__ = ["PEAKS", "forward_flops", "matrix_rate", "peak_flops", "step_work"]

PEAKS: Mapping[str, float] = MappingProxyType(
    {
        "TPU v4": 275e12,
        "TPU v5 lite": 197e12,
        "TPU v5": 459e12,
        "TPU v5p": 459e12,
        "TPU v6 lite": 918e12,
        "NVIDIA A100": 312e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100": 989e12,
        "NVIDIA H200": 989e12,
    }
)
"""FLOP/s of a device in dense bfloat16 products by its makers' data sheets; a device is known by
the longest of these names that its own begins with."""


def peak_flops(devices: Sequence[Any]) -> float | None:
    """FLOP/s of devices together, in bfloat16; None where one is not in the table (a CPU)."""
    total = 0.0
    for device in devices:
        names = [name for name in PEAKS if device.device_kind.startswith(name)]
        if not names:
            return None
        total += PEAKS[max(names, key=len)]
    return total


def matrix_rate(size: int = 4096, dtype: str = "bfloat16", *, repeats: int = 5) -> float:
    """FLOP/s of one device in products of square matrices, measured; the best of some repeats.

    Args:
        size: rows and columns.
        dtype: of the factors; sums are float32.
        repeats: timed runs, after one that is not; each makes several products.
    """
    count = 8
    x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype) / size**0.5

    @jax.jit
    def run(x: jax.Array) -> jax.Array:
        # Each product needs the one before, so that none is left out or done beside another.
        return jax.lax.fori_loop(
            0,
            count,
            lambda _, y: jnp.dot(y, x, preferred_element_type=jnp.float32).astype(dtype),
            x,
        )

    run(x).block_until_ready()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run(x).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return count * 2 * size**3 / min(seconds)


def forward_flops(config: LlamaConfig, tokens: float, seen: float, outputs: float) -> float:
    """Operations of a forward pass.

    Args:
        config: the model.
        tokens: read by the layers.
        seen: pairs of a query and a key that it sees.
        outputs: positions that get logits.
    """
    width, heads = config.hidden_size, config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    layer = 2 * width * heads + 2 * width * keys + 3 * width * config.intermediate_size
    matrices = config.num_layers * layer * tokens + width * config.vocab_size * outputs
    return 2 * matrices + 4 * config.num_layers * heads * seen


def _rows(array: Any) -> tuple[np.ndarray, float]:
    """The rows of a batch that this process holds, and how many times as many there are."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array), 1.0
    parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    mine = np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])
    return mine, len(array) / len(mine)


def step_work(
    trained: LlamaConfig, frozen: Sequence[LlamaConfig] = ()
) -> Callable[[TokenBatch | PairBatch | SharedPairBatch | Taught], Work]:
    """What a step does with a batch, for `egjax.train.loop.fit`.

    Of several processes each counts its own rows for all.

    Args:
        trained: the model that is trained: forward and backward.
        frozen: models that are run forward on the same rows.
    """

    def work(batch: TokenBatch | PairBatch | SharedPairBatch | Taught) -> Work:
        rows: Any = batch.rows if isinstance(batch, Taught) else batch
        tokens = flops = 0.0
        parts = (rows.chosen, rows.rejected) if isinstance(rows, PairBatch) else (rows,)
        for part in parts:
            segments, share = _rows(part.segment_ids)
            real = segments > 0
            read = share * float(real.sum())
            # A token sees as many keys as it has positions before it, and itself.
            seen = share * float((_rows(part.positions)[0] + 1)[real].sum())
            shared = isinstance(part, SharedPairBatch)
            outputs = share * float(_rows(part.target_mask)[0].sum()) if shared else read
            passes = [forward_flops(config, read, seen, outputs) for config in (trained, *frozen)]
            tokens, flops = tokens + read, flops + 3 * passes[0] + sum(passes[1:])
        return Work(tokens, flops)

    return work
