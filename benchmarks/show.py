"""Draws what several methods make of one clip: its spectrogram, and each method's tokens on the same time axis.

python benchmarks/show.py                                         # a recorded prompt under the methods below
python benchmarks/show.py --audio talk.wav --methods ward atome:encoder qformer:mrc --keep-ratio 0.25
python benchmarks/show.py --model runs/ward                       # a trained variant beside the controls
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from torch import nn

import audiopress
from audiopress.benchmarks.plots import plot_tokens
from audiopress.benchmarks.report import audio_tokens
from audiopress.benchmarks.scoring import to_device
from audiopress.compression import Compressor, TokenStream
from audiopress.compression.budget import check_keep_ratio
from audiopress.data.collator import Encoder, OmniCollator
from audiopress.data.media import read_audio
from audiopress.data.records import Record, user
from audiopress.data.speech import INSTRUCTION, speech_records
from audiopress.models import CompressedOmni
from audiopress.models.loading import build_for
from audiopress.models.packages import FetchError

METHODS = (
    "uniform-stride",
    "random",
    "pooling",
    "attention-topk:last-layer",
    "attention-topk:segmentwise",
    "divprune",
    "speechprune",
    "atome",
    "atome:encoder",
    "fastadasp",
    "sa-map",
    "qformer:mrc",
    "ward",
)
SECONDS = 8.0  # of the recorded prompt, at most: more would not be seen on a page


def recorded_prompt() -> Record:
    """Gives the longest held-out English prompt of up to `SECONDS`."""
    fitting = [r for r in speech_records("test", ["en"], 1) if r.duration and r.duration <= SECONDS]
    return max(fitting, key=lambda r: (r.duration, r.id))


def build_at(thinker: nn.Module, method: str, keep_ratio: float | None) -> Compressor:
    """Builds a method at a keep ratio, or at its own where it has weights of its own for every ratio."""
    made = build_for(thinker, method)
    if keep_ratio is None:
        return made
    check_keep_ratio(keep_ratio)
    try:
        return made.at(keep_ratio)
    except ValueError:
        return made


def show(
    model: CompressedOmni, processor: Any, record: Record, methods: list[str], keep_ratio: float | None, output: Path
) -> dict[str, TokenStream]:
    """Draws the picture; gives each method's tokens by name.

    Args:
        model: its own compressor is drawn last, if it has one.
        processor: the model's.
        record: with audio and a question.
        methods: names as `build` takes them; trained ones are drawn as they start.
        keep_ratio: of all methods that can have it; None for each one's own.
        output: of the PNG.
    """
    encoder = Encoder(processor)
    inputs = to_device(OmniCollator(0)([encoder(record, prompt_only=True)]), model.device)
    own, tokens = model.compressor, {}
    for name in methods:
        model.compressor = build_at(model.thinker, name, keep_ratio).to(model.device).eval()
        whole, tokens[name] = audio_tokens(model, inputs)
    if own is not None:
        model.compressor = own
        whole, tokens[f"{own.name} (trained)"] = audio_tokens(model, inputs)
    rate = processor.feature_extractor.sampling_rate
    text = None if record.is_query else record.reference
    plot_tokens(read_audio(record.audio, rate), rate, {"uncompressed": whole, **tokens}, output, text=text)
    return tokens


def main() -> None:
    """Draws, and prints how many tokens each method keeps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="omni-small", help="omni-small, a checkpoint of Qwen2.5-Omni, or a variant")
    parser.add_argument("--audio", type=Path, help="your own sound; default: a recorded prompt")
    parser.add_argument("--question", default=INSTRUCTION, help="for methods that read it")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="NAME or NAME:PRESET; see the README")
    parser.add_argument("--keep-ratio", type=float, default=0.25, help="of the methods that can have it")
    parser.add_argument("--output", type=Path, default=Path("runs/methods.png"))
    args = parser.parse_args()
    try:
        model, processor = audiopress.load(args.model)
        for name in args.methods:
            build_at(model.thinker, name, args.keep_ratio)  # a wrong name is told before anything is drawn
        record = recorded_prompt()
        if args.audio is not None:
            record = Record(id=args.audio.name, messages=(user(args.question),), audio=args.audio)
        tokens = show(model, processor, record, args.methods, args.keep_ratio, args.output)
    except (ValueError, OSError, FetchError) as error:
        sys.exit(f"error: {error}")
    for name, stream in tokens.items():
        print(f"{name:<28} {len(stream.slots):>5} tokens")
    print(args.output)


if __name__ == "__main__":
    main()
