"""Whisper with compressors before its decoder, and the benchmark on it: a tiny one, and the real one where slow."""

import dataclasses
import json
import re
import struct
import sys

import av
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from audiopress import TokenStream
from audiopress.benchmarks import speech
from audiopress.compression.budget import token_budget
from audiopress.data.records import Record, assistant, user
from audiopress.data.speech import speech_records
from audiopress.models import whisper as models_whisper
from audiopress.models.packages import FetchError
from audiopress.models.whisper import CompressedWhisper, Heard, generation_config, load_whisper
from audiopress.models.whisper_ct2 import whisper_model

SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|fr|>", "<|translate|>", "<|transcribe|>"]
SPECIAL += ["<|notimestamps|>"]
WORDS = [f"word{i}" for i in range(40)]
TOKENS = 25  # of the tiny window, one second
STEPS = 24  # of decoding: random weights never end
LENGTHS = (16_000, 9_000, 12_345)  # samples


def make_model():
    """A random Whisper that hears one second, with weights large enough to write more than one word."""
    torch.manual_seed(0)
    ids = {"pad_token_id": 40, "bos_token_id": 40, "eos_token_id": 40, "decoder_start_token_id": 41}
    return WhisperForConditionalGeneration(
        WhisperConfig(
            encoder_layers=6,
            decoder_layers=2,
            **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
            **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
            d_model=32,
            num_mel_bins=8,
            max_source_positions=50,
            max_target_positions=40,
            vocab_size=len(WORDS) + len(SPECIAL),
            init_std=0.3,
            **ids,
        )
    ).eval()


def make_whisper():
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="word0"))
    words.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=SPECIAL[0], pad_token=SPECIAL[0])
    model = make_model()
    model.generation_config = generation_config(tokenizer, never=[3, 4], never_first=[5])
    return CompressedWhisper(model, tokenizer, WhisperFeatureExtractor(8, chunk_length=1))


@pytest.fixture(scope="module")
def whisper():
    return make_whisper()


@pytest.fixture(autouse=True)
def few_steps(request, monkeypatch):
    if "slow" not in request.keywords:
        monkeypatch.setattr(models_whisper, "MAX_NEW_TOKENS", STEPS)


def sounds(lengths=LENGTHS):
    random = np.random.default_rng(0)
    return [random.standard_normal(n).astype(np.float32) for n in lengths]


def stored(model):
    """The model in CTranslate2's format, float32: a second opinion on what lies where."""
    state, tensors = model.state_dict(), {}
    for side in ("encoder", "decoder"):
        tensors[f"{side}/num_heads"] = torch.tensor(2, dtype=torch.int16)
        tensors[f"{side}/position_encodings/encodings"] = state[f"model.{side}.embed_positions.weight"]
        names = {f"{side}/layer_norm": f"model.{side}.layer_norm"}
        for i in range(getattr(model.config, f"{side}_layers")):
            theirs, ours = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            attentions = {"self_attention": "self_attn"} | ({"attention": "encoder_attn"} if side == "decoder" else {})
            for their_name, name in attentions.items():
                names[f"{theirs}/{their_name}/layer_norm"] = f"{ours}.{name}_layer_norm"
                q, k, v, out = (f"{ours}.{name}.{part}_proj" for part in ("q", "k", "v", "out"))
                rows = [[q, k, v], [out]] if name == "self_attn" else [[q], [k, v], [out]]
                for j, row in enumerate(rows):
                    bias = [state.get(f"{part}.bias", torch.zeros(32)) for part in row]
                    tensors[f"{theirs}/{their_name}/linear_{j}/weight"] = torch.cat([state[f"{p}.weight"] for p in row])
                    tensors[f"{theirs}/{their_name}/linear_{j}/bias"] = torch.cat(bias)
            names[f"{theirs}/ffn/layer_norm"] = f"{ours}.final_layer_norm"
            names |= {f"{theirs}/ffn/linear_{j}": f"{ours}.fc{j + 1}" for j in range(2)}
        for their_name, name in names.items():
            kinds = ("gamma", "beta") if their_name.endswith("layer_norm") else ("weight", "bias")
            for kind, their_kind in zip(("weight", "bias"), kinds, strict=True):
                tensors[f"{their_name}/{their_kind}"] = state[f"{name}.{kind}"]
    for conv in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            tensors[f"encoder/{conv}/{kind}"] = state[f"model.encoder.{conv}.{kind}"]
    tensors["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"]

    data = bytearray(struct.pack("<I", 6) + b"\x05\0Spec\0" + struct.pack("<II", 3, len(tensors)))
    for name, tensor in tensors.items():
        data += struct.pack("<H", len(name) + 1) + name.encode() + b"\0" + struct.pack("<B", tensor.ndim)
        data += struct.pack(f"<{tensor.ndim}I", *tensor.shape)
        raw = tensor.contiguous().numpy().tobytes()
        data += struct.pack("<BI", {torch.float32: 0, torch.int16: 2}[tensor.dtype], len(raw)) + raw
    return data


