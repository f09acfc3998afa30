"""How fast is a training step, and what does computing a shared prompt once save?

    python -m experiments.bench_train --peer-python PYTHON       (an interpreter with google-tunix)
    python -m experiments.bench_train --prompt 40 --completion 8 --layers 2 --repeats 1   # a minute

`dpo_step` is a step of standard DPO (forward of the reference, forward and backward of the policy,
AdamW) on pairs with long shared prompts, the prompt computed once; in turns with it, in one run,
the same with the prompt computed for either answer (`dpo_step/two_passes`), and Tunix's DPOTrainer
on the same shapes (`dpo_step/tunix`): ratio = ours ÷ theirs; `dpo_step_cpu` are seconds on the
processor, which other jobs disturb less than the clock's. `sft_step` and `distill_step` (three
frozen models of the same size) read packed rows.

On two hyperthreads of an AMD EPYC that did nothing else, two pairs: `dpo_step` 0.48 and 0.54 of
Tunix's by the clock (experiments/results/train).

Each step comes with tokens a second, FLOP/s by formula (`egjax.train.flops`) and `mfu`, their share
of the matrix rate, which is measured in the same run with square products of the same type. For a
GPU: `--dtype bfloat16 --width 2048 --layers 16 --mlp 8192 --heads 32 --kv-heads 8 --vocabulary
128256 --length 2048 --rows 8 --pairs 8 --prompt 1792 --completion 256 --matrix 8192 --remat
selective` is a Llama 3.2 1B.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import jax
import numpy as np
import tyro

from egjax.errors import EgjaxError
from egjax.evals.intervals import Figure
from egjax.evals.manifest import describe, write_atomic
from egjax.lm.config import LlamaConfig
from egjax.lm.model import Remat
from egjax.lm.params import count, init
from egjax.losses import dpo
from egjax.train.data import Pair, Sample, pack, pad_pairs, share_prompts
from egjax.train.flops import matrix_rate, step_work
from egjax.train.layout import Layout, cast
from egjax.train.objectives import (
    Frozen,
    PairLogps,
    distill_to_ratio,
    next_token,
    preference_with_initial,
)
from egjax.train.optim import OptimConfig, make_optimizer
from egjax.train.step import LossFn, init_state, make_train_step
from experiments.common import emit, note, run_main
from experiments.models import apply_of

_PEER = Path(__file__).with_name("bench_train_peer.py")
Timed = Callable[[], tuple[float, float]]
"""Takes a step; its seconds by the clock, and those of all threads on the processor."""


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults are a model of 30M parameters."""

    steps: tuple[Literal["dpo", "sft", "distill"], ...] = ("dpo", "sft", "distill")
    """What to measure."""
    width: int = 512
    """Width of the model."""
    layers: int = 9
    """Its layers."""
    mlp: int = 1408
    """Width of its MLP."""
    heads: int = 8
    """Query heads."""
    kv_heads: int = 4
    """Key and value heads."""
    vocabulary: int = 8192
    """Tokens."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the arithmetic; masters and optimiser are float32."""
    remat: Remat = "none"
    """What of a layer is kept for the backward pass. By count of a GPU's kernels (LOG.md) a step
    that computes again what is cheap (selective) takes less time than one that keeps all."""
    pairs: int = 4
    """Preference pairs a step."""
    prompt: int = 448
    """Tokens of a prompt."""
    completion: int = 64
    """Tokens of an answer."""
    rows: int = 4
    """Packed rows a step of SFT and distillation."""
    length: int = 512
    """Tokens a row."""
    matrix: int = 1024
    """Rows and columns of the matrices whose products give the rate."""
    repeats: int = 5
    """Timed steps of each kind, after one that is not timed."""
    peer_python: Path | None = None
    """Interpreter that has google-tunix."""
    seed: int = 0
    """Of weights and tokens."""
    out: Path | None = None
    """Also write the figures there, with commit, versions and machine."""
    json: Annotated[bool, tyro.conf.arg(help="print figures as JSON lines")] = False


