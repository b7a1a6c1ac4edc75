"""A-ToMe: neighbouring tokens with similar keys or features merge in pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..kernels import merge_pairs
from .base import CompressorConfig, Context, check_choice, check_count
from .merging import MergeCompressor, ThresholdConfig, excess
from .registry import register
from .stream import TokenStream

LAYERS = 6  # of the paper's encoder that merge


@dataclass(frozen=True)
class AToMeConfig(ThresholdConfig):
    """Options of `AToMe`.

    Args:
        pairs: "even-odd" offers a clip's tokens 0 and 1, 2 and 3, and so on; "all-adjacent" all neighbours, taken
            from left to right.
        average: "size" weights the mean by token size, "plain" counts the two tokens of a pair alike.
        rounds: over which the merging is spread, each removing the same share; by default one where that can do
            (`keep_ratio` of at least 0.5), else six. A round halves a clip at most; more follow where that falls short.
    """

    pairs: Literal["even-odd", "all-adjacent"] = "even-odd"
    average: Literal["size", "plain"] = "size"
    rounds: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("pairs", self.pairs, ("even-odd", "all-adjacent"))
        check_choice("average", self.average, ("size", "plain"))
        if self.rounds is not None:
            check_count("rounds", self.rounds)


@register("atome")
class AToMe(MergeCompressor):
    """Merges pairs of adjacent tokens, those of highest cosine similarity first.

    Every round pairs the tokens that are left anew and merges the best pairs, as many as the budget asks for. With
    `threshold`, each of the `rounds` merges all pairs whose cosine is above it, too.

    Paper: "Accelerating Transducers through Adjacent Token Merging", arXiv 2306.16009.

    Differs from the paper:
        - Works on the tower's output, where later comparisons put it; the paper merges inside six encoder layers.
        - Compares the tokens themselves unless `metric="keys"`, which takes the keys of the tower's last layer.
        - The paper does not say which pairs it offers nor how it weighs: even-odd and size-weighted are choices.
        - `keep_ratio` is that of the whole, met exactly. At 0.5 one round merges every even-odd pair, whatever the
          cosine, and is mean pooling of two; `rounds=6` leaves it a choice.
        - Below 0.5 there are six rounds, as the paper has layers; more where six halvings are not enough.
    """

    config_class: ClassVar[type[CompressorConfig]] = AToMeConfig
    config: AToMeConfig
    paper = "2306.16009"
    summary = "similar neighbours merge in pairs"
    differs = "after the tower, not inside it"

    @property
    def adaptive(self) -> bool:
        """With a threshold."""
        return self.config.threshold is not None

    def compress(self, stream: TokenStream, context: Context) -> TokenStream:
        """Merges round by round."""
        budget, threshold = self.budget(stream.lengths), self.config.threshold
        rounds = self.config.rounds or (1 if self.config.keep_ratio >= 0.5 else LAYERS)
        merged, done = self.start(stream, context), 0
        while any(excess(merged.lengths, budget)) or (self.adaptive and done < rounds):
            done += 1
            merges = excess(merged.lengths, _targets(stream.lengths, budget, done / rounds))
            merges = [min(k, n // 2) for k, n in zip(merges, merged.lengths, strict=True)]
            counts = merge_pairs(
                merged.similarity(),
                merged.lengths,
                merges,
                math.inf if threshold is None else threshold,
                self.config.pairs,
            )
            weights = merged.sizes if self.config.average == "size" else torch.ones_like(merged.sizes)
            merged = merged.merge(counts, weights)
        return self.finish(stream, merged)


def _targets(lengths: Sequence[int], budget: Sequence[int], progress: float) -> list[int]:
    """Gives the tokens per clip after the share `progress` of the rounds: every round removes the same share."""
    if progress >= 1:
        return list(budget)
    # the small number: what is whole but for rounding is not rounded up
    return [math.ceil(n * (m / n) ** progress - 1e-6) if n else 0 for n, m in zip(lengths, budget, strict=True)]
