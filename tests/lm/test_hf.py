import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from egjax.errors import EgjaxError
from egjax.lm import hf
from egjax.lm.model import forward


@pytest.fixture
def folder(config, params, tmp_path):
    hf.save(tmp_path, config, params)
    return tmp_path


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": True}, {"attention_bias": False}, {"dtype": "bfloat16"}]
)
def test_round_trip(config, make_params, tmp_path, changes):
    config = dataclasses.replace(config, **changes)
    params = make_params(config)
    hf.save(tmp_path, config, params)
    loaded_config, loaded = hf.load(tmp_path)
    assert loaded_config == config
    same(loaded, params)
    stored = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in stored) != config.tie_embeddings
    assert stored["model.layers.1.mlp.down_proj.weight"].shape == (24, 32)


def test_sharded_files_are_read_through_their_index(folder, params):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    same(hf.load(folder)[1], params)
    (folder / "b.safetensors").unlink()
    with pytest.raises(EgjaxError, match=r"b\.safetensors: file is missing"):
        hf.load(folder)


def test_a_padded_vocabulary_is_cut(folder, config, params, tokens):
    cut_config, cut = hf.load(folder, vocab_size=37)
    assert cut_config.vocab_size == 37
    logits = forward(cut, cut_config, tokens % 37)
    np.testing.assert_allclose(logits, forward(params, config, tokens % 37)[..., :37], atol=1e-5)
    with pytest.raises(EgjaxError, match="40 tokens, 41 are wanted"):
        hf.load(folder, vocab_size=41)


def test_dtype_may_be_chosen(folder):
    config, params = hf.load(folder, dtype="bfloat16")
    assert config.dtype == "bfloat16"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}


def test_missing_and_broken_files_are_named(folder):
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.2.self_attn.k_proj.weight"
    save_file({**tensors, name: tensors[name].T.copy()}, weights)
    with pytest.raises(EgjaxError, match=rf"{name} has shape \[24, 16\], expected \[16, 24\]"):
        hf.load(folder)
    save_file({k: v for k, v in tensors.items() if k != name}, weights)
    with pytest.raises(EgjaxError, match=f"{name} is missing"):
        hf.load(folder)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(EgjaxError, match=r"model\.safetensors: cannot be read"):
        hf.load(folder)
    weights.unlink()
    with pytest.raises(EgjaxError, match=r"model\.safetensors: file is missing"):
        hf.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(EgjaxError, match=r"config\.json: not JSON"):
        hf.load(folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(EgjaxError, match="'bert' is not supported"):
        hf.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(EgjaxError, match=r"config\.json: file is missing"):
        hf.load(folder)


def test_a_failed_save_leaves_the_old_files(folder, config, params, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(EgjaxError, match="No space left"):
        hf.save(folder, config, jax.tree.map(lambda x: x + 1, params))
    assert (folder / "model.safetensors").read_bytes() == before
    assert not list(folder.glob("*.part"))
