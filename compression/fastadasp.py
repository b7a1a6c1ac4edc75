"""FastAdaSP: chains of similar neighbours collapse, weighted by the attention they receive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..kernels import merge_chains
from .base import CompressorConfig, Context, check_choice
from .merging import MergeCompressor, MergeConfig, excess
from .reading import read_attention
from .registry import register
from .stream import TokenStream

LEAST_ATTENTION = 1e-6  # of an even share: a run that nothing attends to is its plain mean; a guess


@dataclass(frozen=True)
class FastAdaSPConfig(MergeConfig):
    """Options of `FastAdaSP`.

    Args:
        weights: "attention" weights a token by the attention it receives in the tower's last layer, times its size;
            "none" by its size alone.
    """

    metric: Literal["features", "keys"] = "keys"
    weights: Literal["attention", "none"] = "attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("weights", self.weights, ("attention", "none"))


@register("fastadasp")
class FastAdaSP(MergeCompressor):
    """Joins the adjacent pairs of highest cosine similarity; a chain of joined pairs becomes one token.

    To remove k tokens the k most similar pairs are joined, in one round. Each chain becomes the mean of its tokens,
    weighted by the attention they receive: `sum(a_i x_i) / sum(a_i)`.

    Paper: "FastAdaSP: Multitask-Adapted Efficient Inference for Large Speech Language Model", arXiv 2410.03007.

    Differs from the paper:
        - Works between tower and LLM, once, where later comparisons put it; the paper merges inside the LLM, in one
          layer or in all from one on, with a ratio that may decay.
        - So keys and attention are those of the audio tower's last layer, not of the LLM's.
        - Attention is that of audio on audio; in the LLM the text counts among the queries.
    """

    config_class: ClassVar[type[CompressorConfig]] = FastAdaSPConfig
    config: FastAdaSPConfig
    paper = "2410.03007"
    summary = "chains of similar neighbours collapse, weighted by attention"
    differs = "before the LLM, with the tower's keys and attention"

    @property
    def needs(self) -> frozenset[str]:
        """The tower's keys and attention, unless the options do without."""
        return super().needs | ({"encoder_attention"} if self.config.weights == "attention" else set())

    def compress(self, stream: TokenStream, context: Context) -> TokenStream:
        """Merges in one round."""
        merged = self.start(stream, context)
        budget = self.budget(stream.lengths)
        merges = excess(stream.lengths, budget)
        counts = merge_chains(merged.similarity(), stream.lengths, merges)
        return self.finish(stream, merged.merge(counts, self._weights(stream, context), budget))

    def _weights(self, stream: TokenStream, context: Context) -> Tensor:
        if self.config.weights == "none":
            return stream.sizes
        attention = read_attention(stream, context, self.name)
        return attention.clamp(min=LEAST_ATTENTION) * stream.sizes
