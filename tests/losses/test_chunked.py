"""Chunked losses equal the plain ones in value and gradient, and never hold all the logits."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import cpus

from egjax import losses
from egjax.losses import Head, Ratio, Targets, TopK, blocks, chunked, place

SHAPE, WIDTH, VOCAB = (2, 7), 6, 37
MASK = jnp.arange(VOCAB) < 33
WEIGHTS = jnp.linspace(0.0, 2.0, 14).reshape(SHAPE)
TARGETS = jnp.arange(14).reshape(SHAPE) * 2
WIDE = 16  # 14 tokens have room in the place of the student's gradient, which they lack in WIDTH
widths = pytest.mark.parametrize("width", [WIDTH, WIDE], ids=["chunks", "place"])

DIVERGENCES = {
    "reverse_kl": (losses.reverse_kl, losses.reverse_kl_terms),
    "forward_kl": (losses.forward_kl, losses.forward_kl_terms),
    "jsd": (
        partial(losses.generalised_jsd, beta=0.3),
        partial(losses.generalised_jsd_terms, beta=0.3),
    ),
    "skewed_forward": (losses.skewed_forward_kl, losses.skewed_forward_kl_terms),
    "skewed_reverse": (losses.skewed_reverse_kl, losses.skewed_reverse_kl_terms),
}
divergence = pytest.mark.parametrize(
    ("plain", "terms"), DIVERGENCES.values(), ids=DIVERGENCES.keys()
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """37 columns in blocks of 8 or 5 (the last one is smaller); 14 tokens in chunks of 4."""
    small = blocks.Sizes(64, 64, 8, 8, 20, 20, 20, together=False)
    monkeypatch.setitem(blocks.SIZES, "cpu", small)


def head(seed, tied=False, dtype=jnp.float32, shape=SHAPE, width=WIDTH, vocab=VOCAB):
    a, b = jax.random.split(jax.random.key(seed))
    weight = jax.random.normal(b, (vocab, width) if tied else (width, vocab))
    return Head(
        jax.random.normal(a, (*shape, width)).astype(dtype), weight.astype(dtype), tied=tied
    )


def logits(model):
    weight = model.unembedding.T if model.tied else model.unembedding
    return jnp.einsum("...d,dv->...v", model.hidden.astype(jnp.float32), weight.astype(jnp.float32))


def agree(got, want, rtol=1e-5):
    """Relative to the largest entry of each array."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


def compare(plain_loss, chunked_loss, student, rtol=1e-5):
    want, want_grads = jax.value_and_grad(plain_loss)(student)
    got, grads = jax.value_and_grad(chunked_loss)(student)
    np.testing.assert_allclose(got, want, rtol=rtol)
    agree(grads, want_grads, rtol)


@divergence
@pytest.mark.parametrize(
    ("tied", "width"), [(False, WIDTH), (True, WIDE)], ids=["chunks", "tied_place"]
)
def test_plain_teacher(plain, terms, tied, width):
    student, teacher = head(0, tied, width=width), head(1)
    options = {"temperature": 1.7, "vocab_mask": MASK}

    def naive(s):
        return (WEIGHTS * plain(logits(s), logits(teacher), **options)).sum()

    def chunks(s):
        return losses.chunked_loss(s, teacher, WEIGHTS, terms=terms, tokens=4, **options)[0]

    compare(naive, chunks, student)
    values = losses.chunked_loss(student, teacher, WEIGHTS, terms=terms, tokens=4, **options)[1]
    np.testing.assert_allclose(
        values, plain(logits(student), logits(teacher), **options), rtol=2e-5, atol=1e-6
    )


