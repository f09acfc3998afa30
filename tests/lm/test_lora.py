"""Low-rank adapters: against PEFT, against merged weights, in training and in one doubled batch."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from egjax.errors import EgjaxError
from egjax.lm import hf, int8, lora, peft
from egjax.lm.lora import LoraConfig
from egjax.lm.model import forward as eager_forward
from egjax.lm.params import shardings as base_shardings
from egjax.mesh import make_mesh

GOLDEN = Path(__file__).parents[1] / "golden"
forward = jax.jit(eager_forward, static_argnames="config")
close = lambda a, b, tol=1e-5: np.testing.assert_allclose(a, b, rtol=tol, atol=tol)  # noqa: E731


@pytest.fixture(scope="module")
def recorded():
    """The golden model, its adapter as PEFT saved it, and what torch computes with both."""
    config, base = hf.load(GOLDEN / "tiny_llama")
    settings, adapter = peft.load(GOLDEN / "tiny_lora", config)
    return config, base, settings, adapter, np.load(GOLDEN / "tiny_lora" / "recorded.npz")


def random_adapter(config, settings, seed=0):
    """An adapter whose B is not zero."""
    first = lora.init(jax.random.key(seed), config, settings)
    leaves, structure = jax.tree.flatten(first)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(
        structure, [jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype) for x in leaves]
    )


def test_an_adapter_that_peft_saved_gives_the_logits_that_torch_recorded(recorded):
    config, base, settings, adapter, record = recorded
    assert settings.targets == ("query", "value", "output", "gate", "down")
    assert settings.scale == pytest.approx(7 / 3)
    adapted = forward(lora.attach(base, adapter, settings), config, record["tokens"])
    close(adapted, record["logits"])
    close(forward(lora.merge(base, adapter, settings), config, record["tokens"]), adapted)
    assert np.abs(adapted - forward(base, config, record["tokens"])).max() > 0.1


def test_what_is_saved_is_what_peft_saved(recorded, tmp_path):
    config, _, settings, adapter, _ = recorded
    peft.save(tmp_path, config, settings, adapter, base="tiny_llama")
    ours, theirs = (load_file(folder / peft.WEIGHTS) for folder in (tmp_path, GOLDEN / "tiny_lora"))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    fields = [json.loads((f / peft.CONFIG).read_text()) for f in (tmp_path, GOLDEN / "tiny_lora")]
    for name, value in fields[0].items():
        theirs = fields[1][name]
        assert value == theirs or (name == "target_modules" and set(value) == set(theirs)), name
    assert not list(tmp_path.glob("*.part"))


def test_peft_loads_what_is_saved_live(config, tokens, make_params, tmp_path):
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = make_params(config, scale=0.2)
    settings = LoraConfig(rank=4, alpha=3, rank_stabilised=True)
    adapter = random_adapter(config, settings)
    hf.save(tmp_path / "base", config, base)
    peft.save(tmp_path / "adapter", config, settings, adapter)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = theirs.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = model(torch.tensor(np.asarray(tokens))).logits.numpy()
    close(forward(lora.attach(base, adapter, settings), config, tokens), expected)


def test_the_first_adapter_changes_nothing(config, params, tokens):
    settings = LoraConfig(rank=3)
    adapter = lora.init(jax.random.key(0), config, settings)
    attached = lora.attach(params, adapter, settings)
    np.testing.assert_array_equal(
        forward(attached, config, tokens), forward(params, config, tokens)
    )
    assert lora.count(config, settings) == sum(x.size for x in jax.tree.leaves(adapter))
    bound = np.abs(adapter["layers"]["output"]["a"]).max()
    assert 0.9 * 32**-0.5 < bound <= 32**-0.5


def test_unmerging_undoes_merging(config, params):
    settings = LoraConfig(rank=3, alpha=5)
    adapter = random_adapter(config, settings)
    merged = lora.merge(params, adapter, settings)
    assert np.abs(merged["layers"]["down"] - params["layers"]["down"]).max() > 0.05
    jax.tree.map(lambda a, b: close(a, b, 1e-6), lora.unmerge(merged, adapter, settings), params)
    by_hand = params["layers"]["output"][1] + (5 / 3) * np.einsum(
        "hkr,rd->hkd",
        adapter["layers"]["output"]["a"][1],
        adapter["layers"]["output"]["b"][1],
    )
    close(merged["layers"]["output"][1], by_hand, 1e-6)


def test_expert_and_anti_expert_come_out_of_one_pass(config, params, tokens):
    # The doubled batch is summed in another order; smaller weights keep float32's rounding small.
    params = jax.tree.map(lambda x: 0.5 * x, params)
    settings = LoraConfig(rank=2)
    adapter = random_adapter(config, settings)
    segments = jnp.ones_like(tokens).at[:, 7:].set(2).at[1, 10:].set(0)

    @jax.jit
    def both(params, adapter, positions, segments):
        return lora.expert_and_anti_expert(
            params, adapter, config, settings, tokens, positions, segments
        )

    expert, anti_expert = both(params, adapter, None, segments)
    attached = lora.attach(params, adapter, settings)
    close(expert, forward(attached, config, tokens, segment_ids=segments))
    close(anti_expert, forward(params, config, tokens, segment_ids=segments))
    assert np.abs(expert - anti_expert).max() > 0.1
    positions = jnp.arange(tokens.shape[1])[None]
    close(both(params, adapter, positions, None)[1], forward(params, config, tokens))


def test_gradients_reach_the_adapter_as_through_merged_weights(config, params, tokens):
    params = jax.tree.map(lambda x: 0.5 * x, params)
    settings = LoraConfig(rank=2, targets=("key", "up", "output"))
    adapter = random_adapter(config, settings)

    def loss(join, adapter):
        return jax.nn.log_softmax(eager_forward(join(adapter), config, tokens))[..., 3].mean()

    attached, merged = (
        jax.jit(jax.grad(lambda a, put=put: loss(lambda a: put(params, a, settings), a)))(adapter)
        for put in (lora.attach, lora.merge)
    )
    jax.tree.map(lambda a, b: close(a, b, 1e-5), attached, merged)
    assert all(np.abs(x).max() > 1e-4 for x in jax.tree.leaves(attached))


def test_bfloat16_weights_take_a_float32_adapter(config, params, tokens):
    half = dataclasses.replace(config, dtype="bfloat16")
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    settings = LoraConfig(rank=2)
    adapter = random_adapter(half, settings)
    attached = lora.attach(base, adapter, settings)
    assert attached["layers"]["up_lora_b"].dtype == jnp.bfloat16
    whole = forward(lora.attach(params, adapter, settings), config, tokens)
    difference = forward(attached, half, tokens) - whole
    assert np.abs(difference).mean() < 0.1 * np.abs(whole).mean()


def test_an_adapter_lies_where_its_matrices_lie(config):
    placed = lora.shardings(config, LoraConfig(rank=2), make_mesh(data=1))["layers"]
    base = base_shardings(config, make_mesh(data=1))["layers"]
    assert tuple(placed["query"]["a"].spec) == (None, "data", None)
    assert tuple(placed["query"]["b"].spec) == (None, None, *base["query"].spec[2:])
    assert tuple(placed["down"]["a"].spec) == (None, "model", None)
    assert tuple(placed["down"]["b"].spec) == (None, None, "data")


def test_what_is_not_supported_is_one_clear_line(config, recorded, tmp_path):
    model = recorded[0]
    folder = tmp_path / "adapter"

    def refused(message, changes=None, tensors=None):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(GOLDEN / "tiny_lora", folder)
        fields = json.loads((folder / peft.CONFIG).read_text())
        (folder / peft.CONFIG).write_text(json.dumps({**fields, **(changes or {})}))
        if tensors:
            save_file(tensors(load_file(folder / peft.WEIGHTS)), folder / peft.WEIGHTS)
        with pytest.raises(EgjaxError, match=message):
            peft.load(folder, model)

    refused("'IA3'; LORA is read", {"peft_type": "IA3"})
    refused("'use_dora' = True is not supported", {"use_dora": True})
    refused("'modules_to_save'", {"modules_to_save": ["lm_head"]})
    refused("'rank_pattern'", {"rank_pattern": {"q_proj": 2}})
    refused("init_lora_weights 'pissa'", {"init_lora_weights": "pissa"})
    refused("'r' is missing", {"r": None})
    refused("lora_A.weight has shape", {"r": 5})
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    refused(f"{first} is missing", tensors=lambda t: {k: v for k, v in t.items() if k != first})
    refused(
        "lm_head.lora_A.weight adapts something else",
        tensors=lambda t: {**t, "base_model.model.lm_head.lora_A.weight": t[first]},
    )
    refused("layers.3.* is of no layer", tensors=lambda t: {**t, first.replace("0", "3"): t[first]})
    refused("NaN", tensors=lambda t: {**t, first: np.full_like(t[first], np.nan)})
    (folder / peft.WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(EgjaxError, match=r"adapter_model\.bin is a pickle and never read"):
        peft.load(folder, model)
    for wrong, message in (({"rank": 0}, "rank of 0"), ({"targets": ("embedding",)}, "embedding")):
        with pytest.raises(EgjaxError, match=message):
            LoraConfig(**wrong)


def test_nothing_is_merged_into_eight_bits(config, params):
    settings = lora.LoraConfig(rank=2)
    adapter = lora.init(jax.random.key(0), config, settings)
    for put in (lora.merge, lora.unmerge):
        with pytest.raises(EgjaxError, match="eight bits"):
            put(int8.quantize(params), adapter, settings)
