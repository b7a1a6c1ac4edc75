"""Records to batches: media decoded, placeholders expanded and interleaved by real time, labels on answers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ..models.layout import AUDIO_TOKENS_PER_SECOND, audio_lengths
from ..models.rewrite import IGNORE
from .longvale import format_time
from .media import MediaError, read_audio, read_video
from .records import Message, Record

PATCH_PIXELS = 28 * 28  # one video token after the 2 x 2 merge of 14 x 14 patches
END_OF_TURN = "<|im_end|>"
VIDEO_FIELDS = ("pixel_values_videos", "video_grid_thw", "video_second_per_grid", "video_seconds")
MOST_SKIPPED_IN_A_ROW = 100  # then it is not the records that are wrong, but the settings or a disk; a guess


@dataclass
class Encoder:
    """Turns one record into model inputs.

    Args:
        processor: the model's `Qwen2_5OmniProcessor`; its tokenizer, chat template, feature extractor and video
            processor do the work.
        num_frames: sampled from a video, evenly from the first to the last.
        min_tokens: fewest video tokens of a pair of frames; a smaller picture is enlarged.
        max_tokens: most video tokens of a pair of frames; a larger picture is reduced, in its own proportions.
        max_length: most tokens of a sequence as the LLM reads it; None for no limit. In training, whole rounds of
            question and answer are dropped from the end until it is kept.
        tokens_left: gives how many of so many audio and video tokens the LLM reads, for `max_length`.
        max_seconds: cuts longer audio. By default audio beyond the feature extractor's limit is an error.
        timestamps: parts of a clip that are told apart by text between its tokens: how much of it is over, in percent,
            as LongVALE's answers write it (`format_time`). From TMRoPE's positions alone that share is hard to tell, as
            text timestamps show (Qwen3-VL, 2511.21631). 0: none, as in Qwen2.5-Omni; for models that were trained
            with them.
    """

    processor: Any
    num_frames: int = 50
    min_tokens: int = 64
    max_tokens: int = 128
    max_length: int | None = None
    tokens_left: Callable[[int, int], int] = operator.add
    max_seconds: float | None = None
    timestamps: int = 0

    def __post_init__(self) -> None:
        if self.timestamps < 0:
            raise ValueError(f"timestamps must be at least 0, got {self.timestamps}")
        # Says that `max_tokens` is the limit; transformers warns of another one, of thousands of frames, when unset.
        self.processor.video_processor.cap_pixels_per_frame = False

    def __call__(self, record: Record, prompt_only: bool = False) -> dict[str, Any]:
        """Encodes one record.

        Args:
            record: what to encode.
            prompt_only: leave out the last answer and end where the model is to answer.

        Returns:
            `id`, `input_ids` `[L]`, unless `prompt_only` `labels` `[L]` (-100 outside the answers), and of the media,
            where there are any, `input_features` `[mel, frames]`, `pixel_values_videos` `[patches, P]`,
            `video_grid_thw` `[1, 3]`, `video_second_per_grid` `[1]` and `video_seconds` `[T]`.

        Raises:
            MediaError: a file cannot be used.
            ValueError: the record is a query and `prompt_only` is false; its text holds a media placeholder; or its
                first round, or the prompt, is longer than `max_length`.
        """
        if prompt_only:
            record = record.query()
        elif record.is_query:
            raise ValueError(f"record {record.id!r} ends with the user: there is no answer to learn")
        self._check_text(record)
        sample: dict[str, Any] = {}
        audio_tokens = 0 if record.audio is None else self._encode_audio(record.audio, sample)
        if record.video is not None:
            self._encode_video(record.video, sample)
        media = self._media_ids(audio_tokens, sample)
        video_tokens = self._video_tokens(sample)
        dropped = audio_tokens + video_tokens - self.tokens_left(audio_tokens, video_tokens)
        messages = list(record.messages)
        while True:
            ids, labels = self._tokenize(record, messages, media, prompt_only)
            needed = len(ids) - dropped
            if self.max_length is None or needed <= self.max_length:
                break
            if prompt_only or len(messages) == 2:  # a question is never dropped, nor the only answer to learn from
                part = "prompt" if prompt_only else "first round"
                raise ValueError(
                    f"the {part} of record {record.id!r} needs {needed} tokens, max_length is {self.max_length}"
                )
            messages = messages[:-2]
        sample |= {"id": record.id, "input_ids": torch.tensor(ids)}
        return sample if prompt_only else sample | {"labels": torch.tensor(labels)}

    def _check_text(self, record: Record) -> None:
        for token in (self.processor.audio_token, self.processor.image_token, self.processor.video_token):
            if any(token in message["content"] for message in record.messages):
                raise ValueError(f"the text of record {record.id!r} contains {token}, the model's placeholder of media")

    def _encode_audio(self, path: Path, sample: dict[str, Any]) -> int:
        """Adds the log-mel features, those that the processor would give; gives the clip's number of tokens."""
        extractor = self.processor.feature_extractor
        rate = extractor.sampling_rate
        samples = read_audio(path, rate, max_seconds=self.max_seconds, limit_seconds=extractor.n_samples / rate)
        frames = -(-len(samples) // extractor.hop_length)
        tokens = audio_lengths(torch.tensor([frames]))[0]
        if tokens < 1:
            raise MediaError(path, f"{len(samples) / rate:.4f} s of audio is too short to give a token")
        # The processor pads every clip with zeros to the extractor's limit; the frames of the clip see so many of them.
        padded = np.pad(samples, (0, extractor.n_fft))
        features = extractor(padded, sampling_rate=rate, padding=True, truncation=False, return_tensors="pt")
        sample["input_features"] = features["input_features"][0, :, :frames]
        return tokens

    def _encode_video(self, path: Path, sample: dict[str, Any]) -> None:
        processor = self.processor.video_processor
        video = read_video(path, self.num_frames)
        encoded = processor(
            videos=[video.frames],
            do_sample_frames=False,
            size={"shortest_edge": self.min_tokens * PATCH_PIXELS, "longest_edge": self.max_tokens * PATCH_PIXELS},
            return_tensors="pt",
        )
        seconds = video.seconds[:: processor.temporal_patch_size].float()  # a pair is shown from its first frame on
        sample["pixel_values_videos"] = encoded["pixel_values_videos"]
        sample["video_grid_thw"] = encoded["video_grid_thw"]
        sample["video_second_per_grid"] = torch.tensor([video.duration / len(seconds)])
        sample["video_seconds"] = seconds

    def _video_tokens(self, sample: dict[str, Any]) -> int:
        if "video_grid_thw" not in sample:
            return 0
        return int(sample["video_grid_thw"].prod()) // self.processor.video_processor.merge_size**2

    def _media_ids(self, audio_tokens: int, sample: dict[str, Any]) -> dict[int, list[int]]:
        """Gives what each media placeholder of the chat template becomes."""
        tokenizer = self.processor.tokenizer
        audio = tokenizer.convert_tokens_to_ids(self.processor.audio_token)
        heard = np.arange(audio_tokens) / AUDIO_TOKENS_PER_SECOND
        if "video_grid_thw" not in sample:
            return {audio: self._stamp([audio] * audio_tokens, heard, audio_tokens / AUDIO_TOKENS_PER_SECOND)}
        video = tokenizer.convert_tokens_to_ids(self.processor.video_token)
        groups = int(sample["video_grid_thw"][0, 0])
        per_group = self._video_tokens(sample) // groups
        seconds_per_group = float(sample["video_second_per_grid"])
        duration = groups * seconds_per_group
        seen = np.arange(groups) * seconds_per_group
        if not audio_tokens:
            return {video: self._stamp([video] * (groups * per_group), seen.repeat(per_group), duration)}
        bos, eos = tokenizer.convert_tokens_to_ids([self.processor.audio_bos_token, self.processor.audio_eos_token])
        counts = interleave(audio_tokens, groups, seconds_per_group)
        inner = [token for n in counts for token in [video] * per_group + [audio] * n]
        parts = np.split(heard, np.cumsum(counts)[:-1])
        seconds = np.concatenate([x for at, own in zip(seen, parts, strict=True) for x in (at.repeat(per_group), own)])
        return {video: [bos, *self._stamp(inner, seconds, duration), eos]}

    def _stamp(self, tokens: list[int], seconds: np.ndarray, duration: float) -> list[int]:
        """Puts timestamps between the tokens of a clip, each before the first token of its time or later.

        Of several that have no token between them the last one stays; after the clip's last token there is none.
        """
        times = duration * np.arange(1, self.timestamps) / max(self.timestamps, 1)
        at = dict(zip(np.searchsorted(seconds, times).tolist(), times.tolist(), strict=True))
        stamped, done = [], 0
        for until, time in at.items():
            if until < len(tokens):
                text = format_time(time, duration)
                stamped += tokens[done:until] + self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
                done = until
        return stamped + tokens[done:]

    def _tokenize(
        self,
        record: Record,
        messages: Sequence[Message],
        media: dict[int, list[int]],
        prompt_only: bool,
    ) -> tuple[list[int], list[int]]:
        """Renders the conversation, cuts it where answers begin and end, and tokenizes each piece by itself.

        So a prompt has the tokens in training that it has in generation, also before an answer that begins with a
        blank, which the tokenizer would join with the template's line break. Otherwise the tokens are those of the
        whole text: elsewhere the cuts are at special tokens.
        """
        kind = "audio" if record.video is None else "video"
        content = [{"type": kind}, {"type": "text", "text": messages[0]["content"]}]
        chat = [{"role": "user", "content": content}, *messages[1:]]
        text = self._render(chat, add_generation_prompt=prompt_only)
        cuts = [0]
        for i in range(1, len(chat), 2):
            before = self._render(chat[:i], add_generation_prompt=True)
            after = self._render(chat[: i + 1], add_generation_prompt=False)
            after = after[: after.rindex(END_OF_TURN) + len(END_OF_TURN)]  # learning to stop is part of the answer
            if not text.startswith(after) or not after.startswith(before):
                raise ValueError(f"the chat template renders turn {i} of record {record.id!r} differently in context")
            cuts += [len(before), len(after)]
        pieces = [text[start:end] for start, end in pairwise([*cuts, len(text)])]
        ids: list[int] = []
        labels: list[int] = []
        for number, piece in enumerate(self.processor.tokenizer(pieces, add_special_tokens=False)["input_ids"]):
            is_answer = number % 2 == 1
            expanded = piece if is_answer else [token for t in piece for token in media.get(t, [t])]
            ids += expanded
            labels += expanded if is_answer else [IGNORE] * len(expanded)
        return ids, labels

    def _render(self, chat: Sequence[Any], add_generation_prompt: bool) -> str:
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

    Every sample holds `skipped`, the `(id, reason)` of each record it stands in for.

    Args:
        records: what to encode.
        encoder: what encodes them.
        strict: the first unusable record is an error.

    Raises:
        ValueError: there are no records; or, of an item, it and as many after it as there are, 100 at most, cannot be
            used.
    """

    def __init__(self, records: Sequence[Record], encoder: Encoder, strict: bool = False) -> None:
        if not records:
            raise ValueError("there are no records")
        self.records = list(records)
        self.encoder = encoder
        self.strict = strict

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        skipped: list[tuple[str, str]] = []
        for step in range(min(len(self), MOST_SKIPPED_IN_A_ROW)):
            record = self.records[(index + step) % len(self)]
            try:
                return {**self.encoder(record), "skipped": skipped}
            except ValueError as error:
                if self.strict:
                    raise
                skipped.append((record.id, str(error)))
        name, reason = skipped[0]
        raise ValueError(f"{len(skipped)} of {len(self)} records in a row cannot be used; the first, {name}: {reason}")


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
        """Gives the batch: `input_ids`, `attention_mask` and, where samples have them, `labels` `[B, L]`; the media
        of all samples, packed; and `skipped`, those of all samples, if there are any (not for the model).
        """
        ids = [s["input_ids"] for s in samples]
        batch: dict[str, Any] = {
            "input_ids": self._pad(ids, self.pad_token_id),
            "attention_mask": self._pad([torch.ones_like(i) for i in ids], 0),
        }
        if "labels" in samples[0]:
            batch["labels"] = self._pad([s["labels"] for s in samples], IGNORE)
        if mels := [s["input_features"].T for s in samples if "input_features" in s]:
            batch["input_features"] = pad_sequence(mels, batch_first=True).transpose(1, 2)
            masks = [torch.ones(len(m), dtype=torch.long) for m in mels]
            batch["feature_attention_mask"] = pad_sequence(masks, batch_first=True)
        if videos := [s for s in samples if "video_grid_thw" in s]:
            batch |= {name: torch.cat([s[name] for s in videos]) for name in VIDEO_FIELDS}
        for name in ("audio_hidden", "video_embeds"):  # what the towers gave before
            if states := [s[name] for s in samples if name in s]:
                batch[name] = torch.cat(states)
        if skipped := [entry for s in samples for entry in s.get("skipped", ())]:
            batch["skipped"] = skipped
        return batch

    def _pad(self, rows: list[Tensor], value: int) -> Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=self.padding_side)
