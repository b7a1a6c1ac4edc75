"""Scores of answers: temporal grounding as LongVALE counts it, and word and character error rates."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jiwer
import numpy as np
from scipy.stats import bootstrap

from audiopress.data.speech import normalise

Span = tuple[float, float]  # start and end, as fractions of the video

_OFFICIAL = re.compile(r"(\d{2}) (to|and) (\d{2})")
_NUMBER = r"(?:\d{1,2}:)?\d{1,2}:\d{2}(?:\.\d+)?|\d{1,3}(?:\.\d+)?"
_UNIT = r"\s*(%|percent\b|seconds?\b|secs?\b|s\b)?"
_PAIR = rf"(?<![\d.:])({_NUMBER})(?![\d:]){_UNIT}\s*(?:to|and|until|till|-|–|—)\s*({_NUMBER})(?![\d:]){_UNIT}"
# A pair that is announced goes before one that is not ("two dogs, 2 and 3 years old, bark from 10 to 30").
_TOLERANT = (re.compile(rf"\b(?:from|between)\s+{_PAIR}", re.IGNORECASE), re.compile(_PAIR, re.IGNORECASE))


@dataclass(frozen=True)
class Parsed:
    """What the tolerant parser read.

    Args:
        span: start <= end, in [0, 1].
        swapped: the answer gave the end first.
        clipped: the answer went past the end of the video.
    """

    span: Span
    swapped: bool = False
    clipped: bool = False


@dataclass(frozen=True)
class GroundingScore:
    """Scores of one parser, all in percent; an answer that it could not read counts as IoU 0."""

    miou: float
    recall_at_03: float
    recall_at_05: float
    recall_at_07: float
    parsed: float
    ious: tuple[float, ...]


@dataclass(frozen=True)
class GroundingScores:
    """The official score, which is comparable with published ones, and the tolerant one beside it.

    Args:
        official: by LongVALE's parser.
        tolerant: by ours.
        count: of answers.
        swapped: answers with the end before the start, which only the tolerant score puts right.
        clipped: answers past the end of the video, cut there by the tolerant parser.
    """

    official: GroundingScore
    tolerant: GroundingScore
    count: int
    swapped: int
    clipped: int


@dataclass(frozen=True)
class ErrorRate:
    """Edit errors against references, in words or characters.

    Args:
        substitutions: over all utterances, as are `deletions` and `insertions`.
        units: words or characters of the references.
        errors_by_utterance: errors of each utterance; with `units_by_utterance` what `interval` draws from.
    """

    substitutions: int
    deletions: int
    insertions: int
    units: int
    errors_by_utterance: tuple[int, ...]
    units_by_utterance: tuple[int, ...]

    @property
    def errors(self) -> int:
        """Substitutions, deletions and insertions together."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors per unit of the references: 0.041 is 4.1 %; above 1 where much is inserted."""
        return self.errors / self.units

    def interval(self, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
        """Gives the interval of the rate over resampled utterances; see `bootstrap_interval`."""
        return bootstrap_interval(self.errors_by_utterance, self.units_by_utterance, confidence, seed)


def parse_official(answer: str) -> Span | None:
    """Reads an answer as LongVALE's own scorer does: the first `dd to dd` or `dd and dd`, in hundredths.

    Kept with its ways, because published scores have them: `From 5 to 9` and `83.1% to 85.0%` are not read, and
    `From 10 to 100` is read as (0.10, 0.10). None: no match.
    """
    match = _OFFICIAL.search(answer)
    return (int(match[1]) / 100, int(match[3]) / 100) if match else None


def parse_tolerant(answer: str, duration: float | None = None) -> Parsed | None:
    """Reads an answer as a person would: percents with or without sign and decimals, seconds, or `mm:ss`.

    Two numbers of one to three digits, joined by to, and, until or a dash; the first pair after from or between, else
    the first pair. A number without a unit is a percent. If either is `mm:ss`, `h:mm:ss` or has the unit seconds, both
    are times, and `duration` is needed to place them. A reversed pair is swapped, a value past the end is clipped.

    Args:
        answer: generated text.
        duration: of the video, in seconds.

    Returns:
        The span, or None: there is no such pair, or it is in seconds and the duration is unknown.
    """
    match = next((m for pattern in _TOLERANT if (m := pattern.search(answer))), None)
    if match is None:
        return None
    first, first_unit, second, second_unit = match.groups()
    in_seconds = ":" in first + second or any(
        (unit or "").lower().startswith("s") for unit in (first_unit, second_unit)
    )
    if in_seconds and duration is None:
        return None
    whole = duration if in_seconds and duration is not None else 100.0
    start, end = (_seconds(text) / whole for text in (first, second))
    ordered = min(start, end), max(start, end)
    return Parsed((min(ordered[0], 1.0), min(ordered[1], 1.0)), swapped=start > end, clipped=ordered[1] > 1)


def interval_iou(answer: Span, truth: Span) -> float:
    """Gives LongVALE's IoU of two intervals: the overlap over their hull, rounded to two decimals.

    Two intervals of zero length in the same place have no IoU, and LongVALE's scorer stops there; here it is 0.
    """
    overlap = max(0.0, min(answer[1], truth[1]) - max(answer[0], truth[0]))
    hull = max(answer[1], truth[1]) - min(answer[0], truth[0])
    return round(overlap / hull, 2) if hull > 0 else 0.0


def grounding_scores(
    answers: Sequence[str], truths: Sequence[tuple[float, float]], durations: Sequence[float]
) -> GroundingScores:
    """Scores answers to "when does this happen" with both parsers: mean IoU, and the share with IoU >= 0.3, 0.5, 0.7.

    Args:
        answers: generated text; the empty text for an answer that is missing.
        truths: `(start, end)` in seconds.
        durations: of the videos, in seconds.

    Raises:
        ValueError: no answers, lengths that differ, or a duration that is not positive.
    """
    _check_lengths(answers=answers, truths=truths, durations=durations)
    if wrong := [duration for duration in durations if not (duration > 0 and math.isfinite(duration))]:
        raise ValueError(f"durations must be positive seconds, got {wrong[0]}")
    shares = [(start / whole, end / whole) for (start, end), whole in zip(truths, durations, strict=True)]
    tolerant = [parse_tolerant(answer, whole) for answer, whole in zip(answers, durations, strict=True)]
    return GroundingScores(
        official=_score([parse_official(answer) for answer in answers], shares),
        tolerant=_score([parsed.span if parsed else None for parsed in tolerant], shares),
        count=len(answers),
        swapped=sum(parsed.swapped for parsed in tolerant if parsed),
        clipped=sum(parsed.clipped for parsed in tolerant if parsed),
    )


def wer(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRate:
    """Counts word errors over all utterances, after `normalise` on both sides.

    An empty hypothesis is all deletions; of an empty reference every word of the hypothesis is an insertion.

    Raises:
        ValueError: no utterances, lengths that differ, or references without a single word.
    """
    return _error_rate(references, hypotheses, jiwer.process_words, lambda text: len(text.split()), "word")


def cer(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRate:
    """Counts character errors, blanks between words included; otherwise as `wer`."""
    return _error_rate(references, hypotheses, jiwer.process_characters, len, "character")


def bootstrap_interval(
    numerators: Sequence[float], denominators: Sequence[float], confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Gives the percentile bootstrap interval of `sum(numerators) / sum(denominators)` over 2,000 resamples.

    Args:
        numerators: one per utterance or answer: errors, or IoUs.
        denominators: one each: words, or ones for a mean.
        confidence: share of the resamples inside.
        seed: of the resampling.

    Raises:
        ValueError: fewer than two samples, or lengths that differ.
    """
    _check_lengths(numerators=numerators, denominators=denominators)
    if len(numerators) < 2:
        raise ValueError(f"an interval needs at least 2 samples, got {len(numerators)}")

    def ratio(over: np.ndarray, under: np.ndarray, axis: int = -1) -> np.ndarray:
        # A resample of nothing but empty references has no rate; as one of a single unit it can be ranked.
        return over.sum(axis) / np.maximum(under.sum(axis), 1)

    data = (np.asarray(numerators, float), np.asarray(denominators, float))
    result = bootstrap(
        data,
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=2_000,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(result.low), float(result.high)


def _seconds(text: str) -> float:
    """Reads `h:mm:ss`, `mm:ss` or a plain number."""
    total = 0.0
    for part in text.split(":"):
        total = total * 60 + float(part)
    return total


def _score(spans: Sequence[Span | None], truths: Sequence[Span]) -> GroundingScore:
    ious = [interval_iou(span, truth) if span else 0.0 for span, truth in zip(spans, truths, strict=True)]

    def percent(values: Sequence[float | bool]) -> float:
        return 100 * sum(values) / len(values)

    return GroundingScore(
        miou=percent(ious),
        recall_at_03=percent([iou >= 0.3 for iou in ious]),
        recall_at_05=percent([iou >= 0.5 for iou in ious]),
        recall_at_07=percent([iou >= 0.7 for iou in ious]),
        parsed=percent([span is not None for span in spans]),
        ious=tuple(ious),
    )


def _error_rate(
    references: Sequence[str],
    hypotheses: Sequence[str],
    process: Callable[[str, str], Any],
    length: Callable[[str], int],
    unit: str,
) -> ErrorRate:
    _check_lengths(references=references, hypotheses=hypotheses)
    texts = [normalise(text) for text in references]
    units = tuple(map(length, texts))
    if not sum(units):
        raise ValueError(f"the {len(texts)} references hold no {unit} together; an error rate needs at least one")
    outputs = [process(text, normalise(hypothesis)) for text, hypothesis in zip(texts, hypotheses, strict=True)]
    return ErrorRate(
        sum(o.substitutions for o in outputs),
        sum(o.deletions for o in outputs),
        sum(o.insertions for o in outputs),
        sum(units),
        tuple(o.substitutions + o.deletions + o.insertions for o in outputs),
        units,
    )


def _check_lengths(**sequences: Sequence[Any]) -> None:
    lengths = {name: len(values) for name, values in sequences.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        listed = ", ".join(f"{count} {name}" for name, count in lengths.items())
        raise ValueError(f"there must be as many of each, and at least one; got {listed}")
