"""Packed operations on token streams: a readable torch reference per operation."""

from .packed import clip_ids, offsets, positions, unfold
from .segment import segment_centres, segment_mean, segment_reduce, segment_softmax

__all__ = [
    "clip_ids",
    "offsets",
    "positions",
    "segment_centres",
    "segment_mean",
    "segment_reduce",
    "segment_softmax",
    "unfold",
]
