"""What would the paper's full setting take on a pod, in hours and dollars? No pod was had.

    for name in $(python -m experiments.pod --list); do python -m experiments.pod --plan $name; done
    python -m experiments.pod                    # writes docs/pod.md from the plans

Plans are those of `experiments.capacity`, compiled by the chips' own compilers (`pip install
'egjax[tpu]'` or `'egjax[cuda]'`), one process each so that host memory is that of one plan. They
are kept in `experiments/results/capacity`. Time is step time × steps; prices are assumptions, see
the options.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from egjax.capacity.chips import CHIPS
from egjax.capacity.plan import EFFICIENCY, LINK_EFFICIENCY
from egjax.errors import EgjaxError
from experiments import capacity
from experiments.common import atomic_path, note, run_main

__all__ = ["CASES", "Assumptions", "Config", "page"]

_GIB = 2**30


def _plan(stage: Any, model: str, topology: str, **changes: Any) -> capacity.Config:
    return capacity.Config(stage=stage, model=model, topology=topology, compile="always", **changes)


_DECODE: dict[str, Any] = {"length": 2048, "new_tokens": 128, "batch": 64}
_CARD: dict[str, Any] = {"length": 512, "new_tokens": 96, "batch": 8}
CASES: dict[str, capacity.Config] = {
    "distill-70b-v5p-64": _plan("distill", "70b", "v5p:4x4x4", model_parallel=1),
    "distill-70b-v5e-256": _plan("distill", "70b", "v5e:16x16", model_parallel=4),
    "dpo-70b-v5p-64": _plan("dpo", "70b", "v5p:4x4x4", model_parallel=1),
    "decode-405b-v5p-64": _plan("decode", "405b", "v5p:4x4x4", model_parallel=8, **_DECODE),
    "decode-405b-v6e-64": _plan("decode", "405b", "v6e:8x8", model_parallel=8, **_DECODE),
    "decode-405b-int8-v6e-32": _plan(
        "decode", "405b", "v6e:4x8", model_parallel=8, int8=True, **_DECODE
    ),
    "decode-405b-int8-v5p-8": _plan(
        "decode", "405b", "v5p:2x2x2", model_parallel=8, int8=True, **_DECODE
    ),
    "sft-8b-v5e-16": _plan("sft", "8b", "v5e:4x4", batch=16, model_parallel=1),
    "dpo-8b-v5e-16": _plan("dpo", "8b", "v5e:4x4", batch=16, model_parallel=4, accumulate=4),
    "distill-8b-v5e-16": _plan("distill", "8b", "v5e:4x4", batch=16, model_parallel=4),
    "decode-8b-v5e-16": _plan("decode", "8b", "v5e:4x4", model_parallel=8, **_DECODE),
    "distill-1b-v5e-8": _plan("distill", "1b", "v5e:2x4", expert="1b", batch=8, model_parallel=1),
    "sft-8b-bf16-v5e-8": _plan(
        "sft", "8b", "v5e:2x4", batch=8, model_parallel=4, accumulate=4, master="bfloat16"
    ),
    "decode-8b-v5e-8": _plan("decode", "8b", "v5e:2x4", model_parallel=2, **_DECODE),
    # Preset `card`: a 1B is grounded and an 8B steered.
    "sft-1b-h200-1": _plan("sft", "1b", "h200:1", batch=16, length=2048, accumulate=2),
    "decode-8b-h200-1": _plan("decode", "8b", "h200:1", expert="1b", **_CARD),
    "sft-1b-bf16-rtx4090-1": _plan(
        "sft", "1b", "rtx4090:1", batch=16, length=2048, accumulate=4, master="bfloat16"
    ),
    "decode-8b-int8-rtx4090-1": _plan(
        "decode", "8b", "rtx4090:1", expert="1b", int8=True, **_CARD | {"batch": 4}
    ),
    "distill-1b-h200-1": _plan("distill", "1b", "h200:1", expert="1b", batch=8, length=2048),
    "sft-8b-h100-8": _plan("sft", "8b", "h100:8", batch=16, model_parallel=1),
    "dpo-8b-h100-8": _plan("dpo", "8b", "h100:8", batch=16, model_parallel=1),
    "distill-8b-h100-8": _plan("distill", "8b", "h100:8", batch=16, model_parallel=1),
    "decode-70b-h100-8": _plan("decode", "70b", "h100:8", model_parallel=8, **_DECODE),
}
"""The committed plans, by name."""
_QUESTIONS: dict[str, tuple[str, ...]] = {
    "70B distillation with 8B πᴱ and πᴺ, length 4,096, on 64 v5p chips": ("distill-70b-v5p-64",),
    "the same on 256 v5e chips": ("distill-70b-v5e-256",),
    "405B π̄ decoding with 8B experts on 64 chips of v5p or v6e": (
        "decode-405b-v5p-64",
        "decode-405b-v6e-64",
    ),
    "the same in int8 on fewer": ("decode-405b-int8-v6e-32", "decode-405b-int8-v5p-8"),
    "8B SFT, DPO, distillation and decoding on 16 v5e chips": (
        "sft-8b-v5e-16",
        "dpo-8b-v5e-16",
        "distill-8b-v5e-16",
        "decode-8b-v5e-16",
    ),
    "a single host of 8 v5e chips: 1B distillation, 8B SFT in bfloat16, 8B decoding": (
        "distill-1b-v5e-8",
        "sft-8b-bf16-v5e-8",
        "decode-8b-v5e-8",
    ),
    "one H200: a 1B grounded, an 8B steered (preset `card`), 1B distillation": (
        "sft-1b-h200-1",
        "decode-8b-h200-1",
        "distill-1b-h200-1",
    ),
    "the first two on one RTX 4090, in bfloat16 and int8": (
        "sft-1b-bf16-rtx4090-1",
        "decode-8b-int8-rtx4090-1",
    ),
    "a host of 8 H100: 8B SFT, DPO, distillation; 70B π̄ decoding": (
        "sft-8b-h100-8",
        "dpo-8b-h100-8",
        "distill-8b-h100-8",
        "decode-70b-h100-8",
    ),
}
"""What one wants to know of a pod, and the plans that tell."""


@dataclass(frozen=True)
class Assumptions:
    """What the hours and dollars rest on, beside the plans."""

    tasks: int = 1659
    """Tasks of the collection."""
    simulations: int = 10_000
    """Simulations a task, as in E2WM; a task that is solved sooner takes less."""
    core_seconds: float = 0.013
    """Of one CPU core for one simulation: some 100 s on two busy hyperthreads for a shard of 240
    tasks of 64 simulations, labels included (README, experience at scale)."""
    core_dollars: float = 0.05
    """A CPU core-hour, USD."""
    samples: int = 32
    """Training samples a task: plans, relabelled plans, questions."""
    sample_tokens: int = 256
    """Tokens of a sample."""
    epochs: int = 3
    """Passes of SFT and of distillation over the samples."""
    pairs: int = 8
    """Preference pairs a task, one pass."""
    pair_tokens: int = 512
    """Tokens of one side of a pair: prompt and plan, not packed."""
    generations: int = 607
    """Items of the benchmark's generation tasks."""
    beams: int = 4
    """Rows that are decoded for each."""
    options: int = 1628 * 4 * 2
    """Rows that are read for the questions: 1,628 items, four options, with and without prompt."""
    overhead_hours: float = 0.5
    """A stage's start, weights, compilation and checkpoints, during which all chips are paid."""
    prices: Mapping[str, float] = field(
        default_factory=lambda: {name: CHIPS[name].dollars for name in ("v5e", "v5p", "v6e")}
    )
    """USD for a chip-hour, on demand."""


