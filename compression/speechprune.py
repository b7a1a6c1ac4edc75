"""Query-aware pruning: first by likeness to the question, then by a binarised copy of the LLM's first attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..kernels import attention_received, segment_reduce, tally, top_k
from .base import TOKENS_PER_SECOND, Compressor, CompressorConfig, Context, Sizes, check_number
from .budget import token_budget
from .reading import question_cosine, read_question
from .registry import register
from .stream import TokenStream

# The paper's main table: of clips of 87.89 s on average phase 1 keeps 750 tokens, and phase 2 four fifths of those.
SPIRAL_PHASE1 = 750 / (87.89 * TOKENS_PER_SECOND)
SPIRAL = 0.8 * SPIRAL_PHASE1


@dataclass(frozen=True)
class SpeechPruneConfig(CompressorConfig):
    """Options of `SpeechPrune`.

    Args:
        keep_ratio: tokens out / tokens in, in (0, 1].
        phase1_share: how much of the pruning phase 1 does: it keeps `keep_ratio ** phase1_share` of the tokens, and
            phase 2 the rest of the way. 1 is phase 1 alone, 0 phase 2 alone, 1/2 prunes by the same factor in both.
    """

    keep_ratio: float = 0.5
    phase1_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("phase1_share", self.phase1_share, "[0, 1]")


@register("speechprune")
class SpeechPrune(Compressor):
    """Keeps the tokens that resemble the question, and of those the ones that attract attention.

    Phase 1. A token's relevance is its mean cosine with the question's tokens; a second's is the sum over its tokens.
    With p the softmax over a clip's seconds, second i keeps its `n_i = floor(budget * p_i)` most relevant tokens.

    Phase 2, on what is left: `A = softmax(Q K^T / sqrt(d))` with `Q = sign(S) sign(W_q)`, `K = sign(S) sign(W_k)` and
    the weights of the LLM's first layer. Kept are the tokens that receive the most attention, summed over heads and
    queries.

    Paper: "SpeechPrune: Context-aware Token Pruning for Speech Information Retrieval", arXiv 2412.12009.

    Differs from the paper:
        - Its n_i miss the budget: floors leave tokens over, and n_i may exceed the second's tokens. Ours are
          `floor(lambda * p_i)`, at most the second's tokens, with the least `lambda >= budget` that meets it exactly.
        - Both rates follow from the clip's length. The paper keeps 750 tokens in phase 1 whatever the length; the
          preset `spiral` does so for its mean clip.
        - It prints the mean of A over the keys, which is the same for every token; ours is over the queries.
        - Of a second whose tokens were merged before, each token counts once.
        - Open there, and read literally here: phase 2 has no LayerNorm, bias, rotary embedding or causal mask; sign(0)
          is 0; a short last second has the smaller sum.
    """

    config_class: ClassVar[type[CompressorConfig]] = SpeechPruneConfig
    config: SpeechPruneConfig
    presets: ClassVar = {
        "spiral": {"keep_ratio": SPIRAL, "phase1_share": math.log(SPIRAL_PHASE1) / math.log(SPIRAL)},
        "phase-1": {"phase1_share": 1.0},
        "phase-2": {"phase1_share": 0.0},
    }
    query_aware = True
    paper = "2412.12009"
    summary = "tokens like the question, then those the first layer attends to"
    differs = "exact budget, a share of the clip instead of 750 tokens; phase 2 averages over queries, not keys"

    def __init__(self, config: CompressorConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.query_aware = self.config.phase1_share > 0

    @property
    def needs(self) -> frozenset[str]:
        """The question for phase 1, the LLM's first layer for phase 2."""
        share = self.config.phase1_share
        return frozenset({"question"} if share > 0 else ()) | frozenset({"first_layer"} if share < 1 else ())

    def compress(self, stream: TokenStream, context: Context) -> TokenStream:
        """Prunes twice, or once."""
        budget, share = self.budget(stream.lengths), self.config.phase1_share
        if share > 0:
            scores = relevance(stream, read_question(stream, context, self.name))
            survivors = token_budget(stream.lengths, self.config.keep_ratio**share)
            stream = stream.select(top_k(scores, stream.lengths, survivors), survivors)
        if stream.lengths != budget:
            scores = binary_attention(stream, self.read_first_layer(context))
            stream = stream.select(top_k(scores, stream.lengths, budget), budget)
        return stream

    def read_first_layer(self, context: Context) -> nn.Module:
        """Gives the attention of the LLM's first layer; raises ValueError if it is not of the stream's width."""
        attention: nn.Module = context.require("first_layer", self.name).self_attn
        width = attention.q_proj.weight.shape[1]  # type: ignore[union-attr, index]
        if width != self.hidden_size:
            raise ValueError(f"{self.name}: first_layer must be of width {self.hidden_size}, got {width}")
        return attention


@torch.no_grad()
def relevance(stream: TokenStream, question: TokenStream) -> Tensor:
    """Scores the tokens so that the best `budget` of a clip are what phase 1 keeps, `[N]` float32.

    The token of rank r (0 is the best) in second i is among the first `floor(lambda * p_i)` as soon as lambda reaches
    `(r + 1) / p_i`. So the tokens that a growing lambda lets in come in the order of `log p_i - log(r + 1)`, and p's
    denominator, the same for a whole clip, drops out. A second is one of the uncompressed clip's.

    Args:
        stream: the clips' tokens, `[N, D]`.
        question: at least one token for each clip that has any, `[Q, D]`.
    """
    cosine = question_cosine(stream, question)
    key = stream.clips * 2**32 + stream.slots // TOKENS_PER_SECOND
    begins = torch.ones_like(key, dtype=torch.bool)
    begins[1:] = key.diff() != 0
    second = begins.cumsum(0) - 1
    place = torch.arange(len(key), device=key.device)
    # As many counts as there are tokens, most of them 0: how many seconds there are is not known without waiting.
    counts = tally(second, len(second))
    best_first = cosine.argsort(descending=True, stable=True)
    best_first = best_first[second[best_first].argsort(stable=True)]  # second by second
    rank = torch.empty_like(second)
    rank[best_first] = place - torch.where(begins, place, 0).cummax(0).values
    return segment_reduce(cosine, "sum", counts)[second] - (rank + 1).log()


@torch.no_grad()
def binary_attention(stream: TokenStream, attention: nn.Module) -> Tensor:
    """Scores the tokens by the binarised attention that they receive from their own clip, `[N]` float32.

    The logarithm of the mean over heads and queries. Products of signs are large numbers, so that a softmax over them
    is all but one-hot: outside the logarithm most of its values underflow to the same 0.

    Args:
        stream: the clips' tokens, `[N, D]`.
        attention: with `q_proj`, `k_proj` and `head_dim`; key heads may be fewer than query heads.
    """
    size = int(attention.head_dim)  # type: ignore[arg-type]
    # On a GPU half precision is many times as fast, and exact for whole numbers up to 2,048: far beyond what the sum
    # of a few thousand signs comes to, unless tokens and weights are all alike.
    dtype = torch.float16 if stream.embeds.is_cuda else torch.float32
    with torch.autocast(stream.embeds.device.type, enabled=False):
        signs = stream.embeds.sign().to(dtype)
        q, k = (
            (signs @ layer.weight.sign().to(dtype).T).unflatten(1, (-1, size))  # type: ignore[union-attr, operator]
            for layer in (attention.q_proj, attention.k_proj)
        )
    return attention_received(q, k, stream.lengths, size**-0.5, log=True)
