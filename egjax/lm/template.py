"""Chat templates: messages to text, as a checkpoint's own template or a plain default writes them.

A template is Jinja source in a checkpoint's files. It is rendered in jinja2's sandbox, which denies
access to anything but the messages; nothing else that comes with a checkpoint is executed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from egjax.errors import EgjaxError, require

__all__ = ["ChatTemplate", "Message", "plain_source"]

FILE, SETTINGS = "chat_template.jinja", "tokenizer_config.json"

# The plain default as Jinja source, around the texts that start and end a conversation.
_PLAIN = (
    "{{ ",
    " }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% else %}{{ ",
    " }}{% endif %}",
)

Message = Mapping[str, Any]
"""`role` (system, user, assistant, tool, ...) and `content`; in place of it, or beside it,
`tool_calls`."""


@dataclass(frozen=True)
class ChatTemplate:
    """How messages become text.

    Attributes:
        source: Jinja source; None for the plain default, a line `role: content` a message, after
            which `assistant:` asks for an answer.
        special: names and texts of special tokens that the source may use, e.g. `bos_token`.
    """

    source: str | None = None
    special: tuple[tuple[str, str], ...] = ()

    @classmethod
    def load(cls, folder: str | Path) -> ChatTemplate:
        """Reads the template of a Hugging Face folder; the plain default where it has none.

        Raises:
            EgjaxError: files that cannot be read, or several templates without a default.
        """
        folder = Path(folder)
        fields: dict[str, Any] = {}
        if (folder / SETTINGS).is_file():
            try:
                fields = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            except ValueError as error:
                raise EgjaxError(f"not JSON: {error}", where=str(folder / SETTINGS)) from error
        source = fields.get("chat_template")
        if isinstance(source, list):  # [{"name": ..., "template": ...}]
            named = {one.get("name"): one.get("template") for one in source}
            if "default" not in named:
                raise EgjaxError(
                    "several chat templates and none is the default", where=str(folder / SETTINGS)
                )
            source = named["default"]
        if (folder / FILE).is_file():
            source = (folder / FILE).read_text(encoding="utf-8")
        if source is not None and re.fullmatch('".*"'.join(map(re.escape, _PLAIN)), source):
            source = None  # by `plain_source`
        special = {
            name: value.get("content") if isinstance(value, dict) else value
            for name, value in fields.items()
            if name.endswith("_token")
        }
        texts = tuple(sorted((k, v) for k, v in special.items() if isinstance(v, str)))
        return cls(source, texts if source is not None else ())

    @property
    def fingerprint(self) -> str:
        """SHA-256; equal for templates that write alike."""
        return hashlib.sha256(repr((self.source, self.special)).encode()).hexdigest()

    def render(
        self,
        messages: Sequence[Message],
        *,
        ask: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The text of messages.

        Args:
            messages: in order.
            ask: end with what comes before an assistant's answer.
            tools: JSON schemas of what the assistant may call.

        Raises:
            EgjaxError: the template refuses the messages, has no place for tools or their calls, or
                is broken.
        """
        called = any(message.get("tool_calls") for message in messages)
        for name, there in (("tools", tools), ("tool_calls", called)):
            if there and name not in (self.source or ""):
                raise EgjaxError(
                    f"the chat template does not write {name}",
                    remedy=f"give a chat_template that does, or leave {name} out",
                )
        if self.source is None:
            lines = [f"{message['role']}: {message['content']}\n" for message in messages]
            return "".join(lines) + ("assistant:" if ask else "")
        compiled = _compiled(self.source)
        try:
            return compiled.render(
                messages=list(messages),
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=ask,
                **dict(self.special),
            )
        except Exception as error:  # a template may do whatever raises whatever
            raise EgjaxError(
                f"the chat template refuses it: {error}",
                remedy="mend the messages or the model's chat_template",
            ) from error


def plain_source(start: str, end: str) -> str:
    """Jinja source that has other programs write what the plain default is trained on.

    Args:
        start: what starts a text, such as `"<bos>"`; may be empty.
        end: what ends one.
    """
    first, middle, last = _PLAIN
    marks = [json.dumps(mark, ensure_ascii=False) for mark in (start, end)]
    return first + marks[0] + middle + marks[1] + last


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    """The template, in the environment that transformers documents for chat templates.

    `strftime_now` is left out: today's date would make texts, and so runs, differ from day to day;
    templates that know the convention have a fixed date instead.
    """
    jinja2 = require("jinja2", "lm")
    sandbox, extensions = require("jinja2.sandbox", "lm"), require("jinja2.ext", "lm")
    nodes = require("jinja2.nodes", "lm")

    class Generation(extensions.Extension):
        """`{% generation %}`, which marks an assistant's words, has no effect on the text."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent, **options)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, extensions.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise EgjaxError(f"the chat template is broken: {error}") from error
