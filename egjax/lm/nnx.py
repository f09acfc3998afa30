"""The model as a `flax.nnx.Module`, for users of Flax and of libraries built on it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from egjax.errors import EgjaxError
from egjax.lm.config import LlamaConfig
from egjax.lm.model import forward
from egjax.lm.params import Params

__all__ = ["Llama", "TunixLlama"]


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


class TunixLlama(Llama):
    """The same, called as Tunix's trainers call their models."""

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        cache: None = None,
        attention_mask: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        """Logits of the next token, and no cache.

        Args:
            tokens: int32[B, T].
            positions: int32[B, T].
            cache: must be None.
            attention_mask: bool[B, T, T], which keys a token sees: causal, of one or several
                sequences one behind the other in a row, without those of padding.

        Raises:
            EgjaxError: a cache is given.
        """
        if cache is not None:
            raise EgjaxError("decoding with Tunix's cache", remedy="use egjax.lm.generate")
        segments = None
        if attention_mask is not None:
            # A sequence is known by its first token, which is the first that its tokens see.
            first = jnp.argmax(attention_mask, axis=-1)
            real = jnp.diagonal(attention_mask, axis1=-2, axis2=-1)
            segments = jnp.where(real, first + 1, 0).astype(jnp.int32)
        return super().__call__(tokens, positions=positions, segment_ids=segments), None
