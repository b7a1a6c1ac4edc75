"""The model card of aligned weights, filled from what `align.py` logged and measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from audiopress.data import speech, stamps, synthesis, wordnet
from audiopress.models import delta, omni_small
from audiopress.models.packages import Package, digest

CARD = """\
# omni-small, aligned

<!-- Written by `python benchmarks/align.py --publish`. -->

`{file}` ({size:.1f} MB, sha256 `{sha256}`) is what training changed in `omni-small`, the small
Qwen2.5-Omni that this project assembles out of Whisper-base and SmolLM2-135M-Instruct: a sum of low rank for every
matrix of the LLM and of Whisper's encoder, and the audio projection, the norms and the whole vision tower in place of
theirs, in 8 bits.
`audiopress.load("omni-small")` applies it; `omni-small:unaligned` is the model without it.

## Training

`{recipe}`: {minutes:.0f} minutes and {steps:,} steps in {starts}. {made}

## Scores

| what | of | score | 95 % interval |
|---|---|---|---|
{scores}

Uncompressed, greedy decoding, {dtype}, {device}, torch {torch}, transformers {transformers}, commit `{commit}`, {day};
`{measure}` measures them again. "Spelled alike" is after Whisper's own rules for English, by which `3` and `three` are
the same. The intervals are bootstrap ones over prompts and over clips. No text of the test split was trained on, in any
voice; its words were, in other texts. The test clips are made of the training clips' things and recordings: what is new
in them is what happens when.

## Data

| what | out of | licence |
|---|---|---|
{data}

## Licence

What this project adds is under Apache-2.0, as all of it. Whisper's MIT licence and SmolLM2's Apache-2.0 ask for their
notices to be kept with what is derived from them, as these weights are. They hold no recording, picture or text;
whether weights derive from what they were trained on has not been settled. For those who hold that they do: the
prompts' CC-BY-SA-3.0 asks for credit (voice: Allison Smith, recorded for Asterisk) and for the same licence, and Tux
Paint's stamps are under the GPL, version 2. Flite, eSpeak NG and WordNet put no terms on what is spoken or said with
them; eSpeak NG's program is under the GPL, version 3, and no part of it is here.

## What it is not for

It is a laptop's stand-in for Qwen2.5-Omni, on which compressors are tried out. It knows one studio voice, synthetic
voices and English alone; of pictures and sounds it knows the things of its training clips. Its scores say nothing about
Qwen2.5-Omni's, about real videos or about people speaking freely. It is not to be used where a transcript matters.
"""


def publish(folder: Path, file: str, to: Path = omni_small.WEIGHTS) -> str:
    """Copies the weights of a training into the package, with their card.

    Args:
        folder: of the training.
        file: its weights.
        to: where they go.

    Returns:
        The line for `models/omni_small.py` that makes them the default.

    Raises:
        ValueError: these weights have not been measured.
    """
    text = card(folder, file)
    to.mkdir(exist_ok=True)
    shutil.copyfile(folder / file, to / file)
    (to / "README.md").write_text(text)
    return f'ALIGNMENT: Alignment | None = Alignment("{file}", "{digest(to / file)}")'


def card(folder: Path, file: str) -> str:
    """Gives the model card; see `publish`."""
    _, about = delta.read(folder / file)
    rows = [row for row in _rows(folder / "scores.jsonl") if row["weights"] == about]
    speech_of = {row["speech"]["split"]: row["speech"] for row in rows if "speech" in row}
    time = next((row["time"] for row in reversed(rows) if "time" in row), None)
    if speech_of.keys() != {"validation", "test"} or time is None:
        raise ValueError(f"{folder / 'scores.jsonl'} lacks scores of {file} as it is; `--minutes 0` measures them")
    last, starts = rows[-1], int(about["starts"])
    return CARD.format(
        **{name: last[name] for name in ("device", "torch", "transformers", "commit")},
        file=file,
        size=(folder / file).stat().st_size / 1e6,
        sha256=digest(folder / file),
        recipe="python benchmarks/align.py",
        measure="python benchmarks/align.py --minutes 0",
        minutes=float(about["seconds"]) / 60,
        steps=int(about["steps"]),
        starts="one start" if starts == 1 else f"{starts} starts",
        made=" ".join(_made(_rows(folder / "log.jsonl"))),
        dtype="float32" if last["driver"] is None else "bfloat16",
        day=last["utc"][:10],
        scores="\n".join(_scores(speech_of, time)),
        data="\n".join(f"| {what} | {package} | {package.licence} |" for what, package in _packages()),
    )


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        yield from map(json.loads, path.read_text().splitlines())


def _made(log: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Tells what each start trained on, by its last row."""
    starts: dict[int, dict[str, Any]] = {}
    for row in log:
        starts.setdefault(row["start"], {}).update(row)
    for start, row in starts.items():
        heard = f"{row['hours']:.1f} hours of speech ({row['synthetic']:,} synthetic utterances, the others recorded)"
        yield f"Start {start}, on one {row['device']}, had {heard} and {row['clips']:,} clips."


def _scores(heard: dict[str, dict[str, Any]], time: dict[str, Any]) -> Iterator[str]:
    def line(what: str, of: str, score: float, interval: Sequence[float] | None) -> str:
        within = "" if interval is None else f"{interval[0]:.1%} to {interval[1]:.1%}"
        return f"| {what} | {of} | {score:.1%} | {within} |"

    for split in ("test", "validation"):
        found = heard[split]
        of = f"{found['prompts']} recorded English prompts, {found['words']} words, {split} split"
        yield line("word error rate", of, found["wer"], found["wer_interval"])
        yield line("the same, spelled alike", of, found["wer_spelled"], found["wer_spelled_interval"])
    of = f"time testbed, {time['clips']} clips of the test split, {time['questions']} questions"
    for name, what in (
        ("miou", "grounding, mIoU"),
        ("caption_accuracy", "captions that are right"),
        ("counting_accuracy", "numbers that are right"),
    ):
        if name in time:
            yield line(what, of, time[name], time[f"{name}_interval"])
    for needs, own in time["by_needs"].items():
        if "miou" in own:
            yield line(f"grounding, mIoU: {needs}", "the same", own["miou"], own["miou_interval"])
    for least, share in time["recall"].items():
        yield line(f"grounding, R@{least}", "the same", share, None)


def _packages() -> Iterator[tuple[str, Package]]:
    yield "Whisper-base, first half", omni_small.WHISPER_1
    yield "Whisper-base, second half", omni_small.WHISPER_2
    yield "SmolLM2-135M-Instruct", omni_small.SMOLLM2
    for package in speech.speech_packages("en"):
        yield "recorded prompts, train split", package
    yield "synthetic voices", synthesis.FLITE[0]
    yield "synthetic voices", synthesis.ESPEAK
    yield "sentences and words they speak", wordnet.PACKAGE
    yield "pictures and sounds of the clips", stamps.PACKAGE
