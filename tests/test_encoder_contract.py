"""What every method inside the tower promises, checked in a small tower on every row of the case table."""

import json

import pytest
import torch
from tiny import make_thinker

from audiopress.compression import from_description
from audiopress.models.encoders import encode_audio
from audiopress.models.layout import audio_lengths

from .compression_cases import ENCODER_CASES
from .test_tower import MEL_FRAMES, features

every = pytest.mark.parametrize("case", ENCODER_CASES, ids=str)
SIZES = {"hidden_size": 32, "encoder_size": 24}


@pytest.fixture(scope="module")
def thinker():
    return make_thinker().eval()


def make(case, **options):
    described = case.build().describe() | SIZES
    return from_description(described | {"options": described["options"] | options})


@torch.no_grad()
def run(thinker, method, x, mask):
    return encode_audio(thinker, x, mask, method=method)[0]


@every
def test_budget_order_slots_and_sizes(thinker, case):
    method = make(case)
    tokens = audio_lengths(torch.tensor(MEL_FRAMES))
    out = run(thinker, method, *features())
    most = method.budget(tokens)
    assert out.lengths == most or method.adaptive
    for n, limit, clip in zip(tokens, most, out.split(), strict=True):
        assert 1 <= len(clip.slots) <= limit
        assert (clip.slots.diff() > 0).all()
        assert ((clip.slots >= 0) & (clip.slots < n)).all()
        assert float(clip.sizes.sum()) == pytest.approx(n) if case.covers else clip.sizes.sum() <= n


@every
def test_a_batch_equals_its_clips_one_by_one(thinker, case):
    x, mask = features()
    for i, batched in enumerate(run(thinker, make(case), x, mask).split()):
        frames = MEL_FRAMES[i]
        alone = run(thinker, make(case), x[i : i + 1, :, :frames], mask[i : i + 1, :frames])
        torch.testing.assert_close(batched.embeds, alone.embeds, rtol=1e-4, atol=1e-5)
        assert torch.equal(batched.slots, alone.slots)
        assert torch.equal(batched.sizes, alone.sizes)


@every
def test_deterministic_and_rebuilt_from_its_description(thinker, case):
    method = make(case)
    again = from_description(json.loads(json.dumps(method.describe())))
    first, second = (run(thinker, m, *features()) for m in (method, again))
    assert torch.equal(first.embeds, second.embeds)
    assert torch.equal(first.slots, second.slots)


@every
def test_the_tower_itself_at_keep_ratio_one(thinker, case):
    method = make(case, keep_ratio=1.0, **({"threshold": None} if "threshold" in case.options else {}))
    assert torch.equal(run(thinker, method, *features()).embeds, encode_audio(thinker, *features())[0].embeds)


@every
def test_silence_is_no_trouble(thinker, case):
    x, mask = features()
    out = run(thinker, make(case), torch.zeros_like(x), mask)
    assert out.embeds.isfinite().all()
    assert out.lengths == make(case).budget(audio_lengths(torch.tensor(MEL_FRAMES))) or make(case).adaptive


@every
def test_bfloat16(thinker, case):
    half = make_thinker().bfloat16().eval()
    out = run(half, make(case), *features())
    assert out.embeds.dtype == torch.bfloat16
    assert out.lengths == run(thinker, make(case), *features()).lengths or make(case).adaptive


@every
def test_the_projection_gets_gradients(thinker, case):
    thinker.zero_grad()
    projection = thinker.get_submodule(next(n for n, _ in thinker.named_modules() if n.endswith("audio_tower"))).proj
    projection.requires_grad_(True)
    out, _ = encode_audio(thinker, *features(), method=make(case))
    out.embeds.square().sum().backward()
    assert projection.weight.grad.isfinite().all()
    assert projection.weight.grad.any()
