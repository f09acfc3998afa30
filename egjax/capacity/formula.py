"""Memory and cost of a stage by formula, where a chip's compiler is not installed.

The same arithmetic gives the FLOPs of compiled plans, because XLA counts a loop's body once.
Symbols: P weights that multiply a token, T tokens a row, L layers, D width, V vocabulary, H heads
of width K, d and m devices along `data` and `model`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from egjax.capacity.stages import Case, frozen_table
from egjax.lm.attention import BLOCK, CHUNK, DENSE_SCORES
from egjax.lm.config import LlamaConfig
from egjax.lm.params import count
from egjax.losses.blocks import SIZES
from egjax.train.objectives import tokens_a_device

__all__ = ["Cost", "cache_bytes", "cost", "memory", "state_bytes", "table_bytes"]


@dataclass(frozen=True)
class Cost:
    """What a step asks of one chip; of decoding, the whole of a batch of prompts.

    Attributes:
        flops: executed, recomputation and all of attention's square included.
        useful_flops: without recomputation and without what the causal mask discards.
        memory_bytes: moved to and from its memory.
        collective_bytes: that it sends to other chips.
    """

    flops: float
    useful_flops: float
    memory_bytes: float
    collective_bytes: float


def _size(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize


def _trunk(config: LlamaConfig) -> int:
    """Weights of the layers; embedding and unembedding left out."""
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    return count(config) - tables


def _head(config: LlamaConfig) -> int:
    return config.vocab_size * config.hidden_size


def _attention(config: LlamaConfig, keys: float) -> float:
    """FLOPs of a token's scores and mixture over so many keys, forward."""
    return 4.0 * config.num_layers * config.num_heads * config.head_dim * keys


def table_bytes(table: dict[str, Any]) -> float:
    """Bytes of all tensors of a table (`egjax.lm.params.table`, `egjax.lm.int8.table`)."""
    return float(sum(prod(s.shape) * _size(s.dtype) for s in jax.tree.leaves(table)))


def _frozen_bytes(config: LlamaConfig, case: Case) -> float:
    return table_bytes(frozen_table(config, case))


def _matrix_bytes(config: LlamaConfig, case: Case) -> float:
    """Bytes of a frozen model's layers and unembedding: what a token is multiplied with."""
    embedding = 0 if config.tie_embeddings else _head(config) * _size(config.dtype)
    return _frozen_bytes(config, case) - embedding


def state_bytes(case: Case) -> dict[str, float]:
    """Bytes of all weights and of the optimiser's state, over all chips."""
    frozen = sum(_frozen_bytes(c, case) for c in case.frozen)
    if case.stage == "decode":
        return {"weights": frozen, "optimizer": 0.0}
    wide = _size(case.layout.master or case.model.dtype)
    trained = count(case.model) * wide
    return {"weights": frozen + trained, "optimizer": 2.0 * trained}


def cache_bytes(case: Case) -> float:
    """Bytes of all caches of decoding, over all chips."""
    if case.stage != "decode":
        return 0.0
    return sum(
        2.0 * c.num_layers * case.batch * c.num_kv_heads * case.length * c.head_dim * _size(c.dtype)
        for c in case.frozen
    )


def _form(case: Case, length: int) -> str:
    """The form of attention, see `egjax.lm.attention.FORMS`."""
    form = case.layout.attention if case.stage != "decode" else "auto"
    if form != "auto":
        return form
    if case.platform == "gpu" and length >= BLOCK and case.model.dtype != "float32":
        return "cudnn"
    return "dense" if length**2 <= DENSE_SCORES else "chunked"


def _queries(case: Case, length: int) -> int:
    """Queries of a head whose scores exist at once; none for kernels that keep them on the chip."""
    sizes = {"dense": length, "chunked": min(length, CHUNK)}
    return sizes.get(_form(case, length), 0)


def _kept(case: Case, tokens: float, model: int) -> float:
    """Bytes a chip that a layer keeps for the backward pass, under the policy of the layout.

    What the names in `egjax.lm.model.trunk` stand for; with `"none"` all that derivatives ask for:
    of a norm its input in float32 and what it gives before and after its weight, of the MLP what
    two matrices and the sigmoid give, and three products of these.
    """
    config, remat, length = case.model, case.layout.remat, case.length
    width = _size(config.dtype)
    # Between layers the stream is split along its length.
    shares = model if length % model == 0 else 1
    stream = tokens * config.hidden_size
    if remat == "full":
        return stream * width / shares
    heads = tokens * config.num_heads * config.head_dim / model
    if remat == "attention":
        return (stream / shares + heads) * width
    parts = model if config.num_kv_heads % model == 0 else 1
    attention = 2 * heads + 2 * tokens * config.num_kv_heads * config.head_dim / parts
    mlp = tokens * config.intermediate_size / model
    if remat == "selective":
        return (stream / shares + attention + 2 * mlp) * width
    norms = 2 * (stream / shares * (4 + width) + stream * width)
    scores = 0.0
    if _form(case, length) == "dense":
        # Exponentials in float32, shares in the model's type.
        scores = tokens * length * config.num_heads / model * (4 + width)
    return norms + scores + (attention + 6 * mlp) * width


