"""Times a whole model on one clip under each compressor: towers, compressor, prefill, first token, decoding, memory.

python benchmarks/throughput.py --model 7b                          # random weights of the exact shapes; needs a GPU
python benchmarks/throughput.py --model 7b --seconds 60 600 --batch 1 4 --compressors none ward --keep-ratios 0.5 0.1
python benchmarks/throughput.py --model 7b --long                   # ten minutes to an hour of sound
python benchmarks/throughput.py --model omni-small --seconds 10     # real weights, also on a CPU

One JSON line per cell is added to --output; a cell that is there already, of the same commit and settings, is not run
again. `python benchmarks/report.py speed` makes tables and pictures of the rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from audiopress.benchmarks.cells import (
    BASELINES,
    NONE,
    TRANSFORMERS,
    Cell,
    Parser,
    check,
    grid_parser,
    make_cells,
    run_cells,
)
from audiopress.benchmarks.environment import energy, environment, finish, memory, timed
from audiopress.benchmarks.random_model import ANSWER, make_batch, open_thinker
from audiopress.benchmarks.show import build_at
from audiopress.benchmarks.speed.tables import end_to_end
from audiopress.models import CompressedOmni, parts
from audiopress.models.encoders import encode_audio, encode_video
from audiopress.models.fast import compile_layers, use_fast_attention
from audiopress.models.layout import Kind
from audiopress.models.packages import FetchError
from audiopress.models.rewrite import LLMInputs

METHODS = (
    "pooling",
    "atome",
    "atome:encoder",
    "attention-topk:last-layer",
    "qformer:mrc",
    "speechprune",
    "ward",
    "omnizip",
    "omnisift",
)
LONG_SECONDS = [600.0, 1800.0, 3600.0]  # 90,000 tokens at the end, of which a quarter fits the LLM's window
LONG_METHODS = ("pooling", "atome:encoder", "ward")
COMPILED_WARM_UPS = 2  # the first call compiles, in the second CUDA graphs may be recorded (a guess)

Steps = dict[str, Callable[[], Any]]


class Throughput:
    """Measures cells on one model.

    Args:
        thinker: as it comes; the first cell that is not transformers' changes it.
        repeats: of every step.
        compiled: whether our own cells run compiled layers and decode with a static cache.
    """

    def __init__(self, thinker: nn.Module, repeats: int, compiled: bool) -> None:
        self.thinker = thinker
        self.repeats = repeats
        self.compiled = compiled
        self.is_ours = False

    @torch.no_grad()
    def __call__(self, cell: Cell) -> dict[str, Any]:
        """Times the steps of a cell, in milliseconds, and counts its tokens, bytes and joules."""
        ours = cell["method"] != TRANSFORMERS
        if ours:
            self._make_ours()
        assert ours == self.is_ours, "the towers were changed before the baseline was measured"
        compressor, device = None, self.thinker.device
        if cell["method"] not in (TRANSFORMERS, NONE):
            compressor = build_at(self.thinker, cell["method"], cell["keep_ratio"]).to(device, self.thinker.dtype)
        model = CompressedOmni(self.thinker, compressor).eval()
        batch = make_batch(self.thinker, cell["seconds"], cell["batch"], cell["video"])
        started = time.perf_counter()
        inputs, run_compressor = encoded(model, batch)
        finish(device)
        first = time.perf_counter() - started
        steps = our_steps(model, batch, inputs, self.compiled) if ours else their_steps(self.thinker, batch, inputs)
        if run_compressor is not None:
            steps["compressor"] = run_compressor
        warm_ups = COMPILED_WARM_UPS if ours and self.compiled else 1
        row: dict[str, Any] = {name: timed(run, self.repeats, device, warm_ups) for name, run in steps.items()}
        row["first_token_fresh"] = timed_fresh(steps["first_token"], batch, self.repeats, device)
        slower = sum(row[name]["warm_up"] - warm_ups * row[name]["median"] for name in steps)
        row["warm_up_seconds"] = first + max(0.0, slower) / 1e3
        row["ms_per_token"] = (row["answer"]["median"] - row["first_token"]["median"]) / (ANSWER - 1)
        row |= counts(model, inputs)
        hear, answer = steps["audio_tower"], steps["answer"]
        del inputs, run_compressor, steps  # what they hold is no part of the memory that an answer takes
        if tower := memory(hear, device):
            row["audio_tower_bytes"] = tower["peak_allocated"] - tower["held_before"]
        row |= memory(answer, device)
        row["joules"] = energy(answer, row["answer"]["median"], device)
        row["options"] = None if compressor is None else dataclasses.asdict(compressor.config)
        return row

    def _make_ours(self) -> None:
        if self.is_ours:
            return
        use_fast_attention(self.thinker)
        if self.compiled:
            compile_layers(self.thinker)
        self.is_ours = True


def encoded(model: CompressedOmni, batch: dict[str, Tensor]) -> tuple[LLMInputs, Callable[[], Any] | None]:
    """Gives what the LLM reads, and the compressor alone on what it was given; None where none acts after the tower."""
    calls: list[Callable[[], Any]] = []
    after = None if model.compressor is None else model.compressor.split()[1]
    if after is None:
        return model.encode(**batch)[0], None
    hook = after.register_forward_pre_hook(lambda module, args: calls.append(partial(module, *args)))
    try:
        inputs, _ = model.encode(**batch)
    finally:
        hook.remove()
    return inputs, calls[0]


def our_steps(model: CompressedOmni, batch: dict[str, Tensor], inputs: LLMInputs, compiled: bool) -> Steps:
    """Gives the steps of our model; "encode" is all before the LLM."""
    in_tower, after = (None, None) if model.compressor is None else model.compressor.split()
    needs = frozenset() if after is None else after.needs
    language_model, head = parts.language_model(model.thinker), model.thinker.get_output_embeddings()

    def prefill() -> None:
        with model.services(inputs):
            states = language_model(
                inputs_embeds=inputs.embeds, attention_mask=inputs.mask, position_ids=inputs.positions, use_cache=True
            ).last_hidden_state
            head(states[:, -1:])

    options = {"cache_implementation": "static"} if compiled else {}
    return {
        **tower_steps(model.thinker, batch, partial(encode_audio, needs=needs, method=in_tower)),
        "encode": lambda: model.encode(**batch),
        "prefill": prefill,
        **answer_steps(partial(model.generate, **batch, **options)),
    }


def their_steps(thinker: nn.Module, batch: dict[str, Tensor], inputs: LLMInputs) -> Steps:
    """Gives the steps of transformers' own model, all through its own methods."""
    own = {"use_audio_in_video": "video_grid_thw" in batch, "do_sample": False}
    read = {"inputs_embeds": inputs.embeds, "attention_mask": inputs.mask, "position_ids": inputs.positions}
    return {
        **tower_steps(thinker, batch, encode_audio),
        "prefill": lambda: thinker(**read, use_cache=True),
        **answer_steps(partial(thinker.generate, **batch, **own)),
    }


