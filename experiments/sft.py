"""πᴺ → πᴱ: multi-task fine-tuning of the small model on its experience.

    python -m experiments.sft --run runs/quick

L = Σ_v α_v Σ_m log π(y_m | y_<m, x) over plans (found by the search, and relabelled errands),
activity recognition, counting and object paths ("Growing Through Experience", arXiv 2506.01312,
section 3.2). Needs the stages `text` and `pretrain`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from egjax.lm.config import LlamaConfig
from egjax.lm.tokenizer import Tokenizer
from egjax.train.data import TokenBatch, pack
from egjax.train.objectives import next_token
from experiments.common import Done, Stage, emit, finished, note, open_run, run_main
from experiments.models import apply_of, as_sample, load
from experiments.text import load_samples
from experiments.training import MODEL, Training, figures, train

__all__ = ["Config", "Weights", "sample_table", "stage"]


@dataclass(frozen=True)
class Weights:
    """α_v of each task type."""

    plan: float = 1.0
    recognition: float = 0.5
    counting: float = 0.5
    path: float = 0.5


@dataclass(frozen=True)
class Config:
    """Length and weights of the fine-tuning."""

    run: Path = Path("runs/quick")
    """Run directory."""
    seed: int = 0
    """Of the order of samples."""
    training: Training = field(default_factory=lambda: Training(300, 16, 256, 2e-3))
    """Length and rate."""
    weights: Weights = field(default_factory=Weights)
    """Task weights."""
    json: Annotated[bool, tyro.conf.arg(help="print figures as JSON lines")] = False


def sample_table(text: Done, config: LlamaConfig, length: int, weights: Weights) -> TokenBatch:
    """All samples as packed rows for a model; what does not fit is told."""
    alpha = vars(weights)
    tokenizer = Tokenizer.load(text.path / "tokenizer")
    samples = [
        as_sample(sample, tokenizer, config, alpha[sample.task_type])
        for sample in load_samples(text.path / "samples.jsonl")
    ]
    fitting = [sample for sample in samples if len(sample.tokens) <= length + 1]
    if len(fitting) < len(samples):
        note(f"{len(samples) - len(fitting)} of {len(samples)} samples exceed {length} tokens")
    return pack(fitting, length)


def stage(config: Config, text: Done, small: Done) -> Done:
    """Trains πᴱ from πᴺ."""
    inputs = {"training": config.training, "weights": config.weights, "seed": config.seed}
    inputs |= {"text": text.fingerprint, "small": small.fingerprint}

    def work(out: Path) -> None:
        model = load(small.path / MODEL)
        table = sample_table(text, model.config, config.training.length, config.weights)
        loss = next_token(apply_of(model.config))
        train(model, loss, table, config.training, seed=config.seed, out=out, title="sft")

    return Stage(config.run, f"seed{config.seed}/sft", inputs, by="all").run(work)


def main(config: Config) -> None:
    with open_run(config.run):
        text = finished(config.run, "text", made_by="text")
        small = finished(config.run, f"seed{config.seed}/pretrain_small", made_by="pretrain")
        emit(*figures(stage(config, text, small), "sft"), json=config.json)


if __name__ == "__main__":
    run_main(main, Config)
