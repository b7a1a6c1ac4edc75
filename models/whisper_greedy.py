"""Greedy decoding of many clips at once by Whisper's decoder, on a GPU as CUDA graphs.

A step of transformers' `generate` waits for Python, whatever the batch. Here a step is a fixed row of operations on
buffers of fixed size, recorded once and replayed; rows that have ended leave the batch. The layers are the model's own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import WhisperForConditionalGeneration

LOOK_EVERY = 16  # steps between two looks at how many rows are left, each of which waits for the GPU; a guess
SHRINK = 4  # rows move to smaller buffers where these have so many times fewer; halves would take twice the memory
KEY_MULTIPLE = 8  # of the keys, which fast attention with a mask asks for in half precision
GPU_MULTIPLE = 376  # of what is heard, so that few sizes are recorded: a quarter of Whisper's states, and a bit
WARM_UP = 3  # steps before recording, as PyTorch's documentation of CUDA graphs has it


@dataclass
class _Buffers:
    """What the steps of B rows read and write.

    Args:
        written: `[B, L]`, prompt and text.
        place: `[1]`, the token that is read next.
        done: `[B]` bool.
        own: per layer keys and values of what was written, `[B, H, L, d]`.
        heard: per layer keys and values of what was heard, `[B, H, K, d]`.
        bias: `[B, 1, 1, K]`, added to the logits of those keys.
        graph: a recorded step; None on a CPU.
    """

    written: Tensor
    place: Tensor
    done: Tensor
    own: list[tuple[Tensor, Tensor]]
    heard: list[tuple[Tensor, Tensor]]
    bias: Tensor
    graph: torch.cuda.CUDAGraph | None = None

    def rows(self) -> list[Tensor]:
        """Gives all that has one entry per row."""
        return [self.written, self.done, self.bias, *(x for pair in (*self.own, *self.heard) for x in pair)]


class GreedyDecoder:
    """Writes greedily what a Whisper hears.

    Args:
        model: with a generation config that knows its special tokens and those it is not to write.
        dtype: of the arithmetic.
        most: tokens at most after the prompt.
    """

    def __init__(self, model: WhisperForConditionalGeneration, dtype: torch.dtype, most: int) -> None:
        config, own = model.generation_config, model.model.decoder
        self.decoder = own if own.layer_norm.weight.dtype == dtype else copy.deepcopy(own).to(dtype)
        self.out = model.proj_out.weight.detach().to(dtype)
        self.dtype, self.most = dtype, most
        self.eos: int = config.eos_token_id
        self.never = self.out.new_zeros(2, len(self.out))  # at the first place, and at all later ones
        self.never[:, config.suppress_tokens or []] = -torch.inf
        self.never[0, config.begin_suppress_tokens or []] = -torch.inf
        self.buffers: dict[tuple[int, ...], _Buffers] = {}

    @torch.no_grad()
    def __call__(self, states: Tensor, bias: Tensor, prompts: Tensor) -> Tensor:
        """Writes until every row has ended.

        Args:
            states: `[B, K, D]`, what is heard.
            bias: `[B, K]`, added to the attention logits of its keys.
            prompts: `[B, P]` int64.

        Returns:
            `[B, most]` int64, after an end nothing but ends.
        """
        keys = _rounded(states.shape[1], GPU_MULTIPLE if states.is_cuda else KEY_MULTIPLE)
        rows, start = prompts.shape
        buffers = self._buffers(rows, keys, start)
        self._fill(buffers, states, bias, prompts)
        texts = torch.full((rows, start + self.most), self.eos, device=states.device)
        left = torch.arange(rows, device=states.device)  # which row of the result each row of the buffers is
        for step in range(start + self.most - 1):
            if step and step % LOOK_EVERY == 0:
                open_rows = (~buffers.done).nonzero()[:, 0]
                if not len(open_rows):
                    break
                if self._rows(len(open_rows), states.device) * SHRINK <= len(buffers.done):
                    texts[left] = buffers.written[: len(left), : texts.shape[1]]
                    buffers, left = self._move(buffers, open_rows, keys, start), left[open_rows]
            if buffers.graph is None:
                self._step(buffers, start)
            else:
                buffers.graph.replay()
        texts[left] = buffers.written[: len(left), : texts.shape[1]]
        return texts[:, start:]

    def _step(self, buffers: _Buffers, start: int) -> None:
        """Reads one token per row and writes the next, unless it is the prompt's."""
        place = buffers.place
        decoder = self.decoder
        x = decoder.embed_tokens(buffers.written.index_select(1, place)[:, 0])  # [B, D]
        x = x + decoder.embed_positions.weight[place]
        later = torch.arange(buffers.written.shape[1], device=x.device) > place
        causal = torch.zeros_like(later, dtype=x.dtype).masked_fill(later, -torch.inf)[None, None, None]
        for layer, own, heard in zip(decoder.layers, buffers.own, buffers.heard, strict=True):
            attention, h = layer.self_attn, layer.self_attn_layer_norm(x)
            for cache, project in zip(own, (attention.k_proj, attention.v_proj), strict=True):
                cache.index_copy_(2, place, _heads(project(h), attention.num_heads))
            x = x + _attend(attention, h, own, causal)
            x = x + _attend(layer.encoder_attn, layer.encoder_attn_layer_norm(x), heard, buffers.bias)
            x = x + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(x))))
        logits = functional.linear(decoder.layer_norm(x), self.out) + self.never[(place >= start).long()]
        following = place + 1
        given = buffers.written.index_select(1, following)[:, 0]
        chosen = torch.where(following >= start, logits.argmax(dim=1).masked_fill(buffers.done, self.eos), given)
        buffers.written.index_copy_(1, following, chosen[:, None])
        buffers.done |= (chosen == self.eos) & (following >= start)
        place.add_(1)

    def _rows(self, wanted: int, device: torch.device) -> int:
        """Gives how many rows buffers for so many have: on a GPU a power of two, so that there are few."""
        return 1 << (wanted - 1).bit_length() if device.type == "cuda" else wanted

    def _buffers(self, rows: int, keys: int, start: int) -> _Buffers:
        """Gives buffers, and on a GPU a recorded step; they are made once per size."""
        device = self.out.device
        rows = self._rows(rows, device)
        if (known := self.buffers.get((rows, keys, start))) is not None:
            return known
        attention, length = self.decoder.layers[0].self_attn, _rounded(start + self.most, KEY_MULTIPLE)

        def caches(tokens: int) -> list[tuple[Tensor, Tensor]]:
            shape = (rows, attention.num_heads, tokens, attention.head_dim)
            make = {"dtype": self.dtype, "device": device}
            return [(torch.zeros(shape, **make), torch.zeros(shape, **make)) for _ in self.decoder.layers]

        made = _Buffers(
            written=torch.full((rows, length), self.eos, device=device),
            place=torch.zeros(1, dtype=torch.long, device=device),
            done=torch.ones(rows, dtype=torch.bool, device=device),
            own=caches(length),
            heard=caches(keys),
            bias=torch.zeros(rows, 1, 1, keys, dtype=self.dtype, device=device),
        )
        if device.type == "cuda":
            made.graph = self._record(made, start)
            self.buffers[rows, keys, start] = made
        return made

    def _record(self, buffers: _Buffers, start: int) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._step(buffers, start)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step(buffers, start)
        return graph

    def _fill(self, buffers: _Buffers, states: Tensor, bias: Tensor, prompts: Tensor) -> None:
        """Puts in what is heard; rows beyond the batch have ended, and keys beyond the states are left out."""
        rows, keys = states.shape[:2]
        for layer, pair in zip(self.decoder.layers, buffers.heard, strict=True):
            attention = layer.encoder_attn
            for cache, project in zip(pair, (attention.k_proj, attention.v_proj), strict=True):
                cache[:rows, :, :keys] = _heads(project(states.to(self.dtype)), attention.num_heads)
                cache[:rows, :, keys:] = 0
        buffers.bias.fill_(torch.finfo(self.dtype).min)
        buffers.bias[:rows, 0, 0, :keys] = bias.to(self.dtype)
        buffers.bias[rows:] = 0
        buffers.written.fill_(self.eos)
        buffers.written[:rows, : prompts.shape[1]] = prompts
        buffers.done.fill_(True)
        buffers.done[:rows] = False
        buffers.place.zero_()

    def _move(self, buffers: _Buffers, rows: Tensor, keys: int, start: int) -> _Buffers:
        """Moves some rows into buffers of their number."""
        smaller = self._buffers(len(rows), keys, start)
        for old, new in zip(buffers.rows(), smaller.rows(), strict=True):
            torch.index_select(old, 0, rows, out=new[: len(rows)])
        smaller.done[len(rows) :] = True
        smaller.place.copy_(buffers.place)
        return smaller


def _rounded(keys: int, multiple: int) -> int:
    return -(-keys // multiple) * multiple


def _heads(x: Tensor, heads: int) -> Tensor:
    """Gives `[B, H, n, d]` of `[B, n, D]`, or of `[B, D]` with n = 1."""
    return (x[:, None] if x.ndim == 2 else x).unflatten(2, (heads, -1)).transpose(1, 2)


def _attend(attention: nn.Module, x: Tensor, pair: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    """Attends from `[B, D]` to keys and values `[B, H, n, d]` with a mask that is added."""
    query = _heads(attention.q_proj(x), attention.num_heads)
    mixed = functional.scaled_dot_product_attention(query, *pair, attn_mask=mask, scale=attention.scaling)
    return attention.out_proj(mixed.transpose(1, 2).flatten(1))
