"""The scripts as their users call them, small."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from egjax.lm.config import LlamaConfig
from egjax.lm.params import count
from egjax.sim.robothow import find_dataset
from experiments import pretrain

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "robothow_transitions.jsonl.gz"


def call(module: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        check=False,
    )


def rows(output: str) -> dict[str, dict]:
    return {row["name"]: row for row in map(json.loads, output.splitlines())}


@pytest.fixture(scope="module")
def needs_robothow():
    if find_dataset() is None:
        pytest.skip("the RobotHow data is not installed")


def test_conformance_agrees_and_notices_a_difference(tmp_path, needs_robothow):
    with gzip.open(GOLDEN, "rt") as file:
        lines = file.read().splitlines()[:2]
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text("\n".join(lines))
    done = call("conformance", "--golden", good, "--json")
    assert done.returncode == 0, done.stderr
    found = rows(done.stdout)
    assert found["agreement_accepted"]["value"] == found["agreement_refused"]["value"] == 1
    assert found["agreement_accepted"]["n"] > 20
    assert any(name.startswith("agreement_accepted_walk") for name in found)

    episode = json.loads(lines[0])
    refused = next(s for s in episode["steps"] if not s["ok"])
    refused["message"] = "because"
    bad.write_text(json.dumps(episode))
    done = call("conformance", "--golden", bad, "--json")
    assert done.returncode == 1
    assert rows(done.stdout)["agreement_refused"]["value"] < 1
    assert "reference because" in done.stderr


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("conformance", ["--golden", "missing.jsonl"], "missing.jsonl"),
        ("collect", ["--tasks", "missing.txt"], "missing.txt: cannot read the task list"),
        ("replay", ["--robothow", "nowhere"], "nowhere: no RobotHow programs"),
        ("eai", [], "no interpreter with eai-eval 1.0.5"),
        ("sft", ["--run", "{tmp}/new"], "no finished stage 'text'"),
        (
            "pretrain",
            ["--small-from", "folder", "--small-size.num-layers", "2"],
            "--small-size has no effect with --small-from",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, module, arguments, message):
    done = call(module, *[str(a).format(tmp=tmp_path) for a in arguments])
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in done.stderr


def test_models_from_scratch_have_the_sizes_they_claim():
    sizes = pretrain.Config().small_size, pretrain.Config().large_size
    small, large = (count(LlamaConfig(1024, **dataclasses.asdict(size))) for size in sizes)
    assert 0.4e6 < small < 0.7e6
    assert 3.5e6 < large < 4.7e6
    assert min(size.num_layers for size in sizes) >= 4


def test_every_script_tells_its_options():
    scripts = [p.stem for p in (ROOT / "experiments").glob("*.py")]
    helpers = {
        "__init__",
        "common",
        "data",
        "experience",
        "lease",
        "models",
        "own",
        "shards",
        "training",
    }
    # In one process: each would import JAX anew, two seconds a script.
    program = """
