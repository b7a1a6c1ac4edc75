"""DART: tokens that duplicate a few pivots least."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels import pad_clips, top_k
from .base import Compressor, CompressorConfig, Context, Sizes, check_count
from .reading import read_question
from .registry import register
from .stream import TokenStream


@dataclass(frozen=True)
class DARTConfig(CompressorConfig):
    """Options of `DART`.

    Args:
        keep_ratio: tokens out / tokens in, in (0, 1]; the audio pivots count.
        pivots: how many tokens of a clip are pivots, at most its budget.
        question_pivots: how many words of the question are pivots, too.
    """

    keep_ratio: float = 0.5
    pivots: int = 8
    question_pivots: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("pivots", self.pivots)
        check_count("question_pivots", self.question_pivots, least=0)


@register("dart")
class DART(Compressor):
    """Keeps a few pivots, and for each pivot in turn the tokens that are least like it by cosine.

    Pivots are the tokens of largest L1 norm, and words of the question if `question_pivots` asks for them (these steer
    the choice, and are not among the tokens). They take turns in the order of time, the question's last; each picks the
    same number of those not yet kept, the first ones one more where that does not come out even.

    Paper: "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More",
    arXiv 2502.11494. It has as many pivots in the text as in the image, here the preset `text`: 4 and 4.

    Differs from the paper:
        - Acts before the LLM, on its input embeddings; the paper after its second layer, with that layer's keys for the
          norms.
        - The pivots are part of the budget, which is met exactly; there they come on top of it.
        - All audio pivots by default, so that no question is needed.
    """

    config_class: ClassVar[type[CompressorConfig]] = DARTConfig
    config: DARTConfig
    presets: ClassVar = {"text": {"pivots": 4, "question_pivots": 4}}
    paper = "2502.11494"
    summary = "tokens least like a few pivots"
    differs = "before the LLM; the pivots are part of the budget"

    def __init__(self, config: CompressorConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.query_aware = self.config.question_pivots > 0

    @property
    def needs(self) -> frozenset[str]:
        """The question, where its words are pivots."""
        return frozenset({"question"} if self.config.question_pivots else ())

    def compress(self, stream: TokenStream, context: Context) -> TokenStream:
        """Selects."""
        budget = self.budget(stream.lengths)
        return stream.select(self.choose(stream, context, budget), budget)

    @torch.no_grad()
    def choose(self, stream: TokenStream, context: Context, budget: Sequence[int]) -> Tensor:
        """Gives the tokens to keep, `[M]` int64 ascending."""
        unit = functional.normalize(stream.embeds.float(), dim=1)
        own = [min(self.config.pivots, m) for m in budget]
        pivots = top_k(_norms(stream), stream.lengths, own)
        groups = [(unit[pivots], own)]
        if self.config.question_pivots:
            question = read_question(stream, context, self.name)
            words = [min(self.config.question_pivots, n) for n in question.lengths]
            index = top_k(_norms(question), question.lengths, words)
            groups.append((functional.normalize(question.embeds[index].float(), dim=1), words))

        kept = torch.zeros_like(stream.slots, dtype=torch.bool).index_fill_(0, pivots, True)
        rest = [m - p for m, p in zip(budget, own, strict=True)]
        clips = stream.clips
        for pivot, quota in _turns(groups, rest):
            # not a matrix product, which autocast would take in bf16, and where copies of a token differ by rounding
            likeness = (unit * pivot[clips]).sum(dim=1)
            kept.index_fill_(0, top_k((-likeness).masked_fill(kept, -torch.inf), stream.lengths, quota), True)
        return kept.nonzero_static(size=sum(budget)).squeeze(1)


def _norms(stream: TokenStream) -> Tensor:
    return torch.linalg.vector_norm(stream.embeds.float(), ord=1, dim=1)


def _turns(groups: Sequence[tuple[Tensor, Sequence[int]]], rest: Sequence[int]) -> Iterator[tuple[Tensor, list[int]]]:
    """Gives turn by turn each clip's pivot, `[C, D]`, and how many tokens it picks.

    Args:
        groups: pivots `[P, D]` with their number per clip; a clip's turns go group by group.
        rest: how many tokens each clip has to pick in all.
    """
    pivots = [sum(counts) for counts in zip(*(counts for _, counts in groups), strict=True)]
    before = [0] * len(rest)
    for packed, counts in groups:
        padded, _ = pad_clips(packed, counts)  # [C, P, D]
        for turn in range(max(counts, default=0)):
            yield (
                padded[:, turn],
                [
                    total // of + (first + turn < total % of) if turn < count else 0
                    for total, of, first, count in zip(rest, pivots, before, counts, strict=True)
                ],
            )
        before = [first + count for first, count in zip(before, counts, strict=True)]
