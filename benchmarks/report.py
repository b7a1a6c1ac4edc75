"""What a run leaves for people to read: a table, JSON files and pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from audiopress.benchmarks.evaluate import Evaluation, to_device
from audiopress.benchmarks.plots import plot_tokens, plot_training
from audiopress.compression import TokenStream
from audiopress.data.collator import Encoder, OmniCollator
from audiopress.data.media import read_audio
from audiopress.data.records import Record
from audiopress.models import CompressedOmni
from audiopress.models.layout import AUDIO_TOKENS_PER_SECOND, audio_lengths


def peak_memory(device: torch.device) -> int:
    """Gives the most bytes held so far: on a GPU those of tensors, on a CPU those of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def row(result: Evaluation) -> dict[str, Any]:
    """Gives the numbers of one row of the table."""
    low, high = result.wer.interval()
    return {
        "loss": result.loss,
        "wer": result.wer.rate,
        "wer_95": [low, high],
        "words": result.wer.units,
        "keep_ratio": result.keep_ratio,
        "tokens_per_second": AUDIO_TOKENS_PER_SECOND * result.keep_ratio,
    }


def table(summary: dict[str, Any]) -> str:
    """Gives the table of a run, in Markdown."""
    lines = ["", "| | held-out loss | WER % [95 %] | audio tokens/s | kept |", "|---|---|---|---|---|"]
    for name, r in summary["results"].items():
        low, high = (100 * x for x in r["wer_95"])
        lines.append(
            f"| {name} | {r['loss']:.3f} | {100 * r['wer']:.1f} [{low:.0f}, {high:.0f}] "
            f"| {r['tokens_per_second']:.2f} | {100 * r['keep_ratio']:.1f} % |"
        )
    seconds = f"{summary['seconds_per_step']:.2f}" if summary["seconds_per_step"] else "no"
    lines += ["", f"{seconds} s per step, {summary['peak_memory_gb']:.2f} GB at most, {summary['minutes']:.1f} minutes"]
    return "\n".join(lines)


def draw(
    folder: Path, model: CompressedOmni, encoder: Encoder, history: list[dict[str, Any]], test: list[Record]
) -> None:
    """Draws the training curves, and what each token of one test clip stands for."""
    if any("loss" in entry for entry in history):  # none in a run shorter than `logging_steps`
        plot_training(history, folder / "training.png")
    record = max((r for r in test if r.audio), key=lambda r: min(r.duration or 0, 10.0))
    inputs = to_device(OmniCollator(0)([encoder(record)]), model.device)
    with torch.no_grad():
        _, audio = model.eval().encode(**inputs)
    length = audio_lengths(inputs["feature_attention_mask"].sum(dim=1))
    rate = encoder.processor.feature_extractor.sampling_rate
    plot_tokens(
        read_audio(record.audio, rate, max_seconds=encoder.max_seconds),
        rate,
        {"uncompressed": TokenStream(torch.zeros(length[0], 1), length), model.compressor.name: audio},
        folder / "tokens.png",
        text=record.reference,
    )
