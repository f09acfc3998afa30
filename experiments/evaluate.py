"""How well does each model plan, held-out tasks and simulator deciding?

    python -m experiments.evaluate --run runs/quick

Greedy plans of πᴺ, πᴱ, πᴸ, π̄ (by decoding), the distilled and the preferred model, the search
itself and the nearest training plan, executed in the simulator; question tasks by log-probability;
a linear probe per layer. Writes raw outcomes per task, so that several seeds can be put together.
Needs all stages before it. Hardware: two CPU cores, a few minutes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from egjax import hosts
from egjax.evals.intervals import Figure, measure
from egjax.evals.manifest import write_atomic
from egjax.evals.nearest import copy_plans
from egjax.evals.plans import Verdict, judge, plan_length
from egjax.evals.probing import ProbeConfig, probe
from egjax.evals.text import correct, length_normalised, path_overlap, rooms, rouge_l
from egjax.experience.records import Sample
from egjax.lm.ensemble import Combine, Models, first
from egjax.lm.model import forward
from egjax.lm.ratio import ratio_combine
from egjax.lm.score import pad_answers, score_ensemble
from egjax.lm.tokenizer import Tokenizer
from egjax.search.mcts import SearchConfig
from egjax.sim.text import Line, to_english
from egjax.train.progress import progress
from experiments.collect import Config as SearchSettings
from experiments.collect import Problem, find_plans
from experiments.common import (
    PARTS,
    Done,
    Stage,
    divided,
    emit,
    finished,
    note,
    open_run,
    run_main,
)
from experiments.data import HouseTask, load_tasks
from experiments.distill import Ratio
from experiments.models import (
    Model,
    asked,
    check_one_vocabulary,
    cut_to,
    for_decoding,
    load,
    plans_of,
    worded,
)
from experiments.text import load_samples
from experiments.training import MODEL

__all__ = ["COPY", "HUMAN", "NAMES", "SEARCH", "Config", "search_stage", "stage"]

NAMES = {"base": "πᴺ", "expert": "πᴱ", "large": "πᴸ", "ratio": "π̄", "distilled": "distilled"}
NAMES |= {"preferred": "+ DPO"}
_LATER = ("distilled", "preferred")  # a run may do without
SEARCH, COPY, HUMAN = "search", "nearest plan", "human"


@dataclass(frozen=True)
class Config:
    """What to evaluate."""

    run: Path = Path("runs/quick")
    """Run directory."""
    robothow: Path | None = None
    """Folder in RobotHow's layout; the installed data where absent."""
    seed: int = 0
    """Of the models that are evaluated."""
    ratio: Ratio = field(default_factory=Ratio)
    """π̄ by decoding."""
    max_new_tokens: int = 96
    """Longest plan in tokens."""
    rows: int = 32
    """Prompts and answers that a model reads at once."""
    int8: bool = False
    """The matrices of πᴸ in eight bits, also in π̄; the small models stay as they are."""
    questions: int = 50
    """Questions asked per task type, at most."""
    search: SearchConfig = field(
        default_factory=lambda: SearchConfig(simulations=64, until_solved=True)
    )
    """The search on held-out tasks."""
    batch: int = 20
    """Held-out tasks searched side by side."""
    probes: ProbeConfig = field(default_factory=ProbeConfig)
    """Linear probes."""
    json: Annotated[bool, tyro.conf.arg(help="print figures as JSON lines")] = False


def _held_out(tasks: Done, config: Config) -> list[HouseTask]:
    found = load_tasks(tasks.path / "tasks.json", config.robothow)
    return [task for task in found if task.split != "train"]


def search_stage(config: Config, tasks: Done) -> Done:
    """What does not depend on a trained model: search and human programs on held-out tasks."""
    inputs: dict[str, Any] = {"search": config.search, "batch": config.batch}
    inputs |= {"robothow": config.robothow, "tasks": tasks.fingerprint}

    def work(out: Path) -> None:
        held = _held_out(tasks, config)
        # Rounded as the collection's are: searched alike, they need no program of their own.
        problem = Problem(held, SearchSettings().instances, rounded=True)
        settings = SearchSettings(search=config.search, batch=config.batch)
        found = find_plans(problem, settings, labels=False, folder=out / PARTS)
        if hosts.index() > 0:
            return
        human = judge(problem.assignments, [t.program.script for t in held])
        rows = {
            SEARCH: _outcomes(held, [one.plan for one in found], _verdicts(problem, found)),
            HUMAN: _outcomes(held, [list(t.program.script) for t in held], human),
        }
        reports = [asdict(one.report) for one in found]
        record = {"plans": rows, "search": reports}
        write_atomic(out / "outcomes.json", json.dumps(record, ensure_ascii=False) + "\n")

    return Stage(config.run, "held_out_search", inputs, by="all").run(work)