@dataclass(frozen=True)
class Config:
    """What to do."""

    plan: str | None = None
    """Name of a case to compile; its plan is kept in `results`."""
    hlo: Path | None = None
    """File for the text of its compiled program."""
    list: bool = False
    """Print the names of the cases."""
    results: Path = Path("experiments/results/capacity")
    """Folder of plans."""
    page: Path = Path("docs/pod.md")
    """What is written from them."""
    assumptions: Assumptions = field(default_factory=Assumptions)
    """Of the hours and dollars."""


def page(plans: Mapping[str, dict], assumptions: Assumptions) -> str:
    """The page in Markdown.

    Args:
        plans: records of `experiments.capacity`, by name; cases without one are by formula.
        assumptions: see there.
    """
    every = {name: plans.get(name) or _by_formula(name) for name in CASES}
    parts = [
        _INTRODUCTION.format(
            count=len(plans),
            all=len(CASES),
            others="The others are by formula, marked as such. " if len(plans) < len(CASES) else "",
        ),
        _answers(every),
        _HEADING,
        _table(_PLAN_HEAD, [_plan_row(name, record) for name, record in every.items()]),
        *_kernels(every),
        _reading(every),
        "## The paper's full setting, in hours and dollars",
        _table(_COST_HEAD, _cost_rows(plans, assumptions)),
        _assumed(plans, assumptions),
    ]
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = """# What a pod run would take

**Nothing on this page was run on a TPU or GPU.** {count} of the {all} plans below were compiled \
ahead of time by the chips' own compilers on a CPU, `libtpu` for TPUs and XLA's for NVIDIA GPUs: \
whether the step fits, its memory and what its chips send each other are the compiler's. {others}\
FLOPs, step times and dollars are arithmetic on top of either, with the assumptions named. The \
compiled function is the one that training and decoding call (`egjax.train.layout.placed_step`, \
`egjax.lm.generate.generate`), with abstract arrays.

Written by `python -m experiments.pod`; plan your own with `python -m experiments.capacity --help`.

## In short"""

