"""Greedy choice of diverse tokens: farthest first, and the most probable subset of a determinantal point process.

Both look at the whole clip at every step, but a token's gain only ever falls. So the next choices are nearly always
among the tokens of greatest gain now, and the products of `BLOCK` such candidates with all tokens are computed at once,
as one matrix product instead of `BLOCK` passes over the clip. That saves time only: a choice outside the block starts
a new one. Nothing of the size of tokens x tokens is held.

Clips are worked on one after another, because rounding depends on a product's shape: beside other clips, near ties
might fall out differently.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .select import TIE, top_k

BLOCK = 64  # candidates at once; measured: 7,500 tokens of width 3584, 1,875 chosen in 42 to 113 blocks
GONE = 1e-5  # a squared norm from which on what is left is rounding: it adds up over the steps
_ENTRIES = 2**24  # of a block of the cosine matrix, 64 MiB in float32


@torch.no_grad()
def farthest_first(embeds: Tensor, lengths: Sequence[int], budget: Sequence[int]) -> Tensor:
    """Chooses tokens one by one, each the one whose nearest chosen token is farthest by `1 - cosine`.

    The first is the one whose nearest neighbour is farthest. Of equal ones the earliest is chosen. Copies of chosen
    tokens come last, the earliest first.

    Args:
        embeds: `[N, D]`; a token of zeros has cosine 0 with all others.
        lengths: tokens per clip, C numbers that sum to N.
        budget: tokens to keep of each clip, at most its length.

    Returns:
        `[M]` int64 ascending.
    """
    with torch.autocast(embeds.device.type, enabled=False):
        unit = functional.normalize(embeds.float(), dim=1)
        chosen = [_farthest_first(clip, count) for clip, count in zip(unit.split(tuple(lengths)), budget, strict=True)]
    return top_k(torch.cat([unit.new_empty(0), *chosen]), lengths, budget)


@torch.no_grad()
def greedy_map(quality: Tensor, embeds: Tensor, lengths: Sequence[int], budget: Sequence[int]) -> Tensor:
    """Chooses greedily the most probable subset of a determinantal point process with kernel diag(q) cos diag(q).

    Each step adds the token that multiplies the determinant of the chosen tokens' kernel most: by `q^2` times the
    squared norm of what is left of its unit vector beside the span of those chosen. That is pivoted Gram-Schmidt: it
    gives the same tokens as the incremental Cholesky factor of "Fast Greedy MAP Inference for Determinantal Point
    Process", arXiv 1709.05135, but holds a basis, at most D x D, in place of a factor for all tokens.

    Of equal tokens the earliest is chosen. When nothing is left of any token (after D steps at the latest; from there
    on every determinant is zero), the rest of the budget goes by quality.

    Args:
        quality: `[N]` >= 0.
        embeds: `[N, D]`; of a token of zeros nothing is left from the start.
        lengths: tokens per clip, C numbers that sum to N.
        budget: tokens to keep of each clip, at most its length.

    Returns:
        `[M]` int64 ascending.
    """
    with torch.autocast(embeds.device.type, enabled=False):
        quality, unit = quality.float(), functional.normalize(embeds.float(), dim=1)
        clips = zip(quality.split(tuple(lengths)), unit.split(tuple(lengths)), budget, strict=True)
        chosen = [_greedy_map(q, clip, count) for q, clip, count in clips]
    scores = quality.masked_fill(torch.cat([quality.new_empty(0), *chosen]) > 0, torch.inf)
    return top_k(scores, lengths, budget)


def _farthest_first(unit: Tensor, count: int) -> Tensor:
    """Marks the chosen of one clip with 1, `[n]`; fewer than `count` if all others are copies of them."""
    chosen = unit.new_zeros(len(unit))
    if count in (0, len(unit)):
        return chosen
    gain = _nearest_distance(unit)
    distance = torch.full_like(gain, torch.inf)  # to the nearest chosen token, -inf for those chosen
    rows: dict[int, Tensor] = {}
    for _ in range(count):
        best = int((gain >= gain.max() - TIE).byte().argmax())  # the earliest of the largest
        if gain[best] <= TIE:
            break
        if best not in rows:
            block = _candidates(gain, best)
            rows = dict(zip(block.tolist(), unit[block] @ unit.T, strict=True))  # [n] each
        chosen[best] = 1
        distance = torch.minimum(distance, 1 - rows[best])
        distance[best] = -torch.inf
        gain = distance
    return chosen


def _greedy_map(quality: Tensor, unit: Tensor, count: int) -> Tensor:
    """Marks the chosen of one clip with 1, `[n]`; fewer than `count` if nothing is left of the others."""
    chosen = unit.new_zeros(len(unit))
    if count in (0, len(unit)):
        return chosen
    weight = (quality / quality.max().clamp(min=torch.finfo(torch.float32).tiny)).square()
    left = unit.square().sum(dim=1)  # [n], the squared norm of what is left of each token
    basis = unit.new_empty(min(count, unit.shape[1]), unit.shape[1])
    row_of: dict[int, int] = {}
    for step in range(len(basis)):
        left = left.where(left > GONE, 0)
        gain = weight * left
        # The earliest whose gain would be the largest if what is left of it were larger by no more than an error.
        best = int(((weight * (left + TIE) >= gain.max()) & (left > 0)).byte().argmax())
        if gain[best] <= 0:
            break
        if best not in row_of:
            block = _candidates(gain, best)
            row_of = {token: row for row, token in enumerate(block.tolist())}
            parts = unit[block]  # [BLOCK, D], what is left of the candidates
            parts = parts - (parts @ basis[:step].T) @ basis[:step]
            rows = parts @ unit.T  # [BLOCK, n]
        row = row_of[best]
        norm = torch.linalg.vector_norm(parts[row])
        basis[step], along = parts[row] / norm, rows[row] / norm  # a new direction and all tokens' shares in it
        parts.addr_(along[block], basis[step], alpha=-1)
        rows.addr_(along[block], along, alpha=-1)
        left = left - along.square()
        left[best] = 0
        chosen[best] = 1
    return chosen


def _nearest_distance(unit: Tensor) -> Tensor:
    """Gives `1 - cosine` of each token with the one most like it, `[n]`."""
    at_once = max(1, _ENTRIES // len(unit))
    nearest = []
    for first in range(0, len(unit), at_once):
        cosine = unit[first : first + at_once] @ unit.T
        cosine.diagonal(first).fill_(-torch.inf)
        nearest.append(1 - cosine.amax(dim=1))
    return torch.cat(nearest)


def _candidates(gain: Tensor, best: int) -> Tensor:
    """Gives `best` and the tokens of greatest gain, `[BLOCK]` int64 or as many as there are."""
    likely = gain.topk(min(BLOCK, len(gain)) - 1).indices
    return torch.cat([likely.new_tensor([best]), likely])
