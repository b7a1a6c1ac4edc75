"""A-ToMe: neighbouring tokens with similar keys or features merge in pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..kernels import adjacent_cosine, merge_pairs, segment_mean
from .base import CompressorConfig, Context, check_choice, check_count
from .encoder import EncoderConfig, EncoderMethod, LayerState
from .merging import MergeCompressor, Merged, ThresholdConfig, excess, merge_runs
from .registry import register
from .stream import TokenStream

LAYERS = 6  # of the paper's encoder that merge


@dataclass(frozen=True)
class AToMeConfig(ThresholdConfig, EncoderConfig):
    """Options of `AToMe`.

    Args:
        pairs: "even-odd" offers a clip's tokens 0 and 1, 2 and 3, and so on; "all-adjacent" all neighbours, taken
            from left to right.
        average: "size" weights the mean by token size, "plain" counts the two tokens of a pair alike.
        rounds: over which the merging is spread, each removing the same share; by default one where that can do
            (`keep_ratio` of at least 0.5), else six. A round halves a clip at most; more follow where that falls short.
            Inside the tower the layers take their place.
        layers: see `EncoderConfig`; six as in the paper.
    """

    pairs: Literal["even-odd", "all-adjacent"] = "even-odd"
    average: Literal["size", "plain"] = "size"
    rounds: int | None = None
    layers: int | tuple[int, ...] = LAYERS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("pairs", self.pairs, ("even-odd", "all-adjacent"))
        check_choice("average", self.average, ("size", "plain"))
        if self.rounds is not None:
            check_count("rounds", self.rounds)
        if self.stage == "encoder" and self.rounds is not None:
            raise ValueError(
                f"rounds are for stage='connector'; inside the tower give layers, got rounds={self.rounds}"
            )


@register("atome")
class AToMe(MergeCompressor, EncoderMethod):
    """Merges pairs of adjacent tokens, those of highest cosine similarity first.

    Every round pairs the tokens that are left anew and merges the best pairs, as many as the budget asks for. With
    `threshold`, each of the `rounds` merges all pairs whose cosine is above it, too.

    The preset `encoder` acts inside the tower, between attention and feed-forward, on the keys of each layer, and so
    makes the later layers cheaper, too; see `EncoderMethod` for blocks, sizes and the tower's own pooling. With
    `proportional_attention` the later layers of the tower add log(size), as the LLM does.

    Paper: "Accelerating Transducers through Adjacent Token Merging", arXiv 2306.16009.

    Differs from the paper:
        - By default it works on the tower's output, where later comparisons put it, and compares the tokens themselves
          (`metric="keys"`: the keys of the tower's last layer). The paper merges inside the encoder, by keys: the
          preset `encoder`, with the paper's six layers and its 57 % fewer tokens.
        - The paper does not say which pairs it offers nor how it weighs: even-odd and size-weighted are choices.
        - `keep_ratio` is that of the whole, met exactly. At 0.5 one round merges every even-odd pair, whatever the
          cosine, and is mean pooling of two; `rounds=6` leaves it a choice.
        - Below 0.5 there are six rounds, as the paper has layers; more where six halvings are not enough.
    """

    config_class: ClassVar[type[CompressorConfig]] = AToMeConfig
    config: AToMeConfig
    presets: ClassVar = {"encoder": {"stage": "encoder", "metric": "keys", "keep_ratio": 0.43}}
    paper = "2306.16009"
    summary = "similar neighbours merge in pairs"
    differs = "after the tower, by features (inside it, by keys: `encoder`); pairs and weights are choices"

    @property
    def adaptive(self) -> bool:
        """With a threshold."""
        return self.config.threshold is not None

    def compress(self, stream: TokenStream, context: Context) -> TokenStream:
        """Merges round by round."""
        budget = self.budget(stream.lengths)
        rounds = self.config.rounds or (1 if self.config.keep_ratio >= 0.5 else LAYERS)
        merged, done = self.start(stream, context), 0
        while any(excess(merged.lengths, budget)) or (self.adaptive and done < rounds):
            done += 1
            merges = excess(merged.lengths, _targets(stream.lengths, budget, done / rounds))
            merged = self.merge_round(merged, merges)
        return self.finish(stream, merged)

    def merge_round(self, merged: Merged, merges: Sequence[int]) -> Merged:
        """Merges the best pairs of every clip, `merges` of them or as many as there are."""
        counts, left = self.pair(merged.metric, merged.lengths, merges)
        weights = merged.sizes if self.config.average == "size" else torch.ones_like(merged.sizes)
        return merged.merge(counts, weights, left)

    def pair(
        self, metric: Tensor, lengths: Sequence[int], merges: Sequence[int]
    ) -> tuple[Tensor, tuple[int, ...] | None]:
        """Gives the tokens per run, `[M]` int64, and how many runs each clip has, where that is known beforehand."""
        merges = [min(k, n // 2) for k, n in zip(merges, lengths, strict=True)]
        threshold = math.inf if self.config.threshold is None else self.config.threshold
        counts = merge_pairs(adjacent_cosine(metric, lengths), lengths, merges, threshold, self.config.pairs)
        return counts, None if self.adaptive else tuple(n - k for n, k in zip(lengths, merges, strict=True))

    def reduce(self, states: TokenStream, targets: Sequence[int], layer: LayerState) -> TokenStream:
        """Merges inside every block; more than once where half is still too much."""
        keys = None
        if self.config.metric == "keys":
            keys = layer.keys.detach().unflatten(1, (self.config.key_heads, -1)).mean(dim=1, dtype=torch.float32)
        rounds = 0
        while any(more := excess(states.lengths, targets)) or (self.adaptive and not rounds):
            counts, lengths = self.pair(states.embeds.detach() if keys is None else keys, states.lengths, more)
            weights = None if self.config.average == "size" else torch.ones_like(states.sizes)
            if keys is not None:
                keys = segment_mean(keys, states.sizes if weights is None else weights, counts)
            states = merge_runs(states, counts, lengths, weights, self.config.norm_preserving)
            rounds += 1
        return states


def _targets(lengths: Sequence[int], budget: Sequence[int], progress: float) -> list[int]:
    """Gives the tokens per clip after the share `progress` of the rounds: every round removes the same share."""
    if progress >= 1:
        return list(budget)
    # the small number: what is whole but for rounding is not rounded up
    return [math.ceil(n * (m / n) ** progress - 1e-6) if n else 0 for n, m in zip(lengths, budget, strict=True)]