_HEADING = """## Does it fit?

GiB a chip; *time* of a step from "everything overlaps, products at their peak" to "nothing \
overlaps, products at a share of it"; MFU counts neither recomputation nor what the causal mask \
discards. A step of decoding reads a batch of prompts and decodes all new tokens. *Compiled in*: \
seconds by the clock of a machine of two hyperthreads that other jobs shared, and at times stopped \
this one on; in brackets seconds of CPU, which is what it takes on a machine of its own. The limit \
of a GPU is what is sold; JAX takes three quarters unless XLA_PYTHON_CLIENT_MEM_FRACTION says \
otherwise."""

_PLAN_HEAD = (
    "plan", "mesh data × model", "rows × tokens", "weights", "optimizer", "caches",
    "temporaries", "total of limit", "fits", "step, s", "MFU, %", "sent a chip, GB",
    "compiled in (CPU), host memory; commit",
)  # fmt: skip


def _plan_row(name: str, record: dict) -> Sequence[str]:
    plan, config = record["plan"], record["config"]
    kinds = plan["memory"]
    over = plan["total"] - plan["limit"]
    fits = "yes" if plan["fits"] else f"**no**, by {over / _GIB:.1f}"
    best, expected = record["mfu"]["best"], record["mfu"]["expected"]
    compiled = "formula"
    if plan["method"] == "compiled":
        compiled = (
            f"{plan['compile_s']:.0f} s ({plan['compile_cpu_s']:.0f} s), "
            f"{plan['host_memory'] / _GIB:.1f} GiB; {record['made']['commit'][:7]}"
        )
    time = f"{plan['best_s']:.2g}–{plan['expected_s']:.2g}"
    return (
        name,
        f"{plan['data']} × {plan['model']}",
        f"{config['batch']} × {config['length']:,}",
        *(f"{kinds.get(kind, 0) / _GIB:.1f}" for kind in ("weights", "optimizer", "caches")),
        f"{kinds['activations'] / _GIB:.1f}",
        f"{plan['total'] / _GIB:.1f} of {plan['limit'] / _GIB:.1f}",
        fits,
        time if plan["fits"] else "",
        f"{100 * expected:.0f}–{100 * best:.0f}" if plan["fits"] else "",
        f"{plan['collective_bytes'] / 1e9:,.0f}" if plan["fits"] else "",
        compiled,
    )


