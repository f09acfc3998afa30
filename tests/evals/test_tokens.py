"""What models think at every token, against full passes by hand."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egjax.errors import EgjaxError
from egjax.evals.tokens import Choice, Step, as_html, as_png, as_table, side_by_side
from egjax.lm import ensemble
from egjax.lm.config import LlamaConfig
from egjax.lm.model import forward, unembed
from egjax.lm.params import init
from egjax.lm.ratio import ratio_combine
from egjax.lm.tokenizer import Tokenizer
from egjax.losses import behaviour_ratio

NAMES = ("πᴸ", "πᴱ", "πᴺ", "π̄")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["Walk to fridge. Walk to milk.\nGrab milk."] * 3, vocab_size=275)


def test_choices_are_those_of_full_passes(tokenizer):
    config = LlamaConfig(275, 16, 16, 1, 1, 1, 16, max_seq_len=64)
    keys = jax.random.split(jax.random.key(0), 3)
    # Larger than at the start of training, so that the models differ.
    models = [(jax.tree.map(lambda leaf: 5 * leaf, init(key, config)), config) for key in keys]
    prompt = tokenizer.encode("Walk to")
    completion = [*tokenizer.encode(" milk.\n"), tokenizer.eos_id]
    steps = side_by_side(
        models, NAMES, tokenizer, prompt, completion, combine=ratio_combine(alpha=0.5), top=3
    )
    assert "".join(step.token for step in steps) == "·milk.⏎<eos>"
    row = jnp.array([[*prompt, *completion]])
    logits = [forward(p, c, row)[0] for p, c in models]
    logits.append(behaviour_ratio(*logits, alpha=0.5))
    for name, found in zip(NAMES, logits):
        shares = np.asarray(jax.nn.softmax(found))
        for place, (step, token) in enumerate(zip(steps, completion), start=len(prompt) - 1):
            best = np.argsort(-shares[place])[:3]
            np.testing.assert_allclose(
                [c.probability for c in step.choices[name]], shares[place, best], rtol=1e-3
            )
            assert step.probability[name] == pytest.approx(shares[place, token], rel=1e-3)
            assert step.rank[name] == int((shares[place] > shares[place, token]).sum())


def test_the_context_holds_and_only_the_completion_is_read_off(tokenizer, monkeypatch):
    # One token short of what it would be rounded up to.
    config = LlamaConfig(275, 16, 16, 1, 1, 1, 16, max_seq_len=63)
    params = init(jax.random.key(0), config)
    models = [(jax.tree.map(lambda leaf: 5 * leaf, params), config)]
    row = (tokenizer.encode("Walk to milk. Walk to fridge.\n") * 9)[:63]
    shapes = []

    def seen(params, config, final):
        shapes.append(final.shape)
        return unembed(params, config, final)

    monkeypatch.setattr(ensemble, "unembed", seen)
    steps = side_by_side(models, NAMES[:1], tokenizer, row[:50], row[50:], top=1, bucket=16)
    assert shapes == [(1, 16, 16)]
    logps = np.asarray(jax.nn.log_softmax(forward(*models[0], jnp.array([row]))[0]))
    for place, (step, token) in enumerate(zip(steps, row[50:], strict=True), start=49):
        assert step.probability["πᴸ"] == pytest.approx(np.exp(logps[place, token]), rel=1e-3)
    assert side_by_side(models, NAMES[:1], tokenizer, row, []) == []
    with pytest.raises(EgjaxError, match="64 tokens exceeds the model's context of 63"):
        side_by_side(models, NAMES[:1], tokenizer, row, [3])
    for top in (0, 276):
        with pytest.raises(EgjaxError, match=f"{top} tokens to show .1 to 275"):
            side_by_side(models, NAMES[:1], tokenizer, row[:9], [3], top=top)


@pytest.fixture
def steps():
    def step(token, *shares):
        choices = {n: (Choice("·cup", s), Choice("<b>$x$", 1 - s)) for n, s in zip(NAMES, shares)}
        rank = {n: 0 if token == "·cup" else 7 for n in NAMES}
        return Step(token, choices, rank, {n: 0.01 for n in NAMES})

    return [step("·cup", 0.2, 0.9, 0.3, 0.6), step("·far", 0.5, 0.05, 0.5, 0.1)]


def test_the_table_tells_tokens_shares_and_ranks(steps):
    import rich.console

    def printed(steps, width):
        console = rich.console.Console(width=width, record=True, file=io.StringIO())
        console.print(as_table(steps, width=width))
        return console.export_text()

    text = printed(steps, 200)
    assert "·cup 90" in text
    assert "<b>$x$ 10" in text
    assert "(no. 8: 1.0)" in text
    assert "·far" in text
    # A narrow one keeps a line for each token, and of it what came.
    narrow = printed(steps, 84).splitlines()
    (cup,) = (line for line in narrow if line.startswith("  ·cup"))
    (far,) = (line for line in narrow if line.startswith("  ·far"))
    assert "·cup 20" in cup
    assert "<b>$x$ 80" not in cup
    assert far.count("(no. 8: 1.0)") == 4
    assert "<b>$x$ 95" not in far
    assert len(narrow) == len(printed(steps + steps[1:] * 9, 84).splitlines())
    assert "·far ×10" in printed(steps + steps[1:] * 9, 84)


def test_the_page_is_escaped_and_whole(steps):
    page = as_html(steps, title="A & B", footer="<done>")
    assert "&lt;b&gt;$x$" in page
    assert "<b>" not in page
    assert "A &amp; B" in page
    assert page.count("<tr>") == 3
    assert "width:90.00%" in page
    assert "src=" not in page


def test_the_picture_is_a_png_and_grows_with_the_tokens(steps):
    from PIL import Image

    few = Image.open(io.BytesIO(as_png(steps, title="a $ title", footer="b")))
    many = Image.open(io.BytesIO(as_png(steps * 5, title="a $ title", footer="b")))
    assert few.format == "PNG"
    wrapped = Image.open(io.BytesIO(as_png(steps, title="word " * 200, footer="b")))
    assert (wrapped.width, wrapped.height > few.height) == (few.width, True)
    assert many.height > few.height
    assert many.width == few.width
    assert len(set(few.convert("RGB").getdata())) > 50
