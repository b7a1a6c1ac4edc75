"""Ward: the segmentations against brute force and sequential agglomeration, the representatives by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from audiopress import TokenStream, build
from audiopress.kernels import move_boundaries, ward_exact, ward_greedy
from audiopress.kernels.ward import segment_costs, ward_heights

from .compression_cases import HIDDEN_SIZE, make_inputs, make_stream

LENGTHS = (7, 0, 23, 1, 2, 13)


def make(keep_ratio: float, **options):
    return build("ward", hidden_size=HIDDEN_SIZE, keep_ratio=keep_ratio, **options)


def ward_adjusted(embeds: Tensor, weights: Tensor, lengths, budget, pooled: bool = False) -> Tensor:
    return move_boundaries(embeds, weights, lengths, ward_greedy(embeds, weights, lengths, budget, pooled))


EACH = pytest.mark.parametrize("segment", [ward_greedy, ward_adjusted, ward_exact])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def walk(n: int, width: int = 8, seed: int = 0) -> Tensor:
    return random(n, width, seed=seed).cumsum(0)


def alone(segment, embeds: Tensor, k: int, weights: Tensor | None = None, **options) -> list[int]:
    """Segments one clip."""
    weights = torch.ones(len(embeds)) if weights is None else weights
    return segment(embeds, weights, (len(embeds),), (k,), **options).tolist()


def cost(embeds: Tensor, counts: list[int], weights: Tensor | None = None) -> float:
    """The summed variance, by its definition, in float64."""
    weights = torch.ones(len(embeds)) if weights is None else weights
    runs = zip(embeds.double().split(counts), weights.double()[:, None].split(counts), strict=True)
    return sum(float((w * (x - (w * x).sum(0) / w.sum()).square()).sum()) for x, w in runs)


def segmentations(n: int, k: int) -> list[list[int]]:
    cuts = itertools.combinations(range(1, n), k - 1)
    return [[b - a for a, b in itertools.pairwise((0, *c, n))] for c in cuts]


def agglomerate(embeds: Tensor, k: int, weights: Tensor) -> list[int]:
    """The sequential algorithm: joins the cheapest pair of neighbours until k runs are left."""
    runs = [[i] for i in range(len(embeds))]

    def joined(a: list[int], b: list[int]) -> float:
        return cost(embeds[a + b], [len(a + b)], weights[a + b]) - sum(
            cost(embeds[x], [len(x)], weights[x]) for x in (a, b)
        )

    while len(runs) > k:
        costs = [joined(a, b) for a, b in itertools.pairwise(runs)]
        i = costs.index(min(costs))
        runs[i : i + 2] = [runs[i] + runs[i + 1]]
    return [len(run) for run in runs]


def moved(embeds: Tensor, counts: list[int], weights: Tensor) -> list[int]:
    """One sweep, a boundary after the other, each tried everywhere between its neighbours."""
    cuts = [0, *itertools.accumulate(counts)]
    for i in [*range(1, len(counts), 2), *range(2, len(counts), 2)]:
        start, end = cuts[i - 1], cuts[i + 1]
        costs = [cost(embeds[start:end], [cut - start, end - cut], weights[start:end]) for cut in range(start + 1, end)]
        if min(costs) < costs[cuts[i] - start - 1]:
            cuts[i] = start + 1 + costs.index(min(costs))
    return [b - a for a, b in itertools.pairwise(cuts)]


# The segmentations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 9, 12])
def test_exact_is_the_best_of_all_segmentations(n):
    embeds, weights = walk(n, 3), random(n).exp()
    for k in range(1, n + 1):
        best = min(segmentations(n, k), key=lambda counts: cost(embeds, counts, weights))
        assert alone(ward_exact, embeds, k, weights) == best


@pytest.mark.parametrize("max_segment", [1, 2, 3, 5])
def test_exact_keeps_to_its_cap_and_raises_it_where_the_budget_needs_it(max_segment):
    embeds = walk(11, 3)
    for k in (2, 3, 4, 7):
        cap = max(max_segment, math.ceil(11 / k))
        allowed = [counts for counts in segmentations(11, k) if max(counts) <= cap]
        best = min(allowed, key=lambda counts: cost(embeds, counts))
        assert alone(ward_exact, embeds, k, max_segment=max_segment) == best


def test_segment_costs_are_the_variance_of_every_run():
    embeds, weights, lengths = random(9, 4), random(9).exp(), (5, 0, 4)
    costs = segment_costs(embeds, weights, lengths, 4)
    for (e, i), found in zip(itertools.product(range(4), range(9)), costs.flatten().tolist(), strict=True):
        inside = i - e >= (0 if i < 5 else 5)
        run = slice(max(i - e, 0), i + 1)
        want = cost(embeds[run], [e + 1], weights[run]) if inside else math.inf
        assert found == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_greedy_is_sequential_agglomeration(seed):
    embeds, weights = walk(30, seed=seed), random(30, seed=seed).exp()
    for k in (1, 3, 8, 20, 29, 30):
        assert alone(ward_greedy, embeds, k, weights) == agglomerate(embeds, k, weights)


@pytest.mark.parametrize("keep_ratio", [0.5, 0.25, 0.1])
def test_greedy_is_near_the_optimum_and_adjusted_nearer(keep_ratio):
    embeds, k = walk(400, 16), int(400 * keep_ratio)
    best, adjusted, greedy = (cost(embeds, alone(s, embeds, k)) for s in (ward_exact, ward_adjusted, ward_greedy))
    even = [(i + 1) * 400 // k - i * 400 // k for i in range(k)]
    assert best < adjusted < greedy < 1.07 * best < cost(embeds, even)
    assert adjusted - best < 0.7 * (greedy - best)


@pytest.mark.parametrize("n", [2, 3, 7, 12])
def test_a_single_boundary_is_moved_to_the_best_of_all_places(n):
    embeds, weights = walk(n, 3), random(n).exp()
    for start in segmentations(n, 2):
        found = move_boundaries(embeds, weights, (n,), torch.tensor(start), sweeps=1)
        assert found.tolist() == min(segmentations(n, 2), key=lambda counts: cost(embeds, counts, weights))


@pytest.mark.parametrize("sweeps", [0, 1, 2, 8])
@pytest.mark.parametrize("embeds", [walk(60), random(60, 8)], ids=["walk", "noise"])
def test_boundaries_move_as_they_do_one_by_one(embeds, sweeps):
    weights = random(60, seed=1).exp()
    for k in (1, 2, 5, 20, 45, 60):
        counts = [(i + 1) * 60 // k - i * 60 // k for i in range(k)]
        found = move_boundaries(embeds, weights, (60,), torch.tensor(counts), sweeps).tolist()
        for _ in range(sweeps):
            before, counts = counts, moved(embeds, counts, weights)
            assert cost(embeds, counts, weights) <= cost(embeds, before, weights)
        assert found == counts


def test_boundaries_of_packed_clips_move_inside_them():
    embeds, weights, budget = walk(sum(LENGTHS), 5), random(sum(LENGTHS)).exp(), (3, 0, 6, 1, 2, 4)
    counts = torch.cat([torch.tensor([n - k + 1] + [1] * (k - 1)) for n, k in zip(LENGTHS, budget, strict=True) if k])
    found = move_boundaries(embeds, weights, LENGTHS, counts)
    assert not torch.equal(found, counts)
    per_clip = zip(LENGTHS, embeds.split(LENGTHS), weights.split(LENGTHS), counts.split(budget), strict=True)
    for (n, x, w, start), end in zip(per_clip, found.split(budget), strict=True):
        assert torch.equal(end, move_boundaries(x, w, (n,), start))
        assert end.sum() == n
        assert (end > 0).all()


def test_of_equal_places_a_boundary_keeps_its_own_or_takes_the_earliest():
    ones = torch.ones(9)
    for start in ([1, 8], [4, 5], [3, 1, 5]):
        assert move_boundaries(torch.full((9, 3), 0.1), ones, (9,), torch.tensor(start)).tolist() == start
    either = torch.tensor([0.0, 1.0, 0.0])[:, None]  # one token off at either side
    assert move_boundaries(either, ones[:3], (3,), torch.tensor([2, 1])).tolist() == [2, 1]
    four = torch.tensor([0.0, 1.0, 1.0, 0.0])[:, None]
    assert move_boundaries(four, ones[:4], (4,), torch.tensor([2, 2])).tolist() == [1, 3]


def test_what_is_still_does_not_cost_what_moves_a_token():
    # A rule that joins every local minimum in each round would join a third of the moving half, too.
    embeds = torch.cat([0.001 * random(100, 8), random(100, 8, seed=1)])
    assert alone(ward_greedy, embeds, 101) == alone(ward_exact, embeds, 101, max_segment=100) == [100] + [1] * 100


def test_a_smaller_budget_joins_further():
    embeds = walk(60)
    boundaries = [set(itertools.accumulate(alone(ward_greedy, embeds, k))) for k in range(1, 61)]
    assert all(fewer < more for fewer, more in itertools.pairwise(boundaries))


@EACH
def test_more_runs_cost_less(segment):
    embeds = walk(60)
    costs = [cost(embeds, alone(segment, embeds, k)) for k in range(1, 61)]
    assert all(more < fewer for fewer, more in itertools.pairwise(costs))
    assert costs[-1] == 0


@EACH
def test_a_large_common_offset_changes_nothing(segment):
    far = walk(200, 600) + 1000  # rounded to what float32 holds there, and back again without a loss
    for k in (20, 50, 100):
        assert alone(segment, far, k) == alone(segment, far - 1000, k) == alone(segment, far.double() - 1000, k)


@EACH
def test_budgets_of_packed_clips(segment):
    embeds, budget = random(sum(LENGTHS), 5), (3, 0, 6, 1, 2, 1)
    counts = segment(embeds, torch.ones(len(embeds)), LENGTHS, budget).split(budget)
    for clip, k, found in zip(embeds.split(LENGTHS), budget, counts, strict=True):
        assert found.tolist() == (alone(segment, clip, k) if k else [])


@EACH
def test_no_clips_and_empty_clips(segment):
    for lengths in ((), (0,), (0, 0)):
        assert segment(torch.empty(0, 4), torch.empty(0), lengths, lengths).tolist() == []


# Silence ----------------------------------------------------------------------------------------------------------


def test_silence_is_split_the_same_way_every_time():
    silence = torch.full((16, 3), 0.1)
    assert alone(ward_greedy, silence, 4) == [4, 4, 4, 4]
    assert alone(ward_greedy, silence, 5) == [2, 2, 4, 4, 4]  # of equal boundaries the earliest
    assert alone(ward_exact, silence, 5) == [1, 1, 1, 1, 12]
    assert alone(ward_exact, silence, 5, max_segment=4) == [1, 3, 4, 4, 4]


def test_an_hour_of_silence_takes_few_rounds(monkeypatch):
    rounds, norm = [], torch.linalg.vector_norm
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda *args, **kw: rounds.append(1) or norm(*args, **kw))
    heights = ward_heights(torch.full((90_000, 2), 0.3), torch.ones(90_000), (90_000,))
    assert len(rounds) == 18  # 2**17 > 90,000, and the look at the start
    assert heights[0] == math.inf
    assert (heights[1:] < 1e-300).all()


@EACH
def test_duplicates_and_zeros_are_joined_first(segment):
    embeds = random(6, 4).repeat_interleave(torch.tensor([1, 3, 1, 2, 4, 1]), dim=0)
    embeds[4] = 0
    assert alone(segment, embeds, 6) == [1, 3, 1, 2, 4, 1]


# One budget for the batch -----------------------------------------------------------------------------------------


@EACH
def test_a_pooled_budget_goes_where_it_saves_most(segment):
    still, moving, k = 0.01 * random(30, 4), random(30, 4, seed=1), 31
    embeds = torch.cat([still, moving])
    counts = segment(embeds, torch.ones(60), (30, 30), (15, 16), pooled=True).tolist()
    assert len(counts) == k
    assert counts == [30] + [1] * 30


def test_the_exact_pooled_budget_is_the_best_of_all():
    embeds, lengths = walk(9, 3), (4, 5)
    budget = (2, 2)
    both = [(*a, *b) for k in range(1, 4) for a, b in itertools.product(segmentations(4, k), segmentations(5, 4 - k))]
    best = min(both, key=lambda counts: cost(embeds, list(counts)))
    assert ward_exact(embeds, torch.ones(9), lengths, budget, pooled=True).tolist() == list(best)


@pytest.mark.parametrize("segmentation", ["greedy", "adjusted", "exact"])
@pytest.mark.parametrize("keep_ratio", [0.01, 0.2, 0.7, 1])
def test_the_total_of_a_batch_is_exact(segmentation, keep_ratio):
    pooled, own = (make(keep_ratio, segmentation=segmentation, budget=budget) for budget in ("batch", "clip"))
    for lengths in (LENGTHS, (7,), (), (0, 0), (40, 40)):
        stream = make_stream(lengths)
        loud = torch.linspace(0.1, 3, max(len(lengths), 1))[stream.clips]
        out = pooled(stream.replace(embeds=stream.embeds * loud[:, None]))
        assert sum(out.lengths) == sum(own.budget(lengths))
        assert all((m > 0) == (n > 0) and m <= n for m, n in zip(out.lengths, pooled.budget(lengths), strict=True))
        assert [float(clip.sizes.sum()) for clip in out.split()] == list(lengths)
    assert pooled.adaptive
    assert not own.adaptive
    assert pooled.budget((3000,)) == own.budget((3000,)), "one clip has nothing to share"


# The tokens -------------------------------------------------------------------------------------------------------


def test_a_segment_is_its_mean_with_the_mean_norm():
    embeds = torch.zeros(4, HIDDEN_SIZE)
    embeds[:, :2] = torch.tensor([[3.0, 0.0], [0.0, 4.0], [30.0, 0.0], [60.0, 0.0]])
    stream = TokenStream(embeds, (4,), slots=torch.tensor([2, 5, 6, 9]), sizes=torch.tensor([1.0, 1.0, 1.0, 3.0]))
    out = make(0.75)(stream)
    assert out.embeds[0, :2].tolist() == pytest.approx([2.1, 2.8])  # the mean (1.5, 2) of norm 2.5, taken to 3.5
    assert out.embeds[1:, 0].tolist() == [30, 60]
    assert out.slots.tolist() == [3, 6, 9]
    assert out.sizes.tolist() == [2, 1, 3]
    assert make(0.75, norm_preserving=False)(stream).embeds[0, :2].tolist() == [1.5, 2]
    last = make(0.25)(stream).embeds[0, :2]  # sums of sizes: x (3 + 30 + 180) / 6, y 4 / 6
    mean = torch.tensor([213.0, 4.0]) / 6
    torch.testing.assert_close(last, mean / mean.norm() * (3 + 4 + 30 + 180) / 6)


def test_a_token_alone_stays_as_it_is_bit_for_bit():
    stream = make_stream((40,))
    out = make(0.8)(stream)
    alone = out.sizes == 1
    assert 20 < alone.sum() < 32
    assert torch.equal(out.embeds[alone], stream.embeds[out.slots[alone]])


def test_tokens_that_cancel_give_a_finite_token_and_gradient():
    half = random(1, HIDDEN_SIZE)
    embeds = torch.cat([half, -half, torch.zeros(2, HIDDEN_SIZE)]).requires_grad_()
    out = make(0.5)(TokenStream(embeds, (4,)))
    out.embeds.sum().backward()
    assert out.embeds.isfinite().all()
    assert embeds.grad.isfinite().all()


@pytest.mark.parametrize("segmentation", ["greedy", "adjusted", "exact"])
def test_a_token_of_size_n_counts_as_n_tokens(segmentation):
    sizes = torch.tensor([1, 4, 2, 1, 3, 1, 5, 2])
    embeds = walk(8, HIDDEN_SIZE)
    once = TokenStream(embeds, (8,), sizes=sizes.float())
    again = TokenStream(embeds.repeat_interleave(sizes, dim=0), (19,))
    for k in (2, 3, 5):
        a, b = (make(k / sum(s.lengths), segmentation=segmentation)(s) for s in (once, again))
        torch.testing.assert_close(a.embeds, b.embeds)
        assert torch.equal(a.sizes, b.sizes)


def test_attention_draws_the_boundaries_and_leaves_the_means():
    embeds = torch.zeros(4, HIDDEN_SIZE)
    embeds[:, 0] = torch.tensor([1.0, 2.0, 4.0, 4.5])
    stream, context = make_inputs((4,))
    context.encoder_attention = torch.tensor([0.25, 0.25, 16.0, 16.0])  # segmented as 0.5, 1, 16, 18
    plain, weighted = (make(0.75, weights=w)(stream.replace(embeds=embeds), context) for w in ("none", "attention"))
    assert plain.embeds[:, 0].tolist() == [1, 2, 4.25]
    assert weighted.embeds[:, 0].tolist() == [1.5, 4, 4.5]


def test_normalized_tokens_are_segmented_by_direction_and_averaged_as_they_are():
    stream = make_stream((23,))
    louder = stream.replace(embeds=stream.embeds * (1 + torch.arange(23.0))[:, None])
    by_direction = make(0.3, normalize=True)
    assert torch.equal(by_direction(louder).sizes, by_direction(stream).sizes)
    assert not torch.equal(make(0.3)(louder).sizes, make(0.3)(stream).sizes)
    counts = by_direction(louder).sizes.long().tolist()
    norms = torch.stack([part.norm(dim=1).mean() for part in louder.embeds.split(counts)])
    torch.testing.assert_close(by_direction(louder).embeds.norm(dim=1), norms)


def test_bad_attention_is_named():
    stream, context = make_inputs(LENGTHS)
    ward = make(0.5, weights="attention")
    for value, words in ((math.nan, "NaN or infinite"), (-1.0, "negative")):
        context.encoder_attention = torch.ones(sum(LENGTHS))
        context.encoder_attention[30] = value
        with pytest.raises(ValueError, match=f"ward: clip 3 of 6 has {words} encoder_attention"):
            ward(stream, context)
    context.encoder_attention = torch.ones(5)
    with pytest.raises(ValueError, match=r"encoder_attention must be \[N\] = \[46\], got \[5\]"):
        ward(stream, context)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("segmentation", "best"),
        ("budget", "all"),
        ("weights", None),
        ("norm_preserving", "yes"),
        ("proportional_attention", 2),
        ("max_segment", 0),
        ("keep_ratio", 0),
    ],
)
def test_bad_options_are_named(option, value):
    with pytest.raises(ValueError, match=option):
        build("ward", hidden_size=HIDDEN_SIZE, **{option: value})


# With others ------------------------------------------------------------------------------------------------------


def test_one_compressor_at_several_ratios():
    ward, stream = make(0.5), make_stream((40,))
    for keep_ratio in (0.1, 0.3, 1):
        assert torch.equal(ward.at(keep_ratio)(stream).embeds, make(keep_ratio)(stream).embeds)


def test_asks_for_proportional_attention_unless_told_otherwise():
    assert make(0.5).proportional_attention
    assert not make(0.5, proportional_attention=False).proportional_attention


def test_as_the_first_stage_of_a_trained_method():
    options = {"ward": {"keep_ratio": 0.5}, "stacking": {"k": 2, "mlp_size": 16}}
    chain = build("ward+stacking", hidden_size=HIDDEN_SIZE, **options)
    out = chain(make_stream(LENGTHS))
    assert out.lengths == chain.budget(LENGTHS) == (2, 0, 6, 1, 1, 4)
    assert [float(clip.sizes.sum()) for clip in out.split()] == list(LENGTHS)
    assert chain.proportional_attention
