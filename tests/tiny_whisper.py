"""A random Whisper that hears one second, and prompts of noise for it."""

import av
import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from audiopress.data.records import Record, assistant, user
from audiopress.models.whisper import CompressedWhisper, generation_config

SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|fr|>", "<|translate|>", "<|transcribe|>"]
SPECIAL += ["<|notimestamps|>"]
WORDS = [f"word{i}" for i in range(40)]
TOKENS = 25  # of the tiny window, one second
STEPS = 24  # of decoding: random weights never end
LENGTHS = (16_000, 9_000, 12_345)  # samples


def make_model():
    """A random Whisper that hears one second, with weights large enough to write more than one word."""
    torch.manual_seed(0)
    ids = {"pad_token_id": 40, "bos_token_id": 40, "eos_token_id": 40, "decoder_start_token_id": 41}
    return WhisperForConditionalGeneration(
        WhisperConfig(
            encoder_layers=6,
            decoder_layers=2,
            **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
            **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
            d_model=32,
            num_mel_bins=8,
            max_source_positions=50,
            max_target_positions=40,
            vocab_size=len(WORDS) + len(SPECIAL),
            init_std=0.3,
            **ids,
        )
    ).eval()


def make_whisper():
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="word0"))
    words.pre_tokenizer = Whitespace()
    words.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=SPECIAL[0], pad_token=SPECIAL[0])
    model = make_model()
    model.generation_config = generation_config(tokenizer, never=[3, 4], never_first=[5])
    return CompressedWhisper(model, tokenizer, WhisperFeatureExtractor(8, chunk_length=1))


def sounds(lengths=LENGTHS):
    random = np.random.default_rng(0)
    return [random.standard_normal(n).astype(np.float32) for n in lengths]


def records(tmp_path, seconds, language="en"):
    """Records of noise that all say the same."""
    made = []
    for i, n in enumerate(seconds):
        path = tmp_path / f"{language}{i}.wav"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("pcm_s16le", rate=16_000, layout="mono")
            samples = np.random.default_rng(i).integers(-9000, 9000, (1, round(16_000 * n)), dtype=np.int16)
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.sample_rate = 16_000
            container.mux([*stream.encode(frame), *stream.encode(None)])
        made.append(
            Record(f"{language}/{i}", (user("What?"), assistant(f"say {'abcdefgh'[i]} twenty")), audio=path, duration=n)
        )
    return made
