"""Token by token: what each model of a composed decoder would have said next, side by side.

The picture that explains the behaviour ratio: where πᴱ has learnt something that πᴺ had not, π̄
moves πᴸ's choice; where the two agree, πᴸ decides.
"""

from __future__ import annotations

import html
import io
import itertools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from egjax.errors import EgjaxError, require
from egjax.evals.plots import LIGHT
from egjax.evals.results import Role
from egjax.lm.config import LlamaConfig
from egjax.lm.ensemble import Combine, Models, read
from egjax.lm.lora import Pair
from egjax.lm.params import Params
from egjax.lm.tokenizer import Tokenizer

__all__ = ["Choice", "Step", "as_html", "as_png", "as_table", "side_by_side"]

_ROLES = (Role.LARGE, Role.EXPERT, Role.BASE, Role.RATIO)


@dataclass(frozen=True)
class Choice:
    """A token that a model might say next, and with what probability (0 to 1)."""

    token: str
    probability: float


@dataclass(frozen=True)
class Step:
    """One token of a completion.

    Attributes:
        token: its text, as `shown` writes it.
        choices: the likeliest tokens of each model, by its name, best first.
        rank: how many tokens each model thinks likelier than this one, by its name.
        probability: what each model gives to this token, by its name.
    """

    token: str
    choices: dict[str, tuple[Choice, ...]]
    rank: dict[str, int]
    probability: dict[str, float]


def shown(tokenizer: Tokenizer, token: int) -> str:
    """Text of a token with its spaces and line ends to be seen; special tokens by name."""
    text = tokenizer.decode([token])
    return text.replace(" ", "·").replace("\n", "⏎") or tokenizer.token(token)


