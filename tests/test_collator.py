"""Records become batches: labels on answers alone, times that are true, and bad records named."""

import wave
from fractions import Fraction
from functools import partial

import av
import numpy as np
import pytest
import torch
from test_media import encode_audio, tone, write_audio
from tiny import MEL, tiny_processor, tiny_thinker
from transformers import Qwen2_5OmniProcessor

from audiopress import CompressedOmni, build
from audiopress.data.collator import Encoder, OmniCollator, RecordDataset, interleave
from audiopress.data.media import MediaError, read_audio
from audiopress.data.records import Record, assistant, user
from audiopress.models.context import question_mask
from audiopress.models.layout import Kind, Layout, TokenIds, audio_lengths
from audiopress.models.omni import tokens_left
from audiopress.models.omni_small import build_omni_small, omni_small_folder
from audiopress.models.packages import FetchError

END = "<|im_end|>"


@pytest.fixture(scope="module")
def tiny():
    return tiny_processor()


@pytest.fixture(scope="module", params=["tiny", "omni-small"])
def processor(request):
    if request.param == "tiny":
        return tiny_processor()
    try:
        return Qwen2_5OmniProcessor.from_pretrained(omni_small_folder(download=False))
    except FetchError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def wav(tmp_path_factory):
    """1.003 s: not a whole number of mel frames."""
    return write_audio(tmp_path_factory.mktemp("media") / "tone.wav", tone(1.003, 16_000), 16_000)


def write_clip(path, frames, fps, sound=None, size=(128, 72)):
    """Writes frame i in grey `4 i` at `i / fps`, and `sound` seconds of a tone."""
    rate = Fraction(fps)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        track = None if sound is None else container.add_stream("pcm_s16le", rate=16_000, layout="mono")
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), 4 * i % 256, np.uint8), format="rgb24")
            frame.pts, frame.time_base = i, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if track is not None:
            encode_audio(container, track, tone(sound, 16_000))
    return path


def layout_of(processor, batch):
    """Gives the layout of a batch as a model with the processor's ids reads it."""
    frames = batch.get("feature_attention_mask")
    return Layout.build(
        batch["input_ids"],
        batch["attention_mask"],
        TokenIds.from_config(tiny_thinker(processor).config),
        audio_lengths=[] if frames is None else audio_lengths(frames.sum(1)),
        video_grid_thw=batch.get("video_grid_thw"),
        video_seconds=batch.get("video_seconds"),
    )


def dialogue(*texts, name="r", **media):
    """A record of the texts, user and assistant in turn."""
    turns = [(user, assistant)[i % 2](text) for i, text in enumerate(texts)]
    return Record(name, tuple(turns), **media)


def runs(labels):
    """Gives start and end of every run of labelled tokens."""
    edges = torch.nn.functional.pad((labels != -100).int(), (1, 1)).diff().nonzero().flatten().tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def squeeze(ids, placeholder):
    """Leaves one of each run of a placeholder."""
    return [t for i, t in enumerate(ids) if t != placeholder or i == 0 or ids[i - 1] != placeholder]


ANSWERS = [
    ["From 10 to 30."],
    ["Yes", "Yes", "No"],
    ["When does it ring?", "user", "assistant", "When does it ring?"],  # the very words of the question
    [" a blank before", "two after  ", "  both  "],
    ["\na line", "two\n\nlines\n\n", "\n\n\nthree", "\n \n x"],
    ["déjà vu", "日本語のテキスト", "👩‍👩‍👧 🇮🇹", "e\u0301 and é", "ёлка"],
    ["0123456789", "07 to 99", "3.14%"],
    ["<|im_start|>assistant\nnot the start", "<|im_end|>", "a<|im_end|>\nb"],
]


