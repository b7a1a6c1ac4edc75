"""What joint methods share, against lists and loops; and the control that keeps all audio."""

from __future__ import annotations

import dataclasses
import logging
import random
from fractions import Fraction

import pytest
import torch

from audiopress import Context, TokenStream, build
from audiopress.compression.budget import largest_remainder
from audiopress.compression.scenes import Frames, Groups, split_budget
from audiopress.kernels import evenly

from .scene_cases import SAMPLES, film, inputs_of, scene_of, second_film, slow_largest_remainder


def test_largest_remainder_by_hand():
    def deal(shares, limits, total):
        return largest_remainder(torch.tensor(shares), torch.tensor(limits), [len(shares)], [total])

    assert deal([1, 1, 1], [9, 9, 9], 5) == (2, 2, 1), "of equal ones the earliest"
    assert deal([1.0, 2.0, 3.0], [9, 9, 9], 6) == (1, 2, 3)
    assert deal([1, 1, 8], [9, 9, 4], 10) == (3, 3, 4), "what one cannot take, the others get"
    assert deal([0, 1, 0], [2, 3, 6], 7) == (1, 3, 3), "and then those without a share"
    assert deal([0, 0], [3, 3], 3) == (2, 1)
    assert largest_remainder(torch.ones(3), torch.tensor([2, 5, 5]), [1, 0, 2], [2, 0, 3]) == (2, 2, 1)
    assert largest_remainder(torch.empty(0), torch.empty(0), [], []) == ()


def test_largest_remainder_equals_fractions():
    random.seed(0)
    for _ in range(300):
        groups, shares, limits, totals, want = [], [], [], [], []
        for _ in range(random.randint(0, 4)):
            n = random.randint(0, 6)
            share, limit = (
                [random.choice([0, 1, 1, 2, 3, 5]) for _ in range(n)],
                [random.randint(0, 6) for _ in range(n)],
            )
            total = random.randint(0, sum(limit))
            groups, totals, shares, limits = [*groups, n], [*totals, total], shares + share, limits + limit
            want += slow_largest_remainder([Fraction(s) for s in share], limit, total)
        assert largest_remainder(torch.tensor(shares), torch.tensor(limits), groups, totals) == tuple(want)


def test_evenly():
    assert evenly((5, 0, 4, 1), (2, 0, 4, 0)).tolist() == [1, 3, 5, 6, 7, 8]


def test_groups():
    groups = Groups.of(torch.tensor([1, 0, 1, 0, 1]), torch.tensor([7, 9, -3, 9, 7]))
    assert groups.ids.tolist() == [2, 0, 1, 0, 2]
    assert groups.counts.tolist() == [2, 1, 2]
    assert groups.order.tolist() == [1, 3, 2, 0, 4]
    assert groups.firsts.tolist() == [1, 2, 0]
    empty = torch.empty(0, dtype=torch.long)
    assert [x.tolist() for x in (Groups.of(empty).ids, Groups.of(empty, empty).counts)] == [[], []]


def test_frames_and_partners_equal_loops():
    samples = list(SAMPLES.values())
    scene, lengths = scene_of(*samples)
    stream = TokenStream(torch.zeros(sum(lengths), 1), lengths)
    frames = Frames.of(scene, stream.clips)
    partners = frames.partners(scene)
    rows = [(clip, i, *row) for clip, sample in enumerate(samples) for i, row in enumerate(sample)]
    starts = stream.offsets.tolist()
    names = sorted({(clip, source, time) for clip, _, video, source, time, *_ in rows if video})
    assert len(frames.counts) == len(names)
    found = 0
    for at, (token, frame) in enumerate(zip(frames.tokens.tolist(), frames.ids.tolist(), strict=True)):
        clip, i, video, source, time, height, width = rows[token]
        assert (video, starts[clip] + i) == (1, token)
        assert names[frame] == (clip, source, time)
        before = [name for name in names if name[:2] == (clip, source) and name[2] < time]
        assert frames.ranks[frame] == len(before)
        want = -1
        if len(before) % 2:
            same = [r for r in rows if r[0] == clip and r[2:] == (1, source, before[-1][2], height, width)]
            want = starts[clip] + same[0][1]
            found += 1
        assert (int(frames.tokens[partners[at]]) if partners[at] >= 0 else -1) == want
    assert found > 50


def test_a_place_that_the_frame_before_lacks_has_changed():
    sample = [(1, 0, 0, 0, 0), (1, 0, 0, 0, 1), (1, 0, 25, 0, 1), (1, 0, 25, 1, 1)]
    scene, lengths = scene_of(sample)
    embeds = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [1.0, 1.0]])
    frames = Frames.of(scene, TokenStream(embeds, lengths).clips)
    change = frames.change(embeds, scene).tolist()
    assert change == pytest.approx([float("inf"), float("inf"), 2 - 2**0.5, float("inf")])


def test_split_budget():
    assert split_budget([50, 0, 40, 50], [288, 30, 0, 10], [153, 7, 9, 60], (0.75, 0.4)) == (
        (38, 0, 9, 50),  # 50 * .75 = 37.5 of 152.7, beside 288 * .4 = 115.2; then one alone; then a limit
        (115, 7, 0, 10),
    )


