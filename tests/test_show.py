"""The picture of one clip under many methods, as its users draw it."""

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_media import tone, write_audio
from tiny import tiny_processor, tiny_thinker, write_checkpoint

import audiopress
from audiopress.benchmarks.show import METHODS

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "show.py"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder, tiny_thinker(tiny_processor()))
    return folder


@pytest.fixture
def show(monkeypatch, capsys, base, tmp_path):
    """Runs the script inside this process; gives its exit status and what it printed."""
    write_audio(tmp_path / "tone.wav", tone(3.0, 16_000, hertz=300), 16_000)

    def call(*args):
        fixed = ("--model", base, "--audio", tmp_path / "tone.wav", "--output", tmp_path / "out.png")
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, fixed), *map(str, args)])
        status = None
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            status = stop.code
        return status, capsys.readouterr().out

    return call


def test_a_picture_of_several_methods(show, tmp_path):
    names = ["ward", "atome", "speechprune", "omnizip", "stacking:slam-asr"]
    status, out = show("--methods", *names, "--keep-ratio", 0.2)
    assert not status
    kept = {line.split()[0]: int(line.split()[1]) for line in out.splitlines() if line.endswith(" tokens")}
    assert kept == dict.fromkeys(names[:4], 15) | {"stacking:slam-asr": 30}  # of 75; its weights are of one ratio
    assert Image.open(tmp_path / "out.png").width > 800


def test_wrong_arguments(show):
    assert "unknown method 'wardd'" in show("--methods", "wardd")[0]
    assert "keep_ratio" in show("--methods", "ward", "--keep-ratio", 7)[0]


def test_the_default_methods_can_be_built():
    for name in METHODS:
        assert audiopress.build(name, hidden_size=32, encoder_size=24).config.keep_ratio <= 0.5
