"""Synthetic speech for training: the voices of flite and of eSpeak NG, run from their published packages.

Flite's are the voices of four people, one as recorded pieces that are joined, three as statistics of their speech;
eSpeak's are computed from rules, with as many speakers as there are settings.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
from scipy.signal import resample_poly

from ..models import packages

SAMPLING_RATE = 16_000

_COMMAND = "python benchmarks/align.py"
# Libraries differ by processor and release: apt's signature vouches for them.
FLITE = (
    packages.Package("debian", "libflite1", "", {"usr/lib": None}, "MIT-like", 12.8, _COMMAND),
    packages.Package("debian", "libasound2", "", {"usr/lib": None}, "LGPL-2.1", 0.4, _COMMAND),  # flite asks for it
)
_DATA = "espeakng_loader/espeak-ng-data"
ESPEAK = packages.Package(
    "pypi",
    "espeakng-loader",
    "0.2.4",
    {
        "espeakng_loader/libespeak-ng.so": "b15ce0803b26254e8a0d088c6b9281a2637b2b02613147cc320cfdefaf2c3ccf",
        f"{_DATA}/en_dict": "1053f74a34af38abb6fbd64b7838dacbc655a687c48ce1bb663d364a127b05de",
        f"{_DATA}/intonations": "031a105bf6bb2ebcd73a2c579ccfb42469b27266db0078af65ae298fd3588b21",
        f"{_DATA}/phondata": "a0b643b155cb6b12628d9e7865b57d9fca0d35844614f2594a5e009c80c80bb4",
        f"{_DATA}/phonindex": "384e5fa6f714ba5356c58008249b78699c31c1ad044b243068d263fb806b7d73",
        f"{_DATA}/phontab": "1b40690667e1e9aa1ba5e5234773c799e7e72ea751426e5150423d53c3f24fa2",
        f"{_DATA}/lang/gmw": "de3584fd1dd6027f6d84b4a2a113f6b559c1385f0b1cd18c7acc3f87435ee6a2",
        f"{_DATA}/voices": "5ce43b48e884d84eff50ce52849cb2e36b65e01e592d29044c187eb53ba39dce",
    },
    "GPL-3",
    9.7,
    _COMMAND,
)

# Ranges in which Whisper-base still understands every voice. They are guesses; checked by `pytest -m slow
# tests/test_synthesis.py`: 3 sentences of 38 words for each voice, drawn from these ranges. Word error rates of flite's
# are 0 to 3 %, of eSpeak's 3 to 29 %, the median 13 %. Left out is what had over 30 %.
_FLITE_VOICES: Mapping[str, tuple[float, float]] = {  # the mean pitch of each, in Hz, from low to high
    "slt": (150, 210),
    "rms": (80, 125),
    "awb": (105, 160),
    "kal16": (85, 135),
}
_STRETCH = (0.8, 1.3)  # of all durations
_ESPEAK_ACCENTS = ("en-us", "en-us", "en", "en-gb-x-rp")  # the first one twice: the prompts' accent
_ESPEAK_VARIANTS = ("", "+m1", "+m3", "+m7", "+f1", "+f2", "+f3", "+f4", "+f5", "+linda", "+steph", "+max")
_NOT_UNDERSTOOD = ("en+f4", "en-gb-x-rp+linda")  # 32 and 37 %; and the variant Andrea in every accent, 32 to 58 %
_ESPEAK_RATE = (120, 200)  # words a minute
_ESPEAK_PITCH, _ESPEAK_RANGE = (30, 70), (30, 80)  # of 0 to 100


@dataclass(frozen=True)
class Voice:
    """A speaker and the way it speaks.

    Args:
        engine: "flite" or "espeak".
        name: of the voice, as the engine knows it.
        pitch: flite: the mean, in Hz; eSpeak: 0 to 100.
        pace: flite: a factor of all durations; eSpeak: words a minute.
        range: of the pitch, eSpeak only: 0 to 100.
    """

    engine: str
    name: str
    pitch: float
    pace: float
    range: float = 50


def voices() -> list[tuple[str, str]]:
    """Gives engine and name of every voice, each once."""
    return [("flite", name) for name in _FLITE_VOICES] + [("espeak", name) for name in dict.fromkeys(_espeak_names())]


def _espeak_names() -> list[str]:
    named = [accent + variant for accent in _ESPEAK_ACCENTS for variant in _ESPEAK_VARIANTS]
    return [name for name in named if name not in _NOT_UNDERSTOOD]


def draw_voice(rng: random.Random, espeak: float = 0.4) -> Voice:
    """Draws a voice; the share `espeak` of them is eSpeak's."""
    if rng.random() < espeak:
        return draw_manner(rng, "espeak", rng.choice(_espeak_names()))
    return draw_manner(rng, "flite", rng.choice(list(_FLITE_VOICES)))


def draw_manner(rng: random.Random, engine: str, name: str) -> Voice:
    """Draws how a voice of `voices` speaks."""
    if engine == "espeak":
        return Voice(engine, name, *(rng.uniform(*span) for span in (_ESPEAK_PITCH, _ESPEAK_RATE, _ESPEAK_RANGE)))
    return Voice(engine, name, rng.uniform(*_FLITE_VOICES[name]), rng.uniform(*_STRETCH))


def ensure_voices(download: bool = True) -> None:
    """Fetches the engines; raises FetchError where that cannot be."""
    for package in (*FLITE, ESPEAK):
        packages.ensure(package, download)


