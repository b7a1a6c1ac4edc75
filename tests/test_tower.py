"""The tower step by step against transformers' own forward, and methods inside it."""

import pytest
import torch
from tiny import MEL, make_thinker

from audiopress import TokenStream
from audiopress.compression.base import Sizes
from audiopress.compression.encoder import (
    SUBSLOTS,
    EncoderConfig,
    EncoderMethod,
    block_targets,
    layer_targets,
    pool_states,
    resolve_layers,
)
from audiopress.kernels import attention_received, offsets, top_k
from audiopress.models import parts
from audiopress.models.encoders import encode_audio, hidden_audio
from audiopress.models.layout import audio_lengths

MEL_FRAMES = (203, 64, 601, 400, 3)  # several blocks, odd states, whole blocks, one token
NEEDS = frozenset({"encoder_hidden", "encoder_keys", "encoder_attention"})


class FirstOfBlock(EncoderMethod):
    """Keeps the first states of every block: the simplest method that can act inside the tower."""

    name = "first-of-block"

    def reduce(self, states, targets, layer):
        return states.select(top_k(torch.zeros_like(states.sizes), states.lengths, targets), targets)


def method(keep_ratio):
    return FirstOfBlock(EncoderConfig(keep_ratio, stage="encoder"), Sizes(32, 24))


def features(seed=0, frames=MEL_FRAMES):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(frames), MEL, max(frames), generator=generator)
    mask = (torch.arange(max(frames)) < torch.tensor(frames)[:, None]).long()
    return x, mask


@pytest.fixture(scope="module")
def thinker():
    return make_thinker().eval()


