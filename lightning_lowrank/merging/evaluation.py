"""WeightSumMerger: merge two trained modules and see how the result does on both tasks."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lowrank._compat import Callback, LightningModule, Trainer, namespace_of, quiet
from lightning_lowrank.merging.comparison import (
    Comparison,
    Ensemble,
    Outputs,
    as_logits,
    average_outputs,
    default_outputs,
    overrides,
    targets_of,
)
from lightning_lowrank.merging.modules import check_coefficients, copy_module, merge_modules
from lightning_lowrank.merging.report import MergeReport

M = TypeVar("M", bound=LightningModule)

ORIGINALS = ("m1", "m2")
MODELS = (*ORIGINALS, "sum", "average", "ensemble")
_STEPS = {"test": "test_step", "validate": "validation_step"}


class WeightSumMerger:
    """Merge two trained LightningModules by summing their weights, and evaluate the result on both tasks.

    Args:
        trainer: A Trainer whose device, precision and batch limits the evaluation uses. Its callbacks and loggers are
            left
            alone: the evaluation runs in a Trainer of its own. None lets Lightning choose a device.
        base: The networks' common start, see :func:`merge_modules`.
        coefficients: One number per network, see :func:`merge_modules`.
        outputs: ``outputs(module, batch)`` returns the network's outputs for a batch, shape ``(batch, ...)``, where
            ``predict_step`` or ``forward(batch[0])`` does not.

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
        outputs: Outputs | None = None,
    ) -> None:
        if trainer is not None and not hasattr(trainer, "strategy"):
            raise TypeError(f"trainer must be a Lightning Trainer or None, got {type(trainer).__name__}")
        self.trainer = trainer
        self.base = base
        self.coefficients = check_coefficients(coefficients, len(ORIGINALS))
        self.outputs = outputs or default_outputs

    def merge(self, m1: M, m2: nn.Module) -> M:
        """The merged module, see :func:`merge_modules`."""
        return merge_modules(m1, m2, base=self.base, coefficients=self.coefficients)

    def evaluate(self, m1: LightningModule, m2: LightningModule, dataloaders: Any) -> MergeReport:
        """Run both originals, their sum, their average and their logit ensemble on both tasks.

        Each runs its own ``test_step`` (or ``validation_step`` where there is no test step), so the report has the
        modules' own metrics, named ``<task>/<model>/<metric>``. Added are, per task and model:

        - ``joint_accuracy`` and ``masked_accuracy`` for classifiers: the argmax over all classes, and over the classes
          that occur in the task's dataloader;
        - ``output_change``: |f_model - f_own| / |f_own|, Frobenius norms over all the task's outputs, f_own the network
        that
          was trained on the task.

        Args:
            m1: The network of the first task.
            m2: The network of the second task.
            dataloaders: ``{"task name": dataloader}`` for two tasks, the first is m1's; or a pair of dataloaders.

        Raises:
            MergeError: If the networks can't be merged.
            TypeError: If a module is no LightningModule with a test or validation step.
            ValueError: If there are not two dataloaders that can be gone through more than once, or one is empty.
        """
        tasks = _two_tasks(dataloaders)
        namespace = namespace_of(m1)
        if namespace is None or namespace_of(m2) is not namespace:
            raise TypeError(
                f"evaluate needs two LightningModules of one Lightning package, got {type(m1).__name__} and"
                f" {type(m2).__name__}"
            )
        stage = next((stage for stage, step in _STEPS.items() if overrides(m1, step) and overrides(m2, step)), None)
        if stage is None:
            raise TypeError(
                f"{type(m1).__name__} and {type(m2).__name__} need a test_step or a validation_step to be evaluated"
            )
        models = {
            "m1": copy_module(m1),
            "m2": copy_module(m2),
            "sum": self.merge(m1, m2),
            "average": merge_modules(m1, m2, base=self.base, coefficients=[0.5, 0.5]),
        }
        partner = copy_module(m2)
        ensemble_module = copy_module(m1)
        ensemble = Ensemble(ensemble_module, [partner])
        recorder = _Recorder(models, self.outputs)
        trainer = self._evaluation_trainer(namespace, recorder, stage)
        report = MergeReport(
            tasks=dict(zip(tasks, ORIGINALS, strict=True)),
            models=list(MODELS),
            metrics={},
            settings={
                "module": type(m1).__name__,
                "coefficients": self.coefficients,
                "base": self.base is not None,
                "step": _STEPS[stage],
            },
        )
        with quiet():
            for (task, loader), own in zip(tasks.items(), ORIGINALS, strict=True):
                recorder.collect_classes()
                logged = {own: _run(trainer, models[own], loader, stage)}
                if recorder.batches == 0:
                    raise ValueError(f"the dataloader of task {task!r} yields no batch")
                recorder.compare(own)
                for name in (name for name in models if name != own):
                    logged[name] = _run(trainer, models[name], loader, stage)
                    recorder.rest()
                _place(partner, trainer)
                ensemble.calls = 0
                logged["ensemble"] = _run(trainer, ensemble_module, loader, stage)
                if ensemble.calls == 0:
                    logged["ensemble"] = {}
                    _note(
                        report,
                        f"{_STEPS[stage]} of {type(m1).__name__} does not call the module itself, so its own metrics"
                        " do not exist for the ensemble",
                    )
                # A module's own metric keeps its name where one of ours is called the same.
                found = {name: {**logged[name], **(recorder.metrics(name) | logged[name])} for name in MODELS}
                names = dict.fromkeys(metric for values in found.values() for metric in values)
                report.metrics.update(
                    {f"{task}/{model}/{name}": found[model].get(name, math.nan) for model in MODELS for name in names}
                )
                if recorder.problem:
                    _note(report, recorder.problem)
        return report

    def _evaluation_trainer(self, namespace: Any, recorder: Callback, stage: str) -> Any:
        """A Trainer on one device, like the user's where there is one, that logs and saves nothing."""
        options: dict[str, Any] = {"accelerator": "auto", "devices": 1}
        if self.trainer is not None:
            device = self.trainer.strategy.root_device
            limit = {"test": "limit_test_batches", "validate": "limit_val_batches"}[stage]
            options = {
                "accelerator": {"cuda": "gpu"}.get(device.type, device.type),
                "devices": [device.index or 0] if device.type == "cuda" else 1,
                "precision": self.trainer.precision,
                "inference_mode": self.trainer.test_loop.inference_mode,
                "default_root_dir": self.trainer.default_root_dir,
                limit: getattr(self.trainer, limit),
            }
        with quiet():
            return namespace.Trainer(
                **options,
                callbacks=[recorder],
                # Steps that log pictures or tables by themselves find a logger that takes all and keeps nothing.
                logger=namespace.loggers.logger.DummyLogger(),
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )


