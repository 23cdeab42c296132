"""The view of a module's parameters that every measurement starts from.

Everything that knows about optimizers, wrappers or loss scaling lives here; the formulas see named tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from lightning_lowrank.optimizers import Decay, decay_kind, decay_rate
from lightning_lowrank.sharding import Shard


@dataclass(frozen=True)
class Penalty:
    """What decays the weights of a run, beyond what the optimizer's groups say.

    Attributes:
        weight_decay: Replaces the coefficient of every parameter group; None keeps the groups' own.
        in_loss: Coefficient c of a penalty c/2 |theta|^2 that the user's loss contains. Its gradient c theta is part of
            what backward leaves in ``grad``, so it is subtracted to get the data's.
    """

    weight_decay: float | None = None
    in_loss: float = 0.0

    def coefficient(self, group: Mapping[str, Any]) -> float:
        """The coefficient that the optimizer applies to a group."""
        return float((group.get("weight_decay") or 0.0) if self.weight_decay is None else self.weight_decay)

    def decay(self, optimizer: Optimizer, group: Mapping[str, Any]) -> Decay:
        """How a group's weights are decayed, all in all."""
        kind = decay_kind(optimizer, {**group, "weight_decay": self.coefficient(group)})
        if kind is Decay.UNKNOWN and self.weight_decay is not None:
            return Decay.COUPLED
        # A penalty within the loss has the same stationary points under every optimizer.
        return Decay.COUPLED if kind is Decay.NONE and self.in_loss > 0 else kind

    def rate(self, optimizer: Optimizer, group: Mapping[str, Any]) -> float | Tensor:
        """What one step adds to the cumulative decay; NaN where there is no scalar one."""
        own = {**group, "weight_decay": self.coefficient(group)}
        if self.in_loss == 0:
            return decay_rate(optimizer, own)
        whole = {**own, "weight_decay": own["weight_decay"] + self.in_loss}
        # An optimizer that decays beside the gradient does not treat a penalty within the loss as its own.
        return decay_rate(optimizer, whole) if decay_kind(optimizer, whole) is Decay.COUPLED else math.nan


@dataclass(frozen=True)
class Parameter:
    """One parameter as the optimizer is about to use it.

    Attributes:
        name: The name in the module, without the prefixes that wrappers add.
        value: The parameter, detached; of a sharded one, this process' piece.
        grad: Its gradient, as it is in ``grad``; of the value's shape.
        factor: What ``grad`` has to be multiplied with: -1 under ``maximize=True``, and one over a loss scale that is
            still in it.
        weight_decay: The coefficient of the whole L2 penalty, or the decoupled decay; 0 where there is none.
        in_loss: The part of a penalty that is within the loss, and so in ``grad``.
        decay: How it is decayed.
        rate: What one step adds to the cumulative decay; NaN where there is no scalar one.
        shard: How it is spread over processes.
    """

    name: str
    value: Tensor
    grad: Tensor
    factor: float
    weight_decay: float
    in_loss: float
    decay: Decay
    rate: float | Tensor
    shard: Shard

    def of_data(self, products: Tensor) -> Tensor:
        """<W, W>, <W, G>, <G, G> with the gradient as it is in ``grad``, as those with the data's gradient.

        Args:
            products: Of the parameter or its parts, float64, shape ``(n, 3)``.
        """
        ww, wg, gg = products.unbind(1)
        wg, gg = self.factor * wg, self.factor**2 * gg
        return torch.stack([ww, wg - self.in_loss * ww, gg - 2 * self.in_loss * wg + self.in_loss**2 * ww], 1)

    @property
    def shape(self) -> torch.Size:
        """Of the whole parameter."""
        return self.shard.shape

    @property
    def is_matrix(self) -> bool:
        """Whether spectra speak of it; biases and gains are vectors."""
        return len(self.shape) >= 2

    @property
    def is_whole(self) -> bool:
        """Whether this process holds all of it."""
        return not self.shard.groups


def has_lazy_parameters(module: nn.Module) -> bool:
    """Whether some parameter has no shape before the first forward pass."""
    return any(isinstance(parameter, UninitializedParameter) for parameter in module.parameters())


def optimized_parameters(
    optimizer: Optimizer,
    shards: Mapping[int, Sequence[Shard]],
    *,
    penalty: Penalty = Penalty(),
    loss_scale: float = 1.0,
    gradients: Mapping[int, Tensor] | None = None,
) -> list[Parameter]:
    """The parameters that ``optimizer`` is about to update, in the order of its groups.

    A parameter without a gradient is left out: no torch optimizer updates or decays it.

    Args:
        optimizer: Its gradients are complete: reduced over ranks and accumulated.
        shards: As :func:`lightning_lowrank.sharding.shards` returns them; a parameter that the module does not know is
            ``group<i>.<j>``.
        penalty: What decays the weights beyond what the groups say.
        loss_scale: A factor still in the gradients (fused optimizers under mixed precision).
        gradients: Stand for the parameters' ``grad``, by ``id`` of the parameter.
    """
    view = []
    for i, group in enumerate(optimizer.param_groups):
        decay, coefficient = penalty.decay(optimizer, group), penalty.coefficient(group)
        rate = penalty.rate(optimizer, group)
        factor = (-1.0 if group.get("maximize") else 1.0) / loss_scale
        for j, parameter in enumerate(group["params"]):
            for shard in shards.get(id(parameter)) or [Shard.of_whole(f"group{i}.{j}", parameter)]:
                grad = shard.gradient(parameter) if gradients is None else gradients.get(id(parameter))
                if grad is None:
                    continue
                view.append(
                    Parameter(
                        name=shard.name,
                        value=shard.local(parameter),
                        grad=grad,
                        factor=factor,
                        weight_decay=coefficient + (penalty.in_loss if decay is Decay.COUPLED else 0.0),
                        in_loss=penalty.in_loss,
                        decay=decay,
                        rate=rate,
                        shard=shard,
                    )
                )
    return view
