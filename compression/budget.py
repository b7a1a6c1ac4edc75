"""How many tokens of each clip survive: one rule for methods with a free ratio, one for methods with fixed windows."""

from __future__ import annotations

import math
from collections.abc import Sequence


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
