"""Writes down what Whisper hears in a few test clips under many methods, for the page of `report.py --html`.

python benchmarks/page_clips.py                                        # under an hour on one core of a CPU
python benchmarks/page_clips.py --methods ward pooling --rates 6.25    # of some methods at one rate

The clips are the first of those that `speech.py --joined --splits test` measures, in its order. One JSON line per
method and rate holds each clip's transcript and tokens, and no sound: that comes from the user's cache when the page is
made.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from audiopress.benchmarks.cells import NONE, Cell, Parser, add_run_options, check, make_cells, run_cells
from audiopress.benchmarks.environment import environment
from audiopress.benchmarks.metrics import wer
from audiopress.benchmarks.page.sound import CLIPS, SPLIT
from audiopress.benchmarks.words.cells import SECONDS
from audiopress.benchmarks.words.clips import Clip, make_clips
from audiopress.benchmarks.words.spelling import number_words, spelled
from audiopress.compression.base import TOKENS_PER_SECOND, check_count
from audiopress.data.speech import LANGUAGES, normalise, speech_records
from audiopress.models.packages import FetchError
from audiopress.models.spoken import cut
from audiopress.models.whisper import WHISPER_BASE, CompressedWhisper, load_whisper

METHODS = (
    NONE,
    "random",
    "uniform-stride",
    "pooling",
    "attention-topk",
    "divprune",
    "sa-map",
    "fastadasp",
    "atome",
    "atome:encoder",
    "ward",
    "ward:encoder",
)
RATES = (12.5, 6.25, 5.0, 3.125)  # tokens per second


class Listener:
    """Transcribes the same clips in every cell.

    Args:
        whisper: frozen.
        clips: those of a language are heard at once.
    """

    def __init__(self, whisper: CompressedWhisper, clips: Sequence[Clip]) -> None:
        self.whisper = whisper
        self.batches = [
            (own, *whisper.features([clip.sound() for clip in own]))
            for language in dict.fromkeys(clip.language for clip in clips)
            for own in [[clip for clip in clips if clip.language == language]]
        ]

    def __call__(self, cell: Cell) -> dict[str, Any]:
        """Gives the transcripts of a method, each with the slots and sizes of the clip's tokens."""
        compressor = None
        if cell["method"] != NONE:
            options = {} if cell["keep_ratio"] is None else {"keep_ratio": cell["keep_ratio"]}
            compressor = self.whisper.build(cell["method"], **options)
        found = []
        for clips, features, tokens in self.batches:
            heard = self.whisper.hear(features, tokens, compressor)
            written = self.whisper.transcribe(heard, clips[0].language)
            speech, _, _ = cut(heard.stream, heard.kept)
            for clip, before, stream, transcript in zip(clips, tokens, speech.split(), written, strict=True):
                said, counted = (normalise(spelled(text, clip.language)) for text in (clip.text, transcript.text))
                found.append(
                    {
                        "language": clip.language,
                        "prompts": [prompt.id for prompt in clip.prompts],
                        "seconds": clip.seconds,
                        "tokens": [before, len(stream.slots)],
                        "slots": stream.slots.tolist(),
                        "sizes": [round(size, 2) for size in stream.sizes.tolist()],
                        "said": said,
                        "heard": counted,
                        "wer": wer([said], [counted]).rate,
                        "ended": transcript.ended,
                    }
                )
        return {"transcripts": found}


def parse() -> tuple[Parser, argparse.Namespace]:
    """Reads the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=WHISPER_BASE, help=f"{WHISPER_BASE}, or a checkpoint of another Whisper")
    parser.add_argument("--methods", nargs="+", metavar="NAME", default=list(METHODS), help="that need no training")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="tokens per second, of 25")
    parser.add_argument("--languages", nargs="+", choices=LANGUAGES, default=["en", "es"])
    parser.add_argument("--clips", type=int, default=2, help="of each language")
    add_run_options(parser, Path("runs/clips.jsonl"))
    args = parser.parse_args()
    args.keep_ratios = [rate / TOKENS_PER_SECOND for rate in args.rates]
    args.seconds, args.repeats, args.batch, args.no_video = [SECONDS[True]], 1, [args.clips], True
    args.compressors = args.methods
    return parser, args


def main() -> None:
    """Runs the cells, and prints each one's word error rate."""
    logging.basicConfig(format="%(message)s")
    parser, args = parse()
    try:
        check_count("--clips", args.clips)
        device = check(args)
        for language in {*args.languages} - {"en"}:
            number_words("1", language)  # where the package for it is missing, that is told now
        whisper = load_whisper(args.model).to(device)
        for name in args.methods:
            if name != NONE and whisper.build(name).trained:
                raise ValueError(f"{name} must be trained first, which this script does not do")
        cells = make_cells(args, testbed=CLIPS, languages=args.languages, splits=[SPLIT])
        clips: list[Clip] = []
        for language in args.languages:
            clips += make_clips(speech_records(SPLIT, [language]), language, args.seconds[0], True, args.clips)
        listener = Listener(whisper, clips)
    except (ValueError, ImportError, OSError, FetchError) as error:
        parser.error(str(error))
    for row in run_cells(cells, listener, environment(device, args.commit), args.output):
        if row["status"] != "ok":
            print(f"{row['method']:<28} {row['message']}")
            continue
        heard = row["transcripts"]
        rate = wer([clip["said"] for clip in heard], [clip["heard"] for clip in heard]).rate
        kept = sum(clip["tokens"][1] for clip in heard) / sum(clip["tokens"][0] for clip in heard)
        print(f"{row['method']:<28} {TOKENS_PER_SECOND * kept:>5.2f} tokens/s {100 * rate:>6.1f} % WER")


if __name__ == "__main__":
    main()
