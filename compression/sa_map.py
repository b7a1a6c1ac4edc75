"""SA-MAP: neighbours alike are merged, then a diverse subset of the attended groups is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels import TIE, greedy_map, positions, segment_centres, segment_mean, top_k
from .base import Compressor, CompressorConfig, Context, check_count, check_number
from .reading import read_attention
from .registry import register
from .stream import TokenStream

LEAST_ATTENTION = 1e-6  # of an even share: a group that nothing attends to is its plain mean; a guess


@dataclass(frozen=True)
class SAMAPConfig(CompressorConfig):
    """Options of `SAMAP`.

    Args:
        keep_ratio: tokens out / tokens in, in (0, 1].
        threshold: a token joins the group before it if its mean cosine with that group's tokens is at least this.
        max_group: tokens per group at most; 250 are 10 s.
    """

    keep_ratio: float = 0.5
    threshold: float = 0.85
    max_group: int = 250

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("threshold", self.threshold, "[-1, 1]")
        check_count("max_group", self.max_group)


@register("sa-map")
class SAMAP(Compressor):
    """Merges from left to right, then prunes.

    1. A token joins the open group if its mean cosine with *all* tokens of that group is at least `threshold`, else it
       opens a new one. A group becomes the mean of its tokens, weighted by the attention they receive.
    2. Of the groups the most probable subset of a determinantal point process with kernel `diag(a) cos diag(a)` is
       kept, greedily; a is the mean attention of the group's tokens.

    Paper: "SA-MAP: Similarity-Attention Boosted Token Compression via Merging-and-Pruning for Efficient Speech LLMs",
    preprints 202606.0741.

    Differs from the paper:
        - Where merging alone leaves fewer groups than the budget, the tokens that joined with the least mean cosine
          open groups of their own, until there are as many. The released code returns fewer tokens.
        - A group has at most `max_group` tokens. The least budget is one token; there two.
        - The attention is the mean over heads of what a token receives, inside blocks of 2 s, in both steps. In the
          released code it is the maximum over heads in step 1, and in step 2 the diagonal of the map.
    """

    config_class: ClassVar[type[CompressorConfig]] = SAMAPConfig
    config: SAMAPConfig
    paper = "preprints 202606.0741"
    summary = "merges similar neighbours, then keeps a diverse subset (DPP)"
    differs = "exact budget where merging overshoots it; attention received, not the map's diagonal"

    @property
    def needs(self) -> frozenset[str]:
        """The attention that weights the tokens."""
        return frozenset({"encoder_attention"})

    def compress(self, stream: TokenStream, context: Context) -> TokenStream:
        """Merges, then prunes."""
        budget = self.budget(stream.lengths)
        attention = read_attention(stream, context, self.name)
        counts, groups = group(stream, budget, self.config.threshold, self.config.max_group)
        slots, sizes = segment_centres(stream.slots, stream.sizes, counts)
        merged = stream.replace(
            embeds=segment_mean(stream.embeds, attention.clamp(min=LEAST_ATTENTION), counts),
            lengths=groups,
            slots=slots,
            sizes=sizes,
        )
        quality = segment_mean(attention[:, None], torch.ones_like(attention), counts)[:, 0]
        return merged.select(greedy_map(quality, merged.embeds, groups, budget), budget)


@torch.no_grad()
def group(
    stream: TokenStream, least: Sequence[int], threshold: float, max_group: int
) -> tuple[Tensor, tuple[int, ...]]:
    """Gives the tokens in each group, `[G]` int64, and the groups of each clip, at least `least`.

    Where a group ends depends on where it starts, but on nothing else before it. So the end is found for *every* token
    as a start at once, and then the clip's chain of starts is followed, by pointer doubling.
    """
    count, device = len(stream.slots), stream.embeds.device
    here = torch.arange(count, device=device)
    means = mean_cosines(stream.embeds, stream.lengths, max_group)
    joins = functional.pad(means, (0, 0, 0, max_group), value=-torch.inf) >= threshold - TIE
    after = torch.arange(max_group - 1, device=device)
    following = joins[here[:, None] + 1 + after, after]  # [N, max_group - 1]: if each later token would join
    ends = here + 1 + following.cumprod(dim=1).sum(dim=1)
    starts = _follow(ends)

    # A group opens at every start; then, up to `least`, at the tokens that joined with the least mean cosine.
    found = functional.pad(starts.cumsum(0), (1, 0))[stream.offsets].diff().tolist()  # the one wait for the GPU
    groups = tuple(max(a, b) for a, b in zip(found, least, strict=True))
    before = here - here.where(starts, 0).cummax(0).values  # how many tokens of its group come before each token
    closeness = functional.pad(means, (1, 0))[here, before]
    opening = top_k((-closeness / TIE).round().masked_fill(starts, torch.inf), stream.lengths, groups)
    return functional.pad(opening, (0, 1), value=count).diff(), groups


def mean_cosines(embeds: Tensor, lengths: Sequence[int], reach: int) -> Tensor:
    """Gives the mean cosine of each token with the k before it, for k from 1 to `reach` - 1; -inf outside its clip.

    Args:
        embeds: `[N, D]`.
        lengths: tokens per clip, C numbers that sum to N.
        reach: one more than the largest k.

    Returns:
        `[N, reach - 1]` float32.
    """
    count = len(embeds)
    blocks = -(-count // reach)
    unit = functional.pad(functional.normalize(embeds.float(), dim=1), (0, 0, reach, blocks * reach - count))
    unit = unit.unflatten(0, (blocks + 1, reach))  # the first block is empty
    with torch.autocast(embeds.device.type, enabled=False):
        cosines = torch.cat([unit[1:] @ unit[i : blocks + i].mT for i in (0, 1)], dim=2)  # with a block and the next
    k = torch.arange(1, reach, device=embeds.device)
    place = reach + torch.arange(reach, device=embeds.device)[:, None] - k  # [reach, reach - 1]
    before = cosines.gather(2, place.expand(blocks, -1, -1)).flatten(0, 1)[:count]
    return (before.cumsum(dim=1) / k).masked_fill(positions(lengths, embeds.device)[:, None] < k, -torch.inf)


def _follow(ends: Tensor) -> Tensor:
    """Marks the tokens on the chain 0, ends[0], ends[ends[0]], ..., `[N]` bool; each end is beyond its token."""
    count = len(ends)
    jump = functional.pad(ends, (0, 1), value=count)
    reached = torch.zeros_like(jump, dtype=torch.bool)
    reached[:1].fill_(True)  # assigning a Python value to one element waits for the GPU
    for _ in range(count.bit_length()):  # each round doubles how far the jumps and the chain reach
        reached.index_fill_(0, jump.where(reached, count), True)  # the one beyond the end is no token
        jump = jump[jump]
    return reached[:count]
