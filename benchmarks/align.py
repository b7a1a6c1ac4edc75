"""Aligns omni-small: its towers with its LLM, so that it transcribes speech and tells when something happens.

python benchmarks/align.py --minutes 10 --of 25     # on a GPU: the first 10 of 25 minutes
python benchmarks/align.py --minutes 15 --of 25     # goes on from runs/align/omni-small.safetensors
python benchmarks/align.py --minutes 0              # measures what is there
python benchmarks/align.py --publish                # puts it, with its model card, into the package

Trained are a low-rank sum on every matrix of the LLM and of Whisper's encoder, the projection between them and the
vision tower (`models/delta.py`), first the towers alone, then all. Speech is the train split of the recorded English
prompts and synthetic voices reading WordNet; clips are the time testbed's. Both are made while the GPU trains, by
other processes. Weights are written every few minutes, so that it may be stopped at any moment; progress is printed and
added to `log.jsonl`, scores on the test splits to `scores.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from audiopress.benchmarks.alignment.batch import Batch
from audiopress.benchmarks.alignment.card import publish
from audiopress.benchmarks.alignment.clips import ClipBank, ClipMaker, names
from audiopress.benchmarks.alignment.makers import Makers
from audiopress.benchmarks.alignment.model import Aligner, Changes, Steps, name_vectors
from audiopress.benchmarks.alignment.pieces import cuts
from audiopress.benchmarks.alignment.scores import aligned, speech_scores, time_scores
from audiopress.benchmarks.alignment.speech import SpeechBank, Texts
from audiopress.benchmarks.cells import Parser, check_device
from audiopress.benchmarks.environment import device_name, environment, finish
from audiopress.benchmarks.times.clips import TIMESTAMPS
from audiopress.compression.base import check_count
from audiopress.data import synthesis
from audiopress.data.collator import Encoder
from audiopress.data.speech import speech_records
from audiopress.data.stamps import Stamp, packaged_stamps
from audiopress.models import delta
from audiopress.models.fast import compile_layers
from audiopress.models.layout import TokenIds
from audiopress.models.loading import load_base
from audiopress.models.packages import FetchError
from audiopress.models.packed import use_packed_attention

log = logging.getLogger(__name__)

FILE = "omni-small.safetensors"
HEADS = "heads.safetensors"  # what is trained beside the model: only going on needs it
BASE = "omni-small:unaligned"

# All guesses.
TOWERS_ONLY = 0.1  # of the whole training
WARM_UP = 15.0  # seconds until the rates are at their peak, after every start
SHORT_CLIPS = (0.6, 80.0)  # so long into the training no clip is longer than so many seconds
CLIP_SHARE = 0.4  # of the steps, once there are clips
HELD_BACK_HOURS = 1.0  # room for the prompts of the validation split, and rows of them
LOG_SECONDS, SAVE_SECONDS = 10.0, 150.0


@dataclass(frozen=True)
class Plan:
    """How long, how much and where.

    Args:
        minutes: of training now; 0 to measure alone.
        of: minutes of the whole training, over all starts.
        tokens: of a batch.
        hours: of speech, at most.
        clips: to train on, at most.
        workers: processes that make speech and clips.
        steps: to stop after, even before the minutes are over.
    """

    minutes: float
    of: float
    tokens: int
    hours: float
    clips: int
    workers: int
    steps: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.minutes <= self.of or self.of <= 0:
            raise ValueError(f"minutes must be from 0 to those of the whole, got {self.minutes:g} of {self.of:g}")
        for name in ("tokens", "hours", "workers"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


class Training:
    """One start of the training.

    Args:
        folder: of weights and log.
        plan: of it.
        device: to train on.
        compiled: compile what is slow without.
        stamps: of the clips.

    Raises:
        ValueError: the recorded prompts alone are more hours than are planned.
    """

    def __init__(self, folder: Path, plan: Plan, device: torch.device, compiled: bool, stamps: list[Stamp]) -> None:
        self.folder, self.plan, self.device = folder, plan, device
        tensors, about = delta.read(folder / FILE) if (folder / FILE).is_file() else ({}, {})
        self.before = float(about.get("seconds", 0))
        self.starts, self.count = int(about.get("starts", 0)), int(about.get("steps", 0))
        self.rng = random.Random(self.starts)
        thinker, processor = load_base(BASE, torch.float32)
        encoder, prompts = Encoder(processor), speech_records("train")
        self.speech = SpeechBank(encoder, plan.hours, device)
        self.speech.add_recorded(prompts, self.rng, cuts(prompts, folder / "pieces.json"))
        self.held_back = SpeechBank(encoder, HELD_BACK_HOURS, device)
        self.held_back.add_recorded(speech_records("validation"), self.rng)
        self.clips = ClipBank(TokenIds.from_config(thinker.config), processor.tokenizer.pad_token_id, device)
        maker = ClipMaker(Encoder(processor, timestamps=TIMESTAMPS), stamps, seed=1 + self.starts)
        texts = Texts.load(prompts)
        self.makers = Makers(self.speech, self.clips, texts, maker, plan.clips, plan.workers, self.starts)
        use_packed_attention(thinker)
        self.changes = Changes(thinker.to(device))
        if tensors:
            self.changes.load(tensors)
        if device.type == "cuda":
            delta.cast_weights(thinker, torch.bfloat16)
            # Threads would wait for each other between the makers' processes; cuDNN's attention plans every shape anew.
            torch.set_num_threads(1)
            torch.set_float32_matmul_precision("high")  # the losses' products and the sums, which end in bfloat16
            torch.backends.cuda.enable_cudnn_sdp(False)
        if compiled:
            compile_layers(thinker, whole=True)
        vectors = name_vectors(names(stamps), processor.tokenizer, thinker.get_input_embeddings().weight)
        self.aligner = Aligner(thinker, processor.feature_extractor, vectors).train()
        if tensors and (folder / HEADS).is_file():
            self.aligner.load_heads(delta.read(folder / HEADS)[0])
        elif tensors:
            log.warning("%s is not there: what is trained beside the model begins anew", folder / HEADS)
        self.step = Steps(self.aligner, self.changes)

    def run(self, tell: Callable[[dict[str, Any]], None]) -> None:
        """Trains for the minutes of the plan, or until those of the whole are over.

        Raises:
            FloatingPointError: a loss is no longer finite; the weights written before stay.
        """
        try:
            began = time.perf_counter()
            self.makers.wait()
            waited = round(time.perf_counter() - began, 1)
            tell({"start": self.starts + 1, "waited": waited, "device": device_name(self.device)})
            self._run(tell)
        finally:
            self.makers.close()

    def _run(self, tell: Callable[[dict[str, Any]], None]) -> None:
        began = logged = saved = time.perf_counter()
        sums: dict[str, list[torch.Tensor]] = {}
        done = {"steps": 0, "utterances": 0, "clips": 0, "tokens": 0}
        first = self.count
        while True:
            now = time.perf_counter() - began
            progress = (self.before + now) / (60 * self.plan.of)
            over = now >= 60 * self.plan.minutes or progress >= 1 or self.count - first == self.plan.steps
            if over or time.perf_counter() - logged > LOG_SECONDS:
                if sums and progress >= TOWERS_ONLY:
                    sums["text_held_back"] = [self._held_back()]
                finish(self.device)
                tell(row := self._row(now, time.perf_counter() - logged, sums, done))
                if wrong := [name for name in sums if not math.isfinite(row[name])]:
                    raise FloatingPointError(f"{', '.join(wrong)} became {row[wrong[0]]} after {self.count} steps")
                sums, logged = {}, time.perf_counter()
                done = dict.fromkeys(done, 0)
            if over or time.perf_counter() - saved > SAVE_SECONDS:
                self.save(now)
                saved = time.perf_counter()
            if over:
                return
            self.makers.collect()
            batch = self._batch(progress)
            scale = min(1.0, now / WARM_UP) * 0.5 * (1 + math.cos(math.pi * progress))
            for name, loss in self.step(batch, scale, progress < TOWERS_ONLY).items():
                sums.setdefault(f"{name}_{'speech' if batch.clips is None else 'clips'}", []).append(loss)
            self.count += 1
            done["steps"] += 1
            done["utterances" if batch.clips is None else "clips"] += len(batch.ids)
            done["tokens"] += batch.ids.numel()

    def _held_back(self) -> torch.Tensor:
        """Gives the loss of prompts of the validation split, heard as those that are learned: with noise and masks."""
        batch = self.held_back.batch(self.rng, self.plan.tokens)
        return self.aligner(batch, towers_only=False)["text"].detach()

    def _batch(self, progress: float) -> Batch:
        until, longest = SHORT_CLIPS
        if self.clips.count and self.rng.random() < CLIP_SHARE:
            return self.clips.batch(self.rng, self.plan.tokens, longest if progress < until else math.inf)
        return self.speech.batch(self.rng, self.plan.tokens)

    def _row(
        self, now: float, since: float, sums: dict[str, list[torch.Tensor]], done: dict[str, int]
    ) -> dict[str, Any]:
        """Gives what is logged: the mean losses since the last entry, and how fast it went."""
        losses = {name: float(torch.stack(values).mean()) for name, values in sorted(sums.items())}
        return {
            "start": self.starts + 1,
            "steps": self.count,
            "seconds": round(self.before + now, 1),
            **{f"{name}_per_second": number / since for name, number in done.items()},
            "hours": self.speech.hours,
            "synthetic": len(self.speech.utterances["synthetic"]),
            "clips": self.clips.count,
            **losses,
        }

    def save(self, now: float) -> None:
        """Writes the weights, and how far the training is."""
        about = {"seconds": self.before + now, "starts": self.starts + 1, "steps": self.count}
        delta.write(self.folder / HEADS, self.aligner.heads(), {})
        delta.write(self.folder / FILE, self.changes.tensors(), {key: str(value) for key, value in about.items()})


def measure(
    folder: Path, device: torch.device, stamps: list[Stamp], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Gives the scores of the weights in a folder, each as soon as it is known."""
    model, processor = aligned(BASE, folder / FILE, device)
    about = delta.read(folder / FILE)[1]
    row = environment(device, args.commit) | {"weights": about}
    for split in ("validation", "test") if args.test_prompts != 0 else ():
        yield row | {"speech": speech_scores(model, processor, split, args.test_prompts)}
    if args.test_clips:
        workers = args.workers if device.type == "cuda" else 0
        found = time_scores(model, processor, stamps, folder / "clips", args.test_clips, workers)
        yield row | {"time": found}


