"""Pictures of what compression costs in accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from audiopress.benchmarks.accuracy.rows import Point, Score, fronts
from audiopress.benchmarks.accuracy.tables import NEEDS
from audiopress.benchmarks.cells import NONE, TRANSFORMERS
from audiopress.benchmarks.style import INK, headed_panels, legend_style, save

# Okabe and Ito's colours, which the colour-blind can tell apart; no method beyond them gets one.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d3b", "#7b4fa3")
MARKERS = "o^sDv<>P"
BASELINES = {NONE: "*", TRANSFORMERS: "X"}
OTHERS = "#c3cad2"
CONTROLS = ("uniform-stride", "pooling", "random")  # shown even where they are not on the front
BY_NEEDS = {"audio": "#0072b2", "video": "#e69f00", "both": "#7b4fa3"}
TICKS = (0.5, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)  # percent, of word errors
ASIDE = 0.006  # methods at one rate are drawn beside each other, by this share of it, so that no interval hides one
FRONTS = {"Pareto front": (4, 3), "the same, without training": (1, 2)}  # dashes
WORST = 3.0  # word error rates beyond are drawn at the edge: a text that never ends is wrong at any of them


def plot_words(points: Sequence[Point], path: Path, about: str) -> Path:
    """Draws word error rates against tokens per second, both logarithmic, with the Pareto fronts.

    Args:
        points: measured, of one set of clips.
        path: of the PNG.
        about: which clips.
    """
    figure, (axes,) = headed_panels(1, (10, 5.4), "Words that are left", about, right=0.74)
    _draw(axes, points, "wer", lambda share: 100 * min(share, WORST))
    axes.set_xscale("log")
    axes.set_yscale("log")
    low = min(100 * point.score("wer").value for point in points)  # type: ignore[union-attr]
    axes.set_ylim(max(0.2, low / 2), 110 * WORST)
    axes.yaxis.set_major_locator(FixedLocator(TICKS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_locator(FixedLocator([2, 3, 4, 5, 6.25, 8, 10, 12.5, 16, 20, 25, 50]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    error = f"word error rate, % (beyond {100 * WORST:g}: at the edge)"
    return _finish(figure, axes, "audio tokens per second", error, path)


def plot_times(points: Sequence[Point], path: Path, about: str) -> Path:
    """Draws mean IoU against tokens of audio and video per second, with the Pareto fronts.

    Args:
        points: measured, of one set of clips.
        path: of the PNG.
        about: which clips.
    """
    figure, (axes,) = headed_panels(1, (10, 5.4), "Times that are left", about, right=0.74)
    _draw(axes, points, "miou", lambda share: 100 * share)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    return _finish(figure, axes, "audio and video tokens per second", "mean IoU of the spans, %", path)


def plot_kinds(points: Sequence[Point], path: Path, about: str) -> Path:
    """Draws a bar for every kind of question: three tasks, by the senses they need; a row per method.

    The methods stand at the keep ratio that most of them were measured at, joint ones at theirs, beside the
    uncompressed ones.

    Args:
        points: measured, of one set of clips.
        path: of the PNG.
        about: which clips.
    """
    shown = at_one_rate(points)
    height = 1.6 + 0.52 * len(shown)
    figure, panels = headed_panels(3, (12, height), "What is answered right, by kind of question", about, left=0.25)
    metrics = {"miou": "grounding: mean IoU, %", "caption_accuracy": "captions right, %"}
    metrics |= {"counting_accuracy": "counts right, %"}
    for axes, (metric, text) in zip(panels, metrics.items(), strict=True):
        for place, point in enumerate(shown):
            for i, needs in enumerate(NEEDS):
                share = point.mean("by_needs", needs, metric)
                if share is None:
                    continue
                y = place + 0.24 * (i - 1)
                axes.barh(y, 100 * share, height=0.2, color=BY_NEEDS[needs], zorder=3)
                if len(point.rows) == 1 and (interval := point.first["by_needs"][needs].get(f"{metric}_interval")):
                    axes.hlines(y, *(100 * x for x in interval), color=INK, lw=0.8, alpha=0.6, zorder=4)
        axes.set_xlabel(text, size=9, color=INK)
        axes.set_xlim(0, 100)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_yticks(range(len(shown)), [""] * len(shown))
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
    names = [p.label + (f"  {100 * p.first['keep_ratio']:g} %" if p.first["keep_ratio"] else "") for p in shown]
    panels[0].set_yticks(range(len(shown)), names, parse_math=False)
    handles = [Patch(facecolor=colour, label=f"needs {needs}") for needs, colour in BY_NEEDS.items()]
    figure.legend(handles=handles, loc="upper right", ncols=3, bbox_to_anchor=(0.99, 1), **legend_style())
    figure.subplots_adjust(bottom=0.55 / height, wspace=0.12)
    return save(figure, path)


def at_one_rate(points: Sequence[Point]) -> list[Point]:
    """Gives the uncompressed models, and each method at the ratio that most of its stage have, or at its own."""
    chosen = {}
    for joint in (False, True):
        ratios = [p.first["keep_ratio"] for p in points if (p.first["stage"] == "joint") == joint and not p.is_baseline]
        given = [ratio for ratio in ratios if ratio is not None]
        chosen[joint] = max(given, key=lambda ratio: (given.count(ratio), ratio)) if given else None
    return [p for p in points if p.first["keep_ratio"] in (None, chosen[p.first["stage"] == "joint"])]


def _draw(axes: Axes, points: Sequence[Point], metric: str, scale: Callable[[float], float]) -> None:
    """Draws a line per method over its rates, with intervals where it has a colour, and the Pareto front."""
    best = fronts(points, metric)
    leading = [point for front in best for point in front]
    aside: dict[str, float] = {}
    for place, (label, look) in enumerate(_looks(points, leading).items()):
        mine = sorted((point for point in points if point.label == label), key=lambda point: point.rate)
        scores: list[Score] = [point.score(metric) for point in mine]  # type: ignore[misc]
        coloured = look["color"] != OTHERS
        aside[label] = 1 + ASIDE * (place - 3) * (look["color"] in COLOURS)
        rates = [aside[label] * point.rate for point in mine]
        axes.plot(rates, [scale(score.value) for score in scores], mec="white", mew=0.5, **look)
        for rate, score in zip(rates, scores, strict=True):
            if coloured and score.interval:
                axes.vlines(rate, *map(scale, score.interval), color=look["color"], lw=0.9, alpha=0.55, zorder=3)
    for front, (text, dashes) in zip(best, FRONTS.items(), strict=False):
        rates = [point.rate for point in front]
        values = [scale(point.score(metric).value) for point in front]  # type: ignore[union-attr]
        axes.plot(rates, values, color=INK, lw=1, ls=(0, dashes), ds="steps-post", label=text, zorder=4)
        rates = [aside[point.label] * point.rate for point in front]
        axes.plot(rates, values, "o", ms=11, mfc="none", mec=INK, mew=0.9, zorder=7, clip_on=False)


def _finish(figure: Figure, axes: Axes, across: str, up: str, path: Path) -> Path:
    """Names the axes, puts the legend beside them and writes the PNG."""
    axes.set_xlabel(across, size=9, color=INK)
    axes.set_ylabel(up, size=9, color=INK)
    figure.legend(*axes.get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(0.75, 0.86), **legend_style())
    return save(figure, path)


def _looks(points: Sequence[Point], best: Sequence[Point]) -> dict[str, dict[str, Any]]:
    """Gives how each method is drawn: in colour those of the front and the controls, all others in one grey."""
    methods = {point.label: point.first["method"] for point in points}
    ahead = {point.label for point in best if not point.is_baseline}
    leading = [label for label in methods if label in ahead or label in CONTROLS]
    looks: dict[str, dict[str, Any]] = {
        label: {"color": colour, "marker": marker, "ms": 6, "lw": 1.2, "label": label, "zorder": 5}
        for label, colour, marker in zip(leading, COLOURS, MARKERS, strict=False)
    }
    for label, method in methods.items():
        if method in BASELINES:
            looks[label] = {"color": INK, "marker": BASELINES[method], "ms": 9, "ls": "", "label": label, "zorder": 6}
    others = [label for label in methods if label not in looks]
    looks |= {label: {"color": OTHERS, "marker": ".", "ms": 5, "lw": 0.6, "zorder": 2} for label in others}
    if others:
        looks[others[0]]["label"] = f"{len(others)} other method{'s' * (len(others) > 1)}"
    return looks
