"""Does a plan work? Executes plans in the simulator, many at a time, and says what happened."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from egjax.errors import EgjaxError
from egjax.evals.intervals import measure
from egjax.evals.results import PlanColumn, PlanStep, StepBin
from egjax.sim.goals import perform, satisfied
from egjax.sim.graph import Names
from egjax.sim.rules import reason
from egjax.sim.text import Line, bind, parse_english, sentences, to_english
from egjax.sim.world import step
from egjax.types import Goal, Scene, State

__all__ = ["STEP_BINS", "Assignment", "Plan", "Verdict", "by_steps", "judge", "plan_length"]

Plan = str | Sequence[Line]
"""English sentences, or steps; a step's graph ids select objects, its bare names are resolved."""

# The first bin ends at 4, past which the paper's few-shot baseline falls.
STEP_BINS = ((1, 4), (5, 8), (9, 12), (13, 1000))


class Assignment(NamedTuple):
    """One task as the judge sees it: where, from what state, what is wanted, and names.

    Scenes, states and goals judged in one call must have the same array sizes.
    """

    scene: Scene
    state: State
    goal: Goal
    names: Names


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the simulator said about one plan. It ends at the first refusal.

    Attributes:
        steps: each step as written, whether it was accepted, and why not; those after the first
            refusal were not tried and have no reason.
        parsed: every sentence reads as a step.
        satisfied, goals: goal predicates that hold after the last accepted step and wanted actions
            performed by then, and all of them.
        length: steps that were written, FIND not counted.
    """

    steps: tuple[PlanStep, ...]
    parsed: bool
    satisfied: int
    goals: int
    length: int

    @property
    def executable(self) -> bool:
        """There is a step, and every step was accepted."""
        return bool(self.steps) and all(s.accepted for s in self.steps)

    @property
    def solved(self) -> bool:
        """Executable, and every goal holds at the end."""
        return self.executable and self.satisfied == self.goals

    @property
    def refusal(self) -> tuple[int, str] | None:
        """Index of the refused step and the reason, None where there is none."""
        refused = (i for i, s in enumerate(self.steps) if not s.accepted)
        return next(((i, self.steps[i].reason) for i in refused), None)

    def column(self, model: str) -> PlanColumn:
        """The verdict as the report shows it."""
        return PlanColumn(model, self.steps, self.satisfied, self.goals, self.solved)


def plan_length(lines: Sequence[Line]) -> int:
    """Steps without FIND, which people write before nearly every use of a thing."""
    return sum(line.verb != "FIND" for line in lines)


class _Sentence(NamedTuple):
    """A step as written, and as read (None and the reason where it is none)."""

    text: str
    line: Line | None
    reason: str = ""


def judge(
    assignments: Sequence[Assignment],
    plans: Sequence[Plan],
    *,
    batch: int = 32,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Verdict]:
    """Executes each plan on its task, step by step in step, and tests its goals.

    A name means the object that is held, else CLOSE, else in the character's room, else of lowest
    id, in the state in which its step is tried. A plan ends at its first refusal; what cannot be
    read or found is a refusal, too, and so is a step whose edges find no room in the state.

    Args:
        assignments: n tasks; the same task may occur many times.
        plans: n plans.
        batch: plans executed together.
        progress: called with the number of plans judged so far.

    Raises:
        ValueError: the numbers of tasks and plans differ.
    """
    if len(assignments) != len(plans):
        raise ValueError(f"{len(assignments)} tasks for {len(plans)} plans")
    sentences = [_read(plan) for plan in plans]
    # Plans of like length share a batch, so that few wait for the longest.
    order = sorted(range(len(plans)), key=lambda i: len(sentences[i]))
    verdicts: dict[int, Verdict] = {}
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        found = _judge_batch(
            [assignments[i] for i in chosen], [sentences[i] for i in chosen], batch
        )
        verdicts.update(zip(chosen, found))
        progress(len(verdicts))
    return [verdicts[i] for i in range(len(plans))]


def by_steps(
    lengths: Sequence[int],
    solved: Sequence[bool],
    *,
    seed: int,
    clusters: Sequence[Hashable] | None = None,
    bins: Sequence[tuple[int, int]] = STEP_BINS,
) -> tuple[StepBin, ...]:
    """Success by the human program's length, FIND not counted; empty bins are left out.

    Args:
        lengths: n lengths of human programs, as `plan_length` counts.
        solved: n outcomes, the same tasks in the same order.
        seed: of the intervals.
        clusters: n labels of outcomes that belong together, e.g. one task under several seeds.
        bins: (low, high), both counted; the last one's high is cut to the longest.
    """
    outcomes = np.asarray(solved, bool)
    sizes = np.asarray(lengths)
    found = []
    for low, high in bins:
        inside = (sizes >= low) & (sizes <= high)
        if inside.any():
            end = min(high, max(low, int(sizes.max())))
            name = f"success/{low}-{end} steps"
            labels = None if clusters is None else [c for c, i in zip(clusters, inside) if i]
            figure = measure(name, outcomes[inside], "fraction", seed=seed, clusters=labels)
            found.append(StepBin(low, end, figure))
    return tuple(found)


def _read(plan: Plan) -> list[_Sentence]:
    """Sentences of a plan, each parsed by itself so that one bad one does not hide the others."""
    if not isinstance(plan, str):
        return [_Sentence(to_english([line]), line) for line in plan]
    return [_read_sentence(text) for text in sentences(plan)]


def _read_sentence(text: str) -> _Sentence:
    try:
        return _Sentence(f"{text}.", parse_english(text)[0])
    except EgjaxError:
        return _Sentence(f"{text}.", None, "not a step that the simulator knows")


@jax.jit
def _try_all(
    scene: Scene, state: State, goal: Goal, performed: jax.Array, actions: jax.Array
) -> tuple[State, jax.Array, jax.Array]:
    """One step of every plan: actions int32[B, 4] are verb, object, target, and whether to try.
    Returns the states, error numbers, and how many wanted actions have been performed."""

    def one(scene, state, goal, performed, action):
        after, code = step(scene, state, action[0], action[1], action[2])
        tried = action[3] == 1
        state = jax.tree.map(lambda new, old: jnp.where(tried, new, old), after, state)
        accepted = tried & (code == 0)
        return state, code, perform(goal, performed, action[0], action[1], accepted)

    return jax.vmap(one)(scene, state, goal, performed, actions)


_satisfied_all = jax.jit(jax.vmap(satisfied))


def _judge_batch(
    tasks: Sequence[Assignment], plans: Sequence[list[_Sentence]], size: int
) -> list[Verdict]:
    """Judges up to `size` plans in lockstep; the batch is filled up with the first task."""
    filled = [*tasks, *[tasks[0]] * (size - len(tasks))]
    scene = _stack([task.scene for task in filled])
    goal = _stack([task.goal for task in filled])
    device_scene = jax.device_put(scene)
    state = _stack([task.state for task in filled])
    performed = np.zeros(size, np.int32)
    records: list[list[PlanStep]] = [[] for _ in tasks]
    running = set(range(len(tasks)))
    for number in range(max(map(len, plans), default=0)):
        actions = np.zeros((size, 4), np.int32)
        for i in sorted(running):
            if number >= len(plans[i]):
                running.discard(i)
                continue
            here = jax.tree.map(lambda leaf, row=i: leaf[row], state)
            action, why = _bind(tasks[i], here, plans[i][number])
            if action is None:
                records[i].append(PlanStep(plans[i][number].text, False, why))
                running.discard(i)
            else:
                actions[i] = (*action, 1)
        if not running:
            break
        state, codes, performed = jax.device_get(
            _try_all(device_scene, state, goal, performed, actions)
        )
        for i in sorted(running):
            code, sentence = int(codes[i]), plans[i][number]
            full = code == 0 and bool(state.overflow[i])
            why = _told(int(actions[i, 0]), code, sentence.line) if code else ""
            why = "more was moved than the state has room for" if full else why
            records[i].append(PlanStep(sentence.text, not why, why))
            if why:
                running.discard(i)
    held = np.asarray(_satisfied_all(device_scene, state, goal))
    return [
        _verdict(records[i], plans[i], held[i], task.goal, int(performed[i]))
        for i, task in enumerate(tasks)
    ]


def _verdict(
    tried: list[PlanStep],
    sentences: list[_Sentence],
    held: np.ndarray,
    goal: Goal,
    performed: int,
) -> Verdict:
    mask, wanted = np.asarray(goal.mask), np.asarray(goal.deed_verbs).any(-1)
    untried = [PlanStep(sentence.text, False) for sentence in sentences[len(tried) :]]
    return Verdict(
        steps=(*tried, *untried),
        parsed=all(sentence.line is not None for sentence in sentences),
        satisfied=int((held & mask).sum()) + performed,
        goals=int(mask.sum() + wanted.sum()),
        length=sum(s.line is None or s.line.verb != "FIND" for s in sentences),
    )


def _bind(
    task: Assignment, state: State, sentence: _Sentence
) -> tuple[tuple[int, int, int] | None, str]:
    """Numbers of a step in a state, or None and why it has none."""
    if sentence.line is None:
        return None, sentence.reason
    try:
        action = bind(task.scene, state, task.names, sentence.line)
    except EgjaxError as error:
        return None, error.what
    for (name, _), node in zip(sentence.line.arguments, action[1:]):
        if node < 0:
            return None, f"there is no {_words(name)} in this home"
    return action, ""


def _told(verb: int, code: int, line: Line | None) -> str:
    """The simulator's reason in words."""
    names = [_words(name) for name, _ in line.arguments] if line else []
    return reason(verb, code).format(
        c="the character",
        o=f"the {names[0]}" if names else "the object",
        b=f"the {names[1]}" if len(names) > 1 else "the place it came from",
        r="this room",
        s="the room of the object",
        doors="on the way",
    )


def _words(name: str) -> str:
    return name.replace("_", " ")


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *trees)
