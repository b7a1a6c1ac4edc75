"""The selection methods against slow and obvious references: loops, float64, explicit determinants."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from audiopress import Context, TokenStream, build
from audiopress.compression import token_budget
from audiopress.kernels import farthest_first, greedy, greedy_map, most_alike

from .compression_cases import HIDDEN_SIZE, make_clip, make_inputs

LENGTHS = (7, 0, 1, 40, 2, 23)
BUDGET = (3, 0, 1, 17, 1, 23)

METHODS = ["attention-topk", "attention-topk:segmentwise", "attention-topk:visionzip-om", "divprune", "cdpruner"]
METHODS += ["cdpruner:unconditional", "cdpruner:attention", "dart", "dart:text", "sa-map"]


def make(name: str, **options):
    return build(name, hidden_size=HIDDEN_SIZE, **options)


def unit(x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x / x.norm(dim=1, keepdim=True).clamp(min=1e-30)


def one_clip(embeds, attention=None, question=None) -> tuple[TokenStream, Context]:
    """A clip of the given tokens, evenly attended to unless told otherwise."""
    n, width = embeds.shape
    words = torch.ones(1, width) if question is None else question
    context = Context(
        encoder_attention=torch.ones(n) if attention is None else torch.as_tensor(attention).float(),
        encoder_keys=TokenStream(torch.ones(2 * n, 4), (2 * n,)),
        question=TokenStream(words, (len(words),)),
    )
    return TokenStream(embeds, (n,)), context


def run_one(name: str, embeds, attention=None, question=None, **options) -> TokenStream:
    inputs = one_clip(embeds, attention, question)
    return build(name, hidden_size=embeds.shape[1], **options)(*inputs)


def packed(choose, *tensors) -> list[int]:
    """Applies a reference, `choose(*clip's rows, budget)`, to every clip."""
    index, start = [], 0
    for n, m in zip(LENGTHS, BUDGET, strict=True):
        index += [start + i for i in sorted(choose(*(x[start : start + n] for x in tensors), m))]
        start += n
    return index


# Farthest first ---------------------------------------------------------------------------------------------------


def slow_farthest_first(embeds, count) -> list[int]:
    n, x = len(embeds), unit(embeds)
    distance = 1 - x @ x.T
    if count == n:
        return list(range(n))
    kept = []
    for _ in range(count):
        scores = {}
        for i in set(range(n)) - set(kept):
            others = kept or [j for j in range(n) if j != i]
            scores[i] = min(float(distance[i, j]) for j in others)
        kept.append(max(sorted(scores), key=scores.get))
    return kept


@pytest.mark.parametrize("block", [1, 2, 64])
@pytest.mark.parametrize("seed", range(5))
def test_farthest_first_is_the_greedy_max_min_choice(monkeypatch, seed, block):
    monkeypatch.setattr(greedy, "BLOCK", block)
    embeds = torch.randn(sum(LENGTHS), 5, generator=torch.Generator().manual_seed(seed))
    assert farthest_first(embeds, LENGTHS, BUDGET).tolist() == packed(slow_farthest_first, embeds)


def test_farthest_first_in_rows_of_few_tokens(monkeypatch):
    embeds = torch.randn(sum(LENGTHS), 5)
    want = farthest_first(embeds, LENGTHS, BUDGET)
    monkeypatch.setattr(greedy, "_ENTRIES", 100)
    assert torch.equal(farthest_first(embeds, LENGTHS, BUDGET), want)


def test_divprune_by_hand():
    # In the plane, at these degrees. 181 has the farthest nearest neighbour (91); from there on the farthest from the
    # kept ones: 0 (179), 90 (90), and 20 (20).
    angle = torch.tensor([0.0, 10, 20, 90, 181]).deg2rad()
    embeds = torch.stack([angle.cos(), angle.sin()], dim=1)
    assert run_one("divprune", embeds, keep_ratio=0.2).slots.tolist() == [4]
    assert run_one("divprune", embeds, keep_ratio=0.4).slots.tolist() == [0, 4]
    assert run_one("divprune", embeds, keep_ratio=0.6).slots.tolist() == [0, 3, 4]
    assert run_one("divprune", embeds, keep_ratio=0.8).slots.tolist() == [0, 2, 3, 4]


# Greedy MAP -------------------------------------------------------------------------------------------------------


def slow_greedy_map(quality, embeds, count) -> list[int]:
    """Adds the token that makes the determinant largest; when all are zero, the best quality, then the earliest."""
    n, x, q = len(embeds), unit(embeds), quality.double()
    kernel = q[:, None] * (x @ x.T) * q
    kept = []
    while len(kept) < count:
        free = [i for i in range(n) if i not in kept]
        dets = {i: float(torch.linalg.slogdet(kernel[[*kept, i]][:, [*kept, i]])[1]) for i in free}
        now = float(torch.linalg.slogdet(kernel[kept][:, kept])[1]) if kept else 0.0
        best = max(free, key=lambda i: (dets[i], -i))
        # one more dimension of nothing but rounding
        if not dets[best] - now > torch.log(torch.tensor(1e-9)):
            kept += sorted(free, key=lambda i: (-q[i], i))[: count - len(kept)]
            break
        kept.append(best)
    return kept


@pytest.mark.parametrize("block", [1, 2, 64])
@pytest.mark.parametrize("width", [3, 8, 30])  # 17 and 23 are kept of clips: less and more than there are dimensions
@pytest.mark.parametrize("seed", range(3))
def test_greedy_map_makes_the_determinant_grow_most(monkeypatch, seed, width, block):
    monkeypatch.setattr(greedy, "BLOCK", block)
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(sum(LENGTHS), width, generator=generator)
    quality = torch.rand(sum(LENGTHS), generator=generator) + 0.1
    assert greedy_map(quality, embeds, LENGTHS, BUDGET).tolist() == packed(slow_greedy_map, quality, embeds)


@pytest.mark.parametrize("common", [0, 2, 8])  # how much of their direction the tokens share
@pytest.mark.parametrize("count", [200, 400])  # of 256 dimensions
def test_greedy_map_stays_exact_over_hundreds_of_steps(count, common):
    """Against float64 Cholesky, the textbook form, and past the last dimension by quality."""
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(600, 256, generator=generator) + common * torch.randn(256, generator=generator)
    quality = torch.rand(600, generator=generator) + 0.5
    x, q = unit(embeds), quality.double()
    kernel = q[:, None] * (x @ x.T) * q
    left, factor, kept = kernel.diagonal().clone(), torch.empty(0, 600, dtype=torch.double), []
    for _ in range(min(count, 256)):
        j = int(left.argmax())
        row = (kernel[j] - factor[:, j] @ factor) / left[j].sqrt()
        factor, left, kept = torch.cat([factor, row[None]]), left - row**2, [*kept, j]
        left[kept] = -torch.inf
    kept += sorted(set(range(600)) - set(kept), key=lambda i: -q[i])[: count - len(kept)]
    assert greedy_map(quality, embeds, (600,), (count,)).tolist() == sorted(kept)


def test_greedy_map_by_hand():
    # e0 twice and e1: after the best e0 nothing is left of its copy, so the poorer e1 comes next, then the copy.
    embeds = torch.tensor([[1.0, 0, 0], [2, 0, 0], [0, 1, 0], [0, 0, 0]])
    quality = torch.tensor([2.0, 3, 1, 5])
    for count, want in enumerate([[], [1], [1, 2], [1, 2, 3], [0, 1, 2, 3]]):
        assert greedy_map(quality, embeds, (4,), (count,)).tolist() == want  # of a token of zeros nothing is left


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_greedy_map_does_not_depend_on_the_scale_of_quality(scale):
    embeds, quality = torch.randn(30, 8), torch.rand(30) + 0.1
    want = greedy_map(quality, embeds, (30,), (7,))
    assert torch.equal(greedy_map(quality * scale, embeds, (30,), (7,)), want)


@pytest.mark.parametrize("choose", [farthest_first, lambda *x: greedy_map(torch.ones(len(x[0])), *x)])
@pytest.mark.parametrize("width", [33, 576, 1280])
def test_copies_tie_and_the_earliest_wins(choose, width):
    """Products of equal rows may differ by rounding, as the last rows of a matrix take another path."""
    distinct = torch.randn(11, width, generator=torch.Generator().manual_seed(0))
    embeds = distinct.repeat(7, 1)
    assert choose(embeds, (77,), (11,)).tolist() == list(range(11))
    assert choose(embeds, (77,), (20,)).tolist() == list(range(20))  # the rest adds nothing
    for dtype in (torch.bfloat16, torch.float64):
        assert choose(embeds.to(dtype), (77,), (11,)).tolist() == list(range(11))


def test_copies_come_last_where_every_token_has_one():
    embeds = torch.randn(3, 33).repeat_interleave(2, dim=0)
    assert farthest_first(embeds, (6,), (3,)).tolist() == [0, 2, 4]


# CDPruner ---------------------------------------------------------------------------------------------------------


def test_cdpruner_by_loops():
    stream, context = make_inputs(LENGTHS)
    budget = token_budget(LENGTHS, 0.3)
    want = []
    for clip, question, count in zip(stream.split(), context.question.split(), budget, strict=True):
        scores = [float((unit(question.embeds) @ token).mean()) for token in unit(clip.embeds)]
        span = [(s - min(scores) + 1e-6) / (max(scores) - min(scores) + 1e-6) for s in scores]
        want.append(sorted(slow_greedy_map(torch.tensor(span), clip.embeds, count)))
    out = make("cdpruner", keep_ratio=0.3)(stream, context)
    assert [clip.slots.tolist() for clip in out.split()] == want


def test_cdpruner_prefers_what_is_asked_for():
    embeds = torch.eye(6) + 0.1
    assert run_one("cdpruner", embeds, question=embeds[4:5], keep_ratio=1 / 6).slots.tolist() == [4]


def test_only_the_question_makes_it_query_aware():
    aware = {name for name in METHODS if make(name).query_aware}
    assert aware == {"cdpruner", "dart:text"}


# DART -------------------------------------------------------------------------------------------------------------


def slow_dart(embeds, words, budget, pivots, question_pivots) -> list[int]:
    def largest(x, count):
        return sorted(sorted(range(len(x)), key=lambda i: (-float(x[i].double().abs().sum()), i))[:count])

    kept = largest(embeds, min(pivots, budget))
    turns = [*unit(embeds)[kept], *unit(words)[largest(words, question_pivots)]]
    rest = budget - len(kept)
    for turn, pivot in enumerate(turns):
        likeness = unit(embeds) @ pivot
        free = sorted((i for i in range(len(embeds)) if i not in kept), key=lambda i: (float(likeness[i]), i))
        kept += free[: rest // len(turns) + (turn < rest % len(turns))]
    return sorted(kept)


@pytest.mark.parametrize("keep_ratio", [0.05, 0.4, 0.9])
@pytest.mark.parametrize("options", [{}, {"pivots": 3}, {"pivots": 2, "question_pivots": 4}, {"pivots": 99}])
def test_dart_by_loops(options, keep_ratio):
    stream, context = make_inputs(LENGTHS)
    dart = make("dart", keep_ratio=keep_ratio, **options)
    out = dart(stream, context)
    for clip, tokens, question in zip(out.split(), stream.split(), context.question.split(), strict=True):
        budget = dart.budget(tokens.lengths)[0]
        want = slow_dart(tokens.embeds, question.embeds, budget, dart.config.pivots, dart.config.question_pivots)
        assert clip.slots.tolist() == want


# Attention top-K --------------------------------------------------------------------------------------------------


def test_last_layer_by_hand():
    out = run_one("attention-topk:last-layer", torch.randn(6, 4), [0.1, 3, 2, 2, 0.5, 2])
    assert out.slots.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("n", "keep_ratio", "quotas"),
    [
        (100, 0.25, [3, 3, 3, 3, 3, 2, 2, 2, 2, 2]),  # floor(25 / 10) each, five more for the earliest
        (20, 0.05, [1, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        (7, 0.5, [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]),  # fewer tokens than segments: one each in seven of them
        (13, 0.95, [2, 2, 1, 1, 1, 1, 1, 1, 1, 1]),
        (13, 1.0, [2, 2, 2, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_segmentwise_quotas(n, keep_ratio, quotas):
    attention = torch.rand(n, generator=torch.Generator().manual_seed(0))
    out = run_one("attention-topk:segmentwise", torch.randn(n, 4), attention, keep_ratio=keep_ratio)
    start, want = 0, []
    for i, quota in enumerate(quotas):
        segment = range(start, start + n // 10 + (i < n % 10))
        want += sorted(sorted(segment, key=lambda t: -float(attention[t]))[:quota])
        start = segment.stop
    assert out.slots.tolist() == want


@pytest.mark.parametrize("n", range(1, 40))
@pytest.mark.parametrize("segments", [1, 3, 10])
def test_every_segment_can_keep_its_quota(n, segments):
    for keep in range(1, n + 1):
        out = run_one("attention-topk", torch.randn(n, 2), keep_ratio=keep / n, segments=segments)
        assert out.lengths == (keep,)


@pytest.mark.parametrize("keep_ratio", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("contextual", [0.18, 1.0])
@pytest.mark.parametrize("heads", [1, 2])
def test_contextual_tokens_by_loops(keep_ratio, contextual, heads):
    stream, context = make_inputs(LENGTHS)
    method = make("attention-topk", keep_ratio=keep_ratio, contextual_ratio=contextual, key_heads=heads)
    out = method(stream, context)
    parts = stream.split(), context.encoder_attention.split(LENGTHS), context.encoder_keys.split()
    for got, clip, attention, states in zip(out.split(), *parts, strict=True):
        n, m = clip.lengths[0], got.lengths[0]
        if n == 0:
            continue
        share = max(1, round(contextual * m))
        dominant = sorted(range(n), key=lambda i: (-float(attention[i]), i))[: m - share]
        rest = [i for i in range(n) if i not in dominant]
        targets = [rest[(2 * i + 1) * len(rest) // (2 * share)] for i in range(share)]
        keys = unit(states.embeds[: 2 * n].reshape(n, 2, heads, -1).mean((1, 2)))
        members = {i: [i] for i in [*dominant, *targets]}
        for i in rest:
            if i not in targets:
                members[max(targets, key=lambda t: (float(keys[i] @ keys[t]), -t))].append(i)
        assert got.slots.tolist() == sorted(members)
        for slot, size, token in zip(got.slots.tolist(), got.sizes, got.embeds, strict=True):
            assert size == len(members[slot])
            torch.testing.assert_close(token, clip.embeds[members[slot]].mean(0))


def test_dominant_tokens_stay_as_they_are():
    stream, context = make_clip(50)
    out = make("attention-topk:visionzip-om")(stream, context)
    alone = out.sizes == 1
    assert alone.sum() >= 25 - round(0.18 * 25)
    assert torch.equal(out.embeds[alone], stream.embeds[out.slots[alone]])


def test_the_earliest_of_equal_targets_wins():
    """The second target is nearer by less than float32 tells apart, the third by more."""
    angles = torch.tensor([0.0, 0.3, 0.3 - 1e-7, 0.29, 0.0, 0.3], dtype=torch.double)
    embeds = torch.stack([angles.cos(), angles.sin()], dim=1)
    tokens, targets = torch.tensor([0, 4]), torch.tensor([1, 2, 5])
    nearest, cosine = most_alike(embeds, tokens, (1, 0, 1), targets, (2, 0, 1))
    assert nearest.tolist() == [1, 5]
    torch.testing.assert_close(cosine, torch.tensor([0.3, 0.3]).cos())
    assert most_alike(embeds, tokens[:1], (1,), torch.tensor([1, 2, 3]), (3,))[0].tolist() == [3]
    assert [x.tolist() for x in most_alike(embeds, tokens, (1, 1), tokens[:1], (1, 0))] == [[0, 4], [1, -torch.inf]]
    assert [len(x) for x in most_alike(embeds.bfloat16(), tokens[:0], (), targets[:0], ())] == [0, 0]


# SA-MAP -----------------------------------------------------------------------------------------------------------


def slow_groups(embeds, least, threshold, longest) -> list[list[int]]:
    x, groups, closeness = unit(embeds), [], {}
    for i in range(len(x)):
        mean = float((x[groups[-1]] @ x[i]).mean()) if groups else -2.0
        if groups and len(groups[-1]) < longest and mean >= threshold:
            groups[-1].append(i)
            closeness[i] = mean
        else:
            groups.append([i])
    opened = sorted(closeness, key=lambda i: (closeness[i], i))[: max(0, least - len(groups))]
    starts = sorted([g[0] for g in groups] + opened)
    return [list(range(a, b)) for a, b in zip(starts, [*starts[1:], len(x)], strict=True)]


def walk(n: int, step: float, seed: int) -> torch.Tensor:
    """Tokens that change slowly, as speech does."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(HIDDEN_SIZE, generator=generator) + step * torch.randn(
        n, HIDDEN_SIZE, generator=generator
    ).cumsum(0)


