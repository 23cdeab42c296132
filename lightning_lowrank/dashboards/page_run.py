"""A training run's part of the HTML page: charts of the panels that have values, and the table of layers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_lowrank.dashboards import charts, verdicts
from lightning_lowrank.dashboards.charts import Line
from lightning_lowrank.dashboards.page_layout import Block, Cell, Column, Figure, Part, Table, described
from lightning_lowrank.dashboards.panels import LOW_RANK, SECTIONS, Panel, Section
from lightning_lowrank.dashboards.verdicts import Values, at, last, shown

if TYPE_CHECKING:
    from lightning_lowrank.dashboards.recorded import Series

# What a value measured of a layer at a step is.
_Found = tuple[float, int] | None

_OPTIMIZER = re.compile(r"optimizer_(\d+)/")
_QUANTILES = {"q10": "10 % of the layers are below", "q50": "median layer", "q90": "90 % of the layers are below"}
# A layer's values in the order of the table's columns.
_COLUMNS = {
    "alignment": "Alignment",
    "alignment_minibatch": "Alignment of mini-batches",
    "residual": "Residual",
    "frobenius_norm": "Frobenius norm",
    "spectral_norm": "Spectral norm",
    "stable_rank": "Stable rank",
    "effective_rank": "Effective rank",
    "implied_weight_decay": "Implied weight decay",
}
_OF_SPECTRA = ("spectral_norm", "stable_rank", "effective_rank")
_BY_NAME = "number of the layer, in the order of names"
# Of what the user logged beside: a page is no substitute for a dashboard of everything.
_MOST_OWN = 12
# The weight decay that a configuration names is the run's if the logged residual follows from it to rounding.
_SAME = 1e-3


def by_optimizer(series: Mapping[str, Series], prefix: str) -> dict[str, dict[str, Series]]:
    """The monitor's values without the prefix: under "" of one optimizer, else by the optimizer's number as text.

    What belongs to the whole run, beside several optimizers, is under "all".
    """
    found: dict[str, dict[str, Series]] = {}
    for key, values in series.items():
        if key.startswith(f"{prefix}/"):
            rest = key.removeprefix(f"{prefix}/")
            match = _OPTIMIZER.match(rest)
            found.setdefault(match[1] if match else "", {})[rest[match.end() :] if match else rest] = values
    numbers = sorted(found.keys() - {""}, key=int)
    shared = {"all" if numbers else "": found[""]} if "" in found else {}
    return {**{number: found[number] for number in numbers}, **shared}


def run_part(optimizer: str, values: Values, config: Mapping[str, Any], monitored: Mapping[str, Any]) -> Part:
    """One optimizer's verdicts and sections.

    Args:
        optimizer: As :func:`by_optimizer` names it.
        values: Its values.
        config: The run's whole configuration.
        monitored: What the monitor wrote into it; empty where the logger keeps nothing of the kind.
    """
    sections = [section for section in SECTIONS if section.source == "run"]
    if optimizer == "all":
        blocks = [_block(section, values, None) for section in sections]
        return Part("All optimizers", [], [Block(b.heading, "", b.figures) for b in blocks if b.figures])
    names = _layers(values)
    # Which optimizer has them is known by their names alone.
    regimes = {
        str(regime): [name for name in of_regime if name in names or not optimizer]
        for regime, of_regime in monitored.get("regimes", {}).items()
    }
    end = max(step for series in values.values() for step in series.steps)
    optimizers = list(monitored.get("optimizers", ()))
    number = int(optimizer or 0)
    decay = _weight_decay(values, config, optimizers[number] if number < len(optimizers) else None)
    table = _layer_table(values, regimes, decay, end)
    blocks = [_block(section, values, table) for section in sections]
    heading = f"Optimizer {optimizer}" if optimizer else ""
    return Part(
        heading, verdicts.of_run(values, regimes if any(regimes.values()) else None, end), blocks, _axis(values)
    )


def own_values(series: Mapping[str, Series], prefixes: Iterable[str]) -> Part | None:
    """Charts of what the user logged, if anything."""
    begin = tuple(f"{prefix}/" for prefix in prefixes)
    keys = [key for key in series if not key.startswith(begin) and key != "epoch"]
    lines = [line for key in keys if (line := _line(key, series, key)).x][:_MOST_OWN]
    if not lines:
        return None
    text = "What the run logged beside. A good fit comes long before stationarity."
    figures = [_figure(line.name, "", [line]) for line in lines]
    return Part("", blocks=[Block("The run's own values", text, figures)])


def _axis(values: Values) -> dict[str, list[float]] | None:
    """The cumulative decay over the steps; None where it is unknown or stands still."""
    decay = _line("", values, "cumulative_decay")
    if not decay.x or decay.y[-1] <= decay.y[0]:
        return None
    kept = charts.thin(decay.y, charts.POINTS)
    return {"x": [decay.x[i] for i in kept], "y": [charts.rounded(decay.y[i], 9) for i in kept]}


def _block(section: Section, values: Values, table: Table | None) -> Block:
    """A section's panels that have values, and the names of those that have none."""
    block = Block(section.name, section.text)
    for panel in section.panels:
        if panel.kind == "table":
            block.tables += [table] if table else []
        elif panel.kind == "line":
            _add(block, panel, [_line(key.replace("_", " "), values, key) for key in panel.keys])
        elif panel.kind == "layers":
            names = _layers(values, panel.keys[0])
            known = _QUANTILES if set(names) <= _QUANTILES.keys() else {}
            _add(block, panel, [_line(known.get(name, name), values, f"{panel.keys[0]}/{name}") for name in names])
    ages = values.get("spectral_age")
    if section is LOW_RANK and ages and any(age > 0 for age in ages.values):
        block.notes.append(
            "Spectra were not measured in every row, to keep within the monitor's budget: where their lines are flat,"
            " values wait for their turn. LowRankMonitor(spectral_budget=1.0) measures all of them in every row."
        )
    return block


