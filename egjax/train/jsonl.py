"""One's own data: JSON lines in the columns that TRL and the data sets on the hub use.

Supervised: `messages` (the assistant's are learnt) · `prompt` and `completion` (the completion is)
· `text` (all of it is). Preferences: `prompt`, `chosen`, `rejected`; where `prompt` is left out it
is what both have in common at the beginning, and so it is where messages of both repeat it. A
column holds a text or a list of messages ({"role": ..., "content": ...}, of an assistant also with
`tool_calls`); texts are joined as they stand. Beside messages, `tools` are what may be called.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from egjax import hosts
from egjax.errors import EgjaxError
from egjax.lm.config import LlamaConfig
from egjax.lm.template import ChatTemplate, Message
from egjax.lm.tokenizer import Tokenizer
from egjax.train.data import Pair, Sample

__all__ = ["has_messages", "pair_of", "read_pairs", "read_samples"]

T = TypeVar("T")
_SUPERVISED = "messages; prompt and completion; or text"
_PREFERENCE = "prompt, chosen and rejected; or chosen and rejected"


class _Passage(NamedTuple):
    """A text and what of it is learnt.

    Attributes:
        text: all of it.
        learnt: characters [start, end) of each part that is.
        template: what wrote it from messages; None for texts.
    """

    text: str
    learnt: tuple[tuple[int, int], ...]
    template: ChatTemplate | None = None


class _SameError(EgjaxError):
    """A pair whose answers are the same."""


class _Preference(NamedTuple):
    """What was asked, and two answers that follow it as they stand; see `_Passage`."""

    prompt: str
    chosen: str
    rejected: str
    template: ChatTemplate | None = None


def read_samples(
    path: str | Path, tokenizer: Tokenizer, template: ChatTemplate, config: LlamaConfig
) -> tuple[list[Sample], bool]:
    """Reads supervised data.

    Args:
        path: the file.
        tokenizer, template, config: of the model that learns.

    Returns:
        A sample a line, and whether the template wrote any of them.

    Raises:
        EgjaxError: names the file and the line that is not as it should be.
    """

    def parse(row: dict[str, Any]) -> tuple[Sample, bool]:
        passage = _passage(row, template)
        return _sample(passage, tokenizer, config), passage.template is not None

    found = _read(Path(path), parse)
    return [sample for sample, _ in found], any(chat for _, chat in found)


def read_pairs(
    path: str | Path, tokenizer: Tokenizer, template: ChatTemplate, config: LlamaConfig
) -> list[Pair]:
    """Reads preference pairs; arguments and errors as in `read_samples`.

    Pairs whose answers are the same say nothing; they are left out, and counted on standard error.
    """
    return _read(Path(path), lambda row: _pair(_preference(row, template), tokenizer, config))


def pair_of(
    prompt: str, chosen: str, rejected: str, tokenizer: Tokenizer, config: LlamaConfig
) -> Pair:
    """Tokens of a prompt and of two answers, texts that follow it as they stand.

    Raises:
        EgjaxError: nothing is left of the prompt, or an answer has no token of its own.
    """
    return _pair(_Preference(prompt, chosen, rejected), tokenizer, config)


def has_messages(path: str | Path) -> bool:
    """Whether a row of a file that can be read holds messages, which need a template."""
    columns = ("messages", "prompt", "completion", "chosen", "rejected")
    rows = (_row(line) for _, line in _lines(Path(path)))
    return any(isinstance(row.get(name), list) for row in rows for name in columns)


def _read(path: Path, parse: Callable[[dict[str, Any]], T]) -> list[T]:
    found, same = [], []
    for number, line in _lines(path):
        where = f"{path}:{number}"
        try:
            found.append(parse(_row(line)))
        except EgjaxError as error:
            told = EgjaxError(error.what, where=where, remedy=error.remedy)
            if not isinstance(error, _SameError):
                raise told from error
            same.append(told)
        except UnicodeEncodeError as error:  # JSON can write half a character, UTF-8 cannot
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise EgjaxError(
                f"{half} alone is no character", where=where, remedy="mend the text"
            ) from error
    if same and not found:
        raise same[0]
    if same and hosts.index() == 0:
        count = f"{len(same)} of {len(same) + len(found)} pairs have two answers that are the same"
        print(f"{same[0].where}: {count}: left out", file=sys.stderr)
    if not found:
        raise EgjaxError("has no line", where=str(path), remedy="give one JSON object a line")
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of the lines that are not blank."""
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if text := line.decode("utf-8-sig" if number == 1 else "utf-8").strip():
                    yield number, text
    except UnicodeDecodeError as error:
        raise EgjaxError(
            f"not UTF-8: {error.reason}", where=f"{path}:{number}", remedy="convert it"
        ) from error
    except OSError as error:
        raise EgjaxError(f"cannot be read: {error.strerror}", where=str(path)) from error


