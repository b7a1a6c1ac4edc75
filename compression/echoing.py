"""EchoingPixels: audio and video read each other and the prompt, and the best of both together stay."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..kernels import clip_ids, pad_clips, segment_softmax, top_k, unpad_clips, upload
from .base import (
    Compressor,
    CompressorConfig,
    Context,
    LLMShape,
    Prompt,
    Scene,
    Sizes,
    check_choice,
    check_count,
    check_finite,
    check_flag,
    check_number,
)
from .budget import largest_remainder
from .cs2 import CS2
from .registry import register
from .scenes import POSITIONS_PER_SECOND, Groups, elapsed, modalities, per_group, read_scene, split_budget
from .stream import TokenStream

SYNC_SECTIONS = (18, 18, 18, 10)  # time, height, width and time again, of the 64 channels of a head (released code)


@dataclass(frozen=True)
class EchoingConfig(CompressorConfig):
    """Options of `Echoing`.

    Args:
        keep_ratio: tokens out / tokens in, over audio and video together.
        layers: of CS2. 4 in the released recipe, 1 in the released code's default.
        budget: "single-pool" keeps the best of a whole sample; "per-window" gives every span of time its own
            number of audio and of video tokens, in proportion to what it has, and keeps the best of each (ours).
        window_seconds: of a span, from the sample's first token on.
        audio_weight: per window, how many times as large a share of the audio is kept as of the video.
        temperature: of the softmax over scores through which the gradient flows.
        gumbel: whether Gumbel noise is added to the scores in training.
        sync_rope: whether time also gets the slowest rotary channels, here and in the LLM, which must be trained for
            it: all its layers see other angles.
    """

    keep_ratio: float = 0.2
    layers: int = 4
    budget: Literal["single-pool", "per-window"] = "single-pool"
    window_seconds: float = 2.0
    audio_weight: float = 1.0
    temperature: float = 1.0
    gumbel: bool = False
    sync_rope: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("layers", self.layers)
        check_choice("budget", self.budget, ("single-pool", "per-window"))
        for option in ("window_seconds", "audio_weight", "temperature"):
            check_number(option, getattr(self, option), "(0, inf)")
        check_flag("gumbel", self.gumbel)
        check_flag("sync_rope", self.sync_rope)
        if self.budget == "single-pool" and self.audio_weight != 1:
            raise ValueError(f"audio_weight needs budget='per-window', got {self.audio_weight} with a single pool")


@register("echoing")
class Echoing(Compressor):
    """Lets audio, video and prompt of a sample read one another, scores audio and video, and keeps the best of both.

    1. CS2, a trained copy of the LLM's first layers without their causal mask, at the original positions:
       `h = CS2([prompt; audio; video])`. The LLM reads h in place of the embeddings, at the prompt as well.
    2. `score = w SiLU(Linear(RMSNorm(h)))` for every audio and video token; the best `budget` of a sample stay.
    3. Straight through: `soft = softmax(score / temperature)` over the sample's audio and video tokens; a kept h is
       multiplied by `1 + soft - soft.detach()`, which is 1, so that scores learn from the loss of the LLM alone. What
       is dropped is dropped: its score learns through the softmax's sum.

    Paper: "EchoingPixels: Cross-Modal Adaptive Token Reduction for Efficient Audio-Visual LLMs", arXiv 2512.10324; at
    ICML 2026 "Aliasing-Resistant Joint Token Reduction for Audio-Visual LLMs".

    Differs from the paper:
        - The budget is rounded half up, the paper's is `ceil(keep_ratio * tokens)`.
        - The score has no bias, which would shift all scores of a sample alike and never learn.
        - Sync-RoPE is an option (the preset `sync-rope`); for other sizes of head its sections are scaled.
        - In a batch with samples that are text alone the released code contextualises those too; ours leaves them.
        - `budget="per-window"` is ours: the softmax then runs over each span's audio and each span's video.
    """

    config_class: ClassVar[type[CompressorConfig]] = EchoingConfig
    config: EchoingConfig
    presets: ClassVar = {"per-window": {"budget": "per-window"}, "sync-rope": {"sync_rope": True}}
    stage = "joint"
    trained = True
    query_aware = True
    paper = "2512.10324"
    summary = "a bidirectional copy of the LLM's first layers, then the best of audio and video"
    differs = "Sync-RoPE is optional; budget rounded half up; no bias on the score"

    def __init__(self, config: CompressorConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        shape = sizes.llm
        if shape is None:
            fields = ", ".join(f.name for f in dataclasses.fields(LLMShape))
            raise ValueError(f"{self.name} has layers like the LLM's and needs llm, its shape (LLMShape: {fields})")
        if sum(shape.rope_sections) * 2 != shape.head_size or shape.heads % shape.kv_heads:
            raise ValueError(
                f"{self.name}: rope_sections must sum to half of head_size and kv_heads must divide heads, got {shape}"
            )
        width = sizes.hidden_size
        self.cs2 = CS2(width, shape, self.config.layers, self.rope_sections or shape.rope_sections)
        self.scorer = nn.Sequential(nn.RMSNorm(width, eps=shape.norm_eps), nn.Linear(width, width), nn.SiLU())
        self.score = nn.Linear(width, 1, bias=False)

    @property
    def needs(self) -> frozenset[str]:
        """The rest of the sample."""
        return frozenset({"prompt"})

    @property
    def rope_sections(self) -> tuple[int, ...] | None:
        """Sync-RoPE's time, height, width and time again, scaled to the LLM's heads."""
        if not self.config.sync_rope or self.sizes.llm is None:
            return None
        half, whole = self.sizes.llm.head_size // 2, sum(SYNC_SECTIONS)
        channels = [share * half // whole for share in SYNC_SECTIONS]
        lost = sorted(range(len(channels)), key=lambda i: -(SYNC_SECTIONS[i] * half % whole))
        for i in lost[: half - sum(channels)]:  # those that rounding down cost most; of equal ones the first
            channels[i] += 1
        return tuple(channels)

    def initialize(self, language_model: nn.Module) -> None:
        """Copies the LLM's first layers; raises ValueError if it has fewer."""
        theirs = list(language_model.layers)  # type: ignore[arg-type]
        if len(theirs) < len(self.cs2.layers):
            raise ValueError(f"{self.name} has {len(self.cs2.layers)} layers, but the LLM only {len(theirs)} to copy")
        for mine, its in zip(self.cs2.layers, theirs, strict=False):
            mine.load_state_dict(its.state_dict())

    def compress(self, stream: TokenStream, context: Context) -> TokenStream:
        """Contextualises and selects."""
        scene = read_scene(stream, context, self.name)
        hidden, prompt = self.contextualise(stream, scene, self.read_prompt(stream, context))
        pools, budget = self.pools(stream, scene)
        counts, order = (upload(x, hidden.device) for x in (pools.counts, pools.order))
        # not a matrix product, which autocast would take in bf16
        scores = (self.scorer(hidden).float() * self.score.weight.float()).sum(dim=1)
        logits = scores[order]  # pool by pool
        if self.config.gumbel and self.training:
            logits = logits - torch.empty_like(logits).exponential_().log()
        soft = segment_softmax(logits / self.config.temperature, counts)
        picks = top_k(logits.detach(), pools.counts.tolist(), budget)
        index, rank = order[picks].sort()
        gate = (1 + (soft - soft.detach()))[picks[rank]]  # exactly 1
        kept = stream.select(index, self.budget(stream.lengths))
        return kept.replace(embeds=hidden[index] * gate[:, None], prompt=prompt)

    def read_prompt(self, stream: TokenStream, context: Context) -> Prompt:
        """Gives the prompt; raises ValueError if it does not fit the stream or is not finite."""
        prompt: Prompt = context.require("prompt", self.name)
        embeds, samples = prompt.stream.embeds, len(prompt.stream.lengths)
        wanted = (len(stream.lengths), self.hidden_size, (3, len(embeds)))
        got = (samples, embeds.shape[1], tuple(prompt.positions.shape))
        if got != wanted:
            raise ValueError(
                f"{self.name}: prompt must be of {wanted[0]} samples, of width {wanted[1]} and with positions "
                f"{list(wanted[2])}, got {got[0]} samples, width {got[1]} and positions {list(got[2])}"
            )
        check_finite(prompt.stream, self.name, "prompt")
        return prompt

    def contextualise(self, stream: TokenStream, scene: Scene, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """Runs CS2 over every sample: gives the stream's states `[N, D]` and the prompt's `[T, D]`.

        The prompt comes first and the rest after it, whatever their order in the sequence: without a causal mask the
        positions alone say where a token is.
        """
        if not len(stream.embeds):
            return stream.embeds, prompt.stream.embeds
        prompts, device = prompt.stream, stream.embeds.device
        text, read = pad_clips(prompts.embeds.to(stream.embeds.dtype), prompts.lengths)
        media, real = pad_clips(stream.embeds, stream.lengths)
        places = [
            pad_clips(prompt.positions.T, prompts.lengths)[0],
            pad_clips(upload(scene.positions.T, device), stream.lengths)[0],
        ]
        positions = torch.cat(places, dim=1).movedim(-1, 0)  # [3, B, L]
        whole = len({*prompts.lengths}) == len({*stream.lengths}) == 1
        hidden = self.cs2(torch.cat([text, media], dim=1), positions, None if whole else torch.cat([read, real], dim=1))
        text, media = hidden.split([read.shape[1], real.shape[1]], dim=1)
        heard = torch.tensor(stream.lengths)[clip_ids(prompts.lengths)] > 0  # samples of text alone stay as they are
        text = torch.where(upload(heard, device)[:, None] > 0, unpad_clips(text, prompts.lengths), prompts.embeds)
        return unpad_clips(media, stream.lengths), text.to(prompts.embeds.dtype)

    def pools(self, stream: TokenStream, scene: Scene) -> tuple[Groups, tuple[int, ...]]:
        """Gives who competes with whom, and how many of each pool stay."""
        totals = self.budget(stream.lengths)
        if self.config.budget == "single-pool":
            return Groups.of(clip_ids(stream.lengths)), tuple(total for total in totals if total)
        audio, video = modalities(stream, scene)[1::2]
        split = split_budget(audio, video, totals, (self.config.audio_weight, 1))
        span = elapsed(stream, scene) // (POSITIONS_PER_SECOND * self.config.window_seconds)  # [N]
        clips = clip_ids(stream.lengths)
        pools = Groups.of(clips, scene.is_video.long(), span)
        kind = 2 * clips + scene.is_video
        per_kind = per_group(kind[pools.firsts], 2 * len(totals)).tolist()
        dealt = [count for both in zip(*split, strict=True) for count in both]  # a sample's audio, then its video
        return pools, largest_remainder(pools.counts, pools.counts, per_kind, dealt)
