"""The optimiser and one step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from train_toy import apply, batches, init

from egjax.errors import EgjaxError
from egjax.train.objectives import next_token
from egjax.train.optim import SCHEDULES, OptimConfig, decays, make_optimizer, warmup_cosine
from egjax.train.step import init_state, make_train_step


def test_schedule_warms_up_and_decays():
    config = OptimConfig(learning_rate=1.0, warmup=0.1, final=0.2)
    rate = warmup_cosine(config, 100)
    np.testing.assert_allclose([rate(0), rate(9), rate(10)], [0.1, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(rate(100), 0.2, rtol=1e-6)
    values = np.array([float(rate(i)) for i in range(101)])
    assert (np.diff(values[:10]) > 0).all()
    assert (np.diff(values[10:]) <= 0).all()
    constant = warmup_cosine(OptimConfig(learning_rate=1.0, warmup=0.0, final=1.0), 10)
    np.testing.assert_allclose([constant(i) for i in range(10)], 1.0)


@pytest.mark.parametrize(
    ("name", "want"),
    [
        # At the steps 9 (peak), 45, 79, 90 and 100 of 100, peak 1, warm-up 0.1, final 0.2.
        ("cosine", [1.0, 0.2 + 0.8 * (1 + np.cos(np.pi * 35 / 90)) / 2, None, None, 0.2]),
        ("linear", [1.0, 1 - 0.8 * 35 / 90, None, None, 0.2]),
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("wsd", [1.0, 1.0, 1.0, 0.6, 0.2]),
    ],
)
def test_schedules_by_name(name, want):
    rate = SCHEDULES[name](OptimConfig(learning_rate=1.0, warmup=0.1, final=0.2, decay=0.2), 100)
    np.testing.assert_allclose([rate(0), rate(4)], [0.1, 0.5], rtol=1e-6)
    for step, value in zip((9, 45, 79, 90, 100), want):
        if value is not None:
            np.testing.assert_allclose(rate(step), value, rtol=1e-6)


def test_norms_and_biases_do_not_decay():
    params = {"layers": {"attn_norm": jnp.ones((3, 4)), "wq": jnp.ones((3, 4, 4))}, "bias": 1.0}
    assert decays(params) == {"layers": {"attn_norm": False, "wq": True}, "bias": False}
    tx = make_optimizer(OptimConfig(weight_decay=0.5), 10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(lambda g, p: tx.update(g, tx.init(p), p))(zeros, params)
    assert float(jnp.abs(updates["layers"]["wq"]).max()) > 0
    assert float(jnp.abs(updates["layers"]["attn_norm"]).max()) == 0


def test_the_gradient_is_clipped():
    tx = make_optimizer(OptimConfig(learning_rate=1.0, clip=1.0, weight_decay=0.0, beta1=0.0), 10)
    update = jax.jit(lambda g: tx.update(g, tx.init(g), g))
    small, large = {"w": jnp.array([0.6, 0.8])}, {"w": jnp.array([60.0, 80.0])}
    step = [update(g) for g in (small, large)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *step)


def test_bad_configs_are_told():
    with pytest.raises(EgjaxError, match="warmup = 2"):
        OptimConfig(warmup=2)
    for options, said in (
        ({"clip": 0.0}, "clip = 0 would let nothing be learnt"),
        ({"beta1": 1.0}, "beta1 = 1 would let nothing"),
        ({"beta2": 1.5}, "beta2 = 1.5 is not between 0 and 1"),
        ({"eps": -1.0}, "eps = -1.0 is not between 0 and 1"),
        ({"eps": float("nan")}, "eps = nan is not between"),
        ({"learning_rate": float("inf")}, "learning_rate = inf is not"),
    ):
        with pytest.raises(EgjaxError, match=said):
            OptimConfig(**options)


def test_micro_batches_that_do_not_divide_a_batch_are_told():
    tx = make_optimizer(OptimConfig(), 10)
    state = init_state(init(), tx)
    step = make_train_step(next_token(apply), tx, accumulate=3)
    with pytest.raises(EgjaxError, match="3 micro-batches do not divide 4 rows"):
        step(state, next(batches()), jax.random.key(0))
    with pytest.raises(EgjaxError, match="0 micro-batches a step"):
        make_train_step(next_token(apply), tx, accumulate=0)


def test_loss_falls_and_norms_are_logged():
    tx = make_optimizer(OptimConfig(learning_rate=0.03), 60)
    step = make_train_step(next_token(apply), tx)
    state, data, key = init_state(init(), tx), batches(), jax.random.key(0)
    losses = []
    for _ in range(60):
        state, metrics = step(state, next(data), key)
        losses.append(float(metrics["nll"]))
    assert losses[-1] < 0.3 * losses[0]
    assert int(state.step) == 60
    np.testing.assert_allclose(metrics["param_norm"], optax.global_norm(state.params), rtol=1e-6)
    assert metrics["grad_norm"] > 0 < metrics["update_norm"]
    assert metrics["accuracy"] > 0.8
    assert step._cache_size() == 1


def test_the_gradient_is_that_of_the_mean_over_what_counts():
    batch, loss_fn = next(batches()), next_token(apply)
    state, metrics = make_train_step(loss_fn, optax.sgd(0.5))(
        init_state(init(), optax.sgd(0.5)), batch, jax.random.key(0)
    )

    def mean(params):
        total, count, _ = loss_fn(params, batch, jax.random.key(0), None)
        return total / count

    value, grads = jax.jit(jax.value_and_grad(mean))(init())
    want = jax.tree.map(lambda p, g: p - 0.5 * g, init(), grads)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.params, want
    )
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.global_norm(grads), rtol=1e-5)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_gradients_equal_those_of_the_whole_batch(accumulate):
    # Rows hold different numbers of counted tokens: a mean of means would differ.
    tx = optax.sgd(0.5)
    batch, key = next(batches(batch_size=8)), jax.random.key(0)
    assert len(set(batch.mask.sum(1).tolist())) > 1
    whole = make_train_step(next_token(apply), tx)(init_state(init(), tx), batch, key)
    parts = make_train_step(next_token(apply), tx, accumulate=accumulate)(
        init_state(init(), tx), batch, key
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, parts)


def test_the_step_uses_its_own_key_each_time():
    def loss_fn(params, batch, key, frozen):
        noise = jax.random.normal(key)
        return (params["w"] * noise).sum(), 1.0, {"noise": (noise, 1.0)}

    tx = optax.sgd(0.1)
    step = make_train_step(loss_fn, tx)
    state, noises = init_state({"w": jnp.ones(2)}, tx), []
    for _ in range(3):
        state, metrics = step(state, None, jax.random.key(7))
        noises.append(float(metrics["noise"]))
    assert len(set(noises)) == 3
    state = init_state({"w": jnp.ones(2)}, tx).replace(step=jnp.int32(2))
    assert float(step(state, None, jax.random.key(7))[1]["noise"]) == noises[2]


def test_a_step_leaves_the_first_parameters_alone():
    params, tx = init(), optax.sgd(0.1)
    step = make_train_step(next_token(apply), tx)
    step(init_state(params, tx), next(batches()), jax.random.key(0), params)
    assert not any(x.is_deleted() for x in jax.tree.leaves(params))


def test_a_step_that_is_not_finite_changes_nothing_nor_do_those_after_it():
    tx = make_optimizer(OptimConfig(), 10)
    step, data = make_train_step(next_token(apply), tx), batches()
    state, _ = step(init_state(init(), tx), next(data), jax.random.key(0))
    want = jax.tree.map(np.asarray, state)
    batch = next(data)
    state, metrics = step(
        state, batch.replace(weights=np.full_like(batch.weights, np.inf)), jax.random.key(0)
    )
    assert not np.isfinite(metrics["loss"])
    for _ in range(2):
        assert int(state.step) == -2
        jax.tree.map(np.testing.assert_array_equal, state.replace(step=want.step), want)
        state, _ = step(state, next(data), jax.random.key(0))


def test_a_batch_that_counts_nothing_changes_nothing():
    tx = make_optimizer(OptimConfig(weight_decay=0.0), 10)
    batch = next(batches())
    batch = batch.replace(mask=np.zeros_like(batch.mask))
    step = make_train_step(next_token(apply), tx)
    state, metrics = step(init_state(init(), tx), batch, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, state.params, init())
    assert float(metrics["loss"]) == 0.0


MESH = """
import jax, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from train_toy import apply, batches, init
from egjax.train.objectives import next_token
from egjax.train.optim import OptimConfig, make_optimizer
from egjax.train.step import init_state, make_train_step, state_shardings

mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
# Sharded between replicated: left to itself, the compiler shards the neighbours after one step.
specs = {"embed": P(), "hidden": P("data", "model"), "out": P(), "out_bias": P()}
params, tx = init(), make_optimizer(OptimConfig(learning_rate=0.03), 10)
shardings = state_shardings(tx, params, {k: NamedSharding(mesh, s) for k, s in specs.items()}, mesh)

def run(state, step):
    data = batches()
    for _ in range(4):
        state, metrics = step(state, next(data), jax.random.key(0))
    return state, metrics

plain = run(init_state(params, tx), make_train_step(next_token(apply), tx))
state = init_state(jax.device_put(params, shardings.params), tx, shardings)
sharded = run(state, make_train_step(next_token(apply), tx, shardings=shardings,
              batch_sharding=NamedSharding(mesh, P("data"))))
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), plain, sharded)
jax.tree.map(lambda x, s: None if x.sharding.is_equivalent_to(s, x.ndim) else 1 / 0,
             sharded[0], shardings)
moments = [x for x in jax.tree.leaves(sharded[0].opt_state) if x.shape == (8, 8)]
assert len(moments) == 2 and all(x.addressable_shards[0].data.shape == (4, 4) for x in moments)
"""


def test_four_devices_equal_one_and_keep_their_shardings(on_devices):
    on_devices(MESH, 4)
