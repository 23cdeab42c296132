"""Vega-Lite charts as plain data: specifications with fixed field names, and the thinned numbers that they draw.

Names of layers, tasks and runs are never field names or expressions: series are numbered, and the page's script puts
names into legends and tooltips as text. Colours are the page's custom properties, which follow its theme.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"

# Distinguishable lines: six colours, and a pattern of dashes for every three of them, so that no two that a
# colour-blind reader confuses have the same pattern.
COLOURS = tuple(f"var(--series-{number})" for number in range(1, 7))
DASHES = ((1, 0), (6, 3), (2, 2), (9, 3, 2, 3))
MOST_LINES = 12
# Points that a line of a phone's to a page's width shows, and of each of a hundred lines.
POINTS = 300
POINTS_OF_MANY = 100
# Lines of so few points have them marked, or a single one would not be seen.
MARKED = 40
QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)

CONFIG: dict[str, Any] = {
    "background": "transparent",
    # The page describes its charts in words of its own.
    "aria": False,
    "font": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "titleFontWeight": "normal",
        "labelFontSize": 11,
        "titleFontSize": 11,
        "gridColor": "var(--grid)",
        "domainColor": "var(--rule)",
        "tickColor": "var(--rule)",
        "tickSize": 4,
        "labelLimit": 190,
    },
    "axisX": {"grid": False, "tickCount": 6, "labelOverlap": True},
    "axisY": {"domain": False, "ticks": False, "tickCount": 5, "labelPadding": 6, "title": None},
    "text": {"color": "var(--muted)", "fontSize": 11},
}


@dataclass(frozen=True)
class Line:
    """One series, its finite points in the order of the steps.

    Attributes:
        name: As the legend has it.
        x: Steps, or whatever the chart's axis counts.
        y: Values.
        error: A standard error per point, drawn as a band; or none.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] = ()


@dataclass(frozen=True)
class Chart:
    """What the page's script needs.

    Attributes:
        kind: "lines"; "band" for quantiles over many lines and the chosen one of them; "dots"; "bars".
        spec: Vega-Lite, with the named data sets "rows" and, of a band, "band".
        data: The numbers by series, thinned and rounded.
        steps: Whether x counts steps, so that it can be exchanged for the cumulative decay.
        legend: Name of each numbered series, with its colour and dashes.
        target: The value that a dashed rule marks.
    """

    kind: str
    spec: dict[str, Any]
    data: dict[str, Any]
    steps: bool = False
    legend: list[tuple[str, str, str]] = field(default_factory=list)
    target: float | None = None


