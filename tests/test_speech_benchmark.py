"""The speech benchmark: clips, spelling, scores, cells, training and the command, on a tiny Whisper and noise."""

import dataclasses
import json
import re
import sys

import pytest
import torch
from tiny_whisper import STEPS, make_whisper, records

from audiopress.benchmarks import speech
from audiopress.benchmarks.words import cells as cells_module
from audiopress.benchmarks.words import training as training_module
from audiopress.benchmarks.words.cells import FIRST
from audiopress.benchmarks.words.clips import Clip, make_clips
from audiopress.benchmarks.words.spelling import spelled
from audiopress.benchmarks.words.training import Settings, SpeechTraining
from audiopress.models import whisper as models_whisper
from audiopress.models.whisper import Transcript


@pytest.fixture(scope="module")
def whisper():
    return make_whisper()


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(models_whisper, "MAX_NEW_TOKENS", STEPS)


def test_prompts_are_joined_to_full_clips(tmp_path, caplog):
    prompts = records(tmp_path, [0.5, 0.3, 0.2, 0.9, 0.1, 0.4, 1.5])
    clips = make_clips(prompts, "en", 1.0, joined=True, limit=None)
    assert "1 of 7 prompts in 'en' are left out: longer than 1 s" in caplog.text
    assert sorted(p.id for clip in clips for p in clip.prompts) == [f"en/{i}" for i in range(6)]
    assert len(clips) == 3, "2.4 s in all"
    assert all(clip.seconds <= 1.0 for clip in clips)
    assert clips == make_clips(prompts, "en", 1.0, joined=True, limit=None)
    for clip in clips:
        assert clip.text == " ".join(p.reference for p in clip.prompts)
        assert len(clip.sound()) == round(16_000 * clip.seconds)
    single = make_clips(prompts, "en", 1.0, joined=False, limit=4)
    assert [len(clip.prompts) for clip in single] == [1, 1, 1, 1]


def test_scores_by_hand(tmp_path):
    clips = [
        Clip("en", tuple(records(tmp_path, [0.1, 0.1]))),
        *(Clip("fr", (record,)) for record in records(tmp_path, [0.1], "fr")),
    ]
    written = [Transcript("Say A 20, say B.", True), Transcript("say 20 x", False)]
    found = speech.scores(clips, written)
    # English numbers are spelled alike, and a "20" is missing
    assert found["errors_by_clip"] == (1, 2)
    assert found["words_by_clip"] == (6, 3)
    assert found["wer"] == pytest.approx(3 / 9)
    assert found["ran_away"] == 1
    assert [(lang, x["clips"], x["wer"]) for lang, x in found["by_language"].items()] == [
        ("en", 1, 1 / 6),
        ("fr", 1, 2 / 3),
    ]

    rows = [{"method": "none", "tokens_per_second": 25, "status": "ok", "steps": 0, **found}]
    better = speech.scores(clips, [Transcript(clip.text, True) for clip in clips])
    rows.append({"method": "ward", "tokens_per_second": 6.25, "status": "ok", "steps": 0, **better})
    rows.append({"method": "lost", "status": "failed", "steps": 0, "message": "ValueError: no"})
    *_, none, ward, lost = speech.table(rows).splitlines()
    assert none.startswith("| `none` | 25 | 33.3 [16.7, 66.7] |  |")
    assert ward.startswith("| `ward` | 6.25 | 0.0 [0.0, 0.0] | -33.3 [-66.7, -16.7] | 0.0 | 0 of 2 |")
    assert "ValueError: no" in lost


def test_english_is_spelled_as_by_whispers_authors():
    assert spelled("Press twenty-one, or don't!", "en").split() == ["press", "21", "or", "do", "not"]


@pytest.mark.parametrize(
    ("language", "digits", "words"),
    [
        ("es", "Marque 1, o 21; último", "marque uno o veintiuno ultimo"),
        ("fr", "Appuyez sur 71.", "appuyez sur soixante et onze"),
        ("it", "premere 3 è 16", "premere tre e sedici"),
        ("ru", "Нажмите 4 ещё", "нажмите четыре еще"),
        ("fr", "le 0800 1234567", "le zero huit zero zero un deux trois quatre cinq six sept"),
    ],
)
def test_numbers_are_spelled_as_words(language, digits, words):
    assert spelled(digits, language).split() == words.split()
    assert spelled(words, language).split() == words.split(), "what is spelled already stays"