@torch.no_grad()
@pytest.mark.parametrize(
    "needs", [frozenset(), *(frozenset({n}) for n in sorted(NEEDS)), NEEDS], ids=["nothing", *sorted(NEEDS), "all"]
)
def test_step_by_step_equals_transformers(thinker, needs):
    want = thinker.get_audio_features(*features(), return_dict=True)
    want = want.pooler_output if want.pooler_output is not None else want.last_hidden_state
    whole, context = encode_audio(thinker, *features(), needs=needs)
    assert whole.lengths == tuple(audio_lengths(torch.tensor(MEL_FRAMES)))
    torch.testing.assert_close(whole.embeds, want, rtol=1e-4, atol=1e-5)
    assert {name for name in NEEDS if getattr(context, name) is not None} == needs
    states = torch.cat(hidden_audio(thinker, *features(), needs=needs))
    again, context_again = encode_audio(thinker, *features(), needs=needs, audio_hidden=states)
    torch.testing.assert_close(again.embeds, whole.embeds, rtol=1e-4, atol=1e-5)
    for name in needs:
        a, b = (getattr(c, name) for c in (context, context_again))
        torch.testing.assert_close(getattr(a, "embeds", a), getattr(b, "embeds", b), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_large_states_stay_finite_in_float16():
    """As in transformers' layers, whose steps are taken here where something is captured."""
    thinker = make_thinker().eval()
    last = parts.audio_tower(thinker).layers[-1]
    last.fc1.weight.mul_(1e3)
    last.fc2.weight.mul_(1e3)
    large = []
    last.fc2.register_forward_hook(lambda *args: large.append(args[-1].isinf().any()))
    audio, _ = encode_audio(thinker.half(), *features(), needs=frozenset({"encoder_keys"}))
    assert large == [True]
    assert audio.embeds.isfinite().all()


@torch.no_grad()
def test_keys_and_attention_are_those_of_the_last_layer(thinker):
    layer = parts.audio_tower(thinker).layers[-1].self_attn
    seen = {}
    handles = [
        getattr(layer, n).register_forward_hook(lambda m, a, out, n=n: seen.update({n: out}))
        for n in ("q_proj", "k_proj")
    ]
    thinker.get_audio_features(*features(), return_dict=True)
    for handle in handles:
        handle.remove()
    context = encode_audio(thinker, *features(), needs=NEEDS)[1]
    torch.testing.assert_close(context.encoder_keys.embeds, seen["k_proj"], rtol=1e-4, atol=1e-5)
    received, start = [], 0
    tokens = audio_lengths(torch.tensor(MEL_FRAMES))
    for frames, length in zip(MEL_FRAMES, tokens, strict=True):
        states = (frames - 1) // 2 + 1
        column = torch.zeros(states)
        for a in range(0, states, 100):  # one block, one head, one query at a time
            b = min(a + 100, states)
            for head in range(2):
                q, k = (
                    seen[n][start + a : start + b, 12 * head : 12 * head + 12].double() for n in ("q_proj", "k_proj")
                )
                column[a:b] += ((q @ k.T * layer.scaling).softmax(dim=1).mean(dim=0) * (b - a) / 2).float()
        received.append(column[: 2 * length].view(-1, 2).mean(dim=1))
        start += states
    torch.testing.assert_close(context.encoder_attention, torch.cat(received), rtol=1e-4, atol=1e-5)


def test_attention_received_in_parts_and_at_once(monkeypatch):
    q, k = torch.randn(2, 57, 3, 4)
    lengths = (20, 7, 30)
    whole = attention_received(q, k, lengths, 0.5)
    monkeypatch.setattr("audiopress.kernels.received._MAP_ENTRIES", 1)
    torch.testing.assert_close(attention_received(q, k, lengths, 0.5), whole)
    assert [float(x.mean()) for x in whole.split(lengths)] == pytest.approx([1, 1, 1])
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(attention_received(q, k, lengths, 0.5), whole)


@torch.no_grad()
@pytest.mark.parametrize("keep_ratio", [0.9, 0.5, 0.25, 0.03])
def test_a_method_inside_meets_its_budget(thinker, keep_ratio):
    tokens = audio_lengths(torch.tensor(MEL_FRAMES))
    out, _ = encode_audio(thinker, *features(), method=(m := method(keep_ratio)))
    assert out.lengths == m.budget(tokens)
    assert out.embeds.shape == (sum(out.lengths), 32)
    for n, clip in zip(tokens, out.split(), strict=True):
        assert (clip.slots.diff() > 0).all()
        assert ((clip.slots >= 0) & (clip.slots < n)).all()


@torch.no_grad()
def test_a_method_inside_shortens_the_later_layers(thinker):
    tower = parts.audio_tower(thinker)
    rows = []
    handles = [layer.fc1.register_forward_hook(lambda m, args, out: rows.append(len(out))) for layer in tower.layers]
    encode_audio(thinker, *features(), method=method(0.25))
    for handle in handles:
        handle.remove()
    total = 2 * sum(audio_lengths(torch.tensor(MEL_FRAMES)))
    assert rows == [pytest.approx(total / 2, abs=4), pytest.approx(total / 4, abs=4)]


@torch.no_grad()
def test_clips_inside_are_independent(thinker):
    together = encode_audio(thinker, *features(), method=method(0.4))[0]
    x, mask = features()
    for i, clip in enumerate(together.split()):
        frames = MEL_FRAMES[i]
        alone = encode_audio(thinker, x[i : i + 1, :, :frames], mask[i : i + 1, :frames], method=method(0.4))[0]
        torch.testing.assert_close(clip.embeds, alone.embeds, rtol=1e-4, atol=1e-5)
        assert torch.equal(clip.slots, alone.slots)
        assert torch.equal(clip.sizes, alone.sizes)


@torch.no_grad()
def test_keeping_everything_is_the_tower_itself(thinker):
    plain, whole = encode_audio(thinker, *features())[0], encode_audio(thinker, *features(), method=method(1))[0]
    assert torch.equal(plain.embeds, whole.embeds)


@torch.no_grad()
def test_states_cached_before_a_method_are_those_it_reads(thinker):
    m = method(0.5)
    states = torch.cat(hidden_audio(thinker, *features(), method=m))
    direct = encode_audio(thinker, *features(), method=m)[0]
    cached = encode_audio(thinker, *features(), method=m, audio_hidden=states)[0]
    torch.testing.assert_close(cached.embeds, direct.embeds, rtol=1e-4, atol=1e-5)
    assert torch.equal(cached.slots, direct.slots)


@torch.no_grad()
@pytest.mark.parametrize(("cached", "drawn"), [(0.5, 1.0), (1.0, 0.5), (0.5, 0.7)])
def test_cached_states_serve_every_keep_ratio(thinker, cached, drawn):
    states = torch.cat(hidden_audio(thinker, *features(), method=method(cached)))
    direct = encode_audio(thinker, *features(), method=method(drawn))[0]
    again = encode_audio(thinker, *features(), method=method(drawn), audio_hidden=states)[0]
    torch.testing.assert_close(again.embeds, direct.embeds, rtol=1e-4, atol=1e-5)
    assert torch.equal(again.slots, direct.slots)


def test_layers():
    assert resolve_layers(6, 18) == (2, 5, 8, 11, 14, 17)  # as A-ToMe's paper has them
    assert resolve_layers(6, 32) == (4, 9, 15, 20, 25, 31)
    assert resolve_layers(3, 12, inside=True) == (3, 6, 9)  # as TopK-AST's paper has them
    assert resolve_layers(3, 32, inside=True) == (8, 16, 24)
    assert [resolve_layers(n, 4, inside=True) for n in (1, 2, 3, 4)] == [(2,), (1, 2), (1, 2, 3), (0, 1, 2, 3)]
    assert resolve_layers((0, 3), 4) == (0, 3)
    with pytest.raises(ValueError, match="layers must be below the tower's 4, got 4, 9"):
        resolve_layers((1, 4, 9), 4)
    with pytest.raises(ValueError, match="from 1 to the tower's 4, got 5"):
        resolve_layers(5, 4)


def test_targets():
    assert block_targets((100, 100, 50), (0, 0, 0), (50,)) == [40, 40, 20]
    assert block_targets((100, 100, 7, 2), (0, 0, 0, 1), (1, 1)) == [1, 1, 1, 2]
    assert sum(block_targets((100,) * 7, (0,) * 7, (123,))) == 246
    assert layer_targets([100, 40], [25, 10], 2) == [[50, 20], [25, 10]]
    assert layer_targets([100], [100], 3) == [[100]] * 3


def test_pooling_weighs_by_size():
    slots, sizes = SUBSLOTS * torch.tensor([1, 3, 4, 5]), torch.tensor([1.5, 0.5, 0.5, 0.5])
    states = TokenStream(torch.tensor([[0.0], [4.0], [1.0], [1.0]]), (4,), slots, sizes)
    out = pool_states(states, (2,))
    assert out.embeds.flatten().tolist() == [1.0, 1.0]
    assert out.sizes.tolist() == [2.0, 1.0]
    assert out.slots.tolist() == [0, 2]  # states 1.5 and 4.5
    assert offsets(out.lengths).tolist() == [0, 2]


@torch.no_grad()
@pytest.mark.parametrize(
    ("needs", "keep_ratio"), [(frozenset(), None), (NEEDS, None), (frozenset(), 0.3)], ids=["plain", "needs", "method"]
)
def test_long_clips_pass_in_parts(thinker, monkeypatch, needs, keep_ratio):
    """A hundred states at a time give what all at once give, also where a clip is cut."""

    def run():
        return encode_audio(
            thinker, *features(), needs=needs, method=None if keep_ratio is None else method(keep_ratio)
        )

    whole, context = run()
    monkeypatch.setattr("audiopress.models.tower.AT_ONCE", 150)
    cut, cut_context = run()
    assert cut.lengths == whole.lengths
    assert torch.equal(cut.slots, whole.slots)
    torch.testing.assert_close(cut.embeds, whole.embeds, rtol=1e-4, atol=1e-5)
    for name in needs:
        a, b = (getattr(c, name) for c in (context, cut_context))
        torch.testing.assert_close(getattr(a, "embeds", a), getattr(b, "embeds", b), rtol=1e-4, atol=1e-5)