def thin(values: Sequence[float], most: int) -> list[int]:
    """Indices of at most that many values, the first, the last, and the extremes in between among them.

    Example:
        >>> thin([0.0, 1.0, 9.0, 1.0, 0.0, 2.0, -5.0, 0.0], most=6)
        [0, 1, 2, 5, 6, 7]
    """
    count = len(values)
    if count <= most:
        return list(range(count))
    buckets = (most - 2) // 2
    kept = {0, count - 1}
    for bucket in range(buckets):
        inside = range(1 + bucket * (count - 2) // buckets, 1 + (bucket + 1) * (count - 2) // buckets)
        kept |= {min(inside, key=values.__getitem__), max(inside, key=values.__getitem__)}
    return sorted(kept)


def rounded(value: float, digits: int = 5) -> float:
    """A number to five significant digits, which is finer than a line."""
    return float(f"{value:.{digits}g}") if value != int(value) or abs(value) >= 1e15 else int(value)


def line_chart(
    lines: Sequence[Line], *, target: float | None = None, log: bool = False, x_title: str = "step", log_x: bool = False
) -> Chart:
    """Lines over the steps; of more than twelve their quantiles, and the one that a reader chooses.

    Along a logarithmic x, as of spectra, more than twelve are thin lines of one colour.

    Args:
        lines: At least one, none of them empty. On a logarithmic axis only positive values are drawn.
        target: Marked by a dashed rule.
        log: Whether the vertical axis is logarithmic.
        x_title: What x counts; "step" can be exchanged for the cumulative decay.
        log_x: Whether the horizontal axis is logarithmic.
    """
    many = len(lines) > MOST_LINES and not log_x
    most = POINTS if len(lines) <= MOST_LINES else POINTS_OF_MANY
    data: dict[str, Any] = {"lines": [_thinned(line, most, log) for line in lines], "log": log}
    x = {
        "field": "x",
        "type": "quantitative",
        "title": x_title,
        "scale": {"type": "log"} if log_x else {"zero": False, "nice": False},
    }
    y = _vertical(log)
    layers: list[dict[str, Any]] = []
    if many:
        data["band"] = _quantiles(lines, log)
        layers += [
            _area(x, y, "q0", "q4", 0.13),
            _area(x, y, "q1", "q3", 0.28),
            {
                "data": {"name": "band"},
                "mark": {"type": "line", "color": COLOURS[0], "strokeWidth": 1.8},
                "encoding": {"x": x, "y": {**y, "field": "q2"}},
            },
        ]
    elif any(line.error for line in lines):
        layers.append(
            {
                "mark": {"type": "area", "opacity": 0.2},
                "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": _colour(len(lines))},
            }
        )
    target = None if log and target is not None and target <= 0 else target
    layers += [] if target is None else [_target(target, y)]
    marked = not many and any(len(line.x) <= (1 if log_x else MARKED) for line in lines)
    layers.append(_lines(x, y, 0 if many else len(lines), marked))
    spec = _spec(layers, height=210)
    return Chart("band" if many else "lines", spec, data, x_title == "step", legend(lines), target)


