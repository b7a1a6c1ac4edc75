"""What the methods that merge share: the merged token, the likeness of neighbours, and merging in several rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..kernels import (
    adjacent_cosine,
    clip_ids,
    nest_runs,
    segment_centres,
    segment_mean,
    segment_merge,
    segment_reduce,
    tally,
)
from .base import Compressor, CompressorConfig, Context, check_choice, check_count, check_flag, check_number
from .reading import read_keys
from .stream import TokenStream


@dataclass(frozen=True)
class MergedTokenConfig(CompressorConfig):
    """Adds what a merged token keeps of the tokens it stands for.

    Args:
        keep_ratio: tokens out / tokens in, in (0, 1].
        norm_preserving: whether it is rescaled to their mean norm; a mean of tokens is shorter than they are.
        proportional_attention: whether the LLM adds log(size) to its attention logits (ToMe, 2210.09461).
    """

    norm_preserving: bool = False
    proportional_attention: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("norm_preserving", self.norm_preserving)
        check_flag("proportional_attention", self.proportional_attention)


@dataclass(frozen=True)
class MergeConfig(MergedTokenConfig):
    """Options of every method that merges neighbours which are alike.

    Args:
        keep_ratio: tokens out / tokens in, in (0, 1].
        metric: what neighbours are compared by: the tokens themselves ("features") or the keys of the audio tower's
            last layer, mean of a token's two states ("keys").
        key_heads: the keys' mean is taken over so many heads (20 in Qwen2.5-Omni's tower); 1 compares all heads side
            by side.
    """

    keep_ratio: float = 0.5
    metric: Literal["features", "keys"] = "features"
    key_heads: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("metric", self.metric, ("features", "keys"))
        check_count("key_heads", self.key_heads)
        if self.key_heads > 1 and self.metric != "keys":
            raise ValueError(f"key_heads needs metric='keys', got {self.key_heads} with metric={self.metric!r}")


@dataclass(frozen=True)
class ThresholdConfig(MergeConfig):
    """Adds merging by a threshold: the content decides how many tokens stay.

    Args:
        keep_ratio: tokens out / tokens in; exact without `threshold`, and with it the most (default 1).
        threshold: neighbours whose cosine is above it merge.
    """

    rate_options: ClassVar[frozenset[str]] = frozenset({"keep_ratio", "threshold"})

    keep_ratio: float = None  # type: ignore[assignment]  # None only until it is worked out below
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None:
            check_number("threshold", self.threshold, "[-1, 1]")
        if self.keep_ratio is None:
            object.__setattr__(self, "keep_ratio", 0.5 if self.threshold is None else 1.0)
        super().__post_init__()


@dataclass(frozen=True)
class Merged:
    """Tokens between two rounds of merging, in float32.

    Args:
        embeds: `[M, D]`.
        keys: `[M, E]`; None where the tokens are compared by `embeds`.
        sizes: `[M]`, original tokens in each.
        runs: `[M]` int64, tokens of the method's input in each.
        lengths: tokens per clip, C numbers that sum to M.
    """

    embeds: Tensor
    keys: Tensor | None
    sizes: Tensor
    runs: Tensor
    lengths: tuple[int, ...]

    @property
    def metric(self) -> Tensor:
        """What decides: `[M, D]` or `[M, E]`, without gradient."""
        return (self.embeds if self.keys is None else self.keys).detach()

    def similarity(self) -> Tensor:
        """Gives the cosine of each token with the next of its clip, `[M]`."""
        return adjacent_cosine(self.metric, self.lengths)

    def merge(self, counts: Tensor, weights: Tensor, lengths: Sequence[int] | None = None) -> Merged:
        """Averages runs of `counts` `[K]` tokens with `weights` `[M]`.

        Args:
            counts: tokens per run.
            weights: of the mean.
            lengths: runs per clip, where they are known; to count them is to wait for the GPU.
        """
        return Merged(
            embeds=segment_mean(self.embeds, weights, counts),
            keys=None if self.keys is None else segment_mean(self.keys, weights.detach(), counts),
            sizes=segment_reduce(self.sizes, "sum", counts),
            runs=nest_runs(self.runs, counts),
            lengths=runs_per_clip(self.lengths, counts) if lengths is None else tuple(lengths),
        )


class TokenMerger(Compressor):
    """Base class of methods whose config is a `MergedTokenConfig`."""

    config: MergedTokenConfig

    @property
    def proportional_attention(self) -> bool:
        """As the option says."""
        return self.config.proportional_attention


class MergeCompressor(TokenMerger):
    """Base class of methods whose config is a `MergeConfig`: one or several rounds of `Merged.merge`."""

    config_class: ClassVar[type[CompressorConfig]] = MergeConfig
    config: MergeConfig

    @property
    def needs(self) -> frozenset[str]:
        """The tower's keys where they are what is compared."""
        return frozenset({"encoder_keys"} if self.config.metric == "keys" else ())

    def start(self, stream: TokenStream, context: Context) -> Merged:
        """Gives the tokens before the first round.

        Raises:
            ValueError: the keys do not fit the stream or the number of heads, or are not finite.
        """
        return Merged(
            embeds=stream.embeds.float(),
            keys=read_keys(stream, context, self.name, self.config.key_heads) if self.config.metric == "keys" else None,
            sizes=stream.sizes,
            runs=torch.ones_like(stream.slots),
            lengths=stream.lengths,
        )

    def finish(self, stream: TokenStream, merged: Merged) -> TokenStream:
        """Gives the merged tokens of `stream`, each at the centre of all that went into it."""
        slots, sizes = segment_centres(stream.slots, stream.sizes, merged.runs)
        embeds = merged.embeds
        if self.config.norm_preserving:
            embeds = keep_norms(embeds, stream.embeds, stream.sizes, merged.runs)
        return stream.replace(embeds=embeds, lengths=merged.lengths, slots=slots, sizes=sizes)


