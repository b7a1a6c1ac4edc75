"""`train_compress.py` as its users run it: whole runs, resumed, distributed, configured, and stopped by bad input."""

import json
import math
import os
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from test_collator import write_clip
from test_media import tone, write_audio
from tiny import tiny_processor, tiny_thinker, write_checkpoint

import audiopress
from audiopress.data.speech import split_of

SCRIPT = Path(__file__).parents[1] / "train_compress.py"
STEPS = 12
FILE = {  # of the whole run; the command line changes one of them
    "compressor": "stacking",
    "keep_ratio": 0.25,
    "compressor_options": ["mlp_size=64"],
    "lora_dropout": 0.2,
    "learning_rate": "5e-3",  # YAML takes 5e-3 for text
    "connector_learning_rate": 0.005,
    "ctc_warmup_steps": 6,
    "per_device_train_batch_size": 4,
    "max_steps": 99,
    "save_strategy": "steps",
    "save_steps": STEPS // 2,
    "eval_steps": 3,
    "logging_steps": 1,
    "max_new_tokens": 8,
    "report_to": "none",
    "use_cpu": True,
}
QUICK = ["--use-cpu", "--report-to", "none", "--max-new-tokens", "4"]


def environment(**more):
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"} | more


def run(*args, launcher=(), code=0, preexec_fn=None, **env):
    """Runs the script as a process of its own; gives what it wrote."""
    command = [sys.executable, *launcher, SCRIPT, *args]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment(**env), preexec_fn=preexec_fn
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture
def here(monkeypatch, capsys):
    """Runs the script inside this process, which saves the seconds of its imports; gives exit status and output."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, args)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        status = None
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def error(here):
    """Runs the script, which must stop with one line; gives that line, and whether the model had been opened."""

    def call(*args):
        status, out, err = here(*args)
        assert status, "it did not fail"
        lines = (status if isinstance(status, str) else err.strip().splitlines()[-1]).splitlines()
        assert len(lines) == 1, lines
        return lines[0], "[2/5]" in out

    return call


def make_checkpoint(folder, seed=0):
    write_checkpoint(folder, tiny_thinker(tiny_processor(), seed))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("base"))


def write_speech(folder, train=8, validation=2, test=4):
    """Writes tones of 2 s and more, each with a text that the split wants."""
    missing, number = {"train": train, "validation": validation, "test": test}, 0
    while any(missing.values()):
        text, number = f"no {number}", number + 1
        if missing[split_of(text)]:
            missing[split_of(text)] -= 1
            seconds = 2 + 0.04 * (number % 7)
            write_audio(folder / f"{text}.wav", tone(seconds, 16_000, hertz=200 + 40 * number), 16_000)
            (folder / f"{text}.txt").write_text(text)
    return folder


def of_split(folder, split):
    """Gives the sound files of a split."""
    return [file for file in sorted(folder.glob("*.wav")) if split_of(file.stem) == split]


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    return write_speech(tmp_path_factory.mktemp("speech"))


@pytest.fixture(scope="module")
def config(tmp_path_factory, base, speech):
    file = tmp_path_factory.mktemp("config") / "run.yaml"
    file.write_text(yaml.safe_dump({"model": str(base), "speech_dir": str(speech), **FILE}))
    return file


@pytest.fixture(scope="module")
def whole(tmp_path_factory, config):
    """A whole run: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, run(config, "--max-steps", STEPS, "--output-dir", folder).stdout


@pytest.fixture(scope="module")
def variant(tmp_path_factory, whole):
    """The saved variant of the whole run, without its checkpoints."""
    folder = tmp_path_factory.mktemp("variant") / "out"
    return Path(shutil.copytree(whole[0], folder, ignore=shutil.ignore_patterns("checkpoint-*")))


