"""Do chunked losses need less memory than the plain ones, at what price in time?

    python -m experiments.bench_losses [--memory-only] [--losses sft reverse_kl ...]
    python -m experiments.bench_losses --vocabulary 4096 --width 128 --tokens 256   # seconds
    python -m experiments.bench_losses --compile-for h200:1     # a GPU's programs, without the GPU

Value and gradient (hidden states and unembedding of the student) of each loss, once from all logits
(naive) and once in chunks, in one process, in turns. Rows, ratio = chunked ÷ naive:
`loss_time/LOSS`, median after a warm-up; `loss_temp_memory/LOSS`, what the compiler allots beyond
arguments and results; `loss_gradient_error/LOSS`, largest difference ÷ largest entry. In bfloat16
on a CPU before JAX 0.11 also `loss_temp_memory_beside_gradient/LOSS`, both sides less the bytes of
one unembedding: where logits and gradient share their place, its 16-bit integers are copied to
bfloat16 there. With `--compile-for` instead `loss_least_time/LOSS`: the time of all kernels, each
at the chip's peak (half of it for float32) or its memory's bandwidth (twice that for blocks of less
than 40 MB, which its cache holds), whichever takes longer, without launches; and
`loss_kernels/LOSS`, how many are launched. Nothing is run.
At the default size a run of one form takes 10 to 26 s (one teacher or none 10 to 20) on two CPUs
that do nothing else, and up to 9 GB; `--memory-only` compiles without running.
Expected in float32: time 0.88 to 1.05 of the naive form's, memory 0.016-0.046, gradients equal to
1e-5. In bfloat16: memory 0.012-0.026 from JAX 0.11 on, before 0.12-0.26. Compiled for an H200:
memory 0.01-0.05 in either, least time 1.05-1.28 in float32, 0.74-1.24 in bfloat16.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import Sharding, SingleDeviceSharding

from egjax import losses
from egjax.capacity.chips import Chip, parse
from egjax.capacity.compiled import devices_of, traced_for
from egjax.capacity.kernels import Kernel, kernels
from egjax.errors import EgjaxError
from egjax.evals.intervals import Figure
from egjax.losses import Head, Ratio, Targets
from egjax.losses.blocks import moves_bits
from egjax.train.progress import progress
from experiments.common import emit, run_main

Array = jax.Array
_CLIPPED: dict[str, Any] = {"alpha": 0.8, "clip": 2.0, "plausible": 0.01}
_MIB = 2**20
_CACHED = 40e6
"""Bytes of a kernel that a GPU's cache of 50 MB holds from one kernel to the next."""


class Loss(NamedTuple):
    """One loss in both forms, as mean over tokens (or pairs).

    Attributes:
        models: how many heads it takes, the student's first.
        naive: (student, others, targets) -> float32[].
        chunked: the same, and how many tokens a chunk has.
    """

    models: int
    naive: Callable[[Head, list[Head], Array], Array]
    chunked: Callable[[Head, list[Head], Array, int | None], Array]


def _mean(student: Head, teacher: Any, terms: losses.Terms, chunk: int | None) -> Array:
    count = student.hidden.shape[0]
    weights = jnp.full(count, 1 / count)
    return losses.chunked_loss(student, teacher, weights, terms=terms, tokens=chunk)[0]


def _plain(divergence: Callable[..., Array], terms: losses.Terms) -> Loss:
    return Loss(
        2,
        lambda s, others, _: divergence(s.logits(), others[0].logits()).mean(),
        lambda s, others, _, chunk: _mean(s, others[0], terms, chunk),
    )


def _composed(divergence: Callable[..., Array], terms: losses.Terms, **options: Any) -> Loss:
    def naive(student: Head, others: list[Head], _: Array) -> Array:
        teacher = losses.behaviour_ratio(*(head.logits() for head in others), **options)
        return divergence(student.logits(), teacher).mean()

    return Loss(
        4, naive, lambda s, others, _, chunk: _mean(s, Ratio(*others, **options), terms, chunk)
    )


