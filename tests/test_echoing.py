"""EchoingPixels: CS2 against transformers' own decoder layer, selection against loops and by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as qwen

from audiopress import Context, TokenStream, build
from audiopress.compression.base import LLMShape, Prompt, Scene
from audiopress.compression.cs2 import CS2, rotary_angles

from .compression_cases import HIDDEN_SIZE, LLM, make_clip, make_inputs
from .tiny import tiny_config

LENGTHS = (37, 0, 1, 80, 2)
SHAPE = LLMShape(heads=4, kv_heads=2, head_size=8, mlp_size=48, rope_theta=1e4, rope_sections=(2, 1, 1))


def make(name: str = "echoing", llm: LLMShape = LLM, **options):
    torch.manual_seed(0)
    return build(name, hidden_size=HIDDEN_SIZE, llm=llm, **{"layers": 1} | options).eval()


def text_model(sections=SHAPE.rope_sections, layers: int = 2):
    """Transformers' LLM of the shape `SHAPE`, with weights that tell one position from another."""
    torch.manual_seed(0)
    config = tiny_config().text_config
    config.update(
        {
            "hidden_size": HIDDEN_SIZE,
            "num_hidden_layers": layers,
            "layer_types": ["full_attention"] * layers,
            "num_attention_heads": SHAPE.heads,
            "num_key_value_heads": SHAPE.kv_heads,
            "head_dim": SHAPE.head_size,
            "intermediate_size": SHAPE.mlp_size,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": SHAPE.rope_theta,
                "mrope_section": list(sections),
            },
        }
    )
    config._attn_implementation = "eager"
    model = qwen.Qwen2_5OmniThinkerTextModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def whole_sequences(stream: TokenStream, context: Context):
    """The prompt and the tokens of every sample as CS2 reads them: `[L, D]`, `[3, L]`."""
    prompt, scene = context.prompt, context.scene
    parts = zip(
        prompt.stream.split(),
        prompt.positions.split(prompt.stream.lengths, dim=1),
        stream.split(),
        scene.positions.split(stream.lengths, dim=1),
        strict=True,
    )
    return [(torch.cat([a.embeds, b.embeds]), torch.cat([p, q], dim=1)) for a, p, b, q in parts]


