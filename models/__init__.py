"""Qwen2.5-Omni with a compressor in its slot: layout, rewrite, encoders, loading and saving."""

from .layout import Kind, Layout
from .loading import load
from .omni import CompressedOmni
from .rewrite import LLMInputs, rewrite

__all__ = ["CompressedOmni", "Kind", "LLMInputs", "Layout", "load", "rewrite"]
