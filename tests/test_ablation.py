"""Ablations: the file is checked whole before anything runs, cells are run once, in order, and shared out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml
from test_timeline import data_set, folder, stamps  # noqa: F401  (fixtures)
from tiny import tiny_processor, tiny_thinker

from audiopress.benchmarks import ablation
from audiopress.benchmarks.ablation import run
from audiopress.benchmarks.cells import append, read_rows
from audiopress.benchmarks.grids import SpeechSettings, read_ablation
from audiopress.benchmarks.times import testbed as testbed_module
from audiopress.benchmarks.times.clips import load_clips
from audiopress.benchmarks.times.testbed import TimeSettings, TimeTestbed
from audiopress.models import CompressedOmni, storage

CONFIGS = Path(ablation.__file__).parent / "configs"


def content(data, **grid):
    """A file of two testbeds and one question."""
    grid = {"testbeds": "time", "methods": "ward", "rates": 6.25} | grid
    grid = {name: value for name, value in grid.items() if value is not None}
    return {
        "testbeds": {"dense": {"kind": "speech"}, "time": {"kind": "time", "data": str(data), "num_frames": 4}},
        "questions": {"q": {"text": "Which?", "grids": [grid]}},
    }


@pytest.fixture
def write(tmp_path, data_set):  # noqa: F811
    def write(changes=None, **grid):
        path = tmp_path / "grid.yaml"
        path.write_text(yaml.safe_dump(content(data_set, **grid) if changes is None else changes))
        return path

    return write


def cells(path):
    return [planned.cell for planned in read_ablation(path).cells]


# The file.


def test_every_combination_is_a_cell(write):
    found = cells(write(methods=["ward", "pooling"], rates=[12.5, 6.25], positions=["original", "contiguous"]))
    assert [(c["method"], c["keep_ratio"], c["positions"]) for c in found] == [
        (method, ratio, positions)
        for method in ("ward", "pooling")
        for ratio in (0.5, 0.25)
        for positions in ("original", "contiguous")
    ]
    assert {c["testbed"] for c in found} == {"time"}
    assert {c["steps"] for c in found} == {0}


def test_cells_are_the_same_however_they_are_asked_for(write):
    assert cells(write(rates=6.25)) == cells(write(rates=None, keep_ratios=[0.25]))
    default = cells(write(options={"norm_preserving": [True]}))
    assert default == cells(write())
    assert [c["options"] for c in cells(write(options={"norm_preserving": [True, False]}))] == [
        {},
        {"norm_preserving": False},
    ]
    assert len(cells(write(methods="none", rates=[12.5, 6.25]))) == 1


def test_a_cell_of_two_questions_is_one(write, data_set):  # noqa: F811
    both = content(data_set, methods=["ward", "pooling"])
    both["questions"]["p"] = {"text": "Why?", "grids": [{"testbeds": "time", "methods": "ward", "rates": 6.25}]}
    first, second = read_ablation(write(both)).cells
    assert first.questions == {"q": "Which?", "p": "Why?"}
    assert second.questions == {"q": "Which?"}
    assert [p.cell["method"] for p in read_ablation(write(both)).only(["p"], None).cells] == ["ward"]


def test_seeds_matter_where_something_is_drawn(write):
    drawn = {"methods": ["ward", "random"], "seeds": [3, 4]}
    assert [(c["method"], c["seed"]) for c in cells(write(**drawn))] == [("ward", 0), ("random", 3), ("random", 4)]
    trained = cells(write(**drawn, steps=2))
    assert [(c["method"], c["seed"]) for c in trained] == [("ward", 3), ("random", 3), ("ward", 4), ("random", 4)]
    assert trained[0]["recipe"]["batch"] == 8


def test_speech_trains_methods_with_weights_alone(write):
    found = cells(write(testbeds="dense", methods=["ward", "stacking"], steps=5, seeds=[0, 1]))
    assert [(c["method"], c["steps"], c["seed"]) for c in found] == [
        ("ward", 0, 0),
        ("stacking", 5, 0),
        ("stacking", 5, 1),
    ]
    assert "positions" not in found[0]
    assert found[0]["languages"] == ["en"]


def change(file, path, value):
    """Sets, or with None removes, an entry of a nested mapping."""
    *way, last = path
    for name in way:
        file = file[name]
    if value is None:
        del file[last]
    else:
        file[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("grids",), {}, "has an unknown key 'grids'; allowed are questions, testbeds"),
        (("questions",), None, "lacks questions; it has testbeds"),
        (("questions",), {}, "questions must name at least one, got {}"),
        (("questions", "q", "txt"), "?", "question q has an unknown key 'txt'; allowed are grids, text"),
        (("questions", "q", "grids"), [], "question q: grids must be a list of grids, got []"),
        (("questions", "q", "grids", 0, "method"), "ward", "grid 1 has an unknown key 'method'; allowed are"),
        (("questions", "q", "grids", 0, "methods"), None, "grid 1 lacks methods; it has rates, testbeds"),
        (("questions", "q", "grids", 0, "methods"), [], "methods must name at least one, got an empty list"),
        (("questions", "q", "grids", 0, "methods"), "wards", "grid 1: wards at keep_ratio 0.25: "),
        (("questions", "q", "grids", 0, "methods"), "stacking", "stacking has weights to train: give steps above 0"),
        (("questions", "q", "grids", 0, "methods"), "transformers", "transformers is of speech testbeds"),
        (("questions", "q", "grids", 0, "options"), ["k"], "options must name options, each with its values"),
        (("questions", "q", "grids", 0, "options"), {"k": 4}, "ward at keep_ratio 0.25: ward has no option k"),
        (("questions", "q", "grids", 0, "keep_ratios"), 0.5, "keep_ratios and rates exclude each other, got both"),
        (("questions", "q", "grids", 0, "rates"), 50, "ward at keep_ratio 2: keep_ratio is tokens out / tokens in"),
        (("questions", "q", "grids", 0, "rates"), "many", "rates must be numbers, got 'many'"),
        (("questions", "q", "grids", 0), {"testbeds": "time", "methods": "ward", "keep_ratios": "half"}, "got 'half'"),
        (("questions", "q", "grids", 0, "methods"), 3, "methods must be names, got 3"),
        (("questions", "q", "grids", 0, "seeds"), -1, "seeds must be whole numbers from 0 on, got -1"),
        (("questions", "q", "grids", 0, "steps"), 1.5, "steps must be whole numbers from 0 on, got 1.5"),
        (("questions", "q", "grids", 0, "positions"), "none", "positions must be one of 'original', 'contiguous'"),
        (("questions", "q", "grids", 0, "testbeds"), "tim", "testbeds must be one of 'dense', 'time', got 'tim'"),
        (("testbeds", "time", "kind"), "film", "testbed time must have a kind, speech or time"),
        (("testbeds", "time", "clips"), 4, "testbed time has an unknown key 'clips'; allowed are base, data, limit"),
        (("testbeds", "time", "limit"), 0, "testbed time: limit must be a whole number >= 1, got 0"),
        (("testbeds", "time", "data"), "nowhere", "nowhere/options.json is missing; python benchmarks/timeline.py"),
        (("testbeds", "time", "recipe"), {"rate": 1}, "recipe has an unknown key 'rate'; allowed are batch"),
        (("testbeds", "time", "recipe"), {"batch": 0}, "recipe: batch must be a whole number >= 1, got 0"),
        (("testbeds", "time", "recipe"), {"learning_rate": "fast"}, "recipe: learning_rate must be in (0, inf), got"),
        (("testbeds", "dense", "languages"), "xx", "languages must be one of 'en'"),
    ],
)
def test_mistakes_are_told_in_one_line(write, data_set, monkeypatch, capsys, path, value, message):  # noqa: F811
    file = content(data_set)
    change(file, path, value)
    monkeypatch.setattr(sys, "argv", ["ablation.py", str(write(file))])
    with pytest.raises(SystemExit) as stopped:
        ablation.main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_methods_that_a_testbed_cannot_be_given(write):
    with pytest.raises(ValueError, match=r"omnizip reads video, which a testbed of speech has not"):
        read_ablation(write(testbeds="dense", methods="omnizip", rates=None))
    with pytest.raises(ValueError, match=r"speechprune reads first_layer, question, which a testbed of speech"):
        read_ablation(write(testbeds="dense", methods="speechprune"))
    with pytest.raises(ValueError, match=r"positions are of an LLM; the testbed dense has none"):
        read_ablation(write(testbeds="dense", positions="contiguous"))


def test_training_needs_clips_to_train_on(write, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "options.json").write_text('{"seconds": [30, 60]}')
    (bare / "test-annotations.json").write_text("{}")
    with pytest.raises(ValueError, match=r"train.json is missing: there is nothing to train on"):
        read_ablation(write(content(bare, steps=3)))
    assert len(read_ablation(write(content(bare))).cells) == 1


def test_a_saved_variant_has_no_grid(write, data_set, tmp_path):  # noqa: F811
    file = content(data_set)
    file["testbeds"]["time"]["model"] = str(tmp_path)
    (tmp_path / storage.MANIFEST).write_text("{}")
    with pytest.raises(ValueError, match=r"is a saved variant of one method; events.py measures it"):
        read_ablation(write(file))


@pytest.mark.parametrize("name", ["ablation.yaml", "ablation-small.yaml"])
def test_the_files_that_come_along_are_right(name, data_set, tmp_path):  # noqa: F811
    file = yaml.safe_load((CONFIGS / name).read_text())
    file["testbeds"]["time"]["data"] = str(data_set)
    (tmp_path / name).write_text(yaml.safe_dump(file, sort_keys=False))
    found = read_ablation(tmp_path / name)
    assert {planned.testbed for planned in found.cells} == set(file["testbeds"])
    named = {question for planned in found.cells for question in planned.questions}
    assert named == set(file["questions"])


# The run.


@pytest.fixture
def plan(write):
    return read_ablation(write(methods=["ward", "pooling", "atome"], rates=[12.5, 6.25])).cells


def count(calls, fails=()):
    """A testbed that notes its cells."""

    def measure(cell):
        calls.append((cell["method"], cell["keep_ratio"]))
        if cell["method"] in fails:
            raise ValueError("no\nsuch thing")
        return {"miou": 0.5}

    return lambda name: measure


def test_a_finished_cell_is_never_run_again(plan, tmp_path):
    calls = []
    rows = run(plan[:2], count(calls), {"commit": "a"}, tmp_path / "rows.jsonl")
    assert [row["miou"] for row in rows] == [0.5, 0.5]
    run(plan, count(calls), {"commit": "b"}, tmp_path / "rows.jsonl")
    assert calls == [(p.cell["method"], p.cell["keep_ratio"]) for p in plan]
    assert [row["commit"] for row in read_rows(tmp_path / "rows.jsonl")] == ["a", "a", "b", "b", "b", "b"]
    run(plan, lambda name: pytest.fail("opened for nothing"), {}, tmp_path / "rows.jsonl")


def test_a_failed_cell_is_a_row_and_is_tried_again_on_request_alone(plan, tmp_path):
    calls = []
    path = tmp_path / "rows.jsonl"
    rows = run(plan, count(calls, fails=["pooling"]), {}, path)
    assert [row["status"] for row in rows] == ["ok", "ok", "failed", "failed", "ok", "ok"]
    assert rows[2]["message"] == "ValueError: no"
    run(plan, count(calls), {}, path)
    assert len(calls) == 6
    assert {row["status"] for row in run(plan, count(calls), {}, path, again=True)} == {"ok"}
    assert calls[6:] == [("pooling", 0.5), ("pooling", 0.25)]


def test_shards_share_the_cells(plan, tmp_path):
    calls = []
    for shard in ((1, 2), (2, 2)):
        before = len(calls)
        run(plan, count(calls), {}, tmp_path / "rows.jsonl", shard)
        assert len(calls) - before == 3
    assert sorted(calls) == sorted((p.cell["method"], p.cell["keep_ratio"]) for p in plan)


def test_a_question_that_is_added_takes_what_is_measured(write, data_set, tmp_path):  # noqa: F811
    path, calls = tmp_path / "rows.jsonl", []
    run(read_ablation(write()).cells, count(calls), {}, path)
    file = content(data_set)
    file["questions"]["p"] = {"text": "Why?", "grids": file["questions"]["q"]["grids"]}
    (row,) = run(read_ablation(write(file)).cells, count(calls), {}, path)
    assert (row["ablation"], row["miou"], len(calls)) == ({"q": "Which?", "p": "Why?"}, 0.5, 1)
    assert read_rows(path)[-1] == row


def test_a_row_is_written_whole(tmp_path):
    append({"a": "x" * 100_000}, tmp_path / "rows")
    append({"b": 2}, tmp_path / "rows")
    assert [list(row) for row in read_rows(tmp_path / "rows")] == [["a"], ["b"]]


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/"])
def test_shards_are_checked(shard, write, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ablation.py", str(write()), "--shard", shard])
    with pytest.raises(SystemExit):
        ablation.main()
    assert f"--shard must be i/n with 1 <= i <= n, got '{shard}'" in capsys.readouterr().err


def test_the_command(write, data_set, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(testbed_module, "NEW_TOKENS", {"grounding": 3, "seg_captioning": 3, "counting": 2})
    processor = tiny_processor()
    model = CompressedOmni(tiny_thinker(processor)).eval()
    testbed = TimeTestbed(model, processor, load_clips(data_set, "test"), num_frames=4, room=8_000)
    monkeypatch.setattr(TimeSettings, "open", lambda *_: testbed)
    rows = tmp_path / "rows.jsonl"
    options = ["--output", str(rows), "--device", "cpu", "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", ["ablation.py", str(write(methods=["none", "ward"])), *options, "--list"])
    ablation.main()
    assert "q: 0 of 2 cells; Which?" in capsys.readouterr().out
    assert not rows.exists()
    monkeypatch.setattr(sys, "argv", sys.argv[:-1])
    ablation.main()
    assert "q: 2 of 2 cells; Which?" in capsys.readouterr().out
    assert [row["method"] for row in read_rows(rows)] == ["none", "ward"]
    assert read_rows(rows)[1]["tokens_per_second"] == pytest.approx(6.25, rel=0.02)
    assert {row["file"] for row in read_rows(rows)} == {sys.argv[1]}


def test_speech_is_asked_with_its_settings(monkeypatch):
    asked = []
    monkeypatch.setattr(ablation, "open_speech", lambda settings, device: asked.append(settings) or "opened")
    settings = SpeechSettings(joined=False, limit=3)
    assert ablation.open_testbed(settings, torch.device("cpu"), 0) == "opened"
    assert asked == [settings]
