"""Attention inside packed blocks without padding, by flash attention where there is one."""

from __future__ import annotations

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
HEAD_MULTIPLE = 8  # of the head size, which fast attention kernels ask for


def can_use_varlen(query: Tensor) -> bool:
    """Tells whether `varlen_attention` takes these queries: on a GPU, in half precision, with a fitting head size."""
    return query.is_cuda and query.dtype in HALF and query.shape[-1] % HEAD_MULTIPLE == 0


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float) -> Tensor:
    """Attends inside each block, bidirectionally, in one call that never pads and never waits for the GPU.

    Args:
        query: `[N, H, d]`, on a GPU.
        key: `[N, H, d]`.
        value: `[N, H, d]`.
        bounds: `[B + 1]` int32, where the blocks begin, and the end of the last.
        longest: states of the longest block.
        scale: of the logits.

    Returns:
        `[N, H, d]`.
    """
    from torch.nn.attention.varlen import varlen_attn  # which imports Triton

    mixed: Tensor = varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scale)  # type: ignore[assignment]
    return mixed
