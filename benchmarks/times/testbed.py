"""The time testbed: a model with each method in its slot, trained where asked, answers questions about clips."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import audiopress
from audiopress.benchmarks.cells import Cell
from audiopress.benchmarks.scoring import to_device
from audiopress.benchmarks.times.clips import TIMESTAMPS, Clip, Encoded, KeptClips, Sample, load_clips
from audiopress.benchmarks.times.scores import scores
from audiopress.compression import Compressor
from audiopress.compression.base import TOKENS_PER_SECOND, check_choice, check_count, check_number
from audiopress.data.collator import OmniCollator
from audiopress.data.longvale import load_dialogues
from audiopress.data.records import Record
from audiopress.data.timeline import SPLITS, Split
from audiopress.models import CompressedOmni, storage
from audiopress.models.asking import answer
from audiopress.models.layout import Kind
from audiopress.models.loading import build_for, weights_of
from audiopress.models.omni import tokens_left
from audiopress.models.training import fit

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
            if name in ("batch", "lora_r"):
                check_count(name, value)
            else:
                check_number(name, value, "(0, inf)")


class TimeTestbed:
    """Measures cells on one model and one set of clips.

    Args:
        model: in eval mode; a saved variant is measured with its own compressor.
        processor: the model's.
        clips: at least one.
        dialogues: to train on.
        recipe: of training.
        num_frames: of a video.
        timestamps: in a video; see `Encoder`.
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
        timestamps: int = TIMESTAMPS,
        room: int | None = None,
        workers: int = 0,
    ) -> None:
        torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan the shape of every batch anew
        self.model = model
        self.processor = processor
        self.clips = clips
        self.questions = [question for clip in clips for question in clip.questions]
        self.recipe = recipe or Recipe()
        self.room = room or ROOM[model.device.type]

        def kept(name: str, groups: Sequence[Sequence[Record]], prompt_only: bool) -> KeptClips:
            encoded = Encoded(processor, groups, num_frames, timestamps, prompt_only)
            return KeptClips(model.thinker, encoded, workers, name)

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
        names = ("trained", "query_aware", "stage", "adaptive")
        row: dict[str, Any] = {name: getattr(model.compressor, name) for name in names}
        row["config"] = dataclasses.asdict(model.compressor.config)
        try:
            if cell["steps"]:
                row |= self._train(model, cell)
            elif model.compressor.trained and self.model.compressor is None:
                raise ValueError(f"{model.compressor.name} has weights to train: give steps, or a saved variant")
            return row | self._measure(model.eval())
        finally:
            model.remove_adapter()

    def _compressor(self, cell: Cell) -> Compressor:
        options = cell["options"] | ({} if cell["keep_ratio"] is None else {"keep_ratio": cell["keep_ratio"]})
        own = self.model.compressor
        if own is not None:
            if cell["method"] != own.name:
                raise ValueError(f"the model is a variant with {own.name}, got a cell of {cell['method']}")
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
        return {"train_loss": sum(last) / len(last), "training_seconds": time.perf_counter() - started}

    def answers(self, model: CompressedOmni, longest: int | None = None) -> dict[str, str]:
        """Asks all questions, greedily.

        Args:
            model: in eval mode; on the testbed's towers.
            longest: tokens of an answer. Default: `NEW_TOKENS` of its task.

        Returns:
            The answers by the ids of the questions' records.
        """
        answers: dict[str, str] = {}
        samples = self.asked.samples(model.compressor)
        sizes = [self._size_of_all(model, clip) for clip in samples]
        for batch in self._batches(sizes):
            groups = [self._collate(samples[i]) for i in batch]
            for i, ids in zip(batch, answer(model, groups, longest or max(NEW_TOKENS.values())), strict=True):
                for question, new in zip(self.clips[i].questions, ids, strict=True):
                    new = new[: longest or NEW_TOKENS[question.kind.task]]
                    answers[question.record.id] = self.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
        return answers

    @torch.no_grad()
    def _measure(self, model: CompressedOmni) -> dict[str, Any]:
        started = time.perf_counter()
        counted = self._count(model, [samples[0] for samples in self.asked.samples(model.compressor)])
        answers = self.answers(model)
        examples = {q.kind.task: [q.truth or str(q.span), answers[q.record.id]] for q in reversed(self.questions)}
        found = {"answering_seconds": time.perf_counter() - started, "examples": examples}
        return scores(self.questions, answers) | counted | found

    def _count(self, model: CompressedOmni, samples: Sequence[Sample]) -> dict[str, Any]:
        """Counts the tokens of each clip once, before and after, and those of the sound while something is heard."""
        tokens = {"audio": [0, 0], "video": [0, 0]}
        while_heard = [0, 0]
        for batch in self._batches([self._size(model, sample) for sample in samples]):
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

    @staticmethod
    def _size(model: CompressedOmni, sample: Sample) -> int:
        """Gives the room that a sample takes, in tokens of the LLM."""
        ids = model.token_ids
        audio, video = (int((sample["input_ids"] == token).sum()) for token in (ids.audio, ids.video))
        whole = len(sample["input_ids"])
        return whole - audio - video + tokens_left(model.compressor, None, audio, video) + whole // WAITING

    def _size_of_all(self, model: CompressedOmni, clip: Sequence[Sample]) -> int:
        """Gives the room that all questions about a clip take: what they begin with is kept once, if it is the same."""
        most = max(self._size(model, sample) for sample in clip)
        if model.compressor is not None and model.compressor.query_aware:
            return len(clip) * most
        media = torch.tensor([model.token_ids.audio, model.token_ids.video])
        ids = [sample["input_ids"] for sample in clip]
        return most + len(clip) * max(len(x) - int(torch.isin(x, media).nonzero()[-1]) for x in ids)

    def _batches(self, sizes: Sequence[int]) -> Iterator[list[int]]:
        """Gives batches as indices, what is of nearly one size together, that take no more than the room."""
        batch: list[int] = []
        for i in sorted(range(len(sizes)), key=sizes.__getitem__):
            if batch and (len(batch) + 1) * sizes[i] > self.room:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _collate(self, samples: Sequence[Sample]) -> Sample:
        return to_device(OmniCollator(self.processor.tokenizer.pad_token_id, "left")(samples), self.model.device)


