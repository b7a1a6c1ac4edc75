"""LongVALE (arXiv 2411.19772): its dialogues for training and its annotations as evaluation queries.

The times in the text are percents of the video's duration. LongVALE's own form, two digits from 00 to 99, is the
default, because its scorer reads no other.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from .records import Message, Record, assistant, user
from .skips import SkipLog

TimeFormat = Literal["percent", "decimal"]
Turns = Literal["multi", "single", "mixed"]
Task = Literal["grounding", "captioning", "seg_captioning"]

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi")
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".m4a", ".ogg", ".opus")

# The wording, with its misspelling and its blanks, is LongVALE's: results are comparable only with the very same text.
PROMPTS: dict[Task, str] = {
    "grounding": "<video>\nAt which time interval can we find {} taking place in the video? "
    "Give the timestamps in the fromat: From xx to xx.",
    "captioning": "<video>\n Could you please detail the events that took place during different time segments in the "
    "video? List the events in the format: From xx to xx, event1. \n From xx to xx, event2. \n ...",
    "seg_captioning": "<video>\n Can you describe what occurred from <start> to <end> in the video? "
    "Please give the event description directly.",
}

_TIME_TOKEN = re.compile(r"<[se]\d+>")
_MARKER = re.compile(r"<video>\n?")
_ROLES = {"human": user, "gpt": assistant}


@dataclass(frozen=True)
class Query:
    """One evaluation question and its truth. Answers are paired with it by `key`, never by position.

    Args:
        record: the video and the one question.
        task: which prompt.
        video_id: of the annotation file.
        sentence_id: index of the event in its video; None for dense captioning, which asks for all of them.
        spans: `(start, end)` in seconds of the event, or of all events.
        sentences: their descriptions.
    """

    record: Record
    task: Task
    video_id: str
    sentence_id: int | None
    spans: tuple[tuple[float, float], ...]
    sentences: tuple[str, ...]

    @property
    def key(self) -> tuple[str, int | None]:
        """What identifies the query within its task."""
        return self.video_id, self.sentence_id


def format_time(seconds: float, duration: float, time_format: TimeFormat = "percent") -> str:
    """Writes a time as LongVALE does: `min(round(100 * seconds / duration), 99)`, two digits.

    Args:
        seconds: from the start of the video; past the end counts as the end.
        duration: of the video, in seconds.
        time_format: `percent` for LongVALE's own `07`, or `decimal` for one decimal and a sign, `7.3%`, which
            resolves ten times finer but which LongVALE's scorer does not read.

    Raises:
        ValueError: a time that is negative or not a number, or an unknown format.
    """
    _check_option("time_format", time_format, TimeFormat)
    if not (_is_number(duration) and duration > 0):
        raise ValueError(f"duration must be positive seconds, got {duration!r}")
    if not (_is_number(seconds) and seconds >= 0):
        raise ValueError(f"a time must be seconds from 0 on, got {seconds!r}")
    percent = seconds / duration * 100
    return f"{min(round(percent), 99):02d}" if time_format == "percent" else f"{min(percent, 100):.1f}%"


def load_dialogues(
    path: Path | str,
    *,
    video_dir: Path | str | None = None,
    audio_dir: Path | str | None = None,
    turns: Turns = "multi",
    time_format: TimeFormat = "percent",
    skips: SkipLog | None = None,
) -> list[Record]:
    """Loads a file of dialogues (`longvale-sft-bp-7k.json`, `longvale-sft-it-25k.json`), every record checked.

    Args:
        path: JSON list of `{"id", "conversations": [{"from": "human" | "gpt", "value"}], "meta": {"duration",
            "token": {"<s0>": seconds}}}`; `meta` may be missing where no text holds a time token.
        video_dir: folder of `{id}.mp4` (or another of `VIDEO_SUFFIXES`).
        audio_dir: folder of `{id}.wav` (or another of `AUDIO_SUFFIXES`). Without it the sound is the video's own
            track; without `video_dir` the records are audio only.
        turns: `multi` keeps the dialogues, `single` makes one record of every question with its answer (about ten
            per video, in the file's order), `mixed` gives the dialogues and then the single questions of those that
            have several.
        time_format: how times are written; see `format_time`.
        skips: collects bad records; None: a bad record is an error.

    Raises:
        ValueError: names the file, the record and what is wrong with it.
    """
    _check_option("turns", turns, Turns)
    _check_option("time_format", time_format, TimeFormat)
    _check_folders(video_dir, audio_dir)
    path, skips = Path(path), SkipLog(strict=True) if skips is None else skips
    entries = read_json(path, list)
    dialogues: list[Record] = []
    seen: Counter[str] = Counter()
    for index, entry in enumerate(entries):
        try:
            video_id = _field(entry, "id", str)
            # The free-form dialogues have several records of one video.
            name = f"{video_id}~{seen[video_id]}" if seen[video_id] else video_id
            dialogues.append(_dialogue(entry, name, _media(video_id, video_dir, audio_dir), time_format))
            seen[video_id] += 1
        except ValueError as error:
            skips.add(f"{path}: record {index} (id {entry.get('id') if isinstance(entry, dict) else None!r})", error)
    _check_any_left(dialogues, path, len(entries))
    if turns == "multi":
        return dialogues
    pairs = [pair for record in dialogues for pair in split_turns(record)]
    if turns == "single":
        return pairs
    return dialogues + [pair for pair in pairs if "#" in pair.id]


def split_turns(record: Record) -> list[Record]:
    """Gives one record per question and answer, each with the media of its own; `id#0`, `id#1`, ...

    A record of one question is given as it is.
    """
    if len(record.messages) <= 2:
        return [record]
    return [
        Record(f"{record.id}#{i // 2}", record.messages[i : i + 2], record.audio, record.video, record.duration)
        for i in range(0, len(record.messages), 2)
    ]


def load_queries(
    path: Path | str,
    tasks: Sequence[Task] = ("grounding", "captioning", "seg_captioning"),
    *,
    video_dir: Path | str | None = None,
    audio_dir: Path | str | None = None,
    time_format: TimeFormat = "percent",
    skips: SkipLog | None = None,
) -> list[Query]:
    """Makes the evaluation questions of a file of annotations, with LongVALE's exact prompts.

    Args:
        path: JSON object `{video_id: {"duration": s, "timestamps": [[start, end], ...], "sentences": [...]}}`.
        tasks: `grounding` and `seg_captioning` ask one question per event, `captioning` one per video.
        video_dir: as for `load_dialogues`.
        audio_dir: as for `load_dialogues`.
        time_format: of the times in the questions.
        skips: collects bad videos; None: a bad video is an error.

    Raises:
        ValueError: names the file, the video and what is wrong with it.
    """
    for task in tasks:
        _check_option("tasks", task, Task)
    _check_option("time_format", time_format, TimeFormat)
    _check_folders(video_dir, audio_dir)
    path, skips = Path(path), SkipLog(strict=True) if skips is None else skips
    videos = read_json(path, dict)
    queries: list[Query] = []
    for video_id, annotation in videos.items():
        try:
            media = _media(video_id, video_dir, audio_dir)
            queries += [q for task in tasks for q in _queries(task, video_id, annotation, media, time_format)]
        except ValueError as error:
            skips.add(f"{path}: video {video_id!r}", error)
    _check_any_left(queries, path, len(videos))
    return queries


def _dialogue(entry: dict[str, Any], name: str, media: dict[str, Path], time_format: TimeFormat) -> Record:
    conversations = _field(entry, "conversations", list)
    if not conversations:
        raise ValueError("'conversations' is empty; it needs at least one human and one gpt turn")
    meta = _field(entry, "meta", dict) if "meta" in entry else {}
    duration = _field(meta, "duration", (int, float)) if "duration" in meta else None
    messages = tuple(_message(turn, i, meta, time_format) for i, turn in enumerate(conversations))
    if messages[-1]["role"] == "user":
        raise ValueError("the last turn is a human one; the last must be gpt's answer")
    return Record(name, messages, duration=duration, **media)


def _message(turn: Any, index: int, meta: dict[str, Any], time_format: TimeFormat) -> Message:
    where = f"turn {index}: "
    speaker, text = _field(turn, "from", str, where), _field(turn, "value", str, where)
    if speaker not in _ROLES:
        raise ValueError(f"turn {index}: 'from' must be one of {', '.join(_ROLES)}, got {speaker!r}")
    if "<image>" in text:
        raise ValueError(f"turn {index} asks about an <image>; only <video> is supported")
    if index == 0:
        text = _without_marker(text)
    if "<video>" in text:
        raise ValueError(f"turn {index} holds a <video> too many; one is allowed, in the first turn")
    return _ROLES[speaker](_TIME_TOKEN.sub(lambda match: _time(match[0], meta, time_format), text))


def _time(token: str, meta: dict[str, Any], time_format: TimeFormat) -> str:
    """Writes the time a token stands for."""
    if not meta.get("duration"):
        raise ValueError(f"the text holds the time token {token}, but 'meta' has no duration")
    tokens = meta.get("token") or {}
    if token not in tokens:
        raise ValueError(f"the text holds the time token {token}, but 'meta' gives only {', '.join(tokens) or 'none'}")
    return format_time(tokens[token], meta["duration"], time_format)


def _queries(
    task: Task, video_id: str, annotation: Any, media: dict[str, Path], time_format: TimeFormat
) -> Iterator[Query]:
    duration = _field(annotation, "duration", (int, float))
    sentences = _field(annotation, "sentences", list)
    if not all(isinstance(sentence, str) for sentence in sentences):
        raise ValueError("'sentences' must be a list of str")
    spans = [_span(span, i) for i, span in enumerate(_field(annotation, "timestamps", list))]
    if len(spans) != len(sentences):
        raise ValueError(f"{len(spans)} timestamps but {len(sentences)} sentences; there must be one for each")

    def query(sentence_id: int | None, prompt: str, events: slice) -> Query:
        name = f"{video_id}:{task}" if sentence_id is None else f"{video_id}:{task}:{sentence_id}"
        record = Record(name, (user(_without_marker(prompt)),), duration=duration, **media)
        return Query(record, task, video_id, sentence_id, tuple(spans[events]), tuple(sentences[events]))

    if task == "captioning":
        yield query(None, PROMPTS[task], slice(None))
        return
    for i, (sentence, (start, end)) in enumerate(zip(sentences, spans, strict=True)):
        if task == "grounding":
            prompt = PROMPTS[task].format(sentence.strip().lower().removesuffix("."))
        else:
            prompt = PROMPTS[task].replace("<start>", format_time(start, duration, time_format))
            prompt = prompt.replace("<end>", format_time(end, duration, time_format))
        yield query(i, prompt, slice(i, i + 1))


def _span(span: Any, index: int) -> tuple[float, float]:
    ordered = isinstance(span, list) and len(span) == 2 and all(map(_is_number, span)) and 0 <= span[0] <= span[1]
    if not ordered:
        raise ValueError(f"timestamp {index} must be [start, end] in seconds with 0 <= start <= end, got {span!r}")
    return float(span[0]), float(span[1])


def _media(name: str, video_dir: Path | str | None, audio_dir: Path | str | None) -> dict[str, Path]:
    """Finds the files of a video: what `Record` takes as `audio` and `video`."""
    media = {}
    if video_dir is not None:
        media["video"] = media["audio"] = _find(Path(video_dir), name, VIDEO_SUFFIXES)
    if audio_dir is not None:
        media["audio"] = _find(Path(audio_dir), name, AUDIO_SUFFIXES)
    return media


def _check_folders(*folders: Path | str | None) -> None:
    if all(folder is None for folder in folders):
        raise ValueError("there is no media: give video_dir, audio_dir or both")
    for folder in folders:
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"{folder} is not a folder; it must be the one with the media files")


def _find(folder: Path, stem: str, suffixes: tuple[str, ...]) -> Path:
    for suffix in suffixes:
        if (file := folder / f"{stem}{suffix}").is_file():
            return file
    raise ValueError(f"{folder} holds no file {stem} with one of the endings {' '.join(suffixes)}")


def _without_marker(text: str) -> str:
    """Removes the first `<video>`, because the media always stands before the first question's text."""
    return _MARKER.sub("", text, count=1)


def _field(entry: Any, key: str, kind: type | tuple[type, ...], where: str = "") -> Any:
    """Gives `entry[key]`, checked; `where` opens the message of the error."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    allowed = " or ".join(k.__name__ for k in kinds)
    if not isinstance(entry, dict) or key not in entry:
        got = f"the keys {', '.join(entry)}" if isinstance(entry, dict) else f"{type(entry).__name__} {entry!r:.60}"
        raise ValueError(f"{where}{key!r} is missing; it must be a {allowed}, got {got}")
    if not isinstance(entry[key], kinds):
        raise ValueError(f"{where}{key!r} must be a {allowed}, got {entry[key]!r:.60}")
    return entry[key]


def read_json(path: Path, kind: type) -> Any:
    """Reads a file that must hold a list, or a dict, with entries; raises ValueError, which names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, kind) or not content:
        raise ValueError(f"{path} must hold a JSON {kind.__name__} with entries, got {content!r:.60}")
    return content


def _check_option(name: str, value: str, kind: Any) -> None:
    if value not in get_args(kind):
        raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}")


def _check_any_left(left: Sequence[object], path: Path, total: int) -> None:
    if not left:
        raise ValueError(f"{path}: none of the {total} entries can be used; see the reasons in the log")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
