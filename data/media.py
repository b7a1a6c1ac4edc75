"""Decodes the sound and the frames of a file with PyAV.

Second 0 of both is the start of the container, so that a track that begins later than the other stays in step with it.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from scipy.signal import resample_poly
from torch import Tensor

logger = logging.getLogger(__name__)

# Containers whose header states the length exactly, so that less content than stated means a broken file.
_EXACT_LENGTH = {"flac", "mov,mp4,m4a,3gp,3g2,mj2"}
_MISSING_SECONDS = 0.5  # tolerated before a file counts as broken: more than encoder padding, a guess


class MediaError(ValueError):
    """A media file cannot be used; the message names the file and the reason."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = Path(path), reason

    def __reduce__(self) -> tuple[type[MediaError], tuple[Path, str]]:
        return MediaError, (self.path, self.reason)  # a worker process of a data loader sends its errors pickled


@dataclass(frozen=True)
class VideoFrames:
    """Frames sampled from a video.

    Args:
        frames: `[T, 3, H, W]` uint8 RGB, T even.
        seconds: `[T]` float64, when each is shown.
        duration: of the whole video track, in seconds.
    """

    frames: Tensor
    seconds: Tensor
    duration: float


def read_audio(
    path: Path | str,
    sampling_rate: int = 16_000,
    *,
    max_seconds: float | None = None,
    limit_seconds: float | None = None,
    format: str | None = None,
) -> np.ndarray:
    """Decodes the first audio track: the mean of its channels, resampled with a polyphase filter.

    Args:
        path: any container and codec of FFmpeg: wav, flac, mp3, ogg, mp4, raw g722 ...
        sampling_rate: of the result, in Hz.
        max_seconds: cut after so many seconds.
        limit_seconds: more than so many seconds (after the cut) are an error.
        format: FFmpeg's name of the container, for a raw file whose name has no telling suffix.

    Returns:
        Samples, `[samples]` float32 in about [-1, 1].

    Raises:
        MediaError: the file is missing, broken or shorter than its header says, has no audio track, no samples,
            samples that are not finite, or more than `limit_seconds`.
    """
    with _open(path, "audio", format) as (container, stream):
        samples, rate = _decode_audio(path, container, stream, max_seconds, limit_seconds)
    if not samples.size:
        raise MediaError(path, "the audio track holds no samples")
    if not np.isfinite(samples).all():
        bad = np.flatnonzero(~np.isfinite(samples))
        first = bad[0] / rate
        raise MediaError(path, f"{bad.size} of {samples.size} samples are NaN or infinite, the first at {first:.2f} s")
    common = gcd(sampling_rate, rate)
    resampled = resample_poly(samples, sampling_rate // common, rate // common)
    return np.ascontiguousarray(resampled, dtype=np.float32)


def read_video(path: Path | str, num_frames: int) -> VideoFrames:
    """Decodes frames spread evenly over the first video track, the first and the last one included.

    Of n frames it takes numbers `linspace(0, n - 1, num_frames).round()`, or all of them where n is smaller. The
    vision tower joins frames in pairs: when an odd number results, the last frame is given twice.

    The packets are counted first; then only the stretches from a key frame to a wanted frame are decoded, so neither
    the number of frames nor a constant rate is taken from the header, and only the result is held in memory.

    Args:
        path: any container and codec of FFmpeg.
        num_frames: at least 2.

    Returns:
        The frames in the file's own resolution, their times and the duration of the track.

    Raises:
        MediaError: the file is missing, broken or shorter than its header says, has no video track, fewer than two
            frames, or frames without time stamps or of changing size.
    """
    if num_frames < 2:
        raise ValueError(f"num_frames must be at least 2, got {num_frames}")
    with _open(path, "video") as (container, stream):
        track = _index(path, container, stream)
    chosen = np.linspace(0, len(track.times) - 1, min(num_frames, len(track.times))).round().astype(int)
    wanted = [track.times[i] for i in chosen]
    # A container without an index may land behind where it was told to go: then everything is decoded.
    for keys in (track.keys, []):
        with _open(path, "video") as (container, stream):
            stream.thread_type = "AUTO"
            frames = list(_decode_frames(container, stream, wanted, keys))
            origin, tick = _origin(container), float(stream.time_base)
        if [pts for _, pts in frames] == wanted:
            break
    if len(frames) < len(wanted):
        raise MediaError(path, f"its last frames cannot be decoded; {len(frames)} of {len(wanted)} wanted ones can")
    if len({frame.shape for frame, _ in frames}) > 1:
        raise MediaError(path, "its frames change size on the way; re-encode it to one size")
    if len(frames) % 2:
        logger.debug("%s: %d frames, the last one is given twice", path, len(frames))
        frames.append(frames[-1])
    seconds = torch.tensor([pts * tick - origin for _, pts in frames], dtype=torch.float64)
    pixels = torch.from_numpy(np.stack([frame for frame, _ in frames])).permute(0, 3, 1, 2).contiguous()
    return VideoFrames(pixels, seconds, track.end * tick - origin)


@dataclass(frozen=True)
class _Track:
    """Where the frames of a video are, in ticks of its time base: all, the key frames, and the end of the last."""

    times: list[int]
    keys: list[int]
    end: float


@contextmanager
def _open(path: Path | str, kind: str, format: str | None = None) -> Iterator[tuple[Any, Any]]:
    """Opens the first audio or video track; every error of FFmpeg inside becomes a MediaError."""
    try:
        with av.open(str(path), format=format) as container:
            streams = getattr(container.streams, kind)
            if not streams:
                has = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
                raise MediaError(path, f"it has no {kind} track, only {has}")
            yield container, streams[0]
    except av.FFmpegError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be decoded ({error.strerror})"
        raise MediaError(path, reason) from error


def _origin(container: Any) -> float:
    """Gives the second at which the container starts; most start at 0."""
    return (container.start_time or 0) / av.time_base


def _decode_audio(
    path: Path | str, container: Any, stream: Any, max_seconds: float | None, limit_seconds: float | None
) -> tuple[np.ndarray, int]:
    """Gives mono samples at the track's own rate, and that rate."""
    as_float = av.AudioResampler(format="fltp")  # changes neither rate nor channels
    parts: list[np.ndarray] = []
    total, rate, layout = 0, stream.rate, stream.layout.name
    for frame in container.decode(stream):
        if not parts:
            rate, layout = frame.sample_rate, frame.layout.name
            delay = max(round(((frame.time or 0.0) - _origin(container)) * rate), 0)
            parts.append(np.zeros(delay, np.float32))
            total = delay
        elif (frame.sample_rate, frame.layout.name) != (rate, layout):
            raise MediaError(path, f"the audio changes on the way, from {layout} at {rate} Hz to {frame}")
        for part in as_float.resample(frame):
            parts.append(part.to_ndarray().mean(axis=0))  # [channels, samples] -> [samples]
            total += part.samples
        if max_seconds is not None and total >= max_seconds * rate:
            break
        if limit_seconds is not None and total > limit_seconds * rate:
            length = f"{container.duration / av.time_base:.1f} s" if container.duration else "more"
            raise MediaError(
                path,
                f"its audio lasts {length}, the limit is {limit_seconds:g} s; "
                f"cut the file, or use only its beginning with max_seconds={limit_seconds:g}",
            )
    else:
        _check_length(path, container, stream, total / rate)
    samples = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    return samples if max_seconds is None else samples[: round(max_seconds * rate)], rate


def _index(path: Path | str, container: Any, stream: Any) -> _Track:
    """Reads the packets, without decoding them."""
    packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
    stamps = [packet.dts if packet.pts is None else packet.pts for packet in packets]
    if None in stamps:
        raise MediaError(path, "its frames have no time stamps; put it into a container that has, such as mp4")
    if len(stamps) < 2:
        raise MediaError(path, f"the video has {len(stamps)} frame(s); at least 2 are needed")
    times = sorted(stamps)
    keys = sorted(stamp for stamp, packet in zip(stamps, packets, strict=True) if packet.is_keyframe)
    last = packets[stamps.index(times[-1])]
    end = times[-1] + (last.duration or (times[-1] - times[0]) / (len(times) - 1))
    _check_length(path, container, stream, (end - times[0]) * float(stream.time_base))
    return _Track(times, keys, end)


def _decode_frames(
    container: Any, stream: Any, wanted: Sequence[int], keys: Sequence[int]
) -> Iterator[tuple[np.ndarray, int]]:
    """Gives for each wanted time, in order, the frame `[H, W, 3]` shown then, and its time stamp in ticks.

    A key frame (of `keys`) between the present position and the wanted frame is gone to directly.
    """
    decoded, position = container.decode(stream), wanted[0]
    for time in wanted:
        behind = bisect_right(keys, time)
        if behind and keys[behind - 1] > position:
            container.seek(keys[behind - 1], stream=stream)
            decoded = container.decode(stream)
        for frame in decoded:
            position = frame.dts if frame.pts is None else frame.pts
            if position >= time and not frame.is_corrupt:
                yield frame.to_ndarray(format="rgb24"), position
                break


def _check_length(path: Path | str, container: Any, stream: Any, seconds: float) -> None:
    """Raises MediaError when the header states more than there is: the file was cut off, or is broken inside."""
    if container.format.name == "wav":
        _check_riff(path)
    if container.format.name not in _EXACT_LENGTH or stream.duration is None:
        return
    stated = float(stream.duration * stream.time_base)
    if seconds < stated - max(_MISSING_SECONDS, 0.01 * stated):
        raise MediaError(path, f"the file is broken: its header says {stated:.2f} s, it holds {seconds:.2f} s")


def _check_riff(path: Path | str) -> None:
    """Raises MediaError for a wav file that was cut off; FFmpeg takes its length from what is there."""
    with Path(path).open("rb") as file:
        head = file.read(8)
    stated, size = int.from_bytes(head[4:], "little") + 8, Path(path).stat().st_size
    if stated > size and stated < 1 << 32:  # a writer that could not seek back leaves the largest number there
        raise MediaError(path, f"the file is broken: its header says {stated} bytes, it holds {size}")