@pytest.fixture
def run(whisper, monkeypatch, tmp_path, capsys):
    """Runs the benchmark on the tiny Whisper and prompts of noise; gives its rows and what it prints."""
    made = {language: records(tmp_path, [0.5, 0.3, 0.2, 0.9], language) for language in ("en", "fr")}
    monkeypatch.setattr(speech, "load_whisper", lambda name: whisper)
    for module in (speech, training_module):
        monkeypatch.setattr(module, "speech_records", lambda split, languages: made[languages[0]])
    monkeypatch.setattr(training_module, "is_right", lambda clip, transcript: True)  # random weights never are
    for module in (speech, cells_module):
        monkeypatch.setattr(module, "SECONDS", {False: 1.0, True: 1.0})

    def main(*options):
        output = tmp_path / "rows.jsonl"
        monkeypatch.setattr(
            sys, "argv", ["speech", "--device", "cpu", "--commit", "a", "--output", str(output), *options]
        )
        speech.main()
        return [json.loads(line) for line in output.read_text().splitlines()], capsys.readouterr().out

    return main


def test_a_row_for_every_cell(run):
    options = ["--methods", "ward", "atome:encoder", "--rates", "12.5", "5", "--languages", "en", "--splits", "test"]
    rows, printed = run(*options)
    assert [row.get("message") for row in rows] == [None] * len(rows)
    cells = [(row["method"], row["keep_ratio"], row["joined"]) for row in rows]
    several = [(name, r) for name in ("random", "uniform-stride", "ward", "atome:encoder") for r in (0.5, 0.2)]
    assert cells == [(*cell, j) for cell in [("transformers", None), ("none", None), *several] for j in (True, False)]
    for row in rows:
        assert row["clips"] == (2 if row["joined"] else 4)
        assert row["prompts"] == 4
        assert row["audio_seconds"] == pytest.approx(1.9)
        assert row["wer_interval"][0] <= row["wer"] <= row["wer_interval"][1]
        wanted = {"transformers": 50, "none": 25}.get(row["method"]) or 25 * row["keep_ratio"]
        assert row["tokens_per_second"] == pytest.approx(wanted, rel=0.06 if row["joined"] else 0.2)
        assert (row["trained"], row["query_aware"], row["steps"], row["seed"]) == (False, False, 0, None)
        stages = {"transformers": None, "none": None, "atome:encoder": "encoder"}
        assert row["stage"] == stages.get(row["method"], "connector")
    assert sum(line.startswith("| `") for line in printed.splitlines()) == len(rows)
    assert run(*options)[0] == rows, "what is there is not measured again"
    assert len(run(*options, "--joined", "--limit", "1")[0]) == 1.5 * len(rows)


def test_several_languages(run):
    rows, _ = run("--methods", "ward", "--rates", "5", "--languages", "en", "fr", "--single")
    assert [row["status"] for row in rows] == ["ok"] * 5
    assert [list(row["by_language"]) for row in rows] == [["en", "fr"]] * 5


TRAIN = ["--languages", "en", "--splits", "test", "--joined", "--train-steps", "3", "--train-batch", "2"]


def test_what_has_weights_is_trained(run):
    options = ["--methods", "ward-refined", "stacking", "--rates", "12.5", "6.25", "--seeds", "0", "7", *TRAIN]
    rows, printed = run(*options)
    assert [row.get("message") for row in rows] == [None] * len(rows)
    trained = [row for row in rows if row["steps"]]
    cells = [(row["method"], row["seed"], row["elastic"], row["keep_ratio"]) for row in trained]
    want = []
    for seed in (0, 7):
        want += [("ward-refined", seed, True, ratio) for ratio in (0.5, 0.25, 1.0)]
        want += [(name, seed, False, ratio) for ratio in (0.25, 0.5, 1.0) for name in ("ward-refined", "stacking")]
    assert cells == want
    for row in trained:
        assert row["trained"]
        assert row["steps"] == 3
        assert row["training_seconds"] > 0
        assert 0 < row["training_losses"]["cross_entropy"] < 50
        assert row["tokens_per_second"] == pytest.approx(25 * row["keep_ratio"], rel=0.15)
    elastic = [row for row in trained if row["elastic"] and row["seed"] == 0]
    assert len({row["training_seconds"] for row in elastic}) == 1, "trained once for all rates"
    assert "`ward-refined`, elastic, seed 7" in printed
    assert not [row for row in run(*options[:-4], "--train-steps", "0")[0][len(rows) :] if row["steps"]]


