"""Scores of answers: the official ways of LongVALE's scorer as goldens, ours beside them, and error rates."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audiopress.benchmarks import metrics
from audiopress.data.longvale import format_time

# answer -> what the official parser reads, what the tolerant one reads (without a duration)
ANSWERS = [
    ("From 10 to 30.", (0.10, 0.30), (0.10, 0.30)),
    ("between 10 and 30", (0.10, 0.30), (0.10, 0.30)),
    ("From 5 to 9", None, (0.05, 0.09)),
    ("From 83.1% to 85.0%.", None, (0.831, 0.85)),
    ("From 10.0 to 30.0", None, (0.10, 0.30)),
    ("10-30", None, (0.10, 0.30)),
    ("10 – 30 percent", None, (0.10, 0.30)),
    ("1:10 to 1:30", None, None),
    ("From 10 to 100.", (0.10, 0.10), (0.10, 1.0)),
    ("From 100 to 100", (0.00, 0.10), (1.0, 1.0)),
    ("From 0.00 to 10.00, a man speaks", (0.00, 0.10), (0.00, 0.10)),
    ("From 110 to 130 seconds", (0.10, 0.13), None),
    ("From 30 to 10", (0.30, 0.10), (0.10, 0.30)),
    ("From 50 to 120", (0.50, 0.12), (0.50, 1.0)),
    ("Dogs of 2 and 3 years bark from 10 to 30.", (0.10, 0.30), (0.10, 0.30)),
    ("FROM 07 TO 09", None, (0.07, 0.09)),
    ("From 1000 to 2000", (0.00, 0.20), None),
    ("I cannot tell.", None, None),
    ("", None, None),
]


@pytest.mark.parametrize(("answer", "official", "tolerant"), ANSWERS)
def test_parsers(answer: str, official: metrics.Span | None, tolerant: metrics.Span | None) -> None:
    assert metrics.parse_official(answer) == official
    parsed = metrics.parse_tolerant(answer)
    assert (parsed and parsed.span) == (tolerant and pytest.approx(tolerant))


@pytest.mark.parametrize(
    ("answer", "span"),
    [
        ("1:10 to 1:30", (0.35, 0.45)),
        ("between 0:01:10 and 90", (0.35, 0.45)),
        ("From 70 to 90 seconds", (0.35, 0.45)),
        ("From 70s to 90s.", (0.35, 0.45)),
        ("From 70 to 90 steps", (0.70, 0.90)),
    ],
)
def test_times_need_the_duration(answer: str, span: metrics.Span) -> None:
    parsed = metrics.parse_tolerant(answer, duration=200)
    assert parsed is not None
    assert parsed.span == pytest.approx(span)


def test_swapped_and_clipped_are_told() -> None:
    assert metrics.parse_tolerant("From 130 to 20") == metrics.Parsed((0.2, 1.0), swapped=True, clipped=True)
    assert metrics.parse_tolerant("1:40 to 3:40", duration=200) == metrics.Parsed((0.5, 1.0), clipped=True)


@given(
    duration=st.floats(1, 7200),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    time_format=st.sampled_from(("percent", "decimal")),
)
def test_times_survive_writing_and_reading(duration: float, shares: list[float], time_format: str) -> None:
    start, end = (format_time(share * duration, duration, time_format) for share in shares)
    answer = f"From {start} to {end}."
    parsed = metrics.parse_tolerant(answer)
    assert parsed is not None
    assert not parsed.swapped
    error = 0.0101 if time_format == "percent" else 0.00051  # 100 % is written 99
    assert all(abs(read - share) <= error for read, share in zip(parsed.span, shares, strict=True))
    if time_format == "percent":
        assert metrics.parse_official(answer) == pytest.approx(parsed.span)


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ((0.1, 0.3), (0.1, 0.3), 1.0),
        ((0.1, 0.3), (0.2, 0.5), 0.25),
        ((0.0, 0.1), (0.5, 0.6), 0.0),
        ((0.0, 1.0), (0.0, 0.295), 0.29),  # rounded before it meets the threshold of 0.3
        ((0.3, 0.1), (0.1, 0.3), 0.0),  # reversed, as the official score sees it
        ((0.5, 0.5), (0.5, 0.5), 0.0),  # the official scorer divides by zero here
        ((0.3, 0.1), (0.3, 0.3), 0.0),
    ],
)
def test_iou(answer: metrics.Span, truth: metrics.Span, expected: float) -> None:
    assert metrics.interval_iou(answer, truth) == pytest.approx(expected)


def test_grounding_scores() -> None:
    answers = ["From 10 to 30.", "From 30 to 10.", "From 83.1% to 85.0%", "no idea", "From 50 to 100"]
    truths = [(20, 60), (20, 60), (166.2, 170), (0, 10), (100, 200)]
    scores = metrics.grounding_scores(answers, truths, [200] * 5)
    assert scores.official.ious == (1, 0, 0, 0, 0)
    assert scores.tolerant.ious == (1, 1, 1, 0, 1)
    assert (scores.official.miou, scores.official.recall_at_03, scores.official.recall_at_07) == (20, 20, 20)
    assert (scores.tolerant.miou, scores.tolerant.recall_at_05) == (80, 80)
    assert (scores.official.parsed, scores.tolerant.parsed) == (60, 80)
    assert (scores.count, scores.swapped, scores.clipped) == (5, 1, 0)


def test_grounding_rejects_what_does_not_pair() -> None:
    with pytest.raises(ValueError, match="1 answers, 2 truths, 1 durations"):
        metrics.grounding_scores(["From 10 to 20"], [(0, 1), (0, 1)], [10])
    with pytest.raises(ValueError, match="at least one"):
        metrics.grounding_scores([], [], [])
    with pytest.raises(ValueError, match=r"positive seconds, got 0"):
        metrics.grounding_scores(["From 10 to 20"], [(0, 1)], [0])


def test_error_rates_normalise_both_sides() -> None:
    rate = metrics.wer(["Please, try again!", "It's   Allison’s"], ["please try AGAIN", "it's allison's."])
    assert (rate.rate, rate.units) == (0, 5)
    rate = metrics.wer(["one two three four"], ["one too three three four"])
    assert (rate.substitutions, rate.insertions, rate.deletions, rate.rate) == (1, 1, 0, 0.5)
    assert metrics.cer(["ab cd"], ["ab c"]).rate == pytest.approx(1 / 5)


def test_error_rates_of_empty_texts() -> None:
    rate = metrics.wer(["", "a b", "c"], ["x y", "", "c"])
    assert (rate.insertions, rate.deletions, rate.units) == (2, 2, 3)
    assert rate.errors_by_utterance == (2, 2, 0)
    assert rate.units_by_utterance == (0, 2, 1)
    with pytest.raises(ValueError, match="2 references hold no word"):
        metrics.wer(["", "..."], ["a", "b"])
    with pytest.raises(ValueError, match="1 references, 0 hypotheses"):
        metrics.wer(["a"], [])


def test_interval_holds_the_rate_and_is_reproducible() -> None:
    rate = metrics.wer(["a b c d"] * 30, ["a b c d", "a b x d", "a b c"] * 10)
    low, high = rate.interval()
    assert 0 < low < rate.rate < high < 0.5
    assert rate.interval() == (low, high)
    assert math.isclose(metrics.bootstrap_interval([1, 1, 1], [1, 1, 1])[0], 1)
    with pytest.raises(ValueError, match="at least 2"):
        metrics.bootstrap_interval([1], [1])
