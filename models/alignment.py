"""A second training signal for speech: CTC between the compressed audio tokens and the answer's words."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..compression import TokenStream


class CTCAlignment(nn.Module):
    """CTC over the LLM's own vocabulary: an audio token's logit for a word is its cosine-like product with the word's
    embedding, so minimising it moves audio tokens onto the words the LLM already reads.

    `logits = s * E x / rms(x)` and one learned vector for the blank, with E the LLM's frozen embedding matrix
    (Graves et al., Connectionist Temporal Classification, ICML 2006). It holds `[N, vocabulary]` in float32 a few times
    over: meant for utterances, not for hours.

    Args:
        hidden_size: D.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.blank = nn.Parameter(torch.zeros(hidden_size))
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, stream: TokenStream, targets: list[Tensor], embedding: Tensor) -> Tensor:
        """Gives the summed negative log-likelihood of all clips' targets.

        Args:
            stream: the compressed tokens of C clips, `[N, D]`.
            targets: the words' token ids of each clip, `[T_c]`. A clip with no target, or with fewer tokens than its
                target needs, adds nothing.
            embedding: `[vocabulary, D]`.
        """
        x = F.rms_norm(stream.embeds.float(), (stream.embeds.shape[1],)) * self.log_scale.exp()
        words = x @ embedding.float().T  # [N, vocabulary]
        log_probs = torch.cat([(x @ self.blank)[:, None], words], dim=1).log_softmax(dim=1)  # blank first
        lengths = torch.tensor(stream.lengths)
        counts = torch.tensor([len(t) for t in targets])
        return F.ctc_loss(
            pad_sequence(list(log_probs.split(stream.lengths))),  # [T, C, 1 + vocabulary]
            pad_sequence([t + 1 for t in targets], batch_first=True).to(x.device),
            lengths,
            counts,
            reduction="none",
            zero_infinity=True,
        )[counts.to(x.device) > 0].sum()
