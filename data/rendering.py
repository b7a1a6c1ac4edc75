"""Writes a planned clip as a real mp4 file: H.264 frames and an AAC track, as a user's own would be."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from .stamps import SAMPLING_RATE, read_picture, read_recording
from .timeline import PAUSE, Clip, Event

# All guesses: what can be heard and seen without effort, in clips that do not resemble each other.
_GAIN_DB = (-6.0, 0.0)  # of a recording
_NOISE_DB = (-30.0, -15.0)  # of the background, against the recordings' loudness of -23 dB
_RECORDING_DB = -23.0
_NOISE_SLOPE = (0.0, 2.0)  # its power falls with frequency to this power: white 0, pink 1, brown 2
_PICTURE_SIDE = (0.5, 0.9)  # of the frame
_GREY, _TINT = (110, 230), 20  # of the background, from 255, and how far its colours are from grey
_FADE = 160  # samples, 10 ms, where a recording is cut

_AUDIO_BITS = 64_000  # a second: transparent for 16 kHz mono
_VIDEO_OPTIONS = {"crf": "20", "preset": "veryfast", "threads": "1"}  # the result depends on the number of threads


def render(clip: Clip, path: Path, size: int = 224, fps: int = 4) -> None:
    """Writes the mp4 of a clip; an interrupted call leaves no file `path`.

    A sound begins and ends with its event to the sample; a picture is in the frames whose time lies in
    `[start, end)`.

    Args:
        clip: what happens in it.
        path: of the file.
        size: width and height of the frames, even.
        fps: frames per second.
    """
    rng = np.random.default_rng(clip.seed)
    sound, frames = soundtrack(clip, rng), pictures(clip, rng, size)
    shown = schedule(clip, fps)
    partial_file = path.with_suffix(f".{os.getpid()}.partial")
    try:
        _write(partial_file, sound, [frames[i] for i in shown], fps)
        os.replace(partial_file, path)
    finally:
        partial_file.unlink(missing_ok=True)


def schedule(clip: Clip, fps: int) -> np.ndarray:
    """Gives which of `pictures` each frame shows, `[frames]`."""
    shown = np.full(clip.duration * fps, len(clip.events))  # the empty background
    for i, event in enumerate(clip.events):
        shown[math.ceil(event.start * fps) : math.ceil(event.end * fps)] = i
    return shown


def soundtrack(clip: Clip, rng: np.random.Generator) -> np.ndarray:
    """Gives the background noise with the events' sounds in it, `[samples]` float32."""
    track = _noise(clip.duration * SAMPLING_RATE, rng)
    for event in clip.events:
        if event.heard:
            sound = _repeat(read_recording(event.heard.file), event)
            start = round(event.start * SAMPLING_RATE)
            track[start : start + len(sound)] += sound * _linear(rng.uniform(*_GAIN_DB))
    return np.clip(track, -1, 1).astype(np.float32)


def _repeat(recording: np.ndarray, event: Event) -> np.ndarray:
    """Repeats a recording with pauses for as long as the event lasts; one that is longer fades out at its end."""
    samples, pause = round((event.end - event.start) * SAMPLING_RATE), np.zeros(round(PAUSE * SAMPLING_RATE))
    if len(recording) > samples:
        recording = recording[:samples].copy()
        recording[-_FADE:] *= np.linspace(1, 0, _FADE)
        return recording
    times = -(-samples // (len(recording) + len(pause)))
    return np.concatenate(times * [recording, pause])[:samples]


def _noise(samples: int, rng: np.random.Generator) -> np.ndarray:
    """Gives noise of a random colour and loudness."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    slope, loudness = rng.uniform(*_NOISE_SLOPE), _linear(_RECORDING_DB + rng.uniform(*_NOISE_DB))
    frequency = np.fft.rfftfreq(samples, 1 / SAMPLING_RATE)
    spectrum *= np.maximum(frequency, 50) ** (-slope / 2)  # Hz; below nothing is heard, and it would grow without end
    noise = np.fft.irfft(spectrum, samples)
    return noise * (loudness / np.sqrt(np.mean(noise**2)))


def _linear(decibels: float) -> float:
    return 10 ** (decibels / 20)


def pictures(clip: Clip, rng: np.random.Generator, size: int) -> list[np.ndarray]:
    """Gives a frame `[size, size, 3]` uint8 for every event, and the empty background as the last one."""
    top, bottom = (rng.uniform(*_GREY) + rng.uniform(-_TINT, _TINT, 3) for _ in range(2))
    rows = np.linspace(top, bottom, size).round().astype(np.uint8)
    background = np.ascontiguousarray(np.broadcast_to(rows[:, None], (size, size, 3)))
    frames = []
    for event in clip.events:
        canvas = Image.fromarray(background)
        if event.seen:
            picture = read_picture(event.seen.file, round(size * rng.uniform(*_PICTURE_SIDE)))
            place = [int(rng.integers(size - side + 1)) for side in picture.size]
            canvas.paste(picture, (place[0], place[1]), picture)
        frames.append(np.asarray(canvas))
    return [*frames, background]


def _write(path: Path, sound: np.ndarray, frames: Sequence[np.ndarray], fps: int) -> None:
    """Encodes both tracks second by second, so that they lie side by side in the file."""
    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=fps, options=_VIDEO_OPTIONS)
        video.height, video.width = frames[0].shape[:2]
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=SAMPLING_RATE, layout="mono")
        audio.bit_rate = _AUDIO_BITS
        for second in range(len(frames) // fps):
            for number in range(second * fps, (second + 1) * fps):
                picture = av.VideoFrame.from_ndarray(frames[number], format="rgb24")
                picture.pts, picture.time_base = number, Fraction(1, fps)
                container.mux(video.encode(picture))
            first = second * SAMPLING_RATE
            samples = av.AudioFrame.from_ndarray(
                sound[None, first : first + SAMPLING_RATE], format="fltp", layout="mono"
            )
            samples.sample_rate, samples.pts = SAMPLING_RATE, first
            samples.time_base = Fraction(1, SAMPLING_RATE)
            container.mux(audio.encode(samples))
        container.mux(video.encode(None))
        container.mux(audio.encode(None))
