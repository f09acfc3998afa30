"""A small and a clearly larger Llama from scratch, on general household text.

    python -m experiments.pretrain --run runs/quick

No hub is needed: both models share the run's tokenizer and read the same text, which holds no plan
of any task that is evaluated. Hardware: two CPU cores; 0.5M parameters read some 10,000 tokens a
second, 4M some 2,000. A model of one's own (a Hugging Face Llama) can take the place of either:
`--small-from FOLDER`, `--large-from FOLDER`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from jax.sharding import Mesh

from egjax.errors import EgjaxError
from egjax.lm import hf
from egjax.lm.config import LlamaConfig
from egjax.lm.params import init
from egjax.lm.tokenizer import BOS, EOS, PAD, Tokenizer
from egjax.mesh import make_mesh
from egjax.train.data import Sample, TokenBatch, pack, split
from egjax.train.objectives import next_token
from experiments import own
from experiments.common import Done, Stage, emit, finished, open_run, run_main
from experiments.models import Model, apply_of, asked, column_mask, host_device, save
from experiments.training import MODEL, LogTo, Training, figures, train

__all__ = ["Config", "Size", "large_stage", "small_stage"]


@dataclass(frozen=True)
class Size:
    """Shape of a Llama from scratch.

    Few wide heads: on a CPU the time of attention grows with the number of heads.
    """

    hidden_size: int
    """Width."""
    intermediate_size: int
    """Width of the feed-forward layers."""
    num_layers: int
    """Depth."""
    num_heads: int
    """Heads of queries."""
    num_kv_heads: int
    """Heads of keys and values."""
    head_dim: int
    """Width of a head."""
    max_seq_len: int = 512
    """Longest sequence."""


@dataclass(frozen=True)
class Config:
    """Length of both pretrainings."""

    run: Path = Path("runs/quick")
    """Run directory."""
    seed: int = 0
    """Of initial weights and order of text."""
    small: Training = field(default_factory=lambda: Training(150, 16, 256, 3e-3))
    """The small model."""
    large: Training = field(default_factory=lambda: Training(120, 16, 256, 1.5e-3))
    """The large model."""
    small_size: Size = Size(96, 256, 4, 2, 1, 48)
    """Shape of the small one: 0.5M parameters at a vocabulary of 1,024."""
    large_size: Size = Size(256, 768, 5, 4, 2, 64)
    """Shape of the large one: 4M parameters."""
    small_from: Path | None = None
    """Hugging Face folder to start the small model from instead of random weights."""
    large_from: Path | None = None
    """Hugging Face folder to start the large model from."""
    train: bool = True
    """False: the models of both folders are taken as they are."""
    z_loss: float = 0.0
    """Weight of the squared log-normaliser, which keeps logits small."""
    log_to: LogTo = ()
    """Write the log to these, too."""
    json: Annotated[bool, tyro.conf.arg(help="print figures as JSON lines")] = False


def small_stage(config: Config, text: Done) -> Done:
    """Pretrains πᴺ."""
    return _stage(config, text, "small", config.small, config.small_from, config.small_size)


def large_stage(config: Config, text: Done) -> Done:
    """Pretrains πᴸ."""
    return _stage(config, text, "large", config.large, config.large_from, config.large_size)


def _stage(
    config: Config,
    text: Done,
    name: str,
    training: Training,
    folder: Path | None,
    size: Size,
) -> Done:
    start = None if folder is None else own.Start.at(folder).fingerprint  # wherever it lies
    inputs: dict[str, Any] = {"training": training, "seed": config.seed, "from": start}
    inputs |= {"text": text.fingerprint, "z_loss": config.z_loss}
    inputs["size"] = None if folder else size
    if not config.train:
        inputs |= {"training": None, "z_loss": None}
        if folder is None:
            raise EgjaxError(f"--{name}-from is needed with --no-train")
    stage = Stage(config.run, f"seed{config.seed}/pretrain_{name}", inputs, by="all")

    def work(out: Path) -> None:
        tokenizer = Tokenizer.load(text.path / "tokenizer")
        if not config.train:
            # On the host: a large model need not fit the device in its own type.
            mesh = make_mesh(devices=[host_device()])
            save(out / MODEL, _start(tokenizer, size, folder, config.seed, mesh))
            return
        model = _start(tokenizer, size, folder, config.seed)
        table = _rows(text.path / "general.jsonl", tokenizer, model.config, training.length)
        loss = next_token(
            apply_of(model.config, training.layout),
            vocab_mask=column_mask(model.config, tokenizer.vocab_size),
            z_loss=config.z_loss,
        )
        train(
            model,
            loss,
            table,
            training,
            seed=config.seed,
            out=out,
            title=f"pretrain {name}",
            log_to=config.log_to,
        )

    return stage.run(work)


def _rows(path: Path, tokenizer: Tokenizer, config: LlamaConfig, length: int) -> TokenBatch:
    """General text as packed rows; long texts are cut."""
    texts = [json.loads(row)["text"] for row in path.read_text(encoding="utf-8").splitlines()]
    tokens = [[*asked(config, t), *config.eos_ids[:1]] for t in tokenizer.encode_batch(texts)]
    return pack(split([Sample(t, [True] * len(t)) for t in tokens], length), length)


def _start(
    tokenizer: Tokenizer,
    size: Size,
    folder: Path | None,
    seed: int,
    mesh: Mesh | None = None,
) -> Model:
    if folder is not None:
        config, params = hf.load(folder, mesh=mesh)
        theirs = Tokenizer.load(folder)
        if theirs.fingerprint != tokenizer.fingerprint:
            raise EgjaxError(
                "its tokenizer is not the run's",
                where=str(folder),
                remedy="give the run this tokenizer: --text.tokenizer-from",
            )
        return Model(params, config, theirs.fingerprint)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        **dataclasses.asdict(size),
        bos_id=tokenizer.token_id(BOS),
        eos_ids=(tokenizer.token_id(EOS),),
        pad_id=tokenizer.token_id(PAD),
    )
    return Model(init(jax.random.key(seed), config), config, tokenizer.fingerprint)


def main(config: Config) -> None:
    for name, folder in (("small", config.small_from), ("large", config.large_from)):
        if folder is not None:
            own.unused(config, f"{name}_size", when=f"with --{name}-from")
    with open_run(config.run):
        text = finished(config.run, "text", made_by="text")
        small, large = small_stage(config, text), large_stage(config, text)
        if config.train:
            emit(
                *figures(small, "pretrain_small"),
                *figures(large, "pretrain_large"),
                json=config.json,
            )


if __name__ == "__main__":
    run_main(main, Config)
