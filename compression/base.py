"""What a compressor is: a config, a budget and a map from one token stream to a shorter one."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from .budget import check_keep_ratio, token_budget
from .stream import TokenStream

Stage = Literal["encoder", "connector", "joint", "llm"]


@dataclass
class Context:
    """What a compressor may read besides the stream; only what its `needs` name is filled in.

    Args:
        encoder_hidden: the audio tower's last hidden states after its final LayerNorm and *before* its pairwise
            pooling and projection: 50 per second, one clip per clip of the stream, D = the tower's width.
        seed: of everything a method draws at random; the same seed gives the same tokens.
    """

    encoder_hidden: TokenStream | None = None
    seed: int = 0

    def require(self, need: str, method: str) -> Any:
        """Gives what the field `need` holds; raises ValueError, naming the method, when it was not captured."""
        value = getattr(self, need)
        if value is None:
            raise ValueError(f"{method} needs {need!r} in its context, but it was not given")
        return value


@dataclass(frozen=True)
class CompressorConfig:
    """Base of the methods' configs. A method's own config adds its options and checks them in `__post_init__`.

    Args:
        keep_ratio: tokens out / tokens in, in (0, 1].
    """

    # The options that set the rate: when the caller gives one of them, a preset's others give way.
    rate_options: ClassVar[frozenset[str]] = frozenset({"keep_ratio"})

    keep_ratio: float = 1.0

    def __post_init__(self) -> None:
        check_keep_ratio(self.keep_ratio)

    @classmethod
    def from_options(cls, method: str, options: Mapping[str, Any]) -> CompressorConfig:
        """Makes the config, rejecting unknown keys with the valid ones listed."""
        valid = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(options) - set(valid))
        if unknown:
            raise ValueError(f"{method} has no option {', '.join(unknown)}; its options are {', '.join(valid)}")
        return cls(**options)


class Compressor(nn.Module):
    """Base class of all methods. A subclass fills in `config_class`, the class attributes and `compress`.

    `trained` says of the class whether its default config must be trained to be of use, and of a compressor whether
    it must itself.

    Args:
        config: of the class's `config_class`.
        hidden_size: D, the width of the LLM's embeddings.
        encoder_size: the width of the audio tower's hidden states, for methods that read them.
    """

    config_class: ClassVar[type[CompressorConfig]] = CompressorConfig
    name: ClassVar[str]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    stage: ClassVar[Stage] = "connector"
    trained: bool = False
    query_aware: ClassVar[bool] = False
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    differs: ClassVar[str] = ""

    def __init__(self, config: CompressorConfig, hidden_size: int, encoder_size: int | None = None) -> None:
        super().__init__()
        check_count("hidden_size", hidden_size)
        if encoder_size is not None:
            check_count("encoder_size", encoder_size)
        self.config = config
        self.hidden_size = hidden_size
        self.encoder_size = encoder_size

    @property
    def needs(self) -> frozenset[str]:
        """The fields of `Context` this method reads with its present config."""
        return frozenset()

    def budget(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Gives exactly how many tokens each clip of `lengths` tokens (25 per second) is reduced to."""
        return token_budget(lengths, self.config.keep_ratio)

    def compress(self, stream: TokenStream, context: Context) -> TokenStream:
        """Does the work for `forward`, which has checked the input."""
        raise NotImplementedError

    def forward(self, stream: TokenStream, context: Context | None = None) -> TokenStream:
        """Compresses every clip on its own.

        Args:
            stream: the clips' tokens at 25 per second, `[N, D]` packed.
            context: what `needs` names.

        Returns:
            The same clips with `budget(lengths)` tokens each, in time order, in the dtype of the stream.

        Raises:
            ValueError: the width is not `hidden_size`, an embedding is not finite (the clip is named), or something
                in `needs` is missing.
        """
        context = context or Context()
        if stream.embeds.shape[1] != self.hidden_size:
            raise ValueError(f"{self.name} was built for width {self.hidden_size}, got {stream.embeds.shape[1]}")
        for need in sorted(self.needs):
            context.require(need, self.name)
        check_finite(stream, self.name)
        out = self.compress(stream, context)
        assert out.lengths == self.budget(stream.lengths), f"{self.name} missed its budget"
        return out.replace(embeds=out.embeds.to(stream.embeds.dtype))

    def describe(self) -> dict[str, Any]:
        """Gives name, sizes and options: what `build` needs to make it again, and what a result row records."""
        return {
            "name": self.name,
            "hidden_size": self.hidden_size,
            "encoder_size": self.encoder_size,
            "options": dataclasses.asdict(self.config),
        }


def parameter_count(module: nn.Module) -> int:
    """Counts the parameters."""
    return sum(p.numel() for p in module.parameters())


def check_choice(option: str, value: object, choices: Collection[object]) -> None:
    """Raises ValueError that names the option and the choices unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"{option} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_count(option: str, value: object, least: int = 1) -> None:
    """Raises ValueError unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{option} must be a whole number >= {least}, got {value!r}")


def check_finite(stream: TokenStream, method: str, what: str = "embeddings") -> None:
    """Raises ValueError that names the first clip with a NaN or infinite value in its `what`."""
    finite: Tensor = stream.embeds.isfinite().all(dim=1)
    if not bool(finite.all()):
        clip = int(stream.clips[~finite][0])
        raise ValueError(f"{method}: clip {clip} of {len(stream.lengths)} has NaN or infinite {what}")
