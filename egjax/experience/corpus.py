"""General household text to pretrain small models on, from scratch.

Descriptions of rooms, wandering errands in the style of plans, facts as questions, and which
things belong to which activity. It holds no plan that anybody made for an activity, and names only
the activities that it is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from egjax.experience.episodes import Episode, Fact
from egjax.experience.prompts import mentions, spoken
from egjax.experience.rollouts import Focus, World, errands
from egjax.sim.text import to_english
from egjax.sim.vocab import STATES

__all__ = ["Mix", "activity_text", "corpus", "describe", "fact_text", "narrate"]


@dataclass(frozen=True)
class Mix:
    """Shares of the kinds of text, which need not sum to one, and how errands are used.

    Attributes:
        plain: errands as plans, `Walk to kitchen. Open fridge.`
        told: errands with what each step changed, `Open fridge. The fridge is open.`
        room: descriptions of a room.
        facts: facts of the household as questions and answers.
        activity: the things that an activity deals with; none where no activities are given.
        texts: texts that one simulated errand gives.
    """

    plain: float = 0.35
    told: float = 0.25
    room: float = 0.2
    facts: float = 0.15
    activity: float = 0.05
    texts: int = 3


def _sentence(episode: Episode, fact: Fact) -> str:
    """A fact as it is told: `The cup is on the table.`, `You hold the cup.`"""
    me = episode.character

    def the(node: int) -> str:
        return f"the {episode.name(node)}"

    relation, subject, other = fact
    if other is None:
        words = f"{relation.lower().replace('_', ' ')}"
        return f"You are {words}." if subject == me else f"The {episode.name(subject)} is {words}."
    if relation.startswith("HOLDS"):
        hand = "right" if relation == "HOLDS_RH" else "left"
        return f"You hold {the(other)} in the {hand} hand."
    words = {"ON": "on", "INSIDE": "in", "FACING": "facing"}[relation]
    subject_words = "You are" if subject == me else f"The {episode.name(subject)} is"
    return f"{subject_words} {words} {'you' if other == me else the(other)}."


def _shown(episode: Episode, fact: Fact) -> bool:
    """Whether a fact is worth a sentence. That a carried thing was in a room that was left is not,
    and every thing's room is told by its description."""
    if fact.other is None:
        return fact.relation in STATES and fact.relation not in ("CLEAN", "DIRTY")
    return fact.other not in episode.rooms or fact.subject == episode.character


def narrate(episode: Episode, *, tell: bool = False, seed: int = 0) -> str:
    """An errand in the style of plans.

    Args:
        episode: what was done.
        tell: adds after a step what became true by it.
        seed: decides where the telling starts: the first sentence says where the character is.
    """
    start = [f for f in episode.start if f.subject == episode.character and f.other is not None]
    rooms = sorted(f for f in start if f.relation == "INSIDE" and f.other in episode.rooms)
    parts = [_sentence(episode, fact) for fact in rooms[:1]]
    rng = np.random.default_rng(seed)
    for step in episode.steps:
        parts.append(to_english([step.line]))
        new = sorted((f for f in step.added if _shown(episode, f)), key=str)
        if tell and new and rng.random() < 0.7:
            parts += [_sentence(episode, fact) for fact in new]
    return " ".join(parts)


def describe(episode: Episode, *, seed: int, most: int = 12) -> str:
    """A room after an episode: some of its things, their states, and what is on or in what.

    Args:
        episode: only its end is used.
        seed: decides the room and the things.
        most: things named, at most.
    """
    rng = np.random.default_rng(seed)
    end = sorted(episode.after(len(episode.steps)), key=str)
    rooms: dict[int, list[int]] = {room: [] for room in sorted(episode.rooms)}
    for fact in end:
        if fact.relation == "INSIDE" and fact.other in rooms and fact.subject != episode.character:
            rooms[fact.other].append(fact.subject)
    room = int(rng.choice([r for r, things in rooms.items() if things] or list(rooms)))
    things = [int(i) for i in rng.permutation(rooms[room])[:most]]
    names = list(dict.fromkeys(episode.name(i) for i in things))
    parts = [f"The {episode.name(room)} has {', '.join(names)}."] if names else []
    chosen = set(things)
    facts = [
        fact
        for fact in end
        if fact.subject in chosen and _shown(episode, fact) and fact.relation != "FACING"
    ]
    parts += [_sentence(episode, facts[i]) for i in rng.permutation(len(facts))[:most]]
    return " ".join(dict.fromkeys(parts))


