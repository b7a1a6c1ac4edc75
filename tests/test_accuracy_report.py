"""The report of accuracy, from made-up rows: seeds are one point, fronts are right, failures and questions are told."""

from __future__ import annotations

import statistics
import sys

import pytest
from accuracy_cases import DATA, WHERE, all_rows, asked, speech_row, time_row, write
from matplotlib.image import imread

from audiopress.benchmarks import report
from audiopress.benchmarks.accuracy.plots import at_one_rate
from audiopress.benchmarks.accuracy.report import accuracy_report
from audiopress.benchmarks.accuracy.rows import caption, front, fronts, read_points
from audiopress.benchmarks.accuracy.tables import question, times, words


def points_of(rows, tmp_path):
    (points,) = read_points(write(rows, tmp_path)).values()
    return points


def cells_of(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_seeds_are_one_point_with_their_spread(tmp_path):
    rows = [time_row("ward", 0.25, 1.0, steps=100, seed=seed) for seed in (0, 1, 2)]
    (point,) = points_of(rows, tmp_path)
    score = point.score("miou")
    assert score.value == pytest.approx(statistics.mean(row["miou"] for row in rows))
    assert score.spread == pytest.approx(statistics.stdev(row["miou"] for row in rows))
    assert score.interval[0] < score.value < score.interval[1]
    assert len(point.rows) == 3


def test_a_point_of_one_seed_has_its_rows_own_interval(tmp_path):
    row = speech_row("ward", 0.25) | {"errors_by_clip": [1, 2, 3, 0, 0, 9], "wer": 15 / 360}
    (point,) = points_of([row], tmp_path)
    score = point.score("wer")
    assert (score.value, score.spread) == (15 / 360, None)
    assert 0 < score.interval[0] < 15 / 360 < score.interval[1] < 9 / 60
    assert point.score("miou") is None


def test_the_last_row_of_a_cell_counts_and_keeps_the_questions(tmp_path):
    first = asked(time_row("ward", 0.25), q="Why?")
    later = time_row("ward", 0.25, 0.1) | {"utc": "2026-02-01T00:00:00+00:00", "miou": 0.9}
    (point,) = points_of([later, first], tmp_path)
    assert point.score("miou").value == 0.9
    assert point.questions == {"q": "Why?"}


def test_cells_of_other_settings_are_other_points(tmp_path):
    rows = [time_row("ward", 0.25), time_row("ward", 0.25, positions="contiguous")]
    rows += [time_row("ward", 0.25, options={"norm_preserving": False})]
    labels = [point.label for point in points_of(rows, tmp_path)]
    assert labels == ["ward", "ward, contiguous", "ward, norm_preserving False"]


def test_sets_of_clips_are_told_apart(tmp_path):
    rows = [speech_row("ward", 0.25), speech_row("ward", 0.25, joined=False), time_row("ward", 0.25)]
    rows += [time_row("ward", 0.25, steps=50), time_row("ward", 0.25, limit=3)]
    assert sorted(read_points(write(rows, tmp_path))) == [
        "clips of 30 to 60 s of test, 50 frames each",
        "clips of 30 to 60 s of test, 50 frames each, at most 3 clips",
        "clips of 30 to 60 s of test, 50 frames each, the LLM trained for 50 steps on the tokens of each method",
        "prompts in en of test, joined to dense clips",
        "prompts in en of test, one by one",
    ]


def test_clips_that_words_do_not_tell_apart_are_two_sets(tmp_path):
    rows = [time_row("ward", 0.25), time_row("ward", 0.25) | {"data": DATA | {"seed": 1}}]
    rows += [time_row("none", None), time_row("ward", 0.25, steps=9, recipe={"batch": 8})]
    rows += [time_row("ward", 0.25, steps=9, recipe={"batch": 4})]
    sets = read_points(write(rows, tmp_path))
    assert [
        (words.removeprefix("clips of 30 to 60 s of test, 50 frames each"), len(own)) for words, own in sets.items()
    ] == [
        ("", 2),
        (" (set 2)", 1),
        (", the LLM trained for 9 steps on the tokens of each method", 1),
        (", the LLM trained for 9 steps on the tokens of each method (set 2)", 1),
    ]


def test_labels_tell_how_methods_were_trained_where_that_differs(tmp_path):
    rows = [speech_row("stacking", 0.25, steps=9, train_rate=rate, train_batch=4) for rate in (1e-3, 1e-4)]
    rows.append(speech_row("ward", 0.25))
    assert [point.label for point in points_of(rows, tmp_path)] == [
        "stacking, 9 steps, train_rate 0.001",
        "stacking, 9 steps, train_rate 0.0001",
        "ward",
    ]


def test_seeds_with_other_chosen_rates_are_one_point(tmp_path):
    common = {"steps": 9, "train_rates": [1e-3, 1e-4]}
    rows = [speech_row("stacking", 0.25, seed=seed, train_rate=10.0 ** -(3 + seed), **common) for seed in (0, 1)]
    (point,) = points_of(rows, tmp_path)
    assert (point.label, len(point.rows)) == ("stacking, 9 steps", 2)


def test_a_failed_seed_leaves_the_others(tmp_path):
    bad = {"status": "failed", "message": "ValueError: no"}
    rows = [time_row("ward", 0.25, steps=9, seed=0) | bad, time_row("ward", 0.25, steps=9, seed=1)]
    (point,) = points_of(rows, tmp_path)
    assert point.ok
    assert len(point.rows) == 1
    (point,) = points_of(rows[:1], tmp_path)
    assert not point.ok


def test_the_front_holds_what_nothing_beats(tmp_path):
    rates = {"a": (0.1, 0.5), "b": (0.2, 0.3), "c": (0.3, 0.4), "d": (0.5, 0.1), "e": (0.2, 0.35)}
    rows = [
        speech_row("ward", ratio) | {"wer": error, "options": {}, "cell": {"options": {"name": name}}}
        for name, (ratio, error) in rates.items()
    ]
    points = points_of(rows, tmp_path)
    assert [p.label.rpartition(" ")[2] for p in front(points, "wer")] == ["a", "b", "d"]
    scored = [
        time_row(m, r) | {"miou": s} for m, r, s in (("ward", 0.5, 0.6), ("dart", 0.25, 0.5), ("none", None, 0.6))
    ]
    assert [p.label for p in front(points_of(scored, tmp_path), "miou")] == ["dart", "ward"]


def test_the_front_is_of_means_over_seeds(tmp_path):
    lucky = [speech_row("stacking", 0.25, steps=9, seed=seed) | {"wer": wer} for seed, wer in enumerate((0.1, 0.5))]
    points = points_of([*lucky, speech_row("ward", 0.25) | {"wer": 0.2}], tmp_path)
    assert [point.label for point in front(points, "wer")] == ["ward"]


def test_equal_points_are_both_on_the_front(tmp_path):
    points = points_of([speech_row(method, 0.25) | {"wer": 0.2} for method in ("ward", "atome")], tmp_path)
    assert [point.label for point in front(points, "wer")] == ["ward", "atome"]


def test_methods_without_training_have_a_front_of_their_own(tmp_path):
    rows = [speech_row("ward", 0.25) | {"wer": 0.2}, speech_row("pooling", 0.25) | {"wer": 0.3}]
    points = points_of(rows, tmp_path)
    assert [[point.label for point in one] for one in fronts(points, "wer")] == [["ward"]]
    points = points_of([*rows, speech_row("stacking", 0.25, trained=True) | {"wer": 0.1}], tmp_path)
    assert [[point.label for point in one] for one in fronts(points, "wer")] == [["stacking"], ["ward"]]


def test_methods_with_an_advantage_are_marked(tmp_path):
    rows = [time_row("cdpruner", 0.5, query_aware=True), time_row("conv", 0.5, trained=True), time_row("ward", 0.5)]
    for table in (times, question):
        _, _, *lines = cells_of(table(points_of(rows, tmp_path)))
        assert [line[0] for line in lines] == [
            "`cdpruner` 50 %, sees the question",
            "`conv` 50 %, trained",
            "`ward` 50 %",
        ]


def test_the_table_of_words(tmp_path):
    rows = [speech_row("none", None), speech_row("ward", 0.5), speech_row("ward", 0.125), speech_row("conv:osum", None)]
    rows[-1]["tokens_per_second"] = 12.5
    rows += [speech_row("dart", 0.5) | {"status": "oom", "message": "m"}]
    head, _, *lines = cells_of(words(points_of(rows, tmp_path)))
    assert head == ["WER, % [95 %]", "all tokens", "12.5/s", "3.125/s", "rate of its own"]
    assert [line[0] for line in lines] == ["`uncompressed`", "`ward`", "`conv:osum`", "`dart`"]
    assert lines[0][2:] == ["", "", ""]
    assert lines[1][1] == ""
    assert lines[1][3].startswith("**")
    assert lines[2][4].endswith(" at 12.5/s")
    assert lines[3][2] == "oom"
    (line,) = cells_of(words(points_of([rows[-1]], tmp_path)))[2:]
    assert line == ["`dart`", "", "oom"]


def test_the_table_of_times(tmp_path):
    rows = [time_row("none", None), time_row("omnizip", 0.1, stage="joint")]
    rows += [time_row("dart", 0.5) | {"status": "failed", "message": "ValueError: no"}]
    _, _, *lines = cells_of(times(points_of(rows, tmp_path)))
    assert lines[0][:3] == ["`uncompressed`", "100.0 %, 100.0 %", "65"]
    assert lines[1][:3] == ["`omnizip` 10 %", "10.0 %, 10.0 %", "6.5"]
    assert lines[0][6:] == [
        f"{100 * rows[0][n]:.1f}" for n in ("caption_accuracy", "caption_things", "counting_accuracy")
    ]
    assert lines[2] == ["`dart` 50 %", "", "", "failed: ValueError: no", "", "", "", "", ""]


def test_the_table_of_a_question_tells_density_and_senses(tmp_path):
    row = time_row("atome", 0.25)
    (line,) = cells_of(question(points_of([row], tmp_path)))[2:]
    assert line[:4] == ["`atome` 25 %", "6.25", "7.5, 4.38", "46.2"]
    by_needs = row["by_needs"]
    assert line[5] == ", ".join(f"{100 * by_needs[needs]['miou']:.1f}" for needs in ("audio", "video", "both"))


def test_bars_are_of_one_rate(tmp_path):
    rows = [time_row("none", None), time_row("ward", 0.5), time_row("ward", 0.25), time_row("dart", 0.25)]
    rows += [time_row("omnizip", ratio, stage="joint") for ratio in (0.05, 0.2)]
    shown = [(p.label, p.first["keep_ratio"]) for p in at_one_rate(points_of(rows, tmp_path))]
    assert shown == [("uncompressed", None), ("ward", 0.25), ("dart", 0.25), ("omnizip", 0.2)]


def test_captions_tell_where_rows_are_from(tmp_path):
    other = {"device": "a GPU", "driver": "580", "torch": "2.15.0", "commit": "b" * 40, "dirty": True}
    told = caption(points_of([speech_row("ward", 0.5), speech_row("ward", 0.25) | other], tmp_path))
    machines, versions = "a machine CPU and a GPU", "torch 2.11.0 and 2.15.0, transformers 5.17.0"
    assert told == f"{machines}, {versions}, commit aaaaaaa, bbbbbbb with changes"


def test_the_whole_report(tmp_path):
    text = accuracy_report(write(all_rows(), tmp_path / "rows"), tmp_path / "pictures")
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == [
        "### Words: prompts in en of test, joined to dense clips",
        "### Times and things: clips of 30 to 60 s of test, 50 frames each",
        "### Times and things: clips of 30 to 60 s of test, 50 frames each, the LLM trained for 100 steps on the "
        "tokens of each method",
        "### Ablations",
        "#### Parts?",
        "#### Which positions?",
    ]
    pictures = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert pictures == [
        "accuracy_kinds.png",
        "accuracy_kinds_2.png",
        "accuracy_times.png",
        "accuracy_times_2.png",
        "accuracy_words.png",
    ]
    for name in pictures:
        assert f"pictures/{name})" in text
        assert imread(tmp_path / "pictures" / name).std() > 0.05
    assert "`ward, norm_preserving False` 20 %" in text


def test_rows_of_other_benchmarks_are_not_of_accuracy(tmp_path):
    rows = [{**WHERE, "utc": "2026", "method": "ward", "model": "7b", "status": "ok"}]
    with pytest.raises(ValueError, match=r"no rows of accuracy in .*; benchmarks/speech.py, events.py"):
        accuracy_report(write(rows, tmp_path), tmp_path)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write([speech_row("ward", 0.25)], tmp_path / "rows")
    monkeypatch.setattr(sys, "argv", ["report.py", "accuracy", "--results", str(tmp_path / "rows")])
    report.main()
    assert "### Words" in capsys.readouterr().out
    assert (tmp_path / "runs/pictures/accuracy_words.png").is_file()
    monkeypatch.setattr(sys, "argv", ["report.py", "accuracy", "--results", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as stopped:
        report.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: no rows of accuracy")
