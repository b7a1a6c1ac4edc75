"""How fast somebody speaks, told from the audio tower's states: what MMS-LLaMA's number of queries follows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kernels import clip_ids, offsets, pad_clips, positions, unpad_clips, upload
from .clip_layers import ClipLayers

FASTEST = 2.0  # rates are kept between the corpus' mean, 1, and this (arXiv 2503.11315)


class SpeechRate(nn.Module):
    """Predicts a clip's rate of speech relative to the corpus' mean, from every fourth state: 12.5 per second.

    Linear, convolutional positions, a learned token in front, a pre-norm Transformer, and a Linear that reads that
    token (MMS-LLaMA, arXiv 2503.11315). It is fitted on its own by `train_speech_rate` and frozen otherwise. Before
    that it says 1 of everything.

    Args:
        size: the width of the states.
        width: of the Transformer.
        layers: of the Transformer.
        heads: of each layer.
        ffn_size: width of the feed-forward.
    """

    def __init__(self, size: int, width: int = 256, layers: int = 2, heads: int = 4, ffn_size: int = 1024) -> None:
        super().__init__()
        self.embed = nn.Linear(size, width)
        self.place = nn.Conv1d(width, width, kernel_size=128, padding=64, groups=16)  # the paper's sizes
        self.token = nn.Parameter(torch.randn(width) * 0.02)
        # Without dropout: the number of queries must not be drawn anew at every step of training.
        self.layers = ClipLayers(width, layers, heads, ffn_size)
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.ones_(self.head.bias)
        self.requires_grad_(False)

    def forward(self, states: Tensor, lengths: Sequence[int]) -> Tensor:
        """Predicts.

        Args:
            states: `[N, size]`, packed, 50 per second.
            lengths: states per clip, each at least 1.

        Returns:
            `[C]` float32.
        """
        if not lengths:
            return torch.zeros(0, device=states.device)
        counts = [-(-n // 4) for n in lengths]
        every_fourth = offsets(lengths)[clip_ids(counts)] + 4 * positions(counts)
        with torch.autocast(states.device.type, enabled=False):  # what it says is compared with whole numbers
            x = self.embed(states[upload(every_fourth, states.device)].to(self.token.dtype))
            x, _ = pad_clips(x, counts)  # [C, T, width]
            x = x + functional.gelu(self.place(x.mT)[..., :-1]).mT
            x = torch.cat((self.token.expand(len(x), 1, -1), x), dim=1)
            counts = [1 + n for n in counts]
            x = self.layers(unpad_clips(x, counts), counts)
            first = offsets(counts)[:-1]  # where the learned token is
            return self.head(x[upload(first, x.device)])[:, 0].float()


def relative_rates(words: Sequence[int], seconds: Sequence[float]) -> Tensor:
    """Gives the targets: each utterance's words (or syllables) per second over their mean, kept in [1, 2].

    Raises:
        ValueError: the two do not fit, an utterance has no length, or nothing is said in any.
    """
    if len(words) != len(seconds) or not all(s > 0 for s in seconds) or not any(words):
        raise ValueError(
            f"rates need words and positive seconds of the same utterances, got {len(words)} counts of "
            f"{sum(words)} words and {len(seconds)} lengths from {min(seconds, default=0):g} s on"
        )
    rates = torch.tensor(words, dtype=torch.float) / torch.tensor(seconds, dtype=torch.float)
    return (rates / rates.mean()).clamp(1.0, FASTEST)


def train_speech_rate(
    predictor: SpeechRate,
    states: Sequence[Tensor],
    rates: Tensor,
    steps: int,
    *,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> list[float]:
    """Fits the predictor by AdamW on the mean squared error, and freezes it again.

    Args:
        predictor: changed in place.
        states: the audio tower's states of every utterance, `[n, size]` each, n at least 1, 50 per second.
        rates: `[C]`, the targets; see `relative_rates`.
        steps: of the optimizer.
        batch_size: utterances per step, drawn with replacement.
        learning_rate: of AdamW.
        seed: of the draw.

    Returns:
        The loss of every step.

    Raises:
        ValueError: there is no utterance, or not one rate for each.
    """
    if not states or rates.shape != (len(states),):
        raise ValueError(f"there must be one rate per utterance, got {list(rates.shape)} for {len(states)}")
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(predictor.requires_grad_(True).parameters(), learning_rate)
    losses = []
    for _ in range(steps):
        drawn = torch.randint(len(states), (batch_size,), generator=generator).tolist()
        batch = [states[i].detach() for i in drawn]
        said = predictor(torch.cat(batch), [len(clip) for clip in batch])
        loss = functional.mse_loss(said, rates[drawn].to(said))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    predictor.requires_grad_(False)
    return losses
