"""SpeechPrune against small examples and a reference in float64 loops."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from audiopress import Context, TokenStream, build
from audiopress.compression import token_budget
from audiopress.compression.speechprune import binary_attention
from audiopress.kernels import received

from .compression_cases import HIDDEN_SIZE, FirstLayer, make_context, make_inputs

LENGTHS = (60, 0, 1, 77, 25, 2)


def make(name: str = "speechprune", **options):
    return build(name, hidden_size=HIDDEN_SIZE, **options)


def kept(name: str, stream: TokenStream, context: Context, **options) -> list[list[int]]:
    out = build(name, hidden_size=stream.embeds.shape[1], **options)(stream, context)
    return [clip.slots.tolist() for clip in out.split()]


def with_cosines(cosines: list[float]) -> tuple[TokenStream, Context]:
    """One clip whose tokens have these cosines with the question."""
    angles = torch.tensor(cosines, dtype=torch.float64).acos()
    embeds = torch.stack([angles.cos(), angles.sin()], dim=1).float()
    return TokenStream(embeds, (len(cosines),)), Context(question=TokenStream(torch.tensor([[3.0, 0.0]]), (1,)))


# Phase 1 ----------------------------------------------------------------------------------------------------------


def test_phase_one_shares_the_budget_out_over_seconds():
    # sums of log 4, log 2 and 0 over two seconds and a short one: p = 4/7, 2/7, 1/7; later tokens are better
    rise = [(i - 12) / 1000 for i in range(25)]
    cosines = [math.log(4) / 25 + x for x in rise] + [math.log(2) / 25 + x for x in rise] + [0.0] * 10

    def best(budget: int) -> list[list[int]]:
        inputs = with_cosines(cosines)
        return kept("speechprune:phase-1", *inputs, keep_ratio=budget / 60)

    assert best(14) == [[*range(17, 25), *range(46, 50), 50, 51]]  # 8, 4, 2 with no remainder
    assert best(15) == [[*range(16, 25), *range(46, 50), 50, 51]]  # lambda 15.75 = 9 / p_0 gives 9, 4, 2
    assert best(45) == [[*range(25), *range(36, 50), *range(50, 56)]]  # 25 is all of second 0: 14 and 6 of the others
    assert best(1) == [[24]]


def reference_phase_one(embeds, seconds, question, budget) -> list[int]:
    """Loops in float64: the paper's floors, then one token after the other to whom lambda reaches first."""
    if not len(embeds):
        return []
    embeds, question = embeds.double(), question.double()
    cosine = torch.stack(
        [torch.stack([torch.cosine_similarity(x, word, dim=0) for word in question]).mean() for x in embeds]
    )
    members = {}
    for i, second in enumerate(seconds):
        members.setdefault(second, []).append(i)
    p = torch.stack([cosine[tokens].sum() for tokens in members.values()]).softmax(0).tolist()
    sizes = [len(tokens) for tokens in members.values()]
    counts = [min(n, math.floor(budget * share)) for n, share in zip(sizes, p, strict=True)]
    while sum(counts) < budget:
        open_ = [i for i in range(len(p)) if counts[i] < sizes[i]]
        counts[min(open_, key=lambda i: (counts[i] + 1) / p[i])] += 1
    chosen = []
    for tokens, count in zip(members.values(), counts, strict=True):
        chosen += sorted(tokens, key=lambda i: -cosine[i])[:count]
    return sorted(chosen)


