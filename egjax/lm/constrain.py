"""Decoding in which a grammar says, token by token, what may come next.

The grammar lives on the host, because what is allowed may depend on a simulator that has to run
first; so each token costs a round trip to the device. Texts are matched as bytes: a token is
allowed if its bytes go on along an allowed text, however the tokenizer would have cut that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from egjax.errors import EgjaxError
from egjax.lm.cache import Cache
from egjax.lm.config import LlamaConfig
from egjax.lm.ensemble import Combine, Models, empty_caches, first, read_all
from egjax.lm.generate import Generation, Prompts, check_settings, draw
from egjax.lm.lora import Pair
from egjax.lm.params import Params
from egjax.losses.reductions import NEVER

__all__ = ["Grammar", "Sentences", "Vocabulary", "constrained"]

Array = jax.Array
_TOKENS = "tokens"  # where a node of the tree keeps the tokens that end there


class Grammar(Protocol):
    """What may come next in one row; has the state of that row."""

    def allowed(self) -> np.ndarray:
        """bool[V]: the tokens that may come next."""
        ...

    def advance(self, token: int) -> None:
        """The token that came."""
        ...


class Vocabulary:
    """The tokens of a model as a tree over their bytes.

    Args:
        token_bytes: bytes of each token, see `egjax.lm.tokenizer.Tokenizer.token_bytes`.
        vocab_size: columns V of the logits; those beyond `token_bytes` are never allowed.
        eos_ids: tokens that end a text.
    """

    def __init__(self, token_bytes: Sequence[bytes], vocab_size: int, eos_ids: Sequence[int]):
        self.token_bytes = token_bytes[:vocab_size]
        self.size = vocab_size
        self.eos_ids = [token for token in eos_ids if token < vocab_size]
        self.tree: dict[Any, Any] = {}
        for token, text in enumerate(self.token_bytes):
            if text:
                _insert(self.tree, text).setdefault(_TOKENS, []).append(token)


def _insert(tree: dict[Any, Any], text: bytes) -> dict[Any, Any]:
    for byte in text:
        tree = tree.setdefault(byte, {})
    return tree


class Sentences:
    """A text of sentences out of a choice that may change from one to the next.

    No sentence may begin with another whole one: what is complete is taken as said.

    Args:
        vocabulary: of the model.
        options: the sentences that may come next, given those said so far. Where there are none the
            text ends.
        least: sentences before which the text may not end, unless there are no options.
        between: text before every sentence, the first included.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        options: Callable[[Sequence[str]], Iterable[str]],
        *,
        least: int = 1,
        between: str = " ",
    ):
        self.said: list[str] = []
        self._vocabulary, self._options = vocabulary, options
        self._least, self._between = least, between
        self._begin()

    def _begin(self) -> None:
        self._tree: dict[Any, Any] = {}
        for sentence in self._options(tuple(self.said)):
            _insert(self._tree, f"{self._between}{sentence}".encode())[_TOKENS] = sentence
        self._node = self._tree

    def allowed(self) -> np.ndarray:
        """See `Grammar`."""
        out = np.zeros(self._vocabulary.size, bool)
        if self._node is self._tree and (len(self.said) >= self._least or not self._tree):
            out[self._vocabulary.eos_ids] = True
        stack = [(self._node, self._vocabulary.tree)]
        while stack:
            ours, theirs = stack.pop()
            for byte, after in theirs.items():
                if byte is not _TOKENS and byte in ours:
                    out[after.get(_TOKENS, [])] = True
                    stack.append((ours[byte], after))
        return out

    def advance(self, token: int) -> None:
        """See `Grammar`."""
        if token in self._vocabulary.eos_ids:
            return
        for byte in self._vocabulary.token_bytes[token]:
            if byte not in self._node:
                raise EgjaxError(f"token {token} is not allowed here")
            self._node = self._node[byte]
        if _TOKENS in self._node:
            self.said.append(self._node[_TOKENS])
            self._begin()


