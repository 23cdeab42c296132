"""The parts of the HTML page that show reports: of a merge, of a pass over the data, of the spectra of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_lowrank.dashboards import charts
from lightning_lowrank.dashboards.charts import Line
from lightning_lowrank.dashboards.page_layout import Block, Cell, Column, Figure, Table, described
from lightning_lowrank.dashboards.page_run import relative_residual
from lightning_lowrank.dashboards.panels import BALANCED, LOW_RANK, MERGE, NOT_APPLICABLE, SECTIONS, STATIONARY
from lightning_lowrank.dashboards.verdicts import last, shown
from lightning_lowrank.merging.report import MergeReport

if TYPE_CHECKING:
    from lightning_lowrank.dashboards.recorded import Series
    from lightning_lowrank.stationarity_report import StationarityReport
    from lightning_lowrank.weight_report import WeightReport

_MADE = ("sum", "sum_pooled", "sum_reestimated", "average", "ensemble")
_FROM_FIRST = "number of the layer, first to last"
# Singular values below that share of the largest are rounding; and points of a spectrum's line.
_FLOOR, _POINTS = 1e-8, 60


def merge_of(series: Mapping[str, Series], prefix: str) -> MergeReport | None:
    """A merge's values as MergeReport.log wrote them into a run, keys ``<prefix>/<task>/<model>/<metric>``."""
    metrics: dict[str, float] = {}
    for key in series:
        name = key.removeprefix(f"{prefix}/")
        if name != key and name.count("/") >= 2:
            found = last(series, key)
            metrics[name] = found[0] if found else math.nan
    if not metrics:
        return None
    # A log keeps no order: the networks first, then what was made of them.
    models = sorted(
        {name.split("/", 2)[1] for name in metrics},
        key=lambda model: (_MADE.index(model) if model in _MADE else -1, model),
    )
    tasks = {}
    for task in dict.fromkeys(name.split("/", 2)[0] for name in metrics):
        # No other network leaves the outputs of the task's own as they are.
        own = [model for model in models if metrics.get(f"{task}/{model}/output_change") == 0.0]
        tasks[task] = own[0] if len(own) == 1 else ""
    return MergeReport(tasks, models, metrics)


def merge_block(report: MergeReport) -> Block:
    """Every model on every task, and the leak."""
    block = Block(MERGE.name, MERGE.text, notes=list(report.notes))
    of_models, of_bars, of_leaks = MERGE.panels
    if metric := report.headline_metric:
        groups = {
            task: {model: report.metrics.get(f"{task}/{model}/{metric}", math.nan) for model in report.models}
            for task in report.tasks
        }
        title = f"{metric.replace('_', ' ').capitalize()} of each model on each task"
        block.figures.append(_bars(title, of_bars.text, groups))
        block.tables.append(_of_models(report, of_models.title, of_models.text))
    layers = list(dict.fromkeys(layer for of_task in report.leak.values() for layer in of_task))
    if not layers:
        return block
    of_tasks = {task: [found.get(layer, math.nan) for layer in layers] for task, found in report.leak.items()}
    block.figures += _by_layer(of_leaks.title, of_leaks.text, layers, of_tasks)
    rows: list[list[Cell]] = [[layer, *values] for layer, *values in zip(layers, *of_tasks.values(), strict=True)]
    columns = [Column("Layer", False), *(Column(f"On {task}") for task in of_tasks)]
    block.tables.append(Table(of_leaks.title, "The numbers of the chart.", columns, rows, of_layers=True))
    return block


def _of_models(report: MergeReport, title: str, text: str) -> Table:
    metrics = list(dict.fromkeys(name for task in report.tasks for name in report.metric_names(task)))
    pairs = [(metric, task) for metric in metrics for task in report.tasks]
    columns = [Column(metric.replace("_", " ").capitalize(), True, f"on {task}") for metric, task in pairs]
    rows: list[list[Cell]] = [
        [model, *(report.metrics.get(f"{task}/{model}/{metric}", math.nan) for metric, task in pairs)]
        for model in report.models
    ]
    own = ", ".join(f"{model} on {task}" for task, model in report.tasks.items() if model)
    return Table(title, f"{text} Trained were {own}." if own else text, [Column("Model", False), *columns], rows)


def card_blocks(report: MergeReport) -> list[Block]:
    """Of merged files: which they were, and what was done with their tensors."""
    card = report.card
    if not card:
        return []
    output = dict(card["output"])
    sources = [(f"network {number}", source["files"]) for number, source in enumerate(card["inputs"], 1)]
    sources += [("base", card["base"]["files"])] if card["base"] else []
    sources += [("output", {output.pop("name"): output})]
    rows: list[list[Cell]] = []
    for role, files in sources:
        for name, found in files.items():
            hashes = " ".join(f"{key} {value}" for key, value in found.items() if key != "bytes")
            rows.append([str(name), role, found["bytes"], hashes])
    columns = [Column("File", False), Column("Role", False), Column("Bytes"), Column("Hash", False)]
    rules: list[list[Cell]] = [[pair, count] for pair, count in card["rules"].items()]
    tables = [
        Table("Files", "What was merged, and what came of it.", columns, rows),
        Table("Rules", "What was done with the tensors.", [Column("Kind: rule", False), Column("Tensors")], rules),
    ]
    differing: list[list[Cell]] = [[name, " | ".join(found)] for name, found in card["hyper_parameters"].items()]
    if differing:
        of_networks = [Column("Hyperparameter", False), Column("Values, in the order of the networks", False)]
        tables.append(Table("Hyperparameters that differ", "", of_networks, differing))
    return [Block("How it was merged", f"Made at {card['created']}.", tables=tables)]


