"""What fine-tuning a small model and decoding π̄ with a large one need on one device, by formula.

`egjax.capacity.formula` for the stages that a run without distillation has, and what their scripts
hold beside: the weights that training starts from, the logits of scored questions, the residual
streams of probes. Compared with what the device says it has before anything runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax

from egjax.capacity.formula import memory, table_bytes
from egjax.capacity.stages import Case
from egjax.errors import EgjaxError
from egjax.lm import int8, params
from egjax.lm.config import LlamaConfig
from egjax.train.layout import Layout

__all__ = ["check_fits", "device_bytes", "evaluation_bytes", "tuning_bytes"]

_GIB = 2**30
_SCORED = 5  # logits of πᴸ, πᴱ, πᴺ and π̄, and their log-probabilities, float32


def tuning_bytes(config: LlamaConfig, rows: int, length: int, layout: Layout) -> dict[str, float]:
    """Bytes by kind of supervised fine-tuning on one device.

    Args:
        config: the model that learns.
        rows: a step, all micro-batches together.
        length: tokens a row.
        layout: of the step; weights are float32 where it names no type.
    """
    case = Case("sft", config, config, rows, length, layout=layout)
    start = table_bytes(params.table(config))
    return memory(case, 1, 1) | {"starting weights": start}


def evaluation_bytes(
    large: LlamaConfig, small: LlamaConfig, rows: int, length: int, new_tokens: int, *, int8_: bool
) -> dict[str, float]:
    """Bytes by kind of evaluation on one device: πᴸ, πᴱ and πᴺ, and the largest of what decoding
    (caches and activations), scoring (logits) and probing (residual streams) need beside.

    Args:
        large, small: the models; πᴱ and πᴺ are of the latter's shape.
        rows: read at once.
        length: tokens of a prompt and its completion.
        new_tokens: of these, decoded.
        int8_: the matrices of πᴸ in eight bits.
    """
    decoding = memory(Case("decode", large, small, rows, length, new_tokens), 1, 1)
    beside = sum(size for kind, size in decoding.items() if kind != "weights")
    tokens = rows * length
    scoring = _SCORED * tokens * large.vocab_size * 4.0
    width = large.hidden_size * jax.numpy.dtype(large.dtype).itemsize
    probing = 2.0 * (large.num_layers + 1) * tokens * width  # as scanned, and put together
    return {
        "πᴸ": table_bytes((int8 if int8_ else params).table(large)),
        "πᴱ, πᴺ": 2 * table_bytes(params.table(small)),
        "decoding, scoring or probing": max(beside, scoring, probing),
    }


def device_bytes() -> float | None:
    """Bytes that the first device of this process gives to JAX; None where it does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit")
    return None if limit is None else float(limit)


def check_fits(
    needs: Mapping[str, Mapping[str, float]],
    limit: float | None,
    remedies: Mapping[str, Sequence[str]],
) -> None:
    """Refuses stages that need more than there is.

    Args:
        needs: bytes by kind, of each stage.
        limit: bytes; None if unknown, then nothing is refused.
        remedies: what would make each stage smaller.

    Raises:
        EgjaxError: what is too large, by how much.
    """
    if limit is None:
        return
    for stage, kinds in needs.items():
        total = sum(kinds.values())
        if total > limit:
            raise EgjaxError(
                f"{stage} needs {total / _GIB:.1f} GiB by formula, the device gives "
                f"{limit / _GIB:.1f}",
                remedy=", or ".join(remedies[stage]) or "take a larger card or smaller models",
            )