# CS2 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sections", [(2, 1, 1), (1, 1, 1, 1), (4, 0, 0)])
def test_angles_are_transformers(sections):
    rotary = text_model(sections).rotary_emb
    positions = torch.randint(0, 8000, (3, 2, 50))
    cos, sin = rotary(torch.empty(0), positions)
    angles = rotary_angles(positions, SHAPE, sections)
    torch.testing.assert_close(angles.cos(), cos, rtol=0, atol=1e-3)  # the angles are thousands: float32 has no more
    torch.testing.assert_close(angles.sin(), sin, rtol=0, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("sections", [(2, 1, 1), (1, 1, 1, 1)])
def test_cs2_is_transformers_decoder_without_its_mask(sections):
    model = text_model(sections)
    cs2 = CS2(HIDDEN_SIZE, SHAPE, 2, sections)
    for mine, its in zip(cs2.layers, model.layers, strict=True):
        mine.load_state_dict(its.state_dict())
    embeds, positions = torch.randn(3, 20, HIDDEN_SIZE), torch.randint(0, 90, (3, 3, 20))
    want, rotary = embeds, model.rotary_emb(embeds, positions)
    for layer in model.layers:  # eager attention without a mask: every token reads every other
        want = layer(want, attention_mask=None, position_embeddings=rotary)
    real = torch.ones(3, 20, dtype=torch.bool)
    torch.testing.assert_close(cs2(embeds, positions, real), want, rtol=1e-5, atol=1e-5)

    padded = torch.nn.functional.pad(embeds, (0, 0, 0, 4), value=9.0)
    got = cs2(padded, torch.nn.functional.pad(positions, (0, 4)), torch.nn.functional.pad(real, (0, 4)))
    torch.testing.assert_close(got[:, :20], want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_samples_states_are_those_of_its_sequence_alone():
    stream, context = make_inputs(LENGTHS)
    echoing = make(keep_ratio=0.4, layers=2)
    out = echoing(stream, context)
    prompts = out.prompt.split(context.prompt.stream.lengths)
    for i, ((embeds, positions), clip, prompt) in enumerate(
        zip(whole_sequences(stream, context), out.split(), prompts, strict=True)
    ):
        shuffle = torch.randperm(len(embeds))  # no causal mask: the order does not matter, positions do
        hidden = torch.empty_like(embeds)
        real = torch.ones(1, len(embeds), dtype=torch.bool)
        hidden[shuffle] = echoing.cs2(embeds[None, shuffle], positions[:, None, shuffle], real)[0]
        text = len(prompt)
        want = hidden[:text] if LENGTHS[i] else embeds[:text]
        torch.testing.assert_close(prompt, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(clip.embeds, hidden[text:][clip.slots], rtol=1e-5, atol=1e-5)


def test_initialize_copies_the_first_layers():
    model = text_model(layers=3)
    echoing = make(llm=SHAPE, layers=2)
    echoing.initialize(model)
    for mine, its in zip(echoing.cs2.layers, model.layers, strict=False):
        theirs = its.state_dict()
        assert mine.state_dict().keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in mine.state_dict().items())
    before = model.layers[0].mlp.up_proj.weight.clone()
    with torch.no_grad():
        echoing.cs2.layers[0].mlp.up_proj.weight.zero_()
    assert torch.equal(model.layers[0].mlp.up_proj.weight, before), "a copy, not the LLM's own"
    with pytest.raises(ValueError, match="echoing has 4 layers, but the LLM only 3 to copy"):
        make(llm=SHAPE, layers=4).initialize(model)


# Selection --------------------------------------------------------------------------------------------------------


def scores_of(echoing, stream, context) -> torch.Tensor:
    states = [
        echoing.cs2(embeds[None], positions[:, None], torch.ones(1, len(embeds), dtype=torch.bool))[0, -n:]
        for (embeds, positions), n in zip(whole_sequences(stream, context), stream.lengths, strict=True)
        if n
    ]
    return echoing.score(echoing.scorer(torch.cat(states))).squeeze(1)


@torch.no_grad()
@pytest.mark.parametrize("keep_ratio", [0.05, 0.3, 1.0])
def test_single_pool_keeps_the_best_of_a_sample(keep_ratio):
    stream, context = make_inputs(LENGTHS)
    echoing = make(keep_ratio=keep_ratio)
    out = echoing(stream, context)
    scores = scores_of(echoing, stream, context).split(stream.lengths)
    assert out.lengths == echoing.budget(LENGTHS)
    for clip, score, m in zip(out.split(), scores, out.lengths, strict=True):
        assert clip.slots.tolist() == sorted(score.argsort(descending=True, stable=True)[:m].tolist())
        assert (clip.sizes == 1).all()


@torch.no_grad()
@pytest.mark.parametrize("weight", [1, 4.0])
@pytest.mark.parametrize("keep_ratio", [0.05, 0.31, 1.0])
def test_windows_keep_the_best_of_each_modality(keep_ratio, weight):
    stream, context = make_inputs(LENGTHS)
    echoing = make("echoing:per-window", keep_ratio=keep_ratio, window_seconds=0.4, audio_weight=weight)
    out = echoing(stream, context)
    assert out.lengths == echoing.budget(LENGTHS)
    scores, scene = scores_of(echoing, stream, context), context.scene
    time, kept = scene.positions[0] - 10, torch.zeros(len(scores), dtype=torch.bool)
    kept[out.slots + stream.offsets[out.clips]] = True
    for clip, total in enumerate(out.lengths):
        mine = stream.clips == clip
        counts = [int((mine & (scene.is_video == kind)).sum()) for kind in (False, True)]
        for kind in (False, True):
            pool = mine & (scene.is_video == kind)
            got = int((kept & pool).sum())
            if weight == 1 and total:
                assert abs(got - total * counts[kind] / sum(counts)) < 1
            for window in range(int(time.max()) // 10 + 1):
                span = pool & (time // 10 == window)
                n, m = int(span.sum()), int((kept & span).sum())
                assert not n or abs(m - got * n / counts[kind]) < 1
                best = scores[span].argsort(descending=True, stable=True)[:m].sort().values
                assert torch.equal(kept[span].nonzero()[:, 0], best)


def test_audio_may_keep_a_larger_share():
    stream, context = make_inputs((120,))  # 80 of audio, 40 of video
    for weight, audio in ((1, 20), (4, 27), (1e6, 30)):  # 30 x 80 / 120; 30 x 320 / 360 = 26.7
        out = make("echoing:per-window", keep_ratio=0.25, audio_weight=weight)(stream, context)
        assert int((~context.scene.is_video[out.slots]).sum()) == audio


@pytest.mark.parametrize("name", ["echoing", "echoing:per-window"])
@pytest.mark.parametrize("kind", ["audio", "video", "no scene"])
@pytest.mark.parametrize("n", [1, 2, 3, 50])
def test_one_modality_alone_and_tiny_samples(name, kind, n):
    stream, context = make_clip(n)
    scene = dataclasses.replace(context.scene, is_video=torch.full((n,), kind == "video"))
    context = dataclasses.replace(context, scene=None if kind == "no scene" else scene)
    for keep_ratio in (0.01, 0.5, 1.0):
        echoing = make(name, keep_ratio=keep_ratio)
        assert echoing(stream, context).lengths == echoing.budget((n,))


def test_audio_alone_is_a_scene_from_position_zero():
    stream, context = make_clip(30)
    out = make()(stream, dataclasses.replace(context, scene=None))
    want = make()(stream, dataclasses.replace(context, scene=Scene.of_audio(stream)))
    assert torch.equal(out.embeds, want.embeds)


def test_silence_keeps_the_earliest():
    context = make_clip(40)[1]
    flat = torch.zeros(3, 40, dtype=torch.long)
    silent = dataclasses.replace(context, scene=dataclasses.replace(context.scene, positions=flat))
    out = make(keep_ratio=0.1)(TokenStream(torch.zeros(40, HIDDEN_SIZE), (40,)), silent)
    assert out.slots.tolist() == [0, 1, 2, 3]


# The prompt -------------------------------------------------------------------------------------------------------


def test_the_prompt_is_rewritten_and_a_sample_of_text_alone_is_not():
    stream, context = make_inputs((20, 0))
    out = make()(stream, context)
    before, after = (x.split(context.prompt.stream.lengths) for x in (context.prompt.stream.embeds, out.prompt))
    assert out.prompt.shape == context.prompt.stream.embeds.shape
    assert (before[0] != after[0]).any(dim=1).all()
    assert torch.equal(before[1], after[1])
    nothing = make()(*make_inputs((0, 0)))
    assert torch.equal(nothing.prompt, make_inputs((0, 0))[1].prompt.stream.embeds)


def test_the_question_changes_what_is_kept():
    stream, context = make_clip(80)
    other = dataclasses.replace(context, prompt=make_clip(80, seed=1)[1].prompt)
    echoing = make()
    with torch.no_grad():
        for parameter in echoing.cs2.parameters():
            parameter.normal_()  # strong enough for so short a prompt
    assert echoing.query_aware
    assert echoing(stream, context).slots.tolist() != echoing(stream, other).slots.tolist()


def test_a_sample_may_have_no_prompt():
    stream, context = make_inputs((20, 0, 30))
    empty = Prompt(TokenStream(torch.empty(0, HIDDEN_SIZE), (0, 0, 0)), torch.empty(3, 0, dtype=torch.long))
    echoing = make().train()
    out = echoing(stream, dataclasses.replace(context, prompt=empty))
    out.embeds.sum().backward()
    assert out.prompt.shape == (0, HIDDEN_SIZE)
    assert all(p.grad.isfinite().all() for p in echoing.parameters()), "an empty sample must not give NaN"


# Training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["echoing", "echoing:per-window"])
def test_straight_through(name):
    stream, context = make_clip(40)
    echoing = make(name, temperature=0.5, keep_ratio=0.3)
    want = echoing(stream, context)
    out = echoing.train()(stream, context)
    assert torch.equal(out.embeds, want.embeds), "the gate is exactly 1, in training too"
    assert torch.equal(out.slots, want.slots)
    weights = torch.randn_like(out.embeds)
    (out.embeds * weights).sum().backward()

    # The gradient of the score's weight by hand: d sum_i (w_i . h_i) soft_i over the kept, h held fixed.
    scores, scene = scores_of(echoing, stream, context), context.scene
    kind = scene.is_video.long() if name == "echoing:per-window" else torch.zeros(40, dtype=torch.long)
    soft = torch.zeros(40)
    for pool in (0, 1):
        soft = soft + (scores / 0.5).masked_fill(kind != pool, -math.inf).softmax(0).nan_to_num(0)
    loss = (soft[out.slots] * (out.embeds.detach() * weights).sum(dim=1)).sum()
    (grad,) = torch.autograd.grad(loss, echoing.score.weight)
    assert grad.abs().max() > 1e-5
    torch.testing.assert_close(echoing.score.weight.grad, grad, rtol=1e-4, atol=1e-6)


def test_gumbel_noise_in_training_alone():
    stream, context = make_clip(60)
    echoing = make(gumbel=True)

    def drawn() -> list[int]:
        return echoing(stream, context).slots.tolist()

    assert drawn() == drawn() == make()(stream, context).slots.tolist()
    echoing.train()
    assert drawn() != drawn()
    torch.manual_seed(3)
    first = drawn()
    torch.manual_seed(3)
    assert drawn() == first


# Sync-RoPE --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head_size", "sections"), [(128, (18, 18, 18, 10)), (64, (9, 9, 9, 5)), (32, (5, 5, 4, 2)), (4, (1, 1, 0, 0))]
)
def test_sync_rope_sections(head_size, sections):
    shape = LLMShape(2, 1, head_size, 8, 1e6, (head_size // 2, 0, 0))
    echoing = make("echoing:sync-rope", llm=shape)
    assert echoing.rope_sections == echoing.cs2.rope_sections == sections
    assert make(llm=shape).rope_sections is None
    assert make(llm=shape).cs2.rope_sections == shape.rope_sections


def test_sync_rope_gives_time_the_slowest_channels():
    positions = torch.stack([torch.arange(9), torch.zeros(9).long(), torch.zeros(9).long()])
    angles = rotary_angles(positions, SHAPE, (1, 1, 1, 1))
    assert angles[8].nonzero()[:, 0].tolist() == [0, 3, 4, 7]
    torch.testing.assert_close(angles[8, [0, 3]], torch.tensor([8.0, 8 * 1e4**-0.75]))


# Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"llm": None}, "echoing has layers like the LLM's and needs llm, its shape .LLMShape: heads, kv_heads"),
        ({"llm": dataclasses.replace(LLM, rope_sections=(1, 1, 1))}, "must sum to half of head_size"),
        ({"llm": dataclasses.replace(LLM, kv_heads=2)}, "kv_heads must divide heads"),
        ({"layers": 0}, "layers must be a whole number >= 1, got 0"),
        ({"budget": "pool"}, "budget must be one of 'single-pool', 'per-window', got 'pool'"),
        ({"window_seconds": 0}, r"window_seconds must be in \(0, inf\), got 0"),
        ({"temperature": math.inf}, r"temperature must be in \(0, inf\), got inf"),
        ({"audio_weight": 2.0}, "audio_weight needs budget='per-window', got 2.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_bad_context():
    stream, context = make_inputs((3, 0, 4))
    prompt, scene = context.prompt, context.scene
    text = prompt.stream
    nan = text.embeds.clone()
    nan[-1] = math.nan
    bad = {
        "of 3 samples, of width 12 .*, got 1 samples": {
            "prompt": Prompt(TokenStream(text.embeds, (len(nan),)), prompt.positions)
        },
        r"with positions \[3, \d+\], got .* positions \[1, \d+\]": {"prompt": Prompt(text, prompt.positions[:1])},
        "width 5 and": {"prompt": Prompt(text.replace(embeds=text.embeds[:, :5]), prompt.positions)},
        "clip 2 of 3 has NaN or infinite prompt": {"prompt": Prompt(text.replace(embeds=nan), prompt.positions)},
        r"scene.positions must be \[3, 7\]": {"scene": dataclasses.replace(scene, positions=scene.positions[:, 1:])},
    }
    for message, change in bad.items():
        with pytest.raises(ValueError, match=f"echoing: .*{message}"):
            make()(stream, dataclasses.replace(context, **change))