@pytest.mark.parametrize("answers", ANSWERS)
def test_labels_are_the_answers_and_nothing_else(processor, wav, answers):
    texts = [t for answer in answers for t in ("When does it ring?\nuser assistant ", answer)]
    sample = Encoder(processor)(dialogue(*texts, audio=wav))
    ids, labels = sample["input_ids"], sample["labels"]
    labelled = labels != -100
    assert torch.equal(labels[labelled], ids[labelled])
    found = runs(labels)
    assert len(found) == len(answers)
    for (start, end), answer in zip(found, answers, strict=True):
        assert processor.tokenizer.decode(labels[start:end]) == answer + END
        assert processor.tokenizer.decode(ids[:start]).endswith("?\nuser assistant <|im_end|>\n<|im_start|>assistant\n")
    assert processor.tokenizer.decode(labels[labelled]) == "".join(answer + END for answer in answers)


@pytest.mark.parametrize("answers", ANSWERS)
def test_a_prompt_has_the_same_tokens_in_training_and_in_generation(processor, wav, answers):
    encoder = Encoder(processor)
    texts = [t for answer in answers for t in ("When?", answer)]
    record = dialogue(*texts, audio=wav)
    learnt, asked = encoder(record), encoder(record, prompt_only=True)
    start = runs(learnt["labels"])[-1][0]
    assert asked["input_ids"].tolist() == learnt["input_ids"][:start].tolist()
    assert "labels" not in asked
    text = processor.tokenizer.decode(asked["input_ids"])
    assert text.endswith("When?<|im_end|>\n<|im_start|>assistant\n")
    assert [answer + END in text for answer in answers[:-1]] == [True] * (len(answers) - 1)
    assert encoder(record.query(), prompt_only=True)["input_ids"].tolist() == asked["input_ids"].tolist()


@pytest.mark.parametrize("answers", [a for a in ANSWERS if not any(t[0].isspace() for t in a)])
def test_tokens_are_those_of_the_whole_text(processor, wav, answers):
    texts = [t for answer in answers for t in ("When does it ring?", answer)]
    sample = Encoder(processor)(dialogue(*texts, audio=wav))
    chat = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": texts[0]}]}]
    chat += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)][1:]
    text = processor.apply_chat_template(chat, tokenize=False)
    whole = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    placeholder = processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    assert squeeze(sample["input_ids"].tolist(), placeholder) == whole
    assert sample["input_ids"].tolist().count(placeholder) == 25


@pytest.mark.parametrize("seconds", [0.02, 0.021, 0.0299, 0.04, 0.0999, 1.003, 1.01, 2.0, 7.0077])
def test_audio_equals_the_processor_s_own(processor, tmp_path, seconds):
    """Ids, number of frames and features are what transformers makes of the same samples and text."""
    wav = write_audio(tmp_path / "a.wav", tone(seconds, 16_000), 16_000)
    record = dialogue("What is said?", "x", audio=wav)
    encoder = Encoder(processor)
    chat = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "What is said?"}]}]
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    theirs = processor(text=[text], audio=[read_audio(wav)], return_tensors="pt")
    if not (theirs["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")).any():
        with pytest.raises(MediaError, match=r"0.0200 s of audio is too short to give a token"):
            encoder(record)
        return
    ours = OmniCollator(0, "left")([encoder(record, prompt_only=True)])
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    frames = int(theirs["feature_attention_mask"].sum())
    assert ours["feature_attention_mask"].tolist() == [[1] * frames]
    torch.testing.assert_close(ours["input_features"], theirs["input_features"][:, :, :frames], rtol=0, atol=1e-5)


def told_at(layout, processor, ids):
    """Gives the text of every timestamp, with the kind and second of the token it stands before."""
    found, text = [], []
    for i, kind in enumerate(layout.kind[0].tolist()):
        if kind == Kind.TIMESTAMP:
            text.append(int(ids[i]))
        elif text:
            found.append((processor.tokenizer.decode(text), Kind(kind), float(layout.second[0, i])))
            text = []
    return found


