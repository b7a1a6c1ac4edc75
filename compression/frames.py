"""Methods with windows over frames: the LLM's tokens, or the audio tower's own states at twice their rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..kernels import clip_ids, positions, upload
from .base import Compressor, CompressorConfig, Context, Sizes, check_choice, check_finite
from .budget import check_keep_ratio
from .stream import TokenStream

# The tower gives 50 states per second and joins them in pairs to the 25 tokens per second that the LLM reads.
FRAMES_PER_TOKEN = {"tokens": 1, "hidden": 2}


@dataclass(frozen=True)
class FrameConfig(CompressorConfig):
    """Adds what the windows are laid over.

    Args:
        keep_ratio: tokens out / tokens in, of the clip's 25 tokens per second whatever the source.
        source: "tokens" reads the stream (25 frames per second, as wide as the LLM), "hidden" the tower's last hidden
            states (50 frames per second, as wide as the tower), with a map to the LLM's width in the method.
    """

    keep_ratio: float = None  # type: ignore[assignment]  # None only until the subclass has worked it out
    source: Literal["tokens", "hidden"] = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("source", self.source, FRAMES_PER_TOKEN)

    def resolve_window(self, option: str, window: int | None) -> int:
        """Gives the frames per output token, and fills in the half of (keep_ratio, window) that was not given.

        Without either, every second token is kept (12.5 per second, where most published connectors end).

        Args:
            option: what the caller calls the window, for errors.
            window: frames per output token; None to derive it from `keep_ratio`.

        Raises:
            ValueError: no whole window gives `keep_ratio`, the two contradict one another, or more than one token
                per slot (25 per second) would come out.
        """
        check_choice("source", self.source, FRAMES_PER_TOKEN)
        per_token = FRAMES_PER_TOKEN[self.source]
        if window is None:
            keep_ratio = 0.5 if self.keep_ratio is None else self.keep_ratio
            check_keep_ratio(keep_ratio)
            window = round(per_token / keep_ratio)
            if abs(per_token / window - keep_ratio) > 1e-6:
                near = (k for k in range(window - 1, window + 2) if k >= per_token)
                raise ValueError(
                    f"no whole window of source={self.source!r} gives keep_ratio {keep_ratio}; "
                    f"nearby are {', '.join(f'{per_token / k:.6g} ({k} frames)' for k in near)}"
                )
        elif self.keep_ratio is not None:
            check_keep_ratio(self.keep_ratio)
            if abs(per_token / window - self.keep_ratio) > 1e-6:
                raise ValueError(
                    f"{option} gives keep_ratio {per_token / window:.6g} with source={self.source!r}, "
                    f"but keep_ratio is {self.keep_ratio}: give one of the two"
                )
        if window < per_token:
            raise ValueError(
                f"{option} gives {25 * per_token / window:g} tokens per second with source={self.source!r}; "
                f"at most one per slot, 25, is possible: {per_token} or more frames per token"
            )
        object.__setattr__(self, "keep_ratio", per_token / window)
        return window


class FrameCompressor(Compressor):
    """Base class of methods whose config is a `FrameConfig`."""

    config_class: ClassVar[type[CompressorConfig]] = FrameConfig
    config: FrameConfig

    def __init__(self, config: CompressorConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        if self.config.source == "hidden" and sizes.encoder_size is None:
            raise ValueError(f"{self.name} with source='hidden' needs encoder_size, the width of the audio tower")

    @property
    def needs(self) -> frozenset[str]:
        """The tower's hidden states when they are the source."""
        return frozenset({"encoder_hidden"} if self.config.source == "hidden" else ())

    @property
    def frames_per_token(self) -> int:
        """Frames of the source per token of the stream."""
        return FRAMES_PER_TOKEN[self.config.source]

    @property
    def frame_size(self) -> int:
        """The width of a frame."""
        size = self.encoder_size if self.config.source == "hidden" else self.hidden_size
        assert size is not None
        return size

    def read_frames(self, stream: TokenStream, context: Context) -> TokenStream:
        """Gives the source as a stream: a frame has its token's slot and its share of the token's size.

        Of T tokens' hidden states the first 2T are read. The tower may give one more, which its own pairwise pooling
        leaves out, too; so the number of outputs follows from T alone.

        Raises:
            ValueError: the hidden states do not fit the stream or the tower's width, or are not finite.
        """
        if self.config.source == "tokens":
            return stream
        hidden: TokenStream = context.require("encoder_hidden", self.name)
        wanted = tuple(2 * n for n in stream.lengths)
        fits = len(hidden.lengths) == len(wanted) and all(
            h in (n, n + 1) for h, n in zip(hidden.lengths, wanted, strict=True)
        )
        if not fits or hidden.embeds.shape[1] != self.encoder_size:
            raise ValueError(
                f"{self.name}: encoder_hidden must hold {list(wanted)} states (or one more) of width "
                f"{self.encoder_size} for clips of {list(stream.lengths)} tokens, got {list(hidden.lengths)} of width "
                f"{hidden.embeds.shape[1]}"
            )
        check_finite(hidden, self.name, "encoder_hidden")
        return stream.replace(
            embeds=hidden.head(wanted).embeds,
            lengths=wanted,
            slots=stream.slots.repeat_interleave(2),
            sizes=stream.sizes.repeat_interleave(2) / 2,
        )


def fixed_windows(frames: TokenStream, windows: Sequence[int], window: int) -> tuple[TokenStream, Tensor]:
    """Cuts every clip into `windows[c]` windows of `window` frames, of which the last may have fewer.

    Returns:
        The frames up to the last window's end, and the frames in each window, `[M]` int64.
    """
    frames = frames.head([min(n, m * window) for n, m in zip(frames.lengths, windows, strict=True)])
    left = _repeat(frames.lengths, windows) - positions(windows) * window
    return frames, upload(left.clamp(max=window), frames.slots.device)


def even_windows(frames: TokenStream, windows: Sequence[int]) -> Tensor:
    """Gives the frames in each window, `[M]` int64: window i of a clip's m ends before its frame `(i + 1) * n // m`."""
    n, m, i = _repeat(frames.lengths, windows), _repeat(windows, windows), positions(windows)
    return upload((i + 1) * n // m - i * n // m, frames.slots.device)


def _repeat(per_clip: Sequence[int], counts: Sequence[int]) -> Tensor:
    return torch.tensor(per_clip, dtype=torch.long)[clip_ids(counts)]
