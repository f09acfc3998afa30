"""Log-probability of given text, for multiple choice and for what a policy thinks of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from egjax.errors import EgjaxError
from egjax.lm.config import LlamaConfig
from egjax.lm.ensemble import Combine, Models, check_vocabularies, first, read
from egjax.lm.generate import check_ids
from egjax.lm.lora import Pair
from egjax.lm.params import Params
from egjax.losses.reductions import chosen

__all__ = ["Scored", "pad_answers", "score", "score_ensemble"]

Array = jax.Array


@struct.dataclass
class Scored:
    """Sequences whose marked tokens are scored, padded on the right.

    Attributes:
        tokens: int32[B, T].
        mask: bool[B, T]. True for a token that counts (the answer), given all before it.
    """

    tokens: Array
    mask: Array


def pad_answers(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    pad_id: int,
    bucket: int = 64,
    rows: int | None = None,
) -> Scored:
    """Puts prompts and answers into one padded batch in which the answers count.

    Args:
        pairs: token ids of (prompt, answer) of each row; a prompt has at least one token.
        pad_id: what to pad with; any id serves.
        bucket: the length is rounded up to a multiple of this, to compile for few lengths.
        rows: rows of the batch, the last ones filled with padding; None for as many as pairs.

    Raises:
        EgjaxError: there is no pair, a prompt is empty or has a negative id, or there are more
            pairs than rows.
    """
    check_ids([prompt for prompt, _ in pairs], bucket)
    rows = len(pairs) if rows is None else rows
    if len(pairs) > rows:
        raise EgjaxError(f"{len(pairs)} pairs for a batch of {rows} rows")
    length = -(-max(len(prompt) + len(answer) for prompt, answer in pairs) // bucket) * bucket
    tokens = np.full((rows, length), pad_id, np.int32)
    mask = np.zeros((rows, length), bool)
    for row, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        tokens[row, :end] = [*prompt, *answer]
        mask[row, len(prompt) : end] = True
    return Scored(tokens=jnp.asarray(tokens), mask=jnp.asarray(mask))


def score(params: Params, config: LlamaConfig, tokens: Array, mask: Array) -> tuple[Array, Array]:
    """Log-probability of the marked tokens of each sequence.

    Args:
        params: the model's parameters.
        config: the model.
        tokens: int32[B, T]. Padding may follow a sequence; nothing before it sees it.
        mask: bool[B, T]. True for the tokens that count, each given all before it. The first token
            of a row is given by nothing and may not count.

    Returns:
        float32[B], the sum of the log-probabilities, and int32[B], the number of tokens in it.
    """
    return score_ensemble([(params, config)], tokens, mask)


def score_ensemble(
    models: Models, tokens: Array, mask: Array, *, combine: Combine = first
) -> tuple[Array, Array]:
    """As `score`, for models whose logits are combined as in `egjax.lm.generate.generate`.

    Raises:
        EgjaxError: the models' vocabularies differ in size.
    """
    check_vocabularies({f"model {i}": config.vocab_size for i, (_, config) in enumerate(models)})
    configs = tuple(config for _, config in models)
    return _score(tuple(params for params, _ in models), tokens, mask, configs, combine)


@partial(jax.jit, static_argnames=("configs", "combine"))
def _score(
    params: tuple[Params | Pair, ...],
    tokens: Array,
    mask: Array,
    configs: tuple[LlamaConfig, ...],
    combine: Combine,
) -> tuple[Array, Array]:
    logits = [x for p, c in zip(params, configs) for x in read(p, c, tokens[:, :-1])[0]]
    logps = jax.nn.log_softmax(combine(tuple(logits)))
    taken = chosen(logps, tokens[:, 1:])
    counted = mask[:, 1:]
    return jnp.where(counted, taken, 0.0).sum(axis=1), counted.sum(axis=1)
