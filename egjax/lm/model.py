"""A Llama as a pure function of its parameters.

RMSNorm, rotary positions with Llama 3's scaling, grouped-query attention, SwiGLU; sums in float32
whatever the dtype of the weights. Letters: B rows, T tokens, S keys, D width, H query heads, N key
and value heads, G query heads of one of them, K width of a head, M width of the MLP, V vocabulary.

Sources: Touvron et al. 2023 (arXiv 2302.13971), "The Llama 3 Herd of Models" (arXiv 2407.21783),
Su et al. 2021 (rotary embedding, arXiv 2104.09864), Ainslie et al. 2023 (grouped queries,
arXiv 2305.13245), Shazeer 2020 (SwiGLU, arXiv 2002.05202).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple, overload

import jax
import jax.numpy as jnp

from egjax.lm.cache import Cache, write
from egjax.lm.config import LlamaConfig
from egjax.lm.params import Params
from egjax.losses import Head

__all__ = ["Trunk", "forward", "head", "rms_norm", "rope_angles", "rotate", "trunk", "unembed"]

Array = jax.Array
Rope = tuple[Array, Array]


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
    remat: Callable | None = None,
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
    remat: Callable | None = None,
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
    remat: Callable | None = None,
) -> tuple[Array, Array]: ...
def forward(
    params: Params,
    config: LlamaConfig,
    tokens: Array,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    cache: Cache | None = None,
    return_hidden: bool = False,
    remat: Callable | None = None,
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
        remat: what wraps a layer to save memory in training, e.g. `jax.checkpoint`.

    Returns:
        float32[B, T, V]; with `cache` a pair (logits, cache); with `return_hidden` a pair (logits,
        hidden [L + 1, B, T, D]: embedding, then after each layer, before the final norm).
        Logits at padding are finite and without meaning.
    """
    out = trunk(params, config, tokens, positions, segment_ids, cache, return_hidden, remat)
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
    remat: Callable | None = None,
    *,
    prefix_ids: Array | None = None,
) -> Trunk:
    """Everything of `forward` (same arguments) but the logits, which are its largest array.

    Args:
        params, config, tokens, positions, segment_ids, cache, return_hidden, remat: see there.
        prefix_ids: int32[B, T]. A segment that each token sees beside its own, 0 for none: what
            several continuations of one prompt in a row share. Positions must be given then.
    """
    length = tokens.shape[1]
    if segment_ids is None:
        segment_ids = jnp.ones((1 if cache is None else tokens.shape[0], length), jnp.int32)
    before: Array | int = 0
    key_segments = segment_ids
    if cache is not None:
        before = cache.used
        key_segments = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, (0, before))
    allowed = _visible(segment_ids, key_segments, before, prefix_ids)
    if positions is None:
        # Rotary attention knows differences of positions alone, so it does not matter where in
        # the row a segment begins.
        positions = before + jnp.arange(length)[None]
    rope = rope_angles(config, positions)

    def layer(carry, scanned):
        x, store = carry
        weights, index = scanned
        normed = rms_norm(x, weights["attention_norm"], config.rms_norm_eps)
        query, key, value = _project(weights, normed, rope)
        if store is not None:
            store, key, value = write(store, index, key, value)
        x = x + _attend(config, weights, query, key, value, allowed)
        x = x + _mlp(weights, rms_norm(x, weights["mlp_norm"], config.rms_norm_eps))
        return (x, store), x if return_hidden else None

    first = params["embedding"][tokens]
    indices = jnp.arange(config.num_layers)
    (last, cache), after = jax.lax.scan(
        layer if remat is None else remat(layer), (first, cache), (params["layers"], indices)
    )
    if cache is not None:
        cache = replace(cache, segment_ids=key_segments, used=cache.used + length)
    hidden = None if after is None else jnp.concatenate([first[None], after])
    return Trunk(rms_norm(last, params["final_norm"], config.rms_norm_eps), hidden, cache)


def unembed(params: Params, config: LlamaConfig, final: Array) -> Array:
    """Logits float32[..., V] of normed outputs [..., D] of the trunk."""
    if config.tie_embeddings:
        return _einsum("...d,vd->...v", final, params["embedding"], jnp.float32)
    return _einsum("...d,dv->...v", final, params["unembedding"], jnp.float32)


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


def _visible(
    segment_ids: Array, key_segments: Array, before: Array | int, prefix_ids: Array | None
) -> Array:
    """bool[B, T, S]: keys that a token sees: earlier ones of its segment and prefix, and itself."""
    queries, keys = segment_ids.shape[1], key_segments.shape[1]
    causal = jnp.arange(keys)[None] <= before + jnp.arange(queries)[:, None]
    same = segment_ids[:, :, None] == key_segments[:, None, :]
    if prefix_ids is not None:
        prefix = prefix_ids[:, :, None]
        same = same | ((prefix == key_segments[:, None, :]) & (prefix != 0))
    return causal & same & (segment_ids != 0)[:, :, None]


def _einsum(formula: str, x: Array, weights: Array, dtype=None) -> Array:
    """Einsum whose sums are float32, rounded once at the end to `dtype` (else that of `x`)."""
    summed = jnp.einsum(formula, x, weights, preferred_element_type=jnp.float32)
    return summed.astype(dtype or x.dtype)


def _linear(weights: Params, name: str, formula: str, x: Array) -> Array:
    """A projection, with its bias where the model has one."""
    y = _einsum(formula, x, weights[name])
    bias = weights.get(f"{name}_bias")
    return y if bias is None else y + bias


def _project(weights: Params, x: Array, rope: Rope) -> tuple[Array, Array, Array]:
    """Rotated queries [B, H, T, K], rotated keys and values [B, N, T, K]."""
    query = rotate(_linear(weights, "query", "btd,dhk->bthk", x), rope)
    key = rotate(_linear(weights, "key", "btd,dnk->btnk", x), rope)
    value = _linear(weights, "value", "btd,dnk->btnk", x)
    return query.swapaxes(1, 2), key.swapaxes(1, 2), value.swapaxes(1, 2)


def _attend(
    config: LlamaConfig, weights: Params, query: Array, key: Array, value: Array, allowed: Array
) -> Array:
    """Grouped-query attention, [B, T, D].

    Args:
        config: the model.
        weights: of this layer.
        query: [B, H, T, K].
        key, value: [B, N, S, K].
        allowed: bool[B, T, S].
    """
    batch, heads, length, width = query.shape
    groups = (batch, config.num_kv_heads, config.group * length, width)
    # The queries of a group lie as rows of one matrix, since they share their keys: on a CPU 1.3
    # to 2 times the speed of a product with the group as an axis of its own.
    scores = _einsum("bnqk,bnsk->bnqs", query.reshape(groups), key, jnp.float32)
    scores = scores.reshape(batch, heads, length, -1) * width**-0.5
    # Finite, so that a token which sees nothing (padding) gives no NaN.
    scores = jnp.where(allowed[:, None], scores, jnp.finfo(jnp.float32).min)
    shares = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = _einsum("bnqs,bnsk->bnqk", shares.reshape(*groups[:3], -1), value)
    mixed = mixed.reshape(query.shape)
    return _linear(weights, "output", "bhtk,hkd->btd", mixed)


def _mlp(weights: Params, x: Array) -> Array:
    """`down(silu(gate(x)) · up(x))`, [B, T, D]."""
    gate = _linear(weights, "gate", "btd,dm->btm", x)
    up = _linear(weights, "up", "btd,dm->btm", x)
    return _linear(weights, "down", "btm,md->btd", jax.nn.silu(gate) * up)
