"""Models and teachers as chunked losses take them: by hidden states and unembedding matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp

from egjax.losses.blocks import Start, split

__all__ = [
    "Head",
    "Pick",
    "Ratio",
    "Read",
    "Scores",
    "Targets",
    "Teacher",
    "TopK",
    "allowed",
    "device_letter",
    "log_sum",
]

Array = jax.Array
T = TypeVar("T")
Pick = Callable[[Array], Array]
Read = Callable[[Start, int], Array]
"""(start, width) -> float32[n, width], some columns of the vocabulary."""
Scores = Array | Callable[[Array], Array]


def allowed(x: Array, mask: Array | None, never: float) -> Array:
    """`never` in the columns that are not."""
    return x if mask is None else jnp.where(mask, x, never)


def log_sum(x: Array, mask: Array | None) -> Array:
    """Log of the sum of exponentials over the columns that are allowed."""
    return jax.nn.logsumexp(allowed(x, mask, -jnp.inf), axis=-1)


def device_letter(shards: int) -> str:
    """Of the axis of devices in a formula."""
    return "s" if shards > 1 else ""


class Teacher(Protocol):
    """What a student is compared with; a pytree whose arrays have the student's leading axes."""

    def pick(self: T, pick: Pick) -> T:
        """The same teacher for some tokens: `pick` applied to each array that has them."""
        ...

    def scores(self, temperature: Array, vocab_mask: Array | None) -> Scores:
        """Log-probabilities times the temperature, up to a constant for each token.

        Args:
            temperature: float32[], by which the scores will be divided.
            vocab_mask: bool[V] or None, False for padded columns (whose scores do not matter).

        Returns:
            float32[n, V], -inf allowed; or int[n], the token that has all the mass; or a function
            that gives the first from the student's logits float32[n, V].
        """
        ...


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["hidden", "unembedding"],
    meta_fields=["tied"],
)
@dataclasses.dataclass(frozen=True)
class Head:
    """The end of a model: logits are `hidden @ unembedding`, summed in float32.

    Attributes:
        hidden: [..., D], what the unembedding takes (after the last norm), any float type.
        unembedding: [D, V], or [V, D] if `tied`.
        tied: the matrix is the embedding table.
    """

    hidden: Array
    unembedding: Array
    tied: bool = False

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.unembedding.shape[0 if self.tied else 1]

    def pick(self, pick: Pick) -> Head:
        """See `Teacher`."""
        return dataclasses.replace(self, hidden=pick(self.hidden))

    def after(self, first: Array) -> Head:
        """The same head, whose logits are formed after another array: so fewer live at once."""
        # A dependence that no compiler can see through; optimisation barriers are gone before
        # the CPU's schedule is made.
        zero = jnp.minimum(jnp.abs(first.reshape(-1)[0]), 0)
        return dataclasses.replace(self, hidden=self.hidden + zero.astype(self.hidden.dtype))

    def logits(self) -> Array:
        """float32[..., V]."""
        formula = "...d,vd->...v" if self.tied else "...d,dv->...v"
        return jnp.einsum(
            formula, self.hidden, self.unembedding, preferred_element_type=jnp.float32
        )

    def scores(self, temperature: Array, vocab_mask: Array | None) -> Array:
        """See `Teacher`."""
        return self.logits()

    def cut(self, start: Start, width: int, shards: int = 1) -> tuple[Array, str]:
        """Columns of the unembedding, laid out as it is, and the letters of their axes."""
        # Seemingly another matrix in each round: else the CPU's compiler cuts the blocks of a
        # bfloat16 matrix from a float32 copy of all of it.
        weight = self.unembedding
        if jax.default_backend() == "cpu":
            weight, start = jax.lax.optimization_barrier((weight, jnp.asarray(start)))
        weight = split(weight, 0 if self.tied else 1, shards)
        device = device_letter(shards)
        axis = weight.ndim - (2 if self.tied else 1)
        letters = device + "vd" if self.tied else f"d{device}v"
        return jax.lax.dynamic_slice_in_dim(weight, start, width, axis=axis), letters

    def read(self, start: Start, width: int) -> Array:
        """Some columns of the logits of N tokens, float32[N, width]."""
        columns, letters = self.cut(start, width)
        formula = f"nd,{letters}->n{letters.replace('d', '')}"
        return jnp.einsum(formula, self.hidden, columns, preferred_element_type=jnp.float32)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["large", "expert", "anti_expert", "alpha", "clip", "plausible"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Ratio:
    """The composed teacher `π̄ ∝ πᴸ (πᴱ/πᴺ)^α`; see `egjax.losses.behaviour_ratio`.

    Attributes:
        large, expert, anti_expert: the three models, on the same tokens.
        alpha, clip, plausible: as there.
    """

    large: Head
    expert: Head
    anti_expert: Head
    alpha: float | Array = 1.0
    clip: float | Array | None = None
    plausible: float | Array | None = None

    def pick(self, pick: Pick) -> Ratio:
        """See `Teacher`."""
        return dataclasses.replace(
            self,
            large=self.large.pick(pick),
            expert=self.expert.pick(pick),
            anti_expert=self.anti_expert.pick(pick),
        )

    def scores(self, temperature: Array, vocab_mask: Array | None) -> Array:
        """See `Teacher`."""
        expert, anti_expert = self.expert.logits(), self.anti_expert.logits()
        ratio = expert - anti_expert
        # Only what is clipped depends on the constants that normalise it.
        clipped = self.clip is not None
        offset = log_sum(expert, vocab_mask) - log_sum(anti_expert, vocab_mask) if clipped else None
        large = self.large.after(ratio).logits()
        best = allowed(large, vocab_mask, -jnp.inf).max(-1) if self.plausible is not None else None
        return self.compose(large, ratio, offset, best)

    def compose(
        self, large: Array, ratio: Array, offset: Array | None, best: Array | None
    ) -> Array:
        """The scores at some columns.

        Args:
            large, ratio: float32[..., width], logits of πᴸ and differences of those of πᴱ and πᴺ.
            offset: float32[...], the same difference of their log-normalisers; asked where the
                ratio is clipped.
            best: float32[...], the highest logit of πᴸ; asked where there is a plausible set.
        """
        if self.clip is not None and offset is not None:
            clip = jnp.asarray(self.clip, jnp.float32)
            ratio = jnp.clip(ratio - offset[..., None], -clip, clip)
        scores = large + jnp.asarray(self.alpha, jnp.float32) * ratio
        if self.plausible is None or best is None:
            return scores
        least = best[..., None] + jnp.log(jnp.asarray(self.plausible, jnp.float32))
        return jnp.where(large >= least, scores, -jnp.inf)


@partial(jax.tree_util.register_dataclass, data_fields=["ids"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Targets:
    """A teacher that gives one token all its mass.

    Attributes:
        ids: int[...], token ids in 0..V-1; anything, e.g. -100, where a token does not count.
    """

    ids: Array

    def pick(self, pick: Pick) -> Targets:
        """See `Teacher`."""
        return Targets(pick(self.ids))

    def scores(self, temperature: Array, vocab_mask: Array | None) -> Array:
        """See `Teacher`."""
        return self.ids


@partial(jax.tree_util.register_dataclass, data_fields=["ids", "top", "tail"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TopK:
    """A stored teacher, approximate: its K most probable tokens, and the mass of all others as one.

    The divergence is that of distributions over K + 1 outcomes, "another token" being the last,
    with its exact gradient. Joining outcomes can only lower a divergence, so it is at most the
    exact one; the full teacher is among the students that reach 0. Within the tail the teacher
    is taken to follow the student: that makes the sum over V terms equal the sum over K + 1.

    Attributes:
        ids: int[..., K], distinct tokens.
        top: float[..., K], their log-probabilities, at the temperature of the loss.
        tail: float[...], log of the mass of the other tokens; -inf where there is none.
    """

    ids: Array
    top: Array
    tail: Array

    def pick(self, pick: Pick) -> TopK:
        """See `Teacher`."""
        return TopK(pick(self.ids), pick(self.top), pick(self.tail))

    def scores(self, temperature: Array, vocab_mask: Array | None) -> Scores:
        """See `Teacher`."""

        def scores(student: Array) -> Array:
            rows = jnp.arange(student.shape[0], dtype=jnp.int32)[:, None]
            others = allowed(student / temperature, vocab_mask, -jnp.inf)
            others = others.at[rows, self.ids].set(-jnp.inf)
            tail = self.tail.astype(jnp.float32)
            # Without a tail there may be no other token either, and -inf less -inf is NaN.
            share = jnp.where(tail > -jnp.inf, tail - jax.nn.logsumexp(others, axis=-1), tail)
            top = self.top.astype(jnp.float32)
            return (others + share[:, None]).at[rows, self.ids].set(top) * temperature

        return scores
