"""Q-Formers against loops over single windows, Hugging Face's BLIP-2 layers and the papers' numbers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from audiopress import Chain, CompressedOmni, Context, TokenStream, build
from audiopress.compression.base import parameter_count
from audiopress.compression.pictures import shown_pictures
from audiopress.compression.qformer_layers import QFormerLayer, mean_cosine
from audiopress.compression.speech_rate import SpeechRate, relative_rates, train_speech_rate

from .compression_cases import ENCODER_SIZE, HIDDEN_SIZE, make_clip, make_inputs
from .tiny import Batch

SMALL = {"width": 12, "heads": 2, "ffn_size": 16}
MRC = {"source": "hidden", "windows": ((10, 2), (20, 4)), "step": 5, "causal": True, "positions": True, **SMALL}
LENGTHS = (7, 0, 23, 1, 12)


def make(name="qformer", **options):
    torch.manual_seed(0)
    return build(name, hidden_size=HIDDEN_SIZE, encoder_size=ENCODER_SIZE, **SMALL | options).eval()


def on_meta(name, hidden_size=3584, encoder_size=1280, **options):
    with torch.device("meta"):
        return build(f"qformer:{name}", hidden_size=hidden_size, encoder_size=encoder_size, **options)


def outputs(preset, seconds, **options):
    return on_meta(preset, **options).budget((25 * seconds,))[0]


# Published numbers ------------------------------------------------------------------------------------------------


def test_numbers_of_tokens_of_the_papers():
    assert outputs("salmonn", 30) == 88  # 1500 states, of which 4 are left out
    assert outputs("salmonn", 30, tail="keep") == 89
    assert outputs("favor", 30) == 6 * 32
    assert outputs("mrc-released", 25) == 150
    assert outputs("mrc-three-level", 30) == 180
    assert outputs("mrc", 25) == 20
    assert outputs("mms-llama", 20) == 120  # the whole pool
    assert outputs("mms-llama", 20, speech_rate=False) == 60
    assert outputs("granite-window", 30) == 300


@pytest.mark.parametrize(
    ("preset", "rate"),
    [("salmonn", 50 / 17), ("favor", 6.4), ("mrc", 0.8), ("mrc-released", 6), ("mms-llama", 6), ("granite-window", 10)],
)
def test_tokens_per_second_of_the_papers(preset, rate):
    assert 25 * on_meta(preset).config.keep_ratio == pytest.approx(rate)


def test_the_layers_are_those_of_blip2():
    width, heads, ffn, read, layers = 24, 4, 40, 10, 2
    config = Blip2QFormerConfig(
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        encoder_hidden_size=read,
        cross_attention_frequency=1,
        layer_norm_eps=1e-5,
    )
    theirs = Blip2QFormerModel(config).eval()
    ours = [QFormerLayer(width, heads, ffn, read, 0.0, causal=False).eval() for _ in range(layers)]
    for mine, its in zip(ours, theirs.encoder.layer, strict=True):
        for name, parameter in its.named_parameters():
            torch.nn.init.normal_(parameter, std=0.3 if name.endswith("weight") else 0.1)
        own, cross = its.attention, its.crossattention
        for attention, source, split in ((mine.among, own, ()), (mine.across, cross, ("key_value",))):
            q, k, v = (getattr(source.attention, part) for part in ("query", "key", "value"))
            for kind in ("weight", "bias"):
                parts = [getattr(x, kind).data for x in (q, k, v)]
                if split:
                    getattr(attention.key_value, kind).data = torch.cat(parts[1:])
                getattr(attention.query, kind).data = parts[0] if split else torch.cat(parts)
            attention.output.load_state_dict(source.output.dense.state_dict())
            attention.norm.load_state_dict(source.output.LayerNorm.state_dict())
        mine.ffn.fc1.load_state_dict(its.intermediate_query.dense.state_dict())
        mine.ffn.fc2.load_state_dict(its.output_query.dense.state_dict())
        mine.norm.load_state_dict(its.output_query.LayerNorm.state_dict())
    queries, frames = torch.randn(3, 5, width), torch.randn(3, 7, read)
    real = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    x = theirs.layernorm(queries)
    for layer in ours:
        x = layer(x, frames, torch.ones(3, 5, dtype=torch.bool), real)
    want = theirs(queries, encoder_hidden_states=frames, encoder_attention_mask=real.long()).last_hidden_state
    torch.testing.assert_close(x, want, rtol=1e-4, atol=1e-5)
    assert sum(map(parameter_count, ours)) == parameter_count(theirs.encoder)


# Against loops ----------------------------------------------------------------------------------------------------


def attend(attention, x, source=None, visible=None):
    """One query and one head at a time."""
    if attention.key_value is None:
        q, k, v = attention.query(x).chunk(3, dim=-1)
    else:
        q, (k, v) = attention.query(x), attention.key_value(source).chunk(2, dim=-1)
    size = q.shape[1] // attention.heads
    rows = []
    for i in range(len(q)):
        heads = []
        for h in range(attention.heads):
            part = slice(h * size, (h + 1) * size)
            keys = [j for j in range(len(k)) if visible is None or visible(i, j)]
            weights = torch.stack([q[i, part] @ k[j, part] for j in keys]) / math.sqrt(size)
            heads.append(weights.softmax(0) @ v[keys][:, part])
        rows.append(torch.cat(heads))
    return attention.norm(x + attention.output(torch.stack(rows)))


def read_window(qformer, level, rows, used):
    """What `used` queries read of one window's rows (step, place, vector), none of them padding."""
    frames = torch.stack([vector for _, _, vector in rows])
    if qformer.position is not None:
        frames = frames + qformer.position[[step * qformer.places + place for step, place, _ in rows]]
    x = qformer.query_norm(qformer.queries[level][:used])
    for layer in qformer.layers:
        own = frames
        if layer.history is not None:
            own = attend(layer.history, frames, None, lambda i, j: rows[j][0] <= rows[i][0])
        x = attend(layer.across, attend(layer.among, x), own)
        x = layer.norm(x + layer.ffn.fc2(functional.gelu(layer.ffn.fc1(x))))
    return x


