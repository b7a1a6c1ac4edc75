"""Compressors: maps from a stream of audio tokens to a shorter one.

A method is one file here, with one line below that imports it.
"""

from . import affinity as affinity
from . import atome as atome
from . import attention_topk as attention_topk
from . import cdpruner as cdpruner
from . import controls as controls
from . import conv as conv
from . import dart as dart
from . import divprune as divprune
from . import echoing as echoing
from . import fastadasp as fastadasp
from . import fastlongspeech as fastlongspeech
from . import omnisift as omnisift
from . import omnizip as omnizip
from . import pooling as pooling
from . import qformer as qformer
from . import sa_map as sa_map
from . import speechprune as speechprune
from . import stacking as stacking
from . import ward as ward
from . import ward_refined as ward_refined
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