def test_keep_all_audio():
    compressor = build("keep-all-audio", hidden_size=12, keep_ratio=0.9)
    stream, context = inputs_of(film(4), film(3, sound=False), film(10, step=20))
    out = compressor(stream, context)
    kept = [torch.isin(torch.arange(n), c.slots) for n, c in zip(stream.lengths, out.split(), strict=True)]
    video = context.scene.is_video.split(stream.lengths)
    assert kept[0][~video[0]].all()  # 100 of 124 tokens are sound
    assert kept[0][video[0]].nonzero().flatten().tolist() == evenly([24], [12]).tolist()
    assert int(kept[1].sum()) == 16  # of 18, without sound


def test_keep_all_audio_says_when_it_cannot(caplog):
    compressor = build("keep-all-audio", hidden_size=12, keep_ratio=0.5)
    stream, context = inputs_of(film(4))
    with caplog.at_level(logging.WARNING):
        out = compressor(stream, context)
        compressor(stream, context)
    assert len(caplog.records) == 1
    assert "the audio alone is more than keep_ratio 0.5 allows" in caplog.text
    assert not context.scene.is_video[out.slots].any()
    assert out.lengths == (62,)


@pytest.mark.parametrize("name", ["omnizip", "omnisift", "keep-all-audio"])
def test_scenes_that_do_not_fit(name):
    compressor = build(name, hidden_size=12)
    stream, context = inputs_of(film(2))
    for field, wrong in {"is_video": (7,), "positions": (2, 62), "sources": (61,), "seconds": ()}.items():
        scene = dataclasses.replace(context.scene, **{field: torch.zeros(wrong)})
        with pytest.raises(ValueError, match=rf"{name}: scene.{field} must be .* for a stream of 62 tokens, got "):
            compressor(stream, dataclasses.replace(context, scene=scene))
    scene = dataclasses.replace(context.scene, is_video=torch.zeros(62))
    with pytest.raises(ValueError, match="is_video must be bool"):
        compressor(stream, dataclasses.replace(context, scene=scene))


@pytest.mark.parametrize("name", ["omnizip", "omnisift", "keep-all-audio"])
@pytest.mark.parametrize("keep_ratio", [0.02, 0.3, 0.9])
def test_every_sample_alone_and_in_a_batch(name, keep_ratio):
    torch.manual_seed(0)
    compressor = build(name, hidden_size=12, keep_ratio=keep_ratio).eval()
    stream, context = inputs_of(*SAMPLES.values())
    whole, scene = compressor(stream, context), context.scene
    starts = stream.offsets.tolist()
    for i, clip in enumerate(whole.split()):
        part = slice(starts[i], starts[i + 1])
        alone = compressor(
            TokenStream(stream.embeds[part], stream.lengths[i : i + 1]),
            Context(
                encoder_attention=context.encoder_attention[part],
                scene=type(scene)(
                    scene.is_video[part], scene.seconds[part], scene.positions[:, part], scene.sources[part]
                ),
            ),
        )
        assert torch.equal(alone.slots, clip.slots)
        assert torch.equal(alone.embeds, clip.embeds)
        assert torch.equal(alone.sizes, clip.sizes)


@pytest.mark.parametrize("name", ["omnizip", "omnisift", "keep-all-audio"])
def test_without_a_scene_all_is_audio(name):
    compressor = build(name, hidden_size=12, keep_ratio=0.3).eval()
    stream, context = inputs_of(SAMPLES["audio"])
    want = compressor(stream, context)
    assert torch.equal(compressor(stream, dataclasses.replace(context, scene=None)).slots, want.slots)


@pytest.mark.parametrize("name", ["omnizip", "omnisift"])
def test_rates(name):
    usual = build(name, hidden_size=12).config
    assert build(name, hidden_size=12, keep_ratio=0.2).config.kept == usual.kept
    assert build(name, hidden_size=12, rho_a=usual.rho_a, rho_v=usual.rho_v).config == usual
    assert build(name, hidden_size=12, rho_a=0.2, rho_v=0.5, keep_ratio=0.9).budget([100]) == (90,)
    with pytest.raises(ValueError, match="rho_a and rho_v go together"):
        build(name, hidden_size=12, rho_a=0.2)
    with pytest.raises(ValueError, match=r"rho_v must be in \[0, 1\]"):
        build(name, hidden_size=12, rho_a=0.2, rho_v=1.5)


def test_films():
    """The samples are what their names say."""
    assert len(SAMPLES["papers"]) == 150 + 36
    assert [r[2] for r in SAMPLES["odd"] if r[0]][::9] == [0, 32, 65, 97, 130]
    assert {r[1] for r in second_film(film(2))} == {0, 1}


def test_another_ratio_keeps_how_audio_and_video_share_it():
    first = build("omnizip", hidden_size=8, rho_a=0.8, rho_v=0.1)
    other = first.at(0.3)
    assert other.config.keep_ratio == 0.3
    assert other.config.kept == first.config.kept
    assert first.at(first.config.keep_ratio).config == first.config
    assert build("omnizip:35", hidden_size=8, keep_ratio=0.2).config.rho_a == 0.4
