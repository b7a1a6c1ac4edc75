"""Scores of captions: BLEU-4, METEOR, ROUGE_L and CIDEr, by pycocoevalcap, whose numbers papers report.

METEOR and the tokenizer of Penn Treebank are Java programs. Without Java there is no METEOR, and captions are cut into
words by a few rules of ours, which moves the other scores a little: results name their tokenizer.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import Any, Literal

NEEDS_JAVA = "not computed (needs java)"

_CLITIC = re.compile(r"((?<=\bcan)not|n't|'(?:s|m|d|re|ve|ll))\b")
# A clitic, a word with whatever joins its parts, or a sign that is read aloud; other punctuation is dropped.
_WORD = re.compile(r"n't|'\w+|\w+(?:[-/.,:']\w+)*|[%$&#*]")


class CaptionScorer:
    """Tokenizes captions and scores them against one reference each.

    Every score takes `hypotheses` and `references`, as many of each, all from `tokenize`.

    Args:
        java: whether to use it. Default: if there is a `java` to call.

    Raises:
        ValueError: pycocoevalcap is not installed, or Java is asked for and not there.
    """

    def __init__(self, java: bool | None = None) -> None:
        if find_spec("pycocoevalcap") is None:
            raise ValueError("scores of captions need pycocoevalcap: pip install 'audiopress[bench]'")
        if java and not shutil.which("java"):
            raise ValueError("there is no java on the PATH")
        self.java = shutil.which("java") is not None if java is None else java

    @property
    def tokenizer(self) -> Literal["ptb", "plain"]:
        """Which one cuts captions into words: Stanford's of Penn Treebank, or `plain_words`."""
        return "ptb" if self.java else "plain"

    def tokenize(self, captions: Sequence[str]) -> list[str]:
        """Gives each caption in lower case, its words between single blanks, without punctuation."""
        # Java would begin a new caption at every kind of line break, and end before the last empty ones.
        lines = [" ".join(caption.split()) for caption in captions]
        if not self.java:
            return [" ".join(plain_words(line)) for line in lines]
        filled = [i for i, line in enumerate(lines) if line]
        if filled:
            from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

            tokenized = PTBTokenizer().tokenize({i: [{"caption": lines[i]}] for i in filled})
            for i in filled:
                lines[i] = tokenized[i][0]
        return lines

    def bleu4(self, hypotheses: Sequence[str], references: Sequence[str]) -> float:
        """Gives BLEU-4 (Papineni et al., 2002) of the corpus, not smoothed."""
        from pycocoevalcap.bleu.bleu import Bleu

        return float(Bleu(4).compute_score(*_paired(hypotheses, references), verbose=0)[0][3])

    def rouge_l(self, hypotheses: Sequence[str], references: Sequence[str]) -> float:
        """Gives the mean ROUGE_L (Lin, 2004), recall weighted by beta = 1.2."""
        from pycocoevalcap.rouge.rouge import Rouge

        return float(Rouge().compute_score(*_paired(hypotheses, references))[0])

    def cider(self, hypotheses: Sequence[str], references: Sequence[str]) -> float:
        """Gives CIDEr (1411.5726) as LongVALE counts it, CIDEr-D: word frequencies are those of these references."""
        from pycocoevalcap.cider.cider import Cider

        return float(Cider().compute_score(*_paired(hypotheses, references))[0])

    def meteor(self, hypotheses: Sequence[str], references: Sequence[str]) -> tuple[float, list[float]]:
        """Gives METEOR 1.5 (Denkowski and Lavie, 2014) of all captions together, and of each; needs Java."""
        assert self.java, "METEOR without Java"
        whole, each = self._meteor.compute_score(*_paired(hypotheses, references))
        return whole, each

    def scores(self, hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float | None]:
        """Gives the four scores of captions that are not tokenized yet, in percent; None where Java is missing."""
        both = self.tokenize([*hypotheses, *references])
        pair = both[: len(hypotheses)], both[len(hypotheses) :]
        return {
            "BLEU-4": 100 * self.bleu4(*pair),
            "METEOR": 100 * self.meteor(*pair)[0] if self.java else None,
            "ROUGE_L": 100 * self.rouge_l(*pair),
            "CIDEr": 100 * self.cider(*pair),
        }

    @cached_property
    def _meteor(self) -> Any:
        """The running Java program."""
        from pycocoevalcap.meteor.meteor import Meteor

        return Meteor()


def plain_words(caption: str) -> list[str]:
    """Cuts a caption into words without Java: much as Penn Treebank's rules do, punctuation dropped.

    `don't` is `do n't`, `dog's` is `dog 's`; `dog-house`, `3:30` and `1,000` stay whole. Brackets are dropped, where
    the official tokenizer keeps them as words (`-lrb-`), and an abbreviation loses its last full stop. Of 1,905 English
    sentences 98 % came out as from the official one (measured on recorded prompts and on Python's manual).
    """
    return _WORD.findall(_CLITIC.sub(r" \1", caption.lower()))


def _paired(hypotheses: Sequence[str], references: Sequence[str]) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Gives references and hypotheses as pycocoevalcap takes them, in its order."""
    if len(hypotheses) != len(references) or not hypotheses:
        raise ValueError(f"captions need one reference each, got {len(hypotheses)} and {len(references)} references")
    given, wanted = ({i: [text] for i, text in enumerate(texts)} for texts in (hypotheses, references))
    return wanted, given
