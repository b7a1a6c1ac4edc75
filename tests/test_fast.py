"""Compiled layers give the same, for every length from one compilation; on a GPU with decoding compiled, too."""

import pytest
import torch
from tiny import Batch
from torch._dynamo.testing import CompileCounter

from audiopress import CompressedOmni, build
from audiopress.models.fast import compilable, compile_layers
from audiopress.models.packed import use_packed_attention


def batch(audio, frames, seed=0):
    b = Batch(seed)
    return b.add(b.text(3), b.video(frames, 4, 8), b.audio(audio), b.text(4)).build("left")


@torch.no_grad()
def test_other_lengths_compile_nothing(fresh_thinker):
    torch._dynamo.reset()
    use_packed_attention(fresh_thinker)
    model = CompressedOmni(fresh_thinker, build("ward", keep_ratio=0.5, hidden_size=32)).eval()
    names = set(fresh_thinker.state_dict())
    batches = [batch(430, 2), batch(330, 3, 1), batch(650, 4, 2)]
    want = [model(**b).logits for b in batches]
    counter = CompileCounter()
    compile_layers(fresh_thinker, backend=counter)
    compile_layers(fresh_thinker, backend=counter)  # once more changes nothing
    counts = []
    for b, logits in zip(batches, want, strict=True):
        torch.testing.assert_close(model(**b).logits, logits, rtol=1e-4, atol=1e-5)
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts[1] == counts[2]
    assert set(fresh_thinker.state_dict()) == names
    assert len(list(compilable(fresh_thinker))) == 2 + 2 + 2 * 3 + 1


@pytest.mark.gpu
@pytest.mark.parametrize(("method", "options"), [("pooling", {}), ("ward", {}), ("atome:encoder", {"layers": 2})])
def test_compiled_generation_gives_the_same_tokens(fresh_thinker, method, options):
    """In float32, for several lengths in one cache and in another."""
    torch._dynamo.reset()
    fresh_thinker.cuda()
    use_packed_attention(fresh_thinker)
    compressor = build(method, keep_ratio=0.5, hidden_size=32, encoder_size=24, **options)
    model = CompressedOmni(fresh_thinker, compressor).eval().cuda()
    batches = [{k: v.cuda() for k, v in batch(n, 2, n).items()} for n in (430, 330, 4300)]
    length = {"max_new_tokens": 12, "min_new_tokens": 12}
    want = [model.generate(**b, **length) for b in batches]
    compile_layers(fresh_thinker)
    model.static_cache = True
    for b, tokens in zip(batches, want, strict=True):
        assert torch.equal(model.generate(**b, **length), tokens)
