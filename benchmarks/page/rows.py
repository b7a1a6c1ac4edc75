"""The rows of accuracy as points of a page: each with its scores, the times measured elsewhere, and its command."""

from __future__ import annotations

import functools
import json
import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from audiopress.benchmarks.accuracy.rows import (
    SPEECH,
    TIME,
    Row,
    clips_of,
    differences,
    identity,
    label,
    name_sets,
    testbed_of,
    training_of,
)
from audiopress.benchmarks.cells import BASELINES, NONE, TRANSFORMERS, read_rows
from audiopress.benchmarks.speed.report import ANY, select
from audiopress.benchmarks.speed.tables import by_setting
from audiopress.compression import Compressor, build
from audiopress.compression.base import TOKENS_PER_SECOND
from audiopress.compression.registry import QWEN_7B
from audiopress.models.loading import is_omni_small

ALL = "all"  # languages, or kinds of question
NEAR = 1.3  # a time goes with a point whose share of kept audio tokens differs by this factor at most; a guess
LONG = 30  # values of a list; a longer one is only counted on the page. A choice
LEADERS = 8  # methods with a colour of their own: more cannot be told apart. A choice


@dataclass(frozen=True)
class Testbed:
    """What is measured on one kind of clips.

    Args:
        name: a heading.
        metrics: their names by their keys in the rows; the first is shown first, and tells who leads.
        error: whether less is better.
        parts: the key in the rows of the scores by part.
        part: what such a part is.
    """

    name: str
    metrics: dict[str, str]
    error: bool
    parts: str
    part: str


TESTBEDS = {
    SPEECH: Testbed(
        "Words",
        {"wer": "Word error rate, %", "cer": "Character error rate, %"},
        True,
        "by_language",
        "language",
    ),
    TIME: Testbed(
        "Times",
        {
            "miou": "Mean IoU of the spans, %",
            "caption_accuracy": "Captions without an error, %",
            "caption_things": "Things that captions name, %",
            "counting_accuracy": "Counts right, %",
        },
        False,
        "by_needs",
        "question needs",
    ),
}
TIMES = {  # by key: what was timed, the benchmark's file, and the field of its rows
    "first_token": ("ms to the first token", "throughput", "first_token"),
    "answer": ("ms of an answer of 14 tokens", "throughput", "answer"),
    "compressing": ("ms of compressing alone", "compressors", "ms"),
}


def page_points(results: Path) -> dict[str, Any]:
    """Gives what a page shows of the rows in a folder, as JSON can hold it.

    Every file `*.jsonl` is read. Of a cell that was measured more than once the last row counts, by its time.
    """
    rows = [
        (row, f"{file.name}, line {number}")
        for file in sorted(results.glob("*.jsonl"))
        for number, row in enumerate(read_json_lines(file), 1)
        if testbed_of(row)
    ]
    cells = {identity(row): (row, source) for row, source in sorted(rows, key=lambda each: each[0]["utc"])}
    times = measured_times(results)
    last = [row for row, _ in cells.values()]
    names, differing = name_sets(last), differences(last)
    points = [
        {"id": number, "setting": names[clips_of(row)]} | point(row, source, times, differing[testbed_of(row)])
        for number, (row, source) in enumerate(cells.values())
    ]
    return {
        "testbeds": {key: _testbed(key, [p for p in points if p["testbed"] == key]) for key in TESTBEDS},
        "times": {key: words for key, (words, _, _) in TIMES.items()},
        "timed": {key: found["about"] for key, found in times.items()},
        "near": NEAR,
        "points": points,
    }


def read_json_lines(file: Path) -> list[Row]:
    """Gives the rows of a file; numbers that JSON does not know, such as NaN, as their names."""
    return [json.loads(json.dumps(row), parse_constant=str) for row in read_rows(file)]


