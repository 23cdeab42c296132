"""StationarityReport: what a pass over the data says about a network, as table, figure, file or log entry."""

from __future__ import annotations

import io
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from lightning_lowrank._compat import as_list
from lightning_lowrank._json_report import Saved, read_report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of the printed table: room for long names.
_WIDTH = 120

Interval = tuple[float, float]


@dataclass(frozen=True)
class LayerStationarity:
    """What was found about one weight matrix W with the gradient G of the data's loss.

    Attributes:
        name: The parameter's name.
        shape: Its shape.
        weight_decay: Coefficient of its L2 penalty; NaN where its decay is none.
        frobenius_norm: |W|_F.
        predicted_norm: sqrt(-<W, G> / weight_decay), which is |W|_F at a stationary point; NaN without coupled decay,
            or where -<W, G> is not positive.
        alignment: cos(W, -G): 1 at a stationary point.
        implied_weight_decay: -<W, G> / |W|^2, which is the weight decay at a stationary point.
        spectral_norm: |W|_2.
        stable_rank: |W|_F^2 / |W|_2^2.
        spectral_ratio: |W|_2 / |W|_F.
        regime: "homogeneous", "scale-invariant", "other" or "undecided".
        evidence: What the regime was read from, in words.
    """

    name: str
    shape: tuple[int, ...]
    weight_decay: float
    frobenius_norm: float
    predicted_norm: float
    alignment: float
    implied_weight_decay: float
    spectral_norm: float
    stable_rank: float
    spectral_ratio: float
    regime: str
    evidence: str