@divergence
@pytest.mark.parametrize(
    ("options", "width"),
    [({}, WIDTH), ({"alpha": 0.6, "clip": 0.8, "plausible": 0.2}, WIDE)],
    ids=["chunks", "clipped_plausible_place"],
)
def test_composed_teacher(plain, terms, options, width):
    student, models = head(0, width=width), (head(1), head(2, tied=True, width=3), head(3, width=3))

    def naive(s):
        teacher = losses.behaviour_ratio(*map(logits, models), vocab_mask=MASK, **options)
        return (WEIGHTS * plain(logits(s), teacher, temperature=1.3, vocab_mask=MASK)).sum()

    def chunks(s):
        return losses.chunked_loss(
            s,
            Ratio(*models, **options),
            WEIGHTS,
            terms=terms,
            temperature=1.3,
            vocab_mask=MASK,
            tokens=4,
        )[0]

    compare(naive, chunks, student)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The chunks of an accelerator, traced anew: 5 tokens at a time, or as many as have room in the
    gradient's place together with a teacher, 3 at least."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    everything = blocks.SIZES["gpu"].block
    sizes = blocks.Sizes(5, 3, 8, everything, everything, everything, 20, together=True)
    monkeypatch.setitem(blocks.SIZES, "gpu", sizes)
    # Rounded as there, multiplied in float32: a CPU lacks some products of bfloat16.
    rounded = blocks.rounded
    for module in (chunked, place):
        monkeypatch.setattr(module, "rounded", lambda *x: rounded(*x).astype(jnp.float32))
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
@widths
def test_chunks_of_an_accelerator(width, dtype, rtol, tied):
    student = head(0, tied, dtype=dtype, width=width)
    models = [head(i, dtype=dtype) for i in (1, 2, 3)]
    composed = {"alpha": 0.6, "clip": 0.8, "plausible": 0.2}
    teacher = Ratio(*models, **composed)
    options = {"temperature": 1.3, "vocab_mask": MASK}
    mask = jnp.arange(7) < 5

    def naive(s):
        goal = losses.behaviour_ratio(*map(logits, models), vocab_mask=MASK, **composed)
        logps = losses.token_logps(logits(s), TARGETS)
        one = (WEIGHTS * losses.reverse_kl(logits(s), goal, **options)).sum()
        two = (WEIGHTS * losses.generalised_jsd(logits(s), logits(models[0]))).sum()
        return one + two - (WEIGHTS * logps).sum() + jnp.sin((mask * logps).sum(-1)).sum()

    def chunks(s):
        targets, jsd = Targets(TARGETS), losses.generalised_jsd_terms
        one, _ = losses.chunked_loss(s, teacher, WEIGHTS, **options)
        two, _ = losses.chunked_loss(s, models[0], WEIGHTS, terms=jsd)
        nll, _ = losses.chunked_loss(s, targets, WEIGHTS, terms=losses.forward_kl_terms)
        sums, _ = losses.chunked_sequence_logps(s, TARGETS, jnp.broadcast_to(mask, SHAPE))
        return one + two + nll + jnp.sin(sums).sum()

    compare(naive, chunks, student, rtol)


@divergence
def test_token_losses_under_any_function(plain, terms):
    student, teacher = head(4, width=WIDE), head(5)

    def naive(s):
        return jnp.sin(plain(logits(s), logits(teacher))).sum()

    def chunks(s):
        return jnp.sin(losses.chunked_token_losses(s, teacher, terms=terms, tokens=5)).sum()

    compare(naive, chunks, student)


@widths
def test_sft_is_the_forward_kl_to_the_targets(width):
    mask = jnp.arange(14).reshape(SHAPE) % 3 > 0

    def naive(s):
        return losses.sft(logits(s), TARGETS, mask, WEIGHTS, MASK).sum()

    def chunks(s):
        return losses.chunked_loss(
            s,
            Targets(TARGETS),
            jnp.where(mask, WEIGHTS, 0.0),
            terms=losses.forward_kl_terms,
            vocab_mask=MASK,
            tokens=4,
        )[0]

    compare(naive, chunks, head(6, width=width))


@widths
def test_gradient_of_the_weights_is_the_loss_and_teachers_are_stopped(width):
    student, teacher = head(0, width=width), head(1)

    def total(weights, teacher):
        return losses.chunked_loss(student, teacher, weights, tokens=4)[0]

    by_weight, by_teacher = jax.grad(total, argnums=(0, 1))(WEIGHTS, teacher)
    np.testing.assert_allclose(
        by_weight, losses.reverse_kl(logits(student), logits(teacher)), rtol=1e-5
    )
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(by_teacher))


