"""From RobotHow to a grounded language model: the whole pipeline, one command.

    python -m experiments.pipeline                  (`make run`: under 15 minutes on two CPU cores)
    python -m experiments.pipeline --preset long    (an hour to an hour and a half, three seeds)

tasks → search → experience and text → pretraining of a small and a large Llama → SFT (πᴺ → πᴱ) →
distillation of πᴱ/πᴺ into the large one → DPO → evaluation in the simulator → report. After
"Growing Through Experience" (arXiv 2506.01312). A stopped run goes on with the same command;
finished stages are kept; `--fresh` starts over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from egjax import hosts
from egjax.search.mcts import SearchConfig
from experiments import collect, distill, dpo, evaluate, pretrain, report, sft, tasks, text
from experiments.common import note, open_run, run_main
from experiments.training import Training

__all__ = ["Config", "Plan", "long", "quick", "run", "tiny"]


@dataclass(frozen=True)
class Config:
    """What to run."""

    preset: Literal["quick", "long", "tiny"] = "quick"
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
    fresh: bool = False
    """Delete what earlier runs left in the run directory."""
    json: Annotated[bool, tyro.conf.arg(help="print figures as JSON lines")] = False


@dataclass(frozen=True)
class Plan:
    """The settings of every stage; run directory and seed are filled in by `run`."""

    seeds: tuple[int, ...]
    tasks: tasks.Config
    collect: collect.Config
    text: text.Config
    pretrain: pretrain.Config
    sft: sft.Config
    distill: distill.Config
    dpo: dpo.Config
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
    """A pass through every stage in a minute or two, for tests: numbers mean nothing."""
    return Plan(
        seeds=(0,),
        tasks=tasks.Config(train=8, held_out=3),
        collect=collect.Config(
            search=SearchConfig(simulations=16, rollouts=4), batch=4, second=0, shard_tasks=4
        ),
        text=text.Config(
            scenes=2, general=64, hindsight=64, questions=64, orders=1, asked=4, vocab_size=400
        ),
        pretrain=pretrain.Config(small=Training(2, 4, 384, 1e-3), large=Training(2, 4, 384, 1e-3)),
        sft=sft.Config(training=Training(2, 4, 384, 1e-3)),
        distill=distill.Config(training=Training(2, 4, 384, 1e-3)),
        dpo=dpo.Config(training=Training(2, 4, 384, 1e-4)),
        evaluate=evaluate.Config(max_new_tokens=16),
    )


_PRESETS: dict[str, Callable[[], Plan]] = {"quick": quick, "long": long, "tiny": tiny}


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
        models["distilled"] = distill.stage(
            fill(plan.distill, **here), words, models["large"], models["expert"], models["base"]
        )
        models["preferred"] = dpo.stage(fill(plan.dpo, **here), words, models["distilled"])
        settings = fill(plan.evaluate, **shared, seed=seed)
        evaluate.stage(settings, listed, words, models)
    if hosts.index() == 0:
        report.write(report.Config(run=folder, seeds=config.seeds or plan.seeds, json=config.json))


def main(config: Config) -> None:
    folder = config.run or Path("runs") / config.preset
    with open_run(folder, fresh=config.fresh):
        run(_PRESETS[config.preset](), folder, config)
    note(f"all of it is in {folder}; the same command goes on from there")


if __name__ == "__main__":
    run_main(main, Config)
