"""Where prompts can be cut: against brute force, on a random Whisper, and what Whisper-base hears of the pieces."""

import itertools
import random

import numpy as np
import pytest
from tiny_whisper import make_whisper, records, sounds

from audiopress.benchmarks.alignment import pieces
from audiopress.benchmarks.alignment.batch import RATE
from audiopress.benchmarks.alignment.pieces import cut, cuts, quietest, stretches
from audiopress.benchmarks.alignment.speech import Prompt
from audiopress.benchmarks.metrics import wer
from audiopress.data.media import read_audio
from audiopress.data.speech import speech_records
from audiopress.models.whisper import load_whisper


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 5), (3, 3), (4, 9)])
def test_stretches_are_the_best_of_all(rows, columns):
    weights = np.random.default_rng(rows).standard_normal((rows, columns))

    def total(starts):
        row = np.searchsorted(starts, np.arange(columns), side="right") - 1
        return weights[row, np.arange(columns)].sum()

    every = [np.array([0, *rest]) for rest in itertools.combinations(range(1, columns), rows - 1)]
    assert stretches(weights).tolist() == max(every, key=total).tolist()


def test_a_cut_is_at_the_quietest_place_near():
    wave = np.ones(RATE, np.float32)
    wave[round(0.53 * RATE) : round(0.55 * RATE)] = 0
    wave[round(0.8 * RATE) :] = 0
    second, power = quietest(wave, 0.5)
    assert 0.53 <= second <= 0.55
    assert power == 0
    second, power = quietest(wave, 0.25)
    assert 0.17 <= second <= 0.33
    assert power == 1


@pytest.mark.parametrize("quiet", [0, 2.0, 1e9])
def test_pieces_are_all_of_the_words(monkeypatch, quiet):
    monkeypatch.setattr(pieces, "QUIET", quiet)
    whisper = make_whisper()
    whisper.model.set_attn_implementation("eager")
    whisper.model.generation_config.alignment_heads = [[0, 1], [1, 0]]
    (wave,) = sounds([RATE])
    found = cut(whisper, wave, "word1  word2 word3 word2")
    texts, ends = zip(*found, strict=True)
    assert " ".join(texts) == "word1 word2 word3 word2"
    assert list(ends) == sorted(set(ends))
    assert ends[-1] == 1.0
    assert len(found) == 1 if quiet == 0 else len(found) > 1


def test_pieces_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "load_whisper", lambda name: make_whisper())
    calls = []
    monkeypatch.setattr(pieces, "cut", lambda *args: calls.append(args) or [("say a", 0.5), ("twenty", 1.0)])
    made = records(tmp_path, [1.0, 0.5])
    for _ in range(2):
        found = cuts(made, tmp_path / "pieces.json")
        assert found == {record.id: [("say a", 0.5), ("twenty", 1.0)] for record in made}
    assert len(calls) == 2


@pytest.mark.slow
def test_whisper_hears_pieces_of_recorded_prompts(tmp_path):
    """Three to a clip, less clean than whole prompts, of which it gets 4 % wrong: cut anywhere, it was over 30 %."""
    prompts, rng = speech_records("train"), random.Random(0)
    known = cuts(prompts, tmp_path / "pieces.json")
    cuttable = [Prompt(known[r.id], read_audio(r.audio)) for r in prompts if len(known.get(r.id, ())) > 2]
    drawn = [[rng.choice(cuttable).draw(rng) for _ in range(3)] for _ in range(40)]
    texts = [" ".join(text for text, _ in row) for row in drawn]
    whisper = load_whisper()
    heard = whisper.hear_as_it_comes(*whisper.features([np.concatenate([wave for _, wave in row]) for row in drawn]))
    rate = wer(texts, [said.text for said in whisper.transcribe(heard, "en")])
    print(f"{rate.rate:.1%} of {rate.units} words")
    assert rate.rate < 0.25
