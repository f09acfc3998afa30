"""Collection in many shards, then training with many checkpoints; for tests that kill it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from egjax.search.mcts import SearchConfig
from experiments import collect, data, pretrain, tasks, text, training
from experiments.common import open_run, run_main
from experiments.training import Training


@dataclass(frozen=True)
class Config:
    """How much of it."""

    run: Path
    """Run directory."""
    steps: int = 99
    """Steps of the training."""
    save_every: int = 5
    """Steps between checkpoints."""


def main(config: Config) -> None:
    data.find_dataset = lambda: None  # the embedded household: small arrays, read in no time
    fit = training.fit
    training.fit = lambda *state, **how: fit(*state, **{**how, "log_every": 1})
    with open_run(config.run) as run:
        listed = tasks.stage(tasks.Config(run=run, held_out=1))
        search = SearchConfig(simulations=16, rollouts=4)
        found = collect.stage(
            collect.Config(run=run, search=search, batch=1, second=0, shard_tasks=1), listed
        )
        words = text.stage(
            text.Config(
                run=run, scenes=2, general=64, hindsight=64, questions=64, orders=1, asked=4,
                vocab_size=400,
            ),
            listed,
            found,
        )  # fmt: skip
        small = Training(config.steps, 4, 64, 1e-3, config.save_every)
        pretrain.small_stage(pretrain.Config(run=run, small=small), words)


if __name__ == "__main__":
    run_main(main, Config)
