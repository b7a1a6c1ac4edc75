"""Trains compressors in front of a frozen Whisper: the same clips, steps and losses for every method.

The train split's prompts are joined anew several times, to dense clips and to shorter ones. The encoder runs over all
of them once, and so does the teacher: Whisper as it comes, which reads all 50 states per second. A student, the same
decoder behind a compressor, learns the teacher's transcripts by cross-entropy, and all that the teacher thought likely
at each place; as in Distil-Whisper, arXiv 2311.00430. The prompts' own texts have no steady spelling and punctuation,
which a compressor would learn, too; they only tell which transcripts are wrong.

A rate of learning that suits one method may ruin another. Where several are given, every method is first trained with
each, at its own ratio and with one seed; the one that does best on prompts of the train split that were held back is
that of all its trainings.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import get_cosine_schedule_with_warmup

from audiopress.benchmarks.metrics import wer
from audiopress.benchmarks.words.clips import SEED, Clip, batches, make_clips, read_all
from audiopress.benchmarks.words.spelling import spelled
from audiopress.compression import Compressor
from audiopress.data.speech import speech_records
from audiopress.kernels.packed import upload
from audiopress.models.spoken import Heard, Spoken
from audiopress.models.whisper import PROMPT_LENGTH, CompressedWhisper, Transcript

log = logging.getLogger(__name__)

JOINS = (1.0, 1.0, 1.0, 0.5, 0.25)  # the train split is joined once for each, to this share of the longest; a guess
HELD_BACK = 0.1  # of the train split's prompts; a guess
CHOICE_SEED = 0  # of the trainings that choose a rate of learning
WORST = 0.3  # word error rate of a transcript to learn; a guess, as the prompts' spelling alone makes some errors
DISTILLATION = 0.8  # beside cross-entropy's 1: Distil-Whisper, arXiv 2311.00430
WARM_UP = 0.1  # of the steps; this, the decay and the norm are guesses, the usual ones
WEIGHT_DECAY = 0.01
GRADIENT_NORM = 1.0
TAUGHT_AT_ONCE = 32  # clips, of the 43 that the encoder takes


@dataclass(frozen=True)
class Settings:
    """What all methods share.

    Args:
        languages: of the prompts.
        seconds: of the longest clip.
        limit: at most so many clips of each language and join.
        batch: clips per step.
        rates: of learning, after the warm-up.
    """

    languages: tuple[str, ...]
    seconds: float
    limit: int | None = None
    batch: int = 32
    rates: tuple[float, ...] = (1e-3,)


@dataclass(frozen=True)
class Lesson:
    """A clip to learn.

    Args:
        spoken: what the encoder says of it.
        ids: `[T]` int64 on the CPU, the prompt, the text and the end.
        teacher: `[T - 1, D]`, the decoder's states after all but the last of `ids`.
    """

    spoken: Spoken
    ids: Tensor
    teacher: Tensor


@dataclass(frozen=True)
class Trained:
    """A compressor that was trained, and how it went.

    Args:
        compressor: in eval mode.
        rate: of learning.
        seconds: of training it.
        cross_entropy: mean over the last tenth of the steps.
        distillation: the same.
        held_back: by rate, the whole loss on what was held back, in the trainings by which the rate was chosen; None
            where there was nothing to choose.
    """

    compressor: Compressor
    rate: float
    seconds: float
    cross_entropy: float
    distillation: float
    held_back: dict[float, float] | None = None

    def row(self) -> dict[str, Any]:
        """Gives what a result's row says of it."""
        losses = {"cross_entropy": self.cross_entropy, "distillation": self.distillation}
        held_back = None if self.held_back is None else {f"{rate:g}": loss for rate, loss in self.held_back.items()}
        found = {"training_seconds": self.seconds, "training_losses": losses}
        return found | {"train_rate": self.rate, "held_back_losses": held_back}


class Diverged(ValueError):
    """A loss became infinite."""


