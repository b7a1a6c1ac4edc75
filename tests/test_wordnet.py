"""WordNet's texts: what can be read out as it is written, and nothing else."""

from __future__ import annotations

import pytest

from audiopress.data import wordnet
from audiopress.models.packages import FetchError

LICENCE = "  1 This software and database is being provided to you | as a licence is.\n"
NOUNS = """\
00001740 03 n 01 entity 0 003 | that which is perceived (or known); "they called it `the end' then"
00001930 03 n 01 thing 0 000 | an amount of 3 percent; a set of two; the U.S. army; too short
00002000 03 n 01 other 0 000 | a set of two
"""


@pytest.fixture
def package(monkeypatch, tmp_path):
    """A small WordNet where the package's files would be."""
    folder = tmp_path / "usr/share/wordnet"
    folder.mkdir(parents=True)
    for name in ("noun", "verb", "adj", "adv"):
        (folder / f"data.{name}").write_text(LICENCE + (NOUNS if name == "noun" else ""))
    monkeypatch.setattr(wordnet.packages, "ensure", lambda package, download: tmp_path)


def test_glosses_become_sentences(package):
    assert wordnet.sentences() == ["That which is perceived.", "They called it the end then.", "A set of two."]


def test_an_empty_cache_says_how_to_fill_it(monkeypatch, tmp_path):
    monkeypatch.setenv("AUDIOPRESS_CACHE", str(tmp_path))
    with pytest.raises(FetchError, match=r"wordnet-base is not in the cache .*`python benchmarks/align\.py`"):
        wordnet.sentences(download=False)


def test_the_real_one():
    try:
        sentences = wordnet.sentences(download=False)
    except FetchError as error:
        pytest.skip(str(error))
    assert len(sentences) > 100_000
    assert len(set(sentences)) == len(sentences)
    assert not {character for text in sentences for character in text} - set(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz ,.'-"
    )
