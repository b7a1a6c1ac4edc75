"""Triton kernels of the greedy choices: a clip is one program, that takes many steps without returning to Python.

They hold a clip's whole matrix of cosines, and a step reads one row of it. The matrices are made clip by clip: rounding
depends on a product's shape, and a clip must not depend on those beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from . import greedy, select
from .greedy import Clip
from .packed import upload

PANEL = 32  # steps from one update of the whole matrix to the next; a guess
ROOM = greedy.LONGEST**2  # numbers in the matrices of the clips worked at once, 1 GiB in float32
TOKENS_PER_WARP, MOST_WARPS = 256, 32  # a guess
EPS = 1e-12  # the least norm, as in torch's normalize
ALIGN = 32  # numbers: a matrix's rows start at whole cache lines
TIE = tl.constexpr(select.TIE)
GONE = tl.constexpr(greedy.GONE)
LEAST = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _clip(table):
    """Gives where a program's clip starts, its length, its steps, where its matrix starts and the stride of that."""
    row = table + 5 * tl.program_id(0)
    length, steps, stride = tl.load(row + 1).to(tl.int32), tl.load(row + 2).to(tl.int32), tl.load(row + 4).to(tl.int32)
    return tl.load(row), length, steps, tl.load(row + 3), stride


@triton.jit
def _farthest(table, memory, nearest, chosen, BLOCK: tl.constexpr):
    start, length, steps, place, stride = _clip(table)
    cosine = memory + place
    chosen += start
    token = tl.arange(0, BLOCK)
    inside = token < length
    gain = tl.load(nearest + start + token, mask=inside, other=float("-inf"))
    distance = tl.where(inside, float("inf"), float("-inf"))  # to the nearest chosen token, -inf for those chosen
    for step in range(steps):
        most = tl.max(gain, axis=0)
        # NaN is near nothing: then it is the last token, which is there at least.
        best = tl.min(tl.where(inside & (gain >= most - TIE), token, length - 1), axis=0)
        tl.store(chosen + best, 1.0, mask=(step == 0) | (most > TIE))
        row = tl.load(cosine + best * stride + token, mask=inside, other=0)
        distance = tl.where(token == best, float("-inf"), tl.minimum(distance, 1 - row))
        gain = distance


@triton.jit
def _pivots(table, memory, quality, left, chosen, first, PANEL: tl.constexpr, BLOCK: tl.constexpr):
    start, length, steps, place, stride = _clip(table)
    matrix = memory + place
    panel = matrix + length * stride
    chosen += start
    token = tl.arange(0, BLOCK)
    inside = token < length
    weight = tl.load(quality + start + token, mask=inside, other=0)
    weight = tl.div_rn(weight, tl.maximum(tl.max(weight, axis=0), LEAST))
    weight *= weight
    rest = tl.load(left + start + token, mask=inside, other=0)
    for step in range(tl.minimum(steps - first, PANEL)):
        rest = tl.where(rest > GONE, rest, 0)
        most = tl.max(weight * rest, axis=0)
        found = most > 0
        best = tl.min(tl.where((weight * (rest + TIE) >= most) & (rest > 0), token, length - 1), axis=0)
        norm = tl.sqrt_rn(tl.sum(tl.where(token == best, rest, 0), axis=0))
        row = tl.load(matrix + best * stride + token, mask=inside, other=0)
        for i in tl.range(0, step, loop_unroll_factor=4):  # so that loads do not wait for one another
            share = tl.load(panel + i * stride + best)
            row -= share * tl.load(panel + i * stride + token, mask=inside, other=0)
        along = row * tl.where(found, 1 / norm, 0)  # all tokens' shares in a new direction
        tl.store(panel + step * stride + token, along, mask=inside)
        tl.store(chosen + best, 1.0, mask=found)
        rest = tl.where(token == best, 0, rest - along * along)
        tl.debug_barrier()  # the next step's threads read what was stored by others
    tl.store(left + start + token, rest, mask=inside)


