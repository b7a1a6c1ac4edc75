"""The model that `align.py` trains: its changes in float32, the losses, and a step of the optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import WhisperFeatureExtractor

from audiopress.benchmarks.alignment.batch import Batch, Clips, log_mel, patches
from audiopress.compression import TokenStream
from audiopress.kernels.packed import upload
from audiopress.models import delta, parts
from audiopress.models.alignment import CTCAlignment
from audiopress.models.encoders import encode_audio, encode_video
from audiopress.models.rewrite import IGNORE

# All guesses, but for the weight of CTC, which a first run of other code found useful.
RANK = 48  # of the sums; what 25 MB have room for
RATES = {"llm": 1e-3, "audio": 1e-3, "vision": 5e-4, "heads": 2e-3}  # of Adam, at their peak
VECTOR_RATE = 0.2  # of its part's: norms and biases stand in every row's way
CTC_WEIGHT = 0.5
NAME_WEIGHT, NAME_TEMPERATURE = 0.5, 15.0
CLOCK_WEIGHT, CLOCK_LAYER, CLOCK_WIDTH = 0.3, 1 / 2, 1.0  # the layer as a share of the depth; percent
CLOCK_PLACES = 2048  # of a batch, at which the clock is read
NOW_WEIGHT = 0.3
HEADS = ("ctc", "clock", "now")
GARBLED = 0.15  # of a transcript's tokens: what the LLM reads as said so far is another one, so that it must listen
MEL_MASKS = ((2, 12), (2, 25))  # (how many, the widest) of bins and of frames (10 ms), as in SpecAugment (1904.08779)


@dataclass
class LowRank:
    """Matrices of one part and shape, all of whose sums are computed at once.

    Args:
        names: of each.
        parameters: what the model computes with.
        base: as they were, `[n, out, in]`.
        up: `[n, out, r]`, zero at first.
        down: `[n, r, in]`.
    """

    names: list[str]
    parameters: list[nn.Parameter]
    base: Tensor
    up: Tensor
    down: Tensor


class Changes:
    """All that is trained, in float32 beside a model in any precision.

    The model's own parameters are written before a step (`write`) and their gradients collected after it (`collect`),
    so that the model is run as it is, at full speed.

    Args:
        thinker: the base model; its trainable parameters get gradients from now on.
        rank: of the sums.
    """

    def __init__(self, thinker: nn.Module, rank: int = RANK) -> None:
        thinker.requires_grad_(False)
        self.whole: dict[str, tuple[nn.Parameter, Tensor]] = {}
        groups: dict[tuple[str, torch.Size], list[tuple[str, nn.Parameter]]] = {}
        for name, parameter, low_rank in delta.trainable(thinker):
            parameter.requires_grad_(True)
            if low_rank:
                groups.setdefault((name.partition(".")[0], parameter.shape), []).append((name, parameter))
            else:
                self.whole[name] = parameter, parameter.detach().float().clone().requires_grad_(True)
        self.low_rank = [self._group(members, rank) for members in groups.values()]
        self.sums: list[Tensor] = []

    def _group(self, members: list[tuple[str, nn.Parameter]], rank: int) -> LowRank:
        base = torch.stack([parameter.detach().float() for _, parameter in members])
        n, rows, columns = base.shape
        rank = min(rank, rows, columns)
        up = base.new_zeros(n, rows, rank).requires_grad_(True)
        bound = 1 / math.sqrt(columns)  # as LoRA's first matrix in peft
        down = base.new_empty(n, rank, columns).uniform_(-bound, bound).requires_grad_(True)
        return LowRank([name for name, _ in members], [parameter for _, parameter in members], base, up, down)

    def groups(self) -> list[dict[str, Any]]:
        """Gives the optimizer's groups, each with its peak rate."""
        by_rate: dict[float, list[Tensor]] = {}
        for group in self.low_rank:
            by_rate.setdefault(RATES[group.names[0].partition(".")[0]], []).extend((group.up, group.down))
        for name, (_, own) in self.whole.items():
            rate = RATES[name.partition(".")[0]] * (VECTOR_RATE if own.ndim == 1 and "vision" not in name else 1)
            by_rate.setdefault(rate, []).append(own)
        return [{"params": tensors, "peak": rate} for rate, tensors in by_rate.items()]

    def write(self) -> None:
        """Puts the present values into the model."""
        self.sums = [torch.baddbmm(group.base, group.up, group.down) for group in self.low_rank]
        with torch.no_grad():
            for group, sums in zip(self.low_rank, self.sums, strict=True):
                torch._foreach_copy_([p.data for p in group.parameters], list(sums))
            pairs = list(self.whole.values())
            torch._foreach_copy_([p.data for p, _ in pairs], [own for _, own in pairs])

    def collect(self) -> None:
        """Takes the gradients out of the model; parts that were not run have none."""
        roots, gradients = [], []
        for group, sums in zip(self.low_rank, self.sums, strict=True):
            if group.parameters[0].grad is not None:
                roots.append(sums)
                gradients.append(torch.stack([p.grad for p in group.parameters]).float())
        if roots:
            torch.autograd.backward(roots, gradients)
        for parameter, own in self.whole.values():
            own.grad = None if parameter.grad is None else parameter.grad.float()
        for parameter in (*(p for g in self.low_rank for p in g.parameters), *(p for p, _ in self.whole.values())):
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Gives what `delta.apply` takes."""
        found = {name: own for name, (_, own) in self.whole.items()}
        for group in self.low_rank:
            for name, up, down in zip(group.names, group.up, group.down, strict=True):
                found |= {name + delta.UP: up, name + delta.DOWN: down}
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes on from earlier values."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])


class Aligner(nn.Module):
    """The losses of a batch.

    Args:
        thinker: the model, on its device.
        extractor: of the processor.
        names: `[n, D]`, what stands for each thing that may be heard or seen; see `name_vectors`.
    """

    def __init__(self, thinker: nn.Module, extractor: WhisperFeatureExtractor, names: Tensor) -> None:
        super().__init__()
        self.thinker, self.extractor = thinker, extractor
        self.llm = parts.language_model(thinker)
        width = names.shape[1]
        self.ctc = CTCAlignment(width).to(names.device)
        self.clock = nn.Linear(width, 200, device=names.device)
        self.now = nn.Linear(width, 2 * (len(names) + 1), device=names.device)  # heard, seen; the first one is nothing
        self.names = names
        self.middle: list[Tensor] = []
        layer = self.llm.layers[round(CLOCK_LAYER * len(self.llm.layers))]
        layer.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.middle = [output if isinstance(output, Tensor) else output[0]]

    def heads(self) -> dict[str, nn.Parameter]:
        """Gives what is trained beside the model, and dropped afterwards."""
        return {name: p for part in HEADS for name, p in getattr(self, part).named_parameters(prefix=part)}

    @torch.no_grad()
    def load_heads(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes on from earlier ones."""
        for name, parameter in self.heads().items():
            parameter.copy_(tensors[name])

    def forward(self, batch: Batch, towers_only: bool) -> dict[str, Tensor]:
        """Gives the losses, weighted, by name: the answers' (`text`), of speech `ctc`, of clips those below.

        `name` is the towers'; `clock`, `heard` and `seen` are told from the states of a layer in the LLM's middle.

        Args:
            batch: of utterances or of clips.
            towers_only: without those that need the LLM.
        """
        rows, clips = len(batch.ids), batch.clips
        sound = self.hear(batch)
        media = [(batch.audio, sound)]
        if clips is None:
            losses = {"ctc": CTC_WEIGHT * self._ctc(sound, batch)}
        else:
            media.append((clips.video, pictures := self.see(clips)))
            losses = {"name": NAME_WEIGHT * self._names(sound, pictures, clips)}
        if towers_only:
            return losses
        ids = garbled(batch, self.thinker.get_input_embeddings().num_embeddings) if self.training else batch.ids
        embeds = self.thinker.get_input_embeddings()(ids)
        for places, tokens in media:
            embeds = embeds.index_copy(1, places, tokens)
        positions = batch.positions[:, None].expand(-1, rows, -1)
        hidden = self.llm(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
        row, at = (batch.labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
        logits = self.thinker.get_output_embeddings()(_at(hidden, row, at))
        losses["text"] = F.cross_entropy(logits.float(), upload(batch.labels[row, at + 1], hidden.device))
        if clips is not None:
            losses["clock"] = CLOCK_WEIGHT * self._clock(self.middle[0], clips)
            losses |= {name: NOW_WEIGHT * loss for name, loss in self._now(self.middle[0], clips).items()}
        self.middle = []
        return losses

    def hear(self, batch: Batch) -> Tensor:
        """Gives the tokens of the sounds, `[B, Na, D]`."""
        rows = len(batch.ids)
        mel = log_mel(batch.waves, self.extractor)
        if self.training:
            mel = masked(mel)
        mask = torch.ones(rows, mel.shape[2], dtype=torch.long)
        return encode_audio(self.thinker, mel, mask)[0].embeds.unflatten(0, (rows, -1))

    def see(self, clips: Clips) -> Tensor:
        """Gives the tokens of the pictures, `[B, Nv, D]`."""
        return encode_video(self.thinker, *patches(clips.frames)).unflatten(0, (len(clips.frames), -1))

    def _ctc(self, sound: Tensor, batch: Batch) -> Tensor:
        """Gives CTC per token said."""
        rows, length, _ = sound.shape
        stream = TokenStream(sound.flatten(0, 1), (length,) * rows)
        loss = self.ctc(stream, batch.answers, self.thinker.get_input_embeddings().weight)
        return loss / sum(map(len, batch.answers))

    def _names(self, sound: Tensor, pictures: Tensor, clips: Clips) -> Tensor:
        """Gives the cross-entropy of what is heard or seen in the time of each mark, by the cosine to its name.

        It is told from one token, drawn anew every time: the LLM looks at tokens, not at their mean.
        """
        losses = []
        for tokens, heard, each in ((sound, True, 1), (pictures, False, clips.per_group)):
            own = [mark for mark in clips.marks if mark.heard == heard]
            if not own:
                continue
            row, start, end, name = torch.tensor([[m.row, m.start * each, m.end * each, m.name] for m in own]).T
            at = (start + torch.rand(len(own)) * (end - start)).long().minimum(end - 1)
            told = F.normalize(_at(tokens, row, at).float(), dim=1) @ F.normalize(self.names, dim=1).T
            losses.append(F.cross_entropy(NAME_TEMPERATURE * told, upload(name, told.device)))
        return torch.stack(losses).mean()

    def _clock(self, hidden: Tensor, clips: Clips) -> Tensor:
        """Gives the cross-entropies of two percents of the clip, told from a layer's states: now, and what began when.

        So an answer finds in the last token of what it is asked about both of its times.
        """
        now = clips.percent.expand(hidden.shape[:2])
        losses = []
        for times, part in ((now, slice(0, 100)), (clips.began, slice(100, 200))):
            row, at = times.isfinite().nonzero(as_tuple=True)
            chosen = torch.randint(len(row), (min(len(row), CLOCK_PLACES),))
            row, at = row[chosen], at[chosen]
            true = upload(times[row, at, None], hidden.device, times.dtype)
            away = torch.arange(100, device=hidden.device) + 0.5 - true
            target = (-0.5 * (away / CLOCK_WIDTH).square()).softmax(dim=1)
            losses.append(F.cross_entropy(self.clock(_at(hidden, row, at).float())[:, part], target))
        return torch.stack(losses).sum()

    def _now(self, hidden: Tensor, clips: Clips) -> dict[str, Tensor]:
        """Gives the cross-entropies of what is `heard` and `seen` just before each timestamp, told from its state.

        An answer alone hardly teaches the LLM to look at pictures; timestamps do so all along a clip, and they say
        what an answer asks for: what was when.
        """
        rows, stamps, _ = clips.now.shape
        row = torch.arange(rows).repeat_interleave(stamps)
        told = self.now(_at(hidden, row, clips.stamps.repeat(rows)).float()).unflatten(1, (2, -1))
        true = upload(clips.now.flatten(0, 1), told.device)
        return {name: F.cross_entropy(told[:, i], true[:, i]) for i, name in enumerate(("heard", "seen"))}


def _at(hidden: Tensor, row: Tensor, at: Tensor) -> Tensor:
    """Gives the states of `[B, L, D]` at places known on the CPU, `[n, D]`."""
    return hidden.flatten(0, 1)[upload(row * hidden.shape[1] + at, hidden.device)]


def name_vectors(names: list[str], tokenizer: Any, embedding: Tensor) -> Tensor:
    """Gives the mean embedding of each name's tokens, less the mean of all, `[n, D]` float32."""
    ids = tokenizer([f" {name}" for name in names], add_special_tokens=False)["input_ids"]
    vectors = torch.stack([embedding[torch.tensor(i, device=embedding.device)].float().mean(dim=0) for i in ids])
    return (vectors - vectors.mean(dim=0)).detach()


def garbled(batch: Batch, vocabulary: int) -> Tensor:
    """Gives the ids of a batch with some of its transcripts' replaced by any; those of clips as they are."""
    if batch.clips is not None:
        return batch.ids
    chosen = (batch.labels != IGNORE) & (torch.rand(batch.labels.shape) < GARBLED)
    return batch.ids.where(~upload(chosen, batch.ids.device, torch.bool), torch.randint_like(batch.ids, vocabulary))


def masked(mel: Tensor) -> Tensor:
    """Blanks bands of bins and of frames, others in each row of `[B, mel, frames]`."""
    for axis, (count, widest) in zip((1, 2), MEL_MASKS, strict=True):
        size, rows = mel.shape[axis], len(mel)
        at = torch.arange(size, device=mel.device)
        for _ in range(count):
            width = torch.rand(rows, 1, device=mel.device) * widest
            start = torch.rand(rows, 1, device=mel.device) * (size - width)
            hidden = (at >= start) & (at < start + width)
            mel = mel.masked_fill(hidden.unsqueeze(3 - axis), 0)
    return mel


class Steps:
    """The optimizer.

    Args:
        aligner: of the model.
        changes: to its weights.
    """

    def __init__(self, aligner: Aligner, changes: Changes) -> None:
        self.aligner, self.changes = aligner, changes
        groups = [*changes.groups(), {"params": list(aligner.heads().values()), "peak": RATES["heads"]}]
        self.tensors = [tensor for group in groups for tensor in group["params"]]
        fused = self.tensors[0].is_cuda
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=fused)

    def __call__(self, batch: Batch, scale: float, towers_only: bool) -> dict[str, Tensor]:
        """Makes a step.

        Args:
            batch: to learn from.
            scale: of the rates.
            towers_only: see `Aligner`.

        Returns:
            The losses, on the device.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = scale * group["peak"]
        self.changes.write()
        losses = self.aligner(batch, towers_only)
        torch.stack(list(losses.values())).sum().backward()
        self.changes.collect()
        torch.nn.utils.clip_grad_norm_(self.tensors, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {name: loss.detach() for name, loss in losses.items()}
