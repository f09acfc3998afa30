"""From lists of tokens to batches of fixed shape, shuffled and resumable.

A table is a pytree of numpy arrays with one leading axis of rows (`TokenBatch`, `PairBatch`).
`pack`, `pad_pairs` and `share_prompts` build one, `Shuffled` and `in_order` read it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import struct
from jax.sharding import NamedSharding

from egjax.errors import EgjaxError
from egjax.mesh import batch_of, local_rows

__all__ = [
    "Pair",
    "PairBatch",
    "Sample",
    "SharedPairBatch",
    "Shuffled",
    "TokenBatch",
    "in_order",
    "num_rows",
    "pack",
    "pad_pairs",
    "share_prompts",
    "split",
]

Array = Any  # numpy on the host, jax.Array inside a step

# Bins that stay open while packing. More than this wins less than 1 % of padding and is slower.
_OPEN_BINS = 64
# Lengths of rows of pairs are rounded up to one of these.
_MULTIPLE = 16
# Batches of pairs that are sorted by length together.
_TOGETHER = 32


class Sample(NamedTuple):
    """A text to learn from.

    Attributes:
        tokens: int[n], n ≥ 2.
        mask: bool[n], True for the tokens to be predicted; the first one cannot be.
        weight: α_v of its task.
    """

    tokens: Sequence[int]
    mask: Sequence[bool]
    weight: float = 1.0


class Pair(NamedTuple):
    """A preference: one prompt, a chosen and a rejected completion, each int[n]."""

    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]


@struct.dataclass
class TokenBatch:
    """Rows of tokens with what each position predicts; shapes [B, T].

    Attributes:
        tokens: int32, inputs.
        targets: int32, the token that follows in the same segment.
        mask: bool, True where the target counts.
        weights: float32, α_v of the segment's task.
        positions: int32, from 0 in each segment.
        segment_ids: int32, from 1 in each row; 0 is padding.
    """

    tokens: Array
    targets: Array
    mask: Array
    weights: Array
    positions: Array
    segment_ids: Array


@struct.dataclass
class PairBatch:
    """Preference pairs; leading axis B.

    Attributes:
        chosen: prompt and chosen completion, the completion unmasked.
        rejected: the same for the rejected one.
        ref_chosen: float32[B], log-probability of the chosen completion under the reference; 0
            until computed.
        ref_rejected: float32[B], of the rejected one.
        mask: bool[B], True for a real pair.
    """

    chosen: TokenBatch
    rejected: TokenBatch
    ref_chosen: Array
    ref_rejected: Array
    mask: Array


@struct.dataclass
class SharedPairBatch:
    """Preference pairs whose prompt stands, and is computed, once; leading axis B.

    Rows of T tokens hold prompt, chosen and rejected, one after the other. Both completions see the
    prompt and themselves; the last token of each is only ever a target.

    Attributes:
        tokens: int32[B, T], inputs.
        positions: int32[B, T], from 0 in the prompt; both completions go on from its end.
        segment_ids: int32[B, T], 1 prompt, 2 chosen, 3 rejected, 0 padding.
        prefix_ids: int32[B, T], 1 in both completions: what they see beside themselves; else 0.
        sources: int32[B, 2, C], where in the row each token of chosen, rejected is predicted.
        targets: int32[B, 2, C], those tokens.
        target_mask: bool[B, 2, C], True for a real one.
        ref_chosen, ref_rejected, mask: see `PairBatch`.
    """

    tokens: Array
    positions: Array
    segment_ids: Array
    prefix_ids: Array
    sources: Array
    targets: Array
    target_mask: Array
    ref_chosen: Array
    ref_rejected: Array
    mask: Array


def _empty(rows: int, length: int) -> TokenBatch:
    def zeros(dtype: type) -> np.ndarray:
        return np.zeros((rows, length), dtype)

    return TokenBatch(
        tokens=zeros(np.int32),
        targets=zeros(np.int32),
        mask=zeros(np.bool_),
        weights=zeros(np.float32),
        positions=zeros(np.int32),
        segment_ids=zeros(np.int32),
    )


def _place(table: TokenBatch, row: int, start: int, segment: int, sample: Sample) -> None:
    tokens = np.asarray(sample.tokens, np.int32)
    span = slice(start, start + len(tokens) - 1)
    table.tokens[row, span] = tokens[:-1]
    table.targets[row, span] = tokens[1:]
    table.mask[row, span] = np.asarray(sample.mask, np.bool_)[1:]
    table.weights[row, span] = sample.weight
    table.positions[row, span] = np.arange(len(tokens) - 1)
    table.segment_ids[row, span] = segment


def _slots(sample: Sample, length: int, index: int) -> int:
    """Positions that a sample takes: its last token is only ever a target."""
    slots = len(sample.tokens) - 1
    if len(sample.mask) != len(sample.tokens):
        raise EgjaxError(
            f"{len(sample.tokens)} tokens but a mask of {len(sample.mask)}",
            where=f"sample {index}",
        )
    if not 1 <= slots <= length:
        raise EgjaxError(
            f"{slots + 1} tokens do not fit in rows of {length} (2 to {length + 1} do)",
            where=f"sample {index}",
            remedy="raise the sequence length, or shorten or split the text",
        )
    return slots


def split(samples: Sequence[Sample], length: int) -> list[Sample]:
    """Cuts long samples into pieces that fit rows of `length`; every target is kept once.

    For running text. A completion that is cut loses its prompt.
    """
    return [
        Sample(s.tokens[start : start + length + 1], s.mask[start : start + length + 1], s.weight)
        for s in samples
        for start in range(0, len(s.tokens) - 1, length)
    ]


def pack(samples: Sequence[Sample], length: int) -> TokenBatch:
    """Packs samples into rows, each into the first open row with room (first fit).

    Args:
        samples: in any order; equal lists give equal tables.
        length: T, positions a row.

    Returns:
        A table of as many rows as it takes, numpy arrays.

    Raises:
        EgjaxError: no samples, a sample that does not fit, or a mask of another length.
    """
    if not samples:
        raise EgjaxError("there is no text to train on", remedy="give at least one sample")
    open_rows: list[list[int]] = []  # [row, positions taken, segments]
    places, rows = [], 0
    for index, sample in enumerate(samples):
        slots = _slots(sample, length, index)
        fit = next((bin for bin in open_rows if bin[1] + slots <= length), None)
        if fit is None:
            fit = [rows, 0, 0]
            rows += 1
            open_rows.append(fit)
            if len(open_rows) > _OPEN_BINS:
                open_rows.remove(max(open_rows[:-1], key=lambda bin: bin[1]))
        fit[2] += 1
        places.append((fit[0], fit[1], fit[2], sample))
        fit[1] += slots
    table = _empty(rows, length)
    for place in places:
        _place(table, *place)
    return table


def pad_pairs(pairs: Sequence[Pair], length: int) -> PairBatch:
    """One row per completion, padded on the right to `length`.

    Raises:
        EgjaxError: no pairs, or a pair that does not fit.
    """
    if not pairs:
        raise EgjaxError("there is no preference pair to train on")
    chosen, rejected = _empty(len(pairs), length), _empty(len(pairs), length)
    for row, pair in enumerate(pairs):
        for table, completion in ((chosen, pair.chosen), (rejected, pair.rejected)):
            tokens = [*pair.prompt, *completion]
            mask = [False] * len(pair.prompt) + [True] * len(completion)
            sample = Sample(tokens, mask)
            _slots(sample, length, row)
            _place(table, row, 0, 1, sample)
    zeros = np.zeros(len(pairs), np.float32)
    return PairBatch(chosen, rejected, zeros, zeros.copy(), np.ones(len(pairs), np.bool_))


def share_prompts(pairs: Sequence[Pair], *, multiple: int = _MULTIPLE) -> SharedPairBatch:
    """One row per pair, as long as the longest needs.

    Args:
        pairs: prompt and completions of at least one token each.
        multiple: T and C are rounded up to one of these.

    Raises:
        EgjaxError: no pairs, or an empty prompt or completion.
    """
    if not pairs:
        raise EgjaxError("there is no preference pair to train on")
    for index, pair in enumerate(pairs):
        if not (len(pair.prompt) and len(pair.chosen) and len(pair.rejected)):
            raise EgjaxError("prompt or completion has no token", where=f"sample {index}")

    def room(longest: int) -> int:
        return -(-longest // multiple) * multiple

    length = room(max(len(p.prompt) + len(p.chosen) + len(p.rejected) - 2 for p in pairs))
    longest = room(max(max(len(p.chosen), len(p.rejected)) for p in pairs))
    rows = np.zeros((4, len(pairs), length), np.int32)
    tokens, positions, segments, prefixes = rows
    sources, targets = np.zeros((2, len(pairs), 2, longest), np.int32)
    target_mask = np.zeros((len(pairs), 2, longest), np.bool_)
    for row, pair in enumerate(pairs):
        asked = len(pair.prompt)
        start = 0
        for segment, part in ((1, pair.prompt), (2, pair.chosen[:-1]), (3, pair.rejected[:-1])):
            span = slice(start, start + len(part))
            tokens[row, span] = part
            segments[row, span] = segment
            positions[row, span] = np.arange(len(part)) + (asked if segment > 1 else 0)
            prefixes[row, span] = segment > 1
            start += len(part)
        start = asked
        for side, completion in enumerate((pair.chosen, pair.rejected)):
            count = len(completion)
            sources[row, side, :count] = [asked - 1, *range(start, start + count - 1)]
            targets[row, side, :count] = completion
            target_mask[row, side, :count] = True
            start += count - 1
    zeros = np.zeros(len(pairs), np.float32)
    return SharedPairBatch(
        tokens=tokens,
        positions=positions,
        segment_ids=segments,
        prefix_ids=prefixes,
        sources=sources,
        targets=targets,
        target_mask=target_mask,
        ref_chosen=zeros,
        ref_rejected=zeros.copy(),
        mask=np.ones(len(pairs), np.bool_),
    )


def num_rows(table: Any) -> int:
    """Length of the leading axis that all arrays of a table share."""
    return jax.tree.leaves(table)[0].shape[0]


def _rows(table: Any, index: Any) -> Any:
    return jax.tree.map(lambda x: x[index], table)


def _needs(table: SharedPairBatch) -> np.ndarray:
    """int[n, 2]: of each row the positions taken, and the tokens of its longer completion."""
    return np.stack([(table.segment_ids > 0).sum(1), table.target_mask.any(1).sum(1)], axis=1)


def _shapes(
    table: SharedPairBatch, needs: np.ndarray, order: np.ndarray, batch_size: int
) -> np.ndarray:
    """int[k ≤ 4, 2]: shapes (T, C) for batches of the order of an epoch, ascending; the last one is
    the table's."""
    whole = np.array([table.tokens.shape[1], table.targets.shape[2]])
    starts = range(0, len(order), batch_size)
    longest = np.stack([needs[order[start : start + batch_size]].max(0) for start in starts])
    some = np.quantile(longest, (0.3, 0.6, 0.9), axis=0, method="higher")
    kept = [whole]
    for shape in np.minimum(-(-some // _MULTIPLE) * _MULTIPLE, whole)[::-1]:
        if shape.sum() <= 0.75 * kept[0].sum():  # each costs a compilation
            kept.insert(0, shape)
    return np.stack(kept)


def _grouped(
    order: np.ndarray, sizes: np.ndarray, batch_size: int, rng: np.random.Generator
) -> np.ndarray:
    """An order of rows in which those of a batch are alike in size, and batches are shuffled."""
    parts = []
    for start in range(0, len(order), _TOGETHER * batch_size):
        part = order[start : start + _TOGETHER * batch_size]
        part = part[np.argsort(sizes[part], kind="stable")]
        whole = len(part) // batch_size * batch_size
        batches = rng.permutation(part[:whole].reshape(-1, batch_size))
        parts += [batches.reshape(-1), part[whole:]]
    return np.concatenate(parts)


def _cut(batch: SharedPairBatch, length: int, longest: int) -> SharedPairBatch:
    """A batch without the padding beyond T and C."""
    rows = ("tokens", "positions", "segment_ids", "prefix_ids")
    sides = ("sources", "targets", "target_mask")
    return dataclasses.replace(
        batch,
        **{name: getattr(batch, name)[:, :length] for name in rows},
        **{name: getattr(batch, name)[:, :, :longest] for name in sides},
    )


class Shuffled:
    """Endless batches, every epoch in a new order that the seed determines.

    Batch n is a function of table, size, seed and n alone, so the state is one number. (Grain's
    loader gives the same, row by row; on tables in memory it took eight times as long.)

    Pairs (`SharedPairBatch`) whose lengths differ are sorted by length within 32 batches at a time,
    which come in a random order again, and batches are cut to one of up to four shapes: a long pair
    pads its like and not all. The first batch has the largest shape: where memory does not suffice
    it shows at once.

    Args:
        table: pytree of numpy arrays with one leading axis.
        batch_size: B; a batch may reach into the next epoch, so that none is short.
        seed: of the orders.
        sharding: of a batch on a mesh; each process then reads the rows of its own devices, and
            batches are global arrays. None gives numpy arrays.
    """

    def __init__(
        self, table: Any, batch_size: int, seed: int, sharding: NamedSharding | None = None
    ):
        self._table, self._batch_size, self._seed = table, batch_size, seed
        self._sharding = sharding
        self._mine = slice(None) if sharding is None else local_rows(sharding, batch_size)
        self._done = 0
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        self._needs = self._shapes = np.zeros((0, 2), np.int64)
        if isinstance(table, SharedPairBatch):
            self._needs = _needs(table)
            self._shapes = _shapes(table, self._needs, self._permutation(0), batch_size)
            if len(self._shapes) == 1:  # nothing to gain: the order is that of other tables
                self._needs = self._needs[:0]
            self._order = (-1, self._order[1])

    def __iter__(self) -> Shuffled:
        return self

    def __next__(self) -> Any:
        first = self._done * self._batch_size
        epochs, within = np.divmod(
            np.arange(first, first + self._batch_size), num_rows(self._table)
        )
        index = np.concatenate(
            [self._permutation(int(e))[within[epochs == e]] for e in np.unique(epochs)]
        )
        local = _rows(self._table, index[self._mine])
        if len(self._needs):
            fits = (self._shapes >= self._needs[index].max(0)).all(1)
            local = _cut(local, *self._shapes[int(fits.argmax()) if self._done else -1])
        self._done += 1
        if self._sharding is None:
            return local
        return batch_of(local, self._sharding, self._batch_size)

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            rng = np.random.default_rng((self._seed, epoch))
            order = rng.permutation(num_rows(self._table))
            if len(self._needs):
                first = (
                    -epoch * len(order) % self._batch_size
                )  # rows of the last epoch's last batch
                rest = _grouped(order[first:], self._needs.sum(1), self._batch_size, rng)
                order = np.concatenate([order[:first], rest])
            self._order = (epoch, order)
        return self._order[1]

    def get_state(self) -> dict[str, int]:
        """What `set_state` needs to go on from here; JSON can hold it."""
        return {"batches": self._done}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to where `get_state` was called."""
        self._done = state["batches"]


def in_order(table: Any, batch_size: int) -> Iterator[Any]:
    """Every row once, in order; the last batch is filled up with zeros, whose masks are False."""
    for start in range(0, num_rows(table), batch_size):
        part = _rows(table, slice(start, start + batch_size))
        short = batch_size - num_rows(part)
        yield jax.tree.map(lambda x, n=short: np.pad(x, [(0, n)] + [(0, 0)] * (x.ndim - 1)), part)
