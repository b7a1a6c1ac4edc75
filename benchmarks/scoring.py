"""Held-out loss and answers of a model, and the control that shows whether it hears: the same with other audio."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from audiopress.benchmarks.metrics import ErrorRate, wer
from audiopress.data.collator import Encoder, OmniCollator
from audiopress.data.records import Record
from audiopress.data.skips import SkipLog
from audiopress.models import CompressedOmni
from audiopress.models.rewrite import IGNORE


@dataclass(frozen=True)
class Evaluation:
    """What a model does on held-out records.

    Args:
        loss: cross-entropy per token of the answers, in nats.
        wer: word error rate of the greedy answers against the references.
        answers: by record id.
        tokens_in: audio tokens before compression, 25 per second.
        tokens_out: audio tokens the LLM reads.
        video_in: video tokens before compression.
        video_out: video tokens the LLM reads.
    """

    loss: float
    wer: ErrorRate
    answers: dict[str, str]
    tokens_in: int
    tokens_out: int
    video_in: int = 0
    video_out: int = 0

    @property
    def keep_ratio(self) -> float:
        """Audio tokens out / in, as achieved; 1 where there is no audio."""
        return self.tokens_out / self.tokens_in if self.tokens_in else 1.0


def usable(records: Sequence[Record], encoder: Encoder, skips: SkipLog) -> list[Record]:
    """Gives the records that can be encoded; the others are counted in `skips` with their reasons."""
    good = []
    for record in records:
        try:
            encoder(record)
        except ValueError as error:
            skips.add(record.id, error)
        else:
            good.append(record)
    return good


def with_other_audio(records: Sequence[Record], encoder: Encoder) -> list[Record]:
    """Gives every record the audio of another that is nearly as long.

    Neighbours in the order of length swap their audio, so what is left is the text's own likelihood and whatever the
    mere length of the audio tells; only hearing makes the true audio better than this. Records about the same audio
    get the same other one.

    Raises:
        ValueError: the records with audio are of fewer than two sounds.
    """
    heard = [r for r in records if r.audio is not None]
    heard.sort(key=lambda r: (encoder(r)["input_features"].shape[1], r.id))
    sounds = list(dict.fromkeys(r.audio for r in heard))
    if len(sounds) < 2:
        raise ValueError(f"shuffling audio needs two different sounds or more, got {len(sounds)}")
    last = len(sounds) - 1
    other = {sound: sounds[i ^ 1 if i ^ 1 <= last else i - 1] for i, sound in enumerate(sounds)}
    return [dataclasses.replace(record, audio=other[record.audio]) for record in heard]


@torch.no_grad()
def evaluate(
    model: CompressedOmni,
    records: Sequence[Record],
    *,
    processor: Any,
    encoder: Encoder,
    batch_size: int = 8,
    max_new_tokens: int = 32,
    name: str = "evaluating",
) -> Evaluation:
    """Computes the loss on the records' last answers and generates them.

    Args:
        model: put into eval mode for the duration.
        records: usable ones, each with an answer.
        processor: the model's.
        encoder: of the records.
        batch_size: of both passes; records are batched in the order of their length.
        max_new_tokens: of an answer.
        name: shown by the progress bar.
    """
    training = model.training
    model.eval()
    tokenizer = processor.tokenizer
    right, left = (OmniCollator(tokenizer.pad_token_id, side) for side in ("right", "left"))
    samples = sorted(((encoder(r), r) for r in records), key=lambda pair: len(pair[0]["input_ids"]))
    batches = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
    loss, labelled = 0.0, 0
    tokens = {"audio": [0, 0], "video": [0, 0]}
    answers: dict[str, str] = {}
    for batch in tqdm(batches, desc=name, leave=False):
        inputs = to_device(right([sample for sample, _ in batch]), model.device)
        count = int((inputs["labels"] != IGNORE).sum())
        out = model(**inputs)
        loss += float(out.losses["text"]) * count
        labelled += count
        for kind, counts in out.tokens.items():
            tokens[kind] = [a + b for a, b in zip(tokens[kind], counts, strict=True)]
        prompts = to_device(left([encoder(record, prompt_only=True) for _, record in batch]), model.device)
        generated = model.generate(**prompts, max_new_tokens=max_new_tokens)
        texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
        answers.update((record.id, text.strip()) for (_, record), text in zip(batch, texts, strict=True))
    model.train(training)
    references = [record.reference for record in records]
    rate = wer(references, [answers[record.id] for record in records])
    return Evaluation(loss / labelled, rate, answers, *tokens["audio"], *tokens["video"])


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Gives the tensors of a batch on a device."""
    return {name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