def stationarity_blocks(report: StationarityReport) -> list[Block]:
    """The numbers with their intervals, norms and alignment by layer, and the table of layers."""
    layers = report.layers
    names = [layer.name for layer in layers]
    numbers = Table("The numbers", _confidence(report), _NUMBERS, _numbers(report))
    stationary = Block(STATIONARY.name, STATIONARY.text, tables=[numbers], notes=list(report.notes))
    stationary.figures = _by_layer(
        "Alignment by layer", _text("alignment", "layers"), names, {"alignment": [w.alignment for w in layers]}, 1.0
    )
    balanced = Block(BALANCED.name, BALANCED.text)
    norms = {"|W|": [w.frobenius_norm for w in layers], "at a stationary point": [w.predicted_norm for w in layers]}
    predicted = "Beside each layer's norm the one that a stationary point has: sqrt(-<W, G> / wd)."
    balanced.figures = _by_layer("Frobenius norm by layer", predicted, names, norms)
    low = Block(LOW_RANK.name, LOW_RANK.text, tables=[_of_layers(report)])
    ranks = {"stable rank": [w.stable_rank for w in layers]}
    low.figures = _by_layer("Stable rank by layer", _text("stable_rank", "layers"), names, ranks, log=True)
    silent: list[list[Cell]] = [[layer.name, layer.regime, layer.evidence] for layer in layers]
    columns = [Column("Layer", False), Column("Regime", False), Column("Evidence", False)]
    regimes = Table("Regimes", "What the theory says of each layer, and from what.", columns, silent, of_layers=True)
    return [stationary, balanced, low, Block(NOT_APPLICABLE.name, NOT_APPLICABLE.text, tables=[regimes])]


_NUMBERS = [
    Column("Number", False),
    Column("Value"),
    Column("From"),
    Column("To"),
    Column("When stationary", False),
    Column("What it is", False),
]

# The panels' texts of these speak of steps.
_MEANINGS = {
    "alignment": "The cosine of the decay wd * theta and the negative gradient over the data.",
    "radial_balance": "The gradient against the decay along the weights' own direction: necessary, not sufficient.",
}


def _numbers(report: StationarityReport) -> list[list[Cell]]:
    nan = (math.nan, math.nan)
    ratio = f"at least {shown(report.spectral_ratio_bound)}" if math.isfinite(report.spectral_ratio_bound) else "-"
    return [
        [name.replace("_", " ").capitalize(), value, low, high, target, _MEANINGS.get(name) or _text(name)]
        for name, value, (low, high), target in (
            ("alignment", report.alignment, report.alignment_interval, "1"),
            ("residual", report.residual, report.residual_interval, "0"),
            ("radial_balance", report.radial_balance, report.radial_balance_interval, "1"),
            ("norm_spread", report.norm_spread, nan, "1"),
            ("homogeneity_defect", report.homogeneity_defect, nan, "0"),
            ("spectral_ratio", report.spectral_ratio, nan, ratio),
        )
    ]


def _confidence(report: StationarityReport) -> str:
    random = "random, as with dropout" if report.stochastic else "not random"
    return (
        f"Measured over {report.samples:,} samples at fixed weights; gradients were {random}. Intervals hold"
        f" {100 * report.confidence:g} %, and have no width where nothing is random."
    )


def _of_layers(report: StationarityReport) -> Table:
    columns = {
        "Alignment": [w.alignment for w in report.layers],
        "Residual": [relative_residual(w.alignment, w.implied_weight_decay, w.weight_decay) for w in report.layers],
        "Frobenius norm": [w.frobenius_norm for w in report.layers],
        "Predicted norm": [w.predicted_norm for w in report.layers],
        "Spectral norm": [w.spectral_norm for w in report.layers],
        "Stable rank": [w.stable_rank for w in report.layers],
        "Implied weight decay": [w.implied_weight_decay for w in report.layers],
        "Weight decay": [w.weight_decay for w in report.layers],
    }
    rows: list[list[Cell]] = [
        [layer.name, _shape(*layer.shape), *(values[i] for values in columns.values()), layer.regime]
        for i, layer in enumerate(report.layers)
    ]
    heads = [Column("Layer", False), Column("Shape", False), *map(Column, columns), Column("Regime", False)]
    text = (
        "Every weight matrix. The residual |G + wd W| / |wd W| and the alignment cos(W, -G) are of the layer by itself;"
        " the predicted norm is the one that a stationary point has."
    )
    return Table("Layers", text, heads, rows, of_layers=True)