def test_timestamps_stand_before_the_first_token_of_their_time(processor, clips, wav):
    plain, stamped = Encoder(processor, num_frames=4), Encoder(processor, num_frames=4, timestamps=5)
    for media, duration in (({"audio": wav}, 1.0), ({"audio": clips[4], "video": clips[4]}, 4.0)):
        record = dialogue("When?", "Now.", **media)
        before, after = (OmniCollator(0)([encoder(record)]) for encoder in (plain, stamped))
        layout, other = (layout_of(processor, batch) for batch in (after, before))
        stamps = layout.kind[0] == Kind.TIMESTAMP
        assert after["input_ids"][0, ~stamps].tolist() == before["input_ids"][0].tolist()
        assert torch.equal(layout.second[0, ~stamps].nan_to_num(-1), other.second[0].nan_to_num(-1))
        assert torch.equal(layout.positions[:, 0, ~stamps], other.positions[:, 0])
        ids = TokenIds.from_config(tiny_thinker(processor).config)
        asked, also = (
            question_mask(batch["input_ids"], own, batch["labels"], ids, ())[0]
            for batch, own in ((after, layout), (before, other))
        )
        assert torch.equal(asked[~stamps], also)
        assert not asked[stamps].any()  # they are no part of the question
        found = told_at(layout, processor, after["input_ids"][0])
        assert [text for text, *_ in found] == ["20", "40", "60", "80"]
        for text, kind, second in found:
            if kind == Kind.AUDIO:  # a pair of frames stands before the sound of its part of the clip
                assert second == pytest.approx(int(text) / 100 * duration, abs=1 / 25)


def test_a_timestamp_counts_up_from_the_time_of_the_next_token(processor, clips):
    record = dialogue("When?", "Now.", audio=clips[4], video=clips[4])
    batch = OmniCollator(0)([Encoder(processor, num_frames=4, timestamps=5)(record)])
    layout = layout_of(processor, batch)
    kinds, times = layout.kind[0].tolist(), layout.positions[:, 0]
    starts = [i for i, kind in enumerate(kinds) if kind == Kind.TIMESTAMP and kinds[i - 1] != Kind.TIMESTAMP]
    assert len(starts) == 4
    for start in starts:
        end = next(i for i in range(start, len(kinds)) if kinds[i] != Kind.TIMESTAMP)
        assert end - start == 2  # a digit each
        expected = times[0, end] + torch.arange(end - start)
        assert torch.equal(times[:, start:end], expected.expand(3, -1))


def test_of_timestamps_with_nothing_between_them_the_last_one_stays(processor, clips):
    record = dialogue("When?", "Now.", video=clips[4])
    batch = OmniCollator(0)([Encoder(processor, num_frames=4, timestamps=10)(record)])
    found = told_at(layout_of(processor, batch), processor, batch["input_ids"][0])
    assert [text for text, *_ in found] == ["50"]  # two pairs of frames


def test_a_number_of_timestamps_below_zero_is_refused(processor):
    with pytest.raises(ValueError, match="timestamps must be at least 0, got -1"):
        Encoder(processor, timestamps=-1)


def test_rounds_are_dropped_from_the_end(tiny, wav):
    texts = ["Q1?", "one", "Q2?", "two", "Q3?", "three"]
    whole = Encoder(tiny)(dialogue(*texts, audio=wav))
    two = Encoder(tiny)(dialogue(*texts[:4], audio=wav))
    one = Encoder(tiny)(dialogue(*texts[:2], audio=wav))
    for limit, expected in (
        (len(whole["input_ids"]), whole),
        (len(whole["input_ids"]) - 1, two),
        (len(two["input_ids"]), two),
        (len(two["input_ids"]) - 1, one),
        (len(one["input_ids"]), one),
    ):
        sample = Encoder(tiny, max_length=limit)(dialogue(*texts, audio=wav))
        assert torch.equal(sample["input_ids"], expected["input_ids"])
        assert torch.equal(sample["labels"], expected["labels"])
    n = len(one["input_ids"])
    with pytest.raises(ValueError, match=f"the first round of record 'r' needs {n} tokens, max_length is {n - 1}"):
        Encoder(tiny, max_length=n - 1)(dialogue(*texts, audio=wav))


def test_a_prompt_is_never_shortened(tiny, wav):
    """Dropping rounds from its end would drop the question that is asked."""
    record = dialogue("Q1?", "one", "Q2?", "two", audio=wav)
    n = len(Encoder(tiny)(record, prompt_only=True)["input_ids"])
    assert len(Encoder(tiny, max_length=n)(record, prompt_only=True)["input_ids"]) == n
    with pytest.raises(ValueError, match=f"the prompt of record 'r' needs {n} tokens, max_length is {n - 1}"):
        Encoder(tiny, max_length=n - 1)(record, prompt_only=True)


