"""Triton kernel of `most_alike`.

A program multiplies a tile of a clip's tokens with a tile of its targets. Of every token it writes the largest cosine
in the tile and the earliest target within `TIE` of that. Comparing the tiles is left to torch. The earliest tile that
comes within `TIE` of the largest cosine nearly always has it; where it does not, a second launch looks there again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packed import bounds

# Guesses: tokens, targets and channels at once. Products of float32 are not for the matrix units, which would round.
HALF = {"ROWS": 128, "COLUMNS": 128, "CHUNK": 64, "num_warps": 8, "num_stages": 3}
FULL = {"ROWS": 64, "COLUMNS": 64, "CHUNK": 32, "num_warps": 4, "num_stages": 2}


@triton.jit
def _compare(
    x,
    inverse,
    tokens,
    token_starts,
    targets,
    target_starts,
    tops,
    firsts,
    again,
    peaks,
    total,
    stride,
    parts,
    tiles,
    tie,
    WIDTH: tl.constexpr,
    AGAIN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    tile, part = tl.program_id(0) % tiles, tl.program_id(0) // tiles % parts
    clip = tl.program_id(0) // tiles // parts
    row = tl.load(token_starts + clip) + part * ROWS + tl.arange(0, ROWS)
    column = tl.load(target_starts + clip) + tile * COLUMNS + tl.arange(0, COLUMNS)
    last = tl.load(target_starts + clip + 1) - 1
    here, there = row < tl.load(token_starts + clip + 1), column <= last
    if AGAIN:
        here &= tl.load(again + row, mask=here, other=-1) == tile
    if (tl.max(here.to(tl.int32), axis=0) == 0) | (tl.max(there.to(tl.int32), axis=0) == 0):
        return
    token, target = tl.load(tokens + row, mask=here, other=0), tl.load(targets + column, mask=there, other=0)
    channel = tl.arange(0, CHUNK)
    a = x + token[:, None] * stride + channel[None, :]
    b = x + target[None, :] * stride + channel[:, None]
    dots = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, WIDTH, CHUNK):
        inside = start + channel < WIDTH
        p = tl.load(a + start, mask=inside[None, :], other=0)
        q = tl.load(b + start, mask=inside[:, None], other=0)
        dots = tl.dot(p, q, dots, input_precision="ieee")
    cosine = dots * tl.load(inverse + token)[:, None] * tl.load(inverse + target)[None, :]
    cosine = tl.where(there[None, :], cosine, float("-inf"))
    if AGAIN:
        top = tl.load(peaks + row, mask=here, other=0)
        at = firsts + row
    else:
        top = tl.max(cosine, axis=1)
        at = firsts + tile.to(tl.int64) * total + row
        tl.store(tops + tile.to(tl.int64) * total + row, top, mask=here)
    near = cosine >= (top - tie)[:, None]
    # A NaN is near nothing: its target is the last one, which is there at least.
    tl.store(at, tl.min(tl.where(near, column[None, :], last), axis=1), mask=here)


def most_alike(
    embeds: Tensor,
    tokens: Tensor,
    counts: Sequence[int],
    targets: Tensor,
    target_counts: Sequence[int],
    tie: float,
) -> tuple[Tensor, Tensor]:
    """As the reference; there are tokens and targets."""
    if embeds.dtype not in (torch.float16, torch.bfloat16):
        embeds = embeds.float()
    embeds = embeds if embeds.stride(1) == 1 else embeds.contiguous()
    sizes: dict[str, Any] = HALF if embeds.dtype.itemsize == 2 else FULL
    parts, tiles = triton.cdiv(max(counts), sizes["ROWS"]), triton.cdiv(max(target_counts), sizes["COLUMNS"])
    inverse = torch.linalg.vector_norm(embeds, dim=1, dtype=torch.float32).clamp(min=1e-12).reciprocal()
    starts, target_starts = (bounds(tuple(lengths), embeds.device) for lengths in (counts, target_counts))
    inputs = (embeds, inverse, tokens.contiguous(), starts, targets.contiguous(), target_starts)
    tops = inverse.new_full((tiles, len(tokens)), -torch.inf)
    firsts = torch.zeros_like(tops, dtype=torch.int32)
    shape = (len(tokens), embeds.stride(0), parts, tiles, tie)
    grid = (len(counts) * parts * tiles,)
    _compare[grid](*inputs, tops, firsts, None, None, *shape, WIDTH=embeds.shape[1], AGAIN=False, **sizes)
    peaks = tops.amax(dim=0)
    tile = (tops >= peaks - tie).byte().argmax(dim=0, keepdim=True)  # [1, R], the earliest that comes near
    found = firsts.gather(0, tile)[0]
    if tiles > 1:
        again = torch.where(tops.gather(0, tile)[0] < peaks, tile[0], -1)
        _compare[grid](*inputs, tops, found, again, peaks, *shape, WIDTH=embeds.shape[1], AGAIN=True, **sizes)
    return torch.where(peaks == -torch.inf, tokens, targets[found]), peaks