class _Recorder(Callback):
    """Sees each batch before the running module does: first to collect a task's classes, then to compare all models.

    They all run on the very same batch, so a shuffling or augmenting dataloader changes nothing in the comparison.
    """

    def __init__(self, models: Mapping[str, LightningModule], outputs: Outputs) -> None:
        super().__init__()
        self._models = models
        self._outputs = outputs
        self.collect_classes()

    def collect_classes(self) -> None:
        self.batches = 0
        self.problem: str | None = None
        self._classes: set[int] = set()
        self._comparison: Comparison | None = None
        self._comparing = False

    def compare(self, own: str) -> None:
        self._comparison = Comparison(own, self._classes)
        self._comparing = True

    def rest(self) -> None:
        self._comparing = False

    def metrics(self, name: str) -> dict[str, float]:
        if self._comparison is None or self.problem:
            return {}
        return self._comparison.metrics(name)

    def on_test_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._see(trainer, batch)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._see(trainer, batch)

    def _see(self, trainer: Any, batch: Any) -> None:
        targets = targets_of(batch)
        if self._comparing:
            if self.problem is None:
                self._compare(trainer, batch, targets)
        else:
            self.batches += 1
            if targets is not None:
                self._classes.update(torch.unique(targets).tolist())

    def _compare(self, trainer: Any, batch: Any, targets: Tensor | None) -> None:
        assert self._comparison is not None
        outputs: dict[str, Tensor] = {}
        try:
            for name, model in self._models.items():
                _place(model, trainer)
                with trainer.precision_plugin.test_step_context():
                    found = as_logits(self._outputs(model, copy.copy(batch)))
                if found is None:
                    raise TypeError(f"outputs(module, batch) must return a tensor of real numbers for {name}")
                outputs[name] = found
            shapes = {tuple(output.shape) for output in outputs.values()}
            if len(shapes) > 1:
                raise TypeError(f"the networks' outputs have different shapes: {sorted(shapes)}")
            outputs["ensemble"] = average_outputs([outputs[name] for name in ORIGINALS])
            self._comparison.update(outputs, targets)
        except Exception as error:
            self.problem = f"outputs could not be compared, so accuracies and output_change are missing: {error}"
            return


def _two_tasks(dataloaders: Any) -> dict[str, Any]:
    if isinstance(dataloaders, Mapping):
        tasks = {str(name): loader for name, loader in dataloaders.items()}
    elif isinstance(dataloaders, (list, tuple)):
        tasks = {f"task_{number}": loader for number, loader in enumerate(dataloaders, 1)}
    else:
        raise ValueError(f'dataloaders must be {{"task name": dataloader}} or a pair, got {type(dataloaders).__name__}')
    if len(tasks) != len(ORIGINALS):
        raise ValueError(f"evaluate needs one dataloader per network, {len(ORIGINALS)}, got {len(tasks)}")
    for name, loader in tasks.items():
        if "/" in name or not name:
            raise ValueError(
                f"a task's name becomes part of metric names and can't be empty or contain '/', got {name!r}"
            )
        if isinstance(loader, Iterator):
            raise ValueError(
                f"the dataloader of task {name!r} is a {type(loader).__name__}, which can be gone through only once,"
                " and every model needs a pass; pass a DataLoader or a list of batches"
            )
    # Lightning takes a list for several dataloaders; here it is one task's batches.
    return {
        name: DataLoader(cast(Any, loader), batch_size=None) if isinstance(loader, (list, tuple)) else loader
        for name, loader in tasks.items()
    }


def _place(model: Any, trainer: Any) -> None:
    """Put a copy where the evaluation runs: device, precision, evaluation mode, and a Trainer for code that asks."""
    model.trainer = trainer
    trainer.precision_plugin.convert_module(model).to(trainer.strategy.root_device).eval()


def _run(trainer: Any, model: Any, loader: Any, stage: str) -> dict[str, float]:
    """The model's own metrics from a pass over the loader."""
    results = getattr(trainer, stage)(model, dataloaders=loader, verbose=False)
    return {name: float(value) for result in results for name, value in result.items()}


def _note(report: MergeReport, text: str) -> None:
    if text not in report.notes:
        report.notes.append(text)
