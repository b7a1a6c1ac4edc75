"""Where the tokens of packed clips lie, and windows over them that never cross from one clip into another."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def upload(
    numbers: Tensor | Sequence[Any], device: torch.device | None = None, dtype: torch.dtype = torch.long
) -> Tensor:
    """Gives numbers, int64 unless told otherwise, on a device, without waiting for what it still has to do."""
    tensor = torch.as_tensor(numbers, dtype=dtype)
    if device is None or device.type != "cuda" or tensor.is_cuda or torch.compiler.is_compiling():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # from other memory it would wait


def clip_ids(lengths: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Gives the clip of every packed token, `[N]` int64: lengths (2, 0, 3) give 0 0 2 2 2."""
    return torch.repeat_interleave(upload(lengths, device), output_size=sum(lengths))


def offsets(lengths: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Gives where each clip starts, and the end of the last: `[C + 1]` int64, as flash attention's `cu_seqlens`."""
    return upload([0, *accumulate(lengths)], device)


@lru_cache(maxsize=128)
def bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Gives `offsets` as int32, and the same tensor for the same lengths: every layer of a tower asks for it."""
    with torch.inference_mode(False):  # it may be used again where there are gradients
        return offsets(lengths, device).int()


def positions(lengths: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Gives every packed token's index inside its clip: `[N]` int64: lengths (2, 0, 3) give 0 1 0 1 2."""
    starts = offsets(lengths, device)[clip_ids(lengths, device)]
    return torch.arange(len(starts), device=device) - starts


def tally(groups: Tensor, size: int, weights: Tensor | None = None) -> Tensor:
    """Counts how often each of 0 to `size - 1` occurs, as `bincount`, which waits for the GPU to tell the greatest.

    Args:
        groups: int64, from 0 to below `size`.
        size: of the result.
        weights: int64, what each counts for. Default: 1.

    Returns:
        `[size]` int64.
    """
    counts = torch.zeros(size, dtype=torch.long, device=groups.device)
    return counts.index_add(0, groups, torch.ones_like(groups) if weights is None else weights)


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
    return functional.pad(embeds, (0, 0, 0, 1))[upload(index, embeds.device)]
