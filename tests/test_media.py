"""Decoding real files, written here: pitch, times and colours must come out right, and broken files be named."""

import pickle
import wave
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from audiopress.data.media import MediaError, read_audio, read_video

LAYOUTS = {1: "mono", 2: "stereo"}


def tone(seconds: float, rate: int, channels: int = 1, hertz: float = 440.0) -> np.ndarray:
    """Gives a sine of amplitude 0.5, `[channels, samples]` float32."""
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return np.tile(wave.astype(np.float32), (channels, 1))


def write_audio(path: Path, samples: np.ndarray, rate: int, codec: str = "pcm_f32le") -> Path:
    """Writes `[channels, samples]` float32."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=LAYOUTS[len(samples)])
        encode_audio(container, stream, samples)
    return path


def encode_audio(container: Any, stream: Any, samples: np.ndarray, start: float = 0.0) -> None:
    """Writes all of an audio track, which begins at `start` seconds."""
    if samples.size:
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=LAYOUTS[len(samples)])
        frame.sample_rate, frame.pts, frame.time_base = (
            stream.rate,
            round(start * stream.rate),
            Fraction(1, stream.rate),
        )
        for converted in av.AudioResampler(format=stream.format.name).resample(frame):
            container.mux(stream.encode(converted))
    container.mux(stream.encode(None))


def write_video(
    path: Path,
    times: list[float],
    sound: np.ndarray | None = None,
    codec: str = "libx264",
    gop: int = 12,
    sound_start: float = 0.0,
    **options: str,
) -> Path:
    """Writes frames shown at `times`, of 64 x 48 pixels; frame i is grey of the value 4 i."""
    tick = Fraction(1, 25 if codec == "mpeg4" else 1000)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", gop
        stream.bit_rate = 8_000_000  # so that the greys survive
        stream.codec_context.time_base = tick
        track = None if sound is None else container.add_stream("aac", rate=48_000, layout=LAYOUTS[len(sound)])
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 4 * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(time / tick), tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            encode_audio(container, track, sound, sound_start)
    return path


def cut(path: Path, share: float = 0.6) -> Path:
    """Writes the first part of a file, as an interrupted copy leaves it."""
    short = path.with_stem(path.stem + "-cut")
    short.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return short


def pitch(samples: np.ndarray, rate: int = 16_000) -> float:
    """Gives the loudest frequency, in Hz."""
    return float(np.argmax(np.abs(np.fft.rfft(samples))) * rate / len(samples))


@pytest.mark.parametrize(
    ("suffix", "codec", "rate", "channels"),
    [
        ("wav", "pcm_s16le", 8_000, 1),
        ("wav", "pcm_f32le", 16_000, 2),
        ("wav", "pcm_s16le", 48_000, 2),
        ("flac", "flac", 44_100, 1),
        ("mp3", "libmp3lame", 44_100, 2),
        ("m4a", "aac", 22_050, 1),
        ("ogg", "libopus", 48_000, 1),
        ("g722", "g722", 16_000, 1),
    ],
)
def test_audio_of_any_kind_becomes_16_khz_mono(
    tmp_path: Path, suffix: str, codec: str, rate: int, channels: int
) -> None:
    path = write_audio(tmp_path / f"a.{suffix}", tone(1, rate, channels), rate, codec)
    samples = read_audio(path)
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert len(samples) == pytest.approx(16_000, abs=1_200)  # lossy coders pad to whole frames
    assert pitch(samples) == pytest.approx(440, abs=1)
    assert np.abs(samples[2_000:14_000]).max() == pytest.approx(0.5, abs=0.05)


def test_channels_are_averaged_and_rate_is_free(tmp_path: Path) -> None:
    left = tone(1, 16_000)
    path = write_audio(tmp_path / "a.wav", np.concatenate([left, 0 * left]), 16_000)
    np.testing.assert_allclose(read_audio(path), left[0] / 2, atol=1e-6)
    assert pitch(read_audio(path, 24_000), 24_000) == pytest.approx(440, abs=1)


def test_raw_file_without_a_telling_name(tmp_path: Path) -> None:
    path = write_audio(tmp_path / "a.g722", tone(1, 16_000), 16_000, "g722").rename(tmp_path / "prompt")
    assert pitch(read_audio(path, format="g722")) == pytest.approx(440, abs=1)


def test_length_is_cut_only_when_asked(tmp_path: Path) -> None:
    path = write_audio(tmp_path / "a.wav", tone(2, 8_000), 8_000)
    assert len(read_audio(path, max_seconds=0.5)) == 8_000
    assert len(read_audio(path, limit_seconds=2)) == 32_000
    assert len(read_audio(path, max_seconds=0.5, limit_seconds=1)) == 8_000
    with pytest.raises(MediaError, match=r"a.wav: its audio lasts 2.0 s, the limit is 1 s; .*max_seconds=1"):
        read_audio(path, limit_seconds=1)


def test_audio_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    bad = tone(1, 16_000)
    bad[0, [8_000, 9_000]] = np.nan, np.inf
    with pytest.raises(MediaError, match=r"nan.wav: 2 of 16000 samples are NaN or infinite, the first at 0.50 s"):
        read_audio(write_audio(tmp_path / "nan.wav", bad, 16_000))
    with wave.open(str(tmp_path / "zero.wav"), "wb") as empty:
        empty.setparams((1, 2, 16_000, 0, "NONE", ""))
    with pytest.raises(MediaError, match=r"zero.wav: the audio track holds no samples"):
        read_audio(tmp_path / "zero.wav")
    with pytest.raises(MediaError, match=r"missing.wav: no such file"):
        read_audio(tmp_path / "missing.wav")
    (tmp_path / "text.wav").write_text("not a wav file at all")
    with pytest.raises(MediaError, match=r"text.wav: cannot be decoded"):
        read_audio(tmp_path / "text.wav")
    with pytest.raises(MediaError, match=r"silent.mp4: it has no audio track, only video"):
        read_audio(write_video(tmp_path / "silent.mp4", [0, 0.04]))


@pytest.mark.parametrize(("suffix", "codec"), [("wav", "pcm_s16le"), ("flac", "flac"), ("m4a", "aac")])
def test_cut_off_audio_is_an_error(tmp_path: Path, suffix: str, codec: str) -> None:
    path = write_audio(tmp_path / f"a.{suffix}", tone(4, 16_000), 16_000, codec)
    with pytest.raises(MediaError, match=r"broken: its header says|cannot be decoded"):
        read_audio(cut(path))


@pytest.mark.parametrize(
    ("suffix", "codec"), [("mp4", "libx264"), ("mp4", "mpeg4"), ("mkv", "libx264"), ("ts", "libx264")]
)
@pytest.mark.parametrize("gop", [2, 12, 250])
def test_frames_are_the_right_ones(tmp_path: Path, suffix: str, codec: str, gop: int) -> None:
    path = write_video(tmp_path / f"v.{suffix}", [i / 25 for i in range(60)], codec=codec, gop=gop)
    video = read_video(path, 8)
    numbers = np.linspace(0, 59, 8).round()
    assert video.frames.shape == (8, 3, 48, 64)
    assert str(video.frames.dtype) == "torch.uint8"
    np.testing.assert_allclose(video.seconds, numbers / 25, atol=1e-3)
    np.testing.assert_allclose(video.frames.float().mean((1, 2, 3)), 4 * numbers, atol=1.9)
    assert video.duration == pytest.approx(2.4, abs=0.05)


def test_variable_frame_rate_keeps_the_real_times(tmp_path: Path) -> None:
    times = [0, 0.1, 0.2, 0.9, 1.0, 3.0, 3.04]
    video = read_video(write_video(tmp_path / "v.mp4", times), 4)
    np.testing.assert_allclose(video.seconds, [0, 0.2, 1.0, 3.04], atol=1e-3)
    np.testing.assert_allclose(video.frames.float().mean((1, 2, 3)), [0, 8, 16, 24], atol=3)


def test_an_odd_number_repeats_the_last_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", [i / 25 for i in range(7)])
    for asked, given in ((5, 6), (6, 6), (7, 8), (50, 8)):  # 50 of 7 frames are 7, and one more
        video = read_video(path, asked)
        assert len(video.frames) == len(video.seconds) == given
        if asked != 6:
            assert video.seconds[-1] == video.seconds[-2]
            assert video.frames[-1].equal(video.frames[-2])
    with pytest.raises(ValueError, match="num_frames must be at least 2, got 1"):
        read_video(path, 1)


def test_sound_of_a_video_stays_in_step(tmp_path: Path) -> None:
    times = [i / 25 for i in range(50)]
    path = write_video(tmp_path / "v.mp4", times, tone(1, 48_000, 2), sound_start=1.0)
    samples = read_audio(path)
    assert np.abs(samples[:15_500]).max() < 0.01
    assert pitch(samples[16_500:31_500]) == pytest.approx(440, abs=2)


def test_video_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    times = [i / 25 for i in range(50)]
    with pytest.raises(MediaError, match=r"one.mp4: the video has 1 frame\(s\); at least 2"):
        read_video(write_video(tmp_path / "one.mp4", [0]), 4)
    with pytest.raises(MediaError, match=r"a.wav: it has no video track, only audio"):
        read_video(write_audio(tmp_path / "a.wav", tone(1, 8_000), 8_000), 4)
    with pytest.raises(MediaError, match=r"v-cut.mp4: cannot be decoded"):
        read_video(cut(write_video(tmp_path / "v.mp4", times), 0.4), 4)
    with pytest.raises(MediaError, match=r"the file is broken: its header says 2.00 s, it holds 1\.\d+ s"):
        read_video(cut(write_video(tmp_path / "fast.mp4", times, movflags="faststart"), 0.85), 4)


def test_a_media_error_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(MediaError("a.wav", "no such file")))
    assert (str(error), error.path, error.reason) == ("a.wav: no such file", Path("a.wav"), "no such file")
