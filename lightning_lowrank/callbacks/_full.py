"""The pass over the training data that ``gradient="full"`` takes at the end of an epoch."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, distributed

from lightning_lowrank._compat import LightningModule, train_dataloaders
from lightning_lowrank.callbacks._optimizer import OptimizerMonitor
from lightning_lowrank.fetching import check_loader
from lightning_lowrank.full_gradient import gradient_of_pass
from lightning_lowrank.optimizers import Decay
from lightning_lowrank.parameters import optimized_parameters
from lightning_lowrank.sampling import pass_population
from lightning_lowrank.sharding import shards
from lightning_lowrank.training_pass import TrainingPass, check_module


def refusal(trainer: Any, module: LightningModule) -> str | None:
    """Why no pass over this run's training data can be taken; None if it can."""
    loaders = train_dataloaders(trainer)
    if len(loaders) != 1:
        return f"it goes over one training dataloader, and this run has {len(loaders)}; use gradient='step'"
    if any(group.get("maximize") for optimizer in trainer.optimizers for group in optimizer.param_groups):
        return "the optimizer has maximize=True, so the loss that it follows is not the one that is passed over"
    try:
        check_module(module)
        check_loader(loaders[0])
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def measure_epoch(trainer: Any, module: LightningModule, monitor: OptimizerMonitor) -> dict[str, float]:
    """The full-batch values at the present weights; the run goes on as if nothing had happened."""
    layout = shards(module)
    if any(shard.groups for found in layout.values() for shard in found):
        raise RuntimeError("gradient='full' can't go over sharded parameters; use gradient='window'")
    trained = [p for group in monitor.optimizer.param_groups for p in group["params"] if p.requires_grad]
    measured = [p for p in trained if any(monitor.settings.measures(s.name) for s in layout.get(id(p), ()))]
    [loader] = train_dataloaders(trainer)
    batches: float = trainer.num_training_batches
    limit = int(batches) if math.isfinite(batches) else None
    population = pass_population(loader, trainer.world_size, limit)
    shown = trainer.progress_bar_callback is not None and trainer.is_global_zero
    # What user code prints into a file or a pipe stays what it is.
    of_terminal, of_errors = sys.stdout.isatty(), sys.stderr.isatty()
    with Progress(disable=not shown, transient=True, redirect_stdout=of_terminal, redirect_stderr=of_errors) as bar:
        task = bar.add_task("full gradient", total=limit)
        steps = TrainingPass(
            module,
            loader,
            measured,
            trainer=trainer,
            limit_batches=limit,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
        sums = gradient_of_pass(steps, measured, population, _over_processes(trainer))
    gradients = {id(p): g for p, g in zip(measured, sums.gradients(), strict=True)}
    gradients_used = [bool(g.any()) for g in sums.gradients()]
    view = optimized_parameters(monitor.optimizer, layout, penalty=monitor.settings.penalty, gradients=gradients)
    found = sums.estimate(
        torch.tensor([p.weight_decay if p.decay is Decay.COUPLED else 0.0 for p in view], dtype=torch.float64),
        torch.tensor([p.in_loss for p in view], dtype=torch.float64),
        # A gradient of exactly 0 is that of a parameter that the loss does not use.
        [index for index in monitor.comparable(view) if gradients_used[index]],
    )
    return monitor.full_values(view, found)


def _over_processes(trainer: Any) -> Any:
    def total(tensor: Tensor) -> Tensor:
        if trainer.world_size > 1:
            tensor = tensor.to(trainer.strategy.root_device)
            distributed.all_reduce(tensor)
        return tensor

    return total
