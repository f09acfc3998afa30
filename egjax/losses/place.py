"""The place of the unembedding's gradient, where logits and scores lie until it is known."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from egjax.losses.blocks import (
    Start,
    alike_mapped,
    columns_at_once,
    cut,
    even,
    indices,
    loop,
    moves_bits,
    rounded,
    rounded_to,
    sizes,
)
from egjax.losses.heads import Head, Ratio, Targets, Teacher, allowed
from egjax.losses.rows import Settings, columns_of, measure

__all__ = ["Place", "find_place", "grads_of_kept", "keep"]

Array = jax.Array
T = TypeVar("T", bound=Teacher)


class Slot(NamedTuple):
    """Where values of some tokens lie: their first row, and that of their lower halves."""

    row: Start
    low: Start


class Place:
    """The unembedding's gradient before it is known: D rows of V entries, for N tokens.

    Arrays are [D, V] or [V, D] as the unembedding. Each token has one row, for its logits and then
    for their gradients. The rows that are left hold what is worked on: of entries of 16 bits the
    lower halves of float32 logits, whose upper ones are in the token's row, and the scores of a
    teacher, one row or two halves. As many tokens are worked on at a time as these rows have room
    for. On a CPU, where gradients of logits keep their 32 bits and teachers have arrays of their
    own, all are. Where there are not enough rows of 16 bits, the place is float32, and rounded in
    the end.

    Entries of 16 bits are integers, of the gradient's type only in the end: XLA converts some
    arrays of bfloat16 on its way, and bits that look like a signalling NaN do not survive that. On
    a CPU this bitcast copies the gradient. From JAX 0.11 on nothing is converted there, so that the
    entries have the gradient's type from the beginning, and nothing is copied.

    Attributes:
        halves: whether it is of 16 bits.
        piece: tokens that are worked on at a time.
        holds_teacher: whether the scores of teachers lie here, too.
    """

    def __init__(
        self, count: int, head: Head, *, halves: bool, piece: int, holds_teacher: bool = False
    ):
        weight, self.tied = head.unembedding, head.tied
        self.shape, self.dtype = weight.shape, weight.dtype
        self.count, self.width = count, weight.shape[1 if head.tied else 0]
        self.halves, self.piece, self.holds_teacher = halves, piece, holds_teacher
        self.rounds = halves and rounded_to(weight.dtype) != jnp.float32

    def empty(self) -> Array:
        """Zeros."""
        if not self.halves:
            return jnp.zeros(self.shape, jnp.float32)
        return jnp.zeros(self.shape, self.dtype if moves_bits() else jnp.uint16)

    def gradient(self, place: Array) -> Array:
        """The gradient, once all of it was put there."""
        if self.halves:
            return jax.lax.bitcast_convert_type(place, self.dtype)
        return place.astype(self.dtype)

    def student(self, first: Start, offset: Start) -> Slot:
        """Of the logits of tokens from `first + offset` on, in a piece that begins with `first`."""
        return Slot(first + offset, self.count + offset)

    def teacher(self, offset: Start) -> Slot:
        """Of the teacher's scores for the same."""
        row = self.count + self.halves * self.piece + offset
        return Slot(row, row + self.piece)

    def _at(self, row: Start, column: Start) -> Sequence[Any]:
        return indices(column, row) if self.tied else indices(row, column)

    def _cut(self, place: Array, row: Start, rows: int, column: Start, width: int) -> Array:
        shape = (width, rows) if self.tied else (rows, width)
        part = jax.lax.dynamic_slice(place, self._at(row, column), shape)
        return jax.lax.bitcast_convert_type(part, jnp.uint16) if self.halves else part

    def _put(self, place: Array, part: Array, row: Start, column: Start) -> Array:
        part = jax.lax.bitcast_convert_type(part, place.dtype)
        return jax.lax.dynamic_update_slice(place, part, self._at(row, column))

    def read(self, place: Array, slot: Slot, rows: int, column: Start, width: int) -> Array:
        """What is kept of some tokens: float32[rows, width]."""
        values = self._cut(place, slot.row, rows, column, width)
        if self.halves:
            low = self._cut(place, slot.low, rows, column, width)
            bits = (values.astype(jnp.uint32) << 16) | low.astype(jnp.uint32)
            values = jax.lax.bitcast_convert_type(bits, jnp.float32)
        return values.T if self.tied else values

    def write(self, place: Array, values: Array, slot: Slot, column: Start) -> Array:
        """Keeps what `read` reads."""
        values = values.T if self.tied else values
        if self.halves:
            bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
            low = (bits & 0xFFFF).astype(jnp.uint16)
            place = self._put(place, low, slot.low, column)
            values = (bits >> 16).astype(jnp.uint16)
        return self._put(place, values, slot.row, column)

    def finish(self, place: Array, grads: Array, slot: Slot, column: Start) -> Array:
        """Keeps gradients of logits, float32[rows, width], which `graded` reads."""
        if not self.rounds:
            return self.write(place, grads, slot, column)
        grads = grads.astype(self.dtype)
        return self._put(place, grads.T if self.tied else grads, slot.row, column)

    def graded(self, place: Array, column: Start, width: int) -> Array:
        """Gradients of the logits of all tokens, [N, width]: float32, or rounded."""
        if not self.rounds:
            return self.read(place, self.student(0, 0), self.count, column, width)
        bits = self._cut(place, 0, self.count, column, width)
        values = jax.lax.bitcast_convert_type(bits, self.dtype)
        return values.T if self.tied else values

    def put(self, place: Array, part: Array, column: Start) -> Array:
        """Puts columns of the gradient: float32 [D, width] or [width, D] if tied."""
        return self._put(place, part.astype(self.dtype if self.halves else part.dtype), 0, column)