def test_max_length_counts_what_a_compressor_leaves(tiny, wav):
    record = dialogue("Q1?", "one", "Q2?", "two", audio=wav)
    n = len(Encoder(tiny)(record)["input_ids"])
    budget = partial(tokens_left, build("pooling", hidden_size=32, keep_ratio=0.2), None)  # 5 of 25
    sample = Encoder(tiny, max_length=n - 20, tokens_left=budget)(record)
    assert len(sample["input_ids"]) == n
    sample = Encoder(tiny, max_length=n - 21, tokens_left=budget)(record)
    assert len(runs(sample["labels"])) == 1


def test_a_query_cannot_be_learnt_from(tiny, wav):
    with pytest.raises(ValueError, match="record 'r' ends with the user"):
        Encoder(tiny)(dialogue("Q?", audio=wav))


@pytest.mark.parametrize("token", ["<|AUDIO|>", "<|VIDEO|>", "<|IMAGE|>"])
def test_a_placeholder_in_the_text_is_an_error(tiny, wav, token):
    for texts in ((f"what is {token}?", "x"), ("what?", token)):
        with pytest.raises(ValueError, match=r"the text of record 'r' contains <\|[A-Z]+\|>"):
            Encoder(tiny)(dialogue(*texts, audio=wav))


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory):
    """256.89 s of 360 x 202 with sound, at a frame every 4.94 s so that it is quickly written."""
    path = tmp_path_factory.mktemp("long") / "long.mov"
    return write_clip(path, 52, Fraction(5200, 25689), 256.89, (360, 202))


def test_the_long_clip(tiny, long_clip):
    """50 frames and 6,422 audio tokens: 25 groups with 256 or 257 audio tokens each, every second true."""
    sample = Encoder(tiny)(dialogue("When?", "From 10 to 30.", audio=long_clip, video=long_clip))
    assert sample["video_grid_thw"].tolist() == [[25, 14, 26]]
    batch = OmniCollator(0)([sample])
    model = CompressedOmni(tiny_thinker(tiny))
    layout = model.layout(**{k: v for k, v in batch.items() if k != "labels"})
    kinds, lengths = torch.unique_consecutive(layout.kind[0], return_counts=True)
    assert kinds.tolist() == [Kind.TEXT, *[Kind.VIDEO, Kind.AUDIO] * 25, Kind.TEXT]
    assert lengths[1:-1:2].tolist() == [91] * 25
    assert set(lengths[2:-1:2].tolist()) == {256, 257}
    video, audio = layout.kind[0] == Kind.VIDEO, layout.kind[0] == Kind.AUDIO
    assert int(video.sum()) == 2275
    assert int(audio.sum()) == 6422

    numbers = np.linspace(0, 51, 50).round()[::2]  # the first frame of each pair
    true = torch.tensor(numbers * 256.89 / 52).float().repeat_interleave(91)
    torch.testing.assert_close(layout.second[0, video], true, rtol=0, atol=2e-3)
    torch.testing.assert_close(layout.second[0, audio], torch.arange(6422) / 25)
    time = layout.positions[0, 0]
    origin = int(time[audio][0])
    assert torch.equal(time[audio], origin + torch.arange(6422))
    assert torch.equal(time[video], origin + (25 * layout.second[0, video]).long())
    assert torch.equal(time[video].unique(), time[video][::91])
    end = layout.kind[0].nonzero()[-1]
    assert int(layout.positions[0, 0, end]) > origin + 6421
    # every group stands within half a pair's time of the sound around it
    order = layout.second[0, video | audio]
    assert float((order - order.cummax(0).values).min()) > -256.89 / 25

    lines = layout.describe().splitlines()
    assert lines[0] == f"sample 0: {len(batch['input_ids'][0])} tokens"
    assert [line.split()[:3] for line in lines[2:4]] == [["VIDEO", "x", "91"], ["AUDIO", "x", str(int(lengths[2]))]]
    assert len(lines) == 1 + 52
    assert "0.00-10.28 s" in lines[3]
    assert "-256.88 s" in lines[-2]


