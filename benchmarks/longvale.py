"""Asks a model the questions of LongVALE's evaluation set, and scores its answers.

python benchmarks/longvale.py --annotations longvale-annotations-eval.json --video-dir videos --model runs/stacking
python benchmarks/longvale.py ... --model Qwen/Qwen2.5-Omni-3B --compressor ward --keep-ratio 0.25
python benchmarks/longvale.py ... --model runs/stacking --shard 2/4         # one of four processes, in any order
python benchmarks/longvale.py --annotations longvale-annotations-eval.json --score longvale.log    # any model's log

Three tasks: grounding (when does it happen), captioning (dense: what happens when) and seg_captioning (what happens
from a to b). Every answer is a JSON line in --output; what is answered there is not asked again. When all shards are
done, `longvale.log` (LongVALE's own format) and `longvale.metrics.json` are written, and the metrics printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import audiopress
from audiopress.benchmarks.captions import CaptionScorer
from audiopress.benchmarks.cells import Parser, append, check_device, read_rows, read_shard
from audiopress.benchmarks.environment import environment
from audiopress.benchmarks.longvale_scores import TASKS, Key, Truth, read_log, read_truths, score, table, write_log
from audiopress.benchmarks.scoring import to_device
from audiopress.compression.base import check_count
from audiopress.compression.registry import QWEN_7B
from audiopress.data.collator import Encoder, OmniCollator
from audiopress.data.longvale import Query, load_queries
from audiopress.data.skips import SkipLog
from audiopress.models import CompressedOmni, storage
from audiopress.models.layout import AUDIO_TOKENS_PER_SECOND, Kind
from audiopress.models.loading import weights_of
from audiopress.models.packages import FetchError, digest

SETTINGS = "settings.json"
ANSWERS = "answers-*.jsonl"  # of each shard
LOG = "longvale.log"

logger = logging.getLogger("longvale")


class VideoEncoder(Encoder):
    """An encoder that decodes the media of a video once for all questions that follow each other."""

    _heard: tuple[Path | None, dict[str, Any], int] = (None, {}, 0)
    _seen: tuple[Path | None, dict[str, Any]] = (None, {})

    def _encode_audio(self, path: Path, sample: dict[str, Any]) -> int:
        if self._heard[0] != path:
            fields: dict[str, Any] = {}
            self._heard = path, fields, super()._encode_audio(path, fields)
        sample |= self._heard[1]
        return self._heard[2]

    def _encode_video(self, path: Path, sample: dict[str, Any]) -> None:
        if self._seen[0] != path:
            fields: dict[str, Any] = {}
            super()._encode_video(path, fields)
            self._seen = path, fields
        sample |= self._seen[1]


@dataclasses.dataclass
class Asker:
    """Puts questions to a model.

    Args:
        model: in eval mode.
        processor: the model's.
        encoder: of the questions.
        max_new_tokens: of an answer.
    """

    model: CompressedOmni
    processor: Any
    encoder: Encoder
    max_new_tokens: int

    @torch.no_grad()
    def __call__(self, queries: Sequence[Query]) -> list[dict[str, Any]]:
        """Asks questions in one batch; gives a row for each: "ok" with the answer, or "oom" or "failed"."""
        started = time.perf_counter()
        try:
            texts = self._answers(queries)
            found: list[dict[str, Any]] = [{"status": "ok", "answer": text} for text in texts]
        except Exception as error:  # one video's failure is no reason to stop the others
            status = "oom" if isinstance(error, torch.OutOfMemoryError) else "failed"
            message = f"{type(error).__name__}: {error}".splitlines()[0]
            logger.warning("%s: %s", queries[0].record.id, message)
            found = [{"status": status, "message": message}] * len(queries)
        common = {
            "seconds": (time.perf_counter() - started) / len(queries),
            "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        return [
            {"task": query.task, "video_id": query.video_id, "sentence_id": query.sentence_id} | own | common
            for query, own in zip(queries, found, strict=True)
        ]

    def _answers(self, queries: Sequence[Query]) -> list[str]:
        batch = self._batch(queries)
        generated = self.model.generate(**batch, max_new_tokens=self.max_new_tokens)
        texts = self.processor.tokenizer.batch_decode(generated, skip_special_tokens=True)
        return [text.strip() for text in texts]

    @torch.no_grad()
    def tokens(self, query: Query) -> dict[str, tuple[int, int]]:
        """Counts the audio and the video tokens of a question before and after compression."""
        inputs, _ = self.model.encode(**self._batch([query]))
        return {kind.name.lower(): inputs.count(kind) for kind in (Kind.AUDIO, Kind.VIDEO)}

    def _batch(self, queries: Sequence[Query]) -> dict[str, Any]:
        samples = [self.encoder(query.record, prompt_only=True) for query in queries]
        return to_device(OmniCollator(self.processor.tokenizer.pad_token_id, "left")(samples), self.model.device)


def ask_all(asker: Asker, queries: Sequence[Query], batch_size: int) -> Iterator[dict[str, Any]]:
    """Asks questions video by video, those of one task together; the first row of a video counts its tokens.

    Args:
        asker: gives the rows.
        queries: those of a video one after another.
        batch_size: of questions about one video.
    """
    with tqdm(total=len(queries), desc="questions", disable=None) as bar:
        for video, group in groupby(queries, key=lambda query: query.video_id):
            bar.set_postfix_str(video)
            counted = False
            for _, same in groupby(group, key=lambda query: query.task):
                questions = list(same)
                for start in range(0, len(questions), batch_size):
                    rows = asker(batch := questions[start : start + batch_size])
                    if not counted and rows[0]["status"] == "ok":
                        counted, rows[0] = True, rows[0] | {"tokens": asker.tokens(batch[0])}
                    yield from rows
                    bar.update(len(rows))


def read_answers(folder: Path) -> dict[Key, dict[str, Any]]:
    """Gives the last row of every question that any shard has written; an "ok" one stands for good."""
    rows: dict[Key, dict[str, Any]] = {}
    for path in sorted(folder.glob(ANSWERS)):
        for row in read_rows(path):
            key = row["task"], row["video_id"], row["sentence_id"]
            if rows.get(key, {}).get("status") != "ok":
                rows[key] = row
    return rows


def kept_tokens(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sums the tokens that were counted: before and after, the ratio kept, and audio tokens per second."""
    counted = {row["video_id"]: row["tokens"] for row in rows if "tokens" in row}.values()
    sums = {kind: [sum(tokens[kind][i] for tokens in counted) for i in (0, 1)] for kind in ("audio", "video")}
    kept = {kind: after / before for kind, (before, after) in sums.items() if before}
    rate = {"audio_tokens_per_second": AUDIO_TOKENS_PER_SECOND * kept["audio"]} if "audio" in kept else {}
    return {"tokens": sums, "kept": kept, "videos": len(counted), **rate}


