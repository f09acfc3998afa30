"""Preferences: the distilled model learns that failed and redundant plans are worse.

    python -m experiments.dpo --run runs/quick
    python -m experiments.dpo --data FILE.jsonl --model FOLDER --run runs/mine

L = −log σ(β (log π(y⁺|x) − log π(y⁻|x))) + λ KL(π ‖ π₀), without a reference inside σ as
"Growing Through Experience" prints it (arXiv 2506.01312, section 3.4); the KL to the initial policy
is exact per token on the completions of both plans. `--loss standard` has the reference inside
(Rafailov et al. 2023, arXiv 2305.18290); the others are those of `egjax.losses`. Needs the stages
`text` and `distill`.

λ is 0 unless the loss is the paper's or it is given. With λ = 0 no second model is held: what the
reference says about the pairs is computed once before the first step and kept in the run directory,
with the fingerprint of model, tokenizer and pairs. `--initial-top-k K` keeps the initial policy so,
too (its K most probable tokens and the mass of the others), and gives an approximate KL.

With `--data` the pairs are one's own: JSON lines with `prompt`, `chosen` and `rejected`, texts or
lists of messages (`egjax.train.jsonl`). `--model` is a Hugging Face Llama or a stage of a run; what
is trained is such a folder again. The prompt of a pair is computed once for both of its answers.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import jax
import tyro

from egjax.errors import EgjaxError, check_range
from egjax.lm.config import LlamaConfig
from egjax.lm.tokenizer import Tokenizer
from egjax.losses import (
    Metrics,
    TopK,
    cdpo,
    dpo,
    dpo_paper,
    dpo_positive,
    hinge,
    ipo,
    length_normalised_dpo,
    robust_dpo,
    rpo,
    simpo,
)
from egjax.train.data import Pair, SharedPairBatch, share_prompts
from egjax.train.jsonl import pair_of, read_pairs
from egjax.train.objectives import (
    Taught,
    initial_top_k,
    on_pairs,
    preference,
    preference_with_initial,
    reference_logps,
)
from egjax.train.step import LossFn
from experiments import own
from experiments.common import Done, Stage, emit, finished, note, open_run, run_main
from experiments.models import Model, apply_of, column_mask, load, save
from experiments.training import MODEL, LogTo, Training, figures, kept, mesh_for, placed, train

__all__ = ["LOSSES", "Config", "stage"]


def _ipo_per_token(
    chosen: jax.Array,
    rejected: jax.Array,
    ref_chosen: jax.Array,
    ref_rejected: jax.Array,
    chosen_length: jax.Array,
    rejected_length: jax.Array,
    *,
    tau: float = 0.1,
) -> tuple[jax.Array, Metrics]:
    """IPO with log-ratios averaged over tokens, as TRL has it."""
    lengths = (chosen_length, rejected_length)
    return ipo(chosen, rejected, ref_chosen, ref_rejected, tau=tau, lengths=lengths)


LOSSES: Mapping[str, Callable[..., tuple[jax.Array, Metrics]]] = MappingProxyType(
    {
        "paper": dpo_paper,
        "standard": dpo,
        "cdpo": cdpo,
        "robust": robust_dpo,
        "ipo": ipo,
        "ipo-per-token": _ipo_per_token,
        "hinge": hinge,
        "simpo": simpo,
        "length-normalised": length_normalised_dpo,
        "dpo-positive": dpo_positive,
        "rpo": rpo,
    }
)
"""By the names of `--loss`."""

_RANGES = {
    "beta": "(0, inf)",
    "noise": "[0, 0.5)",
    "tau": "(0, inf)",
    "gamma": "[0, inf)",
    "penalty": "[0, inf)",
    "nll_weight": "[0, inf)",
}
"""Of the hyper-parameters of all losses."""


@dataclass(frozen=True)
class Config:
    """Length and objective of preference optimisation."""

    run: Path = Path("runs/quick")
    """Run directory."""
    seed: int = 0
    """Of the order of pairs."""
    training: Training = field(default_factory=lambda: Training(30, 16, 256, 1e-4))
    """Length and rate; with `--data`, unless given, rows of 1,024 tokens and a rate of 1e-6."""
    loss: Literal[
        "paper",
        "standard",
        "cdpo",
        "robust",
        "ipo",
        "ipo-per-token",
        "hinge",
        "simpo",
        "length-normalised",
        "dpo-positive",
        "rpo",
    ] = "paper"
    """`paper` has no reference inside σ, `standard` has. Formulas and papers: `egjax.losses`."""
    beta: float | None = None
    """β, and below: the loss's own value unless given (0.1, per token 2, of dpo-positive 0.3)."""
    noise: float | None = None
    """Share ε of wrong labels (cdpo, robust)."""
    tau: float | None = None
    """τ of ipo; the margin aimed at is 1/(2τ)."""
    gamma: float | None = None
    """Margin γ of simpo."""
    penalty: float | None = None
    """λ of dpo-positive."""
    nll_weight: float | None = None
    """α of rpo."""
    kl_weight: float | None = None
    """λ of the KL to the initial policy: 0.1 with the paper's loss, else 0, unless given."""
    initial_top_k: int | None = None
    """Tokens of the initial policy that are kept for an approximate KL; else the model is."""
    stored_folder: Path | None = None
    """What the frozen model says is kept here rather than in the run directory."""
    data: Path | None = None
    """JSON lines of one's own."""
    model: Path | None = None
    """What to start from, with `data`."""
    log_to: LogTo = ()
    """Write the log to these, too."""
    json: Annotated[bool, tyro.conf.arg(help="print figures as JSON lines")] = False

    def __post_init__(self):
        self.settings()
        check_range(self.kl_weight, "[0, inf)", where="--kl-weight")
        check_range(self.initial_top_k, "[1, inf)", where="--initial-top-k")
        if self.initial_top_k is not None and not self.weight:
            raise EgjaxError("--initial-top-k has no effect without --kl-weight")
        if self.stored_folder is not None and not self.stores:
            raise EgjaxError("--stored-folder has no effect: nothing is stored for this loss")

    def settings(self) -> dict[str, float]:
        """Hyper-parameters of the loss.

        Raises:
            EgjaxError: one is out of range, or not one of this loss.
        """
        parameters = inspect.signature(LOSSES[self.loss]).parameters
        found = {n: p.default for n, p in parameters.items() if isinstance(p.default, float)}
        for name, interval in _RANGES.items():
            value, option = getattr(self, name), f"--{name.replace('_', '-')}"
            check_range(value, interval, where=option)
            if value is not None and name not in found:
                raise EgjaxError(f"{option} has no effect with --loss {self.loss}")
            if value is not None:
                found[name] = value
        return found

    @property
    def weight(self) -> float:
        """λ."""
        if self.kl_weight is None:
            return 0.1 if self.loss == "paper" else 0.0
        return self.kl_weight

    @property
    def refers(self) -> bool:
        """The loss takes log-probabilities of the reference."""
        return "ref_chosen" in inspect.signature(LOSSES[self.loss]).parameters

    @property
    def stores(self) -> bool:
        """What the frozen model says is stored, and it is not held."""
        return self.initial_top_k is not None or (self.refers and not self.weight)


