"""What every compressor promises, checked on every row of the case table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from audiopress import TokenStream, available
from audiopress.compression import from_description, markdown_table, registry

from .compression_cases import (
    ALL_CASES,
    CASES,
    ENCODER_SIZE,
    HIDDEN_SIZE,
    Case,
    join,
    make_clip,
    make_inputs,
    make_stream,
    to,
)

LENGTHS = (7, 0, 23, 1, 2, 13)
FIELDS = ("embeds", "slots", "sizes")
ROOT = Path(__file__).parents[1]

every = pytest.mark.parametrize("case", CASES, ids=str)
training_free = pytest.mark.parametrize("case", [c for c in CASES if not c.build().trained], ids=str)


def run(case: Case, lengths=LENGTHS, **options) -> TokenStream:
    return case.build(**options)(*make_inputs(lengths))


def same(a: TokenStream, b: TokenStream) -> bool:
    return a.lengths == b.lengths and all(torch.equal(getattr(a, f), getattr(b, f)) for f in FIELDS)


def test_every_method_and_preset_has_a_case():
    methods = available()
    presets = {f"{name}:{preset}" for name, info in methods.items() for preset in info.presets}
    missing = (methods.keys() | presets) - {case.name for case in ALL_CASES}
    assert not missing, f"add rows for {', '.join(sorted(missing))} to tests/compression_cases.py"


@pytest.mark.parametrize("name", sorted(available()))
def test_a_published_method_says_how_it_differs(name):
    info = available()[name]
    lists = [line for line in (registry._METHODS[name].__doc__ or "").splitlines() if "Differs from the paper" in line]
    assert bool(info.paper) == bool(info.differs) == bool(lists), "paper, differs and the docstring's list go together"


def test_the_readme_has_the_table_of_methods():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("there is no README.md yet")
    assert markdown_table() in readme.read_text(), "put audiopress.compression.markdown_table() into README.md"


@every
def test_declares_what_it_reads(case):
    assert case.build().needs == case.needs


@every
@pytest.mark.parametrize("lengths", [(n,) for n in (0, 1, 2, 3, 5, 7, 31, 97, 750)] + [LENGTHS, (), (0, 0)])
def test_budget_order_slots_and_sizes(case, lengths):
    compressor = case.build()
    out = compressor(*make_inputs(lengths))
    assert out.lengths == compressor.budget(lengths) or compressor.adaptive
    assert out.slots.dtype == torch.int64
    assert out.sizes.dtype == torch.float32
    assert out.embeds.shape == (sum(out.lengths), HIDDEN_SIZE)
    for n, clip in zip(lengths, out.split(), strict=True):
        assert (clip.slots.diff() > 0).all()
        assert ((clip.slots >= 0) & (clip.slots < n)).all()
        assert (clip.sizes > 0).all()
        assert (len(clip.slots) > 0) == (n > 0), "a clip must not vanish"
        if case.covers:
            assert clip.sizes.sum() == n
        else:
            assert clip.sizes.sum() <= n


@every
def test_keep_ratio_is_what_comes_out_of_a_long_clip(case):
    compressor = case.build()
    assert compressor.budget((3000,))[0] / 3000 == pytest.approx(compressor.config.keep_ratio, abs=1e-3)


@every
def test_one_set_of_weights_serves_several_ratios_or_says_that_it_cannot(case):
    compressor, refusal = case.build(), ""
    try:
        twin = compressor.at(0.5)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert "keep_ratio" in refusal
        return
    assert twin.budget((3000,)) == (1500,)
    assert dict(twin.named_parameters()) == dict(compressor.named_parameters())
    assert same(compressor(*make_inputs(LENGTHS)), run(case)), "the first one stays what it was"
    assert twin(*make_inputs(LENGTHS)).lengths == twin.budget(LENGTHS) or twin.adaptive


@every
def test_other_clips_change_nothing(case):
    compressor = case.build()
    for clip, want in enumerate(run(case).split()):
        others = [make_clip(n, 9 * (i != clip), i) for i, n in enumerate(LENGTHS)]
        others[0][1].seed = 0  # the batch's
        assert same(compressor(*join(others)).split()[clip], want), f"clip {clip}"


@every
def test_batch_equals_singletons(case):
    compressor = case.build()
    for i, batched in enumerate(run(case).split()):
        alone = compressor(*make_clip(LENGTHS[i], 0, i))
        torch.testing.assert_close(batched.embeds, alone.embeds, rtol=1e-5, atol=1e-6)
        assert same(batched.replace(embeds=alone.embeds), alone)
        assert compressor.trained or same(batched, alone)


@every
def test_deterministic(case):
    assert same(run(case), run(case))


@training_free
def test_identity_at_keep_ratio_one(case):
    compressor = case.build()
    options = {k: v for k, v in case.options.items() if k not in (*compressor.config.rate_options, "tail")}
    whole = Case(compressor.name, options | {"keep_ratio": 1}).build()
    assert same(whole(*make_inputs(LENGTHS)), make_stream(LENGTHS))


@every
def test_gradients(case):
    compressor, (stream, context) = case.build().train(), make_inputs(LENGTHS)
    assert compressor.trained == any(p.requires_grad for p in compressor.parameters())
    stream.embeds.requires_grad_(True)
    context.encoder_hidden.embeds.requires_grad_(True)
    out = compressor(stream, context)
    weights = torch.randn(out.embeds.shape, generator=torch.Generator().manual_seed(0))
    ((out.embeds * weights).sum() + sum(out.losses.values())).backward()
    read = context.encoder_hidden.embeds if "encoder_hidden" in case.needs else stream.embeds
    trained = [(name, p) for name, p in compressor.named_parameters() if name not in compressor.frozen]
    for name, tensor in [("input", read), *trained]:
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.any(), name


@every
def test_save_and_load(case):
    first = case.build()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.uniform_(-0.3, 0.3)
    description = json.loads(json.dumps(first.describe()))
    second = from_description(description).eval()
    second.load_state_dict(first.state_dict())
    inputs = make_inputs(LENGTHS)
    assert same(first(*inputs), second(*inputs))
    assert second.describe() == first.describe()


@every
def test_bf16_and_autocast(case):
    (stream, context), want = make_inputs(LENGTHS), run(case)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = case.build()(stream, context)
    half = case.build().bfloat16()(
        *(to(x, lambda t: t.bfloat16() if t.ndim == 2 and t.is_floating_point() else t) for x in (stream, context))
    )
    assert (half.embeds.dtype, mixed.embeds.dtype) == (torch.bfloat16, torch.float32)
    for out in (half, mixed):
        assert out.lengths == want.lengths or case.build().adaptive
        if torch.equal(out.slots, want.slots):  # what is chosen by comparison may fall out differently in bf16
            torch.testing.assert_close(out.embeds.float(), want.embeds, rtol=0.05, atol=0.05)
        else:
            assert case.compares


@every
def test_strided_input(case):
    stream, context = (to(x, lambda t: t.T.contiguous().T if t.ndim == 2 else t) for x in make_inputs(LENGTHS))
    assert not stream.embeds.is_contiguous()
    torch.testing.assert_close(case.build()(stream, context).embeds, run(case).embeds)


@every
def test_clear_errors(case):
    compressor, (stream, context) = case.build(), make_inputs(LENGTHS)
    broken = stream.embeds.clone()
    broken[30] = float("nan")  # 7 + 0 + 23 = 30: the only token of clip 3
    with pytest.raises(ValueError, match=r"clip 3 of 6 has NaN"):
        compressor(stream.replace(embeds=broken), context)
    with pytest.raises(ValueError, match=f"built for width {HIDDEN_SIZE}, got 5"):
        compressor(TokenStream(torch.zeros(4, 5), (4,)))
    for need in case.needs:
        with pytest.raises(ValueError, match=f"needs '{need}'"):
            compressor(stream, dataclasses.replace(context, **{need: None}))
    if "encoder_hidden" in case.needs:
        hidden = context.encoder_hidden
        short = TokenStream(torch.zeros(8, ENCODER_SIZE), (8,))
        with pytest.raises(ValueError, match=r"must hold \[14, 0, 46, 2, 4, 26\] states .* got \[8\]"):
            compressor(stream, dataclasses.replace(context, encoder_hidden=short))
        with pytest.raises(ValueError, match=f"of width {ENCODER_SIZE} .* of width 3"):
            compressor(stream, dataclasses.replace(context, encoder_hidden=hidden.replace(embeds=hidden.embeds[:, :3])))
        with pytest.raises(ValueError, match="clip 0 of 6 has NaN or infinite encoder_hidden"):
            compressor(stream, dataclasses.replace(context, encoder_hidden=hidden.replace(embeds=hidden.embeds / 0)))


@pytest.mark.gpu
@every
def test_gpu_equals_cpu(case):
    want = run(case)
    inputs = [to(x, lambda t: t.cuda()) for x in make_inputs(LENGTHS)]
    compressor = case.build().cuda()
    out = compressor(*inputs)
    torch.testing.assert_close(out.embeds.cpu(), want.embeds, rtol=1e-3, atol=1e-3)
    assert same(out.replace(embeds=want.embeds, slots=out.slots.cpu(), sizes=out.sizes.cpu()), want)
    assert same(out, compressor(*inputs))