def main(config: Config) -> None:
    model = _model(config)
    rate = matrix_rate(config.matrix, config.dtype, repeats=config.repeats)
    peer: dict[str, str] = {}
    figures: list[Figure] = []

    def found(*rows: Figure) -> None:
        emit(*rows, json=config.json)
        figures.extend(rows)

    found(
        Figure("parameters", count(model), "count", n=1),
        Figure(f"matrix_rate/{config.dtype}", rate / 1e9, "GFLOP/s", n=config.repeats),
    )
    if "dpo" in config.steps:
        found(*_dpo(config, model, rate, peer))
    for name in ("sft", "distill"):
        if name in config.steps:
            found(*_packed(name, config, model, rate))
    if config.out is not None:
        text = json.dumps(_record(config, figures, peer), indent=1, ensure_ascii=False)
        write_atomic(config.out, text + "\n")


def _record(config: Config, figures: list[Figure], peer: dict[str, str]) -> dict[str, Any]:
    """The figures with what they were made from."""
    made = dataclasses.asdict(describe(seeds=[config.seed]))
    of = ("commit", "dirty", "started", "python", "versions", "hardware")
    skip = ("peer_python", "out", "json")
    return {
        "config": {name: value for name, value in vars(config).items() if name not in skip},
        "figures": [json.loads(figure.line()) for figure in figures],
        "made": {name: made[name] for name in of} | {"peer": peer},
    }


def _model(config: Config) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=config.vocabulary,
        hidden_size=config.width,
        intermediate_size=config.mlp,
        num_layers=config.layers,
        num_heads=config.heads,
        num_kv_heads=config.kv_heads,
        head_dim=config.width // config.heads,
        max_seq_len=max(config.length, config.prompt + config.completion),
        dtype=config.dtype,
    )


def _stepper(config: Config, model: LlamaConfig, loss: LossFn, batch: Any, frozen: Any) -> Timed:
    """Compiles and warms up a step."""
    tx = make_optimizer(OptimConfig(learning_rate=1e-4), 1000)
    step = make_train_step(loss, tx)
    state = init_state(cast(init(jax.random.key(config.seed), model), "float32"), tx)
    key, batch = jax.random.key(config.seed), jax.device_put(batch)

    def run() -> tuple[float, float]:
        nonlocal state
        begin = time.perf_counter(), time.process_time()
        state, metrics = step(state, batch, key, frozen)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - begin[0], time.process_time() - begin[1]

    run()
    return run


def _alternate(repeats: int, timed: dict[str, Timed]) -> dict[str, tuple[float, float]]:
    """Median seconds of each, by the clock and on the processor, taken in turns."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in timed}
    for _ in range(repeats):
        for name, run in timed.items():
            seconds[name].append(run())
    return {
        name: (statistics.median(clock), statistics.median(cpu))
        for name, (clock, cpu) in ((n, zip(*times)) for n, times in seconds.items())
    }


def _rates(name: str, config: Config, work: Any, seconds: float, rate: float) -> list[Figure]:
    n = config.repeats
    return [
        Figure(f"{name}/tokens_per_second", work.tokens / seconds, "tokens/s", n=n),
        Figure(f"{name}/flops", work.flops / seconds / 1e9, "GFLOP/s", n=n),
        Figure(f"{name}/mfu", work.flops / seconds / rate, "fraction", n=n),
    ]


def _standard(p: PairLogps):
    return dpo(p.chosen, p.rejected, p.ref_chosen, p.ref_rejected, beta=0.1)


def _dpo(config: Config, model: LlamaConfig, rate: float, versions: dict[str, str]) -> list[Figure]:
    """Figures of the DPO step; fills in the peer's versions."""
    rng = np.random.default_rng(config.seed)

    def text(length: int) -> list[int]:
        return rng.integers(3, config.vocabulary, length).tolist()

    sizes = (config.prompt, config.completion, config.completion)
    pairs = [Pair(*map(text, sizes)) for _ in range(config.pairs)]
    loss = preference_with_initial(
        apply_of(model, Layout(remat=config.remat), heads=True), _standard, kl_weight=0.0
    )
    frozen = init(jax.random.key(config.seed), model)
    shared = share_prompts(pairs)
    twice = pad_pairs(pairs, config.prompt + config.completion - 1)
    with _peer(config, model, versions) as peer:
        timed = {
            "shared": _stepper(config, model, loss, shared, frozen),
            "two_passes": _stepper(config, model, loss, twice, frozen),
        }
        if peer is not None:
            timed["tunix"] = peer
        medians = _alternate(config.repeats, timed)
    ours = medians.pop("shared")
    work = step_work(model, [model])(shared)
    rows = [
        Figure(f"{row}/{name}", ours[i], "s", n=config.repeats, peer=name, peer_value=theirs[i])
        for i, row in enumerate(("dpo_step", "dpo_step_cpu"))
        for name, theirs in medians.items()
    ]
    return rows + _rates("dpo_step", config, work, ours[0], rate)


