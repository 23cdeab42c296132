"""Where the rows of a run go: to every logger, and to W&B with what only it can show."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_lowrank._compat import is_wandb_logger, key_prefix

if TYPE_CHECKING:
    from lightning_lowrank.callbacks._optimizer import LayerRow
    from lightning_lowrank.dashboards.weights_and_biases import Board


class Outlets:
    """Sends rows to the loggers of a run. A logger that fails is told of once, and never ends the run.

    W&B gets tables of layers and spectra beside the rows, with the first, second, fourth, eighth row and so on and at
    the end: each is a file of its own there. With an interval they come once in that many steps instead.

    Args:
        trainer: Its loggers.
        prefix: What the monitor's keys begin with.
        table_interval: Steps between two tables; None doubles the distance each time.
        layers: Gives the rows of the tables.
    """

    def __init__(
        self, trainer: Any, prefix: str, table_interval: int | None, layers: Callable[[], Sequence[LayerRow]]
    ) -> None:
        self._trainer = trainer
        self._interval = table_interval
        self._layers = layers
        self._failed = False
        self._rows = 0
        self._intervals_done = 0
        self._last_step: int | None = None
        self._shown_at: int | None = None
        self.spent_on_tables = 0.0
        self._boards: list[tuple[Any, Board]] = []
        for logger in filter(is_wandb_logger, trainer.loggers) if trainer.is_global_zero else ():
            from lightning_lowrank.dashboards.weights_and_biases import Board

            with self._warning(logger):
                self._boards.append((logger, Board(logger.experiment, prefix, key_prefix(logger))))

    def describe(self, description: Mapping[str, Any]) -> None:
        """Put what the monitor measures, and against what, into the configuration of W&B runs."""
        for logger, board in self._boards:
            with self._warning(logger):
                board.describe(description)

    def send(self, row: Mapping[str, float], step: int) -> None:
        """Send one row."""
        self._rows += 1
        self._last_step = step
        tables = self._tables_due(step)
        for logger in self._trainer.loggers:
            board = next((board for of, board in self._boards if of is logger), None)
            with self._warning(logger):
                logger.log_metrics({**row, **self._tables(board)} if board and tables else dict(row), step=step)
                if board:
                    board.summarise(row)

    def finish(self) -> None:
        """Show the layers as they are at the end, unless the last row had them."""
        if self._last_step is None or self._shown_at == self._last_step:
            return
        for logger, board in self._boards:
            with self._warning(logger):
                logger.log_metrics(self._tables(board), step=self._last_step)

    def _tables(self, board: Board) -> dict[str, Any]:
        start = time.perf_counter()
        tables = board.tables(self._layers())
        self._shown_at = self._last_step
        self.spent_on_tables += time.perf_counter() - start
        return tables

    def _tables_due(self, step: int) -> bool:
        if self._interval is None:
            return self._rows & (self._rows - 1) == 0
        count = (step + 1) // self._interval
        due = count > self._intervals_done or self._rows == 1
        self._intervals_done = count
        return due

    @contextmanager
    def _warning(self, logger: Any) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self._failed:
                rank_zero_warn(f"LowRankMonitor: {type(logger).__name__} could not take a row: {error!r}")
            self._failed = True


def show(
    bar: MutableMapping[str, Any], section: str, pairs: Sequence[tuple[str, str]], values: Mapping[str, float]
) -> None:
    """Put the best pair of values that there is into a progress bar, in place of a lesser one.

    Args:
        bar: What the bar shows.
        section: Of several optimizers, this one's.
        pairs: Keys, the better ones first.
        values: By key; those that are not finite are passed over.
    """
    names = {key: f"{section}/{key}" if section else key for pair in pairs for key in pair}
    for pair in pairs:
        new = {names[key]: values[key] for key in pair if math.isfinite(values.get(key, math.nan))}
        if new or any(names[key] in bar for key in pair):
            for key in names.keys() - set(pair):
                bar.pop(names[key], None)
            bar.update(new)
            return