import io, runpy, sys
from contextlib import redirect_stdout
for module in sys.argv[1:]:
    sys.argv, code = [module, "--help"], None
    with redirect_stdout(io.StringIO()) as said:
        try:
            runpy.run_module(f"experiments.{module}", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
    assert code == 0, (module, code)
    assert "options" in said.getvalue(), module
"""
    modules = sorted(set(scripts) - helpers)
    done = subprocess.run(
        [sys.executable, "-c", program, *modules],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A tiny run that was stopped by SIGTERM on the way and then continued."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    command = [sys.executable, "-m", "experiments.pipeline", "--preset", "tiny", "--run", str(run)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    while not (run / "collect" / ".stage.json").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    stopped = process.communicate(timeout=120)[1]
    code = process.returncode
    done = call("pipeline", "--preset", "tiny", "--run", run)
    return run, code, stopped, done


def test_a_stopped_pipeline_goes_on_and_ends_with_a_report(pipeline):
    run, code, stopped, done = pipeline
    assert code == 143
    assert "continue with the same command" in stopped
    assert done.returncode == 0, done.stderr[-3000:]
    assert "collect: kept from an earlier run" in done.stderr
    page = (run / "report" / "report.html").read_text()
    assert "<img" in page
    assert 'src="http' not in page  # readable without a server
    assert "<link" not in page
    results = json.loads((run / "report" / "results.json").read_text())
    names = [model["name"] for model in results["models"]]
    assert names[:6] == ["πᴺ", "πᴱ", "πᴸ", "π̄", "distilled", "+ DPO"]
    for model in results["models"]:
        for score in model["scores"]:
            assert score["success"]["n"] > 0
            assert score["success"]["low"] <= score["success"]["value"] <= score["success"]["high"]
    search = next(m for m in results["models"] if m["name"] == "search")
    assert search["scores"][0]["success"]["value"] > 0
    manifest = json.loads((run / "report" / "manifest.json").read_text())
    assert manifest["seeds"] == [0]
    assert {stage["name"] for stage in manifest["stages"]} >= {"tasks", "collect", "seed0/sft"}


def test_experience_is_collected_in_shards_with_a_card(pipeline):
    from egjax.experience.records import KINDS, Trajectory
    from egjax.experience.tfds import read

    run, *_ = pipeline
    shards = sorted((run / "collect_shards").iterdir())
    assert [path.name for path in shards] == ["00000", "00001"]
    found = list(read(Trajectory, run / "collect" / "experience"))
    kept = [line for path in shards for line in (path / "trajectories.jsonl").open()]
    assert len(found) <= len(kept)
    for one in found:
        assert one.kind in KINDS[one.label]
        assert one.wanted
        assert len(one.rewards) == len(one.values) == len(one.visits) == one.length
        assert len(one.refusals) == one.length
        if one.label in ("positive", "hindsight"):
            assert sum(r > 0 for r in one.rewards) > 0
            assert not any(one.refusals)
    assert any(max(one.visits, default=0) > 1 for one in found if one.label == "failed")
    made = [one for one in found if one.kind in ("omission", "order")]
    assert any(reason for one in made for reason in one.refusals)
    assert {one.label for one in found} == set(KINDS)
    assert len({(one.task, one.wanted, one.script) for one in found}) == len(found)
    card = json.loads((run / "collect" / "card.json").read_text())
    assert sum(card["trajectories"].values()) == len(found)
    assert card["tasks"] == 8
    assert "![lengths](card/lengths.png)" in (run / "collect" / "CARD.md").read_text()
    assert (run / "collect" / "card" / "values.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_same_seed_gives_the_same_results(pipeline, tmp_path):
    """Stopped and continued or in one go: every text, weight, plan and figure is the same."""
    run, *_ = pipeline
    again = tmp_path / "again"
    done = call("pipeline", "--preset", "tiny", "--run", again)
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = contents(run), contents(again)
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == []
    assert {name.split("/")[0] for name in before} >= {"tasks", "collect", "text", "seed0"}


PROVENANCE = {
    "seconds",
    "steps_per_second",
    "tokens_per_second",
    "started",
    "kept",
    "code",
    "command",
    "commit",
    "dirty",
}


def contents(run: Path) -> dict[str, object]:
    """What a run has found, by file, without the times that it took."""
    from experiments.models import load

    found: dict[str, object] = {}
    for path in sorted(run.rglob("*.json*")):
        name = path.relative_to(run).as_posix()
        if not path.name.startswith(".") and "/model/" not in name and "/checkpoints/" not in name:
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            found[name] = timeless([json.loads(line) for line in lines])
    for path in sorted(run.rglob("model")):
        leaves = jax.tree.leaves(load(path).params)
        found[path.relative_to(run).as_posix()] = [np.asarray(leaf).tobytes() for leaf in leaves]
    return found


def timeless(value: object) -> object:
    """Without what may differ from run to run: times, rates, stages at hand, command, commit."""
    if isinstance(value, dict):
        if value.get("unit") == "s":
            return value | {"value": None}
        return {k: timeless(v) for k, v in value.items() if k not in PROVENANCE}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def test_a_finished_pipeline_does_nothing_again(pipeline):
    run, *_ = pipeline
    before = (run / "seed0" / "sft" / "metrics.jsonl").stat().st_mtime_ns
    done = call("pipeline", "--preset", "tiny", "--run", run, "--json")
    assert done.returncode == 0
    assert ": starts" not in done.stderr
    assert (run / "seed0" / "sft" / "metrics.jsonl").stat().st_mtime_ns == before
    assert all("value" in row for row in map(json.loads, done.stdout.splitlines()))


def test_no_unseen_activity_is_named_in_any_training_text(pipeline):
    from egjax.experience.prompts import mentions

    run, *_ = pipeline
    unseen = json.loads((run / "tasks" / "tasks.json").read_text())["unseen"]
    assert unseen
    for name in ("general", "samples", "pairs"):
        for line in (run / "text" / f"{name}.jsonl").read_text().splitlines():
            text = " ".join(str(v) for v in json.loads(line).values())
            assert mentions(text, unseen) is None


def test_a_vocabulary_that_does_not_match_is_refused(pipeline, tmp_path):
    run, *_ = pipeline
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    note = copy / "seed0" / "sft" / "model" / "metadata" / "metadata"
    record = json.loads(note.read_text())
    record["tokenizer"] = "0" * len(record["tokenizer"])
    note.write_text(json.dumps(record))
    shutil.rmtree(copy / "seed0" / "distill")
    done = call("distill", "--run", copy)
    assert done.returncode == 2
    assert "tokenizers differ" in done.stderr
    assert (copy / "seed0" / "sft" / "model").is_dir()


def test_a_hugging_face_model_takes_the_place_of_a_pretrained_one(pipeline, tmp_path):
    from egjax.lm import hf
    from egjax.lm.tokenizer import Tokenizer
    from experiments.models import load

    run, *_ = pipeline
    copy, folder = tmp_path / "copy", tmp_path / "mine"
    shutil.copytree(run, copy)
    ours = load(run / "seed0" / "pretrain_small" / "model")
    hf.save(folder, ours.config, ours.params)
    short = [f"--{m}.{k}={v}" for m in ("small", "large") for k, v in (("steps", 1), ("batch", 1))]
    done = call("pretrain", "--run", copy, "--seed", 1, "--small-from", folder, *short)
    assert done.returncode == 2
    assert "tokenizer.json: file is missing" in done.stderr

    Tokenizer.load(run / "text" / "tokenizer").save(folder)
    done = call("pretrain", "--run", copy, "--seed", 1, "--small-from", folder, *short)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = load(copy / "seed1" / "pretrain_small" / "model")
    assert theirs.config == ours.config
    assert theirs.tokenizer == ours.tokenizer


def test_an_unreadable_checkpoint_is_told(pipeline, tmp_path):
    run, *_ = pipeline
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for file in (copy / "seed0" / "distill" / "model" / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(b"\0" * file.stat().st_size)
    shutil.rmtree(copy / "seed0" / "dpo")
    done = call("dpo", "--run", copy)
    assert done.returncode == 2
    assert len([x for x in done.stderr.splitlines() if x.startswith("error: ")]) == 1
