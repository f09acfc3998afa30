"""The baseline without a language model: copy the plan of the most similar training prompt."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

__all__ = ["copy_plans", "nearest"]

_WORD = re.compile(r"[a-z0-9]+")


def nearest(known: Sequence[str], asked: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """For each text asked, the known one that shares most with it.

    Texts are sets of words weighted by inverse document frequency over `known` (Spärck Jones
    1972, smoothed) and compared by cosine. Words that `known` lacks count in the length of the
    text asked. Of equals the earliest wins.

    Args:
        known: texts to choose from, at least one.
        asked: texts to look up.

    Returns:
        index int64[len(asked)] into `known`, similarity float64[len(asked)] in 0..1.

    Raises:
        ValueError: nothing is known.
    """
    if not known:
        raise ValueError("no training texts to copy from")
    sets = [set(_WORD.findall(text.lower())) for text in known]
    column = {word: i for i, word in enumerate(sorted(set().union(*sets)))}
    seen = np.zeros(len(column))
    for words in sets:
        seen[[column[word] for word in words]] += 1
    weight = np.log((1 + len(known)) / (1 + seen)) + 1
    new_word = math.log(1 + len(known)) + 1
    table = _vectors(sets, column, weight, new_word)
    wanted = _vectors([set(_WORD.findall(t.lower())) for t in asked], column, weight, new_word)
    similarity = wanted @ table.T
    # Rounded, because the sum's last bits depend on the order of a matrix product's blocks.
    index = similarity.round(9).argmax(axis=1)
    return index, similarity[np.arange(len(asked)), index]


def copy_plans(prompts: Sequence[str], plans: list[str], asked: Sequence[str]) -> list[str]:
    """The plan of the nearest training prompt for each prompt asked.

    Args:
        prompts, plans: training prompts and their plans, in the same order.
        asked: evaluation prompts.
    """
    if len(prompts) != len(plans):
        raise ValueError(f"{len(prompts)} prompts for {len(plans)} plans")
    index, _ = nearest(prompts, asked)
    return [plans[i] for i in index]


def _vectors(sets, column, weight, new_word) -> np.ndarray:
    """Unit vectors over the known words: float64[len(sets), words]."""
    rows = np.zeros((len(sets), len(column)))
    for row, words in zip(rows, sets):
        inside = [column[word] for word in words if word in column]
        row[inside] = weight[inside]
        length = math.sqrt((row**2).sum() + new_word**2 * (len(words) - len(inside)))
        row /= length or 1.0
    return rows
