"""Things that can be seen, heard and named: the stamps of Tux Paint, from Debian's package.

A stamp is a picture with a text such as `A frog.`; some have a recording of the thing and one of a voice saying its
name. Those with a sound are kept: with pictures that are never heard, a question could be answered by elimination.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from ..models import packages
from .media import MediaError, read_audio

SAMPLING_RATE = 16_000  # what the audio towers hear
_FOLDER = "usr/share/tuxpaint/stamps"
_SUFFIXES = (".ogg", ".wav")
_NAME = re.compile(r"(An?) ([A-Za-z][A-Za-z' -]*)\.")

# Only the folders with recordings of things: the others hold letters, coins, flags ... that are silent or read out.
PACKAGE = packages.Package(
    "debian",
    "tuxpaint-stamps-default",
    "",
    {
        f"{_FOLDER}/animals": "d96f59dfe45ee511a154e84452f1d1c7f0134c3c68736377d6722f73e734bbe1",
        f"{_FOLDER}/food/fruit": "5062998bf50f2800b45cac859f744ea269914fb1352cc66155d8120ea7817911",
        f"{_FOLDER}/hobbies": "0b24536d65a08d098856a3a69ef7ecb1417c57ecfb2eb5f5c7337a74bb7b9bb2",
        f"{_FOLDER}/household": "e751ba34dbe835c36311bd7f3e5b53d7b676b82211c1eb45d71290998fbe81ce",
        f"{_FOLDER}/naturalforces": "8eac1a41de62150a16eddd7fea58665db5bf6b6a137b426545f9c0d626858f33",
        f"{_FOLDER}/seasonal/halloween": "79138599dc7ff1adffabd202e917d98e992eb32c53eef9ebe5533702a5d0041e",
        f"{_FOLDER}/vehicles/emergency": "f60363f31a5db5ca3690582eb871d3b3a45afb5b193a84ad514f3dcfc02c3c3b",
    },
    "GPL-2",
    160.9,
    "python benchmarks/timeline.py FOLDER",
)

# They say chimp, hen, kangaroo and nandu where the texts have chimpanzee, brown hen, red kangaroo and rhea; all others
# say their text, as far as Whisper-base can tell.
_SAY_OTHERWISE = ("chimp_desc.ogg", "hen_desc.ogg", "kangaroo_desc.ogg", "nandou_desc.ogg")

_FLOOR = 10 ** (-30 / 20)  # of the peak: what is softer at either end is cut off; a guess, about as soft as the noise
_WINDOW = 160  # samples, 10 ms: how finely silence is looked for
_LOUDNESS = 10 ** (-23 / 20)  # RMS of every recording; EBU R 128's level for programmes
_PEAK = 0.9  # of full scale; a short click stays softer than _LOUDNESS
_SILENT = 1e-3  # peak: five recordings of the package hold nothing but zeros


@dataclass(frozen=True)
class Stamp:
    """A thing, under one name.

    Args:
        name: without its article: `sea lion`.
        article: `a` or `an`.
        pictures: PNG files, at least one.
        effects: recordings of what it sounds like.
        voices: recordings of a voice saying the name, in English.
    """

    name: str
    article: str
    pictures: tuple[Path, ...]
    effects: tuple[Path, ...]
    voices: tuple[Path, ...]

    @property
    def unseen(self) -> bool:
        """Whether it is kept from training: 2 things in 10, by the sha256 of the name."""
        return int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % 10 >= 8


def packaged_stamps(download: bool = True) -> list[Stamp]:
    """Gives the stamps of the Debian package; raises FetchError where it cannot be fetched."""
    return read_stamps(packages.ensure(PACKAGE, download) / _FOLDER, _SAY_OTHERWISE)


def read_stamps(folder: Path, without: Collection[str] = ()) -> list[Stamp]:
    """Reads a folder in Tux Paint's layout: `x.png`, `x.txt`, the effect `x.ogg` and the spoken name `x_desc.ogg`.

    Stamps of one name are one. A text is used when it is `A thing.`. Not used are recordings without a sound, and
    effects that stamps of different names share, because hearing one does not tell the name: the package has
    re-encoded copies, which have the same length to the sample and no other effects do (checked by correlation).

    Args:
        folder: searched with all its subfolders.
        without: names of files that are not used.

    Raises:
        ValueError: there is no stamp with a picture and a sound.
    """
    found: dict[str, dict[str, list[Path]]] = {}
    articles: dict[str, str] = {}
    for text in sorted(folder.rglob("*.txt")):
        match, picture = _NAME.fullmatch(text.read_text("utf-8").partition("\n")[0].strip()), text.with_suffix(".png")
        if not match or not picture.is_file():
            continue
        articles[match[2]] = match[1].lower()
        stamp = found.setdefault(match[2], {"pictures": [], "effects": [], "voices": []})
        stamp["pictures"].append(picture)
        for kind, stem in (("effects", text.stem), ("voices", f"{text.stem}_desc")):
            stamp[kind] += [p for s in _SUFFIXES if _is_usable(p := text.with_name(stem + s), without)]
    lengths = Counter(n for stamp in found.values() for n in {len(read_audio(p)) for p in stamp["effects"]})
    stamps = []
    for name, stamp in found.items():
        stamp["effects"] = [p for p in stamp["effects"] if lengths[len(read_audio(p))] == 1]
        if stamp["effects"] or stamp["voices"]:
            stamps.append(Stamp(name, articles[name], **{kind: tuple(paths) for kind, paths in stamp.items()}))
    if not stamps:
        raise ValueError(f"{folder} holds no stamp x.png with its text x.txt (`A thing.`) and a sound x.ogg")
    return stamps


def _is_usable(recording: Path, without: Collection[str]) -> bool:
    there = recording.is_file() and recording.name not in without
    return there and bool(np.abs(read_audio(recording)).max() > _SILENT)


@lru_cache(maxsize=512)
def read_recording(path: Path) -> np.ndarray:
    """Decodes a recording, cuts off the silence at both ends and brings it to one loudness.

    Returns:
        `[samples]` float32 at `SAMPLING_RATE`, read-only.

    Raises:
        MediaError: it cannot be decoded, or is silent.
    """
    samples = read_audio(path, SAMPLING_RATE)
    windows = np.pad(np.abs(samples), (0, -len(samples) % _WINDOW)).reshape(-1, _WINDOW).max(axis=1)
    if windows.max() <= _SILENT:
        raise MediaError(path, "it is silent")
    loud = np.flatnonzero(windows > _FLOOR * windows.max())
    samples = samples[loud[0] * _WINDOW : (loud[-1] + 1) * _WINDOW]
    samples = samples * min(_LOUDNESS / np.sqrt(np.mean(samples**2)), _PEAK / np.abs(samples).max())
    samples.flags.writeable = False
    return samples


@lru_cache(maxsize=64)
def read_picture(path: Path, size: int) -> Image.Image:
    """Gives the picture with its transparency (RGBA), scaled so that its longer side is `size` pixels."""
    with Image.open(path) as image:
        picture = image.convert("RGBA")
    scale = size / max(picture.size)
    return picture.resize([max(round(side * scale), 1) for side in picture.size], Image.Resampling.LANCZOS)
