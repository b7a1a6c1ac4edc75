"""Triton kernel of `gather_rows`: a program copies a row from whichever source holds it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .gather import MOST

CHUNK, WARPS = 1024, 4  # a guess


@triton.jit
def _gather(
    first,
    second,
    third,
    index,
    out,
    n1,
    n2,
    stride1,
    stride2,
    stride3,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.load(index + row + tl.arange(0, 1))
    dtype = out.dtype.element_ty
    for start in tl.static_range(0, WIDTH, CHUNK):
        column = start + tl.arange(0, CHUNK)
        inside = column < WIDTH
        of_first = inside & (at >= 0) & (at < n1)
        of_second = inside & (at >= n1) & (at < n2)
        of_third = inside & (at >= n2)
        values = tl.load(first + at * stride1 + column, mask=of_first, other=0).to(dtype)
        values += tl.load(second + (at - n1) * stride2 + column, mask=of_second, other=0).to(dtype)
        values += tl.load(third + (at - n2) * stride3 + column, mask=of_third, other=0).to(dtype)
        tl.store(out + row * WIDTH + column, values, mask=inside)


def _rows(sources: Sequence[Tensor], index: Tensor, dtype: torch.dtype) -> Tensor:
    """Gives the rows of one to `MOST` sources."""
    parts = [x if x.stride(1) == 1 else x.contiguous() for x in sources]
    ends = list(accumulate(len(x) for x in parts))
    missing = MOST - len(parts)
    parts, ends = parts + parts[-1:] * missing, ends + ends[-1:] * missing
    width = parts[0].shape[1]
    out = parts[0].new_empty(len(index), width, dtype=dtype)
    if len(index):
        _gather[(len(index),)](
            *parts,
            index.contiguous(),
            out,
            *ends[:2],
            *(x.stride(0) for x in parts),
            WIDTH=width,
            CHUNK=min(CHUNK, triton.next_power_of_2(width)),
            num_warps=WARPS,
        )
    return out


class GatherRows(torch.autograd.Function):
    """`gather_rows` of at most `MOST` sources of a width above 0."""

    @staticmethod
    def forward(ctx: Any, index: Tensor, *sources: Tensor) -> Tensor:
        """Keeps the index alone."""
        ctx.save_for_backward(index)
        ctx.sources = [(len(x), x.dtype) for x in sources]
        return _rows(sources, index, sources[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Puts every row back; what was not gathered has none."""
        (index,) = ctx.saved_tensors
        counts = [n for n, _ in ctx.sources]
        total = sum(counts)
        rows = grad.new_zeros(total + 1, grad.shape[1])  # the last one takes what came from no source
        rows.index_copy_(0, index.where(index >= 0, total), grad)
        parts = zip(ctx.needs_input_grad[1:], rows[:total].split(counts), ctx.sources, strict=True)
        return None, *(part.to(dtype) if needed else None for needed, part, (_, dtype) in parts)
