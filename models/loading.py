"""Open a base model or a saved variant, with its processor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..compression import Compressor, build
from ..compression.base import LLMShape
from ..compression.registry import from_description
from . import parts, storage
from .fast import compile_layers, use_fast_attention
from .omni import CompressedOmni, check_compressor

OMNI_SMALL = "omni-small"


def load(
    name: str | os.PathLike[str],
    compressor: Compressor | str | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    video_compressor: Compressor | str | None = None,
    compile: bool = False,  # the name that users of transformers know
    **options: Any,
) -> tuple[CompressedOmni, Any]:
    """Opens a model with a compressor in its slot, and its processor.

    Args:
        name: "omni-small" (real, 160 M parameters, assembled on first use out of packages, and aligned where there are
            weights for that; "omni-small:unaligned" without them; "omni-small:hub" without them, out of the hub's
            unquantised weights), a path or hub name of a Qwen2.5-Omni checkpoint (its thinker alone is read), or
            a directory of `save_pretrained`.
        compressor: one built for the model's width, a method's name ("pooling", "stacking:slam-asr"), or None. A
            saved directory brings its own.
        base: for a saved directory, where its base model lies now. Default: where it lay.
        dtype: of the weights. Default: bfloat16 on a GPU, float32 on a CPU.
        device: Default: the GPU if there is one.
        video_compressor: the same for the video tokens: a training-free method that reads nothing else.
        compile: compile the layers that are slow without (see `compile_layers`), and have `generate` use a static
            cache: for many clips on a GPU. The first clip and the first answer then take a minute more.
        options: of the compressor named, as `keep_ratio=0.5`; of a saved variant, `keep_ratio` alone, for methods one
            set of weights of which serves several.

    Raises:
        ValueError: an unknown method or option, a damaged directory, or a base other than the saved variant's.
    """
    name, base = os.fspath(name), None if base is None else os.fspath(base)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    weight_dtype = dtype or (torch.bfloat16 if place.type == "cuda" else torch.float32)
    saved = storage.is_saved(name)
    if saved and (compressor is not None or options.keys() - {"keep_ratio"}):
        raise ValueError(f"{name} is a saved variant with its own compressor; give none, or another keep_ratio alone")
    if not saved and not isinstance(compressor, str) and options:
        raise ValueError(f"options {', '.join(options)} go with a compressor's name, got {compressor!r}")
    if not saved:
        thinker, processor = load_base(name, weight_dtype)
        use_fast_attention(thinker)
        if isinstance(compressor, str):
            compressor = build_for(thinker, compressor, **options)
        base = str(Path(name).resolve()) if Path(name).is_dir() else name
        if isinstance(video_compressor, str):
            video_compressor = build_for(thinker, video_compressor)
        model = CompressedOmni(thinker, compressor, video_compressor=video_compressor, base=base)
        return _placed(model, place, compile), processor

    manifest = storage.read_manifest(name)
    thinker, processor = load_base(base or manifest["base"]["name"], weight_dtype)
    storage.check_base(manifest["base"], thinker, name)
    use_fast_attention(thinker)
    method, video = (
        None if manifest[key] is None else from_description(manifest[key]) for key in ("compressor", "video_compressor")
    )
    named = {"base": base or manifest["base"]["name"], "positions": manifest["positions"]}
    model = CompressedOmni(thinker, method, video_compressor=video, **named)
    model.keep_ratios = tuple(manifest["keep_ratios"])
    if manifest["adapter"] is not None:
        model.add_adapter(**manifest["adapter"])
    if manifest["ctc"]:
        model.add_ctc(0.0)
    model.trains_projector = manifest["projector"]
    storage.load_weights(model, name, manifest)
    if options:
        if model.compressor is None:
            raise ValueError(f"{name} was saved without a compressor: there is no keep_ratio to change")
        model.compressor = model.compressor.at(**options)
    return _placed(model.requires_grad_(False), place, compile), processor


def _placed(model: CompressedOmni, place: torch.device, compile: bool) -> CompressedOmni:
    if compile:
        compile_layers(model.thinker)
        model.static_cache = place.type == "cuda"
    return model.to(place).eval()


def build_for(thinker: nn.Module, method: str, **options: Any) -> Compressor:
    """Builds a compressor of the sizes of a thinker; one with layers like the LLM's starts from those, in float32.

    Raises:
        ValueError: an unknown method or option, or one that the thinker's audio tower is not deep enough for.
    """
    text = thinker.config.get_text_config()
    compressor = build(
        method,
        hidden_size=thinker.get_input_embeddings().embedding_dim,
        encoder_size=parts.audio_tower(thinker).config.d_model,
        llm=LLMShape(
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_size=parts.head_size(text),
            mlp_size=text.intermediate_size,
            rope_theta=text.rope_parameters["rope_theta"],
            rope_sections=tuple(text.rope_parameters["mrope_section"]),
            norm_eps=text.rms_norm_eps,
        ),
        **options,
    )
    check_compressor(compressor, thinker)
    if not any(p.is_meta for p in compressor.parameters()):
        compressor.initialize(parts.language_model(thinker))
    return compressor


def is_omni_small(name: str) -> bool:
    """Tells whether `name` is "omni-small" or "omni-small:VARIANT"."""
    return name.partition(":")[0] == OMNI_SMALL


def weights_of(name: str) -> str | None:
    """Gives the sha256 that tells a model's weights from others of its name: a saved variant's, or omni-small's.

    None: of a checkpoint, and of what is only assembled.

    Raises:
        ValueError: the folder is a damaged variant.
    """
    if storage.is_saved(name):
        return str(storage.read_manifest(name)["sha256"])
    if name == OMNI_SMALL:
        from .omni_small import ALIGNMENT

        return None if ALIGNMENT is None else ALIGNMENT.sha256
    return None


def has_random_projector(model: CompressedOmni) -> bool:
    """Tells whether the audio projection is random until it is trained."""
    return is_omni_small(model.base) and storage.alignment(model.thinker) is None


def load_base(name: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Opens "omni-small", or a Qwen2.5-Omni checkpoint's thinker (no talker, no token2wav), and its processor.

    Raises:
        ValueError: the path or hub name holds no Qwen2.5-Omni checkpoint, or one that lacks weights; or see
            `open_omni_small`.
    """
    if is_omni_small(name):
        from .omni_small import open_omni_small

        thinker, processor = open_omni_small(name.partition(":")[2], dtype)
        return _resident(thinker), processor

    from transformers import AutoConfig, Qwen2_5OmniProcessor, Qwen2_5OmniThinkerForConditionalGeneration

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {name!r} is neither 'omni-small', nor a saved variant, nor a Qwen2.5-Omni checkpoint: {error}"
        ) from error
    if config.model_type not in ("qwen2_5_omni", "qwen2_5_omni_thinker"):
        raise ValueError(f"model {name!r} is a {config.model_type}, not a Qwen2.5-Omni checkpoint")
    thinker, report = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        name, dtype=dtype, output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):  # transformers would go on with random ones
        raise ValueError(f"{name} lacks {len(missing)} of the thinker's weights: {', '.join(missing[:3])} ...")
    processor = Qwen2_5OmniProcessor.from_pretrained(name)
    # Released checkpoints do not tell the thinker alone what ends an answer: without this it never stops.
    ends = {*storage.eos_ids(thinker), processor.tokenizer.eos_token_id}
    thinker.generation_config.eos_token_id = sorted(ends)
    thinker.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return _resident(thinker), processor


def _resident(thinker: nn.Module) -> nn.Module:
    """Copies weights that are mapped from their file into memory of our own.

    The system may drop mapped pages and read them from disk again: measured, the same step then takes 2 to 25 s.
    """
    for tensor in (*thinker.parameters(), *thinker.buffers()):
        tensor.data = tensor.data.clone()
    return thinker