@pytest.mark.parametrize("keep_ratio", [0.05, 0.3, 0.8])
def test_phase_one_against_loops(keep_ratio):
    stream, context = make_inputs(LENGTHS)
    got = kept("speechprune:phase-1", stream, context, keep_ratio=keep_ratio)
    budget = token_budget(LENGTHS, keep_ratio)
    for clip, words, m, slots in zip(stream.split(), context.question.split(), budget, got, strict=True):
        seconds = [slot // 25 for slot in clip.slots.tolist()]
        assert slots == reference_phase_one(clip.embeds, seconds, words.embeds, m)


def test_seconds_are_those_of_the_uncompressed_clip():
    stream, context = make_inputs((100,))
    thinned = stream.select(torch.tensor([3, 20, 24, 25, 30, 49, 74, 75, 99]), (9,))
    index = reference_phase_one(thinned.embeds, (thinned.slots // 25).tolist(), context.question.embeds, 4)
    got = kept("speechprune:phase-1", thinned, context, keep_ratio=4 / 9)
    assert got == [thinned.slots[index].tolist()]


# Phase 2 ----------------------------------------------------------------------------------------------------------


def reference_attention(embeds, layer) -> torch.Tensor:
    """The log of the attention each token receives, over heads and queries, in float64 loops."""
    attention, d = layer.self_attn, layer.self_attn.head_dim
    wq, wk = (w.weight.double().sign().T for w in (attention.q_proj, attention.k_proj))
    q, k = (embeds.double().sign() @ w for w in (wq, wk))
    heads, groups = q.shape[1] // d, q.shape[1] // k.shape[1]
    maps = []
    for head in range(heads):
        of = head // groups
        logits = q[:, head * d : (head + 1) * d] @ k[:, of * d : (of + 1) * d].T / math.sqrt(d)
        maps.append(logits.log_softmax(dim=1))
    return torch.cat(maps).logsumexp(dim=0) - math.log(heads)


class WideLayer(nn.Module):
    """Four query heads over two key heads, as wide as real ones: its softmax is one-hot."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.Module()
        self.self_attn.head_dim = 16
        self.self_attn.q_proj = nn.Linear(2048, 64)
        self.self_attn.k_proj = nn.Linear(2048, 32)


@torch.no_grad()
@pytest.mark.parametrize("elements", [1, 5000, 2**24])
@pytest.mark.parametrize(("layer", "width"), [(FirstLayer(), HIDDEN_SIZE), (WideLayer(), 2048)])
def test_phase_two_against_the_whole_map(layer, width, elements, monkeypatch):
    monkeypatch.setattr(received, "_MAP_ENTRIES", elements)
    torch.manual_seed(0)
    stream = TokenStream(torch.randn(220, width), (200, 0, 1, 19))
    got = binary_attention(stream, layer.self_attn).split(stream.lengths)
    for clip, scores in zip(stream.split(), got, strict=True):
        torch.testing.assert_close(scores.double(), reference_attention(clip.embeds, layer), rtol=1e-5, atol=1e-5)
    if width == 2048:
        assert got[0].min() < -150, "it would underflow outside the logarithm"


def test_phase_two_reads_signs_alone():
    stream, context = make_inputs(LENGTHS)
    want = binary_attention(stream, context.first_layer.self_attn)
    layer = FirstLayer()
    layer.self_attn.q_proj.weight.mul_(torch.rand_like(layer.self_attn.q_proj.weight) + 0.1)
    layer.self_attn.k_proj.bias.add_(1)
    layer.input_layernorm.weight.mul_(7)
    assert torch.equal(binary_attention(stream.replace(embeds=stream.embeds * 3), layer.self_attn), want)


def test_equal_tokens_receive_equal_attention():
    torch.manual_seed(0)
    stream = TokenStream(torch.randn(5, 2048)[torch.arange(97) % 5], (97,))
    scores = binary_attention(stream, WideLayer().self_attn)
    assert torch.equal(scores[5:], scores[:-5])


# Both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_the_second_phase_prunes_what_the_first_leaves(share):
    stream, context = make_inputs(LENGTHS)
    first = make("speechprune:phase-1", keep_ratio=0.2**share)(stream, context)
    budget = make(keep_ratio=0.2).budget(LENGTHS)
    want = []
    for clip, m in zip(first.split(), budget, strict=True):
        scores = reference_attention(clip.embeds, context.first_layer)
        want.append(sorted(clip.slots[scores.argsort(descending=True, stable=True)[:m]].tolist()))
    assert kept("speechprune", stream, context, keep_ratio=0.2, phase1_share=share) == want


def test_spiral_keeps_what_the_paper_keeps():
    config = make("speechprune:spiral").config
    tokens = (round(87.89 * 25),)
    assert token_budget(tokens, config.keep_ratio**config.phase1_share) == (750,)
    assert make("speechprune:spiral").budget(tokens) == (600,)


@pytest.mark.parametrize(
    ("name", "needs", "query_aware"),
    [
        ("speechprune", {"question", "first_layer"}, True),
        ("speechprune:phase-1", {"question"}, True),
        ("speechprune:phase-2", {"first_layer"}, False),
    ],
)
def test_each_phase_reads_its_own(name, needs, query_aware):
    made = make(name)
    assert (made.needs, made.query_aware, made.trained) == (needs, query_aware, False)


def test_the_question_decides():
    stream, context = make_inputs((50,))
    other = dataclasses.replace(context, question=make_context((50,), seed=1).question)
    for name, same in (("speechprune", False), ("speechprune:phase-1", False), ("speechprune:phase-2", True)):
        assert (kept(name, stream, context) == kept(name, stream, other)) == same


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_silence_keeps_the_first_of_every_second(value):
    stream = TokenStream(torch.full((75, HIDDEN_SIZE), value), (75,))
    context = make_context((75,))
    first, second = [0, 1, 25, 26, 50, 51], [0, 1, 25, 50]
    assert kept("speechprune:phase-1", stream, context, keep_ratio=6 / 75) == [first]
    assert kept("speechprune:phase-1", stream, context, keep_ratio=4 / 75) == [second]
    assert kept("speechprune:phase-2", stream, context, keep_ratio=6 / 75) == [[0, 1, 2, 3, 4, 5]]


def test_duplicate_frames_go_to_the_earliest():
    stream, context = make_inputs((20,))
    twice = TokenStream(stream.embeds.repeat(2, 1)[:25], (25,))
    for name in ("speechprune:phase-1", "speechprune:phase-2"):
        for clip in kept(name, twice, context, keep_ratio=0.4):
            assert all(slot - 20 in clip for slot in clip if slot >= 20)


def test_decisions_are_float32_under_autocast():
    stream, context = make_inputs(LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = kept("speechprune", stream, context)
    assert mixed == kept("speechprune", stream, context)


def question(lengths, width=HIDDEN_SIZE, value=1.0) -> TokenStream:
    return TokenStream(torch.full((sum(lengths), width), value), lengths)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (question((2, 1, 0)), "speechprune: clip 2 of 3 has 4 tokens but an empty question"),
        (question((2, 1)), f"must be of the stream's 3 clips and of width {HIDDEN_SIZE}, got 2 clips"),
        (question((2, 1, 3), width=5), "got 3 clips of width 5"),
        (question((2, 1, 3), value=math.nan), "speechprune: clip 0 of 3 has NaN or infinite question"),
    ],
)
def test_bad_questions(words, message):
    stream, context = make_inputs((3, 0, 4))
    with pytest.raises(ValueError, match=message):
        make()(stream, dataclasses.replace(context, question=words))


def test_a_clip_without_tokens_needs_no_question():
    stream, context = make_inputs((3, 0, 4))
    out = make()(stream, dataclasses.replace(context, question=question((2, 0, 3))))
    assert out.lengths == make().budget((3, 0, 4))


def test_bad_layer_and_options():
    stream, context = make_inputs((30,))
    with pytest.raises(ValueError, match=f"first_layer must be of width {HIDDEN_SIZE}, got 2048"):
        make()(stream, dataclasses.replace(context, first_layer=WideLayer()))
    for share in (-0.1, 1.5, math.nan, "half", True):
        with pytest.raises(ValueError, match=r"phase1_share must be in \[0, 1\], got"):
            make(phase1_share=share)


def test_gradients_reach_the_kept_tokens_alone():
    stream, context = make_inputs((30,))
    stream.embeds.requires_grad_(True)
    out = make(keep_ratio=0.2)(stream, context)
    out.embeds.sum().backward()
    assert stream.embeds.grad.any(dim=1).nonzero()[:, 0].tolist() == out.slots.tolist()
