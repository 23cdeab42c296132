"""Comparing several networks on the same batches: accuracies and how far outputs moved."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Outputs = Callable[[Any, Any], Any]

_TARGET_KEYS = ("labels", "label", "targets", "target", "y")


def default_outputs(module: Any, batch: Any) -> Tensor:
    """A network's outputs on a batch: from ``predict_step`` where the user wrote one, else from ``forward(batch[0])``.

    A ``predict_step`` that fails on the batch or does not return real numbers (class labels, say) is passed over.

    Args:
        module: A LightningModule.
        batch: As the dataloader yields it, on the module's device.

    Raises:
        TypeError: If neither gives a tensor of real numbers; the message says what to pass instead.
    """
    inputs = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
    attempts: list[Callable[[], Any]] = [lambda: module(inputs)] if isinstance(inputs, Tensor) else []
    if overrides(module, "predict_step"):
        attempts.insert(0, lambda: module.predict_step(copy.copy(batch), 0))
    failure: Exception | None = None
    for attempt in attempts:
        try:
            found = as_logits(attempt())
        except Exception as error:  # the user's own code, on a batch that it may not be made for
            failure = error
            continue
        if found is not None:
            return found
    because = f" ({failure})" if failure else ""
    raise TypeError(
        f"neither predict_step nor forward(batch[0]) of {type(module).__name__} gives a tensor of real numbers for a"
        f" batch of type {type(batch).__name__}{because}; pass outputs=lambda module, batch: ... to WeightSumMerger"
    ) from failure


def as_logits(value: Any) -> Tensor | None:
    """The tensor of outputs in what a network returned: itself, or its ``logits``; None if there is none."""
    if isinstance(value, Mapping):
        value = value.get("logits")
    elif not isinstance(value, Tensor):
        value = getattr(value, "logits", None)
    return value if isinstance(value, Tensor) and value.is_floating_point() else None


def overrides(module: Any, method: str) -> bool:
    """Whether the module's class defines the method itself instead of inheriting Lightning's."""
    defined = getattr(type(module), method, None)
    return defined is not None and not defined.__module__.startswith(("lightning.", "pytorch_lightning."))


def targets_of(batch: Any) -> Tensor | None:
    """The class labels in a batch: its second item, or the entry called labels, targets or y; None without."""
    found = None
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in _TARGET_KEYS if key in batch), None)
    elif isinstance(batch, (list, tuple)) and len(batch) >= 2:
        found = batch[1]
    is_labels = isinstance(found, Tensor) and not found.is_floating_point() and not found.is_complex()
    return found if is_labels and found.dtype != torch.bool else None  # type: ignore[union-attr]


class Comparison:
    """Running sums over one task's batches, for every network.

    Accuracies exist for classifiers: outputs with one class dimension more than the integer targets, either last or
    second. Negative targets are passed over, as torch's losses do with ``ignore_index``.

    Args:
        own: The name of the network that was trained on the task.
        classes: The labels that occur in the task.
    """

    def __init__(self, own: str, classes: set[int]) -> None:
        self.own = own
        self.classes = sorted(label for label in classes if label >= 0)
        self._moved: dict[str, float] = {}
        self._there = 0.0
        self._joint: dict[str, int] = {}
        self._masked: dict[str, int] = {}
        self._count = 0
        self._is_classifier = True

    def update(self, outputs: Mapping[str, Tensor], targets: Tensor | None) -> None:
        """Take one batch: every network's outputs on it, and the labels."""
        # On the CPU: not every device has float64.
        own = outputs[self.own].cpu().double()
        self._there += own.square().sum().item()
        labels = None if targets is None else targets.to(own.device)
        axis = None if labels is None else _class_axis(own, labels)
        self._is_classifier &= axis is not None
        if labels is not None and axis is not None:
            valid = labels >= 0
            self._is_classifier &= bool(self.classes) and self.classes[-1] < own.shape[axis]
            self._count += int(valid.sum())
        for name, output in outputs.items():
            self._moved[name] = self._moved.get(name, 0.0) + (output.cpu().double() - own).square().sum().item()
            if labels is None or axis is None or not self._is_classifier:
                continue
            logits = output.cpu().movedim(axis, -1)
            joint = logits.argmax(-1)
            classes = torch.tensor(self.classes, device=logits.device)
            masked = classes[logits[..., classes].argmax(-1)]
            self._joint[name] = self._joint.get(name, 0) + int((joint == labels)[valid].sum())
            self._masked[name] = self._masked.get(name, 0) + int((masked == labels)[valid].sum())

    def metrics(self, name: str) -> dict[str, float]:
        """The network's metrics over all the batches."""
        values = {}
        if self._is_classifier and self._count:
            values["joint_accuracy"] = self._joint[name] / self._count
            values["masked_accuracy"] = self._masked[name] / self._count
        values["output_change"] = math.sqrt(self._moved[name] / self._there) if self._there > 0 else math.nan
        return values


def average_outputs(outputs: Sequence[Any]) -> Any:
    """The mean of what several networks returned: tensors of real numbers averaged, inside containers too.

    Anything else (loss labels, lengths) is the first network's.
    """
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.stack(list(outputs)).mean(0) if first.is_floating_point() or first.is_complex() else first
    if isinstance(first, dict):
        return type(first)(**{key: average_outputs([o[key] for o in outputs]) for key in first})
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        fields = [field.name for field in dataclasses.fields(first) if field.init]
        averaged = {name: average_outputs([getattr(o, name) for o in outputs]) for name in fields}
        return dataclasses.replace(first, **averaged)
    if isinstance(first, (list, tuple)):
        items = [average_outputs(parts) for parts in zip(*outputs, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    return first


class Ensemble:
    """Make a module's ``forward`` return the mean of its own and other networks' outputs.

    The module keeps its steps and metrics, which see the ensemble wherever they call the module itself. ``calls``
    counts
    that: a step that goes around ``forward`` (``self.net(x)``) would measure the module alone.
    """

    def __init__(self, module: nn.Module, others: Sequence[nn.Module]) -> None:
        self.calls = 0
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return average_outputs([own(*args, **kwargs), *(other(*args, **kwargs) for other in others)])

        self._module = module
        module.forward = forward

    def remove(self) -> None:
        """Give the module its own ``forward`` back."""
        del self._module.forward


def _class_axis(outputs: Tensor, targets: Tensor) -> int | None:
    """Which dimension of the outputs counts classes, for targets of this shape; None if none does, or two might."""
    if outputs.ndim != targets.ndim + 1 or outputs.ndim < 2:
        return None
    fits = {axis for axis in (1, outputs.ndim - 1) if outputs.shape[:axis] + outputs.shape[axis + 1 :] == targets.shape}
    # A single logit per sample is a binary classifier or a regression, and has no argmax.
    return next(axis for axis in fits) if len(fits) == 1 and outputs.shape[min(fits)] > 1 else None
