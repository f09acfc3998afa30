"""A training stage of a very small Llama, as every stage trains; for tests of several processes."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from egjax import hosts
from egjax.errors import EgjaxError
from egjax.lm.config import LlamaConfig
from egjax.lm.params import init
from egjax.train.data import Sample, Shuffled, pack
from egjax.train.layout import Layout
from egjax.train.objectives import next_token
from experiments import training
from experiments.common import PARTS, Stage, divided, open_run, run_main
from experiments.models import Model, apply_of


@dataclass(frozen=True)
class Config:
    """What to train."""

    run: Path
    """Run directory."""
    steps: int = 40
    """Optimiser steps."""
    save_every: int = 10
    """At most this many steps are lost."""
    pause: float = 0.0
    """Seconds that each step waits on the host."""
    fail: int = -1
    """This process fails in its own way instead of training."""
    units: int = 0
    """Divide so many units of work instead of training."""


def main(config: Config) -> None:
    llama = LlamaConfig(48, 32, 64, 2, 4, 2, 8, max_seq_len=32)
    starts = np.random.default_rng(0).integers(48, size=50)
    texts = [Sample(((start + np.arange(12)) % 48).tolist(), [True] * 12) for start in starts]

    class Slow(Shuffled):
        def __next__(self):
            time.sleep(config.pause)  # so that a signal comes between two steps
            return super().__next__()

    training.Shuffled = Slow

    def work(out: Path) -> None:
        if hosts.index() == config.fail:
            raise EgjaxError("this one cannot")
        training.train(
            Model(init(jax.random.key(0), llama), llama, "none"),
            next_token(apply_of(llama, Layout())),
            pack(texts, 16),
            training.Training(config.steps, 8, 16, 1e-2, config.save_every),
            seed=0,
            out=out,
            title="toy",
        )

    def share(out: Path) -> None:
        def unit(number: int) -> int:
            time.sleep(config.pause)
            with (config.run / "done.txt").open("a") as file:
                file.write(f"{number} {hosts.index()}\n")
            return number**2

        works = {str(i): functools.partial(unit, i) for i in range(config.units)}
        print(divided(out / PARTS, works, at="units"))

    with open_run(config.run):
        if config.units:
            Stage(config.run, "units", {}, by="all").run(share)
            return
        Stage(config.run, "toy", {"steps": config.steps}, by="all").run(work)


if __name__ == "__main__":
    run_main(main, Config)
