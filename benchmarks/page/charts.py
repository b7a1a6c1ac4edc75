"""The charts of the page, in Vega-Altair: accuracy against what it costs, and what each token of a clip stands for.

They are made without data. The page's script gives them the points that its filters leave, under the names below.
Colours are CSS variables of the page, so that light and dark need no second chart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt
import vl_convert

from audiopress.benchmarks.page.rows import TIMES
from audiopress.compression.base import TOKENS_PER_SECOND

POINTS = "points"  # fields: x, y, low, high, series, colour, lead, rate, stage, trained, query_aware, and texts to show
TOKENS, STRIPS, SOUND = "tokens", "strips", "sound"  # what is drawn of a clip

ERRORS = (0, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)  # ticks of an error rate in %
RATES = (0.4, 0.8, 1.5625, 3.125, 5, 6.25, 25 / 3, 12.5, 25, 50)  # ticks of tokens per second: those of `speech.py`
SHARES = (1, 2, 5, 10, 20, 50, 100)  # ticks of % of the tokens
INK, SOFT = "var(--ink)", "var(--soft)"
HEIGHT = 340  # px of an accuracy chart; a choice
STAGES = {"none": "cross", "connector": "circle", "encoder": "triangle-up", "joint": "square", "llm": "diamond"}


def library() -> str:
    """Gives the JavaScript of Vega, Vega-Lite and Vega-Embed, of the version that Altair writes for."""
    major, minor, *_ = alt.SCHEMA_VERSION.removeprefix("v").split(".")
    return vl_convert.javascript_bundle(vl_version=f"{major}.{minor}")


def accuracy_chart(
    error: bool, x: alt.Scale, ticks: Sequence[float] | None, lowest: float, highest: float
) -> dict[str, Any]:
    """Gives the Vega-Lite chart of scores: points, a line per method, intervals, and the Pareto front.

    Args:
        error: whether less is better.
        x: the scale of the cost.
        ticks: of x, those that are in its domain; None: wherever they fall.
        lowest: score of all points, in %, so that filters do not move the axis.
        highest: the same.
    """
    ends = [0.7 * lowest if lowest > 1 else 0, max(110, 1.1 * highest)] if error else [0, 100]
    scale = alt.Scale(type="symlog", constant=1, domain=ends) if error else alt.Scale(domain=ends)
    y_axis = alt.Axis(
        title=None, values=[tick for tick in ERRORS if ends[0] <= tick <= ends[1]] if error else alt.Undefined
    )
    low, high = x.domain
    inside = alt.Undefined if ticks is None else [tick for tick in ticks if low <= tick <= high]
    x_axis = alt.Axis(title=None, format="~g", values=inside, labelFlush=False)
    at_x, at_y = alt.X("x:Q", scale=x, axis=x_axis), alt.Y("y:Q", scale=scale, axis=y_axis)
    colour = alt.Color("colour:N", scale=None)
    hovered = alt.selection_point(name="hovered", fields=["series"], on="pointerover", clear="pointerout")

    def faint(value: float) -> Any:
        return alt.when(hovered).then(alt.value(value)).otherwise(alt.value(0.08))

    chart = alt.Chart(alt.NamedData(POINTS))
    seeds = {"x": "mean(x)", "y": "mean(y)", "groupby": ["series", "colour", "lead", "rate", "stage"]}
    lines = (
        chart.transform_aggregate(**seeds)
        .mark_line()
        .encode(at_x, at_y, colour, detail="series:N", order="x:Q", opacity=faint(0.75), strokeWidth=_bold(2, 1))
    )
    intervals = (
        chart.transform_filter("datum.lead && isValid(datum.low)")
        .mark_rule(strokeWidth=1.5)
        .encode(at_x, alt.Y("low:Q", scale=scale), alt.Y2("high:Q"), colour, opacity=faint(0.35))
    )
    front = (
        chart.transform_aggregate(**seeds)
        .transform_window(best="min(y)" if error else "max(y)", sort=_by("x", "y" if error else "-y"), frame=[None, 0])
        .transform_filter("datum.y == datum.best")
    )
    steps = front.mark_line(interpolate="step-after", stroke=INK, strokeWidth=1.25, strokeDash=[2, 3])
    steps = steps.encode(at_x, at_y, order="x:Q")
    changes = front.transform_window(before="lag(series)", sort=_by("x"))
    changes = changes.transform_filter("datum.series != datum.before")
    changes = changes.transform_window(place="row_number()", sort=_by("x"))
    names = [  # of those with a colour, in three rows; the uncompressed one stands at the right edge, on the other side
        changes.transform_filter(where)
        .mark_text(fill=INK, fontSize=12, fontWeight=600, align=align, dx=5, dy=dy if error else -dy)
        .encode(at_x, at_y, text="series:N", opacity=faint(1))
        for where, align, dy in (
            *((f"datum.lead && datum.place % 3 == {row}", "left", 12 + 14 * row) for row in range(3)),
            ("datum.stage == 'none'", "right", -10),
        )
    ]
    shape = alt.Shape("stage:N", scale=alt.Scale(domain=list(STAGES), range=list(STAGES.values())), legend=None)
    filled = alt.when("datum.trained").then(alt.value(0.0)).otherwise(alt.value(1.0))
    points = (
        chart.mark_point(filled=False, strokeWidth=1.75, cursor="pointer")
        .encode(
            at_x, at_y, colour, shape, fill=alt.Fill("colour:N", scale=None), fillOpacity=filled, size=_bold(55, 25)
        )
        .encode(opacity=faint(1), order=_bold(1, 0))
        .encode(
            tooltip=[alt.Tooltip(f"{name}:N", title=name.replace("_", " ")) for name in ("method", "cost", "score")]
        )
        .add_params(hovered)
    )
    asks = (
        chart.transform_filter("datum.query_aware")
        .mark_text(fill=SOFT, text="?", dx=8, dy=-6)
        .encode(at_x, at_y, opacity=faint(1))
    )
    return _spec(alt.layer(lines, steps, intervals, points, asks, *names).properties(height=HEIGHT))


def accuracy_charts(points: Sequence[dict[str, Any]], error: bool) -> dict[str, dict[str, Any]]:
    """Gives the charts of a testbed: against tokens per second, the share of all tokens, and each time.

    Args:
        points: of the testbed, filters or not, so that filters move no axis.
        error: whether less is better.
    """

    def scale(values: Iterable[float | None], usual: Sequence[float], **more: Any) -> alt.Scale:
        found = [value for value in values if value] + list(usual)
        return alt.Scale(type="log", domain=[0.9 * min(found), 1.12 * max(found)], **more)

    values = [part[key] for point in points for part in point["scores"].values() for key in part]
    lowest = min((value if low is None else low for value, low, _ in values), default=0)
    highest = max((value for value, *_ in values), default=0)
    axes = {
        "rate": (scale((point["tokens_per_second"] for point in points), (3, TOKENS_PER_SECOND), base=2), RATES),
        "share": (scale((point["share"] for point in points), (10, 100)), SHARES),
    }
    for key in TIMES:
        found = [point["times"][key]["ms"] for point in points if key in point["times"]]
        axes[key] = scale(found, () if found else (1, 10)), None
    return {name: accuracy_chart(error, *axis, lowest, highest) for name, axis in axes.items()}


def tokens_chart() -> dict[str, Any]:
    """Gives the chart of a clip: its spectrogram, below it a strip of tokens per method, and a line at `second`.

    The vertical axis is in pixels from above; the script that gives the strips knows how many there are.
    """
    second = alt.param(name="second", value=0)
    seconds = alt.Axis(title="seconds", format="~g", orient="bottom", grid=False)
    x, x2 = alt.X("start:Q", scale=alt.Scale(nice=False, zero=True), axis=seconds), alt.X2("end:Q")
    y, y2 = alt.Y("top:Q", axis=None, scale=alt.Scale(nice=False, zero=True, reverse=True)), alt.Y2("bottom:Q")

    def boxes(data: str) -> alt.Chart:
        return alt.Chart(alt.NamedData(data)).encode(x, x2, y, y2)

    sound = boxes(SOUND).mark_image(aspect=False).encode(url="picture:N")
    strips = boxes(STRIPS).mark_rect(fill="var(--strip)")
    names = (
        alt.Chart(alt.NamedData(STRIPS))
        .mark_text(align="left", baseline="bottom", dy=-3, fill=INK, fontSize=12)
        .encode(alt.X("start:Q"), y, text="name:N")
    )
    fill, shade = alt.Fill("colour:N", scale=None), alt.FillOpacity("shade:Q", scale=None)
    tokens = boxes(TOKENS).mark_rect().encode(fill=fill, fillOpacity=shade)
    cursor = (
        alt.Chart(alt.NamedData(SOUND))
        .transform_calculate(now="second")
        .mark_rule(stroke="var(--cursor)", strokeWidth=2)
        .encode(alt.X("now:Q"), y, alt.Y2("foot:Q"))
    )
    return _spec(alt.layer(sound, strips, names, tokens, cursor).add_params(second))


def _bold(lead: float, other: float) -> Any:
    """Gives one value for the lines with a colour of their own, and another for the rest."""
    return alt.when("datum.lead || datum.stage == 'none'").then(alt.value(lead)).otherwise(alt.value(other))


def _by(*fields: str) -> list[alt.SortField]:
    """Gives an order; "-y" is descending."""
    return [alt.SortField(f.removeprefix("-"), order="descending" if f[0] == "-" else "ascending") for f in fields]


def _spec(chart: alt.LayerChart) -> dict[str, Any]:
    """Gives the specification, as wide as its place on the page."""
    wide = chart.properties(width="container", autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))
    spec = wide.to_dict()
    del spec["config"]  # the page has its own
    return spec
