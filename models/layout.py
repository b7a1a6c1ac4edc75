"""What every token of a batch is: its kind, clip, slot, real second and position.

Everything downstream is gathered from here. The layout reads the structure of the ids (a video whose span holds audio
placeholders has its sound interleaved), so samples with and without sound can share a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..kernels import upload

AUDIO_TOKENS_PER_SECOND = 25  # 100 mel frames, halved by the convolution, halved by the pooling


class Kind(IntEnum):
    """What a token is."""

    PAD = 0
    TEXT = 1
    AUDIO = 2
    VIDEO = 3
    IMAGE = 4
    TIMESTAMP = 5  # text inside a clip


@dataclass(frozen=True)
class TokenIds:
    """The ids and rates of a thinker's config that the layout reads."""

    audio: int
    video: int
    image: int
    audio_start: int
    audio_end: int
    vision_start: int
    vision_end: int
    merge: int
    positions_per_second: int

    @classmethod
    def from_config(cls, config: Any) -> TokenIds:
        """Reads them from a `Qwen2_5OmniThinkerConfig`; raises ValueError when an id is missing."""
        names = {
            "audio": "audio_token_id",
            "video": "video_token_id",
            "image": "image_token_id",
            "audio_start": "audio_start_token_id",
            "audio_end": "audio_end_token_id",
            "vision_start": "vision_start_token_id",
            "vision_end": "vision_end_token_id",
            "positions_per_second": "position_id_per_seconds",
        }
        values = {field: getattr(config, name, None) for field, name in names.items()}
        missing = [names[field] for field, value in values.items() if value is None]
        if missing:
            raise ValueError(f"the thinker's config must define {', '.join(missing)}")
        return cls(merge=config.vision_config.spatial_merge_size, **values)  # type: ignore[arg-type]


