"""Rows of both testbeds as points: a method at a rate, over all seeds, with its scores."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audiopress.benchmarks.cells import NONE, TRANSFORMERS, read_rows
from audiopress.benchmarks.metrics import bootstrap_interval

Row = dict[str, Any]

SPEECH, TIME = "speech", "time"  # testbeds
# What tells sets of clips apart, or those who read them: on a time testbed the LLM is another one after training. And
# what else tells cells on them apart.
CLIPS = {
    SPEECH: ("languages", "splits", "joined", "limit"),
    TIME: ("data", "split", "limit", "clips", "num_frames", "timestamps", "steps", "recipe", "train_clips"),
}
CELL = ("model", "weights", "method", "keep_ratio", "positions", "steps", "elastic")
TRAINING = ("train_batch", "train_rate")


@dataclass(frozen=True)
class Score:
    """A score over seeds, as a share.

    Args:
        value: the mean over seeds.
        interval: of 95 %, over clips, of the mean over seeds; None where there is one clip.
        spread: the standard deviation over seeds; None where there is one.
    """

    value: float
    interval: tuple[float, float] | None = None
    spread: float | None = None


@dataclass(frozen=True)
class Point:
    """A method at a rate on a set of clips.

    Args:
        testbed: speech or time.
        label: the method, its options, and how it was trained.
        rows: one for each seed, all "ok", or a single one that is not.
        questions: texts by name of the ablation's questions that it belongs to.
    """

    testbed: str
    label: str
    rows: tuple[Row, ...]
    questions: dict[str, str]

    @property
    def ok(self) -> bool:
        """Whether it was measured."""
        return self.rows[0]["status"] == "ok"

    @property
    def first(self) -> Row:
        """The row of the first seed, for what seeds do not change."""
        return self.rows[0]

    @property
    def rate(self) -> float:
        """Tokens per second that the decoder or LLM reads: of audio, or on a time testbed of audio and video."""
        name = "tokens_per_second" if self.testbed == SPEECH else "media_tokens_per_second"
        return statistics.mean(row[name] for row in self.rows)

    @property
    def is_baseline(self) -> bool:
        """Whether nothing is compressed."""
        return self.first["method"] in (NONE, TRANSFORMERS)

    def mean(self, *path: str) -> float | None:
        """Gives the mean over seeds of a number somewhere in the rows; None where a row has none."""
        values = [_at(row, path) for row in self.rows]
        return None if None in values else statistics.mean(values)

    def score(self, metric: str) -> Score | None:
        """Gives `wer`, or one of the time testbed's scores by their names; None where it was not measured."""
        if any(metric not in row for row in self.rows):
            return None
        values = [row[metric] for row in self.rows]
        if metric == "wer":
            sums = [row["errors_by_clip"] for row in self.rows]
            counts = self.first["words_by_clip"]
        else:
            sums = [[total for total, _ in row["by_clip"][metric]] for row in self.rows]
            counts = [count for _, count in self.first["by_clip"][metric]]
        means = [statistics.mean(clip) for clip in zip(*sums, strict=True)]
        interval = bootstrap_interval(means, counts) if len(counts) > 1 else None
        return Score(statistics.mean(values), interval, statistics.stdev(values) if len(values) > 1 else None)


def testbed_of(row: Row) -> str | None:
    """Gives a row's testbed; None: it is not one of accuracy. Rows of `speech.py` do not name theirs."""
    testbed = row.get("testbed", SPEECH if "languages" in row else None)
    return testbed if testbed in CLIPS else None


def read_points(results: Path) -> dict[str, list[Point]]:
    """Reads all rows of a folder.

    Of a cell that was measured more than once the last row counts, by its time.

    Returns:
        The points of each set of clips, by the set in words: speech first, and those of the most points first.
    """
    rows = [row for file in sorted(results.glob("*.jsonl")) for row in read_rows(file) if testbed_of(row)]
    cells: dict[str, Row] = {}
    questions: dict[str, dict[str, str]] = {}
    for row in sorted(rows, key=lambda row: row["utc"]):
        name = identity(row, seed=True)
        cells[name] = row
        questions[name] = questions.get(name, {}) | row.get("ablation", {})
    seeds: dict[str, list[str]] = {}
    for name, row in cells.items():
        seeds.setdefault(identity(row, seed=False), []).append(name)
    names, differing = name_sets(rows), differences(rows)
    sets: dict[str, list[Point]] = {}
    for own in seeds.values():
        same = [cells[name] for name in own]
        good = [row for row in same if row["status"] == "ok"] or same[-1:]
        testbed = testbed_of(good[0])
        assert testbed is not None
        asked = {key: text for name in own for key, text in questions[name].items()}
        point = Point(testbed, label(good[0], differing[testbed]), tuple(good), asked)
        sets.setdefault(names[clips_of(good[0])], []).append(point)
    ordered = sorted(sets.items(), key=lambda item: (item[1][0].testbed, -len(item[1])))
    return {words: sorted(points, key=_order(points)) for words, points in ordered}


def front(points: Sequence[Point], metric: str) -> list[Point]:
    """Gives the Pareto front: the points to which no other is better in score at as few tokens, or as good at fewer.

    Args:
        points: measured ones.
        metric: `wer`, of which less is better, or a score of which more is.
    """
    sign = 1 if metric == "wer" else -1

    def place(point: Point) -> tuple[float, float]:
        return point.rate, sign * statistics.mean(row[metric] for row in point.rows)

    best, found = float("inf"), []
    for point in sorted(points, key=place):
        if (value := place(point)[1]) < best or (found and place(found[-1]) == place(point)):
            best = value
            found.append(point)
    return found


