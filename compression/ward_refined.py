"""Ward's segments, and a small Transformer that writes into each token what its mean has lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from .base import Compressor, CompressorConfig, Context, Sizes, check_choice, check_count, check_number
from .clip_layers import ClipLayers
from .conv import sinusoids
from .frames import even_windows
from .merging import merge_runs
from .registry import register
from .stream import TokenStream
from .ward import Ward, WardConfig

NEARLY_ZERO = 1e-3  # of the last weights at the start; at 0 those before them would get no gradient. A guess


@dataclass(frozen=True)
class WardRefinedConfig(CompressorConfig):
    """Options of `WardRefined`.

    Args:
        keep_ratio: tokens out / tokens in, in (0, 1].
        segments: "ward" lets the content decide where segments end; "even" is the control, windows of one length.
        points: at which a segment is read, evenly spaced over it.
        width: of the Transformer.
        layers: of it.
        heads: of each layer; the width is a multiple of twice as many.
        dropout: in the layers.
    """

    keep_ratio: float = 0.125
    segments: Literal["ward", "even"] = "ward"
    points: int = 4
    width: int = 512
    layers: int = 2
    heads: int = 8
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("segments", self.segments, ("ward", "even"))
        for option in ("points", "width", "layers", "heads"):
            check_count(option, getattr(self, option))
        check_number("dropout", self.dropout, "[0, 1)")
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be a multiple of twice the heads, {2 * self.heads}, got {self.width}")


@register("ward-refined")
class WardRefined(Compressor):
    """Merges as `Ward` does, and adds to every token what a Transformer reads at several points of its segment.

        token = ward + W_out T(W_in [norm(x_1); ...; norm(x_P); log size] + position)

    The mean of a segment does not tell what came first. So its tokens are read at P evenly spaced points, with
    interpolation between neighbours, and T, pre-norm layers that attend inside the clip, decides what to write. W_out
    starts near zero: untrained, this is nearly `ward`. No weight depends on `keep_ratio`: one checkpoint serves all
    rates.

    This method is ours: there is no paper to differ from.
    """

    config_class: ClassVar[type[CompressorConfig]] = WardRefinedConfig
    config: WardRefinedConfig
    presets: ClassVar = {"even": {"segments": "even"}}
    trained = True
    summary = "`ward`, and a Transformer that adds what the means lose"

    def __init__(self, config: CompressorConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        options, width = self.config, self.config.width
        self.ward = Ward(WardConfig(keep_ratio=options.keep_ratio), sizes)
        self.norm = nn.LayerNorm(sizes.hidden_size)
        self.read = nn.Linear(options.points * sizes.hidden_size + 1, width)
        self.mix = ClipLayers(width, options.layers, options.heads, 4 * width, options.dropout)
        self.write = nn.Linear(width, sizes.hidden_size)
        nn.init.normal_(self.write.weight, std=NEARLY_ZERO)
        nn.init.zeros_(self.write.bias)

    @property
    def proportional_attention(self) -> bool:
        """As of `Ward`."""
        return self.ward.proportional_attention

    def compress(self, stream: TokenStream, context: Context) -> TokenStream:
        """Segments, merges and refines."""
        budget = self.budget(stream.lengths)
        if self.config.segments == "even":
            counts = even_windows(stream, budget)
        else:
            counts = self.ward.segment(stream, budget, None)
        merged = merge_runs(stream, counts, budget, norm_preserving=True)
        points = self.norm(resample(stream.embeds, counts, self.config.points)).flatten(1)  # [M, P * D]
        read = self.read(torch.cat([points, merged.sizes.log()[:, None].to(points.dtype)], dim=1))
        read = read + sinusoids(merged.slots, read.shape[1]).to(read.dtype)
        return merged.replace(embeds=merged.embeds + self.write(self.mix(read, budget)))


def resample(embeds: Tensor, counts: Tensor, points: int) -> Tensor:
    """Reads runs of `counts` `[M]` rows of `[N, D]` at evenly spaced points, by linear interpolation: `[M, P, D]`.

    Point p of P in a run of n lies at `(p + 1/2) * n / P - 1/2`, within the run; a run of one is the same at all.
    """
    share = (torch.arange(points, device=counts.device) + 0.5) / points  # [P]
    n = counts[:, None]
    place = (share * n - 0.5).clamp(min=0).minimum(n - 1.0)  # [M, P]
    before = place.floor().long()
    first = (counts.cumsum(0) - counts)[:, None] + before
    after = first + (before < n - 1)
    return embeds[first].lerp(embeds[after], (place - before)[..., None].to(embeds.dtype))
