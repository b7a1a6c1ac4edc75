"""The processor of omni-small: SmolLM2's tokenizer with Qwen2.5-Omni's special tokens and conversation format."""

from __future__ import annotations

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5OmniProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)

# Attribute of the tokenizer (Qwen2_5OmniProcessor reads these) -> token, as in Qwen2.5-Omni.
SPECIAL_TOKENS = {
    "audio_token": "<|AUDIO|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
}

# A message's content is a string or a list of parts. No system message is added that was not given.
CHAT_TEMPLATE = """
{%- set media = {
    'audio': '<|audio_bos|><|AUDIO|><|audio_eos|>',
    'image': '<|vision_bos|><|IMAGE|><|vision_eos|>',
    'video': '<|vision_bos|><|VIDEO|><|vision_eos|>'
} -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'text' -%}
                {{- part['text'] -}}
            {%- elif part['type'] in media -%}
                {{- media[part['type']] -}}
            {%- else -%}
                {{- raise_exception("content type must be text, audio, image or video, got " + part['type']) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

SECONDS = 300  # the longest clip, as in Qwen2.5-Omni's released feature extractor


def build_processor(tokenizer: PreTrainedTokenizerFast, mel_bins: int) -> Qwen2_5OmniProcessor:
    """Makes the processor.

    Args:
        tokenizer: SmolLM2's, from its GGUF or from the hub; only its vocabulary and merges are used.
        mel_bins: of the audio tower.
    """
    words = PreTrainedTokenizerFast(
        tokenizer_object=smollm2_backend(tokenizer),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",  # as in Qwen; not SmolLM2's <|im_end|>, which labels must be able to hold
        extra_special_tokens=SPECIAL_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    return Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(),
        video_processor=Qwen2VLVideoProcessor(),
        feature_extractor=WhisperFeatureExtractor(feature_size=mel_bins, chunk_length=SECONDS),
        tokenizer=words,
        chat_template=CHAT_TEMPLATE,
    )


def smollm2_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Puts SmolLM2's steps around its vocabulary and merges: single digits, then bytes as in GPT-2.

    Not taken from `tokenizer`, because transformers' GGUF readers leave the digits out and differ by release.
    """
    read = json.loads(tokenizer.backend_tokenizer.to_str())
    backend = Tokenizer(models.BPE(vocab=read["model"]["vocab"], merges=[tuple(m) for m in read["model"]["merges"]]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t["content"], normalized=False) for t in read["added_tokens"]])
    return backend