@pytest.mark.parametrize("keep_ratio", [0.05, 0.3, 0.8])
@pytest.mark.parametrize("step", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("longest", [1, 2, 7, 250])
def test_sa_map_by_loops(longest, step, keep_ratio):
    lengths = (40, 0, 1, 90, 2)
    stream, context = make_inputs(lengths)
    stream = stream.replace(embeds=torch.cat([walk(n, step, i) for i, n in enumerate(lengths)]))
    out = make("sa-map", keep_ratio=keep_ratio, max_group=longest)(stream, context)
    attentions = context.encoder_attention.split(lengths)
    for got, clip, attention in zip(out.split(), stream.split(), attentions, strict=True):
        if not clip.lengths[0]:
            continue
        m = token_budget(clip.lengths, keep_ratio)[0]
        groups = slow_groups(clip.embeds, m, 0.85, longest)
        merged = torch.stack([(attention[g, None] * clip.embeds[g]).sum(0) / attention[g].sum() for g in groups])
        quality = torch.stack([attention[g].mean() for g in groups])
        kept = sorted(slow_greedy_map(quality, merged, m)) if len(groups) > m else range(m)
        assert got.lengths == (m,)
        assert got.slots.tolist() == [sum(groups[i]) // len(groups[i]) for i in kept]
        assert got.sizes.tolist() == [len(groups[i]) for i in kept]
        torch.testing.assert_close(got.embeds, merged[list(kept)], rtol=1e-5, atol=1e-5)


def test_sa_map_by_hand():
    # Three of one kind and two of another: two groups. A budget of three opens the earliest join, of equal cosines.
    embeds = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1], [0, 1]])
    attention = [1.0, 2, 1, 0, 0]
    out = run_one("sa-map", embeds, attention, keep_ratio=0.4)
    assert (out.slots.tolist(), out.sizes.tolist()) == ([1, 3], [3, 2])
    out = run_one("sa-map", embeds, attention, keep_ratio=0.6)
    assert (out.slots.tolist(), out.sizes.tolist()) == ([0, 1, 3], [1, 2, 2])
    assert run_one("sa-map", embeds, attention, keep_ratio=0.2).slots.tolist() == [1], "the attended group"


