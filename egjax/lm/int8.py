"""Matrices of frozen models in eight bits: half the memory, and half the reading, of bfloat16.

Symmetric rounding with one scale per output channel, weights alone (as in Dettmers et al. 2022,
arXiv 2208.07339, without its outliers); products are still of the activations' type. Embedding,
unembedding and norms stay as they are. What is decoded with or distilled from, never what learns.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from egjax.lm import params as full
from egjax.lm.config import LlamaConfig
from egjax.lm.params import Params, Spec

__all__ = ["is_quantized", "quantize", "table"]

INPUTS = {"query": 1, "key": 1, "value": 1, "output": 2, "gate": 1, "up": 1, "down": 1}
"""Axes that each matrix of the layers sums over; they stand behind that of the layers."""
_LARGEST = 127


@jax.jit
def quantize(params: Params) -> Params:
    """Rounds the matrices of the layers to int8, each with its float32 `…_scale`.

    An entry w becomes `round(w / s)` with `s = max |w| / 127` over the inputs of its output
    channel, so it is off by at most s / 2.
    """
    layers = dict(params["layers"])
    for name, inputs in INPUTS.items():
        axes = tuple(range(1, 1 + inputs))
        matrix = layers[name].astype(jnp.float32)
        scale = jnp.abs(matrix).max(axis=axes) / _LARGEST
        # A channel of zeros keeps them.
        divisor = jnp.expand_dims(jnp.where(scale > 0, scale, 1.0), axes)
        layers[name] = jnp.round(matrix / divisor).astype(jnp.int8)
        layers[f"{name}_scale"] = scale
    return {**params, "layers": layers}


def is_quantized(params: Params) -> bool:
    """Whether these are parameters that `quantize` gave."""
    return "query_scale" in params["layers"]


def table(config: LlamaConfig) -> dict[str, Any]:
    """Shape, dtype and axes of every tensor that `quantize` gives; see `egjax.lm.params.table`."""
    specs = full.table(config)
    layers: dict[str, Spec] = dict(specs["layers"])
    for name, inputs in INPUTS.items():
        spec = layers[name]
        layers[name] = dataclasses.replace(spec, dtype="int8")
        layers[f"{name}_scale"] = dataclasses.replace(
            spec,
            shape=(spec.shape[0], *spec.shape[1 + inputs :]),
            axes=(spec.axes[0], *spec.axes[1 + inputs :]),
            dtype="float32",
        )
    return {**specs, "layers": layers}
