"""Token stacking: neighbouring frames side by side on the feature axis, then a two-layer MLP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from einops import rearrange
from timm.layers import Mlp
from torch import nn

from ..kernels import segment_centres, segment_mean, unfold
from .base import CompressorConfig, Context, Sizes, check_choice, check_count, check_flag
from .budget import window_budget
from .frames import FrameCompressor, FrameConfig, fixed_windows
from .registry import register
from .stream import TokenStream


@dataclass(frozen=True)
class StackingConfig(FrameConfig):
    """Options of `Stacking`; `keep_ratio` follows from `k` and `source`, or the other way round.

    Args:
        k: frames per output token.
        combine: "stack" puts the k frames side by side, "mean" averages them.
        mlp_size: width of the hidden layer; 2048 in all the papers.
        norm: whether a LayerNorm follows the MLP (an option of Llama-AVSR).
        tail: "keep" fills the last window of a clip with zeros, "drop" leaves an incomplete one out, unless it is the
            clip's only one.
    """

    rate_options: ClassVar[frozenset[str]] = frozenset({"keep_ratio", "k"})

    k: int = None  # type: ignore[assignment]  # resolved below
    combine: Literal["stack", "mean"] = "stack"
    mlp_size: int = 2048
    norm: bool = False
    tail: Literal["keep", "drop"] = "keep"

    def __post_init__(self) -> None:
        if self.k is not None:
            check_count("k", self.k)
        object.__setattr__(self, "k", self.resolve_window("k", self.k))
        super().__post_init__()
        check_choice("combine", self.combine, ("stack", "mean"))
        check_count("mlp_size", self.mlp_size)
        check_flag("norm", self.norm)
        check_choice("tail", self.tail, ("keep", "drop"))


@register("stacking")
class Stacking(FrameCompressor):
    """Maps every k neighbouring frames to one token: `Linear(ReLU(Linear([x_1; ...; x_k])))`.

    Papers: "An Embarrassingly Simple Approach for LLM with Strong ASR Capacity" (SLAM-ASR), arXiv 2402.08846;
    "LLaMA-Omni: Seamless Speech Interaction with Large Language Models", arXiv 2409.06666 (the same module); "Large
    Language Models are Strong Audio-Visual Speech Recognition Learners" (Llama-AVSR), arXiv 2409.12319 (k of 3, or the
    mean instead of the stack).

    Differs from the papers:
        - An incomplete window at a clip's end is filled with zeros and kept; `tail="drop"` is the papers' way.
        - By default the frames are the LLM's tokens; the presets read the audio tower's states, as the papers do.
    """

    config_class: ClassVar[type[CompressorConfig]] = StackingConfig
    config: StackingConfig
    presets: ClassVar = {
        "slam-asr": {"source": "hidden", "k": 5},
        "llama-omni": {"source": "hidden", "k": 5},
        "llama-avsr": {"source": "hidden", "k": 3},
    }
    trained = True
    paper = "2402.08846, 2409.06666, 2409.12319"
    summary = "k frames side by side, then an MLP"
    differs = "keeps the incomplete last window; reads the LLM's tokens unless a preset says otherwise"

    def __init__(self, config: CompressorConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        stacked = self.config.k if self.config.combine == "stack" else 1
        self.mlp = Mlp(stacked * self.frame_size, self.config.mlp_size, sizes.hidden_size, act_layer=nn.ReLU)
        self.norm = nn.LayerNorm(sizes.hidden_size) if self.config.norm else nn.Identity()

    def budget(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Gives the windows of k frames in each clip."""
        return window_budget(lengths, self.config.k, self.frames_per_token, self.config.tail)

    def compress(self, stream: TokenStream, context: Context) -> TokenStream:
        """Stacks and maps."""
        k, windows = self.config.k, self.budget(stream.lengths)
        frames, counts = fixed_windows(self.read_frames(stream, context), windows, k)
        if self.config.combine == "stack":
            embeds = rearrange(unfold(frames.embeds, frames.lengths, k, k, windows), "m k d -> m (k d)")
        else:
            embeds = segment_mean(frames.embeds, frames.sizes, counts)
        slots, sizes = segment_centres(frames.slots, frames.sizes, counts)
        return stream.replace(embeds=self.norm(self.mlp(embeds)), lengths=windows, slots=slots, sizes=sizes)
