"""JSON lines of one's own become the tokens that were meant, and bad lines are named."""

import itertools
import json

import pytest

from egjax.errors import EgjaxError
from egjax.lm.config import LlamaConfig
from egjax.lm.template import ChatTemplate
from egjax.lm.tokenizer import Tokenizer
from egjax.train.jsonl import has_messages, read_pairs, read_samples

PLAIN = ChatTemplate()
MARKED = ChatTemplate(
    "{{ bos_token }}"
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}",
    (("bos_token", "<bos>"), ("eos_token", "<eos>")),
)
# Lists what may be called, and writes calls.
CALLING = ChatTemplate(
    "{% for t in tools or [] %}<{{ t.name }}>{% endfor %}"
    "{% for m in messages %}[{{ m.role }}] {{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.name }}(){% endfor %};{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
FOUND = {"role": "tool", "content": "a cup", "tool_calls": None}
TOOLS = [{"name": "look"}, {"name": "go"}]
ASK = {"role": "user", "content": "Fetch a cup."}
GOOD = {"role": "assistant", "content": "Walk to kitchen."}
BAD = {"role": "assistant", "content": "Walk to bed."}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["Walk to kitchen. Grab cup. user assistant"] * 4, vocab_size=280)


@pytest.fixture(scope="module")
def config(tokenizer):
    return LlamaConfig(
        vocab_size=280,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        bos_id=tokenizer.bos_id,
        eos_ids=(tokenizer.eos_id,),
    )


