"""Attention inside blocks of packed states, and how much of it each state receives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .select import pad_clips

_MAP_ENTRIES = 2**26  # of the attention maps held at once, a quarter of a gigabyte in float32


def block_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float, key_bias: Tensor | None = None
) -> Tensor:
    """Attends inside each block, in one call for all blocks.

    Args:
        query: `[N, H, d]`.
        key: `[N, H, d]`.
        value: `[N, H, d]`.
        lengths: states per block, that sum to N.
        scale: of the logits.
        key_bias: `[N]`, added to every logit of its key.

    Returns:
        `[N, H, d]`.
    """
    padded = [pad_clips(x, lengths) for x in (query, key, value)]
    real = padded[0][1]
    q, k, v = (x.transpose(1, 2) for x, _ in padded)  # [B, H, n, d]
    mask = None
    if key_bias is not None:
        bias, _ = pad_clips(key_bias.to(q.dtype), lengths, value=-torch.inf)
        mask = bias[:, None, None]
    elif len(set(lengths)) > 1:
        mask = real[:, None, None]
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)[real]


def attention_received(query: Tensor, key: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """Gives the attention every state receives inside its block: the mean over heads of softmax(QK^T)'s column sums.

    A column's mean over the n queries of its block averages 1/n; times n it averages 1 whatever the block, which makes
    states of different blocks comparable. That product is the column's sum.

    Args:
        query: `[N, H, d]`.
        key: `[N, H, d]`.
        lengths: states per block, that sum to N.
        scale: of the logits.

    Returns:
        `[N]` float32; the mean over a block is 1.
    """
    received = []
    longest = max(lengths, default=0)
    at_once = max(1, _MAP_ENTRIES // max(1, query.shape[1] * longest**2))
    start = 0
    for first in range(0, len(lengths), at_once):
        some = lengths[first : first + at_once]
        stop = start + sum(some)
        q, real = pad_clips(query[start:stop].float(), some)
        k, _ = pad_clips(key[start:stop].float(), some)
        with torch.autocast(q.device.type, enabled=False):  # methods decide by it
            logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
        weights = logits.masked_fill(~real[:, None, None], -torch.inf).softmax(dim=-1)
        received.append((weights * real[:, None, :, None]).sum(dim=2).mean(dim=1)[real])
        start = stop
    return torch.cat([query.new_empty(0, dtype=torch.float32), *received])
