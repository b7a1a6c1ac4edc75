"""Pictures of the rows that the benchmarks of speed leave."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, StrMethodFormatter

from audiopress.benchmarks.cells import NONE, TRANSFORMERS
from audiopress.benchmarks.random_model import ANSWER, WINDOW
from audiopress.benchmarks.speed.tables import Row, kernel_times, label, ordered
from audiopress.benchmarks.style import FAINT, INK, headed_panels, legend_style, save

TOWERS, COMPRESSOR, LLM, OTHER = ("#2a9d8f", "#8fcfc7"), "#d1495b", ("#1f3a5f", "#7f9cc0"), "#c9d1d9"
EAGER, COMPILED, REACHED, EMPTY = "#e09f3e", "#8e6bbf", "#1f6f9f", "#eef1f4"
MARKERS = "os^Dv<>PX*ph"


def plot_kept(rows: Sequence[Row], path: Path, caption: str) -> Path:
    """Draws time to first token and memory against the tokens that the LLM reads: a point per method and ratio.

    Args:
        rows: of throughput, of one clip.
        path: of the PNG.
        caption: what was measured where.
    """
    rows = [row for row in ordered(rows) if row["status"] == "ok"]
    figure, (time, memory) = headed_panels(2, (10, 4.4), "A shorter sequence: time and memory", caption, right=0.8)
    looks = _looks(row["method"] for row in rows)
    for method, points in groupby(rows, key=lambda row: row["method"]):
        points = list(points)
        kept = [sum(row["tokens"][kind][1] for kind in ("audio", "video")) for row in points]
        style: dict[str, Any] = {**looks[method], "label": label(points[0]).replace("`", ""), "lw": 0.8, "zorder": 3}
        time.plot(kept, [row["first_token"]["median"] for row in points], **style)
        if all("peak_allocated" in row for row in points):
            memory.plot(kept, [row["peak_allocated"] / 1e9 for row in points], **style)
    for axes, text in ((time, "time to first token (ms)"), (memory, "memory at most (GB)")):
        axes.set_ylabel(text, size=9, color=INK)
        axes.set_xlabel("audio and video tokens that the LLM reads", size=9, color=INK)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlim(left=0)
    time.set_ylim(bottom=0)
    if not memory.lines:
        _say(memory, "not measured on a CPU")
    figure.legend(*time.get_legend_handles_labels(), loc="center right", **legend_style())
    return save(figure, path)


def plot_parts(rows: Sequence[Row], path: Path, caption: str) -> Path:
    """Draws where the time of an answer goes, a bar per method and ratio.

    Args:
        rows: of throughput, of one clip.
        path: of the PNG.
        caption: what was measured where.
    """
    rows = [row for row in ordered(rows) if row["status"] == "ok"]
    height = 1.9 + 0.32 * len(rows)
    figure, (axes,) = headed_panels(1, (10, height), f"Where the time of {ANSWER} tokens goes", caption, left=0.22)
    names, compiled = [], any(row["compile"] for row in rows)
    for place, row in enumerate(rows):
        start = 0.0
        for part, (milliseconds, colour) in time_parts(row).items():
            axes.barh(place, milliseconds, left=start, color=colour, height=0.68, label="" if place else part, zorder=3)
            start += milliseconds
        axes.text(start, place, f" {start:,.0f}", va="center", size=8.5, color=INK)
        share = f"  {row['keep_ratio']:g}" if row["keep_ratio"] else ""
        names.append(f"{label(row, compiled)}{share}".replace("`", ""))
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.08)
    axes.set_xlim(left=0)
    axes.set_xlabel("ms", size=9, color=INK)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower right", ncols=3, bbox_to_anchor=(0.99, 0.005), **legend_style())
    figure.subplots_adjust(bottom=1 / height)
    return save(figure, path)


def time_parts(row: Row) -> dict[str, tuple[float, str]]:
    """Gives the parts of an answer's time, in ms, with their colours.

    Parts that are timed apart need not sum up to the whole: what is left is named so, and is never negative.
    """
    timed = {
        name: row[name]["median"] if name in row else 0.0 for name in ("audio_tower", "vision_tower", "compressor")
    }
    first, answer = row["first_token"]["median"], row["answer"]["median"]
    rest = first - sum(timed.values()) - row["prefill"]["median"]
    parts = {
        "audio tower": (timed["audio_tower"], TOWERS[0]),
        "vision tower": (timed["vision_tower"], TOWERS[1]),
        "compressor": (timed["compressor"], COMPRESSOR),
        "prefill": (row["prefill"]["median"], LLM[0]),
        "all else up to the first token": (max(rest, 0.0), OTHER),
        f"{ANSWER - 1} further tokens": (max(answer - first, 0.0), LLM[1]),
    }
    return parts if row["video"] else {name: part for name, part in parts.items() if name != "vision tower"}


def plot_kernels(rows: Sequence[Row], path: Path, caption: str) -> Path:
    """Draws what every Triton kernel reaches of a copy's bandwidth, and how much faster it is than torch.

    Args:
        rows: of the kernels.
        path: of the PNG.
        caption: what was measured where.
    """
    times = {key: t for key, t in kernel_times(rows).items() if "triton" in t}
    height = 1.8 + 0.36 * len(times)
    figure, (bandwidth, speed) = headed_panels(2, (12, height), "Triton kernels", caption, left=0.37, space=0.12)
    reached = {(row["op"], row["shape"], row["pass"]): row["gb_per_s"] for row in rows if row["backend"] == "triton"}
    for place, (key, t) in enumerate(times.items()):
        _draw_bandwidth(bandwidth, place, t, reached[key])
    for name, text, colour, marker in (
        ("eager", "than torch", EAGER, "o"),
        ("compile", "than torch.compile", COMPILED, "D"),
    ):
        points = [(t[name] / t["triton"], place) for place, t in enumerate(times.values()) if name in t]
        folds, places = [x for x, _ in points], [y for _, y in points]
        speed.plot(folds, places, marker, color=colour, ms=6, mec="white", label=text, zorder=3)
    names = [f"{op}, {shape}" + ", with gradient" * (way != "forward") for op, shape, way in times]
    bandwidth.set_yticks(range(len(times)), names)
    bandwidth.set_xlim(0, 105)
    bandwidth.set_xlabel("% of the bandwidth that a copy of as many bytes reaches", size=9, color=INK)
    speed.set_yticks(range(len(times)), [""] * len(times))
    speed.set_xscale("log")
    speed.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
    speed.axvline(1, color=FAINT, lw=0.8)
    speed.set_xlabel("times faster", size=9, color=INK)
    for axes in (bandwidth, speed):
        axes.set_ylim(len(times) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
    speed.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0, **legend_style())
    figure.subplots_adjust(bottom=0.6 / height)
    return save(figure, path)


def _draw_bandwidth(axes: Axes, place: int, times: dict[str, float], reached: float) -> None:
    """Draws a bar of what a kernel reaches of a copy's bandwidth, or says what it is compared with instead."""
    where, colour = 2.0, FAINT
    if "copy" in times:
        share = 100 * times["copy"] / times["triton"]
        axes.barh(place, 100, color=EMPTY, height=0.68, zorder=2)
        axes.barh(place, share, color=REACHED, height=0.68, zorder=3)
        where, colour = (2.0, "white") if share > 25 else (share + 2, INK)  # a short bar holds no text
        text = f"{reached:,.0f} GB/s"
    elif "flash" in times:
        text = f"{times['flash'] / times['triton']:.2f} × flash attention's speed"
    else:
        text = "no copy to compare with"
    axes.text(where, place, text, va="center", size=8, color=colour, zorder=4)


