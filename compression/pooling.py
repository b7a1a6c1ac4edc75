"""Pooling of neighbouring tokens: mean, max, or a mean with learned weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..kernels import segment_centres, segment_mean, segment_reduce, segment_softmax
from .base import CompressorConfig, Context, Sizes, check_choice, check_count, parameter_count
from .budget import token_budget, window_budget
from .frames import FrameCompressor, FrameConfig, even_windows, fixed_windows
from .merging import MergedTokenConfig, TokenMerger, keep_norms
from .registry import register
from .stream import TokenStream


@dataclass(frozen=True)
class PoolingConfig(FrameConfig, MergedTokenConfig):
    """Options of `Pooling`.

    Args:
        k: frames per window. Without it the windows of a clip are as even as whole numbers allow and meet any
            `keep_ratio` exactly; with it `keep_ratio` follows from k.
        kind: "mean" weighted by size, "max" per feature, or "attentive": a mean whose weights are the softmax over
            the window of a learned query's products with the frames.
        tail: with k, "keep" pools an incomplete window at a clip's end, "drop" leaves it out, unless it is the
            clip's only one.
    """

    rate_options: ClassVar[frozenset[str]] = frozenset({"keep_ratio", "k"})

    k: int | None = None
    kind: Literal["mean", "max", "attentive"] = "mean"
    tail: Literal["keep", "drop"] = "keep"

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("mean", "max", "attentive"))
        check_choice("tail", self.tail, ("keep", "drop"))
        if self.k is not None:
            check_count("k", self.k)
            self.resolve_window("k", self.k)
        elif self.tail == "drop":
            raise ValueError("tail='drop' needs k: without it the windows of a clip leave no tail")
        elif self.keep_ratio is None:
            object.__setattr__(self, "keep_ratio", 0.5)
        super().__post_init__()


@register("pooling")
class Pooling(TokenMerger, FrameCompressor):
    """Pools windows of neighbouring tokens. With its defaults it is the control "mean" of the field's tables.

    Papers: "Qwen2-Audio Technical Report", arXiv 2407.10759, and "Qwen2.5-Omni Technical Report", arXiv 2503.20215: the
    mean of two neighbouring states, 50 to 25 per second. That step is in Qwen2.5-Omni's tower already, so the presets
    are: `qwen2.5-omni`, the same once more, on the LLM's tokens (12.5 per second, nothing trained); `qwen2-audio`, its
    connector learned anew on the tower's states (25 per second): mean of two, LayerNorm, Linear.

    Differs from the papers:
        - They pool before the tower's final LayerNorm; `source="hidden"` reads the states after it, then adds one.
        - The mean is weighted by token size, which matters after another compressor only.
        - The attentive kind is ours; its query starts at zero, where it equals the mean.
    """

    config_class: ClassVar[type[CompressorConfig]] = PoolingConfig
    config: PoolingConfig
    presets: ClassVar = {"qwen2-audio": {"source": "hidden", "k": 2}, "qwen2.5-omni": {"k": 2}}
    paper = "2407.10759, 2503.20215"
    summary = "mean, max or attentive pooling of windows"
    differs = "pools after the tower's last LayerNorm"

    def __init__(self, config: CompressorConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.query = nn.Parameter(torch.zeros(self.frame_size)) if self.config.kind == "attentive" else None
        self.project = (
            nn.Sequential(nn.LayerNorm(self.frame_size), nn.Linear(self.frame_size, sizes.hidden_size))
            if self.config.source == "hidden"
            else nn.Identity()
        )
        self.trained = parameter_count(self) > 0

    def budget(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Gives the windows of k frames in each clip, or what `keep_ratio` allows."""
        if self.config.k is None:
            return token_budget(lengths, self.config.keep_ratio)
        return window_budget(lengths, self.config.k, self.frames_per_token, self.config.tail)

    def compress(self, stream: TokenStream, context: Context) -> TokenStream:
        """Pools, and maps the tower's states to the LLM's width."""
        windows, frames = self.budget(stream.lengths), self.read_frames(stream, context)
        if self.config.k is None:
            counts = even_windows(frames, windows)
        else:
            frames, counts = fixed_windows(frames, windows, self.config.k)
        slots, sizes = segment_centres(frames.slots, frames.sizes, counts)
        pooled = self.pool(frames, counts)
        if self.config.norm_preserving:
            pooled = keep_norms(pooled, frames.embeds, frames.sizes, counts).to(frames.embeds.dtype)
        return stream.replace(embeds=self.project(pooled), lengths=windows, slots=slots, sizes=sizes)

    def pool(self, frames: TokenStream, counts: Tensor) -> Tensor:
        """Pools runs of `counts` `[M]` frames: `[M, D]`."""
        if self.config.kind == "max":
            return segment_reduce(frames.embeds, "max", counts)
        weights = frames.sizes
        if self.query is not None:
            # not a matrix product, which autocast would take in bf16
            logits = (frames.embeds.float() * self.query.float()).sum(dim=1) / math.sqrt(self.frame_size)
            weights = segment_softmax(logits + frames.sizes.log(), counts)
        return segment_mean(frames.embeds, weights, counts)