def _verdicts(problem: Problem, found: Sequence[Any]) -> list[Verdict]:
    return judge(problem.assignments, [one.plan for one in found])


def stage(config: Config, tasks: Done, text: Done, models: dict[str, Done]) -> Done:
    """Evaluates the models of one seed; `models` by the names of `NAMES`, π̄ apart. What came out
    of a stage that was not run (distilled, preferred) may be absent."""
    inputs = {k: v for k, v in vars(config).items() if k not in ("run", "search", "batch", "json")}
    inputs |= {"tasks": tasks.fingerprint, "text": text.fingerprint}
    inputs |= {name: done.fingerprint for name, done in models.items()}

    def work(out: Path) -> None:
        tokenizer = Tokenizer.load(text.path / "tokenizer")
        loaded = {}
        for name, done in models.items():
            model = load(done.path / MODEL, int8=config.int8 and name == "large")
            loaded[name] = for_decoding(cut_to(model, tokenizer.vocab_size))
        check_one_vocabulary({NAMES[name]: model for name, model in loaded.items()})
        players = _players(loaded, config)
        # Each model's plans, questions of a kind and probe are a unit that one process does.
        units: dict[str, Callable[[], Any]] = {}
        units |= _plans(players, tokenizer, tasks, text, config)
        units |= _questions(players, tokenizer, text, config)
        units |= _probes(loaded, tokenizer, tasks, config)
        results = divided(out / PARTS, units, at="evaluation")
        if hosts.index() > 0:
            return
        record: dict[str, Any] = {"plans": {}, "questions": {}, "probes": {}}
        for unit, result in zip(units, results, strict=True):
            part, name, *kind = unit.split(".")
            if kind:
                record[part].setdefault(name, {})[kind[0]] = result
            else:
                record[part][name] = result
        write_atomic(out / "outcomes.json", json.dumps(record, ensure_ascii=False) + "\n")

    return Stage(config.run, f"seed{config.seed}/evaluate", inputs, by="all").run(work)


def _players(loaded: dict[str, Model], config: Config) -> dict[str, tuple[Models, Combine]]:
    """What decodes: each model by itself, and π̄ from three."""
    players: dict[str, tuple[Models, Combine]] = {
        name: ([(model.params, model.config)], first) for name, model in loaded.items()
    }
    three = [loaded[name] for name in ("large", "expert", "base")]
    combine = ratio_combine(**vars(config.ratio))
    players["ratio"] = ([(m.params, m.config) for m in three], combine)
    return {name: players[name] for name in NAMES if name in players}


def _plans(
    players: dict[str, tuple[Models, Combine]],
    tokenizer: Tokenizer,
    tasks: Done,
    text: Done,
    config: Config,
) -> dict[str, Callable[[], Any]]:
    """What gives the outcomes of each model's plans."""
    held = _held_out(tasks, config)
    problem = Problem(held, SearchSettings().instances, rounded=True)
    prompts = [task.prompt() for task in held]
    known = [s for s in load_samples(text.path / "samples.jsonl") if s.task_type == "plan"]

    def copied() -> list[dict[str, Any]]:
        # The copy knows what πᴱ learnt from, relabelled errands included.
        plans = copy_plans([s.prompt for s in known], [s.completion for s in known], prompts)
        return _outcomes(held, plans, judge(problem.assignments, plans))

    def decoded(name: str) -> list[dict[str, Any]]:
        models, combine = players[name]
        plans = plans_of(
            models,
            tokenizer,
            prompts,
            title=f"plans {NAMES[name]}",
            combine=combine,
            max_new_tokens=config.max_new_tokens,
            rows=config.rows,
        )
        return _outcomes(held, plans, judge(problem.assignments, plans))

    units = {f"plans.{name}": functools.partial(decoded, name) for name in players}
    return {f"plans.{COPY}": copied, **units}


