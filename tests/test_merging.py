"""Methods that merge neighbours, against loops over one clip's tokens in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from audiopress import Compressor, Context, TokenStream, build
from audiopress.compression import fastlongspeech, token_budget
from audiopress.compression.affinity import join_values
from audiopress.compression.encoder import LayerState
from audiopress.kernels import merge_pairs, nest_runs, run_lengths

from .compression_cases import ENCODER_SIZE, HIDDEN_SIZE, make_inputs

LENGTHS = (9, 0, 1, 40, 2, 3, 17)
METHODS = ("atome", "fastadasp", "affinity", "fastlongspeech")
ON_FEATURES = {"fastadasp": {"metric": "features", "weights": "none"}, "fastlongspeech": {"weights": "none"}}


def make(name: str, **options) -> Compressor:
    return build(name, hidden_size=HIDDEN_SIZE, encoder_size=ENCODER_SIZE, **options)


def inputs(sized: bool = False) -> tuple[TokenStream, Context]:
    """Random walks, whose neighbours are alike; `sized` as after another compressor."""
    stream, context = make_inputs(LENGTHS)
    stream = stream.replace(embeds=torch.cat([x.cumsum(0) for x in stream.embeds.split(LENGTHS)]))
    if sized:
        stream = stream.replace(sizes=stream.positions % 3 + 1.0, slots=stream.positions * 3)
    return stream, context


@dataclasses.dataclass
class Token:
    """One token of a reference: vector and metric in float64, and the (slot, size) of all that it stands for."""

    x: torch.Tensor
    metric: torch.Tensor
    members: list[tuple[int, float]]

    @property
    def size(self) -> float:
        return sum(size for _, size in self.members)


def tokens_of(clip: TokenStream, metric: torch.Tensor) -> list[Token]:
    members = [[(slot, size)] for slot, size in zip(clip.slots.tolist(), clip.sizes.tolist(), strict=True)]
    return [Token(*row) for row in zip(clip.embeds.double(), metric.double(), members, strict=True)]


def cosine(a: Token, b: Token) -> float:
    return float(torch.cosine_similarity(a.metric, b.metric, dim=0))


def fuse(group: list[Token], weights: list[float]) -> Token:
    def mean(vectors):
        return sum(w * v for w, v in zip(weights, vectors, strict=True)) / sum(weights)

    return Token(mean([t.x for t in group]), mean([t.metric for t in group]), [m for t in group for m in t.members])


def fuse_runs(tokens: list[Token], joined: set[int], weigh) -> list[Token]:
    """Fuses the runs in which each token i in `joined` goes with the next."""
    groups: list[list[Token]] = []
    for i, token in enumerate(tokens):
        if i - 1 in joined:
            groups[-1].append(token)
        else:
            groups.append([token])
    return [fuse(group, [weigh(t) for t in group]) for group in groups]


def best(scores: dict[int, float], number: int) -> list[int]:
    return sorted(scores, key=lambda i: (-scores[i], i))[:number]


def neighbours(tokens: list[Token]) -> dict[int, float]:
    return {i: cosine(tokens[i], tokens[i + 1]) for i in range(len(tokens) - 1)}


def walk_left_to_right(picked: list[int]) -> set[int]:
    taken: set[int] = set()
    for i in sorted(picked):
        if i - 1 not in taken:
            taken.add(i)
    return taken


def choose_pairs(scores: dict[int, float], pairs: str, merges: int, threshold: float) -> set[int]:
    if pairs == "even-odd":
        scores = {i: s for i, s in scores.items() if i % 2 == 0}
    picks = merges
    while len(walk_left_to_right(best(scores, picks))) < merges:
        picks += 1
    picks = max(picks, sum(s > threshold for s in scores.values()))
    return walk_left_to_right(best(scores, picks))


def check(out: TokenStream, want: list[list[Token]]) -> None:
    assert out.lengths == tuple(len(clip) for clip in want)
    tokens = [token for clip in want for token in clip]
    torch.testing.assert_close(out.embeds.double(), torch.stack([t.x for t in tokens]), rtol=1e-5, atol=1e-5)
    assert out.sizes.tolist() == [t.size for t in tokens]
    assert out.slots.tolist() == [
        math.floor(sum(slot * size for slot, size in t.members) / t.size + 1e-9) for t in tokens
    ]


def keys_of(context: Context, heads: int = 1) -> list[torch.Tensor]:
    """The mean of each token's two states, and over heads."""
    clips = []
    for n, keys in zip(LENGTHS, context.encoder_keys.split(), strict=True):
        pairs = [(keys.embeds[2 * i] + keys.embeds[2 * i + 1]) / 2 for i in range(n)]
        clips.append(torch.stack([sum(p.chunk(heads)) / heads for p in pairs]) if n else torch.empty(0, 1))
    return clips


