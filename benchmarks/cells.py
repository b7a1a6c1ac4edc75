"""A benchmark of a whole model as a grid of cells, each one JSON line: settings, and findings or the failure.

A run that was stopped goes on where it was: what is measured already, of the same commit and settings, stands.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from audiopress.compression import build
from audiopress.compression.budget import check_keep_ratio
from audiopress.compression.registry import QWEN_7B

log = logging.getLogger(__name__)

TRANSFORMERS = "transformers"  # the uncompressed model as transformers runs it
NONE = "none"  # ours without a compressor
BASELINES = (TRANSFORMERS, NONE, "random", "uniform-stride")

Cell = dict[str, Any]


class Parser(argparse.ArgumentParser):
    """A parser that tells what is wrong in one line, and ends with code 2."""

    def error(self, message: str) -> NoReturn:
        """Tells it."""
        self.exit(2, f"error: {' '.join(message.split())}\n")


def grid_parser(description: str | None, methods: Iterable[str], output: Path) -> Parser:
    """Gives a parser of the options that benchmarks of a whole model share."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="7b", help="7b or 3b (random weights), omni-small, or a checkpoint")
    parser.add_argument("--seconds", type=float, nargs="+", default=[256.89], help="of a clip")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="clips")
    parser.add_argument(
        "--compressors",
        nargs="+",
        default=[*BASELINES, *methods],
        metavar="NAME",
        help=f"{TRANSFORMERS} (as it comes), {NONE} (ours, uncompressed), or a method's name; default: the baselines "
        f"{', '.join(BASELINES)}, and {', '.join(methods)}",
    )
    parser.add_argument("--keep-ratios", type=float, nargs="+", default=[0.25], help="of methods that can have them")
    parser.add_argument("--no-video", action="store_true", help="the clip is sound alone")
    parser.add_argument("--repeats", type=int, default=5, help="of what is timed")
    add_run_options(parser, output)
    return parser


def add_run_options(parser: argparse.ArgumentParser, output: Path) -> None:
    """Adds the options that all these benchmarks end with: where it runs, of which commit, and the file of rows."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="of the code measured, where it is not in a checkout")
    parser.add_argument("--output", type=Path, default=output)


def read_shard(text: str, form: str = "i/n with 1 <= i <= n") -> tuple[int, int]:
    """Reads "2/3" as (2, 3); raises ValueError, which tells the `form`, where it is no such thing."""
    number, _, total = text.partition("/")
    if not (number.isdecimal() and total.isdecimal() and 1 <= int(number) <= int(total)):
        raise ValueError(f"--shard must be {form}, got {text!r}")
    return int(number), int(total)


def check(args: argparse.Namespace) -> torch.device:
    """Gives the device; raises ValueError, with a message of one line, where an option cannot be."""
    for name, least in (("seconds", 0.1), ("batch", 1)):
        if min(getattr(args, name)) < least:
            raise ValueError(f"--{name} must be {least:g} or more, got {min(getattr(args, name)):g}")
    if args.repeats < 1:
        raise ValueError(f"--repeats must be 1 or more, got {args.repeats}")
    for keep_ratio in args.keep_ratios:
        check_keep_ratio(keep_ratio)
    return check_device(args.device)


def check_device(name: str) -> torch.device:
    """Gives the device of a name; raises ValueError, with a message of one line, where there is none."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise ValueError(f"there is no device {name!r} here: {str(error).splitlines()[0]}") from error
    return device


def make_cells(args: argparse.Namespace, **settings: Any) -> list[Cell]:
    """Gives the settings of every cell, transformers' first: the towers are changed after it.

    A method that has weights of its own for every keep ratio is measured at its own ratio alone: None.

    Raises:
        ValueError: an unknown method.
    """
    methods = [(name, ratio) for name in dict.fromkeys(args.compressors) for ratio in ratios_of(name, args.keep_ratios)]
    methods.sort(key=lambda method: method[0] != TRANSFORMERS)
    return [
        {"model": args.model, "method": name, "keep_ratio": ratio, "seconds": seconds, "batch": batch}
        | {"video": not args.no_video}
        | settings
        for name, ratio in methods
        for seconds in args.seconds
        for batch in args.batch
    ]


def ratios_of(name: str, keep_ratios: Sequence[float]) -> Sequence[float | None]:
    """Gives the ratios that one set of a method's weights serves; [None], its own, where it serves no other."""
    if name in (TRANSFORMERS, NONE):
        return [None]
    with torch.device("meta"):
        method = build(name, **vars(QWEN_7B))
        try:
            for keep_ratio in keep_ratios:
                method.at(keep_ratio)
        except ValueError:
            return [None]
    return keep_ratios


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Gives the rows of a file; none where there is no file.

    A line that is no JSON, as a run leaves it that is killed while it writes, is no row; that is logged.
    """
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
        try:
            rows += [json.loads(line)] if line else []
        except ValueError:
            log.warning("%s: line %d is cut off and no row", path, number)
    return rows


def append(row: Mapping[str, Any], path: Path) -> None:
    """Adds a row in one write, so that processes that share a file do not write into each other's lines."""
    with path.open("a+b", buffering=0) as file:
        if size := file.seek(0, os.SEEK_END):
            file.seek(size - 1)
        end = b"\n" if size and file.read(1) != b"\n" else b""  # the last line was cut off
        file.write(end + json.dumps(row).encode() + b"\n")


def run_cells(
    cells: Sequence[Cell], measure: Callable[[Cell], dict[str, Any]], where: dict[str, Any], output: Path
) -> list[dict[str, Any]]:
    """Measures the cells one after another, and adds the row of each to a file as soon as it is there.

    A row's `status` is "ok", "oom" or "failed", with the `message`. What is "ok" or "oom" is not run again for the
    same commit, device and versions; of a changed checkout everything is.

    Args:
        cells: their settings.
        measure: gives what is found in a cell.
        where: what `environment` gave.
        output: of JSON lines.

    Returns:
        The row of every cell.

    Raises:
        SystemExit: the GPU was lost; see `stop_if_lost`.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    same = {name: where[name] for name in where if name != "utc"}
    known = where["commit"] is not None and not where["dirty"]
    before = [row for row in read_rows(output) if known and same.items() <= row.items() and row["status"] != "failed"]
    rows = []
    for cell in (bar := tqdm(cells, disable=None)):
        names = ("method", "keep_ratio", "seconds")
        bar.set_postfix_str(", ".join(str(cell[name]) for name in names if cell.get(name)))
        row = next((row for row in before if cell.items() <= row.items()), None)
        if row is None:
            row = where | cell | attempt(measure, cell)
            append(row, output)
            stop_if_lost(row)
        rows.append(row)
    return rows


def attempt(measure: Callable[[Cell], dict[str, Any]], cell: Cell) -> dict[str, Any]:
    """Gives what was found in a cell, or how it failed: one cell's failure is no reason to stop the others."""
    try:
        return measure(cell) | {"status": "ok"}
    except Exception as error:
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        # Compilers hide an error in one of their own.
        memory = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
        return {"status": "oom" if memory else "failed", "message": message}


def stop_if_lost(row: dict[str, Any]) -> None:
    """Ends the process, with code 1, if a cell's failure has left a GPU that answers nothing more.

    After an illegal memory access or a failed assertion on a GPU every call of the same process fails, whatever it is:
    all cells that are left would be rows of failures that are none.

    Args:
        row: of the cell, which has been written.
    """
    if row["status"] != "failed" or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        sys.exit(
            f"error: the GPU answers nothing more after {row['method']} ({row['message']}); what was measured stands, "
            "and no other cell was tried"
        )
