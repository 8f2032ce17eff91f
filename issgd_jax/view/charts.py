"""Charts of runs in the grammar of Vega-Lite, as dicts. Imports no jax.

Colours are variables of the page's style sheet, which has them for light and for dark.
"""

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence

import numpy as np

from issgd_jax.history import seconds_per_step
from issgd_jax.run.histograms import EDGES, SCORES, known_counts
from issgd_jax.view.runs import Arm

_COLOURS = 6  # variables --arm-1, ...
_MOST_POINTS = 200
_MOST_COLUMNS = 60
_HEIGHT, _LEGEND_LINE = 250, 18  # pixels
_LEGEND_WIDTH = 36  # characters that fit beside each other on a phone
_DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])
# Colours and dashes.
NOISE = {"uniform": ("var(--arm-2)", [2, 2]), "actual": ("var(--arm-1)", [1, 0]), "ideal": ("var(--arm-3)", [6, 3])}


def curves(arms: Sequence[Arm], column: str, *, over_seconds: bool, title: str) -> dict | None:
    """Returns a chart of one column: medians over seeds, and bands between their quartiles.

    Args:
      arms: one line each.
      column: of metrics.
      over_seconds: whether the axis has seconds of steps, without compilation, in place of steps.
      title: of the vertical axis.

    Returns:
      None where no arm has values.
    """
    values = []
    for arm in arms:
        scale = seconds_per_step(arm.histories) if over_seconds else 1.0
        if math.isfinite(scale):
            values += [
                point | {"line": arm.name, "x": _rounded(scale * point["x"])}
                for point in _points(arm.histories, column)
            ]
    unit = "seconds of training, without compilation" if over_seconds else "learner steps"
    styles = {
        arm.name: (f"var(--arm-{1 + place % _COLOURS})", _DASHES[place % len(_DASHES)])
        for place, arm in enumerate(arms)
    }
    return _lines(values, styles, x=unit, y=title)


def noise(arm: Arm) -> dict | None:
    """Returns a chart of √Tr Σ of one example's gradient: of uniform draws, of those made, and the least possible."""
    values = [point | {"line": name} for name in NOISE for point in _points(arm.histories, f"variance/{name}")]
    return _lines(values, NOISE, x="learner steps", y="√Tr Σ")


def heat(rows: list[dict], name: str) -> dict | None:
    """Returns a heat map of a histogram of scores, or of their staleness, over the steps of a run.

    Args:
      rows: of metrics.
      name: of the column, see `run.histograms`.

    Returns:
      None where no row has it.
    """
    measured = [(row["step"], counts) for row in rows if (counts := known_counts(row, name)) and sum(counts)]
    if not measured:
        return None
    steps = [step for step, _ in measured]
    shares = np.stack([np.asarray(counts) / sum(counts) for _, counts in measured])
    groups = [group for group in np.array_split(np.arange(len(steps)), min(len(steps), _MOST_COLUMNS)) if len(group)]
    borders = [steps[group[0]] for group in groups] + [steps[-1] + max(1, steps[-1] - steps[-2] if steps[1:] else 1)]
    values = []
    for group, (left, right) in zip(groups, itertools.pairwise(borders)):
        mean = shares[group].mean(0)
        values += [
            {
                "x": left,
                "x2": right,
                "y": place,
                "y2": place + 1,
                "share": _rounded(mean[place]),
                "bin": bin_text(name, place),
            }
            for place in np.flatnonzero(mean).tolist()
        ]
    low, high = (pick(np.flatnonzero(shares.sum(0))) for pick in (min, max))
    # A mark is at the lower border of a bin.
    if name == SCORES:
        power = f"pow(2, datum.value - {len(EDGES[name]) - 2 - int(math.log2(EDGES[name][-2]))})"
        label = f"format({power}, {power} < 0.01 ? '.0e' : '.2~g')"
    else:
        label = "format(pow(2, datum.value - 1), ',~r')"
    label = f"datum.value <= 0 ? '0' : {label}"
    axis = {"labelExpr": label, "tickMinStep": 1, "grid": False, "tickCount": 8}
    title = "score (gradient norm)" if name == SCORES else "staleness of the score, steps"
    encoding = {
        "x": _steps_axis(values, "learner steps"),
        "x2": {"field": "x2"},
        "y": {
            "field": "y",
            "type": "quantitative",
            "title": title,
            "axis": axis,
            "scale": {"domain": [int(low), int(high) + 1], "nice": False, "zero": False},
        },
        "y2": {"field": "y2"},
        "opacity": {
            "field": "share",
            "type": "quantitative",
            "title": "share of examples",
            "scale": {"type": "sqrt", "range": [0.05, 1], "domain": [0, _rounded(shares.max())]},
            "legend": {
                "format": ".0%",
                "orient": "top",
                "direction": "horizontal",
                "symbolType": "square",
                "tickCount": 3,
            },
        },
        "tooltip": [
            {"field": "x", "title": "from step", "format": ","},
            {"field": "bin", "title": title},
            {"field": "share", "title": "share of examples", "format": ".1%"},
        ],
    }
    return _chart(values, {"mark": {"type": "rect", "color": "var(--arm-1)", "aria": False}, "encoding": encoding})


