import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egjax.lm import hf
from egjax.lm.cache import empty
from egjax.lm.model import REMAT, head, rms_norm, rope_angles, rotate, trunk, unembed
from egjax.lm.model import forward as eager_forward

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_llama"
forward = jax.jit(eager_forward, static_argnames=("config", "return_hidden", "remat"))
close = lambda a, b, tol=1e-5: np.testing.assert_allclose(a, b, rtol=tol, atol=tol)  # noqa: E731


def test_logits_and_hidden_states_are_those_that_torch_recorded():
    config, params = hf.load(GOLDEN)
    recorded = np.load(GOLDEN / "recorded.npz")
    logits, hidden = forward(params, config, recorded["tokens"], return_hidden=True)
    close(logits, recorded["logits"])
    close(hidden[:-1], recorded["hidden"])


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_what_unembeds(config, tokens, make_params, tied):
    config = dataclasses.replace(config, tie_embeddings=tied)
    params = make_params(config)
    final = trunk(params, config, tokens).final
    close(head(params, config, final).logits(), unembed(params, config, final))


def test_a_wrong_rotary_embedding_would_show():
    config, params = hf.load(GOLDEN)
    recorded = np.load(GOLDEN / "recorded.npz")
    for changed in ({"rope_scaling": None}, {"rope_theta": 510.0}):
        wrong = dataclasses.replace(config, **changed)
        logits = forward(params, wrong, recorded["tokens"])
        assert np.abs(logits - recorded["logits"]).max() > 1e-2


def test_parts_equal_torch_live(config):
    torch = pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    theirs = llama.LlamaRotaryEmbedding(_transformers_config(config))
    positions = np.arange(50)[None]
    cos, sin = theirs(torch.zeros(1), torch.tensor(positions))
    ours = rope_angles(config, jnp.asarray(positions))
    close(np.concatenate([ours[0]] * 2, -1), cos.numpy())
    close(np.concatenate([ours[1]] * 2, -1), sin.numpy())
    x = np.random.default_rng(0).normal(size=(1, 50, 4, 8)).astype(np.float32)
    turned, _ = llama.apply_rotary_pos_emb(
        torch.tensor(x).transpose(1, 2), torch.tensor(x).transpose(1, 2), cos, sin
    )
    close(rotate(jnp.asarray(x), ours), turned.transpose(1, 2).numpy())
    norm = llama.LlamaRMSNorm(8, eps=1e-3)
    close(rms_norm(jnp.asarray(x), jnp.ones(8), 1e-3), norm(torch.tensor(x)).detach().numpy())


def _transformers_config(config):
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaConfig(**config.to_hf())


@pytest.mark.parametrize("tied", [True, False])
def test_exported_model_equals_ours_in_torch_live(config, tokens, make_params, tmp_path, tied):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(config, tie_embeddings=tied)
    # Larger weights than these, and torch in float32 is itself 1e-5 away from float64.
    params = make_params(config, scale=0.2)
    hf.save(tmp_path, config, params)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(np.asarray(tokens))).logits.numpy()
    close(forward(params, config, tokens), expected)


def test_reading_in_pieces_with_a_cache_equals_reading_at_once(config, params, tokens):
    whole = forward(params, config, tokens)
    cache = empty(config, len(tokens), 20)
    pieces = []
    for start, end in ((0, 5), (5, 6), (6, 12)):
        logits, cache = forward(params, config, tokens[:, start:end], cache=cache)
        pieces.append(logits)
    close(jnp.concatenate(pieces, 1), whole)
    assert int(cache.used) == 12


def test_padding_never_matters(config, params, tokens):
    # Rows of another length are summed in another order; smaller weights keep the rounding of
    # float32 below the tolerance on every backend.
    params = jax.tree.map(lambda x: 0.5 * x, params)
    whole = forward(params, config, tokens)
    junk = jnp.full((3, 4), 7)
    real, padding = jnp.ones((3, 12), jnp.int32), jnp.zeros((3, 4), jnp.int32)
    left = forward(
        params,
        config,
        jnp.concatenate([junk, tokens], 1),
        segment_ids=jnp.concatenate([padding, real], 1),
    )
    right = forward(
        params,
        config,
        jnp.concatenate([tokens, junk], 1),
        segment_ids=jnp.concatenate([real, padding], 1),
    )
    close(left[:, 4:], whole)
    close(right[:, :12], whole)
    assert np.isfinite(left).all()
    assert np.isfinite(right).all()


