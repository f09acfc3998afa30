"""Is π̄ decoded faster when its small expert drafts, and never slower?

    python -m experiments.bench_decode [--rows 8] [--tokens 32] [--json]
    python -m experiments.bench_decode --large 8b --small 1b --dtype bfloat16    # one GPU

Random models whose π̄ is plain to tell: `agree`: πᴸ and πᴱ prefer the same next token, π̄ takes
nearly every draft; `half`: π̄ takes each second or so; `never`: πᴸ is sure of another token, π̄
takes none. Greedy decoding of the same prompts by the plain three-model loop and by speculation,
in turns in one process; both must give the same tokens. Rows per case: `decode_speed`, tokens a
second by the median of the runs, ratio = speculation ÷ plain; `decode_ratio`, the median of the
ratios of two neighbouring runs, and the least and greatest of them; `decode_cpu_ratio`, the same of
CPU seconds (on a CPU), which other jobs disturb less; `decode_accepted`, share of drafts kept where
all steps draft; `decode_round_cost` (`agree` alone), time of a round in plain steps, against the
formula of `egjax.lm.speculate.round_cost`; `decode_weight_bytes`, bytes of weights that a plain
step multiplies with (not of an embedding that is not the unembedding, too), `decode_cache_bytes`,
of keys and values half-way; `decode_bandwidth`, both by the time of a plain step, ratio = share of
the bandwidth that copying an array reaches in the same run.
`--keep NAME` writes them to experiments/results/decode.
Bars: `decode_ratio` ≥ 1.5 in `agree`, ≥ 0.95 in `never`.
Hardware: two CPU cores, two minutes; a GPU.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from egjax.errors import EgjaxError
from egjax.evals.intervals import Figure
from egjax.evals.manifest import describe, write_atomic
from egjax.lm.config import LlamaConfig
from egjax.lm.ensemble import Models
from egjax.lm.generate import Prompts, generate
from egjax.lm.params import Params, count, init, unstacked
from egjax.lm.ratio import ratio_combine
from egjax.lm.speculate import Speculation, round_cost, speculate
from egjax.train.progress import progress
from experiments.common import emit, note, run_main

__all__ = ["CASES", "SIZES", "Config", "cases", "main"]

Array = jax.Array
Size = Literal["tiny", "4m", "30m", "1b", "8b"]

# width, MLP, layers, heads, kv heads, vocabulary; of a Llama 3.2 1B and a Llama 3.1 8B the last two
SIZES: dict[Size, tuple[int, int, int, int, int, int]] = {
    "tiny": (32, 64, 2, 2, 1, 256),
    "4m": (192, 512, 6, 3, 1, 8192),
    "30m": (512, 1408, 8, 8, 4, 8192),
    "1b": (2048, 8192, 16, 32, 8, 128_256),
    "8b": (4096, 14336, 32, 32, 8, 128_256),
}
CASES = {"agree": 0.0, "half": 0.5, "never": 1.0}
"""Share of tokens after which the large model insists on another token than the expert."""
_KEPT = Path(__file__).parent / "results" / "decode"


@dataclass(frozen=True)
class Config:
    """What to measure."""

    large: Size = "30m"
    """Size of πᴸ."""
    small: Size = "4m"
    """Size of πᴱ and πᴺ."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and caches."""
    rows: int = 1
    """Prompts decoded at once."""
    prompt: int = 64
    """Tokens of a prompt."""
    tokens: int = 96
    """New tokens of each."""
    drafts: int = 6
    """Tokens drafted in a round."""
    alpha: float = 1.0
    """Exponent of the ratio."""
    cases: tuple[str, ...] = tuple(CASES)
    """Which of agree, half, never."""
    repeats: int = 5
    """Timed runs of each form, after one that is not timed."""
    layers: Literal["auto", "stacked", "apart"] = "auto"
    """Stacked layers are scanned, layers apart (`egjax.lm.params.unstacked`) follow one another;
    auto: apart on a GPU."""
    seed: int = 0
    """Of weights and prompts."""
    keep: str = ""
    """Also write the rows to `experiments/results/decode/NAME.json`, to be committed."""
    json: Annotated[bool, tyro.conf.arg(help="print figures as JSON lines")] = False


