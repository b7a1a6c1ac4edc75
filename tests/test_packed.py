"""Both towers with packed attention against transformers' own way, and the audio tower's gradients."""

from types import SimpleNamespace

import pytest
import torch
from tiny import make_thinker

from audiopress.kernels.varlen import can_use_varlen
from audiopress.models import parts
from audiopress.models.encoders import encode_audio, encode_image, encode_video, hidden_audio
from audiopress.models.packed import align_mlp, is_packed, use_packed_attention, vision_plan

from .test_tower import features

GRIDS = [(2, 4, 8), (3, 8, 12), (1, 4, 4)]  # patches; windows of 8 x 8 patches cut some of them


@pytest.fixture(scope="module")
def towers():
    plain, packed = make_thinker(), make_thinker()
    use_packed_attention(packed)
    return plain, packed


def pixels(grids, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = sum(t * h * w for t, h, w in grids)
    return torch.randn(count, 3 * 2 * 14 * 14, generator=generator), torch.tensor(grids)


@torch.no_grad()
def test_the_audio_tower_gives_the_same(towers):
    plain, packed = (encode_audio(t, *features())[0] for t in towers)
    assert is_packed(parts.audio_tower(towers[1]))
    torch.testing.assert_close(packed.embeds, plain.embeds, rtol=1e-4, atol=1e-5)
    assert packed.lengths == plain.lengths


@torch.no_grad()
@pytest.mark.parametrize("needs", [frozenset(), frozenset({"encoder_keys"})], ids=str)
def test_states_to_be_kept_are_the_same(towers, needs):
    plain, packed = (torch.cat(hidden_audio(t, *features(), needs)) for t in towers)
    torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("grids", [GRIDS, GRIDS[:1], GRIDS[::-1], [(1, 4, 4)]])
@pytest.mark.parametrize("encode", [encode_video, encode_image])
def test_the_vision_tower_gives_the_same(towers, grids, encode):
    plain, packed = (encode(t, *pixels(grids)) for t in towers)
    torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_whoever_calls_the_towers_gets_the_same(towers):
    """Also without our arguments: by transformers' own methods."""
    x, mask = features()
    plain, packed = (t.get_audio_features(x, mask, return_dict=True).last_hidden_state for t in towers)
    torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-5)
    plain, packed = (
        torch.cat(list(t.get_video_features(*pixels(GRIDS), return_dict=True).pooler_output)) for t in towers
    )
    torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-5)


def test_gradients_are_the_same(towers):
    gradients = []
    for thinker in towers:
        thinker.requires_grad_(True).zero_grad()
        audio, _ = encode_audio(thinker, *features())
        (audio.embeds.square().sum() + encode_video(thinker, *pixels(GRIDS)).square().sum()).backward()
        gradients.append({n: p.grad for n, p in thinker.named_parameters() if p.grad is not None})
        thinker.requires_grad_(False)
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("width", [30, 32, 33])
def test_a_padded_feed_forward_computes_the_same(towers, width):
    kind = type(parts.vision_tower(towers[0]).blocks[0].mlp)
    torch.manual_seed(0)
    mlp = kind(SimpleNamespace(hidden_size=16, intermediate_size=width, hidden_act="silu"), bias=True)
    x = torch.randn(7, 16)
    want = mlp(x)
    align_mlp(mlp)
    align_mlp(mlp)
    assert mlp.gate_proj.weight.shape[0] == mlp.down_proj.weight.shape[1] == -(-width // 8) * 8
    torch.testing.assert_close(mlp(x), want)


def test_a_grid_is_worked_out_once(towers):
    tower = parts.vision_tower(towers[1])
    first, second = (vision_plan(tower, GRIDS, torch.device("cpu")) for _ in range(2))
    assert all(first[name] is second[name] for name in first)
    assert vision_plan(tower, GRIDS[:2], torch.device("cpu"))["max_seqlen"] == 96


def test_a_grid_seen_in_inference_mode_serves_training(towers):
    grids = [(1, 4, 12)]
    with torch.inference_mode():
        encode_video(towers[1], *pixels(grids))
    values, grid = pixels(grids)
    encode_video(towers[1], values.requires_grad_(), grid).sum().backward()
    assert values.grad.isfinite().all()


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu_flash_attention_runs_them(towers):
    plain, packed = (t.cuda().bfloat16() for t in towers)
    x, mask = (t.cuda() for t in features())
    video, grid = (t.cuda() for t in pixels(GRIDS))
    query = torch.zeros(3, 2, 16, device="cuda", dtype=torch.bfloat16)
    assert can_use_varlen(query)
    for encode, inputs in ((lambda *a: encode_audio(*a)[0].embeds, (x, mask)), (encode_video, (video, grid))):
        want, found = encode(plain, *inputs).float(), encode(packed, *inputs).float()
        assert float((found - want).norm() / want.norm()) < 0.03
    for t in towers:
        t.cpu().float()