@dataclass(frozen=True)
class StationarityReport(Saved):
    """How far a network is from a stationary point of its L2-regularised loss, measured at fixed weights.

    Alignment, residual and radial balance are over all parameters that are decayed through the gradient, but for
    scale-invariant ones. Intervals are (low, high) at ``confidence``; of zero width where nothing is random.

    Attributes:
        alignment: cos(Lambda theta, -G): 1 at a stationary point.
        alignment_interval: Its confidence interval.
        residual: |G + Lambda theta| / |Lambda theta|: 0 at a stationary point.
        residual_interval: Its confidence interval.
        radial_balance: -<theta, G> / <theta, Lambda theta>: 1 at a stationary point.
        radial_balance_interval: Its confidence interval.
        confidence: Of the intervals.
        samples: Number of samples in the pass; of batches, where samples can't be counted.
        stochastic: Whether gradients depend on random numbers, as with dropout and augmentation.
        weight_decay: The coefficient of the penalty; NaN if there is none, or not one for all matrices.
        layers: The weight matrices.
        norm_spread: Largest over smallest norm within a rescaling group, the worst of all; 1 at a stationary point.
        homogeneity_defect: By how much <W, G> differs within a group: rounding, if the groups are right.
        spectral_ratio: Mean of |W|_2 / |W|_F over the matrices.
        spectral_ratio_bound: What it is at least, from the network's outputs; NaN where no bound is known.
        notes: What a reader has to know.
    """

    alignment: float
    alignment_interval: Interval
    residual: float
    residual_interval: Interval
    radial_balance: float
    radial_balance_interval: Interval
    confidence: float
    samples: int
    stochastic: bool
    weight_decay: float
    layers: list[LayerStationarity]
    norm_spread: float
    homogeneity_defect: float
    spectral_ratio: float
    spectral_ratio_bound: float
    notes: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, path: str | Path) -> StationarityReport:
        """Read a report that :meth:`save` wrote.

        Raises:
            ValueError: If the file is no report, or of another schema.
        """
        try:
            content = {key: _without_null(value) for key, value in read_report(path, cls.schema_version).items()}
            for key in ("alignment", "residual", "radial_balance"):
                low, high = content[f"{key}_interval"]
                content[f"{key}_interval"] = (low, high)
            content["layers"] = [
                LayerStationarity(**{**layer, "shape": tuple(layer["shape"])}) for layer in content["layers"]
            ]
            return cls(**content)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a stationarity report: {error!r}") from error

    def __str__(self) -> str:
        """The headline numbers, and a table with a row per weight matrix."""
        out = io.StringIO()
        Console(file=out, width=_WIDTH, force_terminal=False, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())

    def __rich__(self) -> RenderableType:
        """The tables for a rich console, as wide as that is."""
        numbers = Table.grid(padding=(0, 3, 0, 0))
        for row in self._headlines():
            numbers.add_row(*row)
        right = ("norm", "predicted", "alignment", "implied wd", "stable rank")
        layers = Table(
            Column("weight", overflow="fold"),
            Column("shape", no_wrap=True),
            *(Column(name, justify="right") for name in right),
            "regime",
            box=SIMPLE_HEAD,
            show_edge=False,
        )
        layers.padding = (0, 1, 0, 0)
        for layer in self.layers:
            values = (
                layer.frobenius_norm,
                layer.predicted_norm,
                layer.alignment,
                layer.implied_weight_decay,
                layer.stable_rank,
            )
            shape = "x".join(map(str, layer.shape))
            layers.add_row(escape(layer.name), shape, *map(_shown, values), escape(layer.evidence))
        return Group(numbers, Text(), layers, *(Text(f"Note: {note}") for note in self.notes))

    def _headlines(self) -> list[tuple[str, str]]:
        """Name and value of each number, intervals and targets in words."""
        randomness = "random gradients" if self.stochastic else "deterministic gradients"
        bound = "" if math.isnan(self.spectral_ratio_bound) else f" (at least {self.spectral_ratio_bound:.4g})"
        found = [
            ("alignment", _with_interval(self.alignment, self.alignment_interval) + "  (1 when stationary)"),
            ("residual", _with_interval(self.residual, self.residual_interval) + "  (0 when stationary)"),
            (
                "radial balance",
                _with_interval(self.radial_balance, self.radial_balance_interval) + "  (1 when stationary)",
            ),
            ("norm spread", f"{_shown(self.norm_spread)}  (1 when stationary)"),
            ("homogeneity defect", _shown(self.homogeneity_defect)),
            ("spectral ratio", _shown(self.spectral_ratio) + bound),
            ("weight decay", _shown(self.weight_decay)),
            ("data", f"{self.samples} samples, {randomness}, intervals at {100 * self.confidence:g} %"),
        ]
        # A cell is rich markup, in which an interval's brackets would be a tag.
        return [(name, escape(value)) for name, value in found]

    def plot(self) -> tuple[Figure, Axes]:
        """Bars of each matrix' norm beside the norm that a stationary point has.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
            ValueError: If there is no weight matrix in the report.
        """
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("plots need matplotlib: pip install 'lightning-lowrank[examples]'") from error
        if not self.layers:
            raise ValueError("there is no weight matrix in this report to plot; measure without include and exclude")
        # A figure of its own, not pyplot's: nothing global is left behind.
        figure = Figure(figsize=(2.0 + 0.8 * len(self.layers), 3.6), layout="constrained")
        axes = figure.subplots()
        places = range(len(self.layers))
        bars = {
            "|W|": ([layer.frobenius_norm for layer in self.layers], "#0072B2", -0.2),
            "predicted when stationary": ([layer.predicted_norm for layer in self.layers], "#E69F00", 0.2),
        }
        for label, (heights, colour, shift) in bars.items():
            axes.bar([place + shift for place in places], heights, 0.37, label=label, color=colour)
        axes.set_xticks(list(places), [layer.name for layer in self.layers], rotation=30, ha="right")
        axes.set_ylabel("Frobenius norm")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
        return figure, axes

    def log(self, logger: Any, prefix: str = "stationarity") -> None:
        """Send the numbers to a logger, or to each of several; what is NaN is left out.

        Args:
            logger: A Lightning logger or a list of them.
            prefix: What the keys begin with; a layer's are ``<prefix>/<key>/<name>``.
        """
        values = {key: value for key, value in self.to_dict().items() if isinstance(value, float)}
        for key in ("alignment", "residual", "radial_balance"):
            values[f"{key}_low"], values[f"{key}_high"] = getattr(self, f"{key}_interval")
        for layer in self.layers:
            values |= {f"{key}/{layer.name}": value for key, value in asdict(layer).items() if isinstance(value, float)}
        named = {f"{prefix}/{key}": value for key, value in values.items() if math.isfinite(value)}
        for one in as_list(logger):
            one.log_metrics(named)
            one.save()


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def _with_interval(value: float, interval: Interval) -> str:
    """A number with its interval, to the digits that the interval's width leaves a meaning."""
    low, high = interval
    if math.isnan(low) or low == high:
        return _shown(value)
    digits = max(0, 1 - math.floor(math.log10(high - low)))
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_null(item) for item in value]
    return math.nan if value is None else value
