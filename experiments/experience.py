"""From labelled plans to stored experience: verdicts, reasons of refusals, pairs, hindsight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from egjax.evals.plans import Assignment, Verdict, judge
from egjax.experience.episodes import Episode
from egjax.experience.hindsight import Relabel, relabel, rewards
from egjax.experience.records import PreferencePair, Trajectory
from egjax.experience.rollouts import make_world, replay_all
from egjax.search.household import Rewards
from egjax.search.label import Traced
from egjax.sim.goals import Predicate
from egjax.sim.text import Line, to_english
from egjax.train.progress import progress
from experiments.data import HouseTask

__all__ = ["Labelled", "in_hindsight", "judged"]

_EXPLORED = 24  # steps of an exploration that are looked at in hindsight


@dataclass(frozen=True)
class Labelled:
    """A plan with its label.

    Attributes:
        label, kind: of `egjax.experience.records.KINDS`.
        lines: steps with graph ids.
        traced: what is known of each step.
        tried: the search tried it, or random steps were put into its best plan; it makes a
            preference pair. What was made to be of a kind does so if that is asked for.
    """

    label: str
    kind: str
    lines: list[Line]
    traced: Traced
    tried: bool = True


def judged(
    tasks: Sequence[HouseTask],
    assignments: Sequence[Assignment],
    labelled: Sequence[Sequence[Labelled]],
    *,
    goals: str,
    seed: int,
    pair_all: bool,
) -> tuple[list[Trajectory], list[PreferencePair]]:
    """Labelled plans that mean in English what they did with ids, and preference pairs of them.

    A name can mean another object than the search used; such plans are judged again as English,
    and only those become text to learn from that keep their label and of which as many steps are
    accepted: what is kept of each step is that of the ids.

    Args:
        tasks, assignments: n tasks.
        labelled: plans of each task.
        goals: name of the goal set.
        seed: of the search.
        pair_all: pairs of plans that were made, too.
    """
    rows = [(row, one) for row, plans in enumerate(labelled) for one in plans]
    texts = [to_english(one.lines) for _, one in rows]
    with progress("labels", len(texts)) as update:
        verdicts = judge(
            [assignments[row] for row, _ in rows], texts, progress=lambda done: update(done, "")
        )
    trajectories: list[Trajectory] = []
    pairs: list[PreferencePair] = []
    chosen: dict[int, str] = {}
    for (row, one), text, verdict in zip(rows, texts, verdicts, strict=True):
        accepted = sum(step.accepted for step in verdict.steps)
        if verdict.solved == (one.label == "failed") or accepted != one.traced.accepted:
            continue
        task = tasks[row]
        trajectories.append(_trajectory(task, one, text, verdict, goals, seed))
        if one.label == "positive":
            chosen.setdefault(row, text)
        elif row in chosen and (one.tried or pair_all):
            pairs.append(PreferencePair(task.name, task.prompt(), chosen[row], text, one.label))
    return trajectories, pairs


def _trajectory(
    task: HouseTask,
    one: Labelled,
    text: str,
    verdict: Verdict,
    goals: str,
    seed: int,
) -> Trajectory:
    return Trajectory(
        task=task.name,
        title=task.title,
        split=task.split,
        script=tuple(map(str, one.lines)),
        text=text,
        label=one.label,
        solved=verdict.solved,
        total_return=float(sum(one.traced.rewards)),
        goals=goals,
        seed=seed,
        kind=one.kind,
        wanted=tuple(map(str, task.predicates)),
        rewards=one.traced.rewards,
        values=one.traced.values,
        visits=one.traced.visits,
        refusals=tuple(step.reason for step in verdict.steps),
    )


def in_hindsight(
    tasks: Sequence[HouseTask],
    assignments: Sequence[Assignment],
    explored: Sequence[Sequence[list[Line]]],
    *,
    goals: str,
    seed: int,
    pay: Rewards,
    discount: float,
    most: int,
) -> list[Trajectory]:
    """What failed explorations did reach, as goals with the shortened plans that reach them.

    They start where their task does and bear no title, because they are not that activity.

    Args:
        tasks, assignments, goals: as for `judged`.
        explored: what was tried in vain on each task.
        seed: of the search; also decides which goals are taken.
        pay: rewards of a step.
        discount: of rewards a step.
        most: explorations of a task at most.
    """
    found: list[Trajectory] = []
    with progress("hindsight", len(tasks)) as update:
        for row, (task, assignment) in enumerate(zip(tasks, assignments, strict=True)):
            if explored[row]:
                world = make_world(assignment.scene, assignment.state, assignment.names)
                episodes, states = replay_all(world, explored[row], length=_EXPLORED, batch=most)
                number = np.random.default_rng((seed, *task.name.encode())).integers(2**31)
                again = relabel(
                    world, episodes, states, seed=int(number), config=Relabel(later=0.0)
                )
                found += [_hindsight(task, goals, seed, pay, discount, *one) for one in again]
            update(row + 1, f"{len(found)} plans")
    return found


def _hindsight(
    task: HouseTask,
    goals: str,
    seed: int,
    pay: Rewards,
    discount: float,
    episode: Episode,
    predicates: Sequence[Predicate],
) -> Trajectory:
    earned = rewards(episode, predicates, gain=pay.gain, cost=pay.cost)
    values, later = [], 0.0
    for reward in reversed(earned):
        later = reward + discount * later
        values.append(later)
    return Trajectory(
        task=task.name,
        title="",
        split=task.split,
        script=tuple(str(step.line) for step in episode.steps),
        text=episode.english(),
        label="hindsight",
        solved=True,
        total_return=float(sum(earned)),
        goals=goals,
        seed=seed,
        kind="exploration",
        wanted=tuple(map(str, predicates)),
        rewards=tuple(earned),
        values=tuple(reversed(values)),
        visits=(0,) * len(earned),
        refusals=("",) * len(earned),
    )
