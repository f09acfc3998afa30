"""The behaviour ratio into the large model: reverse KL to π̄ ∝ πᴸ (πᴱ/πᴺ)^α, exact per token.

    python -m experiments.distill --run runs/quick
    python -m experiments.distill --data FILE.jsonl --large FOLDER --expert FOLDER
        --anti-expert FOLDER --run runs/mine

πᴸ, πᴱ and πᴺ are frozen, the student starts at πᴸ; prefixes are the collected data ("Growing
Through Experience", arXiv 2506.01312, section 3.3; `--divergence forward` is what its formula says,
see `egjax.losses.distill`). Needs the stages `text`, `pretrain` and `sft`.

With `--data` prefixes are one's own, JSON lines as in `experiments.sft`, and so are the models: πᴸ,
πᴱ and πᴺ with one tokenizer, Hugging Face Llamas or stages of a run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from egjax.errors import EgjaxError
from egjax.lm.config import LlamaConfig
from egjax.lm.int8 import quantize
from egjax.losses import (
    Terms,
    forward_kl,
    forward_kl_terms,
    generalised_jsd,
    generalised_jsd_terms,
    reverse_kl,
    reverse_kl_terms,
)
from egjax.train.data import TokenBatch, pack
from egjax.train.jsonl import read_samples
from egjax.train.objectives import Frozen, distill_to_ratio
from egjax.train.step import LossFn
from experiments import own
from experiments.common import Done, Stage, emit, finished, open_run, run_main
from experiments.models import Model, apply_of, check_one_vocabulary, load, save
from experiments.sft import Weights, sample_table
from experiments.training import MODEL, LogTo, Training, figures, mesh_for, placed, train

__all__ = ["Config", "Ratio", "stage"]

_DIVERGENCES: dict[str, tuple[Callable[..., jax.Array], Terms]] = {
    "reverse": (reverse_kl, reverse_kl_terms),
    "forward": (forward_kl, forward_kl_terms),
    "jsd": (generalised_jsd, generalised_jsd_terms),
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
    """Length and rate; with `--data`, unless given, rows of 1,024 tokens and a rate of 2e-5."""
    ratio: Ratio = field(default_factory=Ratio)
    """The target."""
    divergence: Literal["reverse", "forward", "jsd"] = "reverse"
    """Token-level divergence."""
    int8: bool = False
    """The matrices of the frozen πᴸ, πᴱ and πᴺ in eight bits; the student's are not."""
    data: Path | None = None
    """JSON lines of one's own."""
    large: Path | None = None
    """πᴸ, with `data`."""
    expert: Path | None = None
    """πᴱ, with `data`."""
    anti_expert: Path | None = None
    """πᴺ, with `data`."""
    log_to: LogTo = ()
    """Write the log to these, too."""
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
    if config.int8:
        inputs["int8"] = True

    def work(out: Path) -> None:
        models = {"πᴸ": load(large.path / MODEL), "πᴱ": load(expert.path / MODEL)}
        models["πᴺ"] = load(small.path / MODEL)
        check_one_vocabulary(models)
        large_config, small_config = models["πᴸ"].config, models["πᴱ"].config
        table = sample_table(text, large_config, config.training.length, Weights())
        _train(config, models, objective(config, large_config, small_config), table, out)

    return Stage(config.run, f"seed{config.seed}/distill", inputs, by="all").run(work)


def objective(
    config: Config, large: LlamaConfig, small: LlamaConfig, vocab_mask: jax.Array | None = None
) -> LossFn:
    """What is minimised; its step takes a `Frozen`."""
    divergence, terms = _DIVERGENCES[config.divergence]
    layout = config.training.layout
    return distill_to_ratio(
        apply_of(large, layout),
        apply_of(large, layout),
        apply_of(small, layout),
        divergence=divergence,
        terms=terms,
        vocab_mask=vocab_mask,
        **vars(config.ratio),
    )


def _train(
    config: Config,
    models: dict[str, Model],
    loss: LossFn,
    table: TokenBatch,
    out: Path,
    write: Callable[[Path, Model], None] = save,
) -> None:
    mesh = mesh_for(config.training)
    frozen = [models[name] for name in ("πᴸ", "πᴱ", "πᴺ")]
    if config.int8:
        frozen = [model._replace(params=quantize(model.params)) for model in frozen]
    train(
        models["πᴸ"],
        loss,
        table,
        config.training,
        seed=config.seed,
        out=out,
        title="distill",
        frozen=Frozen(*(placed(model, mesh) for model in frozen)),
        frozen_configs=[model.config for model in frozen],
        log_to=config.log_to,
        write=write,
    )


def _shape(config: LlamaConfig) -> LlamaConfig:
    """Without what two checkpoints of one model may state differently."""
    return dataclasses.replace(
        config, bos_id=None, eos_ids=(), pad_id=None, dtype="float32", max_seq_len=1
    )


def own_stage(config: Config) -> Done:
    """Distils models of one's own on data of one's own."""
    paths = own.given(
        data=config.data,
        large=config.large,
        expert=config.expert,
        anti_expert=config.anti_expert,
    )
    names = {"πᴸ": "large", "πᴱ": "expert", "πᴺ": "anti_expert"}
    starts = {name: own.Start.at(paths[option]) for name, option in names.items()}
    large, small = starts["πᴸ"], starts["πᴱ"]
    if _shape(small.config) != _shape(starts["πᴺ"].config):
        raise EgjaxError(
            "πᴱ and πᴺ are of different shapes",
            where=str(config.expert),
            remedy="πᴱ is πᴺ after training",
        )
    samples, chat = read_samples(paths["data"], large.tokenizer, large.template, large.config)
    own.check_alike(starts, chat=chat)
    kept = own.fitting(samples, [len(s.tokens) for s in samples], config.training, large)

    def work(out: Path) -> None:
        loss = objective(config, large.config, small.config, large.vocab_mask)
        models = {name: start.load() for name, start in starts.items()}
        _train(config, models, loss, pack(kept, config.training.length), out, large.write)

    return own.stage(config, "distill", starts, work)


def main(config: Config) -> None:
    if config.data is not None:
        emit(*figures(own_stage(config), "distill"), json=config.json)
        return
    own.unused(config, "large", "expert", "anti_expert", when="without --data")
    with open_run(config.run):
        text = finished(config.run, "text", made_by="text")
        names = (("pretrain_large", "pretrain"), ("sft", "sft"), ("pretrain_small", "pretrain"))
        parts = [finished(config.run, f"seed{config.seed}/{n}", made_by=m) for n, m in names]
        emit(*figures(stage(config, text, *parts), "distill"), json=config.json)


if __name__ == "__main__":
    run_main(main, Config, default=own.defaults(Config, 2e-5))
