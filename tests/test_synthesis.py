"""Synthetic speech: every voice speaks, each in its own way, and a model that learned from people understands it."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from audiopress.benchmarks.metrics import wer
from audiopress.data import synthesis
from audiopress.data.synthesis import SAMPLING_RATE, Voice, draw_manner, draw_voice, speak, voices
from audiopress.models.packages import FetchError
from audiopress.models.whisper import load_whisper

UNDERSTOOD = 0.3  # word error rate of a voice that may stay
SENTENCES = (
    "The children walked slowly along the river before it began to rain.",
    "A small tool with a wooden handle and a sharp metal blade.",
    "She has never been to the city, but her brother works there every summer.",
)


@pytest.fixture(scope="module")
def engines():
    try:
        synthesis.ensure_voices(download=False)
    except FetchError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def whisper():
    try:
        return load_whisper(download=False)
    except FetchError as error:
        pytest.skip(str(error))


class Tone:
    """An engine that hums a second at 8 kHz, louder than samples can be."""

    def speak(self, text, voice):
        return (40_000 * np.sin(2 * np.pi * voice.pitch / 8000 * np.arange(8000 * len(text)))).astype(np.float32), 8000


def test_what_an_engine_says_comes_at_one_rate(monkeypatch):
    monkeypatch.setattr(synthesis, "_flite", Tone)
    sound = speak("A", Voice("flite", "slt", 200, 1))
    assert (sound.dtype, sound.shape) == (np.int16, (SAMPLING_RATE,))
    assert np.abs(np.fft.rfft(sound)).argmax() == 200
    assert sound.max() == 2**15 - 1  # cut off, not wrapped around
    with pytest.raises(RuntimeError, match=r"flite says nothing for '' as Voice\(engine='flite', name='slt'"):
        speak("", Voice("flite", "slt", 200, 1))
    with pytest.raises(ValueError, match="engine must be one of flite, espeak, got 'festival'"):
        speak("A", Voice("festival", "slt", 200, 1))


def test_voices_are_drawn_in_their_shares():
    rng = random.Random(0)
    drawn = [draw_voice(rng, espeak=0.25) for _ in range(4000)]
    assert {(voice.engine, voice.name) for voice in drawn} == set(voices())
    assert Counter(voice.engine for voice in drawn)["espeak"] == pytest.approx(1000, abs=120)
    slt = [voice.pitch for voice in drawn if voice.name == "slt"]
    assert 150 <= min(slt) < 160 < 200 < max(slt) <= 210
    assert len(set(voices())) == len(voices())
    assert draw_voice(random.Random(3)) == draw_voice(random.Random(3))


def test_an_empty_cache_says_how_to_fill_it(monkeypatch, tmp_path):
    monkeypatch.setenv("AUDIOPRESS_CACHE", str(tmp_path))
    with pytest.raises(FetchError, match=r"libflite1 is not in the cache .*`python benchmarks/align\.py`"):
        synthesis.ensure_voices(download=False)


@pytest.mark.parametrize(
    ("engine", "name", "low", "high", "slow", "fast"),
    [("flite", "slt", 150, 210, 1.3, 0.8), ("espeak", "en-us", 30, 70, 120, 200)],
)
def test_a_voice_speaks_as_it_is_told(engine, name, low, high, slow, fast, engines):
    manners = (low, slow), (low, fast), (high, slow)
    sounds = [speak(SENTENCES[0], Voice(engine, name, *manner)) for manner in manners]
    assert all(sound.dtype == np.int16 and np.abs(sound.astype(float)).max() > 3000 for sound in sounds)
    assert 2 < len(sounds[1]) / SAMPLING_RATE < len(sounds[0]) / SAMPLING_RATE / 1.3
    assert pitch(sounds[2]) > 1.2 * pitch(sounds[0])


def pitch(sound):
    """The commonest one, in Hz, from 70 to 400."""
    power = np.abs(np.fft.rfft(sound.astype(float), 2 * len(sound))) ** 2
    lags = np.arange(SAMPLING_RATE // 400, SAMPLING_RATE // 70)
    return SAMPLING_RATE / lags[np.fft.irfft(power)[lags].argmax()]


def test_a_voice_that_there_is_not(engines):
    with pytest.raises(RuntimeError, match="eSpeak has no voice 'nobody'"):
        speak("Yes.", Voice("espeak", "nobody", 50, 160))


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "name"), voices(), ids=[f"{engine}-{name}" for engine, name in voices()])
@torch.no_grad()
def test_whisper_understands_every_voice(engine, name, engines, whisper):
    """`-s` shows the rates."""
    spelled = EnglishTextNormalizer({})
    rng = random.Random(name)
    sounds = [speak(text, draw_manner(rng, engine, name)).astype(np.float32) / 2**15 for text in SENTENCES]
    said = [heard.text for heard in whisper.transcribe(whisper.hear(*whisper.features(sounds)), "en")]
    rate = wer([str(spelled(text)) for text in SENTENCES], [str(spelled(text)) for text in said]).rate
    print(f"{engine} {name}: {rate:.1%}")
    assert rate <= UNDERSTOOD, said
