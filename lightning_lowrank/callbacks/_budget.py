"""How much of a run's time its spectra may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# What is left to spectra where the monitor's other measurements take the whole share: they grow older, but never stop.
_AT_LEAST = 0.25
# Seconds that are free: a run of a few seconds should have its spectra too.
_FREE = 0.1


class Budget:
    """Says whether there is time for one more spectrum.

    All of the monitor's time counts against the share. What spectra may take is what the rest of it leaves, or a
    quarter of the share where that is more.

    Args:
        share: Of the run's wall time.
        agree: Makes one answer of those of all processes, whose clocks differ.

    Attributes:
        spent: Seconds that spectra took so far.
        spent_elsewhere: Seconds that the monitor's other measurements took.
    """

    def __init__(self, share: float, agree: Callable[[bool], bool]) -> None:
        self._share = share
        self._agree = agree
        self._started = time.perf_counter()
        self.spent = 0.0
        self.spent_elsewhere = 0.0

    def allows(self) -> bool:
        """Whether one more may be begun; a collective where several processes train."""
        allowed = self._share * (time.perf_counter() - self._started)
        left = max(allowed - self.spent_elsewhere, _AT_LEAST * allowed) + _FREE - self.spent
        return self._agree(left > 0)

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Count the time within."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.spent += time.perf_counter() - start
