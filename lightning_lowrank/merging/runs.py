"""Passes of several networks over one task's batches, in a Trainer that logs and saves nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lowrank._compat import Callback, LightningModule, namespace_of, quiet
from lightning_lowrank.merging.comparison import (
    Comparison,
    Ensemble,
    Outputs,
    as_logits,
    average_outputs,
    overrides,
    targets_of,
)
from lightning_lowrank.merging.leaks import LeakMeter
from lightning_lowrank.merging.progress import PassBar

STEPS = {"test": "test_step", "validate": "validation_step"}
ENSEMBLE = "ensemble"


class Runs:
    """Runs networks on tasks.

    Args:
        modules: The networks; all of one Lightning package, with a test or a validation step.
        trainer: A Trainer whose device, precision and batch limits are used, or None.
        outputs: Returns a network's outputs for a batch.
        progress: Whether there is a progress bar; None shows one in terminals and notebooks.

    Raises:
        TypeError: If a module is no LightningModule, or none of their steps can be run.
    """

    def __init__(self, modules: Sequence[Any], trainer: Any, outputs: Outputs, progress: bool | None = False) -> None:
        found = [namespace_of(module) for module in modules]
        names = " and ".join(type(module).__name__ for module in modules)
        if found[0] is None or any(namespace is not found[0] for namespace in found):
            count = {2: "two "}.get(len(modules), "")
            raise TypeError(f"evaluate needs {count}LightningModules of one Lightning package, got {names}")
        stages = [stage for stage, step in STEPS.items() if all(overrides(module, step) for module in modules)]
        if not stages:
            raise TypeError(f"{names} need a test_step or a validation_step to be evaluated")
        self.stage = stages[0]
        self._recorder = _Recorder(outputs)
        self.bar = PassBar(progress)
        self._trainer = _evaluation_trainer(found[0], trainer, [self._recorder, self.bar], self.stage)

    def measure(
        self,
        task: str,
        loader: Any,
        models: Mapping[str, LightningModule],
        own: str,
        ensemble: Sequence[str] = (),
        leaks: LeakMeter | None = None,
    ) -> tuple[dict[str, dict[str, float]], list[str]]:
        """Every model's metrics on a task.

        Args:
            task: What messages call it.
            loader: Its batches, which can be gone through more than once.
            models: By name.
            own: The name of the model that was trained on the task.
            ensemble: Names of the models whose outputs are averaged as one more.
            leaks: Sees what the layers of the task's own network get.

        Returns:
            Metrics by model and name; and notes on what could not be measured.
        """
        recorder, notes = self._recorder, []
        recorder.collect_classes(models, ensemble)
        with quiet():
            self.bar.describe(f"{task}: {own}")
            logged = {own: self.run(models[own], loader)}
            if recorder.batches == 0:
                raise ValueError(f"the dataloader of task {task!r} yields no batch")
            recorder.compare(own, leaks)
            for name in (name for name in models if name != own):
                self.bar.describe(f"{task}: {name}")
                logged[name] = self.run(models[name], loader)
                recorder.rest()
            if ensemble:
                self.bar.describe(f"{task}: {ENSEMBLE}")
                logged[ENSEMBLE], calls = self._run_ensemble([models[name] for name in ensemble], loader)
                if calls == 0:
                    logged[ENSEMBLE] = {}
                    notes.append(
                        f"{STEPS[self.stage]} of {type(models[own]).__name__} does not call the module itself, so its"
                        " own metrics do not exist for the ensemble"
                    )
        if recorder.problem:
            notes.append(recorder.problem)
        # A module's own metric keeps its name where one of ours is called the same.
        order = [*models, *([ENSEMBLE] if ensemble else [])]
        return {name: {**logged[name], **(recorder.metrics(name) | logged[name])} for name in order}, notes

    def run(self, model: Any, loader: Any) -> dict[str, float]:
        """The model's own metrics from a pass over the loader."""
        results = getattr(self._trainer, self.stage)(model, dataloaders=loader, verbose=False)
        return {name: float(value) for result in results for name, value in result.items()}

    def pass_over(self, model: Any, loader: Any) -> None:
        """Run the model over a loader for what its layers see, not for metrics."""
        self._recorder.rest()
        self.bar.expect(1)
        self.bar.describe("running statistics")
        with quiet():
            place(model, self._trainer)
            self.run(model, loader)

    def _run_ensemble(self, models: Sequence[Any], loader: Any) -> tuple[dict[str, float], int]:
        """The metrics of the first model's step with outputs averaged over all, and how often it called the module."""
        first, *others = models
        for other in others:
            place(other, self._trainer)
        ensemble = Ensemble(first, others)
        try:
            return self.run(first, loader), ensemble.calls
        finally:
            ensemble.remove()


