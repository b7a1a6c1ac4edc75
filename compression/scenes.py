"""What methods on audio and video together share: frames, groups, and who gets how much of the budget.

Time is TMRoPE's, 25 positions per second, because it alone says which audio and video happen together: sound in a video
shares the video's positions, and every other clip of the sample starts after what came before it.

Who is where is worked out on the CPU: it takes many small steps whose results decide about the sizes of others. Only
the tokens stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..kernels import clip_ids, upload
from .base import CompressorConfig, Context, Scene, check_number
from .budget import largest_remainder
from .stream import TokenStream

POSITIONS_PER_SECOND = 25  # of TMRoPE's time

# The audio and the video tokens of 2 s, for which OmniZip (2511.14582) and OmniSIFT (2602.04804) state what they keep.
PUBLISHED_WINDOW = (50, 288)


@dataclass(frozen=True)
class SceneConfig(CompressorConfig):
    """Adds the papers' rates: the shares of audio and of video tokens that are dropped.

    The budget of a sample is `keep_ratio` of all its tokens, whatever its mix of audio and video. The rates say how
    the two share it: in proportion to what they would keep of each. In the papers' mix, 50 audio tokens to 288 video
    tokens, both come out as given.

    Args:
        keep_ratio: tokens out / tokens in, over audio and video together. Default: what the rates keep of the papers'
            mix.
        rho_a: share of the audio tokens to drop, together with `rho_v`. Default: the usual rates.
        rho_v: share of the video tokens to drop.
    """

    usual_rates: ClassVar[tuple[float, float]]

    keep_ratio: float = None  # type: ignore[assignment]  # None only until it is worked out
    rho_a: float | None = None
    rho_v: float | None = None

    def __post_init__(self) -> None:
        if (self.rho_a is None) != (self.rho_v is None):
            raise ValueError(f"rho_a and rho_v go together, got {self.rho_a!r} and {self.rho_v!r}")
        if self.rho_a is None:
            object.__setattr__(self, "rho_a", self.usual_rates[0])
            object.__setattr__(self, "rho_v", self.usual_rates[1])
        check_number("rho_a", self.rho_a, "[0, 1]")
        check_number("rho_v", self.rho_v, "[0, 1]")
        if self.keep_ratio is None:
            kept = sum(n * kept for n, kept in zip(PUBLISHED_WINDOW, self.kept, strict=True))
            object.__setattr__(self, "keep_ratio", kept / sum(PUBLISHED_WINDOW))
        super().__post_init__()

    @property
    def kept(self) -> tuple[float, float]:
        """The shares of the audio and of the video tokens that the rates keep, in the papers' mix."""
        assert self.rho_a is not None
        assert self.rho_v is not None
        return 1 - self.rho_a, 1 - self.rho_v


def read_scene(stream: TokenStream, context: Context, method: str) -> Scene:
    """Gives the scene of the stream on the CPU, all audio where the context has none.

    Raises:
        ValueError: it does not fit the stream.
    """
    scene = context.scene
    if scene is None:
        return _on_cpu(Scene.of_audio(stream))
    n = len(stream.embeds)
    for name, shape in {"is_video": (n,), "seconds": (n,), "positions": (3, n), "sources": (n,)}.items():
        if getattr(scene, name).shape != shape:
            got = list(getattr(scene, name).shape)
            raise ValueError(f"{method}: scene.{name} must be {list(shape)} for a stream of {n} tokens, got {got}")
    if scene.is_video.dtype != torch.bool:
        raise ValueError(f"{method}: scene.is_video must be bool, got {scene.is_video.dtype}")
    return _on_cpu(scene)


def _on_cpu(scene: Scene) -> Scene:
    """Reads a scene from a GPU at one go, exactly in float64."""
    if scene.is_video.device.type == "cpu":
        return scene
    rows = torch.stack([x.double() for x in (*scene.positions, scene.sources, scene.is_video, scene.seconds)]).cpu()
    return Scene(rows[4].bool(), rows[5].float(), rows[:3].long(), rows[3].long())


def modalities(stream: TokenStream, scene: Scene) -> tuple[Tensor, list[int], Tensor, list[int]]:
    """Gives where the audio tokens are and how many each clip has, then the same of the video tokens; on the CPU."""
    audio, video = (~scene.is_video).nonzero().squeeze(1), scene.is_video.nonzero().squeeze(1)
    clips, count = clip_ids(stream.lengths), len(stream.lengths)
    return audio, per_group(clips[audio], count).tolist(), video, per_group(clips[video], count).tolist()


