"""Tables in Markdown of the rows that the benchmarks of speed leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from audiopress.benchmarks.cells import NONE, TRANSFORMERS
from audiopress.benchmarks.random_model import ANSWER, FRAMES, LLM

Row = dict[str, Any]


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Gives a table; a line that is too short is filled up with empty cells."""
    full = [head, ["---"] * len(head), *([*line, *[""] * (len(head) - len(line))] for line in lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in full)


def by_setting(rows: Sequence[Row], any_length: bool = False) -> dict[str, list[Row]]:
    """Gives the rows of every table by what its cells have in common, in words; those of the most cells first."""

    def describe(row: Row) -> str:
        name = f"Qwen2.5-Omni-{row['model'].upper()}'s shapes (random weights)" if row["model"] in LLM else row["model"]
        sound = "sound of several lengths" if any_length else f"{row['seconds']:g} s of sound"
        seen = f" and {FRAMES} frames" if row["video"] else ""
        clips = f", {row['batch']} clips at once" if row["batch"] > 1 else ""
        return f"{name}, {sound}{seen}{clips}"

    tables: dict[str, list[Row]] = {}
    for row in rows:
        tables.setdefault(describe(row), []).append(row)
    return dict(sorted(tables.items(), key=lambda item: -len(item[1])))


def _tables(settings: dict[str, list[Row]], table: Callable[[Sequence[Row]], str]) -> str:
    return "\n\n".join(f"{words}:\n\n{table(rows)}" for words, rows in settings.items())


def label(row: Row, compiled: bool = False) -> str:
    """Gives a method's name as a table has it; `compiled` says that rows beside it are."""
    names = {TRANSFORMERS: "transformers, as it comes", NONE: "ours, uncompressed"}
    plain = compiled and not row["compile"] and row["method"] != TRANSFORMERS
    return names.get(row["method"], f"`{row['method']}`") + ", not compiled" * plain


def end_to_end(rows: Sequence[Row]) -> str:
    """Gives a table for every clip: where the time of an answer goes, in ms, and how much less than transformers'."""
    settings = by_setting(rows)
    return _tables(
        {
            words + ", nothing compiled" * (not any(row["compile"] for row in own)): own
            for words, own in settings.items()
        },
        _end_to_end,
    )


def _end_to_end(rows: Sequence[Row]) -> str:
    head = ["", "audio", "video", "audio tower", "vision tower", "compressor", "prefill", "first token"]
    head += [f"{ANSWER} tokens", "ms/token", "GB at most", "KV cache, MB"]
    energy = any(row.get("joules") for row in rows)
    head += ["J"] * energy
    base = _baseline(rows)
    fresh = "first_token_fresh" in (base or rows[0])
    if fresh:
        head.insert(head.index("first token") + 1, "at a new length")
    compiled = any(row["compile"] for row in rows)
    lines = []
    for row in ordered(rows):
        name = label(row, compiled)
        if row["status"] != "ok":
            lines.append([name, _failure(row)])
            continue
        times = [f"{row[c]['median']:.1f}" if c in row else "" for c in ("audio_tower", "vision_tower", "compressor")]
        wholes = ("first_token", *["first_token_fresh"] * fresh, "answer")
        folds = [_fold(row, base, lambda r, c=c: r[c]["median"]) if c in row else "" for c in wholes]
        line = [name, *_tokens(row), *times, f"{row['prefill']['median']:.1f}", *folds, f"{row['ms_per_token']:.1f}"]
        line += [_gigabytes(row), f"{row['kv_bytes'] / 1e6:,.0f}"]
        lines.append([*line, *[f"{row['joules']:.0f}" if row.get("joules") else ""] * energy])
    return markdown(head, lines)


def long(rows: Sequence[Row]) -> str:
    """Gives a table of clips of several lengths: time, in s, and memory by length."""
    return _tables(by_setting(rows, any_length=True), _long)


def _long(rows: Sequence[Row]) -> str:
    head = ["", "minutes", "audio", "audio tower", "compressor", "prefill", "first token", "GB at most"]
    head += ["GB of the audio tower"]
    lines = []
    for row in ordered(rows):
        line = [label(row), f"{row['seconds'] / 60:g}"]
        if row["status"] != "ok":
            lines.append([*line, _failure(row)])
            continue
        steps = ("audio_tower", "compressor", "prefill", "first_token")
        line += [_tokens(row)[0], *(f"{row[step]['median'] / 1e3:.2f}" if step in row else "" for step in steps)]
        lines.append([*line, _gigabytes(row), _gigabytes(row, "audio_tower_bytes")])
    return markdown(head, lines)


def training(rows: Sequence[Row]) -> str:
    """Gives a table for every clip: a training step's time, and memory, against transformers'."""
    return _tables(by_setting(rows), _training)


def _training(rows: Sequence[Row]) -> str:
    head = ["", "audio", "video", "ms per step", "samples/s", "GB at most"]
    base, lines = _baseline(rows), []
    for row in ordered(rows):
        if row["status"] != "ok":
            lines.append([label(row), _failure(row)])
            continue
        rate = _fold(row, base, lambda r: 1 / r["samples_per_second"], lambda r: f"{r['samples_per_second']:.2f}")
        memory = _gigabytes(row)
        if base is not None and memory and row is not base:
            memory += f" ({100 * row['peak_allocated'] / base['peak_allocated']:.0f} %)"
        lines.append([label(row), *_tokens(row), f"{row['step']['median']:,.0f}", rate, memory])
    return markdown(head, lines)


def compressors(rows: Sequence[Row]) -> str:
    """Gives the table of compressing alone, the slowest first; methods that act inside the tower have no row."""
    lines = []
    for row in sorted((r for r in rows if r["status"] == "ok"), key=lambda r: -r["ms"]["median"]):
        kept = row["tokens_out"] / row["tokens_in"]
        lines.append([label(row), f"{row['tokens_out']:,} ({100 * kept:.3g} %)", f"{row['ms']['median']:.1f}"])
    return markdown(["", f"of {rows[0]['tokens_in']:,} tokens", "ms"], lines)


def kernels(rows: Sequence[Row]) -> str:
    """Gives the table of the kernels: ms of every back end, and the fast one against the others."""
    names = ("eager", "compile", "triton")
    head = ["operation", "shape", "pass", *(f"{name}, ms" for name in names), "copy or flash, ms"]
    head += ["× eager", "× compile", "speed against copy or flash"]
    lines = []
    for (op, shape, direction), times in kernel_times(rows).items():
        cells = [f"{times[name]:.3f}" if name in times else "" for name in names]
        bound = times.get("copy", times.get("flash"))
        line = [op, shape, direction, *cells, f"{bound:.3f}" if bound else ""]
        if "triton" in times:
            line += [f"{times[n] / times['triton']:.1f}" if n in times else "" for n in names[:2]]
            line += [f"{100 * bound / times['triton']:.0f} %"] if bound else []
        lines.append(line)
    return markdown(head, lines)


def kernel_times(rows: Sequence[Row]) -> dict[tuple[str, str, str], dict[str, float]]:
    """Gives the median ms of each back end, by operation, shape and pass, where it did not fail."""
    times: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        cell = times.setdefault((row["op"], row["shape"], row["pass"]), {})
        if row["status"] == "ok":
            cell[row["backend"]] = row["ms"]["median"]
    return times


def ordered(rows: Sequence[Row]) -> list[Row]:
    """Puts the uncompressed models first, and the ratios of a method under one another; otherwise as measured."""
    order = list(dict.fromkeys([TRANSFORMERS, NONE, *(row["method"] for row in rows)]))
    return sorted(rows, key=lambda row: (order.index(row["method"]), -(row["keep_ratio"] or 0), row["seconds"]))


def _baseline(rows: Sequence[Row]) -> Row | None:
    return next((row for row in rows if row["method"] == TRANSFORMERS and row["status"] == "ok"), None)


def _tokens(row: Row) -> list[str]:
    """Gives the audio and the video tokens that the LLM reads, with their share."""
    counts = ((row["tokens"][kind], row["kept"].get(kind)) for kind in ("audio", "video"))
    return ["" if share is None else f"{after:,} ({100 * share:.3g} %)" for (_, after), share in counts]


def _fold(row: Row, base: Row | None, value: Callable[[Row], float], text: Callable[[Row], str] | None = None) -> str:
    """Gives a number, and how many times better than transformers' it is, where both are of one run."""
    shown = text(row) if text else f"{value(row):,.0f}"
    compared = base is not None and row is not base and row["commit"] == base["commit"]
    return f"{shown} ({value(base) / value(row):.1f}×)" if compared else shown  # type: ignore[arg-type]


def _gigabytes(row: Row, name: str = "peak_allocated") -> str:
    return f"{row[name] / 1e9:.1f}" if name in row else ""


def _failure(row: Row) -> str:
    return "out of memory" if row["status"] == "oom" else f"failed: {row['message'][:60]}"
