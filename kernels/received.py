"""The attention that states receive."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .backend import use_triton
from .select import pad_clips, unpad_clips

_MAP_ENTRIES = 2**26  # of the attention maps held at once, a quarter of a gigabyte in float32


@torch.no_grad()
def attention_received(
    query: Tensor,
    key: Tensor,
    lengths: Sequence[int],
    scale: float,
    causal: bool = False,
    log: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Gives the attention every state receives inside its block: the mean over heads of softmax(QK^T)'s column sums.

    A column's mean over the n queries of its block averages 1/n; times n it averages 1 whatever the block, which makes
    states of different blocks comparable. That product is the column's sum. It decides what is kept: no gradient
    passes through it.

    Args:
        query: `[N, H, d]`.
        key: `[N, K, d]`, where H is a multiple of K: each key head serves H / K query heads that follow one another.
        lengths: states per block, that sum to N; one block is a whole sequence.
        scale: of the logits.
        causal: a state attends to itself and those before it, not to its whole block.
        log: gives the logarithm, of what would underflow as well.
        backend: "auto", "torch" or "triton".

    Returns:
        `[N]` float32, whose mean over a block is 1; or the logarithm of that.
    """
    if use_triton(backend, query) and len(query):
        from . import triton_received

        return triton_received.attention_received(query, key, lengths, scale, causal, log)
    received = []
    heads, longest = query.shape[1], max(lengths, default=0)
    at_once = max(1, _MAP_ENTRIES // max(1, heads * longest**2))  # blocks
    rows = max(1, _MAP_ENTRIES // max(1, heads * longest))  # queries, of a block that is too large by itself
    start = 0
    for first in range(0, len(lengths), at_once):
        some = lengths[first : first + at_once]
        stop = start + sum(some)
        q, real = pad_clips(query[start:stop].float(), some)
        k, _ = pad_clips(key[start:stop].float().repeat_interleave(heads // key.shape[1], dim=1), some)
        columns = q.new_full((len(some), heads, q.shape[1]), -torch.inf if log else 0.0)
        for top in range(0, q.shape[1], rows):
            with torch.autocast(q.device.type, enabled=False):  # methods decide by it
                logits = torch.einsum("bqhd,bkhd->bhqk", q[:, top : top + rows], k).mul_(scale)
            hidden = ~real[:, None, None]
            if causal:
                hidden = hidden | torch.ones(logits.shape[2:], dtype=torch.bool, device=q.device).triu(1 + top)
            logits.masked_fill_(hidden, -torch.inf)
            asking = real[:, None, top : top + rows, None]
            if log:
                weights = logits.log_softmax(dim=-1).masked_fill_(~asking, -torch.inf)
                columns = torch.logaddexp(columns, _log_sums(weights))
            else:
                columns += logits.softmax(dim=-1).mul_(asking).sum(dim=2)
        columns = columns.logsumexp(dim=1) - math.log(heads) if log else columns.mean(dim=1)
        received.append(unpad_clips(columns, some))
        start = stop
    return torch.cat([query.new_empty(0, dtype=torch.float32), *received])


def _log_sums(weights: Tensor) -> Tensor:
    """Gives the logarithm of the column sums of `exp(weights)`: `[..., q, k]` to `[..., k]`."""
    top = weights.amax(dim=-2, keepdim=True).clamp(min=torch.finfo(weights.dtype).min)  # of a column of -inf, too
    # far below what float32 can add to 1, and several times as fast as exp where it underflows
    scaled = (weights - top).clamp_(min=-80).exp_()
    return scaled.sum(dim=-2).log() + top.squeeze(-2)
