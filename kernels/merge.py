"""Which neighbours of packed clips merge, decided for all tokens of all clips at once.

Likeness of neighbours is given as `adjacent_cosine` gives it: `[N]`, of each token with the next one of its clip, -inf
at a clip's last token. What merges is given as runs: `counts` `[M]` int64, the tokens in each, as the reductions of
`segment` take them. Of equal likenesses the earliest merge first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .packed import clip_ids, positions, tally, upload
from .select import ranked, top_k


def merge_chains(
    similarity: Tensor, lengths: Sequence[int], merges: Sequence[int], threshold: float = math.inf
) -> Tensor:
    """Merges the most alike neighbours, where a chain of them becomes one token however long it is.

    Args:
        similarity: `[N]`, of neighbours.
        lengths: tokens per clip, C numbers that sum to N.
        merges: by how many tokens each clip gets shorter, less than its length.
        threshold: neighbours that are more alike than this merge beyond `merges`.

    Returns:
        The tokens in each run, `[M]` int64.
    """
    if math.isinf(threshold):
        joined = torch.zeros_like(similarity, dtype=torch.bool)
        return run_lengths(joined.index_fill(0, top_k(similarity, lengths, merges), True), sum(lengths) - sum(merges))
    picks = torch.maximum(upload(merges, similarity.device), _count(similarity > threshold, lengths))
    return run_lengths(_best(similarity, lengths, picks))


def merge_pairs(
    similarity: Tensor,
    lengths: Sequence[int],
    merges: Sequence[int],
    threshold: float = math.inf,
    pairs: str = "even-odd",
) -> Tensor:
    """Merges the most alike neighbours two by two.

    Args:
        similarity: `[N]`, of neighbours.
        lengths: tokens per clip, C numbers that sum to N.
        merges: by how many tokens each clip gets shorter, at most half of its length.
        threshold: pairs that are more alike than this merge beyond `merges`.
        pairs: "even-odd" offers a clip's tokens 0 and 1, 2 and 3, and so on. "all-adjacent" offers all neighbours and
            takes those picked from left to right, so that a pick whose first token is taken already is lost; as many
            are picked as `merges` needs in spite of that.

    Returns:
        The tokens in each run, 1 or 2: `[M]` int64.
    """
    if pairs == "even-odd":  # no two such pairs touch: every chain of them is a pair
        similarity = similarity.masked_fill(positions(lengths, similarity.device) % 2 == 1, -torch.inf)
        return merge_chains(similarity, lengths, merges, threshold)
    least = upload(merges, similarity.device)
    low, high = least, 2 * least  # a run of picks makes a pair of every second one, so twice as many are enough
    # One more pick makes one more pair or none, so bisection finds the fewest that make `merges`.
    for _ in range(max(merges, default=0).bit_length()):
        middle = (low + high) // 2
        enough = _count(_from_the_left(_best(similarity, lengths, middle)), lengths) >= least
        low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
    total: int | None = sum(lengths) - sum(merges)
    if not math.isinf(threshold):
        high, total = torch.maximum(high, _count(similarity > threshold, lengths)), None
    return run_lengths(_from_the_left(_best(similarity, lengths, high)), total)


def run_lengths(joined: Tensor, total: int | None = None) -> Tensor:
    """Gives the rows in each run, `[M]` int64: 1 1 0 0 1 0 give 3 1 2.

    Args:
        joined: `[N]` bool, whether a row is in one run with the next; never the last row of a clip.
        total: M, where it is known; to count it is to wait for the GPU.
    """
    ends = ((~joined).nonzero() if total is None else (~joined).nonzero_static(size=total)).squeeze(1)
    return ends.diff(prepend=ends.new_full((1,), -1))


def nest_runs(inner: Tensor, outer: Tensor) -> Tensor:
    """Gives the rows in each run of runs: inner 3 1 2 and outer 2 1 give 4 2.

    Args:
        inner: rows per run, `[M]` int64.
        outer: runs per run of runs, `[K]` int64, which sum to M.
    """
    ends = inner.cumsum(0)[outer.cumsum(0) - 1]
    return ends.diff(prepend=ends.new_zeros(1))


def _count(chosen: Tensor, lengths: Sequence[int]) -> Tensor:
    """Counts the chosen tokens of each clip, `[C]`."""
    return tally(clip_ids(lengths, chosen.device), len(lengths), chosen.long())


def _best(scores: Tensor, lengths: Sequence[int], number: Tensor) -> Tensor:
    """Marks the `number[c]` best tokens of each clip, `[N]` bool."""
    within = positions(lengths, scores.device) < number[clip_ids(lengths, scores.device)]
    return torch.empty_like(within).scatter(0, ranked(scores, lengths), within)


def _from_the_left(picked: Tensor) -> Tensor:
    """Keeps the first, third, fifth, ... of every run of picks: the pairs that a walk from left to right takes."""
    index = torch.arange(len(picked), device=picked.device)
    before = torch.where(picked, -1, index).cummax(0).values  # the last one not picked
    return picked & ((index - before) % 2 == 1)
