"""The clips that `align.py` trains on: the time testbed's, made in memory instead of written as mp4 and read again."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from audiopress.benchmarks.alignment.batch import Batch, Clips, Mark, audio_tokens, labels_of, pad_rows
from audiopress.data.collator import Encoder
from audiopress.data.longvale import PROMPTS, format_time
from audiopress.data.records import Record, assistant, user
from audiopress.data.rendering import pictures, schedule, soundtrack
from audiopress.data.stamps import Stamp
from audiopress.data.timeline import Clip, dialogue, plan
from audiopress.kernels.packed import upload
from audiopress.models.layout import AUDIO_TOKENS_PER_SECOND, Kind, Layout, TokenIds

FPS, SIZE = 4, 224  # of the time testbed's clips
AAC_FRAME = 1024  # samples: the sound of an mp4 is as long as a whole number of these
# Seconds of a clip: one duration for all clips of a batch. The testbed's clips last 30 to 300: all of these, so that
# none has to be guessed from others, and shorter ones more often, as ever longer ones differ ever less.
DURATIONS = range(26, 301)
# All guesses.
SPARE = 64  # tokens by which a layout is longer than it must be now
DIALOGUES = 4  # of each clip with questions: it is asked about in other words when it comes again
LISTED = 0.4  # of the clips of a batch: all events are to be listed, in LongVALE's words


@dataclass(frozen=True)
class MadeClip:
    """A clip and what is asked about it.

    Args:
        seconds: its duration.
        wave: `[samples]` int16; a tensor, as `Spoken.samples`.
        pictures: `[K, 3, H, W]` uint8.
        shown: which of them each sampled frame is, `[T]`.
        times: of each sampled frame, in seconds, `[T]`.
        ids: of each dialogue's tokens; the first one lists all events, the others ask about single ones.
        labels: of each dialogue.
        marks: as of row 0.
    """

    seconds: int
    wave: Tensor
    pictures: Tensor
    shown: np.ndarray
    times: np.ndarray
    ids: list[list[int]]
    labels: list[list[int]]
    marks: list[Mark]


class ClipMaker:
    """Makes clips; for processes beside the training.

    Args:
        encoder: of the model.
        stamps: to compose clips of.
        seed: of the clips.
    """

    def __init__(self, encoder: Encoder, stamps: Sequence[Stamp], seed: int) -> None:
        self.encoder, self.stamps, self.seed = encoder, stamps, seed
        self.names = names(stamps)

    def __call__(self, index: int, seconds: int) -> MadeClip:
        """Makes the clip of a number, of the train split."""
        return self.make(plan("train", index, self.stamps, (seconds, seconds), self.seed))

    def make(self, clip: Clip) -> MadeClip:
        """Makes what decoding the clip's mp4 would give but for what its codecs lose, and dialogues about it."""
        rng = np.random.default_rng(clip.seed)
        sound = soundtrack(clip, rng)
        sound = np.pad(sound, (0, -len(sound) % AAC_FRAME))
        chosen = np.linspace(0, clip.duration * FPS - 1, self.encoder.num_frames).round().astype(int)
        times = chosen / FPS
        sample = {
            "video_grid_thw": torch.tensor([[len(chosen) // 2, SIZE // 14, SIZE // 14]]),
            "video_second_per_grid": torch.tensor([2 * clip.duration / len(chosen)]),
        }
        media = self.encoder._media_ids(audio_tokens(len(sound)), sample)
        asked = [_listing(clip), *(_record(replace(clip, seed=clip.seed + i)) for i in range(DIALOGUES))]
        made = [self.encoder._tokenize(record, record.messages, media, False) for record in asked]
        return MadeClip(
            clip.duration,
            torch.from_numpy((sound * (2**15 - 1)).round().astype(np.int16)),
            torch.from_numpy(np.stack(pictures(clip, rng, SIZE)).transpose(0, 3, 1, 2)).contiguous(),
            schedule(clip, FPS)[chosen],
            times,
            [ids for ids, _ in made],
            [labels for _, labels in made],
            list(_marks(clip, times, self.names)),
        )


def names(stamps: Sequence[Stamp]) -> list[str]:
    """Gives the names of the things that clips of the train split may hold."""
    return sorted(stamp.name for stamp in stamps if not stamp.unseen)


def _record(clip: Clip) -> Record:
    """Gives the dialogue about a clip as `load_dialogues` reads it."""
    entry = dialogue(clip)
    times = {token: format_time(seconds, clip.duration) for token, seconds in entry["meta"]["token"].items()}
    return _dialogue(
        clip, (re.sub(r"<[se]\d+>", lambda match: times[match[0]], turn["value"]) for turn in entry["conversations"])
    )


def _listing(clip: Clip) -> Record:
    """Gives LongVALE's dense captioning: every event, in order, with its time."""
    events = (
        f"From {format_time(e.start, clip.duration)} to {format_time(e.end, clip.duration)}, {e.sentence}"
        for e in clip.events
    )
    return _dialogue(clip, (PROMPTS["captioning"], "\n".join(events)))


def _dialogue(clip: Clip, turns: Iterable[str]) -> Record:
    messages = tuple((user, assistant)[i % 2](turn.removeprefix("<video>\n")) for i, turn in enumerate(turns))
    file = Path(f"{clip.id}.mp4")
    return Record(clip.id, messages, audio=file, video=file, duration=clip.duration)


def _marks(clip: Clip, times: np.ndarray, known: Sequence[str]) -> Iterator[Mark]:
    for event in clip.events:
        for thing, heard in ((event.heard, True), (event.seen, False)):
            if thing is None:
                continue
            name = re.sub(r"^.*?( of an? | saying )", "", thing.phrase)
            if heard:
                start, end = (round(t * AUDIO_TOKENS_PER_SECOND) for t in (event.start, event.end))
            else:  # pairs of frames of which both show it
                inside = (times >= event.start) & (times < event.end)
                pairs = np.flatnonzero(inside[::2] & inside[1::2])
                start, end = (int(pairs[0]), int(pairs[-1]) + 1) if len(pairs) else (0, 0)
            if end > start:
                yield Mark(0, heard, start, end, known.index(name))


class ClipBank:
    """Clips to train on, more and more of them, by duration.

    Args:
        token_ids: of the model.
        pad: id after a shorter dialogue.
        device: where sounds and pictures lie.
    """

    def __init__(self, token_ids: TokenIds, pad: int, device: torch.device) -> None:
        self.token_ids, self.pad, self.device = token_ids, pad, device
        self.clips: dict[int, list[MadeClip]] = {}
        self.count = 0
        self.layouts: dict[int, Layout] = {}  # by duration

    def add(self, clip: MadeClip) -> None:
        """Takes a clip."""
        media = {"wave": clip.wave.to(self.device), "pictures": clip.pictures.to(self.device)}
        self.clips.setdefault(clip.seconds, []).append(replace(clip, **media))
        self.count += 1

    def batch(self, rng: random.Random, tokens: int, longest: float = float("inf")) -> Batch:
        """Gives a batch of about so many tokens, or one row.

        Args:
            rng: draws.
            tokens: of all rows together.
            longest: seconds of a clip, if there are any as short.
        """
        durations = sorted(self.clips)
        seconds = rng.choice([d for d in durations if d <= longest] or durations[:1])
        there = self.clips[seconds]
        rows = min(len(there), max(1, tokens // max(map(len, there[0].ids))))
        chosen = rng.sample(there, rows)
        asked = [0 if rng.random() < LISTED else rng.randrange(1, len(clip.ids)) for clip in chosen]
        ids = [clip.ids[i] for clip, i in zip(chosen, asked, strict=True)]
        labels = [clip.labels[i] for clip, i in zip(chosen, asked, strict=True)]
        length = max(map(len, ids))
        layout = self._layout(chosen[0], length)
        return Batch(
            upload(pad_rows(ids, self.pad), self.device),
            labels_of(labels),
            upload(layout.positions[:, 0, :length], self.device),
            upload(audio := (layout.kind[0] == Kind.AUDIO.value).nonzero()[:, 0], self.device),
            torch.stack([clip.wave for clip in chosen]).float() / 2**15,
            clips=self._about(chosen, layout, length, audio),
        )

    def _about(self, chosen: Sequence[MadeClip], layout: Layout, length: int, audio: Tensor) -> Clips:
        """Gives what clips have beside words and sounds, which stand at `audio` in the `length` tokens of a row."""
        video = (layout.kind[0] == Kind.VIDEO.value).nonzero()[:, 0]
        stamp = layout.kind[0] == Kind.TIMESTAMP.value
        clips = Clips(
            video=upload(video, self.device),
            frames=torch.stack([clip.pictures[upload(clip.shown, self.device)] for clip in chosen]),
            marks=[replace(mark, row=row) for row, clip in enumerate(chosen) for mark in clip.marks],
            percent=100 * layout.second[0, :length] / chosen[0].seconds,
            began=torch.full((len(chosen), length), torch.nan),
            stamps=(ends := (stamp[:-1] & ~stamp[1:]).nonzero()[:, 0]),
            now=torch.zeros(len(chosen), len(ends), 2, dtype=torch.long),
        )
        # Of sound and of pictures: places, the last before each timestamp, and how many of them a mark counts as one.
        heard, seen = (
            (places, torch.searchsorted(places, ends) - 1, each)
            for places, each in ((audio, 1), (video, clips.per_group))
        )
        for mark in clips.marks:
            places, last, each = heard if mark.heard else seen
            start, end = mark.start * each, mark.end * each
            clips.began[mark.row, places[start:end]] = clips.percent[places[start]]
            clips.now[mark.row, (start <= last) & (last < end), 0 if mark.heard else 1] = 1 + mark.name
        return clips

    def _layout(self, clip: MadeClip, length: int) -> Layout:
        """Gives the layout of a dialogue of so many tokens or more; that of shorter ones is its beginning.

        All clips of one duration have the same media, and text goes on after them in one way.
        """
        layout = self.layouts.get(clip.seconds)
        if layout is None or layout.kind.shape[1] < length:
            ids = clip.ids[0]
            row = torch.tensor([[*ids, *[self.pad] * (length + SPARE - len(ids))]])
            layout = self.layouts[clip.seconds] = Layout.build(
                row,
                torch.ones_like(row),
                self.token_ids,
                audio_lengths=[audio_tokens(len(clip.wave))],
                video_grid_thw=torch.tensor([[len(clip.shown) // 2, SIZE // 14, SIZE // 14]]),
                video_seconds=torch.from_numpy(clip.times[::2]).float(),
            )
        return layout
