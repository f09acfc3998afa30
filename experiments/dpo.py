"""Preferences: the distilled model learns that failed and redundant plans are worse.

    python -m experiments.dpo --run runs/quick
    python -m experiments.dpo --data FILE.jsonl --model FOLDER --run runs/mine

L = −log σ(β (log π(y⁺|x) − log π(y⁻|x))) + λ KL(π ‖ π₀), without a reference inside σ as
"Growing Through Experience" prints it (arXiv 2506.01312, section 3.4); the KL to the initial policy
is exact per token on the completions of both plans. `--loss standard` has the reference inside
(Rafailov et al. 2023, arXiv 2305.18290). Needs the stages `text` and `distill`.

With `--data` the pairs are one's own: JSON lines with `prompt`, `chosen` and `rejected`, texts or
lists of messages (`egjax.train.jsonl`). `--model` is a Hugging Face Llama or a stage of a run; what
is trained is such a folder again. The prompt of a pair is computed once for both of its answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from egjax.lm.config import LlamaConfig
from egjax.lm.tokenizer import Tokenizer
from egjax.losses import dpo, dpo_paper
from egjax.train.data import Pair, share_prompts
from egjax.train.jsonl import read_pairs
from egjax.train.objectives import PairLogps, preference_with_initial
from egjax.train.step import LossFn
from experiments import own
from experiments.common import Done, Stage, emit, finished, note, open_run, run_main
from experiments.models import Model, answered, apply_of, asked, load, save
from experiments.training import MODEL, LogTo, Training, figures, mesh_for, placed, train

__all__ = ["Config", "stage"]


@dataclass(frozen=True)
class Config:
    """Length and objective of preference optimisation."""

    run: Path = Path("runs/quick")
    """Run directory."""
    seed: int = 0
    """Of the order of pairs."""
    training: Training = field(default_factory=lambda: Training(30, 16, 256, 1e-4))
    """Length and rate; with `--data`, unless given, rows of 1,024 tokens and a rate of 1e-6."""
    loss: Literal["paper", "standard"] = "paper"
    """Without or with the reference inside σ."""
    beta: float = 0.1
    """β."""
    kl_weight: float = 0.1
    """λ."""
    data: Path | None = None
    """JSON lines of one's own."""
    model: Path | None = None
    """What to start from, with `data`."""
    log_to: LogTo = ()
    """Write the log to these, too."""
    json: Annotated[bool, tyro.conf.arg(help="print figures as JSON lines")] = False


def stage(config: Config, text: Done, distilled: Done) -> Done:
    """Trains the preferred model from the distilled one."""
    inputs = {
        "training": config.training,
        "objective": [config.loss, config.beta, config.kl_weight],
        "seed": config.seed,
        "text": text.fingerprint,
        "distilled": distilled.fingerprint,
    }

    def work(out: Path) -> None:
        model = load(distilled.path / MODEL)
        tokenizer = Tokenizer.load(text.path / "tokenizer")
        rows = text.path / "pairs.jsonl"
        pairs = _pairs(rows, tokenizer, model.config, config.training.length)
        _train(config, model, objective(config, model.config), pairs, out)

    return Stage(config.run, f"seed{config.seed}/dpo", inputs, by="all").run(work)


def objective(config: Config, model: LlamaConfig, vocab_mask: jax.Array | None = None) -> LossFn:
    """What is minimised; its step takes the initial parameters as `frozen`."""

    def paper(p: PairLogps):
        return dpo_paper(p.chosen, p.rejected, beta=config.beta)

    def standard(p: PairLogps):
        return dpo(p.chosen, p.rejected, p.ref_chosen, p.ref_rejected, beta=config.beta)

    chosen = {"paper": paper, "standard": standard}[config.loss]
    # Heads, so that a prompt gets no logits.
    apply = apply_of(model, config.training.layout, heads=True)
    return preference_with_initial(apply, chosen, kl_weight=config.kl_weight, vocab_mask=vocab_mask)


def _train(
    config: Config,
    model: Model,
    loss: LossFn,
    pairs: Sequence[Pair],
    out: Path,
    write: Callable[[Path, Model], None] = save,
) -> None:
    train(
        model,
        loss,
        share_prompts(pairs),
        config.training,
        seed=config.seed,
        out=out,
        title="dpo",
        frozen=placed(model, mesh_for(config.training)),
        frozen_configs=[model.config],
        log_to=config.log_to,
        write=write,
    )


def _pairs(path: Path, tokenizer: Tokenizer, config: LlamaConfig, length: int) -> list[Pair]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [
        Pair(
            asked(config, tokenizer.encode(row["prompt"])),
            answered(config, tokenizer, row["chosen"]),
            answered(config, tokenizer, row["rejected"]),
        )
        for row in rows
    ]
    fitting = [p for p in pairs if _longest(p) <= length + 1]
    if len(fitting) < len(pairs):
        left = len(pairs) - len(fitting)
        note(f"{left} of {len(pairs)} pairs exceed {length} tokens: left out")
    return fitting


def _longest(pair: Pair) -> int:
    """Tokens of the prompt with the longer answer."""
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))


def own_stage(config: Config) -> Done:
    """Trains a model of one's own on pairs of one's own."""
    paths = own.given(data=config.data, model=config.model)
    start = own.Start.at(paths["model"])
    pairs = read_pairs(paths["data"], start.tokenizer, start.template, start.config)
    kept = own.fitting(pairs, [_longest(p) for p in pairs], config.training, start)

    def work(out: Path) -> None:
        model = start.load()
        loss = objective(config, model.config, start.vocab_mask)
        _train(config, model, loss, kept, out, start.write)

    return own.stage(config, "dpo", {"model": start}, work)


def main(config: Config) -> None:
    if config.data is not None:
        emit(*figures(own_stage(config), "dpo"), json=config.json)
        return
    own.unused(config, "model", when="without --data")
    with open_run(config.run):
        text = finished(config.run, "text", made_by="text")
        distilled = finished(config.run, f"seed{config.seed}/distill", made_by="distill")
        emit(*figures(stage(config, text, distilled), "dpo"), json=config.json)


if __name__ == "__main__":
    run_main(main, Config, default=own.defaults(Config, 1e-6))
