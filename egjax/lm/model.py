"""A Llama as a pure function of its parameters.

RMSNorm, rotary positions with Llama 3's scaling, grouped-query attention, SwiGLU; sums in float32
whatever the dtype of the weights. Letters: B rows, T tokens, S keys, D width, H query heads, N key
and value heads, G query heads of one of them, K width of a head, M width of the MLP, V vocabulary.

Sources: Touvron et al. 2023 (arXiv 2302.13971), "The Llama 3 Herd of Models" (arXiv 2407.21783),
Su et al. 2021 (rotary embedding, arXiv 2104.09864), Ainslie et al. 2023 (grouped queries,
arXiv 2305.13245), Shazeer 2020 (SwiGLU, arXiv 2002.05202).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, overload

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from egjax.errors import EgjaxError
from egjax.lm.attention import RESULT, Form, Sight, einsum, prepare
from egjax.lm.cache import Cache, put_segments, write
from egjax.lm.config import LlamaConfig
from egjax.lm.params import Params
from egjax.losses import Head
from egjax.mesh import constrain, mesh_in_use

__all__ = [
    "REMAT",
    "Remat",
    "Trunk",
    "forward",
    "head",
    "rms_norm",
    "rope_angles",
    "rotate",
    "trunk",
    "unembed",
]

Array = jax.Array
Rope = tuple[Array, Array]

_FEW = 10**7
_KEEP = jax.checkpoint_policies.save_only_these_names
REMAT: Mapping[str, Callable[[Callable], Callable]] = MappingProxyType(
    {
        "none": lambda layer: layer,
        "selective": partial(jax.checkpoint, policy=_KEEP("projection", RESULT)),
        "attention": partial(jax.checkpoint, policy=_KEEP(RESULT)),
        "full": jax.checkpoint,
    }
)
"""What of a layer is kept for the backward pass, from most to least: everything; what its matrices
and its attention give, not the scores (Korthikanti et al. 2022, arXiv 2205.05198); what attention
gives; its input alone."""
if TYPE_CHECKING:
    Remat: TypeAlias = str
else:  # for the command line, which offers the names
    Remat = Literal[tuple(REMAT)]


class Trunk(NamedTuple):
    """What the layers give.

    Attributes:
        final: [B, T, D]. Output of the last layer after the final norm; `unembed` takes it.
        hidden: [L + 1, B, T, D] or None. The residual stream at the embedding and after each
            layer, before the final norm.
        cache: the cache with these tokens, or None.
    """

    final: Array
    hidden: Array | None
    cache: Cache | None


@overload
def forward(
    params: Params,
    config: LlamaConfig,
    tokens: Array,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    cache: None = None,
    return_hidden: Literal[False] = False,
    remat: str | Callable | None = None,
    attention: str | Form = "auto",
) -> Array: ...
@overload
def forward(
    params: Params,
    config: LlamaConfig,
    tokens: Array,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    *,
    cache: Cache,
    return_hidden: Literal[False] = False,
    remat: str | Callable | None = None,
    attention: str | Form = "auto",
) -> tuple[Array, Cache]: ...
@overload
def forward(
    params: Params,
    config: LlamaConfig,
    tokens: Array,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    cache: None = None,
    *,
    return_hidden: Literal[True],
    remat: str | Callable | None = None,
    attention: str | Form = "auto",
) -> tuple[Array, Array]: ...
def forward(
    params: Params,
    config: LlamaConfig,
    tokens: Array,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    cache: Cache | None = None,
    return_hidden: bool = False,
    remat: str | Callable | None = None,
    attention: str | Form = "auto",
):
    """Logits of the next token, at every token.

    Args:
        params: see `egjax.lm.params`.
        config: the model.
        tokens: int32[B, T].
        positions: int32[B, T] or [1, T]; None counts along the row (and on from the cache).
        segment_ids: int32[B, T]. Tokens see only their own segment (sequences packed in a row);
            0 is padding, which nothing sees. None: no padding, one sequence a row.
        cache: tokens read before; these are put behind them.
        return_hidden: also return the residual stream of every layer.
        remat: how to save memory in training: a name of `REMAT`, or what wraps a layer, e.g.
            `jax.checkpoint`.
        attention: `"auto"`, or a form of `egjax.lm.attention` or its name.

    Returns:
        float32[B, T, V]; with `cache` a pair (logits, cache); with `return_hidden` a pair (logits,
        hidden [L + 1, B, T, D]: embedding, then after each layer, before the final norm).
        Logits at padding are finite and without meaning.

    Raises:
        EgjaxError: a sequence is longer than the model's context (packed rows may be), or there is
            no such policy or form of attention.
    """
    out = trunk(
        params, config, tokens, positions, segment_ids, cache, return_hidden, remat, attention
    )
    logits = unembed(params, config, out.final)
    extra = [item for item in (out.cache, out.hidden) if item is not None]
    return (logits, *extra) if extra else logits


def trunk(
    params: Params,
    config: LlamaConfig,
    tokens: Array,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    cache: Cache | None = None,
    return_hidden: bool = False,
    remat: str | Callable | None = None,
    attention: str | Form = "auto",
    *,
    prefix_ids: Array | None = None,
) -> Trunk:
    """Everything of `forward` (same arguments) but the logits, which are its largest array.

    Args:
        params, config, tokens, positions, segment_ids, cache, return_hidden, remat, attention: see
            there.
        prefix_ids: int32[B, T]. A segment that each token sees beside its own, 0 for none: what
            several continuations of one prompt in a row share. Positions must be given then.
    """
    length = tokens.shape[1]
    whole = segment_ids is None
    if segment_ids is None:
        config.check_length(length)
        segment_ids = jnp.ones((1 if cache is None else tokens.shape[0], length), jnp.int32)
    before: Array | int = 0
    key_segments = segment_ids
    if cache is not None:
        before = cache.used
        key_segments = put_segments(cache, segment_ids)
        if before.ndim:
            before = before[:, None]
    sight = Sight(segment_ids, key_segments, before, cache is not None, whole, prefix_ids)
    attend = prepare(attention, config, sight)
    if positions is None:
        # Rotary attention knows differences of positions alone, so it does not matter where in
        # the row a segment begins.
        # [1, T], or [B, T] where rows count
        positions = before + jnp.arange(length, dtype=jnp.int32)[None]
    rope = rope_angles(config, positions)
    stream, inputs = _stream_axes(config, tokens)

    def layer(carry, scanned):
        x, store = carry
        weights, index = scanned
        normed = constrain(rms_norm(x, weights["attention_norm"], config.rms_norm_eps), *inputs)
        query, key, value = _project(weights, normed, rope)
        if store is not None:
            store, key, value = write(store, index, key, value)
        query, key, value = (checkpoint_name(y, "projection") for y in (query, key, value))
        mixed = constrain(attend(query, key, value), "batch", "heads", None, None)
        x = constrain(x + _output(weights, mixed), *stream)
        normed = constrain(rms_norm(x, weights["mlp_norm"], config.rms_norm_eps), *inputs)
        x = constrain(x + _mlp(weights, normed, inputs[0]), *stream)
        return (x, store), x if return_hidden else None

    first = constrain(params["embedding"][tokens], *stream)
    layer, layers = _rematerialised(layer, remat), params["layers"]
    if isinstance(layers, tuple):  # see `egjax.lm.params.unstacked`
        carry, streams = (first, cache), []
        for index, weights in enumerate(layers):
            carry, behind = layer(carry, (weights, index))
            streams.append(behind)
        (last, cache), after = carry, jnp.stack(streams) if return_hidden else None
    else:
        indices = jnp.arange(config.num_layers, dtype=jnp.int32)
        (last, cache), after = jax.lax.scan(layer, (first, cache), (layers, indices))
    if cache is not None:
        cache = replace(cache, segment_ids=key_segments, used=cache.used + length)
    hidden = None if after is None else jnp.concatenate([first[None], after])
    return Trunk(rms_norm(last, params["final_norm"], config.rms_norm_eps), hidden, cache)


def _rematerialised(layer: Callable, remat: str | Callable | None) -> Callable:
    """A layer under a policy."""
    if remat is None or callable(remat):
        return layer if remat is None else remat(layer)
    if remat not in REMAT:
        raise EgjaxError(f"no remat policy {remat!r}", remedy=f"one of {', '.join(REMAT)}")
    return REMAT[remat](layer)


def unembed(params: Params, config: LlamaConfig, final: Array) -> Array:
    """Logits float32[..., V] of normed outputs [..., D] of the trunk."""
    if config.tie_embeddings:
        return einsum("...d,vd->...v", final, params["embedding"], jnp.float32)
    return einsum("...d,dv->...v", final, params["unembedding"], jnp.float32)


def head(params: Params, config: LlamaConfig, final: Array) -> Head:
    """What `unembed` multiplies, for losses in chunks (`egjax.losses.chunked`).

    Args:
        params: see `egjax.lm.params`.
        config: the model.
        final: [..., D], normed outputs of the trunk.
    """
    name = "embedding" if config.tie_embeddings else "unembedding"
    return Head(final, params[name], tied=config.tie_embeddings)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """`x / sqrt(mean(x²) + eps) · weight` over the last axis, the mean in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * weight


