"""Training: a connector's warm-up by CTC alone, and transformers' Trainer with what a compressed variant needs."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, get_cosine_schedule_with_warmup

from ..compression.speech_rate import SpeechRate, relative_rates, train_speech_rate
from . import storage
from .encoders import encode_audio
from .omni import CompressedOmni

STATES_PER_SECOND = 50  # of the audio tower, before its own pooling
COMPLETE = "complete.json"  # written last into a checkpoint: without it the checkpoint is not one

log = logging.getLogger(__name__)


def warm_up(
    model: CompressedOmni,
    samples: Sequence[dict[str, Any]],
    collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]],
    *,
    steps: int,
    batch_size: int = 16,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> list[float]:
    """Trains compressor and projector by CTC alone: the LLM is not run, so a step takes a tenth of the time.

    AdamW, cosine schedule, gradients clipped at 1. Every process of a distributed run does the same.

    Args:
        model: with `add_ctc`, and the parts to train set; LoRA is left as it is.
        samples: encoded, with `labels`.
        collate: makes a batch of them.
        steps: optimizer steps.
        batch_size: samples per step.
        learning_rate: at its peak.
        seed: of the order of the samples.

    Returns:
        The loss per labelled token at every step.
    """
    parameters = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    options: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "seed": seed, "name": "warm-up by CTC"}
    return fit(model, samples, collate, lambda batch: model.ctc_loss(**batch), optimizer, **options)


def fit(
    model: CompressedOmni,
    samples: Sequence[dict[str, Any]],
    collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]],
    loss: Callable[[dict[str, Any]], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    name: str,
) -> list[float]:
    """Trains for so many steps, in this process alone: cosine schedule, gradients clipped at 1, nothing saved.

    Args:
        model: put into train mode for the duration.
        samples: encoded, with `labels`; in every epoch in another order.
        collate: makes a batch of them.
        loss: of the tensors of a batch.
        optimizer: of what is trained.
        steps: optimizer steps.
        batch_size: samples per step.
        seed: of the order of the samples.
        name: shown by the progress bar.

    Returns:
        The loss at every step.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    schedule = get_cosine_schedule_with_warmup(optimizer, min(10, steps // 10), steps)
    loader = DataLoader(
        samples,  # type: ignore[arg-type]
        batch_size,
        shuffle=True,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(seed),
    )
    losses: list[float] = []
    training = model.training
    model.train()
    with tqdm(total=steps, desc=name, leave=False) as bar:
        while len(losses) < steps:
            for batch in loader:
                model.step = len(losses)
                value = loss({k: v.to(model.device) for k, v in batch.items() if isinstance(v, torch.Tensor)})
                optimizer.zero_grad()
                value.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                losses.append(value.item())
                bar.set_postfix(loss=f"{losses[-1]:.2f}")
                bar.update()
                if len(losses) == steps:
                    break
    model.train(training)
    return losses


def fit_speech_rate(
    model: CompressedOmni, samples: Iterable[dict[str, Any]], texts: Mapping[str, str], *, steps: int, seed: int = 0
) -> list[float]:
    """Fits the speech-rate predictor of a compressor that has one (MMS-LLaMA) to transcribed speech, and freezes it.

    Args:
        model: its compressor may be a chain.
        samples: encoded, of one utterance each.
        texts: what is said in each, by its id.
        steps: of the optimizer.
        seed: of the order.

    Returns:
        The loss of every step; nothing where no part of the compressor predicts a rate.
    """
    modules = () if model.compressor is None else model.compressor.modules()
    predictor = next((m for m in modules if isinstance(m, SpeechRate)), None)
    if predictor is None:
        return []
    states, words = [], []
    for sample in tqdm(samples, desc="states for the speech rate"):
        states.append(_last_states(model, sample))
        words.append(len(texts[sample["id"]].split()))
    rates = relative_rates(words, [len(s) / STATES_PER_SECOND for s in states])
    return train_speech_rate(predictor, states, rates, steps, seed=seed)


@torch.no_grad()
def _last_states(model: CompressedOmni, sample: dict[str, Any]) -> Tensor:
    """Gives what the compressor reads as `encoder_hidden` of a sample, `[n, D_enc]`; kept states are used again."""
    features, kept = sample["input_features"][None].to(model.device), sample.get("audio_hidden")
    mask = torch.ones(features.shape[::2], dtype=torch.long, device=model.device)
    kept = None if kept is None else kept.to(model.device)
    assert model.compressor is not None
    context = encode_audio(model.thinker, features, mask, needs=model.compressor.needs, audio_hidden=kept)[1]
    assert context.encoder_hidden is not None
    return context.encoder_hidden.embeds.float()


class CompressTrainer(Trainer):
    """Trainer that saves only what is ours, gives the connector its own learning rate and logs the loss in parts."""

    def __init__(self, *args: Any, on_skip: Callable[[str, str], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.on_skip = on_skip
        self.parts: dict[str, float] = {}  # summed since the last entry of the log

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        for name, reason in inputs.pop("skipped", ()):
            self.on_skip(name, reason)
        return super()._prepare_inputs(inputs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Makes the optimizer: LoRA learns at `learning_rate`, everything else at `connector_learning_rate`."""
        if self.optimizer is None:
            named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            rates = {True: self.args.learning_rate, False: self.args.connector_learning_rate}
            groups = [
                {"params": [p for n, p in named if ("lora_" in n) is lora], "lr": rate} for lora, rate in rates.items()
            ]
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer([g for g in groups if g["params"]], **options)
        return self.optimizer

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """Notes the parts of the loss for the log."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            for name, value in outputs["losses"].items():
                self.parts[name] = self.parts.get(name, 0.0) + float(value.detach())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the share that every part has in the loss, over all processes and accumulated batches."""
        if "loss" in logs:
            everywhere = gather_object([self.parts])
            sums = {
                name: sum(parts.get(name, 0.0) for parts in everywhere) for name in sorted(set().union(*everywhere))
            }
            whole = sum(sums.values()) or 1.0
            logs |= {f"loss_{name}": logs["loss"] * value / whole for name, value in sums.items()}
            self.parts = {}
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.model.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        manifest = storage.read_manifest(resume_from_checkpoint)
        storage.check_base(manifest["base"], self.model.thinker, resume_from_checkpoint)
        storage.check_variant(manifest, self.model, resume_from_checkpoint)
        storage.load_weights(self.model, resume_from_checkpoint, manifest)


class RunCallback(TrainerCallback):
    """Times the steps, and marks a checkpoint as complete once all of its files are written."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Starts the clock."""
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stops it."""
        self.seconds.append(time.perf_counter() - self.started)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Marks the checkpoint."""
        if state.is_world_process_zero:
            storage.write_json(
                {"step": state.global_step}, Path(args.output_dir, f"checkpoint-{state.global_step}", COMPLETE)
            )


class StepCallback(TrainerCallback):
    """Tells the model its step, and brings the keep ratio down from 1 by a cosine over the first steps.

    The schedule is that of EViT (2202.07800) and TopK-AST (2504.01690).

    Args:
        model: whose `step` and `shrinkage` are set.
        shrink_steps: over which the ratio comes down; 0 for none.
    """

    def __init__(self, model: CompressedOmni, shrink_steps: int = 0) -> None:
        self.model = model
        self.shrink_steps = shrink_steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Warns if training ends before the ratio is what it is evaluated at."""
        if self.shrink_steps > state.max_steps:
            log.warning(
                "the keep ratio shrinks over %d steps, but training ends after %d", self.shrink_steps, state.max_steps
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Sets the step and the share of the way that is done."""
        self.model.step = state.global_step
        if self.shrink_steps:
            done = min(1.0, state.global_step / self.shrink_steps)
            self.model.shrinkage = (1 - math.cos(math.pi * done)) / 2


def last_checkpoint(folder: Path) -> Path | None:
    """Gives the newest complete checkpoint; incomplete ones are named in the log and passed over."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)
    for checkpoint in found:
        if (checkpoint / COMPLETE).is_file():
            return checkpoint
        log.warning("%s was not saved completely; passed over", checkpoint)
    return None
