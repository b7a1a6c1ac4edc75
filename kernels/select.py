"""Choosing among packed tokens: the best of every clip, and how alike neighbours are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from .backend import use_triton
from .packed import clip_ids, offsets, positions

TIE = 1e-6  # cosines, and squared norms of parts of unit vectors, that float32 does not tell apart
_ENTRIES = 2**24  # of a block of the cosine matrix, 64 MiB in float32


def top_k(scores: Tensor, lengths: Sequence[int], budget: Sequence[int], backend: str = "auto") -> Tensor:
    """Gives the `budget[c]` best tokens of each clip, `[M]` int64 ascending; of equal scores the earliest win.

    Args:
        scores: `[N]`, larger is better, no NaN.
        lengths: tokens per clip, C numbers that sum to N.
        budget: tokens to keep of each clip, at most its length.
        backend: "auto", "torch" or "triton".
    """
    if use_triton(backend, scores) and len(scores):
        from . import triton_select

        return triton_select.top_k(scores, lengths, budget)
    kept = offsets(lengths)[clip_ids(budget)] + positions(budget)
    return ranked(scores, lengths)[kept.to(scores.device)].sort().values


def ranked(scores: Tensor, lengths: Sequence[int]) -> Tensor:
    """Gives the indices of all tokens, `[N]` int64: clip by clip, from the best to the worst, equal ones in order."""
    by_score = torch.argsort(scores, descending=True, stable=True)
    return by_score[torch.argsort(clip_ids(lengths, scores.device)[by_score], stable=True)]


def evenly(lengths: Sequence[int], budget: Sequence[int]) -> Tensor:
    """Gives the token in the middle of each of a clip's even windows: `floor((i + 1/2) * n / m)` for i < m.

    Args:
        lengths: tokens per clip, C numbers that sum to N.
        budget: m, the tokens to keep of each clip, at most its length n.

    Returns:
        `[M]` int64, on the CPU, ascending.
    """
    clips = clip_ids(budget)
    n, m = (torch.tensor(x, dtype=torch.long)[clips] for x in (lengths, budget))
    # in whole numbers, so that nothing depends on rounding
    return offsets(lengths)[clips] + (2 * positions(budget) + 1) * n // (2 * m)


def adjacent_cosine(embeds: Tensor, lengths: Sequence[int], backend: str = "auto") -> Tensor:
    """Gives the cosine between each token and the next of its clip, `[N]` float32; -inf at a clip's last token.

    Args:
        embeds: `[N, D]`; a token of zeros has cosine 0.
        lengths: tokens per clip, C numbers that sum to N.
        backend: "auto", "torch" or "triton".
    """
    if use_triton(backend, embeds) and embeds.numel():
        from .triton_cosine import AdjacentCosine

        last = torch.tensor([end - 1 for n, end in zip(lengths, accumulate(lengths), strict=True) if n])
        cosine: Tensor = AdjacentCosine.apply(embeds, last.to(embeds.device, non_blocking=True))
        return cosine
    unit = functional.normalize(embeds.float(), dim=1)
    cosine = functional.pad((unit[:-1] * unit[1:]).sum(dim=1), (0, min(1, len(embeds))), value=-torch.inf)
    clips = clip_ids(lengths, embeds.device)
    last = functional.pad(clips[1:] != clips[:-1], (0, min(1, len(embeds))), value=True)
    return cosine.masked_fill(last, -torch.inf)


@torch.no_grad()
def most_alike(embeds: Tensor, tokens: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Gives for each token the target of its clip that has the highest cosine with it, the earliest of equal ones.

    Args:
        embeds: `[N, D]`.
        tokens: indices of each clip, `[R]` in all.
        targets: indices of each clip, ascending; at least one where there are tokens.

    Returns:
        `[R]` int64.
    """
    unit = functional.normalize(embeds.float(), dim=1)
    chosen = [torch.empty(0, dtype=torch.long, device=embeds.device)]
    with torch.autocast(embeds.device.type, enabled=False):
        for mine, theirs in zip(tokens, targets, strict=True):
            for some in mine.split(max(1, _ENTRIES // max(1, len(theirs)))) if len(mine) else ():
                cosine = unit[some] @ unit[theirs].T
                chosen.append(theirs[(cosine >= cosine.amax(dim=1, keepdim=True) - TIE).byte().argmax(dim=1)])
    return torch.cat(chosen)


def pad_clips(packed: Tensor, lengths: Sequence[int], value: float = 0.0) -> tuple[Tensor, Tensor]:
    """Pads packed rows `[N, ...]` to `[C, n, ...]`, n the longest clip; also gives which are real, `[C, n]` bool."""
    longest = max(lengths, default=0)
    real = torch.arange(longest) < torch.tensor(lengths, dtype=torch.long)[:, None]
    real = real.to(packed.device)
    padded = packed.new_full((len(lengths), longest, *packed.shape[1:]), value)
    padded[real] = packed
    return padded, real
