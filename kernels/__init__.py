"""Packed operations on token streams: a readable torch reference per operation."""

from .attention import attention_received, block_attention
from .greedy import farthest_first, greedy_map
from .merge import merge_chains, merge_pairs, nest_runs, run_lengths
from .packed import clip_ids, offsets, positions, unfold
from .segment import segment_centres, segment_mean, segment_reduce, segment_softmax
from .select import adjacent_cosine, evenly, pad_clips, top_k
from .ward import ward_exact, ward_greedy

__all__ = [
    "adjacent_cosine",
    "attention_received",
    "block_attention",
    "clip_ids",
    "evenly",
    "farthest_first",
    "greedy_map",
    "merge_chains",
    "merge_pairs",
    "nest_runs",
    "offsets",
    "pad_clips",
    "positions",
    "run_lengths",
    "segment_centres",
    "segment_mean",
    "segment_reduce",
    "segment_softmax",
    "top_k",
    "unfold",
    "ward_exact",
    "ward_greedy",
]