def reference(qformer, frames, pictures=None):
    """The tokens of one clip, window by window.

    Args:
        qformer: in float64.
        frames: `[n, D]`, what the windows are over.
        pictures: the picture of every step, `[p, D]`, or None.
    """
    c = qformer.config
    steps = -(-len(frames) // c.step)
    rows = []  # of every step
    for s in range(steps):
        heard = qformer.embed(frames[s * c.step : (s + 1) * c.step])
        if c.video == "none":
            rows.append([(p, qformer.frame_norm(v)) for p, v in enumerate(heard)])
            continue
        shown = [] if pictures[s] is None else qformer.embed_picture(pictures[s])
        none = torch.zeros(c.width, dtype=torch.float64)
        pairs = itertools.zip_longest(heard, shown, fillvalue=none)
        rows.append([(p, qformer.frame_norm(torch.cat(pair))) for p, pair in enumerate(pairs)])
    levels = []
    for level, (size, queries) in enumerate(c.windows):
        parts = []
        for start in range(0, steps, size // c.step):
            window = rows[start : start + size // c.step]
            held = min(size, len(frames) - start * c.step)
            table = [(s, p, vector) for s, step in enumerate(window) for p, vector in step]
            parts.append(read_window(qformer, level, table, math.ceil(held * queries / size)))
        levels.append(torch.cat(parts))
    return qformer.project(torch.cat(levels, dim=1))


def double(stream):
    return stream.replace(embeds=stream.embeds.double())


@pytest.mark.parametrize(
    "options",
    [
        {"windows": ((6, 2),)},
        {"windows": ((5, 1),), "source": "hidden", "layers": 1},
        {"windows": ((7, 3), (14, 6), (21, 9)), "source": "hidden", "positions": True, "step": 7, "causal": True},
        {"windows": ((4, 2), (6, 3)), "causal": True, "heads": 3, "projector": "two-linear"},
        {"windows": ((7, 2),), "source": "hidden", "halve": True},
        MRC,
    ],
    ids=str,
)
def test_every_window_alone_without_padding(options):
    qformer = make(**options).double()
    stream, context = make_inputs(LENGTHS)
    context.encoder_hidden = double(context.encoder_hidden)
    out = qformer(double(stream), context)
    clips = context.encoder_hidden.split() if qformer.needs else double(stream).split()
    for clip, n, got in zip(clips, LENGTHS, out.split(), strict=True):
        frames = clip.embeds[: 2 * n if qformer.needs else n]
        if qformer.join is not None and n:
            frames = functional.conv1d(frames.T, qformer.join.weight, qformer.join.bias, stride=2).T
        if n:
            torch.testing.assert_close(got.embeds, reference(qformer, frames), rtol=1e-9, atol=1e-9)
        else:
            assert got.lengths == (0,)


def averaged(tokens, m):
    n = len(tokens)
    if n <= m:
        return tokens
    return torch.stack([tokens[i * n // m : (i + 1) * n // m].mean(0) for i in range(m)])


@pytest.mark.parametrize("picture_size", [3, 5, 9])
def test_pictures_beside_the_sound(picture_size):
    qformer = make(**MRC, video="read", picture_size=picture_size).double()
    lengths, generator = (12, 9, 5), torch.Generator().manual_seed(1)
    tokens = (7, 0, 6)
    video = TokenStream(torch.randn(13, HIDDEN_SIZE, generator=generator, dtype=torch.float64), tokens)
    # steps of 0.1 s: four tokens in step 1, two in step 3, one after the clip's end; and in the last clip six at once
    seconds = torch.tensor([0.1, 0.12, 0.15, 0.19, 0.3, 0.31, 9.0] + [0.05] * 6, dtype=torch.float64)
    stream, context = make_inputs(lengths)
    hidden = double(context.encoder_hidden)
    out = qformer(double(stream), Context(encoder_hidden=hidden, video=video, video_seconds=seconds))
    first, second, third = video.embeds[:4], video.embeds[4:6], video.embeds[7:]
    first, third = averaged(first, picture_size), averaged(third, picture_size)
    pictures = [[None, first, first, second, second], [None] * 4, [third, third]]
    for clip, n, shown, got in zip(hidden.split(), lengths, pictures, out.split(), strict=True):
        want = reference(qformer, clip.embeds[: 2 * n], shown)
        torch.testing.assert_close(got.embeds, want, rtol=1e-6, atol=1e-6)  # pictures are averaged in float32


def test_the_picture_of_every_step_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    lengths, steps = (9, 0, 30, 1), (6, 4, 0, 8)
    video = TokenStream(torch.arange(40.0)[:, None], lengths)
    seconds = torch.rand(40, generator=generator) * 4 - 0.5
    pictures, shown = shown_pictures(video, seconds, steps, 0.5, 100)
    tokens = [set(clip.embeds[:, 0].tolist()) for clip in pictures.split()]
    assert sum(pictures.lengths) == 40
    row = 0
    for clip, clip_seconds, count in zip(video.split(), seconds.split(lengths), steps, strict=True):
        step = [math.floor(s / 0.5) for s in clip_seconds.tolist()]
        for s in range(count):
            past = [x for x in step if x <= s]
            want = {t for t, x in zip(clip.embeds[:, 0].tolist(), step, strict=True) if past and x == max(past)}
            assert (set() if shown[row] < 0 else tokens[shown[row]]) == want
            row += 1


def test_no_video_at_all_is_silence_beside_the_sound():
    qformer = make(**MRC, video="read", picture_size=3)
    stream, context = make_inputs((12,))
    none = Context(context.encoder_hidden, video=TokenStream(torch.zeros(0, HIDDEN_SIZE), (0,)))
    none.video_seconds = torch.zeros(0)
    late = Context(context.encoder_hidden, video=context.video, video_seconds=context.video_seconds + 9)
    torch.testing.assert_close(qformer(stream, none).embeds, qformer(stream, late).embeds)
    soon = Context(context.encoder_hidden, video=context.video, video_seconds=context.video_seconds)
    assert not torch.allclose(qformer(stream, none).embeds, qformer(stream, soon).embeds)


def test_what_a_picture_must_be():
    qformer = make(**MRC, video="read", picture_size=3)
    stream, context = make_inputs((12, 3))
    tokens, seconds = context.video, context.video_seconds
    with pytest.raises(ValueError, match="needs 'video_seconds' in its context"):
        qformer(stream, Context(context.encoder_hidden, video=tokens))
    with pytest.raises(ValueError, match=r"qformer: video must hold tokens of width 12 of 2 clips, .* \[3\]"):
        qformer(stream, Context(context.encoder_hidden, video=tokens, video_seconds=seconds[:3]))
    broken = seconds.clone()
    broken[-1] = math.nan
    with pytest.raises(ValueError, match="clip 1 of 2 has NaN or infinite video_seconds"):
        qformer(stream, Context(context.encoder_hidden, video=tokens, video_seconds=broken))
    infinite = tokens.replace(embeds=tokens.embeds / 0)
    with pytest.raises(ValueError, match=r"clip 0 of 2 has NaN or infinite video$"):
        qformer(stream, Context(context.encoder_hidden, video=infinite, video_seconds=seconds))


def test_one_window_alone_equals_the_same_in_a_batch():
    qformer = make(source="hidden", windows=((10, 2),), positions=True, step=5, causal=True)
    stream, context = make_inputs((20, 5))
    whole = qformer(stream, context)
    hidden = context.encoder_hidden.embeds
    for window in range(5):
        part = TokenStream(stream.embeds[5 * window : 5 * window + 5], (5,))
        alone = qformer(part, Context(TokenStream(hidden[10 * window : 10 * window + 10], (10,))))
        torch.testing.assert_close(alone.embeds, whole.embeds[2 * window : 2 * window + 2])


# Slots, sizes and rates -------------------------------------------------------------------------------------------


def places(n, **options):
    stream, context = make_clip(n)
    out = make(**options)(stream, context)
    return out.slots.tolist(), out.sizes.tolist()


def test_slots_and_sizes_by_hand():
    # windows of 6: two queries at 1.5 and 4.5; a tail of 4 begins two shares, of 2 tokens each; one of 2 begins one
    assert places(12, windows=((6, 2),)) == ([1, 4, 7, 10], [3] * 4)
    assert places(10, windows=((6, 2),)) == ([1, 4, 7, 9], [3, 3, 2, 2])
    assert places(8, windows=((6, 2),)) == ([1, 4, 7], [3, 3, 2])
    assert places(2, windows=((6, 2),)) == ([1], [2])
    # 5 states, of which the queries get 2 and 3, centred at 0.625 and 1.875 tokens; then 3 states, 1 and 2 for each
    assert places(4, windows=((5, 2),), source="hidden") == ([0, 1, 2, 3], [1, 1.5, 0.5, 1])
    # the finest resolution says where the outputs are
    assert places(10, windows=((3, 1), (6, 2))) == ([1, 4, 7, 9], [3, 3, 3, 1])
    # dropped: what the coarsest windows do not hold, unless there is no other
    assert places(10, windows=((3, 1), (6, 2)), tail="drop") == ([1, 4], [3, 3])
    assert places(4, windows=((3, 1), (6, 2)), tail="drop") == ([1, 3], [3, 1])


@pytest.mark.parametrize("source", ["tokens", "hidden"])
def test_slots_stay_apart_for_every_window_and_length(source):
    per_token = 1 if source == "tokens" else 2
    for queries in (1, 2, 3, 5):
        for frames in range(per_token * queries, per_token * queries + 7):
            qformer = make(windows=((frames, queries),), source=source, layers=1)
            lengths = tuple(range(26))
            out = qformer(*make_inputs(lengths))
            for n, clip in zip(lengths, out.split(), strict=True):
                assert clip.lengths[0] == math.ceil(n * per_token * queries / frames)
                assert (clip.slots.diff() > 0).all()
                assert ((clip.slots >= 0) & (clip.slots < n)).all()
                assert clip.sizes.sum() == n


def test_keep_ratio_changes_the_windows():
    def windows(name, **options):
        return on_meta(name, **options).config.windows

    assert windows("salmonn", keep_ratio=0.25) == ((8, 1),)
    assert windows("mrc", keep_ratio=0.064) == ((125, 4), (625, 20))
    assert windows("mms-llama", keep_ratio=0.4) == ((500, 100),)
    assert make().config.windows == ((2, 1),)
    with pytest.raises(
        ValueError, match=r"no whole windows give keep_ratio 0.25: .*\(\(125, 16\), \(625, 80\)\).* 0.256"
    ):
        windows("mrc", keep_ratio=0.25)
    with pytest.raises(ValueError, match="give 50 tokens per second; at most one per slot"):
        make(windows=((1, 2),))
    with pytest.raises(ValueError, match="keep_ratio is tokens out"):
        make(keep_ratio=2)


def test_one_set_of_weights_for_windows_of_any_size():
    qformer = make("qformer:salmonn", tail="keep")
    twin = qformer.at(0.25)
    assert twin.config.windows == ((8, 1),)
    assert twin.queries[0] is qformer.queries[0]
    with pytest.raises(ValueError, match="weights of its own for every keep_ratio"):
        make("qformer:favor").at(0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": ((6, 2), (12, 5))}, "all with the same frames per query"),
        ({"windows": ((12, 4), (6, 2))}, "the finest first"),
        ({"windows": ((6, 2), (6, 2))}, "the finest first"),
        ({"windows": ()}, "windows must be pairs"),
        ({"windows": (6, 2)}, "windows must be pairs"),
        ({"windows": ((6, 0),)}, "windows must be a whole number >= 1, got 0"),
        ({"windows": ((6, 1.5),)}, "windows must be a whole number >= 1, got 1.5"),
        ({"windows": ((3, 2),), "source": "hidden"}, "give 33.3333 tokens per second; at most one per slot"),
        ({"windows": ((6, 2),), "step": 4}, "step must divide the frames of every window"),
        ({"step": 0}, "step must be a whole number >= 1, got 0"),
        ({"width": 13}, "width must be a multiple of heads=2, got 13"),
        ({"source": "hidden", "causal": True, "heads": 3}, "causal frames must have a multiple of 3 features, got 8"),
        ({"source": "states"}, "source must be one of 'tokens', 'hidden', got 'states'"),
        ({"video": "both"}, "video must be one of 'none', 'read', got 'both'"),
        ({"video": "read", "source": "hidden"}, "video='read' needs positions=True"),
        ({"video": "read", "positions": True}, "video='read' need source='hidden'"),
        ({"halve": True}, "need source='hidden'"),
        ({"speech_rate": True}, "need source='hidden'"),
        ({"source": "hidden", "speech_rate": True, "windows": ((13, 1),)}, "its windows of whole tokens"),
        ({"source": "hidden", "speech_rate": True, "windows": ((8, 1), (16, 2))}, "needs one resolution"),
        ({"diversity": -0.1}, r"diversity must be in \[0, inf\), got -0.1"),
        ({"dropout": 1}, r"dropout must be in \[0, 1\), got 1"),
        ({"tail": "cut"}, "tail must be one of 'keep', 'drop', got 'cut'"),
        ({"projector": "mlp"}, "projector must be one of 'linear', 'two-linear', got 'mlp'"),
        ({"queries": 3}, "qformer has no option queries"),
    ],
    ids=str,
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_the_towers_width_is_needed():
    with pytest.raises(ValueError, match="needs encoder_size, the width of the audio tower"):
        build("qformer:salmonn", hidden_size=12)


# The diversity loss -----------------------------------------------------------------------------------------------


def test_mean_cosine_by_hand():
    outputs = torch.tensor([[[1.0, 0], [0, 2], [3, 3]], [[1, 0], [5, 0], [7, 7]], [[1, 0], [1, 1], [1, 1]]])
    used = torch.tensor([[True] * 3, [True, True, False], [True, False, False]])
    root = math.sqrt(0.5)
    assert mean_cosine(outputs, used).item() == pytest.approx(((0 + root + root) / 3 + 1) / 2, abs=1e-6)
    assert mean_cosine(outputs[2:], used[2:]) == 0
    assert mean_cosine(outputs[:0], used[:0]) == 0


def test_the_diversity_loss_is_of_the_coarser_resolutions():
    qformer = make(**MRC, diversity=0.5).double()
    stream, context = make_inputs((10,))
    hidden = double(context.encoder_hidden)
    loss = qformer(double(stream), Context(hidden)).losses["diversity"]
    frames = qformer.frame_norm(qformer.embed(hidden.embeds[:20]))
    unit = functional.normalize(read_window(qformer, 1, [(i // 5, i % 5, x) for i, x in enumerate(frames)], 4), dim=1)
    pairs = [(unit[i] @ unit[j]).item() for i, j in itertools.combinations(range(4), 2)]
    assert loss.item() == pytest.approx(0.5 * sum(pairs) / 6, abs=1e-6)
    assert make(**MRC)(stream, context).losses == {}


def test_the_papers_diversity_loss():
    for preset, weight in (("salmonn", 0), ("favor", 0.01), ("mrc", 0.01), ("mrc-three-level", 0.01), ("mms-llama", 0)):
        assert on_meta(preset).config.diversity == weight


# The rate of speech -----------------------------------------------------------------------------------------------


class Rate(torch.nn.Module):
    """A predictor that says what it is told."""

    def __init__(self, *rates):
        super().__init__()
        self.rates = torch.tensor(rates)

    def forward(self, states, lengths):
        self.lengths = list(lengths)
        return self.rates


def mms(*rates):
    qformer = make("qformer:mms-llama")
    qformer.speech_rate = Rate(*rates)
    return qformer


@pytest.mark.parametrize("seconds", [0.04, 0.2, 0.84, 1.6, 7.56, 19.96, 20])
@pytest.mark.parametrize("rate", [0.3, 1, 1.31, 2, 2.5])
def test_queries_follow_the_rate_of_speech(seconds, rate):
    n = round(seconds * 25)
    out = mms(rate)(*make_clip(n))
    # the paper's formula, and never more than one per token
    assert out.lengths == (min(n, max(int(n / 25 * 3 * min(max(rate, 1), 2)), 3)),)
    assert out.sizes.sum() == n


def test_a_long_clip_is_read_in_windows_each_at_its_own_rate():
    qformer = mms(1.0, 1.5, 2.0, 1.0)
    assert qformer.adaptive
    lengths = (1100, 30)
    out = qformer(*make_inputs(lengths))
    assert qformer.speech_rate.lengths == [1000, 1000, 200, 60]
    assert out.lengths == (60 + 90 + 24, 3)
    assert qformer.budget(lengths) == (120 + 120 + 24, 7)
    long = out.split()[0]
    assert long.slots[:60].tolist() == [math.floor((i + 0.5) * 500 / 60) for i in range(60)]
    assert long.slots[60:150].tolist() == [500 + math.floor((i + 0.5) * 500 / 90) for i in range(90)]
    assert long.slots[150:].tolist() == [1000 + math.floor((i + 0.5) * 100 / 24) for i in range(24)]


def test_only_the_queries_that_are_used_count():
    qformer = mms(1.2)
    stream, context = make_clip(100)
    first = qformer(stream, context)
    with torch.no_grad():
        qformer.queries[0][14:] += 1
    assert first.lengths == (14,)
    assert torch.equal(qformer(stream, context).embeds, first.embeds)


def test_an_untrained_predictor_says_one():
    qformer = make("qformer:mms-llama")
    stream, context = make_inputs((600, 0, 5))
    assert qformer.predict_rate(context.encoder_hidden).tolist() == [1, 1, 1]
    without = make("qformer:mms-llama", speech_rate=False)
    assert qformer(stream, context).lengths == (72, 0, 3)
    assert without.budget((600,)) == (72,)
    with pytest.raises(ValueError, match="with speech_rate=True only"):
        without.predict_rate(context.encoder_hidden)


def test_the_predictor_hears_a_clip_alone():
    torch.manual_seed(0)
    predictor = SpeechRate(6, width=32, ffn_size=16).eval()
    torch.nn.init.normal_(predictor.head.weight)
    lengths = (1, 40, 7, 700)
    states = torch.randn(sum(lengths), 6)
    together = predictor(states, lengths)
    assert len({round(x, 4) for x in together.tolist()}) == 4
    for one, clip in zip(together, states.split(lengths), strict=True):
        torch.testing.assert_close(predictor(clip, [len(clip)])[0], one, rtol=1e-4, atol=1e-5)
        every_fourth = clip.clone()
        every_fourth[torch.arange(len(clip)) % 4 > 0] = 9
        torch.testing.assert_close(predictor(every_fourth, [len(clip)])[0], one, rtol=1e-4, atol=1e-5)
    assert predictor(states[:0], []).shape == (0,)


def test_the_predictor_learns_how_often_something_changes():
    generator = torch.Generator().manual_seed(0)
    rates = 1 + torch.rand(64, generator=generator)
    time = torch.arange(200) / 50
    phases = torch.rand(64, generator=generator) * 6
    waves = [torch.sin(6 * r * time + p) for r, p in zip(rates, phases, strict=True)]
    states = [torch.stack((wave, wave * 0 + 1), dim=1) for wave in waves]
    torch.manual_seed(0)
    predictor = SpeechRate(2, width=32, ffn_size=32)
    assert not any(p.requires_grad for p in predictor.parameters())
    losses = train_speech_rate(predictor, states[:48], rates[:48], 120, learning_rate=3e-3)
    assert losses[0] == pytest.approx(((rates - 1) ** 2).mean().item(), rel=0.5)
    assert not any(p.requires_grad for p in predictor.parameters())
    said = predictor(torch.cat(states[48:]), [200] * 16)
    held_out = rates[48:]
    assert ((said - held_out) ** 2).mean() < 0.3 * held_out.var()
    with pytest.raises(ValueError, match=r"one rate per utterance, got \[3\] for 2"):
        train_speech_rate(predictor, states[:2], rates[:3], 1)


def test_relative_rates_by_hand():
    # 1, 2 and 6 words per second: their mean is 3
    assert relative_rates([2, 2, 12], [2, 1, 2]).tolist() == [1, 1, 2]
    torch.testing.assert_close(relative_rates([2, 2, 3], [2, 1, 1]), torch.tensor([1, 1, 1.5]))
    for words, seconds in (([1], []), ([1], [0.0]), ([0], [1.0]), ([], [])):
        with pytest.raises(ValueError, match="rates need words and positive seconds"):
            relative_rates(words, seconds)


# In the model -----------------------------------------------------------------------------------------------------


def test_the_predictor_is_never_trained_by_the_llm_but_saved_with_the_rest(fresh_thinker, tmp_path):
    torch.manual_seed(0)
    qformer = build("qformer:mms-llama", hidden_size=32, encoder_size=24, **SMALL)
    model = CompressedOmni(fresh_thinker, qformer, base="tiny")
    model.set_trainable({"compressor"})
    predictor = {f"speech_rate.{name}" for name, _ in qformer.speech_rate.named_parameters()}
    assert qformer.frozen == predictor
    assert {name for name, p in qformer.named_parameters() if not p.requires_grad} == predictor
    b = Batch(0)
    b.add(b.text(3), b.audio(203), b.text(4))
    batch = b.build()
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    for name, parameter in qformer.named_parameters():
        assert (parameter.grad is None) == (name in predictor), name
    model.save_pretrained(tmp_path)
    saved = load_file(next(tmp_path.glob("*.safetensors")))
    assert {f"compressor.{name}" for name in predictor} <= set(saved)
    chain = Chain([qformer, build("pooling", hidden_size=32)])
    assert chain.frozen == {f"members.0.{name}" for name in predictor}