def test_a_stored_whisper_is_read_whole():
    model = make_model()
    for name, parameter in model.named_parameters():  # random ones, as biases start at 0 and norms at 1
        if name != "model.encoder.embed_positions.weight":
            torch.nn.init.normal_(parameter)
    read = whisper_model(stored(model))
    want, got = model.state_dict(), read.state_dict()
    assert want.keys() == got.keys()
    for name in want:
        assert torch.equal(want[name], got[name]), name


def test_the_languages_stand_between_start_and_tasks(whisper):
    config = whisper.model.generation_config
    assert config.lang_to_id == {"<|en|>": 42, "<|fr|>": 43}
    assert config.task_to_id == {"translate": 44, "transcribe": 45}


@torch.no_grad()
def test_uncompressed_tokens_are_means_of_the_encoders_states(whisper):
    features, tokens = whisper.features(sounds())
    assert tokens == [25, 14, 19]
    encoder, states = whisper.model.model.encoder, []
    handle = encoder.layer_norm.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    encoder(features)
    handle.remove()
    heard = whisper.hear(features, tokens)
    want = encoder.layer_norm(states[0].unflatten(1, (-1, 2)).mean(dim=2))
    torch.testing.assert_close(heard.stream.embeds, want.flatten(0, 1))
    assert heard.stream.lengths == (TOKENS,) * 3
    assert heard.kept == tuple(tokens)


@torch.no_grad()
def test_it_writes_as_transformers_does(whisper):
    features, tokens = whisper.features(sounds())
    states = whisper.model.model.encoder(features).last_hidden_state
    heard = Heard(TokenStream(states.flatten(0, 1), (50,) * 3), tuple(2 * n for n in tokens))
    for language in ("en", "fr"):
        own = whisper.model.generate(features, language=language, task="transcribe", max_new_tokens=STEPS)
        texts = whisper.tokenizer.batch_decode(own, skip_special_tokens=True)
        written = whisper.transcribe(heard, language)
        assert [transcript.text for transcript in written] == texts
        assert all(texts)
        assert [transcript.ended for transcript in written] == [bool((row == 40).any()) for row in own]
    assert len(set(texts)) == 3


@torch.no_grad()
def test_a_size_counts_as_so_many_copies(whisper):
    random = torch.Generator().manual_seed(0)
    stream = TokenStream(torch.randn(11, 32, generator=random), (7, 4))
    copies = torch.randint(1, 9, (11,), generator=random)
    lengths = [int(part.sum()) for part in copies.split(stream.lengths)]
    many = Heard(TokenStream(stream.embeds.repeat_interleave(copies, dim=0), tuple(lengths)), (7, 4))
    merged = Heard(stream.replace(sizes=copies.float()), (7, 4), by_size=True)
    want = whisper.transcribe(many, "en")
    assert whisper.transcribe(merged, "en") == want
    assert whisper.transcribe(dataclasses.replace(merged, by_size=False), "en") != want


