"""The speech that `align.py` trains on: recorded prompts and synthetic voices, in one tensor on the GPU."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from audiopress.benchmarks.alignment.batch import RATE, TOKEN_SAMPLES, Batch, audio_tokens, labels_of, pad_rows
from audiopress.data import synthesis, wordnet
from audiopress.data.collator import Encoder
from audiopress.data.media import read_audio
from audiopress.data.records import Record, assistant, user
from audiopress.data.speech import INSTRUCTION, normalise, split_of
from audiopress.kernels.packed import upload
from audiopress.models.rewrite import IGNORE

# All guesses.
SPEED, LEAD, TAIL = (0.9, 1.1), (0.0, 0.4), (0.1, 0.6)  # of an utterance: factor, and seconds of silence
NOISY, NOISE_DB = 0.3, (-40.0, -15.0)  # share of utterances with noise, and its power against theirs
DRAWN = 4096  # utterances that are sorted by length and cut into batches
# Shares of the utterances: recorded prompts, pieces of them in other orders, synthetic voices.
SHARES = {"recorded": 0.1, "pieces": 0.15, "synthetic": 0.75}
# Shares of synthetic texts: sentences of common words, prompts and pieces of them, words in no order, and letters,
# numbers and the like. With too many prompts and too few other words a model writes the prompt that is nearest.
KINDS = {"sentence": 0.3, "prompt": 0.12, "piece": 0.1, "words": 0.3, "spelled": 0.18}
COMMON = 20_000  # words that sentences are made of: of WordNet's sentences 119,000 hold no rarer one
EVENED = 0.5  # a word is drawn as often as sentences hold it, to this power: the rare ones are what is hard
LONGEST = 20.0  # seconds of an utterance
JOINS, PIECES = 3, 30  # rows of two to four recorded prompts, and of one to four pieces, for each prompt
IN_A_ROW, PIECE_SECONDS = 3, 0.2  # so many pieces of one prompt at most, which last so long at least

_PLAIN = re.compile(r"[A-Za-z0-9 ,.'?!-]+")  # what voices read as the prompts' speaker does
_LETTERS = "BCDEFGHIJKLMNOPQRSTUVWXYZ"  # not A, which voices take for the article
_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_OTHERS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth "
    "fifteenth sixteenth seventeenth eighteenth nineteenth twentieth thirtieth fortieth fiftieth sixtieth seventieth "
    "eightieth ninetieth hundredth thousandth millionth Monday Tuesday Wednesday Thursday Friday Saturday Sunday "
    "January February March April May June July August September October November December "
    "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november oscar papa quebec romeo "
    "sierra tango uniform victor whiskey yankee zulu "  # the spelling alphabet
    "ampersand asterisk backslash backtick bracket caret colon comma dash dollar dot equals hash hyphen percent period "
    "pipe plus pound quote semicolon slash space star tilde underscore "  # characters
    "I'm you're he's she's it's that's we're they're I've you've we've they've I'll you'll we'll they'll "
    "isn't aren't wasn't doesn't don't didn't can't couldn't won't wouldn't haven't hasn't"
)


@dataclass(frozen=True)
class Texts:
    """Draws what is to be spoken.

    Args:
        prompts: texts of the train split.
        sentences: of common words.
        words: these words, and how often each is drawn.
    """

    prompts: Sequence[str]
    sentences: Sequence[str]
    words: Mapping[str, float]

    @classmethod
    def load(cls, prompts: Sequence[Record]) -> Texts:
        """Takes the texts of records, and WordNet's, without its rare words: the prompts have few."""
        texts = [record.reference for record in prompts if _PLAIN.fullmatch(record.reference)]
        sentences = {sentence: normalise(sentence).split() for sentence in wordnet.sentences()}
        counts = Counter(word for said in sentences.values() for word in said)
        common = {word: count**EVENED for word, count in counts.most_common(COMMON)}
        plain = [sentence for sentence, said in sentences.items() if common.keys() >= set(said)]
        return cls(texts, plain, common)

    def draw(self, rng: random.Random) -> str:
        """Gives one text of the train split: what test prompts say is not trained on in other voices either."""
        while split_of(text := self._draw(rng)) != "train":
            pass
        return text

    @cached_property
    def _summed(self) -> list[float]:
        return list(accumulate(self.words.values()))

    def _draw(self, rng: random.Random) -> str:
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        if kind == "sentence":
            return rng.choice(self.sentences)
        if kind == "prompt":
            return rng.choice(self.prompts)
        if kind == "piece":
            words = rng.choice(self.prompts).split()
            first = rng.randrange(len(words))
            return " ".join(words[first : first + rng.randint(1, 6)])
        if kind == "words":
            few = rng.choice((1, 1, 1, 2, 3, 5, 8))
            return " ".join(rng.choices(list(self.words), cum_weights=self._summed, k=few))
        return _spelled(rng)


