"""Does it fit, and how long does a step take, on chips that are not at hand?

    python -m experiments.capacity --stage distill --model 70b --expert 8b --topology v5p:4x4x4
    python -m experiments.capacity --stage decode --model 405b --topology v6e:8x8 --length 2048
    python -m experiments.capacity --stage sft --model 1b --topology rtx4090:1 --batch 4

The very step that training runs is compiled ahead of time by the chips' own compiler, without the
chips: libtpu for TPUs (`pip install 'egjax[tpu]'`, one process at a time), XLA for NVIDIA GPUs
(`'egjax[cuda]'`). Memory, fit and collectives are the compiler's, FLOPs and memory traffic a
formula's. Of a GPU's program its kernels are counted, too (`kernels`, `kernel_bytes`, and
`kernel_seconds`, which they take at least, at the peaks): of a step, or of one decoded token.
Where the compiler is missing all is by formula, and the output says so. Topologies count
chips. Of a GPU's memory JAX takes three quarters unless XLA_PYTHON_CLIENT_MEM_FRACTION says
otherwise. Expected: minutes and under 4 GiB of host memory at 405B.
"""

from __future__ import annotations

import json as jsonlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from egjax.capacity.chips import Chip, parse
from egjax.capacity.compiled import has_compiler, remedy
from egjax.capacity.plan import Plan, compiled_plan, formula_plan, meshes
from egjax.capacity.presets import preset
from egjax.capacity.stages import Case
from egjax.errors import EgjaxError
from egjax.evals.intervals import Figure
from egjax.evals.manifest import describe
from egjax.lm.model import Remat
from egjax.train.layout import Layout
from experiments.common import atomic_path, emit, note, run_main

__all__ = ["Config", "plan_of", "record"]

_GIB = 2**30
_BOUND = {"flops": "arithmetic", "memory": "memory bandwidth", "links": "the links between chips"}
_ATTENTION = {"tpu": "splash", "gpu": "cudnn"}
"""What `"auto"` takes there; here it would take what is best for a CPU."""


@dataclass(frozen=True)
class Config:
    """What is to run, and where."""

    stage: Literal["sft", "dpo", "distill", "decode"] = "sft"
    """sft, dpo (π₀ beside the policy), distill (three frozen models beside the student), decode
    (from π̄, three models)."""
    model: str = "8b"
    """Llama preset: 1b, 8b, 70b or 405b; πᴸ of distill and decode."""
    expert: str = "8b"
    """Preset of πᴱ and πᴺ."""
    batch: int = 64
    """Rows a step; pairs of dpo."""
    length: int = 4096
    """Tokens a row; prompt and completion when decoding."""
    new_tokens: int = 128
    """Of these, decoded."""
    topology: str = "v5e:4x4"
    """Chips, e.g. v5e:16x16, v5p:4x4x4, v6e:8x8, h100:8, rtx4090:1."""
    model_parallel: int | None = None
    """Chips that share each matrix; None takes the fewest that fit by formula."""
    remat: Remat = "full"
    """What of a layer is kept for the backward pass, from all of it to its input alone."""
    chunked: bool = True
    """Losses in chunks."""
    master: Literal["float32", "bfloat16"] = "float32"
    """Type of trained weights and of the optimiser's moments."""
    accumulate: int = 1
    """Micro-batches a step."""
    int8: bool = False
    """The matrices of frozen models in eight bits."""
    compile: Literal["auto", "always", "never"] = "auto"
    """By the chips' compiler where there is one (auto), or fail without (always)."""
    out: Path | None = None
    """JSON file for the plan."""
    hlo: Path | None = None
    """File for the text of the compiled program."""
    json: Annotated[bool, tyro.conf.arg(help="print figures as JSON lines")] = False


