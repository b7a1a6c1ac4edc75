"""LongVALE's files as records: times, turns, prompts, and what is said of a file that is not right."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from audiopress.data.longvale import PROMPTS, format_time, load_dialogues, load_queries
from audiopress.data.records import Record, assistant, user
from audiopress.data.skips import SkipLog

GROUNDING = {
    "id": "abc",
    "conversations": [
        {"from": "human", "value": "<video>\nDuring which frames can we hear a dog?"},
        {"from": "gpt", "value": "From <s0> to <e0>."},
        {"from": "human", "value": "Explain what happened from <s1> to <e1> in the video."},
        {"from": "gpt", "value": "A cat meows."},
    ],
    "meta": {"duration": 200.0, "token": {"<s0>": 10.1, "<e0>": 30, "<s1>": 166.2, "<e1>": 199.9}},
}
CAPTIONING = {"id": "xyz", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Rain."}]}


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("abc.mp4", "xyz.webm"):
        (folder / name).touch()
    return folder


def write(folder: Path, content: Any) -> Path:
    """Writes a JSON file, or text as it is."""
    path = folder / "data.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def changed(**fields: Any) -> dict[str, Any]:
    """Gives GROUNDING with other fields; None takes one out."""
    return {key: value for key, value in {**GROUNDING, **fields}.items() if value is not None}


@pytest.mark.parametrize(
    ("seconds", "duration", "percent", "decimal"),
    [
        (0, 200, "00", "0.0%"),
        (10.1, 200, "05", "5.0%"),
        (5, 200, "02", "2.5%"),  # Python rounds halves to even, and so did LongVALE
        (166.2, 200, "83", "83.1%"),
        (199.9, 200, "99", "100.0%"),
        (200, 200, "99", "100.0%"),
        (250, 200, "99", "100.0%"),
    ],
)
def test_times(seconds: float, duration: float, percent: str, decimal: str) -> None:
    assert format_time(seconds, duration) == percent
    assert format_time(seconds, duration, "decimal") == decimal


def test_times_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="seconds from 0 on, got -1"):
        format_time(-1, 10)
    with pytest.raises(ValueError, match="positive seconds, got 0"):
        format_time(1, 0)
    with pytest.raises(ValueError, match="time_format must be one of percent, decimal, got 'clock'"):
        format_time(1, 10, "clock")  # type: ignore[arg-type]


def test_dialogues(tmp_path: Path, videos: Path) -> None:
    first, second = load_dialogues(write(tmp_path, [GROUNDING, CAPTIONING]), video_dir=videos)
    assert first == Record(
        "abc",
        (
            user("During which frames can we hear a dog?"),
            assistant("From 05 to 15."),
            user("Explain what happened from 83 to 99 in the video."),
            assistant("A cat meows."),
        ),
        audio=videos / "abc.mp4",
        video=videos / "abc.mp4",
        duration=200.0,
    )
    assert (second.id, second.duration, second.video) == ("xyz", None, videos / "xyz.webm")


def test_dialogues_in_decimals(tmp_path: Path, videos: Path) -> None:
    (record,) = load_dialogues(write(tmp_path, [GROUNDING]), video_dir=videos, time_format="decimal")
    assert record.messages[1]["content"] == "From 5.0% to 15.0%."


def test_turns(tmp_path: Path, videos: Path) -> None:
    path = write(tmp_path, [GROUNDING, CAPTIONING])
    single = load_dialogues(path, video_dir=videos, turns="single")
    assert [record.id for record in single] == ["abc#0", "abc#1", "xyz"]
    assert [len(record.messages) for record in single] == [2, 2, 2]
    assert {record.video for record in single[:2]} == {videos / "abc.mp4"}
    assert single[1].messages[0]["content"] == "Explain what happened from 83 to 99 in the video."
    mixed = load_dialogues(path, video_dir=videos, turns="mixed")
    assert [record.id for record in mixed] == ["abc", "xyz", "abc#0", "abc#1"]
    with pytest.raises(ValueError, match="turns must be one of multi, single, mixed, got 'both'"):
        load_dialogues(path, video_dir=videos, turns="both")  # type: ignore[arg-type]


def test_sound_in_files_of_its_own(tmp_path: Path, videos: Path) -> None:
    (tmp_path / "abc.wav").touch()
    path = write(tmp_path, [GROUNDING])
    (record,) = load_dialogues(path, video_dir=videos, audio_dir=tmp_path)
    assert (record.audio, record.video) == (tmp_path / "abc.wav", videos / "abc.mp4")
    (record,) = load_dialogues(path, audio_dir=tmp_path)
    assert (record.audio, record.video) == (tmp_path / "abc.wav", None)
    with pytest.raises(ValueError, match="give video_dir, audio_dir or both"):
        load_dialogues(path)
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        load_dialogues(path, video_dir="nowhere")


def test_several_dialogues_of_one_video_have_ids_of_their_own(tmp_path: Path, videos: Path) -> None:
    records = load_dialogues(write(tmp_path, [CAPTIONING, CAPTIONING, GROUNDING]), video_dir=videos)
    assert [record.id for record in records] == ["xyz", "xyz~1", "abc"]


def turn(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("text", r"\(id None\): 'id' is missing; it must be a str, got str 'text'"),
        (changed(id=None), "'id' is missing; it must be a str, got the keys conversations, meta"),
        (changed(id="lost"), r"\(id 'lost'\): .*videos holds no file lost with one of the endings .mp4 .mkv"),
        (changed(conversations=None), r"\(id 'abc'\): 'conversations' is missing; it must be a list, got the keys id"),
        (changed(conversations={}), "'conversations' must be a list, got {}"),
        (changed(conversations=[]), "'conversations' is empty"),
        (changed(conversations=GROUNDING["conversations"][:3]), "last turn is a human one"),  # type: ignore[index]
        (changed(conversations=[turn("robot", "hi")]), "turn 0: 'from' must be one of human, gpt, got 'robot'"),
        (changed(conversations=[{"from": "gpt"}]), "turn 0: 'value' is missing; it must be a str, got the keys from"),
        (changed(conversations=[turn("gpt", "hi")]), "message 0 must be of the user, got 'assistant'"),
        (changed(conversations=[turn("human", "<video>\n"), turn("gpt", "hi")]), r"message 0 \(of the user\) is empty"),
        (changed(conversations=[turn("human", "<image>\nhm"), turn("gpt", "hi")]), "turn 0 asks about an <image>"),
        (changed(conversations=[turn("human", "a"), turn("gpt", "<video>")]), "turn 1 holds a <video> too many"),
        (changed(meta=None), "time token <s0>, but 'meta' has no duration"),
        (changed(meta={"duration": 10, "token": {"<e0>": 1}}), "time token <s0>, but 'meta' gives only <e0>"),
        (changed(meta={"duration": -3}), "positive seconds, got -3|gives only none"),
        (changed(meta={"duration": 9, "token": {"<s0>": "1"}}), "a time must be seconds from 0 on, got '1'"),
        (changed(meta=[1]), r"'meta' must be a dict, got \[1\]"),
    ],
)
def test_a_bad_record_is_an_error_or_a_counted_skip(
    tmp_path: Path, videos: Path, entry: Any, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, [entry, CAPTIONING])
    with pytest.raises(ValueError, match=rf"data.json: record 0 .*({message})"):
        load_dialogues(path, video_dir=videos)
    skips = SkipLog()
    with caplog.at_level(logging.WARNING):
        assert [record.id for record in load_dialogues(path, video_dir=videos, skips=skips)] == ["xyz"]
        assert skips.report(2) == "skipped 1 of 2 records"
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"id": ', "data.json is not JSON: Expecting value: line 1"),
        ("[]", r"must hold a JSON list with entries, got \[\]"),
        ("{}", "must hold a JSON list with entries, got {}"),
        ('[{"id": "lost"}]', "none of the 1 entries can be used"),
    ],
)
def test_a_bad_file_is_an_error_even_when_skipping(tmp_path: Path, videos: Path, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_dialogues(write(tmp_path, content), video_dir=videos, skips=SkipLog())


def test_each_skip_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    skips = SkipLog()
    for _ in range(3):
        skips.add("a.mp4", "no such file")
    assert (len(skips), skips.skipped, len(caplog.records)) == (1, {"a.mp4": "no such file"}, 1)
    with pytest.raises(ValueError, match=r"a.mp4: no such file"):
        SkipLog(strict=True).add("a.mp4", "no such file")


ANNOTATIONS = {
    "abc": {"duration": 200.0, "timestamps": [[10.1, 30], [166.2, 200]], "sentences": [" A Dog barks. ", "Rain."]},
    "xyz": {"duration": 50, "timestamps": [[0, 50]], "sentences": ["A man {speaks}"]},
}


def test_queries(tmp_path: Path, videos: Path) -> None:
    queries = load_queries(write(tmp_path, ANNOTATIONS), video_dir=videos)
    grounding, captioning, segments = (
        [query for query in queries if query.task == task] for task in ("grounding", "captioning", "seg_captioning")
    )
    assert [query.key for query in grounding] == [("abc", 0), ("abc", 1), ("xyz", 0)]
    assert [query.key for query in captioning] == [("abc", None), ("xyz", None)]
    assert [query.key for query in segments] == [("abc", 0), ("abc", 1), ("xyz", 0)]
    assert len({query.record.id for query in queries}) == len(queries)
    assert all(query.record.is_query for query in queries)

    assert grounding[0].record.messages[0]["content"] == (
        "At which time interval can we find a dog barks taking place in the video? "
        "Give the timestamps in the fromat: From xx to xx."
    )
    assert (grounding[0].spans, grounding[0].sentences) == (((10.1, 30),), (" A Dog barks. ",))
    assert "find a man {speaks} taking" in grounding[2].record.messages[0]["content"]
    assert captioning[0].record.messages[0]["content"] == PROMPTS["captioning"].removeprefix("<video>\n")
    assert captioning[0].spans == ((10.1, 30), (166.2, 200))
    assert segments[1].record.messages[0]["content"] == (
        " Can you describe what occurred from 83 to 99 in the video? Please give the event description directly."
    )
    assert segments[1].record.duration == 200


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"duration": None}, "'duration' must be a int or float, got None"),
        ({"duration": 0}, "duration must be positive seconds, got 0"),
        ({"sentences": ["one"]}, "2 timestamps but 1 sentences"),
        ({"sentences": [1, 2]}, "'sentences' must be a list of str"),
        ({"timestamps": [[1, 2], [4, 3]]}, r"timestamp 1 must be \[start, end\].*got \[4, 3\]"),
        ({"timestamps": [[1, 2], [-1, 3]]}, r"timestamp 1 must be .*got \[-1, 3\]"),
        ({"timestamps": [[1, 2], "0-3"]}, r"timestamp 1 must be .*got '0-3'"),
    ],
)
def test_bad_annotations(tmp_path: Path, videos: Path, fields: dict[str, Any], message: str) -> None:
    path = write(tmp_path, {"abc": {**ANNOTATIONS["abc"], **fields}, "xyz": ANNOTATIONS["xyz"]})
    with pytest.raises(ValueError, match=rf"data.json: video 'abc': .*{message}"):
        load_queries(path, video_dir=videos)
    skips = SkipLog()
    assert {query.video_id for query in load_queries(path, video_dir=videos, skips=skips)} == {"xyz"}
    assert len(skips) == 1


def test_one_task(tmp_path: Path, videos: Path) -> None:
    path = write(tmp_path, ANNOTATIONS)
    assert [query.task for query in load_queries(path, ["captioning"], video_dir=videos)] == ["captioning"] * 2
    with pytest.raises(ValueError, match="tasks must be one of grounding, captioning, seg_captioning, got 'grouding'"):
        load_queries(path, ["grouding"], video_dir=videos)  # type: ignore[list-item]


def test_records_know_their_answer(tmp_path: Path) -> None:
    record = Record("r", (user("a"), assistant("b"), user("c"), assistant("d")), audio=tmp_path)
    assert record.reference == "d"
    assert record.query().messages == record.messages[:3]
    assert record.query().query() == record.query()
    with pytest.raises(ValueError, match="'r' is a query"):
        record.query().reference  # noqa: B018
    with pytest.raises(ValueError, match="neither audio nor video"):
        Record("r", (user("a"),))
    with pytest.raises(ValueError, match="no messages"):
        Record("r", (), audio=tmp_path)