def parser() -> Parser:
    """Gives the options."""
    made = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--minutes", type=float, default=10.0, help="of training now; 0 measures what is there")
    made.add_argument("--of", type=float, default=None, help="minutes of all starts together; default: --minutes")
    made.add_argument("--tokens", type=int, default=44_000, help="of a batch: what keeps an H200 busy, in 76 GB")
    made.add_argument("--hours", type=float, default=150.0, help="of speech, at most; an hour takes 115 MB of the GPU")
    made.add_argument("--clips", type=int, default=3000, help="to train on, at most; one takes about 5 MB of the GPU")
    made.add_argument("--workers", type=int, default=14, help="processes that make speech and clips")
    made.add_argument("--steps", type=int, default=None, help="stop after so many, even before the minutes are over")
    made.add_argument("--compile", action="store_true", help="compile what is slow without: half a minute, once")
    made.add_argument("--test-prompts", type=int, default=None, help="transcribed of each split, at most; 0 for none")
    made.add_argument("--test-clips", type=int, default=40, help="of the time testbed to ask about; 0 for none")
    made.add_argument(
        "--publish", action="store_true", help="train and measure nothing, put what is there into models/"
    )
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--commit", help="of the code, where it is not in a checkout")
    made.add_argument("--output", type=Path, default=Path("runs/align"))
    return made


