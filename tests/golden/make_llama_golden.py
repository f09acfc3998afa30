"""Makes `tiny_llama/`: a random Llama saved by transformers, and what torch computes with it.

    python tests/golden/make_llama_golden.py

Needs torch and transformers (the golden files were made with torch 2.13.0, transformers 5.23.0).
Weights are ten times larger than usual: with the default scale a wrong rotary embedding moves the
logits by 1e-3 only. The rotary scaling is Llama 3's with a short original context, so that all of
its three ranges of wavelengths are met.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parent / "tiny_llama"


def tiny_config(**changes):
    """The transformers configuration of the golden model."""
    fields = dict(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=[2, 3],
        pad_token_id=0,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    )
    return LlamaConfig(**{**fields, **changes})


def main():
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config()).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(FOLDER)
    (FOLDER / "generation_config.json").unlink(missing_ok=True)
    tokens = torch.randint(0, model.config.vocab_size, (2, 48))
    with torch.no_grad():
        out = model(tokens, output_hidden_states=True)
    np.savez_compressed(
        FOLDER / "recorded.npz",
        tokens=tokens.numpy().astype(np.int32),
        logits=out.logits.numpy(),
        hidden=torch.stack(out.hidden_states[:-1]).numpy(),
    )


if __name__ == "__main__":
    main()