def _outcomes(
    held: Sequence[HouseTask], plans: Sequence[str | Sequence[Line]], verdicts: Sequence[Verdict]
) -> list[dict[str, Any]]:
    """One row a task: the plan and what the simulator said."""
    said = [plan if isinstance(plan, str) else to_english(plan) for plan in plans]
    human = [to_english(task.program.script) for task in held]
    rouge = rouge_l(said, human)
    alike = _alike(held)
    return [
        {
            "task": task.name,
            "alike": alike[task.name],
            "activity": task.title,
            "split": task.split,
            "plan": plan,
            "solved": verdict.solved,
            "executable": verdict.executable,
            "satisfied": verdict.satisfied,
            "goals": verdict.goals,
            "length": verdict.length,
            "human_length": plan_length(task.program.script),
            "rouge_l": float(score),
            "wanted": [str(p) for p in task.predicates],
            "steps": [asdict(step) for step in verdict.steps],
        }
        for task, plan, verdict, score in zip(held, said, verdicts, rouge, strict=True)
    ]


def _alike(tasks: Sequence[HouseTask]) -> dict[str, str]:
    """For each task the first one that asks the same, the activity's name apart: outcomes of such
    tasks are hardly independent."""
    first: dict[str, str] = {}
    return {t.name: first.setdefault(t.prompt(titled=False), t.name) for t in tasks}


def _questions(
    players: dict[str, tuple[Models, Combine]], tokenizer: Tokenizer, text: Done, config: Config
) -> dict[str, Callable[[], Any]]:
    """Multiple choice by length-normalised log-probability: right or wrong, per task type. And
    paths as models write them: the share of the rooms that is right (E2WM's metric)."""
    asked_ = load_samples(text.path / "questions.jsonl")
    kinds = sorted({sample.task_type for sample in asked_})

    def of_kind(kind: str) -> list[Sample]:
        return [s for s in asked_ if s.task_type == kind and s.choices][: config.questions]

    def written(name: str) -> list[float]:
        models, combine = players[name]
        samples = of_kind("path")
        answers = plans_of(
            models,
            tokenizer,
            [s.prompt for s in samples],
            title=f"paths {NAMES[name]}",
            combine=combine,
            max_new_tokens=config.max_new_tokens,
            rows=config.rows,
        )
        return [
            path_overlap(rooms(answer), rooms(s.completion))
            for answer, s in zip(answers, samples, strict=True)
        ]

    def right(name: str, kind: str) -> list[bool]:
        models, combine = players[name]
        samples = of_kind(kind)
        title = f"{kind} {NAMES[name]}"
        scores, mask = _scores(models, combine, tokenizer, samples, title, config.rows)
        answers = [(s.choices or ()).index(s.completion) for s in samples]
        return [bool(x) for x in correct(scores, np.array(answers), mask)]

    units: dict[str, Callable[[], Any]] = {
        f"questions.{name}.{kind}": functools.partial(right, name, kind)
        for name in players
        for kind in kinds
    }
    if "path" in kinds:
        units |= {f"questions.{n}.path_written": functools.partial(written, n) for n in players}
    return units


