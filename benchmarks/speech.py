"""Measures what compression leaves of the words: Whisper's own decoder transcribes from the tokens of each method.

python benchmarks/speech.py                                            # everything: for a GPU
python benchmarks/speech.py --methods ward --languages en --limit 5    # one method beside the controls, on a CPU
python benchmarks/speech.py --methods ward-refined --languages en --limit 5 --train-steps 20 --train-batch 4

Frozen Whisper, greedy decoding; see `models/whisper.py` for who sees what. Recorded prompts of the test and validation
splits, more than 500, singly and joined to dense clips of up to 28.5 s; nothing is tuned on either split. Methods with
weights are trained on the train split (see `words/training.py`), for every rate, and "elastic", once for all rates.

One JSON line per cell is added to --output. A cell that is there already, of the same commit and settings, is not run
again, and the most telling cells come first: the run can be stopped at any moment. Several processes share one GPU by
--shard 1/3, 2/3, 3/3, each with an --output of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from audiopress.benchmarks.cells import (
    BASELINES,
    NONE,
    TRANSFORMERS,
    Cell,
    Parser,
    add_run_options,
    check_device,
    read_shard,
    run_cells,
)
from audiopress.benchmarks.environment import environment
from audiopress.benchmarks.metrics import ErrorRate, bootstrap_interval, cer, wer
from audiopress.benchmarks.speed.tables import markdown
from audiopress.benchmarks.words.cells import SECONDS, methods_for, speech_cells
from audiopress.benchmarks.words.clips import Clip, batches, make_clips, read_all
from audiopress.benchmarks.words.spelling import number_words, spelled
from audiopress.benchmarks.words.training import Settings, SpeechTraining, Trained
from audiopress.compression import Compressor
from audiopress.compression.base import TOKENS_PER_SECOND
from audiopress.compression.budget import check_keep_ratio
from audiopress.data.speech import LANGUAGES, speech_records
from audiopress.models.packages import FetchError
from audiopress.models.spoken import Heard, Spoken
from audiopress.models.whisper import WHISPER_BASE, CompressedWhisper, Transcript, load_whisper

log = logging.getLogger(__name__)

RATES = (12.5, 25 / 3, 6.25, 5.0, 3.125)  # tokens per second; at 25, methods without training are `none`
SEEDS = (0, 1, 2)  # of training


@dataclass(frozen=True)
class Batch:
    """Clips of nearly one length, and what Whisper reads of them."""

    clips: tuple[Clip, ...]
    features: torch.Tensor
    tokens: list[int]


class SpeechTestbed:
    """Measures cells on one Whisper and one set of clips.

    Args:
        whisper: frozen.
        clips: any number, of any languages.
        batch: clips that the encoder takes at once.
    """

    def __init__(self, whisper: CompressedWhisper, clips: Sequence[Clip], batch: int) -> None:
        self.whisper = whisper
        read_all(clips)
        self.batches = [Batch(part, *whisper.features([c.sound() for c in part])) for part in batches(clips, batch)]
        self.clips = [clip for part in self.batches for clip in part.clips]
        self.tokens = sum(sum(part.tokens) for part in self.batches)
        self.hidden: dict[int, list[torch.Tensor]] = {}  # by the layer that reads them; 3 MB a clip of Whisper-base
        self.spoken: Spoken | None = None  # for all methods after the encoder

    def __call__(self, cell: Cell, trained: Trained | None = None) -> dict[str, Any]:
        """Transcribes all clips and counts the errors.

        Args:
            cell: `method`, and `keep_ratio`, of which None is the method's own; `options` where it has others;
                `elastic` where it was trained.
            trained: for this ratio, or, elastic, for several; None builds the method.
        """
        compressor, ratio = None, cell["keep_ratio"]
        if trained is not None:
            compressor = trained.compressor.at(ratio) if cell["elastic"] else trained.compressor
        elif cell["method"] not in (TRANSFORMERS, NONE):
            options = cell.get("options", {}) | ({} if ratio is None else {"keep_ratio": ratio})
            compressor = self.whisper.build(cell["method"], **options)
        heard = self._as_it_comes() if cell["method"] == TRANSFORMERS else self.hear(compressor)
        written = self.whisper.transcribe(heard, [clip.language for clip in self.clips], self.whisper.quick_dtype)
        kept = sum(heard.kept)
        return {
            **scores(self.clips, written),
            "audio_seconds": sum(clip.seconds for clip in self.clips),
            "tokens": {"audio": [self.tokens, kept]},
            "kept": {"audio": kept / self.tokens},
            "tokens_per_second": TOKENS_PER_SECOND * kept / self.tokens,
            "decoding": str(self.whisper.quick_dtype).removeprefix("torch."),
            "options": None if compressor is None else dataclasses.asdict(compressor.config),
            "stage": None if compressor is None else compressor.stage,
            "query_aware": compressor is not None and compressor.query_aware,
            "trained": trained is not None,
            **({} if trained is None else trained.row()),
        }

    @torch.no_grad()
    def hear(self, compressor: Compressor | None) -> Heard:
        """Runs a compressor over all clips, and the encoder, which for methods that act after it runs once for all."""
        if compressor is not None and compressor.split()[0] is not None:
            return self.whisper.compress(self._encode(compressor), compressor)
        self.spoken = self.spoken or self._encode(None)
        return self.whisper.compress(self.spoken, compressor)

    def _encode(self, compressor: Compressor | None) -> Spoken:
        """Runs the encoder from the first layer on that the compressor reads or acts in; those before it run once."""
        states = self.hidden.setdefault(self.whisper.first_layer(compressor), [])
        if not states:
            states += [self.whisper.hidden(part.features, compressor) for part in self.batches]
        pairs = zip(self.batches, states, strict=True)
        return Spoken.cat([self.whisper.encode(x.features, x.tokens, compressor, hidden) for x, hidden in pairs])

    def _as_it_comes(self) -> Heard:
        return Heard.cat([self.whisper.hear_as_it_comes(part.features, part.tokens) for part in self.batches])


class Measuring:
    """Measures the cells of a grid: trains what is to be trained, and keeps it for the next cells of its group.

    Args:
        testbeds: by whether their clips are joined.
        training: of methods with weights.
        ratios: by method, those of elastic training.
    """

    def __init__(
        self, testbeds: dict[bool, SpeechTestbed], training: SpeechTraining, elastic: dict[str, list[float | None]]
    ) -> None:
        self.testbeds, self.training, self.elastic = testbeds, training, elastic
        self.last: tuple[Any, Trained] | None = None

    def __call__(self, cell: Cell) -> dict[str, Any]:
        """Measures one."""
        return self.testbeds[cell["joined"]](cell, self.trained(cell) if cell["steps"] else None)

    def trained(self, cell: Cell) -> Trained:
        """Gives the method of a cell, trained as it says."""
        ratios = self.elastic[cell["method"]] if cell["elastic"] else [cell["keep_ratio"]]
        what = (cell["method"], ratios, cell["steps"], cell["seed"])
        if self.last is None or self.last[0] != what:
            self.last = None  # so that its memory can be used again
            self.last = what, self.training(*what)
        return self.last[1]


def scores(clips: Sequence[Clip], written: Sequence[Transcript]) -> dict[str, Any]:
    """Gives error rates with their intervals, over all languages and for each, and how many transcripts did not end."""
    said = _normal([clip.text for clip in clips], clips)
    texts = _normal([transcript.text for transcript in written], clips)
    words, characters = wer(said, texts), cer(said, texts)
    languages = {}
    for language in dict.fromkeys(clip.language for clip in clips):
        own = [i for i, clip in enumerate(clips) if clip.language == language]
        rate = wer([said[i] for i in own], [texts[i] for i in own])
        languages[language] = {"clips": len(own), "wer": rate.rate, "wer_interval": _interval(rate)}
    return {
        "clips": len(clips),
        "prompts": sum(len(clip.prompts) for clip in clips),
        "wer": words.rate,
        "wer_interval": _interval(words),
        "cer": characters.rate,
        "cer_interval": _interval(characters),
        "substitutions": words.substitutions,
        "deletions": words.deletions,
        "insertions": words.insertions,
        "errors_by_clip": words.errors_by_utterance,
        "words_by_clip": words.units_by_utterance,
        "ran_away": sum(not transcript.ended for transcript in written),
        "by_language": languages,
    }


def _interval(rate: ErrorRate) -> tuple[float, float] | None:
    """Gives the interval over clips; of a single clip there is none."""
    return rate.interval() if len(rate.units_by_utterance) > 1 else None


def _normal(texts: Sequence[str], clips: Sequence[Clip]) -> list[str]:
    return [spelled(text, clip.language) for text, clip in zip(texts, clips, strict=True)]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Gives a table of error rates, and of each method's difference to the uncompressed 25 tokens per second."""
    head = ["", "tokens/s", "WER, % [95 %]", "more than uncompressed [95 %]", "CER, %", "never ended"]
    base = next((row for row in rows if row["method"] == NONE and row["status"] == "ok"), None)
    lines = []
    for row in rows:
        if row["status"] != "ok":
            lines.append([_name(row), "", row["message"]])
            continue
        more = ""
        if base is not None and row is not base:
            differences = [a - b for a, b in zip(row["errors_by_clip"], base["errors_by_clip"], strict=True)]
            interval = bootstrap_interval(differences, base["words_by_clip"]) if row["clips"] > 1 else None
            more = f"{100 * (row['wer'] - base['wer']):+.1f} {_percent(interval)}"
        lines.append(
            [
                _name(row),
                f"{row['tokens_per_second']:.3g}",
                f"{100 * row['wer']:.1f} {_percent(row['wer_interval'])}",
                more,
                f"{100 * row['cer']:.1f}",
                f"{row['ran_away']} of {row['clips']}",
            ]
        )
    return markdown(head, lines)


