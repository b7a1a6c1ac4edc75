"""How all pictures look: colours, axes, legends."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 150
INK, FAINT, GRID = "#1f2933", "#66727f", "#e4e7eb"


def clean(axes: Axes, zoom: float = 1) -> None:
    """Takes away what is not needed, and sets the type."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=FAINT, linewidth=0.6)
    axes.tick_params(labelsize=8.5 * zoom, color=FAINT, labelcolor=FAINT, length=3, width=0.6, which="major")
    axes.tick_params(length=0, labelbottom=False, labelleft=False, which="minor")
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)


def legend_style(zoom: float = 1) -> dict[str, Any]:
    """Gives the arguments of a legend."""
    return {"frameon": False, "fontsize": 8.5 * zoom, "labelcolor": INK}


def headed_panels(
    panels: int,
    size: tuple[float, float],
    title: str,
    caption: str,
    left: float = 0.07,
    right: float = 0.98,
    space: float = 0.3,
) -> tuple[Figure, list[Axes]]:
    """Gives a figure of panels side by side, with a headline and, under it, where the numbers are from."""
    figure = Figure(figsize=size, dpi=DPI, facecolor="white")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    inches = 1 / size[1]
    figure.subplots_adjust(left=left, right=right, top=1 - 0.85 * inches, bottom=0.52 * inches, wspace=space)
    figure.text(0.01, 1 - 0.1 * inches, title, size=11.5, weight="bold", va="top", color=INK)
    lines = textwrap.fill(caption, int(14 * size[0]))
    figure.text(0.01, 1 - 0.34 * inches, lines, size=8, va="top", color=FAINT, parse_math=False)
    for panel in axes:
        clean(panel)
    return figure, axes


def save(figure: Figure, path: Path | str) -> Path:
    """Writes a PNG; missing folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path
