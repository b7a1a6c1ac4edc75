"""Decoder layers like the LLM's, run over a whole prompt at once: every token sees every other."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kernels import clip_ids, upload
from .base import LLMShape


class CS2(nn.Module):
    """The Cross-Modal Semantic Sieve of EchoingPixels: a copy of the LLM's first layers without their causal mask.

    Every layer has the LLM's arithmetic and the LLM's names of parameters, so that the state of one is the state of the
    other: RMSNorm, grouped-query attention with TMRoPE, RMSNorm, SwiGLU.

    Args:
        hidden_size: D, of the LLM.
        shape: of the LLM.
        layers: how many.
        rope_sections: how many of the `head_size / 2` rotary channels follow time, height, width and time again.
    """

    def __init__(self, hidden_size: int, shape: LLMShape, layers: int, rope_sections: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.rope_sections = rope_sections
        self.layers = nn.ModuleList(Layer(hidden_size, shape) for _ in range(layers))

    def forward(self, embeds: Tensor, positions: Tensor, real: Tensor | None = None) -> Tensor:
        """Lets every real token of a sample read all others of it.

        Args:
            embeds: `[B, L, D]`, in any order.
            positions: `[3, B, L]` int64, time, height and width.
            real: `[B, L]` bool, False at padding; None if there is no padding.

        Returns:
            `[B, L, D]`, of no meaning at padding.
        """
        angles = rotary_angles(positions, self.shape, self.rope_sections)[:, None]  # [B, 1, L, head size]
        cos, sin = angles.cos().to(embeds.dtype), angles.sin().to(embeds.dtype)
        # Without a mask flash attention can be used. A sample of padding alone reads the padding, to stay finite.
        mask = None if real is None else (real | ~real.any(dim=1, keepdim=True))[:, None, None]  # [B, 1, 1, L]
        for layer in self.layers:
            embeds = layer(embeds, cos, sin, mask)
        return embeds


class Layer(nn.Module):
    """One decoder layer; the arguments are those of `CS2`."""

    def __init__(self, hidden_size: int, shape: LLMShape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(hidden_size, eps=shape.norm_eps)
        self.self_attn = Attention(hidden_size, shape)
        self.post_attention_layernorm = nn.RMSNorm(hidden_size, eps=shape.norm_eps)
        self.mlp = SwiGLU(hidden_size, shape.mlp_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """Maps `[B, L, D]` to `[B, L, D]`."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Attention with fewer key heads than query heads, each of which serves a group of neighbouring query heads."""

    def __init__(self, hidden_size: int, shape: LLMShape) -> None:
        super().__init__()
        self.head_size = shape.head_size
        inner, outer = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
        self.q_proj = nn.Linear(hidden_size, inner)
        self.k_proj = nn.Linear(hidden_size, outer)
        self.v_proj = nn.Linear(hidden_size, outer)
        self.o_proj = nn.Linear(inner, hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """Maps `[B, L, D]` to `[B, L, D]`."""
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)  # [B, H, L, head size]
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        # repeated here: with enable_gqa not every fused kernel can be used
        k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
        out = functional.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, mlp_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, mlp_size, bias=False)
        self.down_proj = nn.Linear(mlp_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, L, D]` to `[B, L, D]`."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


def rotary_angles(positions: Tensor, shape: LLMShape, sections: tuple[int, ...]) -> Tensor:
    """Gives the angle of every rotary channel (TMRoPE), in float32.

    Channel i of the `head_size / 2` turns by `theta ** (-2i / head_size)` per position. The channels are dealt out in
    runs of `sections` to time, height, width, and from there on to time again. Both halves of a head have the same.

    Args:
        positions: `[3, ...]`.
        shape: of the LLM.
        sections: sum to `head_size / 2`.

    Returns:
        `[..., head_size]`.
    """
    place = torch.arange(0, shape.head_size, 2, device=positions.device) / shape.head_size
    axes = upload(clip_ids(sections) % 3, positions.device)
    angles = positions[axes].movedim(0, -1) * shape.rope_theta**-place
    return torch.cat((angles, angles), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns channel i and channel i + d/2 of `[..., d]` as one plane."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
