import dataclasses
import json
import tracemalloc
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from egjax.errors import EgjaxError
from egjax.lm import hf, int8, lora
from egjax.lm.model import forward
from egjax.lm.params import abstract, count, unstacked


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


def test_each_tensor_is_read_from_the_file_that_the_index_names(folder, params):
    tensors = load_file(folder / "model.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"] + 1}, folder / "b.safetensors")
    # Another file holds it, too, and comes later.
    weights = {**dict.fromkeys(tensors, "a.safetensors"), "more": "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    # As in transformers a single file goes before an index.
    save_file(tensors, folder / "model.safetensors")
    norm = {"model.norm.weight": tensors["model.norm.weight"] + 2}
    save_file({**tensors, **norm}, folder / "a.safetensors")
    same(hf.load(folder)[1], params)
    (folder / "model.safetensors").unlink()
    found = hf.load(folder)[1]
    np.testing.assert_array_equal(found["final_norm"], params["final_norm"] + 2)


def test_tensors_that_the_configuration_does_not_account_for_are_refused(
    config, make_params, tmp_path
):
    config = dataclasses.replace(config, attention_bias=False, tie_embeddings=True)
    params = make_params(config)
    hf.save(tmp_path, config, params)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.{}.self_attn.{}"
    others = {
        name.format(1, "q_proj.bias"): np.ones(32, np.float32),
        name.format(0, "q_norm.weight"): np.ones(8, np.float32),
        name.format(3, "k_proj.weight"): np.ones((16, 24), np.float32),
    }
    for other, value in others.items():
        save_file({**tensors, other: value}, weights)
        with pytest.raises(EgjaxError, match=f"tensor {other} is not of the model"):
            hf.load(tmp_path)
    save_file({**tensors, **others}, weights)
    with pytest.raises(EgjaxError, match=r"q_norm\.weight and 2 more is not"):
        hf.load(tmp_path)
    embedding = tensors["model.embed_tokens.weight"]
    wavelengths = {name.format(0, "rotary_emb.inv_freq"): np.ones(4, np.float32)}
    save_file({**tensors, **wavelengths, "lm_head.weight": embedding}, weights)
    same(hf.load(tmp_path)[1], params)
    same(hf.load(tmp_path, vocab_size=37)[1]["embedding"], params["embedding"][:37])
    embedding = embedding.copy()
    embedding[39, 5] += 1
    save_file({**tensors, "lm_head.weight": embedding}, weights)
    with pytest.raises(EgjaxError, match=r"lm_head\.weight is not the embedding"):
        hf.load(tmp_path)


def test_large_models_become_several_files(config, params, tmp_path):
    hf.save(tmp_path, config, params)
    hf.save(tmp_path, config, params, shard_bytes=20_000)
    names = sorted(path.name for path in tmp_path.iterdir())
    count = len(names) - 2
    assert count > 2
    assert names[:2] == ["config.json", f"model-00001-of-{count:05d}.safetensors"]
    assert names[-1] == "model.safetensors.index.json"  # the single file of before is gone
    index = json.loads((tmp_path / names[-1]).read_text())
    sizes = {name: 0 for name in names[1:-1]}
    for name in sizes:
        for key, value in load_file(tmp_path / name).items():
            assert index["weight_map"][key] == name
            sizes[name] += value.nbytes
    assert max(sizes.values()) <= 20_000
    assert index["metadata"]["total_size"] == sum(sizes.values())
    same(hf.load(tmp_path)[1], params)
    hf.save(tmp_path, config, params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_round_trip_in_bfloat16_keeps_every_bit(config, make_params, tmp_path):
    config = dataclasses.replace(config, dtype="bfloat16")
    params = make_params(config)
    params["embedding"] = params["embedding"].at[0, 0].set(-0.0)
    hf.save(tmp_path / "a", config, params, shard_bytes=10_000)
    _, loaded = hf.load(tmp_path / "a")
    bits = lambda tree: jax.tree.map(lambda x: np.asarray(x).view(np.uint16), tree)  # noqa: E731
    same(bits(loaded), bits(params))
    hf.save(tmp_path / "b", config, loaded, shard_bytes=10_000)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_host_never_holds_more_than_one_matrix_of_a_layer(config, tmp_path):
    """Python's allocations, in which JAX's own arrays (what stays) do not count."""
    config = dataclasses.replace(
        config, hidden_size=256, intermediate_size=768, num_layers=6, vocab_size=1024
    )
    params = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), abstract(config))
    largest = 256 * 1024 * 4
    total = 4 * count(config)
    assert total > 15 * largest

    def peak(function):
        tracemalloc.start()
        try:
            function()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    hf.save(tmp_path, config, params, shard_bytes=2 * largest)
    hf.load(tmp_path)
    # Again: what was compiled then would count now.
    assert peak(lambda: hf.save(tmp_path, config, params, shard_bytes=2 * largest)) < 3 * largest
    assert peak(lambda: hf.load(tmp_path)) < 3 * largest


