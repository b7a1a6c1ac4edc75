"""The page of accuracy: what is put into it, and that nothing in a row or a transcript can break out of it."""

import io
import json
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from test_media import pitch, tone
from test_page_rows import WHERE, failed_row, speech_row, time_row, write
from tiny_whisper import STEPS, make_whisper

from audiopress.benchmarks import page_clips
from audiopress.benchmarks.page import sound as page_sound
from audiopress.benchmarks.page.rows import page_points
from audiopress.benchmarks.page.sound import CLIPS, compare, heard_clips, mp3, picture
from audiopress.benchmarks.page.writing import render, write_page
from audiopress.benchmarks.report import PAGES
from audiopress.benchmarks.words.clips import Clip
from audiopress.data.records import Record, assistant, user
from audiopress.models import whisper

ROOT = Path(__file__).parents[1]
EVIL = "</script><script>alert(1)</script><b>bold</b>"
NEEDS_CHARTS = "charts need Altair: pip install -e '.[bench]'"


def sound(language, prompts):
    """Three seconds of a tone, in place of recordings."""
    return tone(3.0, 16_000)[0]


def clip_row(method="ward", keep_ratio=0.2, heard="one three four indeed", **more):
    """A row of `page_clips.py`: one clip of 75 tokens; every fifth is left, and stands for five."""
    clip = {
        "language": "en",
        "prompts": ["en/one"],
        "seconds": 3.0,
        "tokens": [75, 15],
        "slots": list(range(2, 75, 5)),
        "sizes": [5.0] * 15,
        "said": "one two three four",
        "heard": heard,
        "wer": 0.5,
        "ended": True,
    }
    settings = {"testbed": CLIPS, "model": "whisper-base", "method": method, "keep_ratio": keep_ratio, "status": "ok"}
    return WHERE | settings | {"transcripts": [clip | more]}


def everything(folder):
    """Rows of every kind."""
    speech = [
        speech_row("none", None, 0.015),
        *(speech_row(m, r, w / r) for m, w in (("ward", 0.01), ("pooling", 0.1)) for r in (0.125, 0.25, 0.5)),
        *(speech_row("conv", 0.25, w, seed=i, steps=9, trained=True) for i, w in enumerate((0.07, 0.08))),
        failed_row(message=f"broke {EVIL}"),
    ]
    clips = [clip_row("none", None, "one two three four"), clip_row(), clip_row(keep_ratio=0.125, heard=f"one {EVIL}")]
    return write(folder, speech=speech, events=[time_row(), time_row("ward", 0.25)], clips=clips)


