"""Reductions over runs of neighbouring packed tokens, that accumulate in fp32.

A run is given by its length: `counts` `[M]` int64, each at least 1, sums to N. `torch.segment_reduce` adds each run in
order, so that the result is the same on every call; `index_add` and `scatter_reduce` are not, on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import use_triton


def segment_reduce(values: Tensor, reduce: str, counts: Tensor) -> Tensor:
    """Reduces every run of rows to one row.

    Args:
        values: `[N, ...]`, reduced in their own dtype.
        reduce: "sum", "max" or "min".
        counts: rows per run, `[M]` int64 >= 1.

    Returns:
        `[M, ...]`.
    """
    # unsafe: no check of counts, which would wait for the GPU and fails on empty input
    return torch.segment_reduce(values, reduce, lengths=counts, axis=0, unsafe=True)


def segment_mean(embeds: Tensor, weights: Tensor, counts: Tensor, backend: str = "auto") -> Tensor:
    """Averages every run of rows: `sum(w * x) / sum(w)`, in fp32; a run of one row is that row, bit for bit.

    Args:
        embeds: `[N, D]`.
        weights: `[N]`, positive.
        counts: rows per run, `[M]` int64 >= 1.
        backend: "auto", "torch" or "triton".

    Returns:
        `[M, D]` in the dtype of `embeds`.
    """
    if use_triton(backend, embeds) and embeds.numel():
        from .triton_segment import SegmentMerge

        mean: Tensor = SegmentMerge.apply(embeds, weights, counts, None)[0]
        return mean
    weights = weights.float()
    share = weights / segment_reduce(weights, "sum", counts).repeat_interleave(counts, output_size=len(weights))
    return segment_reduce(share[:, None] * embeds.float(), "sum", counts).to(embeds.dtype)


def segment_merge(
    embeds: Tensor, slots: Tensor, sizes: Tensor, counts: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Merges every run into one token: `segment_mean` by size and `segment_centres`, in one pass over memory.

    Args:
        embeds: `[N, D]`.
        slots: `[N]` int64.
        sizes: `[N]` float32.
        counts: rows per run, `[M]` int64 >= 1.
        backend: "auto", "torch" or "triton".

    Returns:
        Means `[M, D]` in the dtype of `embeds`, slots `[M]` int64 and sizes `[M]` float32.
    """
    if use_triton(backend, embeds) and embeds.numel():
        from .triton_segment import SegmentMerge

        merged: tuple[Tensor, Tensor, Tensor] = SegmentMerge.apply(embeds, sizes, counts, slots)
        return merged
    return segment_mean(embeds, sizes, counts, backend), *segment_centres(slots, sizes, counts)


def segment_softmax(logits: Tensor, counts: Tensor) -> Tensor:
    """Gives the softmax inside every run, in fp32.

    Args:
        logits: `[N]`.
        counts: rows per run, `[M]` int64 >= 1.

    Returns:
        `[N]` float32, 1 in sum over every run.
    """
    logits = logits.float()
    # The shift is for range only and cancels: no gradient passes through it.
    top = segment_reduce(logits.detach(), "max", counts).repeat_interleave(counts, output_size=len(logits))
    weights = (logits - top).exp()
    return weights / segment_reduce(weights, "sum", counts).repeat_interleave(counts, output_size=len(logits))


def segment_centres(slots: Tensor, sizes: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Gives the slot and the size of the token that every run is merged into.

    The slot is the floor of the size-weighted centre of the run's slots, the size the sum of its sizes. Slots that
    increase strictly stay so.

    Args:
        slots: `[N]` int64.
        sizes: `[N]` float32.
        counts: rows per run, `[M]` int64 >= 1.

    Returns:
        Slots `[M]` int64 and sizes `[M]` float32.
    """
    # fp64: slot x size sums pass 2**24, and a centre that is a whole number must not be floored to the one below
    total = segment_reduce(sizes.double(), "sum", counts)
    centre = segment_reduce(sizes.double() * slots, "sum", counts) / total
    return centre.floor().long(), total.float()
