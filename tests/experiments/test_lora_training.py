"""The training of every stage, of an adapter: what is written fits together."""

import jax
import numpy as np
import pytest

from egjax.errors import EgjaxError
from egjax.lm import peft
from egjax.lm.config import LlamaConfig
from egjax.lm.lora import LoraConfig, merge
from egjax.lm.params import init
from egjax.train.data import Sample, pack
from egjax.train.layout import applied
from egjax.train.objectives import next_token
from experiments.models import Model, load
from experiments.training import ADAPTER, MODEL, Training, train

CONFIG = LlamaConfig(
    vocab_size=16,
    hidden_size=16,
    intermediate_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_seq_len=16,
)


def run(out, length=16):
    table = pack([Sample([i, i + 1, i + 2, i + 3], [True] * 4) for i in range(12)], length)
    model = Model(init(jax.random.key(0), CONFIG), CONFIG, "tokenizer")
    settings = Training(6, 2, length, 1e-2, save_every=3)
    train(
        model,
        next_token(applied(CONFIG)),
        table,
        settings,
        seed=0,
        out=out,
        title="sft",
        lora=LoraConfig(2, 4.0, ("query", "up")),
    )
    return model


def test_the_adapter_and_the_model_with_it_are_written(tmp_path):
    base = run(tmp_path)
    trained = load(tmp_path / MODEL)
    lora, adapter = peft.load(tmp_path / ADAPTER, CONFIG)
    assert (lora.rank, lora.targets) == (2, ("query", "up"))
    merged = merge(base.params, adapter, lora)
    jax.tree.map(np.testing.assert_array_equal, trained.params, merged)
    before, after = base.params["layers"], trained.params["layers"]
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"query", "up"}


def test_rows_longer_than_the_model_are_refused(tmp_path):
    with pytest.raises(EgjaxError, match="17 tokens exceeds the model's context of 16"):
        run(tmp_path, length=17)
    assert not list(tmp_path.iterdir())
