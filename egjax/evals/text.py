"""Metrics on text and on scores of answers: ROUGE-L, object paths, multiple choice.

They are those of E2WM's benchmark (arXiv 2305.10626, section 4), so figures can be set side by
side with its published ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from egjax.errors import require

__all__ = ["correct", "length_normalised", "path_overlap", "rooms", "rouge_l", "unconditional"]


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """ROUGE-L F-measure with stemming, one per item: float64[n] in 0..1.

    Lin, "ROUGE: A Package for Automatic Evaluation of Summaries" (2004), through `rouge-score`.

    Args:
        predictions: n generated texts.
        references: n texts to compare with.

    Raises:
        ImportError: `rouge-score` is not installed; the message names the extra.
        ValueError: the two differ in length.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    scorer = require("rouge_score.rouge_scorer", "eval").RougeScorer(["rougeL"], use_stemmer=True)
    return np.array(
        [scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(predictions, references)]
    )


def rooms(answer: str) -> list[str]:
    """The rooms of an object-path answer in order: "kitchen, home office." → two names."""
    parts = re.split(r"[,.\n]|\bthen\b|->|→", answer.lower())
    return [" ".join(part.replace("_", " ").split()) for part in parts if part.strip()]


def path_overlap(predicted: Sequence[str], actual: Sequence[str]) -> float:
    """Longest run of rooms that both lists share ÷ the longer list's length (0..1).

    Args:
        predicted, actual: room names in the order visited. Two empty lists agree: 1.
    """
    if not predicted and not actual:
        return 1.0
    best = 0
    row = [0] * (len(actual) + 1)  # row[j]: length of the shared run that ends at actual[j-1]
    for name in predicted:
        row = [0] + [row[j] + 1 if name == other else 0 for j, other in enumerate(actual)]
        best = max(best, *row)
    return best / max(len(predicted), len(actual))


def length_normalised(logps: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Score of each choice: mean log-probability of its tokens, `log p(a|x) / |a|`.

    Args:
        logps: float[n, K]. Log-probability of each choice given the question, summed over tokens.
        lengths: int[n, K]. Number of tokens of each choice, at least 1 where it is real.
    """
    return np.asarray(logps, np.float64) / np.maximum(lengths, 1)


def unconditional(logps: np.ndarray, prior_logps: np.ndarray) -> np.ndarray:
    """Score of each choice: `log p(a|x) - log p(a|"Answer:")`.

    Takes out that some answers are likely whatever was asked (Brown et al. 2020, section 2.4).

    Args:
        logps: float[n, K]. Log-probability of each choice given the question, summed over tokens.
        prior_logps: float[n, K]. The same given the bare answer prompt.
    """
    return np.asarray(logps, np.float64) - np.asarray(prior_logps, np.float64)


def correct(scores: np.ndarray, answers: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Whether the best-scored choice is the right one: bool[n].

    A tie counts as wrong: a model that tells nothing apart must not score by the order of choices.

    Args:
        scores: float[n, K].
        answers: int[n]. Index of the right choice.
        mask: bool[n, K]. True for a real choice; all are real without it.

    Raises:
        ValueError: an answer that is out of range or masked, or a real score that is not a number.
    """
    scores, answers = np.asarray(scores, np.float64), np.asarray(answers)
    mask = np.ones(scores.shape, bool) if mask is None else np.asarray(mask, bool)
    if np.any((answers < 0) | (answers >= scores.shape[1])):
        raise ValueError("an answer's index is not among the choices")
    item = np.arange(len(answers))
    if not mask[item, answers].all():
        raise ValueError("an answer points at a masked choice")
    if np.isnan(scores[mask]).any():
        raise ValueError("a choice's score is not a number")
    others = np.where(mask, scores, -np.inf)
    right = others[item, answers]
    others[item, answers] = -np.inf
    return right > others.max(axis=1)
