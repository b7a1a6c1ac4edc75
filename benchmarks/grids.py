"""Ablations as a YAML file describes them, checked and spelled out into cells before anything long begins."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from audiopress.benchmarks.cells import NONE, TRANSFORMERS, Cell
from audiopress.benchmarks.times.testbed import Recipe, TimeSettings
from audiopress.compression import Compressor, build
from audiopress.compression.base import TOKENS_PER_SECOND, check_choice, check_count, check_flag, check_number
from audiopress.compression.registry import QWEN_7B
from audiopress.data.speech import LANGUAGES
from audiopress.models.rewrite import POSITIONS
from audiopress.models.whisper import READABLE, WHISPER_BASE

KINDS = ("speech", "time")


@dataclass(frozen=True)
class SpeechSettings:
    """A testbed of words; see `speech.py`.

    Args:
        model: a Whisper.
        languages: of the prompts.
        splits: of the prompts; tune on train alone.
        joined: whether prompts are joined to dense clips.
        limit: clips of each language, in training of each join.
        batch: clips that the encoder takes at once.
        train_batch: clips per step of training.
        train_rate: of learning.
    """

    model: str = WHISPER_BASE
    languages: tuple[str, ...] = ("en",)
    splits: tuple[str, ...] = ("test", "validation")
    joined: bool = True
    limit: int | None = None
    batch: int = 32
    train_batch: int = 32
    train_rate: float = 1e-3

    def __post_init__(self) -> None:
        for language in self.languages:
            check_choice("languages", language, LANGUAGES)
        for split in self.splits:
            check_choice("splits", split, ("train", "validation", "test"))
        for name in ("limit", "batch", "train_batch"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_flag("joined", self.joined)
        check_number("train_rate", self.train_rate, "(0, inf)")

    def common(self) -> dict[str, Any]:
        """Gives what is the same in all cells."""
        lists = {"languages": list(self.languages), "splits": list(self.splits)}
        return {"testbed": "speech", "model": self.model, "joined": self.joined, "limit": self.limit} | lists

    def training(self) -> dict[str, Any]:
        """Gives what is the same in all cells with training."""
        return {"train_batch": self.train_batch, "train_rate": self.train_rate}


@dataclass(frozen=True)
class Grid:
    """Every combination of its lists is a cell. A single value stands for a list of it.

    Args:
        testbeds: names of testbeds.
        methods: names or presets; `transformers` is the uncompressed model as transformers runs it (speech alone).
        keep_ratios: tokens out / tokens in; None is the method's own.
        rates: the same as audio tokens per second, of 25; not beside `keep_ratios`.
        options: of the methods, each with its values.
        positions: of the tokens in the LLM; of time testbeds.
        seeds: where training or the method draws.
        steps: of training before. On a time testbed LoRA is trained whatever the method; a frozen Whisper has nothing
            to train but the method.
    """

    testbeds: tuple[str, ...]
    methods: tuple[str, ...]
    keep_ratios: tuple[float | None, ...] = ()
    rates: tuple[float, ...] = ()
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    positions: tuple[str, ...] = (POSITIONS[0],)
    seeds: tuple[int, ...] = (0,)
    steps: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        for name in ("testbeds", "methods", "positions", "seeds", "steps"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one, got an empty list")
        if self.keep_ratios and self.rates:
            raise ValueError("keep_ratios and rates exclude each other, got both")
        for name in ("seeds", "steps"):
            if bad := [x for x in getattr(self, name) if isinstance(x, bool) or not isinstance(x, int) or x < 0]:
                raise ValueError(f"{name} must be whole numbers from 0 on, got {bad[0]!r}")
        if bad := [x for x in self.methods if not isinstance(x, str)]:
            raise ValueError(f"methods must be names, got {bad[0]!r}")
        for name, values in (("rates", self.rates), ("keep_ratios", [x for x in self.keep_ratios if x is not None])):
            if bad := [x for x in values if isinstance(x, bool) or not isinstance(x, int | float)]:
                raise ValueError(f"{name} must be numbers, got {bad[0]!r}")
        for positions in self.positions:
            check_choice("positions", positions, POSITIONS)

    @property
    def ratios(self) -> tuple[float | None, ...]:
        """The keep ratios, however they are given; (None,) where they are not."""
        return self.keep_ratios or tuple(rate / TOKENS_PER_SECOND for rate in self.rates) or (None,)

    def variants(self) -> Iterator[dict[str, Any]]:
        """Gives every combination of the options."""
        for values in itertools.product(*self.options.values()):
            yield dict(zip(self.options, values, strict=True))


@dataclass(frozen=True)
class Planned:
    """A cell, its testbed's name in the file, and the texts by name of the questions that it helps to answer."""

    cell: Cell
    testbed: str
    questions: dict[str, str]


