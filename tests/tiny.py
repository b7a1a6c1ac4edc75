"""A small random Qwen2.5-Omni: its thinker, batches as the processor would make them, and a whole checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from audiopress.models.layout import audio_lengths
from audiopress.models.processor import SPECIAL_TOKENS, build_processor

AUDIO, VIDEO, IMAGE = 100, 101, 102
AUDIO_START, AUDIO_END, VISION_START, VISION_END = 103, 104, 105, 106
EOS = 107
MEL = 16


def tiny_config() -> Qwen2_5OmniThinkerConfig:
    """Every size is given: the config classes' defaults are not those of a released checkpoint."""
    config = Qwen2_5OmniThinkerConfig(
        audio_config={
            "num_mel_bins": MEL,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "d_model": 24,
            "n_window": 100,
            "output_dim": 32,
            "max_source_positions": 1500,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 32,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 32,
        },
        text_config={
            "vocab_size": 128,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "tie_word_embeddings": True,
        },
        audio_token_id=AUDIO,
        video_token_id=VIDEO,
        image_token_id=IMAGE,
        audio_start_token_id=AUDIO_START,
        audio_end_token_id=AUDIO_END,
        position_id_per_seconds=25,
        seconds_per_chunk=2,
        tie_word_embeddings=True,
    )
    config.vision_start_token_id = VISION_START
    config.vision_end_token_id = VISION_END
    return config


