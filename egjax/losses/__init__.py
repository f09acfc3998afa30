"""Losses on plain arrays. Needs jax alone.

Every loss returns one float32 value per token or per example; the caller masks and takes the mean
once, from sum and count (`masked_mean`). Masks are True for what counts. Teachers and references
are stopped inside. Hyper-parameters go by keyword and default to the paper's value.
"""

from egjax.losses.distill import (
    forward_kl,
    generalised_jsd,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
)
from egjax.losses.ewc import ewc_penalty, fisher_diagonal
from egjax.losses.preference import (
    Metrics,
    cdpo,
    dpo,
    dpo_paper,
    dpo_positive,
    hinge,
    ipo,
    kl_to_initial,
    length_normalised_dpo,
    robust_dpo,
    rpo,
    simpo,
)
from egjax.losses.ratio import behaviour_ratio
from egjax.losses.reductions import masked_mean, sequence_logps, token_logps
from egjax.losses.sft import sft

__all__ = [
    "Metrics",
    "behaviour_ratio",
    "cdpo",
    "dpo",
    "dpo_paper",
    "dpo_positive",
    "ewc_penalty",
    "fisher_diagonal",
    "forward_kl",
    "generalised_jsd",
    "hinge",
    "ipo",
    "kl_to_initial",
    "length_normalised_dpo",
    "masked_mean",
    "reverse_kl",
    "robust_dpo",
    "rpo",
    "sequence_logps",
    "sft",
    "simpo",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "token_logps",
]
