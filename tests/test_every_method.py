"""Every method and preset in a model: it trains, every trained parameter learns, it answers, it is saved and opened."""

import copy

import pytest
import torch
from tiny import EOS, make_thinker

import audiopress
from audiopress import CompressedOmni, available
from audiopress.compression import from_description
from audiopress.data.collator import Encoder, OmniCollator
from audiopress.data.speech import speech_records
from audiopress.models import storage
from audiopress.models.loading import build_for
from audiopress.models.omni_small import omni_small_folder
from audiopress.models.packages import FetchError

from .test_stages import dialogue

NAMES = [f"{name}:{p}" if p else name for name, info in available().items() for p in ("", *info.presets)]
every = pytest.mark.parametrize("name", NAMES)
SMALL = {  # what keeps a method's layers small; rates stay those of the preset
    "atome:encoder": {"layers": 2},
    "attention-topk:topk-ast": {"layers": 2},
    "conv": {"ffn_size": 16},
    "qformer": {"width": 24, "heads": 2, "ffn_size": 16},
    "stacking": {"mlp_size": 32},
    "echoing": {"layers": 2},
}


# What learns nothing where there is no video to read.
BLIND = {"omnisift": ("compressor.project_video", "compressor.attention")}


def learn(model, batch, steps=6, blind=()):
    """Trains on one batch; gives the losses. All that is trained must get a gradient, but for names in `blind`."""
    names = {"adapter"} | ({"compressor"} if model.own_parameters("compressor") else set())
    model.add_adapter(r=4, dropout=0.0)
    model.set_trainable(names)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and not n.startswith(tuple(blind))}
    optimizer = torch.optim.Adam(trained.values(), lr=5e-3)
    losses, moved = [], set()
    model.train()
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        for n, p in trained.items():
            assert p.grad is not None, f"{n} has no gradient"
            assert p.grad.isfinite().all(), n
            if p.grad.any():
                moved.add(n)
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    assert moved == set(trained), f"never any gradient in {sorted(set(trained) - moved)}"
    return losses


def reopened(model, thinker, folder):
    """Saves a variant and opens it on a fresh copy of its base."""
    model.save_pretrained(folder)
    manifest = storage.read_manifest(folder)
    again = CompressedOmni(thinker, from_description(manifest["compressor"]))
    again.add_adapter(**manifest["adapter"])
    storage.load_weights(again, folder, manifest)
    return again.eval()


@every
def test_it_trains_answers_and_is_saved(name, tmp_path):
    thinker = make_thinker()
    base = copy.deepcopy(thinker)
    torch.manual_seed(0)
    small = SMALL.get(name, SMALL.get(name.partition(":")[0], {}))
    model = CompressedOmni(thinker, build_for(thinker, name, **small))
    losses = learn(model, dialogue())
    assert min(losses[-2:]) < losses[0], losses
    batch = dialogue("left", answers=False)
    options = {"max_new_tokens": 5, "eos_token_id": [EOS]}
    answers = model.generate(**batch, **options)
    again = reopened(model, base, tmp_path)
    assert torch.equal(again.generate(**batch, **options), answers)
    with torch.no_grad():
        assert torch.equal(again(**dialogue()).logits, model(**dialogue()).logits)


@pytest.mark.slow
@every
def test_it_learns_real_speech(name, tmp_path):
    """On real weights and recorded prompts: minutes over all methods."""
    try:
        omni_small_folder(download=False)
        records = speech_records("train", ["en"], 3, download=False)[:8]
    except FetchError as error:
        pytest.skip(f"{error}; `python train_compress.py` fetches it")
    model, processor = audiopress.load("omni-small:unaligned", device="cpu")
    torch.manual_seed(0)
    model.compressor = build_for(model.thinker, name)
    encoder = Encoder(processor)
    batch = OmniCollator(processor.tokenizer.pad_token_id)([encoder(r) for r in records])
    losses = learn(model, batch, steps=4, blind=BLIND.get(name.partition(":")[0], ()))
    assert min(losses[1:]) < losses[0], losses
    asked = [encoder(r, prompt_only=True) for r in records[:2]]
    prompts = OmniCollator(processor.tokenizer.pad_token_id, "left")(asked)
    answers = model.generate(**prompts, max_new_tokens=4)
    model.save_pretrained(tmp_path)
    del model
    again, _ = audiopress.load(tmp_path, device="cpu")
    assert torch.equal(again.generate(**prompts, max_new_tokens=4), answers)
