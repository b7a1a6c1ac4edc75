"""Times the Triton kernels against the torch reference, `torch.compile` of it and a copy of as many bytes.

python benchmarks/kernel_speed.py                                       # needs a GPU; about two minutes
python benchmarks/kernel_speed.py --ops adjacent_cosine --backends triton copy

One JSON line per cell is added to --output. Caches are emptied before every run; `forward+backward` is both together.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from audiopress.benchmarks.environment import environment
from audiopress.kernels import (
    adjacent_cosine,
    attention_received,
    causal_attention,
    farthest_first,
    gather_rows,
    greedy_map,
    most_alike,
    move_boundaries,
    segment_merge,
    top_k,
    ward_greedy,
)
from audiopress.kernels.packed import bounds
from audiopress.kernels.varlen import varlen_attention

OPS = (
    "adjacent_cosine",
    "segment_merge",
    "top_k",
    "most_alike",
    "ward_greedy",
    "move_boundaries",
    "farthest_first",
    "greedy_map",
    "gather_rows",
    "attention_received",
    "causal_attention",
)
BACKENDS = ("eager", "compile", "triton", "copy", "flash")
ENCODER = (16 * (12844,), 1280)  # states of 16 clips of 256.89 s in the audio tower
STREAM = ((6422,), 3584)  # one clip's tokens before Qwen2.5-Omni-7B's LLM
BLOCKS = (128 * (100,) + (44,), 20, 20, 64)  # the tower's attention blocks of one clip: lengths, heads, channels
PREFILL = ((8828,), 28, 4, 128)  # the LLM's sequence of that clip and its video: lengths, heads, key heads, channels


@dataclass
class Cell:
    """One operation on one shape.

    Args:
        op: its name.
        shape: in words.
        run: the operation; takes `backend`, and gives what a gradient starts from first.
        inputs: that it is given, and that gradients are taken of.
        bytes: that forward must read and write at least; None if it is not bound by memory.
        backward: bytes of forward and backward.
        flash: flash attention on the same shape.
        loops: the reference is a loop over results of its own, which torch.compile leaves as it is: not timed.
        dtype: of what is read.
    """

    op: str
    shape: str
    run: Callable[..., Tensor]
    inputs: list[Tensor] = field(default_factory=list)
    bytes: int | None = None
    backward: int | None = None
    flash: Callable[[], Tensor] | None = None
    loops: bool = False
    dtype: str = "bfloat16"


def cosine_cell(lengths: tuple[int, ...], width: int) -> Cell:
    """Gives the cell of neighbours' cosines."""
    x = torch.randn(sum(lengths), width, device="cuda", dtype=torch.bfloat16)
    size, scores = x.nbytes, 4 * len(x)
    return Cell(
        op="adjacent_cosine",
        shape=f"{len(lengths)} x {lengths[0]:,} x {width:,}",
        run=lambda x, backend: adjacent_cosine(x, lengths, backend),
        inputs=[x],
        bytes=size + scores,
        backward=3 * size + 3 * scores,
    )