def _dpo(logps: Array) -> Array:
    """DPO over the tokens as completions of 64, chosen and rejected in turn."""
    sums = logps.reshape(-1, 2, 64).sum(-1)
    return losses.dpo(sums[:, 0], sums[:, 1], sums[:, 0] * 0 - 600.0, sums[:, 1] * 0 - 601.0)[
        0
    ].mean()


_JSD = (losses.generalised_jsd, losses.generalised_jsd_terms)
_REVERSE = (losses.reverse_kl, losses.reverse_kl_terms)
LOSSES: dict[str, Loss] = {
    "sft": Loss(
        1,
        lambda s, _, targets: -losses.token_logps(s.logits(), targets).mean(),
        lambda s, _, targets, chunk: _mean(s, Targets(targets), losses.forward_kl_terms, chunk),
    ),
    "dpo": Loss(
        1,
        lambda s, _, targets: _dpo(losses.token_logps(s.logits(), targets)),
        lambda s, _, targets, chunk: _dpo(losses.chunked_token_logps(s, targets, tokens=chunk)),
    ),
    "reverse_kl": _plain(*_REVERSE),
    "forward_kl": _plain(losses.forward_kl, losses.forward_kl_terms),
    "jsd": _plain(*_JSD),
    "skewed_forward_kl": _plain(losses.skewed_forward_kl, losses.skewed_forward_kl_terms),
    "skewed_reverse_kl": _plain(losses.skewed_reverse_kl, losses.skewed_reverse_kl_terms),
    "reverse_kl_ratio": _composed(*_REVERSE),
    "reverse_kl_ratio_clipped": _composed(*_REVERSE, **_CLIPPED),
    "jsd_ratio": _composed(*_JSD),
    "kl_to_initial": Loss(
        2,
        lambda s, others, _: (
            losses.kl_to_initial(s.logits(), others[0].logits(), jnp.bool_(True)).mean()
            / s.hidden.shape[0]
        ),
        lambda s, others, _, chunk: _mean(s, others[0], losses.reverse_kl_terms, chunk),
    ),
}


@dataclass(frozen=True)
class Config:
    """What to measure."""

    losses: tuple[str, ...] = tuple(LOSSES)
    """Names of losses; all by default."""
    tokens: int = 1024
    """Tokens N, a multiple of 128 for dpo."""
    width: int = 2048
    """Width D of every model."""
    vocabulary: int = 128_256
    """Vocabulary V."""
    chunk: int | None = None
    """Tokens of which a teacher's logits exist at once in the chunked form; the student's as well
    where there are more tokens than the width. None goes by the platform."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of hidden states and unembeddings; sums are float32."""
    repeats: int = 5
    """Timed runs of each form, after one that is not timed."""
    memory_only: bool = False
    """Compile only."""
    compile_for: str | None = None
    """Compile only, for a GPU that is not at hand, e.g. h200:1 (`pip install 'egjax[cuda]'`)."""
    seed: int = 0
    """Of the random inputs."""
    json: Annotated[bool, tyro.conf.arg(help="print figures as JSON lines")] = False


def main(config: Config) -> None:
    unknown = [name for name in config.losses if name not in LOSSES]
    if unknown:
        raise EgjaxError(
            f"no loss named {', '.join(unknown)}",
            where="--losses",
            remedy=f"choose among {', '.join(LOSSES)}",
        )
    if "dpo" in config.losses and config.tokens % 128:
        raise EgjaxError(
            f"{config.tokens} tokens are no pairs of completions of 64",
            where="--tokens",
            remedy="give a multiple of 128",
        )
    place, tracing, chip = None, contextlib.nullcontext(), None
    if config.compile_for is not None:
        topology = parse(config.compile_for)
        if topology.chips > 1 or topology.chip.is_tpu:
            raise EgjaxError(
                f"{topology.name} is not one GPU", where="--compile-for", remedy="e.g. h200:1"
            )
        place, tracing = SingleDeviceSharding(devices_of(topology)[0]), traced_for("gpu")
        chip = topology.chip
    with tracing, progress("losses", len(config.losses)) as advance:
        for done, name in enumerate(config.losses, start=1):
            emit(*measure(name, config, place, chip), json=config.json)
            advance(done, name)


