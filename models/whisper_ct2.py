"""Reads a Whisper model stored in CTranslate2's binary format (version 6), without CTranslate2."""

from __future__ import annotations

import struct

import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperEncoder, sinusoids

_DTYPES = {0: torch.float32, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.float16, 5: torch.bfloat16}
# Parts of a layer: theirs, and ours; several of ours lie one after another in one of theirs.
_ENCODER_PARTS = {
    "self_attention/layer_norm": ["self_attn_layer_norm"],
    "self_attention/linear_0": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention/linear_1": ["self_attn.out_proj"],
    "ffn/layer_norm": ["final_layer_norm"],
    "ffn/linear_0": ["fc1"],
    "ffn/linear_1": ["fc2"],
}
_DECODER_PARTS = _ENCODER_PARTS | {
    "attention/layer_norm": ["encoder_attn_layer_norm"],
    "attention/linear_0": ["encoder_attn.q_proj"],
    "attention/linear_1": ["encoder_attn.k_proj", "encoder_attn.v_proj"],
    "attention/linear_2": ["encoder_attn.out_proj"],
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
    """Builds transformers' Whisper encoder, float32, with the weights in `data`."""
    stored = read_tensors(data)
    encoder = WhisperEncoder(WhisperConfig(**_encoder_sizes(stored)))
    encoder.load_state_dict(_encoder_state(stored))
    return encoder.eval()


def whisper_model(data: bytes | bytearray) -> WhisperForConditionalGeneration:
    """Builds transformers' Whisper, float32, with the weights in `data`; what its tokens mean is not there."""
    stored = read_tensors(data)
    unknown = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    config = WhisperConfig(**_encoder_sizes(stored), **_decoder_sizes(stored), **unknown)
    model = WhisperForConditionalGeneration(config)
    state = {f"model.encoder.{k}": v for k, v in _encoder_state(stored).items()}
    state |= {f"model.decoder.{k}": v for k, v in _decoder_state(stored).items()}
    model.load_state_dict(state | {"proj_out.weight": state["model.decoder.embed_tokens.weight"]})
    return model.eval()


def _encoder_sizes(stored: dict[str, Tensor]) -> dict[str, int]:
    width, mel_bins, _ = stored["encoder/conv1/weight"].shape
    return {
        "d_model": width,
        "num_mel_bins": mel_bins,
        "max_source_positions": len(stored["encoder/position_encodings/encodings"]),
        **_layer_sizes(stored, "encoder"),
    }


def _decoder_sizes(stored: dict[str, Tensor]) -> dict[str, int]:
    return {
        "vocab_size": len(stored["decoder/embeddings/weight"]),
        "max_target_positions": len(stored["decoder/position_encodings/encodings"]),
        **_layer_sizes(stored, "decoder"),
    }


def _layer_sizes(stored: dict[str, Tensor], side: str) -> dict[str, int]:
    return {
        f"{side}_layers": sum(k.startswith(f"{side}/") and k.endswith("/ffn/linear_0/weight") for k in stored),
        f"{side}_attention_heads": int(stored[f"{side}/num_heads"]),
        f"{side}_ffn_dim": len(stored[f"{side}/layer_0/ffn/linear_0/weight"]),
    }


def _encoder_state(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gives the encoder's weights by transformers' names.

    The position table is computed, not read: the stored one is the same sinusoids rounded to 16 bits.
    """
    positions, width = stored["encoder/position_encodings/encodings"].shape
    state = {"embed_positions.weight": sinusoids(positions, width)}
    for conv in ("conv1", "conv2"):
        state |= {f"{conv}.{kind}": stored[f"encoder/{conv}/{kind}"].float() for kind in ("weight", "bias")}
    return state | _layers_state(stored, "encoder", _ENCODER_PARTS)


def _decoder_state(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gives the decoder's weights by transformers' names; its position table is learned."""
    return {
        "embed_tokens.weight": stored["decoder/embeddings/weight"].float(),
        "embed_positions.weight": stored["decoder/position_encodings/encodings"].float(),
        **_layers_state(stored, "decoder", _DECODER_PARTS),
    }


def _layers_state(stored: dict[str, Tensor], side: str, parts: dict[str, list[str]]) -> dict[str, Tensor]:
    """Gives the weights of one side's layers and of its last norm."""
    state = _part_state(stored, f"{side}/layer_norm", ["layer_norm"])
    for i in range(_layer_sizes(stored, side)[f"{side}_layers"]):
        for theirs, ours in parts.items():
            state |= _part_state(stored, f"{side}/layer_{i}/{theirs}", [f"layers.{i}.{name}" for name in ours])
    for name in [name for name in state if name.endswith("k_proj.bias")]:
        assert not state.pop(name).any(), "Whisper's key projection has no bias"
    return state


def _part_state(stored: dict[str, Tensor], theirs: str, ours: list[str]) -> dict[str, Tensor]:
    """Gives weight and bias of a norm, or of the linear layers that are stored as one."""
    kinds = ("gamma", "beta") if theirs.endswith("layer_norm") else ("weight", "bias")
    state = {}
    for kind, their_kind in zip(("weight", "bias"), kinds, strict=True):
        chunks = stored[f"{theirs}/{their_kind}"].float().chunk(len(ours))
        state |= {f"{name}.{kind}": chunk for name, chunk in zip(ours, chunks, strict=True)}
    return state
