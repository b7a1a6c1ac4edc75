"""The Triton kernels against float64: on a GPU, and on the CPU through Triton's interpreter.

The interpreter must be asked for before Triton is imported, so `test_in_the_interpreter` runs this file in a process
of its own.
"""

import itertools
import math
import mmap
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from audiopress.kernels import (
    adjacent_cosine,
    attention_received,
    causal_attention,
    farthest_first,
    gather_rows,
    greedy_map,
    most_alike,
    move_boundaries,
    segment_mean,
    segment_merge,
    top_k,
    ward_greedy,
)
from audiopress.kernels.greedy import Clip
from audiopress.kernels.segment import segment_reduce
from audiopress.kernels.select import TIE
from audiopress.kernels.ward import ward_heights

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
EPS = torch.finfo(torch.float32).eps
# The interpreter truncates to bfloat16 where a GPU rounds, and cannot multiply matrices of it.
DTYPES = [torch.float16, torch.float32] if INTERPRETED else [torch.bfloat16, torch.float16, torch.float32]
WIDTHS = [96, 33] if INTERPRETED else [3584, 2048, 1280, 576, 96, 33]
CLIPS = (0, 1, 2, 7, 23, 1) if INTERPRETED else (0, 1, 2, 13, 127, 300, 1)  # to choose from greedily
LENGTHS = (0, 1, 2, 0, 7, 1) if INTERPRETED else (0, 1, 2, 0, 13, 127, 750, 6422, 1)

NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named from Python 3.13 on; Linux's

on_device = pytest.mark.gpu if not INTERPRETED else lambda test: test
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_width = pytest.mark.parametrize("width", WIDTHS)


@pytest.fixture(autouse=True)
def poisoned():
    """Fills new memory with NaN, or the largest whole number."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def whole(numbers):
    return torch.tensor(numbers, device=DEVICE)


def runs(rows, seed=0):
    """Cuts rows into runs of 1 to 6, and one of 40."""
    counts = torch.randint(1, 7, (rows,), generator=torch.Generator().manual_seed(seed))
    counts[min(3, rows - 1)] = 40
    ends = counts.cumsum(0).clamp(max=rows)
    counts = ends.diff(prepend=ends.new_zeros(1))
    return counts[counts > 0].to(DEVICE)


def check(found, torch_found, want):
    """Asserts shape, dtype, infinities and an error of at most twice torch's."""
    assert (found.shape, found.dtype) == (torch_found.shape, torch_found.dtype)
    finite = want.isfinite()
    assert torch.equal(found.isfinite(), finite)
    scale = want[finite].abs().max() if finite.any() else 1

    def error(x):
        return float(((x.double() - want)[finite].abs() / scale).max()) if finite.any() else 0

    assert error(found) <= 2 * error(torch_found) + EPS


