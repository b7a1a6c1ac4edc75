"""Mixed training of video-SALMONN (arXiv 2406.15704): sound and pictures that do not belong together."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

from .records import Record, assistant, user

# The facts are the paper's, the words ours.
MATCHING = "Do the sound and the picture belong together? Answer yes or no."
PARTS = {"video": "In the video: ", "audio": "In the sound: "}


def mix(records: Sequence[Record], seed: int, *, matching: float = 0.1, joined: float = 0.2) -> list[Record]:
    """Turns some records into ones that cannot be answered from the sound or the picture alone.

    - Of the records with sound and video, the share `matching` becomes the question whether the two belong together;
      every second of those gets the sound of another record, and the answer no.
    - Of the records with video only, the share `joined` gets the sound of a record with sound only, and both questions
      and both answers in one, in shuffled order. The others stay as they are.
    - Records with sound only stay as they are.

    Queries and, for the second, dialogues of several rounds are left alone. So is everything for which there is no
    other sound. A duration that the corpus states goes where the sound is another's.

    Args:
        records: of one corpus or several.
        seed: the same seed gives the same records; another one for every epoch.
        matching: share of the paired records, in [0, 1].
        joined: share of the unpaired videos, in [0, 1].

    Returns:
        As many records, in the same order.

    Raises:
        ValueError: a share is outside [0, 1].
    """
    for option, share in (("matching", matching), ("joined", joined)):
        if not 0 <= share <= 1:
            raise ValueError(f"{option} is a share of the records and must be in [0, 1], got {share!r}")
    draw = random.Random(seed)
    mixed = list(records)
    trained = [i for i, record in enumerate(records) if not record.is_query]
    paired = [i for i in trained if records[i].audio is not None and records[i].video is not None]
    sounds = sorted({_sound(records[i]) for i in paired})
    if len(sounds) > 1:
        for number, i in enumerate(draw.sample(paired, round(matching * len(paired)))):
            mixed[i] = _ask_matching(records[i], _other(_sound(records[i]), sounds, draw) if number % 2 else None)
    single = [i for i in trained if len(records[i].messages) == 2]
    heard = [records[i] for i in single if records[i].video is None]
    seen = [i for i in single if records[i].audio is None]
    if heard:
        for i in draw.sample(seen, round(joined * len(seen))):
            mixed[i] = _join(records[i], draw.choice(heard), draw)
    return mixed


def _sound(record: Record) -> Path:
    assert record.audio is not None
    return record.audio


def _other(own: Path, sounds: list[Path], draw: random.Random) -> Path:
    """Draws one of the sorted sounds that is not `own`."""
    place = draw.randrange(len(sounds) - 1)
    return sounds[place + (place >= sounds.index(own))]


def _ask_matching(record: Record, other: Path | None) -> Record:
    """Asks whether sound and picture belong together, of the record's own sound or another."""
    asked = dataclasses.replace(
        record, id=f"{record.id}~matching", messages=(user(MATCHING), assistant("No." if other else "Yes."))
    )
    return dataclasses.replace(asked, audio=other, duration=None) if other else asked


def _join(video: Record, audio: Record, draw: random.Random) -> Record:
    """Gives the video the sound, and both their questions and answers in one order."""
    parts = [("video", video), ("audio", audio)]
    draw.shuffle(parts)
    question, answer = (
        "\n".join(PARTS[kind] + record.messages[turn]["content"] for kind, record in parts) for turn in (0, 1)
    )
    return Record(f"{video.id}~{audio.id}", (user(question), assistant(answer)), audio.audio, video.video)
