"""Transformer layers over packed clips: torch's arithmetic, without torch's attention map."""

import pytest
import torch
from compression_cases import ALL_CASES
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from audiopress.compression.clip_layers import ClipLayers

WIDTH, HEADS = 8, 2


class Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that an operation gives."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = [x.numel() for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)]
        self.numbers = max(self.numbers, *found, 0)
        return out


def torchs(layers, activation):
    """Gives torch's layers with the weights of ours."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, 0.0, activation, batch_first=True, norm_first=True)
    theirs = nn.TransformerEncoder(layer, len(layers.layers), nn.LayerNorm(WIDTH), enable_nested_tensor=False)
    names = {
        "norm1": "attention_norm",
        "norm2": "ffn_norm",
        "linear1": "ffn.fc1",
        "linear2": "ffn.fc2",
        "self_attn.out_proj": "write",
        "self_attn.in_proj": "read",
    }
    own, state = layers.state_dict(), {}
    for key in theirs.state_dict():
        name, kind = key.replace("in_proj_", "in_proj.").rsplit(".", 1)
        for their_part, part in names.items():
            name = name.replace(their_part, part)
        state[key] = own[f"{name}.{kind}"]
    theirs.load_state_dict(state)
    return theirs.eval()


@pytest.mark.parametrize(("activation", "kind"), [("gelu", nn.GELU), ("relu", nn.ReLU)])
def test_they_are_torchs_layers_of_each_clip(activation, kind):
    torch.manual_seed(0)
    layers = ClipLayers(WIDTH, 3, HEADS, 16, activation=kind)
    for parameter in layers.parameters():  # random ones, as biases start at 0 and norms at 1
        nn.init.normal_(parameter)
    theirs = torchs(layers, activation)
    lengths = (3, 0, 1, 7)
    x = torch.randn(11, WIDTH)
    want = torch.cat([theirs(clip[None])[0] for clip in x.split(lengths) if len(clip)])
    torch.testing.assert_close(layers(x, lengths), want, rtol=1e-4, atol=1e-5)
    assert layers(x[:0], (0, 0)).shape == (0, WIDTH)


def test_dropout_is_for_training():
    torch.manual_seed(0)
    layers, x = ClipLayers(WIDTH, 2, HEADS, 16, 0.5), torch.randn(5, WIDTH)
    assert not torch.equal(layers(x, (5,)), layers(x, (5,)))
    layers.eval()
    assert torch.equal(layers(x, (5,)), layers(x, (5,)))


def test_no_attention_map_is_kept():
    """505 prompts, one of 730 tokens, and 8 heads have a map of over 2^31 logits: torch's softmax read beyond it."""
    assert 505 * 8 * 729**2 < 2**31 < 505 * 8 * 730**2
    lengths = (128, *[1] * 31)
    with Largest() as largest, torch.no_grad():
        ClipLayers(WIDTH, 1, HEADS, 16).eval()(torch.randn(sum(lengths), WIDTH), lengths)
    assert largest.numbers == len(lengths) * 128 * WIDTH  # the tokens, padded


@pytest.mark.gpu
def test_a_gpu_takes_more_clips_than_a_map_has_numbers_for():
    torch.manual_seed(0)
    layers, lengths = ClipLayers(64, 1, 8, 64).eval(), (730, *[70] * 504)
    x = torch.randn(sum(lengths), 64)
    with torch.no_grad():
        found = layers.cuda()(x.cuda(), lengths).cpu()
        layers.cpu()
        for clip in (slice(0, 730), slice(len(x) - 70, len(x))):
            want = layers(x[clip], (clip.stop - clip.start,))
            torch.testing.assert_close(found[clip], want, rtol=1e-3, atol=1e-3)


def test_no_method_has_torchs_layers():
    """So a stack of them has one place, where nothing is kept that grows with the square of a clip's length."""
    parts = [part for case in ALL_CASES for part in case.build().modules()]
    assert any(isinstance(part, ClipLayers) for part in parts)
    assert not any(isinstance(part, nn.TransformerEncoderLayer) for part in parts)
