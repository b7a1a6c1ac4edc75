"""How often compressing waits for the GPU: a method knows its sizes beforehand, or reads what they depend on once."""

from __future__ import annotations

import traceback
import warnings
from pathlib import Path

import pytest
import torch

from audiopress import Compressor, available, build
from audiopress.compression.checks import deferred_checks

from .compression_cases import ENCODER_SIZE, HIDDEN_SIZE, LLM, make_inputs, to

ROOT = Path(__file__).resolve().parents[1]
NAMES = [f"{name}:{p}" if p else name for name, info in available().items() for p in ("", *info.presets)]

# All others never wait. A name stands for its presets, too, unless they have a row.
ALLOWED = {
    "affinity": 4,  # the content decides how many tokens stay: where the runs end, and how many each clip has
    "echoing": 1,  # the scene; a model gives it where it can be read at once
    "keep-all-audio": 1,  # the scene
    "omnisift": 1,  # the scene
    "omnizip": 2,  # the scene; which audio stays, which says how much video does
    "qformer:mms-llama": 1,  # the rate of speech decides
    "sa-map": 1,  # the content decides how many groups there are
    "ward": 4,  # whether all rounds of joining are done, after every eight
    "ward-refined": 4,  # as ward
    "ward:exact": 2,  # the programme runs on the CPU, and its result goes back
}


def make(name: str) -> Compressor:
    torch.manual_seed(0)
    return build(name, hidden_size=HIDDEN_SIZE, encoder_size=ENCODER_SIZE, llm=LLM).eval()


def waits(compressor: Compressor) -> list[str]:
    """Gives the package's line of each wait for the GPU in compressing."""
    stream, context = (to(x, torch.Tensor.cuda) for x in make_inputs((750, 33)))
    lines = []

    def note(message: Warning | str, *_: object) -> None:
        if "called a synchronizing" in str(message):
            frames = [(Path(f.filename).resolve(), f) for f in traceback.extract_stack()]
            own = [(path, f) for path, f in frames if path.is_relative_to(ROOT) and path != Path(__file__).resolve()]
            path, where = own[-1]
            lines.append(f"{path.relative_to(ROOT)}:{where.lineno}: {where.line}")

    with torch.no_grad(), warnings.catch_warnings(), deferred_checks():
        compressor(stream, context)  # kernels are compiled, bounds are uploaded
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            compressor(stream, context)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return lines


@pytest.mark.gpu
def test_methods_wait_for_the_gpu_no_more_than_they_must():
    methods = {name: make(name) for name in NAMES}
    found = {name: waits(method.cuda()) for name, method in methods.items() if method.stage != "encoder"}
    allowed = {name: ALLOWED.get(name, ALLOWED.get(name.partition(":")[0], 0)) for name in found}
    report = "\n".join(
        "\n    ".join([f"{name}: {len(lines)} of {allowed[name]} allowed", *lines]) for name, lines in found.items()
    )
    assert all(len(lines) <= allowed[name] for name, lines in found.items()), report


def test_all_that_may_wait_are_methods():
    assert set(ALLOWED) <= set(NAMES)
