"""The text of a run: general household text, a tokenizer, and samples of every task type.

    python -m experiments.text --run runs/quick

Needs the stages `tasks` and `collect`. General text (scene descriptions, wandering errands, facts,
which things belong to which seen activity) pretrains both models; plans that the search found,
hindsight-relabelled errands and questions train the small one. Only training scenes and seen
activities are used, every text is checked for the names of unseen activities, and no plan is asked
for in the words of a held-out task.
Hardware: two CPU cores, one and a half to five minutes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from egjax.evals.intervals import Figure
from egjax.evals.manifest import write_atomic
from egjax.experience.corpus import corpus
from egjax.experience.hindsight import hindsight_samples
from egjax.experience.prompts import mentions, plan_sample
from egjax.experience.questions import counting, object_path, recognition
from egjax.experience.records import PreferencePair, Sample, Trajectory
from egjax.experience.rollouts import World, errand_batches, load_worlds
from egjax.experience.tfds import read
from egjax.lm.tokenizer import Tokenizer
from egjax.sim.text import to_english
from egjax.train.progress import progress
from experiments.common import Done, Stage, emit, finished, note, open_run, run_main
from experiments.data import HouseTask, load_tasks

__all__ = ["Config", "load_samples", "stage"]


@dataclass(frozen=True)
class Config:
    """How much text."""

    run: Path = Path("runs/quick")
    """Run directory."""
    robothow: Path | None = None
    """Folder in RobotHow's layout; the installed data where absent."""
    seed: int = 0
    """Of all text."""
    scenes: int = 40
    """Training scenes that errands happen in."""
    general: int = 4000
    """General texts to pretrain on."""
    hindsight: int = 3000
    """Errands that are relabelled; each gives up to two samples."""
    questions: int = 600
    """Errands about which questions are asked, per task type."""
    orders: int = 4
    """Prompts per plan, with items and facts in different orders."""
    asked: int = 100
    """Questions per task type kept for evaluation, from held-out scenes."""
    batch: int = 64
    """Errands simulated at once; also decides which are drawn."""
    vocab_size: int = 1024
    """Tokens of the tokenizer."""
    tokenizer_from: Path | None = None
    """Folder with a `tokenizer.json` to use instead of training one, for models of one's own."""
    json: Annotated[bool, tyro.conf.arg(help="print figures as JSON lines")] = False


def stage(config: Config, tasks: Done, collected: Done) -> Done:
    """Writes `general.jsonl`, `samples.jsonl`, `pairs.jsonl`, `questions.jsonl`, the tokenizer."""
    inputs = {k: v for k, v in vars(config).items() if k not in ("run", "json")}
    inputs |= {"tasks": tasks.fingerprint, "collect": collected.fingerprint}
    if config.tokenizer_from is not None:  # the same wherever it lies
        inputs["tokenizer_from"] = Tokenizer.load(config.tokenizer_from).fingerprint
    found = Stage(config.run, "text", inputs)
    return found.run(lambda out: _work(config, tasks.path, collected.path, out))


