"""One turn and a conversation with models that know nothing."""

import dataclasses
import io
import json
import shutil

import jax
import jax.numpy as jnp
import pytest

from egjax.errors import EgjaxError
from egjax.lm import hf
from egjax.lm.config import LlamaConfig
from egjax.lm.generate import generate
from egjax.lm.params import init
from egjax.lm.tokenizer import Tokenizer
from experiments import chat

SCENE = """
rooms:
  kitchen: [table, cup on table, cup, fridge]
  bedroom: [bed, book on bed]
goals:
  - OPEN(fridge)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three small models of one tokenizer, one of another, and a scene."""
    root = tmp_path_factory.mktemp("models")
    (root / "home.yaml").write_text(SCENE)
    texts = ["Q: How to do this? Walk to fridge. Open fridge. Grab cup.\nA:"] * 3
    for seed, name in enumerate(("large", "expert", "base", "foreign")):
        size = 281 if name == "foreign" else 280
        tokenizer = Tokenizer.train(texts, vocab_size=size)
        config = LlamaConfig(
            size, 16, 16, 1, 1, 1, 16, max_seq_len=2048, eos_ids=(tokenizer.eos_id,)
        )
        params = jax.tree.map(lambda leaf: 4 * leaf, init(jax.random.key(seed), config))
        hf.save(root / name, config, params)
        tokenizer.save(root / name)
    return root


def config(folders, **changes):
    given = {f"{name}_from": folders / name for name in ("large", "expert", "base")}
    return chat.Config(**{**given, "max_new_tokens": 12, "json": True, **changes})


def turns(text):
    return [json.loads(line) for line in text.splitlines()]


def test_a_prompt_shows_four_columns_and_speculation_the_same_tokens(folders, capsys):
    chat.main(config(folders, prompt="Q: How?\\nA:"))
    (turn,) = turns(capsys.readouterr().out)
    assert turn["prompt"] == "Q: How?\nA:"
    assert len(turn["tokens"]) == 12
    for token in turn["tokens"]:
        assert list(token["choices"]) == ["πᴸ", "πᴱ", "πᴺ", "π̄"]
        assert token["choices"]["π̄"][0][0] == token["token"]  # greedy
        assert token["rank"]["π̄"] == 0
    assert "solved" not in turn
    chat.main(config(folders, prompt="Q: How?\\nA:", drafts=3))
    (fast,) = turns(capsys.readouterr().out)
    assert fast["completion"] == turn["completion"]
    stop = turn["completion"][2:4]
    chat.main(config(folders, prompt="Q: How?\\nA:", stop=(stop,)))
    (short,) = turns(capsys.readouterr().out)
    assert short["completion"] == turn["completion"].split(stop)[0]


def test_line_ends_and_special_tokens_stop_a_completion(folders, capsys, monkeypatch):
    seen = []

    def spied(models, *arguments, stops, **options):
        seen.append((models[0][1].eos_ids, None if stops is None else stops.hit.sum()))
        return generate(models, *arguments, stops=stops, **options)

    monkeypatch.setattr(chat, "generate", spied)
    pieces = Tokenizer.load(folders / "large").token_bytes()
    lines = sum(b"\n" in piece for piece in pieces)
    alone = {"prompt": "Q: How?", "expert_from": None, "base_from": None, "max_new_tokens": 2}
    for stop in (("\\n", "<pad>"), ("<bos>", "<eos>"), ()):
        chat.main(config(folders, **alone, stop=stop))
    # Two states, and in either a line end hits.
    assert seen == [((2, 0), 2 * lines), ((2, 1), None), ((2,), None)]


def test_a_task_has_a_verdict_and_a_picture(folders, capsys, tmp_path):
    home = str(folders / "home.yaml")
    for name, start in (("why.png", b"\x89PNG"), ("why.html", b"<!doctype")):
        chat.main(config(folders, scene=home, picture=tmp_path / name))
        assert (tmp_path / name).read_bytes().startswith(start)
    turn = turns(capsys.readouterr().out)[-1]
    assert turn["prompt"].startswith("Q: How to do this? ")
    assert "Wanted: fridge open." in turn["prompt"]
    assert turn["solved"] is False
    assert turn["goals_total"] == 1
    assert turn["steps"][0]["accepted"] is False
    page = (tmp_path / "why.html").read_text()
    assert "not solved, 0 of 1 goals hold" in page
    assert "refused" in page


def test_legal_plans_are_executable(folders, capsys):
    home = str(folders / "home.yaml")
    for seed in range(3):
        chat.main(
            config(folders, scene=home, legal=True, max_new_tokens=40, temperature=1.0, seed=seed)
        )
    written = turns(capsys.readouterr().out)
    # A last step may be cut short.
    whole = [s for turn in written for s in turn["steps"][: turn["completion"].count(".")]]
    assert len(whole) > len(written)
    assert all(step["accepted"] for step in whole)


