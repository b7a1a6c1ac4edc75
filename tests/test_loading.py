"""`load` on a folder laid out as the released 3B and 7B checkpoints are, and on what is none."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_processor, tiny_thinker, write_checkpoint
from transformers import LlamaConfig

import audiopress
from audiopress.models.layout import Kind
from audiopress.models.loading import load_base


def batch_of(processor):
    """Text and 0.4 s of sound, as the processor makes it."""
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "What is said?"}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    sound = torch.randn(6_400, generator=torch.Generator().manual_seed(0)).numpy()
    return dict(processor(text=[text], audio=[sound], return_tensors="pt"))


@pytest.fixture(scope="module")
def thinker():
    return tiny_thinker(tiny_processor())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, thinker):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, thinker)
    return folder


def test_the_thinker_of_a_whole_checkpoint(checkpoint, thinker):
    model, processor = audiopress.load(str(checkpoint), device="cpu")
    assert type(model.thinker) is type(thinker)  # no talker, no token2wav
    assert model.thinker.state_dict().keys() == thinker.state_dict().keys()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    batch = batch_of(processor)
    assert torch.equal(model(**batch).logits, thinker(**batch, use_cache=False).logits)


def test_bf16_when_asked(checkpoint, thinker):
    model, processor = audiopress.load(str(checkpoint), device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    logits = model(**batch_of(processor)).logits
    assert logits.dtype == torch.bfloat16
    expected = thinker(**batch_of(processor), use_cache=False).logits
    assert float((logits.float() - expected).detach().norm() / expected.detach().norm()) < 0.05


def test_ids_are_found_in_the_config_of_the_thinker(checkpoint):
    model, processor = audiopress.load(str(checkpoint), device="cpu")
    tokenizer = processor.tokenizer
    for name in ("vision_start", "vision_end", "audio_start", "audio_end", "audio", "video", "image"):
        token = {"start": "bos", "end": "eos"}.get(name.split("_")[-1])
        attribute = f"{name.split('_')[0]}_{token}_token" if token else f"{name}_token"
        assert getattr(model.token_ids, name) == tokenizer.convert_tokens_to_ids(getattr(tokenizer, attribute))


def test_answers_end_where_the_processor_says(checkpoint):
    """The released checkpoints' thinker has no generation config of its own: it would never stop."""
    model, processor = audiopress.load(str(checkpoint), device="cpu")
    assert model.thinker.generation_config.eos_token_id == [processor.tokenizer.eos_token_id]
    assert model.thinker.generation_config.pad_token_id == processor.tokenizer.pad_token_id
    with torch.no_grad():  # the answer's first token is its end
        head = model.thinker.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.clone())
        hidden = []
        handle = head.register_forward_pre_hook(lambda module, args: hidden.append(args[0][0, -1]))
        model(**batch_of(processor))
        handle.remove()
        head.weight[processor.tokenizer.eos_token_id] = 100 * hidden[0]
    assert model.generate(**batch_of(processor), max_new_tokens=5).tolist() == [[processor.tokenizer.eos_token_id]]


def test_with_a_method_by_name(checkpoint):
    model, processor = audiopress.load(str(checkpoint), "pooling", keep_ratio=0.5, device="cpu")
    assert model.compressor.hidden_size == 32
    inputs, _ = model.encode(**batch_of(processor))
    assert int((inputs.layout.kind == Kind.AUDIO).sum()) == 5
    model, _ = audiopress.load(str(checkpoint), "stacking", source="hidden", k=2, device="cpu")
    assert model.compressor.encoder_size == 24


def test_with_a_built_method(checkpoint):
    compressor = audiopress.build("pooling", keep_ratio=0.5, hidden_size=32)
    assert audiopress.load(str(checkpoint), compressor, device="cpu")[0].compressor is compressor
    with pytest.raises(ValueError, match="built for width 16, the LLM has 32"):
        audiopress.load(str(checkpoint), audiopress.build("pooling", hidden_size=16), device="cpu")


def test_a_folder_of_the_thinker_alone(checkpoint, thinker):
    tiny_processor().save_pretrained(checkpoint / "thinker")
    model, processor = audiopress.load(str(checkpoint / "thinker"), device="cpu")
    batch = batch_of(processor)
    assert torch.equal(model(**batch).logits, thinker(**batch, use_cache=False).logits)


