"""Constrained decoding: only what is allowed, and else the model's own choice."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from egjax.errors import EgjaxError
from egjax.lm.constrain import Sentences, Vocabulary, constrained
from egjax.lm.generate import generate, pad_prompts
from egjax.lm.model import forward
from egjax.lm.ratio import ratio_combine

TEXTS = ["", "", "", *"abcdefghij .", "ab", "cd", " a", " ab", "d.", "ef.", " e", "bc", "x", " c"]
PIECES = [text.encode() for text in TEXTS]
PROMPTS = [[3, 9, 4], [8], [5, 6, 7, 8, 9, 10, 11]]
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model(config, make_params):
    config = dataclasses.replace(config, eos_ids=(2,))
    return make_params(config, scale=0.15), config


def choice(said):
    """Depends on what was said before, as a simulator's answer does."""
    return ["abcd.", "ab.", "ef."] if len(said) % 2 == 0 else ["cab.", f"{said[-1][0]}d."]


def limited(limit):
    return lambda said: choice(said) if len(said) < limit else []


def everything(limit, said=()):
    """All texts of up to so many sentences."""
    out = {"".join(f" {sentence}" for sentence in said)} if said else set()
    for sentence in limited(limit)(said):
        out |= everything(limit, (*said, sentence))
    return out


@pytest.mark.parametrize("limit", [2, 3])
def test_allowed_tokens_are_those_along_an_allowed_text(limit):
    words = Vocabulary(PIECES, 40, (2,))
    texts = everything(limit)
    assert len(texts) > 8
    for seed in range(40):
        rng, grammar, made = np.random.default_rng(seed), Sentences(words, limited(limit)), ""
        token = None
        while token != 2:
            allowed = np.flatnonzero(grammar.allowed()).tolist()
            along = {
                token
                for token, piece in enumerate(TEXTS)
                if piece and any(text.startswith(made + piece) for text in texts)
            }
            assert set(allowed) == along | ({2} if made in texts else set())
            token = int(rng.choice(allowed))
            grammar.advance(token)
            made += TEXTS[token]
        assert made in texts
        assert "".join(f" {sentence}" for sentence in grammar.said) == made


def test_decoded_texts_are_allowed_and_the_likeliest_step_by_step(model, make_params):
    _, config = model
    models = [model, (make_params(config, 4), config), (make_params(config, 5), config)]
    prompts = pad_prompts(PROMPTS, pad_id=0, bucket=8, rows=4)
    words = Vocabulary(PIECES, 40, config.eos_ids)
    grammars = [Sentences(words, limited(3)) for _ in PROMPTS]
    out = constrained(
        models, prompts, KEY, grammars, max_new_tokens=24, combine=ratio_combine(plausible=0.1)
    )
    assert out.ended[:3].all()
    for row, grammar in enumerate(grammars):
        tokens = np.asarray(out.tokens[row])[np.asarray(out.mask[row])]
        assert tokens[-1] == 2
        text = "".join(TEXTS[token] for token in tokens)
        assert text == "".join(f" {sentence}" for sentence in grammar.said)
        assert text in everything(3)
    assert not out.mask[3].any()


@dataclasses.dataclass
class Anything:
    size: int

    def allowed(self):
        return np.ones(self.size, bool)

    def advance(self, token):
        pass


def test_everything_allowed_is_plain_decoding(model):
    prompts = pad_prompts(PROMPTS, pad_id=0, bucket=8, rows=4)
    options = {"max_new_tokens": 8, "temperature": 0.8, "top_p": 0.9}
    plain = generate([model], prompts, KEY, **options)
    out = constrained([model], prompts, KEY, [Anything(40)] * 3, **options)
    for ours, theirs in itertools.zip_longest(jax.tree.leaves(out), jax.tree.leaves(plain)):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@dataclasses.dataclass
class Few:
    ids: tuple[int, ...]

    def allowed(self):
        return np.isin(np.arange(40), self.ids)

    def advance(self, token):
        assert token in self.ids


@pytest.mark.parametrize("temperature", [0.0, 1e-40, 0.3, 1.0])
def test_a_plausible_set_is_that_of_the_allowed_tokens(model, make_params, temperature):
    config = dataclasses.replace(model[1], eos_ids=())
    models = [(make_params(config, seed, scale=0.4), config) for seed in (3, 4, 5)]
    prompts = pad_prompts([[3, 9, 4]] * 6, pad_id=0, bucket=4)
    plausible = 0.4
    # By hand: of the allowed tokens, those that the large model gives two fifths of the best's.
    read = [np.asarray(forward(p, c, prompts.tokens[:1, 1:]))[0, -1] for p, c in models]
    allowed = tuple(np.argsort(-read[0])[[12, 13, 30]].tolist())
    large, expert, other = (x[list(allowed)] for x in read)
    inside = large >= large.max() + np.log(plausible)
    scores = np.where(inside, large + expert - other, -np.inf)
    # The large model alone would have none of them.
    assert large.max() < read[0].max() + np.log(plausible)
    out = constrained(
        models,
        prompts,
        KEY,
        [Few(allowed)] * 6,
        max_new_tokens=3,
        combine=ratio_combine(plausible=plausible),
        temperature=temperature,
    )
    tokens = np.asarray(out.tokens)
    assert set(tokens.flat) <= set(allowed)
    firsts = set(tokens[:, 0].tolist())
    assert firsts <= {token for token, good in zip(allowed, inside) if good}
    if temperature < 0.1:
        assert firsts == {allowed[int(scores.argmax())]}
    assert (np.asarray(out.logps) == -np.inf).any()


def test_bad_settings_are_refused(model):
    prompts = pad_prompts(PROMPTS, pad_id=0, bucket=8)
    with pytest.raises(EgjaxError, match="1 grammars for 3 prompts"):
        constrained([model], prompts, KEY, [Anything(40)], max_new_tokens=4)
    grammar = Sentences(Vocabulary(PIECES, 40, (2,)), lambda said: ["ab."])
    with pytest.raises(EgjaxError, match="not allowed"):
        grammar.advance(PIECES.index(b"x"))