def _add(block: Block, panel: Panel, lines: list[Line]) -> None:
    lines = [line for line in lines if line.x]
    if not lines:
        block.missing.append(panel.title)
        return
    block.figures.append(_figure(panel.title, panel.text, lines, target=panel.target, log=panel.log))
    if len(lines) > charts.MOST_LINES:
        names, ends = [line.name for line in lines], [line.y[-1] for line in lines]
        log = panel.log and min(ends) > 0
        chart = charts.depth_chart(names, {"last": ends}, x_title=_BY_NAME, target=panel.target, log=log)
        title, text = f"{panel.title}, at the end", "The last value of each layer; choose one to see it in every chart."
        block.figures.append(Figure(title, text, described(title, "dots", names, ends), chart))


def _figure(title: str, text: str, lines: list[Line], *, target: float | None = None, log: bool = False) -> Figure:
    log = log and any(y > 0 for line in lines for y in line.y)
    if log and any(y <= 0 for line in lines for y in line.y):
        text = f"{text} Values that are not positive are left out on the logarithmic axis."
        lines = [line for line in lines if max(line.y) > 0]
    ends = [line.y[-1] for line in lines]
    low, high = (pick(y for line in lines for y in line.y) for pick in (min, max))
    first, end = min(line.x[0] for line in lines), max(line.x[-1] for line in lines)
    label = described(title, "lines", [line.name for line in lines], ends)
    label += f" Between {shown(low)} and {shown(high)} over steps {first:,} to {end:,}."
    columns = [Column("Series", False), Column("Last"), Column("At step"), Column("Smallest"), Column("Largest")]
    rows: list[list[Cell]] = [[line.name, line.y[-1], line.x[-1], min(line.y), max(line.y)] for line in lines]
    if len(lines) > charts.MOST_LINES:
        names = ("smallest", "10 % are below", "median", "90 % are below", "largest")
        columns = [Column(f"Last values of {len(lines)} layers", False), Column("Value")]
        rows = [[name, value] for name, value in zip(names, charts.quantiles(ends), strict=True)]
    return Figure(title, text, label, charts.line_chart(lines, target=target, log=log), columns, rows)


def _line(name: str, values: Values, key: str) -> Line:
    """A key's finite values, one per step, with their standard errors where the run has them."""
    found, errors = _finite(values.get(key)), _finite(values.get(f"{key}_stderr"))
    band = [errors.get(step, math.nan) for step in found] if errors else []
    return Line(name, list(found), list(found.values()), band)


def _finite(series: Series | None) -> dict[int, float]:
    if series is None:
        return {}
    pairs = sorted(zip(series.steps, series.values, strict=True), key=lambda pair: pair[0])
    return {step: value for step, value in pairs if math.isfinite(value)}


def _layers(values: Values, key: str = "") -> list[str]:
    """The layers that a key, or any key, has values of, in the order of the numbers in their names.

    Loggers sort their columns, so that the order in which the network has them is lost.
    """
    parts = (name.partition("/") for name in values)
    names = {layer for of, slash, layer in parts if slash and (of == key or (not key and of in _COLUMNS))}
    return sorted(names, key=lambda name: [(p.isdecimal(), int(p) if p.isdecimal() else p) for p in _digits(name)])


