"""What training changed in a base model, stored small: sums of low rank for matrices, the rest whole, in 8 bits.

A file of 25 MB then holds what 160 M parameters have learned: the matrices of the LLM and of the audio tower get a
low-rank sum each (Hu et al., LoRA, 2106.09685); their vectors, the audio projection and the vision tower, which is
random in omni-small, are replaced. A row of a matrix is 8-bit integers and one scale; vectors are float16.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import parts

UP, DOWN, SCALE = ":up", ":down", ":scale"
LEVELS = 127  # of an 8-bit integer, on either side of 0


def trainable(thinker: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Gives name and parameter of all that may change, and whether by a low-rank sum.

    Names begin with `audio.`, `vision.` or `llm.` and go on as inside that part, as paths before it differ between
    releases of transformers. The embeddings and the audio tower's convolutions stay.
    """
    for name, parameter in parts.audio_tower(thinker).named_parameters():
        if not name.startswith(("conv", "audio_bos_eos_token")):
            yield f"audio.{name}", parameter, parameter.ndim == 2 and not name.startswith("proj")
    for name, parameter in parts.vision_tower(thinker).named_parameters():
        yield f"vision.{name}", parameter, False
    for name, parameter in parts.language_model(thinker).named_parameters():
        if not name.startswith("embed_tokens"):
            yield f"llm.{name}", parameter, parameter.ndim == 2


@torch.no_grad()
def apply(thinker: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Changes a base model.

    Args:
        thinker: in any precision.
        tensors: `NAME:up` `[out, r]` and `NAME:down` `[r, in]` of a low-rank sum, `NAME` of what is replaced.

    Raises:
        ValueError: the tensors are not those of this model.
    """
    wanted: dict[str, nn.Parameter] = {}
    for name, parameter, low_rank in trainable(thinker):
        keys = (name + UP, name + DOWN) if low_rank else (name,)
        wanted |= dict.fromkeys(keys, parameter)
    if wanted.keys() != tensors.keys():
        missing, other = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
        raise ValueError(f"the changes are of another model: missing {missing[:3]}, left over {other[:3]}")
    for key, parameter in wanted.items():
        if key.endswith(DOWN):
            continue
        change = tensors[key].to(parameter.device, torch.float32)
        if key.endswith(UP):
            down = tensors[key.removesuffix(UP) + DOWN].to(change)
            change = parameter.float() + change @ down
        if change.shape != parameter.shape:
            raise ValueError(f"{key} must be of shape {list(parameter.shape)}, got {list(change.shape)}")
        parameter.copy_(change)


def cast_weights(thinker: nn.Module, dtype: torch.dtype) -> None:
    """Casts parameters, and no buffers: rotary frequencies in 16 bits would be others, by up to 0.4 %."""
    for parameter in thinker.parameters():
        parameter.data = parameter.data.to(dtype)


def write(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Writes all of a file or nothing.

    Args:
        path: of a safetensors file.
        tensors: see `apply`.
        about: anything to be kept with them.

    Raises:
        FloatingPointError: a tensor holds what is no number; nothing is written then.
    """
    stored = {}
    for key, tensor in tensors.items():
        x = tensor.detach().cpu().float()
        if not x.isfinite().all():
            raise FloatingPointError(f"{key} holds values that are not finite: {path} is not written")
        if x.ndim == 1:
            stored[key] = x.half()
            continue
        rows = x.flatten(1)
        scale = rows.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / LEVELS
        stored[key] = (rows / scale[:, None]).round().to(torch.int8).view(x.shape)
        stored[key + SCALE] = scale
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file({key: x.contiguous() for key, x in stored.items()}, partial, {"format": "pt", **about})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Gives what `write` was given, the tensors rounded."""
    with safe_open(path, "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no mapping
        about = {key: value for key, value in (file.metadata() or {}).items() if key != "format"}
    tensors = {}
    for key, x in stored.items():
        if key.endswith(SCALE):
            continue
        scale = stored.get(key + SCALE)
        tensors[key] = x.float() if scale is None else (x.flatten(1) * scale[:, None]).view(x.shape)
    return tensors, about
