"""Transformer layers over packed tokens, that attend inside each clip."""

from __future__ import annotations

from collections.abc import Sequence

from einops import rearrange
from timm.layers import Mlp
from torch import Tensor, nn

from ..kernels import block_attention


class ClipLayer(nn.Module):
    """A pre-norm layer: `x + attention(norm(x))`, and of that `x + ffn(norm(x))`.

    Args:
        width: D.
        heads: of the attention.
        ffn_size: width of the feed-forward.
        dropout: after the attention and in the feed-forward; fast attention has none on its weights.
        activation: of the feed-forward.
    """

    def __init__(self, width: int, heads: int, ffn_size: int, dropout: float, activation: type[nn.Module]) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.attention_norm = nn.LayerNorm(width)
        self.read = nn.Linear(width, 3 * width)
        self.write = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = Mlp(width, ffn_size, act_layer=activation, drop=dropout)
        nn.init.xavier_uniform_(self.read.weight)  # as torch's nn.MultiheadAttention
        for layer in (self.read, self.write):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """Maps `[N, D]` to `[N, D]`, clips of `lengths` tokens, each at least 1."""
        q, k, v = rearrange(self.read(self.attention_norm(x)), "n (three h d) -> three n h d", three=3, h=self.heads)
        mixed = block_attention(q, k, v, lengths, self.scale)
        x = x + self.dropout(self.write(mixed.flatten(1)))
        return x + self.ffn(self.ffn_norm(x))


class ClipLayers(nn.Module):
    """A stack of layers, and a LayerNorm after the last.

    Nothing of it grows with the square of a clip's length. torch's `nn.TransformerEncoder` would, where it takes its
    fast path: there the whole attention map is kept, and read out of bounds from 2^31 logits on (pytorch_geometric's
    pull request 10766).

    Args:
        width: D, a multiple of `heads`.
        layers: how many.
        heads: of each.
        ffn_size: width of their feed-forward.
        dropout: in them.
        activation: of their feed-forward.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        ffn_size: int,
        dropout: float = 0.0,
        activation: type[nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ClipLayer(width, heads, ffn_size, dropout, activation) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """Maps `[N, D]` to `[N, D]`, clips of `lengths` tokens, of which a clip may have none."""
        if lengths := [n for n in lengths if n]:
            for layer in self.layers:
                x = layer(x, lengths)
        return self.norm(x)
