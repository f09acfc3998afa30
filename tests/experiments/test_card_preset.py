"""One card: what is planned for it, frozen models in eight bits through the stages."""

import json
import shutil
from dataclasses import asdict, replace

import jax
import numpy as np
import pytest

from egjax.capacity.card import check_fits, evaluation_bytes, tuning_bytes
from egjax.capacity.presets import preset
from egjax.errors import EgjaxError
from egjax.experience.records import Sample as Text
from egjax.lm import hf, int8
from egjax.lm.config import LlamaConfig
from egjax.lm.params import count, init
from egjax.lm.tokenizer import Tokenizer
from egjax.sim.household import home_programs
from egjax.train.layout import Layout
from experiments import data, distill, evaluate, pipeline, pretrain
from experiments.common import Stage, open_run
from experiments.models import Model, load, save
from experiments.training import METRICS, MODEL, Training

GIB = 2**30
SMALL = LlamaConfig(
    vocab_size=16,
    hidden_size=16,
    intermediate_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_seq_len=2048,
    dtype="bfloat16",
)


def of(tokenizer, **changes):
    return replace(
        SMALL,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_ids=(tokenizer.eos_id,),
        pad_id=tokenizer.pad_id,
        **changes,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small and a large checkpoint of one tokenizer."""
    path = tmp_path_factory.mktemp("checkpoints")
    tokenizer = Tokenizer.train(["Q: Walk to room. A: Done."] * 4, vocab_size=270)
    for seed, (name, layers) in enumerate((("small", 1), ("large", 2))):
        config = of(tokenizer, num_layers=layers)
        hf.save(path / name, config, init(jax.random.key(seed), config))
        tokenizer.save(path / name)
    return path


def test_a_model_is_read_in_eight_bits(tmp_path):
    model = Model(init(jax.random.key(0), SMALL), SMALL, "words")
    save(tmp_path / "model", model)
    found = load(tmp_path / "model", int8=True)
    assert found[1:] == load(tmp_path / "model")[1:] == model[1:]
    jax.tree.map(np.testing.assert_array_equal, found.params, int8.quantize(model.params))
    assert found.params["layers"]["up"].dtype == "int8"
    assert found.params["layers"]["up_scale"].dtype == "float32"


def test_checkpoints_are_taken_as_they_are(folders, tmp_path):
    with open_run(tmp_path / "run"):
        text = Stage(tmp_path / "run", "text", {}).run(
            lambda out: Tokenizer.load(folders / "small").save(out / "tokenizer")
        )
        settings = pretrain.Config(
            run=tmp_path / "run",
            small_from=folders / "small",
            large_from=folders / "large",
            train=False,
        )
        done = pretrain.large_stage(settings, text)
        config, params = hf.load(folders / "large")
        found = load(done.path / MODEL)
        assert found.config == config
        jax.tree.map(np.testing.assert_array_equal, found.params, params)
        assert not (done.path / METRICS).exists()
        # By content: a folder that moved is the same, one with other weights is not.
        moved = shutil.copytree(folders / "large", tmp_path / "moved")
        elsewhere = replace(settings, large_from=moved)
        assert pretrain.large_stage(elsewhere, text).fingerprint == done.fingerprint
        hf.save(moved, config, jax.tree.map(lambda x: 2 * x, params))
        assert pretrain.large_stage(elsewhere, text).fingerprint != done.fingerprint
        with pytest.raises(EgjaxError, match="--large-from is needed"):
            pretrain.large_stage(replace(settings, large_from=None), text)


@pytest.fixture
def run(folders, tmp_path, monkeypatch):
    """A run as far as distillation and evaluation need it, in the embedded household."""
    monkeypatch.setattr(data, "find_dataset", lambda: None)
    path, tokenizer = tmp_path / "run", Tokenizer.load(folders / "small")
    held = [data.make_task(program, "core", "seen") for program in home_programs()]
    held = [task for task in held if task.predicates][:2]

    def tasks(out):
        rows = [{"name": t.name, "title": t.title, "split": t.split} for t in held]
        (out / "tasks.json").write_text(json.dumps({"goals": "core", "tasks": rows}))

    def text(out):
        tokenizer.save(out / "tokenizer")
        samples = [Text("plan", f"Q: Walk to room {i}. A:", "Done.") for i in range(4)]
        asked = [Text("counting", f"Q: Rooms {i}? A:", "1", ("1", "2")) for i in range(2)]
        for name, rows in (("samples", samples), ("questions", asked)):
            lines = [json.dumps(asdict(row)) + "\n" for row in rows]
            (out / f"{name}.jsonl").write_text("".join(lines))

    with open_run(path):
        stages = {
            name: Stage(path, name, {}).run(w) for name, w in (("tasks", tasks), ("text", text))
        }
        models = {}
        for seed, (name, layers) in enumerate((("base", 1), ("expert", 1), ("large", 2))):
            config = of(tokenizer, num_layers=layers)
            model = Model(init(jax.random.key(seed), config), config, tokenizer.fingerprint)
            models[name] = Stage(path, name, {}).run(lambda out, m=model: save(out / MODEL, m))
        yield path, stages, models


def test_stages_take_frozen_models_in_eight_bits(run):
    path, stages, models = run
    wide = pipeline.tiny()
    plan = pipeline.adjusted(wide, pipeline.Config(preset="tiny", int8=True))
    settings = replace(plan.evaluate, run=path, max_new_tokens=4, rows=2)
    assert settings.int8
    found = evaluate.stage(settings, stages["tasks"], stages["text"], models)
    record = json.loads((found.path / "outcomes.json").read_text())
    assert list(record["plans"]) == [evaluate.COPY, "base", "expert", "large", "ratio"]
    assert all(len(rows) == 2 for rows in record["plans"].values())
    assert evaluate.figures(found, 0)
    # Teachers are rounded, the student is not: its first loss is the divergence that this makes.
    losses = []
    for each in (plan, wide):
        assert each.distill is not None
        training = Training(1, 2, 64, 1e-3)
        frozen = replace(each.distill, run=path, training=training)
        done = distill.stage(
            frozen, stages["text"], *(models[name] for name in ("large", "expert", "expert"))
        )
        losses.append(json.loads((done.path / METRICS).read_text().splitlines()[0])["loss"])
        assert not int8.is_quantized(load(done.path / MODEL).params)
    assert 1e-7 < losses[0] < 1e-2
    assert abs(losses[1]) < 1e-7


def test_memory_of_a_1b_and_an_8b():
    small, large = preset("1b"), preset("8b")
    wide = tuning_bytes(small, 16, 2048, Layout(remat="full", chunked=True, accumulate=2))
    # bfloat16 without a master: weights, two moments, gradients (of two micro-batches their sum and
    # the last), and what training starts from.
    assert wide["weights"] + wide["optimizer"] + wide["gradients"] == 10 * count(small)
    assert wide["starting weights"] == 2 * count(small)
    plain = evaluation_bytes(large, small, 8, 512, 96, int8_=False)
    assert plain["πᴸ"] == 2 * count(large)
    assert plain["πᴱ, πᴺ"] == 2 * 2 * count(small)
    assert plain["decoding, scoring or probing"] == 5 * 8 * 512 * 128256 * 4
    eight = evaluation_bytes(large, small, 8, 512, 96, int8_=True)
    # Matrices of 32 layers halve; the two tables of 128,256 tokens stay, scales come along.
    matrices = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    scales = 4 * 32 * (4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096)
    assert plain["πᴸ"] - eight["πᴸ"] == matrices - scales


def test_a_device_that_is_too_small_is_refused():
    needs = {"sft": {"weights": 3 * GIB, "logits": 1 * GIB}, "evaluation": {"πᴸ": 2 * GIB}}
    remedies = {"sft": ("--rows 4", "--master bfloat16"), "evaluation": ()}
    check_fits(needs, 4 * GIB, remedies)
    check_fits(needs, None, remedies)
    with pytest.raises(EgjaxError, match=r"sft needs 4.0 GiB .*gives 3.5 \(--rows 4, or --master"):
        check_fits(needs, 3.5 * GIB, remedies)


def test_the_preset_says_what_it_lacks_before_it_starts(folders, tmp_path, monkeypatch, capsys):
    given = pipeline.Config(
        preset="card",
        run=tmp_path / "run",
        small_from=folders / "small",
        large_from=folders / "large",
    )
    with pytest.raises(EgjaxError, match="give --small-from FOLDER and --large-from FOLDER"):
        pipeline.main(replace(given, large_from=None))
    with pytest.raises(EgjaxError, match="3 rows at once do not divide a step's 16"):
        pipeline.main(replace(given, rows=3))
    with pytest.raises(EgjaxError, match="--master has no effect without --preset card"):
        pipeline.main(replace(given, preset="quick", master="bfloat16"))
    monkeypatch.setattr(pipeline, "device_bytes", lambda: 1e6)
    with pytest.raises(EgjaxError, match=r"sft needs .*--rows 4, or --master bfloat16"):
        pipeline.main(given)
    assert not (tmp_path / "run").exists()
    pipeline.main(replace(given, memory=True, json=True, int8=True))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    sizes = {row["name"]: row["value"] for row in rows}
    assert sizes["evaluation"] == pytest.approx(
        sum(value for name, value in sizes.items() if name.startswith("evaluation/"))
    )
    other = Tokenizer.train(["Q: Some other words. A: Done."] * 4, vocab_size=270)
    monkeypatch.setattr(
        pipeline.own.Start,
        "at",
        classmethod(
            lambda cls, path: (
                replace(AT(path), tokenizer=other) if path.name == "large" else AT(path)
            )
        ),
    )
    with pytest.raises(EgjaxError, match="tokenizers differ"):
        pipeline.main(replace(given, memory=True))


AT = pipeline.own.Start.at
