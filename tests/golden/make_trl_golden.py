"""Makes `trl_preference.json`: what TRL's trainers compute for pairs of log-probabilities.

    python tests/golden/make_trl_golden.py

Needs trl (recorded with trl 1.16.0, torch 2.13.0 on a CPU). The own loss functions of its trainers
run, one pair at a time; model and accelerator are objects that hand the log-probabilities over.
For one pair its `aot` is conservative DPO, and `sigmoid` plus `sft` is RPO.
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

FILE = Path(__file__).parent / "trl_preference.json"
BETA, NOISE, NLL_WEIGHT, GAMMA = 0.3, 0.15, 0.7, 0.4

# (chosen, rejected, ref_chosen, ref_rejected, tokens of the chosen, tokens of the rejected)
PAIRS = [
    (-10.0, -12.0, -11.0, -12.5, 4, 5),
    (-3.25, -2.5, -2.0, -4.0, 2, 3),
    (-41.0, -17.5, -30.0, -20.25, 12, 6),
    (-0.5, -8.0, -6.0, -5.5, 1, 7),
]
# Loss types and their weights in TRL's DPOTrainer.
TYPES = {
    "dpo": {"sigmoid": 1.0},
    "cdpo": {"aot": 1.0},
    "robust": {"robust": 1.0},
    "ipo_averaged": {"ipo": 1.0},
    "hinge": {"hinge": 1.0},
    "length_normalised": {"sigmoid_norm": 1.0},
    "rpo": {"sigmoid": 1.0, "sft": NLL_WEIGHT},
}


def _trainer(types):
    return SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=list(types),
        loss_weights=list(types.values()),
        label_smoothing=NOISE,
        beta=BETA,
        use_weighting=False,
        _total_train_tokens=0,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )


def dpo_trainer(types, pair):
    """Loss, gradient for (chosen, rejected), reward margin and accuracy of one pair."""
    import torch
    from trl import DPOTrainer

    *logps, chosen_length, rejected_length = pair
    length = max(chosen_length, rejected_length) + 1
    mask = torch.zeros(2, length, dtype=torch.long)
    mask[0, 1 : chosen_length + 1] = 1
    mask[1, 1 : rejected_length + 1] = 1
    sums = torch.tensor(logps[:2], dtype=torch.float64, requires_grad=True)
    per_token = sums[:, None] * mask[:, 1:] / mask[:, 1:].sum(1, keepdim=True)
    zeros = torch.zeros(2, length - 1)
    outputs = SimpleNamespace(
        log_probs=per_token, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )
    inputs = {
        "input_ids": torch.zeros(2, length, dtype=torch.long),
        "attention_mask": torch.ones(2, length, dtype=torch.long),
        "completion_mask": mask,
        "ref_chosen_logps": torch.tensor(logps[2:3], dtype=torch.float64),
        "ref_rejected_logps": torch.tensor(logps[3:4], dtype=torch.float64),
    }
    trainer = _trainer(types)
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    (grads,) = torch.autograd.grad(loss, sums)
    metrics = trainer._metrics["eval"]
    return {
        "loss": loss.item(),
        "grads": grads.tolist(),
        "margin": metrics["rewards/margins"][0],
        "accuracy": metrics["rewards/accuracies"][0],
    }


def simpo_trainer(pair):
    """Loss and gradient for (chosen, rejected) of one pair under SimPO."""
    import torch
    from trl.experimental.cpo import CPOTrainer

    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"),
        loss_type="simpo",
        alpha=0.0,
        simpo_gamma=GAMMA,
        beta=BETA,
        label_smoothing=0.0,
    )
    sums = torch.tensor(pair[:2], dtype=torch.float64, requires_grad=True)
    averages = sums / torch.tensor(pair[4:6])
    loss = CPOTrainer.cpo_loss(trainer, averages[:1], averages[1:])[0].mean()
    (grads,) = torch.autograd.grad(loss, sums)
    return {"loss": loss.item(), "grads": grads.tolist()}


def record():
    """{loss: [numbers of each pair]}, computed by the TRL that is installed."""
    numbers = {name: [dpo_trainer(types, p) for p in PAIRS] for name, types in TYPES.items()}
    return numbers | {"simpo": [simpo_trainer(p) for p in PAIRS]}


if __name__ == "__main__":
    import torch
    import trl

    versions = {"trl": trl.__version__, "torch": torch.__version__}
    FILE.write_text(json.dumps({"versions": versions, "numbers": record()}, indent=1) + "\n")
