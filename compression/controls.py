"""The controls every table holds: keep everything, keep any tokens, keep every so many."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from ..kernels import clip_ids, evenly, offsets, upload
from .base import Compressor, CompressorConfig, Context, Sizes
from .registry import register
from .scenes import modalities, read_scene
from .stream import TokenStream

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NoneConfig(CompressorConfig):
    """Takes `keep_ratio=1` only, so that nobody measures the uncompressed model under another name."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_ratio != 1:
            raise ValueError(f"none keeps every token: keep_ratio must be 1, got {self.keep_ratio}")


@register("none")
class Identity(Compressor):
    """Returns the stream as it is."""

    config_class: ClassVar[type[CompressorConfig]] = NoneConfig
    summary = "every token, 25 per second"

    def compress(self, stream: TokenStream, context: Context) -> TokenStream:
        """Returns the stream."""
        return stream


@dataclass(frozen=True)
class HalfConfig(CompressorConfig):
    """Keeps every second token unless told otherwise.

    Args:
        keep_ratio: tokens out / tokens in, in (0, 1].
    """

    keep_ratio: float = 0.5


@register("random")
class Random(Compressor):
    """Keeps tokens drawn uniformly without replacement.

    A clip's draw follows from `Context.seed` and the clip's own length, so that neither its place in the batch nor the
    other clips change it: clips of one length keep the same places.
    """

    config_class: ClassVar[type[CompressorConfig]] = HalfConfig
    summary = "a uniform draw without replacement"

    @property
    def needs(self) -> frozenset[str]:
        """The seed."""
        return frozenset({"seed"})

    def compress(self, stream: TokenStream, context: Context) -> TokenStream:
        """Draws on the CPU, so that every device keeps the same tokens."""
        budget = self.budget(stream.lengths)
        kept = [
            np.sort(np.random.default_rng((context.seed, n)).choice(n, m, replace=False))
            for n, m in zip(stream.lengths, budget, strict=True)
        ]
        inside = torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *kept]))
        index = offsets(stream.lengths)[clip_ids(budget)] + inside
        return stream.select(upload(index, stream.embeds.device), budget)


@register("uniform-stride")
class UniformStride(Compressor):
    """Keeps the token in the middle of each of the budget's even windows: `floor((i + 1/2) * n / m)` for i < m."""

    config_class: ClassVar[type[CompressorConfig]] = HalfConfig
    summary = "evenly spaced tokens"

    def compress(self, stream: TokenStream, context: Context) -> TokenStream:
        """Selects."""
        budget = self.budget(stream.lengths)
        return stream.select(upload(evenly(stream.lengths, budget), stream.embeds.device), budget)


@register("keep-all-audio")
class KeepAllAudio(Compressor):
    """Keeps the audio whole, and gives what is left of the budget to evenly spaced video tokens.

    Where a sample's audio alone is more than its budget, no video stays and the audio is thinned evenly; that it
    happened is logged once.
    """

    config_class: ClassVar[type[CompressorConfig]] = HalfConfig
    stage = "joint"
    summary = "all audio, then evenly spaced video tokens"

    def __init__(self, config: CompressorConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.told = False

    def compress(self, stream: TokenStream, context: Context) -> TokenStream:
        """Selects."""
        totals = self.budget(stream.lengths)
        audio, heard, video, seen = modalities(stream, read_scene(stream, context, self.name))
        of_audio = [min(n, m) for n, m in zip(heard, totals, strict=True)]
        of_video = [m - n for n, m in zip(of_audio, totals, strict=True)]
        if of_audio != heard and not self.told:
            self.told = True
            log.warning(
                "%s: the audio alone is more than keep_ratio %g allows, so that no video stays and not all audio does",
                self.name,
                self.config.keep_ratio,
            )
        kept = torch.cat([audio[evenly(heard, of_audio)], video[evenly(seen, of_video)]]).sort().values
        return stream.select(upload(kept, stream.embeds.device), totals)
