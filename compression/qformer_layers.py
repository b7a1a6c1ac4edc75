"""The layers of a Q-Former: learned queries that read a window of frames (BERT's post-norm layers)."""

from __future__ import annotations

from einops import rearrange
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """Multi-head attention, added to its input, then LayerNorm: `LN(x + attention(x, source))`.

    Args:
        width: D, a multiple of `heads`.
        heads: how many.
        dropout: of the attention weights and of the result.
        source_width: of what is attended to; None for self-attention.
    """

    def __init__(self, width: int, heads: int, dropout: float, source_width: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        # Self-attention has one Linear: of a single query nothing but the values gets a gradient.
        self.query = nn.Linear(width, width if source_width else 3 * width)
        self.key_value = nn.Linear(source_width, 2 * width) if source_width else None
        self.output = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, visible: Tensor, source: Tensor | None = None) -> Tensor:
        """Attends.

        Args:
            x: `[M, q, D]`.
            visible: `[M, 1, n]` or `[M, q, n]` bool, the keys that each query sees: at least one.
            source: `[M, n, source_width]`; None for `x` itself.

        Returns:
            `[M, q, D]`.
        """
        if self.key_value is None:
            parts = self.query(x).chunk(3, dim=-1)
        else:
            parts = (self.query(x), *self.key_value(source).chunk(2, dim=-1))
        q, k, v = (rearrange(part, "m n (h d) -> m h n d", h=self.heads) for part in parts)
        dropout = self.dropout.p if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None], dropout_p=dropout)
        return self.norm(x + self.dropout(self.output(rearrange(mixed, "m h n d -> m n (h d)"))))


class QFormerLayer(nn.Module):
    """Self-attention among the queries, cross-attention to the frames, feed-forward.

    Args:
        width: D, of the queries.
        heads: of every attention.
        ffn_size: width of the feed-forward.
        frame_width: of the frames.
        dropout: in all of them.
        causal: whether the frames first attend to themselves (FAVOR, arXiv 2310.05863). The result is read by this
            layer's queries only: the next layer starts from the frames again.
    """

    def __init__(self, width: int, heads: int, ffn_size: int, frame_width: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.history = Attention(frame_width, heads, dropout) if causal else None
        self.among = Attention(width, heads, dropout)
        self.across = Attention(width, heads, dropout, frame_width)
        self.ffn = Mlp(width, ffn_size, drop=(0.0, dropout))
        self.norm = nn.LayerNorm(width)

    def forward(
        self, queries: Tensor, frames: Tensor, used: Tensor, real: Tensor, past: Tensor | None = None
    ) -> Tensor:
        """Lets every window's queries read its frames.

        Args:
            queries: `[M, q, D]`.
            frames: `[M, n, frame_width]`.
            used: `[M, q]` bool, the queries that the others see.
            real: `[M, n]` bool, the frames that are not padding.
            past: `[n, n]` bool, what each frame sees, for a causal layer.

        Returns:
            `[M, q, D]`.
        """
        if self.history is not None:
            assert past is not None
            frames = self.history(frames, past & real[:, None])
        queries = self.among(queries, used[:, None])
        queries = self.across(queries, real[:, None], frames)
        return self.norm(queries + self.ffn(queries))


def mean_cosine(outputs: Tensor, used: Tensor) -> Tensor:
    """Gives the mean cosine of two different used outputs of a window, over the windows that have two: a scalar.

    Args:
        outputs: `[W, q, D]`.
        used: `[W, q]` bool.
    """
    unit = functional.normalize(outputs.float(), dim=-1) * used[..., None]
    n = used.sum(dim=1)
    # The sum over all pairs is the square of the sum; each output's cosine with itself, 1, is taken off.
    cosine = (unit.sum(dim=1).square().sum(dim=1) - n) / (n * (n - 1)).clamp(min=1)
    return (cosine * (n > 1)).sum() / (n > 1).sum().clamp(min=1)
