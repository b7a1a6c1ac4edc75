"""The benchmark of compressing alone, end to end on a short clip."""

import json
import sys

import pytest

from audiopress.benchmarks import compressor_speed


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["compressor_speed.py", *map(str, arguments)])
    compressor_speed.main()


def test_every_method_leaves_a_row(monkeypatch, tmp_path, capsys):
    methods = ("pooling", "ward", "dart:text", "omnizip", "none", "atome:encoder")
    common = ("--seconds", 2, "--repeats", 1, "--device", "cpu", "--commit", "abc", "--output", tmp_path / "rows.jsonl")
    run(monkeypatch, *common, "--keep-ratio", 0.5, "--methods", *methods)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    status = {row["method"]: row["status"] for row in rows}
    assert status == dict.fromkeys(methods[:4], "ok") | {"none": "failed"}  # the last acts inside the tower
    assert {row["commit"] for row in rows} == {"abc"}
    assert {row["tokens_out"] for row in rows if row["status"] == "ok"} == {25}
    table = capsys.readouterr().out
    assert "| `ward` | 25 |" in table
    assert "| `none` | failed: none keeps every token" in table


def test_an_unknown_method_is_one_line(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="error: unknown method waard; there are affinity,"):
        run(monkeypatch, "--methods", "waard", "--output", tmp_path / "rows.jsonl")
