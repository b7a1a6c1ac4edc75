"""Pictures of a training run and of what compressors do to a clip, drawn without pyplot or any global state."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from numpy.lib.stride_tricks import sliding_window_view
from transformers.audio_utils import hertz_to_mel, mel_filter_bank, spectrogram, window_function

from audiopress.benchmarks.style import DPI, FAINT, INK, clean, legend_style, save
from audiopress.compression import TokenStream
from audiopress.models.layout import AUDIO_TOKENS_PER_SECOND

_EMPTY = "#f1f3f5"
_TOTAL, _HELD_OUT, _ALARM = "#1f3a5f", "#d1495b", "#b42318"
_PARTS = ("#2a9d8f", "#e09f3e", "#8e6bbf", "#5b9bd5", "#8d6e63", "#7f8c3b")
_UNCOMPRESSED, _MERGED, _KEPT = ("#7b8794", "#b8c1cb"), ("#1f6f9f", "#8cc3e3"), ("#e07a1f", "#e07a1f")

_FEW_POINTS, _MANY_POINTS = 60, 400  # up to the first: markers; from the second on: a running median
_NAME_LENGTH = 28  # of a method's label, in letters
_MELS, _TOP_HZ, _DECIBELS = 80, 8_000, 70


def plot_training(history: Sequence[Mapping[str, Any]], path: Path | str) -> Path:
    """Draws loss, learning rate and gradient norm over the steps of a run, one above the other, as a PNG.

    A loss that is NaN or infinite leaves a gap, and the title says at which step. Losses and gradient norms that span
    more than two decades get a logarithmic axis. Of many points the raw line is pale, with a running median over it.

    Args:
        history: transformers' `trainer.state.log_history`. Read are `loss`, its parts `loss_*`, held-out `eval_loss`
            and `eval_*_loss`, `learning_rate` and `grad_norm`, each where an entry has it.
        path: of the PNG; missing folders are made.

    Returns:
        The path.

    Raises:
        ValueError: no entry has a step and a loss.
    """
    keys = {key for entry in history if "step" in entry for key in entry}
    parts = sorted(key for key in keys if key.startswith("loss_"))
    held_out = sorted(key for key in keys if key.startswith("eval_") and key.endswith("_loss"))
    if not {"loss", *parts, *held_out} & keys:
        raise ValueError(f"none of the history's {len(history)} entries has a step and a loss")

    figure = Figure(figsize=(8, 6.6), dpi=DPI, facecolor="white")
    loss, rate, norm = panels = figure.subplots(3, sharex=True, height_ratios=[2.2, 1, 1])
    figure.subplots_adjust(left=0.105, right=0.98, top=0.89, bottom=0.075, hspace=0.13)

    values = [_draw_line(loss, *_series(history, "loss"), _TOTAL, "training", zorder=4)] if "loss" in keys else []
    for key, colour in zip(parts, cycle(_PARTS), strict=False):
        values.append(_draw_line(loss, *_series(history, key), colour, key.removeprefix("loss_")))
    for key, marker in zip(held_out, cycle("osD^v"), strict=False):
        steps, points = _series(history, key)
        label = f"held-out {key.removeprefix('eval_').removesuffix('loss').strip('_')}".strip()
        loss.plot(
            steps, points, color=_HELD_OUT, marker=marker, ms=5, mec="white", mew=0.5, lw=1, label=label, zorder=5
        )
        values.append(points)
    _set_scale(loss, np.concatenate(values))
    if len(values) > 1 or "loss" not in keys:
        loss.legend(loc="lower right", bbox_to_anchor=(1.01, 0.99), ncols=6, handlelength=1.4, **legend_style())
    else:
        figure.subplots_adjust(top=0.93)

    steps, points = _series(history, "learning_rate")
    _draw_line(rate, steps, points, _TOTAL, smooth=False)
    if len(points) and np.nanmax(points, initial=0) > 0:
        rate.set_ylim(*(np.nanmax(points) * np.array([-0.05, 1.1])))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    rate.yaxis.get_offset_text().set(size=8, color=FAINT)
    _set_scale(norm, _draw_line(norm, *_series(history, "grad_norm"), _TOTAL))

    for panel, label in zip(panels, ("loss (nats)", "learning rate", "gradient norm\n(unclipped)"), strict=True):
        clean(panel)
        panel.set_ylabel(label, size=9, color=INK)
        if not panel.lines:
            panel.set_yticks([])
    figure.align_ylabels(panels)
    smoothed = any(len(points) >= _MANY_POINTS for points in values)
    steps_label = (
        "optimizer step   (pale: every logged value; strong: running median)" if smoothed else "optimizer step"
    )
    norm.set_xlabel(steps_label, size=9, color=INK)
    norm.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 2.5, 5, 10]))
    norm.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    title, alarm = _training_title(history, ("loss", *parts, *held_out))
    figure.text(0.02, 0.975, title, size=11.5, weight="bold", va="top", color=_ALARM if alarm else INK)
    return save(figure, path)


def plot_tokens(
    samples: np.ndarray,
    sampling_rate: int,
    tokens: Mapping[str, TokenStream],
    path: Path | str,
    title: str = "What each audio token stands for",
    text: str | None = None,
) -> Path:
    """Draws a clip's log-mel spectrogram and, under it on the same time axis, a strip of boxes per method, as a PNG.

    A box is a token over the sound it stands for. Where every size is 1 it is the token's own slot, and slots left
    blank were dropped. Otherwise the tokens are runs of the clip: each begins where the sizes before it end. Where the
    slots contradict that (merging after pruning), a box as wide as the size is centred on the slot, cut half way to
    its neighbours. The edges of the last method's boxes go over the spectrogram.

    Args:
        samples: `[samples]` in [-1, 1], the whole clip.
        sampling_rate: in Hz.
        tokens: the stream of this one clip by name of the method. Unless the first is the uncompressed clip, a strip
            with its 25 slots per second is put before it.
        path: of the PNG; missing folders are made.
        title: headline.
        text: what is said in the clip.

    Returns:
        The path.

    Raises:
        ValueError: the samples are not one finite track of 40 ms or more, there is no method, or a stream holds more
            than one clip or tokens past the end of the samples.
    """
    samples = _check_samples(samples, sampling_rate)
    seconds = len(samples) / sampling_rate
    spans, length = _check_tokens(tokens, seconds)
    chosen = list(spans)[-1]

    zoom = math.sqrt(min(max(seconds / 10, 1), 2))  # a long clip is drawn wider, and with larger type
    longest = min(_NAME_LENGTH, max(map(len, spans)))
    left, middle, right = max(0.8, 0.2 + 0.085 * longest) * zoom, min(max(0.7 * seconds, 8), 16), 2.4 * zoom
    said = f"“{' '.join(text.split())}”" if text else ""
    lines = textwrap.wrap(said, int((middle + right) * 11.5 / zoom), max_lines=3, placeholder=" …”")
    head, tall, row, gap, foot = (x * zoom for x in (0.5 + 0.2 * len(lines), 2.3, 0.36, 0.36, 0.62))
    width, height = left + middle + right, head + tall + gap + row * len(spans) + foot

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    picture = figure.add_axes((left / width, 1 - (head + tall) / height, middle / width, tall / height))
    strips = figure.add_axes((left / width, foot / height, middle / width, row * len(spans) / height))
    top: dict[str, Any] = {"va": "top", "parse_math": False, "color": INK}
    figure.text(left / width, 1 - 0.13 * zoom / height, title, size=12 * zoom, weight="bold", **top)
    figure.text(left / width, 1 - 0.4 * zoom / height, "\n".join(lines), size=9.5 * zoom, style="italic", **top)

    _draw_spectrogram(picture, samples, sampling_rate, zoom)
    edges = np.unique(spans[chosen]) / AUDIO_TOKENS_PER_SECOND
    thin = min(0.8, 0.1 * 72 * middle / max(len(edges), 1))  # lines over at most a tenth of the picture
    picture.vlines(edges, 0, 1, transform=picture.get_xaxis_transform(), color="white", lw=thin, alpha=0.85)
    note = textwrap.fill(f"white lines: where the tokens of {chosen} begin and end", 26)
    picture.text(1 + 0.12 / middle, 1, note, transform=picture.transAxes, size=8.5 * zoom, **{**top, "color": FAINT})
    _draw_strips(strips, spans, length, seconds, middle, zoom)
    for axes in (picture, strips):
        axes.set_xlim(0, seconds)
    return save(figure, path)


def _series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Gives the steps and the values of a key; what is not finite is NaN."""
    pairs = [(entry["step"], entry[key]) for entry in history if "step" in entry and entry.get(key) is not None]
    steps, values = np.array(pairs, dtype=float).reshape(-1, 2).T
    return steps, np.where(np.isfinite(values), values, np.nan)


