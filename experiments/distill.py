"""The behaviour ratio into the large model: reverse KL to π̄ ∝ πᴸ (πᴱ/πᴺ)^α, exact per token.

    python -m experiments.distill --run runs/quick

πᴸ, πᴱ and πᴺ are frozen, the student starts at πᴸ; prefixes are the collected data ("Growing
Through Experience", arXiv 2506.01312, section 3.3; `--divergence forward` is what its formula says,
see `egjax.losses.distill`). Needs the stages `text`, `pretrain` and `sft`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from egjax.losses import forward_kl, generalised_jsd, reverse_kl
from egjax.train.objectives import Frozen, distill_to_ratio
from experiments.common import Done, Stage, emit, finished, open_run, run_main
from experiments.models import apply_of, check_one_vocabulary, load
from experiments.sft import Weights, sample_table
from experiments.training import MODEL, Training, figures, mesh_for, placed, train

__all__ = ["Config", "Ratio", "stage"]

_DIVERGENCES: dict[str, Callable[..., jax.Array]] = {
    "reverse": reverse_kl,
    "forward": forward_kl,
    "jsd": generalised_jsd,
}


@dataclass(frozen=True)
class Ratio:
    """The target π̄."""

    alpha: float = 1.0
    """Exponent of πᴱ/πᴺ."""
    clip: float | None = None
    """Bound on the log-ratio."""
    plausible: float | None = None
    """Tokens with less than this share of πᴸ's most probable one are left out."""


@dataclass(frozen=True)
class Config:
    """Length and target of the distillation."""

    run: Path = Path("runs/quick")
    """Run directory."""
    seed: int = 0
    """Of the order of samples."""
    training: Training = field(default_factory=lambda: Training(80, 16, 256, 1e-3))
    """Length and rate."""
    ratio: Ratio = field(default_factory=Ratio)
    """The target."""
    divergence: Literal["reverse", "forward", "jsd"] = "reverse"
    """Token-level divergence."""
    json: Annotated[bool, tyro.conf.arg(help="print figures as JSON lines")] = False


def stage(config: Config, text: Done, large: Done, expert: Done, small: Done) -> Done:
    """Trains the distilled large model."""
    inputs = {
        "training": config.training,
        "ratio": config.ratio,
        "divergence": config.divergence,
        "seed": config.seed,
        **{name: done.fingerprint for name, done in (("text", text), ("large", large))},
        **{name: done.fingerprint for name, done in (("expert", expert), ("small", small))},
    }

    def work(out: Path) -> None:
        models = {"πᴸ": load(large.path / MODEL), "πᴱ": load(expert.path / MODEL)}
        models["πᴺ"] = load(small.path / MODEL)
        check_one_vocabulary(models)
        student, expert_model = models["πᴸ"], models["πᴱ"]
        table = sample_table(text, student.config, config.training.length, Weights())
        loss = distill_to_ratio(
            apply_of(student.config),
            apply_of(student.config),
            apply_of(expert_model.config),
            divergence=_DIVERGENCES[config.divergence],
            **vars(config.ratio),
        )
        mesh = mesh_for(config.training.batch)
        frozen = Frozen(*(placed(models[name], mesh) for name in ("πᴸ", "πᴱ", "πᴺ")))
        train(
            student,
            loss,
            table,
            config.training,
            seed=config.seed,
            out=out,
            title="distill",
            frozen=frozen,
        )

    return Stage(config.run, f"seed{config.seed}/distill", inputs, by="all").run(work)


def main(config: Config) -> None:
    with open_run(config.run):
        text = finished(config.run, "text", made_by="text")
        names = (("pretrain_large", "pretrain"), ("sft", "sft"), ("pretrain_small", "pretrain"))
        parts = [finished(config.run, f"seed{config.seed}/{n}", made_by=m) for n, m in names]
        emit(*figures(stage(config, text, *parts), "distill"), json=config.json)


if __name__ == "__main__":
    run_main(main, Config)