def test_a_group_nobody_attends_to_is_its_mean():
    embeds = torch.randn(1, 4) + 0.01 * torch.randn(6, 4)
    out = run_one("sa-map", embeds, torch.zeros(6), keep_ratio=1 / 6)
    torch.testing.assert_close(out.embeds, embeds.mean(0, keepdim=True))


# Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("embeds", [torch.full((60, 576), 0.1), torch.zeros(60, 576)], ids=["copies", "zeros"])
def test_silence_keeps_the_same_tokens_every_time(name, embeds):
    out = run_one(name, embeds, keep_ratio=0.2)
    again = run_one(name, embeds, keep_ratio=0.2)
    assert out.lengths == (12,)
    assert torch.equal(out.slots, again.slots)
    torch.testing.assert_close(out.embeds, embeds[:12])
    if name in ("attention-topk", "divprune", "dart", "dart:text") or name.startswith("cdpruner"):
        assert out.slots.tolist() == list(range(12)), "of equal tokens the earliest"


@pytest.mark.parametrize("name", METHODS)
def test_no_gradient_through_the_choice(name):
    stream, context = make_clip(50)
    stream.embeds.requires_grad_(True)
    context.encoder_attention.requires_grad_(True)
    make(name, keep_ratio=0.3)(stream, context).embeds.sum().backward()
    assert context.encoder_attention.grad is None