def _draw_line(
    axes: Axes,
    steps: np.ndarray,
    values: np.ndarray,
    colour: str,
    label: str = "",
    zorder: int = 3,
    smooth: bool = True,
) -> np.ndarray:
    """Draws one series, thin, and with a running median where it has many points; gives its values."""
    if not len(values):
        here: dict[str, Any] = {"transform": axes.transAxes, "ha": "center", "va": "center", "backgroundcolor": "white"}
        axes.text(0.5, 0.5, "not logged", size=9, color=FAINT, **here)
    elif len(values) < _MANY_POINTS or not smooth:
        marker: dict[str, Any] = {"marker": "o", "ms": 3} if len(values) <= _FEW_POINTS else {}
        axes.plot(steps, values, color=colour, lw=1.2, label=label, zorder=zorder, **marker)
    else:
        axes.plot(steps, values, color=colour, lw=0.5, alpha=0.3, zorder=zorder)
        axes.plot(
            steps,
            _running_median(values, min(len(values) // 200 + 1, 50)),
            color=colour,
            lw=1.3,
            label=label,
            zorder=zorder,
        )
    return values


def _running_median(values: np.ndarray, reach: int) -> np.ndarray:
    """Gives the median of the finite values up to `reach` points away; NaN stays NaN."""
    windows = sliding_window_view(np.pad(values, reach, constant_values=np.nan), 2 * reach + 1)
    medians, finite = np.full_like(values, np.nan), np.isfinite(values)
    medians[finite] = np.nanmedian(windows[finite], axis=1)
    return medians


def _set_scale(axes: Axes, values: np.ndarray) -> None:
    """Makes the y axis logarithmic when the positive values span more than two decades and none is negative."""
    finite = values[np.isfinite(values)]
    positive = finite[finite > 0]
    if len(positive) and finite.min() >= 0 and positive.max() > 100 * positive.min():
        axes.set_yscale("log", nonpositive="mask")


def _training_title(history: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> tuple[str, bool]:
    """Gives the title, and whether a loss was not finite."""
    steps = [entry["step"] for entry in history if "step" in entry]
    bad = sorted(
        {e["step"] for e in history for k in keys if "step" in e and e.get(k) is not None and not math.isfinite(e[k])}
    )
    if not bad:
        return f"Training, {max(steps):,} steps", False
    where = f"step {bad[0]:,}" if len(bad) == 1 else f"{len(bad):,} logged steps, the first {bad[0]:,}"
    return f"Training, {max(steps):,} steps: loss not finite at {where}", True


def _check_samples(samples: np.ndarray, sampling_rate: int) -> np.ndarray:
    samples = np.asarray(samples, dtype=np.float32)
    if not sampling_rate > 0:
        raise ValueError(f"sampling_rate must be positive, in Hz, got {sampling_rate!r}")
    if samples.ndim != 1 or len(samples) * AUDIO_TOKENS_PER_SECOND < sampling_rate or not np.isfinite(samples).all():
        raise ValueError(f"samples must be [samples], finite, of 40 ms or more; got {list(samples.shape)}")
    return samples


def _check_tokens(tokens: Mapping[str, TokenStream], seconds: float) -> tuple[dict[str, np.ndarray], int]:
    """Gives each method's boxes `[M, 2]` in slots, the uncompressed ones first, and the slots of the clip."""
    if not tokens:
        raise ValueError("tokens must name at least one method, got none")
    for name, stream in tokens.items():
        if len(stream.lengths) != 1:
            raise ValueError(
                f"{name}: the stream must be of one clip, got {len(stream.lengths)}; see TokenStream.split"
            )
    spans = {name: token_spans(stream) for name, stream in tokens.items()}
    # The towers' padding moves the count by one either way; the streams know it exactly, where they reach the end.
    expected = int(seconds * AUDIO_TOKENS_PER_SECOND + 1e-6)
    ends = {name: math.ceil(span.max(initial=0) - 1e-3) for name, span in spans.items()}
    for name, end in ends.items():
        if end > expected + 1:
            raise ValueError(
                f"{name}: its tokens reach slot {end}, but {seconds:.2f} s of samples have {expected} slots"
            )
    length = max(expected, *ends.values())
    first = next(iter(spans.values()))
    if len(first) == ends[next(iter(ends))] >= max(length - 1, *ends.values()):
        return spans, len(first)
    slots = np.arange(length)
    return {"uncompressed": np.stack([slots, slots + 1], axis=1), **spans}, length


def token_spans(stream: TokenStream) -> np.ndarray:
    """Gives where each token's box begins and ends, `[M, 2]` in slots; the rule is in `plot_tokens`."""
    slots, sizes = (x.detach().cpu().double().numpy() for x in (stream.slots, stream.sizes))
    if (sizes == 1).all():
        return np.stack([slots, slots + 1], axis=1)
    ends = sizes.cumsum()
    if (abs(ends - sizes / 2 - 0.5 - slots) <= 1).all():
        return np.stack([ends - sizes, ends], axis=1)
    centres = slots + 0.5
    half_way = (centres[1:] + centres[:-1]) / 2
    starts = np.maximum(centres - sizes / 2, np.concatenate([[0], half_way]))
    return np.stack([starts, np.minimum(centres + sizes / 2, np.concatenate([half_way, [np.inf]]))], axis=1)


def log_mel(samples: np.ndarray, sampling_rate: int) -> tuple[np.ndarray, float, float]:
    """Gives a spectrogram: 80 mel bands up to 8 kHz, windows of 25 ms, the loudest 70 dB.

    Returns:
        `[80, frames]` in [0, 1], low bands first; the second at which the first frame begins; and seconds per frame.
    """
    top = min(_TOP_HZ, sampling_rate / 2)
    size, hop = round(0.025 * sampling_rate), max(1, round(0.005 * sampling_rate))
    fft = 2 ** math.ceil(math.log2(2.5 * size))  # zero-padded, so that the lowest bands are not empty
    filters = mel_filter_bank(fft // 2 + 1, _MELS, 0, top, sampling_rate, norm="slaney")
    window = window_function(size, "hann")
    padded = np.pad(samples, fft)  # quiet edges, and room for clips shorter than a window
    power = spectrogram(padded, window, size, hop, fft, power=2.0, mel_filters=filters, center=False)
    decibels = 10 * np.log10(np.maximum(power, 1e-12))
    shades = np.clip(1 + (decibels - decibels.max()) / _DECIBELS, 0, 1)
    return shades, (size / 2 - fft - hop / 2) / sampling_rate, hop / sampling_rate


def _draw_spectrogram(axes: Axes, samples: np.ndarray, sampling_rate: int, zoom: float) -> None:
    shades, begin, step = log_mel(samples, sampling_rate)
    top = min(_TOP_HZ, sampling_rate / 2)
    top_mel = float(hertz_to_mel(top))
    half_band = top_mel / (_MELS + 1) / 2
    extent = (begin, begin + shades.shape[1] * step, half_band, top_mel - half_band)
    axes.imshow(shades, cmap="magma", vmin=0, vmax=1, extent=extent, origin="lower", aspect="auto")
    ticks = [hertz for hertz in (250, 500, 1_000, 2_000, 4_000, 8_000) if hertz <= top]
    axes.set_yticks(
        [min(float(hertz_to_mel(hertz)), extent[3]) for hertz in ticks], [f"{hertz / 1000:g}" for hertz in ticks]
    )
    axes.set_ylabel("frequency (kHz, mel)", size=9 * zoom, color=INK)
    clean(axes, zoom)
    axes.grid(False)
    axes.tick_params(labelbottom=False)


def _draw_strips(
    axes: Axes, spans: Mapping[str, np.ndarray], length: int, seconds: float, inches: float, zoom: float
) -> None:
    """Draws a row of boxes per method, its name to the left and its counts to the right."""
    across = axes.get_yaxis_transform()
    columns = [1 + x * zoom / inches for x in (0.7, 1.45, 2.3)]
    plain: dict[str, Any] = {"va": "center", "ha": "right", "parse_math": False, "transform": across, "color": INK}
    for column, label in zip(columns, ("tokens", "tokens/s", "keep ratio"), strict=True):
        axes.text(column, -0.25, label, size=8.5 * zoom, **{**plain, "color": FAINT})
    kinds = {}
    for row, (name, span) in enumerate(spans.items()):
        widths = span[:, 1] - span[:, 0]
        if len(span) == length:
            kind, colours = "uncompressed: 40 ms per token", _UNCOMPRESSED
        elif (widths == 1).all():
            kind, colours = "kept as it is; blank: dropped", _KEPT
        else:
            kind, colours = "merged: one box, one token", _MERGED
        kinds[kind] = colours
        low, high = row + 0.14, row + 0.86
        axes.add_patch(Rectangle((0, low), seconds, high - low, color=_EMPTY, lw=0, zorder=1))
        corners = [[(a, low), (b, low), (b, high), (a, high)] for a, b in span / AUDIO_TOKENS_PER_SECOND]
        fine = min(0.8, 72 * inches / max(length, 1) / 8) if colours is _KEPT else 0
        boxes = PolyCollection(corners, facecolors=colours, edgecolors="white", linewidths=fine, zorder=2)
        axes.add_collection(boxes, autolim=False)
        label = name if len(name) <= _NAME_LENGTH else f"{name[: _NAME_LENGTH - 1]}…"
        axes.text(-0.1 * zoom / inches, row + 0.5, label, size=9.5 * zoom, **plain)
        ratio = len(span) / max(length, 1)
        numbers = (f"{len(span):,}", f"{AUDIO_TOKENS_PER_SECOND * ratio:.1f}", f"{ratio:.3f}")
        for column, number in zip(columns, numbers, strict=True):
            axes.text(column, row + 0.5, number, size=9.5 * zoom, **plain)
    axes.set_ylim(len(spans), 0)
    clean(axes, zoom)
    axes.grid(False)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("time (s)", size=9 * zoom, color=INK, loc="left")
    legend = {label: tuple(Patch(facecolor=colour) for colour in dict.fromkeys(kinds[label])) for label in kinds}
    axes.legend(
        list(legend.values()),
        list(legend),
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        loc="upper right",
        bbox_to_anchor=(1, -0.78 / len(spans)),
        ncols=3,
        handlelength=1.6,
        borderaxespad=0,
        borderpad=0,
        **legend_style(zoom),
    )