def main(config: Config) -> None:
    unknown = [name for name in config.cases if name not in CASES]
    if unknown:
        raise EgjaxError(
            f"no case {', '.join(unknown)}", where="--cases", remedy=f"of {', '.join(CASES)}"
        )
    bandwidth = _bandwidth()
    rows: list[Figure] = []
    with progress("decoding", len(config.cases)) as advance:
        for done, name in enumerate(config.cases, start=1):
            found = _measure(name, config, bandwidth)
            emit(*found, json=config.json)
            rows += found
            advance(done, name)
    if config.keep:
        record = {
            "manifest": asdict(describe(seeds=(config.seed,))),
            "config": asdict(config),
            "figures": [row.to_dict() for row in rows],
        }
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        write_atomic(_KEPT / f"{config.keep}.json", text)


def cases(config: Config, contrary: float) -> Models:
    """πᴸ, πᴱ and πᴺ of the sizes wanted, that agree as said.

    All random; what a model says is made plain by its embedding and unembedding: after token v the
    expert prefers `successor(v)`, the large model too, but after a share of the tokens another one,
    so strongly that the ratio does not outvote it. The anti-expert prefers nothing.

    Args:
        config: sizes and seed.
        contrary: share of tokens after which the large model contradicts the expert.
    """
    vocabulary = SIZES[config.large][-1]
    if SIZES[config.small][-1] != vocabulary:
        raise EgjaxError(f"vocabularies of {config.large} and {config.small} differ")
    rng = np.random.default_rng(config.seed)
    successor = rng.permutation(vocabulary)
    differs = rng.random(vocabulary) < contrary
    other = np.where(differs, np.roll(successor, 1), successor)
    keys = jax.random.split(jax.random.key(config.seed), 3)
    large, small = (_llama(size, config) for size in (config.large, config.small))
    apart = config.layers == "apart" or (config.layers == "auto" and jax.default_backend() == "gpu")

    def model(key: Array, llama: LlamaConfig, after: np.ndarray, logit: float):
        params = _speaking(key, llama, after, logit)
        return (unstacked(params, consume=True) if apart else params), llama

    return [
        model(keys[0], large, other, 40.0),
        model(keys[1], small, successor, 10.0),
        model(keys[2], small, successor, 0.0),
    ]


def _llama(size: Size, config: Config) -> LlamaConfig:
    width, mlp, layers, heads, kv_heads, vocabulary = SIZES[size]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width // heads,
        max_seq_len=config.prompt + config.tokens,
        tie_embeddings=False,
        dtype=config.dtype,
        eos_ids=(),
    )


def _speaking(key: Array, config: LlamaConfig, successor: np.ndarray, logit: float) -> Params:
    """Random parameters whose logits single out `successor[v]` after v by about `logit`.

    The embedding is made large against what the layers add, so that it can be read off the
    residual stream; the unembedding's column of `successor[v]` is the embedding of v.
    """
    params = init(key, config)
    rows = jax.random.normal(key, params["embedding"].shape, jnp.float32)
    rows = rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
    width = config.hidden_size
    column = jnp.zeros_like(rows).at[successor].set(rows)
    dtype = params["embedding"].dtype
    return params | {
        "embedding": (rows * 8 * width**0.5).astype(dtype),
        "unembedding": (column.T * logit * width**-0.5).astype(dtype),
    }


