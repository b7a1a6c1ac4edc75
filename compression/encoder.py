"""Methods that act inside the audio tower, between its layers, so that every later layer has less to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, Literal

from torch import Tensor

from ..kernels import segment_merge
from .base import Compressor, CompressorConfig, Sizes, check_choice, check_count
from .frames import even_windows
from .stream import TokenStream

STATE_SIZE = 0.5  # the tower joins its states in pairs: each is half a token
SUBSLOTS = 64  # slots per state inside the tower, so that floors of centres, layer after layer, do not add up


@dataclass(frozen=True)
class LayerState:
    """What a method may read at a layer, after that layer's attention and before its feed-forward.

    Args:
        keys: `[N, D]`, the layer's keys, heads side by side.
        heads: attention heads.
        attention: `[N]` float32, the attention each state receives in its block; its mean over a block is 1. None
            unless `needs` has "encoder_attention".
    """

    keys: Tensor
    heads: int
    attention: Tensor | None = None


@dataclass(frozen=True)
class EncoderConfig(CompressorConfig):
    """Adds where a method acts.

    Args:
        keep_ratio: tokens out / tokens in, in (0, 1].
        stage: "connector" acts on the tower's output, "encoder" inside the tower.
        layers: of the tower in which it acts, from 0; or how many, evenly spaced.
    """

    stage: Literal["connector", "encoder"] = "connector"
    layers: int | tuple[int, ...] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("stage", self.stage, ("connector", "encoder"))
        object.__setattr__(self, "layers", check_layers(self.layers))


class EncoderMethod(Compressor):
    """Base class of methods that can act inside the tower: with `stage == "encoder"` `reduce` is called there.

    The tower attends inside blocks of 2 s; merging and pruning stay inside a block, too, so that blocks only get
    shorter. A clip's budget is shared out over its blocks by their lengths and over the layers geometrically: each
    layer keeps the same share of what it is given. After the last layer the tower's mean of two becomes a size-weighted
    one, and ends at exactly `budget` tokens.
    """

    config_class: ClassVar[type[CompressorConfig]] = EncoderConfig
    config: EncoderConfig

    def __init__(self, config: CompressorConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.stage = self.config.stage

    def encoder_layers(self, depth: int) -> tuple[int, ...]:
        """Gives the layers, from 0, after whose attention the method acts in a tower of `depth` layers."""
        return resolve_layers(self.config.layers, depth)

    def reduce(self, states: TokenStream, targets: Sequence[int], layer: LayerState) -> TokenStream:
        """Shortens every block.

        Args:
            states: one clip per *block*; `slots` count from the start of the audio clip, `SUBSLOTS` per state (50
                states per second), and sizes are in tokens: half of one per state.
            targets: how many states each block is to have (the fewest, for an `adaptive` method).
            layer: what is read at this layer.
        """
        raise NotImplementedError


def resolve_layers(layers: int | Sequence[int], depth: int, inside: bool = False) -> tuple[int, ...]:
    """Gives layers of a tower from their numbers, or so many evenly spaced ones.

    Args:
        layers: numbers from 0; or how many.
        depth: of the tower.
        inside: of how many, the last is not the tower's last: 3 of 12 are 3, 6, 9, as in TopK-AST. Otherwise it is:
            6 of 18 are 2, 5, 8, 11, 14, 17, as in A-ToMe.

    Raises:
        ValueError: a number is outside the tower, or there are more than its layers.
    """
    if isinstance(layers, int):
        if not 1 <= layers <= depth:
            raise ValueError(f"layers must be from 1 to the tower's {depth}, got {layers}")
        if inside:
            return tuple((i + 1) * depth // (layers + 1) for i in range(layers))
        return tuple((i + 1) * depth // layers - 1 for i in range(layers))
    outside = [i for i in layers if i >= depth]
    if outside:
        raise ValueError(f"layers must be below the tower's {depth}, got {', '.join(map(str, outside))}")
    return tuple(layers)


def check_layers(layers: Any) -> int | tuple[int, ...]:
    """Gives a number of layers, or ascending layer numbers from 0 as a tuple; raises ValueError for anything else."""
    if not isinstance(layers, list | tuple):
        check_count("layers", layers)
        return int(layers)
    for layer in layers:
        check_count("layers", layer, least=0)
    if not layers or list(layers) != sorted(set(layers)):
        raise ValueError(f"layers must be ascending numbers from 0, each once, got {layers}")
    return tuple(layers)


def block_targets(blocks: Sequence[int], owners: Sequence[int], budget: Sequence[int]) -> list[int]:
    """Gives how many states each block ends with: two per token of its clip's budget, by length, at least one each.

    Args:
        blocks: states per block.
        owners: the clip of each block, ascending.
        budget: tokens per clip.
    """
    targets = []
    for clip, tokens in enumerate(budget):
        lengths = [n for n, owner in zip(blocks, owners, strict=True) if owner == clip]
        total = sum(lengths)
        # the difference of rounded cumulative shares: exact in sum, even over the clip
        ends = [end * 2 * tokens // total for end in accumulate(lengths)] if total else []
        targets += [min(n, max(1, b - a)) for n, a, b in zip(lengths, [0, *ends], ends, strict=False)]
    return targets


def layer_targets(blocks: Sequence[int], final: Sequence[int], steps: int) -> list[list[int]]:
    """Gives the states of every block after each of `steps` layers: geometric from `blocks` to `final`."""
    return [
        [
            last if step == steps else max(last, round(first * (last / first) ** (step / steps)))
            for first, last in zip(blocks, final, strict=True)
        ]
        for step in range(1, steps + 1)
    ]


def pool_states(states: TokenStream, budget: Sequence[int]) -> TokenStream:
    """Joins the states of each clip to `budget` tokens, by size-weighted means of even windows: two states each.

    Args:
        states: one clip per audio clip, at least two states per token; slots and sizes as in `EncoderMethod.reduce`.
        budget: tokens per clip.

    Returns:
        Tokens with slots at 25 per second.
    """
    counts = even_windows(states, budget)
    embeds, slots, sizes = segment_merge(states.embeds, states.slots, states.sizes, counts)
    return TokenStream(embeds, tuple(budget), slots // (2 * SUBSLOTS), sizes)
