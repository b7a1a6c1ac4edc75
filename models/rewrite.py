"""The shorter sequence: embeddings, positions, mask and labels, all gathered with one index. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..compression.base import check_choice
from ..compression.checks import check_values
from ..compression.stream import TokenStream, clip_ids, offsets
from ..kernels import gather_rows, upload
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
        kept: how many tokens are left of the kinds of which that is known without a look at `layout`.
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
    kept: Mapping[Kind, int] = field(default_factory=dict)

    def count(self, kind: Kind) -> tuple[int, int]:
        """Gives how many tokens of a kind there were, and how many there are."""
        before = int((self.before.host.kind == kind.value).sum())
        return before, self.kept[kind] if kind in self.kept else int((self.layout.kind == kind.value).sum())

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
        ValueError: a stream has other clips than the batch, or slots that are outside their clip or do not increase;
            or a choice is unknown. On a GPU slots are checked as `check_values` does.
    """
    check_choice("padding_side", padding_side, ("left", "right"))
    check_choice("positions", positions, POSITIONS)
    batch, length, _ = embeds.shape
    device = embeds.device
    counts = layout.host.mask.sum(dim=1)  # of each sample; on the CPU, as everything that decides a shape
    kept = {kind: int((layout.host.kind == kind.value).sum()) for kind in (Kind.AUDIO, Kind.VIDEO)} if not joint else {}
    keep = layout.mask.flatten()
    sizes = torch.ones(batch * length, device=device)
    source = torch.arange(batch * length, device=device)  # which row of all sources, in turn, stands where
    sources = [embeds.flatten(0, 1)]
    for name, placeholders, originals, owners, stream in _replaced(layout, streams, joint):
        where = _slot_index(name, placeholders, originals, stream)
        counts = counts.index_add(0, torch.tensor(owners), torch.tensor(stream.lengths) - torch.tensor(originals))
        keep = keep.index_fill(0, placeholders, False).index_fill(0, where, True)
        rows = torch.arange(len(where), device=device) + sum(map(len, sources))
        source = source.index_copy(0, where, rows)
        sizes = sizes.index_copy(0, where, stream.sizes)
        sources.append(stream.embeds)
    kept |= {kind: sum(stream.lengths) for kind, stream in streams.items()}

    width = int(counts.max())
    keep = keep.view(batch, length)
    order = torch.argsort((~keep).to(torch.uint8), dim=1, stable=True)[:, :width]  # kept tokens first, in order
    left = upload(counts, device)[:, None]
    real = torch.arange(width, device=device) < left
    if padding_side == "left":
        shift = (torch.arange(width, device=device) - (width - left)) % max(width, 1)
        order, real = order.gather(1, shift), real.gather(1, shift)

    def take(x: Tensor) -> Tensor:
        return x.view(batch, length).gather(1, order)

    short = layout.gather(order, real)
    index = take(source).masked_fill(~real, -1)
    text = (real.long().cumsum(dim=1) - 1).clamp(min=0)
    rows = short.positions if positions == "original" else text.expand(3, -1, -1)
    return LLMInputs(
        embeds=gather_rows(sources, index.flatten()).view(batch, width, -1),
        mask=real.long(),
        positions=torch.cat([text[None], rows]),
        layout=short,
        before=layout,
        sizes=take(sizes).masked_fill(~real, 0),
        labels=None if labels is None else take(labels).masked_fill(~real, IGNORE),
        kept=kept,
    )


def _replaced(
    layout: Layout, streams: Mapping[Kind, TokenStream], joint: TokenStream | None
) -> Iterator[tuple[str, Tensor, list[int], list[int], TokenStream]]:
    """Gives what each stream replaces.

    It is its name, the flat index of its placeholders `[N]`, how many each clip has, each clip's sample, and itself.
    """
    for kind, stream in streams.items():
        yield kind.name, layout.index(kind), *layout.clip_lengths(kind), stream
    if joint is not None:
        index, lengths = layout.joint_index()
        yield "sample", index, list(lengths), list(range(len(lengths))), joint


def _slot_index(name: str, placeholders: Tensor, originals: Sequence[int], stream: TokenStream) -> Tensor:
    """Gives the flat index of the slot that each token of the stream takes, `[M]`."""
    if len(originals) != len(stream.lengths):
        raise ValueError(f"the batch has {len(originals)} {name} clips but the stream has {len(stream.lengths)}")
    for clip, (n, most) in enumerate(zip(stream.lengths, originals, strict=True)):
        if n > most:
            raise ValueError(f"{name} clip {clip} has {most} placeholders but the stream has {n} tokens for it")
    slots, ids = stream.slots, clip_ids(stream.lengths, stream.slots.device)
    limit = upload(originals, ids.device)[ids]
    unordered = torch.zeros_like(ids, dtype=torch.bool)
    unordered[1:] = (slots[1:] <= slots[:-1]) & (ids[1:] == ids[:-1])
    bad = (slots < 0) | (slots >= limit) | unordered

    def error() -> ValueError:
        at = int(bad.nonzero()[0])
        where = f"{name} clip {int(ids[at])} of {int(limit[at])} tokens"
        if bool(unordered[at]):
            return ValueError(f"slots must increase: slot {int(slots[at])} follows {int(slots[at - 1])} in {where}")
        return ValueError(f"slot {int(slots[at])} is outside {where}")

    check_values(bad, error)
    return placeholders[offsets(originals, ids.device)[ids] + slots.clamp(min=0).minimum(limit - 1)]
