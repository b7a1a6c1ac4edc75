"""Measures what compression leaves of the times and the things: questions about clips that `timeline.py` made.

python benchmarks/timeline.py runs/timeline                                   # the clips
python benchmarks/events.py runs/timeline --methods ward --limit 4            # one method beside the controls
python benchmarks/events.py runs/timeline --model runs/ward --keep-ratios 0.2 # a variant that train_compress.py saved
python benchmarks/events.py runs/timeline --steps 200 --seeds 0 1 2           # the LLM is first trained to read each

Grounding, segment captioning and counting, asked one by one and answered greedily, as a user's mp4 would be. With
--steps every cell first trains LoRA, and the method's own weights where it has any, on the clips of the train split:
the same data, steps and order for all. One JSON line per cell is added to --output; a cell that is there already, of
the same commit and settings, is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import audiopress
from audiopress.benchmarks.cells import NONE, Cell, Parser, check_device, ratios_of, run_cells
from audiopress.benchmarks.environment import environment
from audiopress.benchmarks.event_clips import Clip, Encoded, KeptClips, Sample, load_clips
from audiopress.benchmarks.event_scores import scores
from audiopress.benchmarks.scoring import to_device
from audiopress.benchmarks.speed_tables import markdown
from audiopress.compression import Compressor, available, build
from audiopress.compression.base import TOKENS_PER_SECOND
from audiopress.compression.registry import QWEN_7B
from audiopress.data.collator import OmniCollator
from audiopress.data.longvale import load_dialogues
from audiopress.data.records import Record
from audiopress.data.timeline import SPLITS
from audiopress.models import CompressedOmni, storage
from audiopress.models.layout import Kind
from audiopress.models.loading import build_for
from audiopress.models.omni import tokens_left
from audiopress.models.packages import FetchError
from audiopress.models.rewrite import POSITIONS
from audiopress.models.training import fit

KEEP_RATIOS = (0.5, 0.25, 0.2, 0.125)  # of the audio
JOINT_RATIOS = (0.2, 0.1, 0.05)  # of audio and video together
NEW_TOKENS = {
    "grounding": 24,
    "seg_captioning": 48,
    "counting": 12,
}  # about twice the longest true answers of omni-small
ROOM = {"cuda": 2**18, "cpu": 2**14}  # tokens of a batch of questions; a guess: 6 GB of keys and values of omni-small
WAITING = 4  # tokens before compression that take the memory of one in the LLM; a guess


@dataclass(frozen=True)
class Recipe:
    """How the LLM is trained to read the tokens of a method.

    Args:
        batch: dialogues per step; all questions about a clip are trained on at once.
        learning_rate: of LoRA; by default what `train_compress.py` takes for omni-small.
        connector_learning_rate: of the method's own weights.
        lora_r: rank, and alpha, of LoRA.
    """

    batch: int = 8
    learning_rate: float = 1e-3
    connector_learning_rate: float = 1e-3
    lora_r: int = 16

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")


class TimeTestbed:
    """Measures cells on one model and one set of clips.

    Args:
        model: in eval mode; a saved variant is measured with its own compressor.
        processor: the model's.
        clips: at least one.
        dialogues: to train on.
        recipe: of training.
        num_frames: of a video.
        room: tokens of a batch of questions.
        workers: processes that decode clips; 0: this one.
    """

    def __init__(
        self,
        model: CompressedOmni,
        processor: Any,
        clips: Sequence[Clip],
        dialogues: Sequence[Record] = (),
        recipe: Recipe | None = None,
        *,
        num_frames: int = 50,
        room: int | None = None,
        workers: int = 0,
    ) -> None:
        self.model = model
        self.processor = processor
        self.clips = clips
        self.questions = [question for clip in clips for question in clip.questions]
        self.recipe = recipe or Recipe()
        self.room = room or ROOM[model.device.type]

        def kept(name: str, groups: Sequence[Sequence[Record]], prompt_only: bool) -> KeptClips:
            return KeptClips(model.thinker, Encoded(processor, groups, num_frames, prompt_only), workers, name)

        self.asked = kept("clips", [[q.record for q in clip.questions] for clip in clips], True)
        self.learnt = cache(lambda: kept("clips to train on", [[record] for record in dialogues], False))

    def __call__(self, cell: Cell) -> dict[str, Any]:
        """Trains, where the cell has steps, then asks all questions.

        Args:
            cell: `method`, `keep_ratio` (None: the method's own), `options`, `positions`, `seed` and `steps`.
        """
        transformers.set_seed(cell["seed"])
        model = CompressedOmni(self.model.thinker, self._compressor(cell), positions=cell["positions"])
        model.to(self.model.device).seed = cell["seed"]
        assert model.compressor is not None
        row: dict[str, Any] = {
            name: getattr(model.compressor, name) for name in ("trained", "query_aware", "stage", "adaptive")
        } | {"config": dataclasses.asdict(model.compressor.config)}
        try:
            if cell["steps"]:
                row |= self._train(model, cell)
            elif model.compressor.trained and self.model.compressor is None:
                raise ValueError(f"{model.compressor.name} has weights to train: give steps, or a saved variant")
            return row | self._measure(model.eval())
        finally:
            model.remove_adapter()

    def _compressor(self, cell: Cell) -> Compressor:
        options = dict(cell["options"])
        if cell["keep_ratio"] is not None:
            options["keep_ratio"] = cell["keep_ratio"]
        own = self.model.compressor
        if own is not None:
            return own.at(**options) if options else own
        return build_for(self.model.thinker, cell["method"], **options)

    def _train(self, model: CompressedOmni, cell: Cell) -> dict[str, Any]:
        """Trains LoRA, and the method's own weights."""
        started = time.perf_counter()
        recipe = self.recipe
        model.add_adapter(recipe.lora_r, recipe.lora_r)
        model.set_trainable({name for name in ("adapter", "compressor") if model.own_parameters(name)})
        groups = [
            {"params": [p for p in model.own_parameters(part).values() if p.requires_grad], "lr": rate}
            for part, rate in (("adapter", recipe.learning_rate), ("compressor", recipe.connector_learning_rate))
        ]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
        place = model.device.type

        def loss(batch: Sample) -> Tensor:
            with torch.autocast(place, torch.bfloat16, enabled=place == "cuda"):
                return model(**batch).loss

        losses = fit(
            model,
            [sample for clip in self.learnt().samples(model.compressor) for sample in clip],
            OmniCollator(self.processor.tokenizer.pad_token_id),
            loss,
            optimizer,
            steps=cell["steps"],
            batch_size=recipe.batch,
            seed=cell["seed"],
            name=f"training {model.compressor.name}",
        )
        last = losses[-max(1, len(losses) // 10) :]
        return {
            "train_loss": sum(last) / len(last),
            "training_seconds": time.perf_counter() - started,
        }

    @torch.no_grad()
    def _measure(self, model: CompressedOmni) -> dict[str, Any]:
        started = time.perf_counter()
        asked = self.asked.samples(model.compressor)
        counted = self._count(model, [samples[0] for samples in asked])
        answers: dict[str, str] = {}
        pairs = list(zip(self.questions, (sample for samples in asked for sample in samples), strict=True))
        for task, longest in NEW_TOKENS.items():
            own = [pair for pair in pairs if pair[0].kind.task == task]
            for batch in self._batches(model, [sample for _, sample in own]):
                generated = model.generate(**self._collate([own[i][1] for i in batch]), max_new_tokens=longest)
                texts = self.processor.tokenizer.batch_decode(generated, skip_special_tokens=True)
                answers |= {own[i][0].record.id: text.strip() for i, text in zip(batch, texts, strict=True)}
        examples = {q.kind.task: [q.truth or str(q.span), answers[q.record.id]] for q in reversed(self.questions)}
        found = {"answering_seconds": time.perf_counter() - started, "examples": examples}
        return scores(self.questions, answers) | counted | found

    def _count(self, model: CompressedOmni, samples: Sequence[Sample]) -> dict[str, Any]:
        """Counts the tokens of each clip once, before and after, and those of the sound while something is heard."""
        tokens = {"audio": [0, 0], "video": [0, 0]}
        while_heard = [0, 0]
        for batch in self._batches(model, samples):
            inputs, _ = model.encode(**self._collate([samples[i] for i in batch]))
            for kind in (Kind.AUDIO, Kind.VIDEO):
                counts = tokens[kind.name.lower()]
                counts[:] = [a + b for a, b in zip(counts, inputs.count(kind), strict=True)]
            for side, layout in enumerate((inputs.before, inputs.layout)):
                for row, i in enumerate(batch):
                    seconds = layout.second[row][layout.kind[row] == Kind.AUDIO.value]
                    spans = self.clips[i].heard
                    while_heard[side] += sum(int(((start <= seconds) & (seconds < end)).sum()) for start, end in spans)
        (audio, audio_kept), (video, video_kept) = tokens.values()
        seconds = sum(clip.questions[0].record.duration or 0.0 for clip in self.clips)
        rest = audio - while_heard[0]
        return {
            "audio_seconds": seconds,
            "tokens": tokens,
            "kept": {
                "audio": audio_kept / audio,
                "video": video_kept / video,
                "both": (audio_kept + video_kept) / (audio + video),
            },
            "tokens_per_second": TOKENS_PER_SECOND * audio_kept / audio,
            "media_tokens_per_second": (audio_kept + video_kept) / seconds,
            "density": {  # tokens per second of sound
                "while_heard": TOKENS_PER_SECOND * while_heard[1] / while_heard[0] if while_heard[0] else None,
                "elsewhere": TOKENS_PER_SECOND * (audio_kept - while_heard[1]) / rest if rest else None,
            },
        }

    def _batches(self, model: CompressedOmni, samples: Sequence[Sample]) -> Iterator[list[int]]:
        """Gives batches as indices, samples of nearly the same length together, that take no more than the room."""
        ids = model.token_ids

        def size(sample: Sample) -> int:
            audio, video = (int((sample["input_ids"] == token).sum()) for token in (ids.audio, ids.video))
            whole = len(sample["input_ids"])
            return whole - audio - video + tokens_left(model.compressor, None, audio, video) + whole // WAITING

        sizes = [size(sample) for sample in samples]
        batch: list[int] = []
        for i in sorted(range(len(samples)), key=sizes.__getitem__):
            if batch and (len(batch) + 1) * sizes[i] > self.room:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _collate(self, samples: Sequence[Sample]) -> Sample:
        return to_device(OmniCollator(self.processor.tokenizer.pad_token_id, "left")(samples), self.model.device)


def load_testbed(
    folder: Path,
    model: str = "omni-small",
    *,
    base: str | None = None,
    split: str = "test",
    limit: int | None = None,
    recipe: Recipe | None = None,
    num_frames: int = 50,
    room: int | None = None,
    workers: int = 0,
    device: torch.device | None = None,
) -> TimeTestbed:
    """Opens a model and the clips; see `TimeTestbed` and `load_clips`.

    Raises:
        ValueError: the folder or the model is not what it must be.
        FetchError: omni-small is not in the cache and cannot be fetched.
    """
    clips = load_clips(folder, split, limit)
    train = folder / "train.json"
    dialogues = load_dialogues(train, video_dir=folder / "videos") if train.is_file() else []
    opened, processor = audiopress.load(model, base=base, device=device)
    return TimeTestbed(opened, processor, clips, dialogues, recipe, num_frames=num_frames, room=room, workers=workers)


def setting(folder: Path, model: str, **others: Any) -> dict[str, Any]:
    """Gives what the cells of a testbed have in common: the model, with what is saved of it, and the clips.

    Raises:
        ValueError: the folder has no clips, or the model is a damaged variant.
    """
    options = folder / "options.json"
    if not options.is_file():
        raise ValueError(f"{folder} holds no clips; python benchmarks/timeline.py {folder} makes some")
    saved = (Path(model) / storage.MANIFEST).is_file()
    weights = storage.read_manifest(model)["sha256"] if saved else None
    return {"testbed": "time", "model": model, "weights": weights, "data": json.loads(options.read_text())} | others


def training_free() -> list[str]:
    """Gives every method and preset that need not be trained."""
    names = [n for family, info in available().items() for n in (family, *(f"{family}:{p}" for p in info.presets))]
    with torch.device("meta"):
        return [name for name in names if not build(name, **vars(QWEN_7B)).trained]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Gives a table of scores, in percent."""
    head = ["", "steps", "seed", "audio/s", "audio and video/s", "mIoU [95 %]", "R@0.5", "read", "captions", "things"]
    lines = []
    for row in rows:
        line = [f"`{row['method']}`", f"{row['steps']}", f"{row['seed']}"]
        if row["status"] != "ok":
            lines.append([*line, row["message"]])
            continue
        rates = [f"{row[name]:.3g}" for name in ("tokens_per_second", "media_tokens_per_second")]
        shares = [row["recall"]["0.5"], *(row[x] for x in ("parsed", "caption_accuracy", "caption_things"))]
        shares.append(row["counting_accuracy"])
        interval = row["miou_interval"]
        miou = f"{100 * row['miou']:.1f}" + (f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else "")
        lines.append([*line, *rates, miou, *(f"{100 * share:.1f}" for share in shares)])
    return markdown([*head, "counts"], lines)


def parse() -> tuple[Parser, argparse.Namespace]:
    """Reads the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="that timeline.py wrote")
    parser.add_argument("--model", default="omni-small", help="omni-small, a checkpoint, or a saved variant")
    parser.add_argument("--base", help="of a saved variant: where its base model lies now")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="default: all that need no training")
    parser.add_argument("--keep-ratios", type=float, nargs="+", help="tokens out / in; of joint methods, of both kinds")
    parser.add_argument("--positions", choices=POSITIONS, default=POSITIONS[0])
    parser.add_argument("--steps", type=int, default=0, help="of training, before every cell; 0: as the model is")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a cell for each")
    for field in dataclasses.fields(Recipe):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=type(field.default), default=field.default, help="of training")
    parser.add_argument("--split", choices=SPLITS, default="test", help="tune on validation, never on test")
    parser.add_argument("--limit", type=int, help="clips")
    parser.add_argument("--num-frames", type=int, default=50, help="of a video")
    parser.add_argument("--room", type=int, help="tokens of a batch of questions; less needs less memory")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that decode clips; 0: none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="of the code measured, where it is not in a checkout")
    parser.add_argument("--output", type=Path, default=Path("runs/events.jsonl"))
    return parser, parser.parse_args()