def write(path, *rows):
    path.write_text("\n\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


class Spell:
    """Tokens as text with their marks, `|` where what is learnt (or answered) begins and ends."""

    def __init__(self, tokenizer):
        self._backend = tokenizer._backend

    def __call__(self, ids):
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def sample(self, sample):
        parts = itertools.groupby(zip(sample.tokens, sample.mask), key=lambda item: item[1])
        return "|".join(self([token for token, _ in part]) for _, part in parts)


@pytest.mark.parametrize(
    ("row", "template", "want"),
    [
        ({"text": "Grab cup."}, PLAIN, "<bos>|Grab cup.<eos>"),
        ({"prompt": "Q: é A:", "completion": " Walk."}, PLAIN, "<bos>Q: é A:| Walk.<eos>"),
        ({"prompt": "", "completion": "Walk."}, PLAIN, "<bos>|Walk.<eos>"),
        (
            {"messages": [ASK, GOOD]},
            PLAIN,
            "<bos>user: Fetch a cup.\nassistant:| Walk to kitchen.\n<eos>",
        ),
        (
            {"messages": [ASK, GOOD, ASK, BAD]},
            MARKED,
            "<bos>[user] Fetch a cup.<eos>[assistant] |Walk to kitchen.<eos>|"
            "[user] Fetch a cup.<eos>[assistant] |Walk to bed.<eos>",
        ),
        (
            {"prompt": [ASK], "completion": [GOOD], "other": 1},
            MARKED,
            "<bos>[user] Fetch a cup.<eos>[assistant] |Walk to kitchen.<eos>",
        ),
        (
            {"messages": [ASK, CALL, FOUND, GOOD], "tools": TOOLS},
            CALLING,
            "<bos><look><go>[user] Fetch a cup.;[assistant] |look();|[tool] a cup;[assistant] "
            "|Walk to kitchen.;",
        ),
        (
            {"prompt": [ASK], "completion": [GOOD], "tools": [TOOLS[0]], "label": True},
            CALLING,
            "<bos><look>[user] Fetch a cup.;[assistant] |Walk to kitchen.;",
        ),
    ],
)
def test_samples(tmp_path, tokenizer, config, row, template, want):
    found, chat = read_samples(write(tmp_path / "x.jsonl", row), tokenizer, template, config)
    assert [Spell(tokenizer).sample(sample) for sample in found] == [want]
    assert chat == (not any(isinstance(value, str) for value in row.values()))


SAME = (
    "<bos>[user] Fetch a cup.<eos>[assistant] ",
    "Walk to kitchen.<eos>",
    "Walk to bed.<eos>",
)


@pytest.mark.parametrize(
    ("row", "template", "want"),
    [
        (
            {"prompt": "Q A:", "chosen": " Walk.", "rejected": " Wait."},
            PLAIN,
            ("<bos>Q A:", " Walk.<eos>", " Wait.<eos>"),
        ),
        (
            {"chosen": "Q A: go", "rejected": "Q A: no"},
            PLAIN,
            ("<bos>Q A:", " go<eos>", " no<eos>"),
        ),
        # A completion that begins like the other belongs to neither prompt.
        (
            {"prompt": "Q", "chosen": " a b", "rejected": " a c"},
            PLAIN,
            ("<bos>Q", " a b<eos>", " a c<eos>"),
        ),
        ({"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}, MARKED, SAME),
        ({"prompt": None, "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, MARKED, SAME),
        ({"prompt": "Fetch a cup.", "chosen": [GOOD], "rejected": [BAD]}, MARKED, SAME),
        ({"prompt": "Fetch", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, MARKED, SAME),
        ({"prompt": [ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, MARKED, SAME),
        (
            {"prompt": [ASK], "chosen": [CALL], "rejected": [BAD], "tools": json.dumps(TOOLS)},
            CALLING,
            ("<bos><look><go>[user] Fetch a cup.;[assistant] ", "look();", "Walk to bed.;"),
        ),
    ],
)
def test_pairs(tmp_path, tokenizer, config, row, template, want):
    (pair,) = read_pairs(write(tmp_path / "x.jsonl", row), tokenizer, template, config)
    assert tuple(map(Spell(tokenizer), pair)) == want


def test_pairs_without_a_difference_are_left_out_and_counted(tmp_path, tokenizer, config, capsys):
    fine = {"prompt": "Q", "chosen": " a", "rejected": " b"}
    same = {"prompt": [ASK], "chosen": [GOOD], "rejected": [GOOD]}
    path = write(tmp_path / "x.jsonl", fine, same, fine | {"rejected": " a"}, fine)
    assert len(read_pairs(path, tokenizer, MARKED, config)) == 2
    said = "x.jsonl:3: 2 of 4 pairs have two answers that are the same: left out\n"
    assert capsys.readouterr().err.endswith(said)


def test_files_with_messages(tmp_path):
    texts = {"prompt": "a", "chosen": "b", "rejected": "c", "tools": []}
    assert not has_messages(write(tmp_path / "x.jsonl", texts, {"text": "a"}))
    for row in ({"messages": [ASK]}, {"prompt": "a", "chosen": [GOOD], "rejected": [BAD]}):
        assert has_messages(write(tmp_path / "x.jsonl", texts, row))


FINE = {"text": "a", "prompt": "a", "completion": "b", "chosen": "c", "rejected": "d"}


@pytest.mark.parametrize("read", [read_samples, read_pairs])
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ({"question": "a", "answer": "b"}, "the columns are question, answer"),
    ],
)
def test_lines_that_are_no_rows(tmp_path, tokenizer, config, read, line, said):
    path = write(tmp_path / "x.jsonl", FINE, line)
    with pytest.raises(EgjaxError, match=rf"x\.jsonl:3: {said}.*\(give "):
        read(path, tokenizer, PLAIN, config)


@pytest.mark.parametrize(
    ("read", "line", "said"),
    [
        (read_samples, {"text": ""}, "text is empty"),
        (read_samples, {"prompt": "a", "completion": 3}, "prompt is a text, completion is none"),
        (read_samples, {"prompt": [ASK], "completion": "b"}, "completion is a text, prompt is"),
        (read_samples, {"prompt": 1, "completion": 3}, "prompt is no list of messages"),
        (read_samples, {"messages": [ASK, {"role": "user"}]}, "message 1 of messages has no text"),
        (read_samples, {"messages": [ASK]}, "no message of the assistant"),
        (read_samples, {"messages": [ASK, GOOD], "tools": TOOLS}, "does not write tools"),
        (read_samples, {"messages": [ASK, CALL]}, "does not write tool_calls"),
        (read_samples, {"messages": [ASK, GOOD], "tools": "look"}, "no list of JSON schemas"),
        (read_samples, {"messages": [ASK, CALL | {"tool_calls": []}]}, "message 1 of messages has"),
        (read_samples, {"prompt": "a", "completion": "b", "label": False}, "labelled as a bad"),
        (read_samples, '{"text": "a \\ud83d b"}', r"\\ud83d alone is no character"),
        (read_pairs, '{"prompt": "a", "chosen": "\\udc00", "rejected": "b"}', r"\\udc00 alone"),
        (read_samples, "[" * 200_000, "nested too deeply"),
        (read_samples, {"chosen": "a", "rejected": "b"}, r"experiments\.dpo"),
        (read_pairs, {"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        (read_pairs, {"chosen": [GOOD], "rejected": [BAD]}, "share no prompt"),
        (read_pairs, {"prompt": "a", "chosen": "b", "rejected": ""}, "rejected is empty"),
    ],
)
def test_rows_that_cannot_be_learnt_from(tmp_path, tokenizer, config, read, line, said):
    path = write(tmp_path / "x.jsonl", line)
    with pytest.raises(EgjaxError, match=rf"x\.jsonl:1: .*{said}"):
        read(path, tokenizer, MARKED, config)


def test_files_that_cannot_be_read(tmp_path, tokenizer, config):
    for content, said in ((b"", "has no line"), (b"\xff\xfe{", "not UTF-8")):
        (tmp_path / "x.jsonl").write_bytes(content)
        with pytest.raises(EgjaxError, match=said):
            read_pairs(tmp_path / "x.jsonl", tokenizer, PLAIN, config)
    good = b'{"text": "a"}\n' * 3000
    (tmp_path / "x.jsonl").write_bytes(good + b'{"text": "caf\xe9"}\n' + good)
    with pytest.raises(EgjaxError, match=r"x\.jsonl:3001: not UTF-8"):
        read_samples(tmp_path / "x.jsonl", tokenizer, PLAIN, config)
    with pytest.raises(EgjaxError, match=r"no\.jsonl: cannot be read"):
        read_samples(tmp_path / "no.jsonl", tokenizer, PLAIN, config)
