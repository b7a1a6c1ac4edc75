"""Context fields that several methods read, checked against the stream."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels import segment_mean, upload
from .base import Context, check_finite, check_tokens
from .stream import TokenStream


def read_attention(stream: TokenStream, context: Context, method: str) -> Tensor:
    """Gives the attention each token receives, `[N]` float32.

    Raises:
        ValueError: it does not fit the stream, is not finite or is negative; the clip is named.
    """
    attention: Tensor = context.require("encoder_attention", method)
    if attention.shape != stream.slots.shape:
        raise ValueError(
            f"{method}: encoder_attention must be [N] = {list(stream.slots.shape)}, got {list(attention.shape)}"
        )
    check_finite(stream.replace(embeds=attention[:, None]), method, "encoder_attention")
    check_tokens(attention < 0, stream.lengths, method, "negative encoder_attention")
    return attention.detach().float()


def read_question(stream: TokenStream, context: Context, method: str) -> TokenStream:
    """Gives the embedded words of each clip's question.

    Raises:
        ValueError: they are not of the stream's clips and width, not finite, or a clip with tokens has none.
    """
    question: TokenStream = context.require("question", method)
    clips, (width, wanted) = len(stream.lengths), (x.embeds.shape[1] for x in (question, stream))
    if len(question.lengths) != clips or width != wanted:
        raise ValueError(
            f"{method}: question must be of the stream's {clips} clips and of width {wanted}, "
            f"got {len(question.lengths)} clips of width {width}"
        )
    for clip, (words, tokens) in enumerate(zip(question.lengths, stream.lengths, strict=True)):
        if tokens and not words:
            raise ValueError(f"{method}: clip {clip} of {clips} has {tokens} tokens but an empty question")
    check_finite(question, method, "question")
    return question


@torch.no_grad()
def question_cosine(stream: TokenStream, question: TokenStream) -> Tensor:
    """Gives each token's mean cosine with the words of its clip's question, `[N]` float32.

    Args:
        stream: the clips' tokens, `[N, D]`.
        question: at least one word for each clip that has tokens, `[Q, D]`.
    """
    device = stream.embeds.device
    asked = [clip for clip, n in enumerate(question.lengths) if n]
    counts = upload([question.lengths[clip] for clip in asked], device)
    words = functional.normalize(question.embeds.float(), dim=1)
    means = segment_mean(words, torch.ones_like(words[:, 0]), counts)  # the mean of cosines is the product with it
    mean = words.new_zeros(len(question.lengths), words.shape[1]).index_copy(0, upload(asked, device), means)  # [C, D]
    # not a matrix product, which autocast would take in bf16, and where copies of a token differ by rounding
    return (functional.normalize(stream.embeds.float(), dim=1) * mean[stream.clips]).sum(dim=1)


def read_keys(stream: TokenStream, context: Context, method: str, heads: int = 1) -> Tensor:
    """Gives the tower's key of each token, the mean of its two states', `[N, D / heads]` float32.

    Args:
        stream: the clips' tokens.
        context: with `encoder_keys`; of T tokens' keys the first 2T are read, the tower may give one more.
        method: for errors.
        heads: the keys are split in so many, and their mean is taken; 1 leaves them side by side.

    Raises:
        ValueError: the keys do not fit the stream or the number of heads, or are not finite.
    """
    keys: TokenStream = context.require("encoder_keys", method)
    wanted = tuple(2 * n for n in stream.lengths)
    if len(keys.lengths) != len(wanted) or any(k not in (n, n + 1) for k, n in zip(keys.lengths, wanted, strict=True)):
        raise ValueError(
            f"{method}: encoder_keys must hold {list(wanted)} states (or one more) for clips of "
            f"{list(stream.lengths)} tokens, got {list(keys.lengths)}"
        )
    width = keys.embeds.shape[1]
    if width % heads:
        raise ValueError(f"{method}: key_heads must divide the keys' width {width}, got {heads}")
    check_finite(keys, method, "encoder_keys")
    states = keys.head(wanted).embeds.detach().float()
    return ((states[0::2] + states[1::2]) / 2).unflatten(1, (heads, -1)).mean(dim=1)
