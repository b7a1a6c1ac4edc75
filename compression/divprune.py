"""DivPrune: the tokens that are farthest from one another."""

from __future__ import annotations

from typing import ClassVar

from ..kernels import farthest_first
from .base import Compressor, CompressorConfig, Context
from .controls import HalfConfig
from .registry import register
from .stream import TokenStream


@register("divprune")
class DivPrune(Compressor):
    """Keeps tokens so that the smallest distance between two of them is large (max-min diversity), greedily.

    The first is the token whose nearest neighbour is farthest; then always the one whose nearest *kept* token is
    farthest: `argmax_i min_{j kept} 1 - cos(x_i, x_j)`.

    Paper: "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", arXiv 2503.02175.

    Differs from the paper:
        - Audio tokens after the tower; there image tokens.
        - Distances that differ by less than float32 resolves are equal, and then the earliest token is kept; the
          released code leaves it to rounding.
    """

    config_class: ClassVar[type[CompressorConfig]] = HalfConfig
    paper = "2503.02175"
    summary = "tokens far from one another, farthest first"
    differs = "audio instead of images; ties go to the earliest"

    def compress(self, stream: TokenStream, context: Context) -> TokenStream:
        """Selects."""
        budget = self.budget(stream.lengths)
        return stream.select(farthest_first(stream.embeds, stream.lengths, budget), budget)
