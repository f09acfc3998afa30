"""How every training stage trains: the loop, its checkpoints, its curve, its model on disk."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from egjax import hosts
from egjax.errors import EgjaxError
from egjax.evals.intervals import Figure
from egjax.files import written_here
from egjax.lm import int8, params, peft
from egjax.lm.config import LlamaConfig
from egjax.lm.lora import LoraConfig, merge
from egjax.lm.lora import init as init_adapter
from egjax.lm.lora import shardings as adapter_shardings
from egjax.mesh import batch_sharding, make_mesh, place
from egjax.train import stored
from egjax.train.adapters import FrozenBase, adapted
from egjax.train.data import Shuffled, num_rows
from egjax.train.flops import peak_flops, step_work
from egjax.train.layout import SAME_RESULT, Layout, cast, masters, placed_step
from egjax.train.loop import fit
from egjax.train.optim import SCHEDULES, OptimConfig, make_optimizer
from egjax.train.sampling import PromptBatch
from egjax.train.step import LossFn, init_state, make_train_step, state_shardings
from egjax.train.writers import writers
from experiments.common import Done, fingerprint, inputs_of, note, save_then_stop
from experiments.models import Model, save

__all__ = [
    "ADAPTER",
    "METRICS",
    "MODEL",
    "LogTo",
    "Training",
    "curve",
    "figures",
    "freed",
    "gathered",
    "kept",
    "mesh_for",
    "placed",
    "train",
]

MODEL = "model"
"""Folder of the model in a stage's outputs."""
ADAPTER = "adapter"
"""Folder of the adapter, where one was trained."""
METRICS = "metrics.jsonl"
"""File with what a stage logged."""
LogTo = tuple[Literal["tensorboard", "wandb"], ...]
"""Where the log goes beside its JSON lines."""


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
    save_every: int = field(default=100, metadata=SAME_RESULT)
    """At most this many steps are lost, however the process ends; half as many lie between two
    checkpoints."""
    layout: Layout = field(default_factory=Layout)
    """What a step trades between memory, arithmetic and communication. Weights are trained in
    float32 where it names no other type."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """How the learning rate goes on after its warm-up; wsd: warm-up, stable, decay."""

    def __post_init__(self):
        for name in ("steps", "batch", "length", "save_every"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise EgjaxError(
                    f"{getattr(self, name)} is less than 1", where=f"--training.{option}"
                )
        parts = self.layout.accumulate
        if self.batch % parts:
            raise EgjaxError(
                f"{parts} micro-batches do not divide {self.batch} rows",
                where="--training.layout.accumulate",
            )


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
    frozen_configs: Sequence[LlamaConfig] = (),
    lora: LoraConfig | None = None,
    consume: bool = False,
    log_to: Sequence[str] = (),
    write: Callable[[Path, Model], None] = save,
) -> None:
    """Trains a model and writes it to `out/model`; goes on from a checkpoint of the same stage.

    A model of a 16-bit type computes in it, its weights and the optimiser's state are float32 until
    it is written.

    Args:
        model: where to start.
        loss: objective.
        table: rows to draw batches from.
        config: length and rate.
        seed: of the order of rows.
        out: the stage's directory.
        title: for the progress display.
        frozen: what the objective takes beside the parameters, on the same mesh (`placed`).
        frozen_configs: the models that a step runs forward beside the trained one.
        lora: train this adapter in place of the weights. It is written to `out/adapter` in PEFT's
            layout, and the model with it merged in.
        consume: the weights that `model` came with are freed once training has copied them, whoever
            else refers to them; not with an adapter.
        log_to: see `egjax.train.writers`.
        write: `(folder, model)`, how the model is written.

    Raises:
        KeyboardInterrupt: asked to stop; the state was saved first, and the same command goes on.
    """
    tx = make_optimizer(
        OptimConfig(learning_rate=config.learning_rate),
        config.steps,
        schedule=SCHEDULES[config.schedule],
    )
    mesh = mesh_for(config)
    if hosts.index() == 0:
        _tell_mesh(mesh, config, title)
    layout = replace(config.layout, master=config.layout.master or "float32")
    model.config.check_length(config.length, where="rows of training data")
    # What is sampled in a step is not known before it.
    known = not isinstance(table, PromptBatch)
    base = placed(model, mesh)
    if lora is None:
        placed_model = placed_step(loss, model.config, tx, mesh, layout)
        step = placed_model.step
        state = init_state(masters(base, layout), tx, placed_model.shardings)
        if consume:
            freed(model.params, base)
    else:
        adapter = init_adapter(jax.random.key(seed), model.config, lora, mesh)
        places = adapter_shardings(model.config, lora, mesh)
        places = state_shardings(tx, adapter, places, mesh)
        step = make_train_step(
            adapted(loss, lora),
            tx,
            accumulate=layout.accumulate,
            shardings=places,
            batch_sharding=batch_sharding(mesh),
        )
        state, frozen = init_state(adapter, tx, places), FrozenBase(base, frozen)
    made_from, inputs = inputs_of(out)
    shown = {"training": asdict(config), "seed": seed, "inputs": inputs}
    with (
        save_then_stop() as asked,
        writers(log_to, out, title, inputs=made_from, config=shown) as on_log,
    ):
        stop = hosts.Agreed(asked, str(out))
        result = fit(
            state,
            step,
            Shuffled(table, config.batch, seed, batch_sharding(mesh)),
            num_steps=config.steps,
            key=jax.random.key(seed),
            frozen=frozen,
            directory=out,
            save_every=config.save_every,
            log_every=max(1, config.steps // 50),
            on_log=on_log,
            stop=stop,
            title=title,
            work=step_work(model.config, frozen_configs) if known else None,
            peak=peak_flops(list(mesh.devices.flat)),
        )
        stop.close()
    if not result.finished:  # another process was asked, and all have saved and left
        signal.raise_signal(signal.SIGTERM)
    trained = result.state.params
    if lora is not None:
        adapter = gathered(trained)
        if hosts.index() == 0:
            with written_here(out / ADAPTER) as folder:
                peft.save(folder, model.config, lora, adapter)
        trained = merge(base, trained, lora)
    trained = cast(trained, model.config.dtype)
    write(out / MODEL, model._replace(params=trained))


def mesh_for(config: Training) -> Mesh:
    """All devices along `data`, as far as they divide a micro-batch, and what `layout` wants along
    `model`; as many devices of each process."""
    layout, count = config.layout, jax.process_count()
    rows = math.gcd(config.batch // layout.accumulate, jax.device_count() // layout.model)
    each, rest = divmod(rows * layout.model, count)
    if rest:
        raise EgjaxError(
            f"a micro-batch of {config.batch // layout.accumulate} rows does not split over "
            f"{count} processes",
            remedy="let it be a multiple of the number of processes",
        )
    chosen = [
        device
        for process in range(count)
        for device in [d for d in jax.devices() if d.process_index == process][:each]
    ]
    return make_mesh(model=layout.model, devices=chosen)


def _tell_mesh(mesh: Mesh, config: Training, title: str) -> None:
    """Says which devices are at work, and what would have the others work, too."""
    count, layout = jax.device_count(), config.layout
    rows, columns = mesh.shape["data"], mesh.shape["model"]
    note(f"{title}: {mesh.size} of {count} devices, data {rows} x model {columns}")
    if mesh.size == count:
        return
    if count % columns:
        mend = f"let --training.layout.model divide {count}"
    else:
        whole = count // columns * layout.accumulate
        mend = f"let --training.batch be a multiple of {whole}; it is {config.batch}"
    note(f"{title}: warning: {count - mesh.size} devices are idle: {mend}")


def placed(model: Model, mesh: Mesh) -> Any:
    """Parameters of a model where its table of tensors puts them on a mesh."""
    table = int8.table if int8.is_quantized(model.params) else params.table
    return place(model.params, params.placements(table(model.config), mesh))


def freed(*trees: Any) -> None:
    """Frees the memory of arrays, whoever refers to them."""
    for x in jax.tree.leaves(trees):
        if isinstance(x, jax.Array) and not x.is_deleted():
            x.delete()


def kept(
    fn: Callable[[Any, Any], Mapping[str, Any]],
    models: Mapping[str, Model],
    params: Any,
    table: Any,
    config: Training,
    *,
    kind: str,
    settings: Any,
    run: Path,
    folder: Path | None = None,
) -> dict[str, Any]:
    """What frozen models say about a table: computed once, then read from disk.

    Args:
        fn: `(params, batch) -> arrays` by name, see `egjax.train.stored.compute`.
        models: by name, as they were loaded; what is stored is theirs alone.
        params: theirs on the mesh of `config`, as `fn` takes them.
        table: rows of tokens.
        config: says how many rows are read at once.
        kind: names the quantity.
        settings: what else decides the arrays, as `fingerprint` takes it.
        run: the run directory; in its `stored` there is a folder for each kind and for all that it
            was made from.
        folder: keep them here instead.

    Raises:
        EgjaxError: what is in the folder was made from another model, tokenizer, table or setting.
    """
    made_from = stored.Fingerprint(
        model=stored.fingerprint({name: model.params for name, model in models.items()}),
        tokenizer=fingerprint([model.tokenizer for model in models.values()]),
        data=stored.fingerprint(table),
        settings=fingerprint([kind, settings]),
    )
    folder = folder or run / "stored" / f"{kind}-{fingerprint(made_from)[:12]}"
    rows, sharding = config.batch // config.layout.accumulate, batch_sharding(mesh_for(config))
    return stored.cached(
        folder,
        lambda: stored.compute(fn, params, table, rows, sharding),
        num_rows(table),
        made_from,
    )


def gathered(params: Any) -> Any:
    """Parameters for a writer that writes alone: whole on the host of process 0 if they lie on the
    devices of several. All processes call it; one array at a time is on the other hosts."""
    if hosts.count() == 1:
        return params

    def one(x: jax.Array) -> Any:
        value = multihost_utils.process_allgather(x, tiled=True)
        return value if hosts.index() == 0 else None

    return jax.tree.map(one, params)


def figures(done: Done, stage: str) -> list[Figure]:
    """What a training stage logged last: losses, accuracies, norms, rate."""
    rows = [json.loads(line) for line in (done.path / METRICS).read_text().splitlines()]
    last, count = rows[-1], rows[-1]["step"]
    units = {"steps_per_second": "1/s", "tokens_per_second": "tokens/s"}
    units |= dict.fromkeys(("accuracy", "teacher_accuracy", "mfu"), "fraction")
    return [
        Figure(f"{stage}_{name}", value, units.get(name, "nats" if "loss" in name else ""), n=count)
        for name, value in last.items()
        if name != "step"
    ]


def curve(path: Path, quantity: str) -> tuple[Sequence[int], Sequence[float]]:
    """Steps and values of a logged quantity of a training stage."""
    rows = [json.loads(line) for line in (path / METRICS).read_text().splitlines()]
    rows = [row for row in rows if quantity in row]
    return [row["step"] for row in rows], [row[quantity] for row in rows]