def plan_of(config: Config) -> Plan:
    """The plan of a configuration."""
    topology = parse(config.topology)
    case = Case(
        config.stage,
        preset(config.model),
        preset(config.expert),
        config.batch,
        config.length,
        config.new_tokens,
        Layout(
            remat=config.remat,
            chunked=config.chunked,
            master=config.master,
            accumulate=config.accumulate,
            attention=_ATTENTION["tpu" if topology.chip.is_tpu else "gpu"],
        ),
        config.int8,
        "tpu" if topology.chip.is_tpu else "gpu",
    )
    ways = meshes(case, topology)
    if config.model_parallel is not None:
        ways = [way for way in ways if way[1] == config.model_parallel]
        if not ways:
            raise EgjaxError(
                f"{config.model_parallel} chips do not share the matrices of this model and batch",
                where="--model-parallel",
                remedy=f"one of {', '.join(str(m) for _, m in meshes(case, topology))}",
            )
    plans = [formula_plan(case, topology, *way) for way in ways]
    first = next((p for p in plans if p.fits), min(plans, key=lambda p: p.total))
    data, model = first.data, first.model
    able = has_compiler(topology.chip)
    if config.compile == "always" and not able:
        raise EgjaxError(
            f"{topology.name} cannot be compiled for here",
            where="--compile",
            remedy=remedy(topology.chip),
        )
    if config.compile == "never" or not able:
        why = (
            "asked for"
            if config.compile == "never"
            else f"no compiler for {topology.chip.name} here"
        )
        note(
            f"by formula ({why}): memory is an estimate; on the plans of docs/pod.md the compilers "
            "wanted 0.8 to 1.3 times its gradients, activations, logits and caches for TPUs, 0.4 "
            "to 1.0 times for GPUs"
        )
        return formula_plan(case, topology, data, model)
    note(f"compiling {config.stage} of {config.model} for {topology.name}, {data} × {model}")
    return compiled_plan(case, topology, data, model, config.hlo)


def record(config: Config, plan: Plan) -> dict:
    """The plan with what it was made from."""
    chip = parse(config.topology).chip
    here = describe(seeds=())
    fields = {
        key: value for key, value in vars(config).items() if key not in ("out", "hlo", "json")
    }
    return {
        "config": fields,
        "plan": plan.to_dict(),
        "mfu": {"expected": plan.mfu(chip.flops), "best": plan.mfu(chip.flops, best=True)},
        "chip": vars(chip),
        "made": {"commit": here.commit, "dirty": here.dirty, "versions": _versions()},
    }


def _versions() -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in ("jax", "jaxlib", "libtpu", "jax-cuda13-pjrt", "nvidia-cudnn-cu13"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def figures(plan: Plan, chip: Chip) -> list[Figure]:
    """The plan as figures."""
    rows = [(f"memory/{kind}", size / _GIB, "GiB") for kind, size in plan.memory.items()]
    rows += [
        ("memory", plan.total / _GIB, "GiB"),
        ("memory_limit", plan.limit / _GIB, "GiB"),
        ("fits", float(plan.fits), "fraction"),
        ("flops", plan.flops, "FLOP"),
        ("memory_traffic", plan.memory_bytes, "B"),
        ("collectives", plan.collective_bytes, "B"),
        ("seconds_best", plan.best_s, "s"),
        ("seconds_expected", plan.expected_s, "s"),
        ("mfu_best", plan.mfu(chip.flops, best=True), "fraction"),
        ("mfu_expected", plan.mfu(chip.flops), "fraction"),
    ]
    if plan.compile_s is not None and plan.host_memory is not None:
        rows += [
            ("compile_seconds", plan.compile_s, "s"),
            ("compile_cpu_seconds", plan.compile_cpu_s or 0.0, "s"),
            ("host_memory", plan.host_memory / _GIB, "GiB"),
        ]
    if plan.kernels is not None:
        rows += [
            ("kernels", plan.kernels["count"], "count"),
            ("kernel_bytes", plan.kernels["bytes"], "B"),
            ("kernel_seconds", plan.kernels["seconds"], "s"),
        ]
    return [Figure(name, value, unit, n=1) for name, value, unit in rows]


def main(config: Config) -> int:
    plan = plan_of(config)
    chip = parse(config.topology).chip
    emit(*figures(plan, chip), json=config.json)
    over = (plan.total - plan.limit) / _GIB
    verdict = f"does not fit: {over:.1f} GiB a chip too much" if over > 0 else "fits"
    free = "" if over > 0 else f", {-over:.1f} GiB a chip free"
    note(
        f"{'compiled' if plan.method == 'compiled' else 'by formula'}, "
        f"mesh data={plan.data}, model={plan.model} of {plan.topology}: {verdict}{free}; "
        f"a step is bound by {_BOUND[plan.bound]}"
    )
    for line in plan.advice:
        note(f"• {line}")
    if plan.note:
        note(f"compiler: {plan.note}")
    if config.out is not None:
        with atomic_path(config.out) as part:
            part.write_text(jsonlib.dumps(record(config, plan), indent=1) + "\n")
    return 0 if plan.fits else 1


if __name__ == "__main__":
    run_main(main, Config)