def test_a_padded_vocabulary_is_cut(folder, config, params, tokens):
    cut_config, cut = hf.load(folder, vocab_size=37)
    assert cut_config.vocab_size == 37
    logits = forward(cut, cut_config, tokens % 37)
    np.testing.assert_allclose(logits, forward(params, config, tokens % 37)[..., :37], atol=1e-5)
    with pytest.raises(EgjaxError, match="40 tokens, 41 are wanted"):
        hf.load(folder, vocab_size=41)


def test_ends_of_the_generation_config_count_too(folder, config, params):
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2, 33], "bos_token_id": 1}))
    assert hf.load(folder)[0] == dataclasses.replace(config, eos_ids=(2, 33))
    path.write_text(json.dumps({"eos_token_id": 34}))
    assert hf.read_config(folder).eos_ids == (2, 34)
    fields = json.loads((folder / "config.json").read_text())
    del fields["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(fields))
    assert hf.read_config(folder).eos_ids == (34,)
    with pytest.raises(EgjaxError, match="token 34 starts or ends a text, the tokenizer has 34"):
        hf.load(folder, vocab_size=34)
    for wrong in (40, "x", -1):
        path.write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(EgjaxError, match=r"generation_config\.json: field 'eos_token_id'"):
            hf.load(folder)


def test_dtype_may_be_chosen(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
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
    for value in (np.nan, np.inf):
        broken = tensors[name].copy()
        broken[3, 7] = value
        save_file({**tensors, name: broken}, weights)
        with pytest.raises(EgjaxError, match=rf"safetensors: tensor {name} holds NaN or inf"):
            hf.load(folder)
    save_file({**tensors, name: tensors[name].astype(np.int8)}, weights)
    with pytest.raises(EgjaxError, match=f"{name} is of type I8 .quantised"):
        hf.load(folder)
    save_file(tensors, weights)
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(EgjaxError, match=r"model\.safetensors: cannot be read"):
        hf.load(folder)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(EgjaxError, match=r"model\.safetensors: cannot be read"):
        hf.load(folder)
    weights.unlink()
    with pytest.raises(EgjaxError, match=r"model\.safetensors: file is missing"):
        hf.load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(EgjaxError, match=r"pytorch_model\.bin is a pickle and never read"):
        hf.load(folder)
    index = folder / "model.safetensors.index.json"
    for file in ("../model.safetensors", "pytorch_model.bin"):
        index.write_text(json.dumps({"weight_map": {name: file}}))
        with pytest.raises(EgjaxError, match="no safetensors file of this folder"):
            hf.load(folder)
    index.write_text("{}")
    with pytest.raises(EgjaxError, match="has no weight_map"):
        hf.load(folder)
    index.unlink()
    (folder / "config.json").write_text("{")
    with pytest.raises(EgjaxError, match=r"config\.json: not JSON"):
        hf.load(folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(EgjaxError, match="'bert' is not supported"):
        hf.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(EgjaxError, match=r"config\.json: file is missing"):
        hf.load(folder)


def test_what_is_no_model_of_the_config_is_not_saved(config, params, folder):
    adapted = lora.LoraConfig(rank=2)
    adapter = lora.init(jax.random.key(0), config, adapted)
    attached = lora.attach(params, adapter, adapted)
    before = (folder / "model.safetensors").read_bytes()
    for wrong, message in (
        (attached, r"an adapter is attached .merge it first"),
        (lora.Pair(attached), "an adapter is attached"),
        (int8.quantize(params), "the matrices are in eight bits"),
        (unstacked(params), "the layers are apart"),
        ({**params, "more": params["final_norm"]}, r"the config has no \['more'\]"),
        ({**params, "embedding": params["embedding"][:3]}, r"\['embedding'\] has shape \[3, 24\]"),
        ({k: v for k, v in params.items() if k != "final_norm"}, "there is no .*final_norm"),
        ({**params, "final_norm": params["final_norm"].astype(int)}, "is of type int32"),
    ):
        with pytest.raises(EgjaxError, match=message):
            hf.save(folder, config, wrong)
    for layers in (2, 4):
        with pytest.raises(EgjaxError, match=rf"has shape \[3, .* expected \[{layers}, "):
            hf.save(folder, dataclasses.replace(config, num_layers=layers), params)
    assert (folder / "model.safetensors").read_bytes() == before


def test_files_of_another_kind_are_kept(folder, config, params):
    kept = ("model_ema.safetensors", "model-best.safetensors", "model-00001-of-00002.safetensors.x")
    gone = ("model-00001-of-00002.safetensors", "model.safetensors.index.json")
    for name in (*kept, *gone):
        (folder / name).write_bytes(b"mine")
    hf.save(folder, config, params)
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", *kept}


def test_a_failed_save_leaves_the_old_files(folder, config, params, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()

    def full(path, entries, value):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf, "write", full)
    with pytest.raises(EgjaxError, match="No space left"):
        hf.save(folder, config, jax.tree.map(lambda x: x + 1, params))
    assert (folder / "model.safetensors").read_bytes() == before
    assert not list(folder.glob("*.part"))
