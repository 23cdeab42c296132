"""The cumulative decay of a run: how much of the initialisation weight decay has erased."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_lowrank.parameters import Penalty


class DecayClock:
    """Adds up lr * wd / (1 - momentum) over one optimizer's steps, for each of its parameter groups.

    exp(-tau) of a weight's initial value is left after the cumulative decay tau. Where groups decay at different rates
    the smallest tau counts: all decayed weights are at least that far.

    Args:
        optimizer: Whose steps are counted.
        penalty: What decays the weights beyond what the optimizer's groups say.
    """

    def __init__(self, optimizer: Optimizer, penalty: Penalty) -> None:
        self._optimizer = optimizer
        self._penalty = penalty
        self._taus: list[float | Tensor] = []
        self._before: list[float | Tensor] = []

    def advance(self) -> None:
        """Count the step that is about to be taken; a group without any gradient is not decayed by torch."""
        self._before = list(self._taus)
        groups = self._optimizer.param_groups
        self._taus += [0.0] * (len(groups) - len(self._taus))
        for index, group in enumerate(groups):
            if any(p.grad is not None for p in group["params"]):
                self._taus[index] = self._taus[index] + self._penalty.rate(self._optimizer, group)

    def take_back(self) -> None:
        """The last step was not taken after all (an overflow in mixed precision)."""
        self._taus = self._before

    def forget(self) -> None:
        """The steps before now are not known."""
        self._taus = [math.nan] * len(self._optimizer.param_groups)

    def rate(self) -> float:
        """The smallest increment per step at present, over the groups that decay; NaN if none does."""
        rates = [float(self._penalty.rate(self._optimizer, group)) for group in self._optimizer.param_groups]
        return _smallest(rates)

    def tau(self) -> float:
        """The cumulative decay so far; 0 without decay, NaN where an optimizer has no scalar one."""
        taus = [float(tau) for tau in self._taus]
        return 0.0 if all(tau == 0 for tau in taus) else _smallest(taus)

    def steps_left(self, share: float) -> float:
        """Steps until the share of the initialisation that is left has fallen to ``share``, at the present rate."""
        rate = self.rate()
        steps = (math.log(1 / share) - self.tau()) / rate if rate > 0 else math.nan
        return steps if math.isnan(steps) else max(0.0, steps)

    def state_dict(self) -> dict[str, Any]:
        """The sums so far."""
        return {"taus": [float(tau) for tau in self._taus]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from an earlier run's sums."""
        self._taus = list(state["taus"])


def _smallest(values: list[float]) -> float:
    """The smallest positive value; NaN if there is none, or one is NaN."""
    if any(math.isnan(value) for value in values):
        return math.nan
    return min((value for value in values if value > 0), default=math.nan)
