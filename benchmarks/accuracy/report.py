"""The report of accuracy: rows of both testbeds, and of ablations, as tables and pictures."""

from __future__ import annotations

from pathlib import Path

from audiopress.benchmarks.accuracy import plots, tables
from audiopress.benchmarks.accuracy.rows import SPEECH, TIME, Point, caption, read_points

TITLES = {SPEECH: "Words", TIME: "Times and things"}
NOTES = {
    SPEECH: "A frozen Whisper; one line per method, one column per rate. Bold: on the Pareto front, of all or "
    "of those without training.",
    TIME: "One line per method and rate. Bold: on the Pareto front of mIoU against the tokens that the LLM reads, of "
    "all, or of those without weights of their own.",
}
SEEDS = "Brackets: 95 % bootstrap intervals over clips; ±: standard deviation over seeds, where there are several."


def accuracy_report(results: Path, pictures: Path, shown: Path | None = None) -> str:
    """Draws the pictures, and gives the text with the tables.

    Args:
        results: the folder of the rows, `*.jsonl`.
        pictures: the folder for the pictures.
        shown: the same folder as the text refers to it. Default: as it is given.

    Raises:
        ValueError: there are no rows of accuracy.
    """
    sets = read_points(results)
    if not sets:
        raise ValueError(
            f"no rows of accuracy in {results}; benchmarks/speech.py, events.py and ablation.py write some"
        )
    sections = []
    numbers = dict.fromkeys(TITLES, 0)  # the first set of clips of a testbed has pictures without a number
    for words, points in sets.items():
        testbed = points[0].testbed
        numbers[testbed] += 1
        sections.append(_section(words, points, pictures, shown or pictures, numbers[testbed]))
    if questions := _questions(sets):
        sections.append(questions)
    return "\n\n".join(sections)


def _section(words: str, points: list[Point], pictures: Path, shown: Path, number: int) -> str:
    """Gives the tables and pictures of one set of clips."""
    testbed = points[0].testbed
    parts = [f"### {TITLES[testbed]}: {words}", f"{caption(points)}. {NOTES[testbed]} {SEEDS}"]
    parts.append(tables.words(points) if testbed == SPEECH else tables.times(points))
    good = [point for point in points if point.ok]
    suffix = f"_{number}" if number > 1 else ""
    drawn = []
    if testbed == SPEECH and good:
        drawn.append(("words", "Word error rate against tokens per second", plots.plot_words))
    elif good:
        drawn.append(("times", "Mean IoU against tokens per second", plots.plot_times))
        drawn.append(("kinds", "Scores of each kind of question", plots.plot_kinds))
    for name, text, plot in drawn:
        path = plot(good, pictures / f"accuracy_{name}{suffix}.png", words)
        parts.append(f"![{text}]({(shown / path.name).as_posix()})")
    return "\n\n".join(parts)


def _questions(sets: dict[str, list[Point]]) -> str:
    """Gives one table per question of an ablation and set of clips."""
    texts = {name: text for points in sets.values() for point in points for name, text in point.questions.items()}
    parts = ["### Ablations"] if texts else []
    for name, text in texts.items():
        parts.append(f"#### {text}")
        for words, points in sets.items():
            if own := [point for point in points if name in point.questions]:
                parts += [f"{words[0].upper()}{words[1:]}:", tables.question(own)]
    return "\n\n".join(parts)
