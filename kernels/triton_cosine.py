"""Triton kernels of `adjacent_cosine`.

A program takes a few tokens. It reads each of them twice, as itself and as the neighbour of the one before, the second
time out of the cache. How a row is added up depends on its width alone: equal pairs have bit-equal cosines.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# Measured, here and in the other kernels, on an H200.
ROWS, CHUNK, WARPS = 2, 256, 2  # of the forward pass
BACK_ROWS, BACK_WARPS = 4, 4
EPS = tl.constexpr(1e-12)  # the least norm, as in torch's normalize


@triton.jit
def _forward(x, cosine, norms, rows, stride, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, CHUNK)
    here = row < rows
    paired = row + 1 < rows
    first = x + row.to(tl.int64)[:, None] * stride + column[None, :]
    dot = tl.zeros([ROWS, CHUNK], tl.float32)
    own = tl.zeros([ROWS, CHUNK], tl.float32)
    other = tl.zeros([ROWS, CHUNK], tl.float32)
    for start in tl.static_range(0, WIDTH, CHUNK):  # unrolled, so that loads do not wait for sums
        inside = (start + column < WIDTH)[None, :]
        a = tl.load(first + start, mask=here[:, None] & inside, other=0).to(tl.float32)
        b = tl.load(first + start + stride, mask=paired[:, None] & inside, other=0).to(tl.float32)
        dot += a * b
        own += a * a
        other += b * b
    norm = tl.maximum(tl.sqrt_rn(tl.sum(own, axis=1)), EPS)
    next_norm = tl.maximum(tl.sqrt_rn(tl.sum(other, axis=1)), EPS)
    tl.store(cosine + row, tl.sum(dot, axis=1) / (norm * next_norm), mask=here)
    tl.store(norms + row, norm, mask=here)


@triton.jit
def _backward(grad, x, cosine, norms, out, rows, stride, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, CHUNK)
    here = row < rows
    after = row + 1 < rows
    before = here & (row > 0)
    norm = tl.load(norms + row, mask=here, other=1)
    cos_after = tl.load(cosine + row, mask=here, other=0)
    cos_before = tl.load(cosine + row - 1, mask=before, other=0)
    # The last token of a clip has no neighbour: its -inf is a constant.
    bound_after = here & (cos_after != float("-inf"))
    bound_before = before & (cos_before != float("-inf"))
    g_after = tl.load(grad + row, mask=bound_after, other=0) / norm
    g_before = tl.load(grad + row - 1, mask=bound_before, other=0) / norm
    # d cos / d x = (unit vector of the neighbour - cos * own unit vector) / norm; a norm at its floor is a constant
    turn = tl.where(bound_after, g_after * cos_after, 0) + tl.where(bound_before, g_before * cos_before, 0)
    of_own = tl.where(norm > EPS, -turn / norm, 0)[:, None]
    of_next = (g_after / tl.load(norms + row + 1, mask=after, other=1))[:, None]
    of_previous = (g_before / tl.load(norms + row - 1, mask=before, other=1))[:, None]
    first = row.to(tl.int64)[:, None] * stride + column[None, :]
    target = out + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    for start in range(0, WIDTH, CHUNK):
        inside = (start + column < WIDTH)[None, :]
        at = x + first + start
        dx = of_own * tl.load(at, mask=here[:, None] & inside, other=0).to(tl.float32)
        dx += of_next * tl.load(at + stride, mask=after[:, None] & inside, other=0).to(tl.float32)
        dx += of_previous * tl.load(at - stride, mask=before[:, None] & inside, other=0).to(tl.float32)
        tl.store(target + start, dx.to(out.dtype.element_ty), mask=here[:, None] & inside)


class AdjacentCosine(torch.autograd.Function):
    """Cosines of `[N, D]`, N > 0, with the next row: `[N]` float32, and -inf at the rows `last`."""

    @staticmethod
    def forward(ctx: Any, embeds: Tensor, last: Tensor) -> Tensor:
        """Also keeps the norms."""
        embeds = embeds if embeds.stride(1) == 1 else embeds.contiguous()
        rows, width = embeds.shape
        cosine, norms = embeds.new_empty(2, rows, dtype=torch.float32)
        _forward[(triton.cdiv(rows, ROWS),)](
            embeds,
            cosine,
            norms,
            rows,
            embeds.stride(0),
            WIDTH=width,
            ROWS=ROWS,
            CHUNK=min(CHUNK, triton.next_power_of_2(width)),
            num_warps=WARPS,
        )
        cosine.index_fill_(0, last, -torch.inf)
        ctx.save_for_backward(embeds, cosine, norms)
        return cosine

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """One pass: every row's gradient is a sum of itself and its two neighbours."""
        embeds, cosine, norms = ctx.saved_tensors
        rows, width = embeds.shape
        out = embeds.new_empty(rows, width)
        _backward[(triton.cdiv(rows, BACK_ROWS),)](
            grad.contiguous(),
            embeds,
            cosine,
            norms,
            out,
            rows,
            embeds.stride(0),
            WIDTH=width,
            ROWS=BACK_ROWS,
            CHUNK=min(CHUNK, triton.next_power_of_2(width)),
            num_warps=BACK_WARPS,
        )
        return out, None
