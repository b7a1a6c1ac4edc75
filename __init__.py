"""audiopress: pluggable audio-token compressors for Qwen2.5-Omni.

Importing the package is light: torch and transformers are loaded when a name is first used.

Example:
    >>> import audiopress
    >>> audiopress.available()                                   # every method, its presets, stage and needs
    >>> compressor = audiopress.build("pooling", keep_ratio=0.5, hidden_size=3584)
    >>> model, processor = audiopress.load("omni-small", compressor="stacking")
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "available": "compression",
    "build": "compression",
    "Chain": "compression",
    "Compressor": "compression",
    "Context": "compression",
    "TokenStream": "compression",
    "CompressedOmni": "models",
    "Layout": "models",
    "load": "models",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'audiopress' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
