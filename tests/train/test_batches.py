"""Packing loses and mixes nothing; batches are reproducible and resumable."""

import jax
import numpy as np
import pytest

from egjax.errors import EgjaxError
from egjax.train.data import (
    Pair,
    Sample,
    Shuffled,
    in_order,
    num_rows,
    pack,
    pad_pairs,
    share_prompts,
    split,
)


def random_samples(n=200, longest=17, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Sample(rng.integers(0, 99, k).tolist(), (rng.random(k) < 0.5).tolist(), float(rng.random()))
        for k in rng.integers(2, longest + 1, n)
    ]


def _rows(table, index):
    return jax.tree.map(lambda x: x[index], table)


def segments(table):
    """The samples back out of a table."""
    out = []
    for row in range(num_rows(table)):
        ids = table.segment_ids[row]
        for segment in range(1, ids.max() + 1):
            at = ids == segment
            np.testing.assert_array_equal(table.positions[row, at], np.arange(at.sum()))
            tokens = [int(table.tokens[row, at][0]), *table.targets[row, at].tolist()]
            assert tokens[:-1] == table.tokens[row, at].tolist()
            (weight,) = set(table.weights[row, at].tolist())
            out.append((tuple(tokens), tuple(table.mask[row, at].tolist()), weight))
    return out


def test_packing_and_unpacking_is_a_round_trip():
    samples = random_samples()
    table = pack(samples, 16)
    want = [(tuple(s.tokens), tuple(s.mask[1:]), float(np.float32(s.weight))) for s in samples]
    assert sorted(segments(table)) == sorted(want)
    padding = table.segment_ids == 0
    assert not table.mask[padding].any()
    assert padding.mean() < 0.1


def test_packing_is_first_fit():
    samples = [Sample(range(n + 1), [True] * (n + 1)) for n in (5, 6, 3, 2)]
    table = pack(samples, 8)
    np.testing.assert_array_equal(
        table.segment_ids, [[1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 1, 2, 2]]
    )


def test_many_open_rows_stay_correct():
    samples = random_samples(400, longest=13, seed=1) + random_samples(50, longest=3, seed=2)
    table = pack(samples, 12)
    assert len(segments(table)) == 450
    assert table.segment_ids.shape[1] == 12


@pytest.mark.parametrize("length", [3, 7, 100])
def test_split_keeps_every_target_once(length):
    text = Sample(list(range(50)), [True] * 50, 0.5)
    pieces = split([text], length)
    assert [t for p in pieces for t in p.tokens[1:]] == list(range(1, 50))
    assert all(2 <= len(p.tokens) <= length + 1 and len(p.mask) == len(p.tokens) for p in pieces)


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([], "no text"),
        ([Sample([1, 2], [True, True]), Sample(range(20), [True] * 20)], "sample 1: 20 tokens"),
        ([Sample([1], [True])], "sample 0: 1 tokens"),
        ([Sample([1, 2, 3], [True])], "a mask of 1"),
    ],
)
def test_bad_samples_are_told(samples, said):
    with pytest.raises(EgjaxError, match=said):
        pack(samples, 8)


def test_pairs_count_the_completion_alone():
    batch = pad_pairs([Pair([1, 2, 3], [4, 5], [6]), Pair([7], [8], [9, 10, 11])], 6)
    np.testing.assert_array_equal(batch.chosen.tokens[0], [1, 2, 3, 4, 0, 0])
    np.testing.assert_array_equal(batch.chosen.targets[0][batch.chosen.mask[0]], [4, 5])
    np.testing.assert_array_equal(batch.rejected.targets[1][batch.rejected.mask[1]], [9, 10, 11])
    np.testing.assert_array_equal(batch.rejected.segment_ids.sum(1), [3, 3])
    assert batch.mask.all()
    with pytest.raises(EgjaxError, match="sample 1"):
        pad_pairs([Pair([1], [2], [3]), Pair([7] * 9, [8], [9])], 6)
    with pytest.raises(EgjaxError, match="no preference pair"):
        pad_pairs([], 6)


