"""Times a training step of LoRA on one clip under each compressor, and the memory it takes.

python benchmarks/training.py --model 7b                            # random weights of the exact shapes; needs a GPU
python benchmarks/training.py --model 7b --batch 1 4 --compressors transformers pooling --keep-ratios 0.25 0.1
python benchmarks/training.py --model omni-small --seconds 10       # real weights, also on a CPU

A step is forward, backward and optimizer: LoRA of rank 16 on the LLM and the compressor's own weights, in float32,
everything else frozen, in bfloat16 on a GPU; layers are recomputed in the backward pass. The baseline is transformers'
own model with the same LoRA, its towers and its loss. Cells and rows are those of `throughput.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from audiopress.benchmarks.cells import NONE, TRANSFORMERS, Cell, check, grid_parser, make_cells, run_cells
from audiopress.benchmarks.environment import energy, environment, memory, timed
from audiopress.benchmarks.random_model import ANSWER, make_batch, open_thinker
from audiopress.benchmarks.show import build_at
from audiopress.benchmarks.speed.tables import training
from audiopress.benchmarks.throughput import counts
from audiopress.models import CompressedOmni
from audiopress.models.packages import FetchError
from audiopress.models.packed import use_packed_attention
from audiopress.models.rewrite import IGNORE

METHODS = ("pooling", "atome:encoder", "qformer:mrc", "ward", "omnizip")
LEARNING_RATE = 1e-5  # small: random weights on noise must stay finite, and the time does not depend on it


class Training:
    """Measures cells on one model.

    Args:
        thinker: as it comes, without LoRA; the first cell that is not transformers' changes its towers.
        repeats: steps.
    """

    def __init__(self, thinker: nn.Module, repeats: int) -> None:
        self.thinker = thinker
        self.repeats = repeats
        self.is_ours = False
        # LoRA is added to the thinker's own LLM, so that transformers' model has it, too.
        model = CompressedOmni(thinker)
        model.add_adapter()
        model.gradient_checkpointing_enable()

    def __call__(self, cell: Cell) -> dict[str, Any]:
        """Times a cell's step, in milliseconds, and counts its tokens and bytes."""
        ours = cell["method"] != TRANSFORMERS
        if ours and not self.is_ours:
            use_packed_attention(self.thinker)
            self.is_ours = True
        assert ours == self.is_ours, "the towers were changed before the baseline was measured"
        device, compressor, learning = self.thinker.device, None, {"adapter"}
        if cell["method"] not in (TRANSFORMERS, NONE):
            compressor = build_at(self.thinker, cell["method"], cell["keep_ratio"]).to(device, self.thinker.dtype)
        model = CompressedOmni(self.thinker, compressor)
        if model.own_parameters("compressor"):
            learning.add("compressor")
        model.set_trainable(learning)
        model.train()
        batch = make_batch(self.thinker, cell["seconds"], cell["batch"], cell["video"])
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, :-ANSWER] = IGNORE
        forward = partial(model, **batch)
        if not ours:
            forward = partial(self.thinker, **batch, use_audio_in_video=cell["video"], use_cache=False)
        run = step(forward, [p for p in model.parameters() if p.requires_grad], device)
        row: dict[str, Any] = {"step": timed(run, self.repeats, device)}
        row["samples_per_second"] = 1e3 * cell["batch"] / row["step"]["median"]
        row |= memory(run, device)
        row["joules"] = energy(run, row["step"]["median"], device)
        row["trained_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        with torch.no_grad():
            row |= counts(model.eval(), model.encode(**batch)[0])
        return row


def step(forward: Callable[..., Any], parameters: list[Tensor], device: torch.device) -> Callable[[], None]:
    """Gives one step of training."""
    gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=gpu)

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
            loss = forward().loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def main() -> None:
    """Runs the cells and prints their table."""
    parser = grid_parser(__doc__, METHODS, Path("runs/training.jsonl"))
    args = parser.parse_args()
    try:
        device = check(args)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        cells = make_cells(args, dtype=str(dtype).removeprefix("torch."))
        thinker = open_thinker(args.model, device, dtype)
    except (ValueError, OSError, FetchError) as error:
        parser.error(str(error))
    rows = run_cells(cells, Training(thinker, args.repeats), environment(device, args.commit), args.output)
    print(training(rows))


if __name__ == "__main__":
    main()
