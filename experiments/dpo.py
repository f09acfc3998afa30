"""Preferences: the distilled model learns that failed and redundant plans are worse.

    python -m experiments.dpo --run runs/quick

L = −log σ(β (log π(y⁺|x) − log π(y⁻|x))) + λ KL(π ‖ π₀), without a reference inside σ as
"Growing Through Experience" prints it (arXiv 2506.01312, section 3.4); the KL to the initial policy
is exact per token on the completions of both plans. `--loss standard` has the reference inside
(Rafailov et al. 2023, arXiv 2305.18290). Needs the stages `text` and `distill`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from egjax.lm.config import LlamaConfig
from egjax.lm.tokenizer import Tokenizer
from egjax.losses import dpo, dpo_paper
from egjax.train.data import Pair, PairBatch, pad_pairs
from egjax.train.objectives import PairLogps, preference_with_initial
from experiments.common import Done, Stage, emit, finished, note, open_run, run_main
from experiments.models import answered, apply_of, asked, load
from experiments.training import MODEL, Training, figures, mesh_for, placed, train

__all__ = ["Config", "stage"]


@dataclass(frozen=True)
class Config:
    """Length and objective of preference optimisation."""

    run: Path = Path("runs/quick")
    """Run directory."""
    seed: int = 0
    """Of the order of pairs."""
    training: Training = field(default_factory=lambda: Training(30, 16, 256, 1e-4))
    """Length and rate."""
    loss: Literal["paper", "standard"] = "paper"
    """Without or with the reference inside σ."""
    beta: float = 0.1
    """β."""
    kl_weight: float = 0.1
    """λ."""
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

    def paper(p: PairLogps):
        return dpo_paper(p.chosen, p.rejected, beta=config.beta)

    def standard(p: PairLogps):
        return dpo(p.chosen, p.rejected, p.ref_chosen, p.ref_rejected, beta=config.beta)

    def work(out: Path) -> None:
        model = load(distilled.path / MODEL)
        tokenizer = Tokenizer.load(text.path / "tokenizer")
        rows = text.path / "pairs.jsonl"
        pairs = _pairs(rows, tokenizer, model.config, config.training.length)
        chosen = {"paper": paper, "standard": standard}[config.loss]
        loss = preference_with_initial(apply_of(model.config), chosen, kl_weight=config.kl_weight)
        train(
            model,
            loss,
            pairs,
            config.training,
            seed=config.seed,
            out=out,
            title="dpo",
            frozen=placed(model, mesh_for(config.training.batch)),
        )

    return Stage(config.run, f"seed{config.seed}/dpo", inputs, by="all").run(work)


def _pairs(path: Path, tokenizer: Tokenizer, config: LlamaConfig, length: int) -> PairBatch:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [
        Pair(
            asked(config, tokenizer.encode(row["prompt"])),
            answered(config, tokenizer, row["chosen"]),
            answered(config, tokenizer, row["rejected"]),
        )
        for row in rows
    ]
    fitting = [
        p for p in pairs if len(p.prompt) + max(len(p.chosen), len(p.rejected)) <= length + 1
    ]
    if len(fitting) < len(pairs):
        note(f"{len(pairs) - len(fitting)} of {len(pairs)} pairs exceed {length} tokens")
    return pad_pairs(fitting, length)


def main(config: Config) -> None:
    with open_run(config.run):
        text = finished(config.run, "text", made_by="text")
        distilled = finished(config.run, f"seed{config.seed}/distill", made_by="distill")
        emit(*figures(stage(config, text, distilled), "dpo"), json=config.json)


if __name__ == "__main__":
    run_main(main, Config)