@pytest.mark.parametrize(
    "method", ["none", "ward", "pooling", "atome:encoder", "ward:encoder", "attention-topk:topk-ast"]
)
def test_a_batch_says_what_each_clip_says(whisper, method):
    compressor = None if method == "none" else whisper.build(method, keep_ratio=0.4)
    together = whisper.hear(*whisper.features(sounds()), compressor)
    alone = [whisper.hear(*whisper.features([sound]), compressor) for sound in sounds()]
    assert together.kept == tuple(n for heard in alone for n in heard.kept)
    embeds = torch.cat([heard.stream.embeds for heard in alone])
    torch.testing.assert_close(together.stream.embeds, embeds, rtol=1e-4, atol=1e-5)
    apart = [transcript for heard in alone for transcript in whisper.transcribe(heard, "en")]
    assert whisper.transcribe(together, "en") == apart


def test_every_method_leaves_its_share_of_the_speech_and_all_of_the_silence(whisper):
    features, tokens = whisper.features(sounds())
    whole = whisper.hear(features, tokens)
    hidden = {}
    methods = speech.training_free(whisper)
    assert {"ward", "ward:encoder", "atome:encoder", "attention-topk:topk-ast", "pooling", "random"} <= set(methods)
    assert not {"none", "speechprune", "omnizip", "qformer", "conv"} & set(methods)
    for name in methods:
        compressor = whisper.build(name, keep_ratio=0.4)
        first = whisper.first_layer(compressor)
        if first not in hidden:
            hidden[first] = whisper.hidden(features, compressor)
        heard = whisper.hear(features, tokens, compressor, hidden[first])
        afresh = whisper.hear(features, tokens, compressor)
        assert torch.equal(heard.stream.embeds, afresh.stream.embeds), name
        assert heard.kept == token_budget(tokens, 0.4) or compressor.adaptive, name
        for got, was, kept, n in zip(heard.stream.split(), whole.stream.split(), heard.kept, tokens, strict=True):
            assert got.lengths[0] == kept + TOKENS - n, name
            assert torch.equal(got.slots[kept:], was.slots[n:]), name
            assert torch.equal(got.sizes[kept:], was.sizes[n:]), name
            assert (got.slots[:kept] < n).all(), name
            if compressor.stage == "connector":
                assert torch.equal(got.embeds[kept:], was.embeds[n:]), name


def test_what_cannot_be_heard_is_told(whisper):
    for method, reads in (("speechprune", "first_layer, question"), ("omnizip", "video")):
        with pytest.raises(ValueError, match=f"{method} reads {reads}, which Whisper has not"):
            whisper.build(method)
    with pytest.raises(ValueError, match="layers must be from 1 to the tower's 6, got 7"):
        whisper.build("atome:encoder", layers=7)
    with pytest.raises(ValueError, match="adaptive inside the encoder"):
        whisper.build("atome:encoder", threshold=0.9)
    with pytest.raises(ValueError, match=r"clip 1 has 2\.0 s; Whisper hears 1 s"):
        whisper.features(sounds((16_000, 32_000)))
    with pytest.raises(ValueError, match="clip 0 is too short"):
        whisper.features(sounds((200,)))
    features, tokens = whisper.features(sounds((16_000,)))
    with pytest.raises(ValueError, match="does not know the language 'tlh'"):
        whisper.transcribe(whisper.hear(features, tokens), "tlh")
    with pytest.raises(ValueError, match="at most 1310 clips are heard at once, got 1311"):
        whisper.hear(features.expand(1311, -1, -1), tokens * 1311)


