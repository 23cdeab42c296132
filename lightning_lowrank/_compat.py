"""Everything that depends on which Lightning is installed, or on what Lightning keeps private.

``lightning.pytorch`` and ``pytorch_lightning`` are separate copies of one code base with unrelated classes, and users
have either or both. A class that derives from both ``Callback``s works in both Trainers.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

import lightning.pytorch as _lightning
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

NAMESPACES: tuple[ModuleType, ...] = (_lightning,) + (
    (import_module("pytorch_lightning"),) if find_spec("pytorch_lightning") else ()
)

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:

    class Callback(*(namespace.Callback for namespace in NAMESPACES)):
        """A callback that every installed Lightning accepts."""


def namespace_of(module: nn.Module) -> ModuleType | None:
    """The Lightning package whose LightningModule this is; None for any other module."""
    return next((ns for ns in NAMESPACES if isinstance(module, ns.LightningModule)), None)


def batches_that_stepped(trainer: Trainer) -> int:
    """The x-axis of every value that Lightning logs by itself: batches that ended in an optimizer step."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def raw_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer inside Lightning's wrapper, which manual optimization hands around."""
    inner = getattr(optimizer, "_optimizer", optimizer)
    return inner if isinstance(inner, Optimizer) else optimizer


def loss_scale(trainer: Trainer, optimizer: Optimizer) -> float:
    """The factor that is still in the gradients when ``on_before_optimizer_step`` runs.

    Under 16-mixed Lightning unscales the gradients before that hook, except for fused optimizers, which unscale inside
    their own step.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())


def monitored_keys(trainer: Trainer, prefix: str) -> dict[str, list[Any]]:
    """Our keys that EarlyStopping, ModelCheckpoint or a scheduler watches, with the callbacks that do."""
    watched: dict[str, list[Any]] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        key = getattr(callback, "monitor", None)
        if isinstance(key, str) and key.startswith(f"{prefix}/"):
            watched.setdefault(key, []).append(callback)
    for config in trainer.lr_scheduler_configs:
        if config.monitor is not None and config.monitor.startswith(f"{prefix}/"):
            watched.setdefault(config.monitor, []).append(config.scheduler)
    return watched


def train_dataloaders(trainer: Trainer) -> list[Any]:
    """The run's training dataloaders, flattened from whatever collection the user returned."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def about_to_check(trainer: Any) -> bool:
    """Whether EarlyStopping or ModelCheckpoint may look at the metrics before the next optimizer step."""
    loop = trainer.fit_loop
    batch_number = (loop.total_batch_idx if trainer.check_val_every_n_epoch is None else loop.batch_idx) + 1
    interval = trainer.val_check_batch or math.inf
    validates = any((batch_number + later) % interval == 0 for later in range(trainer.accumulate_grad_batches))
    every = [getattr(callback, "_every_n_train_steps", 0) for callback in trainer.checkpoint_callbacks]
    saves = any(n > 0 and (trainer.global_step + 1) % n == 0 for n in every)
    return trainer.is_last_batch or validates or saves


def sharding_strategy(trainer: Trainer) -> str | None:
    """The name of the run's strategy if it shards parameters or gradients over processes."""
    name = type(trainer.strategy).__name__
    return name if name in ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAFSDPStrategy") else None


def unfreezes_later(trainer: Any) -> bool:
    """Whether a callback may hand frozen parameters to the optimizer during the run."""
    finetuning = tuple(namespace.callbacks.BaseFinetuning for namespace in NAMESPACES)
    return any(isinstance(callback, finetuning) for callback in trainer.callbacks)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what a Trainer of our own would say: hardware it found, tips, advice about a user's own training."""
    loggers = [logging.getLogger(f"{namespace.__name__}.utilities.rank_zero") for namespace in NAMESPACES] + [
        logging.getLogger(name)
        for name in ("lightning.fabric.utilities.rank_zero", "lightning_fabric.utilities.rank_zero")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for advice in (
                "does not have many workers",
                "shuffling enabled",
                "logging interval",
                "is not empty",
                "LeafSpec",
            ):
                warnings.filterwarnings("ignore", message=f".*{advice}")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def is_wandb_logger(logger: Any) -> bool:
    """Whether this is the WandbLogger of an installed Lightning; W&B itself need not be installed."""
    return any(isinstance(logger, ns.loggers.WandbLogger) for ns in NAMESPACES)


def as_list(value: Any) -> list[Any]:
    """The value as a list: None is empty, an iterable its items, anything else one item."""
    if value is None:
        return []
    return list(value) if isinstance(value, Iterable) else [value]


__all__ = [
    "NAMESPACES",
    "Callback",
    "LightningModule",
    "Trainer",
    "about_to_check",
    "as_list",
    "batches_that_stepped",
    "is_wandb_logger",
    "loss_scale",
    "monitored_keys",
    "namespace_of",
    "quiet",
    "raw_optimizer",
    "sharding_strategy",
    "train_dataloaders",
    "unfreezes_later",
]
