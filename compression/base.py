"""What a compressor is: a config, a budget and a map from one token stream to a shorter one."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .budget import check_keep_ratio, token_budget
from .checks import check_values
from .stream import TokenStream, clip_ids

Stage = Literal["encoder", "connector", "joint"]

TOKENS_PER_SECOND = 25  # of the audio tower's output; its own states come twice as often


@dataclass(frozen=True)
class LLMShape:
    """The LLM's shape, for methods that hold layers like its own.

    Args:
        heads: attention heads.
        kv_heads: key and value heads.
        head_size: channels per head.
        mlp_size: width of the feed-forward.
        rope_theta: base of the rotary frequencies.
        rope_sections: how many of the `head_size / 2` rotary channels follow time, height and width (TMRoPE).
        norm_eps: of RMSNorm.
    """

    heads: int
    kv_heads: int
    head_size: int
    mlp_size: int
    rope_theta: float
    rope_sections: tuple[int, ...]
    norm_eps: float = 1e-6


@dataclass(frozen=True)
class Sizes:
    """The sizes of the model a compressor is built for.

    Args:
        hidden_size: D, the width of the LLM's embeddings.
        encoder_size: the width of the audio tower's states, for methods that read them.
        llm: the LLM's shape, for methods with layers like its own.
    """

    hidden_size: int
    encoder_size: int | None = None
    llm: LLMShape | None = None

    def __post_init__(self) -> None:
        check_count("hidden_size", self.hidden_size)
        if self.encoder_size is not None:
            check_count("encoder_size", self.encoder_size)


@dataclass(frozen=True)
class Prompt:
    """The tokens of each clip's sample that are neither audio nor video nor an answer: system prompt, question, marks.

    Args:
        stream: `[T, D]`, one clip per clip of the compressor's stream.
        positions: `[3, T]` int64, TMRoPE's time, height and width.
    """

    stream: TokenStream
    positions: Tensor


@dataclass(frozen=True)
class Scene:
    """What the tokens of a *joint* stream are: all audio and video tokens of a sample, in the order of the sequence.

    Best on the CPU, where methods read it: from a GPU it would be copied.

    Args:
        is_video: `[N]` bool.
        seconds: `[N]` float32, when the token happens; video tokens of one pair of frames share their second.
        positions: `[3, N]` int64, TMRoPE's time, height and width.
        sources: `[N]` int64, which audio clip or video of the batch the token is of; audio and video count apart.
    """

    is_video: Tensor
    seconds: Tensor
    positions: Tensor
    sources: Tensor

    @classmethod
    def of_audio(cls, stream: TokenStream) -> Scene:
        """Gives the scene of a stream that is all audio, one clip per sample, each from second and position 0 on."""
        return cls(
            is_video=torch.zeros_like(stream.slots, dtype=torch.bool),
            seconds=stream.slots.float() / TOKENS_PER_SECOND,
            positions=stream.slots.expand(3, -1),
            sources=stream.clips,
        )


@dataclass
class Context:
    """What a compressor may read besides the stream; only what its `needs` name is filled in.

    Everything is of the same clips as the stream. For a joint method a clip is a whole sample: see `Scene`.

    Args:
        encoder_hidden: the audio tower's last hidden states after its final LayerNorm and *before* its pairwise
            pooling and projection: 50 per second, D = the tower's width. Not for joint methods.
        encoder_keys: the keys of the tower's last layer, heads side by side: 50 per second, D = the tower's width. Not
            for joint methods.
        encoder_attention: `[N]` float32, the attention each token receives in the tower's last layer: the mean over
            heads and over the queries of its attention block, times the block's length, so that 1 is an even share
            whatever the block's length. The mean of the token's two states. 0 at video tokens.
        question: the embedded words of each clip's question, `[Q, D]`: the text between the media and the end of that
            turn, without special tokens.
        prompt: everything the LLM reads beside audio, video and answers.
        video: the video tokens of each clip's sample, `[V, D]`; no token where there is no video.
        video_seconds: `[V]` float32, when each of `video` happens, on the clip's own clock.
        scene: what each token of a joint stream is; None means that all are audio.
        first_layer: the LLM's first decoder layer, with `self_attn.q_proj`, `.k_proj` and `.head_dim`.
        seed: of what a method draws at random; the same seed gives the same tokens. In training every step has its own.
    """

    encoder_hidden: TokenStream | None = None
    encoder_keys: TokenStream | None = None
    encoder_attention: Tensor | None = None
    question: TokenStream | None = None
    prompt: Prompt | None = None
    video: TokenStream | None = None
    video_seconds: Tensor | None = None
    scene: Scene | None = None
    first_layer: nn.Module | None = None
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

    def at(self, keep_ratio: float) -> CompressorConfig:
        """Gives the same options at another ratio; others that set the rate fall back to their defaults."""
        rate: Any = {f.name: f.default for f in dataclasses.fields(self) if f.name in self.rate_options}
        return dataclasses.replace(self, **rate | {"keep_ratio": keep_ratio})


class Compressor(nn.Module):
    """Base class of all methods. A subclass fills in `config_class`, the class attributes and `compress`.

    Where it acts is its `stage`: a "connector" gets the audio tokens between tower and LLM, "joint" all audio and
    video tokens of a sample as one stream (see `Scene`), and "encoder" acts inside the audio tower (see
    `encoder.EncoderMethod`).

    `trained` says of the class whether its default config must be trained to be of use, and of a compressor whether
    it must itself.

    Args:
        config: of the class's `config_class`.
        sizes: of the model.
    """

    config_class: ClassVar[type[CompressorConfig]] = CompressorConfig
    name: ClassVar[str]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    stage: Stage = "connector"
    trained: bool = False
    query_aware: bool = False
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    differs: ClassVar[str] = ""

    def __init__(self, config: CompressorConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config = config
        self.sizes = sizes
        self.hidden_size = sizes.hidden_size
        self.encoder_size = sizes.encoder_size

    @property
    def needs(self) -> frozenset[str]:
        """The fields of `Context` this method reads with its present config."""
        return frozenset()

    @property
    def adaptive(self) -> bool:
        """Whether the content decides how many tokens are kept; then `budget` gives the most."""
        return False

    @property
    def frozen(self) -> frozenset[str]:
        """Names of the parameters that are fitted on their own, and never by the loss of the LLM."""
        return frozenset()

    @property
    def proportional_attention(self) -> bool:
        """Whether the LLM is to add log(size) to a token's attention logits wherever it is a key (ToMe, 2210.09461)."""
        return False

    @property
    def rope_sections(self) -> tuple[int, ...] | None:
        """How the LLM's rotary channels are dealt out to time, height, width and time again; None leaves them."""
        return None

    def budget(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Gives exactly how many tokens each clip of `lengths` tokens is reduced to (the most, if `adaptive`)."""
        return token_budget(lengths, self.config.keep_ratio)

    def split(self) -> tuple[Compressor | None, Compressor | None]:
        """Gives the part that acts inside the tower and the part that acts after it; None where there is none."""
        return (self, None) if self.stage == "encoder" else (None, self)

    def initialize(self, language_model: nn.Module) -> None:
        """Copies what a method starts from out of the LLM it is built for; the default copies nothing."""

    def at(self, keep_ratio: float) -> Compressor:
        """Gives the same method with the very same parameters at another ratio.

        Other options that set the rate (a threshold, a window) give way to it.

        Raises:
            ValueError: the method's parameters, or their shapes, depend on the ratio.
        """
        try:
            with torch.device("meta"):
                twin = type(self)(self.config.at(keep_ratio), self.sizes)
        except ValueError as error:
            raise ValueError(f"{self.name} cannot go to keep_ratio {keep_ratio}: {error}") from error
        own, other = ({name: p.shape for name, p in c.named_parameters()} for c in (self, twin))
        if own != other:
            raise ValueError(f"{self.name} has weights of its own for every keep_ratio: one cannot serve several")
        for mine, its in zip(self.modules(), twin.modules(), strict=True):
            its._parameters, its._buffers = mine._parameters, mine._buffers
        return twin.train(self.training)

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
        if self.stage == "encoder":
            raise ValueError(f"{self.name} acts inside the audio tower; it takes no tokens after it")
        context = context or Context()
        if stream.embeds.shape[1] != self.hidden_size:
            raise ValueError(f"{self.name} was built for width {self.hidden_size}, got {stream.embeds.shape[1]}")
        for need in sorted(self.needs):
            context.require(need, self.name)
        check_finite(stream, self.name)
        out = self.compress(stream, context)
        most = self.budget(stream.lengths)
        assert out.lengths == most or (self.adaptive and all(a <= b for a, b in zip(out.lengths, most, strict=True))), (
            f"{self.name} missed its budget"
        )
        return out.replace(embeds=out.embeds.to(stream.embeds.dtype))

    def describe(self) -> dict[str, Any]:
        """Gives name, sizes and options: what `build` needs to make it again, and what a result row records."""
        return {"name": self.name, **dataclasses.asdict(self.sizes), "options": dataclasses.asdict(self.config)}


def parameter_count(module: nn.Module) -> int:
    """Counts the parameters."""
    return sum(p.numel() for p in module.parameters())


def check_choice(option: str, value: object, choices: Collection[object]) -> None:
    """Raises ValueError that names the option and the choices unless `value` is one of them."""
    if value not in tuple(choices):  # a dict or a set would hash the value, which a list does not allow
        raise ValueError(f"{option} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_count(option: str, value: object, least: int = 1) -> None:
    """Raises ValueError unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{option} must be a whole number >= {least}, got {value!r}")


def check_flag(option: str, value: object) -> None:
    """Raises ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{option} must be True or False, got {value!r}")


def check_number(option: str, value: object, interval: str) -> None:
    """Raises ValueError unless `value` is a number in the interval, as in "[0, 1]", "[0, 1)" or "(0, inf)"."""
    low, high = map(float, interval[1:-1].split(","))
    if isinstance(value, int | float) and not isinstance(value, bool):
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if above and below:
            return
    raise ValueError(f"{option} must be in {interval}, got {value!r}")


def check_finite(stream: TokenStream, method: str, what: str = "embeddings") -> None:
    """Raises ValueError that names the first clip with a NaN or infinite value in its `what`."""
    bad = ~stream.embeds.isfinite().all(dim=1)
    check_tokens(bad, stream.lengths, method, f"NaN or infinite {what}")


def check_tokens(bad: Tensor, lengths: Sequence[int], method: str, what: str) -> None:
    """Raises ValueError that names the first clip that has `what`, as `bad` `[N]` says; see `check_values`."""

    def error() -> ValueError:
        clip = int(clip_ids(lengths, bad.device)[bad][0])
        return ValueError(f"{method}: clip {clip} of {len(lengths)} has {what}")

    check_values(bad, error)
