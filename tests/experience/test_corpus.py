import os
import subprocess
import sys
from pathlib import Path

from errand_helpers import FOCUS

from egjax.experience.corpus import Mix, activity_text, corpus, describe, fact_text, narrate
from egjax.experience.prompts import mentions
from egjax.sim.household import home_programs
from egjax.sim.text import parse_english

THINGS = {"Watch TV": ["television", "couch"], "Read a book": ["book"]}


def texts(worlds, seed, **more):
    return list(corpus(worlds, 150, seed=seed, focus=FOCUS, batch=32, **more))


def test_same_seed_same_corpus(worlds):
    first = texts(worlds, 0, activities=THINGS)
    assert first == texts(worlds, 0, activities=THINGS)
    assert first != texts(worlds, 1, activities=THINGS)
    assert len(first) > 130
    assert len(set(first)) > 100
    assert any(text.startswith("To watch tv, one may need") for text in first)


def test_another_process_with_other_hashes_makes_the_same_texts():
    # Sets of strings are iterated in an order that differs from process to process.
    script = """
import hashlib
from errand_helpers import FOCUS
from egjax.experience.corpus import corpus
from egjax.experience.hindsight import hindsight_samples
from egjax.experience.questions import counting, object_path
from egjax.experience.rollouts import errands, load_worlds
from egjax.sim.household import home_graph
worlds = load_worlds([home_graph("cottage"), home_graph("flat")])
some = list(errands(worlds, 32, seed=3, focus=FOCUS, batch=32))
made = [
    *corpus(worlds, 90, seed=0, focus=FOCUS, batch=32),
    *hindsight_samples(worlds, 32, seed=0, focus=FOCUS, batch=32),
    *(counting(e, seed=0) for e in some),
    *(object_path([e], seed=0) for e in some),
]
print(hashlib.sha256(repr(made).encode()).hexdigest())
"""
    here = Path(__file__).parent
    digests = set()
    for hash_seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        run = [sys.executable, "-c", script]
        done = subprocess.run(run, capture_output=True, text=True, env=env, cwd=here)
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout)
    assert len(digests) == 1


def test_no_unseen_activity_is_named(worlds):
    titles = sorted({program.title for program in home_programs()})
    unseen, seen = titles[::2], titles[1::2]
    # "Drink milk" is a step's sentence as well; put one more such name among the held-out ones.
    unseen += ["Walk to kitchen"]
    free = texts(worlds, 0, activities={title: ["cup"] for title in titles})
    assert any(mentions(text, unseen) for text in free)
    guarded = texts(worlds, 0, activities={title: ["cup"] for title in seen}, unseen=unseen)
    assert len(guarded) > 50
    for text in guarded:
        assert not any(title.lower() in text.lower() for title in unseen if " " in title)


def test_narration_is_the_plan(errand_list):
    for episode in errand_list[:10]:
        place, _, plan = narrate(episode).partition(". ")
        assert place.startswith("You are in")
        lines = parse_english(plan) if plan else []
        assert [line.verb for line in lines] == [step.line.verb for step in episode.steps]


def test_told_changes_are_true_afterwards(errand_list):
    episode = next(e for e in errand_list if any(s.line.verb == "OPEN" for s in e.steps))
    at = next(t for t, s in enumerate(episode.steps) if s.line.verb == "OPEN")
    text = narrate(episode.part(at, at + 1), tell=True, seed=0)
    name = episode.steps[at].line.arguments[0][0].replace("_", " ")
    assert f"Open {name}. The {name} is open." in text


def test_facts_and_descriptions_are_true_at_the_end(errand_list):
    for number, episode in enumerate(errand_list[:12]):
        end = episode.after(len(episode.steps))
        told = {
            (episode.name(f.subject), f.relation, f.other and episode.name(f.other)) for f in end
        }
        lines = fact_text(episode, seed=number).split("\n")[1:]
        assert lines
        for question, answer in zip(lines[::2], lines[1::2], strict=True):
            answer = answer.removeprefix("A: ")
            if question.startswith("Q: Where is the "):
                how, _, where = answer.partition(" ")
                name = question.removeprefix("Q: Where is the ").removesuffix("?")
                assert (name, {"on": "ON", "in": "INSIDE"}[how], where) in told
            else:
                name, _, state = question.removeprefix("Q: Is the ")[:-1].rpartition(" ")
                assert ((name, state.upper(), None) in told) == (answer == "yes")
        for sentence in describe(episode, seed=number).split(". ")[1:]:
            subject, _, rest = sentence.removeprefix("The ").rstrip(".").partition(" is ")
            words = rest.split(" the ")
            key = words[0].upper().replace(" ", "_") if len(words) == 1 else words[0]
            relation = {"on": "ON", "in": "INSIDE"}.get(key, key)
            if rest != "on you":
                assert (subject, relation, words[1] if len(words) == 2 else None) in told


def test_only_the_activities_given(worlds):
    only = texts(worlds, 0, activities=THINGS, mix=Mix(0, 0, 0, 0, 1))
    assert set(only) == {
        "To watch tv, one may need television, couch.",
        "To watch tv, one may need couch, television.",
        "To read a book, one may need book.",
    }
    assert activity_text("Watch TV", ["tv_stand"], seed=0) == "To watch tv, one may need tv stand."
