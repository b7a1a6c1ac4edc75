"""Measures what compression leaves of the words: Whisper's own decoder transcribes from the tokens of each method.

python benchmarks/speech.py --methods ward --limit 40               # one method beside the controls, on a CPU
python benchmarks/speech.py --joined --methods ward atome           # prompts joined to dense clips of up to 28.5 s
python benchmarks/speech.py --joined --languages en es fr it ru     # all methods that need no training: for a GPU

Held-out recorded prompts, frozen Whisper, greedy decoding; see `models/whisper.py` for who sees what. One JSON line
per cell is added to --output; a cell that is there already, of the same commit and settings, is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from audiopress.benchmarks.cells import BASELINES, NONE, TRANSFORMERS, Cell, Parser, check, make_cells, run_cells
from audiopress.benchmarks.environment import environment
from audiopress.benchmarks.metrics import ErrorRate, bootstrap_interval, cer, wer
from audiopress.benchmarks.speed_tables import markdown
from audiopress.compression import Compressor, TokenStream, available
from audiopress.compression.base import TOKENS_PER_SECOND
from audiopress.data.media import read_audio
from audiopress.data.records import Record
from audiopress.data.speech import LANGUAGES, speech_records
from audiopress.models.packages import FetchError
from audiopress.models.whisper import WHISPER_BASE, CompressedWhisper, Heard, Transcript, load_whisper

log = logging.getLogger(__name__)

RATES = (12.5, 25 / 3, 6.25, 5.0, 3.125)  # tokens per second; at 25, methods without training are `none`
SECONDS = {False: 30.0, True: 28.5}  # the longest clip, single or joined: Whisper's window, and nearly that
SEED = 0  # of the order in which prompts are joined, or taken where they are limited


@dataclass(frozen=True)
class Clip:
    """One or several prompts of a language, one after another.

    Args:
        language: of all of them.
        prompts: in their order.
    """

    language: str
    prompts: tuple[Record, ...]

    @property
    def text(self) -> str:
        """What is said."""
        return " ".join(prompt.reference for prompt in self.prompts)

    @property
    def seconds(self) -> float:
        """How long it is."""
        return sum(prompt.duration or 0.0 for prompt in self.prompts)

    def sound(self) -> np.ndarray:
        """Gives the samples at 16 kHz."""
        return np.concatenate([read_audio(prompt.audio) for prompt in self.prompts])


@dataclass(frozen=True)
class Batch:
    """Clips of one language, and what Whisper reads of them."""

    clips: tuple[Clip, ...]
    features: torch.Tensor
    tokens: list[int]


class SpeechTestbed:
    """Measures cells on one Whisper and one set of clips.

    Args:
        whisper: frozen.
        clips: any number, of any languages.
        batch: clips at once.
    """

    def __init__(self, whisper: CompressedWhisper, clips: Sequence[Clip], batch: int) -> None:
        self.whisper = whisper
        self.batches = [
            Batch(part, *whisper.features([clip.sound() for clip in part]))
            for language in dict.fromkeys(clip.language for clip in clips)
            for part in _parts([clip for clip in clips if clip.language == language], batch)
        ]
        self.hidden: dict[int, list[torch.Tensor]] = {}  # by the layer that reads them; 3 MB a clip of Whisper-base

    def __call__(self, cell: Cell) -> dict[str, Any]:
        """Transcribes all clips and counts the errors."""
        compressor = None
        if cell["method"] not in (TRANSFORMERS, NONE):
            options = {} if cell["keep_ratio"] is None else {"keep_ratio": cell["keep_ratio"]}
            compressor = self.whisper.build(cell["method"], **options)
        written: list[Transcript] = []
        kept = 0
        for i, batch in enumerate(self.batches):
            heard = self._as_is(batch) if cell["method"] == TRANSFORMERS else self._hear(i, compressor)
            written += self.whisper.transcribe(heard, batch.clips[0].language)
            kept += sum(heard.kept)
        tokens = sum(sum(batch.tokens) for batch in self.batches)
        clips = [clip for batch in self.batches for clip in batch.clips]
        return {
            **scores(clips, written),
            "audio_seconds": sum(clip.seconds for clip in clips),
            "tokens": {"audio": [tokens, kept]},
            "kept": {"audio": kept / tokens},
            "tokens_per_second": TOKENS_PER_SECOND * kept / tokens,
            "options": None if compressor is None else dataclasses.asdict(compressor.config),
        }

    def _hear(self, i: int, compressor: Compressor | None) -> Heard:
        """Runs the encoder from the first layer on that the compressor reads or acts in; those before it run once."""
        batch, first = self.batches[i], self.whisper.first_layer(compressor)
        states = self.hidden.setdefault(first, [])
        if len(states) == i:
            states.append(self.whisper.hidden(batch.features, compressor))
        return self.whisper.hear(batch.features, batch.tokens, compressor, states[i])

    @torch.no_grad()
    def _as_is(self, batch: Batch) -> Heard:
        """Gives the encoder's states as transformers has them: all 30 s, 50 per second."""
        states = self.whisper.model.model.encoder(batch.features).last_hidden_state
        stream = TokenStream(states.flatten(0, 1), (states.shape[1],) * len(states))
        return Heard(stream, tuple(2 * n for n in batch.tokens))


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
    """Spells English, numbers above all, as Whisper's authors do to count errors; for other languages they do not."""
    english = EnglishTextNormalizer({})
    return [str(english(text)) if clip.language == "en" else text for text, clip in zip(texts, clips, strict=True)]


