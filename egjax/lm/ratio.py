"""Decoding from the behaviour ratio: a large model, steered by what a small one has learnt."""

from __future__ import annotations

from functools import cache

import jax

from egjax.errors import check_range
from egjax.lm.ensemble import Combine
from egjax.losses import behaviour_ratio

__all__ = ["ratio_combine"]


def ratio_combine(
    *, alpha: float = 1.0, clip: float | None = None, plausible: float | None = None
) -> Combine:
    """The combination for `generate((large, expert, anti_expert), ...)`.

    `π̄ = πᴸ · (πᴱ / πᴺ)^α / Z̄` at every token, from "Growing Through Experience" (arXiv
    2506.01312), where the three models need their own caches but no training.

    Args:
        alpha: exponent of the ratio; 1 in the paper.
        clip: bound on the size of the log-ratio, or None; see `egjax.losses.behaviour_ratio`.
        plausible: restriction to what the large model finds plausible, or None; see there.

    Returns:
        A function of the logits (large, expert, anti_expert). Equal settings give the same
        function, so a decoder that was compiled for it is used again.

    Raises:
        EgjaxError: a clip below 0 or a plausible share outside of (0, 1].
    """
    check_range(clip, "[0, inf)", where="clip")
    check_range(plausible, "(0, 1]", where="plausible")
    return _ratio_combine(alpha, clip, plausible)


@cache
def _ratio_combine(alpha: float, clip: float | None, plausible: float | None) -> Combine:
    def combine(logits: tuple[jax.Array, ...]) -> jax.Array:
        large, expert, anti_expert = logits
        return behaviour_ratio(
            large, expert, anti_expert, alpha=alpha, clip=clip, plausible=plausible
        )

    return combine
