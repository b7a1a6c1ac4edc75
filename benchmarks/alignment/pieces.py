"""Where recorded prompts can be cut, so that pieces of them can be said in other orders.

Whisper tells where a word ends: some heads of its decoder's cross-attention look at what is being written. Their
weights, over all tokens of the known text, are cut into one stretch of time per token by dynamic programming, after the
time stamps of words in openai/whisper (whisper/timing.py), which warps them in time. A sound is cut where it is quiet
beside that place; words between which it is not stay together.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import median_filter
from torch import Tensor
from tqdm import tqdm

from audiopress.benchmarks.alignment.batch import RATE, log_mel
from audiopress.data.media import read_audio
from audiopress.data.records import Record
from audiopress.models.encoders import LAST_LAYER, encode_audio
from audiopress.models.layout import AUDIO_TOKENS_PER_SECOND
from audiopress.models.whisper import PROMPT_LENGTH, WHISPER_BASE, CompressedWhisper, load_whisper

SMOOTHED = 3  # tokens of 40 ms; openai/whisper smooths over 7 states of 20 ms
NEAR, FRAME = 0.08, 0.01  # seconds: a cut is at the quietest place so near, by so short frames (guesses)
QUIET = 0.01  # of a sound's mean power: what Whisper-base hears of pieces is then as good as at 0.001, at 0.1 it is not


def cuts(records: Sequence[Record], file: Path) -> dict[str, list[tuple[str, float]]]:
    """Gives the pieces that each record can be cut into, by its id: their words, and where they end, in seconds.

    Args:
        records: of English prompts.
        file: where that is kept: read if it is there, or made, in two minutes on a CPU. Sounds that are longer than
            Whisper hears at once are left out.
    """
    if not file.is_file():
        whisper = load_whisper(WHISPER_BASE)
        whisper.model.set_attn_implementation("eager")  # the only one that shows its weights
        waves = ((r, read_audio(r.audio)) for r in tqdm(records, "words", leave=False))
        longest = whisper.extractor.n_samples
        found = {r.id: cut(whisper, wave, r.reference) for r, wave in waves if len(wave) <= longest}
        file.write_text(json.dumps(found))
    return {name: [(text, end) for text, end in pieces] for name, pieces in json.loads(file.read_text()).items()}


@torch.no_grad()
def cut(whisper: CompressedWhisper, wave: np.ndarray, text: str) -> list[tuple[str, float]]:
    """Gives the pieces of a sound: their words, and where they end, in seconds; the last one's end is the sound's."""
    words = text.split()
    (ids,) = whisper.texts([" ".join(words)], ["en"])
    mel = log_mel(torch.from_numpy(wave)[None], whisper.extractor)  # of the sound alone, which is quick
    sound, _ = encode_audio(whisper.tower, mel, torch.ones(1, mel.shape[2], dtype=torch.long), LAST_LAYER)
    seen = whisper.model.model.decoder(ids[None], encoder_hidden_states=sound.embeds[None], output_attentions=True)
    heads = whisper.model.generation_config.alignment_heads
    looks = torch.stack([seen.cross_attentions[layer][0, head] for layer, head in heads])
    # What a token looked at is what is written next: from the prompt's last token on, without the text's end.
    starts = stretches(sharpened(looks)[PROMPT_LENGTH - 1 : -1]) / AUDIO_TOKENS_PER_SECOND
    counts = [len(whisper.tokenizer(f" {word}", add_special_tokens=False).input_ids) for word in words]
    firsts = np.cumsum(counts)
    if firsts[-1] + 1 != len(starts):
        raise ValueError(f"the words of {text!r} have {firsts[-1]} tokens, the text {len(starts) - 1}")
    quiet = QUIET * np.square(wave, dtype=np.float64).mean()
    pieces, begun, last = [], 0, 0.0
    for i, first in enumerate(firsts[:-1], start=1):
        second, power = quietest(wave, starts[first])
        if power < quiet and second > last:
            pieces.append((" ".join(words[begun:i]), second))
            begun, last = i, second
    return [*pieces, (" ".join(words[begun:]), len(wave) / RATE)]


def sharpened(looks: Tensor) -> np.ndarray:
    """Gives what several heads `[H, T, S]` say together, `[T, S]`: each less its mean over the tokens, and smoothed."""
    mean, deviation = looks.mean(dim=1, keepdim=True), looks.std(dim=1, keepdim=True, correction=0)
    scaled = ((looks - mean) / (deviation + 1e-6)).float().cpu().numpy()
    joined: np.ndarray = median_filter(scaled, (1, 1, SMOOTHED), mode="nearest").mean(axis=0)
    return joined


def stretches(weights: np.ndarray) -> np.ndarray:
    """Cuts S columns into one stretch for each of T rows, in order, so that the weights in them sum to the most.

    Args:
        weights: `[T, S]`, T not above S.

    Returns:
        Where each begins, `[T]`.
    """
    rows, columns = weights.shape
    best = np.full(rows + 1, -np.inf)  # of what ends in each row; before the first is nothing
    best[0] = 0.0
    goes_on = np.zeros((columns, rows), dtype=bool)
    for column in range(columns):
        goes_on[column] = best[1:] > best[:-1]
        best[1:] = np.maximum(best[1:], best[:-1]) + weights[:, column]
        best[0] = -np.inf
    starts, row = np.zeros(rows, dtype=int), rows - 1
    for column in reversed(range(columns)):
        if not goes_on[column, row]:
            starts[row] = column
            row -= 1
    return starts


def quietest(wave: np.ndarray, second: float) -> tuple[float, float]:
    """Gives the quietest place near a second of a sound, and its power."""
    frame = round(FRAME * RATE)
    middle, around = round(second / FRAME), round(NEAR / FRAME)
    places = [i for i in range(middle - around, middle + around + 1) if 0 <= i * frame < len(wave)]
    power = [float(np.square(wave[i * frame : (i + 1) * frame], dtype=np.float64).mean()) for i in places]
    best = int(np.argmin(power))
    return (places[best] + 0.5) * FRAME, power[best]
