"""Rows of several tensors, gathered as if they stood one below the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .backend import use_triton

MOST = 3  # sources of the kernel: text, audio and video


def gather_rows(sources: Sequence[Tensor], index: Tensor, backend: str = "auto") -> Tensor:
    """Gives `torch.cat(sources)[index]`, without the copy of all sources.

    Args:
        sources: `[N_i, D]` each, on one device.
        index: `[M]` int64 into the rows of all sources in turn, no row twice; -1 for a row of zeros.
        backend: "auto", "torch" or "triton".

    Returns:
        `[M, D]` in the dtype of the first source.
    """
    if use_triton(backend, sources[0]) and len(sources) <= MOST and sources[0].shape[1]:
        from .triton_gather import GatherRows

        rows: Tensor = GatherRows.apply(index, *sources)
        return rows
    stacked = torch.cat([source.to(sources[0].dtype) for source in sources])
    return functional.pad(stacked, (0, 0, 0, 1))[index]  # -1 is the row of zeros
