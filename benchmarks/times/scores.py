"""Scores of answers about made-up clips: when an event is, what it is, and how often something happens.

All scores are shares from 0 to 1. Their intervals are bootstrap ones over clips, because the questions about one clip
are answered from the same tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from audiopress.benchmarks.metrics import Span, bootstrap_interval, grounding_scores
from audiopress.data.records import Record
from audiopress.data.speech import normalise
from audiopress.data.timeline import Kind

RECALLS = (0.3, 0.5, 0.7)  # LongVALE's


@dataclass(frozen=True)
class Question:
    """A question about a clip, and its truth.

    Args:
        record: the clip and the question, without an answer.
        clip: which one.
        kind: the task, and the senses it takes.
        truth: the sentence of a caption, or the number; empty for a grounding.
        span: of a grounding, in seconds.
    """

    record: Record
    clip: str
    kind: Kind
    truth: str = ""
    span: Span = (0.0, 0.0)


@dataclass(frozen=True)
class Point:
    """What an answer is worth, from 0 to 1."""

    clip: str
    needs: str
    value: float


def things(sentence: str) -> frozenset[str]:
    """Gives the things that a description names, each with how it is perceived.

    `The sound of a frog while a picture of an owl is shown.` names `the sound of a frog` and `a picture of an owl`.
    Upper case, punctuation and the order do not count. It reads what `Event.sentence` writes; of another sentence it
    gives whatever stands between the words `while`.
    """
    parts = normalise(sentence).removesuffix(" is shown").split(" while ")
    return frozenset(part for part in parts if part)


def number(answer: str) -> int | None:
    """Reads the first whole number, in digits or in English words; None where there is none."""
    found = re.search(r"\d+", str(EnglishTextNormalizer({})(answer)))
    return int(found[0]) if found else None


def scores(questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, Any]:
    """Scores all answers, over all senses and for each of audio, video and both.

    - Grounding: `miou` and `recall` by the tolerant parser, `miou_official` by LongVALE's, `parsed` the share read.
    - Captions: `caption_accuracy` is the share that names the things of the event and no other; `caption_things` is the
      share of the things, over all events, that are named.
    - Counting: `counting_accuracy` is the share of right numbers.

    Args:
        questions: at least one, of clips each of whose questions are all here.
        answers: by the ids of the records.

    Raises:
        KeyError: a question has no answer.
    """
    clips = list(dict.fromkeys(question.clip for question in questions))
    grounded, captioned, counted = (
        [q for q in questions if q.kind.task == task] for task in ("grounding", "seg_captioning", "counting")
    )
    points: dict[str, list[Point]] = {}
    found: dict[str, Any] = {"clips": len(clips), "questions": len(questions)}
    if grounded:
        durations = [q.record.duration or 0.0 for q in grounded]
        score = grounding_scores([answers[q.record.id] for q in grounded], [q.span for q in grounded], durations)
        ious = score.tolerant.ious
        points["miou"] = [Point(q.clip, q.kind.needs, iou) for q, iou in zip(grounded, ious, strict=True)]
        found["recall"] = {f"{least:g}": sum(iou >= least for iou in ious) / len(ious) for least in RECALLS}
        found |= {"parsed": score.tolerant.parsed / 100, "miou_official": score.official.miou / 100}
    named = [(q, things(q.truth), things(answers[q.record.id])) for q in captioned]
    points["caption_accuracy"] = [Point(q.clip, q.kind.needs, float(told == true)) for q, true, told in named]
    points["caption_things"] = [Point(q.clip, q.kind.needs, float(x in told)) for q, true, told in named for x in true]
    points["counting_accuracy"] = [
        Point(q.clip, q.kind.needs, float(number(answers[q.record.id]) == int(q.truth))) for q in counted
    ]
    points = {name: values for name, values in points.items() if values}
    for name, values in points.items():
        found |= {name: _mean(values), f"{name}_interval": _interval(values)}
    found["by_needs"] = {
        needs: {
            name: score
            for metric, values in points.items()
            if (own := [point for point in values if point.needs == needs])
            for name, score in ((metric, _mean(own)), (f"{metric}_interval", _interval(own)))
        }
        for needs in sorted({question.kind.needs for question in questions})
    }
    found["by_clip"] = {
        name: [[sum(p.value for p in values if p.clip == clip), sum(p.clip == clip for p in values)] for clip in clips]
        for name, values in points.items()
    }
    return found


def _mean(points: Sequence[Point]) -> float:
    return sum(point.value for point in points) / len(points)


def _interval(points: Sequence[Point]) -> tuple[float, float] | None:
    """Gives the interval over clips; of a single clip there is none."""
    sums: dict[str, tuple[float, int]] = {}
    for point in points:
        total, count = sums.get(point.clip, (0.0, 0))
        sums[point.clip] = total + point.value, count + 1
    return bootstrap_interval(*zip(*sums.values(), strict=True)) if len(sums) > 1 else None
