"""Compressors: maps from a stream of audio tokens to a shorter one.

A method is one file here, with one line below that imports it.
"""

from . import controls as controls
from . import conv as conv
from . import pooling as pooling
from . import stacking as stacking
from .base import Compressor, Context
from .budget import token_budget
from .chain import Chain
from .registry import available, build, from_description, markdown_table
from .stream import TokenStream

__all__ = [
    "Chain",
    "Compressor",
    "Context",
    "TokenStream",
    "available",
    "build",
    "from_description",
    "markdown_table",
    "token_budget",
]
