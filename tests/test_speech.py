"""The speech corpora: the splits never change, remarks are not speech, and one's own folder is read."""

from pathlib import Path

import pytest

from audiopress.data import speech
from audiopress.data.media import read_audio
from audiopress.data.speech import folder_records, normalise, speech_records, split_of
from audiopress.models.packages import FetchError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("...has joined,  the CONFERENCE!", "has joined the conference"),
        ("It's Allison’s 'call-forward'", "it's allison's call forward"),
        ("Cafe\u0301 – l'APPEL_n° 1", "café l'appel n 1"),
        ("Что бы, выйти...", "что бы выйти"),
        ("[@] ... ", ""),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected
    assert normalise(expected) == expected


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("Activated.", "train"),
        ("Goodbye.", "train"),
        ("Bitte warten.", "train"),
        ("Agent login.", "validation"),
        ("agent   LOGIN", "validation"),
        ("Thank you.", "test"),
        ("thank you", "test"),
    ],
)
def test_splits_stay_as_they_are(text: str, split: str) -> None:
    assert split_of(text) == split


def test_remarks_are_not_speech() -> None:
    listing = (
        "; a comment: not a prompt\n\nplain: Added.\nbeep: a simple tone\nsilence/1: (1 second of silence)\n"
        "at: at [@]\nintro: [quietly] Please wait.  (a tone follows)\nunsure: Sorry, [that] is wrong.\nempty:\n"
    )
    assert list(speech._spoken(listing)) == [("plain", "Added."), ("at", "at"), ("intro", "Please wait.")]


def test_own_folder(tmp_path: Path) -> None:
    (tmp_path / "a.wav").touch()
    (tmp_path / "a.txt").write_text("Thank you.\n")
    book = tmp_path / "84" / "121"
    book.mkdir(parents=True)
    (book / "84-121.trans.txt").write_text("84-121-0000 GO DO YOU HEAR\n84-121-0001 AGENT LOGIN\n")
    (book / "84-121-0000.flac").touch()
    (book / "84-121-0001.flac").touch()
    records = folder_records(tmp_path)
    assert {r.id: r.reference for r in records} == {
        "a": "Thank you.",
        "84/121/84-121-0000": "GO DO YOU HEAR",
        "84/121/84-121-0001": "AGENT LOGIN",
    }
    assert all(r.messages[0]["content"] == speech.INSTRUCTION and r.video is None for r in records)
    assert [r.id for r in folder_records(tmp_path, "test")] == ["a"]
    assert [r.id for r in folder_records(tmp_path, min_words=3)] == ["84/121/84-121-0000"]
    (book / "84-121-0001.flac").unlink()
    with pytest.raises(ValueError, match=r"84-121.trans.txt: beside it lies no audio 84-121-0001 ending in .wav .flac"):
        folder_records(tmp_path)


def test_what_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no utterances; it needs x.wav with x.txt"):
        folder_records(tmp_path)
    with pytest.raises(ValueError, match="language must be one of en, es, fr, it, ru, got 'de'"):
        speech_records("test", ["de"])
    with pytest.raises(ValueError, match="split must be one of train, validation, test, got 'dev'"):
        speech_records("dev")  # type: ignore[arg-type]


def test_an_empty_cache_says_how_to_fill_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUDIOPRESS_CACHE", str(tmp_path))
    with pytest.raises(FetchError, match=r"asterisk-core-sounds-en-g722 is not in the cache .*train_compress.py"):
        speech_records("test", download=False)


def test_the_english_prompts() -> None:
    try:
        splits = {split: speech_records(split, download=False) for split in ("train", "validation", "test")}
    except FetchError as missing:
        pytest.skip(str(missing))
    assert {split: len(records) for split, records in splits.items()} == {"train": 457, "validation": 52, "test": 42}
    texts = [{normalise(record.reference) for record in records} for records in splits.values()]
    assert len(set.union(*texts)) == sum(map(len, texts))
    record = splits["test"][0]
    assert record.id == "en/auth-thankyou"
    assert record.reference == "Thank you."
    assert record.audio is not None
    assert len(read_audio(record.audio)) == pytest.approx(16_000 * record.duration)
