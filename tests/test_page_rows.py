"""Rows of accuracy as points of the page: scores, times, traits, commands, and rows that failed."""

import json
import math
import shlex
import sys

import pytest

from audiopress.benchmarks import events, speech
from audiopress.benchmarks.page.rows import (
    ALL,
    NEAR,
    SPEECH,
    TIME,
    leaders,
    page_points,
    point,
)
from audiopress.benchmarks.page.rows import TESTBEDS as BEDS

WHERE = {"schema": 1, "utc": "2026-01-01T00:00:00+00:00", "commit": "a" * 40, "dirty": False, "device": "x86_64"}


def speech_row(method="ward", keep_ratio=0.25, wer=0.02, **more):
    """A row as `speech.py` writes it."""
    kept = 1.0 if keep_ratio is None else keep_ratio
    settings = {"languages": ["en", "fr"], "splits": ["test"], "joined": True, "limit": None, "seconds": 28.5}
    found = {
        "wer": wer,
        "wer_interval": [wer / 2, 2 * wer],
        "cer": wer / 4,
        "cer_interval": None,
        "errors_by_clip": list(range(100)),
        "by_language": {"fr": {"clips": 3, "wer": 3 * wer, "wer_interval": None}},
        "tokens": {"audio": [1000, round(1000 * kept)]},
        "kept": {"audio": kept},
        "tokens_per_second": 25 * kept,
        "status": "ok",
    }
    return WHERE | {"model": "whisper-base", "method": method, "keep_ratio": keep_ratio} | settings | found | more


def time_row(method="omnizip", keep_ratio=0.1, miou=0.5, **more):
    """A row of the time testbed."""
    return WHERE | {
        "testbed": TIME,
        "model": "omni-small",
        "method": method,
        "keep_ratio": keep_ratio,
        "data": {"seconds": [30, 60]},
        "split": "test",
        "num_frames": 50,
        "options": {},
        "steps": 0,
        "miou": miou,
        "miou_interval": [miou - 0.1, miou + 0.1],
        "by_needs": {"audio": {"miou": miou / 2, "miou_interval": None}},
        "tokens": {"audio": [600, 60], "video": [400, 40]},
        "kept": {"audio": 0.1, "video": 0.1},
        "tokens_per_second": 2.5,
        "status": "ok",
        **more,
    }


def failed_row(status="oom", message="out of memory"):
    """A row of a cell that was not measured to its end."""
    row = speech_row("sa-map", 0.125)
    kept = (*WHERE, "model", "method", "keep_ratio", "languages", "splits", "joined", "limit", "seconds")
    return {name: row[name] for name in kept} | {"status": status, "message": message}


def speed_row(method, kept, ms):
    """A row of `throughput.py`."""
    return WHERE | {
        "model": "7b",
        "method": method,
        "keep_ratio": kept,
        "seconds": 256.89,
        "video": True,
        "batch": 1,
        "kept": {"audio": kept, "video": 1.0},
        "first_token": {"median": ms, "p20": ms, "p80": ms, "n": 5},
        "status": "ok",
    }