def test_every_epoch_has_every_row_once_in_another_order():
    rows = np.arange(10)
    it = Shuffled({"x": rows}, 4, seed=3)
    seen = np.concatenate([next(it)["x"] for _ in range(5)])
    np.testing.assert_array_equal(np.sort(seen[:10]), rows)
    np.testing.assert_array_equal(np.sort(seen[10:]), rows)
    assert seen[:10].tolist() != seen[10:].tolist()
    other = Shuffled({"x": rows}, 4, seed=4)
    assert np.concatenate([next(other)["x"] for _ in range(5)]).tolist() != seen.tolist()


def test_batches_larger_than_the_table():
    batch = next(Shuffled(np.arange(3), 8, seed=0))
    np.testing.assert_array_equal(np.bincount(batch), np.bincount(batch, minlength=3))
    assert sorted(np.bincount(batch).tolist()) == [2, 3, 3]


@pytest.mark.parametrize("done", [0, 1, 3, 7])
def test_batches_resume_where_they_were(done):
    table = pack(random_samples(), 16)
    it = Shuffled(table, 8, seed=0)
    for _ in range(done):
        next(it)
    state = it.get_state()
    want = [next(it) for _ in range(6)]
    fresh = Shuffled(table, 8, seed=0)
    fresh.set_state(state)
    for batch in want:
        jax.tree.map(np.testing.assert_array_equal, next(fresh), batch)


def test_a_long_pair_pads_its_like_and_not_all():
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(1, 20, (250, 3)), (400, 90, 80)]
    table = share_prompts([Pair(*(rng.integers(1, 9, n) for n in one)) for one in lengths])
    it = Shuffled(table, 8, seed=1)
    batches = [next(it) for _ in range(64)]  # two epochs, whose border is within a batch
    shapes = [(one.tokens.shape[1], one.targets.shape[2]) for one in batches]
    assert len(set(shapes)) <= 4
    assert shapes[0] == (table.tokens.shape[1], table.targets.shape[2])
    assert shapes.count(shapes[0]) <= 4  # the first one, and those of the long pair
    real = sum((one.segment_ids > 0).sum() for one in batches)
    share = (table.segment_ids > 0).mean()
    assert real / sum(one.segment_ids.size for one in batches) > 6 * share

    def padded(x, like):
        return np.pad(x, [(0, b - a) for a, b in zip(x.shape, like[:8].shape, strict=True)])

    batches = [jax.tree.map(padded, one, table) for one in batches]
    rows = jax.tree.map(lambda *parts: np.concatenate(parts), *batches)
    for epoch in range(2):  # every row once, and nothing of it is gone
        part = slice(251 * epoch, 251 * (epoch + 1))
        got, want = (np.lexsort(x.tokens.T) for x in (_rows(rows, part), table))
        jax.tree.map(
            np.testing.assert_array_equal, _rows(_rows(rows, part), got), _rows(table, want)
        )
    again, want = Shuffled(table, 8, seed=1), next(it)
    again.set_state({"batches": 64})
    jax.tree.map(np.testing.assert_array_equal, next(again), want)


def test_pairs_of_equal_lengths_come_in_the_order_of_other_tables():
    table = share_prompts([Pair([i + 1] * 9, [1], [2]) for i in range(20)])
    it, plain = Shuffled(table, 4, seed=1), Shuffled(table.tokens, 4, seed=1)
    for _ in range(7):
        np.testing.assert_array_equal(next(it).tokens, next(plain))


def test_in_order_pads_the_last_batch_with_masked_rows():
    table = pack(random_samples(30), 16)
    rows = num_rows(table)
    got = list(in_order(table, rows - 1))
    assert [num_rows(b) for b in got] == [rows - 1, rows - 1]
    np.testing.assert_array_equal(got[0].tokens, table.tokens[:-1])
    np.testing.assert_array_equal(got[1].tokens[0], table.tokens[-1])
    assert not got[1].mask[1:].any()
