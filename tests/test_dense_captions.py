"""Dense captions: how events are read from an answer and scored, SODA_c against every possible matching."""

import random
from itertools import combinations

import pytest

from audiopress.benchmarks.captions import plain_words
from audiopress.benchmarks.dense_captions import (
    NOTHING,
    Event,
    dense_scores,
    merge_alike,
    overlap,
    read_official,
    read_tolerant,
    soda_c,
    within,
)


class WordScorer:
    """Stands in for the scorers: its METEOR and its CIDEr are the share of words in common."""

    tokenizer = "plain"

    def __init__(self, java=True):
        self.java = java

    def tokenize(self, texts):
        return [" ".join(plain_words(text)) for text in texts]

    def meteor(self, hypotheses, references):
        each = [
            len(set(a.split()) & set(b.split())) / (len(set(a.split()) | set(b.split())) or 1)
            for a, b in zip(hypotheses, references, strict=True)
        ]
        return sum(each) / len(each), each

    def cider(self, hypotheses, references):
        return self.meteor(hypotheses, references)[0]

    def scores(self, hypotheses, references):
        pair = self.tokenize(hypotheses), self.tokenize(references)
        return {"METEOR": 100 * self.meteor(*pair)[0] if self.java else None, "CIDEr": 100 * self.cider(*pair)}


# answer -> events of a video of 200 s: what LongVALE reads, and what we read
ANSWERS = [
    ("From 05 to 10, a dog.\nFrom 11 to 99, rain", [(10, 22, "a dog."), (22, 200, "rain")], None),
    ("Sure! From 5 to 9, a dog. ", [(10, 20, "a dog.")], None),
    ("From 30 to 10, back", [(60, 22, "back")], [(20, 62, "back")]),
    ("From 50 to 120, late", [(100, 242, "late")], [(100, 200, "late")]),
    ("From 5.0% to 9.5%, a dog.\nFrom 20.0% to 30.0%: rain.", [], [(10, 19, "a dog."), (40, 60, "rain.")]),
    ("from 5 to 9: a dog", [], [(10, 20, "a dog")]),
    ("Between 00:10 and 00:21.5, a dog, a cat", [], [(10, 21.5, "a dog, a cat")]),
    ("1. From 10 seconds to 15 seconds, a dog", [], [(10, 15, "a dog")]),
    (
        "From 05 to 10, a dog. From 11 to 20, rain.",
        [(10, 22, "a dog. From 11 to 20, rain.")],
        [(10, 22, "a dog"), (22, 42, "rain.")],
    ),
    ("From 05 to 10, he counts from 1 to 3.", [(10, 22, "he counts from 1 to 3.")], None),
    ("From the start, rain", [], []),
    ("a dog", [], []),
    ("", [], []),
]


@pytest.mark.parametrize(("answer", "official", "tolerant"), ANSWERS)
def test_events_are_read(answer, official, tolerant):
    for read, events in ((read_official, official), (read_tolerant, official if tolerant is None else tolerant)):
        found = read(answer, 200.0)
        assert [(round(e.start, 6), round(e.end, 6), e.text) for e in found] == events, read.__name__


def test_alike_neighbours_are_one():
    long = "a man in a red shirt plays the guitar and sings to a crowd of people"
    events = [
        Event(10, 20, long),
        Event(21, 30, long + "."),  # one letter of 69
        Event(29, 40, long),
        Event(42, 50, long),  # two percent later
        Event(50, 60, "a dog"),
        Event(60, 70, "a cat"),
    ]
    assert merge_alike(events) == [Event(10, 40, long), *events[3:]]
    assert merge_alike([]) == []
    assert read_official("From 10 to 19, x\nFrom 20 to 29, x", 50.0) == [Event(5, 15, "x")]


def test_overlap():
    assert overlap(Event(0, 10, ""), Event(5, 20, "")) == pytest.approx(0.25)
    assert overlap(Event(0, 10, ""), Event(10, 20, "")) == 0
    assert overlap(Event(10, 0, ""), Event(0, 10, "")) == 0
    assert overlap(Event(3, 3, ""), Event(3, 3, "")) == 0
    assert 0.4999 < overlap(Event(0, 10, ""), Event(0, 5, "")) < 0.5  # LongVALE's: just below


def every_matching(worth):
    """Gives the largest sum over all order-preserving matchings of one to one."""
    rows, columns = len(worth), len(worth[0])
    return max(
        sum(worth[i][j] for i, j in zip(chosen, others, strict=True))
        for size in range(min(rows, columns) + 1)
        for chosen in combinations(range(rows), size)
        for others in combinations(range(columns), size)
    )


@pytest.mark.parametrize("seed", range(40))
def test_soda_c_is_that_of_the_best_matching(seed):
    draw = random.Random(seed)
    answer, truth = (
        [
            Event(start := draw.uniform(0, 8), start + draw.uniform(0, 6), " ".join(draw.choices("abcd", k=2)))
            for _ in range(draw.randint(1, 5))
        ]
        for _ in range(2)
    )
    meteor = WordScorer().meteor
    worth = [[overlap(a, b) * meteor([a.text], [b.text])[0] for b in truth] for a in answer]
    best = every_matching(worth)
    precision, recall = best / len(answer), best / len(truth)
    expected = 2 * precision * recall / (precision + recall) if best else 0
    assert soda_c(answer, truth, meteor) == pytest.approx(expected)


def test_soda_c_by_hand():
    meteor = WordScorer().meteor
    truth = [Event(0, 10, "a"), Event(10, 20, "b"), Event(20, 30, "c")]
    assert soda_c(truth, truth, meteor) == pytest.approx(1)
    assert soda_c(truth[:1], truth, meteor) == pytest.approx(2 * 1 / 4)  # precision 1, recall 1/3
    assert soda_c(truth[::-1], truth, meteor) == pytest.approx(2 * 1 / 6)  # told backwards, one event can be matched
    assert soda_c([], truth, meteor) == 0
    assert soda_c([Event(40, 50, "a")], truth, meteor) == 0


def test_events_within_a_threshold():
    truth = [Event(0, 10, "a"), Event(0, 12, "b"), Event(50, 60, "c")]
    answer = [Event(0, 10, "x"), Event(50, 54, "y")]
    assert within(answer, truth, 0.3) == (["x", "x", "y"], ["a", "b", "c"])
    assert within(answer, truth, 0.5) == (["x", "x", "y"], ["a", "b", NOTHING])
    assert within(answer, truth, 0.9) == (["x", "y"], ["a", NOTHING])
    assert within([], truth, 0.3) == ([], [])


def test_scores_are_means_over_videos_and_thresholds():
    truths = [[Event(0, 10, "A dog barks.")], [Event(0, 10, "Rain")], [Event(0, 10, "Wind")]]
    answers = [[Event(0, 6, "a dog barks")], [Event(0, 10, "ráin"), Event(80, 90, "b")], []]
    scores = dense_scores(answers, truths, WordScorer())
    # The first: right up to the threshold of 0.5. The second: its letter is a blank, as for LongVALE. No third.
    assert scores["CIDEr"] == scores["METEOR"] == pytest.approx(100 * (2 / 4 + 0 + 0) / 3)
    assert scores["SODA_c"] == pytest.approx(100 * 0.6 / 3)
    assert scores["parsed"] == pytest.approx(200 / 3)
    without = dense_scores(answers, truths, WordScorer(java=False))
    assert (without["SODA_c"], without["METEOR"]) == (None, None)
    assert without["CIDEr"] == scores["CIDEr"]
