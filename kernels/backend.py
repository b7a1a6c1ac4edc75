"""Which implementation of an operation runs: the torch reference or the Triton kernels.

Every operation that has kernels takes `backend`: "auto" runs them on tensors of a GPU if Triton is installed, and the
reference elsewhere; "torch" and "triton" run what they say.
"""

from __future__ import annotations

import functools
import importlib.util
import logging

from torch import Tensor

BACKENDS = ("auto", "torch", "triton")


def use_triton(backend: str, tensor: Tensor) -> bool:
    """Says whether the Triton kernels run on `tensor`.

    Raises:
        ValueError: no such backend, or "triton" for a tensor that is not on a GPU.
        ImportError: "triton" without Triton.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "triton":
        import triton  # its own message says that it is missing

        if not (tensor.is_cuda or triton.knobs.runtime.interpret):
            raise ValueError(f"backend 'triton' needs a tensor on a GPU, got one on {tensor.device}")
        return True
    return backend == "auto" and tensor.is_cuda and _installed()


@functools.cache
def _installed() -> bool:
    found = importlib.util.find_spec("triton") is not None
    if not found:
        logging.getLogger(__name__).warning("Triton is not installed: torch's slower operations run in its place")
    return found