class _Recorder(Callback):
    """Sees each batch before the running module does: first to collect a task's classes, then to compare all models.

    They all run on the very same batch, so a shuffling or augmenting dataloader changes nothing in the comparison.
    """

    def __init__(self, outputs: Outputs) -> None:
        super().__init__()
        self._outputs = outputs
        self.collect_classes({}, ())

    def collect_classes(self, models: Mapping[str, LightningModule], ensemble: Sequence[str]) -> None:
        """Begin a task: the next pass shows its batches and classes, those after :meth:`compare` compare the models."""
        self._models, self._ensemble = models, ensemble
        self.batches = 0
        self.problem: str | None = None
        self._classes: set[int] = set()
        self._comparison: Comparison | None = None
        self._leaks: LeakMeter | None = None
        self._comparing = False

    def compare(self, own: str, leaks: LeakMeter | None) -> None:
        self._comparison = Comparison(own, self._classes)
        self._leaks = leaks
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
            for model in self._models.values():
                place(model, trainer)
            for name, model in self._models.items():
                leaks = self._leaks if name == self._comparison.own else None
                with trainer.precision_plugin.test_step_context(), leaks.watching() if leaks else nullcontext():
                    found = as_logits(self._outputs(model, copy.copy(batch)))
                if found is None:
                    raise TypeError(f"outputs(module, batch) must return a tensor of real numbers for {name}")
                outputs[name] = found
            shapes = {tuple(output.shape) for output in outputs.values()}
            if len(shapes) > 1:
                raise TypeError(f"the networks' outputs have different shapes: {sorted(shapes)}")
            if self._ensemble:
                outputs[ENSEMBLE] = average_outputs([outputs[name] for name in self._ensemble])
            self._comparison.update(outputs, targets)
        except Exception as error:
            self.problem = f"outputs could not be compared, so accuracies and output_change are missing: {error}"


def checked_tasks(dataloaders: Any, count: int) -> dict[str, Any]:
    """Dataloaders by task, in the order of the networks.

    Raises:
        ValueError: If there is not one per network, or one can't be gone through more than once.
    """
    if isinstance(dataloaders, Mapping):
        tasks = {str(name): loader for name, loader in dataloaders.items()}
    elif isinstance(dataloaders, (list, tuple)):
        tasks = {f"task_{number}": loader for number, loader in enumerate(dataloaders, 1)}
    else:
        raise ValueError(f'dataloaders must be {{"task name": dataloader}} or a pair, got {type(dataloaders).__name__}')
    if len(tasks) != count:
        raise ValueError(f"evaluate needs one dataloader per network, {count}, got {len(tasks)}")
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


def place(model: Any, trainer: Any) -> None:
    """Put a copy where the evaluation runs: device, precision, evaluation mode, and a Trainer for code that asks."""
    model.trainer = trainer
    trainer.precision_plugin.convert_module(model).to(trainer.strategy.root_device).eval()


def _evaluation_trainer(namespace: Any, trainer: Any, callbacks: list[Callback], stage: str) -> Any:
    """A Trainer on one device, like the user's where there is one, that logs and saves nothing."""
    options: dict[str, Any] = {"accelerator": "auto", "devices": 1}
    if trainer is not None:
        device = trainer.strategy.root_device
        limit = {"test": "limit_test_batches", "validate": "limit_val_batches"}[stage]
        options = {
            "accelerator": {"cuda": "gpu"}.get(device.type, device.type),
            "devices": [device.index or 0] if device.type == "cuda" else 1,
            "precision": trainer.precision,
            "inference_mode": trainer.test_loop.inference_mode,
            "default_root_dir": trainer.default_root_dir,
            limit: getattr(trainer, limit),
        }
    with quiet():
        return namespace.Trainer(
            **options,
            callbacks=callbacks,
            # Steps that log pictures or tables by themselves find a logger that takes all and keeps nothing.
            logger=namespace.loggers.logger.DummyLogger(),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
