"""The Llamas that one plans for."""

from __future__ import annotations

from dataclasses import replace

from egjax.errors import EgjaxError
from egjax.lm.config import LlamaConfig, RopeScaling

__all__ = ["PRESETS", "preset"]


def _llama(hidden: int, mlp: int, layers: int, heads: int, head_dim: int = 128) -> LlamaConfig:
    """Llama 3.1: one vocabulary and eight key and value heads for all sizes."""
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=head_dim,
        max_seq_len=131_072,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
        tie_embeddings=False,
        dtype="bfloat16",
        bos_id=128_000,
        eos_ids=(128_001, 128_008, 128_009),
        pad_id=None,
    )


PRESETS: dict[str, LlamaConfig] = {
    "1b": replace(
        _llama(2048, 8192, 16, 32, head_dim=64),
        tie_embeddings=True,
        rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
    ),
    "8b": _llama(4096, 14_336, 32, 32),
    "70b": _llama(8192, 28_672, 80, 64),
    "405b": _llama(16_384, 53_248, 126, 128),
}
"""Llama 3.2 1B and Llama 3.1 8B, 70B, 405B, by their published `config.json`."""


def preset(name: str) -> LlamaConfig:
    """One of `PRESETS`, upper or lower case.

    Raises:
        EgjaxError: there is none of this name.
    """
    found = PRESETS.get(name.lower())
    if found is None:
        raise EgjaxError(f"no preset {name!r}", remedy=f"one of {', '.join(PRESETS)}")
    return found