@pytest.mark.parametrize("fps", ["1/2", "1", "4", "30000/1001"])
def test_frames_keep_their_real_seconds_at_any_rate(tiny, tmp_path, fps):
    clip = write_clip(tmp_path / "v.mp4", 40, fps)
    sample = Encoder(tiny, num_frames=12)(dialogue("When?", "Now.", video=clip))
    numbers = torch.tensor(np.linspace(0, 39, 12).round()[::2])
    torch.testing.assert_close(sample["video_seconds"], (numbers / float(Fraction(fps))).float(), rtol=0, atol=2e-3)
    assert float(sample["video_second_per_grid"]) == pytest.approx(40 / Fraction(fps) / 6, abs=1e-2)


@pytest.mark.parametrize(("frames", "asked", "groups"), [(9, 9, 5), (9, 50, 5), (9, 5, 3), (2, 50, 1), (8, 8, 4)])
def test_an_odd_number_of_frames(tiny, tmp_path, frames, asked, groups):
    clip = write_clip(tmp_path / "v.mp4", frames, 2)
    sample = Encoder(tiny, num_frames=asked)(dialogue("When?", "Now.", video=clip))
    assert int(sample["video_grid_thw"][0, 0]) == groups == len(sample["video_seconds"])
    chosen = np.linspace(0, frames - 1, min(frames, asked)).round()[::2] / 2
    assert sample["video_seconds"].tolist() == pytest.approx(chosen.tolist(), abs=2e-3)


def test_small_and_large_pictures(tiny, tmp_path):
    """The sizes are kept in proportion, and their tokens within the limits."""
    for size, limits in (((64, 48), (64, 128)), ((640, 360), (64, 128)), ((1280, 720), (16, 32)), ((64, 48), (4, 8))):
        clip = write_clip(tmp_path / "v.mp4", 2, 1, size=size)
        _, h, w = Encoder(tiny, 2, *limits)(dialogue("Q", "A", video=clip))["video_grid_thw"][0].tolist()
        assert limits[0] <= h * w // 4 <= limits[1]
        assert w / h == pytest.approx(size[0] / size[1], rel=0.25)
        if size == (640, 360):
            assert (h, w) == (16, 30)  # 120 tokens


def test_transformers_does_not_warn_about_the_size_of_frames(processor, tmp_path, caplog):
    Encoder(processor)(dialogue("Q", "A", video=write_clip(tmp_path / "v.mp4", 2, 1)))
    assert not caplog.records


@pytest.mark.parametrize(
    ("tokens", "groups", "step", "expected"),
    [
        (100, 2, 2.0, [50, 50]),
        (100, 4, 2.0, [50, 50, 0, 0]),  # the sound ends before the picture
        (200, 2, 2.0, [50, 150]),  # it goes on after it
        (3, 3, 0.04, [1, 1, 1]),
        (7, 2, 0.07, [2, 5]),
        (1, 1, 9.0, [1]),
    ],
)
def test_interleave(tokens, groups, step, expected):
    assert interleave(tokens, groups, step) == expected


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """4 s of picture: with 4 s of sound, with 1 s, with 7 s, with none."""
    folder = tmp_path_factory.mktemp("clips")
    return {s: write_clip(folder / f"{s}.mov", 8, 2, s) for s in (4, 1, 7, None)}


def media_records(clips, wav):
    both = {s: dialogue("When?", f"At {s}.", name=f"both{s}", audio=clips[s], video=clips[s]) for s in (4, 1, 7)}
    return [
        dialogue("What is said?", "nothing", "Sure?", "yes", name="audio", audio=wav),
        both[4],
        dialogue("What is seen?", "grey", name="silent", video=clips[None]),
        both[1],
        dialogue("What is heard?", "a tone", name="sound of a video", audio=clips[4]),
        dialogue("When?", "now", name="sound beside", audio=wav, video=clips[None]),
        both[7],
    ]


