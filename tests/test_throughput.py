"""The benchmarks of a whole model on a small one: every cell leaves a row, once. No time is asserted."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import make_thinker

from audiopress.benchmarks import random_model, throughput, training
from audiopress.benchmarks.cells import append, read_rows, run_cells
from audiopress.benchmarks.environment import energy, joules, memory
from audiopress.benchmarks.random_model import ANSWER, LLM, make_batch, random_thinker
from audiopress.models import CompressedOmni
from audiopress.models.packed import is_packed
from audiopress.models.parts import vision_tower

WHERE = {"utc": "2026-01-01", "commit": "abc", "dirty": False, "device": "a CPU"}
SMALL = ["--model", "tiny", "--seconds", "2", "--repeats", "1", "--device", "cpu", "--commit", "abc"]
TIMED = {"audio_tower", "vision_tower", "encode", "compressor", "prefill", "first_token", "first_token_fresh", "answer"}


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a benchmark's command line on a small thinker; gives its rows and what it prints."""

    def main(benchmark, *options):
        monkeypatch.setattr(benchmark, "open_thinker", lambda *_: make_thinker())
        monkeypatch.setattr(random_model, "GRID", (3, 4, 8))  # 8 tokens per pair of frames
        output = tmp_path / "new" / "rows.jsonl"
        monkeypatch.setattr(sys, "argv", ["benchmark", *SMALL, "--output", str(output), *options])
        benchmark.main()
        return [json.loads(line) for line in output.read_text().splitlines()], capsys.readouterr().out

    return main


def test_a_row_for_every_cell(run):
    methods = ["none", "pooling", "transformers", "omnizip", "ward:encoder", "qformer:mrc"]
    rows, printed = run(throughput, "--keep-ratios", "0.5", "0.25", "--compressors", *methods)
    cells = [(row["method"], row["keep_ratio"]) for row in rows]
    several = [(name, ratio) for name in ("pooling", "omnizip", "ward:encoder") for ratio in (0.5, 0.25)]
    # transformers' own comes first, and a method with weights for one ratio alone is run once
    assert cells == [("transformers", None), ("none", None), *several, ("qformer:mrc", None)]
    assert [row.get("message") for row in rows] == [None] * len(rows)
    for row in rows:
        inside = row["method"] in ("transformers", "none", "ward:encoder")
        missing = ({"compressor"} if inside else set()) | ({"encode"} if row["method"] == "transformers" else set())
        assert {name for name in TIMED if name in row} == TIMED - missing
        assert all(row[name]["n"] == 1 for name in TIMED - missing)
        assert row["tokens"]["audio"][0] == 50
        assert row["tokens"]["video"][0] == 3 * 8
        assert row["sequence"] - row["tokens"]["audio"][1] - row["tokens"]["video"][1] == 44
        assert row["kv_bytes"] == 2 * 2 * 16 * 4 * row["sequence"]
        assert not row["compile"]
    kept = {cell: row["kept"] for cell, row in zip(cells, rows, strict=True)}
    assert kept["none", None] == kept["transformers", None] == {"audio": 1.0, "video": 1.0}
    assert kept["pooling", 0.25] == {"audio": 13 / 50, "video": 1.0}
    assert kept["omnizip", 0.25]["video"] < 1
    assert printed.count("`pooling`") == 2
    assert "transformers, as it comes" in printed


def test_what_is_there_is_not_run_again(run, monkeypatch):
    options = ["--compressors", "transformers", "none", "--no-video"]
    first, _ = run(throughput, *options)
    again, printed = run(throughput, *options)
    assert again == first
    assert "ours, uncompressed" in printed
    assert len(run(throughput, *options, "--seconds", "1", "2")[0]) == 4
    assert len(run(throughput, *options, "--commit", "def")[0]) == 6


