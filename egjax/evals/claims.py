"""Sentences chosen by the data: what the paired intervals allow one to say, and no more."""

from __future__ import annotations

import dataclasses
import enum

from egjax.evals.intervals import Figure
from egjax.evals.results import Comparison, ModelScores, Results, Role

__all__ = ["Claim", "Verdict", "comparison_claim", "headline", "judge_difference"]


class Verdict(enum.StrEnum):
    """What an interval says about a difference."""

    BETTER = "better"
    WORSE = "worse"
    UNDECIDED = "undecided"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence and the verdict it rests on."""

    verdict: Verdict
    text: str


def judge_difference(difference: Figure) -> Verdict:
    """Better or worse only where the whole interval is on one side of 0."""
    if difference.low is not None and difference.low > 0:
        return Verdict.BETTER
    if difference.high is not None and difference.high < 0:
        return Verdict.WORSE
    return Verdict.UNDECIDED


def comparison_claim(pair: Comparison) -> Claim:
    """One sentence about one comparison, with difference, interval and n."""
    verdict = judge_difference(pair.difference)
    metric = pair.metric.replace("_", " ").replace("rouge l", "ROUGE-L")
    split, *how = pair.split.split(", ")
    tasks = ", ".join(["all tasks" if split == "all" else f"{split} activities", *how])
    relation = {
        Verdict.BETTER: "is better than",
        Verdict.WORSE: "is worse than",
        Verdict.UNDECIDED: "cannot be told apart from",
    }[verdict]
    return Claim(
        verdict,
        f"{pair.ours} {relation} {pair.theirs} in {metric} on {tasks}: "
        f"{points(pair.difference)}, {_count(pair.difference.n)}.",
    )


def points(difference: Figure) -> str:
    """`+5.2 points [−1.0, 11.4]`; other units than fractions as they are."""
    scale, unit = (100, "points") if difference.unit == "fraction" else (1, difference.unit)
    ends = [
        "?" if end is None else _signed(scale * end) for end in (difference.low, difference.high)
    ]
    return f"{_signed(scale * difference.value)} {unit} [{ends[0]}, {ends[1]}]"


def headline(results: Results) -> tuple[Claim, ...]:
    """What a reader wants to know first, in plan success.

    Does each grounded row (π̄, distilled, + DPO) help? And is πᴱ better than the copied plan?

    The paper's claim is that it beats both the small model after training and the large one before.
    A row helps if it is better than each of them that it was compared with on all tasks, hurts if
    it is worse than one of them, else nothing is shown. πᴱ and the copy are told on every set of
    tasks that they were compared on.
    """
    rows = {model.name: model for model in results.models}
    claims = []
    for model in results.models:
        pairs = [
            pair
            for pair in results.comparisons
            if model.role.grounded
            and (pair.ours, pair.metric, pair.split) == (model.name, "success", "all")
            and rows[pair.theirs].role in (Role.EXPERT, Role.LARGE)
        ]
        if pairs:
            claims.append(_helps(model, pairs))
    copies = [
        comparison_claim(pair)
        for pair in results.comparisons
        if pair.metric == "success"
        and (rows[pair.ours].role, rows[pair.theirs].role) == (Role.EXPERT, Role.COPY)
    ]
    return (*claims, *copies)


def _helps(model: ModelScores, pairs: list[Comparison]) -> Claim:
    verdicts = [judge_difference(pair.difference) for pair in pairs]
    found = "; ".join(f"{points(p.difference)} against {p.theirs}" for p in pairs)
    measured = f"{found} in plan success, {_count(min(p.difference.n for p in pairs))}."

    def against(verdict: Verdict) -> str:
        return " and ".join(pair.theirs for pair, v in zip(pairs, verdicts) if v is verdict)

    if Verdict.WORSE in verdicts:
        start = f"{model.name} does not help here, it is worse than {against(Verdict.WORSE)}"
        return Claim(Verdict.WORSE, f"{start}: {measured}")
    if Verdict.UNDECIDED not in verdicts:
        return Claim(Verdict.BETTER, f"{model.name} helps: {measured}")
    start = f"{model.name} is not shown to help over {against(Verdict.UNDECIDED)}"
    if Verdict.BETTER in verdicts:
        start += f", though it beats {against(Verdict.BETTER)}"
    return Claim(Verdict.UNDECIDED, f"{start}: {measured}")


def _count(n: int) -> str:
    return f"n\u00a0=\u00a0{n}"  # one word, so that no line breaks in it


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")
