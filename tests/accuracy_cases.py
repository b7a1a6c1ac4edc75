"""Made-up rows of both testbeds, in the form that the benchmarks write; their scores follow a rule, with noise."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from audiopress.benchmarks.times.scores import Question, scores
from audiopress.data.records import Record, user
from audiopress.data.timeline import Kind

WHERE = {
    "schema": 1,
    "commit": "a" * 40,
    "dirty": False,
    "device": "a machine",
    "driver": None,
    "torch": "2.11.0",
    "transformers": "5.17.0",
}
METHODS = {"ward": 1.0, "atome": 1.6, "pooling": 2.2, "uniform-stride": 3.0, "random": 4.0, "affinity": 1.8}
RATIOS = (0.5, 0.25, 0.125)
DATA = {"version": 1, "seed": 0, "seconds": [30, 60], "size": 224, "fps": 4, "stamps": "ab"}
CLIPS = 6


def speech_row(method: str, ratio: float | None, badness: float = 1.0, **others: Any) -> dict[str, Any]:
    """One of `speech.py`: errors grow as tokens become fewer."""
    rng = random.Random(f"{method} {ratio} {others.get('seed')}")
    rate = 25 * (ratio or 1)
    words = [60] * CLIPS
    errors = [min(150, round(60 * 0.02 * (25 / rate) ** badness * rng.uniform(0.8, 1.2))) for _ in words]
    return {
        **WHERE,
        "utc": "2026-01-01T00:00:00+00:00",
        "model": "whisper-base",
        "languages": ["en"],
        "splits": ["test"],
        "joined": True,
        "limit": None,
        "method": method,
        "keep_ratio": ratio,
        "seed": None,
        "steps": 0,
        "elastic": False,
        "status": "ok",
        "clips": CLIPS,
        "wer": sum(errors) / sum(words),
        "cer": sum(errors) / sum(words) / 2,
        "errors_by_clip": errors,
        "words_by_clip": words,
        "ran_away": 1,
        "tokens_per_second": rate,
        "options": {"keep_ratio": ratio},
        "stage": "connector",
        **others,
    }


def time_row(method: str, ratio: float | None, badness: float = 1.0, **others: Any) -> dict[str, Any]:
    """One of `events.py`, scored by its own scores: answers miss more as tokens become fewer."""
    joint = others.get("stage") == "joint"
    rng = random.Random(f"{method} {ratio} {others.get('seed')} {others.get('positions')}")
    kept = {"audio": ratio or 1, "video": (ratio or 1) if joint else 1.0}
    lost = (1 - (25 * kept["audio"] + 40 * kept["video"]) / 65) * badness
    questions, answers = [], {}
    for clip in range(CLIPS):
        for i in range(12):
            task, needs = ("grounding", "seg_captioning", "counting")[i % 3], ("audio", "video", "both")[i // 3 % 3]
            record = Record(f"{clip}:{i}", (user("?"),), audio=Path("x.wav"), duration=100.0)
            truth = {"grounding": "", "seg_captioning": "The sound of a frog.", "counting": "2"}[task]
            questions.append(Question(record, str(clip), Kind(task, needs), truth, (20.0, 40.0)))
            right = rng.random() > 0.2 + 0.4 * lost * (1 if needs == "video" else 1.5)
            shift = round(rng.uniform(0, 4) + 15 * lost)
            told = {"grounding": f"From {20 + shift} to {40 + shift}.", "seg_captioning": truth, "counting": truth}[
                task
            ]
            answers[record.id] = told if right else "From 80 to 90."
    return {
        **WHERE,
        "utc": "2026-01-01T00:00:00+00:00",
        "testbed": "time",
        "model": "omni-small",
        "weights": None,
        "data": DATA,
        "split": "test",
        "limit": None,
        "num_frames": 50,
        "method": method,
        "keep_ratio": ratio,
        "options": {},
        "positions": "original",
        "seed": 0,
        "steps": 0,
        "status": "ok",
        "stage": "joint" if joint else "connector",
        "tokens_per_second": 25 * kept["audio"],
        "media_tokens_per_second": 25 * kept["audio"] + 40 * kept["video"],
        "kept": kept,
        "density": {"while_heard": 25 * kept["audio"] * 1.2, "elsewhere": 25 * kept["audio"] * 0.7},
        **scores(questions, answers),
        **others,
    }


def asked(row: dict[str, Any], options: dict[str, Any] | None = None, **questions: str) -> dict[str, Any]:
    """Makes a row one of `ablation.py`."""
    return row | {"cell": {"options": options or {}}, "ablation": questions}


def all_rows() -> list[dict[str, Any]]:
    """Some of everything: both testbeds, joint methods, seeds, options, questions, and a failure."""
    rows = [speech_row("transformers", None), speech_row("none", None), time_row("none", None)]
    for method, badness in METHODS.items():
        rows += [speech_row(method, ratio, badness) for ratio in RATIOS]
        rows += [time_row(method, ratio, badness / 3) for ratio in RATIOS]
    rows += [time_row("omnizip", ratio, 1.2, stage="joint") for ratio in (0.2, 0.1, 0.05)]
    rows += [speech_row("stacking", 0.25, 1.4, steps=400, seed=seed, trained=True) for seed in (0, 1, 2)]
    rows += [
        asked(time_row("ward", 0.25, 0.4, steps=100, seed=seed, positions=positions), positions="Which positions?")
        for seed in (0, 1, 2)
        for positions in ("original", "contiguous")
    ]
    rows += [
        asked(speech_row("ward", 0.2, 1.2 + off, options={}), {"norm_preserving": False} if off else {}, parts="Parts?")
        for off in (0, 1)
    ]
    failure = {name: time_row("dart", 0.25)[name] for name in ("utc", *WHERE, "testbed", "model", "data", "split")}
    failure |= {
        "limit": None,
        "clips": CLIPS,
        "num_frames": 50,
        "method": "dart",
        "keep_ratio": 0.25,
        "options": {},
        "seed": 0,
    }
    failure |= {"steps": 0, "positions": "original", "status": "failed", "message": "ValueError: it is broken"}
    return [*rows, failure]


def write(rows: list[dict[str, Any]], folder: Path) -> Path:
    """Writes rows as a benchmark would."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
