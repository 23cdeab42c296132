"""LowRankMonitor: when to measure, and where the numbers go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_lowrank._compat import (
    Callback,
    LightningModule,
    Trainer,
    about_to_check,
    batches_that_stepped,
    is_wandb_logger,
    loss_scale,
    monitored_keys,
    raw_optimizer,
    sharding_strategy,
    unfreezes_later,
)
from lightning_lowrank.callbacks._epoch import step_sees_whole_epoch
from lightning_lowrank.callbacks._meter import LATE_KEYS, SPECTRAL_KEYS, Spectral, StepMeter
from lightning_lowrank.parameters import (
    Decay,
    Parameter,
    decay_kind,
    has_lazy_parameters,
    optimized_parameters,
    parameter_names,
    sharding,
)

# Measured steps between two rows, for the standard error of the radial balance.
_STEPS_PER_ROW = 10
# The interval where Lightning has none (`log_every_n_steps=0`, barebones): its own default.
_DEFAULT_INTERVAL = 50
_SPECTRAL = ("norm", "full", None)


class LowRankMonitor(Callback):
    """Logs how far a run is from a stationary point of its L2-regularised loss, and how low the rank of its weights is.

    Measured is the gradient that the optimizer is about to use: accumulated, reduced over ranks, unscaled, not clipped.
    The rows go to every logger of the Trainer, one dict per logging step with a constant set of keys, and the last
    finite values into ``trainer.callback_metrics``, where EarlyStopping and ModelCheckpoint find them. What can't be
    measured is NaN. The run itself is not changed by one bit. docs/metrics.md explains each key.

    - ``alignment_minibatch``, ``residual_minibatch``: of the step's own gradient. On mini-batches they are far from the
      full-batch values and say little about stationarity.
    - ``alignment``, ``residual``: the full-batch values, only where one optimizer step sees the whole epoch.
    - ``radial_balance``, ``radial_balance_stderr``: mean and standard error over the steps measured since the last row:
      about ten, or all of them while a callback watches one of the keys.
    - ``implied_weight_decay``, ``norm_spread``, ``stable_rank``, ``spectral_ratio``: over the weight matrices.
    - Per matrix: ``<key>/<parameter name>``.

    Args:
        every_n_steps: Batches with an optimizer step between two rows; None follows the Trainer's
            ``log_every_n_steps``.
        spectral: "norm" for the spectral norm and stable rank of every matrix, "full" for the effective rank as well (a
            full SVD of every matrix per row), None for no spectra.
        per_layer: Whether every matrix has keys of its own; "auto" means up to 32 matrices, and quantiles above.
        include: Glob pattern or patterns; only parameters whose name matches one are measured.
        exclude: Glob pattern or patterns of parameters that are left out.
        prefix: What the keys begin with; two monitors in one Trainer need two prefixes.

    Raises:
        ValueError: If an argument has a value that it can't have.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LowRankMonitor()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        spectral: Spectral | None = "norm",
        per_layer: bool | Literal["auto"] = "auto",
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        prefix: str = "lowrank",
    ) -> None:
        super().__init__()
        if every_n_steps is not None and (not isinstance(every_n_steps, int) or every_n_steps < 1):
            raise ValueError(f"every_n_steps must be a positive integer or None, got {every_n_steps!r}")
        if spectral not in _SPECTRAL:
            raise ValueError(f"spectral must be one of {_SPECTRAL}, got {spectral!r}")
        if per_layer not in ("auto", True, False):
            raise ValueError(f"per_layer must be 'auto', True or False, got {per_layer!r}")
        if not prefix or prefix != prefix.strip("/"):
            raise ValueError(f"prefix must be a name without a slash at either end, got {prefix!r}")
        self.every_n_steps = every_n_steps
        self.spectral = spectral
        self.per_layer = per_layer
        self.include = _patterns(include)
        self.exclude = _patterns(exclude)
        self.prefix = prefix
        self._reset()

    def _reset(self) -> None:
        self._meters: dict[int, StepMeter] = {}
        self._last_step: dict[int, int] = {}
        self._rows_done: dict[int, int] = {}
        self._watched: dict[str, list[Any]] = {}
        self._pending: dict[str, float] = {}
        self._failed = False
        self._logger_failed = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a second monitor with the same prefix: its rows would overwrite the first one's."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(c, LowRankMonitor) and c is not self and c.prefix == self.prefix for c in callbacks):
            raise ValueError(
                f"two LowRankMonitors log under the prefix {self.prefix!r}; give one of them another, such as"
                f" LowRankMonitor(prefix={self.prefix + '_2'!r})"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide what this run can measure, and say before training what it can't."""
        self._reset()
        try:
            self._prepare(trainer, pl_module)
        except Exception as error:
            self._give_up(error)

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        whole_epoch = step_sees_whole_epoch(trainer, pl_module)
        for index, optimizer in enumerate(map(raw_optimizer, trainer.optimizers)):
            decays = [decay_kind(optimizer, group) for group in optimizer.param_groups]
            self._meters[index] = StepMeter(
                whole_epoch=whole_epoch, spectral=self.spectral, per_layer=self.per_layer, decays=decays
            )
            self._announce(optimizer, decays)
        names = parameter_names(pl_module).values()
        if names and not any(map(self._is_measured, names)):
            rank_zero_warn(
                f"LowRankMonitor: include={self.include}, exclude={self.exclude} leave no parameter to measure"
            )
        if not has_lazy_parameters(pl_module):
            self._name_layers(trainer, pl_module)
        self._watched = monitored_keys(trainer, self.prefix)
        self._warn_watchers(trainer)
        if trainer.is_global_zero:
            logger: Any
            for logger in filter(is_wandb_logger, trainer.loggers):
                # Lightning defines the x-axis only where it started the W&B run itself.
                logger.experiment.define_metric(f"{self.prefix}/*", step_metric="trainer/global_step")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Measure the gradient that the optimizer is about to use."""
        optimizer = raw_optimizer(optimizer)
        index = next((i for i, o in enumerate(trainer.optimizers) if raw_optimizer(o) is optimizer), None)
        step = batches_that_stepped(trainer)
        # LBFGS and other closures come here several times a step; the first is at the parameters of the step.
        if index not in self._meters or self._last_step.get(index) == step:
            return
        interval = self._interval(trainer)
        first = index not in self._last_step
        if first:
            self._rows_done[index] = step // interval
        self._last_step[index] = step
        # A row is due once per interval, at the first step of this optimizer from then on: under manual optimization it
        # need not step in every batch.
        row = bool(trainer.fast_dev_run) or (step + 1) // interval > self._rows_done[index]  # type: ignore[attr-defined]
        fresh = first or bool(self._watched)
        if not (row or fresh or (step + 1) % math.ceil(interval / _STEPS_PER_ROW) == 0):
            return
        spectra = row or first or (self._watches_spectra and about_to_check(trainer))
        values = self._measure(trainer, pl_module, index, optimizer, spectra)
        section = self._section(index)
        if row:
            self._rows_done[index] = (step + 1) // interval
            self._meters[index].start_row()
            self._pending |= {f"{section}/{key}": values.get(key, math.nan) for key in self._meters[index].keys}
        if row or fresh:
            trainer.callback_metrics.update(
                {f"{section}/{k}": torch.tensor(v) for k, v in values.items() if math.isfinite(v)}
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Send the step's row to every logger."""
        if not self._pending:
            return
        keys = [f"{self._section(index)}/{key}" for index, meter in self._meters.items() for key in meter.keys]
        row = {key: self._pending.get(key, math.nan) for key in keys}
        self._pending = {}
        for logger in trainer.loggers:
            try:
                logger.log_metrics(row, step=batches_that_stepped(trainer))
            except Exception as error:
                if not self._logger_failed:
                    rank_zero_warn(f"LowRankMonitor: {type(logger).__name__} could not take a row: {error!r}")
                self._logger_failed = True

    @property
    def _watches_spectra(self) -> bool:
        return any(part in SPECTRAL_KEYS for key in self._watched for part in key.split("/"))

    def _section(self, index: int) -> str:
        return self.prefix if len(self._meters) == 1 else f"{self.prefix}/optimizer_{index}"

    def _name_layers(self, trainer: Trainer, module: LightningModule) -> None:
        """Fix which matrices have keys: all that an optimizer holds, and those that a finetuning callback may add."""
        names = parameter_names(module)
        later = list(module.parameters()) if len(self._meters) == 1 and unfreezes_later(trainer) else []
        for index, meter in self._meters.items():
            groups = raw_optimizer(trainer.optimizers[index]).param_groups
            trained = [p for group in groups for p in group["params"] if p.requires_grad]
            held = {id(p): p for p in (*trained, *later)}
            layers = [name for key, name in names.items() if key in held and held[key].ndim >= 2]
            meter.layers = [name for name in layers if self._is_measured(name)]

    def _interval(self, trainer: Any) -> int:
        interval: int = self.every_n_steps or trainer.log_every_n_steps or _DEFAULT_INTERVAL
        return interval

    def _measure(
        self, trainer: Trainer, module: LightningModule, index: int, optimizer: Any, spectra: bool
    ) -> dict[str, float]:
        """The step's values; none where measuring fails, which it says once and then stops trying."""
        if self._failed:
            return {}
        try:
            if self._meters[index].layers is None:
                self._name_layers(trainer, module)
            view = self._view(trainer, module, optimizer)
            whole_epoch = step_sees_whole_epoch(trainer, module)
            return self._meters[index].measure(view, whole_epoch=whole_epoch, spectra=spectra) if view else {}
        except Exception as error:
            self._give_up(error)
            return {}

    def _give_up(self, error: Exception) -> None:
        """A monitor never ends a run that would have gone on."""
        self._failed = True
        rank_zero_warn(f"LowRankMonitor measures no more in this run: {error}")

    def _view(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> list[Parameter]:
        kind = sharding_strategy(trainer) or sharding(
            module, (p for group in optimizer.param_groups for p in group["params"])
        )
        if kind is not None:
            raise RuntimeError(
                f"parameters are sharded over processes ({kind}), and a shard's sums are not the parameter's"
            )
        view = optimized_parameters(optimizer, parameter_names(module), loss_scale=loss_scale(trainer, optimizer))
        return [p for p in view if self._is_measured(p.name)]

    def _is_measured(self, name: str) -> bool:
        included = not self.include or any(fnmatchcase(name, pattern) for pattern in self.include)
        return included and not any(fnmatchcase(name, pattern) for pattern in self.exclude)

    def _announce(self, optimizer: Any, decays: Sequence[Decay]) -> None:
        name = type(optimizer).__name__
        if Decay.DECOUPLED in decays:
            rank_zero_info(
                f"LowRankMonitor: {name} decays weights beside the gradient, not through it, so the stationary point of"
                " the L2-regularised loss is not its target: alignment, residual and radial balance are left out for"
                " the parameters that it decays."
            )
        if Decay.UNKNOWN in decays:
            rank_zero_info(
                f"LowRankMonitor: how {name} applies its weight decay is unknown, so alignment, residual and radial"
                " balance are left out for the parameters that it decays."
            )
        if all(decay is Decay.NONE for decay in decays):
            rank_zero_info(
                f"LowRankMonitor: {name} has no weight decay, so alignment, residual and radial balance are NaN."
            )

    def _warn_watchers(self, trainer: Any) -> None:
        """Say which callback waits for a key that this run will not have when the callback first looks."""
        batches = min(trainer.num_training_batches, trainer.val_check_batch or math.inf)
        steps = batches / trainer.accumulate_grad_batches
        scalars = [f"{self._section(i)}/{key}" for i, meter in self._meters.items() for key in meter.scalar_keys]
        available = [f"{self._section(i)}/{key}" for i, meter in self._meters.items() for key in meter.keys]
        layers_known = all(meter.layers is not None for meter in self._meters.values())
        for key, watchers in self._watched.items():
            names = ", ".join(type(watcher).__name__ for watcher in watchers)
            if key not in available and (layers_known or key.count("/") == scalars[0].count("/")):
                rank_zero_warn(
                    f"{names} monitors {key!r}, which this run does not measure{self._why_missing(key)}. It measures:"
                    f" {', '.join(scalars)}, and values per layer."
                )
            elif key.rsplit("/", 1)[-1] in LATE_KEYS and steps < _STEPS_PER_ROW:
                rank_zero_warn(
                    f"{names} monitors {key!r}, which has its first value only after several measured steps, and looks"
                    f" for it after {steps:g}. Pass strict=False to EarlyStopping, or let ModelCheckpoint begin later."
                )

    def _why_missing(self, key: str) -> str:
        if not {"alignment", "residual"}.isdisjoint(key.split("/")):
            return ": it exists only where one optimizer step sees the whole epoch and the weight decay is coupled"
        return ""


def _patterns(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