def _work(config: Config, tasks_path: Path, experience: Path, out: Path) -> None:
    tasks = load_tasks(tasks_path / "tasks.json", config.robothow)
    unseen = json.loads((tasks_path / "tasks.json").read_text())["unseen"]
    train = [task for task in tasks if task.split == "train"]
    worlds = _worlds(train, config)
    activities = {t.title: sorted({n for p in t.predicates for n in p[1:] if n}) for t in train}
    with progress("general text", config.general) as update:
        general = []
        for text in corpus(
            worlds,
            config.general,
            seed=config.seed,
            activities=activities,
            unseen=unseen,
            batch=config.batch,
        ):
            general.append(text)
            update(len(general), "")
    asked_of_planners = {t.prompt(titled=False) for t in tasks if t.split != "train"}
    samples = _plans(train, experience, config)
    samples += _hindsight(worlds, config, unseen, asked_of_planners)
    samples += _questions(worlds, config, seed=config.seed + 1, count=config.questions)
    samples += _recognition(train, experience, config)
    samples = [s for s in samples if not mentions(f"{s.prompt} {s.completion}", unseen)]
    held = [task for task in tasks if task.split == "seen"]
    asked = _asked(held, sorted({t.title for t in train}), config)
    if config.tokenizer_from is not None:
        tokenizer = Tokenizer.load(config.tokenizer_from)
    else:
        texts = [*general, *(f"{s.prompt} {s.completion}" for s in samples)]
        tokenizer = Tokenizer.train(texts, vocab_size=config.vocab_size)
    tokenizer.save(out / "tokenizer")
    pairs = read(PreferencePair, experience / "experience")
    _write(out / "general.jsonl", [{"text": text} for text in general])
    _write(out / "samples.jsonl", [asdict(sample) for sample in samples])
    _write(out / "questions.jsonl", [asdict(sample) for sample in asked])
    _write(out / "pairs.jsonl", [asdict(pair) for pair in pairs])


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def load_samples(path: Path) -> list[Sample]:
    """Samples of a file that this stage wrote."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [
        Sample(**{**row, "choices": None if row["choices"] is None else tuple(row["choices"])})
        for row in rows
    ]


def _worlds(tasks: Sequence[HouseTask], config: Config) -> list[World]:
    rng = np.random.default_rng(config.seed)
    chosen = sorted(rng.permutation(len(tasks))[: config.scenes].tolist())
    return load_worlds([tasks[i].program.init for i in chosen])


def _plans(train: Sequence[HouseTask], experience: Path, config: Config) -> list[Sample]:
    """Plans that the search found, each asked for in several orders, also without its title."""
    by_name = {task.name: task for task in train}
    best: dict[str, Trajectory] = {}
    for trajectory in read(Trajectory, experience / "experience"):
        if trajectory.label == "positive" and trajectory.task in by_name:
            known = best.get(trajectory.task)
            if known is None or trajectory.length < known.length:
                best[trajectory.task] = trajectory
    samples = []
    for name, trajectory in sorted(best.items()):
        task = by_name[name]
        for order in range(config.orders):
            seed = None if order == 0 else config.seed * 1000 + order
            samples.append(
                plan_sample(
                    trajectory.text, task.title, task.predicates, task.program.init, seed=seed
                )
            )
    return samples


def _hindsight(
    worlds: Sequence[World], config: Config, unseen: Sequence[str], held_out: Collection[str]
) -> list[Sample]:
    samples = []
    found = hindsight_samples(
        worlds,
        config.hindsight,
        seed=config.seed,
        unseen=unseen,
        held_out=held_out,
        batch=config.batch,
    )
    with progress("hindsight", 2 * config.hindsight) as update:
        for sample in found:
            samples.append(sample)
            update(len(samples), "")
    return samples


def _questions(worlds: Sequence[World], config: Config, *, seed: int, count: int) -> list[Sample]:
    """Counting and object paths, from errands."""
    found: list[Sample | None] = []
    rng = np.random.default_rng(seed)
    for _, episodes, _ in errand_batches(worlds, 2 * count, seed=seed, batch=config.batch):
        found += [counting(episode, seed=int(rng.integers(2**31))) for episode in episodes]
        # A path's story interleaves two errands of one household.
        for pair in zip(episodes[::2], episodes[1::2], strict=False):
            found.append(object_path(pair, seed=int(rng.integers(2**31))))
    return [sample for sample in found if sample is not None]


def _recognition(train: Sequence[HouseTask], experience: Path, config: Config) -> list[Sample]:
    titles = sorted({task.title for task in train})
    rng = np.random.default_rng(config.seed)
    return [
        recognition(t.text, t.title, titles, seed=int(rng.integers(2**31)))
        for t in read(Trajectory, experience / "experience")
        if t.label == "positive" and t.split == "train"
    ]


def _asked(held: Sequence[HouseTask], titles: Sequence[str], config: Config) -> list[Sample]:
    """Questions for evaluation: held-out scenes, held-out human plans of seen activities."""
    if not held:
        note("no held-out task of a seen activity: no questions are kept for evaluation")
        return []
    rng = np.random.default_rng(config.seed + 2)
    samples = [
        recognition(to_english(t.program.script), t.title, titles, seed=int(rng.integers(2**31)))
        for t in held
    ]
    worlds = _worlds(held, config)
    samples += _questions(worlds, config, seed=config.seed + 3, count=config.asked)
    kept: list[Sample] = []
    count: Counter[str] = Counter()
    for sample in samples:
        count[sample.task_type] += 1
        if sample.choices and count[sample.task_type] <= config.asked:
            kept.append(sample)
    return kept


def figures(done: Done) -> list[Figure]:
    """How much text of each kind there is."""
    general = len((done.path / "general.jsonl").read_text(encoding="utf-8").splitlines())
    kinds = Counter(s.task_type for s in load_samples(done.path / "samples.jsonl"))
    asked = Counter(s.task_type for s in load_samples(done.path / "questions.jsonl"))
    rows = [Figure("general_texts", general, "texts", n=general)]
    rows += [Figure(f"samples_{kind}", k, "samples", n=k) for kind, k in sorted(kinds.items())]
    return rows + [
        Figure(f"questions_{kind}", k, "questions", n=k) for kind, k in sorted(asked.items())
    ]


def main(config: Config) -> None:
    with open_run(config.run):
        tasks = finished(config.run, "tasks", made_by="tasks")
        collected = finished(config.run, "collect", made_by="collect")
        emit(*figures(stage(config, tasks, collected)), json=config.json)


if __name__ == "__main__":
    run_main(main, Config)
