"""The layout against transformers' own positions, and where those go wrong, against each token's real second."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import AUDIO, Batch

from audiopress.models.layout import Kind, Layout, TokenIds, audio_lengths


def layout_of(thinker, batch, **changes):
    args = {
        "video_grid_thw": batch.get("video_grid_thw"),
        "image_grid_thw": batch.get("image_grid_thw"),
        "video_second_per_grid": batch.get("video_second_per_grid"),
    }
    frames = batch.get("feature_attention_mask")
    lengths = [] if frames is None else audio_lengths(frames.sum(1))
    ids = TokenIds.from_config(thinker.config)
    return Layout.build(batch["input_ids"], batch["attention_mask"], ids, audio_lengths=lengths, **{**args, **changes})


def rope_index(thinker, batch, audio_in_video=False):
    frames = batch.get("feature_attention_mask")
    return thinker.get_rope_index(
        batch["input_ids"],
        batch.get("image_grid_thw"),
        batch.get("video_grid_thw"),
        batch["attention_mask"],
        audio_in_video,
        None if frames is None else frames.sum(1),
        batch.get("video_second_per_grid"),
    )[0]


SAMPLES = {
    "text": lambda b: [b.text(7)],
    "audio": lambda b: [b.text(3), b.audio(203), b.text(4)],
    "two audios": lambda b: [b.text(3), b.audio(64), b.text(2), b.audio(1000), b.text(4)],
    "video": lambda b: [b.text(3), b.video(3, 4, 6, 0.7), b.text(4)],
    "image": lambda b: [b.text(2), b.image(4, 8), b.text(2)],
    "audio and video apart": lambda b: [b.text(1), b.video(2, 4, 4, 2.0), b.text(1), b.audio(77), b.text(2)],
    "audio first": lambda b: [b.audio(77), b.text(2)],
    "everything": lambda b: [b.text(1), b.image(4, 4), b.audio(50), b.text(2), b.video(2, 4, 8), b.audio(9), b.text(3)],
}
IN_VIDEO = {
    "equal lengths": lambda b: [b.text(4), b.video_with_audio(3, 4, 4, 600, 2.0), b.text(3)],
    "audio longer": lambda b: [b.text(4), b.video_with_audio(2, 4, 6, 1500, 1.0), b.text(3)],
    "video longer": lambda b: [b.text(4), b.video_with_audio(6, 4, 4, 300, 1.0), b.text(3)],
    "two videos": lambda b: [b.video_with_audio(2, 4, 4, 300), b.text(2), b.video_with_audio(2, 4, 8, 410), b.text(1)],
    "odd rate": lambda b: [b.text(2), b.video_with_audio(5, 4, 4, 700, 0.83), b.text(2)],
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", SAMPLES)
def test_positions_equal_transformers(thinker, name, side):
    b = Batch()
    b.add(*SAMPLES[name](b)).add(b.text(30))  # with a text-only sample, so that one of the two is padded
    batch = b.build(side)
    assert torch.equal(layout_of(thinker, batch).positions, rope_index(thinker, batch))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", IN_VIDEO)
def test_positions_of_sound_inside_a_video_equal_transformers(thinker, name, side):
    b = Batch()
    b.add(*IN_VIDEO[name](b)).add(b.text(5))
    batch = b.build(side)
    assert torch.equal(layout_of(thinker, batch).positions, rope_index(thinker, batch, audio_in_video=True))


def test_videos_with_and_without_sound_share_a_batch(thinker):
    """Transformers has one switch for the whole batch; here each sample is what its own ids say."""
    with_sound, silent = Batch(1), Batch(2)
    with_sound.add(*IN_VIDEO["equal lengths"](with_sound))
    silent.add(*SAMPLES["video"](silent))
    expected = [
        rope_index(thinker, with_sound.build(), audio_in_video=True)[:, 0],
        rope_index(thinker, silent.build())[:, 0],
    ]
    both = Batch(1)
    both.add(*IN_VIDEO["equal lengths"](both))
    both.add(*SAMPLES["video"](both))
    layout = layout_of(thinker, both.build())
    for row, positions in enumerate(expected):
        assert torch.equal(layout.positions[:, row, : positions.shape[1]], positions)


def test_every_token_keeps_its_real_second(thinker):
    """Unevenly spaced frames: time is origin + 25 * second, for video and audio alike."""
    b = Batch()
    b.add(b.text(3), b.video_with_audio(4, 4, 4, 1000, 2.5, chunk=62), b.text(2))
    seconds = torch.tensor([0.0, 1.3, 4.21, 9.9])
    layout = layout_of(thinker, b.build(), video_seconds=seconds)
    origin = 3 + 1  # three words, then both start tokens on one position
    video, audio = layout.kind[0] == Kind.VIDEO, layout.kind[0] == Kind.AUDIO
    assert layout.second[0, video].unique().tolist() == seconds.tolist()
    assert torch.equal(layout.positions[0, 0, video], origin + (layout.second[0, video] * 25).long())
    assert torch.equal(layout.positions[0, 0, audio], origin + (layout.second[0, audio] * 25).round().long())
    assert layout.positions[0, 0, -1] == origin + max(247, 249) + 1 + 2  # after the later of the two


def test_structure(thinker):
    b = Batch()
    b.add(b.text(2), b.audio(20), b.text(1), b.audio(12), b.text(1)).add(b.text(1), b.video(2, 4, 4, 3.0))
    batch = b.build("left")
    layout = layout_of(thinker, batch)
    audio = layout.kind[0] == Kind.AUDIO
    assert layout.clip[0, audio].tolist() == [0] * 5 + [1] * 3
    assert layout.slot[0, audio].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert layout.second[0, audio].tolist() == pytest.approx([0, 0.04, 0.08, 0.12, 0.16, 0, 0.04, 0.08])
    video = layout.kind[1] == Kind.VIDEO
    assert layout.clip[1, video].tolist() == [0] * 8
    assert layout.slot[1, video].tolist() == list(range(8))
    assert layout.second[1, video].tolist() == [0.0] * 4 + [3.0] * 4
    assert torch.equal(layout.mask, batch["attention_mask"].bool())
    assert layout.index(Kind.AUDIO).tolist() == (batch["input_ids"].flatten() == AUDIO).nonzero().flatten().tolist()


def test_describe(thinker):
    b = Batch()
    b.add(b.text(2), b.audio(400), b.text(3))
    layout = layout_of(thinker, b.build())
    lines = layout.describe().splitlines()
    assert lines[0] == "sample 0: 107 tokens"
    assert lines[1].split() == ["TEXT", "x", "3"]
    assert lines[2].split() == ["AUDIO", "x", "100", "clip", "0,", "0.00-4.00", "s"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"audio_lengths": [4]}, "5 AUDIO placeholders but 4 AUDIO features in 1 clips"),
        ({"audio_lengths": [3, 3]}, "5 AUDIO placeholders but 6 AUDIO features in 2 clips"),
        ({"video_grid_thw": torch.tensor([[1, 4, 4]])}, "0 VIDEO placeholders but 4 VIDEO features"),
        ({"video_second_per_grid": [1.0]}, "one number per video: 0, got 1"),
    ],
)
def test_counts_are_checked(thinker, changes, message):
    b = Batch()
    batch = b.add(b.text(2), b.audio(20)).build()
    ids = TokenIds.from_config(thinker.config)
    args = {"audio_lengths": [5], **changes}
    with pytest.raises(ValueError, match=message):
        Layout.build(batch["input_ids"], batch["attention_mask"], ids, **args)


def test_a_clip_cannot_cross_samples(thinker):
    b = Batch()
    b.add(b.audio(20)).add(b.audio(20))
    batch = b.build()
    ids = TokenIds.from_config(thinker.config)
    with pytest.raises(ValueError, match="sample 0 ends inside one of its AUDIO clips"):
        Layout.build(batch["input_ids"], batch["attention_mask"], ids, audio_lengths=[6, 4])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("text"), st.integers(1, 5)),
            st.tuples(st.just("audio"), st.integers(4, 300)),
            st.tuples(st.just("video"), st.integers(1, 4)),
            st.tuples(st.just("image"), st.integers(1, 3)),
        ),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from(["left", "right"]),
)
def test_any_sample_equals_transformers(thinker, kinds, side):
    b = Batch()
    make = {
        "text": b.text,
        "audio": b.audio,
        "video": lambda n: b.video(n, 4, 4, 0.5),
        "image": lambda n: b.image(4, 4 * n),
    }
    b.add(*(make[kind](n) for kind, n in kinds)).add(b.text(3))
    batch = b.build(side)
    layout = layout_of(thinker, batch)
    assert torch.equal(layout.positions, rope_index(thinker, batch))
    assert (layout.slot >= 0).sum() == sum(int((layout.kind == kind).sum()) for kind in (2, 3, 4))