def parse() -> tuple[Parser, argparse.Namespace]:
    """Reads the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path, required=True, help="LongVALE's JSON file of annotations")
    parser.add_argument("--score", type=Path, metavar="LOG", help="only score this log, in LongVALE's format")
    parser.add_argument("--video-dir", type=Path, help="folder of {video_id}.mp4")
    parser.add_argument("--audio-dir", type=Path, help="folder of extracted audio; default: the videos' own")
    parser.add_argument("--model", help="a checkpoint of Qwen2.5-Omni, omni-small, or what train_compress.py saved")
    parser.add_argument("--base", help="of a saved variant: where its base model lies now")
    parser.add_argument("--compressor", help="of a checkpoint: a training-free method; default: none")
    parser.add_argument("--keep-ratio", type=float, help="of the compressor, or of a saved variant of several")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--time-format", choices=("percent", "decimal"), default="percent", help="of the questions")
    parser.add_argument("--num-frames", type=int, default=50, help="of a video")
    parser.add_argument("--max-audio-seconds", type=float, default=300.0, help="cut longer audio")
    parser.add_argument("--timestamps", type=int, default=0, help="in a video, for a model that was trained with them")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="of an answer; default: 1024, LongVALE's")
    parser.add_argument("--batch-size", type=int, default=1, help="questions about one video asked together")
    parser.add_argument("--shard", default="1/1", metavar="i/n", help="every n-th video, from the i-th on")
    parser.add_argument("--compile", action="store_true", help="on a GPU: faster after the first minutes")
    parser.add_argument("--strict", action="store_true", help="a video that is not there is an error, not a skip")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="of the code, where it is not in a checkout")
    parser.add_argument("--output", type=Path, default=Path("runs/longvale-eval"), help="folder of the answers")
    return parser, parser.parse_args()


def check(args: argparse.Namespace) -> tuple[int, int]:
    """Gives the shard; raises ValueError, with a message of one line, where an option cannot be."""
    if args.model is None:
        raise ValueError("--model is needed: a checkpoint of Qwen2.5-Omni, omni-small, or a saved variant")
    for name in ("num_frames", "max_audio_seconds", "max_new_tokens", "batch_size"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    check_count("--timestamps", args.timestamps, least=0)
    saved = storage.is_saved(args.model)
    if args.compressor is None:
        if args.keep_ratio is not None and not saved:
            raise ValueError("--keep-ratio goes with --compressor, or with a saved variant")
    else:
        with torch.device("meta"):
            made = audiopress.build(args.compressor, **vars(QWEN_7B), **ratio(args))
        if made.trained:
            raise ValueError(f"{args.compressor} has weights to train: give --model the variant that was trained")
    check_device(args.device)
    return read_shard(args.shard)


def ratio(args: argparse.Namespace) -> dict[str, float]:
    """Gives the option of a compressor that the command line sets."""
    return {} if args.keep_ratio is None else {"keep_ratio": args.keep_ratio}


def settle(args: argparse.Namespace) -> dict[str, Any]:
    """Writes down what the answers of the output folder depend on.

    Raises:
        ValueError: the folder holds answers of other settings, or the model is a damaged variant.
    """
    encoded = ("time_format", "num_frames", "max_audio_seconds", "timestamps")
    own = ("compressor", "keep_ratio", *encoded, "max_new_tokens")
    settings = {
        "model": args.model,
        "weights": weights_of(args.model),
        "annotations": digest(args.annotations),
        "sees_video": args.video_dir is not None,
        "hears_files_of_its_own": args.audio_dir is not None,
        **{name: getattr(args, name) for name in own},
    }
    path = args.output / SETTINGS
    if path.exists() and any(args.output.glob(ANSWERS)):
        before = json.loads(path.read_text())
        differing = [
            f"{key} {before.get(key)!r} != {value!r}" for key, value in settings.items() if before.get(key) != value
        ]
        if differing:
            raise ValueError(f"{args.output} holds answers of other settings ({'; '.join(differing)}): change --output")
    args.output.mkdir(parents=True, exist_ok=True)
    storage.write_json(settings, path)
    return settings


def report(
    log: Path, answers: dict[Key, str], truths: dict[str, Truth], scorer: CaptionScorer | None, about: dict[str, Any]
) -> None:
    """Scores answers, prints the metrics, and writes them beside their log with what else is known."""
    metrics = score(answers, truths, scorer)
    print(table(metrics))
    storage.write_json(about | {"metrics": metrics}, log.with_suffix(".metrics.json"))


def finish(
    queries: Sequence[Query],
    truths: dict[str, Truth],
    scorer: CaptionScorer | None,
    skips: SkipLog,
    settings: dict[str, Any],
    args: argparse.Namespace,
) -> None:
    """Writes the log and the metrics if every question has been asked, by whatever shard."""
    rows = read_answers(args.output)
    asked = {(query.task, *query.key): rows.get((query.task, *query.key)) for query in queries}
    missing = sum(row is None for row in asked.values())
    if missing:
        print(f"{len(asked) - missing} of {len(asked)} questions are asked; the metrics come with the last shard")
        return
    failed = sum(row["status"] != "ok" for row in asked.values())
    answers = {key: row.get("answer", "") for key, row in asked.items()}
    write_log(args.output / LOG, answers, truths)
    about = {
        "settings": settings,
        "environment": environment(torch.device(args.device), args.commit),
        "questions": len(asked),
        "failed": failed,
        "skipped_videos": skips.skipped,
        **kept_tokens(list(asked.values())),
    }
    report(args.output / LOG, answers, truths, scorer, about)
    if failed or skips.skipped:
        print(f"{failed} of {len(asked)} questions failed and count 0; {skips.report(len(truths), 'videos')}")


def main() -> None:
    """Asks what is not answered yet; scores when everything is."""
    parser, args = parse()
    logging.basicConfig(format="%(message)s")
    try:
        truths = read_truths(args.annotations)
        if args.score is not None:
            answers = read_log(args.score, truths)
            scorer = CaptionScorer() if {key[0] for key in answers} != {"grounding"} else None
            report(args.score, answers, truths, scorer, {})
            return
        number, total = check(args)
        skips = SkipLog(args.strict)
        tasks = [task for task in TASKS if task in args.tasks]
        folders = {"video_dir": args.video_dir, "audio_dir": args.audio_dir}
        queries = load_queries(args.annotations, tasks, **folders, time_format=args.time_format, skips=skips)
        scorer = CaptionScorer() if set(tasks) != {"grounding"} else None
        settings = settle(args)
        rows = read_answers(args.output)
        mine = set(list(dict.fromkeys(query.video_id for query in queries))[number - 1 :: total])
        left = [q for q in queries if q.video_id in mine and rows.get((q.task, *q.key), {}).get("status") != "ok"]
        if left:
            options = {"base": args.base, "device": args.device, "compile": args.compile, **ratio(args)}
            model, processor = audiopress.load(args.model, args.compressor, **options)
    except (ValueError, OSError, FetchError) as error:
        parser.error(str(error))
    if left:
        encoder = VideoEncoder(
            processor,
            num_frames=args.num_frames,
            max_seconds=args.max_audio_seconds,
            timestamps=args.timestamps,
        )
        asker = Asker(model, processor, encoder, args.max_new_tokens)
        answered = args.output / ANSWERS.replace("*", f"{number}-of-{total}")
        for row in ask_all(asker, left, args.batch_size):
            append(row, answered)
    finish(queries, truths, scorer, skips, settings, args)


if __name__ == "__main__":
    main()
