import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egjax.errors import EgjaxError
from egjax.lm.generate import generate, pad_prompts
from egjax.lm.model import forward
from egjax.lm.score import pad_answers, score, score_ensemble

read = jax.jit(forward, static_argnames="config")
PAIRS = [([3, 9, 4], [5, 6]), ([8], [7, 7, 30, 2]), ([5, 6, 7], [])]


def test_score_is_the_sum_over_the_answer_alone(config, params):
    batch = pad_answers(PAIRS, pad_id=0, bucket=8, rows=4)
    total, length = score(params, config, batch.tokens, batch.mask)
    assert length.tolist() == [2, 4, 0, 0]
    for row, (prompt, answer) in enumerate(PAIRS):
        tokens = jnp.array([(prompt + answer + [0] * 8)[:8]])
        logps = jax.nn.log_softmax(read(params, config, tokens))[0]
        expected = sum(logps[len(prompt) + i - 1, token] for i, token in enumerate(answer))
        np.testing.assert_allclose(total[row], expected, atol=1e-4)


def test_what_was_generated_scores_what_generation_said(config, params):
    prompts = [[3, 9, 4], [8]]
    out = generate(
        [(params, config)],
        pad_prompts(prompts, pad_id=0, bucket=8),
        jax.random.key(0),
        max_new_tokens=5,
    )
    answers = [
        [t for t, real in zip(tokens, mask) if real]
        for tokens, mask in zip(out.tokens.tolist(), out.mask.tolist())
    ]
    batch = pad_answers(list(zip(prompts, answers)), pad_id=0, bucket=8)
    total, _ = score(params, config, batch.tokens, batch.mask)
    np.testing.assert_allclose(total, out.logps.sum(1), atol=1e-4)


def test_an_ensemble_of_equal_models_scores_as_one(config, params):
    batch = pad_answers(PAIRS, pad_id=0, bucket=8)
    one, _ = score(params, config, batch.tokens, batch.mask)

    def mean(logits):
        return sum(logits) / len(logits)

    models = [(params, config)] * 2
    two, _ = score_ensemble(models, batch.tokens, batch.mask, combine=mean)
    np.testing.assert_allclose(one, two, atol=1e-5)


def test_a_prompt_is_needed():
    with pytest.raises(EgjaxError, match="empty"):
        pad_answers([([], [3])], pad_id=0)