# Kernels ------------------------------------------------------------------------------------------------------------


def test_runs_by_hand():
    assert run_lengths(torch.tensor([1, 1, 0, 0, 1, 0]).bool()).tolist() == [3, 1, 2]
    assert run_lengths(torch.empty(0, dtype=torch.bool)).tolist() == []
    assert nest_runs(torch.tensor([3, 1, 2]), torch.tensor([2, 1])).tolist() == [4, 2]
    none = torch.empty(0, dtype=torch.long)
    assert nest_runs(none, none).tolist() == []


def test_picks_that_overlap_are_made_up_for():
    # the three best pairs are one chain, of which the walk takes the first and the third
    similarity = torch.tensor([0.9, 0.8, 0.7, 0.1, 0.2, -torch.inf])
    assert merge_pairs(similarity, (6,), (1,), pairs="all-adjacent").tolist() == [2, 1, 1, 1, 1]
    assert merge_pairs(similarity, (6,), (2,), pairs="all-adjacent").tolist() == [2, 2, 1, 1]
    assert merge_pairs(similarity, (6,), (3,), pairs="all-adjacent").tolist() == [2, 2, 2]
    assert merge_pairs(similarity, (6,), (1,)).tolist() == [2, 1, 1, 1, 1]
    assert merge_pairs(similarity, (6,), (2,)).tolist() == [2, 2, 1, 1]
    assert merge_pairs(similarity, (6,), (0,), threshold=0.15, pairs="all-adjacent").tolist() == [2, 2, 2]


