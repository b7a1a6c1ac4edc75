"""Aligning omni-small: batches are what the ordinary path reads, changes are stored small, training learns."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import platform
import random
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.io import wavfile
from test_timeline import folder, stamps  # noqa: F401  (fixtures)
from tiny import tiny_processor, tiny_thinker

from audiopress.benchmarks import align
from audiopress.benchmarks.alignment import clips as clips_module
from audiopress.benchmarks.alignment import makers
from audiopress.benchmarks.alignment import speech as speech_module
from audiopress.benchmarks.alignment.batch import RATE, log_mel, patches
from audiopress.benchmarks.alignment.card import publish
from audiopress.benchmarks.alignment.clips import ClipBank, ClipMaker, names
from audiopress.benchmarks.alignment.makers import Makers
from audiopress.benchmarks.alignment.model import Aligner, Changes, Steps, garbled, name_vectors
from audiopress.benchmarks.alignment.speech import Prompt, SpeechBank, Texts, draw_pieces
from audiopress.benchmarks.dense_captions import read_official
from audiopress.benchmarks.timeline import Options
from audiopress.data.collator import PATCH_PIXELS, Encoder, OmniCollator
from audiopress.data.media import read_audio
from audiopress.data.rendering import render
from audiopress.data.speech import folder_records, split_of
from audiopress.data.timeline import plan
from audiopress.models import CompressedOmni, delta
from audiopress.models.fast import compile_layers
from audiopress.models.layout import TokenIds
from audiopress.models.packages import digest
from audiopress.models.packed import use_packed_attention
from audiopress.models.rewrite import IGNORE

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture
def thinker(processor):
    thinker = tiny_thinker(processor)
    use_packed_attention(thinker)
    return thinker


@pytest.fixture(scope="module")
def encoder(processor):
    return Encoder(processor, num_frames=24)


@pytest.fixture
def maker(encoder, stamps):  # noqa: F811
    return ClipMaker(replace(encoder, timestamps=8), stamps, seed=3)


@pytest.fixture
def prompts(tmp_path):
    """Four spoken prompts: tones."""
    for i, text in enumerate(("Yes", "No, yes", "user", "When")):
        wave = 8_000 * np.sin(np.arange(RATE * (3 + i) // 4) * (0.1 + 0.02 * i))
        wavfile.write(tmp_path / f"{i}.wav", RATE, wave.astype(np.int16))
        (tmp_path / f"{i}.txt").write_text(text)
    return folder_records(tmp_path)


def even_cuts(records, file=None):
    """A piece for every word, all of a prompt equally long."""
    found = {}
    for record in records:
        words, seconds = record.reference.split(), len(read_audio(record.audio)) / RATE
        found[record.id] = [(word, seconds * (i + 1) / len(words)) for i, word in enumerate(words)]
    return found


@pytest.fixture
def speech(encoder, prompts):
    bank = SpeechBank(encoder, 0.2, CPU)
    bank.add_recorded(prompts, random.Random(0), even_cuts(prompts))
    return bank


@pytest.fixture
def clips(maker, thinker, processor):
    bank = ClipBank(TokenIds.from_config(thinker.config), processor.tokenizer.pad_token_id, CPU)
    for index in range(2):
        bank.add(maker(index, 24))
    return bank


@pytest.fixture
def aligner(thinker, processor, stamps):  # noqa: F811
    vectors = name_vectors(names(stamps), processor.tokenizer, thinker.get_input_embeddings().weight)
    return Aligner(thinker, processor.feature_extractor, vectors)


def test_sounds_and_frames_become_what_the_encoder_reads(encoder, maker, stamps, tmp_path):  # noqa: F811
    clip = plan("train", 0, stamps, (24, 24), seed=3)
    made = maker(0, 24)
    render(clip, tmp_path / "clip.mp4", size=clips_module.SIZE, fps=clips_module.FPS)
    record = replace(clips_module._record(clip), audio=tmp_path / "clip.mp4", video=tmp_path / "clip.mp4")
    sample = maker.encoder(record)
    assert made.ids[1] == sample["input_ids"].tolist()  # before it comes the list of events
    assert made.labels[1] == sample["labels"].tolist()
    assert torch.equal(torch.from_numpy(made.times[::2]).float(), sample["video_seconds"])
    wave = made.wave[None].float() / 2**15
    mel = log_mel(wave, encoder.processor.feature_extractor)[0]
    assert mel.shape == sample["input_features"].shape
    assert (mel - sample["input_features"]).abs().mean() < 0.05  # what the codec loses
    frames = made.pictures[made.shown][None]
    pixels, grid = patches(frames)
    assert torch.equal(grid, sample["video_grid_thw"])
    assert (pixels - sample["pixel_values_videos"]).abs().mean() < 0.05
    size = {"shortest_edge": 64 * PATCH_PIXELS, "longest_edge": 128 * PATCH_PIXELS}
    exact = encoder.processor.video_processor(
        videos=[frames[0]], do_sample_frames=False, size=size, return_tensors="pt"
    )
    torch.testing.assert_close(pixels, exact["pixel_values_videos"], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_loss_of_speech_is_that_of_the_ordinary_path(
    aligner, thinker, speech, encoder, prompts, monkeypatch, tmp_path
):
    for name, value in (("SPEED", (1, 1)), ("LEAD", (0, 0)), ("TAIL", (0, 0)), ("NOISY", 0)):
        monkeypatch.setattr(speech_module, name, value)
    batch = speech.batch(random.Random(0), 400)
    assert len(batch.ids) > 1
    records = []
    for i, (row, labels, wave) in enumerate(zip(batch.ids, batch.labels, batch.waves, strict=True)):
        wavfile.write(tmp_path / f"{i}.wav", RATE, wave.numpy())
        answer = encoder.processor.tokenizer.decode(row[labels != IGNORE][:-1])
        records.append(
            replace(
                prompts[0],
                messages=(prompts[0].messages[0], {"role": "assistant", "content": answer}),
                audio=tmp_path / f"{i}.wav",
            )
        )
    inputs = OmniCollator(0)([encoder(record) for record in records])
    inputs = {k: v for k, v in inputs.items() if torch.is_tensor(v)}
    expected = CompressedOmni(thinker)(**inputs).loss
    losses = aligner.eval()(batch, towers_only=False)
    assert set(losses) == {"text", "ctc"}
    torch.testing.assert_close(losses["text"], expected, rtol=1e-3, atol=1e-3)
    assert set(aligner(batch, towers_only=True)) == {"ctc"}


@torch.no_grad()
def test_the_loss_of_clips_is_that_of_the_ordinary_path(aligner, thinker, clips):
    batch = clips.batch(random.Random(0), 10**6)
    assert len(batch.ids) == 2
    pixels, grid = patches(batch.clips.frames)
    mel = log_mel(batch.waves, aligner.extractor)
    seconds = torch.from_numpy(clips.clips[24][0].times[::2]).float()
    mask = torch.ones_like(batch.ids)
    for row, labels in enumerate(batch.labels):  # what was appended to the shorter dialogue
        mask[row, int((labels != IGNORE).nonzero()[-1]) + 2 :] = 0
    expected = CompressedOmni(thinker)(
        batch.ids,
        mask,
        batch.labels,
        input_features=mel,
        feature_attention_mask=torch.ones(2, mel.shape[2], dtype=torch.long),
        pixel_values_videos=pixels,
        video_grid_thw=grid,
        video_second_per_grid=torch.tensor([2.0, 2.0]),
        video_seconds=seconds.repeat(2),
    ).loss
    losses = aligner.eval()(batch, towers_only=False)
    assert set(losses) == {"text", "name", "clock", "heard", "seen"}
    torch.testing.assert_close(losses["text"], expected, rtol=1e-4, atol=1e-4)
    assert set(aligner(batch, towers_only=True)) == {"name"}


def test_transcripts_alone_are_garbled(speech, clips):
    batch = speech.batch(random.Random(0), 2000)
    changed = garbled(batch, 10**6) != batch.ids
    spoken = batch.labels != IGNORE
    assert not changed[~spoken].any()
    assert 0 < changed[spoken].float().mean() < 0.5
    assert garbled(clips.batch(random.Random(0), 10), 10**6).equal(clips.batch(random.Random(0), 10).ids)


def test_clips_know_when_things_are_heard_and_seen(clips, stamps):  # noqa: F811
    batch = clips.batch(random.Random(0), 10**6)
    first, *_ = clips.clips[24]
    assert {mark.row for mark in batch.clips.marks} == {0, 1}
    assert {mark.heard for mark in batch.clips.marks} == {True, False}
    assert all(0 <= m.start < m.end <= (len(batch.audio) if m.heard else 12) for m in batch.clips.marks)
    assert batch.clips.percent[batch.audio[0]] == 0
    assert 99 < batch.clips.percent[batch.audio[-1]] < 101
    for mark in batch.clips.marks:
        places = batch.audio if mark.heard else batch.clips.video.unflatten(0, (12, -1))
        began = batch.clips.began[mark.row, places[mark.start : mark.end]]
        assert (began == batch.clips.percent[places[mark.start]].flatten()[0]).all()
    assert batch.clips.began.isnan().sum() > batch.clips.began.isfinite().sum()
    assert len(first.ids) == 1 + clips_module.DIALOGUES
    assert len({tuple(ids) for ids in first.ids[1:]}) > 1


def test_timestamps_know_what_comes_before_them(clips):
    """Read off the ids, token by token."""
    batch = clips.batch(random.Random(0), 10**6)
    sound, picture = clips.token_ids.audio, clips.token_ids.video
    each = batch.clips.per_group
    for row, ids in enumerate(batch.ids.tolist()):
        own = [mark for mark in batch.clips.marks if mark.row == row]
        heard, seen, ends = -1, -1, []
        for i, token in enumerate(ids[: int(batch.audio.max())]):
            heard, seen = heard + (token == sound), seen + (token == picture)
            if seen >= 0 and token not in (sound, picture) and ids[i + 1] in (sound, picture):
                for at, place, is_heard in ((heard, 0, True), (seen // each, 1, False)):
                    want = next((m.name + 1 for m in own if m.heard == is_heard and m.start <= at < m.end), 0)
                    assert batch.clips.now[row, len(ends), place] == want
                ends.append(i)
        assert batch.clips.stamps.tolist() == ends
    assert len(ends) == 7  # between 8 parts
    assert (batch.clips.now > 0).any(dim=(0, 1)).all()


def test_clips_are_also_listed(maker, clips, encoder, monkeypatch):
    first, clip = clips.clips[24][0], plan("train", 0, maker.stamps, (24, 24), seed=3)
    labels = torch.tensor(first.labels[0])
    text = encoder.processor.tokenizer.decode(labels[labels != IGNORE], skip_special_tokens=True)
    assert [event.text for event in read_official(text, clip.duration)] == [e.sentence for e in clip.events]
    lists = [made.ids[0] for made in clips.clips[24]]
    for share in (0, 1):
        monkeypatch.setattr(clips_module, "LISTED", share)
        for ids in clips.batch(random.Random(0), 10**6).ids.tolist():
            assert any(ids[: len(one)] == one for one in lists) == share


def test_makers_of_clips_can_be_sent_to_processes(maker):
    sent = pickle.loads(pickle.dumps(maker))(5, 24)
    assert sent.ids == maker(5, 24).ids


def test_changes_have_the_gradients_of_what_they_are(thinker, aligner, speech):
    changes = Changes(thinker, rank=3)
    for group in changes.low_rank:
        group.up.data.normal_(std=0.05)
    batch = speech.batch(random.Random(0), 300)
    changes.write()
    sum(aligner.eval()(batch, False).values()).backward()
    changes.collect()
    group = next(g for g in changes.low_rank if "llm" in g.names[0] and "q_proj" in g.names[0])
    with torch.no_grad():
        step = 1e-2 * group.up.grad / group.up.grad.norm()
        losses = []
        for sign in (1, -1):
            group.up.add_(sign * step)
            changes.write()
            torch.manual_seed(0)
            losses.append(float(sum(aligner(batch, False).values())))
            group.up.sub_(sign * step)
    slope = (losses[0] - losses[1]) / 2e-2
    assert slope == pytest.approx(float(group.up.grad.norm()), rel=0.2)
    assert all(p.grad is None for p in thinker.parameters())


def test_training_learns_both(thinker, aligner, speech, clips):
    changes = Changes(thinker, rank=4)
    steps = Steps(aligner.train(), changes)
    rng = random.Random(0)
    first: dict[str, float] = {}
    for i in range(18):
        for batch in (speech.batch(rng, 500), clips.batch(rng, 2_000)):
            losses = steps(batch, 3.0, towers_only=i < 3)
            for name, loss in losses.items():
                key = name + ("" if batch.clips is None else "_clips")
                first.setdefault(key, float(loss))
                first[f"last {key}"] = float(loss)
    assert set(first) >= {"ctc", "text", "text_clips", "name_clips", "clock_clips"}
    for key in ("ctc", "text", "text_clips", "clock_clips", "heard_clips", "seen_clips"):
        assert first[f"last {key}"] < first[key], key


def test_changes_are_stored_small(thinker, processor, tmp_path):
    changes = Changes(thinker, rank=3)
    with torch.no_grad():
        for tensor in changes.tensors().values():
            tensor.add_(torch.randn_like(tensor) * 0.05)
    changes.write()
    delta.write(tmp_path / "x.safetensors", changes.tensors(), {"steps": "7"})
    tensors, about = delta.read(tmp_path / "x.safetensors")
    assert about == {"steps": "7"}
    other = tiny_thinker(processor)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    delta.apply(other, tensors)
    changed = {k for k, v in other.state_dict().items() if not torch.equal(v, before[k])}
    assert not any("embed_tokens" in k or ".conv" in k for k in changed)
    for name, expected in thinker.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], expected, rtol=0, atol=6e-3, msg=name)
    again = Changes(tiny_thinker(processor), rank=3)
    again.load(tensors)
    assert all(torch.equal(v, tensors[k]) for k, v in again.tensors().items())
    tensors.pop(next(iter(tensors)))
    with pytest.raises(ValueError, match="the changes are of another model: missing"):
        delta.apply(other, tensors)


def test_texts_are_of_every_kind_and_of_the_train_split():
    texts = Texts(["Press the pound key."], ["A set of two."], {"person": 1, "cut": 2, "twelfth": 1})
    rng = random.Random(0)
    drawn = [texts.draw(rng) for _ in range(12_000)]
    wanted = ["Press the pound key.", "the pound", "A set of two.", "person", "B", "twentieth", "zulu", "one hundred"]
    for text in (*wanted, "twenty one"):
        assert any(text in one for one in drawn), text
    assert {split_of(text) for text in drawn} == {"train"}
    assert "twelfth" not in drawn  # a prompt of the test split
    assert any("twelfth" in text for text in drawn)


@pytest.fixture
def forks(monkeypatch):
    """Processes that need not import everything: half a minute less."""
    monkeypatch.setattr(makers, "get_context", lambda _: multiprocessing.get_context("fork"))


def test_pieces_say_what_their_texts_say(prompts):
    texts, pieces = [record.reference for record in prompts], even_cuts(prompts).values()
    waves = [np.full(round(own[-1][1] * RATE), i, np.int16) for i, own in enumerate(pieces)]
    known = [Prompt(own, wave) for own, wave in zip(pieces, waves, strict=True)]
    rng, drawn = random.Random(0), set()
    for _ in range(50):
        text, wave = draw_pieces(known, rng)
        assert split_of(text) == "train"
        said = []
        for word in text.split():
            prompt = next(i for i, own in enumerate(texts) if word in own.split())
            said.append(np.full(len(waves[prompt]) // len(texts[prompt].split()), prompt))
        assert wave.tolist() == np.concatenate(said).tolist()
        drawn.add(text)
    assert len(drawn) > 20


def test_processes_that_die_are_started_anew(maker, speech, clips, forks, monkeypatch, caplog):
    """Those of this test end at once."""
    monkeypatch.setattr(makers, "_start", lambda maker: os._exit(1))
    with pytest.raises(BrokenProcessPool):
        Makers(speech, clips, Texts(["Yes"], ["Yes"], {"yes": 1}), maker, most=1000, workers=1, seed=0).wait()
    assert caplog.text.count("has died: all are started anew") == makers.RESTARTS


def test_a_loss_that_is_no_number_ends_the_run(speech, tmp_path):
    training = object.__new__(align.Training)
    training.folder, training.device = tmp_path, CPU
    training.before, training.starts, training.count = 0.0, 0, 0
    training.plan = align.Plan(minutes=1, of=1, tokens=500, hours=1, clips=0, workers=1, steps=1)
    training.rng, training.speech, training.clips = random.Random(0), speech, ClipBank(None, 0, CPU)
    training.makers = SimpleNamespace(collect=lambda: None, wait=lambda: None, close=lambda: None)
    training.step = lambda *_: {"ctc": torch.tensor(2.0), "text": torch.tensor(torch.nan)}
    rows = []
    with pytest.raises(FloatingPointError, match="text_speech became nan after 1 steps"):
        training.run(rows.append)
    assert rows[-1]["ctc_speech"] == 2
    with pytest.raises(FloatingPointError, match="x holds values that are not finite"):
        delta.write(tmp_path / "x.safetensors", {"x": torch.tensor([1, torch.inf])}, {})
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_whole_run(processor, stamps, prompts, forks, monkeypatch, tmp_path, capsys):  # noqa: F811
    monkeypatch.setattr(align, "load_base", lambda name, dtype: (tiny_thinker(processor), processor))
    monkeypatch.setattr("audiopress.benchmarks.alignment.scores.load_base", align.load_base)
    monkeypatch.setattr(align, "packaged_stamps", lambda: stamps)
    monkeypatch.setattr(align.synthesis, "ensure_voices", lambda: None)
    monkeypatch.setattr(align, "speech_records", lambda split: prompts)
    monkeypatch.setattr(align, "cuts", even_cuts)
    monkeypatch.setattr(align, "LOG_SECONDS", float("inf"))
    monkeypatch.setattr("audiopress.benchmarks.alignment.scores.speech_records", lambda split: prompts)
    monkeypatch.setattr("audiopress.benchmarks.alignment.scores.NEW_TOKENS", 3)
    monkeypatch.setattr("audiopress.benchmarks.alignment.scores.ANSWER_TOKENS", 3)
    monkeypatch.setattr("audiopress.benchmarks.alignment.scores.Options", lambda: Options(seconds=(24, 27), size=64))
    monkeypatch.setattr(align.Texts, "load", classmethod(lambda cls, records: cls([], [], {})))
    heads = []
    monkeypatch.setattr(Aligner, "load_heads", lambda self, tensors: heads.append((self.heads(), tensors)))
    options = "--of 9 --minutes 9 --tokens 500 --hours 0.2 --clips 4 --workers 1 --test-clips 1 --device cpu"
    for start in (1, 2):
        monkeypatch.setattr(align, "TOWERS_ONLY", 0.1 * (start == 1))
        monkeypatch.setattr(
            sys, "argv", ["align.py", *options.split(), "--steps", "2", "--output", str(tmp_path / "run")]
        )
        align.main()
        assert int(delta.read(tmp_path / "run" / align.FILE)[1]["steps"]) == 2 * start
    ((fresh, saved),) = heads  # of the second start alone
    assert {name: p.shape for name, p in fresh.items()} == {name: p.shape for name, p in saved.items()}
    rows = [json.loads(line) for line in (tmp_path / "run" / "scores.jsonl").read_text().splitlines()]
    assert [next(k for k in ("speech", "time") if k in row) for row in rows] == ["speech", "speech", "time"] * 2
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["steps"] for row in log if "steps" in row] == [2, 4]
    assert "time: mIoU" in capsys.readouterr().out
    line = publish(tmp_path / "run", align.FILE, tmp_path / "weights")
    assert line.endswith(f'Alignment("omni-small.safetensors", "{digest(tmp_path / "weights" / align.FILE)}")')
    card = (tmp_path / "weights" / "README.md").read_text()
    assert "and 4 steps in 2 starts." in card
    assert f"Start 2, on one {platform.machine()}, had" in card
    of = f"{rows[-2]['speech']['prompts']} recorded English prompts, {rows[-2]['speech']['words']} words, test split"
    assert f"| word error rate | {of} | {rows[-2]['speech']['wer']:.1%} |" in card
    assert "debian package tuxpaint-stamps-default | GPL-2 |" in card
    delta.write(tmp_path / "run" / align.FILE, {}, {"steps": "5"})
    with pytest.raises(ValueError, match=r"scores\.jsonl lacks scores of omni-small\.safetensors as it is"):
        publish(tmp_path / "run", align.FILE, tmp_path / "weights")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--minutes", "3", "--of", "2"], "minutes must be from 0 to those of the whole, got 3 of 2"),
        (["--minutes", "0"], "omni-small.safetensors is not there: nothing has been trained"),
        (["--publish"], "omni-small.safetensors is not there: nothing has been trained"),
        (["--test-clips", "-1"], "--test-clips must be a whole number >= 0, got -1"),
        (["--tokens", "0"], "tokens must be positive, got 0"),
    ],
)
def test_mistakes_are_told_in_one_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["align.py", "--output", str(tmp_path), "--device", "cpu", *options])
    with pytest.raises(SystemExit) as stopped:
        align.main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_step_in_half_precision(thinker, aligner, speech, clips):
    """As on a GPU: the model in bfloat16, its changes in float32, and frequencies as they were."""
    changes = Changes(thinker, rank=2)
    delta.cast_weights(thinker, torch.bfloat16)
    assert {b.dtype for n, b in thinker.named_buffers() if "inv_freq" in n} == {torch.float32}
    before = {name: tensor.clone() for name, tensor in changes.tensors().items()}
    steps = Steps(aligner.train(), changes)
    for batch in (speech.batch(random.Random(0), 300), clips.batch(random.Random(0), 2_000)):
        losses = steps(batch, 1.0, towers_only=False)
        assert all(loss.isfinite() for loss in losses.values())
    assert all(tensor.dtype == torch.float32 for tensor in changes.tensors().values())
    still = [n for n, tensor in changes.tensors().items() if torch.equal(tensor, before[n])]
    assert not [name for name in still if not name.endswith(delta.DOWN)]


def test_compiled_parts_learn_the_same(thinker, aligner, speech, clips):
    """One compilation serves all batches; what is compiled forward is compiled backward as well."""
    changes = Changes(thinker)
    changes.write()
    batches = [speech.batch(random.Random(0), 2000), clips.batch(random.Random(0), 2000)]

    def learn(batch):
        torch.manual_seed(0)  # of the masks and of CTC's other words
        losses = aligner.train()(batch, towers_only=False)
        torch.stack(list(losses.values())).sum().backward()
        found = {name: p.grad for name, p in thinker.named_parameters() if p.grad is not None}
        for parameter in thinker.parameters():
            parameter.grad = None
        return losses, found

    want = [learn(batch) for batch in batches]
    compile_layers(thinker, whole=True, backend="aot_eager")
    for batch, (losses, gradients) in zip(batches, want, strict=True):
        again, found = learn(batch)
        torch.testing.assert_close(again, losses)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