def _scores(
    models: Models,
    combine: Combine,
    tokenizer: Tokenizer,
    samples: Sequence[Sample],
    title: str,
    rows: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Length-normalised log-probability of each choice: float[n, most], and which are choices."""
    config = models[0][1]
    pairs = [
        worded(config, tokenizer, s.prompt, choice) for s in samples for choice in s.choices or ()
    ]
    longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
    logps, lengths = [], []
    with progress(title, len(pairs)) as update:
        for start in range(0, len(pairs), rows):
            part = pairs[start : start + rows]
            batch = pad_answers(part, pad_id=config.pad_id or 0, bucket=longest, rows=rows)
            total, count = score_ensemble(models, batch.tokens, batch.mask, combine=combine)
            logps += np.asarray(total)[: len(part)].tolist()
            lengths += np.asarray(count)[: len(part)].tolist()
            update(len(logps), "")
    flat = length_normalised(np.array(logps), np.array(lengths))
    most = max(len(s.choices or ()) for s in samples)
    scores, mask = np.zeros((len(samples), most)), np.zeros((len(samples), most), bool)
    at = 0
    for i, sample in enumerate(samples):
        count = len(sample.choices or ())
        scores[i, :count], mask[i, :count] = flat[at : at + count], True
        at += count
    return scores, mask


def _probes(
    loaded: dict[str, Model], tokenizer: Tokenizer, tasks: Done, config: Config
) -> dict[str, Callable[[], Any]]:
    """Can the activity be read off the last token of a prompt that does not name it?"""
    every = load_tasks(tasks.path / "tasks.json", config.robothow)
    # An activity on one side of the split only would measure nothing.
    titles = [task.title for task in every]
    every = [task for task in every if titles.count(task.title) >= 5]
    if len(every) < 20:
        note("too few tasks per activity for a linear probe")
        return {}
    prompts = [task.prompt(titled=False) for task in every]
    alike = _alike(every)

    def curve(name: str) -> dict[str, Any]:
        hidden = _last_hidden(loaded[name], tokenizer, prompts, config.rows)
        found = probe(
            hidden,
            [task.title for task in every],
            [alike[task.name] for task in every],
            config.probes,
            name=f"probe/{name}",
        )
        return {
            "correct": found.correct.tolist(),
            "tasks": [alike[every[i].name] for i in found.tests],
            "majority": found.majority.to_dict(),
        }

    names = ("base", "expert", "large", "distilled")
    return {f"probes.{n}": functools.partial(curve, n) for n in names if n in loaded}


def _last_hidden(
    model: Model, tokenizer: Tokenizer, prompts: Sequence[str], rows: int
) -> np.ndarray:
    """float32[L + 1, n, D]: the residual stream at the last token of each prompt."""
    ids = [asked(model.config, tokens) for tokens in tokenizer.encode_batch(list(prompts))]
    longest = max(map(len, ids))
    read: Callable[..., Any] = jax.jit(
        lambda params, tokens: forward(params, model.config, tokens, return_hidden=True)[1]
    )
    parts = []
    for start in range(0, len(ids), rows):
        part = ids[start : start + rows]
        tokens = np.zeros((rows, longest), np.int32)
        for i, row in enumerate(part):
            tokens[i, : len(row)] = row
        last = np.array([len(row) - 1 for row in part])
        hidden = np.asarray(read(model.params, jnp.asarray(tokens)))
        parts.append(hidden[:, np.arange(len(part)), last])
    return np.concatenate(parts, axis=1)


def figures(done: Done, seed: int) -> list[Figure]:
    """Plan success of every row on every split, and accuracy on every question task."""
    record = json.loads((done.path / "outcomes.json").read_text(encoding="utf-8"))
    found = []
    for name, rows in record["plans"].items():
        for split in ("seen", "unseen"):
            solved = np.array([row["solved"] for row in rows if row["split"] == split], bool)
            if len(solved):
                label = f"success/{NAMES.get(name, name)}/{split}"
                alike = [row["alike"] for row in rows if row["split"] == split]
                found.append(measure(label, solved, "fraction", seed=seed, clusters=alike))
    for name, kinds in record["questions"].items():
        for kind, right in kinds.items():
            label = f"{kind}/{NAMES[name]}"
            found.append(measure(label, np.array(right), "fraction", seed=seed))
    return found


def main(config: Config) -> None:
    made_by = {"base": "pretrain_small", "expert": "sft", "large": "pretrain_large"}
    made_by |= {"distilled": "distill", "preferred": "dpo"}
    with open_run(config.run):
        tasks = finished(config.run, "tasks", made_by="tasks")
        text = finished(config.run, "text", made_by="text")
        models = {
            name: finished(config.run, f"seed{config.seed}/{stage_name}", made_by="pipeline")
            for name, stage_name in made_by.items()
            if name not in _LATER or (config.run / f"seed{config.seed}/{stage_name}").is_dir()
        }
        search_stage(config, tasks)
        emit(*figures(stage(config, tasks, text, models), config.seed), json=config.json)


if __name__ == "__main__":
    run_main(main, Config)
