"""Window Q-Formers: learned queries that read the frames of a window, at one or several resolutions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ..kernels import clip_ids, offsets, positions, segment_reduce, unfold, upload
from .base import CompressorConfig, Context, Sizes, check_choice, check_count, check_flag, check_number
from .budget import check_keep_ratio
from .conv import PackedConv1d
from .frames import FRAMES_PER_TOKEN, FrameCompressor, FrameConfig
from .pictures import read_video, shown_pictures
from .qformer_layers import QFormerLayer, mean_cosine
from .registry import register
from .speech_rate import FASTEST, SpeechRate
from .stream import TokenStream

Windows = tuple[tuple[int, int], ...]

INIT = 0.02  # standard deviation of queries and positions (SALMONN)


@dataclass(frozen=True)
class QFormerConfig(FrameConfig):
    """Options of `QFormer`; `keep_ratio` follows from `windows`, or changes them.

    Args:
        keep_ratio: tokens out / tokens in; with `speech_rate` the most. Where `windows` say otherwise it wins: it
            resizes windows of one query, and changes the number of queries of others.
        windows: (frames, queries) of every resolution, the finest first, all with the same frames per query. Default:
            windows of one query.
        tail: "keep" reads an incomplete last window with as many queries as it has room for, "drop" leaves it out
            (the coarsest resolution's), unless it is the clip's only one.
        halve: joins the tower's states in pairs first, by a convolution: then frames are 25 per second.
        step: frames that count as one moment: for `causal`, and for `video`, whose pictures stand beside them.
            Divides the frames of every window. 25 states are the papers' 0.5 s.
        causal: whether frames first attend to those of the same and of earlier steps of their window.
        positions: whether frames are first mapped to `width` and get a learned embedding of their place in the window.
        video: "read" puts the picture shown at each step beside its frames, on features; "none" does not.
        picture_size: vectors per picture; one of more tokens is averaged to so many.
        diversity: weight of the loss that keeps the outputs of a window apart, in all resolutions but the finest (or
            the only one).
        speech_rate: whether the number of queries follows the rate of speech: from those of `windows` to twice as many.
        width: of the queries.
        layers: how many.
        heads: of each layer.
        ffn_size: width of their feed-forward.
        dropout: in the layers.
        projector: to the LLM's width: "linear", or "two-linear" with no activation between them.
    """

    windows: Windows = None  # type: ignore[assignment]  # resolved below
    tail: Literal["keep", "drop"] = "keep"
    halve: bool = False
    step: int = 1
    causal: bool = False
    positions: bool = False
    video: Literal["none", "read"] = "none"
    picture_size: int = 32
    diversity: float = 0.0
    speech_rate: bool = False
    width: int = 768
    layers: int = 2
    heads: int = 12
    ffn_size: int = 3072
    dropout: float = 0.1
    projector: Literal["linear", "two-linear"] = "linear"

    def __post_init__(self) -> None:
        check_choice("source", self.source, FRAMES_PER_TOKEN)
        check_choice("tail", self.tail, ("keep", "drop"))
        check_choice("video", self.video, ("none", "read"))
        check_choice("projector", self.projector, ("linear", "two-linear"))
        for option in ("step", "picture_size", "width", "layers", "heads", "ffn_size"):
            check_count(option, getattr(self, option))
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads={self.heads}, got {self.width}")
        check_number("dropout", self.dropout, "[0, 1)")
        check_number("diversity", self.diversity, "[0, inf)")
        for option in ("halve", "causal", "positions", "speech_rate"):
            check_flag(option, getattr(self, option))
        if self.keep_ratio is not None:
            check_keep_ratio(self.keep_ratio)
        if self.source != "hidden" and (self.halve or self.speech_rate or self.video == "read"):
            raise ValueError("halve, speech_rate and video='read' need source='hidden', the tower's states")
        if self.video == "read" and not self.positions:
            raise ValueError("video='read' needs positions=True: pictures stand beside frames mapped to width")
        self.resolve_windows()
        super().__post_init__()
        if any(frames % self.step for frames, _ in self.windows):
            raise ValueError(f"step must divide the frames of every window of {self.windows}, got {self.step}")
        if self.speech_rate and (len(self.windows) > 1 or self.windows[0][0] % self.frames_per_token):
            raise ValueError(f"speech_rate needs one resolution, its windows of whole tokens, got {self.windows}")

    @property
    def frames_per_token(self) -> int:
        """Frames of a window per token of the clip."""
        return 1 if self.halve else FRAMES_PER_TOKEN[self.source]

    def resolve_windows(self) -> None:
        """Makes windows and keep_ratio agree.

        Raises:
            ValueError: the windows are no pairs of whole numbers, or not the finest first and all of one rate; more
                than one token per slot (25 per second) would come out; or no whole numbers give `keep_ratio`.
        """
        scale = self.frames_per_token * (int(FASTEST) if self.speech_rate else 1)
        windows = ((2 * scale, 1),) if self.windows is None else _check_windows(self.windows)  # 12.5 per second
        (frames, queries), wanted = windows[0], self.keep_ratio
        if wanted is not None and abs(scale * queries / frames - wanted) > 1e-6:
            if windows == ((frames, 1),):
                windows = ((round(scale / wanted), 1),)
            else:
                queries = max(1, round(wanted * frames / scale))
                windows = _check_windows([(size, round(queries * size / frames)) for size, _ in windows])
            frames, queries = windows[0]
            if abs(scale * queries / frames - wanted) > 1e-6:
                raise ValueError(
                    f"no whole windows give keep_ratio {wanted}: the nearest (frames, queries) are {windows}, "
                    f"which give {scale * queries / frames:.6g}"
                )
        if scale * queries > frames:
            raise ValueError(
                f"windows {windows} give {25 * scale * queries / frames:g} tokens per second; at most one per slot, "
                f"25, is possible: {scale} or more frames per query"
            )
        object.__setattr__(self, "windows", windows)
        object.__setattr__(self, "keep_ratio", scale * queries / frames)


# What the presets of one group of papers share; FAVOR's weight of the diversity loss is open.
CAUSAL: dict[str, Any] = {"source": "hidden", "step": 25, "causal": True, "positions": True, "diversity": 0.01}
BERT_LARGE: dict[str, Any] = {"source": "hidden", "width": 1024, "heads": 16, "ffn_size": 4096}


@register("qformer")
class QFormer(FrameCompressor):
    """Lets learned queries read windows of each clip's frames; what they give are the clip's tokens.

    A layer is self-attention among a window's queries, cross-attention to its frames, and a feed-forward. With several
    resolutions the same layers read the windows of each, with queries of its own. All have the same frames per query,
    so that output i of every resolution stands for the same time: they are concatenated on features and projected,
    `y_i = W [h_i of the finest; ...; h_i of the coarsest]`.

    Query i of q that read the tokens from a to b takes the slot `floor(a + (i + 1/2) (b - a) / q)` and the size of its
    share, in whole frames. Of an incomplete last window only the first queries are used, one per share begun.

    Papers and presets:
        - `salmonn`: 17 states, 1 query. "SALMONN: Towards Generic Hearing Abilities for Large Language Models", arXiv
          2310.13289.
        - `favor`: 5 s, 32 queries, causal frames. "Fine-grained Audio-Visual Joint Representations for Multimodal Large
          Language Models", arXiv 2310.05863.
        - `mrc`, the multi-resolution causal Q-Former: 2 queries per 2.5 s beside 10 per 12.5 s; `mrc-released`: 3 per
          0.5 s beside 30 per 5 s; `mrc-three-level`, at that rate with 1, 5 and 10 s. "video-SALMONN: Speech-Enhanced
          Audio-Visual Large Language Models", arXiv 2406.15704.
        - `mms-llama`: 3 queries per second times the rate of speech, from 1 to 2. "MMS-LLaMA: Efficient LLM-based
          Audio-Visual Speech Recognition with Minimal Multimodal Speech Tokens", arXiv 2503.11315.
        - `granite-window`: 15 states, 3 queries. "Granite-speech: open-source speech-aware LLMs with strong English ASR
          capabilities", arXiv 2505.08699.

    Differs from the papers:
        - The frames are the tower's states alone. SALMONN and video-SALMONN put those of a second encoder, BEATs,
          beside them; FAVOR and video-SALMONN always read the video, here `video="read"` does.
        - All padding is masked, as key and as query; released code leaves some of it visible.
        - The causal mask lets a frame see its own step and earlier ones, as the texts say; the released code of FAVOR
          and video-SALMONN builds the opposite triangle.
        - With `video="read"` the picture of a 0.5 s step is the vision tower's tokens, averaged in raster order to 32
          where there are more, instead of 32 vectors of an image Q-Former. The step's 25 states are zero-padded to 32.
          A picture is held until the next one, because pictures come at other rates than 2 per second; before the
          first, and without video, that half is zero. The LLM's own video tokens stay where they are.
        - The diversity loss is the mean cosine with the weight of the released code, 0.01; the text has a sum and 0.1.
        - MMS-LLaMA reads clips up to 20 s whole; here longer ones are read in windows of 20 s, each at its own rate of
          speech. It also stretches its frames by that rate and fuses video with the audio; this preset does neither.
    """

    config_class: ClassVar[type[CompressorConfig]] = QFormerConfig
    config: QFormerConfig
    presets: ClassVar = {
        "salmonn": {"source": "hidden", "windows": ((17, 1),), "tail": "drop"},
        "favor": {"windows": ((250, 32),), **CAUSAL},
        "mrc": {"windows": ((125, 2), (625, 10)), **CAUSAL},
        "mrc-released": {"windows": ((25, 3), (250, 30)), **CAUSAL},
        "mrc-three-level": {"windows": ((50, 6), (250, 30), (500, 60)), **CAUSAL},
        "mms-llama": {
            "windows": ((500, 60),),
            "halve": True,
            "speech_rate": True,
            "projector": "two-linear",
            **BERT_LARGE,
        },
        "granite-window": {"windows": ((15, 3),), **BERT_LARGE},
    }
    trained = True
    paper = "2310.13289, 2310.05863, 2406.15704, 2503.11315, 2505.08699"
    summary = "learned queries that read windows of frames"
    differs = "one audio encoder, video by option; masks all padding; causal as the text says"

    def __init__(self, config: CompressorConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        c, size = self.config, self.frame_size
        self.join = PackedConv1d(size, size, kernel_size=2, stride=2, before=0) if c.halve else None
        self.embed = nn.Linear(size, c.width) if c.positions else nn.Identity()
        self.embed_picture = nn.Linear(sizes.hidden_size, c.width) if c.video == "read" else None
        frame_width = c.width * (1 + (c.video == "read")) if c.positions else size
        if c.causal and frame_width % c.heads:
            raise ValueError(
                f"{self.name}: causal frames must have a multiple of {c.heads} features, got {frame_width}"
            )
        self.frame_norm = nn.LayerNorm(frame_width)
        places = c.windows[-1][0] // c.step * self.places
        self.position = nn.Parameter(torch.randn(places, frame_width) * INIT) if c.positions else None
        pool = int(FASTEST) if c.speech_rate else 1
        self.queries = nn.ParameterList(torch.randn(pool * queries, c.width) * INIT for _, queries in c.windows)
        self.query_norm = nn.LayerNorm(c.width)
        self.dropout = nn.Dropout(c.dropout)
        self.layers = nn.ModuleList(
            QFormerLayer(c.width, c.heads, c.ffn_size, frame_width, c.dropout, c.causal) for _ in range(c.layers)
        )
        widths = [len(c.windows) * c.width, sizes.hidden_size]
        if c.projector == "two-linear":
            widths.insert(1, sum(widths) // 2)
        self.project = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
        self.speech_rate = SpeechRate(size) if c.speech_rate else None

    @property
    def needs(self) -> frozenset[str]:
        """The tower's states when they are the source, and the video with its seconds where it is read."""
        return super().needs | ({"video"} if self.config.video == "read" else set())

    @property
    def adaptive(self) -> bool:
        """Whether the rate of speech decides."""
        return self.config.speech_rate

    @property
    def frozen(self) -> frozenset[str]:
        """The predictor of the rate of speech, which `train_speech_rate` fits."""
        predictor = [] if self.speech_rate is None else self.speech_rate.named_parameters()
        return frozenset(f"speech_rate.{name}" for name, _ in predictor)

    @property
    def frames_per_token(self) -> int:
        """Frames of a window per token of the stream."""
        return self.config.frames_per_token

    @property
    def places(self) -> int:
        """Vectors that stand at one step."""
        c = self.config
        return max(c.step, c.picture_size) if c.video == "read" else c.step

    def budget(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Gives the queries of each clip's windows, at the fastest rate of speech."""
        windows, held = self.cut(lengths)
        return _per_clip(self.used_queries(held), windows)

    def cut(self, lengths: Sequence[int], level: int = 0) -> tuple[list[int], Tensor]:
        """Gives the windows of a resolution in each clip of so many tokens, and the frames each holds, `[W]` int64."""
        size, coarsest = self.config.windows[level][0], self.config.windows[-1][0]
        frames = [n * self.frames_per_token for n in lengths]
        if self.config.tail == "drop":
            frames = [n - n % coarsest if n > coarsest else n for n in frames]
        windows = [-(-n // size) for n in frames]
        left = torch.tensor(frames, dtype=torch.long)[clip_ids(windows)] - size * positions(windows)
        return windows, left.clamp(max=size)

    def used_queries(self, held: Tensor, level: int = 0, rates: Tensor | float = FASTEST) -> Tensor:
        """Gives how many queries read each window: `[W]` int64 of the frames it holds and its rate of speech."""
        frames, queries = self.config.windows[level]
        if not self.config.speech_rate:
            return (held * queries + frames - 1) // frames
        per_second = 25 * self.frames_per_token * queries // frames
        wanted = (held.double() * queries / frames * rates).long().clamp(min=max(1, per_second))
        return wanted.minimum(held // self.frames_per_token).clamp(max=len(self.queries[level]))

    @torch.no_grad()
    def predict_rate(self, states: TokenStream) -> Tensor:
        """Gives the rate of speech in each window, `[W]` float32 from 1 to 2.

        Args:
            states: the tower's, as `Context.encoder_hidden`.

        Raises:
            ValueError: there is no predictor.
        """
        if self.speech_rate is None:
            raise ValueError(f"{self.name} predicts the rate of speech with speech_rate=True only")
        windows, held = self.cut([n // 2 for n in states.lengths])
        counts = held * 2 // self.frames_per_token
        return self.speech_rate(states.head(_per_clip(counts, windows)).embeds, counts.tolist()).clamp(1.0, FASTEST)

    def compress(self, stream: TokenStream, context: Context) -> TokenStream:
        """Lets the queries read the windows of every resolution, and projects what they give."""
        c, frames = self.config, self.read_frames(stream, context)
        rates = self.predict_rate(frames).cpu() if c.speech_rate else 1.0
        cuts = [self.cut(stream.lengths, level) for level in range(len(c.windows))]
        used = [self.used_queries(held, level, rates) for level, (_, held) in enumerate(cuts)]
        windows, held = cuts[0]
        if self.join is not None:
            frames = stream.replace(embeds=self.join(frames.embeds, frames.lengths)[0])
        frames = frames.head(_per_clip(held, windows))
        vectors, real, steps = self.lay_out(frames, context)
        outputs, alike = [], []
        for level, counts in enumerate(used):
            mask = _first(counts, len(self.queries[level]), vectors.device)  # [W, q]
            output = self.read(vectors, real, steps, level, mask)  # [W, q, width]
            outputs.append(output.flatten(0, 1)[mask.flatten().nonzero_static(size=int(counts.sum()))[:, 0]])
            if level or len(used) == 1:
                alike.append(mean_cosine(output, mask))
        slots, sizes = self.place(stream, frames, windows, held, used[0])
        return stream.replace(
            embeds=self.project(torch.cat(outputs, dim=1)),
            lengths=_per_clip(used[0], windows),
            slots=slots,
            sizes=sizes,
            losses=stream.losses | ({"diversity": c.diversity * torch.stack(alike).sum()} if c.diversity else {}),
        )

    def lay_out(self, frames: TokenStream, context: Context) -> tuple[Tensor, Tensor, list[int]]:
        """Gives the vectors `[S, P, F]` that stand at each step, which are real `[S, P]`, and the steps per clip."""
        step, places = self.config.step, self.places
        steps = [-(-n // step) for n in frames.lengths]
        vectors = unfold(self.embed(frames.embeds), frames.lengths, step, step, steps)
        real = unfold(torch.ones_like(frames.sizes)[:, None], frames.lengths, step, step, steps)[..., 0] > 0
        if self.embed_picture is not None:
            video, seconds = read_video(context, self.name, len(steps), self.hidden_size)
            step_seconds = step / (25 * self.frames_per_token)
            pictures, shown = shown_pictures(video, seconds, steps, step_seconds, self.config.picture_size)
            drawn = self.embed_picture(pictures.embeds.to(frames.embeds.dtype))
            drawn = unfold(drawn, pictures.lengths, places, 1, [1] * len(pictures.lengths))  # [G, P, width]
            inked = _first(torch.tensor(pictures.lengths, dtype=torch.long), places, real.device)
            # The row of zeros at the end is what a step without a picture, -1, shows.
            drawn, inked = functional.pad(drawn, (0, 0, 0, 0, 0, 1)), functional.pad(inked, (0, 0, 0, 1))
            vectors = torch.cat((functional.pad(vectors, (0, 0, 0, places - step)), drawn[shown]), dim=-1)
            real = functional.pad(real, (0, places - step)) | inked[shown]
        return self.frame_norm(vectors), real, steps

    def read(self, vectors: Tensor, real: Tensor, steps: list[int], level: int, used: Tensor) -> Tensor:
        """Gives the outputs of all windows of a resolution: `[W, q, width]`, of which `used` `[W, q]` count."""
        size, places = self.config.windows[level][0] // self.config.step, self.places
        windows = [-(-n // size) for n in steps]
        frames = unfold(vectors.flatten(1), steps, size, size, windows)
        frames = rearrange(frames, "w s (p f) -> w (s p) f", p=places)
        real = unfold(real.float(), steps, size, size, windows).flatten(1) > 0
        if self.position is not None:
            frames = frames + self.position[: size * places]
        moment = torch.arange(size * places, device=frames.device) // places
        past = moment[:, None] >= moment if self.config.causal else None
        x = self.dropout(self.query_norm(self.queries[level]).expand(len(frames), -1, -1))
        for layer in self.layers:
            x = layer(x, frames, used, real, past)
        return x

    def place(
        self, stream: TokenStream, frames: TokenStream, windows: list[int], held: Tensor, used: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gives slots and sizes `[M]` of outputs that are spread evenly over the frames their windows hold."""
        start = positions(windows) * self.config.windows[0][0]  # [W]
        window, i = clip_ids(used.tolist()), positions(used.tolist())  # [M]
        start, held, q = start[window], held[window], used[window]
        token = (2 * start * q + (2 * i + 1) * held) // (2 * q * self.frames_per_token)
        index = offsets(stream.lengths)[clip_ids(windows)[window]] + token
        shares = (i + 1) * held // q - i * held // q
        sizes = segment_reduce(frames.sizes, "sum", upload(shares, frames.sizes.device))
        return stream.slots[upload(index, stream.slots.device)], sizes


def _first(counts: Tensor, size: int, device: torch.device) -> Tensor:
    """Marks the first `counts` `[W]` of `size` places: `[W, size]` bool."""
    return torch.arange(size, device=device) < upload(counts, device)[:, None]


def _per_clip(counts: Tensor, windows: Sequence[int]) -> tuple[int, ...]:
    """Sums the counts `[W]` of each clip's windows."""
    return tuple(int(part.sum()) for part in counts.split(list(windows)))


def _check_windows(windows: Sequence[Sequence[int]]) -> Windows:
    """Gives the windows as a tuple of pairs; raises ValueError unless they are as `QFormerConfig` says."""
    try:
        pairs = tuple((frames, queries) for frames, queries in windows)
    except (TypeError, ValueError):
        pairs = ()
    for value in (value for pair in pairs for value in pair):
        check_count("windows", value)
    sizes = [frames for frames, _ in pairs]
    if not pairs or sizes != sorted(set(sizes)) or len({frames / queries for frames, queries in pairs}) > 1:
        raise ValueError(
            f"windows must be pairs (frames, queries), the finest first and all with the same frames per query, so "
            f"that their outputs stand for the same times; got {windows!r}"
        )
    return pairs