def _again(case: Case) -> tuple[float, int]:
    """Of a layer and token, what the backward pass computes again: weights that are multiplied, and
    products of attention (scores, mixture).

    The MLP's last matrix is not among them: no derivative asks for what it gives.
    """
    config, remat, form = case.model, case.layout.remat, _form(case, case.length)
    # The chunked form never keeps its scores.
    products = 1 if form == "chunked" else 0
    if remat == "none":
        return 0.0, products
    # cuDNN's derivative needs more of its forward pass than what it gives; splash keeps that, too.
    if remat == "full" or form == "cudnn":
        products += 2
    elif form == "dense":
        products += 1
    if remat == "selective":
        return float(config.hidden_size * config.num_heads * config.head_dim), products
    last = config.hidden_size * config.intermediate_size
    return _trunk(config) / config.num_layers - last, products


def memory(case: Case, data: int, model: int) -> dict[str, float]:
    """Bytes a chip by kind: weights, optimizer, gradients, activations, logits, caches.

    Args:
        case: see there.
        data, model: devices along the axes of the mesh.
    """
    chips = data * model
    out = {kind: size / chips for kind, size in state_bytes(case).items()}
    config, width = case.model, _size(case.model.dtype)
    rows = case.rows / min(data, case.rows)
    length = case.length if case.stage != "decode" else case.length - case.new_tokens
    tokens = rows * length
    stream = tokens * config.hidden_size * width
    # Scores in float32, shares in the model's type, and one more while they are turned.
    scores = rows * config.num_heads / model * _queries(case, length) * length * (8 + width)
    mlp = 3 * tokens * config.intermediate_size / model * width
    gathered = 2 * _trunk(config) / config.num_layers / model * width
    layer = max(scores, mlp) + 4 * stream + gathered
    shard_kv = model if config.num_kv_heads % model == 0 else 1
    if case.stage == "decode":
        caches = cache_bytes(case) / chips * model / shard_kv
        out |= {"gradients": 0.0, "activations": layer, "logits": 0.0, "caches": caches}
        return out
    wide = _size(case.layout.master or config.dtype)
    copies = count(config) / chips * (width if wide > width else 0)
    # Of the micro-batches so far, and of one.
    out["gradients"] = (2 if case.layout.accumulate > 1 else 1) * count(config) * wide / chips
    out["activations"] = config.num_layers * _kept(case, tokens, model) + layer + copies
    arrays = {"sft": 1, "dpo": 2, "distill": 2}[case.stage]
    logits = arrays * tokens * config.vocab_size / model * 4
    out["logits"] = _chunked_losses(case, tokens, data, model) if case.layout.chunked else logits
    out["caches"] = 0.0
    return out


def _chunked_losses(case: Case, tokens: float, data: int, model: int) -> float:
    """Bytes a chip of losses in chunks (`egjax.losses.chunked`) beyond the gradients: logits,
    gathered unembeddings, and the unembedding's gradient before the chips' are added up."""
    config, width = case.model, _size(case.model.dtype)
    split = 1 if config.vocab_size % model else model
    place = split == 1 and tokens <= config.hidden_size  # in the place of the gradient
    entry = width if place and tokens <= config.hidden_size // 2 else 4
    rounded = width if width < entry else 0
    table = _head(config) / split
    if case.stage == "dpo":  # beside it the KL's to the initial policy, until they are added
        gradient = table * (entry + rounded + (entry + rounded if place else width))
    else:
        gradient = table * (entry + rounded)  # as it is summed, as it is rounded
        if data == 1:  # one is counted among the gradients
            gradient = max(0.0, gradient - table * _size(case.layout.master or config.dtype))
    tables = (1 + len(case.frozen)) * table * width if data > 1 else 0.0
    # Of a teacher, then of the student, which has none of its own in the gradient's place; nor has
    # a teacher on an accelerator.
    arrays = {"sft": 0, "dpo": 1, "distill": 2}[case.stage]
    if not place:
        arrays = 1 if case.stage == "sft" else 2
    elif SIZES[case.platform].together:
        arrays = 0
    logits = arrays * min(tokens, tokens_a_device(case.platform)) * config.vocab_size / split * 4
    return logits + tables + gradient


def cost(case: Case, data: int, model: int) -> Cost:
    """What a step asks of a chip.

    Args:
        case: see there.
        data, model: devices along the axes of the mesh.
    """
    return _decode_cost(case, data, model) if case.stage == "decode" else _cost(case, data, model)


