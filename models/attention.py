"""Proportional attention: a merged token attracts attention as the tokens it stands for did together.

A key that stands for n equal keys is theirs exactly when log(n) is added to its attention logits (Bolya et al., Token
Merging, 2210.09461). Attention functions of transformers take no bias per key, or take it as a mask of queries times
keys, which for a long prompt is too much. So the bias takes one of three ways, all exact:

- of a single query, as in decoding, it is added to the mask;
- of a prompt without padding, on a GPU and without gradient, our own kernel takes it. It also serves where there is no
  bias: cuDNN's attention, which torch would choose there, plans each new length anew for tens of milliseconds;
- else it rides along as head channels, with every implementation, flash attention included: the queries get ones, the
  keys get the bias over the scale.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..kernels.attention import append_key_bias, causal_attention, has_causal_kernel

PREFIX = "key_bias_"
BY_MASK = (f"{PREFIX}sdpa", f"{PREFIX}eager")  # those whose mask may be additive

_bias_of_masks: ContextVar[Tensor | None] = ContextVar("bias_of_masks", default=None)


def size_bias(sizes: Tensor, mask: Tensor) -> Tensor:
    """Gives log(size) of every real key, 0 elsewhere.

    Args:
        sizes: `[B, L]`, how many tokens each key stands for.
        mask: `[B, L]`, 0 at padding.
    """
    return sizes.masked_fill(mask == 0, 1).log()


def enable_key_bias(config: Any) -> None:
    """Makes a model's attention understand the argument `key_bias`; without it, results stay, up to rounding.

    Stays on: layers that are computed again in the backward pass (checkpointing) must find the same function.

    Args:
        config: the model's, as its attention modules hold it.
    """
    base = config._attn_implementation
    if base.startswith(PREFIX):
        return
    AttentionInterface.register(PREFIX + base, partial(_attend, base=base))
    AttentionMaskInterface.register(PREFIX + base, partial(_mask, base=base))
    config._attn_implementation = PREFIX + base


@contextmanager
def attention_named(config: Any, name: str) -> Iterator[None]:
    """Gives a model, by its config, another of transformers' attention functions, while the block runs."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def biased_llm(language_model: nn.Module, key_bias: Tensor | None) -> Iterator[None]:
    """Gives `key_bias` to a language model, in prefill and in decoding, while the block runs; see `biased`."""
    token = _bias_of_masks.set(key_bias if language_model.config._attn_implementation in BY_MASK else None)
    try:
        with biased([language_model], key_bias):
            yield
    finally:
        _bias_of_masks.reset(token)


@contextmanager
def biased(modules: Iterable[nn.Module], key_bias: Tensor | None) -> Iterator[None]:
    """Gives `key_bias` to every call of some modules, while the block runs.

    Args:
        modules: attention modules, such as a decoder's cross-attention.
        key_bias: `[B, K]`, added to the logits of the first K keys; later keys, of generated tokens, get 0. Where the
            batch is expanded (beams), so is the bias. None for nothing.
    """

    def inject(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        by_mask = _bias_of_masks.get() is not None and kwargs["inputs_embeds"].shape[1] == 1
        return args, kwargs if by_mask else kwargs | {"key_bias": key_bias}

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
    """Calls the attention function `base`, with the bias on its keys."""
    attend = partial(_call, base, module)
    size, queries = query.shape[-1], query.shape[2]
    scaling = size**-0.5 if scaling is None else scaling
    causal = getattr(module, "is_causal", True) and kwargs.get("is_causal") is not False
    # A prompt without padding: query i sees keys 0 to i. A static cache is longer, and empty.
    whole = causal and base == "sdpa" and attention_mask is None and queries > 1
    if whole:
        key, value = key[:, :, :queries], value[:, :, :queries]
    bias = None if key_bias is None else _fit(key_bias, len(query), key.shape[2])
    if whole and query.is_cuda and has_causal_kernel(query, key, value, bias):
        return causal_attention(query, key, value, bias, scaling).transpose(1, 2).contiguous(), None
    if bias is None:
        return attend(query, key, value, attention_mask, *args, scaling=scaling, **kwargs)
    output, weights = attend(
        *append_key_bias(query, key, value, bias[:, None, :, None], scaling),
        attention_mask,
        *args,
        scaling=scaling,
        **kwargs,
    )
    return output[..., :size], weights


def _mask(*args: Any, base: str, **kwargs: Any) -> Tensor | None:
    """Makes the mask as the attention function `base` wants it; of a single query, with the bias added."""
    mask: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS[base](*args, **kwargs)
    bias = _bias_of_masks.get()
    if bias is None or kwargs["q_length"] > 1:
        return mask
    bias = _fit(bias, kwargs["batch_size"], kwargs["kv_length"])
    return _add(mask, bias[:, None, None].to(kwargs["dtype"]))


def _fit(bias: Tensor, batch: int, keys: int) -> Tensor:
    """Gives `[batch, keys]`: beams have their prompt's bias, and keys that came later 0."""
    return F.pad(bias.repeat_interleave(batch // len(bias), dim=0), (0, keys - bias.shape[1]))


def _add(mask: Tensor | None, bias: Tensor) -> Tensor:
    """Adds a bias to a mask, which may be additive, or tell which keys are seen."""
    if mask is None:
        return bias
    return bias.where(mask, -torch.inf) if mask.dtype == torch.bool else mask + bias


def _call(name: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls transformers' attention function of this name; "eager" is each model's own."""
    if name == "eager":
        return inspect.getmodule(type(module)).eager_attention_forward(module, *args, **kwargs)  # type: ignore[union-attr]
    attend = ALL_ATTENTION_FUNCTIONS[name]
    if "flash" not in name:
        return attend(module, *args, **kwargs)
    with attention_named(module.config, name):  # flash attention looks its kernels up by it
        return attend(module, *args, **kwargs)
