"""LongVALE's evaluation as its users run it: hand-made logs against the official scores, and whole runs on videos."""

import json
import logging
import sys

import pytest
import torch
from test_captions import needs_java, needs_scorers
from test_collator import write_clip
from test_dense_captions import WordScorer
from tiny import tiny_processor, tiny_thinker, write_checkpoint
from transformers import PreTrainedTokenizerFast

import audiopress
from audiopress.benchmarks import longvale
from audiopress.benchmarks.captions import NEEDS_JAVA, CaptionScorer
from audiopress.benchmarks.longvale_scores import TASKS, read_log, read_truths, score, table, write_log
from audiopress.data.collator import Encoder, OmniCollator
from audiopress.data.longvale import load_queries
from audiopress.models import CompressedOmni

ANNOTATIONS = {
    "abc": {
        "duration": 200.0,
        "timestamps": [[10.1, 30], [30, 90], [166.2, 200]],
        "sentences": [
            "A dog barks at a man in a red shirt.",
            "The man sings and plays the guitar.",
            "It rains on the roof.",
        ],
    },
    "xyz": {"duration": 50, "timestamps": [[0, 50]], "sentences": ["A man speaks to a crowd."]},
}
DENSE = (
    "From 05 to 15, A dog barks at a man.\nFrom 16 to 40, The man plays the guitar.\n"
    "From 60 to 75, A car passes by the roof."
)
ANSWERS = {
    ("captioning", "abc", None): DENSE,
    ("grounding", "abc", 0): "From 05 to 15.",
    ("grounding", "abc", 1): "From 20.5% to 40.0%.",
    ("grounding", "abc", 2): "between 70 and 99",
    ("seg_captioning", "abc", 0): "A dog barks loudly at a man in a shirt.",
    ("seg_captioning", "abc", 1): "A woman plays the guitar.",
    ("seg_captioning", "abc", 2): "It rains on the roof of the car.",
    ("captioning", "xyz", None): "Nothing happens.",
    ("grounding", "xyz", 0): "From 9 to 5.",
    ("seg_captioning", "xyz", 0): "A man speaks to a crowd of people.",
}
# What LongVALE's own script prints for these answers.
OFFICIAL = {
    "captioning": {"METEOR": 15.5264, "CIDEr": 151.0787},
    "grounding": {"mIoU": 38.25, "R@0.3": 50, "R@0.5": 50, "R@0.7": 25},
    "seg_captioning": {"BLEU-4": 54.74, "METEOR": 43.16, "ROUGE_L": 76.70, "CIDEr": 568.17},
}


def write_json(path, value):
    path.write_text(json.dumps(value))
    return path


@pytest.fixture
def truths(tmp_path):
    return read_truths(write_json(tmp_path / "annotations.json", ANNOTATIONS))


# Logs and scores.


def test_the_log_is_longvales(tmp_path, truths):
    write_log(tmp_path / "log", dict(reversed(ANSWERS.items())), truths)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [(line["task"], line["video_id"], line.get("info", {}).get("sentence_id")) for line in lines] == [*ANSWERS]
    assert lines[0] == {"video_id": "abc", "task": "captioning", "query_id": 0, "answer": DENSE}
    assert lines[1]["info"] == {"sentence_id": 0, "iou": 1.0}
    assert [line["info"]["iou"] for line in lines if line["task"] == "grounding"] == [1.0, 0, 0.53, 0]
    assert lines[4]["info"] == {"sentence_id": 0}
    assert read_log(tmp_path / "log", truths) == ANSWERS


def test_the_last_answer_counts(tmp_path, truths):
    write_log(tmp_path / "log", ANSWERS, truths)
    again = {"video_id": "xyz", "task": "grounding", "query_id": 0, "answer": "new", "info": {"sentence_id": 0}}
    with (tmp_path / "log").open("a") as file:
        file.write(json.dumps(again) + "\n")
    assert read_log(tmp_path / "log", truths) == ANSWERS | {("grounding", "xyz", 0): "new"}


