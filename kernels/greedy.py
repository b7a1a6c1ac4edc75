"""Greedy choice of diverse tokens: farthest first, and the most probable subset of a determinantal point process.

Both look at the whole clip at every step, but a token's gain only ever falls. So the next choices are nearly always
among the tokens of greatest gain now, and the products of `BLOCK` such candidates with all tokens are computed at once,
as one matrix product instead of `BLOCK` passes over the clip. That saves time only: a choice outside the block starts
a new one. Nothing of the size of tokens x tokens is held.

On a GPU every step would wait for Python. There Triton's kernels hold the matrix of all cosines, of clips for which it
is small enough, and take the steps by themselves.

Clips are worked on one after another, because rounding depends on a product's shape: beside other clips, near ties
might fall out differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .backend import use_triton
from .select import TIE, top_k

BLOCK = 64  # candidates at once; measured: 7,500 tokens of width 3584, 1,875 chosen in 42 to 113 blocks
GONE = 1e-5  # a squared norm from which on what is left is rounding: it adds up over the steps
LONGEST = 2**14  # tokens of a clip whose cosines Triton's kernels hold: 1 GiB in float32, 11 minutes of audio
_ENTRIES = 2**24  # of a block of the cosine matrix, 64 MiB in float32


class Clip(NamedTuple):
    """A clip to choose from: its first token, how many it has, and how many steps to take at most."""

    start: int
    length: int
    steps: int

    @property
    def tokens(self) -> slice:
        """Its rows of packed tokens."""
        return slice(self.start, self.start + self.length)


@torch.no_grad()
def farthest_first(embeds: Tensor, lengths: Sequence[int], budget: Sequence[int], backend: str = "auto") -> Tensor:
    """Chooses tokens one by one, each the one whose nearest chosen token is farthest by `1 - cosine`.

    The first is the one whose nearest neighbour is farthest. Of equal ones the earliest is chosen. Copies of chosen
    tokens come last, the earliest first.

    Args:
        embeds: `[N, D]`; a token of zeros has cosine 0 with all others.
        lengths: tokens per clip, C numbers that sum to N.
        budget: tokens to keep of each clip, at most its length.
        backend: "auto", "torch" or "triton"; clips of more than `LONGEST` tokens are always left to torch.

    Returns:
        `[M]` int64 ascending.
    """
    clips = _clips(lengths, budget, most=len(embeds))
    chosen = torch.zeros(len(embeds), device=embeds.device)
    with torch.autocast(embeds.device.type, enabled=False):
        if use_triton(backend, embeds):
            from . import triton_greedy

            triton_greedy.farthest_first(embeds, [clip for clip in clips if clip.length <= LONGEST], chosen)
            clips = [clip for clip in clips if clip.length > LONGEST]
        for clip in clips:
            chosen[clip.tokens] = _farthest_first(_unit(embeds[clip.tokens]), clip.steps)
    return top_k(chosen, lengths, budget, backend)


@torch.no_grad()
def greedy_map(
    quality: Tensor, embeds: Tensor, lengths: Sequence[int], budget: Sequence[int], backend: str = "auto"
) -> Tensor:
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
        backend: "auto", "torch" or "triton"; clips of more than `LONGEST` tokens are always left to torch.

    Returns:
        `[M]` int64 ascending.
    """
    clips = _clips(lengths, budget, most=embeds.shape[1])
    quality, chosen = quality.float(), torch.zeros(len(embeds), device=embeds.device)
    with torch.autocast(embeds.device.type, enabled=False):
        if use_triton(backend, embeds):
            from . import triton_greedy

            triton_greedy.greedy_map(quality, embeds, [clip for clip in clips if clip.length <= LONGEST], chosen)
            clips = [clip for clip in clips if clip.length > LONGEST]
        for clip in clips:
            chosen[clip.tokens] = _greedy_map(quality[clip.tokens], _unit(embeds[clip.tokens]), clip.steps)
    return top_k(quality.masked_fill(chosen > 0, torch.inf), lengths, budget, backend)


def _clips(lengths: Sequence[int], budget: Sequence[int], most: int) -> list[Clip]:
    """Gives the clips of which some tokens are kept, but not all; of each at most `most` steps."""
    starts = list(accumulate(lengths, initial=0))[:-1]
    return [Clip(start, n, min(m, most)) for start, n, m in zip(starts, lengths, budget, strict=True) if 0 < m < n]


def _unit(embeds: Tensor) -> Tensor:
    return functional.normalize(embeds.float(), dim=1)


def _farthest_first(unit: Tensor, count: int) -> Tensor:
    """Marks the chosen of one clip with 1, `[n]`; fewer than `count` if all others are copies of them."""
    chosen = unit.new_zeros(len(unit))
    gain = _nearest_distance(unit)
    distance = torch.full_like(gain, torch.inf)  # to the nearest chosen token, -inf for those chosen
    rows: dict[int, Tensor] = {}
    for step in range(count):
        most = gain.max()
        if step > 0 and most <= TIE:
            break
        best = int((gain >= most - TIE).byte().argmax())  # the earliest of the largest
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
    weight = (quality / quality.max().clamp(min=torch.finfo(torch.float32).tiny)).square()
    left = unit.square().sum(dim=1)  # [n], the squared norm of what is left of each token
    basis = unit.new_empty(count, unit.shape[1])
    row_of: dict[int, int] = {}
    for step in range(count):
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
