"""The clips of the time testbed: their questions, and what the towers make of them, once for all methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from audiopress.benchmarks.longvale import VideoEncoder
from audiopress.benchmarks.times.scores import Question
from audiopress.compression import Compressor
from audiopress.data.longvale import load_dialogues, load_queries
from audiopress.data.records import Record
from audiopress.data.timeline import question_kinds
from audiopress.models import parts
from audiopress.models.encoders import encode_video, first_step, hidden_audio

TIMESTAMPS = 50  # of a clip: every 2 %, half of the shortest event; what omni-small is aligned with
TEXT = ("id", "input_ids", "labels")  # of a sample; all else is media

Sample = dict[str, Any]


@dataclass(frozen=True)
class Clip:
    """A clip of the testbed.

    Args:
        id: of its files.
        questions: about it, each to be asked by itself.
        heard: when something is heard, `(start, end)` in seconds.
    """

    id: str
    questions: tuple[Question, ...]
    heard: tuple[tuple[float, float], ...]


def load_clips(folder: Path, split: str, limit: int | None = None) -> list[Clip]:
    """Reads the clips of a split: when every event is, what it is, and the questions that count.

    Args:
        folder: that `timeline.py` wrote.
        split: of its splits.
        limit: at most so many clips, the first ones.

    Raises:
        ValueError: the folder lacks the split or a clip.
    """
    annotations, dialogues, videos = folder / f"{split}-annotations.json", folder / f"{split}.json", folder / "videos"
    for path in (annotations, dialogues):
        if not path.is_file():
            raise ValueError(f"{path} is missing; python benchmarks/timeline.py {folder} makes clips")
    kinds = question_kinds(annotations) | question_kinds(dialogues)
    questions: dict[str, list[Question]] = {}
    heard: dict[str, list[tuple[float, float]]] = {}
    for query in load_queries(annotations, ("grounding", "seg_captioning"), video_dir=videos):
        kind, (span,), (sentence,) = kinds[query.record.id], query.spans, query.sentences
        truth = {"truth": sentence} if kind.task == "seg_captioning" else {"span": span}
        questions.setdefault(query.video_id, []).append(Question(query.record, query.video_id, kind, **truth))
        if kind.task == "grounding" and kind.needs != "video":
            heard.setdefault(query.video_id, []).append(span)
    for record in load_dialogues(dialogues, video_dir=videos, turns="single"):
        kind, clip = kinds[record.id], record.id.partition("#")[0]
        if kind.task == "counting":
            questions[clip].append(Question(record.query(), clip, kind, truth=record.reference))
    return [Clip(name, tuple(own), tuple(heard.get(name, ()))) for name, own in list(questions.items())[:limit]]


class Encoded(Dataset[tuple[Sample, list[Sample]]]):
    """Records, grouped by their clip: the media of each group as tensors, and the texts as arrays.

    Args:
        processor: the model's.
        groups: all records of a group are about one clip.
        num_frames: of a video.
        timestamps: see `Encoder`.
        prompt_only: the records are to be answered, not learnt from.
    """

    def __init__(
        self, processor: Any, groups: Sequence[Sequence[Record]], num_frames: int, timestamps: int, prompt_only: bool
    ) -> None:
        extractor = processor.feature_extractor
        longest = extractor.n_samples / extractor.sampling_rate  # a clip's last packet of sound may go beyond it
        sizes = {"num_frames": num_frames, "timestamps": timestamps, "max_seconds": longest}
        self.encoder = VideoEncoder(processor, **sizes)
        self.groups = groups
        self.prompt_only = prompt_only

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> tuple[Sample, list[Sample]]:
        samples = [self.encoder(record, self.prompt_only) for record in self.groups[index]]
        media = {name: value for name, value in samples[0].items() if name not in TEXT}
        # As arrays, because every tensor that a worker process sends takes one of the system's few file handles.
        return media, [{k: v.numpy() for k, v in s.items() if k in TEXT and k != "id"} for s in samples]


def as_it_is(item: Any) -> Any:
    """Keeps a data loader from changing an item."""
    return item


class KeptClips:
    """Clips that are decoded, seen and heard once, however many methods read them.

    The vision tower runs when a clip is read. The layers of the audio tower before the one that a compressor reads or
    acts in run once for all compressors that begin there.

    Args:
        thinker: whose towers are frozen.
        encoded: the clips.
        workers: processes that decode them; 0: this one.
        name: shown by the progress bar.
    """

    def __init__(self, thinker: nn.Module, encoded: Encoded, workers: int, name: str) -> None:
        self.thinker = thinker
        self.tower = parts.audio_tower(thinker)
        self.device = self.tower.conv1.weight.device
        self.clips: list[list[Sample]] = []
        self.features: list[Tensor] = []
        self.hidden: dict[int, list[Tensor]] = {}  # by the first layer that is left to run
        loader = DataLoader(encoded, batch_size=None, num_workers=workers, collate_fn=as_it_is)
        for media, texts in tqdm(loader, desc=name, leave=False):
            pixels = media["pixel_values_videos"]
            with torch.no_grad():
                media["video_embeds"] = encode_video(thinker, pixels.to(self.device), media["video_grid_thw"])
            self.features.append(media["input_features"].clone())  # the worker's memory goes back
            # What the towers gave before is read in place of features and pixels: no row of them is left.
            media = media | {name: media[name][:0].clone() for name in ("pixel_values_videos", "input_features")}
            self.clips.append([media | {k: torch.from_numpy(v) for k, v in text.items()} for text in texts])

    def samples(self, compressor: Compressor | None) -> list[list[Sample]]:
        """Gives the samples of every clip, with the states of the audio tower that the compressor starts from."""
        in_tower, after = (None, None) if compressor is None else compressor.split()
        needs = frozenset() if after is None else after.needs
        start = first_step(self.tower, needs, in_tower)  # type: ignore[arg-type]
        if start not in self.hidden:
            self.hidden[start] = [self._hear(features, needs, in_tower) for features in self.features]
        pairs = zip(self.clips, self.hidden[start], strict=True)
        return [[sample | {"audio_hidden": states} for sample in clip] for clip, states in pairs]

    def _hear(self, features: Tensor, needs: frozenset[str], method: Any) -> Tensor:
        mask = torch.ones(1, features.shape[1], dtype=torch.long)
        return hidden_audio(self.thinker, features[None].to(self.device), mask, needs, method)[0]
