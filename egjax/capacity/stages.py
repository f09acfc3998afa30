"""The function of each stage with abstract arguments: what training and decoding run, unrun."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from egjax.errors import EgjaxError
from egjax.lm import int8, params
from egjax.lm.config import LlamaConfig
from egjax.lm.generate import Prompts, generate
from egjax.lm.params import Params
from egjax.lm.ratio import ratio_combine
from egjax.losses import dpo_paper
from egjax.mesh import check_divides, sharding
from egjax.train.data import PairBatch, TokenBatch
from egjax.train.layout import Layout, PlacedStep, applied, placed_step
from egjax.train.objectives import (
    Frozen,
    PairLogps,
    distill_to_ratio,
    next_token,
    preference_with_initial,
)
from egjax.train.optim import OptimConfig, make_optimizer
from egjax.train.step import LossFn

__all__ = ["LEAN", "STAGES", "Case", "Program", "frozen_table", "program", "training_step"]

Stage = Literal["sft", "dpo", "distill", "decode"]
Platform = Literal["tpu", "gpu", "cpu"]
STAGES: tuple[Stage, ...] = ("sft", "dpo", "distill", "decode")
_ANY_STEPS = 1000  # of the schedule; it changes a constant of the program

LEAN = Layout(remat="full", chunked=True, master="float32")
"""What large models need on any machine."""


@dataclass(frozen=True)
class Case:
    """What is to run.

    Attributes:
        stage: `sft` (next tokens); `dpo` (the paper's, π₀ frozen beside the policy); `distill`
            (reverse KL to π̄ of three frozen models); `decode` (from π̄, three models).
        model: πᴸ, or the model that is trained by `sft` and `dpo`.
        expert: πᴱ, and πᴺ, of `distill` and `decode`.
        batch: rows; pairs for `dpo`, which have two each.
        length: tokens a row; prompt and completion together when decoding.
        new_tokens: of `length`, those that are decoded.
        layout: see `egjax.train.layout.Layout`.
        int8: the matrices of frozen models in eight bits, see `egjax.lm.int8`.
        platform: `"tpu"`, `"gpu"` or, to test against, `"cpu"`: which attention, and how large the
            chunks of losses.
    """

    stage: Stage
    model: LlamaConfig
    expert: LlamaConfig
    batch: int
    length: int
    new_tokens: int = 128
    layout: Layout = LEAN
    int8: bool = False
    platform: Platform = "tpu"

    def __post_init__(self):
        longest = self.model.max_seq_len
        if self.batch < 1 or not 2 <= self.length <= longest:
            raise EgjaxError(
                f"batch {self.batch}, length {self.length}",
                remedy=f"at least one row of 2 to {longest} tokens",
            )
        if self.stage == "decode" and not 1 <= self.new_tokens < self.length:
            raise EgjaxError(
                f"{self.new_tokens} new tokens of {self.length}", remedy="leave room for a prompt"
            )
        if self.layout.accumulate < 1 or self.batch % self.layout.accumulate:
            raise EgjaxError(
                f"{self.layout.accumulate} micro-batches of a batch of {self.batch}",
                remedy="give a divisor",
            )

    @property
    def rows(self) -> int:
        """Sequences that go through the model at once."""
        rows = self.batch * (2 if self.stage == "dpo" else 1)
        return rows if self.stage == "decode" else rows // self.layout.accumulate

    @property
    def frozen(self) -> tuple[LlamaConfig, ...]:
        """Models beside the one that is trained; of `decode` all three."""
        return {
            "sft": (),
            "dpo": (self.model,),
            "distill": (self.model, self.expert, self.expert),
            "decode": (self.model, self.expert, self.expert),
        }[self.stage]


class Program(NamedTuple):
    """A jittable function and its arguments.

    Attributes:
        function: jitted.
        arguments: pytrees of `jax.ShapeDtypeStruct` with shardings.
    """

    function: Any
    arguments: tuple[Any, ...]


def training_step(case: Case, mesh: Mesh) -> PlacedStep:
    """The step of a training stage as `experiments.training` builds it."""
    tx = make_optimizer(OptimConfig(), _ANY_STEPS)
    return placed_step(_loss(case), case.model, tx, mesh, case.layout)


def program(case: Case, mesh: Mesh) -> Program:
    """The function of a stage on a mesh, for `jit(...).lower(...)`.

    Raises:
        EgjaxError: the batch does not split over the mesh.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=everywhere)
    frozen = [_weights(config, case, mesh) for config in case.frozen]
    if case.stage == "decode":
        prompts = _prompts(case, everywhere)
        return Program(_decoder(case), (tuple(frozen), prompts, key))
    check_divides(mesh, case.batch // case.layout.accumulate)
    step = training_step(case, mesh)
    beside: Any = None
    if frozen:
        beside = frozen[0] if case.stage == "dpo" else Frozen(*frozen)
    return Program(step.step, (step.state, _batch(case, step.batch), key, beside))


def _loss(case: Case) -> LossFn:
    apply = applied(case.model, case.layout)
    if case.stage == "sft":
        return next_token(apply)
    if case.stage == "distill":
        return distill_to_ratio(apply, apply, applied(case.expert, case.layout))

    def loss(p: PairLogps) -> Any:
        return dpo_paper(p.chosen, p.rejected, beta=0.1)

    return preference_with_initial(apply, loss, kl_weight=0.1)


def _decoder(case: Case) -> Callable[..., Any]:
    configs = case.frozen
    combine = ratio_combine()

    def decode(weights: tuple[Params, ...], prompts: Prompts, key: jax.Array):
        models = list(zip(weights, configs))
        return generate(
            models, prompts, key, max_new_tokens=case.new_tokens, combine=combine, temperature=0.0
        )

    return jax.jit(decode)


def frozen_table(config: LlamaConfig, case: Case) -> dict[str, Any]:
    """Shape, dtype and axes of every tensor of a frozen model."""
    return int8.table(config) if case.int8 else params.table(config)


def _weights(config: LlamaConfig, case: Case, mesh: Mesh) -> Any:
    def one(spec: params.Spec) -> jax.ShapeDtypeStruct:
        place = sharding(mesh, spec.axes, spec.shape)
        return jax.ShapeDtypeStruct(spec.shape, jnp.dtype(spec.dtype), sharding=place)

    weights = jax.tree.map(one, frozen_table(config, case))
    if case.stage != "decode" or case.platform != "gpu" or mesh.size > 1:
        return weights

    here = sharding(mesh, (), ())
    layer = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=here), weights["layers"]
    )
    # As `experiments.models.for_decoding` takes them apart.
    return {**weights, "layers": (layer,) * config.num_layers}


def _prompts(case: Case, place: NamedSharding) -> Prompts:
    def array(dtype: Any) -> Any:
        shape = (case.batch, case.length - case.new_tokens)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    return Prompts(tokens=array(jnp.int32), mask=array(jnp.bool_))


def _batch(case: Case, place: NamedSharding) -> TokenBatch | PairBatch:
    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def rows() -> TokenBatch:
        shape = (case.batch, case.length)
        return TokenBatch(
            tokens=array(jnp.int32, *shape),
            targets=array(jnp.int32, *shape),
            mask=array(jnp.bool_, *shape),
            weights=array(jnp.float32, *shape),
            positions=array(jnp.int32, *shape),
            segment_ids=array(jnp.int32, *shape),
        )

    if case.stage != "dpo":
        return rows()
    logps = array(jnp.float32, case.batch)
    return PairBatch(rows(), rows(), logps, logps, array(jnp.bool_, case.batch))
