"""What a training stage does with a layout."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egjax.lm.config import LlamaConfig
from egjax.lm.params import init
from egjax.train.data import Sample, pack
from egjax.train.layout import Layout, applied
from egjax.train.objectives import next_token
from experiments import training
from experiments.models import Model, load
from experiments.training import MODEL, Training, train


@pytest.mark.parametrize(
    ("batch", "layout", "shape", "mend"),
    [
        (16, Layout(accumulate=2), (8, 1), None),
        (12, Layout(accumulate=2), (2, 1), "let --training.batch be a multiple of 16; it is 12"),
        (9, Layout(model=3), (1, 3), "let --training.layout.model divide 8"),
    ],
)
def test_idle_devices_are_told(monkeypatch, capsys, batch, layout, shape, mend):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    data, model = shape
    mesh = SimpleNamespace(shape={"data": data, "model": model}, size=data * model)
    training._tell_mesh(mesh, Training(3, batch, 24, 1e-2, layout=layout), "sft")
    first, *rest = capsys.readouterr().err.splitlines()
    assert first == f"sft: {data * model} of 8 devices, data {data} x model {model}"
    idle = f"sft: warning: {8 - data * model} devices are idle: {mend}"
    assert rest == ([idle] if mend else [])


def test_masters_chunks_and_micro_batches_train_a_bfloat16_model(tmp_path):
    config = LlamaConfig(32, 16, 32, 1, 2, 1, 8, max_seq_len=32, dtype="bfloat16")
    layout = Layout(remat="full", chunked=True, master="float32", accumulate=2)
    rng = np.random.default_rng(0)
    samples = [Sample(rng.integers(3, 32, 20).tolist(), [True] * 20) for _ in range(12)]
    model = Model(init(jax.random.key(0), config), config, "tokenizer")
    train(
        model,
        next_token(applied(config, layout)),
        pack(samples, 24),
        Training(3, 4, 24, 1e-2, layout=layout),
        seed=0,
        out=tmp_path,
        title="test",
    )
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 3
    assert "nll" in rows[-1]
    assert "accuracy" not in rows[-1]  # the losses came from hidden states
    kept = load(tmp_path / MODEL)
    assert {x.dtype for x in jax.tree.leaves(kept.params)} == {jnp.dtype("bfloat16")}
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), kept.params, model.params)
    assert moved["layers"]["gate"]