def test_sound_longer_and_shorter_than_the_picture(tiny, clips):
    model = CompressedOmni(tiny_thinker(tiny))
    for sound, counts in ((4, [25, 25, 25, 25]), (1, [25]), (7, [25, 25, 25, 100])):
        record = dialogue("When?", "Now", audio=clips[sound], video=clips[sound])
        batch = OmniCollator(0)([Encoder(tiny)(record, prompt_only=True)])
        layout = model.layout(**batch)
        kinds, lengths = torch.unique_consecutive(layout.kind[0], return_counts=True)
        assert lengths[kinds == Kind.AUDIO].tolist() == counts
        audio, video = layout.kind[0] == Kind.AUDIO, layout.kind[0] == Kind.VIDEO
        torch.testing.assert_close(layout.second[0, audio], torch.arange(sum(counts)) / 25)
        assert layout.second[0, video].unique().tolist() == pytest.approx([0, 1, 2, 3], abs=1e-3)
        origin = int(layout.positions[0, 0, video].min())
        assert int(layout.positions[0, 0, -1]) > origin + max(25 * 3, sum(counts) - 1)


@pytest.mark.parametrize("side", ["right", "left"])
def test_any_mixture_shares_a_batch(tiny, clips, wav, side):
    encoder = Encoder(tiny, min_tokens=4, max_tokens=8)
    model = CompressedOmni(tiny_thinker(tiny), build("pooling", hidden_size=32, keep_ratio=0.5))
    samples = [encoder(record) for record in media_records(clips, wav)]
    batch = OmniCollator(tiny.tokenizer.pad_token_id, side)(samples)
    assert set(batch) - {"labels"} <= {*model_arguments()}
    together = model(**batch)
    alone = [model(**OmniCollator(0)([sample])) for sample in samples]
    logits = torch.cat([out.logits for out in alone])
    torch.testing.assert_close(together.logits, logits, rtol=1e-4, atol=1e-4)
    assert together.loss.isfinite()
    mask = batch["attention_mask"].bool()
    for row, sample in enumerate(samples):
        assert batch["input_ids"][row, mask[row]].tolist() == sample["input_ids"].tolist()
        assert batch["labels"][row, mask[row]].tolist() == sample["labels"].tolist()
        n = len(sample["input_ids"])
        padding = slice(n, None) if side == "right" else slice(0, mask.shape[1] - n)
        assert not mask[row, padding].any()
        assert (batch["labels"][row, padding] == -100).all()
        assert (batch["input_ids"][row, padding] == tiny.tokenizer.pad_token_id).all()


def model_arguments():
    from audiopress.models.omni import MEDIA

    return ("input_ids", "attention_mask", *MEDIA)


def test_prompts_of_any_mixture_are_answered(tiny, clips, wav):
    encoder = Encoder(tiny, min_tokens=4, max_tokens=8)
    model = CompressedOmni(tiny_thinker(tiny), build("uniform-stride", hidden_size=32, keep_ratio=0.5))
    samples = [encoder(record, prompt_only=True) for record in media_records(clips, wav)]
    batch = OmniCollator(0, "left")(samples)
    assert batch["attention_mask"][:, -1].all()
    together = model.generate(**batch, max_new_tokens=4, min_new_tokens=4)
    alone = [model.generate(**OmniCollator(0)([s]), max_new_tokens=4, min_new_tokens=4) for s in samples]
    assert together.tolist() == torch.cat(alone).tolist()


def test_the_real_model_reads_a_batch(clips, wav):
    try:
        thinker, processor = build_omni_small(download=False)
    except FetchError as error:
        pytest.skip(str(error))
    encoder = Encoder(processor, num_frames=4, min_tokens=4, max_tokens=8)
    model = CompressedOmni(thinker, build("pooling", hidden_size=576, keep_ratio=0.5))
    batch = OmniCollator(processor.tokenizer.pad_token_id)([encoder(r) for r in media_records(clips, wav)[:3]])
    with torch.no_grad():
        out = model(**batch)
    assert len(out.logits) == int((batch["labels"] != -100).sum())
    assert 0 < float(out.loss) < 20


def write_wav_header(path):
    with wave.open(str(path), "wb") as empty:
        empty.setparams((1, 2, 16_000, 0, "NONE", ""))
    return path


