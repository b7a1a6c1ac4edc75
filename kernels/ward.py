"""Segmentation of packed clips: a given number of runs of neighbouring tokens with the least summed variance.

The variance of a run is `sum(w * |x - mean|^2)`, and Ward's cost of joining the runs a and b is what that adds:
`w_a w_b / (w_a + w_b) * |mean_a - mean_b|^2`. `ward_greedy` comes near the optimum, `move_boundaries` nearer, and
`ward_exact` is there. They give run lengths, which `segment_mean` and `segment_centres` take. Everything is decided on
differences of tokens, so that a large common offset costs no digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .backend import use_triton
from .packed import positions
from .select import top_k

SWEEPS = 2  # on speech further ones take at most another 0.02 % off the variance; measured, see benchmarks/LOG.md
NO_GAIN = 1e-6  # relative, of a cut over the present one: what float32 does not tell apart. A guess


def ward_greedy(
    embeds: Tensor,
    weights: Tensor,
    lengths: Sequence[int],
    budget: Sequence[int],
    pooled: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Joins neighbours from the bottom up until the budget is met; every smaller budget joins further.

    The boundaries of greatest `ward_heights` stay; of equal ones the earliest.

    Args:
        embeds: `[N, D]`.
        weights: `[N]`, positive.
        lengths: tokens per clip, C numbers that sum to N.
        budget: runs per clip, from one (none of none) to its length.
        pooled: share the sum of the budget out among the clips by cost, at least one run each.
        backend: "auto", "torch" or "triton".

    Returns:
        Tokens per run, `[M]` int64 with M the sum of the budget; no run crosses from one clip into another.
    """
    heights = ward_heights(embeds, weights, lengths, backend)
    if pooled:
        lengths, budget = (len(embeds),), (sum(budget),)
    return functional.pad(top_k(heights, lengths, budget, backend), (0, 1), value=len(embeds)).diff()


def ward_heights(embeds: Tensor, weights: Tensor, lengths: Sequence[int], backend: str = "auto") -> Tensor:
    """Gives for every token the cost at which agglomeration joins it to the token before it.

    Every clip is joined up to a single run, in parallel rounds: a round joins every pair of neighbouring runs whose
    cost is a local minimum, and of a stretch of equal costs every second pair. Pairs that are each other's cheapest
    neighbour are joined by the sequential algorithm, too, sooner or later (reciprocal nearest neighbours, Murtagh
    1983), so its result for K runs is read off the heights: the K - 1 greatest are the boundaries. The two may differ
    where a join brings its result nearer to a neighbour than either part was (a reversal).

    Rounds are few (about 30 for 7,500 tokens of speech, 17 for 90,000 equal ones); a clip whose costs rise or fall
    all along takes as many as it has tokens, each of a few pairs.

    Args:
        embeds: `[N, D]`.
        weights: `[N]`, positive.
        lengths: tokens per clip, C numbers that sum to N.
        backend: "auto", "torch" or "triton".

    Returns:
        `[N]` float64; infinite at a clip's first token; greater than every height inside the two joined runs.
    """
    if use_triton(backend, embeds) and embeds.numel():
        from . import triton_ward

        return triton_ward.ward_heights(embeds, weights, lengths)
    means = embeds.detach().to(torch.float, copy=True)  # of a run, at its first token
    weights = weights.detach().to(torch.double, copy=True)  # of the runs, here and below [runs]
    starts = torch.arange(len(embeds), device=embeds.device)
    inside = torch.zeros_like(weights)  # the greatest height inside each run
    heights = torch.full_like(weights, math.inf)

    def costs(left: Tensor) -> Tensor:
        a, b = weights[left], weights[left + 1]
        distance = torch.linalg.vector_norm(means[starts[left]] - means[starts[left + 1]], dim=1)
        return a * b / (a + b) * distance.double().square()

    last = functional.pad(positions(lengths, embeds.device)[1:] == 0, (0, min(1, len(embeds))), value=True)
    cost = torch.full_like(weights, math.inf)  # of joining each run with the next
    joinable = (~last).nonzero()[:, 0]
    cost[joinable] = costs(joinable)
    while True:
        values, stretch, counts = cost.unique_consecutive(return_inverse=True, return_counts=True)
        least = (values < functional.pad(values[:-1], (1, 0), value=math.inf)) & (
            values < functional.pad(values[1:], (0, 1), value=math.inf)
        )
        rank = torch.arange(len(cost), device=cost.device) - (counts.cumsum(0) - counts)[stretch]
        left = (least[stretch] & (rank % 2 == 0)).nonzero()[:, 0]
        if len(left) == 0:
            return heights
        right = left + 1

        share = weights[right] / (weights[left] + weights[right])
        a, b = starts[left], starts[right]
        means[a] = means[a].lerp(means[b], share[:, None].float())  # equal means stay what they are, bit for bit
        below = torch.maximum(inside[left], inside[right])
        heights[b] = torch.maximum(cost[left], below.nextafter(torch.full_like(below, math.inf)))

        kept, changed = torch.ones_like(cost, dtype=torch.bool), torch.zeros_like(cost, dtype=torch.bool)
        kept[right], changed[left] = False, True
        weights[left] += weights[right]
        inside[left], cost[left] = heights[b], cost[right]
        starts, weights, inside, cost, changed = (x[kept] for x in (starts, weights, inside, cost, changed))
        changed = changed | functional.pad(changed[1:], (0, 1))  # and each run before one that changed
        again = (changed & cost.isfinite()).nonzero()[:, 0]
        cost[again] = costs(again)