def test_packed_rows_equal_separate_rows(config, params, tokens):
    a, b = tokens[0, :7], tokens[1, :4]
    row = jnp.concatenate([a, b, jnp.array([0])])[None]
    segments = jnp.array([[1] * 7 + [2] * 4 + [0]])
    packed = forward(params, config, row, segment_ids=segments)
    close(packed[:, :7], forward(params, config, a[None]))
    close(packed[:, 7:11], forward(params, config, b[None]))


def test_a_batch_equals_a_loop(config, params, tokens):
    batched = forward(params, config, tokens)
    for row in range(len(tokens)):
        close(batched[row], forward(params, config, tokens[row : row + 1])[0])


def test_later_tokens_do_not_change_earlier_logits(config, params, tokens):
    changed = tokens.at[:, 8:].set(5)
    before, after = forward(params, config, tokens), forward(params, config, changed)
    close(before[:, :8], after[:, :8])
    assert np.abs(before[:, 8:] - after[:, 8:]).max() > 1e-2


def test_only_differences_of_positions_matter(config, params, tokens):
    positions = jnp.broadcast_to(jnp.arange(12), tokens.shape)
    whole = forward(params, config, tokens)
    close(forward(params, config, tokens, positions), whole, 1e-4)
    close(forward(params, config, tokens, positions + 9), whole, 1e-4)
    assert np.abs(forward(params, config, tokens, positions * 2) - whole).max() > 1e-2


def test_hidden_states_begin_with_the_embedding_and_end_before_the_head(config, params, tokens):
    out = trunk(params, config, tokens, return_hidden=True)
    assert out.hidden is not None
    assert out.hidden.shape == (config.num_layers + 1, 3, 12, config.hidden_size)
    close(out.hidden[0], params["embedding"][tokens])
    final = rms_norm(out.hidden[-1], params["final_norm"], config.rms_norm_eps)
    close(unembed(params, config, final), forward(params, config, tokens))


def test_rematerialised_gradients_are_the_same_and_finite_at_padding(config, params, tokens):
    segments = jnp.ones_like(tokens).at[:, 9:].set(0).at[2].set(0)

    def loss(params, remat):
        logits = forward(params, config, tokens, segment_ids=segments, remat=remat)
        return (jax.nn.log_softmax(logits)[..., 3] * (segments > 0)).sum()

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    plain = grad(params, None)
    again = grad(params, jax.checkpoint)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again)):
        close(a, b, 1e-4)
        assert np.isfinite(a).all()
        assert np.abs(a).max() > 0


def test_policies_trade_memory_for_recomputation(config, params):
    config = dataclasses.replace(config, max_seq_len=256)
    tokens = jax.random.randint(jax.random.key(3), (2, 256), 3, config.vocab_size)

    def loss(params, tokens, remat):
        return jax.nn.log_softmax(forward(params, config, tokens, remat=remat))[..., 3].mean()

    grad = jax.jit(jax.grad(loss), static_argnums=2)
    compiled = {name: grad.lower(params, tokens, name).compile() for name in REMAT}
    memory = {n: c.memory_analysis().temp_size_in_bytes for n, c in compiled.items()}
    assert memory["none"] > 2 * memory["selective"]  # the scores [H, T, T] of each layer
    assert memory["selective"] > memory["attention"] > memory["full"]
    expected = compiled["none"](params, tokens)
    for step in compiled.values():
        jax.tree.map(lambda a, b: close(a, b, 1e-4), step(params, tokens), expected)


def test_half_precision_stays_near_and_gives_float32_logits(config, params, tokens):
    half = dataclasses.replace(config, dtype="bfloat16")
    logits = forward(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), half, tokens)
    assert logits.dtype == jnp.float32
    whole = forward(params, config, tokens)
    assert np.abs(logits - whole).mean() < 0.1 * np.abs(whole).mean()
