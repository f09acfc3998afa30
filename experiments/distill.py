"""The behaviour ratio into the large model: reverse KL to π̄ ∝ πᴸ (πᴱ/πᴺ)^α, exact per token.

    python -m experiments.distill --run runs/quick
    python -m experiments.distill --data FILE.jsonl --large FOLDER --expert FOLDER
        --anti-expert FOLDER --run runs/mine

πᴸ, πᴱ and πᴺ are frozen, the student starts at πᴸ ("Growing Through Experience", arXiv 2506.01312,
section 3.3). Two independent choices: `--divergence`, per token and exact over the vocabulary
(`egjax.losses.distill`), and `--prefixes`, after which it is taken:

- `data`: the collected data, the default; with reverse KL what the paper's text says.
- `teacher`: what π̄ writes for the data's prompts; with `--divergence forward` the paper's formula.
- `student`: what the student writes, on-policy (GKD, arXiv 2306.13649). `--sampling.share 0.5`
  samples in half of the steps, the others take the data.

Samples are drawn anew at every step, from its weights. `--stored-top-k K` computes π̄ once for the
data, keeps its K most probable tokens and the mass of the others in the run directory, and trains
from these, approximately and without a teacher in memory. Needs the stages `text`, `pretrain` and
`sft`.

With `--data` prefixes are one's own, JSON lines as in `experiments.sft`, and so are the models: πᴸ,
πᴱ and πᴺ with one tokenizer, Hugging Face Llamas or stages of a run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import jax
import tyro

from egjax.errors import EgjaxError, check_range
from egjax.lm.config import LlamaConfig
from egjax.lm.int8 import quantize
from egjax.lm.tokenizer import Tokenizer
from egjax.losses import (
    Terms,
    TopK,
    forward_kl,
    forward_kl_terms,
    generalised_jsd,
    generalised_jsd_terms,
    reverse_kl,
    reverse_kl_terms,
    skewed_forward_kl,
    skewed_forward_kl_terms,
    skewed_reverse_kl,
    skewed_reverse_kl_terms,
)
from egjax.train.data import Sample, TokenBatch, pack
from egjax.train.jsonl import read_samples
from egjax.train.objectives import (
    Frozen,
    Taught,
    distill_to_ratio,
    distill_to_stored,
    ratio_top_k,
)
from egjax.train.sampling import (
    PromptBatch,
    Sampling,
    by_ratio,
    by_student,
    on_samples,
    pad_samples,
    parted,
)
from egjax.train.step import LossFn
from experiments import own
from experiments.common import Done, Stage, emit, finished, note, open_run, run_main
from experiments.models import (
    Model,
    apply_of,
    check_one_vocabulary,
    column_mask,
    load,
    save,
    with_columns,
)
from experiments.sft import Weights, fitting_samples
from experiments.training import (
    MODEL,
    LogTo,
    Training,
    figures,
    freed,
    kept,
    mesh_for,
    placed,
    train,
)

__all__ = ["DIVERGENCES", "Config", "Ratio", "stage"]

DIVERGENCES: Mapping[str, tuple[Callable[..., jax.Array], Terms, str | None]] = MappingProxyType(
    {
        "reverse": (reverse_kl, reverse_kl_terms, None),
        "forward": (forward_kl, forward_kl_terms, None),
        "jsd": (generalised_jsd, generalised_jsd_terms, "beta"),
        "skewed-forward": (skewed_forward_kl, skewed_forward_kl_terms, "skew"),
        "skewed-reverse": (skewed_reverse_kl, skewed_reverse_kl_terms, "skew"),
    }
)
"""By the names of `--divergence`: of logits, of what a token adds, and the hyper-parameter."""


@dataclass(frozen=True)
class Ratio:
    """The target π̄."""

    alpha: float = 1.0
    """Exponent of πᴱ/πᴺ."""
    clip: float | None = None
    """Bound on the log-ratio."""
    plausible: float | None = None
    """Tokens with less than this share of πᴸ's most probable one are left out."""

    def __post_init__(self):
        for name, interval in (
            ("alpha", "[0, inf)"),
            ("clip", "(0, inf)"),
            ("plausible", "(0, 1]"),
        ):
            check_range(getattr(self, name), interval, where=f"--ratio.{name}")


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
    divergence: Literal["reverse", "forward", "jsd", "skewed-forward", "skewed-reverse"] = "reverse"
    """Token-level divergence."""
    beta: float | None = None
    """β of jsd, 0.5 unless given; 0 is forward, 1 reverse KL."""
    skew: float | None = None
    """α of the skewed divergences, 0.1 unless given."""
    temperature: float = 1.0
    """Divides the logits of student and π̄ in the divergence."""
    prefixes: Literal["data", "teacher", "student"] = "data"
    """Who wrote what the divergence is taken after: the data set, π̄, or the student (on-policy)."""
    sampling: Sampling = field(default_factory=Sampling)
    """How teacher or student write."""
    stored_top_k: int | None = None
    """Tokens of π̄ that are kept for each one of the data, in place of the models (approximate)."""
    stored_folder: Path | None = None
    """They are kept here rather than in the run directory."""
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

    def __post_init__(self):
        check_range(self.temperature, "(0, inf)", where="--temperature")
        check_range(self.stored_top_k, "[1, inf)", where="--stored-top-k")
        for name, interval in (("beta", "[0, 1]"), ("skew", "(0, 1)")):
            check_range(getattr(self, name), interval, where=f"--{name}")
            if getattr(self, name) is not None and DIVERGENCES[self.divergence][2] != name:
                raise EgjaxError(f"--{name} has no effect with --divergence {self.divergence}")
        if self.prefixes == "data" and self.sampling != Sampling():
            raise EgjaxError("--sampling has no effect with --prefixes data")
        if self.prefixes != "data" and self.stored_top_k is not None:
            raise EgjaxError(
                "--stored-top-k is of the data's prefixes",
                remedy="what is written anew at every step cannot be stored before",
            )
        if self.stored_folder is not None and self.stored_top_k is None:
            raise EgjaxError("--stored-folder has no effect without --stored-top-k")

    def measure(self) -> tuple[Callable[..., jax.Array], Terms]:
        """The divergence, of logits and by token, with its hyper-parameter."""
        divergence, terms, name = DIVERGENCES[self.divergence]
        value = None if name is None else getattr(self, name)
        options = {} if name is None or value is None else {name: value}
        return partial(divergence, **options), partial(terms, **options)


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
    plain = Config()
    for name in ("beta", "skew", "temperature", "prefixes", "sampling", "stored_top_k"):
        if getattr(config, name) != getattr(plain, name):
            inputs[name] = getattr(config, name)

    def work(out: Path) -> None:
        models = {"πᴸ": load(large.path / MODEL), "πᴱ": load(expert.path / MODEL)}
        models["πᴺ"] = load(small.path / MODEL)
        check_one_vocabulary(models)
        models, student = _alike(models), models["πᴸ"].config
        samples = fitting_samples(text, student, config.training.length, Weights())
        table = _table(config, samples, [model.config for model in models.values()])
        tokens = Tokenizer.load(text.path / "tokenizer").vocab_size
        _train(config, models, column_mask(student, tokens), table, out)

    return Stage(config.run, f"seed{config.seed}/distill", inputs, by="all").run(work)