def legend(lines: Sequence[Line]) -> list[tuple[str, str, str]]:
    """Name, colour and dashes of each line; none of more lines than can be told apart."""
    if len(lines) > MOST_LINES:
        return []
    return [
        (line.name, COLOURS[i % len(COLOURS)], " ".join(map(str, DASHES[i // 3 % len(DASHES)])))
        for i, line in enumerate(lines)
    ]


def depth_chart(
    names: Sequence[str],
    groups: Mapping[str, Sequence[float]],
    *,
    x_title: str,
    target: float | None = None,
    log: bool = False,
) -> Chart:
    """A value per layer: dots over the layer's number.

    Args:
        names: The layers.
        groups: Values by what they are of, in the order of the layers; what is not finite has no dot.
        x_title: In which order the layers are.
        target: Marked by a dashed rule.
        log: Whether the vertical axis is logarithmic; only positive values are drawn.
    """
    drawn = [
        _thinned(Line(group, range(1, len(values) + 1), values), len(values), log) for group, values in groups.items()
    ]
    count = len(drawn)
    x = {
        "field": "x",
        "type": "quantitative",
        "title": x_title,
        "scale": {"domain": [0, len(names) + 1], "nice": False},
        "axis": {"tickMinStep": 1, "format": "d"},
    }
    y = _vertical(log)
    dots = {
        "mark": {"type": "point", "filled": True},
        "encoding": {
            "x": x,
            "y": {**y, "field": "y"},
            "color": _colour(count),
            "shape": {"field": "s", "type": "nominal", "scale": {"domain": list(range(count))}, "legend": None},
            "size": {"condition": {"test": "chosen === datum.x", "value": 130}, "value": 26},
            "opacity": {"condition": {"test": "chosen < 0 || chosen === datum.x", "value": 1}, "value": 0.45},
        },
    }
    target = None if log and target is not None and target <= 0 else target
    layers = [dots] if target is None else [_target(target, y), dots]
    shown = [(group, COLOURS[i % len(COLOURS)], "1 0") for i, group in enumerate(groups)] if count > 1 else []
    return Chart("dots", _spec(layers, height=210), {"lines": drawn, "names": list(names)}, legend=shown, target=target)


def bar_chart(groups: Mapping[str, Mapping[str, float]]) -> Chart:
    """Horizontal bars with their numbers: a group per task or layer, a bar per model or task.

    Args:
        groups: Values by group and by bar; what is not finite has no bar.
    """
    bars = list(dict.fromkeys(bar for values in groups.values() for bar in values))
    rows = [
        {"group": group, "s": bars.index(bar), "value": rounded(value)}
        for group, values in enumerate(groups.values())
        for bar, value in values.items()
        if math.isfinite(value)
    ]
    encoding: dict[str, Any] = {
        "y": {
            "field": "group",
            "type": "nominal",
            "title": None,
            "scale": {"domain": list(range(len(groups)))},
            "axis": {"labelExpr": "names[datum.value]"},
        },
        "x": {"field": "value", "type": "quantitative", "title": None},
    }
    if len(bars) > 1:
        encoding["yOffset"] = {"field": "s", "type": "nominal", "scale": {"domain": list(range(len(bars)))}}
    layers = [
        {"mark": {"type": "bar", "cornerRadiusEnd": 2}, "encoding": {**encoding, "color": _colour(len(bars))}},
        {
            "mark": {"type": "text", "align": "left", "baseline": "middle", "dx": 4},
            "encoding": {**encoding, "text": {"field": "value", "format": ".3~g"}},
        },
    ]
    height = len(groups) * (15 * max(1, len(bars)) + 14)
    spec = _spec(layers, height=height, padding={"left": 0, "right": 26, "top": 4, "bottom": 0})
    shown = [(bar, COLOURS[i % len(COLOURS)], "1 0") for i, bar in enumerate(bars)] if len(bars) > 1 else []
    return Chart("bars", spec, {"rows": rows, "names": list(groups)}, legend=shown)


def quantiles(values: Iterable[float]) -> list[float]:
    """Minimum, 10 %, median, 90 % and maximum of finite values, with linear interpolation.

    Example:
        >>> quantiles([3.0, 1.0, 2.0])
        [1.0, 1.2, 2.0, 2.8, 3.0]
    """
    ordered = sorted(values)
    found = []
    for quantile in QUANTILES:
        place = quantile * (len(ordered) - 1)
        below = math.floor(place)
        above = min(below + 1, len(ordered) - 1)
        found.append(ordered[below] + (place - below) * (ordered[above] - ordered[below]))
    return found


def spread(count: int, most: int) -> list[int]:
    """Places in a sequence, evenly along a logarithmic axis, the first and the last among them.

    Example:
        >>> spread(100, 5)
        [0, 2, 9, 31, 99]
    """
    if count <= most:
        return list(range(count))
    return sorted({round(count ** (i / (most - 1))) - 1 for i in range(most)})


def _quantiles(lines: Sequence[Line], log: bool) -> dict[str, list[float]]:
    """Of all lines at every step that any of them has, thinned so that the extremes stay."""
    at: dict[float, list[float]] = {}
    for line in lines:
        for x, y in zip(line.x, line.y, strict=True):
            if not log or y > 0:
                at.setdefault(x, []).append(y)
    # A step that only a few layers were measured at, as where spectra take turns, has no quantiles of all of them.
    enough = statistics.median(map(len, at.values())) / 2 if at else 0
    steps = sorted(x for x, ys in at.items() if len(ys) >= enough)
    curves = list(zip(*(quantiles(at[x]) for x in steps), strict=True))
    kept = sorted({index for place in (0, 2, 4) for index in thin(curves[place], POINTS_OF_MANY)}) if curves else []
    band = {f"q{number}": [rounded(curve[i]) for i in kept] for number, curve in enumerate(curves)}
    return {"x": [rounded(steps[i], 9) for i in kept], **band}


def _thinned(line: Line, most: int, log: bool) -> dict[str, Any]:
    drawn = [i for i, y in enumerate(line.y) if math.isfinite(y) and (y > 0 or not log)]
    kept = [drawn[i] for i in thin([line.y[i] for i in drawn], most)]
    found: dict[str, Any] = {
        "name": line.name,
        "x": [rounded(line.x[i], 9) for i in kept],
        "y": [rounded(line.y[i]) for i in kept],
    }
    if line.error:
        found["e"] = [rounded(line.error[i]) if math.isfinite(line.error[i]) else 0 for i in kept]
    return found


def _spec(layers: list[dict[str, Any]], **rest: Any) -> dict[str, Any]:
    return {
        "$schema": SCHEMA,
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": {"name": "rows"},
        # The number of the series that a reader has chosen, and what numbers on an axis stand for.
        "params": [{"name": "chosen", "value": -1}, {"name": "names", "value": []}],
        "layer": layers,
        "config": CONFIG,
        **rest,
    }


def _vertical(log: bool) -> dict[str, Any]:
    if not log:
        return {"type": "quantitative", "scale": {"zero": False}}
    # Of the many lines of a logarithmic axis those at powers of ten stand out.
    power = {"test": f"abs({_LOG10} - round({_LOG10})) < 1e-6", "value": 1}
    return {
        "type": "quantitative",
        "scale": {"type": "log", "nice": False},
        "axis": {"gridOpacity": {"condition": power, "value": 0.4}},
    }


_LOG10 = "log(datum.value) / LN10"


def _colour(count: int) -> dict[str, Any]:
    colours = [COLOURS[i % len(COLOURS)] for i in range(count)]
    return {
        "field": "s",
        "type": "nominal",
        "scale": {"domain": list(range(count)), "range": colours},
        "legend": None,
    }


def _lines(x: dict[str, Any], y: dict[str, Any], count: int, marked: bool) -> dict[str, Any]:
    """Numbered lines; without a count there is only the chosen one of many, in the second colour."""
    mark: dict[str, Any] = {"type": "line", "strokeWidth": 1.5, "strokeJoin": "round"}
    if marked:
        mark["point"] = {"size": 16, "filled": True}
    encoding: dict[str, Any] = {"x": x, "y": {**y, "field": "y"}}
    if not count:
        mark["color"] = COLOURS[1]
        return {"mark": mark, "encoding": encoding}
    dashes = [list(DASHES[i // 3 % len(DASHES)]) for i in range(count)]
    if count > MOST_LINES:
        chosen = "datum.s === chosen"
        encoding["detail"] = {"field": "s", "type": "nominal"}
        encoding["color"] = {"condition": {"test": chosen, "value": COLOURS[1]}, "value": COLOURS[0]}
        encoding["opacity"] = {"condition": {"test": chosen, "value": 1}, "value": 0.3}
        return {"mark": {**mark, "strokeWidth": 1}, "encoding": encoding}
    encoding["color"] = _colour(count)
    encoding["strokeDash"] = {
        "field": "s",
        "type": "nominal",
        "scale": {"domain": list(range(count)), "range": dashes},
        "legend": None,
    }
    encoding["opacity"] = {"condition": {"test": "chosen < 0 || datum.s === chosen", "value": 1}, "value": 0.15}
    return {"mark": mark, "encoding": encoding}


def _area(x: dict[str, Any], y: dict[str, Any], low: str, high: str, opacity: float) -> dict[str, Any]:
    return {
        "data": {"name": "band"},
        "mark": {"type": "area", "color": COLOURS[0], "opacity": opacity},
        "encoding": {"x": x, "y": {**y, "field": low}, "y2": {"field": high}},
    }


def _target(target: float, y: dict[str, Any]) -> dict[str, Any]:
    mark = {"type": "rule", "strokeDash": [2, 3], "color": "var(--muted)"}
    return {"data": {"values": [{}]}, "mark": mark, "encoding": {"y": {**y, "datum": target}}}
