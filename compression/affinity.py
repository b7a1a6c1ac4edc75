"""Affinity pooling: a token joins the open group while it is similar to one of its last tokens."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels import merge_chains, positions
from .base import CompressorConfig, Context, check_count
from .merging import MergeCompressor, ThresholdConfig, excess
from .registry import register
from .stream import TokenStream


@dataclass(frozen=True)
class AffinityConfig(ThresholdConfig):
    """Options of `Affinity`. Without `keep_ratio` and `threshold`, the threshold is 0.8.

    Args:
        window: how many tokens of the open group, from its last one back, a token is compared with.
    """

    window: int = 1

    def __post_init__(self) -> None:
        if self.keep_ratio is None and self.threshold is None:
            object.__setattr__(self, "threshold", 0.8)  # the paper's at the LLM's input
        super().__post_init__()
        check_count("window", self.window)


@register("affinity")
class Affinity(MergeCompressor):
    """Pools the groups that a scan from left to right makes of similar tokens.

    A token joins the open group if its cosine with one of that group's last `window` tokens is above `threshold`;
    otherwise it opens the next one. A group becomes its mean. A higher threshold only ever splits groups, so each
    token has one value below which it joins, see `join_values`. With `keep_ratio` alone, each clip gets the threshold
    that leaves its budget of groups.

    Paper: "Do We Need Distinct Representations for Every Speech Token? Unveiling and Exploiting Redundancy in Large
    Speech Language Models", arXiv 2604.06871. Its thresholds at the LLM's input are presets.

    Differs from the paper:
        - Acts at the LLM's input only; the paper pools once more in a deep LLM layer (thresholds 0.7 and 0.8,
          window 3).
        - The exact budget is ours.
        - The mean is weighted by token size, which matters after another compressor only.
    """

    config_class: ClassVar[type[CompressorConfig]] = AffinityConfig
    config: AffinityConfig
    presets: ClassVar = {
        "aggressive": {"threshold": 0.8, "window": 1},
        "conservative": {"threshold": 0.9, "window": 1},
    }
    paper = "2604.06871"
    summary = "a token joins the open group while similar enough"
    differs = "at the LLM's input only, not in a deep layer as well"

    @property
    def adaptive(self) -> bool:
        """With a threshold."""
        return self.config.threshold is not None

    def compress(self, stream: TokenStream, context: Context) -> TokenStream:
        """Merges in one round."""
        merged, threshold = self.start(stream, context), self.config.threshold
        joins = join_values(merged.metric, stream.lengths, self.config.window)
        counts = merge_chains(
            joins.roll(-1),  # from each token's own join to that of the token after it
            stream.lengths,
            excess(stream.lengths, self.budget(stream.lengths)),
            math.inf if threshold is None else threshold,
        )
        return self.finish(stream, merged.merge(counts, stream.sizes))


def join_values(metric: Tensor, lengths: Sequence[int], window: int) -> Tensor:
    """Gives the threshold below which each token joins the group before it, `[N]`; -inf at a clip's first token.

    Token i joins through token i - l if their cosine c_l is above the threshold, and so is what every token between
    them joined by: `t_i = max over l of min(c_l, s_l)` with `s_l = min(t_{i-l+1}, ..., t_{i-1})`. The next token has
    `s'_1 = inf` and `s'_{l+1} = min(s_l, t_i)`. As s falls with l, `min(s_l, s_k) = s_max(l,k)`: so s' is a matrix
    times s, with max for the sum and min for the product, where `s'_{l+1}` takes s_l times the greatest of c_1 to c_l,
    and s_k times c_k for each k > l. Such products are associative: a prefix scan by doubling gives every token's s.

    Args:
        metric: `[N, E]`, what is compared.
        lengths: tokens per clip, C numbers that sum to N.
        window: the largest l.
    """
    cosines = _cosines_back(metric, lengths, window)
    if window == 1:
        return cosines[:, 0]
    row, column = torch.arange(window, device=metric.device)[:, None], torch.arange(window, device=metric.device)
    steps = cosines[:, None].where(column >= row, -torch.inf)  # [N, window, window]; row l is of s'_{l+1}
    steps = steps.where(column != row - 1, cosines.cummax(1).values[:, None])
    steps[:, 0] = torch.where(column == 0, torch.inf, -torch.inf)
    reach = 1  # tokens that each product spans
    while reach < max(lengths, default=0):
        steps = torch.cat([steps[:reach], _max_min(steps[reach:], steps[:-reach])])
        reach *= 2
    before = steps[:, :, 0].roll(1, 0)  # s of each token, from inf at the start; a clip's first needs none
    return torch.minimum(cosines, before).amax(1)


def _cosines_back(metric: Tensor, lengths: Sequence[int], window: int) -> Tensor:
    """Gives the cosine of each token with those 1 to `window` before it, `[N, window]`; -inf outside its clip."""
    unit = functional.normalize(metric.float(), dim=1)
    lags = range(1, window + 1)
    cosines = [functional.pad((unit[lag:] * unit[:-lag]).sum(dim=1), (min(lag, len(unit)), 0)) for lag in lags]
    outside = positions(lengths, metric.device)[:, None] < torch.arange(1, window + 1, device=metric.device)
    return torch.stack(cosines, dim=1).masked_fill(outside, -torch.inf)


def _max_min(later: Tensor, earlier: Tensor) -> Tensor:
    """Gives the matrix product `[N, w, w]` with max for the sum and min for the product."""
    products = (torch.minimum(later[:, :, i, None], earlier[:, i, None, :]) for i in range(later.shape[1]))
    return functools.reduce(torch.maximum, products)
