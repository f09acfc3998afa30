"""A search tree as a picture that stays readable: one line a node, the most visited ones first.

A tree of a thousand nodes with a hundred actions each has no room on a page as dots and arrows. So
it is drawn as an outline: children below their parent and further in, of each node the most visited
ones, the others summed up in a line ("+ 93 more"). A dot's area is the share of visits, its colour
the mean return; the way to the solution is drawn thick and in bold.
"""

from __future__ import annotations

import heapq
import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from egjax.errors import EgjaxError, require

__all__ = ["Row", "draw_tree", "outline"]

_GREY, _LINE, _TEXT, _WAY = "#8a929b", "#c5ccd3", "#1d2329", "#00795a"
_ROW_HEIGHT, _WIDTH, _DPI = 0.25, 10.0, 130  # inches, inches, dots an inch
_INDENT, _LABELS = 0.22, 62  # inches a level, characters a label


class Row(NamedTuple):
    """One line of the outline.

    Attributes:
        depth: levels from the left.
        above: index of the parent's row, -1 for the root.
        text: the action, or what is summed up.
        visits: of the node, or of all that is summed up.
        value: mean return; None for a sum.
        kind: a node, the sum of children that are not shown, or the rest of the best trajectory,
            which a rollout played below the tree.
        way: on the way to the solution (to the best trajectory's end, if there is no solution).
        mark: `solved`, `closed` (nothing is left to try below) or empty.
    """

    depth: int
    above: int
    text: str
    visits: int
    value: float | None
    kind: Literal["node", "more", "rollout"]
    way: bool
    mark: Literal["solved", "closed", ""]


def outline(tree: Mapping[str, Any], *, rows: int = 48, children: int = 8) -> list[Row]:
    """Which nodes are shown, top to bottom.

    Args:
        tree: as `egjax.search.mcts.tree_to_dict` gives it.
        rows: nodes at most; those on the way to the solution always have a line.
        children: of one node at most.

    Raises:
        EgjaxError: fewer than one row or child.
    """
    if rows < 1 or children < 1:
        raise EgjaxError("rows and children must be at least 1", where="outline")
    nodes = {node["id"]: node for node in tree["nodes"]}
    below: dict[int, list[int]] = {number: [] for number in nodes}
    for node in tree["nodes"]:
        if node["parent"] is not None:
            below[node["parent"]].append(node["id"])
    root = tree["nodes"][0]["id"]
    way = [root]
    for action in tree["best"]:
        step = [i for i in below[way[-1]] if nodes[i]["action"] == action]
        if not step:
            break
        way.append(step[0])
    for found in below.values():
        found.sort(key=lambda i: (-nodes[i]["visits"], i))
    # The most visited nodes of all get a line, as long as there are lines.
    shown, queue = set(way), [(-nodes[root]["visits"], root)]
    left = max(rows - len(way), 0)
    while queue and left:
        _, number = heapq.heappop(queue)
        left -= number not in shown
        shown.add(number)
        for child in below[number][:children]:
            heapq.heappush(queue, (-nodes[child]["visits"], child))
    out: list[Row] = []
    stack: list[tuple[int, int, int]] = [(root, 0, -1)]  # node, or minus the parent of a sum
    rest = tree["best"][len(way) - 1 :]
    more: dict[int, list[int]] = {}
    while stack:
        number, depth, above = stack.pop()
        if number < 0:
            hidden = more[above]
            visits = sum(nodes[i]["visits"] for i in hidden)
            out.append(Row(depth, above, f"+ {len(hidden)} more", visits, None, "more", False, ""))
            continue
        node, here = nodes[number], len(out)
        text = "start" if node["action"] is None else str(node["action"])
        mark = "solved" if node["solved"] else "closed" if node["closed"] else ""
        out.append(
            Row(depth, above, text, node["visits"], node["value"], "node", number in way, mark)
        )
        if number == way[-1] and rest:
            steps = ", ".join(map(str, rest))
            out.append(Row(depth + 1, here, f"rollout: {steps}", 0, None, "rollout", True, ""))
        seen = [i for i in below[number] if i in shown]
        hidden = [i for i in below[number] if i not in shown]
        if hidden:
            more[here] = hidden
            stack.append((-1, depth + 1, here))
        stack += [(i, depth + 1, here) for i in reversed(seen)]
    return out


