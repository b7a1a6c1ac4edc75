"""The case table: every method and preset that the contract is checked on. A new method adds its rows here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from audiopress import Compressor, Context, TokenStream, build

HIDDEN_SIZE, ENCODER_SIZE = 12, 8
HIDDEN = frozenset({"encoder_hidden"})


@dataclasses.dataclass(frozen=True)
class Case:
    """One row.

    Args:
        name: as `build` takes it.
        options: of the method; small widths, so that the suite is quick.
        needs: what the method must say it reads.
        covers: whether it merges all tokens, so that sizes sum to the clip's length.
    """

    name: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    needs: frozenset[str] = frozenset()
    covers: bool = True

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])

    def build(self, **options: Any) -> Compressor:
        """Builds it with the same weights on every call."""
        torch.manual_seed(0)
        sizes = {"hidden_size": HIDDEN_SIZE, "encoder_size": ENCODER_SIZE}
        return build(self.name, **sizes, **self.options | options).eval()


MLP = {"mlp_size": 16}
OSUM = {"ffn_size": 16}

CASES = [
    Case("none"),
    Case("random", {"keep_ratio": 0.8}, covers=False),
    Case("random", {"keep_ratio": 0.1}, covers=False),
    Case("uniform-stride", {"keep_ratio": 0.8}, covers=False),
    Case("uniform-stride", {"keep_ratio": 0.1}, covers=False),
    Case("stacking", {"keep_ratio": 0.5, **MLP}),
    Case("stacking", {"k": 10, "norm": True, **MLP}),
    Case("stacking", {"k": 3, "tail": "drop", **MLP}, covers=False),
    Case("stacking", {"k": 4, "combine": "mean", **MLP}),
    Case("stacking", {"source": "hidden", "k": 2, **MLP}, HIDDEN),
    Case("stacking:slam-asr", MLP, HIDDEN),
    Case("stacking:slam-asr", {"tail": "drop", **MLP}, HIDDEN, covers=False),
    Case("stacking:llama-omni", MLP, HIDDEN),
    Case("stacking:llama-avsr", MLP, HIDDEN),
    Case("stacking:llama-avsr", {"combine": "mean", "k": 4, "norm": True, **MLP}, HIDDEN),
    Case("pooling", {"keep_ratio": 0.7}),
    Case("pooling", {"keep_ratio": 0.1, "kind": "max"}),
    Case("pooling", {"keep_ratio": 0.3, "kind": "attentive"}),
    Case("pooling", {"k": 3}),
    Case("pooling", {"k": 5, "tail": "drop", "kind": "max"}, covers=False),
    Case("pooling", {"keep_ratio": 0.3, "source": "hidden"}, HIDDEN),
    Case("pooling:qwen2-audio", {}, HIDDEN),
    Case("pooling:qwen2-audio", {"k": 5, "kind": "attentive"}, HIDDEN),
    Case("pooling:qwen2.5-omni"),
    Case("conv"),
    Case("conv", {"keep_ratio": 1 / 6}),
    Case("conv:speechverse", {}, HIDDEN),
    Case("conv:speechverse", {"source": "tokens", "keep_ratio": 0.25, "activation": "gelu"}),
    Case("conv:osum", OSUM, HIDDEN),
    Case("conv:osum", {"keep_ratio": 0.25, **OSUM}, HIDDEN),
    Case("conv:lucy"),
    Case("conv:lucy", {"source": "hidden", "keep_ratio": 0.4}, HIDDEN),
    Case("pooling+stacking", {"pooling": {"keep_ratio": 0.6}, "stacking": {"k": 3, **MLP}}),
    Case("conv:osum+uniform-stride", {"conv": OSUM, "uniform-stride": {"keep_ratio": 0.3}}, HIDDEN, covers=False),
]


def make_stream(lengths: Sequence[int], seed: int = 0) -> TokenStream:
    """Random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return TokenStream(torch.randn(sum(lengths), HIDDEN_SIZE, generator=generator), tuple(lengths))


def make_context(lengths: Sequence[int], seed: int = 0) -> Context:
    """Everything a method may read; the tower gives every second clip its odd trailing state."""
    generator = torch.Generator().manual_seed(seed + 1)
    states = tuple(2 * n + i % 2 for i, n in enumerate(lengths))
    return Context(TokenStream(torch.randn(sum(states), ENCODER_SIZE, generator=generator), states), seed=seed)
