"""The time testbed: what the JSON says is what is heard and seen in the mp4, and what LongVALE's reader reads."""

from __future__ import annotations

import colorsys
import dataclasses
import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import wavfile

from audiopress.benchmarks import timeline as script
from audiopress.benchmarks.timeline import Options, write_data_set
from audiopress.data import stamps as stamps_module
from audiopress.data.longvale import format_time, load_dialogues, load_queries
from audiopress.data.media import MediaError, read_audio, read_video
from audiopress.data.rendering import render
from audiopress.data.stamps import Stamp, packaged_stamps, read_picture, read_recording, read_stamps
from audiopress.data.timeline import SPLITS, annotation, dialogue, plan, question_kinds
from audiopress.models.packages import FetchError

NAMES = ("ant", "bat", "cat", "cow", "dog", "eel", "elk", "emu", "fox", "gnu", "hen", "owl", "pig", "yak")
OPTIONS = Options(seconds=(24, 27), size=64, fps=5)


def tone(frequency: float, seconds: float) -> np.ndarray:
    """Gives a tone between two stretches of silence, 16-bit."""
    samples = np.sin(2 * np.pi * frequency * np.arange(round(16_000 * seconds)) / 16_000)
    return np.pad(8_000 * samples, (3_200, 1_600)).astype(np.int16)


def frequency(file: Path) -> float:
    """The pitch of a recording of the folder below; a voice is higher than all effects."""
    return 400 + 150 * NAMES.index(file.stem.removesuffix("_desc")) + 3_000 * file.stem.endswith("_desc")


