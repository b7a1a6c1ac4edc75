"""Temporal convolution: strided 1-D convolutions over a clip's frames, and what the papers put after them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ..kernels import positions, segment_centres, unfold
from .base import CompressorConfig, Context, Sizes, check_choice, check_count, check_flag, check_number
from .budget import window_budget
from .clip_layers import ClipLayers
from .frames import FrameCompressor, FrameConfig, fixed_windows
from .registry import register
from .stream import TokenStream

ACTIVATIONS = {"none": nn.Identity, "relu": nn.ReLU, "gelu": nn.GELU}


@dataclass(frozen=True)
class ConvConfig(FrameConfig):
    """Options of `Conv`; `keep_ratio` follows from `strides` and `source`, or the other way round.

    Args:
        strides: of the convolutions that shorten. From `keep_ratio` they come as prime factors, small ones first.
        stem: convolutions of stride 1 before them.
        kernel_size: of every convolution, at least the largest stride, so that every frame is read.
        padding: where the `kernel_size - 1` zeros of a clip go: "left" (causal), "right" or "both".
        channels: width between the convolutions: "llm" (then no Linear follows), "input" or "double" the input's.
        norm: whether a LayerNorm follows every convolution.
        activation: after every convolution (and its norm): "none", "relu" or "gelu".
        layers: pre-norm Transformer layers after the convolutions, with attention inside a clip.
        heads: of each of those layers.
        ffn_size: width of their feed-forward.
        dropout: in those layers.
    """

    rate_options: ClassVar[frozenset[str]] = frozenset({"keep_ratio", "strides"})

    strides: tuple[int, ...] = None  # type: ignore[assignment]  # resolved below
    stem: int = 0
    kernel_size: int = 3
    padding: Literal["left", "right", "both"] = "both"
    channels: Literal["llm", "input", "double"] = "llm"
    norm: bool = True
    activation: Literal["none", "relu", "gelu"] = "none"
    layers: int = 0
    heads: int = 4
    ffn_size: int = 2560
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.strides is None:
            strides = prime_factors(self.resolve_window("strides", None)) or (1,)
        else:
            if not isinstance(self.strides, list | tuple):
                raise ValueError(f"strides must be a list of whole numbers, got {self.strides!r}")
            strides = tuple(self.strides) or (1,)
            for stride in strides:
                check_count("strides", stride)
            self.resolve_window("strides", math.prod(strides))
        object.__setattr__(self, "strides", strides)
        super().__post_init__()
        check_count("kernel_size", self.kernel_size, least=max(strides))
        for option, least in (("stem", 0), ("layers", 0), ("heads", 1), ("ffn_size", 1)):
            check_count(option, getattr(self, option), least)
        check_choice("padding", self.padding, ("left", "right", "both"))
        check_choice("channels", self.channels, ("llm", "input", "double"))
        check_choice("activation", self.activation, ACTIVATIONS)
        check_flag("norm", self.norm)
        check_number("dropout", self.dropout, "[0, 1)")


class PackedConv1d(nn.Conv1d):
    """`nn.Conv1d` over packed clips: its parameters, its result for each clip alone, `ceil(n / stride)` tokens.

    Args:
        in_size: channels in.
        out_size: channels out.
        kernel_size: tokens each output reads.
        stride: tokens from one output to the next.
        before: zeros before each clip; the zeros after it are `kernel_size - 1 - before`.
    """

    def __init__(self, in_size: int, out_size: int, kernel_size: int, stride: int, before: int) -> None:
        super().__init__(in_size, out_size, kernel_size, stride)
        self.before = before

    def forward(  # type: ignore[override]
        self, embeds: Tensor, lengths: tuple[int, ...]
    ) -> tuple[Tensor, tuple[int, ...]]:
        """Convolves `[N, D]` and gives `[M, D']` and the M tokens' lengths per clip."""
        size, stride = self.kernel_size[0], self.stride[0]
        windows = tuple(-(-n // stride) for n in lengths)
        taps = rearrange(unfold(embeds, lengths, size, stride, windows, self.before), "m k d -> m (k d)")
        return functional.linear(taps, rearrange(self.weight, "o d k -> o (k d)"), self.bias), windows


class ClipTransformer(nn.Module):
    """OSUM's Transformer: input Linear and LayerNorm, sinusoidal positions, pre-norm layers, final LayerNorm.

    Args:
        size: D.
        layers: how many.
        heads: of each; must divide D.
        ffn_size: width of the feed-forward.
        dropout: in the layers and after the positions.
    """

    def __init__(self, size: int, layers: int, heads: int, ffn_size: int, dropout: float) -> None:
        super().__init__()
        if size % heads or size % 2:
            raise ValueError(f"conv: the Transformer's width must be even and a multiple of heads={heads}, got {size}")
        self.embed = nn.Sequential(nn.Linear(size, size), nn.LayerNorm(size))
        self.dropout = nn.Dropout(dropout)
        self.layers = ClipLayers(size, layers, heads, ffn_size, dropout, nn.ReLU)

    def forward(self, embeds: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Maps `[N, D]` to `[N, D]`; a clip attends to itself only."""
        x = self.embed(embeds)
        place = sinusoids(positions(lengths, x.device), x.shape[1])
        return self.layers(self.dropout(x * math.sqrt(x.shape[1]) + place.to(x.dtype)), lengths)


@register("conv")
class Conv(FrameCompressor):
    """Shortens each clip by strided convolutions and maps it to the LLM's width.

    Papers, each a preset:
        - `speechverse`: blocks of Conv1d (kernel 3, as wide as the LLM) and LayerNorm until 12.5 per second.
          "SpeechVerse: A Large-scale Generalizable Audio Language Model", arXiv 2405.08295.
        - `osum`: three causal Conv1d with GELU, strides 1, 2, 2, then four Transformer layers and a Linear. "OSUM:
          Advancing Open Speech Understanding Models with Limited Resources in Academia", arXiv 2501.13306.
        - `lucy`: one Conv1d (kernel 5, stride 2) to twice the width, norm, activation, Linear. "LUCY: Linguistic
          Understanding and Control Yielding Early Stage of Her", arXiv 2501.16327.

    A token takes the slot and the size of the `prod(strides)` frames it replaces; its receptive field is wider.

    Differs from the papers:
        - No clip sees the padding or the frames of another.
        - SpeechVerse leaves stride, padding and activation open; ours are 2 each, both sides, none.
        - LUCY's released norm and activation are unknown; ours are LayerNorm, because BatchNorm makes a clip depend on
          its batch, and ReLU. It reads a 25 per second encoder, so ours reads the LLM's tokens.
        - OSUM is trained on clips up to 30 s; nothing here keeps a clip to that length.
    """

    config_class: ClassVar[type[CompressorConfig]] = ConvConfig
    config: ConvConfig
    presets: ClassVar = {
        "speechverse": {"source": "hidden", "keep_ratio": 0.5},  # "as many blocks as necessary" for 12.5 per second
        "osum": {
            "source": "hidden",
            "stem": 1,
            "strides": (2, 2),
            "padding": "left",
            "channels": "input",
            "norm": False,
            "activation": "gelu",
            "layers": 4,
        },
        "lucy": {"strides": (2,), "kernel_size": 5, "padding": "right", "channels": "double", "activation": "relu"},
    }
    trained = True
    paper = "2405.08295, 2501.13306, 2501.16327"
    summary = "strided convolutions, with or without Transformer layers"
    differs = "clips never see one another or padding; LayerNorm for BatchNorm"

    def __init__(self, config: CompressorConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        c, size = self.config, self.frame_size
        width = {"llm": sizes.hidden_size, "input": size, "double": 2 * size}[c.channels]
        before = {"left": c.kernel_size - 1, "right": 0, "both": (c.kernel_size - 1) // 2}[c.padding]
        strides = (1,) * c.stem + c.strides
        self.convs = nn.ModuleList(
            PackedConv1d(size if i == 0 else width, width, c.kernel_size, stride, before)
            for i, stride in enumerate(strides)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) if c.norm else nn.Identity() for _ in strides)
        self.activation = ACTIVATIONS[c.activation]()
        self.transformer = ClipTransformer(width, c.layers, c.heads, c.ffn_size, c.dropout) if c.layers else None
        self.project = nn.Identity() if c.channels == "llm" else nn.Linear(width, sizes.hidden_size)

    def budget(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Gives the windows of `prod(strides)` frames in each clip, an incomplete last one included."""
        return window_budget(lengths, math.prod(self.config.strides), self.frames_per_token)

    def compress(self, stream: TokenStream, context: Context) -> TokenStream:
        """Convolves and maps."""
        frames = self.read_frames(stream, context)
        embeds, lengths = frames.embeds, frames.lengths
        for conv, norm in zip(self.convs, self.norms, strict=True):
            embeds, lengths = conv(embeds, lengths)
            embeds = self.activation(norm(embeds))
        if self.transformer is not None:
            embeds = self.transformer(embeds, lengths)
        frames, counts = fixed_windows(frames, lengths, math.prod(self.config.strides))
        slots, sizes = segment_centres(frames.slots, frames.sizes, counts)
        return stream.replace(embeds=self.project(embeds), lengths=lengths, slots=slots, sizes=sizes)


def prime_factors(number: int) -> tuple[int, ...]:
    """Gives the prime factors in ascending order: 12 gives 2, 2, 3."""
    for factor in range(2, number + 1):
        if number % factor == 0:
            return (factor, *prime_factors(number // factor))
    return ()


def sinusoids(place: Tensor, size: int) -> Tensor:
    """Gives sines at even and cosines at odd features of positions `[N]`: `[N, size]` float32 (arXiv 1706.03762)."""
    rates = torch.exp(torch.arange(0, size, 2, device=place.device) * (-math.log(10000.0) / size))
    angles = place[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)
