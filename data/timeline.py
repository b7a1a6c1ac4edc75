"""Made-up clips whose every event is known to the millisecond: what happens when, and what is asked about it.

A clip is a row of events with gaps between them. In an event a thing is heard (its sound, or a voice saying its name),
a picture is shown, or both at once. Those with both form a grid: each of two or three sounds goes once with each of two
or three pictures, so that neither the sound alone nor the picture alone tells one of them from the others. All other
sounds and pictures occur once in a clip. A picture and a sound go together by chance, so that the one does not give the
other away.

The splits train, validation and test are of different clips with the same things: what they measure is *when*. A thing
has one recording, so asking about things never heard would ask whether a recording can be recognised by its name alone;
that is what the fourth split, unseen, is for: its things, pictures and recordings are in no other split.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from .longvale import PROMPTS
from .stamps import SAMPLING_RATE, Stamp, read_recording

Split = Literal["train", "validation", "test", "unseen"]
Needs = Literal["audio", "video", "both"]
QuestionTask = Literal["grounding", "seg_captioning", "counting"]
SPLITS: tuple[Split, ...] = get_args(Split)

COUNT = "<video>\nDuring how many different time segments {} in the video? Answer with a number."
TOGETHER = "do a picture and a sound occur together"

# Guesses: an event is long enough for one of 50 frames and for LongVALE's two-digit percents, which are 1 % apart; a
# gap is longer than the pause between the repetitions of a sound within an event.
_EVENT_SECONDS, _EVENT_SHARE = 2.0, 0.04
_GAP_SECONDS, _GAP_SHARE = 1.0, 0.01
PAUSE = 0.3
_FILLED = 0.8  # of the clip, with as many of the shortest events as it may have
_GRIDS = ((2, 2), (2, 3), (3, 2), (3, 3))  # sounds x pictures
_MAX_SINGLE = 8  # events outside the grid
_THINGS = 3 + (_MAX_SINGLE - 1) + 1  # pictures, and sounds, that a clip may need: grid, single, and one that is absent
SHORTEST_CLIP = 24  # seconds: a grid of four and two single events fill it


@dataclass(frozen=True)
class Thing:
    """Something to be seen or heard: how it is called in a sentence, and its file."""

    phrase: str
    file: Path


@dataclass(frozen=True)
class Event:
    """What happens from `start` to `end`, in seconds: something is heard or seen, or both at once."""

    start: float
    end: float
    heard: Thing | None
    seen: Thing | None

    @property
    def needs(self) -> Needs:
        """Which senses it takes to find or to describe the event."""
        return "both" if self.heard and self.seen else "audio" if self.heard else "video"

    @property
    def sentence(self) -> str:
        """Describes it: `The sound of a frog.`, `A picture of an owl.` or the two joined by `while`."""
        text = " while ".join(thing.phrase for thing in (self.heard, self.seen) if thing)
        return f"{text[0].upper()}{text[1:]}{' is shown' * (self.needs == 'both')}."


@dataclass(frozen=True)
class Clip:
    """All there is to know about a clip.

    Args:
        id: names its files.
        duration: in seconds.
        events: in time order.
        absent: a sound and a picture that do not occur, to be counted.
        seed: of everything that is not asked about: noise, colours, places, and the order of the questions.
    """

    id: str
    duration: int
    events: tuple[Event, ...]
    absent: tuple[Thing, Thing]
    seed: int


class Kind(NamedTuple):
    """What a question asks for, and which senses it needs."""

    task: QuestionTask
    needs: Needs


def plan(split: Split, index: int, stamps: Sequence[Stamp], seconds: tuple[int, int], seed: int = 0) -> Clip:
    """Draws a clip; the same arguments give the same clip, however many there are in the data set.

    Args:
        split: decides which of the stamps are used.
        index: of the clip in its split.
        stamps: all of them, in any order.
        seconds: the shortest and the longest duration.
        seed: of the data set.

    Raises:
        ValueError: the durations are no range from `SHORTEST_CLIP` on, the split is unknown, or it has too few things.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if not SHORTEST_CLIP <= seconds[0] <= seconds[1]:
        raise ValueError(f"seconds must be a range from {SHORTEST_CLIP} on, shortest first, got {seconds}")
    rng = random.Random(f"{seed} {split} {index}")
    used = sorted((s for s in stamps if s.unseen == (split == "unseen")), key=lambda stamp: stamp.name)
    sounds, pictures = [thing for s in used for thing in _sounds(s)], [_picture(s) for s in used]
    if min(len(sounds), len(pictures)) < _THINGS:
        raise ValueError(
            f"a clip may need {_THINGS} sounds and {_THINGS} pictures; the stamps of {split} have {len(sounds)} and "
            f"{len(pictures)}"
        )
    duration = rng.randint(*seconds)
    event, gap = max(_EVENT_SECONDS, _EVENT_SHARE * duration), max(_GAP_SECONDS, _GAP_SHARE * duration)
    room = int(_FILLED * (duration - gap) / (event + gap))
    rows, columns = rng.choice([grid for grid in _GRIDS if grid[0] * grid[1] <= room - 2])
    most = min(room - rows * columns, _MAX_SINGLE)
    single = rng.randint(max(most // 2, 2), most)
    single_sounds = rng.randint(1, single - 1)

    heard = [_choose(rng, thing) for thing in rng.sample(sounds, rows + single_sounds + 1)]
    seen = [_choose(rng, thing) for thing in rng.sample(pictures, columns + single - single_sounds + 1)]
    absent = heard.pop(), seen.pop()
    scenes: list[tuple[Thing | None, Thing | None]] = [(h, s) for h in heard[:rows] for s in seen[:columns]]
    scenes += [(h, None) for h in heard[rows:]] + [(None, s) for s in seen[columns:]]
    rng.shuffle(scenes)
    spans = _spans(rng, len(scenes), duration, event, gap)
    events = tuple(
        Event(start, _end(start, end, *scene), *scene) for (start, end), scene in zip(spans, scenes, strict=True)
    )
    return Clip(f"{split}-{index:05d}", duration, events, absent, rng.getrandbits(32))


def annotation(clip: Clip) -> dict[str, Any]:
    """Gives the clip's entry in a file of annotations, which is LongVALE's with `needs` added, one for each event."""
    return {
        "duration": clip.duration,
        "timestamps": [[event.start, event.end] for event in clip.events],
        "sentences": [event.sentence for event in clip.events],
        "needs": [event.needs for event in clip.events],
    }


def dialogue(clip: Clip) -> dict[str, Any]:
    """Gives the clip's entry in a file of dialogues, which is LongVALE's with `questions` added: the kind of each.

    Every event is asked about once, for its time or for what it is; one sound, one picture and the two are counted.
    """
    rng = random.Random(clip.seed)
    questions = [*_event_questions(clip, rng), *_count_questions(clip, rng)]
    rng.shuffle(questions)
    conversations = []
    for number, (_, question, answer) in enumerate(questions):
        if number:
            question = question.removeprefix("<video>\n").lstrip()
        conversations += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    tokens = {f"<s{i}>": event.start for i, event in enumerate(clip.events)}
    tokens |= {f"<e{i}>": event.end for i, event in enumerate(clip.events)}
    return {
        "id": clip.id,
        "conversations": conversations,
        "meta": {"duration": clip.duration, "token": tokens},
        "questions": [kind._asdict() for kind, _, _ in questions],
    }


def question_kinds(path: Path | str) -> dict[str, Kind]:
    """Reads what each question of a file written here needs, by the ids that `data/longvale.py` gives the records.

    Args:
        path: dialogues (the ids of single questions, `test-00000#3`) or annotations (`test-00000:grounding:3`).

    Raises:
        ValueError: the file is LongVALE's own, or another without kinds.
    """
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    try:
        if isinstance(content, list):
            return {f"{d['id']}#{i}": Kind(**kind) for d in content for i, kind in enumerate(d["questions"])}
        tasks: tuple[QuestionTask, ...] = ("grounding", "seg_captioning")
        return {
            f"{name}:{task}:{i}": Kind(task, needs)
            for name, entry in content.items()
            for task in tasks
            for i, needs in enumerate(entry["needs"])
        }
    except KeyError as error:
        raise ValueError(f"{path} has no entry {error}; kinds of questions are only known of made-up clips") from error


def _sounds(stamp: Stamp) -> Iterator[tuple[str, tuple[Path, ...]]]:
    if stamp.effects:
        yield f"the sound of {stamp.article} {stamp.name}", stamp.effects
    if stamp.voices:
        yield f"a voice saying {stamp.name}", stamp.voices


def _picture(stamp: Stamp) -> tuple[str, tuple[Path, ...]]:
    return f"a picture of {stamp.article} {stamp.name}", stamp.pictures


def _choose(rng: random.Random, thing: tuple[str, tuple[Path, ...]]) -> Thing:
    return Thing(thing[0], rng.choice(thing[1]))


def _spans(rng: random.Random, n: int, duration: float, event: float, gap: float) -> list[tuple[float, float]]:
    """Lays `n` events out, with a gap before, between and after: the shortest ones, plus random shares of the rest."""
    spare = duration - n * event - (n + 1) * gap
    weights = [rng.random() for _ in range(2 * n + 1)]  # gap, event, gap, ..., event, gap
    unit = spare / sum(weights)
    spans, time = [], 0.0
    for i in range(n):
        start = time + gap + weights[2 * i] * unit
        time = start + event + weights[2 * i + 1] * unit
        spans.append((round(start, 3), round(time, 3)))
    return spans


def _end(start: float, end: float, heard: Thing | None, seen: Thing | None) -> float:
    """Ends an event with a sound after the last whole repetition, or where the span cuts the first one."""
    if heard is None:
        return end
    seconds, span = len(read_recording(heard.file)) / SAMPLING_RATE, end - start
    times = int((span + PAUSE) / (seconds + PAUSE))
    return round(start + times * (seconds + PAUSE) - PAUSE, 3) if times else end


def _event_questions(clip: Clip, rng: random.Random) -> Iterator[tuple[Kind, str, str]]:
    """Asks when an event is or what happens in its time; of both, the one would tell the answer of the other."""
    for i, event in enumerate(clip.events):
        start, end = f"<s{i}>", f"<e{i}>"
        if rng.random() < 0.5:
            prompt = PROMPTS["grounding"].format(event.sentence.lower().removesuffix("."))
            yield Kind("grounding", event.needs), prompt, f"From {start} to {end}."
        else:
            prompt = PROMPTS["seg_captioning"].replace("<start>", start).replace("<end>", end)
            yield Kind("seg_captioning", event.needs), prompt, event.sentence


def _count_questions(clip: Clip, rng: random.Random) -> Iterator[tuple[Kind, str, str]]:
    """Counts a sound, a picture (either may be absent), and how often there are both at once."""
    sounds = [event.heard for event in clip.events if event.heard]
    pictures = [event.seen for event in clip.events if event.seen]
    needs: Needs
    for needs, things, absent in (("audio", sounds, clip.absent[0]), ("video", pictures, clip.absent[1])):
        thing = rng.choice([*dict.fromkeys(things), absent])
        yield Kind("counting", needs), COUNT.format(f"does {thing.phrase} occur"), f"{things.count(thing)}"
    together = sum(event.needs == "both" for event in clip.events)
    yield Kind("counting", "both"), COUNT.format(TOGETHER), f"{together}"