@pytest.mark.parametrize("pairs", ["even-odd", "all-adjacent"])
@pytest.mark.parametrize("levels", [2, 5, 1000])  # few levels: many ties
def test_pairs_equal_a_walk(pairs, levels):
    generator = torch.Generator().manual_seed(levels)
    for share in (0.0, 0.3, 0.7, 1.0):
        scores = torch.randint(levels, (sum(LENGTHS),), generator=generator) / levels
        scores[torch.tensor([n for n in LENGTHS if n]).cumsum(0) - 1] = -torch.inf
        merges = [int(share * (n // 2)) for n in LENGTHS]
        for threshold in (math.inf, 0.55):
            want = []
            for clip, n, k in zip(scores.split(LENGTHS), LENGTHS, merges, strict=True):
                joined = choose_pairs(dict(enumerate(clip[:-1].tolist())), pairs, k, threshold)
                want += [2 if i in joined else 1 for i in range(n) if i - 1 not in joined]
                assert threshold < math.inf or len(joined) == k
            assert merge_pairs(scores, LENGTHS, merges, threshold, pairs).tolist() == want


# A-ToMe -------------------------------------------------------------------------------------------------------------


def atome(clip, metric, budget, rounds, pairs="even-odd", average="size", threshold=math.inf) -> list[Token]:
    tokens, n, done = tokens_of(clip, metric), clip.lengths[0], 0
    while len(tokens) > budget or (threshold < math.inf and done < rounds):
        done += 1
        target = budget if done >= rounds else math.ceil(n * (budget / n) ** (done / rounds) - 1e-6) if n else 0
        merges = min(max(0, len(tokens) - target), len(tokens) // 2)
        joined = choose_pairs(neighbours(tokens), pairs, merges, threshold)
        tokens = fuse_runs(tokens, joined, lambda t: t.size if average == "size" else 1.0)
    return tokens


@pytest.mark.parametrize("pairs", ["even-odd", "all-adjacent"])
@pytest.mark.parametrize("average", ["size", "plain"])
@pytest.mark.parametrize(("keep_ratio", "rounds"), [(0.8, 1), (0.5, 1), (0.5, 3), (0.3, 6), (0.1, 6), (0.02, 6)])
def test_atome_equals_a_loop(pairs, average, keep_ratio, rounds):
    stream, context = inputs(sized=True)
    given = {} if rounds in (1, 6) else {"rounds": rounds}  # 1 and 6 are the defaults
    out = make("atome", keep_ratio=keep_ratio, pairs=pairs, average=average, **given)(stream, context)
    budget = token_budget(LENGTHS, keep_ratio)
    want = [atome(c, c.embeds, m, rounds, pairs, average) for c, m in zip(stream.split(), budget, strict=True)]
    check(out, want)
    assert out.lengths == budget


@pytest.mark.parametrize("heads", [1, 2])
def test_atome_by_keys(heads):
    stream, context = inputs()
    out = make("atome", keep_ratio=0.3, metric="keys", key_heads=heads)(stream, context)
    budget, keys = token_budget(LENGTHS, 0.3), keys_of(context, heads)
    check(out, [atome(c, k, m, 6) for c, k, m in zip(stream.split(), keys, budget, strict=True)])


@pytest.mark.parametrize("average", ["size", "plain"])
def test_atome_inside_the_tower_equals_a_loop(average):
    """To a fifth in one layer, which takes three rounds."""
    stream, _ = inputs(sized=True)
    keys = torch.randn(len(stream.embeds), 6, generator=torch.Generator().manual_seed(5))
    targets = [max(1, n // 5) if n else 0 for n in LENGTHS]
    method = make("atome", stage="encoder", layers=(0,), metric="keys", key_heads=1, average=average)
    out = method.reduce(stream, targets, LayerState(keys, 1, None))
    parts = zip(stream.split(), keys.split(LENGTHS), targets, strict=True)
    want = [token.x for clip, k, m in parts for token in atome(clip, k, m, 1, average=average)]
    torch.testing.assert_close(out.embeds.double(), torch.stack(want), rtol=1e-5, atol=1e-5)
    assert out.lengths == tuple(targets)


@pytest.mark.parametrize("pairs", ["even-odd", "all-adjacent"])
@pytest.mark.parametrize(("keep_ratio", "rounds"), [(1, 1), (1, 4), (0.7, 1), (0.2, 6)])
def test_atome_by_threshold(pairs, keep_ratio, rounds):
    stream, context = inputs()
    method = make("atome", threshold=0.9, keep_ratio=keep_ratio, pairs=pairs, rounds=rounds)
    out, budget = method(stream, context), token_budget(LENGTHS, keep_ratio)
    want = [atome(c, c.embeds, m, rounds, pairs, threshold=0.9) for c, m in zip(stream.split(), budget, strict=True)]
    check(out, want)
    assert method.adaptive
    assert all(a <= b for a, b in zip(out.lengths, budget, strict=True))
    assert keep_ratio < 0.5 or out.lengths != budget, "the threshold should decide something"


def test_half_of_even_odd_pairs_is_pooling_and_more_rounds_are_not():
    stream = inputs()[0]
    pooled = make("pooling", k=2)(stream)
    assert torch.equal(make("atome")(stream).slots, pooled.slots)
    assert not torch.equal(make("atome", rounds=6)(stream).slots, pooled.slots)


# FastAdaSP ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["keys", "features"])
@pytest.mark.parametrize("weights", ["attention", "none"])
@pytest.mark.parametrize("keep_ratio", [0.8, 0.5, 0.1])
def test_fastadasp_equals_a_loop(metric, weights, keep_ratio):
    stream, context = inputs(sized=True)
    out = make("fastadasp", metric=metric, weights=weights, keep_ratio=keep_ratio)(stream, context)
    metrics = keys_of(context) if metric == "keys" else stream.embeds.split(LENGTHS)
    attention = context.encoder_attention.split(LENGTHS)
    want = []
    for clip, keys, received, m in zip(
        stream.split(), metrics, attention, token_budget(LENGTHS, keep_ratio), strict=True
    ):
        tokens = tokens_of(clip, keys)
        share = {id(t): float(a) if weights == "attention" else 1.0 for t, a in zip(tokens, received, strict=True)}
        joined = set(best(neighbours(tokens), len(tokens) - m))
        want.append(fuse_runs(tokens, joined, lambda t, share=share: share[id(t)] * t.size))
    check(out, want)


def test_fastadasp_without_any_attention_takes_the_mean():
    stream, context = inputs()
    context.encoder_attention = torch.zeros_like(context.encoder_attention)
    torch.testing.assert_close(
        make("fastadasp", keep_ratio=0.2)(stream, context).embeds,
        make("fastadasp", keep_ratio=0.2, weights="none")(stream, context).embeds,
    )


# Affinity -----------------------------------------------------------------------------------------------------------


def scan(tokens: list[Token], threshold: float, window: int) -> set[int]:
    """The tokens that are in one group with the next."""
    joined, group = set(), []
    for i, token in enumerate(tokens):
        if group and max(cosine(tokens[j], token) for j in group[-window:]) > threshold:
            joined.add(i - 1)
            group.append(i)
        else:
            group = [i]
    return joined


@pytest.mark.parametrize("window", [1, 2, 3, 5, 50])
@pytest.mark.parametrize("threshold", [-0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("walk", [False, True])
def test_affinity_equals_a_scan(window, threshold, walk):
    stream, context = inputs(sized=True)
    if not walk:
        stream = stream.replace(embeds=make_inputs(LENGTHS)[0].embeds)
    out = make("affinity", threshold=threshold, window=window)(stream, context)
    want = []
    for clip in stream.split():
        tokens = tokens_of(clip, clip.embeds)
        want.append(fuse_runs(tokens, scan(tokens, threshold, window), lambda t: t.size))
    check(out, want)


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("keep_ratio", [0.9, 0.5, 0.1])
def test_affinity_meets_a_budget_with_one_threshold_per_clip(window, keep_ratio):
    stream, context = inputs()
    out = make("affinity", keep_ratio=keep_ratio, window=window)(stream, context)
    values = join_values(stream.embeds, LENGTHS, window).split(LENGTHS)
    budget, want = token_budget(LENGTHS, keep_ratio), []
    for clip, value, m in zip(stream.split(), values, budget, strict=True):
        tokens = tokens_of(clip, clip.embeds)
        ordered = [math.inf, *value.sort(descending=True).values.tolist()]
        threshold = (ordered[len(tokens) - m] + ordered[len(tokens) - m + 1]) / 2 if 0 < m < len(tokens) else math.inf
        want.append(fuse_runs(tokens, scan(tokens, max(threshold, -2), window), lambda t: t.size))
    check(out, want)


def test_affinity_with_threshold_and_keep_ratio_keeps_no_more_than_that():
    stream, context = inputs()
    tight = make("affinity", threshold=1.0, keep_ratio=0.3)
    assert tight(stream, context).lengths == token_budget(LENGTHS, 0.3)
    assert make("affinity", threshold=-1.0)(stream, context).lengths == tuple(min(n, 1) for n in LENGTHS)


# FastLongSpeech -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", ["plain", "size"])
@pytest.mark.parametrize("weights", ["gate", "none"])
@pytest.mark.parametrize("keep_ratio", [0.8, 0.5, 0.3, 0.05])
def test_fastlongspeech_equals_a_loop(average, weights, keep_ratio):
    stream, context = inputs(sized=True)
    method, want = make("fastlongspeech", keep_ratio=keep_ratio, average=average, weights=weights), []
    if weights == "gate":
        torch.nn.init.normal_(method.gate, generator=torch.Generator().manual_seed(0))

    def weigh(token: Token) -> float:
        size = token.size if average == "size" else 1.0
        if weights == "none":
            return size
        return size / (1 + math.exp(-float(token.x @ method.gate.detach().double()) / math.sqrt(HIDDEN_SIZE)))

    for clip, m in zip(stream.split(), token_budget(LENGTHS, keep_ratio), strict=True):
        tokens = tokens_of(clip, clip.embeds)
        while len(tokens) > m:
            target = len(tokens) // 2 if len(tokens) > 2 * m else m
            for token in tokens:
                token.metric = token.x
            tokens = fuse_runs(tokens, set(best(neighbours(tokens), len(tokens) - target)), weigh)
        want.append(tokens)
    check(method(stream, context), want)


def test_fastlongspeech_halves_until_the_budget_is_near(monkeypatch):
    lengths = []

    def record(similarity, before, merges):
        lengths.append((before[0], before[0] - merges[0]))
        return merge_chains(similarity, before, merges)

    merge_chains = fastlongspeech.merge_chains
    monkeypatch.setattr(fastlongspeech, "merge_chains", record)
    make("fastlongspeech", keep_ratio=100 / 750)(TokenStream(torch.randn(750, HIDDEN_SIZE), (750,)))
    assert lengths == [(750, 375), (375, 187), (187, 100)]
    assert make("fastlongspeech:l400").budget((750,)) == (400,)
    assert make("fastlongspeech:l200").budget((750,)) == (200,)


def test_untrained_gate_is_the_plain_mean():
    stream, context = inputs()
    gated, plain = (make("fastlongspeech", keep_ratio=0.2, weights=w) for w in ("gate", "none"))
    assert (gated.trained, plain.trained) == (True, False)
    torch.testing.assert_close(gated(stream, context).embeds, plain(stream, context).embeds)
    torch.nn.init.constant_(gated.gate, -1e6)
    assert gated(stream, context).embeds.isfinite().all()


# All ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_ratio", [0.7, 0.2])
@pytest.mark.parametrize("name", METHODS)
def test_sizes_and_size_weighted_mean_are_kept(name, keep_ratio):
    stream, context = inputs(sized=True)
    average = {"average": "size"} if name in ("atome", "fastlongspeech") else {}
    out = make(name, keep_ratio=keep_ratio, **ON_FEATURES.get(name, {}), **average)(stream, context)
    for before, after in zip(stream.split(), out.split(), strict=True):
        assert after.sizes.sum() == before.sizes.sum()
        torch.testing.assert_close(after.sizes @ after.embeds, before.sizes @ before.embeds, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize(
    ("name", "options", "sizes"),
    [
        ("atome", {"keep_ratio": 0.75}, [2, 2, 1, 1, 1, 1]),
        ("atome", {"keep_ratio": 0.75, "pairs": "all-adjacent"}, [2, 2, 1, 1, 1, 1]),
        ("fastadasp", {"keep_ratio": 0.75}, [3, 1, 1, 1, 1, 1]),
        ("affinity", {"keep_ratio": 0.75, "window": 3}, [3, 1, 1, 1, 1, 1]),
        ("fastlongspeech", {"keep_ratio": 0.75}, [3, 1, 1, 1, 1, 1]),
    ],
)
def test_in_silence_the_earliest_merge_first(name, options, sizes, value):
    out = make(name, **ON_FEATURES.get(name, {}), **options)(TokenStream(torch.full((16, HIDDEN_SIZE), value), (8, 8)))
    assert out.sizes.tolist() == 2 * sizes
    torch.testing.assert_close(out.embeds, torch.full((12, HIDDEN_SIZE), value))


@pytest.mark.parametrize("name", METHODS)
def test_duplicate_frames_merge_with_each_other(name):
    unique = make_inputs((10,))[0].embeds
    options = {"threshold": 0.999} if name == "affinity" else {}
    out = make(name, **ON_FEATURES.get(name, {}), **options)(TokenStream(unique.repeat_interleave(2, dim=0), (20,)))
    torch.testing.assert_close(out.embeds, unique)
    assert out.slots.tolist() == list(range(0, 20, 2))


@pytest.mark.parametrize("name", METHODS)
def test_keys_and_attention_that_do_not_fit(name):
    stream, context = inputs()
    method = make(name, metric="keys", keep_ratio=0.5)
    keys = context.encoder_keys
    short = dataclasses.replace(context, encoder_keys=TokenStream(torch.zeros(8, ENCODER_SIZE), (8,)))
    with pytest.raises(ValueError, match=rf"{name}: encoder_keys must hold \[18, 0, 2, 80, .* got \[8\]"):
        method(stream, short)
    broken = keys.embeds.clone()
    broken[-1] = torch.nan
    with pytest.raises(ValueError, match=f"{name}: clip 6 of 7 has NaN or infinite encoder_keys"):
        method(stream, dataclasses.replace(context, encoder_keys=keys.replace(embeds=broken)))
    with pytest.raises(ValueError, match=f"{name}: key_heads must divide the keys' width {ENCODER_SIZE}, got 3"):
        make(name, metric="keys", key_heads=3)(stream, context)
    if name == "fastadasp":
        attention = context.encoder_attention
        with pytest.raises(ValueError, match=r"encoder_attention must be \[N\] = \[72\], got \[71\]"):
            method(stream, dataclasses.replace(context, encoder_attention=attention[1:]))
        for wrong in (torch.nan, torch.inf, -1.0):
            changed = dataclasses.replace(
                context, encoder_attention=torch.where(torch.arange(72) == 9, wrong, attention)
            )
            with pytest.raises(ValueError, match=r"clip 2 of 7 has (NaN or infinite|negative) encoder_attention"):
                method(stream, changed)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("atome", {"pairs": "odd"}, "pairs must be one of 'even-odd', 'all-adjacent', got 'odd'"),
        ("atome", {"average": "max"}, "average must be one of"),
        ("atome", {"rounds": 0}, "rounds must be a whole number >= 1, got 0"),
        ("atome", {"threshold": 1.5}, r"threshold must be in \[-1, 1\], got 1.5"),
        ("atome", {"threshold": True}, r"threshold must be in \[-1, 1\], got"),
        ("atome", {"metric": "values"}, "metric must be one of"),
        ("atome", {"key_heads": 4}, "key_heads needs metric='keys', got 4"),
        ("atome", {"proportional_attention": "yes"}, "proportional_attention must be True or False, got 'yes'"),
        ("atome", {"keep_ratio": 0}, "keep_ratio is tokens out / tokens in"),
        ("fastadasp", {"weights": "ctc"}, "weights must be one of 'attention', 'none', got 'ctc'"),
        ("affinity", {"window": 0}, "window must be a whole number >= 1, got 0"),
        ("affinity", {"threshold": float("nan")}, r"threshold must be in \[-1, 1\], got"),
        ("fastlongspeech", {"weights": "ctc"}, "weights must be one of 'gate', 'none', got 'ctc'"),
        ("fastlongspeech", {"average": "max"}, "average must be one of"),
    ],
)
def test_options_are_checked(name, options, message):
    with pytest.raises(ValueError, match=message):
        make(name, **options)


def test_a_threshold_or_a_ratio_sets_the_rate():
    for name, options, want in [
        ("atome", {}, (0.5, None)),
        ("atome", {"threshold": 0.7}, (1.0, 0.7)),
        ("affinity", {}, (1.0, 0.8)),
        ("affinity", {"keep_ratio": 0.3}, (0.3, None)),
        ("affinity", {"keep_ratio": 0.3, "threshold": 0.7}, (0.3, 0.7)),
        ("affinity:conservative", {}, (1.0, 0.9)),
        ("affinity:conservative", {"keep_ratio": 0.3}, (0.3, None)),
    ]:
        method = make(name, **options)
        assert (method.config.keep_ratio, method.config.threshold) == want
        assert method.adaptive == (want[1] is not None)
    assert make("affinity").at(0.25).budget((100,)) == (25,)
    assert not make("affinity").at(0.25).adaptive


@pytest.mark.parametrize("name", [*METHODS, "pooling", "ward"])
def test_proportional_attention_is_an_option(name):
    assert make(name).proportional_attention == (name == "ward")
    for asked in (True, False):
        assert make(name, proportional_attention=asked).proportional_attention is asked


@pytest.mark.parametrize("keep_ratio", [0.7, 0.2])
@pytest.mark.parametrize("name", [*METHODS, "pooling", "ward"])
def test_the_mean_norm_is_an_option(name, keep_ratio):
    """It changes how long a merged token is, and nothing else; a token alone stays as it is."""
    stream, context = inputs(sized=True)
    options = {"keep_ratio": keep_ratio, **ON_FEATURES.get(name, {})}
    plain, kept = (make(name, norm_preserving=asked, **options)(stream, context) for asked in (False, True))
    assert kept.lengths == plain.lengths
    assert torch.equal(kept.slots, plain.slots)
    assert torch.equal(kept.sizes, plain.sizes)
    torch.testing.assert_close(
        torch.nn.functional.normalize(kept.embeds), torch.nn.functional.normalize(plain.embeds), rtol=1e-5, atol=1e-5
    )
    merged = 0
    for before, after in zip(stream.split(), kept.split(), strict=True):
        start, sizes, norms = 0, before.sizes.tolist(), before.embeds.double().norm(dim=1).tolist()
        for token, size in zip(after.embeds, after.sizes.tolist(), strict=True):
            end, total, norm = start, 0.0, 0.0
            while total < size:
                total, norm, end = total + sizes[end], norm + sizes[end] * norms[end], end + 1
            assert float(token.double().norm()) == pytest.approx(norm / total, rel=1e-5)
            if end - start == 1:
                assert torch.equal(token, before.embeds[start])
            merged, start = merged + (end - start > 1), end
    assert merged > 5


def test_the_mean_norm_is_kept_inside_the_tower():
    stream, _ = inputs(sized=True)
    layer = LayerState(torch.randn(len(stream.embeds), 6), 1, None)
    targets = [max(1, n // 2) if n else 0 for n in LENGTHS]
    plain, kept = (
        make("atome", stage="encoder", layers=(0,), norm_preserving=asked).reduce(stream, targets, layer)
        for asked in (False, True)
    )
    assert (kept.embeds.norm(dim=1) >= plain.embeds.norm(dim=1) * (1 - 1e-5)).all()
    assert not torch.allclose(kept.embeds, plain.embeds)


def test_a_pooled_projection_reads_tokens_of_the_mean_norm():
    stream, context = make_inputs((9,))
    torch.manual_seed(0)
    method = make("pooling", source="hidden", k=3, norm_preserving=True)
    frames = context.encoder_hidden.embeds[:18].unflatten(0, (-1, 3))
    mean = frames.mean(1)
    want = method.project(mean / mean.norm(dim=1, keepdim=True) * frames.norm(dim=2).mean(1, keepdim=True))
    torch.testing.assert_close(method(stream, context).embeds, want)