def test_what_failed_is_run_again_and_a_changed_checkout_is_measured_anew(tmp_path):
    cells = [{"method": name, "seconds": 1.0} for name in ("full", "bad", "good")]
    calls = []

    def measure(cell):
        calls.append(cell["method"])
        if cell["method"] == "full":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate much")
        if cell["method"] == "bad":
            raise KeyError("a failure")
        return {"found": 1}

    rows = run_cells(cells, measure, WHERE, tmp_path / "rows.jsonl")
    assert [row["status"] for row in rows] == ["oom", "failed", "ok"]
    assert rows[0]["message"] == "OutOfMemoryError: CUDA out of memory."
    assert rows[1]["message"] == "KeyError: 'a failure'"
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == rows
    run_cells(cells, measure, {**WHERE, "utc": "later"}, tmp_path / "rows.jsonl")
    assert calls == ["full", "bad", "good", "bad"]
    for change in ({"dirty": True}, {"dirty": True}, {"commit": None}, {"commit": None}, {"device": "another"}):
        calls.clear()
        run_cells(cells, measure, WHERE | change, tmp_path / "rows.jsonl")
        assert calls == ["full", "bad", "good"]


def test_a_failing_cell_does_not_stop_the_others(run, monkeypatch):
    def build(thinker, method, ratio):
        raise torch.OutOfMemoryError("no room") if method == "random" else ValueError("not here")

    for benchmark in (throughput, training):
        monkeypatch.setattr(benchmark, "build_at", build)
        output = f"/{benchmark.__name__}.jsonl"
        rows, printed = run(benchmark, "--no-video", "--compressors", "random", "pooling", "none", "--commit", output)
        assert [row["status"] for row in rows[-3:]] == ["oom", "failed", "ok"]
        assert "out of memory" in printed
        assert "ValueError: not here" in printed


def test_a_line_that_was_cut_off_is_no_row_and_spoils_no_other(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    append({"a": 1}, path)
    path.write_bytes(path.read_bytes() + b'{"b": ')
    append({"c": 3}, path)
    assert read_rows(path) == [{"a": 1}, {"c": 3}]
    assert "rows.jsonl: line 2 is cut off" in caplog.text


@pytest.mark.parametrize("lost", [True, False])
def test_a_lost_gpu_ends_the_run(monkeypatch, tmp_path, lost):
    """An error that stays fails every later call; one that does not fails its cell alone."""
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    broken, measured = [], []

    def measure(cell):
        measured.append(cell["method"])
        if cell["method"] == "bad":
            broken.append(lost)
            raise error
        return {}

    def synchronize():
        if any(broken):
            raise error

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    output = tmp_path / "rows.jsonl"
    cells = [{"method": name} for name in ("first", "bad", "last")]
    if lost:
        with pytest.raises(SystemExit, match=r"answers nothing more after bad \(AcceleratorError: ") as end:
            run_cells(cells, measure, WHERE, output)
        assert isinstance(end.value.code, str), "a message: Python's code for it is 1"
        assert measured == ["first", "bad"]
    else:
        run_cells(cells, measure, WHERE, output)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["status"] for row in rows] == ["ok", "failed", "ok"][: 2 if lost else 3]


def test_compiled_rows_decode_with_a_static_cache(run, monkeypatch):
    compiled, caches = [], []
    monkeypatch.setattr(throughput, "compile_layers", lambda x: compiled.append(is_packed(vision_tower(x))))
    generate = CompressedOmni.generate

    def noted(self, *args, **options):
        caches.append(options.get("cache_implementation"))
        return generate(self, *args, **options)

    monkeypatch.setattr(CompressedOmni, "generate", noted)
    rows, _ = run(throughput, "--compile", "--no-video", "--compressors", "transformers", "none", "random")
    assert [(row["status"], row["compile"]) for row in rows] == [("ok", False), ("ok", True), ("ok", True)]
    assert compiled == [True]
    assert set(caches) == {"static"}
    assert all(row["warm_up_seconds"] >= 0 for row in rows)