def colour(file: Path) -> tuple[int, ...]:
    """The one colour of a picture of the folder below."""
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(NAMES.index(file.stem) / len(NAMES), 1, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins in Tux Paint's layout: a pitch in place of a sound, a colour in place of a picture."""
    folder = tmp_path_factory.mktemp("stamps") / "animals"
    folder.mkdir()
    for i, name in enumerate(NAMES):
        picture, effect, voice = (folder / file for file in (f"{name}.png", f"{name}.wav", f"{name}_desc.wav"))
        picture.with_suffix(".txt").write_text(f"A{'n' * (name[0] in 'aeiou')} {name}.\nfr.utf8=Un animal.\n")
        Image.new("RGBA", (60, 30), colour(picture)).save(picture)
        wavfile.write(effect, 16_000, tone(frequency(effect), 0.3 + 0.1 * i))
        if i % 2:
            wavfile.write(voice, 16_000, tone(frequency(voice), 0.45 + 0.01 * i))
    return folder.parent


@pytest.fixture(scope="module")
def stamps(folder: Path) -> list[Stamp]:
    """All of them, as if none were kept from training."""
    stamps = read_stamps(folder)
    assert [stamp.name for stamp in stamps] == list(NAMES)
    return [stamp for stamp in stamps if not stamp.unseen]


@pytest.fixture(scope="module")
def data_set(stamps: list[Stamp], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips, of two splits."""
    path = tmp_path_factory.mktemp("timeline")
    write_data_set(path, stamps, {"train": 2, "test": 1}, OPTIONS)
    return path


def clips(stamps: list[Stamp]):
    """Plans the clips of the data set."""
    return [plan(split, i, stamps, OPTIONS.seconds) for split, i in (("train", 0), ("train", 1), ("test", 0))]


def loud_at(samples: np.ndarray, pitch: float) -> np.ndarray:
    """Gives the seconds, 10 ms apart, at which a pitch is heard in the 20 ms around."""
    carried = samples * np.exp(-2j * np.pi * pitch * np.arange(len(samples)) / 16_000)
    strength = np.abs(np.convolve(carried, np.hanning(320) / 160, "same"))[::160]
    return np.flatnonzero(strength > 0.02) / 100  # the softest recording has an amplitude of 0.05, noise 0.005


def test_sounds_are_where_the_annotations_say(stamps: list[Stamp], data_set: Path) -> None:
    for clip in clips(stamps):
        samples = read_audio(data_set / "videos" / f"{clip.id}.mp4")
        assert len(samples) / 16_000 == pytest.approx(clip.duration, abs=0.1)
        heard = {event.heard for event in clip.events if event.heard}
        assert len(heard) >= 3
        for thing in heard:
            loud = loud_at(samples, frequency(thing.file))
            for event in (event for event in clip.events if event.heard == thing):
                inside = loud[(event.start - 0.5 < loud) & (loud < event.end + 0.5)]
                assert inside[[0, -1]] == pytest.approx([event.start, event.end], abs=0.05)
                assert np.diff(inside).max() < 0.4, "a longer pause could be taken for a gap between two events"
                loud = np.setdiff1d(loud, inside)
            assert not loud.size, f"{thing.phrase} of {clip.id} is heard at {loud}, too"
        for absent in {p for s in stamps for p in (*s.effects, *s.voices)} - {thing.file for thing in heard}:
            assert not loud_at(samples, frequency(absent)).size


def test_pictures_are_where_the_annotations_say(stamps: list[Stamp], data_set: Path) -> None:
    for clip in clips(stamps):
        video = read_video(data_set / "videos" / f"{clip.id}.mp4", 1_000)
        seconds = video.seconds[: clip.duration * OPTIONS.fps]  # an odd number has the last frame twice
        assert video.duration == pytest.approx(clip.duration)
        assert seconds.diff().numpy() == pytest.approx(1 / OPTIONS.fps)
        assert video.frames.shape[1:] == (3, OPTIONS.size, OPTIONS.size)
        shown = 0
        for frame, second in zip(video.frames.numpy(), seconds.tolist(), strict=False):
            expected = {event.seen for event in clip.events if event.seen and event.start <= second < event.end}
            seen = set()
            for stamp in stamps:
                off = np.abs(frame.astype(int) - np.array(colour(stamp.pictures[0]))[:, None, None]).max(axis=0)
                if (off < 45).mean() > 0.05:  # a picture takes 12 % of the frame or more
                    seen.add(stamp.pictures[0])
            assert seen == {thing.file for thing in expected}, f"{clip.id} at {second} s"
            shown += bool(seen)
        assert 0.2 < shown / len(seconds) < 0.9


@pytest.mark.parametrize("seconds", [24, 30, 95, 300])
def test_every_question_has_one_answer(stamps: list[Stamp], seconds: int) -> None:
    numbers = set()
    for index in range(60):
        clip = plan("train", index, stamps, (seconds, seconds))
        heard = Counter(event.heard for event in clip.events if event.heard)
        seen = Counter(event.seen for event in clip.events if event.seen)
        assert len({event.sentence for event in clip.events}) == len(clip.events)
        assert {event.needs for event in clip.events} == {"audio", "video", "both"}
        assert not set(clip.absent) & {*heard, *seen}
        for event in clip.events:
            if event.needs == "both":  # neither the sound nor the picture alone tells which one it is
                assert heard[event.heard] >= 2
                assert seen[event.seen] >= 2
                numbers |= {heard[event.heard], seen[event.seen]}
            else:
                assert (heard[event.heard] if event.needs == "audio" else seen[event.seen]) == 1
        ends = [0.0, *(event.end for event in clip.events)]
        for before, event in zip(ends, clip.events, strict=False):
            assert event.start - before > max(0.99, 0.0099 * seconds)  # rounded to milliseconds
            first, last = (int(format_time(time, seconds)) for time in (event.start, event.end))
            assert first < last, "LongVALE's scorer fails at an interval without a length"
        assert ends[-1] < seconds
    assert numbers == ({2} if seconds < 40 else {2, 3})


def test_the_answers_are_right(stamps: list[Stamp]) -> None:
    tasks: Counter[str] = Counter()
    answers = set()
    for index in range(40):
        clip = plan("train", index, stamps, (30, 200))
        entry = dialogue(clip)
        turns = [turn["value"] for turn in entry["conversations"]]
        assert [turn["from"] for turn in entry["conversations"]] == ["human", "gpt"] * len(entry["questions"])
        assert "".join(turns).count("<video>") == turns[0].count("<video>") == 1
        for kind, question, answer in zip(entry["questions"], turns[::2], turns[1::2], strict=True):
            tasks[kind["task"]] += 1
            if kind["task"] == "counting":
                things = [(e.heard, e.seen) for e in clip.events]
                if kind["needs"] == "both":
                    assert int(answer) == sum(None not in pair for pair in things)
                else:
                    phrase = re.search("does (.*) occur", question)[1]
                    side = kind["needs"] == "video"
                    assert int(answer) == sum(bool(pair[side]) and pair[side].phrase == phrase for pair in things)
                    answers.add(answer)
                continue
            number = int(re.search(r"<s(\d+)>", question + answer)[1])
            event = clip.events[number]
            assert kind["needs"] == event.needs
            assert [entry["meta"]["token"][f"<{side}{number}>"] for side in "se"] == [event.start, event.end]
            asked, told = event.sentence.lower()[:-1], f"From <s{number}> to <e{number}>."
            if kind["task"] == "grounding":
                assert f"can we find {asked} taking place" in question
                assert answer == told
            else:
                assert f"from <s{number}> to <e{number}> in the video" in question
                assert answer == event.sentence
    assert answers >= {"0", "1", "2"}
    assert tasks["counting"] == 3 * 40
    assert 0.7 < tasks["grounding"] / tasks["seg_captioning"] < 1.4


def test_longvale_reads_it(stamps: list[Stamp], data_set: Path) -> None:
    videos = data_set / "videos"
    for time_format, number in (("percent", r"\d\d"), ("decimal", r"\d+\.\d%")):
        singles = load_dialogues(data_set / "train.json", video_dir=videos, turns="single", time_format=time_format)
        kinds = question_kinds(data_set / "train.json")
        assert [record.id for record in singles] == list(kinds)
        for record in singles:
            if kinds[record.id].task == "grounding":
                assert re.fullmatch(f"From {number} to {number}.", record.reference)
            assert record.audio == record.video == videos / f"{record.id.partition('#')[0]}.mp4"
    dialogues = load_dialogues(data_set / "test.json", video_dir=videos)
    assert [record.duration for record in dialogues] == [clips(stamps)[2].duration]

    queries = load_queries(data_set / "test-annotations.json", ["grounding", "seg_captioning"], video_dir=videos)
    kinds = question_kinds(data_set / "test-annotations.json")
    assert {query.record.id: query.task for query in queries} == {name: kind.task for name, kind in kinds.items()}
    events = clips(stamps)[2].events
    for query in queries:
        event = events[query.sentence_id]
        assert kinds[query.record.id].needs == event.needs
        assert (query.spans, query.sentences) == (((event.start, event.end),), (event.sentence,))


def test_kinds_of_other_files(tmp_path: Path) -> None:
    path = tmp_path / "longvale.json"
    path.write_text(json.dumps({"v": {"duration": 9, "timestamps": [[1, 2]], "sentences": ["It rains."]}}))
    with pytest.raises(ValueError, match=r"longvale.json has no entry 'needs'"):
        question_kinds(path)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])  # a process starts for 10 s
def test_the_same_seed_gives_the_same_bytes(stamps: list[Stamp], data_set: Path, tmp_path: Path, workers: int) -> None:
    write_data_set(tmp_path, stamps[::-1], {"train": 2, "test": 1}, OPTIONS, workers)
    files = sorted(path.relative_to(data_set) for path in data_set.rglob("*.*"))
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    assert len(files) == 8  # 3 clips, 2 splits with 2 files, the options
    for file in files:
        assert (data_set / file).read_bytes() == (tmp_path / file).read_bytes(), file
    other = plan("train", 0, stamps, OPTIONS.seconds, seed=1)
    assert annotation(other) != annotation(clips(stamps)[0]) != annotation(clips(stamps)[2])


def test_it_goes_on_where_it_stopped(
    stamps: list[Stamp], data_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data_set(tmp_path, stamps, {"train": 1}, OPTIONS)
    first = tmp_path / "videos" / "train-00000.mp4"
    made = first.stat().st_mtime_ns
    write_data_set(tmp_path, stamps, {"train": 2}, OPTIONS)
    assert first.stat().st_mtime_ns == made
    for file in ("train.json", "videos/train-00001.mp4"):
        assert (tmp_path / file).read_bytes() == (data_set / file).read_bytes()
    with pytest.raises(ValueError, match=r"was made with fps 5, not 2; choose another folder"):
        write_data_set(tmp_path, stamps, {"train": 2}, dataclasses.replace(OPTIONS, fps=2))
    monkeypatch.setattr(script, "VERSION", 2)
    with pytest.raises(ValueError, match=r"was made with version 1, not 2"):
        write_data_set(tmp_path, stamps, {"train": 2}, OPTIONS)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"was made with stamps \w+, not"):
        write_data_set(tmp_path, stamps[:-1], {"train": 2}, OPTIONS)


def test_an_interrupted_clip_leaves_no_file(
    stamps: list[Stamp], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        render(clips(stamps)[0], tmp_path / "clip.mp4", size=32)
    assert not list(tmp_path.iterdir())


def test_unseen_things_are_in_no_other_split(folder: Path) -> None:
    stamps = [dataclasses.replace(s, name=f"{s.name} {kind}") for s in read_stamps(folder) for kind in "abcdefghijkl"]
    used = {split: set() for split in SPLITS}
    for split in SPLITS:
        for index in range(40):
            clip = plan(split, index, stamps, (60, 60))
            used[split] |= {t.phrase for event in clip.events for t in (event.heard, event.seen) if t}
    assert used["unseen"]
    assert not used["unseen"] & (used["train"] | used["validation"] | used["test"])
    assert used["train"] & used["test"]


def test_what_a_stamp_is(folder: Path, tmp_path: Path) -> None:
    animals = folder / "animals"
    things = {
        "goat": "A goat.",
        "ram": "A ram.",
        "goat2": "A goat.",
        "mute": "A fish.",
        "a": "The letter a.",
        "x": "A x.",
    }
    for name, text in things.items():
        (tmp_path / f"{name}.txt").write_text(text)
        (tmp_path / f"{name}.png").write_bytes((animals / "ant.png").read_bytes())
    (tmp_path / "x.png").unlink()
    for name, sound in {"goat": "cat", "ram": "cat", "goat2": "cow", "a": "dog", "x": "eel", "ram_desc": "bat"}.items():
        (tmp_path / f"{name}.wav").write_bytes((animals / f"{sound}.wav").read_bytes())
    wavfile.write(tmp_path / "mute.wav", 16_000, np.zeros(9_000, np.int16))
    goat, ram = read_stamps(tmp_path)
    assert (goat.name, goat.article, [p.name for p in goat.pictures]) == ("goat", "a", ["goat.png", "goat2.png"])
    assert [p.name for p in goat.effects] == ["goat2.wav"]  # goat.wav is ram's sound, too
    assert (ram.name, ram.effects, [p.name for p in ram.voices]) == ("ram", (), ["ram_desc.wav"])
    assert [(s.name, s.voices) for s in read_stamps(tmp_path, {"ram_desc.wav"})] == [("goat", ())]
    with pytest.raises(MediaError, match="is silent"):
        read_recording(tmp_path / "mute.wav")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no stamp x\.png with its text"):
        read_stamps(tmp_path / "empty")


def test_recordings_and_pictures(folder: Path) -> None:
    samples = read_recording(folder / "animals" / "cat.wav")
    assert len(samples) == pytest.approx(0.5 * 16_000, abs=160)  # the silence at both ends is gone
    assert np.sqrt(np.mean(samples**2)) == pytest.approx(10 ** (-23 / 20), rel=0.01)
    assert read_picture(folder / "animals" / "cat.png", 20).size == (20, 10)


def test_what_cannot_be_made(stamps: list[Stamp], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"seconds must be a range from 24 on, shortest first, got \(20, 30\)"):
        plan("train", 0, stamps, (20, 30))
    with pytest.raises(ValueError, match="split must be one of train, validation, test, unseen, got 'dev'"):
        plan("dev", 0, stamps, (30, 30))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the stamps of unseen have 0 and 0"):
        plan("unseen", 0, stamps, (30, 30))
    with pytest.raises(ValueError, match="size must be even and fps at least 1, got 63 and 4"):
        Options(size=63)
    with pytest.raises(ValueError, match="the stamps of unseen have 0 and 0"):
        write_data_set(tmp_path, stamps, {"unseen": 1}, OPTIONS)
    assert not list(tmp_path.iterdir())


def test_the_command(stamps: list[Stamp], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "packaged_stamps", lambda: stamps)
    sizes = ["--train", "1", "--validation", "0", "--test", "0", "--unseen", "0", "--workers", "1"]
    monkeypatch.setattr(sys, "argv", ["timeline.py", str(tmp_path), *sizes, "--seconds", "24", "24", "--size", "32"])
    assert script.main() is None
    assert read_video(tmp_path / "videos" / "train-00000.mp4", 2).frames.shape == (2, 3, 32, 32)
    assert {path.name for path in tmp_path.glob("*.json")} == {"options.json", "train.json", "train-annotations.json"}
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--seed", "7"])
    assert script.main() == f"error: {tmp_path} was made with seed 0, not 7; choose another folder"


def test_the_package(tmp_path: Path) -> None:
    try:
        stamps = packaged_stamps(download=False)
    except FetchError:
        pytest.skip(
            f"{stamps_module.PACKAGE} is not in the cache; fill it with `python benchmarks/timeline.py runs/timeline`"
        )
    assert len(stamps) == 92
    assert sum(stamp.unseen for stamp in stamps) == 17
    assert (sum(bool(s.effects) for s in stamps), sum(bool(s.voices) for s in stamps)) == (76, 60)
    wombat = next(stamp for stamp in stamps if stamp.name == "wombat")
    assert (wombat.effects, len(wombat.voices)) == ((), 1)  # its effect is silent
    for split in SPLITS:
        assert plan(split, 0, stamps, (300, 300)).duration == 300
    clip = plan("test", 0, stamps, (30, 30))
    render(clip, tmp_path / "clip.mp4", size=112)
    samples = read_audio(tmp_path / "clip.mp4")
    inside = np.zeros(len(samples), bool)
    for event in clip.events:
        if event.heard:
            inside[round(event.start * 16_000) : round(event.end * 16_000)] = True
    loudness = [10 * np.log10(np.mean(samples[part] ** 2)) for part in (inside, ~inside)]
    assert -32 < loudness[0] < -20
    assert loudness[1] < loudness[0] - 10
    assert np.abs(samples).max() < 1


@pytest.mark.parametrize(("sizes", "workers"), [({"train": -1}, 1), ({"train": 1}, 0)])
def test_numbers_that_cannot_be(tmp_path, sizes, workers):
    with pytest.raises(ValueError, match="clips must be 0 or more and workers 1 or more"):
        write_data_set(tmp_path / "set", [], sizes, Options(), workers)
    assert not (tmp_path / "set").exists()
