"""OmniSIFT: the video that changes stays, and says by cross-attention which audio stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kernels import clip_ids, pad_clips, segment_mean, top_k, unpad_clips, upload
from .base import Compressor, CompressorConfig, Context, Scene, Sizes, check_count
from .budget import largest_remainder
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

CHUNK = 2 * POSITIONS_PER_SECOND  # the paper's pair of frames lasts 2 s


@dataclass(frozen=True)
class OmniSIFTConfig(SceneConfig):
    """Options of `OmniSIFT`.

    Args:
        keep_ratio: tokens out / tokens in, over audio and video together; see `SceneConfig`.
        rho_a: share of the audio tokens to drop.
        rho_v: share of the video tokens to drop.
        width: of the cross-attention.
        heads: of the cross-attention.
    """

    usual_rates: ClassVar = (0.5, 0.8)

    width: int = 512
    heads: int = 8

    def __post_init__(self) -> None:
        check_count("width", self.width, least=2)
        check_count("heads", self.heads)
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {self.heads}")
        super().__post_init__()


@register("omnisift")
class OmniSIFT(Compressor):
    """Drops repeated video by similarity, then lets what is left of it score the audio of the same time.

    Paper: "OmniSIFT: Modality-Asymmetric Token Compression for Efficient Omni-modal Large Language Models", arXiv
    2602.04804.

    1. Video: two consecutive frames are a chunk. The first drops the tokens most like its mean, the second those
       most like the same place in the whole first frame (cosine); an odd last frame is a first one.
    2. Audio of the chunk's time: with queries a from the audio, keys and values v from the chunk's remaining video,
       the score of a token is `s = sigmoid(MLP(LayerNorm(a + attention(a, v))))`. The best of the chunk stay.
    3. Straight through: a kept audio token is multiplied by `1 + s - s.detach()`, which is 1, so that scores learn.

    Differs from the paper:
        - The budget is exact: frames and chunks get whole numbers by largest remainder. `SceneConfig` says how audio
          and video share it in a sample that is not the paper's mix.
        - Places are matched by height and width, so that frames may differ in size; a new place counts as a change.
        - The last chunk of a video lasts as long as the one before it. Audio outside all chunks, in spans of 2 s, and
          audio of a chunk that keeps no video is scored without attention: `attention(a, v) = 0`.
    """

    config_class: ClassVar[type[CompressorConfig]] = OmniSIFTConfig
    config: OmniSIFTConfig
    presets: ClassVar = {"36": {"rho_a": 0.3, "rho_v": 0.7}, "24": {"rho_a": 0.5, "rho_v": 0.8}}
    stage = "joint"
    trained = True
    paper = "2602.04804"
    summary = "video that changes; what is kept of it scores the audio by cross-attention"
    differs = "exact budget; audio without video is scored alone"

    def __init__(self, config: CompressorConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        width = self.config.width
        self.project_audio = nn.Sequential(nn.Linear(sizes.hidden_size, width), nn.LayerNorm(width))
        self.project_video = nn.Sequential(nn.Linear(sizes.hidden_size, width), nn.LayerNorm(width))
        self.attention = nn.MultiheadAttention(width, self.config.heads, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Sequential(nn.Linear(width, width // 2), nn.SiLU())
        self.logit = nn.Linear(width // 2, 1)

    def compress(self, stream: TokenStream, context: Context) -> TokenStream:
        """Selects video, then audio."""
        scene, totals = read_scene(stream, context, self.name), self.budget(stream.lengths)
        audio, audio_counts, _, video_counts = modalities(stream, scene)
        audio_budget, video_budget = split_budget(audio_counts, video_counts, totals, self.config.kept)
        clips, device = clip_ids(stream.lengths), stream.embeds.device
        frames = Frames.of(scene, clips)
        spans = find_spans(stream, scene, frames)
        counts = per_group(spans.ids[audio], len(spans.counts))
        audio = upload(audio[spans.ids[audio].argsort(stable=True)], device)  # span by span

        per_clip = per_group(clips[frames.heads], len(totals)).tolist()
        dealt = largest_remainder(frames.counts, frames.counts, per_clip, video_budget)
        video = select_video(stream, scene, frames, dealt)
        # How many of each frame stay says how many of each span do, and in which order they are span by span.
        span = spans.ids[frames.heads].repeat_interleave(torch.tensor(dealt, dtype=torch.long))
        by_span = video[upload(span.argsort(stable=True), device)]
        answers = per_group(span, len(spans.counts))
        logits = self.score(stream.embeds[audio], counts.tolist(), stream.embeds[by_span], answers.tolist())

        per_clip = per_group(clips[spans.firsts], len(totals)).tolist()
        dealt = largest_remainder(counts, counts, per_clip, audio_budget)
        picks = top_k(logits.detach(), counts.tolist(), dealt)
        audio, score = audio[picks], logits[picks].sigmoid()
        gate = (1 + (score - score.detach())).to(stream.embeds.dtype)  # exactly 1
        embeds = stream.embeds.index_copy(0, audio, stream.embeds[audio] * gate[:, None])
        return stream.replace(embeds=embeds).select(torch.cat([audio, video]).sort().values, totals)

    def score(self, audio: Tensor, counts: Sequence[int], video: Tensor, answers: Sequence[int]) -> Tensor:
        """Scores audio tokens by the video tokens of their span.

        Args:
            audio: `[A, D]`, span by span.
            counts: audio tokens per span, S numbers that sum to A.
            video: `[V, D]`, what is kept of it, span by span.
            answers: video tokens per span, S numbers that sum to V.

        Returns:
            `[A]` float32, before the sigmoid.
        """
        queries, keys = self.project_audio(audio), self.project_video(video)
        attended = torch.zeros_like(queries)
        meet = [a > 0 and v > 0 for a, v in zip(counts, answers, strict=True)]
        if any(meet):
            asking, answering = (
                upload(torch.tensor(meet)[clip_ids(x)].nonzero().squeeze(1), queries.device) for x in (counts, answers)
            )
            asked, answered = ([n for n, both in zip(x, meet, strict=True) if both] for x in (counts, answers))
            query, _ = pad_clips(queries[asking], asked)
            key, real = pad_clips(keys[answering], answered)
            found, _ = self.attention(query, key, key, key_padding_mask=~real, need_weights=False)
            attended = attended.index_copy(0, asking, unpad_clips(found, asked).to(attended.dtype))
        found = self.head(self.norm(queries + attended)).float()
        # not a matrix product, which autocast would take in bf16, where many scores are equal
        return (found * self.logit.weight.float()).sum(dim=1) + self.logit.bias.float()


@torch.no_grad()
def select_video(stream: TokenStream, scene: Scene, frames: Frames, budget: Sequence[int]) -> Tensor:
    """Gives the video tokens that stay, `budget` per frame: those unlike their frame's mean, or the frame before.

    Returns:
        `[M]` int64, frame by frame.
    """
    device = stream.embeds.device
    tokens, ids, counts = (upload(x, device) for x in (frames.tokens, frames.ids, frames.counts))
    scores, embeds = frames.change(stream.embeds, scene), stream.embeds[tokens]
    means = unit(segment_mean(embeds.float(), torch.ones_like(scores), counts))
    rows = upload((frames.ranks % 2 == 0)[frames.ids].nonzero().squeeze(1), device)
    scores.index_copy_(0, rows, (unit(embeds[rows]) - means[ids[rows]]).square().sum(dim=1))
    return tokens[top_k(scores, frames.counts.tolist(), budget)]


def find_spans(stream: TokenStream, scene: Scene, frames: Frames) -> Groups:
    """Groups all tokens, in time order, by the chunk of video that they are part of or sound with; on the CPU.

    A chunk lasts until the next one begins; the last of a video as long as the one before, or 2 s if it is the only
    one, unless another video begins earlier. What sounds outside all chunks is grouped by spans of 2 s.
    """
    clips, time = clip_ids(stream.lengths), elapsed(stream, scene)
    chunks = Groups.of(frames.runs, frames.ranks // 2)
    heads, run = frames.heads[chunks.firsts], frames.runs[chunks.firsts]
    begin = time[heads]
    to_next = torch.where(run.diff(append=run[-1:]) == 0, begin.diff(append=begin[-1:]), 0)
    to_last = torch.where(run.diff(prepend=run[:1]) == 0, begin.diff(prepend=begin[:1]), 0)
    length = torch.where(to_next > 0, to_next, torch.where(to_last > 0, to_last, CHUNK))

    # Clip and time in one number, to find the last chunk that began; a row before all others stands for none.
    starts, order = ((clips[heads] << 32) + begin).sort(stable=True)
    stops = functional.pad(starts + length[order], (1, 0), value=-1)
    starts, order = (functional.pad(x, (1, 0), value=-1) for x in (starts, order))
    now = (clips << 32) + time
    at = torch.searchsorted(starts, now, right=True) - 1
    chunk = torch.where(now < stops[at], order[at], -1)
    chunk[frames.tokens] = chunks.ids[frames.ids]
    since = torch.where(chunk < 0, time // CHUNK * CHUNK, functional.pad(begin, (0, 1))[chunk])
    return Groups.of(clips, since, chunk)
