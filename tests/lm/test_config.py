import dataclasses

import pytest

from egjax.errors import EgjaxError
from egjax.lm.config import PRESETS, LlamaConfig, RopeScaling, preset
from egjax.lm.params import count

OLD = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "torch_dtype": "bfloat16",
    "eos_token_id": [5, 6],
}


def test_old_and_new_rotary_fields_mean_the_same():
    new = {k: v for k, v in OLD.items() if not k.startswith("rope_")}
    new["rope_parameters"] = {**OLD["rope_scaling"], "rope_theta": 500000.0}
    assert LlamaConfig.from_hf(OLD) == LlamaConfig.from_hf(new)
    config = LlamaConfig.from_hf(OLD)
    assert config.rope_theta == 500000.0
    assert config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)


def test_rotary_fields_that_disagree_are_refused():
    default = {"rope_type": "default", "rope_theta": 500000.0}
    scaling = OLD["rope_scaling"]
    assert LlamaConfig.from_hf({**OLD, "rope_parameters": scaling}) == LlamaConfig.from_hf(OLD)
    for changes, message in (
        ({"rope_parameters": default}, "rope_parameters and rope_scaling say different"),
        ({"rope_parameters": default, "rope_scaling": {"type": "linear", "factor": 4.0}}, "linear"),
        ({"rope_parameters": {**scaling, "rope_theta": 1e4}}, "two values of rope_theta"),
        ({"rope_scaling": {**scaling, "rope_type": "linear"}}, "two values of rope_type and type"),
        ({"rope_scaling": {**scaling, "high_freq_factor": 1.0}}, "1.0 is not below"),
        ({"rope_scaling": {**scaling, "factor": "x"}}, "'factor' is 'x'"),
        ({"rope_scaling": {**scaling, "factor": 0}}, "'factor' is 0"),
        ({"rope_scaling": {"type": "llama3"}}, "'low_freq_factor' is missing"),
        ({"rope_theta": 0}, "'rope_theta' is 0"),
        ({"rope_theta": None}, "'rope_theta' is None"),
    ):
        with pytest.raises(EgjaxError, match=message):
            LlamaConfig.from_hf({**OLD, **changes}, where="config.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", None),
        ("num_attention_heads", 0),
        ("vocab_size", "abc"),
        ("vocab_size", 100.7),
        ("vocab_size", True),
        ("hidden_size", [32]),
        ("hidden_size", 33),
        ("max_position_embeddings", None),
        ("intermediate_size", -64),
        ("rms_norm_eps", -1.0),
        ("rms_norm_eps", float("nan")),
        ("tie_word_embeddings", "false"),
        ("attention_bias", "false"),
        ("eos_token_id", "2"),
        ("eos_token_id", 5000),
        ("eos_token_id", [2, -1]),
        ("bos_token_id", [1, 2]),
        ("num_key_value_heads", 3),
        ("torch_dtype", 3),
    ],
)
def test_values_out_of_range_give_a_line(field, value):
    with pytest.raises(EgjaxError, match=r"^config\.json: "):
        LlamaConfig.from_hf({**OLD, field: value}, where="config.json")


def test_absent_fields_follow_transformers():
    config = LlamaConfig.from_hf(OLD)
    assert (config.num_kv_heads, config.head_dim) == (4, 8)
    assert (config.tie_embeddings, config.rms_norm_eps, config.dtype) == (False, 1e-6, "bfloat16")
    assert config.eos_ids == (5, 6)
    assert LlamaConfig.from_hf({**OLD, "head_dim": 16}).head_dim == 16
    assert LlamaConfig.from_hf({**OLD, "eos_token_id": 7}).eos_ids == (7,)
    assert LlamaConfig.from_hf({**OLD, "eos_token_id": None}).eos_ids == ()
    without = {k: v for k, v in OLD.items() if k != "eos_token_id"}
    assert (LlamaConfig.from_hf(without).bos_id, LlamaConfig.from_hf(without).eos_ids) == (1, (2,))
    assert LlamaConfig.from_hf({**OLD, "bos_token_id": None}).bos_id is None
    for pad in (-1, 100, None):  # what checkpoints have that never pad
        assert LlamaConfig.from_hf({**OLD, "pad_token_id": pad}).pad_id is None
    nulls = {"num_key_value_heads": None, "head_dim": None}
    assert LlamaConfig.from_hf({**OLD, **nulls}) == LlamaConfig.from_hf(OLD)


@pytest.mark.parametrize("eos", [(), (2,), (2, 9)])
def test_round_trip(config, eos):
    config = dataclasses.replace(config, eos_ids=eos)
    assert LlamaConfig.from_hf(config.to_hf()) == config
    plain = dataclasses.replace(config, rope_scaling=None)
    assert LlamaConfig.from_hf(plain.to_hf()) == plain


