"""Choosing among packed tokens: the best of every clip, and how alike neighbours are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from .backend import use_triton
from .packed import clip_ids, offsets, positions, upload

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
    return ranked(scores, lengths)[upload(kept, scores.device)].sort().values


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

        ends = [end - 1 for n, end in zip(lengths, accumulate(lengths), strict=True) if n]
        cosine: Tensor = AdjacentCosine.apply(embeds, upload(ends, embeds.device))
        return cosine
    unit = functional.normalize(embeds.float(), dim=1)
    cosine = functional.pad((unit[:-1] * unit[1:]).sum(dim=1), (0, min(1, len(embeds))), value=-torch.inf)
    clips = clip_ids(lengths, embeds.device)
    last = functional.pad(clips[1:] != clips[:-1], (0, min(1, len(embeds))), value=True)
    return cosine.masked_fill(last, -torch.inf)


@torch.no_grad()
def most_alike(
    embeds: Tensor,
    tokens: Tensor,
    counts: Sequence[int],
    targets: Tensor,
    target_counts: Sequence[int],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Finds for each token the target of its clip that has the highest cosine with it, the earliest of equal ones.

    Args:
        embeds: `[N, D]`.
        tokens: `[R]` int64, indices, clip after clip.
        counts: tokens per clip, C numbers that sum to R.
        targets: `[T]` int64, indices, clip after clip and ascending.
        target_counts: targets per clip, C numbers that sum to T.
        backend: "auto", "torch" or "triton"; "auto" leaves float32 to torch, whose matrix products are faster there.

    Returns:
        The targets `[R]` int64 and their cosines `[R]` float32; the token itself and -inf in a clip without targets.
    """
    fast = embeds.dtype.itemsize == 2 or backend == "triton"
    if use_triton(backend, embeds) and fast and len(tokens) and len(targets):
        from . import triton_alike

        return triton_alike.most_alike(embeds, tokens, counts, targets, target_counts, TIE)
    unit = functional.normalize(embeds.float(), dim=1)
    nearest, best = [tokens[:0]], [unit.new_empty(0)]
    with torch.autocast(embeds.device.type, enabled=False):
        for mine, theirs in zip(tokens.split(tuple(counts)), targets.split(tuple(target_counts)), strict=True):
            if len(theirs) == 0:
                nearest, best = [*nearest, mine], [*best, unit.new_full(mine.shape, -torch.inf)]
                continue
            for some in mine.split(max(1, _ENTRIES // len(theirs))):
                cosine = unit[some] @ unit[theirs].T
                best.append(cosine.amax(dim=1))
                nearest.append(theirs[(cosine >= best[-1][:, None] - TIE).byte().argmax(dim=1)])
    return torch.cat(nearest), torch.cat(best)


def pad_clips(packed: Tensor, lengths: Sequence[int], value: float = 0.0) -> tuple[Tensor, Tensor]:
    """Pads packed rows `[N, ...]` to `[C, n, ...]`, n the longest clip; also gives which are real, `[C, n]` bool."""
    longest = max(lengths, default=0)
    real = torch.arange(longest, device=packed.device) < upload(lengths, packed.device)[:, None]
    padded = packed.new_full((len(lengths) * longest, *packed.shape[1:]), value)
    padded = padded.index_copy(0, _padded_places(lengths, packed.device), packed)
    return padded.unflatten(0, (len(lengths), longest)), real


def unpad_clips(padded: Tensor, lengths: Sequence[int]) -> Tensor:
    """Packs the real rows of `[C, n, ...]` again: `[N, ...]`; `padded[real]` would wait for a GPU to count them."""
    return padded.flatten(0, 1).index_select(0, _padded_places(lengths, padded.device))


def _padded_places(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Gives where each packed row is among the padded ones, `[N]` int64."""
    return clip_ids(lengths, device) * max(lengths, default=0) + positions(lengths, device)
