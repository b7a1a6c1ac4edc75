"""The methods by name: what there is, and how one is built, described and built again."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from .base import TOKENS_PER_SECOND, Compressor, LLMShape, Sizes, Stage, parameter_count
from .chain import Chain

C = TypeVar("C", bound=Compressor)

_METHODS: dict[str, type[Compressor]] = {}


@dataclass(frozen=True)
class MethodInfo:
    """What `available` says about a method; `keep_ratio`, `needs` and `trained` are those of its default config.

    Args:
        presets: the papers' settings, built as "name:preset".
        stage: where it acts.
        needs: the fields of `Context` it reads.
        trained: whether it must be trained to be of use.
        query_aware: whether it sees the question.
        paper: arXiv ids.
        summary: what it does, in a few words.
        differs: from the paper, in a few words.
        options: every option with its default; None where it follows from the others.
        keep_ratio: tokens out / tokens in.
    """

    presets: tuple[str, ...]
    stage: Stage
    needs: frozenset[str]
    trained: bool
    query_aware: bool
    paper: str
    summary: str
    differs: str
    options: Mapping[str, Any]
    keep_ratio: float


def register(name: str) -> Callable[[type[C]], type[C]]:
    """Makes a `Compressor` class known under `name`.

    Raises:
        ValueError: the name is not made of a-z, 0-9 and hyphens, or is taken.
    """

    def decorate(cls: type[C]) -> type[C]:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
            raise ValueError(f"a method's name is made of a-z, 0-9 and hyphens, got {name!r}")
        if name in _METHODS:
            raise ValueError(f"the method {name!r} is registered already, by {_METHODS[name].__name__}")
        cls.name = name
        _METHODS[name] = cls
        return cls

    return decorate


def available() -> dict[str, MethodInfo]:
    """Gives every registered method by name."""
    return {name: _info(cls) for name, cls in sorted(_METHODS.items())}


def build(
    name: str, *, hidden_size: int, encoder_size: int | None = None, llm: LLMShape | None = None, **options: Any
) -> Compressor:
    """Builds a compressor.

    Args:
        name: "method", "method:preset", or several of them joined by "+", applied from left to right.
        hidden_size: D, the width of the LLM's embeddings.
        encoder_size: the width of the audio tower's states, for methods that read them.
        llm: the LLM's shape, for methods with layers like its own.
        **options: the method's; they go before the preset's, and a rate (`keep_ratio`, `k`, ...) replaces the preset's
            rate however it is spelt. Of several methods: one mapping per method, as in `pooling={"k": 2}`.

    Raises:
        ValueError: the method, the preset, an option or its value does not exist; the message lists those that do.
    """
    sizes = Sizes(hidden_size, encoder_size, llm)
    if "+" in name:
        return _build_chain(name.split("+"), sizes, options)
    family, _, preset = name.partition(":")
    cls = _METHODS[_known("method", family, _METHODS)]
    if ":" in name:
        given = set(options)
        replaced = cls.config_class.rate_options if given & cls.config_class.rate_options else frozenset()
        base = cls.presets[_known(f"preset of {family}", preset, cls.presets)]
        options = {key: value for key, value in base.items() if key not in replaced} | options
    return cls(cls.config_class.from_options(family, options), sizes)


def from_description(description: Mapping[str, Any]) -> Compressor:
    """Builds the compressor that `Compressor.describe` described; its weights are new."""
    if "members" in description:
        return Chain([from_description(member) for member in description["members"]])
    sizes = {key: description[key] for key in ("hidden_size", "encoder_size")}
    llm = description["llm"]
    if llm is not None:
        llm = LLMShape(**llm | {"rope_sections": tuple(llm["rope_sections"])})  # JSON knows no tuples
    return build(description["name"], **sizes, llm=llm, **description["options"])


QWEN_7B = Sizes(3584, 1280, LLMShape(28, 4, 128, 18944, 1e6, (16, 24, 24)))


def markdown_table() -> str:
    """Gives the README's table: one row per method and preset, at the sizes of Qwen2.5-Omni-7B."""
    rows = [
        "| method | what it does | paper (arXiv) | stage | trained | sees the question | reduces video | tokens/s "
        "| options | differs from the paper |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for family, info in available().items():
        for name in (family, *(f"{family}:{preset}" for preset in info.presets)):
            with torch.device("meta"):
                made = build(name, hidden_size=QWEN_7B.hidden_size, encoder_size=QWEN_7B.encoder_size, llm=QWEN_7B.llm)
            first = name == family
            cells = (
                f"`{name}`",
                info.summary if first else "",
                info.paper if first else "",
                made.stage,
                _trained_size(parameter_count(made)) if made.trained else "no",
                "yes" if made.query_aware else "no",
                "yes" if made.stage == "joint" else "no",
                _rate(made),
                ", ".join(f"`{option}`" for option in info.options) if first else "",
                info.differs if first else "",
            )
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _trained_size(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else f"{parameters:,}"


def _rate(method: Compressor) -> str:
    keep_ratio = method.config.keep_ratio
    rate = f"{100 * keep_ratio:.3g} % of both" if method.stage == "joint" else f"{TOKENS_PER_SECOND * keep_ratio:.3g}"
    return f"<= {rate}" if method.adaptive else rate


def _info(cls: type[Compressor]) -> MethodInfo:
    with torch.device("meta"):
        default = cls(cls.config_class(), Sizes(64, 64, LLMShape(4, 2, 16, 128, 1e6, (2, 3, 3))))
    return MethodInfo(
        presets=tuple(cls.presets),
        stage=default.stage,
        needs=default.needs,
        trained=default.trained,
        query_aware=default.query_aware,
        paper=cls.paper,
        summary=cls.summary,
        differs=cls.differs,
        options={f.name: f.default for f in dataclasses.fields(cls.config_class)},
        keep_ratio=default.config.keep_ratio,
    )


def _known(kind: str, name: str, known: Collection[str]) -> str:
    if name in known:
        return name
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"unknown {kind} {name!r}; there are {', '.join(sorted(known)) or 'none'}{hint}")


def _build_chain(names: list[str], sizes: Sizes, options: Mapping[str, Mapping[str, Any]]) -> Chain:
    families = [name.partition(":")[0] for name in names]
    whole = "+".join(names)
    if len(set(families)) < len(families):
        raise ValueError(f"{whole!r} names a method twice; build each and give them to Chain")
    for key, value in options.items():
        if key not in families or not isinstance(value, Mapping):
            raise ValueError(
                f"options of {whole!r} are one mapping per method ({', '.join(families)}), got {key}={value!r}"
            )
    return Chain(
        [
            build(
                name, **{f.name: getattr(sizes, f.name) for f in dataclasses.fields(sizes)}, **options.get(family, {})
            )
            for name, family in zip(names, families, strict=True)
        ]
    )