@dataclass(frozen=True)
class Ablation:
    """What a file asks for.

    Args:
        testbeds: by name.
        questions: texts by name.
        cells: in the order in which they are to be run.
    """

    testbeds: dict[str, SpeechSettings | TimeSettings]
    questions: dict[str, str]
    cells: tuple[Planned, ...]

    def only(self, questions: Sequence[str] | None, testbeds: Sequence[str] | None) -> Ablation:
        """Gives the cells of some questions and testbeds; None: of all."""
        for what, wanted, known in (("question", questions, self.questions), ("testbed", testbeds, self.testbeds)):
            for name in wanted or ():
                check_choice(what, name, known)
        cells = tuple(
            planned
            for planned in self.cells
            if (questions is None or not planned.questions.keys().isdisjoint(questions))
            and (testbeds is None or planned.testbed in testbeds)
        )
        texts = {name: text for name, text in self.questions.items() if questions is None or name in questions}
        return Ablation(self.testbeds, texts, cells)


def read_ablation(path: Path) -> Ablation:
    """Reads a file and checks all of it: every name, option, rate and setting, by building the methods without memory.

    Raises:
        ValueError: says in one line where the file is wrong, what is allowed and what was got.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    top = _entries(f"{path}", content, {"testbeds", "questions"}, {"testbeds", "questions"})
    testbeds = {name: _testbed(f"{path}, testbed {name}", x) for name, x in _named(path, "testbeds", top).items()}
    common = {name: testbed.common() for name, testbed in testbeds.items()}
    texts: dict[str, str] = {}
    found: dict[str, tuple[int, Planned]] = {}
    for name, entry in _named(path, "questions", top).items():
        where = f"{path}, question {name}"
        question = _entries(where, entry, {"text", "grids"}, {"text", "grids"})
        texts[name] = str(question["text"])
        if not isinstance(question["grids"], list) or not question["grids"]:
            raise ValueError(f"{where}: grids must be a list of grids, got {question['grids']!r:.60}")
        for number, values in enumerate(question["grids"], 1):
            place = f"{where}, grid {number}"
            grid = _make(place, Grid, values)
            try:
                for testbed, rank, cell in _cells(grid, testbeds, common):
                    identity = json.dumps([testbed, cell], sort_keys=True)
                    _, known = found.setdefault(identity, (rank, Planned(cell, testbed, {})))
                    known.questions[name] = texts[name]
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
    ordered = sorted(found.values(), key=lambda pair: pair[0])  # by the rank of the seed; otherwise as in the file
    return Ablation(testbeds, texts, tuple(planned for _, planned in ordered))


def _cells(
    grid: Grid, testbeds: Mapping[str, SpeechSettings | TimeSettings], common: Mapping[str, dict[str, Any]]
) -> Iterator[tuple[str, int, Cell]]:
    """Gives the cells with their testbed, and the rank of their seed among the grid's."""
    lists = (grid.methods, grid.ratios, grid.variants(), grid.testbeds, grid.positions, grid.steps, grid.seeds)
    for method, ratio, options, testbed, positions, steps, seed in itertools.product(*lists):
        check_choice("testbeds", testbed, testbeds)
        speech = isinstance(testbeds[testbed], SpeechSettings)
        if method in (NONE, TRANSFORMERS):
            ratio, options = None, {}
        made = check_method(method, ratio, options, speech)
        if options:  # what it has anyway need not be said: then it is the cell of a grid that does not say it
            usual = dataclasses.asdict(check_method(method, ratio, {}, speech).config)
            options = {name: value for name, value in options.items() if usual[name] != value}
        if speech:
            if positions != POSITIONS[0]:
                raise ValueError(f"positions are of an LLM; the testbed {testbed} has none")
            steps = steps if made is not None and made.trained else 0
            if steps and options:
                raise ValueError(f"on a testbed of speech {method} is trained as it is, got the options {options}")
        if made is not None and made.trained and not steps:
            raise ValueError(f"{method} has weights to train: give steps above 0")
        draws = steps > 0 or (made is not None and "seed" in made.needs)
        rank = grid.seeds.index(seed) if draws else 0
        cell = common[testbed] | {"method": method, "keep_ratio": ratio, "options": options}
        cell |= {"seed": seed if draws else 0, "steps": steps}
        cell |= {"elastic": False} if speech else {"positions": positions}
        yield testbed, rank, cell | (testbeds[testbed].training() if steps else {})