def weight_blocks(report: WeightReport) -> list[Block]:
    """The spectra, the stable ranks, every matrix, and what was left out."""
    block = Block(LOW_RANK.name, LOW_RANK.text, notes=list(report.notes))
    panel = next(panel for panel in LOW_RANK.panels if panel.kind == "chart")
    lines = []
    for row in report.matrices:
        places = charts.spread(len(row.singular_values), _POINTS) if row.spectral_norm > 0 else []
        ratios = [(i + 1, row.singular_values[i] / row.spectral_norm) for i in places]
        points = [(i, ratio) for i, ratio in ratios if ratio >= _FLOOR]
        if points:
            lines.append(Line(row.name, *zip(*points, strict=True)))
    if lines:
        title, text = panel.title, "Relative to the largest one, on logarithmic axes. A steep fall is low rank."
        chart = charts.line_chart(lines, log=True, log_x=True, x_title="number of the singular value")
        label = described(title, "lines", [line.name for line in lines], [line.y[-1] for line in lines])
        block.figures.append(Figure(title, text, label, chart))
    else:
        block.missing.append(panel.title)
    names = [row.name for row in report.matrices]
    ranks = {"stable rank": [row.stable_rank for row in report.matrices]}
    block.figures += _by_layer("Stable rank by layer", _text("stable_rank", "layers"), names, ranks, log=True)
    block.tables.append(_of_matrices(report))
    if report.left_out:
        rows: list[list[Cell]] = [[name, reason] for name, reason in report.left_out.items()]
        columns = [Column("Tensor", False), Column("Reason", False)]
        block.tables.append(Table("Left out", "Tensors that no spectrum was made of.", columns, rows))
    return [block]


_OF_MATRICES = {
    "Frobenius norm": "frobenius_norm",
    "Spectral norm": "spectral_norm",
    "Operator norm": "operator_norm",
    "Stable rank": "stable_rank",
    "Effective rank": "effective_rank",
    "Numerical rank": "numerical_rank",
    "Energy outside 1": "energy_outside_1",
    "Energy outside 8": "energy_outside_8",
    "RMS entry": "rms_entry",
}


def _of_matrices(report: WeightReport) -> Table:
    found = {title: [getattr(row, key) for row in report.matrices] for title, key in _OF_MATRICES.items()}
    found = {title: values for title, values in found.items() if any(map(math.isfinite, values))}
    rows: list[list[Cell]] = []
    for i, row in enumerate(report.matrices):
        shape = _shape(*row.shape)
        shape = shape if row.groups == 1 else f"{row.groups} blocks of {shape}"
        rows.append([row.name, row.kind, shape, *(values[i] for values in found.values())])
    text = (
        "Stable rank |W|_F^2 / |W|_2^2; effective rank exp of the entropy of the singular values' shares; numerical"
        " rank the singular values above rounding; energy outside k the share of |W|_F^2 outside the k largest."
    )
    columns = [Column("Matrix", False), Column("Kind", False), Column("Shape", False), *map(Column, found)]
    return Table("Matrices", text, columns, rows, of_layers=True)


def _shape(*sizes: int) -> str:
    return "\u00a0x\u00a0".join(map(str, sizes))


def _text(key: str, kind: str = "line") -> str:
    """How to read a value, as the panels have it."""
    panels = (panel for section in SECTIONS for panel in section.panels)
    return next(panel.text for panel in panels if panel.kind == kind and panel.keys[0] == key)


def _by_layer(
    title: str,
    text: str,
    names: Sequence[str],
    groups: Mapping[str, Sequence[float]],
    target: float | None = None,
    log: bool = False,
) -> list[Figure]:
    """A value per layer: bars of a few, dots of many; nothing where nothing is finite."""
    finite = [value for values in groups.values() for value in values if math.isfinite(value)]
    if not finite:
        return []
    if len(names) <= charts.MOST_LINES:
        by_name = {name: {group: values[i] for group, values in groups.items()} for i, name in enumerate(names)}
        return [_bars(title, text, by_name)]
    log = log and min(finite) > 0
    chart = charts.depth_chart(names, groups, x_title=_FROM_FIRST, target=target, log=log)
    every = [(f"{group}, {n}", v) for group, of in groups.items() for n, v in zip(names, of, strict=True)]
    return [Figure(title, text, described(title, "dots", [n for n, _ in every], [v for _, v in every]), chart)]


def _bars(title: str, text: str, groups: Mapping[str, Mapping[str, float]]) -> Figure:
    found = [(f"{group}, {bar}", value) for group, values in groups.items() for bar, value in values.items()]
    label = described(title, "bars", [name for name, _ in found], [value for _, value in found])
    rows: list[list[Cell]] = [[name, value] for name, value in found]
    return Figure(title, text, label, charts.bar_chart(groups), [Column("Of", False), Column("Value")], rows)
