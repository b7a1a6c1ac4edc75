"""Reads the encoder of a Whisper model stored in CTranslate2's binary format (version 6), without CTranslate2."""

from __future__ import annotations

import struct

import torch
from torch import Tensor
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder, sinusoids

_DTYPES = {0: torch.float32, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.float16, 5: torch.bfloat16}
_LAYER_PARTS = {
    "self_attn_layer_norm": "self_attention/layer_norm",
    "self_attn.out_proj": "self_attention/linear_1",
    "final_layer_norm": "ffn/layer_norm",
    "fc1": "ffn/linear_0",
    "fc2": "ffn/linear_1",
}


def read_tensors(data: bytes | bytearray) -> dict[str, Tensor]:
    """Gives all tensors of a CTranslate2 `model.bin`.

    Layout, little endian: u32 version; the spec's name; u32 revision; u32 count; then per tensor its name, u8 rank, u32
    per dimension, u8 dtype, u32 bytes, the data. A name is a u16 length, then that many bytes with a closing zero.

    Raises:
        ValueError: another version of the format, or data that ends early.
    """
    at = 0

    def number(code: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + code, data, at)
        at += struct.calcsize(code)
        return value

    def name() -> str:
        nonlocal at
        length = number("H")
        at += length
        return bytes(data[at - length : at - 1]).decode()

    if (version := number("I")) != 6:
        raise ValueError(f"CTranslate2 file of format version 6 expected, got version {version}")
    name(), number("I")  # the spec's name and revision
    tensors = {}
    for _ in range(number("I")):
        key = name()
        shape = [number("I") for _ in range(number("B"))]
        dtype, size = _DTYPES[number("B")], number("I")
        if at + size > len(data):
            raise ValueError(f"CTranslate2 file ends inside {key}: {at + size} bytes needed, got {len(data)}")
        tensors[key] = torch.frombuffer(data, dtype=dtype, count=size // dtype.itemsize, offset=at).reshape(shape)
        at += size
    return tensors


def whisper_encoder(data: bytes | bytearray) -> WhisperEncoder:
    """Builds transformers' Whisper encoder, float32, with the weights in `data`.

    The position table is computed, not read: the stored one is the same sinusoids rounded to 16 bits.
    """
    stored = {k.removeprefix("encoder/"): v.float() for k, v in read_tensors(data).items() if k.startswith("encoder/")}
    width, mel_bins, _ = stored["conv1/weight"].shape
    layers = sum(key.endswith("ffn/linear_0/weight") for key in stored)
    config = WhisperConfig(
        d_model=width,
        num_mel_bins=mel_bins,
        encoder_layers=layers,
        encoder_attention_heads=int(stored["num_heads"]),
        encoder_ffn_dim=stored["layer_0/ffn/linear_0/weight"].shape[0],
        max_source_positions=stored["position_encodings/encodings"].shape[0],
    )

    state = {"embed_positions.weight": sinusoids(config.max_source_positions, width)}
    for conv in ("conv1", "conv2"):
        state |= {f"{conv}.{kind}": stored[f"{conv}/{kind}"] for kind in ("weight", "bias")}
    state |= {"layer_norm.weight": stored["layer_norm/gamma"], "layer_norm.bias": stored["layer_norm/beta"]}
    for i in range(layers):
        for ours, theirs in _LAYER_PARTS.items():
            weight, bias = ("gamma", "beta") if ours.endswith("layer_norm") else ("weight", "bias")
            state[f"layers.{i}.{ours}.weight"] = stored[f"layer_{i}/{theirs}/{weight}"]
            state[f"layers.{i}.{ours}.bias"] = stored[f"layer_{i}/{theirs}/{bias}"]
        for kind in ("weight", "bias"):
            fused = stored[f"layer_{i}/self_attention/linear_0/{kind}"].chunk(3)
            state |= {f"layers.{i}.self_attn.{x}_proj.{kind}": v for x, v in zip("qkv", fused, strict=True)}
        key_bias = state.pop(f"layers.{i}.self_attn.k_proj.bias")
        assert not key_bias.any(), "Whisper's key projection has no bias"
    encoder = WhisperEncoder(config)
    encoder.load_state_dict(state)
    return encoder.eval()
