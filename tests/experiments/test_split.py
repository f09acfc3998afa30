"""What is trained on and what is held out: no two tasks that ask the same on both sides."""

from __future__ import annotations

from dataclasses import replace

import pytest

from egjax.errors import EgjaxError
from egjax.sim.household import home_programs
from experiments import tasks
from experiments.data import make_task, split_tasks

BASE = make_task(next(iter(home_programs())), "core", "train")


def made(title: str, name: str):
    return replace(BASE, program=replace(BASE.program, title=title, name=name))


def divided(rows, **shares):
    found = [made(title, name) for title, name, _ in rows]
    return split_tasks(found, [prompt for *_, prompt in rows], **shares)


@pytest.mark.parametrize("seed", range(6))
def test_tasks_that_ask_the_same_are_on_one_side(seed):
    rows = [
        (f"activity {a}", f"file{a * 100 + i // 2}_{i % 2}", f"{(a + i) % 7}, {i % 5}")
        for a in range(6)
        for i in range(12)
    ]
    prompts = {name: prompt for _, name, prompt in rows}
    split = divided(rows, seed=seed, unseen_share=0.2, seen_share=0.3)
    sides = {side: [t for t in split if t.split == side] for side in ("train", "seen", "unseen")}
    assert all(sides.values())
    held = [*sides["seen"], *sides["unseen"]]
    asked = {prompts[t.name] for t in held}
    assert not asked & {prompts[t.name] for t in sides["train"]}
    files = {(t.title, t.name.split("_")[0]) for t in held}
    assert not files & {(t.title, t.name.split("_")[0]) for t in sides["train"]}
    titles = {t.title for t in sides["unseen"]}
    assert not titles & {t.title for t in [*sides["train"], *sides["seen"]]}
    assert split == divided(rows, seed=seed, unseen_share=0.2, seen_share=0.3)


def test_families_are_linked_by_file_or_prompt():
    # a and b share a file, b and c a prompt: all three or none.
    rows = [("x", "file1_1", "p"), ("x", "file1_2", "q"), ("x", "file2_1", "q")]
    rows += [("x", f"file{n}_1", f"own {n}") for n in range(3, 9)]
    for seed in range(8):
        split = divided(rows, seed=seed, unseen_share=0.0, seen_share=0.4)
        assert len({t.split for t in split if t.name in ("file1_1", "file1_2", "file2_1")}) == 1


def test_an_activity_without_a_training_task_is_not_called_seen():
    rows = [("rare", "file1_1", "a"), ("rare", "file2_1", "b")]
    rows += [("often", f"file{n}_1", f"own {n}") for n in range(3, 30)]
    split = divided(rows, seed=0, unseen_share=0.0, seen_share=0.3)
    for seed in range(8):
        kept = tasks._limit(split, tasks.Config(train=3, seed=seed))
        trained = {t.title for t in kept if t.split == "train"}
        assert {t.title for t in kept if t.split == "seen"} <= trained


@pytest.mark.parametrize(
    "options", [{"unseen_share": 1.5}, {"seen_share": float("nan")}, {"train": -1}]
)
def test_shares_and_counts_are_checked(tmp_path, options):
    with pytest.raises(EgjaxError, match=f"--{next(iter(options)).replace('_', '-')}"):
        tasks.stage(tasks.Config(tmp_path, **options))
