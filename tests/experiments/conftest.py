"""Three tiny Llamas of one tokenizer, and data, in folders."""

import json

import jax
import pytest

from egjax.lm import hf
from egjax.lm.config import LlamaConfig
from egjax.lm.params import init
from egjax.lm.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`large`, `expert`, `anti` (padded vocabularies), `samples.jsonl`, `pairs.jsonl`."""
    home = tmp_path_factory.mktemp("folders")
    tokenizer = Tokenizer.train(["Walk to kitchen. Grab cup. user assistant"] * 4, vocab_size=270)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size + 3,
        hidden_size=8,
        intermediate_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        max_seq_len=64,
        bos_id=tokenizer.bos_id,
        eos_ids=(tokenizer.eos_id,),
        pad_id=tokenizer.pad_id,
    )
    for seed, name in enumerate(("large", "expert", "anti")):
        params = jax.tree.map(lambda x: 2 * x, init(jax.random.key(seed), config))
        hf.save(home / name, config, params)
        tokenizer.save(home / name)
    rows = {
        "samples": [
            {"prompt": f"Q {i}: A:", "completion": f" Walk to kitchen {i}."} for i in range(4)
        ],
        "pairs": [
            {"prompt": f"Q {i}: A:", "chosen": " Walk to kitchen.", "rejected": " Walk."}
            for i in range(4)
        ],
    }
    for name, lines in rows.items():
        (home / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return home
