"""Packed operations on token streams: a readable torch reference per operation, and Triton kernels for some."""

from .attention import block_attention, causal_attention
from .gather import gather_rows
from .greedy import farthest_first, greedy_map
from .merge import merge_chains, merge_pairs, nest_runs, run_lengths
from .packed import clip_ids, offsets, positions, tally, unfold, upload
from .received import attention_received
from .segment import segment_centres, segment_mean, segment_merge, segment_reduce, segment_softmax
from .select import TIE, adjacent_cosine, evenly, most_alike, pad_clips, top_k, unpad_clips
from .ward import move_boundaries, ward_exact, ward_greedy

__all__ = [
    "TIE",
    "adjacent_cosine",
    "attention_received",
    "block_attention",
    "causal_attention",
    "clip_ids",
    "evenly",
    "farthest_first",
    "gather_rows",
    "greedy_map",
    "merge_chains",
    "merge_pairs",
    "most_alike",
    "move_boundaries",
    "nest_runs",
    "offsets",
    "pad_clips",
    "positions",
    "run_lengths",
    "segment_centres",
    "segment_mean",
    "segment_merge",
    "segment_reduce",
    "segment_softmax",
    "tally",
    "top_k",
    "unfold",
    "unpad_clips",
    "upload",
    "ward_exact",
    "ward_greedy",
]