LINE = {"video_id": "abc", "task": "grounding", "query_id": 0, "answer": "x", "info": {"sentence_id": 0}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no answers"),
        ("{", "line 1 is no answer"),
        (json.dumps({**LINE, "info": {}}), "line 1 is no answer .*sentence_id"),
        (json.dumps({**LINE, "answer": None}), "line 1 must be of a task in captioning, grounding, seg_captioning"),
        (json.dumps({**LINE, "task": "summary"}), "line 1 must be of a task"),
        (json.dumps({**LINE, "video_id": "lost"}), "line 1: the annotations have no event 0 of video 'lost'"),
        (json.dumps({**LINE, "info": {"sentence_id": 3}}), "line 1: the annotations have no event 3 of video 'abc'"),
    ],
)
def test_bad_logs(tmp_path, truths, text, message):
    (tmp_path / "log").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_log(tmp_path / "log", truths)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "must hold a JSON dict with entries, got"),
        ({"abc": {"duration": 3, "sentences": []}}, "video 'abc' must be .*KeyError 'timestamps'"),
        ({"abc": {"duration": 3, "timestamps": [[0, 1]], "sentences": []}}, "video 'abc' must be .*shorter"),
        ({"abc": {"duration": 0, "timestamps": [], "sentences": []}}, "duration must be positive seconds, got 0"),
    ],
)
def test_bad_annotations(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_truths(write_json(tmp_path / "a.json", content))


def test_grounding_scores_are_the_official_ones(truths):
    metrics = score({key: text for key, text in ANSWERS.items() if key[0] == "grounding"}, truths, None)
    assert list(metrics) == ["grounding"]
    found = metrics["grounding"]
    assert {name: found["official"][name] for name in OFFICIAL["grounding"]} == OFFICIAL["grounding"]
    assert (found["answers"], found["official"]["parsed"], found["tolerant"]["parsed"]) == (4, 50, 100)
    assert found["tolerant"]["mIoU"] > found["official"]["mIoU"]
    assert found["tolerant"]["swapped"] == 1


@needs_scorers
@pytest.mark.parametrize("java", [False, pytest.param(True, marks=needs_java)])
def test_caption_scores_are_the_official_ones(truths, java):
    # The plain tokenizer cuts these captions as the official one does.
    metrics = score(ANSWERS, truths, CaptionScorer(java))
    for task in ("captioning", "seg_captioning"):
        found = metrics[task]["official"]
        assert metrics[task]["tokenizer"] == ("ptb" if java else "plain")
        for name, value in OFFICIAL[task].items():
            assert found[name] == (None if name == "METEOR" and not java else pytest.approx(value, abs=6e-3)), name
    assert (metrics["captioning"]["official"]["SODA_c"] is not None) == java
    assert metrics["captioning"]["official"]["parsed"] == 50


def test_pairs_are_by_name_and_not_by_place(truths):
    whole, turned = (score(dict(order), truths, WordScorer()) for order in (ANSWERS.items(), reversed(ANSWERS.items())))
    for task in TASKS:
        assert turned[task]["official"] == pytest.approx(whole[task]["official"]), task


def test_the_table_says_what_was_not_computed(truths):
    text = table(score(ANSWERS, truths, WordScorer(java=False)))
    assert f"| captioning | SODA_c | {NEEDS_JAVA} | {NEEDS_JAVA} |" in text
    assert f"| seg_captioning | METEOR | {NEEDS_JAVA} |  |" in text
    assert "| grounding | mIoU | 38.25 | 55.50 |" in text


# Whole runs.

EVENTS = {"duration": 2.0, "timestamps": [[0, 1], [1, 2]], "sentences": ["A dog barks.", "It rains."]}
VIDEOS = ["v0", "v1", "v2"]
QUESTIONS = 5 * len(VIDEOS)  # of each video two, two and one


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder, tiny_thinker(tiny_processor()))
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Clips of other pictures, with 2 s of sound, and one that is broken."""
    folder = tmp_path_factory.mktemp("videos")
    for i, name in enumerate(VIDEOS):
        write_clip(folder / f"{name}.mov", 4 + i, 2, 2)
    (folder / "bad.mov").write_bytes(b"no video")
    return folder


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, base, videos):
    """Runs the script inside this process, with words in common for scores; gives what it printed."""
    monkeypatch.setattr(longvale, "CaptionScorer", WordScorer)

    def call(*options, names=VIDEOS):
        annotations = write_json(tmp_path / "annotations.json", dict.fromkeys(names, EVENTS))
        fixed = ["--annotations", annotations, "--video-dir", videos, "--model", base, "--device", "cpu"]
        fixed += ["--num-frames", 4, "--max-new-tokens", 6, "--output", tmp_path / "out", "--commit", "abc"]
        monkeypatch.setattr(sys, "argv", ["longvale.py", *map(str, [*fixed, *options])])
        longvale.main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def asked(monkeypatch):
    """Counts the questions that the model is asked."""
    counts = []
    generate = CompressedOmni.generate

    def counted(self, input_ids, *args, **options):
        counts.append(len(input_ids))
        return generate(self, input_ids, *args, **options)

    monkeypatch.setattr(CompressedOmni, "generate", counted)
    return counts


def rows_of(folder):
    return [json.loads(line) for path in sorted(folder.glob("answers-*")) for line in path.read_text().splitlines()]


def test_a_whole_run(run, tmp_path, asked):
    printed = run("--compressor", "uniform-stride", "--keep-ratio", 0.2)
    rows = rows_of(tmp_path / "out")
    assert [row["status"] for row in rows] == ["ok"] * QUESTIONS
    assert asked == [1] * QUESTIONS
    assert all(isinstance(row["answer"], str) and row["seconds"] > 0 for row in rows)
    assert [row["tokens"]["audio"] for row in rows if "tokens" in row] == [[50, 10]] * 3
    truths = read_truths(tmp_path / "annotations.json")
    answers = read_log(tmp_path / "out/longvale.log", truths)
    assert answers == {(row["task"], row["video_id"], row["sentence_id"]): row["answer"] for row in rows}
    report = json.loads((tmp_path / "out/longvale.metrics.json").read_text())
    assert report["metrics"] == score(answers, truths, WordScorer())
    assert (report["kept"]["audio"], report["audio_tokens_per_second"]) == (0.2, 5.0)
    assert (report["questions"], report["failed"], report["skipped_videos"]) == (QUESTIONS, 0, {})
    assert report["settings"]["compressor"] == "uniform-stride"
    assert report["environment"]["commit"] == "abc"
    assert printed.strip() == table(report["metrics"])
    assert len(printed.splitlines()) == 2 + 4 + 5 + 2  # the stand-in has two scores of captions


def test_every_question_gets_its_own_answer(run, tmp_path, base, videos, monkeypatch):
    """In a batch, padded, and with media decoded once for several questions, the model is asked what it is alone."""

    def told(self, input_ids, attention_mask, pixel_values_videos, input_features, **options):
        places = torch.arange(input_ids.shape[1], 0, -1)  # from the end: the padding is on the left
        seen = pixel_values_videos.chunk(len(input_ids)), input_features.chunk(len(input_ids))
        media = [int((a.abs().sum() + b.abs().sum()) % 997) for a, b in zip(*seen, strict=True)]
        return torch.stack([(input_ids * attention_mask * places).sum(1), torch.tensor(media)], dim=1)

    decoded = lambda self, ids, **options: [" ".join(map(str, row)) for row in ids.tolist()]  # noqa: E731
    monkeypatch.setattr(CompressedOmni, "generate", told)
    monkeypatch.setattr(PreTrainedTokenizerFast, "batch_decode", decoded)
    run()
    alone = {(r["task"], r["video_id"], r["sentence_id"]): r["answer"] for r in rows_of(tmp_path / "out")}
    run("--batch-size", 2, "--output", tmp_path / "pairs")
    assert {(r["task"], r["video_id"], r["sentence_id"]): r["answer"] for r in rows_of(tmp_path / "pairs")} == alone
    assert len(set(alone.values())) == QUESTIONS
    processor = audiopress.load(base, device="cpu")[1]
    encoder = Encoder(processor, num_frames=4)
    for query in load_queries(tmp_path / "annotations.json", video_dir=videos):
        batch = OmniCollator(processor.tokenizer.pad_token_id, "left")([encoder(query.record, prompt_only=True)])
        assert alone[(query.task, *query.key)] == decoded(None, told(None, **batch))[0]


def test_media_are_decoded_once_per_video(run, monkeypatch):
    seen = []
    encode = Encoder._encode_video
    monkeypatch.setattr(Encoder, "_encode_video", lambda self, p, s: seen.append(p.stem) or encode(self, p, s))
    run()
    assert seen == VIDEOS


def test_shards_share_the_work(run, tmp_path, asked):
    assert "10 of 15 questions are asked" in run("--shard", "1/2")
    assert {row["video_id"] for row in rows_of(tmp_path / "out")} == {"v0", "v2"}
    assert not (tmp_path / "out/longvale.log").exists()
    assert "| grounding | mIoU |" in run("--shard", "2/2")
    assert sum(asked) == QUESTIONS
    sharded = (tmp_path / "out/longvale.log").read_text()
    run("--output", tmp_path / "whole")
    assert (tmp_path / "whole/longvale.log").read_text() == sharded


def test_what_is_answered_is_not_asked_again(run, tmp_path, asked, monkeypatch, caplog):
    run("--tasks", "grounding")
    assert sum(asked) == 6
    path = tmp_path / "out/answers-1-of-1.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:4]) + '\n{"task": "groun')  # stopped while writing
    with caplog.at_level(logging.WARNING):
        whole = run()
    assert "cut off" in caplog.text
    assert sum(asked) == 6 + QUESTIONS - 4
    assert len(read_log(tmp_path / "out/longvale.log", read_truths(tmp_path / "annotations.json"))) == QUESTIONS

    monkeypatch.setattr(audiopress, "load", lambda *args, **options: pytest.fail("nothing is left to ask"))
    assert run() == whole


def test_a_failure_is_a_row_and_is_asked_again(run, tmp_path, monkeypatch, caplog):
    generate = CompressedOmni.generate

    def failing(self, input_ids, *args, **options):
        failing.calls += 1
        if failing.calls in (2, 3):
            raise torch.OutOfMemoryError("no room\nmore")
        return generate(self, input_ids, *args, **options)

    failing.calls = 0
    monkeypatch.setattr(CompressedOmni, "generate", failing)
    printed = run(names=["v0", "bad"])
    rows = rows_of(tmp_path / "out")
    assert [row["status"] for row in rows] == ["ok", "oom", "oom", "ok", "ok"] + ["failed"] * 5
    assert rows[1]["message"] == "OutOfMemoryError: no room"
    assert "bad.mov: cannot be decoded" in rows[5]["message"]
    assert "7 of 10 questions failed and count 0" in printed
    lines = (tmp_path / "out/longvale.log").read_text().splitlines()
    assert len(lines) == 10  # LongVALE's script counts lines: none may be missing
    assert [json.loads(line)["answer"] for line in lines[5:]] == [""] * 5
    assert "5 of 10 questions failed" in run(names=["v0", "bad"])
    assert [row["status"] for row in rows_of(tmp_path / "out")[10:]] == ["ok"] * 2 + ["failed"] * 5


def test_a_video_that_is_not_there_is_told(run, tmp_path, capsys):
    printed = run(names=["v0", "lost"])
    assert "skipped 1 of 2 videos" in printed
    report = json.loads((tmp_path / "out/longvale.metrics.json").read_text())
    assert "no file lost" in next(iter(report["skipped_videos"].values()))
    with pytest.raises(SystemExit):
        run("--strict", names=["v0", "lost"])
    assert "holds no file lost" in capsys.readouterr().err


def test_a_saved_variant(run, tmp_path, base):
    model, _ = audiopress.load(base, "ward", keep_ratio=0.5, device="cpu")
    model.save_pretrained(tmp_path / "variant")
    run("--model", tmp_path / "variant", "--tasks", "grounding")
    report = json.loads((tmp_path / "out/longvale.metrics.json").read_text())
    assert report["kept"]["audio"] == 0.5
    assert len(report["settings"]["weights"]) == 64


def test_a_log_alone_is_scored(monkeypatch, capsys, tmp_path, truths):
    monkeypatch.setattr(longvale, "CaptionScorer", WordScorer)
    write_log(tmp_path / "their.log", ANSWERS, truths)
    options = ["--annotations", tmp_path / "annotations.json", "--score", tmp_path / "their.log"]
    monkeypatch.setattr(sys, "argv", ["longvale.py", *map(str, options)])
    longvale.main()
    found = json.loads((tmp_path / "their.metrics.json").read_text())["metrics"]
    assert found == score(ANSWERS, truths, WordScorer())
    assert capsys.readouterr().out.strip() == table(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--annotations", "nowhere.json"], "nowhere.json"),
        (["--score", "nowhere.log"], "nowhere.log"),
        (["--video-dir", "nowhere"], "nowhere is not a folder"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--compressor", "no-such"], "no-such"),
        (["--compressor", "conv:osum"], "conv:osum has weights to train"),
        (["--compressor", "ward", "--keep-ratio", "2"], "must be in (0, 1]"),
        (["--keep-ratio", "0.5"], "--keep-ratio goes with --compressor"),
        (["--tasks", "grouding"], "invalid choice: 'grouding'"),
        (["--time-format", "clock"], "invalid choice: 'clock'"),
        (["--shard", "3/2"], "--shard must be i/n with 1 <= i <= n, got '3/2'"),
        (["--shard", "0/2"], "got '0/2'"),
        (["--shard", "one"], "got 'one'"),
        (["--batch-size", "0"], "--batch-size must be positive, got 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be positive"),
        (["--num-frames", "-1"], "--num-frames must be positive"),
        (["--timestamps", "-1"], "--timestamps must be a whole number >= 0, got -1"),
        (["--max-audio-seconds", "nan"], "--max-audio-seconds must be positive, got nan"),
        (["--device", "abacus"], "abacus"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(run, capsys, tmp_path, options, message):
    with pytest.raises(SystemExit) as stopped:
        run(*options)
    assert stopped.value.code == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert message in told[-1]
    assert told[-1].startswith("error: ")
    assert not list((tmp_path / "out").glob("answers-*"))


def test_answers_of_other_settings_are_not_mixed(run, capsys, tmp_path):
    run("--tasks", "grounding")
    with pytest.raises(SystemExit):
        run("--tasks", "grounding", "--num-frames", 2)
    assert "holds answers of other settings (num_frames 4 != 2): change --output" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--tasks", "grounding", "--timestamps", "4")
    assert "(timestamps 0 != 4)" in capsys.readouterr().err
    assert len(rows_of(tmp_path / "out")) == 6


def test_no_scorers_are_told_before_anything_is_asked(run, capsys, monkeypatch, asked):
    def missing():
        raise ValueError("scores of captions need pycocoevalcap")

    monkeypatch.setattr(longvale, "CaptionScorer", missing)
    with pytest.raises(SystemExit):
        run()
    assert "need pycocoevalcap" in capsys.readouterr().err
    assert not asked
    assert "mIoU" in run("--tasks", "grounding")
