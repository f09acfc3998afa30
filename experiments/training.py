"""How every training stage trains: the loop, its checkpoints, its curve, its model on disk."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from egjax import hosts
from egjax.errors import EgjaxError
from egjax.evals.intervals import Figure
from egjax.lm.params import shardings
from egjax.mesh import batch_sharding, make_mesh, place
from egjax.train.data import Shuffled
from egjax.train.loop import fit
from egjax.train.optim import OptimConfig, make_optimizer
from egjax.train.step import LossFn, init_state, make_train_step, state_shardings
from experiments.common import Done, save_then_stop
from experiments.models import Model, save

__all__ = ["MODEL", "Training", "curve", "figures", "mesh_for", "placed", "train"]

MODEL = "model"
"""Folder of the model in a stage's outputs."""
_CURVE = "metrics.jsonl"


@dataclass(frozen=True)
class Training:
    """Length and rate of a training stage."""

    steps: int
    """Optimiser steps."""
    batch: int
    """Rows a step."""
    length: int
    """Tokens a row."""
    learning_rate: float
    """Peak of the learning rate."""
    save_every: int = 100
    """Steps between checkpoints."""


def train(
    model: Model,
    loss: LossFn,
    table: Any,
    config: Training,
    *,
    seed: int,
    out: Path,
    title: str,
    frozen: Any = None,
) -> None:
    """Trains a model and writes it to `out/model`; goes on from a checkpoint of the same stage.

    Args:
        model: where to start.
        loss: objective.
        table: rows to draw batches from.
        config: length and rate.
        seed: of the order of rows.
        out: the stage's directory.
        title: for the progress display.
        frozen: what the objective takes beside the parameters, on the same mesh (`placed`).

    Raises:
        KeyboardInterrupt: asked to stop; the state was saved first, and the same command goes on.
    """
    tx = make_optimizer(OptimConfig(learning_rate=config.learning_rate), config.steps)
    mesh = mesh_for(config.batch)
    state = state_shardings(tx, model.params, shardings(model.config, mesh), mesh)
    with save_then_stop() as asked:
        stop = hosts.Agreed(asked, str(out))
        result = fit(
            init_state(placed(model, mesh), tx, state),
            make_train_step(loss, tx, shardings=state, batch_sharding=batch_sharding(mesh)),
            Shuffled(table, config.batch, seed, batch_sharding(mesh)),
            num_steps=config.steps,
            key=jax.random.key(seed),
            frozen=frozen,
            directory=out,
            save_every=config.save_every,
            log_every=max(1, config.steps // 50),
            stop=stop,
            title=title,
        )
        stop.close()
    if not result.finished:  # another process was asked, and all have saved and left
        signal.raise_signal(signal.SIGTERM)
    save(out / MODEL, model._replace(params=result.state.params))


def mesh_for(batch: int) -> Mesh:
    """All devices along `data`, as far as they divide a batch; as many of each process."""
    size = math.gcd(batch, jax.device_count())
    each, rest = divmod(size, jax.process_count())
    if rest:
        raise EgjaxError(
            f"a batch of {batch} does not split over {jax.process_count()} processes",
            remedy="let the batch be a multiple of the number of processes",
        )
    chosen = [
        device
        for process in range(jax.process_count())
        for device in [d for d in jax.devices() if d.process_index == process][:each]
    ]
    return make_mesh(devices=chosen)


def placed(model: Model, mesh: Mesh) -> Any:
    """Parameters of a model where its table of tensors puts them on a mesh."""
    return place(model.params, shardings(model.config, mesh))


def figures(done: Done, stage: str) -> list[Figure]:
    """What a training stage logged last: losses, accuracies, norms, rate."""
    rows = [json.loads(line) for line in (done.path / _CURVE).read_text().splitlines()]
    last, count = rows[-1], rows[-1]["step"]
    units = {"steps_per_second": "1/s", "accuracy": "fraction", "teacher_accuracy": "fraction"}
    return [
        Figure(f"{stage}_{name}", value, units.get(name, "nats" if "loss" in name else ""), n=count)
        for name, value in last.items()
        if name != "step"
    ]


def curve(path: Path, quantity: str) -> tuple[Sequence[int], Sequence[float]]:
    """Steps and values of a logged quantity of a training stage."""
    rows = [json.loads(line) for line in (path / _CURVE).read_text().splitlines()]
    rows = [row for row in rows if quantity in row]
    return [row["step"] for row in rows], [row[quantity] for row in rows]