def audio_lengths(mel_frames: Tensor) -> list[int]:
    """Gives the tokens per clip of `[C]` mel frames (100 per second): 25,689 frames give 6,422 tokens."""
    return (((mel_frames - 1) // 2 + 1 - 2) // 2 + 1).clamp(min=0).tolist()


@dataclass(frozen=True)
class Layout:
    """The tokens of a batch.

    Args:
        kind: `[B, L]` int64, a `Kind`.
        clip: `[B, L]` int64, which audio clip, video or image of the batch the token belongs to; -1 for text.
        slot: `[B, L]` int64, its index inside that clip; -1 for text.
        second: `[B, L]` float32, when it happens in its clip; NaN for text, timestamps and images.
        positions: `[3, B, L]` int64, TMRoPE's time, height and width; 1 at padding, as in transformers.
        on_host: the same on the CPU, if it is known there: reading it waits for nothing.
    """

    kind: Tensor
    clip: Tensor
    slot: Tensor
    second: Tensor
    positions: Tensor
    on_host: Layout | None = field(default=None, repr=False)

    @classmethod
    def build(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor,
        ids: TokenIds,
        *,
        audio_lengths: Sequence[int] = (),
        video_grid_thw: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_second_per_grid: Tensor | Sequence[float] | None = None,
        video_seconds: Tensor | None = None,
    ) -> Layout:
        """Reads the layout off a batch as `Qwen2_5OmniProcessor` or our collator makes it.

        Positions follow transformers' `get_rope_index`: text counts up by one; a clip starts after everything before
        it; audio advances by one per token (25 per second), a video's time is its real second times 25 rounded down;
        sound inside a video shares the video's origin. Text inside a clip, which transformers does not know, is a
        timestamp: it counts up from the time of the next token of the clip.

        Args:
            input_ids: `[B, L]`.
            attention_mask: `[B, L]`, 0 at padding, on either side.
            ids: of the model.
            audio_lengths: tokens of each audio clip, in batch order.
            video_grid_thw: `[V, 3]` patches before merging, in batch order.
            image_grid_thw: `[I, 3]`, likewise.
            video_second_per_grid: `[V]` seconds per temporal patch. Default 1.0 (2 frames at transformers' 2 fps).
            video_seconds: `[sum of T]` the real second of every temporal patch, packed; wins over
                `video_second_per_grid`. For frames that are not evenly spaced.

        Raises:
            ValueError: placeholders and features differ in number (both are named), or a clip is cut by the end of
                its sample.
        """
        device = input_ids.device
        input_ids, attention_mask = input_ids.cpu(), attention_mask.cpu().bool()
        kind = torch.full(input_ids.shape, Kind.TEXT.value)
        for placeholder, value in ((ids.audio, Kind.AUDIO), (ids.video, Kind.VIDEO), (ids.image, Kind.IMAGE)):
            kind[input_ids == placeholder] = value.value
        kind[~attention_mask] = Kind.PAD.value

        video_grids = _grids(video_grid_thw)
        image_grids = _grids(image_grid_thw)
        frames = _frame_seconds(video_grids, video_second_per_grid, video_seconds)
        clips = {
            Kind.AUDIO: [_audio_coordinates(int(n), ids) for n in audio_lengths],
            Kind.VIDEO: [_vision_coordinates(g, ids, s) for g, s in zip(video_grids, frames, strict=True)],
            Kind.IMAGE: [_vision_coordinates(g, ids, None) for g in image_grids],
        }
        clip = torch.full(kind.shape, -1)
        slot = torch.full(kind.shape, -1)
        second = torch.full(kind.shape, torch.nan)
        offset = torch.zeros(3, *kind.shape, dtype=torch.long)  # within the clip
        for value, coordinates in clips.items():
            where = kind == value.value
            lengths = [len(c[0]) for c in coordinates]
            _check_counts(value, where, lengths)
            if lengths:
                clip[where] = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
                slot[where] = torch.cat([torch.arange(n) for n in lengths])
                second[where] = torch.cat([c[0] for c in coordinates])
                offset[:, where] = torch.cat([c[1] for c in coordinates], dim=1)
        kind[_inside_clips(kind, clip)] = Kind.TIMESTAMP.value

        positions = torch.ones(3, *kind.shape, dtype=torch.long)
        for row in range(len(kind)):
            real = attention_mask[row]
            positions[:, row, real] = _positions(
                input_ids[row, real], kind[row, real], clip[row, real], offset[:, row, real], ids
            )
        layout = cls(kind, clip, slot, second, positions)
        return layout.to(device)

    def to(self, device: torch.device) -> Layout:
        """Gives the same on a device; on a GPU it still knows itself on the CPU, if it comes from there."""
        columns = (self.kind, self.clip, self.slot, self.second, self.positions)
        kind, clip, slot, second, positions = (x.to(device) for x in columns)
        of_host = self.on_host or (self if self.kind.device.type == "cpu" != device.type else None)
        return Layout(kind, clip, slot, second, positions, of_host)

    @property
    def host(self) -> Layout:
        """The same on the CPU."""
        if self.kind.device.type == "cpu":
            return self
        return self.on_host or self.to(torch.device("cpu"))

    @property
    def mask(self) -> Tensor:
        """Which tokens are real, `[B, L]` bool."""
        return self.kind != Kind.PAD.value

    @property
    def is_media(self) -> Tensor:
        """Which tokens are audio or video, `[B, L]` bool."""
        return (self.kind == Kind.AUDIO.value) | (self.kind == Kind.VIDEO.value)

    def index(self, kind: Kind) -> Tensor:
        """Gives the flat indices (into `[B * L]`) of all tokens of one kind in batch order, int64."""
        return upload((self.host.kind == kind.value).flatten().nonzero().squeeze(1), self.kind.device)

    def joint_index(self) -> tuple[Tensor, tuple[int, ...]]:
        """Gives the flat indices of all audio and video tokens in batch order, `[N]`, and how many each sample has."""
        media = self.host.is_media
        index = media.flatten().nonzero().squeeze(1)
        return upload(index, self.kind.device), tuple(media.sum(dim=1).tolist())

    def clip_lengths(self, kind: Kind) -> tuple[list[int], list[int]]:
        """Gives how many tokens each clip of one kind has in the batch, and which sample it is in."""
        host = self.host
        samples, at = (host.kind == kind.value).nonzero(as_tuple=True)
        lengths = torch.bincount(host.clip[samples, at])
        return lengths.tolist(), samples[lengths.cumsum(0) - lengths].tolist()

    def ends_in_text(self) -> bool:
        """Tells whether the last token of every sample follows all others in all three positions, as text does."""
        host = self.host
        last = host.mask.long().cumsum(dim=1).argmax(dim=1)  # of each row, the last real token
        greatest = host.positions.masked_fill(~host.mask, -1).amax(dim=(0, 2))
        return bool((host.positions[:, torch.arange(len(last)), last] == greatest).all())

    def gather(self, index: Tensor, mask: Tensor) -> Layout:
        """Gives the layout of the tokens `index` (`[B, L']`, along each row); where `mask` is false it is padding."""

        def take(x: Tensor, fill: float) -> Tensor:
            return x.gather(-1, index.expand(*x.shape[:-1], -1)).masked_fill(~mask, fill)

        return Layout(
            take(self.kind, Kind.PAD.value),
            take(self.clip, -1),
            take(self.slot, -1),
            take(self.second, torch.nan),
            take(self.positions, 1),
        )

    def describe(self, sample: int = 0, after: Layout | None = None) -> str:
        """Gives one sample as a tree of runs: `VIDEO x 91` with its seconds and the count after compression.

        Args:
            sample: which row.
            after: the layout after compression, to show how many tokens of each run survive.
        """
        kept = None if after is None else _tokens(after, sample)
        lines = []
        tokens = [t for t in _tokens(self, sample) if t[0] != Kind.PAD.value]
        # Spatial slots of one video group share their second: a run is one kind of one clip without a gap.
        for (value, number), run in groupby(enumerate(tokens), key=lambda item: item[1][:2]):
            members = [token for _, token in run]
            seconds = [t[3] for t in members]
            name = Kind(value).name
            line = f"{name} x {len(members)}"
            if value in (Kind.AUDIO.value, Kind.VIDEO.value):
                end = seconds[-1] + 1 / AUDIO_TOKENS_PER_SECOND if value == Kind.AUDIO.value else seconds[-1]
                line = f"{line:<16} clip {number}, {seconds[0]:.2f}-{end:.2f} s"
            if kept is not None and value not in (Kind.TEXT.value, Kind.TIMESTAMP.value):
                slots = {t[2] for t in members}
                left = sum(t[0] == value and t[1] == number and t[2] in slots for t in kept)
                line = f"{line} -> {left}"
            lines.append(f"  {line}")
        header = f"sample {sample}: {len(tokens)} tokens"
        if after is not None:
            header += f" -> {int(after.mask[sample].sum())}"
        return "\n".join([header, *lines])


def _tokens(layout: Layout, sample: int) -> list[tuple[int, int, int, float]]:
    """Gives (kind, clip, slot, second) of every token of one sample."""
    columns = (layout.kind, layout.clip, layout.slot, layout.second)
    return list(zip(*(c[sample].tolist() for c in columns), strict=True))


def _grids(grid_thw: Tensor | None) -> list[tuple[int, int, int]]:
    return [] if grid_thw is None else [tuple(g) for g in grid_thw.tolist()]


def _frame_seconds(
    grids: list[tuple[int, int, int]],
    second_per_grid: Tensor | Sequence[float] | None,
    seconds: Tensor | None,
) -> list[Tensor]:
    """Gives the second of every temporal patch of every video."""
    counts = [t for t, _, _ in grids]
    if seconds is not None:
        if seconds.numel() != sum(counts):
            raise ValueError(
                f"video_seconds must hold one second per temporal patch: {sum(counts)}, got {len(seconds)}"
            )
        return list(seconds.cpu().float().split(counts))
    step = torch.ones(len(grids)) if second_per_grid is None else torch.as_tensor(second_per_grid).cpu().float()
    if len(step) != len(grids):
        raise ValueError(f"video_second_per_grid must hold one number per video: {len(grids)}, got {len(step)}")
    return [torch.arange(t) * s for t, s in zip(counts, step, strict=True)]


def _audio_coordinates(length: int, ids: TokenIds) -> tuple[Tensor, Tensor]:
    """Gives seconds `[T]` and positions `[3, T]` of an audio clip, from its start."""
    second = torch.arange(length) / AUDIO_TOKENS_PER_SECOND
    time = torch.arange(length) * ids.positions_per_second // AUDIO_TOKENS_PER_SECOND
    return second, time.expand(3, -1)


def _vision_coordinates(grid: tuple[int, int, int], ids: TokenIds, seconds: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gives seconds `[T]` and positions `[3, T]` of a video or image (which has no second), from its start."""
    frames, height, width = grid[0], grid[1] // ids.merge, grid[2] // ids.merge
    at = torch.zeros(frames) if seconds is None else seconds
    time = (at * ids.positions_per_second).long()
    if seconds is None:  # an image has no time; transformers counts 25 per temporal patch, of which it has one
        at = torch.full((frames,), torch.nan)
        time = torch.arange(frames) * ids.positions_per_second
    grid_index = torch.cartesian_prod(torch.arange(frames), torch.arange(height), torch.arange(width)).T
    return at[grid_index[0]], torch.stack([time[grid_index[0]], grid_index[1], grid_index[2]])


def _check_counts(kind: Kind, where: Tensor, lengths: list[int]) -> None:
    if int(where.sum()) != sum(lengths):
        raise ValueError(
            f"the batch has {int(where.sum())} {kind.name} placeholders but {sum(lengths)} {kind.name} features "
            f"in {len(lengths)} clips"
        )
    ends = set(torch.tensor([0, *lengths]).cumsum(0).tolist())
    for row, end in enumerate(where.sum(dim=1).cumsum(0).tolist()):
        if end not in ends:
            raise ValueError(f"sample {row} ends inside one of its {kind.name} clips: their lengths are {lengths}")


def _inside_clips(kind: Tensor, clip: Tensor) -> Tensor:
    """Tells which tokens are text between two tokens of one clip, `[B, L]` bool."""
    inside = torch.zeros_like(kind, dtype=torch.bool)
    for value in (Kind.AUDIO.value, Kind.VIDEO.value):
        own = kind == value
        before = clip.masked_fill(~own, -1).cummax(dim=1).values  # clips are numbered in the order of the batch
        after = clip.masked_fill(~own, torch.iinfo(clip.dtype).max).flip(1).cummin(dim=1).values.flip(1)
        inside |= before == after
    return inside & (kind == Kind.TEXT.value)


def _positions(input_ids: Tensor, kind: Tensor, clip: Tensor, offset: Tensor, ids: TokenIds) -> Tensor:
    """Gives TMRoPE positions `[3, L]` of one unpadded sample.

    A block is one clip, or a video together with the sound inside its span. In such a span transformers gives the two
    start tokens one position, and the two end tokens another.
    """
    total = len(input_ids)
    offset = _with_timestamps(offset, kind)
    spans = _vision_spans(input_ids, kind, ids)
    positions = torch.empty(3, total, dtype=torch.long)
    at, following = 0, 0
    while at < total:
        span = spans.get(at)
        if span is not None:  # <vision_bos><audio_bos> ... <audio_eos><vision_eos>
            end = span
            positions[:, at : at + 2] = following
            inside = slice(at + 2, end - 1)
            positions[:, inside] = following + 1 + offset[:, inside]
            following = int(positions[:, inside].max()) + 1
            positions[:, end - 1 : end + 1] = following
            following += 1
            at = end + 1
            continue
        end = at + 1
        same = (kind[at:] == kind[at]) & (clip[at:] == clip[at]) | (kind[at:] == Kind.TIMESTAMP.value)
        different = (~same).nonzero()
        end = at + int(different[0]) if len(different) else total
        if kind[at] == Kind.TEXT.value:
            end = min([start for start in spans if at < start < end], default=end)
            positions[:, at:end] = following + torch.arange(end - at)
        else:
            positions[:, at:end] = following + offset[:, at:end]
        following = int(positions[:, at:end].max()) + 1
        at = end
    return positions


def _with_timestamps(offset: Tensor, kind: Tensor) -> Tensor:
    """Gives `[3, L]` where a timestamp's tokens count up from the time of the next token of its clip."""
    stamp = kind == Kind.TIMESTAMP.value
    at = torch.arange(len(kind))
    following = at.masked_fill(stamp, len(kind)).flip(0).cummin(dim=0).values.flip(0)  # the next that is none
    first = at.masked_fill(stamp, -1).cummax(dim=0).values + 1
    times = offset[0, following.clamp(max=len(kind) - 1)] + at - first
    return torch.where(stamp, times, offset)


def _vision_spans(input_ids: Tensor, kind: Tensor, ids: TokenIds) -> dict[int, int]:
    """Gives start -> end of every `<vision_bos><audio_bos> ... <audio_eos><vision_eos>`, both ends inclusive."""
    starts = (input_ids == ids.vision_start).nonzero().flatten().tolist()
    ends = (input_ids == ids.vision_end).nonzero().flatten().tolist()
    spans = {}
    for start in starts:
        end = next((e for e in ends if e > start), None)
        if end is None or end - start < 4 or input_ids[start + 1] != ids.audio_start:
            continue
        inner = set(kind[start + 2 : end - 1].tolist())
        if inner <= {Kind.AUDIO.value, Kind.VIDEO.value, Kind.TIMESTAMP.value} and inner:
            spans[start] = end
    return spans