def stage(config: Config, text: Done, distilled: Done) -> Done:
    """Trains the preferred model from the distilled one."""
    inputs = {
        "training": config.training,
        "objective": [config.loss, *config.settings().values(), config.weight],
        "seed": config.seed,
        "text": text.fingerprint,
        "distilled": distilled.fingerprint,
    }
    if config.initial_top_k is not None:
        inputs["initial_top_k"] = config.initial_top_k

    def work(out: Path) -> None:
        model = load(distilled.path / MODEL)
        tokenizer = Tokenizer.load(text.path / "tokenizer")
        rows = text.path / "pairs.jsonl"
        pairs = _pairs(rows, tokenizer, model.config, config.training.length)
        _train(config, model, column_mask(model.config, tokenizer.vocab_size), pairs, out)

    return Stage(config.run, f"seed{config.seed}/dpo", inputs, by="all").run(work)


def objective(config: Config, model: LlamaConfig, vocab_mask: jax.Array | None = None) -> LossFn:
    """What is minimised. With λ > 0 its step takes the initial parameters as `frozen`, unless they
    are stored; else references are read from the batch."""
    loss = on_pairs(LOSSES[config.loss], **config.settings())
    # Heads, so that a prompt gets no logits.
    apply = apply_of(model, config.training.layout, heads=True)
    beside = config.weight and config.initial_top_k is None
    build = preference_with_initial if beside else preference
    return build(apply, loss, kl_weight=config.weight, vocab_mask=vocab_mask)


def _train(
    config: Config,
    model: Model,
    vocab_mask: jax.Array | None,
    pairs: Sequence[Pair],
    out: Path,
    write: Callable[[Path, Model], None] = save,
) -> None:
    table, mesh = share_prompts(pairs), mesh_for(config.training)
    beside = bool(config.weight) and not config.stores
    train(
        model,
        objective(config, model.config, vocab_mask),
        _taught(config, model, vocab_mask, table) if config.stores else table,
        config.training,
        seed=config.seed,
        out=out,
        title="dpo",
        frozen=placed(model, mesh) if beside else None,
        frozen_configs=[model.config] if beside else (),
        consume=not beside,
        log_to=config.log_to,
        write=write,
    )


def _taught(
    config: Config, model: Model, vocab_mask: jax.Array | None, table: SharedPairBatch
) -> SharedPairBatch | Taught:
    """The pairs with what the initial policy says about them."""
    apply, k = apply_of(model.config, config.training.layout, heads=True), config.initial_top_k
    fill = reference_logps(apply, vocab_mask=vocab_mask)
    size = model.config.vocab_size
    if k is not None and k >= size:
        raise EgjaxError(f"{k} of {size} tokens", where="--initial-top-k")

    def said(params: Any, batch: SharedPairBatch) -> dict[str, jax.Array]:
        filled = fill(params, batch)
        found = {"ref_chosen": filled.ref_chosen, "ref_rejected": filled.ref_rejected}
        if k is None:
            return found
        return found | vars(initial_top_k(apply, k, vocab_mask=vocab_mask)(params, batch))

    arrays = kept(
        said,
        {"initial": model},
        placed(model, mesh_for(config.training)),
        table,
        config.training,
        kind="reference" if k is None else "initial",
        settings=k,
        run=config.run,
        folder=config.stored_folder,
    )
    names = ("ref_chosen", "ref_rejected")
    rows = replace(table, **{name: arrays.pop(name) for name in names})
    return rows if k is None else Taught(rows, TopK(**arrays))


def _pairs(path: Path, tokenizer: Tokenizer, config: LlamaConfig, length: int) -> list[Pair]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [
        pair_of(row["prompt"], f" {row['chosen']}", f" {row['rejected']}", tokenizer, config)
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
    fitting = own.fitting(pairs, [_longest(p) for p in pairs], config.training, start)

    def work(out: Path) -> None:
        model = start.load()
        _train(config, model, start.vocab_mask, fitting, out, start.write)

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
