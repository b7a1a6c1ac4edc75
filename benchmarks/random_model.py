"""What is measured: a model of a released one's exact shapes with random weights, or a real one, and a batch for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

from audiopress.data.collator import interleave
from audiopress.models.layout import TokenIds, audio_lengths
from audiopress.models.loading import load_base

MEL_PER_SECOND = 100
FRAMES = 50  # of a video, as LongVALE's
GRID = (FRAMES // 2, 14, 26)  # patches, two frames by two: 91 tokens per pair
PATCH = 3 * 2 * 14 * 14  # numbers of a patch: colours, frames, height, width
ANSWER = 14  # tokens of "From 83.1% to 85.0%."
QUESTION = 40  # tokens of text around the media
# What is not the same in 3B and 7B; the rest below. From the released configurations.
LLM: dict[str, dict[str, Any]] = {
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "3b": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
}
WINDOW = 32_768  # positions that the released LLMs were trained on


def open_thinker(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Opens "7b" or "3b" with random weights, or what `load_base` opens.

    Raises:
        ValueError: random weights of 3 or 7 billion parameters without a GPU, or no such model.
    """
    if name not in LLM:
        return load_base(name, dtype)[0].to(device).eval()
    if device.type != "cuda":
        raise ValueError(f"model {name!r} needs a CUDA device; 'omni-small' runs on a CPU, too")
    return random_thinker(name, device, dtype)


def random_thinker(size: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Gives a thinker of the released shapes with random weights."""
    width = LLM[size]["hidden_size"]
    config = Qwen2_5OmniThinkerConfig(
        audio_config={
            "num_mel_bins": 128,
            "encoder_layers": 32,
            "encoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
            "d_model": 1280,
            "n_window": 100,
            "output_dim": width,
            "max_source_positions": 1500,
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "num_heads": 16,
            "intermediate_size": 3420,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "out_hidden_size": width,
        },
        text_config={
            **LLM[size],
            "max_position_embeddings": WINDOW,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        audio_token_id=151646,
        image_token_id=151655,
        video_token_id=151656,
        audio_start_token_id=151647,
        audio_end_token_id=151648,
        position_id_per_seconds=25,
        seconds_per_chunk=2,
    )
    config.vision_start_token_id, config.vision_end_token_id = 151652, 151653
    with torch.device(device):
        thinker = Qwen2_5OmniThinkerForConditionalGeneration._from_config(config, dtype=dtype)
    thinker.generation_config.eos_token_id = None  # random weights must not end an answer early
    thinker.generation_config.pad_token_id = 0
    return thinker.eval()


def make_batch(thinker: nn.Module, seconds: float, batch: int, video: bool) -> dict[str, torch.Tensor]:
    """Gives a batch of equal clips of random features, the sound interleaved with the video as in training.

    The text is as random, half of it before the media and half after.
    """
    generator = torch.Generator().manual_seed(0)
    ids = TokenIds.from_config(thinker.config)
    frames = round(MEL_PER_SECOND * seconds)
    mel = torch.randn(batch, thinker.config.audio_config.num_mel_bins, frames, generator=generator)
    audio = audio_lengths(torch.tensor([frames]))[0]
    # Special tokens stand at both ends of a vocabulary.
    special = min(ids.audio, ids.video, ids.image, ids.audio_start, ids.vision_start)
    text = torch.randint(20, special - 20, (QUESTION,), generator=generator).tolist()
    out: dict[str, torch.Tensor] = {"input_features": mel, "feature_attention_mask": torch.ones(batch, frames).long()}
    inner = [ids.audio_start, *[ids.audio] * audio, ids.audio_end]
    if video:
        groups, height, width = GRID
        step = seconds / groups
        pair = [ids.video] * (height * width // ids.merge**2)
        body = [token for n in interleave(audio, groups, step) for token in [*pair, *[ids.audio] * n]]
        inner = [ids.vision_start, ids.audio_start, *body, ids.audio_end, ids.vision_end]
        out |= {
            "pixel_values_videos": torch.randn(batch * groups * height * width, PATCH, generator=generator),
            "video_grid_thw": torch.tensor([GRID] * batch),
            "video_second_per_grid": torch.full([batch], step),
        }
    row = [*text[: QUESTION // 2], *inner, *text[QUESTION // 2 :]]
    out |= {"input_ids": torch.tensor([row] * batch), "attention_mask": torch.ones(batch, len(row), dtype=torch.long)}
    return {name: tensor.to(thinker.device) for name, tensor in out.items()}
