"""Whisper with compressors before its decoder: a tiny one, and the real one where slow."""

import dataclasses
import struct

import pytest
import torch
from tiny_whisper import STEPS, TOKENS, make_model, make_whisper, sounds
from transformers import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutput

from audiopress import TokenStream
from audiopress.benchmarks import speech
from audiopress.benchmarks.words.cells import methods_for
from audiopress.benchmarks.words.clips import make_clips
from audiopress.compression.budget import token_budget
from audiopress.data.speech import speech_records
from audiopress.models import whisper as models_whisper
from audiopress.models import whisper_greedy
from audiopress.models.attention import biased
from audiopress.models.packages import FetchError
from audiopress.models.spoken import Heard, Spoken
from audiopress.models.whisper import PROMPT_LENGTH, load_whisper
from audiopress.models.whisper_ct2 import whisper_model


@pytest.fixture(scope="module")
def whisper():
    return make_whisper()


@pytest.fixture(autouse=True)
def few_steps(request, monkeypatch):
    if "slow" not in request.keywords:
        monkeypatch.setattr(models_whisper, "MAX_NEW_TOKENS", STEPS)


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
    methods = methods_for(whisper)
    assert {"ward", "ward:encoder", "atome:encoder", "attention-topk:topk-ast", "pooling", "random"} <= set(methods)
    assert {"ward-refined", "stacking", "qformer", "conv:osum"} <= set(methods)
    assert not {"none", "speechprune", "omnizip"} & set(methods)
    for name in methods:
        if whisper.build(name).trained:
            continue
        compressor = whisper.build(name, keep_ratio=0.4)
        first = whisper.first_layer(compressor)
        if first not in hidden:
            hidden[first] = whisper.hidden(features, compressor)
        heard = whisper.compress(whisper.encode(features, tokens, compressor, hidden[first]), compressor)
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


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 9])
def test_greedy_decoding_is_that_of_transformers_whoever_ends_when(whisper, rows, monkeypatch):
    """Rows end at different steps, so that they move to smaller buffers; keys are biased and padded."""
    model, config = whisper.model, whisper.model.generation_config
    for name in ("eos_token_id", "pad_token_id"):
        monkeypatch.setattr(config, name, 25)  # which these rows write now and then
    monkeypatch.setattr(whisper_greedy, "LOOK_EVERY", 2)
    monkeypatch.setattr(whisper_greedy, "SHRINK", 1)
    random = torch.Generator().manual_seed(rows)
    states = torch.randn(rows, 13, 32, generator=random)
    bias = torch.rand(rows, 13, generator=random)
    bias[rows // 2 :, 9:] = -1e4
    prompts = whisper.prompts((["en", "fr"] * rows)[:rows])
    most = 30
    plain = GenerationConfig(
        do_sample=False,
        max_new_tokens=most,
        **{name: getattr(config, name) for name in ("eos_token_id", "pad_token_id", "suppress_tokens")},
        begin_suppress_tokens=config.begin_suppress_tokens,
    )
    with biased([layer.encoder_attn for layer in model.model.decoder.layers], bias):
        want = GenerationMixin.generate(
            model,
            decoder_input_ids=prompts,
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=torch.ones(states.shape[:2]),
            generation_config=plain,
        )[:, PROMPT_LENGTH:]
    got = whisper_greedy.GreedyDecoder(model, torch.float32, most)(states, bias, prompts)
    assert torch.equal(got[:, : want.shape[1]], want)
    assert (got[:, want.shape[1] :] == config.eos_token_id).all()
    if rows > 1:
        ends = (want == config.eos_token_id).int().argmax(dim=1)
        assert len(set(ends.tolist())) > 2, "they end at different steps"


@torch.no_grad()
def test_clips_of_several_languages_are_written_together(whisper, monkeypatch):
    heard = whisper.hear(*whisper.features(sounds()))
    together = whisper.transcribe(heard, ["en", "fr", "en"])
    english, french = (whisper.transcribe(heard, language) for language in ("en", "fr"))
    assert together == [english[0], french[1], english[2]]
    monkeypatch.setattr(models_whisper, "KEYS_AT_ONCE", 2 * TOKENS)
    assert whisper.transcribe(heard, ["en", "fr", "en"]) == together, "and two by two"


@torch.no_grad()
def test_a_text_is_followed_as_it_is_written(whisper):
    """What the decoder says after the texts it wrote itself, read at once, are these texts."""
    heard = whisper.hear(*whisper.features(sounds()), whisper.build("ward", keep_ratio=0.4))
    prompts = whisper.prompts(["en"] * 3)
    written = whisper_greedy.GreedyDecoder(whisper.model, torch.float32, STEPS)(*heard.padded(), prompts)
    ids = torch.cat([prompts, written], dim=1)
    logits = whisper.model.proj_out(whisper.follow(heard, ids[:, :-1]))
    logits[..., whisper.model.generation_config.suppress_tokens] = -torch.inf
    after = logits.argmax(dim=2)[:, PROMPT_LENGTH:]  # of the first, other tokens are suppressed as well
    assert torch.equal(after, written[:, 1:])


def test_texts_have_prompt_and_end(whisper):
    first, second = whisper.texts(["word3 word5", "word7"], ["en", "fr"])
    assert first.tolist() == [41, 42, 45, 46, 3, 5, 40]
    assert second.tolist() == [41, 43, 45, 46, 7, 40]
    with pytest.raises(ValueError, match=r"a text has 55 tokens; Whisper writes at most 40: 'word1 word1"):
        whisper.texts(["word1 " * 50], ["en"])


def test_clips_are_taken_apart_and_put_together(whisper):
    spoken = whisper.encode(*whisper.features(sounds()))
    again = Spoken.cat(spoken.split())
    assert again.speech.lengths == spoken.speech.lengths == (25, 14, 19)
    for name in ("encoder_hidden", "encoder_keys"):
        assert torch.equal(getattr(again.context, name).embeds, getattr(spoken.context, name).embeds)
    assert torch.equal(again.context.encoder_attention, spoken.context.encoder_attention)
    for side in ("speech", "silence"):
        for field in ("embeds", "slots", "sizes"):
            assert torch.equal(getattr(getattr(again, side), field), getattr(getattr(spoken, side), field))
    half = spoken.to(torch.bfloat16)
    assert half.speech.embeds.dtype == half.context.encoder_keys.embeds.dtype == torch.bfloat16


@pytest.mark.gpu
@torch.no_grad()
def test_a_gpu_writes_the_same():
    machines = [make_whisper(), make_whisper().to(torch.device("cuda"))]
    heard = [machine.hear(*machine.features(sounds())) for machine in machines]
    for language in ("en", "fr"):
        want, got = (
            machine.transcribe(part, language, torch.float32) for machine, part in zip(machines, heard, strict=True)
        )
        assert got == want
        again = machines[1].transcribe(heard[1], language, torch.float32)  # by the recorded step, not anew
        assert again == want
    half = machines[1].transcribe(heard[1], "en", torch.float16)
    assert all(transcript.text for transcript in half)


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
    clips = make_clips(prompts, "en", 28.5, joined=True, limit=3)
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
