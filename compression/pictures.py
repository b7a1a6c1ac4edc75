"""The video of a clip's sample, and which picture is on the screen while a step of the sound is heard."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import clip_ids, positions, segment_mean, upload
from .base import Context, check_finite
from .frames import even_windows
from .stream import TokenStream


def read_video(context: Context, method: str, clips: int, hidden_size: int) -> tuple[TokenStream, Tensor]:
    """Gives the video tokens of each clip's sample and their seconds.

    Raises:
        ValueError: they were not captured, do not fit the clips or the LLM's width, or are not finite.
    """
    video: TokenStream = context.require("video", method)
    seconds: Tensor = context.require("video_seconds", method)
    shape = tuple(video.embeds.shape)
    if len(video.lengths) != clips or shape[1] != hidden_size or seconds.shape != shape[:1]:
        raise ValueError(
            f"{method}: video must hold tokens of width {hidden_size} of {clips} clips, and video_seconds one second "
            f"of each; got {list(shape)} of {len(video.lengths)} clips and {list(seconds.shape)}"
        )
    check_finite(video, method, "video")
    check_finite(video.replace(embeds=seconds[:, None]), method, "video_seconds")
    return video, seconds


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
    # A thousandth, so that rounding does not put what happens as a step starts into the one before.
    step = (seconds.double() / step_seconds + 1e-3).floor().long().cpu()  # [V]
    # One number for clip and step, that sorts by clip first.
    low = min(0, int(step.min())) if len(step) else 0
    span = max([int(step.max()) if len(step) else 0, *steps]) - low + 1
    key = clip_ids(video.lengths) * span + step - low
    order = key.argsort(stable=True)
    keys, counts = key[order].unique_consecutive(return_counts=True)  # [G]
    pictures = TokenStream(video.embeds[upload(order, video.embeds.device)], counts.tolist())
    kept = [min(n, size) for n in pictures.lengths]
    embeds = segment_mean(pictures.embeds, pictures.sizes, even_windows(pictures, kept))

    clips = clip_ids(steps)  # [S]
    latest = torch.searchsorted(keys, clips * span + positions(steps) - low, right=True) - 1
    mine = keys.div(span, rounding_mode="floor")  # the clip of each picture
    shown = torch.where((latest >= 0) & (torch.cat((mine, mine.new_full((1,), -1)))[latest] == clips), latest, -1)
    return TokenStream(embeds, tuple(kept)), upload(shown, video.embeds.device)
