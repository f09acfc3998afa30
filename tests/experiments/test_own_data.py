"""One's own JSON lines and Hugging Face models go through the training scripts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import codes, launch
from safetensors.numpy import load_file, save_file

from egjax.errors import EgjaxError
from egjax.lm import hf, lora, peft
from egjax.lm.config import LlamaConfig
from egjax.lm.model import forward
from egjax.lm.params import init
from egjax.lm.template import ChatTemplate
from egjax.lm.tokenizer import Tokenizer
from egjax.train.layout import Layout
from experiments import chat, distill, dpo, own, sft
from experiments.training import Training

ROOT = Path(__file__).parents[2]
SHORT = Training(steps=3, batch=2, length=48, learning_rate=1e-2)
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["Walk to kitchen. Grab cup. user assistant"] * 4, vocab_size=280)


def make(folder, tokenizer, seed, *, template=TEMPLATE, scale=1.0, **changes):
    config = LlamaConfig(
        vocab_size=283,  # three padded columns
        hidden_size=8,
        intermediate_size=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        max_seq_len=64,
        bos_id=tokenizer.bos_id,
        eos_ids=(tokenizer.eos_id,),
        pad_id=tokenizer.pad_id,
    )
    config = replace(config, **changes)
    params = jax.tree.map(lambda x: scale * x, init(jax.random.key(seed), config))
    tokenizer.save(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    hf.save(folder, config, params)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory, tokenizer):
    """A folder with models and data."""
    home = tmp_path_factory.mktemp("own")
    for seed, name in enumerate(("large", "expert", "anti")):
        make(home / name, tokenizer, seed)
    lines = {
        "sft": [
            {
                "messages": [
                    {"role": "user", "content": f"Go {i}"},
                    {"role": "assistant", "content": "Walk."},
                ]
            }
            for i in range(3)
        ]
        + [{"prompt": "Q:", "completion": " Grab cup."}, {"text": "Walk to kitchen. " * 40}],
        "pairs": [
            {"prompt": f"Q {i}: A:", "chosen": " Walk to kitchen.", "rejected": " Walk."}
            for i in range(4)
        ],
    }
    for name, rows in lines.items():
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


def curve(done):
    text = (done.path / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_sft_then_dpo_and_what_comes_out_is_a_hugging_face_model(home, tmp_path, capsys):
    options = {"run": tmp_path / "run", "training": SHORT}
    first = sft.own_stage(
        sft.Config(data=home / "sft.jsonl", model=home / "large", z_loss=1e-3, **options)
    )
    assert "1 of 5 lines exceed 48 tokens" in capsys.readouterr().err
    assert curve(first)[-1]["loss"] < curve(first)[0]["loss"]
    assert curve(first)[-1]["tokens_per_second"] > 0
    # A stage's folder serves as model.
    second = dpo.own_stage(dpo.Config(data=home / "pairs.jsonl", model=first.path, **options))
    assert curve(second)[-1]["margin"] > curve(second)[0]["margin"]
    files = {path.name for path in (second.path / "model").iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    config, params = hf.load(second.path / "model")
    assert config == hf.load(home / "large")[0]
    before = hf.load(first.path / "model")[1]
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), params, before)
    assert all(jax.tree.leaves(changed))
    again = dpo.own_stage(dpo.Config(data=home / "pairs.jsonl", model=first.path, **options))
    assert again.kept
    assert "the model is in" in capsys.readouterr().err
    chat.main(chat.Config(large_from=second.path, prompt="Some words", max_new_tokens=2))
    assert capsys.readouterr().out


def test_what_was_trained_loads_in_transformers(home, tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    done = sft.own_stage(
        sft.Config(data=home / "sft.jsonl", model=home / "large", run=tmp_path, training=SHORT)
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(done.path / "model")
    assert model.config.vocab_size == 283
    words = transformers.AutoTokenizer.from_pretrained(done.path / "model")
    assert words("Walk to kitchen.")["input_ids"] == tokenizer.encode("Walk to kitchen.")
    assert words.chat_template == TEMPLATE


def test_a_model_without_a_template_gets_the_one_that_it_was_trained_with(
    home, tmp_path, tokenizer, capsys
):
    base = make(tmp_path / "base", tokenizer, 0, template=None)
    config = sft.Config(
        data=home / "sft.jsonl", model=base, run=tmp_path / "run", training=replace(SHORT, steps=1)
    )
    out = sft.own_stage(config).path / "model"
    assert "base: no chat template; a message is a line `role: content`" in capsys.readouterr().err
    assert own.Start.at(out).template == own.Start.at(base).template
    source = (out / "chat_template.jinja").read_text()
    talk = [{"role": "user", "content": "Go"}]
    asked = ChatTemplate(source).render(talk, ask=True)
    assert asked == "<bos>user: Go\nassistant:"
    words = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(out)
    assert words.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) == asked


def test_an_adapter_is_trained_in_place_of_the_weights(home, tmp_path):
    options = {"data": home / "sft.jsonl", "model": home / "large", "training": SHORT}
    done = sft.own_stage(sft.Config(run=tmp_path, lora_rank=2, **options))
    assert curve(done)[-1]["loss"] < curve(done)[0]["loss"]
    config, base = hf.load(home / "large")
    settings, adapter = peft.load(done.path / "adapter", config)
    assert (settings.rank, settings.alpha) == (2, 4.0)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        hf.load(done.path / "model")[1],
        lora.merge(base, adapter, settings),
    )
    with pytest.raises(EgjaxError, match="LoRA rank of -1"):
        sft.own_stage(sft.Config(run=tmp_path / "other", lora_rank=-1, **options))
    assert not (tmp_path / "other").exists()


def test_a_trained_adapter_gives_the_same_logits_in_peft(home, tmp_path, tokenizer):
    library, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    done = sft.own_stage(
        sft.Config(
            data=home / "sft.jsonl",
            model=home / "large",
            run=tmp_path,
            training=SHORT,
            lora_rank=2,
        )
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(home / "large")
    ids = np.asarray([tokenizer.encode("Walk to kitchen. Grab cup.")])
    want = forward(hf.load(done.path / "model")[1], hf.load(done.path / "model")[0], ids)
    before = base(torch.tensor(ids)).logits.detach().numpy()
    assert np.abs(before - want).max() > 1e-3
    model = library.PeftModel.from_pretrained(base, done.path / "adapter")
    logits = model(torch.tensor(ids)).logits.detach().numpy()
    np.testing.assert_allclose(logits, want, atol=1e-5)


def test_bfloat16_models_train_in_float32_and_stay_bfloat16(home, tmp_path, tokenizer):
    folder = make(tmp_path / "small", tokenizer, 0, dtype="bfloat16")
    # Steps far below the precision of bfloat16 around 1: they add up in the masters alone.
    training = replace(
        SHORT, steps=8, learning_rate=1e-3, schedule="constant", layout=Layout(accumulate=2)
    )
    done = sft.own_stage(
        sft.Config(data=home / "sft.jsonl", model=folder, run=tmp_path / "r", training=training)
    )
    config, params = hf.load(done.path / "model")
    assert config.dtype == "bfloat16"
    norm = np.asarray(params["final_norm"], np.float32)
    assert (norm != 1).any()


def test_distillation_of_ones_own_models(home, tmp_path):
    config = distill.Config(
        data=home / "sft.jsonl",
        large=home / "large",
        expert=home / "expert",
        anti_expert=home / "anti",
        run=tmp_path,
        training=SHORT,
    )
    done = distill.own_stage(config)
    assert curve(done)[-1]["loss"] < curve(done)[0]["loss"]
    assert (done.path / "model" / "model.safetensors").is_file()
    with pytest.raises(EgjaxError, match="--expert is needed with --data"):
        distill.own_stage(replace(config, expert=None))


def test_models_that_do_not_fit_are_told_before_any_work(home, tmp_path, tokenizer):
    base = distill.Config(
        data=home / "sft.jsonl",
        large=home / "large",
        expert=home / "expert",
        anti_expert=home / "anti",
        run=tmp_path / "run",
        training=SHORT,
    )
    other = make(tmp_path / "other", tokenizer, 3, template=TEMPLATE.replace("]", ")"))
    with pytest.raises(EgjaxError, match="chat templates differ: πᴸ has"):
        distill.own_stage(replace(base, large=other))
    words = Tokenizer.train(["Eat. Sleep. Drink. Wake. Walk away."] * 4, vocab_size=280)
    strange = make(tmp_path / "strange", words, 3)
    with pytest.raises(EgjaxError, match="tokenizers differ"):
        distill.own_stage(replace(base, large=strange))
    deep = make(tmp_path / "deep", tokenizer, 3, num_layers=3)
    with pytest.raises(EgjaxError, match="πᴱ and πᴺ are of different shapes"):
        distill.own_stage(replace(base, expert=deep))
    long = replace(SHORT, length=65)
    with pytest.raises(EgjaxError, match="rows of 65 tokens exceed the model's context of 64"):
        distill.own_stage(replace(base, training=long))
    few = make(tmp_path / "few", tokenizer, 3, vocab_size=270)
    with pytest.raises(EgjaxError, match="the tokenizer has 280 tokens, the model 270"):
        own.Start.at(few)
    with pytest.raises(EgjaxError, match=r"nowhere: there is no model"):
        own.Start.at(tmp_path / "nowhere")
    assert not (tmp_path / "run").exists()


def test_models_are_told_apart_by_content_alone(home, tmp_path, monkeypatch):
    monkeypatch.setattr(own, "_PIECE", 512)
    monkeypatch.setattr(own, "_BLOCK", 32)
    before = own.Start.at(home / "large").fingerprint
    copy = shutil.copytree(home / "large", tmp_path / "copy")
    weights = copy / "model.safetensors"
    os.utime(weights, (0, 0))
    (copy / "README.md").write_text("mine")
    assert own.Start.at(copy).fingerprint == before
    tensors = load_file(weights)
    for name in tensors:  # one by one, wherever they lie in the file
        save_file(tensors | {name: tensors[name] + 1}, weights)
        assert own.Start.at(copy).fingerprint != before or tensors[name].nbytes < 512
    save_file(tensors, weights)
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert own.Start.at(copy).fingerprint != before


def test_moved_files_are_the_same_inputs(home, tmp_path):
    options = {"run": tmp_path / "run", "training": SHORT}
    sft.own_stage(sft.Config(data=home / "sft.jsonl", model=home / "large", **options))
    shutil.copytree(home / "large", tmp_path / "model")
    shutil.copyfile(home / "sft.jsonl", tmp_path / "sft.jsonl")
    options["training"] = replace(SHORT, save_every=1, layout=Layout(remat="full"))
    moved = sft.Config(data=tmp_path / "sft.jsonl", model=tmp_path / "model", **options)
    assert sft.own_stage(moved).kept


def cut(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def miss(folder):
    """The second of two files that the index names is not there."""
    weights = folder / "model.safetensors"
    names = list(load_file(weights))
    files = ["one.safetensors"] + ["two.safetensors"] * (len(names) - 1)
    index = {"weight_map": dict(zip(names, files, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    weights.rename(folder / "one.safetensors")


def spoil(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, folder / "model.safetensors")


def invent(folder):
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "logits_scaling": 8.0}))


def pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def forget(folder):
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (cut, r"model\.safetensors: cannot be read"),
        (miss, r"two\.safetensors: file is missing"),
        (spoil, r"model\.norm\.weight holds NaN"),
        (invent, r"config\.json: field 'logits_scaling' = 8\.0 is not known"),
        (pickle, r"pytorch_model\.bin is a pickle and never read"),
        (forget, "tokenizer"),
        (None, "rows of 65 tokens exceed the model's context of 64"),
    ],
)
def test_a_broken_model_is_told_before_the_first_step(home, tmp_path, tokenizer, harm, said):
    folder, training = make(tmp_path / "model", tokenizer, 0), SHORT
    if harm is None:
        training = replace(SHORT, length=65)
    else:
        harm(folder)
    config = sft.Config(
        data=home / "sft.jsonl", model=folder, run=tmp_path / "run", training=training
    )
    with pytest.raises(EgjaxError, match=said) as found:
        sft.own_stage(config)
    assert "\n" not in str(found.value)
    assert not list(tmp_path.rglob("checkpoints"))


def test_options_that_would_do_nothing_are_refused(home, tmp_path):
    run = tmp_path / "run"
    for module, options, said in (
        (sft, {"model": home / "large"}, "--model has no effect without --data"),
        (dpo, {"model": home / "large"}, "--model has no effect without --data"),
        (distill, {"anti_expert": home / "anti"}, "--anti-expert has no effect without --data"),
        (
            sft,
            {"data": home / "sft.jsonl", "model": home / "large", "weights": sft.Weights(plan=2.0)},
            "--weights has no effect with --data",
        ),
    ):
        with pytest.raises(EgjaxError, match=said):
            module.main(module.Config(run=run, **options))
    for options, said in (
        ({"save_every": 0}, r"--training\.save-every: 0 is less than 1"),
        ({"steps": 0}, r"--training\.steps: 0 is less than 1"),
    ):
        with pytest.raises(EgjaxError, match=said):
            replace(SHORT, **options)
    assert not run.exists()


def call(module, *arguments):
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_two_processes_train_what_one_does(home, tmp_path, rank):
    """On one file system, as a job of several hosts; the model and the adapter are written once."""
    settings = [f"--training.{k}={v}" for k, v in (("steps", 3), ("batch", 2), ("length", 48))]
    arguments = ["--data", home / "sft.jsonl", "--model", home / "large", *settings]
    arguments += ["--training.learning-rate", "1e-2", "--lora-rank", rank]
    alone, both = tmp_path / "alone", tmp_path / "both"
    done = call("sft", *arguments, "--run", alone)
    assert done.returncode == 0, done.stderr[-2000:]
    command = ["-m", "experiments.sft", *map(str, arguments), "--run", str(both)]
    logs = tmp_path / "logs"
    ended = codes(launch(command, 2, logs=logs), 600)
    assert ended == [0, 0], "".join(path.read_text() for path in logs.glob("*.err"))[-3000:]
    places = [folder / "seed0" / "own_sft" for folder in (alone, both)]
    one, two = [hf.load(place / "model")[1] for place in places]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), one, two)
    if rank:
        config = hf.load(home / "large")[0]
        adapters = [peft.load(place / "adapter", config)[1] for place in places]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *adapters)


def test_a_bad_line_is_exit_code_2(home, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"a": 1}\n')
    done = call("dpo", "--data", tmp_path / "x.jsonl", "--model", home / "large", "--run", tmp_path)
    assert done.returncode == 2
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert "x.jsonl:2: the columns are a (give prompt, chosen and rejected" in line


def test_a_loss_that_is_not_finite_is_exit_code_3(home, tmp_path, tokenizer):
    broken = make(tmp_path / "broken", tokenizer, 0, scale=1e30)
    short = [f"--training.{k}={v}" for k, v in (("steps", 3), ("batch", 2), ("length", 48))]
    arguments = ["--data", home / "sft.jsonl", "--model", broken, "--run", tmp_path / "run", *short]
    done = call("sft", *arguments)
    assert done.returncode == 3, done.stderr[-2000:]
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert "is nan at step 1 (the state of step 0 is kept" in line
    kept = tmp_path / "run" / "seed0" / "own_sft.unfinished" / "checkpoints"
    assert [path.name for path in kept.iterdir()] == ["0"]


@pytest.mark.parametrize(("script", "rate"), [(sft, 2e-5), (distill, 2e-5), (dpo, 1e-6)])
def test_rows_and_rates_of_a_pretrained_model_come_with_data(script, rate):
    settle = own.defaults(script.Config, rate)
    assert settle(["--run", "runs/mine"]) == script.Config()
    for arguments in (["--data", "x.jsonl"], ["--run", "r", "--data=x.jsonl"]):
        training = settle(arguments).training
        assert (training.length, training.learning_rate) == (1024, rate)
        assert replace(training, length=256, learning_rate=1.0) == replace(
            script.Config().training, length=256, learning_rate=1.0
        )


def test_help_shows_the_defaults_that_hold_with_data():
    for extra, shown in ((["--data", "x"], "1e-06"), ([], "0.0001")):
        done = subprocess.run(
            [sys.executable, "-m", "experiments.dpo", *extra, "--help"],
            capture_output=True,
            text=True,
        )
        assert f"(default: {shown})" in done.stdout
