"""OmniSIFT against a slow reference, by hand, and against the paper's arithmetic."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from audiopress import TokenStream, build
from audiopress.compression.base import parameter_count
from audiopress.compression.budget import token_budget

from .scene_cases import SAMPLES, film, inputs_of, second_film, slow_largest_remainder

NAMES = [name for name in SAMPLES if SAMPLES[name]]
SMALL = {"hidden_size": 12, "width": 8, "heads": 2}


def make(name: str = "omnisift", **options):
    torch.manual_seed(0)
    return build(name, **SMALL, **options).eval()


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def slow_omnisift(compressor, embeds, sample):
    """One sample, in fp64: the slots kept."""
    config, embeds = compressor.config, embeds.double()
    audio = [i for i, row in enumerate(sample) if not row[0]]
    video = [i for i, row in enumerate(sample) if row[0]]
    total = token_budget([len(sample)], config.keep_ratio)[0]
    shares = [len(audio) * config.kept[0], len(video) * config.kept[1]]
    of_audio, of_video = slow_largest_remainder(shares, [len(audio), len(video)], total)

    names = sorted({sample[i][1:3] for i in video})
    frames = [[i for i in video if sample[i][1:3] == name] for name in names]
    counts = [len(f) for f in frames]
    dealt = slow_largest_remainder(counts, counts, of_video)
    chunks: list[dict] = []  # source, start, kept tokens
    out, rank = [], 0
    for number, (name, frame, n) in enumerate(zip(names, frames, dealt, strict=True)):
        rank = rank + 1 if number and names[number - 1][0] == name[0] else 0
        if rank % 2 == 0:
            mean = sum(embeds[i] for i in frame) / len(frame)
            likeness = [cosine(embeds[i], mean) for i in frame]
            chunks.append({"source": name[0], "start": name[1], "kept": []})
        else:
            places = {sample[i][3:]: i for i in frames[number - 1]}
            likeness = [cosine(embeds[i], embeds[places[sample[i][3:]]]) for i in frame]
        kept = [i for _, i in sorted(zip(likeness, frame, strict=True))[:n]]
        chunks[-1]["kept"] += kept
        out += kept
    for number, chunk in enumerate(chunks):
        starts = [c["start"] for c in chunks if c["source"] == chunk["source"]]
        steps = [b - a for a, b in pairwise(starts)] or [50]
        chunk["stop"] = chunk["start"] + (steps + steps[-1:])[starts.index(chunk["start"])]
        chunk["number"] = number

    first = min(row[2] for row in sample)
    spans: dict[tuple[int, int], list[int]] = {}
    scores = {}
    for i in audio:
        time = sample[i][2]
        chunk = max((c for c in chunks if c["start"] <= time), key=lambda c: c["start"], default=None)
        if chunk is not None and time >= chunk["stop"]:
            chunk = None
        name = (first + (time - first) // 50 * 50, -1) if chunk is None else (chunk["start"], chunk["number"])
        spans.setdefault(name, []).append(i)
        query = compressor.project_audio(embeds[i][None])
        attended = torch.zeros_like(query)
        if chunk is not None and chunk["kept"]:
            keys = compressor.project_video(embeds[sorted(chunk["kept"])])
            attended = compressor.attention(query, keys, keys)[0]
        scores[i] = float(compressor.logit(compressor.head(compressor.norm(query + attended))))
    spans = dict(sorted(spans.items()))
    counts = [len(members) for members in spans.values()]
    for members, n in zip(spans.values(), slow_largest_remainder(counts, counts, of_audio), strict=True):
        out += sorted(members, key=lambda i: (-scores[i], i))[:n]
    assert len(out) == total
    return sorted(out)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"rho_a": 0.3, "rho_v": 0.7}, {"keep_ratio": 0.05}, {"keep_ratio": 0.9}])
@torch.no_grad()
def test_equals_the_slow_reference(name, options):
    compressor = make(**options)
    stream, context = inputs_of(SAMPLES[name])
    out = compressor(stream, context)
    assert torch.equal(out.embeds, stream.embeds[out.slots])
    assert out.slots.tolist() == slow_omnisift(compressor.double(), stream.embeds, SAMPLES[name])


def test_has_the_papers_parameters():
    with torch.device("meta"):
        count = parameter_count(build("omnisift", hidden_size=3584))
    maps, norms = 2 * (3584 * 512 + 512), 3 * 2 * 512
    attention, head = 4 * (512 * 512 + 512), 512 * 256 + 256 + 256 + 1
    assert count == maps + norms + attention + head == 4_856_321  # 4.85 M in the paper


@pytest.mark.parametrize(("preset", "nominal", "audio", "video"), [("36", 35.9, 0.7, 0.3), ("24", 24.4, 0.5, 0.2)])
def test_the_papers_arithmetic(preset, nominal, audio, video):
    compressor = make(f"omnisift:{preset}")
    assert 100 * compressor.config.keep_ratio == pytest.approx(nominal, abs=0.05)
    stream, context = inputs_of(film(20, height=12, width=12))  # 10 windows of 50 audio and 288 video tokens
    out = compressor(stream, context)
    seen = context.scene.is_video[out.slots]
    assert int((~seen).sum()) == pytest.approx(500 * audio, abs=1)
    assert int(seen.sum()) == pytest.approx(2880 * video, abs=1)


def test_first_frame_by_its_mean_and_second_by_the_first():
    sample = [(1, 0, time, 0, place) for time in (0, 25) for place in range(3)]
    embeds = torch.zeros(6, 12)
    embeds[:3, :2] = torch.tensor([[1.0, 0.1], [1.0, 0.0], [0.0, 1.0]])  # the mean is nearest to the first
    embeds[3:, :2] = torch.tensor([[5.0, 0.5], [0.0, 1.0], [1.0, 3.0]])  # the first one again, another, a bit of one
    _, context = inputs_of(sample)
    for keep_ratio, want in {1 / 3: [2, 4], 2 / 3: [1, 2, 4, 5]}.items():
        assert make(keep_ratio=keep_ratio)(TokenStream(embeds, (6,)), context).slots.tolist() == want


def test_duplicate_frames_keep_the_earliest():
    sample = film(2, height=2, width=2, sound=False)
    stream, context = inputs_of(sample)
    out = make(keep_ratio=0.5)(TokenStream(torch.full_like(stream.embeds, 0.3), stream.lengths), context)
    assert out.slots.tolist() == [0, 1, 4, 5]


def test_gradients_reach_every_parameter_through_the_scores():
    compressor = make(keep_ratio=0.4).train()
    stream, context = inputs_of(*SAMPLES.values())
    stream.embeds.requires_grad_(True)
    out = compressor(stream, context)
    (out.embeds * torch.randn(out.embeds.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    for name, parameter in compressor.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    assert stream.embeds.grad.isfinite().all()


def test_scores_are_float32_under_autocast():
    compressor, (stream, context) = make(keep_ratio=0.4), inputs_of(film(8))
    scores = []
    compressor.score = lambda *args: scores.append(type(compressor).score(compressor, *args)) or scores[0]
    with torch.autocast("cpu", torch.bfloat16):
        compressor(stream, context)
    assert not torch.equal(scores[0], scores[0].bfloat16().float())
    assert scores[0].unique().numel() == scores[0].numel()


def test_training_keeps_what_inference_keeps():
    compressor = make(keep_ratio=0.4)
    stream, context = inputs_of(film(8), second_film(film(5)))
    first, second = compressor.train()(stream, context), compressor.eval()(stream, context)
    assert torch.equal(first.slots, second.slots)
    assert torch.equal(first.embeds, second.embeds)


def test_audio_is_scored_by_the_video_of_its_time_only():
    """Another video from 4 s on changes nothing of the audio before."""
    compressor = make(keep_ratio=0.5)
    stream, context = inputs_of(film(8))
    late = context.scene.is_video & (context.scene.seconds >= 4)
    other = torch.where(late[:, None], stream.embeds.flip(1), stream.embeds)
    kept = [set(compressor(stream.replace(embeds=x), context).slots.tolist()) for x in (stream.embeds, other)]
    early = {i for i in range(len(late)) if context.scene.seconds[i] < 4}
    assert kept[0] & early == kept[1] & early
    assert kept[0] != kept[1]


@pytest.mark.parametrize("options", [{"width": 10, "heads": 4}, {"heads": 0}, {"width": 1}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=r"width|heads"):
        build("omnisift", hidden_size=12, **options)
