"""The report of speed on fabricated rows: which rows are used, what the tables say, that every picture is one."""

import json
import sys
import warnings

import pytest
from accuracy_cases import speech_row, write
from PIL import Image

from audiopress.benchmarks import report
from audiopress.benchmarks.speed import plots, tables
from audiopress.benchmarks.speed.report import caption, select, speed_report

WHERE = {"utc": "2026-11-24T10:00:00", "commit": "abcdef123", "dirty": False, "device": "NVIDIA H200", "driver": "580"}
WHERE |= {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0"}
SETTING = ("model", "method", "keep_ratio", "seconds", "batch", "video", "dtype")


@pytest.fixture(autouse=True)
def _strict():
    """Fails on whatever matplotlib warns about."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def ms(median, n=5):
    return {"median": median, "p20": median, "p80": median, "n": n, "warm_up": median}


def whole(method, keep_ratio=None, fold=1.0, seconds=256.89, video=True, **changes):
    """A row of throughput whose times are those of transformers divided by `fold`."""
    audio, kept = int(25 * seconds), 1.0 if keep_ratio is None else keep_ratio
    row = {"model": "7b", "method": method, "keep_ratio": keep_ratio, "seconds": seconds, "batch": 1, "video": video}
    row |= {"dtype": "bfloat16", "compile": method != "transformers", "status": "ok"}
    row |= {"audio_tower": ms(139 / fold), "prefill": ms(238 / fold), "ms_per_token": 26 / fold}
    row |= {"vision_tower": ms(218 / fold)} if video else {}
    row |= {"first_token": ms(620 / fold), "answer": ms(960 / fold)}
    row |= {"compressor": ms(3.0)} if keep_ratio and not method.endswith(":encoder") else {}
    row |= {"tokens": {"audio": [audio, round(audio * kept)], "video": [2275, 2275] if video else [0, 0]}}
    row |= {"kept": {"audio": kept} | ({"video": 1.0} if video else {}), "sequence": round(audio * kept) + 2300}
    row |= {"kv_bytes": 5e8 * kept, "peak_allocated": 2.2e10 / fold, "audio_tower_bytes": 1e6 * seconds}
    return WHERE | row | changes


def failed(method, status="oom", **changes):
    setting = {
        name: whole(method)[name] for name in ("model", "method", "seconds", "batch", "video", "dtype", "compile")
    }
    return WHERE | setting | {"keep_ratio": 0.25, "status": status, "message": "OutOfMemoryError: CUDA"} | changes


def trained(method, samples=1.0, **changes):
    row = {
        name: whole(method)[name] for name in ("model", "method", "keep_ratio", "seconds", "batch", "video", "dtype")
    }
    row |= {"status": "ok", "step": ms(1e3 / samples), "samples_per_second": samples, "peak_allocated": 5e10 / samples}
    return WHERE | row | {name: whole(method)[name] for name in ("tokens", "kept")} | changes


def kernel(op, backend, time, gb=None, direction="forward", **changes):
    row = {"op": op, "shape": "1 x 6,422 x 3,584", "dtype": "bfloat16", "backend": backend, "pass": direction}
    return WHERE | row | {"status": "ok", "ms": ms(time, 100), "gb_per_s": gb} | changes


THROUGHPUT = [
    whole("ward", 0.25, 4.0, joules=100.0),
    whole("transformers"),
    whole("ward", 0.5, 3.0),
    whole("none", None, 2.0),
    whole("none", None, 1.5, compile=False),
    whole("random", 0.25, 4.0),
    failed("echoing"),
    whole("atome:encoder", 0.25, 4.0),
    whole("none", None, 2.0, seconds=10.0),
]
LONG = [
    whole(name, ratio, fold, seconds=seconds, video=False)
    for name, ratio, fold in (("none", None, 1.0), ("ward", 0.25, 4.0))
    for seconds in (3600.0, 600.0)
]
TRAINING = [trained("none", 2.0), trained("transformers"), failed("ward")]
KERNELS = [
    kernel("adjacent_cosine", "eager", 2.0),
    kernel("adjacent_cosine", "compile", 1.0),
    kernel("adjacent_cosine", "triton", 0.2, 2000.0),
    kernel("adjacent_cosine", "copy", 0.15, 2666.0),
    kernel("adjacent_cosine", "triton", 0.5, 2000.0, "forward+backward"),
    kernel("top_k", "eager", 3.0),
    kernel("top_k", "triton", 0.1),
    kernel("top_k", "compile", 0.1) | {"status": "failed", "ms": None, "message": "no"},
]


@pytest.fixture
def results(tmp_path):
    """A folder with rows of every benchmark."""
    folder = tmp_path / "results"
    folder.mkdir()
    for name, rows in (("throughput", THROUGHPUT), ("long", LONG), ("training", TRAINING), ("kernels", KERNELS)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def cells(table):
    """The cells of a table, by the first of each line."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "|" in line]
    head, _, *rows = lines
    assert {len(row) for row in rows} == {len(head)}
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_end_to_end_against_transformers():
    first, second = tables.end_to_end(THROUGHPUT).split("\n\n")[1::2]
    rows = cells(first)
    names = [
        "transformers, as it comes",
        "ours, uncompressed",
        "ours, uncompressed, not compiled",
        "`ward`",
        "`random`",
    ]
    assert list(rows) == [*names, "`echoing`", "`atome:encoder`"]
    base, ward = rows[names[0]], rows["`ward`"]
    assert (base["first token"], base["14 tokens"]) == ("620", "960")
    assert (ward["first token"], ward["14 tokens"], ward["J"]) == ("155 (4.0×)", "240 (4.0×)", "100")
    assert (ward["audio"], ward["video"], ward["compressor"]) == ("1,606 (25 %)", "2,275 (100 %)", "3.0")
    assert (base["GB at most"], base["compressor"], rows["`atome:encoder`"]["compressor"]) == ("22.0", "", "")
    assert rows["`echoing`"]["audio"] == "out of memory"
    assert cells(second)["ours, uncompressed"]["first token"] == "310"  # no transformers beside it
    assert "10 s of sound and 50 frames" in tables.end_to_end(THROUGHPUT)


def test_training_against_transformers():
    rows = cells(tables.training(TRAINING))
    assert rows["transformers, as it comes"]["samples/s"] == "1.00"
    assert rows["ours, uncompressed"]["samples/s"] == "2.00 (2.0×)"
    assert rows["ours, uncompressed"]["GB at most"] == "25.0 (50 %)"
    assert rows["`ward`"]["audio"] == "out of memory"


def test_kernels_against_torch_and_a_copy():
    rows = cells(tables.kernels(KERNELS[:4] + KERNELS[5:]))
    cosine, top_k = rows["adjacent_cosine"], rows["top_k"]
    assert [cosine[c] for c in ("× eager", "× compile", "speed against copy or flash")] == ["10.0", "5.0", "75 %"]
    assert [top_k[c] for c in ("× eager", "× compile", "compile, ms")] == ["30.0", "", ""]


def test_long_sound_by_length():
    words, _, _, _, *lines = tables.long(LONG).splitlines()
    assert words == "Qwen2.5-Omni-7B's shapes (random weights), sound of several lengths:"
    assert [line.split("|")[2].strip() for line in lines] == ["10", "60"] * 2


def test_only_the_newest_commit_of_a_device():
    later, last = {"utc": "2026-11-25"}, {"utc": "2026-11-26"}
    rows = [
        whole("none", commit="new1", **later),
        whole("ward", 0.25, commit="old1"),
        whole("none", None, 2.0, commit="new1", **last),
        whole("none", commit="cpu1", device="x86_64"),
        whole("ward", commit=None, utc="2027"),
    ]
    assert select(rows, "throughput") == [rows[2]]
    assert select(rows, "throughput", commit="old") == [rows[1]]
    assert select(rows, "throughput", device="x86") == [rows[3]]
    assert select(rows, "throughput", commit="any") == [rows[1], rows[2]]
    assert select(rows, "throughput", device="B200") == []
    assert select([], "kernels") == []


def test_a_caption_names_what_was_measured_where():
    machine = "NVIDIA H200, driver 580, torch 2.11.0, triton 3.6.0, transformers 5.17.0"
    assert caption(THROUGHPUT) == f"{machine}, commit abcdef1, medians of 5 runs"
    dirty = [kernel("top_k", "triton", 1.0, dirty=True, driver=None), whole("none")]
    assert caption(dirty).endswith("commit abcdef1 with changes, abcdef1, medians of 5 to 100 runs")


def test_a_whole_report(results, tmp_path):
    text = speed_report(results, tmp_path / "new" / "pictures")
    assert text.count("### ") == 4
    pictures = sorted((tmp_path / "new" / "pictures").iterdir())
    assert [p.stem for p in pictures] == ["speed_kept", "speed_kernels", "speed_long", "speed_parts"]
    for path in pictures:
        assert f"]({path.as_posix()})" in text
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 20
    with pytest.raises(ValueError, match=r"no rows .* of device B200"):
        speed_report(results, tmp_path, device="B200")


def test_a_part_of_the_rows_will_do(results, tmp_path):
    without = ("peak_allocated", "audio_tower_bytes", "vision_tower")
    rows = [{k: v for k, v in row.items() if k not in without} for row in LONG if row["method"] == "ward"]
    for plot in (plots.plot_kept, plots.plot_parts, plots.plot_long):
        plot(rows, tmp_path / "picture.png", "a CPU")
    plots.plot_kernels(KERNELS[5:], tmp_path / "picture.png", "")
    for name in ("throughput", "long", "training"):
        (results / f"{name}.jsonl").unlink()
    assert speed_report(results, tmp_path).count("### ") == 1


def test_the_parts_of_an_answer():
    parts = plots.time_parts(whole("ward", 0.25))
    assert [round(x) for x, _ in parts.values()] == [139, 218, 3, 238, 22, 340]
    assert sum(x for x, _ in parts.values()) == pytest.approx(960)
    assert min(x for x, _ in plots.time_parts(whole("ward", 0.25, prefill=ms(900.0))).values()) == 0


def test_the_command_line(results, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", "speed", "--results", str(results)])
    report.main()
    assert "### Kernels" in capsys.readouterr().out
    assert (tmp_path / "runs" / "pictures" / "speed_parts.png").is_file()
    for wrong in (["speed", "--results", str(results), "--commit", "fff"], ["no-such-run"]):
        monkeypatch.setattr(sys, "argv", ["report", *wrong])
        with pytest.raises(SystemExit) as stopped:
            report.main()
        assert stopped.value.code == 2
        assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("what", "page", "link"),
    [
        ("speed", "README.md", "benchmarks/pictures/speed_parts.png"),
        ("accuracy", "benchmarks/RESULTS.md", "pictures/accuracy_words.png"),
    ],
)
def test_a_page_refers_to_its_pictures_from_where_it_lies(what, page, link, results, tmp_path, monkeypatch):
    write([speech_row("ward", 0.25)], results)
    path = tmp_path / "repository" / page
    path.parent.mkdir(parents=True)
    path.write_text(f"<!-- {what} -->\n<!-- /{what} -->\n")
    monkeypatch.setattr(report, "__file__", str(tmp_path / "repository/benchmarks/report.py"))
    monkeypatch.setattr(sys, "argv", ["report", what, "--readme", "--results", str(results)])
    report.main()
    assert f"]({link})" in path.read_text()
    assert (path.parent / link).is_file()
    assert str(tmp_path) not in path.read_text()


def test_text_goes_between_marks(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- speed -->\nold\n<!-- /speed -->\nb\n")
    for text in ("new", "newer\n"):
        report.replace_between(page, "speed", text)
    assert page.read_text() == "a\n<!-- speed -->\n\nnewer\n\n<!-- /speed -->\nb\n"
    with pytest.raises(ValueError, match="lacks the marks <!-- other -->"):
        report.replace_between(page, "other", "text")


def test_compressing_alone_is_sorted_by_time():
    rows = [
        WHERE | {"method": name, "status": "ok", "ms": ms(time), "tokens_in": 400, "tokens_out": 100}
        for name, time in (("pooling", 0.7), ("echoing", 26.0))
    ]
    failure = WHERE | {"method": "none", "status": "failed", "message": "no", "tokens_in": 400}
    assert tables.compressors([*rows, failure]).splitlines()[2:] == [
        "| `echoing` | 100 (25 %) | 26.0 |",
        "| `pooling` | 100 (25 %) | 0.7 |",
    ]