@torch.no_grad()
def move_boundaries(
    embeds: Tensor,
    weights: Tensor,
    lengths: Sequence[int],
    counts: Tensor,
    sweeps: int = SWEEPS,
    backend: str = "auto",
) -> Tensor:
    """Moves every boundary to where it costs least between its two neighbours: k-means on a line.

    A sweep moves each clip's odd boundaries all at once, and then its even ones. The summed variance never rises, no
    run becomes empty, and each clip keeps its number of runs. Of equal places the earliest is taken; a boundary that
    gains nothing stays.

    Args:
        embeds: `[N, D]`.
        weights: `[N]`, positive.
        lengths: tokens per clip, C numbers that sum to N.
        counts: tokens per run, `[M]` int64 >= 1; no run crosses from one clip into another.
        sweeps: how often.
        backend: "auto", "torch" or "triton".

    Returns:
        Tokens per run, `[M]` int64.
    """
    if len(counts) < 2:
        return counts
    edges = functional.pad(counts.cumsum(0), (1, 0))
    run = torch.arange(len(counts), device=counts.device)
    opens = positions(lengths, counts.device)[edges[:-1]] == 0  # the first run of a clip
    places = run - torch.where(opens, run, 0).cummax(0).values  # of each run in its clip
    if use_triton(backend, embeds) and embeds.numel():
        from . import triton_ward

        return triton_ward.move_boundaries(embeds, weights, edges, places, sweeps, NO_GAIN).diff()
    embeds, weights = embeds.detach().float(), weights.detach().double()
    moved = torch.zeros_like(edges, dtype=torch.bool)  # when it was looked at last
    for turn in range(2 * sweeps):
        left = ((places[1:] > 0) & ((places[1:] + turn) % 2 == 1)).nonzero()[:, 0]  # the run before each boundary
        again = moved[left] | moved[left + 2] | (turn < 2)  # between the same neighbours the best place is the same
        moved[left + 1] = False
        left = left[again & (edges[left + 2] - edges[left] > 2)]
        old = edges[left + 1]
        new = _best_cuts(embeds, weights, edges[left], old, edges[left + 2])
        edges[left + 1], moved[left + 1] = new, new != old
    return edges.diff()


def _best_cuts(embeds: Tensor, weights: Tensor, starts: Tensor, cuts: Tensor, ends: Tensor) -> Tensor:
    """Gives where to cut each stretch of tokens in two, `[P]`, so that the two vary least; `cuts` is where it is now.

    With tokens counted from the stretch's mean, a cut takes `|sum before it|^2 * w / (w_before * w_after)` off its
    variance. All stretches are walked along at once, the longest first, so that those that go on are the first.
    """
    sizes, order = (ends - starts).sort(descending=True, stable=True)
    going = sizes.bincount().flip(0).cumsum(0).flip(0)[1:].tolist()  # stretches of more than 0, 1, 2, ... tokens
    starts, old = starts[order], cuts[order]
    first = embeds[starts]

    def tokens(t: int, n: int) -> tuple[Tensor, Tensor]:
        at = starts[:n] + t
        return weights[at], embeds[at] - first[:n]

    weight, total = torch.zeros_like(weights[starts]), torch.zeros_like(first)
    for t, n in enumerate(going):
        w, x = tokens(t, n)
        weight[:n] += w
        total[:n].addcmul_(x, w[:, None].float())
    mean = total / weight[:, None].float()

    before, total = torch.zeros_like(weight), torch.zeros_like(first)  # of the tokens walked over
    best, now, new = torch.zeros_like(weight), torch.zeros_like(weight), old.clone()
    for t, n in enumerate(going[1:]):
        w, x = tokens(t, n)
        before[:n] += w
        total[:n].addcmul_(x - mean[:n], w[:, None].float())
        norm = torch.linalg.vector_norm(total[:n], dim=1).double()
        gain = norm.square() * weight[:n] / (before[:n] * (weight[:n] - before[:n]))
        here = starts[:n] + t + 1
        now[:n] = torch.where(here == old[:n], gain, now[:n])
        new[:n] = torch.where(gain > best[:n], here, new[:n])
        best[:n] = torch.maximum(best[:n], gain)
    return torch.empty_like(old).scatter(0, order, torch.where(best > now * (1 + NO_GAIN), new, old))