def _row(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise EgjaxError(f"not JSON: {error}", remedy="give one JSON object a line") from error
    except RecursionError as error:
        raise EgjaxError("nested too deeply", remedy="give one JSON object a line") from error
    if not isinstance(row, dict):
        raise EgjaxError("not a JSON object", remedy="give one JSON object a line")
    return {name: value for name, value in row.items() if value is not None}


def _unknown(row: Mapping[str, Any], wanted: str) -> EgjaxError:
    names = ", ".join(map(str, row)) or "none"
    return EgjaxError(f"the columns are {names}", remedy=f"give {wanted}")


def _text(row: Mapping[str, Any], name: str) -> str:
    if not isinstance(row[name], str) or not row[name]:
        raise EgjaxError(f"{name} is empty or no text", remedy="give a text or list of messages")
    return row[name]


def _check_kinds(row: Mapping[str, Any], *names: str) -> None:
    """Refuses columns of which one is a text and another is none."""
    texts = [name for name in names if isinstance(row[name], str)]
    if texts and len(texts) < len(names):
        others = " and ".join(name for name in names if name not in texts)
        raise EgjaxError(
            f"{' and '.join(texts)} is a text, {others} is none",
            remedy="give texts, or lists of messages, in both",
        )


def _messages(row: Mapping[str, Any], name: str) -> list[Message]:
    """A column of messages, checked."""
    messages = row[name]
    if not isinstance(messages, list) or not messages:
        raise EgjaxError(f"{name} is no list of messages", remedy='[{"role": ..., "content": ...}]')
    for index, message in enumerate(messages):
        parts = message if isinstance(message, dict) else {}
        # An assistant may call tools and say nothing.
        words = parts.get("content") or ("" if _calls(parts) else parts.get("content"))
        if not (isinstance(parts.get("role"), str) and isinstance(words, str)):
            raise EgjaxError(
                f"message {index} of {name} has no text as role or content",
                remedy='each is {"role": ..., "content": ...}',
            )
    # What a table leaves empty is not there, for a template may ask whether it is.
    return [
        {key: x for key, x in message.items() if x is not None or key == "content"}
        for message in messages
    ]


def _calls(message: Mapping[str, Any]) -> bool:
    return isinstance(message.get("tool_calls"), list) and bool(message["tool_calls"])


def _tools(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """What the assistant may call; some tables hold it as JSON in a text."""
    tools = row.get("tools")
    if isinstance(tools, str):
        with contextlib.suppress(ValueError):
            tools = json.loads(tools)
    if not tools:
        return None
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise EgjaxError("tools is no list of JSON schemas", remedy="give a list, or no tools")
    return tools


def _passage(row: dict[str, Any], template: ChatTemplate) -> _Passage:
    if row.get("label") is False:
        raise EgjaxError("its answer is labelled as a bad one", remedy="leave the line out")
    if "messages" in row:
        return _conversation(_messages(row, "messages"), template, _tools(row))
    if {"prompt", "completion"} <= row.keys():
        if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
            # An empty prompt is well-formed: the completion is learnt from the start.
            text = row["prompt"] + _text(row, "completion")
            return _Passage(text, ((len(row["prompt"]), len(text)),))
        _check_kinds(row, "prompt", "completion")
        prompt, answer = _messages(row, "prompt"), _messages(row, "completion")
        render = partial(template.render, tools=_tools(row))
        text = render([*prompt, *answer])
        start = _shared(text, render(prompt, ask=True))
        return _Passage(text, ((start, len(text)),), template)
    if "text" in row:
        return _Passage(_text(row, "text"), ((0, len(row["text"])),))
    if {"chosen", "rejected"} <= row.keys():
        raise EgjaxError("a preference pair", remedy="python -m experiments.dpo learns from these")
    raise _unknown(row, _SUPERVISED)


def _conversation(
    messages: Sequence[Message], template: ChatTemplate, tools: list[dict[str, Any]] | None
) -> _Passage:
    render = partial(template.render, tools=tools)
    text = render(messages)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            start = _shared(text, render(messages[:index], ask=True))
            spans.append((start, _shared(text, render(messages[: index + 1]))))
    if not any(start < end for start, end in spans):
        raise EgjaxError("no message of the assistant", remedy="one at least is to be learnt")
    return _Passage(text, tuple(spans), template)


def _shared(*texts: Sequence[Any]) -> int:
    """How many characters (or tokens) texts have in common at the beginning.

    A template may write a turn otherwise once others follow it, or an answer otherwise than it asks
    for one; then what differs counts as answered.
    """
    count = 0
    for first, *others in zip(*texts):
        if any(other != first for other in others):
            break
        count += 1
    return count


def _preference(row: dict[str, Any], template: ChatTemplate) -> _Preference:
    if not {"chosen", "rejected"} <= row.keys():
        raise _unknown(row, _PREFERENCE)
    prompt = row.get("prompt")
    if isinstance(row["chosen"], str) and isinstance(row["rejected"], str):
        chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
        if isinstance(prompt, str):
            return _differing(prompt, chosen, rejected)
        if prompt is None:
            start = _shared(chosen, rejected)
            # A space belongs to the word that it comes before.
            start -= chosen[:start].endswith(" ")
            return _differing(chosen[:start], chosen[start:], rejected[start:])
    _check_kinds(row, "chosen", "rejected")
    chosen, rejected = _messages(row, "chosen"), _messages(row, "rejected")
    if isinstance(prompt, str):
        # Either the question alone, or all of both conversations is repeated in the answers.
        repeated = chosen[0]["role"] != "assistant"
        prompt = None if repeated else [{"role": "user", "content": prompt}]
    elif prompt is not None:
        prompt = _messages(row, "prompt")
        count = len(prompt)
        if all(one[:count] == prompt and one[count:] for one in (chosen, rejected)):
            chosen, rejected = chosen[count:], rejected[count:]
    if prompt is None:
        pairs = zip(chosen, rejected)
        same = next(
            (i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected))
        )
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    if not prompt:
        raise EgjaxError("the answers share no prompt", remedy=f"give {_PREFERENCE} that share one")
    render = partial(template.render, tools=_tools(row))
    whole = [render([*prompt, *answer]) for answer in (chosen, rejected)]
    start = _shared(render(prompt, ask=True), *whole)
    return _differing(whole[0][:start], whole[0][start:], whole[1][start:], template)


def _differing(
    prompt: str, chosen: str, rejected: str, template: ChatTemplate | None = None
) -> _Preference:
    if chosen == rejected:
        raise _SameError("chosen and rejected are the same", remedy="leave the line out")
    return _Preference(prompt, chosen, rejected, template)


def _sample(passage: _Passage, tokenizer: Tokenizer, config: LlamaConfig) -> Sample:
    """Tokens of a passage, with the marks that start and end a text.

    A chat template writes its own marks; a start mark is added where it wrote none. A token counts
    as learnt if its last character is.
    """
    ids, ends, added = _marked(passage.text, passage.template, tokenizer, config)
    learnt = [any(start < end <= stop for start, stop in passage.learnt) for end in ends]
    if added:
        learnt[-1] = True
    return Sample(ids, learnt)


def _marked(
    text: str, template: ChatTemplate | None, tokenizer: Tokenizer, config: LlamaConfig
) -> tuple[list[int], list[int], bool]:
    """Tokens with marks, the character at which each ends, and whether an end mark was added."""
    text.encode()  # half a character is told as such here, the tokenizer finds no text at all
    ids, ends = tokenizer.encode_with_ends(text)
    if config.bos_id is not None and ids[:1] != [config.bos_id]:
        ids, ends = [config.bos_id, *ids], [0, *ends]
    if (template is not None and template.source is not None) or not config.eos_ids:
        return ids, ends, False
    if ids[-1:] and ids[-1] in config.eos_ids:
        return ids, ends, False
    return [*ids, config.eos_ids[0]], [*ends, len(text) + 1], True


def _pair(preference: _Preference, tokenizer: Tokenizer, config: LlamaConfig) -> Pair:
    """Tokens of a preference, marked as in `_sample`.

    Prompt and answer are encoded together; the prompt is what both encodings have in common of it.

    Raises:
        EgjaxError: nothing is left of the prompt, or an answer has no token of its own.
    """
    both = []
    for answer in (preference.chosen, preference.rejected):
        text = preference.prompt + answer
        ids, ends, _ = _marked(text, preference.template, tokenizer, config)
        both.append((ids, sum(end <= len(preference.prompt) for end in ends)))
    (chosen, first), (rejected, second) = both
    start = min(first, second, _shared(chosen, rejected))
    if not 0 < start < min(len(chosen), len(rejected)):
        raise EgjaxError("prompt or answer has no token", remedy="give each of them some text")
    return Pair(chosen[:start], chosen[start:], rejected[start:])
