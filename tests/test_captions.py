"""Scores of captions: each against numbers worked out by hand, and what is done where Java is missing."""

import math
import shutil
from importlib.util import find_spec

import pytest

from audiopress.benchmarks import captions
from audiopress.benchmarks.captions import CaptionScorer, plain_words

needs_scorers = pytest.mark.skipif(
    find_spec("pycocoevalcap") is None, reason="needs pycocoevalcap: pip install 'audiopress[bench]'"
)
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs java on the PATH")


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A Dog barks, loudly!", "a dog barks loudly"),
        ("Don't stop the man's dog-house... it's", "do n't stop the man 's dog-house it 's"),
        ("At 3:30, 1,000 people and/or 50% pay $5.", "at 3:30 1,000 people and/or 50 % pay $ 5"),
        ('(He says: "yes" -- twice);', "he says yes twice"),
        ("He cannot, can't and canot press #", "he can not ca n't and canot press #"),
        ("Ein Käfer\tsummt\n", "ein käfer summt"),
        (" ... ", ""),
    ],
)
def test_plain_words(caption, words):
    assert plain_words(caption) == words.split()


def test_what_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)
    monkeypatch.setattr(captions, "find_spec", lambda name: object())
    assert CaptionScorer().tokenizer == "plain"
    with pytest.raises(ValueError, match="no java on the PATH"):
        CaptionScorer(java=True)
    monkeypatch.setattr(captions, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="need pycocoevalcap: pip install"):
        CaptionScorer()


@needs_scorers
class TestScores:
    """The library's scores, called as LongVALE calls them."""

    scorer = CaptionScorer(java=False) if find_spec("pycocoevalcap") else None

    def test_bleu4(self):
        hypotheses, references = ["the cat sat on the mat", "a b"], ["the cat sat on a mat", "a b c d e f"]
        one = (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4)
        assert self.scorer.bleu4(hypotheses[:1], references[:1]) == pytest.approx(one)
        both = (7 / 8 * 4 / 6 * 2 / 4 * 1 / 3) ** (1 / 4) * math.exp(1 - 12 / 8)  # 8 words for 12
        assert self.scorer.bleu4(hypotheses, references) == pytest.approx(both)

    def test_rouge_l(self):
        one = (1 + 1.2**2) * 1 * 0.6 / (0.6 + 1.2**2 * 1)  # 3 words in common, of 3 and of 5
        assert self.scorer.rouge_l(["a b c"], ["a x b c d"]) == pytest.approx(one)
        assert self.scorer.rouge_l(["a b c", "z"], ["a x b c d", "y"]) == pytest.approx(one / 2)

    def test_cider(self):
        # Every word and pair of words is in one of two references. The first caption is alike in words and pairs, of
        # four lengths; the second shares one of two words. The score is ten times the mean.
        assert self.scorer.cider(["a b", "c e"], ["a b", "c d"]) == pytest.approx(10 * (2 / 4 + 0.5 / 4) / 2)

    def test_all_without_java(self):
        scores = self.scorer.scores(["A cat!", ""], ["a cat", "a dog barks"])
        assert list(scores) == ["BLEU-4", "METEOR", "ROUGE_L", "CIDEr"]
        assert scores["METEOR"] is None
        assert scores["ROUGE_L"] == pytest.approx(50)

    def test_as_many_references_as_hypotheses(self):
        with pytest.raises(ValueError, match="got 2 and 1 references"):
            self.scorer.cider(["a", "b"], ["a"])
        with pytest.raises(ValueError, match="got 0 and 0"):
            self.scorer.bleu4([], [])


@needs_scorers
@needs_java
def test_with_java():
    scorer = CaptionScorer()
    assert scorer.tokenizer == "ptb"
    # Java alone would take a line break of Unicode for a new caption, and give none for the empty ones at the end.
    odd = ["A dog. A cat, too!", "", "one\u2028two\rthree\nfour", "He didn't (really).", "", ""]
    words = ["a dog a cat too", "", "one two three four", "he did n't -lrb- really -rrb-", "", ""]
    assert scorer.tokenize(odd) == words
    assert scorer.tokenize(["", " "]) == ["", ""]
    whole, each = scorer.meteor(["a dog barks", "", "a man walks"], ["a dog barks", "a cat", "a man is walking"])
    assert each == [1.0, 0.0, pytest.approx(0.2434, abs=1e-4)]
    assert whole != pytest.approx(sum(each) / 3)  # of all words together, not the mean
    assert scorer.scores(["A dog barks."], ["a dog barks"])["METEOR"] == 100