def point(row: Row, source: str, times: dict[str, Any], differing: Sequence[str] = ()) -> dict[str, Any]:
    """Gives one row as the page needs it.

    Args:
        row: of any status.
        source: file and line.
        times: what `measured_times` gave.
        differing: what the name of its line tells beside the method; see `differences`.
    """
    key = testbed_of(row)
    assert key is not None
    testbed, ok = TESTBEDS[key], row["status"] == "ok"
    parts = {ALL: row} | (row.get(testbed.parts) or {}) if ok else {}
    scores = {name: _scores(part, testbed.metrics) for name, part in parts.items()}
    kept = row.get("kept") or {}
    return {
        "testbed": key,
        "method": row["method"],
        "series": label(row, differing),
        "rate": _rate(row),
        "tokens_per_second": row.get("tokens_per_second"),
        "share": _share(row),
        "scores": {name: found for name, found in scores.items() if found},
        "times": {name: found for name, table in times.items() if (found := _nearest(row, kept, table["rows"]))},
        **traits(row),
        "status": row["status"],
        "message": row.get("message", ""),
        "command": command(row),
        "source": source,
        "row": _short(row),
    }


def traits(row: Row) -> dict[str, Any]:
    """Gives stage, and whether the method is trained and sees the question: as the row says, else as registered."""
    names = ("stage", "trained", "query_aware")
    if row["method"] in (TRANSFORMERS, NONE):
        return dict(zip(names, ("none", bool(row.get("trained")), False), strict=True))
    if all(row.get(name) is not None for name in names):
        return {name: row[name] for name in names}
    made = _made(row["method"])
    return {name: row[name] if row.get(name) is not None else getattr(made, name) for name in names}


def command(row: Row) -> str:
    """Gives the command that makes a row."""
    if row.get("ablation"):
        return shlex.join(["python", "benchmarks/ablation.py", row["file"], "--questions", next(iter(row["ablation"]))])
    return shlex.join(["python", *(_speech(row) if testbed_of(row) == SPEECH else _events(row))])


def _speech(row: Row) -> list[str]:
    """Gives the words of its command."""
    words = ["benchmarks/speech.py", *_option(row, "model")]
    if row["method"] not in BASELINES:  # those are in every run
        words += _option(row, "method", "methods")
    if row.get("keep_ratio") is not None:
        words += ["--rates", repr(TOKENS_PER_SECOND * row["keep_ratio"]).removesuffix(".0")]
    words += [*_option(row, "languages"), *_option(row, "splits"), "--joined" if row["joined"] else "--single"]
    words += _option(row, "limit")
    if row.get("steps"):
        asked = row | training_of(row)  # of several rates of learning all, not the one that was chosen
        for name, option in (("steps", "train-steps"), ("train_batch",) * 2, ("train_rate",) * 2, ("seed", "seeds")):
            words += _option(asked, name, option)
    return words


def _events(row: Row) -> list[str]:
    """Gives the words of its command, for clips in the folder that README.md names."""
    words = ["benchmarks/events.py", "runs/timeline", *_option(row, "model")]
    if not row.get("weights") or is_omni_small(row["model"]):  # a saved variant has its own method
        words += _option(row, "method", "methods")
    names = ("positions", "steps", "split", "limit", "num_frames", "timestamps")
    words += [*_option(row, "keep_ratio", "keep-ratios"), *(word for name in names for word in _option(row, name))]
    words += _option(row, "seed", "seeds")
    for name in (row.get("recipe") or {}) if row.get("steps") else ():
        words += _option(row["recipe"], name)
    return words


