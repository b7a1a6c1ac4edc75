"""Speech with its text: the prompts of Asterisk in five languages, from Debian's packages, or a folder of one's own.

The splits are by text: what an utterance says decides where it belongs, so that no sentence, in whatever voice or
corpus, is both trained on and tested.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ..models import packages
from .records import Record, assistant, user

logger = logging.getLogger(__name__)

Split = Literal["train", "validation", "test"]

INSTRUCTION = "Transcribe the speech."
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".g722")

# Sounds that no voice makes; some listings describe them without brackets.
_NOT_SPEECH = {"ascending-2tone", "beep", "beeperr", "confbridge-join", "confbridge-leave", "descending-2tone"}

_G722_BYTES_PER_SECOND = 8_000  # ITU-T G.722: 64 kbit/s
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_REMARK = re.compile(r"\[[^]]*\]|<[^>]*>|\([^)]*\)")


@dataclass(frozen=True)
class _Prompts:
    """Where the prompts of a language are, and what their files must be."""

    voice: str
    licence: str
    sounds: str  # sha256, as `packages.digest` counts it
    texts: str
    size_mb: float


_PROMPTS: Mapping[str, _Prompts] = {
    "en": _Prompts(
        "en_US_f_Allison",
        "CC-BY-SA-3.0",
        "3482bb45298ae32944da8aff1aa38fa782ae2a2dcd5e43a7455df8be2f98b704",
        "436538195b7c7361bd227036686f1a4039f694648c76573bdaca956655d34450",
        10.6,
    ),
    "es": _Prompts(
        "es_MX_f_Allison",
        "CC-BY-SA-3.0",
        "22ae4ef6c33638297db5a2a8235f5318cb36c3d51b6580f05d1445219c40ae4c",
        "870e4ddf27b115ee22774fc4b35d62d13534a49ec41081f3ca6017931fceb076",
        13.0,
    ),
    "fr": _Prompts(
        "fr_CA_f_June",
        "CC-BY-SA-3.0",
        "260b1933793ebd499d11562ecf6046ce7e3b4ace7983027c56e720ec915c43e5",
        "24830a518a6ee3b2bdeb97dbe6131f84ab21a864f4395ffeee076be6cff32882",
        10.8,
    ),
    "it": _Prompts(
        "it_IT_m_Carlo",
        "CC-BY-3.0",
        "0ef11397bc9e8692c21b16dd3b056a34bf8e64f44e93f4315c5e1e447d61be64",
        "5abad27c280741e0635c46745c7829f45ccd5922b7914c35f2f2136f22779bda",
        10.1,
    ),
    "ru": _Prompts(
        "ru_RU_f_IvrvoiceRU",
        "CC-BY-3.0",
        "ce725a68ead0904092ac55420c65f4f91a9a672c2198d7436e007b839262e095",
        "88fd9a9b50bc546e45c1a6d8c4c486879ff94129db3e769bbb1998de5c532b9c",
        10.6,
    ),
}
LANGUAGES = tuple(_PROMPTS)


def normalise(text: str) -> str:
    """Reduces a text to what is said: lower case, letters and digits and the apostrophes inside words, one blank.

    Numbers are not spelled out: `1` and `one` differ. The splits and the error rates use this same rule; changing it
    would change both.
    """
    return " ".join(_WORD.findall(unicodedata.normalize("NFC", text).lower().replace("’", "'")))


def split_of(text: str) -> Split:
    """Gives the split of an utterance: by the sha256 of its normalised text, 8 tenths train, 1 validation, 1 test."""
    tenth = int(hashlib.sha256(normalise(text).encode()).hexdigest(), 16) % 10
    return "validation" if tenth == 8 else "test" if tenth == 9 else "train"


def speech_packages(language: str) -> tuple[packages.Package, packages.Package]:
    """Gives the Debian packages with the sounds and with the texts of a language."""
    if language not in _PROMPTS:
        raise ValueError(f"language must be one of {', '.join(LANGUAGES)}, got {language!r}")
    prompts, name = _PROMPTS[language], f"asterisk-core-sounds-{language}"
    sounds = {f"usr/share/asterisk/sounds/{prompts.voice}": prompts.sounds}
    texts = {f"usr/share/doc/{name}/core-sounds-{language}.txt.gz": prompts.texts}
    return (
        packages.Package("debian", f"{name}-g722", "", sounds, prompts.licence, prompts.size_mb),
        packages.Package("debian", name, "", texts, prompts.licence, 0.03),
    )


def speech_records(
    split: Split, languages: Sequence[str] = ("en",), min_words: int = 1, download: bool = True
) -> list[Record]:
    """Gives the prompts of a split: 16 kHz studio speech, one voice per language, one record per utterance.

    Text in brackets is a remark about the recording. It is dropped where it opens or closes the text; an utterance
    with one in the middle is left out, because the text does not tell whether it is spoken.

    Args:
        split: `train`, `validation` or `test`; see `split_of`.
        languages: of `LANGUAGES`.
        min_words: shorter utterances are left out.
        download: False: only what the cache holds.

    Raises:
        FetchError: a package cannot be fetched, or is not in the cache with `download=False`.
    """
    _check_split(split)
    records = []
    for language in languages:
        sounds, texts = speech_packages(language)
        folder = next(packages.ensure(sounds, download) / member for member in sounds.files)
        listing = next(packages.ensure(texts, download) / member for member in texts.files)
        for name, text in _spoken(gzip.decompress(listing.read_bytes()).decode("utf-8-sig")):
            audio = folder / f"{name}.g722"
            if audio.is_file():  # the texts name a few prompts that were never recorded
                seconds = audio.stat().st_size / _G722_BYTES_PER_SECOND
                records.append(_record(f"{language}/{name}", text, audio, seconds))
    return _select(records, split, min_words)


def folder_records(folder: Path | str, split: Split | None = None, min_words: int = 1) -> list[Record]:
    """Gives the utterances of one's own folder: `x.wav` with its text in `x.txt`, or LibriSpeech's `*.trans.txt`.

    Args:
        folder: searched with all its subfolders. A line of a `*.trans.txt` is `x The text.`, for the `x.flac` (or
            another of `AUDIO_SUFFIXES`) beside it.
        split: by the text, see `split_of`; None: all.
        min_words: shorter utterances are left out.

    Raises:
        ValueError: there are no utterances, or a text has no audio.
    """
    _check_split(split)
    folder, records = Path(folder), []
    for file in sorted(folder.rglob("*.txt")):
        text = file.read_text(encoding="utf-8-sig")
        lines = [line.partition(" ")[::2] for line in text.splitlines() if line.strip()]
        for name, words in lines if file.name.endswith(".trans.txt") else [(file.stem, text)]:
            audio = next((p for s in AUDIO_SUFFIXES if (p := file.with_name(name + s)).is_file()), None)
            if audio is None:
                raise ValueError(f"{file}: beside it lies no audio {name} ending in {' '.join(AUDIO_SUFFIXES)}")
            identity = audio.relative_to(folder).with_suffix("").as_posix()
            records.append(_record(identity, words.strip(), audio, None))
    if not records:
        raise ValueError(f"{folder} holds no utterances; it needs x.wav with x.txt, or LibriSpeech's *.trans.txt")
    return _select(records, split, min_words)


def _spoken(listing: str) -> Iterator[tuple[str, str]]:
    """Gives name and text of each line `name: text`, without remarks; `;` opens a comment."""
    for line in listing.splitlines():
        name, colon, text = line.partition(":")
        if not colon or line.startswith(";") or name in _NOT_SPEECH:
            continue
        if (said := _strip_remarks(text)) and normalise(said):
            yield name, said


def _strip_remarks(text: str) -> str | None:
    """Drops remarks at either end; None: there is one in the middle."""
    parts = [part.strip() for part in _REMARK.split(text)]
    said = [part for part in parts if normalise(part)]
    return None if len(said) > 1 else " ".join(said)


def _record(name: str, text: str, audio: Path, seconds: float | None) -> Record:
    return Record(name, (user(INSTRUCTION), assistant(text)), audio=audio, duration=seconds)


def _check_split(split: Split | None) -> None:
    if split not in (None, *get_args(Split)):
        raise ValueError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}")


def _select(records: list[Record], split: Split | None, min_words: int) -> list[Record]:
    long_enough = [r for r in records if len(normalise(r.reference).split()) >= min_words]
    chosen = [r for r in long_enough if split is None or split_of(r.reference) == split]
    logger.info("%d of %d utterances are in %s with %d words or more", len(chosen), len(records), split, min_words)
    return chosen
