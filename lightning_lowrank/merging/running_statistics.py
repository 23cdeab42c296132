"""Running statistics of a merged network, measured on the tasks' own batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _Moments:
    """Mean and variance per channel of everything that one layer has seen, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None

    def update(self, inputs: Tensor) -> None:
        """Take one batch of shape (samples, channels, ...), by Chan, Golub and LeVeque's formula (1979)."""
        # The moments of one batch are right to float32; what adds up over batches is kept in float64.
        wide = inputs.detach().to(torch.promote_types(inputs.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, [0, *range(2, wide.ndim)], correction=0)
        count = inputs.numel() // inputs.shape[1]
        mean, squares = mean.cpu().double(), variance.cpu().double() * count
        if self.mean is None or self.squares is None:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total, gap = self.count + count, mean - self.mean
        self.squares = self.squares + squares + gap.square() * (self.count * count / total)
        self.mean = self.mean + gap * (count / total)
        self.count = total


def batch_norms(module: nn.Module) -> dict[str, _BatchNorm]:
    """The batch normalisations of a module that have running statistics, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None
    }


def reestimate(module: nn.Module, passes: Sequence[Callable[[], Any]]) -> list[str]:
    """Set the running statistics of all batch normalisations to the moments of what they see.

    While the passes run, the layers normalise by the moments of the batch at hand, as in training; everything else
    stays in the mode that the passes set. So a pass should mix all tasks in its batches, see :func:`mixed`: in batches
    of one task alone the deeper layers would see inputs that are normalised by that task's moments, which the network
    will not use later. Of several passes the moments count alike: the variance is the mean of theirs plus that of their
    means. Parameters, counters, modes and momenta stay as they are, also after an exception.

    Args:
        module: The network.
        passes: Each runs the network over batches.

    Returns:
        Names of layers that keep their statistics: those that saw nothing, one value per channel, or values whose
        moments are not finite in the layer's type.

    Example:
        >>> layer = nn.BatchNorm1d(2).eval()
        >>> batch = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
        >>> reestimate(layer, [lambda: layer(batch)])
        []
        >>> layer.running_mean.tolist(), layer.running_var.tolist()
        ([2.0, 5.0], [1.0, 0.0])
    """
    layers = batch_norms(module)
    found: dict[str, list[_Moments]] = {name: [] for name in layers}
    for run in passes:
        moments = {name: _Moments() for name in layers}
        with ExitStack() as stack:
            for name, layer in layers.items():
                stack.enter_context(_recording(layer, moments[name]))
            run()
        for name, seen in moments.items():
            if seen.count > 1:
                found[name].append(seen)
    with torch.no_grad():
        return [name for name, layer in layers.items() if not (found[name] and _set(layer, found[name]))]


def mixed(loaders: Sequence[Iterable[Any]]) -> Iterable[Any]:
    """Batches that hold one batch of every task, until all tasks have been gone through; shorter ones begin again.

    Every task has the same weight in every batch: the samples of a smaller batch are repeated to the size of the
    largest.

    Args:
        loaders: Batches of every task: tensors, or tuples, lists, dicts and dataclasses of them.

    Raises:
        ValueError: If the first batches can't be joined: other structures, or shapes that differ beyond the first
            dimension.

    Example:
        >>> ones, twos = torch.ones(1, 2), torch.full((2, 2), 2.0)
        >>> [batch["x"].shape for batch in mixed([[{"x": ones}, {"x": ones}], [{"x": twos}]])]
        [torch.Size([4, 2]), torch.Size([4, 2])]
    """
    first = [next(iter(loader), None) for loader in loaders]
    try:
        _joined(first)
    except (RuntimeError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"the tasks' batches can't be joined: {error}") from error
    return _Mixed(loaders)


class _Mixed:
    def __init__(self, loaders: Sequence[Iterable[Any]]) -> None:
        self._loaders = loaders

    def __iter__(self) -> Iterator[Any]:
        iterators = [iter(loader) for loader in self._loaders]
        ended: set[int] = set()
        while True:
            batches = []
            for index, loader in enumerate(self._loaders):
                batch = next(iterators[index], None)
                if batch is None:
                    ended.add(index)
                    iterators[index] = iter(loader)
                    batch = next(iterators[index], None)
                batches.append(batch)
            if len(ended) == len(iterators):
                return
            yield _joined(batches)


def _joined(batches: Sequence[Any]) -> Any:
    """Several batches as one: tensors along their first dimension, inside containers too."""
    first = batches[0]
    if isinstance(first, Tensor):
        longest = max(len(batch) for batch in batches) if first.ndim else 0
        repeated = [batch[torch.arange(longest, device=batch.device) % len(batch)] for batch in batches if longest]
        return torch.cat(repeated) if longest else first
    if isinstance(first, Mapping):
        return type(first)(**{str(key): _joined([batch[key] for batch in batches]) for key in first})
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first) if field.init]
        return dataclasses.replace(first, **{name: _joined([getattr(b, name) for b in batches]) for name in names})
    if isinstance(first, (list, tuple)):
        if not any(isinstance(item, (Tensor, Mapping, list, tuple)) for item in first):
            longest = max(map(len, batches))
            return type(first)(batch[i % len(batch)] for batch in batches for i in range(longest))
        items = [_joined(parts) for parts in zip(*batches, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    if first is None:
        raise TypeError("a task yields no batch")
    return first


@contextmanager
def _recording(layer: _BatchNorm, moments: _Moments) -> Iterator[None]:
    """The layer normalises by the batch at hand and tells its moments; its own statistics stay as they are."""
    momentum, tracked = layer.momentum, layer.num_batches_tracked
    kept = None if tracked is None else tracked.clone()
    training = layer.training

    def before(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal training
        training = layer.training
        inputs = arguments[0] if arguments else named["input"]
        if inputs.numel() > inputs.shape[1]:
            moments.update(inputs)
            # torch has no way to use a batch's moments that leaves the running ones alone, but a momentum of 0.
            layer.training, layer.momentum = True, 0.0

    def after(*_: Any) -> None:
        layer.training, layer.momentum = training, momentum

    hooks = [
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(after, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        if kept is not None and layer.num_batches_tracked is not None:
            layer.num_batches_tracked.copy_(kept.to(layer.num_batches_tracked.device))


def _set(layer: _BatchNorm, passes: Sequence[_Moments]) -> bool:
    """Give a layer its new statistics; whether they are finite in its type."""
    means = torch.stack([seen.mean for seen in passes if seen.mean is not None])
    within = torch.stack([seen.squares / seen.count for seen in passes if seen.squares is not None]).mean(0)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    mean = means.mean(0).to(layer.running_mean)
    variance = (within + means.var(0, correction=0)).to(layer.running_var)
    finite = bool(torch.isfinite(mean).all() and torch.isfinite(variance).all())
    if finite:
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)
    return finite
