"""What a compressor reads beside its tokens, gathered from the batch: question, prompt, video and scene."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from ..compression import Context, TokenStream
from ..compression.base import Prompt, Scene
from ..kernels import upload
from . import parts
from .layout import Kind, Layout, TokenIds
from .rewrite import IGNORE


def prompt_index(layout: Layout, labels: Tensor | None) -> tuple[Tensor, tuple[int, ...]]:
    """Gives the flat indices of what is neither audio, video, padding nor an answer, and how many each sample has.

    Args:
        layout: of the batch.
        labels: `[B, L]`, on the CPU; or None.
    """
    prompt = layout.host.mask & ~layout.host.is_media
    if labels is not None:
        prompt &= labels == IGNORE
    return upload(prompt.flatten().nonzero().squeeze(1), layout.kind.device), tuple(prompt.sum(dim=1).tolist())


def fill(
    context: Context,
    needs: Collection[str],
    *,
    joint: bool,
    thinker: nn.Module,
    input_ids: Tensor,
    embeds: Tensor,
    layout: Layout,
    labels: Tensor | None,
    ids: TokenIds,
    ends: Collection[int],
) -> None:
    """Fills in what `needs` names and the audio tower does not give.

    Args:
        context: what the tower gave.
        needs: as a compressor's.
        joint: whether a clip of the compressor is a sample; otherwise it is an audio clip.
        thinker: the model.
        input_ids: `[B, L]`, on the CPU.
        embeds: `[B, L, D]`, with the video in its place.
        layout: of the batch.
        labels: `[B, L]`, on the CPU, or None; what is labelled is an answer, which no method may read.
        ids: of the model.
        ends: ids that end a turn.
    """
    if joint:
        assert not {"encoder_hidden", "encoder_keys"} & set(needs), (
            "they are of audio clips, a joint method's of samples"
        )
        samples = list(range(len(input_ids)))
        host = layout.host
        media = host.is_media
        context.scene = Scene(
            is_video=host.kind[media] == Kind.VIDEO.value,
            seconds=host.second[media],
            positions=host.positions[:, media],
            sources=host.clip[media],
        )
        if "encoder_attention" in needs:
            received = torch.zeros(int(media.sum()), device=embeds.device)
            if context.encoder_attention is not None:  # there is audio
                heard = (~context.scene.is_video).nonzero().squeeze(1)
                received = received.index_copy(0, upload(heard, received.device), context.encoder_attention)
            context.encoder_attention = received
    else:
        samples = _samples_of_clips(layout)
    flat = embeds.flatten(0, 1)
    if "question" in needs:
        context.question = _rows(flat, question_mask(input_ids, layout.host, labels, ids, ends), samples)
    if "prompt" in needs:
        rows, lengths = prompt_index(layout, labels)
        assert joint
        context.prompt = Prompt(TokenStream(flat[rows], lengths), layout.positions.flatten(1)[:, rows])
    if "video" in needs:
        is_video = layout.host.kind == Kind.VIDEO.value
        context.video = _rows(flat, is_video, samples)
        context.video_seconds = _rows(layout.second.flatten()[:, None], is_video, samples).embeds[:, 0]
    if "first_layer" in needs:
        context.first_layer = parts.language_model(thinker).layers[0]


def question_mask(
    input_ids: Tensor, layout: Layout, labels: Tensor | None, ids: TokenIds, ends: Collection[int]
) -> Tensor:
    """Tells which tokens are the words of a sample's question, `[B, L]` bool.

    They are the text after a sample's first medium, up to the end of that turn or the first answer, without the marks
    around media. Chat templates put a turn's media before its text; of a dialogue it is the first question.
    """
    text = layout.kind == Kind.TEXT.value
    media = layout.is_media | (layout.kind == Kind.IMAGE.value)
    stop = torch.isin(input_ids, torch.tensor(sorted(ends), device=input_ids.device, dtype=input_ids.dtype))
    if labels is not None:
        stop |= labels != IGNORE
    inside = media.cumsum(dim=1) > 0
    ended = (stop & inside).cumsum(dim=1) > 0
    marks = [ids.audio_start, ids.audio_end, ids.vision_start, ids.vision_end]
    is_mark = torch.isin(input_ids, torch.tensor(marks, device=input_ids.device, dtype=input_ids.dtype))
    return text & inside & ~ended & ~is_mark


def _samples_of_clips(layout: Layout) -> list[int]:
    """Gives the sample of each audio clip."""
    return layout.clip_lengths(Kind.AUDIO)[1]


def _rows(flat: Tensor, mask: Tensor, samples: Sequence[int]) -> TokenStream:
    """Gives the rows of `[B * L, D]` where `mask` `[B, L]` holds: those of a sample for each clip that is of it.

    The mask is on the CPU.
    """
    index = [row.nonzero().squeeze(1) + i * mask.shape[1] for i, row in enumerate(mask)]
    picked = [index[sample] for sample in samples]
    rows = torch.cat([mask.new_empty(0, dtype=torch.long), *picked])
    return TokenStream(flat[upload(rows, flat.device)], tuple(len(p) for p in picked))
