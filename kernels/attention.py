"""Attention inside blocks of packed states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .backend import use_triton
from .packed import bounds
from .select import pad_clips, unpad_clips
from .varlen import HALF, HEAD_MULTIPLE, can_use_varlen, varlen_attention


def block_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float, key_bias: Tensor | None = None
) -> Tensor:
    """Attends inside each block, in one call for all blocks.

    Args:
        query: `[N, H, d]`.
        key: `[N, H, d]`.
        value: `[N, H, d]`.
        lengths: states per block, that sum to N.
        scale: of the logits.
        key_bias: `[N]`, added to every logit of its key.

    Returns:
        `[N, H, d]`.
    """
    if can_use_varlen(query):
        size = query.shape[-1]
        if key_bias is not None:
            query, key, value = append_key_bias(query, key, value, key_bias[:, None, None], scale)
        blocks = bounds(tuple(lengths), query.device)
        return varlen_attention(query, key, value, blocks, max(lengths, default=0), scale)[..., :size]
    padded = [pad_clips(x, lengths) for x in (query, key, value)]
    real = padded[0][1]
    q, k, v = (x.transpose(1, 2) for x, _ in padded)  # [B, H, n, d]
    mask = None
    if key_bias is not None:
        bias, _ = pad_clips(key_bias.to(q.dtype), lengths, value=-torch.inf)
        mask = bias[:, None, None]
    elif len(set(lengths)) > 1:
        mask = real[:, None, None]
    mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return unpad_clips(mixed.transpose(1, 2), lengths)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None, scale: float, backend: str = "auto"
) -> Tensor:
    """Attends to oneself and what is before, with or without a bias on every key.

    Args:
        query: `[B, H, L, d]`.
        key: `[B, K, L, d]`, where H is a multiple of K: each key head serves H / K query heads that follow one another.
        value: `[B, K, L, d]`.
        key_bias: `[B, L]`, added to every logit of its key; None for nothing.
        scale: of the logits.
        backend: "auto", "torch" or "triton". The kernel is forward only, for half precision on a GPU; where it does not
            fit, "auto" does without.

    Returns:
        `[B, H, L, d]`.
    """
    inputs = (query, key, value, key_bias)
    if use_triton(backend, query) and (backend == "triton" or has_causal_kernel(*inputs)):
        if _needs_gradient(*inputs):
            raise ValueError("the kernel of causal_attention has no backward pass: choose backend 'torch' or 'auto'")
        from . import triton_causal

        if key_bias is None:
            key_bias = query.new_zeros(len(query), query.shape[2])
        return triton_causal.causal_attention(query, key, value, key_bias, scale)
    size = query.shape[-1]
    if key_bias is not None:
        query, key, value = append_key_bias(query, key, value, key_bias[:, None, :, None], scale)
    grouped = query.shape[1] != key.shape[1]
    mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    return mixed[..., :size]


def has_causal_kernel(query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None) -> bool:
    """Tells whether the kernel of `causal_attention` takes these: half precision, no gradient, 2^n channels."""
    size = query.shape[-1]
    fits = query.dtype == key.dtype == value.dtype in HALF and 16 <= size <= 128 and size & (size - 1) == 0
    return fits and not _needs_gradient(query, key, value, key_bias)


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def append_key_bias(
    query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes a bias per key into further head channels, where any attention function adds it to the logits.

    The queries get ones, the keys the bias over the scale: in two channels, so that half precision loses little of it.
    Values get zeros, and so does the output beyond its own channels.

    Args:
        query: `[..., d]`.
        key: `[..., d]`.
        value: `[..., d]`.
        key_bias: of the keys' shape, with one channel or none to broadcast.
        scale: of the logits.

    Returns:
        The three with `d` raised to a multiple of 8.
    """
    bias = (key_bias.float() / scale).expand(*key.shape[:-1], 1)
    high = bias.to(key.dtype)
    low = (bias - high).to(key.dtype)
    spare = HEAD_MULTIPLE - 2 + -query.shape[-1] % HEAD_MULTIPLE
    ones = query.new_ones(*query.shape[:-1], 2)
    return (
        functional.pad(torch.cat([query, ones], dim=-1), (0, spare)),
        functional.pad(torch.cat([key, high, low], dim=-1), (0, spare)),
        functional.pad(value, (0, spare + 2)),
    )
