"""From RobotHow to a grounded language model: the whole pipeline, one command.

    python -m experiments.pipeline                  (`make run`: under 15 minutes on two CPU cores)
    python -m experiments.pipeline --preset long    (three seeds: an hour to 1 3/4 hours)
    python -m experiments.pipeline --preset card --small-from FOLDER --large-from FOLDER

tasks → search → experience and text → pretraining of a small and a large Llama → SFT (πᴺ → πᴱ) →
distillation of πᴱ/πᴺ into the large one → DPO → evaluation in the simulator → report. After
"Growing Through Experience" (arXiv 2506.01312). A stopped run goes on with the same command;
finished stages are kept; `--fresh` starts over.

`--preset card`: one accelerator, weights of one's own, e.g. Llama 3.2 1B and Llama 3.1 8B (one
tokenizer). No pretraining: the small one is fine-tuned at 2,048 packed tokens a row, the large one
is steered by π̄ as it decodes, and stays as it is: its own training (distillation, DPO) is left out,
for weights, moments and gradients in float32 alone take 120 GiB. Memory for these two, by formula:
31.3 GiB for SFT and 29.3 for evaluation; with `--int8 --master bfloat16 --rows 4` 16.8 and 18.0,
with `--rows 1` 15.3 and 14.3. `--memory` prints it for any two folders (config.json and tokenizer
suffice). A device that gives less is refused before anything runs; JAX takes three quarters of a
GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from egjax import hosts
from egjax.capacity.card import check_fits, device_bytes, evaluation_bytes, tuning_bytes
from egjax.errors import EgjaxError
from egjax.evals.intervals import Figure
from egjax.search.mcts import SearchConfig
from egjax.train.layout import Layout
from experiments import collect, distill, dpo, evaluate, own, pretrain, report, sft, tasks, text
from experiments.common import emit, note, open_run, run_main
from experiments.training import Training

__all__ = ["Config", "Plan", "adjusted", "card", "long", "memory", "quick", "run", "tiny"]


@dataclass(frozen=True)
class Config:
    """What to run."""

    preset: Literal["quick", "long", "tiny", "card"] = "quick"
    """How much of everything."""
    run: Path | None = None
    """Run directory, `runs/<preset>` where absent."""
    robothow: Path | None = None
    """Folder in RobotHow's layout; the installed data where absent."""
    seeds: tuple[int, ...] = ()
    """Seeds of models, the preset's where absent."""
    small_from: Path | None = None
    """Hugging Face folder of a small Llama to start from; the run takes its tokenizer."""
    large_from: Path | None = None
    """Hugging Face folder of a large Llama to start from, with the same tokenizer."""
    int8: bool = False
    """Frozen models in eight bits: πᴸ as it is evaluated, also in π̄, and teachers."""
    rows: int | None = None
    """Rows that the fine-tuning and the evaluation of preset `card` hold at once; a step stays as
    large."""
    master: Literal["float32", "bfloat16"] | None = None
    """Type of trained weights and moments in preset `card`. In bfloat16 updates below 1/256 of a
    weight are lost."""
    memory: bool = False
    """Print what preset `card` needs on the device, and stop."""
    fresh: bool = False
    """Delete what earlier runs left in the run directory."""
    json: Annotated[bool, tyro.conf.arg(help="print figures as JSON lines")] = False


@dataclass(frozen=True)
class Plan:
    """The settings of every stage, None for one that is left out; run directory and seed are filled
    in by `run`."""

    seeds: tuple[int, ...]
    tasks: tasks.Config
    collect: collect.Config
    text: text.Config
    pretrain: pretrain.Config
    sft: sft.Config
    distill: distill.Config | None
    dpo: dpo.Config | None
    evaluate: evaluate.Config


def quick() -> Plan:
    """`make run`: small numbers of everything, all stages real."""
    return Plan(
        seeds=(0,),
        tasks=tasks.Config(train=120, held_out=40),
        collect=collect.Config(search=SearchConfig(simulations=32), batch=24),
        text=text.Config(scenes=24, general=3000, hindsight=2500, questions=400, asked=60),
        pretrain=pretrain.Config(
            small=Training(240, 8, 256, 3e-3), large=Training(120, 8, 256, 2e-3)
        ),
        sft=sft.Config(training=Training(500, 8, 256, 3e-3)),
        distill=distill.Config(training=Training(100, 8, 256, 2e-3)),
        dpo=dpo.Config(training=Training(10, 8, 256, 1e-4)),
        evaluate=evaluate.Config(),
    )


