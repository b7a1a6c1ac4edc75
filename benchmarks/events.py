"""Measures what compression leaves of the times and the things: questions about clips that `timeline.py` made.

python benchmarks/timeline.py runs/timeline                                   # the clips
python benchmarks/events.py runs/timeline --methods ward --limit 4            # one method beside the controls
python benchmarks/events.py runs/timeline --model runs/ward --keep-ratios 0.2 # a variant that train_compress.py saved
python benchmarks/events.py runs/timeline --steps 200 --seeds 0 1 2           # the LLM is first trained to read each

Grounding, segment captioning and counting, asked one by one and answered greedily, as a user's mp4 would be. With
--steps every cell first trains LoRA, and the method's own weights where it has any, on the clips of the train split:
the same data, steps and order for all. One JSON line per cell is added to --output; a cell that is there already, of
the same commit and settings, is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from audiopress.benchmarks.cells import NONE, Cell, Parser, add_run_options, check_device, ratios_of, run_cells
from audiopress.benchmarks.environment import environment
from audiopress.benchmarks.speed.tables import markdown
from audiopress.benchmarks.times.clips import TIMESTAMPS
from audiopress.benchmarks.times.testbed import Recipe, TimeSettings
from audiopress.compression import available, build
from audiopress.compression.base import check_count
from audiopress.compression.budget import check_keep_ratio
from audiopress.compression.registry import QWEN_7B
from audiopress.data.timeline import SPLITS
from audiopress.models import storage
from audiopress.models.packages import FetchError
from audiopress.models.rewrite import POSITIONS

KEEP_RATIOS = (0.5, 0.25, 0.2, 0.125)  # of the audio
JOINT_RATIOS = (0.2, 0.1, 0.05)  # of audio and video together
RECIPE_HELP = {
    "batch": "of training: dialogues per step",
    "learning_rate": "of LoRA",
    "connector_learning_rate": "of a method's own weights",
    "lora_r": "rank, and alpha, of LoRA",
}


def training_free() -> list[str]:
    """Gives every method and preset that need not be trained."""
    names = [n for family, info in available().items() for n in (family, *(f"{family}:{p}" for p in info.presets))]
    with torch.device("meta"):
        return [name for name in names if not build(name, **vars(QWEN_7B)).trained]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Gives a table of scores, in percent."""
    head = ["", "steps", "seed", "audio/s", "audio and video/s", "mIoU [95 %]", "R@0.5", "read", "captions", "things"]
    lines = []
    for row in rows:
        line = [f"`{row['method']}`", f"{row['steps']}", f"{row['seed']}"]
        if row["status"] != "ok":
            lines.append([*line, row["message"]])
            continue
        rates = [f"{row[name]:.3g}" for name in ("tokens_per_second", "media_tokens_per_second")]
        shares = [row["recall"]["0.5"], *(row[x] for x in ("parsed", "caption_accuracy", "caption_things"))]
        shares.append(row["counting_accuracy"])
        interval = row["miou_interval"]
        miou = f"{100 * row['miou']:.1f}" + (f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else "")
        lines.append([*line, *rates, miou, *(f"{100 * share:.1f}" for share in shares)])
    return markdown([*head, "counts"], lines)


def parse() -> tuple[Parser, argparse.Namespace]:
    """Reads the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="folder", help="that timeline.py wrote")
    parser.add_argument("--model", default="omni-small", help="omni-small, a checkpoint, or a saved variant")
    parser.add_argument("--base", help="of a saved variant: where its base model lies now")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="default: all that need no training")
    parser.add_argument("--keep-ratios", type=float, nargs="+", help="tokens out / in; of joint methods, of both kinds")
    parser.add_argument("--positions", choices=POSITIONS, default=POSITIONS[0], help="a variant has its own")
    parser.add_argument("--steps", type=int, default=0, help="of training before every cell; 0: none")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a cell for each")
    for field in dataclasses.fields(Recipe):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=type(field.default), default=field.default, help=RECIPE_HELP[field.name])
    parser.add_argument("--split", choices=SPLITS, default="test", help="tune on validation, never on test")
    parser.add_argument("--limit", type=int, help="clips to ask about, at most")
    parser.add_argument("--num-frames", type=int, default=50, help="of each clip")
    parser.add_argument(
        "--timestamps", type=int, default=TIMESTAMPS, help="in each clip, which a model must have been trained with"
    )
    parser.add_argument("--room", type=int, help="tokens of a batch of questions; less needs less memory")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that decode clips; 0: none")
    add_run_options(parser, Path("runs/events.jsonl"))
    return parser, parser.parse_args()


def make_cells(args: argparse.Namespace, settings: TimeSettings) -> list[Cell]:
    """Gives the cells; of a saved variant those of its own method.

    Raises:
        ValueError: an unknown method, one that must be trained, or an option that cannot be.
    """
    check_count("--steps", args.steps, least=0)
    check_count("--workers", args.workers, least=0)
    for seed in args.seeds:
        check_count("--seeds", seed, least=0)
    for keep_ratio in args.keep_ratios or ():
        check_keep_ratio(keep_ratio)
    common = settings.common() | {"options": {}, "positions": args.positions, "steps": args.steps}
    common |= settings.training() if args.steps else {}
    pairs: list[tuple[str, float | None]] = []
    if settings.saved:
        if args.methods or args.steps:
            raise ValueError(f"{args.model} is a saved variant with its own method: give no --methods and no --steps")
        variant = storage.read_manifest(args.model)
        own, common["positions"] = variant["compressor"], variant["positions"]
        pairs = [(NONE if own is None else own["name"], ratio) for ratio in args.keep_ratios or [None]]
    else:
        for name in dict.fromkeys([NONE, "random", "uniform-stride", *(args.methods or training_free())]):
            with torch.device("meta"):
                method = build(name, **vars(QWEN_7B))
            if method.trained and not args.steps:
                raise ValueError(f"{name} has weights to train: give --steps, or --model a saved variant")
            ratios = args.keep_ratios or (JOINT_RATIOS if method.stage == "joint" else KEEP_RATIOS)
            pairs += [(name, ratio) for ratio in ratios_of(name, ratios)]
    return [
        common | {"method": name, "keep_ratio": ratio, "seed": seed} for name, ratio in pairs for seed in args.seeds
    ]


def main() -> None:
    """Runs the cells and prints their table."""
    logging.basicConfig(format="%(message)s")
    parser, args = parse()
    try:
        recipe = Recipe(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)})
        names = [field.name for field in dataclasses.fields(TimeSettings) if field.name != "recipe"]
        settings = TimeSettings(**{name: getattr(args, name) for name in names}, recipe=recipe)
        device = check_device(args.device)
        cells = make_cells(args, settings)
        testbed = settings.open(args.workers, device)
    except (ValueError, OSError, FetchError) as error:
        parser.error(str(error))
    print(table(run_cells(cells, testbed, environment(device, args.commit), args.output)))


if __name__ == "__main__":
    main()