@widths
def test_preference_loss_from_heads(width):
    mask = jnp.arange(7) >= jnp.array([[2], [4]])
    ref = (jnp.array(-20.0), jnp.array(-9.0))

    def loss(logps):
        return losses.dpo(logps[0], logps[1], *ref, beta=0.2)[0]

    def naive(s):
        return loss(losses.sequence_logps(logits(s), TARGETS, mask, MASK)[0])

    def chunks(s):
        return loss(losses.chunked_sequence_logps(s, TARGETS, mask, vocab_mask=MASK, tokens=4)[0])

    compare(naive, chunks, head(7, width=width))
    lengths = losses.chunked_sequence_logps(head(7), TARGETS, mask)[1]
    np.testing.assert_array_equal(lengths, [5, 3])


def test_kl_to_initial_from_heads():
    mask = jnp.arange(7) >= jnp.array([[2], [4]])
    initial, scale = head(9), jnp.array([0.3, -2.0])

    def naive(s):
        return (scale * losses.kl_to_initial(logits(s), logits(initial), mask, MASK)).sum()

    def chunks(s):
        kl = losses.chunked_kl_to_initial(s, initial, mask, vocab_mask=MASK, tokens=4)
        return (scale * kl).sum()

    compare(naive, chunks, head(8))


@pytest.mark.parametrize(
    ("tied", "width"),
    [(True, WIDTH), (False, WIDE), (False, 30), (True, 30)],
    ids=["tied_chunks", "float32_place", "place", "tied_place"],
)
def test_bf16_inputs_are_summed_in_f32(tied, width):
    student = head(0, tied, dtype=jnp.bfloat16, width=width)
    teacher = head(1, dtype=jnp.bfloat16)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), student)

    def chunks(s):
        return losses.chunked_loss(s, teacher, WEIGHTS, tokens=4)[0]

    def naive(s):
        return (WEIGHTS * losses.reverse_kl(logits(s), logits(teacher))).sum()

    got, grads = jax.value_and_grad(chunks)(student)
    want, want_grads = jax.value_and_grad(naive)(wide)
    assert got.dtype == jnp.float32
    assert grads.unembedding.dtype == jnp.bfloat16
    np.testing.assert_allclose(got, want, rtol=1e-5)
    # The only rounding is the last one: each entry is the bf16 that is nearest, or next to it.
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=2**-7, atol=1e-5 * np.abs(b).max())


@divergence
def test_top_k_with_tail_is_exact_over_k_plus_one_outcomes(plain, terms):
    student, k = head(10, width=WIDTH if terms is losses.forward_kl_terms else WIDE), 5
    teacher = jax.nn.log_softmax(jnp.where(MASK, logits(head(11)), -jnp.inf) / 1.4)
    top, ids = jax.lax.top_k(teacher, k)
    tail = jnp.log1p(-jnp.exp(top).sum(-1))

    def outcomes(s):
        logps = jax.nn.log_softmax(jnp.where(MASK, logits(s) / 1.4, -1e30))
        kept = jnp.take_along_axis(logps, ids, axis=-1)
        return jnp.concatenate([kept, jnp.log1p(-jnp.exp(kept).sum(-1, keepdims=True))], -1)

    def naive(s):
        return (WEIGHTS * plain(outcomes(s), jnp.concatenate([top, tail[..., None]], -1))).sum()

    def chunks(s, teacher=TopK(ids, top, tail)):  # noqa: B008
        return losses.chunked_loss(
            s, teacher, WEIGHTS, terms=terms, temperature=1.4, vocab_mask=MASK, tokens=4
        )[0]

    compare(naive, chunks, student, rtol=2e-5)
    # All tokens kept: nothing is approximate.
    top, ids = jax.lax.top_k(teacher, VOCAB)
    full = TopK(ids, top, jnp.full(SHAPE, -jnp.inf))
    exact = plain(logits(student), teacher * 1.4, temperature=1.4, vocab_mask=MASK)
    np.testing.assert_allclose(chunks(student, full), (WEIGHTS * exact).sum(), rtol=2e-5)
    if terms is losses.reverse_kl_terms:
        assert chunks(student) < chunks(student, full)


def sizes(jaxpr, but):
    """Numbers of entries of arrays in a program, inner programs included, but of shape `but`."""
    for equation in jaxpr.eqns:
        arrays = (v.aval for v in equation.outvars if hasattr(v.aval, "size"))
        yield from (a.size for a in arrays if a.shape != but)
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from sizes(inner, but)


