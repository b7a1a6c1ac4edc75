"""What real data brings: silence, repeated frames, extreme volumes, missing questions and videos, broken values."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from audiopress import Compressor, Context, TokenStream
from audiopress.compression.base import Prompt, Scene

from .compression_cases import CASES, make_inputs

LENGTHS = (40, 1, 2, 0, 33, 70)
every = pytest.mark.parametrize("case", CASES, ids=str)


def fill(inputs: tuple[TokenStream, Context], value: float) -> tuple[TokenStream, Context]:
    """Makes all tokens, and all that the tower gives beside them, alike."""

    def flat(stream: TokenStream) -> TokenStream:
        return stream.replace(embeds=torch.full_like(stream.embeds, value))

    stream, context = inputs
    states = {name: flat(getattr(context, name)) for name in ("encoder_hidden", "encoder_keys")}
    attention = torch.full_like(context.encoder_attention, abs(value))
    return flat(stream), dataclasses.replace(context, encoder_attention=attention, **states)


def repeated(inputs: tuple[TokenStream, Context]) -> tuple[TokenStream, Context]:
    """Makes every three neighbouring tokens alike."""
    stream, context = inputs
    return stream.replace(embeds=stream.embeds[stream.offsets[stream.clips] + stream.positions // 3 * 3]), context


def scaled(inputs: tuple[TokenStream, Context], factor: float) -> tuple[TokenStream, Context]:
    stream, context = inputs
    return stream.replace(embeds=stream.embeds * factor), context


def without_video(context: Context) -> Context:
    clips = len(context.video.lengths)
    none = TokenStream(context.video.embeds[:0], (0,) * clips)
    return dataclasses.replace(context, scene=None, video=none, video_seconds=torch.empty(0))


WHOLE = make_inputs(LENGTHS)
INPUTS = {
    "silence": fill(WHOLE, 0.3),
    "zeros": fill(WHOLE, 0.0),
    "repeated": repeated(WHOLE),
    "loud": scaled(WHOLE, 1e18),
    "faint": scaled(WHOLE, 1e-30),
    "sound alone": (WHOLE[0], without_video(WHOLE[1])),
}


def check(compressor: Compressor, inputs: tuple[TokenStream, Context]) -> TokenStream:
    out = compressor(*inputs)
    assert out.lengths == compressor.budget(LENGTHS) or compressor.adaptive
    assert out.embeds.isfinite().all()
    for n, clip in zip(LENGTHS, out.split(), strict=True):
        assert (clip.slots.diff() > 0).all()
        assert ((clip.slots >= 0) & (clip.slots < n)).all()
        assert (len(clip.slots) > 0) == (n > 0)
    return out


@every
def test_the_budget_holds_the_same_every_time(case):
    for inputs in INPUTS.values():
        first, second = (check(case.build(), inputs) for _ in range(2))
        assert torch.equal(first.slots, second.slots)
        assert torch.equal(first.embeds, second.embeds)


@every
@pytest.mark.parametrize("kind", ["silence", "zeros"])
def test_gradients_stay_finite(case, kind):
    compressor, (stream, context) = case.build().train(), INPUTS[kind]
    read = [x.replace(embeds=x.embeds.clone().requires_grad_(True)) for x in (stream, context.encoder_hidden)]
    out = compressor(read[0], dataclasses.replace(context, encoder_hidden=read[1]))
    (out.embeds.sum() + sum(out.losses.values())).backward()
    for tensor in (*(x.embeds for x in read), *compressor.parameters()):
        assert tensor.grad is None or tensor.grad.isfinite().all()


@every
def test_less_than_one_token_is_one(case):
    try:
        compressor = case.build().at(0.001)
    except ValueError:  # weights or windows that no other ratio fits
        return
    assert compressor.budget(LENGTHS) == (1, 1, 1, 0, 1, 1)
    check(compressor, WHOLE)


@every
def test_a_broken_value_in_what_is_read_names_the_clip(case):
    stream, context = WHOLE
    for need in case.needs - {"first_layer", "seed"}:
        value = getattr(context, need)
        if isinstance(value, Prompt):
            broken = dataclasses.replace(value, stream=spoilt(value.stream))
        else:
            broken = spoilt(value) if isinstance(value, TokenStream) else spoilt_rows(value)
        with pytest.raises(ValueError, match=f"clip 0 of 6 has NaN or infinite {need}"):
            case.build()(stream, dataclasses.replace(context, **{need: broken}))


def spoilt(stream: TokenStream) -> TokenStream:
    return stream.replace(embeds=spoilt_rows(stream.embeds))


def spoilt_rows(rows: torch.Tensor) -> torch.Tensor:
    rows = rows.clone()
    rows[0] = torch.nan
    return rows


@pytest.mark.parametrize("case", [case for case in CASES if "question" in case.needs], ids=str)
def test_only_a_clip_without_tokens_may_lack_a_question(case):
    stream, context = WHOLE

    def asked(missing: int) -> Context:
        parts = [p.embeds[: 0 if i == missing else None] for i, p in enumerate(context.question.split())]
        return dataclasses.replace(context, question=TokenStream(torch.cat(parts), tuple(map(len, parts))))

    check(case.build(), (stream, asked(3)))
    with pytest.raises(ValueError, match="clip 4 of 6 has 33 tokens but an empty question"):
        case.build()(stream, asked(4))


@pytest.mark.parametrize("case", [case for case in CASES if case.build().stage == "joint"], ids=str)
@pytest.mark.parametrize("is_video", [False, True])
def test_joint_methods_take_one_modality_alone(case, is_video):
    stream, context = WHOLE
    scene = Scene.of_audio(stream)
    scene = dataclasses.replace(scene, is_video=torch.full_like(scene.is_video, is_video))
    check(case.build(), (stream, dataclasses.replace(context, scene=scene)))
