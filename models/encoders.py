"""Run the two towers and capture what a compressor asked for. Hooks are temporary and always removed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..compression import Context, TokenStream
from ..compression.encoder import EncoderMethod
from ..compression.stream import clip_ids, positions
from . import parts
from .layout import audio_lengths
from .packed import is_packed, vision_plan
from .tower import acting_layers, finish, front, pack, run_layers

LAST_LAYER = frozenset({"encoder_keys", "encoder_attention"})  # what only the steps of the last layer give


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
    method: EncoderMethod | None = None,
) -> tuple[TokenStream, Context]:
    """Runs the audio tower over all clips of a batch, or its last steps over states it gave before.

    Args:
        thinker: the model.
        input_features: `[C, mel, T]` log-mel, 100 frames per second, right-padded.
        feature_attention_mask: `[C, T]`, 1 at real frames; best on the CPU, as what is read of it must be known there.
        needs: what to capture on the way, as a compressor's `needs`.
        audio_hidden: `[N, D_enc]`, what `hidden_audio` gave for these clips, these needs and this method: then the
            layers before are not run again.
        method: acts inside the tower.

    Returns:
        The clips' tokens (25 per second, or what the method leaves, at the LLM's width) and the captured context.

    Raises:
        ValueError: a clip is too short to give a token, or the tower gives another number of tokens than its length
            promises.
    """
    mel_frames = feature_attention_mask.sum(dim=1).cpu()
    lengths = audio_lengths(mel_frames)
    if 0 in lengths:
        raise ValueError(f"audio clip {lengths.index(0)} of {len(lengths)} is too short: it needs 3 mel frames (30 ms)")
    tower = parts.audio_tower(thinker)
    frames = tuple(((mel_frames - 1) // 2 + 1).tolist())
    dtype, device = tower.conv1.weight.dtype, tower.conv1.weight.device
    capture = needs & LAST_LAYER
    whole = not capture and not acting_layers(method, tower)
    context = Context()
    # A projection that is trained is float32; beside a bfloat16 tower it takes part by autocast.
    with torch.autocast(device.type, dtype, enabled=tower.proj.weight.dtype != dtype):
        if audio_hidden is None and whole and not is_packed(tower):
            with _last_states(tower) as captured:
                features = _features(
                    thinker.get_audio_features(
                        input_features.to(dtype),
                        feature_attention_mask=feature_attention_mask.to(device),
                        return_dict=True,
                    )
                )
            audio = TokenStream(features, tuple(lengths))
            hidden = captured[0]
        else:
            start = first_step(tower, needs, method)
            if audio_hidden is None:
                audio_hidden, start = front(tower, input_features.to(dtype), mel_frames.tolist()), 0
            states = pack(audio_hidden.to(dtype), frames, lengths, tower.n_window)
            states, kept = run_layers(tower, states, start, len(tower.layers), method, capture)
            hidden = states.blocks.embeds
            audio = finish(states, method)
            audio = audio.replace(embeds=tower.proj(tower.ln_post(audio.embeds)))
            if kept is not None and "encoder_keys" in needs:
                context.encoder_keys = kept.keys
            if kept is not None and kept.attention is not None:
                received = kept.keys.replace(embeds=kept.attention[:, None])
                context.encoder_attention = pool_pairs(received, lengths)[:, 0]
        if "encoder_hidden" in needs:
            context.encoder_hidden = TokenStream(tower.ln_post(hidden), frames)
    return audio, context


def first_step(tower: nn.Module, needs: frozenset[str], method: EncoderMethod | None) -> int:
    """Gives the first layer that `audio_hidden` leaves to run; as many as there are where it leaves none.

    It is the same at every keep ratio of a method, 1 included: the states serve training that draws or shrinks it.
    """
    depth = len(tower.layers)
    if method is not None:
        return method.encoder_layers(depth)[0]
    return depth - 1 if needs & LAST_LAYER else depth


@torch.no_grad()
def hidden_audio(
    thinker: nn.Module,
    input_features: Tensor,
    feature_attention_mask: Tensor,
    needs: frozenset[str] = frozenset(),
    method: EncoderMethod | None = None,
) -> list[Tensor]:
    """Gives each clip's states on their way through the tower, `[N, D_enc]` at 50 per second, to be used again.

    They are those after the last layer, or those that the first layer reads in which something is captured or a method
    acts. Valid as long as nothing before that point is trained or changed, whatever the method's keep ratio.
    """
    tower = parts.audio_tower(thinker)
    mel_frames = feature_attention_mask.sum(dim=1).cpu()
    frames = ((mel_frames - 1) // 2 + 1).tolist()
    start = first_step(tower, needs, method)
    if start == len(tower.layers) and not is_packed(tower):
        with _last_states(tower) as captured:
            encode_audio(thinker, input_features, feature_attention_mask)
        return list(captured[0].split(frames))
    first = front(tower, input_features.to(tower.conv1.weight.dtype), mel_frames.tolist())
    states, _ = run_layers(tower, pack(first, frames, audio_lengths(mel_frames), tower.n_window), 0, start)
    return list(states.blocks.embeds.split(frames))


def pool_pairs(hidden: TokenStream, lengths: list[int]) -> Tensor:
    """Gives the means of adjacent states, 50 to 25 per second; an odd last state of a clip is left out."""
    first = hidden.offsets[:-1][clip_ids(lengths, hidden.embeds.device)] + 2 * positions(lengths, hidden.embeds.device)
    return (hidden.embeds[first] + hidden.embeds[first + 1]) / 2


def encode_video(thinker: nn.Module, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
    """Runs the vision tower over all videos of a batch: `[V, D]` tokens (T * H * W / 4 of each).

    Args:
        thinker: the model.
        pixel_values: `[patches, values]`.
        grid_thw: `[videos, 3]` patches in time, height and width; best on the CPU, where it must be known.
    """
    tower = parts.vision_tower(thinker)
    if is_packed(tower):
        plan = vision_plan(tower, grid_thw.tolist(), pixel_values.device)
        return _features(tower(pixel_values.to(tower.dtype), grid_thw=grid_thw, **plan))
    return _features(thinker.get_video_features(pixel_values, grid_thw.to(pixel_values.device), return_dict=True))


def encode_image(thinker: nn.Module, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
    """Runs the vision tower over all images of a batch: `[V, D]` tokens."""
    return encode_video(thinker, pixel_values, grid_thw)


@contextmanager
def _last_states(tower: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what the tower's last layer gives."""
    captured: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        captured.append(output if isinstance(output, Tensor) else output[0])

    handle = tower.layers[-1].register_forward_hook(keep)  # type: ignore[union-attr, index]
    try:
        yield captured
    finally:
        handle.remove()
