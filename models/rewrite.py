"""The shorter sequence: embeddings, positions, mask and labels, all gathered with one index. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from einops import repeat
from torch import Tensor

from ..compression.base import check_choice
from ..compression.stream import TokenStream, clip_ids, offsets
from .layout import Kind, Layout

IGNORE = -100  # the label transformers leaves out of the loss
POSITIONS = ("original", "contiguous")


@dataclass(frozen=True)
class LLMInputs:
    """What the LLM reads.

    Args:
        embeds: `[B, L', D]`.
        mask: `[B, L']` int64, 0 at padding.
        positions: `[4, B, L']` int64; row 0 counts tokens without gaps (attention masks are made from it), rows 1-3
            are TMRoPE's time, height and width.
        layout: of these tokens.
        before: the layout of the full sequence.
        sizes: `[B, L']` float32, how many original tokens each stands for.
        labels: `[B, L']` or None.
    """

    embeds: Tensor
    mask: Tensor
    positions: Tensor
    layout: Layout
    before: Layout
    sizes: Tensor
    labels: Tensor | None = None

    def count(self, kind: Kind) -> tuple[int, int]:
        """Gives how many tokens of a kind there were, and how many there are."""
        before, after = (int((layout.kind == kind.value).sum()) for layout in (self.before, self.layout))
        return before, after

    @property
    def decode_offset(self) -> Tensor:
        """What to add to the index of a generated token to get its position, `[B]`: `max position + 1 - L'`."""
        real = self.positions[1:].masked_fill(self.mask[None] == 0, -1)
        return real.amax(dim=(0, 2)) + 1 - self.mask.sum(dim=1)


def scatter(embeds: Tensor, layout: Layout, kind: Kind, features: Tensor) -> Tensor:
    """Puts features `[N, D]` in place of all placeholders of one kind in `[B, L, D]`, in batch order.

    Raises:
        ValueError: placeholders and features differ in number.
    """
    index = layout.index(kind)
    if len(index) != len(features):
        raise ValueError(
            f"the batch has {len(index)} {kind.name} placeholders but {len(features)} {kind.name} features"
        )
    flat = embeds.flatten(0, 1)
    return flat.index_copy(0, index, features.to(flat.dtype)).view_as(embeds)


def rewrite(
    embeds: Tensor,
    layout: Layout,
    streams: Mapping[Kind, TokenStream],
    labels: Tensor | None = None,
    *,
    joint: TokenStream | None = None,
    padding_side: Literal["left", "right"] = "right",
    positions: Literal["original", "contiguous"] = "original",
) -> LLMInputs:
    """Replaces the tokens of each kind in `streams` by the stream's fewer tokens, each at the slot it takes.

    Args:
        embeds: `[B, L, D]`, the full sequence; what stands at replaced placeholders does not matter.
        layout: of the full sequence.
        streams: per kind, all its clips of the batch in order.
        labels: `[B, L]` or None.
        joint: in place of streams per kind, one whose clips are the samples and whose slots count a sample's audio and
            video placeholders in the order of the sequence.
        padding_side: of the result: right for training, left for generation.
        positions: "original" gathers TMRoPE's positions (the default); "contiguous" numbers the remaining tokens
            0, 1, 2, ... in all three rows, for ablation.

    Raises:
        ValueError: a stream has other clips than the batch, or a slot outside its clip; or a choice is unknown.
    """
    check_choice("padding_side", padding_side, ("left", "right"))
    check_choice("positions", positions, POSITIONS)
    batch, length, _ = embeds.shape
    keep = layout.mask.flatten().clone()
    flat = embeds.flatten(0, 1)
    sizes = torch.ones(batch * length, device=embeds.device)
    for name, placeholders, originals, stream in _replaced(layout, streams, joint):
        where = _slot_index(name, placeholders, originals, stream)
        keep[placeholders] = False
        keep[where] = True
        flat = flat.index_copy(0, where, stream.embeds.to(flat.dtype))
        sizes = sizes.index_copy(0, where, stream.sizes)

    keep = keep.view(batch, length)
    counts = keep.sum(dim=1)
    width = int(counts.max())
    order = torch.argsort((~keep).to(torch.uint8), dim=1, stable=True)[:, :width]  # kept tokens first, in order
    real = torch.arange(width, device=keep.device) < counts[:, None]
    if padding_side == "left":
        shift = (torch.arange(width, device=keep.device) - (width - counts)[:, None]) % max(width, 1)
        order, real = order.gather(1, shift), real.gather(1, shift)

    def take(x: Tensor) -> Tensor:
        return x.gather(1, order)

    short = layout.gather(order, real)
    index = repeat(order, "b l -> b l d", d=embeds.shape[-1])
    text = (real.long().cumsum(dim=1) - 1).clamp(min=0)
    rows = short.positions if positions == "original" else text.expand(3, -1, -1)
    return LLMInputs(
        embeds=flat.view_as(embeds).gather(1, index).masked_fill(~real[..., None], 0),
        mask=real.long(),
        positions=torch.cat([text[None], rows]),
        layout=short,
        before=layout,
        sizes=take(sizes.view(batch, length)).masked_fill(~real, 0),
        labels=None if labels is None else take(labels).masked_fill(~real, IGNORE),
    )


def _replaced(
    layout: Layout, streams: Mapping[Kind, TokenStream], joint: TokenStream | None
) -> Iterator[tuple[str, Tensor, tuple[int, ...], TokenStream]]:
    """Gives of every stream its name, the flat index of its placeholders `[N]`, how many each clip has, and itself."""
    for kind, stream in streams.items():
        index = layout.index(kind)
        yield kind.name, index, tuple(torch.bincount(layout.clip.flatten()[index]).tolist()), stream
    if joint is not None:
        yield "sample", *layout.joint_index(), joint


def _slot_index(name: str, placeholders: Tensor, originals: tuple[int, ...], stream: TokenStream) -> Tensor:
    """Gives the flat index of the slot that each token of the stream takes, `[M]`."""
    if len(originals) != len(stream.lengths):
        raise ValueError(f"the batch has {len(originals)} {name} clips but the stream has {len(stream.lengths)}")
    ids = clip_ids(stream.lengths, stream.slots.device)
    limit = torch.tensor(originals, device=ids.device)[ids]
    outside = (stream.slots < 0) | (stream.slots >= limit)
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise ValueError(
            f"slot {int(stream.slots[at])} is outside {name} clip {int(ids[at])} of {int(limit[at])} tokens"
        )
    return placeholders[offsets(originals, ids.device)[ids] + stream.slots]