def records(tmp_path, seconds, language="en"):
    """Records of noise that all say the same."""
    made = []
    for i, n in enumerate(seconds):
        path = tmp_path / f"{language}{i}.wav"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("pcm_s16le", rate=16_000, layout="mono")
            samples = np.random.default_rng(i).integers(-9000, 9000, (1, round(16_000 * n)), dtype=np.int16)
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.sample_rate = 16_000
            container.mux([*stream.encode(frame), *stream.encode(None)])
        made.append(
            Record(f"{language}/{i}", (user("What?"), assistant(f"say {'abcdefgh'[i]} twenty")), audio=path, duration=n)
        )
    return made


def test_prompts_are_joined_to_full_clips(tmp_path, caplog):
    prompts = records(tmp_path, [0.5, 0.3, 0.2, 0.9, 0.1, 0.4, 1.5])
    clips = speech.make_clips(prompts, "en", 1.0, joined=True, limit=None)
    assert "1 of 7 prompts in 'en' are left out: longer than 1 s" in caplog.text
    assert sorted(p.id for clip in clips for p in clip.prompts) == [f"en/{i}" for i in range(6)]
    assert len(clips) == 3, "2.4 s in all"
    assert all(clip.seconds <= 1.0 for clip in clips)
    assert clips == speech.make_clips(prompts, "en", 1.0, joined=True, limit=None)
    for clip in clips:
        assert clip.text == " ".join(p.reference for p in clip.prompts)
        assert len(clip.sound()) == round(16_000 * clip.seconds)
    single = speech.make_clips(prompts, "en", 1.0, joined=False, limit=4)
    assert [len(clip.prompts) for clip in single] == [1, 1, 1, 1]


def test_scores_by_hand(tmp_path):
    clips = [
        speech.Clip("en", tuple(records(tmp_path, [0.1, 0.1]))),
        *(speech.Clip("fr", (record,)) for record in records(tmp_path, [0.1], "fr")),
    ]
    written = [speech.Transcript("Say A 20, say B.", True), speech.Transcript("say 20 x", False)]
    found = speech.scores(clips, written)
    # English numbers are spelled alike, and a "20" is missing; French ones stay
    assert found["errors_by_clip"] == (1, 2)
    assert found["words_by_clip"] == (6, 3)
    assert found["wer"] == pytest.approx(3 / 9)
    assert found["ran_away"] == 1
    assert [(lang, x["clips"], x["wer"]) for lang, x in found["by_language"].items()] == [
        ("en", 1, 1 / 6),
        ("fr", 1, 2 / 3),
    ]

    rows = [{"method": "none", "tokens_per_second": 25, "status": "ok", **found}]
    better = speech.scores(clips, [speech.Transcript(clip.text, True) for clip in clips])
    rows.append({"method": "ward", "tokens_per_second": 6.25, "status": "ok", **better})
    rows.append({"method": "lost", "status": "failed", "message": "ValueError: no"})
    *_, none, ward, lost = speech.table(rows).splitlines()
    assert none.startswith("| `none` | 25 | 33.3 [16.7, 66.7] |  |")
    assert ward.startswith("| `ward` | 6.25 | 0.0 [0.0, 0.0] | -33.3 [-66.7, -16.7] | 0.0 | 0 of 2 |")
    assert "ValueError: no" in lost


@pytest.fixture
def run(whisper, monkeypatch, tmp_path, capsys):
    """Runs the benchmark on the tiny Whisper and prompts of noise; gives its rows and what it prints."""
    made = {language: records(tmp_path, [0.5, 0.3, 0.2, 0.9], language) for language in ("en", "fr")}
    monkeypatch.setattr(speech, "load_whisper", lambda name: whisper)
    monkeypatch.setattr(speech, "speech_records", lambda split, languages: made[languages[0]])
    monkeypatch.setattr(speech, "SECONDS", {False: 1.0, True: 1.0})

    def main(*options):
        output = tmp_path / "rows.jsonl"
        monkeypatch.setattr(
            sys, "argv", ["speech", "--device", "cpu", "--commit", "a", "--output", str(output), *options]
        )
        speech.main()
        return [json.loads(line) for line in output.read_text().splitlines()], capsys.readouterr().out

    return main


