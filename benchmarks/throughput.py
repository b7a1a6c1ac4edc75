"""Times a whole model on one clip under each compressor: towers, prefill, first token, decoding, memory.

python benchmarks/throughput.py --model 7b                          # random weights of the exact shapes; needs a GPU
python benchmarks/throughput.py --model 7b --seconds 60 600 --compressors none ward atome:encoder --keep-ratios 0.5 0.1
python benchmarks/throughput.py --model omni-small --seconds 30     # real weights, also on a CPU

One JSON line per cell is added to --output; a cell that is there already, of the same commit, is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

from audiopress.benchmarks.environment import environment, timed
from audiopress.benchmarks.show import build_at
from audiopress.data.collator import interleave
from audiopress.models import CompressedOmni, parts
from audiopress.models.encoders import encode_audio, encode_video
from audiopress.models.layout import Kind, audio_lengths
from audiopress.models.loading import load_base
from audiopress.models.packed import use_packed_attention

MEL_PER_SECOND = 100
FRAMES = 50  # of a video, as LongVALE's
GRID = (25, 14, 26)  # patches of 50 frames, two by two: 91 tokens per pair
ANSWER = 14  # tokens of "From 83.1% to 85.0%."
QUESTION = 40  # tokens of text around the media
TRANSFORMERS = "transformers"  # the uncompressed model as transformers runs it
DEFAULT = (
    TRANSFORMERS,
    "none",
    "random",
    "uniform-stride",
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
# What is not the same in 3B and 7B; the rest below. From the released configurations.
LLM = {
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "heads": (28, 4), "vocab": 152064},
    "3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "heads": (16, 2), "vocab": 151936},
}


def random_thinker(size: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Gives a thinker of the released shapes with random weights."""
    text = dict(LLM[size])
    heads, kv_heads = text.pop("heads")
    vocab = text.pop("vocab")
    width = text["hidden_size"]
    config = Qwen2_5OmniThinkerConfig(
        audio_config={
            "num_mel_bins": 128,
            "encoder_layers": 32,
            "encoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
            "d_model": 1280,
            "n_window": 100,
            "output_dim": width,
            "max_source_positions": 1500,
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "num_heads": 16,
            "intermediate_size": 3420,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "out_hidden_size": width,
        },
        text_config={
            **text,
            "vocab_size": vocab,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 131072,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        audio_token_id=151646,
        image_token_id=151655,
        video_token_id=151656,
        audio_start_token_id=151647,
        audio_end_token_id=151648,
        position_id_per_seconds=25,
        seconds_per_chunk=2,
    )
    config.vision_start_token_id, config.vision_end_token_id = 151652, 151653
    with torch.device(device):
        thinker = Qwen2_5OmniThinkerForConditionalGeneration._from_config(config, dtype=dtype)
    thinker.generation_config.eos_token_id = None  # random weights must not end an answer early
    thinker.generation_config.pad_token_id = 0
    return thinker.eval()


def make_batch(model: CompressedOmni, seconds: float, batch: int, video: bool) -> dict[str, torch.Tensor]:
    """Gives a batch of equal clips of random features, the sound interleaved with the video as in training."""
    generator = torch.Generator().manual_seed(0)
    ids, config = model.token_ids, model.config
    frames = round(MEL_PER_SECOND * seconds)
    mel = torch.randn(batch, config.audio_config.num_mel_bins, frames, generator=generator)
    audio = audio_lengths(torch.tensor([frames]))[0]
    text = torch.randint(1000, 40_000, (QUESTION,), generator=generator).tolist()
    out = {"input_features": mel, "feature_attention_mask": torch.ones(batch, frames, dtype=torch.long)}
    inner = [ids.audio_start, *[ids.audio] * audio, ids.audio_end]
    if video:
        step = seconds / GRID[0]
        per_group = GRID[1] * GRID[2] // ids.merge**2
        counts = interleave(audio, GRID[0], step)
        body = [token for n in counts for token in [ids.video] * per_group + [ids.audio] * n]
        inner = [ids.vision_start, ids.audio_start, *body, ids.audio_end, ids.vision_end]
        patches = batch * GRID[0] * GRID[1] * GRID[2]
        out |= {
            "pixel_values_videos": torch.randn(patches, 3 * 2 * 14 * 14, generator=generator),
            "video_grid_thw": torch.tensor([GRID] * batch),
            "video_seconds": (torch.arange(GRID[0]) * step).repeat(batch),
        }
    row = [*text[: QUESTION // 2], *inner, *text[QUESTION // 2 :]]
    out |= {"input_ids": torch.tensor([row] * batch), "attention_mask": torch.ones(batch, len(row), dtype=torch.long)}
    return {name: tensor.to(model.device) for name, tensor in out.items()}


@torch.no_grad()
def measure(model: CompressedOmni, batch: dict[str, torch.Tensor], repeats: int, cache: str | None) -> dict[str, Any]:
    """Times one cell, in milliseconds, and counts its tokens and bytes."""
    device = model.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    row: dict[str, Any] = {}
    in_tower, _ = (None, None) if model.compressor is None else model.compressor.split()
    sound = (batch["input_features"], batch["feature_attention_mask"])
    row["audio_tower"] = timed(lambda: encode_audio(model.thinker, *sound, method=in_tower), repeats, device)
    if "video_grid_thw" in batch:
        seen = (batch["pixel_values_videos"], batch["video_grid_thw"])
        row["vision_tower"] = timed(lambda: encode_video(model.thinker, *seen), repeats, device)
    row["encode"] = timed(lambda: model.encode(**batch), repeats, device)
    inputs, _ = model.encode(**batch)
    language_model, head = parts.language_model(model.thinker), model.thinker.get_output_embeddings()

    def prefill() -> None:
        with model.services(inputs):
            states = language_model(
                inputs_embeds=inputs.embeds, attention_mask=inputs.mask, position_ids=inputs.positions, use_cache=True
            ).last_hidden_state
            head(states[:, -1:])

    row["prefill"] = timed(prefill, repeats, device)
    options = {} if cache is None else {"cache_implementation": cache}
    for name, count in (("first_token", 1), ("answer", ANSWER)):
        fixed = {"max_new_tokens": count, "min_new_tokens": count} | options
        row[name] = timed(lambda fixed=fixed: model.generate(**batch, **fixed), repeats, device)  # type: ignore[misc]
    row["ms_per_token"] = (row["answer"]["median"] - row["first_token"]["median"]) / (ANSWER - 1)
    row["tokens"] = {kind.name.lower(): inputs.count(kind) for kind in (Kind.AUDIO, Kind.VIDEO)}
    text = model.config.get_text_config()
    size = text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
    row["sequence"] = int(inputs.mask.sum(dim=1).max())
    row["kv_bytes"] = 2 * text.num_hidden_layers * size * inputs.embeds.element_size() * int(inputs.mask.sum())
    if device.type == "cuda":
        row["peak_allocated"] = torch.cuda.max_memory_allocated()
        row["peak_reserved"] = torch.cuda.max_memory_reserved()
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Gives the cells as a table in Markdown, times in ms."""
    columns = ("audio_tower", "vision_tower", "encode", "prefill", "first_token", "answer")
    lines = [
        "| compressor | s | audio | video | audio tower | vision tower | towers + compressor | prefill | first token | "
        "14 tokens | ms/token | peak GB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        label = f"{row['compressor']} {row['options']['keep_ratio']:g}" if "options" in row else row["compressor"]
        if row["status"] != "ok":
            lines.append(f"| {label} | {row['seconds']:g} | {row['status']}: {row['message'][:60]} |")
            continue
        kept = [f"{b:,} of {a:,}" if a else "" for a, b in (row["tokens"]["audio"], row["tokens"]["video"])]
        times = [f"{row[c]['median']:.1f}" if c in row else "" for c in columns]
        memory = f"{row['peak_allocated'] / 1e9:.1f}" if "peak_allocated" in row else ""
        cells = [label, f"{row['seconds']:g}", *kept, *times, f"{row['ms_per_token']:.1f}", memory]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the cells and prints their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="7b", help="7b or 3b (random weights), omni-small, or a checkpoint")
    parser.add_argument("--seconds", type=float, nargs="+", default=[256.89])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--compressors", nargs="+", default=list(DEFAULT), help=f"{TRANSFORMERS}, or as `build`")
    parser.add_argument("--keep-ratios", type=float, nargs="+", default=[0.25])
    parser.add_argument("--no-video", action="store_true")
    parser.add_argument("--cache", choices=["dynamic", "static"], default="dynamic", help="of decoding")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("runs/throughput.jsonl"))
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    where = environment(device)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    if args.model in LLM:
        thinker = random_thinker(args.model, device, dtype)
    else:
        thinker = load_base(args.model, dtype)[0].to(device).eval()
    rows = []
    cells = [
        (name, seconds, batch, None if name in (TRANSFORMERS, "none") else ratio)
        for seconds in args.seconds
        for batch in args.batch
        for name in args.compressors
        for ratio in (args.keep_ratios if name not in (TRANSFORMERS, "none") else [None])
    ]
    cells.sort(key=lambda cell: cell[0] != TRANSFORMERS)  # it comes first: the towers are changed after it
    with args.output.open("a") as file:
        for name, seconds, batch, ratio in tqdm(cells, disable=None):
            key = {"compressor": name, "seconds": seconds, "batch": batch, "keep_ratio": ratio, "model": args.model}
            key |= {"video": not args.no_video, "cache": args.cache}
            before = [r for r in done if key.items() <= r.items() and r["commit"] == where["commit"]]
            if before and not where["dirty"]:
                rows.append(before[-1])
                continue
            row = {**where, **key}
            try:
                compressor = None
                if name != TRANSFORMERS:
                    use_packed_attention(thinker)
                if name not in (TRANSFORMERS, "none"):
                    compressor = build_at(thinker, name, ratio).to(device, dtype).eval()
                    row["options"] = dataclasses.asdict(compressor.config)
                model = CompressedOmni(thinker, compressor).eval()
                inputs = make_batch(model, seconds, batch, not args.no_video)
                cache = "static" if args.cache == "static" and name != TRANSFORMERS else None
                row |= measure(model, inputs, args.repeats, cache) | {"status": "ok"}
            except torch.OutOfMemoryError as error:
                row |= {"status": "oom", "message": str(error).splitlines()[0]}
            except (ValueError, RuntimeError) as error:
                row |= {"status": "failed", "message": str(error).splitlines()[0]}
            file.write(json.dumps(row) + "\n")
            file.flush()
            rows.append(row)
    print(table(rows))


if __name__ == "__main__":
    sys.exit(main())
