"""Triton kernels of `ward_heights` and `move_boundaries`; what they find stays on the GPU.

A round of joins is three launches. The runs of a clip lie packed from the clip's first token on. `_decide`, a program
for each clip, finds the local minima, joins them and packs the runs that are left into a second set of arrays; it lists
the joins, whose means `_join_means` then moves, and the pairs that `_pair_costs` is to look at again. Lists are filled
in any order: nothing depends on it.

Half a sweep of moves is one launch of `_move_cuts`, a program for each boundary, which walks along the two runs beside
it: it takes as long as the longest two.
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

# Guesses:
BLOCK, WARPS = 2048, 8  # runs at once in `_decide`
PROGRAMS, CHUNK, ROW_WARPS = 1024, 1024, 4  # of the two that go over rows
CUT_WARPS = 8  # of the one that holds sums of rows as wide as the tokens
ROUNDS = 8  # from one look at whether all is done to the next: a look costs about as much as a round too many


@triton.jit
def _is_joined(numbers, origins, rises, run, n):
    """Says whether runs are joined with the next: every second one of a stretch of equal costs below its neighbours."""
    inside = (run >= 0) & (run < n)
    number = tl.load(numbers + run, mask=inside, other=0)
    origin = tl.load(origins + number, mask=inside, other=-1)
    return (origin >= 0) & (tl.load(rises + number, mask=inside, other=0) != 0) & ((run - origin) % 2 == 0)


@triton.jit
def _append(listed, counter, values, mask):
    """Adds values to a list that all clips share."""
    count = mask.to(tl.int64)
    place = tl.atomic_add(counter, tl.sum(count, axis=0)) + tl.cumsum(count, axis=0) - 1
    tl.store(listed + place, values, mask=mask)


@triton.jit
def _decide(
    clips,
    runs,
    starts,
    weights,
    inside,
    costs,
    new_starts,
    new_weights,
    new_inside,
    new_costs,
    heights,
    numbers,
    origins,
    rises,
    joins,
    changed,
    counters,
    BLOCK: tl.constexpr,
):
    n = tl.load(runs + tl.program_id(0))
    if n < 2:
        return
    first = tl.load(clips + tl.program_id(0))
    costs += first
    numbers += first
    origins += first
    rises += first
    # Stretches of equal costs: where each begins, if it is below what is before it, and whether costs rise after it.
    stretches = 0
    for block in range(0, n, BLOCK):
        run = block + tl.arange(0, BLOCK)
        here = run < n
        cost = tl.load(costs + run, mask=run < n - 1, other=float("inf"))  # a clip's last run has no next
        before = tl.load(costs + run - 1, mask=here & (run > 0), other=float("inf"))
        after = tl.load(costs + run + 1, mask=run + 1 < n - 1, other=float("inf"))
        begins = here & ((cost != before) | (run == 0))
        number = stretches + tl.cumsum(begins.to(tl.int32), axis=0) - 1
        stretches += tl.sum(begins.to(tl.int32), axis=0)
        tl.store(numbers + run, number, mask=here)
        tl.store(origins + number, tl.where(cost < before, run, -1), mask=begins)
        tl.store(rises + number, (cost < after).to(tl.int8), mask=here & ((cost != after) | (run == n - 1)))
    tl.debug_barrier()  # other threads read what was stored
    left = 0
    for block in range(0, n, BLOCK):
        run = block + tl.arange(0, BLOCK)
        joined = _is_joined(numbers, origins, rises, run, n)
        kept = (run < n) & ~_is_joined(numbers, origins, rises, run - 1, n)
        at = first + run
        weight = tl.load(weights + at, mask=kept, other=0) + tl.load(weights + at + 1, mask=joined, other=0)
        below = tl.load(inside + at, mask=kept, other=0)
        below = tl.maximum(below, tl.load(inside + at + 1, mask=joined, other=0))
        higher = (below.to(tl.int64, bitcast=True) + 1).to(tl.float64, bitcast=True)  # the next number
        cost = tl.load(costs + run, mask=kept & (run < n - 1), other=float("inf"))
        height = tl.maximum(cost, higher)
        tl.store(heights + tl.load(starts + at + 1, mask=joined, other=0), height, mask=joined)
        next_cost = tl.load(costs + run + 1, mask=joined & (run + 1 < n - 1), other=float("inf"))
        cost = tl.where(joined, next_cost, cost)

        place = first + left + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        left += tl.sum(kept.to(tl.int32), axis=0)
        tl.store(new_starts + place, tl.load(starts + at, mask=kept, other=0), mask=kept)
        tl.store(new_weights + place, weight, mask=kept)
        tl.store(new_inside + place, tl.where(joined, height, below), mask=kept)
        tl.store(new_costs + place, cost, mask=kept)
        again = kept & (joined | _is_joined(numbers, origins, rises, run + 1, n)) & (cost < float("inf"))
        _append(joins, counters, at, joined)
        _append(changed, counters + 1, place, again)
    tl.store(runs + tl.program_id(0), left)


@triton.jit
def _join_means(means, starts, weights, joins, counters, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    column = tl.arange(0, CHUNK)
    for i in range(tl.program_id(0), tl.load(counters).to(tl.int32), tl.num_programs(0)):
        run = tl.load(joins + i)
        right = tl.load(weights + run + 1)
        share = (right / (tl.load(weights + run) + right)).to(tl.float32)
        a = means + tl.load(starts + run).to(tl.int64) * WIDTH + column
        b = means + tl.load(starts + run + 1).to(tl.int64) * WIDTH + column
        for start in tl.static_range(0, WIDTH, CHUNK):
            mask = start + column < WIDTH
            x = tl.load(a + start, mask=mask, other=0)
            y = tl.load(b + start, mask=mask, other=0)
            # as torch's lerp: equal means stay what they are
            tl.store(a + start, tl.where(share < 0.5, x + share * (y - x), y - (y - x) * (1 - share)), mask=mask)


@triton.jit
def _pair_costs(means, starts, weights, costs, changed, counters, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    column = tl.arange(0, CHUNK)
    for i in range(tl.program_id(0), tl.load(counters + 1).to(tl.int32), tl.num_programs(0)):
        run = tl.load(changed + i)
        a = means + tl.load(starts + run).to(tl.int64) * WIDTH + column
        b = means + tl.load(starts + run + 1).to(tl.int64) * WIDTH + column
        squares = tl.zeros([CHUNK], tl.float32)
        for start in tl.static_range(0, WIDTH, CHUNK):
            mask = start + column < WIDTH
            apart = tl.load(a + start, mask=mask, other=0) - tl.load(b + start, mask=mask, other=0)
            squares += apart * apart
        distance = tl.sqrt_rn(tl.sum(squares, axis=0)).to(tl.float64)
        left, right = tl.load(weights + run), tl.load(weights + run + 1)
        tl.store(costs + run, left * right / (left + right) * (distance * distance))


def ward_heights(embeds: Tensor, weights: Tensor, lengths: Sequence[int]) -> Tensor:
    """As the reference; N > 0."""
    rows, width = embeds.shape
    clips = bounds(tuple(lengths), embeds.device)
    means = embeds.detach().to(torch.float, copy=True, memory_format=torch.contiguous_format)
    weights = weights.detach().to(torch.double, copy=True, memory_format=torch.contiguous_format)
    heights = torch.full_like(weights, math.inf)
    starts = torch.arange(rows, dtype=torch.int32, device=embeds.device)
    runs = clips.diff()
    old = [starts, weights, torch.zeros_like(weights), torch.empty_like(weights)]
    new = [torch.empty_like(x) for x in old]
    numbers, origins, joins = (torch.empty_like(starts) for _ in range(3))
    rises = torch.empty_like(starts, dtype=torch.int8)

    block = min(BLOCK, triton.next_power_of_2(max(lengths)))
    sizes: dict[str, Any] = {"WIDTH": width, "CHUNK": min(CHUNK, triton.next_power_of_2(width)), "num_warps": ROW_WARPS}
    grid = (min(rows, PROGRAMS),)
    # The first look is at every pair, with those of two clips: nobody reads the cost at a clip's last run.
    changed = starts.clone()
    every = torch.full((2,), rows - 1, device=embeds.device)
    _pair_costs[grid](means, old[0], old[1], old[3], changed, every, **sizes)
    while True:
        # Joins and changed pairs of each round: int64, so that every row begins at a multiple of 16 bytes. Triton would
        # compile its kernels a second time for a pointer that does not.
        counters = torch.zeros(ROUNDS, 2, dtype=torch.long, device=embeds.device)
        for counter in counters:
            _decide[(len(lengths),)](
                clips,
                runs,
                *old,
                *new,
                heights,
                numbers,
                origins,
                rises,
                joins,
                changed,
                counter,
                BLOCK=block,
                num_warps=WARPS,
            )
            _join_means[grid](means, old[0], old[1], joins, counter, **sizes)
            _pair_costs[grid](means, new[0], new[1], new[3], changed, counter, **sizes)
            old, new = new, old
        if int(counters[-1, 0]) == 0:
            return heights


@triton.jit(do_not_specialize=["turn"])
def _move_cuts(embeds, weights, edges, places, moved, turn, no_gain, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Moves the boundary after a run, in its turn; the two beside it have theirs in the next."""
    edge = tl.program_id(0) + 1
    place = tl.load(places + edge)  # of the run after it; 0 begins a clip
    if (place == 0) | ((place + turn) % 2 == 0):
        return
    start, old, end = tl.load(edges + edge - 1), tl.load(edges + edge), tl.load(edges + edge + 1)
    again = (tl.load(moved + edge - 1) != 0) | (tl.load(moved + edge + 1) != 0) | (turn < 2)
    tl.store(moved + edge, 0)
    if (end - start < 3) | ~again:
        return
    column = tl.arange(0, BLOCK)
    row = embeds + start * WIDTH + column
    first = tl.load(row, mask=column < WIDTH, other=0).to(tl.float32)
    size = (end - start).to(tl.int32)

    weight = tl.zeros([], tl.float64)
    total = tl.zeros([BLOCK], tl.float32)
    for t in range(0, size):
        w = tl.load(weights + start + t)
        x = tl.load(row, mask=column < WIDTH, other=0).to(tl.float32)
        row += WIDTH
        weight += w
        total += (x - first) * w.to(tl.float32)
    mean = total / weight.to(tl.float32)

    row = embeds + start * WIDTH + column
    before = tl.zeros([], tl.float64)
    total = tl.zeros([BLOCK], tl.float32)
    best = tl.zeros([], tl.float64)
    now = tl.zeros([], tl.float64)
    new = old
    for t in range(0, size - 1):
        w = tl.load(weights + start + t)
        x = tl.load(row, mask=column < WIDTH, other=0).to(tl.float32)
        row += WIDTH
        before += w
        total += (x - first - mean) * w.to(tl.float32)
        squares = tl.sum(total * total, axis=0).to(tl.float64)
        gain = squares * weight / (before * (weight - before))
        here = start + t + 1
        now = tl.where(here == old, gain, now)
        new = tl.where(gain > best, here, new)
        best = tl.maximum(best, gain)
    if best > now * (1 + no_gain):
        tl.store(edges + edge, new)
        tl.store(moved + edge, 1)


def move_boundaries(
    embeds: Tensor, weights: Tensor, edges: Tensor, places: Tensor, sweeps: int, no_gain: float
) -> Tensor:
    """Moves `edges` `[M + 1]` int64, where runs begin and the last ends, in place; `places` `[M]` of runs in clips."""
    embeds, weights = embeds.detach().contiguous(), weights.detach().double().contiguous()
    moved = torch.zeros_like(edges, dtype=torch.int8)
    width = embeds.shape[1]
    for turn in range(2 * sweeps):
        _move_cuts[(len(places) - 1,)](
            embeds,
            weights,
            edges,
            places,
            moved,
            turn,
            no_gain,
            WIDTH=width,
            BLOCK=triton.next_power_of_2(width),
            num_warps=CUT_WARPS,
        )
    return edges
