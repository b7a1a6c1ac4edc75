"""What makes a model fast and leaves its results, up to rounding: attention functions of ours, and compiled layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch._dynamo import config

from . import parts
from .attention import enable_key_bias
from .packed import use_packed_attention

# Of one piece of code. All kinds of layer share one in transformers, each compiled for one row and for several, for
# inputs with and without gradients: torch's own 8 would leave some of them as they are, and say nothing.
RECOMPILE_LIMIT = 64


def use_fast_attention(thinker: nn.Module) -> None:
    """Puts attention functions of ours in place of slow ones, in both towers and the LLM."""
    use_packed_attention(thinker)
    enable_key_bias(parts.language_model(thinker).config)


def compile_layers(thinker: nn.Module, whole: bool = False, **options: Any) -> None:
    """Compiles parts of the model by torch.compile, on their first use: seconds for each kind, whatever their number.

    They are the layers of both towers (half of the vision tower's time goes to norms and rotary positions in float32,
    and starting the audio tower's many operations one by one takes longer than running them) and the LLM's norms and
    feed-forwards. Lengths stay open, so that another clip compiles nothing. Weights and their names stay as they are;
    results change by rounding alone.

    Args:
        thinker: the model.
        whole: the LLM's layers with their attention: where there is no cache, as in training, and no padding.
        options: further ones of `torch.compile`, as `backend`.
    """
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    for part in compilable(thinker, whole):
        if part._compiled_call_impl is None:
            part.compile(dynamic=True, **options)


def compilable(thinker: nn.Module, whole: bool = False) -> Iterator[nn.Module]:
    """Gives the parts that `compile_layers` compiles."""
    yield from parts.audio_tower(thinker).layers
    yield from parts.vision_tower(thinker).blocks
    language_model = parts.language_model(thinker)
    for layer in language_model.layers:
        yield from (layer,) if whole else (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp)
    yield language_model.norm
