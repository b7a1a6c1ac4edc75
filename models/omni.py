"""A Qwen2.5-Omni thinker with a compressor between its audio tower and its LLM."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..compression import Compressor, Context, TokenStream
from ..compression.base import check_choice
from . import parts, storage
from .alignment import CTCAlignment
from .encoders import encode_audio, encode_image, encode_video
from .layout import Kind, Layout, TokenIds, audio_lengths
from .rewrite import IGNORE, POSITIONS, LLMInputs, rewrite, scatter

MEDIA = (
    "input_features",
    "feature_attention_mask",
    "pixel_values_videos",
    "video_grid_thw",
    "video_second_per_grid",
    "video_seconds",
    "pixel_values",
    "image_grid_thw",
    "audio_hidden",
)
PAIRS = (MEDIA[:2], MEDIA[2:4], MEDIA[6:8])
TRAINABLE = ("compressor", "adapter", "projector")


@dataclass
class OmniOutput(ModelOutput):
    """What `CompressedOmni.forward` returns.

    Args:
        loss: scalar, the mean over the labelled tokens, auxiliary losses added; None without labels.
        logits: `[B, L', vocabulary]`, or with labels `[n, vocabulary]` at the n labelled positions alone.
        losses: every part of the loss by name: `text`, `ctc`, and those of the method.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    losses: dict[str, Tensor] | None = None