def tower_steps(thinker: nn.Module, batch: dict[str, Tensor], encode: Callable[..., Any]) -> Steps:
    """Gives the towers' steps."""
    sound = (batch["input_features"], batch["feature_attention_mask"])
    steps: Steps = {"audio_tower": lambda: encode(thinker, *sound)}
    if "video_grid_thw" in batch:
        seen = (batch["pixel_values_videos"], batch["video_grid_thw"])
        steps["vision_tower"] = lambda: encode_video(thinker, *seen)
    return steps


def answer_steps(generate: Callable[..., Any]) -> Steps:
    """Gives the steps from a batch to one token, and to a whole answer."""
    wanted = {"first_token": 1, "answer": ANSWER}
    return {name: partial(generate, max_new_tokens=n, min_new_tokens=n) for name, n in wanted.items()}


def timed_fresh(
    run: Callable[..., Any], batch: dict[str, Tensor], repeats: int, device: torch.device
) -> dict[str, Any]:
    """Times a step of which every call has one token of text more: some kernels plan or compile for a new length.

    Users' prompts are of ever new lengths; repeats of one hide that.
    """
    texts = [batch[name] for name in ("input_ids", "attention_mask")]
    longer = iter([[torch.cat([x[:, :1].expand(-1, more), x], dim=1) for x in texts] for more in range(1, repeats + 1)])

    def call() -> None:
        ids, mask = next(longer)
        run(input_ids=ids, attention_mask=mask)

    return timed(call, repeats, device, warm_ups=0)


def counts(model: CompressedOmni, inputs: LLMInputs) -> dict[str, Any]:
    """Counts tokens before and after, what of them is kept, the longest sequence and the bytes of the KV cache."""
    tokens = {kind.name.lower(): inputs.count(kind) for kind in (Kind.AUDIO, Kind.VIDEO)}
    text = model.config.get_text_config()
    size = text.num_key_value_heads * parts.head_size(text)
    return {
        "tokens": tokens,
        "kept": {name: after / before for name, (before, after) in tokens.items() if before},
        "sequence": int(inputs.mask.sum(dim=1).max()),
        "kv_bytes": 2 * text.num_hidden_layers * size * inputs.embeds.element_size() * int(inputs.mask.sum()),
    }


def parse() -> tuple[Parser, argparse.Namespace]:
    """Reads the command line."""
    parser = grid_parser(__doc__, METHODS, Path("runs/throughput.jsonl"))
    parser.add_argument("--long", action="store_true", help="10 to 60 minutes of sound alone, to runs/long.jsonl")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compiled layers and a static cache, but for transformers' own rows; default: on a GPU",
    )
    args = parser.parse_args()
    if args.long:
        methods, output = [*BASELINES, *LONG_METHODS], Path("runs/long.jsonl")
        parser.set_defaults(seconds=LONG_SECONDS, no_video=True, compressors=methods, output=output)
        args = parser.parse_args()
    return parser, args


def main() -> None:
    """Runs the cells and prints their table."""
    parser, args = parse()
    try:
        device = check(args)
        compiled = device.type == "cuda" if args.compile is None else args.compile
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        cells = make_cells(args, dtype=str(dtype).removeprefix("torch."), compile=compiled)
        thinker = open_thinker(args.model, device, dtype)
    except (ValueError, OSError, FetchError) as error:
        parser.error(str(error))
    for cell in cells:
        cell["compile"] &= cell["method"] != TRANSFORMERS
    rows = run_cells(cells, Throughput(thinker, args.repeats, compiled), environment(device, args.commit), args.output)
    print(end_to_end(rows))


if __name__ == "__main__":
    main()