def rope_angles(config: LlamaConfig, positions: Array) -> Rope:
    """Cosine and sine of the rotary embedding.

    Args:
        config: the model.
        positions: int32[...].

    Returns:
        Two float32[..., K / 2].
    """
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is not None:
        turns = scaling.original_max_seq_len * frequencies / (2 * jnp.pi)
        kept = (turns - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        kept = jnp.clip(kept, 0.0, 1.0)
        frequencies = kept * frequencies + (1 - kept) * frequencies / scaling.factor
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, rope: Rope) -> Array:
    """Turns the pairs `(x[i], x[i + K/2])` of each head by the angle of its position.

    Args:
        x: [B, T, heads, K].
        rope: cosine and sine, [B, T, K / 2].
    """
    cos, sin = rope[0][:, :, None], rope[1][:, :, None]
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)


def _stream_axes(
    config: LlamaConfig, tokens: Array
) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
    """Logical axes on a mesh of the residual stream [B, T, D], and of what matrices take of it.

    Weights are split over `data` along D. With more tokens than D it moves less to gather them,
    and rows are split; with fewer (decoding) the weights stay where they are and the stream is
    split along D ("2D weight-stationary", Pope et al. 2022, arXiv 2211.05102). Between matrices
    that are split over `model` the stream is split along T, so that what is kept for the backward
    pass is not kept on each of its devices (Korthikanti et al. 2022, arXiv 2205.05198). Told to,
    the compiler gathers it before them; left to itself it gathered the matrices.
    """
    if tokens.size < config.hidden_size:
        return (None, None, "embed"), (None, None, "embed")
    return ("batch", "length", None), ("batch", None, None)


