"""πᴺ → πᴱ: multi-task fine-tuning of the small model on its experience.

    python -m experiments.sft --run runs/quick
    python -m experiments.sft --data FILE.jsonl --model FOLDER --run runs/mine

L = Σ_v α_v Σ_m log π(y_m | y_<m, x) over plans (found by the search, and relabelled errands),
activity recognition, counting and object paths ("Growing Through Experience", arXiv 2506.01312,
section 3.2). Needs the stages `text` and `pretrain`.

With `--data` it is fine-tuning on one's own data, without the simulator: JSON lines with `messages`
(the assistant's are learnt), `prompt` and `completion`, or `text` (`egjax.train.jsonl`). `--model`
is a Hugging Face Llama or a stage of a run; what is trained is such a folder again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from egjax.errors import check_range
from egjax.lm.config import LlamaConfig
from egjax.lm.lora import LoraConfig
from egjax.lm.tokenizer import Tokenizer
from egjax.train.data import Sample, TokenBatch, pack
from egjax.train.jsonl import read_samples
from egjax.train.objectives import next_token
from experiments import own
from experiments.common import Done, Stage, emit, finished, note, open_run, run_main
from experiments.models import apply_of, as_sample, column_mask, load
from experiments.text import load_samples
from experiments.training import MODEL, LogTo, Training, figures, train

__all__ = ["Config", "Weights", "fitting_samples", "sample_table", "stage"]


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
    """Length and rate; with `--data`, unless given, rows of 1,024 tokens and a rate of 2e-5."""
    weights: Weights = field(default_factory=Weights)
    """Task weights of a run's samples."""
    lora_rank: int = 0
    """Rank of a low-rank adapter that is trained in place of the weights; 0 trains them all. It is
    written beside the model, in PEFT's layout; in the model it is merged."""
    data: Path | None = None
    """JSON lines of one's own."""
    model: Path | None = None
    """What to start from, with `data`."""
    z_loss: float = 0.0
    """Weight of the squared log-normaliser, which keeps logits small."""
    log_to: LogTo = ()
    """Write the log to these, too."""
    json: Annotated[bool, tyro.conf.arg(help="print figures as JSON lines")] = False

    def __post_init__(self):
        check_range(self.z_loss, "[0, inf)", where="--z-loss")


def sample_table(text: Done, config: LlamaConfig, length: int, weights: Weights) -> TokenBatch:
    """All samples as packed rows for a model; what does not fit is told."""
    return pack(fitting_samples(text, config, length, weights), length)


def fitting_samples(text: Done, config: LlamaConfig, length: int, weights: Weights) -> list[Sample]:
    """All samples that fit rows of a length; what does not is told."""
    alpha = vars(weights)
    tokenizer = Tokenizer.load(text.path / "tokenizer")
    samples = [
        as_sample(sample, tokenizer, config, alpha[sample.task_type])
        for sample in load_samples(text.path / "samples.jsonl")
    ]
    fitting = [sample for sample in samples if len(sample.tokens) <= length + 1]
    if len(fitting) < len(samples):
        left = len(samples) - len(fitting)
        note(f"{left} of {len(samples)} samples exceed {length} tokens: left out")
    return fitting


def stage(config: Config, text: Done, small: Done) -> Done:
    """Trains πᴱ from πᴺ."""
    inputs = {"training": config.training, "weights": config.weights, "seed": config.seed}
    inputs |= {"text": text.fingerprint, "small": small.fingerprint, "z_loss": config.z_loss}

    if config.lora_rank:
        inputs["lora_rank"] = config.lora_rank

    def work(out: Path) -> None:
        model = load(small.path / MODEL)
        table = sample_table(text, model.config, config.training.length, config.weights)
        tokens = Tokenizer.load(text.path / "tokenizer").vocab_size
        loss = next_token(
            apply_of(model.config, config.training.layout),
            vocab_mask=column_mask(model.config, tokens),
            z_loss=config.z_loss,
        )
        train(
            model,
            loss,
            table,
            config.training,
            seed=config.seed,
            out=out,
            title="sft",
            lora=_adapter(config),
            log_to=config.log_to,
        )

    return Stage(config.run, f"seed{config.seed}/sft", inputs, by="all").run(work)


def _adapter(config: Config) -> LoraConfig | None:
    rank = config.lora_rank
    dtype = config.training.layout.master or "float32"
    return LoraConfig(rank, 2.0 * rank, dtype=dtype) if rank else None


def own_stage(config: Config) -> Done:
    """Fine-tunes a model of one's own on data of one's own."""
    own.unused(config, "weights", when="with --data")
    paths = own.given(data=config.data, model=config.model)
    adapter = _adapter(config)
    start = own.Start.at(paths["model"])
    samples, _ = read_samples(paths["data"], start.tokenizer, start.template, start.config)
    kept = own.fitting(samples, [len(s.tokens) for s in samples], config.training, start)

    def work(out: Path) -> None:
        model = start.load()
        loss = next_token(
            apply_of(model.config, config.training.layout),
            vocab_mask=start.vocab_mask,
            z_loss=config.z_loss,
        )
        train(
            model,
            loss,
            pack(kept, config.training.length),
            config.training,
            seed=config.seed,
            out=out,
            title="sft",
            lora=adapter,
            log_to=config.log_to,
            write=start.write,
        )

    return own.stage(config, "sft", {"model": start}, work)


def main(config: Config) -> None:
    if config.data is not None:
        emit(*figures(own_stage(config), "sft"), json=config.json)
        return
    own.unused(config, "model", when="without --data")
    with open_run(config.run):
        text = finished(config.run, "text", made_by="text")
        small = finished(config.run, f"seed{config.seed}/pretrain_small", made_by="pretrain")
        emit(*figures(stage(config, text, small), "sft"), json=config.json)


if __name__ == "__main__":
    run_main(main, Config, default=own.defaults(Config, 2e-5))
