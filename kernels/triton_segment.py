"""Triton kernels of `segment_mean` and `segment_merge`.

Forward, a program takes one run; backward, a few rows of whatever runs, so that long runs are shared out.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS, CHUNK, WARPS = 2, 512, 2  # of the forward pass
MANY = 8192  # runs from which on a program takes all columns of its run
LANES = tl.constexpr(32)  # rows at once where only their weights are read
BACK_ROWS, BACK_CHUNK, BACK_WARPS = 4, 512, 4


@triton.jit
def _forward(
    x,
    weights,
    counts,
    ends,
    mean,
    totals,
    run_of,
    slots,
    out_slots,
    stride,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    CENTRES: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    spans = tl.cdiv(WIDTH, SPAN)
    run, span = tl.program_id(0) // spans, tl.program_id(0) % spans
    count = tl.load(counts + run)
    stop = tl.load(ends + run)
    for start in range(0, SPAN, CHUNK):
        column = span * SPAN + start + tl.arange(0, CHUNK)
        inside = column < WIDTH
        summed = tl.zeros([CHUNK], tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for first in range(stop - count, stop, ROWS):
            row = (first + tl.arange(0, ROWS)).to(tl.int64)
            here = row < stop
            weight = tl.load(weights + row, mask=here, other=0).to(tl.float32)
            weight = tl.where(here & (count == 1), 1.0, weight)  # a run of one row is that row, bit for bit
            values = tl.load(x + row[:, None] * stride + column[None, :], mask=here[:, None] & inside[None, :], other=0)
            summed += tl.sum(weight[:, None] * values.to(tl.float32), axis=0)
            total += weight
        average = summed / tl.sum(total, axis=0)
        tl.store(mean + run.to(tl.int64) * WIDTH + column, average.to(mean.dtype.element_ty), mask=inside)
    if span == 0:
        weight_sum = tl.zeros([LANES], tl.float64)
        moment = tl.zeros([LANES], tl.float64)
        for first in range(stop - count, stop, LANES):
            row = first + tl.arange(0, LANES)
            here = row < stop
            weight = tl.load(weights + row, mask=here, other=0).to(tl.float64)
            weight_sum += weight
            tl.store(run_of + row, run, mask=here)
            if CENTRES:
                moment += weight * tl.load(slots + row, mask=here, other=0).to(tl.float64)
        tl.store(totals + run, tl.sum(weight_sum, axis=0).to(tl.float32))
        if CENTRES:
            centre = tl.sum(moment, axis=0) / tl.sum(weight_sum, axis=0)
            tl.store(out_slots + run, tl.floor(centre).to(tl.int64))


@triton.jit
def _backward(
    grad,
    x,
    weights,
    totals,
    run_of,
    dx,
    along,
    rows,
    stride,
    WIDTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, CHUNK)
    here = row < rows
    run = tl.load(run_of + row, mask=here, other=0).to(tl.int64)
    share = tl.load(weights + row, mask=here, other=0).to(tl.float32) / tl.load(totals + run, mask=here, other=1)
    product = tl.zeros([ROWS, CHUNK], tl.float32)
    for start in range(0, WIDTH, CHUNK):
        mask = here[:, None] & (start + column < WIDTH)[None, :]
        g = tl.load(grad + run[:, None] * WIDTH + start + column[None, :], mask=mask, other=0).to(tl.float32)
        at = row[:, None] * WIDTH + start + column[None, :]
        tl.store(dx + at, (share[:, None] * g).to(dx.dtype.element_ty), mask=mask)
        if WEIGHTED:
            values = tl.load(x + row[:, None] * stride + start + column[None, :], mask=mask, other=0)
            product += values.to(tl.float32) * g
    if WEIGHTED:
        tl.store(along + row, tl.sum(product, axis=1), mask=here)


class SegmentMerge(torch.autograd.Function):
    """Means of runs of `[N, D]`, N > 0, the sums of their weights, and their centres if there are slots."""

    @staticmethod
    def forward(
        ctx: Any, embeds: Tensor, weights: Tensor, counts: Tensor, slots: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Gives means `[M, D]`, slots `[M]` int64 or None, and sums of weights `[M]` float32."""
        embeds = embeds if embeds.stride(1) == 1 else embeds.contiguous()
        weights, counts = weights.contiguous(), counts.contiguous()
        width, runs = embeds.shape[1], len(counts)
        mean = embeds.new_empty(runs, width)
        totals = embeds.new_empty(runs, dtype=torch.float32)
        centres = None if slots is None else torch.empty_like(counts, dtype=torch.long)
        run_of = torch.empty_like(weights, dtype=torch.int32)
        chunk = min(CHUNK, triton.next_power_of_2(width))
        span = width if runs >= MANY else chunk
        _forward[(runs * triton.cdiv(width, span),)](
            embeds,
            weights,
            counts,
            counts.cumsum(0),
            mean,
            totals,
            run_of,
            None if slots is None else slots.contiguous(),
            centres,
            embeds.stride(0),
            WIDTH=width,
            SPAN=span,
            CENTRES=slots is not None,
            ROWS=ROWS,
            CHUNK=chunk,
            num_warps=WARPS,
        )
        ctx.save_for_backward(embeds, weights, counts, totals, run_of)
        ctx.mark_non_differentiable(*(x for x in (centres, totals) if x is not None))
        return mean, centres, totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor | None, None, None]:
        """A row's gradient is its share of its run's; a weight's is how far its row stands out along that."""
        embeds, weights, counts, totals, run_of = ctx.saved_tensors
        rows, width = embeds.shape
        weighted = ctx.needs_input_grad[1]
        dx = embeds.new_empty(rows, width)
        along = embeds.new_empty(rows, dtype=torch.float32) if weighted else None  # of each row, x g
        chunk = min(BACK_CHUNK, triton.next_power_of_2(width))
        _backward[(triton.cdiv(rows, BACK_ROWS),)](
            grad.contiguous(),
            embeds,
            weights,
            totals,
            run_of,
            dx,
            along,
            rows,
            embeds.stride(0),
            WIDTH=width,
            WEIGHTED=weighted,
            ROWS=BACK_ROWS,
            CHUNK=chunk,
            num_warps=BACK_WARPS,
        )
        if along is None:
            return dx, None, None, None
        mean = torch.segment_reduce(along * weights, "sum", lengths=counts, unsafe=True) / totals
        dw = (along - mean[run_of]) / totals[run_of]
        return dx, dw.to(weights.dtype), None, None
