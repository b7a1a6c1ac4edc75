"""The packed operations against slow, obvious references."""

import torch

from audiopress.kernels import adjacent_cosine, pad_clips, top_k, unpad_clips
from audiopress.kernels.attention import has_causal_kernel

LENGTHS = (5, 0, 1, 9, 2)


def test_top_k_is_the_best_of_each_clip():
    scores = torch.randn(sum(LENGTHS), generator=torch.Generator().manual_seed(0))
    budget = (2, 0, 1, 4, 2)
    want, start = [], 0
    for n, m in zip(LENGTHS, budget, strict=True):
        want += sorted(sorted(range(start, start + n), key=lambda i: -scores[i])[:m])
        start += n
    assert top_k(scores, LENGTHS, budget).tolist() == want


def test_equal_scores_keep_the_earliest():
    assert top_k(torch.zeros(17), LENGTHS, (2, 0, 1, 3, 1)).tolist() == [0, 1, 5, 6, 7, 8, 15]
    assert top_k(torch.empty(0), (0, 0), (0, 0)).tolist() == []


def test_adjacent_cosine_never_reaches_into_the_next_clip():
    embeds = torch.randn(sum(LENGTHS), 6, generator=torch.Generator().manual_seed(0))
    found = adjacent_cosine(embeds, LENGTHS)
    ends = {4, 5, 14, 16}
    for i, value in enumerate(found.tolist()):
        want = -torch.inf if i in ends else torch.cosine_similarity(embeds[i].double(), embeds[i + 1].double(), dim=0)
        assert abs(value - float(want)) < 1e-6 or value == want == -torch.inf
    assert adjacent_cosine(torch.zeros(3, 6), (3,)).tolist() == [0, 0, -torch.inf]
    assert adjacent_cosine(torch.empty(0, 6), ()).shape == (0,)


def test_pad_clips():
    padded, real = pad_clips(torch.arange(17), LENGTHS, value=-1)
    assert padded.shape == real.shape == (5, 9)
    assert [row[mask].tolist() for row, mask in zip(padded, real, strict=True)] == [
        t.tolist() for t in torch.arange(17).split(LENGTHS)
    ]
    assert (padded[~real] == -1).all()
    assert unpad_clips(padded, LENGTHS).tolist() == list(range(17))
    none, _ = pad_clips(torch.empty(0, 3), (0, 0))
    assert unpad_clips(none, (0, 0)).shape == (0, 3)


def test_the_kernel_without_a_backward_pass_is_not_for_training():
    tensors = [torch.zeros(1, 2, 3, 16, dtype=torch.bfloat16) for _ in range(3)] + [torch.zeros(1, 3)]
    assert has_causal_kernel(*tensors)
    assert not has_causal_kernel(tensors[0].float(), *tensors[1:])
    assert not has_causal_kernel(*(x[..., :12] for x in tensors[:3]), tensors[3])
    for i in range(4):
        some = [x.clone().requires_grad_(i == j) for j, x in enumerate(tensors)]
        assert not has_causal_kernel(*some)
        with torch.no_grad():
            assert has_causal_kernel(*some)
