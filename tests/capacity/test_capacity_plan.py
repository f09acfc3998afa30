"""Plans by formula: topologies, what fits, what is advised, what is refused."""

from dataclasses import replace

import jax
import pytest

from egjax.capacity import formula
from egjax.capacity import plan as plan_module
from egjax.capacity.chips import CHIPS, parse
from egjax.capacity.compiled import Compiled
from egjax.capacity.plan import _advice, _leaner, compiled_plan, formula_plan, meshes
from egjax.capacity.presets import PRESETS, preset
from egjax.capacity.stages import STAGES, Case, program, training_step
from egjax.errors import EgjaxError
from egjax.lm.config import LlamaConfig
from egjax.lm.model import REMAT
from egjax.lm.params import count
from egjax.mesh import make_mesh
from egjax.train.layout import Layout

TINY = LlamaConfig(32, 16, 32, 2, 4, 2, 4, max_seq_len=64, dtype="bfloat16")
GIB = 2**30


def case(stage="sft", model="8b", batch=64, length=4096, **changes):
    return Case(stage, preset(model), preset("8b"), batch, length, **changes)


@pytest.mark.parametrize(
    ("text", "chips"), [("v5e:16x16", 256), ("v5p:4x4x4", 64), ("V6E:8x8", 64), ("h100:8", 8)]
)
def test_topologies_count_chips(text, chips):
    topology = parse(text)
    assert topology.chips == chips
    assert topology.name == text.lower()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5e-16", "e.g. v5e:16x16"),
        ("v9:4x4", "no chip 'v9'.*one of v5e"),
        ("v5p:8x8", "3 dimensions"),
        ("v5e:16x32", "512 chips.*1 to 256"),
        ("h100:16", "16 chips"),
        ("v5e:0x4", "0 chips"),
    ],
)
def test_topologies_that_are_none_are_refused(text, message):
    with pytest.raises(EgjaxError, match=message):
        parse(text)


def test_a_batch_whose_half_does_not_split_is_no_advice():
    """6 rows in 2 micro-batches: a batch of 3 would have 1.5 each."""
    layout = Layout(accumulate=2)
    plan = formula_plan(case(batch=6, layout=layout), parse("rtx4090:1"), 1, 1)
    assert not plan.fits
    assert not any("batch 3" in words for words in plan.advice)


def test_what_the_compiler_refused_is_counted_once(monkeypatch):
    """The bytes of its message are those of the whole program, weights among them."""
    wanted = 300.0 * GIB
    refused = Compiled(0, 0, 0, 0, wanted, [], 1.0, 1.0, 1.0, "RESOURCE_EXHAUSTED")
    monkeypatch.setattr(plan_module, "compile_for", lambda *_: refused)
    plan = compiled_plan(case(), parse("v5e:4x4"), 16, 1)
    assert plan.total == pytest.approx(wanted)
    assert not plan.fits


def test_without_recomputation_less_is_sent():
    sent = [
        formula.cost(case(layout=Layout(remat=remat)), 4, 4).collective_bytes for remat in REMAT
    ]
    by_policy = dict(zip(REMAT, sent, strict=True))
    assert by_policy.pop("none") < min(by_policy.values())


def test_presets_have_the_published_sizes():
    published = {"1b": 1.236e9, "8b": 8.030e9, "70b": 70.55e9, "405b": 405.85e9}
    assert set(published) == set(PRESETS)
    for name, size in published.items():
        assert count(preset(name.upper())) == pytest.approx(size, rel=1e-3)
    with pytest.raises(EgjaxError, match="no preset '7b'"):
        preset("7b")


def test_weights_and_optimiser_by_hand():
    """SFT of 8B: float32 masters and two moments, 12 bytes a weight, over 16 chips."""
    kinds = formula.memory(case(), 16, 1)
    size = count(preset("8b"))
    assert kinds["weights"] == 4 * size / 16
    assert kinds["optimizer"] == 8 * size / 16
    frozen = formula.memory(case("distill", "70b"), 64, 1)["weights"]
    assert frozen == (4 * count(preset("70b")) + 2 * (count(preset("70b")) + 2 * size)) / 64


def test_caches_by_hand():
    """405B: 126 layers × 8 heads × 128 × 2 (keys, values) × 2 bytes a token; 8B: 32 layers."""
    decode = case("decode", "405b", batch=4, length=1000)
    assert formula.cache_bytes(decode) == 4 * 1000 * 8 * 128 * 4 * (126 + 2 * 32)
    assert formula.cache_bytes(case()) == 0


def test_flops_follow_six_times_the_weights():
    """At short length and without remat, training costs 6 FLOPs a weight and token."""
    plain = case(length=2, layout=Layout())
    tokens = 64 * 2
    model = preset("8b")
    weights = count(model) - model.vocab_size * model.hidden_size
    assert formula.cost(plain, 8, 1).flops * 8 / tokens == pytest.approx(6 * weights, rel=1e-3)
    remat = case(length=2)
    # The layers once more, but for the MLP's last matrix; the unembedding not.
    again = 2 * (weights - model.vocab_size * 4096 - 32 * 4096 * 14336)
    expected = 6 * weights + again
    assert formula.cost(remat, 8, 1).flops * 8 / tokens == pytest.approx(expected, rel=1e-3)
    assert formula.cost(remat, 8, 1).useful_flops == formula.cost(plain, 8, 1).useful_flops


