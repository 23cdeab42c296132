"""What a W&B run gets beyond scalars: axes, a summary, tables and charts. Imported only where a W&B run is in use."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import wandb

if TYPE_CHECKING:
    from lightning_lowrank.callbacks._optimizer import LayerRow

X_AXIS = "trainer/global_step"
# What a run comes to where it ends well; its best value is the one that came nearest.
_TARGETS = {
    "alignment": 1.0,
    "residual": 0.0,
    "radial_balance": 1.0,
    "norm_spread": 1.0,
    "update_alignment": 1.0,
    "update_residual": 0.0,
}
_SECTION = re.compile(r"optimizer_\d+/")
# W&B draws at most 10,000 rows of a table; this many points show the shape of a spectrum.
_CHART_ROWS = 9_000
_POINTS = 32


class Board:
    """The monitor's part of a W&B run.

    Args:
        run: An active wandb run, started by anyone.
        prefix: What the monitor's keys begin with.
        logger_prefix: What the logger puts in front of every key that it is given.
    """

    def __init__(self, run: Any, prefix: str, logger_prefix: str = "") -> None:
        self._run = run
        self._given = prefix
        self._logger_prefix = logger_prefix
        self._prefix = f"{logger_prefix}{prefix}"
        self._last: dict[str, float] = {}
        self._best: dict[str, float] = {}
        # Lightning defines the x-axis only where it started the W&B run itself.
        run.define_metric(f"{self._prefix}/*", step_metric=X_AXIS)

    def describe(self, description: Mapping[str, Any]) -> None:
        """Put plain data under the prefix into the run's configuration, in place of what was there."""
        self._run.config.update({self._prefix: dict(description)}, allow_val_change=True)

    def summarise(self, row: Mapping[str, float]) -> None:
        """Put the last finite value of every key of a row, and the best of some, into the run's summary.

        W&B's own aggregates do not pass over NaN: one missing value makes "max" and "min" NaN for the rest of the run.
        """
        for key, value in row.items():
            if math.isfinite(value):
                self._see(f"{self._logger_prefix}{key}", value)
        self._run.summary.update(self._last | self._best)

    def _see(self, key: str, value: float) -> None:
        self._last[key] = value
        name = key.removeprefix(f"{self._prefix}/")
        target = _TARGETS.get(_SECTION.sub("", name))
        if target is None:
            return
        best = f"{self._prefix}/best/{name}"
        if best not in self._best:
            # A run that goes on, or an earlier fit with the same logger, has one already.
            before = self._run.summary.get(best)
            self._best[best] = before if isinstance(before, float) and math.isfinite(before) else value
        if abs(value - target) < abs(self._best[best] - target):
            self._best[best] = value

    def tables(self, layers: Sequence[LayerRow]) -> dict[str, Any]:
        """The table of layers, and the chart of the spectra where all singular values are known, for the logger."""
        if not layers:
            return {}
        keys = list(dict.fromkeys(key for layer in layers for key in layer.values))
        rows = [
            [
                layer.name,
                "x".join(map(str, layer.shape)),
                layer.regime.regime.value if layer.regime else None,
                *(_cell(layer.values.get(key)) for key in keys),
                str(layer.regime) if layer.regime else None,
            ]
            for layer in layers
        ]
        columns: list[str | int] = ["layer", "shape", "regime", *keys, "evidence"]
        found: dict[str, Any] = {f"{self._given}/layers": wandb.Table(columns=columns, data=rows)}
        spectra = [layer for layer in layers if layer.singular_values is not None and len(layer.singular_values)]
        if spectra:
            points = max(2, min(_POINTS, _CHART_ROWS // len(spectra)))
            table = wandb.Table(
                columns=["layer", "index", "singular value", "relative"],
                data=[point for layer in spectra for point in _spectrum(layer, points)],
            )
            title = "Singular values, relative to the largest"
            found[f"{self._given}/spectra"] = wandb.plot.line(table, "index", "relative", "layer", title=title)
        return found


def _spectrum(layer: LayerRow, points: int) -> list[list[Any]]:
    """Some singular values of a matrix, closer together where they are larger: name, index from 1, value, ratio."""
    assert layer.singular_values is not None
    values = layer.singular_values.double()
    indices = {round(len(values) ** (point / (points - 1))) for point in range(points)}
    top = float(values[0])
    return [
        [layer.name, index, float(values[index - 1]), float(values[index - 1]) / top if top > 0 else None]
        for index in sorted(indices)
    ]


def _cell(value: float | None) -> float | None:
    """A table's cell: W&B can't sort a column that has NaN."""
    return None if value is None or math.isnan(value) else value
