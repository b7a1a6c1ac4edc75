"""Ward: contiguous segments of least variance, one token each, which keeps its norm and its weight in attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels import move_boundaries, ward_exact, ward_greedy
from .base import CompressorConfig, Context, check_choice, check_count, check_flag
from .budget import token_budget
from .encoder import EncoderConfig, EncoderMethod, LayerState
from .merging import MergedTokenConfig, TokenMerger, merge_runs
from .reading import read_attention
from .registry import register
from .stream import TokenStream


@dataclass(frozen=True)
class WardConfig(EncoderConfig, MergedTokenConfig):
    """Options of `Ward`.

    Args:
        keep_ratio: tokens out / tokens in, in (0, 1].
        segmentation: "greedy" joins from the bottom up, so that every smaller budget joins further; "adjusted" then
            moves each boundary to its best place between its neighbours; "exact" is the optimum, by dynamic programming
            on the CPU, for clips of minutes (see `ward_exact`).
        budget: "clip" gives each clip its share of its own length; "batch" pools the shares of all clips of the batch
            and lets the cost decide, so that a clip of silence gives its tokens to one of speech. Then what a clip
            keeps depends on the clips beside it.
        weights: "attention" segments the tokens times the square root of the attention they receive in the audio
            tower's last layer; they are averaged without it.
        normalize: segment the tokens scaled to length 1; on speech worse than as they are.
        norm_preserving: rescale the mean of a segment to the mean norm of its tokens.
        proportional_attention: let the LLM add log(size) to the attention logits of the tokens.
        max_segment: tokens per segment with "exact", raised where a clip's budget needs it. It cuts long silences,
            where the others, which have no cap, can do better; a greater one takes time in proportion. On dense speech
            15 is as good as 40.
        stage: see `EncoderConfig`; inside the tower its later layers add log(size), too.
    """

    keep_ratio: float = 0.25
    segmentation: Literal["greedy", "adjusted", "exact"] = "adjusted"
    budget: Literal["clip", "batch"] = "clip"
    weights: Literal["none", "attention"] = "none"
    normalize: bool = False
    norm_preserving: bool = True
    proportional_attention: bool = True
    max_segment: int = 40

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("segmentation", self.segmentation, ("greedy", "adjusted", "exact"))
        check_choice("budget", self.budget, ("clip", "batch"))
        check_choice("weights", self.weights, ("none", "attention"))
        check_flag("normalize", self.normalize)
        check_count("max_segment", self.max_segment)
        if self.stage == "encoder" and self.budget == "batch":
            raise ValueError("budget='batch' is for stage='connector': inside the tower every block has its own budget")


@register("ward")
class Ward(TokenMerger, EncoderMethod):
    """Joins neighbouring tokens into the segments of least summed variance, as many as the budget allows.

    Joining neighbours is clustering on a line. Ward's criterion (Ward, Hierarchical grouping to optimize an objective
    function, 1963) under that constraint has an optimum that dynamic programming finds (Fisher, On grouping for
    maximum homogeneity, 1958); agglomeration comes near to it, and nearer when its boundaries are moved afterwards.
    Where little changes, segments are long; where much does, they are short. A segment of tokens x with sizes s becomes

        mean = sum(s * x) / sum(s);    token = mean / |mean| * sum(s * |x|) / sum(s);    size = sum(s)

    and the LLM adds log(size) to its attention logits (proportional attention, of Token Merging: Your ViT But Faster,
    arXiv 2210.09461), as if it still saw every token.

    This method is ours: there is no paper to differ from.
    """

    config_class: ClassVar[type[CompressorConfig]] = WardConfig
    config: WardConfig
    presets: ClassVar = {
        "exact": {"segmentation": "exact"},
        # inside the tower, moving boundaries has shown no gain
        "encoder": {"stage": "encoder", "keep_ratio": 0.5, "segmentation": "greedy"},
    }
    summary = "contiguous segments of least variance; norm kept, size in the attention"

    @property
    def needs(self) -> frozenset[str]:
        """The received attention where it weights the segmentation."""
        return frozenset({"encoder_attention"} if self.config.weights == "attention" else ())

    @property
    def adaptive(self) -> bool:
        """Whether the clips of a batch share one budget."""
        return self.config.budget == "batch"

    def budget(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Gives each clip's own share; of a pooled budget what is left for it when the others keep one token each."""
        share = token_budget(lengths, self.config.keep_ratio)
        if not self.adaptive:
            return share
        spare = sum(share) - sum(n > 0 for n in lengths)
        return tuple(min(n, 1 + spare) for n in lengths)

    def compress(self, stream: TokenStream, context: Context) -> TokenStream:
        """Segments, and replaces every segment by one token; a token alone stays as it is, bit for bit."""
        share = token_budget(stream.lengths, self.config.keep_ratio)
        weighted = self.config.weights == "attention"
        return self.merge(stream, share, read_attention(stream, context, self.name) if weighted else None)

    def reduce(self, states: TokenStream, targets: Sequence[int], layer: LayerState) -> TokenStream:
        """Segments every block."""
        return self.merge(states, targets, layer.attention)

    def merge(self, stream: TokenStream, share: Sequence[int], attention: Tensor | None) -> TokenStream:
        """Replaces every segment by one token.

        Args:
            stream: what to segment.
            share: segments per clip; of a pooled budget what the clips bring to it.
            attention: `[N]`, weights the segmentation; None does not.
        """
        if tuple(share) == stream.lengths:
            return stream
        counts = self.segment(stream, share, attention)
        lengths = None if self.adaptive else share  # of a pooled budget the cost decided what each clip keeps
        return merge_runs(stream, counts, lengths, norm_preserving=self.config.norm_preserving)

    @torch.no_grad()
    def segment(self, stream: TokenStream, share: Sequence[int], attention: Tensor | None) -> Tensor:
        """Gives the tokens per segment, `[M]` int64."""
        embeds = functional.normalize(stream.embeds.float(), dim=1) if self.config.normalize else stream.embeds
        if attention is not None:
            embeds = embeds * attention.sqrt()[:, None]
        if self.config.segmentation == "exact":
            return ward_exact(embeds, stream.sizes, stream.lengths, share, self.config.max_segment, self.adaptive)
        counts = ward_greedy(embeds, stream.sizes, stream.lengths, share, self.adaptive)
        if self.config.segmentation == "greedy":
            return counts
        return move_boundaries(embeds, stream.sizes, stream.lengths, counts)
