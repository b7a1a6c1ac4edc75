"""How all pictures look: colours, axes, legends."""

from __future__ import annotations

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


def save(figure: Figure, path: Path | str) -> Path:
    """Writes a PNG; missing folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path