def test_what_is_not_supported_is_refused():
    wrong = {
        "model_type": "gpt2",
        "hidden_act": "gelu",
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0},
        "torch_dtype": "int3",
    }
    for field, value in wrong.items():
        with pytest.raises(EgjaxError, match=r"gpt2|gelu|yarn|int3"):
            LlamaConfig.from_hf({**OLD, field: value})
    with pytest.raises(EgjaxError, match=r"config\.json: field 'vocab_size'"):
        LlamaConfig.from_hf(
            {k: v for k, v in OLD.items() if k != "vocab_size"}, where="config.json"
        )


def test_fields_that_might_change_the_model_are_refused():
    unknown = {
        "attention_dropout": 0.1,
        "sliding_window": 4096,
        "logits_scaling": 8.0,
        "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"},
    }
    for field, value in unknown.items():
        with pytest.raises(EgjaxError, match=f"config.json: field '{field}' = .* not known"):
            LlamaConfig.from_hf({**OLD, field: value}, where="config.json")
    with pytest.raises(EgjaxError, match="quantised"):
        LlamaConfig.from_hf({**OLD, "quantization_config": {"quant_method": "gptq"}})
    scaling = OLD["rope_scaling"]
    with pytest.raises(EgjaxError, match=r"'attention_factor' = 1\.2"):
        LlamaConfig.from_hf({**OLD, "rope_scaling": {**scaling, "attention_factor": 1.2}})
    with pytest.raises(EgjaxError, match=r"'factor' = 2\.0"):
        LlamaConfig.from_hf({**OLD, "rope_scaling": {"rope_type": "default", "factor": 2.0}})
    # What is empty or says nothing of the computation is let through.
    harmless = {
        "attention_dropout": 0.0,
        "sliding_window": None,
        "use_cache": True,
        "pretraining_tp": 2,
        "initializer_range": 0.02,
        "architectures": ["LlamaForCausalLM"],
        "transformers_version": "4.31.0",
        "_attn_implementation_autoset": True,
        "tokenizer_class": "LlamaTokenizer",
        "typical_p": 1.0,
        "num_beam_groups": 1,
        "max_length": 20,
        "remove_invalid_values": False,
        "chunk_size_feed_forward": 0,
        "partial_rotary_factor": 1.0,
        "transformers.js_config": {"dtype": "q4"},
        "suppress_tokens": [1],
    }
    assert LlamaConfig.from_hf({**OLD, **harmless}) == LlamaConfig.from_hf(OLD)


def test_what_transformers_itself_writes_is_read():
    transformers = pytest.importorskip("transformers")
    fields = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        rope_parameters={**OLD["rope_scaling"], "rope_type": "llama3", "rope_theta": 500000.0},
        dtype="bfloat16",
        eos_token_id=[5, 6],
    ).to_dict()
    ours = dataclasses.replace(LlamaConfig.from_hf(OLD), bos_id=1)
    assert LlamaConfig.from_hf({**fields, "dtype": "bfloat16"}) == ours


# Numbers of parameters as the models' cards give them, and their config.json in excerpts.
PUBLISHED = {
    "tinyllama-1.1b": (1_100_048_384, {"num_key_value_heads": 4, "max_position_embeddings": 2048}),
    "llama-2-7b": (6_738_415_616, {"num_key_value_heads": 32, "intermediate_size": 11008}),
    "llama-2-13b": (13_015_864_320, {"num_hidden_layers": 40, "vocab_size": 32000}),
    "llama-2-70b": (68_976_648_192, {"num_key_value_heads": 8, "rope_scaling": None}),
    "llama-3-8b": (8_030_261_248, {"rope_theta": 500000.0, "max_position_embeddings": 8192}),
    "llama-3-70b": (70_553_706_496, {"bos_token_id": 128000, "eos_token_id": 128001}),
    "llama-3.1-8b": (8_030_261_248, {"max_position_embeddings": 131072}),
    "llama-3.1-70b": (70_553_706_496, {"hidden_size": 8192, "tie_word_embeddings": False}),
    "llama-3.1-405b": (405_853_388_800, {"num_key_value_heads": 8, "num_hidden_layers": 126}),
    "llama-3.2-1b": (1_235_814_400, {"head_dim": 64, "tie_word_embeddings": True}),
    "llama-3.2-3b": (3_212_749_824, {"head_dim": 128, "num_attention_heads": 24}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_by_name_are_those_that_were_published(name):
    config = preset(name.upper())
    parameters, fields = PUBLISHED[name]
    assert count(config) == parameters
    written = config.to_hf()
    assert {field: written[field] for field in fields} == fields
    assert LlamaConfig.from_hf(written) == config


def test_scaling_by_name_and_unknown_names():
    assert set(PRESETS) == set(PUBLISHED)
    assert preset("llama-3.1-8b").rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    assert preset("llama-3.2-3b").rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)
    with pytest.raises(EgjaxError, match="no model 'llama-4'"):
        preset("llama-4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 0}, "num_kv_heads is 0"),
        ({"num_layers": -1}, "num_layers is -1"),
        ({"num_kv_heads": 3}, "3 kv heads do not divide 4 heads"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(EgjaxError, match=message):
        LlamaConfig(**{**vars(LlamaConfig(100, 32, 64, 2, 4, 2, 16)), **change})