def _spelled(rng: random.Random) -> str:
    """Gives letters, numbers, or words that count, date, spell or name a character."""
    drawn = (_LETTERS, _OTHERS.split(), None)[rng.randrange(3)]
    few = rng.choice((1, 1, 1, 2, 3, 4))
    return " ".join(_number(rng) if drawn is None else rng.choice(drawn) for _ in range(few))


def _number(rng: random.Random) -> str:
    hundreds, rest = divmod(rng.choice((rng.randrange(20), rng.randrange(100), rng.randrange(1000))), 100)
    units = _UNITS.split()
    words = [units[hundreds], "hundred"] if hundreds else []
    if rest >= 20:
        words.append(_TENS.split()[rest // 10 - 2])
        rest %= 10
    return " ".join([*words, units[rest]] if rest or not words else words)


@dataclass(frozen=True)
class Prompt:
    """A recorded prompt: its pieces' words, and where they end, in seconds; and its int16 samples."""

    pieces: Sequence[tuple[str, float]]
    wave: np.ndarray

    def draw(self, rng: random.Random) -> tuple[str, np.ndarray]:
        """Gives some pieces in a row, and their samples."""
        first = rng.randrange(len(self.pieces))
        chosen = self.pieces[first : first + rng.randint(1, IN_A_ROW)]
        start, stop = (round(second * RATE) for second in (self.pieces[first - 1][1] if first else 0, chosen[-1][1]))
        return " ".join(text for text, _ in chosen), self.wave[start:stop]


def draw_pieces(prompts: Sequence[Prompt], rng: random.Random) -> tuple[str, np.ndarray]:
    """Gives one to four pieces of prompts in a row, and their samples; what test prompts say is not among them."""
    while True:
        drawn = [rng.choice(prompts).draw(rng) for _ in range(rng.randint(1, 4))]
        text = " ".join(words for words, _ in drawn)
        if all(len(wave) >= PIECE_SECONDS * RATE for _, wave in drawn) and split_of(text) == "train":
            return text, np.concatenate([wave for _, wave in drawn])


@dataclass(frozen=True)
class Spoken:
    """Texts and their sounds, one after another.

    Args:
        texts: what is said.
        lengths: in samples, of each.
        samples: of all, int16; a tensor, because those go from process to process without being copied.
    """

    texts: Sequence[str]
    lengths: Sequence[int]
    samples: Tensor

    @classmethod
    def join(cls, texts: Sequence[str], waves: Sequence[np.ndarray]) -> Spoken:
        """Takes int16 samples; the empty ones and those over `LONGEST` are left out."""
        kept = [i for i, wave in enumerate(waves) if 0 < len(wave) <= LONGEST * RATE]
        samples = np.concatenate([np.empty(0, np.int16), *(waves[i] for i in kept)])
        return cls([texts[i] for i in kept], [len(waves[i]) for i in kept], torch.from_numpy(samples))


def speak_all(texts: Sequence[str], seed: int) -> Spoken:
    """Speaks each text in a voice of its own; for a process beside the training."""
    rng = random.Random(seed)
    return Spoken.join(texts, [synthesis.speak(text, synthesis.draw_voice(rng)) for text in texts])


@dataclass(frozen=True)
class Utterance:
    """Where it lies among the samples, and the token ids of what is said."""

    start: int
    length: int
    answer: list[int]


@dataclass(frozen=True)
class Drawn:
    """An utterance as it is heard in a batch: faster or slower, after so many seconds of silence."""

    utterance: Utterance
    speed: float
    lead: float

    @property
    def samples(self) -> float:
        """How long that is."""
        return self.utterance.length / self.speed + self.lead * RATE


class SpeechBank:
    """Utterances to train on, more and more of them.

    Args:
        encoder: of the model.
        hours: it has room for.
        device: where it lies.
    """

    def __init__(self, encoder: Encoder, hours: float, device: torch.device) -> None:
        self.tokenizer, self.device = encoder.processor.tokenizer, device
        self.samples = torch.zeros(round(hours * 3600 * RATE), dtype=torch.int16, device=device)
        self.used = 0
        self.utterances: dict[str, list[Utterance]] = {part: [] for part in SHARES}
        self.waiting: list[list[Drawn]] = []
        record = Record("speech", (user(INSTRUCTION), assistant("?")), audio=Path("speech"))
        self.audio_id = self.tokenizer.convert_tokens_to_ids(encoder.processor.audio_token)
        ids, labels = encoder._tokenize(record, record.messages, {self.audio_id: [self.audio_id]}, False)
        at, answer = ids.index(self.audio_id), next(i for i, label in enumerate(labels) if label != IGNORE)
        self.prefix, self.suffix = ids[:at], ids[at + 1 : answer]
        self.end = next(label for label in reversed(labels) if label != IGNORE)

    @property
    def hours(self) -> float:
        """Of what there is."""
        return self.used / RATE / 3600

    def has_room(self, utterances: int) -> bool:
        """Tells whether so many more fit in, however long they are."""
        return self.used + utterances * LONGEST * RATE <= len(self.samples)

    def add(self, spoken: Spoken, part: str = "synthetic") -> None:
        """Takes utterances, as a part of `SHARES`."""
        if not spoken.texts:
            return
        answers = self.tokenizer(list(spoken.texts), add_special_tokens=False)["input_ids"]
        end = self.used + len(spoken.samples)
        if end > len(self.samples):
            raise ValueError(
                f"there is room for {len(self.samples) / RATE / 3600:g} hours of speech, and they are full"
            )
        self.samples[self.used : end] = spoken.samples.to(self.device)
        for length, answer in zip(spoken.lengths, answers, strict=True):
            self.utterances[part].append(Utterance(self.used, length, answer))
            self.used += length

    def add_recorded(
        self, records: Sequence[Record], rng: random.Random, pieces: Mapping[str, Sequence[tuple[str, float]]] = {}
    ) -> None:
        """Takes recorded prompts, each by itself and several in a row, and pieces of them.

        Args:
            records: of the prompts.
            rng: draws what stands in a row.
            pieces: of each; see `cuts`.
        """
        waves = [(np.clip(read_audio(r.audio), -1, 1) * (2**15 - 1)).astype(np.int16) for r in records]
        self.add(Spoken.join([record.reference for record in records], waves), "recorded")
        rows = [[rng.randrange(len(records)) for _ in range(rng.randint(2, 4))] for _ in range(JOINS * len(records))]
        texts = [" ".join(records[i].reference for i in chosen) for chosen in rows]
        self.add(Spoken.join(texts, [np.concatenate([waves[i] for i in chosen]) for chosen in rows]), "recorded")
        if prompts := [Prompt(pieces[r.id], wave) for r, wave in zip(records, waves, strict=True) if r.id in pieces]:
            rows = [draw_pieces(prompts, rng) for _ in range(PIECES * len(records))]
            self.add(Spoken.join(*zip(*rows, strict=True)), "pieces")

    def batch(self, rng: random.Random, tokens: int) -> Batch:
        """Gives a batch of about so many tokens, or one row; its utterances are of about one length."""
        if not self.waiting:
            drawn = [self._draw(rng) for _ in range(DRAWN)]
            self.waiting = list(_cut(sorted(drawn, key=lambda one: one.samples), self._overhead(), tokens))
            rng.shuffle(self.waiting)
        rows = self.waiting.pop()
        samples = round((max(one.samples for one in rows) / RATE + rng.uniform(*TAIL)) * RATE / TOKEN_SAMPLES)
        samples *= TOKEN_SAMPLES
        count = audio_tokens(samples)
        head = [*self.prefix, *[self.audio_id] * count, *self.suffix]
        answers = [[*one.utterance.answer, self.end] for one in rows]
        ids = upload(pad_rows([[*head, *answer] for answer in answers], self.end), self.device)
        first = len(self.prefix)
        return Batch(
            ids,
            labels_of([[IGNORE] * len(head) + answer for answer in answers]),
            torch.arange(ids.shape[1], device=self.device).expand(3, -1),
            torch.arange(first, first + count, device=self.device),
            self._waves(rows, samples),
            [torch.tensor(one.utterance.answer) for one in rows],
        )

    def _draw(self, rng: random.Random) -> Drawn:
        there = [part for part, own in self.utterances.items() if own]
        (part,) = rng.choices(there, [SHARES[part] for part in there])
        return Drawn(rng.choice(self.utterances[part]), rng.uniform(*SPEED), rng.uniform(*LEAD))

    def _overhead(self) -> int:
        """Gives the tokens of a row beside those of its utterance and answer."""
        return len(self.prefix) + len(self.suffix) + 1 + round(max(TAIL) * RATE / TOKEN_SAMPLES)

    def _waves(self, rows: Sequence[Drawn], samples: int) -> Tensor:
        """Gives what is heard, `[B, samples]` float32: speed by linear interpolation, and noise in some rows."""

        def column(values: Sequence[float], dtype: torch.dtype = torch.float64) -> Tensor:
            return upload(values, self.device, dtype)[:, None]

        starts = column([one.utterance.start for one in rows], torch.long)
        lengths = column([one.utterance.length for one in rows], torch.long)
        at = torch.arange(samples, device=self.device, dtype=torch.float64) - column([one.lead * RATE for one in rows])
        at = at * column([one.speed for one in rows])
        inside = (at >= 0) & (at < lengths - 1)
        whole = at.long().clamp(min=0).minimum(lengths - 2)
        left, right = (self.samples[starts + whole + i].float() for i in (0, 1))
        waves = torch.where(inside, left + (right - left) * (at - whole).float(), 0) / 2**15
        low, high = NOISE_DB
        decibels = low + (high - low) * torch.rand(len(rows), 1, device=self.device)
        power = waves.square().sum(dim=1, keepdim=True) / inside.sum(dim=1, keepdim=True).clamp(min=1)
        noise = (power * 10 ** (decibels / 10)).sqrt() * torch.randn_like(waves)
        return waves + noise * (torch.rand(len(rows), 1, device=self.device) < NOISY)


def _cut(drawn: Sequence[Drawn], overhead: int, tokens: int) -> list[list[Drawn]]:
    """Cuts utterances, sorted by length, into batches of at most so many tokens, or one row."""
    batches: list[list[Drawn]] = [[]]
    width = 0
    for one in drawn:
        width = max(width, round(one.samples / TOKEN_SAMPLES) + len(one.utterance.answer) + overhead)
        if batches[-1] and width * (len(batches[-1]) + 1) > tokens:
            batches.append([])
            width = round(one.samples / TOKEN_SAMPLES) + len(one.utterance.answer) + overhead
        batches[-1].append(one)
    return batches
