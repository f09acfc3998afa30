"""A prompt computed once for both completions gives the loss and gradient of computing it twice."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egjax import losses
from egjax.errors import EgjaxError
from egjax.lm import params as lm_params
from egjax.lm.config import LlamaConfig
from egjax.lm.model import head, trunk, unembed
from egjax.train.data import Pair, in_order, pad_pairs, share_prompts
from egjax.train.flops import forward_flops, step_work
from egjax.train.objectives import preference, preference_with_initial, reference_logps

CONFIG = LlamaConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
)
PAIRS = [
    Pair([1, 2, 3, 4, 5, 6], [4, 5], [9, 9, 1]),
    Pair([7], [8, 9, 10, 11], [3]),
    Pair([0, 1, 30], [2], [5]),
    Pair([5, 5, 5, 5], [6, 7, 8], [6, 7, 9, 2]),
]
KEY = jax.random.key(0)


def init(seed):
    # Larger than the usual initial weights: a wrong mask or position must show.
    return jax.tree.map(lambda x: 3 * x, lm_params.init(jax.random.key(seed), CONFIG))


def model(params, tokens, positions, segment_ids, prefix_ids=None, *, heads):
    final = trunk(params, CONFIG, tokens, positions, segment_ids, prefix_ids=prefix_ids).final
    return (head if heads else unembed)(params, CONFIG, final)


def standard(p):
    return losses.dpo(p.chosen, p.rejected, p.ref_chosen, p.ref_rejected, beta=0.3)


def test_a_row_by_hand():
    batch = share_prompts([Pair([7, 8, 9], [1, 2, 3], [4, 5])], multiple=1)
    assert batch.tokens.tolist() == [[7, 8, 9, 1, 2, 4]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2, 3]]
    assert batch.prefix_ids.tolist() == [[0, 0, 0, 1, 1, 1]]
    assert batch.sources.tolist() == [[[2, 3, 4], [2, 5, 0]]]
    assert batch.targets.tolist() == [[[1, 2, 3], [4, 5, 0]]]
    assert batch.target_mask.tolist() == [[[True] * 3, [True, True, False]]]


def close(a, b):
    """Within rounding of the array's largest entry: jax 0.12 on AVX-512 is 4e-5 off 0.10's."""
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 + 1e-4 * np.abs(b).max())


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("objective", ["standard", "initial"])
def test_loss_gradient_and_metrics_equal_those_of_two_passes(objective, heads):
    apply = partial(model, heads=heads)
    if objective == "standard":
        fill = reference_logps(apply)
        loss_fn, frozen = preference(apply, standard), None
    else:
        fill = lambda _, batch: batch  # noqa: E731
        loss_fn, frozen = preference_with_initial(apply, standard, kl_weight=0.4), init(2)
    # A row of padding behind: it counts nothing.
    twice = next(in_order(pad_pairs(PAIRS, 9), len(PAIRS) + 1))
    once = next(in_order(share_prompts(PAIRS), len(PAIRS) + 1))
    found = []
    for batch in (twice, once):
        batch = fill(init(1), batch)
        run = jax.value_and_grad(lambda p, b=batch: loss_fn(p, b, KEY, frozen)[0])
        found.append((run(init(3)), loss_fn(init(3), batch, KEY, frozen)))
    jax.tree.map(close, *found)
    assert float(found[0][0][0]) > 0.1


def test_completions_do_not_see_each_other_and_padding_never_matters():
    params, short = init(0), PAIRS[0]
    other = short._replace(rejected=[13, 14, 15, 16, 17])
    finals = []
    for pair, multiple in ((short, 1), (other, 1), (short, 64)):
        b = share_prompts([pair], multiple=multiple)
        arrays = map(jnp.asarray, (b.tokens, b.positions, b.segment_ids, b.prefix_ids))
        finals.append(model(params, *arrays, heads=False)[0, :7])
    for final in finals[1:]:
        np.testing.assert_allclose(final, finals[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pairs", [[], [Pair([], [1], [2])], [Pair([1], [], [2])]])
def test_pairs_without_tokens_are_told(pairs):
    with pytest.raises(EgjaxError, match=r"no preference pair|has no token"):
        share_prompts(pairs)


def test_work_counts_the_prompt_once():
    pair = Pair([1] * 5, [2] * 3, [3] * 2)
    shared = step_work(CONFIG, [CONFIG])(share_prompts([pair]))
    twice = step_work(CONFIG)(pad_pairs([pair], 9))
    assert (shared.tokens, twice.tokens) == (5 + 2 + 1, 7 + 6)
    # Keys seen: the prompt 1..5, then 6, 7 and 6.
    assert shared.flops == 4 * forward_flops(CONFIG, 8, 15 + 13 + 6, 5)
    assert twice.flops == 3 * forward_flops(CONFIG, 13, 28 + 21, 13)


def test_flops_by_hand():
    # A layer: query and output 16·16 each, key and value 16·8 each, MLP 3·16·32; unembedding 16·31.
    matrices = 2 * (2 * 256 + 2 * 128 + 1536)
    assert forward_flops(CONFIG, 10, 55, 10) == 2 * 10 * (matrices + 496) + 4 * 2 * 16 * 55