def fronts(points: Sequence[Point], metric: str) -> list[list[Point]]:
    """Gives the Pareto front of all points, and, where some methods have trained weights, that of the others."""
    untrained = [point for point in points if not point.first.get("trained")]
    return [front(some, metric) for some in ([points] if len(untrained) in (0, len(points)) else [points, untrained])]


def caption(points: Iterable[Point]) -> str:
    """Says where points are from: machines, versions, commits, clips."""
    rows = [row for point in points for row in point.rows]
    machines = dict.fromkeys(row["device"] + " CPU" * (row["driver"] is None) for row in rows)
    commits = dict.fromkeys(row["commit"][:7] + " with changes" * row["dirty"] for row in rows if row["commit"])
    versions = ""
    for name in ("torch", "transformers"):
        if own := dict.fromkeys(row[name] for row in rows if row.get(name)):
            versions += f"{name} {' and '.join(own)}, "
    return f"{' and '.join(machines)}, {versions}commit {', '.join(commits)}"


def asked_options(row: Row) -> Row:
    """Gives the options that were asked for, beside the keep ratio; rows of `speech.py` hold the resolved ones."""
    if "cell" in row:
        return row["cell"]["options"]
    return row["options"] if testbed_of(row) == TIME else {}


def identity(row: Row, seed: bool = True) -> str:
    """Gives what tells a row's cell from others; without `seed` those of all seeds are one."""
    testbed = testbed_of(row)
    assert testbed is not None
    own = {name: row.get(name) or None for name in (*CLIPS[testbed], *CELL)} | {"options": asked_options(row)}
    own |= training_of(row)
    return json.dumps([testbed, own, (row.get("seed") or 0) if seed else None], sort_keys=True)


def clips_of(row: Row) -> str:
    """Gives what tells a row's set of clips, and who reads them, from others."""
    testbed = testbed_of(row)
    assert testbed is not None
    return json.dumps([testbed, {name: row.get(name) or None for name in CLIPS[testbed]}], sort_keys=True)


def name_sets(rows: Iterable[Row]) -> dict[str, str]:
    """Gives the words for each set of clips, by `clips_of`; sets that the words do not tell apart are numbered."""
    names: dict[str, str] = {}
    for row in rows:
        if (key := clips_of(row)) not in names:
            words, taken = describe(row), set(names.values())
            candidates = (words if i == 1 else f"{words} (set {i})" for i in itertools.count(1))
            names[key] = next(name for name in candidates if name not in taken)
    return names


def training_of(row: Row) -> Row:
    """Gives how a row's method was to be trained; of several rates of learning all, not the one that was chosen."""
    found = {name: row.get(f"{name}s") or row.get(name) for name in TRAINING} if row.get("steps") else {}
    return {name: value for name, value in found.items() if value is not None}


def differences(rows: Iterable[Row]) -> dict[str, list[str]]:
    """Gives, by testbed, what a label must tell as rows differ in it: the model, and how methods were trained."""
    values: dict[str, dict[str, set[str]]] = {testbed: {} for testbed in CLIPS}
    for row in rows:
        testbed = testbed_of(row)
        assert testbed is not None
        for name, value in ({"model": row["model"]} | training_of(row)).items():
            values[testbed].setdefault(name, set()).add(str(value))
    return {testbed: [name for name, found in own.items() if len(found) > 1] for testbed, own in values.items()}


def label(row: Row, differing: Sequence[str] = ()) -> str:
    """Names a row's method, with its options, how it was trained, and what rows differ in beside; see `differences`."""
    details = [f"{name} {value}" for name, value in asked_options(row).items()]
    details += ["contiguous"] if row.get("positions") == "contiguous" else []
    if row.get("steps") and testbed_of(row) == SPEECH:
        details.append(f"{row['steps']} steps" + ", elastic" * bool(row.get("elastic")))
    details += [f"{name} {value}" for name, value in training_of(row).items() if name in differing]
    details += [row["model"]] if "model" in differing else []
    names = {TRANSFORMERS: "transformers, as it comes", NONE: "uncompressed"}
    return ", ".join([names.get(row["method"], row["method"]), *details])


def describe(row: Row) -> str:
    """Says in words which clips a row is of."""
    limit = f", at most {row['limit']} clips" if row.get("limit") else ""
    if testbed_of(row) == SPEECH:
        kind = "joined to dense clips" if row["joined"] else "one by one"
        return f"prompts in {', '.join(row['languages'])} of {' and '.join(row['splits'])}, {kind}{limit}"
    shortest, longest = row["data"]["seconds"]
    clips = f"clips of {shortest} to {longest} s of {row['split']}, {row['num_frames']} frames each{limit}"
    return clips + (f", the LLM trained for {row['steps']} steps on the tokens of each method" if row["steps"] else "")


def _order(points: Sequence[Point]) -> Any:
    """Puts the uncompressed models first, then methods as they came, the highest rate of each first."""
    labels = list(dict.fromkeys(point.label for point in points))
    return lambda p: (not p.is_baseline, labels.index(p.label), -(p.first["keep_ratio"] or 0))


def _at(row: Row, path: Sequence[str]) -> Any:
    value: Any = row
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value
