"""Both towers with one attention call per layer, and with what depends on the grids alone computed once.

Without flash-attn, transformers' towers loop in Python over their attention blocks and windows, in every layer. They
hand all of them over in one call when the name of their attention function says "flash"; the one registered here runs
torch's own variable-length flash attention on a GPU, and elsewhere pads the blocks to one batch. What the vision tower
would compute from the grids on the host, it takes as arguments; the audio tower is run by the steps of `tower.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from ..kernels import block_attention
from ..kernels.packed import bounds
from ..kernels.varlen import can_use_varlen, varlen_attention
from . import parts

NAME = "audiopress_packed_flash"
ALIGNMENT = 8  # in elements of 16 bits: what the fast matrix products ask for


def use_packed_attention(thinker: nn.Module) -> None:
    """Switches both towers to packed attention and aligns the vision tower's weights; results stay, up to rounding."""
    AttentionInterface.register(NAME, _attend)
    vision = parts.vision_tower(thinker)
    for tower in (parts.audio_tower(thinker), vision):
        tower.config._attn_implementation = NAME
    for block in vision.blocks:
        align_mlp(block.mlp)


@torch.no_grad()
def align_mlp(mlp: nn.Module) -> None:
    """Pads the inner width of a gated feed-forward with zeros to a multiple of 8; what it computes stays the same.

    Matrix products in half precision are several times slower where a width is not: 3,420 of the released vision tower
    takes 34 of its 74 ms (measured on an H200).
    """
    pad = -mlp.gate_proj.out_features % ALIGNMENT
    if pad == 0:
        return
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight = _padded(linear.weight, (0, 0, 0, pad))
        if linear.bias is not None:
            linear.bias = _padded(linear.bias, (0, pad))
        linear.out_features += pad
    mlp.down_proj.weight = _padded(mlp.down_proj.weight, (0, pad))
    mlp.down_proj.in_features += pad


def _padded(parameter: nn.Parameter, pad: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(F.pad(parameter, pad), requires_grad=parameter.requires_grad)


def is_packed(tower: nn.Module) -> bool:
    """Tells whether a tower was switched."""
    return bool(tower.config._attn_implementation == NAME)


def vision_plan(tower: nn.Module, grid_thw: Sequence[Sequence[int]], device: torch.device) -> dict[str, Any]:
    """Gives what the vision tower derives from grids: positions, windows and frames. Kept for grids seen before."""
    config = tower.config
    sizes = (config.spatial_merge_size, config.window_size, config.patch_size)
    return dict(_vision_plan(type(tower), tuple(map(tuple, grid_thw)), *sizes, device))


@lru_cache(maxsize=32)
def _vision_plan(
    tower: type, grids: tuple[tuple[int, ...], ...], merge: int, window: int, patch: int, device: torch.device
) -> dict[str, Any]:
    theirs: Any = inspect.getmodule(tower)
    with torch.inference_mode(False):  # it may be used again where there are gradients
        grid = torch.tensor(grids)
        index, windows = theirs.get_vision_window_index(
            grid, spatial_merge_size=merge, window_size=window, patch_size=patch
        )
        frames = torch.repeat_interleave(grid[:, 1] * grid[:, 2], grid[:, 0])
        return {
            "position_ids": theirs.get_vision_position_ids(grid, merge).to(device),
            "window_index": index.to(device),
            "cu_window_seqlens": windows.to(device),
            "max_window_seqlen": int(windows.diff().max()),
            "cu_seqlens": bounds(tuple(frames.tolist()), device),
            "max_seqlen": int(frames.max()),
        }


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attends inside the blocks of one packed sequence `[1, H, N, d]`; gives `[1, N, H, d]`."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if can_use_varlen(q):
        return varlen_attention(q, k, v, cu_seq_lens_q, max_length_q, scaling)[None], None
    return _attend_padded(q, k, v, cu_seq_lens_q, scaling)[None], None


@torch.compiler.disable  # it would be compiled anew for every list of lengths
def _attend_padded(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scaling: float) -> Tensor:
    return block_attention(query, key, value, bounds.diff().tolist(), scaling)