def test_long_sound_has_settings_of_its_own(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--long"])
    args = throughput.parse()[1]
    assert (args.seconds, args.no_video, args.output.name) == ([600, 1800, 3600], True, "long.jsonl")
    monkeypatch.setattr(sys, "argv", ["benchmark", "--long", "--seconds", "5"])
    assert throughput.parse()[1].seconds == [5]


def test_a_training_step_teaches(run, monkeypatch):
    learnt = {}
    step = training.step

    def noted(forward, parameters, device):
        before, run = [p.detach().clone() for p in parameters], step(forward, parameters, device)

        def stepped():
            run()
            learnt[len(parameters)] = [not torch.equal(a, b) for a, b in zip(before, parameters, strict=True)]

        return stepped

    monkeypatch.setattr(training, "step", noted)
    rows, printed = run(training, "--compressors", "transformers", "none", "pooling", "qformer:mrc")
    assert [row["status"] for row in rows] == ["ok"] * 4
    assert [row["kept"]["audio"] for row in rows] == [1, 1, 0.26, 0.04]
    plain, *_, trained = (row["trained_parameters"] for row in rows)
    assert rows[1]["trained_parameters"] == plain < trained
    assert rows[0]["samples_per_second"] == 1e3 / rows[0]["step"]["median"]
    assert len(learnt) > 1
    assert all(sum(changed) >= len(changed) / 3 for changed in learnt.values())  # the first half of LoRA starts at 0
    assert "samples/s" in printed


@pytest.mark.parametrize("benchmark", [throughput, training])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seconds", "0"], "--seconds must be"),
        (["--batch", "4", "0"], "--batch must be"),
        (["--batch", "four"], "invalid int value: 'four'"),
        (["--repeats", "0"], "--repeats must be"),
        (["--keep-ratios", "1.5"], "must be in (0, 1]"),
        (["--compressors", "no-such"], "no-such"),
        (["--compressors", "pooling:no-such"], "no-such"),
        (["--device", "abacus"], "abacus"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--model", "7b"], "needs a CUDA device"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(monkeypatch, capsys, tmp_path, benchmark, options, message):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--device", "cpu", "--output", str(tmp_path / "rows"), *options])
    with pytest.raises(SystemExit) as stopped:
        benchmark.main()
    assert stopped.value.code == 2
    told = capsys.readouterr().err.strip()
    assert message in told
    assert told.startswith("error: ")
    assert "\n" not in told
    assert not list(tmp_path.iterdir())


def test_transformers_and_ours_read_the_same_batch():
    thinker = make_thinker()
    for video in (False, True):
        batch = make_batch(thinker, 3, 2, video)
        own = thinker(**batch, use_audio_in_video=video).logits
        assert own.shape == (2, batch["input_ids"].shape[1], 128)
        assert CompressedOmni(thinker)(**batch).logits.shape == own.shape
        found = thinker.generate(**batch, use_audio_in_video=video, max_new_tokens=ANSWER, min_new_tokens=ANSWER)
        assert found.shape[1] == own.shape[1] + ANSWER


@pytest.mark.parametrize("size", LLM)
def test_random_models_have_the_released_sizes(size):
    with torch.device("meta"):
        thinker = random_thinker(size, torch.device("meta"), torch.bfloat16)
    billions = sum(p.numel() for p in thinker.parameters()) / 1e9
    assert billions == pytest.approx({"7b": 8.93, "3b": 4.70}[size], abs=0.03)  # the thinkers of the released files


def test_a_cpu_tells_neither_memory_nor_energy():
    assert memory(lambda: None, torch.device("cpu")) == {}
    assert energy(lambda: None, 1.0, torch.device("cpu")) is None


def test_energy_where_the_driver_tells(monkeypatch):
    class NVMLError(Exception):
        pass

    def handle(name):
        if name != "GPU-12":
            raise NVMLError
        return name

    pynvml = {"NVMLError": NVMLError, "nvmlInit": lambda: None, "nvmlDeviceGetHandleByUUID": handle}
    pynvml |= {"nvmlDeviceGetTotalEnergyConsumption": lambda handle: 5_000}
    for module, uuid, found in ((pynvml, "12", 5.0), (pynvml, "13", None), (None, "12", None)):
        monkeypatch.setitem(sys.modules, "pynvml", module and SimpleNamespace(**module))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, uuid=uuid: SimpleNamespace(uuid=uuid))
        assert joules(torch.device("cuda")) == found
