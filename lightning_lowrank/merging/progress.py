"""The progress bar of an evaluation."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from lightning_lowrank._compat import Callback


class PassBar(Callback):
    """One bar for all passes that a Trainer takes over tasks' batches; it leaves nothing behind.

    Args:
        shown: Whether there is a bar; None shows one where standard error is a terminal or a notebook, on rank zero.
    """

    def __init__(self, shown: bool | None) -> None:
        super().__init__()
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        if shown is None:
            # Without ipywidgets rich warns in a notebook and shows nothing.
            in_notebook = console.is_jupyter and find_spec("ipywidgets") is not None
            shown = (sys.stderr.isatty() or in_notebook) and getattr(rank_zero_only, "rank", 0) == 0
        self._progress = Progress(
            *columns,
            console=console,
            transient=True,
            disable=not shown,
            # What user code prints into a file or a pipe stays what it is.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        self._task = self._progress.add_task("", total=0)
        self._passes = 0
        self._done = 0
        self._share = 0.0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bar within this context."""
        with self._progress:
            yield

    def expect(self, passes: int) -> None:
        """So many passes more are coming."""
        self._passes += passes
        self._progress.update(self._task, total=self._passes)

    def describe(self, what: str) -> None:
        """Say what the next pass is for."""
        self._progress.update(self._task, description=what)

    def _begin(self, batches: list[float]) -> None:
        # A stream does not say how long it is: its bar moves when its pass is done.
        self._share = 1 / total if 0 < (total := sum(batches)) < math.inf else 0.0

    def _batch(self) -> None:
        self._progress.advance(self._task, self._share)

    def _end(self) -> None:
        self._done += 1
        self._progress.update(self._task, completed=self._done)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """A pass begins."""
        self._begin(trainer.num_test_batches)

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """One batch is done."""
        self._batch()

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """The pass is done."""
        self._end()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """A pass begins."""
        self._begin(trainer.num_val_batches)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """One batch is done."""
        self._batch()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """The pass is done."""
        self._end()
