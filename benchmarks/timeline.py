"""Makes the time testbed: clips of real pictures, sounds and spoken names at known times, in LongVALE's format.

python benchmarks/timeline.py runs/timeline                              # 340 clips of 30 to 300 s, about 0.4 GB
python benchmarks/timeline.py runs/short --train 2000 --seconds 30 60    # for a small model
python train_compress.py --data runs/timeline/train.json --video_dir runs/timeline/videos

The pictures and sounds are Tux Paint's stamps (GPL-2), fetched once from Debian's archive. Each split gets dialogues,
`test.json`, and annotations for evaluation, `test-annotations.json`; both name the senses that a question needs. Clips
that are there are not made again, and a larger number adds to them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from audiopress.data.rendering import render
from audiopress.data.stamps import Stamp, packaged_stamps, read_recording
from audiopress.data.timeline import SPLITS, Split, annotation, dialogue, plan
from audiopress.models.packages import FetchError

VERSION = 1  # of the clips; a change that makes others of the same options counts it up
SIZES: Mapping[Split, int] = {"train": 200, "validation": 20, "test": 80, "unseen": 40}


@dataclass(frozen=True)
class Options:
    """What makes two data sets differ; see `data/timeline.py` and `data/rendering.py`."""

    seed: int = 0
    seconds: tuple[int, int] = (30, 300)
    size: int = 224
    fps: int = 4

    def __post_init__(self) -> None:
        if self.size < 2 or self.size % 2 or self.fps < 1:
            raise ValueError(f"size must be even and fps at least 1, got {self.size} and {self.fps}")


def write_data_set(
    folder: Path, stamps: Sequence[Stamp], sizes: Mapping[Split, int], options: Options, workers: int = 1
) -> None:
    """Writes `options.json`, then `videos/*.mp4`, and last the two JSON files of each split.

    Args:
        folder: new, or one that was begun with the same options and stamps.
        stamps: to compose the clips of.
        sizes: clips per split; a split of none is left as it is.
        options: of the clips.
        workers: processes that make clips; 1: this one.

    Raises:
        ValueError: a number of clips or workers cannot be, the folder was begun with others, or a clip cannot be made
            with these; see `plan`.
    """
    if min(sizes.values()) < 0 or workers < 1:
        raise ValueError(f"clips must be 0 or more and workers 1 or more, got {dict(sizes)} and {workers}")
    clips = {
        split: [plan(split, i, stamps, options.seconds, options.seed) for i in range(n)]
        for split, n in sizes.items()
        if n
    }
    videos = folder / "videos"
    videos.mkdir(parents=True, exist_ok=True)
    _claim(folder / "options.json", stamps, options)
    missing = [
        (clip, file, options.size, options.fps)
        for split in clips
        for clip in clips[split]
        if not (file := videos / f"{clip.id}.mp4").is_file()
    ]
    with tqdm(total=sum(map(len, clips.values())), desc="clips", unit="clip", disable=None) as bar:
        bar.update(bar.total - len(missing))
        if workers == 1:
            for job in missing:
                render(*job)
                bar.update()
        else:
            with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
                for _ in pool.map(render, *zip(*missing, strict=True)):
                    bar.update()
    for split in clips:
        _write_json(folder / f"{split}.json", [dialogue(clip) for clip in clips[split]])
        _write_json(folder / f"{split}-annotations.json", {clip.id: annotation(clip) for clip in clips[split]})


def _claim(path: Path, stamps: Sequence[Stamp], options: Options) -> None:
    """Notes the options of a new data set; raises ValueError for one that has others."""
    things = sorted([s.name, [len(read_recording(p)) for p in (*s.effects, *s.voices)]] for s in stamps)
    told = {
        "version": VERSION,
        "seed": options.seed,
        "seconds": list(options.seconds),
        "size": options.size,
        "fps": options.fps,
        "stamps": hashlib.sha256(json.dumps(things).encode()).hexdigest(),
    }
    if path.is_file():
        there = json.loads(path.read_text())
        if other := [f"{key} {there.get(key)}, not {value}" for key, value in told.items() if there.get(key) != value]:
            raise ValueError(f"{path.parent} was made with {'; '.join(other)}; choose another folder")
    _write_json(path, told)


def _write_json(path: Path, content: Any) -> None:
    """Writes all of a file or nothing."""
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def main() -> str | None:
    """Reads the command line and writes the data set; gives the message of an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for split in SPLITS:
        parser.add_argument(f"--{split}", type=int, default=SIZES[split], metavar="N", help=f"clips; {SIZES[split]}")
    parser.add_argument("--seconds", type=int, nargs=2, default=(30, 300), help="the shortest and the longest clip")
    parser.add_argument("--size", type=int, default=224, help="width and height of the frames")
    parser.add_argument("--fps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    try:
        options = Options(args.seed, tuple(args.seconds), args.size, args.fps)
        stamps = packaged_stamps()
        write_data_set(args.folder, stamps, {s: getattr(args, s) for s in SPLITS}, options, args.workers)
    except (FetchError, ValueError) as error:
        return f"error: {error}"
    return None


if __name__ == "__main__":
    sys.exit(main())