def content(folder):
    """Gives every file of a folder, to see whether anything was changed."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def history(folder, step=STEPS):
    """Gives what Trainer logged: step -> entry with a training loss."""
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return {entry["step"]: entry for entry in state["log_history"] if "loss" in entry}


def losses(folder, step=STEPS):
    return [entry["loss"] for entry in history(folder, step).values()]


# Whole runs.


def test_a_whole_run_leaves_everything(whole, speech):
    folder, printed = whole
    files = {p.name for p in folder.iterdir() if p.is_file()}
    (weights,) = folder.glob("audiopress-*.safetensors")
    pictures = {"training.png", "tokens.png"}
    assert files == {"results.json", "answers.json", "audiopress.json", weights.name, *pictures}
    assert len({(folder / name).stat().st_mode for name in files}) == 1  # who may read one may read all
    for name in pictures:
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 200
    assert all(f"[{step}/5]" in printed for step in range(1, 6))
    for part in ("compressor", "adapter", "projector", "alignment", "all"):
        assert re.search(rf"^{part} +[\d,]+ +[\d,]+$", printed, re.MULTILINE)
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    for title in ("held-out loss", "WER", "tokens/s", "kept"):
        assert title in rows[0]
    assert [line.split("|")[1].strip() for line in rows[1:]] == list(
        json.loads((folder / "results.json").read_text())["results"]
    )
    answers = json.loads((folder / "answers.json").read_text())
    assert {a["id"]: a["reference"] for a in answers} == {p.stem: p.stem for p in of_split(speech, "test")}


def test_its_numbers_hold_together(whole, speech):
    folder, _ = whole
    summary = json.loads((folder / "results.json").read_text())
    before, after, shuffled = summary["results"].values()
    tokens = [round(25 * (file.stat().st_size // 4 / 16_000)) for file in of_split(speech, "test")]
    budget = audiopress.build("stacking", keep_ratio=0.25, hidden_size=32).budget(tokens)
    assert before["keep_ratio"] == 1
    assert after["keep_ratio"] == shuffled["keep_ratio"] == pytest.approx(sum(budget) / sum(tokens))
    assert after["tokens_per_second"] == 25 * after["keep_ratio"]
    assert {r["words"] for r in (before, after, shuffled)} == {2 * len(tokens)}
    assert all(math.isfinite(r["loss"]) and r["wer_95"][0] <= r["wer"] <= r["wer_95"][1] for r in (before, after))
    assert after["loss"] < before["loss"]
    assert summary["skipped"] == {}
    logged = history(folder)
    assert list(logged) == list(range(1, STEPS + 1))
    assert logged[STEPS]["loss"] < 0.8 * logged[1]["loss"]
    for entry in logged.values():
        assert entry["loss"] == pytest.approx(entry["loss_text"] + entry["loss_ctc"], abs=1e-4)
        assert entry["loss_ctc"] > 0


def test_the_resolved_config_is_printed_and_kept(whole, config, base, speech):
    """The command line wins over the file, the file over the defaults."""
    folder, printed = whole
    kept = json.loads((folder / "results.json").read_text())["config"]
    text = printed[printed.index("\nmodel: ") : printed.index("\npart ")]
    assert yaml.safe_load(text) == kept
    given = yaml.safe_load(config.read_text()) | {"max_steps": STEPS, "learning_rate": 5e-3}
    del given["report_to"]  # none is an empty list for transformers
    assert {key: kept[key] for key in given} == given
    assert kept["method"]["options"]["k"] == 4
    assert {"lora_r", "turns", "learning_rate", "per_device_eval_batch_size", "logging_steps"} <= kept.keys()


RELOAD = """
import json, sys
import audiopress
from audiopress.data.collator import Encoder, OmniCollator
from audiopress.data.speech import folder_records

out, speech, new = sys.argv[1], sys.argv[2], int(sys.argv[3])
model, processor = audiopress.load(out, device="cpu")
encoder, collate = Encoder(processor), OmniCollator(processor.tokenizer.pad_token_id, "left")
said = {}
for record in folder_records(speech, "test"):
    ids = model.generate(**collate([encoder(record, prompt_only=True)]), max_new_tokens=new)
    said[record.id] = processor.tokenizer.decode(ids[0], skip_special_tokens=True).strip()