def test_shards_are_all_cells(run):
    options = ["--methods", "ward-refined", "ward", "--rates", "5", *TRAIN, "--seeds", "0"]
    parts = [run(*options, "--shard", shard)[0] for shard in ("1/2", "2/2")]
    # the second finds the rows of the first in the same file
    rows = [(row["method"], row["keep_ratio"], row["elastic"]) for row in parts[1]]
    assert 0 < len(parts[0]) < len(rows) == len(set(rows)) == 9
    first, second = ({row["method"] for row in part} for part in (parts[0], parts[1][len(parts[0]) :]))
    assert first.isdisjoint(second), "a method's rate of learning is chosen once"
    assert run(*options)[0] == parts[1]


@pytest.fixture
def training(whisper, monkeypatch, tmp_path):
    made = records(tmp_path, [0.5, 0.3, 0.2, 0.9])
    monkeypatch.setattr(training_module, "speech_records", lambda split, languages: made if split == "train" else [])
    monkeypatch.setattr(training_module, "is_right", lambda clip, transcript: True)  # random weights never are
    return SpeechTraining(whisper, Settings(("en",), 1.0, batch=4, rates=(3e-3,)))


@pytest.mark.parametrize("method", ["ward-refined", "stacking", "pooling:qwen2-audio", "fastlongspeech"])
def test_training_lowers_the_loss_and_leaves_whisper_alone(training, method):
    whisper = training.whisper
    before = {name: p.clone() for name, p in whisper.model.named_parameters()}
    ratio = None if ":" in method else 0.25
    runs = [training(method, [ratio], steps, seed) for steps, seed in ((1, 0), (30, 0), (30, 0), (30, 1))]
    with torch.no_grad():  # of one step the warm-up makes nothing: that is how it starts
        losses = [sum(training._losses(training.lessons, run.compressor)[:2]) for run in runs]
    assert losses[1] < losses[0]
    assert losses[2] == losses[1], "the same seed gives the same weights"
    assert losses[3] != losses[1]
    assert all(torch.equal(p, before[name]) for name, p in whisper.model.named_parameters())


def test_each_method_gets_the_rate_of_learning_that_does_best_on_held_back_prompts(training, monkeypatch):
    training.settings = dataclasses.replace(training.settings, rates=(3e-3, 1e-9))
    with pytest.raises(ValueError, match="to choose among 2 rates of learning, more prompts must be there"):
        training("stacking", [0.5], 1, 0)
    monkeypatch.setattr(training_module, "HELD_BACK", 0.5)
    training.lessons = []
    best = training("ward-refined", [0.5, 0.25], 30, 1)
    assert best.rate == 3e-3 == min(best.held_back, key=best.held_back.get)
    assert set(best.held_back) == {3e-3, 1e-9}
    row = best.row()
    assert (row["train_rate"], list(row["held_back_losses"])) == (3e-3, ["0.003", "1e-09"])
    assert 0 < len(training.held_back) <= training.settings.batch, "one batch"
    own = training._train("ward-refined", [None], 30, 0, 3e-3)
    with torch.no_grad():
        cross_entropy, distillation, _ = training._losses(training.held_back, own.compressor)
    want = cross_entropy + training_module.DISTILLATION * distillation
    assert best.held_back[3e-3] == pytest.approx(float(want), rel=1e-4)
    trainings = []
    monkeypatch.setattr(training, "_train", lambda *how: trainings.append(how) or own)
    assert training("ward-refined", [0.25], 30, 2).held_back == best.held_back
    assert trainings == [("ward-refined", [0.25], 30, 2, 3e-3)], "chosen once for all ratios and seeds"


def test_a_rate_that_diverges_is_left_out(training, monkeypatch):
    monkeypatch.setattr(training_module, "HELD_BACK", 0.5)
    training.settings = dataclasses.replace(training.settings, rates=(1e30, 3e-3))
    best = training("stacking", [0.5], 4, 0)
    assert (best.rate, set(best.held_back)) == (3e-3, {3e-3})
    for rates in ((1e30,), (1e30, 1e29)):
        training.settings, training.chosen = dataclasses.replace(training.settings, rates=rates), {}
        with pytest.raises(ValueError, match="the loss of stacking became infinite"):
            training("stacking", [0.5], 4, 0)


