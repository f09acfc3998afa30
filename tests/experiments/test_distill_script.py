"""Divergences, prefixes and stored teachers of distillation from the command line."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import codes, launch

from egjax import losses
from egjax.errors import EgjaxError
from egjax.lm import hf
from egjax.losses import distill as divergences
from egjax.train.layout import Layout
from egjax.train.sampling import Sampling
from experiments import distill, training
from experiments.training import Training

SHORT = Training(steps=3, batch=4, length=48, learning_rate=1e-2, save_every=1)
EIGHT = Sampling(max_new_tokens=8)
WANT = [
    ({}, losses.reverse_kl),
    ({"divergence": "forward"}, losses.forward_kl),
    ({"divergence": "jsd", "beta": 0.3}, partial(losses.generalised_jsd, beta=0.3)),
    ({"divergence": "skewed-forward", "skew": 0.3}, partial(losses.skewed_forward_kl, skew=0.3)),
    ({"divergence": "skewed-reverse"}, losses.skewed_reverse_kl),
]


@pytest.mark.parametrize(("options", "want"), WANT)
def test_options_reach_the_divergence(options, want):
    student, teacher = jax.random.normal(jax.random.key(0), (2, 5, 11))
    divergence, terms = distill.Config(**options).measure()
    expected = want(student, teacher)
    np.testing.assert_array_equal(divergence(student, teacher), expected)
    logps = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    np.testing.assert_allclose(terms(*logps).sum(-1), expected, rtol=1e-5)


def test_every_divergence_can_be_chosen():
    assert set(get_args(get_type_hints(distill.Config)["divergence"])) == set(distill.DIVERGENCES)
    names = {name for name in divergences.__all__ if f"{name}_terms" in divergences.__all__}
    known = {function for function, *_ in distill.DIVERGENCES.values()}
    assert {getattr(losses, name) for name in names} == known


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": 0.0}, r"--temperature: 0.0 is not in \(0, inf\)"),
        ({"divergence": "jsd", "beta": 1.5}, r"--beta: 1.5 is not in \[0, 1\]"),
        ({"divergence": "skewed-forward", "skew": 1.0}, r"--skew: 1.0 is not in \(0, 1\)"),
        ({"beta": 0.5}, "--beta has no effect with --divergence reverse"),
        ({"sampling": EIGHT}, "--sampling has no effect with --prefixes data"),
        ({"prefixes": "student", "stored_top_k": 4}, "--stored-top-k is of the data's prefixes"),
        ({"stored_top_k": 0}, "--stored-top-k: 0 is not in"),
        ({"stored_folder": "x"}, "no effect without --stored-top-k"),
    ],
)
def test_settings_without_sense_are_refused(options, said):
    with pytest.raises(EgjaxError, match=said):
        distill.Config(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"clip": 0.0}, r"--ratio\.clip: 0.0 is not in \(0, inf\)"),
        ({"plausible": 1.1}, r"--ratio\.plausible: 1.1 is not in \(0, 1\]"),
        ({"alpha": -1.0}, r"--ratio\.alpha: -1.0"),
    ],
)
def test_ratios_out_of_range_are_refused(options, said):
    with pytest.raises(EgjaxError, match=said):
        distill.Ratio(**options)


@pytest.fixture
def config(folders, tmp_path):
    names = {"large": "large", "expert": "expert", "anti_expert": "anti"}
    places = {option: folders / name for option, name in names.items()}
    return distill.Config(
        data=folders / "samples.jsonl", run=tmp_path / "run", training=SHORT, **places
    )


def lines(done):
    return [json.loads(line) for line in (done.path / "metrics.jsonl").read_text().splitlines()]


def test_prefixes_of_the_student_and_a_stopped_run(config, tmp_path, monkeypatch):
    """A run that was stopped on the way ends with the weights of one that was not."""
    config = replace(config, prefixes="student", sampling=replace(EIGHT, share=0.6))
    whole = distill.own_stage(config)
    assert all(0 < row["completion_tokens"] <= 8 for row in lines(whole))
    assert "tokens_per_second" not in lines(whole)[-1]  # what is sampled is not counted
    config, writers = replace(config, run=tmp_path / "stopped"), training.writers

    @contextmanager
    def stopping(*arguments, **options):
        with writers(*arguments, **options) as log:

            def stop(step, metrics):
                log(step, metrics)
                if step == 2:
                    raise KeyboardInterrupt

            yield stop

    monkeypatch.setattr(training, "writers", stopping)
    with pytest.raises(KeyboardInterrupt):
        distill.own_stage(config)
    monkeypatch.undo()
    done = distill.own_stage(config)
    found, want = (hf.load(stage.path / "model")[1] for stage in (done, whole))
    jax.tree.map(np.testing.assert_array_equal, found, want)
    assert [row["step"] for row in lines(done)] == [1, 2, 3]
    assert [row["loss"] for row in lines(done)] == [row["loss"] for row in lines(whole)]


def paths(config):
    return {name: getattr(config, name) for name in ("data", "large", "expert", "anti_expert")}


def test_prefixes_of_the_teacher(config, tmp_path):
    config = replace(config, prefixes="teacher", sampling=EIGHT, divergence="forward")
    rows = lines(distill.own_stage(config))
    assert all(row["loss"] > 0 and 0 < row["completion_tokens"] <= 8 for row in rows)
    with pytest.raises(EgjaxError, match="no prompt leaves room for 48 tokens in rows of 48"):
        distill.own_stage(replace(config, sampling=Sampling(max_new_tokens=48), run=tmp_path / "x"))
    with pytest.raises(EgjaxError, match="--stored-top-k: 999 of "):
        distill.own_stage(
            distill.Config(stored_top_k=999, run=tmp_path / "x", training=SHORT, **paths(config))
        )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("chunked", [False, True])
def test_a_stored_teacher(config, chunked, tmp_path, monkeypatch):
    layout = Layout(chunked=chunked)
    config = replace(config, training=replace(SHORT, layout=layout), temperature=1.5)
    exact = lines(distill.own_stage(config))
    given, train = [], distill.train
    monkeypatch.setattr(
        distill, "train", lambda *a, **o: (given.append(o["frozen"]), train(*a, **o))
    )
    size = hf.load(config.large)[0].vocab_size - 3  # without padded columns
    folder = tmp_path / "top"
    few = replace(config, stored_top_k=size - 1, stored_folder=folder, run=tmp_path / "other")
    for row, want in zip(lines(distill.own_stage(few)), exact, strict=True):
        np.testing.assert_allclose(row["loss"], want["loss"], rtol=1e-3)
    assert given == [None]
    ids = np.load(folder / "ids.npy")
    assert ids.shape[1:] == (48, size - 1)
    assert ids.max() < size
    if chunked:
        with pytest.raises(EgjaxError, match="stored for another settings"):
            distill.own_stage(replace(few, temperature=1.0))
        swapped = replace(few, expert=config.anti_expert, anti_expert=config.expert)
        with pytest.raises(EgjaxError, match="stored for another model"):
            distill.own_stage(swapped)


@pytest.mark.parametrize("more", [{}, {"stored_top_k": 9}])
def test_padding_of_teachers_does_not_matter(config, tmp_path, more):
    """Of πᴱ there are columns that nothing writes and it likes best, of πᴺ none but its tokens."""
    config = replace(config, **more)
    want = distill.own_stage(config)
    plain, params = hf.load(config.expert)
    more = {name: ((0, 9), (0, 0)) for name in ("embedding", "unembedding")}
    more["unembedding"] = more["unembedding"][::-1]
    for name in params.keys() & more.keys():
        params[name] = jnp.pad(params[name], more[name], constant_values=9.0)
    hf.save(tmp_path / "expert", replace(plain, vocab_size=plain.vocab_size + 9), params)
    tokens = plain.vocab_size - 3
    plain, params = hf.load(config.anti_expert, vocab_size=tokens)
    hf.save(tmp_path / "anti", plain, params)
    for name, source in (("expert", config.expert), ("anti", config.anti_expert)):
        shutil.copy(source / "tokenizer.json", tmp_path / name)
    places = {"expert": tmp_path / "expert", "anti_expert": tmp_path / "anti"}
    found = distill.own_stage(replace(config, run=tmp_path / "other", **places))
    assert [row["loss"] for row in lines(found)] == [row["loss"] for row in lines(want)]
    models = [hf.load(stage.path / "model") for stage in (found, want)]
    assert models[0][0] == models[1][0]
    jax.tree.map(np.testing.assert_array_equal, models[0][1], models[1][1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice", [["--prefixes", "student", "--sampling.max-new-tokens", "8"], ["--stored-top-k", "9"]]
)
def test_two_processes_distil_what_one_does(config, tmp_path, choice):
    """On one file system; what is stored is computed by both and written once."""
    arguments = ["-m", "experiments.distill", "--data", config.data, "--large", config.large]
    arguments += ["--expert", config.expert, "--anti-expert", config.anti_expert, *choice]
    settings = {"steps": 3, "batch": 4, "length": 48, "learning-rate": 1e-2}
    arguments += [f"--training.{name}={value}" for name, value in settings.items()]
    found = []
    for count in (1, 2):
        run, logs = tmp_path / f"run{count}", tmp_path / f"logs{count}"
        ended = codes(launch([*map(str, arguments), "--run", str(run)], count, logs=logs), 600)
        said = "".join(path.read_text() for path in logs.glob("*.err"))
        assert ended == [0] * count, said[-3000:]
        found.append(hf.load(run / "seed0" / "own_distill" / "model")[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *found)
