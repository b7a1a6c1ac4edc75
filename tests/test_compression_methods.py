"""Each method against a reference written out in loops or by hand, and against its paper's numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from audiopress import Chain, Compressor, Context, TokenStream, available, build
from audiopress.compression import base, registry, token_budget
from audiopress.compression.base import parameter_count
from audiopress.kernels import segment_centres, segment_mean, segment_softmax, unfold

from .compression_cases import ENCODER_SIZE, HIDDEN_SIZE, make_context, make_stream

LENGTHS = (7, 0, 1, 12, 2)
SIZES = {"hidden_size": HIDDEN_SIZE, "encoder_size": ENCODER_SIZE}


def make(name: str, **options) -> Compressor:
    torch.manual_seed(0)
    return build(name, **SIZES, **options).eval()


def on_meta(name: str, hidden_size: int, encoder_size: int, **options) -> int:
    with torch.device("meta"):
        return parameter_count(build(name, hidden_size=hidden_size, encoder_size=encoder_size, **options))


def clips_of(compressor: Compressor) -> list[torch.Tensor]:
    """The frames of every clip that the compressor reads, `[n, D]` each."""
    if compressor.needs:
        hidden = make_context(LENGTHS).encoder_hidden.split()
        return [clip.embeds[: 2 * n] for clip, n in zip(hidden, LENGTHS, strict=True)]
    return [clip.embeds for clip in make_stream(LENGTHS).split()]


def windows_of(n: int, k: int, tail: str = "keep") -> list[list[int]]:
    windows = [list(range(i, min(i + k, n))) for i in range(0, n, k)]
    return windows[:-1] if tail == "drop" and len(windows) > 1 and len(windows[-1]) < k else windows


def even_windows_of(n: int, m: int) -> list[list[int]]:
    return [list(range(i * n // m, (i + 1) * n // m)) for i in range(m)]


def check(compressor: Compressor, windows: list[list[list[int]]], pool) -> None:
    """Compares with `pool(frames of a window)` for every window (a list of frame indices) of every clip."""
    out = compressor(make_stream(LENGTHS), make_context(LENGTHS)).split()
    per_token = 2 if compressor.needs else 1
    for clip, frames, groups in zip(out, clips_of(compressor), windows, strict=True):
        assert clip.lengths == (len(groups),)
        for i, group in enumerate(groups):
            torch.testing.assert_close(clip.embeds[i], pool(frames[group]), rtol=1e-5, atol=1e-6)
            assert clip.sizes[i] == len(group) / per_token
            assert clip.slots[i] == sum(f // per_token for f in group) // len(group)


# Stacking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["tokens", "hidden"])
@pytest.mark.parametrize("tail", ["keep", "drop"])
@pytest.mark.parametrize("combine", ["stack", "mean"])
def test_stacking_is_the_mlp_of_each_window(source, tail, combine):
    k = 5
    stacking = make("stacking", source=source, k=k, tail=tail, combine=combine, mlp_size=16, norm=True)

    def pool(frames):
        x = (
            frames.mean(0)
            if combine == "mean"
            else torch.cat([*frames, *torch.zeros(k - len(frames), frames.shape[1])])
        )
        x = stacking.mlp.fc2(torch.relu(stacking.mlp.fc1(x)))
        return functional.layer_norm(x, (HIDDEN_SIZE,))

    check(stacking, [windows_of(len(x), k, tail) for x in clips_of(stacking)], pool)


@pytest.mark.parametrize(
    ("preset", "encoder_size", "count"),
    [("slam-asr", 1024, 18_880_512), ("slam-asr", 1280, 21_501_952), ("llama-omni", 1280, 21_501_952)],
)
def test_stacking_has_the_papers_parameters(preset, encoder_size, count):
    assert on_meta(f"stacking:{preset}", 4096, encoder_size) == count


# Pooling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", ["keep", "drop"])
@pytest.mark.parametrize("kind", ["mean", "max"])
def test_pooling_fixed_windows(kind, tail):
    pooling = make("pooling", k=3, kind=kind, tail=tail)
    pool = {"mean": lambda x: x.mean(0), "max": lambda x: x.amax(0)}[kind]
    check(pooling, [windows_of(n, 3, tail) for n in LENGTHS], pool)


@pytest.mark.parametrize("keep_ratio", [0.9, 0.4, 0.05])
def test_pooling_even_windows(keep_ratio):
    windows = [even_windows_of(n, m) for n, m in zip(LENGTHS, token_budget(LENGTHS, keep_ratio), strict=True)]
    check(make("pooling", keep_ratio=keep_ratio), windows, lambda x: x.mean(0))


@pytest.mark.parametrize("keep_ratio", [1, 0.7, 0.3])
def test_pooling_of_the_towers_states(keep_ratio):
    pooling = make("pooling", source="hidden", keep_ratio=keep_ratio)
    windows = [even_windows_of(2 * n, m) for n, m in zip(LENGTHS, token_budget(LENGTHS, keep_ratio), strict=True)]
    check(pooling, windows, lambda x: pooling.project(x.mean(0)))


def test_attentive_pooling():
    pooling = make("pooling", k=3, kind="attentive")
    windows = [windows_of(n, 3) for n in LENGTHS]
    check(pooling, windows, lambda x: x.mean(0))  # the query starts at zero
    torch.nn.init.normal_(pooling.query)
    check(pooling, windows, lambda x: (x @ pooling.query / math.sqrt(HIDDEN_SIZE)).softmax(0) @ x)


def test_pooling_weights_by_size():
    stream = TokenStream(torch.tensor([[0.0], [4.0]]), (2,), torch.tensor([2, 9]), torch.tensor([3.0, 1.0]))
    for kind in ("mean", "attentive"):
        out = build("pooling", hidden_size=1, k=2, kind=kind)(stream)
        assert (out.embeds.tolist(), out.slots.tolist(), out.sizes.tolist()) == ([[1.0]], [3], [4.0])  # 15/4 -> 3


# Convolution ------------------------------------------------------------------------------------------------------


def convolve(clip: torch.Tensor, conv, stride: int, pad: tuple[int, int]) -> torch.Tensor:
    x = functional.pad(clip.T, pad)
    return functional.conv1d(x, conv.weight, conv.bias, stride=stride).T


def check_conv(compressor: Compressor, reference) -> None:
    out = compressor(make_stream(LENGTHS), make_context(LENGTHS)).split()
    for clip, frames, n in zip(out, clips_of(compressor), LENGTHS, strict=True):
        if n:
            torch.testing.assert_close(clip.embeds, reference(frames), rtol=1e-5, atol=1e-6)


def test_speechverse():
    speechverse = make("conv:speechverse")
    assert speechverse.config.strides == (2, 2)

    def reference(x):
        for conv, norm in zip(speechverse.convs, speechverse.norms, strict=True):
            x = norm(convolve(x, conv, stride=2, pad=(1, 1)))
        return x

    check_conv(speechverse, reference)


def test_lucy():
    lucy = make("conv:lucy")

    def reference(x):
        x = convolve(x, lucy.convs[0], stride=2, pad=(0, 4))
        return lucy.project(lucy.norms[0](x).relu())

    check_conv(lucy, reference)


def test_osum():
    osum = make("conv:osum", ffn_size=16)

    def reference(x):
        for conv, stride in zip(osum.convs, (1, 2, 2), strict=True):
            x = functional.gelu(convolve(x, conv, stride, pad=(2, 0)))
        x = osum.transformer.embed(x) * math.sqrt(ENCODER_SIZE)
        for t in range(len(x)):
            for i in range(0, ENCODER_SIZE, 2):
                x[t, i] += math.sin(t / 10000 ** (i / ENCODER_SIZE))
                x[t, i + 1] += math.cos(t / 10000 ** (i / ENCODER_SIZE))
        return osum.project(osum.transformer.layers(x, (len(x),)))

    with torch.no_grad():
        check_conv(osum, reference)


def test_convolution_places_tokens_on_their_stride():
    out = make("conv:osum", ffn_size=16)(make_stream((7,)), make_context((7,)))
    assert (out.slots.tolist(), out.sizes.tolist()) == ([0, 2, 4, 6], [2, 2, 2, 1])


def test_osum_is_causal_and_speechverse_is_not():
    for preset, first_changed in (("osum", 2), ("speechverse", 1)):
        conv, stream, context = make(f"conv:{preset}", **({"layers": 0} if preset == "osum" else {})), *both((9,))
        hidden = context.encoder_hidden
        changed = hidden.embeds.clone()
        changed[5] += 1  # read by outputs at frames 4 (window of 4) and later
        moved = (conv(stream, Context(hidden.replace(embeds=changed))).embeds - conv(stream, context).embeds).abs()
        assert moved.sum(1).nonzero()[0] == first_changed, preset


def both(lengths):
    return make_stream(lengths), make_context(lengths)


def test_osum_has_its_parameters():
    conv = 3 * (3 * 1024 * 1024 + 1024)
    embed = 1024 * 1024 + 1024 + 2048
    layer = 4 * (1024 * 1024 + 1024) + (2 * 1024 * 2560 + 2560 + 1024) + 2 * 2048
    assert on_meta("conv:osum", 3584, 1024) == conv + embed + 4 * layer + 2048 + (1024 * 3584 + 3584) == 51_963_392


# Controls ---------------------------------------------------------------------------------------------------------


def test_uniform_stride_takes_the_middles():
    out = make("uniform-stride", keep_ratio=0.3)(make_stream((10, 4, 1)))
    assert out.lengths == (3, 1, 1)
    assert out.slots.tolist() == [1, 5, 8, 2, 0]
    assert torch.equal(out.embeds, make_stream((10, 4, 1)).embeds[[1, 5, 8, 12, 14]])


def test_random_draws_follow_seed_and_length_only():
    random = make("random", keep_ratio=0.5)

    def drawn(lengths, seed):
        return [clip.slots.tolist() for clip in random(make_stream(lengths), Context(seed=seed)).split()]

    first = drawn((40, 6, 40), seed=1)
    assert first[0] == first[2] == drawn((40,), seed=1)[0] == drawn((3, 40), seed=1)[1]
    assert first[0] != drawn((40,), seed=2)[0]
    assert first[0] != [2 * slot for slot in range(20)]
    hits = torch.zeros(10)
    for seed in range(400):
        hits[drawn((10,), seed)[0]] += 1
    assert (hits - 200).abs().max() < 50  # five standard deviations


# Rates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "per_second"),
    [
        ("none", 25),
        ("random", 12.5),
        ("uniform-stride", 12.5),
        ("stacking", 12.5),
        ("stacking:slam-asr", 10),
        ("stacking:llama-omni", 10),
        ("stacking:llama-avsr", 50 / 3),
        ("pooling", 12.5),
        ("pooling:qwen2-audio", 25),
        ("pooling:qwen2.5-omni", 12.5),
        ("conv", 12.5),
        ("conv:speechverse", 12.5),
        ("conv:osum", 12.5),
        ("conv:lucy", 12.5),
    ],
)
def test_rates(name, per_second):
    assert 25 * make(name).config.keep_ratio == pytest.approx(per_second)
    assert make(name).budget((30 * 25,))[0] == round(30 * per_second)


@pytest.mark.parametrize(
    ("name", "options", "resolved"),
    [
        ("stacking", {"keep_ratio": 0.2}, {"k": 5, "keep_ratio": 0.2}),
        ("stacking", {"keep_ratio": 0.333333}, {"k": 3, "keep_ratio": 1 / 3}),
        ("stacking", {"keep_ratio": 0.4, "k": 5, "source": "hidden"}, {"k": 5, "keep_ratio": 0.4}),
        ("stacking:slam-asr", {"keep_ratio": 0.25}, {"k": 8, "keep_ratio": 0.25, "source": "hidden"}),
        ("stacking:slam-asr", {"source": "tokens"}, {"k": 5, "keep_ratio": 0.2}),
        ("pooling:qwen2.5-omni", {"keep_ratio": 0.37}, {"k": None, "keep_ratio": 0.37}),
        ("conv", {"keep_ratio": 1 / 6}, {"strides": (2, 3)}),
        ("conv", {"strides": [3]}, {"strides": (3,), "keep_ratio": 1 / 3}),
        ("conv", {"keep_ratio": 1}, {"strides": (1,)}),
        ("conv:speechverse", {"source": "tokens"}, {"strides": (2,), "keep_ratio": 0.5}),
        ("conv:osum", {"keep_ratio": 0.25}, {"strides": (2, 2, 2), "stem": 1}),
        ("conv:lucy", {"source": "hidden", "keep_ratio": 0.4}, {"strides": (5,)}),
    ],
)
def test_rate_and_window_follow_from_one_another(name, options, resolved):
    config = make(name, **options).config
    for key, value in resolved.items():
        assert getattr(config, key) == (pytest.approx(value) if isinstance(value, float) else value)


# Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(available()))
@pytest.mark.parametrize("keep_ratio", [0, 1.5, -0.5, math.nan, "0.5", True])
def test_keep_ratio_must_be_a_ratio(name, keep_ratio):
    with pytest.raises(ValueError, match=r"keep_ratio is tokens out / tokens in and must be in \(0, 1\], got"):
        make(name, keep_ratio=keep_ratio)


@pytest.mark.parametrize("name", sorted(available()))
@pytest.mark.parametrize("value", ["loud", -2, math.nan, math.inf, [], {}], ids=repr)
def test_every_option_says_what_it_cannot_be(name, value):
    for option in available()[name].options:
        if (option, value) != ("strides", []):  # no strides: nothing is shortened
            with pytest.raises(ValueError, match=option if option in ("keep_ratio", "k") else f"{option} "):
                make(name, **{option: value})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("staking", {}, "unknown method 'staking'; there are affinity, .*; did you mean 'stacking'"),
        ("Stacking", {}, "unknown method 'Stacking'"),
        ("conv:ossum", {}, "unknown preset of conv 'ossum'; there are lucy, osum, speechverse; did you mean 'osum'"),
        ("conv:", {}, "unknown preset of conv ''"),
        ("none:x", {}, "unknown preset of none 'x'; there are none"),
        (
            "pooling",
            {"kk": 2},
            "pooling has no option kk; its options are keep_ratio, norm_pres.*, k, kind, tail",
        ),
        ("none", {"keep_ratio": 0.5}, "none keeps every token: keep_ratio must be 1, got 0.5"),
        ("stacking", {"keep_ratio": 0.3}, r"nearby are 0.5 \(2 frames\), 0.333333 \(3 frames\), 0.25 \(4 frames\)"),
        ("stacking", {"keep_ratio": 0.7}, r"nearby are 1 \(1 frames\), 0.5 \(2 frames\)"),
        ("stacking", {"keep_ratio": 0.5, "k": 3}, "k gives keep_ratio 0.333333 .* but keep_ratio is 0.5"),
        ("pooling", {"keep_ratio": 0.5, "k": 3}, "k gives keep_ratio 0.333333 .* but keep_ratio is 0.5"),
        ("conv", {"keep_ratio": 0.5, "strides": (3,)}, "strides gives keep_ratio 0.333333"),
        ("stacking", {"source": "hidden", "k": 1}, "k gives 50 tokens per second .* at most one per slot, 25"),
        ("conv:osum", {"strides": (1,)}, "strides gives 50 tokens per second"),
        ("stacking", {"k": 0}, "k must be a whole number >= 1, got 0"),
        ("stacking", {"k": 2.0}, "k must be a whole number >= 1, got 2.0"),
        ("stacking", {"tail": "cut"}, "tail must be one of 'keep', 'drop', got 'cut'"),
        ("stacking", {"source": "mel"}, "source must be one of 'tokens', 'hidden', got 'mel'"),
        ("pooling", {"kind": "median"}, "kind must be one of 'mean', 'max', 'attentive', got 'median'"),
        ("pooling", {"keep_ratio": 0.5, "tail": "drop"}, "tail='drop' needs k"),
        ("conv", {"keep_ratio": 0.2}, "kernel_size must be a whole number >= 5, got 3"),
        ("conv:osum", {"heads": 3}, "multiple of heads=3, got 8"),
        ("pooling+staking", {}, "unknown method 'staking'"),
        ("pooling+stacking", {"keep_ratio": 0.5}, r"one mapping per method \(pooling, stacking\), got keep_ratio=0.5"),
        ("pooling+pooling", {}, "names a method twice"),
    ],
)
def test_errors_name_what_is_allowed(name, options, message):
    with pytest.raises(ValueError, match=message):
        make(name, **options)


def test_hidden_source_needs_the_towers_width():
    with pytest.raises(ValueError, match="stacking with source='hidden' needs encoder_size"):
        build("stacking:slam-asr", hidden_size=HIDDEN_SIZE)


def test_registration(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    class Mine(Compressor):
        config_class = base.CompressorConfig

    assert registry.register("mine")(Mine) is Mine
    assert isinstance(make("mine", keep_ratio=0.5), Mine)
    with pytest.raises(ValueError, match="'mine' is registered already, by Mine"):
        registry.register("mine")(Mine)
    with pytest.raises(ValueError, match="made of a-z, 0-9 and hyphens, got 'My_Own'"):
        registry.register("My_Own")(Mine)


def test_available_says_what_a_method_is():
    info = available()["stacking"]
    assert info.presets == ("slam-asr", "llama-omni", "llama-avsr")
    assert (info.stage, info.trained, info.query_aware, info.keep_ratio) == ("connector", True, False, 0.5)
    assert info.options["mlp_size"] == 2048
    assert not available()["pooling"].trained
    assert make("pooling", kind="attentive").trained


# Chain ------------------------------------------------------------------------------------------------------------


def test_chain_composes_slots_sizes_and_budgets():
    chain = Chain([make("uniform-stride", keep_ratio=0.5), make("pooling", k=2)])
    out = chain(make_stream((12, 5)))
    # uniform-stride keeps 1 3 5 7 9 11 and 0 2 4 (3 of 5: 2.5 rounds up); pairs of them are pooled
    assert out.slots.tolist() == [2, 6, 10, 1, 4]
    assert out.sizes.tolist() == [2, 2, 2, 2, 1]
    assert out.lengths == chain.budget((12, 5)) == (3, 2)
    assert chain.config.keep_ratio == 0.25
    assert chain.name == "uniform-stride+pooling"
    x = make_stream((12, 5)).embeds
    torch.testing.assert_close(out.embeds[1], (x[5] + x[7]) / 2)


def test_chain_merges_merged_tokens():
    out = build("pooling+stacking", hidden_size=HIDDEN_SIZE, pooling={"k": 3}, stacking={"k": 2, "mlp_size": 4})(
        make_stream((8,))
    )
    # pooling: slots 1 4 6, sizes 3 3 2; stacking: (1 * 3 + 4 * 3) / 6 = 2.5 -> 2
    assert (out.slots.tolist(), out.sizes.tolist()) == ([2, 6], [6, 2])


def test_chain_knows_its_members():
    chain = Chain([make("stacking:slam-asr", mlp_size=4), make("random")])
    assert chain.needs == {"encoder_hidden", "seed"}
    assert chain.trained
    assert [member["name"] for member in chain.describe()["members"]] == ["stacking", "random"]


def test_chain_errors():
    with pytest.raises(ValueError, match="at least one"):
        Chain([])
    with pytest.raises(ValueError, match=r"stacking reads encoder_hidden.*must be the first.*got it after random"):
        Chain([make("random"), make("stacking:slam-asr")])
    with pytest.raises(ValueError, match="share one hidden_size, got random 12, random 4"):
        Chain([make("random"), build("random", hidden_size=4)])


# Kernels ----------------------------------------------------------------------------------------------------------


def test_segment_mean_and_softmax():
    torch.manual_seed(0)
    x, weights, counts = torch.randn(6, 3), torch.rand(6) + 0.1, torch.tensor([3, 1, 2])
    mean, share = segment_mean(x, weights, counts), segment_softmax(weights * 100, counts)
    for i, (a, b) in enumerate([(0, 3), (3, 4), (4, 6)]):
        torch.testing.assert_close(mean[i], (weights[a:b, None] * x[a:b]).sum(0) / weights[a:b].sum())
        torch.testing.assert_close(share[a:b], (weights[a:b] * 100).softmax(0))
    assert torch.equal(mean[1], x[3])
    logits = weights.requires_grad_(True)
    probe = torch.randn(6)
    (segment_softmax(logits, counts) * probe).sum().backward()
    got, logits.grad = logits.grad, None
    sum((logits[a:b].softmax(0) * probe[a:b]).sum() for a, b in [(0, 3), (3, 4), (4, 6)]).backward()
    torch.testing.assert_close(got, logits.grad)


def test_segment_mean_accumulates_in_fp32():
    ones = torch.ones(1000, 2, dtype=torch.bfloat16)
    assert torch.equal(segment_mean(ones, torch.ones(1000), torch.tensor([1000])), ones[:1])


def test_segment_centres_are_exact_for_long_clips():
    n = 90_001  # an hour at 25 per second: the sum of its slots is beyond 2**24, where fp32 has no odd numbers
    slots, sizes = segment_centres(torch.arange(n), torch.ones(n), torch.tensor([n]))
    assert (slots.tolist(), sizes.tolist()) == ([n // 2], [n])


def test_unfold_stays_in_the_clip():
    x = torch.arange(1.0, 6.0)[:, None]  # clips 1 2 3 | | 4 5
    got = unfold(x, (3, 0, 2), size=3, stride=2, windows=(2, 0, 1), before=1)[..., 0]
    assert got.tolist() == [[0, 1, 2], [2, 3, 0], [0, 4, 5]]
