"""Several compressors, one after another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from .base import Compressor, CompressorConfig, Context
from .stream import TokenStream


class Chain(Compressor):
    """Applies compressors in sequence. Slots stay those of the uncompressed clips, sizes add up, rates multiply.

    Args:
        members: in the order they are applied, all for the same width.

    Raises:
        ValueError: there is no member, widths differ, a member does not act between tower and LLM, or one after the
            first reads the tower's states, which the one before it has not shortened.
    """

    def __init__(self, members: Sequence[Compressor]) -> None:
        if not members:
            raise ValueError("Chain needs at least one compressor, got none")
        if len({member.hidden_size for member in members}) > 1:
            sizes = ", ".join(f"{member.name} {member.hidden_size}" for member in members)
            raise ValueError(f"the members of a Chain must share one hidden_size, got {sizes}")
        for i, member in enumerate(members):
            if member.stage != "connector":
                raise ValueError(f"Chain takes methods of stage 'connector', got {member.name} of {member.stage!r}")
            if i and "encoder_hidden" in member.needs:
                raise ValueError(
                    f"{member.name} reads encoder_hidden, the uncompressed audio, so it must be the first of a Chain; "
                    f"got it after {members[i - 1].name}"
                )
        ratio = math.prod(member.config.keep_ratio for member in members)
        super().__init__(CompressorConfig(keep_ratio=ratio), members[0].hidden_size, members[0].encoder_size)
        self.members = nn.ModuleList(members)
        self.name = "+".join(member.name for member in members)  # type: ignore[misc]
        self.trained = any(member.trained for member in members)
        self.query_aware = any(member.query_aware for member in members)  # type: ignore[misc]

    @property
    def needs(self) -> frozenset[str]:
        """What any member reads."""
        return frozenset().union(*(member.needs for member in self.members))  # type: ignore[arg-type]

    def budget(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Gives what the last member leaves of what the others left."""
        for member in self.members:
            lengths = member.budget(lengths)  # type: ignore[operator]
        return tuple(lengths)

    def compress(self, stream: TokenStream, context: Context) -> TokenStream:
        """Applies the members."""
        for member in self.members:
            stream = member(stream, context)
        return stream

    def describe(self) -> dict[str, Any]:
        """Gives the members' descriptions beside what `Compressor.describe` gives."""
        return super().describe() | {"members": [member.describe() for member in self.members]}  # type: ignore[operator]
