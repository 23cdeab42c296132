"""WeightReport: what the spectra of a network's weights are, as table, figure, file or log entry."""

from __future__ import annotations

import io
import json
import math
import statistics
from collections.abc import Iterable
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
from lightning_lowrank.stationarity_report import _shown, _without_null

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of the printed table: room for long names.
_WIDTH = 150
# Names that fit beside the figure's axis, points that a line is drawn with, and the smallest ratio that is shown.
_NAMES = 40
_POINTS = 400
_FLOOR = 1e-8
# The colours' range: the yellow end of the map is hard to see on white.
_COLOURS = (0.0, 0.88)


@dataclass(frozen=True)
class MatrixSpectrum:
    """What was found about one weight matrix W; what could not be measured is NaN.

    Attributes:
        name: The parameter's name, with ``[query]`` and the like for a part of it.
        kind: What it was taken for: "linear", "convolution", "fused attention", ...
        shape: Rows and columns; of one block, if the matrix is block-diagonal.
        groups: Number of equal blocks.
        dtype: Type of the entries.
        finite: Whether all entries are finite.
        rms_entry: Root mean square of the entries.
        frobenius_norm: |W|_F.
        spectral_norm: |W|_2, the largest singular value.
        operator_norm: Norm of the whole convolution on its input; only where ``matrices=`` says that it is circular.
        stable_rank: |W|_F^2 / |W|_2^2.
        effective_rank: Exp of the entropy of the singular values' shares (Roy and Vetterli, 2007).
        numerical_rank: Singular values above the entries' rounding; NaN where that is as large as the norm.
        energy_outside_1: Share of |W|_F^2 outside the largest singular value.
        energy_outside_8: The same outside the eight largest.
        singular_values: Descending; empty if they were not computed.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    groups: int
    dtype: str
    finite: bool
    rms_entry: float
    frobenius_norm: float
    spectral_norm: float
    operator_norm: float
    stable_rank: float
    effective_rank: float
    numerical_rank: float
    energy_outside_1: float
    energy_outside_8: float
    singular_values: tuple[float, ...] = field(repr=False)


@dataclass(frozen=True)
class WeightReport(Saved):
    """The spectra of a network's weight matrices.

    Attributes:
        source: Where the weights are from.
        spectra: "full", or "norm" where only the largest singular values were computed.
        matrices: A row per matrix, in the order of the network's parameters.
        left_out: Tensors of two or more dimensions that are not among them, with the reason.
        notes: What a reader has to know.
    """

    source: str
    spectra: str
    matrices: list[MatrixSpectrum]
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, path: str | Path) -> WeightReport:
        """Read a report that :meth:`save` wrote.

        Raises:
            ValueError: If the file is no report, or of another schema.
        """
        try:
            content = read_report(path, cls.schema_version)
            rows = [_without_null(row) for row in content.pop("matrices")]
            lists = ("shape", "singular_values")
            content["matrices"] = [MatrixSpectrum(**{**row, **{key: tuple(row[key]) for key in lists}}) for row in rows]
            return cls(**content)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a weight report: {error!r}") from error

    def __str__(self) -> str:
        """A table with a row per weight matrix, and what was left out."""
        out = io.StringIO()
        Console(file=out, width=_WIDTH, force_terminal=False, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())

    def __rich__(self) -> RenderableType:
        """The table for a rich console, as wide as that is."""
        columns = {
            "|W|_F": "frobenius_norm",
            "|W|_2": "spectral_norm",
            "operator norm": "operator_norm",
            "stable rank": "stable_rank",
            "effective rank": "effective_rank",
            "rank": "numerical_rank",
            "outside 1": "energy_outside_1",
            "outside 8": "energy_outside_8",
        }
        # What no matrix has gets no column.
        columns = {
            title: key for title, key in columns.items() if any(not math.isnan(value) for value in self._values(key))
        }
        table = Table(
            Column("weight", overflow="fold"),
            "kind",
            Column("shape", no_wrap=True),
            *(Column(title, justify="right") for title in columns),
            box=SIMPLE_HEAD,
            show_edge=False,
        )
        table.padding = (0, 1, 0, 0)
        for row in self.matrices:
            values = (_shown(getattr(row, key)) for key in columns.values())
            table.add_row(escape(row.name), row.kind, _shape(row), *values)
        entries = sum(row.groups * row.shape[0] * row.shape[1] for row in self.matrices)
        mean = _mean(self._values("stable_rank"))
        head = f"{self.source}: {len(self.matrices)} matrices, {entries:,} entries, mean stable rank {_shown(mean)}"
        return Group(Text(head), Text(), table, *map(Text, self._remarks()))

    def _values(self, key: str) -> list[float]:
        return [getattr(row, key) for row in self.matrices]

    def _remarks(self) -> list[str]:
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            by_reason.setdefault(reason, []).append(name)
        remarks = [f"Left out: {_listed(names)} ({reason})" for reason, names in by_reason.items()]
        return remarks + [f"Note: {note}" for note in self.notes]

    def plot(self) -> tuple[Figure, tuple[Axes, Axes]]:
        """Singular values of every matrix over the largest, and the stable rank from the first matrix to the last.

        A matrix has one colour in both; a grey mark is the largest stable rank that its shape allows.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        try:
            from matplotlib import colormaps
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("plots need matplotlib: pip install 'lightning-lowrank[examples]'") from error
        count = len(self.matrices)
        # A figure of its own, not pyplot's: nothing global is left behind.
        figure = Figure(figsize=(11, 1.8 + 0.2 * min(max(count, 12), _NAMES)), layout="constrained")
        left, right = figure.subplots(1, 2)
        low, high = _COLOURS
        colours = colormaps["viridis"]([low + (high - low) * i / max(count - 1, 1) for i in range(count)])
        self._draw_spectra(left, colours)
        self._draw_ranks(right, colours)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        return figure, (left, right)

    def _draw_spectra(self, axes: Axes, colours: Any) -> None:
        width = 1.6 if len(self.matrices) <= _NAMES // 2 else 0.8
        for row, colour in zip(self.matrices, colours, strict=True):
            if row.spectral_norm > 0 and row.singular_values:
                places = _spread(len(row.singular_values))
                ratios = [row.singular_values[i] / row.spectral_norm for i in places]
                # A matrix with a single value is a dot, which a line would not show.
                marker = "o" if len(places) == 1 else ""
                axes.plot([i + 1 for i in places], ratios, color=colour, lw=width, marker=marker, ms=3, label=row.name)
        axes.set(xscale="log", yscale="log", xlabel="i", ylabel="σᵢ / σ₁", title="Singular values")
        axes.set_ylim(max(_FLOOR, axes.get_ylim()[0]), 1.5)
        if not axes.lines:
            axes.text(0.5, 0.5, "not computed", transform=axes.transAxes, ha="center", color="grey")

    def _draw_ranks(self, axes: Axes, colours: Any) -> None:
        count = len(self.matrices)
        places = range(count)
        size = 28 if count <= _NAMES else 10
        most = [row.groups * min(row.shape) for row in self.matrices]
        axes.scatter(most, places, marker="|", s=size, color="0.7", label="largest possible")
        axes.scatter(self._values("stable_rank"), places, s=size, color=colours)
        # Some names stand for all where they would overlap, the last one's always among them.
        step = math.ceil(count / _NAMES)
        named = sorted({count - 1 - i for i in range(0, count, step)}) if count else []
        axes.set_yticks(named, [_short(self.matrices[i].name) for i in named], fontsize=7)
        axes.set(xscale="log", xlabel="stable rank", title="Stable rank, first matrix at the top")
        axes.set_ylim(count - 0.5, -0.5)
        axes.set_xlim(left=0.8)
        axes.grid(axis="y", color="0.93", lw=0.6)
        axes.set_axisbelow(True)
        axes.legend(loc="best", fontsize=7, frameon=False)

    def log(self, logger: Any, prefix: str = "weights") -> None:
        """Send the numbers to a logger, or to each of several; what is NaN is left out.

        Args:
            logger: A Lightning logger or a list of them.
            prefix: What the keys begin with: ``<prefix>/<key>/<name>`` of a matrix, ``<prefix>/<key>`` of the means.
        """
        rows = {row.name: {key: v for key, v in asdict(row).items() if isinstance(v, float)} for row in self.matrices}
        values = {f"{key}/{name}": value for name, row in rows.items() for key, value in row.items()}
        values |= {"stable_rank": _mean(self._values("stable_rank"))}
        named = {f"{prefix}/{key}": value for key, value in values.items() if math.isfinite(value)}
        for one in as_list(logger):
            one.log_metrics(named)
            one.save()


def _mean(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.nan


def _shape(row: MatrixSpectrum) -> str:
    size = f"{row.shape[0]} x {row.shape[1]}"
    return size if row.groups == 1 else f"{row.groups} * ({size})"


def _listed(names: list[str], most: int = 3) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _short(name: str, most: int = 44) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _spread(count: int) -> list[int]:
    """All places, or as many as a line needs, evenly along a logarithmic axis."""
    if count <= _POINTS:
        return list(range(count))
    return sorted({round(count ** (i / (_POINTS - 1))) - 1 for i in range(_POINTS)})
