"""A step laid out on a mesh is the step of one device, whatever it trades."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from processes import cpus

from egjax.errors import EgjaxError
from egjax.lm.config import LlamaConfig
from egjax.lm.params import abstract, init
from egjax.mesh import make_mesh
from egjax.train.layout import Layout, applied, masters, placed_step
from egjax.train.objectives import next_token

CONFIG = LlamaConfig(24, 16, 32, 2, 4, 2, 4, max_seq_len=16, tie_embeddings=False)

EQUAL = """
import sys
import jax, jax.numpy as jnp, numpy as np, optax
from dataclasses import replace
from egjax.lm.config import LlamaConfig
from egjax.lm.model import REMAT
from egjax.lm.params import init, shardings
from egjax.losses import dpo_paper
from egjax.mesh import make_mesh
from egjax.train.data import PairBatch, TokenBatch
from egjax.train.layout import Layout, applied, masters, placed_step
from egjax.train.objectives import *
from egjax.train.step import init_state

B, T = 4, 8
config = LlamaConfig(24, 16, 32, 2, 4, 2, 4, max_seq_len=16, tie_embeddings=False)
small = replace(config, hidden_size=8, tie_embeddings=True)

def rows(seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 24, (B, T + 1)).astype(np.int32)
    return TokenBatch(tokens[:, :-1], tokens[:, 1:], rng.random((B, T)) < 0.7,
                      rng.random((B, T)).astype(np.float32) + 0.5,
                      np.tile(np.arange(T, dtype=np.int32), (B, 1)), np.ones((B, T), np.int32))

def loss(name, layout):
    apply = applied(config, layout)
    if name == "sft":
        return next_token(apply), rows(0), lambda place: None
    if name == "distill":
        def frozen(place):
            keys = jax.random.split(jax.random.key(5), 3)
            configs = (config, small, small)
            return Frozen(*(place(init(k, c), c) for k, c in zip(keys, configs)))
        loss = distill_to_ratio(apply, apply, applied(small, layout), clip=1.0, alpha=0.7)
        return loss, rows(0), frozen
    pairs = PairBatch(rows(0), rows(1), np.zeros(B, np.float32), np.zeros(B, np.float32),
                      np.ones(B, bool))
    paper = lambda p: dpo_paper(p.chosen, p.rejected, beta=0.1)
    return (preference_with_initial(apply, paper, kl_weight=0.3), pairs,
            lambda place: place(init(jax.random.key(9), config), config))

def run(name, mesh, layout):
    fn, batch, frozen = loss(name, layout)
    placed = placed_step(fn, config, optax.sgd(0.5), mesh, layout)
    put = lambda params, c: jax.device_put(params, shardings(c, mesh))
    state = init_state(masters(put(init(jax.random.key(0), config), config), layout),
                       optax.sgd(0.5), placed.shardings)
    # What the plan shows is what training has.
    for have, shown in zip(jax.tree.leaves(state), jax.tree.leaves(placed.state), strict=True):
        assert (have.shape, have.dtype) == (shown.shape, shown.dtype)
        assert have.sharding.is_equivalent_to(shown.sharding, have.ndim)
    state, metrics = placed.step(state, batch, jax.random.key(1), frozen(put))
    assert jax.tree.leaves(jax.tree.map(lambda x: x.sharding, state)) == jax.tree.leaves(
        placed.shardings)
    return jax.device_get((state.params, metrics["loss"], metrics["grad_norm"]))

one, many = make_mesh(devices=jax.devices()[:1]), make_mesh(data=2, model=2)
for name in sys.argv[1:]:
    want = run(name, one, Layout())
    lean = Layout(model=2, remat="full", chunked=True, accumulate=1 if name == "dpo" else 2)
    plain = [Layout(model=2, remat=remat) for remat in REMAT]
    for layout in (*plain, lean) if name == "sft" else (lean,):
        got = run(name, many, layout)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), got, want)
"""


@pytest.mark.parametrize("names", [("sft", "dpo"), ("distill",)], ids=" ".join)
def test_a_mesh_remat_chunks_and_micro_batches_change_nothing(names, request):
    done = subprocess.run(
        [sys.executable, "-c", EQUAL, *names],
        capture_output=True,
        text=True,
        cwd=request.config.rootpath,
        env={
            **os.environ,
            **cpus(4),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_masters_are_wide_and_the_model_computes_in_its_own_type():
    config = LlamaConfig(24, 16, 32, 1, 2, 1, 8, tie_embeddings=False, dtype="bfloat16")
    layout = Layout(chunked=True, master="float32")
    params = masters(init(jax.random.key(0), config), layout)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    ids = jnp.ones((1, 4), jnp.int32)
    head = applied(config, layout)(params, ids, ids, ids)
    assert head.hidden.dtype == head.unembedding.dtype == jnp.bfloat16
    placed = placed_step(
        next_token(applied(config, layout)),
        config,
        optax.adam(1e-3),
        make_mesh(devices=jax.devices()[:1]),
        layout,
    )
    moments = [x for x in jax.tree.leaves(placed.state.opt_state) if x.ndim]
    assert {x.dtype for x in moments} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"model": 0}, "model = 0 of a layout is less than 1"),
        ({"accumulate": 0}, "accumulate = 0"),
        ({"master": "int8"}, "cannot be trained in 'int8'"),
        ({"remat": "some"}, r"training.layout.remat: no remat policy 'some' \(one of none, sel"),
        ({"remat": True}, "no remat policy True"),
    ],
)
def test_layouts_that_cannot_be_are_refused(wrong, said):
    with pytest.raises(EgjaxError, match=said):
        Layout(**wrong)


def test_one_function_for_one_layout():
    assert applied(CONFIG, Layout(remat="full")) is applied(CONFIG, Layout(remat="full"))
    assert applied(CONFIG, Layout(remat="full")) is not applied(CONFIG, Layout())
    assert masters(abstract(CONFIG), Layout()) == abstract(CONFIG)
