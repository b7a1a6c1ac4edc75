"""How many tokens of each clip survive: a rule for methods with a free ratio, one for fixed windows, one for groups."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import clip_ids, top_k


def check_keep_ratio(keep_ratio: float) -> None:
    """Raises ValueError unless `0 < keep_ratio <= 1` (tokens out / tokens in)."""
    if isinstance(keep_ratio, bool) or not isinstance(keep_ratio, int | float) or not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio is tokens out / tokens in and must be in (0, 1], got {keep_ratio!r}")


def token_budget(lengths: Sequence[int], keep_ratio: float) -> tuple[int, ...]:
    """Gives the tokens each clip may keep: `keep_ratio * length`, rounded half up, at least one (none of none).

    Args:
        lengths: tokens per clip.
        keep_ratio: tokens out / tokens in, in (0, 1].

    Raises:
        ValueError: `keep_ratio` is outside (0, 1] or not a number.
    """
    check_keep_ratio(keep_ratio)
    return tuple(min(n, max(1, math.floor(n * keep_ratio + 0.5))) for n in lengths)


def window_budget(
    lengths: Sequence[int], window: int, frames_per_token: int = 1, tail: str = "keep"
) -> tuple[int, ...]:
    """Gives how many windows of `window` frames each clip holds, at least one (none of none).

    Args:
        lengths: tokens per clip.
        window: frames per window.
        frames_per_token: frames the window counts per token of the clip.
        tail: "keep" counts an incomplete window at the clip's end, "drop" does not, unless it is the clip's only one.
    """
    spare = window - 1 if tail == "keep" else 0
    return tuple(min(n, max(1, (n * frames_per_token + spare) // window)) for n in lengths)


def largest_remainder(shares: Tensor, limits: Tensor, groups: Sequence[int], totals: Sequence[int]) -> tuple[int, ...]:
    """Deals every clip's total out to its groups, in whole numbers in proportion to their shares, within their limits.

    A group's quota is `min(limit, level * share)`, with the level at which the clip's quotas sum to its total; groups
    without a share get what the others cannot take, in proportion to their limits. Quotas are rounded down, and what
    is missing goes, one each, to the groups that lost most by it (Hamilton's method), of equal ones to the earliest.

    Args:
        shares: `[G]` >= 0, the groups of one clip after another.
        limits: `[G]`, the most each group can take, whole numbers.
        groups: groups per clip, C numbers that sum to G.
        totals: what each clip deals out, at most the sum of its limits.

    Returns:
        G whole numbers; those of a clip sum to its total.
    """
    clips = clip_ids(groups)
    shares, limits = shares.cpu().double(), limits.cpu().double()
    wanted = torch.tensor(totals, dtype=torch.double)

    def per_clip(values: Tensor) -> Tensor:
        return torch.bincount(clips, values, minlength=len(groups))

    assert bool((per_clip(limits) >= wanted).all()), "a clip is to deal out more than its groups can take"
    full = torch.zeros_like(clips, dtype=torch.bool)
    while True:  # each round fills at least one group more
        weights = shares.masked_fill(full, 0)
        weights = torch.where((per_clip(weights) == 0)[clips], limits.masked_fill(full, 0), weights)
        level = (wanted - per_clip(limits * full)) / per_clip(weights).clamp(min=1e-300)
        quotas = torch.where(full, limits, level[clips] * weights)
        over = quotas > limits
        if not over.any():
            break
        full |= over
    # Rounding errors must neither take a whole token from a quota nor break a tie.
    dealt = (quotas + 1e-9).floor()
    missing = (wanted - per_clip(dealt)).long().tolist()
    dealt[top_k((quotas - dealt).round(decimals=9), groups, missing)] += 1
    return tuple(dealt.long().tolist())