@pytest.mark.parametrize("name", [name for name in METHODS if "encoder_attention" in make(name).needs])
def test_attention_that_does_not_fit(name):
    stream, context = make_inputs(LENGTHS)
    attention = context.encoder_attention
    for value, what in ((float("nan"), "NaN"), (-1.0, "negative")):
        broken = attention.clone()
        broken[9] = value
        with pytest.raises(ValueError, match=f"{make(name).name}: clip 3 of 6 has {what}"):
            make(name)(stream, dataclasses.replace(context, encoder_attention=broken))
    with pytest.raises(ValueError, match=r"must be \[N\] = \[73\], got \[72\]"):
        make(name)(stream, dataclasses.replace(context, encoder_attention=attention[1:]))


@pytest.mark.parametrize("name", ["cdpruner", "dart:text"])
def test_question_that_does_not_fit(name):
    stream, context = make_inputs((5, 0, 3))
    embeds = torch.ones(4, HIDDEN_SIZE)

    def ask(*lengths):
        question = TokenStream(embeds[: sum(lengths)], lengths)
        return make(name)(stream, dataclasses.replace(context, question=question))

    assert ask(1, 0, 2).lengths == (3, 0, 2)  # a clip without tokens needs no question
    with pytest.raises(ValueError, match=r"clip 2 of 3 has 3 tokens but an empty question"):
        ask(1, 1, 0)
    with pytest.raises(ValueError, match="the stream's 3 clips and of width 12, got 2 clips of width 12"):
        ask(1, 1)
    embeds = torch.full_like(embeds, torch.nan)
    with pytest.raises(ValueError, match="clip 0 of 3 has NaN or infinite question"):
        ask(1, 0, 1)


