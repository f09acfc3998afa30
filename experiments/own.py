"""One's own models and data in the training stages: where they are, that they fit, what comes out.

A model is a Hugging Face folder (config.json, safetensors, tokenizer.json, with or without a chat
template), or a stage's folder of a run, e.g. `runs/quick/seed0/sft`. What is trained from it is
such a folder again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax

from egjax import hosts
from egjax.errors import EgjaxError
from egjax.files import here
from egjax.lm import hf
from egjax.lm.config import LlamaConfig
from egjax.lm.ensemble import check_vocabularies
from egjax.lm.template import FILE as TEMPLATE
from egjax.lm.template import ChatTemplate, plain_source
from egjax.lm.tokenizer import Tokenizer
from egjax.train.jsonl import has_messages
from experiments.common import Done, Stage, file_fingerprint, fingerprint, note, open_run
from experiments.models import Model, column_mask, cut_to, described
from experiments.models import load as load_run_model
from experiments.training import MODEL, Training, gathered

__all__ = [
    "Start",
    "check_alike",
    "defaults",
    "fitting",
    "given",
    "model_folder",
    "stage",
    "unused",
]

T = TypeVar("T")
_CONFIG = "config.json"
_PIECE, _BLOCK = 2**20, 2**12  # bytes, see `_digest`
# Written by transformers beside the weights; read as data, copied to what is trained.
_BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    TEMPLATE,
    "generation_config.json",
)


@dataclass(frozen=True)
class Start:
    """A model to start from, all but its weights.

    Attributes:
        folder: with its weights.
        words: folder with its tokenizer.
        config: its shapes.
        tokenizer: its tokenizer.
        template: its chat template.
    """

    folder: Path
    words: Path
    config: LlamaConfig
    tokenizer: Tokenizer
    template: ChatTemplate

    @classmethod
    def at(cls, folder: Path) -> Start:
        """Finds a model, reads what is small.

        Raises:
            EgjaxError: there is none, or its tokenizer is not its own or has more tokens than it.
        """
        inside = model_folder(folder)
        spoken = None
        if (inside / _CONFIG).is_file():
            words = inside
            config = hf.read_config(inside)
        else:
            config, spoken = described(inside)
            places = [parent / "text" / "tokenizer" for parent in inside.absolute().parents[:4]]
            words = next((place for place in places if place.is_dir()), inside)
        tokenizer = Tokenizer.load(words)
        if tokenizer.vocab_size > config.vocab_size:
            raise EgjaxError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}",
                where=str(folder),
                remedy="they belong to different models",
            )
        if spoken not in (None, tokenizer.fingerprint):
            raise EgjaxError(
                f"the model was not trained with the tokenizer in {words}", where=str(folder)
            )
        return cls(inside, words, config, tokenizer, ChatTemplate.load(words))

    @property
    def fingerprint(self) -> str:
        """Names what it is read from by content, wherever it lies; see `_digest`."""
        small = [p for p in (self.folder / _CONFIG, *self._beside()) if p.is_file()]
        pattern = "*.safetensors*" if (self.folder / _CONFIG).is_file() else "**/*"
        weights = [p for p in sorted(self.folder.glob(pattern)) if p.is_file()]
        named = {str(path.relative_to(self.folder)): _digest(path) for path in weights}
        return fingerprint([file_fingerprint(*small), named])

    @property
    def vocab_mask(self) -> jax.Array | None:
        """bool[V], False for columns that no token has; None where there is none."""
        return column_mask(self.config, self.tokenizer.vocab_size)

    def load(self, *, cut: bool = False) -> Model:
        """The weights.

        Args:
            cut: without columns that no token has, for decoding. What is trained keeps them.
        """
        size = self.tokenizer.vocab_size
        if (self.folder / _CONFIG).is_file():
            config, params = hf.load(self.folder, vocab_size=size if cut else None)
            return Model(params, config, self.tokenizer.fingerprint)
        model = load_run_model(self.folder)
        return cut_to(model, size) if cut else model

    def write(self, folder: Path, model: Model) -> None:
        """Writes a model trained from this one as a Hugging Face folder with the same tokenizer."""
        params = gathered(model.params)
        if hosts.index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for path in self._beside():
                shutil.copyfile(path, folder / path.name)
            hf.save(folder, model.config, params)
        hosts.barrier(f"the model in {folder}")

    def write_template(self, folder: Path) -> None:
        """Writes the plain format as a chat template, so that other programs ask as was trained."""
        ids = self.config.bos_id, next(iter(self.config.eos_ids), None)
        marks = ["" if i is None else self.tokenizer.token(i) for i in ids]
        (folder / TEMPLATE).write_text(plain_source(*marks), encoding="utf-8")

    def _beside(self) -> list[Path]:
        return [self.words / name for name in _BESIDE if (self.words / name).is_file()]


def _digest(path: Path) -> str:
    """SHA-256 (hex) of a file's size and content.

    Of each mebibyte after the first, which holds the names and shapes of safetensors, the first
    4 KiB: of 16 GB some 60 MB are read, and training changes nearly every number of a matrix.
    """
    digest = hashlib.sha256(f"{path.stat().st_size}\n".encode())
    with path.open("rb") as file:
        digest.update(file.read(_PIECE))
        while block := file.read(_BLOCK):
            digest.update(block)
            file.seek(_PIECE - _BLOCK, os.SEEK_CUR)
    return digest.hexdigest()


def model_folder(folder: Path) -> Path:
    """The folder with weights: the one given, or `model` in it.

    Raises:
        EgjaxError: neither holds a model.
    """
    for place in (folder, folder / MODEL):
        if (place / _CONFIG).is_file() or (place / "metadata").is_dir():
            return place
    raise EgjaxError(
        "there is no model",
        where=str(folder),
        remedy="give a Hugging Face folder, or the folder of a stage of a run",
    )


def defaults(config: type[T], learning_rate: float) -> Callable[[Sequence[str]], T]:
    """For `run_main`: with `--data` what suits a pretrained model, as in TRL (rows of 1,024 tokens;
    rates of 2e-5, for preferences 1e-6), where a run's small models take larger steps.

    Args:
        config: the script's `Config`, with a field `training`.
        learning_rate: its peak with `--data`.
    """

    def of(arguments: Sequence[str]) -> T:
        plain: Any = config()
        if not any(a.split("=")[0] == "--data" for a in arguments):
            return plain
        training = dataclasses.replace(plain.training, length=1024, learning_rate=learning_rate)
        return dataclasses.replace(plain, training=training)

    return of


def given(**options: Path | None) -> dict[str, Path]:
    """Options that `--data` needs beside it.

    Raises:
        EgjaxError: one is missing.
    """
    for name, value in options.items():
        if value is None:
            raise EgjaxError(f"--{name.replace('_', '-')} is needed with --data")
    return {name: value for name, value in options.items() if value is not None}


def unused(config: Any, *names: str, when: str) -> None:
    """Refuses options that would have no effect.

    Args:
        config: an instance of a script's `Config`.
        names: its fields that must be as they are by default.
        when: completes the sentence, e.g. "without --data".

    Raises:
        EgjaxError: one is not.
    """
    plain = type(config)()
    for name in names:
        if getattr(config, name) != getattr(plain, name):
            raise EgjaxError(f"--{name.replace('_', '-')} has no effect {when}")


def check_alike(starts: Mapping[str, Start], *, chat: bool) -> None:
    """Refuses models that cannot be combined, before their weights are read.

    Args:
        starts: by name.
        chat: the data hold messages, so that templates matter, too.

    Raises:
        EgjaxError: tokenizers or chat templates differ.
    """
    check_vocabularies({}, {name: start.tokenizer.fingerprint for name, start in starts.items()})
    templates = {name: start.template.fingerprint for name, start in starts.items()}
    if chat and len(set(templates.values())) > 1:
        listed = ", ".join(f"{name} has {value[:12]}" for name, value in templates.items())
        raise EgjaxError(
            f"chat templates differ: {listed}",
            remedy="give all the same chat_template, or data of texts instead of messages",
        )


def fitting(
    items: Sequence[T], lengths: Sequence[int], training: Training, start: Start
) -> list[T]:
    """What fits a row; the rest is told.

    Args:
        items: samples or pairs.
        lengths: tokens of each.
        training: says how long rows are.
        start: the model.

    Raises:
        EgjaxError: rows longer than the model's context, or nothing fits.
    """
    if training.length > start.config.max_seq_len:
        raise EgjaxError(
            f"rows of {training.length} tokens exceed the model's context of "
            f"{start.config.max_seq_len}",
            where="--training.length",
            remedy="shorten the rows",
        )
    kept = [item for item, length in zip(items, lengths) if length <= training.length + 1]
    if not kept:
        raise EgjaxError(
            f"none of {len(items)} lines fits {training.length} tokens; "
            f"the shortest has {min(lengths)}",
            where="--training.length",
        )
    if len(kept) < len(items):
        left = f"{len(items) - len(kept)} of {len(items)} lines exceed {training.length} tokens"
        note(f"{left}: left out (--training.length)")
    return kept


def stage(config: Any, name: str, starts: Mapping[str, Start], work: Any) -> Done:
    """Runs a stage on one's own data; its inputs are the options, and by content, so that they may
    be moved or copied, the data and the models."""
    here(config.run, "--data: --run")  # a Hugging Face folder is written there, file by file
    options = {
        name: value
        for name, value in vars(config).items()
        if name not in ("json", "log_to") and not isinstance(value, Path)
    }
    inputs = {
        "options": options,
        "data": file_fingerprint(config.data),
        "models": {model: start.fingerprint for model, start in starts.items()},
    }
    start = next(iter(starts.values()))  # the one that learns
    told = (start.words / TEMPLATE).is_file()  # by the training before this one
    plain = start.template.source is None and not told and has_messages(config.data)
    if plain:
        note(
            f"{start.words}: no chat template; a message is a line `role: content`, "
            f"and the trained model gets a {TEMPLATE} that says so"
        )

    def work_and_template(out: Path) -> None:
        work(out)
        if plain and hosts.index() == 0:
            start.write_template(out / MODEL)

    with open_run(config.run):
        whole = Stage(config.run, f"seed{config.seed}/own_{name}", inputs, by="all")
        done = whole.run(work_and_template)
    note(f"the model is in {done.path / MODEL}; transformers and --model take it")
    return done