def check_method(method: str, ratio: float | None, options: Mapping[str, Any], speech: bool) -> Compressor | None:
    """Builds a method without memory; None for `transformers`.

    Raises:
        ValueError: an unknown method or option, a ratio that it cannot have, or one that the testbed cannot be given.
    """
    if method == TRANSFORMERS:
        if not speech:
            raise ValueError(f"{TRANSFORMERS} is of speech testbeds; on others {NONE} is the uncompressed model")
        return None
    rate = {} if ratio is None else {"keep_ratio": ratio}
    with torch.device("meta"):
        try:
            made = build(method, **vars(QWEN_7B), **rate, **options)
        except ValueError as error:
            at = f" at keep_ratio {ratio:.4g}" if rate else ""
            raise ValueError(f"{method}{at}: {error}") from error
    if speech and (made.stage == "joint" or made.needs - READABLE):
        reads = "video" if made.stage == "joint" else ", ".join(sorted(made.needs - READABLE))
        raise ValueError(f"{method} reads {reads}, which a testbed of speech has not")
    return made


def _testbed(where: str, content: Any) -> SpeechSettings | TimeSettings:
    """Makes the settings of a testbed."""
    if not isinstance(content, dict) or content.get("kind") not in KINDS:
        raise ValueError(f"{where} must have a kind, {' or '.join(KINDS)}, got {content!r:.80}")
    values = {name: value for name, value in content.items() if name != "kind"}
    if content["kind"] == "speech":
        return _make(where, SpeechSettings, values)
    if "recipe" in values:
        values["recipe"] = _make(f"{where}, recipe", Recipe, values["recipe"])
    made = _make(where, TimeSettings, values)
    if made.saved:
        raise ValueError(f"{where}: {made.model} is a saved variant of one method; events.py measures it")
    return made


def _make(where: str, kind: type, content: Any) -> Any:
    """Makes a dataclass of a mapping; a single value of a field that is a tuple is taken for a list of it."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    required = {
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    values = _entries(where, content, set(fields), required)
    for name, value in values.items():
        if str(fields[name].type).startswith("tuple"):
            values[name] = _tuple(value)
    if kind is Grid and "options" in values:
        if not isinstance(values["options"], dict):
            raise ValueError(f"{where}: options must name options, each with its values, got {values['options']!r}")
        values["options"] = {name: _tuple(value) for name, value in values["options"].items()}
    try:
        return kind(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def _entries(where: str, content: Any, allowed: set[str], required: set[str]) -> dict[str, Any]:
    """Gives a mapping whose keys are checked."""
    if not isinstance(content, dict):
        raise ValueError(f"{where} must hold {', '.join(sorted(allowed))}, got {content!r:.60}")
    for name in content:
        if name not in allowed:
            raise ValueError(f"{where} has an unknown key {name!r}; allowed are {', '.join(sorted(allowed))}")
    if missing := sorted(required - content.keys()):
        raise ValueError(f"{where} lacks {', '.join(missing)}; it has {', '.join(map(str, content)) or 'nothing'}")
    return dict(content)


def _named(path: Path, what: str, top: Mapping[str, Any]) -> dict[str, Any]:
    """Gives the entries of a mapping that has at least one."""
    if not isinstance(top[what], dict) or not top[what]:
        raise ValueError(f"{path}: {what} must name at least one, got {top[what]!r:.60}")
    return {str(name): entry for name, entry in top[what].items()}


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list) else (value,)