def make_thinker(seed: int = 0) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """A random thinker whose weights are large enough to tell a wrong position from a right one."""
    torch.manual_seed(seed)
    model = Qwen2_5OmniThinkerForConditionalGeneration(tiny_config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = 0
    return model


def tiny_processor() -> Qwen2_5OmniProcessor:
    """A whole processor that needs no download: its words are learnt from one line, two line breaks are one token."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(["user assistant When does it ring? From 10 to 30.\n\n  Yes\n\n  No\n \n x"] * 9, trainer)
    return build_processor(PreTrainedTokenizerFast(tokenizer_object=words), MEL)


def tiny_thinker(processor: Qwen2_5OmniProcessor, seed: int = 0) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """A random thinker with the processor's vocabulary."""
    tokenizer = processor.tokenizer
    config = tiny_config()
    config.text_config.vocab_size = len(tokenizer)
    names = {
        "audio_token": "audio_token_id",
        "image_token": "image_token_id",
        "video_token": "video_token_id",
        "audio_bos_token": "audio_start_token_id",
        "audio_eos_token": "audio_end_token_id",
        "vision_bos_token": "vision_start_token_id",
        "vision_eos_token": "vision_end_token_id",
    }
    for token, name in names.items():
        setattr(config, name, tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[token]))
    torch.manual_seed(seed)
    model = Qwen2_5OmniThinkerForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def write_checkpoint(folder: Path, thinker: Qwen2_5OmniThinkerForConditionalGeneration) -> None:
    """Writes a whole model as released: `thinker.*`, `talker.*` and `token2wav.*` in two files with an index."""
    thinker.save_pretrained(folder / "thinker")
    tiny_processor().save_pretrained(folder)
    config = {
        "architectures": ["Qwen2_5OmniModel"],
        "model_type": "qwen2_5_omni",
        "enable_audio_output": True,
        "thinker_config": json.loads((folder / "thinker" / "config.json").read_text()),
        "talker_config": {"model_type": "qwen2_5_omni_talker"},
        "token2wav_config": {"model_type": "qwen2_5_omni_token2wav"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    state = {f"thinker.{k}": v for k, v in load_file(folder / "thinker" / "model.safetensors").items()}
    state["talker.model.embed_tokens.weight"] = torch.ones(7, 5)
    state["token2wav.code2wav_dit_model.proj_out.bias"] = torch.ones(3)
    files = {f"model-{i + 1:05}-of-00002.safetensors": sorted(state)[i::2] for i in range(2)}
    for file, names in files.items():
        save_file({name: state[name].contiguous() for name in names}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class Batch:
    """Builds what the processor would give, sample by sample.

    Args:
        seed: of the random features.
    """

    def __init__(self, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)
        self.ids: list[list[int]] = []
        self.mels: list[torch.Tensor] = []
        self.pixels: list[torch.Tensor] = []
        self.grids: list[list[int]] = []
        self.seconds_per_grid: list[float] = []
        self.images: list[torch.Tensor] = []
        self.image_grids: list[list[int]] = []

    def text(self, n: int) -> list[int]:
        return torch.randint(1, 90, (n,), generator=self.generator).tolist()

    def _mel(self, frames: int) -> int:
        self.mels.append(torch.randn(MEL, frames, generator=self.generator))
        return audio_lengths(torch.tensor([frames]))[0]

    def _pixels(self, grid: list[int]) -> torch.Tensor:
        return torch.randn(grid[0] * grid[1] * grid[2], 3 * 2 * 14 * 14, generator=self.generator)

    def audio(self, frames: int) -> list[int]:
        return [AUDIO_START, *[AUDIO] * self._mel(frames), AUDIO_END]

    def image(self, height: int, width: int) -> list[int]:
        grid = [1, height, width]
        self.images.append(self._pixels(grid))
        self.image_grids.append(grid)
        return [VISION_START, *[IMAGE] * (height * width // 4), VISION_END]

    def _video(self, grid: list[int], second_per_grid: float) -> None:
        self.pixels.append(self._pixels(grid))
        self.grids.append(grid)
        self.seconds_per_grid.append(second_per_grid)

    def video(self, frames: int, height: int, width: int, second_per_grid: float = 1.0) -> list[int]:
        self._video([frames, height, width], second_per_grid)
        return [VISION_START, *[VIDEO] * (frames * height * width // 4), VISION_END]

    def video_with_audio(
        self, frames: int, height: int, width: int, mel: int, second_per_grid: float = 1.0, chunk: int = 50
    ) -> list[int]:
        """Interleaves in chunks of `chunk` positions, as transformers' processor does."""
        self._video([frames, height, width], second_per_grid)
        audio = list(range(self._mel(mel)))
        video = [int(t * second_per_grid * 25) for t in range(frames) for _ in range(height * width // 4)]
        ids, at = [], 0
        while audio or video:
            at += chunk
            for times, token in ((video, VIDEO), (audio, AUDIO)):
                n = sum(t < at for t in times)
                ids += [token] * n
                del times[:n]
        return [VISION_START, AUDIO_START, *ids, AUDIO_END, VISION_END]

    def add(self, *parts: list[int]) -> Batch:
        self.ids.append([token for part in parts for token in part])
        return self

    def build(self, side: str = "right") -> dict[str, torch.Tensor]:
        width = max(map(len, self.ids))
        pads = [[0] * (width - len(i)) for i in self.ids]
        rows = [i + p if side == "right" else p + i for i, p in zip(self.ids, pads, strict=True)]
        masks = [[1] * len(i) for i in self.ids]
        mask = [m + p if side == "right" else p + m for m, p in zip(masks, pads, strict=True)]
        batch = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}
        if self.mels:
            longest = max(m.shape[1] for m in self.mels)
            features = torch.zeros(len(self.mels), MEL, longest)
            frames = torch.zeros(len(self.mels), longest, dtype=torch.long)
            for i, mel in enumerate(self.mels):
                features[i, :, : mel.shape[1]] = mel
                frames[i, : mel.shape[1]] = 1
            batch |= {"input_features": features, "feature_attention_mask": frames}
        if self.pixels:
            batch |= {
                "pixel_values_videos": torch.cat(self.pixels),
                "video_grid_thw": torch.tensor(self.grids),
                "video_second_per_grid": torch.tensor(self.seconds_per_grid),
            }
        if self.images:
            batch |= {"pixel_values": torch.cat(self.images), "image_grid_thw": torch.tensor(self.image_grids)}
        return batch
