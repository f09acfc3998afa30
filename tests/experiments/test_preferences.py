"""Every preference loss from the command line; what the reference says is computed once."""

import json
from dataclasses import replace
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import normalizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from egjax import losses
from egjax.errors import EgjaxError
from egjax.lm import params as lm_params
from egjax.lm.config import LlamaConfig
from egjax.lm.tokenizer import Tokenizer
from egjax.losses import preference as preferences
from egjax.train.data import Pair, share_prompts
from egjax.train.layout import Layout, applied
from egjax.train.objectives import PairLogps, on_pairs, preference_with_initial
from experiments import dpo
from experiments.models import Model
from experiments.training import Training

SHORT = Training(steps=3, batch=2, length=48, learning_rate=1e-2)
C, R, N, M = (jnp.array(x) for x in ([-3.0, -9.0], [-4.0, -5.0], [2.0, 3.0], [4.0, 5.0]))
RC, RR = jnp.array([-3.5, -8.0]), jnp.array([-3.0, -6.0])
FOUR = (C, R, RC, RR)
CALLS = [
    ({"loss": "paper", "beta": 0.3}, lambda: losses.dpo_paper(C, R, beta=0.3)),
    ({"loss": "standard"}, lambda: losses.dpo(*FOUR, beta=0.1)),
    ({"loss": "cdpo", "noise": 0.2}, lambda: losses.cdpo(*FOUR, noise=0.2)),
    ({"loss": "robust", "noise": 0.2}, lambda: losses.robust_dpo(*FOUR, noise=0.2)),
    ({"loss": "ipo", "tau": 0.4}, lambda: losses.ipo(*FOUR, tau=0.4)),
    ({"loss": "ipo-per-token"}, lambda: losses.ipo(*FOUR, lengths=(N, M))),
    ({"loss": "hinge", "beta": 0.4}, lambda: losses.hinge(*FOUR, beta=0.4)),
    ({"loss": "simpo", "gamma": 0.3}, lambda: losses.simpo(C, R, N, M, gamma=0.3)),
    ({"loss": "length-normalised"}, lambda: losses.length_normalised_dpo(*FOUR, N, M)),
    ({"loss": "dpo-positive", "penalty": 7.0}, lambda: losses.dpo_positive(*FOUR, penalty=7.0)),
    ({"loss": "rpo", "nll_weight": 0.5}, lambda: losses.rpo(*FOUR, N, nll_weight=0.5)),
]


@pytest.mark.parametrize(("options", "want"), CALLS, ids=[c[0]["loss"] for c in CALLS])
def test_options_reach_the_loss(options, want):
    config = dpo.Config(**options)
    loss = on_pairs(dpo.LOSSES[config.loss], **config.settings())
    found, metrics = loss(PairLogps(C, R, N, M, RC, RR))
    np.testing.assert_array_equal(found, want()[0])
    np.testing.assert_array_equal(metrics.margin, want()[1].margin)


def test_every_loss_can_be_chosen():
    assert {call[0]["loss"] for call in CALLS} == set(dpo.LOSSES)
    assert set(get_args(get_type_hints(dpo.Config)["loss"])) == set(dpo.LOSSES)
    there = set(preferences.__all__) - {"Metrics", "kl_to_initial"}
    assert {getattr(losses, name) for name in there} <= set(dpo.LOSSES.values())


def test_the_kl_is_the_papers_alone_unless_asked():
    assert dpo.Config().weight == 0.1
    assert {dpo.Config(loss=name).weight for name in dpo.LOSSES if name != "paper"} == {0.0}
    assert dpo.Config(loss="standard", kl_weight=0.2).weight == 0.2
    assert dpo.Config(kl_weight=0.0).weight == 0.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beta": 0.0}, r"--beta: 0.0 is not in \(0, inf\)"),
        ({"loss": "cdpo", "noise": 0.5}, r"--noise: 0.5 is not in \[0, 0.5\)"),
        ({"loss": "ipo", "tau": float("nan")}, r"--tau: nan is not in"),
        ({"kl_weight": -1.0}, r"--kl-weight: -1.0"),
        ({"initial_top_k": 0}, r"--initial-top-k: 0"),
        ({"loss": "ipo", "beta": 0.2}, "--beta has no effect with --loss ipo"),
        ({"nll_weight": 0.2}, "--nll-weight has no effect with --loss paper"),
        ({"loss": "standard", "initial_top_k": 4}, "no effect without --kl-weight"),
        ({"stored_folder": "x"}, "--stored-folder has no effect"),
        ({"loss": "simpo", "stored_folder": "x"}, "--stored-folder has no effect"),
    ],
)
def test_settings_without_sense_are_refused(options, said):
    with pytest.raises(EgjaxError, match=said):
        dpo.Config(**options)


CONFIG = LlamaConfig(31, 16, 32, 1, 2, 1, 8, max_seq_len=64)
PAIRS = [Pair([1, 2, 3], [4 + i, 5], [9, 9, 1 + i]) for i in range(5)]


def model(seed):
    params = jax.tree.map(lambda x: 3 * x, lm_params.init(jax.random.key(seed), CONFIG))
    return Model(params, CONFIG, "words")


