"""A Qwen2.5-Omni thinker with a compressor between its audio tower and its LLM."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.utils import ModelOutput

from ..compression import Compressor, Context, TokenStream
from ..compression.base import check_choice
from ..compression.checks import deferred_checks
from . import parts, storage
from .alignment import CTCAlignment
from .attention import biased_llm, enable_key_bias, rope_sections, size_bias
from .context import fill, prompt_index
from .encoders import encode_audio, encode_image, encode_video
from .layout import Kind, Layout, TokenIds, audio_lengths
from .rewrite import IGNORE, POSITIONS, LLMInputs, rewrite, scatter
from .static_cache import KeptCache, takes_static_cache

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
    "video_embeds",
)
ON_HOST = ("feature_attention_mask", "video_grid_thw", "video_second_per_grid", "video_seconds", "image_grid_thw")
PAIRS = (MEDIA[:2], MEDIA[2:4], MEDIA[6:8])
# Against what a checkpoint's own generation config may ask for; the last three are transformers' defaults.
GREEDY = {"do_sample": False, "repetition_penalty": 1.0, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
TRAINABLE = ("compressor", "adapter", "projector")


@dataclass
class OmniOutput(ModelOutput):
    """What `CompressedOmni.forward` returns.

    Args:
        loss: scalar, the mean over the labelled tokens, auxiliary losses added; None without labels.
        logits: `[B, L', vocabulary]`, or with labels `[n, vocabulary]` at the n labelled positions alone.
        losses: every part of the loss by name: `text`, `ctc`, and those of the method.
        tokens: of "audio" and "video", how many there were and how many the LLM reads.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    tokens: dict[str, tuple[int, int]] | None = None