def merge_cell(lengths: tuple[int, ...], width: int, keep: int) -> Cell:
    """Gives the cell of merging all clips' tokens, in runs of random lengths, to one in `keep`."""
    rows = sum(lengths)
    starts = torch.randperm(rows - 1)[: rows // keep - 1].sort().values + 1
    counts = torch.cat([torch.tensor([0]), starts, torch.tensor([rows])]).diff().cuda()
    slots, sizes = torch.arange(rows, device="cuda"), torch.ones(rows, device="cuda")
    x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    moved, scalars = x.nbytes * (keep + 1) // keep, slots.nbytes + sizes.nbytes + 3 * counts.nbytes
    return Cell(
        op="segment_merge",
        shape=f"{len(lengths)} x {lengths[0]:,} x {width:,} to 1/{keep}",
        run=lambda x, backend: segment_merge(x, slots, sizes, counts, backend)[0],
        inputs=[x],
        bytes=moved + scalars,
        backward=2 * (moved + scalars),
    )


def top_k_cell(lengths: tuple[int, ...], keep: int) -> Cell:
    """Gives the cell of choosing one in `keep` of each clip's tokens."""
    scores = torch.randn(sum(lengths), device="cuda")
    budget = [n // keep for n in lengths]
    return Cell(
        op="top_k",
        shape=f"{len(lengths)} x {lengths[0]:,} to 1/{keep}",
        run=lambda backend: top_k(scores, lengths, budget, backend),
        dtype="float32",
    )


def alike_cell(lengths: tuple[int, ...], width: int, keep: int) -> Cell:
    """Gives the cell of finding, for each clip's tokens, the most similar of every `keep`-th one."""
    x = torch.randn(sum(lengths), width, device="cuda", dtype=torch.bfloat16)
    chosen = torch.arange(sum(lengths), device="cuda") % lengths[0] % keep == 0  # the clips are of one length
    counts = [-(-n // keep) for n in lengths]
    rest = [n - m for n, m in zip(lengths, counts, strict=True)]
    tokens, targets = ((~chosen).nonzero()[:, 0], rest), (chosen.nonzero()[:, 0], counts)
    return Cell(
        op="most_alike",
        shape=f"{len(lengths)} x {lengths[0]:,} x {width:,}, {counts[0]:,} targets",
        run=lambda backend: most_alike(x, *tokens, *targets, backend)[0],
    )


def ward_cell(lengths: tuple[int, ...], width: int, keep: int) -> Cell:
    """Gives the cell of cutting each clip into one run for every `keep` tokens."""
    x = torch.randn(sum(lengths), width, device="cuda", dtype=torch.bfloat16)
    weights = torch.ones(len(x), device="cuda")
    budget = [n // keep for n in lengths]
    return Cell(
        op="ward_greedy",
        shape=f"{len(lengths)} x {lengths[0]:,} x {width:,} to 1/{keep}",
        run=lambda backend: ward_greedy(x, weights, lengths, budget, backend=backend),
        loops=True,
    )


def move_cell(lengths: tuple[int, ...], width: int, keep: int) -> Cell:
    """Gives the cell of moving the boundaries of even runs of `keep` tokens, which all have somewhere to go."""
    x = torch.randn(sum(lengths), width, device="cuda", dtype=torch.bfloat16)
    weights = torch.ones(len(x), device="cuda")
    even = [n // (n // keep) + (i < n % (n // keep)) for n in lengths for i in range(n // keep)]
    counts = torch.tensor(even, device="cuda")
    return Cell(
        op="move_boundaries",
        shape=f"{len(lengths)} x {lengths[0]:,} x {width:,} to 1/{keep}",
        run=lambda backend: move_boundaries(x, weights, lengths, counts, backend=backend),
        loops=True,
    )


def choice_cell(choose: Callable[..., Tensor], lengths: tuple[int, ...], width: int, keep: int) -> Cell:
    """Gives the cell of greedily choosing one in `keep` of each clip's tokens, by their cosines and even quality."""
    x = torch.randn(sum(lengths), width, device="cuda", dtype=torch.bfloat16)
    tokens = (x,) if choose is farthest_first else (torch.ones(len(x), device="cuda"), x)
    budget = [n // keep for n in lengths]
    return Cell(
        op=choose.__name__,
        shape=f"{len(lengths)} x {lengths[0]:,} x {width:,} to 1/{keep}",
        run=lambda backend: choose(*tokens, lengths, budget, backend),
        loops=True,
    )


def attention_cell(lengths: tuple[int, ...], heads: int, key_heads: int, size: int, log: bool = False) -> Cell:
    """Gives the cell of attention received: bidirectional in many blocks or as a logarithm, else causal."""
    n, scale, causal = sum(lengths), 1 / math.sqrt(size), len(lengths) == 1 and not log
    q, k, v = (torch.randn(n, h, size, device="cuda", dtype=torch.bfloat16) for h in (heads, key_heads, key_heads))

    def flash() -> Tensor:
        return varlen_attention(q, k, v, bounds(lengths, q.device), max(lengths), scale)

    def causal_flash() -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            every = (x.transpose(0, 1)[None] for x in (q, k, v))
            return functional.scaled_dot_product_attention(*every, is_causal=True, enable_gqa=True)

    return Cell(
        op="attention_received",
        shape=f"{len(lengths)} of {lengths[0]:,}, {heads} heads, d {size}" + ", causal" * causal + ", log" * log,
        run=lambda backend: attention_received(q, k, lengths, scale, causal, log, backend),
        flash=causal_flash if causal else flash,
    )


def gather_cell(text: int, lengths: tuple[int, ...], kept: tuple[int, ...], width: int) -> Cell:
    """Gives the cell of the rewrite: rows of the text, and all that is kept of sound and pictures."""
    sources = [torch.randn(n, width, device="cuda", dtype=torch.bfloat16) for n in (sum(lengths) + text, *kept)]
    moved = torch.arange(text, text + sum(kept), device="cuda") + sum(lengths)
    index = torch.cat([torch.arange(text, device="cuda"), moved])
    size = len(index) * width * 2
    return Cell(
        op="gather_rows",
        shape=f"{len(index):,} x {width:,} of {sum(map(len, sources)):,}",
        run=lambda *sources, backend: gather_rows(sources, index, backend),
        inputs=sources,
        bytes=2 * size + index.nbytes,
        backward=2 * size + 2 * index.nbytes + size + sum(x.nbytes for x in sources),
    )


def causal_cell(length: int, heads: int, key_heads: int, size: int) -> Cell:
    """Gives the cell of a prompt's attention with a bias per key."""
    q, k, v = (
        torch.randn(1, length, h, size, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for h in (heads, key_heads, key_heads)
    )
    bias, scale = torch.rand(1, length, device="cuda").exp(), 1 / math.sqrt(size)

    def flash() -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

    return Cell(
        op="causal_attention",
        shape=f"{length:,}, {heads} heads, d {size}",
        run=lambda backend: causal_attention(q, k, v, bias, scale, backend),
        flash=flash,
    )


CELLS: list[Callable[[], Cell]] = [
    partial(cosine_cell, *ENCODER),
    partial(cosine_cell, *STREAM),
    partial(merge_cell, *ENCODER, 2),
    partial(merge_cell, *STREAM, 4),
    partial(top_k_cell, ENCODER[0], 2),
    partial(top_k_cell, STREAM[0], 4),
    partial(alike_cell, *ENCODER, 2),
    partial(alike_cell, *STREAM, 4),
    partial(ward_cell, *STREAM, 4),
    partial(ward_cell, BLOCKS[0], ENCODER[1], 2),
    partial(move_cell, *STREAM, 4),
    partial(choice_cell, farthest_first, *STREAM, 4),
    partial(choice_cell, greedy_map, *STREAM, 4),
    partial(gather_cell, 44, (6422, 2275), (1606, 2275), STREAM[1]),
    partial(attention_cell, *BLOCKS),
    partial(attention_cell, *PREFILL),
    partial(attention_cell, STREAM[0], *PREFILL[1:], log=True),
    partial(causal_cell, 3925, *PREFILL[1:]),
]


def subject(cell: Cell, backend: str, backward: bool) -> Callable[[], Any]:
    """Gives what is timed."""
    if backend == "copy":
        moved = cell.backward if backward else cell.bytes
        assert moved is not None
        source = torch.randn(moved // 4, device="cuda").to(torch.bfloat16)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)
    if backend == "flash":
        assert cell.flash is not None
        return cell.flash

    def run(*inputs: Tensor) -> Tensor:
        return cell.run(*inputs, backend="triton" if backend == "triton" else "torch")

    if backend == "compile":
        torch._dynamo.reset()
        run = torch.compile(run, dynamic=False)
    if not backward:
        return torch.no_grad()(lambda: run(*cell.inputs))
    inputs = [x.detach().requires_grad_() for x in cell.inputs]
    grad = torch.randn_like(cell.run(*cell.inputs, backend="triton"))
    return lambda: torch.autograd.grad(run(*inputs), inputs, grad)


def measure(cell: Cell, backend: str, backward: bool, milliseconds: int) -> dict[str, Any]:
    """Gives the row of a cell; a failure is a row."""
    from triton.testing import do_bench

    try:
        function = subject(cell, backend, backward)
        times = do_bench(function, rep=milliseconds, return_mode="all")
    except torch.OutOfMemoryError as error:
        return {"status": "oom", "message": str(error)}
    except RuntimeError as error:
        return {"status": "failed", "message": str(error)}
    moved = cell.backward if backward else cell.bytes
    low, median, high = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return {
        "status": "ok",
        "ms": {"median": median, "p20": low, "p80": high, "n": len(times)},
        "gb_per_s": moved / median / 1e6 if moved else None,
    }


def main() -> None:
    """Prints a table, and writes one JSON line per cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--milliseconds", type=int, default=100, help="of measuring per cell")
    parser.add_argument("--commit", help="of the code measured, where it is not in a checkout")
    parser.add_argument("--output", type=Path, default=Path("runs/kernels.jsonl"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: needs a CUDA device")
    torch.manual_seed(0)
    where = environment(torch.device("cuda"), args.commit)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    print("| operation | shape | pass | backend | ms | GB/s |", "|---|---|---|---|---|---|", sep="\n")
    with args.output.open("a") as file:
        for make in tqdm(CELLS, disable=None):
            cell = make()
            if cell.op not in args.ops:
                continue
            without = {name for name, x in (("copy", cell.bytes), ("flash", cell.flash)) if x is None}
            without |= {"compile"} if cell.loops else set()
            for backward in (False, True) if cell.backward else (False,):
                for backend in [b for b in args.backends if b not in without]:
                    row = {"op": cell.op, "shape": cell.shape, "dtype": cell.dtype, "backend": backend}
                    row |= {"pass": "forward+backward" if backward else "forward"}
                    row |= measure(cell, backend, backward, args.milliseconds)
                    file.write(json.dumps(where | row) + "\n")
                    file.flush()
                    ms = f"{row['ms']['median']:.4f}" if row["status"] == "ok" else row["status"]
                    speed = f"{row['gb_per_s']:,.0f}" if row.get("gb_per_s") else ""
                    print(f"| {cell.op} | {cell.shape} | {row['pass']} | {backend} | {ms} | {speed} |", flush=True)
            del cell
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
