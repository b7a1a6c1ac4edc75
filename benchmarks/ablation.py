"""Runs the ablations that a YAML file describes: testbeds x methods x rates x options x seeds, each cell once.

python benchmarks/ablation.py benchmarks/configs/ablation-small.yaml              # minutes, on a CPU
python benchmarks/ablation.py benchmarks/configs/ablation.yaml --list             # what would be run
python benchmarks/ablation.py benchmarks/configs/ablation.yaml --questions positions encoder-or-after
python benchmarks/ablation.py benchmarks/configs/ablation.yaml --shard 1/2 --device cuda:0  # 2/2 beside it on cuda:1
python benchmarks/report.py accuracy --results runs                               # tables and plots

A cell is a row of --output as soon as it is measured, and is never measured again, by whatever commit; one that failed
is tried again with --again alone. All first seeds come before all second ones, otherwise the file decides the order.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from audiopress.benchmarks.cells import (
    Cell,
    Parser,
    add_run_options,
    append,
    attempt,
    check_device,
    read_rows,
    read_shard,
    stop_if_lost,
)
from audiopress.benchmarks.environment import environment
from audiopress.benchmarks.grids import Ablation, Planned, SpeechSettings, read_ablation
from audiopress.benchmarks.times.testbed import TimeSettings
from audiopress.data.speech import speech_records
from audiopress.models.packages import FetchError
from audiopress.models.whisper import load_whisper

Measure = Callable[[Cell], dict[str, Any]]


def open_testbed(settings: SpeechSettings | TimeSettings, device: torch.device, workers: int) -> Measure:
    """Opens the model and the clips of a testbed.

    Raises:
        ValueError: the model or the clips are not what they must be.
        FetchError: they are not in the cache and cannot be fetched.
    """
    if isinstance(settings, TimeSettings):
        return settings.open(workers, device)
    return open_speech(settings, device)


def open_speech(settings: SpeechSettings, device: torch.device) -> Measure:
    """Opens Whisper and the prompts."""
    from audiopress.benchmarks.speech import Measuring, SpeechTestbed
    from audiopress.benchmarks.words.cells import SECONDS
    from audiopress.benchmarks.words.clips import make_clips
    from audiopress.benchmarks.words.training import Settings, SpeechTraining

    whisper = load_whisper(settings.model).to(device)
    seconds = SECONDS[settings.joined]
    clips = []
    for language in settings.languages:
        records = [record for split in settings.splits for record in speech_records(split, [language])]
        clips += make_clips(records, language, seconds, settings.joined, settings.limit)
    lessons = Settings(settings.languages, SECONDS[True], settings.limit, settings.train_batch, (settings.train_rate,))
    testbed = SpeechTestbed(whisper, clips, settings.batch)
    return Measuring({settings.joined: testbed}, SpeechTraining(whisper, lessons), {})


def key(cell: Cell) -> str:
    """Gives what identifies a cell."""
    return json.dumps(cell, sort_keys=True)


def run(
    planned: Sequence[Planned],
    open_one: Callable[[str], Measure],
    where: Mapping[str, Any],
    output: Path,
    shard: tuple[int, int] = (1, 1),
    again: bool = False,
) -> list[dict[str, Any]]:
    """Measures the cells that have no row yet.

    Args:
        planned: all cells.
        open_one: opens a testbed by its name; it is asked only for those of which something is to be measured.
        where: what `environment` gave.
        output: of JSON lines.
        shard: every n-th cell, from the i-th on.
        again: measure those that failed again.

    Returns:
        The last row of every cell that has one, in their order.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = {key(row["cell"]): row for row in read_rows(output) if "cell" in row}
    own = planned[shard[0] - 1 :: shard[1]]
    for each in own:  # a question that was added to the file takes what is measured already
        if (row := rows.get(key(each.cell))) is not None and row["ablation"] != each.questions:
            rows[key(each.cell)] = row = row | {"ablation": each.questions}
            append(row, output)
    todo = [p for p in own if (row := rows.get(key(p.cell))) is None or (again and row["status"] != "ok")]
    for each in (bar := tqdm(todo, desc="cells", disable=None)):
        cell = each.cell
        bar.set_postfix_str(", ".join(str(cell[name]) for name in ("testbed", "method", "keep_ratio") if cell[name]))
        measure = open_one(each.testbed)
        row = dict(where) | cell | attempt(measure, cell) | {"cell": cell, "ablation": each.questions}
        append(row, output)
        rows[key(cell)] = row
        stop_if_lost(row)
    return [rows[key(p.cell)] for p in planned if key(p.cell) in rows]


def summary(ablation: Ablation, rows: Sequence[Mapping[str, Any]]) -> str:
    """Says how much of every question is measured, and what failed."""
    status = {key(row["cell"]): row["status"] for row in rows}
    lines = []
    for name, text in ablation.questions.items():
        keys = [key(p.cell) for p in ablation.cells if name in p.questions]
        counts = [sum(status.get(k) == s for k in keys) for s in ("ok", "oom", "failed")]
        bad = f", {counts[1]} out of memory, {counts[2]} failed" if sum(counts[1:]) else ""
        lines.append(f"{name}: {counts[0]} of {len(keys)} cells{bad}; {text}")
    failures = [row for row in rows if row["status"] != "ok"]
    lines += [f"  {row['method']} at {row['keep_ratio']}, {row['testbed']}: {row['message']}" for row in failures]
    return "\n".join(lines)


def parse() -> tuple[Parser, argparse.Namespace]:
    """Reads the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="the YAML file; see benchmarks/configs/ablation.yaml")
    parser.add_argument("--questions", nargs="+", metavar="NAME", help="of the file; default: all")
    parser.add_argument("--testbeds", nargs="+", metavar="NAME", help="of the file; default: all")
    parser.add_argument("--list", action="store_true", help="print the cells and what is done of them, and stop")
    parser.add_argument("--shard", default="1/1", metavar="i/n", help="every n-th cell, from the i-th on")
    parser.add_argument("--again", action="store_true", help="try cells that failed again")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that decode clips; 0: none")
    add_run_options(parser, Path("runs/ablation.jsonl"))
    return parser, parser.parse_args()


def main() -> None:
    """Runs the cells, and says what is done."""
    logging.basicConfig(format="%(message)s")
    parser, args = parse()
    try:
        ablation = read_ablation(args.config).only(args.questions, args.testbeds)
        shard = read_shard(args.shard)
        device = check_device(args.device)
        if args.list:
            rows = read_rows(args.output)
            print("\n".join(json.dumps(planned.cell) for planned in ablation.cells))
        else:
            open_one = cache(lambda name: open_testbed(ablation.testbeds[name], device, args.workers))
            where = environment(device, args.commit) | {"file": str(args.config)}
            rows = run(ablation.cells, open_one, where, args.output, shard, args.again)
    except (ValueError, OSError, FetchError) as error:
        parser.error(str(error))
    print(summary(ablation, [row for row in rows if "cell" in row]))


if __name__ == "__main__":
    main()
