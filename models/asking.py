"""Several prompts about the same media, each answered by itself: what they begin with is read once.

The LLM reads from left to right, so the states of a common beginning serve every prompt that goes on from it. For a
dozen questions about a clip that saves most of the work, whatever the compressor: one that reads the question gives
every prompt other tokens, and the common beginning is then short.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from ..compression.checks import deferred_checks
from . import parts, storage
from .omni import CompressedOmni
from .rewrite import LLMInputs

# Of the root mean square: embeddings that differ by no more are the same but for rounding. Guesses.
NEAR, NEAR_IN_HALF = 1e-4, 3e-2


@dataclass(frozen=True)
class Begun:
    """Prompts whose common beginning, of P tokens, has been read.

    Args:
        states: keys and values of each layer, `[1, P, heads, d]`.
        rest: `[B, S, D]`, what comes after it, padded on the right.
        mask: `[B, P]` and `[B, S]`.
        positions: `[B, S, 4]` of the rest.
        bias: `[B, P]` and `[B, S]`, on the keys; or None.
    """

    states: list[tuple[Tensor, Tensor]]
    rest: Tensor
    mask: tuple[Tensor, Tensor]
    positions: Tensor
    bias: tuple[Tensor, Tensor] | None


@torch.no_grad()
def answer(model: CompressedOmni, groups: Sequence[Mapping[str, Any]], max_new_tokens: int) -> list[Tensor]:
    """Answers all prompts of all groups at once, greedily, as `generate` answers each.

    Args:
        model: in eval mode.
        groups: batches of prompts that share a beginning, padded on either side, with their media; see
            `CompressedOmni.encode`.
        max_new_tokens: of an answer.

    Returns:
        The new ids `[B, new]` of each group; after an answer's end that token is repeated.

    Raises:
        ValueError: a prompt does not end in text.
    """
    with deferred_checks():
        begun = [_begin(model, group) for group in groups]
    rows = [len(one.rest) for one in begun]
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    for layer in range(len(begun[0].states)):
        keys, values = (
            _stacked([one.states[layer][i].expand(n, -1, -1, -1) for one, n in zip(begun, rows, strict=True)])
            for i in (0, 1)
        )
        cache.update(keys.transpose(1, 2), values.transpose(1, 2), layer)
    rest, positions = _stacked([one.rest for one in begun]), _stacked([one.positions for one in begun])
    mask = torch.cat([_stacked([one.mask[i] for one in begun]) for i in (0, 1)], dim=1)
    biases = [one.bias for one in begun if one.bias is not None]
    bias = torch.cat([_stacked([one[i] for one in biases]) for i in (0, 1)], dim=1) if biases else None
    with model.reading(bias) as language_model:
        return list(_write(model, language_model, cache, rest, mask, positions, max_new_tokens).split(rows))


def _write(
    model: CompressedOmni,
    language_model: nn.Module,
    cache: DynamicCache,
    rest: Tensor,
    mask: Tensor,
    positions: Tensor,
    max_new_tokens: int,
) -> Tensor:
    """Goes on greedily from what is in the cache and what comes after it; gives the new ids `[B, new]`."""
    ends = torch.tensor(storage.eos_ids(model.thinker), dtype=torch.long, device=rest.device)
    embed, head = model.thinker.get_input_embeddings(), model.thinker.get_output_embeddings()
    row = torch.arange(len(rest), device=rest.device)
    at = mask[:, -rest.shape[1] :].sum(dim=1) - 1  # where each prompt ends
    last = positions[row, at]  # [B, 4]
    written: list[Tensor] = []
    over = torch.zeros_like(at, dtype=torch.bool)
    while not over.all() and len(written) < max_new_tokens:
        states = language_model(
            inputs_embeds=rest, attention_mask=mask, position_ids=positions.movedim(2, 0), past_key_values=cache
        ).last_hidden_state
        new = head(states[row, at]).argmax(dim=1)
        written.append(torch.where(over, written[-1], new) if written else new)
        over |= torch.isin(new, ends)
        rest, mask = embed(new)[:, None], F.pad(mask, (0, 1), value=1)
        positions, at = (last + len(written))[:, None], torch.zeros_like(at)
    return torch.stack(written, dim=1)


def _begin(model: CompressedOmni, group: Mapping[str, Any]) -> Begun:
    """Reads what the prompts of a group begin with."""
    inputs, _ = model.encode(**group)
    model.check_prompts(inputs)
    bias = model.key_bias(inputs)
    shared = common(inputs)
    return Begun(
        _states(model, inputs, bias, shared),
        inputs.embeds[:, shared:],
        (inputs.mask[:, :shared], inputs.mask[:, shared:]),
        inputs.positions[:, :, shared:].movedim(0, 2),
        None if bias is None else (bias[:, :shared], bias[:, shared:]),
    )


def _states(model: CompressedOmni, inputs: LLMInputs, bias: Tensor | None, shared: int) -> list[tuple[Tensor, Tensor]]:
    """Reads the first tokens of the first prompt; see `Begun`."""
    text = model.config.get_text_config(decoder=True)
    if not shared:
        none = inputs.embeds.new_zeros(1, 0, text.num_key_value_heads, parts.head_size(text))
        return [(none, none)] * text.num_hidden_layers
    cache = DynamicCache(config=text)
    with model.reading(None if bias is None else bias[:1, :shared]) as language_model:
        language_model(
            inputs_embeds=inputs.embeds[:1, :shared],
            attention_mask=inputs.mask[:1, :shared],
            position_ids=inputs.positions[:, :1, :shared],
            past_key_values=cache,
        )
    return [(layer.keys.transpose(1, 2), layer.values.transpose(1, 2)) for layer in cache.layers]


def common(inputs: LLMInputs) -> int:
    """Gives how many tokens all prompts begin with; at least one of each is left over."""
    first = inputs.embeds[:1].float()
    near = NEAR if inputs.embeds.dtype == torch.float32 else NEAR_IN_HALF
    away = (inputs.embeds.float() - first).abs().amax(dim=2) > near * first.square().mean().sqrt()
    away |= (inputs.positions != inputs.positions[:, :1]).any(dim=0)
    away |= inputs.sizes != inputs.sizes[:1]
    same = ~away.any(dim=0) & (inputs.mask == 1).all(dim=0)
    return min(int(same.cumprod(dim=0).sum()), int(inputs.mask.sum(dim=1).min()) - 1)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Puts `[B, L, ...]` of several groups under one another, padded with zeros on the right of L."""
    longest = max(x.shape[1] for x in tensors)
    return torch.cat([F.pad(x, (*[0] * (2 * x.ndim - 4), 0, longest - x.shape[1])) for x in tensors])