@dataclass(frozen=True)
class TimeSettings:
    """Which model answers questions about which clips.

    Args:
        data: the folder that `timeline.py` wrote.
        model: omni-small, a checkpoint of Qwen2.5-Omni, or a saved variant.
        base: of a saved variant: where its base model lies now.
        split: of the clips; tune on validation, never on test.
        limit: at most so many clips, the first ones.
        num_frames: of a video.
        timestamps: in a video, which a model must have been trained with; see `Encoder`.
        room: tokens of a batch of questions; less needs less memory. Default: what `ROOM` says of the device.
        recipe: of training.
    """

    data: str
    model: str = "omni-small"
    base: str | None = None
    split: Split = "test"
    limit: int | None = None
    num_frames: int = 50
    timestamps: int = TIMESTAMPS
    room: int | None = None
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        check_choice("split", self.split, SPLITS)
        for name in ("limit", "num_frames", "room"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_count("timestamps", self.timestamps, least=0)

    def common(self) -> dict[str, Any]:
        """Gives what all cells have in common: the model, with what is saved of it, and the clips.

        Raises:
            ValueError: the folder has no clips, or none of the split, or the model is a damaged variant.
        """
        options, annotations = Path(self.data, "options.json"), Path(self.data, f"{self.split}-annotations.json")
        for path in (options, annotations):
            if not path.is_file():
                raise ValueError(f"{path} is missing; python benchmarks/timeline.py {self.data} makes clips")
        clips = len(json.loads(annotations.read_text()))
        names = ("split", "limit", "num_frames", "timestamps")
        return {
            "testbed": "time",
            "model": self.model,
            "weights": weights_of(self.model),
            "data": json.loads(options.read_text()),
            "clips": min(clips, self.limit or clips),
            **{name: getattr(self, name) for name in names},
        }

    def training(self) -> dict[str, Any]:
        """Gives what all cells with training have in common; raises ValueError where there is nothing to train on."""
        if not self.train.is_file():
            raise ValueError(f"{self.train} is missing: there is nothing to train on")
        return {"recipe": dataclasses.asdict(self.recipe), "train_clips": len(json.loads(self.train.read_text()))}

    @property
    def train(self) -> Path:
        """The dialogues to train on."""
        return Path(self.data, "train.json")

    @property
    def saved(self) -> bool:
        """Whether the model is a saved variant."""
        return storage.is_saved(self.model)

    def open(self, workers: int, device: torch.device) -> TimeTestbed:
        """Opens the model and the clips.

        Raises:
            ValueError: the folder or the model is not what it must be.
            FetchError: omni-small is not in the cache and cannot be fetched.
        """
        folder = Path(self.data)
        clips = load_clips(folder, self.split, self.limit)
        dialogues = load_dialogues(self.train, video_dir=folder / "videos") if self.train.is_file() else []
        model, processor = audiopress.load(self.model, base=self.base, device=device)
        sizes = {"num_frames": self.num_frames, "timestamps": self.timestamps, "room": self.room}
        return TimeTestbed(model, processor, clips, dialogues, self.recipe, workers=workers, **sizes)
