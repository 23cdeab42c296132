"""CoefficientSweep: what coefficients were tried, and which are best."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from lightning_lowrank._json_report import Saved
from lightning_lowrank.merging.engine import check_coefficients

_STEPS = 12


@dataclass(frozen=True)
class CoefficientSweep(Saved):
    """A metric on every task, by the coefficients of a merge.

    Attributes:
        tasks: Their names.
        metric: Its name.
        minimize: Whether smaller is better.
        candidates: Coefficients that were tried, one number per network.
        values: Per candidate the metric on every task.

    Example:
        >>> tried = [[1.0, 1.0], [0.5, 0.5]]
        >>> sweep = CoefficientSweep(["a", "b"], "joint_accuracy", False, tried, [[0.9, 0.9], [0.7, 0.8]])
        >>> sweep.best
        [1.0, 1.0]
    """

    tasks: list[str]
    metric: str
    minimize: bool
    candidates: list[list[float]]
    values: list[list[float]]

    @property
    def best(self) -> list[float]:
        """The coefficients with the best mean over the tasks; of equals the first."""
        scores = [statistics.fmean(row) for row in self.values]
        return self.candidates[scores.index(min(scores) if self.minimize else max(scores))]

    def add(self, coefficients: Sequence[float], values: Sequence[float]) -> None:
        """Put in one more candidate."""
        self.candidates.append([*coefficients])
        self.values.append([*values])

    def __str__(self) -> str:
        """A row per candidate; the best is marked."""
        columns = [Column(task, justify="right") for task in self.tasks]
        table = Table("coefficients", *columns, Column("mean", justify="right"), "", box=SIMPLE_HEAD, show_edge=False)
        for candidate, row in zip(self.candidates, self.values, strict=True):
            cells = [f"{value:.4g}" for value in (*row, statistics.fmean(row))]
            table.add_row(" ".join(f"{c:g}" for c in candidate), *cells, "best" if candidate == self.best else "")
        out = io.StringIO()
        Console(file=out, width=110, force_terminal=False, color_system=None).print(self.metric, table, sep="\n")
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def candidates_for(candidates: Sequence[Sequence[float]] | None, count: int) -> list[list[float]]:
    """What is tried: the given coefficients, or .1 to 1.2 for every network alike.

    Raises:
        ValueError: If there are none, or one is not a finite number per network.
    """
    if candidates is None:
        return [[step / 10] * count for step in range(1, _STEPS + 1)]
    if not len(candidates):
        raise ValueError("candidates is empty; pass coefficients to try, one number per network each")
    return [check_coefficients(candidate, count) for candidate in candidates]