def measure(
    name: str, config: Config, place: Sharding | None = None, chip: Chip | None = None
) -> list[Figure]:
    """The rows of one loss; what is compiled alone with `place`, the description of a device."""
    loss = LOSSES[name]
    forms = {
        "chunked": lambda s, others, targets: loss.chunked(s, others, targets, config.chunk),
        "naive": loss.naive,
    }
    compiled, shapes = {}, jax.eval_shape(lambda: _inputs(loss.models, config))
    if place is not None:
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes
        )
    for form, fn in forms.items():
        compiled[form] = jax.jit(jax.value_and_grad(fn)).lower(*shapes).compile()
    row = partial(_row, name)
    memory = {f: c.memory_analysis().temp_size_in_bytes / _MIB for f, c in compiled.items()}
    figures = [row("loss_temp_memory", memory, "MiB", n=1)]
    if config.dtype == "bfloat16" and jax.default_backend() == "cpu" and not moves_bits():
        gradient = 2 * config.width * config.vocabulary / _MIB
        beside = {form: value - gradient for form, value in memory.items()}
        figures.append(row("loss_temp_memory_beside_gradient", beside, "MiB", n=1))
    if chip is not None:
        programs = {form: kernels(c.as_text() or "") for form, c in compiled.items()}
        least = {form: _least_time(program, chip) for form, program in programs.items()}
        figures.append(row("loss_least_time", least, "s", n=1))
        launched = {form: sum(one.times for one in program) for form, program in programs.items()}
        figures.append(row("loss_kernels", launched, "kernels", n=1))
    if config.memory_only or place is not None:
        return figures
    inputs = jax.block_until_ready(jax.jit(lambda: _inputs(loss.models, config))())
    results = {form: jax.block_until_ready(run(*inputs)) for form, run in compiled.items()}
    error = max(
        float(jnp.abs(ours.astype(jnp.float32) - plain).max() / jnp.abs(plain).max())
        for ours, plain in zip(*(jax.tree.leaves(grads) for _, grads in results.values()))
    )
    del results  # two gradients of the size of the unembedding
    seconds: dict[str, list[float]] = {form: [] for form in compiled}
    for _ in range(config.repeats):
        for form, run in compiled.items():
            begin = time.perf_counter()
            jax.block_until_ready(run(*inputs))
            seconds[form].append(time.perf_counter() - begin)
    medians = {form: statistics.median(times) for form, times in seconds.items()}
    figures.append(row("loss_time", medians, "s", n=config.repeats))
    figures.append(Figure(f"loss_gradient_error/{name}", error, "fraction", n=1, seed=config.seed))
    return figures


def _least_time(program: Sequence[Kernel], chip: Chip) -> float:
    def seconds(kernel: Kernel) -> float:
        cached = kernel.bytes_read + kernel.bytes_written < _CACHED
        return kernel.seconds(chip.flops, chip.bandwidth * (2 if cached else 1))

    return sum(map(seconds, program))


def _row(loss: str, name: str, values: Mapping[str, float], unit: str, n: int) -> Figure:
    return Figure(
        f"{name}/{loss}", values["chunked"], unit, n=n, peer="naive", peer_value=values["naive"]
    )


def _inputs(models: int, config: Config) -> tuple[Head, list[Head], Array]:
    """Heads whose logits have a standard deviation of 2, and targets."""
    dtype = jnp.dtype(config.dtype)
    keys = jax.random.split(jax.random.key(config.seed), models)

    def head(key: Array) -> Head:
        first, second = jax.random.split(key)
        hidden = jax.random.normal(first, (config.tokens, config.width), dtype)
        scale = jnp.asarray(2 * config.width**-0.5, dtype)
        return Head(
            hidden, scale * jax.random.normal(second, (config.width, config.vocabulary), dtype)
        )

    student, *others = [head(key) for key in keys]
    targets = jax.random.randint(keys[0], (config.tokens,), 0, config.vocabulary)
    return student, others, targets


if __name__ == "__main__":
    run_main(main, Config)