def speak(text: str, voice: Voice) -> np.ndarray:
    """Gives the text as spoken by a voice, `[samples]` int16 at `SAMPLING_RATE`.

    Raises:
        ValueError: an unknown engine.
        RuntimeError: the engine fails.
        FetchError: the engines are not in the cache; see `ensure_voices`.
    """
    engines: Mapping[str, Callable[[], _Flite | _Espeak]] = {"flite": _flite, "espeak": _espeak}
    if voice.engine not in engines:
        raise ValueError(f"engine must be one of {', '.join(engines)}, got {voice.engine!r}")
    samples, rate = engines[voice.engine]().speak(text, voice)
    if not samples.size:
        raise RuntimeError(f"{voice.engine} says nothing for {text!r} as {voice}")
    common = gcd(SAMPLING_RATE, rate)
    sound = resample_poly(samples.astype(np.float32), SAMPLING_RATE // common, rate // common)
    return np.clip(sound, -(2**15), 2**15 - 1).astype(np.int16)


@lru_cache(maxsize=1)
def _flite() -> _Flite:
    return _Flite(*(packages.ensure(package, download=False) / "usr/lib" for package in FLITE))


@lru_cache(maxsize=1)
def _espeak() -> _Espeak:
    return _Espeak(packages.ensure(ESPEAK, download=False) / "espeakng_loader")


class _Wave(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_char_p),
        ("sample_rate", ctypes.c_int),
        ("num_samples", ctypes.c_int),
        ("num_channels", ctypes.c_int),
        ("samples", ctypes.POINTER(ctypes.c_short)),
    )


class _Speaker(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("features", ctypes.c_void_p))  # and more, which is not read here


class _Flite:
    """The library of flite (flite.h), with its English voices."""

    def __init__(self, *folders: Path) -> None:
        names = ["libasound.so.2", "libflite.so.1", "libflite_cmulex.so.1", "libflite_usenglish.so.1"]
        names += [f"libflite_cmu_us_{voice}.so.1" for voice in _FLITE_VOICES]
        found = {file.name: file for folder in folders for file in folder.rglob("*.so.*")}
        libraries = [ctypes.CDLL(str(found[name]), ctypes.RTLD_GLOBAL) for name in names]  # each needs those before
        self.flite = libraries[1]
        self.flite.flite_init()
        self.flite.flite_text_to_wave.argtypes = (ctypes.c_char_p, ctypes.POINTER(_Speaker))
        self.flite.flite_text_to_wave.restype = ctypes.POINTER(_Wave)
        self.flite.delete_wave.argtypes = (ctypes.POINTER(_Wave),)
        self.flite.flite_feat_set_float.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_float)
        self.voices = {}
        for name, library in zip(_FLITE_VOICES, libraries[4:], strict=True):
            register = library[f"register_cmu_us_{name}"]
            register.argtypes, register.restype = (ctypes.c_char_p,), ctypes.POINTER(_Speaker)
            self.voices[name] = register(None)

    def speak(self, text: str, voice: Voice) -> tuple[np.ndarray, int]:
        """Gives the samples, int16, and their rate."""
        speaker = self.voices[voice.name]
        for feature, value in ((b"duration_stretch", voice.pace), (b"int_f0_target_mean", voice.pitch)):
            self.flite.flite_feat_set_float(speaker.contents.features, feature, value)
        wave = self.flite.flite_text_to_wave(text.encode(), speaker)
        if not wave:
            return np.zeros(0, np.int16), SAMPLING_RATE
        content = wave.contents
        samples = np.ctypeslib.as_array(content.samples, (content.num_samples,)).copy()
        rate = content.sample_rate
        self.flite.delete_wave(wave)
        return samples, rate


class _Espeak:
    """The library of eSpeak NG (speak_lib.h); it holds one voice at a time, so each process has one of these."""

    _SYNCHRONOUS, _UTF8 = 2, 1
    _RATE, _PITCH, _RANGE = 1, 3, 4  # parameters

    def __init__(self, folder: Path) -> None:
        self.espeak = ctypes.CDLL(str(folder / "libespeak-ng.so"))
        self.rate = self.espeak.espeak_Initialize(self._SYNCHRONOUS, 0, str(folder).encode(), 0)
        if self.rate <= 0:
            raise RuntimeError(f"eSpeak cannot be started from {folder}: it returned {self.rate}")
        self.parts: list[bytes] = []
        signature = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.callback = signature(self._keep)  # kept, as the library calls it later
        self.espeak.espeak_SetSynthCallback(self.callback)

    def _keep(self, samples: Any, count: int, events: Any) -> int:
        if samples and count:
            self.parts.append(ctypes.string_at(samples, 2 * count))
        return 0  # go on

    def speak(self, text: str, voice: Voice) -> tuple[np.ndarray, int]:
        """Gives the samples, int16, and their rate."""
        if self.espeak.espeak_SetVoiceByName(voice.name.encode()):
            raise RuntimeError(f"eSpeak has no voice {voice.name!r}")
        for parameter, value in ((self._RATE, voice.pace), (self._PITCH, voice.pitch), (self._RANGE, voice.range)):
            self.espeak.espeak_SetParameter(parameter, round(value), 0)
        self.parts.clear()
        words = text.encode()
        self.espeak.espeak_Synth(words, ctypes.c_size_t(len(words) + 1), 0, 0, 0, self._UTF8, None, None)
        return np.frombuffer(b"".join(self.parts), np.int16), self.rate