def constrained(
    models: Models,
    prompts: Prompts,
    key: Array,
    grammars: Sequence[Grammar],
    *,
    max_new_tokens: int,
    combine: Combine = first,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> Generation:
    """Completes prompts as `egjax.lm.generate.generate` does, among allowed tokens.

    What is not allowed is left out of every model before their logits are combined, so what π̄ finds
    plausible is measured by the likeliest allowed token, and some allowed token always is. The
    log-probabilities that are returned are those of the combination without the constraint, -inf
    where that leaves the token out. With everything allowed the tokens are those of `generate` with
    the same key.

    Args:
        models, prompts, key, max_new_tokens, combine, temperature, top_p: as for `generate`.
        grammars: one for each prompt, in its initial state; fillers have none.

    Raises:
        EgjaxError: as `generate`; also where the numbers of prompts and grammars differ, or where
            nothing is allowed.
    """
    check_settings(models, prompts, max_new_tokens, temperature, top_p)
    real = np.asarray(prompts.mask).any(axis=1)
    if len(grammars) != real.sum():
        raise EgjaxError(f"{len(grammars)} grammars for {real.sum()} prompts")
    by_row = dict(zip(np.flatnonzero(real).tolist(), grammars))
    params = tuple(params for params, _ in models)
    configs = tuple(config for _, config in models)
    rows, length = prompts.tokens.shape
    eos, pad = configs[0].eos_ids, configs[0].pad_id or 0
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(rows, dtype=jnp.int32))
    caches = empty_caches(params, configs, rows, length + max_new_tokens)
    tokens = np.full((rows, max_new_tokens), pad, np.int32)
    logps, mask = np.zeros(tokens.shape, np.float32), np.zeros(tokens.shape, bool)
    ended = np.zeros(rows, bool)
    read, read_mask = prompts.tokens, prompts.mask
    for step in range(max_new_tokens):
        going = [row for row in by_row if not ended[row]]
        if not going:
            break
        # The device reads the last token while the host works out what may come.
        logits, caches = _read(params, caches, read, read_mask, configs=configs)
        allowed = np.ones((rows, configs[0].vocab_size), bool)
        for row in going:
            allowed[row] = by_row[row].allowed()
            if not allowed[row].any():
                raise EgjaxError(f"no token is allowed after {step} tokens of row {row}")
        token, logp = jax.device_get(
            _pick(
                logits,
                allowed,
                keys,
                step,
                jnp.float32(temperature),
                jnp.float32(top_p),
                combine=combine,
            )
        )
        for row in going:
            tokens[row, step], logps[row, step], mask[row, step] = token[row], logp[row], True
            by_row[row].advance(int(token[row]))
            ended[row] = int(token[row]) in eos
        read, read_mask = jnp.asarray(tokens[:, step, None]), jnp.asarray(mask[:, step, None])
    return Generation(
        jnp.asarray(tokens), jnp.asarray(logps), jnp.asarray(mask), jnp.asarray(ended)
    )


@partial(jax.jit, static_argnames="configs", donate_argnames="caches")
def _read(
    params: tuple[Params | Pair, ...],
    caches: tuple[Cache, ...],
    tokens: Array,
    mask: Array,
    *,
    configs: tuple[LlamaConfig, ...],
) -> tuple[tuple[Array, ...], tuple[Cache, ...]]:
    """Every model's logits [B, V] after the last of these tokens, and the caches with them."""
    return read_all(params, configs, tokens, mask, caches)


@partial(jax.jit, static_argnames="combine")
def _pick(
    logits: tuple[Array, ...],
    allowed: Array,
    keys: Array,
    step: Array,
    temperature: Array,
    top_p: Array,
    *,
    combine: Combine,
) -> tuple[Array, Array]:
    """An allowed token of each row, and its log-probability among all."""
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    # A finite log 0: the combination takes differences of them.
    within = combine(tuple(jnp.where(allowed, x, NEVER) for x in logits))
    token = draw(jnp.where(allowed, within, -jnp.inf), step_keys, temperature, top_p)
    logps = jax.nn.log_softmax(combine(logits))
    return token, jnp.take_along_axis(logps, token[:, None], axis=1)[:, 0]