def measured(loss_fn, params, batch, frozen=None):
    """Loss and gradient, and the compiled program."""
    fn = jax.value_and_grad(lambda p, b, f: loss_fn(p, b, jax.random.key(0), f)[0])
    compiled = jax.jit(fn).lower(params, batch, frozen).compile()
    return compiled(params, batch, frozen), compiled


def test_stored_references_are_the_model_beside_and_no_step_runs_it(tmp_path):
    config = dpo.Config(run=tmp_path, loss="standard", training=replace(SHORT, batch=2))
    initial, policy, table = model(0), model(1).params, share_prompts(PAIRS)
    taught = dpo._taught(config, initial, None, table)
    loss = on_pairs(losses.dpo, beta=0.1)
    apply = applied(CONFIG, Layout(chunked=True))
    beside = preference_with_initial(apply, loss, kl_weight=0.0)
    (want, want_grads), two = measured(beside, policy, table, initial.params)
    (found, grads), one = measured(dpo.objective(config, CONFIG), policy, taught)
    np.testing.assert_allclose(found, want, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), grads, want_grads
    )
    # Three passes in place of four, and one set of weights.
    assert one.cost_analysis()["flops"] < 0.8 * two.cost_analysis()["flops"]
    sizes = [x.memory_analysis().argument_size_in_bytes for x in (one, two)]
    weights = sum(x.nbytes for x in jax.tree.leaves(policy))
    assert sizes[1] - sizes[0] > 0.9 * weights
    assert [path.name.split("-")[0] for path in (tmp_path / "stored").iterdir()] == ["reference"]


def test_a_stored_initial_policy_gives_the_kl(tmp_path):
    initial, policy, table = model(0), model(1).params, share_prompts(PAIRS)
    exact = dpo.Config(run=tmp_path, training=SHORT, kl_weight=0.4)
    (want, want_grads), _ = measured(dpo.objective(exact, CONFIG), policy, table, initial.params)
    found = {}
    for k in (2, 30):
        config = replace(exact, initial_top_k=k)
        taught = dpo._taught(config, initial, None, table)
        (found[k], grads), _ = measured(dpo.objective(config, CONFIG), policy, taught)
    # Of 31 tokens 30 and the rest are all; fewer can only lower the divergence.
    np.testing.assert_allclose(found[30], want, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, want_grads
    )
    assert found[2] < want
    with pytest.raises(EgjaxError, match="--initial-top-k: 31 of 31 tokens"):
        dpo._taught(replace(exact, initial_top_k=31), initial, None, table)


def curve(done, name):
    lines = (done.path / "metrics.jsonl").read_text().splitlines()
    return [row[name] for row in map(json.loads, lines)]


def test_the_script_stores_once_and_refuses_what_is_of_something_else(
    folders, tmp_path, monkeypatch
):
    given, train = [], dpo.train

    def spy(model, *arguments, **options):
        given.append(options["frozen"])
        train(model, *arguments, **options)
        assert all(x.is_deleted() for x in jax.tree.leaves(model.params))

    monkeypatch.setattr(dpo, "train", spy)
    config = dpo.Config(
        run=tmp_path / "run",
        data=folders / "pairs.jsonl",
        model=folders / "large",
        training=SHORT,
        loss="standard",
        stored_folder=tmp_path / "reference",
    )
    first = dpo.own_stage(config)
    assert given == [None]
    np.testing.assert_allclose(curve(first, "loss")[0], np.log(2), rtol=1e-5)
    assert curve(first, "margin")[-1] > 0
    made = (tmp_path / "reference" / "ref_chosen.npy").stat().st_mtime_ns
    again = dpo.own_stage(replace(config, loss="ipo"))
    assert not again.kept
    assert (tmp_path / "reference" / "ref_chosen.npy").stat().st_mtime_ns == made
    with pytest.raises(EgjaxError, match=r"reference: stored for another model") as found:
        dpo.own_stage(replace(config, model=folders / "expert"))
    assert "\n" not in str(found.value)
    lines = (folders / "pairs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "fewer.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(EgjaxError, match="stored for another data"):
        dpo.own_stage(replace(config, data=tmp_path / "fewer.jsonl"))


def test_pairs_of_a_run_are_one_text_with_their_prompt(tmp_path):
    # A tokenizer that begins each text with a space, as Llama 2's.
    words = ["<unk>", "</s>", "▁Fetch", "▁cup.", "▁Walk", "▁Grab", "▁", "Walk", "Grab"]
    rust = tokenizers.Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    rust.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    rust.pre_tokenizer = Split("▁", "merged_with_next")
    rust.add_special_tokens(["</s>"])
    rust.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    row = {"prompt": "Fetch cup.", "chosen": "Walk Grab", "rejected": "Grab"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    config = replace(CONFIG, bos_id=None, eos_ids=(1,))
    found = dpo._pairs(tmp_path / "pairs.jsonl", Tokenizer.load(tmp_path), config, 64)
    assert found == [Pair([2, 3], [4, 5, 1], [5, 1])]