@pytest.fixture
def saved(checkpoint, tmp_path):
    model, _ = audiopress.load(str(checkpoint), "pooling", keep_ratio=0.5, device="cpu")
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_variant(checkpoint, saved, tmp_path):
    model, processor = audiopress.load(str(saved), device="cpu")
    expected = audiopress.load(str(checkpoint), "pooling", keep_ratio=0.5, device="cpu")[0]
    batch = batch_of(processor)
    assert torch.equal(model(**batch).logits, expected(**batch).logits)
    assert model.compressor.describe() == expected.compressor.describe()
    (tmp_path / "moved").symlink_to(checkpoint)
    moved, _ = audiopress.load(saved, base=tmp_path / "moved", device="cpu")  # a Path is as good as its name
    assert torch.equal(moved(**batch).logits, model(**batch).logits)
    moved.save_pretrained(saved)
    assert audiopress.load(saved, device="cpu")[0].base == str(tmp_path / "moved")


def test_a_saved_variant_brings_its_own_compressor(saved):
    for extra in ({"compressor": "pooling"}, {"kind": "max"}):
        with pytest.raises(ValueError, match="is a saved variant with its own compressor; give none"):
            audiopress.load(str(saved), device="cpu", **extra)


def test_a_variant_of_an_earlier_format_is_refused(saved):
    manifest = json.loads((saved / "audiopress.json").read_text())
    del manifest["video_compressor"], manifest["keep_ratios"]
    (saved / "audiopress.json").write_text(json.dumps(manifest | {"format": 1}))
    with pytest.raises(ValueError, match="has format 1; this version reads 2"):
        audiopress.load(str(saved), device="cpu")


def test_a_saved_variant_at_another_keep_ratio(checkpoint, saved):
    model, processor = audiopress.load(str(saved), device="cpu", keep_ratio=0.25)
    expected = audiopress.load(str(checkpoint), "pooling", keep_ratio=0.25, device="cpu")[0]
    batch = batch_of(processor)
    assert torch.equal(model(**batch).logits, expected(**batch).logits)
    with pytest.raises(ValueError, match=r"keep_ratio .* must be in"):
        audiopress.load(str(saved), device="cpu", keep_ratio=2)


def test_what_is_no_model_is_named(tmp_path):
    allowed = r"is neither 'omni-small', nor a saved variant, nor a Qwen2\.5-Omni checkpoint"
    for name in (tmp_path / "nowhere", tmp_path, "some-user/some-model", "omni-smal"):
        with pytest.raises(ValueError, match=f"model '{name}' {allowed}"):
            audiopress.load(str(name), device="cpu")


def test_another_architecture_is_named(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a llama, not a Qwen2\.5-Omni checkpoint"):
        audiopress.load(str(tmp_path), device="cpu")
    (tmp_path / "config.json").write_text('{"model_type": "never_heard_of"}')
    with pytest.raises(ValueError, match=r"nor a Qwen2\.5-Omni checkpoint"):
        audiopress.load(str(tmp_path), device="cpu")


def test_a_checkpoint_without_the_thinker_is_named(checkpoint, tmp_path):
    """The talker of a checkpoint is a Qwen2.5-Omni model too, and not the one."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_omni_talker"}')
    with pytest.raises(ValueError, match=r"is a qwen2_5_omni_talker, not a Qwen2\.5-Omni checkpoint"):
        load_base(str(tmp_path), torch.float32)


def test_missing_weights_are_named(checkpoint, tmp_path):
    """Transformers would fill them in at random."""
    for file in checkpoint.glob("*.json"):
        shutil.copy(file, tmp_path)
    state = {}
    for file in checkpoint.glob("*.safetensors"):
        state |= load_file(file)
    (tmp_path / "model.safetensors.index.json").unlink()
    del state["thinker.model.norm.weight"], state["thinker.audio_tower.proj.bias"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 2 of the thinker's weights: .*audio_tower\.proj\.bias"):
        audiopress.load(str(tmp_path), device="cpu")


def test_options_need_a_method(checkpoint):
    with pytest.raises(ValueError, match="options keep_ratio go with a compressor's name, got None"):
        audiopress.load(str(checkpoint), keep_ratio=0.5, device="cpu")
    compressor = audiopress.build("pooling", hidden_size=32)
    with pytest.raises(ValueError, match="options k go with a compressor's name, got Pooling"):
        audiopress.load(str(checkpoint), compressor, k=2, device="cpu")
    with pytest.raises(ValueError, match="pooling has no option keep; its options are keep_ratio"):
        audiopress.load(str(checkpoint), "pooling", keep=2, device="cpu")
    with pytest.raises(ValueError, match="unknown method 'poolin'"):
        audiopress.load(str(checkpoint), "poolin", device="cpu")