def plot_long(rows: Sequence[Row], path: Path, caption: str) -> Path:
    """Draws time to first token, the audio tower's memory and all memory against the length of the clip.

    A hollow point is a sequence longer than the LLM was trained on.

    Args:
        rows: of throughput, of clips of several lengths.
        path: of the PNG.
        caption: what was measured where.
    """
    rows = sorted((row for row in ordered(rows) if row["status"] == "ok"), key=lambda row: row["seconds"])
    figure, panels = headed_panels(3, (12, 4.4), "Long sound", caption, right=0.83)
    looks = _looks(row["method"] for row in ordered(rows))
    values = {
        "time to first token (s)": lambda row: row["first_token"]["median"] / 1e3,
        "memory at most (GB)": lambda row: row.get("peak_allocated", 0) / 1e9,
        "memory of the audio tower alone (GB)": lambda row: row.get("audio_tower_bytes", 0) / 1e9,
    }
    for axes, (text, value) in zip(panels, values.items(), strict=True):
        for method, look in looks.items():
            points = [row for row in rows if row["method"] == method]
            for ratio in dict.fromkeys(row["keep_ratio"] for row in points):
                line = [row for row in points if row["keep_ratio"] == ratio]
                name = label(line[0]).replace("`", "") + (f"  {ratio:g}" if ratio else "")
                minutes = [row["seconds"] / 60 for row in line]
                axes.plot(minutes, [value(row) for row in line], **look, lw=1, label=name, zorder=3)
                beyond = [row for row in line if row["sequence"] > WINDOW]
                places = [row["seconds"] / 60 for row in beyond], [value(row) for row in beyond]
                axes.plot(*places, look["marker"], color="white", ms=3, zorder=4)
        axes.set_ylabel(text, size=9, color=INK)
        axes.set_xlabel("minutes of sound", size=9, color=INK)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    if any(row["sequence"] > WINDOW for row in rows):
        note = f"hollow: more than {WINDOW:,} tokens,\nwhich the LLM was not trained on"
        figure.text(0.99, 0.13, note, size=7.5, color=FAINT, ha="right")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="center right", **legend_style())
    return save(figure, path)


def _looks(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Gives each method a colour and a marker; the uncompressed models are black and grey."""
    fixed = {TRANSFORMERS: INK, NONE: FAINT}
    names = list(dict.fromkeys(methods))
    palette = iter(colormaps["tab20"].colors[::2] + colormaps["tab20"].colors[1::2])  # type: ignore[attr-defined]
    colours = {name: fixed.get(name) or next(palette) for name in names}
    return {
        name: {"color": colours[name], "marker": MARKERS[i % len(MARKERS)], "ms": 6, "mec": "white", "mew": 0.5}
        for i, name in enumerate(names)
    }


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", size=9, color=FAINT)
