"""WeightSumMerger: merge trained modules and see how the result does on all their tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from torch import nn

from lightning_lowrank._compat import LightningModule, Trainer
from lightning_lowrank.functional.start import shared_start
from lightning_lowrank.merging.card import differences
from lightning_lowrank.merging.comparison import Outputs, default_outputs
from lightning_lowrank.merging.engine import Merge, check_coefficients
from lightning_lowrank.merging.leaks import LeakMeter
from lightning_lowrank.merging.modules import copy_module, merge_with_heads, with_trunk
from lightning_lowrank.merging.policy import MergePolicy, some
from lightning_lowrank.merging.report import MergeReport
from lightning_lowrank.merging.running_statistics import batch_norms, mixed, reestimate
from lightning_lowrank.merging.runs import STEPS, Runs, checked_tasks
from lightning_lowrank.merging.sweep import CoefficientSweep, candidates_for

M = TypeVar("M", bound=nn.Module)
Models = dict[str, Any]

# What a shared start without a base means.
_DOUBLED = "the sum counts what they started from once per network; pass it as base="


class WeightSumMerger:
    """Merge trained LightningModules by summing their weights, and evaluate the result on all their tasks.

    Args:
        trainer: A Trainer whose device, precision and batch limits the evaluation uses. Its callbacks and loggers are
            left alone: the evaluation runs in a Trainer of its own. None lets Lightning choose a device.
        base: The networks' common start, see :func:`merge_modules`.
        coefficients: One number per network, see :func:`merge_modules`.
        policy: Other rules for some tensors, see :class:`MergePolicy`.
        heads: ``{"task": pattern}``, one per network and in their order: glob patterns of the tensors that are a
            task's own head. They are kept from that task's network, and the rest, the trunk, is merged. Heads may have
            different shapes and names.
        outputs: ``outputs(module, batch)`` returns the network's outputs for a batch, shape ``(batch, ...)``, where
            ``predict_step`` or ``forward(batch[0])`` does not.
        progress: Whether evaluations show a progress bar; None shows one in terminals and notebooks.

    Example:
        >>> merger = WeightSumMerger(coefficients=[0.5, 0.5])
        >>> import torch
        >>> one, two = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> torch.allclose(merger.merge(one, two).bias, (one.bias + two.bias) / 2)
        True
    """

    def __init__(
        self,
        trainer: Trainer | None = None,
        *,
        base: nn.Module | None = None,
        coefficients: Sequence[float] | None = None,
        policy: MergePolicy | None = None,
        heads: Mapping[str, str] | None = None,
        outputs: Outputs | None = None,
        progress: bool | None = None,
    ) -> None:
        if trainer is not None and not hasattr(trainer, "strategy"):
            raise TypeError(f"trainer must be a Lightning Trainer or None, got {type(trainer).__name__}")
        if heads is not None and not isinstance(heads, Mapping):
            raise TypeError(f'heads must be {{"task": pattern}}, one per network, got {heads!r}')
        if coefficients is not None:
            coefficients = check_coefficients(coefficients, max(2, len(coefficients)))
        self.trainer = trainer
        self.base = base
        self.coefficients = coefficients
        self.policy = policy or MergePolicy()
        self.heads = None if heads is None else dict(heads)
        self.outputs = outputs or default_outputs
        self.progress = progress

    def merge(self, m1: M, m2: nn.Module, *more: nn.Module, task: str | None = None) -> M:
        """The merged module, see :func:`merge_modules`.

        With ``heads`` each head tensor is that of its task's network. Where two tasks' heads have the same names, one
        module can hold only one of them: that of ``task``.

        Args:
            m1: The first network.
            m2: The second.
            more: Further networks.
            task: With ``heads``: the task whose network the result is a copy of; the first one's by default.
        """
        merged: M = self._merge((m1, m2, *more), task, self.coefficients)[0]
        return merged

    def evaluate(
        self,
        m1: LightningModule,
        m2: LightningModule,
        dataloaders: Any,
        *,
        more: Sequence[LightningModule] = (),
    ) -> MergeReport:
        """Run the originals, their sum, their average and their logit ensemble on every task.

        Each runs its own ``test_step`` (or ``validation_step`` where there is no test step), so the report has the
        modules' own metrics, named ``<task>/<model>/<metric>``. Added are, per task and model:

        - ``joint_accuracy`` and ``masked_accuracy`` for classifiers: the argmax over all classes, and over the classes
          that occur in the task's dataloader;
        - ``output_change``: |f_model - f_own| / |f_own|, Frobenius norms over all the task's outputs, f_own the network
          that was trained on the task.

        ``leak`` has by task and layer what the sum adds to a layer's pre-activations, relative to what was there.

        Where there are batch normalisations, two more models are the sum with other running statistics: "sum_pooled"
        with the networks' moments pooled, "sum_reestimated" with the merged network's own, from the tasks' batches.
        With ``heads`` every model wears the head of the task that it runs on.

        Args:
            m1: The network of the first task.
            m2: The network of the second task.
            dataloaders: ``{"task name": dataloader}``, one per network and in their order; or a list of dataloaders.
            more: Further networks.

        Raises:
            MergeError: If the networks can't be merged.
            TypeError: If a module is no LightningModule with a test or validation step.
            ValueError: If there is not one dataloader per network that can be gone through more than once, or one is
                empty.
        """
        modules = (m1, m2, *more)
        tasks = self._tasks(dataloaders, len(modules))
        runs = Runs(modules, self.trainer, self.outputs, self.progress)
        originals = [f"m{number}" for number in range(1, len(modules) + 1)]
        settings = self._settings(modules, runs)
        metrics: dict[str, float] = {}
        leak: dict[str, dict[str, float]] = {}
        names: list[str] = []
        notes: list[str] = []
        models: Models | None = None
        with runs.bar.shown():
            for (task, loader), own in zip(tasks.items(), originals, strict=True):
                first = models is None
                if models is None or self.heads:
                    models, merge = self._models(modules, task)
                    runs.bar.expect(len(tasks) * (len(models) + 1) if first else 0)
                    if self.heads and batch_norms(models["sum"]):
                        notes.append("no sum_reestimated: with heads, no one network runs on all the tasks' batches")
                    if "sum_reestimated" in models:
                        notes += _reestimate(models["sum_reestimated"], runs, tasks)
                leaks = LeakMeter(models[own], models["sum"])
                found, said = runs.measure(task, loader, models, own, originals, leaks)
                leak[task] = leaks.result()
                names = list(found)
                of_task = dict.fromkeys(metric for values in found.values() for metric in values)
                metrics |= {
                    f"{task}/{model}/{name}": found[model].get(name, math.nan) for model in found for name in of_task
                }
                notes += said
        notes += self._said(settings, modules, merge)
        owners = dict(zip(tasks, originals, strict=True))
        return MergeReport(owners, names, metrics, list(dict.fromkeys(notes)), settings, leak=leak)

    def sweep(
        self,
        m1: LightningModule,
        m2: LightningModule,
        dataloaders: Any,
        *,
        more: Sequence[LightningModule] = (),
        candidates: Sequence[Sequence[float]] | None = None,
        metric: str = "joint_accuracy",
        minimize: bool = False,
    ) -> CoefficientSweep:
        """Try coefficients, and choose those with the best mean of a metric over the tasks.

        Choose on held-out data: not what the networks were trained on, and not what the result is judged by.

        Args:
            m1: The network of the first task.
            m2: The network of the second task.
            dataloaders: As for :meth:`evaluate`.
            more: Further networks.
            candidates: Coefficients to try, one number per network each; by default .1 to 1.2 in steps of .1, the same
                for every network.
            metric: A metric of :meth:`evaluate`.
            minimize: Whether smaller is better, as of a loss.

        Raises:
            ValueError: If no model has such a metric, or candidates are not one finite number per network.
        """
        modules = (m1, m2, *more)
        tasks = self._tasks(dataloaders, len(modules))
        runs = Runs(modules, self.trainer, self.outputs, self.progress)
        originals = [f"m{number}" for number in range(1, len(modules) + 1)]
        sweep = CoefficientSweep(list(tasks), metric, minimize, [], [])
        tried = candidates_for(candidates, len(modules))
        runs.bar.expect(2 * len(tried) * len(tasks))
        with runs.bar.shown():
            for coefficients in tried:
                values = []
                for (task, loader), own, module in zip(tasks.items(), originals, modules, strict=True):
                    merged, _ = self._merge(modules, task if self.heads else None, coefficients)
                    found, _ = runs.measure(task, loader, {own: copy_module(module), "sum": merged}, own)
                    if metric not in found["sum"]:
                        raise ValueError(f"no metric {metric!r} on task {task!r}; there are: {', '.join(found['sum'])}")
                    values.append(found["sum"][metric])
                sweep.add(coefficients, values)
        return sweep

    def reestimate(self, merged: M, dataloaders: Any) -> M:
        """A copy of a merged module with the running statistics of its normalisations measured on all tasks.

        This is the model that :meth:`evaluate` calls "sum_reestimated".

        Args:
            merged: A merged LightningModule.
            dataloaders: As for :meth:`evaluate`; labels are not used.
        """
        copied = copy_module(merged)
        count = len(dataloaders) if hasattr(dataloaders, "__len__") else 0
        tasks = checked_tasks(dataloaders, count)
        runs = Runs([copied], self.trainer, self.outputs, self.progress)
        with runs.bar.shown():
            _reestimate(copied, runs, tasks)
        copied._trainer = None  # type: ignore[assignment]
        return copied

    def _merge(
        self, modules: Sequence[Any], task: str | None, coefficients: Sequence[float] | None, policy: Any = None
    ) -> tuple[Any, Merge]:
        """A copy of the task's network with merged tensors."""
        order = [*range(len(modules))]
        patterns = self._patterns(len(modules))
        if task is not None:
            if self.heads is None or task not in self.heads:
                raise ValueError(f"task {task!r} has no head; heads are {self.heads}")
            order.insert(0, order.pop([*self.heads].index(task)))
        weights = check_coefficients(coefficients, len(modules))
        return merge_with_heads(
            [modules[i] for i in order],
            self.base,
            [weights[i] for i in order],
            policy or self.policy,
            [patterns[i] for i in order],
            [f"model {i + 1}" for i in order],
        )

    def _patterns(self, count: int) -> list[str | None]:
        if self.heads is None:
            return [None] * count
        if len(self.heads) != count:
            raise ValueError(f"heads must have one pattern per network, {count}, got {self.heads}")
        return [*self.heads.values()]

    def _tasks(self, dataloaders: Any, count: int) -> dict[str, Any]:
        tasks = checked_tasks(dataloaders, count)
        if self.heads is not None and [*tasks] != [*self.heads]:
            raise ValueError(f"tasks and heads must have the same names in the same order: {[*tasks]}, {[*self.heads]}")
        return tasks

    def _models(self, modules: Sequence[Any], task: str) -> tuple[Models, Merge]:
        """Everything that is compared on a task; without heads it is the same for every task."""
        wanted = task if self.heads else None
        count = len(modules)
        if self.heads:
            index = [*self.heads].index(task)
            pattern = self.heads[task]
            originals = [with_trunk(modules[index], other, pattern) for other in modules]
        else:
            originals = [copy_module(module) for module in modules]
        models: Models = {f"m{number}": original for number, original in enumerate(originals, 1)}
        models["sum"], merge = self._merge(modules, wanted, self.coefficients)
        statistics = {entry.rule for entry in merge.plan.entries if entry.kind == "statistic"}
        if "mean" in statistics:
            models["sum_pooled"] = self._merge(modules, wanted, self.coefficients, self.policy.with_pooled())[0]
        if batch_norms(models["sum"]) and not self.heads:
            models["sum_reestimated"] = copy_module(models["sum"])
        models["average"] = self._merge(modules, wanted, [1 / count] * count)[0]
        return models, merge

    def _settings(self, modules: Sequence[Any], runs: Runs) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "module": type(modules[0]).__name__,
            "coefficients": check_coefficients(self.coefficients, len(modules)),
            "base": self.base is not None,
            "step": STEPS[runs.stage],
        }
        if repr(self.policy) != repr(MergePolicy()):
            settings["policy"] = repr(self.policy)
        return settings | ({"heads": self.heads} if self.heads else {})

    def _said(self, settings: dict[str, Any], modules: Sequence[Any], merge: Merge) -> list[str]:
        """What a reader has to know about the networks; settings get it as data."""
        notes = []
        start = shared_start(merge.matrices())
        settings["start"] = start.verdict
        if start.verdict == "shared" and self.base is None:
            notes.append(f"{start}; {_DOUBLED}")
        if differing := differences([getattr(module, "hparams", None) for module in modules]):
            settings["hyper_parameters"] = differing
            notes.append(f"hyperparameters that differ: {', '.join(differing)}")
        if merge.discarded:
            settings["discarded"] = dict(merge.discarded)
        return notes + merge.truncations()


def _reestimate(model: Any, runs: Runs, tasks: Mapping[str, Any]) -> list[str]:
    """Measure running statistics on all tasks; what could not be measured as it should be is returned."""
    notes = []
    loaders = [*tasks.values()]
    try:
        loaders = [mixed(loaders)]
    except ValueError as error:
        notes.append(f"running statistics were re-estimated on one task after the other: {error}")
    if unseen := reestimate(model, [partial(runs.pass_over, model, loader) for loader in loaders]):
        notes.append(
            f"{some(unseen)}: saw no batch of two finite values per channel, so running statistics stay as merged"
        )
    return notes
