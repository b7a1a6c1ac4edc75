"""CDPruner: a diverse subset, conditioned on the question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..kernels import greedy_map, segment_reduce, upload
from .base import Compressor, CompressorConfig, Context, Sizes, check_choice
from .reading import question_cosine, read_attention, read_question
from .registry import register
from .stream import TokenStream

_NEED = {"question": "question", "attention": "encoder_attention", "none": None}
_LEAST_SPAN = 1e-6  # relevances that lie closer together are all the same; the released code adds as much


@dataclass(frozen=True)
class CDPrunerConfig(CompressorConfig):
    """Options of `CDPruner`.

    Args:
        keep_ratio: tokens out / tokens in, in (0, 1].
        quality: what a token's worth apart from diversity is: "question", its mean cosine with the question's words;
            "attention", what it receives in the tower's last layer; "none", the same for all.
    """

    keep_ratio: float = 0.5
    quality: Literal["question", "attention", "none"] = "question"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("quality", self.quality, _NEED)


@register("cdpruner")
class CDPruner(Compressor):
    """Keeps the most probable subset of a determinantal point process with kernel `L = diag(q) cos diag(q)`, greedily.

    `log det L_S = sum of log q_i^2 + log det cos_S`: relevant tokens that are unlike one another. q is the relevance to
    the question, scaled to the clip's range: `(r - min r) / (max r - min r)`.

    Paper: "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs",
    arXiv 2506.10967. SA-MAP's comparison ported it to audio without a question: the presets `unconditional` (its
    "cdpruner") and `attention` (its "cdpruner-attention").

    Differs from the paper:
        - Relevance is the cosine of the LLM's input embeddings; there of CLIP's image and text embeddings, and the
          released code negates it.
        - When nothing new is left in any token (more tokens are kept than the embeddings have dimensions), the rest
          goes by relevance; the released code divides by what rounding has left.
        - `attention` is the attention received, not the diagonal of the map's maximum over heads.
    """

    config_class: ClassVar[type[CompressorConfig]] = CDPrunerConfig
    config: CDPrunerConfig
    presets: ClassVar = {"unconditional": {"quality": "none"}, "attention": {"quality": "attention"}}
    query_aware = True
    paper = "2506.10967"
    summary = "a diverse subset (DPP) of tokens like the question"
    differs = "relevance from the LLM's embeddings, not CLIP's, and not negated"

    def __init__(self, config: CompressorConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.query_aware = self.config.quality == "question"

    @property
    def needs(self) -> frozenset[str]:
        """Where the quality comes from."""
        need = _NEED[self.config.quality]
        return frozenset() if need is None else frozenset({need})

    def compress(self, stream: TokenStream, context: Context) -> TokenStream:
        """Selects."""
        budget = self.budget(stream.lengths)
        kept = greedy_map(self.read_quality(stream, context), stream.embeds, stream.lengths, budget)
        return stream.select(kept, budget)

    def read_quality(self, stream: TokenStream, context: Context) -> Tensor:
        """Gives q, `[N]` float32."""
        if self.config.quality == "none":
            return torch.ones_like(stream.sizes)
        if self.config.quality == "attention":
            return read_attention(stream, context, self.name)
        return relevance(stream, read_question(stream, context, self.name))


@torch.no_grad()
def relevance(stream: TokenStream, question: TokenStream) -> Tensor:
    """Gives each token's mean cosine with the words of its clip's question, scaled to 0 to 1 per clip.

    Args:
        stream: the clips' tokens, `[N, D]`.
        question: at least one word for each clip that has tokens, `[Q, D]`.

    Returns:
        `[N]` float32; 1 everywhere in a clip whose tokens are all alike.
    """
    cosine = question_cosine(stream, question)
    counts = upload([n for n in stream.lengths if n], cosine.device)
    least, most = (
        segment_reduce(cosine, reduce, counts).repeat_interleave(counts, output_size=len(cosine))
        for reduce in ("min", "max")
    )
    return (cosine - least + _LEAST_SPAN) / (most - least + _LEAST_SPAN)
