"""The programs of the README and of docs/reuse.md run as they are printed."""

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egjax.lm import hf, lora, peft
from egjax.lm.config import LlamaConfig
from egjax.lm.params import init
from egjax.lm.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/reuse.md")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def programs():
    """Heading and source of each program. Where one says that it goes on from the program
    above, it is run behind it."""
    found = []
    for page in PAGES:
        for section in re.split(r"^## ", (ROOT / page).read_text(), flags=re.MULTILINE)[1:]:
            heading, source, end = section.splitlines()[0], "", 0
            for number, block in enumerate(BLOCK.finditer(section), start=1):
                before = section[end : block.start()]
                source = (source if "go on from the program above" in before else "") + block[1]
                end = block.end()
                found.append(pytest.param(heading, source, id=f"{page}: {heading} {number}"))
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`path/to/…` of the pages: Llamas of one tokenizer and an adapter."""
    root = tmp_path_factory.mktemp("pages")
    tokenizer = Tokenizer.train(["Q: How to read? Sit.\nA:"] * 3, vocab_size=270)
    config = LlamaConfig(270, 16, 16, 2, 2, 1, 8, max_seq_len=128, eos_ids=(tokenizer.eos_id,))
    for seed, name in enumerate(("large", "expert", "base", "llama")):
        folder = root / "path" / "to" / name
        hf.save(folder, config, init(jax.random.key(seed), config))
        tokenizer.save(folder)
    settings = lora.LoraConfig(rank=2)
    adapter = lora.init(jax.random.key(9), config, settings)
    adapter = jax.tree.map(lambda x: x + 0.3, adapter)
    peft.save(root / "path" / "to" / "adapter", config, settings, adapter)
    return root


def preferences(names):
    assert names["value"] < 0.3 < np.log(2)
    assert names["metrics"].accuracy.all()


def decoded(names):
    assert names["plans"].mask.any(axis=1).all()
    if "sooner" in names:  # the second program, behind the first
        assert np.array_equal(names["sooner"].generation.tokens, names["plans"].tokens)
        assert names["four"].scores.shape == (2, 4)
        assert names["lengths"].tolist() == [len(names["given"][0][1])]


def distilled(names):
    config, student = hf.load("distilled")
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), student, names["student"])
    assert config == names["config"]
    assert 1e-4 < max(jax.tree.leaves(moved)) < 1e-2


def taught(names):
    if "step" in names:  # of nnx, not of Tunix
        assert names["step"](names["model"], names["optimizer"]) < np.log(270)
        _, params = hf.load("trained")
        _, before = hf.load("path/to/llama")
        assert not np.array_equal(params["embedding"], before["embedding"])


def stored_once(names):
    assert names["state"].step == 3
    if "teacher" not in names:  # the first program
        assert names["metrics"]["loss"] < np.log(2)


def written(names):
    assert names["state"].step == 3
    assert 0 < names["metrics"]["completion_tokens"] <= 12


CHECKS = {
    "A preference loss on your own arrays": preferences,
    "π̄ from Hugging Face folders": decoded,
    "From one folder to another": distilled,
    "References and teachers computed once": stored_once,
    "Distillation on what a model writes": written,
    "Flax and Tunix": taught,
}


@pytest.mark.parametrize(("heading", "source"), programs())
def test_a_program_runs_as_it_is_printed(heading, source, folders, monkeypatch):
    if "from tunix" in source and importlib.util.find_spec("tunix") is None:
        pytest.skip("Tunix is not installed")
    monkeypatch.chdir(folders)
    names = {}
    exec(compile(source, heading, "exec"), names)
    for name, value in names.items():
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.floating):
            assert np.isfinite(value).all(), name
    CHECKS.get(heading, lambda names: None)(names)


def test_the_pages_have_programs():
    pages = [str(program.id).split(":")[0] for program in programs()]
    assert pages.count("README.md") >= 5
    assert pages.count("docs/reuse.md") >= 8
    assert {program.values[0] for program in programs()} >= CHECKS.keys()
