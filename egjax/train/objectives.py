"""Loss functions of the pipeline's stages, over any language model given as a function.

Each builder returns a `LossFn` for `egjax.train.step.make_train_step`. Frozen models come as
arguments of the step, so that one compilation serves and nothing is captured.

A model gives its logits, or its `Head` (`egjax.lm.model.head`): then losses are computed in chunks
and [batch, time, vocabulary] never exists; metrics that need all logits (accuracies) are left out.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from egjax.losses import (
    Head,
    Metrics,
    Ratio,
    Targets,
    Terms,
    TopK,
    behaviour_ratio,
    chunked_loss,
    chunked_sequence_logps,
    chunked_top_k,
    forward_kl_terms,
    kl_to_initial,
    reverse_kl,
    reverse_kl_terms,
    sequence_logps,
    sft,
    token_logps,
)
from egjax.losses import z_loss as squared_normaliser
from egjax.losses.blocks import SIZES
from egjax.mesh import mesh_in_use
from egjax.train.data import PairBatch, SharedPairBatch, TokenBatch
from egjax.train.step import LossFn

__all__ = [
    "Apply",
    "Frozen",
    "PairLogps",
    "Taught",
    "distill_to_ratio",
    "distill_to_stored",
    "initial_top_k",
    "next_token",
    "on_pairs",
    "preference",
    "preference_with_initial",
    "ratio_top_k",
    "reference_logps",
    "tokens_a_device",
]

Array = jax.Array
Params = Any


# (params, tokens, positions, segment_ids), the last three int32[B, T] -> logits [B, T, V] or a
# head with hidden states [B, T, D]. For `SharedPairBatch` it is given prefix_ids as well.
Apply = Callable[..., Any]
Pairs = PairBatch | SharedPairBatch


def tokens_a_device(platform: str) -> int:
    """Tokens whose logits a row of devices forms at once on a mesh: enough that reading the
    unembedding from memory takes less time than multiplying with it.

    Args:
        platform: `"cpu"`, `"gpu"` or `"tpu"`.
    """
    return max(512, SIZES.get(platform, SIZES["gpu"]).tokens)


class Frozen(NamedTuple):
    """Parameters of the models that make the target π̄ of distillation."""

    large: Params
    expert: Params
    anti_expert: Params


@struct.dataclass
class Taught:
    """Rows with what a frozen model says about them, computed before (`egjax.train.stored`).

    Attributes:
        rows: a `TokenBatch`, or pairs.
        teacher: `TopK` of each position of the rows [B, T]; of pairs, of each token of both
            completions [B, 2, C].
    """

    rows: Any
    teacher: TopK


class _Completions(NamedTuple):
    """Targets and mask [2B, C] of chosen completions, then of rejected ones."""

    targets: Array
    mask: Array


class PairLogps(NamedTuple):
    """What preference losses are made of, float32[B] each, see `egjax.losses.preference`."""

    chosen: Array
    rejected: Array
    chosen_length: Array
    rejected_length: Array
    ref_chosen: Array
    ref_rejected: Array


PreferenceLoss = Callable[[PairLogps], tuple[Array, Metrics]]


def on_pairs(loss: Callable[..., tuple[Array, Metrics]], **settings: Any) -> PreferenceLoss:
    """A loss of `egjax.losses` as objectives take it.

    Args:
        loss: its arguments are found by their names, those of `PairLogps`.
        settings: its hyper-parameters.
    """
    wanted = [name for name in inspect.signature(loss).parameters if name in PairLogps._fields]

    def bound(pairs: PairLogps) -> tuple[Array, Metrics]:
        return loss(*(getattr(pairs, name) for name in wanted), **settings)

    return bound


def _outputs(apply: Apply, params: Params, batch: TokenBatch | SharedPairBatch) -> Any:
    """Logits or a head, whichever the model gives."""
    return apply(params, batch.tokens, batch.positions, batch.segment_ids)


def _by_device(chunked: Callable[..., Any], student: Head, others: Any, whole: Any) -> Any:
    """A loss in chunks on the mesh in use: each row of devices works on its own tokens.

    So each unembedding is gathered once, and its gradient summed once over the devices; left to
    the compiler both would happen in every chunk.

    Args:
        chunked: `(student, others, whole, **sizes) -> arrays`, one value per row or token.
        student: hidden states [B, ...] and their unembedding.
        others: pytree of teachers and arrays [B, ...].
        whole: pytree of arrays that every device has whole.
    """
    mesh = mesh_in_use()
    if mesh is None:
        return chunked(student, others, whole)
    shards = mesh.shape["model"]
    sizes = {
        "tokens": tokens_a_device(jax.default_backend()),
        "vocab_shards": 1 if student.vocabulary % shards else shards,
    }
    if mesh.shape["data"] == 1:
        return chunked(student, others, whole, **sizes)
    split = PartitionSpec("data")

    def place(x: Any) -> Any:
        if hasattr(x, "pick"):
            return jax.tree.map(lambda _: PartitionSpec(), x).pick(lambda _: split)
        return split

    return jax.shard_map(
        partial(chunked, **sizes),
        in_specs=(
            place(student),
            jax.tree.map(place, others, is_leaf=lambda x: hasattr(x, "pick")),
            jax.tree.map(lambda _: PartitionSpec(), whole),
        ),
        out_specs=split,
        axis_names={"data"},
        check_vma=False,
    )(student, others, whole)


def _weighted_sum(
    student: Head,
    teacher: Any,
    weights: Array,
    terms: Terms,
    vocab_mask: Array | None,
    *,
    temperature: float = 1.0,
    z_loss: float = 0.0,
) -> tuple[Array, Array]:
    """`chunked_loss` on the mesh in use: the sum, and the losses of the tokens."""
    options = {"terms": terms, "temperature": temperature, "z_loss": z_loss}

    def chunked(student: Head, others: Any, mask: Array | None, **sizes: int) -> Any:
        total, losses = chunked_loss(student, *others, vocab_mask=mask, **options, **sizes)
        return total[None], losses

    totals, losses = _by_device(chunked, student, (teacher, weights), vocab_mask)
    return totals.sum(), losses


def _sequence_logps(
    outputs: Any, rows: TokenBatch | _Completions, vocab_mask: Array | None
) -> tuple[Array, Array]:
    if isinstance(outputs, Head):

        def chunked(outputs: Head, others: Any, mask: Array | None, **sizes: int) -> Any:
            return chunked_sequence_logps(outputs, *others, vocab_mask=mask, **sizes)

        return _by_device(chunked, outputs, (rows.targets, rows.mask), vocab_mask)
    return sequence_logps(outputs, rows.targets, rows.mask, vocab_mask)


def _masked_sum(values: Array, mask: Array) -> Array:
    return jnp.where(mask, values, 0.0).sum()


def next_token(apply: Apply, *, vocab_mask: Array | None = None, z_loss: float = 0.0) -> LossFn:
    """Pretraining and multi-task SFT: `-Σ α_v log π(y_m | y_<m, x)` per counted token.

    Args:
        apply: the model.
        vocab_mask: bool[V], False for padded columns.
        z_loss: weight of `egjax.losses.z_loss` in each token's loss.

    Returns:
        Loss over `TokenBatch`; metrics: nll (without the weights α_v), accuracy (of the most
        probable token; not with a head).
    """

    def loss_fn(params: Params, batch: TokenBatch, key: Array, frozen: Any):
        logits = _outputs(apply, params, batch)
        count = batch.mask.sum()
        if isinstance(logits, Head):
            weights = jnp.where(batch.mask, batch.weights, 0.0)
            total, nll = _weighted_sum(
                logits,
                Targets(batch.targets),
                weights,
                forward_kl_terms,
                vocab_mask,
                z_loss=z_loss,
            )
            return total, count, {"nll": (_masked_sum(nll, batch.mask), count)}
        nll = sft(logits, batch.targets, batch.mask, vocab_mask=vocab_mask)
        allowed = logits if vocab_mask is None else jnp.where(vocab_mask, logits, -jnp.inf)
        right = allowed.argmax(-1) == batch.targets
        metrics = {
            "nll": (nll.sum(), count),
            "accuracy": (_masked_sum(right.astype(jnp.float32), batch.mask), count),
        }
        losses = nll
        if z_loss:
            losses = nll + z_loss * squared_normaliser(logits, batch.mask, vocab_mask)
        return (batch.weights * losses).sum(), count, metrics

    return loss_fn


def distill_to_ratio(
    student: Apply,
    large: Apply,
    small: Apply,
    *,
    divergence: Callable[..., Array] = reverse_kl,
    terms: Terms = reverse_kl_terms,
    alpha: float = 1.0,
    clip: float | None = None,
    plausible: float | None = None,
    temperature: float = 1.0,
    vocab_mask: Array | None = None,
) -> LossFn:
    """Distils `π̄ ∝ πᴸ (πᴱ/πᴺ)^α` into the student, on the prefixes of the batch: those of the data
    set, or what a model wrote (`egjax.train.sampling.on_samples`).

    Args:
        student: the model that learns; it usually starts at the large model's parameters.
        large: πᴸ.
        small: πᴱ and πᴺ, one model with two sets of parameters.
        divergence: from `egjax.losses.distill`, called with student logits, the log-probabilities
            of π̄ and `vocab_mask`.
        terms: the same for models that give heads, see `egjax.losses.chunked_loss`.
        alpha: exponent of the ratio.
        clip: bound on the log-ratio, see `egjax.losses.behaviour_ratio`.
        plausible: threshold of the plausible set, see there.
        temperature: divides the student's logits and π̄'s log-probabilities.
        vocab_mask: bool[V], False for padded columns.

    Returns:
        Loss over `TokenBatch`, whose step takes a `Frozen`; metrics: nll (of the data under the
        student), teacher_accuracy (of π̄'s most probable token on the data); none with heads.
    """
    measure = partial(_distilled, divergence, terms, temperature, vocab_mask)

    def loss_fn(params: Params, batch: TokenBatch, key: Array, frozen: Frozen):
        models = (
            _outputs(large, frozen.large, batch),
            _outputs(small, frozen.expert, batch),
            _outputs(small, frozen.anti_expert, batch),
        )
        logits = _outputs(student, params, batch)
        if isinstance(logits, Head):
            return measure(
                logits, Ratio(*models, alpha=alpha, clip=clip, plausible=plausible), batch
            )
        teacher = behaviour_ratio(
            *models, alpha=alpha, clip=clip, plausible=plausible, vocab_mask=vocab_mask
        )
        return measure(logits, teacher, batch)

    return loss_fn


def _distilled(
    divergence: Callable[..., Array],
    terms: Terms,
    temperature: float,
    vocab_mask: Array | None,
    student: Any,
    teacher: Any,
    batch: TokenBatch,
) -> tuple[Array, Array, dict[str, tuple[Array, Array]]]:
    """Loss, count and metrics of logits and a teacher's, or of a head and a chunked teacher."""
    count = batch.mask.sum()
    if isinstance(student, Head):
        weights = jnp.where(batch.mask, batch.weights, 0.0)
        total, _ = _weighted_sum(
            student, teacher, weights, terms, vocab_mask, temperature=temperature
        )
        return total, count, {}
    losses = divergence(student, teacher, temperature=temperature, vocab_mask=vocab_mask)
    # The mask chooses the positions, the task weight says how much each counts.
    total = _masked_sum(batch.weights * losses, batch.mask)
    logps = token_logps(student, batch.targets, vocab_mask)
    right = teacher.argmax(-1) == batch.targets
    metrics = {
        "nll": (-_masked_sum(logps, batch.mask), count),
        "teacher_accuracy": (_masked_sum(right.astype(jnp.float32), batch.mask), count),
    }
    return total, count, metrics


def ratio_top_k(
    large: Apply,
    small: Apply,
    k: int,
    *,
    alpha: float = 1.0,
    clip: float | None = None,
    plausible: float | None = None,
    temperature: float = 1.0,
    vocab_mask: Array | None = None,
) -> Callable[[Frozen, TokenBatch], TopK]:
    """Builds `(frozen, batch) -> TopK`: π̄'s k most probable tokens and the mass of the others, for
    `distill_to_stored`.

    Args:
        large, small: models that give heads.
        k: below V.
        alpha, clip, plausible, temperature, vocab_mask: as in `distill_to_ratio`.
    """

    def top(frozen: Frozen, batch: TokenBatch) -> TopK:
        models = (
            _outputs(large, frozen.large, batch),
            _outputs(small, frozen.expert, batch),
            _outputs(small, frozen.anti_expert, batch),
        )
        ratio = Ratio(*models, alpha=alpha, clip=clip, plausible=plausible)
        return _top_k(ratio, k, temperature, vocab_mask)

    return top


def _top_k(teacher: Head | Ratio, k: int, temperature: float, vocab_mask: Array | None) -> TopK:
    """`chunked_top_k` on the mesh in use."""

    def chunked(_: Head, teacher: Any, mask: Array | None, **sizes: int) -> TopK:
        tokens = sizes.get("tokens")
        return chunked_top_k(teacher, k, temperature=temperature, vocab_mask=mask, tokens=tokens)

    head = teacher.large if isinstance(teacher, Ratio) else teacher
    return _by_device(chunked, head, teacher, vocab_mask)


def distill_to_stored(
    student: Apply,
    *,
    divergence: Callable[..., Array] = reverse_kl,
    terms: Terms = reverse_kl_terms,
    temperature: float = 1.0,
    vocab_mask: Array | None = None,
) -> LossFn:
    """Distils a stored teacher: approximate, see `egjax.losses.TopK`. No teacher is run.

    Args:
        student: the model that learns.
        divergence, terms, vocab_mask: as in `distill_to_ratio`.
        temperature: that of the stored teacher.

    Returns:
        Loss over `Taught` rows of tokens; metrics as in `distill_to_ratio`.
    """

    def loss_fn(params: Params, batch: Taught, key: Array, frozen: Any):
        rows, teacher = batch.rows, batch.teacher
        logits = _outputs(student, params, rows)
        if isinstance(logits, Head):
            return _distilled(divergence, terms, temperature, vocab_mask, logits, teacher, rows)
        flat = logits.reshape(-1, logits.shape[-1])
        teacher = teacher.pick(lambda x: x.reshape(flat.shape[0], *x.shape[rows.tokens.ndim :]))
        scores: Any = teacher.scores(jnp.float32(temperature), vocab_mask)
        known = scores(jax.lax.stop_gradient(flat)).reshape(logits.shape)
        return _distilled(divergence, terms, temperature, vocab_mask, logits, known, rows)

    return loss_fn


def _both(batch: Pairs) -> TokenBatch | _Completions:
    """Chosen and rejected rows as one batch."""
    if isinstance(batch, PairBatch):
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), batch.chosen, batch.rejected)
    return _Completions(_sides_first(batch.targets), _sides_first(batch.target_mask))


