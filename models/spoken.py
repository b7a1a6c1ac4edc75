"""What an encoder says of clips, speech and the silence after it apart, and what a decoder then hears of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..compression import Context, TokenStream
from ..kernels import pad_clips
from ..kernels.packed import upload

NEVER = -1e4  # added to an attention logit, leaves nothing of it; infinity would make NaN of products with 0
OF_STATES = ("encoder_hidden", "encoder_keys")  # of a context, what comes twice per token


@dataclass(frozen=True)
class Spoken:
    """What the encoder says of a batch.

    Args:
        speech: per clip the tokens of its speech, 25 per second, or what a method inside the encoder left.
        silence: those of the silence after it, up to 30 s.
        context: of the speech, for methods after the encoder.
    """

    speech: TokenStream
    silence: TokenStream
    context: Context

    def split(self) -> list[Spoken]:
        """Gives each clip by itself."""
        contexts: list[Context] = [Context() for _ in self.speech.lengths]
        for name in OF_STATES:
            if (states := getattr(self.context, name)) is not None:
                for context, own in zip(contexts, states.split(), strict=True):
                    setattr(context, name, own)
        if self.context.encoder_attention is not None:
            for context, seen in zip(contexts, self.context.encoder_attention.split(self.speech.lengths), strict=True):
                context.encoder_attention = seen
        return [Spoken(*own) for own in zip(self.speech.split(), self.silence.split(), contexts, strict=True)]

    def to(self, dtype: torch.dtype) -> Spoken:
        """Gives it with its tokens and states in a dtype."""
        context = Context(encoder_attention=self.context.encoder_attention)
        for name in OF_STATES:
            if (states := getattr(self.context, name)) is not None:
                setattr(context, name, states.replace(embeds=states.embeds.to(dtype)))
        speech, silence = (s.replace(embeds=s.embeds.to(dtype)) for s in (self.speech, self.silence))
        return Spoken(speech, silence, context)

    @classmethod
    def cat(cls, batches: Sequence[Spoken]) -> Spoken:
        """Gives the clips of several batches as one."""
        context = Context()
        for name in OF_STATES:
            states = [getattr(batch.context, name) for batch in batches]
            setattr(context, name, None if states[0] is None else cat(states))
        if batches[0].context.encoder_attention is not None:
            context.encoder_attention = torch.cat([batch.context.encoder_attention for batch in batches])
        return cls(cat([batch.speech for batch in batches]), cat([batch.silence for batch in batches]), context)


@dataclass(frozen=True)
class Heard:
    """What the decoder reads of a batch.

    Args:
        stream: per clip the tokens of its speech, then those of the silence up to 30 s.
        kept: tokens of each clip's speech.
        by_size: whether log(size) is added to a token's attention logits.
    """

    stream: TokenStream
    kept: tuple[int, ...]
    by_size: bool = False

    @classmethod
    def cat(cls, batches: Sequence[Heard]) -> Heard:
        """Gives the clips of several batches as one; they are of one method."""
        streams, kept = (tuple(getattr(batch, name) for batch in batches) for name in ("stream", "kept"))
        return cls(cat(streams), tuple(n for part in kept for n in part), batches[0].by_size)

    def to(self, dtype: torch.dtype) -> Heard:
        """Gives it with its tokens in a dtype."""
        return replace(self, stream=self.stream.replace(embeds=self.stream.embeds.to(dtype)))

    def padded(self) -> tuple[Tensor, Tensor]:
        """Gives the tokens `[C, K, D]`, and what is added to the attention logits of each, `[C, K]`."""
        stream = self.stream
        bias = stream.sizes.log() if self.by_size else torch.zeros_like(stream.sizes)
        return pad_clips(stream.embeds, stream.lengths)[0], pad_clips(bias, stream.lengths, NEVER)[0]


def cut(stream: TokenStream, lengths: Sequence[int]) -> tuple[TokenStream, TokenStream, Tensor]:
    """Gives the first `lengths[c]` tokens of each clip, the tokens after them, and which are the first, `[N]` bool."""
    is_first = stream.positions < upload(lengths, stream.embeds.device)[stream.clips]
    rest = [n - first for n, first in zip(stream.lengths, lengths, strict=True)]
    picked = (
        stream.select(where.nonzero_static(size=sum(counts))[:, 0], counts)
        for where, counts in ((is_first, lengths), (~is_first, rest))
    )
    return *picked, is_first  # type: ignore[return-value]  # two streams


def join(first: TokenStream, rest: TokenStream) -> TokenStream:
    """Gives every clip's tokens of the one stream, then of the other."""
    order = torch.cat([first.clips, rest.clips]).argsort(stable=True)
    embeds, slots, sizes = (
        torch.cat(pair)[order]
        for pair in ((first.embeds, rest.embeds), (first.slots, rest.slots), (first.sizes, rest.sizes))
    )
    lengths = tuple(a + b for a, b in zip(first.lengths, rest.lengths, strict=True))
    return TokenStream(embeds, lengths, slots, sizes)


def of_speech(context: Context, tokens: Sequence[int], is_speech: Tensor) -> Context:
    """Gives the context of the speech alone; two states are a token."""
    found: dict[str, Any] = {}
    for name in ("encoder_hidden", "encoder_keys"):
        states = getattr(context, name)
        found[name] = None if states is None else states.head([2 * n for n in tokens])
    attention = context.encoder_attention
    return Context(**found, encoder_attention=None if attention is None else attention[is_speech])


def cat(streams: Sequence[TokenStream]) -> TokenStream:
    """Gives the clips of several streams as one."""
    embeds, slots, sizes = (torch.cat([getattr(s, name) for s in streams]) for name in ("embeds", "slots", "sizes"))
    return TokenStream(embeds, tuple(n for s in streams for n in s.lengths), slots, sizes)