def ward_exact(
    embeds: Tensor,
    weights: Tensor,
    lengths: Sequence[int],
    budget: Sequence[int],
    max_segment: int = 40,
    pooled: bool = False,
) -> Tensor:
    """Gives the segmentation of least cost, by dynamic programming over runs of at most `max_segment` tokens.

    The cap is raised to the least that meets a clip's budget. Of equal costs the runs at the end are longest. The
    programme runs on the CPU; a clip of n tokens and K runs (pooled: all clips as one) takes
    `K * (n - K) * max_segment` steps and, for a moment, `8 * K * (n - K)` bytes.

    Args:
        embeds: `[N, D]`.
        weights: `[N]`, positive.
        lengths: tokens per clip, C numbers that sum to N.
        budget: runs per clip, from one (none of none) to its length.
        max_segment: tokens a run may have.
        pooled: share the sum of the budget out among the clips by cost, at least one run each.

    Returns:
        Tokens per run, `[M]` int64 with M the sum of the budget; no run crosses from one clip into another.
    """
    caps = [max(max_segment, -(-n // max(k, 1))) for n, k in zip(lengths, budget, strict=True)]
    costs = segment_costs(embeds, weights, lengths, max([1, *map(min, caps, lengths)])).cpu()
    if pooled:
        counts = _best_runs(costs.numpy(), sum(budget))
    else:
        clips = [clip[:cap].numpy() for cap, clip in zip(caps, costs.split(tuple(lengths), dim=1), strict=True)]
        counts = np.concatenate([np.empty(0, dtype=np.int64), *map(_best_runs, clips, budget)])
    return torch.from_numpy(counts).to(embeds.device)


def segment_costs(embeds: Tensor, weights: Tensor, lengths: Sequence[int], most: int) -> Tensor:
    """Gives the variance `sum(w * |x - mean|^2)` of every run of at most `most` tokens.

    It is the sum over pairs of `w_i w_j |x_i - x_j|^2` by the sum of weights: terms that are never negative, so that
    nothing cancels.

    Returns:
        `[most, N]` float64: at `[e, i]` that of tokens `i - e` to `i`; infinite where the run leaves the clip.
    """
    embeds, weights = embeds.detach().float(), weights.detach().double()
    costs = torch.zeros(most, len(embeds), dtype=torch.double, device=embeds.device)
    pairs, to_last, total = torch.zeros_like(weights), torch.zeros_like(weights), weights.clone()
    for e in range(1, most):
        distances = torch.linalg.vector_norm(embeds[e:] - embeds[:-e], dim=1).double().square()
        to_last[e:] += weights[e:] * weights[:-e] * distances  # pairs of a run's last token with each before it
        total[e:] += weights[:-e]
        pairs = functional.pad(pairs[:-1], (1, 0)) + to_last
        costs[e] = pairs / total
    outside = torch.arange(most, device=embeds.device)[:, None] > positions(lengths, embeds.device)
    return costs.masked_fill_(outside, math.inf)


def _best_runs(costs: np.ndarray, runs: int) -> np.ndarray:
    """Gives the lengths of the `runs` runs of least summed cost that cover all tokens; `costs` as in `segment_costs`.

    A run is one token and some extra ones; row k of `best` holds the least cost of k runs for each number of extra
    tokens in all of them.
    """
    spare = costs.shape[1] - runs
    most = min(len(costs), spare + 1)
    longest_first = np.ascontiguousarray(costs[:most][::-1])
    best = np.full((runs + 1, most + spare), math.inf)  # extra tokens from column most - 1 on; no way before it
    best[0, most - 1] = 0
    candidates = np.empty((most, spare + 1))
    for k in range(runs):
        before = np.lib.stride_tricks.sliding_window_view(best[k], most).T  # [most, spare + 1]
        np.add(before, longest_first[:, k : k + spare + 1], out=candidates)
        candidates.min(axis=0, out=best[k + 1, most - 1 :])
    counts = np.empty(runs, dtype=np.int64)
    for k in reversed(range(runs)):
        step = int((best[k, spare : spare + most] + longest_first[:, k + spare]).argmin())
        counts[k] = most - step
        spare -= most - 1 - step
    return counts