def test_held_back_prompts_are_not_learned(training, monkeypatch):
    taught = []
    monkeypatch.setattr(training_module, "HELD_BACK", 0.5)
    monkeypatch.setattr(training, "_teach", lambda parts: taught.append([c for p in parts for c in p]) or [None])
    training._encode()
    learned, held_back = ({prompt.audio for clip in clips for prompt in clip.prompts} for clips in taught)
    assert (len(learned), len(held_back)) == (2, 2)
    assert not learned & held_back


def test_the_teacher_has_nothing_to_teach_where_nothing_is_left_out(training, monkeypatch):
    """The student that hears what the teacher hears agrees with it."""
    whisper = training.whisper
    lessons, _ = training._encode()
    parts = [lesson.spoken for lesson in lessons]
    assert len(lessons) > len(training_module.JOINS), "each join gives a clip or more"
    assert all(part.speech.lengths[0] + part.silence.lengths[0] == 25 for part in parts)
    _, kept, _ = training._losses(lessons[:2], whisper.build("none"))
    _, pooled, _ = training._losses(lessons[:2], whisper.build("pooling", keep_ratio=0.1))
    assert 0 <= kept < pooled


def test_what_the_teacher_gets_wrong_is_not_taught(whisper, monkeypatch, tmp_path):
    made = records(tmp_path, [0.2])
    clip = Clip("en", tuple(made))
    text = made[0].reference  # of three words
    assert training_module.is_right(clip, Transcript(text.upper(), True))
    assert not training_module.is_right(clip, Transcript(text, False))
    assert not training_module.is_right(clip, Transcript(f"{text} {text}", True))
    monkeypatch.setattr(training_module, "speech_records", lambda split, languages: made)
    with pytest.raises(ValueError, match="of 5 clips to train on the teacher transcribes none"):
        SpeechTraining(whisper, Settings(("en",), 1.0))("stacking", [None], 1, 0)


def test_what_acts_inside_the_encoder_is_not_trained(training):
    with pytest.raises(ValueError, match=r"atome:encoder\+pooling acts inside the encoder"):
        training("atome:encoder+pooling", [None], 1, 0)


def test_the_most_telling_cells_come_first(whisper):
    methods = [*FIRST[:2], *cells_module.methods_for(whisper)]
    ratios = [0.5, 1 / 3, 0.25, 0.2, 0.125]
    groups = cells_module.speech_cells(whisper, methods, ratios, [True, False], {"steps": 5}, (0, 1))
    order = [group[0]["method"] for group in groups]
    assert [group[0]["seed"] for group in groups] == sorted((g[0]["seed"] for g in groups), key=(None, 0, 1).index)
    free = [name for name, group in zip(order, groups, strict=True) if not group[0]["steps"]]
    known = [name for name in FIRST if name in free]
    assert free[: len(known)] == known, "before all others"
    seed = [group[0] for group in groups if group[0]["seed"] == 0]
    assert seed[0] == seed[0] | {"method": "ward-refined", "elastic": True}
    rates = [(cell["elastic"], cell["keep_ratio"]) for cell in seed if cell["keep_ratio"]]
    assert list(dict.fromkeys(rates)) == [(True, 0.5), *((False, ratio) for ratio in (0.25, 0.2, 1 / 3, 0.125, 0.5, 1))]
    cells = [cell for group in groups for cell in group]
    assert len(cells) == len({json.dumps(cell, sort_keys=True) for cell in cells})
    # in-encoder variants are measured at every rate, presets that differ by their rate alone once
    for method in ("ward:encoder", "atome:encoder", "attention-topk:topk-ast", "ward"):
        assert [cell["keep_ratio"] for cell in cells if cell["method"] == method] == [r for r in ratios for _ in (0, 1)]
    names = set(order)
    assert "pooling:qwen2.5-omni" not in names
    assert {"affinity:conservative", "qformer:mms-llama", "conv:lucy"} <= names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "speechprune"], "speechprune reads first_layer, question, which Whisper has not"),
        (["--methods", "wards"], "did you mean 'ward'"),
        (["--methods", "ward", "--rates", "30"], r"keep_ratio .* must be in \(0, 1\], got 1\.2"),
        (["--methods", "ward", "--limit", "0"], "--limit must be 1 or more, got 0"),
        (["--methods", "ward", "--train-steps", "-1"], "--train-steps must be 0 or more, got -1"),
        (["--methods", "ward", "--shard", "3/2"], "--shard must be I/N with I from 1 to N, got '3/2'"),
        (["--joined", "--single"], "argument --single: not allowed with argument --joined"),
    ],
)
def test_wrong_options_end_with_one_line(run, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        run(*options, "--languages", "en")
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
