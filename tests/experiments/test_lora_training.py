"""The training of every stage, of an adapter: what is written fits together."""

import errno
import json
from dataclasses import asdict, replace

import jax
import numpy as np
import pytest
import tokenizers

from egjax.errors import EgjaxError
from egjax.experience.records import Sample as Text
from egjax.lm import hf, peft
from egjax.lm.config import LlamaConfig
from egjax.lm.lora import LoraConfig, merge
from egjax.lm.params import init
from egjax.lm.tokenizer import Tokenizer
from egjax.train.data import Sample, pack
from egjax.train.layout import applied
from egjax.train.objectives import next_token
from experiments import chat, export, own, sft
from experiments.common import Stage, open_run
from experiments.models import Model, as_sample, load, save
from experiments.training import ADAPTER, MODEL, Training, curve, train

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


@pytest.fixture
def grown(tmp_path):
    """A run with its texts and πᴺ, as far as the fine-tuning needs them."""
    path = tmp_path / "run"
    questions = [f"Q: Walk to room {i}. A:" for i in range(6)]
    tokenizer = Tokenizer.train([f"{q} Done." for q in questions] * 4, vocab_size=280)
    config = replace(
        CONFIG,
        vocab_size=tokenizer.vocab_size,
        max_seq_len=64,
        bos_id=tokenizer.bos_id,
        eos_ids=(tokenizer.eos_id,),
        pad_id=tokenizer.pad_id,
    )
    base = Model(init(jax.random.key(0), config), config, tokenizer.fingerprint)

    def text(out):
        tokenizer.save(out / "tokenizer")
        rows = [asdict(Text("plan", question, "Done.")) for question in questions]
        (out / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    with open_run(path):
        Stage(path, "text", {}).run(text)
        Stage(path, "seed0/pretrain_small", {}).run(lambda out: save(out / MODEL, base))
    return path, base


def test_an_export_that_fails_can_be_done_again(grown, tmp_path, monkeypatch):
    path, _ = grown

    def fail(folder, *_):
        (folder / "model.safetensors.part").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    config = export.Config(path / "seed0" / "pretrain_small", tmp_path / "to")
    with monkeypatch.context() as patch:
        patch.setattr(hf, "save", fail)
        with pytest.raises(OSError, match="No space"):
            export.main(config)
    assert list(config.to.iterdir()) == []
    export.main(config)
    assert hf.load(config.to)


def test_a_run_with_an_adapter_is_decoded_and_exported(grown, tmp_path, capsys):
    path, base = grown
    training = Training(10, 6, 32, 1e-2)
    sft.main(sft.Config(run=path, training=training, lora_rank=2, json=True))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    figures = {row["name"]: row["value"] for row in rows}
    _, losses = curve(path / "seed0" / "sft", "loss")
    assert figures["sft_loss"] == losses[-1] < losses[0]
    lora, adapter = peft.load(path / "seed0" / "sft" / ADAPTER, base.config)
    merged = merge(base.params, adapter, lora)
    # Exported, both fit other programs: the model by itself, the adapter with the exported base.
    for stage, params in (("sft", merged), ("pretrain_small", base.params)):
        export.main(export.Config(path / "seed0" / stage, tmp_path / stage))
        config, found = hf.load(tmp_path / stage)
        assert config == base.config
        jax.tree.map(np.testing.assert_array_equal, found, params)
    with pytest.raises(EgjaxError, match="sft: is not empty"):
        export.main(export.Config(path / "seed0" / "sft", tmp_path / "sft"))
    asked = {"prompt": "Q: Walk to room 3. A:", "max_new_tokens": 8, "json": True}
    said = []
    for model in ({"run": path, "model": "expert"}, {"large_from": tmp_path / "sft"}):
        capsys.readouterr()
        chat.main(chat.Config(**model, **asked))
        said.append(json.loads(capsys.readouterr().out))
    assert said[0]["completion"]
    assert said[0]["completion"] == said[1]["completion"]


def test_weights_that_are_not_finite_and_foreign_tokenizers_are_refused(grown, tmp_path):
    path, base = grown
    layers = {**base.params["layers"], "query": base.params["layers"]["query"].at[0, 3].set(np.nan)}
    for int8 in (False, True):
        place = tmp_path / f"broken{int8}"
        save(place, base._replace(params={**base.params, "layers": layers}))
        with pytest.raises(EgjaxError, match=r"broken.*query.* holds NaN or infinite values"):
            load(place, int8=int8)
    Tokenizer.train(["Eat. Sleep. Drink."] * 4, vocab_size=265).save(path / "text" / "tokenizer")
    with pytest.raises(EgjaxError, match="not trained with the tokenizer in"):
        own.Start.at(path / "seed0" / "pretrain_small")


def test_a_prompt_and_its_completion_are_one_text_to_the_tokenizer(tmp_path):
    prompt, completion = "Q: Walk? A:", "Walk to milk."
    ours = Tokenizer.train([f"{prompt} {completion}"] * 4, vocab_size=266)
    # As Llama 2's: each text begins with a space.
    signs = ["<unk>", "<s>", "</s>", "▁", *"Q:Walk?Atomi.", "▁W", "▁A"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {sign: number for number, sign in enumerate(dict.fromkeys(signs))},
            [("▁", "W"), ("▁", "A")],
            unk_token="<unk>",
        )
    )
    normal = tokenizers.normalizers
    backend.normalizer = normal.Sequence([normal.Prepend("▁"), normal.Replace(" ", "▁")])
    for tokenizer, apart in ((ours, True), (Tokenizer(backend), False)):
        config = replace(CONFIG, vocab_size=280)
        sample = as_sample(Text("plan", prompt, completion), tokenizer, config)
        assert sample.tokens == [1, *tokenizer.encode(f"{prompt} {completion}"), 2]
        count = list(sample.mask).index(True)
        assert all(sample.mask[count:])
        assert sample.tokens[:count] == [1, *tokenizer.encode(prompt)]
        # What the project's own tokenizers always gave.
        assert (sample.tokens[count:-1] == tokenizer.encode(f" {completion}")) == apart


def test_rows_longer_than_the_model_are_refused(tmp_path):
    with pytest.raises(EgjaxError, match="17 tokens exceeds the model's context of 16"):
        run(tmp_path, length=17)
    assert not list(tmp_path.iterdir())
