"""Losses on plain arrays. Needs jax alone.

Every loss returns one float32 value per token or per example; the caller masks and takes the mean
once, from sum and count (`masked_mean`). Masks are True for what counts. Teachers and references
are stopped inside. Hyper-parameters go by keyword and default to the paper's value.
"""

from egjax.losses.chunked import (
    chunked_kl_to_initial,
    chunked_loss,
    chunked_sequence_logps,
    chunked_token_logps,
    chunked_token_losses,
    chunked_top_k,
)
from egjax.losses.distill import (
    Terms,
    forward_kl,
    forward_kl_terms,
    generalised_jsd,
    generalised_jsd_terms,
    reverse_kl,
    reverse_kl_terms,
    skewed_forward_kl,
    skewed_forward_kl_terms,
    skewed_reverse_kl,
    skewed_reverse_kl_terms,
)
from egjax.losses.ewc import ewc_penalty, fisher_diagonal
from egjax.losses.heads import Head, Ratio, Targets, Teacher, TopK
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
from egjax.losses.sft import sft, z_loss

__all__ = [
    "Head",
    "Metrics",
    "Ratio",
    "Targets",
    "Teacher",
    "Terms",
    "TopK",
    "behaviour_ratio",
    "cdpo",
    "chunked_kl_to_initial",
    "chunked_loss",
    "chunked_sequence_logps",
    "chunked_token_logps",
    "chunked_token_losses",
    "chunked_top_k",
    "dpo",
    "dpo_paper",
    "dpo_positive",
    "ewc_penalty",
    "fisher_diagonal",
    "forward_kl",
    "forward_kl_terms",
    "generalised_jsd",
    "generalised_jsd_terms",
    "hinge",
    "ipo",
    "kl_to_initial",
    "length_normalised_dpo",
    "masked_mean",
    "reverse_kl",
    "reverse_kl_terms",
    "robust_dpo",
    "rpo",
    "sequence_logps",
    "sft",
    "simpo",
    "skewed_forward_kl",
    "skewed_forward_kl_terms",
    "skewed_reverse_kl",
    "skewed_reverse_kl_terms",
    "token_logps",
    "z_loss",
]
