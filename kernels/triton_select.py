"""Triton kernel of `top_k`.

A program takes a clip. It finds the bits of the least score that is kept one after another, by counting, and then
writes what is above it and the earliest of its equals. It never sorts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packed import bounds

BLOCK, WARPS = 8192, 16


@triton.jit
def _keys(scores, at, inside, BITS: tl.constexpr):
    """Gives whole numbers without sign in the order of the scores."""
    score = tl.load(scores + at, mask=inside, other=0)
    if BITS == 64:
        score = tl.where(score == 0, 0.0, score.to(tl.float64))  # there is a negative zero
        bits = score.to(tl.uint64, bitcast=True)
    else:
        score = tl.where(score == 0, 0.0, score.to(tl.float32))
        bits = score.to(tl.uint32, bitcast=True)
    one = tl.full([1], 1, bits.dtype)
    top = one << (BITS - 1)
    every = top | (top - one)  # `~bits` is refused by numpy in the interpreter of Triton 3.8: its -1 has a sign
    return tl.where(bits >> (BITS - 1) == one, bits ^ every, bits | top)


@triton.jit
def _select(scores, starts, kept_starts, kept, BITS: tl.constexpr, BLOCK: tl.constexpr):
    clip = tl.program_id(0)
    start, stop = tl.load(starts + clip), tl.load(starts + clip + 1)
    target = tl.load(kept_starts + clip)
    budget = tl.load(kept_starts + clip + 1) - target
    if budget == 0:
        return
    offset = tl.arange(0, BLOCK)
    bit = tl.full([1], 1, tl.uint64 if BITS == 64 else tl.uint32) << (BITS - 1)
    least = bit ^ bit
    for _ in range(BITS):
        tried = least | bit
        count = 0
        for first in range(start, stop, BLOCK):
            inside = first + offset < stop
            keys = _keys(scores, first + offset, inside, BITS)
            count += tl.sum((inside & (keys >= tried)).to(tl.int32), axis=0)
        least = tl.where(count >= budget, tried, least)
        bit >>= 1
    above = 0
    for first in range(start, stop, BLOCK):
        inside = first + offset < stop
        above += tl.sum((inside & (_keys(scores, first + offset, inside, BITS) > least)).to(tl.int32), axis=0)
    equal_left = budget - above
    for first in range(start, stop, BLOCK):
        inside = first + offset < stop
        keys = _keys(scores, first + offset, inside, BITS)
        equal = (inside & (keys == least)).to(tl.int32)
        keep = (inside & (keys > least)) | ((equal == 1) & (tl.cumsum(equal, axis=0) <= equal_left))
        rank = tl.cumsum(keep.to(tl.int32), axis=0)
        tl.store(kept + target + rank - 1, (first + offset).to(tl.int64), mask=keep)
        target += tl.sum(keep.to(tl.int32), axis=0)
        equal_left -= tl.sum(equal, axis=0)


def top_k(scores: Tensor, lengths: Sequence[int], budget: Sequence[int]) -> Tensor:
    """As the reference; N > 0."""
    kept = torch.empty(sum(budget), dtype=torch.long, device=scores.device)
    if not scores.is_floating_point():
        scores = scores.double()
    _select[(len(lengths),)](
        scores.contiguous(),
        bounds(tuple(lengths), scores.device),
        bounds(tuple(budget), scores.device),
        kept,
        BITS=64 if scores.dtype == torch.double else 32,
        BLOCK=min(BLOCK, triton.next_power_of_2(max(lengths))),
        num_warps=WARPS,
    )
    return kept