def _answers(plans: Mapping[str, dict]) -> str:
    lines = []
    for question, names in _QUESTIONS.items():
        told = []
        for name in names:
            plan = plans[name]["plan"]
            free = (plan["limit"] - plan["total"]) / _GIB
            verdict = f"fits, {free:.1f} GiB free" if free >= 0 else f"**{-free:.1f} GiB too much**"
            told.append(f"{name} {verdict} ({_method(plan)})")
        lines.append(f"- {question}: {'; '.join(told)}.")
    made = [record["plan"] for record in plans.values() if record["plan"]["compile_cpu_s"]]
    if made:
        seconds = max(plan["compile_cpu_s"] for plan in made)
        memory = max(plan["host_memory"] for plan in made) / _GIB
        lines.append(
            f"- To compile one took at most {seconds:.0f} s of CPU and {memory:.1f} GiB of memory."
        )
    return "\n".join(lines)


def _method(plan: Mapping[str, Any]) -> str:
    return "compiled" if plan["method"] == "compiled" else "by formula"


def _reading(plans: Mapping[str, dict]) -> str:
    lines = ["What the planner advises:", ""]
    for name, record in plans.items():
        lines += [f"- {name}: {line}" for line in record["plan"]["advice"]]
    return "\n".join(lines) if len(lines) > 2 else ""


_COST_HEAD = (
    "stage", "plan", "memory and links", "amount", "steps", "hours (best–expected)",
    "USD (best–expected)",
)  # fmt: skip


def _cost_rows(plans: Mapping[str, dict], a: Assumptions) -> list[Sequence[str]]:
    core_hours = a.tasks * a.simulations * a.core_seconds / 3600
    dollars = core_hours * a.core_dollars
    rows: list[Sequence[str]] = [
        ("collection", "CPU cores", "rate measured", f"{a.tasks:,} tasks × {a.simulations:,} "
         "simulations", "", f"{core_hours:.0f} core-hours", f"{dollars:.2f}")
    ]  # fmt: skip
    tokens = a.tasks * a.samples * a.sample_tokens * a.epochs
    pair_tokens = a.tasks * a.pairs * 2 * a.pair_tokens
    total = [dollars, dollars]
    stages = [
        ("SFT of πᴱ", "sft-8b-v5e-16", tokens, "tokens"),
        ("distillation", "distill-70b-v5p-64", tokens, "tokens"),
        ("DPO", "dpo-70b-v5p-64", pair_tokens, "tokens"),
        ("π̄ of 405B, plans and paths", "decode-405b-v6e-64", a.generations * a.beams, "rows"),
        ("π̄ of 405B, questions", "decode-405b-v6e-64", a.options, "rows, read only"),
    ]
    for stage, name, amount, unit in stages:
        record = plans.get(name) or _by_formula(name)
        steps, times = _steps(record, amount, unit)
        plan = record["plan"]
        hours = [steps * t / 3600 + a.overhead_hours for t in times]
        price = a.prices[plan["topology"].split(":")[0]]
        cost = [h * plan["chips"] * price for h in hours]
        total = [x + y for x, y in zip(total, cost)]
        reading = unit.endswith("read only")
        known = "by formula" if reading or name not in plans else _method(plan)
        rows.append(
            (stage, name, known, f"{amount:,} {unit}", f"{steps:,}",
             f"{hours[0]:.2f}–{hours[1]:.2f}", f"{cost[0]:,.0f}–{cost[1]:,.0f}")
        )  # fmt: skip
    rows.append(("**all**", "", "", "", "", "", f"**{total[0]:,.0f}–{total[1]:,.0f}**"))
    return rows


def _kernels(every: Mapping[str, dict]) -> list[str]:
    """What the kernels of the GPU plans are, if there are such plans."""
    rows = []
    for name, record in every.items():
        found = record["plan"].get("kernels")
        if found:
            what = "a token" if record["plan"]["stage"] == "decode" else "a step"
            moved, least = found["bytes"] / 1e9, found["seconds"] * 1e3
            rows.append((name, what, f"{found['count']:,}", f"{moved:,.1f}", f"{least:,.1f}"))
    if not rows:
        return []
    head = ("plan", "of", "kernels", "bytes moved, GB", "at least, ms")
    return [
        "Kernels of the GPU programs as compiled (`egjax.capacity.kernels`), a chip; *at least*: "
        "each at the peak or the bandwidth, whichever takes longer, links left out. On several "
        "GPUs a decoder scans its stacked layers, and copies each before it multiplies.",
        _table(head, rows),
    ]