def make_clips(records: Sequence[Record], language: str, seconds: float, joined: bool, limit: int | None) -> list[Clip]:
    """Gives clips of at most so many seconds: every prompt by itself, or joined.

    Prompts are taken in an order drawn once. Joined, each goes to the end of the first clip that has room for it.

    Args:
        records: all of one language, each with its duration.
        language: of theirs.
        seconds: of the longest clip; longer prompts are left out, which is logged.
        joined: whether prompts are joined.
        limit: at most so many clips.
    """
    fitting = [record for record in records if (record.duration or 0) <= seconds]
    if left := len(records) - len(fitting):
        log.warning("%d of %d prompts in %r are left out: longer than %g s", left, len(records), language, seconds)
    clips: list[list[Record]] = []
    room: list[float] = []
    for record in (fitting[i] for i in np.random.default_rng(SEED).permutation(len(fitting))):
        length = record.duration or 0.0
        place = next((i for i, free in enumerate(room) if joined and length <= free), len(clips))
        if place == len(clips):
            clips.append([])
            room.append(seconds)
        clips[place].append(record)
        room[place] -= length
    return [Clip(language, tuple(prompts)) for prompts in clips[:limit]]


def _parts(clips: Sequence[Clip], size: int) -> list[tuple[Clip, ...]]:
    """Gives the clips in batches of nearly the same length."""
    ordered = sorted(clips, key=lambda clip: clip.seconds)
    return [tuple(ordered[i : i + size]) for i in range(0, len(ordered), size)]


def training_free(whisper: CompressedWhisper) -> list[str]:
    """Gives every method and preset that Whisper can be given and that need not be trained."""
    names = [
        name for family, info in available().items() for name in (family, *(f"{family}:{p}" for p in info.presets))
    ]
    found = []
    for name in names:
        try:
            if name != NONE and not whisper.build(name).trained:
                found.append(name)
        except ValueError as error:
            log.info("%s is not measured: %s", name, error)
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Gives a table of error rates, and of each method's difference to the uncompressed 25 tokens per second."""
    head = ["", "tokens/s", "WER, % [95 %]", "more than uncompressed [95 %]", "CER, %", "never ended"]
    base = next((row for row in rows if row["method"] == NONE and row["status"] == "ok"), None)
    lines = []
    for row in rows:
        if row["status"] != "ok":
            lines.append([f"`{row['method']}`", "", row["message"]])
            continue
        more = ""
        if base is not None and row is not base:
            differences = [a - b for a, b in zip(row["errors_by_clip"], base["errors_by_clip"], strict=True)]
            interval = bootstrap_interval(differences, base["words_by_clip"]) if row["clips"] > 1 else None
            more = f"{100 * (row['wer'] - base['wer']):+.1f} {_percent(interval)}"
        lines.append(
            [
                f"`{row['method']}`",
                f"{row['tokens_per_second']:.3g}",
                f"{100 * row['wer']:.1f} {_percent(row['wer_interval'])}",
                more,
                f"{100 * row['cer']:.1f}",
                f"{row['ran_away']} of {row['clips']}",
            ]
        )
    return markdown(head, lines)


def _percent(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"[{', '.join(f'{100 * x:.1f}' for x in interval)}]"


def parse() -> tuple[Parser, argparse.Namespace]:
    """Reads the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=WHISPER_BASE, help=f"{WHISPER_BASE}, or a checkpoint of another Whisper")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="default: all that need no training")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="tokens per second, of 25")
    parser.add_argument("--languages", nargs="+", choices=LANGUAGES, default=["en"])
    parser.add_argument(
        "--splits",
        nargs="+",
        choices=("train", "validation", "test"),
        default=["test"],
        help="of the prompts; tune on any but test",
    )
    parser.add_argument("--joined", action="store_true", help="prompts joined to dense clips")
    parser.add_argument("--limit", type=int, help="clips of each language")
    parser.add_argument("--batch", type=int, nargs=1, default=[8], help="clips at once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="of the code measured, where it is not in a checkout")
    parser.add_argument("--output", type=Path, default=Path("runs/speech.jsonl"))
    args = parser.parse_args()
    args.keep_ratios = [rate / TOKENS_PER_SECOND for rate in args.rates]
    args.seconds, args.repeats, args.no_video = [SECONDS[args.joined]], 1, True
    return parser, args


def main() -> None:
    """Runs the cells and prints their table."""
    logging.basicConfig(format="%(message)s")
    parser, args = parse()
    try:
        if args.limit is not None and args.limit < 1:
            raise ValueError(f"--limit must be 1 or more, got {args.limit}")
        device = check(args)
        whisper = load_whisper(args.model).to(device)
        methods = args.methods or training_free(whisper)
        for name in methods:
            if name not in BASELINES and whisper.build(name).trained:
                raise ValueError(f"{name} must be trained first, which this benchmark does not do")
        args.compressors = [*BASELINES, *methods]
        settings = {name: getattr(args, name) for name in ("languages", "splits", "joined", "limit")}
        cells = make_cells(args, **settings)
        clips = []
        for language in args.languages:
            records = [r for split in args.splits for r in speech_records(split, [language])]
            clips += make_clips(records, language, args.seconds[0], args.joined, args.limit)
        testbed = SpeechTestbed(whisper, clips, args.batch[0])
    except (ValueError, OSError, FetchError) as error:
        parser.error(str(error))
    print(table(run_cells(cells, testbed, environment(device, args.commit), args.output)))


if __name__ == "__main__":
    main()
