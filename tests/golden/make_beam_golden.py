"""Makes `beam_search.json`: what transformers' beam search finds with the model in `tiny_llama/`.

    python tests/golden/make_beam_golden.py

Needs torch and transformers (made with torch 2.13.0, transformers 5.23.0). Prompts are padded on
the left. Six tokens end a completion, so that some end early and some not at all.
"""

import json
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

FOLDER = Path(__file__).parent
PROMPTS = [[1, 9, 4, 33], [1, 8], [1, 5, 6, 17, 48, 59, 10, 11], [1, 20, 60]]
ENDS = [2, 3, 14, 25, 36, 47]
SETTINGS = [
    {"beams": 4, "length_penalty": 1.0, "stopping": "heuristic"},
    {"beams": 4, "length_penalty": 1.0, "stopping": "full"},
    {"beams": 3, "length_penalty": 0.0, "stopping": "never"},
    {"beams": 4, "length_penalty": 2.0, "stopping": "never"},
    {"beams": 4, "length_penalty": 0.5, "stopping": "heuristic"},
]
STOPPING = {"heuristic": False, "full": True, "never": "never"}
NEW = 10


def main():
    model = LlamaForCausalLM.from_pretrained(FOLDER / "tiny_llama", dtype=torch.float32).eval()
    longest = max(map(len, PROMPTS))
    tokens = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])
    cases = []
    for setting in SETTINGS:
        out = model.generate(
            tokens,
            attention_mask=mask,
            do_sample=False,
            num_beams=setting["beams"],
            num_return_sequences=setting["beams"],
            length_penalty=setting["length_penalty"],
            early_stopping=STOPPING[setting["stopping"]],
            max_new_tokens=NEW,
            eos_token_id=ENDS,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        shape = len(PROMPTS), setting["beams"], -1
        made = out.sequences[:, longest:].reshape(shape).tolist()
        scores = out.sequences_scores.reshape(shape[:2]).tolist()
        cases.append({**setting, "tokens": made, "scores": scores})
    record = {"prompts": PROMPTS, "ends": ENDS, "max_new_tokens": NEW, "cases": cases}
    (FOLDER / "beam_search.json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
