"""The packed audio tokens that flow through every compressor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..kernels import clip_ids, offsets, positions

__all__ = ["TokenStream", "clip_ids", "offsets", "positions"]


@dataclass(frozen=True)
class TokenStream:
    """Audio tokens of several clips, packed one clip after another, never padded.

    Args:
        embeds: `[N, D]`.
        lengths: tokens per clip, C numbers that sum to N.
        slots: `[N]` int64, the placeholder of the *uncompressed* clip that each token takes; strictly increasing
            inside a clip. Default: 0, 1, 2, ... in each clip.
        sizes: `[N]` float32, how many original tokens each token stands for. Default: 1.
        losses: named scalar auxiliary losses a compressor adds, already weighted.
        prompt: `[T, D]`, the tokens of `Context.prompt` as a joint method rewrote them; None where it did not.

    Raises:
        ValueError: a shape does not fit `lengths`.
    """

    embeds: Tensor
    lengths: tuple[int, ...]
    slots: Tensor = None  # type: ignore[assignment]  # filled in below
    sizes: Tensor = None  # type: ignore[assignment]
    losses: dict[str, Tensor] = field(default_factory=dict)
    prompt: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(int(n) for n in self.lengths))
        total, device = sum(self.lengths), self.embeds.device
        if self.embeds.ndim != 2 or self.embeds.shape[0] != total or any(n < 0 for n in self.lengths):
            raise ValueError(
                f"embeds must be [N, D] with N = sum(lengths) = {total} and lengths >= 0, "
                f"got {list(self.embeds.shape)} and lengths {list(self.lengths)}"
            )
        if self.slots is None:
            object.__setattr__(self, "slots", positions(self.lengths, device))
        if self.sizes is None:
            object.__setattr__(self, "sizes", torch.ones(total, device=device))
        for name in ("slots", "sizes"):
            if getattr(self, name).shape != (total,):
                raise ValueError(f"{name} must be [N] = [{total}], got {list(getattr(self, name).shape)}")

    @property
    def clips(self) -> Tensor:
        """The clip of each token, `[N]` int64."""
        return clip_ids(self.lengths, self.embeds.device)

    @property
    def offsets(self) -> Tensor:
        """Where each clip starts, `[C + 1]` int64."""
        return offsets(self.lengths, self.embeds.device)

    @property
    def positions(self) -> Tensor:
        """Each token's index inside its clip, `[N]` int64."""
        return positions(self.lengths, self.embeds.device)

    def replace(self, **changes: object) -> TokenStream:
        """Gives a copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def select(self, index: Tensor, lengths: Sequence[int]) -> TokenStream:
        """Keeps the rows `index` (`[M]` int64, ascending), `lengths` of them per clip; each keeps its slot and size."""
        return self.replace(
            embeds=self.embeds[index], lengths=tuple(lengths), slots=self.slots[index], sizes=self.sizes[index]
        )

    def head(self, lengths: Sequence[int]) -> TokenStream:
        """Keeps the first `lengths[c]` tokens of each clip."""
        if tuple(lengths) == self.lengths:
            return self
        device = self.embeds.device
        index = offsets(self.lengths, device)[clip_ids(lengths, device)] + positions(lengths, device)
        return self.select(index, lengths)

    def split(self) -> list[TokenStream]:
        """Gives each clip as a stream of its own (without the losses, which belong to the whole)."""
        parts = (x.split(self.lengths) for x in (self.embeds, self.slots, self.sizes))
        return [
            TokenStream(embeds, (length,), slots, sizes)
            for embeds, length, slots, sizes in zip(next(parts), self.lengths, next(parts), next(parts), strict=True)
        ]