def long() -> Plan:
    """The README's table: all tasks, three seeds."""
    return Plan(
        seeds=(0, 1, 2),
        tasks=tasks.Config(held_out=60),
        collect=collect.Config(search=SearchConfig(simulations=48), batch=24),
        text=text.Config(scenes=60, general=6000, hindsight=8000, questions=600),
        pretrain=pretrain.Config(
            small=Training(400, 8, 256, 3e-3), large=Training(200, 8, 256, 2e-3)
        ),
        sft=sft.Config(training=Training(1000, 8, 256, 3e-3)),
        distill=distill.Config(training=Training(300, 8, 256, 2e-3)),
        dpo=dpo.Config(training=Training(60, 8, 256, 1e-4)),
        evaluate=evaluate.Config(),
    )


def tiny() -> Plan:
    """A pass through every stage in a minute or two, for tests: numbers mean nothing.

    Most of the time is compilation: both searches share their programs, and so do errands and
    hindsight on what the search tried.
    """
    looking = SearchConfig(simulations=32, rollouts=4)
    return Plan(
        seeds=(0,),
        tasks=tasks.Config(train=8, held_out=3),
        collect=collect.Config(search=looking, batch=4, second=0, shard_tasks=4),
        text=text.Config(
            scenes=2,
            general=64,
            hindsight=24,
            questions=16,
            orders=1,
            asked=4,
            vocab_size=400,
            batch=4,
        ),
        pretrain=pretrain.Config(
            small=Training(2, 4, 384, 1e-3),
            large=Training(2, 4, 384, 1e-3),
            small_size=pretrain.Size(32, 64, 2, 2, 1, 16),
            large_size=pretrain.Size(64, 128, 3, 2, 1, 32),
        ),
        sft=sft.Config(training=Training(2, 4, 384, 1e-3)),
        distill=distill.Config(training=Training(2, 4, 384, 1e-3)),
        dpo=dpo.Config(training=Training(2, 4, 384, 1e-4)),
        evaluate=evaluate.Config(max_new_tokens=16, rows=8, questions=8, search=looking, batch=4),
    )


def card() -> Plan:
    """One accelerator and checkpoints of one's own: a small model is grounded, a large one steered.

    Numbers of tasks and texts are those of `long`; an epoch is some 80 steps.
    """
    return Plan(
        seeds=(0,),
        tasks=tasks.Config(held_out=60),
        collect=collect.Config(search=SearchConfig(simulations=48), batch=24),
        text=text.Config(scenes=60, general=1, hindsight=8000, questions=600),
        pretrain=pretrain.Config(train=False),
        sft=sft.Config(
            training=Training(
                200,
                16,
                2048,
                2e-5,
                layout=Layout(remat="full", chunked=True, master="float32", accumulate=2),
            )
        ),
        distill=None,
        dpo=None,
        evaluate=evaluate.Config(rows=8),
    )


_PRESETS: dict[str, Callable[[], Plan]] = {
    "quick": quick,
    "long": long,
    "tiny": tiny,
    "card": card,
}
_GIB = 2**30
_READ = 512  # tokens of a prompt with its plan that memory is planned for


