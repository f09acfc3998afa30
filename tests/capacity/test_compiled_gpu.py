"""XLA's compiler for NVIDIA GPUs, where it is installed; no GPU is needed."""

import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest

from egjax.capacity import compiled
from egjax.capacity.chips import CHIPS, parse
from egjax.capacity.compiled import compile_for, devices_of, has_compiler, traced_for
from egjax.capacity.gpus import TARGETS, description
from egjax.capacity.kernels import kernels
from egjax.capacity.plan import compiled_plan
from egjax.capacity.presets import preset
from egjax.capacity.stages import Case, program
from egjax.errors import EgjaxError
from egjax.lm.config import LlamaConfig
from egjax.lm.params import count
from egjax.mesh import make_mesh
from egjax.train.layout import Layout

needs_compiler = pytest.mark.skipif(
    not has_compiler(CHIPS["h200"]), reason="JAX's plugin for CUDA is not installed"
)
CONFIG = LlamaConfig(
    512, 256, 512, 2, 4, 2, 64, max_seq_len=512, tie_embeddings=False, dtype="bfloat16"
)
LAYOUT = Layout(remat="selective", chunked=True, master="float32")
CASE = Case("sft", CONFIG, CONFIG, 8, 256, layout=LAYOUT, platform="gpu")


def test_every_gpu_is_described():
    gpus = [chip for chip in CHIPS.values() if not chip.is_tpu]
    assert {chip.name for chip in gpus} == set(TARGETS)
    for chip in gpus:
        text = description(chip)
        assert f"device_memory_size: {int(chip.memory)}" in text
        assert text.count("{") == text.count("}")
        assert re.search(r"dnn_version_info { major: \d+ minor: \d+ patch: \d+ }", text)
    hopper, ada = description(CHIPS["h100"]), description(CHIPS["rtx4090"])
    assert "major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES" in hopper
    assert "major: 8 minor: 9 feature_extension: NONE" in ada


def test_a_decoder_on_one_gpu_has_its_layers_apart():
    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    case = replace(CASE, stage="decode", new_tokens=8)
    for weights in program(case, mesh).arguments[0]:
        assert len(weights["layers"]) == 2
        assert weights["layers"][0]["gate"].shape == (256, 512)
    stacked = program(replace(case, platform="tpu"), mesh).arguments[0][0]["layers"]
    assert stacked["gate"].shape == (2, 256, 512)


def test_a_plugin_that_found_no_gpu_is_told(monkeypatch):
    from jax.experimental import topologies

    def refuse(**arguments):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    monkeypatch.setattr(compiled, "has_compiler", lambda chip: True)
    with pytest.raises(EgjaxError, match="not implemented for cuda") as error:
        devices_of(parse("h200:1"))
    assert "JAX_PLATFORMS=cpu" in (error.value.remedy or "")


def test_missing_cudnn_is_told(monkeypatch):
    def lower(*arguments):
        raise RuntimeError("cuDNN not found.")

    what = SimpleNamespace(function=SimpleNamespace(lower=lower), arguments=())
    monkeypatch.setattr(compiled, "program", lambda case, mesh: what)
    monkeypatch.setattr(compiled, "devices_of", lambda topology: jax.devices()[:1])
    with pytest.raises(EgjaxError, match=r"cuDNN is not installed \(pip install 'egjax\[cuda\]'\)"):
        compile_for(CASE, parse("h200:1"), 1, 1)


def test_programs_are_traced_as_on_a_gpu_and_forgotten():
    shape = jax.ShapeDtypeStruct((), "float32")
    seen = []
    traced = jax.jit(lambda x: seen.append(jax.default_backend()) or x)
    for _ in range(2):
        traced.lower(shape)
        with traced_for("gpu"):
            traced.lower(shape)
    here = jax.default_backend()
    assert seen == [here, "gpu", here, "gpu"]


@needs_compiler
def test_a_step_on_one_and_on_eight(tmp_path):
    path = tmp_path / "hlo.txt"
    one = compiled_plan(CASE, parse("h200:1"), 1, 1, path)
    assert one.fits
    assert one.method == "compiled"
    # Masters and moments of AdamW, float32; the batch and gradients beside.
    assert one.memory["weights"] + one.memory["optimizer"] > 0
    assert one.memory["activations"] > 0
    assert "__cudnn$fmha" in path.read_text()
    eight = compile_for(CASE, parse("h100:8"), 4, 2)
    assert eight.arguments < one.total
    assert {c.operation for c in eight.collectives} & {"all-reduce", "reduce-scatter"}


@needs_compiler
def test_a_token_reads_each_weight_once():
    """Layers that are cut out of their stack are read, written and read again."""
    config = preset("1b")
    weights = 2 * count(config)  # the embedding is the unembedding
    case = Case("decode", config, config, 1, 512, platform="gpu")
    apart = compiled_plan(case, parse("h200:1"), 1, 1).kernels
    assert apart is not None
    assert 3 * weights < apart["bytes"] < 1.03 * 3 * weights
    mesh = make_mesh(data=1, devices=devices_of(parse("h200:1")))
    with traced_for("gpu"):
        what = program(replace(case, platform="tpu"), mesh)
        text = what.function.lower(*what.arguments).compile().as_text()
    moved = sum(k.times * (k.bytes_read + k.bytes_written) for k in kernels(text, step=True))
    assert moved > 2 * 3 * weights


@needs_compiler
def test_chunked_losses_on_a_gpu_are_a_twentieth_of_the_plain_ones():
    code = [sys.executable, "-m", "experiments.bench_losses", "--compile-for", "h200:1", "--json"]
    code += ["--losses", "sft", "--dtype", "bfloat16"]
    found = subprocess.run(code, capture_output=True, text=True, check=True).stdout
    ratio = re.search(r'"loss_temp_memory/sft".*"ratio": ([\d.]+)', found)
    assert ratio is not None
    assert float(ratio.group(1)) < 0.05