def with_gradient(function, inputs, grad):
    """Gives the result and the inputs' gradients."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return out.detach(), torch.autograd.grad(out, inputs, grad.to(out.dtype))


def cosine_in_fp64(embeds, lengths):
    clips = [functional.normalize(x, dim=1) for x in embeds.double().split(lengths)]
    return torch.cat([functional.pad((x[:-1] * x[1:]).sum(1), (0, min(1, len(x))), value=-torch.inf) for x in clips])


def mean_in_fp64(embeds, weights, counts):
    parts = zip(embeds.double().split(counts.tolist()), weights.double().split(counts.tolist()), strict=True)
    return torch.stack([(w[:, None] * x).sum(0) / w.sum() for x, w in parts])


def received_in_fp64(query, key, lengths, scale, causal):
    received = []
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    for q, k in zip(query.double().split(lengths), key.double().split(lengths), strict=True):
        total = torch.zeros(len(q), dtype=torch.double, device=q.device)
        for head in range(q.shape[1]):
            logits = q[:, head] @ k[:, head].T * scale
            if causal:
                logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -torch.inf)
            total += logits.softmax(dim=1).sum(dim=0)
        received.append(total / q.shape[1])
    return torch.cat(received)


def ward_heights_in_fp64(embeds, weights, lengths):
    found = []
    for tokens, sizes in zip(embeds.cpu().double().split(lengths), weights.cpu().double().split(lengths), strict=True):
        heights = torch.full_like(sizes, math.inf)
        runs = [(i, float(sizes[i]), tokens[i], 0.0) for i in range(len(tokens))]  # start, weight, mean, height inside
        while len(runs) > 1:
            pairs = itertools.pairwise(runs)
            costs = [v * w / (v + w) * float((x - y).square().sum()) for (_, v, x, _), (_, w, y, _) in pairs]
            ends = [0, *itertools.accumulate(len([*equal]) for _, equal in itertools.groupby(costs))]
            around = [math.inf, *costs, math.inf]
            lowest = [(a, b) for a, b in itertools.pairwise(ends) if around[a] > costs[a] < around[b + 1]]
            for i in reversed([i for stretch in lowest for i in range(*stretch, 2)]):
                (start, v, x, low), (right, w, y, high) = runs[i : i + 2]
                height = max(costs[i], math.nextafter(max(low, high), math.inf))
                runs[i : i + 2] = [(start, v + w, x + w / (v + w) * (y - x), height)]
                heights[right] = height
        found.append(heights)
    return torch.cat(found).to(embeds.device)


def farthest_in_fp64(embeds, count):
    unit = functional.normalize(embeds.double(), dim=1)
    distances, kept = 1 - unit @ unit.T, []
    gain = distances.clone().fill_diagonal_(torch.inf).amin(dim=1)
    for _ in range(count):
        kept.append(int((gain >= gain.max() - TIE).byte().argmax()))
        gain = distances[kept].amin(dim=0).index_fill(0, torch.tensor(kept, device=DEVICE), -torch.inf)
    return kept


def map_in_fp64(quality, embeds, count):
    """Takes every chosen token off the matrix of cosines; when nothing is left, the rest goes by quality."""
    unit, weight = functional.normalize(embeds.double(), dim=1), (quality.double() / quality.max()).square()
    matrix, kept = unit @ unit.T, []
    for _ in range(count):
        left = matrix.diagonal()
        most = (weight * left).max()
        if most <= 1e-9:
            break
        best = int(((weight * (left + TIE) >= most) & (left > 1e-9)).byte().argmax())
        matrix = matrix - torch.outer(matrix[best], matrix[best]) / matrix[best, best]
        kept.append(best)
        matrix[kept], matrix[:, kept] = 0, 0
    rest = quality.index_fill(0, torch.tensor(kept, dtype=torch.long, device=DEVICE), -torch.inf)
    return kept + rest.argsort(descending=True, stable=True)[: count - len(kept)].tolist()


def of_each_clip(choose, budget, *inputs):
    """Gives `choose(*rows of a clip, its budget)` of all clips, as packed indices in order."""
    rows = zip(*(x.split(CLIPS) for x in inputs), budget, strict=True)
    starts = itertools.accumulate(CLIPS)
    return [end - len(x[0]) + i for end, x in zip(starts, rows, strict=True) if x[-1] for i in sorted(choose(*x))]


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    # No conftest: it imports models, which this file does without.
    command = ["pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "--import-mode=importlib", "-n0", __file__]
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    # From another folder: `-m` puts the present one, which has packages named as others are, on the path.
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@on_device
@each_dtype
@each_width
def test_adjacent_cosine(width, dtype):
    embeds, grad = randn(sum(LENGTHS), width, dtype=dtype), randn(sum(LENGTHS), seed=1)
    embeds[1:] += embeds[:-1].clone()
    embeds[3] = 0  # a clip's last token
    want, (want_grad,) = with_gradient(lambda x: cosine_in_fp64(x, LENGTHS), [embeds.double()], grad)
    (found, (found_grad,)), (plain, (plain_grad,)) = (
        with_gradient(lambda x, b=b: adjacent_cosine(x, LENGTHS, b), [embeds], grad) for b in ("triton", "torch")
    )
    check(found, plain, want)
    large = want_grad.abs() > 1e6  # of the token of zeros, whose norm is taken as 1e-12
    assert large.any(dim=1).nonzero()[:, 0].tolist() in ([], [3])
    for x in (found_grad, plain_grad, want_grad):
        x[3] = 0
    check(found_grad, plain_grad, want_grad)


@on_device
def test_equal_pairs_have_equal_cosines():
    pair = randn(2, 96, dtype=DTYPES[0])
    found = adjacent_cosine(pair.repeat(9, 1), (6, 12), "triton")
    assert len(set(found.tolist())) == 2  # one cosine, whichever token comes first, and -inf
    assert adjacent_cosine(torch.zeros_like(pair), (2,), "triton").tolist() == [0, -torch.inf]


@on_device
def test_clips_do_not_touch_each_other():
    embeds = randn(sum(LENGTHS), 96)
    whole = adjacent_cosine(embeds, LENGTHS, "triton").split(LENGTHS)
    for clip, part in zip(embeds.split(LENGTHS), whole, strict=True):
        assert torch.equal(adjacent_cosine(clip, (len(clip),), "triton"), part)


@on_device
@each_dtype
@each_width
def test_segment_mean(width, dtype):
    rows = sum(LENGTHS)
    counts, weights = runs(rows), randn(rows, seed=1).abs() + 0.1
    embeds, grad = randn(rows, width, dtype=dtype), randn(len(counts), width, seed=2)
    want, want_grads = with_gradient(
        lambda x, w: mean_in_fp64(x, w, counts), [embeds.double(), weights.double()], grad.to(dtype)
    )
    (found, found_grads), (plain, plain_grads) = (
        with_gradient(lambda x, w, b=b: segment_mean(x, w, counts, b), [embeds, weights], grad)
        for b in ("triton", "torch")
    )
    for x in zip((found, *found_grads), (plain, *plain_grads), (want, *want_grads), strict=True):
        check(*x)
    single = counts == 1
    assert torch.equal(found[single], embeds[(counts.cumsum(0) - 1)[single]])


@on_device
@pytest.mark.parametrize("sizes", ["whole", "fractions"])
def test_segment_merge(sizes, monkeypatch):
    rows = sum(LENGTHS)
    embeds, counts, slots = randn(rows, 1280, dtype=DTYPES[0]), runs(rows), torch.arange(rows, device=DEVICE) * 3
    weights = randn(rows, seed=1).abs() + 0.1
    weights = weights.ceil() if sizes == "whole" else weights
    found, plain = (segment_merge(embeds, slots, weights, counts, b) for b in ("triton", "torch"))
    check(found[0], plain[0], mean_in_fp64(embeds, weights, counts))
    assert torch.equal(found[1], plain[1])
    assert found[1].dtype == torch.int64
    check(found[2], plain[2], torch.stack([w.double().sum() for w in weights.split(counts.tolist())]))
    monkeypatch.setattr("audiopress.kernels.triton_segment.MANY", 1)
    for x, y in zip(segment_merge(embeds, slots, weights, counts, "triton"), found, strict=True):
        assert torch.equal(x, y)


@on_device
@each_dtype
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("lengths", "size", "heads", "key_heads"),
    [((0, 1, 2, 7), 12, 2, 2), ((40, 17), 16, 2, 1)]
    if INTERPRETED
    else [((100,) * 20 + (0, 1, 2, 63), 64, 20, 20), ((750, 1, 0, 127, 300), 128, 28, 4), ((1999,), 128, 4, 2)],
)
def test_attention_received(lengths, size, heads, key_heads, causal, dtype, monkeypatch):
    if INTERPRETED:  # more than one tile
        monkeypatch.setattr("audiopress.kernels.triton_received.TILE", 32)
        monkeypatch.setattr("audiopress.kernels.triton_received.STEP", 16)
    q, k = randn(sum(lengths), heads, size, dtype=dtype), randn(sum(lengths), key_heads, size, dtype=dtype, seed=1)
    scale = 2 * size**-0.5
    found, plain = (attention_received(q, k, lengths, scale, causal, backend=b) for b in ("triton", "torch"))
    want = received_in_fp64(q, k, lengths, scale, causal)
    check(found, plain, want)
    for part in found.split(lengths):
        if len(part):
            assert float(part.mean()) == pytest.approx(1, abs=1e-5)
    found = attention_received(q, k, lengths, scale, causal, log=True, backend="triton")
    torch.testing.assert_close(found.double(), want.log(), rtol=1e-5, atol=1e-5)
    # One-hot, as where products are large whole numbers: all but a few tokens would underflow.
    q, k = (x.mul(30).round() for x in (q, k))
    found, plain = (attention_received(q, k, lengths, 1, causal, log=True, backend=b) for b in ("triton", "torch"))
    assert causal or min(lengths) < 2 or found.min() < -200
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=5e-3)  # of logits of some thousands


@on_device
@pytest.mark.parametrize("block", [16] if INTERPRETED else [16, 8192])  # several at a time, and one
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64] + [torch.float64, torch.float16] * (not INTERPRETED))
def test_top_k(dtype, block, monkeypatch):
    monkeypatch.setattr("audiopress.kernels.triton_select.BLOCK", block)
    lengths = (*LENGTHS, 40)
    scores = randn(sum(lengths)) * 100
    ties = (scores / 50).round()  # with negative zeros
    if dtype.is_floating_point:
        ties[::7], ties[1::7] = torch.inf, -torch.inf
    for values in (scores, ties):
        values = values.to(dtype)
        for budget in ([n // 2 for n in lengths], [*lengths[:-1], 1]):
            found = top_k(values, lengths, budget, "triton")
            assert torch.equal(found, top_k(values, lengths, budget, "torch"))


@pytest.fixture
def small_ward(monkeypatch):
    """Has the interpreter take several blocks, and few programs."""
    if INTERPRETED:
        for name, value in (("BLOCK", 8), ("PROGRAMS", 2), ("ROUNDS", 3)):
            monkeypatch.setattr(f"audiopress.kernels.triton_ward.{name}", value)


@on_device
@each_dtype
@pytest.mark.parametrize("width", [33] if INTERPRETED else [3584, 1280, 33])
def test_ward_heights(width, dtype, small_ward):
    lengths = (*LENGTHS, 23)
    embeds = randn(sum(lengths), 2 * width, dtype=dtype)[:, ::2]
    weights = (randn(2 * sum(lengths), seed=1).abs() + 0.1)[::2]
    heights, plain = (ward_heights(embeds, weights, lengths, b) for b in ("triton", "torch"))
    check(heights, plain, ward_heights_in_fp64(embeds, weights, lengths))
    budget = [-(-n // 4) for n in lengths]
    for pooled in (False, True):
        found, plain = (ward_greedy(embeds, weights, lengths, budget, pooled, b) for b in ("triton", "torch"))
        assert torch.equal(found, plain)
    for parts in zip(*(x.split(lengths) for x in (embeds, weights, heights)), strict=True):
        if 0 < len(parts[0]) < 100:
            assert torch.equal(ward_heights(*parts[:2], (len(parts[0]),), "triton"), parts[2])


def moved_in_fp64(embeds, weights, lengths, counts, sweeps):
    found = []
    for tokens, sizes, runs in zip(embeds.split(lengths), weights.split(lengths), counts, strict=True):
        cuts = [0, *itertools.accumulate(runs)]
        for i in sweeps * [*range(1, len(runs), 2), *range(2, len(runs), 2)]:
            start, now, end = cuts[i - 1 : i + 2]
            x, w = tokens[start:end], sizes[start:end, None]
            before = w.cumsum(0)[:-1, 0]
            sums = (w * (x - (w * x).sum(0) / w.sum())).cumsum(0)[:-1]
            gains = sums.square().sum(1) / (before * (w.sum() - before))
            if gains.max() > gains[now - start - 1] * (1 + 1e-6):
                cuts[i] = start + 1 + int(gains.argmax())
        found += [b - a for a, b in itertools.pairwise(cuts)]
    return torch.tensor(found)


def variance(embeds, weights, counts):
    means = segment_reduce(weights[:, None] * embeds, "sum", counts) / segment_reduce(weights, "sum", counts)[:, None]
    return float((weights[:, None] * (embeds - means.repeat_interleave(counts, dim=0)).square()).sum())


@on_device
@each_dtype
@pytest.mark.parametrize("width", [33] if INTERPRETED else [3584, 1280, 33])
def test_move_boundaries(width, dtype):
    lengths = (*LENGTHS, 23)
    budget = [-(-n // 4) for n in lengths]
    embeds = randn(sum(lengths), 2 * width, dtype=dtype)[:, ::2]
    weights = (randn(2 * sum(lengths), seed=1).abs() + 0.1)[::2]
    counts = whole([n // k + (i < n % k) for n, k in zip(lengths, budget, strict=True) for i in range(k)])
    found, plain = (move_boundaries(embeds, weights, lengths, counts, 2, b).cpu() for b in ("triton", "torch"))
    embeds, weights, counts = embeds.cpu().double(), weights.cpu().double(), counts.cpu()
    want = moved_in_fp64(embeds, weights, lengths, [runs.tolist() for runs in counts.split(budget)], 2)
    # Not the same numbers: of thousands of boundaries two places may be all but equal.
    start, *ends = (variance(embeds, weights, c) for c in (counts, want, found, plain))
    assert ends[0] < 0.999 * start
    assert ends == pytest.approx([ends[0]] * 3, rel=1e-5)
    for c in (found, plain):
        assert [int(runs.sum()) for runs in c.split(budget)] == list(lengths)
        assert (c > 0).all()


@on_device
def test_boundaries_of_equal_tokens_stay():
    lengths, counts = (9, 14), torch.tensor([4, 5, 1, 2, 11], device=DEVICE)
    for tokens in (torch.full((23, 8), 0.1, device=DEVICE), torch.zeros(23, 8, device=DEVICE)):
        found = move_boundaries(tokens, tokens.new_ones(23), lengths, counts, backend="triton")
        assert torch.equal(found, counts)


@on_device
def test_ward_heights_of_equal_costs(small_ward):
    lengths, budget = (0, 9, 1, 14), (0, 2, 1, 5)
    silence, some, pair = torch.full((24, 8), 0.1, device=DEVICE), randn(5, 8), randn(2, 8)
    for embeds in (silence, pair.repeat(12, 1), torch.cat([silence[:13], some, silence[:6] * 0])):
        found, plain = (ward_heights(embeds, embeds.new_ones(24), lengths, b) for b in ("triton", "torch"))
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=0)
        found, plain = (top_k(heights, lengths, budget, "torch") for heights in (found, plain))
        assert torch.equal(found, plain)


@on_device
@each_dtype
@pytest.mark.parametrize("width", [33, 64] if INTERPRETED else [3584, 1280, 33])
def test_most_alike(width, dtype, monkeypatch):
    if INTERPRETED:  # several tiles
        monkeypatch.setattr("audiopress.kernels.triton_alike.HALF", {"ROWS": 16, "COLUMNS": 16, "CHUNK": 32})
        monkeypatch.setattr("audiopress.kernels.triton_alike.FULL", {"ROWS": 16, "COLUMNS": 16, "CHUNK": 16})
    lengths = (0, 1, 2, 0, 7, 97, 1) if INTERPRETED else LENGTHS
    target_counts = [n // 3 for n in lengths]
    counts = [n - m for n, m in zip(lengths, target_counts, strict=True)]
    embeds = randn(sum(lengths), width, dtype=dtype)
    embeds[5:9] = embeds[-5]  # copies
    index = torch.arange(sum(lengths), device=DEVICE).split(lengths)
    tokens = torch.cat([clip[m:] for clip, m in zip(index, target_counts, strict=True)])
    targets = torch.cat([clip[:m] for clip, m in zip(index, target_counts, strict=True)])
    nearest, cosine = most_alike(embeds, tokens, counts, targets, target_counts, "triton")
    unit = functional.normalize(embeds.double(), dim=1)
    parts = tokens.split(counts), nearest.split(counts), cosine.split(counts), targets.split(target_counts)
    for mine, got, best, theirs in zip(*parts, strict=True):
        if len(theirs) == 0:
            assert torch.equal(got, mine)
            assert (best == -torch.inf).all()
            continue
        want = unit[mine] @ unit[theirs].T
        error = 1e-6 if dtype == torch.float32 or INTERPRETED else 3e-5  # tensor cores keep fewer digits of a sum
        torch.testing.assert_close(best.double(), want.amax(1), rtol=0, atol=error)
        place = torch.searchsorted(theirs, got)
        assert (want.amax(1) - want.gather(1, place[:, None])[:, 0]).max() <= 1e-6 + 2 * error
        if error > 1e-6:
            continue
        surely, perhaps = (want >= want.amax(1, keepdim=True) - tie for tie in (0.8e-6, 1.2e-6))
        assert (place <= surely.byte().argmax(1)).all()
        assert perhaps.gather(1, place[:, None]).all()
        assert (place >= perhaps.byte().argmax(1)).all()


@on_device
@pytest.mark.parametrize("first", [0, 3, 14, 15, 16, 40])
def test_the_earliest_of_nearly_equal_targets(first, monkeypatch):
    """Of targets in other tiles that come within 1e-6 of each other, one after another a little nearer."""
    monkeypatch.setattr("audiopress.kernels.triton_alike.FULL", {"ROWS": 16, "COLUMNS": 16, "CHUNK": 16})
    angles = torch.full((60,), 1.0, dtype=torch.double)
    angles[first : first + 3] = torch.tensor([0.5 + 3e-6, 0.5 + 1e-6, 0.5])
    angles[first + 3 :: 5] = 0.5 - 2e-7  # cosines rise by 1.4e-6, more than 1e-6, then 4.8e-7 and 1e-7
    embeds = torch.stack([angles.cos(), angles.sin()], dim=1).to(DEVICE, torch.float32)
    embeds = torch.cat([embeds, embeds.new_tensor([[1, 0]])])
    every = torch.arange(61, device=DEVICE)
    nearest, _ = most_alike(embeds, every[60:], [1], every[:60], [60], "triton")
    assert nearest.tolist() == [first + 1]


@on_device
@pytest.mark.parametrize("data", ["random", "ties"])
@pytest.mark.parametrize("width", [64, 5])
@pytest.mark.parametrize("dtype", DTYPES[-1:] if INTERPRETED else DTYPES, ids=str)
def test_greedy_choices(dtype, width, data, monkeypatch):
    monkeypatch.setattr("audiopress.kernels.triton_greedy.PANEL", 4)
    embeds, quality = randn(sum(CLIPS), width, dtype=dtype), randn(sum(CLIPS), seed=1).abs() + 0.1
    if data == "ties":
        embeds, quality = (embeds * 0.8).round(), quality.ceil()  # of width 5: many copies, and zeros
    for budget in ([n // 3 for n in CLIPS], [n - n // 5 for n in CLIPS]):
        found = farthest_first(embeds, CLIPS, budget, "triton")
        assert found.tolist() == of_each_clip(farthest_in_fp64, budget, embeds)
        assert torch.equal(found, farthest_first(embeds, CLIPS, budget, "torch"))
        found = greedy_map(quality, embeds, CLIPS, budget, "triton")
        assert found.tolist() == of_each_clip(map_in_fp64, budget, quality, embeds)
        assert torch.equal(found, greedy_map(quality, embeds, CLIPS, budget, "torch"))


@on_device
@pytest.mark.parametrize("choose", [farthest_first, greedy_map])
def test_greedy_choices_do_not_depend_on_the_other_clips(choose, monkeypatch):
    budget = [n // 2 for n in CLIPS]
    inputs = (randn(sum(CLIPS), 33),) if choose is farthest_first else (randn(sum(CLIPS)).abs(), randn(sum(CLIPS), 33))

    def alone(*rows):
        *clip, count = rows
        return choose(*clip, (len(clip[0]),), (count,), "triton").tolist()

    want = of_each_clip(alone, budget, *inputs)
    for room, longest in ((10**9, 10**9), (500, 10**9), (500, 7)):  # all at once, in turn, and the longest by torch
        monkeypatch.setattr("audiopress.kernels.triton_greedy.ROOM", room)
        monkeypatch.setattr("audiopress.kernels.greedy.LONGEST", longest)
        assert choose(*inputs, CLIPS, budget, "triton").tolist() == want


@on_device
def test_greedy_choices_where_nothing_new_is_left():
    embeds, ones = randn(3, 33).repeat_interleave(4, dim=0), torch.ones(12, device=DEVICE)
    for backend in ("triton", "torch"):
        assert farthest_first(embeds, (12,), (3,), backend).tolist() == [0, 4, 8]
        assert farthest_first(embeds, (12,), (5,), backend).tolist() == [0, 1, 2, 4, 8]
        assert greedy_map(ones, embeds, (12,), (5,), backend).tolist() == [0, 1, 2, 4, 8]
        assert greedy_map(ones, embeds * 0, (12,), (3,), backend).tolist() == [0, 1, 2]
        assert greedy_map(ones * 0, embeds, (12,), (3,), backend).tolist() == [0, 1, 2]


@on_device
@pytest.mark.parametrize("lengths", [(5, 12), (8, 8)])
def test_greedy_choices_of_nan_mark_no_other_clip(lengths):
    """On a GPU NaN is told of after they ran."""
    from audiopress.kernels import triton_greedy

    embeds, quality = randn(sum(lengths), 33), torch.ones(sum(lengths), device=DEVICE)
    embeds[1, 0] = torch.nan
    clips = [Clip(0, lengths[0], 3)]
    for nan_quality in (quality, quality * torch.nan):
        farthest, probable = torch.zeros(2, 64, device=DEVICE)
        triton_greedy.farthest_first(embeds, clips, farthest[: len(embeds)])
        triton_greedy.greedy_map(nan_quality, embeds, clips, probable[: len(embeds)])
        assert not farthest[lengths[0] :].any()
        assert not probable[lengths[0] :].any()


@on_device
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", DTYPES[:-1], ids=str)
@pytest.mark.parametrize(
    ("length", "size", "heads", "key_heads"), [(1, 16, 2, 2), (41, 16, 2, 1)] + [(1999, 128, 28, 4)] * (not INTERPRETED)
)
def test_causal_attention(length, size, heads, key_heads, dtype, biased, monkeypatch):
    if INTERPRETED:  # several tiles
        monkeypatch.setattr("audiopress.kernels.triton_causal.ROWS", 16)
        monkeypatch.setattr("audiopress.kernels.triton_causal.COLUMNS", 16)
    # as a projection leaves them: [B, L, H, d]
    q = randn(2, length, heads, size, dtype=dtype).transpose(1, 2)
    k, v = (randn(2, length, key_heads, size, dtype=dtype, seed=i).transpose(1, 2) for i in (1, 2))
    bias, scale = randn(2, length, seed=3).exp().log1p() if biased else None, 1.3 * size**-0.5
    found, plain = (causal_attention(q, k, v, bias, scale, b) for b in ("triton", "torch"))
    k, v = (x.double().repeat_interleave(heads // key_heads, dim=1) for x in (k, v))
    logits = q.double() @ k.transpose(2, 3) * scale
    if biased:
        logits += bias.double()[:, None, None]
    hidden = torch.ones(length, length, dtype=torch.bool, device=DEVICE).triu(1)
    check(found, plain, logits.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ v)
    with pytest.raises(ValueError, match="no backward pass"):
        causal_attention(q, q, q.clone().requires_grad_(), bias, scale, "triton")


@on_device
@each_dtype
@pytest.mark.parametrize("width", [33, 1100] if INTERPRETED else [3584, 1280, 33])
@pytest.mark.parametrize("rows", [(9,), (5, 7), (4, 0, 6), (0, 3, 2)])
def test_gather_rows(rows, width, dtype):
    sources = [randn(n, width, dtype=dtype if i else torch.float32, seed=i) for i, n in enumerate(rows)]
    index = torch.randperm(sum(rows), generator=torch.Generator().manual_seed(9))[: sum(rows) - 1]
    index = torch.cat([index[:2], torch.tensor([-1, -1]), index[2:]]).to(DEVICE)
    grad = randn(len(index), width, seed=7)
    (found, found_grads), (plain, plain_grads) = (
        with_gradient(lambda *x, b=b: gather_rows(x, index, b), sources, grad) for b in ("triton", "torch")
    )
    for x, y in zip((found, *found_grads), (plain, *plain_grads), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)
    strided = [torch.stack([x, x], dim=2).flatten(1)[:, ::2] for x in sources]
    assert torch.equal(gather_rows(strided, index, "triton"), plain)


@on_device
def test_strided_inputs():
    wide = randn(60, 192, dtype=DTYPES[0])
    counts, weights = runs(30), (randn(60, seed=1).abs() + 0.1)[::2]
    for x in (wide[::2, :96], wide[::2, ::2], wide[:30, :96].T.contiguous().T):
        same = x.contiguous()
        grad = randn(30, seed=2)
        for function, g in (
            (lambda x: adjacent_cosine(x, (30,), "triton"), grad),
            (lambda x: segment_mean(x, weights, counts, "triton"), grad[: len(counts), None].expand(-1, 96)),
        ):
            (a, (da,)), (b, (db,)) = with_gradient(function, [x], g), with_gradient(function, [same], g)
            assert torch.equal(a, b)
            assert torch.equal(da, db)
        assert torch.equal(*(farthest_first(y, (30,), (4,), "triton") for y in (x, same)))
        assert torch.equal(*(greedy_map(weights, y, (30,), (4,), "triton") for y in (x, same)))
    heads = randn(4, 30, 32, dtype=DTYPES[0])
    every = torch.arange(60, device=DEVICE)
    for x in (wide[:, :96], wide[:, ::2]):
        found, same = (most_alike(y, every[20:], [40], every[:20], [20], "triton") for y in (x, x.contiguous()))
        assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True))
    for x in (heads.transpose(0, 1), heads[:, :, ::2].transpose(0, 1)):
        found, same = (attention_received(y, y, (30,), 0.2, backend="triton") for y in (x, x.contiguous()))
        assert torch.equal(found, same)


@on_device
def test_nothing_to_do():
    none = torch.empty(0, 8, device=DEVICE)
    counts = torch.empty(0, dtype=torch.long, device=DEVICE)
    assert adjacent_cosine(none, (0, 0), "triton").shape == (0,)
    assert top_k(none[:, 0], (0, 0), (0, 0), "triton").shape == (0,)
    assert farthest_first(none, (0, 0), (0, 0), "triton").shape == (0,)
    assert greedy_map(none[:, 0], none, (0, 0), (0, 0), "triton").shape == (0,)
    assert ward_greedy(none, none[:, 0], (0, 0), (0, 0), backend="triton").shape == (0,)
    assert [len(x) for x in most_alike(none, counts, (0, 0), counts, (0, 0), "triton")] == [0, 0]
    assert gather_rows([none, none], counts, "triton").shape == (0, 8)
    assert segment_mean(none, none[:, 0], counts, "triton").shape == (0, 8)
    assert [len(x) for x in segment_merge(none, counts, none[:, 0], counts, "triton")] == [0, 0, 0]
    assert attention_received(none[:, None], none[:, None], (0,), 1.0, backend="triton").shape == (0,)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_nothing_waits_for_the_gpu():
    embeds, weights, counts = randn(300, 96).requires_grad_(), torch.ones(300, device=DEVICE), runs(300)
    q, slots = randn(300, 2, 32), torch.arange(300, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        cosine = adjacent_cosine(embeds, (100, 200), "triton")
        rows = gather_rows([embeds, embeds], slots, "triton")
        mean = segment_merge(embeds, slots, weights, counts, "triton")[0]
        attention_received(q, q, (100, 200), 1.0, backend="triton")
        top_k(weights, (100, 200), (50, 0), "triton")
        farthest_first(embeds, (100, 200), (50, 60), "triton")
        greedy_map(weights, embeds, (100, 200), (50, 60), "triton")
        most_alike(embeds, slots[100:], (0, 200), slots[:100], (50, 50), "triton")
        torch.autograd.grad([cosine, mean, rows], embeds, [torch.ones_like(x) for x in (cosine, mean, rows)])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def far():
    """Gives a function that spreads a tensor over memory, so that its ends are more than 2^31 numbers apart."""
    torch.use_deterministic_algorithms(False)  # what is never touched takes no memory, if nothing fills it
    numbers = 2**33
    if INTERPRETED:
        lazy = mmap.mmap(-1, 2 * numbers, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
        memory = torch.frombuffer(lazy, dtype=torch.float16)
    else:
        memory = torch.empty(numbers, dtype=torch.float16, device=DEVICE)

    def spread(x, dim):
        strides = list(x.stride())
        strides[dim] = 2**31 // (x.shape[dim] - 1) + 32
        assert strides[dim] < 2**31 < strides[dim] * (x.shape[dim] - 1) < numbers - 2**20
        return memory.as_strided(x.shape, strides).copy_(x)

    return spread


@on_device
def test_offsets_beyond_32_bits(far):
    """A stride fits into 32 bits, and a number of them does not; a kernel that multiplies in 32 reads elsewhere."""
    x = randn(6, 96, dtype=torch.float16)
    slots, weights, counts = torch.arange(6, device=DEVICE), randn(6, seed=1).abs() + 0.1, whole([2, 3, 1])
    index = whole([5, -1, 0, 3])
    grad = randn(3, 96, seed=2, dtype=torch.float16)

    def merged(embeds):
        with torch.enable_grad():
            embeds, sizes = embeds.detach().requires_grad_(), weights.clone().requires_grad_()
            mean = segment_merge(embeds, slots, sizes, counts, "triton")[0]
        return mean, *torch.autograd.grad(mean, [embeds, sizes], grad)

    def alike(embeds):
        return most_alike(embeds, slots[1::2], (3,), slots[::2], (3,), "triton")

    def cosine(embeds):
        with torch.enable_grad():
            embeds = embeds.detach().requires_grad_()
            cosines = adjacent_cosine(embeds, (6,), "triton")
        return cosines, *torch.autograd.grad(cosines[:5].sum(), embeds)

    for run in (merged, alike, cosine, lambda embeds: [gather_rows([embeds, embeds], index, "triton")]):
        for near, found in zip(run(x), run(far(x, 0)), strict=True):
            torch.testing.assert_close(found, near)  # read in other pieces, and summed in another order


@on_device
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "heads"])
@pytest.mark.parametrize("rows", [20, 200])  # of one tile, and of several
def test_received_attention_beyond_32_bits(far, dim, rows):
    q, k = randn(rows, 3, 16, dtype=torch.float16), randn(rows, 3, 16, dtype=torch.float16, seed=1)
    near = attention_received(q, k, (rows,), 0.25, backend="triton")
    assert torch.equal(attention_received(far(q, dim), k, (rows,), 0.25, backend="triton"), near)
    assert torch.equal(attention_received(q, far(k, dim), (rows,), 0.25, backend="triton"), near)


@on_device
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "heads", "rows"])
def test_causal_attention_beyond_32_bits(far, dim):
    batch, heads = (3 if dim == d else 1 for d in (0, 1))
    parts = [randn(batch, heads, 200, 16, dtype=torch.float16, seed=seed) for seed in range(3)]
    bias = randn(batch, 200, seed=3)
    near = causal_attention(*parts, bias, 0.25, "triton")
    for i, part in enumerate(parts):
        moved = [*parts[:i], far(part, dim), *parts[i + 1 :]]
        assert torch.equal(causal_attention(*moved, bias, 0.25, "triton"), near)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors on the CPU")
def test_backends(monkeypatch):
    x = torch.randn(5, 8)
    assert torch.equal(adjacent_cosine(x, (5,)), adjacent_cosine(x, (5,), "torch"))
    with pytest.raises(ValueError, match="backend must be one of auto, torch, triton, got 'cuda'"):
        adjacent_cosine(x, (5,), "cuda")
    if sys.platform == "linux":
        with pytest.raises(ValueError, match="'triton' needs a tensor on a GPU, got one on cpu"):
            adjacent_cosine(x, (5,), "triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match="triton"):
        adjacent_cosine(x, (5,), "triton")


@pytest.mark.skipif(INTERPRETED, reason="Triton is imported")
def test_importing_the_kernels_leaves_triton_alone():
    code = "import sys, audiopress.kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-I", "-c", code], check=False).returncode == 0
