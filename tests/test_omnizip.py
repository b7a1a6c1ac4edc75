"""OmniZip against a slow reference in fp64, by hand, and against the paper's arithmetic."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from scipy.optimize import brentq

from audiopress import TokenStream, build
from audiopress.compression.budget import token_budget
from audiopress.compression.omnizip import density_peaks

from .scene_cases import SAMPLES, film, inputs_of, slow_largest_remainder

NAMES = [name for name in SAMPLES if SAMPLES[name]]


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()).clamp(min=1e-300))


def slow_density_peaks(points: list[torch.Tensor], k: int) -> list[float]:
    """Log of density times distance to the nearest denser point; the densest takes its farthest."""
    points = [p / p.norm().clamp(min=1e-12) for p in points]
    distance = [[float((p - q).norm()) for q in points] for p in points]
    spread = []
    for i in range(len(points)):
        near = sorted(distance[i][j] ** 2 for j in range(len(points)) if j != i)[:k]
        spread.append(sum(near) / max(1, len(near)))
    scores = []
    for i in range(len(points)):
        denser = [distance[i][j] for j in range(len(points)) if (spread[j], j) < (spread[i], i)]
        gap = min(denser) if denser else max(distance[i])
        scores.append(math.log(gap) - spread[i] if gap > 0 else -math.inf)
    return scores


def slow_omnizip(config, embeds, attention, sample):
    """One sample: slot -> (embedding, size) of what is kept."""
    embeds = embeds.double()
    audio = [i for i, row in enumerate(sample) if not row[0]]
    video = [i for i, row in enumerate(sample) if row[0]]
    total = token_budget([len(sample)], config.keep_ratio)[0]
    kept_shares = [len(audio) * config.kept[0], len(video) * config.kept[1]]
    of_audio, of_video = slow_largest_remainder(kept_shares, [len(audio), len(video)], total)

    anchors = min(math.floor(0.5 + config.contextual_ratio * len(audio)), of_audio // 2)
    salient = sorted(audio, key=lambda i: (-attention[i], i))[: of_audio - anchors]
    rest = [i for i in audio if i not in salient]
    anchor = [rest[(2 * j + 1) * len(rest) // (2 * anchors)] for j in range(anchors)]
    out = {i: (embeds[i], 1) for i in salient + anchor}
    members: dict[int, list[tuple[float, int]]] = {a: [] for a in anchor}
    for i in rest:
        if i not in anchor and anchor:
            likeness = [cosine(embeds[i], embeds[a]) for a in anchor]
            nearest = anchor[likeness.index(max(likeness))]
            relation = max((cosine(embeds[i], embeds[v]) for v in video), default=max(likeness))
            members[nearest].append((-relation, i))
    for a, candidates in members.items():
        best = sorted(candidates)[: config.neighbours]
        if best:
            weights = torch.tensor([-relation for relation, _ in best]).double().softmax(0)
            average = sum(w * embeds[i] for w, (_, i) in zip(weights, best, strict=True))
            out[a] = ((embeds[a] + average) / 2, 1 + len(best))

    first = min(row[2] for row in sample)
    window_of = [math.floor((row[2] - first) / (25 * config.window_seconds)) for row in sample]
    windows = sorted(set(window_of))
    rate = 1 - of_video / max(1, len(video))
    start, sizes = {}, {}
    for w in windows:
        sound = [i for i in audio if window_of[i] == w]
        sizes[w] = sum(window_of[i] == w for i in video)
        if sound:
            retained = sum(i in out for i in sound) / len(sound)
            start[w] = config.rho_max - (config.rho_max - config.rho_min) * retained
    low = config.rho_min if rate >= config.rho_min else 0
    high = config.rho_max if rate <= config.rho_max else 1
    guided = [w for w in start if sizes[w]]

    def excess(shift):
        return sum(sizes[w] * (min(high, max(low, start[w] + shift)) - rate) for w in guided)

    shift = 0.0
    if guided:
        shift = -1 if excess(-1) >= 0 else 1 if excess(1) <= 0 else brentq(excess, -1, 1, xtol=1e-14)
    rates = {w: min(high, max(low, start[w] + shift)) if w in start else rate for w in windows}
    dealt = slow_largest_remainder([sizes[w] * (1 - rates[w]) for w in windows], list(sizes.values()), of_video)
    for w, budget in zip(windows, dealt, strict=True):
        names = sorted({sample[i][1:3] for i in video if window_of[i] == w})
        frames = [[i for i in video if sample[i][1:3] == name] for name in names]
        counts = [len(f) for f in frames]
        for number, (name, frame, n) in enumerate(
            zip(names, frames, slow_largest_remainder(counts, counts, budget), strict=True)
        ):
            rank = sum(other[0] == name[0] for other in names[:number])
            if rank % 2 == 0:
                scores = slow_density_peaks([embeds[i] for i in frame], config.density_neighbours)
            else:
                places = {sample[i][3:]: i for i in frames[number - 1]}
                scores = [-cosine(embeds[i], embeds[places[sample[i][3:]]]) for i in frame]
            for _, i in sorted(zip([-s for s in scores], frame, strict=True))[:n]:
                out[i] = (embeds[i], 1)
    assert len(out) == total
    return out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("omnizip:45", {}),
        ("omnizip:35", {"window_seconds": 1.0, "density_neighbours": 2, "neighbours": 5, "contextual_ratio": 0.1}),
        ("omnizip", {"keep_ratio": 0.1}),
        ("omnizip", {"keep_ratio": 0.8}),
    ],
)
def test_equals_the_slow_reference(name, preset, options):
    compressor = build(preset, hidden_size=12, **options)
    stream, context = inputs_of(SAMPLES[name])
    out = compressor(stream, context)
    want = slow_omnizip(compressor.config, stream.embeds, context.encoder_attention.tolist(), SAMPLES[name])
    assert out.slots.tolist() == sorted(want)
    for slot, embed, size in zip(out.slots.tolist(), out.embeds, out.sizes, strict=True):
        torch.testing.assert_close(embed.double(), want[slot][0], rtol=1e-5, atol=1e-6)
        assert size == want[slot][1]


@pytest.mark.parametrize(("preset", "nominal", "audio", "video"), [("45", 45.2, 0.75, 0.4), ("35", 35.2, 0.65, 0.3)])
def test_the_papers_arithmetic(preset, nominal, audio, video):
    compressor = build(f"omnizip:{preset}", hidden_size=12)
    assert 100 * compressor.config.keep_ratio == pytest.approx(nominal, abs=0.05)
    sample = film(20, height=12, width=12)  # 10 windows of 50 audio and 288 video tokens
    stream, context = inputs_of(sample)
    out = compressor(stream, context)
    seen = context.scene.is_video[out.slots]
    assert (len(sample), int(context.scene.is_video.sum())) == (3380, 2880)
    assert int((~seen).sum()) == pytest.approx(500 * audio, abs=1)
    assert int(seen.sum()) == pytest.approx(2880 * video, abs=1)
    assert int((out.sizes > 1).sum()) <= 25  # 5 % anchors


def test_windows_that_keep_more_audio_keep_more_video():
    """Two windows; the attention is all in the second: .35 and .75 pruned, moved to the mean that is asked for."""
    stream, context = inputs_of(film(4, height=10, width=10))
    attention = (context.scene.seconds >= 2).float() * ~context.scene.is_video
    compressor = build("omnizip", hidden_size=12, rho_a=0.5, rho_v=0.55, contextual_ratio=0.0)
    out = compressor(stream, dataclasses.replace(context, encoder_attention=attention))
    late = context.scene.seconds[out.slots] >= 2
    seen = context.scene.is_video[out.slots]
    total = sum(out.lengths)
    of_audio, of_video = slow_largest_remainder([50, 180], [100, 400], total)
    assert int((late & ~seen).sum()) == min(50, of_audio)
    assert int((~late & ~seen).sum()) == of_audio - min(50, of_audio)
    assert of_video / 400 == pytest.approx(0.45, abs=0.02)
    assert int((late & seen).sum()) / 200 == pytest.approx(of_video / 400 + 0.2, abs=0.01)
    assert int((~late & seen).sum()) / 200 == pytest.approx(of_video / 400 - 0.2, abs=0.01)


def test_density_peaks_by_hand():
    """On the circle at 0, 1, 2, 90 and 91 degrees: the middle of the three is densest, 91 is next to the denser 90."""
    angles = torch.tensor([[0.0, 1.0, 2.0, 90.0, 91.0]]).deg2rad()
    points = torch.stack([angles.cos(), angles.sin()], dim=-1)
    scores = density_peaks(points, torch.ones(1, 5, dtype=torch.bool), 1)[0]
    # one neighbour: all five are 1 degree from theirs; of (nearly) equal ones two are peaks: one per cluster
    assert set(scores.topk(2).indices.tolist()) & {0, 1, 2}
    assert set(scores.topk(2).indices.tolist()) & {3, 4}
    three = density_peaks(points, torch.ones(1, 5, dtype=torch.bool), 2)[0]
    assert three.argmax() == 1


def test_duplicates_are_no_peaks():
    points = torch.tensor([[[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 2 + [[0.0, 0.0]] * 2])
    real = torch.ones(1, 7, dtype=torch.bool)
    scores = density_peaks(points, real, 5)
    assert scores.isinf()[0].tolist() == [False, True, True, False, True, False, True]
    more = density_peaks(torch.cat([points, torch.randn(1, 4, 2)], dim=1), torch.arange(11)[None] < 7, 5)
    assert torch.equal(more[:, :7], scores)  # padding changes nothing
    assert slow_density_peaks(list(points[0].double()), 5) == pytest.approx(scores[0].tolist())


def test_silence_keeps_the_earliest():
    sample = film(2, height=2, width=2)
    stream, context = inputs_of(sample)
    silent = TokenStream(torch.ones_like(stream.embeds), stream.lengths)
    attention = torch.ones_like(context.encoder_attention)
    out = build("omnizip", hidden_size=12, keep_ratio=0.5, contextual_ratio=0.0, rho_min=0.75)(
        silent, dataclasses.replace(context, encoder_attention=attention)
    )
    of_audio, of_video = slow_largest_remainder([50 * 0.75, 8 * 0.4], [50, 8], 29)
    frames = slow_largest_remainder([4, 4], [4, 4], of_video)
    assert out.slots.tolist() == [*range(frames[0]), *range(4, 4 + frames[1]), *range(8, 8 + of_audio)]


def test_bad_attention():
    compressor = build("omnizip", hidden_size=12)
    stream, context = inputs_of(film(2), film(2))
    with pytest.raises(ValueError, match=r"encoder_attention must be \[N\] = \[124\], got \[7\]"):
        compressor(stream, dataclasses.replace(context, encoder_attention=torch.zeros(7)))
    broken = context.encoder_attention.clone()
    broken[-1] = torch.nan
    with pytest.raises(ValueError, match="omnizip: clip 1 of 2 has NaN or infinite encoder_attention"):
        compressor(stream, dataclasses.replace(context, encoder_attention=broken))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho_min": 0.8}, "rho_min must be at most rho_max, got 0.8 and 0.75"),
        ({"contextual_ratio": -0.1}, r"contextual_ratio must be in \[0, 1\]"),
        ({"neighbours": -1}, "neighbours must be a whole number >= 0"),
        ({"density_neighbours": 0}, "density_neighbours must be a whole number >= 1"),
        ({"window_seconds": 0}, r"window_seconds must be in \(0, inf\), got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build("omnizip", hidden_size=12, **options)


def test_sizes_of_an_earlier_stage_count():
    stream, context = inputs_of(SAMPLES["audio"])
    heavy = stream.replace(sizes=torch.full_like(stream.sizes, 3.0))
    compressor = build("omnizip", hidden_size=12)
    assert torch.equal(compressor(heavy, context).sizes, 3 * compressor(stream, context).sizes)