class SpeechTraining:
    """Trains compressors for one Whisper; the clips are encoded when the first is asked for.

    Args:
        whisper: frozen.
        settings: for all methods.
    """

    def __init__(self, whisper: CompressedWhisper, settings: Settings) -> None:
        self.whisper = whisper
        self.settings = settings
        self.lessons: list[Lesson] = []
        self.held_back: list[Lesson] = []
        self.chosen: dict[tuple[str, int], dict[float, float]] = {}  # by method and steps: see `Trained.held_back`

    def __call__(self, method: str, ratios: Sequence[float | None], steps: int, seed: int) -> Trained:
        """Trains one.

        Args:
            method: its name.
            ratios: one keep ratio, or several of which every step draws one; None is the method's own.
            steps: of training.
            seed: of its weights, of dropout, and of what each step draws.

        Raises:
            ValueError: it acts inside the encoder, its loss became infinite, or there are several rates of learning
                and nothing was held back.
        """
        if not self.lessons:
            self.lessons, self.held_back = self._encode()
        if len(self.settings.rates) == 1:
            return self._train(method, ratios, steps, seed, self.settings.rates[0])
        losses = self._choose(method, steps)
        return replace(self._train(method, ratios, steps, seed, min(losses, key=losses.__getitem__)), held_back=losses)

    def _choose(self, method: str, steps: int) -> dict[float, float]:
        """Gives the losses on what was held back, by rate of learning, without the rates that diverge."""
        rates = self.settings.rates
        if not self.held_back:
            raise ValueError(f"to choose among {len(rates)} rates of learning, more prompts must be there")
        if (method, steps) not in self.chosen:
            losses, errors = {}, []
            for rate in rates:
                try:
                    trained = self._train(method, [None], steps, CHOICE_SEED, rate)
                except Diverged as error:
                    errors.append(error)
                else:
                    losses[rate] = self._held_back_loss(trained.compressor)
            if not losses:
                raise errors[0]
            self.chosen[method, steps] = losses
        return self.chosen[method, steps]

    def _train(self, method: str, ratios: Sequence[float | None], steps: int, seed: int, rate: float) -> Trained:
        """Trains one with one rate of learning."""
        device = self.whisper.model.device
        torch.manual_seed(seed)
        options = {} if ratios[0] is None else {"keep_ratio": ratios[0]}
        compressor = self.whisper.build(method, **options).train()
        if compressor.split()[0] is not None:
            raise ValueError(f"{method} acts inside the encoder, whose states are computed once before training")
        variants = _variants(compressor, ratios)
        learned = [p for name, p in compressor.named_parameters() if name not in compressor.frozen]
        optimizer = torch.optim.AdamW(learned, rate, weight_decay=WEIGHT_DECAY, fused=device.type == "cuda")
        schedule = get_cosine_schedule_with_warmup(optimizer, round(WARM_UP * steps), steps)
        draw = torch.Generator().manual_seed(seed)
        losses, started = [], time.perf_counter()
        for _ in range(steps):
            picked = torch.randperm(len(self.lessons), generator=draw)[: self.settings.batch].tolist()
            variant = variants[int(torch.randint(len(variants), (), generator=draw))]
            with self._autocast():
                cross_entropy, distillation, others = self._losses([self.lessons[i] for i in picked], variant)
                loss = cross_entropy + DISTILLATION * distillation + others
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            losses.append(torch.stack([cross_entropy, distillation]).detach())
        last = torch.stack(losses[-max(1, steps // 10) :]).mean(dim=0)
        if not last.isfinite().all():
            raise Diverged(f"the loss of {method} became infinite")
        return Trained(compressor.eval(), rate, time.perf_counter() - started, *last.tolist())

    @torch.no_grad()
    def _held_back_loss(self, compressor: Compressor) -> float:
        """Gives the mean loss on what was held back."""
        size, losses = self.settings.batch, []
        for i in range(0, len(self.held_back), size):
            with self._autocast():
                cross_entropy, distillation, others = self._losses(self.held_back[i : i + size], compressor)
            losses.append(cross_entropy + DISTILLATION * distillation + others)
        return float(torch.stack(losses).mean())

    def _losses(self, lessons: Sequence[Lesson], compressor: Compressor) -> tuple[Tensor, Tensor, Tensor]:
        """Gives cross-entropy and distillation per token of the texts, and what the method adds itself."""
        whisper, device = self.whisper, self.whisper.model.device
        spoken = Spoken.cat([lesson.spoken for lesson in lessons])
        heard = whisper.compress(spoken, compressor)
        ids = torch.nn.utils.rnn.pad_sequence([lesson.ids for lesson in lessons], batch_first=True)  # [B, T]
        prompt = PROMPT_LENGTH
        # Only what follows the prompt is learned; padding takes no part.
        places = torch.cat(
            [i * (ids.shape[1] - 1) + torch.arange(prompt - 1, len(x.ids) - 1) for i, x in enumerate(lessons)]
        )
        wanted = upload(torch.cat([lesson.ids[prompt:] for lesson in lessons]), device)
        states = whisper.follow(heard, upload(ids[:, :-1].contiguous(), device)).flatten(0, 1)
        states = states.index_select(0, upload(places, device))
        said = functional.log_softmax(whisper.model.proj_out(states).float(), dim=1)  # [R, V]
        with torch.no_grad():
            teacher = torch.cat([lesson.teacher[prompt - 1 :] for lesson in lessons])
            meant = functional.log_softmax(whisper.model.proj_out(teacher).float(), dim=1)
        return (
            functional.nll_loss(said, wanted),
            functional.kl_div(said, meant, reduction="batchmean", log_target=True),
            sum(heard.stream.losses.values(), torch.zeros((), device=device)),
        )

    @torch.no_grad()
    def _encode(self) -> tuple[list[Lesson], list[Lesson]]:
        """Joins the prompts and runs encoder and teacher over all clips, to learn from and held back."""
        started, settings = time.perf_counter(), self.settings
        clips: list[Clip] = []
        held_back: list[Clip] = []
        for language in settings.languages:
            records = speech_records("train", [language])
            last = len(records) - int(HELD_BACK * len(records))
            order = np.random.default_rng(SEED).permutation(len(records))
            own, kept = ([records[i] for i in part] for part in (order[:last], order[last:]))
            for seed, share in enumerate(JOINS):
                clips += make_clips(own, language, share * settings.seconds, True, settings.limit, seed + 1)
            held_back += make_clips(kept, language, settings.seconds, True, settings.limit)
        read_all([*clips, *held_back])
        read = time.perf_counter() - started
        lessons, held = (self._teach(batches(part, TAUGHT_AT_ONCE)) for part in (clips, held_back))
        counts, took = (len(lessons), len(clips)), time.perf_counter() - started
        log.info("%d of %d clips are trained on, those the teacher gets right", *counts)
        log.info("made ready in %.0f s, of which %.0f for reading", took, read)
        if not lessons:
            raise ValueError(f"of {len(clips)} clips to train on the teacher transcribes none")
        return lessons, held

    def _teach(self, parts: Sequence[tuple[Clip, ...]]) -> list[Lesson]:
        """Runs encoder and teacher over clips in parts; leaves out those that the teacher gets wrong."""
        if not parts:
            return []
        whisper, dtype = self.whisper, torch.bfloat16 if self.whisper.model.device.type == "cuda" else torch.float32
        spoken: list[list[Spoken]] = []
        heard: list[Heard] = []
        for clips in parts:
            features, tokens = whisper.features([clip.sound() for clip in clips])
            with self._autocast():
                spoken.append([own.to(dtype) for own in whisper.encode(features, tokens).split()])
                heard.append(whisper.hear_as_it_comes(features, tokens).to(dtype))
        # All parts at once: a step of decoding takes as long for few clips as for many.
        languages = [clip.language for clips in parts for clip in clips]
        written = whisper.transcribe(Heard.cat(heard), languages, whisper.quick_dtype)
        ids = whisper.texts([transcript.text for transcript in written], languages)
        lessons, ends = [], list(accumulate(len(clips) for clips in parts))
        for clips, own_spoken, own_heard, end in zip(parts, spoken, heard, ends, strict=True):
            own_written, own_ids = (x[end - len(clips) : end] for x in (written, ids))
            padded = torch.nn.utils.rnn.pad_sequence(own_ids, batch_first=True)[:, :-1]
            with self._autocast():
                states = whisper.follow(own_heard, upload(padded.contiguous(), whisper.model.device))
            lessons += [
                Lesson(own, x, state[: len(x) - 1].to(dtype))
                for clip, transcript, own, x, state in zip(clips, own_written, own_spoken, own_ids, states, strict=True)
                if is_right(clip, transcript)
            ]
        return lessons

    def _autocast(self) -> Any:
        device = self.whisper.model.device.type
        return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def _variants(compressor: Compressor, ratios: Sequence[float | None]) -> list[Compressor]:
    """Gives a compressor of the first ratio at all of them, with the same weights."""
    return [compressor, *(compressor.at(ratio) for ratio in ratios[1:] if ratio is not None)]


def is_right(clip: Clip, transcript: Transcript) -> bool:
    """Tells whether a transcript came to its end, with few errors."""
    said, written = (spelled(text, clip.language) for text in (clip.text, transcript.text))
    return transcript.ended and wer([said], [written]).rate <= WORST