print(json.dumps(said))
"""


def trained_answers(folder):
    return {a["id"]: a["trained variant"] for a in json.loads((folder / "answers.json").read_text())}


def test_the_saved_variant_gives_the_same_answers_in_a_new_process(variant, speech):
    answers = trained_answers(variant)
    assert any(answers.values())
    command = [sys.executable, "-c", RELOAD, str(variant), str(speech), str(FILE["max_new_tokens"])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == answers


def test_one_variant_for_several_ratios(here, config, tmp_path, caplog):
    options = "--compressor pooling --keep-ratio 0.5,0.25,0.125 --compressor-options kind=attentive --shrink-steps 5"
    status, out, _ = here(config, *options.split(), "--max-steps", 4, "--output-dir", tmp_path)
    assert not status
    assert "the keep ratio shrinks over 5 steps, but training ends after 4" in caplog.text
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    rates = [results[name]["keep_ratio"] for name in results if "shuffled" not in name]
    assert rates == pytest.approx([1, 0.5, 0.25, 0.125], abs=0.02)
    assert "| the same at keep_ratio 0.125 |" in out
    model, _ = audiopress.load(tmp_path, device="cpu", keep_ratio=0.125)
    assert model.compressor.config.keep_ratio == 0.125
    assert model.keep_ratios == (0.5, 0.25, 0.125)


def test_a_ratio_shrinks_inside_the_tower(here, config, tmp_path):
    """From states cached before the first layer that prunes: at ratio 1, too, no layer may be left out."""
    options = "--compressor attention-topk:topk-ast --compressor-options layers=2 --keep-ratio 0.5 --train projector"
    quick = ("--ctc-warmup-steps", 1, "--max-steps", 1, "--logging-steps", 1)
    for name, more in (("cached", "--cache-audio true"), ("direct", "--cache-audio false")):
        status, *_ = here(
            config,
            *options.split(),
            *more.split(),
            "--shrink-steps",
            3,
            *quick,
            "--save-steps",
            1,
            "--output-dir",
            tmp_path / name,
        )
        assert not status
    assert losses(tmp_path / "cached", 1) == pytest.approx(losses(tmp_path / "direct", 1), rel=1e-4)


def test_a_training_free_method_untrained(here, config, tmp_path):
    options = "--compressor ward --compressor-options segmentation=exact --train none --ctc-warmup-steps 0"
    status, out, _ = here(config, *options.split(), "--output-dir", tmp_path)
    assert not status
    assert "nothing is trained" in out
    assert "| variant, untrained |" in out
    assert {"results.json", "audiopress.json", "tokens.png"} <= {p.name for p in tmp_path.iterdir()}
    assert audiopress.load(tmp_path, device="cpu")[0].compressor.name == "ward"


def test_the_speech_rate_is_fitted_first(here, config, tmp_path):
    options = "--compressor qformer:mms-llama --keep-ratio= --speech-rate-steps 9 --compressor-options width=24 heads=2"
    plain = {k: v for k, v in yaml.safe_load(config.read_text()).items() if k != "keep_ratio"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(plain))
    options = options.replace("--keep-ratio= ", "")
    status, _, _ = here(tmp_path / "run.yaml", *options.split(), "--max-steps", 2, "--output-dir", tmp_path / "run")
    assert not status
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())["speech_rate_losses"]) == 9


def test_show_layout(here, config, tmp_path):
    status, out, _ = here(config, "--show-layout", "--output-dir", tmp_path / "out")
    assert status is None
    before, after = map(int, re.search(r"AUDIO +x (\d+) .* -> (\d+)", out).groups())
    assert after == math.ceil(before / 4)
    total, less = map(int, re.search(r"(\d+) tokens -> (\d+)", out).groups())
    assert total - less == before - after
    assert "[3/5]" not in out
    assert not (tmp_path / "out").exists()


# Interrupted and resumed.

DIE = """
import os, signal, sys

