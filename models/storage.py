"""How a variant is written to disk: one manifest, one safetensors file, never half of either."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from . import parts
from .packages import digest

if TYPE_CHECKING:
    from .omni import CompressedOmni

MANIFEST = "audiopress.json"
FORMAT = 2  # 1 knew neither video compressors nor several keep ratios
PARTS = ("compressor", "adapter", "projector", "alignment")


def eos_ids(thinker: nn.Module) -> list[int]:
    """Gives the ids that end an answer."""
    ids = thinker.generation_config.eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def is_saved(name: str | os.PathLike[str]) -> bool:
    """Tells whether a model's name is the directory of a saved variant."""
    return (Path(name) / MANIFEST).is_file()


def alignment(thinker: nn.Module) -> str | None:
    """Gives the sha256 of what omni-small was aligned by; None for an unaligned one and for every other model."""
    return getattr(thinker.config, "alignment", None)


def fingerprint(thinker: nn.Module) -> dict[str, Any]:
    """Tells one base model from another: its sizes, and a hash of some weights that holds in fp32 and bf16 alike."""
    text = thinker.config.get_text_config()
    audio = thinker.config.audio_config
    embedding = thinker.get_input_embeddings().weight[:256]
    stem = parts.audio_tower(thinker).conv1.bias
    sample = torch.cat([embedding.flatten(), stem.flatten()]).detach().to("cpu", torch.bfloat16).contiguous()
    return {
        "hidden_size": text.hidden_size,
        "layers": text.num_hidden_layers,
        "vocabulary": text.vocab_size,
        "audio_width": audio.d_model,
        "audio_layers": audio.encoder_layers,
        "weights": hashlib.sha256(sample.view(torch.int16).numpy().tobytes()).hexdigest()[:16],
        "alignment": alignment(thinker),
    }


def own_tensors(model: CompressedOmni) -> dict[str, Tensor]:
    """Gives every tensor that is ours to save, by part and name."""
    tensors = {}
    for part in PARTS:
        if part == "projector" and not model.trains_projector:
            continue
        named = dict(model.own_parameters(part))
        if part == "compressor" and model.compressor is not None:
            named = model.compressor.state_dict()  # buffers too
        tensors.update({f"{part}.{name}": tensor for name, tensor in named.items()})
    return tensors


def variant(model: CompressedOmni) -> dict[str, Any]:
    """Gives what the manifest says of a variant beside its base and its weights."""
    return {
        "compressor": None if model.compressor is None else model.compressor.describe(),
        "video_compressor": None if model.video_compressor is None else model.video_compressor.describe(),
        "keep_ratios": list(model.keep_ratios),
        "positions": model.positions,
        "adapter": model.adapter,
        "projector": model.trains_projector,
        "ctc": model.alignment is not None,
    }


def save(model: CompressedOmni, directory: str | os.PathLike[str]) -> None:
    """Writes weights under a name made of their hash, then the manifest that names them, in one atomic step."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().to("cpu").contiguous().clone() for name, t in own_tensors(model).items()}
    partial = folder / f".weights.{os.getpid()}.partial"
    try:
        partial.write_bytes(to_bytes(tensors, metadata={"format": "pt"}))
        sha256 = digest(partial)
        weights = folder / f"audiopress-{sha256[:12]}.safetensors"
        _publish(partial, weights)
        manifest = {
            "format": FORMAT,
            "base": {"name": model.base, **fingerprint(model.thinker)},
            **variant(model),
            "weights": weights.name,
            "sha256": sha256,
        }
        write_json(manifest, folder / MANIFEST)
    finally:
        partial.unlink(missing_ok=True)
    for old in folder.glob("audiopress-*.safetensors"):
        if old != weights:
            old.unlink()


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a saved variant's manifest and checks that its weights are whole.

    Raises:
        ValueError: there is no saved variant, or it is incomplete or damaged.
    """
    folder = Path(directory)
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no saved audiopress model: {MANIFEST} is missing") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / MANIFEST} is damaged: {error}") from None
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{folder / MANIFEST} has format {manifest.get('format')!r}; this version reads {FORMAT}")
    weights = folder / manifest["weights"]
    if not weights.is_file():
        raise ValueError(f"{folder} is incomplete: {weights.name} is missing")
    if (found := digest(weights)) != manifest["sha256"]:
        raise ValueError(f"{weights} is damaged: sha256 {found}, expected {manifest['sha256']}")
    return manifest


def load_weights(model: CompressedOmni, directory: str | os.PathLike[str], manifest: dict[str, Any]) -> None:
    """Fills a model of the manifest's shape.

    Raises:
        ValueError: a tensor is missing, left over or of another shape.
    """
    saved = load_file(Path(directory) / manifest["weights"])
    own = own_tensors(model)
    if set(saved) != set(own):
        raise ValueError(
            f"{directory} does not fit the model: missing {sorted(set(own) - set(saved))[:3]}, "
            f"left over {sorted(set(saved) - set(own))[:3]}"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != saved[name].shape:
                raise ValueError(f"{name} must be {list(tensor.shape)}, {directory} has {list(saved[name].shape)}")
            tensor.copy_(saved[name])


def check_base(expected: dict[str, Any], thinker: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Raises ValueError unless the thinker is the base a variant was trained on, naming what differs."""
    found = fingerprint(thinker)
    expected = {"alignment": None} | expected  # unknown to older manifests
    differing = [f"{key} {expected[key]!r} != {found[key]!r}" for key in found if expected[key] != found[key]]
    if differing:
        hint = "; omni-small:unaligned is without" if found["alignment"] and not expected["alignment"] else ""
        raise ValueError(
            f"{directory} was trained on another base model ({expected['name']!r}): {'; '.join(differing)}{hint}"
        )


def check_variant(manifest: dict[str, Any], model: CompressedOmni, directory: str | os.PathLike[str]) -> None:
    """Raises ValueError unless a saved variant is of the model's kind, naming what differs."""
    own = json.loads(json.dumps(variant(model)))  # tuples become lists
    differing = [f"{key} {manifest[key]!r} != {own[key]!r}" for key in own if manifest[key] != own[key]]
    if differing:
        raise ValueError(f"{directory} is of another variant: {'; '.join(differing)}")


def write_json(value: Any, path: Path) -> None:
    """Writes JSON so that the file is either the old one or the new one, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(value, indent=2) + "\n")
        _publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _publish(partial: Path, path: Path) -> None:
    """Makes a complete file appear under its name at once."""
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
