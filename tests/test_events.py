"""The time testbed: scores by hand, answers like those of the ordinary path, training that leaves no trace."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch
from test_timeline import data_set, folder, stamps  # noqa: F401  (fixtures)
from tiny import tiny_processor, tiny_thinker, write_checkpoint

import audiopress
from audiopress.benchmarks import events
from audiopress.benchmarks.longvale import VideoEncoder
from audiopress.benchmarks.times import testbed as testbed_module
from audiopress.benchmarks.times.clips import TIMESTAMPS, Encoded, KeptClips, load_clips
from audiopress.benchmarks.times.scores import Question, number, scores, things
from audiopress.benchmarks.times.testbed import WAITING, Recipe, TimeSettings, TimeTestbed
from audiopress.data.collator import OmniCollator
from audiopress.data.longvale import load_dialogues
from audiopress.data.records import Record, user
from audiopress.data.timeline import Event, Kind, Thing
from audiopress.models import CompressedOmni, parts
from audiopress.models.loading import build_for

FRAMES = 4
CELL = {"method": "none", "keep_ratio": None, "options": {}, "positions": "original", "seed": 0, "steps": 0}
RECIPE = Recipe(batch=2, learning_rate=1e-2, connector_learning_rate=1e-2, lora_r=2)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(testbed_module, "NEW_TOKENS", {"grounding": 3, "seg_captioning": 3, "counting": 2})


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture
def testbed(data_set, processor):  # noqa: F811
    clips = load_clips(data_set, "test")
    dialogues = load_dialogues(data_set / "train.json", video_dir=data_set / "videos")
    model = CompressedOmni(tiny_thinker(processor)).eval()
    return TimeTestbed(model, processor, clips, dialogues, RECIPE, num_frames=FRAMES, room=8_000)


def question(name, task, needs="audio", clip="a", **truth):
    record = Record(f"{clip}{name}", (user("?"),), audio="x.wav", duration=100.0)
    return Question(record, clip, Kind(task, needs), **truth)


# Scores.


def test_a_description_names_its_things():
    frog, owl = Thing("the sound of a frog", None), Thing("a picture of an owl", None)
    assert things(Event(0, 1, frog, None).sentence) == {frog.phrase}
    assert things(Event(0, 1, None, owl).sentence) == {owl.phrase}
    assert things(Event(0, 1, frog, owl).sentence) == {frog.phrase, owl.phrase}
    assert things("a picture of an owl while the sound of a FROG") == {frog.phrase, owl.phrase}
    assert things("") == frozenset()


@pytest.mark.parametrize(("answer", "expected"), [("2", 2), ("Two.", 2), ("It is 13 times, 2", 13), ("none", None)])
def test_numbers_are_read(answer, expected):
    assert number(answer) == expected


def test_scores_by_hand():
    both = "The sound of a frog while a picture of an owl is shown."
    asked = [
        question(0, "grounding", span=(10.0, 30.0)),
        question(1, "grounding", "video", span=(50.0, 60.0)),
        question(2, "seg_captioning", "both", truth=both),
        question(3, "seg_captioning", truth="A voice saying cat."),
        question(4, "counting", truth="2"),
        question(5, "counting", "both", truth="4"),
        question(0, "grounding", clip="b", span=(0.0, 50.0)),
        question(1, "seg_captioning", clip="b", truth="A voice saying dog."),
    ]
    answers = {
        "a0": "From 10 to 30.",
        "a1": "I do not know",
        "a2": "the sound of a frog while a picture of a cat is shown.",
        "a3": "a voice saying cat",
        "a4": "two",
        "a5": "3",
        "b0": "25 - 50 %",
        "b1": "A voice saying dog while a picture of an owl is shown.",
    }
    found = scores(asked, answers)
    assert found["miou"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert found["miou_official"] == pytest.approx(1 / 3)
    assert found["parsed"] == pytest.approx(2 / 3)
    assert found["recall"] == pytest.approx({"0.3": 2 / 3, "0.5": 2 / 3, "0.7": 1 / 3})
    assert found["caption_accuracy"] == pytest.approx(1 / 3)
    assert found["caption_things"] == pytest.approx(3 / 4)
    assert found["counting_accuracy"] == 1 / 2
    assert found["counting_accuracy_interval"] is None  # of one clip
    assert found["by_needs"]["audio"]["miou"] == 0.75
    assert found["by_needs"]["both"]["caption_accuracy"] == 0
    assert "miou" not in found["by_needs"]["both"]
    assert found["by_clip"]["miou"] == [[1, 2], [0.5, 1]]
    assert found["miou_interval"][0] == 0.5
    assert (found["clips"], found["questions"]) == (2, 8)
    json.dumps(found)


# Clips.


def test_every_event_is_asked_about_and_things_are_counted(data_set):  # noqa: F811
    (clip,) = load_clips(data_set, "test")
    truth = json.loads((data_set / "test-annotations.json").read_text())[clip.id]
    tasks = [q.kind.task for q in clip.questions]
    assert {task: tasks.count(task) for task in tasks} == {
        "grounding": len(truth["sentences"]),
        "seg_captioning": len(truth["sentences"]),
        "counting": 3,
    }
    assert [list(q.span) for q in clip.questions if q.kind.task == "grounding"] == truth["timestamps"]
    assert [q.truth for q in clip.questions if q.kind.task == "seg_captioning"] == truth["sentences"]
    assert all(q.record.is_query and q.truth.isdecimal() for q in clip.questions if q.kind.task == "counting")
    heard = [t for t, needs in zip(truth["timestamps"], truth["needs"], strict=True) if needs != "video"]
    assert [list(span) for span in clip.heard] == heard
    with pytest.raises(ValueError, match=r"unseen-annotations.json is missing; python benchmarks/timeline.py"):
        load_clips(data_set, "unseen")
    assert len(load_clips(data_set, "train", limit=1)) == 1


@pytest.mark.parametrize("method", ["none", "attention-topk", "atome:encoder", "omnizip"])
def test_towers_that_ran_before_change_nothing(data_set, processor, method):  # noqa: F811
    (clip,) = load_clips(data_set, "test")
    records = [q.record for q in clip.questions[:2]]
    thinker = tiny_thinker(processor)
    options = {} if method == "none" else {"keep_ratio": 0.3}
    if method == "atome:encoder":
        options["layers"] = (1,)  # the tower has two
    model = CompressedOmni(thinker, build_for(thinker, method, **options)).eval()
    encoder = VideoEncoder(processor, num_frames=FRAMES, timestamps=6)
    collate = OmniCollator(0, "left")
    whole, _ = model.encode(**without_ids(collate([encoder(record, True) for record in records])))
    kept = KeptClips(thinker, Encoded(processor, [records], FRAMES, 6, True), 0, "clips")
    batch = collate(kept.samples(model.compressor)[0])
    assert batch["pixel_values_videos"].shape[0] == batch["input_features"].shape[1] == 0
    again, _ = model.encode(**without_ids(batch))
    torch.testing.assert_close(again.embeds, whole.embeds, rtol=1e-4, atol=1e-5)
    assert torch.equal(again.positions, whole.positions)


def test_worker_processes_decode_the_same(data_set, processor):  # noqa: F811
    groups = [[q.record for q in clip.questions[:2]] for clip in load_clips(data_set, "test")]
    thinker = tiny_thinker(processor)
    here, there = (KeptClips(thinker, Encoded(processor, groups, FRAMES, 6, True), n, "clips") for n in (0, 1))
    for one, other in zip(here.clips[0], there.clips[0], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(here.features[0], there.features[0])


def without_ids(batch):
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}


# The testbed.


def test_answers_are_those_of_the_ordinary_path(testbed, processor):
    row = testbed(CELL | {"method": "uniform-stride", "keep_ratio": 0.25})
    thinker = testbed.model.thinker
    model = CompressedOmni(thinker, build_for(thinker, "uniform-stride", keep_ratio=0.25)).eval()
    encoder = VideoEncoder(processor, num_frames=FRAMES, timestamps=TIMESTAMPS)
    collate = OmniCollator(0, "left")
    for task, (_, answer) in row["examples"].items():
        asked = next(q for q in testbed.questions if q.kind.task == task)
        inputs = without_ids(collate([encoder(asked.record, True)]))
        told = model.generate(**inputs, max_new_tokens=testbed_module.NEW_TOKENS[task])
        assert processor.tokenizer.decode(told[0], skip_special_tokens=True).strip() == answer
    assert row["questions"] == len(testbed.questions)


def test_a_model_without_a_compressor_is_asked_as_it_is(testbed):
    told = testbed.answers(testbed.model)
    assert told.keys() == {q.record.id for q in testbed.questions}
    for task, (_, answer) in testbed(CELL)["examples"].items():
        asked = next(q for q in testbed.questions if q.kind.task == task)
        assert told[asked.record.id] == answer
    begun = testbed.answers(testbed.model, longest=1)
    assert begun != told
    assert all(told[name].startswith(text) for name, text in begun.items())


def test_tokens_are_counted_once_per_clip(testbed):
    full, quarter, joint = (
        testbed(CELL | {"method": name, "keep_ratio": ratio})
        for name, ratio in (("none", None), ("uniform-stride", 0.25), ("omnizip", 0.2))
    )
    sample = testbed.asked.clips[0][0]["input_ids"]
    ids = testbed.model.token_ids
    audio, video = (int((sample == token).sum()) for token in (ids.audio, ids.video))
    assert full["tokens"] == {"audio": [audio, audio], "video": [video, video]}
    assert full["kept"] == {"audio": 1, "video": 1, "both": 1}
    assert full["density"] == {"while_heard": 25, "elsewhere": 25}
    assert full["tokens_per_second"] == 25
    assert quarter["tokens"]["video"] == [video, video]
    assert quarter["kept"]["audio"] == pytest.approx(0.25, abs=0.01)
    assert quarter["density"]["while_heard"] == pytest.approx(6.25, rel=0.1)
    assert joint["kept"]["both"] == pytest.approx(0.2, abs=0.01)
    assert joint["media_tokens_per_second"] == pytest.approx(0.2 * full["media_tokens_per_second"], rel=0.02)
    assert (joint["stage"], quarter["stage"]) == ("joint", "connector")


def test_rooms_decide_about_batches_not_about_answers(testbed):
    model = CompressedOmni(testbed.model.thinker, build_for(testbed.model.thinker, "none")).eval()
    sample = testbed.asked.samples(model.compressor)[0][0]
    length = len(sample["input_ids"])
    assert testbed._size(model, sample) == length + length // WAITING
    testbed.room = 10
    assert list(testbed._batches([4, 2, 11, 3])) == [[1, 3], [0], [2]]
    whole = testbed(CELL)
    testbed.room = 1  # a batch has one clip at least
    assert whole["by_clip"] == testbed(CELL)["by_clip"]


def test_training_learns_and_leaves_no_trace(testbed):
    before = testbed(CELL)
    llm = parts.language_model(testbed.model.thinker)
    weights = {name: p.clone() for name, p in llm.named_parameters()}
    first = testbed(CELL | {"method": "pooling", "keep_ratio": 0.25, "steps": 1})
    later = testbed(CELL | {"method": "pooling", "keep_ratio": 0.25, "steps": 12})
    again = testbed(CELL | {"method": "pooling", "keep_ratio": 0.25, "steps": 12})
    other = testbed(CELL | {"method": "pooling", "keep_ratio": 0.25, "steps": 12, "seed": 1})
    assert later["train_loss"] < first["train_loss"] - 0.1
    assert later["train_loss"] == again["train_loss"] != other["train_loss"]
    assert {name: p.equal(weights[name]) for name, p in llm.named_parameters()} == dict.fromkeys(weights, True)
    clean = testbed(CELL)
    assert {k: clean[k] for k in ("examples", "by_clip")} == {k: before[k] for k in ("examples", "by_clip")}


def test_methods_with_weights_are_trained_or_refused(testbed):
    with pytest.raises(ValueError, match=r"stacking has weights to train: give steps, or a saved variant"):
        testbed(CELL | {"method": "stacking", "keep_ratio": 0.25})
    row = testbed(CELL | {"method": "stacking", "keep_ratio": 0.25, "steps": 2})
    assert row["trained"]
    assert row["kept"]["audio"] == pytest.approx(0.25, abs=0.01)


def test_a_saved_variant_is_measured_with_its_own_method(testbed, processor):
    thinker = testbed.model.thinker
    variant = CompressedOmni(thinker, build_for(thinker, "stacking", keep_ratio=0.5)).eval()
    own = TimeTestbed(variant, processor, testbed.clips, num_frames=FRAMES, room=8_000)
    assert own(CELL | {"method": "stacking"})["config"]["keep_ratio"] == 0.5
    with pytest.raises(ValueError, match=r"the model is a variant with stacking, got a cell of ward"):
        own(CELL | {"method": "ward"})


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Recipe)])
def test_a_recipe_is_positive(name):
    with pytest.raises(ValueError, match=rf"{name} must be .*, got 0"):
        Recipe(**{name: 0})


# The command.


@pytest.fixture
def command(monkeypatch, testbed, data_set, tmp_path):  # noqa: F811
    monkeypatch.setattr(TimeSettings, "open", lambda *_: testbed)

    def run(*options):
        output = ["--output", str(tmp_path / "rows.jsonl"), "--device", "cpu", "--commit", "abc"]
        monkeypatch.setattr(sys, "argv", ["events.py", str(data_set), *output, *options])
        events.main()
        return [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]

    return run


def test_the_command(command, capsys):
    rows = command("--methods", "omnizip", "--keep-ratios", "0.2", "--seeds", "0", "1")
    methods = [row["method"] for row in rows]
    assert methods == [name for name in ("none", "random", "uniform-stride", "omnizip") for _ in range(2)]
    assert {row["testbed"] for row in rows} == {"time"}
    assert rows[0]["data"]["seconds"] == [24, 27]
    assert {row["status"] for row in rows} == {"ok"}
    assert len(command("--methods", "omnizip", "--keep-ratios", "0.2", "--seeds", "0", "1")) == len(rows)
    assert "| `omnizip` | 0 | 1 |" in capsys.readouterr().out


def test_cells_tell_how_many_clips_they_are_of(data_set, tmp_path):  # noqa: F811
    clips = len(load_clips(data_set, "test"))
    settings = TimeSettings(str(data_set))
    assert settings.common()["clips"] == clips
    assert TimeSettings(str(data_set), limit=1).common()["clips"] == 1
    assert settings.training()["train_clips"] == len(json.loads((data_set / "train.json").read_text()))
    with pytest.raises(ValueError, match=r"unseen-annotations.json is missing; python benchmarks/timeline.py"):
        TimeSettings(str(data_set), split="unseen").common()


def test_the_command_on_a_saved_variant(data_set, processor, tmp_path, monkeypatch, capsys):  # noqa: F811
    write_checkpoint(tmp_path / "base", tiny_thinker(processor))
    base = str(tmp_path / "base")
    opened, _ = audiopress.load(base, compressor="ward", keep_ratio=0.5, device="cpu")
    opened.positions = "contiguous"
    opened.save_pretrained(tmp_path / "variant")
    rows = tmp_path / "rows.jsonl"
    options = ["--model", str(tmp_path / "variant"), "--keep-ratios", "0.25", "--num-frames", "4", "--workers", "0"]
    monkeypatch.setattr(
        sys, "argv", ["events.py", str(data_set), *options, "--device", "cpu", "--output", str(rows), "--commit", "a"]
    )
    events.main()
    (row,) = [json.loads(line) for line in rows.read_text().splitlines()]
    assert (row["status"], row["method"], row["positions"]) == ("ok", "ward", "contiguous")
    assert row["kept"]["audio"] == pytest.approx(0.25, abs=0.01)
    assert len(row["weights"]) == 64
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--steps", "3"])
    with pytest.raises(SystemExit):
        events.main()
    assert "is a saved variant with its own method: give no --methods and no --steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "0"], "limit must be a whole number >= 1, got 0"),
        (["--methods", "stacking"], "stacking has weights to train: give --steps, or --model a saved variant"),
        (["--methods", "nothing"], "nothing"),
        (["--keep-ratios", "2"], "keep_ratio is tokens out / tokens in and must be in (0, 1], got 2.0"),
        (["--seeds", "-1"], "--seeds must be a whole number >= 0, got -1"),
        (["--steps", "-1"], "--steps must be a whole number >= 0, got -1"),
        (["--lora-r", "0", "--steps", "1"], "lora_r must be a whole number >= 1, got 0"),
    ],
)
def test_mistakes_are_told_in_one_line(command, capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        command(*options)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
