"""Clips of recorded prompts: each by itself, or several of a language joined to nearly fill Whisper's 30 s."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from audiopress.data.media import read_audio
from audiopress.data.records import Record

log = logging.getLogger(__name__)

SEED = 0  # of the order in which prompts are joined, or taken where they are limited


@dataclass(frozen=True)
class Clip:
    """One or several prompts of a language, one after another.

    Args:
        language: of all of them.
        prompts: in their order.
    """

    language: str
    prompts: tuple[Record, ...]

    @property
    def text(self) -> str:
        """What is said."""
        return " ".join(prompt.reference for prompt in self.prompts)

    @property
    def seconds(self) -> float:
        """How long it is."""
        return sum(prompt.duration or 0.0 for prompt in self.prompts)

    def sound(self) -> np.ndarray:
        """Gives the samples at 16 kHz."""
        return np.concatenate([_read(Path(prompt.audio)) for prompt in self.prompts if prompt.audio is not None])


def make_clips(
    records: Sequence[Record], language: str, seconds: float, joined: bool, limit: int | None, seed: int = SEED
) -> list[Clip]:
    """Gives clips of at most so many seconds: every prompt by itself, or joined.

    Prompts are taken in an order drawn once. Joined, each goes to the end of the first clip that has room for it.

    Args:
        records: all of one language, each with its duration.
        language: of theirs.
        seconds: of the longest clip; longer prompts are left out, which is logged.
        joined: whether prompts are joined.
        limit: at most so many clips.
        seed: of the order.
    """
    fitting = [record for record in records if (record.duration or 0) <= seconds]
    if left := len(records) - len(fitting):
        log.warning("%d of %d prompts in %r are left out: longer than %g s", left, len(records), language, seconds)
    clips: list[list[Record]] = []
    room: list[float] = []
    for record in (fitting[i] for i in np.random.default_rng(seed).permutation(len(fitting))):
        length = record.duration or 0.0
        place = next((i for i, free in enumerate(room) if joined and length <= free), len(clips))
        if place == len(clips):
            clips.append([])
            room.append(seconds)
        clips[place].append(record)
        room[place] -= length
    return [Clip(language, tuple(prompts)) for prompts in clips[:limit]]


def read_all(clips: Sequence[Clip]) -> None:
    """Reads the sounds of all clips, several at a time, and keeps them for `Clip.sound`."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(_read, {Path(p.audio) for clip in clips for p in clip.prompts if p.audio is not None}))


def batches(clips: Sequence[Clip], size: int) -> list[tuple[Clip, ...]]:
    """Gives the clips, from the shortest to the longest, in batches."""
    ordered = sorted(clips, key=lambda clip: clip.seconds)
    return [tuple(ordered[i : i + size]) for i in range(0, len(ordered), size)]


@lru_cache(maxsize=4096)  # more than there are prompts; 64 kB per second
def _read(path: Path) -> np.ndarray:
    return read_audio(path)