def test_a_row_for_every_cell(run):
    options = ["--methods", "ward", "atome:encoder", "--rates", "12.5", "5", "--languages", "en", "fr", "--joined"]
    rows, printed = run(*options)
    assert [row.get("message") for row in rows] == [None] * len(rows)
    cells = [(row["method"], row["keep_ratio"]) for row in rows]
    several = [(name, r) for name in ("random", "uniform-stride", "ward", "atome:encoder") for r in (0.5, 0.2)]
    assert cells == [("transformers", None), ("none", None), *several]
    for row in rows:
        assert row["clips"] == 4
        assert row["prompts"] == 8
        assert row["audio_seconds"] == pytest.approx(3.8)
        assert list(row["by_language"]) == ["en", "fr"]
        assert row["wer_interval"][0] <= row["wer"] <= row["wer_interval"][1]
        wanted = {"transformers": 50, "none": 25}.get(row["method"]) or 25 * row["keep_ratio"]
        assert row["tokens_per_second"] == pytest.approx(wanted, rel=0.06)  # whole tokens of short clips
    assert len(printed.splitlines()) == 2 + len(rows)
    assert run(*options)[0] == rows, "what is there is not measured again"
    assert len(run(*options, "--limit", "1")[0]) == 2 * len(rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "qformer"], "qformer must be trained first"),
        (["--methods", "speechprune"], "speechprune reads first_layer, question, which Whisper has not"),
        (["--methods", "wards"], "did you mean 'ward'"),
        (["--methods", "ward", "--rates", "30"], r"keep_ratio .* must be in \(0, 1\], got 1\.2"),
        (["--methods", "ward", "--limit", "0"], "--limit must be 1 or more, got 0"),
    ],
)
def test_wrong_options_end_with_one_line(run, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        run(*options)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["none", "ward", "atome:encoder", "attention-topk:topk-ast"])
def test_a_gpu_hears_the_same(whisper, method):
    moved = make_whisper().to(torch.device("cuda"))
    heard = []
    for machine in (whisper, moved):
        compressor = None if method == "none" else machine.build(method, keep_ratio=0.4)
        heard.append(machine.hear(*machine.features(sounds()), compressor))
        assert all(transcript.text for transcript in machine.transcribe(heard[-1], "en"))
    assert heard[0].kept == heard[1].kept
    if method == "none":  # the others may choose otherwise for a GPU's rounding
        torch.testing.assert_close(heard[0].stream.embeds, heard[1].stream.embeds.cpu(), rtol=1e-2, atol=1e-2)


@pytest.mark.slow
@torch.no_grad()
def test_the_real_one_understands():
    """Whisper-base on held-out prompts: as transformers runs it, uncompressed, and with a quarter of the tokens."""
    try:
        whisper = load_whisper(download=False)
        prompts = speech_records("validation", ["en"], 4, download=False)
    except FetchError as reason:
        pytest.skip(f"{reason}; or with `python benchmarks/speech.py`")
    clips = speech.make_clips(prompts, "en", 28.5, joined=True, limit=3)
    features, tokens = whisper.features([clip.sound() for clip in clips])
    own = whisper.model.generate(features, language="en", task="transcribe", max_new_tokens=224)
    texts = [text.strip() for text in whisper.tokenizer.batch_decode(own, skip_special_tokens=True)]
    states = whisper.model.model.encoder(features).last_hidden_state
    as_is = Heard(TokenStream(states.flatten(0, 1), (1500,) * 3), tuple(2 * n for n in tokens))
    assert [transcript.text for transcript in whisper.transcribe(as_is, "en")] == texts
    heard = [whisper.hear(features, tokens, c) for c in (None, whisper.build("ward", keep_ratio=0.25))]
    rates = [speech.scores(clips, whisper.transcribe(h, "en"))["wer"] for h in heard]
    print(rates)
    assert max(rates) < 0.1, rates
