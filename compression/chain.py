"""Several compressors, one after another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from .base import Compressor, CompressorConfig, Context
from .stream import TokenStream

PER_TOKEN = {"encoder_hidden", "encoder_keys", "encoder_attention"}  # what belongs to the uncompressed tokens


class Chain(Compressor):
    """Applies compressors in sequence. Slots stay those of the uncompressed clips, sizes add up, rates multiply.

    Args:
        members: in the order they are applied, all for the same width; of a chain among them its members.

    Raises:
        ValueError: there is no member, widths differ, a member does not act between tower and LLM, or one after the
            first reads the tower's states, which the one before it has not shortened.
    """

    def __init__(self, members: Sequence[Compressor]) -> None:
        members = [part for member in members for part in getattr(member, "members", (member,))]  # a chain's, flat
        if not members:
            raise ValueError("Chain needs at least one compressor, got none")
        if len({member.hidden_size for member in members}) > 1:
            sizes = ", ".join(f"{member.name} {member.hidden_size}" for member in members)
            raise ValueError(f"the members of a Chain must share one hidden_size, got {sizes}")
        for i, member in enumerate(members):
            if member.stage != "connector" and (i or member.stage != "encoder"):
                raise ValueError(
                    f"Chain takes methods of stage 'connector', and one of 'encoder' as its first; "
                    f"got {member.name} of {member.stage!r}"
                )
            if i and (read := sorted(member.needs & PER_TOKEN)):
                raise ValueError(
                    f"{member.name} reads {', '.join(read)}, of the uncompressed audio, so it must be the first of a "
                    f"Chain; got it after {members[i - 1].name}"
                )
        ratio = math.prod(member.config.keep_ratio for member in members)
        super().__init__(CompressorConfig(keep_ratio=ratio), members[0].sizes)
        self.members = nn.ModuleList(members)
        self.stage = members[0].stage
        self.name = "+".join(member.name for member in members)  # type: ignore[misc]
        self.trained = any(member.trained for member in members)
        self.query_aware = any(member.query_aware for member in members)

    @property
    def needs(self) -> frozenset[str]:
        """What any member reads."""
        return frozenset().union(*(member.needs for member in self.members))  # type: ignore[arg-type]

    def budget(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Gives what the last member leaves of what the others left."""
        for member in self.members:
            lengths = member.budget(lengths)  # type: ignore[operator]
        return tuple(lengths)

    def at(self, keep_ratio: float) -> Compressor:
        """Raises ValueError: one ratio does not say how several methods share it."""
        raise ValueError(f"{self.name} is a chain: one keep_ratio does not say how its members share it")

    def split(self) -> tuple[Compressor | None, Compressor | None]:
        """Gives the first member, where it acts in the tower, and the others."""
        members: list[Compressor] = list(self.members)  # type: ignore[arg-type]
        if self.stage != "encoder":
            return None, self
        after = members[1:]
        return members[0], Chain(after) if len(after) > 1 else next(iter(after), None)

    def initialize(self, language_model: nn.Module) -> None:
        """Initializes the members."""
        for member in self.members:
            member.initialize(language_model)  # type: ignore[operator]

    @property
    def adaptive(self) -> bool:
        """Whether any member is."""
        return any(member.adaptive for member in self.members)

    @property
    def frozen(self) -> frozenset[str]:
        """Those of the members."""
        return frozenset(
            f"members.{i}.{name}"
            for i, member in enumerate(self.members)
            for name in member.frozen  # type: ignore[union-attr]
        )

    @property
    def proportional_attention(self) -> bool:
        """Whether any member asks for it."""
        return any(member.proportional_attention for member in self.members)

    def compress(self, stream: TokenStream, context: Context) -> TokenStream:
        """Applies the members."""
        for member in self.members:
            stream = member(stream, context)
        return stream

    def describe(self) -> dict[str, Any]:
        """Gives the members' descriptions beside what `Compressor.describe` gives."""
        return super().describe() | {"members": [member.describe() for member in self.members]}  # type: ignore[operator]
