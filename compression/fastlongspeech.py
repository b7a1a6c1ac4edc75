"""FastLongSpeech: similar neighbours merge, halving the clip again and again, weighted by how much they say."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..kernels import merge_chains
from .base import CompressorConfig, Context, Sizes, check_choice
from .merging import MergeCompressor, MergeConfig, Merged, excess
from .registry import register
from .stream import TokenStream

LEAST_WEIGHT = 1e-6  # so that a span of which nothing speaks is its plain mean; a guess


@dataclass(frozen=True)
class FastLongSpeechConfig(MergeConfig):
    """Options of `FastLongSpeech`.

    Args:
        weights: "gate" weights a token by a learned gate in place of the paper's non-blank probability; "none" weights
            all alike and leaves nothing to train.
        average: "plain" counts every token of a round alike, however many it was merged of; "size" multiplies the
            weights by token size.
    """

    weights: Literal["gate", "none"] = "gate"
    average: Literal["plain", "size"] = "plain"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("weights", self.weights, ("gate", "none"))
        check_choice("average", self.average, ("plain", "size"))


@register("fastlongspeech")
class FastLongSpeech(MergeCompressor):
    """Joins the most similar neighbours in rounds that halve the clip until the budget L is near.

    T tokens become `floor(T / 2)` while `T > 2L`, then L: the adjacent pairs of highest cosine similarity are joined,
    and each chain of them becomes `sum(d_j x_j) / sum(d_j)`, where `d_j = sigmoid(g . x_j / sqrt(D))` is a learned
    gate, worked out anew in every round. It starts at zero, where the means are plain.

    Paper: "FastLongSpeech: Enhancing Large Speech-Language Models for Efficient Long-Speech Processing",
    arXiv 2507.14815. The presets are its lengths L of 400 and 200 tokens for 30 s.

    Differs from the paper:
        - d is a gate of one output, learned through the LLM's loss. The paper's is `1 - P(blank)` of a CTC head, which
          is trained on transcripts beforehand and gets no gradient from the LLM.
        - Merges the tower's output; the paper its states before the last LayerNorm and the projection.
        - The budget is a share of the clip, not one length for all.
    """

    config_class: ClassVar[type[CompressorConfig]] = FastLongSpeechConfig
    config: FastLongSpeechConfig
    presets: ClassVar = {"l400": {"keep_ratio": 400 / 750}, "l200": {"keep_ratio": 200 / 750}}
    trained = True
    paper = "2507.14815"
    summary = "similar neighbours merge, by halves, weighted by a gate"
    differs = "a gate learned with the LLM in place of a CTC head; a share of the clip, not one length"

    def __init__(self, config: CompressorConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.trained = self.config.weights == "gate"
        # no bias, as the paper's head has none
        self.gate = nn.Parameter(torch.zeros(sizes.hidden_size)) if self.trained else None

    def compress(self, stream: TokenStream, context: Context) -> TokenStream:
        """Merges round by round."""
        budget = self.budget(stream.lengths)
        merged = self.start(stream, context)
        while merged.lengths != budget:
            targets = [n // 2 if n > 2 * m else m for n, m in zip(merged.lengths, budget, strict=True)]
            counts = merge_chains(merged.similarity(), merged.lengths, excess(merged.lengths, targets))
            merged = merged.merge(counts, self._weights(merged), targets)
        return self.finish(stream, merged)

    def _weights(self, merged: Merged) -> Tensor:
        weights = merged.sizes if self.config.average == "size" else torch.ones_like(merged.sizes)
        if self.gate is None:
            return weights
        # not a matrix product, which autocast would take in bf16
        logits = (merged.embeds * self.gate.float()).sum(dim=1) / math.sqrt(self.hidden_size)
        return weights * logits.sigmoid().clamp(min=LEAST_WEIGHT)
