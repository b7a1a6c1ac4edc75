"""The model: equal to transformers without a compressor, right with one, saved and loaded whole."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import EOS, Batch, make_thinker
from transformers import GenerationConfig, StaticCache

from audiopress import CompressedOmni, build
from audiopress.compression import checks
from audiopress.models import storage
from audiopress.models.encoders import hidden_audio
from audiopress.models.static_cache import BUCKET

GREEDY = {"max_new_tokens": 6, "eos_token_id": [EOS]}


def media_batch(side="right", seed=0):
    """Audio alone, video alone, several audios in one turn, text alone."""
    b = Batch(seed)
    b.add(b.text(3), b.audio(203), b.text(4))
    b.add(b.text(2), b.video(2, 4, 8, 0.9), b.text(5))
    b.add(b.text(2), b.audio(64), b.text(2), b.audio(330), b.text(2))
    b.add(b.text(9))
    b.add(b.text(2), b.image(4, 4), b.text(2))
    return b.build(side)


def in_video_batch(side="right", seed=0):
    b = Batch(seed)
    b.add(b.text(3), b.video_with_audio(3, 4, 4, 600, 2.0), b.text(4))
    b.add(b.text(2), b.video_with_audio(2, 4, 8, 250), b.text(3))
    return b.build(side)


def real(tensor, batch):
    return tensor[batch["attention_mask"].bool()]


def test_without_a_compressor_logits_equal_transformers(thinker):
    batch = media_batch()
    ours = CompressedOmni(thinker)(**batch).logits
    assert torch.equal(real(ours, batch), real(thinker(**batch, use_cache=False).logits, batch))


def test_without_a_compressor_logits_equal_transformers_with_sound_in_video(thinker):
    batch = in_video_batch()
    ours = CompressedOmni(thinker)(**batch).logits
    theirs = thinker(**batch, use_cache=False, use_audio_in_video=True).logits
    assert torch.equal(real(ours, batch), real(theirs, batch))


def test_the_identity_compressor_changes_nothing(thinker):
    batch = media_batch()
    plain = CompressedOmni(thinker)(**batch).logits
    none = CompressedOmni(thinker, build("none", hidden_size=32))(**batch).logits
    assert torch.equal(plain, none)


@pytest.mark.parametrize("method", ["none", "uniform-stride", "pooling"])
def test_a_batch_equals_its_samples_one_by_one(thinker, method):
    options = {} if method == "none" else {"keep_ratio": 0.3}
    model = CompressedOmni(thinker, build(method, hidden_size=32, **options))
    makers = [
        lambda b: [b.text(3), b.audio(203), b.text(4)],
        lambda b: [b.text(9)],
        lambda b: [b.text(2), b.audio(64), b.text(2), b.audio(330), b.text(2)],
        lambda b: [b.text(3), b.video_with_audio(2, 4, 4, 300), b.text(1)],
    ]
    whole = Batch()
    singles = []
    for maker in makers:
        state = whole.generator.get_state()
        whole.add(*maker(whole))
        single = Batch()
        single.generator.set_state(state)
        singles.append(single.add(*maker(single)).build())
    together, _ = model.encode(**whole.build())
    logits = model(**whole.build()).logits
    for row, single in enumerate(singles):
        alone = model(**single).logits[0]
        assert int(together.mask[row].sum()) == len(alone)
        torch.testing.assert_close(logits[row, : len(alone)], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_without_a_compressor_equals_transformers(thinker, side):
    for batch, extra in ((media_batch(side), {}), (in_video_batch(side), {"use_audio_in_video": True})):
        ours = CompressedOmni(thinker).generate(**batch, **GREEDY)
        if side == "right":  # transformers cannot generate from right-padded prompts; ours pads anew
            continue
        theirs = thinker.generate(**batch, **extra, do_sample=False, **GREEDY)[:, batch["input_ids"].shape[1] :]
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("method", ["none", "random", "uniform-stride", "stacking"])
def test_cached_decoding_equals_recomputing(thinker, method):
    torch.manual_seed(0)
    options = {"none": {}}.get(method, {"keep_ratio": 0.25})
    model = CompressedOmni(thinker, build(method, hidden_size=32, **options)).eval()
    for batch in (media_batch("left"), in_video_batch("left")):
        answers = model.generate(**batch, max_new_tokens=6, min_new_tokens=6, eos_token_id=[EOS])
        inputs, _ = model.encode(**batch, padding_side="left")
        embeds, mask, positions = inputs.embeds, inputs.mask, inputs.positions
        for step in range(6):
            logits = thinker(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False).logits
            scores = logits[:, -1].clone()
            scores[:, EOS] = -torch.inf
            token = scores.argmax(1)
            assert torch.equal(token, answers[:, step])
            embeds = torch.cat([embeds, thinker.get_input_embeddings()(token)[:, None]], dim=1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            at = inputs.mask.sum(1) + step + inputs.decode_offset  # what a generated token's position is
            positions = torch.cat([positions, at.expand(4, -1)[..., None]], dim=2)


def test_answers_do_not_depend_on_the_padding_side_or_the_batch(thinker):
    model = CompressedOmni(thinker, build("uniform-stride", hidden_size=32, keep_ratio=0.25))
    left = model.generate(**media_batch("left"), **GREEDY)
    assert torch.equal(left, model.generate(**media_batch("right"), **GREEDY))


def test_a_prompt_must_end_in_text(thinker):
    b = Batch()
    batch = b.add(b.text(2), b.video(2, 8, 8)[:-1]).build()
    with pytest.raises(ValueError, match="must end in text"):
        CompressedOmni(thinker).generate(**batch)


def labelled(batch):
    labels = torch.full_like(batch["input_ids"], -100)
    last = batch["attention_mask"].sum(1) - 1
    for row, end in enumerate(last):
        labels[row, end - 1 : end + 1] = batch["input_ids"][row, end - 1 : end + 1]
    return labels


def test_loss_equals_transformers_and_logits_are_computed_at_labels_alone(thinker):
    batch = media_batch()
    labels = labelled(batch)
    rows = []
    handle = thinker.lm_head.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[:-1].numel()))
    out = CompressedOmni(thinker)(**batch, labels=labels)
    handle.remove()
    assert rows == [10]
    assert out.logits.shape == (10, 128)
    torch.testing.assert_close(out.loss, thinker(**batch, labels=labels).loss)
    halved = CompressedOmni(thinker)(**batch, labels=labels, num_items_in_batch=20).loss
    torch.testing.assert_close(halved, out.loss / 2)


def test_last_logits_alone(thinker):
    batch = media_batch()
    model = CompressedOmni(thinker)
    torch.testing.assert_close(model(**batch, logits_to_keep=2).logits, model(**batch).logits[:, -2:])


def test_a_batch_without_labels_is_an_error(thinker):
    batch = media_batch()
    with pytest.raises(ValueError, match="no token of this batch is labelled"):
        CompressedOmni(thinker)(**batch, labels=torch.full_like(batch["input_ids"], -100))


def test_arguments_are_checked(thinker):
    with pytest.raises(TypeError, match="unknown argument input_feature;"):
        CompressedOmni(thinker)(**media_batch(), input_feature=1)
    with pytest.raises(ValueError, match="width 16, the LLM has 32"):
        CompressedOmni(thinker, build("none", hidden_size=16))
    batch = media_batch()
    batch["input_features"] = batch["input_features"][:1]
    batch["feature_attention_mask"] = batch["feature_attention_mask"][:1]
    with pytest.raises(ValueError, match="AUDIO placeholders but"):
        CompressedOmni(thinker)(**batch)
    short = Batch()
    batch = short.add(short.text(2), short.audio(2)).build()
    with pytest.raises(ValueError, match="audio clip 0 of 1 is too short"):
        CompressedOmni(thinker)(**batch)


def hooks(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_hidden_states_are_captured_and_hooks_removed(thinker):
    model = CompressedOmni(thinker, build("stacking", hidden_size=32, encoder_size=24, source="hidden", k=4))
    batch = media_batch()
    before = hooks(thinker)
    _, audio = model.encode(**batch)
    assert audio.lengths == model.compressor.budget([51, 16, 82])
    assert hooks(thinker) == before
    batch["feature_attention_mask"][:, :] = 0
    with pytest.raises(ValueError, match="AUDIO placeholders but 0"):
        model.encode(**batch)
    assert hooks(thinker) == before


def trained_model(thinker, method="stacking", **options):
    torch.manual_seed(1)
    model = CompressedOmni(thinker, build(method, hidden_size=32, **options), base="tiny")
    model.add_adapter(r=4, alpha=4, dropout=0.0)
    model.add_ctc(0.5)
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_all_that_is_trained_and_nothing_else(fresh_thinker, checkpointing):
    model = trained_model(fresh_thinker, keep_ratio=0.5)
    model.set_trainable({"compressor", "adapter", "projector"})
    if checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    batch = media_batch()
    out = model(**batch, labels=labelled(batch))
    assert set(out.losses) == {"text", "ctc"}
    torch.testing.assert_close(out.loss, sum(out.losses.values()))
    out.loss.backward()
    own = {id(p) for part in storage.PARTS for p in model.own_parameters(part).values()}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in own), name
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    lora = [n for n, p in fresh_thinker.named_parameters() if "lora_" in n]
    assert len(lora) == 2 * 2 * 6  # A and B, two layers, q k v o up down: the LLM's alone
    assert not any("tower" in n or "visual" in n for n in lora)


def test_gradient_checkpointing_changes_no_gradient(fresh_thinker):
    batch = media_batch()
    grads = []
    for checkpointing in (False, True):
        model = trained_model(make_thinker(), keep_ratio=0.5)
        model.set_trainable({"adapter"})
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        model(**batch, labels=labelled(batch)).loss.backward()
        grads.append({n: p.grad for n, p in model.own_parameters("adapter").items()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_set_trainable_is_checked(fresh_thinker):
    model = CompressedOmni(fresh_thinker, build("random", hidden_size=32, keep_ratio=0.5))
    with pytest.raises(ValueError, match="no parameter in the compressor to train"):
        model.set_trainable({"compressor"})
    with pytest.raises(ValueError, match="no parameter in the adapter to train"):
        model.set_trainable({"adapter"})
    with pytest.raises(ValueError, match="trainable parts are compressor, adapter, projector, got lora"):
        model.set_trainable({"lora"})


def perturb(model):
    with torch.no_grad():
        for tensor in storage.own_tensors(model).values():
            tensor.add_(torch.randn_like(tensor) * 0.1)


@pytest.fixture
def tiny_base(monkeypatch):
    """Lets `load` open the tiny thinker by the name "tiny"."""
    from audiopress.models import loading

    seeds = {"tiny": 0, "other": 1}
    monkeypatch.setattr(loading, "load_base", lambda name, dtype: (make_thinker(seeds[name]), None))


def test_saved_and_loaded_whole(tiny_base, tmp_path):
    model = trained_model(make_thinker(), keep_ratio=0.5)
    model.set_trainable({"compressor", "adapter", "projector"})
    perturb(model)
    batch = media_batch("left")
    expected = model.eval().generate(**batch, **GREEDY)
    logits = model(**batch).logits
    model.save_pretrained(tmp_path / "saved")
    names = {n.split(".")[0] for n in load_file(next((tmp_path / "saved").glob("*.safetensors")))}
    assert names == {"compressor", "adapter", "projector", "alignment"}  # ours alone; the base by reference
    again = CompressedOmni.from_pretrained(tmp_path / "saved", device="cpu")
    torch.testing.assert_close(again(**batch).logits, logits, rtol=1e-4, atol=1e-4)  # its towers are packed
    assert torch.equal(again.generate(**batch, **GREEDY), expected)
    assert again.compressor.describe() == model.compressor.describe()
    manifest = json.loads((tmp_path / "saved" / "audiopress.json").read_text())
    assert manifest["base"]["name"] == "tiny"


def test_another_base_is_refused(tiny_base, tmp_path):
    trained_model(make_thinker(), keep_ratio=0.5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"trained on another base model \('tiny'\): weights"):
        CompressedOmni.from_pretrained(tmp_path, base="other", device="cpu")


def test_a_full_disk_while_saving_loses_nothing(tiny_base, tmp_path, monkeypatch):
    model = trained_model(make_thinker(), keep_ratio=0.5)
    batch = media_batch()
    model.eval().save_pretrained(tmp_path)
    expected = model(**batch).logits

    def full(path, content):
        path.open("wb").write(content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    perturb(model)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path / "new")
    found = CompressedOmni.from_pretrained(tmp_path, device="cpu")(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="holds no saved audiopress model"):
        CompressedOmni.from_pretrained(tmp_path / "new", base="tiny", device="cpu")
    assert not list(tmp_path.rglob("*partial*"))


def test_damage_is_noticed(tiny_base, tmp_path):
    trained_model(make_thinker(), keep_ratio=0.5).save_pretrained(tmp_path)
    weights = next(tmp_path.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged: sha256"):
        CompressedOmni.from_pretrained(tmp_path, device="cpu")
    weights.unlink()
    with pytest.raises(ValueError, match="is incomplete"):
        CompressedOmni.from_pretrained(tmp_path, device="cpu")
    (tmp_path / "audiopress.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        CompressedOmni.from_pretrained(tmp_path, device="cpu")


@pytest.mark.parametrize("cached", [False, True])
def test_trained_parts_are_float32_beside_a_bfloat16_base(fresh_thinker, cached):
    model = trained_model(fresh_thinker.to(torch.bfloat16), keep_ratio=0.5)
    model.set_trainable({"compressor", "adapter", "projector"})
    batch = media_batch()
    if cached:
        states = hidden_audio(fresh_thinker, batch["input_features"], batch["feature_attention_mask"])
        batch["audio_hidden"] = torch.cat(states)
    model.train()
    model(**batch, labels=labelled(batch)).loss.backward()
    model.ctc_loss(**batch, labels=labelled(batch)).backward()
    dtypes = {p.dtype for part in storage.PARTS for p in model.own_parameters(part).values()}
    assert dtypes == {torch.float32}
    batch.pop("audio_hidden", None)
    model.eval().generate(**batch, **GREEDY)


@pytest.mark.parametrize("source", ["tokens", "hidden"])
def test_kept_states_of_the_tower_give_what_the_tower_gives(thinker, source):
    options = {"k": 4} if source == "hidden" else {"keep_ratio": 0.5}
    model = CompressedOmni(thinker, build("stacking", hidden_size=32, encoder_size=24, source=source, **options)).eval()
    batch = media_batch()
    states = hidden_audio(thinker, batch["input_features"], batch["feature_attention_mask"])
    assert [len(s) for s in states] == [102, 32, 165]
    expected = model(**batch).logits
    rows = []
    handle = storage.parts.audio_tower(thinker).layers[0].register_forward_hook(lambda *_: rows.append(1))
    got = model(**batch, audio_hidden=torch.cat(states)).logits
    handle.remove()
    assert not rows
    torch.testing.assert_close(got, expected)


def test_media_come_in_pairs(thinker):
    batch = media_batch()
    del batch["pixel_values"]
    with pytest.raises(ValueError, match="pixel_values and image_grid_thw go together, but pixel_values is missing"):
        CompressedOmni(thinker)(**batch)


@pytest.fixture
def made_caches(monkeypatch):
    """Lists the sizes of the static caches that are made."""
    made = []

    def make(config, max_cache_len):
        made.append(max_cache_len)
        return StaticCache(config, max_cache_len=max_cache_len)

    monkeypatch.setattr("audiopress.models.static_cache.StaticCache", make)
    return made


def prompt(*seconds):
    b = Batch()
    for n in seconds:
        b.add(b.text(3), b.audio(n), b.text(2))
    return b.build("left")


@pytest.mark.parametrize("compressor", ["none", "ward"])
def test_a_static_cache_gives_the_same_answers(thinker, compressor, made_caches):
    """Also when it is used again, for a shorter prompt, and for another number of them."""
    method = build(compressor, keep_ratio=1.0 if compressor == "none" else 0.5, hidden_size=32)
    model = CompressedOmni(thinker, method).eval()
    prompts = [prompt(120), prompt(90), prompt(60, 200)]
    options = {"max_new_tokens": 6, "min_new_tokens": 6}
    want = [model.generate(**inputs, **options) for inputs in prompts]
    model.static_cache = True
    for inputs, answer in zip(prompts, want, strict=True):
        assert torch.equal(model.generate(**inputs, **options), answer)
    assert made_caches == [BUCKET, BUCKET]


def test_a_static_cache_is_used_only_where_it_fits(fresh_thinker, made_caches):
    model = CompressedOmni(fresh_thinker, build("ward", keep_ratio=0.5, hidden_size=32)).eval()
    inputs, options = prompt(90), {"max_new_tokens": 4, "min_new_tokens": 4}
    want = model.generate(**inputs, **options)
    beams = model.generate(**inputs, **options, num_beams=2)
    model.static_cache = True
    with torch.inference_mode():
        assert torch.equal(model.generate(**inputs, **options), want)
    assert torch.equal(model.generate(**inputs, **options), want)
    assert len(made_caches) == 2, "what inference mode made cannot be written to outside of it"
    config = GenerationConfig(num_beams=2, do_sample=False, **options)
    assert torch.equal(model.generate(**inputs, generation_config=config), beams)
    assert torch.equal(model.generate(**inputs, **options, num_beams=2), beams)
    assert torch.equal(model.generate(**inputs, **options, use_cache=False), want)
    assert len(made_caches) == 2
    assert torch.equal(model.generate(**inputs, **options, num_beams=1), want)
    assert len(made_caches) == 2
    inputs["input_features"] = inputs["input_features"].double()
    model.double().generate(**inputs, **options)
    with torch.autocast("cpu", torch.bfloat16):
        model.float().generate(**prompt(90), **options)
    assert len(made_caches) == 3


def test_values_are_checked_before_sampling(thinker, monkeypatch):
    """Drawing from NaN would stop a GPU for good."""
    checked = []
    model = CompressedOmni(thinker).eval()
    monkeypatch.setattr(thinker, "generate", lambda **_: checked.append(checks._collected.get() is None))
    for options in ({}, {"do_sample": True}, {"generation_config": GenerationConfig(do_sample=True)}):
        model.generate(**prompt(90), **options)
    assert checked == [False, True, True]
