"""OmniZip: the audio that the encoder attends to says where video may be pruned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels import clip_ids, evenly, most_alike, pad_clips, tally, top_k, unpad_clips, upload
from .base import Compressor, CompressorConfig, Context, Scene, check_count, check_number
from .budget import largest_remainder
from .reading import read_attention
from .registry import register
from .scenes import (
    POSITIONS_PER_SECOND,
    Frames,
    Groups,
    SceneConfig,
    elapsed,
    modalities,
    per_group,
    read_scene,
    split_budget,
    unit,
)
from .stream import TokenStream

Rows = tuple[Tensor, Sequence[int]]  # `[R]` int64, where tokens are, clip after clip and ascending; how many per clip


@dataclass(frozen=True)
class OmniZipConfig(SceneConfig):
    """Options of `OmniZip`; the defaults are the paper's.

    Args:
        keep_ratio: tokens out / tokens in, over audio and video together; see `SceneConfig`.
        rho_a: share of the audio tokens that are not salient.
        rho_v: share of the video tokens to drop.
        contextual_ratio: share of the audio tokens kept as anchors beside the salient ones.
        neighbours: the tokens merged into each anchor, the paper's G.
        window_seconds: length of the windows in which audio says how much video to keep.
        rho_min: the least that is pruned of a window's video.
        rho_max: the most.
        density_neighbours: how many count for the density of a video token; the paper's k.
    """

    usual_rates: ClassVar = (0.3, 0.6)

    contextual_ratio: float = 0.05
    neighbours: int = 3
    window_seconds: float = 2.0
    rho_min: float = 0.35
    rho_max: float = 0.75
    density_neighbours: int = 5

    def __post_init__(self) -> None:
        for name in ("contextual_ratio", "rho_min", "rho_max"):
            check_number(name, getattr(self, name), "[0, 1]")
        if self.rho_min > self.rho_max:
            raise ValueError(f"rho_min must be at most rho_max, got {self.rho_min} and {self.rho_max}")
        check_count("neighbours", self.neighbours, least=0)
        check_count("density_neighbours", self.density_neighbours)
        check_number("window_seconds", self.window_seconds, "(0, inf)")
        super().__post_init__()

    @property
    def kept(self) -> tuple[float, float]:
        """The shares of the audio tokens, anchors included, and of the video tokens that the rates keep."""
        audio, video = super().kept
        return min(1.0, audio + self.contextual_ratio), video


@register("omnizip")
class OmniZip(Compressor):
    """Prunes video more where the audio says little, and audio by the attention it receives.

    Paper: "OmniZip: Audio-Guided Dynamic Token Compression for Fast Omnimodal Large Language Models", arXiv 2511.14582.

    1. Audio: the tokens that receive most attention in the encoder's last layer stay. Of the rest, anchors at a
       regular step stay too. Every other token belongs to the anchor it is most like (cosine); the G of them most
       related to the video (greatest cosine to a video token) are averaged with softmax weights, and the anchor
       becomes the mean of itself and that average. What is left is dropped.
    2. Windows of 2 s: where the share S of a window's audio is kept, `rho_max - (rho_max - rho_min) * S` of its video
       is pruned, normalised to `rho_v` over the sample.
    3. In a window, frames 2 and 4 keep the tokens that differ most from the same place in the frame before. Frames 1
       and 3 keep density peaks: with d the distances to the k nearest tokens of the frame, a token's density is
       `exp(-mean(d^2))`, and its score that times the distance to the nearest token of higher density.

    Differs from the paper:
        - The budget is exact: windows and frames get whole numbers by largest remainder. `SceneConfig` says how audio
          and video share it in a sample that is not the paper's mix.
        - Rates are normalised by one shift for all windows of a sample that have audio, and clamped to [rho_min,
          rho_max]; the paper leaves the two extreme windows as they are. Where `rho_v` itself lies outside, the clamp
          opens to 0 or to 1: theirs always keeps a quarter of the video. Windows without audio get `rho_v`.
        - Anchors are at most half of the audio kept, so that salient tokens stay under any budget.
        - Distances are between unit vectors: `exp(-d^2)` of raw tokens thousands wide is 0. Of equally dense tokens
          the earlier counts as denser, so that duplicates do not all become peaks.
        - Attention is that inside the tower's blocks of 2 s; the released code's is over the whole audio.
        - An anchor keeps its slot, since the tokens merged into it may lie anywhere in the clip. Without video, the
          tokens most like the anchor are merged.
    """

    config_class: ClassVar[type[CompressorConfig]] = OmniZipConfig
    config: OmniZipConfig
    presets: ClassVar = {"45": {"rho_a": 0.3, "rho_v": 0.6}, "35": {"rho_a": 0.4, "rho_v": 0.7}}
    stage = "joint"
    paper = "2511.14582"
    summary = "audio that the tower attends to, and anchors; where it is dropped, so is video"
    differs = "exact budget; rates normalised by one shift; attention inside blocks of 2 s"

    @property
    def needs(self) -> frozenset[str]:
        """The attention that audio tokens receive."""
        return frozenset({"encoder_attention"})

    def compress(self, stream: TokenStream, context: Context) -> TokenStream:
        """Selects and merges audio, then selects video."""
        scene, totals = read_scene(stream, context, self.name), self.budget(stream.lengths)
        attention = read_attention(stream, context, self.name)
        audio, audio_counts, video, video_counts = modalities(stream, scene)
        audio_budget, video_budget = split_budget(audio_counts, video_counts, totals, self.config.kept)
        anchors = [
            min(math.floor(self.config.contextual_ratio * n + 0.5), kept // 2)
            for n, kept in zip(audio_counts, audio_budget, strict=True)
        ]
        dominant = [kept - a for kept, a in zip(audio_budget, anchors, strict=True)]
        audio, video = (upload(rows, stream.embeds.device) for rows in (audio, video))
        salient = audio[top_k(attention[audio], audio_counts, dominant)]
        rest_counts = [n - s for n, s in zip(audio_counts, dominant, strict=True)]
        taken = torch.zeros_like(stream.slots, dtype=torch.bool).index_fill_(0, salient, True)
        rest = audio[(~taken[audio]).nonzero_static(size=sum(rest_counts)).squeeze(1)]

        places = evenly(rest_counts, anchors)  # of the anchors among the rest
        anchor = rest[upload(places, rest.device)]
        # The other tokens of clips that have anchors are merged or dropped.
        spare = (torch.tensor(anchors) > 0)[clip_ids(rest_counts)].index_fill(0, places, False)
        pool = rest[upload(spare.nonzero().squeeze(1), rest.device)]
        pool_counts = [n - a if a else 0 for n, a in zip(rest_counts, anchors, strict=True)]
        merged = self.merge(stream, (anchor, anchors), (pool, pool_counts), (video, video_counts))
        kept_audio = torch.cat([salient, anchor])
        kept_video = self.select_video(stream, scene, kept_audio, video_budget)
        return merged.select(torch.cat([kept_audio, kept_video]).sort().values, totals)

    def merge(self, stream: TokenStream, anchor: Rows, pool: Rows, video: Rows) -> TokenStream:
        """Merges into each anchor those tokens of the pool that are most like it, the G most related to the video.

        Args:
            stream: of all tokens.
            anchor: where the anchors are.
            pool: where the tokens to merge or drop are, of clips that have anchors.
            video: where the video tokens are.
        """
        (tokens, per_clip), (targets, _) = pool, anchor
        most = min(self.config.neighbours, max(per_clip, default=0))
        if most == 0:
            return stream
        nearest, relation = relate(stream.embeds, anchor, pool, video)
        best_first = relation.argsort(descending=True, stable=True)
        best_first = best_first[nearest[best_first].argsort(stable=True)]  # anchor by anchor
        counts = tally(nearest, len(targets))
        rank = torch.arange(most, device=counts.device)
        chosen = rank < counts[:, None]  # [A, G]
        at = (counts.cumsum(0) - counts)[:, None] + rank
        at = best_first[at.clamp(max=len(tokens) - 1)]
        # An anchor that no token belongs to stays as it is.
        weights = relation[at].masked_fill(~chosen, -torch.inf).softmax(dim=1).masked_fill(~chosen, 0)
        members, own = tokens[at], stream.embeds[targets].float()
        average = (weights[..., None] * stream.embeds[members].float()).sum(dim=1)
        merged = torch.where(chosen[:, :1], (own + average) / 2, own).to(stream.embeds.dtype)
        sizes = stream.sizes[targets] + (stream.sizes[members] * chosen).sum(dim=1)
        return stream.replace(
            embeds=stream.embeds.index_copy(0, targets, merged), sizes=stream.sizes.index_copy(0, targets, sizes)
        )

    @torch.no_grad()
    def select_video(self, stream: TokenStream, scene: Scene, audio: Tensor, budget: Sequence[int]) -> Tensor:
        """Gives which video tokens stay, given the `audio` tokens that do: indices into the stream, int64."""
        clips, config, device = clip_ids(stream.lengths), self.config, stream.embeds.device
        length = config.window_seconds * POSITIONS_PER_SECOND
        window = torch.div(elapsed(stream, scene), length, rounding_mode="floor").long()
        windows, frames = Groups.of(clips, window), Frames.of(scene, clips, window)
        if len(frames.counts) == 0:
            return upload(frames.tokens, device)

        scores, first = frames.change(stream.embeds, scene), frames.ranks % 2 == 0
        rows, counts = first[frames.ids].nonzero().squeeze(1), frames.counts[first].tolist()
        points, real = pad_clips(unit(stream.embeds[upload(frames.tokens[rows], device)]), counts)
        peaks = unpad_clips(density_peaks(points, real, config.density_neighbours), counts)
        scores.index_copy_(0, upload(rows, device), peaks)

        def per_window(tokens: Tensor) -> Tensor:
            return per_group(windows.ids[tokens], len(windows.counts))

        heard = per_window(audio.cpu())  # all that the budgets need to know of the choice, and wait for
        video, retention = per_window(scene.is_video), heard / per_window(~scene.is_video)
        of_window, frame_counts = clips[windows.firsts], per_window(frames.heads).tolist()
        rates = prune_rates(config, retention, video, of_window, budget)
        dealt = largest_remainder(video * (1 - rates), video, per_group(of_window, len(budget)).tolist(), budget)
        dealt = largest_remainder(frames.counts, frames.counts, frame_counts, dealt)
        return upload(frames.tokens, device)[top_k(scores, frames.counts.tolist(), dealt)]


@torch.no_grad()
def relate(embeds: Tensor, anchor: Rows, pool: Rows, video: Rows) -> tuple[Tensor, Tensor]:
    """Gives for every token of the pool the most similar anchor of its clip, and its relation to the video.

    The relation is the greatest cosine to a video token of the clip; without video, the cosine to the anchor.

    Returns:
        `[P]` int64, which of the anchors, and `[P]` float32.
    """
    nearest, likeness = most_alike(embeds, *pool, *anchor)
    _, relation = most_alike(embeds, *pool, *video)
    # of a NaN, which is told of later, none may be found
    number = torch.searchsorted(anchor[0], nearest).clamp(max=len(anchor[0]) - 1)
    return number, torch.where(relation == -torch.inf, likeness, relation)


def prune_rates(
    config: OmniZipConfig, retention: Tensor, video: Tensor, clips: Tensor, budget: Sequence[int]
) -> Tensor:
    """Gives the share of each window's video to prune; over a clip they come to what its budget asks for.

    Args:
        config: of the method.
        retention: `[W]`, the share of the window's audio that is kept; NaN where there is none.
        video: `[W]` int64, video tokens of the window.
        clips: `[W]` int64, ascending.
        budget: video tokens to keep per clip.

    Returns:
        `[W]` float64.
    """
    count, guided = len(budget), ~retention.isnan()
    totals = torch.bincount(clips, video.double(), minlength=count)
    wanted = (1 - torch.tensor(budget, dtype=torch.double) / totals.clamp(min=1))[clips]
    lowest = torch.full_like(wanted, config.rho_min).masked_fill(wanted < config.rho_min, 0)
    highest = torch.full_like(wanted, config.rho_max).masked_fill(wanted > config.rho_max, 1)
    start = config.rho_max - (config.rho_max - config.rho_min) * retention.double().nan_to_num()

    def at(shift: Tensor) -> Tensor:
        return torch.where(guided, (start + shift[..., clips]).clamp(lowest, highest), wanted)

    # The shift lies between -1 and 1. Each round tries 65 evenly spaced ones and goes on between the two next to it.
    below, parts = torch.full((count,), -1.0, dtype=torch.double), torch.arange(65, dtype=torch.double)[:, None]
    for digit in range(9):
        shifts = below + parts * 2 / 64 ** (digit + 1)  # [65, C]
        excess = torch.zeros_like(shifts).index_add_(1, clips, video * (at(shifts) - wanted))
        last = (excess <= 0).sum(dim=0).sub(1).clamp(0, 63)  # that is not too high
        below = shifts.gather(0, last[None])[0]
    return at(below)


@torch.no_grad()
def density_peaks(points: Tensor, real: Tensor, k: int) -> Tensor:
    """Scores points by density peaks: the log of density times distance to the nearest denser point.

    Args:
        points: `[F, n, D]` float32.
        real: `[F, n]` bool, which of them there are.
        k: neighbours that count for the density.

    Returns:
        `[F, n]` float32; -inf at duplicates of an earlier point.
    """
    n = points.shape[1]
    # not by matrix products: equal points are at distance 0 exactly, whatever else is in the batch
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    index = torch.arange(n, device=points.device)
    other = (index[:, None] != index) & real[:, None, :]  # [F, n, n]
    padded = functional.pad(distance.masked_fill(~other, torch.inf), (0, k), value=torch.inf)
    near = padded.topk(k, largest=False).values.square()  # [F, n, k]
    spread = near.masked_fill(near.isinf(), 0).sum(dim=-1) / near.isfinite().sum(dim=-1).clamp(min=1)

    here, there = spread[:, :, None], spread[:, None, :]
    denser = ((there < here) | ((there == here) & (index < index[:, None]))) & other
    gap = distance.masked_fill(~denser, torch.inf).amin(dim=-1)
    farthest = distance.masked_fill(~other, 0).amax(dim=-1)  # of the densest point, which has no denser one
    return torch.where(gap.isinf(), farthest, gap).log() - spread