def _option(row: Row, name: str, option: str | None = None) -> list[str]:
    """Gives an option of a command with a row's value; nothing where it has none."""
    value = row.get(name)
    if value is None:
        return []
    return [f"--{(option or name).replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]


def measured_times(results: Path) -> dict[str, Any]:
    """Gives, for each of `TIMES` that was measured, what it was measured on, and its rows.

    They are of the newest device, of any commit, and of one clip: that of most cells, or the longest.
    """
    found = {}
    for key, (_, benchmark, field) in TIMES.items():
        rows = select(read_json_lines(results / f"{benchmark}.jsonl"), benchmark, commit=ANY)
        rows = [row for row in rows if row["status"] == "ok" and field in row]
        if not rows:
            continue
        if benchmark == "throughput":
            words, rows = next(iter(by_setting(rows).items()))
        else:
            longest = max(row["clip_seconds"] for row in rows)
            rows = [row for row in rows if row["clip_seconds"] == longest]
            words = f"the width of Qwen2.5-Omni-7B, {longest:g} s of sound"
        commits = ", ".join(dict.fromkeys(row["commit"][:7] for row in rows))
        about = f"{words}; {rows[-1]['device']}, commit {commits}"
        found[key] = {"about": about, "rows": [_time(row, field) for row in rows]}
    return found


def _time(row: Row, field: str) -> dict[str, Any]:
    kept = row["kept"]["audio"] if "kept" in row else row["tokens_out"] / row["tokens_in"]
    times = {name: row[field][name] for name in ("median", "p20", "p80")}
    return {"method": row["method"], "kept": kept, "ms": times.pop("median"), **times}


def _nearest(row: Row, kept: dict[str, float], times: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """Gives the time of the same method whose share of kept audio is nearest, unless it is too far off."""
    if not kept.get("audio"):
        return None

    def distance(time: dict[str, Any]) -> float:
        return abs(math.log(time["kept"] / kept["audio"]))

    near = [time for time in times if time["method"] == row["method"] and distance(time) <= math.log(NEAR)]
    best = min(near, key=lambda time: (distance(time), time["ms"]), default=None)
    return None if best is None else {name: value for name, value in best.items() if name != "method"}


def _scores(part: Row, metrics: Iterable[str]) -> dict[str, list[float | None]]:
    """Gives value, low and high end, in percent, of each metric that is there and a number."""

    def percent(share: Any) -> float | None:
        return 100 * share if isinstance(share, int | float) else None

    values = {key: [part.get(key), *(part.get(f"{key}_interval") or (None, None))] for key in metrics}
    scores = {key: [percent(share) for share in shares] for key, shares in values.items()}
    return {key: score for key, score in scores.items() if score[0] is not None}


def _rate(row: Row) -> float | None:
    """Gives the requested tokens per second, or those that were reached where none were requested."""
    asked = row.get("keep_ratio")
    rate = row.get("tokens_per_second") if asked is None else TOKENS_PER_SECOND * asked
    return None if rate is None else round(rate, 3)


def _share(row: Row) -> float | None:
    """Gives the percentage of audio and video tokens that are left."""
    counts = (row.get("tokens") or {}).values()
    before, after = (sum(count[i] for count in counts) for i in (0, 1))
    return 100 * after / before if before else None


def _testbed(key: str, points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Gives what the page says of a testbed, and the sets of clips, those with most points first."""
    testbed = TESTBEDS[key]
    settings = [p["setting"] for p in points]
    scored = {metric for p in points for part in p["scores"].values() for metric in part}
    return {
        "name": testbed.name,
        "part": testbed.part,
        "error": testbed.error,
        "metrics": {metric: name for metric, name in testbed.metrics.items() if metric in scored},
        "settings": sorted(dict.fromkeys(settings), key=settings.count, reverse=True),
        "leaders": leaders(points, testbed),
    }


def leaders(points: Sequence[dict[str, Any]], testbed: Testbed) -> list[str]:
    """Gives the lines that get a colour: those that are among the best of most rates, over all sets of clips.

    At each rate of a set a line earns 1 / its rank. The baselines have looks of their own and do not count.
    """
    key = next(iter(testbed.metrics))
    ranked: dict[tuple[str, Any], dict[str, float]] = {}
    for p in points:
        if p["method"] not in BASELINES and key in p["scores"].get(ALL, {}):
            value = p["scores"][ALL][key][0]
            ranked.setdefault((p["setting"], p["rate"]), {})[p["series"]] = value if testbed.error else -value
    earned: dict[str, float] = {}
    for values in ranked.values():
        for rank, name in enumerate(sorted(values, key=lambda name: values[name]), 1):
            earned[name] = earned.get(name, 0) + 1 / rank
    return sorted(earned, key=lambda name: (-earned[name], name))[:LEADERS]


def _short(value: Any) -> Any:
    """Gives a row with what is too long for a page counted."""
    if isinstance(value, dict):
        return {key: _short(each) for key, each in value.items()}
    if isinstance(value, list):
        return f"{len(value):,} values, in the row's file" if len(value) > LONG else [_short(each) for each in value]
    return value


@functools.cache
def _made(method: str) -> Compressor:
    """Builds a method without weights, at the sizes of Qwen2.5-Omni-7B."""
    with torch.device("meta"):
        return build(method, **vars(QWEN_7B))
