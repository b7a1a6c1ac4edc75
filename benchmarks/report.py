"""What a run, or measuring, leaves for people to read: tables, JSON files and pictures.

python benchmarks/report.py runs/pooling             # prints the table of a run
python benchmarks/report.py runs/pooling --readme    # puts it, its pictures and its JSON into the repository
python benchmarks/report.py speed                    # the tables of benchmarks/results, pictures in runs/pictures
python benchmarks/report.py speed --readme           # puts both into the repository
python benchmarks/report.py accuracy                 # the same of accuracy: both testbeds, and ablations
python benchmarks/report.py --html                   # a page of the rows of accuracy, and of clips to hear
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from audiopress.benchmarks.accuracy.report import accuracy_report
from audiopress.benchmarks.cells import Parser
from audiopress.benchmarks.page.writing import write_page
from audiopress.benchmarks.plots import plot_tokens, plot_training
from audiopress.benchmarks.scoring import Evaluation, to_device
from audiopress.benchmarks.speed.report import speed_report
from audiopress.compression import TokenStream
from audiopress.data.collator import Encoder, OmniCollator
from audiopress.data.media import read_audio
from audiopress.data.records import Record
from audiopress.models import CompressedOmni
from audiopress.models.layout import AUDIO_TOKENS_PER_SECOND, Kind
from audiopress.models.packages import FetchError

SPEED, ACCURACY = "speed", "accuracy"  # what is reported in place of a run, and the marks of both
PAGES = {SPEED: "README.md", ACCURACY: "benchmarks/RESULTS.md"}  # which have these marks
HTML = Path("runs/page.html")


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
    replace_between(root / "README.md", "results", table(summary))
    for folder, names in (("results", ["results.json"]), ("pictures", ["tokens.png", "training.png"])):
        target = root / "benchmarks" / folder
        target.mkdir(exist_ok=True)
        for name in names:
            shutil.copy(run / name, target / name.replace("results.json", "first_run.json"))


def replace_between(page: Path, mark: str, text: str) -> None:
    """Puts text between `<!-- mark -->` and `<!-- /mark -->` of a page.

    Raises:
        ValueError: the page lacks the marks.
    """
    before, opening, rest = page.read_text().partition(f"<!-- {mark} -->\n")
    _, closing, after = rest.partition(f"<!-- /{mark} -->")
    if not closing:
        raise ValueError(f"{page} lacks the marks <!-- {mark} --> and <!-- /{mark} -->")
    page.write_text(f"{before}{opening}\n{text.strip()}\n\n{closing}{after}")


def main() -> None:
    """Prints, or publishes, the report of a run, of speed or of accuracy."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help=f"the output directory of train_compress.py, {SPEED!r} or {ACCURACY!r}")
    parser.add_argument("--readme", action="store_true", help="publish it in the repository")
    parser.add_argument("--html", nargs="?", const=HTML, type=Path, metavar="FILE", help=f"the page; default: {HTML}")
    parser.add_argument("--results", type=Path, help="the folder of the rows; default: benchmarks/results")
    parser.add_argument("--device", help="of speed: a part of its name; default: that of the newest row")
    parser.add_argument("--commit", help="of speed: its beginning, or 'any'; default: that of the newest row")
    args = parser.parse_args()
    if (args.run is None) == (args.html is None):
        parser.error(f"name a run, {SPEED!r}, {ACCURACY!r}, or --html")
    root = Path(__file__).parents[1]
    try:
        if args.html is not None:
            print(write_page(args.results or root / "benchmarks/results", args.html))
            return
        if args.run in (SPEED, ACCURACY):
            page = root / PAGES[args.run]
            pictures = root / "benchmarks/pictures" if args.readme else Path("runs/pictures")
            shown = pictures.relative_to(page.parent) if args.readme else None
            results = args.results or root / "benchmarks/results"
            if args.run == SPEED:
                text = speed_report(results, pictures, shown, args.device, args.commit)
            else:
                text = accuracy_report(results, pictures, shown)
            print(text)
            if args.readme:
                replace_between(page, args.run, text)
            return
        run = Path(args.run)
        print(table(json.loads((run / "results.json").read_text())))
        if args.readme:
            publish(run, root)
    except ModuleNotFoundError as error:
        parser.error(f'{error}; pip install -e ".[bench]"')
    except (OSError, ValueError, FetchError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
