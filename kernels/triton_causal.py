"""Triton kernel of `causal_attention`: flash attention with a bias per key, forward only.

Libraries' flash attention takes no bias per key; in further head channels, as `append_key_bias` writes it, it costs
copies and a larger tile of channels.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, WARPS, STAGES = 128, 64, 8, 3  # a guess


@triton.jit
def _mix(logits, value, peak, total, mixed):
    """Goes on with the softmax by some more keys; each row has seen one by now."""
    new_peak = tl.maximum(peak, tl.max(logits, axis=1))
    weights = tl.exp2(logits - new_peak[:, None])
    fade = tl.exp2(peak - new_peak)
    mixed = tl.dot(weights.to(value.dtype), value, mixed * fade[:, None], input_precision="ieee")
    return new_peak, total * fade + tl.sum(weights, axis=1), mixed


@triton.jit
def _attend(
    query,
    key,
    value,
    bias,
    out,
    length,
    group,
    heads,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    scale,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # those with the most keys first, of all heads
    place = tl.program_id(0).to(tl.int64)  # offsets may be beyond 2^31
    batch, head = place // heads, place % heads
    query += batch * q_batch + head * q_head
    key += batch * k_batch + head // group * k_head
    value += batch * v_batch + head // group * v_head
    bias += batch * length
    row, column, channel = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, SIZE)
    q = tl.load(query + row.to(tl.int64)[:, None] * q_row + channel[None, :], mask=(row < length)[:, None], other=0)
    key += channel[:, None] + column.to(tl.int64)[None, :] * k_row
    value += column.to(tl.int64)[:, None] * v_row + channel[None, :]
    step = tl.full([], COLUMNS, tl.int64)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, SIZE], tl.float32)
    whole = tile * ROWS // COLUMNS * COLUMNS  # keys that all rows see, in whole steps
    for first in range(0, whole, COLUMNS):
        logits = tl.dot(q, tl.load(key), input_precision="ieee") * scale + tl.load(bias + first + column)[None, :]
        peak, total, mixed = _mix(logits, tl.load(value), peak, total, mixed)
        key += step * k_row
        value += step * v_row
    for first in range(whole, tl.minimum(length, (tile + 1) * ROWS), COLUMNS):
        at = first + column
        inside = at < length
        k = tl.load(key, mask=inside[None, :], other=0)
        logits = tl.dot(q, k, input_precision="ieee") * scale + tl.load(bias + at, mask=inside, other=0)[None, :]
        logits = tl.where((at[None, :] <= row[:, None]) & inside[None, :], logits, float("-inf"))
        peak, total, mixed = _mix(logits, tl.load(value, mask=inside[:, None], other=0), peak, total, mixed)
        key += step * k_row
        value += step * v_row
    target = out + (place * length + row)[:, None] * SIZE + channel[None, :]
    tl.store(target, (mixed / total[:, None]).to(out.dtype.element_ty), mask=(row < length)[:, None])


def causal_attention(query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor, scale: float) -> Tensor:
    """As the reference; the head size is a power of two, at least 16, and L > 0."""
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    batch, heads, length, size = query.shape
    out = query.new_empty(batch, heads, length, size)
    _attend[(batch * heads, triton.cdiv(length, ROWS))](
        query,
        key,
        value,
        (key_bias.float() * math.log2(math.e)).contiguous(),
        out,
        length,
        heads // key.shape[1],
        heads,
        *(x.stride(i) for x in (query, key, value) for i in (0, 1, 2)),
        scale * math.log2(math.e),
        SIZE=size,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return out
