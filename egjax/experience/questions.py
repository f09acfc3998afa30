"""Questions whose answers the simulator knows: activity recognition, counting, object paths.

The tasks are those of E2WM's benchmark (arXiv 2305.10626), asked in the project's own words. Every
function gives a `Sample`, which is both a text to learn from and, by its choices, a question to be
asked; or None where an episode has nothing to ask about.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from egjax.experience.episodes import Episode, Fact, Step
from egjax.experience.prompts import spoken
from egjax.experience.records import Sample

__all__ = ["PEOPLE", "contents", "counting", "object_path", "path_of", "recognition", "told"]

PEOPLE = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jonas")

_PAST = {
    "WALK": "walked to the {0}", "RUN": "ran to the {0}", "FIND": "found the {0}",
    "SIT": "sat down on the {0}", "LIE": "lay down on the {0}", "STANDUP": "stood up",
    "GRAB": "picked up the {0}", "PUTBACK": "put the {0} on the {1}",
    "PUTIN": "put the {0} into the {1}", "PUTOBJBACK": "put the {0} back",
    "DROP": "dropped the {0}", "RELEASE": "let go of the {0}", "OPEN": "opened the {0}",
    "CLOSE": "closed the {0}", "SWITCHON": "switched on the {0}",
    "SWITCHOFF": "switched off the {0}", "PLUGIN": "plugged in the {0}",
    "PLUGOUT": "unplugged the {0}", "WASH": "washed the {0}", "RINSE": "rinsed the {0}",
    "SCRUB": "scrubbed the {0}", "WIPE": "wiped the {0}", "TURNTO": "turned to the {0}",
    "LOOKAT": "looked at the {0}", "POINTAT": "pointed at the {0}", "WATCH": "watched the {0}",
    "POUR": "poured the {0} into the {1}", "PUTON": "put on the {0}", "PUTOFF": "took off the {0}",
    "DRINK": "drank from the {0}", "READ": "read the {0}", "EAT": "ate the {0}",
    "CUT": "cut the {0}", "TOUCH": "touched the {0}", "TYPE": "typed on the {0}",
    "PUSH": "pushed the {0}", "PULL": "pulled the {0}", "MOVE": "moved the {0}",
    "SQUEEZE": "squeezed the {0}", "SLEEP": "slept", "WAKEUP": "woke up",
    "GREET": "greeted the {0}",
}  # fmt: skip


def told(step: Step) -> str:
    """What a step was, in the past tense and without a subject: `put the cup on the table`."""
    return _PAST[step.line.verb].format(*(spoken(name) for name, _ in step.line.arguments))


def _options(answer: str, others: Sequence[str], count: int, rng: random.Random) -> tuple[str, ...]:
    pool = sorted(set(others) - {answer})
    options = [answer, *rng.sample(pool, min(count - 1, len(pool)))]
    rng.shuffle(options)
    return tuple(options)


def recognition(
    plan: str, title: str, titles: Sequence[str], *, seed: int, choices: int = 4
) -> Sample:
    """From a plan to the name of its activity.

    Args:
        plan: in English.
        title: the activity's name.
        titles: names that may stand as wrong answers. For training, give those of training tasks
            only: nothing else is ever named.
        seed: decides which wrong answers are offered, and their order.
        choices: answers offered.
    """
    names = [spoken(name) for name in titles]
    answer = spoken(title)
    options = _options(answer, names, choices, random.Random(seed))
    return Sample("recognition", f"Plan: {plan}\nQ: What is this activity?\nA:", answer, options)


def contents(facts: frozenset[Fact] | set[Fact], place: int, character: int) -> set[int]:
    """What is ON or INSIDE a place, the character apart."""
    inside = {f.subject for f in facts if f.relation in ("ON", "INSIDE") and f.other == place}
    return inside - {character}


def _loads(episode: Episode, place: int) -> list[set[int]]:
    """`contents` of a place at the start and after each step."""
    states = episode.states(lambda fact: fact.other == place)
    return [contents(facts, place, episode.character) for facts in states]


def _listing(episode: Episode, items: set[int]) -> str:
    names = [f"the {episode.name(i)}" for i in sorted(items)]
    if len(names) < 2:
        return names[0] if names else "nothing"
    return ", ".join(names[:-1]) + " and " + names[-1]


def _narrated(episode: Episode, person: str, steps: Sequence[Step]) -> str:
    """Sentences of up to three steps: `Anna walked to the sink, opened it and ….`"""
    sentences = []
    for first in range(0, len(steps), 3):
        parts = [told(step) for step in steps[first : first + 3]]
        joined = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
        sentences.append(f"{person} {joined}.")
    return " ".join(sentences)


def counting(
    episode: Episode, *, seed: int, most: int = 6, longest: int = 12, choices: int = 4
) -> Sample | None:
    """How many items are on or in a place after an errand.

    What is there at the start is told, then every step. The place is one that something was put
    on or into during the errand, or was taken from.

    Args:
        episode: an errand.
        seed: decides the place, the person, and the wrong answers.
        most: places that ever have more items than this are not asked about.
        longest: steps told at most; the errand is cut there.
        choices: answers offered.
    """
    rng = random.Random(seed)
    episode = episode.part(0, min(len(episode.steps), longest))
    grabbed = {i for s in episode.steps if s.line.verb == "GRAB" for _, i in s.line.arguments}
    changes = [f for s in episode.steps for f in s.added | s.removed]
    touched = {
        f.other
        for f in changes
        if f.relation in ("ON", "INSIDE") and f.other is not None and f.subject in grabbed
    }
    places = []
    for place in sorted(touched - grabbed - episode.rooms - {episode.character}):
        sizes = [len(items) for items in _loads(episode, place)]
        # Two places of one name could not be told apart.
        alike = [i for i in touched if episode.classes[i] == episode.classes[place]]
        if max(sizes) <= most and len(alike) == 1:
            places.append(place)
    if not places:
        return None
    place, person = rng.choice(places), rng.choice(PEOPLE)
    name = episode.name(place)
    before, *_, after = _loads(episode, place)
    start = f"At first the {name} holds {_listing(episode, before)}."
    story = _narrated(episode, person, episode.steps)
    answer = str(len(after))
    options = _options(answer, [str(n) for n in range(most + 1)], choices, rng)
    return Sample(
        "counting", f"{start} {story}\nQ: How many items does the {name} hold?\nA:", answer, options
    )


def path_of(episode: Episode, item: int) -> list[int]:
    """Ids of the rooms where an item is carried through, in order, repeats in a row once.

    It begins with the room where the item is first picked up and ends where it was last held.
    While it is held it is where the character is (the simulator leaves a carried object INSIDE
    the room that was left, so its own edges do not tell).
    """
    path: list[int] = []
    me = episode.character
    for facts in episode.states(lambda fact: fact.subject == me):
        if any(f.other == item and f.relation.startswith("HOLDS") for f in facts):
            rooms = {f.other for f in facts if f.relation == "INSIDE" and f.other is not None}
            path += [room for room in sorted(rooms & episode.rooms)[:1] if path[-1:] != [room]]
    return path


def _movements(episode: Episode, person: str, rng: random.Random) -> list[str]:
    """Sentences for the steps that matter to where things are: rooms entered, things taken and
    left. Other steps are not told."""
    sentences = []
    inside = {f.other for f in episode.start if f[:2] == ("INSIDE", episode.character)}
    here = [room for room in sorted(episode.rooms) if room in inside]
    if here:
        sentences.append(f"{person} was in the {episode.name(here[0])}.")
    carried = ("GRAB", "PUTBACK", "PUTIN", "PUTOBJBACK", "DROP", "RELEASE")
    for step in episode.steps:
        room = next((f.other for f in step.added if f[:2] == ("INSIDE", episode.character)), None)
        if room in episode.rooms:
            verb = rng.choice(("went to", "walked into", "entered", "moved to"))
            sentences.append(f"{person} {verb} the {episode.name(room)}.")
        elif step.line.verb in carried:
            sentences.append(f"{person} {told(step)}.")
    return sentences


def object_path(
    episodes: Sequence[Episode], *, seed: int, shortest: int = 2, choices: int = 4
) -> Sample | None:
    """Through which rooms an object went, in a story of one or several people.

    Args:
        episodes: one errand per person, of one household; their steps are interleaved, each in
            its own order. They must not carry things of the same name, else None.
        seed: decides the object, the people, and how their steps mix.
        shortest: rooms that the path has at least.
        choices: answers offered.
    """
    rng = random.Random(seed)
    owners: dict[str, int] = {}
    options: list[tuple[int, int]] = []
    for number, episode in enumerate(episodes):
        grabbed = {i for s in episode.steps if s.line.verb == "GRAB" for _, i in s.line.arguments}
        for item in sorted(i for i in grabbed if i is not None):
            if episode.classes[item] in owners:
                return None
            owners[episode.classes[item]] = number
            options.append((number, item))
    paths = {option: path_of(episodes[option[0]], option[1]) for option in options}
    options = [option for option in options if len(paths[option]) >= shortest]
    if not options:
        return None
    number, item = rng.choice(options)
    people = rng.sample(PEOPLE, len(episodes))
    queues = [_movements(e, p, rng) for e, p in zip(episodes, people, strict=True)]
    story = []
    while any(queues):
        story.append(rng.choice([queue for queue in queues if queue]).pop(0))
    episode = episodes[number]
    rooms = [episode.name(room) for room in paths[number, item]]
    house = [episode.name(room) for room in sorted(episode.rooms)]
    entered = [room for room in house if any(room in sentence for sentence in story)]
    wrong = _wrong_paths(rooms, entered, rng) or _wrong_paths(rooms, house, rng)
    wrong = wrong or [list(reversed(rooms))]
    answer = ", ".join(rooms)
    question = f"Q: Through which rooms did the {episode.name(item)} go?"
    return Sample(
        "path",
        f"{' '.join(story)}\n{question}\nA:",
        answer,
        _options(answer, [", ".join(path) for path in wrong], choices, rng),
    )


def _wrong_paths(path: Sequence[str], rooms: Sequence[str], rng: random.Random) -> list[list[str]]:
    """Paths of the right one's length: one room exchanged, another, and both. So each of the four
    differs alike from the others, and what they share does not give the right one away. None where
    there are too few rooms."""
    places = list(itertools.permutations(range(len(path)), 2))
    exchanged = list(itertools.product(rooms, repeat=2))
    for first, second in rng.sample(places, len(places)):
        for a, b in rng.sample(exchanged, len(exchanged)):
            wrong = [list(path) for _ in range(3)]
            wrong[0][first] = wrong[2][first] = a
            wrong[1][second] = wrong[2][second] = b
            # Nobody goes from a room to itself.
            walks = all(x != y for one in wrong for x, y in itertools.pairwise(one))
            if a != path[first] and b != path[second] and walks:
                return wrong
    return []
