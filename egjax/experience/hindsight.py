"""Hindsight relabelling: what an errand happened to achieve, as a goal, with the plan for it.

A trajectory that missed one goal is a success for what it did reach (hindsight experience replay,
arXiv 1707.01495). Needless steps are taken out by simulating the errand again without them, so the
samples teach short plans for goals of any composition, without an activity's name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from egjax.experience.episodes import Episode, Fact
from egjax.experience.prompts import mentions, plan_prompt, plan_sample
from egjax.experience.records import Sample
from egjax.experience.rollouts import (
    Focus,
    World,
    errand_batches,
    line_arrays,
    resolves,
    with_start,
)
from egjax.sim.goals import GoalSizes, Predicate, encode_goal, satisfied
from egjax.sim.text import Line
from egjax.sim.world import step
from egjax.types import Goal, Scene, State

__all__ = ["Relabel", "Relabelled", "gained", "hindsight_samples", "prune", "relabel", "rewards"]

Array = jax.Array


@dataclass(frozen=True)
class Relabel:
    """How goals are chosen in hindsight.

    Attributes:
        goals: facts picked as the goal, at most.
        whole: share of samples whose goal is then widened to everything that the plan achieves,
            which is how a RobotHow task's goal is made from its graphs.
        whole_goals: a widened goal has this many facts at most, else it stays as it was.
        later: share of samples that start after some steps rather than at the start.
        longest: array size for the steps of a plan; outlines with more are left out.
        each: goals taken from each errand.
        instances: objects that all facts of a goal may choose from, at most.
    """

    goals: int = 4
    whole: float = 0.5
    whole_goals: int = 8
    later: float = 0.2
    longest: int = 12
    each: int = 2
    instances: int = 96


class Relabelled(NamedTuple):
    """A plan and the goal that it reaches: `episode` starts where the goal is asked for."""

    episode: Episode
    predicates: list[Predicate]


def _by_class(episode: Episode, facts: Iterable[Fact]) -> set[Predicate]:
    names = episode.classes
    return {Predicate(r, names[s], None if o is None else names[o]) for r, s, o in facts}


def gained(episode: Episode) -> list[Predicate]:
    """What holds by class at the end of an episode and did not at its start, sorted."""
    new: set[Fact] = set()
    for done in episode.steps:
        new -= done.removed
        new |= done.added
    found = _by_class(episode, new - episode.start)
    # Only facts of these relations and subjects can have been there by class: the rest of the
    # start, a thousand facts, is not worth naming.
    alike = {(p.relation, p.subject) for p in found}
    names = episode.classes
    known = _by_class(episode, (f for f in episode.start if (f[0], names[f[1]]) in alike))
    return sorted(found - known, key=lambda p: (p.relation, p.subject, p.other or ""))


def rewards(
    episode: Episode, predicates: Sequence[Predicate], *, gain: float, cost: float
) -> list[float]:
    """Reward of each step towards a goal in hindsight, as the search counts it.

    Args:
        episode: what happened.
        predicates: the goal, none of which holds at the start.
        gain: for each predicate that holds for the first time.
        cost: of a step that brings none (negative).
    """
    wanted, found = set(predicates), []
    for done in episode.steps:
        met = _by_class(episode, done.added) & wanted
        wanted -= met
        found.append(gain * len(met) if met else cost)
    return found


def _appeal(predicate: Predicate, rooms: set[str]) -> float:
    """Weight of a fact as a goal; by-products of carrying and looking are rarer wishes."""
    if predicate.other in rooms and predicate.subject != "character":
        return 0.05
    return 0.4 if predicate.relation in ("FACING", "CLEAN", "HOLDS_LH") else 1.0


def _outline(part: Episode, predicates: Sequence[Predicate], longest: int) -> list[Line] | None:
    """The steps of an episode that may matter for a goal, each after a walk to its object.

    Kept are the last steps that brought a goal's fact, and all that changed something about the
    objects of these or the boxes they are in. Random walks (to the lamp beside the chair to sit
    on) give way to walks to the thing itself, so that equal goals get equal plans; what is
    superfluous, `prune` finds out.
    """
    open_goals, sources = set(predicates), []
    for done in reversed(part.steps):
        met = _by_class(part, done.added) & open_goals
        if met:
            sources.append(done.line)
            open_goals -= met
    about = {i for line in sources for _, i in line.arguments}
    about |= {f.other for f in part.start if f.relation == "INSIDE" and f.subject in about}
    about -= part.rooms
    rooms = {p.other for p in predicates if p.relation == "INSIDE" and p.subject == "character"}
    lines: list[Line] = []
    hands = part.states(lambda fact: fact.relation in ("HOLDS_RH", "HOLDS_LH"))
    for done, held_facts in zip(part.steps, hands):
        line, used = done.line, [i for _, i in done.line.arguments if i is not None]
        if line.verb in ("WALK", "RUN", "FIND"):
            for fact in done.added if line in sources else ():
                if fact.other in part.rooms and part.classes[fact.other] in rooms:
                    lines.append(Line("WALK", ((part.classes[fact.other], fact.other),)))
        elif line.verb == "STANDUP" or (about & set(used) and (done.added or done.removed)):
            held = {fact.other for fact in held_facts}
            for node in used if line.verb != "TURNTO" else ():
                if node not in held:
                    lines.append(Line("WALK", ((part.classes[node], node),)))
            lines.append(line)
    return lines if 0 < len(lines) <= longest else None


def prune(
    scene: Scene, state: State, classes: Array, goal: Goal, actions: tuple[Array, Array, Array]
) -> tuple[Array, Array, State]:
    """Drops the steps of a script that its goal does not need, trying each from the last one on.

    Refused steps drop out by themselves, so a dropped step takes along the later ones that are
    refused without it (standing up, where nobody sat down any more). Every step that stays names
    its objects without ambiguity.

    Args:
        scene, state, classes: the household, where the script starts, and its class numbers.
        goal: what must hold at the end.
        actions: verb, object, target int32[T], see `egjax.sim.world.step`; an object of -1
            where there is no step.

    Returns:
        The steps that stay bool[T], whether the goal holds after them, and the states along them
        stacked along a first axis of T+1 (a dropped step changes nothing).
    """
    start = jax.tree.map(jnp.asarray, state)
    length = actions[0].shape[0]
    at = jnp.arange(length)

    def run(keep: Array) -> tuple[Array, Array, State]:
        def one(state: State, row: tuple[Array, ...]):
            keep, verb, obj, target = row
            named = resolves(scene, state, classes)
            clear = (obj < 0) | named[jnp.maximum(obj, 0)]
            clear &= (target < 0) | named[jnp.maximum(target, 0)]
            after, code = step(scene, state, verb, obj, target)
            accepted = keep & (code == 0) & clear
            after = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), after, state)
            return after, (accepted, after)

        end, (accepted, states) = jax.lax.scan(one, start, (keep, *actions))
        return accepted, satisfied(scene, end, goal).all(), with_start(start, states)

    def without(k: int, best: tuple[Array, Array, State]) -> tuple[Array, Array, State]:
        # The first round drops nothing but what is refused.
        found = run(best[0] & (at != length - k))
        return jax.tree.map(lambda new, old: jnp.where(found[1], new, old), found, best)

    nothing = jax.tree.map(lambda x: jnp.repeat(x[None], length + 1, 0), start)
    unsolved = (jnp.ones(length, bool), jnp.array(False), nothing)
    return jax.lax.fori_loop(0, length + 1, without, unsolved)


@jax.jit
def _prune_all(scene, states, classes, goals, actions):
    def one(state, goal, actions):
        return prune(scene, state, classes, goal, actions)

    return jax.vmap(one)(states, goals, actions)


class _Wish(NamedTuple):
    """A part of an episode, a goal that its end meets, and an outline of a plan for it."""

    part: Episode
    state: State
    predicates: list[Predicate]
    lines: list[Line]


def _wish(
    episode: Episode, states: State, config: Relabel, rng: np.random.Generator
) -> _Wish | None:
    count = len(episode.steps)
    if count < 2:
        return None
    first = int(rng.integers(1, count // 2 + 1)) if rng.random() < config.later else 0
    last = int(rng.integers(first + 2, count + 1)) if count > first + 2 else count
    part = episode.part(first, last)
    options = gained(part)
    if not options:
        return None
    rooms = {episode.classes[i] for i in episode.rooms}
    weights = np.array([_appeal(p, rooms) for p in options])
    size = min(int(rng.integers(1, config.goals + 1)), len(options))
    chosen = rng.choice(len(options), size, replace=False, p=weights / weights.sum())
    predicates = [options[i] for i in sorted(chosen)]
    lines = _outline(part, predicates, config.longest)
    if lines is None:
        return None
    return _Wish(part, jax.tree.map(lambda leaf: leaf[first], states), predicates, lines)


def relabel(
    world: World,
    episodes: Sequence[Episode],
    states: State,
    *,
    seed: int,
    config: Relabel | None = None,
) -> list[Relabelled]:
    """Goals that episodes met by chance, with the shortened plans that meet them.

    Args:
        world: where the episodes happened.
        episodes: B of them, random ones or those of search (`egjax.experience.rollouts.replay`).
        states: their states as NumPy arrays, stacked along axes [B, T+1].
        seed: decides which part and which goal are taken from each episode.
        config: how goals are chosen.
    """
    config = config or Relabel()
    rng = np.random.default_rng(seed)
    sizes = GoalSizes(config.goals, config.instances)
    of_class: dict[str, int] = {}
    for node in world.names.nodes:
        of_class[node["class_name"]] = of_class.get(node["class_name"], 0) + 1
    wishes, goals = [], []
    for i, episode in enumerate(episodes):
        wish = _wish(episode, jax.tree.map(lambda leaf: leaf[i], states), config, rng)  # noqa: B023
        # An upper bound: a predicate's instances are those of one of its classes.
        if wish and sum(of_class[p.subject] for p in wish.predicates) <= config.instances:
            wishes.append(wish)
            goal = encode_goal(wish.predicates, world.names, nodes=len(world.classes), sizes=sizes)
            goals.append(goal)
    if not wishes:
        return []
    # One batch size whatever was chosen, so that the program is compiled once.
    fill = [0] * (len(states.nodes) - len(wishes))
    starts = [wish.state for wish in wishes]
    start, goal = (
        jax.tree.map(lambda *leaves: np.stack(leaves), *some, *(some[i] for i in fill))
        for some in (starts, goals)
    )
    lines = [wish.lines for wish in wishes] + [[] for _ in fill]
    actions = line_arrays(world.names, lines, config.longest)
    done = _prune_all(world.scene, start, world.classes, goal, actions)
    keep, solved, along = jax.tree.map(np.asarray, done)
    out = []
    for i, wish in enumerate(wishes):
        stay = np.flatnonzero(keep[i])
        if not solved[i] or not len(stay):
            continue
        at = np.concatenate([[0], stay + 1])
        plan = [wish.lines[t] for t in stay]
        short = world.recorder.episode(
            plan, along.nodes[i, at], along.added[i, at], wish.part.start
        )
        whole = gained(short)
        wide = rng.random() < config.whole and len(whole) <= config.whole_goals
        out.append(Relabelled(short, whole if wide else wish.predicates))
    return out


def hindsight_samples(
    worlds: Sequence[World],
    count: int,
    *,
    seed: int,
    focus: Focus | None = None,
    config: Relabel | None = None,
    unseen: Sequence[str] = (),
    held_out: Collection[str] = (),
    batch: int = 64,
) -> Iterator[Sample]:
    """Plan generation samples without an activity's name, from random errands.

    Args:
        worlds: training scenes, of `egjax.experience.rollouts.load_worlds`.
        count: errands; each gives `config.each` samples at most, and repeats are left out.
        seed: decides everything.
        focus: how the errands look.
        config: how goals are chosen.
        unseen: activities that no text may name; a plan that happens to is left out.
        held_out: prompts that are not asked, in any order of their parts: `plan_prompt` without an
            activity's name and without a seed.
        batch: errands simulated at once.
    """
    focus, config = focus or Focus(length=16), config or Relabel()
    rng = np.random.default_rng(seed)
    seen: set[tuple[str, str]] = set()
    found = errand_batches(worlds, count, seed=seed, focus=focus, batch=batch)
    for world, episodes, states in found:
        goals = (
            goal
            for _ in range(config.each)
            for goal in relabel(
                world, episodes, states, seed=int(rng.integers(2**31)), config=config
            )
        )
        for episode, predicates in goals:
            plan, start = episode.english(), episode.graph()
            if held_out and plan_prompt(None, predicates, start) in held_out:
                continue
            order = int(rng.integers(2**31))
            sample = plan_sample(plan, None, predicates, start, seed=order)
            text = (sample.prompt, sample.completion)
            if text not in seen and not mentions(" ".join(text), unseen):
                seen.add(text)
                yield sample