def bin_text(name: str, place: int) -> str:
    """Returns what lies in a bin of a histogram.

    Example:
      >>> bin_text("scores/staleness_histogram", 3)
      '4 to 7'
    """
    low, high = EDGES[name][place : place + 2]
    if place == len(EDGES[name]) - 2:
        return f"{low:,.4g} or more"
    if name == SCORES:
        return f"{low:.2g} to {high:.2g}"
    return f"{low:,.0f} to {high - 1:,.0f}" if high - low > 1 else f"{low:,.0f}"


def _points(histories: list[list[dict]], column: str) -> Iterator[dict]:
    """Yields the median and the quartiles of the seeds at each step."""
    by_step: dict[int, list[float]] = {}
    for row in itertools.chain.from_iterable(histories):
        if row.get(column) is not None:
            by_step.setdefault(row["step"], []).append(row[column])
    steps = sorted(by_step)
    for step in dict.fromkeys(steps[:: 1 + len(steps) // _MOST_POINTS] + steps[-1:]):
        of_seeds = by_step[step]
        low, high = np.quantile(of_seeds, (0.25, 0.75))
        yield {"x": step, "y": _rounded(statistics.median(of_seeds)), "low": _rounded(low), "high": _rounded(high)}


def _lines(values: list[dict], styles: dict[str, tuple[str, list[int]]], *, x: str, y: str) -> dict | None:
    """Returns a chart of lines; styles: {line: (colour, dashes)}."""
    if not values:
        return None
    percent = y.endswith("error")
    encoding = {"x": _steps_axis(values, x), "y": _vertical(values, y, percent=percent)}
    domain = list(styles)
    colours, dashes = ([style[place] for style in styles.values()] for place in (0, 1))
    legend = {"orient": "top", "symbolType": "stroke", "symbolSize": 500, "symbolOpacity": 1, "symbolStrokeWidth": 2}
    columns = len(domain) if sum(map(len, domain)) <= _LEGEND_WIDTH else 1
    legend |= {"direction": "horizontal", "columns": columns}
    line = {"field": "line", "type": "nominal", "title": None, "legend": legend}
    stroke = line | {"scale": {"domain": domain, "range": colours}}
    band = {"y": encoding["y"] | {"field": "low"}, "y2": {"field": "high"}, "fill": stroke}
    tooltip = [
        {"field": "line", "title": " "},
        {"field": "x", "title": x.partition(",")[0], "format": ",.4~r"},
        {"field": "y", "title": y, "format": ".2%" if percent else ".4~g"},
    ]
    unseen = {"type": "point", "size": 150, "opacity": 0, "filled": True, "aria": False}
    layers = [
        {"mark": {"type": "area", "opacity": 0.2, "aria": False}, "encoding": band},
        {
            "mark": {"type": "line", "strokeWidth": 2, "aria": False},
            "encoding": {"stroke": stroke, "strokeDash": line | {"scale": {"domain": domain, "range": dashes}}},
        },
        {"mark": unseen, "encoding": {"tooltip": tooltip, "detail": {"field": "line"}}},
    ]
    names = [value["line"] for value in values]
    if alone := [name for name in domain if names.count(name) == 1]:  # one measurement makes no line
        dot = {"type": "point", "size": 40, "filled": True, "aria": False}
        shown = [{"filter": {"field": "line", "oneOf": alone}}]
        layers.append({"mark": dot, "transform": shown, "encoding": {"fill": stroke}})
    height = _HEIGHT + (_LEGEND_LINE * len(domain) if columns == 1 else 0)
    return _chart(values, {"encoding": encoding, "layer": layers, "height": height})


def _steps_axis(values: list[dict], title: str) -> dict:
    large = max(value["x"] for value in values) >= 20_000
    return {
        "field": "x",
        "type": "quantitative",
        "title": title,
        "axis": {"format": "~s" if large else ",~r", "tickCount": 6, "labelOverlap": True, "grid": False},
        "scale": {"nice": False},
    }


def _vertical(values: list[dict], title: str, *, percent: bool) -> dict:
    """Returns a logarithmic axis, with lines at powers of ten, where all values are positive."""
    low, high = min(value["low"] for value in values), max(value["high"] for value in values)
    axis = {"format": "~%" if percent else "~g", "tickCount": 6}
    if low <= 0:
        return {"field": "y", "type": "quantitative", "title": title, "axis": axis}
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    if len(powers) > 3:
        axis["values"] = [10.0**power for power in powers[:: 1 + len(powers) // 8]]
    else:
        axis["values"] = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    return {"field": "y", "type": "quantitative", "title": title, "scale": {"type": "log"}, "axis": axis}


def _chart(values: list[dict], content: dict) -> dict:
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "width": "container",
        "height": _HEIGHT,
        "autosize": {"type": "fit", "contains": "padding"},
        "data": {"values": values},
        **content,
    }


def _rounded(value: float) -> float:
    """Four digits: a third of the bytes."""
    return float(f"{value:.4g}")
