"""Triton kernels of `attention_received`: softmax(QK^T)'s column sums without the map.

A softmax needs a row's maximum and sum before the first column can be added up. `_rows` finds them, a program for
`TILE` queries, and `_columns` computes the logits again, a program for `TILE` keys. Where every block is a single tile
`_blocks` does both at once. Logits are in base 2; products of half precision are exact in the float32 they add up in.

For the logarithm a column holds its largest weight's, and the sum relative to that, query by query of a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packed import bounds

TILE, STEP, WARPS, STAGES = 128, 64, 8, 3  # a program's own rows, those it runs over
BLOCK_WARPS = 4  # of `_blocks`
EXACT_TILE = 32  # of float32, whose products the matrix units would round
NOTHING = tl.constexpr(-1e30)  # below the logarithm of any weight, and finite: differences from it are numbers


@triton.jit
def _load(x, row, n, stride, SIZE: tl.constexpr, PADDED: tl.constexpr):
    column = tl.arange(0, PADDED)
    mask = (row < n)[:, None] & (column < SIZE)[None, :]
    return tl.load(x + row.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0)


@triton.jit
def _add(weights, tops, logits, share, LOG: tl.constexpr):
    """Adds `exp2(logits) * share` to the weights; for the logarithm, to `exp2(tops) * weights`."""
    if LOG:
        logits += tl.log2(share)
        less = tl.exp2(-tl.abs(logits - tops))
        weights = tl.where(logits > tops, weights * less + 1, weights + less)
        tops = tl.maximum(tops, logits)
    else:
        weights += tl.exp2(logits) * share
    return weights, tops


@triton.jit
def _sum(weights, tops, LOG: tl.constexpr):
    if LOG:
        top = tl.max(tops, axis=0)
        return tl.log2(tl.sum(weights * tl.exp2(tops - top[None, :]), axis=0)) + top
    else:
        return tl.sum(weights, axis=0)


@triton.jit
def _rows(
    query,
    key,
    blocks,
    peaks,
    shares,
    total,
    query_stride,
    query_head,
    key_stride,
    key_head,
    group,
    tiles,
    scale,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    CAUSAL: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    block, tile = tl.program_id(0) // tiles, tiles - 1 - tl.program_id(0) % tiles  # if causal, long rows first
    start = tl.load(blocks + block).to(tl.int64)
    n = (tl.load(blocks + block + 1) - start).to(tl.int32)
    if tile * TILE >= n:
        return
    query += start * query_stride + head * query_head
    key += start * key_stride + head // group * key_head
    row, step = tile * TILE + tl.arange(0, TILE), tl.arange(0, STEP)
    q = _load(query, row, n, query_stride, SIZE, PADDED)
    peak = tl.full([TILE], float("-inf"), tl.float32)
    summed = tl.zeros([TILE], tl.float32)
    stop = tl.minimum(n, (tile + 1) * TILE) if CAUSAL else n
    whole = (tile * TILE if CAUSAL else n) // STEP * STEP
    for first in range(0, whole, STEP):
        k = _load(key, first + step, n, key_stride, SIZE, PADDED)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        higher = tl.maximum(peak, tl.max(logits, axis=1))
        summed = summed * tl.exp2(peak - higher) + tl.sum(tl.exp2(logits - higher[:, None]), axis=1)
        peak = higher
    for first in range(whole, stop, STEP):
        column = first + step
        k = _load(key, column, n, key_stride, SIZE, PADDED)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        seen = (column < n)[None, :]
        if CAUSAL:
            seen &= column[None, :] <= row[:, None]
        logits = tl.where(seen, logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, axis=1))
        summed = summed * tl.exp2(peak - higher) + tl.sum(tl.exp2(logits - higher[:, None]), axis=1)
        peak = higher
    at = head * total + start + row
    tl.store(peaks + at, peak, mask=row < n)
    tl.store(shares + at, 1 / summed, mask=row < n)


@triton.jit
def _columns(
    query,
    key,
    blocks,
    peaks,
    shares,
    received,
    total,
    query_stride,
    query_head,
    key_stride,
    key_head,
    group,
    tiles,
    scale,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    CAUSAL: tl.constexpr,
    LOG: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    block, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    start = tl.load(blocks + block).to(tl.int64)
    n = (tl.load(blocks + block + 1) - start).to(tl.int32)
    if tile * TILE >= n:
        return
    query += start * query_stride + head * query_head
    key += start * key_stride + head // group * key_head
    column, step = tile * TILE + tl.arange(0, TILE), tl.arange(0, STEP)
    k = _load(key, column, n, key_stride, SIZE, PADDED)
    weights = tl.zeros([STEP, TILE], tl.float32)
    tops = tl.full([STEP, TILE], NOTHING, tl.float32)  # only for the logarithm
    whole = 0
    if CAUSAL:
        whole = tl.minimum((tile + 1) * TILE, tl.cdiv(n, STEP) * STEP)
        for first in range(tile * TILE, whole, STEP):
            row = first + step
            at = head * total + start + row
            q = _load(query, row, n, query_stride, SIZE, PADDED)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            peak = tl.load(peaks + at, mask=row < n, other=0)
            share = tl.load(shares + at, mask=row < n, other=0)
            logits = tl.where(column[None, :] <= row[:, None], logits - peak[:, None], float("-inf"))
            weights, tops = _add(weights, tops, logits, share[:, None], LOG)
    for first in range(whole, n, STEP):
        row = first + step
        at = head * total + start + row
        q = _load(query, row, n, query_stride, SIZE, PADDED)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        peak = tl.load(peaks + at, mask=row < n, other=0)
        share = tl.load(shares + at, mask=row < n, other=0)  # none of a row that is not there
        weights, tops = _add(weights, tops, logits - peak[:, None], share[:, None], LOG)
    tl.store(received + head * total + start + column, _sum(weights, tops, LOG), mask=column < n)


@triton.jit
def _blocks(
    query,
    key,
    blocks,
    received,
    total,
    query_stride,
    query_head,
    key_stride,
    key_head,
    group,
    scale,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    CAUSAL: tl.constexpr,
    LOG: tl.constexpr,
    TILE: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    start = tl.load(blocks + tl.program_id(0)).to(tl.int64)
    n = (tl.load(blocks + tl.program_id(0) + 1) - start).to(tl.int32)
    at = tl.arange(0, TILE)
    q = _load(query + start * query_stride + head * query_head, at, n, query_stride, SIZE, PADDED)
    k = _load(key + start * key_stride + head // group * key_head, at, n, key_stride, SIZE, PADDED)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    seen = (at < n)[None, :] | (at >= n)[:, None]  # a query that is not there sees zeros, for a softmax without NaN
    if CAUSAL:
        seen &= at[None, :] <= at[:, None]
    logits = tl.where(seen, logits, float("-inf"))
    logits -= tl.max(logits, axis=1)[:, None]
    share = tl.where(at < n, 1 / tl.sum(tl.exp2(logits), axis=1), 0)
    weights, tops = tl.zeros([TILE, TILE], tl.float32), tl.full([TILE, TILE], NOTHING, tl.float32)
    weights, tops = _add(weights, tops, logits, share[:, None], LOG)
    tl.store(received + head * total + start + at, _sum(weights, tops, LOG), mask=at < n)


def attention_received(
    query: Tensor, key: Tensor, lengths: Sequence[int], scale: float, causal: bool, log: bool
) -> Tensor:
    """As the reference; N > 0."""
    query, key = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key))
    rows, heads, size = query.shape
    blocks = bounds(tuple(lengths), query.device)
    received = query.new_empty(heads, rows, dtype=torch.float32)
    strides = (*query.stride()[:2], *key.stride()[:2], heads // key.shape[1])
    scale *= math.log2(math.e)
    sizes: dict[str, Any] = {"SIZE": size, "PADDED": max(16, triton.next_power_of_2(size)), "CAUSAL": causal}
    longest = max(lengths)
    tile, step = (TILE, STEP) if query.dtype.itemsize == 2 else (EXACT_TILE, EXACT_TILE)
    if longest <= tile:
        tile = max(16, triton.next_power_of_2(longest))
        _blocks[(len(lengths), heads)](
            query, key, blocks, received, rows, *strides, scale, **sizes, LOG=log, TILE=tile, num_warps=BLOCK_WARPS
        )
        return _over_heads(received, log)
    peaks, shares = torch.empty_like(received), torch.empty_like(received)
    tiles = triton.cdiv(longest, tile)
    sizes |= {"TILE": tile, "STEP": step, "num_warps": WARPS, "num_stages": STAGES}
    grid = (len(lengths) * tiles, heads)
    _rows[grid](query, key, blocks, peaks, shares, rows, *strides, tiles, scale, **sizes)
    _columns[grid](query, key, blocks, peaks, shares, received, rows, *strides, tiles, scale, LOG=log, **sizes)
    return _over_heads(received, log)


def _over_heads(received: Tensor, log: bool) -> Tensor:
    """Gives the mean over heads; of logarithms in base 2 its natural logarithm."""
    if log:
        return (received * math.log(2)).logsumexp(dim=0) - math.log(len(received))
    return received.mean(dim=0)