def find_place(settings: Settings, head: Head, teacher: Teacher) -> Place | None:
    """Where logits can be kept, if there is room for them.

    Not for a vocabulary split over devices: where tokens are, too, and no `shard_map` keeps them
    apart, the compiler gathers the whole place.
    """
    bits, count = 8 * head.unembedding.dtype.itemsize, settings.count
    left = head.hidden.shape[-1] - count
    least = min(count, sizes().scored)
    holds_teacher = sizes().together and isinstance(teacher, Head | Ratio)
    if left < 0 or settings.shards > 1 or bits not in (16, 32):
        return None
    for halves in (True, False) if bits == 16 else (False,):
        beside = halves + holds_teacher * (1 + halves)  # rows of what is worked on
        room = min(count, left // beside) if beside else count
        if halves and rounded_to(head.unembedding.dtype) == jnp.float32:
            room = count if room == count else 0  # gradients of logits keep their lower halves
        if room >= least:
            piece = even(count, room)
            return Place(count, head, halves=halves, piece=piece, holds_teacher=holds_teacher)
    return None


def _part(teacher: T, first: Start, count: int) -> T:
    """The same for some of its tokens."""
    return teacher.pick(lambda x: jax.lax.dynamic_slice_in_dim(x, first, count, axis=0))


def _teach(
    place: Place, kept: Array, teacher: Head | Ratio, first: Start, mask: Array | None
) -> Array:
    """Puts the scores of a teacher of a piece in its slot. That of the logits is free as yet."""
    slot, spare = place.teacher(0), place.student(first, 0)
    if isinstance(teacher, Head):
        matrix = teacher.unembedding

        def one(start: Start, width: int, kept: Array) -> Array:
            return place.write(kept, teacher.read(start, width), slot, start)

        return loop(teacher.vocabulary, columns_at_once(matrix), one, kept)

    heads = teacher.large, teacher.expert, teacher.anti_expert
    vocabulary, columns = teacher.large.vocabulary, columns_at_once(teacher.large.unembedding)
    if teacher.clip is None and teacher.plausible is None:

        def composed(start: Start, width: int, kept: Array) -> Array:
            large, expert, anti_expert = _in_turn(heads, start, width)
            scores = teacher.compose(large, expert - anti_expert, None, None)
            return place.write(kept, scores, slot, start)

        return loop(vocabulary, columns, composed, kept)

    # What clips and what is plausible is known after all columns: until then the parts are kept.
    def parts(start: Start, width: int, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        kept, sums = carry
        logits = _in_turn(heads, start, width)
        kept = place.write(kept, logits[0], spare, start)
        kept = place.write(kept, logits[1] - logits[2], slot, start)
        here = None if mask is None else cut(mask, start, width)
        return kept, [_grown(s, allowed(x, here, -jnp.inf)) for s, x in zip(sums, logits)]

    rows = teacher.large.hidden.shape[0]
    nothing, _ = alike_mapped((jnp.full(rows, -jnp.inf), jnp.zeros(rows)), kept)
    kept, sums = loop(vocabulary, columns, parts, (kept, [nothing] * 3))
    best = sums[0][0]
    expert, anti_expert = (highest + jnp.log(total) for highest, total in sums[1:])

    def compose(start: Start, width: int, kept: Array) -> Array:
        large, ratio = (place.read(kept, at, rows, start, width) for at in (spare, slot))
        scores = teacher.compose(large, ratio, expert - anti_expert, best)
        return place.write(kept, jax.lax.optimization_barrier(scores), slot, start)

    return loop(vocabulary, sizes().turned // rows, compose, kept)


def _in_turn(heads: Sequence[Head], start: Start, width: int) -> list[Array]:
    """Columns of the logits of several models, of whose matrices one block at a time is cut."""
    found: list[Array] = []
    for head in heads:
        logits, start = jax.lax.optimization_barrier(
            (head.read(start, width), jnp.asarray(start, jnp.int32))
        )
        found.append(logits)
    return found


def _grown(sums: tuple[Array, Array], scores: Array) -> tuple[Array, Array]:
    """Highest score of each token and sum of exponentials relative to it, with more columns."""
    highest, total = sums
    new = jnp.maximum(highest, scores.max(-1))
    # Of a token none of whose columns so far is allowed: -inf less -inf is NaN.
    base = jnp.where(new > -jnp.inf, new, 0.0)
    return new, total * jnp.exp(highest - base) + jnp.exp(scores - base[:, None]).sum(-1)


def keep(
    settings: Settings, place: Place, student: Head, teacher: Teacher, rest: Any
) -> tuple[tuple[Array, Array], Array]:
    """Losses and z-losses float32[N], and the gradients of their sums in the logits, in place."""
    columns = columns_at_once(student.unembedding)
    vocabulary, temperature = settings.vocabulary, rest[0]

    def piece(first: Start, tokens: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        kept, values = carry
        here, other = _part(student, first, tokens), _part(teacher, first, tokens)
        if place.holds_teacher and isinstance(other, Head | Ratio):
            kept = _teach(place, kept, other, first, rest[1])

        def multiply(start: Start, width: int, kept: Array) -> Array:
            return place.write(kept, here.read(start, width), place.student(first, 0), start)

        kept = loop(vocabulary, columns, multiply, kept)
        if place.holds_teacher:
            rows = tokens
        elif isinstance(teacher, Targets):  # which have no scores that would take memory
            rows = max(settings.rows, sizes().alone // columns)
        else:
            rows = settings.rows

        def chunk(offset: Start, rows: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            kept, values = carry
            slot = place.student(first, offset)

            def logits(kept: Array, start: Start, width: int) -> Array:
                return place.read(kept, slot, rows, start, width)

            def scores(kept: Array, start: Start, width: int) -> Array:
                return place.read(kept, place.teacher(offset), rows, start, width)

            if place.holds_teacher:
                known: Any = partial(scores, kept)
            else:
                own = _part(other, offset, rows).scores(*rest)
                known = columns_of(settings, own, partial(logits, kept))
            read = partial(logits, kept)
            measured, *found = measure(settings, read, known, rest, summed=sizes().summed)
            # All that is read of the logits comes before the first of them is overwritten, else
            # the compiler copies the place: so what turns them depends on the losses, in a way
            # that no compiler can see through.
            zero = jnp.minimum(jnp.abs(found[0]), 0.0)
            measured = measured._replace(slopes=measured.slopes + zero)

            def turn(start: Start, width: int, kept: Array) -> Array:
                now = measured
                if place.holds_teacher:
                    now = measured._replace(teacher=partial(scores, kept))
                grads = now.grads(settings.terms, logits(kept, start, width), start)
                # The quotient comes last because the CPU's compiler does not compute one twice:
                # each half of it is written where logits are read. Others have barriers.
                grads = jax.lax.optimization_barrier(grads / temperature)
                return place.finish(kept, grads, slot, start)

            kept = loop(vocabulary, sizes().turned // rows, turn, kept)
            at = indices(0, first + offset)
            return kept, jax.lax.dynamic_update_slice(values, jnp.stack(found), at)

        return loop(tokens, rows, chunk, (kept, values))

    zeros = jnp.zeros((2, settings.count), jnp.float32)
    empty, zeros, _ = alike_mapped(place.empty(), zeros, student)
    kept, values = loop(settings.count, place.piece, piece, (empty, zeros))
    return (values[0], values[1]), kept


def grads_of_kept(settings: Settings, student: Head, kept: Array, weights: Array) -> Head:
    """The gradient of the weighted sum of losses; the unembedding's takes the place of `kept`."""
    place = Place(settings.count, student, halves=kept.dtype.itemsize == 2, piece=0)
    # The weights go with the hidden states: fewer products than with the gradients of the logits.
    left = rounded(student.hidden.astype(jnp.float32) * weights[:, None], student.hidden)
    # Transposed once, which makes the product 1.2 times as fast on a CPU.
    left = jax.lax.optimization_barrier(left.T)
    multiply = partial(jnp.einsum, preferred_element_type=jnp.float32)
    on_cpu = jax.default_backend() == "cpu"

    def block(start: Start, width: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        kept, hidden = carry
        grads = rounded(place.graded(kept, start, width), student.hidden)
        columns, letters = student.cut(start, width)
        of_logits = f"n{letters.replace('d', '')}"
        hidden += multiply(f"{of_logits},{letters}->nd", grads, columns.astype(grads.dtype))
        if not on_cpu:  # one after the other, so that less lives at once
            grads, hidden = jax.lax.optimization_barrier((grads, hidden))
        part = multiply(f"dn,{of_logits}->{letters}", left, grads)
        return place.put(kept, part, start), hidden

    zeros = jnp.zeros(student.hidden.shape, jnp.float32)
    zeros, _ = alike_mapped(zeros, kept)
    # Elsewhere half as many as before: a block of the matrix and one of its gradient.
    columns = columns_at_once(student.unembedding) // (1 if on_cpu else 2)
    kept, hidden = loop(settings.vocabulary, columns, block, (kept, zeros))
    hidden = (hidden * weights[:, None]).astype(student.hidden.dtype)
    return Head(hidden, place.gradient(kept), tied=student.tied)