def test_keys_that_do_not_fit():
    stream, context = make_inputs((5, 3))
    method = make("attention-topk:visionzip-om", key_heads=3)
    with pytest.raises(ValueError, match="key_heads must divide the keys' width 8, got 3"):
        method(stream, context)
    short = TokenStream(torch.ones(14, 8), (10, 4))
    with pytest.raises(ValueError, match=r"must hold \[10, 6\] states \(or one more\) .* got \[10, 4\]"):
        method(stream, dataclasses.replace(context, encoder_keys=short))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("attention-topk", {"segments": 0}, "segments must be a whole number >= 1, got 0"),
        (
            "attention-topk",
            {"contextual_ratio": 1.5},
            r"contextual_ratio must be in \[0, 1\], got 1.5",
        ),
        ("attention-topk", {"key_heads": 2}, "key_heads needs contextual_ratio > 0"),
        ("cdpruner", {"quality": "loudness"}, "quality must be one of 'question', 'attention', 'none', got 'loudness'"),
        ("dart", {"pivots": 0}, "pivots must be a whole number >= 1, got 0"),
        ("dart", {"question_pivots": -1}, "question_pivots must be a whole number >= 0, got -1"),
        ("sa-map", {"threshold": 2}, r"threshold must be in \[-1, 1\], got 2"),
        ("sa-map", {"max_group": 0}, "max_group must be a whole number >= 1, got 0"),
        ("divprune", {"keep_ratio": 0}, "keep_ratio is tokens out / tokens in"),
    ],
)
def test_options_are_checked(name, options, message):
    with pytest.raises(ValueError, match=message):
        make(name, **options)