def test_a_text_in_a_conversation_has_no_simulator(folders, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Walk to\n"))
    chat.main(config(folders, legal=True, run=folders))
    assert "--legal: a prompt has no simulator" in capsys.readouterr().err


def test_a_conversation_goes_on_after_a_mistake_and_ends(folders, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Walk to\ntask no such task\nGrab\n\nleft\n"))
    chat.main(config(folders, large_from=folders / "large", expert_from=None, base_from=None))
    printed = capsys.readouterr()
    assert [turn["prompt"] for turn in turns(printed.out)] == ["Walk to", "Grab"]
    assert list(turns(printed.out)[0]["tokens"][0]["choices"]) == ["πᴸ"]
    assert printed.err.count("error: ") == 1


def test_a_task_of_the_run_that_was_held_out_is_drawn(folders, capsys, monkeypatch, tmp_path):
    (tmp_path / "tasks").mkdir()
    rows = [{"name": "a", "split": "train"}, {"name": "b", "split": "unseen"}]
    (tmp_path / "tasks" / "tasks.json").write_text(json.dumps({"tasks": rows}))
    monkeypatch.setattr("sys.stdin", io.StringIO("task\n"))
    asked = []
    monkeypatch.setattr(chat, "_task", lambda config, name: asked.append(name))
    monkeypatch.setattr(chat, "_turn", lambda config, party, text, task: text)
    monkeypatch.setattr(chat, "_show", lambda turn, config: asked.append(turn))
    chat.main(config(folders, run=tmp_path))
    assert asked == ["b", ""]


def padded(folders, name, to, vocab_size):
    """A model whose vocabulary is padded with tokens that nothing writes and it likes best."""
    plain, params = hf.load(folders / name)
    more = ((0, vocab_size - plain.vocab_size), (0, 0))
    params["embedding"] = jnp.pad(params["embedding"], more, constant_values=9.0)
    hf.save(to, dataclasses.replace(plain, vocab_size=vocab_size), params)
    shutil.copy(folders / name / "tokenizer.json", to)
    return to


def test_padding_of_vocabularies_does_not_matter(folders, capsys, tmp_path):
    large = padded(folders, "large", tmp_path / "large", 320)
    expert = padded(folders, "expert", tmp_path / "expert", 288)
    options = {"prompt": "Q: How?", "temperature": 1.0, "max_new_tokens": 8}
    for changes in ({}, {"expert_from": None, "base_from": None}):
        chat.main(config(folders, **options, **changes))
        chat.main(
            config(folders, **{**options, "large_from": large, "expert_from": expert, **changes})
        )
        plain, cut = turns(capsys.readouterr().out)
        assert cut["completion"] == plain["completion"]
        assert cut["tokens"][0]["choices"].keys() == plain["tokens"][0]["choices"].keys()


def test_tokenizers_are_compared_before_weights_are_read(folders, tmp_path):
    words = Tokenizer.train(["Zebras quilt. Vex jumpy dwarfs nightly."] * 3, vocab_size=280)
    shutil.copytree(folders / "expert", tmp_path / "expert")
    words.save(tmp_path / "expert")
    (tmp_path / "expert" / "model.safetensors").write_bytes(b"broken")
    shutil.copytree(folders / "large", tmp_path / "large")
    (tmp_path / "large" / "model.safetensors").write_bytes(b"broken")
    given = {"large_from": tmp_path / "large", "expert_from": tmp_path / "expert"}
    with pytest.raises(EgjaxError, match="tokenizers differ: πᴸ has"):
        chat.main(config(folders, prompt="Q:", **given))


def test_people_see_a_table(folders, capsys):
    chat.main(config(folders, prompt="Q:", json=False, max_new_tokens=3))
    said = capsys.readouterr().out
    assert "token" in said
    assert "π̄" in said
    assert "→ " in said


def test_what_cannot_be_is_told(folders, tmp_path):
    for changes, message in (
        ({"base_from": folders / "foreign", "prompt": "Q:"}, "vocabulary sizes differ"),
        ({"base_from": None, "prompt": "Q:"}, "three models"),
        ({"prompt": "Q:", "task": "t"}, "one of --prompt"),
        ({"prompt": "Q:", "legal": True}, "no simulator"),
        ({"picture": tmp_path / "x.png"}, "one turn"),
        ({"prompt": "Q:", "picture": tmp_path / "x.gif"}, "one turn"),
        ({"prompt": "Q:", "top": 0}, "--top: 0, at least 1"),
        ({"prompt": "Q:", "top": 281}, "281 tokens to show .1 to 280"),
        ({"prompt": "Q:", "max_new_tokens": -3}, "--max-new-tokens: -3, at least 1"),
        ({"prompt": "Q:", "drafts": -1}, "--drafts: -1, at least 0"),
        ({"prompt": "Q:", "goal": ("OPEN(fridge)",)}, "--goal has no effect without --scene"),
        ({"prompt": "Q:", "model": "expert"}, "--model has no effect with --large-from"),
        (
            {"prompt": "Q:", "drafts": 2, "expert_from": None, "base_from": None},
            "--drafts has no effect with one model",
        ),
        ({"task": "t", "legal": True, "stop": ("a",)}, "without --stop"),
    ):
        with pytest.raises(EgjaxError, match=message):
            chat.main(config(folders, **changes))
    with pytest.raises(EgjaxError, match="no finished stage"):
        chat.main(chat.Config(run=tmp_path, prompt="Q:"))
