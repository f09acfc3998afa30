"""The real TPU compiler, where it is installed; its absence, where it is not."""

import jax
import pytest

from egjax.capacity import compiled
from egjax.capacity.chips import CHIPS, parse
from egjax.capacity.compiled import _refused, compile_for, devices_of, has_compiler
from egjax.capacity.plan import compiled_plan
from egjax.capacity.stages import Case, training_step
from egjax.errors import EgjaxError
from egjax.lm.config import LlamaConfig
from egjax.lm.params import abstract, shardings
from egjax.mesh import make_mesh
from egjax.train.layout import Layout

needs_libtpu = pytest.mark.skipif(not has_compiler(CHIPS["v5e"]), reason="libtpu is not installed")
CONFIG = LlamaConfig(
    512, 256, 512, 2, 8, 8, 128, max_seq_len=512, tie_embeddings=False, dtype="bfloat16"
)
LAYOUT = Layout(remat="full", chunked=True, master="float32", attention="splash")


def test_what_cannot_be_compiled_for_is_told(monkeypatch):
    monkeypatch.setattr(compiled, "has_compiler", lambda chip: False)
    with pytest.raises(EgjaxError, match=r"h100:8 cannot be compiled.*egjax\[cuda\]"):
        devices_of(parse("h100:8"))
    with pytest.raises(EgjaxError, match=r"v5e:2x2 cannot be compiled.*egjax\[tpu\]"):
        devices_of(parse("v5e:2x2"))


def test_a_refusal_says_how_much_was_wanted():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (17.78G) exceeds available HBM (15.75G)."
    )
    found = _refused(message, 3.0, 2.0)
    assert found.refused == 17.78 * 2**30
    assert found.message == message
    assert (found.seconds, found.cpu_seconds) == (3.0, 2.0)
    with pytest.raises(EgjaxError, match="the compiler failed: INTERNAL: no luck"):
        _refused("INTERNAL: no luck\nmore", 0.0, 0.0)


SHARDINGS = """
import jax
from test_compiled import CONFIG, LAYOUT
from egjax.capacity.stages import Case, training_step
from egjax.lm.params import init, shardings
from egjax.mesh import make_mesh
from egjax.train.layout import masters
from egjax.train.optim import OptimConfig, make_optimizer
from egjax.train.step import init_state

mesh = make_mesh(data=2, model=2)
shown = training_step(Case("sft", CONFIG, CONFIG, 4, 128, layout=LAYOUT), mesh)
params = masters(init(jax.random.key(0), CONFIG, mesh), LAYOUT)
state = init_state(params, make_optimizer(OptimConfig(), 1000), shown.shardings)
for have, want in zip(jax.tree.leaves(state), jax.tree.leaves(shown.state), strict=True):
    assert (have.shape, have.dtype) == (want.shape, want.dtype)
    assert have.sharding.is_equivalent_to(want.sharding, have.ndim)
    assert have.addressable_shards[0].data.shape == want.sharding.shard_shape(want.shape)
    print(want.sharding.spec)
"""


def test_the_sharding_that_a_plan_shows_is_that_of_training(on_devices):
    specs = on_devices(SHARDINGS, 4).splitlines()
    assert "P(None, 'data', 'model')" in [s.replace("PartitionSpec(", "P(") for s in specs]
    assert len(specs) > 30


@needs_libtpu
def test_the_compiler_keeps_the_shardings_and_counts_what_is_sent():
    topology = parse("v5e:2x2")
    case = Case("sft", CONFIG, CONFIG, 4, 128, layout=LAYOUT)
    mesh = make_mesh(data=2, model=2, devices=devices_of(topology))
    step = training_step(case, mesh)
    assert step.shardings.params == shardings(CONFIG, mesh)
    plan = compiled_plan(case, topology, 2, 2)
    assert plan.fits
    assert plan.method == "compiled"
    state = sum(x.size * 12 for x in jax.tree.leaves(abstract(CONFIG))) / 4
    assert plan.memory["weights"] + plan.memory["optimizer"] == pytest.approx(state)
    operations = {c["operation"] for c in plan.collectives}
    assert operations
    assert 0 < plan.collective_bytes < 1e9


@needs_libtpu
def test_what_does_not_fit_is_refused_by_the_compiler():
    huge = LlamaConfig(
        1024, 8192, 28672, 80, 64, 8, 128, max_seq_len=512, dtype="bfloat16", tie_embeddings=False
    )
    case = Case("sft", huge, huge, 4, 128, layout=LAYOUT)
    plan = compiled_plan(case, parse("v5e:2x2"), 2, 2)
    assert not plan.fits
    assert "RESOURCE_EXHAUSTED" in (plan.note or "")


@needs_libtpu
def test_topologies_that_libtpu_has_not_are_refused():
    with pytest.raises(EgjaxError, match="libtpu refuses topology v5e:3x3"):
        compile_for(Case("sft", CONFIG, CONFIG, 9, 128), parse("v5e:3x3"), 9, 1)
