"""LongVALE's log of answers, and its metrics: official, which are comparable with published ones, and tolerant.

The log is what LongVALE's own script writes, one JSON line per answer, so either's metrics can be had from the other's
log.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from audiopress.benchmarks.captions import NEEDS_JAVA, CaptionScorer
from audiopress.benchmarks.dense_captions import Event, dense_scores, read_official, read_tolerant
from audiopress.benchmarks.metrics import GroundingScore, grounding_scores, interval_iou, parse_official
from audiopress.data.longvale import Task, read_json

TASKS: tuple[Task, ...] = ("captioning", "grounding", "seg_captioning")  # in the order of LongVALE's log

Key = tuple[Task, str, int | None]  # task, video, and the sentence's index in it; None for dense captioning
Answers = Mapping[Key, str]


@dataclass(frozen=True)
class Truth:
    """The true events of a video, in seconds, and how long it is."""

    duration: float
    events: tuple[Event, ...]


def read_truths(path: Path) -> dict[str, Truth]:
    """Reads a file of annotations, by video; the files that `load_queries` takes.

    Raises:
        ValueError: names the file, the video and what is wrong with it.
    """
    truths = {}
    for video, entry in read_json(path, dict).items():
        try:
            pairs = zip(entry["timestamps"], entry["sentences"], strict=True)
            events = tuple(Event(float(start), float(end), str(text)) for (start, end), text in pairs)
            truths[video] = Truth(float(entry["duration"]), events)
            if not truths[video].duration > 0:
                raise ValueError(f"duration must be positive seconds, got {entry['duration']}")
        except (KeyError, TypeError, ValueError) as error:
            wanted = "{duration, timestamps: [[start, end], ...], sentences: [...]}"
            raise ValueError(f"{path}: video {video!r} must be {wanted}: {type(error).__name__} {error}") from error
    return truths


def write_log(path: Path, answers: Answers, truths: Mapping[str, Truth]) -> None:
    """Writes answers in LongVALE's format and order, the official IoU of every grounding with it.

    LongVALE pairs segment captions with the annotations by their place in the log: an answer that is missing between
    others must be the empty text.
    """
    order = {video: i for i, video in enumerate(truths)}
    lines = []
    for key in sorted(answers, key=lambda key: (order[key[1]], TASKS.index(key[0]), key[2] or 0)):
        task, video, sentence = key
        line: dict[str, Any] = {"video_id": video, "task": task, "query_id": 0, "answer": answers[key]}
        if sentence is not None:
            line["info"] = {"sentence_id": sentence}
        if task == "grounding":
            span, event, whole = parse_official(answers[key]), *_event(key, truths)
            true = event.start / whole, event.end / whole
            line["info"]["iou"] = 0 if span is None else interval_iou(span, true)
        lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def read_log(path: Path, truths: Mapping[str, Truth]) -> dict[Key, str]:
    """Reads a log in LongVALE's format, of whatever model; of a question answered twice the last answer counts.

    Raises:
        ValueError: a line that is no answer, or one about an event that is not annotated.
    """
    answers: dict[Key, str] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):  # no other line break ends a line
        if not text:
            continue
        try:
            line = json.loads(text)
            sentence = None if line["task"] == "captioning" else int(line["info"]["sentence_id"])
            key = cast(Key, (line["task"], line["video_id"], sentence))
            answer = line["answer"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: line {number} is no answer of a log of LongVALE: {error!r}") from error
        if key[0] not in TASKS or not isinstance(answer, str):
            raise ValueError(f"{path}: line {number} must be of a task in {', '.join(TASKS)}, got {text:.80}")
        if key[1] not in truths or (sentence is not None and not 0 <= sentence < len(truths[key[1]].events)):
            raise ValueError(f"{path}: line {number}: the annotations have no event {sentence} of video {key[1]!r}")
        answers[key] = answer
    if not answers:
        raise ValueError(f"{path} holds no answers")
    return answers


def score(answers: Answers, truths: Mapping[str, Truth], scorer: CaptionScorer | None) -> dict[str, Any]:
    """Gives the metrics of every task that has answers, in percent, over those answers.

    Args:
        answers: empty where a question failed.
        truths: of the videos.
        scorer: of captions; None where only groundings are answered.
    """
    keys = {task: [key for key in answers if key[0] == task] for task in TASKS}
    metrics: dict[str, Any] = {}
    if captioned := keys["captioning"]:
        assert scorer is not None
        texts, videos = [answers[key] for key in captioned], [truths[key[1]] for key in captioned]
        metrics["captioning"] = {"answers": len(captioned), "tokenizer": scorer.tokenizer}
        for name, read in (("official", read_official), ("tolerant", read_tolerant)):
            events = [read(text, video.duration) for text, video in zip(texts, videos, strict=True)]
            metrics["captioning"][name] = dense_scores(events, [video.events for video in videos], scorer)
    if grounded := keys["grounding"]:
        places = [_event(key, truths) for key in grounded]
        found = grounding_scores(
            [answers[key] for key in grounded],
            [(event.start, event.end) for event, _ in places],
            [duration for _, duration in places],
        )
        metrics["grounding"] = {
            "answers": found.count,
            "official": _named(found.official),
            "tolerant": _named(found.tolerant) | {"swapped": found.swapped, "clipped": found.clipped},
        }
    if described := keys["seg_captioning"]:
        assert scorer is not None
        scores = scorer.scores([answers[key] for key in described], [_event(key, truths)[0].text for key in described])
        metrics["seg_captioning"] = {
            "answers": len(described),
            "tokenizer": scorer.tokenizer,
            "official": scores,
        }
    return metrics


def table(metrics: Mapping[str, Any]) -> str:
    """Gives the metrics as Markdown, in percent."""
    lines = ["| task | metric | official | tolerant |", "|---|---|---|---|"]
    for task in TASKS:
        found = metrics.get(task, {})
        for name, value in found.get("official", {}).items():
            tolerant = _written(found["tolerant"][name]) if "tolerant" in found else ""
            lines.append(f"| {task} | {name} | {_written(value)} | {tolerant} |")
    return "\n".join(lines)


def _event(key: Key, truths: Mapping[str, Truth]) -> tuple[Event, float]:
    """Gives the event that a question is about, and the duration of its video."""
    _, video, sentence = key
    assert sentence is not None
    return truths[video].events[sentence], truths[video].duration


def _named(found: GroundingScore) -> dict[str, float]:
    return {
        "mIoU": found.miou,
        "R@0.3": found.recall_at_03,
        "R@0.5": found.recall_at_05,
        "R@0.7": found.recall_at_07,
        "parsed": found.parsed,
    }


def _written(value: float | None) -> str:
    return NEEDS_JAVA if value is None else f"{value:.2f}"