def main() -> None:
    """Trains and measures."""
    made = parser()
    args = made.parse_args()
    try:
        for name in ("test_prompts", "test_clips", "clips"):
            if (value := getattr(args, name)) is not None:
                check_count(f"--{name.replace('_', '-')}", value, least=0)
        if (args.publish or not args.minutes) and not (args.output / FILE).is_file():
            raise ValueError(f"{args.output / FILE} is not there: nothing has been trained")
        if args.publish:
            print(publish(args.output, FILE))
            return
        device = check_device(args.device)
        plan = Plan(
            args.minutes, args.of or args.minutes or 1, args.tokens, args.hours, args.clips, args.workers, args.steps
        )
        stamps = packaged_stamps()
        synthesis.ensure_voices()
        args.output.mkdir(parents=True, exist_ok=True)
        training = Training(args.output, plan, device, args.compile, stamps) if plan.minutes else None
    except (FetchError, ValueError) as error:
        made.error(str(error))

    def tell(row: dict[str, Any], file: str = "log.jsonl") -> None:
        with (args.output / file).open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        shown = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
        print(json.dumps(shown) if file == "log.jsonl" else _summary(row), flush=True)

    if training is not None:
        try:
            training.run(tell)
        except FloatingPointError as error:
            sys.exit(f"error: {error}; {args.output / FILE} is from before")
        training = None  # what it held of the GPU is free again
    for row in measure(args.output, device, stamps, args):
        tell(row, "scores.jsonl")


def _summary(row: dict[str, Any]) -> str:
    """Tells the scores of a row in short."""
    if "speech" in row:
        found = row["speech"]
        words = f"{found['prompts']} prompts, {found['words']} words"
        return f"{found['split']}: WER {found['wer']:.1%}, spelled alike {found['wer_spelled']:.1%} ({words})"
    found = row["time"]
    needs = ", ".join(f"{name} {own['miou']:.1%}" for name, own in found["by_needs"].items() if "miou" in own)
    return f"time: mIoU {found['miou']:.1%} ({needs}), captions {found['caption_accuracy']:.1%}"


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # who is told to end ends its processes first
    main()
