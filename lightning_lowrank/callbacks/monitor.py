"""LowRankMonitor: when to measure, and where the numbers go."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from lightning_lowrank._compat import (
    Callback,
    LightningModule,
    Trainer,
    about_to_check,
    batches_that_stepped,
    current_loss_scale,
    gradient_epsilon,
    loss_scale,
    of_rank_zero,
    progress_bar_metrics,
    raw_optimizer,
    sharding_strategy,
    unfreezes_later,
)
from lightning_lowrank.callbacks._arguments import check_choice, check_coefficient, check_count, is_coefficient
from lightning_lowrank.callbacks._budget import Budget
from lightning_lowrank.callbacks._full import measure_epoch
from lightning_lowrank.callbacks._full import refusal as full_refusal
from lightning_lowrank.callbacks._keys import PerLayer, Spectral
from lightning_lowrank.callbacks._optimizer import LayerRow, OptimizerMonitor, Settings, Source
from lightning_lowrank.callbacks._outlets import Outlets, show
from lightning_lowrank.callbacks._regimes import LayerRegime
from lightning_lowrank.callbacks._watchers import Watchers
from lightning_lowrank.callbacks._window import GradientWindow
from lightning_lowrank.functional.rescaling import Regime
from lightning_lowrank.matrices import check_overrides, layouts_of_parameters
from lightning_lowrank.parameters import Penalty, has_lazy_parameters
from lightning_lowrank.sampling import step_sees_whole_epoch
from lightning_lowrank.sharding import refusal, shards

T = TypeVar("T")
Gradient = Literal["auto", "step", "window", "full"]

# Measured steps between two rows, for the standard error of the radial balance; fewer where windows measure many.
_STEPS_PER_ROW = 10
_STEPS_PER_ROW_BESIDE_WINDOWS = 4
# The interval where Lightning has none (`log_every_n_steps=0`, barebones): its own default.
_DEFAULT_INTERVAL = 50
# Above that many parameters the window's buffer is no small thing any more.
_LARGE_MODEL = 1_000_000_000


class LowRankMonitor(Callback):
    """Logs how far a run is from a stationary point of its L2-regularised loss, and how low the rank of its weights is.

    Measured is the gradient that the optimizer is about to use: accumulated, reduced over ranks, unscaled, not clipped.
    The rows go to every logger of the Trainer, one dict per logging step with a constant set of keys, and the last
    finite values into ``trainer.callback_metrics``, where EarlyStopping and ModelCheckpoint find them. What can't be
    measured is NaN. The run itself is not changed by one bit. docs/metrics.md explains each key.

    - ``alignment``, ``residual``: of the full-batch gradient, with standard errors; see ``gradient``.
    - ``alignment_minibatch``, ``residual_minibatch``: of the step's own gradient. On mini-batches they are far from the
      full-batch values and say little about stationarity.
    - ``radial_balance``, ``radial_balance_stderr``: mean and standard error over the steps measured since the last row.
    - ``update_alignment``, ``update_residual``, ``linf_decay``, ``spectral_decay``: the targets of decoupled decay.
    - ``norm_spread``, ``homogeneity_defect``, ``norm_gap``, ``norm_gap_predicted``: norms among layers that can trade a
      factor. ``scale_invariant_balance``: of layers in front of a normalisation, which the others leave out.
    - ``cumulative_decay``, ``steps_to_stationarity``, ``implied_weight_decay``, ``stable_rank``, ``spectral_ratio``.
    - Per matrix: ``<key>/<parameter name>``. ``overhead``: the share of the run's time that measuring took.

    Args:
        every_n_steps: Batches with an optimizer step between two rows; None follows the Trainer's
            ``log_every_n_steps``.
        gradient: Where the full-batch values come from. "window": noise-corrected from the gradients of ``window_size``
            steps. "full": a pass over the training data at fixed weights every ``every_n_epochs`` epochs. "step": only
            where one optimizer step sees the whole epoch. "auto": "step" in that case, else "window", and "step" again
            for models above a billion parameters.
        window_size: Optimizer steps of a window; None chooses whole epochs where they are short enough.
        window_stride: Every how many steps a window takes a gradient.
        window_rest: Steps between two windows; None keeps the cost of large models below a percent of their training,
            by a rest of eight windows' length before each.
        every_n_epochs: Epochs between two passes of ``gradient="full"``.
        spectral: "norm" for the spectral norm (to 1e-3) and stable rank of every matrix, "full" for the effective rank
            as well (all singular values), None for no spectra.
        spectral_every_n_steps: Batches between two measurements of spectra; None means every row. Rows between have
            the last values.
        spectral_budget: Share of the run's wall time that the monitor may take before spectra have to wait. Those of a
            large model are then spread over several rows, in turn; ``spectral_age`` says how old the oldest is.
        matrices: Which matrix a parameter is, by glob pattern of its name, where it is another than found: "linear",
            "groups:4", "circular:32x32" (the operator norm of a convolution), or None for no spectrum of it.
        per_layer: Whether every matrix has keys of its own; "auto" means up to 32 matrices, and quantiles above.
        weight_decay: Replaces the coefficient of the optimizer's groups; "auto" takes theirs.
        loss_penalty: Coefficient c of a penalty c/2 |theta|^2 that is written into the loss.
        groups: Rescaling groups by name, each a list of patterns of weights, for layers that the search does not pair.
        include: Glob pattern or patterns; only parameters whose name matches one are measured.
        exclude: Glob pattern or patterns of parameters that are left out.
        initialization_share: ``steps_to_stationarity`` counts the steps until the initialisation has decayed below it.
        progress_bar: Whether the Trainer's progress bar shows alignment and residual.
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
        gradient: Gradient = "auto",
        window_size: int | None = None,
        window_stride: int = 1,
        window_rest: int | None = None,
        every_n_epochs: int = 1,
        spectral: Spectral | None = "norm",
        spectral_every_n_steps: int | None = None,
        spectral_budget: float = 0.01,
        matrices: dict[str, str | None] | None = None,
        per_layer: PerLayer = "auto",
        weight_decay: float | Literal["auto"] = "auto",
        loss_penalty: float = 0.0,
        groups: dict[str, list[str]] | None = None,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        initialization_share: float = 0.01,
        progress_bar: bool = False,
        prefix: str = "lowrank",
    ) -> None:
        super().__init__()
        check_count("every_n_steps", every_n_steps, optional=True)
        check_count("spectral_every_n_steps", spectral_every_n_steps, optional=True)
        check_count("window_size", window_size, optional=True)
        check_count("window_stride", window_stride)
        check_count("window_rest", window_rest, least=0, optional=True)
        check_count("every_n_epochs", every_n_epochs)
        check_choice("gradient", gradient, get_args(Gradient))
        check_choice("spectral", spectral, (*get_args(Spectral), None))
        check_choice("per_layer", per_layer, ("auto", True, False))
        check_coefficient("weight_decay", weight_decay, automatic=True)
        check_coefficient("loss_penalty", loss_penalty)
        check_overrides(matrices or {})
        if not is_coefficient(spectral_budget) or not 0 < spectral_budget <= 1:
            raise ValueError(f"spectral_budget must be a share above 0 and at most 1, got {spectral_budget!r}")
        if not 0 < initialization_share < 1:
            raise ValueError(f"initialization_share must be between 0 and 1, got {initialization_share!r}")
        if not prefix or prefix != prefix.strip("/"):
            raise ValueError(f"prefix must be a name without a slash at either end, got {prefix!r}")
        self.every_n_steps = every_n_steps
        self.gradient = gradient
        self.window_size = window_size
        self.window_stride = window_stride
        self.window_rest = window_rest
        self.every_n_epochs = every_n_epochs
        self.spectral_every_n_steps = spectral_every_n_steps
        self.spectral_budget = spectral_budget
        self.progress_bar = progress_bar
        self.prefix = prefix
        self.settings = Settings(
            spectral=spectral,
            per_layer=per_layer,
            penalty=Penalty(None if weight_decay == "auto" else float(weight_decay), float(loss_penalty)),
            groups=groups or {},
            include=_patterns(include),
            exclude=_patterns(exclude),
            share=initialization_share,
            matrices=matrices or {},
        )
        self._restored: Mapping[str, Any] | None = None
        # Trainer and module of the last fit, where it ended, and the state: another fit of both goes on from there.
        self._fitted: tuple[weakref.ref[Any], weakref.ref[Any], int, dict[str, Any]] | None = None
        self._reset()

    def _reset(self) -> None:
        self._optimizers: dict[int, OptimizerMonitor] = {}
        self._watchers: Watchers | None = None
        self._outlets: Outlets | None = None
        self._last_step: dict[int, int] = {}
        self._rows_done: dict[int, int] = {}
        self._spectra_done: dict[int, int] = {}
        self._budget: Budget | None = None
        self._stepped: OptimizerMonitor | None = None
        self._pending: dict[str, float] = {}
        # Optimizers that were measured in this batch, and whether for a row.
        self._measured: dict[int, bool] = {}
        self._failed = False
        self._passes_failed = False
        self._said = False
        self._loss_scale: float | None = None
        self._started = self._spent = 0.0

    @property
    def state_key(self) -> str:
        """Tells this monitor's state in a checkpoint from that of one with another prefix."""
        return self._generate_state_key(prefix=self.prefix)

    def state_dict(self) -> dict[str, Any]:
        """The cumulative decay, and where the norms began."""
        return {str(index): monitor.state_dict() for index, monitor in self._optimizers.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up an earlier run's sums once training starts."""
        self._restored = state_dict

    def __getstate__(self) -> dict[str, Any]:
        """Without the reference to the last Trainer, which can't be pickled."""
        return {**vars(self), "_fitted": None}

    def regimes(self) -> dict[str, LayerRegime]:
        """What has been found about each weight matrix so far, by name: its regime with the evidence."""
        found: dict[str, LayerRegime] = {}
        for monitor in self._optimizers.values():
            found |= monitor.regimes.regimes() if monitor.regimes else {}
        return found

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide what this run can measure, and say before training what it can't."""
        self._reset()
        self._started = time.perf_counter()
        self._budget = Budget(self.spectral_budget, partial(of_rank_zero, trainer))
        if self.gradient == "full" and (reason := full_refusal(trainer, pl_module)):
            raise ValueError(f"LowRankMonitor(gradient='full') can't be used here: {reason}")
        if self.settings.matrices and not has_lazy_parameters(pl_module):
            shapes = {shard.name: shard.shape for found in shards(pl_module).values() for shard in found}
            layouts_of_parameters(pl_module, shapes, self.settings.matrices)
        self._attempt(self._prepare, trainer, pl_module)

    def _prepare(self, trainer: Any, module: LightningModule) -> None:
        # A module without optimizers has a stand-in without parameters.
        raw = map(raw_optimizer, trainer.optimizers)
        optimizers = [o for o in raw if isinstance(o, Optimizer) and any(group["params"] for group in o.param_groups)]
        source = self._source(trainer, module)
        for index, optimizer in enumerate(optimizers):
            window = None
            if source == "window":
                window = GradientWindow(self.window_size, self.window_stride, self.window_rest)
            monitor = OptimizerMonitor(optimizer, self.settings, source, gradient_epsilon(trainer), window)
            self._optimizers[index] = monitor
            monitor.announce()
            if not has_lazy_parameters(module):
                later = list(module.parameters()) if len(optimizers) == 1 and unfreezes_later(trainer) else []
                monitor.name_layers(module, later)
        self._restore(trainer, module)
        self._watchers = Watchers(trainer, self.prefix)
        self._watchers.prepare(self._keys("all"), self._keys("scalars"), layers_known=not has_lazy_parameters(module))
        self._loss_scale = current_loss_scale(trainer)
        self._outlets = Outlets(trainer, self.prefix, self.spectral_every_n_steps, self._layer_rows)
        self._outlets.describe(self._description())

    def _source(self, trainer: Any, module: LightningModule) -> Source | None:
        """Where the full-batch values of this run come from."""
        whole = step_sees_whole_epoch(trainer, module)
        if self.gradient in ("window", "full"):
            return self.gradient
        if self.gradient == "step" or whole or not module.automatic_optimization:
            return "step" if whole else None
        count = sum(
            p.numel() for p in module.parameters() if p.requires_grad and not isinstance(p, UninitializedParameter)
        )
        if count > _LARGE_MODEL:
            rank_zero_info(
                f"LowRankMonitor: {count / 1e9:.1f} billion parameters, so no window of gradients is kept beside them,"
                " and alignment and residual are the mini-batch's only; gradient='window' overrides that."
            )
            return None
        return "window"

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Measure the gradient that the optimizer is about to use."""
        optimizer = raw_optimizer(optimizer)
        for index, monitor in self._optimizers.items():
            if monitor.optimizer is optimizer:
                self._attempt(self._settle, trainer)
                self._measure(trainer, pl_module, index, monitor)
                self._attempt(monitor.clock.advance)
                self._stepped = monitor

    def _measure(self, trainer: Any, module: LightningModule, index: int, monitor: OptimizerMonitor) -> None:
        step = batches_that_stepped(trainer)
        # LBFGS and other closures come here several times a step; the first is at the parameters of the step.
        if self._last_step.get(index) == step:
            return
        interval = self.every_n_steps or trainer.log_every_n_steps or _DEFAULT_INTERVAL
        first = index not in self._last_step
        if first:
            self._rows_done[index] = step // interval
        self._last_step[index] = step
        # A row is due once per interval, at the first step of this optimizer from then on: under manual optimization it
        # need not step in every batch.
        row = (
            bool(trainer.fast_dev_run)
            or (step + 1) // interval > self._rows_done[index]
            or (trainer.is_last_batch and self._passes(trainer))
        )
        in_full = row or first or bool(self._watchers)
        drawn = self._attempt(monitor.window.due, trainer, module) if monitor.window else None
        per_row = _STEPS_PER_ROW if monitor.window is None else _STEPS_PER_ROW_BESIDE_WINDOWS
        regular = (step + 1) % math.ceil(interval / per_row) == 0
        if not (in_full or regular or drawn is not None):
            return
        spectra = self._budget if in_full and self._spectra_due(trainer, index, step, row=row or first) else None
        wanted = {"in_full": in_full, "spectra": spectra, "drawn": drawn, "number": step}
        values = self._attempt(self._values, trainer, module, monitor, **wanted)
        if values is None and not self._failed:
            return  # no parameter has a gradient: a row that is due comes with the next step
        self._take(trainer, index, values or {}, row=row)
        if in_full:
            self._measured[index] = row
        if row:
            self._rows_done[index] = (step + 1) // interval
            monitor.start_row()

    def _spectra_due(self, trainer: Any, index: int, step: int, *, row: bool) -> bool:
        """Whether spectra are measured in a step; then says how much time the rest of the monitor has taken."""
        assert self._budget is not None
        self._budget.spent_elsewhere = self._spent - self._budget.spent
        if self._watchers is not None and self._watchers.spectra and about_to_check(trainer):
            return True
        if self.spectral_every_n_steps is None:
            return row
        count = (step + 1) // self.spectral_every_n_steps
        due = count > self._spectra_done.get(index, -1)
        if due:
            self._spectra_done[index] = count
        return due

    def _values(
        self, trainer: Any, module: LightningModule, monitor: OptimizerMonitor, **wanted: Any
    ) -> dict[str, float] | None:
        strategy = sharding_strategy(trainer)
        parameters = [p for group in monitor.optimizer.param_groups for p in group["params"]]
        if (reason := strategy or refusal(module, parameters)) is not None:
            raise RuntimeError(reason)
        view = monitor.view(module, loss_scale(trainer, monitor.optimizer))
        return monitor.step(view, whole=step_sees_whole_epoch(trainer, module), **wanted) if view else None

    def _take(self, trainer: Any, index: int, values: Mapping[str, float], *, row: bool) -> None:
        """Put values into the row that is under way, and the finite ones where other callbacks find them."""
        named = {f"{self._section(index)}/{key}": value for key, value in values.items()}
        if row:
            missing = {f"{self._section(index)}/{key}": math.nan for key in self._optimizers[index].keys.all}
            self._pending = {**missing, **self._pending, **named}
        finite = {key: value for key, value in named.items() if math.isfinite(value)}
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in finite.items()})
        if self.progress_bar:
            section = self._section(index).removeprefix(self.prefix).removeprefix("/")
            show(progress_bar_metrics(trainer), section, self._optimizers[index].keys.headlines, values)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure what the step has done, and send its row to every logger."""
        self._attempt(self._settle, trainer)
        for index, row in self._measured.items():
            self._take(trainer, index, self._attempt(self._optimizers[index].after_step, pl_module) or {}, row=row)
        if not self._said and all(m.regimes and not m.regimes.searching for m in self._optimizers.values()):
            self._attempt(self._say_regimes)
        self._measured = {}
        if not (trainer.is_last_batch and self._passes(trainer)):
            self._send(trainer, batches_that_stepped(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Under ``gradient="full"``, go over the training data once at fixed weights."""
        if not self._passes(trainer):
            return
        for index, monitor in self._optimizers.items():
            start = time.perf_counter()
            try:
                self._take(trainer, index, measure_epoch(trainer, pl_module, monitor), row=True)
            except Exception as error:
                self._passes_failed = True
                rank_zero_warn(f"LowRankMonitor takes no more passes over the training data in this run: {error!r}")
            self._spent += time.perf_counter() - start
        self._send(trainer, batches_that_stepped(trainer) - 1)

    def _passes(self, trainer: Any) -> bool:
        """Whether a pass is taken at the end of this epoch."""
        decayed = any(monitor.is_decayed for monitor in self._optimizers.values())
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        return self.gradient == "full" and due and decayed and not (self._failed or self._passes_failed)

    def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """Say what was found about the layers, if the run was too short to say it before."""
        if not self._said:
            self._attempt(self._say_regimes)
        if self._outlets is not None:
            self._outlets.finish()
        self._fitted = weakref.ref(trainer), weakref.ref(pl_module), trainer.global_step, self.state_dict()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give callbacks that waited for a value back as they were."""
        if self._watchers is not None:
            self._watchers.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give callbacks that waited for a value back as they were."""
        self.teardown(trainer, pl_module, "fit")

    def _send(self, trainer: Any, step: int) -> None:
        if not self._pending:
            return
        self._pending[f"{self.prefix}/overhead"] = self._spent / (time.perf_counter() - self._started)
        row = {key: self._pending.get(key, math.nan) for key in self._keys("all")}
        self._pending = {}
        if self._outlets is not None:
            before = self._outlets.spent_on_tables
            self._outlets.send(row, step)
            self._spent += self._outlets.spent_on_tables - before

    def _layer_rows(self) -> list[LayerRow]:
        return [row for monitor in self._optimizers.values() for row in monitor.layer_rows()]

    def _description(self) -> dict[str, Any]:
        """What this run measures and against what, as plain data."""
        names = ["gradient", "window_size", "window_stride", "window_rest", "every_n_steps", "every_n_epochs", "prefix"]
        names += ["spectral_every_n_steps", "spectral_budget"]
        found = self.regimes()
        # All of them, empty or not: W&B adds to a configuration's dict what it had before.
        regimes = {regime.value: [name for name in found if found[name].regime is regime] for regime in Regime}
        return {
            "settings": {**{name: getattr(self, name) for name in names}, **self.settings.to_dict()},
            "optimizers": [monitor.description() for monitor in self._optimizers.values()],
            "regimes": regimes,
        }

    def _keys(self, which: Literal["all", "scalars"]) -> list[str]:
        """The names of the run's values, as loggers see them."""
        found = [
            f"{self._section(i)}/{key}"
            for i, monitor in self._optimizers.items()
            for key in getattr(monitor.keys, which)
        ]
        return [*found, f"{self.prefix}/overhead"]

    def _section(self, index: int) -> str:
        return self.prefix if len(self._optimizers) == 1 else f"{self.prefix}/optimizer_{index}"

    def _settle(self, trainer: Any) -> None:
        """Whether the last step was taken after all: a scaler that has lowered its factor has skipped it."""
        if self._loss_scale is not None:
            before, self._loss_scale = self._loss_scale, current_loss_scale(trainer)
            if self._stepped is not None and self._loss_scale is not None and self._loss_scale < before:
                self._stepped.clock.take_back()
        self._stepped = None

    def _restore(self, trainer: Any, module: Any) -> None:
        """Go on from the state in a checkpoint; without one, a resumed run's sums are not known."""
        restored, self._restored = self._restored, None
        if restored is None and self._fitted is not None:
            of_trainer, of_module, step, state = self._fitted
            same = of_trainer() is trainer and of_module() is module
            restored = state if same and step == trainer.global_step else None
        if restored is not None:
            for index, monitor in self._optimizers.items():
                if str(index) in restored:
                    monitor.load_state_dict(restored[str(index)])
        elif trainer.global_step > 0:
            for monitor in self._optimizers.values():
                monitor.clock.forget()
            rank_zero_info(
                "LowRankMonitor: the run was resumed from a checkpoint without the monitor's state, so cumulative_decay"
                " and what follows from it are NaN."
            )

    def _say_regimes(self) -> None:
        """Tell once which layers the theory speaks of."""
        self._said = True
        found = self.regimes()
        if self._outlets is not None:
            self._outlets.describe(self._description())
        if found:
            lines = [f"  {name}: {regime}" for name, regime in found.items()]
            rank_zero_info("LowRankMonitor: regimes of the layers\n" + "\n".join(lines))

    def _attempt(self, action: Callable[..., T], *args: Any, **kwargs: Any) -> T | None:
        """Do something and time it. A failure is said once, and nothing is done after it: it never ends the run."""
        if self._failed:
            return None
        start = time.perf_counter()
        try:
            return action(*args, **kwargs)
        except Exception as error:
            self._failed = True
            rank_zero_warn(f"LowRankMonitor measures no more in this run: {error}")
            return None
        finally:
            self._spent += time.perf_counter() - start


def _patterns(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
