"""Stop strings, matched exactly on the device, also where a string straddles tokens.

The strings make an automaton over bytes (Aho and Corasick 1975); run over the bytes of every token
of the vocabulary it becomes a table over tokens, which decoding looks up once a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from egjax.errors import EgjaxError

__all__ = ["Stops", "cut", "follow", "stop_table"]

Array = jax.Array


@struct.dataclass
class Stops:
    """The automaton over tokens, with S states (bytes of the strings, and one) and V tokens.

    Attributes:
        next_state: int32[S, V]. The state after a token; 0 is the first.
        hit: bool[S, V]. A stop string ends within that token.
    """

    next_state: Array
    hit: Array


def stop_table(strings: Sequence[str], token_bytes: Sequence[bytes], vocab_size: int) -> Stops:
    """The automaton of some stop strings.

    Args:
        strings: what ends a completion, wherever it stands in it; what stands in the prompt or
            begins there does not count.
        token_bytes: bytes of each token, see `egjax.lm.tokenizer.Tokenizer.token_bytes`.
        vocab_size: columns V of the models' logits; those beyond `token_bytes` have no text.

    Raises:
        EgjaxError: no string, or an empty one.
    """
    if not strings or not all(strings):
        raise EgjaxError("an empty stop string", remedy="give at least one character")
    delta, final = _automaton([text.encode() for text in strings])
    lengths = np.array([len(text) for text in token_bytes[:vocab_size]])
    codes = np.frombuffer(b"".join(token_bytes[:vocab_size]), np.uint8)
    starts = np.cumsum(lengths) - lengths
    state = np.repeat(np.arange(len(delta), dtype=np.int32)[:, None], vocab_size, axis=1)
    hit = np.zeros(state.shape, bool)
    for place in range(lengths.max(initial=0)):
        # Few tokens are long: the work is the states times the bytes of all.
        tokens = np.flatnonzero(lengths > place)
        after = delta[state[:, tokens], codes[starts[tokens] + place]]
        state[:, tokens] = after
        hit[:, tokens] |= final[after]
    return Stops(jnp.asarray(state), jnp.asarray(hit))


def follow(stops: Stops | None, state: Array, tokens: Array) -> tuple[Array, Array]:
    """Reads tokens int32[B, T] from the states int32[B].

    Returns:
        bool[B, T], whether a stop string ends in each token, and int32[B, T], the state after it.
    """
    if stops is None:
        return jnp.zeros(tokens.shape, bool), jnp.broadcast_to(state[:, None], tokens.shape)

    def one(state: Array, token: Array):
        after = stops.next_state[state, token]
        return after, (stops.hit[state, token], after)

    _, (hits, states) = jax.lax.scan(one, state, tokens.T)
    return hits.T, states.T


def cut(text: str, strings: Sequence[str]) -> str:
    """A completion without the first stop string in it and what follows."""
    places = [text.find(string) for string in strings if string in text]
    return text[: min(places)] if places else text


def _automaton(strings: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Transitions int32[S, 256] and which of the states bool[S] end a string."""
    children: list[dict[int, int]] = [{}]
    ends = [False]
    for text in strings:
        state = 0
        for byte in text:
            if byte not in children[state]:
                children[state][byte] = len(children)
                children.append({})
                ends.append(False)
            state = children[state][byte]
        ends[state] = True
    delta = np.zeros((len(children), 256), np.int32)
    # By breadth, so that the shorter state that a state falls back to is complete before it.
    queue = [(child, 0) for child in children[0].values()]
    for byte, child in children[0].items():
        delta[0, byte] = child
    while queue:
        state, fallback = queue.pop(0)
        ends[state] |= ends[fallback]
        delta[state] = delta[fallback]
        for byte, child in children[state].items():
            queue.append((child, int(delta[fallback, byte])))
            delta[state, byte] = child
    return delta, np.array(ends)