@pytest.mark.parametrize("make", [lambda t: t[0], lambda t: Ratio(*t, clip=1.0, plausible=0.1)])
@pytest.mark.parametrize("width", [WIDTH, 80], ids=["chunks", "place"])
def test_all_logits_never_exist(make, width):
    count, vocab, tokens = 64, 96, 4
    models = [head(i, shape=(count,), vocab=vocab, width=width) for i in range(4)]

    def total(s, teachers):
        weights = jnp.ones(count)
        first = losses.chunked_loss(s, make(teachers), weights, tokens=tokens)[0]
        return first + losses.chunked_token_losses(s, make(teachers), tokens=tokens).sum()

    program = jax.make_jaxpr(jax.grad(total))(models[0], models[1:])
    found = max(sizes(program.jaxpr, (width, vocab)))
    hidden = count * width
    assert tokens * vocab <= found <= max(hidden, count * vocab / 4)


def test_memory_grows_with_neither_tokens_nor_their_product_with_the_vocabulary(monkeypatch):
    sizes = blocks.Sizes(64, 64, 512, 512, 2**18, 2**18, 2**18, together=False)
    monkeypatch.setitem(blocks.SIZES, "cpu", sizes)

    def temp(fn, count, vocab, width=64):
        def arrays(rows, columns):
            return jax.ShapeDtypeStruct((rows, columns), jnp.float32)

        models = [Head(arrays(count, width), arrays(width, vocab)) for _ in range(2)]
        compiled = jax.jit(jax.value_and_grad(fn)).lower(*models).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def naive(s, t):
        return losses.reverse_kl(logits(s), logits(t)).mean()

    def chunks(s, t):
        return losses.chunked_loss(s, t, jnp.ones(s.hidden.shape[0]), tokens=64)[0]

    small = temp(chunks, 2048, 16384)
    assert small < temp(naive, 2048, 16384) / 20
    assert temp(chunks, 4096, 16384) < small + 4096 * 64 * 4 * 2
    # With room for the tokens in the gradient, whose own memory is not counted.
    small = temp(chunks, 512, 65536, 512)
    assert small < temp(naive, 512, 65536, 512) / 20
    assert temp(chunks, 512, 131072, 512) < small + 64 * 65536 * 4 * 1.1


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_logits_keep_every_bit_in_the_place(tied, dtype):
    """Also those whose halves look like a NaN, which a conversion on the way would make quiet."""
    rows, vocab, width = 8, 96, 16
    here = place.Place(rows, head(0, tied, dtype, (rows,), width, vocab), halves=True, piece=rows)
    low = np.random.default_rng(0).choice([0x7F81, 0xFF81, 0x7C01, 0xFDFF, 1], (rows, vocab))
    values = jax.lax.bitcast_convert_type(jnp.asarray(0x3F800000 | low, jnp.uint32), jnp.float32)
    slot = here.student(0, 0)

    @jax.jit
    def there_and_back(values):
        def put(start, width, kept):
            part = jax.lax.dynamic_slice_in_dim(values, start, width, axis=1)
            return here.write(kept, jax.lax.optimization_barrier(part), slot, start)

        def get(start, width, found):
            part = here.read(kept, slot, rows, start, width)
            return jax.lax.dynamic_update_slice_in_dim(found, part, start, axis=1)

        kept = blocks.loop(vocab, 16, put, here.empty())
        return blocks.loop(vocab, 16, get, jnp.zeros_like(values))

    found = np.asarray(there_and_back(values)).view(np.uint32)
    np.testing.assert_array_equal(found, np.asarray(values).view(np.uint32))


@pytest.mark.skipif(not blocks.moves_bits(), reason="XLA copies the gradient before JAX 0.11")
def test_a_gradient_of_sixteen_bits_is_not_copied():
    count, vocab, width = 32, 4096, 80
    student = head(0, dtype=jnp.bfloat16, shape=(count,), width=width, vocab=vocab)
    grad = jax.grad(lambda s: losses.chunked_token_logps(s, jnp.zeros(count, int)).sum())
    memory = jax.jit(grad).lower(student).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.3 * student.unembedding.nbytes


