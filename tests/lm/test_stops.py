"""Stop strings by the automaton against searching the text."""

import dataclasses
import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egjax.errors import EgjaxError
from egjax.lm.generate import generate, pad_prompts
from egjax.lm.speculate import speculate
from egjax.lm.stops import cut, follow, stop_table
from egjax.lm.tokenizer import Tokenizer

PIECES = [b"", b"", b"", b"a", b"b", b"ab", b"ba", b"aab", b"c", b"abab", "é".encode()[:1]]
PIECES += ["é".encode()[1:], b"bb", b" a"]


@pytest.mark.parametrize(
    "strings", [["ab"], ["aba"], ["abab", "bb"], ["é"], ["c", "abcab"], ["aab", "ab", "b a"]]
)
def test_hits_are_where_the_text_first_has_a_string(strings):
    rng = random.Random(0)
    rows = [[rng.randrange(len(PIECES)) for _ in range(12)] for _ in range(200)]
    stops = stop_table(strings, PIECES, vocab_size=16)
    hits, _ = follow(stops, jnp.zeros(200, jnp.int32), jnp.array(rows))
    assert stops.hit.shape == (sum(len(s.encode()) for s in strings) + 1, 16) or len(strings) > 1
    early = 0
    for row, found in zip(rows, np.asarray(hits)):
        text, expected = b"", None
        for place, token in enumerate(row):
            text += PIECES[token]
            if any(s.encode() in text for s in strings):
                expected = place
                break
        assert (found.argmax() if found.any() else None) == expected
        early += expected is not None
    assert early > 3
    # In two parts as in one.
    begun, half = follow(stops, jnp.zeros(200, jnp.int32), jnp.array(rows)[:, :5])
    ended, _ = follow(stops, half[:, -1], jnp.array(rows)[:, 5:])
    assert np.array_equal(jnp.concatenate([begun, ended], axis=1), hits)


def test_decoding_ends_where_the_string_does(config, make_params):
    config = dataclasses.replace(config, eos_ids=())
    model = (make_params(config, scale=0.15), config)
    pieces = [bytes([97 + token % 5]) * (1 + token % 3) for token in range(40)]
    prompts = pad_prompts([[3, 9, 4], [8], [5, 6, 7]], pad_id=0, bucket=8)
    options = {"max_new_tokens": 20, "temperature": 1.0}
    free = generate([model], prompts, jax.random.key(0), **options)
    texts = [b"".join(pieces[t] for t in row.tolist()) for row in np.asarray(free.tokens)]
    string = texts[0][5:8].decode()
    stops = stop_table([string], pieces, 40)
    out = generate([model], prompts, jax.random.key(0), stops=stops, **options)
    fast = speculate(
        [model, model], prompts, jax.random.key(0), draft=1, drafts=3, stops=stops, **options
    )
    for row in range(3):
        count = int(out.mask[row].sum())
        assert out.tokens[row, :count].tolist() == free.tokens[row, :count].tolist()
        made = b"".join(pieces[t] for t in out.tokens[row, :count].tolist()).decode()
        shorter = b"".join(pieces[t] for t in out.tokens[row, : count - 1].tolist()).decode()
        assert string not in shorter
        assert bool(out.ended[row]) == (string in made) == (string in texts[row].decode())
        assert cut(made, [string]) == texts[row].decode().split(string)[0]
    assert bool(out.ended[0])
    assert np.array_equal(fast.generation.tokens, out.tokens)
    assert np.array_equal(fast.generation.mask, out.mask)


def test_long_tokens_cost_what_their_bytes_do():
    words = [f"{i:05d}".encode() for i in range(20_000)]
    strings = ["x" * 50 + "y", "0012"]
    begun = time.perf_counter()
    stop_table(strings, words, 20_000)
    short = time.perf_counter() - begun
    begun = time.perf_counter()
    stops = stop_table(strings, [*words, b"x" * 2000 + b"y"], 20_001)
    assert time.perf_counter() - begun < 5 * short + 1
    assert bool(stops.hit[0, -1])
    assert np.flatnonzero(stops.hit[0, :-1]).tolist() == [
        i for i, word in enumerate(words) if b"0012" in word
    ]


def test_cut_takes_the_first_of_several():
    assert cut("one. two! three", ["!", ". "]) == "one"
    assert cut("one", ["!"]) == "one"


def test_an_empty_string_is_refused():
    for strings in ([], ["a", ""]):
        with pytest.raises(EgjaxError, match="empty stop string"):
            stop_table(strings, PIECES, 16)


def test_bytes_of_the_projects_tokenizer_are_those_of_its_text():
    words = ["Walk to the kitchen.\nGrab milk - élan ☕.", "one two one two"] * 3
    tokenizer = Tokenizer.train(words, vocab_size=270)
    pieces = tokenizer.token_bytes()
    text = " Grab élan ☕ \t of\u00a0Ω"
    assert b"".join(pieces[i] for i in tokenizer.encode(text)).decode() == text
    assert pieces[tokenizer.eos_id] == b""
    assert sorted(p for p in pieces if len(p) == 1) == [bytes([i]) for i in range(256)]


def test_bytes_of_a_sentencepiece_vocabulary(tmp_path):
    import tokenizers

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{i:02X}>": 3 + i for i in range(256)}
    vocabulary |= {"▁": 259, "G": 260, "o": 261, "Go": 262, "▁Go": 263}
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocabulary, [("G", "o"), ("▁", "Go")], unk_token="<unk>", byte_fallback=True
        )
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    parts = tokenizers.decoders
    backend.decoder = parts.Sequence([parts.Replace("▁", " "), parts.ByteFallback(), parts.Fuse()])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode("Go Go\nGoé")
    assert 263 in ids
    assert b"".join(tokenizer.token_bytes()[i] for i in ids).decode() == "Go Go\nGoé"
    assert tokenizer.token_bytes()[2] == b""


def test_a_vocabulary_of_words_is_refused():
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(EgjaxError, match="byte-level"):
        Tokenizer(backend).token_bytes()
