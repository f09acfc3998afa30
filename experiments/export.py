"""A model of a run as a Hugging Face folder: for transformers, PEFT, an inference server.

    python -m experiments.export --model runs/quick/seed0/sft --to FOLDER

Writes config.json, safetensors and the run's tokenizer, a second or so for a million parameters.
An adapter that was trained (`experiments.sft --lora-rank`) is merged in; by itself it lies in the
stage's folder `adapter` in PEFT's layout, and fits the export of the stage that it started from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from egjax.errors import EgjaxError
from egjax.files import delete
from experiments import own
from experiments.common import note, run_main

__all__ = ["Config"]


@dataclass(frozen=True)
class Config:
    """What to write, and where."""

    model: Path
    """Folder of a stage, e.g. `runs/quick/seed0/pretrain_large`, or of a model."""
    to: Path
    """The folder; must be new or empty."""


def main(config: Config) -> None:
    start = own.Start.at(config.model)
    if config.to.exists() and (not config.to.is_dir() or any(config.to.iterdir())):
        raise EgjaxError("is not empty", where=str(config.to), remedy="name another folder")
    try:
        start.write(config.to, start.load())
    except BaseException:  # the folder was empty, and so the same command can be given again
        for path in config.to.glob("*"):
            delete(path)
        raise
    note(f"the model is in {config.to}")


if __name__ == "__main__":
    run_main(main, Config)
