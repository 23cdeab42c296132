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
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.data import _extract_batch_size
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

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


def step_of_epoch(trainer: Any) -> int:
    """Which optimizer step of its epoch is about to be taken, from 0 on."""
    return int(trainer.fit_loop.epoch_loop.batch_idx) // int(trainer.accumulate_grad_batches)


def of_rank_zero(trainer: Any, decision: bool) -> bool:
    """The decision of the first process, on every process; a collective where there are several."""
    return decision if trainer.world_size == 1 else bool(trainer.strategy.broadcast(decision))


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
    """Why this run's strategy can't be measured; None if it can.

    ``FSDPStrategy`` wraps the module from outside, where the layout of its parameters is not to be seen from within.
    """
    name = type(trainer.strategy).__name__
    if name not in ("FSDPStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy"):
        return None
    return f"{name} shards parameters in a way that is not measured; ModelParallelStrategy and DDP are"


def unfreezes_later(trainer: Any) -> bool:
    """Whether a callback may hand frozen parameters to the optimizer during the run."""
    finetuning = tuple(namespace.callbacks.BaseFinetuning for namespace in NAMESPACES)
    return any(isinstance(callback, finetuning) for callback in trainer.callbacks)


def checks_until_finite(watcher: Any, trainer: Any, key: str) -> bool:
    """Let EarlyStopping pass over its checks until ``key`` has a finite value; False for any other watcher."""
    check = getattr(watcher, "_run_early_stopping_check", None)
    if check is None:
        return False

    def check_if_finite(trainer: Any) -> None:
        value = trainer.callback_metrics.get(key)
        if value is not None and torch.isfinite(value).all():
            check(trainer)

    watcher._run_early_stopping_check = check_if_finite
    return True


def gradient_epsilon(trainer: Any) -> float:
    """Machine epsilon of the arithmetic that the run's gradients are made with."""
    precision = str(trainer.precision)
    if "64" in precision:
        return torch.finfo(torch.float32).eps  # rounding of the measured products is below that
    if "bf16" in precision or "transformer-engine" in precision:
        return torch.finfo(torch.bfloat16).eps
    # Convolutions and, if allowed, matrix products on CUDA run in TF32, which keeps as many bits as float16.
    tf32 = trainer.strategy.root_device.type == "cuda" and (
        torch.backends.cudnn.allow_tf32 or torch.get_float32_matmul_precision() != "highest"
    )
    reduced = "16" in precision or tf32 or torch.get_float32_matmul_precision() == "medium"
    return torch.finfo(torch.float16 if reduced else torch.float32).eps


def current_loss_scale(trainer: Any) -> float | None:
    """The gradient scaler's factor; None where the run has no scaler. It falls where a step was skipped."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else float(scaler.get_scale())


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


def key_prefix(logger: Any) -> str:
    """What a W&B logger puts in front of every key: its own ``prefix`` argument."""
    return f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""


def progress_bar_metrics(trainer: Any) -> dict[str, Any]:
    """What the Trainer's progress bar shows beside the module's own values; entries stay until they are replaced."""
    shown: dict[str, Any] = trainer._logger_connector._progress_bar_metrics
    return shown


def as_list(value: Any) -> list[Any]:
    """The value as a list: None is empty, an iterable its items, anything else one item."""
    if value is None:
        return []
    return list(value) if isinstance(value, Iterable) else [value]


def is_machinery(kind: type) -> bool:
    """Whether objects of this class run a training rather than being trained by it."""
    own = [cls for ns in NAMESPACES for cls in (ns.Trainer, ns.Callback, ns.loggers.Logger)]
    return issubclass(kind, (Optimizer, LRScheduler, *own))


def attached_trainer(module: Any) -> Any:
    """The Trainer that the module belongs to, or None; ``module.trainer`` raises where there is none."""
    return module._trainer


@contextmanager
def attached(module: Any, trainer: Any) -> Iterator[None]:
    """Make the Trainer the module's, and that of LightningModules within it."""
    before = [(part, part._trainer) for part in module.modules() if namespace_of(part) is not None]
    module.trainer = trainer
    try:
        yield
    finally:
        for part, own in before:
            part._trainer = own


