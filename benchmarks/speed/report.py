"""The report of speed: of committed rows, those of the newest commit, as tables and pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from audiopress.benchmarks.cells import read_rows
from audiopress.benchmarks.speed import plots, tables
from audiopress.benchmarks.speed.tables import Row

ANY = "any"  # commit
MODEL_KEYS = ("model", "method", "keep_ratio", "seconds", "batch", "video", "dtype", "compile")
KEYS = {  # what tells two cells of a benchmark apart
    "throughput": MODEL_KEYS,
    "long": MODEL_KEYS,
    "training": MODEL_KEYS,
    "compressors": ("method", "clip_seconds"),
    "kernels": ("op", "shape", "pass", "backend", "dtype"),
}
PICTURES = {  # by benchmark: what the picture is called and shows, and who draws it
    "throughput": (
        ("speed_kept", "Time to first token and memory against the tokens that are kept", plots.plot_kept),
        ("speed_parts", "Where the time of an answer goes under each method", plots.plot_parts),
    ),
    "long": (("speed_long", "Time and memory against the length of the sound", plots.plot_long),),
    "training": (),
    "compressors": (),
    "kernels": (("speed_kernels", "Bandwidth and speed-up of every kernel", plots.plot_kernels),),
}
TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "throughput": tables.end_to_end,
    "long": tables.long,
    "training": tables.training,
    "compressors": tables.compressors,
    "kernels": tables.kernels,
}
TITLES = {
    "throughput": "From a clip to an answer",
    "long": "Long sound",
    "training": "A training step",
    "compressors": "Compressing alone",
    "kernels": "Kernels",
}


def select(rows: Sequence[Row], benchmark: str, device: str | None = None, commit: str | None = None) -> list[Row]:
    """Gives the rows that a report is about: of one device and one commit, of every cell the last.

    Args:
        rows: as they were written; those that do not tell their commit are left out.
        benchmark: of the names in `KEYS`.
        device: a part of its name. Default: that of the newest row.
        commit: its beginning, or "any". Default: that of the device's newest row.
    """
    rows = sorted((row for row in rows if row["commit"]), key=lambda row: row["utc"])
    rows = [row for row in rows if device is None or device.lower() in row["device"].lower()]
    rows = [row for row in rows if row["device"] == rows[-1]["device"]]
    if commit != ANY:
        rows = [row for row in rows if row["commit"].startswith(commit or rows[-1]["commit"])]
    cells = {tuple(row.get(key) for key in KEYS[benchmark]): row for row in rows}
    return list(cells.values())


def caption(rows: Sequence[Row]) -> str:
    """Says where rows are from: machine, versions, commit, and how often was measured."""
    last = rows[-1]
    driver = f", driver {last['driver']}" if last.get("driver") else ""
    versions = ", ".join(f"{name} {last[name]}" for name in ("torch", "triton", "transformers") if last.get(name))
    commits = dict.fromkeys(row["commit"][:7] + " with changes" * row["dirty"] for row in rows)
    counts = [time["n"] for row in rows for time in row.values() if isinstance(time, dict) and "n" in time] or [0]
    often = " to ".join(f"{n:,}" for n in sorted({min(counts), max(counts)}))
    return f"{last['device']}{driver}, {versions}, commit {', '.join(commits)}, medians of {often} runs"


def speed_report(
    results: Path,
    pictures: Path,
    shown: Path | None = None,
    device: str | None = None,
    commit: str | None = None,
) -> str:
    """Draws the pictures, and gives the text with the tables.

    Args:
        results: the folder with the rows of each benchmark, as "throughput.jsonl".
        pictures: the folder for the pictures.
        shown: the same folder as the text refers to it. Default: as it is given.
        device: see `select`.
        commit: see `select`.

    Raises:
        ValueError: no row is left.
    """
    sections = []
    for benchmark in KEYS:
        rows = select(read_rows(results / f"{benchmark}.jsonl"), benchmark, device, commit)
        if not rows:
            continue
        where = about = caption(rows)
        drawn = rows
        if benchmark in ("throughput", "long"):  # a picture holds one clip, or clips of one kind: those of most cells
            clip, drawn = next(iter(tables.by_setting(rows, benchmark == "long").items()))
            about = f"{clip}; {where}"
        parts = [f"### {TITLES[benchmark]}", f"{where}.", TABLES[benchmark](rows)]
        for name, text, plot in PICTURES[benchmark]:
            path = plot(drawn, pictures / f"{name}.png", about)
            parts.append(f"![{text}]({((shown or pictures) / path.name).as_posix()})")
        sections.append("\n\n".join(parts))
    if not sections:
        raise ValueError(f"no rows in {results} of device {device or 'any'} and commit {commit or 'any'}")
    return "\n\n".join(sections)