def _name(row: dict[str, Any]) -> str:
    trained = f", {'elastic' if row['elastic'] else 'trained'}, seed {row['seed']}" if row["steps"] else ""
    return f"`{row['method']}`{trained}"


def _percent(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"[{', '.join(f'{100 * x:.1f}' for x in interval)}]"


def parse() -> tuple[Parser, argparse.Namespace]:
    """Reads the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=WHISPER_BASE, help=f"{WHISPER_BASE}, or a checkpoint of another Whisper")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="beside the controls; default: all")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="tokens per second, of 25")
    parser.add_argument("--languages", nargs="+", choices=LANGUAGES, default=list(LANGUAGES))
    parser.add_argument(
        "--splits",
        nargs="+",
        choices=("train", "validation", "test"),
        default=["test", "validation"],
        help="of the prompts that are measured; tune on train alone",
    )
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--joined", action="store_true", help="only prompts joined to dense clips")
    kinds.add_argument("--single", action="store_true", help="only single prompts")
    parser.add_argument("--limit", type=int, help="clips of each language, in training of each join")
    parser.add_argument("--train-steps", type=int, default=400, help="0 leaves out methods that must be trained")
    parser.add_argument("--train-batch", type=int, default=32, help="clips per step")
    parser.add_argument(
        "--train-rate",
        type=float,
        nargs="+",
        default=[1e-3],
        metavar="RATE",
        help="of learning; of several each method gets the one that does best on held back prompts of the train split",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of training")
    parser.add_argument("--batch", type=int, default=32, help="clips that the encoder takes at once")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="of N parts of the cells, the I-th")
    add_run_options(parser, Path("runs/speech.jsonl"))
    return parser, parser.parse_args()


def main() -> None:
    """Runs the cells and prints their tables."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("audiopress.benchmarks").setLevel(logging.INFO)
    parser, args = parse()
    try:
        device = check_device(args.device)
        part, parts = read_shard(args.shard, "I/N with I from 1 to N")
        for name, least in (("limit", 1), ("train_steps", 0), ("train_batch", 1), ("batch", 1)):
            if (value := getattr(args, name)) is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} must be {least} or more, got {value}")
        keep_ratios = [rate / TOKENS_PER_SECOND for rate in args.rates]
        for keep_ratio in keep_ratios:
            check_keep_ratio(keep_ratio)
        for language in {*args.languages} - {"en"}:
            number_words("1", language)  # where the package for it is missing, that is told now
        whisper = load_whisper(args.model).to(device)
        kinds = [True] if args.joined else [False] if args.single else [True, False]
        settings = Settings(tuple(args.languages), SECONDS[True], args.limit, args.train_batch, tuple(args.train_rate))
        several = len(args.train_rate) > 1  # then a row's `train_rate` is the one that was chosen
        rates = {"train_rates": args.train_rate} if several else {"train_rate": args.train_rate[0]}
        groups = speech_cells(
            whisper,
            [*BASELINES, *(args.methods or methods_for(whisper))],
            keep_ratios,
            kinds,
            {"steps": args.train_steps, "train_batch": args.train_batch, **rates},
            args.seeds,
            **{name: getattr(args, name) for name in ("model", "languages", "splits", "limit")},
        )
        testbeds = {}
        for joined in kinds:
            clips = []
            for language in args.languages:
                records = [r for split in args.splits for r in speech_records(split, [language])]
                clips += make_clips(records, language, SECONDS[joined], joined, args.limit)
            testbeds[joined] = SpeechTestbed(whisper, clips, args.batch)
    except (ValueError, ImportError, OSError, FetchError) as error:
        parser.error(str(error))
    elastic = {
        group[0]["method"]: list(dict.fromkeys(cell["keep_ratio"] for cell in group))
        for group in groups
        if group[0]["elastic"]
    }
    methods = list(dict.fromkeys(group[0]["method"] for group in groups))  # each in one part: see words/training.py
    cells = [cell for group in groups if methods.index(group[0]["method"]) % parts == part - 1 for cell in group]
    measuring = Measuring(testbeds, SpeechTraining(whisper, settings), elastic)
    rows = run_cells(cells, measuring, environment(device, args.commit), args.output)
    for joined in kinds:
        print(f"\n{'joined' if joined else 'single'} clips\n")
        print(table([row for row in rows if row["joined"] == joined]))


if __name__ == "__main__":
    main()
