"""Where the parts of a Qwen2.5-Omni thinker live: the one place that knows, as paths move between releases."""

from __future__ import annotations

from typing import Any

from torch import nn

# Class names are stable from transformers 5.17 on; attribute paths are not.
AUDIO_TOWER = "Qwen2_5OmniAudioEncoder"
VISION_TOWER = "Qwen2_5OmniVisionEncoder"
LANGUAGE_MODEL = "Qwen2_5OmniThinkerTextModel"

# q, k, v, o, up and down of every layer. The adapter is added to the LLM itself, so that its names are the same in all
# releases, and the towers, whose layers have parts of the same names, are out of reach.
LORA_TARGETS = r"layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(up|down)_proj)"


def find(thinker: nn.Module, class_name: str) -> tuple[str, nn.Module]:
    """Gives the path and the module of the one part whose class is `class_name`.

    Raises:
        ValueError: `thinker` is no Qwen2.5-Omni thinker.
    """
    level = [("", thinker)]
    while level:  # level by level: they are near the root, and a large model has thousands of modules
        for path, module in level:
            if type(module).__name__ == class_name:
                return path, module
        level = [(f"{path}.{name}".lstrip("."), m) for path, module in level for name, m in module.named_children()]
    raise ValueError(f"{type(thinker).__name__} has no {class_name}: it is not a Qwen2.5-Omni thinker")


def audio_tower(thinker: nn.Module) -> nn.Module:
    """Gives the audio encoder."""
    return find(thinker, AUDIO_TOWER)[1]


def vision_tower(thinker: nn.Module) -> nn.Module:
    """Gives the vision encoder."""
    return find(thinker, VISION_TOWER)[1]


def language_model(thinker: nn.Module) -> nn.Module:
    """Gives the LLM without its head."""
    return find(thinker, LANGUAGE_MODEL)[1]


def head_size(text: Any) -> int:
    """Gives the channels of an attention head, of the LLM's config."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