def _sides_first(x: Array) -> Array:
    """[B, 2, C, ...] -> [2B, C, ...]."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])


def _pair_outputs(apply: Apply, params: Params, batch: Pairs) -> Any:
    """Logits or head of the rows of `_both`, from one pass of the model.

    Of a shared prompt only the position before the completions gets logits.
    """
    if isinstance(batch, PairBatch):
        rows: Any = _both(batch)
        return _outputs(apply, params, rows)
    outputs = _outputs(partial(apply, prefix_ids=batch.prefix_ids), params, batch)

    def predicting(x: Array) -> Array:
        index = batch.sources.reshape(batch.sources.shape[0], -1, 1)
        taken = jnp.take_along_axis(x, index, axis=1)
        return _sides_first(taken.reshape(*batch.sources.shape, -1))

    return outputs.pick(predicting) if isinstance(outputs, Head) else predicting(outputs)


def _halves(x: Array) -> tuple[Array, Array]:
    return x[: x.shape[0] // 2], x[x.shape[0] // 2 :]


def _pair_metrics(metrics: Metrics, mask: Array) -> dict[str, tuple[Array, Array]]:
    return {name: (_masked_sum(v, mask), mask.sum()) for name, v in metrics._asdict().items()}


def preference(
    apply: Apply,
    loss: PreferenceLoss,
    *,
    kl_weight: float = 0.0,
    vocab_mask: Array | None = None,
) -> LossFn:
    """Preference optimisation with the reference's log-probabilities read from the batch.

    Args:
        apply: the model; one that gives heads if λ > 0.
        loss: e.g. `on_pairs(dpo, beta=0.1)`.
        kl_weight: λ ≥ 0, of the KL to a stored initial policy: approximate, see
            `egjax.losses.TopK`.
        vocab_mask: bool[V], False for padded columns.

    Returns:
        Loss over `PairBatch` or `SharedPairBatch`, if λ > 0 over `Taught` ones, per pair; metrics
        as in `egjax.losses.Metrics`, and kl_top_k (nats per completion) if λ > 0.
    """

    def loss_fn(params: Params, batch: Pairs | Taught, key: Array, frozen: Any):
        pairs = batch.rows if isinstance(batch, Taught) else batch
        rows = _both(pairs)
        outputs = _pair_outputs(apply, params, pairs)
        logps, lengths = _sequence_logps(outputs, rows, vocab_mask)
        losses, metrics = loss(
            PairLogps(*_halves(logps), *_halves(lengths), pairs.ref_chosen, pairs.ref_rejected)
        )
        total, count = _masked_sum(losses, pairs.mask), pairs.mask.sum()
        means = _pair_metrics(metrics, pairs.mask)
        if not kl_weight:
            return total, count, means
        assert isinstance(batch, Taught)
        initial = batch.teacher.pick(_sides_first)
        penalty, kl = _penalty(outputs, initial, rows, pairs, kl_weight, vocab_mask)
        return total + penalty, count, means | {"kl_top_k": (kl, count)}

    return loss_fn


def _penalty(
    student: Head,
    initial: Any,
    rows: TokenBatch | _Completions,
    pairs: Pairs,
    kl_weight: float,
    vocab_mask: Array | None,
) -> tuple[Array, Array]:
    """Sums over a batch of `λ KL(π ‖ π₀)`, and of the KL, averaged over the completions of each
    pair."""
    counted = rows.mask & jnp.concatenate([pairs.mask, pairs.mask])[:, None]
    weights = kl_weight / 2 * counted
    penalty, kls = _weighted_sum(student, initial, weights, reverse_kl_terms, vocab_mask)
    return penalty, _masked_sum(kls, counted) / 2


def preference_with_initial(
    apply: Apply,
    loss: PreferenceLoss,
    *,
    kl_weight: float,
    vocab_mask: Array | None = None,
) -> LossFn:
    """Preference optimisation with the initial policy π₀ at hand: its log-probabilities as the
    reference, and `λ KL(π ‖ π₀)` on the completions of both plans.

    With `dpo_paper` it is the objective of arXiv 2506.01312; the KL is exact per token, summed
    over a completion and averaged over the two of a pair.

    Args:
        apply: the model.
        loss: e.g. `on_pairs(dpo_paper, beta=0.1)`.
        kl_weight: λ ≥ 0; the KL is not computed at 0.
        vocab_mask: bool[V], False for padded columns.

    Returns:
        Loss over `PairBatch` or `SharedPairBatch`, per pair, whose step takes the parameters of π₀
        as `frozen`; metrics as in `egjax.losses.Metrics`, and kl (nats per completion) if λ > 0.
    """

    def loss_fn(params: Params, batch: Pairs, key: Array, frozen: Params):
        rows = _both(batch)
        initial = _pair_outputs(apply, frozen, batch)
        logits = _pair_outputs(apply, params, batch)
        ref_logps, _ = _sequence_logps(initial, rows, vocab_mask)
        logps, lengths = _sequence_logps(logits, rows, vocab_mask)
        losses, metrics = loss(PairLogps(*_halves(logps), *_halves(lengths), *_halves(ref_logps)))
        count = batch.mask.sum()
        if not kl_weight:
            total = _masked_sum(losses, batch.mask)
            return total, count, _pair_metrics(metrics, batch.mask)
        if isinstance(logits, Head):
            penalty, kl = _penalty(logits, initial, rows, batch, kl_weight, vocab_mask)
            metrics = _pair_metrics(metrics, batch.mask) | {"kl": (kl, count)}
            return _masked_sum(losses, batch.mask) + penalty, count, metrics
        chosen_kl, rejected_kl = _halves(kl_to_initial(logits, initial, rows.mask, vocab_mask))
        kl = (chosen_kl + rejected_kl) / 2
        total = _masked_sum(losses + kl_weight * kl, batch.mask)
        return (
            total,
            count,
            {
                **_pair_metrics(metrics, batch.mask),
                "kl": (_masked_sum(jax.lax.stop_gradient(kl), batch.mask), count),
            },
        )

    return loss_fn


def reference_logps(
    apply: Apply, *, vocab_mask: Array | None = None
) -> Callable[[Params, Pairs], Pairs]:
    """Builds a jitted function that fills in a batch's reference log-probabilities.

    Args:
        apply: the reference model.
        vocab_mask: bool[V], False for padded columns.

    Returns:
        `(params, batch) -> batch` with `ref_chosen` and `ref_rejected`.
    """

    @jax.jit
    def fill(params: Params, batch: Pairs) -> Pairs:
        rows = _both(batch)
        logps, _ = _sequence_logps(_pair_outputs(apply, params, batch), rows, vocab_mask)
        chosen, rejected = _halves(logps)
        return dataclasses.replace(batch, ref_chosen=chosen, ref_rejected=rejected)

    return fill


def initial_top_k(
    apply: Apply, k: int, *, vocab_mask: Array | None = None
) -> Callable[[Params, Pairs], TopK]:
    """Builds `(params, batch) -> TopK` of the initial policy on both completions of each pair,
    [B, 2, C], for `preference` over `Taught` pairs.

    Args:
        apply: the initial policy, giving heads.
        k: tokens that are kept, below V.
        vocab_mask: bool[V], False for padded columns.
    """

    def top(params: Params, batch: Pairs) -> TopK:
        found = _top_k(_pair_outputs(apply, params, batch), k, 1.0, vocab_mask)
        return found.pick(lambda x: x.reshape(2, -1, *x.shape[1:]).swapaxes(0, 1))

    return top
