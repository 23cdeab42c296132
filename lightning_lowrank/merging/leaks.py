"""How much a merge changes each layer's pre-activations on a task, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


class LeakMeter:
    """The leak of every linear and convolutional layer: |(W_merged - W_own) h| / |W_own h| over a task's batches.

    h is what the layer gets within the network that was trained on the task. For a plain sum of two networks W_merged -
    W_own is the other network's weight, and this is :func:`lightning_lowrank.functional.leak`. Layers that a network
    does not call as modules (the projections within ``nn.MultiheadAttention``) are not seen.

    Args:
        own: The network of the task.
        merged: The merged network, on the same device by the time that batches are run.
    """

    def __init__(self, own: nn.Module, merged: nn.Module) -> None:
        others = dict(merged.named_modules())
        self._pairs = {
            name: (layer, others[name])
            for name, layer in own.named_modules()
            if _operation(layer) is not None and _operation(others.get(name)) is not None
        }
        # Sums of squares by layer, of those that were run.
        self._moved: dict[str, float] = {}
        self._there: dict[str, float] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measure what the network of the task is run on within this context."""
        handles = [
            layer.register_forward_pre_hook(partial(self._see, name)) for name, (layer, _) in self._pairs.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def result(self) -> dict[str, float]:
        """The leak by parameter name; NaN where the own weight maps every input to 0. Only layers that were run."""
        return {
            f"{name}.weight" if name else "weight": math.sqrt(self._moved[name] / there) if there > 0 else math.nan
            for name, there in self._there.items()
        }

    @torch.no_grad()
    def _see(self, name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        own, other = (found.weight.detach() for found in self._pairs[name])
        if not args or not isinstance(args[0], Tensor) or own.shape != other.shape:
            return
        with torch.autocast(args[0].device.type, enabled=False):
            inputs = args[0].to(torch.promote_types(args[0].dtype, torch.float32))
            apply = _operation(layer)
            assert apply is not None
            there, moved = (apply(inputs, w.to(inputs)) for w in (own, other.to(inputs) - own.to(inputs)))
            self._there[name] = self._there.get(name, 0.0) + _square(there)
            self._moved[name] = self._moved.get(name, 0.0) + _square(moved)


def _operation(layer: Any) -> Callable[[Tensor, Tensor], Tensor] | None:
    """What a layer does with inputs and a weight, without its bias; None for layers of other kinds."""
    if isinstance(layer, nn.Linear):
        return nn.functional.linear
    if isinstance(layer, _ConvNd) and not isinstance(layer, _ConvTransposeNd):
        forward: Any = layer._conv_forward
        return lambda inputs, weight: forward(inputs, weight, None)
    return None


def _square(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values)) ** 2