def write(folder, **files):
    """Writes each file's rows as JSON lines."""
    folder.mkdir(exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def one(tmp_path, row, **files):
    """The only point of a row."""
    (found,) = page_points(write(tmp_path / "rows", speech=[row], **files))["points"]
    return found


def test_only_rows_of_accuracy_are_points(tmp_path):
    data = page_points(
        write(tmp_path, speech=[speech_row()], events=[time_row()], x=[speed_row("x", 1, 1), {"testbed": "clips"}])
    )
    assert sorted(p["testbed"] for p in data["points"]) == [SPEECH, TIME]
    assert [p["id"] for p in data["points"]] == [0, 1]


def test_scores_are_percent_with_intervals_and_by_part(tmp_path):
    found = one(tmp_path, speech_row(wer=0.02))
    assert found["scores"] == {ALL: {"wer": [2, 1, 4], "cer": [0.5, None, None]}, "fr": {"wer": [6, None, None]}}
    assert (found["rate"], found["share"], found["tokens_per_second"]) == (6.25, 25, 6.25)
    other = point(time_row(), "events.jsonl, line 1", {})
    assert other["scores"]["audio"]["miou"] == [25, None, None]
    assert other["scores"][ALL]["miou"] == pytest.approx([50, 40, 60])
    assert other["share"] == 10


def test_traits_come_from_the_row_or_the_registry(tmp_path):
    def traits(row):
        return tuple(point(row, "", {})[name] for name in ("stage", "trained", "query_aware"))

    assert traits(speech_row()) == ("connector", False, False)
    assert traits(speech_row("atome:encoder")) == ("encoder", False, False)
    assert traits(time_row("omnisift")) == ("joint", True, False)
    assert traits(speech_row("speechprune")) == ("connector", False, True)
    assert traits(speech_row("none", None)) == ("none", False, False)
    assert traits(speech_row("ward", trained=True)) == ("connector", True, False)
    assert traits(speech_row("gone", stage="llm", trained=True, query_aware=True)) == ("llm", True, True)
    with pytest.raises(ValueError, match="unknown method 'gone'"):
        traits(speech_row("gone"))


TRAINED = {"method": "conv", "steps": 40, "train_batch": 4, "train_rate": 0.01, "seed": 2, "elastic": False}


@pytest.mark.parametrize(
    "more",
    [{}, {"joined": False, "limit": 7}, {"keep_ratio": 1 / 3}, {"method": "none", "keep_ratio": None}, TRAINED],
    ids=["plain", "single", "a third", "uncompressed", "trained"],
)
def test_the_command_asks_the_speech_benchmark_for_this_row(monkeypatch, more):
    row = speech_row() | more
    words = shlex.split(point(row, "", {})["command"])
    assert words[:2] == ["python", "benchmarks/speech.py"]
    monkeypatch.setattr(sys, "argv", words[1:])
    _, args = speech.parse()
    for name in ("model", "languages", "splits", "joined", "limit"):
        assert getattr(args, name) == row[name], name
    if row["method"] != "none":
        assert args.methods == [row["method"]]
        assert args.rates == [25 * row["keep_ratio"]]
    if "steps" in row:
        assert (args.train_steps, args.train_batch, args.train_rate, args.seeds) == (40, 4, [0.01], [2])


def test_the_command_asks_the_time_benchmark_for_this_row(monkeypatch):
    row = time_row(steps=30, seed=1, split="test", positions="contiguous", recipe={"batch": 3, "lora_r": 5})
    words = shlex.split(point(row, "", {})["command"])
    assert words[:2] == ["python", "benchmarks/events.py"]
    monkeypatch.setattr(sys, "argv", words[1:])
    _, args = events.parse()
    assert (args.model, args.methods, args.keep_ratios) == (row["model"], [row["method"]], [row["keep_ratio"]])
    assert (args.steps, args.seeds, args.split, args.positions) == (30, [1], "test", "contiguous")
    assert (args.batch, args.lora_r) == (3, 5)
    aligned = shlex.split(point(time_row(weights="aa"), "", {})["command"])
    assert "--methods" in aligned
    saved = shlex.split(point(time_row(model="runs/ward", weights="aa"), "", {})["command"])
    assert "--methods" not in saved


def test_the_command_of_an_ablation_names_its_question():
    row = speech_row(ablation={"positions": "Original or contiguous?", "front": "Which?"}, cell={"options": {}})
    words = shlex.split(point(row | {"file": "my own.yaml"}, "", {})["command"])
    assert words == ["python", "benchmarks/ablation.py", "my own.yaml", "--questions", "positions"]


@pytest.mark.parametrize("status", ["oom", "failed"])
def test_rows_that_failed_are_kept_without_scores(tmp_path, status):
    found = one(tmp_path, failed_row(status, "it <b>broke</b>"))
    assert (found["status"], found["message"], found["scores"]) == (status, "it <b>broke</b>", {})
    assert "--methods sa-map" in found["command"]


def test_the_last_row_of_a_cell_counts(tmp_path):
    rows = [failed_row(), speech_row("sa-map", 0.125), speech_row(wer=0.5), speech_row(), speech_row(joined=False)]
    points = page_points(write(tmp_path, speech=rows))["points"]
    assert len(points) == 3
    assert [p["source"] for p in points] == [f"speech.jsonl, line {n}" for n in (2, 4, 5)]


def test_seeds_are_rows_of_their_own(tmp_path):
    rows = [speech_row("conv", seed=seed) for seed in (0, 1, 2)]
    assert len(page_points(write(tmp_path, speech=rows))["points"]) == 3


def test_no_number_is_not_a_score_and_valid_json(tmp_path):
    found = one(tmp_path, speech_row(wer=math.nan))
    assert "wer" not in found["scores"].get(ALL, {})
    assert found["row"]["wer"] == "NaN"
    json.dumps(found, allow_nan=False)


def test_long_lists_are_counted(tmp_path):
    assert one(tmp_path, speech_row())["row"]["errors_by_clip"] == "100 values, in the row's file"


def test_times_are_of_the_same_method_at_the_nearest_rate(tmp_path):
    times = [speed_row("ward", 0.25, 170), speed_row("ward", 0.22, 160), speed_row("atome", 0.25, 1)]
    found = one(tmp_path, speech_row(keep_ratio=0.24), throughput=times)
    assert found["times"]["first_token"] == {"kept": 0.25, "ms": 170, "p20": 170, "p80": 170}
    far = one(tmp_path, speech_row(keep_ratio=0.22 / NEAR - 0.01), throughput=times)
    assert far["times"] == {}


def test_times_are_of_one_model_and_clip(tmp_path):
    times = [speed_row("ward", 0.25, 170), speed_row("none", 1.0, 300)]
    times += [speed_row("ward", 0.25, 20) | other for other in ({"model": "3b"}, {"seconds": 30.0}, {"batch": 2})]
    folder = write(tmp_path, throughput=times, speech=[speech_row()])
    data = page_points(folder)
    assert data["points"][0]["times"]["first_token"]["ms"] == 170
    assert "7B" in data["timed"]["first_token"]


def test_times_are_of_every_commit(tmp_path):
    newer = {"commit": "b" * 40, "utc": "2026-02-01T00:00:00+00:00"}
    times = [speed_row("ward", 0.25, 170), speed_row("none", 1.0, 300), speed_row("pooling", 0.25, 160) | newer]
    data = page_points(write(tmp_path, throughput=times, speech=[speech_row()]))
    assert data["points"][0]["times"]["first_token"]["ms"] == 170
    assert data["timed"]["first_token"].endswith("commit aaaaaaa, bbbbbbb")


def test_leaders_are_best_at_most_rates_and_no_baselines():
    def points(*rows):
        return [{"setting": "clips"} | point(row, "", {}) for row in rows]

    rows = [(m, r, w) for r in (0.2, 0.5) for m, w in (("ward", 0.1), ("atome", 0.2), ("random", 0.01))]
    assert leaders(points(*(speech_row(*row) for row in rows)), BEDS[SPEECH]) == ["ward", "atome"]
    assert leaders(points(*(time_row(*row) for row in rows)), BEDS[TIME]) == ["atome", "ward"]


def test_the_set_of_clips_with_most_rows_comes_first(tmp_path):
    rows = [speech_row(joined=False), speech_row(), speech_row("atome")]
    (first, second) = page_points(write(tmp_path, speech=rows))["testbeds"][SPEECH]["settings"]
    assert first == "prompts in en, fr of test, joined to dense clips"
    assert second == "prompts in en, fr of test, one by one"


def test_a_folder_without_rows_has_no_points(tmp_path):
    data = page_points(write(tmp_path, speech=[]))
    assert data["points"] == []
    assert data["testbeds"][SPEECH]["settings"] == []
