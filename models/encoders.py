"""Run the two towers and capture what a compressor asked for. Hooks are temporary and always removed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..compression import Context, TokenStream
from ..compression.stream import clip_ids, positions
from . import parts
from .layout import audio_lengths


def _features(output: Any) -> Tensor:
    """Gives one packed tensor of whatever form this release of transformers returns features in."""
    pooled = getattr(output, "pooler_output", output)
    if pooled is None:
        pooled = output.last_hidden_state
    return pooled if isinstance(pooled, Tensor) else torch.cat(list(pooled))


def encode_audio(
    thinker: nn.Module,
    input_features: Tensor,
    feature_attention_mask: Tensor,
    needs: frozenset[str] = frozenset(),
    audio_hidden: Tensor | None = None,
) -> tuple[TokenStream, Context]:
    """Runs the audio tower over all clips of a batch, or its last steps over states it gave before.

    Args:
        thinker: the model.
        input_features: `[C, mel, T]` log-mel, 100 frames per second, right-padded.
        feature_attention_mask: `[C, T]`, 1 at real frames.
        needs: what to capture on the way, as a compressor's `needs`.
        audio_hidden: `[N, D_enc]`, what `hidden_audio` gave for these clips: then the layers are not run again.

    Returns:
        The clips' tokens (25 per second, at the LLM's width) and the captured context.

    Raises:
        ValueError: a clip is too short to give a token, or the tower gives another number of tokens than its length
            promises.
    """
    mel_frames = feature_attention_mask.sum(dim=1)
    lengths = audio_lengths(mel_frames)
    if 0 in lengths:
        raise ValueError(f"audio clip {lengths.index(0)} of {len(lengths)} is too short: it needs 3 mel frames (30 ms)")
    tower = parts.audio_tower(thinker)
    frames = tuple(((mel_frames - 1) // 2 + 1).tolist())
    dtype, device = tower.conv1.weight.dtype, tower.conv1.weight.device
    # A projection that is trained is float32; beside a bfloat16 tower it takes part by autocast.
    with torch.autocast(device.type, dtype, enabled=tower.proj.weight.dtype != dtype):
        if audio_hidden is not None:
            hidden = audio_hidden.to(dtype)
            features = tower.proj(tower.ln_post(pool_pairs(TokenStream(hidden, frames), lengths)))
        else:
            with _last_hidden(tower, "encoder_hidden" in needs) as captured:
                features = _features(
                    thinker.get_audio_features(
                        input_features.to(dtype), feature_attention_mask=feature_attention_mask, return_dict=True
                    )
                )
            hidden = captured[0] if captured else None
        context = Context()
        if "encoder_hidden" in needs:
            context.encoder_hidden = TokenStream(tower.ln_post(hidden), frames)
    return TokenStream(features, tuple(lengths)), context


@torch.no_grad()
def hidden_audio(thinker: nn.Module, input_features: Tensor, feature_attention_mask: Tensor) -> list[Tensor]:
    """Gives each clip's states after the tower's last layer, `[N, D_enc]` at 50 per second, to be kept and used again.

    Valid as long as nothing in front of the tower's final LayerNorm is trained or changed.
    """
    with _last_hidden(parts.audio_tower(thinker), True) as captured:
        encode_audio(thinker, input_features, feature_attention_mask)
    mel_frames = feature_attention_mask.sum(dim=1)
    return list(captured[0].split(((mel_frames - 1) // 2 + 1).tolist()))


def pool_pairs(hidden: TokenStream, lengths: list[int]) -> Tensor:
    """Gives the means of adjacent states, 50 to 25 per second; an odd last state of a clip is left out."""
    first = hidden.offsets[:-1][clip_ids(lengths, hidden.embeds.device)] + 2 * positions(lengths, hidden.embeds.device)
    return (hidden.embeds[first] + hidden.embeds[first + 1]) / 2


def encode_video(thinker: nn.Module, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
    """Runs the vision tower over all videos of a batch: `[V, D]` tokens (T * H * W / 4 of each)."""
    return _features(thinker.get_video_features(pixel_values, grid_thw, return_dict=True))


def encode_image(thinker: nn.Module, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
    """Runs the vision tower over all images of a batch: `[V, D]` tokens."""
    return _features(thinker.get_image_features(pixel_values, grid_thw, return_dict=True))


@contextmanager
def _last_hidden(tower: nn.Module, wanted: bool) -> Iterator[list[Tensor]]:
    """Collects the output of the tower's last layer, `[N, D_enc]` at 50 per second, while the block runs."""
    captured: list[Tensor] = []
    if not wanted:
        yield captured
        return

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        captured.append(output if isinstance(output, Tensor) else output[0])

    handle = tower.layers[-1].register_forward_hook(keep)
    try:
        yield captured
    finally:
        handle.remove()
