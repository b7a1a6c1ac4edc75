"""Where the tokens of packed clips lie, and windows over them that never cross from one clip into another."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional


def clip_ids(lengths: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Gives the clip of every packed token, `[N]` int64: lengths (2, 0, 3) give 0 0 2 2 2."""
    counts = torch.tensor(lengths, dtype=torch.long)
    return torch.repeat_interleave(torch.arange(len(lengths)), counts).to(device)


def offsets(lengths: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Gives where each clip starts, and the end of the last: `[C + 1]` int64, as flash attention's `cu_seqlens`."""
    return torch.tensor([0, *lengths], dtype=torch.long).cumsum(0).to(device, non_blocking=True)


@lru_cache(maxsize=128)
def bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Gives `offsets` as int32, and the same tensor for the same lengths: every layer of a tower asks for it."""
    return offsets(lengths, device).int()


def positions(lengths: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Gives every packed token's index inside its clip: `[N]` int64: lengths (2, 0, 3) give 0 1 0 1 2."""
    starts = offsets(lengths)[:-1]
    return (torch.arange(sum(lengths)) - starts[clip_ids(lengths)]).to(device)


def unfold(
    embeds: Tensor, lengths: Sequence[int], size: int, stride: int, windows: Sequence[int], before: int = 0
) -> Tensor:
    """Cuts every clip into windows of `size` tokens, one every `stride` tokens, with zeros outside the clip.

    Window i of a clip covers its tokens `i * stride - before` to `i * stride - before + size - 1`.

    Args:
        embeds: `[N, D]`.
        lengths: tokens per clip, C numbers that sum to N.
        size: tokens per window.
        stride: tokens from one window to the next.
        windows: how many windows each clip gets, C numbers that sum to M.
        before: how many tokens before its clip the first window starts.

    Returns:
        `[M, size, D]`.
    """
    clips = clip_ids(windows)
    inside = (positions(windows) * stride - before)[:, None] + torch.arange(size)  # [M, size]
    valid = (inside >= 0) & (inside < torch.tensor(lengths, dtype=torch.long)[clips][:, None])
    index = torch.where(valid, offsets(lengths)[clips][:, None] + inside, len(embeds))  # the row of zeros
    return functional.pad(embeds, (0, 0, 0, 1))[index.to(embeds.device)]