@pytest.mark.parametrize("stage", STAGES)
def test_more_chips_take_less_of_each(stage):
    few, many = (
        formula_plan(case(stage), parse(t), *m)
        for t, m in (("v5p:2x2x2", (4, 2)), ("v5p:4x4x4", (32, 2)))
    )
    assert many.total < few.total
    assert many.expected_s < few.expected_s
    assert many.best_s <= many.expected_s
    assert 0 < many.mfu(459e12) <= many.mfu(459e12, best=True) <= 1


def test_what_fits_and_by_how_much_it_does_not():
    good = formula_plan(case("distill", "70b"), parse("v5p:4x4x4"), 64, 1)
    assert good.fits
    bad = formula_plan(case("sft", "70b"), parse("v5e:2x4"), 1, 8)
    assert not bad.fits
    assert bad.total - bad.limit > 100 * GIB
    assert "no change of mesh" in bad.advice[0]
    assert "chips" in bad.advice[0]


def test_advice_fits_by_its_own_formula():
    wasteful = case(batch=64, layout=Layout(master="float32"))
    topology = parse("v5e:8x8")
    plan = formula_plan(wasteful, topology, 64, 1)
    assert not plan.fits
    leaner = _leaner(wasteful.layout)
    assert leaner[0] == wasteful.layout
    assert [each.remat for each in leaner[1::2]] == list(REMAT)
    totals = [
        formula_plan(replace(wasteful, layout=each), topology, 64, 1).total for each in leaner[::2]
    ]
    assert totals == sorted(totals, reverse=True)
    # The policy that keeps most of those that fit, though on another mesh.
    lean = replace(wasteful, layout=leaner[2])
    total = formula_plan(lean, topology, 32, 2).total
    assert total <= plan.limit < formula_plan(lean, topology, 64, 1).total
    words = "remat selective + mesh data=32, model=2"
    assert plan.advice[0] == f"{words}: {total / GIB:.1f} GiB by formula"


def test_advice_holds_the_formula_to_what_the_compiler_wanted():
    # Seen: DPO of 8B, whose temporaries were 12.24 GiB where the formula has 8.25.
    dpo, topology = case("dpo", batch=16), parse("v5e:4x4")
    kinds = formula.memory(dpo, 4, 4)
    state = kinds["weights"] + kinds["optimizer"]
    wanted = {"weights": state, "activations": 12.24 * GIB}
    first = next(_advice(dpo, topology, (4, 4), wanted, "flops"))
    assert first.startswith("8 micro-batches + mesh data=2, model=8: ")
    after = formula.memory(replace(dpo, layout=replace(dpo.layout, accumulate=8)), 2, 8)
    share = 12.24 * GIB / (sum(kinds.values()) - state)
    expected = state + share * (sum(after.values()) - state)
    assert float(first.split(": ")[1].split()[0]) == pytest.approx(expected / GIB, abs=0.06)


def test_meshes_split_heads_mlp_and_batch():
    found = meshes(case(batch=16), parse("v5e:4x4"))
    assert found == [(16, 1), (8, 2), (4, 4), (2, 8), (1, 16)]
    assert meshes(case(batch=8), parse("v5e:4x4"))[0] == (8, 2)
    with pytest.raises(EgjaxError, match="batch of 3"):
        meshes(case(batch=3), parse("v5e:16x16"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch 0"),
        ({"length": 200_000}, "length 200000"),
        ({"stage": "decode", "new_tokens": 4096}, "leave room for a prompt"),
        ({"layout": Layout(accumulate=3)}, "3 micro-batches"),
    ],
)
def test_cases_that_cannot_run_are_refused(changes, message):
    with pytest.raises(EgjaxError, match=message):
        case(**changes)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_a_program_with_abstract_arguments(stage):
    """Lowered for the one CPU at hand: shapes and types agree with what the functions take."""
    mesh = make_mesh(devices=jax.devices()[:1])
    tiny = Case(stage, TINY, TINY, 2, 16, new_tokens=4)
    what = program(tiny, mesh)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(what.arguments))
    lowered = what.function.lower(*what.arguments)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(what.arguments[0]))
    assert size >= sum(formula.state_bytes(tiny).values()) * (0.5 if stage == "distill" else 0.6)
    assert lowered.as_text().count("while") >= 1
    if stage != "decode":
        shown = training_step(tiny, mesh).state
        assert jax.tree.map(lambda x: x.sharding, what.arguments[0]) == jax.tree.map(
            lambda x: x.sharding, shown
        )


def test_every_chip_says_where_its_figures_stand():
    for name, chip in CHIPS.items():
        assert chip.name == name
        assert len(chip.source) > 10
        assert chip.flops > 1e14
        assert chip.memory > 1e10