class Elements(HTMLParser):
    """Collects the scripts of a page, and whatever would be fetched."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.fetched, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")
        self.fetched += [value for name, value in attrs if name in ("src", "href") and not value.startswith("data:")]

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data

    def handle_endtag(self, tag):
        self.inside = False


def test_nothing_in_the_data_ends_its_element(tmp_path):
    data = page_points(everything(tmp_path))
    data |= {"made": "now", "charts": {}, "clips": [{"said": EVIL}]}
    found = Elements(render(data, library="1;"))
    assert len(found.scripts) == 3  # data, library, and the page's own
    assert json.loads(found.scripts[0]) == data
    assert found.fetched == []


def test_texts_are_compared_in_runs():
    assert compare("a b c d", "a x c d e") == [
        ["equal", "a", "a"],
        ["substitute", "b", "x"],
        ["equal", "c d", "c d"],
        ["insert", "", "e"],
    ]
    assert compare("a b", "b") == [["delete", "a", ""], ["equal", "b", "b"]]
    assert compare("a b", "") == [["delete", "a b", ""]]


def test_the_sound_survives_the_mp3():
    with av.open(io.BytesIO(mp3(tone(2.0, 16_000, hertz=440)[0]))) as file:
        samples = np.concatenate([frame.to_ndarray()[0] for frame in file.decode(audio=0)])
        rate = file.streams.audio[0].rate
    assert len(samples) / rate == pytest.approx(2.0, abs=0.1)
    assert pitch(samples[rate // 2 : rate], rate) == pytest.approx(440, rel=0.02)


def test_the_spectrogram_is_as_long_as_the_clip_and_shows_the_pitch():
    image, begin, end = picture(tone(2.0, 16_000, hertz=4000)[0])
    assert (begin, end) == pytest.approx((0, 2), abs=0.1)
    shades = np.asarray(Image.open(io.BytesIO(image)).convert("L"), float)
    loudest = shades[:, shades.shape[1] // 2].argmax()  # from above
    assert 0.15 < loudest / len(shades) < 0.35  # 4 kHz is three quarters of 8 kHz in mel


def test_clips_hold_what_each_method_heard():
    rows = [clip_row(heard="old"), clip_row("none", None, "one two three four"), clip_row(), clip_row(keep_ratio=0.5)]
    (clip,) = heard_clips(rows, sound)
    assert [(each["method"], each["rate"]) for each in clip["heard"]] == [("ward", 5), ("none", None), ("ward", 12.5)]
    first = clip["heard"][0]
    assert first["runs"] == [
        ["equal", "one", "one"],
        ["delete", "two", ""],
        ["equal", "three four", "three four"],
        ["insert", "", "indeed"],
    ]
    assert first["spans"][:2] == [[0, 0.2], [0.2, 0.4]]
    assert (first["kind"], first["tokens_per_second"]) == ("merged", 5)
    assert clip["source"] == "asterisk-core-sounds-en-g722, en_US_f_Allison: CC-BY-SA-3.0"
    kept = heard_clips([clip_row(sizes=[1.0] * 15)], sound)[0]["heard"][0]
    assert (kept["kind"], kept["spans"][0]) == ("kept", [0.08, 0.12])


def test_a_method_that_failed_on_the_clips_is_logged(caplog):
    row = WHERE | {"testbed": CLIPS, "method": "ward", "keep_ratio": 0.2, "status": "failed", "message": "it broke"}
    assert heard_clips([row], sound) == []
    assert "ward: it broke" in caplog.text


def test_recordings_of_another_split_are_named(monkeypatch):
    monkeypatch.setattr(page_sound, "speech_records", lambda split, languages: [])
    with pytest.raises(ValueError, match=r"no prompt 'en/gone' in the test split.*page_clips\.py"):
        page_sound.recorded("en", ["en/gone"])


def test_clips_are_heard_under_every_method(monkeypatch):
    def prompt(name):
        return Record(name, (user("?"), assistant("Hello, there.")), audio=Path(f"{name}.wav"), duration=0.9)

    monkeypatch.setattr(whisper, "MAX_NEW_TOKENS", STEPS)
    monkeypatch.setattr(Clip, "sound", lambda self: tone(0.9, 16_000)[0])
    clips = [Clip("en", (prompt("a"),)), Clip("fr", (prompt("b"),)), Clip("en", (prompt("c"),))]
    listener = page_clips.Listener(make_whisper(), clips)
    found = listener({"method": "ward", "keep_ratio": 0.5})["transcripts"]
    assert [(each["language"], each["prompts"]) for each in found] == [("en", ["a"]), ("en", ["c"]), ("fr", ["b"])]
    for each in found:
        before, after = each["tokens"]
        assert after == len(each["slots"]) == len(each["sizes"]) == pytest.approx(before / 2, abs=1)
        assert sum(each["sizes"]) == pytest.approx(before, abs=0.1)
        assert each["said"] == "hello there"
        assert each["wer"] >= 0
    assert listener({"method": "none", "keep_ratio": None})["transcripts"][0]["slots"] == list(range(before))


def test_setup_names_the_files_of_the_page():
    text = (ROOT / "setup.py").read_text()
    for file in ("page.html", "page.css", "page.js"):
        assert (ROOT / "benchmarks/page" / file).is_file()
        assert f'"{file}"' in text


@pytest.fixture
def report(monkeypatch, capsys):
    """Runs report.py; gives its status and what it printed."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, args)])
        try:
            runpy.run_path(str(ROOT / "benchmarks" / "report.py"), run_name="__main__")
        except SystemExit as stop:
            return stop.code, capsys.readouterr()
        return 0, capsys.readouterr()

    return call


def test_the_command_writes_one_file(tmp_path, report):
    pytest.importorskip("altair", reason=NEEDS_CHARTS)
    rows = write(tmp_path / "rows", speech=[speech_row()])
    status, printed = report("--html", tmp_path / "new" / "page.html", "--results", rows)
    assert status == 0
    assert printed.out.strip() == str(tmp_path / "new" / "page.html")
    found = Elements((tmp_path / "new" / "page.html").read_text())
    assert found.fetched == []
    assert len(json.loads(found.scripts[0])["points"]) == 1


def test_wrong_commands_are_answered(tmp_path, report):
    pytest.importorskip("altair", reason=NEEDS_CHARTS)
    status, printed = report("--html", tmp_path / "x.html", "--results", write(tmp_path / "none"))
    assert status == 2
    assert "no rows of accuracy" in printed.err
    status, printed = report()
    assert status == 2
    assert "--html" in printed.err


def test_charts_compile_and_hold_no_data(tmp_path):
    pytest.importorskip("altair", reason=NEEDS_CHARTS)
    compiler = pytest.importorskip("vl_convert", reason=NEEDS_CHARTS)
    page = write_page(everything(tmp_path / "rows"), tmp_path / "page.html", sound)
    charts = json.loads(Elements(page.read_text()).scripts[0])["charts"]
    assert set(charts) == {"speech", "time", CLIPS}
    for spec in (*charts["speech"].values(), *charts["time"].values(), charts[CLIPS]):
        assert "datasets" not in spec
        assert compiler.vegalite_to_vega(spec)["marks"]


def test_the_pages_of_the_repository_have_the_marks_of_their_reports():
    for mark, file in PAGES.items():
        text = (ROOT / file).read_text()
        assert text.count(f"<!-- {mark} -->\n") == text.count(f"<!-- /{mark} -->") == 1
