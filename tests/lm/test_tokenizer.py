import json

import pytest
import tokenizers

from egjax.errors import EgjaxError
from egjax.lm.tokenizer import BOS, EOS, PAD, Tokenizer

TEXTS = [
    f"{verb} to {room}. Grab {thing}. Put {thing} on table. [GRAB] <{thing}> ({number})"
    for number, verb in enumerate(("Walk", "Run", "Turn"))
    for room in ("kitchen", "home office", "bedroom")
    for thing in ("coffee", "milk", "plate", "remote control", "book")
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(iter(TEXTS), vocab_size=320)


def test_round_trip_of_any_text(tokenizer):
    for text in (*TEXTS[:5], " two  spaces\n\ttab", "Käse ☕ 家", "", "a <pad b>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_special_tokens_come_first_and_are_left_out_of_text(tokenizer):
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.vocab_size == 320
    ids = [tokenizer.bos_id, *tokenizer.encode("Walk"), tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode(ids) == "Walk"
    assert tokenizer.token_id(EOS) == 2
    assert (tokenizer.special_id(EOS), tokenizer.special_id("Walk")) == (2, None)
    with pytest.raises(EgjaxError, match="<mask>"):
        tokenizer.token_id("<mask>")


def test_training_is_deterministic_and_the_fingerprint_tells(tokenizer):
    again = Tokenizer.train(iter(TEXTS), vocab_size=320)
    other = Tokenizer.train(iter(TEXTS[:20]), vocab_size=300)
    assert again.fingerprint == tokenizer.fingerprint
    assert other.fingerprint != tokenizer.fingerprint


def test_saved_tokenizer_loads_here_and_in_transformers(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode(TEXTS[3]) == tokenizer.encode(TEXTS[3])
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXTS[3])["input_ids"] == tokenizer.encode(TEXTS[3])
    assert (theirs.pad_token, theirs.bos_token, theirs.eos_token) == (PAD, BOS, EOS)


def test_padding_and_cutting_of_a_file_are_left_out(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    file = str(tmp_path / "tokenizer.json")
    backend = tokenizers.Tokenizer.from_file(file)
    backend.enable_truncation(4)
    backend.enable_padding(pad_id=0, pad_token=PAD, length=64)
    backend.save(file)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert loaded.encode_with_ends(TEXTS[0]) == tokenizer.encode_with_ends(TEXTS[0])
    texts = [TEXTS[0], "Walk"]
    assert loaded.encode_batch(texts) == tokenizer.encode_batch(texts)


def test_an_id_beyond_a_gap_counts(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    fields = json.loads(file.read_text())
    vocabulary = fields["model"]["vocab"]
    (last,) = (token for token, number in vocabulary.items() if number == 319)
    vocabulary[last] = 330
    file.write_text(json.dumps(fields))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.vocab_size == 331
    pieces = loaded.token_bytes()
    assert (len(pieces), pieces[319]) == (331, b"")
    assert pieces[330] == tokenizer.token_bytes()[319]


def test_bad_files_and_sizes_are_refused(tmp_path):
    with pytest.raises(EgjaxError, match=r"tokenizer\.json: file is missing"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(EgjaxError, match="not a tokenizer"):
        Tokenizer.load(tmp_path)
    with pytest.raises(EgjaxError, match="259"):
        Tokenizer.train(TEXTS, vocab_size=100)
    with pytest.raises(EgjaxError, match="more text"):
        Tokenizer.train(TEXTS, vocab_size=5000)