def farthest_first(embeds: Tensor, clips: Sequence[Clip], chosen: Tensor) -> None:
    """As the reference; marks the chosen with 1 in `chosen`, `[N]` float32 of zeros."""
    nearest = torch.empty_like(chosen)  # 1 - cosine of each token with the one most like it
    for some in _batches(clips):
        table, memory, matrices = _cosines(embeds, some)
        for clip, cosine in zip(some, matrices, strict=True):
            cosine.diagonal().fill_(-torch.inf)
            nearest[clip.tokens] = 1 - cosine.amax(dim=1)
        _farthest[(len(some),)](table, memory, nearest, chosen, **_block(some))


def greedy_map(quality: Tensor, embeds: Tensor, clips: Sequence[Clip], chosen: Tensor) -> None:
    """As the reference; marks the chosen with 1 in `chosen`, `[N]` float32 of zeros.

    The matrix is factored as LAPACK's `pstrf` does, a Cholesky factor with pivots in panels: the kernel takes `PANEL`
    steps and writes their rows of the factor below the matrix, whose rows it corrects as it reads them; then one
    product takes the panel off the whole matrix.
    """
    quality, left = quality.contiguous(), torch.empty_like(chosen)
    for some in _batches(clips):
        table, memory, matrices = _cosines(embeds, some, rows_below=PANEL)
        for clip, matrix in zip(some, matrices, strict=True):
            left[clip.tokens] = matrix[: clip.length].diagonal()
        for first in range(0, max(clip.steps for clip in some), PANEL):
            _pivots[(len(some),)](table, memory, quality, left, chosen, first, PANEL=PANEL, **_block(some))
            for clip, matrix in zip(some, matrices, strict=True):
                if first + PANEL < clip.steps:
                    panel = matrix[clip.length :]
                    matrix[: clip.length].addmm_(panel.T, panel, alpha=-1)


def _batches(clips: Sequence[Clip]) -> Iterator[list[Clip]]:
    """Gives the clips, as many at once as there is room for."""
    batch: list[Clip] = []
    room = ROOM
    for clip in clips:
        if batch and clip.length**2 > room:
            yield batch
            batch, room = [], ROOM
        batch.append(clip)
        room -= clip.length**2
    if batch:
        yield batch


def _block(clips: Sequence[Clip]) -> dict[str, int]:
    """Gives the options of a launch: a program holds a number for every token of its clip."""
    block = triton.next_power_of_2(max(clip.length for clip in clips))
    return {"BLOCK": block, "num_warps": min(MOST_WARPS, max(1, block // TOKENS_PER_WARP))}


def _cosines(embeds: Tensor, clips: Sequence[Clip], rows_below: int = 0) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gives what the kernels read: a table for `_clip`, and the clips' matrices one after another; and views of those.

    Returns:
        `[C, 5]` int64; float32 of one dimension; of each clip `[n, n]` cosines, and `rows_below` rows of room below.
    """
    table: list[list[int]] = []
    size = 0
    for clip in clips:
        stride = triton.cdiv(clip.length, ALIGN) * ALIGN
        table.append([*clip, size, stride])
        size += (clip.length + rows_below) * stride
    memory = embeds.new_empty(size, dtype=torch.float32)
    matrices = []
    for start, length, _, place, stride in table:
        matrix = memory.as_strided((length + rows_below, length), (stride, 1), place)
        _fill(matrix[:length], embeds[start : start + length])
        matrices.append(matrix)
    return upload(torch.tensor(table), embeds.device), memory, matrices


def _fill(cosine: Tensor, tokens: Tensor) -> None:
    if tokens.is_cuda and tokens.dtype in (torch.bfloat16, torch.float16):
        torch.mm(tokens, tokens.T, out_dtype=torch.float32, out=cosine)  # exact products, added up in float32
        # Norms from the same product: a token has cosine 1 with its copies, however sums are rounded.
        scale = cosine.diagonal().clamp(min=EPS**2).rsqrt()
        cosine.mul_(scale[:, None]).mul_(scale)
    else:
        unit = functional.normalize(tokens.float(), dim=1, eps=EPS)
        torch.mm(unit, unit.T, out=cosine)