class CompressedOmni(nn.Module):
    """The base thinker (frozen), a compressor, and optionally LoRA on the LLM and a trained audio projection.

    Args:
        thinker: transformers' `Qwen2_5OmniThinkerForConditionalGeneration`. It is used as it is: no method of it is
            replaced, and hooks are removed after each call.
        compressor: of the thinker's width; None for none.
        base: what `load_base` opens it by: "omni-small", a path or a hub name.
        positions: see `rewrite`.
    """

    def __init__(
        self,
        thinker: nn.Module,
        compressor: Compressor | None = None,
        *,
        base: str = "",
        positions: Literal["original", "contiguous"] = "original",
    ) -> None:
        super().__init__()
        hidden_size = thinker.get_input_embeddings().embedding_dim
        if compressor is not None and compressor.hidden_size != hidden_size:
            raise ValueError(f"the compressor was built for width {compressor.hidden_size}, the LLM has {hidden_size}")
        check_choice("positions", positions, POSITIONS)
        self.thinker = thinker.requires_grad_(False)
        self.compressor = compressor
        self.base = base
        self.positions = positions
        self.adapter: dict[str, Any] | None = None
        self.alignment: CTCAlignment | None = None
        self.ctc_weight = 0.0
        self.trains_projector = False
        self.token_ids = TokenIds.from_config(thinker.config)

    # What Trainer and its friends ask of a model.

    @property
    def config(self) -> Any:
        """The thinker's config."""
        return self.thinker.config

    @property
    def device(self) -> torch.device:
        """Where the LLM's embeddings live."""
        return self.thinker.get_input_embeddings().weight.device

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recomputes the LLM's layers in the backward pass.

        Non-reentrant, unless told otherwise: that form gives gradients also where no input of a layer needs one (LoRA
        over a frozen embedding), for which others call `enable_input_require_grads`.

        Args:
            activation_checkpointing_kwargs: of `torch.utils.checkpoint.checkpoint`.
            options: what else transformers' method of this name takes.
        """
        kwargs = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if kwargs["use_reentrant"]:
            self.thinker.enable_input_require_grads()
        if hasattr(self.thinker, "activation_checkpointing_enable"):
            self.thinker.activation_checkpointing_enable(kwargs, **options)
        else:  # the name before transformers 5.20
            self.thinker.gradient_checkpointing_enable(kwargs, **options)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Does the same, under the name Trainer called before."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    # What is trained.

    @property
    def projector(self) -> nn.Module:
        """The audio tower's own projection to the LLM's width."""
        return parts.audio_tower(self.thinker).proj

    def add_adapter(self, r: int = 16, alpha: int = 16, dropout: float = 0.05) -> None:
        """Puts LoRA on q, k, v, o, up and down of the LLM alone (Hu et al., LoRA, 2106.09685)."""
        from peft import LoraConfig

        self.adapter = {"r": r, "alpha": alpha, "dropout": dropout}
        config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=parts.LORA_TARGETS)
        parts.language_model(self.thinker).add_adapter(config)

    def add_ctc(self, weight: float) -> None:
        """Adds `weight` times the CTC loss of `CTCAlignment` in training."""
        self.ctc_weight = weight
        self.alignment = CTCAlignment(self.thinker.get_input_embeddings().embedding_dim).to(self.device)

    def set_trainable(self, names: set[str]) -> None:
        """Lets gradients flow into some of "compressor", "adapter" and "projector", and nowhere else.

        Raises:
            ValueError: an unknown name, or one of which this model has nothing to train.
        """
        unknown = names - set(TRAINABLE)
        if unknown:
            raise ValueError(f"trainable parts are {', '.join(TRAINABLE)}, got {', '.join(sorted(unknown))}")
        self.thinker.requires_grad_(False)
        self.trains_projector |= "projector" in names
        for name in TRAINABLE:
            wanted = name in names
            tensors = self.own_parameters(name)
            if wanted and not tensors:
                raise ValueError(f"there is no parameter in the {name} to train")
            for tensor in tensors.values():
                tensor.requires_grad_(wanted)
                if wanted:
                    tensor.data = tensor.data.float()  # what is trained is float32, whatever the base is

    def own_parameters(self, part: str) -> dict[str, Tensor]:
        """Gives the parameters of one part of `TRAINABLE`, or "alignment", by name."""
        if part == "adapter":
            llm = parts.language_model(self.thinker)
            return {name: p for name, p in llm.named_parameters() if "lora_" in name}
        module = getattr(self, part)
        return {} if module is None else dict(module.named_parameters())

    # The way of the data.

    def layout(self, input_ids: Tensor, attention_mask: Tensor | None = None, **media: Any) -> Layout:
        """Gives the layout of an uncompressed batch; see `Layout.build` and `forward` for the arguments."""
        _check_media(media)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        frames = media.get("feature_attention_mask")
        return Layout.build(
            input_ids,
            mask,
            self.token_ids,
            audio_lengths=[] if frames is None else audio_lengths(frames.sum(dim=1)),
            video_grid_thw=media.get("video_grid_thw"),
            image_grid_thw=media.get("image_grid_thw"),
            video_second_per_grid=media.get("video_second_per_grid"),
            video_seconds=media.get("video_seconds"),
        )

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        padding_side: Literal["left", "right"] = "right",
        **media: Any,
    ) -> tuple[LLMInputs, TokenStream | None]:
        """Runs towers, compressor and rewrite: gives what the LLM reads, and the compressed audio (None without any).

        Args:
            input_ids: `[B, L]`, padded on either side.
            attention_mask: `[B, L]`. Default: all ones.
            labels: `[B, L]`, -100 where nothing is to be learnt.
            padding_side: of the result.
            media: of the names in `MEDIA`, as the processor gives them.
        """
        layout = self.layout(input_ids, attention_mask, **media)
        embeds = self.thinker.get_input_embeddings()(input_ids)
        streams: dict[Kind, TokenStream] = {}
        audio = None
        if media.get("input_features") is not None:
            needs = self.compressor.needs if self.compressor is not None else frozenset()
            audio, context = encode_audio(
                self.thinker,
                media["input_features"],
                media["feature_attention_mask"],
                needs=needs,
                audio_hidden=media.get("audio_hidden"),
            )
            if self.compressor is None:
                embeds = scatter(embeds, layout, Kind.AUDIO, audio.embeds)
            else:
                audio = _run(self.compressor, audio, context)
                streams[Kind.AUDIO] = audio
        if media.get("pixel_values_videos") is not None:
            video = encode_video(self.thinker, media["pixel_values_videos"], media["video_grid_thw"])
            embeds = scatter(embeds, layout, Kind.VIDEO, video)
        if media.get("pixel_values") is not None:
            image = encode_image(self.thinker, media["pixel_values"], media["image_grid_thw"])
            embeds = scatter(embeds, layout, Kind.IMAGE, image)
        inputs = rewrite(embeds, layout, streams, labels, padding_side=padding_side, positions=self.positions)
        return inputs, audio

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        **media: Any,
    ) -> OmniOutput:
        """Computes logits, or with labels the loss.

        Args:
            input_ids: see `encode`.
            attention_mask: see `encode`.
            labels: see `encode`.
            logits_to_keep: without labels, compute logits for the last so many tokens alone; 0 for all.
            num_items_in_batch: what to divide summed losses by instead of this batch's labelled tokens (Trainer gives
                the count over all accumulated batches and processes).
            media: see `encode`.

        Raises:
            ValueError: no token of the batch is labelled, or an argument is unknown.
        """
        inputs, audio = self.encode(input_ids, attention_mask, labels, **media)
        hidden = parts.language_model(self.thinker)(
            inputs_embeds=inputs.embeds, attention_mask=inputs.mask, position_ids=inputs.positions, use_cache=False
        ).last_hidden_state
        head = self.thinker.get_output_embeddings()
        if inputs.labels is None:
            return OmniOutput(logits=head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden))

        target = inputs.labels[:, 1:]
        labelled = target != IGNORE
        count = int(labelled.sum())
        if count == 0:
            raise ValueError("no token of this batch is labelled: there is nothing to learn from it")
        logits = head(hidden[:, :-1][labelled])
        items = count if num_items_in_batch is None else num_items_in_batch
        losses = {"text": F.cross_entropy(logits.float(), target[labelled], reduction="sum") / items}
        if audio is not None:
            for name, value in audio.losses.items():
                losses[name] = value * (count / items)
            if self.training and self.alignment is not None:
                losses["ctc"] = self.ctc_weight * self._ctc(inputs, audio) / items
        return OmniOutput(loss=torch.stack(list(losses.values())).sum(), logits=logits, losses=losses)

    def ctc_loss(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **media: Any) -> Tensor:
        """Computes CTC alone, per labelled token, without running the LLM; see `forward` for the arguments.

        Raises:
            ValueError: `add_ctc` was not called, or the batch has no audio.
        """
        if self.alignment is None:
            raise ValueError("CTC needs `add_ctc` first")
        inputs, audio = self.encode(input_ids, attention_mask, labels, **media)
        if audio is None:
            raise ValueError("CTC needs audio, and this batch has none")
        return self._ctc(inputs, audio) / (labels != IGNORE).sum()

    def _ctc(self, inputs: LLMInputs, audio: TokenStream) -> Tensor:
        """Gives the summed CTC loss of every clip that is the only one of its sample, against that sample's labels."""
        assert self.alignment is not None
        assert inputs.labels is not None
        special = torch.tensor(storage.eos_ids(self.thinker), device=inputs.labels.device)
        heard = inputs.layout.kind == Kind.AUDIO.value
        targets = [inputs.labels.new_empty(0)] * len(audio.lengths)
        for labels, clip, is_audio in zip(inputs.labels, inputs.layout.clip, heard, strict=True):
            clips = clip[is_audio].unique().tolist()
            if len(clips) == 1:
                targets[clips[0]] = labels[(labels != IGNORE) & ~torch.isin(labels, special)]
        return self.alignment(audio, targets, self.thinker.get_input_embeddings().weight)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Generates answers with transformers' own `generate`, greedily unless told otherwise.

        Args:
            input_ids: `[B, L]` prompts, padded on either side.
            attention_mask: `[B, L]`.
            kwargs: media as in `encode`; everything else goes to transformers' `generate`.

        Returns:
            `[B, new]` generated ids, without the prompts.

        Raises:
            ValueError: a prompt does not end in text (there a next position could not be told from the last one).
        """
        media = {name: kwargs.pop(name) for name in MEDIA if name in kwargs}
        inputs, _ = self.encode(input_ids, attention_mask, padding_side="left", **media)
        last = inputs.positions[1:, :, -1]
        if bool((inputs.decode_offset + inputs.mask.sum(dim=1) != last + 1).any()):
            raise ValueError("every prompt must end in text: use the chat template with add_generation_prompt=True")
        greedy = {"do_sample": False, "repetition_penalty": 1.0, "temperature": None, "top_p": None, "top_k": None}
        return self.thinker.generate(
            inputs_embeds=inputs.embeds,
            attention_mask=inputs.mask,
            position_ids=inputs.positions,
            **({} if kwargs.get("do_sample") or "generation_config" in kwargs else greedy),
            **kwargs,
        )

    # Saved and loaded.

    def save_pretrained(self, directory: str | os.PathLike[str], **_: Any) -> None:
        """Saves compressor, adapter, trained projection and their config; the base stays where it is, by reference.

        The new weights are written beside what is there, and become the saved ones only when they are complete: a
        full disk leaves the directory as it was.
        """
        storage.save(self, directory)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], **kwargs: Any) -> CompressedOmni:
        """Opens what `save_pretrained` wrote; see `audiopress.load`, which also gives the processor."""
        from .loading import load

        storage.read_manifest(directory)  # `load` would take a directory without one for a base model
        return load(os.fspath(directory), **kwargs)[0]


def _run(compressor: Compressor, audio: TokenStream, context: Context) -> TokenStream:
    """Compresses in the precision of the compressor's own weights: trained ones stay float32 beside a bfloat16 base."""
    dtype = next((p.dtype for p in compressor.parameters()), audio.embeds.dtype)
    if context.encoder_hidden is not None:
        hidden = context.encoder_hidden
        context.encoder_hidden = hidden.replace(embeds=hidden.embeds.to(dtype))
    return compressor(audio.replace(embeds=audio.embeds.to(dtype)), context)


def _check_media(media: dict[str, Any]) -> None:
    unknown = sorted(set(media) - set(MEDIA))
    if unknown:
        raise TypeError(f"unknown argument {', '.join(unknown)}; the model takes {', '.join(MEDIA)}")
    for pair in PAIRS:
        missing = [name for name in pair if media.get(name) is None]
        if len(missing) == 1:
            raise ValueError(f"{' and '.join(pair)} go together, but {missing[0]} is missing")