def adjusted(plan: Plan, config: Config) -> Plan:
    """The settings with what the command line says of memory.

    Raises:
        EgjaxError: an option that the preset does not know, or rows that do not divide a step.
    """
    fill = dataclasses.replace
    if config.int8:
        teachers = plan.distill and fill(plan.distill, int8=True)
        plan = fill(plan, evaluate=fill(plan.evaluate, int8=True), distill=teachers)
    if config.preset != "card":
        own.unused(config, "rows", "master", "memory", when="without --preset card")
        return plan
    training = plan.sft.training
    layout = fill(training.layout, master=config.master or training.layout.master)
    if config.rows is not None:
        if config.rows < 1 or training.batch % config.rows:
            raise EgjaxError(
                f"{config.rows} rows at once do not divide a step's {training.batch}",
                where="--rows",
            )
        layout = fill(layout, accumulate=training.batch // config.rows)
        plan = fill(plan, evaluate=fill(plan.evaluate, rows=config.rows))
    return fill(plan, sft=fill(plan.sft, training=fill(training, layout=layout)))


def memory(plan: Plan, config: Config) -> dict[str, dict[str, float]]:
    """Bytes by kind that each stage of preset `card` needs on the device; reads no weights.

    Raises:
        EgjaxError: a folder is not named, not there, or the two models speak different tokens.
    """
    if config.small_from is None or config.large_from is None:
        raise EgjaxError(
            "--preset card starts from two models",
            remedy="give --small-from FOLDER and --large-from FOLDER, Hugging Face Llamas",
        )
    small, large = own.Start.at(config.small_from), own.Start.at(config.large_from)
    own.check_alike({"--small-from": small, "--large-from": large}, chat=False)
    training, evaluation = plan.sft.training, plan.evaluate
    small.config.check_length(training.length, where="rows of training data")
    return {
        "sft": tuning_bytes(small.config, training.batch, training.length, training.layout),
        "evaluation": evaluation_bytes(
            large.config,
            small.config,
            evaluation.rows,
            _READ,
            evaluation.max_new_tokens,
            int8_=evaluation.int8,
        ),
    }


def _check_memory(plan: Plan, config: Config) -> None:
    """Tells what preset `card` needs, and refuses a device that gives less."""
    needs, limit = memory(plan, config), device_bytes()
    planned = ", ".join(f"{stage} {sum(k.values()) / _GIB:.1f}" for stage, k in needs.items())
    there = "does not say what it gives" if limit is None else f"gives {limit / _GIB:.1f} GiB"
    note(f"memory needed by formula, GiB: {planned}; the device {there}")
    if jax.default_backend() == "cpu":
        note(
            "JAX sees no accelerator and computes on the CPU; for a GPU: pip install '.[all,cuda]'"
        )
    if config.memory:
        for stage, kinds in needs.items():
            parts = [Figure(f"{stage}/{kind}", x / _GIB, "GiB", n=1) for kind, x in kinds.items()]
            whole = Figure(f"{stage}", sum(kinds.values()) / _GIB, "GiB", n=1)
            emit(*(part for part in parts if part.value), whole, json=config.json)
        return
    training, evaluation = plan.sft.training, plan.evaluate
    held = training.batch // training.layout.accumulate
    fewer = [f"--rows {rows // 2}" for rows in (held, evaluation.rows) if rows > 1][:1]
    wide = training.layout.master != "bfloat16"
    remedies = {
        "sft": [*fewer, *(["--master bfloat16"] if wide else [])],
        "evaluation": [*([] if evaluation.int8 else ["--int8"]), *fewer],
    }
    check_fits(needs, limit, remedies)


def run(plan: Plan, folder: Path, config: Config) -> None:
    """Runs every stage that is not finished, and writes the report into `folder/report`."""
    fill = dataclasses.replace
    shared = {"run": folder, "robothow": config.robothow}
    listed = tasks.stage(fill(plan.tasks, **shared))
    found = collect.stage(fill(plan.collect, **shared), listed)
    words = text.stage(fill(plan.text, **shared, tokenizer_from=config.small_from), listed, found)
    evaluate.search_stage(fill(plan.evaluate, **shared), listed)
    for seed in config.seeds or plan.seeds:
        here = {"run": folder, "seed": seed}
        start = fill(
            plan.pretrain, **here, small_from=config.small_from, large_from=config.large_from
        )
        models = {"base": pretrain.small_stage(start, words)}
        models["large"] = pretrain.large_stage(start, words)
        models["expert"] = sft.stage(fill(plan.sft, **here), words, models["base"])
        if plan.distill is not None:
            models["distilled"] = distill.stage(
                fill(plan.distill, **here), words, models["large"], models["expert"], models["base"]
            )
        if plan.distill is not None and plan.dpo is not None:
            models["preferred"] = dpo.stage(fill(plan.dpo, **here), words, models["distilled"])
        settings = fill(plan.evaluate, **shared, seed=seed)
        evaluate.stage(settings, listed, words, models)
    if hosts.index() == 0:
        report.write(report.Config(run=folder, seeds=config.seeds or plan.seeds, json=config.json))


def main(config: Config) -> None:
    folder = config.run or Path("runs") / config.preset
    plan = adjusted(_PRESETS[config.preset](), config)
    if config.preset == "card":
        _check_memory(plan, config)
        if config.memory:
            return
    if config.preset == "tiny":
        # Programs that run for seconds are not worth a compiler's best.
        jax.config.update("jax_disable_most_optimizations", True)
    with open_run(folder, fresh=config.fresh):
        run(plan, folder, config)
    note(f"all of it is in {folder}; the same command goes on from there")


if __name__ == "__main__":
    run_main(main, Config)