def merge_runs(
    stream: TokenStream,
    counts: Tensor,
    lengths: Sequence[int] | None = None,
    weights: Tensor | None = None,
    norm_preserving: bool = False,
) -> TokenStream:
    """Replaces every run of `counts` `[M]` tokens by their mean, at their centre; a token alone stays, bit for bit.

    Args:
        stream: the tokens.
        counts: tokens per run; no run crosses from one clip into another.
        lengths: runs per clip, where they are known; to count them is to wait for the GPU.
        weights: `[N]`, of the mean. Default: the sizes.
        norm_preserving: whether the mean gets the mean norm of its tokens.
    """
    tokens = stream.embeds.float() if norm_preserving else stream.embeds  # rounded once, after both steps
    if weights is None:
        embeds, slots, sizes = segment_merge(tokens, stream.slots, stream.sizes, counts)
    else:
        embeds = segment_mean(tokens, weights, counts)
        slots, sizes = segment_centres(stream.slots, stream.sizes, counts)
    if norm_preserving:
        embeds = keep_norms(embeds, tokens, stream.sizes, counts).to(stream.embeds.dtype)
    lengths = runs_per_clip(stream.lengths, counts) if lengths is None else tuple(lengths)
    return stream.replace(embeds=embeds, lengths=lengths, slots=slots, sizes=sizes)


def keep_norms(merged: Tensor, embeds: Tensor, sizes: Tensor, counts: Tensor) -> Tensor:
    """Gives every merged token the mean norm of its run, weighted by size: `[M, D]` float32.

    Args:
        merged: `[M, D]`.
        embeds: `[N, D]`, what was merged.
        sizes: `[N]`.
        counts: `[M]`, tokens per run.
    """
    norms = torch.linalg.vector_norm(embeds.float(), dim=1, keepdim=True)
    return rescale(merged.float(), segment_mean(norms, sizes, counts), counts)


def rescale(merged: Tensor, norms: Tensor, counts: Tensor) -> Tensor:
    """Gives merged tokens other norms; one of zeros, and a token alone, stay as they are.

    Args:
        merged: `[M, D]`.
        norms: `[M, 1]`.
        counts: `[M]`, tokens that went into each.
    """
    present = torch.linalg.vector_norm(merged, dim=1, keepdim=True)
    changed = (present > 0) & (counts > 1)[:, None]
    return merged * torch.where(changed, norms / torch.where(changed, present, 1.0), 1.0)


def runs_per_clip(lengths: Sequence[int], counts: Tensor) -> tuple[int, ...]:
    """Gives how many runs of `counts` `[M]` tokens each clip has."""
    ends = clip_ids(lengths, counts.device)[counts.cumsum(0) - 1]
    return tuple(tally(ends, len(lengths)).tolist())


def excess(lengths: Sequence[int], targets: Sequence[int]) -> list[int]:
    """Gives how many tokens each clip has over its target, at least 0."""
    return [max(0, n - m) for n, m in zip(lengths, targets, strict=True)]