def _by_formula(name: str) -> dict:
    config = replace(CASES[name], compile="never")
    return json.loads(json.dumps(capacity.record(config, capacity.plan_of(config))))


def _steps(record: dict, amount: int, unit: str) -> tuple[int, list[float]]:
    """Steps of a plan for so much work, and the seconds of one at best and as expected."""
    plan, config = record["plan"], record["config"]
    per_step = config["batch"]
    if unit == "tokens":
        per_step *= config["length"] * (2 if config["stage"] == "dpo" else 1)
    times = [plan["best_s"], plan["expected_s"]]
    if unit.endswith("read only"):
        # The same batch with a single new token, by formula.
        single = replace(
            CASES["decode-405b-v6e-64"], **config | {"new_tokens": 1, "compile": "never"}
        )
        reading = capacity.plan_of(single)
        times = [reading.best_s, reading.expected_s]
    return -(-amount // per_step), times


def _assumed(plans: Mapping[str, dict], a: Assumptions) -> str:
    made = {r["made"]["commit"][:7] for r in plans.values() if r["made"]["commit"]}
    versions = {f"{k} {v}" for r in plans.values() for k, v in r["made"]["versions"].items()}
    lines = [
        "Assumptions:",
        "",
        f"- The paper gives no token counts. Here: {a.samples} samples of {a.sample_tokens} tokens "
        f"a task, {a.epochs} epochs; {a.pairs} pairs a task of {a.pair_tokens} tokens a side. "
        "Steps are counted by tokens at the plans' length.",
        f"- Collection by `experiments.collect` on CPU cores, {a.core_seconds * 1000:.0f} ms of a "
        f"core for a simulation (README, experience at scale), all {a.simulations:,} simulations "
        f"used, {a.core_dollars:.2f} USD a core-hour.",
        f"- Benchmark: {a.generations} generations × {a.beams} beams; {a.options:,} rows read for "
        "the questions, each as long as the plan's prompt.",
        f"- A chip-hour on demand: {', '.join(f'{k} {v:.2f} USD' for k, v in a.prices.items())} "
        "(Google Cloud's list for the United States in 2025 as remembered, not looked up). "
        f"{a.overhead_hours} h a stage for start, weights, compilation and checkpoints.",
        f"- Expected time: matrix products at {EFFICIENCY:.0%} of the peak, collectives at "
        f"{LINK_EFFICIENCY:.0%} of a chip's links, no overlap. Best: all of it at the peak, all "
        "overlapping. Neither was measured.",
        "- Memory traffic and FLOPs are formulas (`egjax.capacity.formula`), since XLA counts a "
        "loop's body once; collectives are counted in the compiled program with loops unrolled.",
        f"- Plans made at commit {', '.join(sorted(made)) or 'unknown'} with "
        f"{', '.join(sorted(versions))}.",
    ]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(config: Config) -> int:
    if config.list:
        print("\n".join(CASES))
        return 0
    if config.plan is not None:
        if config.plan not in CASES:
            raise EgjaxError(
                f"no case {config.plan!r}", where="--plan", remedy=f"one of {', '.join(CASES)}"
            )
        out = config.results / f"{config.plan}.json"
        capacity.main(replace(CASES[config.plan], out=out, hlo=config.hlo))
        return 0
    found = {name: config.results / f"{name}.json" for name in CASES}
    plans = {n: json.loads(p.read_text(encoding="utf-8")) for n, p in found.items() if p.exists()}
    if not plans:
        raise EgjaxError("no plans", where=str(config.results), remedy="make them with --plan")
    with atomic_path(config.page) as part:
        part.write_text(page(plans, config.assumptions), encoding="utf-8")
    note(f"{config.page}: {len(plans)} of {len(CASES)} plans")
    return 0


if __name__ == "__main__":
    run_main(main, Config)
