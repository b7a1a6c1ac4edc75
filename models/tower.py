"""The audio tower step by step: its front, its layers over packed blocks with room for a method inside, its end.

transformers' own forward runs the tower as a whole. Methods that act between its layers, or read a layer's keys or
attention, need the steps; the parts used here are that module's own. All blocks of a layer go through one attention
call, and states on their way are packed: `TokenStream` with one clip per attention block (2 s).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

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
from ..kernels.packed import bounds, clip_ids, positions, upload
from .packed import is_packed

AT_ONCE = 2**16  # states that go through the layers together: 22 minutes of audio
MOST_HALF = torch.finfo(torch.float16).max - 1000  # of a state in float16, transformers' bound


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

    def split(self) -> list[States]:
        """Cuts them into parts of whole blocks, of at most `AT_ONCE` states each."""
        ranges = _ranges(self.blocks.lengths)
        rows = [sum(self.blocks.lengths[a:b]) for a, b in ranges]
        columns = (x.split(rows) for x in (self.blocks.embeds, self.blocks.slots, self.blocks.sizes))
        return [
            replace(self, blocks=TokenStream(x, self.blocks.lengths[a:b], slots, sizes), owners=self.owners[a:b])
            for (a, b), x, slots, sizes in zip(ranges, *columns, strict=True)
        ]


@dataclass(frozen=True)
class Captured:
    """What a layer is asked for: its keys `[N, D]` and the attention received `[N]`, both at 50 per second."""

    keys: TokenStream
    attention: Tensor | None


@dataclass(frozen=True)
class Plan:
    """How long a method is to leave every block.

    Args:
        whole: states of each block without the odd last one of its clip, which the tower itself leaves out at its end.
        final: states of each block after the last layer.
    """

    whole: tuple[int, ...]
    final: tuple[int, ...]


def pack(embeds: Tensor, frames: Sequence[int], tokens: Sequence[int], block: int) -> States:
    """Cuts packed states of audio clips into blocks.

    Args:
        embeds: `[N, D]`.
        frames: states per audio clip, `2 * tokens` or one more.
        tokens: tokens per audio clip.
        block: states per block; a clip's last one may have fewer.
    """
    lengths, owners = _cut(frames, block)
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
    frames, owners = _cut(mel_frames, window)
    chunks = F.pad(features, (0, -features.shape[2] % window)).unflatten(2, (-1, window)).transpose(1, 2)
    per_clip = [math.ceil(n / window) for n in mel_frames]
    blocks = torch.tensor(owners) * chunks.shape[1] + positions(per_clip)
    chunks = chunks.flatten(0, 1)[upload(blocks, features.device)]  # [blocks, mel, window]
    states = [(n - 1) // 2 + 1 for n in frames]
    return torch.cat([_front(tower, chunks[a:b], frames[a:b]) for a, b in _ranges(states)])


def _front(tower: nn.Module, chunks: Tensor, frames: Sequence[int]) -> Tensor:
    """Gives the states of blocks `[blocks, mel, window]` that have `frames` real frames each."""
    chunks = chunks[..., : max(frames)]
    real = torch.arange(chunks.shape[2], device=chunks.device) < upload(frames, chunks.device)[:, None]
    x = F.gelu(tower.conv1(chunks * real[:, None])) * real[:, None]
    x = F.gelu(tower.conv2(x)).transpose(1, 2)  # [blocks, states, D]
    x = x + tower.positional_embedding.positional_embedding[: x.shape[1]].to(x.dtype)
    states = [(n - 1) // 2 + 1 for n in frames]
    return x.flatten(0, 1)[clip_ids(states, x.device) * x.shape[1] + positions(states, x.device)]


def run_layers(
    tower: nn.Module,
    states: States,
    start: int,
    stop: int,
    method: EncoderMethod | None = None,
    capture: frozenset[str] = frozenset(),
) -> tuple[States, Captured | None]:
    """Runs the layers from `start` to before `stop`, and a method between the attention and the feed-forward of some.

    Blocks do not see one another: they pass all layers `AT_ONCE` states at a time, so that an hour of audio takes no
    more memory on its way than minutes.

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
    done, first = [], 0
    plan = None
    if method is not None and acting_layers(method, tower):
        plan = make_plan(states, method)
    for part in states.split():
        last = first + len(part.owners)
        own = None if plan is None else Plan(plan.whole[first:last], plan.final[first:last])
        done.append(_run_layers(tower, part, start, stop, method, own, capture))
        first = last
    if len(done) == 1:
        return done[0]
    ran = [part for part, _ in done]
    blocks = _join([part.blocks for part in ran], tuple(chain.from_iterable(part.blocks.lengths for part in ran)))
    states = replace(states, blocks=blocks, owners=tuple(chain.from_iterable(part.owners for part in ran)))
    kept = [captured for _, captured in done if captured is not None]
    if not kept:
        return states, None
    lengths = tuple(map(sum, zip(*(x.keys.lengths for x in kept), strict=True)))
    attention = [x.attention for x in kept if x.attention is not None]
    return states, Captured(_join([x.keys for x in kept], lengths), torch.cat(attention) if attention else None)


