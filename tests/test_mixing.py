"""Mixed training: which records change, into what, and which do not."""

import dataclasses
from pathlib import Path

import pytest

from audiopress.data.mixing import MATCHING, mix
from audiopress.data.records import Record, assistant, user


def make(kind: str, number: int, rounds: int = 1) -> Record:
    name = f"{kind}{number}"
    messages = tuple(m for i in range(rounds) for m in (user(f"What of {name}, {i}?"), assistant(f"{name}, {i}.")))
    audio = Path(f"{name}.wav") if kind in ("pair", "audio") else None
    video = Path(f"{name}.mp4") if kind in ("pair", "video") else None
    return Record(name, messages, audio, video, duration=1.0 + number)


RECORDS = [make(kind, i) for i in range(40) for kind in ("pair", "video", "audio")]


def changed(records, mixed):
    assert len(mixed) == len(records)
    return [(old, new) for old, new in zip(records, mixed, strict=True) if old != new]


def test_a_tenth_of_the_pairs_ask_whether_sound_and_picture_match():
    asked = [(old, new) for old, new in changed(RECORDS, mix(RECORDS, 0)) if old.audio and old.video]
    assert len(asked) == 4
    own = [(old, new) for old, new in asked if new.audio == old.audio]
    assert len(own) == 2
    for old, new in asked:
        matches = (old, new) in own
        assert new.video == old.video
        assert new.messages == (user(MATCHING), assistant("Yes." if matches else "No."))
        assert new.duration == (old.duration if matches else None)
        assert new.audio in {record.audio for record in RECORDS if record.id.startswith("pair")}


def test_a_fifth_of_the_silent_videos_get_a_sound_with_its_question():
    joined = [(old, new) for old, new in changed(RECORDS, mix(RECORDS, 0)) if not old.audio]
    assert len(joined) == 8
    by_sound = {record.audio: record for record in RECORDS if record.id.startswith("audio")}
    orders = set()
    for old, new in joined:
        sound = by_sound[new.audio]
        assert new.video == old.video
        assert new.duration is None
        texts = [
            (f"In the video: {a}", f"In the sound: {b}") for a, b in zip(contents(old), contents(sound), strict=True)
        ]
        written = [tuple(text.split("\n")) for text in contents(new)]
        assert written in (texts, [text[::-1] for text in texts]), "question and answer in the same order"
        orders.add(written == texts)
    assert orders == {True, False}


def contents(record):
    return [message["content"] for message in record.messages]


def test_all_other_records_stay_as_they_are():
    assert all(old.video for old, _ in changed(RECORDS, mix(RECORDS, 3)))
    untouched = [make("video", 0, rounds=2), make("audio", 0), make("pair", 1).query(), make("video", 1).query()]
    assert mix(untouched, 0, matching=1, joined=1) == untouched


def test_nothing_happens_where_there_is_no_other_sound():
    one = make("pair", 0)
    records = [one, dataclasses.replace(one, id="again"), make("video", 0), make("audio", 0, rounds=2)]
    assert mix(records, 0, matching=1, joined=1) == records
    assert mix([], 0) == []


def test_every_pair_and_every_silent_video_at_share_one():
    mixed = mix(RECORDS, 0, matching=1, joined=1)
    assert len(changed(RECORDS, mixed)) == 80
    mismatched = [new for old, new in changed(RECORDS, mixed) if old.audio and new.audio != old.audio]
    assert len(mismatched) == 20
    assert len({record.id for record in mixed}) == len(mixed)
    assert mix(RECORDS, 0, matching=0, joined=0) == RECORDS


def test_the_seed_decides():
    assert mix(RECORDS, 5) == mix(RECORDS, 5)
    assert mix(RECORDS, 5) != mix(RECORDS, 6)


@pytest.mark.parametrize("option", ["matching", "joined"])
def test_shares_are_checked(option):
    with pytest.raises(ValueError, match=rf"{option} is a share of the records and must be in \[0, 1\], got 1.5"):
        mix(RECORDS, 0, **{option: 1.5})
