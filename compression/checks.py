"""Checks of values. On a GPU each would wait for all the work before it; `deferred_checks` reads them together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_collected: ContextVar[list[tuple[Tensor, Callable[[], Exception]]] | None] = ContextVar("collected", default=None)


def check_values(bad: Tensor, error: Callable[[], Exception]) -> None:
    """Raises `error()` if `bad` holds anywhere: now, or for tensors of a GPU at the end of `deferred_checks`.

    Args:
        bad: bool, of any shape.
        error: makes the exception; called only when there is one.
    """
    collected = _collected.get()
    if collected is not None and bad.is_cuda:
        collected.append((bad.any(), error))
    elif bool(bad.any()):
        raise error()


@contextmanager
def deferred_checks() -> Iterator[None]:
    """Makes all checks of tensors of a GPU at the end of the block, in one wait; of nested blocks the outermost does.

    What the block does with bad values in the meantime must be harmless: indices are to be clamped. If it fails, the
    checks are made first, since the bad values are the likely cause.
    """
    if _collected.get() is not None:
        yield
        return
    collected: list[tuple[Tensor, Callable[[], Exception]]] = []
    token = _collected.set(collected)
    try:
        yield
    finally:
        _collected.reset(token)
        if collected:
            flags = torch.stack([bad for bad, _ in collected]).tolist()
            for failed, (_, error) in zip(flags, collected, strict=True):
                if failed:
                    raise error()
