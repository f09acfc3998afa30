"""The Llamas that one plans for."""

from __future__ import annotations

from egjax.errors import EgjaxError
from egjax.lm import config
from egjax.lm.config import LlamaConfig

__all__ = ["PRESETS", "preset"]

PRESETS: dict[str, LlamaConfig] = {
    "1b": config.preset("llama-3.2-1b"),
    "8b": config.preset("llama-3.1-8b"),
    "70b": config.preset("llama-3.1-70b"),
    "405b": config.preset("llama-3.1-405b"),
}
"""Llama 3.2 1B and Llama 3.1 8B, 70B, 405B by their size alone."""


def preset(name: str) -> LlamaConfig:
    """One of `PRESETS`, upper or lower case.

    Raises:
        EgjaxError: there is none of this name.
    """
    found = PRESETS.get(name.lower())
    if found is None:
        raise EgjaxError(f"no preset {name!r}", remedy=f"one of {', '.join(PRESETS)}")
    return found