def fact_text(episode: Episode, *, seed: int, count: int = 4) -> str:
    """A few facts of an episode's end as questions with their answers.

    Names stand for one object each: classes with several objects are not asked about.
    """
    rng = np.random.default_rng(seed)
    alone: dict[str, list[int]] = {}
    for node, name in episode.classes.items():
        alone.setdefault(name, []).append(node)
    single = {nodes[0] for nodes in alone.values() if len(nodes) == 1}
    facts = sorted(episode.after(len(episode.steps)), key=str)
    changed = {f.subject for step in episode.steps for f in step.added}
    about = [f for f in facts if f.subject in single - {episode.character}]
    about = [f for f in about if f.relation in ("ON", "INSIDE", "OPEN", "CLOSED", "OFF")]
    if not about:
        return narrate(episode)
    # What the errand changed is asked first, for that the text before it says; and a thing's box
    # or table before its room.
    order = [about[i] for i in rng.permutation(len(about))]
    order.sort(key=lambda fact: (fact.subject not in changed, fact.other in episode.rooms))
    asked_for = {(fact.subject, fact.other is None): fact for fact in reversed(order)}
    order = [f for f in order if asked_for[f.subject, f.other is None] is f]
    parts = [narrate(episode)]
    for relation, subject, other in order[:count]:
        name = episode.name(subject)
        if other is not None:
            where = "on" if relation == "ON" else "in"
            parts.append(f"Q: Where is the {name}?\nA: {where} {episode.name(other)}")
        else:
            asked = str(rng.choice(("open", "closed"))) if relation in ("OPEN", "CLOSED") else "off"
            yes = "yes" if asked == relation.lower() else "no"
            parts.append(f"Q: Is the {name} {asked}?\nA: {yes}")
    return "\n".join(parts)


def activity_text(title: str, things: Sequence[str], *, seed: int) -> str:
    """An activity's name with the classes of things that it deals with, the character apart."""
    rng = np.random.default_rng(seed)
    things = [name for name in things if name != "character"]
    names = [spoken(things[int(i)]) for i in rng.permutation(len(things))]
    return f"To {spoken(title)}, one may need {', '.join(names)}."


def corpus(
    worlds: Sequence[World],
    count: int,
    *,
    seed: int,
    activities: Mapping[str, Sequence[str]] | None = None,
    unseen: Sequence[str] = (),
    mix: Mix | None = None,
    focus: Focus | None = None,
    batch: int = 64,
) -> Iterator[str]:
    """Household texts, the same for the same seed.

    Args:
        worlds: training scenes, of `egjax.experience.rollouts.load_worlds`.
        count: texts to make (fewer come out where one names an unseen activity).
        seed: decides everything.
        activities: classes of things that each *seen* activity deals with, by its name.
        unseen: activities that no text may name.
        mix: shares of the kinds of text.
        focus: how the errands look.
        batch: errands simulated at once.
    """
    mix, activities = mix or Mix(), activities or {}
    rng = np.random.default_rng(seed)
    titles = sorted(title for title, things in activities.items() if set(things) - {"character"})
    shares = np.array([mix.plain, mix.told, mix.room, mix.facts, mix.activity if titles else 0.0])
    kinds = rng.choice(len(shares), count, p=shares / shares.sum())
    seeds = rng.integers(2**31, size=count)
    # Texts of one errand differ in kind and in how much of it they tell.
    needed = -(-count // mix.texts)
    found = errands(worlds, needed, seed=seed, focus=focus, batch=batch)
    episodes = (episode for episode in found for _ in range(mix.texts))
    for kind, own, episode in zip(kinds, map(int, seeds), episodes, strict=False):
        part = episode.part(0, own % (len(episode.steps) + 1))
        if kind == 0:
            text = narrate(part)
        elif kind == 1:
            text = narrate(part, tell=True, seed=own)
        elif kind == 2:
            text = describe(part, seed=own)
        elif kind == 3:
            text = fact_text(part, seed=own)
        else:
            title = titles[own % len(titles)]
            text = activity_text(title, activities[title], seed=own)
        if text and not mentions(text, unseen):
            yield text