def objective(
    config: Config, large: LlamaConfig, small: LlamaConfig, vocab_mask: jax.Array | None = None
) -> LossFn:
    """What is minimised; its step takes a `Frozen`, unless π̄ is stored."""
    divergence, terms = config.measure()
    layout = config.training.layout
    options = {"divergence": divergence, "terms": terms, "temperature": config.temperature}
    options["vocab_mask"] = vocab_mask
    student, ratio = apply_of(large, layout), vars(config.ratio)
    if config.stored_top_k is not None:
        return distill_to_stored(student, **options)
    loss = distill_to_ratio(student, student, apply_of(small, layout), **options, **ratio)
    if config.prefixes == "data":
        return loss
    writers = {
        "student": by_student(large, vocab_mask=vocab_mask),
        "teacher": by_ratio(large, small, vocab_mask=vocab_mask, **ratio),
    }
    return on_samples(loss, writers[config.prefixes], config.sampling)


def _alike(models: Mapping[str, Model]) -> dict[str, Model]:
    """Models with as many columns as πᴸ, however each is padded."""
    columns = models["πᴸ"].config.vocab_size
    return {name: with_columns(model, columns) for name, model in models.items()}


def _train(
    config: Config,
    models: dict[str, Model],
    vocab_mask: jax.Array | None,
    table: Any,
    out: Path,
    write: Callable[[Path, Model], None] = save,
) -> None:
    mesh, start = mesh_for(config.training), models["πᴸ"]
    loss = objective(config, start.config, models["πᴱ"].config, vocab_mask)
    teachers = {name: models[name] for name in ("πᴸ", "πᴱ", "πᴺ")}
    if config.int8:
        teachers = {n: m._replace(params=quantize(m.params)) for n, m in teachers.items()}
    frozen: Frozen | None = Frozen(*(placed(model, mesh) for model in teachers.values()))
    configs = [model.config for model in teachers.values()]
    stores = config.stored_top_k is not None
    if stores:
        table = _taught(config, teachers, frozen, vocab_mask, table)
        freed([models[name].params for name in ("πᴱ", "πᴺ")], frozen.expert, frozen.anti_expert)
        frozen, teachers, configs = None, {}, []
    train(
        start,
        loss,
        table,
        config.training,
        seed=config.seed,
        out=out,
        title="distill",
        frozen=frozen,
        frozen_configs=configs,
        consume=stores,
        log_to=config.log_to,
        write=write,
    )


