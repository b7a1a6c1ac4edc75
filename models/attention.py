"""Proportional attention: a merged token attracts attention as the tokens it stands for did together.

A key that stands for n equal keys is theirs exactly when log(n) is added to its attention logits (Bolya et al., Token
Merging, 2210.09461). Attention functions of transformers take no bias per key, or take it as a mask of queries times
keys; here it rides along as head channels: the queries get ones, the keys get the bias over the scale. So it is exact
with every implementation, flash attention included, and costs no map.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..kernels.attention import append_key_bias

PREFIX = "key_bias_"


def size_bias(sizes: Tensor, mask: Tensor) -> Tensor:
    """Gives log(size) of every real key, 0 elsewhere.

    Args:
        sizes: `[B, L]`, how many tokens each key stands for.
        mask: `[B, L]`, 0 at padding.
    """
    return sizes.masked_fill(mask == 0, 1).log()


def enable_key_bias(config: Any) -> None:
    """Makes a model's attention understand the argument `key_bias`; without it, it computes what it did.

    Stays on: layers that are computed again in the backward pass (checkpointing) must find the same function.

    Args:
        config: the model's, as its attention modules hold it.
    """
    base = config._attn_implementation
    if base.startswith(PREFIX):
        return
    AttentionInterface.register(PREFIX + base, partial(_attend, base=base))
    AttentionMaskInterface.register(PREFIX + base, ALL_MASK_ATTENTION_FUNCTIONS[base])
    config._attn_implementation = PREFIX + base


@contextmanager
def biased(modules: Iterable[nn.Module], key_bias: Tensor | None) -> Iterator[None]:
    """Gives `key_bias` to every call of some modules, while the block runs.

    Args:
        modules: language models, or single attention modules (such as a decoder's cross-attention).
        key_bias: `[B, K]`, added to the logits of the first K keys; later keys, of generated tokens, get 0. Where the
            batch is expanded (beams), so is the bias. None for nothing.
    """

    def inject(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"key_bias": key_bias}

    with ExitStack() as stack:
        for module in modules if key_bias is not None else ():
            stack.callback(module.register_forward_pre_hook(inject, with_kwargs=True).remove)
        yield


@contextmanager
def rope_sections(language_model: nn.Module, sections: tuple[int, ...] | None) -> Iterator[None]:
    """Deals the LLM's rotary channels out to time, height, width and, with a fourth number, time again.

    Args:
        language_model: transformers' text model; its rotary embedding takes the sections in turn.
        sections: of half the head size; None leaves the model's own.

    Raises:
        ValueError: their sum is not half the head size.
    """
    rotary = language_model.rotary_emb
    own = rotary.mrope_section
    if sections is not None and sum(sections) != sum(own):
        raise ValueError(f"rope_sections must sum to half the head size, {sum(own)}, got {sections}")
    rotary.mrope_section = own if sections is None else list(sections)
    try:
        yield
    finally:
        rotary.mrope_section = own


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    base: str,
    key_bias: Tensor | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Calls the attention function `base`, with the bias as further channels of queries and keys."""
    attend = partial(_call, base, module)
    size = query.shape[-1]
    scaling = size**-0.5 if scaling is None else scaling
    if key_bias is None:
        return attend(query, key, value, attention_mask, *args, scaling=scaling, **kwargs)
    bias = key_bias.repeat_interleave(query.shape[0] // key_bias.shape[0], dim=0)
    bias = F.pad(bias, (0, key.shape[2] - bias.shape[1]))[:, None, :, None]  # [B, 1, K, 1]
    output, weights = attend(
        *append_key_bias(query, key, value, bias, scaling),
        attention_mask,
        *args,
        scaling=scaling,
        **kwargs,
    )
    return output[..., :size], weights


def _call(name: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls transformers' attention function of this name; "eager" is each model's own."""
    if name == "eager":
        return inspect.getmodule(type(module)).eager_attention_forward(module, *args, **kwargs)  # type: ignore[union-attr]
    attend = ALL_ATTENTION_FUNCTIONS[name]
    if "flash" not in name:
        return attend(module, *args, **kwargs)
    config: Any = module.config
    enabled = config._attn_implementation
    config._attn_implementation = name  # flash attention looks its kernels up by it
    try:
        return attend(module, *args, **kwargs)
    finally:
        config._attn_implementation = enabled