_HEAD_PRODUCTS = {"sft": 3, "dpo": 8, "distill": 3}
"""Products of a token with the trained model's unembedding: logits, gradient of the hidden state,
gradient of the matrix; preferences form the logits twice and have the KL to π₀ beside."""
_FROZEN_PRODUCTS = {"sft": 0, "dpo": 2, "distill": 1}


def _cost(case: Case, data: int, model: int) -> Cost:
    config, chips = case.model, data * model
    tokens = case.batch * case.length * (2 if case.stage == "dpo" else 1)
    flops = 3 * (2.0 * _trunk(config) + _attention(config, case.length))
    again, products = _again(case)
    flops += 2.0 * config.num_layers * again + products / 2 * _attention(config, case.length)
    flops += _HEAD_PRODUCTS[case.stage] * 2.0 * _head(config)
    useful = 3 * (2.0 * (_trunk(config) + _head(config)) + _attention(config, case.length / 2))
    for other in case.frozen:
        flops += 2.0 * _trunk(other) + _attention(other, case.length)
        flops += _FROZEN_PRODUCTS[case.stage] * 2.0 * _head(other)
        useful += 2.0 * (_trunk(other) + _head(other)) + _attention(other, case.length / 2)
    return Cost(
        flops=tokens * flops / chips,
        useful_flops=tokens * useful / chips,
        memory_bytes=_step_traffic(case, data, model),
        collective_bytes=_step_collectives(case, data, model),
    )


def _step_traffic(case: Case, data: int, model: int) -> float:
    """Weights of every pass, the optimiser's pass, activations and attention's square."""
    config, layout = case.model, case.layout
    width, wide = _size(config.dtype), _size(layout.master or config.dtype)
    tokens = case.batch * case.length * (2 if case.stage == "dpo" else 1) / data
    total = 8.0 * count(config) * wide / (data * model)  # weights, moments, gradients in and out
    again, products = _again(case)
    again *= config.num_layers / _trunk(config)
    passes = [(config, 3 + again, 3 + products / 2), *((c, 1, 1) for c in case.frozen)]
    for c, times, squares in passes:
        total += layout.accumulate * times * _trunk(c) / model * width
        inner = 8 * c.num_heads * c.head_dim + 6 * c.intermediate_size
        layer = 12 * c.hidden_size + inner / model
        total += times * c.num_layers * tokens * layer * width
        if _queries(case, case.length):
            # Scores written, read for the softmax, shares written and read.
            scores = tokens * case.length * c.num_heads / model * (8 + 2 * width)
            total += squares * c.num_layers * scores
    chunks = tokens / tokens_a_device(case.platform)
    heads = _HEAD_PRODUCTS[case.stage] + len(case.frozen)
    total += heads * (chunks * _head(config) * width + 8 * tokens * config.vocab_size) / model
    return total


def _ring(size: float, devices: int) -> float:
    """Bytes sent by one device when `size` bytes are gathered on, or scattered from, each."""
    return size * (devices - 1) / devices


def _step_collectives(case: Case, data: int, model: int) -> float:
    """Weights gathered in each pass, gradients scattered, residual streams summed over `model`."""
    config, layout = case.model, case.layout
    width = _size(config.dtype)
    tokens = case.batch * case.length * (2 if case.stage == "dpo" else 1) / data
    total = _ring(layout.accumulate * 3 * count(config) / model * width, data)
    total += sum(_ring(_frozen_bytes(c, case) / model, data) for c in case.frozen)
    sums = [(config, 4 if layout.remat == "none" else 6), *((c, 2) for c in case.frozen)]
    total += sum(
        2 * _ring(times * c.num_layers * tokens * c.hidden_size * width, model) for c, times in sums
    )
    return total


def _decode_cost(case: Case, data: int, model: int) -> Cost:
    chips, prompt = data * model, case.length - case.new_tokens
    flops = memory = sent = 0.0
    for c in case.frozen:
        width = _size(c.dtype)
        read = 2.0 * _trunk(c) + _attention(c, prompt)
        token = 2.0 * (_trunk(c) + _head(c)) + _attention(c, case.length)
        flops += case.batch * (prompt * read + case.new_tokens * token)
        weights = _matrix_bytes(c, case)
        memory += (1 + case.new_tokens) * weights / chips
        memory += case.batch * prompt / data * c.num_layers * prompt * c.num_heads / model * 12
        sent += _ring(weights / model, data)
        sent += 4 * _ring(case.batch * prompt / data * c.num_layers * c.hidden_size * width, model)
        inner = (c.intermediate_size * 2 + c.num_heads * c.head_dim) / model
        step = 2 * _ring(c.hidden_size / data, model) * 2 + 2 * _ring(inner, data)
        sent += case.new_tokens * c.num_layers * case.batch * step * width
    memory += case.new_tokens * cache_bytes(case) / chips
    return Cost(flops / chips, flops / chips, memory, sent)