def _packed(name: str, config: Config, model: LlamaConfig, rate: float) -> list[Figure]:
    rng = np.random.default_rng(config.seed)
    # Two sequences a row, of one quarter and three quarters.
    lengths = [config.length // 4 + 1, config.length - config.length // 4 + 1]
    samples = [
        Sample(rng.integers(3, config.vocabulary, length).tolist(), [True] * length)
        for _ in range(config.rows)
        for length in lengths
    ]
    batch, apply = pack(samples, config.length), apply_of(model, Layout(remat=config.remat))
    if name == "sft":
        loss, frozen, others = next_token(apply), None, []
    else:
        loss = distill_to_ratio(apply, apply, apply)
        frozen = Frozen(*(init(jax.random.key(config.seed + i), model) for i in range(3)))
        others = [model] * 3
    run = _stepper(config, model, loss, batch, frozen)
    seconds, _ = _alternate(config.repeats, {name: run})[name]
    work = step_work(model, others)(batch)
    return [
        Figure(f"{name}_step", seconds, "s", n=config.repeats),
        *_rates(f"{name}_step", config, work, seconds, rate),
    ]


@contextlib.contextmanager
def _peer(config: Config, model: LlamaConfig, versions: dict[str, str]) -> Iterator[Timed | None]:
    """A process of Tunix that takes steps when it is asked to; None without an interpreter."""
    if config.peer_python is None:
        yield None
        return
    names = ("num_layers", "vocab_size", "hidden_size", "intermediate_size")
    names += ("num_heads", "num_kv_heads", "head_dim")
    shapes = {name: getattr(model, name) for name in names}
    shapes |= {name: getattr(config, name) for name in ("pairs", "prompt", "completion")}
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "said").open("w+") as said:
        path = Path(folder) / "shapes.json"
        path.write_text(json.dumps(shapes))
        try:
            process = subprocess.Popen(
                [str(config.peer_python), str(_PEER), str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,  # not a pipe, which would fill up and stop it
                text=True,
            )
        except OSError as error:
            raise EgjaxError(
                f"cannot be started: {error.strerror}", where=str(config.peer_python)
            ) from error
        try:
            note("Tunix compiles")
            hello = _answer(process, config, said)
            versions.update(hello["versions"])
            found = hello["parameters"]
            if found != count(model):
                raise EgjaxError(f"Tunix's model has {found} parameters, ours {count(model)}")

            def step() -> tuple[float, float]:
                assert process.stdin is not None
                process.stdin.write("step\n")
                process.stdin.flush()
                answer = _answer(process, config, said)
                return answer["seconds"], answer["cpu_seconds"]

            yield step
        finally:
            process.kill()
            process.communicate()


def _answer(process: subprocess.Popen, config: Config, said: TextIO) -> dict[str, Any]:
    """The peer's next line of JSON; libraries print others."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    said.seek(0)
    last = said.read().strip().splitlines()[-1:] or ["without a word"]
    raise EgjaxError(
        f"the peer ended: {last[0]}",
        where=str(config.peer_python),
        remedy="it needs google-tunix: pip install google-tunix",
    )


if __name__ == "__main__":
    run_main(main, Config)
