"""The case table: every method and preset that the contract is checked on. A new method adds its rows here."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from audiopress import Compressor, Context, TokenStream, build
from audiopress.compression.base import LLMShape, Prompt, Scene

HIDDEN_SIZE, ENCODER_SIZE = 12, 8
LLM = LLMShape(heads=3, kv_heads=1, head_size=4, mlp_size=16, rope_theta=1e4, rope_sections=(1, 1, 0))
HIDDEN = frozenset({"encoder_hidden"})
SEED = frozenset({"seed"})
KEYS = frozenset({"encoder_keys"})
ATTENTION = frozenset({"encoder_attention"})


@dataclasses.dataclass(frozen=True)
class Case:
    """One row.

    Args:
        name: as `build` takes it.
        options: of the method; small widths, so that the suite is quick.
        needs: what the method must say it reads.
        covers: whether it merges all tokens, so that sizes sum to the clip's length.
        compares: whether it chooses by comparing numbers, so that bf16 may choose otherwise than float32.
    """

    name: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    needs: frozenset[str] = frozenset()
    covers: bool = True
    compares: bool = False

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])

    def build(self, **options: Any) -> Compressor:
        """Builds it with the same weights on every call."""
        torch.manual_seed(0)
        sizes = {"hidden_size": HIDDEN_SIZE, "encoder_size": ENCODER_SIZE, "llm": LLM}
        return build(self.name, **sizes, **self.options | options).eval()


MLP = {"mlp_size": 16}
PARTS = {"norm_preserving": True, "proportional_attention": True}
REFINED = {"width": 8, "heads": 2, "layers": 1}
OSUM = {"ffn_size": 16}
SIFT = {"width": 8, "heads": 2}
QFORMER = {"width": 12, "heads": 2, "ffn_size": 16}
SHORT_STEPS = {"step": 5, "windows": ((10, 2), (20, 4))}  # at 50 per second: 0.1 s
ASKED, FIRST_LAYER, PROMPT = (frozenset({need}) for need in ("question", "first_layer", "prompt"))

ALL_CASES = [
    Case("none"),
    Case("random", {"keep_ratio": 0.8}, SEED, covers=False),
    Case("random", {"keep_ratio": 0.1}, SEED, covers=False),
    Case("uniform-stride", {"keep_ratio": 0.8}, covers=False),
    Case("uniform-stride", {"keep_ratio": 0.1}, covers=False),
    Case("stacking", {"keep_ratio": 0.5, **MLP}),
    Case("stacking", {"k": 10, "norm": True, **MLP}),
    Case("stacking", {"k": 3, "tail": "drop", **MLP}, covers=False),
    Case("stacking", {"k": 4, "combine": "mean", **MLP}),
    Case("stacking", {"source": "hidden", "k": 2, **MLP}, HIDDEN),
    Case("stacking:slam-asr", MLP, HIDDEN),
    Case("stacking:slam-asr", {"tail": "drop", **MLP}, HIDDEN, covers=False),
    Case("stacking:llama-omni", MLP, HIDDEN),
    Case("stacking:llama-avsr", MLP, HIDDEN),
    Case("stacking:llama-avsr", {"combine": "mean", "k": 4, "norm": True, **MLP}, HIDDEN),
    Case("pooling", {"keep_ratio": 0.7}),
    Case("pooling", {"keep_ratio": 0.1, "kind": "max"}),
    Case("pooling", {"keep_ratio": 0.3, "kind": "attentive"}),
    Case("pooling", {"k": 3}),
    Case("pooling", {"k": 5, "tail": "drop", "kind": "max"}, covers=False),
    Case("pooling", {"keep_ratio": 0.3, "source": "hidden"}, HIDDEN),
    Case("pooling", {"keep_ratio": 0.4, **PARTS}),
    Case("pooling:qwen2-audio", {}, HIDDEN),
    Case("pooling:qwen2-audio", {"k": 5, "kind": "attentive"}, HIDDEN),
    Case("pooling:qwen2.5-omni"),
    Case("conv"),
    Case("conv", {"keep_ratio": 1 / 6}),
    Case("conv:speechverse", {}, HIDDEN),
    Case("conv:speechverse", {"source": "tokens", "keep_ratio": 0.25, "activation": "gelu"}),
    Case("conv:osum", OSUM, HIDDEN),
    Case("conv:osum", {"keep_ratio": 0.25, **OSUM}, HIDDEN),
    Case("conv:lucy"),
    Case("conv:lucy", {"source": "hidden", "keep_ratio": 0.4}, HIDDEN),
    Case("echoing", {"keep_ratio": 0.6, "layers": 1}, PROMPT, covers=False, compares=True),
    Case("echoing", {"layers": 2, "gumbel": True, "temperature": 0.5}, PROMPT, covers=False, compares=True),
    Case("echoing:per-window", {"window_seconds": 0.4, "layers": 1}, PROMPT, covers=False, compares=True),
    Case("echoing:per-window", {"layers": 1, "audio_weight": 3}, PROMPT, covers=False, compares=True),
    Case("echoing:sync-rope", {}, PROMPT, covers=False, compares=True),
    Case("speechprune", {"keep_ratio": 0.6}, ASKED | FIRST_LAYER, covers=False, compares=True),
    Case("speechprune", {"keep_ratio": 0.1, "phase1_share": 0.3}, ASKED | FIRST_LAYER, covers=False, compares=True),
    Case("speechprune:spiral", {}, ASKED | FIRST_LAYER, covers=False, compares=True),
    Case("speechprune:phase-1", {}, ASKED, covers=False, compares=True),
    Case("speechprune:phase-2", {}, FIRST_LAYER, covers=False, compares=True),
    Case("atome:encoder", {"layers": 2}, KEYS),
    Case("atome", {"stage": "encoder", "layers": (0,), "keep_ratio": 0.2, "pairs": "all-adjacent", "average": "plain"}),
    Case("atome", {"stage": "encoder", "layers": 1, "threshold": 0.1, "proportional_attention": True}),
    Case("atome:encoder", {"layers": 2, **PARTS}, KEYS),
    Case("atome", compares=True),
    Case("atome", {"keep_ratio": 0.1, "proportional_attention": True}, compares=True),
    Case("atome", {"keep_ratio": 0.2, **PARTS}, compares=True),
    Case("atome", {"keep_ratio": 0.3, "metric": "keys", "pairs": "all-adjacent"}, KEYS, compares=True),
    Case("atome", {"keep_ratio": 0.6, "metric": "keys", "key_heads": 2, "average": "plain"}, KEYS, compares=True),
    Case("atome", {"threshold": 0.1, "keep_ratio": 0.9}, compares=True),
    Case("atome", {"threshold": 0.2, "pairs": "all-adjacent", "rounds": 3}, compares=True),
    Case("fastadasp", {}, KEYS | ATTENTION, compares=True),
    Case("fastadasp", {"keep_ratio": 0.1, "metric": "features", "weights": "none"}, compares=True),
    Case("fastadasp", {"keep_ratio": 0.3, **PARTS}, KEYS | ATTENTION, compares=True),
    Case("affinity", compares=True),
    Case("affinity", {"threshold": 0.1, "window": 3}, compares=True),
    Case("affinity", {"keep_ratio": 0.2, "window": 2, "metric": "keys"}, KEYS, compares=True),
    Case("affinity", {"keep_ratio": 0.3, **PARTS}, compares=True),
    Case("affinity:aggressive", compares=True),
    Case("affinity:conservative", {"keep_ratio": 0.3}, compares=True),
    Case("fastlongspeech", compares=True),
    Case("fastlongspeech", {"keep_ratio": 0.1, "weights": "none", "average": "size"}, compares=True),
    Case("fastlongspeech", {"keep_ratio": 0.3, **PARTS}, compares=True),
    Case("fastlongspeech:l400", {"metric": "keys"}, KEYS, compares=True),
    Case("fastlongspeech:l200", compares=True),
    Case("qformer", QFORMER),
    Case("qformer", {"keep_ratio": 0.25, "positions": True, "causal": True, **QFORMER}),
    Case("qformer", {"windows": ((6, 2), (12, 4)), "diversity": 0.1, "tail": "drop", **QFORMER}, covers=False),
    Case("qformer:salmonn", {"tail": "keep", **QFORMER}, HIDDEN),
    Case("qformer:salmonn", {"windows": ((3, 1),), **QFORMER}, HIDDEN, covers=False),
    Case("qformer:salmonn", QFORMER, HIDDEN, covers=False),
    Case("qformer:favor", QFORMER, HIDDEN),
    Case("qformer:mrc", QFORMER, HIDDEN),
    Case("qformer:mrc", {"video": "read", "picture_size": 3, **SHORT_STEPS, **QFORMER}, HIDDEN | {"video"}),
    Case("qformer:mrc-released", QFORMER, HIDDEN),
    Case("qformer:mrc-three-level", QFORMER, HIDDEN),
    Case("qformer:mms-llama", QFORMER, HIDDEN, compares=True),
    Case("qformer:mms-llama", {"speech_rate": False, "windows": ((6, 2),), **QFORMER}, HIDDEN),
    Case("qformer:granite-window", QFORMER, HIDDEN),
    Case("keep-all-audio", {"keep_ratio": 0.8}, covers=False),
    Case("keep-all-audio", {"keep_ratio": 0.1}, covers=False),
    Case("omnizip", {"keep_ratio": 0.7}, ATTENTION, covers=False, compares=True),
    Case("omnizip", {"keep_ratio": 0.1, "window_seconds": 0.5}, ATTENTION, covers=False, compares=True),
    Case("omnizip:45", {"contextual_ratio": 0.2}, ATTENTION, covers=False, compares=True),
    Case("omnizip:35", {}, ATTENTION, covers=False, compares=True),
    Case("omnisift", {"keep_ratio": 0.7, **SIFT}, covers=False, compares=True),
    Case("omnisift:24", SIFT, covers=False, compares=True),
    Case("omnisift:36", SIFT, covers=False, compares=True),
    Case("attention-topk:topk-ast", {"layers": 2}, ATTENTION, covers=False),
    Case("attention-topk:topk-ast", {"layers": [1], "keep_ratio": 0.6}, ATTENTION, covers=False),
    Case("attention-topk", {"keep_ratio": 0.6}, ATTENTION, covers=False),
    Case(
        "attention-topk", {"keep_ratio": 0.1, "segments": 3, "contextual_ratio": 0.5}, ATTENTION | KEYS, compares=True
    ),
    Case("attention-topk:last-layer", {}, ATTENTION, covers=False),
    Case("attention-topk:segmentwise", {}, ATTENTION, covers=False),
    Case("attention-topk:visionzip-om", {}, ATTENTION | KEYS, compares=True),
    Case(
        "attention-topk", {"keep_ratio": 0.2, "contextual_ratio": 0.3, "key_heads": 2}, ATTENTION | KEYS, compares=True
    ),
    Case("divprune", {"keep_ratio": 0.6}, covers=False, compares=True),
    Case("divprune", {"keep_ratio": 0.1}, covers=False, compares=True),
    Case("cdpruner", {"keep_ratio": 0.6}, ASKED, covers=False, compares=True),
    Case("cdpruner", {"keep_ratio": 0.1}, ASKED, covers=False, compares=True),
    Case("cdpruner:unconditional", covers=False, compares=True),
    Case("cdpruner:attention", {}, ATTENTION, covers=False, compares=True),
    Case("dart", {"keep_ratio": 0.6}, covers=False, compares=True),
    Case("dart", {"keep_ratio": 0.1, "pivots": 1}, covers=False, compares=True),
    Case("dart:text", {}, ASKED, covers=False, compares=True),
    Case("sa-map", {"keep_ratio": 0.6}, ATTENTION, covers=False, compares=True),
    Case("sa-map", {"keep_ratio": 0.1, "threshold": -0.1, "max_group": 4}, ATTENTION, covers=False, compares=True),
    Case("sa-map", {"keep_ratio": 0.9, "threshold": -1.0}, ATTENTION, covers=False, compares=True),
    Case("pooling+stacking", {"pooling": {"keep_ratio": 0.6}, "stacking": {"k": 3, **MLP}}),
    Case("conv:osum+uniform-stride", {"conv": OSUM, "uniform-stride": {"keep_ratio": 0.3}}, HIDDEN, covers=False),
    Case("ward:encoder", {"keep_ratio": 0.3}),
    Case("ward", {"stage": "encoder", "weights": "attention"}, ATTENTION),
    Case("ward", {"stage": "encoder", "layers": [1], "weights": "attention", "segmentation": "exact"}, ATTENTION),
    Case("ward", {"keep_ratio": 0.5}, compares=True),
    Case("ward", {"segmentation": "greedy"}, compares=True),
    Case("ward", {"keep_ratio": 0.1, "norm_preserving": False, "normalize": True}, compares=True),
    Case("ward", {"weights": "attention"}, frozenset({"encoder_attention"}), compares=True),
    Case("ward:exact", compares=True),
    Case("ward:exact", {"max_segment": 3, "proportional_attention": False}, compares=True),
    Case("ward-refined", REFINED, compares=True),
    Case("ward-refined", {"keep_ratio": 0.5, "points": 3, **REFINED}, compares=True),
    Case("ward-refined:even", {"keep_ratio": 0.3, **REFINED}),
    Case("ward+stacking", {"ward": {"keep_ratio": 0.6}, "stacking": {"k": 3, **MLP}}, compares=True),
]
# Methods between tower and LLM, and those inside the tower, which have a suite of their own.
CASES = [case for case in ALL_CASES if case.build().stage != "encoder"]
ENCODER_CASES = [case for case in ALL_CASES if case.build().stage == "encoder"]


def make_stream(lengths: Sequence[int], seed: int = 0) -> TokenStream:
    """Random tokens."""
    return make_inputs(lengths, seed)[0]


def make_context(lengths: Sequence[int], seed: int = 0) -> Context:
    """Everything a method may read."""
    return make_inputs(lengths, seed)[1]


def make_inputs(lengths: Sequence[int], seed: int = 0) -> tuple[TokenStream, Context]:
    """Random tokens and everything a method may read of them."""
    return join([make_clip(n, seed, i) for i, n in enumerate(lengths)])


def make_clip(n: int, seed: int = 0, number: int = 0) -> tuple[TokenStream, Context]:
    """One clip of `n` tokens; the tower gives every second clip its odd trailing state.

    As a joint stream, each second third of its tokens are video, frames of four tokens, two by two.
    """
    generator = torch.Generator().manual_seed(1000 * seed + number)

    def random(rows: int, width: int) -> TokenStream:
        return TokenStream(torch.randn(rows, width, generator=generator), (rows,))

    states, words, frames = 2 * n + number % 2, 3 + number % 3, 2 + number % 4
    slots = torch.arange(n)
    is_video = slots // 4 % 3 == 1
    frame, place = slots // 12, slots % 4
    time = torch.where(is_video, frame * 12, slots)
    scene = Scene(
        is_video=is_video,
        seconds=time / 25,
        positions=10
        + torch.stack([time, torch.where(is_video, place // 2, time), torch.where(is_video, place % 2, time)]),
        sources=torch.zeros(n, dtype=torch.long),
    )
    context = Context(
        encoder_hidden=random(states, ENCODER_SIZE),
        encoder_keys=random(states, ENCODER_SIZE),
        encoder_attention=torch.rand(n, generator=generator) + 0.5,
        question=random(words, HIDDEN_SIZE),
        prompt=Prompt(random(words + 5, HIDDEN_SIZE), torch.arange(words + 5).expand(3, -1)),
        video=random(4 * frames, HIDDEN_SIZE),
        video_seconds=(torch.arange(4 * frames) // 4).float(),
        scene=scene,
        first_layer=first_layer(),
        seed=seed,
    )
    return random(n, HIDDEN_SIZE), context


def join(clips: Sequence[tuple[TokenStream, Context]]) -> tuple[TokenStream, Context]:
    """Packs clips to a batch."""
    streams, contexts = [c[0] for c in clips], [c[1] for c in clips]

    def pack(parts: list[TokenStream], width: int) -> TokenStream:
        embeds = torch.cat([torch.empty(0, width), *(p.embeds for p in parts)])
        return TokenStream(embeds, tuple(p.lengths[0] for p in parts))

    def cat(parts: list[torch.Tensor], empty: torch.Tensor) -> torch.Tensor:
        return torch.cat([empty, *parts], dim=-1)

    none, places = torch.empty(0, dtype=torch.long), torch.empty(3, 0, dtype=torch.long)
    prompts, scenes = ([getattr(c, name) for c in contexts] for name in ("prompt", "scene"))
    context = Context(
        encoder_hidden=pack([c.encoder_hidden for c in contexts], ENCODER_SIZE),
        encoder_keys=pack([c.encoder_keys for c in contexts], ENCODER_SIZE),
        encoder_attention=cat([c.encoder_attention for c in contexts], torch.empty(0)),
        question=pack([c.question for c in contexts], HIDDEN_SIZE),
        prompt=Prompt(pack([p.stream for p in prompts], HIDDEN_SIZE), cat([p.positions for p in prompts], places)),
        video=pack([c.video for c in contexts], HIDDEN_SIZE),
        video_seconds=cat([c.video_seconds for c in contexts], torch.empty(0)),
        scene=Scene(
            is_video=cat([s.is_video for s in scenes], none.bool()),
            seconds=cat([s.seconds for s in scenes], torch.empty(0)),
            positions=cat([s.positions for s in scenes], places),
            sources=cat([s.sources + i for i, s in enumerate(scenes)], none),
        ),
        first_layer=first_layer(),
        seed=contexts[0].seed if contexts else 0,
    )
    return pack(streams, HIDDEN_SIZE), context


class FirstLayer(nn.Module):
    """What a method may read of the LLM's first layer, the same on every call."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            self.input_layernorm = nn.RMSNorm(HIDDEN_SIZE)
            self.self_attn = nn.Module()
            self.self_attn.head_dim = LLM.head_size
            self.self_attn.q_proj = nn.Linear(HIDDEN_SIZE, LLM.heads * LLM.head_size)
            self.self_attn.k_proj = nn.Linear(HIDDEN_SIZE, LLM.kv_heads * LLM.head_size)
        self.requires_grad_(False)


@functools.cache
def first_layer() -> FirstLayer:
    """One for all inputs: making it takes longer than most methods do."""
    return FirstLayer()


def to(context: Context, change: Callable[[torch.Tensor], torch.Tensor]) -> Context:
    """Applies `change` to every tensor of a context, and to the weights of a copy of its layer."""

    def walk(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return change(value)
        if isinstance(value, nn.Module):
            return copy.deepcopy(value)._apply(change)
        if dataclasses.is_dataclass(value):
            return dataclasses.replace(
                value, **{f.name: walk(getattr(value, f.name)) for f in dataclasses.fields(value)}
            )
        return value

    return walk(context)