class CompressedOmni(nn.Module):
    """The base thinker (frozen), a compressor, and optionally LoRA on the LLM and a trained audio projection.

    Args:
        thinker: transformers' `Qwen2_5OmniThinkerForConditionalGeneration`. It is used as it is: no method of it is
            replaced, and hooks are removed after each call. With proportional attention its config names an attention
            function of ours from the first call on; after `audiopress.load` from the start.
        compressor: of the thinker's width; None for none.
        video_compressor: a training-free method of stage "connector" that reads nothing else, for the video tokens.
        base: what `load_base` opens it by: "omni-small", a path or a hub name.
        positions: see `rewrite`.

    Attributes:
        static_cache: whether `generate` takes a static cache where it can; `load(..., compile=True)` sets it.
    """

    def __init__(
        self,
        thinker: nn.Module,
        compressor: Compressor | None = None,
        *,
        video_compressor: Compressor | None = None,
        base: str = "",
        positions: Literal["original", "contiguous"] = "original",
    ) -> None:
        super().__init__()
        if compressor is not None:
            check_compressor(compressor, thinker)
        if video_compressor is not None:
            check_video_compressor(video_compressor, compressor, thinker.get_input_embeddings().embedding_dim)
        check_choice("positions", positions, POSITIONS)
        self.thinker = thinker.requires_grad_(False)
        self.compressor = compressor
        self.video_compressor = video_compressor
        self.keep_ratios: tuple[float, ...] = ()
        self.seed = 0
        self.step = 0  # of training: what is drawn at random is drawn anew at every step
        self.shrinkage = 1.0  # how far a schedule of training has brought the ratio down from 1
        self.base = base
        self.positions = positions
        self.adapter: dict[str, Any] | None = None
        self.alignment: CTCAlignment | None = None
        self.ctc_weight = 0.0
        self.trains_projector = False
        self.token_ids = TokenIds.from_config(thinker.config)
        self.static_cache = False
        self._cache = KeptCache()

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
        from peft import LoraConfig, inject_adapter_in_model

        self.adapter = {"r": r, "alpha": alpha, "dropout": dropout}
        config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=parts.LORA_TARGETS)
        # Not by transformers' `add_adapter`, which does this too but refuses every PEFT older than the very newest.
        inject_adapter_in_model(config, parts.language_model(self.thinker))

    def remove_adapter(self) -> None:
        """Takes LoRA out of the LLM again, if it is there: its modules are those from before."""
        language_model = parts.language_model(self.thinker)
        if self.adapter is not None:
            for name, module in list(language_model.named_modules()):
                if hasattr(module, "base_layer"):
                    language_model.set_submodule(name, module.base_layer)
            del language_model.peft_config
            self.adapter = None

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
        """Gives the parameters of one part of `TRAINABLE`, or "alignment", by name; none that a method keeps frozen."""
        if part == "adapter":
            llm = parts.language_model(self.thinker)
            return {name: p for name, p in llm.named_parameters() if "lora_" in name}
        module = getattr(self, part)
        if module is None:
            return {}
        frozen = module.frozen if part == "compressor" else frozenset()
        return {name: p for name, p in module.named_parameters() if name not in frozen}

    def set_keep_ratios(self, keep_ratios: Sequence[float]) -> None:
        """Trains for several ratios at once: every step of training draws one (Matryoshka-style, 2503.06362).

        Outside training the compressor's own ratio holds; `model.compressor = model.compressor.at(0.25)` changes it.

        Raises:
            ValueError: there is no compressor, or its weights depend on the ratio.
        """
        if self.compressor is None:
            raise ValueError("keep_ratios need a compressor")
        for keep_ratio in keep_ratios:
            self.compressor.at(keep_ratio)
        self.keep_ratios = tuple(keep_ratios)

    def drawn_compressor(self) -> Compressor | None:
        """Gives the compressor; in training at the one of `keep_ratios` that `seed` and `step` draw, and as far down
        from 1 as `shrinkage` says.
        """
        if not self.training or self.compressor is None or not (self.keep_ratios or self.shrinkage < 1):
            return self.compressor
        ratios = self.keep_ratios or (self.compressor.config.keep_ratio,)
        return self.compressor.at(shrunk(self._draw("ratio").choice(ratios), self.shrinkage))

    def drawn_seed(self) -> int:
        """Gives the seed of methods that draw at random: in training another one for every step."""
        return self._draw("seed").getrandbits(31) if self.training else self.seed

    def _draw(self, what: str) -> random.Random:
        """Gives the generator of this step: the same for all batches of a step, in all processes, and when resumed."""
        return random.Random(f"{what} {self.seed} {self.step}")

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
        """Runs towers, compressor and rewrite: gives what the LLM reads, and the compressed tokens (None without any).

        Args:
            input_ids: `[B, L]`, padded on either side.
            attention_mask: `[B, L]`. Default: all ones.
            labels: `[B, L]`, -100 where nothing is to be learnt.
            padding_side: of the result.
            media: of the names in `MEDIA`, as the processor gives them. Towers are frozen, so what they gave before may
                be given again: `audio_hidden`, what `hidden_audio` gave for these clips, and `video_embeds`, what
                `encode_video` gave. The features and pixels beside them are then not read, and may be of no rows.
        """
        with deferred_checks():
            return self._encode(input_ids, attention_mask, labels, padding_side, media)

    def _encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        padding_side: Literal["left", "right"],
        media: dict[str, Any],
    ) -> tuple[LLMInputs, TokenStream | None]:
        """Does the work for `encode`. What decides shapes is read first: later, reading waits for the towers."""
        media |= {name: media[name].cpu() for name in ON_HOST if isinstance(media.get(name), Tensor)}
        layout = self.layout(input_ids, attention_mask, **media)
        ids, answers = input_ids.cpu(), None if labels is None else labels.cpu()
        embeds = self.thinker.get_input_embeddings()(input_ids)
        streams: dict[Kind, TokenStream] = {}
        if media.get("pixel_values") is not None:
            grid = media["image_grid_thw"]
            image = encode_image(self.thinker, media["pixel_values"], grid)
            embeds = scatter(embeds, layout, Kind.IMAGE, image)
        if media.get("pixel_values_videos") is not None:
            grid = media["video_grid_thw"]
            video = media.get("video_embeds")
            if video is None:
                video = encode_video(self.thinker, media["pixel_values_videos"], grid)
            streams[Kind.VIDEO] = TokenStream(video, tuple((grid.prod(dim=1) // self.token_ids.merge**2).tolist()))
        compressor = self.drawn_compressor()
        in_tower, after = (None, None) if compressor is None else compressor.split()
        needs = frozenset() if after is None else after.needs
        context = Context()
        if media.get("input_features") is not None:
            streams[Kind.AUDIO], context = encode_audio(
                self.thinker,
                media["input_features"],
                media["feature_attention_mask"],
                needs=needs,
                audio_hidden=media.get("audio_hidden"),
                method=in_tower,  # type: ignore[arg-type]
            )
        joint = after is not None and after.stage == "joint" and bool(streams)
        for kind, stream in streams.items():  # `rewrite` would put them in their places, but here they are read there
            if joint or (kind == Kind.VIDEO and "video" in needs):
                embeds = scatter(embeds, layout, kind, stream.embeds)
        if self.video_compressor is not None and Kind.VIDEO in streams:
            streams[Kind.VIDEO] = _run(self.video_compressor, streams[Kind.VIDEO], Context(seed=self.drawn_seed()))
        pool = None
        if after is not None and (joint or Kind.AUDIO in streams):
            if "seed" in needs:
                context.seed = self.drawn_seed()
            fill(
                context,
                needs,
                joint=joint,
                thinker=self.thinker,
                input_ids=ids,
                embeds=embeds,
                layout=layout,
                labels=answers,
                ids=self.token_ids,
                ends=storage.eos_ids(self.thinker),
            )
            if joint:
                index, lengths = layout.joint_index()
                flat = embeds.flatten(0, 1)
                pool, streams = _run(after, TokenStream(flat[index], lengths), context), {}
                if pool.prompt is not None:
                    rows, _ = prompt_index(layout, answers)
                    embeds = flat.index_copy(0, rows, pool.prompt.to(flat.dtype)).view_as(embeds)
            else:
                streams[Kind.AUDIO] = _run(after, streams[Kind.AUDIO], context)
        inputs = rewrite(
            embeds, layout, streams, labels, joint=pool, padding_side=padding_side, positions=self.positions
        )
        return inputs, streams.get(Kind.AUDIO) if pool is None else pool

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
        with deferred_checks():
            return self._forward(input_ids, attention_mask, labels, logits_to_keep, num_items_in_batch, media)

    def _forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        logits_to_keep: int,
        num_items_in_batch: Tensor | int | None,
        media: dict[str, Any],
    ) -> OmniOutput:
        inputs, stream = self.encode(input_ids, attention_mask, labels, **media)
        with self.services(inputs) as language_model:
            hidden = language_model(
                inputs_embeds=inputs.embeds, attention_mask=inputs.mask, position_ids=inputs.positions, use_cache=False
            ).last_hidden_state
        tokens = {kind.name.lower(): inputs.count(kind) for kind in (Kind.AUDIO, Kind.VIDEO)}
        head = self.thinker.get_output_embeddings()
        if inputs.labels is None:
            return OmniOutput(logits=head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden), tokens=tokens)

        target = inputs.labels[:, 1:]
        labelled = target != IGNORE
        count = int(labelled.sum())
        if count == 0:
            raise ValueError("no token of this batch is labelled: there is nothing to learn from it")
        logits = head(hidden[:, :-1][labelled])
        items = count if num_items_in_batch is None else num_items_in_batch
        losses = {"text": F.cross_entropy(logits.float(), target[labelled], reduction="sum") / items}
        if stream is not None:
            for name, value in stream.losses.items():
                losses[name] = value * (count / items)
        if self.training and self.alignment is not None and tokens["audio"][1]:
            losses["ctc"] = self.ctc_weight * self._ctc(inputs) / items
        return OmniOutput(loss=torch.stack(list(losses.values())).sum(), logits=logits, losses=losses, tokens=tokens)

    def services(self, inputs: LLMInputs) -> AbstractContextManager[nn.Module]:
        """Gives the LLM, doing what the methods ask of it: proportional attention, other rotary sections."""
        return self.reading(self.key_bias(inputs))

    @contextmanager
    def reading(self, key_bias: Tensor | None) -> Iterator[nn.Module]:
        """Gives the LLM with a bias `[B, L']` on its keys, and the rotary sections that the method asks for."""
        language_model = parts.language_model(self.thinker)
        sections = None if self.compressor is None else self.compressor.rope_sections
        with biased_llm(language_model, key_bias), rope_sections(language_model, sections):
            yield language_model

    def key_bias(self, inputs: LLMInputs) -> Tensor | None:
        """Gives the bias of proportional attention on every key, `[B, L']`; None where no method asks for it."""
        methods = {Kind.AUDIO: self.compressor, Kind.VIDEO: self.video_compressor}
        if self.compressor is not None and self.compressor.stage == "joint":
            methods[Kind.VIDEO] = self.compressor
        asking = [
            kind.value for kind, method in methods.items() if method is not None and method.proportional_attention
        ]
        if not asking:
            return None
        enable_key_bias(parts.language_model(self.thinker).config)
        merged = torch.stack([inputs.layout.kind == kind for kind in asking]).any(dim=0)
        return size_bias(inputs.sizes, merged)

    def ctc_loss(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **media: Any) -> Tensor:
        """Computes CTC alone, per labelled token, without running the LLM; see `forward` for the arguments.

        Raises:
            ValueError: `add_ctc` was not called, or the batch has no audio.
        """
        if self.alignment is None:
            raise ValueError("CTC needs `add_ctc` first")
        inputs, _ = self.encode(input_ids, attention_mask, labels, **media)
        if not inputs.count(Kind.AUDIO)[1]:
            raise ValueError("CTC needs audio, and this batch has none")
        return self._ctc(inputs) / (labels != IGNORE).sum()

    def _ctc(self, inputs: LLMInputs) -> Tensor:
        """Gives the summed CTC loss of every clip that is the only one of its sample, against that sample's labels."""
        assert self.alignment is not None
        assert inputs.labels is not None
        special = torch.tensor(storage.eos_ids(self.thinker), device=inputs.labels.device)
        heard = inputs.layout.kind == Kind.AUDIO.value
        clips = 1 + int(inputs.before.clip[inputs.before.kind == Kind.AUDIO.value].max())
        lengths = torch.bincount(inputs.layout.clip[heard], minlength=clips).tolist()
        audio = TokenStream(inputs.embeds[heard], tuple(lengths))
        targets = [inputs.labels.new_empty(0)] * clips
        for labels, clip, is_audio in zip(inputs.labels, inputs.layout.clip, heard, strict=True):
            own = clip[is_audio].unique().tolist()
            if len(own) == 1:
                targets[own[0]] = labels[(labels != IGNORE) & ~torch.isin(labels, special)]
        return self.alignment(audio, targets, self.thinker.get_input_embeddings().weight)

    def check_prompts(self, inputs: LLMInputs) -> None:
        """Raises ValueError where a prompt does not end in text: there a next position cannot be told from the last."""
        if self.positions == "original" and not inputs.before.ends_in_text():
            raise ValueError("every prompt must end in text: use the chat template with add_generation_prompt=True")

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Generates answers with transformers' own `generate`, greedily unless told otherwise.

        With a static cache (`cache_implementation="static"`, or `static_cache`) transformers compiles a step of
        decoding on a GPU, which takes half a minute once and then a third of the time per token. The cache has room for
        a whole number of `static_cache.BUCKET` tokens, is kept and used again, so that another prompt compiles nothing.
        For that `max_new_tokens` must be given, and nothing but one sequence per prompt be asked for.

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
        # Drawing from NaN stops a GPU for good: where there may be sampling, `encode` makes its checks itself.
        sampling = kwargs.get("do_sample") or "generation_config" in kwargs
        with nullcontext() if sampling else deferred_checks():
            return self._generate(input_ids, attention_mask, media, kwargs)

    def _generate(
        self, input_ids: Tensor, attention_mask: Tensor | None, media: dict[str, Any], kwargs: dict[str, Any]
    ) -> Tensor:
        inputs, _ = self.encode(input_ids, attention_mask, padding_side="left", **media)
        self.check_prompts(inputs)
        if "generation_config" not in kwargs:
            mixed = torch.is_autocast_enabled(inputs.embeds.device.type)  # keys and values then differ in type
            if takes_static_cache(kwargs, self.static_cache and not mixed):
                kwargs.pop("cache_implementation", None)
                text = self.config.get_text_config(decoder=True)
                kwargs["past_key_values"] = self._cache.emptied(text, inputs.embeds, kwargs["max_new_tokens"])
            # Made here, because `generate` would first build the whole config anew, to compare: 20 ms.
            config = GenerationConfig()
            others = config.update(**({} if kwargs.get("do_sample") else GREEDY) | kwargs)
            kwargs = others | {"generation_config": config}
        with self.services(inputs):
            return self.thinker.generate(
                inputs_embeds=inputs.embeds, attention_mask=inputs.mask, position_ids=inputs.positions, **kwargs
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


def shrunk(keep_ratio: float, shrinkage: float) -> float:
    """Gives the ratio that is `shrinkage` of the way from 1 down to `keep_ratio`; all the way is that one exactly."""
    return keep_ratio + (1 - shrinkage) * (1 - keep_ratio)


def tokens_left(compressor: Compressor | None, video_compressor: Compressor | None, audio: int, video: int) -> int:
    """Gives how many tokens the LLM reads of one clip's audio and one video (the most, of adaptive methods)."""
    if compressor is not None and compressor.stage == "joint":
        return compressor.budget([audio + video])[0]
    counts = ((compressor, audio), (video_compressor, video))
    return sum(n if method is None else method.budget([n])[0] for method, n in counts)


def _run(compressor: Compressor, stream: TokenStream, context: Context) -> TokenStream:
    """Compresses in the precision of the compressor's own weights: trained ones stay float32 beside a bfloat16 base."""
    dtype = next((p.dtype for p in compressor.parameters()), stream.embeds.dtype)

    def cast(tokens: TokenStream) -> TokenStream:
        return tokens.replace(embeds=tokens.embeds.to(dtype))

    for name in ("encoder_hidden", "encoder_keys", "question", "video"):
        if (tokens := getattr(context, name)) is not None:
            setattr(context, name, cast(tokens))
    if context.prompt is not None:
        context.prompt = replace(context.prompt, stream=cast(context.prompt.stream))
    return compressor(cast(stream), context)


def check_compressor(method: Compressor, thinker: nn.Module) -> None:
    """Raises ValueError unless `method` is of the thinker's width, and acts in layers that its audio tower has."""
    hidden_size = thinker.get_input_embeddings().embedding_dim
    if method.hidden_size != hidden_size:
        raise ValueError(f"the compressor was built for width {method.hidden_size}, the LLM has {hidden_size}")
    in_tower, _ = method.split()
    if in_tower is not None:
        in_tower.encoder_layers(len(parts.audio_tower(thinker).layers))  # type: ignore[operator]


def check_video_compressor(method: Compressor, other: Compressor | None, hidden_size: int) -> None:
    """Raises ValueError unless `method` can stand for the video tokens beside the compressor `other`."""
    if method.stage != "connector" or method.needs - {"seed"} or method.trained:
        raise ValueError(f"video tokens take a training-free method that reads them alone, got {method.name}")
    if method.hidden_size != hidden_size:
        raise ValueError(f"the video compressor was built for width {method.hidden_size}, the LLM has {hidden_size}")
    if other is not None and other.stage == "joint":
        raise ValueError(f"{other.name} reduces video itself: give no video compressor beside it")


def _check_media(media: dict[str, Any]) -> None:
    unknown = sorted(set(media) - set(MEDIA))
    if unknown:
        raise TypeError(f"unknown argument {', '.join(unknown)}; the model takes {', '.join(MEDIA)}")
    for pair in PAIRS:
        missing = [name for name in pair if media.get(name) is None]
        if len(missing) == 1:
            raise ValueError(f"{' and '.join(pair)} go together, but {missing[0]} is missing")
