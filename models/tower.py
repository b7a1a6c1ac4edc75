"""The audio tower step by step: its front, its layers over packed blocks with room for a method inside, its end.

transformers' own forward runs the tower as a whole. Methods that act between its layers, or read a layer's keys or
attention, need the steps; the parts used here are that module's own. All blocks of a layer go through one attention
call, and states on their way are packed: `TokenStream` with one clip per attention block (2 s).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compression import TokenStream
from ..compression.encoder import (
    STATE_SIZE,
    SUBSLOTS,
    EncoderMethod,
    LayerState,
    block_targets,
    layer_targets,
    pool_states,
)
from ..kernels import attention_received, block_attention
from ..kernels.packed import positions


@dataclass(frozen=True)
class States:
    """States on their way through the tower.

    Args:
        blocks: one clip per attention block; slots and sizes as in `EncoderMethod.reduce`.
        owners: the audio clip of each block.
        tokens: tokens (25 per second) each audio clip gives uncompressed.
    """

    blocks: TokenStream
    owners: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def clips(self) -> TokenStream:
        """The same states with one clip per audio clip."""
        lengths = [0] * len(self.tokens)
        for owner, n in zip(self.owners, self.blocks.lengths, strict=True):
            lengths[owner] += n
        return self.blocks.replace(lengths=tuple(lengths))


@dataclass(frozen=True)
class Captured:
    """What a layer is asked for: its keys `[N, D]` and the attention received `[N]`, both at 50 per second."""

    keys: TokenStream
    attention: Tensor | None


def pack(embeds: Tensor, frames: Sequence[int], tokens: Sequence[int], block: int) -> States:
    """Cuts packed states of audio clips into blocks.

    Args:
        embeds: `[N, D]`.
        frames: states per audio clip, `2 * tokens` or one more.
        tokens: tokens per audio clip.
        block: states per block; a clip's last one may have fewer.
    """
    lengths, owners = [], []
    for clip, n in enumerate(frames):
        parts = [min(block, n - start) for start in range(0, n, block)]
        lengths += parts
        owners += [clip] * len(parts)
    slots = positions(frames, embeds.device) * SUBSLOTS
    sizes = torch.full((len(embeds),), STATE_SIZE, device=embeds.device)
    return States(TokenStream(embeds, tuple(lengths), slots, sizes), tuple(owners), tuple(tokens))


def front(tower: nn.Module, features: Tensor, mel_frames: Sequence[int]) -> Tensor:
    """Gives what the tower's first layer reads, `[N, D_enc]` at 50 per second: convolutions and positions.

    The convolutions see zeros beyond a block, as in transformers.

    Args:
        tower: the audio encoder.
        features: `[C, mel, T]`.
        mel_frames: real frames per clip.
    """
    window = 2 * tower.n_window
    per_clip = [math.ceil(n / window) for n in mel_frames]
    chunks = F.pad(features, (0, -features.shape[2] % window)).unflatten(2, (-1, window)).transpose(1, 2)
    real = torch.arange(chunks.shape[1]) < torch.tensor(per_clip)[:, None]
    chunks = chunks[real.to(features.device)]  # [blocks, mel, window]
    counts = [min(window, n - k * window) for n, most in zip(mel_frames, per_clip, strict=True) for k in range(most)]
    lengths = torch.tensor(counts, device=features.device)[:, None]
    longest = max(counts)
    mask = (torch.arange(longest, device=features.device) < lengths)[:, None]
    x = F.gelu(tower.conv1(chunks[..., :longest] * mask)) * mask
    x = F.gelu(tower.conv2(x)).transpose(1, 2)  # [blocks, states, D]
    x = x + tower.positional_embedding.positional_embedding[: x.shape[1]].to(x.dtype)
    return x[torch.arange(x.shape[1], device=x.device) < (lengths - 1) // 2 + 1]


def run_layers(
    tower: nn.Module,
    states: States,
    start: int,
    stop: int,
    method: EncoderMethod | None = None,
    capture: frozenset[str] = frozenset(),
) -> tuple[States, Captured | None]:
    """Runs the layers from `start` to before `stop`, and a method between the attention and the feed-forward of some.

    Args:
        tower: the audio encoder.
        states: what layer `start` reads.
        start: the first layer to run.
        stop: the first one not to run.
        method: acts after the attention of its `encoder_layers`.
        capture: "encoder_keys" or "encoder_attention", of the last layer run.

    Returns:
        The states after the last layer, and what was captured there.
    """
    acting = acting_layers(method, tower)
    plans: dict[int, list[int]] = {}
    captured = None
    hidden, bias = states.blocks.embeds, None  # `states` holds the current ones only where somebody reads them
    for i in range(start, stop):
        layer, lengths = tower.layers[i], states.blocks.lengths
        attention = layer.self_attn
        x = layer.self_attn_layer_norm(hidden)
        q, k, v = (
            p(x).unflatten(1, (attention.num_heads, -1)) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        mixed = block_attention(q, k, v, lengths, attention.scaling, bias).flatten(1)
        hidden = hidden + attention.out_proj(mixed)
        acts, last = method is not None and i in acting, i == stop - 1
        read = (capture if last else frozenset()) | (method.needs if method is not None and acts else frozenset())
        received = None
        if "encoder_attention" in read:
            received = attention_received(q, k, lengths, attention.scaling)
        if last and capture:
            captured = Captured(states.clips.replace(embeds=k.flatten(1)), received)
        if method is not None and acts:
            states = replace(states, blocks=states.blocks.replace(embeds=hidden))
            layer_state = LayerState(k.flatten(1), attention.num_heads, received)
            if not plans:
                states, layer_state = _drop_odd(states, layer_state)
                final = block_targets(states.blocks.lengths, states.owners, method.budget(states.tokens))
                plans = dict(zip(acting, layer_targets(states.blocks.lengths, final, len(acting)), strict=True))
            states = replace(states, blocks=method.reduce(states.blocks, plans[i], layer_state))
            hidden = states.blocks.embeds
            if method.proportional_attention:
                bias = (states.blocks.sizes / STATE_SIZE).log()
        hidden = hidden + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(hidden))))
    return replace(states, blocks=states.blocks.replace(embeds=hidden)), captured


def acting_layers(method: EncoderMethod | None, tower: nn.Module) -> tuple[int, ...]:
    """Gives the layers a method acts in; none without one, or if it keeps everything."""
    if method is None or (method.config.keep_ratio == 1 and not method.adaptive):
        return ()
    return method.encoder_layers(len(tower.layers))


def finish(states: States, method: EncoderMethod | None) -> TokenStream:
    """Joins the states of each audio clip to its tokens, 25 per second or the method's fewer, `[N, D_enc]`."""
    clips = states.clips
    if method is None:
        budget = states.tokens
    elif method.adaptive:
        budget = tuple(min(t, max(1, n // 2)) for t, n in zip(states.tokens, clips.lengths, strict=True))
    else:
        budget = method.budget(states.tokens)
    whole = [min(n, 2 * t) for n, t in zip(clips.lengths, states.tokens, strict=True)]
    return pool_states(clips.head(whole), budget)  # an odd last state is left out


def _drop_odd(states: States, layer: LayerState) -> tuple[States, LayerState]:
    """Leaves out the odd last state of a clip, which the tower itself leaves out at its end."""
    blocks = states.blocks
    owners = torch.tensor(states.owners, device=blocks.slots.device)
    limit = 2 * SUBSLOTS * torch.tensor(states.tokens, device=blocks.slots.device)[owners]
    kept = blocks.slots < limit[blocks.clips]
    lengths = torch.bincount(blocks.clips[kept], minlength=len(blocks.lengths)).tolist()
    left = tuple(owner for owner, n in zip(states.owners, lengths, strict=True) if n)
    attention = None if layer.attention is None else layer.attention[kept]
    short = blocks.select(kept.nonzero().squeeze(1), [n for n in lengths if n])
    return replace(states, blocks=short, owners=left), replace(layer, keys=layer.keys[kept], attention=attention)