def nan(path):
    samples = tone(1, 16_000)
    samples[0, 8_000] = np.nan
    return write_audio(path, samples, 16_000)


BAD = {
    "empty": (write_wav_header, "the audio track holds no samples"),
    "one sample": (lambda path: write_audio(path, tone(1 / 16_000, 16_000), 16_000), "0.0001 s of audio is too short"),
    "NaN": (nan, "1 of 16000 samples are NaN or infinite, the first at 0.50 s"),
    "too long": (lambda path: write_audio(path, tone(301, 1_000), 1_000), "the limit is 300 s"),
    "missing": (lambda path: path, "no such file"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_record_is_named_and_the_next_stands_in(tiny, tmp_path, wav, kind):
    make, reason = BAD[kind]
    bad = make(tmp_path / "bad.wav")
    records = [
        dialogue("Q?", "good", name="first", audio=wav),
        dialogue("Q?", "bad", name="second", audio=bad),
        dialogue("Q?", "better", name="third", audio=wav),
    ]
    data = RecordDataset(records, Encoder(tiny))
    assert [data[i]["id"] for i in range(3)] == ["first", "third", "third"]
    assert [data[i]["skipped"] for i in (0, 2)] == [[], []]
    ((name, message),) = data[1]["skipped"]
    assert name == "second"
    assert str(bad) in message
    assert reason in message
    batch = OmniCollator(0)([data[0], data[1]])
    assert batch["skipped"] == [(name, message)]
    assert "skipped" not in OmniCollator(0)([data[0], data[2]])
    with pytest.raises(MediaError, match=reason):
        RecordDataset(records, Encoder(tiny), strict=True)[1]
    with pytest.raises(ValueError, match=f"2 of 2 records in a row cannot be used; the first, second: .*{reason}"):
        RecordDataset([records[1]] * 2, Encoder(tiny))[0]


def test_the_last_record_s_stand_in_is_the_first(tiny, tmp_path, wav):
    records = [dialogue("Q?", "a", name="a", audio=wav), dialogue("Q?", "b", name="b", audio=tmp_path / "none.wav")]
    data = RecordDataset(records, Encoder(tiny))
    assert data[1]["id"] == data[-1]["id"] == "a"
    assert [sample["id"] for sample in data] == ["a", "a"]
    with pytest.raises(IndexError, match="record 2 of 2"):
        data[2]
    with pytest.raises(ValueError, match="there are no records"):
        RecordDataset([], Encoder(tiny))


def test_when_nothing_fits_it_stops_early(tiny, wav):
    calls = []

    class Counting(Encoder):
        def __call__(self, record, prompt_only=False):
            calls.append(record.id)
            return super().__call__(record, prompt_only)

    data = RecordDataset([dialogue("Q?", "a", audio=wav)] * 500, Counting(tiny, max_length=3))
    with pytest.raises(ValueError, match=r"100 of 500 records in a row .* first round .* max_length is 3"):
        data[7]
    assert len(calls) == 100


def test_long_audio_is_cut_when_asked(tiny, tmp_path):
    long = write_audio(tmp_path / "long.wav", tone(301, 1_000), 1_000)
    sample = Encoder(tiny, max_seconds=2)(dialogue("Q?", "A", audio=long))
    assert sample["input_features"].shape == (MEL, 200)
    assert sample["input_ids"].tolist().count(tiny.tokenizer.convert_tokens_to_ids("<|AUDIO|>")) == 50
    with pytest.raises(MediaError, match=r"the limit is 300 s; cut the file, or .* max_seconds=300"):
        Encoder(tiny)(dialogue("Q?", "A", audio=long))
    whole = Encoder(tiny, max_seconds=300)(dialogue("Q?", "A", audio=long))
    assert whole["input_features"].shape == (MEL, 30_000)


def test_workers_give_the_same(tiny, wav):
    data = RecordDataset([dialogue("Q?", f"answer {i}", name=str(i), audio=wav) for i in range(4)], Encoder(tiny))
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=1, collate_fn=OmniCollator(0))
    for i, batch in enumerate(loader):
        expected = OmniCollator(0)([data[2 * i], data[2 * i + 1]])
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        assert torch.equal(batch["input_features"], expected["input_features"])
