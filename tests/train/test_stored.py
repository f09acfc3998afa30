"""Stored quantities come back as they were, only for what they were made from, and serve losses."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from train_toy import apply, init

from egjax import losses
from egjax.errors import EgjaxError
from egjax.losses import Head, Ratio, TopK
from egjax.mesh import batch_sharding, make_mesh
from egjax.train import stored
from egjax.train.data import Pair, pad_pairs
from egjax.train.objectives import reference_logps
from egjax.train.stored import Fingerprint

MADE_FROM = Fingerprint(model="m" * 64, tokenizer="t", data="d", settings="k=3")
ROWS = 5


def batches(size=2):
    rng = np.random.default_rng(0)
    whole = {
        "top": rng.normal(size=(ROWS, 4, 3)).astype(np.float32),
        "hidden": jnp.asarray(rng.normal(size=(ROWS, 6)), jnp.bfloat16),
        "ids": rng.integers(0, 9, (ROWS, 4, 3), dtype=np.int32),
    }
    parts = [
        {name: array[i : i + size] for name, array in whole.items()} for i in range(0, ROWS, size)
    ]
    return whole, parts


def test_round_trip_is_exact_for_every_type(tmp_path):
    whole, parts = batches()
    stored.save(tmp_path / "s", parts, ROWS, MADE_FROM)
    found = stored.load(tmp_path / "s", MADE_FROM)
    assert found.keys() == whole.keys()
    for name, array in whole.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
        assert not found[name].flags.writeable
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("field", ["model", "tokenizer", "data", "settings"])
def test_anything_made_from_something_else_is_refused(tmp_path, field):
    stored.save(tmp_path / "s", batches()[1], ROWS, MADE_FROM)
    other = dataclasses.replace(MADE_FROM, **{field: "other"})
    with pytest.raises(EgjaxError, match=f"stored for another {field}"):
        stored.load(tmp_path / "s", other)
    with pytest.raises(EgjaxError, match=f"stored for another {field}"):
        stored.cached(tmp_path / "s", lambda: pytest.fail("computed"), ROWS, other)


def test_it_is_computed_once(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return batches()[1]

    for _ in range(2):
        found = stored.cached(tmp_path / "s", make, ROWS, MADE_FROM)
    assert len(calls) == 1
    np.testing.assert_array_equal(found["top"], batches()[0]["top"])


def test_it_is_computed_once_for_a_bucket(bucket):
    for make in (lambda: batches()[1], lambda: pytest.fail("computed again")):
        found = stored.cached(bucket / "s", make, ROWS, MADE_FROM)
        np.testing.assert_array_equal(found["top"], batches()[0]["top"])
    with pytest.raises(EgjaxError, match="stored for another data"):
        stored.cached(bucket / "s", list, ROWS, dataclasses.replace(MADE_FROM, data="other"))


def test_a_folder_of_somebody_elses_is_left_as_it_is(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(EgjaxError, match="nothing is stored there"):
        stored.cached(tmp_path / "mine", lambda: batches()[1], ROWS, MADE_FROM)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_an_interrupted_or_wrong_write_leaves_what_was_there(tmp_path):
    whole, parts = batches()
    stored.save(tmp_path / "s", parts, ROWS, MADE_FROM)

    def stops():
        yield parts[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stored.save(tmp_path / "s", stops(), ROWS, MADE_FROM)
    for wrong in (parts[:2], [*parts, parts[0]]):
        with pytest.raises(EgjaxError, match="rows were computed for a table of 5"):
            stored.save(tmp_path / "s", wrong, ROWS, MADE_FROM)
    np.testing.assert_array_equal(stored.load(tmp_path / "s", MADE_FROM)["top"], whole["top"])
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("harm", ["absent", "cut", "gone", "note", "pickle", "short"])
def test_damage_is_told_in_one_line_and_no_pickle_is_read(tmp_path, harm):
    folder = tmp_path / "s"
    if harm != "absent":
        stored.save(folder, batches()[1], ROWS, MADE_FROM)
    if harm == "cut":
        data = (folder / "top.npy").read_bytes()
        (folder / "top.npy").write_bytes(data[: len(data) // 2])
    if harm == "gone":
        (folder / "top.npy").unlink()
    if harm == "note":
        (folder / "stored.json").write_text("{")
    if harm == "pickle":
        np.save(folder / "top.npy", np.array([{}] * ROWS, object), allow_pickle=True)
    if harm == "short":
        np.save(folder / "top.npy", np.zeros((2, 3)))
    with pytest.raises(EgjaxError, match=r"nothing is stored|cannot be read"):
        stored.load(folder, MADE_FROM)


def test_fingerprint_sees_names_types_shapes_and_contents():
    tree = {"a": jnp.arange(6.0), "b": jnp.ones((2, 2), jnp.bfloat16)}
    same = {"a": np.arange(6, dtype=np.float32), "b": jnp.ones((2, 2), jnp.bfloat16)}
    assert stored.fingerprint(tree) == stored.fingerprint(same)
    others = [
        {**tree, "a": tree["a"].at[3].set(9)},
        {**tree, "a": tree["a"].reshape(2, 3)},
        {**tree, "a": tree["a"].astype(jnp.int32)},
        {"a": tree["a"], "c": tree["b"]},
    ]
    assert len({stored.fingerprint(t) for t in [tree, *others]}) == 5


def test_reference_logps_of_a_table(tmp_path):
    pairs = [Pair([1, 2], [3 + i], [5, i]) for i in range(ROWS)]
    table, params = pad_pairs(pairs, 6), init(0)
    fill = reference_logps(apply)

    def fn(params, batch):
        filled = fill(params, batch)
        return {"ref_chosen": filled.ref_chosen, "ref_rejected": filled.ref_rejected}

    made_from = Fingerprint(stored.fingerprint(params), "toy", stored.fingerprint(table))
    found = stored.cached(
        tmp_path / "ref", lambda: stored.compute(fn, params, table, 2), ROWS, made_from
    )
    want = fill(params, table)
    np.testing.assert_allclose(found["ref_chosen"], want.ref_chosen, rtol=1e-5)
    np.testing.assert_allclose(found["ref_rejected"], want.ref_rejected, rtol=1e-5)
    assert stored.load(tmp_path / "ref", made_from).keys() == found.keys()
    mesh = make_mesh(devices=jax.devices()[:1])
    placed = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    parts = list(stored.compute(fn, placed, table, 2, batch_sharding(mesh)))
    assert [len(part["ref_chosen"]) for part in parts] == [2, 2, 1]
    whole = np.concatenate([part["ref_chosen"] for part in parts])
    np.testing.assert_allclose(whole, found["ref_chosen"], rtol=1e-6)


def test_stored_teachers_serve_chunked_losses(tmp_path):
    keys = jax.random.split(jax.random.key(0), 8)
    heads = [
        Head(jax.random.normal(a, (ROWS, 4, 6)), jax.random.normal(b, (6, 30)))
        for a, b in zip(keys[:4], keys[4:])
    ]
    student, teacher = heads[0], Ratio(heads[1], heads[2], heads[3], plausible=0.01)
    mask, weights = jnp.arange(30) < 27, jnp.ones((ROWS, 4))
    exact = losses.chunked_loss(student, teacher, weights, vocab_mask=mask, temperature=1.5)[0]

    def load(k):
        top = losses.chunked_top_k(teacher, k, temperature=1.5, vocab_mask=mask, tokens=3)
        made_from = dataclasses.replace(MADE_FROM, settings=f"top {k}, temperature 1.5")
        arrays = {"ids": top.ids, "top": top.top, "tail": top.tail}
        stored.save(tmp_path / str(k), [arrays], ROWS, made_from)
        return TopK(**jax.tree.map(jnp.asarray, stored.load(tmp_path / str(k), made_from)))

    def loss(teacher):
        return losses.chunked_loss(
            student, teacher, weights, vocab_mask=mask, temperature=1.5, tokens=7
        )[0]

    few, more = loss(load(4)), loss(load(12))
    assert few < more <= exact + 1e-4
    masses = jnp.exp(load(4).top).sum(-1) + jnp.exp(load(4).tail)
    np.testing.assert_allclose(masses, 1.0, rtol=1e-5)

    # Hidden states on disk are a teacher as exact as the model they come from.
    stored.save(tmp_path / "h", [{"hidden": heads[1].hidden}], ROWS, MADE_FROM)
    hidden = jnp.asarray(stored.load(tmp_path / "h", MADE_FROM)["hidden"])
    np.testing.assert_allclose(loss(Head(hidden, heads[1].unembedding)), loss(heads[1]), rtol=1e-6)
    assert json.loads((tmp_path / "h" / "stored.json").read_text())["rows"] == ROWS
