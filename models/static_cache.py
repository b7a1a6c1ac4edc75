"""A static cache that is kept from one call of `generate` to the next: what was compiled for it serves again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

BUCKET = 4096  # tokens; a guess: shorter ones compile more often, longer ones attend to more emptiness


def takes_static_cache(options: Mapping[str, Any], default: bool) -> bool:
    """Tells whether options of `generate` want a static cache whose size is known: one sequence per prompt.

    Args:
        options: what `generate` was called with.
        default: whether one is wanted where they say nothing about caches.
    """
    wanted = options.get("cache_implementation", "static" if default else None) == "static"
    alone = all((options.get(name) or 1) == 1 for name in ("num_beams", "num_return_sequences"))
    free = options.get("past_key_values") is None and options.get("use_cache", True)
    return wanted and alone and free and options.get("max_new_tokens") is not None


class KeptCache:
    """The last static cache, and what it was made for."""

    def __init__(self) -> None:
        self._cache: StaticCache | None = None
        self._made_for: tuple[Any, ...] = ()

    def emptied(self, config: Any, embeds: Tensor, new: int) -> StaticCache:
        """Gives an empty cache of a whole number of buckets: the last one, if it fits.

        Args:
            config: the LLM's.
            embeds: `[B, L, D]`, the prompts.
            new: tokens that may follow.
        """
        batch, length, _ = embeds.shape
        room = -(-(length + new) // BUCKET) * BUCKET
        # A cache made in inference mode cannot be written to outside of it.
        made_for = (batch, room, embeds.device, embeds.dtype, torch.is_inference_mode_enabled())
        if self._cache is not None and made_for == self._made_for:
            self._cache.reset()
        else:
            self._cache = None  # before the new one takes its memory
            self._cache, self._made_for = StaticCache(config, max_cache_len=room), made_for
        return self._cache
