"""Tables in Markdown of what compression costs in accuracy."""

from __future__ import annotations

from collections.abc import Sequence

from audiopress.benchmarks.accuracy.rows import SPEECH, TIME, Point, Score, fronts
from audiopress.benchmarks.speed.tables import markdown
from audiopress.compression.base import TOKENS_PER_SECOND

NEEDS = ("audio", "video", "both")


def words(points: Sequence[Point]) -> str:
    """Gives a line per method and a column per rate: word error rates in percent, bold on the Pareto front."""
    good = [point for point in points if point.ok]
    ratios = sorted({p.first["keep_ratio"] for p in points if p.first["keep_ratio"]}, reverse=True)
    own_rate = any(not p.is_baseline and not p.first["keep_ratio"] for p in good)
    best = {id(point) for front in fronts(good, "wer") for point in front}
    lines = []
    for label in dict.fromkeys(point.label for point in points):
        mine = {point.first["keep_ratio"]: point for point in points if point.label == label}
        baseline = next(iter(mine.values())).is_baseline
        cells = [_words(mine.get(None), best) if baseline else ""]
        cells += [_words(mine.get(ratio), best) for ratio in ratios]
        own = mine.get(None)
        cells += [f"{_words(own, best)} at {own.rate:.3g}/s" if own and own.ok and not baseline else ""] * own_rate
        lines.append([f"`{label}`", *cells])
    head = ["WER, % [95 %]", "all tokens", *(f"{TOKENS_PER_SECOND * ratio:.4g}/s" for ratio in ratios)]
    return markdown([*head, *["rate of its own"] * own_rate], lines)


def _words(point: Point | None, best: set[int]) -> str:
    if point is None:
        return ""
    if not point.ok:
        return point.first["status"]
    text = percent(point.score("wer"))
    return f"**{text}**" if id(point) in best else text


def times(points: Sequence[Point]) -> str:
    """Gives a line per method and rate: grounding, captions and counts, in percent."""
    head = ["", "kept of audio, video", "audio and video tokens/s", "mIoU [95 %]", "R@0.3, 0.5, 0.7", "read"]
    head += ["captions right", "things named", "counts right"]
    best = {id(point) for front in fronts([point for point in points if point.ok], "miou") for point in front}
    lines = []
    for point in points:
        if not point.ok:
            lines.append([_name(point), "", "", failure(point)])
            continue
        kept = ", ".join(_share(point.mean("kept", kind)) + " %" for kind in ("audio", "video"))
        miou = percent(point.score("miou"))
        line = [_name(point), kept, f"{point.rate:.3g}", f"**{miou}**" if id(point) in best else miou]
        line.append(", ".join(_share(point.mean("recall", least)) for least in ("0.3", "0.5", "0.7")))
        names = ("parsed", "caption_accuracy", "caption_things", "counting_accuracy")
        lines.append([*line, *(_share(point.mean(name)) for name in names)])
    return markdown(head, lines)


def question(points: Sequence[Point]) -> str:
    """Gives the table of an ablation's question, of points on one set of clips."""
    if points[0].testbed == SPEECH:
        head = ["", "tokens/s", "WER, % [95 %]", "CER, %", "never ended"]
        lines = []
        for point in points:
            if not point.ok:
                lines.append([_name(point), "", failure(point)])
                continue
            ended = f"{point.mean('ran_away'):.3g} of {point.first['clips']}"
            rate, cer = f"{point.rate:.3g}", _share(point.mean("cer"))
            lines.append([_name(point), rate, percent(point.score("wer")), cer, ended])
        return markdown(head, lines)
    head = ["", "audio tokens/s", "while heard, elsewhere", "audio and video/s", "mIoU [95 %]"]
    head += ["mIoU by audio, video, both", "captions by audio, video, both", "counts right"]
    lines = []
    for point in points:
        if not point.ok:
            lines.append([_name(point), "", "", "", failure(point)])
            continue
        heard = ", ".join(_number(point.mean("density", where)) for where in ("while_heard", "elsewhere"))
        line = [_name(point), _number(point.mean("tokens_per_second")), heard, f"{point.rate:.3g}"]
        line.append(percent(point.score("miou")))
        for metric in ("miou", "caption_accuracy"):
            line.append(", ".join(_share(point.mean("by_needs", needs, metric)) for needs in NEEDS))
        lines.append([*line, _share(point.mean("counting_accuracy"))])
    return markdown(head, lines)


def percent(score: Score | None) -> str:
    """Writes a score in percent, with its interval, and its spread over seeds."""
    if score is None:
        return ""
    interval = "" if score.interval is None else f" [{', '.join(f'{100 * x:.1f}' for x in score.interval)}]"
    spread = "" if score.spread is None else f" ± {100 * score.spread:.1f}"
    return f"{100 * score.value:.1f}{spread}{interval}"


def failure(point: Point) -> str:
    """Says why a point has no scores."""
    return "out of memory" if point.first["status"] == "oom" else f"failed: {point.first['message'][:80]}"


def _name(point: Point) -> str:
    """Gives label and ratio, and whether the method has an advantage: weights of its own, or the question."""
    ratio, row = point.first["keep_ratio"], point.first
    marks = ", trained" * bool(point.testbed == TIME and row.get("trained"))
    marks += ", sees the question" * bool(row.get("query_aware"))
    return f"`{point.label}`" + (f" {100 * ratio:.3g} %" if ratio else "") + marks


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
