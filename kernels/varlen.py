"""Attention inside packed blocks without padding, by flash attention where there is one."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

_kernel: Any = varlen_attn  # its signature grows from release to release
_TAKES_SCALE = "scale" in inspect.signature(_kernel).parameters
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
    blocks = (bounds, bounds, longest, longest)
    if _TAKES_SCALE:
        mixed: Tensor = _kernel(query, key, value, *blocks, scale=scale)
        return mixed
    # The oldest form has a fixed scale of 1/sqrt(d): the queries carry the difference.
    mixed = _kernel(query * (scale * query.shape[-1] ** 0.5), key, value, *blocks)
    return mixed
