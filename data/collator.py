"""Records to batches: media decoded, placeholders expanded and interleaved by real time, labels on answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ..models.layout import AUDIO_TOKENS_PER_SECOND, audio_lengths
from ..models.rewrite import IGNORE
from .media import MediaError, read_audio, read_video
from .records import Record

PATCH_PIXELS = 28 * 28  # one video token after the 2 x 2 merge of 14 x 14 patches
PACKED = ("pixel_values_videos", "video_grid_thw", "video_second_per_grid", "video_seconds")


@dataclass
class Encoder:
    """Turns one record into model inputs.

    Args:
        processor: the model's `Qwen2_5OmniProcessor`; its tokenizer, chat template, feature extractor and video
            processor do the work.
        num_frames: sampled from a video, evenly from the first to the last.
        min_tokens: fewest video tokens of a pair of frames; a smaller picture is enlarged.
        max_tokens: most video tokens of a pair of frames; a larger picture is reduced, in its own proportions.
        max_length: most tokens of a sequence as the LLM reads it; None for no limit.
        audio_budget: gives the audio tokens left of each clip, for `max_length`; a compressor's `budget`.
        max_seconds: cuts longer audio. By default audio beyond the feature extractor's limit is an error.
    """

    processor: Any
    num_frames: int = 50
    min_tokens: int = 64
    max_tokens: int = 128
    max_length: int | None = None
    audio_budget: Callable[[Sequence[int]], Sequence[int]] = tuple
    max_seconds: float | None = None

    def __call__(self, record: Record, prompt_only: bool = False) -> dict[str, Any]:
        """Encodes one record.

        Args:
            record: what to encode.
            prompt_only: leave out the last answer and end where the model is to answer.

        Returns:
            `input_ids` `[L]`, `labels` `[L]` (-100 outside the answers), and of the media, where there are any,
            `input_features` `[mel, T]`, `pixel_values_videos` `[patches, P]`, `video_grid_thw` `[3]`,
            `video_second_per_grid` and `video_seconds` `[T]`.

        Raises:
            MediaError: a file cannot be used.
            ValueError: the record is a query and `prompt_only` is false; or not even one round of it fits
                `max_length`.
        """
        if prompt_only:
            record = record.query()
        elif record.is_query:
            raise ValueError(f"record {record.id!r} ends with the user: there is no answer to learn")
        sample: dict[str, Any] = {}
        audio_tokens = self._encode_audio(record, sample) if record.audio is not None else 0
        if record.video is not None:
            self._encode_video(record, sample)
        media = self._media_ids(audio_tokens, sample)
        left = self.audio_budget([audio_tokens])[0] if audio_tokens else 0
        messages = list(record.messages)
        while True:
            ids, labels = self._tokenize(record, messages, media, prompt_only)
            needed = len(ids) - audio_tokens + left
            if self.max_length is None or needed <= self.max_length:
                break
            if len(messages) <= 2:  # the last labelled round is never dropped
                raise ValueError(f"record {record.id!r} needs {needed} tokens; max_length is {self.max_length}")
            messages = messages[:-2]
        return {"id": record.id, "input_ids": torch.tensor(ids), "labels": torch.tensor(labels), **sample}

    def _encode_audio(self, record: Record, sample: dict[str, Any]) -> int:
        """Adds the log-mel features; gives the clip's number of tokens."""
        extractor = self.processor.feature_extractor
        rate = extractor.sampling_rate
        limit = extractor.n_samples / rate
        samples = read_audio(record.audio, rate, max_seconds=self.max_seconds, limit_seconds=limit)  # type: ignore[arg-type]
        frames = len(samples) // extractor.hop_length
        tokens = audio_lengths(torch.tensor([frames]))[0]
        if tokens < 1:
            seconds = len(samples) / rate
            raise MediaError(record.audio, f"{seconds:.3f} s of audio is too short: the encoder needs 0.04 s")  # type: ignore[arg-type]
        features = extractor(samples, sampling_rate=rate, padding=True, truncation=False, return_tensors="pt")
        sample["input_features"] = features["input_features"][0, :, :frames]
        return tokens

    def _encode_video(self, record: Record, sample: dict[str, Any]) -> None:
        video = read_video(record.video, self.num_frames)  # type: ignore[arg-type]
        encoded = self.processor.video_processor(
            videos=[video.frames],
            do_sample_frames=False,
            size={"shortest_edge": self.min_tokens * PATCH_PIXELS, "longest_edge": self.max_tokens * PATCH_PIXELS},
            return_tensors="pt",
        )
        groups = int(encoded["video_grid_thw"][0, 0])
        sample["pixel_values_videos"] = encoded["pixel_values_videos"]
        sample["video_grid_thw"] = encoded["video_grid_thw"][0]
        sample["video_second_per_grid"] = torch.tensor(video.duration / groups)
        sample["video_seconds"] = video.seconds[:: len(video.seconds) // groups][:groups].float()

    def _media_ids(self, audio_tokens: int, sample: dict[str, Any]) -> dict[int, list[int]]:
        """Gives what each media placeholder of the chat template becomes."""
        tokenizer = self.processor.tokenizer
        audio = tokenizer.convert_tokens_to_ids(self.processor.audio_token)
        if "video_grid_thw" not in sample:
            return {audio: [audio] * audio_tokens}
        video = tokenizer.convert_tokens_to_ids(self.processor.video_token)
        groups, height, width = sample["video_grid_thw"].tolist()
        per_group = height * width // self.processor.video_processor.merge_size**2
        if not audio_tokens:
            return {video: [video] * (groups * per_group)}
        bos, eos = tokenizer.convert_tokens_to_ids([self.processor.audio_bos_token, self.processor.audio_eos_token])
        counts = interleave(audio_tokens, groups, float(sample["video_second_per_grid"]))
        inner = [token for n in counts for token in [video] * per_group + [audio] * n]
        return {video: [bos, *inner, eos]}

    def _tokenize(
        self, record: Record, messages: list[Any], media: dict[int, list[int]], prompt_only: bool
    ) -> tuple[list[int], list[int]]:
        """Renders and tokenizes the conversation at once; labels are the tokens that lie in an answer's characters."""
        kind = "video" if record.video is not None else "audio"
        first = {"role": "user", "content": [{"type": kind}, {"type": "text", "text": messages[0]["content"]}]}
        chat = [first, *messages[1:]]
        text = self._render(chat, add_generation_prompt=prompt_only)
        spans = []
        for i in range(1, len(chat), 2):
            before = self._render(chat[:i], add_generation_prompt=True)
            if not text.startswith(before):
                raise ValueError(f"the chat template renders turn {i} of record {record.id!r} differently in context")
            end = text.index(messages[i]["content"], len(before)) + len(messages[i]["content"])
            end = text.index("<|im_end|>", end) + len("<|im_end|>")  # learning to stop is part of the answer
            spans.append((len(before), end))
        encoded = self.processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = []
        labels: list[int] = []
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if token in media:
                ids += media[token]
                labels += [IGNORE] * len(media[token])
                continue
            ids.append(token)
            labels.append(token if any(a <= start and end <= b for a, b in spans) else IGNORE)
        return ids, labels

    def _render(self, chat: list[Any], add_generation_prompt: bool) -> str:
        rendered: str = self.processor.tokenizer.apply_chat_template(
            chat,
            chat_template=self.processor.chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        return rendered


def interleave(audio_tokens: int, groups: int, seconds_per_group: float) -> list[int]:
    """Gives how many audio tokens follow each group of video tokens; what lies after the last group stays with it.

    Token j sounds at second j / 25 and belongs to the group of that second: 6,422 tokens over 25 groups of 10.28 s
    are 256 or 257 each.
    """
    second = torch.arange(audio_tokens) / AUDIO_TOKENS_PER_SECOND
    group = (second / seconds_per_group).long().clamp(max=groups - 1)
    return torch.bincount(group, minlength=groups).tolist()


class RecordDataset(Dataset[dict[str, Any]]):
    """Encoded records. One that cannot be used is skipped with its name and reason, and the next one stands in for it.

    Args:
        records: what to encode.
        encoder: what encodes them.
        strict: the first unusable record is an error.
    """

    def __init__(self, records: Sequence[Record], encoder: Encoder, strict: bool = False) -> None:
        self.records = list(records)
        self.encoder = encoder
        self.strict = strict

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        skipped: list[tuple[str, str]] = []
        for step in range(len(self)):
            record = self.records[(index + step) % len(self)]
            try:
                return {**self.encoder(record), "skipped": skipped}
            except ValueError as error:
                if self.strict:
                    raise
                skipped.append((record.id, str(error)))
        raise ValueError(f"none of {len(self)} records can be used; the first: {skipped[0][0]}: {skipped[0][1]}")


@dataclass
class OmniCollator:
    """Pads samples to a batch.

    Args:
        pad_token_id: of `input_ids`.
        padding_side: right in training, left in generation.
    """

    pad_token_id: int
    padding_side: str = "right"

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Gives the batch: `input_ids`, `attention_mask` and `labels` `[B, L]`, the media of all samples packed."""
        pad = {"batch_first": True, "padding_side": self.padding_side}
        ids = [s["input_ids"] for s in samples]
        batch: dict[str, Any] = {
            "input_ids": pad_sequence(ids, padding_value=self.pad_token_id, **pad),
            "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], **pad),
            "labels": pad_sequence([s["labels"] for s in samples], padding_value=IGNORE, **pad),
        }
        if mels := [s["input_features"].T for s in samples if "input_features" in s]:
            batch["input_features"] = pad_sequence(mels, batch_first=True).transpose(1, 2)
            batch["feature_attention_mask"] = pad_sequence(
                [torch.ones(len(m), dtype=torch.long) for m in mels], batch_first=True
            )
        videos = [s for s in samples if "video_grid_thw" in s]
        if videos:
            join: dict[str, Callable[[list[Tensor]], Tensor]] = dict.fromkeys(PACKED, torch.cat)
            join |= {"video_grid_thw": torch.stack, "video_second_per_grid": torch.stack}
            batch |= {name: join[name]([s[name] for s in videos]) for name in PACKED}
        if skipped := [entry for s in samples for entry in s.get("skipped", ())]:
            batch["skipped"] = skipped
        return batch