@widths
@pytest.mark.parametrize("strange", [-100, VOCAB])
def test_targets_that_are_no_tokens_count_only_under_the_mask(width, strange):
    student, mask = head(1, width=width), jnp.ones(SHAPE, bool).at[1, 3].set(False)
    hidden = TARGETS.at[1, 3].set(strange)

    def total(student, ids, mask):
        weights = mask.astype(jnp.float32)
        summed, _ = losses.chunked_loss(
            student, Targets(ids), weights, terms=losses.forward_kl_terms, tokens=4
        )
        logps, _ = losses.chunked_sequence_logps(student, ids, mask, tokens=4)
        return summed - logps.sum()

    run = jax.value_and_grad(total)
    agree(run(student, hidden, mask), run(student, TARGETS, mask))
    counted, grads = run(student, hidden, jnp.ones(SHAPE, bool))
    assert jnp.isnan(counted)
    assert jnp.isnan(grads.hidden[1, 3]).all()
    assert jnp.isnan(losses.chunked_token_logps(student, hidden)[1, 3])


def test_teachers_of_another_vocabulary_are_refused():
    student, other = head(1), head(2, vocab=VOCAB + 1)
    for teacher in (other, Ratio(head(2), head(3), other)):
        with pytest.raises(ValueError, match="a teacher of 38 tokens for a student of 37"):
            losses.chunked_loss(student, teacher, WEIGHTS)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="tokens of shape"):
        losses.chunked_loss(head(0), head(1, shape=(3, 7)), WEIGHTS)
    with pytest.raises(ValueError, match="vocab_shards"):
        losses.chunked_loss(head(0), head(1), WEIGHTS, vocab_shards=4)


SHARDED = """
import re, jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from egjax import losses
from egjax.losses import Head, Ratio, Targets, blocks
from egjax.mesh import make_mesh

blocks.SIZES["cpu"] = blocks.Sizes(64, 64, 16, 16, 256, 256, 256, together=False)
mesh = make_mesh(data=2, model=4)
N, V, S = 32, 240, 4
keys = jax.random.split(jax.random.key(0), 8)
mask, weights = jnp.arange(V) < 230, jnp.linspace(0.0, 1.0, N)

def loss(shards, heads):
    options = dict(vocab_mask=mask, tokens=8, vocab_shards=shards)
    ratio = Ratio(*heads[1:], clip=1.5, plausible=0.05)
    first, _ = losses.chunked_loss(heads[0], ratio, weights, **options)
    targets = jnp.arange(N)
    logps = losses.chunked_token_logps(heads[0], targets, **options)
    return first + jnp.sin(logps).sum()

def place(head):
    return Head(
        jax.device_put(head.hidden, NamedSharding(mesh, P("data"))),
        jax.device_put(head.unembedding, NamedSharding(mesh, P(None, "model"))),
    )
for D, shards in ((8, 1), (40, S)):
    heads = [
        Head(jax.random.normal(a, (N, D)), jax.random.normal(b, (D, V)))
        for a, b in zip(keys[:4], keys[4:])
    ]
    want = jax.value_and_grad(lambda h: loss(1, h))(heads)
    placed = [place(head) for head in heads]
    run = jax.jit(jax.value_and_grad(lambda h: loss(shards, h)))
    got = run(placed)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
    text = run.lower(placed).compile().as_text()
    gathered = [
        np.prod([int(n) for n in dims.split(",")])
        for dims in re.findall(r"f32\\[([\\d,]+)\\]\\S* all-gather\\(", text)
    ]
    print("devices", jax.device_count(), "shards", shards, "largest", max(gathered, default=0))
    # No device ever gets the whole matrix.
    assert max(gathered, default=0) < D * V, gathered
"""


def test_vocabulary_split_over_devices():
    out = subprocess.run(
        [sys.executable, "-c", SHARDED],
        capture_output=True,
        text=True,
        env={**os.environ, **cpus(8)},
    )
    assert out.returncode == 0, out.stderr[-2000:]
    assert out.stdout.count("devices 8") == 2


def test_a_head_is_a_pytree_that_keeps_its_layout():
    doubled = jax.tree.map(lambda x: 2 * x, head(0, tied=True))
    assert doubled.tied
    np.testing.assert_array_equal(doubled.hidden, 2 * head(0).hidden)
