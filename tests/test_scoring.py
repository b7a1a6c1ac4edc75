"""The control with other audio."""

from pathlib import Path

import pytest
import torch

from audiopress.benchmarks.scoring import with_other_audio
from audiopress.data.records import Record, assistant, user

FRAMES = {"a": 100, "b": 200, "c": 210, "d": 300, "e": 310}


def record(name, sound):
    return Record(name, (user("What?"), assistant("This.")), Path(sound) if sound else None, Path("video"))


def encoder(record):
    return {"input_features": torch.zeros(4, FRAMES[str(record.audio)])}


@pytest.mark.parametrize(
    ("sounds", "expected"),
    [
        ("dcba", {"a": "b", "b": "a", "c": "d", "d": "c"}),
        ("abcde", {"a": "b", "b": "a", "c": "d", "d": "c", "e": "d"}),
        ("aabbbc", {"a": "b", "b": "a", "c": "b"}),  # several records about one sound
    ],
)
def test_every_record_gets_the_sound_nearest_in_length(sounds, expected):
    records = [record(str(i), sound) for i, sound in enumerate(sounds)]
    swapped = {r.id: str(r.audio) for r in with_other_audio([*records, record("silent", None)], encoder)}
    assert swapped == {str(i): expected[sound] for i, sound in enumerate(sounds)}


def test_one_sound_cannot_be_swapped():
    with pytest.raises(ValueError, match="two different sounds or more, got 1"):
        with_other_audio([record("x", "a"), record("y", "a")], encoder)
