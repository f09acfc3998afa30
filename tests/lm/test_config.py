import dataclasses

import pytest

from egjax.errors import EgjaxError
from egjax.lm.config import LlamaConfig, RopeScaling, large_config, small_config
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


def test_absent_fields_follow_transformers():
    config = LlamaConfig.from_hf(OLD)
    assert (config.num_kv_heads, config.head_dim) == (4, 8)
    assert (config.tie_embeddings, config.rms_norm_eps, config.dtype) == (False, 1e-6, "bfloat16")
    assert config.eos_ids == (5, 6)
    assert LlamaConfig.from_hf({**OLD, "head_dim": 16}).head_dim == 16
    assert LlamaConfig.from_hf({**OLD, "eos_token_id": 7}).eos_ids == (7,)
    assert LlamaConfig.from_hf({**OLD, "eos_token_id": None}).eos_ids == ()


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


def test_presets_have_the_sizes_they_claim():
    small, large = count(small_config(1024)), count(large_config(1024))
    assert 0.4e6 < small < 0.7e6
    assert 3.5e6 < large < 4.7e6
    assert min(small_config(1024).num_layers, large_config(1024).num_layers) >= 4
