"""The model as a `flax.nnx.Module`, for users of Flax and of libraries built on it."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from egjax.lm.config import LlamaConfig
from egjax.lm.model import forward
from egjax.lm.params import Params

__all__ = ["Llama"]


class Llama(nnx.Module):
    """A thin module over `egjax.lm.model.forward`; compiles to the same program.

    Args:
        config: the model.
        params: its parameters, e.g. of `egjax.lm.params.init` or `egjax.lm.hf.load`.
    """

    def __init__(self, config: LlamaConfig, params: Params):
        self.config = config
        self.params = nnx.data(jax.tree.map(nnx.Param, params))

    def __call__(self, tokens: jax.Array, **options: Any) -> Any:
        """As `egjax.lm.model.forward`, whose further arguments are passed on."""
        params: Any = nnx.pure(nnx.state(self.params))
        return forward(params, self.config, tokens, **options)