def _linear(weights: Params, name: str, formula: str, x: Array) -> Array:
    """A projection, with its bias, its low-rank adapter (`egjax.lm.lora`) and the scale of its
    eight bits (`egjax.lm.int8`) where there is one."""
    scale = weights.get(f"{name}_scale")
    if scale is None:
        y = einsum(formula, x, weights[name])
    else:
        y = (einsum(formula, x, weights[name], jnp.float32) * scale).astype(x.dtype)
    bias = weights.get(f"{name}_bias")
    if bias is not None:
        y = y + bias
    if f"{name}_lora_a" not in weights:
        return y
    before, after = formula.split("->")
    before, matrix = before.split(",")
    into = "".join(axis for axis in matrix if axis in before)
    low = einsum(f"{before},{into}r->btr", x, weights[f"{name}_lora_a"])
    if "lora_rows" in weights:
        low = low * weights["lora_rows"][:, None, None].astype(low.dtype)
    out = matrix.replace(into, "")
    return y + einsum(f"btr,r{out}->{after}", low, weights[f"{name}_lora_b"])


def _output(weights: Params, mixed: Array) -> Array:
    """What attention gives [B, H, T, K] as a sum into the residual stream [B, T, D].

    Of one token and a matrix of less than 10⁷ entries (`_FEW`) XLA for GPUs makes products that it
    writes to memory in float32, and reads again to add them up: five times the bytes of the matrix.
    It multiplies a few like rows as a matrix.
    """
    formula = "bhtk,hkd->btd"
    copies = -(-_FEW // (mixed.size * weights["output"].shape[-1]))
    if jax.default_backend() != "gpu" or mesh_in_use() is not None or not 1 < copies <= 8:
        return _linear(weights, "output", formula, mixed)
    rows = mixed.shape[0]
    many = jax.lax.optimization_barrier(jnp.tile(mixed, (copies, 1, 1, 1)))
    adapted = weights.get("lora_rows")
    if adapted is not None:
        weights = {**weights, "lora_rows": jnp.tile(adapted, copies)}
    return _linear(weights, "output", formula, many)[:rows]


def _project(weights: Params, x: Array, rope: Rope) -> tuple[Array, Array, Array]:
    """Rotated queries [B, H, T, K], rotated keys and values [B, N, T, K]."""
    query = rotate(_linear(weights, "query", "btd,dhk->bthk", x), rope)
    key = rotate(_linear(weights, "key", "btd,dnk->btnk", x), rope)
    value = _linear(weights, "value", "btd,dnk->btnk", x)
    return (
        constrain(query.swapaxes(1, 2), "batch", "heads", None, None),
        constrain(key.swapaxes(1, 2), "batch", "kv_heads", None, None),
        constrain(value.swapaxes(1, 2), "batch", "kv_heads", None, None),
    )


def _mlp(weights: Params, x: Array, rows: str | None) -> Array:
    """`down(silu(gate(x)) · up(x))`, [B, T, D].

    Pinned between its matrices: in the backward pass the compiler would gather a whole matrix
    rather than the stream. `rows` is the logical axis of B.
    """
    gate = checkpoint_name(_linear(weights, "gate", "btd,dm->btm", x), "projection")
    up = checkpoint_name(_linear(weights, "up", "btd,dm->btm", x), "projection")
    inner = constrain(jax.nn.silu(gate) * up, rows, None, "mlp")
    return _linear(weights, "down", "btm,md->btd", inner)
