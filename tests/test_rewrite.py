"""The rewrite: brute force over lists, and properties over random layouts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layout import layout_of
from tiny import Batch

from audiopress.compression.stream import TokenStream
from audiopress.models.layout import Kind
from audiopress.models.rewrite import IGNORE, rewrite, scatter


def drop(lengths, keep, width, seed=0):
    """A stream that keeps the slots `keep[c]` of clip c."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.tensor([s for slots in keep for s in slots], dtype=torch.long)
    embeds = torch.randn(len(slots), width, generator=generator)
    return TokenStream(embeds, [len(s) for s in keep], slots, torch.full((len(slots),), 2.0))


def brute_force(embeds, layout, stream, labels, side):
    """The same with Python lists."""
    kept = {}
    i = 0
    for c, n in enumerate(stream.lengths):
        for _ in range(n):
            kept[c, int(stream.slots[i])] = stream.embeds[i]
            i += 1
    rows = []
    for b in range(len(embeds)):
        row = []
        for t in range(embeds.shape[1]):
            kind, key = int(layout.kind[b, t]), (int(layout.clip[b, t]), int(layout.slot[b, t]))
            if kind == Kind.PAD or (kind == Kind.AUDIO and key not in kept):
                continue
            vector = kept[key] if kind == Kind.AUDIO else embeds[b, t]
            row.append((vector, layout.positions[:, b, t].tolist(), int(labels[b, t])))
        rows.append(row)
    width = max(map(len, rows))
    return [[None] * (width - len(r)) + r if side == "left" else r + [None] * (width - len(r)) for r in rows]


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(["left", "right"]), st.sampled_from(["left", "right"]))
def test_equals_brute_force(thinker, data, side_in, side_out):
    b = Batch(data.draw(st.integers(0, 99)))
    for _ in range(data.draw(st.integers(1, 3))):
        parts = [b.text(data.draw(st.integers(1, 4)))]
        if data.draw(st.booleans()):
            parts.append(b.audio(data.draw(st.integers(4, 60))))
        if data.draw(st.booleans()):
            parts.append(b.video_with_audio(2, 4, 4, data.draw(st.integers(4, 300))))
        b.add(*parts, b.text(2))
    batch = b.build(side_in)
    layout = layout_of(thinker, batch)
    clips = int(layout.clip[layout.kind == Kind.AUDIO].max()) + 1 if b.mels else 0
    lengths = [int(((layout.kind == Kind.AUDIO) & (layout.clip == c)).sum()) for c in range(clips)]
    keep = [sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1))) for n in lengths]
    embeds = torch.randn(*batch["input_ids"].shape, 8)
    labels = torch.randint(0, 50, batch["input_ids"].shape)
    stream = drop(lengths, keep, 8)
    out = rewrite(embeds, layout, {Kind.AUDIO: stream} if clips else {}, labels, padding_side=side_out)
    expected = brute_force(embeds, layout, stream, labels, side_out)
    assert list(out.embeds.shape[:2]) == [len(expected), len(expected[0])]
    for r, row in enumerate(expected):
        assert out.positions[0, r][out.mask[r].bool()].tolist() == list(range(int(out.mask[r].sum())))
        for t, token in enumerate(row):
            assert bool(out.mask[r, t]) == (token is not None)
            if token is None:
                assert out.labels[r, t] == IGNORE
                continue
            assert torch.equal(out.embeds[r, t], token[0])
            assert out.positions[1:, r, t].tolist() == token[1]
            assert out.labels[r, t] == token[2]
    total = out.positions[1:].amax(0).masked_fill(out.mask == 0, -1).amax(1) + 1
    assert torch.equal(out.decode_offset, total - out.mask.sum(1))


def test_sizes_and_contiguous_positions(thinker):
    b = Batch()
    batch = b.add(b.text(2), b.audio(40), b.text(1)).build()
    layout = layout_of(thinker, batch)
    embeds = torch.randn(1, batch["input_ids"].shape[1], 8)
    stream = drop([10], [[1, 5, 9]], 8)
    out = rewrite(embeds, layout, {Kind.AUDIO: stream}, positions="contiguous")
    assert out.positions.tolist() == [[list(range(8))]] * 4
    assert out.sizes.tolist() == [[1, 1, 1, 2, 2, 2, 1, 1]]
    assert "AUDIO x 10" in layout.describe(after=out.layout)
    assert layout.describe(after=out.layout).splitlines()[2].endswith("-> 3")


def test_gradients_reach_the_stream(thinker):
    b = Batch()
    batch = b.add(b.text(2), b.audio(40), b.text(1)).build()
    stream = drop([10], [[0, 4]], 8)
    stream.embeds.requires_grad_()
    out = rewrite(torch.randn(1, 15, 8), layout_of(thinker, batch), {Kind.AUDIO: stream})
    out.embeds.sum().backward()
    assert torch.equal(stream.embeds.grad, torch.ones(2, 8))


def test_bad_streams(thinker):
    b = Batch()
    batch = b.add(b.text(2), b.audio(40), b.text(1)).build()
    layout = layout_of(thinker, batch)
    embeds = torch.randn(1, 15, 8)
    with pytest.raises(ValueError, match="slot 10 is outside AUDIO clip 0 of 10 tokens"):
        rewrite(embeds, layout, {Kind.AUDIO: drop([10], [[3, 10]], 8)})
    with pytest.raises(ValueError, match="slots must increase: slot 4 follows 4 in AUDIO clip 0 of 10 tokens"):
        rewrite(embeds, layout, {Kind.AUDIO: drop([10], [[3, 4, 4]], 8)})
    with pytest.raises(ValueError, match="AUDIO clip 0 has 10 placeholders but the stream has 11 tokens"):
        rewrite(embeds, layout, {Kind.AUDIO: drop([11], [range(11)], 8)})
    with pytest.raises(ValueError, match="1 AUDIO clips but the stream has 2"):
        rewrite(embeds, layout, {Kind.AUDIO: drop([5, 5], [[1], [2]], 8)})
    with pytest.raises(ValueError, match="10 AUDIO placeholders but 9 AUDIO features"):
        scatter(embeds, layout, Kind.AUDIO, torch.randn(9, 8))
