"""The cells of the speech testbed: which methods, at which rates, trained how. The most telling come first."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch

from audiopress.benchmarks.cells import BASELINES, NONE, TRANSFORMERS, Cell, ratios_of
from audiopress.compression import Compressor, available, build
from audiopress.models.whisper import CompressedWhisper

log = logging.getLogger(__name__)

SECONDS = {False: 30.0, True: 28.5}  # the longest clip, single or joined: Whisper's window, and nearly that
TELLING = 6 / 25  # keep ratio where methods differ most: English at 6.25 per second, measured; the nearest come first
# Measured before all others: the controls, our methods, and one of each other kind.
FIRST = (
    *BASELINES,
    "ward",
    "ward-refined",
    "pooling",
    "atome",
    "ward:encoder",
    "atome:encoder",
    "stacking",
    "ward-refined:even",
    "qformer",
)

Ratios = Sequence[float | None]


def methods_for(whisper: CompressedWhisper) -> list[str]:
    """Gives every method and preset that Whisper can be given."""
    found = []
    for family, info in available().items():
        for name in (family, *(f"{family}:{preset}" for preset in info.presets)):
            try:
                if name != NONE:
                    whisper.build(name)
                    found.append(name)
            except ValueError as error:
                log.info("%s is not measured: %s", name, error)
    return found


def speech_cells(
    whisper: CompressedWhisper,
    methods: Sequence[str],
    keep_ratios: Sequence[float],
    joined: Sequence[bool],
    training: dict[str, Any],
    seeds: Sequence[int],
    **settings: Any,
) -> list[list[Cell]]:
    """Gives the cells in groups; those of a group need the same training.

    A method that needs none is measured at every keep ratio that it can have; one whose content decides also as it
    is. A method that does is trained for each ratio, uncompressed included, and, where its weights do not depend on the
    ratio, once for all of them ("elastic"). What two presets have in common is measured once.

    Args:
        whisper: what is measured on.
        methods: their names, with the baselines.
        keep_ratios: below 1.
        joined: of joined clips, of single ones, or of both.
        training: settings of training, `steps` among them; without steps methods that need it are left out.
        seeds: of training.
        **settings: of all cells.

    Raises:
        ValueError: an unknown method, or one that Whisper cannot be given.
    """
    groups: list[list[Cell]] = []

    def add(method: str, ratios: Ratios, seed: int | None = None, elastic: bool = False) -> None:
        how = {"steps": 0} if seed is None else training
        groups.append(
            [
                settings
                | {"method": method, "keep_ratio": ratio, "joined": kind, "seconds": SECONDS[kind]}
                | {"seed": seed, "elastic": elastic, **how}
                for ratio in ratios
                for kind in joined
            ]
        )

    seen: list[Any] = []
    for method in dict.fromkeys(methods):
        if method in (TRANSFORMERS, NONE):
            add(method, [None])
            continue
        trained = whisper.build(method).trained
        ratios = _ratios(whisper, method, [*keep_ratios, 1.0] if trained else keep_ratios, seen)
        if not trained:
            add(method, ratios)
        for seed in seeds if trained and training["steps"] else ():
            if len(ratios) > 1 and None not in ratios and None not in ratios_of(method, ratios):  # type: ignore[arg-type]
                add(method, ratios, seed, elastic=True)
            for ratio in ratios:
                add(method, [ratio], seed)
    return sorted((group for group in groups if group), key=_rank)


def _rank(group: Sequence[Cell]) -> tuple[int, float, int]:
    """Orders groups: what needs no training; then seed by seed the elastic ones, and one rate of all after another."""
    method, ratio, seed = (group[0][name] for name in ("method", "keep_ratio", "seed"))
    far = -1.0 if seed is None or group[0]["elastic"] else abs(math.log((ratio or TELLING) / TELLING))
    return -1 if seed is None else seed, far, FIRST.index(method) if method in FIRST else len(FIRST)


def _ratios(whisper: CompressedWhisper, method: str, keep_ratios: Sequence[float], seen: list[Any]) -> Ratios:
    """Gives the keep ratios a method can have, None for its own; adds to `seen`, and leaves out, what it comes to."""
    width = whisper.model.config.d_model

    def made(**options: Any) -> Compressor | None:
        try:
            with torch.device("meta"):
                return build(method, hidden_size=width, encoder_size=width, **options)
        except ValueError as error:
            log.info("%s is not measured at %s: %s", method, options, error)
            return None

    variants = [(ratio, made(keep_ratio=ratio)) for ratio in keep_ratios]
    own = made()
    assert own is not None
    if own.adaptive or not any(variant for _, variant in variants):
        variants.append((None, own))  # type: ignore[arg-type]
    ratios: list[float | None] = []
    for ratio, variant in variants:
        what = variant and (variant.name, variant.config)
        if what is not None and what not in seen:
            seen.append(what)
            ratios.append(ratio)
    return ratios
