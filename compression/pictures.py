"""Which picture is on the screen while a step of the sound is heard."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import clip_ids, positions, segment_mean
from .frames import even_windows
from .stream import TokenStream


def shown_pictures(
    video: TokenStream, seconds: Tensor, steps: Sequence[int], step_seconds: float, size: int
) -> tuple[TokenStream, Tensor]:
    """Finds the picture of every step: all video tokens of that step, or of the latest step before it that has any.

    Args:
        video: the video tokens of each clip's sample.
        seconds: `[V]`, when each happens, on the clip's own clock, in any order.
        steps: how many steps each clip has, C numbers that sum to S.
        step_seconds: how long a step is; step i of a clip starts at `i * step_seconds`.
        size: a picture of more tokens is averaged to so many, in even runs in the order of its tokens.

    Returns:
        The pictures, as a stream of G clips, and the picture of each step, `[S]` int64; -1 where none was shown yet.
    """
    step = (seconds.double() / step_seconds).floor().long().cpu()  # [V]
    # One number for clip and step, that sorts by clip first.
    low = min(0, int(step.min())) if len(step) else 0
    span = max([int(step.max()) if len(step) else 0, *steps]) - low + 1
    key = clip_ids(video.lengths) * span + step - low
    order = key.argsort(stable=True)
    keys, counts = key[order].unique_consecutive(return_counts=True)  # [G]
    pictures = TokenStream(video.embeds[order.to(video.embeds.device)], counts.tolist())
    kept = [min(n, size) for n in pictures.lengths]
    embeds = segment_mean(pictures.embeds, pictures.sizes, even_windows(pictures, kept))

    clips = clip_ids(steps)  # [S]
    latest = torch.searchsorted(keys, clips * span + positions(steps) - low, right=True) - 1
    mine = keys.div(span, rounding_mode="floor")  # the clip of each picture
    shown = torch.where((latest >= 0) & (torch.cat((mine, mine.new_full((1,), -1)))[latest] == clips), latest, -1)
    return TokenStream(embeds, tuple(kept)), shown.to(video.embeds.device)