def _table(
    config: Config, samples: Sequence[Sample], models: Sequence[LlamaConfig]
) -> TokenBatch | PromptBatch:
    """The samples as rows, or their prompts, as far as they leave room for a completion; the others
    are told."""
    size, k = models[0].vocab_size, config.stored_top_k
    if k is not None and k >= size:
        raise EgjaxError(f"{k} of {size} tokens", where="--stored-top-k")
    if config.prefixes == "data":
        return pack(samples, config.training.length)
    new = config.sampling.max_new_tokens
    room = min(config.training.length + 1, *(model.max_seq_len for model in models)) - new
    fitting = [sample for sample in samples if len(parted(sample)[0]) <= room]
    if not fitting:
        raise EgjaxError(
            f"no prompt leaves room for {new} tokens in rows of {config.training.length}",
            where="--sampling.max-new-tokens",
        )
    if len(fitting) < len(samples):
        left = f"{len(samples) - len(fitting)} of {len(samples)} prompts exceed {room} tokens"
        note(f"{left}: left out (--sampling.max-new-tokens)")
    return pad_samples(fitting, new, multiple=1)


def _taught(
    config: Config,
    teachers: Mapping[str, Model],
    frozen: Frozen,
    vocab_mask: jax.Array | None,
    table: TokenBatch,
) -> Taught:
    """The rows with π̄'s most probable tokens at each position."""
    k, large, small = config.stored_top_k, teachers["πᴸ"].config, teachers["πᴱ"].config
    layout = config.training.layout
    assert k is not None
    top = ratio_top_k(
        apply_of(large, layout, heads=True),
        apply_of(small, layout, heads=True),
        k,
        temperature=config.temperature,
        vocab_mask=vocab_mask,
        **vars(config.ratio),
    )
    arrays = kept(
        lambda params, batch: vars(top(params, batch)),
        teachers,
        frozen,
        table,
        config.training,
        kind="teacher",
        settings=[k, config.temperature, config.ratio],
        run=config.run,
        folder=config.stored_folder,
    )
    return Taught(table, TopK(**arrays))


def _shape(config: LlamaConfig) -> LlamaConfig:
    """Without what two checkpoints of one model may state differently."""
    return dataclasses.replace(
        config, vocab_size=1, bos_id=None, eos_ids=(), pad_id=None, dtype="float32", max_seq_len=1
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
    large = starts["πᴸ"]
    if _shape(starts["πᴱ"].config) != _shape(starts["πᴺ"].config):
        raise EgjaxError(
            "πᴱ and πᴺ are of different shapes",
            where=str(config.expert),
            remedy="πᴱ is πᴺ after training",
        )
    samples, chat = read_samples(paths["data"], large.tokenizer, large.template, large.config)
    own.check_alike(starts, chat=chat)
    fitting = own.fitting(samples, [len(s.tokens) for s in samples], config.training, large)
    table = _table(config, fitting, [start.config for start in starts.values()])

    def work(out: Path) -> None:
        models = _alike({name: start.load() for name, start in starts.items()})
        _train(config, models, large.vocab_mask, table, out, large.write)

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
