"""Samples with sound and pictures as Qwen2.5-Omni interleaves them, for the tests of joint methods."""

from __future__ import annotations

import torch

from audiopress import Context, TokenStream
from audiopress.compression.base import Scene

Row = tuple[int, int, int, int, int]  # is video, source, time, height, width


def film(
    seconds: float,
    step: float = 1.0,
    height: int = 2,
    width: int = 3,
    start: int = 0,
    source: int = 0,
    sound: bool = True,
) -> list[Row]:
    """A video with a frame of `height * width` tokens every `step` seconds: 2 s of it, 2 s of its sound, and so on."""
    rows = []
    for second in range(0, int(seconds + 1), 2):
        chunk = range(50 * (second // 2), min(50 * (second // 2 + 1), int(25 * seconds)))
        times = [int(25 * i * step) for i in range(int(seconds / step + 1))]
        rows += [
            (1, source, start + t, start + h, start + w)
            for t in times
            if t in chunk
            for h in range(height)
            for w in range(width)
        ]
        rows += [(0, source, start + t, start + t, start + t) for t in chunk if sound]
    return rows


def scene_of(*samples: list[Row]) -> tuple[Scene, tuple[int, ...]]:
    """The scene of a batch of samples, and their lengths."""
    rows = torch.tensor([row for sample in samples for row in sample], dtype=torch.long).reshape(-1, 5)
    times = rows[:, 2]
    return Scene(rows[:, 0].bool(), times / 25, rows[:, 2:].T, rows[:, 1]), tuple(map(len, samples))


def inputs_of(*samples: list[Row], width: int = 12, seed: int = 0) -> tuple[TokenStream, Context]:
    """The same with random tokens and attention."""
    scene, lengths = scene_of(*samples)
    generator = torch.Generator().manual_seed(seed)
    stream = TokenStream(torch.randn(sum(lengths), width, generator=generator), lengths)
    attention = torch.rand(sum(lengths), generator=generator) * ~scene.is_video
    return stream, Context(encoder_attention=attention, scene=scene)


def second_film(first: list[Row], **options) -> list[Row]:
    """A sample of a film and another one, of another shape, whose positions start after the first's."""
    after = max(max(row[2:]) for row in first) + 5
    return first + film(**{"seconds": 3.5, "height": 3, "width": 2, "start": after, "source": 1} | options)


SAMPLES = {
    "papers": film(6),
    "odd": film(5.3, step=1.3, height=3),
    "sparse": film(31, step=9.5),
    "two": second_film(film(4.6, step=0.5)),
    "silent": film(7, sound=False),
    "separate": film(5, sound=False) + [(0, 0, 300 + t, 300 + t, 300 + t) for t in range(130)],
    "audio": [(0, 0, t, t, t) for t in range(77)],
    "one of each": [(1, 0, 0, 0, 0), (0, 0, 0, 0, 0)],
    "token": [(0, 0, 3, 3, 3)],
    "nothing": [],
}


def slow_largest_remainder(shares: list[float], limits: list[int], total: int) -> list[int]:
    """Fills what is over its limit, one after another; then rounds."""
    full: set[int] = set()
    while True:
        weights = [0 if i in full else s for i, s in enumerate(shares)]
        if sum(weights) == 0:
            weights = [0 if i in full else n for i, n in enumerate(limits)]
        left = total - sum(limits[i] for i in full)
        whole = sum(weights) or 1
        quotas = [limits[i] if i in full else left * w / whole for i, w in enumerate(weights)]
        over = [i for i, q in enumerate(quotas) if q > limits[i] and i not in full]
        if not over:
            break
        full |= set(over)
    dealt = [int(q + 1e-9) for q in quotas]
    rest = [round(float(q - d), 9) for q, d in zip(quotas, dealt, strict=True)]
    for i in sorted(range(len(shares)), key=lambda i: (-rest[i], i))[: total - sum(dealt)]:
        dealt[i] += 1
    return dealt
