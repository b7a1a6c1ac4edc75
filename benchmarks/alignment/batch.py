"""A batch that `align.py` trains on, and what a GPU makes of its sounds and frames.

Its media are of one shape without padding: its utterances end in silence until all are as long as the longest, its
clips are of one duration. So all rows share where their tokens of sound and picture stand, and attention needs no mask:
what the shorter answers lack comes last, where nothing real looks at it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor
from transformers import WhisperFeatureExtractor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from audiopress.kernels.packed import upload
from audiopress.models.layout import AUDIO_TOKENS_PER_SECOND, audio_lengths
from audiopress.models.rewrite import IGNORE

RATE = 16_000
TOKEN_SAMPLES = RATE // AUDIO_TOKENS_PER_SECOND
HOP = 160
FLOOR = 1e-10  # of a power, as in WhisperFeatureExtractor
PATCH, MERGE = 14, 2


@dataclass(frozen=True)
class Mark:
    """A thing is heard or seen from token `start` to before token `end` of the sound, or of the pairs of frames."""

    row: int
    heard: bool
    start: int
    end: int
    name: int


@dataclass
class Clips:
    """What a batch of clips has and one of utterances lacks; video and frames on the model's device.

    Args:
        video: where pictures stand in every row, `[Nv]`.
        frames: `[B, T, 3, H, W]` uint8.
        marks: what is heard or seen when.
        percent: how much of the clip is over at each place of a row, `[L]`; NaN in text.
        began: how much was over when what is heard or seen at a place began, `[B, L]`; NaN where nothing is.
        stamps: where the timestamps of every row end, `[S]`.
        now: what is heard and what is seen just before each, `[B, S, 2]`: 0 for nothing, or 1 + the name.
    """

    video: Tensor
    frames: Tensor
    marks: list[Mark]
    percent: Tensor
    began: Tensor
    stamps: Tensor
    now: Tensor

    @property
    def per_group(self) -> int:
        """Tokens of a pair of frames."""
        return 2 * len(self.video) // self.frames.shape[1]


@dataclass
class Batch:
    """Rows of one shape; ids, positions and sounds on the model's device, and on the CPU what only losses read.

    Args:
        ids: `[B, L]`.
        labels: `[B, L]`.
        positions: `[3, L]`, of all rows.
        audio: where sound stands in every row, `[Na]`.
        waves: `[B, samples]` float32.
        answers: speech: the token ids of what is said, of each row, without the end of the turn.
        clips: None: it is speech.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    audio: Tensor
    waves: Tensor
    answers: list[Tensor] = field(default_factory=list)
    clips: Clips | None = None


def audio_tokens(samples: int) -> int:
    """Gives the tokens of a sound."""
    return audio_lengths(torch.tensor([-(-samples // HOP)]))[0]


def pad_rows(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Gives rows of ids as one tensor, `value` after the shorter ones."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def labels_of(rows: Sequence[Sequence[int]]) -> Tensor:
    """Gives rows of labels as one tensor."""
    return pad_rows(rows, IGNORE)


def log_mel(waves: Tensor, extractor: WhisperFeatureExtractor) -> Tensor:
    """Gives what `Encoder` reads off a sound, `[B, mel, frames]`: Whisper's log-mel, silence after the end.

    Args:
        waves: `[B, samples]` float32 at 16 kHz.
        extractor: the processor's.
    """
    frames = -(-waves.shape[1] // HOP)
    size = extractor.n_fft
    padded = torch.nn.functional.pad(waves, (0, size))
    window = torch.hann_window(size, device=waves.device)
    power = torch.stft(padded, size, HOP, window=window, return_complex=True).abs().square()[..., :frames]
    filters = upload(extractor.mel_filters, waves.device, torch.float32)  # [bins, mel]
    log = (filters.T @ power).clamp(min=FLOOR).log10()
    return (torch.maximum(log, log.amax(dim=(1, 2), keepdim=True) - 8) + 4) / 4


def patches(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Gives what the video processor makes of frames, the patches of all rows `[N, values]`, and their grids `[B, 3]`.

    Args:
        frames: `[B, T, 3, H, W]` uint8, T even, H and W multiples of 28: none is resized.
    """
    mean, std = (upload(x, frames.device, torch.float32).view(3, 1, 1) for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    rows, times, _, height, width = frames.shape
    pixels = (frames.float() / 255 - mean) / std
    flat = rearrange(
        pixels,
        "b (t dt) c (h mh p) (w mw q) -> (b t h w mh mw) (c dt p q)",
        dt=2,
        mh=MERGE,
        mw=MERGE,
        p=PATCH,
        q=PATCH,
    )
    return flat, torch.tensor([[times // 2, height // PATCH, width // PATCH]] * rows)