def side_by_side(
    models: Models,
    names: Sequence[str],
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    completion: Sequence[int],
    *,
    combine: Combine | None = None,
    top: int = 4,
    bucket: int = 64,
) -> list[Step]:
    """What each model thinks at every token of a completion.

    Args:
        models: as for `egjax.lm.generate.generate`.
        names: of the models; one more, for their combination, where `combine` is given.
        tokenizer: of all of them.
        prompt, completion: token ids.
        combine: as for `generate`; None shows the models alone.
        top: tokens that are shown of each.
        bucket: lengths are rounded up to a multiple of this, to compile for few, but not beyond the
            context.

    Raises:
        EgjaxError: no token is to be shown, or more than there are, or a model's context is
            shorter than prompt and completion.
    """
    if not completion:
        return []
    row = [*prompt, *completion]
    for _, config in models:
        config.check_length(len(row))
        if not 1 <= top <= config.vocab_size:
            raise EgjaxError(f"{top} tokens to show", remedy=f"1 to {config.vocab_size}")
    context = min(config.max_seq_len for _, config in models)
    length = min(-(-len(row) // bucket) * bucket, context)
    # Only where the completion is: all logits of a long prompt would be too much memory.
    count = -(-len(completion) // bucket) * bucket
    places = np.minimum(np.arange(count) + len(prompt) - 1, length - 1)
    tokens = jnp.array([row + [0] * (length - len(row))], jnp.int32)
    values, ids, own, rank = jax.device_get(
        _read(
            tuple(params for params, _ in models),
            tokens,
            places,
            configs=tuple(config for _, config in models),
            combine=combine,
            top=top,
        )
    )
    steps = []
    for place, token in enumerate(completion):
        choices = {
            name: tuple(
                Choice(shown(tokenizer, int(i)), float(np.exp(v)))
                for i, v in zip(ids[m, place], values[m, place])
            )
            for m, name in enumerate(names)
        }
        steps.append(
            Step(
                shown(tokenizer, token),
                choices,
                {name: int(rank[m, place]) for m, name in enumerate(names)},
                {name: float(np.exp(own[m, place])) for m, name in enumerate(names)},
            )
        )
    return steps


@partial(jax.jit, static_argnames=("configs", "combine", "top"))
def _read(
    params: tuple[Params | Pair, ...],
    tokens: jax.Array,
    places: jax.Array,
    *,
    configs: tuple[LlamaConfig, ...],
    combine: Combine | None,
    top: int,
) -> tuple[jax.Array, ...]:
    """Log-probabilities and ids [M, N, top] of the likeliest tokens after the ones at places [N],
    and log-probability and rank [M, N] of the token that did come."""
    logits = [x[0] for p, c in zip(params, configs) for x in read(p, c, tokens, places=places)[0]]
    if combine is not None:
        logits.append(combine(tuple(logits)))
    logps = jax.nn.log_softmax(jnp.stack(logits))
    values, ids = jax.lax.top_k(logps, top)
    following = jnp.roll(tokens[0], -1)[places]
    own = jnp.take_along_axis(logps, following[None, :, None], axis=-1)
    return values, ids, own[..., 0], (logps > own).sum(-1)


def as_table(steps: Sequence[Step], *, title: str | None = None, width: int | None = None) -> Any:
    """A `rich.table.Table`: a row a token, a column a model, shares in percent.

    The token that came is bold; where it is none of a model's likeliest, its place and share end
    the cell. A token that comes again and again is shown once, with the number of times.

    Args:
        steps: of `side_by_side`.
        title: above the table.
        width: letters in a line; of the likeliest tokens those are shown that fit. None: all.
    """
    box = require("rich.box", "eval").SIMPLE_HEAD
    text = require("rich.text", "eval").Text
    table = require("rich.table", "eval").Table(title=title, title_justify="left", box=box)
    runs = [list(group) for _, group in itertools.groupby(steps, key=lambda step: step.token)]
    tokens = [run[0].token + (f" ×{len(run)}" if len(run) > 1 else "") for run in runs]
    names = list(steps[0].choices) if steps else []
    table.add_column("token", no_wrap=True, min_width=len("token"))
    for name in names:
        table.add_column(f"{name} %", no_wrap=True)
    room = math.inf
    if width is not None and names:
        # A column has two letters of padding and one between it and the next.
        room = (width - max(map(len, tokens)) - 4) // len(names) - 3
    for token, (step, *_) in zip(tokens, runs):
        cells = [_cell(step, name, room, text) for name in names]
        table.add_row(text(token, style="bold"), *cells)
    return table


def _cell(step: Step, name: str, room: float, text: Any) -> Any:
    """What one model thought at one token, in a line of so many letters."""
    labels = {c.token: f"{c.token} {_percent(c.probability)}" for c in step.choices[name]}
    place = f"(no. {step.rank[name] + 1}: {_percent(step.probability[name])})"
    room -= len(labels.get(step.token, place))
    parts = []
    for choice in step.choices[name]:
        label = labels[choice.token]
        if choice.token == step.token:
            parts.append((label, "bold green"))
        elif choice.probability >= 0.0005 and len(label) + 2 <= room:
            parts.append((label, "dim" if choice.probability < 0.1 else ""))
            room -= len(label) + 2
    if step.token not in labels:
        parts.append((place, "red"))
    cell = text()
    for number, (label, style) in enumerate(parts):
        cell.append("  " if number else "").append(label, style=style)
    return cell


def _percent(probability: float) -> str:
    return f"{100 * probability:.0f}" if probability >= 0.095 else f"{100 * probability:.1f}"


def as_png(steps: Sequence[Step], *, title: str = "", footer: str = "") -> bytes:
    """The same as a picture: a bar a model and token, cut into the likeliest tokens' shares; the
    token that came is in the model's colour.

    Args:
        steps: of `side_by_side`.
        title, footer: lines above and below, e.g. prompt and verdict.
    """
    require("matplotlib", "eval").use("Agg")
    plt = require("matplotlib.pyplot", "eval")
    names = list(steps[0].choices) if steps else []
    width = 2.2 + 3.0 * max(len(names), 1)
    title, footer = _wrapped(title, width), _wrapped(footer, width)
    rows, line = max(len(steps), 1), 0.16
    bottom, top = line * (footer.count("\n") + 1) + 0.2, line * (title.count("\n") + 1) + 0.2
    height = 0.3 * (rows + 1) + bottom + top
    figure = plt.figure(figsize=(width, height), facecolor=LIGHT.page)
    axes = figure.add_axes((0.0, bottom / height, 1.0, 1 - (bottom + top) / height))
    axes.set_xlim(-0.62, len(names) * 1.04)
    axes.set_ylim(rows, -0.7)
    axes.axis("off")
    colours = [LIGHT.roles[_ROLES[i % len(_ROLES)]] for i in range(len(names))]
    if len(names) == 1:
        colours = [LIGHT.roles[Role.RATIO]]
    font = {"family": "DejaVu Sans", "size": 8, "color": LIGHT.text, "parse_math": False}
    for m, name in enumerate(names):
        axes.text(m * 1.04, -0.3, name, weight="bold", **{**font, "color": colours[m], "size": 11})
    for y, step in enumerate(steps):
        axes.text(-0.05, y + 0.5, step.token, ha="right", va="center", weight="bold", **font)
        for m, name in enumerate(names):
            x = m * 1.04
            axes.barh(y + 0.5, 1.0, 0.8, left=x, color="#f3f4f6")
            for choice in step.choices[name]:
                chosen = choice.token == step.token
                axes.barh(
                    y + 0.5,
                    choice.probability,
                    0.8,
                    left=x,
                    color=colours[m] if chosen else "#d5dae0",
                    edgecolor="white",
                    linewidth=0.8,
                )
                if choice.probability > 0.028 * (len(choice.token) + 1):
                    colour = "white" if chosen else LIGHT.text
                    axes.text(
                        x + choice.probability / 2,
                        y + 0.5,
                        choice.token,
                        ha="center",
                        va="center",
                        **{**font, "color": colour, "size": 7},
                    )
                x += choice.probability
    place = {"family": "DejaVu Sans Mono", "size": 8, "color": LIGHT.text, "parse_math": False}
    figure.text(0.015, 1 - 0.1 / height, title, va="top", **place)
    figure.text(0.015, 0.1 / height, footer, va="bottom", **place)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
    plt.close(figure)
    return out.getvalue()


def _wrapped(text: str, inches: float) -> str:
    """Lines that a width holds, in the picture's fixed-width letters."""
    most = int(inches * 14)
    lines = [textwrap.wrap(line, most, drop_whitespace=False) or [""] for line in text.split("\n")]
    return "\n".join(part for line in lines for part in line)


def as_html(steps: Sequence[Step], *, title: str = "", footer: str = "") -> str:
    """The same as a page by itself, without scripts; the mouse over a share tells its number."""
    names = list(steps[0].choices) if steps else []
    colours = [LIGHT.roles[_ROLES[i % len(_ROLES)]] for i in range(len(names))]
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    rows = []
    for step in steps:
        cells = [f"<th>{html.escape(step.token)}</th>"]
        for colour, name in zip(colours, names):
            parts = []
            for choice in step.choices[name]:
                chosen = choice.token == step.token
                paint = f";background:{colour};color:#fff" if chosen else ""
                label = html.escape(choice.token)
                share = 100 * choice.probability
                parts.append(
                    f'<i title="{label} {share:.1f} %" style="width:{share:.2f}%{paint}">'
                    f"{label}</i>"
                )
            cells.append(f"<td><div>{''.join(parts)}</div></td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    style = (
        "body{font:14px system-ui,sans-serif;color:#1d2329;margin:2em}table{border-spacing:6px 2px}"
        "th{text-align:left;white-space:nowrap}td div{width:17em;height:1.5em;display:flex;"
        "background:#f3f4f6}i{background:#d5dae0;font-style:normal;font-size:12px;line-height:1.7em;"
        "overflow:hidden;white-space:nowrap;box-shadow:inset -1px 0 #fff;text-align:center}"
        "pre{white-space:pre-wrap}"
    )
    return (
        f'<!doctype html><meta charset="utf-8"><title>egjax</title><style>{style}</style>'
        f"<pre>{html.escape(title)}</pre><table><tr><th>token</th>{heads}</tr>{''.join(rows)}"
        f"</table><pre>{html.escape(footer)}</pre>\n"
    )
