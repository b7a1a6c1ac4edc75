"""Prompts that begin alike are read once, and answered as `generate` answers each by itself."""

import pytest
import torch
from tiny import Batch, make_thinker

from audiopress import CompressedOmni
from audiopress.models import asking, parts
from audiopress.models.asking import answer, common
from audiopress.models.loading import build_for

OPTIONS = {
    None: {},
    "pooling": {"keep_ratio": 0.3},
    "ward": {"keep_ratio": 0.2},  # sizes on the keys
    "speechprune": {"keep_ratio": 0.3},  # reads the question
    "omnizip": {"keep_ratio": 0.3},  # chooses from both kinds
    "echoing": {"keep_ratio": 0.3, "layers": 1},  # other rotary sections
}


def group(seed, questions, side="right"):
    """Prompts about one clip, whose questions have so many tokens."""
    batch = Batch(seed)
    for i, tokens in enumerate(questions):
        batch.generator.manual_seed(seed)
        begin = [batch.text(3), batch.video_with_audio(3, 4, 4, 200 + 100 * seed, 2.0), batch.text(2)]
        batch.generator.manual_seed(100 * seed + i)
        batch.add(*begin, batch.text(tokens))
    return batch.build(side)


def make_model(name, positions="original"):
    thinker = make_thinker()
    compressor = None if name is None else build_for(thinker, name, **OPTIONS[name])
    return CompressedOmni(thinker, compressor, positions=positions).eval()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("name", OPTIONS, ids=str)
def test_answers_are_those_of_generate(name, positions, side):
    model = make_model(name, positions)
    groups = [(1, (3, 6, 2)), (2, (4,)), (3, (5, 5))]
    found = answer(model, [group(*one, side) for one in groups], 6)
    for one, ids in zip(groups, found, strict=True):
        told = model.generate(**group(*one, "left"), max_new_tokens=6)
        assert ids[:, : told.shape[1]].tolist() == told.tolist()


def test_what_they_begin_with_is_read_once():
    model = make_model("pooling")
    inputs, _ = model.encode(**group(1, (3, 6, 2)))
    ends = inputs.mask.sum(dim=1)
    shared = common(inputs)
    assert shared == int(ends[0]) - 3
    read = []
    llm = parts.language_model(model.thinker)
    llm.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    answer(model, [group(1, (3, 6, 2))], 2)
    assert read == [(1, shared), (1, 3 + 6 + 2), (3, 1)]


def test_all_end_with_the_last(monkeypatch):
    model = make_model(None)
    (told,) = answer(model, [group(1, (3, 6))], 8)
    end = int(told[0, 2])
    monkeypatch.setattr(asking.storage, "eos_ids", lambda thinker: [end, int(told[1, 1])])
    (found,) = answer(model, [group(1, (3, 6))], 8)
    for row, whole in zip(found.tolist(), told.tolist(), strict=True):
        length = next(i for i, token in enumerate(whole) if token in (end, int(told[1, 1]))) + 1
        assert row[:length] == whole[:length]
        assert set(row[length:]) <= {whole[length - 1]}


def test_prompts_that_do_not_begin_alike():
    model = make_model(None)
    prompts = [[1, 2, 3], [4, 2, 3]]
    (found,) = answer(model, [{"input_ids": torch.tensor(prompts)}], 4)
    told = torch.cat([model.generate(torch.tensor([prompt]), max_new_tokens=4) for prompt in prompts])
    assert found.tolist() == told.tolist()