def split_budget(
    audio: Sequence[int], video: Sequence[int], totals: Sequence[int], kept: tuple[float, float]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shares each clip's total between its audio and its video tokens, in proportion to what is to be kept of each.

    Args:
        audio: audio tokens per clip.
        video: video tokens per clip.
        totals: tokens to keep per clip.
        kept: shares of the audio and of the video tokens.
    """
    limits = torch.tensor([audio, video], dtype=torch.double).T  # [C, 2]
    shares = limits * torch.tensor(kept, dtype=torch.double)
    dealt = largest_remainder(shares.flatten(), limits.flatten(), [2] * len(totals), totals)
    return dealt[::2], dealt[1::2]


def elapsed(stream: TokenStream, scene: Scene) -> Tensor:
    """Gives each token's time since its clip's first token, in positions: `[N]` int64, on the CPU."""
    time, clips = scene.positions[0], clip_ids(stream.lengths)
    start = time.new_zeros(len(stream.lengths)).scatter_reduce(0, clips, time, "amin", include_self=False)
    return time - start[clips]


def per_group(ids: Tensor, groups: int) -> Tensor:
    """Counts the rows of each group: `[G]` int64."""
    return torch.bincount(ids, minlength=groups)


@dataclass(frozen=True)
class Groups:
    """Rows with equal keys, on the CPU. Groups are numbered in the order of their keys.

    Args:
        ids: `[N]` int64, the group of each row.
        counts: `[G]` int64, rows per group.
        order: `[N]` int64, the rows group by group, inside a group as they come.
    """

    ids: Tensor
    counts: Tensor
    order: Tensor

    @classmethod
    def of(cls, *keys: Tensor) -> Groups:
        """Groups rows by their keys, `[N]` int64 each, of which the first counts most in the order of the groups."""
        # numpy's sort takes next to no time for keys that are in order already, as they mostly are
        order = torch.from_numpy(np.lexsort([key.numpy() for key in reversed(keys)]))
        begins = torch.ones_like(order, dtype=torch.bool)
        begins[1:] = torch.stack([key[order].diff() != 0 for key in keys]).any(dim=0)
        number = begins.cumsum(0) - 1
        return cls(torch.empty_like(order).scatter(0, order, number), torch.bincount(number), order)

    @property
    def firsts(self) -> Tensor:
        """The first row of each group, `[G]` int64."""
        return self.order[self.counts.cumsum(0) - self.counts]


@dataclass(frozen=True)
class Frames:
    """The video tokens of a scene, frame by frame, on the CPU; the model's frame is a pair of the video's.

    Args:
        tokens: `[V]` int64, where in the stream each one is.
        ids: `[V]` int64, the frame of each.
        counts: `[F]` int64, tokens per frame.
        runs: `[F]` int64, the run of each frame: the frames of one source with the same keys, in time order.
        ranks: `[F]` int64, the frame's index in its run.
    """

    tokens: Tensor
    ids: Tensor
    counts: Tensor
    runs: Tensor
    ranks: Tensor

    @classmethod
    def of(cls, scene: Scene, *keys: Tensor) -> Frames:
        """Finds the frames: the tokens of a source that share their time. `keys` (`[N]` int64 each) part the runs."""
        video = scene.is_video.nonzero().squeeze(1)
        by_run = Groups.of(*(key[video] for key in keys), scene.sources[video])
        frames = Groups.of(by_run.ids, scene.positions[0, video])
        runs = by_run.ids[frames.firsts]
        lengths = torch.bincount(runs)
        ranks = torch.arange(len(runs)) - (lengths.cumsum(0) - lengths)[runs]
        return cls(video[frames.order], frames.ids[frames.order], frames.counts, runs, ranks)

    @property
    def heads(self) -> Tensor:
        """Where in the stream each frame's first token is, `[F]` int64."""
        return self.tokens[self.counts.cumsum(0) - self.counts]

    def partners(self, scene: Scene) -> Tensor:
        """Pairs the frames of each run two by two, and finds second frames' tokens in the first ones.

        Args:
            scene: of the stream.

        Returns:
            `[V]` int64, the index into `tokens` of the first frame's token at the same height and width; -1 where
            there is none, and in first frames.
        """
        height, width = scene.positions[1:, self.tokens]
        places = Groups.of(height, width)
        code = self.ids * len(places.counts) + places.ids
        in_order, by_code = code.sort(stable=True)
        wanted = code - len(places.counts)
        at = torch.searchsorted(in_order, wanted).clamp(max=len(code) - 1)
        second = (self.ranks % 2 == 1)[self.ids]
        return torch.where(second & (in_order[at] == wanted), by_code[at], -1)

    def change(self, embeds: Tensor, scene: Scene) -> Tensor:
        """Gives how much every token of a pair's second frame differs from the first frame at its place.

        The squared distance of the two unit vectors, which is 2 - 2 cosine, but exactly 0 for equal tokens.

        Args:
            embeds: `[N, D]`, of the stream.
            scene: of the stream.

        Returns:
            `[V]` float32; infinite where the first frame has no such place, and in first frames.
        """
        partners = self.partners(scene)
        rows = (partners >= 0).nonzero().squeeze(1)
        change = torch.full(self.tokens.shape, torch.inf, device=embeds.device)
        here, before = (unit(embeds[upload(self.tokens[index], embeds.device)]) for index in (rows, partners[rows]))
        return change.index_copy_(0, upload(rows, embeds.device), (here - before).square().sum(dim=1))


def unit(embeds: Tensor) -> Tensor:
    """Scales rows to length 1, in float32; zeros stay."""
    return functional.normalize(embeds.float(), dim=-1)
