"""The clips of a page: each one's sound, its spectrogram, and what was heard in it by method and rate."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import jiwer
import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image

from audiopress.benchmarks.plots import log_mel, token_spans
from audiopress.compression import TokenStream
from audiopress.compression.base import TOKENS_PER_SECOND
from audiopress.data.media import read_audio
from audiopress.data.speech import speech_packages, speech_records

log = logging.getLogger(__name__)

CLIPS = "clips"  # the testbed that rows of clips name
SPLIT = "test"  # whose prompts are heard
SAMPLING_RATE = 16_000  # of what Whisper hears
BIT_RATE = 32_000  # of the embedded MP3: clear speech (a choice); every browser plays MP3
EVERY = 4  # frames of the spectrogram: 20 ms each; more would not be seen on a page

Row = dict[str, Any]
Sound = Callable[[str, Sequence[str]], np.ndarray]


def heard_clips(rows: Sequence[Row], sound: Sound) -> list[dict[str, Any]]:
    """Gives each clip with its sound, its picture, and what was heard in it by the last row of a method and rate.

    Args:
        rows: of `page_clips.py`.
        sound: gives the samples of a language's prompts, at 16 kHz.
    """
    last = {(row["method"], row["keep_ratio"]): row for row in rows}
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in last.values():
        if row["status"] != "ok":
            log.warning("the page lacks the clips of %s: %s", row["method"], row["message"])
            continue
        for clip in row["transcripts"]:
            key = (clip["language"], *clip["prompts"])
            if key not in found:
                found[key] = _clip(clip, sound(clip["language"], clip["prompts"]))
            found[key]["heard"].append(_heard(row, clip))
    return list(found.values())


def recorded(language: str, prompts: Sequence[str]) -> np.ndarray:
    """Gives recorded prompts, one after another."""
    known = {record.id: record for record in speech_records(SPLIT, [language])}
    if missing := [prompt for prompt in prompts if prompt not in known]:
        raise ValueError(f"there is no prompt {missing[0]!r} in the {SPLIT} split; run benchmarks/page_clips.py again")
    return np.concatenate([read_audio(known[prompt].audio, SAMPLING_RATE) for prompt in prompts])


def mp3(samples: np.ndarray) -> bytes:
    """Encodes `[samples]` in [-1, 1] at 16 kHz."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp3") as container:
        stream = container.add_stream("libmp3lame", rate=SAMPLING_RATE, layout="mono")
        stream.bit_rate = BIT_RATE
        frame = av.AudioFrame.from_ndarray(samples[None].astype(np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = SAMPLING_RATE, 0, Fraction(1, SAMPLING_RATE)
        for part in av.AudioResampler(format=stream.format.name, frame_size=stream.frame_size).resample(frame):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def picture(samples: np.ndarray) -> tuple[bytes, float, float]:
    """Draws the spectrogram of `[samples]` at 16 kHz as WebP; gives it and the seconds at which it begins and ends."""
    shades, begin, step = log_mel(samples, SAMPLING_RATE)
    shades = shades[::-1, ::EVERY]
    colours = (255 * colormaps["magma"](shades)[..., :3]).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colours).save(buffer, "WEBP", quality=80)
    return buffer.getvalue(), begin, begin + shades.shape[1] * EVERY * step


def compare(said: str, heard: str) -> list[list[str]]:
    """Gives both texts in runs of words: equal, substitute, delete or insert; then what was said and what was heard."""
    if not heard:
        return [["delete", said, ""]]
    found = jiwer.process_words(said, heard)
    before, after = said.split(), heard.split()
    return [
        [
            run.type,
            " ".join(before[run.ref_start_idx : run.ref_end_idx]),
            " ".join(after[run.hyp_start_idx : run.hyp_end_idx]),
        ]
        for run in found.alignments[0]
    ]


def _clip(clip: Row, samples: np.ndarray) -> dict[str, Any]:
    image, begin, end = picture(samples)
    package, _ = speech_packages(clip["language"])
    return {
        "language": clip["language"],
        "seconds": clip["seconds"],
        "said": clip["said"],
        "audio": _embedded("audio/mpeg", mp3(samples)),
        "picture": {"url": _embedded("image/webp", image), "start": begin, "end": end},
        "source": f"{package.name}, {', '.join(Path(f).name for f in package.files)}: {package.licence}",
        "heard": [],
    }


def _heard(row: Row, clip: Row) -> dict[str, Any]:
    before, after = clip["tokens"]
    slots, sizes = torch.tensor(clip["slots"]), torch.tensor(clip["sizes"])
    spans = token_spans(TokenStream(torch.zeros(after, 1), (after,), slots, sizes)) / TOKENS_PER_SECOND
    merged = bool((sizes != 1).any())
    return {
        "method": row["method"],
        "rate": None if row["keep_ratio"] is None else round(TOKENS_PER_SECOND * row["keep_ratio"], 3),
        "tokens_per_second": TOKENS_PER_SECOND * after / before,
        "kind": "all" if after == before else "merged" if merged else "kept",
        "spans": spans.round(3).tolist(),
        "wer": 100 * clip["wer"],
        "ended": clip["ended"],
        "runs": compare(clip["said"], clip["heard"]),
    }


def _embedded(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
