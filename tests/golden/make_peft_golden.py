"""Makes `tiny_lora/`: a LoRA adapter of `tiny_llama/` saved by PEFT, and the adapted logits.

    python tests/golden/make_peft_golden.py

Needs peft, torch and transformers (made with peft 0.21.2, torch 2.13.0, transformers 5.23.0). B is
random, too, or the adapter would change nothing.
"""

from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

HERE = Path(__file__).parent
FOLDER = HERE / "tiny_lora"
TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


def main():
    torch.manual_seed(0)
    base = LlamaForCausalLM.from_pretrained(HERE / "tiny_llama").eval()
    config = LoraConfig(r=3, lora_alpha=7, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.peft_config["default"].base_model_name_or_path = "tiny_llama"
    model.save_pretrained(FOLDER)
    (FOLDER / "README.md").unlink(missing_ok=True)
    tokens = np.load(HERE / "tiny_llama" / "recorded.npz")["tokens"][:, :16]
    with torch.no_grad():
        logits = model(torch.tensor(tokens)).logits.numpy()
    np.savez_compressed(FOLDER / "recorded.npz", tokens=tokens, logits=logits)


if __name__ == "__main__":
    main()