def _digits(name: str) -> list[str]:
    return re.split(r"(\d+)", name)


def _layer_table(
    values: Values, regimes: Mapping[str, Sequence[str]], weight_decay: float | None, end: int
) -> Table | None:
    """Every layer's last values. A residual is among them only where it follows exactly from what was logged."""
    names = _layers(values)
    if not names:
        return None
    found: dict[str, dict[str, _Found]] = {
        key: {name: last(values, f"{key}/{name}") for name in names} for key in _COLUMNS
    }
    if weight_decay:
        found["residual"] = {name: _residual(values, name, weight_decay) for name in names}
    found = {key: column for key, column in found.items() if any(column.values())}
    known = _QUANTILES if set(names) <= _QUANTILES.keys() else {}
    columns = [Column("Of the layers" if known else "Layer", False)]
    for key, column in found.items():
        columns.append(Column(_COLUMNS[key], True, _age(column.values(), end, _spectral_age(values, key, end))))
    of_layer = {} if known else {layer: regime for regime, layers in regimes.items() for layer in layers}
    columns += [Column("Regime", False)] if of_layer else []
    rows: list[list[Cell]] = []
    for name in names:
        numbers = [cell[0] if (cell := column[name]) else math.nan for column in found.values()]
        rows.append([known.get(name, name), *numbers, *([of_layer.get(name, "-")] if of_layer else [])])
    panel = next(panel for panel in LOW_RANK.panels if panel.kind == "table")
    text = f"{panel.text} Values of step {end:,}, where a column does not say otherwise."
    return Table(panel.title, text, columns, rows, of_layers=not known)


def _spectral_age(values: Values, key: str, end: int) -> float:
    """How old a value of the last row may be: those of spectra wait for their turn."""
    age = at(values, "spectral_age", end)
    return age if key in _OF_SPECTRA and age > 0 else 0.0


def _age(cells: Iterable[_Found], end: int, age: float = 0.0) -> str:
    """When a column's values were measured, if it was not at the end."""
    steps = {cell[1] for cell in cells if cell}
    if age:
        return f"up to {age:,.0f} steps older"
    if steps <= {end}:
        return ""
    return f"step {min(steps):,}" if len(steps) == 1 else f"steps {min(steps):,} to {max(steps):,}"


def _weight_decay(values: Values, config: Mapping[str, Any], optimizer: Mapping[str, Any] | None) -> float | None:
    """The one weight decay of all layers; None unless it is sure, and layers' values are of full gradients.

    Where full-batch values are those of a window or a pass, the implied weight decay is not: it is of a single step.
    """
    if "alignment" not in values or "alignment_stderr" in values:
        return None
    if optimizer is not None:
        decays = {decay for decay in optimizer.get("weight_decay", ()) if isinstance(decay, (int, float)) and decay > 0}
        return decays.pop() if len(decays) == 1 and optimizer.get("full_batch_values") == "step" else None
    found, decay = last(values, "alignment"), config.get("weight_decay")
    if found is None or not isinstance(decay, (int, float)):
        return None
    implied, residual = (verdicts.at(values, key, found[1]) for key in ("implied_weight_decay", "residual"))
    return decay if math.isclose(relative_residual(found[0], implied, decay), residual, rel_tol=_SAME) else None


def _residual(values: Values, name: str, weight_decay: float) -> _Found:
    found = last(values, f"alignment/{name}")
    if found is None:
        return None
    implied = verdicts.at(values, f"implied_weight_decay/{name}", found[1])
    value = relative_residual(found[0], implied, weight_decay)
    return (value, found[1]) if math.isfinite(value) else None


def relative_residual(alignment: float, implied: float, weight_decay: float) -> float:
    """|G + wd W| / |wd W| of one matrix, from two values of the same gradient G.

    With a = cos(W, -G) and k = -<W, G> / |W|^2 the norms are |G| / |W| = k / a, so that the square is
    1 - 2 k / wd + (k / (a wd))^2.

    Args:
        alignment: a.
        implied: k, the implied weight decay.
        weight_decay: wd.

    Returns:
        The residual; NaN without weight decay, or where a and k leave |G| open.

    Example:
        >>> relative_residual(1.0, 0.01, 0.01), relative_residual(1.0, 0.005, 0.01)
        (0.0, 0.5)
    """
    if not weight_decay > 0 or not alignment * implied > 0:
        return math.nan
    squared = 1 - 2 * implied / weight_decay + (implied / alignment / weight_decay) ** 2
    return math.sqrt(squared) if squared >= 0 else math.nan
