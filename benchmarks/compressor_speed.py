"""Times every method between tower and LLM on one long clip: what compressing itself costs.

python benchmarks/compressor_speed.py                                   # all methods, 300 s, Qwen2.5-Omni-7B's widths
python benchmarks/compressor_speed.py --methods ward sa-map --seconds 60 --keep-ratio 0.1
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path

import torch
from scipy.signal import lfilter
from torch import nn
from tqdm import tqdm

from audiopress.benchmarks.environment import environment, peak_memory, timed
from audiopress.compression import Context, TokenStream, available, build
from audiopress.compression.base import TOKENS_PER_SECOND, Prompt, Scene
from audiopress.compression.registry import QWEN_7B

WORDS = 20  # of the question
WANDER = 0.3  # how far neighbouring tokens lie apart, of their own length; a guess


def walk(rows: int, width: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """Gives rows that resemble their neighbours, as those of an audio tower do: `[rows, width]`."""
    noise = torch.randn(rows, width, generator=generator)
    walked = torch.from_numpy(lfilter([WANDER], [1, WANDER - 1], noise.numpy(), axis=0)).float()
    return nn.functional.normalize(walked, dim=1).mul(width**0.5).to(device)


def inputs(seconds: float, seed: int, device: torch.device, dtype: torch.dtype) -> tuple[TokenStream, Context]:
    """Gives a clip of synthetic tokens, and all that a method may read, without video."""
    generator = torch.Generator().manual_seed(seed)
    tokens, width, states = round(TOKENS_PER_SECOND * seconds), QWEN_7B.hidden_size, QWEN_7B.encoder_size
    assert states is not None
    assert QWEN_7B.llm is not None

    def stream(rows: int, size: int) -> TokenStream:
        return TokenStream(walk(rows, size, generator, device).to(dtype), (rows,))

    audio = stream(tokens, width)
    layer = nn.Module()
    layer.self_attn = nn.Module()
    layer.self_attn.head_dim = QWEN_7B.llm.head_size
    layer.self_attn.q_proj = nn.Linear(width, QWEN_7B.llm.heads * QWEN_7B.llm.head_size)
    layer.self_attn.k_proj = nn.Linear(width, QWEN_7B.llm.kv_heads * QWEN_7B.llm.head_size)
    context = Context(
        encoder_hidden=stream(2 * tokens, states),
        encoder_keys=stream(2 * tokens, states),
        encoder_attention=torch.rand(tokens, generator=generator).to(device) + 0.5,
        question=stream(WORDS, width),
        prompt=Prompt(stream(WORDS, width), torch.arange(WORDS, device=device).expand(3, -1)),
        video=stream(0, width),
        video_seconds=torch.zeros(0, device=device),
        first_layer=layer.to(device, dtype).requires_grad_(False),
    )
    context.scene = Scene.of_audio(audio)
    return audio, context


@torch.no_grad()
def main() -> None:
    """Prints a table, and writes one JSON line per method."""
    every = [f"{name}:{p}" if p else name for name, info in available().items() for p in ("", *info.presets)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=every, help="NAME or NAME:PRESET; default: all")
    parser.add_argument("--seconds", type=float, default=300.0, help="of the clip")
    parser.add_argument("--keep-ratio", type=float, default=None, help="default: each method's own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--commit", help="of the code measured, where it is not in a checkout")
    parser.add_argument("--output", type=Path, default=Path("runs/compressors.jsonl"))
    args = parser.parse_args()
    options = {} if args.keep_ratio is None else {"keep_ratio": args.keep_ratio}
    if unknown := sorted(set(args.methods) - set(every)):
        sys.exit(f"error: unknown method {', '.join(unknown)}; there are {', '.join(every)}")
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    stream, context = inputs(args.seconds, 0, device, dtype)
    where = environment(device, args.commit)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    rows = ["| method | tokens out | seconds |", "|---|---|---|"]
    with args.output.open("a") as file:
        for name in tqdm(args.methods, disable=None):
            row = {**where, "method": name, "clip_seconds": args.seconds, "tokens_in": stream.lengths[0]}
            try:
                method = build(name, **vars(QWEN_7B), **options).to(device, dtype).eval()
                if method.stage == "encoder":
                    continue  # acts inside the tower
                run = partial(method, stream, context)
                row |= {"ms": timed(run, args.repeats, device), "tokens_out": run().lengths[0], "status": "ok"}
                row["options"] = dataclasses.asdict(method.config)
                rows.append(f"| `{name}` | {row['tokens_out']:,} | {row['ms']['median'] / 1e3:.3g} |")
            except (ValueError, RuntimeError) as error:  # out of memory is a RuntimeError; a failure is a row
                row |= {"status": "failed", "message": str(error)}
                rows.append(f"| `{name}` | failed: {str(error).splitlines()[0][:60]} | |")
            row["peak_memory_gb"] = peak_memory(device) / 1e9
            file.write(json.dumps(row) + "\n")
    print("\n".join(rows))


if __name__ == "__main__":
    sys.exit(main())
