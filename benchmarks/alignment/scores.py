"""What an aligned model hears and finds: error rates on recorded prompts, and the time testbed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from audiopress.benchmarks.metrics import ErrorRate, wer
from audiopress.benchmarks.scoring import evaluate
from audiopress.benchmarks.timeline import Options, write_data_set
from audiopress.benchmarks.times.clips import load_clips
from audiopress.benchmarks.times.scores import scores
from audiopress.benchmarks.times.testbed import TimeTestbed
from audiopress.data.collator import Encoder
from audiopress.data.speech import Split, speech_records
from audiopress.data.stamps import Stamp
from audiopress.models import CompressedOmni, delta
from audiopress.models.fast import use_fast_attention
from audiopress.models.loading import load_base

NEW_TOKENS = 128  # of a transcript; the longest of a prompt has about 100
ANSWER_TOKENS = 40  # of an answer about a clip; the longest has about 30
EXAMPLES = 30  # of questions, that are kept with the scores


def aligned(base: str, changes: Path, device: torch.device) -> tuple[CompressedOmni, Any]:
    """Opens a base model with changes as `delta.write` stored them, in the precision users get on this device."""
    thinker, processor = load_base(base, torch.float32)
    delta.apply(thinker, delta.read(changes)[0])
    use_fast_attention(thinker)
    if device.type == "cuda":
        delta.cast_weights(thinker, torch.bfloat16)
    return CompressedOmni(thinker.to(device), base=base).eval(), processor


def speech_scores(model: CompressedOmni, processor: Any, split: Split, limit: int | None = None) -> dict[str, Any]:
    """Transcribes recorded English prompts.

    Args:
        model: in eval mode.
        processor: the model's.
        split: "validation" or "test".
        limit: at most so many prompts.

    Returns:
        `wer` with the project's own spelling, `wer_spelled` after Whisper's, which takes `3` and `three` for the same,
        their intervals, and all transcripts.
    """
    records = speech_records(split)[:limit]
    with torch.no_grad():
        found = evaluate(
            model,
            records,
            processor=processor,
            encoder=Encoder(processor),
            batch_size=16,
            max_new_tokens=NEW_TOKENS,
            name=split,
        )
    texts = [(record.reference, found.answers[record.id]) for record in records]
    spelled = EnglishTextNormalizer({})
    alike = wer([str(spelled(said)) for said, _ in texts], [str(spelled(written)) for _, written in texts])
    return {
        "split": split,
        "prompts": len(records),
        "words": found.wer.units,
        **_rates("wer", found.wer),
        **_rates("wer_spelled", alike),
        "transcripts": texts,
    }


def _rates(name: str, rate: ErrorRate) -> dict[str, Any]:
    interval = rate.interval() if len(rate.units_by_utterance) > 1 else None
    return {name: rate.rate, f"{name}_interval": interval}


def time_scores(
    model: CompressedOmni, processor: Any, stamps: list[Stamp], folder: Path, clips: int, workers: int
) -> dict[str, Any]:
    """Asks about the first test clips of the time testbed, making their files where they are not there.

    Args:
        model: in eval mode.
        processor: the model's.
        stamps: see `packaged_stamps`.
        folder: of the clips.
        clips: how many.
        workers: processes that make and decode them.
    """
    sizes = {"train": 0, "validation": 0, "test": clips, "unseen": 0}
    write_data_set(folder, stamps, sizes, Options(), max(workers, 1))
    testbed = TimeTestbed(model, processor, load_clips(folder, "test", clips), workers=workers)
    questions, answers = testbed.questions, testbed.answers(model, ANSWER_TOKENS)
    found = {key: value for key, value in scores(questions, answers).items() if key != "by_clip"}
    examples = [[q.record.messages[-1]["content"], q.truth or str(q.span), answers[q.record.id]] for q in questions]
    return {"split": "test", **found, "examples": examples[:: max(1, len(examples) // EXAMPLES)]}
