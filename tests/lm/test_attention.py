"""The forms of attention against the dense one; what of them this machine cannot run is lowered."""

import dataclasses
import re
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

from egjax.errors import EgjaxError
from egjax.lm.attention import Sight, choose, chunked, cudnn, dense, einsum, splash
from egjax.lm.cache import empty
from egjax.lm.config import LlamaConfig
from egjax.lm.model import forward
from egjax.lm.params import init

close = lambda a, b, tol=1e-5: np.testing.assert_allclose(a, b, rtol=tol, atol=tol)  # noqa: E731


def inputs(rows=2, heads=4, shared=2, tokens=75, width=8, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    query = rng.normal(size=(rows, heads, tokens, width))
    key, value = rng.normal(size=(2, rows, shared, tokens, width))
    return tuple(jnp.asarray(x, dtype) for x in (query, key, value))


def packed(rows=2, tokens=75):
    """Two segments and padding at both ends."""
    segments = np.ones((rows, tokens), np.int32)
    segments[:, 30:] = 2
    segments[0, :3] = segments[-1, 60:] = 0
    return jnp.asarray(segments)


def sight(segments, whole=False):
    return Sight(segments, segments, 0, False, whole)


def gradient_of(form):
    def loss(segments, *arrays):
        return (form(sight(segments))(*arrays).astype(jnp.float32) ** 2).sum()

    return jax.jit(jax.grad(loss, argnums=(1, 2, 3)))


def reference(query, key, value, segments):
    """Token by token, in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros_like(query)
    for b, h, t in np.ndindex(query.shape[:3]):
        seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t] != 0]
        if seen:
            n = h * key.shape[1] // query.shape[1]
            scores = key[b, n, seen] @ query[b, h, t] / np.sqrt(query.shape[-1])
            shares = np.exp(scores - scores.max())
            out[b, h, t] = shares @ value[b, n, seen] / shares.sum()
    return out


def value_and_grads(form, segments, arrays):
    weights = jnp.cos(jnp.arange(arrays[0].shape[2]))[:, None] * (segments > 0)[:, None, :, None]

    def total(*arrays):
        mixed = form(sight(segments))(*arrays)
        return (weights * mixed**2).sum(), mixed

    grads, mixed = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return mixed, *grads


def test_chunks_see_shared_prefixes():
    arrays = inputs()
    segments = jnp.ones((2, 75), jnp.int32).at[:, 20:].set(2).at[:, 45:].set(3)
    seen = sight(segments)._replace(prefixes=jnp.where(segments > 1, 1, 0))
    parts = jax.jit(chunked(seen, 16))(*arrays)
    close(parts, jax.jit(dense(seen))(*arrays))
    # The second completion as if it came right after the prompt.
    without = [np.delete(x, range(20, 45), axis=2) for x in arrays]
    whole = jax.jit(dense(sight(jnp.ones((2, 50), jnp.int32))))(*without)
    close(parts[:, :, 45:], whole[:, :, 20:])


@pytest.mark.parametrize("chunk", [16, 25, 500])
def test_chunks_equal_the_dense_form_and_brute_force(chunk):
    arrays, segments = inputs(), packed()
    whole = value_and_grads(dense, segments, arrays)
    parts = value_and_grads(lambda s: chunked(s, chunk), segments, arrays)
    for a, b in zip(parts, whole):
        close(a, b)
    real = np.asarray(segments)[:, None, :, None] > 0
    close(np.where(real, parts[0], 0), reference(*arrays, np.asarray(segments)))


def test_splash_equals_the_dense_form_interpreted():
    arrays, segments = inputs(rows=1, width=16), packed(1)
    whole = value_and_grads(dense, segments, arrays)
    kernel = value_and_grads(lambda s: splash(s, interpret=True), segments, arrays)
    real = np.asarray(segments)[:, None, :, None] > 0
    close(np.where(real, kernel[0], 0), np.where(real, whole[0], 0))
    for a, b in zip(kernel[1:], whole[1:]):
        close(a, b)


def test_memory_of_chunks_does_not_grow_with_the_square_of_the_length():
    def temporaries(form, tokens):
        arrays = inputs(tokens=tokens, rows=1)
        segments = jnp.ones((1, tokens), jnp.int32)
        compiled = gradient_of(form).lower(segments, *arrays).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    dense_memory = [temporaries(dense, tokens) for tokens in (512, 2048)]
    chunked_memory = [temporaries(lambda s: chunked(s, 64), tokens) for tokens in (512, 2048)]
    assert dense_memory[1] > 12 * dense_memory[0]
    assert chunked_memory[1] < 5 * chunked_memory[0]
    assert chunked_memory[1] < dense_memory[1] / 8


def test_a_model_gives_the_same_with_chunks_packed_and_cached(config, params):
    params = jax.tree.map(lambda x: 0.5 * x, params)
    tokens = jax.random.randint(jax.random.key(2), (2, 12), 3, config.vocab_size)
    segments = packed(2, 12).at[:, 6:].set(3)

    @jax.jit
    def both(params, tokens, segments):
        forms = (dense, partial(chunked, chunk=5))
        plain = [forward(params, config, tokens, None, segments, attention=f) for f in forms]
        cached = []
        for form in forms:
            cache, logits = empty(config, 2, 20), []
            for piece in (slice(0, 7), slice(7, 12)):
                out, cache = forward(params, config, tokens[:, piece], cache=cache, attention=form)
                logits.append(out)
            cached.append(jnp.concatenate(logits, 1))
        return plain, cached

    for one, other in both(params, tokens, segments):
        close(one, other)


def test_the_form_is_chosen_by_platform_and_size(monkeypatch):
    config = LlamaConfig(100, 96, 256, 4, 2, 1, 64, dtype="bfloat16")

    def chosen(tokens, *, keys=None, cached=False, config=config):
        ids = jnp.ones((1, tokens), jnp.int32)
        return choose(config, Sight(ids, jnp.ones((1, keys or tokens), jnp.int32), 0, cached, True))

    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert chosen(512) == "dense"
    assert chosen(4096) == "chunked"
    assert chosen(1, keys=8192, cached=True) == "dense"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert chosen(512) == "cudnn"
    assert chosen(16) == "dense"
    assert chosen(4096, cached=True) == "chunked"
    wide = dataclasses.replace(config, dtype="float32")
    assert chosen(4096, config=wide) == "chunked"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert chosen(512) == "splash"
    ids = jnp.ones((1, 512), jnp.int32)
    assert choose(config, Sight(ids, ids, 0, False, False, ids)) == "dense"  # shared prefixes
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert chosen(4096) == "chunked"  # no mesh to split the kernel over


def test_unknown_names_and_what_a_form_cannot_do_are_told(config, params, tokens):
    traced = lambda **options: jax.eval_shape(  # noqa: E731
        lambda params, tokens: forward(params, config, tokens, **options), params, tokens
    )
    for name, message in (("flash", "'flash' [(]one of auto"), ("splash", "does not read a cache")):
        with pytest.raises(EgjaxError, match=message):
            traced(cache=empty(config, 3, 20), attention=name)
    with pytest.raises(EgjaxError, match=r"no remat policy 'some' \(one of none"):
        traced(remat="some")
    config = dataclasses.replace(config, max_seq_len=8)
    with pytest.raises(EgjaxError, match="12 tokens exceeds the model's context of 8"):
        traced()


def test_splash_lowers_for_a_tpu():
    arrays = inputs(tokens=256, width=128, dtype=jnp.bfloat16)
    exported = jax.export.export(gradient_of(splash), platforms=["tpu"])(packed(2, 256), *arrays)
    assert exported.mlir_module().count("tpu_custom_call") >= 2  # forward and backward


@pytest.mark.parametrize(
    ("remat", "calls"), [("none", 2), ("selective", 2), ("attention", 2), ("full", 3)]
)
@pytest.mark.parametrize(("devices", "model"), [(1, 1), (8, 2)])
def test_splash_runs_again_only_where_nothing_of_it_is_kept(remat, calls, devices, model):
    config = LlamaConfig(64, 64, 128, 2, 4, 2, 64, max_seq_len=256, tie_embeddings=True)
    params = jax.eval_shape(lambda key: init(key, config), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((8, 256), jnp.int32)
    mesh = jax.sharding.AbstractMesh((devices // model, model), ("data", "model"))

    @jax.value_and_grad
    def run(params, tokens):
        return forward(params, config, tokens, remat=remat, attention="splash").sum()

    with jax.sharding.use_abstract_mesh(mesh):
        jaxpr = jax.make_jaxpr(run)(params, tokens).jaxpr
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    assert str(needed).count("pallas_call[") == calls


def test_cudnn_lowers_for_a_gpu(monkeypatch):
    private = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(private, "check_cudnn_version", lambda: 91000)
    arrays = inputs(tokens=256, width=64, dtype=jnp.bfloat16)
    exported = jax.export.export(
        gradient_of(cudnn),
        platforms=["cuda"],
        disabled_checks=[
            jax.export.DisabledSafetyCheck.custom_call(name)
            for name in ("__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward")
        ],
    )(packed(2, 256), *arrays)
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in exported.mlir_module()


@pytest.mark.parametrize(
    ("formula", "left", "right"),
    [
        ("btd,dhk->bthk", (2, 5, 8), (8, 3, 4)),
        ("bhtk,hkd->btd", (2, 3, 5, 4), (3, 4, 8)),
        ("bnqs,bnsk->bnqk", (2, 3, 5, 6), (2, 3, 6, 4)),
    ],
)
def test_products_of_sixteen_bits_have_such_derivatives(formula, left, right):
    """Bit for bit those of JAX, whose products take float32: half the rate on a GPU."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, y = (jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, (left, right)))

    def plain(x, y):
        summed = jnp.einsum(formula, x, y, preferred_element_type=jnp.float32)
        return summed.astype(x.dtype)

    def grads(product, x, y):
        result, back = jax.vjp(product, x, y)
        return result, *back(jax.random.normal(keys[2], result.shape, jnp.bfloat16))

    ours = partial(grads, partial(einsum, formula))
    jax.tree.map(np.testing.assert_array_equal, ours(x, y), grads(plain, x, y))
    lines = [x for x in jax.jit(ours).lower(x, y).as_text().splitlines() if "dot_general" in x]
    assert len(lines) == 3
    assert all(re.search(r": \(tensor<\S+xbf16>, tensor<\S+xbf16>\) -> ", x) for x in lines)