def draw_tree(
    tree: Mapping[str, Any],
    *,
    title: str = "",
    rows: int = 48,
    children: int = 8,
    format: Literal["png", "svg"] = "png",
) -> bytes:
    """The picture of one tree.

    Args:
        tree: as `egjax.search.mcts.tree_to_dict` gives it.
        title: above it.
        rows, children: as for `outline`.
        format: of the bytes.

    Raises:
        EgjaxError: another format, or too few rows or children.
        ImportError: matplotlib is not installed; the message names the extra.
    """
    if format not in ("png", "svg"):
        raise EgjaxError(f"no picture format {format!r}", remedy="png or svg")
    lines = outline(tree, rows=rows, children=children)
    matplotlib = require("matplotlib", "eval")
    style = {"font.family": "DejaVu Sans", "font.size": 9.0, "svg.hashsalt": "egjax"}
    style["svg.fonttype"] = "none"  # text stays text, to be searched for
    with matplotlib.rc_context(style):
        figure = _draw(lines, title)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=format, dpi=_DPI, metadata=_UNDATED[format])
    return buffer.getvalue()


_UNDATED = {"png": {"Software": None}, "svg": {"Date": None}}  # equal trees, equal bytes


def _heights(lines: Sequence[Row]) -> tuple[list[float], list[str]]:
    """Middle of each line in inches from the top, and its text, wrapped where it is a rollout."""
    at, texts, y = [], [], 0.0
    for line in lines:
        width = _LABELS - int(line.depth * _INDENT / 0.085)
        parts = [textwrap.shorten(line.text, max(width, 24), placeholder=" …")]
        if line.kind == "rollout":
            parts = textwrap.wrap(line.text, max(width + 14, 40))
            if len(parts) > 6:
                parts = [*parts[:5], f"… {len(parts) - 5} more lines"]
        at.append(y + _ROW_HEIGHT / 2)
        y += _ROW_HEIGHT + 0.145 * (len(parts) - 1)
        texts.append("\n".join(parts))
    return [*at, y], texts


def _draw(lines: Sequence[Row], title: str) -> Any:
    *middle, height = _heights(lines)[0]
    texts = _heights(lines)[1]
    head, foot = (0.75 if title else 0.45), 0.4
    size = (_WIDTH, head + height + foot)
    figure = require("matplotlib.figure", "eval").Figure(figsize=size)
    require("matplotlib.backends.backend_agg", "eval").FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, _WIDTH)
    axes.set_ylim(height + foot, -head)  # inches, downwards
    axes.axis("off")
    left, visits_x, bar_x, value_x = 0.35, 7.35, 7.45, 9.65
    if title:
        axes.text(0.2, -head + 0.25, title, size=11.5, weight="bold", color=_TEXT, va="center")
    for x, name, align in ((left, "action", "left"), (visits_x, "visits", "right")):
        axes.text(x, -0.15, name, color=_GREY, ha=align, va="center")
    axes.text(value_x, -0.15, "mean return", color=_GREY, ha="right", va="center")
    values = [line.value for line in lines if line.value is not None]
    low, high = min(values), max(values)
    total = max(max(line.visits for line in lines), 1)
    colours = require("matplotlib", "eval").colormaps["viridis"].reversed()

    def place(line: Row) -> float:
        return left + line.depth * _INDENT

    for y, line in zip(middle, lines, strict=True):
        if line.above >= 0:
            above = lines[line.above]
            colour, width = (_WAY, 2.0) if line.way else (_LINE, 1.0)
            x = place(above)
            path = [x, x, place(line)], [middle[line.above], y, y]
            axes.plot(*path, color=colour, lw=width, zorder=2 if line.way else 1)
    for y, line, text in zip(middle, lines, texts, strict=True):
        x = place(line)
        weight = "bold" if line.way and line.kind == "node" else "normal"
        colour = _GREY if line.kind == "more" else _WAY if line.way else _TEXT
        top = y - _ROW_HEIGHT * 0.32 if "\n" in text else y
        align = "top" if "\n" in text else "center"
        mark = {"solved": "  ✔ solved", "closed": "  ▪", "": ""}[line.mark]
        axes.text(x + 0.17, top, text + mark, color=colour, weight=weight, va=align, clip_on=True)
        if line.kind == "rollout":
            continue
        axes.text(visits_x, y, f"{line.visits:,}", ha="right", va="center", color=colour)
        share = line.visits / total
        fill = _LINE
        if line.value is not None:
            fill = colours((line.value - low) / max(high - low, 1e-9))
            axes.text(value_x, y, f"{line.value:+.2f}", ha="right", va="center", color=colour)
            axes.scatter([x], [y], s=14 + 110 * share, color=[fill], zorder=3, lw=0)
        axes.barh(y, 1.35 * share, left=bar_x, height=_ROW_HEIGHT * 0.55, color=[fill], zorder=1)
    note = "most visited first · colour: mean return, dark is high · ▪ nothing left to try below"
    axes.text(left, height + 0.2, note + " · green: best trajectory", color=_GREY, va="center")
    return figure