def quiet_trainer(module: Any) -> Any:
    """A Trainer on the module's own device that says, logs and saves nothing, as if it were training the module."""
    namespace, device = namespace_of(module), module.device
    assert namespace is not None
    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*available but not used")
        trainer = namespace.Trainer(
            accelerator={"cuda": "gpu"}.get(device.type, device.type),
            devices=[device.index or 0] if device.type == "cuda" else 1,
            logger=namespace.loggers.logger.DummyLogger(),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    trainer.strategy.connect(module)
    trainer.training = True
    return trainer


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    pass


@contextmanager
def silenced(module: nn.Module, trainer: Any) -> Iterator[None]:
    """Nothing that the module logs is kept: not by ``log`` and ``log_dict``, nor by the Trainer's loggers."""
    names = ("log", "log_dict")
    parts = [part for part in module.modules() if namespace_of(part) is not None]
    own = [{name: vars(part)[name] for name in names if name in vars(part)} for part in parts]
    loggers = trainer.loggers
    dummy = next(ns for ns in NAMESPACES if isinstance(trainer, ns.Trainer)).loggers.logger.DummyLogger
    for part in parts:
        vars(part).update(dict.fromkeys(names, _log_nothing))
    trainer.loggers = [dummy() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers
        for part, kept in zip(parts, own, strict=True):
            for name in names:
                vars(part).pop(name, None)
            vars(part).update(kept)


def is_combined_loader(loader: Any) -> bool:
    """Whether this is Lightning's bundle of several dataloaders."""
    return any(isinstance(loader, ns.utilities.CombinedLoader) for ns in NAMESPACES)


def move_batch(batch: Any, module: Any, trainer: Any, device: torch.device) -> Any:
    """Bring a batch from the dataloader to the module as fit does, through the hooks of module and datamodule."""
    selector = trainer._data_connector._datahook_selector if trainer.lightning_module is module else None
    batch = trainer.precision_plugin.convert_input(batch)
    for hook, extra in (
        ("on_before_batch_transfer", (0,)),
        ("transfer_batch_to_device", (device, 0)),
        ("on_after_batch_transfer", (0,)),
    ):
        owner = module if selector is None else selector.get_instance(hook)
        batch = getattr(owner, hook)(batch, *extra)
    return batch


def clone_batch(batch: Any) -> Any:
    """A batch of new tensors in new containers; objects of unknown classes are kept."""
    return apply_to_collection(batch, torch.Tensor, torch.Tensor.clone)


def batch_size(batch: Any) -> int | None:
    """The number of samples in a batch as Lightning's logging infers it; None where it would have to guess."""
    try:
        sizes = {size for size in _extract_batch_size(batch) if size is not None}
    except RecursionError:
        return None
    return sizes.pop() if len(sizes) == 1 else None


def takes(method: Any, name: str, *, position: int | None = None) -> bool:
    """Whether a hook takes an argument by this name, or has as many as ``position`` arguments beside ``self``."""
    return is_param_in_hook_signature(method, name, explicit=position is None, min_args=position)


__all__ = [
    "NAMESPACES",
    "Callback",
    "LightningModule",
    "Trainer",
    "about_to_check",
    "as_list",
    "attached",
    "attached_trainer",
    "batch_size",
    "batches_that_stepped",
    "checks_until_finite",
    "clone_batch",
    "current_loss_scale",
    "gradient_epsilon",
    "is_combined_loader",
    "is_machinery",
    "is_wandb_logger",
    "key_prefix",
    "loss_scale",
    "monitored_keys",
    "move_batch",
    "namespace_of",
    "progress_bar_metrics",
    "quiet",
    "quiet_trainer",
    "raw_optimizer",
    "sharding_strategy",
    "silenced",
    "step_of_epoch",
    "takes",
    "train_dataloaders",
    "unfreezes_later",
]
