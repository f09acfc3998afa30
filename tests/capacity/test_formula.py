"""The formula of a step against what the compiler says of the same step, on the CPU."""

import jax
import pytest

from egjax.capacity import formula
from egjax.capacity.stages import Case, _loss, program
from egjax.lm.config import LlamaConfig
from egjax.lm.model import REMAT
from egjax.losses.blocks import moves_bits
from egjax.mesh import make_mesh
from egjax.train.layout import Layout

DEEP = 256  # layers: enough that what they keep is nearly all there is


def case(remat, layers=DEEP, **layout):
    config = LlamaConfig(64, 64, 192, layers, 6, 2, 16, max_seq_len=1024, tie_embeddings=False)
    return Case("sft", config, config, 16, 128, layout=Layout(remat=remat, **layout))


def compiled(case):
    what = program(case, make_mesh(devices=jax.devices()[:1]))
    return what.function.lower(*what.arguments).compile()


def test_policies_keep_and_compute_again_what_the_formula_says():
    steps = {remat: compiled(case(remat, attention="dense")) for remat in REMAT}
    memory = {k: s.memory_analysis().temp_size_in_bytes for k, s in steps.items()}
    # The compiler counts a loop's body once: this is one layer.
    flops = {k: s.cost_analysis()["flops"] for k, s in steps.items()}
    by_formula = {k: formula.memory(case(k), 1, 1)["activations"] for k in REMAT}
    flops_by_formula = {k: formula.cost(case(k, layers=1), 1, 1).flops for k in REMAT}
    assert memory["none"] > memory["selective"] > memory["attention"] > memory["full"]
    assert flops["none"] < flops["selective"] < flops["attention"] < flops["full"]
    for policy in ("none", "selective", "attention"):
        more = memory[policy] - memory["full"]
        assert by_formula[policy] - by_formula["full"] == pytest.approx(more, rel=0.05), policy
        fewer = flops["full"] - flops[policy]
        expected = flops_by_formula["full"] - flops_by_formula[policy]
        assert expected == pytest.approx(fewer, rel=0.05), policy


WIDTH, VOCABULARY = 128, 131_072


@pytest.mark.parametrize(
    ("stage", "dtype", "tokens"),
    [
        ("sft", "float32", WIDTH),  # in the gradient's place
        ("sft", "float32", 2 * WIDTH),  # a few tokens at a time
        ("sft", "bfloat16", WIDTH // 2),
        ("sft", "bfloat16", WIDTH),
        ("sft", "bfloat16", 2 * WIDTH),
        ("distill", "float32", WIDTH),
        ("dpo", "float32", WIDTH // 2),  # two sides of so many
        ("dpo", "float32", 4 * WIDTH),
        ("dpo", "bfloat16", WIDTH // 4),
        ("dpo", "bfloat16", WIDTH // 2),
        ("dpo", "bfloat16", 4 * WIDTH),
    ],
)
def test_losses_in_chunks_take_what_the_formula_says(stage, dtype, tokens):
    config = LlamaConfig(
        VOCABULARY, WIDTH, 64, 1, 1, 1, 8, max_seq_len=512, tie_embeddings=False, dtype=dtype
    )
    layout = Layout(remat="full", chunked=True)
    case = Case(stage, config, config, 1, tokens, layout=layout, platform="cpu")
    mesh = make_mesh(devices=jax.devices()[:1])
    state, batch, key, frozen = program(case, mesh).arguments
    loss = _loss(case)

    def gradient(table, params, batch, key, frozen):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.grad(lambda t: loss(params | {"unembedding": t}, batch, key, frozen)[0])(
                table
            )

    step = jax.jit(gradient).lower(state.params["unembedding"], state.params, batch, key, frozen)
    found = step.compile().memory_analysis().temp_size_in_bytes
    expected = formula.memory(case, 1, 1)["logits"]
    # In tables of one byte an entry; the rest is blocks of columns and the model.
    table = WIDTH * VOCABULARY
    if (stage, dtype) == ("sft", "bfloat16") and tokens <= WIDTH // 2 and not moves_bits():
        expected += 2 * table  # a CPU's copy
    assert found / table == pytest.approx(expected / table, abs=0.6)


QUERY, KEY, LAST = 64 * 96, 64 * 32, 64 * 192  # weights of a layer: query and output, key, down
LAYER = 2 * QUERY + 2 * KEY + 3 * LAST


@pytest.mark.parametrize(
    ("form", "remat", "weights", "products"),
    [
        ("dense", "none", 0, 0),
        ("dense", "selective", QUERY, 1),
        ("dense", "attention", LAYER - LAST, 1),
        ("dense", "full", LAYER - LAST, 2),
        ("chunked", "none", 0, 1),
        ("chunked", "selective", QUERY, 1),
        ("chunked", "attention", LAYER - LAST, 1),
        ("chunked", "full", LAYER - LAST, 3),
        ("splash", "none", 0, 0),
        ("splash", "selective", QUERY, 0),
        ("splash", "attention", LAYER - LAST, 0),
        ("cudnn", "attention", LAYER - LAST, 2),
        ("splash", "full", LAYER - LAST, 2),
    ],
)
def test_flops_of_a_layer_by_hand(form, remat, weights, products):
    """Weights and attention's two products: forward, twice that backward, and what is again."""
    one, two = (formula.cost(case(remat, n, attention=form), 1, 1).flops for n in (1, 2))
    expected = 2 * (3 * LAYER + weights) + 2 * 96 * 128 * (6 + products)
    assert (two - one) / (16 * 128) == pytest.approx(expected, rel=5e-3)