def hook(event, args):
    if event == "open" and "checkpoint-{step}{sep}" in str(args[0]):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory, config):
    """The same run, killed while its last checkpoint is being written."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "sitecustomize.py").write_text(DIE.format(step=STEPS, sep=os.sep))
    options = ("--max-steps", STEPS, "--output-dir", folder / "out")
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    run(config, *options, code=-signal.SIGKILL, PYTHONPATH=path)
    assert (folder / "out" / f"checkpoint-{STEPS}").is_dir()
    return folder / "out", options


def test_a_folder_with_checkpoints_needs_resume(error, config, killed):
    folder, options = killed
    before = content(folder)
    line, opened = error(config, *options)
    assert re.search(f"{folder} holds checkpoints of an earlier run: give --resume, or another --output-dir", line)
    assert not opened
    assert content(folder) == before


def test_a_checkpoint_of_another_base_is_refused(error, config, killed, tmp_path):
    folder, options = killed
    before = content(folder)
    other = make_checkpoint(tmp_path / "other", seed=1)
    line, _ = error(config, *options, "--resume", "--model", other)
    assert re.search(rf"checkpoint-{STEPS // 2} was trained on another base model .*weights", line)
    assert content(folder) == before


def test_a_resumed_run_goes_on_as_if_nothing_had_happened(whole, config, killed, tmp_path):
    folder = Path(shutil.copytree(killed[0], tmp_path / "out"))
    done = run(config, *killed[1], "--resume", "--output-dir", folder)
    assert f"checkpoint-{STEPS} was not saved completely; passed over" in done.stderr
    assert losses(folder) == losses(whole[0])
    assert trained_answers(folder) == trained_answers(whole[0])


OTHER_VARIANTS = {
    "--compressor-options mlp_size=64 tail=drop": "tail",
    "--lora-alpha 32": "alpha",
    "--positions contiguous": "positions",
}


@pytest.mark.parametrize("changed", OTHER_VARIANTS)
def test_resuming_as_another_variant_is_refused(error, config, killed, tmp_path, changed):
    folder, options = Path(shutil.copytree(killed[0], tmp_path / "out")), killed[1]
    line, _ = error(config, *options, "--resume", *changed.split(), "--output-dir", folder)
    assert re.search(rf"checkpoint-{STEPS // 2} .*{OTHER_VARIANTS[changed]}", line), line


def test_resume_without_a_checkpoint_says_so(here, config, tmp_path, caplog):
    status, *_ = here(config, "--resume", "--max-steps", 1, "--output-dir", tmp_path / "out")
    assert status is None
    assert f"no complete checkpoint in {tmp_path / 'out'}" in caplog.text


# Several processes.


@pytest.fixture(scope="module")
def alone(tmp_path_factory, base, speech):
    """A run in one process, by a JSON file: the file and the folder."""
    folder = tmp_path_factory.mktemp("alone")
    options = {"model": str(base), "speech_dir": str(speech), **FILE, "lora_dropout": 0.0, "max_steps": 4}
    (folder / "run.json").write_text(json.dumps(options | {"save_steps": 4, "ctc_warmup_steps": 2, "eval_steps": 4}))
    run(folder / "run.json", "--output-dir", folder / "out")
    return folder / "run.json", folder / "out"


def launchers():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    # --multi_gpu also where there is none: with --cpu it starts several processes by MPI alone
    accelerate = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    more = ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_ip=127.0.0.1", "--main_process_port", port]
    return {"torchrun": [*torchrun, "--master-port", port], "accelerate": [*accelerate, *more]}


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_two_processes_learn_as_one_does(alone, tmp_path, launcher):
    file, expected = alone
    options = ("--ddp-backend", "gloo", "--per-device-train-batch-size", 2, "--output-dir", tmp_path / "out")
    done = run(file, *options, launcher=launchers()[launcher])
    assert losses(tmp_path / "out", 4) == pytest.approx(losses(expected, 4), abs=1e-4)
    for entry in history(tmp_path / "out", 4).values():
        assert entry["loss"] == pytest.approx(entry["loss_text"] + entry["loss_ctc"], abs=1e-4)
    for line in ("[1/5]", "compressor: stacking\n", "| trained variant |"):
        assert done.stdout.count(line) == 1
    assert trained_answers(tmp_path / "out").keys() == trained_answers(expected).keys()


def test_accumulated_batches_learn_as_one_does(alone, here, tmp_path):
    file, expected = alone
    options = ("--per-device-train-batch-size", 2, "--gradient-accumulation-steps", 2)
    status, *_ = here(file, *options, "--output-dir", tmp_path / "out")
    assert status is None
    assert losses(tmp_path / "out", 4) == pytest.approx(losses(expected, 4), abs=1e-4)
    for entry in history(tmp_path / "out", 4).values():
        assert entry["loss"] == pytest.approx(entry["loss_text"] + entry["loss_ctc"], abs=1e-4)


# Dialogues.


def entry(name, question="When?", answer="From <s0> to <e0>.", **changes):
    turns = [{"from": "human", "value": f"<video>\n{question}"}, {"from": "gpt", "value": answer}]
    meta = {"duration": 2.0, "token": {"<s0>": 0.5, "<e0>": 1.5}}
    made = {"id": name, "conversations": turns, "meta": meta} | changes
    return {key: value for key, value in made.items() if value is not None}


def write_json(path, value):
    path.write_text(json.dumps(value))
    return path


BAD_ENTRIES = {
    "'conversations' is missing": {"conversations": None},
    "'meta' has no duration": {"meta": {}},
    "the last must be gpt's answer": {"conversations": [{"from": "human", "value": "<video>\nWhen?"}]},
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Clips of 2 s with sound; the last two are broken."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(10):
        write_clip(folder / f"v{i}.mov", 4, 2, 2)
    for i in (8, 9):  # cut off
        (folder / f"v{i}.mov").write_bytes((folder / f"v{i}.mov").read_bytes()[:300])
    return folder


def test_dialogues_about_videos(here, videos, base, tmp_path, caplog):
    """Bad records are named with the reason, left out and counted."""
    bad = [entry(f"v{5 + i}", **changes) for i, changes in enumerate(BAD_ENTRIES.values())]
    train = write_json(tmp_path / "train.json", [*bad, *(entry(f"v{i}") for i in (0, 1, 2, 8))])
    test = write_json(tmp_path / "test.json", [entry(f"v{i}") for i in (3, 4, 9)])
    files = ("--data", train, "--eval-data", test, "--video-dir", videos, "--num-frames", 4)
    options = ("--compressor", "pooling", "--keep-ratio", 0.2, "--train", "adapter", "--max-steps", 2)
    out = tmp_path / "out"
    sizes = ("--per-device-train-batch-size", 2, "--output-dir", out)
    status, *_ = here("--model", base, *files, *options, *sizes, *QUICK)
    assert status is None
    summary = json.loads((out / "results.json").read_text())
    assert len(summary["skipped"]) == 5
    for (name, reason), expected in zip(summary["skipped"].items(), BAD_ENTRIES, strict=False):
        assert "train.json: record" in name
        assert expected in reason
    for name in ("v8", "v9"):
        assert f"{name}.mov: cannot be decoded" in summary["skipped"][name]
        assert caplog.text.count(f"skipped {name}: ") == 1
    assert "skipped 5 of 10 records" in caplog.text
    assert summary["results"]["trained variant"]["keep_ratio"] == 0.2
    assert [a["reference"] for a in json.loads((out / "answers.json").read_text())] == ["From 25 to 75."] * 2


@pytest.mark.parametrize(
    "options",
    ["--compressor omnizip", "--compressor uniform-stride --video-compressor uniform-stride --video-keep-ratio 0.25"],
)
def test_video_tokens_are_reduced_too(here, videos, base, tmp_path, options):
    data = write_json(tmp_path / "data.json", [entry(f"v{i}") for i in range(6)])
    plain = ("--video-dir", videos, "--num-frames", 4, "--max-steps", 2, "--output-dir", tmp_path / "out")
    status, out, _ = here(*options.split(), "--model", base, "--data", data, *plain, *QUICK)
    assert not status
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    kept = results["trained variant"]["tokens"]["video"]
    assert 0 < kept[1] < kept[0]
    assert "video kept" in out


def test_few_dialogues_over_extracted_audio(here, base, speech, tmp_path):
    """Of four, two are held out."""
    data = write_json(tmp_path / "data.json", [entry(file.stem) for file in of_split(speech, "train")[:4]])
    options = ("--data", data, "--audio-dir", speech, "--compressor", "pooling", "--max-steps", 1)
    status, out, _ = here("--model", base, *options, *QUICK, "--output-dir", tmp_path / "out")
    assert status is None
    assert "training adapter on 2 records" in out
    assert len(json.loads((tmp_path / "out" / "answers.json").read_text())) == 2


# Bad input: one line that names the thing, what is allowed and what was given.

BAD_OPTIONS = {
    "--compressor poolin": "unknown method 'poolin'; there are .*conv.*did you mean 'pooling'",
    "--compressor stacking:slam": "unknown preset of stacking 'slam'; there are llama-avsr, llama-omni, slam-asr",
    "--keep-ratio 0": r"keep_ratio .*\(0, 1\], got 0",
    "--keep-ratio 0.5,0.25": "weights of its own for every keep_ratio",
    "--compressor qformer --compressor-options heads=2 width=24 --keep-ratio 0.5 --shrink-steps 4": "--shrink-steps "
    r"takes every ratio from 1 down, but qformer cannot go to keep_ratio 0.8.*nearest",
    "--compressor atome --compressor-options threshold=0.9 --keep-ratio 1 --shrink-steps 4": "of atome is 1",
    "--compressor pooling --compressor-options kind=max --shrink-steps -1": "--shrink-steps must be >= 0, got -1",
    "--keep-ratio 0.5,x": "takes a number, or several as 0.5,0.25, got '0.5,x'",
    "--video-compressor stacking": "training-free method that reads them alone, got stacking",
    "--video-compressor randon": "unknown method 'randon'; .*did you mean 'random'",
    "--video-keep-ratio 0.5": "--video-keep-ratio needs a --video-compressor",
    "--train none": "stacking has weights to train",
    "--train none adapter": "--train auto and --train none stand alone",
    "--mix-joined 2": r"joined is a share .* \[0, 1\], got 2",
    "--keep-ratio 1.5": r"keep_ratio .*\(0, 1\], got 1.5",
    "--keep-ratio nan": r"keep_ratio .*\(0, 1\], got nan",
    "--keep-ratio half": "--keep-ratio takes a number, or several as 0.5,0.25, got 'half'",
    "--compressor-options kk=3": "stacking has no option kk; its options are .*keep_ratio",
    "--compressor-options k": "--compressor-options takes KEY=VALUE, got 'k'",
    "--compressor-options k=two": "k must be .*got 'two'",
    "--train adaptor": "compressor, adapter, projector.*got adaptor",
    "--positions sideways": "argument --positions: invalid choice: 'sideways' .choose from .*original.*contiguous",
    "--turns double": "argument --turns: invalid choice: 'double' .choose from .*multi.*single.*mixed",
    "--kepe-ratio 0.5": "--kepe-ratio",
    "--speech-dir {tmp}": "{tmp} holds no utterances; it needs x.wav with x.txt",
    "--speech-dir {tmp}/none": "{tmp}/none ",
    "--data {tmp}/none.json --video-dir {tmp}": "{tmp}/none.json",
    "--data {tmp}/broken.json --video-dir {tmp}": "{tmp}/broken.json is not JSON",
    "--data {tmp}/empty.json --video-dir {tmp}": r"{tmp}/empty.json must hold a JSON list with entries, got \[\]",
    "--data {tmp}/broken.json": "no media: give video_dir, audio_dir or both",
    "--data {tmp}/broken.json --video-dir {tmp}/none": "{tmp}/none is not a folder",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options_are_told_before_the_model_is_opened(error, config, variant, tmp_path, options):
    (tmp_path / "broken.json").write_text("[{'id': ")
    (tmp_path / "empty.json").write_text("[]")
    before = content(variant)
    line, opened = error(config, "--output-dir", variant, *options.format(tmp=tmp_path).split())
    assert re.search(BAD_OPTIONS[options].replace("{tmp}", re.escape(str(tmp_path))), line), line
    assert not opened
    assert content(variant) == before


def test_a_saved_variant_is_no_base(error, config, variant, tmp_path):
    line, opened = error(config, "--model", variant, "--output-dir", tmp_path / "out")
    assert "is a saved variant: give its base model" in line
    assert not opened


BAD_FILES = {
    "keep_ration: 0.5": "has an unknown key 'keep_ration'; did you mean keep_ratio",
    "max_steps: many": "argument --max.steps.*: invalid int value: 'many'",
    "max_steps: [1, 2]": r"max_steps takes one value, got \[1, 2\]",
    "strict: perhaps": "argument --strict: .*perhaps",
    "positions: sideways": "argument --positions: invalid choice: 'sideways'",
    "- compressor": "must hold `key: value` lines, got list",
    "compressor: [": "run.yaml",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_bad_config_files(error, base, speech, tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    options = ("--model", base, "--speech-dir", speech, "--output-dir", tmp_path / "out")
    line, opened = error(tmp_path / "run.yaml", *options, "--use-cpu")
    assert re.search(BAD_FILES[text], line), line
    assert not opened


def test_a_config_file_that_is_not_there(error, tmp_path):
    line, _ = error(tmp_path / "none.yaml")
    assert str(tmp_path / "none.yaml") in line


def test_one_value_for_a_list_in_a_file(here, config, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"train": "adapter", "compressor": "pooling"}))
    options = ("--max-steps", 1, "--ctc-warmup-steps", 0, "--compressor-options", "k=4")
    status, out, _ = here(file, *options, "--output-dir", tmp_path / "out")
    assert status is None
    assert "training adapter on" in out


def test_a_model_that_is_not_there(error, config, variant, tmp_path):
    before = content(variant)
    line, _ = error(config, "--output-dir", variant, "--model", tmp_path / "none")
    assert f"model '{tmp_path}/none' is neither 'omni-small', nor a saved variant, nor a Qwen2.5-Omni checkp" in line
    assert content(variant) == before


def test_nothing_to_train(error, config, variant):
    options = ("--compressor", "pooling", "--compressor-options", "kind=mean", "--train", "compressor")
    line, _ = error(config, "--output-dir", variant, *options)
    assert "there is no parameter in the compressor to train" in line


@pytest.mark.parametrize("options", ["--train adapter", "--ctc-weight 0"])
def test_a_warm_up_needs_something_to_warm_up(error, config, variant, options):
    line, _ = error(config, "--output-dir", variant, *options.split())
    assert re.search("ctc.warmup.steps.* needs .*ctc.weight.*compressor.*projector", line), line


@pytest.mark.parametrize("expected", BAD_ENTRIES)
def test_a_bad_entry_is_an_error_when_strict(error, base, videos, tmp_path, expected):
    entries = [entry("v0"), entry("v1", **BAD_ENTRIES[expected]), entry("v2"), entry("v3")]
    data = write_json(tmp_path / "data.json", entries)
    options = ("--data", data, "--video-dir", videos, "--output-dir", tmp_path / "out")
    line, opened = error("--model", base, *options, *QUICK, "--strict")
    assert f"{data}: record 1 (id 'v1')" in line
    assert expected in line
    assert not opened


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_broken_sound_is_an_error_when_strict(error, config, speech, variant, tmp_path, split):
    copy = Path(shutil.copytree(speech, tmp_path / "speech"))
    broken = of_split(copy, split)[0]
    broken.write_bytes(b"RIFF nothing")
    before = content(variant)
    line, _ = error(config, "--speech-dir", copy, "--strict", "--output-dir", variant)
    assert str(broken) in line
    assert "cannot be decoded" in line
    assert content(variant) == before


def test_a_broken_sound_is_named_left_out_and_counted(here, config, speech, tmp_path, caplog):
    copy = Path(shutil.copytree(speech, tmp_path / "speech"))
    broken = [of_split(copy, split)[0] for split in ("train", "validation", "test")]
    for file in broken:
        file.write_bytes(b"RIFF nothing")
    options = ("--speech-dir", copy, "--max-steps", 2, "--ctc-warmup-steps", 1)
    status, *_ = here(config, *options, "--output-dir", tmp_path / "out")
    assert status is None
    skipped = json.loads((tmp_path / "out" / "results.json").read_text())["skipped"]
    assert set(skipped) == {file.stem for file in broken}
    for file in broken:
        assert f"{file}: cannot be decoded" in skipped[file.stem]
        assert caplog.text.count(f"skipped {file.stem}: ") == 1
    assert "skipped 3 of 14 records" in caplog.text


def test_too_few_sounds_are_told_before_training(error, config, speech, tmp_path):
    copy = Path(shutil.copytree(speech, tmp_path / "speech"))
    for file in of_split(copy, "test")[1:]:
        file.write_bytes(b"RIFF nothing")
    line, _ = error(config, "--speech-dir", copy, "--output-dir", tmp_path / "out")
    assert re.search("1 held-out ones of 1 sounds .*needed .* 2", line), line
    assert not (tmp_path / "out").exists()


def test_dialogues_about_one_sound_cannot_be_shuffled(error, base, speech, tmp_path):
    name = of_split(speech, "train")[0].stem
    data = write_json(tmp_path / "data.json", [entry(name, f"{i}?") for i in range(5)])
    options = ("--data", data, "--audio-dir", speech, "--compressor", "pooling", "--output-dir", tmp_path / "out")
    line, opened = error("--model", base, *options, *QUICK)
    assert "of 1 sounds are too few" in line
    assert not opened


def test_no_validation_sounds_are_needed(here, config, tmp_path):
    (tmp_path / "speech").mkdir()
    folder = write_speech(tmp_path / "speech", train=2, validation=0, test=2)
    status, *_ = here(config, "--speech-dir", folder, "--max-steps", 1, "--output-dir", tmp_path / "out")
    assert status is None


def test_a_full_disk_leaves_the_old_variant(config, variant):
    before = content(variant)
    options = ("--max-steps", 2, "--save-strategy", "no", "--ctc-warmup-steps", 1, "--output-dir", variant)
    limit = (variant / json.loads((variant / "audiopress.json").read_text())["weights"]).stat().st_size // 2
    done = run(
        *(config, *options, "--seed", 1),
        code=1,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
    assert content(variant) == before
    audiopress.load(variant, device="cpu")


def test_defaults_are_a_first_run_on_speech_and_the_recipe_elsewhere(monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    parse = runpy.run_path(str(SCRIPT))["parse"]
    model, _, first = parse(["--use-cpu", "--compressor", "stacking:slam-asr"])
    assert first.output_dir == os.path.join("runs", "stacking-slam-asr")
    assert (first.learning_rate, first.max_steps, first.per_device_train_batch_size) == (1e-3, 32, 8)
    _, _, recipe = parse(["--use-cpu", "--data", "longvale.json", "--output-dir", "mine"])
    assert recipe.output_dir == "mine"
    assert (recipe.learning_rate, recipe.num_train_epochs, recipe.per_device_train_batch_size) == (1e-4, 2, 1)
    assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (16, 16, 0.05)


def test_the_longvale_recipe_holds_valid_options(monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    parse = runpy.run_path(str(SCRIPT))["parse"]
    recipe = SCRIPT.parent / "benchmarks" / "configs" / "longvale.yaml"
    model, data, args = parse([str(recipe), "--use-cpu", "--keep-ratio", "0.25"])
    assert (model.keep_ratio, data.data, args.learning_rate) == ("0.25", "longvale-sft-bp-7k.json", 1e-4)
