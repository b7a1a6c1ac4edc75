"""Attention top-K: the tokens that receive the most attention in the audio tower's last layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels import evenly, most_alike, segment_mean, segment_reduce, tally, top_k, upload
from .base import CompressorConfig, Context, check_count, check_number
from .encoder import EncoderConfig, EncoderMethod, LayerState, resolve_layers
from .reading import read_attention, read_keys
from .registry import register
from .stream import TokenStream


@dataclass(frozen=True)
class AttentionTopKConfig(EncoderConfig):
    """Options of `AttentionTopK`.

    Args:
        keep_ratio: tokens out / tokens in, in (0, 1].
        segments: a clip is cut into so many equal stretches of time, and each keeps its own best; 1 compares all tokens
            of a clip.
        contextual_ratio: the share of the budget that is not chosen by attention, in [0, 1]: evenly spaced tokens of
            the rest, into which all others are merged. Above 0, at least one token of a clip is.
        key_heads: with `contextual_ratio`, the mean of the keys is taken over so many heads (20 in Qwen2.5-Omni's
            tower); 1 compares all heads side by side.
        layers: see `EncoderConfig`; of how many, 3 of 12 are 3, 6, 9.
    """

    keep_ratio: float = 0.5
    segments: int = 1
    contextual_ratio: float = 0.0
    key_heads: int = 1
    layers: int | tuple[int, ...] = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage == "encoder" and (self.segments > 1 or self.contextual_ratio):
            raise ValueError(
                f"inside the tower every block keeps its own best: segments and contextual_ratio are for "
                f"stage='connector', got {self.segments} and {self.contextual_ratio}"
            )
        check_count("segments", self.segments)
        check_count("key_heads", self.key_heads)
        check_number("contextual_ratio", self.contextual_ratio, "[0, 1]")
        if self.key_heads > 1 and self.contextual_ratio == 0:
            raise ValueError(f"key_heads needs contextual_ratio > 0, got {self.key_heads} with 0")


@register("attention-topk")
class AttentionTopK(EncoderMethod):
    """Keeps the tokens that receive the most attention in the tower's last layer, or its states layer by layer.

    A token's score is its column of the attention map: the mean over heads and over the queries of its block, *times
    the block's length*. The mean alone averages 1/n in a block of n tokens, so that the short block at a clip's end
    would win; the product averages 1 in every block.

    Papers, each a preset:
        - `last-layer`: the best of the whole clip, as the first step of VisionZip and of OmniZip, arXiv 2511.14582.
        - `segmentwise`: the best of each of ten segments. "Segmentwise Pruning in Audio-Language Models", arXiv
          2511.14293.
        - `visionzip-om`: the best of the whole clip, and contextual tokens: every token left over is merged into that
          one of a few evenly spaced ones whose key is most like its own. "VisionZip: Longer is Better but Not Necessary
          in Vision Language Models", arXiv 2412.04467; the share of contextual tokens is that of 2511.14293's baseline.
        - `topk-ast`: inside the tower, after the attention and before the feed-forward of three layers, the states that
          receive the most attention there. "Token Pruning in Audio Transformers: Optimizing Performance and Decoding
          Patch Importance", arXiv 2504.01690; keep 0.7 in each of three layers, the rate of its 30-40 % fewer MACs.

    Differs from the papers:
        - Blocks of 2 s compare as said above; the papers' encoders attend to the whole input.
        - The scores are means over heads; which reduction segmentwise pruning takes is not published.
        - Segmentwise pruning loses the remainder of the budget by ten: here it goes to the earliest segments. The
          remainder of the clip does, too, so that no segment has fewer tokens than it is to keep.
        - A contextual token is the mean of all its tokens, and keeps its own slot; VisionZip's code adds the mean of
          the others to it, and puts contextual tokens behind the dominant ones.
        - TopK-AST prunes in layers 3, 6 and 9 of 12, from 0: 8, 16 and 24 of the tower's 32. It leaves the tokens in
          the order of their scores; here each block of 2 s keeps its own best, in time order, and the whole meets
          `keep_ratio`. Its cosine schedule from 1 in training is `--shrink-steps` of train_compress.py.
    """

    config_class: ClassVar[type[CompressorConfig]] = AttentionTopKConfig
    config: AttentionTopKConfig
    presets: ClassVar = {
        "last-layer": {},
        "segmentwise": {"keep_ratio": 0.25, "segments": 10},
        "visionzip-om": {"contextual_ratio": 0.18},
        "topk-ast": {"stage": "encoder", "keep_ratio": 0.343},
    }
    paper = "2504.01690, 2511.14293, 2412.04467, 2511.14582"
    summary = "tokens that the tower attends to most"
    differs = "attention inside blocks of 2 s, whose scores are made comparable; time order; exact budget"

    @property
    def needs(self) -> frozenset[str]:
        """The attention, and the keys where tokens merge."""
        return frozenset({"encoder_attention"} | ({"encoder_keys"} if self.config.contextual_ratio else set()))

    def compress(self, stream: TokenStream, context: Context) -> TokenStream:
        """Selects, and merges the rest if there are contextual tokens."""
        budget = self.budget(stream.lengths)
        share = self.config.contextual_ratio
        contextual = [min(m, max(1, round(share * m))) if share else 0 for m in budget]
        dominant = [m - k for m, k in zip(budget, contextual, strict=True)]
        kept = self.best(read_attention(stream, context, self.name), stream.lengths, dominant)
        if share == 0:
            return stream.select(kept, budget)
        keys = read_keys(stream, context, self.name, self.config.key_heads)
        left = torch.ones_like(stream.slots, dtype=torch.bool).index_fill_(0, kept, False)
        counts = [n - k for n, k in zip(stream.lengths, dominant, strict=True)]
        rest = left.nonzero_static(size=sum(counts)).squeeze(1)
        targets = rest[upload(evenly(counts, contextual), rest.device)]
        owners = torch.arange(len(left), device=left.device)  # into which token each goes
        owners[rest] = most_alike(keys, rest, counts, targets, contextual)[0]
        owners[targets] = targets
        return _merge(stream, owners, torch.cat([kept, targets]).sort().values, budget)

    def encoder_layers(self, depth: int) -> tuple[int, ...]:
        """Gives the layers that prune."""
        return resolve_layers(self.config.layers, depth, inside=True)

    def reduce(self, states: TokenStream, targets: Sequence[int], layer: LayerState) -> TokenStream:
        """Keeps the best states of every block."""
        assert layer.attention is not None
        return states.select(top_k(layer.attention, states.lengths, targets), targets)

    def best(self, scores: Tensor, lengths: Sequence[int], budget: Sequence[int]) -> Tensor:
        """Gives the best of every segment, `[M]` int64 ascending: segments are to `top_k` what clips are."""
        segments, quotas = (chain.from_iterable(_parts(n, self.config.segments) for n in x) for x in (lengths, budget))
        return top_k(scores, list(segments), list(quotas))


def _parts(total: int, parts: int) -> list[int]:
    """Cuts a whole number into parts that differ by 1 at most, the larger ones first."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def _merge(stream: TokenStream, owners: Tensor, kept: Tensor, budget: Sequence[int]) -> TokenStream:
    """Averages all tokens with the same owner; the owners `kept` keep their slots.

    The centre of tokens that lie scattered over the clip could be the slot of another one.
    """
    order = owners.argsort(stable=True)
    counts = tally(owners, len(owners))[kept]
    return stream.replace(
        embeds=segment_mean(stream.embeds[order], stream.sizes[order], counts),
        lengths=tuple(budget),
        slots=stream.slots[kept],
        sizes=segment_reduce(stream.sizes[order], "sum", counts),
    )
