"""Several prompts about the same media, each answered by itself: what they begin with is read once, and kept once.

The LLM reads from left to right, so the states of a common beginning serve every prompt that goes on from it. For a
dozen questions about a clip that saves most of the work and of the memory, whatever the compressor: one that reads the
question gives every prompt other tokens, and the common beginning is then short.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from ..compression.checks import deferred_checks
from . import storage
from .attention import attention_named
from .omni import CompressedOmni
from .rewrite import LLMInputs

# Of the root mean square: embeddings that differ by no more are the same but for rounding. Guesses.
NEAR, NEAR_IN_HALF = 1e-4, 3e-2
SHARED = "shared_beginning"  # the attention function

States = list[tuple[Tensor, Tensor]]  # keys and values of each layer, [B, heads, L, d]


@dataclass(frozen=True)
class Beginning:
    """What all rows of a group attend to beside their own tokens.

    Args:
        states: of what the rows of each of G groups begin with, P tokens.
        bias: on their keys, `[G, P]` float32; -inf where there is no token.
        own: on the keys of each row's own prompt, `[G x B, S]` float32.
    """

    states: States
    bias: Tensor
    own: Tensor


@dataclass(frozen=True)
class Read:
    """Prompts of one group that have been read.

    Args:
        beginning: of all.
        own: states of what comes after it, of B rows and S tokens.
        new: the first id of each answer, `[B]`.
        last: position of each prompt's last token, `[B, 4]`.
    """

    beginning: Beginning
    own: States
    new: Tensor
    last: Tensor


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
        read = [_read(model, group) for group in groups]
    rows = [len(one.new) for one in read]
    # All groups get as many rows: those of a smaller one are filled up with its first.
    fill = [[*range(n), *[0] * (max(rows) - n)] for n in rows]

    def filled(tensors: Iterable[Tensor]) -> list[Tensor]:
        return [x[own] for x, own in zip(tensors, fill, strict=True)]

    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    states: States = []
    for layer in range(len(read[0].own)):
        keys, values = (_stacked(filled(one.own[layer][i] for one in read), 2) for i in (0, 1))
        cache.update(keys, values, layer)
        keys, values = (_stacked([one.beginning.states[layer][i] for one in read], 2) for i in (0, 1))
        states.append((keys, values))
    shared = _stacked([one.beginning.bias for one in read], 1, -torch.inf)
    own = _stacked(filled(one.beginning.own for one in read), 1, -torch.inf)
    new, last = torch.cat(filled(one.new for one in read)), torch.cat(filled(one.last for one in read))
    with model.reading(None) as language_model, attention_named(language_model.config, SHARED):
        written = _write(model, language_model, cache, Beginning(states, shared, own), new, last, max_new_tokens)
    return [ids[:n] for ids, n in zip(written.split(max(rows)), rows, strict=True)]


def _read(model: CompressedOmni, group: Mapping[str, Any]) -> Read:
    """Reads the prompts of a group: what they begin with once, where it is longer than the rest."""
    inputs, _ = model.encode(**group)
    model.check_prompts(inputs)
    bias, at = model.key_bias(inputs), common(inputs)
    weights = torch.zeros_like(inputs.mask, dtype=torch.float32) if bias is None else bias.float()
    weights = weights.masked_fill(inputs.mask == 0, -torch.inf)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if 2 * at > inputs.mask.shape[1]:
        with model.reading(None if bias is None else bias[:1, :at]) as language_model:
            language_model(
                inputs_embeds=inputs.embeds[:1, :at],
                attention_mask=inputs.mask[:1, :at],
                position_ids=inputs.positions[:, :1, :at],
                past_key_values=cache,
            )
        shared = [(layer.keys, layer.values) for layer in cache.layers]
        states, own = _read_rests(model, inputs, weights, at, cache)
    else:
        at = 0
        with model.reading(bias) as language_model:
            states = language_model(
                inputs_embeds=inputs.embeds,
                attention_mask=inputs.mask,
                position_ids=inputs.positions,
                past_key_values=cache,
            ).last_hidden_state
        own = [(layer.keys, layer.values) for layer in cache.layers]
        shared = [(keys[:1, :, :0], values[:1, :, :0]) for keys, values in own]
    row, end = torch.arange(len(weights), device=weights.device), inputs.mask[:, at:].sum(dim=1) - 1
    return Read(
        Beginning(shared, weights[:1, :at], weights[:, at:]),
        own,
        model.thinker.get_output_embeddings()(states[row, end]).argmax(dim=1),
        inputs.positions[:, row, at + end].T,
    )


def _read_rests(
    model: CompressedOmni, inputs: LLMInputs, weights: Tensor, at: int, cache: DynamicCache
) -> tuple[Tensor, States]:
    """Reads what comes after the first `at` tokens of prompts, all in one row: each sees its own beginning alone.

    Args:
        model: whose LLM reads.
        inputs: the prompts.
        weights: on their keys, `[B, L]`; -inf where there is no token.
        at: tokens of the common beginning.
        cache: with its states, of one row.

    Returns:
        The last layer's states `[B, S, D]`, and the keys and values of each layer.
    """
    there = inputs.mask[:, at:] == 1
    row = there.nonzero()[:, 0]
    before = (row[:, None] == row).tril()  # row by row, each in its order
    mask = weights[:, at:][there].expand(len(row), -1).masked_fill(~before, -torch.inf)
    mask = torch.cat([weights[:1, :at].expand(len(row), -1), mask], dim=1)
    with model.reading(None) as language_model, attention_named(language_model.config, "sdpa"):
        states = language_model(
            inputs_embeds=inputs.embeds[:, at:][there][None],
            attention_mask=mask[None, None].to(inputs.embeds.dtype),
            position_ids=inputs.positions[:, :, at:][:, there][:, None],
            past_key_values=cache,
        ).last_hidden_state

    def unpacked(tokens: Tensor) -> Tensor:
        rows = tokens.new_zeros(*there.shape, *tokens.shape[1:])
        rows[there] = tokens
        return rows

    own = [
        (unpacked(keys[0, :, at:].transpose(0, 1)), unpacked(values[0, :, at:].transpose(0, 1)))
        for keys, values in ((layer.keys, layer.values) for layer in cache.layers)
    ]
    return unpacked(states[0]), [(keys.transpose(1, 2), values.transpose(1, 2)) for keys, values in own]


def _write(
    model: CompressedOmni,
    language_model: nn.Module,
    cache: DynamicCache,
    beginning: Beginning,
    new: Tensor,
    last: Tensor,
    max_new_tokens: int,
) -> Tensor:
    """Goes on greedily from the first new ids; gives all new ids `[B, new]`."""
    ends = torch.tensor(storage.eos_ids(model.thinker), dtype=torch.long, device=new.device)
    embed, head = model.thinker.get_input_embeddings(), model.thinker.get_output_embeddings()
    written = [new]
    over = torch.isin(new, ends)
    while not over.all() and len(written) < max_new_tokens:
        states = language_model(
            inputs_embeds=embed(written[-1])[:, None],
            position_ids=(last + len(written)).T[..., None],
            past_key_values=cache,
            beginning=beginning,
        ).last_hidden_state
        new = torch.where(over, written[-1], head(states[:, 0]).argmax(dim=1))
        written.append(new)
        over |= torch.isin(new, ends)
    return torch.stack(written, dim=1)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    beginning: Beginning,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attends, one query a row, to the row's own keys and to those of its group's beginning, in one softmax."""
    keys, values = (states.float() for states in beginning.states[module.layer_idx])  # type: ignore[index]
    groups, heads = keys.shape[:2]
    asked = rearrange(query.float() * scaling, "(g n) (h r) 1 d -> g n h r d", g=groups, h=heads)
    rows = asked.shape[1]
    to_shared = rearrange(asked, "g n h r d -> g h (n r) d") @ keys.mT + beginning.bias[:, None, None]
    bias = F.pad(beginning.own, (0, key.shape[2] - beginning.own.shape[1]))  # what was written since has none
    to_own = asked.flatten(0, 1) @ key.float().mT + bias[:, None, None]
    weights = torch.cat([rearrange(to_shared, "g h (n r) p -> (g n) h r p", n=rows), to_own], dim=3).softmax(dim=3)
    by_shared, by_own = weights.split([to_shared.shape[3], to_own.shape[3]], dim=3)
    seen = rearrange(by_shared, "(g n) h r p -> g h (n r) p", n=rows) @ values
    seen = rearrange(seen, "g h (n r) d -> (g n) h r d", n=rows) + by_own @ value.float()
    return rearrange(seen, "b h r d -> b 1 (h r) d").to(query.dtype), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Masks nothing: what must not be seen has a bias of -inf."""


AttentionInterface.register(SHARED, _attend)
AttentionMaskInterface.register(SHARED, _no_mask)


def common(inputs: LLMInputs) -> int:
    """Gives how many tokens all prompts begin with; at least one of each is left over."""
    first = inputs.embeds[:1].float()
    near = NEAR if inputs.embeds.dtype == torch.float32 else NEAR_IN_HALF
    away = (inputs.embeds.float() - first).abs().amax(dim=2) > near * first.square().mean().sqrt()
    away |= (inputs.positions != inputs.positions[:, :1]).any(dim=0)
    away |= inputs.sizes != inputs.sizes[:1]
    same = ~away.any(dim=0) & (inputs.mask == 1).all(dim=0)
    return min(int(same.cumprod(dim=0).sum()), int(inputs.mask.sum(dim=1).min()) - 1)


def _stacked(tensors: Sequence[Tensor], axis: int, value: float = 0.0) -> Tensor:
    """Puts tensors of several groups under one another, `value` at the end of the shorter ones along an axis."""
    longest = max(x.shape[axis] for x in tensors)
    return torch.cat(
        [F.pad(x, (*[0, 0] * (x.ndim - 1 - axis), 0, longest - x.shape[axis]), value=value) for x in tensors]
    )