def _measure(name: str, config: Config, bandwidth: float) -> list[Figure]:
    """The rows of one case."""
    models = jax.block_until_ready(cases(config, CASES[name]))
    shape = config.rows, config.prompt
    tokens = np.random.default_rng(config.seed).integers(3, models[0][1].vocab_size, shape)
    prompts = Prompts(jnp.asarray(tokens, jnp.int32), jnp.ones(shape, bool))
    options: dict[str, Any] = {
        "max_new_tokens": config.tokens,
        "combine": ratio_combine(alpha=config.alpha),
        "temperature": 0.0,
    }
    key = jax.random.key(config.seed)

    def plain():
        return generate(models, prompts, key, **options)

    def fast(cost: float | None = None) -> Speculation:
        return speculate(models, prompts, key, draft=1, drafts=config.drafts, cost=cost, **options)

    found, expected = fast(), plain()
    if not np.array_equal(found.generation.tokens, expected.tokens):
        raise EgjaxError(f"{name}: speculation decoded other tokens than the plain loop")

    def prefill():
        one: dict[str, Any] = {**options, "max_new_tokens": 1}
        return generate(models, prompts, key, **one)

    forms = {"fast": fast, "plain": plain, "prefill": prefill}
    drafting, few = fast(0.0), CASES[name] == 0
    if few:
        forms["drafting"] = lambda: fast(0.0)
    taken = _alternated(forms, config.repeats)
    seconds = {form: float(np.median(times[:, 0])) for form, times in taken.items()}
    ratios = taken["plain"] / taken["fast"]
    # The reading of the prompt is no step.
    step = (seconds["plain"] - seconds["prefill"]) / (config.tokens - 1)
    configs = [c for _, c in models]
    rates = {form: config.rows * config.tokens / seconds[form] for form in ("fast", "plain")}
    weights = sum(_weight_bytes(c) for c in configs)
    cached = sum(_cache_bytes(c, config) for c in configs)
    drafted = int(drafting.drafted.sum())
    note(
        f"{name}: {int(found.rounds)} rounds and {int(found.steps)} plain steps "
        f"for {config.tokens} tokens"
    )

    def row(what: str, value: float, unit: str, peer: str | None = None, theirs: float = 0):
        known = {} if peer is None else {"peer": peer, "peer_value": theirs}
        return Figure(f"{what}/{name}", value, unit, n=config.repeats, seed=config.seed, **known)

    rows = [
        row("decode_speed", rates["fast"], "tokens/s", "plain loop", rates["plain"]),
        *(
            Figure(
                f"{what}/{name}",
                float(np.median(column)),
                "ratio",
                n=config.repeats,
                low=float(column.min()),
                high=float(column.max()),
                seed=config.seed,
            )
            for what, column in zip(("decode_ratio", "decode_cpu_ratio"), ratios.T)
            if what == "decode_ratio" or jax.default_backend() == "cpu"
        ),
        row(
            "decode_bandwidth", (weights + cached) / step, "bytes/s", "copy of an array", bandwidth
        ),
        Figure(
            f"decode_accepted/{name}", int(drafting.accepted.sum()) / drafted, "fraction", drafted
        ),
        Figure(f"decode_weight_bytes/{name}", weights, "bytes", n=1),
        Figure(f"decode_cache_bytes/{name}", cached, "bytes", n=1),
    ]
    if few:
        cost = (seconds["drafting"] - seconds["prefill"]) / int(drafting.rounds) / step
        formula = round_cost(configs, draft=1, drafts=config.drafts, rows=config.rows)
        rows.append(row("decode_round_cost", cost, "plain steps", "formula", formula))
    return rows


def _weight_bytes(config: LlamaConfig) -> int:
    """Bytes of weights that are multiplied with a token: all but an embedding of its own."""
    looked_up = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    return (count(config) - looked_up) * jnp.dtype(config.dtype).itemsize


def _cache_bytes(config: LlamaConfig, options: Config) -> int:
    """Bytes of keys and values that the token half-way through reads."""
    filled = options.prompt + options.tokens // 2
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return options.rows * filled * per_token * jnp.dtype(config.dtype).itemsize


def _alternated(forms: dict[str, Callable[[], Any]], repeats: int) -> dict[str, np.ndarray]:
    """Seconds and CPU seconds [repeats, 2] of each form, run in turns after a warm-up, every second
    time the other way round."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    for repeat in range(repeats + 1):
        for name in list(forms)[:: 1 if repeat % 2 else -1]:
            begin = time.perf_counter(), time.process_time()
            jax.block_until_ready(forms[name]())
            if repeat:
                taken[name].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    return {name: np.array(times) for name, times in taken.items()}


def _bandwidth(size: int = 2**25) -> float:
    """Bytes a second that reading and writing an array of 128 MiB reaches."""
    copy = jax.jit(lambda x: x + 1)
    values = jax.block_until_ready(jnp.zeros(size, jnp.float32))
    return 2 * values.nbytes / float(_alternated({"": lambda: copy(values)}, 5)[""][:, 0].min())


if __name__ == "__main__":
    run_main(main, Config)