def _run_layers(
    tower: nn.Module,
    states: States,
    start: int,
    stop: int,
    method: EncoderMethod | None,
    plan: Plan | None,
    capture: frozenset[str],
) -> tuple[States, Captured | None]:
    """Does the work for `run_layers`, with all blocks at once."""
    acting = acting_layers(method, tower)
    targets: dict[int, list[int]] = {}
    captured = None
    hidden, bias = states.blocks.embeds, None  # `states` holds the current ones only where somebody reads them
    for i in range(start, stop):
        layer, lengths = tower.layers[i], states.blocks.lengths
        acts, last = method is not None and i in acting, i == stop - 1
        if is_packed(tower) and bias is None and not acts and not (last and capture):
            blocks = bounds(lengths, hidden.device)
            hidden = layer(hidden, cu_seqlens=blocks, max_seqlen=max(lengths, default=0))[0]
            continue
        attention = layer.self_attn
        x = layer.self_attn_layer_norm(hidden)
        q, k, v = (
            p(x).unflatten(1, (attention.num_heads, -1)) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        mixed = block_attention(q, k, v, lengths, attention.scaling, bias).flatten(1)
        hidden = hidden + attention.out_proj(mixed)
        read = (capture if last else frozenset()) | (method.needs if method is not None and acts else frozenset())
        received = None
        if "encoder_attention" in read:
            received = attention_received(q, k, lengths, attention.scaling)
        if last and capture:
            captured = Captured(states.clips.replace(embeds=k.flatten(1)), received)
        if method is not None and acts:
            assert plan is not None
            states = replace(states, blocks=states.blocks.replace(embeds=hidden))
            layer_state = LayerState(k.flatten(1), attention.num_heads, received)
            if not targets:
                states, layer_state = _drop_odd(states, layer_state, plan.whole)
                final = [n for n in plan.final if n]
                targets = dict(zip(acting, layer_targets(states.blocks.lengths, final, len(acting)), strict=True))
            states = replace(states, blocks=method.reduce(states.blocks, targets[i], layer_state))
            hidden = states.blocks.embeds
            if method.proportional_attention:
                bias = (states.blocks.sizes / STATE_SIZE).log()
        hidden = hidden + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(hidden))))
        if hidden.dtype == torch.float16:  # as the layer itself does: infinity would be NaN in the next one
            hidden = hidden.clamp(-MOST_HALF, MOST_HALF)
    return replace(states, blocks=states.blocks.replace(embeds=hidden)), captured


def make_plan(states: States, method: EncoderMethod) -> Plan:
    """Gives how long a method is to leave every block of clips."""
    whole = list(states.blocks.lengths)
    odd = [n - 2 * t for n, t in zip(states.clips.lengths, states.tokens, strict=True)]  # 0 or 1
    for i, owner in reversed(list(enumerate(states.owners))):
        whole[i] -= odd[owner]
        odd[owner] = 0
    return Plan(tuple(whole), tuple(block_targets(whole, states.owners, method.budget(states.tokens))))


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


def _drop_odd(states: States, layer: LayerState, whole: tuple[int, ...]) -> tuple[States, LayerState]:
    """Leaves out the odd last state of a clip, and its block if that has no other."""
    blocks = states.blocks
    if whole == blocks.lengths:
        return states, layer
    lengths = tuple(n for n in whole if n)
    owners = tuple(owner for owner, n in zip(states.owners, whole, strict=True) if n)
    keys = blocks.replace(embeds=layer.keys).head(whole).embeds
    attention = None
    if layer.attention is not None:
        attention = blocks.replace(embeds=layer.attention[:, None]).head(whole).embeds[:, 0]
    short = blocks.head(whole).replace(lengths=lengths)
    return replace(states, blocks=short, owners=owners), replace(layer, keys=keys, attention=attention)


def _cut(lengths: Sequence[int], size: int) -> tuple[list[int], list[int]]:
    """Cuts clips into blocks of `size`, the last of each the rest: gives the length and the clip of every block."""
    blocks = [(min(size, n - start), clip) for clip, n in enumerate(lengths) for start in range(0, n, size)]
    return [n for n, _ in blocks], [clip for _, clip in blocks]


def _ranges(states: Sequence[int]) -> list[tuple[int, int]]:
    """Cuts a row of blocks into ranges of at most `AT_ONCE` states, or one block."""
    starts, total = [0], 0
    for i, n in enumerate(states):
        if total and total + n > AT_ONCE:
            starts.append(i)
            total = 0
        total += n
    return list(zip(starts, [*starts[1:], len(states)], strict=True))


def _join(streams: Sequence[TokenStream], lengths: tuple[int, ...]) -> TokenStream:
    embeds, slots, sizes = (torch.cat(x) for x in zip(*((s.embeds, s.slots, s.sizes) for s in streams), strict=True))
    return TokenStream(embeds, lengths, slots, sizes)