def cells_of(args: argparse.Namespace, recipe: Recipe) -> list[Cell]:
    """Gives the cells; of a saved variant those of its own method.

    Raises:
        ValueError: an unknown method, one that must be trained, or an option that cannot be.
    """
    for name in ("limit", "num_frames", "room"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(args, name)}")
    if args.steps < 0 or args.workers < 0:
        raise ValueError(f"--steps and --workers must be 0 or more, got {args.steps} and {args.workers}")
    common = {name: getattr(args, name) for name in ("split", "limit", "num_frames", "positions", "steps")}
    common = setting(args.folder, args.model) | common | {"options": {}}
    if args.steps:
        common["recipe"] = dataclasses.asdict(recipe)
    if common["weights"] is not None:
        if args.methods or args.steps:
            raise ValueError(f"{args.model} is a saved variant with its own method: give no --methods and no --steps")
        own = storage.read_manifest(args.model)["compressor"]
        name = NONE if own is None else own["name"]
        pairs: list[tuple[str, float | None]] = [(name, ratio) for ratio in args.keep_ratios or [None]]
    else:
        pairs = []
        for name in dict.fromkeys([NONE, "random", "uniform-stride", *(args.methods or training_free())]):
            with torch.device("meta"):
                method = build(name, **vars(QWEN_7B))
            if method.trained and not args.steps:
                raise ValueError(f"{name} has weights to train: give --steps, or --model a saved variant")
            ratios = args.keep_ratios or (JOINT_RATIOS if method.stage == "joint" else KEEP_RATIOS)
            pairs += [(name, ratio) for ratio in ratios_of(name, ratios)]
    return [
        common | {"method": name, "keep_ratio": ratio, "seed": seed} for name, ratio in pairs for seed in args.seeds
    ]


def main() -> None:
    """Runs the cells and prints their table."""
    logging.basicConfig(format="%(message)s")
    parser, args = parse()
    try:
        device = check_device(args.device)
        recipe = Recipe(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)})
        cells = cells_of(args, recipe)
        testbed = load_testbed(
            args.folder,
            args.model,
            base=args.base,
            split=args.split,
            limit=args.limit,
            recipe=recipe,
            num_frames=args.num_frames,
            room=args.room,
            workers=args.workers,
            device=device,
        )
    except (ValueError, OSError, FetchError) as error:
        parser.error(str(error))
    print(table(run_cells(cells, testbed, environment(device, args.commit), args.output)))


if __name__ == "__main__":
    main()
