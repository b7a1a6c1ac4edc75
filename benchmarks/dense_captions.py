"""Dense captions: events with times and text, as LongVALE reads them from an answer and scores them.

SODA_c is written from its formula (Fujita et al., "SODA: Story Oriented Dense Video Captioning Evaluation Framework",
ECCV 2020). METEOR and CIDEr within overlap thresholds are those of ActivityNet Captions (1705.00754).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from audiopress.benchmarks.captions import CaptionScorer
from audiopress.benchmarks.metrics import parse_tolerant

THRESHOLDS = (0.3, 0.5, 0.7, 0.9)  # of the overlap; LongVALE's
ALIKE = 0.98  # difflib's ratio above which neighbouring events are one; LongVALE's, as is the gap of one percent
NOTHING = "xqzvjkwpyhgfb"  # the reference of an event that overlaps none: no word is like it (LongVALE: random letters)

_OFFICIAL = re.compile(r"From (\d+) to (\d+), (.+)")
_TOLERANT = re.compile(
    r"\b((?:from|between)\s+[^\n,]*?)[,:]\s+(.+?)(?=[.;][ \t]+(?:from|between)\s+\d|$)", re.IGNORECASE | re.MULTILINE
)


@dataclass(frozen=True)
class Event:
    """What happens from `start` to `end`, both in one unit."""

    start: float
    end: float
    text: str


def read_official(answer: str, duration: float) -> list[Event]:
    """Reads the events of an answer as LongVALE's scorer does: `From xx to xx, text`, one per line.

    Times are whole percents, and an event lasts to the end of its last percent, also past the end of the video.

    Args:
        answer: generated text.
        duration: of the video, in seconds.

    Returns:
        The events in seconds, in the answer's order, neighbours that are alike merged.
    """
    events = [Event(int(start), int(end), text.strip()) for start, end, text in _OFFICIAL.findall(answer)]
    return _in_seconds(merge_alike(events), duration, one=1)


def read_tolerant(answer: str, duration: float) -> list[Event]:
    """Reads the events of an answer as a person would: all times that `parse_tolerant` reads, several in a line.

    An event lasts to the end of its last percent where all of the answer's percents are whole; times that are finer
    are taken as they stand. None goes past the end of the video. Otherwise as `read_official`.
    """
    events = []
    for times, text in _TOLERANT.findall(answer):
        if parsed := parse_tolerant(times, duration):
            events.append(Event(100 * parsed.span[0], 100 * parsed.span[1], text.strip()))
    whole = all(abs(time - round(time)) < 1e-9 for event in events for time in (event.start, event.end))
    seconds = _in_seconds(merge_alike(events), duration, one=int(whole))
    return [replace(event, end=min(event.end, duration)) for event in seconds]


def merge_alike(events: Sequence[Event]) -> list[Event]:
    """Joins each event to the one before it if their texts are nearly equal and at most one percent lies between.

    The text of the first stays, and the end is that of the last.
    """
    merged: list[Event] = []
    for event in events:
        last = merged[-1] if merged else None
        if (
            last is not None
            and -1 <= event.start - last.end <= 1
            and difflib.SequenceMatcher(None, last.text, event.text).ratio() > ALIKE
        ):
            merged[-1] = replace(last, end=event.end)
        else:
            merged.append(event)
    return merged


def overlap(a: Event, b: Event) -> float:
    """Gives the IoU of two events; 0 where one ends before it starts."""
    shared = min(a.end, b.end) - max(a.start, b.start)
    # LongVALE's addend: an overlap of just a threshold is below it.
    return shared / (a.end - a.start + b.end - b.start - shared + 1e-8) if shared > 0 else 0.0


def soda_c(answer: Sequence[Event], truth: Sequence[Event], meteor: Callable[..., tuple[float, list[float]]]) -> float:
    """Gives SODA_c of one video: how well the answer's events tell the true ones in their order.

    Every pair is worth IoU x METEOR; S is the sum over the best one-to-one matching that keeps both orders.
    Precision is S per event of the answer, recall S per true one, and the score their harmonic mean,
    `2 S / (len(answer) + len(truth))`.

    Args:
        answer: events with tokenized texts, in the order in which they are told.
        truth: the same.
        meteor: gives the scores of tokenized hypotheses against their references as second value.
    """
    worth = {(i, j): iou for i, a in enumerate(answer) for j, b in enumerate(truth) if (iou := overlap(a, b))}
    if not worth:
        return 0.0
    _, alike = meteor([answer[i].text for i, _ in worth], [truth[j].text for _, j in worth])
    worth = {pair: iou * score for (pair, iou), score in zip(worth.items(), alike, strict=True)}
    best = [0.0] * (len(truth) + 1)  # S of the answer's first events, and the first 0, 1, ... true ones
    for i in range(len(answer)):
        before = best
        best = [0.0]
        for j in range(len(truth)):
            best.append(max(before[j + 1], best[j], before[j] + worth.get((i, j), 0.0)))
    return 2 * best[-1] / (len(answer) + len(truth))


def within(answer: Sequence[Event], truth: Sequence[Event], threshold: float) -> tuple[list[str], list[str]]:
    """Pairs each event of an answer with every true one that overlaps it by `threshold` or more, or with `NOTHING`.

    Returns:
        The texts of the answer and, for each, its reference.
    """
    texts, references = [], []
    for event in answer:
        found = [true.text for true in truth if overlap(event, true) >= threshold] or [NOTHING]
        texts += [event.text] * len(found)
        references += found
    return texts, references


def dense_scores(
    answers: Sequence[Sequence[Event]], truths: Sequence[Sequence[Event]], scorer: CaptionScorer
) -> dict[str, Any]:
    """Scores the dense captions of videos, in percent; a video without events counts 0.

    Args:
        answers: events of each video, in seconds.
        truths: the true ones.
        scorer: of texts.

    Returns:
        `SODA_c` and `METEOR` (None without Java), `CIDEr`: of each video, averaged over videos and, but for SODA_c,
        over `THRESHOLDS`; `parsed`, the share of videos with an event.
    """
    answers, truths = _tokenized(answers, scorer), _tokenized(truths, scorer)
    videos = list(zip(answers, truths, strict=True))
    pairs = [within(answer, truth, threshold) for threshold in THRESHOLDS for answer, truth in videos]

    def mean(score: Callable[[list[str], list[str]], float]) -> float:
        return 100 * fmean(score(*pair) if pair[0] else 0.0 for pair in pairs)

    java = scorer.java
    return {
        "SODA_c": 100 * fmean(soda_c(answer, truth, scorer.meteor) for answer, truth in videos) if java else None,
        "METEOR": mean(lambda *pair: scorer.meteor(*pair)[0]) if java else None,
        "CIDEr": mean(scorer.cider),
        "parsed": 100 * fmean(bool(answer) for answer in answers),
    }


def _in_seconds(events: Sequence[Event], duration: float, one: int) -> list[Event]:
    """Gives events in percent as seconds, each to the end of its last `one` percent."""
    return [Event(e.start * duration / 100, (e.end + one) * duration / 100, e.text) for e in events]


def _tokenized(videos: Sequence[Sequence[Event]], scorer: CaptionScorer) -> list[list[Event]]:
    """Tokenizes all texts in one go; what is not ASCII is a blank, as for LongVALE's scorer."""
    texts = iter(scorer.tokenize([re.sub(r"[^\x00-\x7f]", " ", event.text) for video in videos for event in video]))
    return [[replace(event, text=next(texts)) for event in video] for video in videos]
