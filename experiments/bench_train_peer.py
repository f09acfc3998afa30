"""A DPO step of Tunix. Run by its own interpreter, see `bench_train`.

    PYTHON experiments/bench_train_peer.py SHAPES.json

Builds Tunix's Llama 3 and its `DPOTrainer` (policy and frozen reference), takes one step that is
not timed, prints a line with the number of parameters and its versions; then for each line on
standard input takes a step and prints its seconds and loss. Timed are the trainer's preparation of
a batch of tokens (which holds the reference's forward pass) and its compiled training step, not its
logging. PYTHON has google-tunix; egjax is not needed.
"""

import argparse
import importlib
import json
import sys
import time
from importlib import metadata


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes")
    with open(parser.parse_args().shapes) as file:
        shapes = json.load(file)
    jax, np = importlib.import_module("jax"), importlib.import_module("numpy")
    nnx, optax = importlib.import_module("flax.nnx"), importlib.import_module("optax")
    llama = importlib.import_module("tunix.models.llama3.model")
    dpo = importlib.import_module("tunix.sft.dpo.dpo_trainer")
    config = llama.ModelConfig(
        num_layers=shapes["num_layers"],
        vocab_size=shapes["vocab_size"],
        embed_dim=shapes["hidden_size"],
        hidden_dim=shapes["intermediate_size"],
        num_heads=shapes["num_heads"],
        head_dim=shapes["head_dim"],
        num_kv_heads=shapes["num_kv_heads"],
        rope_theta=10000,
        norm_eps=1e-5,
        weight_tying=True,
    )
    policy, reference = (llama.Llama3(config, rngs=nnx.Rngs(0)) for _ in range(2))
    trainer = dpo.DPOTrainer(
        model=policy,
        ref_model=reference,
        optimizer=optax.adamw(1e-4),
        training_config=dpo.DPOTrainingConfig(eval_every_n_steps=1000, max_steps=1000, beta=0.1),
    )
    train_step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)
    rng = np.random.default_rng(0)

    def part(width):
        tokens = rng.integers(3, shapes["vocab_size"], (shapes["pairs"], width))
        return tokens.astype(np.int32), np.ones(tokens.shape, np.int32)

    prompt, chosen, rejected = map(part, (shapes["prompt"], *[shapes["completion"]] * 2))
    batch = dpo.TrainingInput(*prompt, *chosen, *rejected)

    def step():
        begin = time.perf_counter(), time.process_time()
        loss, aux, norm = train_step(trainer._prepare_inputs(batch))
        jax.block_until_ready((loss, aux, norm, nnx.state(policy)))
        spent = time.perf_counter() - begin[0], time.process_time() - begin[1]
        return {"seconds": spent[0], "cpu_seconds": spent[1], "loss": float(loss)}

    step()
    sizes = [x.size for x in jax.tree.leaves(nnx.state(policy, nnx.Param))]
    versions = {name: metadata.version(name) for name in ("google-tunix", "jax", "flax")}
    print(json.dumps({"parameters": int(sum(sizes)), "versions": versions}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(step()), flush=True)


if __name__ == "__main__":
    main()
