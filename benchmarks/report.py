"""What a run leaves for people to read: a table, JSON files and pictures.

python benchmarks/report.py runs/pooling             # prints the table of a run
python benchmarks/report.py runs/pooling --readme    # puts it, its pictures and its JSON into the repository
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from audiopress.benchmarks.plots import plot_tokens, plot_training
from audiopress.benchmarks.scoring import Evaluation, to_device
from audiopress.compression import TokenStream
from audiopress.data.collator import Encoder, OmniCollator
from audiopress.data.media import read_audio
from audiopress.data.records import Record
from audiopress.models import CompressedOmni
from audiopress.models.layout import AUDIO_TOKENS_PER_SECOND, Kind


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
        "tokens": {
            "audio": [result.tokens_in, result.tokens_out],
            "video": [result.video_in, result.video_out],
        },
    }


def table(summary: dict[str, Any]) -> str:
    """Gives the table of a run, in Markdown; with a column of video where there is any."""
    video = any(r["tokens"]["video"][0] for r in summary["results"].values())
    lines = [
        "",
        "| | held-out loss | WER % [95 %] | audio tokens/s | kept |" + " video kept |" * video,
        "|---|---|---|---|---|" + "---|" * video,
    ]
    for name, r in summary["results"].items():
        low, high = (100 * x for x in r["wer_95"])
        lines.append(
            f"| {name} | {r['loss']:.3f} | {100 * r['wer']:.1f} [{low:.0f}, {high:.0f}] "
            f"| {r['tokens_per_second']:.2f} | {100 * r['keep_ratio']:.1f} % |"
            + (f" {100 * r['tokens']['video'][1] / r['tokens']['video'][0]:.1f} % |" if video else "")
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
    whole, kept = audio_tokens(model, inputs)
    rate = encoder.processor.feature_extractor.sampling_rate
    plot_tokens(
        read_audio(record.audio, rate, max_seconds=encoder.max_seconds),
        rate,
        {"uncompressed": whole, model.compressor.name: kept},
        folder / "tokens.png",
        text=record.reference,
    )


@torch.no_grad()
def audio_tokens(model: CompressedOmni, inputs: dict[str, Any]) -> tuple[TokenStream, TokenStream]:
    """Gives the audio tokens of a batch's one clip before and after compression, as streams without embeddings."""
    encoded, _ = model.eval().encode(**inputs)
    streams = []
    for layout, sizes in ((encoded.before, None), (encoded.layout, encoded.sizes)):
        heard = layout.kind == Kind.AUDIO.value
        slots = layout.slot[heard].cpu()
        own = None if sizes is None else sizes[heard].cpu()
        streams.append(TokenStream(torch.zeros(len(slots), 1), (len(slots),), slots, own))
    return streams[0], streams[1]


def publish(run: Path, root: Path) -> None:
    """Puts a run's table between README.md's result marks, and its JSON and pictures beside it.

    Raises:
        ValueError: README.md lacks the marks.
    """
    summary = json.loads((run / "results.json").read_text())
    readme = root / "README.md"
    before, opening, rest = readme.read_text().partition("<!-- results -->\n")
    _, closing, after = rest.partition("<!-- /results -->")
    if not closing:
        raise ValueError(f"{readme} lacks the marks <!-- results --> and <!-- /results -->")
    readme.write_text(f"{before}{opening}{table(summary)}\n\n{closing}{after}")
    for folder, names in (("results", ["results.json"]), ("pictures", ["tokens.png", "training.png"])):
        target = root / "benchmarks" / folder
        target.mkdir(exist_ok=True)
        for name in names:
            shutil.copy(run / name, target / name.replace("results.json", "first_run.json"))


def main() -> None:
    """Prints, or publishes, the report of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the output directory of train_compress.py")
    parser.add_argument("--readme", action="store_true", help="publish it in the repository")
    args = parser.parse_args()
    try:
        print(table(json.loads((args.run / "results.json").read_text())))
        if args.readme:
            publish(args.run, Path(__file__).parents[1])
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
